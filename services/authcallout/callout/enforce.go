package callout

import (
	"cmp"
	"context"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sys"
)

// DefaultUserConnections is how many connections a user may hold at once.
const DefaultUserConnections = 50

const (
	// connectionEvents is where servers tell of account BUS; one subscription,
	// so that a connection's end never overtakes its beginning.
	connectionEvents = "$SYS.ACCOUNT.BUS.*"
	// kickPatience is how long the acknowledgement of a change waits for a
	// server that does not answer.
	kickPatience = time.Second
	// noticePatience is how long a kick waits for the notice before it to have
	// left.
	noticePatience = 50 * time.Millisecond
	// capPause is how often one user's cap is enforced: clients that reconnect
	// by themselves would else make the cluster spin.
	capPause = time.Second
	// clockMargin is how far the clocks of a cluster may be apart.
	clockMargin = 2 * time.Second
)

// EnforcerConfig configures an Enforcer.
type EnforcerConfig struct {
	View     *kv.View
	Service  *Service                                // whose admissions are watched
	Control  *nats.Conn                              // account CTRL: events, lists, kicks
	Notices  *nats.Conn                              // account BUS: hints to users
	Peers    func(context.Context) ([]string, error) // names of the nodes that hold the buckets
	Services []string                                // nkeys of the servers' own users in BUS, which are nobody's to close
	Node     string                                  // of this instance; its nats-server has the same name
	Limit    int                                     // connections per user
	Log      *slog.Logger
	Metrics  *EnforceMetrics
	Now      func() time.Time
}

// Enforcer closes the connections that the View does not allow: at every change
// that narrows somebody's access, at an expiry, at a connection that opens
// beside a change, and beyond the cap of connections per user. Every instance
// does all of it by itself; to close a connection twice is harmless. A change
// that only widens closes nothing: the user gets a notice, and their clients
// the hint to connect again.
//
// An Enforcer is safe for concurrent use; nothing in it blocks but Run.
type Enforcer struct {
	cfg      EnforcerConfig
	view     enforcedView
	send     func(subject, reply string, data []byte) error // in account CTRL
	publish  func(subject string, data []byte) error        // in account BUS; may be nil
	flush    func()                                         // returns when the own server has what was published, or has had its time
	services map[string]bool
	inbox    string // kicks are answered at <inbox>.<number>
	capped   chan *session
	wake     chan struct{}

	mu       sync.Mutex
	table    *connections
	kicks    map[uint64]*kick
	number   uint64                         // of kicks
	reading  int                            // lists that are being read
	gone     map[connID]bool                // closed meanwhile; nil if none is
	peers    []string                       // nodes that hold the buckets
	asked    time.Time                      // when that was learned
	due      time.Time                      // of the next sweep
	until    time.Time                      // sweeps follow one another until then
	deferred map[*settled]func(kv.Enforced) // changes that could not be judged yet
	silent   map[string]bool                // nodes whose last list did not come
	boots    map[string]bool                // authcallouts that held a lease when last counted
	departed time.Time                      // when one of them was last found gone
	run      []func()                       // what the holder of mu leaves to do without it
	closing  *[]func()                      // kicks that wait for flush; nil: none do
}

// enforcedView is what an Enforcer asks of a View.
type enforcedView interface {
	Access(k bus.UserKey) (*kv.Access, error)
	NarrowedSince(k bus.UserKey, since time.Time) bool
	Lease() (until time.Time, held bool)
	Complete() bool
	Holders() []kv.Holder
	Room(id bus.RoomID) (bus.Room, uint64, bool)
	Departure(c kv.Change, now time.Time) map[bus.RoomID][]bus.UserKey
}

// NewEnforcer prepares an Enforcer. Changed is to be the View's OnChange; Watch
// begins to listen.
func NewEnforcer(cfg EnforcerConfig) *Enforcer {
	e := &Enforcer{
		cfg: cfg, view: cfg.View, send: cfg.Control.PublishRequest, services: map[string]bool{}, capped: make(chan *session, 1024), wake: make(chan struct{}, 1),
		table: newConnections(), kicks: map[uint64]*kick{}, deferred: map[*settled]func(kv.Enforced){}, silent: map[string]bool{},
	}
	if cfg.Notices != nil {
		e.publish = cfg.Notices.Publish
		e.flush = func() { _ = cfg.Notices.FlushTimeout(noticePatience) }
	}
	for _, k := range cfg.Services {
		e.services[k] = true
	}
	return e
}

// Watch listens to the servers.
func (e *Enforcer) Watch() error {
	e.inbox = e.cfg.Control.NewInbox()
	if _, err := e.cfg.Control.Subscribe(e.inbox+".*", e.answered); err != nil {
		return bus.E(bus.Unavailable, "cannot hear the answers of servers: %w", err)
	}
	sub, err := e.cfg.Control.Subscribe(connectionEvents, e.told)
	if err == nil {
		err = sub.SetPendingLimits(1<<20, 512<<20)
	}
	if err != nil {
		return bus.E(bus.Unavailable, "cannot hear of connections: %w", err)
	}
	return nil
}

// unlock releases mu and then does what was left to do.
func (e *Enforcer) unlock() {
	run := e.run
	e.run = nil
	e.mu.Unlock()
	for _, f := range run {
		f()
	}
}

// told hears that a connection has opened or closed.
func (e *Enforcer) told(m *nats.Msg) {
	opened := strings.HasSuffix(m.Subject, ".CONNECT")
	if !opened && !strings.HasSuffix(m.Subject, ".DISCONNECT") {
		return
	}
	ev, ok := sys.ParseEvent(m.Data)
	if !ok {
		e.cfg.Log.Error("an event of a server cannot be read")
		e.Resync()
		return
	}
	e.mu.Lock()
	defer e.unlock()
	s, known := e.table.server(ev.Server, ev.Node)
	if !known {
		e.sweepBy(e.cfg.Now()) // it may have more to tell
	}
	if !opened {
		e.closed(connID{s, ev.CID})
		return
	}
	e.opened(s, ev.Connection)
}

func (e *Enforcer) closed(id connID) {
	if e.gone != nil {
		e.gone[id] = true
	}
	if c := e.table.byID[id]; c != nil {
		e.table.remove(c)
		if c.kick != nil {
			e.finish(c.kick, sys.Closed)
		}
	}
}

// opened looks at a new connection once more: what it was admitted on may have
// changed before it was there to be closed. Until that look, and what follows
// from it, is over, the admission holds back the acknowledgement of the change.
func (e *Enforcer) opened(s *server, seen sys.Connection) {
	if e.services[string(seen.User)] {
		return
	}
	c := e.table.add(s, seen, e.cfg.Now())
	admitted, hold := e.cfg.Service.effects.take(s.id, seen.CID)
	_, held := e.view.Lease()
	if c.admitted = admitted; admitted == nil {
		// Another instance admitted it, and closes it should that have been on
		// an older state than ours. On a newer one: see judge.
		c.foreign = true
		if c.unseen = !held; held {
			c.admitted, _ = e.view.Access(c.of.key)
		}
	}
	judged := held || admitted != nil && e.whole() // what we know it rested on needs no lease to be compared
	if judged && !guard.Off(guard.ConnectRecheck) {
		e.judge(c.of, "connect")
	}
	switch {
	case hold == nil:
	case judged:
		e.settle(e.kicksOf(c), released(hold))
	default:
		e.deferChange(released(hold))
	}
	e.limit(c.of)
}

// released lets go of an admission, whatever came of its connection.
func released(hold releaser) func(kv.Enforced) { return func(kv.Enforced) { hold.Release() } }

// limit hands a user over the cap to whoever asks the servers first: a killed
// server tells of no end, and what it had must not count.
func (e *Enforcer) limit(u *session) {
	if u.queued || u.excess(e.cfg.Limit) == nil || guard.Off(guard.Cap) {
		return
	}
	wait := u.capped.Add(capPause).Sub(e.cfg.Now())
	u.queued = true
	if wait > 0 {
		time.AfterFunc(wait, func() { e.queueCap(u) })
		return
	}
	e.run = append(e.run, func() { e.queueCap(u) })
}

func (e *Enforcer) queueCap(u *session) {
	select {
	case e.capped <- u:
	default: // the next connection asks again
		e.mu.Lock()
		defer e.unlock()
		u.queued = false
	}
}

// enforceCap closes what a user has too many, by what the servers say now.
func (e *Enforcer) enforceCap(ctx context.Context, u *session) {
	lists := e.ask(ctx, u.nkey, capPatience)
	e.mu.Lock()
	defer e.unlock()
	u.capped = e.cfg.Now()
	e.take(lists, u.nkey)
	u.queued = false
	for _, c := range u.excess(e.cfg.Limit) {
		if lists.Whole[c.id.server.id] == nil {
			continue // it may not exist any more
		}
		e.kick(c, "cap")
	}
}

// Changed is told of every change that the View has applied and calls done when
// the connections it ends are closed, or their servers have had their time.
func (e *Enforcer) Changed(c kv.Change, done func(kv.Enforced)) {
	e.mu.Lock()
	defer e.unlock()
	if guard.Off(guard.Kick) {
		e.run = append(e.run, func() { done(kv.Enforced{}) })
		return
	}
	if e.mayNarrow(c) { // what opens beside it is looked at until nothing can open on the old state
		e.sweepOn()
	}
	e.tellOwners(c)
	if !e.whole() {
		e.deferChange(done)
		return
	}
	e.catchUp()
	if c.Room != "" && c.User == (bus.UserKey{}) {
		for _, u := range e.table.users {
			if a, _ := e.view.Access(u.key); a != u.judged {
				e.judge(u, "narrowed")
			}
		}
		e.settle(e.kicksOf(nil), done)
		return
	}
	if u := e.table.byKey[c.User]; u != nil {
		e.judge(u, "narrowed")
	}
	e.settle(e.kicksOfUser(c.User), done)
}

// mayNarrow errs on the side of yes.
func (e *Enforcer) mayNarrow(c kv.Change) bool {
	if c.User == (bus.UserKey{}) {
		return true
	}
	now := e.cfg.Now()
	a, err := e.view.Access(c.User)
	return err != nil || !decide(a, nil, now).allow || c.Room != "" && e.view.NarrowedSince(c.User, now.Add(-2*clockMargin))
}

// sweepOn has sweeps follow one another until no connection can appear any more
// that was admitted before now.
func (e *Enforcer) sweepOn() {
	now := e.cfg.Now()
	e.until = now.Add(deadlineOfMints)
	e.sweepBy(now.Add(sweepSpacing))
}

// deferChange leaves a change to the judgement that follows when the View is
// whole again, and bounds the wait for that.
func (e *Enforcer) deferChange(done func(kv.Enforced)) {
	s := &settled{left: 1, done: done}
	e.deferred[s] = done
	time.AfterFunc(kickPatience, func() {
		e.mu.Lock()
		defer e.unlock()
		if _, still := e.deferred[s]; still {
			delete(e.deferred, s)
			e.unproven("no_view")
			e.run = append(e.run, func() { done(kv.Enforced{Unproven: true}) })
		}
	})
}

// Resync judges every connection again and has the servers list them: after a
// lease was gained, or whenever events may have been lost.
func (e *Enforcer) Resync() {
	e.mu.Lock()
	defer e.unlock()
	e.sweepBy(e.cfg.Now())
	if _, held := e.view.Lease(); !held {
		return
	}
	e.judgeAll()
	e.catchUp()
}

// catchUp enforces the changes that had to wait.
func (e *Enforcer) catchUp() {
	if len(e.deferred) == 0 {
		return
	}
	e.judgeAll()
	for s, done := range e.deferred {
		delete(e.deferred, s)
		e.settle(e.kicksOf(nil), done)
	}
}

func (e *Enforcer) judgeAll() {
	for _, u := range e.table.users {
		e.judge(u, "narrowed")
	}
}

// whole reports whether the View can be believed about a change: half a View
// would deny everybody.
func (e *Enforcer) whole() bool {
	_, held := e.view.Lease()
	return held || e.view.Complete()
}

// judge compares everything a user has open with what the View says now, closes
// what is more than that, and hints at what is less.
func (e *Enforcer) judge(u *session, why string) {
	now := e.cfg.Now()
	a, err := e.view.Access(u.key)
	if err != nil {
		a = nil
	}
	_, held := e.view.Lease()
	out := decide(a, nil, now)
	if out.reason == "expired" {
		why = "expired"
	}
	before := u.judged
	u.judged = a
	if e.narrow(u, before, a) {
		// What follows goes the same way through the cluster, a moment behind it.
		var kicks []func()
		e.closing = &kicks
		defer func() {
			e.closing = nil
			e.run = append(e.run, func() {
				go func() {
					e.flush()
					for _, kick := range kicks {
						kick()
					}
				}()
			})
		}()
	}
	for _, c := range u.open {
		switch {
		case c.kick != nil, c.admitted == a && out.allow:
		case e.exceeds(c, a, now):
			e.kick(c, why)
		case c.admitted == nil && held:
			c.admitted, c.unseen = a, false
		}
	}
	e.widen(u, before, a)
	// The View of who admitted a connection may have been ahead of ours by a
	// lease: what the user gains within that time, it may have already. To know
	// too much of it costs a needless close some day, too little a missed one.
	for _, c := range u.open {
		if c.foreign && c.kick == nil && c.admitted != nil && now.Sub(c.seen) < kv.DefaultLease+clockMargin {
			c.first, c.admitted = cmp.Or(c.first, c.admitted), a
		}
	}
	e.armExpiry(u, a, now)
}

// exceeds reports whether a connection may do what its user may not. One whose
// beginning nobody here has seen is judged by what has changed since.
func (e *Enforcer) exceeds(c *connection, a *kv.Access, now time.Time) bool {
	if c.admitted != nil {
		return narrows(c.admitted, a, now)
	}
	if !decide(a, nil, now).allow {
		return true
	}
	return c.unseen && e.view.NarrowedSince(c.of.key, c.start.Add(-clockMargin))
}

// narrows reports whether a session that was admitted on old may do anything
// that now, on new, it may not. It is pure.
func narrows(old, new *kv.Access, now time.Time) bool {
	if !decide(new, nil, now).allow {
		return true
	}
	return len(gains(new, old)) > 0
}

// gains lists what somebody with access b may do and somebody with access a may
// not: each grant of b that goes beyond that of a. Both are sorted by room.
func gains(a, b *kv.Access) (more []kv.Grant) {
	if b == nil {
		return nil
	}
	var have []kv.Grant
	if a != nil {
		have = a.Rooms
	}
	for _, g := range b.Rooms {
		for len(have) > 0 && have[0].Room < g.Room {
			have = have[1:]
		}
		same := len(have) > 0 && have[0].Room == g.Room && have[0].Durable == g.Durable && have[0].Role.Rank() > 0
		if !same || g.Role.MayPublish() && !have[0].Role.MayPublish() {
			more = append(more, g)
		}
	}
	return more
}

// armExpiry judges again at the moment at which the user expires.
func (e *Enforcer) armExpiry(u *session, a *kv.Access, now time.Time) {
	if u.expiry != nil {
		u.expiry.Stop()
		u.expiry = nil
	}
	if a == nil || a.User.ExpiresAt == nil || len(u.open) == 0 {
		return
	}
	left := a.User.ExpiresAt.Sub(now)
	if left <= 0 {
		return
	}
	// A wall clock may be stepped meanwhile: look at it now and then.
	u.expiry = time.AfterFunc(min(left, time.Hour), func() {
		e.mu.Lock()
		defer e.unlock()
		if e.table.users[u.nkey] == u {
			e.judge(u, "narrowed")
		}
	})
}

// kick is the closing of one connection, under way.
type kick struct {
	number uint64
	conn   *connection
	why    string
	began  time.Time
	timer  *time.Timer
	then   []*settled
}

// settled waits for some kicks and then does something, without mu.
type settled struct {
	left int
	done func(kv.Enforced)
	kv.Enforced
}

// kick asks the connection's server to close it; a no-op while that is under way.
func (e *Enforcer) kick(c *connection, why string) {
	if c.kick != nil {
		return
	}
	now := e.cfg.Now()
	e.number++
	k := &kick{number: e.number, conn: c, why: why, began: now}
	c.kick = k
	e.kicks[k.number] = k
	e.cfg.Metrics.kicks.WithLabelValues(why).Inc()
	k.timer = time.AfterFunc(kickPatience, func() { e.end(k.number, sys.Silent) })
	if why != "cap" {
		e.sweepOn()
	}
	todo := &e.run
	if e.closing != nil {
		todo = e.closing
	}
	*todo = append(*todo, func() {
		subject, body := sys.KickRequest(c.id.server.id, c.id.cid)
		reply := e.inbox + "." + strconv.FormatUint(k.number, 10)
		if err := e.send(subject, reply, body); err != nil {
			e.end(k.number, sys.Unreachable)
		}
	})
}

// answered hears what a server did.
func (e *Enforcer) answered(m *nats.Msg) {
	number, err := strconv.ParseUint(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:], 10, 64)
	if err != nil {
		return
	}
	e.end(number, sys.OutcomeOf(m))
}

func (e *Enforcer) end(number uint64, result sys.Outcome) {
	e.mu.Lock()
	defer e.unlock()
	if k := e.kicks[number]; k != nil {
		e.finish(k, result)
	}
}

// finish ends a kick and lets go of what waited for it.
func (e *Enforcer) finish(k *kick, result sys.Outcome) {
	k.timer.Stop()
	delete(e.kicks, k.number)
	c := k.conn
	c.kick = nil
	e.cfg.Metrics.duration.Observe(e.cfg.Now().Sub(k.began).Seconds())
	args := []any{"why", k.why, "result", result, "key", shown(c.of.nkey), "server", c.id.server.node, "client", c.id.cid, "host", c.host}
	if result.Proven() {
		e.table.remove(c)
		e.run = append(e.run, func() { e.cfg.Log.Info("connection closed", args...) })
	} else {
		c.unproven, c.id.server.silent = true, true
		e.unproven(string(result))
		e.sweepBy(e.cfg.Now().Add(sweepSpacing))
		e.run = append(e.run, func() { e.cfg.Log.Warn("closing a connection is not proven", args...) })
	}
	for _, s := range k.then {
		if s.Unproven = s.Unproven || !result.Proven(); result.Proven() {
			s.Closed++
		}
		if s.left--; s.left == 0 {
			e.run = append(e.run, func() { s.done(s.Enforced) })
		}
	}
}

// unproven counts what was acknowledged without proof.
func (e *Enforcer) unproven(why string) { e.cfg.Metrics.unproven.WithLabelValues(why).Inc() }

// settle does something when those kicks are over.
func (e *Enforcer) settle(kicks []*kick, done func(kv.Enforced)) {
	if len(kicks) == 0 {
		e.run = append(e.run, func() { done(kv.Enforced{}) })
		return
	}
	s := &settled{left: len(kicks), done: done}
	for _, k := range kicks {
		k.then = append(k.then, s)
	}
}

// kicksOf lists the kick of one connection, or, of nil, all under way.
func (e *Enforcer) kicksOf(c *connection) (out []*kick) {
	if c != nil {
		if c.kick == nil {
			return nil
		}
		return []*kick{c.kick}
	}
	for _, k := range e.kicks {
		out = append(out, k)
	}
	return out
}

// kicksAt lists those of a node's server.
func (e *Enforcer) kicksAt(node string) (out []*kick) {
	for _, k := range e.kicks {
		if k.conn.id.server.node == node {
			out = append(out, k)
		}
	}
	return out
}

// kicksOfUser lists those of a user, also of connections already forgotten: an
// acknowledgement of a newer revision counts for the older ones too.
func (e *Enforcer) kicksOfUser(u bus.UserKey) (out []*kick) {
	for _, k := range e.kicks {
		if k.conn.of.key == u {
			out = append(out, k)
		}
	}
	return out
}

// Closing counts the connections that must be closed and of which no server has
// said that they are.
func (e *Enforcer) Closing() (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.table.byID {
		if c.kick != nil || c.unproven {
			n++
		}
	}
	return n
}

// Connections counts what is known to be open on servers that answer.
func (e *Enforcer) Connections() (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for id := range e.table.byID {
		if !id.server.silent {
			n++
		}
	}
	return n
}
