package kv

import (
	"fmt"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/seal"
)

// A room needs another key when a line of its newest roster is not what the
// records say any more, or was not for a time; who is in the records and not in
// the roster waits, and is no reason.
func TestStanding(t *testing.T) {
	v, c := newTestView(t)
	made := c.t.Add(-time.Hour)
	s := &Store{hub: &hub{view: v, now: c.now}}
	public := func(n uint64) *bus.EncryptionKey { return &bus.EncryptionKey{N: n, Public: []byte{byte(n)}} }
	rev := uint64(100)
	user := func(k bus.UserKey, edit func(*bus.User)) {
		u := goodUser(k, "u")
		u.EncryptionKey = public(1)
		if edit != nil {
			edit(&u)
		}
		rev++
		put(t, v, usersIdx, rev, k.Hex(), encode(t, u))
	}
	member := func(k bus.UserKey, edit func(*bus.Membership)) {
		m := bus.Membership{V: 1, Room: "vault", User: k, Role: bus.Writer, Status: bus.Present, AddedAt: made.Add(-time.Hour)}
		if edit != nil {
			edit(&m)
		}
		rev++
		put(t, v, membersIdx, rev, memberKey("vault", k), encode(t, m))
	}
	k := newKey(t)
	record := func(edit func(*epochRecord)) *epochRecord {
		e := &epochRecord{Epoch: 1, CreatedAt: made, Members: 150, Complete: true, roster: &seal.Roster{
			Members: []seal.Member{{User: k, Role: bus.Writer, N: 1, Key: seal.HashOf(public(1).Public)}},
		}}
		if edit != nil {
			edit(e)
		}
		return e
	}
	reset := func() { rev = 100; user(k, nil); member(k, nil) }
	later := func() *time.Time { at := made.Add(time.Minute); return &at }
	for _, x := range []struct {
		name   string
		epoch  *epochRecord
		change func()
		want   bus.RekeyWhy
	}{
		{"all as it was", record(nil), nil, ""},
		{"no key yet", nil, nil, bus.RekeyFirst},
		{"not finished", record(func(e *epochRecord) { e.Complete = false }), nil, bus.RekeyIncomplete},
		{"being made", record(func(e *epochRecord) { e.Complete, e.CreatedAt = false, c.t.Add(-time.Second) }), nil, ""},
		{"old", record(func(e *epochRecord) { e.CreatedAt = c.t.Add(-31 * 24 * time.Hour) }), nil, bus.RekeyOld},
		{"removed", record(nil), func() { member(k, func(m *bus.Membership) { m.Status, m.RemovedAt = bus.Removed, later() }) }, bus.RekeyDeparted},
		{"revoked", record(nil), func() { user(k, func(u *bus.User) { u.Status = bus.Revoked }) }, bus.RekeyDeparted},
		{"suspended", record(nil), func() { user(k, func(u *bus.User) { u.Status = bus.Suspended }) }, bus.RekeyDeparted},
		{"expired", record(nil), func() { user(k, func(u *bus.User) { u.ExpiresAt = later() }) }, bus.RekeyDeparted},
		{"resumed", record(nil), func() { user(k, func(u *bus.User) { u.InterruptedAt = later() }) }, bus.RekeyReturned},
		{"resumed before", record(nil), func() {
			user(k, func(u *bus.User) { at := made.Add(-time.Minute); u.InterruptedAt = &at })
		}, ""},
		{"added again", record(nil), func() { rev = 160; member(k, func(m *bus.Membership) { m.AddedAt = *later() }) }, bus.RekeyReturned},
		{"written again", record(nil), func() { rev = 160; member(k, nil) }, ""},
		{"demoted", record(nil), func() { member(k, func(m *bus.Membership) { m.Role = bus.Reader }) }, bus.RekeyDemoted},
		{"promoted", record(nil), func() { member(k, func(m *bus.Membership) { m.Role = bus.Owner }) }, ""},
		{"another key", record(nil), func() { user(k, func(u *bus.User) { u.EncryptionKey = public(2) }) }, bus.RekeyNewKey},
		{"no key any more", record(nil), func() { user(k, func(u *bus.User) { u.EncryptionKey = nil }) }, bus.RekeyNewKey},
	} {
		reset()
		if x.change != nil {
			x.change()
		}
		why, waiting := s.standing("vault", x.epoch)
		got := bus.RekeyWhy("")
		if len(why) > 0 {
			got = why[0].Why
		}
		if got != x.want || len(why) > 1 {
			t.Errorf("%s: %+v, want %q", x.name, why, x.want)
		}
		if waits := x.name == "promoted" || x.name == "no key yet"; (len(waiting) > 0) != waits {
			t.Errorf("%s: waiting %+v", x.name, waiting)
		}
	}
}

// Owners are told of whoever may have gone from an encrypted room, and of nothing
// else.
func TestDeparture(t *testing.T) {
	v, c := newTestView(t)
	owner, other, gone := newKey(t), newKey(t), newKey(t)
	rev := uint64(100)
	for id, encrypted := range map[bus.RoomID]bool{"vault": true, "glass": false} {
		rev++
		put(t, v, roomsIdx, rev, string(id), encode(t, bus.Room{V: 1, ID: id, Status: bus.RoomActive, Encrypted: encrypted, Creator: owner}))
		for k, role := range map[bus.UserKey]bus.RoomRole{owner: bus.Owner, other: bus.Writer, gone: bus.Owner} {
			rev++
			put(t, v, membersIdx, rev, memberKey(id, k), encode(t, bus.Membership{V: 1, Room: id, User: k, Role: role, Status: bus.Present}))
		}
	}
	state := func(s bus.Status) {
		u := goodUser(gone, "gone")
		u.Status = s
		rev++
		put(t, v, usersIdx, rev, gone.Hex(), encode(t, u))
	}
	want := fmt.Sprint(map[bus.RoomID][]bus.UserKey{"vault": {owner}})
	state(bus.Active)
	if got := v.Departure(Change{User: gone}, c.t); len(got) != 0 {
		t.Errorf("of somebody who is there: %v", got)
	}
	state(bus.Revoked)
	if got := fmt.Sprint(v.Departure(Change{User: gone}, c.t)); got != want {
		t.Errorf("of a revoke: %v, want %v", got, want)
	}
	if got := fmt.Sprint(v.Departure(Change{User: gone, Room: "vault"}, c.t)); got != want {
		t.Errorf("of a membership: %v, want %v", got, want)
	}
	if got := v.Departure(Change{User: gone, Room: "glass"}, c.t); len(got) != 0 {
		t.Errorf("of a plain room: %v", got)
	}
	if got := v.Departure(Change{Room: "vault"}, c.t); len(got) != 0 {
		t.Errorf("of the room itself: %v", got)
	}
}
