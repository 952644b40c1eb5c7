package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	sdk "unibus.internal/bus/client"
	"unibus.internal/test/cluster"
)

// TestClusterReload changes accounts.conf on every node and has the servers
// take it over one by one: each drops its users, all are back, and the command
// says how long that took. A configuration that a server refuses stops it.
func TestClusterReload(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	w.adminSeed(w.admin)
	edit := func(i int, old, new string) {
		t.Helper()
		file := filepath.Join(w.Etc(i), "nats", "conf.d", "accounts.conf")
		conf, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(conf), old) {
			t.Fatalf("%s: %v, no %q", file, err, old)
		}
		if err := os.WriteFile(file, []byte(strings.Replace(string(conf), old, new, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if r := w.In(t).CLI("cluster", "reload", "--dry-run"); r.Code != 0 || !strings.Contains(r.Stdout, "would reload n1, n2, n3") {
		t.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := w.In(t).CLI("cluster", "reload", "--node", "n9", "--yes"); r.Code != 1 || !strings.Contains(r.Stderr, "no server") {
		t.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}

	type gap struct {
		mu    sync.Mutex
		since time.Time
		worst time.Duration
		times int
	}
	down := func(g *gap) { g.mu.Lock(); defer g.mu.Unlock(); g.since = time.Now(); g.times++ }
	up := func(g *gap) {
		g.mu.Lock()
		defer g.mu.Unlock()
		if !g.since.IsZero() {
			g.worst, g.since = max(g.worst, time.Since(g.since)), time.Time{}
		}
	}
	var gaps []*gap
	var alive []func() error
	for n := range 30 {
		p := w.addUser(fmt.Sprintf("reload-%d", n))
		g := &gap{}
		gaps = append(gaps, g)
		if n%2 == 0 {
			c := w.dial(t, p, func(cfg *sdk.DialConfig) {
				cfg.API = nil
				cfg.OnStatus = func(s sdk.Status) {
					if s == sdk.Connected {
						up(g)
					} else {
						down(g)
					}
				}
			})
			alive = append(alive, func() error { return c.Flush(t.Context()) })
			continue
		}
		// As a stock client is told to be configured (docs/protocol.md).
		opts := append(p.options(w.CA()), nats.MaxReconnects(-1), nats.IgnoreAuthErrorAbort(), nats.ReconnectWait(100*time.Millisecond),
			nats.DisconnectErrHandler(func(*nats.Conn, error) { down(g) }), nats.ReconnectHandler(func(*nats.Conn) { up(g) }))
		nc, err := nats.Connect(w.URLs(w.NATSURL), opts...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		alive = append(alive, func() error { return nc.FlushTimeout(5 * time.Second) })
	}
	w.rotateRoutePassword(t)
	for _, i := range w.Nodes() {
		edit(i, "max_streams: 16", "max_streams: 17")
	}
	r := w.In(t).CLI("cluster", "reload", "--yes")
	t.Logf("%s", r.Stdout)
	if r.Code != 0 || strings.Count(r.Stdout, "reloaded n") != 3 || !strings.Contains(r.Stdout, "were cut off and back after") {
		t.Fatalf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	worst, times := time.Duration(0), 0
	for n, g := range gaps {
		if err := alive[n](); err != nil {
			t.Errorf("client %d is lost: %v", n, err)
		}
		g.mu.Lock()
		if !g.since.IsZero() {
			t.Errorf("client %d is not back", n)
		}
		worst, times = max(worst, g.worst), times+g.times
		g.mu.Unlock()
	}
	if times < len(gaps) {
		t.Errorf("%d times was a client cut off, want each of %d at least once", times, len(gaps))
	}
	t.Logf("30 clients were cut off %d times, the longest gap took %s", times, worst.Round(time.Millisecond))
	w.foundNothing()

	edit(2, "max_streams: 17", "max_streams: no number")
	r = w.In(t).CLI("cluster", "reload", "--yes")
	if r.Code != 1 || !strings.Contains(r.Stderr, "n2: the server refuses its configuration") || !strings.Contains(r.Stderr, "not reloaded: n3") || !strings.Contains(r.Stderr, "--node n2 --node n3") {
		t.Errorf("a configuration that n2 refuses: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	w.WaitHealthy(30 * time.Second)
}

// rotateRoutePassword replaces the route password by reloads. Each route is made
// anew once, in the middle stage, and nobody waits for more than a reload.
func (w *world) rotateRoutePassword(t *testing.T) {
	t.Helper()
	old, err := os.ReadFile(filepath.Join(w.Secrets(), "route.pass"))
	if err != nil {
		t.Fatal(err)
	}
	routes := w.routes()
	kept := func() int {
		n := 0
		now := w.routes()
		for name, id := range routes {
			if now[name] == id {
				n++
			}
		}
		return n
	}
	for _, step := range []struct {
		stage    string
		keeps    bool
		old, new bool // passwords that open a route then
	}{
		{"trust", true, true, true},
		{"issue", false, true, true},
		{"retire", true, false, true},
	} {
		if step.stage != "trust" {
			routes = w.routes()
		}
		w.rotated(t, step.stage, "route-password")
		if step.stage == "trust" {
			w.notRotated(t, "does not have the stage before on its disk", "issue", "route-password")
		}
		if err := w.Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		if step.stage == "trust" {
			w.notRotated(t, "the server of n1 does not run the stage before yet", "issue", "route-password")
			w.notRotated(t, "the stage before is issue", "retire", "route-password")
		}
		if r := w.In(t).CLI("cluster", "reload", "--yes"); r.Code != 0 {
			t.Fatalf("%s: exit %d: %s%s", step.stage, r.Code, r.Stdout, r.Stderr)
		}
		n := kept()
		t.Logf("route password, %s: %d of %d routes kept", step.stage, n, len(routes))
		if step.keeps && n != len(routes) {
			t.Errorf("%s: %d of %d routes kept, want all", step.stage, n, len(routes))
		}
		now, err := os.ReadFile(filepath.Join(w.Secrets(), "route.pass"))
		if err != nil {
			t.Fatal(err)
		}
		for _, try := range []struct {
			name, password string
			want           bool
		}{{"old", string(old), step.old || step.stage == "trust"}, {"new", string(now), step.new}} {
			if said, got := routeLogin(t, w.Cluster, strings.TrimSpace(try.password)); got != try.want {
				t.Errorf("%s: a node that says the %s password is a route: %v, want %v (%s)", step.stage, try.name, got, try.want, said)
			}
		}
	}
	w.WaitHealthy(30 * time.Second)
}

func (w *world) rotate(t *testing.T, stage string, secrets ...string) cluster.Result {
	t.Helper()
	return w.In(t).CLI(append([]string{
		"config", "rotate", "--stage", stage, "--secrets", w.Secrets(), "--pki", w.PKI(),
		"--inventory", w.Inventory(), "--local", w.Dir, "--yes",
	}, secrets...)...)
}

func (w *world) rotated(t *testing.T, stage string, secrets ...string) {
	t.Helper()
	if r := w.rotate(t, stage, secrets...); r.Code != 0 || strings.Count(r.Stdout, " "+stage+" ") != len(secrets) {
		t.Fatalf("config rotate %v --stage %s: exit %d: %s%s", secrets, stage, r.Code, r.Stdout, r.Stderr)
	}
}

func (w *world) notRotated(t *testing.T, why, stage string, secrets ...string) {
	t.Helper()
	if r := w.rotate(t, stage, secrets...); r.Code != 1 || !strings.Contains(r.Stderr, why) {
		t.Errorf("config rotate %v --stage %s: exit %d, want 1 and %q: %s%s", secrets, stage, r.Code, why, r.Stdout, r.Stderr)
	}
}

// routeLogin speaks to the route port of n1 as another node would, with the
// certificate of n2, and says whether the password was taken.
func routeLogin(t *testing.T, c *cluster.Cluster, password string) (said string, in bool) {
	t.Helper()
	conn, lines := dialRoute(t, c, filepath.Join(c.PKI(), c.Node(2)), "route")
	if conn == nil {
		t.Fatal("no route port")
	}
	defer func() { _ = conn.Close() }()
	if _, err := lines.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(conn, "CONNECT {\"verbose\":false,\"pedantic\":false,\"user\":\"unibus-route\",\"pass\":%q,\"tls_required\":true,\"name\":\"NDTEST\",\"cluster\":\"unibus\"}\r\nPING\r\n", password); err != nil {
		t.Fatal(err)
	}
	for {
		line, err := lines.ReadString('\n')
		switch {
		case err != nil:
			return said, false
		case strings.HasPrefix(line, "-ERR"):
			return line, false
		case strings.HasPrefix(line, "PONG"):
			return line, true
		}
		said = line
	}
}
