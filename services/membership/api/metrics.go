package api

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"unibus.internal/bus"
)

// Collector exposes what Health measured. It does no I/O of its own.
func (h *Health) Collector() prometheus.Collector { return collector{h} }

type collector struct{ h *Health }

var (
	descReady    = prometheus.NewDesc("unibus_ready", "1 if this node may serve.", nil, nil)
	descCheck    = prometheus.NewDesc("unibus_ready_check", "1 if this part of readiness holds.", []string{"check"}, nil)
	descReplicas = prometheus.NewDesc("unibus_kv_replicas_configured", "Replicas a stream is configured with.", []string{"stream"}, nil)
	descCurrent  = prometheus.NewDesc("unibus_kv_followers_current", "Followers of a stream that are current.", []string{"stream"}, nil)
	descLag      = prometheus.NewDesc("unibus_kv_max_follower_lag", "Operations the slowest follower of a stream is behind.", []string{"stream"}, nil)
	descMessages = prometheus.NewDesc("unibus_kv_messages", "Messages a stream holds, barriers and history included.", []string{"stream"}, nil)
	descBytes    = prometheus.NewDesc("unibus_kv_bytes", "Bytes a stream holds.", []string{"stream"}, nil)
	descLimit    = prometheus.NewDesc("unibus_kv_limit_bytes", "Bytes at which a stream takes no more; none if it drops the oldest instead.", []string{"stream"}, nil)
	descBroken   = prometheus.NewDesc("unibus_kv_broken_records", "Records that cannot be decoded; each denies its own key.", nil, nil)
	descUsers    = prometheus.NewDesc("unibus_users", "Users by role and status.", []string{"role", "status"}, nil)
	descRooms    = prometheus.NewDesc("unibus_rooms", "Rooms by status, durable and encrypted.", []string{"status", "durable", "encrypted"}, nil)
	descCert     = prometheus.NewDesc("unibus_tls_certificate_not_after_timestamp_seconds", "When the certificate of the API expires.", []string{"role"}, nil)
	descLease    = prometheus.NewDesc("unibus_lease_remaining_seconds", "Time for which decisions may still be made.", nil, nil)
)

func (c collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

func (c collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	ready, _ := c.h.Ready()
	gauge(descReady, number(ready))
	for _, k := range c.h.checks() {
		gauge(descCheck, number(k.why == ""), k.name)
	}
	until, held := c.h.cfg.View.Lease()
	gauge(descLease, max(0, until.Sub(c.h.cfg.Now()).Seconds())*number(held))
	gauge(descBroken, float64(len(c.h.cfg.View.Broken())))
	gauge(descCert, float64(c.h.cfg.Certs.NotAfter().Unix()), "api")
	counts := map[[2]string]int{}
	for _, u := range c.h.cfg.View.Users() {
		counts[[2]string{string(u.Role), string(u.Status)}]++
	}
	for k, n := range counts {
		gauge(descUsers, float64(n), k[0], k[1])
	}
	rooms := map[[3]string]int{}
	for _, r := range c.h.cfg.View.Rooms() {
		rooms[[3]string{string(r.Status), strconv.FormatBool(r.Durable), strconv.FormatBool(r.Encrypted)}]++
	}
	for k, n := range rooms {
		gauge(descRooms, float64(n), k[0], k[1], k[2])
	}
	c.h.mu.Lock()
	reports := c.h.reports
	c.h.mu.Unlock()
	for _, r := range reports {
		gauge(descReplicas, float64(r.Replicas), r.Stream)
		gauge(descCurrent, float64(r.FollowersCurrent), r.Stream)
		gauge(descLag, float64(r.MaxLag), r.Stream)
		gauge(descMessages, float64(r.Messages), r.Stream)
		gauge(descBytes, float64(r.Bytes), r.Stream)
		if r.LimitBytes > 0 {
			gauge(descLimit, float64(r.LimitBytes), r.Stream)
		}
	}
}

func number(ok bool) float64 {
	if ok {
		return 1
	}
	return 0
}

// metrics counts requests. No label carries a user, a room, an address or a
// path that a client chose.
type metrics struct {
	requests     *prometheus.CounterVec
	duration     *prometheus.HistogramVec
	refused      *prometheus.CounterVec
	nonces       *prometheus.CounterVec
	limited      *prometheus.CounterVec
	auditFailed  prometheus.Counter
	auditDropped prometheus.Counter
	proofs       *prometheus.HistogramVec
	unproven     *prometheus.CounterVec
	closed       prometheus.Counter
	transfers    *prometheus.CounterVec
	transferred  *prometheus.CounterVec
}

// newMetrics registers the metrics of the API; dropped counts what the writer
// of the audit had to drop.
func newMetrics(reg prometheus.Registerer, dropped func() uint64) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_http_requests_total", Help: "Requests to the API by route (none: it reached none), method and status.",
		}, []string{"route", "method", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "unibus_http_request_duration_seconds", Help: "Time from the headers of a request to its answer.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 15},
		}, []string{"route", "method"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_auth_refused_total", Help: "Requests answered 401, by what was wrong.",
		}, []string{"reason"}),
		nonces: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_nonce_rejected_total", Help: "Nonces that were not consumed: used before (replay), or not recorded (unavailable).",
		}, []string{"reason"}),
		limited: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_rate_limited_total", Help: "Requests turned away by the rate of an address or key, or because too many are in flight (concurrency).",
		}, []string{"by"}),
		auditFailed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "unibus_audit_failed_total", Help: "Attempts that could not be recorded; only changes that take access away went on.",
		}),
		auditDropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "unibus_audit_suppressed_total", Help: "Denials not recorded because one key caused too many.",
		}),
		proofs: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "unibus_proof_duration_seconds", Help: "Time from the write of a change to its proof, for what narrows access (then the servers were asked too) and the rest.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 15},
		}, []string{"change"}),
		unproven: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_unproven_total", Help: "Changes answered 202: a server did not say that nothing is left (server), or a lease was not over (lease).",
		}, []string{"why"}),
		closed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "unibus_connections_closed_total", Help: "Connections that changes and kicks asked of this node have closed.",
		}),
		transfers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_blob_transfers_total", Help: "Files that were received (in) or sent (out), whole or by range: done, or failed under way.",
		}, []string{"direction", "result"}),
		transferred: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_blob_bytes_total", Help: "Bytes of files that were received (in) or sent (out).",
		}, []string{"direction"}),
	}
	for _, way := range []string{transferIn, transferOut} {
		m.transferred.WithLabelValues(way)
		for _, result := range []string{transferDone, transferFailed} {
			m.transfers.WithLabelValues(way, result)
		}
	}
	for _, change := range []string{changeNarrows, changeOther} { // there at zero, so that the first one is a rise
		m.proofs.WithLabelValues(change)
	}
	for _, why := range []string{whyServer, whyLease} {
		m.unproven.WithLabelValues(why)
	}
	for _, reason := range []string{"replay", "unavailable"} {
		m.nonces.WithLabelValues(reason)
	}
	for _, by := range []string{"address", "key", "concurrency"} {
		m.limited.WithLabelValues(by)
	}
	for _, reason := range []string{"signature", "skew", "replay", "unknown", standingRevoked} {
		m.refused.WithLabelValues(reason)
	}
	reg.MustRegister(m.requests, m.duration, m.refused, m.nonces, m.limited, m.auditFailed, m.auditDropped, m.proofs, m.unproven, m.closed, m.transfers, m.transferred,
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "unibus_audit_dropped_total", Help: "Entries that the audit's writer had to drop.",
		}, func() float64 { return float64(dropped()) }))
	return m
}

// The values of the labels of transfers.
const (
	transferIn     = "in"
	transferOut    = "out"
	transferDone   = "done"
	transferFailed = "failed"
)

// underWay shows how many files are on their way now.
func (m *metrics) underWay(reg prometheus.Registerer, count func() int) {
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "unibus_blob_transfers_in_flight", Help: "Files on their way through this node.",
	}, func() float64 { return float64(count()) }))
}

func (m *metrics) observe(route, method string, status int, took time.Duration) {
	method = methodLabel(method)
	m.requests.WithLabelValues(route, method, strconv.Itoa(status)).Inc()
	m.duration.WithLabelValues(route, method).Observe(took.Seconds())
}

// The values of the labels of proofs and of what is unproven.
const (
	changeNarrows = "narrows"
	changeOther   = "other"
	whyServer     = "server"
	whyLease      = "lease"
)

// proof counts what came of a committed change. The time of one that is not
// proven is that of nothing, and is not observed; a kick commits nothing, and
// takes no time to prove.
func (m *metrics) proof(c bus.Change, took time.Duration) {
	m.closed.Add(float64(c.Closed))
	switch {
	case c.Verified && c.Revision == 0:
	case c.Verified && c.Servers != "":
		m.proofs.WithLabelValues(changeNarrows).Observe(took.Seconds())
	case c.Verified:
		m.proofs.WithLabelValues(changeOther).Observe(took.Seconds())
	case len(c.Unproven) > 0:
		m.unproven.WithLabelValues(whyServer).Inc()
	default:
		m.unproven.WithLabelValues(whyLease).Inc()
	}
}

// methodLabel keeps made-up methods out of the labels.
func methodLabel(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
		return method
	}
	return "other"
}
