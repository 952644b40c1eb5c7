package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
)

const (
	connectTimeout = 2 * time.Second
	// firstDelay and lastDelay bound the wait between two rounds through all
	// servers; a refusal is met with the same patience as an outage.
	firstDelay = 100 * time.Millisecond
	lastDelay  = 10 * time.Second
	// handoverTimeout bounds each step of a handover but the last, in which
	// handlers work off what the old connection has brought: drainTimeout.
	handoverTimeout = 2 * time.Second
	drainTimeout    = 30 * time.Second
	// hintPause collects what belongs to one change; hintJitter spreads the
	// clients of a room to which many are added at once.
	hintPause  = 20 * time.Millisecond
	hintJitter = 80 * time.Millisecond
)

// DialConfig configures a Conn.
type DialConfig struct {
	URLs     []string    // tls://host:port of each server
	TLS      *tls.Config // what to trust; nil: the system's authorities
	CAFile   string      // what to trust instead, read at each connect; may be empty
	Identity sig.Signer  // who connects
	Name     string      // shown to admins in unibusctl conn list; may be empty

	// API tells which rooms there are; without it Rooms stays empty, and what
	// is allowed shows when it is tried.
	API *Client

	// Keys are needed in encrypted rooms. As an owner who is connected this user
	// then makes the next key of a room whenever somebody goes.
	Keys *Keys

	// Both are told one thing at a time, and may be nil. They must not call
	// Close, which waits for them.
	OnStatus func(Status)          // told of every change
	OnRooms  func([]bus.RoomGrant) // told when Rooms has changed, once the connection can use what is new
	Log      *slog.Logger          // nil: silent
}

// Status is how a Conn stands.
type Status string

// The states of a Conn.
const (
	Connected    Status = "connected"
	Disconnected Status = "disconnected" // trying again; servers or network are away
	Refused      Status = "refused"      // trying again; the servers do not let this identity in
	Revoked      Status = "revoked"      // for good: nothing is tried any more. Only Closed follows
	Closed       Status = "closed"       // by Close
)

// Message is one message of a room. Sender is proven: the servers let nobody
// publish under another's key.
type Message struct {
	Room   bus.RoomID
	Sender bus.UserKey
	Topic  string
	Data   []byte
	Header nats.Header // as the sender wrote it; may be nil

	// Of a durable room: where the message stands in the room's stream, and when
	// it was stored.
	Seq  uint64
	Time time.Time
}

// messageID is the header by which a message that arrives twice while a Conn
// authenticates anew is dropped once.
const messageID = bus.MessageIDHeader

// Conn is a user's connection to the bus: see Dial. It is safe for concurrent
// use. Handlers of one subscription are called one at a time.
type Conn struct {
	cfg  DialConfig
	key  bus.UserKey
	log  *slog.Logger
	life context.Context // ends with Close
	stop context.CancelFunc
	done sync.WaitGroup

	refresh chan struct{} // rooms are to be asked for
	rekey   chan struct{} // a room may need another key
	again   chan struct{} // the connection is to be authenticated anew
	revoked chan struct{} // closed when Status is Revoked

	mu      sync.Mutex
	live    *line
	subs    map[*Subscription]struct{}
	status  Status
	moved   chan struct{} // closed when status changes
	rooms   []bus.RoomGrant
	roomsAt time.Time // when they were asked for
	joined  map[bus.RoomID]*Room
	clear   map[bus.RoomID]struct{} // rooms that nothing remembers as encrypted
	doomed  bool                    // a notice says that the user is revoked
	tell    chan func()             // what the caller is told, in order

	publishing sync.RWMutex // held to publish; locked while a handover flushes
}

// Dial connects to the bus and returns when the connection stands, or with an
// error when ctx ends: Unavailable if no server could be reached, and
// Unauthenticated if they do not let the identity in. The connection then keeps
// itself up until Close. It does not give up over refusals: one constant refusal
// is all that a server says to who is suspended, revoked, unknown or early, and
// whoever is let in again finds the program alive; Status tells. It gives up if
// it hears that its user is revoked, which is final, and is then refused. That is
// heard at best, by who is connected at that moment.
//
// What a user may do is fixed when a connection is made. When it grows, the
// servers hint, and the Conn makes a second connection with the new rights,
// moves its subscriptions there and closes the first: nothing is lost, and what
// arrives by both ways is dropped once, if it was published by a Conn. A message
// of another program that falls into these milliseconds may be seen twice. When
// it shrinks, the servers close the connection, and the Conn is back with what
// is left; what others published meanwhile is missed, as by everybody who is
// not connected.
func Dial(ctx context.Context, cfg DialConfig) (*Conn, error) {
	if cfg.Identity == nil {
		return nil, bus.E(bus.Invalid, "a connection needs an identity")
	}
	if len(cfg.URLs) == 0 {
		return nil, bus.E(bus.Invalid, "a connection needs the address of at least one server")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx)) // it outlives Dial
	c := &Conn{
		cfg: cfg, key: cfg.Identity.Key(), log: cfg.Log, life: run, stop: stop,
		refresh: make(chan struct{}, 1), rekey: make(chan struct{}, 1), again: make(chan struct{}, 1), revoked: make(chan struct{}),
		subs: map[*Subscription]struct{}{}, joined: map[bus.RoomID]*Room{}, moved: make(chan struct{}), tell: make(chan func(), 64), status: Disconnected,
	}
	first, err := c.open(ctx, "")
	if err != nil {
		stop()
		return nil, err
	}
	c.done.Go(func() { c.telling(run) })
	c.mu.Lock()
	c.enter(first)
	c.mu.Unlock()
	c.settled(first)
	c.done.Go(func() { c.renewing(run) })
	c.done.Go(func() { c.asking(run) })
	if cfg.Keys != nil {
		c.done.Go(func() { c.keeping(run) })
	}
	poke(c.refresh)
	return c, nil
}

// line is one connection to a server.
type line struct {
	nc      *nats.Conn
	answers *answers // of recorders
	hinted  bool     // guarded by Conn.mu: there is more to have than it may do
}

// enter makes a line the live one; it needs mu. A hint that came before is not
// repeated by anybody.
func (c *Conn) enter(l *line) {
	c.live = l
	if l.hinted {
		poke(c.again)
	}
}

// settled tells how the line stands that is live now: what befell it before was
// nobody's business.
func (c *Conn) settled(l *line) {
	if l.nc.IsConnected() {
		c.now(Connected)
	} else {
		c.now(Disconnected)
	}
}

// open makes a line, trying all servers until one lets us in or ctx ends. The
// first try is the server before, if there was one: what is published to two
// servers one after the other may arrive in another order.
func (c *Conn) open(ctx context.Context, before string) (_ *line, err error) {
	l := &line{}
	for n := 0; ctx.Err() == nil; n++ {
		urls, opts := slices.Clone(c.cfg.URLs), c.options(l)
		// If it takes nobody, its users spread over the others.
		rand.Shuffle(len(urls), func(i, j int) { urls[i], urls[j] = urls[j], urls[i] })
		if i := slices.Index(urls, before); n == 0 && i >= 0 {
			urls[0], urls[i] = urls[i], urls[0]
			opts = append(opts, nats.DontRandomize())
		}
		var nc *nats.Conn
		nc, err = nats.Connect(strings.Join(urls, ","), opts...)
		if err == nil {
			l.nc = nc
			if l.answers, err = hearAnswers(nc); err == nil {
				_, err = nc.Subscribe(bus.NoticeSubscribe(c.key), c.noticed)
			}
			if err == nil {
				return l, nil
			}
			nc.Close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(delay(n)):
		}
	}
	if errors.Is(err, nats.ErrAuthorization) {
		return nil, bus.E(bus.Unauthenticated, "the servers do not let %s in: %w", c.key, err).WithHint("unibusctl user show %s", c.key)
	}
	return nil, bus.E(bus.Unavailable, "no server can be reached: %w", errors.Join(ctx.Err(), err)).WithHint("unibusctl cluster status")
}

func (c *Conn) options(l *line) []nats.Option {
	opts := []nats.Option{
		nats.Nkey(c.key.NKey(), func(nonce []byte) ([]byte, error) {
			if !bus.ServerNonce(nonce) {
				return nil, bus.E(bus.Forbidden, "what the server wants signed is no nonce: it is not a server to trust")
			}
			return c.cfg.Identity.Sign(nonce)
		}),
		nats.Secure(c.cfg.TLS),
		nats.Name(c.cfg.Name),
		nats.CustomInboxPrefix(bus.InboxPrefix(c.key)),
		nats.Timeout(connectTimeout),
		nats.MaxReconnects(-1),
		nats.IgnoreAuthErrorAbort(), // two refusals would otherwise end it for good
		nats.IgnoreDiscoveredServers(),
		nats.ReconnectBufSize(-1), // nothing is sent later than Publish returns
		nats.CustomReconnectDelay(delay),
		nats.PingInterval(5 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.DrainTimeout(drainTimeout),
		nats.NoCallbacksAfterClientClose(),
		nats.LameDuckModeHandler(func(*nats.Conn) { c.hinted(l) }),
		nats.DisconnectErrHandler(func(*nats.Conn, error) { c.lost(l) }),
		nats.ReconnectHandler(func(*nats.Conn) { c.back(l) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { c.failed(l, err) }),
	}
	if c.cfg.CAFile != "" {
		opts = append(opts, nats.ClientTLSConfig(nil, func() (*x509.CertPool, error) { return bus.Roots(c.cfg.CAFile) }))
	}
	return opts
}

// delay grows with each round through the servers, and differs among clients.
func delay(rounds int) time.Duration {
	d := min(firstDelay<<min(rounds, 10), lastDelay)
	return d/2 + rand.N(d/2+1)
}

func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func (c *Conn) current(l *line) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.live == l
}

// hinted: the servers say that connecting again would be better, since there is
// more to have or since this server is about to stop.
func (c *Conn) hinted(l *line) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l.hinted = true
	if c.live == l {
		poke(c.again)
	}
}

// noticed hears what is told on notice.<U>.>, on whichever line. It is a hint:
// whoever forges one makes us connect or ask once more. Where there may be more
// to have, rooms are asked for when the new connection stands, so that who is
// told of a room can use it.
func (c *Conn) noticed(m *nats.Msg) {
	switch m.Subject {
	case bus.NoticeSubject(c.key, bus.NoticeRevoked):
		c.mu.Lock()
		defer c.mu.Unlock()
		c.doomed = true
	case bus.NoticeSubject(c.key, bus.NoticeAdded), bus.NoticeSubject(c.key, bus.NoticeRole), bus.NoticeSubject(c.key, bus.NoticeReauthenticate):
		poke(c.again)
	case bus.NoticeSubject(c.key, bus.NoticeRekey):
		poke(c.rekey)
	default:
		poke(c.refresh)
	}
}

func (c *Conn) lost(l *line) {
	if c.current(l) {
		c.now(Disconnected)
	}
}

func (c *Conn) back(l *line) {
	if c.current(l) {
		c.mu.Lock()
		c.doomed = false // who is let in was not revoked
		c.mu.Unlock()
		c.now(Connected)
		poke(c.refresh)
	}
}

// failed hears what a server refuses: to let us in, or a subscription in a room
// that is ours no more.
func (c *Conn) failed(l *line, err error) {
	c.log.Warn("the server refuses", "err", err)
	switch {
	case !c.current(l):
	case errors.Is(err, nats.ErrAuthorization), errors.Is(err, nats.ErrAuthExpired), errors.Is(err, nats.ErrAuthRevoked):
		c.refused(l)
	case errors.Is(err, nats.ErrPermissionViolation):
		poke(c.refresh)
	}
}

// refused: a server does not let us in. That alone may be over tomorrow, and a
// notice alone may be forged by who has a key of the services; both mean for good.
func (c *Conn) refused(l *line) {
	c.mu.Lock()
	doomed := c.doomed
	c.mu.Unlock()
	if !doomed {
		c.now(Refused)
		return
	}
	if c.now(Revoked) {
		close(c.revoked)
		l.nc.Close()
	}
}

// now changes the status, and tells; it reports whether there was anything to
// change.
func (c *Conn) now(s Status) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status == s || c.status == Closed || c.status == Revoked && s != Closed {
		return false
	}
	c.status = s
	close(c.moved)
	c.moved = make(chan struct{})
	if c.cfg.OnStatus != nil {
		c.say(func() { c.cfg.OnStatus(s) })
	}
	return true
}

// say leaves something to tell the caller; it needs mu. A caller who does not
// listen misses the oldest.
func (c *Conn) say(f func()) {
	for {
		select {
		case c.tell <- f:
			return
		default:
		}
		select {
		case <-c.tell:
		default:
		}
	}
}

func (c *Conn) telling(ctx context.Context) {
	for {
		select {
		case f := <-c.tell:
			f()
		case <-ctx.Done():
			for { // that it is closed, at least
				select {
				case f := <-c.tell:
					f()
				default:
					return
				}
			}
		}
	}
}

// Status is how the connection stands now.
func (c *Conn) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status
}

// Key is whose connection this is.
func (c *Conn) Key() bus.UserKey { return c.key }

// renewing authenticates anew whenever the servers hint.
func (c *Conn) renewing(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.revoked:
			return
		case <-c.again:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(hintPause + rand.N(hintJitter)):
		}
		select { // what was hinted until now, the new connection will have
		case <-c.again:
		default:
		}
		if err := c.handOver(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn("not authenticated anew; the old connection stays", "err", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(firstDelay):
				poke(c.again)
			}
		}
	}
}

// handOver moves everything from one connection to a new one. Messages that the
// new one brings wait until the old one is empty, so that none is seen out of
// order, and those that the old one brought too are dropped.
func (c *Conn) handOver(ctx context.Context) error {
	opening, cancel := context.WithTimeout(ctx, handoverTimeout)
	defer cancel()
	c.mu.Lock()
	old := c.live
	c.mu.Unlock()
	next, err := c.open(opening, old.nc.ConnectedUrl())
	if err != nil {
		return err
	}
	c.mu.Lock()
	for s := range c.subs {
		if err = s.prepare(next.nc); err != nil {
			break
		}
	}
	c.mu.Unlock()
	if err == nil {
		err = next.nc.FlushWithContext(opening) // the servers have all subscriptions now
	}
	if err != nil {
		next.nc.Close() // first: what it brings is not to be handed on beside the old one's
		c.mu.Lock()
		for s := range c.subs {
			s.abandon()
		}
		c.mu.Unlock()
		return err
	}
	// What was published goes out by the old connection before anything does by
	// the new one.
	c.publishing.Lock()
	_ = old.nc.FlushTimeout(handoverTimeout) // it may be gone: then nothing of it is left to order
	c.mu.Lock()
	c.enter(next)
	for s := range c.subs { // made since
		if s.next == nil {
			if err := s.prepare(next.nc); err != nil {
				c.log.Warn("a subscription is not moved", "err", err)
			}
		}
	}
	c.mu.Unlock()
	c.publishing.Unlock()
	c.settled(next)
	_ = next.nc.FlushTimeout(handoverTimeout)
	c.mu.Lock()
	var moved []*Subscription
	var emptied []<-chan struct{}
	for s := range c.subs {
		if s.next == nil { // made on the new connection already
			continue
		}
		moved, emptied = append(moved, s), append(emptied, s.emptied())
		s.sub, s.next = s.next, nil
	}
	c.mu.Unlock()
	c.drain(ctx.Done(), old)
	late := time.After(handoverTimeout)
	for i, s := range moved {
		select { // a connection that is drained may still be in its last handler
		case <-emptied[i]:
		case <-late:
		}
		s.settle()
	}
	poke(c.refresh)
	return nil
}

// drain empties a connection and closes it: when all that it has brought is
// handed on, or handoverTimeout after it is to hurry.
func (c *Conn) drain(hurry <-chan struct{}, l *line) {
	closed := l.nc.StatusChanged(nats.CLOSED)
	if err := l.nc.Drain(); err != nil { // not connected: nothing is under way
		l.nc.Close()
		return
	}
	select {
	case <-closed:
		return
	case <-time.After(drainTimeout + time.Second): // nats.go closes it by then
	case <-hurry:
		select {
		case <-closed:
			return
		case <-time.After(handoverTimeout):
		}
	}
	l.nc.Close()
}

// asking keeps Rooms true.
func (c *Conn) asking(ctx context.Context) {
	for n := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-c.revoked:
			return
		case <-c.refresh:
		}
		if c.cfg.API == nil {
			continue
		}
		asked := time.Now()
		me, err := c.cfg.API.Me(ctx)
		if err != nil {
			c.log.Debug("rooms are not known anew", "err", err)
			n++
			select {
			case <-ctx.Done():
				return
			case <-time.After(delay(n)):
				poke(c.refresh)
			}
			continue
		}
		n = 0
		c.mu.Lock()
		changed := !slices.Equal(c.rooms, me.Rooms)
		c.roomsAt = asked
		if changed {
			poke(c.rekey)
		}
		if c.rooms = me.Rooms; changed && c.cfg.OnRooms != nil {
			rooms := slices.Clone(me.Rooms)
			c.say(func() { c.cfg.OnRooms(rooms) })
		}
		c.mu.Unlock()
	}
}

// Rooms lists the rooms the user is in, by id, as last heard of.
func (c *Conn) Rooms() []bus.RoomGrant {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.rooms)
}

// Publish sends a message into a room. While no server can be reached it waits,
// until ctx ends: then nothing was sent. A message that was sent when a
// connection breaks may be lost, and so is one into a room that is not the
// user's to write to: a server tells nobody but the log. Flush waits for the
// server to have taken what was published.
func (c *Conn) Publish(ctx context.Context, room bus.RoomID, topic string, data []byte) error {
	topic, err := bus.ParseTopic(topic)
	if err == nil {
		room, err = bus.ParseRoomID(string(room))
	}
	if err != nil {
		return err
	}
	if slices.ContainsFunc(c.Rooms(), func(g bus.RoomGrant) bool { return g.Room == room && g.Encrypted }) {
		return bus.E(bus.Invalid, "room %s is encrypted: publish by Conn.Room", room)
	}
	if err := c.inTheClear(room); err != nil {
		return err
	}
	m := nats.NewMsg(bus.RoomSubject(room, c.key, topic))
	m.Data = data
	m.Header.Set(messageID, nuid.Next())
	return c.publish(ctx, m)
}

// inTheClear refuses a room that is remembered as encrypted, whatever the servers
// say now. A room that is not is looked up once.
func (c *Conn) inTheClear(room bus.RoomID) error {
	c.mu.Lock()
	_, looked := c.clear[room]
	c.mu.Unlock()
	if looked {
		return nil
	}
	if _, err := c.cfg.Keys.encrypted(room, false); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.clear == nil {
		c.clear = map[bus.RoomID]struct{}{}
	}
	c.clear[room] = struct{}{}
	return nil
}

// Flush returns when a server has taken everything published before.
func (c *Conn) Flush(ctx context.Context) error {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
	}
	return c.withLive(ctx, func() error { return c.line().FlushWithContext(ctx) })
}

func errRevoked(k bus.UserKey) error {
	return bus.E(bus.Unauthenticated, "%s is revoked, for good", k).WithHint("unibusctl user show %s", k)
}

// line is the connection that stands.
func (c *Conn) line() *nats.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.live.nc
}

// withLive does something with the connection that stands, and waits for one.
func (c *Conn) withLive(ctx context.Context, do func() error) error {
	for {
		c.mu.Lock()
		moved, status := c.moved, c.status
		c.mu.Unlock()
		err := do()
		switch {
		case err == nil:
			return nil
		case status == Closed:
			return bus.E(bus.Unavailable, "the connection is closed")
		case status == Revoked:
			return errRevoked(c.key)
		case ctx.Err() != nil:
			return bus.E(bus.Unavailable, "no server can be reached: %w", errors.Join(ctx.Err(), err)).WithHint("unibusctl cluster status")
		case errors.Is(err, nats.ErrMaxPayload):
			return bus.E(bus.Invalid, "the message is larger than the servers take: %w", err)
		case !errors.Is(err, nats.ErrReconnectBufExceeded) && !errors.Is(err, nats.ErrConnectionClosed) && !errors.Is(err, nats.ErrDisconnected) && !errors.Is(err, nats.ErrConnectionReconnecting) && !errors.Is(err, nats.ErrStaleConnection):
			return bus.E(bus.Internal, "%w", err)
		}
		select {
		case <-ctx.Done():
		case <-moved:
		case <-time.After(firstDelay): // the status may be behind
		}
	}
}

// Close ends all subscriptions and the connection. What was published before is
// sent, handlers work on for 2 s at most on what has come, and the one under way
// is waited for: do not call it from a handler.
func (c *Conn) Close() {
	c.now(Closed)
	c.stop()
	c.done.Wait()
	c.mu.Lock()
	l := c.live
	for s := range c.subs {
		s.abandon()
	}
	c.mu.Unlock()
	hurry := make(chan struct{})
	close(hurry)
	c.drain(hurry, l)
}

// movement is how the connection stands, and a channel that is closed when that
// changes.
func (c *Conn) movement() (moved <-chan struct{}, connected bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.moved, c.status == Connected
}

// whileOpen runs something that Close waits for, unless the connection is closed
// already.
func (c *Conn) whileOpen(f func()) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status == Closed {
		return false
	}
	c.done.Go(f)
	return true
}
