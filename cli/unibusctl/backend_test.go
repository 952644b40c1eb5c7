package main

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
)

// A question about a subject is answered as the server would act: everything
// that the subject matches has to be allowed.
func TestCovers(t *testing.T) {
	for _, tt := range []struct {
		rule, subject string
		want          bool
	}{
		{"room.ops.UA.>", "room.ops.UA.x", true},
		{"room.ops.UA.>", "room.ops.UA.x.y", true},
		{"room.ops.UA.>", "room.ops.UA", false},
		{"room.ops.UA.>", "room.ops.UB.x", false},
		{"room.ops.UA.>", "room.opsx.UA.x", false},
		{"room.ops.>", "room.ops.>", true},
		{"room.ops.>", "room.ops.*.x", true},
		{"room.ops.>", "room.*.>", false},
		{"room.ops.>", "room.>", false},
		{"room.ops.>", ">", false},
		{"room.ops.>", "*.ops.x", false},
		{"a.*.c", "a.b.c", true},
		{"a.*.c", "a.*.c", true},
		{"a.*.c", "a.>", false},
		{"a.*", "a.>", false},
		{"a.*", ">", false},
		{"a.*.c", "a.b.c.d", false},
		{"a.*.c", "a.b", false},
		{"a.b", "a.*", false},
	} {
		if got := covers(tt.rule, tt.subject); got != tt.want {
			t.Errorf("%s covers %s: %t", tt.rule, tt.subject, got)
		}
	}
	for s, want := range map[string][2]bool{ // publish, subscribe
		"a": {true, true}, "a.b": {true, true}, "a.*": {false, true}, "a.>": {false, true}, ">": {false, true}, "a*": {true, true},
		"": {}, ".": {}, "a.": {}, ".a": {}, "a..b": {}, "a b": {}, "a.>.b": {}, "a.b\n": {},
	} {
		if validSubject(s, false) != want[0] || validSubject(s, true) != want[1] {
			t.Errorf("%q is valid to publish %t, to subscribe %t", s, validSubject(s, false), validSubject(s, true))
		}
	}
}

func TestWhen(t *testing.T) {
	a, _, _ := testApp()
	now := time.Date(2027, 1, 10, 12, 0, 0, 0, time.UTC)
	a.now = func() time.Time { return now }
	for _, tt := range []struct {
		s    string
		sign int
		want time.Time
	}{
		{"2027-02-01", 1, time.Date(2027, 2, 1, 0, 0, 0, 0, time.UTC)},
		{"2027-02-01T10:00:00+02:00", 1, time.Date(2027, 2, 1, 8, 0, 0, 0, time.UTC)},
		{"36h", 1, now.Add(36 * time.Hour)},
		{"30d", 1, now.Add(30 * 24 * time.Hour)},
		{"7d", -1, now.Add(-7 * 24 * time.Hour)},
		{"", 1, time.Time{}},
		{"-1h", 1, time.Time{}},
		{"0", 1, time.Time{}},
		{"+3d", 1, time.Time{}},
		{"3d4h", 1, time.Time{}},
		{"99999999d", 1, time.Time{}},
		{"tomorrow", 1, time.Time{}},
	} {
		got, err := a.parseWhen(tt.s, tt.sign)
		if !got.Equal(tt.want) || (err != nil) != tt.want.IsZero() {
			t.Errorf("%q: %s, %v", tt.s, got, err)
		}
	}
}

// The servers of an API are where every node of unibus has them.
func TestNATSOfAPI(t *testing.T) {
	for api, want := range map[string]string{
		"https://n1:8470,https://n2:8470": "tls://n1:4250,tls://n2:4250",
		"https://127.0.0.1:8672":          "tls://127.0.0.1:4452",
		"https://[::1]:8470":              "tls://[::1]:4250",
		"https://bus.example.org":         "tls://bus.example.org:4250",
		"https://bus.example.org:443":     "tls://bus.example.org:4250",
	} {
		if got := natsOf(api); got != want {
			t.Errorf("%s: %s, want %s", api, got, want)
		}
	}
}

// A CA is taken from a connection only if its fingerprint is the expected one,
// it is an authority, and it has signed the very certificate of that host.
func TestPinnedCA(t *testing.T) {
	a, _, _ := testApp()
	a.now, a.rand = time.Now, rand.Reader
	ours, err := a.minter().authority(clientCA)
	if err != nil {
		t.Fatal(err)
	}
	other, err := a.minter().authority(clientCA)
	if err != nil {
		t.Fatal(err)
	}
	leafOf := func(ca *keyPair, name string) *keyPair {
		leaf, err := a.minter().leaf(ca, apiLeaf, "n1", []string{name})
		if err != nil {
			t.Fatal(err)
		}
		return leaf
	}
	pinOf := func(c *x509.Certificate) string {
		sum := sha256.Sum256(c.Raw)
		return hex.EncodeToString(sum[:])
	}
	good, foreign := leafOf(ours, "127.0.0.1"), leafOf(other, "127.0.0.1")
	elsewhere := leafOf(ours, "192.0.2.1")
	for _, tt := range []struct {
		name  string
		leaf  *keyPair
		chain []*x509.Certificate
		pin   string
		why   string // empty: taken
	}{
		{"the right one", good, []*x509.Certificate{ours.cert}, pinOf(ours.cert), ""},
		{"not shown", good, nil, pinOf(ours.cert), "does not show a CA"},
		{"another one", foreign, []*x509.Certificate{other.cert}, pinOf(ours.cert), "does not show a CA"},
		{"shown by somebody else", foreign, []*x509.Certificate{ours.cert}, pinOf(ours.cert), "has not signed its own certificate"},
		{"for another host", elsewhere, []*x509.Certificate{ours.cert}, pinOf(ours.cert), "has not signed its own certificate"},
		{"a leaf is no CA", good, []*x509.Certificate{ours.cert}, pinOf(good.cert), "does not show a CA"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv := httptest.NewUnstartedServer(http.NotFoundHandler())
			pair := tls.Certificate{Certificate: [][]byte{tt.leaf.cert.Raw}, PrivateKey: tt.leaf.key}
			for _, c := range tt.chain {
				pair.Certificate = append(pair.Certificate, c.Raw)
			}
			srv.Config.ErrorLog = log.New(io.Discard, "", 0)
			srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
			srv.StartTLS()
			defer srv.Close()
			u, err := url.Parse(srv.URL)
			if err != nil {
				t.Fatal(err)
			}
			ca, err := pinnedCA(t.Context(), u, tt.pin, time.Now())
			switch {
			case tt.why == "" && (err != nil || !ca.Equal(ours.cert)):
				t.Errorf("not taken: %v", err)
			case tt.why != "" && (bus.CodeOf(err) != bus.Unauthenticated || !strings.Contains(err.Error(), tt.why)):
				t.Errorf("got %v, want %q", err, tt.why)
			}
		})
	}
}

// served runs commands against an API that always gives one answer: some come
// from a real cluster once in a blue moon.
func served(t *testing.T, status int, contentType, body string) func(args ...string) (code int, stdout, stderr string) {
	t.Helper()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(srv.Close)
	ca, seed := filepath.Join(t.TempDir(), "ca.crt"), filepath.Join(t.TempDir(), "me.nk")
	err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return func(args ...string) (int, string, string) {
		a, out, errw := testApp()
		a.now, a.rand = time.Now, rand.Reader
		if !exists(seed) {
			if _, err := a.makeIdentity(seed, false); err != nil {
				t.Fatal(err)
			}
		}
		code := a.run(t.Context(), append(args, "--api-url", srv.URL, "--ca", ca, "--identity", seed))
		return code, out.String(), errw.String()
	}
}

// A change that is committed and not proven is exit code 3 and says what to do;
// with --json its object is there all the same.
func TestUnprovenChange(t *testing.T) {
	run := served(t, http.StatusAccepted, "application/json", `{"what":"revoked alice","revision":9,"expired":[],"verified":false,"waiting":["authcallout-n3"]}`)
	const said = "unibusctl: revoked alice: committed, not proven: revision 9, still waiting for authcallout-n3\nTry: repeat unibusctl user revoke: it proves again\n"
	code, out, errw := run("user", "revoke", "alice", "--yes")
	if code != exitNotProven || errw != said || out != "" {
		t.Errorf("exit %d: %q %q", code, out, errw)
	}
	code, out, errw = run("user", "revoke", "alice", "--yes", "--json")
	if code != exitNotProven || errw != said || !strings.Contains(out, `"verified": false`) || !strings.Contains(out, `"revision": 9`) {
		t.Errorf("with --json: exit %d: %q %q", code, out, errw)
	}
	code, out, errw = run("api", "POST", "/v1/users/alice/revoke")
	if code != exitNotProven || !strings.Contains(out, `"waiting":["authcallout-n3"]`) || !strings.Contains(errw, "not proven") {
		t.Errorf("api: exit %d: %q %q", code, out, errw)
	}
}

// The exit code of api is that of the answer, whose body is printed as it came.
func TestAPIExitCodes(t *testing.T) {
	for _, tt := range []struct {
		status     int
		kind, body string
		code       int
		say        string
	}{
		{200, "application/json", `{"x":1}`, 0, ""},
		{201, "application/json", `{"x":1}`, 0, ""},
		{403, "application/problem+json", `{"type":"urn:unibus:error:forbidden","title":"Forbidden","status":403,"detail":"no","hint":"ask"}`, 1, "unibusctl: no\nTry: ask\n"},
		{409, "application/problem+json", `{"type":"urn:unibus:error:conflict","title":"Conflict","status":409,"detail":"moved on"}`, 1, "unibusctl: moved on\n"},
		{503, "application/problem+json", `{"type":"urn:unibus:error:unavailable","title":"x","status":503,"detail":"no quorum"}`, 3, "unibusctl: no quorum\n"},
		{429, "application/problem+json", `{"type":"urn:unibus:error:unavailable","title":"x","status":429,"detail":"too many"}`, 3, "unibusctl: too many\n"},
		{500, "application/problem+json", `{"type":"urn:unibus:error:internal","title":"Internal Server Error","status":500,"request_id":"r7"}`, 1, "unibusctl: internal server error, request r7\n"},
		{404, "text/html", `<html>`, 1, "unibusctl: what answers is not unibus, with status 404\nTry: unibusctl env shows the address in use\n"},
	} {
		code, out, errw := served(t, tt.status, tt.kind, tt.body)("api", "POST", "/v1/x", "--data", `{}`)
		if code != tt.code || out != tt.body+"\n" || errw != tt.say {
			t.Errorf("%d: exit %d, %q, %q", tt.status, code, out, errw)
		}
	}
}

func TestDifferences(t *testing.T) {
	at := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	admin, handle := bus.Admin, bus.Handle("b")
	u := bus.UserInfo{Handle: "a", Role: bus.Admin}
	got := differences(u, client.UserPatch{Role: &admin, Handle: &handle, Expires: true, ExpiresAt: &at})
	if strings.Join(got, "; ") != "handle: a becomes b; expires: never becomes 2027-01-01T00:00:00Z" {
		t.Errorf("%q", got)
	}
}
