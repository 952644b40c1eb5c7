package test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/test/cluster"
)

// node1 edits the configuration of node 1 of a cluster that was rendered.
type node1 struct {
	t *testing.T
	*cluster.Cluster
}

func (n node1) file(name string) string {
	return filepath.Join(n.Etc(1), "nats", filepath.FromSlash(name))
}

// edit replaces old by replacement in a file until the test ends. Without old
// the replacement is added.
func (n node1) edit(name, old, replacement string) {
	n.t.Helper()
	before, err := os.ReadFile(n.file(name))
	if err != nil {
		n.t.Fatal(err)
	}
	if old != "" && bytes.Count(before, []byte(old)) != 1 {
		n.t.Fatalf("%q does not stand once in %s:\n%s", old, name, before)
	}
	after := strings.Replace(string(before), old, replacement, 1)
	if old == "" {
		after = string(before) + replacement + "\n"
	}
	n.overwrite(name, []byte(after))
	n.t.Cleanup(func() { n.overwrite(name, before) })
}

func (n node1) overwrite(name string, data []byte) {
	n.t.Helper()
	if err := os.WriteFile(n.file(name), data, 0o600); err != nil { // the mode of an existing file stays
		n.t.Fatal(err)
	}
}

func (n node1) check(args ...string) cluster.Result {
	n.t.Helper()
	return n.CLI(append([]string{"config", "check", "--dir", n.Etc(1), "--inventory", n.Inventory()}, args...)...)
}

// The faults that nats-server -t lets pass, or describes in its own words, are
// one line with the file and the fix, beside the stock server's own verdict.
func TestConfigCheckBesideTheStockServer(t *testing.T) {
	c := cluster.Start(t, cluster.Options{NoWait: true, Start: []int{}})
	if r := c.CLI("config", "check", "--dir", c.Etc(1), "--inventory", c.Inventory()); r.Code != 0 || !strings.HasPrefix(r.Stdout, "CONFIG OK") {
		t.Fatalf("a rendered node: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	p := c.Ports[0]
	for _, fault := range []struct {
		name, file, old, replacement string
		want                         string // of the one line
		passes                       bool   // with nats-server -t, and so would be found out when it is too late
	}{
		{"server_name", "node.conf", `server_name: "n1"`, "", "server_name is missing", true},
		{"duration", "conf.d/local.conf", "", "write_deadline: 1m", `quote it: write_deadline: "1m"`, false},
		{"password", "conf.d/secrets.conf", "@127.0.0.1:" + fmt.Sprint(c.Ports[1].Route), "x$ROUTE_PASSWORD@127.0.0.1:" + fmt.Sprint(c.Ports[1].Route), "$VARIABLE inside a URL", true},
		{"monitor", "node.conf", fmt.Sprintf("127.0.0.1:%d", p.Monitor), fmt.Sprintf("0.0.0.0:%d", p.Monitor), "without a password", true},
		{"placeholder", "conf.d/cluster.conf", `"unibus"`, `"CHANGE_ME"`, "placeholder", true},
		{"CA", "node.conf", "cluster-ca.crt", "client-ca.crt", "cluster.tls.ca_file", true},
		{"include", "nats-server.conf", `include "conf.d/local.conf"`, `include "conf.d/locals.conf"`, "does not exist", false},
		{"syntax", "conf.d/local.conf", "", "max_connections: [", "never closed", false},
		{"spelling", "conf.d/local.conf", "", "max_conections: 5", `nats-server refuses it: unknown field "max_conections"`, false},
		{"type", "conf.d/local.conf", "", "max_connections: many", "nats-server refuses it: ", false},
	} {
		t.Run(fault.name, func(t *testing.T) {
			node1{t, c}.edit(fault.file, fault.old, fault.replacement)
			err := exec.CommandContext(t.Context(), filepath.Join(c.Bin, "nats-server"), "-t", "-c", node1{t, c}.file("nats-server.conf")).Run()
			if passes := err == nil; passes != fault.passes {
				t.Errorf("nats-server -t passes=%t, want %t", passes, fault.passes)
			}
			r := node1{t, c}.check()
			lines := strings.Split(strings.TrimSpace(r.Stdout), "\n")
			if r.Code != 2 || len(lines) != 2 {
				t.Fatalf("exit %d, want 2 with one finding and one summary\n%s%s", r.Code, r.Stdout, r.Stderr)
			}
			if !strings.Contains(lines[0], fault.want) || !strings.HasPrefix(lines[0], filepath.Join(c.Etc(1), "nats")) || !strings.Contains(lines[0], "; fix: ") {
				t.Errorf("the finding is %q, want the file and %q", lines[0], fault.want)
			}
		})
	}
}

// A tree rendered for another place is tried with the certificates it has.
func TestConfigCheckOfAStagedNode(t *testing.T) {
	c := cluster.Start(t, cluster.Options{NoWait: true, Start: []int{}})
	staged := filepath.Join(t.TempDir(), "n1")
	if r := c.CLI("config", "render", "--inventory", c.Inventory(), "--secrets", c.Secrets(), "--pki", c.PKI(), "--node", "n1",
		"--out", staged, "--etc", "/etc/unibus"); r.Code != 0 {
		t.Fatalf("render: %s", r.Stderr)
	}
	if r := c.CLI("config", "check", "--dir", staged, "--inventory", c.Inventory()); r.Code != 0 {
		t.Errorf("exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	other, err := os.ReadFile(filepath.Join(c.Etc(2), "tls", "route.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(staged, "tls", "route.key"), other, 0o600); err != nil {
		t.Fatal(err)
	}
	r := c.CLI("config", "check", "--dir", staged, "--inventory", c.Inventory())
	if r.Code != 2 || !strings.Contains(r.Stdout, "route.key: does not belong to") {
		t.Errorf("a key of another node: exit %d\n%s", r.Code, r.Stdout)
	}
}

// What --against says about a reload is what the stock server does.
func TestConfigCheckForetellsTheReload(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Options{NoWait: true})
	cluster.WaitFor(t, 30*time.Second, "the server of node 1", func() error { return c.NATSHealthy(t.Context(), 1) })
	old := filepath.Join(t.TempDir(), "running")
	if err := os.CopyFS(old, os.DirFS(c.Etc(1))); err != nil {
		t.Fatal(err)
	}
	p := c.Ports[0]
	for _, change := range []struct {
		name, file, old, replacement string
		refused                      bool
	}{
		{"a limit", "nats-server.conf", "max_connections:   10000", "max_connections: 20000", false},
		{"log level", "conf.d/local.conf", "", "debug: true", false},
		{"a tag", "conf.d/local.conf", "", "server_tags: [a]", false},
		{"ping", "nats-server.conf", `ping_interval: "20s"`, `ping_interval: "25s"`, false},
		{"a permission", "conf.d/accounts.conf", `publish: ["notice.*.>"]`, `publish: ["notice.*.>", "x"]`, false},
		{"an account", "conf.d/accounts.conf", "  BUS {", "  OTHER {}\n  BUS {", false},
		{"authorization timeout", "conf.d/accounts.conf", "\n  timeout: 10", "\n  timeout: 12", false},
		{"TLS timeout", "conf.d/tls.conf", "\ntimeout: 10", "\ntimeout: 12", false},
		{"smaller store", "conf.d/jetstream.conf", "max_memory_store: 256MB", "max_memory_store: 128MB", true},
		{"store_dir", "nats-server.conf", "$JETSTREAM_DIR", `"/nowhere"`, true},
		{"sync_interval", "conf.d/jetstream.conf", "sync_interval: always", `sync_interval: "2m"`, true},
		{"strict", "conf.d/jetstream.conf", "strict: true", "strict: false", true},
		{"unique_tag", "conf.d/jetstream.conf", "strict: true", "strict: true\nunique_tag: az", true},
		{"lame duck", "nats-server.conf", `lame_duck_duration:     "30s"`, `lame_duck_duration: "40s"`, true},
		{"max_subscriptions", "nats-server.conf", "max_subscriptions: 4096", "max_subscriptions: 4097", true},
		{"listen", "node.conf", fmt.Sprintf("127.0.0.1:%d\"\n\n# The mon", p.NATS), fmt.Sprintf("127.0.0.1:%d\"\n\n# The mon", p.API), true},
		{"monitor", "node.conf", fmt.Sprintf("127.0.0.1:%d", p.Monitor), fmt.Sprintf("127.0.0.1:%d", p.API), true},
		{"route listen", "node.conf", fmt.Sprintf("127.0.0.1:%d", p.Route), fmt.Sprintf("127.0.0.1:%d", p.API), true},
		{"pool_size", "conf.d/cluster.conf", "pool_size: -1", "pool_size: 2", false},
		{"callout", "conf.d/accounts.conf", "allowed_accounts: [BUS, AUTH]", "allowed_accounts: [BUS, AUTH, CTRL]", true},
		{"server_name", "node.conf", `server_name: "n1"`, `server_name: "n4"`, true},
		{"larger store", "conf.d/jetstream.conf", "max_file_store:   16GB", "max_file_store: 17GB", false}, // last: there is no way back
	} {
		t.Run(change.name, func(t *testing.T) {
			node1{t, c}.edit(change.file, change.old, change.replacement)
			r := node1{t, c}.check("--against", old)
			if foretold := strings.Contains(r.Stdout, "a reload is refused as a whole"); foretold != change.refused {
				t.Errorf("foretold refused=%t, want %t\n%s", foretold, change.refused, r.Stdout)
			}
			if refused := reload(t, c, 1); refused != change.refused {
				t.Errorf("the server refused=%t, want %t", refused, change.refused)
			}
		})
		reload(t, c, 1) // back to what it was
	}
}

// reload makes node i's server read its configuration again and reports
// whether it refused.
func reload(t *testing.T, c *cluster.Cluster, i int) (refused bool) {
	t.Helper()
	before, err := os.ReadFile(c.LogFile(i, cluster.NATS))
	if err != nil {
		t.Fatal(err)
	}
	c.Reload(i, cluster.NATS)
	cluster.WaitFor(t, 10*time.Second, "the reload", func() error {
		log, err := os.ReadFile(c.LogFile(i, cluster.NATS))
		if err != nil {
			return err
		}
		said := string(log[len(before):])
		refused = strings.Contains(said, "Failed to reload server configuration")
		if !refused && !strings.Contains(said, "Reloaded server configuration") {
			return errors.New("the log does not say yet")
		}
		return nil
	})
	return refused
}

// Every reload closes what the auth callout admitted on that server, also one
// that changes nothing: this is what --against warns of. Nobody else notices.
func TestEveryReloadDropsBusUsers(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	running := filepath.Join(t.TempDir(), "running")
	if err := os.CopyFS(running, os.DirFS(w.Etc(1))); err != nil {
		t.Fatal(err)
	}
	connect := func(node int) *nats.Conn {
		nc, err := w.Dial(node, append(w.admin.options(w.CA()), nats.ReconnectWait(100*time.Millisecond), nats.MaxReconnects(-1), nats.IgnoreAuthErrorAbort())...)
		if err != nil {
			t.Fatal(err)
		}
		return nc
	}
	here, elsewhere := connect(1), connect(2)
	for _, change := range []struct{ name, file, old, replacement string }{
		{"nothing", "conf.d/local.conf", "", "# nothing"},
		{"a limit", "nats-server.conf", "max_connections:   10000", "max_connections: 20000"},
		{"an account", "conf.d/accounts.conf", "  BUS {", "  OTHER {}\n  BUS {"},
	} {
		n := node1{t, w.Cluster}
		n.edit(change.file, change.old, change.replacement)
		r := n.check("--against", running)
		if foretold := strings.Contains(r.Stdout, "closes the connections of all bus users"); foretold != (change.name != "nothing") {
			t.Errorf("%s: foretold=%t\n%s", change.name, foretold, r.Stdout)
		}
		before := here.Stats().Reconnects
		if reload(t, w.Cluster, 1) {
			t.Fatalf("%s: the reload was refused", change.name)
		}
		cluster.WaitFor(t, 20*time.Second, "the connection to be closed and to come back", func() error {
			if here.Stats().Reconnects == before || !here.IsConnected() {
				return fmt.Errorf("%d reconnects, %s", here.Stats().Reconnects-before, here.Status())
			}
			return nil
		})
	}
	if err := elsewhere.FlushTimeout(5 * time.Second); err != nil || elsewhere.Stats().Reconnects > 0 {
		t.Errorf("the connection to another node: %d reconnects, %v", elsewhere.Stats().Reconnects, err)
	}
}
