package seal

import (
	"sync"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

const (
	// windowSize is how far behind the newest message of a session one may come
	// and be told from a replay; what is older is taken for one.
	windowSize = 1024
	// maxSessions are remembered per sender. A session is named under the
	// sender's signature, so only a sender can use them up, and only their own.
	maxSessions = 64
)

// Order is how a message stands to those that came before.
type Order struct {
	Missing uint64 // so many of the same session, just before this one, have not come
	Late    bool   // one that was sent after it has come before it
}

// Tracker remembers what one reader has seen of a room. It is as good as its
// memory: a reader that starts anew can be shown old messages as if they were
// new, and tells them only by their time. The first message of a session may
// have any number: who joins late has missed nothing.
type Tracker struct {
	mu      sync.Mutex
	senders map[bus.UserKey]*sessions
}

type sessions struct {
	seen      map[Session]*window
	forgotten time.Time // sessions that were not heard of after this are forgotten
}

type window struct {
	highest uint64
	bits    [windowSize / 64]uint64
	last    time.Time // the newest SentAt
}

// NewTracker remembers nothing yet.
func NewTracker() *Tracker { return &Tracker{senders: map[bus.UserKey]*sessions{}} }

// See takes note of a message that was opened. Conflict: it came before, or is
// so old that this cannot be excluded.
func (t *Tracker) See(sender bus.UserKey, m Message) (Order, error) {
	if guard.Off(guard.Replay) {
		return Order{}, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.senders[sender]
	if s == nil {
		s = &sessions{seen: map[Session]*window{}}
		t.senders[sender] = s
	}
	w := s.seen[m.Session]
	if w == nil {
		if !m.SentAt.After(s.forgotten) {
			return Order{}, replayed(sender, m)
		}
		s.makeRoom()
		w = &window{highest: m.Counter, last: m.SentAt}
		w.mark(m.Counter)
		s.seen[m.Session] = w
		return Order{}, nil
	}
	if m.SentAt.After(w.last) {
		w.last = m.SentAt
	}
	switch {
	case m.Counter > w.highest:
		missing := m.Counter - w.highest - 1
		w.advance(m.Counter)
		return Order{Missing: missing}, nil
	case w.highest-m.Counter >= windowSize, w.marked(m.Counter):
		return Order{}, replayed(sender, m)
	}
	w.mark(m.Counter)
	return Order{Late: true}, nil
}

func replayed(sender bus.UserKey, m Message) error {
	return bus.E(bus.Conflict, "message %d of %s has come before", m.Counter, sender)
}

// makeRoom forgets the session that was quiet for longest.
func (s *sessions) makeRoom() {
	if len(s.seen) < maxSessions {
		return
	}
	var oldest Session
	first := true
	for id, w := range s.seen {
		if first || w.last.Before(s.seen[oldest].last) {
			oldest, first = id, false
		}
	}
	if last := s.seen[oldest].last; last.After(s.forgotten) {
		s.forgotten = last
	}
	delete(s.seen, oldest)
}

func (w *window) at(n uint64) (*uint64, uint64) {
	i := n % windowSize
	return &w.bits[i/64], 1 << (i % 64)
}

func (w *window) mark(n uint64) {
	word, bit := w.at(n)
	*word |= bit
}

func (w *window) marked(n uint64) bool {
	word, bit := w.at(n)
	return *word&bit != 0
}

func (w *window) advance(to uint64) {
	if to-w.highest >= windowSize {
		clear(w.bits[:])
	} else {
		for n := w.highest + 1; n < to; n++ {
			word, bit := w.at(n)
			*word &^= bit
		}
	}
	w.highest = to
	w.mark(to)
}
