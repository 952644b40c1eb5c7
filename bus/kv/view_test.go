package kv

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
)

// clock is a wall clock that a test moves.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func newTestView(t *testing.T) (*View, *clock) {
	t.Helper()
	c := &clock{time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)}
	v := &View{
		cfg:  ViewConfig{Service: "authcallout", Node: "n1", Lease: DefaultLease, Now: c.now},
		boot: "b00t", log: slog.New(slog.DiscardHandler), access: map[bus.UserKey]*Access{},
		woken: make(chan struct{}), known: map[string]*holder{},
	}
	for i := range v.tables {
		v.tables[i] = newTable(c.t.Add(-time.Hour))
		v.live[i] = true
	}
	v.barriers.init()
	v.holds.init()
	return v, c
}

func newKey(t *testing.T) bus.UserKey {
	t.Helper()
	kp, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	k, err := bus.ParseUserKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func goodUser(k bus.UserKey, h bus.Handle) bus.User {
	return bus.User{V: 1, Key: k, Handle: h, Role: bus.Member, Status: bus.Active}
}

// put applies a record as the live feed does, without acknowledging it, and
// returns what would be acknowledged.
func put(t *testing.T, v *View, i int, rev uint64, key string, value []byte) []*pendingAck {
	t.Helper()
	r := record{key: key, rev: rev, at: v.cfg.Now(), value: value}
	v.tables[i].note(r)
	v.tables[i].put(i, r)
	c := changeOf(i, key, rev)
	v.invalidate(c)
	return v.holds.settle(v.holds.pendingFor([]Change{c}, v.tables[i].created)...)
}

// A record that cannot be understood must deny its own key and no other.
func TestBrokenRecordDeniesItsOwnKeyOnly(t *testing.T) {
	alice, bob := newKey(t), newKey(t)
	for name, value := range map[string]string{
		"not JSON":         `{`,
		"unknown version":  strings.Replace(string(encode(t, goodUser(alice, "alice"))), `"v":1`, `"v":2`, 1),
		"unknown role":     strings.Replace(string(encode(t, goodUser(alice, "alice"))), `"member"`, `"root"`, 1),
		"unknown status":   strings.Replace(string(encode(t, goodUser(alice, "alice"))), `"active"`, `"Active"`, 1),
		"another's record": string(encode(t, goodUser(bob, "alice"))),
		"a low-order key":  strings.Replace(string(encode(t, goodUser(alice, "alice"))), alice.Hex(), "01"+strings.Repeat("00", 31), 1),
		"bad handle":       strings.Replace(string(encode(t, goodUser(alice, "alice"))), `"alice"`, `"al.ice"`, 1),
		"not an object":    `[]`,
	} {
		t.Run(name, func(t *testing.T) {
			v, _ := newTestView(t)
			put(t, v, usersIdx, 1, alice.Hex(), encode(t, goodUser(alice, "alice")))
			put(t, v, usersIdx, 2, bob.Hex(), encode(t, goodUser(bob, "bob")))
			put(t, v, usersIdx, 3, alice.Hex(), []byte(value))
			if a, err := v.Access(alice); err == nil {
				t.Errorf("access of alice = %+v, want an error", a)
			}
			if a, err := v.Access(bob); err != nil || a == nil {
				t.Errorf("access of bob = %v, %v; want his own", a, err)
			}
			if b := v.Broken(); len(b) != 1 || b[0].Key != alice.Hex() || b[0].Revision != 3 {
				t.Errorf("broken = %+v", b)
			}
			put(t, v, usersIdx, 4, alice.Hex(), encode(t, goodUser(alice, "alice")))
			if a, err := v.Access(alice); err != nil || a == nil || len(v.Broken()) != 0 {
				t.Errorf("a repaired record stays denied: %v, %v", a, err)
			}
		})
	}
}

// A membership under a key that spells its user in any other way grants nothing,
// whether that user is known already or not.
func TestMisfiledMembershipGrantsNothing(t *testing.T) {
	alice, bob := newKey(t), newKey(t)
	of := func(k bus.UserKey) []byte {
		return encode(t, bus.Membership{V: 1, Room: "ops", User: k, Role: bus.Owner, Status: bus.Present})
	}
	lowOrder := "01" + strings.Repeat("00", 31)
	for name, c := range map[string]struct{ key, value string }{
		"too long":           {"ops." + alice.Hex() + "00", string(of(alice))},
		"much too long":      {"ops." + strings.Repeat(alice.Hex(), 3), string(of(alice))},
		"too short":          {"ops." + alice.Hex()[:62], string(of(alice))},
		"upper case":         {"ops." + strings.ToUpper(alice.Hex()), string(of(alice))},
		"an nkey":            {"ops." + alice.NKey(), string(of(alice))},
		"no hex":             {"ops." + strings.Repeat("z", 64), string(of(alice))},
		"another's record":   {"ops." + alice.Hex(), string(of(bob))},
		"another room's":     {"dev." + alice.Hex(), string(of(alice))},
		"no user":            {"ops." + alice.Hex(), `{"v":1,"room":"ops","role":"owner","status":"present"}`},
		"a low-order key":    {"ops." + lowOrder, strings.Replace(string(of(alice)), alice.Hex(), lowOrder, 1)},
		"a wildcard of keys": {"ops.*", string(of(alice))},
	} {
		t.Run(name, func(t *testing.T) {
			v, _ := newTestView(t)
			put(t, v, usersIdx, 1, alice.Hex(), encode(t, goodUser(alice, "alice")))
			for i, id := range []bus.RoomID{"ops", "dev", "own"} {
				put(t, v, roomsIdx, uint64(i+1), string(id), encode(t, bus.Room{V: 1, ID: id, Status: bus.RoomActive, Creator: bob}))
			}
			for rev, member := range []bool{false, true} { // unknown, then known
				if member {
					put(t, v, membersIdx, 10, "own."+alice.Hex(), bytes.ReplaceAll(of(alice), []byte("ops"), []byte("own")))
				}
				put(t, v, membersIdx, uint64(11+rev), c.key, []byte(c.value))
				a, err := v.Access(alice)
				if err != nil || a == nil || len(a.Rooms) != rev {
					t.Errorf("access of alice = %+v, %v; want %d rooms", a, err, rev)
				}
				if b := v.Broken(); len(b) != 1 || b[0].Key != c.key {
					t.Errorf("broken = %+v, want %s", b, c.key)
				}
			}
		})
	}
}

// Access must be made of active rooms, present memberships and known roles.
func TestAccessIsTheMembersTruth(t *testing.T) {
	alice := newKey(t)
	member := func(room bus.RoomID, role bus.RoomRole, s bus.MembershipStatus) []byte {
		return encode(t, bus.Membership{V: 1, Room: room, User: alice, Role: role, Status: s})
	}
	room := func(id bus.RoomID, s bus.RoomStatus) []byte {
		return encode(t, bus.Room{V: 1, ID: id, Status: s, Creator: alice})
	}
	v, _ := newTestView(t)
	put(t, v, usersIdx, 1, alice.Hex(), encode(t, goodUser(alice, "alice")))
	put(t, v, roomsIdx, 1, "ops", room("ops", bus.RoomActive))
	put(t, v, roomsIdx, 2, "old", room("old", bus.RoomArchived))
	put(t, v, roomsIdx, 3, "left", room("left", bus.RoomActive))
	put(t, v, membersIdx, 1, memberKey("ops", alice), member("ops", bus.Writer, bus.Present))
	put(t, v, membersIdx, 2, memberKey("old", alice), member("old", bus.Owner, bus.Present))
	put(t, v, membersIdx, 3, memberKey("left", alice), member("left", bus.Owner, bus.Removed))
	put(t, v, membersIdx, 4, memberKey("norecord", alice), member("norecord", bus.Owner, bus.Present))
	a, err := v.Access(alice)
	if err != nil || len(a.Rooms) != 1 || a.Rooms[0] != (Grant{Room: "ops", Role: bus.Writer}) {
		t.Fatalf("access = %+v, %v; want ops only", a, err)
	}
	again, _ := v.Access(alice)
	if again != a {
		t.Error("unchanged access is not the same value")
	}
	put(t, v, roomsIdx, 4, "ops", room("ops", bus.RoomArchived))
	if a, _ := v.Access(alice); len(a.Rooms) != 0 {
		t.Errorf("an archived room still grants: %+v", a.Rooms)
	}
	put(t, v, roomsIdx, 5, "ops", room("ops", bus.RoomActive))
	put(t, v, membersIdx, 5, memberKey("ops", alice), []byte(`{"v":1,"room":"ops"}`))
	if a, _ := v.Access(alice); len(a.Rooms) != 0 {
		t.Errorf("an unreadable membership still grants: %+v", a.Rooms)
	}
}

func barrierFor(t *testing.T, v *View, boot, token string, released bool) []byte {
	t.Helper()
	return encode(t, barrierRecord{
		V: 1, Instance: v.Instance(), Service: "authcallout", Node: "n1", Boot: boot,
		LeaseMS: v.cfg.Lease.Milliseconds(), Token: token, Released: released,
	})
}

func deliver(t *testing.T, v *View, i int, rev uint64, at time.Time, boot, token string) error {
	t.Helper()
	_, err := v.sawBarrier(i, record{key: barrierKeys + v.Instance() + "." + boot, rev: rev, at: at, value: barrierFor(t, v, boot, token, false)})
	return err
}

// Only one's own record, in all three streams, proves a View current; the
// lease counts from the start of that barrier.
func TestLeaseNeedsOwnRecordInEveryStream(t *testing.T) {
	v, c := newTestView(t)
	start := c.t
	v.beginLocked("mine", allStreams)
	c.t = c.t.Add(time.Second)
	held := func() bool { _, ok := v.Lease(); return ok }
	for i := range v.tables {
		if held() {
			t.Fatalf("a lease after %d of 3 streams", i)
		}
		if err := errors.Join(deliver(t, v, i, 1, c.t, v.boot, "foreign"), deliver(t, v, i, 2, c.t, "other", "mine")); err != nil || held() {
			t.Fatalf("stream %d: a foreign record proves something (%v)", i, err)
		}
		if err := deliver(t, v, i, 3, c.t, v.boot, "mine"); err != nil {
			t.Fatal(err)
		}
	}
	until, ok := v.Lease()
	if !ok || !until.Equal(start.Add(DefaultLease)) {
		t.Fatalf("lease until %v, %v; want ten seconds from the barrier's start", until, ok)
	}
	if !v.Lasts(until) || v.Lasts(time.Time{}) {
		t.Error("the lease does not last, or none does")
	}
	c.t = start.Add(DefaultLease)
	if held() {
		t.Error("a lease at its end")
	}
	v.beginLocked("again", allStreams)
	for i := range v.tables {
		if err := deliver(t, v, i, 4, c.t, v.boot, "again"); err != nil {
			t.Fatal(err)
		}
	}
	if !held() || v.Lasts(until) {
		t.Error("a lease that ran out lasts again when another one is held")
	}
	c.t = start.Add(-3 * time.Second)
	if held() {
		t.Error("a lease after the wall clock was set back")
	}
}

// A stream whose clock differs by more than two seconds proves nothing.
func TestBarrierRefusesForeignClock(t *testing.T) {
	for _, off := range []time.Duration{-3 * time.Second, 3 * time.Second, -10 * time.Minute, 10 * time.Minute} {
		v, c := newTestView(t)
		v.beginLocked("mine", allStreams)
		if err := deliver(t, v, usersIdx, 1, c.t.Add(off), v.boot, "mine"); !errors.Is(err, errUntrusted) {
			t.Errorf("clock off by %s: %v, want the feed to be given up", off, err)
		}
		if !v.barriers.proven[usersIdx].IsZero() {
			t.Errorf("clock off by %s proves", off)
		}
	}
}

// prove delivers a barrier of one's own from every stream of its span.
func prove(t *testing.T, v *View, s span, token string) {
	t.Helper()
	for i := range s {
		if err := deliver(t, v, int(i), 1, v.cfg.Now(), v.boot, token); err != nil {
			t.Fatal(err)
		}
	}
}

// On demand one barrier is under way at a time, and no caller is served by one
// that began before they asked.
func TestBarriersOnDemandOneAtATime(t *testing.T) {
	v, c := newTestView(t)
	pass := func(d time.Duration) { c.t = c.t.Add(d) }
	ask := func(s span) (served func() bool) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // asks, and does not wait
		if v.barrier(ctx, s) == nil {
			t.Fatal("a barrier that nobody wrote")
		}
		asked := c.t
		return func() bool { return !v.provenLocked(s).Before(asked) }
	}
	due := func(when string, want span, wantRest time.Duration) {
		t.Helper()
		if s, rest := v.dueLocked(c.t); s != want || rest != wantRest {
			t.Fatalf("%s: due %d, look again in %s; want %d, %s", when, s, rest, want, wantRest)
		}
	}
	due("at the start", allStreams, 0)
	v.beginLocked("renewal", allStreams)
	prove(t, v, allStreams, "renewal")
	pass(time.Millisecond)
	due("nobody asks", 0, 0)
	first := ask(usersOnly)
	due("right behind a proven one", 0, barrierSpacing-time.Millisecond)
	pass(barrierSpacing)
	due("asked, at rest", usersOnly, 0)
	v.beginLocked("first", usersOnly)
	due("served by the one under way", 0, 0)
	pass(5 * time.Millisecond)
	second := ask(usersOnly)
	whole := ask(allStreams)
	pass(barrierPatience - 6*time.Millisecond)
	due("one is under way", 0, 0)
	for range len(v.barriers.demand) {
		<-v.barriers.demand
	}
	prove(t, v, usersOnly, "first")
	if !first() || second() || whole() {
		t.Errorf("the first barrier serves first %v, second %v, whole %v; want only who asked before it", first(), second(), whole())
	}
	if len(v.barriers.demand) != 1 {
		t.Error("nobody is told that the next barrier may begin")
	}
	due("the one under way is proven", allStreams, 0)
	v.beginLocked("lost", allStreams)
	pass(time.Millisecond)
	third := ask(usersOnly)
	pass(barrierPatience - time.Millisecond)
	due("the one under way is lost", usersOnly, 0)
	v.beginLocked("third", usersOnly)
	prove(t, v, usersOnly, "third")
	if !third() || whole() {
		t.Errorf("a barrier over users serves third %v, whole %v; want only the one who asked for users", third(), whole())
	}
	pass(renewEvery - barrierPatience)
	due("time to renew, whatever was asked", allStreams, 0)
}

// A barrier over users renews no lease.
func TestUsersBarrierRenewsNoLease(t *testing.T) {
	v, c := newTestView(t)
	v.beginLocked("whole", allStreams)
	prove(t, v, allStreams, "whole")
	before, _ := v.Lease()
	c.t = c.t.Add(time.Second)
	v.beginLocked("users", usersOnly)
	prove(t, v, usersOnly, "users")
	if after, _ := v.Lease(); !after.Equal(before) {
		t.Errorf("the lease moved from %s to %s", before, after)
	}
	if len(v.barriers.open) != 0 {
		t.Errorf("still open: %v", v.barriers.open)
	}
}

// Dropping the View ends the lease at once, also for barriers under way.
func TestDropForgetsBarriersUnderWay(t *testing.T) {
	v, c := newTestView(t)
	v.beginLocked("old", allStreams)
	v.dropLocked("another stream")
	for i := range v.tables {
		if err := deliver(t, v, i, 1, c.t, v.boot, "old"); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := v.Lease(); ok {
		t.Error("a barrier from before the drop gave a lease")
	}
}

// An acknowledgement waits for every decision about that user that was in
// flight when the change was applied, and for no later one.
func TestAcknowledgementWaitsForDecisionsInFlight(t *testing.T) {
	v, _ := newTestView(t)
	v.cfg.Lease = 0 // nothing is sent; the wait is what is tested
	alice, bob := newKey(t), newKey(t)
	before, other := v.Hold(alice), v.Hold(bob)
	if ready := put(t, v, usersIdx, 1, alice.Hex(), encode(t, goodUser(alice, "alice"))); len(ready) != 0 {
		t.Fatal("acknowledged while a decision about alice was in flight")
	}
	pending := before.waiting[0]
	after := v.Hold(alice)
	if pending.left != 1 || len(after.waiting) != 0 || len(other.waiting) != 0 {
		t.Fatalf("waits for %d holds; a later one or another user's counts", pending.left)
	}
	before.Release()
	before.Release()
	if pending.left != 0 {
		t.Errorf("still waiting for %d after the release", pending.left)
	}
	if ready := put(t, v, roomsIdx, 1, "ops", nil); len(ready) != 0 {
		t.Error("a room's change did not wait for the users in flight")
	}
	after.Release()
	other.Release()
	if ready := put(t, v, usersIdx, 2, alice.Hex(), nil); len(ready) != 1 {
		t.Error("not acknowledged at rest")
	}
}

// A writer waits for every boot that may still decide on the old state.
func TestHoldersAtAChange(t *testing.T) {
	see := func(v *View, i int, rev uint64, at time.Time, boot string, released bool) {
		v.sawHolder(i, record{key: barrierKeys + v.Instance() + "." + boot, rev: rev, at: at, value: barrierFor(t, v, boot, "t", released)})
	}
	v, c := newTestView(t)
	at := c.t
	for i := range v.tables {
		see(v, i, 10, at.Add(-time.Second), "alive", false)
		see(v, i, 11, at.Add(-11*time.Second), "silent-but-leased", false)
		see(v, i, 12, at.Add(-13*time.Second), "long-gone", false)
		see(v, i, 13, at.Add(-time.Second), "stopped", true)
		see(v, i, 200, at.Add(time.Second), "started-after", false)
	}
	see(v, membersIdx, 10, at.Add(-time.Second), "only-in-another-stream", false)
	see(v, roomsIdx, 10, at.Add(-time.Second), "before-the-stream-was-made-again", false)
	see(v, usersIdx, 300, at.Add(time.Second), "before-the-stream-was-made-again", false)
	var got []string
	for _, h := range v.holdersAt(usersIdx, 100, at) {
		got = append(got, h.Boot)
	}
	want := "alive before-the-stream-was-made-again only-in-another-stream silent-but-leased"
	if strings.Join(got, " ") != want {
		t.Errorf("holders = %v\nwant      %s", got, want)
	}
}

// After a reload, whatever is newer than before is acknowledged, and nothing
// on the first load.
func TestReloadAcknowledgesWhatIsNewer(t *testing.T) {
	alice, bob := newKey(t), newKey(t)
	load := func(revA, revB uint64) *table {
		tb := newTable(time.Unix(1, 0))
		tb.put(usersIdx, record{key: alice.Hex(), rev: revA, value: encode(t, goodUser(alice, "alice"))})
		tb.put(usersIdx, record{key: bob.Hex(), rev: revB, value: encode(t, goodUser(bob, "bob"))})
		return tb
	}
	if first := load(1, 2).newerThan(usersIdx, newTable(time.Time{})); len(first) != 0 {
		t.Errorf("first load acknowledges %v", first)
	}
	got := load(1, 7).newerThan(usersIdx, load(1, 2))
	if len(got) != 1 || got[0].User != bob || got[0].Revision != 7 {
		t.Errorf("reload acknowledges %+v, want bob at 7", got)
	}
}

// Whoever enforces changes is told of each one after the View answers with it,
// of those that a reload brought or took away too, and the acknowledgement
// waits for their word, given once or more often.
func TestAnAcknowledgementWaitsForTheEnforcement(t *testing.T) {
	v, _ := newTestView(t)
	v.cfg.Lease = 0
	alice, bob, carol := newKey(t), newKey(t), newKey(t)
	var told []Change
	var done []func(Enforced)
	v.cfg.OnChange = func(c Change, d func(Enforced)) {
		if a, _ := v.Access(c.User); a != nil && a.Revision != c.Revision {
			t.Errorf("told of revision %d while the View says %d", c.Revision, a.Revision)
		}
		told, done = append(told, c), append(done, d)
	}
	table := v.tables[usersIdx]
	if err := v.apply(usersIdx, table, record{key: alice.Hex(), rev: 4, value: encode(t, goodUser(alice, "alice"))}); err != nil {
		t.Fatal(err)
	}
	if len(told) != 1 || told[0].User != alice || told[0].Revision != 4 {
		t.Fatalf("told of %+v", told)
	}
	c := changeOf(usersIdx, bob.Hex(), 5)
	h := v.Hold(bob)
	acks := v.holds.pendingFor([]Change{c}, table.created)
	v.changed(acks)
	if acks[0].left != 2 {
		t.Fatalf("waits for %d, want the hold and the enforcement", acks[0].left)
	}
	h.Release()
	if acks[0].left != 1 {
		t.Error("acknowledged before the change was enforced")
	}
	done[1](Enforced{Closed: 3})
	done[1](Enforced{})
	if acks[0].outcome.Closed != 3 {
		t.Errorf("outcome is %+v, want what was said first", acks[0].outcome)
	}
	if acks[0].left != 0 {
		t.Errorf("left = %d after the change was enforced", acks[0].left)
	}
	fresh := newTable(table.created)
	fresh.put(usersIdx, record{key: carol.Hex(), rev: 9, value: encode(t, goodUser(carol, "carol"))})
	v.install(usersIdx, fresh)
	if len(told) != 4 || told[2].User != carol || told[2].Revision != 9 || told[3].User != alice || told[3].Revision != 0 {
		t.Errorf("a reload tells %+v, want carol at 9 and alice gone", told[2:])
	}
}

// What may have been taken from a session that began at a moment: everything
// newer that is no right to publish.
func TestNarrowedSince(t *testing.T) {
	alice, began := newKey(t), time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	before, after := began.Add(-time.Minute), began.Add(time.Minute)
	const archivedBefore bus.RoomStatus = "archived with the record of when"
	m := func(role bus.RoomRole, removed *time.Time) bus.Membership {
		m := bus.Membership{V: 1, Room: "ops", User: alice, Role: role, Status: bus.Present, RemovedAt: removed}
		if removed != nil {
			m.Status = bus.Removed
		}
		return m
	}
	for name, tt := range map[string]struct {
		member  any
		at      time.Time
		room    bus.RoomStatus
		roomAt  time.Time
		narrows bool
	}{
		"nothing new":                     {m(bus.Reader, nil), before, bus.RoomActive, before, false},
		"a writer since":                  {m(bus.Writer, nil), after, bus.RoomActive, after, false},
		"a reader since":                  {m(bus.Reader, nil), after, bus.RoomActive, before, true},
		"removed before":                  {m(bus.Writer, &before), before, bus.RoomActive, before, false},
		"removed before and proven again": {m(bus.Writer, &before), after, bus.RoomActive, before, false},
		"removed since":                   {m(bus.Writer, &after), after, bus.RoomActive, before, true},
		"archived before":                 {m(bus.Writer, nil), before, bus.RoomArchived, before, false},
		"archived since":                  {m(bus.Writer, nil), before, bus.RoomArchived, after, true},
		"archived before, proven again":   {m(bus.Writer, nil), before, archivedBefore, after, false},
		"unreadable":                      {"?", before, bus.RoomActive, before, true},
	} {
		t.Run(name, func(t *testing.T) {
			v, c := newTestView(t)
			c.t = tt.at
			put(t, v, membersIdx, 1, memberKey("ops", alice), encode(t, tt.member))
			c.t = tt.roomAt
			room := bus.Room{V: 1, ID: "ops", Status: tt.room, Creator: alice}
			if tt.room == archivedBefore {
				room.Status, room.ArchivedAt = bus.RoomArchived, &before
			}
			put(t, v, roomsIdx, 1, "ops", encode(t, room))
			if got := v.NarrowedSince(alice, began); got != tt.narrows {
				t.Errorf("NarrowedSince = %v, want %v", got, tt.narrows)
			}
			if v.NarrowedSince(newKey(t), began) {
				t.Error("it narrows a stranger")
			}
		})
	}
}

// A stream that was deleted and made again counts from one: a View still fed
// by the old one is far ahead of every new acknowledgement and knows nothing.
func TestSequenceIsNoProof(t *testing.T) {
	v, _ := newTestView(t)
	v.barriers.inbox = "_INBOX.x"
	v.beginLocked("mine", allStreams)
	for i := range v.tables {
		v.tables[i].lastSeq = 50
		v.barrierAnswered(&nats.Msg{Subject: fmt.Sprintf("_INBOX.x.%d.mine", i), Data: []byte(`{"stream":"x","seq":2}`)})
	}
	if _, held := v.Lease(); held {
		t.Error("an acknowledgement of sequence 2 gave a lease to a View at sequence 50 of another stream")
	}
}
