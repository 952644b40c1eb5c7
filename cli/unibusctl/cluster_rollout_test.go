package main

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"unibus.internal/bus"
)

// What is due is read from the node's own words; a unit without a status line
// has a shorter line and counts all the same.
func TestRolloutUnits(t *testing.T) {
	lines := []string{
		"config 5f2c", "unit nats active no 0 ", "unit authcallout active program 0 answering",
		"unit membership failed no 3 not ready: no lease", "placed /etc/unibus/node.env",
	}
	stale := unitsIn(lines, func(f []string) bool { return f[2] != "no" || f[1] != "active" })
	if want := []string{"unibus-authcallout", "unibus-membership"}; !slices.Equal(stale, want) {
		t.Errorf("due %q, want %q", stale, want)
	}
	if all := unitsIn(lines, func([]string) bool { return true }); len(all) != 3 {
		t.Errorf("units %q", all)
	}
	if none := unitsIn(nil, nil); none == nil {
		t.Error("no units are null in JSON")
	}
	if got := configOnDisk(lines); got != "5f2c" {
		t.Errorf("config %q", got)
	}
}

// A rollout that stops keeps the exit code of its reason and names the way on.
func TestRolloutStopped(t *testing.T) {
	reason := bus.E(bus.Unavailable, "the gate stays closed: n2 may not serve")
	err := stoppedAt(reason, "n2", "restart", "nodes.env")
	var e *bus.Error
	if !errors.As(err, &e) || exitCode(err) != exitNotProven || !strings.Contains(err.Error(), "n2 may not serve") || !strings.Contains(e.Hint, "--from n2") {
		t.Errorf("%v (exit %d)", err, exitCode(err))
	}
}

// Behind a node that fails no other one is touched; what is current is left
// alone; what was done is said.
func TestRolloutStopsAtTheFirst(t *testing.T) {
	rolled := []rolledNode{{Node: "n1", Units: []string{"unibus-nats"}}, {Node: "n2"}, {Node: "n3", Units: []string{"unibus-nats"}}, {Node: "n4", Units: []string{"unibus-nats"}}}
	var touched []string
	err := oneByOne(rolled, func(i int) error {
		touched = append(touched, rolled[i].Node)
		if rolled[i].Node == "n3" {
			return bus.E(bus.Unavailable, "the gate stays closed")
		}
		return nil
	})
	if bus.CodeOf(err) != bus.Unavailable || !slices.Equal(touched, []string{"n1", "n3"}) {
		t.Errorf("touched %q: %v", touched, err)
	}
	var done []string
	for _, r := range rolled {
		if r.Done {
			done = append(done, r.Node)
		}
	}
	if !slices.Equal(done, []string{"n1"}) {
		t.Errorf("done %q", done)
	}
}
