package callout

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// realEvent is one that nats-server 2.15.2 has sent.
const realEvent = `{"type":"io.nats.server.advisory.v1.client_connect","id":"UkEgUuaHJ2o1Y2OB8Vultw","timestamp":"2026-11-25T03:32:39.948762557Z",` +
	`"server":{"name":"n1","host":"127.0.0.1","id":"NBKTJCU7EYTCLDH4PQLJ3D3A4USALG32OLQW4CAYSFM6GV4DE3THM5A2","cluster":"unibus","ver":"2.15.2",` +
	`"metadata":{"unibus_config":"82a63d55"},"feature_flags":{"js_ack_fc_v2":false},"jetstream":true,"flags":7,"seq":128,"time":"2026-11-25T03:32:39.94881842Z"},` +
	`"client":{"start":"2026-11-25T03:32:39.943701439Z","host":"127.0.0.1","id":61,"acc":"BUS","user":"UBLVNOJCAUTIVMRRHONKESLX3X4U4NKEEN3JGAA3VUCKGYECVARP2R4Q",` +
	`"name":"NAME","lang":"wire","ver":"1","issuer_key":"BUS","name_tag":"BUS","kind":"Client","client_type":"nats"}}`

const (
	realServer = "NBKTJCU7EYTCLDH4PQLJ3D3A4USALG32OLQW4CAYSFM6GV4DE3THM5A2"
	realUser   = "UBLVNOJCAUTIVMRRHONKESLX3X4U4NKEEN3JGAA3VUCKGYECVARP2R4Q"
)

// Which connection an event is about, and whose it is, a client cannot change
// by what it calls itself: with another's number it could end the hold on an
// answer that a server still acts on.
func TestEventsOfClientsWithHostileNames(t *testing.T) {
	for _, called := range []string{
		"NAME", "", `","id":62,"`, `\`, `\"`, `{"id":62}`, `}},"client":{"id":62}`, "\x00\n\t",
		`"},"server":{"id":"N"},"client":{"id":62,"user":"UEVE","name":"`, "]", "\u2028é",
	} {
		quoted, err := json.Marshal(called)
		must(t, err)
		event := strings.Replace(realEvent, `"NAME"`, string(quoted), 1)
		event = strings.Replace(event, `"id":61,`, "", 1) // behind the name, so that it is passed on the way
		event = strings.Replace(event, `"nats"}}`, `"nats","id":61}}`, 1)
		if e, ok := parseEvent([]byte(event)); !ok || string(e.server) != realServer || e.cid != 61 || string(e.user) != realUser || string(e.name) != called {
			t.Errorf("client called %q: %+v, %v", called, e, ok)
		}
	}
	for name, event := range map[string]string{
		"with spaces":   "\n" + strings.NewReplacer(`":`, "\" :\t", `,"`, ",\r\n \"").Replace(realEvent) + " ",
		"no name":       strings.Replace(realEvent, `"name":"NAME",`, "", 1),
		"other members": strings.Replace(realEvent, `{"type"`, `{"ids":[{"id":1},"]",2],"none":null,"type"`, 1),
	} {
		if e, ok := parseEvent([]byte(event)); !ok || string(e.server) != realServer || e.cid != 61 || string(e.user) != realUser {
			t.Errorf("%s: %+v, %v", name, e, ok)
		}
	}
	for n := range len(realEvent) {
		if e, ok := parseEvent([]byte(realEvent[:n])); ok {
			t.Errorf("cut off after %d bytes: taken for %+v", n, e)
		}
	}
}

// connectEvent is one with a client that calls itself what an attacker would.
const connectEvent = `{"type":"io.nats.server.advisory.v1.client_connect","id":"zUpJ2u2a","timestamp":"2026-11-23T12:00:00.1Z",` +
	`"server":{"name":"n2","host":"127.0.0.1","id":"NB2X","cluster":"unibus","ver":"2.15.2","jetstream":true,"flags":3,"seq":81,"time":"2026-11-23T12:00:00.1Z"},` +
	`"client":{"start":"2026-11-23T12:00:00.25Z","host":"198.51.100.7","id":57,"acc":"BUS","user":"UALICE","name":"x\",\"user\":\"UEVE\",\"id\":1,\"s\":{\"","lang":"go","ver":"1.55.0","kind":"Client","client_type":"nats"}}`

func TestAnEventIsReadAsTheServerMeansIt(t *testing.T) {
	e, ok := parseEvent([]byte(connectEvent))
	if !ok || string(e.server) != "NB2X" || string(e.node) != "n2" || e.cid != 57 || string(e.user) != "UALICE" ||
		string(e.host) != "198.51.100.7" || !e.start.Equal(moment) || string(e.name) != `x","user":"UEVE","id":1,"s":{"` {
		t.Errorf("parseEvent = %+v, %v", e, ok)
	}
	for _, bad := range []string{
		"", "{", "[]", "null", `{"server":{"id":"N"}}`, `{"client":{"id":1}}`, `{"server":{"id":"N"},"client":{"id":"1"}}`,
		connectEvent + "x", `{"server":{"id":"N"},"client":{"id":1}`, `{"server" {"id":"N"},"client":{"id":1}}`,
	} {
		if e, ok := parseEvent([]byte(bad)); ok {
			t.Errorf("%.40q reads as %+v", bad, e)
		}
	}
}

func TestAPageIsReadWhole(t *testing.T) {
	p, ok := parsePage([]byte(`{"server":{"name":"n1","id":"NA"},"data":{"server_id":"NA","num_connections":2,"total":9,"offset":4,"limit":1024,"connections":[` +
		`{"cid":7,"ip":"198.51.100.7","start":"2026-11-23T12:00:00.25Z","name":"a","authorized_user":"UALICE","account":"BUS"},{"cid":9}]}}`))
	if !ok || p.server != "NA" || p.node != "n1" || p.offset != 4 || len(p.rows) != 2 || p.rows[0].cid != 7 || string(p.rows[0].user) != "UALICE" ||
		!p.rows[0].start.Equal(moment) || p.rows[1].cid != 9 || p.fault != "" {
		t.Errorf("parsePage = %+v, %v", p, ok)
	}
	if p, ok := parsePage([]byte(`{"server":{"name":"n1","id":"NA"},"error":{"code":500}}`)); !ok || p.fault == "" {
		t.Errorf("an error reads as %+v, %v", p, ok)
	}
}

// FuzzParseEvent: the reader of events never fails otherwise than by saying so,
// and on whatever is JSON it sees what encoding/json sees.
func FuzzParseEvent(f *testing.F) {
	f.Add([]byte(connectEvent))
	f.Add([]byte(realEvent))
	f.Add([]byte(`{"server":{"id":"\u00e4"},"client":{"id":1,"user":"\\"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, ok := parseEvent(data)
		var want struct {
			Server struct{ ID, Name string }
			Client struct {
				ID   uint64
				User string
			}
		}
		if !ok || !plain(data) || json.Unmarshal(data, &want) != nil {
			return
		}
		if string(e.server) != want.Server.ID || e.cid != want.Client.ID || string(e.user) != want.Client.User {
			t.Errorf("%q reads as %s %d %s, want %+v", data, e.server, e.cid, e.user, want)
		}
	})
}

// plain keeps to JSON in which each member has one name: encoding/json also
// takes other cases of it, and null for nothing.
func plain(data []byte) bool {
	var v map[string]json.RawMessage
	if json.Unmarshal(data, &v) != nil || len(v) != 2 || v["server"] == nil || v["client"] == nil {
		return false
	}
	again, err := json.Marshal(v)
	if err != nil || len(again) != len(data) {
		return false
	}
	for _, of := range []json.RawMessage{v["server"], v["client"]} {
		var m map[string]any
		if json.Unmarshal(of, &m) != nil {
			return false
		}
		for k, x := range m {
			if x == nil || k != "id" && k != "name" && k != "user" {
				return false
			}
		}
		if again, err := json.Marshal(m); err != nil || len(again) != len(of) {
			return false
		}
	}
	return true
}

func BenchmarkParseEvent(b *testing.B) {
	data := []byte(realEvent)
	b.ReportAllocs()
	for b.Loop() {
		parseEvent(data)
	}
}

func open(t *connections, server string, cid uint64, user string, start time.Duration) *connection {
	s, _ := t.server([]byte(server), []byte("n-"+server))
	return t.add(s, sight{cid: cid, user: []byte(user), start: moment.Add(start)}, moment)
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

// A list of many pages is read without a gap while connections come and go.
func TestListingMissesNothing(t *testing.T) {
	serve := func(have []uint64, offset int) page {
		offset = min(offset, len(have))
		p := page{server: "N", node: "n1", offset: offset}
		for _, cid := range have[offset:min(len(have), offset+pageLimit)] {
			p.rows = append(p.rows, sight{cid: cid})
		}
		return p
	}
	var start []uint64
	for n := range 5000 {
		start = append(start, uint64(n+1))
	}
	for name, change := range map[string]func(page int, have []uint64) []uint64{
		"at rest":                  func(_ int, have []uint64) []uint64 { return have },
		"one of the first closes":  func(_ int, have []uint64) []uint64 { return have[1:] },
		"many of the first close":  func(n int, have []uint64) []uint64 { return have[min(len(have), 300/(n+1)):] },
		"all close at once":        func(int, []uint64) []uint64 { return nil },
		"all but the newest close": func(_ int, have []uint64) []uint64 { return have[max(0, len(have)-10):] },
		"new ones open":            func(n int, have []uint64) []uint64 { return append(slices.Clone(have), uint64(10000+n)) },
	} {
		t.Run(name, func(t *testing.T) {
			have, offset := start, 0
			l := &listing{}
			for n := 0; ; n++ {
				if n > 60 {
					t.Fatal("no end")
				}
				offset = l.take(serve(have, offset))
				if l.done {
					break
				}
				have = change(n, have)
			}
			seen := map[uint64]bool{}
			last := uint64(0)
			for _, r := range l.rows {
				if r.cid <= last {
					t.Fatalf("%d follows %d", r.cid, last)
				}
				last = r.cid
				seen[r.cid] = true
			}
			for _, cid := range have { // open all the while
				if cid <= 5000 && !seen[cid] {
					t.Fatalf("%d is missing", cid)
				}
			}
		})
	}
}
