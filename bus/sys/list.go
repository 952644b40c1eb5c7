package sys

import (
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// listSubject asks all servers at once (accounts.conf maps it to
	// $SYS.REQ.SERVER.PING.CONNZ).
	listSubject = "sys.connz"
	// UserAccount is the account of the users.
	UserAccount = "BUS"
)

// listRequest is nats-server's ConnzEventOptions as far as we need them.
type listRequest struct {
	Auth       bool   `json:"auth"`
	Account    string `json:"acc"`
	User       string `json:"user,omitempty"`
	Limit      int    `json:"limit"`
	Offset     int    `json:"offset"`
	ServerName string `json:"server_name,omitempty"`
	Exact      bool   `json:"exact_match,omitempty"`
}

func request(nc *nats.Conn, inbox string, r listRequest) error {
	r.Auth, r.Account = true, UserAccount
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return nc.PublishRequest(listSubject, inbox, body)
}

// Lists are the answers of the servers to one question.
type Lists struct {
	Began   time.Time           // before the first server was asked
	Whole   map[string]*Listing // by server id: every page came
	Missing []string            // names of nodes that should have answered in full, and did not
}

// List has every server list the connections of the users, or of one. It waits
// for the nodes named, until ctx ends: one that says nothing is missing, not
// empty. A server that is not named and answers is listed too.
func List(ctx context.Context, nc *nats.Conn, nodes []string, user string, now func() time.Time) Lists {
	out := Lists{Began: now(), Whole: map[string]*Listing{}}
	open := map[string]*Listing{}
	waiting := slices.Clone(nodes)
	slices.Sort(waiting)
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		out.Missing = waiting
		return out
	}
	defer func() { _ = sub.Unsubscribe() }()
	next := func(node string, offset int) error {
		return request(nc, inbox, listRequest{User: user, Limit: pageLimit, Offset: offset, ServerName: node, Exact: node != ""})
	}
	if next("", 0) != nil {
		out.Missing = waiting
		return out
	}
	for len(waiting) > 0 || len(open) > 0 {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil || len(m.Data) == 0 { // no time left, or nobody there
			break
		}
		p, ok := parsePage(m.Data)
		if !ok || p.fault != "" {
			continue
		}
		l := open[p.server]
		if l == nil {
			l = &Listing{Server: p.server, Node: p.node}
			open[p.server] = l
		}
		offset := l.take(p)
		if !l.done {
			if next(l.Node, offset) != nil {
				break
			}
			continue
		}
		delete(open, p.server)
		out.Whole[p.server] = l
		waiting = slices.DeleteFunc(waiting, func(n string) bool { return n == l.Node })
	}
	for _, l := range open {
		if !slices.Contains(waiting, l.Node) {
			waiting = append(waiting, l.Node)
		}
	}
	out.Missing = waiting
	return out
}

// Answers reports whether one of those nodes answers, before ctx ends.
func Answers(ctx context.Context, nc *nats.Conn, nodes []string) bool {
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		return false
	}
	defer func() { _ = sub.Unsubscribe() }()
	for _, n := range nodes {
		if request(nc, inbox, listRequest{Limit: 1, ServerName: n, Exact: true}) != nil {
			return false
		}
	}
	m, err := sub.NextMsgWithContext(ctx)
	return err == nil && len(m.Data) > 0
}

// page is one answer to a CONNZ request.
type page struct {
	server, node string
	offset       int
	rows         []Connection // ascending by cid
	fault        string
}

func parsePage(data []byte) (p page, ok bool) {
	ok = object(data, func(key, value []byte) {
		switch string(key) {
		case "server":
			object(value, func(key, value []byte) {
				switch string(key) {
				case "id":
					p.server = string(text(value))
				case "name":
					p.node = string(text(value))
				}
			})
		case "data":
			object(value, func(key, value []byte) {
				switch string(key) {
				case "offset":
					p.offset, _ = strconv.Atoi(string(value))
				case "connections":
					elements(value, func(value []byte) {
						s := Connection{listed: value}
						object(value, func(key, value []byte) { s.read(key, value) })
						p.rows = append(p.rows, s)
					})
				}
			})
		case "error":
			p.fault = string(value)
		}
	})
	return p, ok && p.server != ""
}

// Listing collects the pages of one server's list, which is sorted by cid. The
// list moves while it is read, so each page overlaps the one before: only if it
// begins at or before the last connection seen is nothing skipped.
type Listing struct {
	Server, Node string // id and name
	Rows         []Connection
	done         bool
	overlap      int
}

const (
	pageLimit   = 1024
	pageOverlap = 32
)

// take adds a page and says at which offset to read on, unless done.
func (l *Listing) take(p page) (next int) {
	switch {
	case p.offset == 0:
		l.Rows, l.overlap = p.rows, pageOverlap
	case len(l.Rows) == 0:
		return 0
	default:
		last := l.Rows[len(l.Rows)-1].CID
		if len(p.rows) == 0 || p.rows[0].CID > last {
			l.overlap *= 2
			next = max(0, p.offset-l.overlap)
			if next == 0 { // start over
				l.Rows = nil
			}
			return next
		}
		l.overlap = pageOverlap
		for _, r := range p.rows {
			if r.CID > last {
				l.Rows = append(l.Rows, r)
			}
		}
	}
	if l.done = len(p.rows) < pageLimit; l.done {
		return 0
	}
	return p.offset + len(p.rows) - pageOverlap
}
