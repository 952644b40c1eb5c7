package client

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"

	"unibus.internal/bus"
)

const (
	// attemptTimeout is longer than a recorder waits for its stream: whoever is
	// not told within it will not be.
	attemptTimeout = 3 * time.Second
	// roomWindow is how far one Room runs ahead of its oldest message that is under
	// way: a subscription can hold that much until the oldest has come.
	roomWindow = 256
	firstRetry = 50 * time.Millisecond
	lastRetry  = time.Second
	// denialPatience is for a node that has not heard yet that the user may write.
	denialPatience = 2 * time.Second
	// replies is the first token of the topics under which members answer each
	// other: _re.<requester>.<id>.
	replies = "_re"
	// requestHeader says under which id the sender awaits an answer.
	requestHeader = bus.HeaderPrefix + "Request"
)

// Room is a room as one of its members uses it: see Conn.Room. It is safe for
// concurrent use.
type Room struct {
	conn      *Conn
	id        bus.RoomID
	durable   bool
	encrypted bool
	keys      *roomKeys // of an encrypted room

	session string
	window  chan struct{}

	mu      sync.Mutex
	sent    uint64              // of the session
	undone  map[uint64]struct{} // sent, and neither stored nor given up
	base    uint64              // see undecided; never falls
	decided uint64              // undecided, as of the last that ended: places in window were given back up to it
	asked   map[string]chan Message
	hearing *Hearing // of the answers; nil: nobody has asked yet
}

// Room is a room of the user, durable or not. It asks the API what kind of room
// it is, so DialConfig.API is needed. NotFound if the user is not in it. Every
// call returns the same Room for a room.
func (c *Conn) Room(ctx context.Context, id bus.RoomID) (*Room, error) {
	id, err := bus.ParseRoomID(string(id))
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	r := c.joined[id]
	c.mu.Unlock()
	if r != nil {
		return r, nil
	}
	if c.cfg.API == nil {
		return nil, bus.E(bus.Invalid, "a Room needs DialConfig.API")
	}
	info, err := c.cfg.API.Room(ctx, id)
	if err != nil {
		return nil, err
	}
	encrypted, err := c.cfg.Keys.encrypted(id, info.Encrypted)
	if err != nil {
		return nil, err
	}
	r = &Room{
		conn: c, id: id, durable: info.Durable, encrypted: encrypted, session: nuid.Next(), window: make(chan struct{}, roomWindow),
		undone: map[uint64]struct{}{}, base: 1, decided: 1, asked: map[string]chan Message{},
	}
	if encrypted {
		if c.cfg.Keys == nil {
			return nil, bus.E(bus.Invalid, "room %s is encrypted, and this client holds no keys: see DialConfig.Keys", id)
		}
		r.keys = c.cfg.Keys.of(id)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if known := c.joined[id]; known != nil {
		return known, nil
	}
	c.joined[id] = r
	return r, nil
}

// ID names the room.
func (r *Room) ID() bus.RoomID { return r.id }

// Durable says whether the room stores what is sent.
func (r *Room) Durable() bool { return r.durable }

// Encrypted says whether only members can read what is sent.
func (r *Room) Encrypted() bool { return r.encrypted }

// Outgoing is a message to send.
type Outgoing struct {
	Topic string // one or more tokens: log.n1
	Data  []byte
	// ID names the message among those of this user, if a program wants to repeat
	// it after it was restarted: the room stores it once within two minutes.
	// Empty: a new one.
	ID string
	// Header may hold names that begin with Unibus-, one line of ASCII each.
	Header nats.Header
}

// Publish sends a message and returns when a quorum of nodes has stored it, with
// its sequence; in a room that is not durable, when it is on its way, with 0. It
// repeats what is not answered, under one id, until ctx ends: then the message
// may or may not be stored. Forbidden if the user may not write there.
func (r *Room) Publish(ctx context.Context, topic string, data []byte) (seq uint64, err error) {
	return r.Send(ctx, Outgoing{Topic: topic, Data: data}).Wait(ctx)
}

// Sending is a message on its way.
type Sending struct {
	done chan struct{}
	seq  uint64
	err  error
}

// Wait returns what Publish would, or Unavailable when ctx ends before.
func (s *Sending) Wait(ctx context.Context) (seq uint64, err error) {
	select {
	case <-s.done:
		return s.seq, s.err
	default:
	}
	select {
	case <-s.done:
		return s.seq, s.err
	case <-ctx.Done():
		return 0, notKnown(ctx.Err())
	}
}

// Done is closed when Wait returns at once.
func (s *Sending) Done() <-chan struct{} { return s.done }

func (s *Sending) end(seq uint64, err error) {
	s.seq, s.err = seq, err
	close(s.done)
}

func notKnown(err error) error {
	return bus.E(bus.Unavailable, "not known to be stored: %w", err).WithHint("unibusctl cluster status")
}

// Send begins to send a message, and keeps at it until ctx ends. It waits while
// one of 256 messages before is under way. Different nodes record
// them, so they may be stored in another order; a subscription hears the messages
// of one Room in the order of the calls of Send, whatever befalls the nodes
// meanwhile.
func (r *Room) Send(ctx context.Context, o Outgoing) *Sending {
	s := &Sending{done: make(chan struct{})}
	m, err := r.message(ctx, o)
	if err != nil {
		s.end(0, err)
		return s
	}
	if !r.durable {
		s.end(0, r.conn.publish(ctx, m))
		return s
	}
	select {
	case r.window <- struct{}{}:
	case <-ctx.Done():
		s.end(0, bus.E(bus.Unavailable, "not sent: %w", ctx.Err()))
		return s
	}
	// The lock spans the number and the first attempt, so that messages leave in
	// the order of their numbers.
	r.mu.Lock()
	r.sent++
	n := r.sent
	r.undone[n] = struct{}{}
	m.Header.Set(bus.OrderHeader, place{r.session, n, r.undecided()}.header())
	first := r.conn.ask(m)
	r.mu.Unlock()
	end := func(seq uint64, err error) {
		r.mu.Lock()
		delete(r.undone, n)
		base := r.undecided()
		decided := base - r.decided
		r.decided = base
		r.mu.Unlock()
		for range decided {
			<-r.window
		}
		s.end(seq, err)
	}
	if !r.conn.whileOpen(func() { end(r.keepAt(ctx, m, first)) }) {
		first.forget()
		end(0, bus.E(bus.Unavailable, "the connection is closed"))
	}
	return s
}

// undecided is the lowest number that is neither stored nor given up, or the next
// one; it needs mu.
func (r *Room) undecided() uint64 {
	for ; r.base <= r.sent; r.base++ {
		if _, under := r.undone[r.base]; under {
			break
		}
	}
	return r.base
}

// message is what goes over the wire.
func (r *Room) message(ctx context.Context, o Outgoing) (*nats.Msg, error) {
	topic, err := bus.ParseTopic(o.Topic)
	if err != nil {
		return nil, err
	}
	if o.ID == "" {
		o.ID = nuid.Next()
	} else if _, err := bus.ParseMessageID(o.ID); err != nil {
		return nil, err
	}
	m := nats.NewMsg(bus.RoomSubject(r.id, r.conn.key, topic))
	for name, values := range o.Header {
		if !strings.HasPrefix(name, bus.HeaderPrefix) || len(values) != 1 {
			return nil, bus.E(bus.Invalid, "a header begins with %s and has one value", bus.HeaderPrefix)
		}
		m.Header[name] = values
	}
	m.Header.Set(bus.MessageIDHeader, o.ID)
	m.Data = o.Data
	if r.encrypted {
		m.Data, err = r.keys.seal(ctx, topic, o.Data)
	}
	return m, err
}

// keepAt repeats a message until it is stored, refused, or ctx ends.
func (r *Room) keepAt(ctx context.Context, m *nats.Msg, q *question) (uint64, error) {
	var why error
	wait, begun := firstRetry, time.Now()
	for {
		said, err := q.await(ctx, r.conn)
		switch {
		case err == nil && said.Seq > 0:
			return said.Seq, nil
		case err == nil && said.Code == bus.Forbidden && time.Since(begun) > denialPatience, err == nil && said.Code == bus.Invalid:
			return 0, bus.E(said.Code, "room %s refuses the message: %s", r.id, said.Detail)
		case err == nil:
			why = bus.E(bus.Unavailable, "%s", said.Detail)
		default:
			why = err
		}
		if errors.Is(err, errNotAnswered) && r.conn.mayNotWrite(r.id, begun) {
			return 0, bus.E(bus.Forbidden, "not allowed to write into room %s", r.id)
		}
		if !errors.Is(err, errNotAnswered) { // else it has waited long enough
			select {
			case <-ctx.Done():
			case <-r.conn.life.Done():
			case <-time.After(wait/2 + rand.N(wait)):
			}
			wait = min(2*wait, lastRetry)
		}
		if r.conn.Status() == Revoked {
			return 0, errRevoked(r.conn.key)
		}
		if ctx.Err() != nil || r.conn.life.Err() != nil {
			return 0, notKnown(errors.Join(ctx.Err(), why))
		}
		q = r.conn.ask(m)
	}
}

// mayNotWrite says whether the user is known, since then, not to be a writer in
// a room: a server tells nobody but the log.
func (c *Conn) mayNotWrite(id bus.RoomID, since time.Time) bool {
	poke(c.refresh)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.roomsAt.After(since) {
		return false
	}
	for _, g := range c.rooms {
		if g.Room == id {
			return !g.Role.MayPublish()
		}
	}
	return true
}

// publish sends a message on the line that stands, or waits for one.
func (c *Conn) publish(ctx context.Context, m *nats.Msg) error {
	return c.withLive(ctx, func() error {
		c.publishing.RLock()
		defer c.publishing.RUnlock()
		return c.line().PublishMsg(m)
	})
}

var errNotAnswered = errors.New("no recorder answered in time")

// question is a message that a recorder is to answer.
type question struct {
	answer chan *nats.Msg
	forget func()
	err    error
}

// ask sends a message once, and does not wait.
func (c *Conn) ask(m *nats.Msg) *question {
	c.publishing.RLock()
	defer c.publishing.RUnlock()
	c.mu.Lock()
	l := c.live
	c.mu.Unlock()
	reply, answer, forget := l.answers.expect()
	once := &nats.Msg{Subject: m.Subject, Reply: reply, Header: m.Header, Data: m.Data}
	return &question{answer: answer, forget: forget, err: l.nc.PublishMsg(once)}
}

// await waits for the answer to a question, for as long as there may be one.
func (q *question) await(ctx context.Context, c *Conn) (said bus.Recorded, err error) {
	defer q.forget()
	switch {
	case errors.Is(q.err, nats.ErrMaxPayload):
		return bus.Recorded{Code: bus.Invalid, Detail: "it is larger than the servers take"}, nil
	case q.err != nil:
		return said, q.err
	}
	patience := time.NewTimer(attemptTimeout)
	defer patience.Stop()
	select {
	case m := <-q.answer:
		if len(m.Data) == 0 && m.Header.Get("Status") != "" {
			return said, errors.New("no recorder hears the room now")
		}
		if err := json.Unmarshal(m.Data, &said); err != nil || said.Seq == 0 && said.Code == "" {
			return bus.Recorded{}, errors.New("what the recorder says cannot be read")
		}
		return said, nil
	case <-patience.C:
		return said, errNotAnswered
	case <-c.revoked:
		return said, nats.ErrAuthorization
	case <-c.life.Done():
		return said, nats.ErrConnectionClosed
	case <-ctx.Done():
		return said, ctx.Err()
	}
}

// answers hands what comes into an inbox of a line to who waits for it.
type answers struct {
	prefix string

	mu      sync.Mutex
	waiting map[string]chan *nats.Msg
}

func hearAnswers(nc *nats.Conn) (*answers, error) {
	a := &answers{prefix: nc.NewInbox() + ".", waiting: map[string]chan *nats.Msg{}}
	_, err := nc.Subscribe(a.prefix+"*", func(m *nats.Msg) {
		a.mu.Lock()
		waiting := a.waiting[strings.TrimPrefix(m.Subject, a.prefix)]
		a.mu.Unlock()
		if waiting == nil {
			return
		}
		select {
		case waiting <- m:
		default: // it has one already
		}
	})
	return a, err
}

func (a *answers) expect() (reply string, answer chan *nats.Msg, forget func()) {
	token := nuid.Next()
	answer = make(chan *nats.Msg, 1)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting[token] = answer
	return a.prefix + token, answer, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.waiting, token)
	}
}

// Request sends a message and returns the first answer that a member gives by
// Reply, or Unavailable when ctx ends before. Every member hears both, and every
// member could have answered: Sender says who has.
func (r *Room) Request(ctx context.Context, topic string, data []byte) (Message, error) {
	if err := r.hearReplies(ctx); err != nil {
		return Message{}, err
	}
	id := nuid.Next()
	answer := make(chan Message, 1)
	r.mu.Lock()
	r.asked[id] = answer
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.asked, id)
	}()
	if _, err := r.Send(ctx, Outgoing{Topic: topic, Data: data, Header: nats.Header{requestHeader: {id}}}).Wait(ctx); err != nil {
		return Message{}, err
	}
	select {
	case m := <-answer:
		return m, nil
	case <-ctx.Done():
		return Message{}, bus.E(bus.Unavailable, "nobody in room %s has answered: %w", r.id, ctx.Err())
	}
}

// hearReplies begins to hear the answers to this user, once.
func (r *Room) hearReplies(ctx context.Context) error {
	r.mu.Lock()
	hearing := r.hearing
	r.mu.Unlock()
	if hearing != nil {
		return nil
	}
	mine := replies + "." + r.conn.key.NKey() + "."
	hearing, err := r.Subscribe(ctx, Hear{Topic: mine + "*"}, func(m Message) {
		r.mu.Lock()
		answer := r.asked[strings.TrimPrefix(m.Topic, mine)]
		r.mu.Unlock()
		if answer == nil {
			return
		}
		select {
		case answer <- m:
		default: // somebody was faster
		}
	})
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hearing != nil { // somebody else has begun meanwhile
		go hearing.Unsubscribe()
		return nil
	}
	r.hearing = hearing
	return nil
}

// Asked says whether a message awaits an answer by Reply.
func (m Message) Asked() bool { return m.Header.Get(requestHeader) != "" }

// Reply answers a message that was sent by Request.
func (r *Room) Reply(ctx context.Context, to Message, data []byte) error {
	id := to.Header.Get(requestHeader)
	if to.Room != r.id || id == "" || strings.ContainsRune(id, '.') {
		return bus.E(bus.Invalid, "the message asks for no answer in room %s", r.id)
	}
	_, err := r.Send(ctx, Outgoing{Topic: replies + "." + to.Sender.NKey() + "." + id, Data: data}).Wait(ctx)
	return err
}

// History reads what a durable room has stored: see Client.Messages. Messages of
// an encrypted room that cannot be opened are left out.
func (r *Room) History(ctx context.Context, q MessageQuery) ([]Message, error) {
	stored, _, err := r.conn.cfg.API.Messages(ctx, r.id, q)
	if err != nil {
		return nil, err
	}
	out := make([]Message, 0, len(stored))
	var ears *listener
	if r.encrypted {
		ears = r.keys.listen(false)
	}
	for _, s := range stored {
		m := messageOf(r.id, s)
		if r.encrypted {
			if m.Data, err = ears.open(ctx, m.Sender, m.Topic, m.Data); err != nil {
				continue
			}
		}
		out = append(out, m)
	}
	return out, nil
}

// messageOf is a message as the API gave it.
func messageOf(room bus.RoomID, s bus.StoredMessage) Message {
	m := Message{Room: room, Sender: s.Sender, Topic: s.Topic, Data: s.Data, Header: nats.Header{}, Seq: s.Seq, Time: s.Time}
	for _, h := range s.Headers {
		m.Header[h.Name] = []string{h.Value}
	}
	return m
}

// Members lists who is in the room.
func (r *Room) Members(ctx context.Context) ([]bus.MemberInfo, error) {
	return r.conn.cfg.API.Members(ctx, r.id, false)
}
