package callout

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sys"
)

func TestNarrows(t *testing.T) {
	s := newScene(t)
	with := func(change func(*bus.User), rooms ...kv.Grant) *kv.Access {
		a := s.access(t, rooms...)
		if change != nil {
			change(&a.User)
		}
		return a
	}
	status := func(s bus.Status) func(*bus.User) { return func(u *bus.User) { u.Status = s } }
	expires := func(d time.Duration) func(*bus.User) {
		at := moment.Add(d)
		return func(u *bus.User) { u.ExpiresAt = &at }
	}
	g := func(room bus.RoomID, role bus.RoomRole) kv.Grant { return kv.Grant{Room: room, Role: role} }
	durable := kv.Grant{Room: "ops", Role: bus.Writer, Durable: true}
	dev, ops, zoo := g("dev", bus.Writer), g("ops", bus.Writer), g("zoo", bus.Writer)
	for _, tt := range []struct {
		name     string
		old, new *kv.Access
		want     bool
	}{
		{"nothing", with(nil, ops), with(nil, ops), false},
		{"nobody any more", with(nil), nil, true},
		{"revoked", with(nil), with(status(bus.Revoked)), true},
		{"suspended", with(nil), with(status(bus.Suspended)), true},
		{"a status nobody knows", with(nil), with(status("friendly")), true},
		{"resumed", with(status(bus.Suspended), ops), with(nil, ops), false},
		{"expired", with(nil), with(expires(0)), true},
		{"expires later", with(nil), with(expires(time.Nanosecond)), false},
		{"expires no more", with(expires(time.Hour)), with(nil), false},
		{"admin", with(nil, ops), with(func(u *bus.User) { u.Role = bus.Admin }, ops), false},
		{"admin no more", with(func(u *bus.User) { u.Role = bus.Admin }, ops), with(nil, ops), false},
		{"another handle", with(nil, ops), with(func(u *bus.User) { u.Handle = "eve" }, ops), false},
		{"the only room", with(nil, ops), with(nil), true},
		{"the first room", with(nil, dev, ops, zoo), with(nil, ops, zoo), true},
		{"a room in the middle", with(nil, dev, ops, zoo), with(nil, dev, zoo), true},
		{"the last room", with(nil, dev, ops, zoo), with(nil, dev, ops), true},
		{"one room for another", with(nil, dev), with(nil, ops), true},
		{"a room more", with(nil, ops), with(nil, dev, ops, zoo), false},
		{"the first room", with(nil), with(nil, ops), false},
		{"writer to reader", with(nil, dev, ops), with(nil, dev, g("ops", bus.Reader)), true},
		{"owner to reader", with(nil, g("ops", bus.Owner)), with(nil, g("ops", bus.Reader)), true},
		{"owner to writer sends as before", with(nil, g("ops", bus.Owner)), with(nil, ops), false},
		{"reader to writer", with(nil, g("ops", bus.Reader)), with(nil, ops), false},
		{"a role nobody knows", with(nil, g("ops", bus.Reader)), with(nil, g("ops", "guest")), true},
		{"durable", with(nil, ops), with(nil, durable), true},
		{"durable no more", with(nil, durable), with(nil, ops), true},
		{"a room gained, another lost", with(nil, dev), with(nil, ops, zoo), true},
		{"nothing known of before", nil, with(nil, ops), false},
		{"nothing at all", nil, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := narrows(tt.old, tt.new, moment); got != tt.want {
				t.Errorf("narrows = %v, want %v", got, tt.want)
			}
		})
	}
}

// Whatever the permissions of a JWT hold and a later one does not is a
// narrowing, and nothing else is: the two functions say the same of every pair.
func TestNarrowsIsWhatPermissionsSay(t *testing.T) {
	s := newScene(t)
	var all []*kv.Access
	roles := []bus.RoomRole{"", bus.Reader, bus.Writer, bus.Owner}
	for _, dev := range roles {
		for _, ops := range roles {
			for _, durable := range []bool{false, true} {
				a := s.access(t)
				if dev != "" {
					a.Rooms = append(a.Rooms, kv.Grant{Room: "dev", Role: dev})
				}
				if ops != "" {
					a.Rooms = append(a.Rooms, kv.Grant{Room: "ops", Role: ops, Durable: durable})
				}
				all = append(all, a)
			}
		}
	}
	for _, old := range all {
		for _, new := range all {
			before, after := permit(old), permit(new)
			lost := slices.ContainsFunc(before.Pub.Allow, func(s string) bool { return !slices.Contains(after.Pub.Allow, s) }) ||
				slices.ContainsFunc(before.Sub.Allow, func(s string) bool { return !slices.Contains(after.Sub.Allow, s) })
			if got := narrows(old, new, moment); got != lost {
				t.Fatalf("from %+v to %+v narrows is %v, and permissions are lost: %v", old.Rooms, new.Rooms, got, lost)
			}
		}
	}
}

func TestOneInstanceSpeaksForANode(t *testing.T) {
	h := func(service, node string) kv.Holder { return kv.Holder{Service: service, Node: node} }
	all := []kv.Holder{h("authcallout", "n3"), h("authcallout", "n2"), h("membership", "n1"), h("membership", "n4")}
	for node, want := range map[string]string{"n3": "n3", "n2": "n2", "n1": "n2", "n4": "n2"} {
		if got := speaker(node, all); got != want {
			t.Errorf("%s speaks for %s, want %s", got, node, want)
		}
	}
	if got := speaker("n1", all[2:]); got != "" {
		t.Errorf("%s speaks, and nobody can", got)
	}
}

// ruling is what the View of an Enforcer says, as a test writes it.
type ruling struct {
	access         map[bus.UserKey]*kv.Access
	broken         map[bus.UserKey]bool
	narrowed       bool
	lease, partial bool
	holders        []kv.Holder
	owners         map[bus.RoomID][]bus.UserKey // who is told of a departure
}

func (r *ruling) Access(k bus.UserKey) (*kv.Access, error) {
	if r.broken[k] {
		return nil, errors.New("broken")
	}
	return r.access[k], nil
}
func (r *ruling) NarrowedSince(bus.UserKey, time.Time) bool { return r.narrowed }
func (r *ruling) Lease() (time.Time, bool)                  { return time.Time{}, r.lease }
func (r *ruling) Complete() bool                            { return !r.partial }
func (r *ruling) Holders() []kv.Holder                      { return r.holders }
func (r *ruling) Room(bus.RoomID) (bus.Room, uint64, bool)  { return bus.Room{}, 0, false }

func (r *ruling) Departure(kv.Change, time.Time) map[bus.RoomID][]bus.UserKey { return r.owners }

// warden is an Enforcer on a ruling, with one user who is in room ops, and what
// it has asked of servers.
type warden struct {
	*Enforcer
	*ruling
	scene *scene
	user  bus.UserKey
	fails error // of sending

	sending sync.Mutex
	sent    []string // kicks and hints: server, verb, body
	notices []string // notices: kind, body
}

func newWarden(t *testing.T) *warden {
	t.Helper()
	w := &warden{scene: newScene(t), ruling: &ruling{access: map[bus.UserKey]*kv.Access{}, broken: map[bus.UserKey]bool{}, lease: true}}
	w.user = key(t, w.scene.client.pub)
	w.access[w.user] = w.rights(t, kv.Grant{Room: "ops", Role: bus.Writer})
	w.Enforcer = NewEnforcer(EnforcerConfig{
		Service: &Service{effects: newEffects()}, Services: []string{"USERVICE"}, Node: "n1", Limit: 3,
		Log: slog.New(slog.DiscardHandler), Metrics: NewEnforceMetrics(prometheus.NewRegistry()), Now: time.Now,
	})
	w.view = w.ruling
	w.send = func(subject, _ string, data []byte) error {
		w.sending.Lock()
		defer w.sending.Unlock()
		tokens := strings.Split(subject, ".")
		w.sent = append(w.sent, tokens[len(tokens)-2]+" "+tokens[len(tokens)-1]+" "+string(data))
		return w.fails
	}
	w.publish = func(subject string, data []byte) error {
		w.sending.Lock()
		defer w.sending.Unlock()
		w.notices = append(w.notices, subject[strings.LastIndexByte(subject, '.')+1:]+" "+string(data))
		return nil
	}
	return w
}

func (w *warden) rights(t *testing.T, rooms ...kv.Grant) *kv.Access {
	a := w.scene.access(t, rooms...)
	a.User.ExpiresAt = nil
	return a
}

// hears lets a server report that a connection has opened or closed.
func (w *warden) hears(verb string, cid int, user string) {
	w.told(&nats.Msg{Subject: "$SYS.ACCOUNT.BUS." + verb, Data: fmt.Appendf(nil,
		`{"server":{"name":"n1","id":"NA"},"client":{"start":%q,"id":%d,"user":%q}}`, time.Now().UTC().Format(time.RFC3339Nano), cid, user)})
}

// opens lets a connection of the user open that another instance has admitted.
func (w *warden) opens(cid int) { w.hears("CONNECT", cid, w.scene.client.pub) }

// admits lets one open that this instance has admitted, on what is so now.
func (w *warden) admits(cid int) {
	w.cfg.Service.effects.begin(&call{serverID: "NA", clientID: uint64(cid)}, w.access[w.user], &counter{}, time.Hour)
	w.opens(cid)
}

// changes lets the View apply a change and returns whether it has been enforced.
func (w *warden) changes(c kv.Change, a *kv.Access) (done *atomic.Bool) {
	w.access[w.user] = a
	done = &atomic.Bool{}
	w.Changed(c, func(kv.Enforced) { done.Store(true) })
	return done
}

func (w *warden) ofUser(room bus.RoomID) kv.Change { return kv.Change{User: w.user, Room: room} }

func valueOf(t *testing.T, m prometheus.Metric) float64 {
	t.Helper()
	var d dto.Metric
	must(t, m.Write(&d))
	return d.GetCounter().GetValue()
}

func (w *warden) wantSent(t *testing.T, want ...string) {
	t.Helper()
	w.sending.Lock()
	defer w.sending.Unlock()
	if !slices.Equal(w.sent, want) {
		t.Errorf("asked of servers: %q, want %q", w.sent, want)
	}
	w.sent = nil
}

func (w *warden) wantKnown(t *testing.T, want ...uint64) {
	t.Helper()
	var got []uint64
	for id := range w.table.byID {
		got = append(got, id.cid)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("known are %v, want %v", got, want)
	}
}

func kicked(cid int) string { return fmt.Sprintf(`NA KICK {"cid":%d}`, cid) }

var ops, dev = kv.Grant{Room: "ops", Role: bus.Writer}, kv.Grant{Room: "dev", Role: bus.Reader}

// An acknowledgement waits until every connection that the change ends is
// closed, whichever way that becomes known; and for those that an earlier change
// of the same user ended, since the newer revision stands for both.
func TestAChangeIsEnforcedWhenItsConnectionsAreGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		w.opens(1)
		w.opens(2)
		w.hears("CONNECT", 3, newPair(t, 0xa0, 9).pub) // somebody unknown
		w.wantSent(t, kicked(3))
		w.end(1, sys.Closed)
		first := w.changes(w.ofUser(""), nil)
		second := w.changes(w.ofUser(""), nil)
		w.wantSent(t, kicked(1), kicked(2))
		w.end(2, sys.Gone)
		if first.Load() || second.Load() {
			t.Fatal("enforced while a connection lives")
		}
		w.hears("DISCONNECT", 2, "")
		if !first.Load() || !second.Load() {
			t.Error("not enforced when all are gone")
		}
		w.wantKnown(t)
		if third := w.changes(w.ofUser(""), nil); !third.Load() {
			t.Error("a change that ends nothing waits")
		}
		w.wantSent(t)
	})
}

// A server that does not answer holds an acknowledgement back for a second; what
// it may still have open stays known, and unproven.
func TestASilentServerIsNoProof(t *testing.T) {
	for name, silence := range map[string]func(w *warden){
		"no answer":     func(*warden) { <-time.After(kickPatience); synctest.Wait() },
		"no responders": func(w *warden) { w.answered(&nats.Msg{Subject: w.inbox + ".1"}) },
		"refused": func(w *warden) {
			w.answered(&nats.Msg{Subject: w.inbox + ".1", Data: []byte(`{"error":{"code":500}}`)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWarden(t)
				w.opens(1)
				done := w.changes(w.ofUser(""), nil)
				if done.Load() {
					t.Fatal("enforced at once")
				}
				silence(w)
				if !done.Load() {
					t.Error("waits for ever")
				}
				w.wantKnown(t, 1)
				sum := 0.0
				for _, result := range []sys.Outcome{sys.Silent, sys.Unreachable, sys.Refused} {
					sum += valueOf(t, w.cfg.Metrics.unproven.WithLabelValues(string(result)))
				}
				if sum != 1 {
					t.Errorf("%v unproven closings, want 1", sum)
				}
				if n := w.Connections(); n != 0 {
					t.Errorf("%d connections on servers that answer", n)
				}
				w.wantSent(t, kicked(1))
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		w.opens(1)
		w.fails = nats.ErrConnectionClosed
		if done := w.changes(w.ofUser(""), nil); !done.Load() {
			t.Error("waits for a kick that was never sent")
		}
	})
}

// Only what takes something from a connection closes it. A room's change looks
// at all who are connected.
func TestWhatAChangeCloses(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(w *warden) kv.Change
		after  func(t *testing.T, w *warden) *kv.Access
		want   []string
	}{
		"added to a room":     {func(w *warden) kv.Change { return w.ofUser("dev") }, func(t *testing.T, w *warden) *kv.Access { return w.rights(t, dev, ops) }, []string{`NA LDM {"cid":1}`}},
		"removed":             {func(w *warden) kv.Change { return w.ofUser("ops") }, func(t *testing.T, w *warden) *kv.Access { return w.rights(t) }, []string{kicked(1)}},
		"the room archived":   {func(*warden) kv.Change { return kv.Change{Room: "ops"} }, func(t *testing.T, w *warden) *kv.Access { return w.rights(t) }, []string{kicked(1)}},
		"another room":        {func(*warden) kv.Change { return kv.Change{Room: "zoo"} }, func(_ *testing.T, w *warden) *kv.Access { return w.access[w.user] }, nil},
		"another bus role":    {func(w *warden) kv.Change { return w.ofUser("") }, func(t *testing.T, w *warden) *kv.Access { a := w.rights(t, ops); a.User.Role = bus.Admin; return a }, nil},
		"an unreadable user":  {func(w *warden) kv.Change { w.broken[w.user] = true; return w.ofUser("") }, func(*testing.T, *warden) *kv.Access { return nil }, []string{kicked(1)}},
		"somebody else's key": {func(*warden) kv.Change { return kv.Change{User: bus.UserKey{7}} }, func(_ *testing.T, w *warden) *kv.Access { return w.access[w.user] }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWarden(t)
				w.admits(1)
				w.hears("CONNECT", 2, "USERVICE")
				a := tt.after(t, w)
				w.changes(tt.change(w), a)
				w.wantSent(t, tt.want...)
			})
		})
	}
}

// An instance whose View was ahead of ours may have admitted a connection on
// what we learn a moment later. Should that be taken away again, we close it
// too: the other instance may be dead by then.
func TestAConnectionMayHaveMoreThanWeKnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		w.opens(1)
		<-time.After(kv.DefaultLease)
		w.changes(w.ofUser("dev"), w.rights(t, dev, ops))
		w.wantSent(t)
		<-time.After(time.Hour)
		w.changes(w.ofUser("dev"), w.rights(t, ops))
		w.wantSent(t, kicked(1))
	})
}

// A connection keeps the rights it was admitted with: what its user gained and
// lost again was never its own.
func TestWhatAConnectionNeverHadIsNotTakenFromIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		w.admits(1)
		<-time.After(time.Minute)
		w.changes(w.ofUser("dev"), w.rights(t, dev, ops))
		w.wantSent(t, `NA LDM {"cid":1}`)
		w.opens(2)
		w.changes(w.ofUser("dev"), w.rights(t, ops))
		w.wantSent(t, kicked(2))
	})
}

// What this instance has admitted on an older state is closed when it opens,
// and until then, and until it is closed, holds back the acknowledgement.
func TestAConnectionIsLookedAtAgainWhenItOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		h := &counter{}
		old := w.rights(t, dev, ops)
		w.cfg.Service.effects.begin(&call{serverID: "NA", clientID: 1}, old, h, time.Hour)
		w.cfg.Service.effects.begin(&call{serverID: "NA", clientID: 2}, w.access[w.user], h, time.Hour)
		w.opens(1)
		w.wantSent(t, kicked(1))
		h.want(t, 0)
		w.end(1, sys.Closed)
		h.want(t, 1)
		w.opens(2)
		w.wantSent(t)
		h.want(t, 2)
		// A report that is late finds the hold gone and the rights remembered.
		w.cfg.Service.effects.begin(&call{serverID: "NA", clientID: 3}, old, h, time.Second)
		<-time.After(30 * time.Second)
		synctest.Wait()
		h.want(t, 3)
		w.opens(3)
		w.wantSent(t, kicked(3))
	})
}

// An admission of ours that opens while there is no lease is compared with what
// the View says all the same, and while half of it is loaded it waits.
func TestOurAdmissionsAreLookedAtWithoutALease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		w.lease = false
		h := &counter{}
		old := w.rights(t, dev, ops)
		w.cfg.Service.effects.begin(&call{serverID: "NA", clientID: 1}, old, h, time.Hour)
		w.cfg.Service.effects.begin(&call{serverID: "NA", clientID: 2}, old, h, time.Hour)
		w.opens(1)
		w.wantSent(t, kicked(1))
		h.want(t, 0)
		w.end(1, sys.Closed)
		h.want(t, 1)
		w.partial = true
		w.opens(2)
		h.want(t, 1)
		w.wantSent(t)
		w.partial, w.lease = false, true
		w.Resync()
		w.wantSent(t, kicked(2))
		h.want(t, 1)
		w.end(2, sys.Closed)
		h.want(t, 2)
	})
}

// Without a lease nobody is judged by what the View says of them; with one, all
// are, also those whose beginning was not seen.
func TestNobodyIsJudgedWithoutALease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		w.lease, w.partial, w.access[w.user] = false, true, nil
		w.opens(1)
		w.Resync()
		done := w.changes(w.ofUser(""), nil)
		w.wantSent(t)
		<-time.After(kickPatience / 2)
		synctest.Wait()
		if done.Load() {
			t.Error("a change is enforced by a View that is not whole")
		}
		w.lease, w.partial, w.access[w.user] = true, false, w.rights(t, ops)
		w.Resync()
		w.wantSent(t)
		if !done.Load() {
			t.Error("not enforced when the View is whole")
		}
		w.partial, w.lease = true, false
		w.opens(2)
		late := w.changes(w.ofUser(""), nil)
		<-time.After(kickPatience)
		synctest.Wait()
		if !late.Load() {
			t.Error("waits for ever")
		}
		w.partial, w.lease, w.narrowed, w.access[w.user] = false, true, true, w.rights(t, ops)
		w.Resync()
		w.wantSent(t, kicked(2)) // it opened unseen, and something was taken since
	})
}

// An expiry ends connections at its moment, also one that is moved.
func TestAnExpiryEndsConnectionsAtItsMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		until := func(d time.Duration) *kv.Access {
			a, e := w.rights(t, ops), time.Now().Add(d)
			a.User.ExpiresAt = &e
			return a
		}
		w.access[w.user] = until(3 * time.Hour)
		w.opens(1)
		w.changes(w.ofUser(""), until(2*time.Hour))
		<-time.After(2*time.Hour - time.Nanosecond)
		synctest.Wait()
		w.wantSent(t)
		<-time.After(time.Nanosecond)
		synctest.Wait()
		w.wantSent(t, kicked(1))
		if n := valueOf(t, w.cfg.Metrics.kicks.WithLabelValues("expired")); n != 1 {
			t.Errorf("%v closed as expired, want 1", n)
		}
		w.end(1, sys.Closed)
		w.access[w.user] = until(time.Hour)
		w.opens(2)
		w.hears("DISCONNECT", 2, "")
		<-time.After(2 * time.Hour)
		synctest.Wait()
		w.wantSent(t)
	})
}

// A list of a server closes what must not be, adds what no event told of, and
// takes away what is gone, but not what has opened or closed while it was read.
func TestAListCorrectsTheTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		w.opens(1)
		w.opens(2)
		<-time.After(time.Millisecond)
		w.begin()
		began := time.Now()
		<-time.After(time.Millisecond)
		w.opens(3)
		w.hears("DISCONNECT", 2, "")
		row := func(cid uint64, user string, age time.Duration) sys.Connection {
			return sys.Connection{CID: cid, User: []byte(user), Start: time.Now().Add(-age)}
		}
		stranger := newPair(t, 0xa0, 9).pub
		l := &sys.Listing{Server: "NA", Node: "n1", Rows: []sys.Connection{
			row(2, w.scene.client.pub, time.Minute), row(4, w.scene.client.pub, time.Minute), row(5, w.scene.client.pub, time.Second),
			row(6, stranger, time.Minute), row(7, stranger, time.Second), row(8, "USERVICE", time.Minute),
		}}
		w.mu.Lock()
		w.take(sys.Lists{Began: began, Whole: map[string]*sys.Listing{"NA": l}}, "")
		w.unlock()
		w.wantKnown(t, 3, 4, 6, 7) // 1 is gone; 5 is so young that its event is awaited
		w.wantSent(t, kicked(6), kicked(7))
		if n := valueOf(t, w.cfg.Metrics.findings); n != 1 {
			t.Errorf("%v findings, want only what events have missed", n)
		}
		w.mu.Lock()
		w.reading = 1
		w.take(sys.Lists{Began: time.Now(), Whole: map[string]*sys.Listing{"NB": {Server: "NB", Node: "n1"}}}, "")
		w.unlock()
		w.wantKnown(t) // the node was started again
	})
}

// BenchmarkConnection is what one connection of the cluster costs an instance
// besides the library: its two events, of 5000 users with 20 rooms.
func BenchmarkConnection(b *testing.B) {
	r := &ruling{access: map[bus.UserKey]*kv.Access{}, lease: true}
	e := NewEnforcer(EnforcerConfig{
		Service: &Service{effects: newEffects()}, Limit: 50, Log: slog.New(slog.DiscardHandler),
		Metrics: NewEnforceMetrics(prometheus.NewRegistry()), Now: time.Now,
	})
	e.view = r
	var msgs []*nats.Msg
	for n := range 5000 {
		k := bus.UserKey{byte(n), byte(n >> 8), 1}
		a := &kv.Access{User: bus.User{V: bus.UserVersion, Key: k, Handle: "u", Role: bus.Member, Status: bus.Active}}
		for i := range 20 {
			a.Rooms = append(a.Rooms, kv.Grant{Room: bus.RoomID(fmt.Sprintf("room-%02d", i)), Role: bus.Writer})
		}
		r.access[k] = a
		msgs = append(msgs, &nats.Msg{Subject: "$SYS.ACCOUNT.BUS.CONNECT", Data: fmt.Appendf(nil, // as long as a real one
			`{"type":"io.nats.server.advisory.v1.client_connect","id":"UkEgUuaHJ2o1Y2OB8Vultw","timestamp":"2026-11-25T03:32:39.948762557Z",`+
				`"server":{"name":"n1","host":"127.0.0.1","id":"NA","cluster":"unibus","ver":"2.15.2","metadata":{"unibus_config":"82a63d55"},`+
				`"feature_flags":{"js_ack_fc_v2":false},"jetstream":true,"flags":7,"seq":128,"time":"2026-11-25T03:32:39.94881842Z"},`+
				`"client":{"start":"2026-11-25T03:32:39.943701439Z","host":"127.0.0.1","id":%d,"acc":"BUS","user":%q,"name":"x","lang":"go",`+
				`"ver":"1.55.0","issuer_key":"BUS","name_tag":"BUS","kind":"Client","client_type":"nats"}}`, n+1, k.NKey())})
	}
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		m := msgs[n%len(msgs)]
		m.Subject = "$SYS.ACCOUNT.BUS.CONNECT"
		e.told(m)
		m.Subject = "$SYS.ACCOUNT.BUS.DISCONNECT"
		e.told(m)
		n++
	}
}
