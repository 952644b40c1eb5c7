package sys

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

var moment = time.Date(2026, 11, 23, 12, 0, 0, 250e6, time.UTC)

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
		if err != nil {
			t.Fatal(err)
		}
		event := strings.Replace(realEvent, `"NAME"`, string(quoted), 1)
		event = strings.Replace(event, `"id":61,`, "", 1) // behind the name, so that it is passed on the way
		event = strings.Replace(event, `"nats"}}`, `"nats","id":61}}`, 1)
		if e, ok := ParseEvent([]byte(event)); !ok || string(e.Server) != realServer || e.CID != 61 || string(e.User) != realUser || string(e.Name) != called {
			t.Errorf("client called %q: %+v, %v", called, e, ok)
		}
	}
	for name, event := range map[string]string{
		"with spaces":   "\n" + strings.NewReplacer(`":`, "\" :\t", `,"`, ",\r\n \"").Replace(realEvent) + " ",
		"no name":       strings.Replace(realEvent, `"name":"NAME",`, "", 1),
		"other members": strings.Replace(realEvent, `{"type"`, `{"ids":[{"id":1},"]",2],"none":null,"type"`, 1),
	} {
		if e, ok := ParseEvent([]byte(event)); !ok || string(e.Server) != realServer || e.CID != 61 || string(e.User) != realUser {
			t.Errorf("%s: %+v, %v", name, e, ok)
		}
	}
	for n := range len(realEvent) {
		if e, ok := ParseEvent([]byte(realEvent[:n])); ok {
			t.Errorf("cut off after %d bytes: taken for %+v", n, e)
		}
	}
}

// connectEvent is one with a client that calls itself what an attacker would.
const connectEvent = `{"type":"io.nats.server.advisory.v1.client_connect","id":"zUpJ2u2a","timestamp":"2026-11-23T12:00:00.1Z",` +
	`"server":{"name":"n2","host":"127.0.0.1","id":"NB2X","cluster":"unibus","ver":"2.15.2","jetstream":true,"flags":3,"seq":81,"time":"2026-11-23T12:00:00.1Z"},` +
	`"client":{"start":"2026-11-23T12:00:00.25Z","host":"198.51.100.7","id":57,"acc":"BUS","user":"UALICE","name":"x\",\"user\":\"UEVE\",\"id\":1,\"s\":{\"","lang":"go","ver":"1.55.0","kind":"Client","client_type":"nats"}}`

func TestAnEventIsReadAsTheServerMeansIt(t *testing.T) {
	e, ok := ParseEvent([]byte(connectEvent))
	if !ok || string(e.Server) != "NB2X" || string(e.Node) != "n2" || e.CID != 57 || string(e.User) != "UALICE" ||
		string(e.Host) != "198.51.100.7" || !e.Start.Equal(moment) || string(e.Name) != `x","user":"UEVE","id":1,"s":{"` {
		t.Errorf("ParseEvent = %+v, %v", e, ok)
	}
	for _, bad := range []string{
		"", "{", "[]", "null", `{"server":{"id":"N"}}`, `{"client":{"id":1}}`, `{"server":{"id":"N"},"client":{"id":"1"}}`,
		connectEvent + "x", `{"server":{"id":"N"},"client":{"id":1}`, `{"server" {"id":"N"},"client":{"id":1}}`,
	} {
		if e, ok := ParseEvent([]byte(bad)); ok {
			t.Errorf("%.40q reads as %+v", bad, e)
		}
	}
}

func TestAPageIsReadWhole(t *testing.T) {
	p, ok := parsePage([]byte(`{"server":{"name":"n1","id":"NA"},"data":{"server_id":"NA","num_connections":2,"total":9,"offset":4,"limit":1024,"connections":[` +
		`{"cid":7,"ip":"198.51.100.7","start":"2026-11-23T12:00:00.25Z","name":"a","authorized_user":"UALICE","account":"BUS"},{"cid":9}]}}`))
	if !ok || p.server != "NA" || p.node != "n1" || p.offset != 4 || len(p.rows) != 2 || p.rows[0].CID != 7 || string(p.rows[0].User) != "UALICE" ||
		!p.rows[0].Start.Equal(moment) || p.rows[1].CID != 9 || p.fault != "" {
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
		e, ok := ParseEvent(data)
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
		if string(e.Server) != want.Server.ID || e.CID != want.Client.ID || string(e.User) != want.Client.User {
			t.Errorf("%q reads as %s %d %s, want %+v", data, e.Server, e.CID, e.User, want)
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
		ParseEvent(data)
	}
}
