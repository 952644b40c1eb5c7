package callout

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"unibus.internal/bus/sys"
)

func open(t *connections, server string, cid uint64, user string, start time.Duration) *connection {
	s, _ := t.server([]byte(server), []byte("n-"+server))
	return t.add(s, sys.Connection{CID: cid, User: []byte(user), Start: moment.Add(start)}, moment)
}

func cids(cs []*connection) (out []uint64) {
	for _, c := range cs {
		out = append(out, c.id.cid)
	}
	return out
}

func TestExcessIsTheOldest(t *testing.T) {
	table := newConnections()
	for n, start := range []time.Duration{5, 1, 4, 2, 3} { // in seconds, and not in the order of events
		open(table, fmt.Sprint("N", n%2), uint64(n), "U1", start*time.Second)
	}
	u := table.users["U1"]
	for limit, want := range map[int][]uint64{5: nil, 6: nil, 4: {1}, 3: {1, 3}, 1: {1, 3, 4, 2}} {
		if got := cids(u.excess(limit)); !slices.Equal(got, want) {
			t.Errorf("beyond %d are %v, want %v", limit, got, want)
		}
	}
	table.byID[connID{table.servers["N1"], 1}].kick = &kick{}
	if got := cids(u.excess(3)); !slices.Equal(got, []uint64{3}) {
		t.Errorf("beyond 3 beside one that is being closed are %v, want 3", got)
	}
	table.servers["N1"].silent = true
	if got := cids(u.excess(2)); !slices.Equal(got, []uint64{4}) {
		t.Errorf("beyond 2 of those on servers that answer are %v, want 4", got)
	}
}

// Instances that see connections come in different orders, and act at once,
// close together no more than the excess.
func TestInstancesAgreeOnTheExcess(t *testing.T) {
	const all, limit = 60, 50
	for shift := range all {
		table := newConnections()
		closed := map[uint64]bool{}
		for n := range all {
			cid := uint64((n*7 + shift) % all)
			open(table, "N", cid, "U1", time.Duration(cid)*time.Second)
			for _, c := range table.users["U1"].excess(limit) {
				c.kick, closed[c.id.cid] = &kick{}, true
			}
		}
		for cid := range closed {
			if cid >= all-limit {
				t.Fatalf("order %d closes %d, one of the newest", shift, cid)
			}
		}
		if len(closed) != all-limit {
			t.Fatalf("order %d closes %d, want %d", shift, len(closed), all-limit)
		}
	}
}

func TestTheTableForgetsWhatIsGone(t *testing.T) {
	table := newConnections()
	a, b := open(table, "N1", 1, "U1", 0), open(table, "N1", 2, "U1", 0)
	again := open(table, "N1", 1, "U2", 0) // a second CONNECT as somebody else
	table.remove(a)
	if table.byID[again.id] != again || len(table.users["U1"].open) != 1 || len(table.users["U2"].open) != 1 {
		t.Errorf("the connection is not its new user's: %+v", table.users)
	}
	table.remove(b)
	table.remove(again)
	table.remove(again)
	if len(table.byID)+len(table.users)+len(table.byKey) != 0 {
		t.Errorf("left are %v %v %v", table.byID, table.users, table.byKey)
	}
}
