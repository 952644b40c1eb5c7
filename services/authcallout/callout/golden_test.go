package callout

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// vector is one exchange with a nats-server in all its bytes. The keys are
// those of newScene, the time is moment, randomness comes from ChaCha8 with a
// seed of zeros: jti and seal nonces are the only random values.
type vector struct {
	Header   string `json:"nats_server_xkey"` // the header beside the request
	Request  []byte `json:"request"`          // sealed, made by the servers' own library
	UserJWT  string `json:"user_jwt"`
	Admitted []byte `json:"admitted"` // sealed
	Denied   []byte `json:"denied"`   // sealed
}

// TestGoldenExchange fixes what goes over the wire, so that no change of it
// goes unseen between two versions that must serve one cluster together.
func TestGoldenExchange(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join("testdata", "exchange.json"))
	must(t, err)
	var want vector
	must(t, json.Unmarshal(raw, &want))
	s := newScene(t)
	msg := nats.NewMsg(Subject)
	msg.Data = want.Request
	msg.Header.Set(serverKeyHeader, want.Header)
	c, err := s.opener().open(msg)
	must(t, err)
	req, why := c.prove()
	if why != "" {
		t.Fatal(why)
	}
	m := newTestMinter(t, s.keys)
	m.rand = rand.NewChaCha8([32]byte{})
	a := s.access(t, kv.Grant{Room: "dev", Role: bus.Reader}, kv.Grant{Room: "log", Role: bus.Owner, Durable: true}, kv.Grant{Room: "ops", Role: bus.Writer})
	end := moment.Add(time.Hour) // before any jitter
	a.User.ExpiresAt = &end
	admitted, err := m.admit(c, req, a, moment.Add(answerLife))
	must(t, err)
	denied, err := m.deny(c, moment.Add(answerLife))
	must(t, err)
	answer, _ := s.readAnswer(t, admitted)
	if answer.Jwt != want.UserJWT {
		t.Errorf("the user JWT is\n%s, want\n%s", answer.Jwt, want.UserJWT)
	}
	if !bytes.Equal(admitted, want.Admitted) || !bytes.Equal(denied, want.Denied) {
		got, _ := json.MarshalIndent(vector{want.Header, want.Request, answer.Jwt, admitted, denied}, "", "  ")
		t.Errorf("the exchange is\n%s", got)
	}
}
