#!/usr/bin/env bash
# usage: tools.sh DIR
# Puts prometheus, promtool and haproxy into DIR, as Debian packages them: the
# packages are unpacked and not installed, so that nothing is started and the
# system stays as it is. Does nothing for what is there. Where there is no Debian
# it says SKIP and why, and ends with 0; tests then look in PATH.
set -euo pipefail

mkdir -p "$1"
dir=$(cd "$1" && pwd)
here=$dir/debian

if [[ -x $dir/promtool && -x $dir/prometheus && -x $dir/haproxy ]]; then
	exit 0
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
	echo "SKIP tools: there is no apt-get to take prometheus and haproxy from"
	exit 0
fi

# haproxy needs some libraries that a small system may be without.
packages=(prometheus haproxy liblua5.3-0 libopentracing-c-wrapper0 libopentracing1 libpcre2-8-0)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
chmod 755 "$tmp"
download() { (cd "$tmp" && apt-get -qq download "${packages[@]}") >"$tmp/log" 2>&1; }
if ! download; then
	[[ $(id -u) != 0 ]] || apt-get -qq update >/dev/null 2>&1 || true
	if ! download; then
		echo "SKIP tools: apt-get download: $(grep -m1 '^E:' "$tmp/log" || tail -n 1 "$tmp/log")"
		exit 0
	fi
fi
rm -rf "$here"
mkdir -p "$here"
for package in "$tmp"/*.deb; do dpkg-deb -x "$package" "$here"; done
rm -rf "${here:?}"/{etc,var,usr/share}
ln -sf debian/usr/bin/prometheus debian/usr/bin/promtool "$dir/"
lib=$(dirname "$(find "$here" -name 'liblua5.3.so.0' | head -n 1)")
cat >"$dir/haproxy" <<END
#!/bin/sh
LD_LIBRARY_PATH='$lib' exec '$here/usr/sbin/haproxy' "\$@"
END
chmod 755 "$dir/haproxy"
