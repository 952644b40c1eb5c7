package test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// full is true in the runs of make chaos, controls and bench.
var full = os.Getenv("UNIBUS_FULL") != ""

// everywhere attempts a connection to all nodes at once, beginning only now.
func (w *world) everywhere(p *person) [3]verdict {
	var out [3]verdict
	var wg sync.WaitGroup
	for n := range out {
		wg.Go(func() { out[n], _ = w.attempt(n+1, p) })
	}
	wg.Wait()
	return out
}

// crowd attempts n connections to one node at once.
func (w *world) crowd(node int, p *person, n int) []verdict {
	out := make([]verdict, n)
	var wg sync.WaitGroup
	for i := range out {
		wg.Go(func() { out[i], _ = w.attempt(node, p) })
	}
	wg.Wait()
	return out
}

// round adds a user and connects, revokes the user and connects, at once on all
// nodes each time. No answer may contradict what had returned before it began.
func (w *world) round(n int) error {
	p := newPerson(w.t, fmt.Sprintf("u%d", n))
	w.patiently("add", func(ctx context.Context) (kv.Result, error) {
		res, err := w.store.AddUser(ctx, p.key, bus.Handle(p.name), bus.Member)
		if bus.CodeOf(err) == bus.Conflict { // an earlier try had landed: prove it by waiting for every holder again
			_, err = w.store.SetMember(ctx, "probe", p.key, bus.Reader)
		}
		return res, err
	})
	for i, v := range w.everywhere(p) {
		if v == refused {
			return fmt.Errorf("round %d: n%d refused %s after the add had returned", n, i+1, p.name)
		}
	}
	w.patiently("revoke", func(ctx context.Context) (kv.Result, error) { return w.store.RevokeUser(ctx, p.key) })
	for i, v := range w.everywhere(p) {
		if v == admitted {
			return fmt.Errorf("round %d: n%d admitted %s after the revoke had returned", n, i+1, p.name)
		}
	}
	return nil
}

// TestCurrency runs rounds at rest and rounds under faults.
func TestCurrency(t *testing.T) {
	t.Parallel()
	rounds, faults := 200, 6
	if full {
		rounds, faults = 2000, 120
	}
	w := newWorld(t, cluster.Options{})
	w.addRoom("probe", w.admin, kv.RoomOptions{})
	for n := range rounds / 2 {
		if err := w.round(n); err != nil {
			t.Fatal(err)
		}
	}
	stop, done := make(chan struct{}), make(chan int)
	go func() { done <- w.faults(stop, faults) }()
	for n := rounds / 2; n < rounds; n++ {
		if err := w.round(n); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	t.Logf("%d rounds, half of them under %d faults", rounds, <-done)
	w.WaitHealthy(60 * time.Second)
	w.waitAdmits(w.admin, 1, 2, 3)
}

// faults pauses and resumes, kills and restarts processes, one after another,
// until stop is closed or most have happened, leaves everything running, and
// counts what it did.
func (w *world) faults(stop <-chan struct{}, most int) int {
	r := rand.New(rand.NewPCG(1, 2))
	pause := func(d time.Duration) bool {
		select {
		case <-stop:
			return false
		case <-time.After(d):
			return true
		}
	}
	for count := 0; ; count++ {
		if count == most || !pause(time.Duration(300+r.IntN(700))*time.Millisecond) {
			return count
		}
		node := 1 + r.IntN(3)
		services := [][]cluster.Service{{cluster.Authcallout}, {cluster.NATS}, nil}[count%3]
		if count%6 == 5 {
			w.Kill(node)
			pause(time.Duration(200+r.IntN(2000)) * time.Millisecond)
			w.StartNode(node)
			w.mustBeReady(node)
			continue
		}
		w.Pause(node, services...)
		pause(time.Duration(200+r.IntN(1500)) * time.Millisecond)
		w.Resume(node, services...)
	}
}

// mustBeReady waits, without failing the test from another goroutine, until a
// restarted node serves: a second fault before that would be a lost quorum.
func (w *world) mustBeReady(node int) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if err := cluster.Poll(ctx, func(ctx context.Context) error { return w.Ready(ctx, node) }); err != nil {
		w.t.Errorf("n%d did not come back: %v", node, err)
	}
}

// TestCurrencyManyRewritesWithinALag changes one membership many times while a
// callout is paused: it wakes up to the last state, and the writer has waited.
func TestCurrencyManyRewritesWithinALag(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: 3 * time.Second})
	p := w.addUser("flip")
	w.addRoom("flip", w.admin, kv.RoomOptions{})
	w.Pause(2, cluster.Authcallout)
	started := time.Now()
	for i := range 100 {
		value := []bus.RoomRole{bus.Reader, bus.Writer, bus.Owner}[i%3]
		ctx, cancel := context.WithTimeout(t.Context(), 12*time.Millisecond)
		_, err := w.store.SetMember(ctx, "flip", p.key, value)
		cancel()
		var u *kv.Unproven
		if err != nil && !errors.As(err, &u) && bus.CodeOf(err) != bus.Unavailable {
			t.Fatal(err)
		}
	}
	res, err := w.store.RevokeUser(t.Context(), p.key)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Expired) != 1 || res.Expired[0].Instance != "authcallout-n2" {
		t.Errorf("expired = %+v, want authcallout-n2 only", res.Expired)
	}
	t.Logf("revoke returned %s after the pause began", time.Since(started).Round(time.Millisecond))
	resumed := make(chan verdict)
	go func() { v, _ := w.attempt(2, p); resumed <- v }()
	w.Resume(2, cluster.Authcallout)
	if v := <-resumed; v == admitted {
		t.Error("the woken callout admitted a revoked user")
	}
}

// TestCurrencyStreamMadeAgain deletes and re-creates each stream under live
// callouts: nobody is admitted on what the old one said.
func TestCurrencyStreamMadeAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	p := w.addUser("ghost")
	for range 60 { // the old feed is far ahead of the new stream
		if _, err := w.store.RevokeUser(t.Context(), w.addUser(fmt.Sprintf("x%d", rand.Uint32())).key); err != nil {
			t.Fatal(err)
		}
	}
	js, err := jetstream.New(w.Ops())
	if err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteStream(t.Context(), kv.StreamName(kv.Users)); err != nil {
		t.Fatal(err)
	}
	if err := kv.Bootstrap(t.Context(), w.Ops(), time.Minute, func(s string) { t.Log(s) }); err != nil {
		t.Fatal(err)
	}
	root := newPerson(t, "root")
	w.patiently("bootstrap", func(ctx context.Context) (kv.Result, error) {
		return w.store.Bootstrap(ctx, root.key, "root")
	})
	for range 20 {
		for i, v := range w.everywhere(p) {
			if v == admitted {
				t.Fatalf("n%d admitted a user of the deleted stream", i+1)
			}
		}
	}
	w.waitAdmits(root, 1, 2, 3)
}

// TestCurrencyWithoutQuorum stops two nodes: within a lease nobody is admitted
// any more, changes are refused in time, and everything recovers unaided.
func TestCurrencyWithoutQuorum(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	p := w.addUser("alice")
	w.waitAdmits(p, 1)
	w.Kill(2)
	w.Kill(3)
	lost := time.Now()
	for time.Since(lost) < kv.DefaultLease+500*time.Millisecond {
		if v, _ := w.attempt(1, p); v == refused {
			t.Fatal("a member was refused, not met with silence, without a quorum")
		}
		hold(t.Context(), 10*time.Millisecond) // the other tests want the processors too
	}
	for _, v := range w.crowd(1, p, 50) {
		if v != silent {
			t.Fatalf("%s %s after the quorum was lost", v, time.Since(lost).Round(time.Millisecond))
		}
	}
	for _, args := range [][]string{
		{"--direct", "user", "add", "--handle", "late", "--sign-pub", newPerson(t, "late").key.NKey()},
		{"--direct", "user", "revoke", "alice", "--yes"},
		{"--direct", "room", "create", "late", "--owner", "alice"},
		{"--direct", "user", "list"},
	} {
		started := time.Now()
		r := w.CLI(args...)
		if took := time.Since(started); r.Code != 3 || took > 3*time.Second {
			t.Errorf("unibusctl %v: exit %d after %s: %s", args, r.Code, took.Round(time.Millisecond), r.Stderr)
		}
	}
	w.StartNode(2)
	back := time.Now()
	w.WaitHealthy(30*time.Second, 1, 2)
	w.waitAdmits(p, 1, 2)
	t.Logf("recovered %s after the second node came back", time.Since(back).Round(time.Millisecond))
	if v, _ := w.attempt(1, newPerson(t, "stranger")); v == admitted {
		t.Error("a stranger was admitted")
	}
}

// TestCurrencyServiceWithoutLease starves one callout of its lease: the node it
// serves is answered by the others.
func TestCurrencyServiceWithoutLease(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: 3 * time.Second})
	p := w.addUser("alice")
	w.waitAdmits(p, 1, 2, 3)
	w.Pause(2, cluster.Authcallout)
	defer w.Resume(2, cluster.Authcallout)
	// A paused process stays in its queue group; its node's connects that reach
	// it are silent. Killed, it is gone at once.
	w.Kill(2, cluster.Authcallout)
	w.waitAdmits(p, 2)
	for range 20 {
		if v, err := w.attempt(2, p); v != admitted {
			t.Fatalf("n2 without a callout of its own: %s: %v", v, err)
		}
	}
}

// TestCurrencyClockOff lets one callout believe a clock that is off: it has no lease and
// answers nobody, and the others serve its node.
func TestCurrencyClockOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Controls: true, Lease: 3 * time.Second})
	p := w.addUser("alice")
	for _, skew := range []string{"10m", "-10m"} {
		w.Kill(2, cluster.Authcallout)
		w.SetEnv(2, cluster.Authcallout, "UNIBUS_CLOCK_SKEW", skew)
		w.StartNode(2, cluster.Authcallout)
		cluster.Hold(t, 3*time.Second, "the clock that is off gives no lease", func() error {
			if err := w.CalloutReady(t.Context(), 2); err == nil {
				return errors.New("callout n2 is ready")
			}
			if v, err := w.attempt(2, p); v != admitted {
				return fmt.Errorf("n2: %s: %w", v, err)
			}
			return nil
		})
	}
}

// TestCurrencyLateAnswer delays an answer beyond its expiry: the server refuses it even
// though its own deadline is far away.
func TestCurrencyLateAnswer(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Controls: true})
	p := w.addUser("alice")
	w.restartCallouts("UNIBUS_DELAY_REPLY", "7s")
	if err := w.lateAnswerIsRefused(p); err != nil {
		t.Fatal(err)
	}
}

// lateAnswerIsRefused keeps a connection open far beyond any client's patience,
// as an attacker with a raw socket would, while the callouts answer late.
func (w *world) lateAnswerIsRefused(p *person) error {
	c, err := wire.Dial(w.NATSURL(1), w.trust, 12*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.Connect(wire.Proof(p.kp, c.Info.Nonce)); err == nil {
		return errors.New("an answer that came late opened a connection")
	}
	return nil
}

// restartCallouts gives every callout one more variable and waits until each
// answers again: a request that nobody hears proves nothing.
func (w *world) restartCallouts(key, value string) {
	w.t.Helper()
	for _, i := range w.Nodes() {
		w.Kill(i, cluster.Authcallout)
		w.SetEnv(i, cluster.Authcallout, key, value)
		w.StartNode(i, cluster.Authcallout)
	}
	w.WaitHealthy(30 * time.Second)
}

// TestCurrencySlowView lets every View apply changes a tenth of a second late: a
// change returns only when they have, so no connect ever meets an old answer.
func TestCurrencySlowView(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Controls: true, Env: map[cluster.Service]map[string]string{
		cluster.Authcallout: {"UNIBUS_DELAY_APPLY": "100ms"},
	}})
	w.addRoom("probe", w.admin, kv.RoomOptions{})
	for n := range 5 {
		if err := w.round(n); err != nil {
			t.Fatal(err)
		}
	}
}
