package test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// rights are what one person of the matrix may do, written down by hand from
// the table of subjects in docs/protocol.md, not computed by the product.
type rights struct {
	*person
	publish   []string // subject prefixes
	subscribe []string // exact subscriptions, and everything they cover
}

func (r rights) mayPublish(subject string) bool {
	return slices.ContainsFunc(r.publish, func(prefix string) bool {
		return strings.HasPrefix(subject, prefix) && len(subject) > len(prefix) && !strings.ContainsAny(subject, "*>")
	})
}

func (r rights) maySubscribe(subject string) bool {
	return slices.ContainsFunc(r.subscribe, func(s string) bool {
		return subject == s || strings.HasPrefix(subject, strings.TrimSuffix(s, ">")) && subject != strings.TrimSuffix(s, ">")
	})
}

// foreign are subjects that nobody in the matrix has a right to.
var foreign = []string{
	">", "*", "*.>", "*.*", "room.>", "room.*.>", "room.*.*.>", "room.*.*.x", "feed.>", "feed.*.>", "store.>", "store.ops.>", "notice.>", "notice.*.>",
	"_INBOX.>", "_INBOX.x", "_INBOX_*.>", "_INBOX_x.>", "room.secret.>", "room.secret.x.y", "room.ops", "room.", "feed.ops", "room.ops2.x.y", "roo.ops.x.y",
	"$JS.API.>", "$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.INFO.KV_UNIBUS_users", "$JS.API.STREAM.DELETE.KV_UNIBUS_users",
	"$JS.API.STREAM.CREATE.x", "$JS.API.CONSUMER.CREATE.KV_UNIBUS_users", "$JS.API.DIRECT.GET.KV_UNIBUS_users", "$JS.ACK.>", "$JS.ACK.KV_UNIBUS_users.c.1.1.1.1.0",
	"$JS.FC.x", "$KV.>", "$KV.UNIBUS_users.>", "$KV.UNIBUS_users.x", "$O.>", "$O.UNIBUS_blobs.x", "$SYS.>", "$SYS.REQ.USER.AUTH", "$SYS.REQ.USER.INFO",
	"$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.ACCOUNT.PING.CONNZ", "$SYS.ACCOUNT.BUS.CONNECT", "unibus.ack.x.y", "unibus.audit.x", "sys.connz", "$G.x",
}

// cast builds the users of the matrix: a writer of ops who also reads dev, the
// other way round, a member of a durable room, an owner, and one without rooms.
func cast(w *world) []rights {
	alice, bob, carol, dora, nobody := w.addUser("alice"), w.addUser("bob"), w.addUser("carol"), w.addUser("dora"), w.addUser("nobody")
	w.addRoom("ops", alice, kv.RoomOptions{})
	w.addRoom("dev", bob, kv.RoomOptions{})
	w.addRoom("log", carol, kv.RoomOptions{Durable: true})
	w.addRoom("secret", w.admin, kv.RoomOptions{})
	w.join("dev", alice, bus.Reader)
	w.join("ops", bob, bus.Writer)
	w.join("log", dora, bus.Writer)
	own := func(p *person, publish, subscribe []string) rights {
		u := p.key.NKey()
		r := rights{person: p, subscribe: append(subscribe, "_INBOX_"+u+".>", "notice."+u+".>")}
		for _, room := range publish {
			r.publish = append(r.publish, "room."+room+"."+u+".")
		}
		return r
	}
	return []rights{
		own(alice, []string{"ops"}, []string{"room.ops.>", "room.dev.>"}),
		own(bob, []string{"ops", "dev"}, []string{"room.ops.>", "room.dev.>"}),
		own(carol, []string{"log"}, []string{"feed.log.>"}),
		own(dora, []string{"log"}, []string{"feed.log.>"}),
		own(nobody, nil, nil),
	}
}

// targets are all subjects that the matrix crosses with each user.
func targets(all []rights) []string {
	out := slices.Clone(foreign)
	for _, r := range all {
		u := r.key.NKey()
		for _, room := range []string{"ops", "dev", "log", "secret"} {
			out = append(out, "room."+room+"."+u+".t", "store."+room+"."+u+".t", "feed."+room+"."+u+".t")
		}
		out = append(out, "_INBOX_"+u+".r", "_INBOX_"+u+".>", "notice."+u+".x", "notice."+u+".>", "room.ops."+u, "room.*."+u+".>")
	}
	return append(out, "room.ops.>", "room.dev.>", "room.log.>", "feed.ops.>", "feed.log.>")
}

// TestAccessMatrix crosses users with subjects and verbs on a live cluster. Each
// cell compares the server's answer with what the person may do.
func TestAccessMatrix(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	all := cast(w)
	cells, leaks := 0, 0
	cell := func(r rights, verb, subject string, allowed bool, err error) {
		cells++
		denied := errors.Is(err, wire.ErrDenied)
		if err != nil && !denied {
			t.Fatalf("%s %s %q: %v", r.name, verb, subject, err)
		}
		if denied == allowed {
			leaks++
			t.Errorf("%s %s %q: denied=%v, want %v", r.name, verb, subject, denied, !allowed)
		}
	}
	for n, r := range all {
		c := w.connectRaw(n%3+1, r.person)
		sid := 0
		try := func(verb, subject, queue string) {
			sid++
			id := fmt.Sprint(sid)
			cell(r, verb, subject, r.maySubscribe(subject), c.Sub(subject, queue, id))
			if err := c.Unsub(id); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range targets(all) {
			try("subscribes to", s, "")
			try("queue-subscribes to", s, "q")
			if !strings.ContainsAny(s, "*>") && !strings.HasSuffix(s, ".") {
				cell(r, "publishes to", s, r.mayPublish(s), c.Pub(s, "", "x"))
				cell(r, "requests", s, r.mayPublish(s), c.Pub(s, bus.InboxPrefix(r.key)+".r", "x"))
			}
		}
	}
	t.Logf("%d cells, %d leaks", cells, leaks)
	if cells < 500 {
		t.Errorf("only %d cells", cells)
	}
	t.Run("reply", func(t *testing.T) { replyAttack(t, w, all) })
	t.Run("headers", func(t *testing.T) { hostileHeaders(t, w, all[0], all[1]) })
	t.Run("sender", func(t *testing.T) { senderIsProven(t, w, all[0], all[1]) })
}

// replyAttack names each foreign subject as the reply of a message to one's own
// room, takes the message on a second connection and tries to answer it, which
// response permissions would allow. The victim hears nothing.
func replyAttack(t *testing.T, w *world, all []rights) {
	alice, bob := all[0], all[1]
	victim := w.connectRaw(3, bob.person)
	for i, s := range bob.subscribe {
		if err := victim.Sub(s, "", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	asker, answerer := w.connectRaw(1, alice.person), w.connectRaw(2, alice.person)
	if err := answerer.Sub("room.ops.>", "", "1"); err != nil {
		t.Fatal(err)
	}
	own := "room.ops." + alice.key.NKey() + ".ask"
	w.waitHeard(asker, answerer, own)
	tried := 0
	for _, s := range targets(all) {
		if strings.ContainsAny(s, "*>") || strings.HasSuffix(s, ".") || alice.mayPublish(s) {
			continue
		}
		tried++
		mark := fmt.Sprintf("reply-%d", tried)
		switch err := asker.Pub(own, s, mark); {
		case errors.Is(err, wire.ErrDenied): // the server reserves some replies to itself
			continue
		case err != nil:
			t.Fatalf("a publish to the own room with reply %q: %v", s, err)
		}
		m, err := answerer.Await(func(m wire.Message) bool { return m.Payload == mark })
		if err != nil || m.Reply != s {
			t.Fatalf("message with reply %q: %+v, %v", s, m, err)
		}
		if err := answerer.Pub(m.Reply, "", "forged"); !errors.Is(err, wire.ErrDenied) {
			t.Errorf("answering %q: %v, want a denial", s, err)
		}
	}
	t.Logf("%d reply subjects", tried)
	if err := victim.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, m := range victim.Messages {
		if m.Payload == "forged" || !strings.HasPrefix(m.Subject, "room.ops."+alice.key.NKey()+".") {
			t.Errorf("the victim heard %+v", m)
		}
	}
}

// hostileHeaders sends every header that a server might obey. They are carried
// as text; no stream listens, and the control plane goes on working.
func hostileHeaders(t *testing.T, w *world, alice, bob rights) {
	reader := w.connectRaw(2, bob.person)
	if err := reader.Sub("room.ops.>", "", "1"); err != nil {
		t.Fatal(err)
	}
	c := w.connectRaw(1, alice.person)
	w.waitHeard(c, reader, "room.ops."+alice.key.NKey()+".h")
	headers := []string{
		"Nats-Expected-Last-Msg-Id: nope", "Nats-Expected-Stream: x", "Nats-Expected-Last-Sequence: 9", "Nats-Expected-Last-Subject-Sequence: 9",
		"Nats-Rollup: all", "Nats-Rollup: sub", "Nats-TTL: 1s", "Nats-Msg-Id: a", "Nats-Sequence: 1", "Nats-Stream: ROOM_ops", "Nats-Last-Sequence: 1",
		"Nats-Trace-Dest: room.secret.x.y", "Nats-Request-Info: {}", "Nats-Schedule: @at 2027-01-01T00:00:00Z", "Nats-Schedule-Target: room.dev.x.y",
		"Nats-Batch-Id: x", "Nats-Incr: +1", "Status: 503", "KV-Operation: PURGE", "Nats-Marker-Reason: MaxAge",
	}
	for _, h := range headers {
		for _, reply := range []string{"", "$JS.ACK.KV_UNIBUS_users.c.1.1.1.1.0", "$JS.API.STREAM.PURGE.KV_UNIBUS_users", "room.secret." + alice.key.NKey() + ".x"} {
			if err := c.HPub("room.ops."+alice.key.NKey()+".h", reply, []string{h}, h); err != nil && !errors.Is(err, wire.ErrDenied) {
				t.Fatalf("header %q: %v", h, err)
			}
		}
	}
	if err := c.Pub("room.ops."+alice.key.NKey()+".end", "", "end"); err != nil {
		t.Fatal(err)
	}
	if _, err := reader.Await(func(m wire.Message) bool { return m.Payload == "end" }); err != nil {
		t.Fatal(err)
	}
	for _, m := range reader.Messages {
		if !strings.HasPrefix(m.Subject, "room.ops."+alice.key.NKey()+".") {
			t.Errorf("a header moved a message to %s", m.Subject)
		}
	}
	w.addUser("after-headers")
}

// senderIsProven shows that a subject names who sent, and that what one person
// sends another member hears.
func senderIsProven(t *testing.T, w *world, alice, bob rights) {
	reader := w.connectRaw(3, bob.person)
	if err := reader.Sub("room.ops.>", "", "1"); err != nil {
		t.Fatal(err)
	}
	c := w.connectRaw(1, alice.person)
	if err := c.Pub("room.ops."+bob.key.NKey()+".x", "", "forged"); !errors.Is(err, wire.ErrDenied) {
		t.Errorf("publishing as bob: %v", err)
	}
	w.waitHeard(c, reader, "room.ops."+alice.key.NKey()+".x")
	for _, m := range reader.Messages {
		if m.Payload == "forged" {
			t.Error("bob heard a message under his own name")
		}
	}
}

// waitHeard publishes until the reader hears it: interest travels over routes,
// and until it has, a message finds nobody.
func (w *world) waitHeard(from, reader *wire.Conn, subject string) {
	w.t.Helper()
	cluster.WaitFor(w.t, 5*time.Second, "interest to reach the other node", func() error {
		if err := from.Pub(subject, "", "hello"); err != nil {
			return err
		}
		if err := reader.Flush(); err != nil {
			return err
		}
		for _, m := range reader.Messages {
			if m.Payload == "hello" {
				return nil
			}
		}
		return errors.New("nothing heard")
	})
}
