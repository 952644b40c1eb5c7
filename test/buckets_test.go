package test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// TestWrongBucketsAreNamed plants what would break a promise silently into live
// streams: health and the check command name stream, field and fix, the node
// leaves service, and it all recovers when the stream is put right.
func TestWrongBucketsAreNamed(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Options{Membership: true})
	js, err := jetstream.New(c.Ops())
	if err != nil {
		t.Fatal(err)
	}
	for _, planted := range []struct {
		stream, field string
		change        func(*jetstream.StreamConfig)
	}{
		{kv.StreamName(kv.RoomKeys), "num_replicas = 1", func(s *jetstream.StreamConfig) { s.Replicas = 1 }},
		{kv.StreamName(kv.Handles), "allow_rollup_hdrs = true", func(s *jetstream.StreamConfig) { s.AllowRollup, s.DenyPurge = true, false }},
		{kv.StreamName(kv.RoomsByMember), "allow_direct = true", func(s *jetstream.StreamConfig) { s.AllowDirect = true }},
	} {
		t.Run(planted.field, func(t *testing.T) {
			if err := js.DeleteStream(t.Context(), planted.stream); err != nil {
				t.Fatal(err)
			}
			var good, bad jetstream.StreamConfig
			for _, s := range kv.Streams() {
				if s.Name == planted.stream {
					good, bad = s, s
				}
			}
			planted.change(&bad)
			if _, err := js.CreateStream(t.Context(), bad); err != nil {
				t.Fatal(err)
			}
			cluster.WaitFor(t, 10*time.Second, "healthz to name it", func() error {
				h, err := c.Healthz(t.Context(), 1)
				if err != nil || h.Code != 503 || !strings.Contains(h.Error, planted.field) || !strings.Contains(h.Error, planted.stream) {
					return fmt.Errorf("%d %q %w", h.Code, h.Error, err)
				}
				return nil
			})
			r := c.CLI("--direct", "cluster", "check")
			if r.Code != 2 || strings.Count(r.Stdout, "\n") != 1 || !strings.HasPrefix(r.Stdout, "CRITICAL: ") {
				t.Errorf("cluster check: exit %d, %q %q", r.Code, r.Stdout, r.Stderr)
			}
			if err := js.DeleteStream(t.Context(), planted.stream); err != nil {
				t.Fatal(err)
			}
			if _, err := js.CreateStream(t.Context(), good); err != nil {
				t.Fatal(err)
			}
			c.WaitHealthy(20 * time.Second)
		})
	}
	if r := c.CLI("--direct", "cluster", "check"); r.Code != 0 {
		t.Errorf("cluster check at the end: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
}
