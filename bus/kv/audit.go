package kv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
)

const (
	maxQueued       = 4096                   // notes, and again records, that wait for a block
	noteDelay       = 100 * time.Millisecond // a note waits this long for company
	auditTry        = time.Second            // for one question or one attempt to store a block
	auditStop       = 2 * time.Second        // for the last blocks at a stop
	checkpointEvery = time.Minute
	// Repeated refusals and connects are folded: of equal ones within a
	// foldTime, the first few and the first few addresses get an entry each, and
	// the rest one entry together. Otherwise whoever knocks in a loop would
	// push the history out of the stream.
	foldTime    = time.Minute
	foldPass    = 16
	foldFrom    = 8 // addresses, of which some may be beyond foldPass
	maxFolds    = 4096
	sweepPause  = 5 * time.Second
	msgIDDigits = 32
)

// AuditConfig configures an Audit.
type AuditConfig struct {
	Conn     *nats.Conn
	Instance string // of the chain: View.Instance(), or "unibusctl-direct"
	Log      *slog.Logger
	Now      func() time.Time
	Signer   AuditSigner   // nil: writes no checkpoints
	Every    time.Duration // between checkpoints; 0: a minute
}

// Audit writes the chain of one instance into the audit stream: see
// docs/audit.md. One block is on its way at a time; entries that come meanwhile
// share the next one. Blocks are compare-and-set on the chain's own subject, so
// a chain never forks, also when two processes write under one name.
//
// An Audit is safe for concurrent use. It writes while Run runs.
type Audit struct {
	cfg     AuditConfig
	log     *slog.Logger
	subject string
	js      jetstream.JetStream
	signer  string // public key, if it signs
	fault   error  // of the configuration; no entry is taken
	wake    chan struct{}
	lost    atomic.Uint64

	mu      sync.Mutex
	queue   []auditItem
	notes   int
	records int
	noted   time.Time // since when a note or a drop waits
	dropped uint64    // not yet told by a block
	folds   map[foldKey]*fold
	swept   time.Time
	sign    map[string]auditHead // for the next checkpoint; nil: none
	covered map[string]uint64    // newest block of each chain in a checkpoint of our key

	// The rest belongs to Run.
	head   auditHead // the newest block of the chain, as far as known
	last   uint64    // sequence of the newest message on the own subject
	read   bool      // both have been read
	flight *auditFlight
	seen   map[string]auditHead // newest head of each chain ever read; that of keepCheckpoints until it ends
}

// auditItem is an entry that waits for its block; who is nil for a note.
type auditItem struct {
	entry bus.AuditEntry
	who   *auditWaiter
}

type auditWaiter struct {
	taken  bool // guarded by Audit.mu
	stored chan struct{}
}

// auditFlight is the block on its way. Its bytes stay the same until it is
// known that they are not stored and never will be.
type auditFlight struct {
	entries []json.RawMessage
	waiters []*auditWaiter
	dropped uint64
	heads   map[string]auditHead // of a checkpoint
	n       uint64
	data    []byte // nil: to be built on the current head
	hash    string
}

// OpenAudit prepares an Audit. A configuration that cannot work shows at the
// first Record.
func OpenAudit(cfg AuditConfig) *Audit {
	a := &Audit{
		cfg: cfg, log: cfg.Log, subject: auditPrefix + cfg.Instance, wake: make(chan struct{}, 1),
		folds: map[foldKey]*fold{}, covered: map[string]uint64{}, seen: map[string]auditHead{},
	}
	if a.cfg.Now == nil {
		a.cfg.Now = time.Now
	}
	if a.cfg.Every == 0 {
		a.cfg.Every = checkpointEvery
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if cfg.Conn == nil {
		a.fault = bus.E(bus.Internal, "the audit has no connection")
	} else {
		a.js, a.fault = newJetStream(cfg.Conn)
	}
	if a.fault == nil && !auditInstance.MatchString(cfg.Instance) {
		a.fault = bus.E(bus.Internal, "%.40q cannot name a writer of the audit", cfg.Instance)
	}
	if a.fault == nil && cfg.Signer != nil {
		a.signer, a.fault = cfg.Signer.PublicKey()
	}
	return a
}

// Dropped counts the entries that were lost because the queue was full.
func (a *Audit) Dropped() uint64 { return a.lost.Load() }

// Signers are the keys whose checkpoints this program can vouch for: its own, if
// it signs any.
func (a *Audit) Signers() []string {
	if a.signer == "" {
		return nil
	}
	return []string{a.signer}
}

// Record writes an entry and returns when a quorum has stored it. The error is
// Unavailable if that did not happen before ctx ended or within 2 s: then the
// entry may still land later, unless the message says that it will not. What
// must not happen unrecorded must not happen after an error.
func (a *Audit) Record(ctx context.Context, e bus.AuditEntry) error {
	if a.fault != nil {
		return a.fault
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	w := &auditWaiter{stored: make(chan struct{})}
	a.mu.Lock()
	if a.records == maxQueued {
		a.mu.Unlock()
		return bus.E(bus.Unavailable, "the audit has too many entries waiting; nothing was recorded")
	}
	a.records++
	a.queue = append(a.queue, auditItem{cleanEntry(e, a.cfg.Now()), w})
	a.mu.Unlock()
	a.nudge()
	select {
	case <-w.stored:
		return nil
	case <-ctx.Done():
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-w.stored:
		return nil
	default:
	}
	if !w.taken {
		a.records--
		a.queue = slices.DeleteFunc(a.queue, func(i auditItem) bool { return i.who == w })
		return bus.E(bus.Unavailable, "the audit takes no entries now; nothing was recorded: %w", ctx.Err())
	}
	return bus.E(bus.Unavailable, "the audit did not confirm the entry; it may or may not have been recorded: %w", ctx.Err())
}

// Note writes an entry some time soon, or never: it does not block, and when
// too many wait or the process dies, the entry is lost. Lost entries are
// counted, and the next block tells how many. Connects and denials that repeat
// within a minute are folded into one entry that counts them.
func (a *Audit) Note(e bus.AuditEntry) {
	now := a.cfg.Now()
	if e.At.IsZero() {
		e.At = now
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch e.Kind {
	case bus.AuditConnect, bus.AuditDenial:
		a.foldLocked(boundEntry(e), now)
	default:
		a.noteLocked(boundEntry(e), now)
	}
}

// boundEntry keeps what is too long for an entry out of memory; cleanEntry cuts
// it to the end of a character.
func boundEntry(e bus.AuditEntry) bus.AuditEntry {
	for _, s := range []*string{&e.Action, &e.Actor, &e.User, (*string)(&e.Room), &e.From, &e.Request, &e.Result, (*string)(&e.Code), &e.Detail} {
		if len(*s) > maxAuditText+utf8.UTFMax {
			*s = strings.Clone((*s)[:maxAuditText+utf8.UTFMax])
		}
	}
	return e
}

// noteLocked needs mu.
func (a *Audit) noteLocked(e bus.AuditEntry, now time.Time) {
	if a.fault != nil || a.notes == maxQueued {
		a.dropLocked(1, now)
		return
	}
	a.notes++
	a.queue = append(a.queue, auditItem{entry: e})
	a.waitsLocked(now, a.notes == maxBlockEntries)
}

// dropLocked needs mu.
func (a *Audit) dropLocked(n uint64, now time.Time) {
	a.lost.Add(n)
	a.dropped += n
	a.waitsLocked(now, false)
}

// waitsLocked starts the time in which a note is written. It needs mu.
func (a *Audit) waitsLocked(now time.Time, full bool) {
	if a.noted.IsZero() {
		a.noted = now
		full = true
	}
	if full {
		a.nudge()
	}
}

func (a *Audit) nudge() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// foldKey makes entries equal. A caller who has proven nothing has no name in
// it: names cost nothing to make up.
type foldKey struct {
	kind                bus.AuditKind
	action, actor, user string
	room                bus.RoomID
	result              string
	code                bus.Code
}

type fold struct {
	until  time.Time
	passed int
	from   []string
	more   uint64
	last   bus.AuditEntry
}

// foldLocked needs mu.
func (a *Audit) foldLocked(e bus.AuditEntry, now time.Time) {
	k := foldKey{e.Kind, e.Action, e.Actor, e.User, e.Room, e.Result, e.Code}
	if e.Code == bus.Unauthenticated {
		k.actor, k.user = "", ""
	}
	f := a.folds[k]
	if f != nil && !now.Before(f.until) {
		a.unfoldLocked(k, f, now)
		f = nil
	}
	if f == nil {
		if len(a.folds) >= maxFolds {
			a.sweepLocked(now, false)
		}
		if len(a.folds) >= maxFolds {
			a.dropLocked(1, now)
			return
		}
		f = &fold{until: now.Add(foldTime)}
		a.folds[k] = f
	}
	f.last = e
	stranger := len(f.from) < foldFrom && !slices.Contains(f.from, e.From)
	if stranger {
		f.from = append(f.from, e.From)
	}
	if f.passed < foldPass || stranger {
		f.passed++
		a.noteLocked(e, now)
		return
	}
	f.more++
}

// unfoldLocked tells what a fold has swallowed. It needs mu.
func (a *Audit) unfoldLocked(k foldKey, f *fold, now time.Time) {
	delete(a.folds, k)
	if f.more == 0 {
		return
	}
	e := f.last
	e.Detail = fmt.Sprintf("%d more like this within %s", f.more, foldTime)
	if a.notes == maxQueued {
		a.dropLocked(f.more, now)
		return
	}
	a.noteLocked(e, now)
}

// sweepLocked needs mu.
func (a *Audit) sweepLocked(now time.Time, all bool) {
	a.swept = now
	for k, f := range a.folds {
		if all || !now.Before(f.until) {
			a.unfoldLocked(k, f, now)
		}
	}
}

// Run writes until ctx ends, then what is left, and a checkpoint if it has a
// signer, within 2 s.
func (a *Audit) Run(ctx context.Context) {
	if a.fault != nil {
		a.log.Error("no audit is written", "err", a.fault)
		<-ctx.Done()
		return
	}
	var checkpoints sync.WaitGroup
	checkpoints.Go(func() { a.keepCheckpoints(ctx) })
	for ctx.Err() == nil {
		patience := a.patience()
		if patience <= 0 {
			a.write(ctx)
			continue
		}
		t := time.NewTimer(patience)
		select {
		case <-ctx.Done():
		case <-a.wake:
		case <-t.C:
		}
		t.Stop()
	}
	checkpoints.Wait()
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), auditStop)
	defer cancel()
	a.mu.Lock()
	a.sweepLocked(a.cfg.Now(), true)
	a.mu.Unlock()
	for last.Err() == nil && a.write(last) {
	}
	if a.cfg.Signer != nil {
		a.prepareCheckpoint(last)
		a.write(last)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	unwritten := len(a.queue)
	if a.flight != nil {
		unwritten += len(a.flight.entries)
	}
	if unwritten > 0 {
		a.lost.Add(uint64(unwritten))
		a.log.Error("the audit ends with entries that no quorum has confirmed", "entries", unwritten)
	}
}

// patience is how long nothing needs to be written.
func (a *Audit) patience() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.cfg.Now()
	if a.flight != nil || a.records > 0 || a.notes >= maxBlockEntries || a.sign != nil {
		return 0
	}
	if now.Sub(a.swept) >= sweepPause {
		a.sweepLocked(now, false)
	}
	if a.noted.IsZero() {
		return sweepPause
	}
	return min(noteDelay, noteDelay-now.Sub(a.noted))
}

// write brings the block on its way to its place, or the next one if there is
// none. It is false if nothing is left to write, or ctx ended before.
func (a *Audit) write(ctx context.Context) bool {
	if a.flight == nil {
		a.flight = a.take()
	}
	f := a.flight
	if f == nil {
		return false
	}
	failed := false
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		landed, err := a.land(ctx, f)
		switch {
		case errors.Is(err, errUnsigned):
			a.log.Error("no checkpoint of the audit", "err", err)
			a.flight = nil
			return true
		case landed:
			a.flight = nil
			if failed {
				a.log.Info("the audit takes blocks again", "n", f.n)
			}
			return true
		case ctx.Err() != nil:
			return false
		case err != nil && !failed:
			failed = true
			a.log.Warn("the audit does not take a block; trying on", "n", f.n, "entries", len(f.entries), "err", err)
		}
		wait(ctx, pause)
	}
}

// take makes a block of what waits, oldest first; nil if nothing does.
func (a *Audit) take() *auditFlight {
	a.mu.Lock()
	defer a.mu.Unlock()
	f := &auditFlight{}
	if a.sign != nil {
		f.heads, a.sign = a.sign, nil
		return f
	}
	now, size, used := a.cfg.Now(), 1<<10, 0
	for ; used < len(a.queue) && len(f.entries) < maxBlockEntries; used++ {
		item := &a.queue[used]
		raw, err := json.Marshal(cleanEntry(item.entry, now))
		if err != nil { // no entry can do that: its texts are clean and its time has a form
			a.log.Error("an entry of the audit has no form", "err", err)
			raw = []byte(`{"kind":"outcome","action":"unreadable","result":"failed","at":"1970-01-01T00:00:00Z"}`)
		}
		if size += len(raw) + 1; size > maxBlock && len(f.entries) > 0 {
			break
		}
		f.entries = append(f.entries, raw)
		if item.who == nil {
			a.notes--
			continue
		}
		a.records--
		item.who.taken = true
		f.waiters = append(f.waiters, item.who)
	}
	rest := copy(a.queue, a.queue[used:])
	clear(a.queue[rest:])
	a.queue = a.queue[:rest]
	if a.notes == 0 {
		a.noted = time.Time{}
	}
	f.dropped, a.dropped = a.dropped, 0
	if len(f.entries) == 0 && f.dropped == 0 {
		return nil
	}
	return f
}

// land tries once to store a block and finds out whether it is stored.
func (a *Audit) land(ctx context.Context, f *auditFlight) (bool, error) {
	if !a.read {
		m, err := a.lastBlock(ctx, a.subject)
		if err != nil {
			return false, err
		}
		a.adopt(m)
		a.read = true
	}
	if f.data == nil {
		if err := a.build(f); err != nil {
			return false, err
		}
	}
	m := &nats.Msg{Subject: a.subject, Data: f.data, Header: nats.Header{}}
	pctx, cancel := context.WithTimeout(ctx, auditTry)
	ack, err := a.js.PublishMsg(pctx, m, jetstream.WithExpectStream(AuditStream), jetstream.WithRetryAttempts(0),
		jetstream.WithExpectLastSequencePerSubject(a.last),
		jetstream.WithMsgID(fmt.Sprintf("%s:%d:%s", a.cfg.Instance, f.n, f.hash[:msgIDDigits])))
	cancel()
	if err == nil {
		a.landed(f, ack.Sequence)
		return true, nil
	}
	// Whatever the error says, an earlier try may have been stored: look at the
	// first block behind the one that this one was built on.
	stored, gerr := a.block(ctx, messageRequest{Seq: a.last + 1, NextFor: a.subject})
	switch {
	case gerr != nil:
		return false, errors.Join(err, gerr)
	case stored != nil && hashOf(stored.data) == f.hash:
		a.landed(f, stored.seq)
		return true, nil
	}
	var api *jetstream.APIError
	if stored == nil && (!errors.As(err, &api) || api.ErrorCode != errWrongLastSeq && api.ErrorCode != errWrongLastSeqAny) {
		return false, err // not stored so far; the same bytes again
	}
	newest, gerr := a.lastBlock(ctx, a.subject)
	if gerr != nil {
		return false, errors.Join(err, gerr)
	}
	before := a.head
	a.adopt(newest)
	if a.head.N != before.N {
		f.data = nil // another process had the place; ours can never be stored there
	}
	return false, nil
}

// adopt takes the newest message of the own subject as the head of the chain.
// A writer never goes back behind what it has written or read: if the stream
// does, somebody has rewritten it, and going on from the true head is what
// makes VerifyAudit find that.
func (a *Audit) adopt(m *storedMessage) {
	if m == nil {
		if a.head.N > 0 {
			a.log.Error("the audit has lost the blocks of this instance", "n", a.head.N, "seq", a.head.Seq)
		}
		a.last = 0
		return
	}
	hash := hashOf(m.data)
	b, _, err := decodeBlock(m.data)
	switch {
	case err == nil && b.N > a.head.N:
		a.head = auditHead{b.N, m.seq, hash}
	case hash != a.head.Hash:
		a.log.Error("the audit of this instance was rewritten, or somebody else writes into it", "n", a.head.N, "seq", m.seq, "err", err)
	}
	a.last = m.seq
}

// errUnsigned gives a checkpoint up: the key is not there.
var errUnsigned = errors.New("cannot be signed")

func (a *Audit) build(f *auditFlight) (err error) {
	b := auditBlock[json.RawMessage]{
		V: auditVersion, Instance: a.cfg.Instance, N: a.head.N + 1, Prev: a.head.Hash, PrevSeq: a.head.Seq, At: a.cfg.Now().UTC().Truncate(time.Millisecond),
		Dropped: f.dropped, Entries: f.entries,
	}
	var signer AuditSigner
	if f.heads != nil {
		signer, b.Signer, b.Heads = a.cfg.Signer, a.signer, f.heads
		if a.head.N > 0 {
			f.heads[a.cfg.Instance] = a.head
		}
	}
	data, err := encodeBlock(b, signer)
	if err != nil {
		return fmt.Errorf("%w: %w", errUnsigned, err)
	}
	f.n, f.data, f.hash = b.N, data, hashOf(data)
	return nil
}

func (a *Audit) landed(f *auditFlight, seq uint64) {
	a.head, a.last = auditHead{N: f.n, Seq: seq, Hash: f.hash}, seq
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, w := range f.waiters {
		close(w.stored)
	}
	if f.heads == nil {
		return
	}
	a.covered[a.cfg.Instance] = f.n
	for name, h := range f.heads {
		a.covered[name] = max(a.covered[name], h.N)
	}
}

// keepCheckpoints prepares a checkpoint now and then, if any chain has grown.
func (a *Audit) keepCheckpoints(ctx context.Context) {
	if a.cfg.Signer == nil {
		return
	}
	for {
		wait(ctx, a.cfg.Every-a.cfg.Every/10+rand.N(a.cfg.Every/5+1)) // the instances take turns
		if ctx.Err() != nil {
			return
		}
		a.prepareCheckpoint(ctx)
	}
}

// prepareCheckpoint lets the next block be a checkpoint, unless one of our key
// names every head already.
func (a *Audit) prepareCheckpoint(ctx context.Context) {
	heads, due, err := a.readHeads(ctx)
	if err != nil {
		if ctx.Err() == nil {
			a.log.Warn("no checkpoint of the audit", "err", err)
		}
		return
	}
	if !due {
		return
	}
	a.mu.Lock()
	a.sign = heads
	a.mu.Unlock()
	a.nudge()
}

// readHeads asks the stream's leader for the newest block of every chain; due
// says that one of them is in no checkpoint of our key. A head that has been
// read once and is gone without having been discarded is named for ever: what
// is signed must not follow a rewritten stream back.
func (a *Audit) readHeads(ctx context.Context) (heads map[string]auditHead, due bool, err error) {
	rctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := a.js.Stream(rctx, AuditStream)
	if err != nil {
		return nil, false, fmt.Errorf("stream %s: %w", AuditStream, err)
	}
	info, err := s.Info(rctx, jetstream.WithSubjectFilter(auditBlocks))
	if err != nil {
		return nil, false, fmt.Errorf("stream %s: %w", AuditStream, err)
	}
	covered := map[string]uint64{}
	heads = map[string]auditHead{}
	size := 1 << 10
	for _, subject := range slices.Sorted(maps.Keys(info.State.Subjects)) {
		name := strings.TrimPrefix(subject, auditPrefix)
		if !auditInstance.MatchString(name) {
			continue
		}
		m, err := a.lastBlock(rctx, subject)
		if err != nil {
			return nil, false, err
		}
		if m == nil {
			continue
		}
		b, sig, err := decodeBlock(m.data)
		if err != nil || b.Instance != name {
			continue // no block; VerifyAudit names it
		}
		if size += len(name) + headSize; size > maxBlock {
			a.log.Error("the audit has more chains than a checkpoint can name", "chain", name)
			continue
		}
		heads[name] = auditHead{b.N, m.seq, hashOf(m.data)}
		if sig != nil && b.Signer == a.signer && genuine(m.data, b.Signer, sig) {
			covered[name] = max(covered[name], b.N)
			for other, h := range b.Heads {
				covered[other] = max(covered[other], h.N)
			}
		}
	}
	for name, known := range a.seen {
		now, there := heads[name]
		if known.Seq >= info.State.FirstSeq && (!there || now.N < known.N || now.N == known.N && now.Hash != known.Hash) {
			a.log.Error("the audit was rewritten: a block is gone", "instance", name, "n", known.N, "seq", known.Seq)
			heads[name], due = known, true
		}
	}
	a.seen = maps.Clone(heads)
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, h := range heads {
		a.covered[name] = max(a.covered[name], covered[name])
		due = due || h.N > a.covered[name]
	}
	return heads, due, nil
}

// messageRequest asks the leader of a stream for one message.
type messageRequest struct {
	Seq     uint64 `json:"seq,omitempty"`
	NextFor string `json:"next_by_subj,omitempty"` // the first of this subject from Seq on
	LastFor string `json:"last_by_subj,omitempty"`
}

func (a *Audit) lastBlock(ctx context.Context, subject string) (*storedMessage, error) {
	return a.block(ctx, messageRequest{LastFor: subject})
}

// block returns nil if no such message is stored.
func (a *Audit) block(ctx context.Context, r messageRequest) (*storedMessage, error) {
	req, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	rctx, cancel := context.WithTimeout(ctx, auditTry)
	defer cancel()
	reply, err := a.cfg.Conn.RequestWithContext(rctx, "$JS.API.STREAM.MSG.GET."+AuditStream, req)
	if err != nil {
		return nil, fmt.Errorf("read the audit: %w", err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message struct {
			Subject string `json:"subject"`
			Seq     uint64 `json:"seq"`
			Data    []byte `json:"data"`
		} `json:"message"`
	}
	if err := json.Unmarshal(reply.Data, &answer); err != nil {
		return nil, fmt.Errorf("read the audit: %w", err)
	}
	switch {
	case answer.Error != nil && answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return nil, nil
	case answer.Error != nil:
		return nil, fmt.Errorf("read the audit: %w", answer.Error)
	case answer.Message.Seq == 0:
		return nil, errors.New("read the audit: an answer without a message")
	}
	return &storedMessage{seq: answer.Message.Seq, subject: answer.Message.Subject, data: answer.Message.Data}, nil
}

// SeedSigner signs with the seed in a file, read for each signature and wiped,
// as the links of our programs do.
func SeedSigner(file string) AuditSigner { return seedSigner(file) }

type seedSigner string

func (s seedSigner) PublicKey() (string, error) {
	kp, err := readSeed(string(s))
	if err != nil {
		return "", err
	}
	defer kp.Wipe()
	return kp.PublicKey()
}

func (s seedSigner) Sign(input []byte) ([]byte, error) {
	kp, err := readSeed(string(s))
	if err != nil {
		return nil, err
	}
	defer kp.Wipe()
	return kp.Sign(input)
}
