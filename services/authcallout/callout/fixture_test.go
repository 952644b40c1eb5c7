package callout

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// moment is when everything in these tests happens.
var moment = time.Date(2026, 11, 23, 12, 0, 0, 250_000_000, time.UTC)

func at(t time.Time) func() time.Time { return func() time.Time { return t } }

// pair is an nkey with its public half.
type pair struct {
	nkeys.KeyPair
	pub string
}

// newPair makes a key that is the same in every run: number tells keys apart.
func newPair(t testing.TB, prefix nkeys.PrefixByte, number byte) pair {
	t.Helper()
	raw := bytes.Repeat([]byte{number}, ed25519.SeedSize)
	seed, err := nkeys.EncodeSeed(prefix, raw)
	must(t, err)
	var kp nkeys.KeyPair
	if prefix == nkeys.PrefixByteCurve {
		kp, err = nkeys.FromCurveSeed(seed)
	} else {
		kp, err = nkeys.FromSeed(seed)
	}
	must(t, err)
	pub, err := kp.PublicKey()
	must(t, err)
	return pair{kp, pub}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (p pair) seed(t testing.TB) []byte {
	t.Helper()
	s, err := p.Seed()
	must(t, err)
	return s
}

// scene is one nats-server, one callout and one client, with real keys.
type scene struct {
	issuer, curve       pair // ours
	server, serverCurve pair
	session             pair // the key a server makes for each connection
	client              pair
	keys                Keys
}

func newScene(t testing.TB) *scene {
	t.Helper()
	s := &scene{
		issuer: newPair(t, nkeys.PrefixByteAccount, 1), curve: newPair(t, nkeys.PrefixByteCurve, 2),
		server: newPair(t, nkeys.PrefixByteServer, 3), serverCurve: newPair(t, nkeys.PrefixByteCurve, 4),
		session: newPair(t, nkeys.PrefixByteUser, 5), client: newPair(t, nkeys.PrefixByteUser, 6),
	}
	keys, err := ParseKeys(s.issuer.seed(t), s.curve.seed(t))
	must(t, err)
	s.keys = keys
	return s
}

const clientNonce = "5Wx0cm_c-vs9eJk"

func (s *scene) sign(t testing.TB, by pair, nonce string) string {
	t.Helper()
	sig, err := by.Sign([]byte(nonce))
	must(t, err)
	return base64.RawURLEncoding.EncodeToString(sig)
}

// request is what the library that nats-server uses would send.
func (s *scene) request(t testing.TB) *jwt.AuthorizationRequestClaims {
	t.Helper()
	c := jwt.NewAuthorizationRequestClaims(s.issuer.pub)
	c.Audience = "nats-authorization-request"
	c.UserNkey = s.session.pub
	c.Expires = moment.Add(10 * time.Second).Unix()
	c.Server = jwt.ServerID{Name: "n1", Host: "127.0.0.1", ID: s.server.pub, Version: "2.15.2", Cluster: "unibus", XKey: s.serverCurve.pub}
	c.ClientInformation = jwt.ClientInformation{Host: "127.0.0.1", ID: 7, Kind: "Client", Type: "nats", Nonce: clientNonce, User: s.client.pub, Name: "alice's laptop"}
	c.ConnectOptions = jwt.ConnectOptions{
		Nkey: s.client.pub, SignedNonce: s.sign(t, s.client, clientNonce), Lang: "go", Version: "1.55.0", Protocol: 1,
		Username: "ignored", Password: "ignored", Token: "ignored",
	}
	c.TLS = &jwt.ClientTLS{Version: "1.3", Cipher: "TLS_AES_128_GCM_SHA256"}
	return c
}

// parts are a request taken to pieces, so that a test can spoil one of them.
type parts struct {
	header, claims map[string]any
	signer         pair // of the token
	sealer         pair // curve key that seals
	sealFor        string
	announce       string // the header that names the sealer
	signature      func([]byte) []byte
	token          func([]byte) []byte
	sealed         func([]byte) []byte
	noHeader       bool
}

func (s *scene) parts(t testing.TB) *parts {
	t.Helper()
	token, err := s.request(t).Encode(s.server)
	must(t, err)
	p := &parts{signer: s.server, sealer: s.serverCurve, sealFor: s.curve.pub, announce: s.serverCurve.pub}
	pieces := bytes.Split([]byte(token), []byte("."))
	must(t, decodePart(pieces[0], &p.header))
	must(t, decodePart(pieces[1], &p.claims))
	p.claims["iat"] = moment.Unix() // the library takes the wall clock
	return p
}

// at returns the object of claims.nats under a name.
func (p *parts) at(name string) map[string]any {
	n := p.claims["nats"].(map[string]any)
	if name == "" {
		return n
	}
	return n[name].(map[string]any)
}

func (p *parts) message(t testing.TB) *nats.Msg {
	t.Helper()
	enc := base64.RawURLEncoding
	header, err := json.Marshal(p.header)
	must(t, err)
	claims, err := json.Marshal(p.claims)
	must(t, err)
	signed := []byte(enc.EncodeToString(header) + "." + enc.EncodeToString(claims))
	sig, err := p.signer.Sign(signed)
	must(t, err)
	if p.signature != nil {
		sig = p.signature(sig)
	}
	token := []byte(string(signed) + "." + enc.EncodeToString(sig))
	if p.token != nil {
		token = p.token(token)
	}
	data, err := p.sealer.Seal(token, p.sealFor)
	must(t, err)
	if p.sealed != nil {
		data = p.sealed(data)
	}
	m := nats.NewMsg(Subject)
	m.Data = data
	if !p.noHeader {
		m.Header.Set("Nats-Server-Xkey", p.announce)
	}
	return m
}

func (s *scene) opener() *opener { return newOpener([]Keys{s.keys}, at(moment)) }

// genuine is an opened and proven request.
func (s *scene) genuine(t testing.TB) (*call, Request) {
	t.Helper()
	c, err := s.opener().open(s.parts(t).message(t))
	must(t, err)
	req, why := c.prove()
	if why != "" {
		t.Fatalf("a genuine request is refused: %s", why)
	}
	return c, req
}

func key(t testing.TB, s string) bus.UserKey {
	t.Helper()
	k, err := bus.ParseUserKey(s)
	must(t, err)
	return k
}

func (s *scene) access(t testing.TB, rooms ...kv.Grant) *kv.Access {
	t.Helper()
	return &kv.Access{
		User: bus.User{
			V: bus.UserVersion, Key: key(t, s.client.pub), Handle: "alice", Role: bus.Member, Status: bus.Active, CreatedAt: moment.Add(-time.Hour),
		},
		Revision: 5, Rooms: rooms,
	}
}
