package callout

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
)

// TestOpenWhatTheLibraryMade opens a request exactly as the code that
// nats-server uses makes it, through the code that nats-server seals with.
func TestOpenWhatTheLibraryMade(t *testing.T) {
	s := newScene(t)
	claims := s.request(t)
	claims.Expires = time.Now().Add(10 * time.Second).Unix()
	token, err := claims.Encode(s.server)
	must(t, err)
	sealed, err := s.serverCurve.Seal([]byte(token), s.curve.pub)
	must(t, err)
	m := nats.NewMsg(Subject)
	m.Data = sealed
	m.Header.Set("Nats-Server-Xkey", s.serverCurve.pub)
	c, err := newOpener([]Keys{s.keys}, time.Now).open(m)
	must(t, err)
	req, why := c.prove()
	if why != "" || req.User.NKey() != s.client.pub {
		t.Fatalf("prove = %s, %q; want %s", req.User, why, s.client.pub)
	}
	if c.serverID != s.server.pub || c.serverName != "n1" || c.clientID != 7 || c.userNKey != s.session.pub || c.host != "127.0.0.1" {
		t.Errorf("opened %+v", c)
	}
}

// TestOpenRefuses spoils one thing at a time in a genuine request.
func TestOpenRefuses(t *testing.T) {
	s := newScene(t)
	otherServer := newPair(t, nkeys.PrefixByteServer, 33)
	otherCurve := newPair(t, nkeys.PrefixByteCurve, 34)
	for name, spoil := range map[string]func(*parts){
		"no header that names the seal": func(p *parts) { p.noHeader = true },
		"not sealed":                    func(p *parts) { p.sealed = func([]byte) []byte { return []byte("eyJ0eXAiOiJKV1QifQ.e30.x") } },
		"empty":                         func(p *parts) { p.sealed = func([]byte) []byte { return nil } },
		"only the seal's head":          func(p *parts) { p.sealed = func(b []byte) []byte { return b[:28] } },
		"too large":                     func(p *parts) { p.at("client_info")["name"] = strings.Repeat("x", maxRequest) },
		"unknown seal version":          func(p *parts) { p.sealed = func(b []byte) []byte { b[3] = '2'; return b } },
		"sealed for somebody else":      func(p *parts) { p.sealFor = otherCurve.pub },
		"a bit of the seal flipped":     func(p *parts) { p.sealed = func(b []byte) []byte { b[len(b)-1] ^= 1; return b } },
		"header names no curve key":     func(p *parts) { p.announce = s.server.pub },
		"header is noise":               func(p *parts) { p.announce = "xkey" },
		"header names another's key":    func(p *parts) { p.announce = otherCurve.pub },
		"sealed by another server than signed": func(p *parts) {
			p.sealer, p.announce = otherCurve, otherCurve.pub
		},
		"not a JWT":                      func(p *parts) { p.token = func([]byte) []byte { return []byte("hello") } },
		"four parts":                     func(p *parts) { p.token = func(b []byte) []byte { return append(b, ".x"...) } },
		"no signature":                   func(p *parts) { p.signature = func([]byte) []byte { return nil } },
		"short signature":                func(p *parts) { p.signature = func(b []byte) []byte { return b[:63] } },
		"a bit of the signature flipped": func(p *parts) { p.signature = func(b []byte) []byte { b[0] ^= 1; return b } },
		"signed by another than it says": func(p *parts) { p.signer = otherServer },
		"claims changed after signing": func(p *parts) {
			p.token = func(b []byte) []byte {
				parts := bytes.Split(b, []byte("."))
				claims, _ := base64.RawURLEncoding.DecodeString(string(parts[1]))
				claims = bytes.Replace(claims, []byte(`"id":7`), []byte(`"id":8`), 1)
				return bytes.Join([][]byte{parts[0], []byte(base64.RawURLEncoding.EncodeToString(claims)), parts[2]}, []byte("."))
			}
		},
		"no algorithm":          func(p *parts) { p.header["alg"] = "none" },
		"another algorithm":     func(p *parts) { p.header["alg"] = "HS256" },
		"another type of token": func(p *parts) { p.header["typ"] = "JWE" },
		"issuer is an account": func(p *parts) {
			p.signer = s.issuer
			p.claims["iss"] = s.issuer.pub
			p.at("server_id")["id"] = s.issuer.pub
		},
		"issuer is a user": func(p *parts) {
			p.signer = s.client
			p.claims["iss"] = s.client.pub
			p.at("server_id")["id"] = s.client.pub
		},
		"issuer is not the server": func(p *parts) { p.at("server_id")["id"] = otherServer.pub },
		"no issuer":                func(p *parts) { p.claims["iss"] = "" },
		"another audience":         func(p *parts) { p.claims["aud"] = "somewhere" },
		"no audience":              func(p *parts) { delete(p.claims, "aud") },
		"another callout's issuer": func(p *parts) { p.claims["sub"] = newPair(t, nkeys.PrefixByteAccount, 35).pub },
		"no subject":               func(p *parts) { p.claims["sub"] = "" },
		"expired this second":      func(p *parts) { p.claims["exp"] = moment.Unix() },
		"without expiry":           func(p *parts) { delete(p.claims, "exp") },
		"five seconds old":         func(p *parts) { p.claims["iat"] = moment.Add(-5 * time.Second).Unix() },
		"a user's token":           func(p *parts) { p.at("")["type"] = "user" },
		"a response":               func(p *parts) { p.at("")["type"] = "authorization_response" },
		"version 1":                func(p *parts) { p.at("")["version"] = 1 },
		"an old server":            func(p *parts) { p.at("server_id")["version"] = "2.15.1" },
		"no version of the server": func(p *parts) { delete(p.at("server_id"), "version") },
		"xkey of the claims differs from the header's": func(p *parts) {
			p.at("server_id")["xkey"] = otherCurve.pub
		},
		"no xkey in the claims":   func(p *parts) { delete(p.at("server_id"), "xkey") },
		"no session key":          func(p *parts) { delete(p.at(""), "user_nkey") },
		"session key of no user":  func(p *parts) { p.at("")["user_nkey"] = s.issuer.pub },
		"claims of another shape": func(p *parts) { p.claims["nats"] = []any{} },
	} {
		t.Run(name, func(t *testing.T) {
			p := s.parts(t)
			spoil(p)
			if c, err := s.opener().open(p.message(t)); err == nil {
				t.Errorf("opened: %+v", c)
			}
		})
	}
	if _, err := s.opener().open(s.parts(t).message(t)); err != nil {
		t.Errorf("the unspoiled request is refused: %v", err)
	}
}

// TestNoByteOfATokenMayChange: the last one is left out, most bits of which
// base64 ignores.
func TestNoByteOfATokenMayChange(t *testing.T) {
	s := newScene(t)
	token, err := s.request(t).Encode(s.server)
	must(t, err)
	if _, err := verifyToken([]byte(token)); err != nil {
		t.Fatal(err)
	}
	for i := range len(token) - 1 {
		changed := []byte(token)
		changed[i] = flip(token[i])[0]
		if _, err := verifyToken(changed); err == nil {
			t.Errorf("byte %d changed from %c to %c: taken for genuine", i, token[i], changed[i])
		}
	}
}

// TestProveRefuses spoils one thing at a time in what the client said. The
// request around it is genuine, as it is for every stranger on the network.
func TestProveRefuses(t *testing.T) {
	s := newScene(t)
	other := newPair(t, nkeys.PrefixByteUser, 66)
	lowOrder := func(p *parts) { // S = 0 and R = the key: verifies for any message
		var k bus.UserKey
		k[0] = 1
		p.at("connect_opts")["nkey"] = k.NKey()
		p.at("connect_opts")["sig"] = base64.RawURLEncoding.EncodeToString(append(k[:], make([]byte, 32)...))
	}
	forged := s.parts(t)
	lowOrder(forged)
	low, err := nkeys.Decode(nkeys.PrefixByteUser, []byte(forged.at("connect_opts")["nkey"].(string)))
	must(t, err)
	if !ed25519.Verify(low, []byte(clientNonce), rawSignature(t, forged.at("connect_opts")["sig"].(string))) {
		t.Fatal("the forgery with a key of low order does not verify, so it tests nothing")
	}
	sig := func(v string) func(*parts) { return func(p *parts) { p.at("connect_opts")["sig"] = v } }
	nonce := func(v string) func(*parts) { // with a signature that fits it
		return func(p *parts) {
			p.at("client_info")["nonce"] = v
			p.at("connect_opts")["sig"] = s.sign(t, s.client, v)
		}
	}
	nkey := func(v string) func(*parts) { return func(p *parts) { p.at("connect_opts")["nkey"] = v } }
	good := s.sign(t, s.client, clientNonce)
	for name, tt := range map[string]struct {
		spoil func(*parts)
		why   string
	}{
		"a leafnode":                   {func(p *parts) { p.at("client_info")["kind"] = "Leafnode" }, "kind"},
		"a router":                     {func(p *parts) { p.at("client_info")["kind"] = "Router" }, "kind"},
		"a websocket":                  {func(p *parts) { p.at("client_info")["type"] = "websocket" }, "kind"},
		"mqtt":                         {func(p *parts) { p.at("client_info")["type"] = "mqtt" }, "kind"},
		"no kind":                      {func(p *parts) { delete(p.at("client_info"), "kind") }, "kind"},
		"anonymous":                    {func(p *parts) { p.at("connect_opts")["nkey"], p.at("connect_opts")["sig"] = "", "" }, "anonymous"},
		"a JWT beside the key":         {func(p *parts) { p.at("connect_opts")["jwt"] = "eyJ0" }, "jwt"},
		"no key":                       {nkey(""), "key"},
		"hex key":                      {nkey(key(t, s.client.pub).Hex()), "key"},
		"lower-case key":               {nkey(strings.ToLower(s.client.pub)), "key"},
		"key with a wrong checksum":    {nkey(s.client.pub[:55] + flip(s.client.pub[55])), "key"},
		"an account's key":             {nkey(s.issuer.pub), "key"},
		"key and a newline":            {nkey(s.client.pub + "\n"), "key"},
		"a key of low order":           {lowOrder, "key"},
		"no nonce":                     {nonce(""), "nonce"},
		"short nonce":                  {nonce("abcdefghij"), "nonce"},
		"long nonce":                   {nonce(strings.Repeat("a", 65)), "nonce"},
		"a nonce that is an HTTP base": {nonce(`"@method": POST`), "nonce"},
		"a nonce of two lines":         {nonce("abcdefghijk\n"), "nonce"},
		"no signature":                 {sig(""), "signature"},
		"noise":                        {sig(strings.Repeat("x", 86)), "signature"},
		"64 zero bytes":                {sig(base64.RawURLEncoding.EncodeToString(make([]byte, 64))), "signature"},
		"half a signature":             {sig(good[:43]), "signature"},
		"a signature and a byte":       {sig(base64.RawURLEncoding.EncodeToString(append(rawSignature(t, good), 0))), "signature"},
		"a bit flipped":                {sig(base64.RawURLEncoding.EncodeToString(flipBit(rawSignature(t, good)))), "signature"},
		"malleable: S + L":             {sig(base64.RawURLEncoding.EncodeToString(plusOrder(rawSignature(t, good)))), "signature"},
		"signed by somebody else":      {sig(s.sign(t, other, clientNonce)), "signature"},
		"another connection's nonce":   {sig(s.sign(t, s.client, "5Wx0cm_c-vs9eJl")), "signature"},
		"the empty nonce's signature":  {sig(s.sign(t, s.client, "")), "signature"},
		"another's key, own signature": {nkey(other.pub), "signature"},
	} {
		t.Run(name, func(t *testing.T) {
			p := s.parts(t)
			tt.spoil(p)
			c, err := s.opener().open(p.message(t))
			must(t, err)
			if req, why := c.prove(); why != tt.why || req != (Request{}) {
				t.Errorf("prove = %+v, %q; want %q", req, why, tt.why)
			}
		})
	}
}

func flip(c byte) string {
	if c == 'A' {
		return "B"
	}
	return "A"
}

func rawSignature(t *testing.T, s string) []byte {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(s)
	must(t, err)
	return b
}

func flipBit(b []byte) []byte { b[40] ^= 1; return b }

// plusOrder adds the order of the group to S: the same equation, another
// spelling of the signature.
func plusOrder(sig []byte) []byte {
	order := []byte{
		0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14,
		0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
	}
	carry := 0
	for i := range order {
		carry += int(sig[32+i]) + int(order[i])
		sig[32+i] = byte(carry)
		carry >>= 8
	}
	return sig
}

// TestProveIgnoresWhatIsNoIdentity: names and passwords are whatever a client
// writes, also the name of one of the servers' own users.
func TestProveIgnoresWhatIsNoIdentity(t *testing.T) {
	s := newScene(t)
	other := newPair(t, nkeys.PrefixByteUser, 66).pub
	p := s.parts(t)
	for _, field := range []string{"user", "pass", "auth_token", "name"} {
		p.at("connect_opts")[field] = other
	}
	p.at("client_info")["user"] = other
	p.at("client_info")["name"] = other
	c, err := s.opener().open(p.message(t))
	must(t, err)
	if req, why := c.prove(); why != "" || req.User.NKey() != s.client.pub {
		t.Errorf("prove = %s, %q; want the key that signed", req.User, why)
	}
}

func TestProveTakesBothFormsOfBase64(t *testing.T) {
	s := newScene(t)
	raw := rawSignature(t, s.sign(t, s.client, clientNonce))
	for name, form := range map[string]string{
		"RawURL": base64.RawURLEncoding.EncodeToString(raw), "Std": base64.StdEncoding.EncodeToString(raw),
	} {
		p := s.parts(t)
		p.at("connect_opts")["sig"] = form
		c, err := s.opener().open(p.message(t))
		must(t, err)
		if _, why := c.prove(); why != "" {
			t.Errorf("%s: %s", name, why)
		}
	}
}

// TestTwoGenerationsOfKeys answers each server by the generation it asked with.
func TestTwoGenerationsOfKeys(t *testing.T) {
	old, next := newScene(t), newScene(t)
	next.issuer, next.curve = newPair(t, nkeys.PrefixByteAccount, 11), newPair(t, nkeys.PrefixByteCurve, 12)
	var err error
	next.keys, err = ParseKeys(next.issuer.seed(t), next.curve.seed(t))
	must(t, err)
	both := newOpener([]Keys{old.keys, next.keys}, at(moment))
	m := newTestMinter(t, old.keys, next.keys)
	for name, s := range map[string]*scene{"old": old, "next": next} {
		c, err := both.open(s.parts(t).message(t))
		must(t, err)
		reply, err := m.deny(c, moment.Add(answerLife))
		must(t, err)
		token, err := s.serverCurve.Open(reply, s.curve.pub)
		if err != nil {
			t.Fatalf("%s: the server cannot open the answer: %v", name, err)
		}
		claims, err := jwt.DecodeAuthorizationResponseClaims(string(token))
		must(t, err)
		if claims.Issuer != s.issuer.pub {
			t.Errorf("%s: answered as %s, want %s", name, claims.Issuer, s.issuer.pub)
		}
	}
}

func TestServerAtFloor(t *testing.T) {
	for version, want := range map[string]bool{
		"2.15.2": true, "2.15.3": true, "2.15.10": true, "2.16.0": true, "3.0.0": true, "2.14.9": true, "2.14.10": true, "2.16.0-RC.1": true,
		"2.15.1": false, "2.15.0": false, "2.14.8": false, "2.13.99": false, "2.12.15": false, "1.99.99": false, "2.9.10": false,
		"2.15.2-RC.1": false, "2.14.9-beta": false,
		"": false, "2.15": false, "2.15.x": false, "v2.15.2": false, "-1.0.0": false, "2.-15.2": false, "2.15.2.1": false, " 2.15.2": false,
	} {
		if got := ServerAtFloor(version); got != want {
			t.Errorf("ServerAtFloor(%q) = %t, want %t", version, got, want)
		}
	}
}

// TestSharedKeysAreBounded: whoever restarts servers does not fill our memory.
func TestSharedKeysAreBounded(t *testing.T) {
	s := newScene(t)
	o := s.opener()
	for i := range 200 {
		if _, err := o.sharedWith(&s.keys, newPair(t, nkeys.PrefixByteCurve, byte(i)).pub); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(o.shared); n > 64 {
		t.Errorf("%d shared keys are kept", n)
	}
}

// FuzzVerifyToken: whatever we take for a server's token, the servers' own
// library takes for one too.
func FuzzVerifyToken(f *testing.F) {
	s := newScene(f)
	claims := s.request(f)
	token, err := claims.Encode(s.server)
	must(f, err)
	f.Add([]byte(token))
	user, err := jwt.NewUserClaims(s.client.pub).Encode(s.issuer)
	must(f, err)
	f.Add([]byte(user))
	f.Add([]byte("a.b.c"))
	f.Add([]byte(".."))
	f.Fuzz(func(t *testing.T, token []byte) {
		claims, err := verifyToken(token)
		if err != nil {
			return
		}
		oracle, err := jwt.DecodeGeneric(string(token))
		if err != nil {
			t.Fatalf("we took a token that the library refuses: %v", err)
		}
		if oracle.Issuer != claims.Issuer || oracle.Subject != claims.Subject || oracle.Expires != claims.Expires || oracle.Audience != claims.Audience {
			t.Errorf("read %+v, the library %+v", claims, oracle.ClaimsData)
		}
	})
}

// FuzzProve: a proof is only ever one whose signature verifies.
func FuzzProve(f *testing.F) {
	s := newScene(f)
	good := s.sign(f, s.client, clientNonce)
	f.Add("Client", "nats", s.client.pub, clientNonce, good, "")
	f.Add("Client", "nats", s.client.pub, "", good, "")
	f.Add("Client", "nats", s.client.pub, clientNonce, "", "")
	f.Add("Client", "nats", s.client.pub, clientNonce, good, "eyJ")
	f.Fuzz(func(t *testing.T, kind, typ, nkey, nonce, sig, token string) {
		c := &call{kind: kind, typ: typ, nkey: nkey, nonce: nonce, sig: sig, jwt: token}
		req, why := c.prove()
		if why != "" {
			return
		}
		raw, err := base64.RawURLEncoding.DecodeString(sig)
		if err != nil {
			raw, err = base64.StdEncoding.DecodeString(sig)
		}
		if err != nil || len(nonce) < 11 || token != "" || kind != "Client" || typ != "nats" || req.User.NKey() != nkey ||
			!ed25519.Verify(req.User[:], []byte(nonce), raw) {
			t.Errorf("proven: %q", []string{kind, typ, nkey, nonce, sig, token})
		}
	})
}
