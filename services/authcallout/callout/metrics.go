package callout

import (
	"github.com/prometheus/client_golang/prometheus"

	"unibus.internal/bus/sys"
)

// Metrics counts decisions. No label carries a handle, a subject or a key.
type Metrics struct {
	requests *prometheus.CounterVec
	duration prometheus.Histogram
	queue    prometheus.Gauge
	shed     prometheus.Counter
}

// NewMetrics registers the metrics of a Service.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_auth_requests_total", Help: "Authorization requests by result (allow, deny, error: unanswered) and reason.",
		}, []string{"result", "reason"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "unibus_auth_duration_seconds", Help: "Time from the receipt of a request to its answer.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 1.5},
		}),
		queue: prometheus.NewGauge(prometheus.GaugeOpts{Name: "unibus_auth_queue_depth", Help: "Requests waiting for a worker."}),
		shed:  prometheus.NewCounter(prometheus.CounterOpts{Name: "unibus_auth_shed_total", Help: "Requests dropped unanswered: too many, or too old."}),
	}
	for result, reasons := range map[string][]string{"deny": {reasonUnknown}, "error": {"no_lease", "no_barrier", "lease_lost"}} {
		for _, reason := range reasons { // there at zero, so that the first one is a rise
			m.requests.WithLabelValues(result, reason)
		}
	}
	reg.MustRegister(m.requests, m.duration, m.queue, m.shed)
	return m
}

// EnforceMetrics counts what an Enforcer does, with the same care for labels.
type EnforceMetrics struct {
	kicks    *prometheus.CounterVec
	duration prometheus.Histogram
	findings prometheus.Counter
	unproven *prometheus.CounterVec
	silent   prometheus.Gauge
}

// NewEnforceMetrics registers the metrics of an Enforcer.
func NewEnforceMetrics(reg prometheus.Registerer) *EnforceMetrics {
	m := &EnforceMetrics{
		kicks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_enforce_kicks_total", Help: "Connections asked to be closed, by why: narrowed, expired, connect, cap, sweep.",
		}, []string{"why"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "unibus_enforce_kick_duration_seconds", Help: "Time from the request to close a connection to its answer.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
		findings: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "unibus_enforce_sweep_findings_total", Help: "Connections that should not have been and that only a sweep found. Should be 0.",
		}),
		unproven: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_enforce_unproven_total", Help: "Closings that were acknowledged without proof, by why.",
		}, []string{"why"}),
		silent: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "unibus_enforce_servers_silent", Help: "Servers that did not list their connections at the last sweep.",
		}),
	}
	for _, why := range []string{"narrowed", "expired", "connect", "cap", "sweep"} {
		m.kicks.WithLabelValues(why)
	}
	for _, why := range []string{"no_view", string(sys.Silent), string(sys.Unreachable)} {
		m.unproven.WithLabelValues(why)
	}
	reg.MustRegister(m.kicks, m.duration, m.findings, m.unproven, m.silent)
	return m
}
