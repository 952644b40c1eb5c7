package kv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// proofMargin is added to a silent holder's lease: an answer it prepared in its
// last moment is refused by the server one second later at the latest, because
// expiries are whole seconds.
const proofMargin = time.Second

// writeTimeout bounds one compare-and-set. A timeout is not a failure: the
// write may have landed, and the error says so.
const writeTimeout = 2 * time.Second

// turnPatience is how long a change waits for those before it under one filter.
const turnPatience = time.Second

// Store changes users, rooms and members. Every change is one compare-and-set
// on the record that grants or denies access, made on the state a barrier has
// just proven, and returns when no lease holder decides on the old state any
// more. Where a change needs two writes, the first one denies (see each
// method); Reconcile repairs what an interruption left.
//
// A Store is safe for concurrent use. Changes of one key are made one after
// another, each only after the one before it is proven.
type Store struct {
	*hub
	caller Caller
	onWait func(Holder, time.Duration)
	by     time.Time
	hold   *Hold  // of the attempt under way, nil between its decisions
	turn   func() // ends the turn of the attempt under way, nil if it has none
}

// hub is what every caller's Store shares.
type hub struct {
	view *View
	js   jetstream.JetStream
	log  *slog.Logger
	now  func() time.Time

	mu      sync.Mutex
	waiters map[*waiter]struct{}
	keys    map[string]chan struct{}

	roster roster
}

// Caller is on whose behalf a change is made.
//
// Check is asked right before every write whether the caller may still do
// this, as the View has it now and under a lease: between a caller's request
// and its write the process may have been paused, or the caller revoked. From
// before the change is decided until it is committed a hold on Key keeps back
// the acknowledgement of whatever changes the caller's access, so a revoke of
// the caller returns only when none of their changes can land any more.
type Caller struct {
	Name  string       // recorded with the change: an nkey, or "direct"
	Key   bus.UserKey  // zero: nobody whose access could change
	Check func() error // nil: always allowed
}

// StoreConfig configures a Store.
type StoreConfig struct {
	View   *View
	Actor  string                      // who is recorded as having made a change: a user's nkey, or "direct"
	OnWait func(Holder, time.Duration) // told for whom a change waits, and how long at most; may be nil
	By     time.Time                   // if not zero, every write is decided or given up by then; proofs may take longer
}

// OpenStore prepares a Store on a running View.
func OpenStore(cfg StoreConfig) (*Store, error) {
	js, err := newJetStream(cfg.View.cfg.Conn)
	if err != nil {
		return nil, err
	}
	if !cfg.View.cfg.EncryptionKeys {
		return nil, bus.E(bus.Internal, "a Store on a View without encryption keys would lose them with the next change of their user")
	}
	s := &Store{
		hub: &hub{
			view: cfg.View, js: js, log: cfg.View.log, now: cfg.View.cfg.Now,
			waiters: map[*waiter]struct{}{}, keys: map[string]chan struct{}{},
		},
		caller: Caller{Name: cfg.Actor}, onWait: cfg.OnWait, by: cfg.By,
	}
	if s.onWait == nil {
		s.onWait = func(Holder, time.Duration) {}
	}
	if _, err := cfg.View.cfg.Conn.Subscribe(AckSubjects, s.heard); err != nil {
		return nil, bus.E(bus.Unavailable, "cannot hear acknowledgements: %w", err)
	}
	return s, nil
}

// As is the same Store on behalf of a caller.
func (s *Store) As(c Caller) *Store {
	out := *s
	out.caller, out.hold, out.turn = c, nil, nil
	return &out
}

// Caller is on whose behalf this Store makes changes.
func (s *Store) Caller() Caller { return s.caller }

// begin marks a decision as being in flight; end, that it can have no further
// effect. Both may be called at any time, by one goroutine.
func (s *Store) begin() {
	if s.hold == nil {
		s.hold = s.view.Hold(s.caller.Key)
	}
}

func (s *Store) end() {
	if s.hold != nil {
		s.hold.Release()
		s.hold = nil
	}
}

// allowed asks once more whether the caller may do this.
func (s *Store) allowed() error {
	if s.caller.Check == nil || guard.Off(guard.CallerRecheck) {
		return nil
	}
	return s.caller.Check()
}

// Result says what a change did and how far it is proven.
type Result struct {
	What     string        // in words for people; begins with already_<state> if Already
	Revision uint64        // of the record that grants or denies
	Already  bool          // the state was already so; the record was written again to prove it again
	Holders  int           // lease holders at the change
	acked    []Holder      // those of them that acknowledged or gave up their lease
	Expired  []Holder      // those that did not acknowledge: their lease was waited out
	Elapsed  time.Duration // from the write to the proof
	Closed   int           // connections that were closed for it
	Swept    *Swept        // nil if the change takes nothing away, or is not proven so far

	started, committed time.Time
	enforced           bool // every authcallout that could admit has closed what the change ended, as far as it knew
}

// Acknowledged counts, for one service, those that answered of those that held
// a lease at the change, as "3/3".
func (r Result) Acknowledged(service string) string {
	count := func(hs []Holder) (n int) {
		for _, h := range hs {
			if h.Service == service {
				n++
			}
		}
		return n
	}
	acked := count(r.acked)
	return fmt.Sprintf("%d/%d", acked, acked+count(r.Expired))
}

// Unproven is the error of a change that is committed but not proven: the
// caller stopped waiting before every lease had run out. Repeating the change
// proves it again.
type Unproven struct {
	Result
	Waiting []Holder
}

func (e *Unproven) Error() string {
	return fmt.Sprintf("committed at revision %d, not proven: still waiting for %s", e.Revision, e.Waiting[0].Instance)
}

// waiter collects the acknowledgements of one key.
type waiter struct {
	stream  string
	key     string
	created time.Time
	acks    map[string]acknowledged // by boot: the newest
	moved   chan struct{}
}

type acknowledged struct {
	revision uint64
	Enforced
}

func (s *Store) heard(m *nats.Msg) {
	var a ackMessage
	if json.Unmarshal(m.Data, &a) != nil || m.Subject != ackPrefix+a.Instance+"."+a.Boot {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.waiters {
		if w.stream == a.Stream && w.key == a.Key && w.created.Equal(a.Created) && a.Revision > w.acks[a.Boot].revision {
			w.acks[a.Boot] = acknowledged{a.Revision, a.Enforced}
			select {
			case w.moved <- struct{}{}:
			default:
			}
		}
	}
}

// expectation is the condition of a compare-and-set.
type expectation struct {
	revision uint64 // of the key, 0 for "never written"
	filter   string // if not empty, revision is that of the newest record under this subject filter
}

// change writes one record and waits until no lease holder decides on what was
// there before. i is the stream index. beside runs when the record is committed,
// while the proof is awaited: what merely follows from the record. The caller is
// held for that too: a revoke of them returns when nothing that they asked for
// can land any more.
func (s *Store) change(ctx context.Context, i int, key string, record any, want expectation, beside ...func()) (Result, error) {
	started := s.now()
	w := &waiter{
		stream: StreamName(viewBuckets[i]), key: key, created: s.view.streamCreated(i),
		acks: map[string]acknowledged{}, moved: make(chan struct{}, 1),
	}
	s.mu.Lock()
	s.waiters[w] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.waiters, w)
		s.mu.Unlock()
	}()
	rev, err := s.write(ctx, viewBuckets[i], key, record, want)
	if err != nil {
		return Result{}, err
	}
	committed := s.now()
	if s.turn != nil { // the next one would lose the race if it looked before this can be seen
		seen, cancel := s.decide(ctx)
		_ = s.view.waitSeen(seen, i, rev) // prove asks again, for longer
		cancel()
		s.leaveTurn()
	}
	// The decision has had its effect. To hold on would keep back our own
	// acknowledgement of it. What the caller decides next is another decision.
	var following sync.WaitGroup
	defer following.Wait()
	for _, f := range beside {
		hold := s.view.Hold(s.caller.Key)
		following.Go(func() {
			defer hold.Release()
			f()
		})
	}
	s.end()
	defer s.begin()
	res, err := s.prove(ctx, i, w, rev, committed)
	res.Revision, res.Elapsed, res.started, res.committed = rev, s.now().Sub(started), started, committed
	s.enforcement(w, &res)
	var u *Unproven
	if errors.As(err, &u) {
		u.Result = res
	}
	return res, err
}

// enforcement sums up what those who enforce the change have said. Who gave up
// its lease instead of acknowledging has enforced nothing.
func (s *Store) enforcement(w *waiter, r *Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	doubt := slices.ContainsFunc(r.Expired, func(h Holder) bool { return h.Service == "authcallout" })
	for _, h := range r.acked {
		a := w.acks[h.Boot]
		if h.Service != "authcallout" || a.revision < r.Revision {
			continue
		}
		r.Closed, r.enforced = max(r.Closed, a.Closed), true
		doubt = doubt || a.Unproven
	}
	r.enforced = r.enforced && !doubt
}

// prove waits for every holder of a lease to acknowledge the change at rev, or
// for its lease, counted from the commit, to run out.
func (s *Store) prove(ctx context.Context, i int, w *waiter, rev uint64, committed time.Time) (Result, error) {
	if err := s.view.waitSeen(ctx, i, rev); err != nil {
		return Result{}, &Unproven{Waiting: []Holder{{Instance: "our own View"}}}
	}
	holders, settled := s.view.holdersOf(i, rev)
	res := Result{Holders: len(holders)}
	told := map[string]bool{}
	for {
		silent, deadline := s.silent(w, rev, holders, committed)
		now := s.now()
		if len(silent) == 0 && !now.Before(settled) {
			res.acked = holders
			return res, nil
		}
		if settled.After(deadline) {
			deadline = settled
		}
		if !now.Before(deadline) {
			res.Expired = silent
			res.acked = slices.DeleteFunc(holders, func(h Holder) bool { return slices.Contains(silent, h) })
			return res, nil
		}
		patience := time.After(min(deadline.Sub(now), 250*time.Millisecond))
		select {
		case <-ctx.Done():
			if len(silent) == 0 {
				silent = []Holder{forgotten}
			}
			return res, &Unproven{Waiting: silent}
		case <-w.moved:
			continue
		case <-patience:
		}
		silent, _ = s.silent(w, rev, holders, committed)
		if left := settled.Sub(s.now()); len(silent) == 0 && left > 0 && !told[forgotten.Boot] {
			told[forgotten.Boot] = true
			s.onWait(forgotten, left)
		}
		for _, h := range silent {
			if !told[h.Boot] {
				told[h.Boot] = true
				s.onWait(h, committed.Add(h.Lease+proofMargin).Sub(s.now()))
			}
		}
	}
}

// forgotten stands for holders that no stream can name, because all three are
// younger than a lease.
var forgotten = Holder{Instance: "any service older than the streams"}

// silent lists the holders that neither acknowledged nor released their lease,
// and the moment at which the last of their leases has run out.
func (s *Store) silent(w *waiter, rev uint64, holders []Holder, committed time.Time) ([]Holder, time.Time) {
	var out []Holder
	deadline := committed
	for _, h := range holders {
		s.mu.Lock()
		acked := w.acks[h.Boot].revision >= rev
		s.mu.Unlock()
		if acked || s.view.released(h.Boot) {
			continue
		}
		out = append(out, h)
		if d := committed.Add(h.Lease + proofMargin); d.After(deadline) {
			deadline = d
		}
	}
	return out, deadline
}

// write is one compare-and-set. Conflict means that the state moved on;
// Unavailable that there is no quorum, or that the answer was lost and the
// write may have landed.
func (s *Store) write(ctx context.Context, bucket, key string, record any, want expectation) (uint64, error) {
	value, err := json.Marshal(record)
	if err != nil {
		return 0, bus.E(bus.Internal, "encode %s: %w", key, err)
	}
	m := nats.NewMsg(subjectOf(bucket, key))
	m.Data = value
	return s.publish(ctx, bucket, key, m, want)
}

// publish is write for a record that is encoded already.
func (s *Store) publish(ctx context.Context, bucket, key string, m *nats.Msg, want expectation) (uint64, error) {
	opts := []jetstream.PublishOpt{jetstream.WithExpectStream(StreamName(bucket)), jetstream.WithRetryAttempts(0)}
	if want.filter == "" {
		opts = append(opts, jetstream.WithExpectLastSequencePerSubject(want.revision))
	} else {
		opts = append(opts, jetstream.WithExpectLastSequenceForSubject(want.revision, want.filter))
	}
	if err := s.allowed(); err != nil {
		return 0, err
	}
	wctx, cancel := s.decide(ctx)
	defer cancel()
	ack, err := s.js.PublishMsg(wctx, m, opts...)
	if err == nil {
		return ack.Sequence, nil
	}
	var api *jetstream.APIError
	if errors.As(err, &api) {
		if api.ErrorCode == errWrongLastSeq || api.ErrorCode == errWrongLastSeqAny {
			return 0, bus.E(bus.Conflict, "%s was changed by somebody else at the same moment", key)
		}
		return 0, bus.E(bus.Unavailable, "the cluster refused the write of %s: %w", key, err)
	}
	return 0, bus.E(bus.Unavailable, "no quorum: the write of %s was not confirmed and may or may not have landed: %w", key, err).
		WithHint("repeat the command when unibusctl cluster status shows a quorum")
}

// readLast asks a bucket's leader for the newest record of a key. It need not be
// current: it decides nothing that the compare-and-set after it does not decide
// again.
func (s *Store) readLast(ctx context.Context, bucket, key string) (*jetstream.RawStreamMsg, error) {
	st, err := s.js.Stream(ctx, StreamName(bucket))
	if err != nil {
		return nil, err
	}
	return st.GetLastMsgForSubject(ctx, subjectOf(bucket, key))
}

// exclusively serialises changes of one key within this process until the
// change is proven: a second change before that would overtake the wait.
func (s *Store) exclusively(ctx context.Context, key string) (func(), error) {
	for {
		s.mu.Lock()
		busy, taken := s.keys[key]
		if !taken {
			done := make(chan struct{})
			s.keys[key] = done
			s.mu.Unlock()
			return func() {
				s.mu.Lock()
				delete(s.keys, key)
				s.mu.Unlock()
				close(done)
			}, nil
		}
		s.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, bus.E(bus.Unavailable, "another change of %s is still being proven", key)
		}
	}
}

// decide bounds the part of a change in which nothing is committed yet.
func (s *Store) decide(ctx context.Context) (context.Context, context.CancelFunc) {
	by := s.now().Add(writeTimeout)
	if !s.by.IsZero() && s.by.Before(by) {
		by = s.by
	}
	return context.WithDeadline(ctx, by)
}

// current makes sure that the View reflects every change that has returned: by
// the lease, which says so, or by a barrier.
func (s *Store) current(ctx context.Context) error {
	if _, held := s.view.Lease(); held {
		return nil
	}
	return s.barrier(ctx)
}

// barrier proves the View current for a change, or gives up in time.
func (s *Store) barrier(ctx context.Context) error {
	bctx, cancel := s.decide(ctx)
	defer cancel()
	return s.view.Barrier(bctx)
}

// retried runs a change again on the newest state when somebody else won the
// race for the record. attempt must read the View itself, through the Store it
// is given. The lease covers the first look; whoever lost a race has seen that
// the View can be behind a change that is still being proven, and takes a
// barrier.
func (s *Store) retried(ctx context.Context, key string, attempt func(s *Store) (Result, error)) (Result, error) {
	done, err := s.exclusively(ctx, key)
	if err != nil {
		return Result{}, err
	}
	defer done()
	ours := s.As(s.caller)
	defer ours.end()
	defer ours.leaveTurn()
	for try := 0; ; try++ {
		prove := ours.current
		if try > 0 {
			ours.end()
			ours.leaveTurn()
			prove = ours.barrier
		}
		if err := prove(ctx); err != nil {
			return Result{}, err
		}
		ours.begin()
		res, err := attempt(ours)
		if !errors.Is(err, errRaced) || try == 64 {
			return res, err
		}
	}
}

// awaitTurn has those in this process that are to write under one filter do so
// one after another, from the look to the moment at which the View shows what
// was written: of many at once all but one would lose the compare-and-set, and
// some of them every time. It decides nothing: whoever writes elsewhere is still
// met with the compare-and-set, and nobody is kept waiting long by one who is
// stuck, least of all a revoke. A Store has one turn at a time; change and the
// end of an attempt end it.
func (s *Store) awaitTurn(ctx context.Context, filter string) {
	s.leaveTurn()
	if s.hold != nil { // nothing is decided while we wait
		s.end()
		defer s.begin()
	}
	wait, cancel := context.WithTimeout(ctx, turnPatience)
	defer cancel()
	if turn, err := s.exclusively(wait, filter); err == nil {
		s.turn = turn
	}
}

func (s *Store) leaveTurn() {
	if s.turn != nil {
		s.turn()
		s.turn = nil
	}
}

// errRaced marks a lost compare-and-set that is worth another look.
var errRaced = errors.New("lost a race")

func raced(err error) error {
	if bus.CodeOf(err) == bus.Conflict {
		return fmt.Errorf("%w: %w", errRaced, err)
	}
	return err
}

// streamCreated is the identity of the stream behind a table.
func (v *View) streamCreated(i int) time.Time {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.tables[i].created
}

// waitSeen blocks until the View has applied sequence seq of a stream.
func (v *View) waitSeen(ctx context.Context, i int, seq uint64) error {
	return v.waitUntil(ctx, func() bool { return v.tables[i].lastSeq >= seq })
}

// holdersOf lists the boots that may still decide on the state before rev. A
// stream younger than the longest lease cannot know all of them: until settled,
// leases may exist that none of the three streams has ever seen.
func (v *View) holdersOf(i int, rev uint64) (holders []Holder, settled time.Time) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	t := v.tables[i]
	oldest := t.created
	for _, o := range v.tables {
		if o.created.Before(oldest) {
			oldest = o.created
		}
	}
	return v.holdersAt(i, rev, t.lastTime), oldest.Add(DefaultLease + clockTolerance)
}

func (v *View) released(boot string) bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	h := v.known[boot]
	return h != nil && h.Released
}
