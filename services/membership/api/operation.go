package api

import (
	"context"
	"io"
	"net/http"
	"reflect"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sig"
	"unibus.internal/services/membership/recorder"
)

// spec is what the documentation says of an operation.
type spec struct {
	id, method, path string
	summary, detail  string
	tag              string
	body, answer     any   // examples
	errors           []int // on top of those that every operation may give
}

// operation is one route: the one place from which the router, the checks of
// requests and the OpenAPI document are made.
type operation struct {
	spec
	shape    *shape
	out      reflect.Type
	statuses []int  // of success
	tagged   bool   // answers with an ETag
	streams  bool   // takes a body of any kind, which nobody has read yet
	content  string // media type of a success that is not JSON
	large    int64  // takes a body of up to so many bytes, which is read when the caller is known
	serve    func(a *api, x *exchange) error
}

// api is what the handlers share.
type api struct {
	view   *kv.View
	store  *kv.Store
	stored *recorder.Recorder // of durable rooms
	conn   *nats.Conn         // reads of the audit
	blobs  *kv.Blobs          // nil: this node stores no files
	audit  *trail
	now    func() time.Time
	patrol time.Duration // how long a change may take: a lease, and the doubt around it

	verifying chan struct{} // one at a time reads the whole audit
	transfers transfers
	metrics   *metrics
	larges    chan struct{} // held while a large body is read
}

// tagged is an answer about one record, whose revision is its ETag.
type tagged interface{ revision() uint64 }

// read makes an operation that answers from the View. Hold and recheck around
// it mean that no change of the caller's access is reported as done while an
// answer decided on the old state is still being made.
func read[In, Out any](s spec, h func(a *api, ctx context.Context, c *caller, in *In) (Out, error)) operation {
	o := newOperation[In, Out](s, http.StatusOK)
	o.serve = func(a *api, x *exchange) error {
		in := new(In)
		if err := o.shape.bind(x.r, x.body, in); err != nil {
			return err
		}
		hold := a.view.Hold(x.caller.key)
		defer hold.Release()
		lease, _ := a.view.Lease()
		c, err := a.current(x.caller)
		if err != nil {
			return err
		}
		out, err := h(a, x.r.Context(), c, in)
		if err == nil {
			err = a.still(lease) // a pause since then may have outlived the lease
		}
		hold.Release()
		return x.answer(out, err)
	}
	return o
}

// consult makes an operation that answers from elsewhere than the View, which
// may take its time. No hold lasts that long: the caller is looked at again
// when the answer is there. about is what the answer is about, as it is then;
// nil: nothing in particular.
func consult[In, Out any](s spec, act action, about func(a *api, c *caller, in *In) target, h func(a *api, ctx context.Context, c *caller, in *In) (Out, error)) operation {
	o := newOperation[In, Out](s, http.StatusOK)
	if about == nil {
		about = func(*api, *caller, *In) target { return target{} }
	}
	o.serve = func(a *api, x *exchange) error {
		in := new(In)
		if err := o.shape.bind(x.r, x.body, in); err != nil {
			return err
		}
		if err := a.authorize(x.caller, act, about(a, x.caller, in)); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(x.r.Context(), a.patrol)
		defer cancel()
		out, err := h(a, ctx, x.caller, in)
		if err != nil {
			return err
		}
		hold := a.view.Hold(x.caller.key)
		defer hold.Release()
		c, err := a.current(x.caller)
		if err == nil {
			err = may(c.subject(), act, about(a, c, in))
		}
		hold.Release()
		return x.answer(out, err)
	}
	return o
}

// consultRoom is consult about a room, in which the caller's role may change
// meanwhile.
func consultRoom[P interface {
	*In
	room() bus.RoomID
}, In, Out any](s spec, act action, h func(a *api, ctx context.Context, c *caller, in *In) (Out, error)) operation {
	o := newOperation[In, Out](s, http.StatusOK)
	o.serve = func(a *api, x *exchange) error {
		in := new(In)
		if err := o.shape.bind(x.r, x.body, in); err != nil {
			return err
		}
		room := P(in).room()
		if err := a.authorize(x.caller, act, a.inside(x.caller, room, bus.UserKey{})); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(x.r.Context(), a.patrol)
		defer cancel()
		out, err := h(a, ctx, x.caller, in)
		if err != nil {
			return err
		}
		hold := a.view.Hold(x.caller.key)
		defer hold.Release()
		lease, _ := a.view.Lease()
		c, err := a.current(x.caller)
		if err == nil {
			err = may(c.subject(), act, a.inside(c, room, bus.UserKey{}))
		}
		if err == nil {
			err = a.still(lease)
		}
		hold.Release()
		return x.answer(out, err)
	}
	return o
}

// plan is a change that a handler has understood, and that is neither
// authorized nor made yet.
type plan struct {
	action   action
	target   func(c *caller) target // looked up anew at each check: the caller's role in a room may change
	detail   string                 // for the audit; no secrets
	success  int                    // the status if something was made: 201 or 200
	survives func(bus.User) bool    // the change itself ends the caller's access half-way, and may be finished; may be nil
	do       func(ctx context.Context, s *kv.Store) (effect, error)
}

// effect is what a change did.
type effect struct {
	body     any
	already  bool
	verified bool
	revision uint64
	took     time.Duration // from the write to the proof
}

// changed is the effect of most changes.
func changed(res kv.Result, err error) (effect, error) {
	c, err := kv.ChangeOf(res, err)
	return effect{body: c, already: c.Already, verified: c.Verified, revision: c.Revision, took: res.Elapsed}, err
}

// change makes an operation that writes. made is the status if something new
// was made.
func change[In, Out any](s spec, made int, h func(a *api, c *caller, in *In) (plan, error)) operation {
	statuses := []int{http.StatusOK}
	if made != http.StatusOK {
		statuses = append(statuses, made)
	}
	if reflect.TypeFor[Out]() == reflect.TypeFor[bus.Change]() {
		statuses = append(statuses, http.StatusAccepted)
	} else {
		statuses = []int{made}
	}
	o := newOperation[In, Out](s, statuses...)
	o.serve = func(a *api, x *exchange) error {
		in := new(In)
		if err := o.shape.bind(x.r, x.body, in); err != nil {
			return err
		}
		p, err := h(a, x.caller, in)
		if err != nil {
			return err
		}
		p.success = made
		return a.make(x, x.caller, p)
	}
	return o
}

func newOperation[In, Out any](s spec, statuses ...int) operation {
	_, isTagged := any(*new(Out)).(tagged)
	return operation{
		spec: s, shape: shapeOf(reflect.TypeFor[In]()), out: reflect.TypeFor[Out](), statuses: statuses, tagged: isTagged,
	}
}

// current is the caller as the View has them now.
func (a *api) current(c *caller) (*caller, error) {
	lease, _ := a.view.Lease()
	access, err := a.view.Access(c.key)
	if standing(access, err, a.now()) != standingActive {
		return nil, errRefused
	}
	if err := a.still(lease); err != nil {
		return nil, err
	}
	now := *c
	now.access = access
	return &now, nil
}

// still says whether a lease that was taken note of before a look lasts after
// it. That some lease is held by then would not do: a process that wakes from a
// pause may look at what it knew before, and renew its lease before it asks.
func (a *api) still(lease time.Time) error { return still(a.view, lease) }

func still(v *kv.View, lease time.Time) error {
	if !v.Lasts(lease) {
		return bus.E(bus.Unavailable, "this node cannot decide now: %s", v.Fault()).WithHint("unibusctl cluster status")
	}
	return nil
}

func (a *api) leased() error {
	lease, _ := a.view.Lease()
	return a.still(lease)
}

// authorize asks may, and puts a refusal on record.
func (a *api) authorize(c *caller, act action, t target) error {
	err := may(c.subject(), act, t)
	if err != nil {
		a.audit.refused(c, act, t, err)
	}
	return err
}

// urgent are the changes that take access away. They are made even if the
// audit cannot be written: else who can stop the audit could stop every revoke.
var urgent = map[action]bool{userRevoke: true, userSuspend: true, roomArchive: true, memberRemove: true, inviteWithdraw: true}

// make authorizes a change, announces it in the audit, makes it, and records
// what came of it. It goes on when the client is gone: a change that was begun
// is better finished and on record.
func (a *api) make(x *exchange, c *caller, p plan) error {
	t := p.target(c)
	if err := a.authorize(c, p.action, t); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(x.r.Context()), a.patrol)
	defer cancel()
	e := a.audit.entry(c.key, c.request, c.from, p.action, t)
	e.Detail = p.detail
	if err := a.audit.attempt(ctx, e); err != nil && !urgent[p.action] {
		x.w.Header().Set(bus.EffectHeader, bus.EffectNone)
		return err
	}
	guard.Pause("mutate")
	done, err := p.do(ctx, a.store.As(kv.Caller{
		Name: c.key.NKey(), Key: c.key, Check: func() error { return a.recheck(c, p) },
	}))
	if err != nil && bus.CodeOf(a.recheck(c, p)) == bus.Unauthenticated {
		err = errRefused // whatever else is wrong is nothing to who is known no more
	}
	a.audit.outcome(e, done, err)
	if err != nil {
		return err
	}
	x.finish(done, p.success)
	return nil
}

// recheck is asked by the Store right before each of its writes.
func (a *api) recheck(c *caller, p plan) error {
	lease, _ := a.view.Lease()
	if u, _, ok := a.view.User(c.key); ok && p.survives != nil && p.survives(u) {
		return a.still(lease)
	}
	now, err := a.current(c)
	if err != nil {
		return err
	}
	if err := may(now.subject(), p.action, p.target(now)); err != nil {
		return err
	}
	return a.still(lease) // of the caller's role in a room, too
}

// finish answers a change: 202 if it is committed and not proven.
func (x *exchange) finish(done effect, success int) {
	status := success
	switch {
	case !done.verified:
		status = http.StatusAccepted
	case done.already:
		status = http.StatusOK
	}
	x.send(status, done.body)
}

func (x *exchange) answer(out any, err error) error {
	if err != nil {
		return err
	}
	if t, ok := out.(tagged); ok {
		x.w.Header().Set("ETag", strconv.Quote(strconv.FormatUint(t.revision(), 10)))
	}
	x.send(http.StatusOK, out)
	return nil
}

// maxLarge is how many large bodies may be read at once: users alone get there,
// and even they must not fill the memory.
const maxLarge = 8

// readLarge reads the body of a request whose caller is known and whose nonce is
// consumed, and holds it to what was signed.
func (a *api) readLarge(x *exchange, most int64) error {
	select {
	case a.larges <- struct{}{}:
		defer func() { <-a.larges }()
	default:
		x.w.Header().Set(bus.EffectHeader, bus.EffectNone)
		return bus.E(bus.Unavailable, "this node reads too many large requests")
	}
	_ = http.NewResponseController(x.w).SetReadDeadline(time.Now().Add(bodyTimeout))
	body, err := io.ReadAll(http.MaxBytesReader(x.w, x.r.Body, most))
	if err != nil {
		return invalid("the body did not come whole, or is larger than %d bytes", most)
	}
	if sig.DigestOf(body) != x.digest || len(x.r.Trailer) > 0 {
		return x.refuse("signature", nil)
	}
	x.body = body
	return nil
}

// handler is how the router reaches an operation. Without a caller, which the
// gate alone makes, there is no way in; enrolling is the one operation of who
// is not a user yet.
func (o *operation) handler(a *api) http.HandlerFunc {
	return func(_ http.ResponseWriter, r *http.Request) {
		x := exchangeOf(r)
		x.r, x.route = r, o.path
		var err error = errRefused
		switch {
		case x.caller == nil && (x.newcomer == nil || o.id != enrollID):
		case x.streamed != (o.streams || o.large > 0): // the gate took it for another route, and has not held its body to the signature
			err = bus.E(bus.Internal, "the body for %s is not as its route wants it", o.id)
		case o.large > 0:
			if err = a.readLarge(x, o.large); err == nil {
				err = o.serve(a, x)
			}
		default:
			err = o.serve(a, x)
		}
		if err != nil {
			x.fail(err)
		}
	}
}
