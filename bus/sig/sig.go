package sig

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// The fixed parts of the profile.
const (
	Tag   = "unibus-v1" // of the signature: another purpose takes another tag
	Label = "ub1"       // of the signature in both headers

	// Window is how far created may be from the verifier's clock, either way.
	// Nonces must be remembered for longer than twice this.
	Window = 60 * time.Second

	// MaxBody is the largest body, in bytes, that Sign and Verify take. What is
	// larger is streamed, where a route takes that.
	MaxBody = 64 << 10
)

const tooLarge = "the body is larger than 64 KiB"

const (
	components = `("@method" "@authority" "@path" "@query" "content-digest")`

	minNonce, maxNonce = 22, 64 // characters of base64url: at least 128 bits
	maxMethod          = 16
)

// ErrSkew is in the chain of an error whose only cause is a clock: everything
// holds, the signature too, but created is outside the window.
var ErrSkew = errors.New("created is outside the window")

// Verified is a request that Verify accepted, and only Verify makes one.
//
// It does not say that the key belongs to anybody, nor that the nonce is
// fresh.
type Verified struct {
	Key     bus.UserKey
	Nonce   string    // 22 to 64 characters of base64url; unique only together with Key
	Created time.Time // whole seconds, at most Window from now
}

// statement is what a signature is about. Both sides build the text that is
// signed, and both headers, from it alone.
type statement struct {
	method    string
	authority string
	path      string // as on the wire, percent-encoded
	query     string // as on the wire, with its question mark; "?" if there is none
	digest    string
	created   int64
	nonce     string
	key       bus.UserKey
}

func (s *statement) params() string {
	return components + ";created=" + strconv.FormatInt(s.created, 10) + `;nonce="` + s.nonce +
		`";keyid="` + s.key.NKey() + `";alg="ed25519";tag="` + Tag + `"`
}

// base is the signature base of RFC 9421 section 2.5. No value in it can hold
// a line feed, so no two statements share one.
func (s *statement) base() []byte {
	return []byte(`"@method": ` + s.method +
		"\n\"@authority\": " + s.authority +
		"\n\"@path\": " + s.path +
		"\n\"@query\": " + s.query +
		"\n\"content-digest\": " + s.digest +
		"\n\"@signature-params\": " + s.params())
}

func (s *statement) input() string { return Label + "=" + s.params() }

func signatureField(signature []byte) string {
	return Label + "=:" + base64.StdEncoding.EncodeToString(signature) + ":"
}

// Digest is the SHA-256 of a body.
type Digest [sha256.Size]byte

// DigestOf is the digest of a body that is all there.
func DigestOf(body []byte) Digest { return sha256.Sum256(body) }

// Field is the digest as in Content-Digest and Repr-Digest (RFC 9530).
func (d Digest) Field() string {
	return "sha-256=:" + base64.StdEncoding.EncodeToString(d[:]) + ":"
}

// ParseDigest reads what Field writes, in that one spelling.
func ParseDigest(field string) (d Digest, ok bool) {
	text, _ := strings.CutPrefix(field, "sha-256=:")
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSuffix(text, ":"))
	if err != nil || len(raw) != len(d) {
		return d, false
	}
	d = Digest(raw)
	return d, d.Field() == field
}

// Sign adds Content-Digest, Signature-Input and Signature to a request that is
// about to be sent with that body, in place of any that it has. The authority
// is req.Host, else the host of its URL, in lower case and without the default
// port; req.Host is set to it, so that the server sees what was signed. Each
// attempt needs a nonce of its own (NewNonce): a request that is sent again is
// signed again.
//
// It fails with Invalid, and changes nothing, for what no server would accept.
func Sign(req *http.Request, body []byte, s Signer, created time.Time, nonce string) error {
	if len(body) > MaxBody {
		return bus.E(bus.Invalid, "cannot sign this request: %s", tooLarge)
	}
	return SignStream(req, DigestOf(body), s, created, nonce)
}

// SignStream is Sign for a body of any length that is sent as it is read, to a
// route that takes one: its digest is all that must be known before.
func SignStream(req *http.Request, body Digest, s Signer, created time.Time, nonce string) error {
	st := statement{
		method: req.Method, authority: req.Host, digest: body.Field(),
		created: created.Unix(), nonce: nonce, key: s.Key(),
	}
	if st.method == "" { // as net/http reads it
		st.method = http.MethodGet
	}
	if st.authority == "" {
		st.authority = req.URL.Host
	}
	st.authority = lower(st.authority)
	if req.URL.Scheme == "https" {
		st.authority = strings.TrimSuffix(st.authority, ":443")
	}
	if req.URL.Fragment != "" || req.URL.User != nil {
		return bus.E(bus.Invalid, "cannot sign a request whose URL has a fragment or a user")
	}
	why := checkFraming(req)
	if why == "" {
		st.path, st.query, why = splitTarget(req.URL.RequestURI())
	}
	if why == "" {
		why = st.check()
	}
	if why != "" {
		return bus.E(bus.Invalid, "cannot sign this request: %s", why)
	}
	signature, err := s.Sign(st.base())
	if err != nil {
		return bus.E(bus.Internal, "sign the request: %w", err)
	}
	if len(signature) != ed25519.SignatureSize {
		return bus.E(bus.Internal, "the signer made no ed25519 signature")
	}
	if req.Header == nil {
		req.Header = http.Header{}
	}
	req.Host = st.authority
	req.Header.Set("Content-Digest", st.digest)
	req.Header.Set("Signature-Input", st.input())
	req.Header.Set("Signature", signatureField(signature))
	return nil
}

// Verify reports who signed a request that a server received. body is all of
// it, read to its end before (trailers show only then); authorities are the
// host:port, without a default port, that clients may mean by this server, and
// nothing but the Host of the request is compared with them: X-Forwarded-*
// are never read. It must see the request before anything rewrites its URL.
//
// All errors are Unauthenticated; see ErrSkew for the one that a client can
// mend.
func Verify(r *http.Request, body []byte, authorities []string, now time.Time) (Verified, error) {
	if len(body) > MaxBody {
		return Verified{}, refusal(tooLarge)
	}
	v, digest, err := VerifyStream(r, authorities, now)
	if err != nil && !errors.Is(err, ErrSkew) {
		return v, err
	}
	if digest != DigestOf(body) {
		return Verified{}, refusal("Content-Digest is not that of the body")
	}
	return v, err
}

// VerifyStream is Verify for a body that was not read yet. Whoever acts upon it
// must first have read all of it, found the digest that is returned, and found
// no trailers, which show only then.
func VerifyStream(r *http.Request, authorities []string, now time.Time) (Verified, Digest, error) {
	st, signature, why := parse(r)
	if why == "" && !accepted(st.authority, authorities) {
		why = "the authority is not one of this server"
	}
	if why != "" {
		return Verified{}, Digest{}, refusal(why)
	}
	if !ed25519.Verify(st.key[:], st.base(), signature) && !guard.Off(guard.RequestSignature) {
		return Verified{}, Digest{}, refusal("wrong signature of " + st.key.NKey())
	}
	digest, _ := ParseDigest(st.digest) // parse has seen that it is one
	// The window comes last, so that ErrSkew is said of a genuine request only.
	created := time.Unix(st.created, 0)
	if age := now.Sub(created); age > Window || age < -Window {
		return Verified{}, digest, bus.E(bus.Unauthenticated, "request of %s refused: %w by %s", st.key, ErrSkew, (age.Abs() - Window).Round(time.Millisecond))
	}
	return Verified{Key: st.key, Nonce: st.nonce, Created: created}, digest, nil
}

func refusal(why string) error { return bus.E(bus.Unauthenticated, "request refused: %s", why) }

func accepted(authority string, authorities []string) bool {
	for _, a := range authorities {
		if lower(a) == authority {
			return true
		}
	}
	return false
}

// parse takes a request apart and accounts for every byte of the three
// headers. why is empty, or says what is wrong with it.
func parse(r *http.Request) (st statement, signature []byte, why string) {
	if why = checkFraming(r); why != "" {
		return st, nil, why
	}
	inputs, signatures, digests := r.Header.Values("Signature-Input"), r.Header.Values("Signature"), r.Header.Values("Content-Digest")
	if len(inputs) != 1 || len(signatures) != 1 || len(digests) != 1 {
		return st, nil, "Signature-Input, Signature and Content-Digest must be there once each"
	}
	input, sigText, digest := inputs[0], signatures[0], digests[0]

	st.method, st.authority = r.Method, lower(r.Host)
	if st.path, st.query, why = splitTarget(r.RequestURI); why != "" {
		return st, nil, why
	}
	// What was signed must be what is routed.
	if r.URL == nil || r.URL.Host != "" || r.URL.EscapedPath() != st.path || "?"+r.URL.RawQuery != st.query {
		return st, nil, "the URL is not the one that was sent"
	}
	if _, ok := ParseDigest(digest); !ok {
		return st, nil, "Content-Digest is not of the profile " + Tag
	}
	st.digest = digest

	// Values are cut out wherever they seem to be; the comparison below is what
	// refuses everything but the one spelling.
	_, rest, _ := strings.Cut(input, ";created=")
	created, rest, _ := strings.Cut(rest, `;nonce="`)
	nonce, rest, _ := strings.Cut(rest, `";keyid="`)
	keyid, _, _ := strings.Cut(rest, `"`)
	var err error
	if st.created, err = strconv.ParseInt(created, 10, 64); err != nil {
		return st, nil, "Signature-Input has no created"
	}
	st.nonce = nonce
	if st.key, err = bus.ParseUserKey(keyid); err != nil {
		return st, nil, "keyid: " + err.Error()
	}
	if why = st.check(); why != "" {
		return st, nil, why
	}
	if input != st.input() {
		return st, nil, "Signature-Input is not of the profile " + Tag
	}

	text, _ := strings.CutPrefix(sigText, Label+"=:")
	signature, err = base64.StdEncoding.DecodeString(strings.TrimSuffix(text, ":"))
	if err != nil || len(signature) != ed25519.SignatureSize || sigText != signatureField(signature) {
		return st, nil, "Signature is not of the profile " + Tag
	}
	return st, signature, ""
}

// checkFraming refuses whatever makes the bytes that were digested others than
// those that are acted upon.
func checkFraming(r *http.Request) (why string) {
	switch {
	case len(r.Header.Values("Content-Encoding")) > 0:
		return "Content-Encoding is not part of the profile"
	case len(r.Trailer) > 0 || len(r.Header.Values("Trailer")) > 0:
		return "trailers are not part of the profile"
	}
	return ""
}

// check holds the values to their grammar. Without it a quote or a line feed
// in one value could pass for the next one.
func (s *statement) check() (why string) {
	switch {
	case len(s.method) == 0 || len(s.method) > maxMethod || !all(s.method, func(c byte) bool { return 'A' <= c && c <= 'Z' }):
		return "the method is not 1 to 16 capital letters"
	case s.authority == "" || !all(s.authority, inAuthority):
		return "the authority is no host:port"
	case len(s.nonce) < minNonce || len(s.nonce) > maxNonce || !all(s.nonce, inNonce):
		return "the nonce is not 22 to 64 characters of base64url"
	case s.created <= 0:
		return "created is not after 1970"
	}
	return ""
}

// splitTarget takes a request target apart if it has one reading only: origin
// form, RFC 3986 without exceptions, no segment that a proxy would merge or
// resolve, no encoded separator, dot or control byte, no question mark without
// a query.
func splitTarget(target string) (path, query, why string) {
	path, raw, has := strings.Cut(target, "?")
	switch {
	case !strings.HasPrefix(path, "/"):
		return "", "", "the request target is not a path"
	case has && raw == "":
		return "", "", "the query is empty"
	case !encoded(path, `/\.`):
		return "", "", "the path holds bytes that it must not, plain or encoded"
	case !encoded(strings.ReplaceAll(raw, "?", ""), ""):
		return "", "", "the query holds bytes that it must not, plain or encoded"
	}
	segments := strings.Split(path[1:], "/")
	for i, s := range segments {
		if s == "." || s == ".." || s == "" && i < len(segments)-1 {
			return "", "", "the path is not normalized"
		}
	}
	return path, "?" + raw, ""
}

// encoded reports whether s holds only what RFC 3986 allows in a path, and no
// escaped control byte or byte of never.
func encoded(s, never string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			if !inPath(s[i]) {
				return false
			}
			continue
		}
		if len(s) < i+3 {
			return false
		}
		b, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
		if err != nil || b < ' ' || b == 0x7f || strings.IndexByte(never, byte(b)) >= 0 {
			return false
		}
		i += 2
	}
	return true
}

// lower leaves all but ASCII alone: strings.ToLower makes a plain k of the
// Kelvin sign, and so one host of two.
func lower(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

func alphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

func inPath(c byte) bool { return alphanumeric(c) || strings.IndexByte("-._~!$&'()*+,;=:@/", c) >= 0 }

func inNonce(c byte) bool { return alphanumeric(c) || c == '-' || c == '_' }

func inAuthority(c byte) bool { return alphanumeric(c) || strings.IndexByte("-._:[]", c) >= 0 }

func all(s string, in func(byte) bool) bool {
	for i := range len(s) {
		if !in(s[i]) {
			return false
		}
	}
	return true
}
