#!/bin/sh
# The configuration in /etc/unibus and the store in /var/lib/unibus stay, also
# when the package is purged.
set -e

if [ -z "${DPKG_ROOT:-}" ] && [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
