#!/bin/sh
# A running node is not taken away under its users: dpkg says remove, rpm says 0;
# an upgrade is neither.
set -e

case ${1:-} in
remove | 0)
	if [ -z "${DPKG_ROOT:-}" ] && [ -d /run/systemd/system ]; then
		for unit in unibus-membership unibus-authcallout unibus-nats; do
			if systemctl --quiet is-active "$unit.service"; then
				echo "unibus: $unit runs: systemctl disable --now unibus.target" >&2
				exit 1
			fi
		done
	fi
	;;
esac
