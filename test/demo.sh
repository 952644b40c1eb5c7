#!/usr/bin/env bash
# The main job of the system, told on the local cluster that make up started:
# a first admin, two users and a stranger, a room, messages, one dead node, two
# dead nodes, and back. Every step is checked; the first that does not happen as
# told ends the script with 1 and one line that says which. Handles and rooms
# are for ever, so each run takes new names and may be repeated at once.
set -Eeuo pipefail
cd "$(dirname "$0")/.."
run=${UNIBUS_RUN_DIR:-.run}
export PATH=$PWD/bin:$PATH
[[ -r $run/env ]] || { echo "demo: there is no cluster in $run: make up" >&2; exit 1; }
unset "${!UNIBUS_TIMEOUT@}" "${!NATS_@}" # settings of the person's shell for other clusters
# shellcheck source=/dev/null
source "$run/env"

id=$(date +%s)
room=demo-$id alice=alice-$id bob=bob-$id mallory=mallory-$id
work=$(mktemp -d)
export XDG_CONFIG_HOME=$work/config # the nats contexts of the demo's users
steps=0 title=start listener='' killed=''

cleanup() {
	trap - ERR
	[[ -z $listener ]] || kill "$listener" 2>/dev/null || true
	[[ -z $killed ]] || unibus-local up >"$work/up" 2>&1 || cat "$work/up" >&2
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

fail() {
	trap - ERR
	printf '\ndemo: FAILED in step %d, %s: %s\n' "$steps" "$title" "$*" >&2
	exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR

step() { title=$*; printf '\n%d. %s\n' "$((++steps))" "$title"; }
ok() { printf '   OK: %s\n' "$*"; }
show() { printf '   $ %s\n' "${*//$work\//}"; }
output() { sed 's/^/   /' "$work/out"; }

try() { # COMMAND...: it must succeed
	show "$@"
	"$@" >"$work/out" 2>&1 || { output >&2; fail "this was to succeed: $*"; }
	output
}
refused() { # TEXT COMMAND...: it must be refused, within 15 s, with that text
	local text=$1 code=0
	shift
	show "$@"
	timeout 15 "$@" >"$work/out" 2>&1 || code=$?
	((code != 0)) || { output >&2; fail "this was to be refused: $*"; }
	((code != 124)) || fail "no answer within 15 s: $*"
	grep -q -- "$text" "$work/out" || { output >&2; fail "this was to be refused with '$text': $*"; }
	grep -- "$text" "$work/out" | tail -n 1 | sed 's/^/   /'
}
within() { # SECONDS COMMAND...: repeat a command until it succeeds
	local end=$((SECONDS + $1))
	shift
	until "$@" >"$work/out" 2>&1; do
		((SECONDS < end)) || { output >&2; fail "not in time: $*"; }
	done
}

key() { unibusctl identity show "$work/$1.nk" --json | sed -nE 's/.*"nkey": *"(U[A-Z0-9]+)".*/\1/p'; }
topic() { echo "room.$room.$(key "$1").hello"; } # where that user speaks
url() { tr ',' '\n' <<<"$UNIBUS_NATS_URL" | sed -n "$1p"; }

listen() { # USER SERVER: hear the room in the background, connected to that server
	show nats --context "$1" --server "$2" sub "room.$room.>"
	nats --context "$1" --server "$2" sub "room.$room.>" >"$work/heard" 2>&1 &
	listener=$!
	within 10 grep -q Subscribing "$work/heard"
}
hears() { # TEXT FROM [SERVER]: FROM says it until the listener has it
	local text=$1 from=$2 server=${3:-$UNIBUS_NATS_URL}
	show nats --context "$from" --server "$server" pub "$(topic "$from")" "$text"
	within 20 said "$text" "$from" "$server"
	grep -A 1 -- "Received on \"$(topic "$from")\"" "$work/heard" | tail -n 2 | sed 's/^/   /'
}
said() {
	nats --context "$2" --server "$3" pub "$(topic "$2")" "$1" && grep -qxF -- "$1" "$work/heard"
}
silence() {
	kill "$listener" 2>/dev/null || true
	wait "$listener" 2>/dev/null || true
	listener=
}
connects() { nats --context "$1" --server "$2" --timeout 2s pub "$(topic "$1")" ping; }
nobody_connects() { ! connects "$alice" "$(url 1)"; }

step "The cluster: three nodes, each with nats-server, authcallout and membership"
try unibusctl cluster status
ok "three healthy nodes"

step "The first admin is there, made once, when the cluster was made"
try unibusctl user list
admin=$(unibusctl identity show "$UNIBUS_IDENTITY" --json | sed -nE 's/.*"nkey": *"(U[A-Z0-9]+)".*/\1/p')
grep -qE "^ *admin +admin +active +$admin" "$work/out" || fail "the list does not show the admin with the key of $UNIBUS_IDENTITY"
refused "already bootstrapped" unibusctl --direct bootstrap --handle "second-$id" --sign-pub "$admin"
ok "one first admin, and never a second"

step "The admin invites a newcomer, who joins with one command: key, user, nats context, first connection"
try unibusctl invite create --handle "$alice"
read -ra join < <(grep '^unibusctl join ' "$work/out")
try "${join[@]}" --out "$work/$alice.nk" --name "$alice"
refused "invite is not accepted" "${join[@]}" --out "$work/thief.nk"
ok "a user who made their own key; the invite is worth nothing any more"

step "A second user and a stranger make their own keys; a seed never leaves its owner"
for who in "$bob" "$mallory"; do
	try unibusctl identity new --out "$work/$who.nk"
done
ok "two identities"

step "The admin registers one of the public keys, on a node this time"
try unibusctl --direct user add --handle "$bob" --sign-pub "$(key "$bob")" --role member
grep -q '^KV_UNIBUS_users: leader=n[1-3] ' "$work/out" || fail "no line about the users bucket"
refused "already registered" unibusctl user add --handle "other-$id" --sign-pub "$(key "$alice")"
try unibusctl user context "$bob" --identity "$work/$bob.nk" --name "$bob"
ok "two users; a key is registered once"

step "A room of $alice"
try unibusctl room create "$room" --identity "$work/$alice.nk"
ok "the room is there"

step "A stranger is not let in"
refused "Authorization Violation" nats --nkey "$work/$mallory.nk" --server "$UNIBUS_NATS_URL" --tlsca "$UNIBUS_CA" pub "$(topic "$mallory")" hello
ok "refused"

step "A user who is no member can neither speak in the room nor hear it"
refused "Permissions Violation for Publish" nats --context "$bob" pub "$(topic "$bob")" hello
refused "Permissions Violation for Subscription" nats --context "$bob" sub --wait 5s "room.$room.>"
ok "both refused"

step "The owner takes the user into the room"
try unibusctl room add "$room" "$bob" --role writer --identity "$work/$alice.nk"
try unibusctl room members "$room"
grep -qE "^ *$bob +writer +present" "$work/out" || fail "$bob is not in the list of members"
ok "a member"

step "They talk, each on a node of their own"
listen "$bob" "$(url 1)"
hears "hello from alice" "$alice" "$(url 2)"
silence
listen "$alice" "$(url 3)"
hears "hello from bob" "$bob" "$(url 1)"
silence
ok "both were heard, under subjects that prove who spoke"

step "Nobody speaks under another's name"
refused "Permissions Violation for Publish" nats --context "$bob" pub "$(topic "$alice")" "I am alice"
ok "refused"

step "Node n3 dies: kill -9 of all its processes; traffic goes on"
listen "$bob" "$(url 1)"
killed=yes
try unibus-local kill n3
hears "n3 is gone, I am not" "$alice"
ok "a connection that was there still hears; a new one is admitted at once"
silence
listen "$alice" "$(url 2)"
hears "me neither" "$bob" "$(url 1)"
silence
ok "both remaining nodes admit"

step "Node n2 dies too: without a quorum nothing can be known, so nobody is let in"
try unibus-local kill n2
began=$SECONDS
within 20 nobody_connects
first=$((SECONDS - began))
for _ in 1 2 3; do
	nobody_connects || fail "admitted without a quorum"
done >/dev/null 2>&1
show nats --context "$alice" --server "$(url 1)" pub "$(topic "$alice")" hello
output
ok "nobody is admitted any more, $first s after the quorum was lost (leases of 10 s had to run out)"
refused "cannot decide now" unibusctl user add --handle "late-$id" --sign-pub "$(key "$mallory")"
began=$(date +%s%N)
code=0
show unibusctl --direct user add --handle "late-$id" --sign-pub "$(key "$mallory")"
unibusctl --direct user add --handle "late-$id" --sign-pub "$(key "$mallory")" >"$work/out" 2>&1 || code=$?
took=$((($(date +%s%N) - began) / 1000000))
output
((code == 3)) || fail "exit $code, not 3, of a change without a quorum"
grep -q "no quorum" "$work/out" || fail "the change does not say 'no quorum'"
((took < 3000)) || fail "the change was refused after $took ms, not within 3 s"
ok "a change is refused with exit 3 after $took ms"
refused "0 of 3 nodes may serve" unibusctl cluster status
cp "$work/out" "$work/status"
grep -qE '^ *n1 +unavailable ' "$work/status" || { output >&2; fail "n1 still answers 200 at /healthz"; }
ok "healthz of n1 answers 503"

step "Both come back: the cluster recovers by itself"
try unibus-local up
killed=
try unibusctl cluster wait --timeout 60s
ok "health is green"
listen "$bob" "$(url 3)"
hears "we are back" "$alice" "$(url 2)"
silence
ok "messages flow through the nodes that were dead"

step "The demo's users are revoked: final, and in force everywhere when the command returns"
for who in "$alice" "$bob"; do
	try unibusctl user revoke "$who" --yes
	refused "Authorization Violation" nats --context "$who" pub "$(topic "$who")" "still here?"
done
ok "revoked and refused"

step "All of it is on record"
try unibusctl audit list --user "$bob" --since 1h
grep -q "room.member.set" "$work/out" || fail "the audit does not show how $bob came into the room"
try unibusctl audit verify
ok "and the record is whole"

printf '\nDone: %d steps, all as told. Start again with other names: make demo\n' "$steps"
