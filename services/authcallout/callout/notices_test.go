package callout

import (
	"encoding/json"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sys"
)

func TestNoticesSayWhatDiffers(t *testing.T) {
	access := func(rooms ...kv.Grant) *kv.Access { return &kv.Access{Rooms: rooms} }
	g := func(room bus.RoomID, role bus.RoomRole, durable bool) kv.Grant {
		return kv.Grant{Room: room, Role: role, Durable: durable}
	}
	archived := func(id bus.RoomID) bool { return id == "old" }
	for _, tt := range []struct {
		name          string
		before, after *kv.Access
		want          []string
	}{
		{"nothing", access(g("ops", bus.Writer, false)), access(g("ops", bus.Writer, false)), nil},
		{"added", access(g("ops", bus.Writer, false)), access(g("log", bus.Reader, true), g("ops", bus.Writer, false)), []string{`added {"v":1,"room":"log","role":"reader","durable":true}`}},
		{"role", access(g("ops", bus.Writer, false)), access(g("ops", bus.Reader, false)), []string{`role {"v":1,"room":"ops","role":"reader","durable":false}`}},
		{"removed", access(g("dev", bus.Owner, false), g("ops", bus.Writer, false)), access(g("ops", bus.Writer, false)), []string{`removed {"v":1,"room":"dev","durable":false}`}},
		{"archived", access(g("old", bus.Owner, true)), access(), []string{`archived {"v":1,"room":"old","durable":false}`}},
		{"all at once", access(g("old", bus.Owner, false), g("ops", bus.Reader, false)), access(g("new", bus.Owner, false), g("ops", bus.Owner, false)), []string{
			`added {"v":1,"room":"new","role":"owner","durable":false}`, `role {"v":1,"room":"ops","role":"owner","durable":false}`, `archived {"v":1,"room":"old","durable":false}`,
		}},
	} {
		var got []string
		for _, n := range noticesOf(tt.before, tt.after, archived) {
			body, err := json.Marshal(n.body)
			must(t, err)
			got = append(got, string(n.kind)+" "+string(body))
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// Who was admitted on the state before a widening, and is seen only after it, is
// hinted then: nobody else would tell them. Once is enough.
func TestWhoOpensBesideAWideningIsHinted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		h := &counter{}
		before := w.access[w.user]
		w.cfg.Service.effects.begin(&call{serverID: "NA", clientID: 1}, before, h, time.Hour)
		w.cfg.Service.effects.begin(&call{serverID: "NA", clientID: 2}, before, h, time.Hour)
		w.changes(w.ofUser("dev"), w.rights(t, dev, ops))
		w.wantSent(t)
		w.opens(1)
		w.wantSent(t, `NA LDM {"cid":1}`)
		w.opens(2) // now the user has been judged already
		w.wantSent(t, `NA LDM {"cid":2}`)
		w.Resync()
		w.opens(3) // on the new state
		w.wantSent(t)
	})
}

// An instance whose View is behind may admit a client of another node just after
// that node's instance has learnt of a room. To that one the client lacks
// nothing: only who admitted it knows, whenever the room comes to their View.
func TestWhoAdmitsHints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		w.cfg.Node = "n9" // the server is n1's
		w.admits(1)
		w.opens(2) // another instance's to hint
		w.changes(w.ofUser("dev"), w.rights(t, dev, ops))
		w.wantSent(t, `NA LDM {"cid":1}`)
		w.Resync()
		w.wantSent(t)
	})
}

// What another instance has admitted is hinted by the node's own when that one
// may be gone, at the latest when the servers' lists are read again after its
// lease has run out. Who has come since is not hinted twice.
func TestWhatTheDeadHaveAdmittedIsHinted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		boot := func(b string) kv.Holder { return kv.Holder{Service: "authcallout", Node: "n" + b, Boot: b} }
		w.holders = []kv.Holder{boot("1"), boot("2"), {Service: "membership", Node: "n2", Boot: "3"}}
		w.opens(1)
		w.due = time.Now().Add(sweepEvery)
		w.changes(w.ofUser("dev"), w.rights(t, dev, ops))
		w.wantSent(t)
		if left := time.Until(w.due); left > kv.DefaultLease+2*clockMargin {
			t.Errorf("nobody looks for %s whether the other instance lives", left)
		}
		w.holders = w.holders[:2]
		w.Resync()
		w.wantSent(t)
		w.holders = w.holders[:1]
		<-time.After(time.Second)
		w.Resync()
		w.wantSent(t, `NA LDM {"cid":1}`)
		<-time.After(time.Second)
		w.opens(2)
		<-time.After(time.Minute)
		zoo := kv.Grant{Room: "zoo", Role: bus.Reader}
		w.changes(w.ofUser("zoo"), w.rights(t, dev, ops, zoo))
		w.wantSent(t, `NA LDM {"cid":1}`)
		// So is what only a list tells of: it may have begun before this instance did.
		w.begin()
		l := &sys.Listing{Server: "NA", Node: "n1"}
		for cid := range uint64(3) {
			l.Rows = append(l.Rows, sys.Connection{CID: cid + 1, User: []byte(w.scene.client.pub), Start: time.Now().Add(-time.Hour)})
		}
		w.mu.Lock()
		w.take(sys.Lists{Began: time.Now(), Whole: map[string]*sys.Listing{"NA": l}}, "")
		w.unlock()
		w.wantKnown(t, 1, 2, 3)
		w.changes(w.ofUser("air"), w.rights(t, kv.Grant{Room: "air", Role: bus.Reader}, dev, ops, zoo))
		w.wantSent(t, `NA LDM {"cid":1}`, `NA LDM {"cid":3}`)
	})
}

// A hint that could not be sent is given when the servers are there again.
func TestAHintIsNotForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		w.admits(1)
		w.fails = nats.ErrConnectionClosed
		w.changes(w.ofUser("dev"), w.rights(t, dev, ops))
		w.fails = nil
		w.Resync()
		w.Resync()
		w.wantSent(t, `NA LDM {"cid":1}`, `NA LDM {"cid":1}`)
	})
}

// Every instance tells a user that they are revoked, once and before it closes
// anything, whoever has admitted them: nobody tells them later. Of what may end
// again they are told nothing.
func TestTheRevokedAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		w.cfg.Node = "n9"
		w.opens(1)
		w.opens(2)
		with := func(s bus.Status) *kv.Access {
			a := w.rights(t)
			a.User.Status = s
			return a
		}
		w.changes(w.ofUser(""), with(bus.Suspended))
		w.wantSent(t, kicked(1), kicked(2))
		if len(w.notices) > 0 {
			t.Errorf("the suspended are told %q", w.notices)
		}
		var left atomic.Bool
		w.flush = func() {
			<-time.After(time.Millisecond)
			left.Store(len(w.notices) > 0)
		}
		send := w.send
		w.send = func(subject, reply string, data []byte) error {
			if !left.Load() {
				t.Error("closed before they are told")
			}
			return send(subject, reply, data)
		}
		w.end(1, sys.Closed) // the other one's server does not answer
		<-time.After(kickPatience)
		synctest.Wait()
		w.changes(w.ofUser(""), with(bus.Revoked))
		w.wantSent(t)
		<-time.After(time.Millisecond)
		synctest.Wait()
		w.wantSent(t, kicked(2))
		w.Resync()
		if !slices.Equal(w.notices, []string{`revoked {"v":1,"durable":false}`}) {
			t.Errorf("told: %q", w.notices)
		}
	})
}

// The owners of an encrypted room are told when somebody may have gone, whether
// or not who went is connected: by one instance, of those that hold a lease.
func TestOwnersAreTold(t *testing.T) {
	w := newWarden(t)
	w.owners = map[bus.RoomID][]bus.UserKey{"vault": {w.user}}
	holder := func(node string) kv.Holder { return kv.Holder{Service: "authcallout", Node: node} }
	for _, c := range []struct {
		holders []kv.Holder
		want    int
	}{
		{nil, 0},
		{[]kv.Holder{holder("n1"), holder("n2")}, 1},
		{[]kv.Holder{holder("n0"), holder("n1")}, 0},
		{[]kv.Holder{{Service: "membership", Node: "n0"}, holder("n1")}, 1},
	} {
		w.holders, w.notices = c.holders, nil
		w.Changed(w.ofUser("vault"), func(kv.Enforced) {})
		if len(w.notices) != c.want {
			t.Errorf("with %v: told %q", c.holders, w.notices)
		}
		if c.want == 1 && w.notices[0] != `rekey {"v":1,"room":"vault","durable":false}` {
			t.Errorf("told %q", w.notices)
		}
	}
}
