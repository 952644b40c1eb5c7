// Package api is the HTTPS face of a node: it tells a load balancer whether
// the node may serve, and (with the membership API) changes users, rooms and
// members.
//
// Readiness is never a constant and never a guess. A background probe measures
// every few seconds; the handlers only read what it found, except for the
// lease, which is checked at the moment of asking. Anything unknown, stale or
// unproven is 503: a load balancer that gets no 200 sends nobody here.
package api

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"unibus.internal/bus"
)

// Config configures a Server.
type Config struct {
	Health *Health
	Log    *slog.Logger
	TLS    *tls.Config
}

// Server serves the API over TLS.
type Server struct {
	http *http.Server
	log  *slog.Logger
}

// NewServer lays out the routes. Everything that is not a probe needs a signed
// request, so that a stranger cannot tell which paths exist.
func NewServer(cfg Config) *Server {
	r := chi.NewRouter()
	r.Use(middleware.Recoverer)
	r.Group(func(r chi.Router) { // unauthenticated: probes only
		r.Get("/healthz", cfg.Health.serveHealthz)
		r.Head("/healthz", cfg.Health.serveHealthz)
		r.Get("/livez", serveLivez)
		r.Get("/readyz", cfg.Health.serveReadyz)
	})
	r.NotFound(refuseUnsigned)
	r.MethodNotAllowed(refuseUnsigned)
	return &Server{
		log: cfg.Log,
		http: &http.Server{
			Handler: http.MaxBytesHandler(r, 64<<10), TLSConfig: cfg.TLS,
			ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
			IdleTimeout: 60 * time.Second, MaxHeaderBytes: 16 << 10,
			ErrorLog: slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
		},
	}
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

// refuseUnsigned answers every path and method alike.
func refuseUnsigned(w http.ResponseWriter, _ *http.Request) {
	writeProblem(w, bus.E(bus.Unauthenticated, "a signed request is needed"))
}

var statusOf = map[bus.Code]int{
	bus.Invalid: http.StatusBadRequest, bus.Unauthenticated: http.StatusUnauthorized, bus.Forbidden: http.StatusForbidden,
	bus.NotFound: http.StatusNotFound, bus.Conflict: http.StatusConflict, bus.Unavailable: http.StatusServiceUnavailable,
	bus.Internal: http.StatusInternalServerError,
}

// problem is an RFC 9457 document.
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
}

// writeProblem maps an error to its problem document. A foreign error is an
// internal one, and its text stays here.
func writeProblem(w http.ResponseWriter, err error) {
	code, detail := bus.CodeOf(err), ""
	if e := new(bus.Error); errors.As(err, &e) && code != bus.Internal {
		detail = e.Msg
	}
	w.Header().Set("Content-Type", "application/problem+json")
	if code == bus.Unavailable {
		w.Header().Set("Retry-After", "2")
	}
	status := statusOf[code]
	writeBody(w, status, problem{Type: "urn:unibus:error:" + string(code), Title: http.StatusText(status), Status: status, Detail: detail})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	writeBody(w, status, v)
}

func writeBody(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
