package api

import (
	"context"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime/debug"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sig"
)

const (
	// bodyTimeout cuts off who sends a body slowly.
	bodyTimeout = 10 * time.Second
	// doubt bounds all questions to the cluster before a request is admitted:
	// without a quorum the answer is still there inside two seconds.
	doubt = 1500 * time.Millisecond
	// readersPerSlot: bodies are read before a slot is taken. What one address
	// may begin within bodyTimeout (2,800 requests by default) is less than all
	// readers (4,096), so nobody alone shuts others out by sending slowly.
	readersPerSlot = 16
)

// caller is a user who has proven, with this very request, to be active and to
// hold the key: only gate.admit makes one. A handler gets one or is not called.
type caller struct {
	key     bus.UserKey
	access  *kv.Access // as the View had it when the request was admitted; see current
	request string     // id of the request
	from    string     // address, for the audit
}

func (c *caller) subject() subject { return subject{c.key, c.access.User.Role} }

func (c *caller) admin() bool { return c.access.User.Role == bus.Admin }

// newcomer is the holder of a key and of an invite that this key may redeem,
// made by gate.admitNewcomer only.
type newcomer struct {
	key           bus.UserKey
	token         inviteToken
	handle        string
	request, from string
}

// exchange is one request and its answer. It goes through one goroutine.
type exchange struct {
	gate *gate
	w    http.ResponseWriter
	r    *http.Request
	body []byte
	// streamed: the body was not read, and digest is what it must have. Else both
	// are as they were sent.
	streamed bool
	digest   sig.Digest
	id       string
	start    time.Time
	from     netip.Addr

	route    string // pattern of the operation
	key      bus.UserKey
	proven   bool // key signed this request
	caller   *caller
	newcomer *newcomer

	status int
	code   bus.Code
	reason string // why it was refused, for metric and log
}

type exchangeKey struct{}

func withExchange(ctx context.Context, x *exchange) context.Context {
	return context.WithValue(ctx, exchangeKey{}, x)
}

func exchangeOf(r *http.Request) *exchange {
	x, _ := r.Context().Value(exchangeKey{}).(*exchange)
	return x
}

// gate stands before every route but the probes and the documentation, and
// before routing: who is not known cannot even learn which paths exist.
//
// The order is the protection. What costs nothing comes first; a stranger
// causes no I/O but shared barriers, and at the one route for it the look at an
// invite; only an active user, or the holder of an invite, causes a write (of a
// nonce); the nonce is consumed before anything acts.
type gate struct {
	view        *kv.View
	store       *kv.Store
	audit       *trail
	log         *slog.Logger
	now         func() time.Time
	random      io.Reader
	metrics     *metrics
	authorities []string
	proxies     []netip.Prefix
	patience    time.Duration              // with who sends a body slowly
	streams     func(r *http.Request) bool // whether its route takes the body as it comes

	addresses *limiter[netip.Prefix]
	keys      *limiter[bus.UserKey]
	readers   chan struct{}
	slots     chan struct{}
}

// errRefused is every failure before the caller is known. See problemOf.
var errRefused = bus.E(bus.Unauthenticated, "refused")

func (g *gate) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := &exchange{gate: g, w: w, r: r, id: g.newID(), start: g.now(), from: clientAddress(r, g.proxies), route: unmatched}
		w.Header().Set("X-Request-Id", x.id)
		defer x.end()
		leave, err := g.admit(x)
		defer leave()
		if err != nil {
			w.Header().Set(bus.EffectHeader, bus.EffectNone) // a client may ask another node
			x.fail(err)
			return
		}
		next.ServeHTTP(w, r.WithContext(withExchange(r.Context(), x)))
	})
}

// unmatched is the route of a request that reached none.
const unmatched = "none"

func (g *gate) newID() string {
	raw := make([]byte, 8)
	if _, err := io.ReadFull(g.random, raw); err != nil {
		return "unknown" // an id helps people find lines; nothing rests on it
	}
	return hex.EncodeToString(raw)
}

// admit decides whether a request reaches the routes. leave is to be called
// when it has been answered.
func (g *gate) admit(x *exchange) (leave func(), err error) {
	leave = func() {}
	if wait, ok := g.addresses.take(budgetOf(x.from), g.now()); !ok {
		return leave, x.limited("address", wait)
	}
	if err := g.lease(); err != nil {
		return leave, err
	}
	x.streamed = g.streams(x.r)
	if err := g.readBody(x); err != nil {
		return leave, err
	}
	select {
	case g.slots <- struct{}{}:
		leave = func() { <-g.slots }
	default:
		g.metrics.limited.WithLabelValues("concurrency").Inc()
		return leave, bus.E(bus.Unavailable, "this node has too many requests in flight")
	}
	return leave, g.authenticate(x)
}

func (g *gate) lease() error {
	lease, _ := g.view.Lease()
	return still(g.view, lease)
}

// readBody reads all of the body, so that what is verified, decoded and acted
// upon is one and the same. Files are verified by who stores them: see putBlob.
func (g *gate) readBody(x *exchange) error {
	if x.streamed || x.r.ContentLength == 0 {
		return nil
	}
	select {
	case g.readers <- struct{}{}:
		defer func() { <-g.readers }()
	default:
		g.metrics.limited.WithLabelValues("concurrency").Inc()
		return bus.E(bus.Unavailable, "this node has too many requests in flight")
	}
	_ = http.NewResponseController(x.w).SetReadDeadline(time.Now().Add(g.patience))
	body, err := io.ReadAll(http.MaxBytesReader(x.w, x.r.Body, sig.MaxBody))
	if err != nil {
		return x.refuse("body", err)
	}
	x.body = body
	return nil
}

func (g *gate) authenticate(x *exchange) error {
	v, err := g.verify(x)
	if err != nil {
		if errors.Is(err, sig.ErrSkew) {
			return x.refuse("skew", err)
		}
		return x.refuse("signature", err)
	}
	x.key, x.proven = v.Key, true
	ctx, cancel := context.WithTimeout(x.r.Context(), doubt)
	defer cancel()
	if x.r.Method == enrollMethod && x.r.URL.Path == enrollPath {
		return g.admitNewcomer(ctx, x, v)
	}
	access, reason, err := g.lookUp(ctx, v.Key)
	if err != nil {
		return err
	}
	if reason != standingActive {
		if access != nil { // somebody we know: it may be their key that is being misused
			g.audit.denied(x, reason)
		}
		return x.refuse(reason, nil)
	}
	if wait, ok := g.keys.take(v.Key, g.now()); !ok {
		return x.limited("key", wait)
	}
	if err := g.consume(ctx, x, v); err != nil {
		return err
	}
	x.caller = &caller{key: v.Key, access: access, request: x.id, from: x.from.String()}
	return nil
}

func (g *gate) verify(x *exchange) (v sig.Verified, err error) {
	if !x.streamed {
		return sig.Verify(x.r, x.body, g.authorities, g.now())
	}
	v, x.digest, err = sig.VerifyStream(x.r, g.authorities, g.now())
	return v, err
}

// Where a key stands, in the words of the callout.
const (
	standingActive  = "active"
	standingRevoked = "revoked"
)

// standing is where a key stands. Who is in too many rooms to connect may still
// ask here: to leave some.
func standing(a *kv.Access, err error, now time.Time) string {
	switch {
	case err != nil:
		return "broken_record"
	case a == nil:
		return "unknown"
	}
	ok, reason := a.Admitted(now)
	if ok || a.User.ActiveAt(now) {
		return standingActive
	}
	return reason
}

// lookUp says how a key stands now. Before it says that somebody may not enter,
// except for a revoke, which is final, it asks the cluster: a grant that was
// confirmed to its admin a moment ago may not have reached this node.
func (g *gate) lookUp(ctx context.Context, k bus.UserKey) (*kv.Access, string, error) {
	for asked := false; ; asked = true {
		lease, _ := g.view.Lease()
		access, err := g.view.Access(k)
		reason := standing(access, err, g.now())
		if err := still(g.view, lease); err != nil { // after the look: the process may have been paused before it
			return nil, "", err
		}
		if reason == standingActive || reason == standingRevoked || asked {
			return access, reason, nil
		}
		if err := g.view.Barrier(ctx); err != nil {
			return nil, "", err
		}
	}
}

// consume makes the request a one-time thing, for all nodes.
func (g *gate) consume(ctx context.Context, x *exchange, v sig.Verified) error {
	err := g.store.ConsumeNonce(ctx, v.Key, v.Nonce)
	switch bus.CodeOf(err) {
	case "":
		return nil
	case bus.Unauthenticated:
		g.metrics.nonces.WithLabelValues("replay").Inc()
		g.audit.denied(x, "replay")
		return x.refuse("replay", err)
	case bus.Unavailable:
		g.metrics.nonces.WithLabelValues("unavailable").Inc()
	}
	return err
}

// admitNewcomer lets a key in that is nobody's yet, if it brings an invite. All
// that is wrong before the invite is proven looks like any other refusal, so
// that the route is no place to try tokens at.
func (g *gate) admitNewcomer(ctx context.Context, x *exchange, v sig.Verified) error {
	var in enrollBody
	if !isJSON(x.r.Header.Values("Content-Type")) {
		return x.refuse("enroll", nil)
	}
	if err := decode(x.body, enrollShape.body, &in); err != nil {
		return x.refuse("enroll", err)
	}
	if err := g.checkInvite(ctx, x, string(in.Token), v.Key); err != nil {
		return err
	}
	if wait, ok := g.keys.take(v.Key, g.now()); !ok {
		return x.limited("key", wait)
	}
	if err := g.consume(ctx, x, v); err != nil {
		return err
	}
	x.newcomer = &newcomer{key: v.Key, token: in.Token, handle: in.Handle, request: x.id, from: x.from.String()}
	return nil
}

// checkInvite says whether the token is good for this key now. As with users,
// nobody is refused on a look that may be old: an isolated leader answers for
// seconds that it knows of no such invite.
func (g *gate) checkInvite(ctx context.Context, x *exchange, token string, k bus.UserKey) error {
	for asked := false; ; asked = true {
		err := g.store.CheckInvite(ctx, token, k)
		switch code := bus.CodeOf(err); {
		case code == "" || code == bus.Unavailable || code == bus.Internal:
			return err
		case asked:
			return x.refuse("enroll", err)
		}
		if err := g.view.Barrier(ctx); err != nil {
			return err
		}
	}
}

func (x *exchange) refuse(reason string, cause error) error {
	x.reason = reason
	x.gate.metrics.refused.WithLabelValues(reason).Inc()
	x.gate.log.Debug("refused", "request", x.id, "reason", reason, "err", cause)
	return errRefused
}

func (x *exchange) limited(by string, wait time.Duration) error {
	x.gate.metrics.limited.WithLabelValues(by).Inc()
	x.reason = "rate_" + by
	return tooMany(wait, by)
}

// fail answers with a problem document.
func (x *exchange) fail(err error) {
	p, header := problemOf(err, x.id)
	x.code = bus.Code(p.Type[len(bus.ProblemType):])
	if x.code == bus.Internal {
		x.gate.log.Error("internal error", "request", x.id, "route", x.route, "err", err)
	}
	for name := range header {
		x.w.Header().Set(name, header.Get(name))
	}
	x.w.Header().Set("Content-Type", "application/problem+json")
	x.status = p.Status
	writeBody(x.w, p.Status, p)
}

// send answers with a document.
func (x *exchange) send(status int, v any) {
	x.status = status
	writeJSON(x.w, status, v)
}

// end writes the one line that every request leaves. A panic ends its request
// only.
func (x *exchange) end() {
	if p := recover(); p != nil {
		x.gate.log.Error("panic", "request", x.id, "route", x.route, "what", p, "stack", string(debug.Stack()))
		if x.status == 0 {
			x.fail(bus.E(bus.Internal, "panic"))
		}
	}
	took := x.gate.now().Sub(x.start)
	x.gate.metrics.observe(x.route, x.r.Method, x.status, took)
	caller := ""
	if x.proven {
		caller = x.key.NKey()
	}
	level := slog.LevelInfo
	if x.status == http.StatusTooManyRequests { // the log must not grow as fast as who floods can ask
		level = slog.LevelDebug
	}
	x.gate.log.Log(x.r.Context(), level, "request", "request", x.id, "method", methodLabel(x.r.Method), "route", x.route,
		"status", x.status, "code", string(x.code), "reason", x.reason, "ms", took.Milliseconds(), "caller", caller, "from", x.from.String())
}
