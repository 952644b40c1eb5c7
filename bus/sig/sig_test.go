package sig_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

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
