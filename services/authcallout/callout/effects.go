package callout

import (
	"sync"
	"time"
)

// effects tracks answers that a server may still act on. Each keeps a hold, and
// ends when the server reports the connection or when the answer has expired.
type effects struct {
	mu   sync.Mutex
	open map[effectKey]*effect
	idle *sync.Cond
}

type effectKey struct {
	server string
	client uint64
}

// releaser is a *kv.Hold.
type releaser interface{ Release() }

type effect struct {
	hold  releaser
	timer *time.Timer
}

func newEffects() *effects {
	e := &effects{open: map[effectKey]*effect{}}
	e.idle = sync.NewCond(&e.mu)
	return e
}

// begin is called before the answer is sent: the report may come at once.
func (e *effects) begin(c *call, hold releaser, life time.Duration) {
	k := effectKey{c.serverID, c.clientID}
	e.mu.Lock()
	defer e.mu.Unlock()
	if old := e.open[k]; old != nil { // a second CONNECT on one connection
		old.timer.Stop()
		old.hold.Release()
	}
	e.open[k] = &effect{hold: hold, timer: time.AfterFunc(life, func() { e.finish(k, hold) })}
}

func (e *effects) end(server string, client uint64) { e.finish(effectKey{server, client}, nil) }

// finish ends one effect; only, if not nil, names the hold it must still be of.
func (e *effects) finish(k effectKey, only releaser) {
	e.mu.Lock()
	defer e.mu.Unlock()
	x := e.open[k]
	if x == nil || (only != nil && x.hold != only) {
		return
	}
	delete(e.open, k)
	x.timer.Stop()
	x.hold.Release()
	if len(e.open) == 0 {
		e.idle.Broadcast()
	}
}

// wait returns when no effect is open, or after most.
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
	for len(e.open) > 0 && !late {
		e.idle.Wait()
	}
}
