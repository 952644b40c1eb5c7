package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/test/cluster"
)

// client is one default nats.go client with endless reconnects, as our users
// have them: no other option that would save it.
type client struct {
	nc     *nats.Conn
	closed atomic.Bool
}

// clients connects n default clients of one user, spread over the nodes.
func (w *world) clients(p *person, n int) []*client {
	w.t.Helper()
	out := make([]*client, n)
	for i := range out {
		c := &client{}
		opts := append(p.options(w.CA()), nats.MaxReconnects(-1), nats.ClosedHandler(func(*nats.Conn) { c.closed.Store(true) }))
		nc, err := nats.Connect(w.URLs(w.NATSURL), opts...)
		if err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(nc.Close)
		c.nc, out[i] = nc, c
	}
	return out
}

func states(cs []*client) (connected, closed int) {
	for _, c := range cs {
		if c.nc.Status() == nats.CONNECTED {
			connected++
		}
		if c.closed.Load() {
			closed++
		}
	}
	return connected, closed
}

// disconnect cuts every client once, as a restart of its server does.
func (w *world) disconnect(cs []*client) {
	for _, c := range cs {
		_ = c.nc.ForceReconnect()
	}
}

// backWithin waits until all clients are connected again and none gave up.
func (w *world) backWithin(cs []*client, d time.Duration) {
	w.t.Helper()
	cluster.WaitFor(w.t, d, "all clients to be back", func() error {
		connected, closed := states(cs)
		if closed > 0 {
			w.t.Fatalf("%d of %d clients gave up for good", closed, len(cs))
		}
		if connected < len(cs) {
			return fmt.Errorf("%d of %d connected", connected, len(cs))
		}
		return nil
	})
}

// TestNoClientIsLost rides 100 default clients through a stop of all callouts
// and through a loss of quorum. Each is cut at its start.
func TestNoClientIsLost(t *testing.T) {
	t.Parallel()
	outage := 10 * time.Second
	if full {
		outage = 30 * time.Second
	}
	w := newWorld(t, cluster.Options{Env: map[cluster.Service]map[string]string{
		cluster.Authcallout: {"UNIBUS_USER_CONNECTIONS": "200"}, // all are one user's
	}})
	p := w.addUser("crowd")
	cs := w.clients(p, 100)

	t.Run("callouts stopped", func(t *testing.T) {
		for _, i := range w.Nodes() {
			w.Kill(i, cluster.Authcallout)
		}
		w.disconnect(cs)
		hold(t.Context(), outage)
		for _, i := range w.Nodes() {
			w.StartNode(i, cluster.Authcallout)
		}
		w.waitAdmits(p, 1, 2, 3)
		w.backWithin(cs, 5*time.Second)
	})
	t.Run("quorum lost", func(t *testing.T) {
		w.Kill(2)
		w.Kill(3)
		w.disconnect(cs)
		hold(t.Context(), outage)
		w.StartNode(2)
		w.StartNode(3)
		w.firstHealthy()
		w.backWithin(cs, 5*time.Second)
	})
}

// hold lets a planned outage last.
func hold(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// firstHealthy returns at the first 200 from any healthz.
func (w *world) firstHealthy() {
	w.t.Helper()
	cluster.WaitFor(w.t, 40*time.Second, "the first 200 from healthz", func() error {
		var last error
		for _, i := range w.Nodes() {
			h, err := w.Healthz(w.t.Context(), i)
			if err == nil && h.Code == 200 {
				return nil
			}
			last = fmt.Errorf("n%d: %d %s: %w", i, h.Code, h.Error, err)
		}
		return last
	})
}

// TestStorm kills a node with all clients on it, of a unibus and of the same
// servers with static users in turn: all come back to the other two nodes, and
// no client gives up. Its figures are in docs/performance.md.
func TestStorm(t *testing.T) {
	t.Parallel()
	clients := 300
	if full {
		clients = 3000
	}
	const each = 10 // connections of one user
	b := &bench{world: newWorld(t, cluster.Options{}), table: table{io.Discard}}
	b.seedRooms()
	b.users = b.seedUsers(0, clients/each, roomsPerUser)
	rival := startRival(t, b.users)
	static := rival.stampede(t, b.users, each, 3)
	before := b.denials(1) + b.denials(2)
	ours := b.stampede(t, b.users, each, 3)
	shed := b.metric("unibus_auth_shed_total")
	t.Logf("%d clients of a killed node, static users: %s", clients, static)
	t.Logf("%d clients of a killed node, callout: %s; %.0f requests shed", clients, ours, shed)
	t.Logf("callout / static, the last one back: %.2f; half of them back: %.2f", ours.last.Seconds()/static.last.Seconds(), ours.half.Seconds()/static.half.Seconds())
	if denied := ours.denied + static.denied; denied > 0 {
		t.Logf("%d refusals on the way: from servers that waited in vain for an answer", denied)
	}
	if n := b.denials(1) + b.denials(2) - before; n > 0 {
		t.Errorf("callouts denied %d requests of members", n)
	}
}

// denials counts whom the callout of one node has refused so far, but for those
// who named no key: that is how each node's health check makes sure, again and
// again, that strangers are kept out.
func (w *world) denials(node int) (n int) {
	w.t.Helper()
	_, body, err := fetch(w.t.Context(), w.AdminURL(node, cluster.Authcallout)+"/metrics")
	if err != nil {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(body) {
		if strings.HasPrefix(line, "unibus_auth_requests_total{") && strings.Contains(line, `result="deny"`) && !strings.Contains(line, `reason="anonymous"`) {
			var count int
			if _, err := fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &count); err != nil {
				w.t.Fatalf("%s: %v", line, err)
			}
			n += count
		}
	}
	return n
}

// stampede is what came of one killed node.
type stampede struct {
	half, last     time.Duration // until so many were back
	failed, denied int           // attempts to reconnect that failed, and those of them that were refused
}

func (s stampede) String() string {
	return fmt.Sprintf("half back after %s, the last one after %s; %d attempts failed, %d of them by a refusal",
		s.half.Round(10*time.Millisecond), s.last.Round(10*time.Millisecond), s.failed, s.denied)
}

// stampede connects all to one node, kills it, and waits until all are back.
// The clients have endless reconnects, as ours have, and are default ones else.
func (w *world) stampede(t *testing.T, users []*person, each, node int) (s stampede) {
	t.Helper()
	var mu sync.Mutex
	var back []time.Time
	gaveUp := 0
	lists := [2]string{}
	for i := range lists { // each knows all nodes; they do not all go to the same one first
		lists[i] = strings.Join([]string{w.NATSURL(node), w.NATSURL((node+i)%3 + 1), w.NATSURL((node+1-i)%3 + 1)}, ",")
	}
	conns := make([]*nats.Conn, len(users)*each)
	open := func(n int) (err error) {
		opts := append(users[n/each].options(w.CA()), nats.DontRandomize(), nats.MaxReconnects(-1), nats.Timeout(5*time.Second),
			nats.ReconnectHandler(func(*nats.Conn) { mu.Lock(); defer mu.Unlock(); back = append(back, time.Now()) }),
			nats.ClosedHandler(func(*nats.Conn) { mu.Lock(); defer mu.Unlock(); gaveUp++ }),
			nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
			nats.ReconnectErrHandler(func(_ *nats.Conn, err error) {
				mu.Lock()
				defer mu.Unlock()
				if s.failed++; errors.Is(err, nats.ErrAuthorization) {
					s.denied++
				}
			}))
		conns[n], err = nats.Connect(lists[n%2], opts...)
		return err
	}
	var next atomic.Int64
	var opening sync.WaitGroup
	for range benchConcurrency {
		opening.Go(func() {
			for n := int(next.Add(1)) - 1; n < len(conns); n = int(next.Add(1)) - 1 {
				if err := open(n); err != nil {
					t.Errorf("client %d: %v", n, err)
				}
			}
		})
	}
	opening.Wait()
	defer func() {
		for _, nc := range conns {
			if nc != nil {
				nc.Close()
			}
		}
	}()
	if t.Failed() {
		t.FailNow()
	}
	mu.Lock()
	back = nil // some may have been put on another node before
	mu.Unlock()
	w.Kill(node)
	killed := time.Now()
	cluster.WaitFor(t, 2*time.Minute, "all clients to be back", func() error {
		mu.Lock()
		defer mu.Unlock()
		if gaveUp > 0 {
			t.Fatalf("%d clients gave up for good", gaveUp)
		}
		if len(back) < len(conns) {
			return fmt.Errorf("%d of %d are back", len(back), len(conns))
		}
		return nil
	})
	mu.Lock()
	defer mu.Unlock()
	s.half, s.last = back[len(conns)/2].Sub(killed), back[len(back)-1].Sub(killed)
	for n, nc := range conns { // each is of use
		if at := nc.ConnectedUrl(); at == "" || at == w.NATSURL(node) {
			t.Errorf("client %d is at %q", n, at)
		}
	}
	return s
}
