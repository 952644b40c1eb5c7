package test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// TestGate: the gate that a rollout asks before each node is open on a well
// cluster only. Each fault closes it, with the node and the reason, until it is
// mended: a rollout ends there before the next node is touched.
func TestGate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: directLease})
	w.WaitHealthy(30 * time.Second)
	js, err := jetstream.New(w.Ops())
	if err != nil {
		t.Fatal(err)
	}
	gate := func(t *testing.T, inventory, timeout string) cluster.Result {
		t.Helper()
		return w.In(t).CLIEnvironment(map[string]string{"UNIBUS_GUARD_OFF": os.Getenv("UNIBUS_GUARD_OFF")}, nil,
			"cluster", "gate", "--inventory", inventory, "--sys-seed", w.Seed("sys"), "--timeout", timeout, "--json")
	}
	open := func(t *testing.T) {
		t.Helper()
		r := gate(t, w.Inventory(), "60s")
		var doc struct {
			Open  bool
			Nodes int
		}
		if err := json.Unmarshal([]byte(r.Stdout), &doc); err != nil || r.Code != 0 || !doc.Open || doc.Nodes != 3 {
			t.Fatalf("the gate of a well cluster: exit %d, %v\n%s%s", r.Code, err, r.Stdout, r.Stderr)
		}
	}
	replace := func(file, old, new string) func(t *testing.T) {
		return func(t *testing.T) {
			t.Helper()
			was := contentOf(t, file)
			if !strings.Contains(was, old) {
				t.Fatalf("%s has no %q", file, old)
			}
			if err := os.WriteFile(file, []byte(strings.ReplaceAll(was, old, new)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	replicas := func(n int) func(t *testing.T) {
		return func(t *testing.T) {
			t.Helper()
			for _, s := range kv.Streams() {
				if s.Name == kv.StreamName(kv.Handles) {
					s.Replicas = n
					if _, err := js.UpdateStream(t.Context(), s); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	}
	open(t)

	swapped := filepath.Join(t.TempDir(), "nodes.env")
	rows := strings.NewReplacer(`NODE_2="n2 `, `NODE_2="n3 `, `NODE_3="n3 `, `NODE_3="n2 `).Replace(contentOf(t, w.Inventory()))
	if err := os.WriteFile(swapped, []byte(rows), 0o600); err != nil {
		t.Fatal(err)
	}
	nodeConf, address := filepath.Join(w.Etc(3), "nats", "node.conf"), strings.TrimPrefix(w.MonitorURL(3), "http://")
	const elsewhere = "203.0.113.1:8222" // no address of this machine
	for _, f := range []struct {
		name        string
		plant, mend func(t *testing.T)
		inventory   string
		want        string
		long        bool
	}{
		{
			"a node that does not come back", func(t *testing.T) { w.In(t).Term(3, cluster.Membership) },
			func(t *testing.T) { w.In(t).StartNode(3) }, w.Inventory(), "n3 may not serve", false,
		},
		{"rows swapped", func(*testing.T) {}, func(*testing.T) {}, swapped, `at the address of n3 answers "n2"`, false},
		{"a configuration that passes the check and dies at the start", func(t *testing.T) {
			replace(nodeConf, address, elsewhere)(t)
			check := exec.CommandContext(t.Context(), filepath.Join(w.Bin, "nats-server"), "-t", "-c", filepath.Join(w.Etc(3), "nats", "nats-server.conf"))
			if said, err := check.CombinedOutput(); err != nil {
				t.Fatalf("nats-server -t: %v: %s", err, said)
			}
			w.In(t).Term(3, cluster.NATS)
			w.In(t).StartNode(3, cluster.NATS)
			cluster.WaitFor(t, 10*time.Second, "the server to die", func() error {
				if w.Alive(3, cluster.NATS) {
					return errors.New("it lives")
				}
				return nil
			})
		}, func(t *testing.T) {
			replace(nodeConf, elsewhere, address)(t)
			w.In(t).StartNode(3, cluster.NATS)
		}, w.Inventory(), "n3 may not serve", false},
		{"a stream of one replica", replicas(1), replicas(3), w.Inventory(), "KV_UNIBUS_handles", true},
		{
			"a callout that is away", func(t *testing.T) { w.In(t).Term(2, cluster.Authcallout) },
			func(t *testing.T) { w.In(t).StartNode(2) }, w.Inventory(), "n2", true,
		},
	} {
		if f.long && !full {
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			f.plant(t)
			r := gate(t, f.inventory, "4s")
			if r.Code != 3 || !strings.Contains(r.Stderr, "the gate stays closed") || !strings.Contains(r.Stderr, f.want) {
				t.Errorf("exit %d, want 3 and %q\n%s%s", r.Code, f.want, r.Stdout, r.Stderr)
			}
			f.mend(t)
			w.In(t).WaitHealthy(time.Minute)
			open(t)
		})
	}
}
