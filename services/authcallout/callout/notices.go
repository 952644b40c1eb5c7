package callout

import (
	"cmp"
	"encoding/json"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sys"
)

// widen hints to the clients of connections that may do less than their user
// that the next connect brings more, and tells the user what it is. A connection
// that opened beside the change, on the state before it, is hinted when it is
// first seen. Each connection is one instance's to hint: see speaksFor.
func (e *Enforcer) widen(u *session, before, a *kv.Access) {
	if a == nil || !decide(a, nil, e.cfg.Now()).allow {
		return
	}
	told := false
	for _, c := range u.open {
		if c.kick != nil || c.admitted == nil || c.hinted == a || len(gains(cmp.Or(c.first, c.admitted), a)) == 0 {
			continue
		}
		if !e.speaksFor(c) {
			if before != a { // should who is to hint be dead, it shows when their lease has run out
				e.sweepBy(e.cfg.Now().Add(kv.DefaultLease + 2*clockMargin))
			}
			continue
		}
		c.hinted = a
		if !told {
			told = true
			var what []notice
			if before != nil && before != a {
				what = noticesOf(before, a, e.archived)
			}
			e.notify(u.key, append(what, notice{bus.NoticeReauthenticate, bus.Notice{V: 1}}))
		}
		e.run = append(e.run, func() { e.hint(c) })
	}
}

// speaksFor reports whether the hints to a connection are this instance's to
// give. They are if it has admitted it: nobody else knows on what state, and a
// View may have been behind all others just then, so that to them the connection
// lacks nothing. Where whoever admitted it may be gone, the node's own instance
// hints, and the first of all for a node without one. Then some are hinted twice:
// that costs a client one connect more, and to miss one a room.
func (e *Enforcer) speaksFor(c *connection) bool {
	if !c.foreign {
		return true
	}
	holders := e.view.Holders()
	e.countBoots(holders)
	if !c.adopted && !c.seen.Before(e.departed) {
		return false
	}
	return c.id.server.node == e.cfg.Node || speaker(c.id.server.node, holders) == e.cfg.Node
}

// countBoots notes when an instance was last found to have gone.
func (e *Enforcer) countBoots(holders []kv.Holder) {
	boots := map[string]bool{}
	for _, h := range holders {
		if h.Service == "authcallout" {
			boots[h.Boot] = true
		}
	}
	for b := range e.boots {
		if !boots[b] {
			e.departed = e.cfg.Now()
		}
	}
	e.boots = boots
}

// speaker is the node whose callout gives the hints of a node.
func speaker(node string, holders []kv.Holder) string {
	first := ""
	for _, h := range holders {
		if h.Service != "authcallout" {
			continue
		}
		if h.Node == node {
			return node
		}
		if first == "" || h.Node < first {
			first = h.Node
		}
	}
	return first
}

// hint lets one client know that it would do well to connect again.
func (e *Enforcer) hint(c *connection) {
	subject, body := sys.HintRequest(c.id.server.id, c.id.cid)
	if err := e.send(subject, e.inbox+".0", body); err != nil {
		e.cfg.Log.Warn("a hint was not sent", "err", err)
		e.mu.Lock()
		defer e.unlock()
		c.hinted = nil // the next judgement, at a new connection to the servers, tries again
	}
}

// narrow tells a user what they have lost. It may come too late: the connection
// that hears of it is about to be closed. That they are revoked, which nobody
// tells them later, every instance says before it closes anything: then it
// reports true, and the notice is to leave before any kick does.
func (e *Enforcer) narrow(u *session, before, a *kv.Access) (first bool) {
	if a != nil && a.User.Status == bus.Revoked && (before == nil || before.User.Status != bus.Revoked) {
		e.notify(u.key, []notice{{bus.NoticeRevoked, bus.Notice{V: 1}}})
		return e.flush != nil
	}
	if a == nil || before == nil || before == a || len(gains(a, before)) == 0 || !decide(a, nil, e.cfg.Now()).allow {
		return false
	}
	for _, c := range u.open {
		if e.speaksFor(c) {
			e.notify(u.key, noticesOf(before, a, e.archived))
			return false
		}
	}
	return false
}

// tellOwners tells the owners of encrypted rooms that they may owe them another
// key. One instance does so, as far as they agree on which.
func (e *Enforcer) tellOwners(c kv.Change) {
	first := ""
	for _, h := range e.view.Holders() {
		if h.Service == "authcallout" && (first == "" || h.Node < first) {
			first = h.Node
		}
	}
	if first != e.cfg.Node {
		return
	}
	for room, owners := range e.view.Departure(c, e.cfg.Now()) {
		for _, k := range owners {
			e.notify(k, []notice{{bus.NoticeRekey, bus.Notice{V: 1, Room: room}}})
		}
	}
}

func (e *Enforcer) archived(id bus.RoomID) bool {
	r, _, ok := e.view.Room(id)
	return ok && r.Status == bus.RoomArchived
}

type notice struct {
	kind bus.NoticeKind
	body bus.Notice
}

// noticesOf lists what differs between two accesses of a user, by room. It is
// pure but for what it asks of the room. Both lists are sorted by room.
func noticesOf(before, after *kv.Access, archived func(bus.RoomID) bool) (out []notice) {
	was := map[bus.RoomID]kv.Grant{}
	for _, g := range before.Rooms {
		was[g.Room] = g
	}
	for _, g := range after.Rooms {
		old, there := was[g.Room]
		delete(was, g.Room)
		kind := bus.NoticeRole
		switch {
		case !there:
			kind = bus.NoticeAdded
		case old.Role == g.Role:
			continue
		}
		out = append(out, notice{kind, bus.Notice{V: 1, Room: g.Room, Role: g.Role, Durable: g.Durable}})
	}
	for _, g := range before.Rooms {
		if _, lost := was[g.Room]; !lost {
			continue
		}
		kind := bus.NoticeRemoved
		if archived(g.Room) {
			kind = bus.NoticeArchived
		}
		out = append(out, notice{kind, bus.Notice{V: 1, Room: g.Room}})
	}
	return out
}

func (e *Enforcer) notify(k bus.UserKey, notices []notice) {
	if e.publish == nil {
		return
	}
	for _, n := range notices {
		body, _ := json.Marshal(n.body)
		e.run = append(e.run, func() {
			if err := e.publish(bus.NoticeSubject(k, n.kind), body); err != nil {
				e.cfg.Log.Warn("a notice was not sent", "err", err)
			}
		})
	}
}
