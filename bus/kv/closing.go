package kv

import (
	"context"
	"sync"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/sys"
)

// This file is the second half of a proof. That nobody decides on the state
// before a change any more says nothing about connections that were opened on
// it: the authcallouts close those, and whoever made the change asks every
// server whether they have, and closes what is left.

// sweepPatience is how long a change waits for the servers' lists, and again for
// what it closes itself. A server that is gone costs a change this much.
const sweepPatience = 2 * time.Second

// kicksAtOnce bounds the requests in flight when a whole room is closed.
const kicksAtOnce = 64

// rosterAge is how long it is believed which servers there are.
const rosterAge = 30 * time.Second

// narrowing is what a change takes from one user.
type narrowing struct {
	since   time.Time // the right was given then; zero: it is not known when
	publish bool      // only the right to publish
}

// Swept is what the servers said after a change that takes something away.
type Swept struct {
	Answered []string // nodes that listed their connections, and keep none that must not be
	Missing  []string // nodes of which that is not known
}

// roster remembers which nodes hold the buckets.
type roster struct {
	mu    sync.Mutex
	nodes []string
	asked time.Time
}

// nodes names the servers whose word is needed.
func (s *Store) nodes(ctx context.Context, fresh bool) ([]string, error) {
	r := &s.roster
	r.mu.Lock()
	defer r.mu.Unlock()
	if !fresh && r.nodes != nil && s.now().Sub(r.asked) < rosterAge {
		return r.nodes, nil
	}
	nodes, err := Peers(ctx, s.view.cfg.Conn)
	if err != nil {
		return nil, err
	}
	r.nodes, r.asked = nodes, s.now()
	return nodes, nil
}

// mustBeGone reports whether a connection that a server still lists, and that
// began at start by the server's clock, may carry what a change that was
// committed at that time took away.
//
// A session has for its whole life what it was admitted with. So none of
// somebody who is not admitted may be left; one that began before the right was
// given never had it; and one that began after the change was admitted without
// it, if everybody who admits has said so (enforced). Around the change itself
// only the authcallouts know what a session was admitted with, and having
// enforced the change they have closed those; without them everything goes.
func mustBeGone(n narrowing, start time.Time, admitted, enforced bool, committed time.Time) bool {
	switch {
	case !admitted:
		return true
	case start.Before(n.since.Add(-clockTolerance)):
		return false
	case !enforced:
		return true
	case n.publish: // the session may be older than the right
		return false
	}
	return start.Before(committed.Add(-clockTolerance))
}

// swept completes the result of a change that takes something from those users:
// it asks every server, closes what must be gone, and counts. A change that is
// not proven so far is returned as it is.
func (s *Store) swept(ctx context.Context, res Result, err error, who map[bus.UserKey]narrowing) (Result, error) {
	if err != nil || guard.Off(guard.WriterSweep) {
		return res, err
	}
	s.end()
	defer s.begin()
	byName := make(map[string]bus.UserKey, len(who))
	only := ""
	for k := range who {
		only = k.NKey()
		byName[only] = k
	}
	if len(who) > 1 {
		only = ""
	}
	lists, err := s.lists(ctx, byName[only], "")
	if err != nil {
		res.Swept = &Swept{Missing: []string{"servers that nobody names"}}
	} else {
		res.Swept = &Swept{}
		s.close(ctx, &res, lists, func(_ string, c sys.Connection) bool {
			k, ours := byName[string(c.User)]
			return ours && mustBeGone(who[k], c.Start, s.admits(k), res.enforced, res.committed)
		})
	}
	res.Elapsed = s.now().Sub(res.started)
	return res, nil
}

// admits reports whether the user may have any connection now.
func (s *Store) admits(k bus.UserKey) bool {
	a, err := s.view.Access(k)
	if err != nil || a == nil {
		return false
	}
	ok, _ := a.Admitted(s.now())
	return ok
}
