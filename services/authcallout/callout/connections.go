package callout

import (
	"cmp"
	"slices"
	"time"

	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sys"
)

// connections is the live table of account BUS. Servers tell of what opens and
// closes, and lists of theirs correct it: an event may be lost, a killed server
// sends none. It is guarded by its owner.
type connections struct {
	byID    map[connID]*connection
	users   map[string]*session // by the nkey that servers show
	byKey   map[bus.UserKey]*session
	servers map[string]*server // by id: a new one at every start
}

// connID names a connection for ever: a server counts up, and never twice.
type connID struct {
	server *server
	cid    uint64
}

// server is one start of one nats-server.
type server struct {
	id, node string
	silent   bool // its last answer did not come
}

// connection is one open connection. Its rights are those of admitted until it
// ends: a server asks nobody again.
type connection struct {
	id         connID
	of         *session
	start      time.Time // by the server's clock
	host, name string
	admitted   *kv.Access // what its rights were made from; nil if not known
	first      *kv.Access // the same before admitted became what it has at most; nil if it never did
	hinted     *kv.Access // of what its client was last hinted to
	foreign    bool       // another instance admitted it
	unseen     bool       // it began out of our sight: judged by what changed since
	adopted    bool       // a list told of it, and who admitted it may be long gone
	seen       time.Time  // when an event or a list first told of it, by our clock
	kick       *kick      // under way
	unproven   bool       // a kick was not answered
}

// session is what is live of one user.
type session struct {
	nkey   string
	key    bus.UserKey // zero if nkey is none
	open   []*connection
	judged *kv.Access  // what the newest judgement of all of open rested on
	expiry *time.Timer // may be nil
	capped time.Time   // when the cap was last enforced
	queued bool        // for the cap
}

func newConnections() *connections {
	return &connections{
		byID: map[connID]*connection{}, users: map[string]*session{}, byKey: map[bus.UserKey]*session{}, servers: map[string]*server{},
	}
}

// server returns the server of that id, known or new.
func (t *connections) server(id, node []byte) (s *server, known bool) {
	if s = t.servers[string(id)]; s != nil {
		return s, true
	}
	s = &server{id: string(id), node: string(node)}
	t.servers[s.id] = s
	return s, false
}

// add enters a connection. The same one, reported again as somebody else's, has
// authenticated anew: it replaces the old entry.
func (t *connections) add(s *server, e sys.Connection, now time.Time) *connection {
	id := connID{s, e.CID}
	if old := t.byID[id]; old != nil {
		t.remove(old)
	}
	u := t.users[string(e.User)]
	if u == nil {
		u = &session{nkey: string(e.User), key: keyOf(e.User)}
		t.users[u.nkey] = u
		t.byKey[u.key] = u
	}
	c := &connection{id: id, of: u, start: e.Start, host: string(e.Host), name: bounded(e.Name), seen: now}
	t.byID[id] = c
	u.open = append(u.open, c)
	return c
}

// keyOf reads the key that a server shows, for a look into the View: whether it
// is a good one was asked when it was registered.
func keyOf(nkey []byte) (k bus.UserKey) {
	raw, err := nkeys.Decode(nkeys.PrefixByteUser, nkey)
	if err == nil && len(raw) == len(k) {
		copy(k[:], raw)
	}
	return k
}

// bounded keeps what a client chose to call itself short.
func bounded(name []byte) string { return string(name[:min(len(name), 64)]) }

func (t *connections) remove(c *connection) {
	if t.byID[c.id] != c {
		return
	}
	delete(t.byID, c.id)
	u := c.of
	if i := slices.Index(u.open, c); i >= 0 {
		u.open[i] = u.open[len(u.open)-1]
		u.open = u.open[:len(u.open)-1]
	}
	if len(u.open) == 0 {
		delete(t.users, u.nkey)
		if t.byKey[u.key] == u {
			delete(t.byKey, u.key)
		}
		if u.expiry != nil {
			u.expiry.Stop()
		}
	}
}

// excess lists the connections beyond the limit, oldest first: who opens too
// many keeps the newest. Those of silent servers do not count, nobody knows
// whether they exist, nor do those that are being closed.
//
// Several instances that each know only some of the connections still agree:
// whatever one of them closes has that many newer ones beside it.
func (u *session) excess(limit int) []*connection {
	if len(u.open) <= limit {
		return nil
	}
	live := make([]*connection, 0, len(u.open))
	for _, c := range u.open {
		if c.kick == nil && !c.id.server.silent {
			live = append(live, c)
		}
	}
	if len(live) <= limit {
		return nil
	}
	slices.SortFunc(live, func(a, b *connection) int {
		return cmp.Or(a.start.Compare(b.start), cmp.Compare(a.id.server.id, b.id.server.id), cmp.Compare(a.id.cid, b.id.cid))
	})
	return live[:len(live)-limit]
}
