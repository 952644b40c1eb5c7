package sig_test

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
)

// vectors were made by another implementation: see their comment.
type vectors struct {
	Seed     string
	Key      string
	Requests []vector
}

type vector struct {
	Name, Method, URL, Body string
	Created                 int64
	Nonce, Base             string
	Headers                 map[string]string
}

func loadVectors(tb testing.TB) (vectors, *sig.Identity) {
	tb.Helper()
	data, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		tb.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(data, &v); err != nil {
		tb.Fatal(err)
	}
	if len(v.Requests) < 3 {
		tb.Fatalf("%d vectors", len(v.Requests))
	}
	id, err := sig.ParseIdentity([]byte(v.Seed + "\n"))
	if err != nil {
		tb.Fatal(err)
	}
	return v, id
}

func (v vector) at() time.Time { return time.Unix(v.Created, 0) }

func (v vector) request(tb testing.TB) *http.Request {
	tb.Helper()
	req, err := http.NewRequest(v.Method, v.URL, strings.NewReader(v.Body))
	if err != nil {
		tb.Fatal(err)
	}
	return req
}

// sent is what a server makes of a request that net/http sends.
func sent(tb testing.TB, req *http.Request) (*http.Request, []byte) {
	tb.Helper()
	var wire bytes.Buffer
	if err := req.Write(&wire); err != nil {
		tb.Fatal(err)
	}
	got, body, err := received(wire.Bytes())
	if err != nil {
		tb.Fatal(err)
	}
	return got, body
}

// received reads a request as a server does.
func received(wire []byte) (*http.Request, []byte, error) {
	r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(wire)))
	if err != nil {
		return nil, nil, err
	}
	body, err := io.ReadAll(r.Body)
	return r, body, err
}

// recorder keeps what it was asked to sign.
type recorder struct {
	*sig.Identity
	message []byte
}

func (r *recorder) Sign(message []byte) ([]byte, error) {
	r.message = message
	return r.Identity.Sign(message)
}

// What another implementation signed, Sign writes byte for byte and Verify
// accepts as it comes out of net/http.
func TestGoldenVectors(t *testing.T) {
	all, id := loadVectors(t)
	if id.Key().NKey() != all.Key {
		t.Errorf("key %s, want %s", id.Key(), all.Key)
	}
	for _, v := range all.Requests {
		t.Run(v.Name, func(t *testing.T) {
			req, signer := v.request(t), &recorder{Identity: id}
			if err := sig.Sign(req, []byte(v.Body), signer, v.at(), v.Nonce); err != nil {
				t.Fatal(err)
			}
			if string(signer.message) != v.Base {
				t.Errorf("signature base\n%s\nwant\n%s", signer.message, v.Base)
			}
			for name, want := range v.Headers {
				if got := req.Header[name]; len(got) != 1 || got[0] != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			r, body := sent(t, req)
			got, err := sig.Verify(r, body, []string{req.URL.Host}, v.at())
			if want := (sig.Verified{Key: id.Key(), Nonce: v.Nonce, Created: v.at()}); err != nil || got != want {
				t.Errorf("%+v, %v, want %+v", got, err, want)
			}
		})
	}
}

// The page from which strangers write clients shows a vector as it is.
func TestTheProtocolPageShowsAVector(t *testing.T) {
	page, err := os.ReadFile("../../docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	all, _ := loadVectors(t)
	v := all.Requests[2]
	headers := fmt.Sprintf("\nContent-Digest: %s\nSignature-Input: %s\nSignature: %s\n", v.Headers["Content-Digest"], v.Headers["Signature-Input"], v.Headers["Signature"])
	for _, text := range []string{all.Seed, v.Method + " " + v.URL, "`" + v.Body + "`", "\n" + v.Base + "\n", headers} {
		if !bytes.Contains(page, []byte(text)) {
			t.Errorf("docs/protocol.md does not show %q", text)
		}
	}
}

// The primitive agrees with RFC 9421 B.2.6, and so does the signer on top.
func TestEd25519VectorOfTheRFC(t *testing.T) {
	const base = "\"date\": Tue, 20 Apr 2021 02:07:55 GMT\n\"@method\": POST\n\"@path\": /foo\n\"@authority\": example.com\n" +
		"\"content-type\": application/json\n\"content-length\": 18\n" +
		"\"@signature-params\": (\"date\" \"@method\" \"@path\" \"@authority\" \"content-type\" \"content-length\");created=1618884473;keyid=\"test-key-ed25519\""
	const want = "wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw=="
	private := decode(t, "MC4CAQAwBQYDK2VwBCIEIJ+DYvh6SEqVTm50DFtMDoQikTmiCqirVv9mWG9qfSnF")
	public := decode(t, "MCowBQYDK2VwAyEAJrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs=")
	seed, err := nkeys.EncodeSeed(nkeys.PrefixByteUser, private[len(private)-32:])
	if err != nil {
		t.Fatal(err)
	}
	id, err := sig.ParseIdentity(seed)
	if err != nil {
		t.Fatal(err)
	}
	if key := id.Key(); !bytes.Equal(key[:], public[len(public)-32:]) {
		t.Errorf("key %x", key[:])
	}
	got, err := id.Sign([]byte(base))
	if err != nil || base64.StdEncoding.EncodeToString(got) != want {
		t.Errorf("signature %s, %v", base64.StdEncoding.EncodeToString(got), err)
	}
	if !ed25519.Verify(public[len(public)-32:], []byte(base), decode(t, want)) {
		t.Error("the signature of the RFC does not verify")
	}
}

func decode(tb testing.TB, s string) []byte {
	tb.Helper()
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// attempt is a request that an attacker who holds a key puts together by hand:
// what it says is signed as it stands, so that a refusal is due to its shape.
// It shares no code with the package.
type attempt struct {
	method, target, host, body string
	authority, path, query     string // as signed; taken from host and target if empty
	covered                    string
	base                       string // the first five lines, if not the usual ones
	created, nonce             string
	keyid, alg, tag            string
	params                     string // all of them, if not the usual ones
	digest                     string
}

// message is the attempt on the wire. lines are whole header lines.
type message struct {
	method, target, host, body string
	digest, input, signature   string
	lines                      []string
	trailer                    string
}

const (
	host    = "n1.example.org:8470"
	covered = `("@method" "@authority" "@path" "@query" "content-digest")`
)

var moment = time.Unix(1795484700, 0)

func honest(id *sig.Identity) *attempt {
	body := `{"handle":"alice"}`
	return &attempt{
		method: "POST", target: "/v1/users?dry=1", host: host, body: body, covered: covered,
		created: "1795484695", nonce: "AAECAwQFBgcICQoLDA0ODw", keyid: id.Key().NKey(), alg: "ed25519", tag: "unibus-v1",
		digest: digestOf(body),
	}
}

func digestOf(body string) string {
	sum := sha256.Sum256([]byte(body))
	return "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
}

func (a *attempt) sign(tb testing.TB, id *sig.Identity) *message {
	tb.Helper()
	if a.params == "" {
		a.params = fmt.Sprintf(`%s;created=%s;nonce="%s";keyid="%s";alg="%s";tag="%s"`, a.covered, a.created, a.nonce, a.keyid, a.alg, a.tag)
	}
	path, query, _ := strings.Cut(a.target, "?")
	if a.path == "" {
		a.path = path
	}
	if a.query == "" {
		a.query = "?" + query
	}
	if a.authority == "" {
		a.authority = a.host
	}
	if a.base == "" {
		a.base = fmt.Sprintf("\"@method\": %s\n\"@authority\": %s\n\"@path\": %s\n\"@query\": %s\n\"content-digest\": %s\n",
			a.method, a.authority, a.path, a.query, a.digest)
	}
	signature, err := id.Sign([]byte(a.base + `"@signature-params": ` + a.params))
	if err != nil {
		tb.Fatal(err)
	}
	return &message{
		method: a.method, target: a.target, host: a.host, body: a.body, digest: a.digest,
		input: "ub1=" + a.params, signature: "ub1=:" + base64.StdEncoding.EncodeToString(signature) + ":",
	}
}

func (m *message) wire() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", m.method, m.target, m.host)
	for _, h := range [][2]string{{"Content-Digest", m.digest}, {"Signature-Input", m.input}, {"Signature", m.signature}} {
		if h[1] != "" {
			fmt.Fprintf(&b, "%s: %s\r\n", h[0], h[1])
		}
	}
	for _, l := range m.lines {
		b.WriteString(l + "\r\n")
	}
	if m.trailer != "" {
		fmt.Fprintf(&b, "Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n%s\r\n\r\n", len(m.body), m.body, m.trailer)
	} else {
		fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n%s", len(m.body), m.body)
	}
	return []byte(b.String())
}

// byHand is the request for what net/http itself would not let through: what
// Verify refuses must not depend on what stands before it.
func (m *message) byHand() *http.Request {
	path, query, _ := strings.Cut(m.target, "?")
	r := &http.Request{
		Method: m.method, RequestURI: m.target, Host: m.host, URL: &url.URL{Path: path, RawQuery: query},
		Header: http.Header{"Content-Digest": {m.digest}, "Signature-Input": {m.input}, "Signature": {m.signature}},
	}
	if u, err := url.ParseRequestURI(m.target); err == nil {
		r.URL = u
	}
	return r
}

// verify reports what Verify says, with a check of how it says no.
func verify(tb testing.TB, m *message, now time.Time) (sig.Verified, error) {
	tb.Helper()
	r, body, err := received(m.wire())
	if err != nil {
		r, body = m.byHand(), []byte(m.body)
	}
	got, err := sig.Verify(r, body, []string{host}, now)
	if err != nil && (bus.CodeOf(err) != bus.Unauthenticated || got != (sig.Verified{}) || !printable.MatchString(err.Error())) {
		tb.Errorf("refused as %+v, %s %q", got, bus.CodeOf(err), err)
	}
	return got, err
}

var printable = regexp.MustCompile(`^[ -~]+$`)

// There is one shape, and whoever signs another one correctly is refused all
// the same.
func TestOneShapeOnly(t *testing.T) {
	_, id := loadVectors(t)
	key := id.Key()
	if got, err := verify(t, honest(id).sign(t, id), moment); err != nil || got.Key != key {
		t.Fatalf("the honest request: %+v, %v", got, err)
	}

	signed := map[string]func(*attempt){
		"a component less": func(a *attempt) { a.covered = `("@method" "@authority" "@path" "@query")` },
		"a component less, too": func(a *attempt) {
			a.covered = `("@method" "@authority" "@path" "@query")`
			a.base = "\"@method\": POST\n\"@authority\": " + host + "\n\"@path\": /v1/users\n\"@query\": ?dry=1\n"
		},
		"a component more": func(a *attempt) {
			a.covered = `("@method" "@authority" "@path" "@query" "content-digest" "content-length")`
			a.base = "\"@method\": POST\n\"@authority\": " + host + "\n\"@path\": /v1/users\n\"@query\": ?dry=1\n\"content-digest\": " + a.digest + "\n\"content-length\": 18\n"
		},
		"another order of components": func(a *attempt) {
			a.covered = `("@authority" "@method" "@path" "@query" "content-digest")`
			a.base = "\"@authority\": " + host + "\n\"@method\": POST\n\"@path\": /v1/users\n\"@query\": ?dry=1\n\"content-digest\": " + a.digest + "\n"
		},
		"no components":              func(a *attempt) { a.covered, a.base = "()", "\n" },
		"a component twice":          func(a *attempt) { a.covered = strings.Replace(covered, " ", ` "@method" `, 1) },
		"a component with ;sf":       func(a *attempt) { a.covered = strings.Replace(covered, `digest"`, `digest";sf`, 1) },
		"a component with ;req":      func(a *attempt) { a.covered = strings.Replace(covered, `"@path"`, `"@path";req`, 1) },
		"two spaces":                 func(a *attempt) { a.covered = strings.Replace(covered, " ", "  ", 1) },
		"a tab":                      func(a *attempt) { a.covered = strings.Replace(covered, " ", "\t", 1) },
		"capital letters":            func(a *attempt) { a.covered = strings.Replace(covered, "content-digest", "Content-Digest", 1) },
		"a space inside":             func(a *attempt) { a.covered = strings.Replace(covered, "(", "( ", 1) },
		"a space before a parameter": func(a *attempt) { a.covered += " " },
		"no created": func(a *attempt) {
			a.params = covered + `;nonce="` + a.nonce + `";keyid="` + a.keyid + `";alg="ed25519";tag="unibus-v1"`
		},
		"no nonce": func(a *attempt) {
			a.params = covered + `;created=1795484695;keyid="` + a.keyid + `";alg="ed25519";tag="unibus-v1"`
		},
		"no key": func(a *attempt) {
			a.params = covered + `;created=1795484695;nonce="` + a.nonce + `";alg="ed25519";tag="unibus-v1"`
		},
		"no algorithm": func(a *attempt) {
			a.params = covered + `;created=1795484695;nonce="` + a.nonce + `";keyid="` + a.keyid + `";tag="unibus-v1"`
		},
		"no tag": func(a *attempt) {
			a.params = covered + `;created=1795484695;nonce="` + a.nonce + `";keyid="` + a.keyid + `";alg="ed25519"`
		},
		"no parameters": func(a *attempt) { a.params = covered },
		"another order of parameters": func(a *attempt) {
			a.params = covered + `;nonce="` + a.nonce + `";created=1795484695;keyid="` + a.keyid + `";alg="ed25519";tag="unibus-v1"`
		},
		"an expiry":                func(a *attempt) { a.created += ";expires=1895484695" },
		"a parameter at the end":   func(a *attempt) { a.tag += `";x="y` },
		"a parameter at the start": func(a *attempt) { a.covered += ";x" },
		"created twice":            func(a *attempt) { a.created += ";created=1795484695" },
		"a nonce twice":            func(a *attempt) { a.nonce += `";nonce="AAECAwQFBgcICQoLDA0ODx` },
		"a key twice":              func(a *attempt) { a.keyid += `";keyid="` + a.keyid },
		"created with a sign":      func(a *attempt) { a.created = "+1795484695" },
		"created with a zero":      func(a *attempt) { a.created = "01795484695" },
		"created with a fraction":  func(a *attempt) { a.created = "1795484695.0" },
		"created in hex":           func(a *attempt) { a.created = "0x6B04B117" },
		"created with underscores": func(a *attempt) { a.created = "1_795_484_695" },
		"created as a string":      func(a *attempt) { a.created = `"1795484695"` },
		"created as a date":        func(a *attempt) { a.created = "@1795484695" },
		"created before 1970":      func(a *attempt) { a.created = "-1795484695" },
		"created is zero":          func(a *attempt) { a.created = "0" },
		"created overflows":        func(a *attempt) { a.created = "18446744075505036311" },
		"created is huge":          func(a *attempt) { a.created = "9223372036854775807" },
		"created is empty":         func(a *attempt) { a.created = "" },
		"a nonce of 21":            func(a *attempt) { a.nonce = strings.Repeat("a", 21) },
		"a nonce of 65":            func(a *attempt) { a.nonce = strings.Repeat("a", 65) },
		"an empty nonce":           func(a *attempt) { a.nonce = "" },
		"a nonce in base64":        func(a *attempt) { a.nonce = "AAECAwQFBgcICQoLDA0O+/" },
		"a nonce with padding":     func(a *attempt) { a.nonce = "AAECAwQFBgcICQoLDA0ODw==" },
		"a nonce with a dot":       func(a *attempt) { a.nonce = "AAECAwQFBgcICQoLDA0O.." },
		"a nonce with a space":     func(a *attempt) { a.nonce = "AAECAwQFBgcICQoLDA0OD w" },
		"a nonce with an escape":   func(a *attempt) { a.nonce = `AAECAwQFBgcICQoLDA0OD\"w` },
		"a nonce beyond ASCII":     func(a *attempt) { a.nonce = "AAECAwQFBgcICQoLDA0ODä" },
		"a nonce without quotes": func(a *attempt) {
			a.params = covered + `;created=1795484695;nonce=` + a.nonce + `;keyid="` + a.keyid + `";alg="ed25519";tag="unibus-v1"`
		},
		"the key in hex":             func(a *attempt) { a.keyid = key.Hex() },
		"the key in small letters":   func(a *attempt) { a.keyid = strings.ToLower(a.keyid) },
		"the key is short":           func(a *attempt) { a.keyid = a.keyid[:55] },
		"the key is long":            func(a *attempt) { a.keyid += "A" },
		"the key is of another":      func(a *attempt) { a.keyid = "U" + strings.Repeat("A", 55) },
		"the key of a server":        func(a *attempt) { b, _ := nkeys.Encode(nkeys.PrefixByteServer, key[:]); a.keyid = string(b) },
		"the key is empty":           func(a *attempt) { a.keyid = "" },
		"the algorithm in capitals":  func(a *attempt) { a.alg = "Ed25519" },
		"another algorithm":          func(a *attempt) { a.alg = "hmac-sha256" },
		"no name of the algorithm":   func(a *attempt) { a.alg = "" },
		"another tag":                func(a *attempt) { a.tag = "unibus-v2" },
		"the tag in capitals":        func(a *attempt) { a.tag = "UNIBUS-V1" },
		"digest of nothing":          func(a *attempt) { a.digest = digestOf("") },
		"digest by name in capitals": func(a *attempt) { a.digest = strings.Replace(a.digest, "sha", "SHA", 1) },
		"digest by another hash":     func(a *attempt) { a.digest = strings.Replace(a.digest, "256", "512", 1) },
		"digest in hex": func(a *attempt) {
			sum := sha256.Sum256([]byte(a.body))
			a.digest = "sha-256=:" + hex.EncodeToString(sum[:]) + ":"
		},
		"digest as a token":    func(a *attempt) { a.digest = strings.ReplaceAll(a.digest, ":", "") },
		"two digests":          func(a *attempt) { a.digest += ", " + a.digest },
		"a digest and another": func(a *attempt) { a.digest += ", sha-512=:AA==:" },
		"digest without padding": func(a *attempt) {
			a.digest = strings.Replace(a.digest, "=:", ":", 2)
			a.digest = strings.Replace(a.digest, "256:", "256=:", 1)
		},
		"digest with a parameter":    func(a *attempt) { a.digest += ";x" },
		"another node's authority":   func(a *attempt) { a.host = "n2.example.org:8470" },
		"authority without port":     func(a *attempt) { a.host = "n1.example.org" },
		"authority with a dot":       func(a *attempt) { a.host = "n1.example.org.:8470" },
		"no authority":               func(a *attempt) { a.host = "" },
		"authority not that of Host": func(a *attempt) { a.authority, a.host = host, "n2.example.org:8470" },
		"Host not the authority":     func(a *attempt) { a.authority = "n2.example.org:8470" },
		"authority as in Host":       func(a *attempt) { a.host = strings.ToUpper(host) }, // signed in capitals
		"a small method":             func(a *attempt) { a.method = "post" },
		"a strange method":           func(a *attempt) { a.method = "M-SEARCH" },
		"a long method":              func(a *attempt) { a.method = strings.Repeat("A", 17) },
		"two lines in the method":    func(a *attempt) { a.method = "POST\n\"@authority\": " + host },
		"an empty query":             func(a *attempt) { a.target = "/v1/users?" },
		"a body too large":           func(a *attempt) { a.body = strings.Repeat("x", 64<<10+1); a.digest = digestOf(a.body) },
	}
	for _, target := range []string{
		"", "*", "v1/users", "https://" + host + "/v1/users", "http://evil.example/v1/users", "//evil.example/v1/users", "//v1/users", "/v1//users", "/v1/users//",
		"/v1/./users", "/v1/../users", "/..", "/.", "/v1/users/..", "/v1/users/.", "/v1/%2e%2e/users", "/v1/%2E./users", "/v1/a%2fb", "/v1/a%2Fb",
		"/v1/a%5cb", "/v1/a%5Cb", `/v1/a\b`, "/v1/a%00b", "/v1/a%0ab", "/v1/a%1Fb", "/v1/a%7fb", "/v1/users#top", "/v1/users?a#top", "/v1/a b", "/v1/a\tb", "/v1/a\x00b",
		"/v1/a\x7fb", "/v1/ä", "/v1/%", "/v1/%4", "/v1/%zz", "/v1/%+4", `/v1/"`, "/v1/<a>", "/v1/{room}", "/v1/a|b", "/v1/a^b", "/v1/[a]", "/v1/`",
		"/v1?a=%", "/v1?a=%zz", "/v1?a=\"", "/v1?a=%00", "/v1?a=%0d%0a", "/v1?a=ä", "/v1?a=[]", "/v1?a b", `/v1?a\`,
	} {
		signed[fmt.Sprintf("target %q", target)] = func(a *attempt) { a.target = target }
	}
	for name, change := range signed {
		a := honest(id)
		change(a)
		if got, err := verify(t, a.sign(t, id), moment); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		} else if strings.Contains(err.Error(), "wrong signature") && !strings.Contains(name, "authority") && !strings.Contains(name, "Host") {
			t.Errorf("%s: refused for its signature only: %v", name, err)
		}
	}

	afterwards := map[string]func(*message){
		"no digest":                     func(m *message) { m.digest = "" },
		"no input":                      func(m *message) { m.input = "" },
		"no signature":                  func(m *message) { m.signature = "" },
		"nothing":                       func(m *message) { m.digest, m.input, m.signature = "", "", "" },
		"the digest twice":              func(m *message) { m.lines = []string{"Content-Digest: " + m.digest} },
		"the input twice":               func(m *message) { m.lines = []string{"Signature-Input: " + m.input} },
		"the signature twice":           func(m *message) { m.lines = []string{"Signature: " + m.signature} },
		"an empty second digest":        func(m *message) { m.lines = []string{"content-digest:"} },
		"an empty second input":         func(m *message) { m.lines = []string{"signature-input:"} },
		"an empty second signature":     func(m *message) { m.lines = []string{"SIGNATURE:"} },
		"two inputs in one line":        func(m *message) { m.input += ", " + m.input },
		"two signatures in one line":    func(m *message) { m.signature += ", " + m.signature },
		"another label beside":          func(m *message) { m.input += `, ub2=("@method")`; m.signature += ", ub2=:AAAA:" },
		"another label before":          func(m *message) { m.input = `sig=("@method"), ` + m.input; m.signature = "sig=:AAAA:, " + m.signature },
		"another label":                 func(m *message) { m.input, m.signature = "ub2"+m.input[3:], "ub2"+m.signature[3:] },
		"the label in capitals":         func(m *message) { m.input, m.signature = "UB1"+m.input[3:], "UB1"+m.signature[3:] },
		"labels that differ":            func(m *message) { m.signature = "ub2" + m.signature[3:] },
		"no label":                      func(m *message) { m.input = m.input[4:] },
		"a parameter of the signature":  func(m *message) { m.signature += ";x" },
		"the signature without colons":  func(m *message) { m.signature = strings.ReplaceAll(m.signature, ":", "") },
		"the signature as a string":     func(m *message) { m.signature = strings.ReplaceAll(m.signature, ":", `"`) },
		"the signature without its end": func(m *message) { m.signature = m.signature[:len(m.signature)-1] },
		"the signature without padding": func(m *message) { m.signature = strings.Replace(m.signature, "==:", ":", 1) },
		"the signature with a space":    func(m *message) { m.signature = m.signature[:20] + " " + m.signature[20:] },
		"a signature of 63 bytes":       func(m *message) { m.signature = reencode(t, m.signature, func(b []byte) []byte { return b[:63] }) },
		"a signature of 65 bytes": func(m *message) {
			m.signature = reencode(t, m.signature, func(b []byte) []byte { return append(b, 0) })
		},
		"an empty signature": func(m *message) { m.signature = "ub1=::" },
		"a signature of zeroes": func(m *message) {
			m.signature = reencode(t, m.signature, func([]byte) []byte { return make([]byte, 64) })
		},
		"S beyond the order": func(m *message) { m.signature = reencode(t, m.signature, beyondOrder) },
		"the signature in hex": func(m *message) {
			m.signature = "ub1=:" + hex.EncodeToString(decode(t, m.signature[5:len(m.signature)-1])) + ":"
		},
		"base64 with spare bits": func(m *message) { // the same 64 bytes, spelled another way
			i := len(m.signature) - 4
			c := m.signature[i]
			m.signature = m.signature[:i] + string(rune(c+1)) + m.signature[i+1:]
		},
		"a coded body":            func(m *message) { m.lines = []string{"Content-Encoding: gzip"} },
		"a body coded as itself":  func(m *message) { m.lines = []string{"Content-Encoding: identity"} },
		"an empty coding":         func(m *message) { m.lines = []string{"Content-Encoding:"} },
		"a promise of a trailer":  func(m *message) { m.lines = []string{"Trailer: X"} },
		"a trailer":               func(m *message) { m.trailer = "X: y" },
		"a signature as trailer":  func(m *message) { m.trailer, m.signature = "Signature: "+m.signature, "" },
		"a promised trailer":      func(m *message) { m.lines, m.trailer = []string{"Trailer: X"}, "X: y" },
		"another body":            func(m *message) { m.body = `{"handle":"mallo"}` },
		"no body":                 func(m *message) { m.body = "" },
		"a longer body":           func(m *message) { m.body += "\n" },
		"body and digest changed": func(m *message) { m.body = "{}"; m.digest = digestOf("{}") },
		"another method":          func(m *message) { m.method = "PUT" },
		"a method less specific":  func(m *message) { m.method = "GET" },
		"another path":            func(m *message) { m.target = "/v1/rooms?dry=1" },
		"a path escaped anew":     func(m *message) { m.target = "/v1/%75sers?dry=1" },
		"no query":                func(m *message) { m.target = "/v1/users" },
		"a query escaped anew":    func(m *message) { m.target = "/v1/users?%64ry=1" },
		"a longer query":          func(m *message) { m.target += "&x" },
		"another host":            func(m *message) { m.host = "n2.example.org:8470" },
		"another host, forwarded": func(m *message) {
			m.host = "n2.example.org:8470"
			m.lines = []string{"X-Forwarded-Host: " + host, "Forwarded: host=" + host, "X-Original-Host: " + host}
		},
		"absolute form":             func(m *message) { m.target = "https://" + host + m.target },
		"absolute form, other Host": func(m *message) { m.target = "http://" + host + m.target; m.host = "n2.example.org:8470" },
	}
	for name, change := range afterwards {
		m := honest(id).sign(t, id)
		change(m)
		if got, err := verify(t, m, moment); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
}

func reencode(tb testing.TB, field string, change func([]byte) []byte) string {
	tb.Helper()
	return "ub1=:" + base64.StdEncoding.EncodeToString(change(decode(tb, field[5:len(field)-1]))) + ":"
}

// beyondOrder adds the group's order to S: the equation still holds.
func beyondOrder(signature []byte) []byte {
	order, _ := new(big.Int).SetString("7237005577332262213973186563042994240857116359379907606001950938285454250989", 10)
	s := slices.Clone(signature[32:])
	slices.Reverse(s)
	sum := new(big.Int).Add(new(big.Int).SetBytes(s), order).FillBytes(make([]byte, 32))
	slices.Reverse(sum)
	return append(slices.Clone(signature[:32]), sum...)
}

// What the profile leaves free may vary, and what it never reads does no harm:
// without this, a Verify that refuses everything would pass the tests above.
func TestWhatIsAccepted(t *testing.T) {
	_, id := loadVectors(t)
	signed := map[string]func(*attempt){
		"an escaped path":      func(a *attempt) { a.target = "/v1/rooms/ops/blobs/a%20b%25%C3%A4" },
		"all of RFC 3986":      func(a *attempt) { a.target = "/v1/-._~!$&'()*+,;=:@/a?-._~!$&'()*+,;=:@/?%20x" },
		"dots in names":        func(a *attempt) { a.target = "/v1/.../a..b/.c/d." },
		"the root":             func(a *attempt) { a.target = "/" },
		"a slash at the end":   func(a *attempt) { a.target = "/v1/users/" },
		"no query":             func(a *attempt) { a.target = "/v1/users" },
		"Host in capitals":     func(a *attempt) { a.authority, a.host = host, strings.ToUpper(host) },
		"a nonce of 64":        func(a *attempt) { a.nonce = strings.Repeat("-_", 32) },
		"no body":              func(a *attempt) { a.method, a.body, a.digest = "GET", "", digestOf("") },
		"the largest body":     func(a *attempt) { a.body = strings.Repeat("x", 64<<10); a.digest = digestOf(a.body) },
		"a body of all bytes":  func(a *attempt) { a.body = "\x00\r\n\xff\xfe"; a.digest = digestOf(a.body) },
		"a method of the user": func(a *attempt) { a.method = "PROPFIND" },
	}
	for name, change := range signed {
		a := honest(id)
		change(a)
		if _, err := verify(t, a.sign(t, id), moment); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	m := honest(id).sign(t, id)
	m.lines = []string{"X-Forwarded-Host: evil.example", "X-Forwarded-For: 10.0.0.1", "Forwarded: host=evil.example", "X-HTTP-Method-Override: DELETE", "Content-Type: text/plain", "Authorization: Bearer x"}
	if _, err := verify(t, m, moment); err != nil {
		t.Errorf("headers that are never read: %v", err)
	}
}

// Nobody but the holder of the key can change a byte of what is signed, of the
// signature, or of what it says about itself.
func TestEveryByteOfARequestIsSigned(t *testing.T) {
	_, id := loadVectors(t)
	parts := map[string]func(*message) *string{
		"method":          func(m *message) *string { return &m.method },
		"target":          func(m *message) *string { return &m.target },
		"host":            func(m *message) *string { return &m.host },
		"body":            func(m *message) *string { return &m.body },
		"Content-Digest":  func(m *message) *string { return &m.digest },
		"Signature-Input": func(m *message) *string { return &m.input },
		"Signature":       func(m *message) *string { return &m.signature },
	}
	for name, part := range parts {
		tried := 0
		original := *part(honest(id).sign(t, id))
		for i := range len(original) {
			variants := []string{original[:i] + original[i+1:], original[:i] + original[i:i+1] + original[i:]}
			for _, c := range []byte{original[i] ^ 1, original[i] ^ 0x20, original[i] ^ 0x80, original[i] + 1, 'A', '0', '"', ';', '/', ' ', 0, '\n'} {
				variants = append(variants, original[:i]+string([]byte{c})+original[i+1:])
			}
			for _, v := range variants {
				// The case of a host does not matter.
				if v == original || name == "host" && strings.EqualFold(v, original) {
					continue
				}
				tried++
				m := honest(id).sign(t, id)
				*part(m) = v
				r := m.byHand()
				if got, err := sig.Verify(r, []byte(m.body), []string{host}, moment); err == nil {
					t.Errorf("%s %q: accepted as %+v", name, v, got)
				}
				if r, body, err := received(m.wire()); err == nil && !sameOnTheWire(r, body, honest(id).sign(t, id)) {
					if got, err := sig.Verify(r, body, []string{host}, moment); err == nil {
						t.Errorf("%s %q on the wire: accepted as %+v", name, v, got)
					}
				}
			}
		}
		if tried < 10*len(original) {
			t.Errorf("%s: only %d variants", name, tried)
		}
	}
}

// sameOnTheWire is for changes that never arrive: net/http trims spaces around
// the value of a header.
func sameOnTheWire(r *http.Request, body []byte, m *message) bool {
	return r.Method == m.method && r.RequestURI == m.target && r.Host == m.host && string(body) == m.body &&
		slices.Equal(r.Header["Content-Digest"], []string{m.digest}) && slices.Equal(r.Header["Signature-Input"], []string{m.input}) &&
		slices.Equal(r.Header["Signature"], []string{m.signature})
}

// For a key of low order one fixed signature verifies every message; such a
// key is no user's, here neither.
func TestKeysThatAnyoneCouldSignForSignNoRequest(t *testing.T) {
	_, id := loadVectors(t)
	forged := append([]byte{1}, make([]byte, 63)...) // R the identity, S zero
	worked := 0
	for _, h := range []string{
		"0100000000000000000000000000000000000000000000000000000000000000",
		"0100000000000000000000000000000000000000000000000000000000000080",
		"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"0000000000000000000000000000000000000000000000000000000000000000",
		"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
		"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
		"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	} {
		raw, err := hex.DecodeString(h)
		if err != nil {
			t.Fatal(err)
		}
		nkey, err := nkeys.Encode(nkeys.PrefixByteUser, raw)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 32 { // order 8: one message in eight
			a := honest(id)
			a.keyid, a.nonce = string(nkey), fmt.Sprintf("AAECAwQFBgcICQoLDA0O%02d", i)
			m := a.sign(t, id)
			if ed25519.Verify(raw, []byte(a.base+`"@signature-params": `+a.params), forged) {
				worked++
			}
			m.signature = "ub1=:" + base64.StdEncoding.EncodeToString(forged) + ":"
			if got, err := verify(t, m, moment); err == nil {
				t.Errorf("key %s: accepted as %+v", h, got)
			} else if !strings.Contains(err.Error(), "keyid") {
				t.Errorf("key %s: refused for another reason: %v", h, err)
			}
		}
	}
	if worked < 40 {
		t.Errorf("only %d signatures were forged: the test shows nothing", worked)
	}
}

// The window is 60 s to either side, its ends included, and an error is called
// skew only if nothing but the clock is wrong.
func TestWindow(t *testing.T) {
	_, id := loadVectors(t)
	created := time.Unix(1795484695, 0)
	for _, tc := range []struct {
		now  time.Time
		skew bool
	}{
		{created, false},
		{created.Add(60 * time.Second), false},
		{created.Add(60*time.Second + 1), true},
		{created.Add(-60 * time.Second), false},
		{created.Add(-60*time.Second - 1), true},
		{created.Add(time.Hour), true},
		{created.Add(-time.Hour), true},
		{time.Unix(0, 0), true},
		{time.Time{}, true},
		{time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), true},
	} {
		got, err := verify(t, honest(id).sign(t, id), tc.now)
		if errors.Is(err, sig.ErrSkew) != tc.skew || (err != nil) != tc.skew {
			t.Errorf("%s after: %+v, %v", tc.now.Sub(created), got, err)
		}
		if err == nil && (!got.Created.Equal(created) || got.Nonce != honest(id).nonce) {
			t.Errorf("%+v", got)
		}
		m := honest(id).sign(t, id)
		m.method = "PUT"
		if _, err := verify(t, m, tc.now); err == nil || errors.Is(err, sig.ErrSkew) {
			t.Errorf("%s after, with a wrong signature: %v", tc.now.Sub(created), err)
		}
	}
	a := honest(id)
	a.created = "9223372036854775807"
	if _, err := verify(t, a.sign(t, id), moment); !errors.Is(err, sig.ErrSkew) {
		t.Errorf("created far ahead: %v", err)
	}
}

// A server is meant by its own names only, whatever proxies add.
func TestAuthorities(t *testing.T) {
	_, id := loadVectors(t)
	for _, tc := range []struct {
		sent        string
		authorities []string
		ok          bool
	}{
		{host, []string{host}, true},
		{host, []string{"bus.example.org", host}, true},
		{host, []string{"N1.Example.org:8470"}, true},
		{host, nil, false},
		{host, []string{""}, false},
		{host, []string{"n1.example.org"}, false},
		{host, []string{"n1.example.org:847"}, false},
		{host, []string{"*"}, false},
		{"bus.example.org", []string{"bus.example.org:443"}, false},
		{"[2001:db8::1]:8470", []string{"[2001:db8::1]:8470"}, true},
		{"", []string{""}, false},
		{"b\u212a.example", []string{"bk.example"}, false}, // strings.ToLower makes a k of it
	} {
		a := honest(id)
		a.host = tc.sent
		if strings.Contains(tc.sent, "\u212a") {
			a.authority = "bk.example"
		}
		r := a.sign(t, id).byHand()
		if _, err := sig.Verify(r, []byte(a.body), tc.authorities, moment); (err == nil) != tc.ok {
			t.Errorf("%q for %q: %v", tc.sent, tc.authorities, err)
		}
	}
}

// The URL that a router reads is the one that was signed.
func TestARewrittenRequestIsRefused(t *testing.T) {
	_, id := loadVectors(t)
	for name, rewrite := range map[string]func(*http.Request){
		"prefix stripped": func(r *http.Request) { r.URL.Path = strings.TrimPrefix(r.URL.Path, "/v1") },
		"raw path":        func(r *http.Request) { r.URL.RawPath = "/v1/%75sers"; r.URL.Path = "/v1/users" },
		"query":           func(r *http.Request) { r.URL.RawQuery = "dry=0" },
		"host":            func(r *http.Request) { r.URL.Host = "n2.example.org:8470" },
		"no URL":          func(r *http.Request) { r.URL = nil },
		"a client's own":  func(r *http.Request) { r.RequestURI = "" },
	} {
		m := honest(id).sign(t, id)
		r := m.byHand()
		if _, err := sig.Verify(r, []byte(m.body), []string{host}, moment); err != nil {
			t.Fatal(err)
		}
		rewrite(r)
		if got, err := sig.Verify(r, []byte(m.body), []string{host}, moment); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
}

// Nothing that a NATS server can have a client sign is a signature base.
func TestNoNonceOfNATSIsASignatureBase(t *testing.T) {
	nonce := regexp.MustCompile(`^[A-Za-z0-9_-]{11,64}$`)
	all, id := loadVectors(t)
	for _, v := range all.Requests {
		signer := &recorder{Identity: id}
		if err := sig.Sign(v.request(t), []byte(v.Body), signer, v.at(), v.Nonce); err != nil {
			t.Fatal(err)
		}
		if signer.message[0] != '"' || nonce.Match(signer.message) {
			t.Errorf("%q", signer.message)
		}
	}
}

// Sign makes nothing that Verify would refuse, and leaves the request alone if
// it cannot.
func TestSignRefusesWhatNoServerAccepts(t *testing.T) {
	_, id := loadVectors(t)
	const good = "AAECAwQFBgcICQoLDA0ODw"
	for name, tc := range map[string]struct {
		url    string
		nonce  string
		at     time.Time
		body   int
		change func(*http.Request)
	}{
		"short nonce":      {nonce: "x"},
		"nonce with quote": {nonce: `AAECAwQFBgcICQoLDA0OD"`},
		"no time":          {at: time.Time{}.Add(1)},
		"large body":       {body: 64<<10 + 1},
		"small method":     {change: func(r *http.Request) { r.Method = "get" }},
		"coded body":       {change: func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") }},
		"trailer":          {change: func(r *http.Request) { r.Trailer = http.Header{"X": nil} }},
		"double slash":     {url: "https://" + host + "/v1//users"},
		"encoded slash":    {url: "https://" + host + "/v1/a%2fb"},
		"parent":           {url: "https://" + host + "/v1/../users"},
		"empty query":      {url: "https://" + host + "/v1/users?"},
		"fragment":         {url: "https://" + host + "/v1/users#x"},
		"password":         {url: "https://a:b@" + host + "/v1/users"},
		"opaque":           {url: "mailto:a"},
		"no host":          {url: "/v1/users"},
		"host of others":   {change: func(r *http.Request) { r.Host = "a/b" }},
	} {
		if tc.url == "" {
			tc.url = "https://" + host + "/v1/users"
		}
		if tc.nonce == "" {
			tc.nonce = good
		}
		if tc.at.IsZero() {
			tc.at = moment
		}
		req, err := http.NewRequest("GET", tc.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if tc.change != nil {
			tc.change(req)
		}
		before := req.Clone(t.Context())
		if err := sig.Sign(req, make([]byte, tc.body), id, tc.at, tc.nonce); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%s: %v, want invalid", name, err)
		}
		if len(req.Header) != len(before.Header) || req.Host != before.Host {
			t.Errorf("%s: the request was changed", name)
		}
	}
}

type brokenSigner struct {
	*sig.Identity
	signature []byte
	err       error
}

func (b brokenSigner) Sign([]byte) ([]byte, error) { return b.signature, b.err }

// A request is signed again for each attempt, under the name it is sent to.
func TestSignAgain(t *testing.T) {
	_, id := loadVectors(t)
	req, err := http.NewRequest("", "https://N1.Example.org:443", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Method, req.Header = "", nil
	for range 2 {
		nonce, err := sig.NewNonce(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if err := sig.Sign(req, nil, id, moment, nonce); err != nil {
			t.Fatal(err)
		}
		r, body := sent(t, req)
		got, err := sig.Verify(r, body, []string{"n1.example.org"}, moment)
		if err != nil || got.Nonce != nonce || r.RequestURI != "/" {
			t.Errorf("%+v, %v", got, err)
		}
	}
	for _, b := range []brokenSigner{{id, nil, errors.New("no")}, {id, make([]byte, 63), nil}} {
		req, _ := http.NewRequest("GET", "https://"+host, nil)
		if err := sig.Sign(req, nil, b, moment, "AAECAwQFBgcICQoLDA0ODw"); bus.CodeOf(err) != bus.Internal || len(req.Header) != 0 {
			t.Errorf("%v, %v", err, req.Header)
		}
	}
}

// What clients and servers of net/http make of a request on the way, with
// either version of HTTP, does not break its signature.
func TestOverTheWire(t *testing.T) {
	_, id := loadVectors(t)
	var authority string
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		if _, err := sig.Verify(r, body, []string{authority}, moment); err != nil {
			http.Error(w, err.Error(), http.StatusUnauthorized)
			return
		}
		fmt.Fprint(w, r.Proto)
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	authority = srv.Listener.Addr().String()

	old := srv.Client().Transport.(*http.Transport).Clone()
	old.ForceAttemptHTTP2, old.TLSClientConfig.NextProtos = false, nil
	old.TLSNextProto = nil
	old.Protocols = new(http.Protocols)
	old.Protocols.SetHTTP1(true)
	for proto, client := range map[string]*http.Client{"HTTP/1.1": {Transport: old}, "HTTP/2.0": srv.Client()} {
		for name, tc := range map[string]struct {
			method, target, body string
			after                func(*http.Request)
			refused              bool
		}{
			"get":     {method: "GET", target: "/v1/rooms/ops/messages?after=17&limit=100"},
			"post":    {method: "POST", target: "/v1/users", body: `{"handle":"alice"}`},
			"chunked": {method: "PUT", target: "/v1/users/a%20b", body: "x", after: func(r *http.Request) { r.ContentLength = -1 }},
			"trailer": {method: "PUT", target: "/v1/users", body: "x", refused: true, after: func(r *http.Request) {
				r.ContentLength, r.Trailer = -1, http.Header{"X": {"y"}}
			}},
			"other path": {method: "PUT", target: "/v1/users", body: "x", refused: true, after: func(r *http.Request) { r.URL.Path = "/v1/rooms" }},
		} {
			req, err := http.NewRequestWithContext(t.Context(), tc.method, srv.URL+tc.target, strings.NewReader(tc.body))
			if err != nil {
				t.Fatal(err)
			}
			if err := sig.Sign(req, []byte(tc.body), id, moment, "AAECAwQFBgcICQoLDA0ODw"); err != nil {
				t.Fatal(err)
			}
			if tc.after != nil {
				tc.after(req)
			}
			res, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			said, _ := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if want := map[bool]int{false: 200, true: 401}[tc.refused]; res.StatusCode != want || res.Proto != proto || want == 200 && string(said) != proto {
				t.Errorf("%s over %s: %d, %s: %s", name, proto, res.StatusCode, res.Proto, said)
			}
		}
	}
}

// An identity is one line of one user's seed, and shows itself to nobody.
func TestIdentity(t *testing.T) {
	all, id := loadVectors(t)
	for _, text := range []string{fmt.Sprint(id), fmt.Sprintf("%+v", id), fmt.Sprintf("%#v", id), fmt.Sprintf("%x", id), fmt.Sprintf("%v", *id), fmt.Sprintf("%v", struct{ I *sig.Identity }{id})} {
		if !strings.Contains(text, id.Key().NKey()) && !strings.Contains(text, "0x") || strings.Contains(text, "000102030405") || strings.Contains(text, "0 1 2 3 4 5") {
			t.Errorf("prints as %q", text)
		}
	}
	account, err := nkeys.EncodeSeed(nkeys.PrefixByteAccount, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "SU", all.Key, all.Seed[:57], all.Seed + "A", all.Seed + "\n" + all.Seed, strings.ToLower(all.Seed), string(account)} {
		if _, err := sig.ParseIdentity([]byte(bad)); bus.CodeOf(err) != bus.Invalid || len(bad) > 10 && strings.Contains(err.Error(), bad) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	nonce, err := sig.NewNonce(bytes.NewReader([]byte("\xff\xfe\xfd\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c")))
	if want := "__79AAECAwQFBgcICQoLDA"; err != nil || nonce != want {
		t.Errorf("nonce %q, %v, want %q", nonce, err, want)
	}
	if _, err := sig.NewNonce(strings.NewReader("short")); err == nil {
		t.Error("a nonce of five bytes")
	}
}

var (
	fuzzedTarget = regexp.MustCompile(`^(/([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*)+(\?([A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})+)?$`)
	fuzzedPath   = regexp.MustCompile(`//|/\.\.?(/|$)|%(0|1|2[ef]|5c|7f)`)
	fuzzedInput  = regexp.MustCompile(`^ub1=\("@method" "@authority" "@path" "@query" "content-digest"\);created=[1-9][0-9]*;nonce="[A-Za-z0-9_-]{22,64}";keyid="U[A-Z2-7]{55}";alg="ed25519";tag="unibus-v1"$`)
)

// FuzzVerify hands raw requests to Verify, and lends the fuzzer the key, so
// that it gets past the signature. Whatever verifies is of the grammar, and is
// to the byte what Sign makes of it.
func FuzzVerify(f *testing.F) {
	all, id := loadVectors(f)
	for _, v := range all.Requests {
		req := v.request(f)
		if err := sig.Sign(req, []byte(v.Body), id, v.at(), v.Nonce); err != nil {
			f.Fatal(err)
		}
		var wire bytes.Buffer
		if err := req.Write(&wire); err != nil {
			f.Fatal(err)
		}
		f.Add(wire.Bytes(), false)
		f.Add(wire.Bytes(), true)
	}
	m := honest(id).sign(f, id)
	m.trailer = "X: y"
	f.Add(m.wire(), true)
	f.Fuzz(func(t *testing.T, wire []byte, sign bool) {
		r, body, err := received(wire)
		if err != nil {
			return
		}
		if sign {
			a := &attempt{
				method: r.Method, target: r.RequestURI, host: r.Host, authority: strings.ToLower(r.Host), digest: digestOf(string(body)),
				params: strings.TrimPrefix(r.Header.Get("Signature-Input"), "ub1="),
			}
			m := a.sign(t, id)
			r.Header.Set("Content-Digest", m.digest)
			r.Header.Set("Signature", m.signature)
		}
		got, err := sig.Verify(r, body, []string{r.Host}, moment)
		if err != nil {
			if bus.CodeOf(err) != bus.Unauthenticated || got != (sig.Verified{}) || !printable.MatchString(err.Error()) {
				t.Errorf("refused as %+v, %s %q", got, bus.CodeOf(err), err)
			}
			return
		}
		path, _, _ := strings.Cut(r.RequestURI, "?")
		if !fuzzedTarget.MatchString(r.RequestURI) || fuzzedPath.MatchString(strings.ToLower(path)) || !fuzzedInput.MatchString(r.Header.Get("Signature-Input")) {
			t.Errorf("accepted %q", wire)
		}
		if got.Key != id.Key() || moment.Sub(got.Created).Abs() > sig.Window || len(r.Trailer) > 0 || len(r.Header["Content-Encoding"]) > 0 {
			t.Errorf("accepted as %+v: %q", got, wire)
		}
		again, err := http.NewRequest(r.Method, "http://x"+r.RequestURI, nil)
		if err != nil {
			t.Fatal(err)
		}
		again.Host = r.Host
		if err := sig.Sign(again, body, id, got.Created, got.Nonce); err != nil {
			t.Fatalf("%v: %q", err, wire)
		}
		for name, want := range again.Header {
			if !slices.Equal(r.Header[name], want) {
				t.Errorf("%s: %q, want %q", name, r.Header[name], want)
			}
		}
	})
}

func BenchmarkSign(b *testing.B) {
	all, id := loadVectors(b)
	v := all.Requests[2]
	req, body := v.request(b), []byte(v.Body)
	b.ReportAllocs()
	for b.Loop() {
		if err := sig.Sign(req, body, id, v.at(), v.Nonce); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	all, id := loadVectors(b)
	v := all.Requests[2]
	req := v.request(b)
	if err := sig.Sign(req, []byte(v.Body), id, v.at(), v.Nonce); err != nil {
		b.Fatal(err)
	}
	r, body := sent(b, req)
	authorities := []string{"bus.example.org", req.Host}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := sig.Verify(r, body, authorities, v.at()); err != nil {
			b.Fatal(err)
		}
	}
}

// A body that is streamed is signed as any other: whoever has it can tell, and
// nobody acts on another one.
func TestStreamsAreSignedAlike(t *testing.T) {
	id, err := sig.ParseIdentity([]byte("SUAAAAICAMCAKBQHBAEQUCYMBUHA6EARCIJRIFIWC4MBSGQ3DQOR4H776Y"))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1795484697, 0)
	build := func(sign func(r *http.Request) error) *http.Request {
		r, err := http.NewRequest(http.MethodPut, "https://n1.example.org:8470/v1/rooms/ops/blobs/x", nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := sign(r); err != nil {
			t.Fatal(err)
		}
		r.RequestURI = r.URL.RequestURI()
		r.URL.Host, r.URL.Scheme = "", ""
		return r
	}
	body := []byte("content")
	nonce := strings.Repeat("n", 22)
	whole := build(func(r *http.Request) error { return sig.Sign(r, body, id, now, nonce) })
	stream := build(func(r *http.Request) error { return sig.SignStream(r, sig.DigestOf(body), id, now, nonce) })
	if whole.Header.Get("Signature") != stream.Header.Get("Signature") {
		t.Error("one body has two signatures")
	}
	v, digest, err := sig.VerifyStream(stream, []string{"n1.example.org:8470"}, now)
	if err != nil || digest != sig.DigestOf(body) || v.Key != id.Key() {
		t.Errorf("%+v %x %v", v, digest, err)
	}
	if _, err := sig.Verify(stream, []byte("other"), []string{"n1.example.org:8470"}, now); err == nil {
		t.Error("another body is accepted")
	}
	for _, field := range []string{"", "sha-256=", "sha-512=:" + strings.Repeat("A", 43) + "=:", "sha-256=:" + strings.Repeat("A", 43) + ":", sig.DigestOf(body).Field() + " ", "sha-256=:AAAA:"} {
		if _, ok := sig.ParseDigest(field); ok {
			t.Errorf("%q is a digest", field)
		}
		r := stream.Clone(t.Context())
		r.Header.Set("Content-Digest", field)
		if _, _, err := sig.VerifyStream(r, []string{"n1.example.org:8470"}, now); err == nil {
			t.Errorf("Content-Digest %q is accepted", field)
		}
	}
	if d, ok := sig.ParseDigest(sig.DigestOf(nil).Field()); !ok || d != sig.DigestOf(nil) {
		t.Error("a digest is not read as it is written")
	}
}
