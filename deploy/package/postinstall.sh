#!/bin/sh
# Users, owners, and what systemd knows of the units. Nothing is enabled, started
# or restarted, neither by the first installation nor by an upgrade: a package
# that restarts what it brings, installed on three nodes at once, ends the quorum.
set -e

root=${DPKG_ROOT:-}
if command -v systemd-sysusers >/dev/null; then
	systemd-sysusers ${root:+"--root=$root"} unibus.conf
fi
if command -v systemd-tmpfiles >/dev/null; then
	systemd-tmpfiles ${root:+"--root=$root"} --create unibus.conf
fi
if [ -z "$root" ] && [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	if systemctl --quiet is-active unibus-nats.service; then
		echo "unibus: what runs goes on as it was: unibusctl cluster rollout upgrade"
	fi
fi
