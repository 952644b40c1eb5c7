package recorder

import "github.com/prometheus/client_golang/prometheus"

// metrics counts. No label carries a room or a user.
type metrics struct {
	rooms      prometheus.Gauge
	unrecorded prometheus.Gauge
	recorded   prometheus.Counter
	duplicates prometheus.Counter
	refused    *prometheus.CounterVec
	streams    prometheus.Counter
	took       prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		rooms: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "unibus_recorder_rooms", Help: "Durable rooms that there are, as this node knows them.",
		}),
		unrecorded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "unibus_recorder_unrecorded_rooms", Help: "Durable rooms among them that this node could not get the stream of; it tries again every 10 s, and other nodes record them meanwhile.",
		}),
		recorded: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "unibus_recorder_messages_total", Help: "Messages that this node had stored by a quorum.",
		}),
		duplicates: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "unibus_recorder_duplicates_total", Help: "Messages among them that had been stored before.",
		}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "unibus_recorder_refused_total", Help: "Messages that are not stored, or not known to be (unknown), by why.",
		}, []string{"why"}),
		streams: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "unibus_recorder_stream_errors_total", Help: "Attempts at the stream of a durable room that failed; the room is not recorded by this node until one succeeds.",
		}),
		took: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "unibus_recorder_duration_seconds", Help: "Time from a message's arrival to its being stored by a quorum.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2},
		}),
	}
	for _, why := range []string{"malformed", "forbidden", "unavailable", "quota", "not_sent", "no_leader", "not_stored", "unknown"} {
		m.refused.WithLabelValues(why) // there at zero, so that the first one is a rise
	}
	reg.MustRegister(m.rooms, m.unrecorded, m.recorded, m.duplicates, m.refused, m.streams, m.took)
	return m
}
