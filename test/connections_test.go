package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// connections asks over the API who is connected, page by page, and closes.
func (a *apiWorld) connections(t *testing.T) {
	p := a.add(t, "connected")
	a.root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "connected", "owner": "connected"})
	cs := a.rawEverywhere(p)
	var page bus.ConnectionList
	var seen []string
	for after := ""; ; after = page.Next {
		a.root.want(t, 200, "GET", "/v1/connections?room=connected&limit=1&after="+after, nil).decode(t, &page)
		for _, c := range page.Connections {
			if c.Handle != "connected" || c.SignPub != p.key || c.NKey != p.key.NKey() || !strings.HasPrefix(c.Address, "127.0.0.1:") || c.Since.IsZero() || c.Lang != "wire" {
				t.Errorf("listed is %+v", c)
			}
			seen = append(seen, c.Server)
		}
		if page.Next == "" {
			break
		}
	}
	if !slices.Equal(seen, []string{"n1", "n2", "n3"}) || page.Servers != "3/3" || len(page.Missing) != 0 {
		t.Errorf("listed are %v, servers %s, missing %v", seen, page.Servers, page.Missing)
	}
	a.root.want(t, 200, "GET", "/v1/users/connected/connections", nil).decode(t, &page)
	if len(page.Connections) != 3 {
		t.Fatalf("of the user: %+v", page)
	}
	for path, want := range map[string]int{
		"/v1/connections?server=n2&user=connected": 200, "/v1/connections?after=x": 400, "/v1/connections?room=nowhere": 404,
		"/v1/connections?user=nobody": 404, "/v1/users/nobody/connections": 404, "/v1/connections?server=N%2F": 400,
		"/v1/connections?server=n9": 404,
	} {
		a.root.want(t, want, "GET", path, nil)
	}
	one := page.Connections[1]
	a.root.want(t, 400, "DELETE", fmt.Sprintf("/v1/users/connected/connections?cid=%d", one.CID), nil)
	for query, want := range map[string]int{"server=n1&cid=0": 400, "server=n1&cid=": 400, "server=": 400, "server=n9": 404} {
		a.root.want(t, want, "DELETE", "/v1/users/connected/connections?"+query, nil) // what is left empty does not stand for all
	}
	wantOpen(t, cs...)
	got := a.root.want(t, 200, "DELETE", fmt.Sprintf("/v1/users/connected/connections?server=%s&cid=%d", one.Server, one.CID), nil).change(t)
	if got.Closed != 1 || got.Servers != "1/1" || !got.Verified { // it is that server's alone to say
		t.Errorf("closing one: %+v", got)
	}
	cluster.WaitFor(t, 10*time.Second, "the audit to name what was closed", func() error {
		want := fmt.Sprintf("%s/%d", one.Server, one.CID)
		var audit struct{ Records []bus.AuditRecord }
		a.root.want(t, 200, "GET", "/v1/audit?action=connection.kick&user=connected", nil).decode(t, &audit)
		for _, r := range audit.Records {
			if r.Kind == bus.AuditOutcome && r.Detail == want && r.Result == "ok" {
				return nil
			}
		}
		return fmt.Errorf("none of %d records says %s", len(audit.Records), want)
	})
	wantClosed(t, cs[1])
	wantOpen(t, cs[0], cs[2])
	if got = a.root.want(t, 200, "DELETE", "/v1/users/connected/connections", nil).change(t); got.Closed != 2 {
		t.Errorf("closing all: %+v", got)
	}
	wantClosed(t, cs...)
	a.root.want(t, 404, "DELETE", "/v1/users/nobody/connections", nil)
	for _, path := range []string{"/v1/connections", "/v1/users/connected/connections"} {
		a.as(p).want(t, 403, "GET", path, nil)
	}
	a.as(p).want(t, 403, "DELETE", "/v1/users/connected/connections", nil)
	a.waitAdmits(p, 1, 2, 3) // nothing was taken away
}

// TestConnections: the list is whole while hundreds or thousands are connected
// and others come and go, over both ways; what one server does not say is
// missing, not empty.
func TestConnections(t *testing.T) {
	t.Parallel()
	total := 300
	if full {
		total = 3000
	}
	w := newWorld(t, cluster.Options{})
	w.adminSeed(w.admin)
	// Those who leave came first, so that each who goes moves all others in the
	// servers' lists; in the full form these have more rows than one page holds.
	var leaving []*wire.Conn
	for n := range total / 90 {
		p := w.addUser(fmt.Sprintf("leaving-%d", n))
		for range 10 {
			leaving = append(leaving, w.rawEverywhere(p)...)
		}
	}
	leave := func(cs []*wire.Conn) {
		pace := time.NewTicker(4 * time.Millisecond)
		defer pace.Stop()
		for _, c := range cs {
			<-pace.C
			c.Close()
		}
	}
	steady := map[string]int{}
	var open []*wire.Conn
	var people []*person
	for n := range total / 30 {
		p := w.addUser(fmt.Sprintf("steady-%d", n))
		people = append(people, p)
		for range 10 {
			open = append(open, w.rawEverywhere(p)...)
		}
		steady[p.name] = 30
	}
	w.addRoom("steady", people[0], kv.RoomOptions{})
	var stop atomic.Bool
	var coming sync.WaitGroup
	for n := range 3 {
		p := w.addUser(fmt.Sprintf("coming-%d", n))
		coming.Go(func() {
			for !stop.Load() {
				w.connectRaw(n+1, p).Close()
			}
		})
	}
	for _, flags := range [][]string{nil, {"--direct"}} {
		for range 3 {
			began := time.Now()
			share := min(len(leaving), total/18)
			var going sync.WaitGroup
			going.Go(func() { leave(leaving[:share]) })
			r := w.In(t).CLI(append(slices.Clone(flags), "conn", "list", "--json")...)
			going.Wait()
			leaving = leaving[share:]
			var list bus.ConnectionList
			if err := json.Unmarshal([]byte(r.Stdout), &list); err != nil || r.Code != 0 {
				t.Fatalf("exit %d, %v: %.300s%s", r.Code, err, r.Stdout, r.Stderr)
			}
			found, last := map[string]int{}, ""
			for _, c := range list.Connections {
				found[string(c.Handle)]++
				at := fmt.Sprintf("%s/%020d", c.Server, c.CID)
				if at <= last {
					t.Fatalf("%s follows %s", at, last)
				}
				last = at
			}
			for name, want := range steady {
				if found[name] != want {
					t.Errorf("%v: %s has %d connections, want %d", flags, name, found[name], want)
				}
			}
			if list.Servers != "3/3" || len(list.Missing) > 0 {
				t.Errorf("%v: servers %s, missing %v", flags, list.Servers, list.Missing)
			}
			t.Logf("%v: %d connections in %s", flags, len(list.Connections), time.Since(began).Round(time.Millisecond))
		}
	}
	stop.Store(true)
	coming.Wait()

	for _, flags := range [][]string{nil, {"--direct"}} {
		run := func(args ...string) cluster.Result { return w.In(t).CLI(append(slices.Clone(flags), args...)...) }
		if r := run("conn", "list", "--room", "steady", "--server", "n2"); r.Code != 0 || strings.Count(r.Stdout, "steady-0") != 10 {
			t.Errorf("%v: of one room and server: exit %d: %s%s", flags, r.Code, r.Stdout, r.Stderr)
		}
		if r := run("conn", "kick", "steady-0", "--server", "n2", "--dry-run"); r.Code != 0 || !strings.Contains(r.Stdout, "would close 10 connections") {
			t.Errorf("%v: exit %d: %s%s", flags, r.Code, r.Stdout, r.Stderr)
		}
	}
	for i, flags := range [][]string{nil, {"--direct"}} {
		node := []string{"n2", "n1"}[i]
		r := w.In(t).CLI(append(slices.Clone(flags), "conn", "kick", "steady-0", "--server", node, "--yes")...)
		if r.Code != 0 || !strings.Contains(r.Stdout, "closed 10 of steady-0") {
			t.Errorf("%v: exit %d: %s%s", flags, r.Code, r.Stdout, r.Stderr)
		}
		if got := len(closedOf(open)); got != 10*(i+1) {
			t.Errorf("%v: %d connections are closed, want %d", flags, got, 10*(i+1))
		}
	}

	w.Pause(3, cluster.NATS)
	for i, flags := range [][]string{nil, {"--direct"}} {
		name := people[i+1].name
		cluster.WaitFor(t, 60*time.Second, "a list without one server", func() error { // the stream's leader may be that one
			r := w.In(t).CLI(append(slices.Clone(flags), "conn", "list", "--user", name)...)
			if r.Code != 3 || !strings.Contains(r.Stderr, "n3 did not answer") || strings.Count(r.Stdout, name+" ") != 20 {
				return fmt.Errorf("%v: exit %d: %s%s", flags, r.Code, r.Stdout, r.Stderr)
			}
			return nil
		})
		for node, want := range map[string]int{"n1": 0, "n3": 3} { // the silence of one says nothing of another
			r := w.In(t).CLI(append(slices.Clone(flags), "conn", "list", "--user", name, "--server", node)...)
			if r.Code != want || strings.Count(r.Stdout, name+" ") != 10-10*want/3 {
				t.Errorf("%v: of %s: exit %d: %s%s", flags, node, r.Code, r.Stdout, r.Stderr)
			}
		}
		cluster.WaitFor(t, 60*time.Second, "a kick without one server", func() error { // until then the audit's leader may be that one
			r := w.In(t).CLI(append(slices.Clone(flags), "conn", "kick", name, "--yes")...)
			if r.Code != 3 {
				t.Fatalf("%v: exit %d: %s%s", flags, r.Code, r.Stdout, r.Stderr)
			}
			if !strings.Contains(r.Stderr, "not proven on n3") {
				return fmt.Errorf("%v: %s%s", flags, r.Stdout, r.Stderr)
			}
			return nil
		})
	}
	w.Resume(3, cluster.NATS)
	w.WaitHealthy(30 * time.Second)
}
