package api

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// trail writes the audit. What goes into it is who asked for what, from where,
// and what came of it: never a token, a signature or a body.
type trail struct {
	audit   *kv.Audit
	log     *slog.Logger
	now     func() time.Time
	metrics *metrics
	denials *limiter[bus.UserKey]
}

// denialRate bounds what one key can have written about itself: whoever is
// refused in a loop must not push everybody's history out of the audit.
var denialRate = Rate{PerSecond: 0.2, Burst: 20}

// attemptTimeout bounds the write that every change waits for.
const attemptTimeout = 1500 * time.Millisecond

func (t *trail) entry(key bus.UserKey, request, from string, act action, about target) bus.AuditEntry {
	e := bus.AuditEntry{
		At: t.now().UTC().Truncate(time.Millisecond), Action: string(act), Actor: key.NKey(),
		Room: about.room, From: from, Request: request,
	}
	if about.user != (bus.UserKey{}) {
		e.User = about.user.NKey()
	}
	return e
}

// attempt returns when the entry is stored by a quorum.
func (t *trail) attempt(ctx context.Context, e bus.AuditEntry) error {
	actx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	e.Kind = bus.AuditAttempt
	err := t.audit.Record(actx, e)
	if err != nil {
		t.metrics.auditFailed.Inc()
		t.log.Warn("attempt not recorded", "action", e.Action, "request", e.Request, "err", err)
		if bus.CodeOf(err) != bus.Unavailable {
			u := bus.E(bus.Unavailable, "the audit cannot be written now; nothing was changed")
			u.Err = err
			return u
		}
	}
	return err
}

// outcome says what came of an attempt.
func (t *trail) outcome(e bus.AuditEntry, done effect, err error) {
	if c, ok := done.body.(bus.Change); ok && err == nil {
		t.metrics.proof(c, done.took)
	}
	e.Kind, e.At, e.Revision = bus.AuditOutcome, t.now().UTC().Truncate(time.Millisecond), done.revision
	e.Code = bus.CodeOf(err)
	switch e.Code {
	case "":
		e.Result = "ok"
		if done.already {
			e.Result = "already"
		}
		if !done.verified {
			e.Result = "unproven"
		}
	case bus.Unavailable, bus.Internal:
		e.Result = "failed"
	default:
		e.Result = "refused"
	}
	t.audit.Note(e)
}

// refused notes that may said no.
func (t *trail) refused(c *caller, act action, about target, err error) {
	e := t.entry(c.key, c.request, c.from, act, about)
	e.Code = bus.CodeOf(err)
	t.denial(c.key, e)
}

// denied notes that a known key was not let in at all.
func (t *trail) denied(x *exchange, reason string) {
	e := t.entry(x.key, x.id, x.from.String(), "api", target{user: x.key})
	e.Code, e.Detail = bus.Unauthenticated, reason
	t.denial(x.key, e)
}

func (t *trail) denial(k bus.UserKey, e bus.AuditEntry) {
	if _, ok := t.denials.take(k, t.now()); !ok {
		t.metrics.auditDropped.Inc()
		return
	}
	e.Kind, e.Result = bus.AuditDenial, "refused"
	t.audit.Note(e)
}

// summary is a detail of several words.
func summary(words ...string) string { return strings.Join(words, " ") }
