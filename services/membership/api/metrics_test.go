package api

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"unibus.internal/bus"
)

// TestProofMetrics: each answer counts where it belongs and nowhere else, and
// what is not proven has no time.
func TestProofMetrics(t *testing.T) {
	for _, c := range []struct {
		name                           string
		change                         bus.Change
		narrows, other, server, leases float64
	}{
		{"a proven revoke", bus.Change{Revision: 7, Verified: true, Servers: "3/3", Closed: 3}, 1, 0, 0, 0},
		{"a proven grant", bus.Change{Revision: 7, Verified: true}, 0, 1, 0, 0},
		{"a silent server", bus.Change{Revision: 7, Servers: "2/3", Unproven: []string{"n3"}, Closed: 2}, 0, 0, 1, 0},
		{"a lease that is not over", bus.Change{Revision: 7, Waiting: []string{"authcallout-n3"}}, 0, 0, 0, 1},
		{"a kick", bus.Change{Verified: true, Servers: "3/3", Closed: 1}, 0, 0, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := prometheus.NewRegistry()
			newMetrics(reg, func() uint64 { return 0 }).proof(c.change, 5*time.Millisecond)
			got := map[string]float64{}
			families, err := reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range families {
				for _, m := range f.GetMetric() {
					key := f.GetName()
					for _, l := range m.GetLabel() {
						key += " " + l.GetValue()
					}
					got[key] = m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
				}
			}
			for key, want := range map[string]float64{
				"unibus_proof_duration_seconds narrows": c.narrows, "unibus_proof_duration_seconds other": c.other,
				"unibus_unproven_total server": c.server, "unibus_unproven_total lease": c.leases,
				"unibus_connections_closed_total": float64(c.change.Closed),
			} {
				if v, there := got[key]; !there || v != want {
					t.Errorf("%s is %v (there: %t), want %v", key, v, there, want)
				}
			}
		})
	}
}
