package callout

import (
	"context"
	"maps"
	"slices"
	"time"

	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sys"
)

const (
	// sweepEvery is how often all connections are compared with the View when
	// nothing calls for it, sweepSpacing how often at most.
	sweepEvery   = 30 * time.Second
	sweepSpacing = time.Second
	// deadlineOfMints is how long after a change a connection could still
	// appear that was admitted before it.
	deadlineOfMints = 2500 * time.Millisecond
	sweepPatience   = 2 * time.Second
	capPatience     = 250 * time.Millisecond
	// late is the age at which a connection that no event has told of counts
	// as missed by the events.
	late = 3 * time.Second
)

// Run compares what the servers have with the View, now and then and whenever
// something calls for it, until ctx ends.
func (e *Enforcer) Run(ctx context.Context) {
	capping := make(chan struct{})
	go func() {
		defer close(capping)
		for {
			select {
			case u := <-e.capped:
				e.enforceCap(ctx, u)
			case <-ctx.Done():
				return
			}
		}
	}()
	defer func() { <-capping }()
	for {
		e.mu.Lock()
		wait, silent := e.due.Sub(e.cfg.Now()), slices.Sorted(maps.Keys(e.silent))
		e.mu.Unlock()
		sweep := wait <= sweepSpacing || len(silent) == 0
		if !sweep {
			wait = sweepSpacing
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-e.wake:
			timer.Stop()
		case <-timer.C:
			if sweep || e.knock(ctx, silent) {
				e.sweep(ctx)
			}
		}
	}
}

// knock reports whether one of the nodes that did not answer does so now: what
// it kept open while it was cut off must not live a moment longer.
func (e *Enforcer) knock(ctx context.Context, nodes []string) bool {
	ctx, cancel := context.WithTimeout(ctx, sweepSpacing/2)
	defer cancel()
	return sys.Answers(ctx, e.cfg.Control, nodes)
}

// sweepBy asks for a sweep at that moment at the latest; it needs mu.
func (e *Enforcer) sweepBy(t time.Time) {
	if !e.due.IsZero() && !t.Before(e.due) {
		return
	}
	e.due = t
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// sweep reads every server's list and closes what the View does not allow. With
// events and kicks at work it finds nothing.
func (e *Enforcer) sweep(ctx context.Context) {
	e.mu.Lock()
	e.due = e.cfg.Now().Add(sweepEvery)
	e.mu.Unlock()
	if guard.Off(guard.Sweep) {
		return
	}
	e.learnPeers(ctx)
	lists := e.ask(ctx, "", sweepPatience)
	e.mu.Lock()
	defer e.unlock()
	e.countBoots(e.view.Holders())
	e.take(lists, "")
	e.noteSilent(lists.Missing)
	now := e.cfg.Now()
	if now.Before(e.until.Add(sweepSpacing)) {
		e.sweepBy(now.Add(sweepSpacing))
	}
}

// SweepOwn reads the list of the instance's own server, closes what must not be
// open there, and reports whether that is done. An instance that was cut off
// asks this before it admits anybody again: its server went on with whoever it
// had.
func (e *Enforcer) SweepOwn(ctx context.Context) bool {
	if guard.Off(guard.SweepFirst) || guard.Off(guard.Sweep) {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, kickPatience)
	defer cancel()
	e.begin()
	lists := sys.List(ctx, e.cfg.Control, []string{e.cfg.Node}, "", e.cfg.Now)
	done := make(chan kv.Enforced, 1)
	e.mu.Lock()
	if _, held := e.view.Lease(); !held {
		lists.Missing = append(lists.Missing, e.cfg.Node) // it came and went
	} else {
		e.judgeAll()
	}
	e.take(lists, "")
	e.settle(e.kicksAt(e.cfg.Node), func(w kv.Enforced) { done <- w })
	e.unlock()
	if len(lists.Missing) > 0 {
		return false
	}
	select {
	case w := <-done:
		return !w.Unproven
	case <-ctx.Done():
		return false
	}
}

// Swept reports whether the connections of a node's server have been looked at
// since it last failed to answer. Until then nobody is admitted there: what it
// kept open while it was cut off goes first.
func (e *Enforcer) Swept(node string) bool {
	if guard.Off(guard.SweepFirst) {
		return true
	}
	e.mu.Lock()
	defer e.unlock()
	silent := e.silent[node]
	for _, s := range e.table.servers {
		silent = silent || s.silent && s.node == node
	}
	for _, k := range e.kicksAt(node) {
		silent = silent || k.conn.unproven // an earlier try was not answered
	}
	if silent {
		e.sweepBy(e.cfg.Now())
	}
	return !silent
}

// noteSilent keeps count of nodes that did not answer: what they hold is not
// known, and that is no zero.
func (e *Enforcer) noteSilent(missing []string) {
	now := map[string]bool{}
	for _, n := range missing {
		if now[n] = true; !e.silent[n] {
			e.run = append(e.run, func() { e.cfg.Log.Warn("a server does not list its connections", "server", n) })
		}
	}
	for n := range e.silent {
		if !now[n] {
			e.run = append(e.run, func() { e.cfg.Log.Info("a server lists its connections again", "server", n) })
		}
	}
	for _, s := range e.table.servers {
		if now[s.node] {
			s.silent = true
		}
	}
	e.silent = now
	e.cfg.Metrics.silent.Set(float64(len(now)))
}

// take enters what the servers have listed; it ends what ask began.
func (e *Enforcer) take(l sys.Lists, only string) {
	for _, list := range l.Whole {
		e.correct(list, l.Began, only)
	}
	if e.reading--; e.reading == 0 {
		e.gone = nil
	}
}

// correct makes the table say what a server's list says, and closes what must
// not be. The list is of all users, or of one.
func (e *Enforcer) correct(l *sys.Listing, began time.Time, only string) {
	s, _ := e.table.server([]byte(l.Server), []byte(l.Node))
	s.silent = false
	for _, old := range e.table.servers {
		if old.node == s.node && old != s { // the same node, started again
			e.forget(old)
		}
	}
	now := e.cfg.Now()
	listed := make(map[uint64]bool, len(l.Rows))
	for _, row := range l.Rows {
		listed[row.CID] = true
		id := connID{s, row.CID}
		if e.gone[id] || e.services[string(row.User)] {
			continue
		}
		c := e.table.byID[id]
		if c != nil && c.of.nkey == string(row.User) {
			e.found(c, now, true)
			e.limit(c.of)
			continue
		}
		if a, err := e.view.Access(keyOf(row.User)); now.Sub(row.Start) < late && err == nil && decide(a, nil, now).allow {
			e.sweepBy(now.Add(late)) // its event is on the way, or the next list has it again
			continue
		}
		c = e.table.add(s, row, now)
		admitted, hold := e.cfg.Service.effects.take(s.id, row.CID)
		c.admitted, c.foreign, c.unseen, c.adopted = admitted, admitted == nil, admitted == nil, admitted == nil
		e.found(c, now, false)
		if hold != nil {
			e.settle(e.kicksOf(c), released(hold))
		}
		e.limit(c.of)
	}
	for _, c := range e.openOn(s, only) {
		if !listed[c.id.cid] && c.seen.Before(began) {
			e.closed(c.id)
		}
	}
}

// found judges one listed connection. Whether anything was about to close it
// tells a connection that events and kicks have missed from one beside a change.
func (e *Enforcer) found(c *connection, now time.Time, known bool) {
	if _, held := e.view.Lease(); !held || c.kick != nil {
		return
	}
	a, err := e.view.Access(c.of.key)
	if err != nil {
		a = nil
	}
	if !e.exceeds(c, a, now) {
		e.judge(c.of, "narrowed")
		return
	}
	missed := now.Sub(c.start) > late
	if known {
		expiring := a != nil && a.User.ExpiresAt != nil && now.Sub(*a.User.ExpiresAt) < sweepSpacing
		judged := c.of.judged == a || c.of.judged == nil && now.Sub(c.seen) > sweepSpacing/2 // else that is about to happen
		missed = judged && !expiring && !c.unproven
	}
	if !missed {
		e.kick(c, "narrowed")
		return
	}
	e.kick(c, "sweep")
	e.cfg.Metrics.findings.Inc()
	args := []any{"key", shown(c.of.nkey), "server", c.id.server.node, "client", c.id.cid, "host", c.host}
	e.run = append(e.run, func() { e.cfg.Log.Error("a sweep found a connection that must not be", args...) })
}

func (e *Enforcer) openOn(s *server, only string) (out []*connection) {
	if only != "" {
		if u := e.table.users[only]; u != nil {
			for _, c := range u.open {
				if c.id.server == s {
					out = append(out, c)
				}
			}
		}
		return out
	}
	for id, c := range e.table.byID {
		if id.server == s {
			out = append(out, c)
		}
	}
	return out
}

// forget drops a server that runs no more, with all it had.
func (e *Enforcer) forget(s *server) {
	for _, c := range e.openOn(s, "") {
		e.closed(c.id)
	}
	delete(e.table.servers, s.id)
}

// ask has every server list the connections of all users or of one. It waits
// for the nodes that hold the buckets and for those that have answered before.
func (e *Enforcer) ask(ctx context.Context, user string, patience time.Duration) sys.Lists {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return sys.List(ctx, e.cfg.Control, e.begin(), user, e.cfg.Now)
}

// begin lists the nodes whose word is needed, and has what closes from now on
// remembered until take: a list may be older than the event.
func (e *Enforcer) begin() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.reading++; e.gone == nil {
		e.gone = map[connID]bool{}
	}
	nodes := map[string]bool{}
	for _, n := range e.peers {
		nodes[n] = true
	}
	for _, s := range e.table.servers {
		nodes[s.node] = true
	}
	return slices.Sorted(maps.Keys(nodes))
}

// learnPeers asks now and then which nodes hold the buckets: those must answer
// even if nothing was ever heard of them.
func (e *Enforcer) learnPeers(ctx context.Context) {
	e.mu.Lock()
	fresh := e.cfg.Now().Sub(e.asked) < sweepEvery-sweepSpacing
	e.mu.Unlock()
	if fresh {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, sweepPatience)
	defer cancel()
	peers, err := e.cfg.Peers(ctx)
	if err != nil {
		e.cfg.Log.Warn("which servers there are is not known anew", "err", err)
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.peers, e.asked = peers, e.cfg.Now()
}
