# shellcheck shell=bash
# shellcheck disable=SC2016 # what stands in single quotes expands on the node
# shellcheck disable=SC2154 # fleet.sh has the variables
# The life of a cluster, step by step; sourced by fleet.sh, which has the words.

life() {
	planted_before
	deploy plan >"$work/plan"
	grep -q '^n3: create /etc/unibus/creds/issuer.nk (0600 root:root, secret)' "$work/plan" || fail "the plan does not show a seed as secret"
	! grep -q 'SA[A-Z0-9]\{20\}' "$work/plan" || fail "the plan shows a seed"
	! on 1 'ls -d /etc/unibus /var/lib/unibus-deploy' 2>/dev/null || fail "a plan wrote something"
	deploy stage 2>/dev/null >"$work/plan"
	! on 1 'ls -d /etc/unibus /var/lib/unibus-deploy' 2>/dev/null || fail "a stage without --yes wrote something"
	packaged
	timed deploy stage --yes >/dev/null 2>&1
	deploy stage --yes 2>/dev/null | grep -c 'nothing differs' | grep -qx 3 || fail "a second stage finds differences"
	for n in 1 2 3; do ! units_active "$n" >/dev/null || fail "a stage started something"; done
	step "staged from the inventory; nothing was started"

	on 3 'sudo systemd-analyze verify unibus-nats.service unibus-authcallout.service unibus-membership.service unibus.target 2>&1' >"$work/seen" || true
	[[ ! -s $work/seen ]] || fail "verify on the node says: $(<"$work/seen")"
	on 1 'stat -c "%a %U:%G %n" /etc/unibus/creds /etc/unibus/creds/issuer.nk /etc/unibus/tls/api.key /etc/unibus/nats/conf.d/secrets.conf' >"$work/modes"
	diff "$work/modes" - <<-'END' || fail "modes or owners"
		700 root:root /etc/unibus/creds
		600 root:root /etc/unibus/creds/issuer.nk
		640 root:unibus-membership /etc/unibus/tls/api.key
		640 root:unibus-nats /etc/unibus/nats/conf.d/secrets.conf
	END

	# The old deadlock: one node alone is started, and the start returns.
	local before=$SECONDS
	timed deploy start --node n2 --yes >/dev/null
	((SECONDS - before < 20)) || fail "the start of one node alone took $((SECONDS - before)) s"
	within 30 unit_says 2 'waiting for'
	unhealthy 2 || fail "one node alone is healthy"
	deploy status --node n2 | grep -q 'unibus-membership .*waiting for' || fail "status does not say what it waits for"
	step "one node alone: started at once, and says $(on 2 'systemctl show -P StatusText unibus-membership')"
	timed deploy start --node n3 --yes >/dev/null
	unhealthy 3 || fail "two of three serve on the first start"
	timed deploy start --node n1 --yes >/dev/null
	timed ctl cluster wait >/dev/null
	for n in 1 2 3; do healthy "$n" >/dev/null || fail "n$n is not healthy behind cluster wait"; done
	within 30 deploy status
	step "all three serve"

	local as seed='S[AUX][A-Z2-7]{50}'
	for n in 1 2 3; do
		as=$([[ $n != 3 ]] || echo sudo)
		# No seed in an argument or an environment.
		on "$n" "$as sh -c 'cat /proc/[0-9]*/cmdline; cat /proc/\$(systemctl show -P MainPID unibus-authcallout)/environ'" 2>/dev/null |
			tr '\0' '\n' >"$work/seen" || true
		grep -q "^UNIBUS_NODE=n$n" "$work/seen" || fail "cannot see the environment of n$n"
		! grep -qE "$seed" "$work/seen" || fail "a seed in an argument or an environment of n$n"
		# The monitor and the metrics are there, and not for other machines.
		for port in 8222 9470 9480; do
			on "$n" "curl -s -o /dev/null http://127.0.0.1:$port/" || fail "port $port of n$n does not listen"
			! operator curl -s -m 2 "http://10.77.0.$n:$port/" >/dev/null || fail "port $port of n$n is open to others"
		done
	done
	# Each user sees the seeds of its own process.
	on 1 'su -s /bin/sh unibus-membership -c "cat /run/credentials/unibus-membership.service/membership-ctrl.nk"' | grep -qE "$seed" || fail "cannot try as membership's user"
	! on 1 'su -s /bin/sh unibus-membership -c "cat /run/credentials/unibus-authcallout.service/issuer.nk"' 2>/dev/null | grep . || fail "membership's user reads the issuer's seed"

	timed ctl --direct bootstrap --handle admin --out "$work/admin.nk" >/dev/null
	step "a new operator's way, from an inventory to the first admin: 6 commands, $((spent / 1000)) s"
	ctl identity new --out "$work/alice.nk" >/dev/null 2>&1
	alice=$(ctl identity show "$work/alice.nk" --json | grep -o 'U[A-Z2-7]\{55\}')
	ctl user add --handle alice --sign-pub "$alice" --role member >/dev/null
	ctl room create ops >/dev/null
	ctl room add ops alice --role writer >/dev/null
	for n in 1 2 3; do alice_talks "$n" || fail "alice cannot talk over n$n"; done
	ctl cluster wait >/dev/null
	step "first admin, a user, a room; she talks over every node"

	staging_leaves_alone
	load_begins
	rollouts
	[[ -z ${FLEET_FULL:-} ]] || certificates
	load_ends
	stops
	partition
	replacement
	planted_after
	package_leaves_alone
	disaster
	for n in 1 2 3; do on "$n" 'systemctl is-active neighbour' >/dev/null || fail "another service of n$n was disturbed"; done
	step "done"
}

# The first node gets its programs and units by the package, the others by rsync:
# after it a stage finds nothing of them to do.
packaged() {
	on 1 'cat >/var/tmp/unibus.deb' <"$package"
	on 1 'dpkg -i /var/tmp/unibus.deb' >/dev/null 2>"$work/said" || fail "the package: $(<"$work/said")"
	! units_active 1 >/dev/null || fail "the package started something"
	! on 1 'systemctl is-enabled unibus.target unibus-nats' | grep -x enabled || fail "the package enabled something"
	! deploy plan --node n1 2>/dev/null | grep -E '^n1: (create|replace|owner) /usr/' || fail "what the package brings is not what a stage would"
	on 1 'ls /usr/share/man/man1/unibusctl.1.gz' >/dev/null || fail "no manual page"
	step "n1 has the package, and a stage finds nothing to do in /usr"
}

# An upgrade beside a running node changes no process; a removal is refused.
package_leaves_alone() {
	local unit before
	before=$(for unit in unibus-nats unibus-authcallout unibus-membership; do started 1 $unit; done)
	on 1 'dpkg -i /var/tmp/unibus.deb' >"$work/said" 2>&1 || fail "the upgrade: $(<"$work/said")"
	[[ $(for unit in unibus-nats unibus-authcallout unibus-membership; do started 1 $unit; done) == "$before" ]] || fail "an upgrade restarted something"
	refuses 'systemctl disable --now unibus.target' on 1 'dpkg -r unibus'
	healthy 1 >/dev/null || fail "n1 does not serve after a removal that was refused"
	[[ $(on 1 'dpkg-query -W -f "\${db:Status-Status}" unibus') == installed ]] || fail "the package is not installed any more"
	step "an upgrade beside a running node restarted nothing, and a removal was refused"
}

# A load of stock clients that reconnect by themselves, all over the cluster.
load_begins() {
	ctl identity new --out "$work/load.nk" >/dev/null 2>&1
	ctl user add --handle load --sign-pub "$(ctl identity show "$work/load.nk" --json | grep -o 'U[A-Z2-7]\{55\}')" --role member >/dev/null
	ctl room add ops load --role writer >/dev/null
	ip netns exec "$id-op" "$bin/unibus-load" --nats-url "$nats" --ca "$work/pki/client-ca.crt" --identity "$work/load.nk" --room ops \
		--clients 30 >"$work/load.json" 2>"$work/load.err" &
	loader=$!
	within 20 grep -q 'clients talk' "$work/load.err"
	# Beside them one program that awaits, in a durable room, what it says, and
	# listens on each node.
	ctl room create log --durable >/dev/null
	ctl room add log load --role writer >/dev/null
	ctl room add log alice --role reader >/dev/null
	ip netns exec "$id-op" env -i HOME="$work" UNIBUS_CA="$work/pki/client-ca.crt" UNIBUS_API_URL="$api" UNIBUS_NATS_URL="$nats" \
		"$bin/unibusctl" --identity "$work/load.nk" check --room log --duration 2h --rate 20 --max-gap 2h --json >"$work/check.json" 2>"$work/check.err" &
	checker=$!
	within 20 as_alice room history log --limit 1 --json
	within 20 said_more 20
}
as_alice() { ctl --identity "$work/alice.nk" "$@"; }
said_more() { (($(as_alice room history log --from "$1" --limit 1 --json | grep -c '"seq"') > 0)); }

# checked FIELD VALUE: how many of the nodes' listeners report that.
checked() { grep -c "\"$1\": $2,\?\$" "$work/check.json" || true; }

# Nobody was lost for good and nobody was told no; the gap is reported. Of what
# was awaited nothing was lost, doubled or out of order, on any node.
load_ends() {
	kill -INT "$checker"
	wait "$checker" || true # interrupted: what counts is what it reports
	grep -q '"status": "ok"' "$work/check.json" || fail "the durable room: $(cat "$work/check.json" "$work/check.err")"
	for field in lost duplicated reordered; do [[ $(checked $field 0) == 3 ]] || fail "$field in a durable room: $(<"$work/check.json")"; done
	[[ $(checked reached true) == 3 ]] || fail "a node had no listener: $(<"$work/check.json")"
	step "a durable room: $(grep -oE '"(sent|stored|ack_p50_ms|ack_max_ms)": [0-9.]+' "$work/check.json" | tr -d '"' | paste -sd' '), nothing lost, doubled or out of order on three nodes"
	kill -TERM "$loader"
	wait "$loader" || fail "clients were lost: $(cat "$work/load.json" "$work/load.err")"
	grep -q '"denials":0,' "$work/load.json" || fail "clients were denied: $(<"$work/load.json")"
	step "the load: $(<"$work/load.json")"
}

all_stopped() { [[ $(on "$1" 'systemctl is-active unibus-nats unibus-authcallout unibus-membership' | sort -u) == inactive ]]; }

# alice_talks N: a stock client, the server of that node alone, twice allowed and
# once refused.
alice_talks() {
	local to=(operator env -i HOME="$work" "$bin/nats" --server "tls://10.77.0.$1:4250" --tlsca "$work/pki/client-ca.crt" --nkey "$work/alice.nk" --inbox-prefix "_INBOX_$alice")
	"${to[@]}" pub "room.ops.$alice.hello" hello >/dev/null 2>&1 || return 1
	! "${to[@]}" pub "room.other.$alice.hello" hello >/dev/null 2>&1
}
alice_is_left_alone() { ! alice_talks "$1"; }

# What stops a stage before anything is done anywhere.
planted_before() {
	local keep
	sed 's/^NODE_3=.*/NODE_3="n3 ssh=<user@host> public=10.77.0.3 private=10.77.0.3"/' "$work/nodes.env" >"$work/bad.env"
	refuses 'bad.env:5:' ctl deploy start --inventory "$work/bad.env" --yes
	sed 's/10\.77\.0\.3/10.77.0.33/g' "$work/nodes.env" >"$work/bad.env"
	cp -r "$work/pki" "$work/badpki"
	ctl pki issue --dir "$work/badpki" --inventory "$work/bad.env" --force >/dev/null 2>&1
	refuses 'n3 is not reached by ssh' ctl deploy stage --inventory "$work/bad.env" --ssh-config "$work/ssh_config" \
		--secrets "$work/secrets" --pki "$work/badpki" --bin "$bin" --units "$repo/deploy/systemd" --yes
	keep=$(<"$work/ssh_config")
	echo "${keep//"$work/key"/"$work/wrong"}" >"$work/ssh_config"
	refuses 'Permission denied' deploy stage --yes
	echo "$keep" >"$work/ssh_config"
	# A full disk: a file system for /var/lib with nothing left.
	on 3 'sudo mount -t tmpfs -o size=20m none /var/lib'
	refuses 'MiB free in /var/lib' deploy stage --yes
	on 3 'sudo umount /var/lib'
	for n in 1 2 3; do ! on "$n" 'ls -d /etc/unibus' 2>/dev/null || fail "n$n was touched"; done
	step "refused, and nothing done: a placeholder, an unreachable host, a wrong key, a full disk"
}

# A stage on running nodes restarts nothing, and can be taken back.
staging_leaves_alone() {
	local n1 conf
	n1=$(started 1 unibus-nats)
	conf=$(on 1 'cat /etc/unibus/membership.env')
	sed 's/^ROUTE_NETWORK.*/&\nAPI_AUTHORITIES=bus.fleet.test/' "$work/nodes.env" >"$work/nodes.new"
	cp "$work/nodes.env" "$work/nodes.old"
	cp "$work/nodes.new" "$work/nodes.env"
	deploy plan --node n1 >"$work/plan" 2>"$work/said"
	grep -q '^+UNIBUS_AUTHORITIES=.*bus.fleet.test' "$work/plan" || fail "the plan shows no diff: $(<"$work/plan")"
	grep -q 'unibus-membership runs with the new files after its next restart' "$work/said" || fail "the plan does not name the unit: $(<"$work/said")"
	deploy stage --node n1 --yes >/dev/null 2>&1
	on 1 'grep -q bus.fleet.test /etc/unibus/membership.env' || fail "not staged"
	deploy status --node n1 | grep -q 'unibus-membership .*environment' || fail "status does not see the new environment"
	deploy start --node n1 --yes >/dev/null
	[[ $(started 1 unibus-nats) == "$n1" ]] || fail "a stage or a start restarted nats-server"
	deploy rollback --node n1 2>/dev/null | grep -qx 'n1: restore /etc/unibus/membership.env' || fail "the rollback does not say what it does"
	deploy rollback --node n1 --yes >/dev/null 2>&1
	[[ $(on 1 'cat /etc/unibus/membership.env') == "$conf" ]] || fail "the rollback did not bring the old file back"
	cp "$work/nodes.old" "$work/nodes.env"
	! deploy status --node n1 | grep -q environment || fail "after the rollback status sees another environment"
	deploy plan --node n1 2>/dev/null | grep -qx 'n1: nothing differs' || fail "after the rollback something differs"
	step "a stage on a running node restarted nothing, and was rolled back"
}

rollout() {
	local verb=$1
	shift
	ctl cluster rollout "$verb" --inventory "$work/nodes.env" --sys-seed "$work/secrets/sys.nk" --ssh-config "$work/ssh_config" "$@"
}

# began_all UNIT: when its process started, on each node.
began_all() { for n in 1 2 3; do started "$n" "$1"; done; }

# One node at a time, behind the gate, under the eyes of a client that stays.
rollouts() {
	local before after lines
	ctl cluster gate --inventory "$work/nodes.env" --sys-seed "$work/secrets/sys.nk" >/dev/null || fail "the gate is closed"
	ip netns exec "$id-op" env -i HOME="$work" "$bin/nats" --server "$nats" --tlsca "$work/pki/client-ca.crt" --nkey "$work/alice.nk" \
		--inbox-prefix "_INBOX_$alice" sub 'room.ops.>' >"$work/heard" 2>&1 &
	listener=$!

	# Nothing is due: nothing is done. A plan does nothing either.
	[[ $(rollout upgrade --json 2>/dev/null | grep -c '"units": \[\]') == 3 ]] || fail "an upgrade finds something to restart"
	sed -i 's/^ROUTE_NETWORK.*/&\nAPI_AUTHORITIES=bus.fleet.test/' "$work/nodes.env"
	deploy stage --yes >/dev/null 2>&1
	before=$(began_all unibus-nats)
	# Not while another node is down, whichever it is.
	on 3 'sudo systemctl stop unibus-membership'
	lines=$(began_all unibus-membership)
	refuses 'n3 may not serve' rollout upgrade --yes --timeout 5s
	[[ $(began_all unibus-membership) == "$lines" ]] || fail "a rollout touched a node while another was down"
	on 3 'sudo systemctl start unibus-membership'
	within 60 ctl cluster wait
	# A node that does not come back ends it before the next is touched.
	on 2 'cp -p /etc/unibus/membership.env /etc/unibus/keep && echo UNIBUS_LEASE=1h >>/etc/unibus/membership.env'
	after=$(started 3 unibus-membership)
	refuses 'the rollout stopped at n2' rollout upgrade --yes --timeout 30s
	[[ $(started 3 unibus-membership) == "$after" ]] || fail "n3 was touched after n2 had failed"
	on 2 'mv /etc/unibus/keep /etc/unibus/membership.env'
	# The same line goes on: n1 and n3 are current by now.
	rollout upgrade --yes >"$work/plan" 2>/dev/null || fail "the rollout does not go on: $(<"$work/plan")"
	grep -qE '^n1 +nothing: it is current' "$work/plan" || fail "what is current was restarted: $(<"$work/plan")"
	[[ $(rollout upgrade --json 2>/dev/null | grep -c '"units": \[\]') == 3 ]] || fail "after an upgrade something is due"
	[[ $(began_all unibus-nats) == "$before" ]] || fail "a new environment of membership restarted nats-server"
	step "rolling upgrade: refused with a node down, stopped at one that did not come back, resumed"

	# A reload reaches every server; one that is refused is found out.
	for n in 1 2 3; do on "$n" "$([[ $n == 3 ]] && echo sudo) sh -c 'echo \"max_connections: 9000\" >>/etc/unibus/nats/conf.d/local.conf'"; done
	rollout reload --yes >/dev/null 2>&1 || fail "the rolling reload failed"
	[[ $(rollout reload --json 2>/dev/null | grep -c '"units": \[\]') == 3 ]] || fail "after a reload something is due"
	[[ $(began_all unibus-nats) == "$before" ]] || fail "a reload restarted nats-server"
	on 1 'cp -p /etc/unibus/nats/conf.d/local.conf /etc/unibus/keep; echo "max_conections: 1" >>/etc/unibus/nats/conf.d/local.conf'
	refuses 'refuses the configuration on disk' rollout reload --yes
	on 1 'cp -p /etc/unibus/keep /etc/unibus/nats/conf.d/local.conf; echo "server_name: n9" >>/etc/unibus/nats/conf.d/local.conf'
	refuses 'goes on with its old configuration' rollout reload --yes
	on 1 'mv /etc/unibus/keep /etc/unibus/nats/conf.d/local.conf'
	step "rolling reload: proven on every server; a wrong and a refused one named"

	if [[ -n ${FLEET_FULL:-} ]]; then
		rollout restart --yes 2>&1 | sed 's/^/        /'
		step "rolling restart of everything"
	fi
	within 30 alice_talks 2
	kill -0 "$listener" || fail "the listening client is gone: $(tail -n 3 "$work/heard")"
	lines=$(grep -c Received "$work/heard" || true)
	within 30 alice_talks 1
	within 10 heard_more "$lines"
	kill "$listener"
	step "a client that listened all the while still hears"
}
heard_more() { (($(grep -c Received "$work/heard") > $1)); }

pki() {
	local verb=$1
	shift
	ctl pki "$verb" --dir "$work/pki" --inventory "$work/nodes.env" --sys-seed "$work/secrets/sys.nk" --ssh-config "$work/ssh_config" "$@"
}
began_everything() { for unit in unibus-nats unibus-authcallout unibus-membership; do began_all "$unit"; done; }

# Every certificate and both authorities, then the issuer, all over ssh and with
# the load talking on. Its clients read the CA file of the PKI directory.
certificates() {
	local before authority stage
	# However new ones came to a disk, a rollout sees that the server has others.
	ctl pki issue --dir "$work/pki" --inventory "$work/nodes.env" --node n1 --force >/dev/null
	[[ $(rollout reload --json 2>/dev/null | grep -c '"units": \[\]') == 3 ]] || fail "a certificate that is on no node is due for a reload"
	deploy stage --node n1 --yes >/dev/null 2>&1
	rollout reload >"$work/plan" 2>/dev/null
	grep -qE '^n1 +unibus-nats' "$work/plan" || fail "new certificates are not due: $(<"$work/plan")"
	rollout reload --yes >"$work/seen" 2>&1 || fail "the reload failed: $(<"$work/seen")"
	[[ $(rollout reload --json 2>/dev/null | grep -c '"units": \[\]') == 3 ]] || fail "after a reload certificates are due"
	pki renew --all --yes >"$work/seen" 2>&1 || fail "the renewal failed: $(<"$work/seen")"
	on 2 'systemctl stop unibus-membership'
	refuses 'n2 does not show the certificate of its api port' pki rotate-ca --authority cluster --stage trust --yes
	on 2 'systemctl start unibus-membership'
	within 60 ctl cluster wait
	before=$(began_everything)
	for authority in cluster client; do
		refuses 'the stage before is trust' pki rotate-ca --authority "$authority" --stage issue --yes
		for stage in trust issue retire; do
			pki rotate-ca --authority "$authority" --stage "$stage" --yes >"$work/seen" 2>&1 || fail "$authority, $stage: $(<"$work/seen")"
			grep -q ' 0 of them dropped' "$work/seen" || fail "routes were dropped: $(<"$work/seen")"
		done
	done
	ctl pki status --dir "$work/pki" --inventory "$work/nodes.env" --ssh-config "$work/ssh_config" --live --nodes >"$work/seen" 2>&1 || fail "after the rotation: $(<"$work/seen")"
	[[ $(began_everything) == "$before" ]] || fail "certificates restarted something"
	deploy plan 2>/dev/null | grep -c 'nothing differs' | grep -qx 3 || fail "after the rotation the nodes differ from the PKI directory"
	step "all certificates and both authorities replaced: nothing restarted, no route dropped"

	for stage in trust issue retire; do
		ctl config rotate issuer --stage "$stage" --secrets "$work/secrets" --pki "$work/pki" --inventory "$work/nodes.env" \
			--sys-seed "$work/secrets/sys.nk" --ssh-config "$work/ssh_config" --yes >"$work/seen" 2>&1 || fail "issuer, $stage: $(<"$work/seen")"
		deploy stage --yes >/dev/null 2>&1
		deploy status | grep -qE 'unibus-authcallout .*(credentials|environment)' || fail "status does not see the new seeds"
		rollout upgrade --yes >"$work/seen" 2>&1 || fail "issuer, $stage: $(<"$work/seen")"
	done
	within 30 alice_talks 1
	step "the issuer replaced"
}

# One node down: all goes on. Two: nobody new is admitted. Back: all serve.
stops() {
	power_off 3
	within 60 alice_talks 1
	within 30 healthy 2
	step "n3 without power: the others go on"
	on 2 'systemctl stop unibus.target'
	within 60 all_stopped 2
	within 60 unhealthy 1
	within 30 alice_is_left_alone 1
	step "n2 stopped too: n1 denies"
	boot 3
	within 60 on 3 true
	for n in 1 3; do within 90 healthy "$n"; done
	within 30 alice_talks 3
	step "n3 came back by itself at boot: any two serve"
	on 2 'systemctl start unibus.target'
	within 90 healthy 2
	within 60 ctl cluster wait
	step "all three serve again"
	# A process that dies is started again.
	on 1 'kill -KILL $(systemctl show -P MainPID unibus-membership) $(systemctl show -P MainPID unibus-authcallout)'
	within 60 healthy 1
	within 30 units_active 1
	step "killed services are back"
}

inside() { ip netns exec "$id-n$1" env -i HOME="$work" PATH="$bin:/usr/bin:/bin" "${@:2}"; }
serves_inside() { inside "$1" curl -sf -m 5 --cacert "$work/pki/client-ca.crt" "https://10.77.0.$1:8470/healthz"; }
silent_inside() { ! serves_inside "$1" >/dev/null; }
connections() { ctl conn list --user "$1" --json | grep -c '"cid"' || true; }
past() { ((SECONDS > $1)); }
no_connections() { [[ $(connections "$1") == 0 ]]; }

# One node is cut off, with its clients. It admits nobody once its lease has run
# out; what is taken away meanwhile is proven when the cut has healed.
partition() {
	local bob cut code
	ctl identity new --out "$work/bob.nk" >/dev/null 2>&1
	bob=$(ctl identity show "$work/bob.nk" --json | grep -o 'U[A-Z2-7]\{55\}')
	ctl user add --handle bob --sign-pub "$bob" --role member >/dev/null
	ctl room add ops bob --role reader >/dev/null
	ip netns exec "$id-n3" env -i HOME="$work" "$bin/nats" --server tls://10.77.0.3:4250 --tlsca "$work/pki/client-ca.crt" --nkey "$work/bob.nk" \
		--inbox-prefix "_INBOX_$bob" sub 'room.ops.>' >"$work/bob" 2>&1 &
	listener=$!
	within 20 grep -q Subscribing "$work/bob"
	[[ $(connections bob) == 1 ]] || fail "bob is not seen as connected"
	ip -n "$id-sw" link set n3 down
	cut=$SECONDS
	within 20 silent_inside 3
	step "n3 cut off: it says 503 after $((SECONDS - cut)) s"
	# From the end of its lease, 10 s, a client beside it is not let in any more.
	within 15 past $((cut + 11))
	! inside 3 nats --timeout 3s --server tls://10.77.0.3:4250 --tlsca "$work/pki/client-ca.crt" --nkey "$work/alice.nk" \
		--inbox-prefix "_INBOX_$alice" pub "room.ops.$alice.cut" x >"$work/seen" 2>&1 || fail "a node that is cut off admits"
	{ healthy 1 && healthy 2; } >/dev/null || fail "the others do not serve"
	code=0
	ctl user revoke bob --yes >"$work/seen" 2>&1 || code=$?
	{ [[ $code == 3 ]] && grep -q 'n3' "$work/seen"; } || fail "a revoke with n3 cut off: exit $code, $(<"$work/seen")"
	kill -0 "$listener" || fail "bob's client on the node that is cut off ended"
	ip -n "$id-sw" link set n3 up
	cut=$SECONDS
	within 60 serves_inside 3 >/dev/null
	within 10 ctl user revoke bob --yes
	no_connections bob || fail "bob still has a connection after the proof"
	step "healed: n3 serves after $((SECONDS - cut)) s, and bob's session there is gone"
	kill "$listener" 2>/dev/null || true
	within 30 alice_talks 3
}

# anew N: another machine, empty, under the name of one that is off.
anew() {
	umount "$work/n$1/root" 2>/dev/null || true
	rm -rf --one-file-system "$work/n$1"
	sed -i "/^10\.77\.0\.$1 /d" "$work/known_hosts"
	machine "$1"
	boot "$1"
}

# A node whose disk is gone is replaced by an empty machine under its name.
replacement() {
	local lost=$SECONDS
	power_off 3
	anew 3
	within 60 on 3 true
	deploy stage --node n3 --yes >/dev/null 2>&1
	deploy start --node n3 --yes >/dev/null
	within 120 healthy 3
	within 60 ctl cluster wait
	within 60 ctl cluster gate --inventory "$work/nodes.env" --sys-seed "$work/secrets/sys.nk"
	within 30 alice_talks 3
	step "n3 replaced by an empty machine in $((SECONDS - lost)) s: it holds everything again"
}

# What must not do harm to a cluster that runs.
planted_after() {
	# Two rows of the inventory are swapped: one store under another name.
	sed -e 's/^NODE_1="n1 ssh=root@10.77.0.1/NODE_1="n1 ssh=root@10.77.0.X/' -e 's/^NODE_2="n2 ssh=root@10.77.0.2/NODE_2="n2 ssh=root@10.77.0.1/' \
		-e 's/10.77.0.X/10.77.0.2/' "$work/nodes.env" >"$work/bad.env"
	refuses 'is node n2 already' ctl deploy stage --inventory "$work/bad.env" --ssh-config "$work/ssh_config" \
		--secrets "$work/secrets" --pki "$work/pki" --bin "$bin" --units "$repo/deploy/systemd" --yes
	# An interrupted stage is taken up, and keeps what was there before it.
	local stamp kept
	stamp=$(date -u +%Y%m%dT%H%M%S.000Z) # the newest: older ones are not kept for ever
	kept=/var/lib/unibus-deploy/backups/$stamp
	on 1 "echo $stamp >/var/lib/unibus-deploy/unfinished; mkdir -p $kept/tree/etc/unibus; cp -p /etc/unibus/node.env $kept/tree/etc/unibus/;
		echo 'kept /etc/unibus/node.env' >$kept/entries;
		echo broken >/etc/unibus/node.env"
	refuses 'interrupted' deploy start --node n1 --yes
	deploy stage --node n1 --yes >/dev/null 2>&1
	on 1 "test ! -e /var/lib/unibus-deploy/unfinished && grep -q UNIBUS_NODE=n1 /etc/unibus/node.env && grep -q UNIBUS_NODE=n1 $kept/tree/etc/unibus/node.env" ||
		fail "the interrupted stage was not finished"
	# A configuration that is wrong at the start: the unit says so and stays down,
	# the node's others go on.
	on 1 'cp /etc/unibus/authcallout.env /etc/unibus/keep && echo UNIBUS_LEASE=1h >>/etc/unibus/authcallout.env && systemctl restart unibus-authcallout' 2>/dev/null || true
	within 20 on 1 'systemctl show -P ExecMainStatus unibus-authcallout | grep -qx 78'
	on 1 'systemctl is-failed -q unibus-authcallout' || fail "a wrong configuration is tried again and again"
	refuses 'not every unit of n1 runs' deploy status
	on 1 'mv /etc/unibus/keep /etc/unibus/authcallout.env && systemctl start unibus-authcallout'
	within 60 ctl cluster wait
	step "refused: swapped rows; finished: an interrupted stage; named: a wrong configuration"
}

# who_is_there: what an access decision is made of, whoever holds it.
who_is_there() {
	ctl user list --json | grep -oE '"(sign_pub|handle|role|status)": "[^"]*"'
	ctl room members ops --json | grep -oE '"(handle|nkey|sign_pub|user|role)": "[^"]*"'
}

# All three disks are gone. What is left is the machine that administers, and the
# backup; who was revoked after it stays out.
disaster() {
	local lost
	ctl identity new --out "$work/mallory.nk" >/dev/null 2>&1
	ctl user add --handle mallory --sign-pub "$(ctl identity show "$work/mallory.nk" --json | grep -o 'U[A-Z2-7]\{55\}')" --role member >/dev/null
	head -c 300000 /dev/urandom >"$work/a file"
	ctl --identity "$work/load.nk" room put log "$work/a file" file >/dev/null 2>&1
	ctl backup key --out "$work/backup.key" >/dev/null
	ctl --direct backup create --out "$work/today.backup" --recipients-file "$work/backup.key.pub" >/dev/null
	ctl backup verify "$work/today.backup" --age-identity "$work/backup.key" >"$work/seen"
	grep -qE 'holds .*[0-9]+ messages of 1 rooms, 1 files of 1 rooms, 300000 bytes' "$work/seen" || fail "the backup: $(<"$work/seen")"
	as_alice room history log --from start --limit 0 --json >"$work/said.before"
	ctl user revoke mallory --yes >/dev/null
	who_is_there >"$work/before"
	lost=$SECONDS
	for n in 1 2 3; do power_off "$n"; done
	for n in 1 2 3; do anew "$n"; done
	for n in 1 2 3; do within 60 on "$n" true; done
	deploy stage --yes >/dev/null 2>&1
	deploy start --yes >/dev/null
	ctl cluster wait >/dev/null
	alice_is_left_alone 1 || fail "an empty cluster admits"
	cp "$work/today.backup" "$work/bad.backup"
	printf x | dd of="$work/bad.backup" bs=1 seek=300 conv=notrunc status=none
	refuses 'backup' ctl --direct restore "$work/bad.backup" --age-identity "$work/backup.key" --yes
	ctl --direct restore "$work/today.backup" --age-identity "$work/backup.key" --revoked mallory --yes >"$work/seen" 2>&1 || fail "the restore: $(<"$work/seen")"
	for n in 1 2 3; do within 30 alice_talks "$n"; done
	who_is_there >"$work/after"
	diff "$work/before" "$work/after" || fail "what was restored differs"
	within 30 as_alice room history log --limit 1
	as_alice room history log --from start --limit 0 --json >"$work/said.after"
	cmp "$work/said.before" "$work/said.after" || fail "the durable room holds something else: $(wc -c "$work"/said.*)"
	as_alice room get log file "$work/the file" >/dev/null 2>&1 || fail "the file cannot be read"
	cmp "$work/a file" "$work/the file" || fail "the file is another one"
	ctl --identity "$work/load.nk" room pub log 'it goes on' >/dev/null 2>&1 || fail "nothing can be said in the durable room"
	ctl cluster wait >/dev/null
	step "all three disks lost; staged, started and restored in $((SECONDS - lost)) s: people, $(grep -c '"seq"' "$work/said.after") messages, a file; who was revoked since stays out"
}
