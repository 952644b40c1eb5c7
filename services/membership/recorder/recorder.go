package recorder

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
)

const (
	// queue is the group of all recorders: one of them gets each message.
	queue = "recorder"
	// storeTimeout is how long a message may be under way to its quorum. Whoever
	// waits for the recorder waits longer.
	storeTimeout  = 2 * time.Second
	streamTimeout = 5 * time.Second
	// leaveTimeout is how long a recorder that stops looks at what had come.
	leaveTimeout = 5 * time.Second
	// keepEvery is how often rooms are compared with what is recorded, if nothing
	// happens.
	keepEvery = 10 * time.Second

	// What may be under way to its quorum at once: of one room, and of all.
	roomMessages, roomBytes = 2048, 8 << 20
	allMessages, allBytes   = 8192, 64 << 20
	// What may wait in one room's queue for the recorder, and for how long: with
	// storeTimeout it is less than a sender waits for the answer.
	queuedMessages, queuedBytes = 4096, 8 << 20
	queuePatience               = 700 * time.Millisecond

	// What a message may say beside its payload.
	maxHeaders, maxHeaderBytes = 16, 4 << 10
)

// Config configures a Recorder.
type Config struct {
	Conn    *nats.Conn // account BUS
	View    *kv.View
	Log     *slog.Logger
	Now     func() time.Time
	Metrics prometheus.Registerer
	Rate    rate.Limit // messages a second that this node records of one room
	Burst   int
	Poked   <-chan struct{} // when durable rooms or the lease may have changed
}

// Recorder records durable rooms while Run runs. Ensure and Purge work without
// it. It is safe for concurrent use.
type Recorder struct {
	cfg     Config
	view    *kv.View
	nc      *nats.Conn
	js      jetstream.JetStream
	log     *slog.Logger
	metrics *metrics
	inbox   string // "." and a number behind it is where the stream answers
	senders bus.Senders

	mu       sync.Mutex
	rooms    map[bus.RoomID]*room
	leaving  map[*room]bool      // no longer heard, and what had come is still looked at
	pending  map[string]*pending // by the number
	purged   map[bus.RoomID]bool
	next     uint64
	messages int // under way, of all rooms
	bytes    int
	freed    chan struct{} // closed when something is under way no more; nil: nobody waits for that
}

// room is a durable room that this node records.
type room struct {
	id       bus.RoomID
	keep     bus.Retention
	sub      *nats.Subscription
	limit    *rate.Limiter
	messages int // under way
	bytes    int
	full     time.Time // since when messages had to wait; zero: the queue was empty since. It belongs to take
	last     uint64    // stored, as far as this node knows
	tips     int       // told of it so far
	tip      time.Time
}

// pending is a message that its stream has not answered for.
type pending struct {
	room  *room
	hold  *kv.Hold
	reply string // empty: nobody waits
	size  int
	begun time.Time
}

// New prepares a Recorder.
func New(cfg Config) (*Recorder, error) {
	js, err := jetstream.New(cfg.Conn, jetstream.WithDefaultTimeout(streamTimeout))
	if err != nil {
		return nil, bus.E(bus.Internal, "jetstream: %w", err)
	}
	r := &Recorder{
		cfg: cfg, view: cfg.View, nc: cfg.Conn, js: js, log: cfg.Log, metrics: newMetrics(cfg.Metrics),
		inbox: cfg.Conn.NewInbox(), rooms: map[bus.RoomID]*room{}, leaving: map[*room]bool{}, pending: map[string]*pending{}, purged: map[bus.RoomID]bool{},
	}
	return r, nil
}

// Run records until ctx ends, and then has what has come by then stored and
// answered for: nobody else gets it. That needs the lease.
func (r *Recorder) Run(ctx context.Context) {
	answers, err := r.nc.Subscribe(r.inbox+".*", r.stored)
	if err != nil {
		r.log.Error("nothing is recorded", "err", err)
		return
	}
	defer func() { _ = answers.Unsubscribe() }()
	var beside sync.WaitGroup
	defer beside.Wait()
	ticking, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	beside.Go(func() { r.ticking(ticking) })
	every := time.NewTicker(keepEvery)
	defer every.Stop()
	for {
		r.keep(ctx)
		select {
		case <-ctx.Done():
			r.leave()
			r.settle()
			return
		case <-r.cfg.Poked:
		case <-every.C:
		}
	}
}

// settle waits for what has come and is not looked at yet, as far as there is a
// connection to answer by, and for what is under way, which times out by itself.
func (r *Recorder) settle() {
	begun := r.cfg.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		waiting := r.nc.IsConnected() && r.cfg.Now().Sub(begun) < leaveTimeout
		r.mu.Lock()
		left := len(r.pending)
		if waiting {
			left += len(r.leaving)
		}
		r.mu.Unlock()
		if left == 0 {
			return
		}
	}
}

// keep records exactly the durable rooms that there are, while there is a lease.
func (r *Recorder) keep(ctx context.Context) {
	if _, held := r.view.Lease(); !held {
		r.abandon()
		return
	}
	ctx, cancel := context.WithTimeout(ctx, keepEvery) // rooms that have no leader keep the others waiting no longer
	defer cancel()
	want := map[bus.RoomID]bus.Room{}
	for _, rec := range r.view.DurableRooms() {
		if rec.Status == bus.RoomActive {
			want[rec.ID] = rec
		}
		if rec.Purged {
			r.purgeOnce(ctx, rec.ID)
		}
	}
	r.mu.Lock()
	for id, known := range r.rooms {
		if _, there := want[id]; !there {
			r.drop(known)
		}
	}
	r.mu.Unlock()
	var all sync.WaitGroup
	some := make(chan struct{}, 8)
	for id, rec := range want {
		all.Go(func() {
			some <- struct{}{}
			defer func() { <-some }()
			r.record(ctx, id, rec.Retention)
		})
	}
	all.Wait()
	r.mu.Lock()
	unrecorded := len(want)
	for id, rec := range want {
		if known := r.rooms[id]; known != nil && known.keep == rec.Retention {
			unrecorded--
		}
	}
	r.mu.Unlock()
	r.metrics.rooms.Set(float64(len(want)))
	r.metrics.unrecorded.Set(float64(unrecorded))
}

// purgeOnce finishes what who archived the room may have left.
func (r *Recorder) purgeOnce(ctx context.Context, id bus.RoomID) {
	r.mu.Lock()
	done := r.purged[id]
	r.mu.Unlock()
	if done {
		return
	}
	if err := r.Purge(ctx, id); err != nil {
		r.log.Warn("messages of an archived room are left", "room", id, "err", err)
	}
}

// record makes sure of a room's stream and hears the room.
func (r *Recorder) record(ctx context.Context, id bus.RoomID, keep bus.Retention) {
	r.mu.Lock()
	known := r.rooms[id]
	settled := known != nil && known.keep == keep
	r.mu.Unlock()
	if settled {
		return
	}
	if err := r.Ensure(ctx, id, keep); err != nil {
		r.metrics.streams.Inc()
		r.log.Warn("a durable room cannot be recorded", "room", id, "err", err)
		return
	}
	if known != nil {
		r.mu.Lock()
		known.keep = keep
		r.mu.Unlock()
		return
	}
	n := &room{id: id, keep: keep, limit: rate.NewLimiter(r.cfg.Rate, r.cfg.Burst)}
	sub, err := r.nc.QueueSubscribe(bus.RoomSubscribe(id), queue, func(m *nats.Msg) { r.take(n, m) })
	if err == nil {
		err = sub.SetPendingLimits(queuedMessages, queuedBytes)
	}
	if err != nil {
		r.log.Warn("a durable room cannot be heard", "room", id, "err", err)
		return
	}
	n.sub = sub
	sub.SetClosedHandler(func(string) { // behind the last message of it
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.leaving, n)
	})
	r.mu.Lock()
	r.rooms[id] = n
	r.mu.Unlock()
}

// leave lets the others record.
func (r *Recorder) leave() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.rooms {
		r.drop(n)
	}
}

// abandon lets the others record, at once: without a lease nothing is. It does
// not drain: a subscription that is draining while its connection is lost is made
// again by the client library when it reconnects, and forgotten without the
// server being told, which would go on to hand that nobody a share of the messages.
func (r *Recorder) abandon() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.rooms {
		delete(r.rooms, n.id)
		_ = n.sub.Unsubscribe() // fails on a closed connection only
	}
}

// drop needs mu. What has come is still looked at.
func (r *Recorder) drop(n *room) {
	delete(r.rooms, n.id)
	if err := n.sub.Drain(); err != nil {
		_ = n.sub.Unsubscribe() // no connection: nothing comes by it either
		return
	}
	r.leaving[n] = true
}

// take takes a message of a room. It is called for one at a time, in the order
// in which the server had them.
func (r *Recorder) take(n *room, m *nats.Msg) {
	who, topic, err := r.understand(n.id, m)
	if err != nil {
		r.metrics.refused.WithLabelValues("malformed").Inc()
		r.answer(m.Reply, who, bus.Recorded{Code: bus.Invalid, Detail: err.Error()})
		return
	}
	r.awaitPlace(n, len(m.Data), func() bool {
		behind, _, err := m.Sub.Pending()
		return err == nil && behind > 0
	})
	guard.Pause("record")
	hold := r.view.Hold(who)
	if refusal := r.may(n.id, who); refusal != nil {
		hold.Release()
		r.metrics.refused.WithLabelValues(string(refusal.Code)).Inc()
		r.answer(m.Reply, who, *refusal)
		return
	}
	out := nats.NewMsg(bus.StoreSubject(n.id, who, topic))
	out.Data = m.Data
	if err := r.dress(out, who, m.Header); err != nil {
		hold.Release()
		r.metrics.refused.WithLabelValues("malformed").Inc()
		r.answer(m.Reply, who, bus.Recorded{Code: bus.Invalid, Detail: err.Error()})
		return
	}
	p := &pending{room: n, hold: hold, size: len(m.Data), begun: r.cfg.Now()}
	if bus.OwnInbox(who, m.Reply) || guard.Off(guard.OwnInbox) {
		p.reply = m.Reply
	}
	token, ok := r.enter(p)
	if !ok {
		hold.Release()
		r.metrics.refused.WithLabelValues("quota").Inc()
		r.answer(m.Reply, who, bus.Recorded{Code: bus.Unavailable, Detail: "too much is under way in this room; try again"})
		return
	}
	out.Reply = r.inbox + "." + token
	if err := r.nc.PublishMsg(out); err != nil {
		if r.exit(token) == nil {
			return
		}
		said := bus.Recorded{Code: bus.Unavailable, Detail: "this node has no connection to its server"}
		if errors.Is(err, nats.ErrMaxPayload) {
			said = bus.Recorded{Code: bus.Invalid, Detail: "the message is larger than the servers take"}
		}
		hold.Release()
		r.metrics.refused.WithLabelValues("not_sent").Inc()
		r.reply(p.reply, said)
	}
}

// understand reads who sent what. The server has let only this sender publish
// there.
func (r *Recorder) understand(id bus.RoomID, m *nats.Msg) (who bus.UserKey, topic string, err error) {
	in, who, topic, err := r.senders.ParseRoomSubject(m.Subject)
	if err == nil && in != id {
		err = bus.E(bus.Invalid, "this is another room")
	}
	return who, topic, err
}

// may asks whether somebody may write into a room now; nil is yes. A message
// that waited in a queue may be of who was allowed when they sent it.
func (r *Recorder) may(id bus.RoomID, who bus.UserKey) *bus.Recorded {
	if guard.Off(guard.RecordRecheck) {
		return nil
	}
	lease, _ := r.view.Lease()
	a, err := r.view.Access(who)
	allowed := false
	if err == nil && a != nil {
		admitted, _ := a.Admitted(r.cfg.Now())
		i, found := slices.BinarySearchFunc(a.Rooms, id, func(g kv.Grant, id bus.RoomID) int { return cmp.Compare(g.Room, id) })
		allowed = admitted && found && a.Rooms[i].Role.MayPublish()
	}
	switch {
	case !r.view.Lasts(lease):
		return &bus.Recorded{Code: bus.Unavailable, Detail: "this node cannot decide now"}
	case !allowed:
		return &bus.Recorded{Code: bus.Forbidden, Detail: "not allowed to write into this room"}
	}
	return nil
}

// dress gives a message its headers: ours, and of the sender's only those that
// mean nothing to a server.
func (r *Recorder) dress(out *nats.Msg, who bus.UserKey, in nats.Header) error {
	size := 0
	for name, values := range in {
		if guard.Off(guard.CleanHeaders) {
			out.Header[name] = values
			continue
		}
		if !strings.HasPrefix(name, bus.HeaderPrefix) {
			continue
		}
		if len(values) != 1 || !headerToken(name) || !printable(values[0]) {
			return bus.E(bus.Invalid, "a header is a name of a-z A-Z 0-9 - with one line of printable ASCII")
		}
		if size += len(name) + len(values[0]); size > maxHeaderBytes || len(out.Header) == maxHeaders {
			return bus.E(bus.Invalid, "the headers are more than %d, or longer than %d bytes", maxHeaders, maxHeaderBytes)
		}
		out.Header[name] = values
	}
	id := in.Get(bus.MessageIDHeader)
	if id == "" {
		return nil
	}
	if _, err := bus.ParseMessageID(id); err != nil {
		return err
	}
	// In the sender's own name space: nobody can take another's id.
	out.Header.Set(nats.MsgIdHdr, who.NKey()+":"+id)
	return nil
}

func headerToken(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return len(s) <= 64
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' })
}

// awaitPlace lets a message wait while as much is under way as may be: refused
// at once, it would come again after others of its sender, and who listens would
// hold those back. What is behind it waits too, so the patience is that of the
// queue, which has not been empty since the first one had to wait. When it is
// over, all in the queue are refused: a recorder that lags further behind would
// only record what its senders have given up and sent to another. More says
// whether the queue holds more.
func (r *Recorder) awaitPlace(n *room, size int, more func() bool) {
	for {
		r.mu.Lock()
		fits := r.fits(n, size)
		if !fits && r.freed == nil {
			r.freed = make(chan struct{})
		}
		freed := r.freed
		r.mu.Unlock()
		if fits {
			break
		}
		now := r.cfg.Now()
		if n.full.IsZero() {
			n.full = now
		}
		left := queuePatience - now.Sub(n.full)
		if left <= 0 {
			break
		}
		late := time.NewTimer(left)
		select {
		case <-freed:
		case <-late.C:
		}
		late.Stop()
	}
	if !more() {
		n.full = time.Time{}
	}
}

// fits needs mu.
func (r *Recorder) fits(n *room, size int) bool {
	return n.messages < roomMessages && n.bytes+size <= roomBytes && r.messages < allMessages && r.bytes+size <= allBytes
}

// enter counts a message as under way, if there is room for it.
func (r *Recorder) enter(p *pending) (token string, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := p.room
	if !r.fits(n, p.size) || !n.limit.AllowN(p.begun, 1) {
		return "", false
	}
	n.messages, n.bytes, r.messages, r.bytes = n.messages+1, n.bytes+p.size, r.messages+1, r.bytes+p.size
	r.next++
	token = strconv.FormatUint(r.next, 36)
	r.pending[token] = p
	return token, true
}

// exit ends it; nil if somebody else has.
func (r *Recorder) exit(token string) *pending {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.pending[token]
	if p == nil {
		return nil
	}
	delete(r.pending, token)
	if r.freed != nil {
		close(r.freed)
		r.freed = nil
	}
	n := p.room
	n.messages, n.bytes, r.messages, r.bytes = n.messages-1, n.bytes-p.size, r.messages-1, r.bytes-p.size
	return p
}

// pubAck is what a stream answers.
type pubAck struct {
	Stream    string `json:"stream"`
	Seq       uint64 `json:"seq"`
	Duplicate bool   `json:"duplicate"`
	Error     *struct {
		Code int `json:"err_code"`
	} `json:"error"`
}

// stored hears what became of a message.
func (r *Recorder) stored(m *nats.Msg) {
	p := r.exit(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:])
	if p == nil {
		return // too late: the sender has been told that nobody knows, or repeats it
	}
	defer p.hold.Release()
	var ack pubAck
	switch err := json.Unmarshal(m.Data, &ack); {
	case len(m.Data) == 0 && m.Header.Get("Status") == "503":
		r.metrics.refused.WithLabelValues("no_leader").Inc()
		r.reply(p.reply, bus.Recorded{Code: bus.Unavailable, Detail: "the room has no leader now; try again"})
		r.forget(p.room) // or its stream is gone
	case err != nil || ack.Error != nil || ack.Stream != bus.RoomStream(p.room.id) || ack.Seq == 0:
		r.metrics.refused.WithLabelValues("not_stored").Inc()
		r.log.Warn("a message is not stored", "room", p.room.id, "answer", string(m.Data[:min(len(m.Data), 200)]))
		r.reply(p.reply, bus.Recorded{Code: bus.Unavailable, Detail: "not stored; try again"})
	default:
		r.metrics.recorded.Inc()
		if ack.Duplicate {
			r.metrics.duplicates.Inc()
		}
		r.metrics.took.Observe(r.cfg.Now().Sub(p.begun).Seconds())
		r.reply(p.reply, bus.Recorded{Seq: ack.Seq, Duplicate: ack.Duplicate})
		r.mu.Lock()
		if n := p.room; ack.Seq > n.last {
			n.last, n.tips, n.tip = ack.Seq, 0, r.cfg.Now().Add(tips[0])
		}
		r.mu.Unlock()
	}
}

// forget has a room's stream looked at anew.
func (r *Recorder) forget(n *room) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n.keep = bus.Retention{MaxBytes: -1}
}

// answer tells a sender, in their own inbox or not at all: whatever else they
// name as the reply would be spoken to in our name.
func (r *Recorder) answer(reply string, who bus.UserKey, said bus.Recorded) {
	if bus.OwnInbox(who, reply) || guard.Off(guard.OwnInbox) {
		r.reply(reply, said)
	}
}

func (r *Recorder) reply(to string, said bus.Recorded) {
	if to == "" {
		return
	}
	raw, err := json.Marshal(said)
	if err == nil {
		err = r.nc.Publish(to, raw)
	}
	if err != nil {
		r.log.Debug("a sender is not answered", "err", err)
	}
}

// tips are the times at which members are told how far a room is, after the last
// message that this node has recorded in it: the leader that died with a message
// committed republishes it to nobody, and no later message may show the gap.
var tips = [...]time.Duration{200 * time.Millisecond, time.Second, 5 * time.Second, 20 * time.Second}

func (r *Recorder) ticking(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := r.cfg.Now()
		r.expire(now)
		r.tell(now)
	}
}

// expire gives up what its stream does not answer for. Nobody is told: nobody
// knows.
func (r *Recorder) expire(now time.Time) {
	r.mu.Lock()
	var late []string
	for token, p := range r.pending {
		if now.Sub(p.begun) > storeTimeout {
			late = append(late, token)
		}
	}
	r.mu.Unlock()
	for _, token := range late {
		if p := r.exit(token); p != nil {
			p.hold.Release()
			r.metrics.refused.WithLabelValues("unknown").Inc()
		}
	}
}

func (r *Recorder) tell(now time.Time) {
	r.mu.Lock()
	told := map[bus.RoomID]bus.Tip{}
	for id, n := range r.rooms {
		if n.last == 0 || n.tips == len(tips) || now.Before(n.tip) {
			continue
		}
		told[id] = bus.Tip{Seq: n.last}
		if n.tips++; n.tips < len(tips) {
			n.tip = now.Add(tips[n.tips] - tips[n.tips-1])
		}
	}
	r.mu.Unlock()
	for id, t := range told {
		raw, err := json.Marshal(t)
		if err == nil {
			err = r.nc.Publish(bus.FeedTip(id), raw)
		}
		if err != nil {
			r.log.Debug("members are not told how far a room is", "room", id, "err", err)
		}
	}
}
