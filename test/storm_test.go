package test

import (
	"context"
	"fmt"
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
