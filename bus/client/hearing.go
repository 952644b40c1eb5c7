package client

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

const (
	// aheadMessages is what a Hearing keeps while something before it is fetched;
	// what comes beyond is fetched too.
	aheadMessages = 1024
	fetchPage     = 1000
	// lookBack is how far a Hearing reads before its start, to know what came
	// before from who has several messages under way.
	lookBack = 256
	// lookEvery is how often it asks whether it has missed something, if nothing
	// else makes it ask.
	lookEvery    = time.Minute
	fetchTimeout = 10 * time.Second
	// openPatience is how long a message of a durable room waits for its key.
	openPatience = 30 * time.Second
	// disbelief is how often no node may know of a message before a tip about it
	// is taken for false.
	disbelief = 10
)

// Start says from where on a room is heard.
type Start struct {
	seq  uint64
	at   time.Time
	kind startKind
}

type startKind int

const (
	fromNow startKind = iota
	fromStart
	fromSequence
	fromTime
)

// FromNow hears what is stored, or published, from now on.
func FromNow() Start { return Start{} }

// FromStart hears everything that a durable room has.
func FromStart() Start { return Start{kind: fromStart} }

// FromSequence hears a durable room from a message on.
func FromSequence(seq uint64) Start { return Start{seq: max(seq, 1), kind: fromSequence} }

// FromTime hears a durable room from the first message on that was stored then
// or later.
func FromTime(t time.Time) Start { return Start{at: t, kind: fromTime} }

// Hear says what to hear.
type Hear struct {
	From Start // zero: FromNow
	// Topic selects messages: tokens, of which * is any one and > at the end any
	// others. Empty: all but the answers to requests.
	Topic string
	// OnLost is told of messages that the room had and keeps no more, before they
	// could be heard: first to last by sequence. May be nil. It is called as the
	// handler is.
	OnLost func(first, last uint64)
}

// HearingStats counts what became of the messages of a durable room.
type HearingStats struct {
	Heard      uint64 // handed to the handler
	Fetched    uint64 // of the room's messages: not brought by the feed, but by the API
	Duplicates uint64 // dropped: known already
	Reordered  uint64 // held until what their sender sent before had come
	Late       uint64 // handed on out of their sender's order: the others had waited for them in vain
	Lost       uint64 // kept by the room no more
	Unopened   uint64 // of an encrypted room: dropped, for they cannot be opened
}

// Hearing is what Room.Subscribe returned.
type Hearing struct {
	room    *Room
	hear    Hear
	handler func(Message)
	sub     *Subscription
	ears    *listener // of an encrypted room
	senders bus.Senders

	stop context.CancelFunc
	done chan struct{}

	feed chan Message
	tips chan uint64

	mu     sync.Mutex
	heard  HearingStats // what hand counts
	pieced HearingStats // what the assembly counts
}

// Subscribe hears a room. The handler is called with one message at a time.
//
// A durable room is heard without gaps, duplicates or disorder, from the start
// on that is asked for until Unsubscribe: the sequences of its feed show what is
// missing, and it is fetched from the API. The messages of one sender come in the
// order in which their Room sent them. While a handler works, or no node can be
// reached, messages wait in the room. In a room that is the user's no more,
// nothing comes; when they are let in again, it goes on where it was.
//
// A room that is not durable is heard as by Conn.Subscribe, from now on.
//
// ctx bounds the call, not the subscription.
func (r *Room) Subscribe(ctx context.Context, hear Hear, handler func(Message)) (*Hearing, error) {
	if err := parseFilter(hear.Topic); err != nil {
		return nil, err
	}
	run, stop := context.WithCancel(r.conn.life) // it outlives the call
	h := &Hearing{room: r, hear: hear, handler: handler, stop: stop, done: make(chan struct{}), feed: make(chan Message, aheadMessages), tips: make(chan uint64, 1)}
	if r.encrypted {
		h.ears = r.keys.listen(!r.durable)
		h.ears.partial = hear.Topic != "" && hear.Topic != ">"
	}
	var err error
	if !r.durable {
		if hear.From.kind != fromNow {
			err = bus.E(bus.Invalid, "room %s is not durable: it has nothing from before", r.id)
		} else {
			h.sub, err = r.conn.Subscribe(r.id, func(m Message) { h.hand(run, m) })
		}
		close(h.done)
		if err != nil {
			stop()
			return nil, err
		}
		return h, nil
	}
	h.sub, err = r.conn.subscribe(&Subscription{conn: r.conn, subject: bus.FeedSubscribe(r.id), room: r.id, raw: h.take})
	if err == nil {
		err = r.conn.Flush(ctx) // from here on the feed has everything
	}
	var a *assembly
	if err == nil {
		a, err = h.begin(ctx, run)
	}
	if err != nil {
		stop()
		close(h.done)
		h.Unsubscribe()
		return nil, err
	}
	if !r.conn.whileOpen(func() { h.run(run, a) }) {
		stop()
		close(h.done)
		return nil, bus.E(bus.Unavailable, "the connection is closed")
	}
	return h, nil
}

// Unsubscribe ends the hearing. It waits for the handler that is under way: do
// not call it from there.
func (h *Hearing) Unsubscribe() {
	h.stop()
	if h.sub != nil {
		h.sub.Unsubscribe()
	}
	<-h.done
}

// Stats counts so far.
func (h *Hearing) Stats() HearingStats {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.pieced
	s.Heard, s.Unopened = h.heard.Heard, h.heard.Unopened
	return s
}

// take takes what the feed brings. It never waits: what does not fit is fetched
// when its turn comes.
func (h *Hearing) take(m *nats.Msg) {
	if m.Subject == bus.FeedTip(h.room.id) {
		var tip bus.Tip
		if json.Unmarshal(m.Data, &tip) == nil {
			h.tip(tip.Seq)
		}
		return
	}
	_, sender, topic, err := h.senders.ParseRoomSubject(m.Subject)
	seq, err2 := strconv.ParseUint(m.Header.Get(bus.SequenceHeader), 10, 64)
	at, err3 := time.Parse(time.RFC3339Nano, m.Header.Get(bus.TimeHeader))
	if err != nil || err2 != nil || err3 != nil || seq == 0 {
		return // nothing that a recorder stored
	}
	out := Message{Room: h.room.id, Sender: sender, Topic: topic, Data: m.Data, Header: m.Header, Seq: seq, Time: at.UTC()}
	select {
	case h.feed <- out:
	default:
		h.tip(seq)
	}
}

func (h *Hearing) tip(seq uint64) {
	for {
		select {
		case h.tips <- seq:
			return
		case known := <-h.tips:
			seq = max(seq, known)
		}
	}
}

// assembly is the stream of a room as it comes together. It belongs to one
// goroutine.
type assembly struct {
	h     *Hearing
	ctx   context.Context
	order *order
	next  uint64             // the sequence that comes next
	known uint64             // there is at least one so high
	ahead map[uint64]Message // beyond next
	stats HearingStats
}

// begin finds where to start, and looks at what was there just before.
func (h *Hearing) begin(ctx, run context.Context) (*assembly, error) {
	a := &assembly{h: h, ctx: run, ahead: map[uint64]Message{}}
	a.order = newOrder(func(m Message) { h.hand(run, m) }, &a.stats)
	api, room, from := h.room.conn.cfg.API, h.room.id, h.hear.From
	if from.kind == fromTime {
		page, _, err := api.Messages(ctx, room, MessageQuery{Since: from.at, Limit: 1})
		switch {
		case err != nil:
			return nil, err
		case len(page) > 0:
			from = FromSequence(page[0].Seq)
		default:
			from = FromNow()
		}
	}
	switch from.kind {
	case fromStart:
		a.next = 1
		page, _, err := api.Messages(ctx, room, MessageQuery{Limit: 1})
		if err != nil {
			return nil, err
		}
		if len(page) > 0 {
			a.next = page[0].Seq // what was before is not asked for
		}
	case fromSequence:
		page, _, err := api.Messages(ctx, room, MessageQuery{After: from.seq - 1 - min(from.seq-1, lookBack), Limit: lookBack})
		if err != nil {
			return nil, err
		}
		a.next = from.seq
		a.look(page)
	default:
		page, last, err := api.Messages(ctx, room, MessageQuery{Newest: true, Limit: lookBack})
		if err != nil {
			return nil, err
		}
		a.next = last + 1
		a.look(page)
	}
	a.known = a.next - 1
	return a, nil
}

func (a *assembly) look(page []bus.StoredMessage) {
	for _, s := range page {
		if s.Seq < a.next {
			a.order.saw(messageOf(a.h.room.id, s))
		}
	}
}

// run brings the feed and what it leaves out together.
func (h *Hearing) run(ctx context.Context, a *assembly) {
	defer close(h.done)
	var again <-chan time.Time // when to fetch after a failure
	failures, doubted := 0, uint64(0)
	want := h.hear.From.kind != fromNow // ask at once: there may be messages from before
	for {
		moved, connected := h.room.conn.movement()
		a.drain()
		if (want || a.missing()) && again == nil && !guard.Off(guard.FeedRepair) {
			complete, err := a.fetch(want, &doubted)
			switch {
			case ctx.Err() != nil:
				return
			case err == nil && !complete && len(a.ahead) == 0 && failures > disbelief:
				a.known, want, failures = a.next-1, false, 0
			case err != nil || !complete:
				failures++
				most := 4
				if err != nil && bus.CodeOf(err) != bus.Unavailable { // not the user's room now: each question is a denial on record
					most = 10
				}
				again = time.After(delay(min(failures, most)))
			default:
				want, failures = false, 0
			}
		}
		held := a.expire()
		h.mu.Lock()
		h.pieced = a.stats
		h.mu.Unlock()
		look := time.NewTimer(lookEvery/2 + rand.N(lookEvery))
		select {
		case <-ctx.Done():
			look.Stop()
			return
		case m := <-h.feed:
			a.feed(m)
		case seq := <-h.tips:
			a.known = max(a.known, seq)
		case <-moved:
			_, now := h.room.conn.movement()
			want = want || now && !connected // what came meanwhile may be all there is
		case <-again:
			again = nil
		case <-look.C:
			want = true
		case <-held:
		}
		look.Stop()
	}
}

// missing says whether there is something that has not come.
func (a *assembly) missing() bool { return a.known >= a.next || len(a.ahead) > 0 }

// drain takes all that has come by now: neither a tip that has overtaken the
// messages it is about, nor what came while others were fetched, is a reason to
// ask. Who listens to a busy room would else never hear it by the feed again.
func (a *assembly) drain() {
	for range len(a.h.feed) { // nobody else takes from it
		a.feed(<-a.h.feed)
	}
	select {
	case seq := <-a.h.tips:
		a.known = max(a.known, seq)
	default:
	}
}

// feed takes what the feed has brought.
func (a *assembly) feed(m Message) {
	switch {
	case m.Seq < a.next:
		a.stats.Duplicates++
	case m.Seq == a.next:
		a.deliver(m)
		a.catchUp()
	case guard.Off(guard.FeedRepair):
		a.next = m.Seq
		a.deliver(m)
	case len(a.ahead) < aheadMessages:
		a.ahead[m.Seq] = m
		fallthrough
	default:
		a.known = max(a.known, m.Seq)
	}
}

func (a *assembly) catchUp() {
	for {
		m, ok := a.ahead[a.next]
		if !ok {
			return
		}
		delete(a.ahead, a.next)
		a.deliver(m)
	}
}

func (a *assembly) deliver(m Message) {
	a.next = m.Seq + 1
	a.order.take(m, time.Now())
}

// expire hands on what has waited long enough for others of its sender.
func (a *assembly) expire() <-chan time.Time {
	now := time.Now()
	if at := a.order.expire(now); !at.IsZero() {
		return time.After(at.Sub(now))
	}
	return nil
}

// fetch asks the API for what has not come, until nothing more is known to be
// missing, or, if all is asked for, until there is nothing more. Doubted is a
// sequence that a node has left out once: another may have it, so it counts as
// lost the second time only.
func (a *assembly) fetch(all bool, doubted *uint64) (complete bool, err error) {
	for {
		ctx, cancel := context.WithTimeout(a.ctx, fetchTimeout)
		page, _, err := a.h.room.conn.cfg.API.Messages(ctx, a.h.room.id, MessageQuery{After: a.next - 1, Limit: fetchPage})
		cancel()
		if err != nil {
			return false, err
		}
		if len(page) == 0 {
			return !a.missing(), nil
		}
		for _, s := range page {
			if s.Seq < a.next {
				continue
			}
			if _, came := a.ahead[a.next]; came {
				a.catchUp()
			}
			if s.Seq < a.next {
				continue
			}
			if s.Seq > a.next {
				if *doubted != a.next {
					*doubted = a.next
					return false, nil
				}
				a.lost(a.next, s.Seq-1)
			}
			delete(a.ahead, s.Seq)
			a.stats.Fetched++
			a.deliver(messageOf(a.h.room.id, s))
			if a.ctx.Err() != nil {
				return false, a.ctx.Err()
			}
		}
		a.catchUp()
		a.drain()
		a.expire()
		if !all && !a.missing() {
			return true, nil
		}
	}
}

func (a *assembly) lost(first, last uint64) {
	a.stats.Lost += last - first + 1
	for seq := range a.ahead {
		if seq <= last {
			delete(a.ahead, seq)
		}
	}
	a.next = last + 1
	if a.h.hear.OnLost != nil {
		a.h.hear.OnLost(first, last)
	}
}

// hand opens a message and calls the handler, if it is asked for.
func (h *Hearing) hand(ctx context.Context, m Message) {
	if ctx.Err() != nil {
		return
	}
	asked := TopicMatches(h.hear.Topic, m.Topic)
	if !asked && (h.ears == nil || h.ears.partial) {
		return
	}
	r := h.room
	if h.ears != nil { // also what is not asked for: what is missing, all of them together show
		data, err := h.opened(ctx, m)
		if err != nil {
			r.conn.log.Warn("a message cannot be opened", "room", r.id, "sender", m.Sender, "seq", m.Seq, "err", err)
			h.mu.Lock()
			h.heard.Unopened++
			h.mu.Unlock()
			return
		}
		m.Data = data
	}
	if !asked {
		return
	}
	h.mu.Lock()
	h.heard.Heard++
	h.mu.Unlock()
	h.handler(m)
}

// opened decrypts a message. While no node tells what there is to know about its
// key, what a durable room has waits.
func (h *Hearing) opened(ctx context.Context, m Message) ([]byte, error) {
	for n, end := 0, time.Now().Add(openPatience); ; n++ {
		data, err := h.ears.open(ctx, m.Sender, m.Topic, m.Data)
		if bus.CodeOf(err) != bus.Unavailable || !h.room.durable || time.Now().After(end) {
			return data, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(delay(min(n, 4))):
		}
	}
}

// parseFilter checks what selects topics.
func parseFilter(s string) error {
	if s == "" || s == ">" {
		return nil
	}
	plain := strings.TrimSuffix(s, ".>")
	plain = strings.ReplaceAll(plain, "*", "x")
	if _, err := bus.ParseTopic(plain); err != nil {
		return err
	}
	for token := range strings.SplitSeq(s, ".") {
		if token != "*" && strings.ContainsRune(token, '*') {
			return bus.E(bus.Invalid, "in what selects topics, * is a token of its own")
		}
	}
	return nil
}

// TopicMatches says whether what Hear.Topic says selects a topic.
func TopicMatches(filter, topic string) bool {
	if filter == "" {
		return topic != replies && !strings.HasPrefix(topic, replies+".")
	}
	for {
		f, moreF, wide := strings.Cut(filter, ".")
		t, moreT, deep := strings.Cut(topic, ".")
		switch {
		case f == ">":
			return true
		case f != "*" && f != t:
			return false
		case !wide || !deep:
			return wide == deep
		}
		filter, topic = moreF, moreT
	}
}
