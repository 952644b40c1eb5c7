package callout

import "github.com/prometheus/client_golang/prometheus"

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
	reg.MustRegister(m.requests, m.duration, m.queue, m.shed)
	return m
}
