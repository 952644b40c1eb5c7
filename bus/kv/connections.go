package kv

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"

	"unibus.internal/bus"
	"unibus.internal/bus/sys"
)

// ConnectionQuery selects connections; what is empty selects all.
type ConnectionQuery struct {
	User bus.UserKey
	Room bus.RoomID // of who is in that room now
	Node string
	CID  uint64
}

func (q ConnectionQuery) selects(v *View, node string, k bus.UserKey, cid uint64) bool {
	if q.User != (bus.UserKey{}) && k != q.User || q.Node != "" && node != q.Node || q.CID != 0 && cid != q.CID {
		return false
	}
	if q.Room == "" {
		return true
	}
	m, _, ok := v.Membership(q.Room, k)
	return ok && m.Status == bus.Present
}

// lists asks the servers for the connections of account BUS: all of them, or the
// one of a node, whatever the others are doing.
func (s *Store) lists(ctx context.Context, user bus.UserKey, node string) (sys.Lists, error) {
	nodes, err := s.nodes(ctx, false)
	if err != nil {
		return sys.Lists{}, err
	}
	if slices.Contains(nodes, node) { // else whether there is such a server is to be seen from who answers
		nodes = []string{node}
	}
	name := ""
	if user != (bus.UserKey{}) {
		name = user.NKey()
	}
	asking, cancel := context.WithTimeout(ctx, sweepPatience)
	defer cancel()
	lists := sys.List(asking, s.view.cfg.Conn, nodes, name, s.now)
	if len(lists.Missing) > 0 { // one may have been given up meanwhile
		if now, err := s.nodes(ctx, true); err == nil {
			lists.Missing = slices.DeleteFunc(lists.Missing, func(n string) bool { return !slices.Contains(now, n) })
		}
	}
	if node == "" {
		return lists, nil
	}
	maps.DeleteFunc(lists.Whole, func(_ string, l *sys.Listing) bool { return l.Node != node })
	if len(lists.Whole) == 0 && !slices.Contains(lists.Missing, node) {
		// Of a name that is misspelt, no connections would read like a proof that
		// there are none.
		return sys.Lists{}, bus.E(bus.NotFound, "no server %s", node).WithHint("unibusctl cluster status")
	}
	lists.Missing = slices.DeleteFunc(lists.Missing, func(n string) bool { return n != node })
	return lists, nil
}

// KickDetail is what the audit says was to be closed; empty: all.
func KickDetail(node string, cid uint64) string {
	if cid == 0 {
		return node
	}
	return fmt.Sprintf("%s/%d", node, cid)
}

// Connections lists who is connected to the bus now, by node and connection
// number, which are given once: whoever stays is found at the same place. A
// server that does not answer in two seconds is Missing; that is no zero. Of one
// node only its own server is asked.
// Connections of the servers' own users in account BUS are left out.
func (s *Store) Connections(ctx context.Context, q ConnectionQuery) (bus.ConnectionList, error) {
	lists, err := s.lists(ctx, q.User, q.Node)
	if err != nil {
		return bus.ConnectionList{}, err
	}
	out := bus.ConnectionList{Connections: []bus.ConnectionInfo{}, Missing: lists.Missing}
	if out.Missing == nil {
		out.Missing = []string{}
	}
	out.Servers = fmt.Sprintf("%d/%d", len(lists.Whole), len(lists.Whole)+len(lists.Missing))
	for _, l := range lists.Whole {
		for _, c := range l.Rows {
			k, err := bus.ParseUserKey(string(c.User))
			if err != nil || !q.selects(s.view, l.Node, k, c.CID) {
				continue
			}
			u, _, known := s.view.User(k)
			if !known && q.User == (bus.UserKey{}) {
				continue // a service, or a stranger whom the authcallouts close by themselves
			}
			t := c.Traffic()
			out.Connections = append(out.Connections, bus.ConnectionInfo{
				Server: l.Node, CID: c.CID, SignPub: k, NKey: k.NKey(), Handle: u.Handle,
				Address: net.JoinHostPort(string(c.Host), strconv.Itoa(t.Port)), Since: c.Start.UTC(), LastActivity: t.LastActivity.UTC(),
				Name: called(string(c.Name)), Lang: called(t.Lang), Version: called(t.Version), Subscriptions: t.Subs,
				InMsgs: t.InMsgs, OutMsgs: t.OutMsgs, InBytes: t.InBytes, OutBytes: t.OutBytes, PendingBytes: t.Pending,
			})
		}
	}
	slices.SortFunc(out.Connections, func(a, b bus.ConnectionInfo) int {
		return cmp.Or(cmp.Compare(a.Server, b.Server), cmp.Compare(a.CID, b.CID))
	})
	return out, nil
}

// called keeps what a client says of itself short.
func called(s string) string { return strings.ToValidUTF8(s[:min(len(s), 64)], "") }

// ConnectionCursor names the place of a connection in the list.
func ConnectionCursor(c bus.ConnectionInfo) string { return fmt.Sprintf("%s/%d", c.Server, c.CID) }

// ParseConnectionCursor reads what ConnectionCursor made.
func ParseConnectionCursor(s string) (after func(bus.ConnectionInfo) bool, err error) {
	node, number, ok := strings.Cut(s, "/")
	cid, err := strconv.ParseUint(number, 10, 64)
	if !ok || err != nil {
		return nil, bus.E(bus.Invalid, "%q is no place in a list of connections", s)
	}
	return func(c bus.ConnectionInfo) bool {
		return cmp.Or(cmp.Compare(c.Server, node), cmp.Compare(c.CID, cid)) > 0
	}, nil
}

// Kick closes connections of a user, who may connect again at once. It needs
// no lease of anybody's: nothing about the user's access changes.
func (s *Store) Kick(ctx context.Context, q ConnectionQuery) (Result, error) {
	started := s.now()
	if err := s.allowed(); err != nil {
		return Result{}, err
	}
	u, revision, ok := s.view.User(q.User)
	if !ok {
		return Result{}, s.noUser(q.User)
	}
	lists, err := s.lists(ctx, q.User, q.Node)
	if err != nil {
		return Result{}, err
	}
	res := Result{Revision: revision, Swept: &Swept{}}
	s.close(ctx, &res, lists, func(node string, c sys.Connection) bool {
		return string(c.User) == q.User.NKey() && q.selects(s.view, node, q.User, c.CID)
	})
	res.What, res.Elapsed = fmt.Sprintf("closed %d of %s", res.Closed, u.Handle), s.now().Sub(started)
	return res, nil
}

// close has the servers close what must go, and says of each whether that is
// done.
func (s *Store) close(ctx context.Context, res *Result, lists sys.Lists, must func(node string, c sys.Connection) bool) {
	kicking, cancel := context.WithTimeout(ctx, sweepPatience)
	defer cancel()
	var closing sync.WaitGroup
	var mu sync.Mutex
	places := make(chan struct{}, kicksAtOnce)
	w := res.Swept
	w.Missing = append(w.Missing, lists.Missing...)
	for _, l := range lists.Whole {
		w.Answered = append(w.Answered, l.Node)
		for _, c := range l.Rows {
			if !must(l.Node, c) {
				continue
			}
			places <- struct{}{}
			closing.Go(func() {
				defer func() { <-places }()
				out := sys.Kick(kicking, s.view.cfg.Conn, l.Server, c.CID)
				s.log.Info("connection closed", "key", string(c.User), "server", l.Node, "client", c.CID, "result", out)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case out == sys.Closed:
					res.Closed++
				case !out.Proven() && !slices.Contains(w.Missing, l.Node):
					w.Missing = append(w.Missing, l.Node)
				}
			})
		}
	}
	closing.Wait()
	w.Answered = slices.DeleteFunc(w.Answered, func(n string) bool { return slices.Contains(w.Missing, n) })
	slices.Sort(w.Answered)
	slices.Sort(w.Missing)
}
