#!/usr/bin/env bash
# usage: check.sh [DIR]
# Checks the scrape configurations and alerts with promtool, from PATH or DIR,
# and runs their tests. Tells SKIP where there is none.
set -euo pipefail

if [[ -n ${1:-} ]]; then PATH=$PATH:$(cd "$1" && pwd); fi
cd "$(dirname "$0")"
if ! command -v promtool >/dev/null; then
	echo "SKIP monitoring: there is no promtool (Debian: apt-get install prometheus)"
	exit 0
fi
check() {
	local out
	out=$("$@" 2>&1) || { echo "$out" >&2; exit 1; }
}
check promtool check rules unibus.rules.yml
check promtool test rules unibus.rules.test.yml
check promtool check config prometheus.yml
check promtool check config --agent prometheus.yml
check promtool check config prometheus-central.yml
check promtool check config vmagent.yml
