package main

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/nats-io/nkeys"

	"unibus.internal/bus/kv"
)

// expectation is a setting that has to be what it is. nats-server accepts
// every other value too.
type expectation struct {
	path    []string
	ok      func(v *confValue) bool
	problem string // completes "jetstream.strict ..."
	fix     string
}

func expectations() []expectation {
	patient := func(v *confValue) bool { n, ok := v.number(); return ok && n >= 5 }
	const refusal = "is shorter than clients wait for a connection: they would see refusals, and a client gives up after two"
	return []expectation{
		{
			[]string{"server_name"},
			isSet,
			"is missing: nats-server -t passes, and the start fails (a JetStream cluster needs it)", "server_name: <the node's name in nodes.env>",
		},
		{
			[]string{"system_account|system"},
			is("SYS"),
			"is not SYS: connections could neither be watched nor closed", "system_account: SYS",
		},
		{
			[]string{"tls", "timeout"},
			patient,
			refusal, "tls { timeout: 10 }",
		},
		{
			[]string{"authorization", "timeout"},
			patient,
			refusal, "authorization { timeout: 10 }",
		},
		{
			[]string{"cluster", "tls", "timeout"},
			patient,
			"is shorter than a busy peer needs: routes would flap", "cluster { tls { timeout: 10 } }",
		},
		{
			[]string{"cluster", "name"},
			isSet,
			"is missing", "cluster { name: <UNIBUS_CLUSTER of nodes.env> }",
		},
		{
			[]string{"cluster", "listen|port"},
			isSet,
			"is missing: this node would have no routes", `cluster { listen: "0.0.0.0:6250" }`,
		},
		{
			[]string{"cluster", "pool_size"},
			is("-1"),
			"is not -1: each pair of nodes opens several connections, and accounts leave the shared one", "cluster { pool_size: -1 }",
		},
		{
			[]string{"cluster", "no_advertise"},
			(*confValue).isTrue,
			"is not true: clients are told the nodes' addresses and try those", "cluster { no_advertise: true }",
		},
		{
			[]string{"jetstream", "sync|sync_interval"},
			is("always"),
			"is not always: writes that were acknowledged are lost in a power cut, a revoke among them", "jetstream { sync_interval: always }",
		},
		{
			[]string{"jetstream", "strict"},
			(*confValue).isTrue,
			"is not true: malformed JetStream requests are guessed at, not refused", "jetstream { strict: true }",
		},
		{
			[]string{"jetstream", "store|store_dir|storedir"},
			isSet,
			"is empty: nats-server would store in a temporary directory", "jetstream { store_dir: /var/lib/unibus/jetstream }",
		},
	}
}

func isSet(v *confValue) bool { return v.string() != "" }

func is(want string) func(v *confValue) bool {
	return func(v *confValue) bool { return v.string() == want }
}

// ban is a setting that must not be there, or must be off.
type ban struct {
	path   []string
	reason string
}

func bans() []ban {
	const unguarded = "opens a listener whose connections this bus does not expect"
	return []ban{
		{[]string{"leafnodes|leaf"}, unguarded},
		{[]string{"gateway"}, unguarded},
		{[]string{"websocket|ws"}, unguarded},
		{[]string{"mqtt"}, unguarded},
		{[]string{"prof_port"}, "opens a profiler without a password on every address"},
		{[]string{"no_auth_user"}, "lets clients in without a key"},
		{[]string{"allow_non_tls"}, "lets clients in without TLS"},
		{[]string{"default_sentinel"}, "lets clients in without a key of their own"},
		{[]string{"operator|operators|roots|root|root_operators|root_operator"}, "turns the static accounts and the auth callout off"},
		{[]string{"resolver|account_resolver|accounts_resolver"}, "turns the static accounts and the auth callout off"},
		{[]string{"trusted|trusted_keys"}, "turns the static accounts and the auth callout off"},
		{[]string{"no_system_account|no_system|no_sys_acc"}, "connections could neither be watched nor closed"},
		{[]string{"authorization", "users"}, "lets clients in past the auth callout"},
		{[]string{"authorization", "user|username"}, "lets clients in past the auth callout"},
		{[]string{"authorization", "token"}, "lets clients in past the auth callout"},
		{[]string{"tls", "handshake_first|first|immediate"}, "a default client cannot connect"},
		{[]string{"tls", "insecure"}, "certificates are not checked"},
		{[]string{"tls", "allow_insecure_cipher_suites"}, "allows ciphers that are broken"},
		{[]string{"tls", "verify_and_map"}, "lets clients in by certificate, without their key"},
		{[]string{"cluster", "tls", "handshake_first|first|immediate"}, "the other nodes cannot connect"},
		{[]string{"cluster", "tls", "insecure"}, "any machine could become a node"},
		{[]string{"cluster", "tls", "allow_insecure_cipher_suites"}, "allows ciphers that are broken"},
		{[]string{"jetstream", "disabled|disable"}, "this node would hold no data"},
	}
}

// settings checks values that are right or wrong by themselves.
func (l *linter) settings() {
	for _, e := range expectations() {
		v := l.get(e.path...)
		if e.ok(v) {
			continue
		}
		setting := spelled(e.path)
		if isSet(v) {
			setting += ": " + v.text
		}
		l.critical(l.where(e.path...), setting+" "+e.problem, e.fix)
	}
	for _, b := range bans() {
		if v := l.get(b.path...); v != nil && !isOff(v) {
			l.critical(v.pos, spelled(b.path)+" is set: "+b.reason, "remove it")
		}
	}
	for _, block := range [][]string{{"tls"}, {"cluster", "tls"}} {
		if v := l.get(append(block, "min_version")...); v != nil && v.text != "1.2" && v.text != "1.3" {
			l.critical(v.pos, spelled(append(block, "min_version"))+" is below TLS 1.2", `min_version: "1.2"`)
		}
	}
	if v := l.get("trace"); v.isTrue() {
		l.warning(v.pos, "trace writes what users say into the log", "remove it when you are done")
	}
}

func isOff(v *confValue) bool {
	n, isNumber := v.number()
	return v.kind == confBool && !v.isTrue() || isNumber && n == 0
}

// spelled is a path as a person writes it, each key by its usual name.
func spelled(path []string) string {
	keys := make([]string, len(path))
	for i, names := range path {
		first, rest, _ := strings.Cut(names, "|")
		keys[i] = first
		if first == "sync" || first == "store" {
			keys[i], _, _ = strings.Cut(rest, "|")
		}
	}
	return strings.Join(keys, ".")
}

// accounts checks who gets in, and with what rights.
func (l *linter) accounts() {
	static := l.staticUsers()
	if l.callout() {
		l.authUsers(static)
	}
	for _, u := range static {
		l.staticUser(u)
	}
	l.storageCaps()
}

const fixRender = "render again: unibusctl config render"

// callout says whether there is one.
func (l *linter) callout() bool {
	path := []string{"authorization", "auth_callout|auth_hook"}
	callout := l.get(path...)
	if callout == nil {
		l.critical(l.where(path...), "there is no auth_callout: no user of the bus could connect", "take away what replaces or leaves it out, or "+fixRender)
		return false
	}
	for _, k := range []struct {
		name  string
		valid func(string) bool
		want  string
	}{
		{"issuer", nkeys.IsValidPublicAccountKey, "an account's public key (A...)"},
		{"xkey", nkeys.IsValidPublicCurveKey, "a public curve key (X...); without it requests cross the routes readable"},
	} {
		if at := l.where(append(path, k.name)...); !k.valid(callout.field(k.name).string()) && !l.said(at) {
			l.critical(at, fmt.Sprintf("auth_callout.%s is not %s", k.name, k.want),
				fmt.Sprintf("the public key of creds/%s.nk; %s", k.name, fixRender))
		}
	}
	if v := callout.at("account|acc"); v.string() != "AUTH" {
		l.critical(l.where(append(path, "account|acc")...), "auth_callout.account is not AUTH: others could read its requests", "account: AUTH")
	}
	allowed := callout.field("allowed_accounts").strings()
	slices.Sort(allowed)
	if !slices.Equal(allowed, []string{"AUTH", "BUS"}) {
		l.critical(l.where(append(path, "allowed_accounts")...),
			"auth_callout.allowed_accounts is not [BUS, AUTH]: the break-glass keys of SYS and CTRL would depend on the callout, or users on nothing",
			"allowed_accounts: [BUS, AUTH]")
	}
	return true
}

// staticUser is a user that the server itself knows.
type staticUser struct {
	account string
	nkey    string
	name    string // of its seed on this node, empty if there is none
	pos     confPos
	rights  *confValue
}

func (l *linter) staticUsers() []staticUser {
	names := l.seedNames()
	var out []staticUser
	for _, account := range l.accountFields() {
		for _, u := range account.value.field("users").list() {
			rights := u.at("permissions|permission|authorization")
			if rights == nil {
				rights = account.value.at("default_permissions|default_permission")
			}
			key := u.field("nkey").string()
			out = append(out, staticUser{account: account.key, nkey: key, name: names[key], pos: u.pos, rights: rights})
		}
	}
	return out
}

func (l *linter) accountFields() []confField {
	if accounts := l.get("accounts"); accounts != nil {
		return accounts.fields
	}
	return nil
}

// authUsers holds the callout's list against the accounts: a service that is
// missing in it is sent to the callout, which knows no services.
func (l *linter) authUsers(static []staticUser) {
	path := []string{"authorization", "auth_callout|auth_hook", "auth_users|users"}
	list, at := l.get(path...).list(), l.where(path...)
	users := 0
	for _, k := range keyFiles {
		if k.prefix == nkeys.PrefixByteUser {
			users++
		}
	}
	if len(list) < users {
		l.critical(at, fmt.Sprintf("auth_callout.auth_users lists %d keys, and there are %d services and break-glass keys", len(list), users), fixRender)
	}
	seen := map[string]bool{}
	for _, v := range list {
		seen[v.text] = true
		switch isStatic := func(u staticUser) bool { return u.nkey == v.text }; {
		case !nkeys.IsValidPublicUserKey(v.text):
			l.critical(v.pos, fmt.Sprintf("auth_users lists %s, which is no user's public key (U...)", quote(v.text)), fixRender)
		case !slices.ContainsFunc(static, isStatic):
			l.critical(v.pos, "auth_users lists "+v.text+", which is in no account: nobody can connect with it", "remove it, or add the user to its account")
		}
	}
	for _, u := range static {
		if nkeys.IsValidPublicUserKey(u.nkey) && !seen[u.nkey] {
			l.critical(u.pos, fmt.Sprintf("%s is in no auth_users: the auth callout would be asked for it, and refuse", u), "add its nkey to auth_callout.auth_users")
		}
	}
}

func (u staticUser) String() string {
	if u.name != "" {
		return fmt.Sprintf("the user %s in %s", u.name, u.account)
	}
	return fmt.Sprintf("the user %s in %s", quote(u.nkey), u.account)
}

func (l *linter) staticUser(u staticUser) {
	switch {
	case !nkeys.IsValidPublicUserKey(u.nkey):
		l.critical(u.pos, fmt.Sprintf("a user in %s has no valid nkey (U...): passwords and tokens can be replayed", u.account), `{ nkey: "U..." }`)
	case u.account == "AUTH" && u.name != "" && u.name != "authcallout-auth":
		l.critical(u.pos, u.String()+" shares the callout's account, and could read its requests", "move it out of AUTH")
	case u.breakGlass():
	case !restricts(u.rights.at("publish|pub|import")):
		l.critical(u.pos, u.String()+" may publish anything: an empty list, or none, allows all", "list its subjects in permissions.publish; "+fixRender)
	case !restricts(u.rights.at("subscribe|sub|export")):
		l.critical(u.pos, u.String()+" may subscribe to anything: an empty list, or none, allows all", "list its subjects in permissions.subscribe; "+fixRender)
	}
}

// breakGlass says whether u may do everything in its account: sys in SYS, and
// ops, the one user of CTRL whose seed is kept off the nodes.
func (u staticUser) breakGlass() bool {
	return u.account == "SYS" || u.account == "CTRL" && (u.name == "" || u.name == "ops")
}

// restricts reports whether a rule leaves anything forbidden. To the server no
// rule and an empty one mean the same: everything is allowed.
func restricts(rule *confValue) bool {
	allow := rule.strings()
	if rule != nil && rule.kind == confMap {
		if slices.Contains(rule.field("deny").strings(), ">") {
			return true
		}
		allow = rule.field("allow").strings()
	}
	return len(allow) > 0 && !slices.Contains(allow, ">")
}

// storageShare is how much of a node's store the accounts may fill together:
// whatever users store, a revoke still finds room.
const storageShare = 0.7

// storageCaps adds the accounts' caps up. The server counts every replica
// against a cap, so that a node holds a third of it.
func (l *linter) storageCaps() {
	path := []string{"jetstream", "max_file_store|max_file"}
	store, ok := l.get(path...).number()
	if !ok || store <= 0 {
		l.critical(l.where(path...), "jetstream.max_file_store is not set: it would depend on what the disk has free at each start", "max_file_store: 16GB")
		return
	}
	sum, last := 0.0, l.where(path...)
	for _, account := range l.accountFields() {
		js := account.value.field("jetstream")
		if js == nil || isOff(js) || strings.EqualFold(js.text, "disabled") {
			continue
		}
		limit := js.at("max_store|max_file|max_disk|store|disk")
		n, ok := limit.number()
		if !ok || n < 0 {
			l.critical(js.pos, fmt.Sprintf("account %s may fill the whole store: then nothing can be written, not even a revoke", account.key), "jetstream: { max_file: 6GB }")
			continue
		}
		sum, last = sum+n/kv.Replicas, limit.pos
	}
	if sum >= storageShare*store {
		l.critical(last, fmt.Sprintf("the accounts may fill %.0f %% of max_file_store on each node (caps count %d replicas): a full store takes no revoke", 100*sum/store, kv.Replicas),
			fmt.Sprintf("lower max_file of the accounts to under %.0f %% together, or raise max_file_store", 100*storageShare))
	}
}

// network checks listeners and routes, with an inventory also against it.
func (l *linter) network() {
	l.monitor()
	l.routes()
	if l.inv == nil {
		return
	}
	self, ok := l.self()
	if !ok {
		name := l.get("server_name")
		if isSet(name) {
			l.critical(name.pos, fmt.Sprintf("there is no node %s in %s", quote(name.text), l.inv.path), "server_name of the node's row, or the right --inventory")
		}
		return
	}
	if v := l.get("cluster", "name"); isSet(v) && v.text != l.inv.cluster && !l.said(v.pos) {
		l.critical(v.pos, fmt.Sprintf("cluster.name is %s, and %s says %s: this node would not join", quote(v.text), l.inv.path, l.inv.cluster), "name: "+l.inv.cluster)
	}
	for _, p := range []struct {
		path []string
		want int
	}{
		{[]string{"listen|port"}, self.ports.nats},
		{[]string{"cluster", "listen|port"}, self.ports.route},
		{[]string{"http"}, self.ports.monitor},
	} {
		if v := l.get(p.path...); v != nil && portOf(v.text) != p.want {
			l.critical(v.pos, fmt.Sprintf("%s is %s, and %s says port %d", spelled(p.path), v.text, l.inv.path, p.want), fixRender)
		}
	}
}

// self is this node's row of the inventory.
func (l *linter) self() (node, bool) {
	if l.inv == nil {
		return node{}, false
	}
	name := l.get("server_name").string()
	i := slices.IndexFunc(l.inv.nodes, func(n node) bool { return n.name == name })
	if i < 0 {
		return node{}, false
	}
	return l.inv.nodes[i], true
}

func portOf(address string) int {
	if _, port, err := net.SplitHostPort(address); err == nil {
		address = port
	}
	n, err := strconv.Atoi(address)
	if err != nil {
		return 0
	}
	return n
}

// monitor: it has no password, and tells subjects, users and addresses.
func (l *linter) monitor() {
	found := false
	for _, names := range []string{"http", "https", "http_port|monitor_port", "https_port"} {
		v := l.get(names)
		if v == nil || isOff(v) {
			continue
		}
		found = true
		host, _, err := net.SplitHostPort(v.text)
		if err != nil {
			host = l.get("host|net").string() // a port alone is bound to the client listener's address
		}
		if !isLoopback(host) {
			l.critical(v.pos, fmt.Sprintf("the monitor (%s: %s) answers everyone who can reach this node, without a password", spelled([]string{names}), v.text),
				`http: "127.0.0.1:8222"`)
		}
	}
	if !found {
		l.critical(l.where("http"), "there is no monitor: the services cannot judge their server", `http: "127.0.0.1:8222"`)
	}
}

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// routes: the other nodes, each once, and not this one.
func (l *linter) routes() {
	list, at := l.get("cluster", "routes").list(), l.where("cluster", "routes")
	own := l.ownRoutes()
	listed := map[string]bool{}
	for _, v := range list {
		u, err := url.Parse(v.text)
		if err != nil || u.Host == "" {
			continue // nats-server -t names it; what it holds is checked with all other text
		}
		address := routeKey(u.Host)
		if slices.Contains(own, address) {
			l.critical(v.pos, "cluster.routes lists this node itself ("+u.Host+"): JetStream may fail to elect a leader", "name the other nodes only")
			continue
		}
		listed[address] = true
	}
	self, known := l.self()
	if !known {
		if want := kv.Replicas - 1; len(listed) != want {
			l.critical(at, fmt.Sprintf("cluster.routes names %d other nodes, not %d", len(listed), want), "name each of the other nodes once")
		}
		return
	}
	for _, other := range l.inv.nodes {
		address := routeKey(hostPort(l.inv.routeAddress(other), other.ports.route))
		if other.name != self.name && !listed[address] {
			l.critical(at, fmt.Sprintf("cluster.routes does not name %s (%s)", other.name, address), fixRender)
		}
		delete(listed, address)
	}
	for address := range listed {
		l.critical(at, fmt.Sprintf("cluster.routes names %s, which is no node of %s", address, l.inv.path), fixRender)
	}
}

func routeKey(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		host, port = address, "6222"
	}
	return net.JoinHostPort(canonicalName(host), port)
}

// ownRoutes is every address under which this node's route listener could be
// listed: those of its route certificate and of the inventory.
func (l *linter) ownRoutes() []string {
	port := strconv.Itoa(portOf(l.get("cluster", "listen|port").string()))
	var names []string
	if cert, err := readCert(leafDir(l.path("tls")).cert(routeLeaf)); err == nil {
		names = certNames(cert)
	}
	if self, ok := l.self(); ok {
		names = append(names, leafNames(self)...)
	}
	var out []string
	for _, name := range names {
		out = append(out, net.JoinHostPort(name, port))
	}
	return out
}

var (
	durationKey    = regexp.MustCompile(`(?i)(^|_)(timeout|interval|deadline|duration|period|delay|wait)$`)
	durationNumber = regexp.MustCompile(`^[0-9]+[mM]$`)
	passwordKey    = regexp.MustCompile(`(?i)^(.*_)?(password|pass|token)$`)
	urlPassword    = regexp.MustCompile(`^[a-z+-]+://[^/@]*:[^/@]*@`)
	urlVariable    = regexp.MustCompile(`^[a-z+-]+://[^/]*\$`)
)

// text checks what can stand in any value.
func (l *linter) text() {
	l.conf.root.walk(nil, func(path []string, v *confValue) {
		key := ""
		if len(path) > 0 {
			key = path[len(path)-1]
		}
		l.repeated(v)
		switch {
		case v.kind == confMap || v.kind == confArray:
		case v.kind == confNumber && durationKey.MatchString(key) && durationNumber.MatchString(v.text):
			if l.said(v.pos) {
				return // that it must be another value anyway
			}
			l.critical(v.pos, fmt.Sprintf("%s: %s is a number of millions to nats-server, not minutes", key, v.text), fmt.Sprintf("quote it: %s: %q", key, strings.ToLower(v.text)))
		case urlVariable.MatchString(v.text):
			l.critical(v.pos, "a $VARIABLE inside a URL stays as it is written: nats-server would send it as the password",
				"write the password itself, in conf.d/secrets.conf; "+fixRender)
		case urlPassword.MatchString(v.text) && v.pos.file != l.path(secretsConf):
			l.critical(v.pos, "a password stands outside of conf.d/secrets.conf, the file that is kept from others", "move the URL to conf.d/secrets.conf; "+fixRender)
		case isSeed(v.text):
			l.critical(v.pos, key+" holds a secret seed, where a public key belongs: whoever read this file has it", "make new keys (unibusctl config init), and render again")
		case placeholder.MatchString(v.text) || strings.Contains(v.text, "{{"):
			l.critical(v.pos, fmt.Sprintf("%s is still the placeholder %s", key, quote(v.text)), "write the real value")
		}
		if urlPassword.MatchString(v.text) || passwordKey.MatchString(key) {
			l.hidden(v.pos)
		}
	})
}

// repeated warns of a block that silently replaces one before it, such as an
// authorization { } in local.conf, which takes the auth callout with it.
func (l *linter) repeated(v *confValue) {
	before := map[string]confPos{}
	for _, f := range v.fields {
		key := strings.ToLower(f.key)
		if at, ok := before[key]; ok && f.value.kind == confMap {
			l.warning(f.pos, fmt.Sprintf("this %s block replaces the whole one at %s:%d", f.key, at.file, at.line), "make one block of both")
		}
		before[key] = f.pos
	}
}

func isSeed(text string) bool {
	_, _, err := nkeys.DecodeSeed([]byte(text))
	return err == nil
}

// hidden names a file with a password in it that others can read, once.
func (l *linter) hidden(at confPos) {
	at.line = 0
	if mode, ok := modeOf(at.file); ok && mode&0o037 != 0 {
		l.critical(at, fmt.Sprintf("%s holds a password and others can read it (mode %04o)", filepath.Base(at.file), mode),
			fmt.Sprintf("chmod 640 %s, and make a new password if others were on this machine", at.file))
	}
}
