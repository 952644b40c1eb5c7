package callout

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

func TestDecide(t *testing.T) {
	s := newScene(t)
	user := func(change func(*bus.User)) *kv.Access {
		a := s.access(t)
		change(&a.User)
		return a
	}
	until := func(d time.Duration) *kv.Access {
		e := moment.Add(d)
		return user(func(u *bus.User) { u.ExpiresAt = &e })
	}
	rooms := func(n int) *kv.Access {
		a := s.access(t)
		for i := range n {
			a.Rooms = append(a.Rooms, kv.Grant{Room: bus.RoomID(fmt.Sprintf("r%d", i)), Role: bus.Reader})
		}
		return a
	}
	for _, tt := range []struct {
		name   string
		access *kv.Access
		err    error
		want   outcome
	}{
		{"active", s.access(t), nil, outcome{allow: true, reason: "active"}},
		{"an admin has no other rights on the bus", user(func(u *bus.User) { u.Role = bus.Admin }), nil, outcome{allow: true, reason: "active"}},
		{"not yet expired", until(time.Nanosecond), nil, outcome{allow: true, reason: "active"}},
		{"as many rooms as allowed", rooms(bus.MaxRoomsPerUser), nil, outcome{allow: true, reason: "active"}},
		{"no record", nil, nil, outcome{reason: "unknown"}},
		{"revoked", user(func(u *bus.User) { u.Status = bus.Revoked }), nil, outcome{reason: "revoked", final: true}},
		{"suspended", user(func(u *bus.User) { u.Status = bus.Suspended }), nil, outcome{reason: "suspended"}},
		{"the moment of expiry is past it", until(0), nil, outcome{reason: "expired"}},
		{"expired", until(-time.Hour), nil, outcome{reason: "expired"}},
		{"a status nobody knows", user(func(u *bus.User) { u.Status = "friendly" }), nil, outcome{reason: "unknown_status", alert: true}},
		{"no status", user(func(u *bus.User) { u.Status = "" }), nil, outcome{reason: "unknown_status", alert: true}},
		{"too many rooms", rooms(bus.MaxRoomsPerUser + 1), nil, outcome{reason: "too_many_rooms", alert: true, rooms: true}},
		{"broken record", nil, errors.New("bad JSON"), outcome{reason: "broken_record", alert: true}},
		{"broken record beside a readable one", s.access(t), errors.New("bad JSON"), outcome{reason: "broken_record", alert: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := decide(tt.access, tt.err, moment)
			tt.want.err = tt.err
			if got != tt.want {
				t.Errorf("decide = %+v, want %+v", got, tt.want)
			}
			if got.quiet {
				t.Error("a decision is never silent")
			}
		})
	}
}

func TestResultNamesAMetricLabel(t *testing.T) {
	for want, o := range map[string]outcome{
		"allow": {allow: true}, "deny": denial("unknown"), "error": silence("no_lease", nil),
	} {
		if got := o.result(); got != want {
			t.Errorf("result of %+v = %q, want %q", o, got, want)
		}
	}
}
