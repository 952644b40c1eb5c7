package test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
	"unibus.internal/test/cluster"
)

// apiClient asks one node for one person, byte for byte as a test wants it. It
// is no SDK: it repeats nothing, interprets nothing, and lets a test break
// whatever it likes. It is safe for concurrent use.
type apiClient struct {
	url    string // https://host:port of the node
	signer sig.Signer
	http   *http.Client
}

// api is a client of node i for a person; nil signs nothing.
func (w *world) api(i int, p *person) *apiClient {
	c := &apiClient{url: w.APIURL(i), http: w.http}
	if p != nil {
		c.signer = p
	}
	return c
}

// apiHTTP is shared by the clients of a test, so that thousands of requests do
// not make thousands of connections.
func apiHTTP(t testing.TB, trust *tls.Config) *http.Client {
	c := &http.Client{
		Timeout:       30 * time.Second,
		Transport:     &http.Transport{TLSClientConfig: trust.Clone(), MaxIdleConnsPerHost: 256, MaxConnsPerHost: 256, ExpectContinueTimeout: 5 * time.Second},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

// Key and Sign make a person a sig.Signer.
func (p *person) Key() bus.UserKey { return p.key }

func (p *person) Sign(input []byte) ([]byte, error) { return p.kp.Sign(input) }

// apiRequest is one request before it is sent.
type apiRequest struct {
	method, path string
	host         string // the authority to sign for; empty: that of the node
	body         []byte
	stream       bool                  // the body is a file
	header       http.Header           // on top of what signing and a body need
	created      time.Time             // zero: now
	nonce        string                // empty: a new one
	edit         func(r *http.Request) // after signing; may be nil
}

// apiResponse is what came back.
type apiResponse struct {
	status int
	header http.Header
	body   []byte
}

func (r *apiResponse) String() string { return fmt.Sprintf("%d %s", r.status, r.body) }

// decode reads the body.
func (r *apiResponse) decode(t testing.TB, into any) {
	t.Helper()
	if err := json.Unmarshal(r.body, into); err != nil {
		t.Fatalf("%v: %s", err, r)
	}
}

// code is that of a problem document; empty for a success.
func (r *apiResponse) code() bus.Code {
	var p bus.Problem
	if r.status < 400 || json.Unmarshal(r.body, &p) != nil || len(p.Type) < len(bus.ProblemType) {
		return ""
	}
	return bus.Code(p.Type[len(bus.ProblemType):])
}

// change reads a bus.Change.
func (r *apiResponse) change(t testing.TB) bus.Change {
	t.Helper()
	var c bus.Change
	r.decode(t, &c)
	return c
}

// build signs a request. It may be sent more than once: each send of the same
// request is a replay.
func (c *apiClient) build(ctx context.Context, q apiRequest) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, q.method, c.url+q.path, bytes.NewReader(q.body))
	if err != nil {
		return nil, err
	}
	if q.body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	for name, values := range q.header {
		r.Header[name] = values
	}
	if q.host != "" {
		r.Host = q.host
	}
	if c.signer != nil {
		if q.nonce == "" {
			if q.nonce, err = sig.NewNonce(rand.Reader); err != nil {
				return nil, err
			}
		}
		if q.created.IsZero() {
			q.created = time.Now()
		}
		if q.stream {
			err = sig.SignStream(r, sig.DigestOf(q.body), c.signer, q.created, q.nonce)
		} else {
			err = sig.Sign(r, q.body, c.signer, q.created, q.nonce)
		}
		if err != nil {
			return nil, err
		}
	}
	if q.edit != nil {
		q.edit(r)
	}
	return r, nil
}

// roundTrip sends a request that build made, also one that was sent before.
func (c *apiClient) roundTrip(r *http.Request) (*apiResponse, error) {
	r = r.Clone(r.Context())
	if r.GetBody != nil {
		body, err := r.GetBody()
		if err != nil {
			return nil, err
		}
		r.Body = body
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return &apiResponse{resp.StatusCode, resp.Header, body}, err
}

// send builds and sends. It may be called from any goroutine.
func (c *apiClient) send(ctx context.Context, q apiRequest) (*apiResponse, error) {
	r, err := c.build(ctx, q)
	if err != nil {
		return nil, err
	}
	return c.roundTrip(r)
}

// do asks and fails the test if there is no answer at all. body is sent as
// JSON; nil sends none.
func (c *apiClient) do(t testing.TB, method, path string, body any) *apiResponse {
	t.Helper()
	q := apiRequest{method: method, path: path}
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		q.body = raw
	}
	resp, err := c.send(t.Context(), q)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp
}

// answered asks until the node can say anything. A machine that stands still for
// longer than a lease leaves it without one for a moment, and 503 is then what it
// has to say. Only what has changed nothing is asked again.
func (c *apiClient) answered(t testing.TB, method, path string, body any) (resp *apiResponse) {
	t.Helper()
	bound, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_ = cluster.Poll(bound, func(context.Context) error {
		if resp = c.do(t, method, path, body); resp.undecided(method) {
			return errors.New("undecided")
		}
		return nil
	})
	return resp
}

// undecided says that a node could not tell, and did nothing.
func (r *apiResponse) undecided(method string) bool {
	return r.status == http.StatusServiceUnavailable && r.code() == bus.Unavailable && (method == http.MethodGet ||
		bytes.Contains(r.body, []byte(withoutLease)) || bytes.Contains(r.body, []byte("the nonce was not recorded")))
}

// want asks and demands a status.
func (c *apiClient) want(t testing.TB, status int, method, path string, body any) *apiResponse {
	t.Helper()
	ask := c.answered
	if status == http.StatusServiceUnavailable {
		ask = c.do
	}
	resp := ask(t, method, path, body)
	if resp.status != status {
		t.Fatalf("%s %s: %s, want %d", method, path, resp, status)
	}
	return resp
}

// dict is a JSON object.
type dict map[string]any
