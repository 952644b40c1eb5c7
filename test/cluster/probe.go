package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"time"
)

// Health is an answer of GET /healthz of the membership service.
type Health struct {
	Code     int    `json:"-"`
	Status   string `json:"status"`
	Node     string `json:"node"`
	Enforce  bool   `json:"enforce"`
	ACL      bool   `json:"acl"`
	TLS      bool   `json:"tls"`
	Cluster  bool   `json:"cluster"`
	Store    string `json:"store"`
	Replicas int    `json:"replicas"`
	Version  string `json:"version"`
	Error    string `json:"error"`
}

// probeTimeout bounds one request: a paused process answers nothing.
const probeTimeout = 2 * time.Second

// Client is an HTTPS client that trusts this cluster's client CA and nothing else.
func (l *Layout) Client() (*http.Client, error) { return l.client(0) }

// client is one on the machine of node i, or on ours if i is 0.
func (l *Layout) client(i int) (*http.Client, error) {
	pem, err := os.ReadFile(l.CA())
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", l.CA())
	}
	return &http.Client{
		Timeout: probeTimeout,
		// A new connection for each probe: a load balancer's check does the
		// same, and a kept one would hide a listener that is gone.
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true, DialContext: l.dialContext(i)},
	}, nil
}

func (l *Layout) dialContext(i int) func(context.Context, string, string) (net.Conn, error) {
	if i == 0 {
		return nil
	}
	return l.From(i).DialContext
}

// probe is a plain HTTP client for what listens on the loopback of node i.
func (l *Layout) probe(i int) *http.Client {
	client := &http.Client{Timeout: probeTimeout}
	if l.network != nil {
		client.Transport = &http.Transport{DialContext: l.dialContext(i), DisableKeepAlives: true}
	}
	return client
}

// Healthz asks node i's membership service. An error means that there was no
// answer at all; a 503 is an answer.
func (l *Layout) Healthz(ctx context.Context, i int) (Health, error) {
	client, err := l.client(i)
	if err != nil {
		return Health{}, err
	}
	code, body, err := get(ctx, client, l.APIURL(i)+"/healthz")
	if err != nil {
		return Health{}, err
	}
	h := Health{Code: code}
	if err := json.Unmarshal(body, &h); err != nil {
		return Health{}, fmt.Errorf("%s/healthz answered %d %.80q: %w", l.APIURL(i), code, body, err)
	}
	return h, nil
}

// Healthy returns nil if node i's /healthz is 200.
func (l *Layout) Healthy(ctx context.Context, i int) error {
	h, err := l.Healthz(ctx, i)
	if err != nil {
		return err
	}
	if h.Code != http.StatusOK {
		return fmt.Errorf("%s: %d %s", l.Node(i), h.Code, h.Error)
	}
	return nil
}

// NATSHealthy returns nil if node i's nats-server has a JetStream meta leader
// and has caught up.
func (l *Layout) NATSHealthy(ctx context.Context, i int) error {
	code, body, err := get(ctx, l.probe(i), l.MonitorURL(i)+"/healthz")
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("%s: nats-server: %d %.200s", l.Node(i), code, bytes.TrimSpace(body))
	}
	return nil
}

// CalloutReady returns nil if node i's authcallout says that it decides.
func (l *Layout) CalloutReady(ctx context.Context, i int) error {
	code, body, err := get(ctx, l.probe(i), l.AdminURL(i, Authcallout)+"/readyz")
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("%s: authcallout: %d %.200s", l.Node(i), code, bytes.TrimSpace(body))
	}
	return nil
}

// Monitor returns an answer of node i's nats-server on its monitoring port.
func (l *Layout) Monitor(ctx context.Context, i int, path string) ([]byte, error) {
	code, body, err := get(ctx, l.probe(i), l.MonitorURL(i)+path)
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("%s%s: %d", l.MonitorURL(i), path, code)
	}
	return body, err
}

func get(ctx context.Context, client *http.Client, url string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, body, err
}

const pollInterval = 100 * time.Millisecond

// Poll tries cond until it returns nil, or ctx ends; then the error says what
// cond said last.
func Poll(ctx context.Context, cond func(context.Context) error) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	var last error
	for {
		err := cond(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil {
			last = err // not the "deadline exceeded" of the very last try
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), last)
		case <-ticker.C:
		}
	}
}

// WaitFor fails the test unless cond returns nil within timeout. What names
// the condition: "n3 to rejoin".
func WaitFor(t testing.TB, timeout time.Duration, what string, cond func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	start := time.Now()
	err := Poll(ctx, func(context.Context) error { return cond() })
	if err != nil {
		t.Fatalf("waited %s for %s: %v", time.Since(start).Round(time.Millisecond), what, err)
	}
	t.Logf("%s: %s", what, time.Since(start).Round(time.Millisecond))
}

// Hold fails the test as soon as cond returns an error during the given time.
func Hold(t testing.TB, during time.Duration, what string, cond func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), during)
	defer cancel()
	errHolds := errors.New("holds")
	var broken error
	_ = Poll(ctx, func(context.Context) error {
		if broken = cond(); broken != nil {
			return nil
		}
		return errHolds
	})
	if broken != nil {
		t.Fatalf("%s did not hold for %s: %v", what, during, broken)
	}
}
