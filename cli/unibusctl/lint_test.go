package main

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"
)

// lintLab is a rendered node, its inventory, and a clock.
type lintLab struct {
	t    *testing.T
	root string
	dir  string // the node's etc
	now  time.Time
}

const lintInventory = `UNIBUS_CLUSTER=unibus
ROUTE_NETWORK=private
NODE_1="n1 public=198.18.0.1 private=10.0.0.1"
NODE_2="n2 public=198.18.0.2 private=10.0.0.2"
NODE_3="n3 public=198.18.0.3 private=10.0.0.3"
`

// newLintLab makes keys and certificates; render makes the node from them.
func newLintLab(t *testing.T) *lintLab {
	t.Helper()
	l := &lintLab{t: t, root: t.TempDir(), now: pkiEpoch}
	write(t, l.file("nodes.env"), lintInventory, 0o644)
	l.unibusctl("config", "init", "--dir", l.file("secrets"))
	l.unibusctl("pki", "init", "--dir", l.file("pki"))
	l.unibusctl("pki", "issue", "--dir", l.file("pki"), "--inventory", l.file("nodes.env"))
	return l
}

// render returns a lab for a fresh, good node made from the same keys.
func (l *lintLab) render(t *testing.T) *lintLab {
	t.Helper()
	n := &lintLab{t: t, root: l.root, dir: filepath.Join(t.TempDir(), "etc"), now: l.now}
	n.unibusctl("config", "render", "--inventory", n.file("nodes.env"), "--secrets", n.file("secrets"),
		"--pki", n.file("pki"), "--node", "n1", "--out", n.dir, "--etc", "/etc/unibus")
	return n
}

func (l *lintLab) file(name string) string { return filepath.Join(l.root, name) }

func (l *lintLab) unibusctl(args ...string) {
	l.t.Helper()
	var out bytes.Buffer
	a := &app{
		in: strings.NewReader(""), out: &out, errw: &out,
		getenv: func(string) string { return "" }, now: func() time.Time { return l.now }, rand: rand.Reader,
	}
	if code := a.run(l.t.Context(), args); code != 0 {
		l.t.Fatalf("unibusctl %s: exit %d\n%s", strings.Join(args, " "), code, out.String())
	}
}

// check runs the lint, without nats-server.
func (l *lintLab) check(withInventory bool) *linter {
	l.t.Helper()
	lint := &linter{dir: l.dir, now: l.now, getenv: func(string) string { return "" }}
	if withInventory {
		lint.inv = must(parseInventory(l.file("nodes.env")))(l.t)
	}
	lint.check("")
	return lint
}

// edit replaces the one place in a file where old stands.
func (l *lintLab) edit(name, old, replacement string) {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	text := string(must(os.ReadFile(path))(l.t))
	if n := strings.Count(text, old); n != 1 {
		l.t.Fatalf("%q stands %d times in %s:\n%s", old, n, name, text)
	}
	write(l.t, path, strings.Replace(text, old, replacement, 1), must(os.Stat(path))(l.t).Mode().Perm())
}

func (l *lintLab) add(name, text string) {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	write(l.t, path, string(must(os.ReadFile(path))(l.t))+text, must(os.Stat(path))(l.t).Mode().Perm())
}

func (l *lintLab) copyFile(from, to string) {
	l.t.Helper()
	to = filepath.Join(l.dir, to)
	write(l.t, to, string(must(os.ReadFile(from))(l.t)), must(os.Stat(to))(l.t).Mode().Perm())
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func lines(l *linter) string {
	var b strings.Builder
	for _, f := range l.findings {
		b.WriteString(f.String() + "\n")
	}
	return b.String()
}

func TestLintFindsNothingInARenderedNode(t *testing.T) {
	l := newLintLab(t)
	for _, withInventory := range []bool{false, true} {
		if got := l.render(t).check(withInventory); len(got.findings) > 0 {
			t.Errorf("inventory %t: the rendered node has findings:\n%s", withInventory, lines(got))
		}
	}
}

const (
	accountsConf  = "nats/conf.d/accounts.conf"
	clusterConf   = "nats/conf.d/cluster.conf"
	jetstreamConf = "nats/conf.d/jetstream.conf"
	tlsConf       = "nats/conf.d/tls.conf"
)

// seedOf and publicKey are what a careless hand would put in the wrong place.
func (l *lintLab) seedOf(name string) string {
	return strings.TrimSpace(string(must(os.ReadFile(l.file("secrets/" + name + ".nk")))(l.t)))
}

func (l *lintLab) publicKey(name string) string {
	l.t.Helper()
	for _, k := range keyFiles {
		if k.name == name {
			return must(publicOf([]byte(l.seedOf(name)), k.prefix))(l.t)
		}
	}
	l.t.Fatalf("there is no key %s", name)
	return ""
}

// planted is one fault in an otherwise good node, and the finding it must make.
type planted struct {
	name  string
	plant func(l *lintLab)
	level severity
	in    string // file of the finding, below the node's directory
	says  string // part of its line
}

func plantedFaults() []planted {
	edit := func(file, old, replacement string) func(*lintLab) {
		return func(l *lintLab) { l.edit(file, old, replacement) }
	}
	add := func(file, text string) func(*lintLab) { return func(l *lintLab) { l.add(file, text) } }
	chmod := func(file string, mode os.FileMode) func(*lintLab) {
		return func(l *lintLab) {
			if err := os.Chmod(filepath.Join(l.dir, file), mode); err != nil {
				l.t.Fatal(err)
			}
		}
	}
	critical, warning := severityCritical, severityWarning
	return []planted{
		{"server_name missing", edit(nodeConf, "server_name: \"n1\"\n", ""), critical, mainConf, "server_name is missing"},
		{"server_name of no node", edit(nodeConf, `server_name: "n1"`, `server_name: "n9"`), critical, nodeConf, `there is no node "n9"`},
		{"duration without quotes", add(localConf, "write_deadline: 1m\n"), critical, localConf, `quote it: write_deadline: "1m"`},
		{"sync_interval as a number", edit(jetstreamConf, "sync_interval: always", "sync_interval: 1m"), critical, jetstreamConf, "sync_interval: 1m is not always"},
		{"route password by variable", func(l *lintLab) {
			l.edit(secretsConf, "@10.0.0.2", "@10.0.0.2:6250\",\n\"nats-route://unibus-route:$ROUTE_PASSWORD@10.0.0.2")
		}, critical, secretsConf, "$VARIABLE inside a URL"},
		{"route password in another file", add(localConf, `X: ["nats-route://u:p4ss@10.0.0.2:6250"]`+"\n"), critical, localConf, "outside of conf.d/secrets.conf"},
		{"monitor on every address", edit(nodeConf, `http: "127.0.0.1:8222"`, `http: "0.0.0.0:8222"`), critical, nodeConf, "without a password"},
		{"monitor by port alone", edit(nodeConf, `http: "127.0.0.1:8222"`, `http_port: 8222`), critical, nodeConf, "without a password"},
		{"monitor over https on every address", add(localConf, "https: 8443\n"), critical, localConf, "without a password"},
		{"no monitor", edit(nodeConf, `http: "127.0.0.1:8222"`, ""), critical, mainConf, "there is no monitor"},
		{"profiler", add(localConf, "prof_port: 6060\n"), critical, localConf, "profiler"},
		{"placeholder in a setting", edit(clusterConf, `name: "unibus"`, `name: "CHANGE_ME"`), critical, clusterConf, `still the placeholder "CHANGE_ME"`},
		{"placeholder in an environment file", edit("membership.env", "UNIBUS_NODE=n1", "UNIBUS_NODE=<node>"), critical, "membership.env", `UNIBUS_NODE is still the placeholder`},
		{"seed in an environment file", func(l *lintLab) { l.add("membership.env", "KEY="+l.seedOf("ops")+"\n") }, critical, "membership.env", "secret seed"},
		{"route trusts the client CA", edit(nodeConf, "tls/cluster-ca.crt", "tls/client-ca.crt"), critical, nodeConf, "cluster.tls.ca_file is"},
		{"certificate by a relative path", edit(nodeConf, "/etc/unibus/tls/server.crt", "tls/server.crt"), critical, nodeConf, "relative to wherever"},
		{"client CA in place of the cluster CA", func(l *lintLab) { l.copyFile(l.file("pki/client-ca.crt"), "tls/cluster-ca.crt") }, critical, "tls/cluster-ca.crt", "must never share one"},
		{"leaf of the other CA", func(l *lintLab) {
			l.copyFile(l.file("pki/n1/server.crt"), "tls/route.crt")
			l.copyFile(l.file("pki/n1/server.key"), "tls/route.key")
		}, critical, "tls/route.crt", "signed by the client CA"},
		{"certificate of another node", func(l *lintLab) {
			l.copyFile(l.file("pki/n2/server.crt"), "tls/server.crt")
			l.copyFile(l.file("pki/n2/server.key"), "tls/server.key")
		}, critical, "tls/server.crt", "belongs to node n2"},
		{"certificate does not name the node's address", func(l *lintLab) {
			write(l.t, l.file("nodes.env"), strings.Replace(lintInventory, "198.18.0.1", "198.18.0.77", 1), 0o644)
			l.t.Cleanup(func() { write(l.t, l.file("nodes.env"), lintInventory, 0o644) })
		}, critical, "tls/server.crt", "does not name 198.18.0.77"},
		{"expired", func(l *lintLab) { l.now = l.now.AddDate(3, 0, 0) }, critical, "tls/server.crt", "has expired"},
		{"about to expire", func(l *lintLab) {
			cert := must(readCert(filepath.Join(l.dir, "tls/server.crt")))(l.t)
			l.now = cert.NotAfter.Add(-20 * day)
		}, warning, "tls/server.crt", "expires in"},
		{"seed others can read", chmod("creds/issuer.nk", 0o644), critical, "creds/issuer.nk", "others can read"},
		{"seed the group can read", chmod("creds/xkey.nk", 0o640), critical, "creds/xkey.nk", "others can read"},
		{"TLS key others can read", chmod("tls/route.key", 0o644), critical, "tls/route.key", "readable by others"},
		{"secrets.conf others can read", chmod(secretsConf, 0o644), critical, secretsConf, "others can read"},
		{"configuration others can write", chmod(accountsConf, 0o666), critical, accountsConf, "others can change it"},
		{"seed missing", func(l *lintLab) { _ = os.Remove(filepath.Join(l.dir, "creds/issuer.nk")) }, critical, "creds/issuer.nk", "is missing"},
		{"seed of another kind", func(l *lintLab) { l.copyFile(l.file("secrets/ops.nk"), "creds/issuer.nk") }, critical, "creds/issuer.nk", "does not hold one account seed"},
		{"seed of another user", func(l *lintLab) { l.copyFile(l.file("secrets/ops.nk"), "creds/membership-ctrl.nk") }, critical, accountsConf, "may publish anything"},
		{"service in the wrong account", func(l *lintLab) { l.copyFile(l.file("secrets/authcallout-bus.nk"), "creds/membership-ctrl.nk") }, critical, "creds/membership-ctrl.nk", "is no user of account CTRL"},
		{"break glass on a node", func(l *lintLab) { write(l.t, filepath.Join(l.dir, "creds/ops.nk"), l.seedOf("ops"), 0o600) }, critical, "creds/ops.nk", "break glass"},
		{"leafnodes", add(localConf, "leafnodes { port: 7422 }\n"), critical, localConf, "leafnodes is set"},
		{"websocket", add(localConf, "websocket { port: 8080, no_tls: true }\n"), critical, localConf, "websocket is set"},
		{"mqtt", add(localConf, "mqtt { port: 1883 }\n"), critical, localConf, "mqtt is set"},
		{"gateway", add(localConf, "gateway { name: A, port: 7222 }\n"), critical, localConf, "gateway is set"},
		{"no_auth_user", add(localConf, "no_auth_user: guest\n"), critical, localConf, "no_auth_user is set"},
		{"user past the callout", edit(accountsConf, "  auth_callout {", "  token: s3same\n  auth_callout {"), critical, accountsConf, "authorization.token is set"},
		{"callout replaced by a later block", add(localConf, "authorization { timeout: 10 }\n"), critical, localConf, "there is no auth_callout"},
		{"issuer is a user key", func(l *lintLab) {
			l.edit(accountsConf, `"`+l.publicKey("issuer")+`"`, `"`+l.publicKey("sys")+`"`)
		}, critical, accountsConf, "auth_callout.issuer is not"},
		{"issuer is the seed", func(l *lintLab) {
			l.edit(accountsConf, `"`+l.publicKey("issuer")+`"`, `"`+l.seedOf("issuer")+`"`)
		}, critical, accountsConf, "holds a secret seed"},
		{"issuer of another cluster", func(l *lintLab) {
			l.edit(accountsConf, `"`+l.publicKey("issuer")+`"`, `"`+must(must(nkeys.CreateAccount())(l.t).PublicKey())(l.t)+`"`)
		}, critical, accountsConf, "auth_callout.issuer is not the public key of"},
		{"no xkey", func(l *lintLab) {
			l.edit(accountsConf, `xkey:    "`+l.publicKey("xkey")+`"`, "")
		}, critical, accountsConf, "auth_callout.xkey is not"},
		{"callout in another account", edit(accountsConf, "    account: AUTH\n", "    account: BUS\n"), critical, accountsConf, "auth_callout.account is not AUTH"},
		{"fewer auth_users than services", func(l *lintLab) {
			l.edit(accountsConf, `      "`+l.publicKey("sys")+`"`, "")
		}, critical, accountsConf, "lists 6 keys"},
		{"static user missing in auth_users", func(l *lintLab) {
			l.edit(accountsConf, `      "`+l.publicKey("sys")+`"`, "")
		}, critical, accountsConf, "is in no auth_users"},
		{"auth_user of no account", func(l *lintLab) {
			l.edit(accountsConf, `      { nkey: "`+l.publicKey("sys")+`" }`, "")
		}, critical, accountsConf, "which is in no account"},
		{"allowed_accounts too wide", edit(accountsConf, "[BUS, AUTH]", "[BUS, AUTH, SYS]"), critical, accountsConf, "allowed_accounts is not"},
		{"static user by password", edit(accountsConf, "      { nkey: ", "      { user: root, password: toor }\n      { nkey: "), critical, accountsConf, "no valid nkey"},
		{"permissions emptied", edit(accountsConf, `publish: ["notice.*.>"]`, `publish: []`), critical, accountsConf, "the user authcallout-bus in BUS may publish anything"},
		{"permissions allow all", edit(accountsConf, `publish: ["notice.*.>"]`, `publish: ">"`), critical, accountsConf, "the user authcallout-bus in BUS may publish anything"},
		{"system_account missing", edit(accountsConf, "system_account: SYS\n", ""), critical, mainConf, "system_account is not SYS"},
		{"authorization timeout", edit(accountsConf, "\n  timeout: 10", "\n  timeout: 2"), critical, accountsConf, "authorization.timeout: 2 is shorter"},
		{"tls timeout", edit(tlsConf, "\ntimeout: 10", "\ntimeout: 2"), critical, tlsConf, "tls.timeout: 2 is shorter"},
		{"old TLS", edit(tlsConf, `"1.2"`, `"1.1"`), critical, tlsConf, "below TLS 1.2"},
		{"handshake_first", add(tlsConf, "handshake_first: true\n"), critical, tlsConf, "a default client cannot connect"},
		{"sync_interval", edit(jetstreamConf, "sync_interval: always", "sync_interval: 2s"), critical, jetstreamConf, "sync_interval: 2s is not always"},
		{"strict", edit(jetstreamConf, "strict: true", "strict: false"), critical, jetstreamConf, "strict: false is not true"},
		{"store_dir empty", edit(mainConf, "store_dir: $JETSTREAM_DIR", `store_dir: ""`), critical, mainConf, "store_dir is empty"},
		{"no max_file_store", edit(jetstreamConf, "max_file_store: ", "#"), critical, mainConf, "max_file_store is not set"},
		{"caps fill the store", edit(jetstreamConf, "max_file_store:   16GB", "max_file_store: 15GB"), critical, accountsConf, "of max_file_store on each node"},
		{"account without a cap", edit(accountsConf, "jetstream: { max_file: 27GB, max_mem: 64MB, max_bytes_required: true }", "jetstream: enabled"), critical, accountsConf, "account BUS may fill the whole store"},
		{"pool_size", edit(clusterConf, "pool_size: -1", "pool_size: 3"), critical, clusterConf, "pool_size: 3 is not -1"},
		{"no_advertise", edit(clusterConf, "no_advertise: true", ""), critical, mainConf, "no_advertise is not true"},
		{"another cluster's name", edit(clusterConf, `name: "unibus"`, `name: "other"`), critical, clusterConf, `cluster.name is "other"`},
		{"route to itself", edit(secretsConf, "@10.0.0.2:6250", "@10.0.0.1:6250"), critical, secretsConf, "lists this node itself"},
		{"route missing", edit(secretsConf, "@10.0.0.2:6250", "@10.0.0.3:6250"), critical, secretsConf, "does not name n2"},
		{"route to a stranger", edit(secretsConf, "@10.0.0.2:6250", "@10.0.0.9:6250"), critical, secretsConf, "which is no node"},
		{"wrong port", edit(nodeConf, "0.0.0.0:4250", "0.0.0.0:4222"), critical, nodeConf, "says port 4250"},
		{"include missing", func(l *lintLab) { _ = os.Remove(filepath.Join(l.dir, localConf)) }, critical, mainConf, "does not exist"},
		{"variable missing", edit(nodeConf, "CLUSTER_CA:", "CLUSTERCA:"), critical, mainConf, "nothing defines $CLUSTER_CA"},
		{"brace missing", add(localConf, "tls {\n"), critical, localConf, "never closed"},
		{"block replaced", add(localConf, "jetstream { store_dir: /x, sync_interval: always, strict: true, max_file_store: 16GB }\n"), warning, localConf, "replaces the whole one at"},
		{"edited by hand", add(tlsConf, "# mine\n"), warning, tlsConf, "the next render takes that back"},
		{"trace", add(localConf, "trace: true\n"), warning, localConf, "what users say"},
	}
}

func TestLintNamesEachPlantedFault(t *testing.T) {
	lab := newLintLab(t)
	for _, p := range plantedFaults() {
		t.Run(p.name, func(t *testing.T) {
			l := lab.render(t)
			p.plant(l)
			got := l.check(true)
			if got.severity() != p.level {
				t.Errorf("severity %s, want %s", got.severity(), p.level)
			}
			for _, f := range got.findings {
				if f.File == filepath.Join(l.dir, p.in) && f.Severity == p.level && strings.Contains(f.Problem+"; fix: "+f.Fix, p.says) {
					if strings.Contains(f.String(), "\n") || f.Fix == "" {
						t.Errorf("not one line with a fix: %q", f)
					}
					return
				}
			}
			t.Errorf("no finding in %s says %q; findings:\n%s", p.in, p.says, lines(got))
		})
	}
}

// One mistake makes one line, also where several rules notice it.
func TestLintNamesAFaultOnce(t *testing.T) {
	lab := newLintLab(t)
	for _, p := range []func(l *lintLab){
		func(l *lintLab) { l.edit(nodeConf, "server_name: \"n1\"\n", "") },
		func(l *lintLab) { l.edit(nodeConf, `server_name: "n1"`, `server_name: "n9"`) },
		func(l *lintLab) { l.edit(jetstreamConf, "sync_interval: always", "sync_interval: 1m") },
		func(l *lintLab) { l.edit(clusterConf, `name: "unibus"`, `name: "CHANGE_ME"`) },
		func(l *lintLab) {
			l.edit(accountsConf, `"`+l.publicKey("issuer")+`"`, `"`+l.seedOf("issuer")+`"`)
		},
		func(l *lintLab) { l.edit(nodeConf, `http: "127.0.0.1:8222"`, `http: "0.0.0.0:8222"`) },
		func(l *lintLab) { l.edit(nodeConf, "tls/cluster-ca.crt", "tls/client-ca.crt") },
		func(l *lintLab) { l.copyFile(l.file("pki/client-ca.crt"), "tls/cluster-ca.crt") },
	} {
		l := lab.render(t)
		p(l)
		if got := l.check(true); len(got.findings) != 1 {
			t.Errorf("findings: %d, want 1\n%s", len(got.findings), lines(got))
		}
	}
}

// Without an inventory the certificates are held against the configuration's
// own addresses.
func TestLintWithoutInventory(t *testing.T) {
	lab := newLintLab(t)
	for _, p := range []planted{
		{"listen", func(l *lintLab) { l.edit(nodeConf, `listen: "0.0.0.0:4250"`, `listen: "198.18.0.77:4250"`) }, severityCritical, nodeConf, "does not name"},
		{"advertise", func(l *lintLab) { l.add(localConf, "client_advertise: \"bus.acme.test:4250\"\n") }, severityCritical, localConf, "does not name"},
		{"certificate", func(l *lintLab) { l.edit(nodeConf, `server_name: "n1"`, `server_name: "n2"`) }, severityCritical, "tls/server.crt", "belongs to node n1"},
		{"routes", func(l *lintLab) { l.edit(secretsConf, "@10.0.0.2:6250", "@10.0.0.3:6250") }, severityCritical, secretsConf, "names 1 other nodes"},
		{"itself", func(l *lintLab) { l.edit(secretsConf, "@10.0.0.2:6250", "@10.0.0.1:6250") }, severityCritical, secretsConf, "lists this node itself"},
	} {
		t.Run(p.name, func(t *testing.T) {
			l := lab.render(t)
			p.plant(l)
			if got := l.check(false); !strings.Contains(lines(got), p.says) || got.severity() != p.level {
				t.Errorf("nothing says %q:\n%s", p.says, lines(got))
			}
		})
	}
}

func TestLintAgainstTheRunningConfiguration(t *testing.T) {
	lab := newLintLab(t)
	old := lab.render(t)
	edit := func(file, from, to string) func(*lintLab) {
		return func(l *lintLab) { l.edit(file, from, to) }
	}
	for _, c := range []struct {
		name  string
		plant func(l *lintLab)
		says  string // empty: no finding
	}{
		{"nothing", func(*lintLab) {}, ""},
		{"a comment", func(l *lintLab) { l.add(localConf, "# hello\n") }, ""},
		{"the same number spelled otherwise", edit(mainConf, "max_payload:       1MB", "max_payload: 1048576"), ""},
		{"a limit", edit(mainConf, "max_connections:   10000", "max_connections: 20000"), "max_connections was changed: a reload, whatever it changes, closes"},
		{"log level", func(l *lintLab) { l.add(localConf, "debug: true\n") }, "debug was added: a reload, whatever"},
		{"a new certificate", func(l *lintLab) { l.copyFile(l.file("pki/n1/api.crt"), "tls/server.crt") }, "tls/server.crt was changed: a reload, whatever"},
		{"a larger store", edit(jetstreamConf, "max_file_store:   16GB", "max_file_store: 17GB"), "max_file_store was changed: a reload, whatever"},
		{"a smaller store", edit(jetstreamConf, "max_file_store:   16GB", "max_file_store: 15900MB"), "jetstream.max_file_store was changed: a reload is refused"},
		{"store_dir", edit(mainConf, "store_dir: $JETSTREAM_DIR", `store_dir: "/elsewhere"`), "jetstream.store_dir was changed: a reload is refused"},
		{"unique_tag", func(l *lintLab) { l.add(jetstreamConf, "unique_tag: az\n") }, "jetstream.unique_tag was added: a reload is refused"},
		{"lame duck", edit(mainConf, `lame_duck_duration:     "30s"`, `lame_duck_duration: "40s"`), "lame_duck_duration was changed: a reload is refused"},
		{"listen", edit(nodeConf, `0.0.0.0:4250`, `198.18.0.1:4250`), "listen was changed: a reload is refused"},
		{"route listen", edit(nodeConf, `10.0.0.1:6250`, `0.0.0.0:6250`), "cluster.listen was changed: a reload is refused"},
		{"cluster name", edit(clusterConf, `name: "unibus"`, `name: "other"`), "after a reload the other nodes refuse this one"},
		{"monitor", edit(nodeConf, `127.0.0.1:8222`, `127.0.0.1:8223`), "http was changed: a reload is refused"},
		{"callout", edit(accountsConf, "    issuer: ", "    users: []\n    issuer: "), "authorization.auth_callout.users was added: a reload is refused"},
		{"a permission", edit(accountsConf, `publish: ["notice.*.>"]`, `publish: ["notice.*.>", "x"]`), "closes the connections of all bus users"},
		{"a new account", edit(accountsConf, "  BUS {", "  OTHER {}\n  BUS {"), "accounts.OTHER was added: a reload, whatever"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := lab.render(t)
			c.plant(l)
			lint := &linter{dir: l.dir, now: l.now, getenv: func(string) string { return "" }}
			if !lint.read() {
				t.Fatalf("cannot be read:\n%s", lines(lint))
			}
			lint.against(old.dir)
			got := lines(lint)
			switch {
			case c.says == "" && got != "":
				t.Errorf("findings about a harmless change:\n%s", got)
			case !strings.Contains(got, c.says) || c.says != "" && lint.severity() != severityWarning:
				t.Errorf("nothing warns %q:\n%s", c.says, got)
			}
		})
	}
}

func TestReadConfUnderstandsTheLanguage(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "inner.conf"), "INNER = 7\n", 0o600)
	path := filepath.Join(dir, "a.conf")
	write(t, path, `# comment
a: 1, b = "x\ty"; c 'raw\n'   // comment
include inner.conf
D: [1 "two", three
  # comment in a list
  $INNER ]
e { f: { g: $a } h { } }
"quoted key": yes
url: nats://h:1/#no
size: 4KB; big: 2M
twice: 1
TWICE: 2
env: $FROM_ENV
hash: $2a$11$abc
`, 0o600)
	c, err := readConf(path, func(name string) string {
		return map[string]string{"FROM_ENV": "'12'"}[name]
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct {
		path []string
		text string
		kind confKind
		line int
	}{
		{[]string{"a"}, "1", confNumber, 2},
		{[]string{"b"}, "x\ty", confString, 2},
		{[]string{"c"}, `raw\n`, confString, 2},
		{[]string{"INNER"}, "7", confNumber, 1},
		{[]string{"e", "f", "g"}, "1", confNumber, 2},
		{[]string{"quoted key"}, "yes", confBool, 8},
		{[]string{"url"}, "nats://h:1/#no", confString, 9},
		{[]string{"twice"}, "2", confNumber, 12},
		{[]string{"hash"}, "$2a$11$abc", confString, 14},
	} {
		v := c.root.at(want.path...)
		if v == nil || v.text != want.text || v.kind != want.kind || v.pos.line != want.line {
			t.Errorf("%v = %+v, want %q of kind %d on line %d", want.path, v, want.text, want.kind, want.line)
		}
	}
	if got := c.root.at("D").strings(); strings.Join(got, " ") != "1 two three 7" {
		t.Errorf("the list is %q", got)
	}
	for key, want := range map[string]float64{"size": 4096, "big": 2e6, "env": 12} {
		if n, _ := c.root.at(key).number(); n != want {
			t.Errorf("%s = %v, want %v", key, n, want)
		}
	}
	for _, broken := range []string{"a {", "a [1", `a "x`, "a 'x", "a: }", `a "\q"`, "a: $NOWHERE", "include nowhere", "include broken.conf", ": 1"} {
		path := filepath.Join(dir, "broken.conf")
		write(t, path, broken+"\n", 0o600)
		if c, err := readConf(path, func(string) string { return "" }); err == nil {
			t.Errorf("%q was read as %+v", broken, c.root)
		}
	}
}

func FuzzReadConf(f *testing.F) {
	for _, seed := range []string{"a: 1", "a { b [1, 'x'] }", `x "\x41"`, "include y", "{a: {}}", "a $b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(t.TempDir(), "a.conf")
		write(t, path, text, 0o600)
		if c, err := readConf(path, func(string) string { return "" }); err == nil && c.root == nil {
			t.Error("neither a value nor an error")
		}
	})
}
