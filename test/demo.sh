#!/usr/bin/env bash
# The system in two minutes, on the local cluster that make up started: two
# users, a room, a stranger, a revoke, one dead node, two dead nodes. Every step
# is checked; the script ends with 1 at the first that is not as told.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${UNIBUS_RUN_DIR:-.run}
export PATH=$PWD/bin:$PATH
# shellcheck source=/dev/null
source "$run/env"

work=$(mktemp -d)
export XDG_CONFIG_HOME=$work/config # for the nats contexts of the demo's users
killed=
listener=
cleanup() {
	[[ -z $listener ]] || kill "$listener" 2>/dev/null || true
	rm -rf "$work"
	[[ -z $killed ]] || unibus-local up >"$work.log" 2>&1 || cat "$work.log" >&2
	rm -f "$work.log"
}
trap cleanup EXIT

tell() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { # print a command and run it
	printf '$ %s\n' "$*"
	"$@"
}
fail() {
	echo "demo: $*" >&2
	exit 1
}
refused() { # run a command that must fail, and show why it did
	printf '$ %s\n' "$*"
	if timeout 15 "$@" >"$work/out" 2>&1; then fail "this should have been refused: $*"; fi
	tail -n 2 "$work/out"
}
within() { # within SECONDS COMMAND...: repeat until it succeeds
	local end=$((SECONDS + $1))
	shift
	until "$@" >"$work/out" 2>&1; do
		((SECONDS < end)) || { cat "$work/out" >&2; fail "not in time: $*"; }
	done
}
key() { unibusctl identity show "$work/$1.nk" --json | sed -nE 's/.*"nkey": *"(U[A-Z0-9]+)".*/\1/p'; }
send() { # send NAME TEXT: as NAME, under the subject that proves it
	nats --context "unibus-$1-$id" pub "room.demo-$id.$(key "$1").hello" "$2"
}
receive() { # receive NAME OF: NAME waits for a message, OF sends until it came
	nats --context "unibus-$1-$id" sub "room.demo-$id.>" --count 1 >"$work/received" 2>&1 &
	listener=$!
	local end=$((SECONDS + 20))
	while kill -0 "$listener" 2>/dev/null; do
		((SECONDS < end)) || fail "nothing arrived"
		send "$2" "hello from $2" >/dev/null 2>&1 || true
	done
	wait "$listener" || fail "$(<"$work/received")"
	listener=
	grep -A1 Received "$work/received"
}
unhealthy() { ! unibusctl cluster wait --nodes 1 --timeout 1s; }
kill_node() {
	killed=yes
	{ unibus-local status 2>/dev/null || true; } | awk -v n="$1" '$1 == n && $3 != "-" { print $3 }' | xargs kill -9
}

id=$(date +%s) # the demo can be told again: handles and rooms are for ever
tell "Three nodes, each with nats-server, authcallout and membership"
show unibusctl cluster status

tell "Two users: the cluster knows their public keys, the seeds stay with them"
for name in alice bob; do
	unibusctl identity new --out "$work/$name.nk" >/dev/null
	show unibusctl --direct user add --handle "$name-$id" --sign-pub "$(key "$name")"
	unibusctl --direct user context "$name-$id" --identity "$work/$name.nk" >/dev/null
done

tell "A room of alice; bob may read and write"
show unibusctl --direct room create "demo-$id" --owner "alice-$id"
show unibusctl --direct room add "demo-$id" "bob-$id" --role writer
receive alice bob

tell "Nobody speaks under another's name, or hears a room that is not theirs"
refused nats --context "unibus-bob-$id" pub "room.demo-$id.$(key alice).hello" "I am alice"
refused nats --context "unibus-bob-$id" sub 'room.>'

tell "A stranger is not let in"
unibusctl identity new --out "$work/mallory.nk" >/dev/null
refused nats --nkey "$work/mallory.nk" --server "$UNIBUS_NATS_URL" --tlsca "$UNIBUS_CA" pub x y

tell "A revoke returns when every service has it"
show unibusctl --direct --yes user revoke "bob-$id"
refused nats --context "unibus-bob-$id" pub "room.demo-$id.$(key bob).hello" "still here?"

tell "Node 1 dies: writes and admission go on"
kill_node n1
unibusctl identity new --out "$work/carol.nk" >/dev/null
within 30 unibusctl --direct user add --handle "carol-$id" --sign-pub "$(key carol)"
cat "$work/out"
unibusctl --direct user context "carol-$id" --identity "$work/carol.nk" >/dev/null
within 20 unibusctl --direct room add "demo-$id" "carol-$id" --role writer
receive alice carol

tell "Node 2 dies too: nothing can be known any more, so nothing is decided"
kill_node n2
within 15 unhealthy
refused unibusctl --direct user list

tell "Both come back: the cluster recovers unaided"
unibus-local up 2>"$work/up" || { cat "$work/up" >&2; exit 1; }
killed=
show unibusctl cluster status
receive alice carol
tell "That is unibus."
