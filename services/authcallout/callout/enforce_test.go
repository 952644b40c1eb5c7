package callout

import (
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
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

func TestWhatProvesThatAConnectionIsGone(t *testing.T) {
	for data, want := range map[string]string{
		`{"server":{"name":"n1"}}`: kickClosed,
		`{"server":{"name":"n1"},"error":{"code":500,"description":"no such client or leafnode id"}}`: kickGone,
		`{"server":{"name":"n1"},"error":{"code":500,"description":"server is not running"}}`:         kickRefused,
		`{"server":`: kickRefused,
		``:           kickUnreachable,
	} {
		if got := kickResult(&nats.Msg{Data: []byte(data)}); got != want {
			t.Errorf("%q is %s, want %s", data, got, want)
		}
	}
}
