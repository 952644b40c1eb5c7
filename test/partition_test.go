package test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// sweptWithin is how long after a cut-off server answers the others again a
// connection may live there that should have been closed.
const sweptWithin = 3 * time.Second

// TestPartition cuts a node off by the network, processes and all: it admits
// nobody once its lease has run out, the others go on and take changes, and
// when it is back the connections that should be gone are closed before anybody
// is let in.
func TestPartition(t *testing.T) {
	t.Parallel()
	cuts, apart := []cluster.Cut{cluster.CutBoth}, 6*time.Second
	if full {
		cuts = []cluster.Cut{cluster.CutBoth, cluster.CutOut, cluster.CutIn, cluster.CutBoth, cluster.CutOut, cluster.CutIn}
		apart = 30 * time.Second
	}
	pt := &partition{world: newWorld(t, cluster.Options{Networks: true, Lease: 2 * time.Second}), lease: 2 * time.Second}
	pt.addRoom("ops", pt.admin, kv.RoomOptions{})
	t.Run("listeners for the own machine", pt.loopbackOnly)
	for n, how := range cuts {
		t.Run(fmt.Sprintf("%d %s", n+1, how), func(t *testing.T) { pt.once(t, n, how, apart) })
	}
}

type partition struct {
	*world
	lease time.Duration
}

// lonely picks the node to cut: not the one that the test's own changes go by.
func (w *world) lonely(n int) int {
	for i := range 3 {
		if node := (n+i)%3 + 1; w.NATSURL(node) != w.link.ConnectedUrl() {
			return node
		}
	}
	panic("one connection to three nodes")
}

func (pt *partition) once(t *testing.T, n int, how cluster.Cut, apart time.Duration) {
	w := &world{Cluster: pt.In(t), t: t, store: pt.store, view: pt.view, link: pt.link, trust: pt.trust, admin: pt.admin}
	cut := pt.lonely(n)
	others := slices.DeleteFunc(w.Nodes(), func(i int) bool { return i == cut })
	revoked, removed, stays := w.addUser(fmt.Sprintf("revoked%d", n)), w.addUser(fmt.Sprintf("removed%d", n)), w.addUser(fmt.Sprintf("stays%d", n))
	w.join("ops", removed, bus.Reader)
	w.waitAdmits(stays, cut)
	stale := []*wire.Conn{w.connectRaw(cut, revoked), w.connectRaw(cut, removed)}
	kept := []*wire.Conn{w.connectRaw(cut, stays)}
	var gone []*wire.Conn
	for _, i := range others {
		gone = append(gone, w.connectRaw(i, revoked), w.connectRaw(i, removed))
		kept = append(kept, w.connectRaw(i, stays))
	}
	for _, c := range slices.Concat(stale, kept) {
		c.KeepAlive()
	}

	w.Cut(cut, how)
	began := time.Now()
	guests := visitors(w, cut, stays)
	defer guests.stop()
	for what, change := range map[string]func(context.Context) (kv.Result, error){
		"revoke": func(ctx context.Context) (kv.Result, error) { return w.store.RevokeUser(ctx, revoked.key) },
		"remove": func(ctx context.Context) (kv.Result, error) { return w.store.RemoveMember(ctx, "ops", removed.key) },
	} {
		started := time.Now()
		if err := commit(t.Context(), change); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		t.Logf("%s, with n%d cut off: %s", what, cut, time.Since(started).Round(time.Millisecond))
	}
	wantClosed(t, gone...)
	wantOpen(t, kept...)
	tries, unanswered := 0, 0
	for time.Since(began) < apart {
		for _, i := range others {
			v, err := w.attempt(i, stays)
			if v == refused {
				t.Errorf("n%d of the majority refused a member: %v", i, err)
			}
			if tries++; v == silent {
				unanswered++
			}
			if v, _ := w.attempt(i, revoked); v == admitted {
				t.Errorf("n%d of the majority admitted a revoked user", i)
			}
		}
		hold(t.Context(), 200*time.Millisecond)
	}
	t.Logf("of %d attempts at the majority %d had no answer", tries, unanswered)
	w.waitAdmits(stays, others...)
	// The limit that the threat model states; else the rest would prove nothing. A
	// node that only cannot be heard may have heard the first kick.
	stale = slices.DeleteFunc(stale, func(c *wire.Conn) bool {
		err := c.Flush()
		if err != nil && how != cluster.CutOut {
			t.Errorf("a connection to the node that is cut off: %v", err)
		}
		return err != nil
	})
	if len(stale) == 0 {
		t.Log("both stale connections were closed before the healing")
	}

	sys, over := w.sysOn(others[0]), began.Add(pt.lease)
	if first := guests.firstAfter(over); !first.IsZero() {
		t.Errorf("n%d admitted somebody who came %s after it was cut off, with a lease of %s", cut, first.Sub(began), pt.lease)
	}
	w.Heal(cut, how)
	healed := time.Now()
	joined, closed := pt.mended(t, sys, cut, stale, func() bool { return !guests.firstAfter(over).IsZero() })
	cluster.WaitFor(t, time.Minute, "the node to admit again", func() error {
		if guests.firstAfter(over).IsZero() {
			return errors.New("nobody is admitted")
		}
		return nil
	})
	in := guests.firstAfter(over)
	w.WaitHealthy(time.Minute)
	w.waitAdmits(stays, w.Nodes()...)
	t.Logf("n%d: %d attempts, the last admitted one began %s after the cut; %s after the healing the node answered the others, after %s the stale connections were closed, the first one let in began after %s",
		cut, guests.count(), guests.lastBefore(healed).Sub(began).Round(time.Millisecond),
		joined.Sub(healed).Round(time.Millisecond), closed.Sub(healed).Round(time.Millisecond), in.Sub(healed).Round(time.Millisecond))
	if late := closed.Sub(joined); late > sweptWithin {
		t.Errorf("closed %s after the node was back, want %s", late, sweptWithin)
	}
	wantOpen(t, kept...)
	if open := w.live(sys, revoked); len(open) > 0 {
		t.Errorf("%s has %v open", revoked.name, open)
	}
}

// mended is when a server answers the others again, and when it has closed what
// it had kept; nobody may be let in before that.
func (pt *partition) mended(t *testing.T, sys *nats.Conn, node int, stale []*wire.Conn, letIn func() bool) (joined, closed time.Time) {
	t.Helper()
	answers := make(chan time.Time, 1)
	inbox, name := sys.NewInbox(), fmt.Sprintf(`"name":%q`, pt.Node(node))
	sub, err := sys.Subscribe(inbox, func(m *nats.Msg) {
		if strings.Contains(string(m.Data), name) {
			select {
			case answers <- time.Now():
			default:
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for began := time.Now(); joined.IsZero() || closed.IsZero(); {
		if time.Since(began) > time.Minute {
			t.Fatalf("a minute after the healing the node was back at %v, and had closed everything at %v", joined, closed)
		}
		if joined.IsZero() {
			if err := sys.PublishRequest("$SYS.REQ.SERVER.PING.IDZ", inbox, nil); err != nil {
				t.Fatal(err)
			}
		}
		let := letIn() // before it is asked whether they live
		stale = slices.DeleteFunc(stale, func(c *wire.Conn) bool { return c.Flush() != nil })
		if len(stale) == 0 && closed.IsZero() {
			closed = time.Now()
		}
		if let && closed.IsZero() {
			t.Fatal("somebody was let in while a connection of a revoked user is alive")
		}
		select {
		case joined = <-answers:
		case <-again.C:
		}
	}
	return joined, closed
}

// sysOn connects as sys to one node and no other.
func (w *world) sysOn(i int) *nats.Conn {
	w.t.Helper()
	nc, err := kv.Connect(kv.Link{URL: w.NATSURL(i), SeedFile: w.Seed("sys"), CAFile: w.CA(), Name: "test-sys", Inbox: "_INBOX_sys", Timeout: 2 * time.Second, Once: true})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(nc.Close)
	return nc
}

// guests try to get into one node all the time, each on their own, so that one
// who gets no answer delays no other.
type guests struct {
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu    sync.Mutex
	tries int
	in    []time.Time // when those began who were admitted
}

func visitors(w *world, node int, p *person) *guests {
	ctx, cancel := context.WithCancel(w.t.Context())
	g := &guests{cancel: cancel}
	g.done.Go(func() {
		every := time.NewTicker(100 * time.Millisecond)
		defer every.Stop()
		for {
			g.done.Go(func() {
				began := time.Now()
				v, _ := w.attempt(node, p)
				g.mu.Lock()
				defer g.mu.Unlock()
				if g.tries++; v == admitted {
					g.in = append(g.in, began)
				}
			})
			select {
			case <-ctx.Done():
				return
			case <-every.C:
			}
		}
	})
	return g
}

func (g *guests) stop() { g.cancel(); g.done.Wait() }

func (g *guests) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.tries
}

// lastBefore is when the last one began who was admitted and had begun before a moment.
func (g *guests) lastBefore(moment time.Time) (last time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, at := range g.in {
		if at.Before(moment) && at.After(last) {
			last = at
		}
	}
	return last
}

// firstAfter is when the first one began who was admitted and began after a moment.
func (g *guests) firstAfter(moment time.Time) (first time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, at := range g.in {
		if at.After(moment) && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}
