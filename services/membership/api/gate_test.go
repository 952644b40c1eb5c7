package api

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// newTestServer is a whole server whose nats-server is not there: it holds no
// lease and never will. What needs one is tested on live clusters.
func newTestServer(t *testing.T, edit func(*Config)) (*Server, *prometheus.Registry) {
	t.Helper()
	nc, err := nats.Connect("nats://127.0.0.1:1", nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectBufSize(-1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	view, err := kv.NewView(kv.ViewConfig{Conn: nc, Service: "membership", Node: "n1", Lease: kv.DefaultLease, EncryptionKeys: true})
	if err != nil {
		t.Fatal(err)
	}
	store, err := kv.OpenStore(kv.StoreConfig{View: view})
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	reg := prometheus.NewRegistry()
	cfg := Config{
		Health: NewHealth(HealthConfig{Node: "n1", View: view, Conn: nc, Log: log, Now: time.Now}), Log: log,
		View: view, Store: store, Audit: kv.OpenAudit(kv.AuditConfig{Conn: nc, Instance: "membership-n1", Log: log, Now: time.Now}), Conn: nc,
		Lease: kv.DefaultLease, Authorities: []string{"127.0.0.1:8470"},
		RateKey: Rate{50, 200}, RateAddress: Rate{200, 800}, MaxRequests: 4, Metrics: reg,
	}
	if edit != nil {
		edit(&cfg)
	}
	return NewServer(cfg), reg
}

func (s *Server) answer(r *http.Request) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	s.route(w, r)
	return w
}

// Every route but the probes and the documentation stands behind the gate, and
// so does what is no route.
func TestEveryRouteIsBehindTheGate(t *testing.T) {
	s, _ := newTestServer(t, nil)
	var public []string
	if err := chi.Walk(s.public, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		public = append(public, method+" "+route)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(public)
	if got, want := strings.Join(public, ", "), "GET /healthz, GET /livez, GET /openapi.json, GET /readyz, HEAD /healthz"; got != want {
		t.Errorf("public routes: %s, want %s", got, want)
	}
	routes := 0
	if err := chi.Walk(s.signed, func(method, route string, _ http.Handler, before ...func(http.Handler) http.Handler) error {
		if routes++; len(before) != 1 {
			t.Errorf("%s %s has %d middlewares, want the gate", method, route, len(before))
		}
		// The gate answers before the route: without a lease 503, whoever asks.
		path := strings.NewReplacer("{user}", "alice", "{room}", "ops", "{id}", "5f0c1f2e3d4c5b6a").Replace(route)
		if w := s.answer(httptest.NewRequest(method, path, nil)); w.Code != http.StatusServiceUnavailable {
			t.Errorf("%s %s: %d", method, route, w.Code)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if routes != len(operations()) {
		t.Errorf("%d routes, %d operations", routes, len(operations()))
	}
	for _, path := range []string{"/", "/v1", "/v1/nothing", "/healthz/", "/metrics", "/debug/pprof/", "/v1/me/"} {
		for _, method := range []string{"GET", "POST", "HEAD", "BREW"} {
			w := s.answer(httptest.NewRequest(method, path, nil))
			if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" || w.Header().Get("Content-Type") != "application/problem+json" {
				t.Errorf("%s %s: %d %v", method, path, w.Code, w.Header())
			}
		}
	}
	if w := s.answer(httptest.NewRequest("POST", "/healthz", nil)); w.Code != http.StatusServiceUnavailable || w.Header().Get("X-Request-Id") == "" {
		t.Errorf("POST /healthz went past the gate: %d", w.Code)
	}
}

// Without a caller no handler runs, also if the gate were taken away.
func TestNoHandlerWithoutACaller(t *testing.T) {
	s, _ := newTestServer(t, nil)
	ungated := chi.NewRouter()
	g := &gate{log: slog.New(slog.DiscardHandler), now: time.Now, metrics: newMetrics(prometheus.NewRegistry(), func() uint64 { return 0 })}
	ungated.Use(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			x := &exchange{gate: g, w: w, r: r}
			next.ServeHTTP(w, r.WithContext(withExchange(r.Context(), x)))
		})
	})
	for _, o := range operations() {
		ungated.Method(o.method, o.path, o.handler(&api{}))
		path := strings.NewReplacer("{user}", "alice", "{room}", "ops", "{id}", "5f0c1f2e3d4c5b6a").Replace(o.path)
		w := httptest.NewRecorder()
		ungated.ServeHTTP(w, httptest.NewRequest(o.method, path, strings.NewReader("{}")))
		if w.Code != http.StatusUnauthorized {
			t.Errorf("%s answered %d to nobody", o.id, w.Code)
		}
	}
	_ = s
}

// The rate of an address is looked at before all else, and only its own.
func TestAddressesAreLimitedFirst(t *testing.T) {
	s, reg := newTestServer(t, func(c *Config) { c.RateAddress = Rate{1, 2} })
	ask := func(from string) int {
		r := httptest.NewRequest("GET", "/v1/me", nil)
		r.RemoteAddr = from
		return s.answer(r).Code
	}
	for i, want := range []int{503, 503, 429, 429} {
		if got := ask("198.18.0.1:1000"); got != want {
			t.Errorf("request %d: %d, want %d", i, got, want)
		}
	}
	if got := ask("198.18.0.2:1000"); got != 503 {
		t.Errorf("another address: %d", got)
	}
	if got := counted(t, reg, "unibus_rate_limited_total"); got != 2 {
		t.Errorf("counted %v", got)
	}
}

func counted(t *testing.T, reg *prometheus.Registry, name string) (sum float64) {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

func TestMetricsAreWellNamed(t *testing.T) {
	reg := prometheus.NewRegistry()
	m := newMetrics(reg, func() uint64 { return 1 })
	m.observe("/v1/me", "GET", 200, time.Millisecond)
	m.observe(unmatched, "BREW", 401, time.Millisecond)
	m.refused.WithLabelValues("skew").Inc()
	m.nonces.WithLabelValues("replay").Inc()
	m.limited.WithLabelValues("key").Inc()
	m.underWay(reg, func() int { return 1 })
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if len(families) != 14 {
		t.Errorf("%d metrics, want 14", len(families))
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, f := range families {
		for _, series := range f.GetMetric() {
			for _, l := range series.GetLabel() {
				if !slices.Contains([]string{"route", "method", "code", "reason", "by", "change", "why", "direction", "result"}, l.GetName()) || l.GetValue() == "BREW" {
					t.Errorf("%s has the label %s=%s", f.GetName(), l.GetName(), l.GetValue())
				}
			}
		}
	}
}

// A forwarded address is believed from a trusted proxy only, and only the part
// that the proxy itself has seen.
func TestClientAddress(t *testing.T) {
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
	for _, tt := range []struct {
		peer      string
		forwarded []string
		want      string
	}{
		{"198.18.0.1:1", nil, "198.18.0.1"},
		{"198.18.0.1:1", []string{"203.0.113.1"}, "198.18.0.1"},
		{"10.0.0.1:1", nil, "10.0.0.1"},
		{"10.0.0.1:1", []string{"203.0.113.1"}, "203.0.113.1"},
		{"10.0.0.1:1", []string{"1.2.3.4, 203.0.113.1"}, "203.0.113.1"},
		{"10.0.0.1:1", []string{"1.2.3.4", "203.0.113.1, 10.0.0.2"}, "203.0.113.1"},
		{"10.0.0.1:1", []string{"203.0.113.1:4711"}, "203.0.113.1"},
		{"10.0.0.1:1", []string{"10.0.0.3, 10.0.0.2"}, "10.0.0.1"},
		{"10.0.0.1:1", []string{"203.0.113.1, unknown"}, "10.0.0.1"},
		{"10.0.0.1:1", []string{"203.0.113.1, <script>"}, "10.0.0.1"},
		{"[fd00::1]:1", []string{"2001:db8::5"}, "2001:db8::5"},
		{"[::ffff:10.0.0.1]:1", []string{"203.0.113.1"}, "203.0.113.1"},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = tt.peer
		for _, f := range tt.forwarded {
			r.Header.Add("X-Forwarded-For", f)
		}
		if got := clientAddress(r, trusted); got.String() != tt.want {
			t.Errorf("%s %q: %s, want %s", tt.peer, tt.forwarded, got, tt.want)
		}
	}
	if budgetOf(netip.MustParseAddr("2001:db8::1")) != budgetOf(netip.MustParseAddr("2001:db8::2")) ||
		budgetOf(netip.MustParseAddr("2001:db8::1")) == budgetOf(netip.MustParseAddr("2001:db8:0:1::1")) {
		t.Error("budgets of IPv6 are not those of a /64")
	}
}

// Who sends a body slowly is cut off, and keeps nobody else waiting meanwhile.
func TestSlowBodiesAreCut(t *testing.T) {
	const patience = 300 * time.Millisecond
	refusals := make(chan error, 1)
	g := &gate{
		log: slog.New(slog.DiscardHandler), now: time.Now, patience: patience, readers: make(chan struct{}, 1),
		metrics: newMetrics(prometheus.NewRegistry(), func() uint64 { return 0 }),
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := &exchange{gate: g, w: w, r: r}
		if err := g.readBody(x); err != nil {
			x.fail(err)
			refusals <- err
			return
		}
		x.send(http.StatusOK, len(x.body))
	}))
	t.Cleanup(srv.Close)
	conn, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, "POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	started := time.Now()
	select {
	case err := <-refusals:
		if bus.CodeOf(err) != bus.Unauthenticated {
			t.Errorf("slow body: %v", err)
		}
	case <-time.After(10 * patience):
		t.Fatalf("nothing happened in %s", time.Since(started))
	}
	for _, body := range []string{"", "{}"} {
		resp, err := http.Post(srv.URL, "application/json", strings.NewReader(body))
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%q: %v %v", body, resp, err)
			continue
		}
		_ = resp.Body.Close()
	}
}

// A limiter stays small, and does not forget who is active.
func TestLimiterIsBounded(t *testing.T) {
	l := newLimiter[int](Rate{PerSecond: 0.001, Burst: 1})
	now := time.Now()
	for i := range 5 * maxBuckets {
		l.take(i, now)
		l.take(-1, now)
	}
	if n := len(l.young) + len(l.old); n > 2*maxBuckets {
		t.Errorf("%d buckets", n)
	}
	if _, ok := l.take(-1, now); ok {
		t.Error("an active key got a new budget")
	}
	for _, s := range []string{"", "50", "50:", ":5", "0:5", "-1:5", "5:0", "nan:5", "inf:5", "1:1:1"} {
		if _, err := ParseRate(s); err == nil {
			t.Errorf("rate %q was taken", s)
		}
	}
}

// A foreign error's text never leaves, and all unauthenticated look alike.
func TestProblems(t *testing.T) {
	p, _ := problemOf(errors.New("dial tcp 10.0.0.1: secret"), "id")
	if p.Status != 500 || p.Detail != "" || p.Type != "urn:unibus:error:internal" {
		t.Errorf("foreign: %+v", p)
	}
	if p, _ := problemOf(bus.E(bus.Internal, "record of secret"), "id"); p.Detail != "" {
		t.Errorf("internal: %+v", p)
	}
	if p, _ := problemOf(bus.E("made_up", "x"), "id"); p.Status != 500 {
		t.Errorf("unknown code: %+v", p)
	}
	x, hx := problemOf(bus.E(bus.Unauthenticated, "the nonce was used before").WithHint("x"), "id1")
	y, hy := problemOf(errRefused, "id2")
	if x != y || hx.Get("WWW-Authenticate") != hy.Get("WWW-Authenticate") {
		t.Errorf("%+v and %+v differ", x, y)
	}
	p, h := problemOf(tooMany(1500*time.Millisecond, "key"), "id")
	if p.Status != 429 || p.Type != "urn:unibus:error:unavailable" || h.Get("Retry-After") != "2" {
		t.Errorf("limited: %+v %v", p, h)
	}
	p, h = problemOf(bus.E(bus.Unavailable, "no quorum").WithHint("unibusctl cluster status"), "id")
	if p.Status != 503 || h.Get("Retry-After") != "2" || p.Hint == "" || p.RequestID != "id" {
		t.Errorf("unavailable: %+v %v", p, h)
	}
}

// A panic ends its request with a 500 and nothing else.
func TestPanicEndsOneRequest(t *testing.T) {
	var logged bytes.Buffer
	g := &gate{log: slog.New(slog.NewTextHandler(&logged, nil)), now: time.Now, metrics: newMetrics(prometheus.NewRegistry(), func() uint64 { return 0 })}
	w := httptest.NewRecorder()
	func() {
		x := &exchange{gate: g, w: w, r: httptest.NewRequest("GET", "/v1/me", nil), id: "abc"}
		defer x.end()
		panic("secret")
	}()
	if body, _ := io.ReadAll(w.Body); w.Code != 500 || bytes.Contains(body, []byte("secret")) || !strings.Contains(logged.String(), "secret") {
		t.Errorf("%d %s\n%s", w.Code, body, logged.String())
	}
}
