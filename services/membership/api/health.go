package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus/kv"
)

const (
	probeEvery   = 2 * time.Second
	probeStale   = 3*probeEvery + probeTimeout
	probeTimeout = 1500 * time.Millisecond
	postureEvery = 10 * time.Second

	// An election takes up to 9 s, two rounds if votes split, and is seen one
	// measurement late. This need not be short: without a quorum the lease is
	// lost within its own time, whatever the streams last said.
	leaderGrace = 2*kv.DefaultLease + probeEvery + probeTimeout
)

// HealthConfig configures a Health.
type HealthConfig struct {
	Node    string
	Version string
	View    *kv.View
	Conn    *nats.Conn
	Roots   func() (*x509.CertPool, error) // whom the anonymous probe trusts, asked each time
	Certs   *Certificates
	Log     *slog.Logger
	Now     func() time.Time
}

// Health measures whether this node may serve.
type Health struct {
	cfg HealthConfig

	mu       sync.Mutex
	at       time.Time // of the last completed probe
	streams  map[string]sighting
	reports  []kv.StreamHealth
	posture  posture
	linked   bool // to the own nats-server
	draining bool
	starting string // what start-up waits for; "" when it is over
}

// sighting is when a stream was last seen with a leader and its definition in
// order. Between two elections that is old news, never longer than leaderGrace.
type sighting struct {
	at  time.Time
	err error
}

// posture is what a stranger and a service find at our own server.
type posture struct {
	enforce bool // a connection without credentials was refused
	acl     bool // our own connection is confined to account CTRL by permissions
	tls     bool
	cluster bool
}

// NewHealth prepares a Health; it says 503 until Run has measured.
func NewHealth(cfg HealthConfig) *Health {
	return &Health{cfg: cfg, streams: map[string]sighting{}, starting: "starting"}
}

// Starting tells what start-up waits for; "" ends it.
func (h *Health) Starting(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.starting = what
}

// Drain makes the node say 503 while it finishes what it has.
func (h *Health) Drain() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.draining = true
}

// Run measures until ctx ends.
func (h *Health) Run(ctx context.Context) {
	go h.followLink(ctx)
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	var lastPosture time.Time
	for {
		h.probeStreams(ctx)
		if h.cfg.Now().Sub(lastPosture) > postureEvery || !h.postureGood() {
			lastPosture = h.cfg.Now()
			h.probePosture(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// followLink keeps what is known of the connection to the own server. To ask the
// connection itself may take seconds: it answers nothing while it tries a server
// that hangs, and neither a load balancer nor a scrape waits for that.
func (h *Health) followLink(ctx context.Context) {
	changed := h.cfg.Conn.StatusChanged()
	defer h.cfg.Conn.RemoveStatusListener(changed)
	status := h.cfg.Conn.Status()
	for {
		h.mu.Lock()
		h.linked = status == nats.CONNECTED
		h.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case status = <-changed:
		}
	}
}

func (h *Health) probeStreams(ctx context.Context) {
	pctx, cancel := context.WithTimeout(ctx, probeTimeout)
	reports := kv.Health(pctx, h.cfg.Conn)
	cancel()
	now := h.cfg.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, r := range reports {
		s := h.streams[r.Stream]
		switch {
		case r.Err == nil && r.Leader != "":
			s = sighting{at: now}
		case r.Replicas != 0: // it answered, and is not what it must be
			s.err = r.Err
		}
		h.streams[r.Stream] = s
		if r.Replicas == 0 && i < len(h.reports) { // no answer says nothing about the number
			reports[i].Replicas = h.reports[i].Replicas
		}
	}
	h.at, h.reports = now, reports
}

func (h *Health) postureGood() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.posture == posture{true, true, true, true}
}

func (h *Health) probePosture(ctx context.Context) {
	var p posture
	if state, err := h.cfg.Conn.TLSConnectionState(); err == nil {
		p.tls = state.Version >= tls.VersionTLS12
	}
	p.cluster = h.cfg.Conn.ConnectedClusterName() != "" && h.peersSeen()
	p.acl = h.confined(ctx)
	p.enforce = h.strangerRefused()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.posture = p
}

// peersSeen reports whether the streams count at least one other server.
func (h *Health) peersSeen() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, r := range h.reports {
		if r.FollowersCurrent > 0 {
			return true
		}
	}
	return false
}

// confined asks our own server who we are to it.
func (h *Health) confined(ctx context.Context) bool {
	pctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	m, err := h.cfg.Conn.RequestWithContext(pctx, "$SYS.REQ.USER.INFO", nil)
	if err != nil {
		return false
	}
	var info struct {
		Data struct {
			Account     string `json:"account"`
			Permissions *struct {
				Publish   *struct{ Allow []string } `json:"publish"`
				Subscribe *struct{ Allow []string } `json:"subscribe"`
			} `json:"permissions"`
		} `json:"data"`
	}
	if json.Unmarshal(m.Data, &info) != nil || info.Data.Account != "CTRL" || info.Data.Permissions == nil {
		return false
	}
	p := info.Data.Permissions
	return p.Publish != nil && len(p.Publish.Allow) > 0 && p.Subscribe != nil && len(p.Subscribe.Allow) > 0
}

// strangerRefused connects without credentials to our own server. Being let in
// is the one failure that must take a node out of service at once; a silence
// lets nobody in.
func (h *Health) strangerRefused() bool {
	nc, err := nats.Connect(h.cfg.Conn.ConnectedUrl(), nats.ClientTLSConfig(nil, h.cfg.Roots), nats.NoReconnect(),
		nats.Timeout(probeTimeout), nats.Name("unibus posture probe"))
	if err == nil {
		nc.Close()
		h.cfg.Log.Error("a connection without credentials was admitted; this node leaves service", "url", nc.ConnectedUrl())
		return false
	}
	return !errors.Is(err, nats.ErrNoServers) // unreachable proves nothing
}

// Report is the body of /healthz.
type Report struct {
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

// check is one part of readiness; why is empty when it holds.
type check struct {
	name string
	why  string
}

// Ready reports whether this node may serve now, and if not, why.
func (h *Health) Ready() (bool, string) {
	for _, c := range h.checks() {
		if c.why != "" {
			return false, c.why
		}
	}
	return true, ""
}

func (h *Health) checks() []check {
	now := h.cfg.Now()
	_, lease := h.cfg.View.Lease()
	fault := h.cfg.View.Fault()
	h.mu.Lock()
	defer h.mu.Unlock()
	return []check{
		{"start", h.starting},
		{"drain", when(h.draining, "draining")},
		{"nats", when(!h.linked, "not connected to the own nats-server")},
		{"lease", when(!lease, "no lease: "+fault)},
		{"buckets", h.bucketFault(now)},
		{"certificate", h.cfg.Certs.fault(now)},
		{"probe", when(now.Sub(h.at) > probeStale, "the last measurement is too old")},
		{"enforce", when(!h.posture.enforce, "not proven that strangers are refused")},
		{"acl", when(!h.posture.acl, "not proven that permissions are enforced")},
		{"tls", when(!h.posture.tls, "the connection to the own nats-server is not TLS")},
		{"cluster", when(!h.posture.cluster, "no other server seen in the cluster")},
	}
}

func when(bad bool, why string) string {
	if bad {
		return why
	}
	return ""
}

// bucketFault names the first stream that is not as it must be. A leader that
// is missing for less than the grace is an election.
func (h *Health) bucketFault(now time.Time) string {
	for _, want := range kv.Streams() {
		s := h.streams[want.Name]
		switch {
		case s.err != nil:
			return s.err.Error()
		case now.Sub(s.at) > leaderGrace:
			return fmt.Sprintf("stream %s has had no leader for %s", want.Name, leaderGrace)
		}
	}
	return ""
}

func (h *Health) report() (Report, bool) {
	ok, why := h.Ready()
	h.mu.Lock()
	defer h.mu.Unlock()
	r := Report{
		Status: "ok", Node: h.cfg.Node, Enforce: h.posture.enforce, ACL: h.posture.acl, TLS: h.posture.tls,
		Cluster: h.posture.cluster, Store: "kv", Version: h.cfg.Version, Error: why,
	}
	for i, s := range h.reports {
		if i == 0 || s.Replicas < r.Replicas {
			r.Replicas = s.Replicas
		}
	}
	if !ok {
		r.Status = "unavailable"
	}
	return r, ok
}

func (h *Health) serveHealthz(w http.ResponseWriter, _ *http.Request) {
	r, ok := h.report()
	writeJSON(w, statusFor(ok), r)
}

// serveReadyz lists the parts of the same answer.
func (h *Health) serveReadyz(w http.ResponseWriter, _ *http.Request) {
	parts := map[string]string{}
	ok := true
	for _, c := range h.checks() {
		parts[c.name] = "ok"
		if c.why != "" {
			parts[c.name], ok = c.why, false
		}
	}
	writeJSON(w, statusFor(ok), map[string]any{"status": map[bool]string{true: "ok", false: "unavailable"}[ok], "checks": parts})
}

func statusFor(ok bool) int {
	if ok {
		return http.StatusOK
	}
	return http.StatusServiceUnavailable
}
