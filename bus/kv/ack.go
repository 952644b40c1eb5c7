package kv

import (
	"cmp"
	"encoding/json"
	"slices"
	"sync"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// AckSubject is where one boot acknowledges; AckSubjects is what writers hear.
const (
	ackPrefix   = "unibus.ack."
	AckSubjects = ackPrefix + "*.*"
)

// ackMessage says that a boot's View holds a key at a revision, or at a newer
// one. Created tells streams of one name apart that were made again.
type ackMessage struct {
	V        int       `json:"v"`
	Instance string    `json:"instance"`
	Boot     string    `json:"boot"`
	Stream   string    `json:"stream"`
	Created  time.Time `json:"created"`
	Key      string    `json:"key"`
	Revision uint64    `json:"revision"`
	Enforced
}

// Enforced is what whoever enforces a change says of it. Every instance closes
// the same connections, so the largest count of them is the number, not the
// sum: who acts first counts all, the others what was left.
type Enforced struct {
	Closed   int  `json:"closed,omitempty"`   // connections that the servers have closed for it
	Unproven bool `json:"unproven,omitempty"` // a server did not say that it closed one, or it could not be judged which
}

// Hold marks a decision about one user as being in flight. Take it before
// reading the View and release it when the decision can have no further
// effect: acknowledgements of changes that arrive meanwhile wait for it, and
// with them the writer.
type Hold struct {
	state   *holdState
	view    *View
	user    bus.UserKey
	once    sync.Once
	waiting []*pendingAck // guarded by state.mu
}

// holdState has its own lock, taken after View.mu.
type holdState struct {
	mu   sync.Mutex
	open map[bus.UserKey]map[*Hold]struct{}
}

// pendingAck waits for left to be zero: one for the View itself, let go by
// settle, and one for each hold.
type pendingAck struct {
	change  Change
	created time.Time
	left    int
	unheld  bool // settled: guarded by state.mu
	outcome Enforced
}

func (s *holdState) init() { s.open = map[bus.UserKey]map[*Hold]struct{}{} }

// Hold begins a decision about user.
func (v *View) Hold(user bus.UserKey) *Hold {
	h := &Hold{state: &v.holds, view: v, user: user}
	v.holds.mu.Lock()
	defer v.holds.mu.Unlock()
	if v.holds.open[user] == nil {
		v.holds.open[user] = map[*Hold]struct{}{}
	}
	v.holds.open[user][h] = struct{}{}
	return h
}

// Release ends the decision. It may be called more than once.
func (h *Hold) Release() {
	h.once.Do(func() {
		h.state.mu.Lock()
		delete(h.state.open[h.user], h)
		if len(h.state.open[h.user]) == 0 {
			delete(h.state.open, h.user)
		}
		var free []*pendingAck
		for _, p := range h.waiting {
			if p.left--; p.left == 0 {
				free = append(free, p)
			}
		}
		h.state.mu.Unlock()
		h.view.acknowledge(free)
	})
}

// pendingFor makes an acknowledgement per change and lets it wait for each hold
// that is open now and concerns it, and for settle. It is called with View.mu
// held, right after the table changed: a hold taken later reads the new state.
func (s *holdState) pendingFor(changes []Change, created time.Time) []*pendingAck {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*pendingAck, 0, len(changes))
	for _, c := range changes {
		p := &pendingAck{change: c, created: created, left: 1}
		wait := func(hs map[*Hold]struct{}) {
			for h := range hs {
				h.waiting = append(h.waiting, p)
				p.left++
			}
		}
		if c.User != (bus.UserKey{}) {
			wait(s.open[c.User])
		} else { // a room, or a key of nobody: it may concern everyone in flight
			for _, hs := range s.open {
				wait(hs)
			}
		}
		out = append(out, p)
	}
	return out
}

// settle lets go of the View's own reason to wait, once, and returns those
// that nothing holds back any more.
func (s *holdState) settle(acks ...*pendingAck) (free []*pendingAck) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range acks {
		if p.unheld {
			continue
		}
		p.unheld = true
		if p.left--; p.left == 0 {
			free = append(free, p)
		}
	}
	return free
}

// enforced is settle with the word of whoever enforces changes; the first one
// counts.
func (s *holdState) enforced(p *pendingAck, e Enforced) []*pendingAck {
	s.mu.Lock()
	if !p.unheld {
		p.outcome = e
	}
	s.mu.Unlock()
	return s.settle(p)
}

// changed tells whoever enforces changes, in the order of each stream, and
// acknowledges each when they have done so and no decision holds it back.
// Without anybody to tell, that is now.
func (v *View) changed(acks []*pendingAck) {
	if v.cfg.OnChange == nil {
		v.acknowledge(v.holds.settle(acks...))
		return
	}
	for _, p := range acks {
		v.cfg.OnChange(p.change, func(e Enforced) { v.acknowledge(v.holds.enforced(p, e)) })
	}
}

// acknowledge sends what nothing holds back. A lost one costs the writer the
// wait for our lease, never correctness.
func (v *View) acknowledge(acks []*pendingAck) {
	if v.cfg.Lease == 0 {
		return
	}
	for _, p := range acks {
		if p.change.Revision == 0 { // a key that is gone
			continue
		}
		value, err := json.Marshal(ackMessage{
			V: 1, Instance: v.Instance(), Boot: v.boot, Stream: StreamName(p.change.Bucket),
			Created: p.created, Key: p.change.Key, Revision: p.change.Revision, Enforced: p.outcome,
		})
		if err == nil {
			err = v.cfg.Conn.Publish(ackPrefix+v.Instance()+"."+v.boot, value)
		}
		if err != nil {
			v.log.Warn("acknowledgement not sent; the writer waits for our lease", "key", p.change.Key, "err", err)
		}
	}
}

// holdersAt lists the boots that may still decide on the state before the
// change at sequence seq of stream i, made at stream time at. It looks at all
// three streams, because a stream that was made again has forgotten who holds
// a lease. It needs mu.
func (v *View) holdersAt(i int, seq uint64, at time.Time) []Holder {
	if guard.Off(guard.AckWait) {
		return nil
	}
	var out []Holder
	for _, h := range v.known {
		if h.seen[i].first > seq && !h.seenBefore(at) {
			continue // its first barrier came after the change, so it loaded the change
		}
		if h.leasedAt(at) {
			out = append(out, h.public())
		}
	}
	sortHolders(out)
	return out
}

// seenBefore tells a boot that was already there when its stream was made
// again from one that has just started.
func (h *holder) seenBefore(at time.Time) bool {
	return slices.ContainsFunc(h.seen[:], func(s sighting) bool { return !s.firstAt.IsZero() && s.firstAt.Before(at) })
}

func sortHolders(hs []Holder) {
	slices.SortFunc(hs, func(a, b Holder) int {
		return cmp.Or(cmp.Compare(a.Instance, b.Instance), cmp.Compare(a.Boot, b.Boot))
	})
}
