package callout

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

type counter struct{ released atomic.Int32 }

func (c *counter) Release() { c.released.Add(1) }

func (c *counter) want(t *testing.T, n int32) {
	t.Helper()
	if got := c.released.Load(); got != n {
		t.Errorf("released %d times, want %d", got, n)
	}
}

func TestEffectEndsWithTheReportOfItsConnection(t *testing.T) {
	e, h := newEffects(), &counter{}
	e.begin(&call{serverID: "NA", clientID: 7}, nil, h, time.Hour)
	e.end("NA", 8)
	e.end("NB", 7)
	h.want(t, 0)
	e.end("NA", 7)
	e.end("NA", 7)
	h.want(t, 1)
}

func TestEffectEndsWithItsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newEffects(), &counter{}
		e.begin(&call{serverID: "NA", clientID: 7}, nil, h, 5*time.Second)
		<-time.After(5*time.Second - time.Nanosecond)
		synctest.Wait()
		h.want(t, 0)
		<-time.After(time.Nanosecond)
		synctest.Wait()
		h.want(t, 1)
	})
}

func TestEffectOfASecondConnectReplacesTheFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, first, second := newEffects(), &counter{}, &counter{}
		e.begin(&call{serverID: "NA", clientID: 7}, nil, first, 2*time.Second)
		<-time.After(time.Second)
		e.begin(&call{serverID: "NA", clientID: 7}, nil, second, 5*time.Second)
		first.want(t, 1)
		e.expire(effectKey{"NA", 7}, &effect{hold: first}) // its timer may have fired just before
		second.want(t, 0)
		<-time.After(4 * time.Second) // the first one's time is over, the second one's is not
		synctest.Wait()
		second.want(t, 0)
		<-time.After(time.Second)
		synctest.Wait()
		second.want(t, 1)
		first.want(t, 1)
	})
}

func TestWaitEndsWithTheLastEffectOrItsPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEffects()
		e.wait(time.Hour) // nothing to wait for
		e.begin(&call{serverID: "NA", clientID: 1}, nil, &counter{}, 2*time.Second)
		e.begin(&call{serverID: "NA", clientID: 2}, nil, &counter{}, 4*time.Second)
		began := time.Now()
		e.wait(time.Hour)
		if got := time.Since(began); got != 4*time.Second {
			t.Errorf("waited %s, want 4s", got)
		}
		e.begin(&call{serverID: "NA", clientID: 3}, nil, &counter{}, time.Hour)
		began = time.Now()
		e.wait(time.Second)
		if got := time.Since(began); got != time.Second {
			t.Errorf("waited %s, want 1s", got)
		}
		e.end("NA", 3)
	})
}
