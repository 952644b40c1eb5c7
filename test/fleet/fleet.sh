#!/usr/bin/env bash
# usage: fleet.sh [--keep]
# Three Debian 12 systems, booted with systemd under systemd-nspawn, each in a
# network namespace of its own, reached by ssh only, go through the life of
# docs/operations.md. Every step is asserted; the first that fails ends it.
#
# Needs root, network namespaces, and once the Debian mirror (debootstrap). Where
# something is missing it says SKIP and why, and ends with 0.
# FLEET_FULL   not empty: also restart everything and replace every certificate,
#              authority and the issuer under the load; .ci/run leaves that out
# FLEET_CACHE  where the base system is kept (default: unibus-fleet in the cache
#              directory of the user)
set -euo pipefail

repo=$(cd "$(dirname "$0")/../.." && pwd)
bin=$repo/bin
cache=${FLEET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/unibus-fleet}
base=$cache/bookworm-1
packages=systemd,systemd-sysv,dbus,openssh-server,rsync,iproute2,ca-certificates,curl,sudo
id=uf$$
work=
pids=()
began=$SECONDS

skip() { echo "SKIP fleet: $*"; exit 0; }
step() { printf '%4d s  %s\n' $((SECONDS - began)) "$*"; }
fail() { echo "FAIL fleet: $*" >&2; exit 1; }

[[ $(uname -s) == Linux && $(id -u) == 0 ]] || skip "only root can boot systems and make network namespaces"
for program in systemd-nspawn debootstrap ip ssh ssh-keygen rsync; do
	command -v "$program" >/dev/null ||
		skip "there is no $program (Debian: apt-get install systemd-container debootstrap iproute2 openssh-client rsync)"
done
for program in unibusctl unibus-membership unibus-authcallout unibus-load nats-server nats; do
	[[ -x $bin/$program ]] || fail "bin/$program is missing: make build"
done

package=$(find "$bin/package" -name '*.deb' 2>/dev/null | head -n 1)
[[ -n $package ]] || fail "bin/package has no .deb: make package"

cleanup() {
	local status=$?
	if [[ $status != 0 && -n $work ]]; then
		for n in 1 2 3; do
			echo "--- n$n" >&2
			on "$n" "journalctl --no-pager -q -n 15 -u 'unibus-*'" >&2 2>/dev/null || tail -n 5 "$work/n$n.console" >&2 || true
		done
	fi
	# The first process of a system ends all others of it.
	for pid in "${pids[@]}"; do kill -KILL "$(leader "$pid")" 2>/dev/null || true; done
	for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
	for ns in op n1 n2 n3; do ip netns pids "$id-$ns" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true; done
	for ns in sw op n1 n2 n3; do ip netns del "$id-$ns" 2>/dev/null || true; done
	if [[ -n $work ]]; then
		for n in 1 2 3; do umount "$work/n$n/root" 2>/dev/null || true; done
		if [[ ${keep:-} == yes ]]; then echo "kept: $work"; else rm -rf --one-file-system "$work"; fi
	fi
	exit "$status"
}

# leader PID: the first process inside the system that this nspawn runs.
leader() { cut -d' ' -f1 <"/proc/$1/task/$1/children" 2>/dev/null || true; }

# within SECONDS COMMAND...: until it succeeds.
within() {
	local end=$((SECONDS + $1)) out
	shift
	until out=$("$@" 2>&1); do
		((SECONDS < end)) || { echo "$out" >&2; fail "not in time: $*"; }
		read -r -t 0.5 <> <(:) || true
	done
}

# timed COMMAND...: one step of the way from an inventory to a cluster; spent is
# their sum in milliseconds.
spent=0
timed() {
	local at=${EPOCHREALTIME/[.,]/}
	"$@"
	spent=$((spent + (${EPOCHREALTIME/[.,]/} - at) / 1000))
}

# refuses WANTED COMMAND...: it must fail, and say this.
refuses() {
	local want=$1 out
	shift
	if out=$("$@" 2>&1); then fail "was not refused: $*"; fi
	grep -qF -- "$want" <<<"$out" || fail "said otherwise, not '$want': $out"
}

operator() { ip netns exec "$id-op" "$@"; }
ctl() { operator env -i PATH="$bin:/usr/bin:/bin" HOME="$work" UNIBUS_CA="$work/pki/client-ca.crt" \
	UNIBUS_API_URL="$api" UNIBUS_NATS_URL="$nats" UNIBUS_IDENTITY="$work/admin.nk" UNIBUS_OPS_SEED="$work/secrets/ops.nk" \
	unibusctl "$@"; }
on() { operator ssh -F "$work/ssh_config" "n$1" "$2"; }
deploy() {
	local verb=$1
	shift
	local more=()
	case $verb in plan | stage) more=(--secrets "$work/secrets" --pki "$work/pki" --bin "$bin" --units "$repo/deploy/systemd") ;; esac
	ctl deploy "$verb" --inventory "$work/nodes.env" --ssh-config "$work/ssh_config" "${more[@]}" "$@"
}

base_system() {
	[[ -d $base ]] && return
	mkdir -p "$cache"
	step "debootstrap, once"
	rm -rf "$base.new"
	debootstrap --variant=minbase --include=$packages bookworm "$base.new" >"$cache/debootstrap.log" 2>&1 ||
		skip "debootstrap failed: $(tail -n 1 "$cache/debootstrap.log")"
	mv "$base.new" "$base"
}

network() {
	ip netns add "$id-sw" 2>/dev/null || skip "this kernel makes no network namespaces here"
	ip netns exec "$id-sw" ip link add br0 type bridge 2>/dev/null || skip "this kernel has no bridges"
	ip netns exec "$id-sw" ip link set br0 up
	local host
	for host in op n1 n2 n3; do
		ip netns add "$id-$host"
		ip -n "$id-sw" link add "$host" type veth peer name host0 netns "$id-$host"
		ip -n "$id-sw" link set "$host" master br0 up
		ip -n "$id-$host" addr add "10.77.0.$([[ $host == op ]] && echo 9 || echo "${host#n}")/24" dev host0
		ip -n "$id-$host" link set host0 up
		ip -n "$id-$host" link set lo up
	done
}

# machine N: a disk of its own above the base system, and the operator's key. The
# third is reached by a user who may sudo, as in the field.
machine() {
	local dir=$work/n$1 root=$work/n$1/root home=root
	mkdir -p "$dir"/{upper,tmp,root}
	mount -t overlay overlay -o "lowerdir=$base,upperdir=$dir/upper,workdir=$dir/tmp" "$root" 2>/dev/null || cp -a "$base/." "$root"
	echo "n$1" >"$root/etc/hostname"
	echo "10.77.0.$1 n$1" >>"$root/etc/hosts"
	od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$root/etc/machine-id"
	rm -f "$root"/etc/ssh/ssh_host_*
	ssh-keygen -q -t ed25519 -N '' -f "$root/etc/ssh/ssh_host_ed25519_key"
	echo "10.77.0.$1 $(cut -d' ' -f1,2 "$root/etc/ssh/ssh_host_ed25519_key.pub")" >>"$work/known_hosts"
	if [[ $1 == 3 ]]; then
		home=home/deploy
		chroot "$root" useradd -m -s /bin/sh deploy
		echo 'deploy ALL=(root) NOPASSWD: ALL' >"$root/etc/sudoers.d/deploy"
	fi
	(umask 077 && mkdir -p "$root/$home/.ssh")
	cp "$work/key.pub" "$root/$home/.ssh/authorized_keys"
	[[ $1 != 3 ]] || chroot "$root" sh -c 'chown -R deploy: ~deploy/.ssh'
	# Somebody else's service on the same host, which has to be left alone.
	printf '[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n' >"$root/etc/systemd/system/neighbour.service"
	chroot "$root" systemctl -q enable neighbour ssh
	chroot "$root" systemctl -q mask systemd-networkd systemd-resolved systemd-timesyncd 2>/dev/null || true
}

boot() {
	systemd-nspawn -q -D "$work/n$1/root" --machine="$id-n$1" --register=no --keep-unit \
		--network-namespace-path="/run/netns/$id-n$1" --boot </dev/null >"$work/n$1.console" 2>&1 &
	pids[$1]=$!
}

comes_up() {
	local end=$((SECONDS + 90))
	until on "$1" true 2>/dev/null; do
		((SECONDS < end)) && kill -0 "${pids[$1]}" 2>/dev/null || return 1
		read -r -t 0.5 <> <(:) || true
	done
}

# power N: off, as the mains would.
power_off() {
	kill -KILL "$(leader "${pids[$1]}")"
	wait "${pids[$1]}" 2>/dev/null || true
	unset "pids[$1]"
}

healthy() { on "$1" "curl -sf --cacert /etc/unibus/tls/client-ca.crt https://10.77.0.$1:8470/healthz"; }
unhealthy() { ! healthy "$1"; }
unit_says() { on "$1" "systemctl show -P StatusText unibus-membership" | grep -qF -- "$2"; }
units_active() { on "$1" "systemctl is-active unibus-nats unibus-authcallout unibus-membership"; }
# started N UNIT: when its process started; a restart changes it.
started() { on "$1" "systemctl show -P ExecMainStartTimestampMonotonic $2"; }

main() {
	[[ ${1:-} != --keep ]] || keep=yes
	base_system
	work=$(mktemp -d "${TMPDIR:-/var/tmp}/unibus-fleet.XXXXXX")
	trap cleanup EXIT
	trap 'exit 130' INT TERM HUP
	api=https://10.77.0.1:8470,https://10.77.0.2:8470,https://10.77.0.3:8470
	nats=tls://10.77.0.1:4250,tls://10.77.0.2:4250,tls://10.77.0.3:4250
	ssh-keygen -q -t ed25519 -N '' -f "$work/key"
	ssh-keygen -q -t ed25519 -N '' -f "$work/wrong"
	cat >"$work/ssh_config" <<-END
		Host n1
		  HostName 10.77.0.1
		  User root
		Host n2
		  HostName 10.77.0.2
		  User root
		Host n3
		  HostName 10.77.0.3
		  User deploy
		Host *
		  IdentityFile $work/key
		  IdentitiesOnly yes
		  UserKnownHostsFile $work/known_hosts
		  StrictHostKeyChecking yes
		  LogLevel ERROR
	END
	network
	for n in 1 2 3; do machine "$n"; boot "$n"; done
	# Nothing of unibus is there yet: what does not boot is this machine's matter.
	for n in 1 2 3; do comes_up "$n" || skip "a system does not boot here: $(tr -d '\r' <"$work/n$n.console" | grep . | tail -n 1)"; done
	step "three systems are up, reached by ssh"

	cat >"$work/nodes.env" <<-END
		UNIBUS_CLUSTER=fleet
		ROUTE_NETWORK=private
		NODE_1="n1 ssh=root@10.77.0.1 public=10.77.0.1 private=10.77.0.1"
		NODE_2="n2 ssh=root@10.77.0.2 public=10.77.0.2 private=10.77.0.2"
		NODE_3="n3 ssh=deploy@10.77.0.3 public=10.77.0.3 private=10.77.0.3"
	END
	timed ctl config init --dir "$work/secrets" >/dev/null 2>&1
	timed ctl pki init --dir "$work/pki" --inventory "$work/nodes.env" >/dev/null
	life
}

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/life.sh"
main "$@"
