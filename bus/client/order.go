package client

import (
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"unibus.internal/bus"
)

const (
	// holdTime is how long a message waits for those that its sender sent before it
	// and has not given up: longer than a sender takes to repeat, through several
	// elections in a row, what dying nodes have swallowed. On a machine with seven
	// times as much to do as it could, that was 49 s. Only a sender who ended
	// meanwhile is waited for in vain.
	holdTime = 90 * time.Second
	// What one sender can have a subscription remember.
	maxSessions = 8
	maxHeld     = 1024
	maxSkipped  = 4096
)

// place is where a message stands in its sender's session: see bus.OrderHeader.
type place struct {
	session string
	n, base uint64
}

func (p place) header() string {
	return p.session + " " + strconv.FormatUint(p.n, 10) + " " + strconv.FormatUint(p.base, 10)
}

func placeOf(header string) (place, bool) {
	f := strings.Split(header, " ")
	if len(f) != 3 || f[0] == "" || len(f[0]) > 64 {
		return place{}, false
	}
	n, err1 := strconv.ParseUint(f[1], 10, 62)
	base, err2 := strconv.ParseUint(f[2], 10, 62)
	return place{f[0], n, base}, err1 == nil && err2 == nil && n > 0 && base > 0 && base <= n
}

// order brings the messages of each sender back into the order in which they
// were sent, when several were under way at once and a node died meanwhile, and
// drops what a sender repeated after the stream had forgotten its id. What one
// sender writes into the headers delays and drops that sender's messages only.
// It is not safe for concurrent use.
type order struct {
	senders map[bus.UserKey]*sender
	hand    func(Message)
	stats   *HearingStats
}

type sender struct {
	sessions []*session // the one used last is the last
	held     int
}

type session struct {
	id      string
	next    uint64              // the next to hand on
	held    map[uint64]Message  // beyond next
	skipped map[uint64]struct{} // before next, and not handed on: given up, or waited for in vain
	waiting []waiting           // what is held, and some that is no more, in the order in which it came
}

// waiting says until when a message is held at most.
type waiting struct {
	n     uint64
	until time.Time
}

// first is what has waited longest; false: nothing waits. A hole that is filled
// while there are others must not count for those: with many messages under way
// something waits all the time.
func (s *session) first() (waiting, bool) {
	for len(s.waiting) > 0 {
		if _, ok := s.held[s.waiting[0].n]; ok {
			return s.waiting[0], true
		}
		s.waiting = s.waiting[1:]
	}
	s.waiting = nil
	return waiting{}, false
}

func (s *session) hold(m Message, n uint64, until time.Time) {
	if len(s.waiting) >= 2*maxHeld { // behind one that waits long
		s.waiting = slices.DeleteFunc(s.waiting, func(w waiting) bool { _, ok := s.held[w.n]; return !ok })
	}
	s.held[n] = m
	s.waiting = append(s.waiting, waiting{n, until})
}

func newOrder(hand func(Message), stats *HearingStats) *order {
	return &order{senders: map[bus.UserKey]*sender{}, hand: hand, stats: stats}
}

// of finds a message's session, or begins one behind what its sender says is
// decided.
func (o *order) of(m Message, p place) (*sender, *session) {
	s := o.senders[m.Sender]
	if s == nil {
		s = &sender{}
		o.senders[m.Sender] = s
	}
	for i, known := range s.sessions {
		if known.id == p.session {
			s.sessions = append(append(s.sessions[:i:i], s.sessions[i+1:]...), known)
			return s, known
		}
	}
	if len(s.sessions) == maxSessions {
		oldest := s.sessions[0]
		o.release(s, oldest, math.MaxUint64)
		s.sessions = s.sessions[1:]
	}
	begun := &session{id: p.session, next: p.base, held: map[uint64]Message{}, skipped: map[uint64]struct{}{}}
	s.sessions = append(s.sessions, begun)
	return s, begun
}

// saw takes note of a message that is older than what is to be handed on.
func (o *order) saw(m Message) {
	p, ok := placeOf(m.Header.Get(bus.OrderHeader))
	if !ok {
		return
	}
	if _, s := o.of(m, p); p.n >= s.next {
		s.skip(p.n)
		s.next = p.n + 1
		return
	} else {
		delete(s.skipped, p.n)
	}
}

// take takes the next message of the room's stream.
func (o *order) take(m Message, now time.Time) {
	p, ok := placeOf(m.Header.Get(bus.OrderHeader))
	if !ok {
		o.hand(m)
		return
	}
	who, s := o.of(m, p)
	if p.n < s.next {
		if _, missed := s.skipped[p.n]; !missed {
			o.stats.Duplicates++
			return
		}
		delete(s.skipped, p.n) // late is better than never
		o.stats.Late++
		o.hand(m)
		return
	}
	if _, twice := s.held[p.n]; twice {
		o.stats.Duplicates++
		return
	}
	o.advance(who, s, p.base)
	if p.n > s.next {
		if who.held >= maxHeld {
			o.release(who, s, math.MaxUint64)
		}
		if p.n > s.next {
			s.hold(m, p.n, now.Add(holdTime))
			who.held++
			o.stats.Reordered++
			return
		}
	}
	if p.n < s.next { // what was released went beyond it
		delete(s.skipped, p.n)
		o.stats.Late++
		o.hand(m)
		return
	}
	o.hand(m)
	s.next++
	o.follow(who, s)
}

// advance gives up what the sender says is decided and did not come.
func (o *order) advance(who *sender, s *session, base uint64) {
	for s.next < base {
		if _, ok := s.held[s.next]; ok {
			o.follow(who, s)
			continue
		}
		to := base
		for n := range s.held {
			to = min(to, n)
		}
		s.skip(to)
		s.next = to
	}
	o.follow(who, s)
}

// skip marks what lies between next and n as not handed on, as far as that can
// be remembered.
func (s *session) skip(n uint64) {
	for from := max(s.next, n-min(n, maxSkipped)); from < n; from++ {
		if len(s.skipped) >= maxSkipped {
			clear(s.skipped)
		}
		s.skipped[from] = struct{}{}
	}
}

// follow hands on what has become next.
func (o *order) follow(who *sender, s *session) {
	for {
		m, ok := s.held[s.next]
		if !ok {
			return
		}
		delete(s.held, s.next)
		who.held--
		s.next++
		o.hand(m)
	}
}

// release hands on what a session holds, up to one message.
func (o *order) release(who *sender, s *session, last uint64) {
	for len(s.held) > 0 && s.next <= last {
		first := uint64(0)
		for n := range s.held {
			if first == 0 || n < first {
				first = n
			}
		}
		s.skip(first)
		s.next = first
		o.follow(who, s)
	}
}

// expire hands on what has waited long enough, and says when to ask again; zero:
// nothing waits.
func (o *order) expire(now time.Time) (next time.Time) {
	for _, who := range o.senders {
		if who.held == 0 {
			continue
		}
		for _, s := range who.sessions {
			w, ok := s.first()
			for ok && !now.Before(w.until) {
				o.release(who, s, w.n)
				w, ok = s.first()
			}
			if ok && (next.IsZero() || w.until.Before(next)) {
				next = w.until
			}
		}
	}
	return next
}
