package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// endedWithin is how long after a change has returned, or its server is back, a
// connection that it ends may still be there.
const endedWithin = 5 * time.Second

// fault is what befalls one node while changes are made.
type fault struct {
	name        string
	plant, mend func(w *world, node int)
	away        bool // its server does not answer meanwhile
	lost        bool // and its connections end
	cut         bool // by the network: not the node that our own changes go by
}

var faults = []fault{
	{name: "none"},
	{name: "callout killed", plant: func(w *world, i int) { w.Kill(i, cluster.Authcallout) }, mend: func(w *world, i int) { w.StartNode(i) }},
	{name: "node paused", plant: func(w *world, i int) { w.Pause(i) }, mend: func(w *world, i int) { w.Resume(i) }, away: true},
	{name: "node killed", plant: func(w *world, i int) { w.Kill(i) }, mend: func(w *world, i int) { w.StartNode(i) }, away: true, lost: true},
}

// cutOff is one fault more, where there are networks.
var cutOff = fault{
	name: "node cut off", plant: func(w *world, i int) { w.Cut(i, cluster.CutBoth) }, mend: func(w *world, i int) { w.Heal(i, cluster.CutBoth) },
	away: true, cut: true,
}

// TestEnforceFaults changes the access of people picked at random, at random
// times and several at once, with all well and with a callout killed, a node
// paused, a node killed and, at full numbers, one cut off by the network. Every connection that a change ends is closed within
// 5 s, that of a server which was away within 5 s of its return; no other one
// is. Both are counted.
func TestEnforceFaults(t *testing.T) {
	t.Parallel()
	users, each, writers := 48, 6, 3 // changes of each kind in all: as many as faults times each, by halves
	if full {
		users, each, writers = 1000, 150, 8 // 750 of the 1,000 with the cut
	}
	list, networks := faults, full && os.Geteuid() == 0
	if networks {
		list = append(slices.Clip(list), cutOff)
	}
	w := newWorld(t, cluster.Options{Lease: 2 * time.Second, Networks: networks})
	e := &endings{world: w, writers: writers}
	w.addRoom("all", w.admin, kv.RoomOptions{})
	e.seed(users)
	order := rand.New(rand.NewPCG(5, 300)).Perm(users)
	gone := make(map[int]bool)
	for n, f := range list {
		victims, node := order[n*each:(n+1)*each], n%3+1
		if f.cut {
			node = w.lonely(n)
		}
		e.under(t, f, node, victims)
		for _, u := range victims {
			gone[u] = true
		}
	}
	untouched := 0
	for u := range e.conns {
		if !gone[u] {
			untouched++
		}
	}
	t.Logf("%d connections of %d users: %d changes closed %d, the slowest %s after it returned; the others, of %d users, were looked at %d times and none was touched",
		3*users, users, len(gone), e.closed.Load(), time.Duration(e.slowest.Load()).Round(time.Millisecond), untouched, e.looked)
	if want := int64(3 * len(gone)); e.closed.Load() != want {
		t.Errorf("%d connections were closed, want %d", e.closed.Load(), want)
	}
}

// endings is a cluster full of connected people whose access is taken away.
type endings struct {
	*world
	writers int
	people  []*person
	conns   [][]*wire.Conn // one to each node, of each of them

	closed, slowest atomic.Int64
	looked          int
}

// seed registers people and connects each to every node.
func (e *endings) seed(users int) {
	e.people, e.conns = make([]*person, users), make([][]*wire.Conn, users)
	for n := range users {
		e.people[n] = e.addUser(fmt.Sprintf("p%d", n))
		e.join("all", e.people[n], bus.Writer)
		e.conns[n] = e.rawEverywhere(e.people[n])
		for _, c := range e.conns[n] {
			c.KeepAlive()
		}
	}
}

// under makes its changes under one fault of one node, half of them revokes and
// half removals, and mends it.
func (e *endings) under(t *testing.T, f fault, node int, victims []int) {
	began := time.Now()
	if f.plant != nil {
		f.plant(e.world, node)
	}
	next := make(chan int)
	var writing sync.WaitGroup
	for range e.writers {
		writing.Go(func() {
			for k := range next {
				e.end(t, victims[k], k%2 == 0, f, node)
			}
		})
	}
	for k := range victims {
		hold(t.Context(), time.Duration(rand.IntN(50))*time.Millisecond)
		next <- k
	}
	close(next)
	writing.Wait()
	changed := time.Since(began)
	if f.mend != nil {
		f.mend(e.world, node)
	}
	if f.away {
		e.returned(t, f, node, victims)
	}
	e.WaitHealthy(time.Minute)
	if f.lost { // also those of people who kept their access: they come back
		for u, cs := range e.conns {
			if !slices.Contains(victims, u) && cs[0] != nil {
				cs[node-1] = e.connectRaw(node, e.people[u])
				cs[node-1].KeepAlive()
			}
		}
	}
	for _, u := range victims {
		e.conns[u] = make([]*wire.Conn, 3)
	}
	touched := 0
	for _, cs := range e.conns {
		for _, c := range cs {
			if c == nil {
				continue
			}
			if e.looked++; hasEnded(c) {
				touched++
			}
		}
	}
	t.Logf("%s: %d changes in %s, mended after %s", f.name, len(victims), changed.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	if touched > 0 {
		t.Errorf("%s: %d connections of somebody else were closed", f.name, touched)
	}
}

// end takes somebody's access away and wants what can answer closed.
func (e *endings) end(t *testing.T, victim int, revoke bool, f fault, node int) {
	p := e.people[victim]
	err := commit(t.Context(), func(ctx context.Context) (kv.Result, error) {
		if revoke {
			return e.store.RevokeUser(ctx, p.key)
		}
		return e.store.RemoveMember(ctx, "all", p.key)
	})
	returned := time.Now()
	if err != nil {
		t.Errorf("%s: %s: %v", f.name, p.name, err)
		return
	}
	for i, c := range e.conns[victim] {
		if f.away && i == node-1 {
			continue
		}
		e.wantEnded(t, f, c, returned)
	}
}

// returned wants those connections closed that were kept by a server while it
// was away. One that died has none.
func (e *endings) returned(t *testing.T, f fault, node int, victims []int) {
	if f.cut {
		e.joined(t, node)
	} else {
		cluster.WaitFor(t, time.Minute, e.Node(node)+" to be back", func() error { return e.NATSHealthy(t.Context(), node) })
	}
	back := time.Now()
	for _, u := range victims {
		e.wantEnded(t, f, e.conns[u][node-1], back)
	}
}

// joined waits until the others hear a server that was cut off.
func (e *endings) joined(t *testing.T, node int) {
	sys := e.sysOn(node%3 + 1)
	cluster.WaitFor(t, time.Minute, e.Node(node)+" to join the others", func() error {
		m, err := sys.Request("$SYS.REQ.SERVER.PING.VARZ", []byte(fmt.Sprintf(`{"server_name":%q,"exact_match":true}`, e.Node(node))), 100*time.Millisecond)
		if err == nil && len(m.Data) == 0 {
			err = errors.New("nobody")
		}
		return err
	})
}

func (e *endings) wantEnded(t *testing.T, f fault, c *wire.Conn, since time.Time) {
	for !hasEnded(c) {
		if time.Since(since) > endedWithin {
			t.Errorf("%s: a connection lives %s after its user lost the access", f.name, endedWithin)
			return
		}
	}
	took := time.Since(since).Nanoseconds()
	for now := e.slowest.Load(); took > now && !e.slowest.CompareAndSwap(now, took); now = e.slowest.Load() {
	}
	e.closed.Add(1)
}

// hasEnded tells a connection that its server has closed from one that is only slow.
func hasEnded(c *wire.Conn) bool {
	err := c.Flush()
	return errors.Is(err, wire.ErrDenied) || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrUnexpectedEOF)
}

// commit makes a change while a node may be away: proven or not, it counts.
func commit(ctx context.Context, change func(context.Context) (kv.Result, error)) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	for {
		_, err := change(ctx)
		var u *kv.Unproven
		switch {
		case err == nil, errors.As(err, &u):
			return nil
		case ctx.Err() != nil || bus.CodeOf(err) != bus.Unavailable: // an election may be going on
			return err
		}
	}
}

// TestEnforceRaceMany has 10,000 connections of one user come in on three nodes
// while that user is revoked in their midst: a second after the revoke returned
// none lives, and none that began after it is admitted.
func TestEnforceRaceMany(t *testing.T) {
	if !full {
		t.Skip("10,000 connections: make chaos; 300 of them: TestEnforceRace")
	}
	const racers, wide = 10_000, 64
	w := newWorld(t, cluster.Options{Env: map[cluster.Service]map[string]string{
		cluster.Authcallout: {"UNIBUS_USER_CONNECTIONS": "20000"},
	}})
	p, sys := w.addUser("racer"), w.Sys()
	var next, in, late atomic.Int64
	var revoked atomic.Pointer[time.Time]
	conns := make([]*wire.Conn, racers)
	half := make(chan struct{})
	var racing sync.WaitGroup
	for range wide {
		racing.Go(func() {
			for n := next.Add(1) - 1; n < racers; n = next.Add(1) - 1 {
				after := revoked.Load()
				c, err := w.knock(int(n)%3+1, 15*time.Second)
				if err != nil {
					t.Errorf("dial: %v", err)
					return
				}
				conns[n] = c
				if c.Connect(wire.Proof(p.kp, c.Info.Nonce)) != nil {
					continue
				}
				if after != nil {
					late.Add(1)
				}
				if in.Add(1) == racers/3 {
					close(half)
				}
			}
		})
	}
	t.Cleanup(func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	})
	select {
	case <-half:
	case <-time.After(2 * time.Minute):
		t.Fatal("a third is not admitted in two minutes")
	}
	began := time.Now()
	if _, err := w.store.RevokeUser(t.Context(), p.key); err != nil {
		t.Fatal(err)
	}
	returned := time.Now()
	revoked.Store(&returned)
	atReturn := in.Load()
	for open := w.live(sys, p); len(open) > 0; open = w.live(sys, p) {
		if time.Since(returned) > closedWithin {
			t.Fatalf("%d or more connections live %s after the revoke returned", len(open), closedWithin)
		}
	}
	gone := time.Since(returned)
	racing.Wait()
	cluster.Hold(t, 3*time.Second, "none comes back", func() error {
		if open := w.live(sys, p); len(open) > 0 {
			return fmt.Errorf("open are %v", open)
		}
		return nil
	})
	t.Logf("%d connects, %d wide; %d were in when the revoke returned after %s, none lived %s later; %d were admitted in all",
		racers, wide, atReturn, returned.Sub(began).Round(time.Millisecond), gone.Round(time.Millisecond), in.Load())
	if late.Load() > 0 {
		t.Errorf("%d that began after the revoke had returned were admitted", late.Load())
	}
	w.foundNothing()
}
