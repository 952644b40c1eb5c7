// Package api is the HTTPS face of a node: it tells a load balancer whether
// the node may serve, and lets users and admins manage users, invites, rooms
// and members, and read the audit.
//
// Readiness is never a constant and never a guess. A background probe measures
// every few seconds; the handlers only read what it found, except for the
// lease, which is checked at the moment of asking. Anything unknown, stale or
// unproven is 503: a load balancer that gets no 200 sends nobody here.
//
// Below /v1 a request passes, in this order: rate of its address, lease, size,
// number in flight, signature, standing of its key, rate of the key, nonce
// (auth.go); its route and the grammar of everything it says (decode.go);
// authorization (may.go); for a change the audit (trail.go), and once more all
// that could have changed since, right before each write (operation.go). Until
// the key is known to be an active user's, every failure looks the same.
//
// What a route takes, answers and may fail with stands in one table
// (operations), from which the router, the checks and /openapi.json are made.
package api

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/services/membership/recorder"
)

// Config configures a Server.
type Config struct {
	Health  *Health
	Log     *slog.Logger
	TLS     *tls.Config
	Version string

	View  *kv.View
	Store *kv.Store          // shared with everything else in the process that changes records
	Rooms *recorder.Recorder // what durable rooms store
	Audit *kv.Audit          // running beside the View
	Conn  *nats.Conn         // for reads of the audit
	Blobs *kv.Blobs          // nil: the node stores no files
	Lease time.Duration

	Authorities []string       // host:port that clients may mean by this node; never empty
	Proxies     []netip.Prefix // whose X-Forwarded-For is believed
	RateKey     Rate           // of one user
	RateAddress Rate           // of one IPv4 address or IPv6 /64
	MaxRequests int            // in flight behind the signature

	Metrics prometheus.Registerer
	Now     func() time.Time // nil: time.Now
	Random  io.Reader        // for ids of requests; nil: crypto/rand
}

// Server serves the API over TLS.
type Server struct {
	http   *http.Server
	public chi.Router // probes and documentation
	signed chi.Router // everything else, known or not
	log    *slog.Logger
}

// ProofMargin is what a change may take beyond the lease that it waits out.
const ProofMargin = 5 * time.Second

// NewServer lays out the routes.
func NewServer(cfg Config) *Server {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Random == nil {
		cfg.Random = rand.Reader
	}
	m := newMetrics(cfg.Metrics, cfg.Audit.Dropped)
	t := &trail{audit: cfg.Audit, log: cfg.Log, now: cfg.Now, metrics: m, denials: newLimiter[bus.UserKey](denialRate)}
	g := &gate{
		view: cfg.View, store: cfg.Store, audit: t, log: cfg.Log, now: cfg.Now, random: cfg.Random, metrics: m,
		authorities: cfg.Authorities, proxies: cfg.Proxies, patience: bodyTimeout,
		addresses: newLimiter[netip.Prefix](cfg.RateAddress), keys: newLimiter[bus.UserKey](cfg.RateKey),
		streams: streamRoutes(),
		readers: make(chan struct{}, readersPerSlot*cfg.MaxRequests), slots: make(chan struct{}, cfg.MaxRequests),
	}
	a := &api{
		view: cfg.View, store: cfg.Store, stored: cfg.Rooms, conn: cfg.Conn, blobs: cfg.Blobs, audit: t, now: cfg.Now, patrol: cfg.Lease + ProofMargin,
		verifying: make(chan struct{}, 1), larges: make(chan struct{}, maxLarge), transfers: transfers{of: map[bus.UserKey]int{}}, metrics: m,
	}
	m.underWay(cfg.Metrics, a.transfers.count)
	s := &Server{log: cfg.Log, public: publicRoutes(cfg.Health, openAPI(cfg.Version)), signed: signedRoutes(g, a)}
	s.http = &http.Server{
		Handler: http.HandlerFunc(s.route), TLSConfig: cfg.TLS,
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: bodyTimeout, WriteTimeout: 2*kv.DefaultLease + 2*ProofMargin,
		IdleTimeout: 60 * time.Second, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	return s
}

func publicRoutes(health *Health, doc []byte) chi.Router {
	r := chi.NewRouter()
	r.Get("/healthz", health.serveHealthz)
	r.Head("/healthz", health.serveHealthz)
	r.Get("/livez", serveLivez)
	r.Get("/readyz", health.serveReadyz)
	r.Get("/openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(doc)
	})
	return r
}

// signedRoutes puts the gate before the router, so that it also guards what is
// not there.
func signedRoutes(g *gate, a *api) chi.Router {
	signed := chi.NewRouter()
	signed.Use(g.handler)
	for _, o := range operations() {
		signed.Method(o.method, o.path, o.handler(a))
	}
	signed.NotFound(func(_ http.ResponseWriter, r *http.Request) {
		exchangeOf(r).fail(bus.E(bus.NotFound, "there is no such route").WithHint("GET /openapi.json lists them"))
	})
	signed.MethodNotAllowed(func(w http.ResponseWriter, r *http.Request) {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
			if signed.Match(chi.NewRouteContext(), method, r.URL.Path) {
				w.Header().Add("Allow", method)
			}
		}
		exchangeOf(r).fail(errMethod)
	})
	return signed
}

// streamRoutes tells a request whose route takes the body as it comes, as the
// router would.
func streamRoutes() func(r *http.Request) bool {
	routes := chi.NewRouter()
	for _, o := range operations() {
		if o.streams || o.large > 0 {
			routes.Method(o.method, o.path, http.NotFoundHandler())
		}
	}
	return func(r *http.Request) bool {
		path := r.URL.RawPath
		if path == "" {
			path = r.URL.Path
		}
		return routes.Match(chi.NewRouteContext(), r.Method, path)
	}
}

// route sends the probes and the documentation one way and all else the other.
func (s *Server) route(w http.ResponseWriter, r *http.Request) {
	if s.public.Match(chi.NewRouteContext(), r.Method, r.URL.Path) {
		s.public.ServeHTTP(w, r)
		return
	}
	// Trailers come with the end of the body, into the server's own request.
	// Only a map that is there is shared with the copy that the router makes, so
	// without it the gate never sees trailers that were not announced.
	if r.Trailer == nil {
		r.Trailer = http.Header{}
	}
	s.signed.ServeHTTP(w, r)
}

// Serve serves until Shutdown; ln is a plain TCP listener.
func (s *Server) Serve(ln net.Listener) error {
	err := s.http.ServeTLS(ln, "", "")
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Shutdown stops accepting and waits for requests in flight until ctx ends.
func (s *Server) Shutdown(ctx context.Context) error { return s.http.Shutdown(ctx) }

func serveLivez(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}
