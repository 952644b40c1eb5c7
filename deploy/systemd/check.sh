#!/usr/bin/env bash
# usage: check.sh
# Looks at the units as the node's systemd would: verify must have nothing to
# say, the exposure of each service may be 1.5 at most, users and owners must be
# known words. Tells SKIP where there is no systemd-analyze.
set -euo pipefail

cd "$(dirname "$0")"
limit=15 # tenths

if ! command -v systemd-analyze >/dev/null; then
	echo "SKIP units: there is no systemd-analyze (Debian: apt-get install systemd)"
	exit 0
fi

# A root of our own: verify looks for the programs and for the units that ours
# name, and this machine need not have either.
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
units=$root/usr/lib/systemd/system
mkdir -p "$units" "$root"/{bin,etc/unibus,usr/bin,usr/sbin,usr/lib/unibus,usr/lib/sysusers.d,usr/lib/tmpfiles.d}
cp ./*.service ./*.target ./*.timer "$units"
cp sysusers.d/*.conf "$root/usr/lib/sysusers.d"
cp tmpfiles.d/*.conf "$root/usr/lib/tmpfiles.d"
for d in /usr/lib/systemd/system /lib/systemd/system; do
	cp -n "$d"/*.{target,slice} "$d"/systemd-journald* "$units" 2>/dev/null || true
done
touch "$root/etc/unibus/authcallout.env" "$root/etc/unibus/membership.env" "$root/etc/unibus/node.env"
for program in bin/sh usr/bin/unibusctl usr/sbin/unibus-authcallout usr/sbin/unibus-membership usr/lib/unibus/nats-server usr/lib/systemd/systemd-journald; do
	mkdir -p "$(dirname "$root/$program")"
	printf '#!/bin/sh\n' >"$root/$program"
	chmod 755 "$root/$program"
done

bad=0
verify() {
	local out
	# Its exit code alone is not enough: an unknown word is a warning to it.
	out=$(systemd-analyze verify --man=no --recursive-errors=no --root="$root" "$@" 2>&1) || bad=1
	if [[ -n $out ]]; then
		echo "$out" >&2
		bad=1
	fi
}
verify "$units"/unibus*

# Each drop-in in the place that its first lines name.
for dropin in dropins/*.conf; do
	grep -oE '/etc/systemd/system/unibus-[a-z]+\.service\.d' "$dropin" | sort -u | while read -r unit; do
		at=$units/$(basename "$unit")
		mkdir -p "$at"
		cp "$dropin" "$at/"
	done
done
verify "$units"/unibus*.service

for unit in "$units"/unibus*.service; do
	if ! out=$(systemd-analyze security --offline=yes --threshold=$limit --root="$root" --no-pager "$unit" 2>&1); then
		echo "$out" >&2
		bad=1
	fi
	echo "units: $(grep -o 'Overall exposure.*[0-9.]* [A-Z]*' <<<"$out")"
done

systemd-sysusers --dry-run --root="$root" "$root"/usr/lib/sysusers.d/*.conf >/dev/null 2>&1 ||
	{ echo "sysusers.d: systemd-sysusers refuses it" >&2; bad=1; }
# tmpfiles has no dry run: give it the users, and run it in the root.
if [[ $(id -u) == 0 ]]; then
	systemd-sysusers --root="$root" "$root"/usr/lib/sysusers.d/*.conf 2>/dev/null || bad=1
	out=$(systemd-tmpfiles --create --root="$root" "$root"/usr/lib/tmpfiles.d/*.conf 2>&1) || bad=1
	[[ -z $out ]] || { echo "$out" >&2; bad=1; }
else
	echo "SKIP tmpfiles: only root can give files away"
fi
exit "$bad"
