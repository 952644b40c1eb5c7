package test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// TestProof: the answer to a change that takes something away says how many
// connections it has closed, and that every server keeps none, or which does
// not say so.
func TestProof(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: 2 * time.Second})
	w.adminSeed(w.admin)
	pr := &proof{world: w, owner: w.addUser("owner")}
	pr.kept = w.rawEverywhere(w.addUser("bystander"))
	for _, s := range []struct {
		name string
		test func(*testing.T)
	}{
		{"whole", pr.whole},
		{"a mutation that only widens", pr.widening},
		{"many", pr.many},
		{"without callouts", pr.direct},
		{"a paused server", pr.paused},
		{"a dead node", pr.dead},
		{"a node given up", pr.forgotten},
	} {
		t.Run(s.name, s.test)
	}
	w.foundNothing()
}

type proof struct {
	*world
	owner *person
	kept  []*wire.Conn // nobody's to close
}

// room makes a room in which p is.
func (pr *proof) room(id bus.RoomID, p *person, role bus.RoomRole) {
	pr.addRoom(id, pr.owner, kv.RoomOptions{})
	pr.join(id, p, role)
}

// whole goes through every change that narrows, over the API.
func (pr *proof) whole(t *testing.T) {
	admin := pr.api(1, pr.admin)
	for n, c := range []struct {
		what, method, path string
		body               any
		closed             int
	}{
		{"revoke", "POST", "/v1/users/%[1]s/revoke", nil, 3},
		{"suspend", "POST", "/v1/users/%[1]s/suspend", nil, 3},
		{"removal", "DELETE", "/v1/rooms/%[2]s/members/%[1]s", nil, 3},
		{"role down", "PUT", "/v1/rooms/%[2]s/members/%[1]s", dict{"role": "reader"}, 3},
		{"archive", "DELETE", "/v1/rooms/%[2]s", nil, 3},
	} {
		p := pr.addUser(fmt.Sprintf("whole-%d", n))
		room := bus.RoomID(p.name)
		pr.room(room, p, bus.Writer)
		cs := pr.rawEverywhere(p)
		path := fmt.Sprintf(c.path, p.key.NKey(), room)
		got := admin.want(t, http.StatusOK, c.method, path, c.body).change(t)
		if got.Closed != c.closed || got.Servers != "3/3" || got.Callouts != "3/3" || !got.Verified || got.Unproven != nil || got.Already {
			t.Errorf("%s: %+v", c.what, got)
		}
		wantClosed(t, cs...)
		t.Logf("%s: proven in %d ms", c.what, got.ElapsedMS)
		if again := admin.want(t, http.StatusOK, c.method, path, c.body).change(t); again.Closed != 0 || again.Servers != "3/3" || !again.Verified || !again.Already {
			t.Errorf("%s, once more: %+v", c.what, again)
		}
	}
	r := pr.In(t).CLI("user", "add", "--handle", "said", "--sign-pub", newPerson(t, "said").key.NKey())
	if r.Code != 0 {
		t.Fatal(r.Stdout, r.Stderr)
	}
	if r = pr.In(t).CLI("user", "revoke", "said", "--yes"); r.Code != 0 || !strings.Contains(r.Stdout, "closed 0, servers 3/3") {
		t.Errorf("the command says: %s%s", r.Stdout, r.Stderr)
	}
	wantOpen(t, pr.kept...)
}

// widening asks no server, and says so by saying nothing.
func (pr *proof) widening(t *testing.T) {
	p := pr.addUser("wider")
	cs := pr.rawEverywhere(p)
	pr.addRoom("wider", pr.owner, kv.RoomOptions{})
	got := pr.api(2, pr.admin).want(t, http.StatusOK, "PUT", "/v1/rooms/wider/members/wider", dict{"role": "writer"}).change(t)
	if got.Servers != "" || got.Closed != 0 || !got.Verified {
		t.Errorf("a grant: %+v", got)
	}
	wantOpen(t, cs...)
}

// many: among 300 connections each of 60 changes closes, and counts, those of its
// user and no other, and the metrics of the nodes add up to the same.
func (pr *proof) many(t *testing.T) {
	const users, revokes, removals = 100, 30, 30
	pr.addRoom("many", pr.owner, kv.RoomOptions{})
	people, conns := make([]*person, users), make([][]*wire.Conn, users)
	for n := range people {
		people[n] = pr.addUser(fmt.Sprintf("many-%d", n))
		pr.join("many", people[n], bus.Writer)
		conns[n] = pr.rawEverywhere(people[n])
	}
	closedBefore, provenBefore := pr.counted("unibus_connections_closed_total"), pr.counted(`unibus_proof_duration_seconds_count{change="narrows"}`)
	for n, p := range people[:revokes+removals] {
		method, path := "POST", "/v1/users/"+p.name+"/revoke"
		if n >= revokes {
			method, path = "DELETE", "/v1/rooms/many/members/"+p.name
		}
		got := pr.api(n%3+1, pr.admin).want(t, http.StatusOK, method, path, nil).change(t)
		if got.Closed != 3 || got.Servers != "3/3" || got.Callouts != "3/3" || !got.Verified {
			t.Errorf("%s %s: %+v", method, path, got)
		}
		wantClosed(t, conns[n]...)
	}
	for n, cs := range conns[revokes+removals:] {
		if lost := closedOf(cs); len(lost) > 0 {
			t.Errorf("%s, of whom nothing was asked, lost %v", people[revokes+removals+n].name, lost)
		}
	}
	wantOpen(t, pr.kept...)
	if n := pr.counted("unibus_connections_closed_total") - closedBefore; n != 3*(revokes+removals) {
		t.Errorf("the nodes count %v connections closed, want %d", n, 3*(revokes+removals))
	}
	if n := pr.counted(`unibus_proof_duration_seconds_count{change="narrows"}`) - provenBefore; n != revokes+removals {
		t.Errorf("the nodes count %v proofs, want %d", n, revokes+removals)
	}
}

// counted sums one metric, or one of its series, over the memberships.
func (pr *proof) counted(name string) (sum float64) { return pr.metricOf(cluster.Membership, name) }

// direct: with every callout dead whoever makes the change closes the
// connections, those that never had the right excepted.
func (pr *proof) direct(t *testing.T) {
	gone, removed, before := pr.addUser("gone"), pr.addUser("removed"), pr.addUser("before")
	pr.room("left", removed, bus.Writer)
	g, r, b := pr.rawEverywhere(gone), pr.rawEverywhere(removed), pr.rawEverywhere(before)
	// Longer before the right than clocks may differ.
	cluster.Hold(t, 2500*time.Millisecond, "all stays open", func() error {
		if n := len(closedOf(b)); n > 0 {
			return fmt.Errorf("%d are closed", n)
		}
		return nil
	})
	for _, i := range pr.Nodes() {
		pr.Kill(i, cluster.Authcallout)
	}
	pr.join("left", before, bus.Writer) // nobody hints: the connections never learn of it
	for _, args := range [][]string{
		{"--direct", "user", "revoke", "gone", "--yes"},
		{"--direct", "room", "remove", "left", "removed", "--yes"},
		{"--direct", "room", "remove", "left", "before", "--yes"},
	} {
		out := pr.In(t).CLI(args...)
		want := "closed 3, servers 3/3"
		if args[len(args)-2] == "before" {
			want = "closed 0, servers 3/3"
		}
		if out.Code != 0 || !strings.Contains(out.Stdout, want) {
			t.Errorf("%s: exit %d: %s%s", strings.Join(args, " "), out.Code, out.Stdout, out.Stderr)
		}
	}
	wantClosed(t, g...)
	wantClosed(t, r...)
	wantOpen(t, b...)
	wantOpen(t, pr.kept...)
	for _, i := range pr.Nodes() {
		pr.StartNode(i, cluster.Authcallout)
	}
	pr.WaitHealthy(30 * time.Second)
	pr.waitAdmits(pr.owner, 1, 2, 3)
}

// paused: a server that does not answer is named, and what it kept is closed
// when it does, and proven by saying it again.
func (pr *proof) paused(t *testing.T) {
	p := pr.addUser("paused")
	cs := pr.rawEverywhere(p)
	pr.Pause(3, cluster.NATS)
	cluster.WaitFor(t, 30*time.Second, "a revoke beside a paused server", func() error { // the stream's leader may be that one
		r := pr.In(t).CLI("user", "revoke", "paused", "--yes")
		for _, words := range []string{"committed, not proven on n3", "cluster forget n3", "servers 2/3"} {
			if r.Code != 3 || !strings.Contains(r.Stderr, words) {
				return fmt.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
			}
		}
		return nil
	})
	wantClosed(t, cs[:2]...)
	pr.Resume(3, cluster.NATS)
	pr.WaitHealthy(30 * time.Second)
	wantClosed(t, cs[2]) // by the enforcers, who went on trying
	if r := pr.In(t).CLI("user", "revoke", "paused", "--yes"); r.Code != 0 || !strings.Contains(r.Stdout, "already_revoked") || !strings.Contains(r.Stdout, "servers 3/3") {
		t.Errorf("after n3 is back: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	wantOpen(t, pr.kept...)
}

// dead: the same with a node that is gone, over the API.
func (pr *proof) dead(t *testing.T) {
	p := pr.addUser("dead")
	cs := pr.rawEverywhere(p)
	pr.Kill(3)
	var got bus.Change
	cluster.WaitFor(t, 30*time.Second, "a revoke beside a dead node", func() error { // the stream's leader may have been there
		r, err := pr.api(1, pr.admin).send(t.Context(), apiRequest{method: "POST", path: "/v1/users/" + p.key.NKey() + "/revoke"})
		if err != nil || r.status != http.StatusAccepted {
			return fmt.Errorf("%v %w", r, err)
		}
		r.decode(t, &got)
		return nil
	})
	if got.Servers != "2/3" || !slices.Equal(got.Unproven, []string{"n3"}) || got.Verified {
		t.Errorf("with n3 dead: %+v", got)
	}
	wantClosed(t, cs[:2]...)
	pr.StartNode(3)
	pr.WaitHealthy(time.Minute)
	again := pr.patiently("revoke", func(ctx context.Context) (kv.Result, error) { return pr.store.RevokeUser(ctx, p.key) })
	if c, err := kv.ChangeOf(again, nil); err != nil || c.Servers != "3/3" || !c.Verified {
		t.Errorf("after n3 is back: %+v %v", c, err)
	}
	wantOpen(t, pr.kept[:2]...)
}

// forgotten: a node that is given up is waited for no more, and another one of
// its name, with nothing on its disk, takes its place.
func (pr *proof) forgotten(t *testing.T) {
	p, q := pr.addUser("given-up"), pr.addUser("after")
	pr.rawEverywhere(p)
	for node, words := range map[string]string{"n3": "n3 is there", "N3": "no name of a node"} {
		if r := pr.In(t).CLI("cluster", "forget", node, "--yes"); r.Code != 1 || !strings.Contains(r.Stderr, words) {
			t.Errorf("forget %s of three that run: exit %d: %s%s", node, r.Code, r.Stdout, r.Stderr)
		}
	}
	pr.Kill(3)
	if r := pr.In(t).CLI("cluster", "forget", "n3"); r.Code != 2 || !strings.Contains(r.Stderr, "needs --yes") {
		t.Errorf("unasked: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := pr.In(t).CLI("cluster", "forget", "n3", "--yes"); r.Code != 0 || !strings.Contains(r.Stdout, "forgot n3: left are n1, n2") {
		t.Fatalf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := pr.In(t).CLI("cluster", "forget", "n3", "--yes"); r.Code != 1 || !strings.Contains(r.Stderr, "is forgotten") {
		t.Errorf("once more: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	cluster.WaitFor(t, 30*time.Second, "a revoke that two nodes prove", func() error {
		r := pr.In(t).CLI("user", "revoke", "given-up", "--yes")
		if r.Code != 0 || !strings.Contains(r.Stdout, "servers 2/2") {
			return fmt.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		return nil
	})
	pr.WaitHealthy(30*time.Second, 1, 2)
	if err := os.RemoveAll(filepath.Join(pr.Dir, "n3", "state")); err != nil {
		t.Fatal(err)
	}
	pr.StartNode(3)
	pr.WaitHealthy(time.Minute)
	pr.waitAdmits(q, 1, 2, 3)
	cs := pr.rawEverywhere(q)
	cluster.WaitFor(t, time.Minute, "three nodes to prove again", func() error {
		r := pr.In(t).CLI("user", "suspend", "after")
		if r.Code != 0 || !strings.Contains(r.Stdout, "servers 3/3") {
			return fmt.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		return nil
	})
	wantClosed(t, cs...)
}
