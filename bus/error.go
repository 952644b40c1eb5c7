package bus

import (
	"errors"
	"fmt"
)

// Code says what kind of failure an error is. The codes are the stable part of
// the API's problem documents (urn:unibus:error:<code>) and of the exit codes
// of unibusctl.
type Code string

// The closed set of codes. Anything unknown is Internal, which callers must
// treat as "not decided": neither allowed nor absent.
const (
	Invalid         Code = "invalid"         // the request can never succeed as written
	Unauthenticated Code = "unauthenticated" // the caller did not prove who they are
	Forbidden       Code = "forbidden"       // known, and not allowed
	NotFound        Code = "not_found"       // proven absent; a timeout is never this
	Conflict        Code = "conflict"        // the state moved on, or already holds
	Unavailable     Code = "unavailable"     // cannot know now: no quorum, no lease, no answer. Retry
	Internal        Code = "internal"        // a fault of ours
)

// Error is the one error type that crosses a boundary of unibus. Msg is for
// whoever asked and never holds secrets; Err is for the log only.
type Error struct {
	Code Code
	Msg  string // one line, lower case, for the person who asked
	Hint string // the next command to run, or empty
	Err  error  // the cause, for logs; may be nil
}

// E makes an Error from a format. A %w verb keeps the cause reachable.
func E(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Msg: err.Error(), Err: errors.Unwrap(err)}
}

// WithHint returns a copy of e that names the next command.
func (e *Error) WithHint(format string, args ...any) *Error {
	c := *e
	c.Hint = fmt.Sprintf(format, args...)
	return &c
}

func (e *Error) Error() string { return e.Msg }

func (e *Error) Unwrap() error { return e.Err }

// CodeOf returns the code of the first *Error in err's chain, "" for nil, and
// Internal for every other error, so that a foreign error can never pass for a
// decision.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return Internal
}
