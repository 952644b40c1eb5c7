#!/bin/sh
# The half of `unibusctl deploy` that runs on a node, as root, from the standard
# input of ssh. unibusctl puts a call of main behind it. Answers are lines on
# stdout; a line "fault ..." says why it ended. Plain sh and coreutils: a node
# needs nothing installed but rsync.
set -eu

base=/var/lib/unibus-deploy
incoming=$base/incoming

fault() {
	echo "fault $*"
	exit 1
}

sum() { sha256sum <"$1" | cut -d' ' -f1; }

# probe PATH...: what is there now. It changes nothing.
probe() {
	echo "uid ${SUDO_UID:-0}"
	echo "arch $(uname -m)"
	echo "now $(date +%s)"
	echo "machine $(cat /etc/machine-id 2>/dev/null || echo unknown)"
	for program in rsync sha256sum systemctl systemd-sysusers systemd-tmpfiles flock; do
		command -v "$program" >/dev/null || echo "missing $program"
	done
	[ ! -e /etc/unibus/node.env ] || sed -n 's/^UNIBUS_NODE=/node /p' /etc/unibus/node.env
	[ ! -e "$base/unfinished" ] || echo "unfinished $(cat "$base/unfinished")"
	for path; do
		if [ -f "$path" ]; then
			echo "file $(sum "$path") $(stat -c '%a %U:%G' "$path") $path"
			continue
		fi
		[ ! -e "$path" ] || fault "$path is there and is no file"
	done
	# Programs, configuration and backups may be on file systems of their own.
	for dir in /usr /etc /var/lib; do
		echo "free $(df --output=avail -k "$dir" | tail -n 1 | tr -d ' ') $dir"
	done
}

# contents PATH...: what is in these files, for a diff.
contents() {
	for path; do
		[ ! -f "$path" ] || echo "content $path $(base64 -w0 <"$path")"
	done
}

prepare() {
	umask 077
	mkdir -p "$base/backups" "$incoming"
}

lock() {
	exec 9>"$base/lock"
	flock -n 9 || fault "another deployment is at work on this node"
}

# backup ID PATH...: keeps what is about to be replaced, each file once. A run
# that was interrupted is taken up under its own id: what it had replaced
# already must not be kept as if it had been there before.
backup() {
	id=$1
	shift
	if [ -e "$base/unfinished" ]; then
		id=$(cat "$base/unfinished")
	else
		mkdir -p "$base/backups/$id"
		echo "$id" >"$base/unfinished.new"
		mv "$base/unfinished.new" "$base/unfinished"
	fi
	keep=$base/backups/$id
	touch "$keep/entries"
	for path; do
		! grep -qxF -e "kept $path" -e "absent $path" "$keep/entries" || continue
		if [ -f "$path" ]; then
			mkdir -p "$keep/tree$(dirname "$path")"
			cp -p "$path" "$keep/tree$path"
			echo "kept $path" >>"$keep/entries"
		else
			echo "absent $path" >>"$keep/entries"
		fi
	done
	sync
	echo "backup $id"
}

finish() {
	sync
	touch "$base/backups/$id/done"
	mv "$base/unfinished" "$base/backups/$id/id"
	rm -rf "$incoming"
	# Five steps back are enough; a backup holds seeds.
	find "$base/backups" -mindepth 1 -maxdepth 1 -type d | sort -r | tail -n +6 | while read -r old; do rm -rf "$old"; done
}

# put MODE OWNER PATH: one file beside its target, complete and with its owner.
put() {
	mkdir -p "$(dirname "$3")"
	install -m "$1" -o "${2%:*}" -g "${2#*:}" "$incoming/tree$3" "$3.unibus-new"
}

clean() {
	[ ! -f "$incoming/manifest" ] || while read -r _ _ _ path; do rm -f "$path.unibus-new"; done <"$incoming/manifest"
}

# place: what arrived goes to its place. First everything is looked at, then
# everything is kept, then everything is written beside its target: a full disk
# or a missing user shows while nothing is replaced. The rest are renames.
place() {
	lock
	[ -f "$incoming/manifest" ] || fault "nothing has arrived"
	paths=
	while read -r want _ _ path; do
		[ -f "$incoming/tree$path" ] || fault "$path did not arrive"
		[ "$(sum "$incoming/tree$path")" = "$want" ] || fault "$path arrived damaged"
		paths="$paths $path"
	done <"$incoming/manifest"
	trap clean EXIT
	# shellcheck disable=SC2086 # paths have no spaces: unibusctl sees to that
	backup "$1" $paths
	# The users come first, for files are given to them.
	while read -r _ mode owner path; do
		case $path in
		/usr/lib/sysusers.d/* | /usr/lib/tmpfiles.d/*)
			put "$mode" "$owner" "$path"
			mv -f "$path.unibus-new" "$path"
			;;
		esac
	done <"$incoming/manifest"
	systemd-sysusers unibus.conf || fault "systemd-sysusers made no users"
	systemd-tmpfiles --create unibus.conf || fault "systemd-tmpfiles made no directories"
	while read -r _ mode owner path; do
		case $path in
		/usr/lib/sysusers.d/* | /usr/lib/tmpfiles.d/*) ;;
		*) put "$mode" "$owner" "$path" || fault "$path cannot be written; nothing but users and directories was changed" ;;
		esac
	done <"$incoming/manifest"
	sync
	while read -r _ _ _ path; do
		[ ! -e "$path.unibus-new" ] || mv -f "$path.unibus-new" "$path"
		echo "placed $path"
	done <"$incoming/manifest"
	systemd-tmpfiles --create unibus.conf
	systemctl daemon-reload
	finish
}

# settle: an interrupted stage after which nothing differs. What had arrived for
# it may be of another day and is not looked at.
settle() {
	lock
	[ ! -e "$base/unfinished" ] || finish
}

# newest: the backup that a rollback goes to if it is not told another.
newest() {
	if [ -e "$base/unfinished" ]; then
		cat "$base/unfinished"
		return
	fi
	for dir in "$base"/backups/*; do
		[ ! -e "$dir/done" ] || last=$(basename "$dir")
	done
	echo "${last:-}"
}

choose() {
	to=${1:-$(newest)}
	[ -n "$to" ] || fault "there is no backup: nothing was staged here"
	[ -f "$base/backups/$to/entries" ] || fault "there is no backup $to, only: $(cd "$base/backups" && echo *)"
}

# entries ID: what a rollback to that backup would do. It changes nothing.
entries() {
	choose "$1"
	echo "backup $to"
	cat "$base/backups/$to/entries"
}

# back TO ID: puts the files of a backup where they were, and keeps what they
# replace as the next backup, so that a rollback can be rolled back. An
# interrupted stage is rolled back as far as it got.
back() {
	lock
	choose "$1"
	from=$base/backups/$to
	if [ "$to" = "$(cat "$base/unfinished" 2>/dev/null)" ]; then
		id=$to
	else
		# shellcheck disable=SC2046 # as above
		backup "$2" $(cut -d' ' -f2 "$from/entries")
	fi
	while read -r was path; do
		[ "$was" != kept ] || cp -p "$from/tree$path" "$path.unibus-new"
	done <"$from/entries"
	sync
	while read -r was path; do
		if [ "$was" = kept ]; then
			mv -f "$path.unibus-new" "$path"
			echo "restored $path"
		else
			rm -f "$path"
			echo "removed $path"
		fi
	done <"$from/entries"
	systemctl daemon-reload
	finish
}

# start: now, and at every boot. What runs goes on as it is.
start() {
	[ -f /usr/lib/systemd/system/unibus.target ] || fault "nothing is staged on this node"
	[ ! -e "$base/unfinished" ] || fault "a stage was interrupted here: stage again, or roll back"
	systemctl enable --quiet unibus.target
	systemctl start unibus.target unibus-nats.service unibus-authcallout.service unibus-membership.service ||
		fault "a unit did not start: journalctl -u 'unibus-*'"
	report
}

# report: each unit in one line, and whether it runs what is on disk.
report() {
	[ ! -e "$base/unfinished" ] || echo "unfinished $(cat "$base/unfinished")"
	for unit in nats authcallout membership; do
		pid=$(systemctl show -P MainPID "unibus-$unit.service")
		old=no
		if [ "$pid" != 0 ]; then
			# By content, not by time: a file that was rolled back, or came again with a
			# package, is the one it runs with.
			program=$(readlink "/proc/$pid/exe")
			[ "$(sum "/proc/$pid/exe")" = "$(sum "${program% (deleted)}" 2>/dev/null)" ] || old=program
			# A setting of systemctl edit is in no file of ours.
			env=/etc/unibus/$unit.env
			has=$(tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null || true)
			[ ! -f "$env" ] || grep '^[A-Z]' "$env" | (while IFS= read -r line; do
				echo "$has" | grep -qxF -e "$line" || exit 1
			done) || old=environment
			# Seeds are copied at the start of a unit.
			for loaded in "/run/credentials/unibus-$unit.service"/*; do
				[ ! -f "$loaded" ] || [ "$(sum "$loaded")" = "$(sum "/etc/unibus/creds/$(basename "$loaded")" 2>/dev/null)" ] || old=credentials
			done
		fi
		echo "unit $unit $(systemctl show -P ActiveState "unibus-$unit.service") $old $(systemctl show -P NRestarts "unibus-$unit.service") $(systemctl show -P StatusText "unibus-$unit.service")"
	done
}

# digest: of the server's configuration on disk; it fails if the server would
# not take it.
digest() {
	said=$(/usr/lib/unibus/nats-server -t -c /etc/unibus/nats/nats-server.conf 2>&1) || fault "nats-server refuses the configuration on disk: $(echo "$said" | tail -n 1)"
	echo "config $(echo "$said" | grep -o '[0-9a-f]\{64\}' | head -n 1)"
}

# restart UNIT...: services first. systemctl asks for one unit after the other
# without an order, and a service whose server is gone before it cannot give its
# lease back.
restart() {
	[ ! -e "$base/unfinished" ] || fault "a stage was interrupted here: stage again, or roll back"
	digest
	for unit in unibus-membership unibus-authcallout unibus-nats; do
		case " $* " in *" $unit "*) systemctl stop "$unit.service" || fault "$unit did not stop" ;; esac
	done
	systemctl start "$@" || fault "did not start: $(journalctl -q -n 1 -o cat -u "$1")"
	report
}

# reload: a configuration that the server refuses is found by the first
# ExecReload of the unit; one that it cannot change while it runs is not.
reload() {
	digest
	systemctl reload unibus-nats.service || fault "nats-server does not reload: $(journalctl -q -n 1 -o cat -u unibus-nats)"
}

# One call, read to its end before anything runs: a connection that breaks while
# the script arrives must not run half of it. What it starts reads no script.
main() {
	"$@" </dev/null
	echo end
	exit 0
}
