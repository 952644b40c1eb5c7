#!/usr/bin/env bash
# usage: check.sh DIR
# Looks into the packages in DIR: what is where, with which mode and owner; that
# the .deb installs, upgrades and removes cleanly into an empty root; that the
# scripts start and restart nothing. Tells SKIP for what this machine lacks.
set -euo pipefail

dir=$(cd "$1" && pwd)
cd "$(dirname "$0")"
bad=0
fail() {
	echo "package: $*" >&2
	bad=1
}

# Path, mode and owner of every file that a node needs, as deploy stage has them.
want='/usr/bin/unibusctl 755
/usr/sbin/unibus-membership 755
/usr/sbin/unibus-authcallout 755
/usr/lib/unibus/nats-server 755
/usr/lib/systemd/system/unibus.target 644
/usr/lib/systemd/system/unibus-nats.service 644
/usr/lib/systemd/system/unibus-authcallout.service 644
/usr/lib/systemd/system/unibus-membership.service 644
/usr/lib/systemd/system/unibus-backup.service 644
/usr/lib/systemd/system/unibus-backup.timer 644
/usr/lib/sysusers.d/unibus.conf 644
/usr/lib/tmpfiles.d/unibus.conf 644
/usr/share/unibus/dropins/nats-limits.conf 644
/usr/share/unibus/monitoring/unibus.rules.yml 644
/usr/share/unibus/monitoring/grafana/cluster.json 644
/usr/share/unibus/haproxy/haproxy.cfg 644
/usr/share/bash-completion/completions/unibusctl 644
/usr/share/fish/vendor_completions.d/unibusctl.fish 644
/usr/share/man/man1/unibusctl.1.gz 644
/usr/share/man/man8/unibus-membership.8.gz 644
/usr/share/man/man8/unibus-authcallout.8.gz 644
/usr/share/doc/unibus/operations.md 644
/usr/share/doc/unibus/copyright 644
/etc/unibus/nats/conf.d/local.conf 640'

# Nothing but these words may be said to systemd, by no script of either package.
scripts() {
	if said=$(grep -oE 'systemctl( --quiet)? +[a-z-]+' "$@" | grep -vE 'systemctl( --quiet)? +(daemon-reload|is-active|disable)$'); then
		fail "a script says: $said"
	fi
	if said=$(grep -nE '(deb-systemd|invoke-rc\.d|service +unibus|systemctl +disable)' "$@" | grep -v 'echo '); then
		fail "a script says: $said"
	fi
}
scripts ./postinstall.sh ./preremove.sh ./postremove.sh

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

deb=$(ls "$dir"/*.deb)
if command -v dpkg-deb >/dev/null; then
	mkdir "$root/deb"
	dpkg-deb -x "$deb" "$root/deb"
	while read -r path mode; do
		if [[ ! -f $root/deb$path ]]; then
			fail "the .deb has no $path"
		elif [[ $(stat -c %a "$root/deb$path") != "$mode" ]]; then
			fail "$path of the .deb has mode $(stat -c %a "$root/deb$path"), not $mode"
		fi
	done <<<"$want"
	[[ -f $root/deb/usr/share/zsh/vendor-completions/_unibusctl ]] || fail "the .deb has no completion for zsh"
	# dpkg asks about, and never replaces, what was edited of these.
	[[ $(dpkg-deb -I "$deb" conffiles) == /etc/unibus/nats/conf.d/local.conf ]] || fail "conffiles: $(dpkg-deb -I "$deb" conffiles)"
	dpkg-deb -e "$deb" "$root/control"
	scripts "$root"/control/{postinst,prerm,postrm}
	! grep -rlE 'SU[A-Z2-7]{56}|PRIVATE KEY' "$root/deb/etc" "$root/deb/usr/share/unibus" || fail "a seed or key is in the .deb"
else
	echo "SKIP package: there is no dpkg-deb to look into the .deb with"
fi

# Installed, upgraded and removed in an empty root, by dpkg itself.
if [[ $(id -u) == 0 ]] && command -v dpkg >/dev/null && command -v systemd-sysusers >/dev/null && command -v systemd-tmpfiles >/dev/null; then
	at=$root/installed
	mkdir -p "$at"/var/lib/dpkg/{info,updates,triggers} "$at"/{etc,run,tmp}
	touch "$at"/var/lib/dpkg/{status,available}
	run() { dpkg --root="$at" --force-depends --force-script-chrootless --log=/dev/null "$@" >"$root/log" 2>&1 || fail "dpkg $1: $(tail -n 3 "$root/log")"; }
	run -i "$deb"
	printf '# mine\n' >>"$at/etc/unibus/nats/conf.d/local.conf"
	run -i "$deb"
	grep -qx '# mine' "$at/etc/unibus/nats/conf.d/local.conf" || fail "an upgrade replaced local.conf"
	owner() { awk -F: -v id="$2" '$3 == id { name = $1 } END { print id ? name : "root" }' "$at/etc/$1"; }
	while read -r path mode group; do
		is="$(stat -c %a "$at$path") $(owner group "$(stat -c %g "$at$path")")"
		[[ $is == "$mode $group" ]] || fail "installed, $path is $is, not $mode $group"
	done <<-END
		/etc/unibus 755 root
		/etc/unibus/nats 750 unibus-nats
		/etc/unibus/nats/conf.d 750 unibus-nats
		/etc/unibus/nats/conf.d/local.conf 640 unibus-nats
		/etc/unibus/tls 755 root
		/etc/unibus/creds 700 root
		/var/lib/unibus 700 unibus-nats
	END
	for user in unibus-nats unibus-authcallout unibus-membership; do
		grep -q "^$user:" "$at/etc/passwd" || fail "there is no user $user"
	done
	[[ ! -e $at/etc/systemd ]] || fail "installing has enabled something: $(find "$at/etc/systemd")"
	mkdir -p "$at/var/lib/unibus/jetstream"
	run -P unibus
	[[ -d $at/var/lib/unibus/jetstream ]] || fail "a purge took the store away"
	[[ ! -e $at/usr/sbin/unibus-membership ]] || fail "a purge left a program"
else
	echo "SKIP package: only root with dpkg and systemd can try to install it"
fi

rpm=$(ls "$dir"/*.rpm)
if command -v rpm >/dev/null; then
	list=$(rpm -qp --qf '[%{FILENAMES} %{FILEMODES:octal} %{FILEFLAGS:fflags}\n]' "$rpm" 2>/dev/null)
	while read -r path mode; do
		grep -qE "^$path 100$mode( |\$)" <<<"$list" || fail "the .rpm has no $path with mode $mode"
	done <<<"$want"
	grep -q '^/usr/share/zsh/site-functions/_unibusctl ' <<<"$list" || fail "the .rpm has no completion for zsh"
	# c and n: an edited file stays, the new one lies beside it.
	grep -q '^/etc/unibus/nats/conf.d/local.conf 100640 cn$' <<<"$list" || fail "local.conf of the .rpm: $(grep local.conf <<<"$list")"
	rpm -qp --scripts "$rpm" >"$root/rpm" 2>/dev/null
	scripts "$root/rpm"
else
	echo "SKIP package: there is no rpm to look into the .rpm with (Debian: apt-get install rpm)"
fi
exit "$bad"
