// Package callout decides who may connect, and as what.
//
// A stock nats-server asks for each connection: it sends, sealed to our curve
// key and signed by its own, what the client said. The answer is five steps
// under one deadline of 1.5 seconds:
//
//	open    the request is from a genuine, current nats-server (decode.go)
//	prove   the client holds the private half of the key it names (decode.go)
//	lookup  what a View under a lease says about that user
//	decide  a pure function of the two (decide.go)
//	mint    a decision becomes a signed JWT (mint.go)
//
// A denial is answered at once, with a constant text: the reason goes to log,
// metrics and audit only. What cannot be known - no lease, no barrier, an answer that
// would come late - is met with silence, because two refusals from one server
// close a default client for good, and the server refuses by itself when its
// time is up. An instance without a lease leaves the queue group, so that the
// others answer for its node.
//
// Between reading the View and the end of all effect of an answer, a hold
// keeps back the acknowledgement of every change of that user: a writer's
// revoke returns only when no JWT minted before it can open a connection that
// stays.
//
// Beside that, an [Enforcer] closes the connections that a change ends
// (enforce.go), knows them all (connections.go, from the events of events.go)
// and has the servers list them (sweep.go).
package callout

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
)

const (
	// Subject is where servers ask (nats-server auth_callout.go).
	Subject = "$SYS.REQ.USER.AUTH"
	// Queue makes the instances share the work; a server asks any of them.
	Queue = "unibus-authcallout"
	// Deadline is for everything from receipt to reply. A server gives a
	// client up after 2.0 to 2.4 s whatever its configuration says.
	Deadline = 1500 * time.Millisecond
	// answerLife is how long a server may act on an answer.
	answerLife = 2 * time.Second
	// effectMargin covers whole seconds and clocks that differ: after
	// answerLife and this, no server acts on the answer any more.
	effectMargin = 3 * time.Second
	// staleAfter is the age, by the asking server's clock in whole seconds, at
	// which nobody waits for the answer any more: a paused process wakes up to
	// a queue of such requests.
	staleAfter  = 4 * time.Second
	queueLength = 1024
)

// Config configures a Service.
type Config struct {
	View    *kv.View
	Keys    []Keys        // current first; a second generation during a rotation
	TTL     time.Duration // of an admission without an expiry of its own
	Log     *slog.Logger
	Metrics *Metrics
	Audit   Auditor // nil: decisions go to log and metrics only
	Now     func() time.Time

	// Swept reports whether the connections that a node's server has kept are
	// known; it is answered nothing before. nil: always.
	Swept func(node string) bool
}

// source is what decisions rest on: a View, and in tests one that changes its
// mind at the worst moment.
type source interface {
	Lease() (until time.Time, held bool)
	Access(k bus.UserKey) (*kv.Access, error)
	PlainAccess(ctx context.Context, k bus.UserKey) (*kv.Access, error)
	Barrier(ctx context.Context) error
	UsersBarrier(ctx context.Context) error
	Hold(k bus.UserKey) releaser
}

type viewSource struct{ *kv.View }

func (v viewSource) Hold(k bus.UserKey) releaser { return v.View.Hold(k) }

// Service answers authorization requests. It is safe for concurrent use.
type Service struct {
	cfg     Config
	view    source
	opener  *opener
	minter  *minter
	jobs    chan job
	doubts  chan struct{} // a slot per request that waits for a barrier
	effects *effects

	mu     sync.Mutex
	conns  []*nats.Conn
	subs   []*nats.Subscription
	joined bool
	probes map[bus.UserKey]chan struct{}
}

type job struct {
	msg      *nats.Msg
	respond  func([]byte) error
	received time.Time
}

// New prepares a Service; Run works.
func New(cfg Config) (*Service, error) {
	m, err := newMinter(cfg.Keys, cfg.TTL, cfg.Now)
	if err != nil {
		return nil, err
	}
	return &Service{
		cfg: cfg, view: viewSource{cfg.View}, opener: newOpener(cfg.Keys, cfg.Now), minter: m,
		jobs: make(chan job, queueLength), doubts: make(chan struct{}, queueLength), effects: newEffects(), probes: map[bus.UserKey]chan struct{}{},
	}, nil
}

// Listen names the connections in account AUTH on which the Service answers
// while it is joined.
func (s *Service) Listen(conns ...*nats.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = conns
}

// Join enters the queue group, Leave leaves it at once. Both may be called at
// any time, in any order.
func (s *Service) Join() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.joined {
		return nil
	}
	for _, nc := range s.conns {
		sub, err := nc.QueueSubscribe(Subject, Queue, s.take)
		if err == nil {
			err = sub.SetPendingLimits(queueLength, 64<<20)
			s.subs = append(s.subs, sub)
		}
		if err != nil {
			s.leaveLocked((*nats.Subscription).Unsubscribe)
			return bus.E(bus.Unavailable, "cannot join the queue group: %w", err)
		}
	}
	s.joined = true
	return nil
}

// Leave leaves the queue group: see Join. What was delivered and not yet taken
// stays unanswered, as it would without a lease.
//
// It does not drain: a subscription that is draining while its connection is
// lost is made again by the client library when it reconnects, and forgotten
// without the server being told. The server would go on to hand that nobody a
// share of all admissions, for as long as the connection lasts.
func (s *Service) Leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if guard.Off(guard.LeaveAtOnce) {
		s.leaveLocked((*nats.Subscription).Drain)
		return
	}
	s.leaveLocked((*nats.Subscription).Unsubscribe)
}

func (s *Service) leaveLocked(end func(*nats.Subscription) error) {
	for _, sub := range s.subs {
		if err := end(sub); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
			s.cfg.Log.Warn("leaving the queue group", "err", err)
		}
	}
	s.subs, s.joined = nil, false
}

// Joined reports whether the Service answers.
func (s *Service) Joined() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.joined
}

// take queues a request or sheds it: one that waits too long is worthless, and
// the server's own deadline slows down whoever sends too many.
func (s *Service) take(m *nats.Msg) {
	select {
	case s.jobs <- job{m, m.Respond, s.cfg.Now()}:
		s.cfg.Metrics.queue.Set(float64(len(s.jobs)))
	default:
		s.cfg.Metrics.shed.Inc()
	}
}

// Run answers with one worker per processor until ctx ends, then finishes what
// is queued and waits until no answer can have an effect any more, so that the
// lease may be released.
func (s *Service) Run(ctx context.Context) {
	var workers sync.WaitGroup
	stop := make(chan struct{})
	for range max(2, runtime.GOMAXPROCS(0)) {
		workers.Go(func() { s.work(ctx, stop) })
	}
	<-ctx.Done()
	s.leaveAndDrain()
	close(stop)
	workers.Wait()
	for range cap(s.doubts) { // every slot taken back: no request waits any more
		s.doubts <- struct{}{}
	}
	s.effects.wait(answerLife + effectMargin)
}

// leaveAndDrain returns when every request that a server has already handed to
// this instance is queued. The connections end soon after it: see Leave.
func (s *Service) leaveAndDrain() {
	s.mu.Lock()
	subs := s.subs
	s.leaveLocked((*nats.Subscription).Drain)
	s.mu.Unlock()
	late := time.NewTimer(Deadline)
	defer late.Stop()
	for _, sub := range subs {
		closed := sub.StatusChanged(nats.SubscriptionClosed)
		for sub.IsValid() {
			select {
			case <-closed:
			case <-late.C:
				return
			}
		}
	}
}

func (s *Service) work(ctx context.Context, stop <-chan struct{}) {
	for {
		select {
		case j := <-s.jobs:
			s.answer(ctx, j)
		case <-stop:
			for { // what was delivered gets its answer
				select {
				case j := <-s.jobs:
					s.answer(ctx, j)
				default:
					return
				}
			}
		}
	}
}

// answer handles one request from bytes to bytes, also while stopping.
func (s *Service) answer(ctx context.Context, j job) {
	s.cfg.Metrics.queue.Set(float64(len(s.jobs)))
	if s.cfg.Now().Sub(j.received) > Deadline {
		s.cfg.Metrics.shed.Inc()
		return
	}
	c, err := s.opener.open(j.msg)
	if err != nil {
		s.record(j, nil, silence("malformed", err), nil)
		return
	}
	req, why := c.prove()
	if why != "" {
		s.deny(j, c, denial(why), nil)
		return
	}
	s.sawProbe(req.User)
	if s.cfg.Swept != nil && !s.cfg.Swept(c.serverName) {
		s.record(j, c, silence("unswept", nil), nil)
		return
	}
	s.decideAndReply(ctx, j, c, req)
}

// decideAndReply holds back the acknowledgement of changes of this user from
// before the View is read until the answer has had its effect.
//
// Any refusal of a proven key other than a recorded revoke is looked at once
// more behind a barrier, so that a grant of a moment ago is never missed: one
// over the records of users, unless the refusal rests on more than those. That
// wait is not the worker's: a crowd of strangers must not keep members waiting.
func (s *Service) decideAndReply(ctx context.Context, j job, c *call, req Request) {
	hold := s.view.Hold(req.User)
	v := s.look(ctx, req)
	if !v.out.doubtful() {
		s.reply(j, c, req, hold, v)
		return
	}
	select {
	case s.doubts <- struct{}{}:
	default:
		s.cfg.Metrics.shed.Inc()
		hold.Release()
		return
	}
	barrier := s.view.UsersBarrier
	if v.out.rooms {
		barrier = s.view.Barrier
	}
	go func() {
		defer func() { <-s.doubts }()
		bctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), j.received.Add(Deadline))
		defer cancel()
		if err := barrier(bctx); err != nil {
			v.out = silence("no_barrier", err)
		} else {
			v = s.look(bctx, req)
		}
		s.reply(j, c, req, hold, v)
	}()
}

// verdict is a decision with what it was made on.
type verdict struct {
	access *kv.Access
	until  time.Time // end of the lease
	out    outcome
}

// look decides on the View under a lease, without I/O.
func (s *Service) look(ctx context.Context, req Request) verdict {
	if guard.Off(guard.FreshReads) {
		access, err := s.view.PlainAccess(ctx, req.User)
		return verdict{access, s.cfg.Now().Add(answerLife), decide(access, err, s.cfg.Now())}
	}
	until, held := s.view.Lease()
	if !held {
		return verdict{until: until, out: silence("no_lease", nil)}
	}
	access, err := s.view.Access(req.User)
	return verdict{access, until, decide(access, err, s.cfg.Now())}
}

// reply turns a verdict into an answer, or into none, and lets go of the hold
// when that can have no further effect.
func (s *Service) reply(j job, c *call, req Request, hold releaser, v verdict) {
	kept := false
	defer func() {
		if !kept {
			hold.Release()
		}
	}()
	access, out := v.access, v.out
	switch {
	case out.quiet:
		s.record(j, c, out, access)
		return
	case !out.allow:
		s.deny(j, c, out, access)
		return
	}
	now := s.cfg.Now()
	expires := now.Add(answerLife)
	if v.until.Before(expires) {
		expires = v.until // an answer is worth no more than the lease it was made on
	}
	reply, err := s.minter.admit(c, req, access, expires)
	if err != nil {
		s.record(j, c, silence("mint", err), access)
		return
	}
	guard.Pause("reply")
	// The process may have been paused since the lease was checked. A pause
	// after this line is caught by the answer's own expiry.
	if _, held := s.view.Lease(); !held && !guard.Off(guard.FreshReads) {
		s.record(j, c, silence("lease_lost", nil), access)
		return
	}
	kept = true
	s.effects.begin(c, access, hold, expires.Sub(now)+effectMargin)
	err = j.respond(reply)
	if err == nil {
		s.record(j, c, out, access)
		return
	}
	s.effects.end(c.serverID, c.clientID)
	if errors.Is(err, nats.ErrMaxPayload) { // it will not fit the next time either
		s.deny(j, c, outcome{reason: "too_large", alert: true, err: err}, access)
		return
	}
	s.record(j, c, silence("reply", err), access)
}

func (s *Service) deny(j job, c *call, out outcome, access *kv.Access) {
	reply, err := s.minter.deny(c, s.cfg.Now().Add(answerLife))
	if err == nil {
		err = j.respond(reply)
	}
	if err != nil {
		out = silence("reply", err)
	}
	s.record(j, c, out, access)
}

// record writes the one log line of a decision and counts it. The key in it is
// proven only where the result is allow or the reason is about a user; c is nil
// for a request that no genuine server made.
func (s *Service) record(j job, c *call, out outcome, access *kv.Access) {
	now := s.cfg.Now()
	took := now.Sub(j.received)
	s.cfg.Metrics.requests.WithLabelValues(out.result(), out.reason).Inc()
	s.cfg.Metrics.duration.Observe(took.Seconds())
	s.audit(c, out, now)
	args := []any{"result", out.result(), "reason", out.reason, "ms", float64(took.Microseconds()) / 1000}
	if c != nil {
		args = append(args, "key", shown(c.nkey), "server", c.serverName, "client", c.clientID, "host", c.host)
	}
	if access != nil {
		args = append(args, "handle", access.User.Handle, "rooms", len(access.Rooms))
	}
	if out.err != nil {
		args = append(args, "err", out.err)
	}
	if out.alert {
		s.cfg.Log.Error("connect", args...)
		return
	}
	s.cfg.Log.Info("connect", args...)
}

// shown bounds what a stranger can put into the log.
func shown(s string) string { return s[:min(len(s), 56)] }

// Expect returns a channel that is closed when a request of this key, properly
// proven, arrives here: start-up uses it to see that servers do ask us. forget
// ends the expectation.
func (s *Service) Expect(k bus.UserKey) (seen <-chan struct{}, forget func()) {
	ch := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.probes[k] = ch
	return ch, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.probes, k)
	}
}

func (s *Service) sawProbe(k bus.UserKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ch, ok := s.probes[k]; ok {
		close(ch)
		delete(s.probes, k)
	}
}
