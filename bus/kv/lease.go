package kv

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus/guard"
)

// recordsVersion is the newest record version this build understands, told to
// writers so that a narrower one is never written past an older service.
const recordsVersion = 1

// barrierRecord is what a boot writes under _barrier.<instance>.<boot>.
type barrierRecord struct {
	V        int    `json:"v"`
	Instance string `json:"instance"`
	Service  string `json:"service"`
	Node     string `json:"node"`
	Boot     string `json:"boot"`
	LeaseMS  int64  `json:"lease_ms"`
	Released bool   `json:"released"`
	Token    string `json:"token"`
	RecordsV int    `json:"records_v"`
}

// holder is what the streams tell about one boot that decides on a View.
type holder struct {
	barrierRecord
	seen [3]sighting // by streamIndex
}

type sighting struct {
	first   uint64    // sequence of the first barrier seen
	firstAt time.Time // its stream time
	at      time.Time // stream time of the newest barrier
}

// span is how many of the streams a barrier goes to, in their order.
type span int

const (
	usersOnly  span = usersIdx + 1
	allStreams      = span(len(viewBuckets))
)

// barrierState is guarded by View.mu.
type barrierState struct {
	open    map[string]underWay // token -> barrier not yet seen in every stream of its span
	proven  [3]time.Time        // start of the newest own barrier each feed has delivered
	bySeq   [3]seqProof         // only for the negative control of own-barrier
	wanted  span                // what callers wait for and no barrier has begun since; 0: nobody waits
	newest  string              // token of the last barrier begun
	begun   time.Time           // its start
	renewed time.Time           // start of the last barrier of all streams
	demand  chan struct{}       // tells keepLease to look
	inbox   string              // acknowledgements arrive at <inbox>.<stream index>.<token>
}

type underWay struct {
	start time.Time
	span  span
}

type seqProof struct {
	seq   uint64
	start time.Time
}

func (b *barrierState) init() {
	b.open = map[string]underWay{}
	b.demand = make(chan struct{}, 1)
}

func (b *barrierState) ask() {
	select {
	case b.demand <- struct{}{}:
	default:
	}
}

// Lease reports until when decisions may be made from this View, and whether
// that moment is still ahead. Check it after the decision too: a process may
// be paused between the two, and then with Lasts: by then another lease may be
// held, which says nothing about what was looked at under this one.
func (v *View) Lease() (until time.Time, held bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.leaseLocked()
}

// Lasts reports whether the lease of which Lease said until has time left. Asked
// after a decision, with what Lease said before it, it is true only if all that
// was read in between was current.
func (v *View) Lasts(until time.Time) bool {
	if guard.Off(guard.Lease) {
		return true
	}
	now := v.cfg.Now()
	wall := until.Round(0).Sub(now.Round(0))
	return until.Sub(now) > 0 && wall > 0 && wall < v.cfg.Lease+clockTolerance
}

func (v *View) leaseLocked() (time.Time, bool) {
	now := v.cfg.Now()
	start := v.provenLocked(allStreams)
	if start.IsZero() || v.cfg.Lease == 0 {
		return time.Time{}, false
	}
	if guard.Off(guard.Lease) {
		return now.Add(v.cfg.Lease), true
	}
	// The monotonic clock stands still while a machine is suspended, the wall
	// clock can be stepped: both must agree that the lease has time left.
	mono := now.Sub(start)
	wall := now.Round(0).Sub(start.Round(0))
	held := mono < v.cfg.Lease && wall < v.cfg.Lease && wall > -clockTolerance
	return start.Add(v.cfg.Lease), held
}

// provenLocked is the moment up to which the tables of a span are proven current.
func (v *View) provenLocked(s span) time.Time {
	start := v.barriers.proven[0]
	for _, p := range v.barriers.proven[1:s] {
		if p.IsZero() || start.IsZero() {
			return time.Time{}
		}
		if p.Before(start) {
			start = p
		}
	}
	return start
}

// Fault says why there is no lease, in words for people, or "".
func (v *View) Fault() string {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if _, held := v.leaseLocked(); held {
		return ""
	}
	return v.fault
}

// Barrier returns once the View is proven to hold everything that was
// committed before the call. Concurrent callers share barriers. The error is
// bus.Unavailable: without a quorum there is no answer.
func (v *View) Barrier(ctx context.Context) error { return v.barrier(ctx, allStreams) }

// UsersBarrier is a Barrier for the records of users alone, at a third of the
// cost: enough to say that a user is not registered, suspended or expired. It
// renews no lease.
func (v *View) UsersBarrier(ctx context.Context) error { return v.barrier(ctx, usersOnly) }

func (v *View) barrier(ctx context.Context, s span) error {
	v.mu.Lock()
	asked := v.cfg.Now()
	if v.barriers.wanted < s {
		v.barriers.wanted = s
		v.barriers.ask()
	}
	v.mu.Unlock()
	return v.waitUntil(ctx, func() bool {
		p := v.provenLocked(s)
		return !p.IsZero() && !p.Before(asked)
	})
}

// dropLocked ends the lease at once: something showed that past answers of a
// feed cannot be trusted.
func (v *View) dropLocked(why string) {
	v.barriers.proven = [3]time.Time{}
	v.barriers.bySeq = [3]seqProof{}
	clear(v.barriers.open)
	v.fault = why
}

// keepLease writes barriers, reports gained and lost leases, and on the way
// out tells everyone not to wait for this boot.
func (v *View) keepLease(ctx context.Context) {
	v.barriers.inbox = v.cfg.Conn.NewInbox()
	sub, err := v.cfg.Conn.Subscribe(v.barriers.inbox+".*.*", v.barrierAnswered)
	if err != nil {
		v.log.Error("cannot listen for answers to barriers", "err", err)
	} else {
		defer func() { _ = sub.Unsubscribe() }()
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var spaced <-chan time.Time
	held := false
	for {
		select {
		case <-ctx.Done():
			v.release()
			return
		case <-v.barriers.demand:
		case <-spaced:
			spaced = nil
		case <-tick.C:
		}
		v.mu.Lock()
		due, rest := v.dueLocked(v.cfg.Now())
		_, now := v.leaseLocked()
		if held && !now {
			v.wake()
		}
		v.mu.Unlock()
		if now != held {
			held = now
			v.log.Info("lease", "held", held, "why", v.Fault())
			if v.cfg.OnLease != nil {
				v.cfg.OnLease(held)
			}
		}
		if due != 0 {
			v.writeBarrier(due)
		} else if rest > 0 && spaced == nil {
			spaced = time.After(rest)
		}
	}
}

// dueLocked says whether to begin a barrier now, and over which streams; if not
// yet, rest is when to look again, or 0 for "when something happens".
//
// On demand there is one at a time: whoever asks while one is under way cannot
// use it, for it began before they asked, and shares the next one, which begins
// when the first is proven. Were there more, a crowd of strangers on a busy
// machine would have barriers queue up behind each other and slow all down. One
// that is not proven in time is taken for lost.
func (v *View) dueLocked(now time.Time) (due span, rest time.Duration) {
	b := &v.barriers
	age := now.Sub(b.begun)
	_, unproven := b.open[b.newest]
	switch {
	case !v.allLive():
		return 0, 0
	case now.Sub(b.renewed) >= renewEvery:
		return allStreams, 0
	case b.wanted == 0, unproven && age < barrierPatience:
		return 0, 0
	case age < barrierSpacing:
		return 0, barrierSpacing - age
	}
	return b.wanted, 0
}

// beginLocked starts a barrier. Who asked before it is served by it.
func (v *View) beginLocked(token string, s span) {
	b := &v.barriers
	start := v.cfg.Now()
	for t, u := range b.open {
		if start.Sub(u.start) > 3*DefaultLease {
			delete(b.open, t)
		}
	}
	b.open[token] = underWay{start, s}
	b.wanted, b.newest, b.begun = 0, token, start
	if s == allStreams {
		b.renewed = start
	}
}

func (v *View) writeBarrier(s span) {
	raw := make([]byte, 16)
	if _, err := rand.Read(raw); err != nil {
		v.setFault("randomness: " + err.Error())
		return
	}
	token := hex.EncodeToString(raw)
	v.mu.Lock()
	v.beginLocked(token, s)
	v.mu.Unlock()
	if err := v.publishBarrier(token, s, false); err != nil {
		v.setFault(fmt.Sprintf("not connected to NATS: %v", err))
	}
}

func (v *View) publishBarrier(token string, s span, released bool) error {
	value, err := json.Marshal(barrierRecord{
		V: 1, Instance: v.Instance(), Service: v.cfg.Service, Node: v.cfg.Node, Boot: v.boot,
		LeaseMS: v.cfg.Lease.Milliseconds(), Released: released || v.cfg.Lease == 0, Token: token, RecordsV: recordsVersion,
	})
	if err != nil {
		return err
	}
	for i, b := range viewBuckets[:s] {
		m := nats.NewMsg(subjectOf(b, barrierKeys+v.Instance()+"."+v.boot))
		m.Data = value
		m.Reply = fmt.Sprintf("%s.%d.%s", v.barriers.inbox, i, token)
		m.Header.Set("Nats-TTL", barrierTTL.String())
		if err := v.cfg.Conn.PublishMsg(m); err != nil {
			return err
		}
	}
	return nil
}

// release tells every writer not to wait for this boot. It is called when no
// decision of the service is in flight any more.
func (v *View) release() {
	v.mu.Lock()
	v.dropLocked("stopping")
	v.wake()
	v.mu.Unlock()
	if err := v.publishBarrier("released", allStreams, true); err == nil {
		_ = v.cfg.Conn.FlushTimeout(time.Second)
	}
}

func (v *View) setFault(why string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.fault = why
}

// barrierAnswered hears JetStream's answer to a barrier. It proves nothing; it
// only says, when barriers fail, why.
func (v *View) barrierAnswered(m *nats.Msg) {
	var ack struct {
		Seq   uint64 `json:"seq"`
		Error *struct {
			Description string `json:"description"`
		} `json:"error"`
	}
	if m.Header.Get("Status") == "503" {
		v.setFault("no answer from the streams: no leader")
		return
	}
	if json.Unmarshal(m.Data, &ack) != nil {
		return
	}
	if ack.Error != nil {
		v.setFault("barrier refused: " + ack.Error.Description)
		return
	}
	if !guard.Off(guard.OwnBarrier) {
		return
	}
	tokens := strings.Split(m.Subject, ".")
	i := int(tokens[len(tokens)-2][0] - '0')
	v.mu.Lock()
	defer v.mu.Unlock()
	if u, ok := v.barriers.open[tokens[len(tokens)-1]]; ok {
		v.barriers.bySeq[i] = seqProof{ack.Seq, u.start}
		v.proveBySequence(i)
		v.wake()
	}
}

// proveBySequence is the unsound proof that the own-barrier control tries.
func (v *View) proveBySequence(i int) {
	p := v.barriers.bySeq[i]
	if !p.start.IsZero() && v.tables[i].lastSeq >= p.seq && v.barriers.proven[i].Before(p.start) {
		v.barriers.proven[i] = p.start
	}
}

// sawHolder notes who decides on a View; it needs mu.
func (v *View) sawHolder(i int, r record) *barrierRecord {
	var b barrierRecord
	if err := json.Unmarshal(r.value, &b); err != nil || r.key != barrierKeys+b.Instance+"."+b.Boot {
		return nil
	}
	h := v.known[b.Boot]
	if h == nil {
		h = &holder{}
		v.known[b.Boot] = h
		v.forgetLongGone(r.at)
	}
	h.barrierRecord = b
	s := &h.seen[i]
	if s.first == 0 || r.rev < s.first {
		s.first = r.rev
	}
	if s.firstAt.IsZero() || r.at.Before(s.firstAt) {
		s.firstAt = r.at
	}
	s.at = r.at
	return &b
}

// forgetLongGone keeps the table of holders as small as the set of boots whose
// barrier records still exist.
func (v *View) forgetLongGone(now time.Time) {
	for boot, h := range v.known {
		newest := h.seen[0].at
		for _, s := range h.seen[1:] {
			if s.at.After(newest) {
				newest = s.at
			}
		}
		if !newest.IsZero() && now.Sub(newest) > barrierTTL {
			delete(v.known, boot)
		}
	}
}

// sawBarrier takes a barrier that the live feed delivered; it needs mu. An own
// one proves this table current up to that barrier's start, provided stream
// and process agree on the time. moved says that something new is proven: the
// barriers of others, many more, need wake nobody.
func (v *View) sawBarrier(i int, r record) (moved bool, err error) {
	b := v.sawHolder(i, r)
	if guard.Off(guard.OwnBarrier) {
		v.proveBySequence(i)
		return true, nil
	}
	if b == nil || b.Boot != v.boot {
		return false, nil
	}
	u, ok := v.barriers.open[b.Token]
	if !ok {
		return false, nil
	}
	now := v.cfg.Now()
	if r.at.Before(u.start.Add(-clockTolerance)) || r.at.After(now.Add(clockTolerance)) {
		return false, fmt.Errorf("%w: clock: stream %s says %s, this machine %s", errUntrusted,
			StreamName(viewBuckets[i]), r.at.Format(time.RFC3339Nano), now.UTC().Format(time.RFC3339Nano))
	}
	if v.barriers.proven[i].Before(u.start) {
		v.barriers.proven[i] = u.start
	}
	if !v.provenLocked(u.span).Before(u.start) {
		delete(v.barriers.open, b.Token)
		if u.span == allStreams {
			v.fault = "no barrier within the lease"
		}
		if v.barriers.wanted != 0 {
			v.barriers.ask()
		}
	}
	return true, nil
}

// leasedAt reports whether the boot may hold a lease at that moment, as far as
// any of the streams tells.
func (h *holder) leasedAt(at time.Time) bool {
	return !h.Released && h.LeaseMS != 0 && slices.ContainsFunc(h.seen[:], func(s sighting) bool {
		return !s.at.IsZero() && at.Sub(s.at) < h.lease()+clockTolerance
	})
}

func (h *holder) lease() time.Duration { return time.Duration(h.LeaseMS) * time.Millisecond }

func (h *holder) public() Holder {
	return Holder{Instance: h.Instance, Boot: h.Boot, Service: h.Service, Node: h.Node, Lease: h.lease()}
}

// Holder is one boot of a service that decides from a View.
type Holder struct {
	Instance string
	Boot     string
	Service  string
	Node     string
	Lease    time.Duration
}
