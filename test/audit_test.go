package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// TestAudit holds the audit to what docs/audit.md promises, on a live cluster.
func TestAudit(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	a := &auditors{world: w, signer: newPerson(t, "signer")}
	t.Run("connects are on record", a.connects)
	t.Run("a lost answer makes no second block", a.lostAnswers)
	t.Run("a killed server loses and doubles nothing", func(t *testing.T) {
		a.survive(t, "kill", 500, func(c *cluster.Cluster, node int) { c.Kill(node, cluster.NATS) }, func(c *cluster.Cluster, node int) { c.StartNode(node, cluster.NATS) })
	})
	t.Run("a paused server loses and doubles nothing", func(t *testing.T) {
		a.survive(t, "pause", 200, func(c *cluster.Cluster, node int) { c.Pause(node, cluster.NATS) }, func(c *cluster.Cluster, node int) { c.Resume(node, cluster.NATS) })
	})
	t.Run("whoever rewrites it is found", a.rewrite)
}

// auditors are several processes that write the audit.
type auditors struct {
	*world
	signer *person // of the checkpoints
}

func (a *auditors) link(t *testing.T) *nats.Conn {
	t.Helper()
	return a.linkTo(t, a.URLs(a.NATSURL))
}

func (a *auditors) linkTo(t *testing.T, url string) *nats.Conn {
	t.Helper()
	nc, err := kv.Connect(kv.Link{
		URL: url, SeedFile: a.Seed("ops"), CAFile: a.CA(), Name: "test-audit", Inbox: "_INBOX_ops", Timeout: 2 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	cluster.WaitFor(t, 10*time.Second, "a connection", func() error {
		if !nc.IsConnected() {
			return errors.New(nc.Status().String())
		}
		return nil
	})
	return nc
}

// open starts one writer; stop ends it as a graceful stop does.
func (a *auditors) open(t *testing.T, instance string, signer kv.AuditSigner) (w *kv.Audit, stop func()) {
	t.Helper()
	return a.openOn(t, a.link(t), instance, signer)
}

func (a *auditors) openOn(t *testing.T, nc *nats.Conn, instance string, signer kv.AuditSigner) (w *kv.Audit, stop func()) {
	t.Helper()
	w = kv.OpenAudit(kv.AuditConfig{
		Conn: nc, Instance: instance, Signer: signer, Every: 500 * time.Millisecond,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan struct{})
	go func() { w.Run(ctx); close(done) }()
	var once sync.Once
	stop = func() { once.Do(func() { cancel(); <-done }) }
	t.Cleanup(stop)
	return w, stop
}

// all reads every page of a query.
func (a *auditors) all(t *testing.T, q kv.AuditQuery) (out []bus.AuditRecord) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		page, next, err := kv.ReadAudit(ctx, a.Ops(), q)
		if err != nil && ctx.Err() == nil && bus.CodeOf(err) == bus.Unavailable {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, page...)
		if next == "" {
			return out
		}
		if q.After, err = kv.ParseAuditCursor(next); err != nil {
			t.Fatal(err)
		}
	}
}

func (a *auditors) verify(t *testing.T) bus.AuditReport {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	report, err := kv.VerifyAudit(ctx, a.Ops(), []string{a.signer.key.NKey(), publicOf(t, a.Seed("membership-ctrl"))})
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// connects: an admission, a denial of somebody known and one of a stranger are
// entries of the callout that decided, under the proven key.
func (a *auditors) connects(t *testing.T) {
	started := time.Now()
	alice, stranger := a.addUser("alice"), newPerson(t, "stranger")
	a.waitAdmits(alice, 1, 2, 3)
	if v, err := a.attempt(2, stranger); v != refused {
		t.Fatalf("a stranger: %s: %v", v, err)
	}
	if _, err := a.store.RevokeUser(t.Context(), alice.key); err != nil {
		t.Fatal(err)
	}
	if v, err := a.attempt(3, alice); v != refused {
		t.Fatalf("after the revoke: %s: %v", v, err)
	}
	for _, want := range []bus.AuditEntry{
		{User: alice.key.NKey(), Result: "allow", Detail: "active"},
		{User: alice.key.NKey(), Result: "deny", Code: bus.Forbidden, Detail: "revoked"},
		{User: stranger.key.NKey(), Result: "deny", Code: bus.Unauthenticated, Detail: "unknown"},
	} {
		cluster.WaitFor(t, 10*time.Second, fmt.Sprintf("%s of a connect in the audit", want.Result), func() error {
			got := a.all(t, kv.AuditQuery{User: want.User, Kind: string(bus.AuditConnect), Since: started})
			if !slices.ContainsFunc(got, func(r bus.AuditRecord) bool {
				return strings.HasPrefix(r.Instance, "authcallout-n") && r.Action == "connect" && r.Actor == want.User && r.From == "127.0.0.1" &&
					r.Result == want.Result && r.Code == want.Code && r.Detail == want.Detail && time.Since(r.At) < time.Minute
			}) {
				return fmt.Errorf("%+v is not among %+v", want, got)
			}
			return nil
		})
	}
	if report := a.verify(t); !report.OK || report.Entries < 5 {
		t.Errorf("%+v", report)
	}
	if others := a.all(t, kv.AuditQuery{User: alice.key.NKey(), Action: "user.*"}); len(others) != 0 {
		t.Errorf("a filter lets through %+v", others)
	}
}

// lostAnswers: the answer to a block comes too late, again and again. The writer
// finds its block in the stream and says that it is stored, once.
func (a *auditors) lostAnswers(t *testing.T) {
	line := newSlowLine(t, strings.TrimPrefix(a.NATSURL(1), "tls://"))
	w, stop := a.openOn(t, a.linkTo(t, "tls://"+line.address), "unibusctl-w0", nil)
	recordFor(t, w, "test.lost", "first")
	for i := range 3 {
		line.hold()
		done := make(chan error, 1)
		go func() {
			done <- w.Record(t.Context(), bus.AuditEntry{Kind: bus.AuditOutcome, Action: "test.lost", Request: fmt.Sprintf("lost%d", i), Result: "ok"})
		}()
		held := time.After(1200 * time.Millisecond) // longer than the writer waits for one answer
		cluster.WaitFor(t, 5*time.Second, "the block to be stored while its writer hears nothing", func() error {
			if n := len(a.all(t, kv.AuditQuery{Action: "test.lost"})); n != i+2 {
				return fmt.Errorf("%d entries", n)
			}
			return nil
		})
		<-held
		line.release()
		if err := <-done; err != nil {
			t.Errorf("lost%d: %v", i, err)
		}
	}
	stop()
	if got := a.all(t, kv.AuditQuery{Action: "test.lost"}); len(got) != 4 {
		t.Errorf("%d entries, want 4: %+v", len(got), got)
	}
}

// slowLine carries connections to a server, and on command holds back what the
// server says.
type slowLine struct {
	address string
	mu      sync.RWMutex // write-locked while it holds
}

func (l *slowLine) hold() { l.mu.Lock() }

func (l *slowLine) release() { l.mu.Unlock() }

func newSlowLine(t *testing.T, server string) *slowLine {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	l := &slowLine{address: ln.Addr().String()}
	go func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			upstream, err := net.Dial("tcp", server)
			if err != nil {
				_ = client.Close()
				continue
			}
			go func() { _, _ = io.Copy(upstream, client); _ = upstream.Close() }()
			go func() { _, _ = io.Copy(gate{l, client}, upstream); _ = client.Close() }()
		}
	}()
	return l
}

// gate writes to a client while the line does not hold.
type gate struct {
	line   *slowLine
	client net.Conn
}

func (g gate) Write(b []byte) (int, error) {
	g.line.mu.RLock()
	defer g.line.mu.RUnlock()
	return g.client.Write(b)
}

// survive: records from four processes, two of which share a name, while the
// leader of the stream is taken away. Each confirmed one is there once, the
// others once or never, and the chains hold. A tail sees the same.
func (a *auditors) survive(t *testing.T, fault string, records int, take, giveBack func(*cluster.Cluster, int)) {
	action := "test." + fault
	writers := make([]*kv.Audit, 4)
	stops := make([]func(), len(writers))
	for i, name := range []string{"unibusctl-w1", "unibusctl-w2", "unibusctl-w3", "unibusctl-w3"} {
		var signer kv.AuditSigner
		if i == 0 {
			signer = a.signer.kp
		}
		writers[i], stops[i] = a.open(t, name, signer)
	}
	tailed := map[string]int{}
	var last kv.AuditCursor
	tctx, endTail := context.WithCancel(t.Context())
	defer endTail()
	listening, tailDone := make(chan struct{}), make(chan error, 1)
	nc := a.link(t)
	go func() {
		tailDone <- kv.TailAudit(tctx, nc, kv.AuditQuery{Action: action + ".*"}, func(r bus.AuditRecord) error {
			if at := (kv.AuditCursor{Seq: r.Seq, Index: r.Index}); at.Seq < last.Seq || at == last {
				return fmt.Errorf("%v after %v", at, last)
			} else {
				last = at
			}
			switch {
			case r.Request == "begin" && len(tailed) == 0:
				close(listening)
			case r.Request == "end":
				endTail()
			}
			tailed[r.Request]++
			return nil
		})
	}()
	cluster.WaitFor(t, 10*time.Second, "the tail", func() error {
		if err := writers[1].Record(t.Context(), bus.AuditEntry{Kind: bus.AuditOutcome, Action: action + ".begin", Request: "begin"}); err != nil {
			return err
		}
		select {
		case <-listening:
			return nil
		case <-time.After(100 * time.Millisecond):
			return errors.New("hears nothing")
		}
	})
	var acked sync.Map
	var confirmed, failed atomic.Int64
	var back atomic.Bool
	half := make(chan struct{})
	var all sync.WaitGroup
	for i := range records {
		all.Go(func() {
			w := writers[i%len(writers)]
			for try := 0; ; try++ {
				id := fmt.Sprintf("r%d.%d", i, try)
				err := w.Record(t.Context(), bus.AuditEntry{Kind: bus.AuditOutcome, Action: action + ".record", Actor: "direct", Request: id, Result: "ok"})
				if err == nil {
					acked.Store(id, true)
					if n := confirmed.Add(1); n == int64(records/2) {
						close(half)
					}
					return
				}
				failed.Add(1)
				if bus.CodeOf(err) != bus.Unavailable || try == 20 {
					t.Errorf("%s: %v", id, err)
					return
				}
			}
		})
		if i == records/2 { // the other half begins when the server is about to die
			<-reached(&confirmed, 1)
			leader := a.auditLeader(t)
			all.Go(func() { take(a.In(t), leader) })
			defer func() {
				if !back.Swap(true) {
					giveBack(a.In(t), leader)
				}
				a.WaitHealthy(30 * time.Second)
			}()
			if fault == "pause" { // an old leader that wakes up while the writers try on
				all.Go(func() {
					if <-reached(&failed, int64(records)/4); !back.Swap(true) {
						giveBack(a.In(t), leader)
					}
				})
			}
		}
	}
	all.Wait()
	<-half
	for _, stop := range stops[1:3] {
		stop()
	}
	recordFor(t, writers[3], action+".end", "end")
	stops[3]()
	stops[0]() // signs the end
	found := map[string]int{}
	for _, r := range a.all(t, kv.AuditQuery{Action: action + ".record", Limit: 77}) {
		if found[r.Request]++; found[r.Request] > 1 {
			t.Errorf("%s is there twice", r.Request)
		}
	}
	acked.Range(func(id, _ any) bool {
		if found[id.(string)] != 1 {
			t.Errorf("%s was confirmed and is not there", id)
		}
		return true
	})
	select {
	case err := <-tailDone:
		if err != nil {
			t.Errorf("the tail: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the tail missed the end")
	}
	for id := range found {
		if tailed[id] != 1 {
			t.Errorf("the tail saw %s %d times", id, tailed[id])
		}
	}
	report := a.verify(t)
	t.Logf("%d confirmed, %d tries failed, %d entries, %d blocks, %d checkpoints, %d unsigned", confirmed.Load(), failed.Load(), report.Entries, report.Blocks, report.Checkpoints, report.Unsigned)
	if !report.OK || report.Checkpoints == 0 || report.Dropped != 0 {
		t.Errorf("%+v", report)
	}
}

// recordFor writes one entry, however long the servers take to agree on a leader.
func recordFor(t *testing.T, w *kv.Audit, action, request string) {
	t.Helper()
	cluster.WaitFor(t, 20*time.Second, "an entry to be stored", func() error {
		return w.Record(t.Context(), bus.AuditEntry{Kind: bus.AuditOutcome, Action: action, Actor: "direct", Request: request, Result: "ok"})
	})
}

// reached is closed when n counts so far, or after half a minute.
func reached(n *atomic.Int64, want int64) <-chan struct{} {
	ch := make(chan struct{})
	go func() {
		defer close(ch)
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		_ = cluster.Poll(ctx, func(context.Context) error {
			if n.Load() < want {
				return errors.New("not yet")
			}
			return nil
		})
	}()
	return ch
}

func (a *auditors) auditLeader(t *testing.T) (node int) {
	t.Helper()
	cluster.WaitFor(t, 20*time.Second, "a leader of the audit", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		for _, h := range kv.Health(ctx, a.Ops()) {
			for _, i := range a.Nodes() {
				if h.Stream == kv.AuditStream && h.Leader == a.Node(i) {
					node = i
					return nil
				}
			}
		}
		return errors.New("none")
	})
	return node
}

// rewrite: with the ops key the stream can be deleted and made again. One entry
// that is other than it was is named, whether the chain behind it is left as it
// was or computed anew; a rewritten stream does not get the live writers to
// vouch for it.
func (a *auditors) rewrite(t *testing.T) {
	for _, i := range a.Nodes() { // what they wrote between the copy and the deletion would be missed
		a.In(t).Term(i, cluster.Authcallout, cluster.Membership)
	}
	w, stop := a.open(t, "unibusctl-w4", a.signer.kp)
	for i := range 5 {
		recordFor(t, w, fmt.Sprintf("user.revoke.%d", i), "")
	}
	// The signer has read these heads once.
	cluster.WaitFor(t, 10*time.Second, "a checkpoint over everything", func() error {
		if r := a.verify(t); r.Unsigned > 0 || !r.OK {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	js, err := jetstream.New(a.Ops())
	if err != nil {
		t.Fatal(err)
	}
	kept := a.messages(t, js)
	victim := slices.IndexFunc(kept, func(m *nats.Msg) bool { return bytes.Contains(m.Data, []byte("user.revoke.2")) })
	number := blockNumber(t, kept[victim].Data)
	altered := slices.Clone(kept)
	altered[victim] = &nats.Msg{Subject: kept[victim].Subject, Data: bytes.Replace(kept[victim].Data, []byte("user.revoke.2"), []byte("user.resume.2"), 1)}
	a.remake(t, js, altered)
	report := a.verify(t)
	if !slices.ContainsFunc(report.Findings, func(f bus.AuditFinding) bool {
		return f.Seq == uint64(victim+1) && f.Instance == "unibusctl-w4" && f.N == number && strings.Contains(f.Problem, "altered")
	}) || report.OK {
		t.Errorf("block %d at sequence %d is not named: %+v", number, victim+1, report.Findings)
	}
	stop()

	a.remake(t, js, kept) // as it was: nothing is wrong with a faithful copy
	if report := a.verify(t); !report.OK {
		t.Errorf("a faithful copy: %+v", report.Findings)
	}

	// The tail is cut off behind the back of a running writer, and nothing else
	// is touched: it goes on from what it knows, and the gap shows.
	w, stop = a.open(t, "unibusctl-w5", nil)
	for range 3 {
		recordFor(t, w, "user.add", "")
	}
	short := a.messages(t, js)
	for !strings.HasSuffix(short[len(short)-1].Subject, "unibusctl-w5") { // a connect may have come behind
		short = short[:len(short)-1]
	}
	a.remake(t, js, short[:len(short)-2])
	recordFor(t, w, "user.add", "")
	stop()
	report = a.verify(t)
	if !slices.ContainsFunc(report.Findings, func(f bus.AuditFinding) bool { return f.Instance == "unibusctl-w5" && f.N == 2 && f.Seq == 0 }) {
		t.Errorf("blocks 2 to 3 of w5 are gone, and %+v", report.Findings)
	}
}

func blockNumber(t *testing.T, data []byte) uint64 {
	t.Helper()
	var b struct {
		N uint64 `json:"n"`
	}
	if err := json.Unmarshal(data, &b); err != nil {
		t.Fatal(err)
	}
	return b.N
}

// messages copies the stream, from sequence 1 on.
func (a *auditors) messages(t *testing.T, js jetstream.JetStream) (out []*nats.Msg) {
	t.Helper()
	s, err := js.Stream(t.Context(), kv.AuditStream)
	if err != nil {
		t.Fatal(err)
	}
	for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, &nats.Msg{Subject: m.Subject, Data: m.Data})
	}
	return out
}

// remake deletes the stream and makes it again with other messages.
func (a *auditors) remake(t *testing.T, js jetstream.JetStream, ms []*nats.Msg) {
	t.Helper()
	if err := js.DeleteStream(t.Context(), kv.AuditStream); err != nil {
		t.Fatal(err)
	}
	streams := kv.Streams()
	want := streams[slices.IndexFunc(streams, func(s jetstream.StreamConfig) bool { return s.Name == kv.AuditStream })]
	cluster.WaitFor(t, 20*time.Second, "the stream again", func() error {
		_, err := js.CreateStream(t.Context(), want)
		return err
	})
	for _, m := range ms {
		if _, err := js.PublishMsg(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
}
