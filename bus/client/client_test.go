package client

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
)

func newIdentity(t *testing.T) *sig.Identity {
	t.Helper()
	raw := make([]byte, ed25519.SeedSize)
	if _, err := rand.Read(raw); err != nil {
		t.Fatal(err)
	}
	seed, err := nkeys.EncodeSeed(nkeys.PrefixByteUser, raw)
	if err != nil {
		t.Fatal(err)
	}
	id, err := sig.ParseIdentity(seed)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// fake is one node: a TLS server that checks signatures and nonces as a service
// does, and then answers as the test says. It is the other side of the wire,
// which is what this package is about; the routes themselves are tested against
// real services.
type fake struct {
	*httptest.Server
	ahead  time.Duration // of its clock
	asked  atomic.Int64  // requests that came through the signature check
	burnt  atomic.Int64  // requests whose nonce had been used before
	nonces sync.Map
	last   sync.Map // "body", "if-match" and "target" of the newest request
}

func newFake(t *testing.T, answer http.HandlerFunc) *fake {
	t.Helper()
	f := &fake{}
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		now := time.Now().Add(f.ahead)
		w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		v, err := sig.Verify(r, body, []string{r.Host}, now)
		if err == nil {
			if _, used := f.nonces.LoadOrStore(v.Nonce, true); used {
				f.burnt.Add(1)
				err = sig.ErrSkew // any error: a nonce is good once
			}
		}
		if err != nil {
			writeProblem(w, http.StatusUnauthorized, bus.Unauthenticated, "a signed request is needed", "")
			return
		}
		f.asked.Add(1)
		f.last.Store("body", string(body))
		f.last.Store("if-match", r.Header.Get("If-Match"))
		f.last.Store("target", r.Method+" "+r.RequestURI)
		answer(w, r)
	}))
	f.Config.ErrorLog = log.New(io.Discard, "", 0)
	f.StartTLS()
	t.Cleanup(f.Close)
	return f
}

func (f *fake) saw(what string) string {
	v, _ := f.last.Load(what)
	s, _ := v.(string)
	return s
}

func writeProblem(w http.ResponseWriter, status int, code bus.Code, detail, hint string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(bus.Problem{Type: bus.ProblemType + string(code), Title: http.StatusText(status), Status: status, Detail: detail, Hint: hint, RequestID: "r1"})
}

func proven(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(bus.Change{What: "done", Revision: 7, Verified: true, Expired: []string{}})
}

// noQuorum is what a service says when it cannot commit: it may have.
func noQuorum(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Retry-After", "2")
	writeProblem(w, http.StatusServiceUnavailable, bus.Unavailable, "no quorum", "unibusctl cluster status")
}

// noLease is what a service says before it has done anything.
func noLease(w http.ResponseWriter, r *http.Request) {
	w.Header().Set(bus.EffectHeader, bus.EffectNone)
	noQuorum(w, r)
}

func tooMany(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Retry-After", "1")
	writeProblem(w, http.StatusTooManyRequests, bus.Unavailable, "too many requests", "")
}

// cut takes the request and answers with a closed connection.
func cut(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// nowhere is an address at which nothing listens.
func nowhere(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // nobody has used it
	return "https://" + l.Addr().String()
}

func newClient(t *testing.T, urls ...string) *Client {
	t.Helper()
	pool := x509.NewCertPool()
	probe := httptest.NewTLSServer(http.NotFoundHandler()) // all of httptest share one certificate
	pool.AddCert(probe.Certificate())
	probe.Close()
	c, err := New(Config{URLs: urls, TLS: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, Identity: newIdentity(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// What may be sent again goes to the next node after every kind of failure;
// what may not goes on only if it certainly did nothing.
func TestWhatIsSentAgain(t *testing.T) {
	handle := bus.Handle("b")
	someone := newIdentity(t).Key()
	reads := map[string]func(context.Context, *Client) error{
		"read": func(ctx context.Context, c *Client) error { _, err := c.Me(ctx); return err },
	}
	repeated := map[string]func(context.Context, *Client) error{
		"revoke":  func(ctx context.Context, c *Client) error { _, err := c.RevokeUser(ctx, "a"); return err },
		"suspend": func(ctx context.Context, c *Client) error { _, err := c.SuspendUser(ctx, "a"); return err },
		"resume":  func(ctx context.Context, c *Client) error { _, err := c.ResumeUser(ctx, "a"); return err },
		"rotate":  func(ctx context.Context, c *Client) error { _, err := c.RotateUser(ctx, "a", someone); return err },
		"set member": func(ctx context.Context, c *Client) error {
			_, err := c.SetMember(ctx, "r", "a", bus.Writer)
			return err
		},
		"remove member": func(ctx context.Context, c *Client) error { _, err := c.RemoveMember(ctx, "r", "a"); return err },
		"archive":       func(ctx context.Context, c *Client) error { _, err := c.ArchiveRoom(ctx, "r", false); return err },
		"withdraw":      func(ctx context.Context, c *Client) error { _, _, err := c.WithdrawInvite(ctx, "i"); return err },
		"enroll":        func(ctx context.Context, c *Client) error { _, err := c.Enroll(ctx, "t", ""); return err },
		"patch at a revision": func(ctx context.Context, c *Client) error {
			_, err := c.PatchUser(ctx, "a", UserPatch{Handle: &handle, Revision: 3})
			return err
		},
		"describe at a revision": func(ctx context.Context, c *Client) error {
			_, err := c.DescribeRoom(ctx, "r", "d", 3)
			return err
		},
		"encryption key": func(ctx context.Context, c *Client) error {
			_, err := c.SetEncryptionKey(ctx, bus.EncryptionKey{N: 1})
			return err
		},
		"raw delete": func(ctx context.Context, c *Client) error {
			_, _, _, err := c.Do(ctx, "DELETE", "/v1/x", nil)
			return err
		},
	}
	once := map[string]func(context.Context, *Client) error{
		"add user": func(ctx context.Context, c *Client) error {
			_, err := c.AddUser(ctx, someone, "a", bus.Member)
			return err
		},
		"create room": func(ctx context.Context, c *Client) error {
			_, err := c.CreateRoom(ctx, NewRoom{Room: "r"})
			return err
		},
		"invite": func(ctx context.Context, c *Client) error {
			_, err := c.CreateInvite(ctx, NewInvite{Role: bus.Member})
			return err
		},
		"patch": func(ctx context.Context, c *Client) error {
			_, err := c.PatchUser(ctx, "a", UserPatch{Handle: &handle})
			return err
		},
		"describe": func(ctx context.Context, c *Client) error { _, err := c.DescribeRoom(ctx, "r", "d", 0); return err },
		"raw post": func(ctx context.Context, c *Client) error {
			status, header, body, err := c.Do(ctx, "POST", "/v1/x", []byte(`{}`))
			if err != nil {
				return err
			}
			return ErrorOf(status, header, body)
		},
	}
	for _, failure := range []struct {
		name     string
		answer   http.HandlerFunc // nil: nothing listens
		harmless bool             // the request certainly did nothing
	}{
		{"nothing listens", nil, true},
		{"no lease", noLease, true},
		{"too many", tooMany, true},
		{"no quorum", noQuorum, false},
		{"cut", cut, false},
		{"gateway timeout", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusGatewayTimeout) }, false},
	} {
		check := func(kind, name string, do func(context.Context, *Client) error, want int64) {
			t.Run(failure.name+"/"+kind+"/"+name, func(t *testing.T) {
				t.Parallel()
				good := newFake(t, proven)
				bad := nowhere(t)
				if failure.answer != nil {
					bad = newFake(t, failure.answer).URL
				}
				c := newClient(t, bad, good.URL)
				err := do(t.Context(), c)
				if good.burnt.Load() != 0 {
					t.Error("a nonce was sent twice")
				}
				if got := good.asked.Load(); got != want {
					t.Errorf("the good node was asked %d times, want %d (%v)", got, want, err)
				}
				switch {
				case want == 1 && err != nil:
					t.Errorf("no success at the second node: %v", err)
				case want == 0 && bus.CodeOf(err) != bus.Unavailable:
					t.Errorf("%v is not unavailable", err)
				}
			})
		}
		for name, do := range reads {
			check("reads", name, do, 1)
		}
		for name, do := range repeated {
			check("repeated", name, do, 1)
		}
		for name, do := range once {
			want := int64(0)
			if failure.harmless {
				want = 1
			}
			check("once", name, do, want)
		}
	}
}

// A lost answer says that it is one, and a Conflict after it says what it may
// mean.
func TestDoubtIsSaid(t *testing.T) {
	t.Parallel()
	c := newClient(t, newFake(t, cut).URL, newFake(t, proven).URL)
	_, err := c.AddUser(t.Context(), newIdentity(t).Key(), "a", bus.Member)
	if bus.CodeOf(err) != bus.Unavailable || !strings.Contains(err.Error(), "may or may not have been carried out") {
		t.Errorf("a lost answer: %v", err)
	}
	moved := newFake(t, func(w http.ResponseWriter, _ *http.Request) {
		writeProblem(w, http.StatusConflict, bus.Conflict, "it was changed", "read it again")
	})
	role := bus.Admin
	for _, tt := range []struct {
		c    *Client
		want string
	}{
		{newClient(t, moved.URL), "it was changed"},
		{newClient(t, newFake(t, cut).URL, moved.URL), "it was changed (an earlier attempt got no answer, and may have done just that)"},
	} {
		_, err := tt.c.PatchUser(t.Context(), "a", UserPatch{Role: &role, Revision: 4})
		if bus.CodeOf(err) != bus.Conflict || err.Error() != tt.want {
			t.Errorf("got %v, want %s", err, tt.want)
		}
	}
}

// A node whose clock differs is believed about its own time, once.
func TestClockIsCorrectedOnce(t *testing.T) {
	t.Parallel()
	for _, ahead := range []time.Duration{10 * time.Minute, -3 * time.Hour} {
		good := newFake(t, proven)
		skewed := newFake(t, proven)
		skewed.ahead = ahead
		c := newClient(t, skewed.URL, good.URL)
		if _, err := c.AddUser(t.Context(), newIdentity(t).Key(), "a", bus.Member); err != nil || skewed.asked.Load() != 1 {
			t.Errorf("%s ahead: %v, asked %d times", ahead, err, skewed.asked.Load())
		}
		skewed.ahead = -2 * ahead // and again when it is put right
		if _, err := c.Me(t.Context()); err != nil || skewed.asked.Load() != 2 {
			t.Errorf("%s ahead: %v, asked %d times", -2*ahead, err, skewed.asked.Load())
		}
		if good.asked.Load() != 0 {
			t.Error("a wrong clock is no reason to ask another node")
		}
	}
	refusals := atomic.Int64{}
	liar := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n := refusals.Add(1)
		w.Header().Set("Date", time.Now().Add(time.Duration(n)*time.Hour).UTC().Format(http.TimeFormat))
		writeProblem(w, http.StatusUnauthorized, bus.Unauthenticated, "a signed request is needed", "")
	}))
	t.Cleanup(liar.Close)
	if _, err := newClient(t, liar.URL).Me(t.Context()); bus.CodeOf(err) != bus.Unauthenticated || refusals.Load() != 2 {
		t.Errorf("%v after %d requests, want 2", err, refusals.Load())
	}
}

// The node that answered is asked first from then on.
func TestTheOneThatWorksIsRemembered(t *testing.T) {
	t.Parallel()
	bad, good := newFake(t, noLease), newFake(t, proven)
	c := newClient(t, nowhere(t), bad.URL, good.URL)
	for range 5 {
		if _, err := c.RevokeUser(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
	}
	if bad.asked.Load() != 1 || good.asked.Load() != 5 {
		t.Errorf("the bad node was asked %d times, the good one %d", bad.asked.Load(), good.asked.Load())
	}
}

// An error is the one that the service raised; what no service raised is never
// a decision.
func TestErrorsCrossTheWire(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		answer http.HandlerFunc
		code   bus.Code
		msg    string
		hint   string
	}{
		{"forbidden", func(w http.ResponseWriter, _ *http.Request) {
			writeProblem(w, 403, bus.Forbidden, "only an admin may do this", "ask one")
		}, bus.Forbidden, "only an admin may do this", "ask one"},
		{"not found", func(w http.ResponseWriter, _ *http.Request) {
			writeProblem(w, 404, bus.NotFound, "no user x", "unibusctl user list")
		}, bus.NotFound, "no user x", "unibusctl user list"},
		{"internal", func(w http.ResponseWriter, _ *http.Request) { writeProblem(w, 500, bus.Internal, "", "") }, bus.Internal, "internal server error, request r1", ""},
		{"unknown code", func(w http.ResponseWriter, _ *http.Request) { writeProblem(w, 418, "teapot", "short", "") }, bus.Internal, "short", ""},
		{"a stranger's 404", http.NotFound, bus.Internal, "what answers is not unibus, with status 404", "unibusctl env shows the address in use"},
		{"a stranger's problem", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(404)
			_, _ = io.WriteString(w, `{"type":"about:blank","title":"not found"}`)
		}, bus.Internal, "what answers is not unibus, with status 404", "unibusctl env shows the address in use"},
		{
			"a proxy without servers", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "none", http.StatusServiceUnavailable) }, bus.Unavailable,
			"what answers is not unibus but something before it, with status 503", "unibusctl cluster status",
		},
		{
			"a redirect", func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "https://evil.example/", http.StatusTemporaryRedirect)
			}, bus.Internal,
			"what answers is not unibus, with status 307", "unibusctl env shows the address in use",
		},
		{"no document", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") }, bus.Internal, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := newClient(t, newFake(t, tt.answer).URL)
			_, err := c.RevokeUser(t.Context(), "a")
			e, ok := err.(*bus.Error) //nolint:errorlint // the promise is this very type
			if !ok || e.Code != tt.code || e.Hint != tt.hint || tt.msg != "" && e.Msg != tt.msg {
				t.Errorf("got %#v", err)
			}
		})
	}
}

// A read that dies with a connection which was kept is repeated by net/http with
// the bytes it has, whose nonce is used up by then: it is signed again.
func TestKeptConnectionDies(t *testing.T) {
	t.Parallel()
	asked := atomic.Int64{}
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 2 {
			cut(w, r)
		}
		proven(w, r)
	})
	c := newClient(t, f.URL)
	for n := range 3 {
		if _, err := c.Me(t.Context()); err != nil {
			t.Errorf("read %d: %v", n, err)
		}
	}
	if f.burnt.Load() != 1 {
		t.Errorf("net/http repeated %d times: this test shows nothing any more", f.burnt.Load())
	}
	if asked.Load() != 4 {
		t.Errorf("asked %d times, want 4", asked.Load())
	}
}

// A node that does not prove who it is gets no request, and the error says so.
func TestCertificateIsDemanded(t *testing.T) {
	t.Parallel()
	f := newFake(t, proven)
	c, err := New(Config{URLs: []string{f.URL}, TLS: &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}, Identity: newIdentity(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Me(t.Context()); bus.CodeOf(err) != bus.Unauthenticated || !strings.Contains(err.Error(), "did not prove who it is") {
		t.Errorf("got %v", err)
	}
	if f.asked.Load() != 0 {
		t.Error("it was asked all the same")
	}
}

// Whom a client trusts is in its CA file at that moment: a program that outlives
// the replacement of an authority needs no restart.
func TestCAFileIsReadAtEachConnect(t *testing.T) {
	t.Parallel()
	f := newFake(t, proven)
	f.Config.SetKeepAlivesEnabled(false)
	file := filepath.Join(t.TempDir(), "client-ca.crt")
	trust := func(certs ...*x509.Certificate) {
		t.Helper()
		var out []byte
		for _, c := range certs {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
		}
		if err := os.WriteFile(file, out, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stranger := selfSigned(t)
	trust(stranger)
	c, err := New(Config{URLs: []string{f.URL}, CAFile: file, Identity: newIdentity(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, step := range []struct {
		trust []*x509.Certificate
		want  bool
	}{
		{[]*x509.Certificate{stranger}, false},
		{[]*x509.Certificate{stranger, f.Certificate()}, true},
		{[]*x509.Certificate{f.Certificate()}, true},
		{nil, false}, // damaged: nobody is trusted
	} {
		trust(step.trust...)
		if _, err := c.Me(t.Context()); (err == nil) != step.want {
			t.Errorf("trusting %d: %v, want an answer: %v", len(step.trust), err, step.want)
		}
	}
	if _, err := New(Config{URLs: []string{f.URL}, CAFile: file, Identity: newIdentity(t)}); bus.CodeOf(err) != bus.Invalid {
		t.Errorf("a file without certificates: %v", err)
	}
}

func selfSigned(t *testing.T) *x509.Certificate {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// A context ends a call, whatever the node does, and nothing stays behind.
func TestContextEndsACall(t *testing.T) {
	before := runtime.NumGoroutine()
	release := make(chan struct{})
	f := newFake(t, func(http.ResponseWriter, *http.Request) { <-release })
	c := newClient(t, f.URL, f.URL, f.URL)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	started := time.Now()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			_, err := c.Me(ctx)
			if bus.CodeOf(err) != bus.Unavailable || !strings.Contains(err.Error(), "in time") {
				t.Errorf("a read: %v", err)
			}
			_, err = c.SetMember(ctx, "r", "a", bus.Writer)
			if bus.CodeOf(err) != bus.Unavailable {
				t.Errorf("a change: %v", err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(started); took > 2*time.Second {
		t.Errorf("it took %s", took)
	}
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	asked := f.asked.Load()
	go func() { // as soon as the request is there
		for f.asked.Load() == asked && ctx.Err() == nil {
			runtime.Gosched()
		}
		cancel()
	}()
	if _, err := c.SetMember(ctx, "r", "a", bus.Writer); !strings.Contains(err.Error(), "may or may not have been carried out") {
		t.Errorf("a change that was cut off: %v", err)
	}
	close(release)
	c.Close()
	f.Close()
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before+2; runtime.Gosched() {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines became %d:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
		}
	}
}

// What is sent is what the contract of the API says.
func TestRequests(t *testing.T) {
	t.Parallel()
	f := newFake(t, proven)
	c := newClient(t, f.URL)
	key := newIdentity(t).Key()
	handle, role := bus.Handle("b"), bus.Admin
	at := time.Date(2027, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, tt := range []struct {
		do           func(ctx context.Context) error
		target, body string
		ifMatch      string
	}{
		{
			func(ctx context.Context) error { _, err := c.AddUser(ctx, key, "a", bus.Admin); return err },
			"POST /v1/users", `{"handle":"a","role":"admin","sign_pub":"` + key.Hex() + `"}`, "",
		},
		{func(ctx context.Context) error {
			_, err := c.PatchUser(ctx, key.NKey(), UserPatch{Handle: &handle, Role: &role, Expires: true, ExpiresAt: &at, Revision: 9})
			return err
		}, "PATCH /v1/users/" + key.NKey(), `{"expires_at":"2027-01-02T03:04:05Z","handle":"b","role":"admin"}`, `"9"`},
		{
			func(ctx context.Context) error { _, err := c.PatchUser(ctx, "a", UserPatch{Expires: true}); return err },
			"PATCH /v1/users/a", `{"expires_at":null}`, "",
		},
		{func(ctx context.Context) error { _, err := c.RotateUser(ctx, "a", key); return err }, "POST /v1/users/a/rotate", `{"sign_pub":"` + key.Hex() + `"}`, ""},
		{func(ctx context.Context) error { _, err := c.SuspendUser(ctx, "a"); return err }, "POST /v1/users/a/suspend", "", ""},
		{func(ctx context.Context) error {
			_, err := c.CreateInvite(ctx, NewInvite{Role: bus.Member, Handle: "n", Rooms: []bus.InvitedRoom{{Room: "r", Role: bus.Writer}}, TTL: time.Hour})
			return err
		}, "POST /v1/invites", `{"expires_in_seconds":3600,"handle":"n","role":"member","rooms":[{"room":"r","role":"writer"}]}`, ""},
		{func(ctx context.Context) error { _, err := c.Enroll(ctx, "ubi_x", "n"); return err }, "POST /v1/enroll", `{"handle":"n","token":"ubi_x"}`, ""},
		{func(ctx context.Context) error { _, err := c.CreateRoom(ctx, NewRoom{Room: "r"}); return err }, "POST /v1/rooms", `{"room":"r"}`, ""},
		{func(ctx context.Context) error {
			_, err := c.CreateRoom(ctx, NewRoom{Room: "r", Owner: "a", Durable: true, Encrypted: true, Description: "d"})
			return err
		}, "POST /v1/rooms", `{"description":"d","durable":true,"encrypted":true,"owner":"a","room":"r"}`, ""},
		{func(ctx context.Context) error { _, err := c.DescribeRoom(ctx, "r", "", 2); return err }, "PATCH /v1/rooms/r", `{"description":""}`, `"2"`},
		{func(ctx context.Context) error { _, err := c.SetMember(ctx, "r", "a", bus.Reader); return err }, "PUT /v1/rooms/r/members/a", `{"role":"reader"}`, ""},
		{func(ctx context.Context) error { _, err := c.RemoveMember(ctx, "r", "a"); return err }, "DELETE /v1/rooms/r/members/a", "", ""},
		{
			func(ctx context.Context) error {
				_, _, err := c.Rooms(ctx, RoomQuery{All: true, After: "q", Limit: 5})
				return err
			},
			"GET /v1/rooms?after=q&all=true&limit=5", "", "",
		},
		{func(ctx context.Context) error { _, err := c.Members(ctx, "r", true); return err }, "GET /v1/rooms/r/members?all=true", "", ""},
		{func(ctx context.Context) error {
			_, _, err := c.Audit(ctx, AuditQuery{User: key.NKey(), Action: "user.add", Room: "r", Since: at, Limit: 10})
			return err
		}, "GET /v1/audit?action=user.add&limit=10&room=r&since=2027-01-02T03%3A04%3A05Z&user=" + key.NKey(), "", ""},
	} {
		if err := tt.do(t.Context()); err != nil {
			t.Errorf("%s: %v", tt.target, err)
		}
		if f.saw("target") != tt.target || f.saw("body") != tt.body || f.saw("if-match") != tt.ifMatch {
			t.Errorf("sent %s %s (If-Match %s)\nwant %s %s (If-Match %s)", f.saw("target"), f.saw("body"), f.saw("if-match"), tt.target, tt.body, tt.ifMatch)
		}
	}
}

// Names that could leave their place in a path are refused before anything is
// sent.
func TestNamesStayInTheirPlace(t *testing.T) {
	t.Parallel()
	f := newFake(t, proven)
	c := newClient(t, f.URL)
	for _, name := range []string{"", ".", "..", "a/b", "a?x=y", "a#b", "../users/b", "A", "a b", "%61", "U", strings.Repeat("a", 33)} {
		for _, err := range []error{
			func() error { _, err := c.RevokeUser(t.Context(), name); return err }(),
			func() error { _, err := c.User(t.Context(), name); return err }(),
			func() error { _, err := c.SetMember(t.Context(), "r", name, bus.Writer); return err }(),
			func() error { _, err := c.Room(t.Context(), bus.RoomID(name)); return err }(),
			func() error { _, err := c.RemoveMember(t.Context(), bus.RoomID(name), "a"); return err }(),
		} {
			if bus.CodeOf(err) != bus.Invalid {
				t.Errorf("%q: %v", name, err)
			}
		}
	}
	for _, path := range []string{"", "v1", "//v1", "/v1/../x", "/v1?", "/v1/%2e", "/v1#x"} {
		if _, _, _, err := c.Do(t.Context(), "GET", path, nil); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%q: %v", path, err)
		}
	}
	if f.asked.Load() != 0 {
		t.Error("something was sent")
	}
}

// Pages are read to their end, and an end that never comes is an error.
func TestPages(t *testing.T) {
	t.Parallel()
	next := map[string]string{"": "a", "a": "b", "b": ""}
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) {
		after := r.URL.Query().Get("after")
		_ = json.NewEncoder(w).Encode(map[string]any{"users": []bus.UserInfo{{Handle: bus.Handle("u" + after), SignPub: newIdentity(t).Key()}}, "next": next[after]})
	})
	c := newClient(t, f.URL)
	users, err := c.AllUsers(t.Context(), UserQuery{Limit: 1, Status: bus.Active})
	if err != nil || len(users) != 3 || users[2].Handle != "ub" || f.saw("target") != "GET /v1/users?after=b&limit=1&status=active" {
		t.Errorf("%+v, last %s (%v)", users, f.saw("target"), err)
	}
	next["b"] = "b"
	if _, err := c.AllUsers(t.Context(), UserQuery{}); bus.CodeOf(err) != bus.Internal {
		t.Errorf("pages without an end: %v", err)
	}
}

// A server that failed one page of a list is missing from all of it.
func TestAServerMissingFromAPageIsMissing(t *testing.T) {
	t.Parallel()
	pages := map[string]bus.ConnectionList{
		"":  {Servers: "3/3", Missing: []string{}, Next: "a"},
		"a": {Servers: "2/3", Missing: []string{"n3"}, Next: "b"},
		"b": {Servers: "1/2", Missing: []string{"n2"}},
	}
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(pages[r.URL.Query().Get("after")])
	})
	list, err := newClient(t, f.URL).Connections(t.Context(), ConnectionQuery{})
	if err != nil || list.Servers != "1/3" || !slices.Equal(list.Missing, []string{"n2", "n3"}) {
		t.Errorf("servers %s, missing %v (%v)", list.Servers, list.Missing, err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	id := newIdentity(t)
	for _, urls := range [][]string{nil, {"http://h:1"}, {"h:1"}, {"https://"}, {"https://u@h:1"}, {"https://h:1/v1"}, {"https://h:1/?x"}} {
		if _, err := New(Config{URLs: urls, Identity: id}); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%q: %v", urls, err)
		}
	}
	if _, err := New(Config{URLs: []string{"https://h:1/"}}); bus.CodeOf(err) != bus.Invalid {
		t.Errorf("no identity: %v", err)
	}
	if _, err := New(Config{URLs: []string{" https://h:1/ ", "https://[::1]:2"}, Identity: id}); err != nil {
		t.Error(err)
	}
}
