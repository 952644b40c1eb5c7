package recorder

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
	"golang.org/x/time/rate"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

func newKey(t *testing.T) bus.UserKey {
	t.Helper()
	kp, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	public, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	k, err := bus.ParseUserKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Of a message's headers only those that are ours pass, within limits, and its
// id only in the name space of its sender.
func TestDress(t *testing.T) {
	who := newKey(t)
	many := nats.Header{}
	for i := range maxHeaders + 1 {
		many[fmt.Sprintf("Unibus-%d", i)] = []string{"x"}
	}
	for name, c := range map[string]struct {
		in   nats.Header
		want nats.Header
	}{
		"none":           {nil, nats.Header{}},
		"ours":           {nats.Header{"Unibus-A": {"b c"}}, nats.Header{"Unibus-A": {"b c"}}},
		"a server's":     {nats.Header{"Nats-Rollup": {"all"}, "Nats-Msg-Id": {"x"}, "Status": {"503"}, "unibus-a": {"b"}}, nats.Header{}},
		"an id":          {nats.Header{"Unibus-Msg-Id": {"a.b:C_1-"}}, nats.Header{"Unibus-Msg-Id": {"a.b:C_1-"}, "Nats-Msg-Id": {who.NKey() + ":a.b:C_1-"}}},
		"a bad id":       {nats.Header{"Unibus-Msg-Id": {"a b"}}, nil},
		"a long id":      {nats.Header{"Unibus-Msg-Id": {strings.Repeat("a", 65)}}, nil},
		"two values":     {nats.Header{"Unibus-A": {"b", "c"}}, nil},
		"a second line":  {nats.Header{"Unibus-A": {"b\r\nNats-Rollup: all"}}, nil},
		"a strange name": {nats.Header{"Unibus-A:b": {"c"}}, nil},
		"a byte":         {nats.Header{"Unibus-A": {"\x00"}}, nil},
		"too many":       {many, nil},
		"too long":       {nats.Header{"Unibus-A": {strings.Repeat("x", maxHeaderBytes)}}, nil},
	} {
		out := nats.NewMsg("x")
		err := (&Recorder{}).dress(out, who, c.in)
		switch {
		case c.want == nil:
			if bus.CodeOf(err) != bus.Invalid {
				t.Errorf("%s: %v", name, err)
			}
		case err != nil || fmt.Sprint(out.Header) != fmt.Sprint(c.want):
			t.Errorf("%s: %v %v, want %v", name, out.Header, err, c.want)
		}
	}
}

// A stream that could lose, change or hide what a room has said is not recorded
// into, whoever made it so. Its limits may differ: they are changed.
func TestVerify(t *testing.T) {
	want := kv.RoomStream("ops", bus.Retention{MaxMessages: 5, MaxAgeSeconds: 3600})
	if want.MaxBytes != bus.DefaultRoomBytes || want.MaxMsgs != 5 || want.MaxAge != time.Hour || want.Name != "ROOM_ops" {
		t.Errorf("definition %+v", want)
	}
	limits := want
	limits.MaxMsgs, limits.MaxBytes, limits.MaxAge = 1, 1, 1
	if err := kv.VerifyRoomStream(limits, want); err != nil {
		t.Errorf("other limits: %v", err)
	}
	for name, edit := range map[string]func(*jetstream.StreamConfig){
		"replicas":  func(c *jetstream.StreamConfig) { c.Replicas = 1 },
		"memory":    func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage },
		"subjects":  func(c *jetstream.StreamConfig) { c.Subjects = []string{"room.ops.>"} },
		"republish": func(c *jetstream.StreamConfig) { c.RePublish = nil },
		"destination": func(c *jetstream.StreamConfig) {
			c.RePublish = &jetstream.RePublish{Source: "store.ops.>", Destination: "room.ops.>"}
		},
		"delete":      func(c *jetstream.StreamConfig) { c.DenyDelete = false },
		"purge":       func(c *jetstream.StreamConfig) { c.DenyPurge = false },
		"rollup":      func(c *jetstream.StreamConfig) { c.AllowRollup = true },
		"ttl":         func(c *jetstream.StreamConfig) { c.AllowMsgTTL = true },
		"counter":     func(c *jetstream.StreamConfig) { c.AllowMsgCounter = true },
		"schedules":   func(c *jetstream.StreamConfig) { c.AllowMsgSchedules = true },
		"batches":     func(c *jetstream.StreamConfig) { c.AllowAtomicPublish = true },
		"fast":        func(c *jetstream.StreamConfig) { c.AllowBatchPublish = true },
		"no ack":      func(c *jetstream.StreamConfig) { c.NoAck = true },
		"window":      func(c *jetstream.StreamConfig) { c.Duplicates = time.Second },
		"new":         func(c *jetstream.StreamConfig) { c.Discard = jetstream.DiscardNew },
		"queue":       func(c *jetstream.StreamConfig) { c.Retention = jetstream.WorkQueuePolicy },
		"per subject": func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject = 1 },
		"sealed":      func(c *jetstream.StreamConfig) { c.Sealed = true },
		"mirror":      func(c *jetstream.StreamConfig) { c.Mirror = &jetstream.StreamSource{Name: "x"} },
		"sources":     func(c *jetstream.StreamConfig) { c.Sources = []*jetstream.StreamSource{{Name: "x"}} },
		"transform":   func(c *jetstream.StreamConfig) { c.SubjectTransform = &jetstream.SubjectTransformConfig{} },
		"async":       func(c *jetstream.StreamConfig) { c.PersistMode = jetstream.AsyncPersistMode },
	} {
		got := want
		edit(&got)
		if err := kv.VerifyRoomStream(got, want); bus.CodeOf(err) != bus.Conflict {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// No space is a refusal that does not pass by itself; no quorum, or a node that
// is missing, is not.
func TestStreamError(t *testing.T) {
	for _, code := range []jetstream.ErrorCode{10002, 10023, 10026, 10047} {
		if err := streamError("ops", &jetstream.APIError{ErrorCode: code}); bus.CodeOf(err) != bus.Conflict {
			t.Errorf("%d: %v", code, err)
		}
	}
	for _, err := range []error{&jetstream.APIError{ErrorCode: 10005}, &jetstream.APIError{ErrorCode: 10008}, errors.New("timeout")} {
		if err := streamError("ops", err); bus.CodeOf(err) != bus.Unavailable {
			t.Errorf("%v", err)
		}
	}
}

// What is under way is bounded for one room and for all, in number and bytes,
// and one room that is full does not fill another.
func TestQuota(t *testing.T) {
	r := &Recorder{pending: map[string]*pending{}}
	begun := time.Unix(1e9, 0)
	full := func(n *room, size int) (in []string) {
		for {
			token, ok := r.enter(&pending{room: n, size: size, begun: begun})
			if !ok {
				return in
			}
			in = append(in, token)
		}
	}
	newRoom := func(per rate.Limit, burst int) *room { return &room{limit: rate.NewLimiter(per, burst)} }
	a, b := newRoom(rate.Inf, 1), newRoom(rate.Inf, 1)
	first := full(a, 10)
	if len(first) != roomMessages {
		t.Errorf("%d messages of one room, want %d", len(first), roomMessages)
	}
	large := full(b, 1<<20)
	if len(large) != roomBytes>>20 {
		t.Errorf("%d MiB of one room", len(large))
	}
	if got := len(full(newRoom(1, 5), 1)); got != 5 {
		t.Errorf("%d messages at a rate of 5 at once", got)
	}
	for r.messages < allMessages {
		if len(full(newRoom(rate.Inf, 1), 1)) == 0 {
			break
		}
	}
	if r.messages != allMessages || r.bytes > allBytes {
		t.Errorf("%d messages, %d bytes of all rooms", r.messages, r.bytes)
	}
	for _, token := range append(first, large...) {
		if r.exit(token) == nil || r.exit(token) != nil {
			t.Fatal("a message leaves exactly once")
		}
	}
	if a.messages+a.bytes+b.messages+b.bytes != 0 || len(full(a, 1)) != roomMessages {
		t.Errorf("left: %+v %+v", a, b)
	}
}

// A message waits while its room is full, is let through by the first that is
// stored, and is refused when the queue has waited long enough; so is what is
// behind it, at once, until the queue is empty.
func TestAwaitPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &Recorder{cfg: Config{Now: time.Now}, pending: map[string]*pending{}}
		n := &room{limit: rate.NewLimiter(rate.Inf, 1)}
		enter := func() (token string, ok bool) { return r.enter(&pending{room: n, size: 1, begun: time.Now()}) }
		var in []string
		for range roomMessages {
			token, ok := enter()
			if !ok {
				t.Fatal("the room is full too early")
			}
			in = append(in, token)
		}
		arrives := func(more bool) (waited time.Duration, ok bool) {
			begun := time.Now()
			r.awaitPlace(n, 1, func() bool { return more })
			_, ok = enter()
			return time.Since(begun), ok
		}
		after := func(d time.Duration, token string) {
			go func() {
				<-time.After(d)
				r.exit(token)
			}()
		}
		after(300*time.Millisecond, in[0])
		if waited, ok := arrives(true); waited != 300*time.Millisecond || !ok {
			t.Errorf("the first is let in %v after %s", ok, waited)
		}
		if waited, ok := arrives(true); waited != queuePatience-300*time.Millisecond || ok {
			t.Errorf("the second is let in %v after %s", ok, waited)
		}
		if waited, ok := arrives(false); waited != 0 || ok {
			t.Errorf("the last of a queue that waited too long is let in %v after %s", ok, waited)
		}
		after(time.Millisecond, in[1])
		if waited, ok := arrives(false); waited != time.Millisecond || !ok {
			t.Errorf("the first of another queue is let in %v after %s", ok, waited)
		}
		r.exit(in[2])
		if waited, ok := arrives(false); waited != 0 || !ok {
			t.Errorf("with a place free, one is let in %v after %s", ok, waited)
		}
	})
}
