package callout

import (
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// outcome is what becomes of one request.
type outcome struct {
	allow  bool
	final  bool   // a denial that no later grant can overtake
	quiet  bool   // no answer at all
	alert  bool   // somebody should look
	rooms  bool   // it rests on more than the user's own record
	reason string // for log and metrics; never for the client
	err    error
}

// doubtful is a refusal that a grant of a moment ago could overturn.
func (o outcome) doubtful() bool { return !o.allow && !o.final && !o.quiet }

func (o outcome) result() string {
	switch {
	case o.allow:
		return "allow"
	case o.quiet:
		return "error"
	}
	return "deny"
}

// reasonUnknown is said of a key that nobody has ever registered.
const reasonUnknown = "unknown"

func denial(reason string) outcome { return outcome{reason: reason} }

func silence(reason string, err error) outcome { return outcome{quiet: true, reason: reason, err: err} }

// decide admits exactly a user whose readable record says active and not
// expired. It is pure; the rooms of the admission are those of the access.
func decide(a *kv.Access, err error, now time.Time) outcome {
	switch {
	case err != nil:
		return outcome{reason: "broken_record", alert: true, err: err}
	case a == nil:
		return denial(reasonUnknown)
	}
	allow, reason := a.Admitted(now)
	return outcome{
		allow: allow, reason: reason,
		final: a.User.Status == bus.Revoked,
		alert: reason == "unknown_status" || reason == "too_many_rooms",
		rooms: reason == "too_many_rooms",
	}
}
