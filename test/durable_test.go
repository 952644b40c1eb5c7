package test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// durable is a number of programs that speak and listen in durable rooms while
// nodes fail.
type durable struct {
	*world
	rooms      []bus.RoomID
	speakers   []*speaker
	listeners  []*roomListener
	background sync.WaitGroup
}

// speaker sends numbers into a room, several at once.
type speaker struct {
	p    *person
	room *sdk.Room
	sent uint64 // handed to Send
	kept atomic.Uint64
	slow atomic.Int64 // the longest time to an answer, in ns
}

// roomListener hears a room and remembers what each speaker has said.
type roomListener struct {
	hearing *sdk.Hearing

	mu      sync.Mutex
	heard   map[bus.UserKey][]uint64
	last    time.Time
	longest time.Duration // without a message
}

// TestDurable has programs speak in durable rooms, several messages at once,
// while servers and services are killed, paused and stopped one node at a time:
// each message that was sent is heard by each listener once, and those of one
// speaker in their order.
func TestDurable(t *testing.T) {
	t.Parallel()
	rooms, people, length := 2, 3, 30*time.Second
	if full {
		rooms, people, length = 10, 20, 10*time.Minute
	}
	w := newWorld(t, cluster.Options{})
	d := &durable{world: w}
	d.seed(t, rooms, people)
	speaking, stop := context.WithCancel(t.Context())
	for _, s := range d.speakers {
		d.background.Go(func() { s.speak(t, speaking, 2*time.Millisecond*time.Duration(len(d.speakers))) })
	}
	d.faults(t, length)
	stop()
	d.background.Wait()
	d.check(t)
}

func (d *durable) seed(t *testing.T, rooms, people int) {
	for n := range rooms {
		id := bus.RoomID(fmt.Sprintf("d-%d", n))
		d.addRoom(id, d.admin, kv.RoomOptions{Durable: true, Retention: bus.Retention{MaxBytes: 256 << 20}})
		d.rooms = append(d.rooms, id)
	}
	for n := range people {
		p := d.addUser(fmt.Sprintf("speaker-%d", n))
		id := d.rooms[n%rooms]
		d.join(id, p, bus.Writer)
		d.speakers = append(d.speakers, &speaker{p: p, room: d.enter(t, p, id)})
		q := d.addUser(fmt.Sprintf("hearer-%d", n))
		d.join(id, q, bus.Reader)
		l := &roomListener{heard: map[bus.UserKey][]uint64{}}
		var err error
		if l.hearing, err = d.enter(t, q, id).Subscribe(t.Context(), sdk.Hear{}, l.hear); err != nil {
			t.Fatal(err)
		}
		d.listeners = append(d.listeners, l)
	}
}

// enter is a room as somebody uses it over a connection of their own.
func (w *world) enter(t *testing.T, p *person, id bus.RoomID) *sdk.Room {
	t.Helper()
	conn := w.dial(t, p, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	room, err := conn.Room(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	return room
}

func (s *speaker) speak(t *testing.T, ctx context.Context, every time.Duration) {
	var answers sync.WaitGroup
	defer answers.Wait()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.sent++
		begun := time.Now()
		// It goes on when the speaking ends: each of them is to be stored.
		sending := s.room.Send(context.WithoutCancel(ctx), sdk.Outgoing{Topic: "n", Data: binary.BigEndian.AppendUint64(nil, s.sent)})
		answers.Go(func() {
			select {
			case <-sending.Done():
			case <-time.After(2 * time.Minute):
				t.Errorf("%s: a message is not stored after 2 min", s.p.name)
				return
			}
			if _, err := sending.Wait(ctx); err != nil {
				t.Errorf("%s: %v", s.p.name, err)
				return
			}
			s.kept.Add(1)
			took := int64(time.Since(begun))
			for {
				known := s.slow.Load()
				if took <= known || s.slow.CompareAndSwap(known, took) {
					return
				}
			}
		})
	}
}

func (l *roomListener) hear(m sdk.Message) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if !l.last.IsZero() {
		l.longest = max(l.longest, now.Sub(l.last))
	}
	l.last = now
	l.heard[m.Sender] = append(l.heard[m.Sender], binary.BigEndian.Uint64(m.Data))
}

// faults breaks one node after the other, each in turn in another way.
func (d *durable) faults(t *testing.T, length time.Duration) {
	ways := []struct {
		name string
		fail func(i int)
	}{
		{"kill the server", func(i int) { d.Kill(i, cluster.NATS); hold(t.Context(), 2*time.Second); d.StartNode(i, cluster.NATS) }},
		{"kill membership", func(i int) {
			d.Kill(i, cluster.Membership)
			hold(t.Context(), time.Second)
			d.StartNode(i, cluster.Membership)
		}},
		{"pause the server", func(i int) { d.Pause(i, cluster.NATS); hold(t.Context(), 6*time.Second); d.Resume(i, cluster.NATS) }},
		{"stop the node", func(i int) { d.Term(i); hold(t.Context(), time.Second); d.StartNode(i) }},
		{"pause membership", func(i int) {
			d.Pause(i, cluster.Membership)
			hold(t.Context(), 4*time.Second)
			d.Resume(i, cluster.Membership)
		}},
		{"kill the node", func(i int) { d.Kill(i); hold(t.Context(), 2*time.Second); d.StartNode(i) }},
	}
	lameDuck := func(i int) { // takes half a minute
		if err := syscall.Kill(d.PID(i, cluster.NATS), syscall.SIGUSR2); err != nil {
			t.Fatal(err)
		}
		cluster.WaitFor(t, 90*time.Second, "a lame duck to stop", func() error {
			if d.Alive(i, cluster.NATS) {
				return errors.New("it is there")
			}
			return nil
		})
		d.StartNode(i, cluster.NATS)
	}
	if full {
		ways = append(ways, struct {
			name string
			fail func(i int)
		}{"lame duck", lameDuck})
	}
	begun := time.Now()
	for n := 0; n < len(ways) || time.Since(begun) < length; n++ {
		way, node := ways[n%len(ways)], 1+rand.IntN(3)
		t.Logf("%s: %s on n%d", time.Since(begun).Round(time.Second), way.name, node)
		way.fail(node)
		d.WaitHealthy(90*time.Second, d.Nodes()...)
	}
}

// check compares what was sent with what was heard.
func (d *durable) check(t *testing.T) {
	var sent, fetched, reordered, repeats uint64
	var slowest time.Duration
	for _, s := range d.speakers {
		sent += s.sent
		slowest = max(slowest, time.Duration(s.slow.Load()))
		if s.kept.Load() != s.sent {
			t.Errorf("%s: %d of %d messages are stored", s.p.name, s.kept.Load(), s.sent)
		}
		want := make([]uint64, s.sent)
		for n := range want {
			want[n] = uint64(n + 1)
		}
		for n, l := range d.listeners {
			if d.rooms[n%len(d.rooms)] != s.room.ID() {
				continue
			}
			cluster.WaitFor(t, time.Minute, fmt.Sprintf("listener %d to hear all of %s", n, s.p.name), func() error {
				l.mu.Lock()
				defer l.mu.Unlock()
				if got := l.heard[s.p.key]; len(got) < len(want) {
					return fmt.Errorf("%d of %d, %+v", len(got), len(want), l.hearing.Stats())
				}
				return nil
			})
			l.mu.Lock()
			got := slices.Clone(l.heard[s.p.key])
			l.mu.Unlock()
			if !slices.Equal(got, want) {
				i := 0
				for i < min(len(got), len(want)) && got[i] == want[i] {
					i++
				}
				t.Errorf("listener %d heard %d messages of %s, which sent %d; from %d on they differ: %v", n, len(got), s.p.name, len(want), i, got[i:min(len(got), i+10)])
			}
		}
	}
	var gap time.Duration
	for _, l := range d.listeners {
		st := l.hearing.Stats()
		fetched, reordered, repeats = fetched+st.Fetched, reordered+st.Reordered, repeats+st.Duplicates
		l.mu.Lock()
		gap = max(gap, l.longest)
		l.mu.Unlock()
		if st.Lost+st.Late > 0 {
			t.Errorf("a listener: %+v", st)
		}
	}
	t.Logf("%d messages sent by %d, heard by %d in %d rooms: none lost, none twice, in order; longest silence %s, slowest answer %s; fetched %d, put in order %d, dropped as known %d",
		sent, len(d.speakers), len(d.listeners), len(d.rooms), gap.Round(time.Millisecond), slowest.Round(time.Millisecond), fetched, reordered, repeats)
}
