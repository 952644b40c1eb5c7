package callout

import (
	"errors"
	"slices"
	"testing"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// noted keeps what was noted.
type noted struct{ entries []bus.AuditEntry }

func (n *noted) Note(e bus.AuditEntry) { n.entries = append(n.entries, e) }

// TestDecisionsAreNoted: each answer is one entry with its reason, under the key
// that was proven and no other; what was not answered is none.
func TestDecisionsAreNoted(t *testing.T) {
	g := newStage(t)
	book := &noted{}
	g.service.cfg.Audit = book
	alice := g.access(t).User.Key.NKey()
	entry := func(user, result, reason string, code bus.Code) bus.AuditEntry {
		return bus.AuditEntry{
			At: moment, Kind: bus.AuditConnect, Action: "connect", Actor: user, User: user, From: "192.0.2.7", Result: result, Code: code, Detail: reason,
		}
	}
	tells, barrier := g.tells, g.barrier
	status := func(s bus.Status) {
		a := g.access(t)
		a.User.Status = s
		g.tells = func() (*kv.Access, error) { return a, nil }
		g.barrier = func() error { return nil }
	}
	for _, c := range []struct {
		name  string
		given func(p *parts)
		want  []bus.AuditEntry
	}{
		{"admitted", func(*parts) {}, []bus.AuditEntry{entry(alice, "allow", "active", "")}},
		{"suspended", func(*parts) { status(bus.Suspended) }, []bus.AuditEntry{entry(alice, "deny", "suspended", bus.Forbidden)}},
		{"revoked", func(*parts) { status(bus.Revoked) }, []bus.AuditEntry{entry(alice, "deny", "revoked", bus.Forbidden)}},
		{"unreadable", func(*parts) {
			g.tells = func() (*kv.Access, error) { return nil, errors.New("bad record") }
			g.barrier = func() error { return nil }
		}, []bus.AuditEntry{entry(alice, "deny", "broken_record", bus.Internal)}},
		{"unknown", func(*parts) {
			g.tells = func() (*kv.Access, error) { return nil, nil }
			g.barrier = func() error { return nil }
		}, []bus.AuditEntry{entry(alice, "deny", "unknown", bus.Unauthenticated)}},
		{"not proven", func(p *parts) { p.at("connect_opts")["sig"] = "AAAA" }, []bus.AuditEntry{entry("", "deny", "signature", bus.Unauthenticated)}},
		{"not known", func(*parts) {
			g.tells = func() (*kv.Access, error) { return nil, nil }
			g.barrier = func() error { return errors.New("no quorum") }
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			book.entries, g.tells, g.barrier = nil, tells, barrier
			p := g.parts(t)
			p.at("client_info")["host"] = "192.0.2.7"
			c.given(p)
			g.answer(t, g.job(p.message(t)))
			if !slices.Equal(book.entries, c.want) {
				t.Errorf("noted %+v, want %+v", book.entries, c.want)
			}
		})
	}
}
