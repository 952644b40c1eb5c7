package callout

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
)

func TestMetricsAreWellNamed(t *testing.T) {
	reg := prometheus.NewRegistry()
	m := NewMetrics(reg)
	m.requests.WithLabelValues("deny", "unknown").Inc()
	e := NewEnforceMetrics(reg)
	e.kicks.WithLabelValues("cap").Inc()
	e.unproven.WithLabelValues("silent").Inc()
	families, err := reg.Gather()
	must(t, err)
	if len(families) != 9 {
		t.Errorf("%d metrics, want 9", len(families))
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	must(t, err)
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, f := range families {
		labels(f, func(name string) {
			if name != "result" && name != "reason" && name != "why" {
				t.Errorf("%s has a label %s: labels name no user, room or address", f.GetName(), name)
			}
		})
	}
}

func labels(f *dto.MetricFamily, each func(name string)) {
	for _, m := range f.GetMetric() {
		for _, l := range m.GetLabel() {
			each(l.GetName())
		}
	}
}
