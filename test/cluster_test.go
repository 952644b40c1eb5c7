package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/test/cluster"
)

// The bounds that the issue and DESIGN section 5 promise.
const (
	writesGoOn    = 10 * time.Second // one node lost
	noQuorumSeen  = 11 * time.Second // lease + 1 s
	backUnaided   = 30 * time.Second // quorum restored
	startFinished = time.Minute
)

// TestStart takes a cluster through its first start, which waits for all three
// nodes, and later ones in every order.
func TestStart(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Options{Membership: true, Start: []int{1, 2}, NoWait: true})
	inOrder(t, c, []part{{"first start waits for the third node", firstStartWaits}, {"later start orders", laterStartOrders}})
}

// TestQuorum takes one node away, and two. Not beside others: a lease outlasts an
// election of up to 9 s by a second, and a machine that is busy with two more
// clusters takes that second.
func TestQuorum(t *testing.T) {
	w := newWorld(t, cluster.Options{})
	alice := w.addUser("alice")
	w.waitAdmits(alice, w.Nodes()...)
	inOrder(t, w.Cluster, []part{
		{"one node killed", func(t *testing.T, c *cluster.Cluster) { oneNodeKilled(t, c, w, alice) }},
		{"two servers killed", twoServersKilled},
	})
}

type part struct {
	name string
	run  func(*testing.T, *cluster.Cluster)
}

// inOrder ends with the first that fails: the next needs what this one left.
func inOrder(t *testing.T, c *cluster.Cluster, parts []part) {
	t.Helper()
	for _, p := range parts {
		if !t.Run(p.name, func(t *testing.T) { p.run(t, c.In(t)) }) {
			return
		}
	}
}

func firstStartWaits(t *testing.T, c *cluster.Cluster) {
	const waiting = "waiting for node 3/3 (first start)"
	for _, i := range []int{1, 2} {
		cluster.WaitFor(t, startFinished, fmt.Sprintf("n%d to say what it waits for", i), func() error {
			return unavailable(c, i, waiting)
		})
		if log := c.LogTail(i, cluster.Membership, 100); !strings.Contains(log, waiting) {
			t.Errorf("the log of n%d does not say %q:\n%s", i, waiting, log)
		}
	}
	cluster.Hold(t, 3*time.Second, "503 with two of three nodes", func() error {
		return errors.Join(unavailable(c, 1, waiting), unavailable(c, 2, waiting))
	})
	c.StartNode(3)
	c.WaitHealthy(startFinished)
}

// oneNodeKilled kills the node that leads both the cluster and the bucket of
// users; at full numbers also that of the one, and that of the other. The other
// two nodes answer 200 and admit p all along.
func oneNodeKilled(t *testing.T, c *cluster.Cluster, w *world, p *person) {
	ops := c.Ops()
	type victim struct {
		what   string
		leader func(context.Context, *cluster.Cluster) (int, error)
	}
	victims := []victim{{"leader of all", leaderOfAll(ops)}}
	if full {
		victims = append(victims, victim{"meta leader", metaLeader}, victim{"leader of KV_UNIBUS_users", usersLeader})
	}
	for _, v := range victims {
		lost := 0
		cluster.WaitFor(t, startFinished, "a "+v.what, func() (err error) {
			lost, err = v.leader(t.Context(), c)
			return err
		})
		t.Logf("kill n%d, the %s", lost, v.what)
		stop := keepServing(t, c, others(c, lost)...)
		w.waitAdmits(p, others(c, lost)...)
		c.Kill(lost)
		admitting := keepAdmitting(t, w, p, others(c, lost)...)
		cluster.WaitFor(t, writesGoOn, "a write without the "+v.what, func() error { return write(ops) })
		for _, leader := range []func(context.Context, *cluster.Cluster) (int, error){metaLeader, usersLeader} {
			cluster.WaitFor(t, startFinished, "another "+v.what, func() error {
				now, err := leader(t.Context(), c)
				if err == nil && now == lost {
					err = fmt.Errorf("still n%d", lost)
				}
				return err
			})
		}
		// The lease of before the kill is used up by now: what serves, serves
		// by barriers that the two wrote alone.
		cluster.Hold(t, noQuorumSeen, "writes with one node down", func() error { return write(ops) })
		t.Logf("%d admissions since n%d was killed", admitting(), lost)
		c.StartNode(lost)
		c.WaitHealthy(backUnaided)
		stop()
	}
}

// leaderOfAll moves the bucket of users to the node that leads the cluster.
func leaderOfAll(ops *nats.Conn) func(context.Context, *cluster.Cluster) (int, error) {
	return func(ctx context.Context, c *cluster.Cluster) (int, error) {
		meta, err := metaLeader(ctx, c)
		if err != nil {
			return 0, err
		}
		users, err := usersLeader(ctx, c)
		if err != nil || users == meta {
			return meta, err
		}
		said, err := ops.RequestWithContext(ctx, "$JS.API.STREAM.LEADER.STEPDOWN.KV_UNIBUS_users", fmt.Appendf(nil, `{"placement":{"preferred":%q}}`, c.Node(meta)))
		if err != nil {
			return 0, err
		}
		return 0, fmt.Errorf("n%d led the bucket, n%d is asked to: %s", users, meta, said.Data)
	}
}

// twoServersKilled leaves one nats-server and all three memberships: nobody
// may serve then, not even the node whose server is well.
func twoServersKilled(t *testing.T, c *cluster.Cluster) {
	ops := c.Ops()
	killed := time.Now()
	c.Kill(1, cluster.NATS)
	c.Kill(2, cluster.NATS)
	for _, i := range c.Nodes() {
		cluster.WaitFor(t, noQuorumSeen-time.Since(killed), fmt.Sprintf("503 from n%d", i), func() error { return unavailable(c, i, "") })
	}
	cluster.Hold(t, 10*time.Second, "503 everywhere without quorum", func() error {
		return errors.Join(unavailable(c, 1, ""), unavailable(c, 2, ""), unavailable(c, 3, ""))
	})
	if err := write(ops); err == nil {
		t.Error("a write was acknowledged without quorum")
	}
	if r := c.CLI("--direct", "user", "list"); r.Code != 3 || r.Stdout != "" {
		t.Errorf("user list without quorum: exit %d, want 3 and nothing shown\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	c.StartNode(1, cluster.NATS)
	c.StartNode(2, cluster.NATS)
	c.WaitHealthy(backUnaided)
}

// laterStartOrders starts the whole cluster again, every node once the first,
// the second and the last. One that is alone never serves; two do, without
// waiting for the third.
func laterStartOrders(t *testing.T, c *cluster.Cluster) {
	orders := [][3]int{{1, 2, 3}, {2, 3, 1}, {3, 1, 2}}
	if full {
		orders = append(orders, [3]int{3, 2, 1}, [3]int{2, 1, 3}, [3]int{1, 3, 2})
	}
	for _, order := range orders {
		for _, i := range c.Nodes() {
			c.Kill(i)
		}
		c.StartNode(order[0])
		cluster.WaitFor(t, startFinished, fmt.Sprintf("n%d to answer, alone", order[0]), func() error { return unavailable(c, order[0], "") })
		cluster.Hold(t, 2*time.Second, "503 of a lone node", func() error { return unavailable(c, order[0], "") })
		c.StartNode(order[1])
		c.WaitHealthy(startFinished, order[0], order[1])
		c.StartNode(order[2])
		c.WaitHealthy(startFinished)
	}
}

// unavailable returns nil if node i answers 503 for a reason that contains why.
func unavailable(c *cluster.Cluster, i int, why string) error {
	h, err := c.Healthz(context.Background(), i)
	switch {
	case err != nil:
		return err
	case h.Code != http.StatusServiceUnavailable || h.Status == "ok":
		return fmt.Errorf("n%d answers %d %q", i, h.Code, h.Status)
	case !strings.Contains(h.Error, why):
		return fmt.Errorf("n%d says %q", i, h.Error)
	}
	return nil
}

// keepServing asks the nodes for their health, as a load balancer would, and
// fails the test for every answer but 200 until stop is called.
func keepServing(t *testing.T, c *cluster.Cluster, nodes ...int) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for _, i := range nodes {
		asking.Go(func() {
			tick := time.NewTicker(200 * time.Millisecond)
			defer tick.Stop()
			for {
				if err := c.Healthy(ctx, i); err != nil && ctx.Err() == nil {
					t.Errorf("n%d stopped serving: %v", i, err)
				}
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
			}
		})
	}
	return func() { cancel(); asking.Wait() }
}

// keepAdmitting has somebody connect to the nodes again and again, and fails the
// test for every answer but admission until stop is called, which counts them.
func keepAdmitting(t *testing.T, w *world, p *person, nodes ...int) (stop func() int64) {
	ctx, cancel := context.WithCancel(t.Context())
	began := time.Now()
	var count atomic.Int64
	var asking sync.WaitGroup
	for _, i := range nodes {
		asking.Go(func() {
			tick := time.NewTicker(25 * time.Millisecond)
			defer tick.Stop()
			for {
				if v, err := w.attempt(i, p); v != admitted {
					t.Errorf("n%d: %s, %s after the node was killed: %v", i, v, time.Since(began).Round(time.Millisecond), err)
					return
				}
				count.Add(1)
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
			}
		})
	}
	return func() int64 { cancel(); asking.Wait(); return count.Load() }
}

func others(c *cluster.Cluster, but int) (nodes []int) {
	for _, i := range c.Nodes() {
		if i != but {
			nodes = append(nodes, i)
		}
	}
	return nodes
}

// write commits a record to a bucket by quorum.
func write(ops *nats.Conn) error {
	js, err := ops.JetStream(nats.MaxWait(2 * time.Second))
	if err != nil {
		return err
	}
	_, err = js.Publish("$KV.UNIBUS_users._test", []byte("{}"))
	return err
}

// metaLeader is the node that leads the JetStream cluster, as the servers agree.
func metaLeader(ctx context.Context, c *cluster.Cluster) (int, error) {
	return agreed(ctx, c, "/jsz", func(body []byte) (string, error) {
		var j struct {
			Meta struct {
				Leader string `json:"leader"`
			} `json:"meta_cluster"`
		}
		err := json.Unmarshal(body, &j)
		return j.Meta.Leader, err
	})
}

// usersLeader is the node that leads the bucket of users.
func usersLeader(ctx context.Context, c *cluster.Cluster) (int, error) {
	return agreed(ctx, c, "/jsz?acc=CTRL&streams=true", func(body []byte) (string, error) {
		var j struct {
			Accounts []struct {
				Streams []struct {
					Name    string `json:"name"`
					Cluster struct {
						Leader string `json:"leader"`
					} `json:"cluster"`
				} `json:"stream_detail"`
			} `json:"account_details"`
		}
		err := json.Unmarshal(body, &j)
		for _, a := range j.Accounts {
			for _, s := range a.Streams {
				if s.Name == "KV_UNIBUS_users" {
					return s.Cluster.Leader, err
				}
			}
		}
		return "", err
	})
}

// agreed asks every server that answers who leads and wants one answer.
func agreed(ctx context.Context, c *cluster.Cluster, path string, leader func([]byte) (string, error)) (int, error) {
	said := map[string]bool{}
	for _, i := range c.Nodes() {
		body, err := c.Monitor(ctx, i, path)
		if err != nil {
			continue // a node that is down has no say
		}
		name, err := leader(body)
		if err != nil {
			return 0, err
		}
		said[name] = true
	}
	for _, i := range c.Nodes() {
		if len(said) == 1 && said[c.Node(i)] {
			return i, nil
		}
	}
	return 0, fmt.Errorf("no agreed leader: %v", said)
}
