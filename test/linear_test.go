package test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// The model of what admins change: a few users, by slot, and one room. A byte
// per user, - unknown, A M active admin or member, a m suspended, R revoked; a
// byte per membership, 0 never, 1 writer, 9 owner, 2 removed; and the room, o
// or x.
const slots = 5

type modelState struct {
	users, members [slots]byte
	room           byte
}

type verb string

const (
	vAdd     verb = "add"
	vRevoke  verb = "revoke"
	vSuspend verb = "suspend"
	vResume  verb = "resume"
	vDemote  verb = "demote"
	vPromote verb = "promote"
	vJoin    verb = "join"
	vRemove  verb = "remove"
	vArchive verb = "archive"
)

// operation is one request of an admin.
type operation struct {
	caller, target int
	verb           verb
}

// result is how it ended, as far as the caller knows.
type result int

const (
	done    result = iota // it holds now, by this request or before it
	unknown               // no answer, or none that says
	early                 // refused, or not served: nothing was written
)

func (s modelState) admins() (n int) {
	for _, u := range s.users {
		if u == 'A' {
			n++
		}
	}
	return n
}

// apply is the sequential specification: the state after an operation that
// took effect, and whether it could.
func (o operation) apply(s modelState) (modelState, bool) {
	u := s.users[o.target]
	set := func(b byte) (modelState, bool) { s.users[o.target] = b; return s, true }
	last := u == 'A' && s.admins() == 1
	switch o.verb {
	case vAdd:
		if u != '-' {
			return s, false
		}
		return set('A')
	case vRevoke:
		if last || u == '-' {
			return s, false
		}
		return set('R')
	case vSuspend:
		if last || u == '-' || u == 'R' {
			return s, false
		}
		return set(u | 0x20)
	case vResume:
		if u == '-' || u == 'R' {
			return s, false
		}
		return set(u &^ 0x20)
	case vDemote:
		if last || u == '-' || u == 'R' {
			return s, false
		}
		return set('M' | u&0x20)
	case vPromote:
		if u == '-' || u == 'R' {
			return s, false
		}
		return set('A' | u&0x20)
	case vJoin:
		if s.room != 'o' || u == '-' || u == 'R' {
			return s, false
		}
		s.members[o.target] = '1'
		return s, true
	case vRemove:
		if s.members[o.target] == '0' {
			return s, false
		}
		s.members[o.target] = '2'
		return s, true
	case vArchive:
		s.room = 'x'
		return s, true
	}
	panic(o.verb)
}

// may is the sequential authorization: an active admin may all of it, an owner
// who is none changes their own room, and everybody active may leave it.
func (o operation) may(s modelState) bool {
	switch s.users[o.caller] {
	case 'A':
		return true
	case 'M':
		owner := s.members[o.caller] == '9'
		switch o.verb {
		case vJoin, vArchive:
			return owner
		case vRemove:
			return owner || o.caller == o.target
		}
	}
	return false
}

// adminModel says which answers a linearizable registry may give. Refusals are
// no part of it: one View may know of a change before the change has returned,
// and another a moment later, so only what was written has one place in time.
func adminModel() porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init: func() []any {
			s := modelState{room: 'o'}
			for i := range slots {
				s.users[i], s.members[i] = '-', '0'
			}
			s.users[0], s.users[1], s.users[2] = 'A', 'A', 'A'
			s.members[0] = '9' // who has made the room
			return []any{s}
		},
		Step: func(state, in, out any) []any {
			s, o := state.(modelState), in.(operation)
			next, can := o.apply(s)
			may := can && o.may(s) // who may not, changes nothing
			switch {
			case out.(result) == unknown && may:
				return []any{s, next}
			case out.(result) == unknown:
				return []any{s}
			case may:
				return []any{next}
			}
			return nil
		},
		DescribeOperation: func(in, out any) string {
			o := in.(operation)
			return fmt.Sprintf("%d: %s %d = %d", o.caller, o.verb, o.target, out)
		},
	}
	return m.ToModel()
}

// TestLinearizable lets admins add, revoke, suspend, demote and move each other
// through all three nodes at once, while services and servers are killed and
// paused, and has the history of answers checked: there is one order in which
// they all make sense, the last admin is never lost, and nobody is admitted
// after a revoke of them had returned.
func TestLinearizable(t *testing.T) {
	t.Parallel()
	rounds, faults, lease := 3, 1, 2*time.Second
	if full {
		rounds, faults, lease = 60, 3, kv.DefaultLease // which outlives an election
	}
	w := newWorld(t, cluster.Options{Lease: lease})
	checked := 0
	for n := range rounds {
		r := w.newRegistry(n)
		var wg sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		if n%2 == 1 || full {
			wg.Go(func() { r.disturb(ctx, faults) })
		}
		r.play()
		cancel()
		wg.Wait()
		w.WaitHealthy(time.Minute)
		checked += r.check()
	}
	t.Logf("%d rounds, %d answers in one order", rounds, checked)
}

// registry is one round: its people, its room and its history.
type registry struct {
	*world
	n      int
	people [slots]*person
	room   bus.RoomID

	mu      sync.Mutex
	history []porcupine.Operation
	closed  [slots]time.Time // when a revoke had returned
	answers map[result]int
}

// newRegistry makes three admins, of whom the model speaks, and no other: the
// world's own is suspended for the round, or there would always be another.
func (w *world) newRegistry(n int) *registry {
	w.t.Helper()
	r := &registry{world: w, n: n, room: bus.RoomID(fmt.Sprintf("lin-%d", n)), answers: map[result]int{}}
	for i := range r.people {
		r.people[i] = newPerson(w.t, fmt.Sprintf("lin-%d-%d", n, i))
	}
	ctx := w.t.Context()
	if n > 0 { // the admins of the round before are none any more, or there would be more than the model knows
		w.must(w.store.ResumeUser(ctx, w.admin.key))
		for _, u := range w.proven().Users() {
			if u.Key != w.admin.key && u.Role == bus.Admin && u.Status != bus.Revoked {
				w.must(w.store.RevokeUser(ctx, u.Key))
			}
		}
	}
	for i := range 3 {
		w.must(w.store.AddUser(ctx, r.people[i].key, bus.Handle(r.people[i].name), bus.Admin))
	}
	w.addRoom(r.room, r.people[0], kv.RoomOptions{})
	w.must(w.store.SuspendUser(ctx, w.admin.key))
	return r
}

// play lets each admin make a few random changes, all at once.
func (r *registry) play() {
	var wg sync.WaitGroup
	for caller := range 3 {
		for worker := range 2 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(r.n), uint64(caller*2+worker)))
				verbs := []verb{
					vAdd, vAdd, vAdd, vRevoke, vSuspend, vSuspend, vResume, vResume, vResume, vResume,
					vDemote, vPromote, vPromote, vPromote, vJoin, vJoin, vJoin, vRemove, vRemove, vRemove, vArchive,
				}
				for range 16 {
					o := operation{caller, rnd.IntN(slots), verbs[rnd.IntN(len(verbs))]}
					r.do(o, rnd.IntN(3), caller*2+worker)
					<-time.After(time.Duration(rnd.IntN(200)) * time.Millisecond) // so that faults fall in between
				}
			})
		}
	}
	wg.Go(func() { r.knock() })
	wg.Wait()
}

// do makes one request and writes down when it began, when it was answered and
// what the answer says.
func (r *registry) do(o operation, node, worker int) {
	who := r.people[o.target].key.NKey()
	method, path, body := http.MethodPost, "/v1/users/"+who+"/"+string(o.verb), []byte(nil)
	switch o.verb {
	case vAdd:
		path, body = "/v1/users", fmt.Appendf(nil, `{"sign_pub":%q,"handle":%q,"role":"admin"}`, who, r.people[o.target].name)
	case vDemote, vPromote:
		role := map[verb]bus.Role{vDemote: bus.Member, vPromote: bus.Admin}[o.verb]
		method, path, body = http.MethodPatch, "/v1/users/"+who, fmt.Appendf(nil, `{"role":%q}`, role)
	case vJoin:
		method, path, body = http.MethodPut, "/v1/rooms/"+string(r.room)+"/members/"+who, []byte(`{"role":"writer"}`)
	case vRemove:
		method, path = http.MethodDelete, "/v1/rooms/"+string(r.room)+"/members/"+who
	case vArchive:
		method, path = http.MethodDelete, "/v1/rooms/"+string(r.room)
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	began := time.Now()
	// An SDK would ask again after a lost answer, and report a refusal of the
	// second request although the first had its effect.
	answer, err := r.api(1+node, r.people[o.caller]).send(ctx, apiRequest{method: method, path: path, body: body})
	ended := time.Now()
	out := outcomeOf(answer, err)
	if err == nil && answer.status >= 500 && answer.status != http.StatusServiceUnavailable {
		r.t.Errorf("%s %s: %s", method, path, answer)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answers[out]++
	if out == early {
		return
	}
	op := porcupine.Operation{ClientId: worker, Input: o, Call: began.UnixNano(), Output: out, Return: ended.UnixNano()}
	if out == unknown {
		op.Return = math.MaxInt64 // it may take effect at any time from now on
		op.ClientId = 1000 + len(r.history)
	}
	r.history = append(r.history, op)
	if out == done && o.verb == vRevoke && r.closed[o.target].IsZero() {
		r.closed[o.target] = ended
	}
}

// outcomeOf reads an answer.
func outcomeOf(a *apiResponse, err error) result {
	switch {
	case err != nil:
		return unknown
	case a.status < 300 && a.status != http.StatusAccepted:
		return done
	case a.status == http.StatusAccepted: // committed, but who decides on the old state meanwhile is not known
		return unknown
	case a.status == http.StatusServiceUnavailable && a.header.Get(bus.EffectHeader) != bus.EffectNone:
		return unknown
	}
	return early
}

// knock connects the people at random and remembers who was let in too late.
func (r *registry) knock() {
	rnd := rand.New(rand.NewPCG(uint64(r.n), 99))
	for range 40 {
		i := rnd.IntN(slots)
		r.mu.Lock()
		closed := r.closed[i]
		r.mu.Unlock()
		v, _ := r.attempt(1+rnd.IntN(3), r.people[i])
		if v == admitted && !closed.IsZero() {
			r.t.Errorf("round %d: %s was admitted after a revoke had returned at %s", r.n, r.people[i].name, closed)
		}
	}
}

// disturb kills and pauses one thing after the other until ctx ends.
func (r *registry) disturb(ctx context.Context, faults int) {
	rnd := rand.New(rand.NewPCG(uint64(r.n), 7))
	for range faults {
		node := 1 + rnd.IntN(3)
		services := [][]cluster.Service{{cluster.Membership}, nil, {cluster.Authcallout}, {cluster.NATS}}[rnd.IntN(4)]
		kill := rnd.IntN(2) == 0
		if !full { // one fault has to be one that answers get lost by
			services, kill = []cluster.Service{cluster.Membership}, true
		}
		r.t.Logf("round %d: node %d, %v, killed %t", r.n, node, services, kill)
		if kill {
			r.Kill(node, services...)
		} else {
			r.Pause(node, services...)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(500+rnd.IntN(2500)) * time.Millisecond):
		}
		r.Resume(node, services...)
		r.StartNode(node, services...)
	}
}

// check wants one order for the whole history, and an admin at its end.
func (r *registry) check() int {
	r.t.Helper()
	verdict, info := porcupine.CheckOperationsVerbose(adminModel(), r.history, 2*time.Minute)
	if verdict != porcupine.Ok {
		file := r.Dir + "/history.html"
		_ = porcupine.VisualizePath(adminModel(), info, file)
		for _, op := range r.history {
			o := op.Input.(operation)
			r.t.Logf("[%d, %d] %d: %s %d = %d", op.Call, op.Return, o.caller, o.verb, o.target, op.Output)
		}
		r.t.Errorf("round %d: no order explains these answers: %s", r.n, verdict)
	}
	left := 0
	for _, u := range r.proven().Users() {
		if u.Role == bus.Admin && u.Status == bus.Active {
			left++
		}
	}
	if left == 0 {
		r.t.Errorf("round %d: no active admin is left", r.n)
	}
	r.t.Logf("round %d: %d done, %d unknown, %d refused at once", r.n, r.answers[done], r.answers[unknown], r.answers[early])
	return len(r.history)
}

// TestTheModelNotices shows that the checker is no formality: histories that
// must not happen are refused.
func TestTheModelNotices(t *testing.T) {
	at := func(call, ret int64, o operation, out result) porcupine.Operation {
		return porcupine.Operation{ClientId: int(call), Input: o, Call: call, Output: out, Return: ret}
	}
	for name, h := range map[string][]porcupine.Operation{
		"two adds of one key": {at(1, 5, operation{0, 3, vAdd}, done), at(2, 6, operation{1, 3, vAdd}, done)},
		"all admins revoke each other": {
			at(1, 9, operation{0, 1, vRevoke}, done), at(2, 8, operation{1, 2, vRevoke}, done), at(3, 7, operation{2, 0, vRevoke}, done),
		},
		"a change by one who was revoked": {at(1, 2, operation{0, 1, vRevoke}, done), at(3, 4, operation{1, 3, vAdd}, done)},
		"a member of an archived room":    {at(1, 2, operation{0, 0, vArchive}, done), at(3, 4, operation{0, 1, vJoin}, done)},
		"a demoted admin removes another": {at(1, 2, operation{1, 2, vJoin}, done), at(3, 4, operation{0, 1, vDemote}, done), at(5, 6, operation{1, 2, vRemove}, done)},
		"an owner made a writer goes on": {
			at(1, 2, operation{1, 0, vJoin}, done), at(3, 4, operation{1, 0, vDemote}, done), at(5, 6, operation{0, 2, vJoin}, done),
		},
	} {
		if porcupine.CheckOperations(adminModel(), h) {
			t.Errorf("%s: the model has nothing against it", name)
		}
	}
	for name, h := range map[string][]porcupine.Operation{
		"two revoke each other, one comes through": {at(1, 5, operation{0, 1, vRevoke}, done), at(6, 9, operation{0, 3, vAdd}, done)},
		"a demoted admin leaves":                   {at(1, 2, operation{1, 1, vJoin}, done), at(3, 4, operation{0, 1, vDemote}, done), at(5, 6, operation{1, 1, vRemove}, done)},
		"an owner goes on":                         {at(1, 2, operation{1, 0, vDemote}, done), at(3, 4, operation{0, 2, vJoin}, done)},
		"a late effect":                            {at(1, math.MaxInt64, operation{0, 3, vAdd}, unknown), at(2, 3, operation{1, 3, vRevoke}, done)},
	} {
		if !porcupine.CheckOperations(adminModel(), h) {
			t.Errorf("%s: the model refuses it", name)
		}
	}
}
