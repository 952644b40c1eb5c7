package test

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"unibus.internal/test/cluster"
)

// doctorReport is what doctor --json says.
type doctorReport struct {
	Code    int `json:"code"`
	Elapsed int `json:"elapsed_ms"`
	Checks  []struct{ Status, Node, Check, Found, Proves, Next string }
}

// visit runs the doctor and holds it to its bound.
func visit(t *testing.T, c *cluster.Cluster, args ...string) doctorReport {
	t.Helper()
	r := c.CLI(append([]string{"doctor", "--json"}, args...)...)
	var d doctorReport
	if err := json.Unmarshal([]byte(r.Stdout), &d); err != nil {
		t.Fatalf("doctor: exit %d: %v\n%s%s", r.Code, err, r.Stdout, r.Stderr)
	}
	if d.Code != r.Code {
		t.Errorf("exit %d, and the report says %d", r.Code, d.Code)
	}
	if d.Elapsed > 20_000 {
		t.Errorf("took %d ms", d.Elapsed)
	}
	return d
}

// names reports whether a check of a node is not green and says so in these words.
func (d doctorReport) names(node, check, words string) bool {
	for _, s := range d.Checks {
		if s.Node == node && s.Check == check && s.Status != "ok" && strings.Contains(s.Found, words) && s.Proves != "" && s.Next != "" {
			return true
		}
	}
	return false
}

func (d doctorReport) bad() (out []string) {
	for _, s := range d.Checks {
		if s.Status != "ok" {
			out = append(out, strings.Join([]string{s.Status, s.Node, s.Check, s.Found}, " "))
		}
	}
	return out
}

// TestDoctor finds a healthy cluster healthy, twice with the same probe users,
// and then names each fault planted in it.
func TestDoctor(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Options{Authcallout: true, Membership: true})
	usual := []string{"--inventory", c.Inventory(), "--sys-seed", c.Seed("sys"), "--node", "n1", "--etc", c.Etc(1)}
	// Before there is an admin it must not make the first user, which is theirs.
	if early := visit(t, c, usual...); !early.names("cluster", "probe", "bootstrap") {
		t.Errorf("before the first admin: %s", strings.Join(early.bad(), "\n"))
	}
	key := struct {
		NKey string `json:"nkey"`
	}{}
	if err := json.Unmarshal([]byte(c.CLI("identity", "new", "--json", "--out", filepath.Join(c.Dir, "admin.nk")).Stdout), &key); err != nil {
		t.Fatal(err)
	}
	if r := c.CLI("--direct", "bootstrap", "--handle", "root", "--sign-pub", key.NKey); r.Code != 0 {
		t.Fatalf("bootstrap after a visit: %s", r.Stderr)
	}
	var green doctorReport
	for range 2 {
		if green = visit(t, c, usual...); green.Code != 0 {
			t.Fatalf("a healthy cluster: %d\n%s", green.Code, strings.Join(green.bad(), "\n"))
		}
	}
	t.Logf("%d checks in %d ms", len(green.Checks), green.Elapsed)
	users := c.CLI("--direct", "user", "list", "--json")
	if n := strings.Count(users.Stdout, `"handle": "doctor-`); n != 3 {
		t.Errorf("%d probe users after two runs, want 3\n%s", n, users.Stdout)
	}
	handle := ""
	for f := range strings.FieldsSeq(users.Stdout) {
		if h := strings.Trim(f, `",`); strings.HasPrefix(h, "doctor-") && strings.HasSuffix(h, "-in") {
			handle = h
		}
	}
	room, out := strings.TrimSuffix(handle, "-in"), strings.TrimSuffix(handle, "in")+"out"
	direct := func(args ...string) func(*testing.T) {
		return func(t *testing.T) {
			t.Helper()
			if r := c.CLI(append([]string{"--direct", "--yes"}, args...)...); r.Code != 0 {
				t.Fatalf("%v: %d %s", args, r.Code, r.Stderr)
			}
		}
	}
	js, err := jetstream.New(c.Ops())
	if err != nil {
		t.Fatal(err)
	}
	replicas := func(n int) func(*testing.T) {
		return func(t *testing.T) {
			t.Helper()
			s, err := js.Stream(t.Context(), "KV_UNIBUS_room_keys")
			if err != nil {
				t.Fatal(err)
			}
			cfg := s.CachedInfo().Config
			cfg.Replicas = n
			if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
				t.Fatal(err)
			}
		}
	}
	with := func(flag, value string) []string {
		args := append([]string(nil), usual...)
		for i, a := range args {
			if a == flag {
				args[i+1] = value
				return args
			}
		}
		return append(args, flag, value)
	}
	file := func(name, content string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	stale := filepath.Join(t.TempDir(), "etc")
	if err := os.CopyFS(stale, os.DirFS(c.Etc(1))); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(stale, "nats", "conf.d", "local.conf"), []byte("max_subscriptions: 12345\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	inventory, err := os.ReadFile(c.Inventory())
	if err != nil {
		t.Fatal(err)
	}
	swapped := strings.NewReplacer(`"n2 `, `"n3 `, `"n3 `, `"n2 `).Replace(string(inventory))
	routeIsClient := strings.NewReplacer("route="+strconv.Itoa(c.Ports[1].Route), "route="+strconv.Itoa(plainListener(t))).Replace(string(inventory))
	healthy := func(t *testing.T) { c.In(t).WaitHealthy(time.Minute) }
	for _, f := range []struct {
		name               string
		args               []string
		plant, mend        func(*testing.T)
		node, check, words string
	}{
		{"wrong CA given", with("--ca", filepath.Join(c.PKI(), "cluster-ca.crt")), nil, nil, "n1", "nats.tls", "not good for --ca"},
		{"wrong ops seed", with("--ops-seed", c.Seed("sys")), nil, nil, "cluster", "store", "cannot be proven current"},
		{"wrong sys seed", with("--sys-seed", c.Seed("ops")), nil, nil, "n2", "listeners", "does not tell"},
		{"nodes swapped", with("--inventory", file("nodes.env", swapped)), nil, nil, "n2", "nats.tls", "another server"},
		{"route port without TLS", with("--inventory", file("nodes.env", routeIsClient)), nil, nil, "n2", "route.tls", "in clear"},
		{"stale configuration", with("--etc", stale), nil, nil, "n1", "config", "another configuration"},
		{"configuration of another node", with("--etc", c.Etc(2)), nil, nil, "n1", "config", "another configuration"},
		{"probe room not writable", usual, direct("room", "add", room, handle, "--role", "reader"), direct("room", "add", room, handle, "--role", "owner"), "n3", "allow.room", "refused to publish"},
		{"a right too many", usual, direct("room", "add", room, out, "--role", "writer"), direct("room", "remove", room, out), "n2", "allow.roomless", "ALLOWED to subscribe to room." + room},
		{"probe user suspended", usual, direct("user", "suspend", handle), direct("user", "resume", handle), "n1", "allow.room", "not admitted"},
		{"bucket of one replica", usual, replicas(1), replicas(3), "cluster", "bucket KV_UNIBUS_room_keys", "num_replicas = 1"},
		{
			"callout stopped", usual, func(t *testing.T) { c.In(t).Term(2, cluster.Authcallout) },
			func(t *testing.T) { c.In(t).StartNode(2); healthy(t) }, "n2", "callout", "no authcallout holds a lease",
		},
		{
			"callout killed", usual, func(t *testing.T) { c.In(t).Kill(3, cluster.Authcallout) },
			func(t *testing.T) { c.In(t).StartNode(3); healthy(t) }, "cluster", "callouts", "authcallout-n3",
		},
		{
			"membership killed", usual, func(t *testing.T) { c.In(t).Kill(1, cluster.Membership) },
			func(t *testing.T) { c.In(t).StartNode(1); healthy(t) }, "n1", "membership", "does not answer",
		},
		{
			"server killed", usual, func(t *testing.T) { c.In(t).Kill(3, cluster.NATS) },
			func(t *testing.T) { c.In(t).StartNode(3); healthy(t) }, "n3", "nats.tls", "does not answer",
		},
		{"broken record", usual, func(t *testing.T) {
			if _, err := js.Publish(t.Context(), "$KV.UNIBUS_users."+strings.Repeat("ab", 32), []byte("{")); err != nil {
				t.Fatal(err)
			}
		}, nil, "cluster", "records", "cannot be read"},
		{"bucket frozen", usual, func(t *testing.T) { // for good: the last one
			m := nats.NewMsg("$KV.UNIBUS_room_keys.probe")
			m.Header.Set("Nats-Expected-Last-Msg-Id", "nope")
			_, _ = js.PublishMsg(t.Context(), m, jetstream.WithRetryAttempts(0))
		}, nil, "cluster", "write KV_UNIBUS_room_keys", "takes no write"},
	} {
		t.Run(f.name, func(t *testing.T) {
			if f.plant != nil {
				f.plant(t)
			}
			d := visit(t, c.In(t), f.args...)
			if d.Code == 0 || !d.names(f.node, f.check, f.words) {
				t.Errorf("not named: exit %d\n%s", d.Code, strings.Join(d.bad(), "\n"))
			}
			if f.mend != nil {
				f.mend(t)
			}
		})
	}
}

// TestDoctorServers plants in n3 what an operator's hand could do to a server's
// configuration and certificates, one after the other, and has the doctor name
// each.
func TestDoctorServers(t *testing.T) {
	if !full {
		t.Skip("restarts a server for each fault: make chaos")
	}
	w := newWorld(t, cluster.Options{Controls: true})
	usual := []string{"--inventory", w.Inventory(), "--sys-seed", w.Seed("sys")}
	if d := visit(t, w.In(t), usual...); d.Code != 0 {
		t.Fatalf("a healthy cluster: %s", strings.Join(d.bad(), "\n"))
	}
	etc := func(name string) string { return filepath.Join(w.Etc(3), filepath.FromSlash(name)) }
	read := func(t *testing.T, name string) string {
		t.Helper()
		data, err := os.ReadFile(etc(name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	write := func(t *testing.T, name, content string) {
		t.Helper()
		if err := os.WriteFile(etc(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// edited restarts the server of n3 with a changed file, and mends that.
	edited := func(t *testing.T, name, old, new string, more ...cluster.Service) {
		t.Helper()
		before := read(t, name)
		after := strings.ReplaceAll(before, old, new)
		if old == "" {
			after = before + "\n" + new + "\n"
		}
		if after == before {
			t.Fatalf("%s has no %q", name, old)
		}
		again := append([]cluster.Service{cluster.NATS}, more...)
		write(t, name, after)
		w.In(t).Term(3, again...)
		w.In(t).StartNode(3, again...)
		t.Cleanup(func() {
			write(t, name, before)
			w.Term(3, again...)
			w.StartNode(3, again...)
			w.WaitHealthy(time.Minute)
		})
		cluster.WaitFor(t, 30*time.Second, "the server to answer", func() error {
			conn, err := net.Dial("tcp", strings.TrimPrefix(w.NATSURL(3), "tls://"))
			if err == nil {
				_ = conn.Close()
			}
			return err
		})
	}
	for _, f := range []struct {
		name         string
		plant        func(t *testing.T)
		check, words string
	}{
		{"websocket listener", func(t *testing.T) {
			edited(t, "nats/conf.d/local.conf", "", fmt.Sprintf("websocket { listen: \"127.0.0.1:%d\", no_tls: true }", freePort(t)))
		}, "listeners", "websocket listener"},
		{"leafnode listener", func(t *testing.T) {
			edited(t, "nats/conf.d/local.conf", "", fmt.Sprintf("leafnodes { listen: \"127.0.0.1:%d\" }", freePort(t)))
		}, "listeners", "leafnode listener"},
		{"monitor on 0.0.0.0", func(t *testing.T) {
			edited(t, "nats/node.conf", `http: "127.0.0.1:`, `http: "0.0.0.0:`)
		}, "listeners", "the monitor is bound to"},
		{"no_auth_user", func(t *testing.T) {
			edited(t, "nats/conf.d/local.conf", "", fmt.Sprintf("no_auth_user: %q", publicKeyOf(t, w.Seed("authcallout-bus"))))
		}, "deny.anonymous", "ADMITTED"},
		{"writes are not synced", func(t *testing.T) {
			edited(t, "nats/conf.d/jetstream.conf", "sync_interval: always", `sync_interval: "2m"`)
		}, "durability", "sync_interval"},
		{"certificate of another CA", func(t *testing.T) {
			edited(t, "nats/node.conf", "/tls/server.", "/tls/route.")
		}, "nats.tls", ""},
		{"clock off", func(t *testing.T) {
			w.SetEnv(3, cluster.Membership, "UNIBUS_CLOCK_SKEW", "5s")
			w.In(t).Term(3, cluster.Membership)
			w.In(t).StartNode(3, cluster.Membership)
			t.Cleanup(func() {
				w.SetEnv(3, cluster.Membership, "UNIBUS_CLOCK_SKEW", "0s")
				w.Term(3, cluster.Membership)
				w.StartNode(3, cluster.Membership)
				w.WaitHealthy(time.Minute)
			})
			hold(t.Context(), 3*time.Second) // it finds out with its first barrier
		}, "clock", "disagree"},
		{"certificate that ends in five days", func(t *testing.T) {
			edited(t, "tls/server.crt", read(t, "tls/server.crt"), endingIn(t, w, etc("tls/server.crt"), 5*24*time.Hour))
		}, "cert.client", "expires in 4"},
		{"old server", func(t *testing.T) {
			old := cluster.OldServer(t, "v2.15.1") // lets a client choose its connection type
			w.SetBinary(3, cluster.NATS, old)
			w.In(t).Term(3)
			w.In(t).StartNode(3)
			t.Cleanup(func() {
				w.SetBinary(3, cluster.NATS, "")
				w.Term(3)
				w.StartNode(3)
				w.WaitHealthy(time.Minute)
			})
			cluster.WaitFor(t, 30*time.Second, "the old server to be there", func() error { return w.NATSHealthy(t.Context(), 3) })
		}, "nats.version", "2.15.1"},
	} {
		t.Run(f.name, func(t *testing.T) {
			f.plant(t)
			d := visit(t, w.In(t), usual...)
			if d.Code == 0 || !d.names("n3", f.check, f.words) {
				t.Errorf("not named: exit %d\n%s", d.Code, strings.Join(d.bad(), "\n"))
			}
		})
	}
	if d := visit(t, w.In(t), usual...); d.Code != 0 {
		t.Errorf("after all was mended: %s", strings.Join(d.bad(), "\n"))
	}
}

// TestDoctorWithoutQuorum: with most servers dead, and with most of them silent,
// the doctor ends in time and says what it cannot know.
func TestDoctorWithoutQuorum(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	usual := []string{"--inventory", w.Inventory(), "--sys-seed", w.Seed("sys")}
	for _, f := range []struct {
		name, words string
		take, give  func(i int)
	}{
		{"killed", "does not answer", func(i int) { w.Kill(i) }, func(i int) { w.StartNode(i) }},
		{"paused", "does not answer", func(i int) { w.Pause(i) }, func(i int) { w.Resume(i) }},
	} {
		t.Run(f.name, func(t *testing.T) {
			f.take(2)
			f.take(3)
			cluster.WaitFor(t, 10*time.Second, "both servers to be silent", func() error { // a stopped process may answer once more
				for _, i := range []int{2, 3} {
					conn, err := net.Dial("tcp", strings.TrimPrefix(w.NATSURL(i), "tls://"))
					if err != nil {
						continue
					}
					_ = conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
					n, _ := conn.Read(make([]byte, 1))
					_ = conn.Close()
					if n > 0 {
						return fmt.Errorf("n%d answers", i)
					}
				}
				return nil
			})
			d := visit(t, w.In(t), usual...)
			if d.Code != 2 || !d.names("cluster", "store", "cannot be proven current") || !d.names("n2", "nats.tls", f.words) || !d.names("n3", "nats.tls", f.words) {
				t.Errorf("exit %d after %d ms\n%s", d.Code, d.Elapsed, strings.Join(d.bad(), "\n"))
			}
			t.Logf("said so after %d ms", d.Elapsed)
			f.give(2)
			f.give(3)
			w.In(t).WaitHealthy(time.Minute)
			cluster.WaitFor(t, 30*time.Second, "the doctor to be content", func() error {
				if d := visit(t, w.In(t), usual...); d.Code != 0 {
					return errors.New(strings.Join(d.bad(), "; "))
				}
				return nil
			})
		})
	}
}

// endingIn is a node's certificate with another end, signed by the same
// authority for the same key.
func endingIn(t *testing.T, w *world, certFile string, left time.Duration) string {
	t.Helper()
	return signedAnew(t, w.CA(), certFile, left)
}

func signedAnew(t *testing.T, caFile, certFile string, left time.Duration) string {
	t.Helper()
	text, err := os.ReadFile(certFile)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatalf("no certificate in %s", certFile)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := tls.LoadX509KeyPair(caFile, strings.TrimSuffix(caFile, ".crt")+".key")
	if err != nil {
		t.Fatal(err)
	}
	cert.NotAfter = time.Now().Add(left)
	der, err := x509.CreateCertificate(rand.Reader, cert, ca.Leaf, cert.PublicKey, ca.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// freePort is one that nobody listens on.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).Port
}

func publicKeyOf(t *testing.T, seedFile string) string {
	t.Helper()
	seed, err := os.ReadFile(seedFile)
	if err != nil {
		t.Fatal(err)
	}
	kp, err := nkeys.FromSeed([]byte(strings.TrimSpace(string(seed))))
	if err != nil {
		t.Fatal(err)
	}
	pub, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// plainListener greets in clear, as a route port without TLS does. The stock
// server needs its routes too much to be made so in the middle of a test.
func plainListener(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("INFO {\"server_id\":\"x\",\"cluster\":\"unibus\"}\r\n"))
			_ = conn.Close()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}
