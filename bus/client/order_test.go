package client

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
)

func placed(session string, n, base uint64) Message {
	return Message{Header: nats.Header{bus.OrderHeader: {place{session, n, base}.header()}}, Seq: n}
}

// Several messages that were under way at once come in the order in which they
// were sent; what is repeated comes once; what never comes is waited for until
// the sender has decided, or for a while; and what comes after that comes late.
func TestOrder(t *testing.T) {
	t0 := time.Unix(1e9, 0)
	type step struct {
		n, base uint64
		after   time.Duration
	}
	for name, c := range map[string]struct {
		steps      []step
		want       []uint64
		duplicates int
		late       int
	}{
		"in order":               {[]step{{1, 1, 0}, {2, 2, 0}, {3, 3, 0}}, []uint64{1, 2, 3}, 0, 0},
		"swapped":                {[]step{{2, 1, 0}, {1, 1, 0}, {3, 1, 0}}, []uint64{1, 2, 3}, 0, 0},
		"the last first":         {[]step{{4, 1, 0}, {3, 1, 0}, {2, 1, 0}, {1, 1, 0}}, []uint64{1, 2, 3, 4}, 0, 0},
		"repeated":               {[]step{{1, 1, 0}, {1, 1, 0}, {2, 1, 0}, {1, 1, 0}}, []uint64{1, 2}, 2, 0},
		"repeated while held":    {[]step{{2, 1, 0}, {2, 1, 0}, {1, 1, 0}}, []uint64{1, 2}, 1, 0},
		"given up":               {[]step{{3, 1, 0}, {4, 3, 0}}, []uint64{3, 4}, 0, 0},
		"given up and late":      {[]step{{1, 1, 0}, {3, 3, 0}, {2, 2, 0}}, []uint64{1, 3, 2}, 0, 1},
		"waited for in vain":     {[]step{{1, 1, 0}, {3, 2, 0}, {4, 2, holdTime}, {5, 2, 0}}, []uint64{1, 3, 4, 5}, 0, 0},
		"one hole after another": {[]step{{2, 1, 0}, {4, 1, holdTime - 1}, {1, 1, 0}, {3, 1, 2}}, []uint64{1, 2, 3, 4}, 0, 0},
		"each for itself":        {[]step{{3, 1, 0}, {5, 1, holdTime / 2}, {4, 1, holdTime / 2}}, []uint64{3, 4, 5}, 0, 0},
		"from the middle":        {[]step{{8, 7, 0}, {7, 7, 0}, {9, 9, 0}}, []uint64{7, 8, 9}, 0, 0},
		"a gap beyond counting":  {[]step{{1, 1, 0}, {1 << 60, 1 << 60, 0}}, []uint64{1, 1 << 60}, 0, 0},
	} {
		var got []uint64
		stats := HearingStats{}
		o, now := newOrder(func(m Message) { got = append(got, m.Seq) }, &stats), t0
		for _, s := range c.steps {
			now = now.Add(s.after)
			o.expire(now)
			o.take(placed("s", s.n, s.base), now)
		}
		o.expire(now.Add(holdTime))
		if !slices.Equal(got, c.want) || int(stats.Duplicates) != c.duplicates || int(stats.Late) != c.late {
			t.Errorf("%s: %v %+v, want %v", name, got, stats, c.want)
		}
	}
}

// Whatever a sender writes, what is remembered of them is bounded, and nothing
// that came is kept back for ever.
func TestOrderHostile(t *testing.T) {
	handed := 0
	stats := HearingStats{}
	o, now := newOrder(func(Message) { handed++ }, &stats), time.Unix(1e9, 0)
	const sent = 20_000
	r := rand.New(rand.NewPCG(1, 2))
	for i := range sent {
		n := r.Uint64N(1 << r.UintN(61))
		m := placed(fmt.Sprint(r.IntN(20)), n+1, r.Uint64N(n+1)+1)
		if i%97 == 0 {
			m.Header.Set(bus.OrderHeader, "x 1 2 3")
		}
		o.take(m, now)
		who := o.senders[bus.UserKey{}]
		if who == nil {
			continue
		}
		skipped, waiting := 0, 0
		for _, s := range who.sessions {
			skipped, waiting = skipped+len(s.skipped), waiting+len(s.waiting)
		}
		if len(who.sessions) > maxSessions || who.held > maxHeld || waiting > maxSessions*(2*maxHeld+1) || skipped > maxSessions*maxSkipped {
			t.Fatalf("%d sessions, %d held, %d waiting, %d skipped", len(who.sessions), who.held, waiting, skipped)
		}
	}
	o.expire(now.Add(holdTime))
	if handed+int(stats.Duplicates) != sent || o.senders[bus.UserKey{}].held != 0 {
		t.Errorf("%d handed on, %d dropped as known, of %d", handed, stats.Duplicates, sent)
	}
}

// What the feed has brought is not asked for: neither when a tip has overtaken
// it, nor when it came while something else was fetched.
func TestDrain(t *testing.T) {
	var heard []uint64
	h := &Hearing{feed: make(chan Message, aheadMessages), tips: make(chan uint64, 1)}
	a := &assembly{h: h, next: 5, known: 4, ahead: map[uint64]Message{}}
	a.order = newOrder(func(m Message) { heard = append(heard, m.Seq) }, &a.stats)
	for seq := uint64(5); seq <= 9; seq++ {
		h.feed <- Message{Seq: seq}
	}
	h.tip(8)
	if a.drain(); a.missing() || len(heard) != 5 {
		t.Errorf("of what has come, %v is heard; something is missing: %v", heard, a.missing())
	}
	h.feed <- Message{Seq: 12}
	h.tip(14)
	if a.drain(); !a.missing() || a.next != 10 || a.known != 14 || len(a.ahead) != 1 {
		t.Errorf("behind a gap: %+v", a)
	}
}
