package api

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"unibus.internal/bus"
)

var statusOf = map[bus.Code]int{
	bus.Invalid: http.StatusBadRequest, bus.Unauthenticated: http.StatusUnauthorized, bus.Forbidden: http.StatusForbidden,
	bus.NotFound: http.StatusNotFound, bus.Conflict: http.StatusConflict, bus.Unavailable: http.StatusServiceUnavailable,
	bus.Internal: http.StatusInternalServerError,
}

// errMethod is a path that is there, asked by a method that is not.
var errMethod = bus.E(bus.Invalid, "this route has no such method").WithHint("GET /openapi.json lists them")

// retryAfter is told with every 503: an election takes seconds, a moment of
// load less.
const retryAfter = 2 * time.Second

// limited is the error of a caller who asks too often: the code is unavailable
// like everything that may succeed later, the status 429 tells whose fault it is.
type limited struct {
	err   *bus.Error
	retry time.Duration
}

func tooMany(retry time.Duration, who string) error {
	return &limited{bus.E(bus.Unavailable, "too many requests from this %s", who), retry}
}

func (l *limited) Error() string { return l.err.Error() }

func (l *limited) Unwrap() error { return l.err }

// problemOf maps an error to its document. A foreign error is an internal one,
// and its text stays here. An unauthenticated caller gets one and the same
// answer whatever was wrong: who is not known learns nothing, not even an id.
func problemOf(err error, requestID string) (bus.Problem, http.Header) {
	code, h := bus.CodeOf(err), http.Header{}
	status := statusOf[code]
	if status == 0 {
		code, status = bus.Internal, http.StatusInternalServerError
	}
	p := bus.Problem{Title: http.StatusText(status), Status: status, RequestID: requestID}
	switch e := new(bus.Error); {
	case code == bus.Unauthenticated:
		p.Detail, p.RequestID = "a signed request of an active user is needed", ""
		h.Set("WWW-Authenticate", "Signature")
	case code == bus.Internal:
	case errors.As(err, &e):
		p.Detail, p.Hint = e.Msg, e.Hint
	}
	if errors.Is(err, errMethod) {
		p.Status, p.Title = http.StatusMethodNotAllowed, http.StatusText(http.StatusMethodNotAllowed)
	}
	if errors.Is(err, errRange) {
		p.Status, p.Title = http.StatusRequestedRangeNotSatisfiable, http.StatusText(http.StatusRequestedRangeNotSatisfiable)
	}
	if code == bus.Unavailable {
		retry := retryAfter
		if l := new(limited); errors.As(err, &l) {
			p.Status, p.Title, retry = http.StatusTooManyRequests, http.StatusText(http.StatusTooManyRequests), l.retry
		}
		h.Set("Retry-After", strconv.Itoa(max(1, int((retry+time.Second-1)/time.Second))))
	}
	p.Type = bus.ProblemType + string(code)
	return p, h
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	writeBody(w, status, v)
}

func writeBody(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
