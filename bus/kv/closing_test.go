package kv

import (
	"testing"
	"time"
)

func TestMustBeGone(t *testing.T) {
	committed := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	granted := committed.Add(-time.Hour)
	room := narrowing{since: granted}
	for _, tt := range []struct {
		name               string
		n                  narrowing
		start              time.Duration // from the commit
		admitted, enforced bool
		want               bool
	}{
		{"somebody who is out", narrowing{}, -24 * time.Hour, false, true, true},
		{"somebody who is out, who got in since", narrowing{}, time.Minute, false, true, true},
		{"while it had the right", room, -time.Minute, true, true, true},
		{"at the moment of the grant", room, -time.Hour, true, true, true},
		{"before the grant, by a clock that may be wrong", room, -time.Hour - time.Second, true, true, true},
		{"before the grant", room, -time.Hour - 3*time.Second, true, true, false},
		{"before the grant, and nobody enforces", room, -time.Hour - 3*time.Second, true, false, false},
		{"just before the change", room, -time.Second, true, true, false}, // the callouts know
		{"just before the change, and nobody enforces", room, -time.Second, true, false, true},
		{"after the change", room, time.Second, true, true, false},
		{"after the change, and nobody enforces", room, 5 * time.Second, true, false, true},
		{"older than a right to publish", narrowing{since: granted, publish: true}, -time.Minute, true, true, false},
		{"a right to publish, and nobody enforces", narrowing{since: granted, publish: true}, -time.Minute, true, false, true},
	} {
		if got := mustBeGone(tt.n, committed.Add(tt.start), tt.admitted, tt.enforced, committed); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}
