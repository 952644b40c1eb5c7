package callout

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"golang.org/x/crypto/nacl/box"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// The forms of nats-server 2.15 (auth_callout.go) and of nkeys (xkeys.go).
const (
	serverKeyHeader = "Nats-Server-Xkey"
	requestAudience = "nats-authorization-request"
	requestType     = "authorization_request"
	jwtAlgorithm    = "ed25519-nkey"
	sealVersion     = "xkv1"
	sealNonce       = 24
	maxRequest      = 256 << 10
)

// call is one request that a genuine nats-server made. Only open returns one.
type call struct {
	keys       *Keys
	shared     *[32]byte // with the server that asked
	serverID   string
	serverName string
	clientID   uint64
	userNKey   string // made by the server for this connection; the answer must name it
	host       string
	kind, typ  string
	nonce      string
	nkey, sig  string
	jwt        string
	proven     bool // the client holds the private half of nkey
}

// Request is a client that has proven to hold the private half of User. Only
// prove returns one: having it is the proof.
type Request struct {
	User bus.UserKey
}

// opener opens requests. Seals are computed once per server and key: each
// costs 0.1 ms.
type opener struct {
	keys []Keys
	now  func() time.Time

	mu     sync.Mutex
	shared map[string]*[32]byte // our curve key and the server's -> shared key
}

func newOpener(keys []Keys, now func() time.Time) *opener {
	return &opener{keys: keys, now: now, shared: map[string]*[32]byte{}}
}

type requestClaims struct {
	Audience string `json:"aud"`
	Expires  int64  `json:"exp"`
	IssuedAt int64  `json:"iat"`
	Issuer   string `json:"iss"`
	Subject  string `json:"sub"`
	NATS     struct {
		Type     string `json:"type"`
		Version  int    `json:"version"`
		UserNKey string `json:"user_nkey"`
		Server   struct {
			Name    string `json:"name"`
			ID      string `json:"id"`
			Version string `json:"version"`
			XKey    string `json:"xkey"`
		} `json:"server_id"`
		Client struct {
			Host  string `json:"host"`
			ID    uint64 `json:"id"`
			Kind  string `json:"kind"`
			Type  string `json:"type"`
			Nonce string `json:"nonce"`
		} `json:"client_info"`
		Connect struct {
			JWT  string `json:"jwt"`
			NKey string `json:"nkey"`
			Sig  string `json:"sig"`
		} `json:"connect_opts"`
	} `json:"nats"`
}

// open unseals a request and checks that a genuine, current server made it for
// us. Its errors are met with silence: no genuine server waits.
func (o *opener) open(m *nats.Msg) (*call, error) {
	serverKey := m.Header.Get(serverKeyHeader)
	if serverKey == "" {
		return nil, errors.New("the request is not sealed")
	}
	token, shared, err := o.unseal(m.Data, serverKey)
	if err != nil {
		return nil, err
	}
	claims, err := verifyToken(token)
	if err != nil {
		return nil, err
	}
	n := &claims.NATS
	switch {
	case claims.Audience != requestAudience:
		return nil, fmt.Errorf("audience %.40q", claims.Audience)
	case n.Type != requestType || n.Version != 2:
		return nil, fmt.Errorf("token type %.40q version %d", n.Type, n.Version)
	case claims.Issuer != n.Server.ID:
		return nil, errors.New("the signer is not the server it names")
	case n.Server.XKey != serverKey:
		return nil, errors.New("the seal is not of the server that signed")
	case claims.Expires <= o.now().Unix():
		return nil, errors.New("the request has expired")
	case o.now().Sub(time.Unix(claims.IssuedAt, 0)) > staleAfter:
		return nil, fmt.Errorf("the request was made at %s: this process was paused, or a clock is off", time.Unix(claims.IssuedAt, 0).UTC().Format(time.TimeOnly))
	case !ServerAtFloor(n.Server.Version):
		return nil, fmt.Errorf("server %.40q is below the version floor", n.Server.Version)
	case !nkeys.IsValidPublicUserKey(n.UserNKey):
		return nil, errors.New("no user key to answer for")
	}
	var keys *Keys
	for i := range o.keys {
		if o.keys[i].Issuer.Public == claims.Subject {
			keys = &o.keys[i]
		}
	}
	if keys == nil {
		return nil, fmt.Errorf("issuer %.60q is not ours", claims.Subject)
	}
	return &call{
		keys: keys, shared: shared, serverID: n.Server.ID, serverName: n.Server.Name, clientID: n.Client.ID, userNKey: n.UserNKey,
		host: n.Client.Host, kind: n.Client.Kind, typ: n.Client.Type, nonce: n.Client.Nonce,
		nkey: n.Connect.NKey, sig: n.Connect.Sig, jwt: n.Connect.JWT,
	}, nil
}

// unseal tries our curve keys, newest first.
func (o *opener) unseal(data []byte, serverKey string) (token []byte, shared *[32]byte, err error) {
	if len(data) > maxRequest || len(data) < len(sealVersion)+sealNonce+box.Overhead || !bytes.HasPrefix(data, []byte(sealVersion)) {
		return nil, nil, errors.New("the seal has no known form")
	}
	var nonce [sealNonce]byte
	copy(nonce[:], data[len(sealVersion):])
	for i := range o.keys {
		shared, err := o.sharedWith(&o.keys[i], serverKey)
		if err != nil {
			return nil, nil, err
		}
		if token, ok := box.OpenAfterPrecomputation(nil, data[len(sealVersion)+sealNonce:], &nonce, shared); ok {
			return token, shared, nil
		}
	}
	return nil, nil, errors.New("the seal does not open")
}

func (o *opener) sharedWith(k *Keys, serverKey string) (*[32]byte, error) {
	id := k.Curve.Public + serverKey
	o.mu.Lock()
	defer o.mu.Unlock()
	if s := o.shared[id]; s != nil {
		return s, nil
	}
	raw, err := nkeys.Decode(nkeys.PrefixByteCurve, []byte(serverKey))
	if err != nil || len(raw) != 32 {
		return nil, errors.New("the server's curve key is malformed")
	}
	var peer, shared [32]byte
	copy(peer[:], raw)
	box.Precompute(&shared, &peer, &k.Curve.private)
	if len(o.shared) >= 64 { // every start of a server makes a new key
		clear(o.shared)
	}
	o.shared[id] = &shared
	return &shared, nil
}

// verifyToken checks form and signature of a JWT that a server signed.
func verifyToken(token []byte) (*requestClaims, error) {
	parts := bytes.Split(token, []byte("."))
	if len(parts) != 3 {
		return nil, errors.New("not a JWT")
	}
	var header struct {
		Alg string `json:"alg"`
		Typ string `json:"typ"`
	}
	if err := decodePart(parts[0], &header); err != nil || header.Alg != jwtAlgorithm || !strings.EqualFold(header.Typ, "jwt") {
		return nil, errors.New("the JWT's header is not that of a server")
	}
	var claims requestClaims
	if err := decodePart(parts[1], &claims); err != nil {
		return nil, fmt.Errorf("claims: %w", err)
	}
	signer, err := nkeys.Decode(nkeys.PrefixByteServer, []byte(claims.Issuer))
	if err != nil || len(signer) != ed25519.PublicKeySize {
		return nil, errors.New("the issuer is no server key")
	}
	sig, err := base64.RawURLEncoding.DecodeString(string(parts[2]))
	if err != nil || len(sig) != ed25519.SignatureSize {
		return nil, errors.New("the signature is malformed")
	}
	if !ed25519.Verify(signer, token[:len(parts[0])+1+len(parts[1])], sig) {
		return nil, errors.New("the signature is not the issuer's")
	}
	return &claims, nil
}

func decodePart(part []byte, into any) error {
	raw := make([]byte, base64.RawURLEncoding.DecodedLen(len(part)))
	n, err := base64.RawURLEncoding.Decode(raw, part)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw[:n], into)
}

// hasNonceForm reports whether s is 11 to 64 characters of base64 for URLs.
func hasNonceForm(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'A' <= c && c <= 'Z', 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '_', c == '-':
		default:
			return false
		}
	}
	return 11 <= len(s) && len(s) <= 64
}

// prove checks that the client signed the nonce of this very connection with
// the key it names. The server does not: it verifies only the keys of its own
// configuration. why is the reason of a denial, "" if the proof holds.
func (c *call) prove() (req Request, why string) {
	switch {
	case c.kind != "Client" || c.typ != "nats":
		return Request{}, "kind"
	case c.nkey == "" && c.sig == "":
		return Request{}, "anonymous"
	case c.jwt != "":
		return Request{}, "jwt"
	case len(c.nkey) != 56:
		return Request{}, "key"
	}
	key, err := bus.ParseUserKey(c.nkey)
	if err != nil {
		return Request{}, "key"
	}
	if !hasNonceForm(c.nonce) && !guard.Off(guard.Nonce) {
		return Request{}, "nonce"
	}
	if !signed(key, c.nonce, c.sig) && !guard.Off(guard.ClientSignature) {
		return Request{}, "signature"
	}
	c.proven = true
	return Request{User: key}, ""
}

// signed accepts the two base64 forms that clients use.
func signed(key bus.UserKey, nonce, sig string) bool {
	raw, err := base64.RawURLEncoding.DecodeString(sig)
	if err != nil {
		raw, err = base64.StdEncoding.DecodeString(sig)
	}
	return err == nil && len(raw) == ed25519.SignatureSize && ed25519.Verify(key[:], []byte(nonce), raw)
}

// ServerAtFloor reports whether a nats-server has the fixes without which
// strangers could skip the callout: 2.15.2, or 2.14.9 in its line.
func ServerAtFloor(version string) bool {
	parts := strings.SplitN(version, ".", 3)
	if len(parts) != 3 {
		return false
	}
	patch, pre, _ := strings.Cut(parts[2], "-")
	var n [3]int
	for i, s := range []string{parts[0], parts[1], patch} {
		v, err := strconv.Atoi(s)
		if err != nil || v < 0 {
			return false
		}
		n[i] = v
	}
	switch {
	case pre != "" && n[0] == 2 && n[1] == 15 && n[2] == 2, pre != "" && n[0] == 2 && n[1] == 14 && n[2] == 9:
		return false
	case n[0] != 2:
		return n[0] > 2
	case n[1] == 14:
		return n[2] >= 9
	case n[1] == 15:
		return n[2] >= 2
	}
	return n[1] > 15
}
