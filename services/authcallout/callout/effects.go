package callout

import (
	"sync"
	"time"

	"unibus.internal/bus/kv"
)

// effects tracks answers that a server may still act on. Each keeps a hold, and
// ends when the server reports the connection or when the answer has expired.
// On what it rested is remembered for longer: a report may come late.
type effects struct {
	mu   sync.Mutex
	open map[effectKey]*effect
	held int // of them, those that keep a hold
	idle *sync.Cond
}

// remembered is for how long after the end of its effect an answer is known.
const remembered = time.Minute

type effectKey struct {
	server string
	client uint64
}

// releaser is a *kv.Hold.
type releaser interface{ Release() }

type effect struct {
	access *kv.Access
	hold   releaser // nil when it has been let go
	timer  *time.Timer
}

func newEffects() *effects {
	e := &effects{open: map[effectKey]*effect{}}
	e.idle = sync.NewCond(&e.mu)
	return e
}

// begin is called before the answer is sent: the report may come at once.
func (e *effects) begin(c *call, access *kv.Access, hold releaser, life time.Duration) {
	k := effectKey{c.serverID, c.clientID}
	e.mu.Lock()
	defer e.mu.Unlock()
	if old := e.open[k]; old != nil { // a second CONNECT on one connection
		old.timer.Stop()
		e.release(old)
	}
	x := &effect{access: access, hold: hold}
	x.timer = time.AfterFunc(life, func() { e.expire(k, x) })
	e.open[k] = x
	e.held++
}

// take ends an effect and hands over what it rested on and its hold, which the
// caller releases. Both are nil if the answer was not ours; the hold alone if
// the report came after the effect's time.
func (e *effects) take(server string, client uint64) (access *kv.Access, hold releaser) {
	k := effectKey{server, client}
	e.mu.Lock()
	defer e.mu.Unlock()
	x := e.open[k]
	if x == nil {
		return nil, nil
	}
	delete(e.open, k)
	x.timer.Stop()
	access, hold = x.access, x.hold
	e.dropped(x)
	return access, hold
}

// end ends the effect of an answer that was never sent.
func (e *effects) end(server string, client uint64) {
	if _, hold := e.take(server, client); hold != nil {
		hold.Release()
	}
}

// expire lets go of the hold, and later of the rest.
func (e *effects) expire(k effectKey, x *effect) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.open[k] != x {
		return
	}
	if x.hold == nil {
		delete(e.open, k)
		return
	}
	e.release(x)
	x.timer = time.AfterFunc(remembered, func() { e.expire(k, x) })
}

func (e *effects) release(x *effect) {
	if x.hold != nil {
		x.hold.Release()
		e.dropped(x)
	}
}

// dropped notes that an effect keeps no hold any more.
func (e *effects) dropped(x *effect) {
	if x.hold == nil {
		return
	}
	x.hold = nil
	if e.held--; e.held == 0 {
		e.idle.Broadcast()
	}
}

// wait returns when no effect keeps a hold, or after most.
func (e *effects) wait(most time.Duration) {
	late := false
	t := time.AfterFunc(most, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		late = true
		e.idle.Broadcast()
	})
	defer t.Stop()
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.held > 0 && !late {
		e.idle.Wait()
	}
}
