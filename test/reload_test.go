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
