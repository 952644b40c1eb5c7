package main

import (
	"testing"
	"time"
)

func TestServerAtFloor(t *testing.T) {
	for version, want := range map[string]bool{
		"2.15.2": true, "2.15.10": true, "2.14.9": true, "2.16.0-RC.1": true, "3.0.0": true,
		"2.15.1": false, "2.14.8": false, "2.12.15": false, "2.9.10": false, "2.15.2-RC.1": false, "": false, "v2.15.2": false, "2.15": false,
	} {
		if got := serverAtFloor(version); got != want {
			t.Errorf("serverAtFloor(%q) = %t", version, got)
		}
	}
}

// A date of whole seconds accuses no clock that is right, and any that is 2 s off.
func TestClockOffset(t *testing.T) {
	began := time.Date(2026, 11, 25, 12, 0, 0, 900e6, time.UTC)
	ended := began.Add(200 * time.Millisecond)
	for _, c := range []struct {
		clock, want time.Duration
	}{{0, 0}, {time.Second, 0}, {-time.Second, -900 * time.Millisecond}, {3 * time.Second, 1900 * time.Millisecond}, {-6 * time.Second, -5900 * time.Millisecond}, {7 * time.Second, 5900 * time.Millisecond}} {
		if got := clockOffset(began.Truncate(time.Second).Add(c.clock), began, ended); got != c.want {
			t.Errorf("a clock at %s: %s, want %s", c.clock, got, c.want)
		}
	}
}

// Every run finds the same probe users, and no two purposes share one.
func TestProbesAreDerived(t *testing.T) {
	l := newLintLab(t)
	seen := map[string]bool{}
	for _, purpose := range []string{"in", "out", "gone", "in"} {
		p, err := deriveProbe(l.file("secrets/ops.nk"), purpose)
		if err != nil {
			t.Fatal(err)
		}
		seen[p.key.Hex()] = true
	}
	if len(seen) != 3 {
		t.Errorf("%d keys for 3 purposes", len(seen))
	}
}
