package test

import (
	"context"
	"encoding/binary"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// client is the SDK of a person, over all nodes.
func (w *world) client(t testing.TB, p *person) *sdk.Client {
	t.Helper()
	c, err := sdk.New(sdk.Config{URLs: strings.Split(w.URLs(w.APIURL), ","), TLS: w.trust, Identity: p})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// dial connects somebody with the SDK.
func (w *world) dial(t testing.TB, p *person, edit func(*sdk.DialConfig)) *sdk.Conn {
	t.Helper()
	cfg := sdk.DialConfig{URLs: strings.Split(w.URLs(w.NATSURL), ","), TLS: w.trust, Identity: p, Name: p.name, API: w.client(t, p)}
	if edit != nil {
		edit(&cfg)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := sdk.Dial(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestSDK connects programs with bus/client and changes what they may do.
func TestSDK(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	t.Run("widening", w.sdkWidening)
	t.Run("whoever acts on what is told", w.sdkActsOnRooms)
	t.Run("a slow handler", w.sdkSlowHandler)
	t.Run("removal", w.sdkRemoval)
	t.Run("refused", w.sdkRefused)
	t.Run("revoked", w.sdkRevoked)
	t.Run("a dead server", w.sdkDeadServer)
}

// sdkWidening adds connected people to rooms while somebody speaks in a room
// that they hear: nobody is cut off, the new room works within a second, and no
// message is lost or seen twice.
func (w *world) sdkWidening(t *testing.T) {
	adds, people := 40, 8
	if full {
		adds, people = 1000, 25
	}
	speaker := w.addUser("speaker")
	w.addRoom("all", speaker, kv.RoomOptions{})
	type listener struct {
		p    *person
		conn *sdk.Conn
		down atomic.Int64

		mu    sync.Mutex
		heard []uint64
	}
	var all []*listener
	for n := range people {
		l := &listener{p: w.addUser(fmt.Sprintf("listener-%d", n))}
		w.join("all", l.p, bus.Writer)
		l.conn = w.dial(t, l.p, func(cfg *sdk.DialConfig) {
			cfg.OnStatus = func(s sdk.Status) {
				if s != sdk.Connected && s != sdk.Closed {
					l.down.Add(1)
				}
			}
		})
		if _, err := l.conn.Subscribe("all", func(m sdk.Message) {
			if m.Sender != speaker.key || m.Topic != "count" {
				return
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			l.heard = append(l.heard, binary.BigEndian.Uint64(m.Data))
		}); err != nil {
			t.Fatal(err)
		}
		w.must2(t, l.conn.Flush(t.Context()))
		all = append(all, l)
	}
	says := w.dial(t, speaker, nil)
	var owners []*person // nobody may be in more than 500 rooms
	for n := range (adds + 399) / 400 {
		owners = append(owners, w.addUser(fmt.Sprintf("founder-%d", n)))
	}
	var sent uint64
	stop, speaking := make(chan struct{}), sync.WaitGroup{}
	speaking.Go(func() {
		for tick := time.NewTicker(2 * time.Millisecond); ; {
			select {
			case <-stop:
				tick.Stop()
				return
			case <-tick.C:
				sent++
				if err := says.Publish(t.Context(), "all", "count", binary.BigEndian.AppendUint64(nil, sent)); err != nil {
					t.Errorf("message %d: %v", sent, err)
					return
				}
			}
		}
	})
	quiet := sync.OnceFunc(func() { close(stop); speaking.Wait() })
	defer quiet()
	var took []time.Duration
	for n := range adds {
		l := all[n%len(all)]
		room := bus.RoomID(fmt.Sprintf("wide-%d", n))
		w.addRoom(room, owners[n/400], kv.RoomOptions{})
		got := make(chan struct{}, 1)
		sub, err := l.conn.Subscribe(room, func(m sdk.Message) {
			if m.Sender == l.p.key {
				select {
				case got <- struct{}{}:
				default:
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		w.join(room, l.p, bus.Writer)
		began := time.Now()
		for done := false; !done; {
			w.must2(t, l.conn.Publish(t.Context(), room, "hello", nil))
			select {
			case <-got:
				done = true
			case <-time.After(5 * time.Millisecond):
			}
			if time.Since(began) > 10*time.Second {
				t.Fatalf("%s is deaf and dumb in %s", l.p.name, room)
			}
		}
		took = append(took, time.Since(began))
		sub.Unsubscribe()
	}
	quiet()
	w.must2(t, says.Flush(t.Context()))
	slices.Sort(took)
	t.Logf("%d adds: a new room is usable after p50 %s, p99 %s, at most %s; %d messages to %d people meanwhile", adds, took[len(took)/2].Round(time.Millisecond), took[len(took)*99/100].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond), sent, people)
	if p99 := took[len(took)*99/100]; p99 > time.Second {
		t.Errorf("p99 is %s, want at most 1 s", p99)
	}
	for _, l := range all {
		cluster.WaitFor(t, 5*time.Second, l.p.name+" to have heard all", func() error {
			l.mu.Lock()
			defer l.mu.Unlock()
			if n := len(l.heard); n == 0 || l.heard[n-1] != sent {
				return fmt.Errorf("heard %d", n)
			}
			return nil
		})
		l.mu.Lock()
		for i, n := range l.heard {
			if i > 0 && n != l.heard[i-1]+1 {
				t.Errorf("%s heard %d after %d", l.p.name, n, l.heard[i-1])
			}
		}
		l.mu.Unlock()
		if n := l.down.Load(); n > 0 {
			t.Errorf("%s lost the connection %d times", l.p.name, n)
		}
		cluster.WaitFor(t, 5*time.Second, l.p.name+" to know the rooms", func() error {
			if got := len(l.conn.Rooms()); got != 1+adds/people {
				return fmt.Errorf("in %d rooms", got)
			}
			return nil
		})
	}
	if n := w.metric(`unibus_enforce_kicks_total`); n != 0 {
		t.Errorf("%v connections were closed", n)
	}
	w.foundNothing()
}

func (w *world) must2(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sdkActsOnRooms adds somebody to one room after the other whose program
// subscribes, and sends one message, when it is told of a room: what is told can
// be used. Another part of the program subscribes and leaves all the time, also
// in the middle of a handover, and hears everything that comes between.
func (w *world) sdkActsOnRooms(t *testing.T) {
	adds := 12
	if full {
		adds = 100
	}
	owner, p := w.addUser("t-owner"), w.addUser("t-told")
	w.addRoom("t-all", owner, kv.RoomOptions{})
	w.join("t-all", p, bus.Writer)
	heard, told := make(chan bus.RoomID, 2*adds), make(chan []bus.RoomGrant, 2*adds)
	conn := w.dial(t, p, func(cfg *sdk.DialConfig) { cfg.OnRooms = func(g []bus.RoomGrant) { told <- g } })
	stop, program := make(chan struct{}), sync.WaitGroup{}
	defer func() { close(stop); program.Wait() }()
	program.Go(func() {
		known := map[bus.RoomID]bool{"t-all": true}
		for {
			select {
			case <-stop:
				return
			case grants := <-told:
				for _, g := range grants {
					if known[g.Room] {
						continue
					}
					known[g.Room] = true
					if _, err := conn.Subscribe(g.Room, func(m sdk.Message) { heard <- m.Room }); err != nil {
						t.Error(err)
					}
					if err := conn.Publish(t.Context(), g.Room, "once", nil); err != nil {
						t.Error(err)
					}
				}
			}
		}
	})
	program.Go(func() {
		var made []*sdk.Subscription // they live through a handover or two
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			got, id := make(chan struct{}), fmt.Sprint("n", n)
			once := sync.OnceFunc(func() { close(got) })
			sub, err := conn.Subscribe("t-all", func(m sdk.Message) {
				if m.Topic == id {
					once()
				}
			})
			if err == nil {
				err = conn.Publish(t.Context(), "t-all", id, nil)
			}
			if err != nil {
				t.Error(err)
				return
			}
			select {
			case <-got:
			case <-time.After(10 * time.Second):
				t.Errorf("subscription %d is deaf", n)
			}
			if made = append(made, sub); len(made) > 500 {
				made[0].Unsubscribe()
				made = made[1:]
			}
		}
	})
	for n := range adds {
		room := bus.RoomID(fmt.Sprintf("told-%d", n))
		w.addRoom(room, owner, kv.RoomOptions{})
		w.join(room, p, bus.Writer)
		select {
		case r := <-heard:
			if r != room {
				t.Errorf("heard %s, want %s", r, room)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("nothing is heard in %s; known are %v", room, conn.Rooms())
		}
	}
}

// sdkSlowHandler adds somebody to a room whose handler has seconds of work
// before it: the old connection is not closed over that.
func (w *world) sdkSlowHandler(t *testing.T) {
	owner, p := w.addUser("slow-owner"), w.addUser("slow")
	for _, room := range []bus.RoomID{"slow-1", "slow-2"} {
		w.addRoom(room, owner, kv.RoomOptions{})
	}
	w.join("slow-1", p, bus.Reader)
	conn, says := w.dial(t, p, nil), w.dial(t, owner, nil)
	const messages, each = 400, 10 * time.Millisecond
	heard := make(chan byte, 2*messages)
	if _, err := conn.Subscribe("slow-1", func(m sdk.Message) {
		<-time.After(each)
		heard <- m.Data[0]
	}); err != nil {
		t.Fatal(err)
	}
	w.must2(t, conn.Flush(t.Context()))
	for n := range messages / 2 {
		w.must2(t, says.Publish(t.Context(), "slow-1", "x", []byte{byte(n)}))
	}
	w.must2(t, says.Flush(t.Context()))
	w.join("slow-2", p, bus.Reader)
	for n := messages / 2; n < messages; n++ {
		w.must2(t, says.Publish(t.Context(), "slow-1", "x", []byte{byte(n)}))
		<-time.After(time.Millisecond)
	}
	for n := range messages {
		select {
		case got := <-heard:
			if got != byte(n) {
				t.Fatalf("heard %d, want %d", got, byte(n))
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("message %d is lost", n)
		}
	}
	cluster.WaitFor(t, 10*time.Second, "the second room to be known", func() error {
		if n := len(conn.Rooms()); n != 2 {
			return fmt.Errorf("%d rooms", n)
		}
		return nil
	})
}

// sdkRemoval removes somebody from one of two rooms: the other goes on, and a
// stock client is cut and refused.
func (w *world) sdkRemoval(t *testing.T) {
	owner, p := w.addUser("r-owner"), w.addUser("r-removed")
	for _, room := range []bus.RoomID{"r-kept", "r-lost"} {
		w.addRoom(room, owner, kv.RoomOptions{})
		w.join(room, p, bus.Writer)
	}
	heard := map[bus.RoomID]chan struct{}{"r-kept": make(chan struct{}, 1000), "r-lost": make(chan struct{}, 1000)}
	rooms := make(chan []bus.RoomGrant, 64)
	conn := w.dial(t, p, func(cfg *sdk.DialConfig) { cfg.OnRooms = func(g []bus.RoomGrant) { rooms <- g } })
	for room := range heard {
		if _, err := conn.Subscribe(room, func(m sdk.Message) { heard[m.Room] <- struct{}{} }); err != nil {
			t.Fatal(err)
		}
	}
	w.must2(t, conn.Flush(t.Context()))
	says := w.dial(t, owner, nil)
	reaches := func(room bus.RoomID) bool {
		w.must2(t, says.Publish(t.Context(), room, "x", []byte("x")))
		select {
		case <-heard[room]:
			return true
		case <-time.After(300 * time.Millisecond):
			return false
		}
	}
	for room := range heard {
		if !reaches(room) {
			t.Fatalf("%s is deaf before", room)
		}
	}
	// A stock client in the room that will be lost.
	raw := exec.Command(cluster.NatsCLI(t), "--server", w.NATSURL(1), "--nkey", p.seedFile(t), "--tlsca", w.CA(), "--inbox-prefix", bus.InboxPrefix(p.key), "sub", "room.r-lost.>")
	var said lockedBuffer
	raw.Stdout, raw.Stderr = &said, &said
	w.must2(t, raw.Start())
	t.Cleanup(func() { _ = raw.Process.Kill(); _ = raw.Wait() })
	cluster.WaitFor(t, 10*time.Second, "the stock client to hear", func() error {
		w.must2(t, says.Publish(t.Context(), "r-lost", "x", []byte("to the stock client")))
		if !strings.Contains(said.String(), "to the stock client") {
			return fmt.Errorf("it says %q", said.String())
		}
		return nil
	})

	if _, err := w.store.RemoveMember(t.Context(), "r-lost", p.key); err != nil {
		t.Fatal(err)
	}
	before := strings.Count(said.String(), "after the removal")
	cluster.WaitFor(t, 5*time.Second, "the kept room to go on", func() error {
		if !reaches("r-kept") {
			return fmt.Errorf("deaf, %s", conn.Status())
		}
		return nil
	})
	for len(heard["r-lost"]) > 0 {
		<-heard["r-lost"]
	}
	for range 5 {
		w.must2(t, says.Publish(t.Context(), "r-lost", "x", []byte("after the removal")))
	}
	if reaches("r-lost") {
		t.Error("the lost room is heard")
	}
	cluster.WaitFor(t, 10*time.Second, "the stock client to be refused", func() error {
		if !strings.Contains(strings.ToLower(said.String()), "permissions violation") {
			return fmt.Errorf("it says %q", said.String())
		}
		return nil
	})
	if n := strings.Count(said.String(), "after the removal"); n != before {
		t.Errorf("the stock client heard %d messages after the removal", n)
	}
	cluster.WaitFor(t, 5*time.Second, "the rooms to be known", func() error {
		if r := conn.Rooms(); len(r) != 1 || r[0].Room != "r-kept" {
			return fmt.Errorf("%v", r)
		}
		return nil
	})
}

// sdkRefused suspends somebody: the program goes on trying, says so, and is back
// when they are let in again.
func (w *world) sdkRefused(t *testing.T) {
	p := w.addUser("s-suspended")
	conn := w.dial(t, p, nil)
	if _, err := w.store.SuspendUser(t.Context(), p.key); err != nil {
		t.Fatal(err)
	}
	status := func(want sdk.Status) {
		t.Helper()
		cluster.WaitFor(t, 15*time.Second, "status "+string(want), func() error {
			if s := conn.Status(); s != want {
				return fmt.Errorf("%s", s)
			}
			return nil
		})
	}
	status(sdk.Refused)
	cluster.Hold(t, 3*time.Second, "it stays refused", func() error { // two refusals end a stock client
		if s := conn.Status(); s == sdk.Connected || s == sdk.Closed || s == sdk.Revoked {
			return fmt.Errorf("%s", s)
		}
		return nil
	})
	if _, err := w.store.ResumeUser(t.Context(), p.key); err != nil {
		t.Fatal(err)
	}
	status(sdk.Connected)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := sdk.Dial(ctx, sdk.DialConfig{URLs: []string{w.NATSURL(1)}, TLS: w.trust, Identity: newPerson(t, "nobody")}); bus.CodeOf(err) != bus.Unauthenticated {
		t.Errorf("a stranger: %v", err)
	}
}

// sdkRevoked revokes people who are connected: their programs are refused, and
// those that have heard that it is for good, as good as all, give up and say so.
func (w *world) sdkRevoked(t *testing.T) {
	const people = 9
	var conns []*sdk.Conn
	for n := range people {
		p := w.addUser(fmt.Sprintf("v-revoked-%d", n))
		conns = append(conns, w.dial(t, p, func(cfg *sdk.DialConfig) { cfg.URLs = []string{w.NATSURL(n%3 + 1)} }))
		if _, err := w.store.RevokeUser(t.Context(), p.key); err != nil {
			t.Fatal(err)
		}
	}
	var gaveUp []int
	for n, c := range conns {
		cluster.WaitFor(t, 15*time.Second, "the program to be refused", func() error {
			if s := c.Status(); s != sdk.Revoked && s != sdk.Refused {
				return fmt.Errorf("%s", s)
			}
			return nil
		})
		if c.Status() != sdk.Revoked {
			continue
		}
		gaveUp = append(gaveUp, n)
		if err := c.Publish(t.Context(), "any", "x", nil); bus.CodeOf(err) != bus.Unauthenticated {
			t.Errorf("published: %v", err)
		}
	}
	t.Logf("%d of %d programs gave up: %v", len(gaveUp), people, gaveUp)
	if len(gaveUp) < people-2 { // a machine that is busy loses one now and then
		t.Errorf("only %v of %d have heard that it is for good", gaveUp, people)
	}
}

// sdkDeadServer kills the server under a program that publishes: Publish waits
// for the next one.
func (w *world) sdkDeadServer(t *testing.T) {
	p := w.addUser("d-speaker")
	w.addRoom("d-room", p, kv.RoomOptions{})
	var heard atomic.Int64
	conn := w.dial(t, p, nil)
	if _, err := conn.Subscribe("d-room", func(sdk.Message) { heard.Add(1) }); err != nil {
		t.Fatal(err)
	}
	w.must2(t, conn.Flush(t.Context()))
	w.addRoom("d-more", p, kv.RoomOptions{}) // the connection that is killed is not the first one
	had := heard.Load()
	cluster.WaitFor(t, 5*time.Second, "the new room", func() error {
		w.must2(t, conn.Publish(t.Context(), "d-more", "x", nil))
		w.must2(t, conn.Publish(t.Context(), "d-room", "x", nil))
		if len(conn.Rooms()) != 2 || heard.Load() == had {
			return fmt.Errorf("rooms %v", conn.Rooms())
		}
		return nil
	})
	for i := range w.Nodes() {
		w.Kill(i+1, cluster.NATS)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		for range 50 {
			w.must2(t, conn.Publish(ctx, "d-room", "x", nil))
		}
		w.must2(t, conn.Flush(ctx))
		cancel()
		w.StartNode(i+1, cluster.NATS)
		w.WaitHealthy(time.Minute)
	}
	before := heard.Load()
	w.must2(t, conn.Publish(t.Context(), "d-room", "x", nil))
	cluster.WaitFor(t, 10*time.Second, "the subscription to be there", func() error {
		if heard.Load() == before {
			return fmt.Errorf("deaf, %s", conn.Status())
		}
		return nil
	})
}
