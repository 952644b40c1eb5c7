package test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// TestLifecycle takes users, rooms and invites through everything that can
// happen to them, on a live cluster whose callouts hold leases.
func TestLifecycle(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: directLease})
	for _, s := range []struct {
		name string
		test func(*world)
	}{
		{"suspend and resume", suspends},
		{"handle, role, expiry", patches},
		{"the last admin stays", lastAdminStays},
		{"rotate", rotates},
		{"archive", archives},
		{"invites", invites},
		{"nonces", nonces},
		{"a caller who lost their rights", callerRevoked},
		{"interrupted between two writes", interrupted},
	} {
		if !t.Run(s.name, func(t *testing.T) {
			ours := *w
			ours.Cluster, ours.t = w.In(t), t
			s.test(&ours)
		}) {
			t.FailNow()
		}
	}
}

// must fails the test unless a change succeeded.
func (w *world) must(res kv.Result, err error) kv.Result {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
	return res
}

// refuses wants a change to fail with a code, and to have changed no access.
func (w *world) refuses(code bus.Code, res kv.Result, err error) {
	w.t.Helper()
	if bus.CodeOf(err) != code {
		w.t.Errorf("%q: %v, want %s", res.What, err, code)
	}
}

// answers wants one verdict from every node.
func (w *world) answers(want verdict, p *person) {
	w.t.Helper()
	for _, i := range w.Nodes() {
		if got, err := w.attempt(i, p); got != want {
			w.t.Errorf("%s on n%d: %s (%v), want %s", p.name, i, got, err, want)
		}
	}
}

// proven is the View right behind a barrier.
func (w *world) proven() *kv.View {
	w.t.Helper()
	if err := w.view.Barrier(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	return w.view
}

func suspends(w *world) {
	ctx := w.t.Context()
	p := w.addUser("susi")
	w.must(w.store.SuspendUser(ctx, p.key))
	w.answers(refused, p)
	if res := w.must(w.store.SuspendUser(ctx, p.key)); !res.Already || res.What != "already_suspended susi" {
		w.t.Errorf("second suspend: %+v", res)
	}
	w.must(w.store.ResumeUser(ctx, p.key))
	w.answers(admitted, p)
	if res := w.must(w.store.ResumeUser(ctx, p.key)); !res.Already {
		w.t.Errorf("second resume: %+v", res)
	}
	w.must(w.store.RevokeUser(ctx, p.key))
	for _, change := range []func(context.Context, bus.UserKey) (kv.Result, error){w.store.SuspendUser, w.store.ResumeUser} {
		res, err := change(ctx, p.key)
		w.refuses(bus.Conflict, res, err)
	}
	w.answers(refused, p)
}

func patches(w *world) {
	ctx := w.t.Context()
	p, other := w.addUser("paul"), w.addUser("petra")
	name := func(h bus.Handle) *bus.Handle { return &h }
	w.must(w.store.PatchUser(ctx, p.key, kv.UserPatch{Handle: name("pauline")}))
	res, err := w.store.PatchUser(ctx, other.key, kv.UserPatch{Handle: name("pauline")})
	w.refuses(bus.Conflict, res, err)
	w.must(w.store.PatchUser(ctx, other.key, kv.UserPatch{Handle: name("paul")})) // free again
	u, rev, err := w.proven().FindUser("pauline")
	if err != nil || u.Key != p.key {
		w.t.Fatalf("pauline is %v, %v", u.Key, err)
	}
	res, err = w.store.PatchUser(ctx, p.key, kv.UserPatch{Handle: name("late"), Revision: rev - 1})
	w.refuses(bus.Conflict, res, err)

	soon := time.Now().Add(1500 * time.Millisecond)
	w.must(w.store.PatchUser(ctx, p.key, kv.UserPatch{Expires: true, ExpiresAt: &soon}))
	w.answers(admitted, p)
	cluster.WaitFor(w.t, 5*time.Second, "the expiry to act", func() error {
		if v, err := w.attempt(1, p); v != refused {
			return fmt.Errorf("%s: %w", v, err)
		}
		return nil
	})
	w.must(w.store.PatchUser(ctx, p.key, kv.UserPatch{Expires: true}))
	w.answers(admitted, p)
	past := time.Now().Add(-time.Second)
	res, err = w.store.PatchUser(ctx, p.key, kv.UserPatch{Expires: true, ExpiresAt: &past})
	w.refuses(bus.Invalid, res, err)
}

func lastAdminStays(w *world) {
	ctx := w.t.Context()
	member, later := bus.Member, time.Now().Add(time.Hour)
	for _, change := range []func() (kv.Result, error){
		func() (kv.Result, error) { return w.store.SuspendUser(ctx, w.admin.key) },
		func() (kv.Result, error) { return w.store.RevokeUser(ctx, w.admin.key) },
		func() (kv.Result, error) { return w.store.PatchUser(ctx, w.admin.key, kv.UserPatch{Role: &member}) },
		func() (kv.Result, error) {
			return w.store.PatchUser(ctx, w.admin.key, kv.UserPatch{Expires: true, ExpiresAt: &later})
		},
	} {
		res, err := change()
		w.refuses(bus.Conflict, res, err)
	}
	w.answers(admitted, w.admin)

	// A rotation may take the last admin's key, for another one takes over.
	next := newPerson(w.t, "admin-next")
	w.must(w.store.RotateUser(ctx, w.admin.key, next.key))
	w.answers(refused, w.admin)
	w.answers(admitted, next)
	w.admin.kp, w.admin.key = next.kp, next.key
	res, err := w.store.RevokeUser(ctx, w.admin.key)
	w.refuses(bus.Conflict, res, err)
}

func rotates(w *world) {
	ctx := w.t.Context()
	p := w.addUser("rosa")
	w.addRoom("rot-a", p, kv.RoomOptions{})
	w.addRoom("rot-b", w.admin, kv.RoomOptions{})
	w.join("rot-b", p, bus.Reader)
	next := newPerson(w.t, "rosa-next")
	w.must(w.store.RotateUser(ctx, p.key, next.key))
	w.answers(refused, p)
	w.answers(admitted, next)
	d, err := w.proven().UserDetail(next.key)
	want := []bus.RoomGrant{{Room: "rot-a", Role: bus.Owner}, {Room: "rot-b", Role: bus.Reader}}
	if err != nil || d.Handle != "rosa" || !slices.Equal(d.Rooms, want) {
		w.t.Errorf("after the rotation: %+v, %v", d, err)
	}
	if u, _, err := w.view.FindUser("rosa"); err != nil || u.Key != next.key {
		w.t.Errorf("rosa is %v, %v", u.Key, err)
	}
	if res := w.must(w.store.RotateUser(ctx, p.key, next.key)); !res.Already {
		w.t.Errorf("second rotation: %+v", res)
	}
	for _, to := range []*person{newPerson(w.t, "third"), w.admin} {
		res, err := w.store.RotateUser(ctx, p.key, to.key)
		w.refuses(bus.Conflict, res, err)
	}
	res, err := w.store.AddUser(ctx, newPerson(w.t, "x").key, "rosa", bus.Member)
	w.refuses(bus.Conflict, res, err)

	// A revoked user's handle moves by rotation, and only by it.
	w.must(w.store.RevokeUser(ctx, next.key))
	third := newPerson(w.t, "rosa-third")
	w.must(w.store.RotateUser(ctx, next.key, third.key))
	w.answers(admitted, third)
	w.answers(refused, next)

	// A new key does not end a suspension.
	w.must(w.store.SuspendUser(ctx, third.key))
	fourth := newPerson(w.t, "rosa-fourth")
	w.must(w.store.RotateUser(ctx, third.key, fourth.key))
	w.answers(refused, fourth)
	w.must(w.store.ResumeUser(ctx, fourth.key))
	w.answers(admitted, fourth)
}

func archives(w *world) {
	ctx := w.t.Context()
	p := w.addUser("arno")
	w.addRoom("arc", p, kv.RoomOptions{Description: "to be closed"})
	c := w.connectRaw(1, p)
	c.Close()
	w.must(w.store.ArchiveRoom(ctx, "arc", false))
	if a, err := w.proven().Access(p.key); err != nil || len(a.Rooms) != 0 {
		w.t.Errorf("access to an archived room: %+v, %v", a, err)
	}
	if res := w.must(w.store.ArchiveRoom(ctx, "arc", false)); !res.Already || res.What != "already_archived room arc" {
		w.t.Errorf("second archive: %+v", res)
	}
	res, err := w.store.SetMember(ctx, "arc", w.admin.key, bus.Reader)
	w.refuses(bus.Conflict, res, err)
	res, err = w.store.CreateRoom(ctx, "arc", p.key, kv.RoomOptions{})
	w.refuses(bus.Conflict, res, err)
	text := "new"
	res, err = w.store.PatchRoom(ctx, "arc", kv.RoomPatch{Description: &text})
	w.refuses(bus.Conflict, res, err)
}

func invites(w *world) {
	ctx := w.t.Context()
	w.addRoom("inv", w.admin, kv.RoomOptions{})
	inviter := newPerson(w.t, "inviter")
	w.must(w.store.AddUser(ctx, inviter.key, "inviter", bus.Admin))
	s := w.store.As(kv.Caller{Name: inviter.key.NKey(), Key: inviter.key})
	make := func(r kv.InviteRequest) bus.InviteCreated {
		w.t.Helper()
		i, err := s.CreateInvite(ctx, r)
		if err != nil {
			w.t.Fatal(err)
		}
		return i
	}
	rooms := []bus.InvitedRoom{{Room: "inv", Role: bus.Reader}}
	first := make(kv.InviteRequest{Role: bus.Member, Rooms: rooms})
	p, thief := newPerson(w.t, "newcomer"), newPerson(w.t, "thief")
	w.must(w.store.RedeemInvite(ctx, first.Token, p.key, "newcomer"))
	w.answers(admitted, p)
	if a, err := w.proven().Access(p.key); err != nil || len(a.Rooms) != 1 || a.Rooms[0].Role != bus.Reader {
		w.t.Errorf("access by invite: %+v, %v", a, err)
	}
	if res := w.must(w.store.RedeemInvite(ctx, first.Token, p.key, "newcomer")); !res.Already {
		w.t.Errorf("second redemption by the same key: %+v", res)
	}
	res, err := w.store.RedeemInvite(ctx, first.Token, thief.key, "thief")
	w.refuses(bus.Unauthenticated, res, err)

	second := make(kv.InviteRequest{Role: bus.Member})
	wrong := second.Token[:len(second.Token)-1] + string("ab"[b2i(second.Token[len(second.Token)-1] == 'a')])
	for _, token := range []string{"", "ubi_x_y", wrong, first.Token} {
		res, err := w.store.RedeemInvite(ctx, token, thief.key, "thief")
		w.refuses(bus.Unauthenticated, res, err)
	}
	if _, already, err := w.store.WithdrawInvite(ctx, second.ID); already || err != nil {
		w.t.Errorf("withdraw: %v, %v", already, err)
	}
	if _, already, err := w.store.WithdrawInvite(ctx, second.ID); !already || err != nil {
		w.t.Errorf("second withdrawal: %v, %v", already, err)
	}
	res, err = w.store.RedeemInvite(ctx, second.Token, thief.key, "thief")
	w.refuses(bus.Unauthenticated, res, err)

	third := make(kv.InviteRequest{Role: bus.Admin})
	w.must(w.store.RevokeUser(ctx, inviter.key)) // leaves no door open
	res, err = w.store.RedeemInvite(ctx, third.Token, thief.key, "thief")
	w.refuses(bus.Unauthenticated, res, err)
	w.answers(refused, thief)

	list, err := w.store.Invites(ctx)
	if err != nil || len(list) != 3 {
		w.t.Errorf("list: %d invites, %v", len(list), err)
	}
	for _, bad := range []kv.InviteRequest{
		{Role: "root"},
		{Role: bus.Member, TTL: time.Second},
		{Role: bus.Member, TTL: 1000 * time.Hour},
		{Role: bus.Member, Handle: "A"},
		{Role: bus.Member, Rooms: []bus.InvitedRoom{{Room: "inv", Role: "boss"}}},
	} {
		if _, err := s.CreateInvite(ctx, bad); bus.CodeOf(err) != bus.Invalid {
			w.t.Errorf("%+v: %v, want invalid", bad, err)
		}
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func nonces(w *world) {
	ctx := w.t.Context()
	nonce := "AAAAAAAAAAAAAAAAAAAAAA"
	p, q := newPerson(w.t, "p"), newPerson(w.t, "q")
	for _, c := range []struct {
		who  *person
		want bus.Code
	}{{p, ""}, {p, bus.Unauthenticated}, {q, ""}, {q, bus.Unauthenticated}} {
		if err := w.store.ConsumeNonce(ctx, c.who.key, nonce); bus.CodeOf(err) != c.want {
			w.t.Errorf("%s: %v, want %q", c.who.name, err, c.want)
		}
	}
}

// callerRevoked revokes somebody while a change that they asked for is under
// way: it writes nothing.
func callerRevoked(w *world) {
	ctx := w.t.Context()
	boss := newPerson(w.t, "boss")
	w.must(w.store.AddUser(ctx, boss.key, "boss", bus.Admin))
	reached, goOn := make(chan struct{}), make(chan struct{})
	s := w.store.As(kv.Caller{Name: boss.key.NKey(), Key: boss.key, Check: func() error {
		select {
		case <-reached:
		default:
			close(reached)
			<-goOn
		}
		if a, err := w.view.Access(boss.key); err != nil || !a.User.ActiveAt(time.Now()) {
			return bus.E(bus.Forbidden, "boss may not do this any more")
		}
		return nil
	}})
	p := newPerson(w.t, "friend")
	answer := make(chan error, 1)
	go func() {
		_, err := s.AddUser(ctx, p.key, "friend", bus.Admin)
		answer <- err
	}()
	select {
	case <-reached:
	case err := <-answer:
		w.t.Fatalf("written without asking about the caller again: %v", err)
	}
	w.must(w.store.RevokeUser(ctx, boss.key))
	close(goOn)
	if err := <-answer; bus.CodeOf(err) != bus.Forbidden {
		w.t.Errorf("the change of a revoked caller: %v", err)
	}
	w.answers(refused, p)
	if a, err := w.proven().Access(p.key); a != nil || err != nil {
		w.t.Errorf("the friend is registered: %+v, %v", a, err)
	}
}

// errCut is what a change that is cut off reports.
var errCut = errors.New("cut off here")

// interrupted cuts every change before each of its writes in turn. What is left
// grants nobody more than they had or shall have, never leaves two keys in one
// place, and is finished by the same call or by the reconciler.
func interrupted(w *world) {
	ctx := w.t.Context()
	w.addRoom("cut-room", w.admin, kv.RoomOptions{})
	n := 0
	fresh := func() bus.Handle { n++; return bus.Handle(fmt.Sprintf("cut-%d", n)) }
	member := func() (*person, bus.Handle) {
		p, h := newPerson(w.t, "p"), fresh()
		w.must(w.store.AddUser(ctx, p.key, h, bus.Member))
		w.must(w.store.SetMember(ctx, "cut-room", p.key, bus.Writer))
		return p, h
	}
	type change struct {
		do        func(*kv.Store) (kv.Result, error)
		people    []*person
		reconcile bool // the reconciler may finish it, too
	}
	for _, c := range []struct {
		name  string
		setUp func() change
	}{
		{"add", func() change {
			p, h := newPerson(w.t, "p"), fresh()
			return change{do: func(s *kv.Store) (kv.Result, error) { return s.AddUser(ctx, p.key, h, bus.Member) }, people: []*person{p}}
		}},
		{"create room", func() change {
			p, h := member()
			return change{do: func(s *kv.Store) (kv.Result, error) {
				return s.CreateRoom(ctx, bus.RoomID(h), p.key, kv.RoomOptions{})
			}, people: []*person{p}}
		}},
		{"remove", func() change {
			p, _ := member()
			return change{do: func(s *kv.Store) (kv.Result, error) { return s.RemoveMember(ctx, "cut-room", p.key) }, people: []*person{p}}
		}},
		{"rename", func() change {
			p, _ := member()
			h := fresh()
			return change{do: func(s *kv.Store) (kv.Result, error) {
				return s.PatchUser(ctx, p.key, kv.UserPatch{Handle: &h})
			}, people: []*person{p}}
		}},
		{"rotate", func() change {
			p, _ := member()
			q := newPerson(w.t, "q")
			return change{do: func(s *kv.Store) (kv.Result, error) { return s.RotateUser(ctx, p.key, q.key) }, people: []*person{p, q}, reconcile: true}
		}},
		{"redeem", func() change {
			i, err := w.store.CreateInvite(ctx, kv.InviteRequest{Role: bus.Member, Rooms: []bus.InvitedRoom{{Room: "cut-room", Role: bus.Reader}}})
			if err != nil {
				w.t.Fatal(err)
			}
			p, h := newPerson(w.t, "p"), fresh()
			return change{do: func(s *kv.Store) (kv.Result, error) { return s.RedeemInvite(ctx, i.Token, p.key, h) }, people: []*person{p}}
		}},
	} {
		for cut := 1; ; cut++ {
			ch := c.setUp()
			before := w.rights(ch.people)
			writes := 0
			s := w.store.As(kv.Caller{Name: "test", Check: func() error {
				if writes++; writes == cut {
					return errCut
				}
				return nil
			}})
			_, err := ch.do(s)
			if err != nil && !errors.Is(err, errCut) {
				w.t.Fatalf("%s, cut before write %d: %v", c.name, cut, err)
			}
			if err == nil {
				if cut < 2 {
					w.t.Errorf("%s was never cut: the test shows nothing", c.name)
				}
				w.t.Logf("%s: %d writes, cut before each", c.name, cut-1)
				break
			}
			left := w.rights(ch.people)
			if len(ch.people) > 1 && len(left[0]) > 0 && len(left[1]) > 0 {
				w.t.Errorf("%s, cut before write %d: two keys have access: %v", c.name, cut, left)
			}
			if ch.reconcile && cut%2 == 0 {
				if _, err := w.store.Reconcile(ctx); err != nil {
					w.t.Fatal(err)
				}
				w.proven()
			}
			w.must(ch.do(w.store))
			after := w.rights(ch.people)
			for i := range ch.people {
				for _, right := range left[i] {
					if !slices.Contains(before[i], right) && !slices.Contains(after[i], right) {
						w.t.Errorf("%s, cut before write %d: person %d had %s for a while", c.name, cut, i, right)
					}
				}
			}
		}
	}
}

// rights lists what each person may do, nothing for who is not admitted.
func (w *world) rights(people []*person) [][]string {
	w.t.Helper()
	out := make([][]string, len(people))
	for i, p := range people {
		x, err := w.proven().Explain(p.key, time.Now())
		if bus.CodeOf(err) == bus.NotFound {
			continue
		}
		if err != nil {
			w.t.Fatal(err)
		}
		for _, r := range append(x.Publish, x.Subscribe...) {
			out[i] = append(out[i], r.Subject)
		}
	}
	return out
}
