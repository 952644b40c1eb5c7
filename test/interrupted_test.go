package test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// TestInterrupted stops and kills services in the middle of changes.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Controls: true, Lease: 2 * time.Second})
	w.addRoom("ops", w.admin, kv.RoomOptions{})
	for _, s := range []struct {
		name string
		test func(*world, *testing.T)
	}{
		{"stopped while asked", (*world).stoppedWhileAsked},
		{"killed amid changes", (*world).killedAmidChanges},
	} {
		t.Run(s.name, func(t *testing.T) {
			in := *w
			in.Cluster, in.t = w.In(t), t
			s.test(&in, t)
		})
	}
}

// delayChanges has the service of node 1 wait before each change, when all has
// been authorized.
func (w *world) delayChanges(by time.Duration) {
	w.t.Helper()
	w.SetEnv(1, cluster.Membership, "UNIBUS_DELAY_MUTATE", by.String())
	w.Term(1, cluster.Membership)
	w.StartNode(1, cluster.Membership)
	w.WaitHealthy(time.Minute, 1)
}

// stoppedWhileAsked stops a service for longer than its lease while it is about
// to make the changes of an admin, who is revoked meanwhile. The revoke waits
// the lease out and returns. What the service then wakes up to is what it knew
// before: it changes nothing.
func (w *world) stoppedWhileAsked(t *testing.T) {
	rounds := 1
	if full {
		rounds = 10
	}
	const pause = 4 * time.Second
	w.delayChanges(pause)
	defer w.delayChanges(0)
	for n := range rounds {
		handle := fmt.Sprintf("boss-%d", n)
		boss := newPerson(t, handle)
		w.api(2, w.admin).want(t, http.StatusCreated, "POST", "/v1/users", dict{"sign_pub": boss.key.NKey(), "handle": handle, "role": "admin"})
		var asked sync.WaitGroup
		requests := []apiRequest{
			{method: "POST", path: "/v1/users", body: mustJSON(t, dict{"sign_pub": newPerson(t, "x").key.Hex(), "handle": "friend", "role": "admin"})},
			{method: "PUT", path: "/v1/rooms/ops/members/" + handle, body: []byte(`{"role":"owner"}`)},
			{method: "PATCH", path: "/v1/rooms/ops", body: []byte(`{"description":"of a revoked admin"}`)},
			{method: "POST", path: "/v1/rooms", body: []byte(`{"room":"back-door"}`)},
			{method: "POST", path: "/v1/invites", body: []byte(`{"role":"admin"}`)},
		}
		for _, q := range requests {
			asked.Go(func() {
				r, err := w.api(1, boss).send(t.Context(), q)
				if err != nil || r.status != http.StatusUnauthorized && r.status != http.StatusServiceUnavailable {
					t.Errorf("%s %s by a revoked admin: %v %v", q.method, q.path, r, err)
				}
			})
		}
		cluster.WaitFor(t, pause, "the attempts", func() error {
			var p struct{ Records []bus.AuditRecord }
			w.api(2, w.admin).want(t, 200, "GET", "/v1/audit?kind=attempt&actor="+handle, nil).decode(t, &p)
			if len(p.Records) != len(requests) {
				return fmt.Errorf("%d attempts", len(p.Records))
			}
			return nil
		})
		w.Pause(1, cluster.Membership)
		c := w.api(2, w.admin).want(t, 200, "POST", "/v1/users/"+handle+"/revoke", nil).change(t)
		if !c.Verified || !slices.Contains(c.Expired, "membership-n1") {
			t.Errorf("the lease of the stopped service was not waited out: %+v", c)
		}
		before := w.records(t, 2)
		w.Resume(1, cluster.Membership)
		asked.Wait()
		if after := w.records(t, 2); after != before {
			t.Errorf("after the revoke\n%s\nbecame\n%s", before, after)
		}
		w.WaitHealthy(time.Minute, 1)
	}
}

// job is what one worker wants done, step by step, and what it was told.
type job struct {
	p      *person
	handle bus.Handle
	room   bus.RoomID
	acked  [4]bool // add, create, set, suspend
	errs   [4]error
}

// killedAmidChanges kills one service after the other while changes are asked
// of all of them. What was acknowledged is there; what was not is there whole,
// or not at all; nothing is there twice; and the audit has an attempt for all
// that is there.
func (w *world) killedAmidChanges(t *testing.T) {
	const jobs, workers = 50, 4 // of four changes each
	api := w.client(t, w.admin)
	all := make([]*job, jobs)
	for n := range all {
		all[n] = &job{p: newPerson(t, fmt.Sprintf("k-%d", n)), handle: bus.Handle(fmt.Sprintf("k-%d", n)), room: bus.RoomID(fmt.Sprintf("k-%d", n))}
	}
	var begun atomic.Int64
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	create := func(j *job) (bus.Change, error) {
		return api.CreateRoom(ctx, sdk.NewRoom{Room: j.room, Owner: j.p.key.NKey()})
	}
	work := make(chan *job, jobs)
	for _, j := range all {
		work <- j
	}
	close(work)
	var working sync.WaitGroup
	for range workers {
		working.Go(func() {
			for j := range work {
				for i, step := range []func() (bus.Change, error){
					func() (bus.Change, error) { return api.AddUser(ctx, j.p.key, j.handle, bus.Member) },
					func() (bus.Change, error) { return create(j) },
					func() (bus.Change, error) {
						return api.SetMember(ctx, "ops", j.p.key.NKey(), bus.Writer)
					},
					func() (bus.Change, error) { return api.SuspendUser(ctx, j.p.key.NKey()) },
				} {
					begun.Add(1)
					_, j.errs[i] = step()
					j.acked[i] = j.errs[i] == nil // committed, proven or not
				}
			}
		})
	}
	kills := []int64{20, 100}
	if full {
		kills = []int64{20, 50, 80, 110, 140, 170}
	}
	for k, at := range kills {
		node := 1 + k%3
		reached := func(n int64) func() error {
			return func() error {
				if b := begun.Load(); b < n {
					return fmt.Errorf("%d changes", b)
				}
				return nil
			}
		}
		cluster.WaitFor(t, 2*time.Minute, fmt.Sprintf("%d changes", at), reached(at))
		w.Kill(node, cluster.Membership)
		cluster.WaitFor(t, 2*time.Minute, "changes without that service", reached(at+5))
		w.StartNode(node, cluster.Membership)
		w.WaitHealthy(time.Minute, node)
	}
	working.Wait()
	w.WaitHealthy(time.Minute)

	v := w.proven()
	attempts := map[string]bool{}
	for _, r := range (&auditors{world: w}).all(t, kv.AuditQuery{Kind: string(bus.AuditAttempt), Limit: 500}) {
		attempts[r.Action+" "+string(r.Room)+" "+r.User] = true
	}
	attempted := func(action string, room bus.RoomID, user string) {
		t.Helper()
		if !attempts[action+" "+string(room)+" "+user] {
			t.Errorf("the audit has no attempt of %s %s %s, and it is done", action, room, user)
		}
	}
	users, rooms := w.written(t, kv.Users, "*"), w.written(t, kv.Rooms, "*")
	acked, lost, unfinished := 0, 0, 0
	for _, j := range all {
		for i, ok := range j.acked {
			if ok {
				acked++
			} else if lost++; !slices.Contains([]bus.Code{bus.Unavailable, bus.NotFound, bus.Conflict}, bus.CodeOf(j.errs[i])) {
				t.Errorf("%s: %v", j.handle, j.errs[i])
			}
		}
		u, _, known := v.User(j.p.key)
		m, _, member := v.Membership("ops", j.p.key)
		r, _, made := v.Room(j.room)
		o, _, owned := v.Membership(j.room, j.p.key)
		switch {
		case j.acked[0] && !known, j.acked[3] && u.Status != bus.Suspended, j.acked[2] && !member, j.acked[1] && (!made || !owned):
			t.Errorf("%s: acknowledged %v, and lost: user %+v, member %v, room %v, owner %v", j.handle, j.acked, u, member, made, owned)
		case known && (u.Handle != j.handle || u.Role != bus.Member), member && (m.Role != bus.Writer || m.Status != bus.Present),
			made && (r.Creator != j.p.key || r.Status != bus.RoomActive), owned && o.Role != bus.Owner, owned && !made, (member || owned) && !known:
			t.Errorf("%s: half done: user %+v, member %+v, room %+v, owner %+v", j.handle, u, m, r, o)
		}
		if made && !owned { // it lets nobody in, and the same call finishes it
			unfinished++
			if _, err := create(j); err != nil {
				t.Errorf("finish %s: %v", j.room, err)
			}
		}
		if known {
			attempted("user.add", "", j.p.key.NKey())
			if n := users[j.p.key.Hex()]; u.Status == bus.Active && n != 1 {
				t.Errorf("%s was written %d times", j.handle, n)
			}
		}
		if made {
			attempted("room.create", j.room, j.p.key.NKey())
			if n := rooms[string(j.room)]; n != 1 {
				t.Errorf("room %s was written %d times", j.room, n)
			}
		}
		if member {
			attempted("room.member.set", "ops", j.p.key.NKey())
		}
	}
	names := map[bus.Handle]bus.UserKey{}
	for _, u := range v.Users() {
		if other, twice := names[u.Handle]; twice {
			t.Errorf("%s and %s are both %s", other, u.Key, u.Handle)
		}
		names[u.Handle] = u.Key
	}
	if acked < jobs {
		t.Errorf("%d acknowledged, %d not: the test shows little", acked, lost)
	}
	t.Logf("%d acknowledged, %d not, %d rooms to be finished", acked, lost, unfinished)
	cluster.WaitFor(t, 20*time.Second, "the audit to be whole", func() error {
		report, err := kv.VerifyAudit(ctx, w.Ops(), nil)
		if err == nil && !report.OK {
			err = errors.New(fmt.Sprint(report.Findings))
		}
		return err
	})
}
