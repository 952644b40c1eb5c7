package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// live is what the servers say is open of one user: node and connection id.
// Every node must answer.
func (w *world) live(sys *nats.Conn, p *person) []string {
	w.t.Helper()
	inbox := sys.NewInbox()
	sub, err := sys.SubscribeSync(inbox)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	body := fmt.Sprintf(`{"auth":true,"acc":"BUS","user":%q}`, p.key.NKey())
	if err := sys.PublishRequest("$SYS.REQ.SERVER.PING.CONNZ", inbox, []byte(body)); err != nil {
		w.t.Fatal(err)
	}
	var out []string
	for range w.Nodes() {
		m, err := sub.NextMsg(3 * time.Second)
		if err != nil {
			w.t.Fatalf("not every server answers: %v", err)
		}
		var answer struct {
			Server struct {
				Name string `json:"name"`
			} `json:"server"`
			Data struct {
				Connections []struct {
					CID uint64 `json:"cid"`
				} `json:"connections"`
			} `json:"data"`
		}
		if err := json.Unmarshal(m.Data, &answer); err != nil {
			w.t.Fatal(err)
		}
		for _, c := range answer.Data.Connections {
			out = append(out, fmt.Sprintf("%s/%d", answer.Server.Name, c.CID))
		}
	}
	slices.Sort(out)
	return out
}

// metric sums one metric over all callouts that answer, and over its labels.
func (w *world) metric(name string) (sum float64) {
	w.t.Helper()
	return w.metricOf(cluster.Authcallout, name)
}

// metricOf sums one metric, or one of its series, over all nodes of a service
// that answer.
func (w *world) metricOf(s cluster.Service, name string) (sum float64) {
	w.t.Helper()
	for _, i := range w.Nodes() {
		resp, err := http.Get(w.AdminURL(i, s) + "/metrics")
		if err != nil {
			continue
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			w.t.Fatal(err)
		}
		for line := range strings.Lines(string(body)) {
			var v float64
			if rest, ok := strings.CutPrefix(line, name); ok && (rest[0] == ' ' || rest[0] == '{') {
				if _, err := fmt.Sscan(rest[strings.LastIndexByte(rest, ' ')+1:], &v); err != nil {
					w.t.Fatalf("%s: %v", line, err)
				}
				sum += v
			}
		}
	}
	return sum
}

// foundNothing wants that no sweep has found what events and kicks missed.
func (w *world) foundNothing() {
	w.t.Helper()
	if n := w.metric("unibus_enforce_sweep_findings_total"); n != 0 {
		w.t.Errorf("sweeps found %v connections that should have been closed before", n)
	}
}

// closedOf counts which connections have been closed by their server.
func closedOf(cs []*wire.Conn) (closed []int) {
	for i, c := range cs {
		if c.Flush() != nil {
			closed = append(closed, i)
		}
	}
	return closed
}

// TestEnforceCap: a user who opens 60 connections keeps the newest 50, whatever
// nodes they are on, and nobody else loses one.
func TestEnforceCap(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	greedy, other := w.addUser("greedy"), w.addUser("other")
	sys := w.Sys()
	var mine, theirs []*wire.Conn
	for n := range 6 {
		theirs = append(theirs, w.connectRaw(n%3+1, other))
	}
	for n := range 60 {
		mine = append(mine, w.connectRaw(n%3+1, greedy))
	}
	cluster.WaitFor(t, 10*time.Second, "fifty connections", func() error {
		if n := len(w.live(sys, greedy)); n != 50 {
			return fmt.Errorf("%d are open", n)
		}
		return nil
	})
	if got := closedOf(mine); !slices.Equal(got, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}) {
		t.Errorf("closed are %v, want the ten oldest", got)
	}
	cluster.Hold(t, 2*time.Second, "the rest stays", func() error {
		if n := len(closedOf(mine)); n != 10 {
			return fmt.Errorf("%d are closed", n)
		}
		return nil
	})
	if got := closedOf(theirs); len(got) > 0 {
		t.Errorf("another user lost %v", got)
	}
	w.foundNothing()
}

// closedWithin is how long after a change has returned a connection that it
// ends may still be there.
const closedWithin = time.Second

// wantClosed waits until every connection has been closed by its server.
func wantClosed(t *testing.T, cs ...*wire.Conn) {
	t.Helper()
	began := time.Now()
	for i, c := range cs {
		for c.Flush() == nil {
			if time.Since(began) > closedWithin {
				t.Fatalf("connection %d is alive %s after the change returned", i, closedWithin)
			}
		}
	}
	t.Logf("closed %s after the change returned", time.Since(began).Round(time.Microsecond))
}

func wantOpen(t *testing.T, cs ...*wire.Conn) {
	t.Helper()
	for i, c := range cs {
		if err := c.Flush(); err != nil {
			t.Errorf("connection %d of somebody else: %v", i, err)
		}
	}
}

// rawEverywhere opens one connection by hand to each node.
func (w *world) rawEverywhere(p *person) (out []*wire.Conn) {
	for _, i := range w.Nodes() {
		out = append(out, w.connectRaw(i, p))
	}
	return out
}

// TestEnforce changes the access of people who are connected.
func TestEnforce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	e := &enforced{world: w, sys: w.Sys(), speaker: w.addUser("speaker")}
	w.addRoom("ops", e.speaker, kv.RoomOptions{})
	w.addRoom("dev", e.speaker, kv.RoomOptions{})
	e.bystanders = w.rawEverywhere(e.speaker)
	t.Run("revoke", e.revoke)
	t.Run("removal", e.removal)
	t.Run("role down", e.roleDown)
	t.Run("suspend", e.suspend)
	t.Run("archive", e.archive)
	t.Run("expiry", e.expiry)
	t.Run("add", e.add)
	wantOpen(t, e.bystanders...)
	w.foundNothing()
	if n := w.metric("unibus_enforce_unproven_total"); n != 0 {
		t.Errorf("%v closings were not proven", n)
	}
}

type enforced struct {
	*world
	sys        *nats.Conn
	speaker    *person // owner of every room
	bystanders []*wire.Conn
}

// cli runs a change and wants it to succeed.
func (e *enforced) cli(t *testing.T, args ...string) {
	t.Helper()
	if r := e.In(t).CLI(append([]string{"--direct"}, args...)...); r.Code != 0 {
		t.Fatalf("unibusctl %v: exit %d: %s", args, r.Code, r.Stderr)
	}
}

// listener is a default nats.go client of one user, and what happened to it.
type listener struct {
	*nats.Conn
	heard   chan *nats.Msg
	refused chan error
	hints   chan struct{}
}

func (e *enforced) listen(t *testing.T, node int, p *person, subjects ...string) *listener {
	t.Helper()
	l := &listener{heard: make(chan *nats.Msg, 1000), refused: make(chan error, 100), hints: make(chan struct{}, 100)}
	opts := append(p.options(e.CA()), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { l.refused <- err }),
		nats.LameDuckModeHandler(func(*nats.Conn) { l.hints <- struct{}{} }))
	nc, err := e.In(t).Dial(node, opts...)
	if err != nil {
		t.Fatal(err)
	}
	l.Conn = nc
	for _, s := range subjects {
		if _, err := nc.ChanSubscribe(s, l.heard); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return l
}

// say publishes into a room as its owner.
func (e *enforced) say(t *testing.T, room, text string) {
	t.Helper()
	if err := e.bystanders[0].Pub("room."+room+"."+e.speaker.key.NKey()+".x", "", text); err != nil {
		t.Fatal(err)
	}
}

// hears waits until a listener hears what is said in a room: interest travels
// over routes.
func (e *enforced) hears(t *testing.T, l *listener, room string) {
	t.Helper()
	cluster.WaitFor(t, 5*time.Second, "interest to reach the other node", func() error {
		e.say(t, room, "hello")
		select {
		case m := <-l.heard:
			if strings.HasPrefix(m.Subject, "room."+room+".") {
				return nil
			}
		case <-time.After(50 * time.Millisecond):
		}
		return fmt.Errorf("nothing heard in %s", room)
	})
}

// await returns the next message for which want is true.
func (l *listener) await(t *testing.T, d time.Duration, what string, want func(*nats.Msg) bool) *nats.Msg {
	t.Helper()
	late := time.After(d)
	for {
		select {
		case m := <-l.heard:
			if want(m) {
				return m
			}
		case <-late:
			t.Fatalf("%s: nothing heard in %s", what, d)
		}
	}
}

// revoke closes what a user has open on every node by the time the command has
// returned, and for good.
func (e *enforced) revoke(t *testing.T) {
	p := e.addUser("revoked")
	raw := e.rawEverywhere(p)
	var clients []*listener
	for _, i := range e.Nodes() {
		clients = append(clients, e.listen(t, i, p))
	}
	if got := e.live(e.sys, p); len(got) != 6 {
		t.Fatalf("open are %v", got)
	}
	e.cli(t, "user", "revoke", "revoked", "--yes")
	wantClosed(t, raw...)
	cluster.Hold(t, 3*time.Second, "nothing of theirs is open", func() error {
		if got := e.live(e.sys, p); len(got) > 0 {
			return fmt.Errorf("open are %v", got)
		}
		for i, v := range e.everywhere(p) {
			if v == admitted {
				return fmt.Errorf("n%d admits", i+1)
			}
		}
		return nil
	})
	for _, c := range clients {
		if c.IsConnected() {
			t.Error("a client believes that it is connected")
		}
	}
}

// removal from one of two rooms closes; the client comes back by itself, keeps
// the other room and is refused the one it lost.
func (e *enforced) removal(t *testing.T) {
	p := e.addUser("removed")
	e.join("ops", p, bus.Writer)
	e.join("dev", p, bus.Writer)
	raw := e.rawEverywhere(p)
	l := e.listen(t, 2, p, "room.ops.>", "room.dev.>")
	say := func(room, text string) { e.say(t, room, text) }
	e.hears(t, l, "dev")
	e.hears(t, l, "ops")
	e.cli(t, "room", "remove", "dev", "removed")
	wantClosed(t, raw...)
	select {
	case err := <-l.refused:
		if !strings.Contains(err.Error(), `"room.dev.>"`) {
			t.Errorf("refused: %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the subscription to the room is not refused again")
	}
	cluster.WaitFor(t, 5*time.Second, "the other room to be heard", func() error {
		say("dev", "after")
		say("ops", "after")
		select {
		case m := <-l.heard:
			if string(m.Data) != "after" {
				return fmt.Errorf("heard %q", m.Data)
			}
			if !strings.HasPrefix(m.Subject, "room.ops.") {
				t.Fatalf("heard %s after the removal", m.Subject)
			}
			return nil
		case <-time.After(100 * time.Millisecond):
			return fmt.Errorf("nothing heard")
		}
	})
	if n := l.Stats().Reconnects; n < 1 || n > 3 {
		t.Errorf("reconnected %d times", n)
	}
}

// roleDown takes the right to publish away at once; up it disturbs nobody.
func (e *enforced) roleDown(t *testing.T) {
	p := e.addUser("demoted")
	e.join("ops", p, bus.Reader)
	reader := e.connectRaw(1, p)
	e.join("ops", p, bus.Writer)
	wantOpen(t, reader)
	writer := e.connectRaw(3, p)
	e.cli(t, "room", "add", "ops", "demoted", "--role", "owner")
	wantOpen(t, reader, writer)
	e.cli(t, "room", "add", "ops", "demoted", "--role", "reader")
	wantClosed(t, writer)
}

// suspend closes and keeps out, resume lets in again.
func (e *enforced) suspend(t *testing.T) {
	p := e.addUser("suspended")
	raw := e.rawEverywhere(p)
	if _, err := e.store.SuspendUser(t.Context(), p.key); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, raw...)
	for i, v := range e.everywhere(p) {
		if v == admitted {
			t.Errorf("n%d admits", i+1)
		}
	}
	if _, err := e.store.ResumeUser(t.Context(), p.key); err != nil {
		t.Fatal(err)
	}
	wantOpen(t, e.rawEverywhere(p)...)
}

// archive closes the connections of every member, and of nobody else.
func (e *enforced) archive(t *testing.T) {
	owner := e.addUser("archivist")
	e.addRoom("old", owner, kv.RoomOptions{})
	var members []*wire.Conn
	for n := range 6 {
		p := e.addUser(fmt.Sprintf("old%d", n))
		e.join("old", p, bus.Reader)
		members = append(members, e.connectRaw(n%3+1, p))
	}
	if _, err := e.store.ArchiveRoom(t.Context(), "old", false); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, members...)
	if err := e.connectRaw(1, owner).Sub("room.old.>", "", "1"); !errors.Is(err, wire.ErrDenied) {
		t.Errorf("the owner subscribes to an archived room: %v", err)
	}
}

// expiry that is set on somebody who is connected ends them at its moment.
func (e *enforced) expiry(t *testing.T) {
	p := e.addUser("expiring")
	raw := e.rawEverywhere(p)
	at := time.Now().Add(2 * time.Second).Truncate(time.Millisecond)
	if _, err := e.store.PatchUser(t.Context(), p.key, kv.UserPatch{Expires: true, ExpiresAt: &at}); err != nil {
		t.Fatal(err)
	}
	for time.Until(at) > 200*time.Millisecond {
		closed := closedOf(raw)
		if left := time.Until(at); len(closed) > 0 && left > 0 { // the look itself may last beyond it
			t.Fatalf("closed are %v, %s before the expiry", closed, left)
		}
	}
	hold(t.Context(), time.Until(at))
	wantClosed(t, raw...)
}

// add to a room drops nothing: the same connection goes on without losing a
// message, and its user is told once.
func (e *enforced) add(t *testing.T) {
	p := e.addUser("added")
	e.join("ops", p, bus.Writer)
	l := e.listen(t, 3, p, "room.ops.>", bus.NoticeSubscribe(p.key))
	before := e.live(e.sys, p)
	const messages = 300
	e.hears(t, l, "ops")
	for n := range messages {
		if n == messages/3 {
			go e.join("dev", p, bus.Reader)
		}
		if err := e.bystanders[0].Pub("room.ops."+e.speaker.key.NKey()+".n", "", fmt.Sprint(n)); err != nil {
			t.Fatal(err)
		}
	}
	next, told, hinted := 0, 0, 0
	for next < messages || told == 0 || hinted == 0 {
		m := l.await(t, 5*time.Second, "a message or a notice", func(m *nats.Msg) bool { return !strings.HasSuffix(m.Subject, ".x") })
		if m.Subject == bus.NoticeSubject(p.key, bus.NoticeAdded) {
			if told++; string(m.Data) != `{"v":1,"room":"dev","role":"reader","durable":false}` {
				t.Errorf("the notice says %s", m.Data)
			}
			continue
		}
		if m.Subject == bus.NoticeSubject(p.key, bus.NoticeReauthenticate) {
			if hinted++; string(m.Data) != `{"v":1,"durable":false}` {
				t.Errorf("the notice says %s", m.Data)
			}
			continue
		}
		if string(m.Data) != fmt.Sprint(next) {
			t.Fatalf("heard %s, want %d: a message was lost", m.Data, next)
		}
		next++
	}
	select {
	case <-l.hints:
	case <-time.After(3 * time.Second):
		t.Error("no hint to connect again")
	}
	cluster.Hold(t, 1500*time.Millisecond, "the same connection goes on", func() error {
		if after := e.live(e.sys, p); !slices.Equal(after, before) {
			return fmt.Errorf("open are %v, were %v", after, before)
		}
		if len(l.hints) > 0 || len(l.heard) > 0 {
			return fmt.Errorf("told %d times more, hinted %d", len(l.heard), len(l.hints))
		}
		return nil
	})
	if err := l.ForceReconnect(); err != nil { // what a client that heeds the hint does
		t.Fatal(err)
	}
	cluster.WaitFor(t, 5*time.Second, "the new room to be usable", func() error {
		if !l.IsConnected() {
			return fmt.Errorf("not connected")
		}
		sub, err := l.SubscribeSync("room.dev.>")
		if err != nil {
			return err
		}
		defer func() { _ = sub.Unsubscribe() }()
		if err := l.Flush(); err != nil {
			return err
		}
		if len(l.refused) > 0 {
			return <-l.refused
		}
		return nil
	})
}

// TestEnforceMany revokes and removes users at random while many are connected
// and callouts are killed and started again: every connection of theirs is
// closed, no other one is, and both are counted.
func TestEnforceMany(t *testing.T) {
	t.Parallel()
	users, revokes, removals, kills := 40, 10, 10, 1
	if full {
		users, revokes, removals, kills = 1000, 300, 300, 20
	}
	w := newWorld(t, cluster.Options{Lease: 2 * time.Second})
	w.addRoom("all", w.admin, kv.RoomOptions{})
	people, conns := make([]*person, users), make([][]*wire.Conn, users)
	for n := range people {
		people[n] = w.addUser(fmt.Sprintf("p%d", n))
		w.join("all", people[n], bus.Writer)
		conns[n] = w.rawEverywhere(people[n])
		for _, c := range conns[n] {
			c.KeepAlive()
		}
	}
	stop, killed := make(chan struct{}), make(chan int)
	go func() { killed <- w.killCallouts(stop, kills) }()
	var took []time.Duration
	change := func(n int, f func(context.Context) (kv.Result, error)) {
		began := time.Now()
		w.patiently(people[n].name, f)
		took = append(took, time.Since(began))
		for began = time.Now(); ; {
			if len(closedOf(conns[n])) == len(conns[n]) {
				return
			}
			if time.Since(began) > 5*time.Second {
				t.Fatalf("%s has connections 5 s after the change returned", people[n].name)
			}
		}
	}
	for n := range revokes {
		change(n, func(ctx context.Context) (kv.Result, error) { return w.store.RevokeUser(ctx, people[n].key) })
	}
	for n := revokes; n < revokes+removals; n++ {
		change(n, func(ctx context.Context) (kv.Result, error) { return w.store.RemoveMember(ctx, "all", people[n].key) })
	}
	close(stop)
	times := <-killed
	untouched := 0
	for _, cs := range conns[revokes+removals:] {
		if closed := closedOf(cs); len(closed) > 0 {
			t.Errorf("somebody else lost %d connections", len(closed))
		}
		untouched += len(cs)
	}
	slices.Sort(took)
	t.Logf("%d connections closed by %d changes, %d others untouched, %d callouts killed; a change took %s, at most %s", 3*(revokes+removals), len(took),
		untouched, times, took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
}

// killCallouts kills one callout after another and starts it again, until stop
// is closed or most have died, leaves all running, and counts.
func (w *world) killCallouts(stop <-chan struct{}, most int) int {
	for n := range most {
		node := n%3 + 1
		w.Kill(node, cluster.Authcallout)
		select {
		case <-stop:
		case <-time.After(time.Second):
		}
		w.StartNode(node, cluster.Authcallout)
		w.mustBeReady(node)
		select {
		case <-stop:
			return n + 1
		default:
		}
	}
	return most
}

// TestEnforceRace lets 300 connections of one user open while that user is
// revoked and the callouts answer slowly: a second after the revoke returned
// none lives, and no sweep was needed for that.
func TestEnforceRace(t *testing.T) {
	t.Parallel()
	const racers = 300
	w := newWorld(t, cluster.Options{Controls: true, Env: map[cluster.Service]map[string]string{
		cluster.Authcallout: {"UNIBUS_DELAY_REPLY": "20ms", "UNIBUS_USER_CONNECTIONS": "1000"},
	}})
	p := w.addUser("racer")
	conns := make([]*wire.Conn, racers)
	var dialled sync.WaitGroup
	for n := range conns {
		dialled.Go(func() {
			c, err := wire.Dial(w.NATSURL(n%3+1), w.trust, 15*time.Second)
			if err != nil {
				t.Errorf("dial: %v", err)
				return
			}
			t.Cleanup(c.Close)
			conns[n] = c
		})
	}
	dialled.Wait()
	if t.Failed() {
		return
	}
	var racing sync.WaitGroup
	var in atomic.Int32
	some := make(chan struct{})
	for _, c := range conns {
		racing.Go(func() {
			if c.Connect(wire.Proof(p.kp, c.Info.Nonce)) == nil && in.Add(1) == 5 {
				close(some)
			}
		})
	}
	select {
	case <-some:
	case <-time.After(30 * time.Second):
		t.Fatal("nobody is admitted")
	}
	if _, err := w.store.RevokeUser(t.Context(), p.key); err != nil {
		t.Fatal(err)
	}
	returned := time.Now()
	inAtReturn := in.Load()
	sys := w.Sys()
	for open := w.live(sys, p); len(open) > 0; open = w.live(sys, p) {
		if time.Since(returned) > closedWithin {
			t.Fatalf("%d connections live %s after the revoke returned", len(open), closedWithin)
		}
	}
	t.Logf("%d of %d were in when the revoke returned; none lived %s later", inAtReturn, racers, time.Since(returned).Round(time.Millisecond))
	racing.Wait()
	cluster.Hold(t, 3*time.Second, "none comes back", func() error {
		if open := w.live(sys, p); len(open) > 0 {
			return fmt.Errorf("open are %v", open)
		}
		return nil
	})
	w.foundNothing()
}

// TestEnforceAcrossRestarts: what was taken away while no callout ran, and an
// expiry that was recorded before all of them were started again, end the
// connections that began before; others live through it.
func TestEnforceAcrossRestarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: time.Second})
	expired, expiring := w.addUser("expired"), w.addUser("expiring")
	kept := append(w.rawEverywhere(w.addUser("other")), w.rawEverywhere(w.admin)...)
	lost, timed := w.rawEverywhere(expired), w.rawEverywhere(expiring)
	for _, i := range w.Nodes() {
		w.Kill(i, cluster.Authcallout)
	}
	soon, expiry := time.Now().Add(4*time.Second), time.Now().Add(20*time.Second)
	for p, at := range map[*person]*time.Time{expired: &soon, expiring: &expiry} {
		if _, err := w.store.PatchUser(t.Context(), p.key, kv.UserPatch{Expires: true, ExpiresAt: at}); err != nil {
			t.Fatal(err)
		}
	}
	hold(t.Context(), time.Until(soon))
	wantOpen(t, lost...) // nobody is there to close them: the limit that the threat model states
	for _, i := range w.Nodes() {
		w.StartNode(i, cluster.Authcallout)
	}
	w.WaitHealthy(30 * time.Second)
	wantClosed(t, lost...)
	if time.Now().After(expiry.Add(-time.Second)) {
		t.Fatal("the restart took longer than the expiry")
	}
	cluster.Hold(t, time.Until(expiry)-500*time.Millisecond, "the connections live until they expire", func() error {
		if closed := closedOf(timed); len(closed) > 0 {
			return fmt.Errorf("closed are %v, %s before", closed, time.Until(expiry))
		}
		return nil
	})
	hold(t.Context(), time.Until(expiry))
	wantClosed(t, timed...)
	wantOpen(t, kept...)
}

// TestEnforceSilentServer revokes a user who is connected to every node while
// one server is paused, and another while one is dead: what can be closed is,
// the rest when the server is back, and nobody else loses anything.
func TestEnforceSilentServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: 2 * time.Second})
	first, second, third, other := w.addUser("first"), w.addUser("second"), w.addUser("third"), w.addUser("other")
	one, two, three, kept := w.rawEverywhere(first), w.rawEverywhere(second), w.rawEverywhere(third), w.rawEverywhere(other)

	// The leader that has committed the change falls silent: who made it hears
	// so after the lease, and not when a new leader is asked.
	leader, err := usersLeader(t.Context(), w.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	returned := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := w.store.RevokeUser(ctx, third.key)
		returned <- err
	}()
	for three[leader-1].Flush() == nil { // it is committed
	}
	w.Pause(leader, cluster.NATS)
	select {
	case err := <-returned:
		if u := new(kv.Unproven); err != nil && !errors.As(err, &u) {
			t.Errorf("revoke, with its leader paused: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("a revoke hangs on a leader that was paused after the commit")
	}
	w.Resume(leader, cluster.NATS)
	wantClosed(t, three...)
	w.WaitHealthy(30 * time.Second)
	wantOpen(t, kept...)

	w.Pause(3, cluster.NATS)
	w.patiently("revoke", func(ctx context.Context) (kv.Result, error) { return w.store.RevokeUser(ctx, first.key) })
	wantClosed(t, one[:2]...)
	if n := w.metric(`unibus_enforce_unproven_total`); n == 0 {
		t.Error("closing a connection of a paused server counts as proven")
	}
	w.Resume(3, cluster.NATS)
	resumed := time.Now()
	for { // nobody is let in before what was kept is gone
		v, _ := w.attempt(3, other)
		if v == admitted {
			break
		}
		if time.Since(resumed) > 20*time.Second {
			t.Fatal("the server admits nobody")
		}
	}
	if one[2].Flush() == nil {
		t.Error("somebody was let in while a connection of a revoked user is alive")
	}
	t.Logf("the first one was let in %s after the server came back", time.Since(resumed).Round(time.Millisecond))
	for one[2].Flush() == nil {
		if time.Since(resumed) > 3*time.Second {
			t.Fatal("a connection of a revoked user lives 3 s after its server came back")
		}
	}
	w.WaitHealthy(30 * time.Second)
	wantOpen(t, kept...)

	w.Kill(3)
	w.patiently("revoke", func(ctx context.Context) (kv.Result, error) { return w.store.RevokeUser(ctx, second.key) })
	wantClosed(t, two[:2]...)
	w.StartNode(3)
	w.WaitHealthy(30 * time.Second)
	kept = append(kept[:2], w.connectRaw(3, other))
	sys := w.Sys()
	cluster.WaitFor(t, 10*time.Second, "the table to be that of the servers", func() error {
		want := float64(len(w.live(sys, other)) * len(w.Nodes())) // each callout knows all
		if got := w.metric("unibus_enforce_connections"); got != want {
			return fmt.Errorf("known are %v, want %v", got, want)
		}
		return nil
	})
	for _, p := range []*person{first, second, third} {
		if open := w.live(sys, p); len(open) > 0 {
			t.Errorf("%s has %v open", p.name, open)
		}
	}
	wantOpen(t, kept...)
	w.foundNothing()
}
