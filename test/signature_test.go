package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"unibus.internal/bus/sig"
)

// node runs a program of testdata, a client in another language that shares no
// code with unibus. Its modules are installed once, from a lock file that pins
// their content, and kept where the user's caches are.
type node struct {
	t       testing.TB
	program string
	modules string
}

// signatures is a client on another implementation of RFC 9421.
const signatures = "testdata/node/signature.cjs"

func newNode(t testing.TB, script string) *node {
	t.Helper()
	for _, program := range []string{"node", "npm"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s (Node.js 20 or newer): %v", program, err)
		}
	}
	lock, err := os.ReadFile(filepath.Join(filepath.Dir(script), "package-lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = t.TempDir()
	}
	sum := sha256.Sum256(lock)
	dir := filepath.Join(cache, "unibus-test", "node-"+hex.EncodeToString(sum[:8]))
	if _, err := os.Stat(dir); err == nil {
		return &node{t, script, dir}
	} else if !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	// Into a directory of its own, which is renamed when it is complete: runs
	// that overlap, or are interrupted, leave nothing half installed.
	fresh, err := os.MkdirTemp(filepath.Dir(dir), "install-")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(fresh) }()
	for _, name := range []string{"package.json", "package-lock.json"} {
		data, err := os.ReadFile(filepath.Join(filepath.Dir(script), name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(fresh, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "npm", "ci", "--prefix", fresh, "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund").CombinedOutput()
	if err != nil && bytes.Contains(out, []byte("EINTEGRITY")) {
		t.Fatalf("the modules are not those of package-lock.json: %s", tail(string(out)))
	}
	if err != nil {
		t.Skipf("npm cannot install the modules of %s here: %v\n%s", script, err, tail(string(out)))
	}
	if err := os.Rename(fresh, dir); err != nil {
		if _, there := os.Stat(dir); there != nil { // else another run was faster
			t.Fatal(err)
		}
	}
	return &node{t, script, dir}
}

func (n *node) ask(request map[string]any, answer any) {
	n.t.Helper()
	if err := n.try(request, answer); err != nil {
		n.t.Fatalf("node: %v", err)
	}
}

// try may be called from any goroutine.
func (n *node) try(request map[string]any, answer any) error {
	in, err := json.Marshal(request)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "node", n.program, n.modules)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w\n%s", err, &stderr)
	}
	if err := json.Unmarshal(stdout.Bytes(), answer); err != nil {
		return fmt.Errorf("%w: %s", err, &stdout)
	}
	return nil
}

type nodeSigned struct {
	Headers map[string]string
	Base    string
}

// signWithNode returns the three headers of a request signed now, with a nonce
// of node's own. It skips the test on machines without node or npm.
func signWithNode(t testing.TB, seedFile, method, url string, body []byte) http.Header {
	t.Helper()
	var signed nodeSigned
	newNode(t, signatures).ask(map[string]any{"op": "sign", "seed_file": seedFile, "method": method, "url": url, "body": body}, &signed)
	h := http.Header{}
	for name, value := range signed.Headers {
		h.Set(name, value)
	}
	return h
}

// serverSide is what a server makes of a request.
func serverSide(t testing.TB, req *http.Request) (*http.Request, []byte) {
	t.Helper()
	var wire bytes.Buffer
	if err := req.Write(&wire); err != nil {
		t.Fatal(err)
	}
	r, err := http.ReadRequest(bufio.NewReader(&wire))
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r, body
}

// Clients and servers that share no code with unibus understand its signatures,
// both ways: docs/protocol.md section 7.1 is enough to write one.
func TestSignatureInterop(t *testing.T) {
	t.Parallel()
	n := newNode(t, signatures)
	pair, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := pair.Seed()
	if err != nil {
		t.Fatal(err)
	}
	seedFile := filepath.Join(t.TempDir(), "alice.nk")
	if err := os.WriteFile(seedFile, append(seed, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	id, err := sig.ParseIdentity(seed)
	if err != nil {
		t.Fatal(err)
	}
	authorities := []string{"n1.example.org:8470", "bus.example.org"}

	for _, tc := range []struct{ name, method, url, body string }{
		{"get", "GET", "https://n1.example.org:8470/v1/me", ""},
		{"root", "GET", "https://n1.example.org:8470", ""},
		{"query", "GET", "https://n1.example.org:8470/v1/rooms/ops/messages?after=17&limit=100&x=%C3%A4", ""},
		{"body", "POST", "https://n1.example.org:8470/v1/users", `{"handle":"alice","role":"member"}`},
		{"bytes", "PUT", "https://n1.example.org:8470/v1/rooms/ops/blobs/a%20b", "\x00\xff\r\n"},
		{"delete", "DELETE", "https://n1.example.org:8470/v1/rooms/ops/members/alice?why=left", ""},
		{"default port", "PATCH", "https://bus.example.org:443/v1/users/alice", `{}`},
		{"capitals", "GET", "https://N1.Example.ORG:8470/v1/me", ""},
	} {
		t.Run("they sign/"+tc.name, func(t *testing.T) {
			headers := signWithNode(t, seedFile, tc.method, tc.url, []byte(tc.body))
			req, err := http.NewRequest(tc.method, tc.url, strings.NewReader(tc.body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header = headers
			req.Host = strings.TrimSuffix(req.URL.Host, ":443") // as node's own client sends it
			r, body := serverSide(t, req)
			got, err := sig.Verify(r, body, authorities, time.Now())
			if err != nil || got.Key != id.Key() || len(got.Nonce) != 22 {
				t.Fatalf("%+v, %v: %v", got, err, headers)
			}
			r.Method = "OPTIONS"
			if _, err := sig.Verify(r, body, authorities, time.Now()); err == nil {
				t.Error("another method is accepted as well")
			}
		})
		t.Run("we sign/"+tc.name, func(t *testing.T) {
			req, err := http.NewRequest(tc.method, tc.url, strings.NewReader(tc.body))
			if err != nil {
				t.Fatal(err)
			}
			nonce, err := sig.NewNonce(rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			if err := sig.Sign(req, []byte(tc.body), id, time.Now(), nonce); err != nil {
				t.Fatal(err)
			}
			headers := map[string]string{}
			for name := range req.Header {
				headers[name] = req.Header.Get(name)
			}
			for _, try := range []struct {
				method string
				want   bool
			}{{tc.method, true}, {"OPTIONS", false}} {
				n.t = t
				var answer struct{ Verified bool }
				n.ask(map[string]any{"op": "verify", "key": id.Key().NKey(), "method": try.method, "url": tc.url, "headers": headers}, &answer)
				if answer.Verified != try.want {
					t.Errorf("node verifies %s as %s: %t, want %t", tc.method, try.method, answer.Verified, try.want)
				}
			}
		})
	}

	// The golden vectors are what node says they are.
	t.Run("vectors", func(t *testing.T) {
		n.t = t
		data, err := os.ReadFile("../bus/sig/testdata/vectors.json")
		if err != nil {
			t.Fatal(err)
		}
		var vectors struct {
			Seed     string
			Requests []struct {
				nodeSigned
				Name, Method, URL, Body, Nonce string
				Created                        int64
			}
		}
		if err := json.Unmarshal(data, &vectors); err != nil {
			t.Fatal(err)
		}
		seedFile := filepath.Join(t.TempDir(), "seed.nk")
		if err := os.WriteFile(seedFile, []byte(vectors.Seed), 0o600); err != nil {
			t.Fatal(err)
		}
		if len(vectors.Requests) < 3 {
			t.Fatalf("%d vectors", len(vectors.Requests))
		}
		for _, v := range vectors.Requests {
			var got nodeSigned
			n.ask(map[string]any{
				"op": "sign", "seed_file": seedFile, "method": v.Method, "url": v.URL, "body": []byte(v.Body), "created": v.Created, "nonce": v.Nonce,
			}, &got)
			if got.Base != v.Base {
				t.Errorf("%s: base\n%s\nwant\n%s", v.Name, got.Base, v.Base)
			}
			for name, want := range v.Headers {
				if got.Headers[name] != want {
					t.Errorf("%s: %s: %q, want %q", v.Name, name, got.Headers[name], want)
				}
			}
		}
	})
}
