package client

import (
	"strings"
	"sync"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
)

// Subscription is what Subscribe returned.
type Subscription struct {
	conn    *Conn
	subject string
	room    bus.RoomID
	handler func(Message)
	raw     func(*nats.Msg) // instead of handler; may be nil
	senders bus.Senders

	next *nats.Subscription // on the line that is taking over; guarded by Conn.mu
	sub  *nats.Subscription // on the live line; guarded by Conn.mu

	mu     sync.Mutex
	coming *nats.Conn          // takes over; nil: no handover
	held   []*nats.Msg         // brought by it, until the old line is empty
	seen   map[string]struct{} // ids that the old line has brought meanwhile
	turns  sync.Mutex          // one handler at a time
	ended  bool
}

// Subscribe hears a room without durability from now on: every message that is published into it,
// the user's own too. The handler is called with one message at a time and must
// not keep it waiting for long: a server closes the connection of who does not
// take what it sends. A subscription follows the connection wherever it goes; in
// a room that is the user's no more, it is silent, and when the user is let in
// again it is not.
func (c *Conn) Subscribe(room bus.RoomID, handler func(Message)) (*Subscription, error) {
	room, err := bus.ParseRoomID(string(room))
	if err != nil {
		return nil, err
	}
	return c.subscribe(&Subscription{conn: c, subject: bus.RoomSubscribe(room), room: room, handler: handler})
}

func (c *Conn) subscribe(s *Subscription) (*Subscription, error) {
	var err error
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status == Closed {
		return nil, bus.E(bus.Unavailable, "the connection is closed")
	}
	if c.status == Revoked {
		return nil, errRevoked(c.key)
	}
	if s.sub, err = s.on(c.live.nc); err != nil {
		return nil, bus.E(bus.Unavailable, "not subscribed: %w", err)
	}
	c.subs[s] = struct{}{}
	return s, nil
}

// Unsubscribe ends a subscription. Its handler may be called once more while
// this returns.
func (s *Subscription) Unsubscribe() {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	delete(s.conn.subs, s)
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	for _, sub := range []*nats.Subscription{s.sub, s.next} {
		if sub != nil {
			_ = sub.Unsubscribe() // its line may be gone
		}
	}
}

// prepare subscribes on the line that takes over; it needs Conn.mu.
func (s *Subscription) prepare(nc *nats.Conn) (err error) {
	s.mu.Lock()
	s.coming, s.seen, s.held = nc, map[string]struct{}{}, nil
	s.mu.Unlock()
	s.next, err = s.on(nc)
	return err
}

func (s *Subscription) on(nc *nats.Conn) (*nats.Subscription, error) {
	return nc.Subscribe(s.subject, func(m *nats.Msg) { s.take(m, nc) })
}

// emptied is closed when the line that has it now has handed everything on. It
// needs Conn.mu.
func (s *Subscription) emptied() <-chan struct{} {
	done := make(chan struct{})
	s.sub.SetClosedHandler(func(string) { close(done) })
	return done
}

// abandon stays where it is; it needs Conn.mu.
func (s *Subscription) abandon() {
	s.next = nil
	s.mu.Lock()
	s.coming, s.seen, s.held = nil, nil, nil
	s.mu.Unlock()
}

// settle hands on what has waited: the old line is empty.
func (s *Subscription) settle() {
	s.turns.Lock()
	defer s.turns.Unlock()
	s.mu.Lock()
	held, seen := s.held, s.seen
	s.coming, s.held, s.seen = nil, nil, nil
	s.mu.Unlock()
	for _, m := range held { // whatever comes next waits for these
		if _, twice := seen[m.Header.Get(messageID)]; !twice {
			s.hand(m)
		}
	}
}

// take takes a message from a line.
func (s *Subscription) take(m *nats.Msg, nc *nats.Conn) {
	s.mu.Lock()
	if s.seen != nil {
		if nc == s.coming {
			s.held = append(s.held, m)
			s.mu.Unlock()
			return
		}
		if id := m.Header.Get(messageID); id != "" {
			s.seen[id] = struct{}{}
		}
	}
	s.mu.Unlock()
	s.turns.Lock()
	defer s.turns.Unlock()
	s.hand(m)
}

// hand calls the handler, with what is a message of a room and nothing else.
func (s *Subscription) hand(m *nats.Msg) {
	s.mu.Lock()
	ended := s.ended
	s.mu.Unlock()
	if s.raw != nil {
		if !ended {
			s.raw(m)
		}
		return
	}
	token := strings.SplitN(m.Subject, ".", 4)
	if ended || len(token) != 4 {
		return
	}
	sender, err := s.senders.Key(token[2])
	if err != nil {
		return
	}
	s.handler(Message{Room: s.room, Sender: sender, Topic: token[3], Data: m.Data, Header: m.Header})
}
