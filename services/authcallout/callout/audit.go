package callout

import (
	"time"

	"unibus.internal/bus"
)

// Auditor takes decisions for the audit. Note must not block: a worker calls it.
type Auditor interface {
	Note(e bus.AuditEntry)
}

// audit notes a decision. Silence is none, and what no genuine server asked is
// no connect. A key is named only where it is proven: any other is a stranger's
// say.
func (s *Service) audit(c *call, out outcome, now time.Time) {
	if s.cfg.Audit == nil || c == nil || out.quiet {
		return
	}
	e := bus.AuditEntry{At: now, Kind: bus.AuditConnect, Action: "connect", From: c.host, Result: out.result(), Detail: out.reason}
	if c.proven {
		e.Actor, e.User = c.nkey, c.nkey
	}
	switch {
	case out.allow:
	case !c.proven, out.reason == reasonUnknown:
		e.Code = bus.Unauthenticated
	case out.alert: // a record or a size that nobody meant to be so
		e.Code = bus.Internal
	default:
		e.Code = bus.Forbidden
	}
	s.cfg.Audit.Note(e)
}
