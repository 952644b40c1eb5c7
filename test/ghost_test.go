package test

import (
	"fmt"
	"testing"
	"time"

	"unibus.internal/test/cluster"
)

// TestServerAwayForLongerThanALease: a server that comes back after its services
// have lost their lease hands requests to those who answer, and to nobody else.
// A subscription that one of them had been leaving when the connection broke
// would take a share of all admissions of all nodes, for good.
func TestServerAwayForLongerThanALease(t *testing.T) {
	t.Parallel()
	const lease = 2 * time.Second
	w := newWorld(t, cluster.Options{Lease: lease})
	w.WaitHealthy(30 * time.Second)
	w.Kill(3, cluster.NATS)
	cluster.WaitFor(t, 20*time.Second, "the callout of n3 to lose its lease", func() error {
		if err := w.CalloutReady(t.Context(), 3); err == nil {
			return fmt.Errorf("it still answers")
		}
		return nil
	})
	cluster.Hold(t, 2*lease, "the node to stay away", func() error { return nil })
	w.StartNode(3, cluster.NATS)
	w.WaitHealthy(time.Minute)
	const tries = 30
	for _, i := range w.Nodes() {
		lost := 0
		for range tries {
			if v, _ := w.attempt(i, w.admin); v != admitted {
				lost++
			}
			if lost > 2 {
				break
			}
		}
		// One may meet a machine with too much to do; a share of the group is a
		// sixth at least.
		if lost > 1 {
			t.Errorf("n%d: %d and more of %d admissions are not answered", i, lost, tries)
		}
	}
}
