package main

import (
	"encoding/json"
	"strings"
	"testing"
)

// realEvent is one that nats-server 2.15.2 has sent.
const realEvent = `{"type":"io.nats.server.advisory.v1.client_connect","id":"UkEgUuaHJ2o1Y2OB8Vultw","timestamp":"2026-11-25T03:32:39.948762557Z",` +
	`"server":{"name":"n1","host":"127.0.0.1","id":"NBKTJCU7EYTCLDH4PQLJ3D3A4USALG32OLQW4CAYSFM6GV4DE3THM5A2","cluster":"unibus","ver":"2.15.2",` +
	`"metadata":{"unibus_config":"82a63d55"},"feature_flags":{"js_ack_fc_v2":false},"jetstream":true,"flags":7,"seq":128,"time":"2026-11-25T03:32:39.94881842Z"},` +
	`"client":{"start":"2026-11-25T03:32:39.943701439Z","host":"127.0.0.1","id":61,"acc":"BUS","user":"UBLVNOJCAUTIVMRRHONKESLX3X4U4NKEEN3JGAA3VUCKGYECVARP2R4Q",` +
	`"name":"NAME","lang":"wire","ver":"1","issuer_key":"BUS","name_tag":"BUS","kind":"Client","client_type":"nats"}}`

const realServer = "NBKTJCU7EYTCLDH4PQLJ3D3A4USALG32OLQW4CAYSFM6GV4DE3THM5A2"

// Which connection an event is about, a client cannot change by what it calls
// itself: with another's number it could end the hold on an answer that a
// server still acts on.
func TestConnectEvents(t *testing.T) {
	for name, event := range map[string]string{
		"as sent":       realEvent,
		"with spaces":   "\n" + strings.NewReplacer(`":`, "\" :\t", `,"`, ",\r\n \"").Replace(realEvent) + " ",
		"no name":       strings.Replace(realEvent, `"name":"NAME",`, "", 1),
		"number last":   strings.Replace(strings.Replace(realEvent, `"id":61,`, "", 1), `"nats"}}`, `"nats","id":61}}`, 1),
		"other members": strings.Replace(realEvent, `{"type"`, `{"ids":[{"id":1},"]",2],"none":null,"type"`, 1),
	} {
		if server, client, err := parseConnect([]byte(event)); err != nil || server != realServer || client != 61 {
			t.Errorf("%s: %s %d, %v", name, server, client, err)
		}
	}
	for _, called := range []string{
		`","id":62,"`, `\`, `\"`, `{"id":62}`, `}},"client":{"id":62}`, "\x00\n\t", `"},"server":{"id":"N"},"client":{"id":62,"name":"`, "]", "\u2028é",
	} {
		quoted, err := json.Marshal(called)
		if err != nil {
			t.Fatal(err)
		}
		event := strings.Replace(realEvent, `"NAME"`, string(quoted), 1)
		event = strings.Replace(event, `"id":61,`, "", 1) // behind the name, so that it is passed on the way
		event = strings.Replace(event, `"nats"}}`, `"nats","id":61}}`, 1)
		if server, client, err := parseConnect([]byte(event)); err != nil || server != realServer || client != 61 {
			t.Errorf("client called %q: %s %d, %v", called, server, client, err)
		}
	}
}

func TestConnectEventsThatAreNone(t *testing.T) {
	for name, event := range map[string]string{
		"nothing":             "",
		"no object":           `[]`,
		"empty object":        `{}`,
		"no server":           strings.Replace(realEvent, `"server"`, `"serve"`, 1),
		"server is no object": `{"server":"id","client":{"id":61}}`,
		"no number":           strings.Replace(realEvent, `"id":61,`, "", 1),
		"a number in quotes":  strings.Replace(realEvent, `61`, `"61"`, 1),
		"a server in numbers": strings.Replace(realEvent, `"`+realServer+`"`, `7`, 1),
		"a negative number":   strings.Replace(realEvent, `61`, `-61`, 1),
		"an id without end":   `{"server":{"id":"N}`,
		"no colon":            `{"server" {"id":"N"},"client":{"id":61}}`,
		"no value":            `{"server":`,
		"no comma":            `{"a":1 "server":{"id":"N"},"client":{"id":61}}`,
		"a name without end":  `{"server`,
	} {
		if server, client, err := parseConnect([]byte(event)); err == nil {
			t.Errorf("%s: taken for a connection: %q %d", name, server, client)
		}
	}
	for n := range len(realEvent) { // cut off anywhere before the client's number
		if _, _, err := parseConnect([]byte(realEvent[:n])); err == nil && n < strings.Index(realEvent, `,"acc"`) {
			t.Errorf("cut off after %d bytes: taken for a connection", n)
		}
	}
}

// Whatever encoding/json reads without repeated or escaped names, member reads
// the same way.
func FuzzMember(f *testing.F) {
	for _, s := range []string{realEvent, `{"a":{"id":[1,"}",{}]},"id":"x"}`, `{ "id" : -1.5e3 }`, `{"id":`, `{"i\u0064":1,"id":2}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, object string) {
		got, err := member([]byte(object), "id")
		var want struct {
			ID json.RawMessage `json:"id"`
		}
		if json.Unmarshal([]byte(object), &want) != nil {
			return // what is not JSON no server sends; it must only not panic
		}
		lower := strings.ToLower(object) // encoding/json takes names in any case
		if strings.Count(lower, `"id"`) > 1 || strings.Contains(object, `"ID"`) || strings.Contains(object, `"Id"`) || strings.Contains(object, `"iD"`) || strings.Contains(object, `\`) {
			return
		}
		if (err == nil) != (want.ID != nil) || string(got) != string(want.ID) {
			t.Errorf("%q: %q, %v; want %q", object, got, err, want.ID)
		}
	})
}

func BenchmarkParseConnect(b *testing.B) {
	event := []byte(realEvent)
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := parseConnect(event); err != nil {
			b.Fatal(err)
		}
	}
}
