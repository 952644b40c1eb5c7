package callout

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nkeys"
	"golang.org/x/crypto/nacl/box"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
)

// Denied is all a refused client ever learns.
const Denied = "not authorized"

const (
	userAccount = "BUS"
	maxTTL      = 30 * 24 * time.Hour
)

// Keys is one generation of what the servers' auth_callout block names.
type Keys struct {
	Issuer IssuerKey
	Curve  CurveKey
}

// IssuerKey signs users. Whoever holds its seed can place a session in any
// account: it is the root of the bus.
type IssuerKey struct {
	Public  string
	private ed25519.PrivateKey // expanded once; nkeys would do it for each signature
}

// CurveKey unseals requests.
type CurveKey struct {
	Public  string
	private [32]byte
}

// ParseKeys reads an account seed SA... and a curve seed SX....
func ParseKeys(issuerSeed, curveSeed []byte) (Keys, error) {
	prefix, raw, err := nkeys.DecodeSeed(issuerSeed)
	if err != nil || prefix != nkeys.PrefixByteAccount {
		return Keys{}, bus.E(bus.Invalid, "the issuer seed is not an account seed (SA...)")
	}
	private := ed25519.NewKeyFromSeed(raw)
	public, err := nkeys.Encode(nkeys.PrefixByteAccount, private.Public().(ed25519.PublicKey))
	if err != nil {
		return Keys{}, bus.E(bus.Internal, "issuer: %w", err)
	}
	curve, err := nkeys.FromCurveSeed(curveSeed)
	if err != nil {
		return Keys{}, bus.E(bus.Invalid, "the xkey seed is not a curve seed (SX...)")
	}
	curvePublic, err := curve.PublicKey()
	if err != nil {
		return Keys{}, bus.E(bus.Internal, "xkey: %w", err)
	}
	k := Keys{Issuer: IssuerKey{string(public), private}, Curve: CurveKey{Public: curvePublic}}
	_, curveRaw, err := nkeys.DecodeSeed(curveSeed)
	if err != nil {
		return Keys{}, bus.E(bus.Invalid, "the xkey seed is not a curve seed (SX...)")
	}
	copy(k.Curve.private[:], curveRaw)
	return k, nil
}

// minter is the only code that uses the issuer's private key.
type minter struct {
	ttl  time.Duration
	now  func() time.Time
	rand io.Reader // of nonces and ids; crypto/rand but in a test of golden bytes

	drafts sync.Pool // of *draft

	mu       sync.Mutex
	rendered map[bus.UserKey]rendering
}

// draft is the room in which one answer is written, used again: otherwise each
// connect would leave 20 KB more to clear and to collect.
type draft struct{ claims, user, answer []byte }

// rendering is a user's permissions as the members of a JSON object, good as
// long as the View returns the same access.
type rendering struct {
	access      *kv.Access
	permissions []byte
}

func newMinter(keys []Keys, ttl time.Duration, now func() time.Time) (*minter, error) {
	if len(keys) == 0 {
		return nil, bus.E(bus.Invalid, "no issuer key")
	}
	if ttl < time.Minute || ttl > maxTTL {
		return nil, bus.E(bus.Invalid, "a session lives between 1m and 720h, not %s", ttl)
	}
	return &minter{ttl: ttl, now: now, rand: rand.Reader, drafts: sync.Pool{New: func() any { return new(draft) }}, rendered: map[bus.UserKey]rendering{}}, nil
}

// rules are the subjects of one direction, in the server's JSON.
type rules struct {
	Allow []string `json:"allow,omitempty"`
	Deny  []string `json:"deny,omitempty"`
}

// permissions is the nats part of a user JWT that differs between users.
type permissions struct {
	Pub  rules      `json:"pub"`
	Sub  rules      `json:"sub"`
	Resp *responses `json:"resp,omitempty"` // never; only the negative control sets it
}

type responses struct {
	Max int   `json:"max"`
	TTL int64 `json:"ttl"`
}

// permit lists exactly what an access grants. An empty list would mean "allow
// everything" to a server, so a direction without rights is denied outright.
func permit(a *kv.Access) permissions {
	var p permissions
	publish, subscribe := a.Permissions()
	for _, r := range publish {
		p.Pub.Allow = append(p.Pub.Allow, r.Subject)
	}
	for _, r := range subscribe {
		p.Sub.Allow = append(p.Sub.Allow, r.Subject)
	}
	if len(p.Pub.Allow) == 0 {
		p.Pub.Deny = []string{">"}
	}
	if guard.Off(guard.EmptyPermissions) && len(a.Rooms) == 0 {
		p = permissions{}
	}
	if guard.Off(guard.NoReplyPermissions) {
		p.Resp = &responses{Max: 1, TTL: int64(2 * time.Minute)}
	}
	return p
}

// check is the second lock on permit: nothing leaves that would allow all, that
// names another user, or that lets a client answer on a subject somebody else
// chose.
func (p permissions) check(user bus.UserKey) error {
	if p.Resp != nil && !guard.Off(guard.NoReplyPermissions) {
		return errors.New("response permissions are never given")
	}
	for _, r := range []rules{p.Pub, p.Sub} {
		if len(r.Allow)+len(r.Deny) == 0 && !guard.Off(guard.EmptyPermissions) {
			return errors.New("a direction without rules would allow everything")
		}
	}
	say := bus.RoomPublishBy(user)
	for _, s := range p.Pub.Allow {
		if room, ok := roomOf(s); !ok || s != say(room) {
			return fmt.Errorf("publish %q is no right of %s", s, user)
		}
	}
	for _, s := range p.Sub.Allow {
		room, ok := roomOf(s)
		inRoom := ok && (s == bus.RoomSubscribe(room) || s == bus.FeedSubscribe(room))
		if !inRoom && s != bus.InboxSubscribe(user) && s != bus.NoticeSubscribe(user) {
			return fmt.Errorf("subscribe %q is no right of %s", s, user)
		}
	}
	return nil
}

// roomOf is the room that a subject names in its second token.
func roomOf(subject string) (bus.RoomID, bool) {
	_, rest, ok1 := strings.Cut(subject, ".")
	token, _, ok2 := strings.Cut(rest, ".")
	id, err := bus.ParseRoomID(token)
	return id, ok1 && ok2 && err == nil
}

// permissionsOf renders a user's permissions once per change.
func (m *minter) permissionsOf(a *kv.Access) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r, ok := m.rendered[a.User.Key]; ok && r.access == a {
		return r.permissions, nil
	}
	p := permit(a)
	if err := p.check(a.User.Key); err != nil {
		return nil, err
	}
	var raw bytes.Buffer
	enc := json.NewEncoder(&raw)
	enc.SetEscapeHTML(false) // every subject ends in ">"
	if err := enc.Encode(p); err != nil {
		return nil, err
	}
	members := bytes.TrimSuffix(bytes.TrimPrefix(raw.Bytes(), []byte("{")), []byte("}\n"))
	if len(m.rendered) > 100_000 {
		clear(m.rendered)
	}
	m.rendered[a.User.Key] = rendering{a, members}
	return members, nil
}

// admit makes the sealed answer that opens a connection with exactly the
// rights of an access. The server ignores it after expires.
func (m *minter) admit(c *call, req Request, a *kv.Access, expires time.Time) ([]byte, error) {
	if a.User.Key != req.User {
		return nil, errors.New("the access is another user's")
	}
	perms, err := m.permissionsOf(a)
	if err != nil {
		return nil, err
	}
	now := m.now()
	until := now.Add(m.ttl - mrand.N(m.ttl/10+1)) // jitter: sessions that began together do not end together
	if e := a.User.ExpiresAt; e != nil && e.Before(until) {
		until = *e
	}
	d := m.drafts.Get().(*draft)
	defer m.drafts.Put(d)
	d.claims = fmt.Appendf(d.claims[:0], userClaims,
		userAccount, until.Unix(), m.tokenID(), now.Unix(), c.keys.Issuer.Public, req.User.NKey(), c.userNKey, perms)
	d.user = sign(d.user[:0], c, d.claims)
	return m.respond(d, c, "jwt", d.user, expires)
}

// The claims are written and not encoded: every value in them is a number, an
// nkey, hex, base64 or a constant of ours, which need no escapes; to look for
// them in a whole JWT would cost a tenth of a connect. aud is where the server's
// config mode places the session.
const (
	userClaims = `{"aud":%q,"exp":%d,"jti":%q,"iat":%d,"iss":%q,"name":%q,"sub":%q,"nats":{%s,` +
		`"subs":-1,"data":-1,"payload":-1,"allowed_connection_types":["STANDARD"],"type":"user","version":2}}`
	answerClaims = `{"aud":%q,%s"jti":%q,"iat":%d,"iss":%q,"sub":%q,"nats":{"%s":"%s","type":"authorization_response","version":2}}`
)

// deny makes the sealed answer that refuses, with the constant text.
func (m *minter) deny(c *call, expires time.Time) ([]byte, error) {
	d := m.drafts.Get().(*draft)
	defer m.drafts.Put(d)
	return m.respond(d, c, "error", []byte(Denied), expires)
}

// respond writes into d, which value may be part of, and returns bytes that are
// not: the caller keeps them.
func (m *minter) respond(d *draft, c *call, field string, value []byte, expires time.Time) ([]byte, error) {
	exp := fmt.Sprintf(`"exp":%d,`, expires.Unix())
	if guard.Off(guard.ResponseExpiry) {
		exp = ""
	}
	d.claims = fmt.Appendf(d.claims[:0], answerClaims,
		c.serverID, exp, m.tokenID(), m.now().Unix(), c.keys.Issuer.Public, c.userNKey, field, value)
	d.answer = sign(d.answer[:0], c, d.claims)
	var nonce [sealNonce]byte
	if _, err := io.ReadFull(m.rand, nonce[:]); err != nil {
		return nil, fmt.Errorf("randomness: %w", err)
	}
	out := make([]byte, 0, len(sealVersion)+len(nonce)+box.Overhead+len(d.answer))
	out = append(append(out, sealVersion...), nonce[:]...)
	return box.SealAfterPrecomputation(out, d.answer, &nonce, c.shared), nil
}

var jwtHeader = base64.RawURLEncoding.EncodeToString([]byte(`{"typ":"JWT","alg":"` + jwtAlgorithm + `"}`))

// sign writes a JWT of claims in JSON into the empty out, which it may replace.
func sign(out []byte, c *call, claims []byte) []byte {
	enc := base64.RawURLEncoding
	out = append(append(out, jwtHeader...), '.')
	out = enc.AppendEncode(out, claims)
	sig := ed25519.Sign(c.keys.Issuer.private, out)
	return enc.AppendEncode(append(out, '.'), sig)
}

func (m *minter) tokenID() string {
	var b [16]byte
	_, _ = io.ReadFull(m.rand, b[:]) // never fails since Go 1.24; an id of zeros would only be a poor id
	return hex.EncodeToString(b[:])
}
