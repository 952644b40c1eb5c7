package test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/test/cluster"
)

// TestRooms uses and attacks durable rooms on one live cluster.
func TestRooms(t *testing.T) {
	t.Parallel()
	r := &rooms{apiWorld: newAPIWorld(t, cluster.Options{Controls: true})}
	r.mallory = r.addUser("mallory")
	for _, id := range []string{"log", "other"} {
		r.root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": id, "durable": true})
		r.root.changes(t, "PUT", "/v1/rooms/"+id+"/members/alice", dict{"role": "writer"})
	}
	r.root.changes(t, "PUT", "/v1/rooms/log/members/mallory", dict{"role": "writer"})
	r.root.changes(t, "PUT", "/v1/rooms/log/members/bob", dict{"role": "reader"})
	for _, s := range []struct {
		name string
		test func(*testing.T)
	}{
		{"headers", r.headers},
		{"replies", r.replies},
		{"names", r.names},
		{"history", r.history},
		{"retention", r.retention},
		{"programs", r.programs},
		{"commands", r.commands},
		{"removed", r.removed},
		{"drained", r.drained},
		{"archive", r.archived},
	} {
		t.Run(s.name, s.test)
	}
}

type rooms struct {
	*apiWorld
	mallory *person
}

// plain connects somebody as any NATS client would.
func (w *world) plain(t *testing.T, i int, p *person) *nats.Conn {
	t.Helper()
	nc, err := w.Dial(i, p.options(w.CA())...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// recordAs sends a message into a durable room and returns what the recorder says.
func recordAs(nc *nats.Conn, room bus.RoomID, p *person, topic, id, text string, header nats.Header) (bus.Recorded, error) {
	m := nats.NewMsg(bus.RoomSubject(room, p.key, topic))
	m.Data = []byte(text)
	for k, v := range header {
		m.Header[k] = v
	}
	if id != "" {
		m.Header.Set(bus.MessageIDHeader, id)
	}
	var said bus.Recorded
	answer, err := nc.RequestMsg(m, 5*time.Second)
	if err == nil {
		err = json.Unmarshal(answer.Data, &said)
	}
	return said, err
}

func (r *rooms) stores(t *testing.T, nc *nats.Conn, room bus.RoomID, p *person, topic, text string, header nats.Header) uint64 {
	t.Helper()
	said, err := recordAs(nc, room, p, topic, "", text, header)
	if err != nil || said.Seq == 0 {
		t.Fatalf("%s into %s: %+v %v", text, room, said, err)
	}
	return said.Seq
}

// stored reads everything that a room has stored, as alice.
func (r *rooms) stored(t *testing.T, room string) []bus.StoredMessage {
	t.Helper()
	var all []bus.StoredMessage
	for after := uint64(0); ; {
		var page struct{ Messages []bus.StoredMessage }
		r.api(2, r.alice).want(t, http.StatusOK, "GET", fmt.Sprintf("/v1/rooms/%s/messages?limit=500&after=%d", room, after), nil).decode(t, &page)
		if len(page.Messages) == 0 {
			return all
		}
		all = append(all, page.Messages...)
		after = all[len(all)-1].Seq
	}
}

// Whatever headers a member's message carries, the stream goes on, keeps what it
// has, and republishes none of them: the feed's own headers are the server's.
func (r *rooms) headers(t *testing.T) {
	alice, mallory, bob := r.plain(t, 1, r.alice), r.plain(t, 2, r.mallory), r.plain(t, 3, r.bob)
	feed, err := bob.SubscribeSync(bus.FeedSubscribe("log"))
	if err == nil {
		err = bob.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	hostile := []nats.Header{
		{"Nats-Expected-Last-Msg-Id": {"nope"}},
		{"Nats-Expected-Last-Sequence": {"0"}},
		{"Nats-Expected-Last-Subject-Sequence": {"7"}},
		{"Nats-Expected-Stream": {"ROOM_other"}},
		{"Nats-Rollup": {"all"}},
		{"Nats-Rollup": {"sub"}},
		{"Nats-TTL": {"1s"}},
		{"Nats-Sequence": {"999"}, "Nats-Stream": {"ROOM_other"}, "Nats-Last-Sequence": {"998"}, "Nats-Time-Stamp": {"2001-01-01T00:00:00Z"}, "Nats-Subject": {"store.other.x.y"}},
		{"Nats-Batch-Id": {"b"}, "Nats-Batch-Sequence": {"1"}},
		{"Nats-Batch-Commit": {"1"}},
		{"Nats-Incr": {"1"}},
		{"Nats-Schedule": {"@every 1s"}, "Nats-Schedule-Target": {"store.other.x.y"}},
		{"Nats-Required-Api-Level": {"99"}},
		{"Status": {"503"}},
		{"Nats-Msg-Id": {r.alice.key.NKey() + ":mine"}},
	}
	// A server drops what is to be traced where its sender may not publish.
	traced := nats.NewMsg(bus.RoomSubject("log", r.mallory.key, "x"))
	traced.Header = nats.Header{"Nats-Trace-Dest": {"room.other." + r.alice.key.NKey() + ".x"}}
	r.must2(t, mallory.PublishMsg(traced))
	var want uint64
	for i, h := range hostile {
		if seq := r.stores(t, mallory, "log", r.mallory, "x", fmt.Sprint("hostile ", i), h); want != 0 && seq != want+1 {
			t.Fatalf("%v: stored as %d behind %d", h, seq, want)
		}
		want = r.stores(t, alice, "log", r.alice, "x", fmt.Sprint("after ", i), nil)
	}
	// Alice's id, which mallory tried to take, is alice's.
	said, err := recordAs(alice, "log", r.alice, "x", "mine", "mine", nil)
	if err != nil || said.Duplicate || said.Seq != want+1 {
		t.Errorf("alice's own id: %+v %v", said, err)
	}
	if again, err := recordAs(alice, "log", r.alice, "x", "mine", "mine", nil); err != nil || !again.Duplicate || again.Seq != said.Seq {
		t.Errorf("the same id again: %+v %v", again, err)
	}
	if other, err := recordAs(mallory, "log", r.mallory, "x", "mine", "hers", nil); err != nil || other.Duplicate || other.Seq != said.Seq+1 {
		t.Errorf("the same id of somebody else: %+v %v", other, err)
	}
	ours := []string{"Nats-Sequence", "Nats-Last-Sequence", "Nats-Stream", "Nats-Subject", "Nats-Time-Stamp", "Nats-Msg-Id"}
	for seq := uint64(1); seq <= said.Seq+1; {
		m, err := feed.NextMsg(5 * time.Second)
		if err != nil {
			t.Fatalf("the feed ends before %d: %v", seq, err)
		}
		if m.Subject == bus.FeedTip("log") {
			continue
		}
		for name, values := range m.Header {
			if !slices.Contains(ours, name) && !strings.HasPrefix(name, bus.HeaderPrefix) || len(values) != 1 {
				t.Errorf("message %d has the header %s: %q", seq, name, values)
			}
		}
		if got := m.Header.Get("Nats-Sequence"); got != strconv.FormatUint(seq, 10) || m.Header.Get("Nats-Stream") != "ROOM_log" {
			t.Fatalf("message %s of %s, want %d of ROOM_log", got, m.Header.Get("Nats-Stream"), seq)
		}
		seq++
	}
	if kept := r.stored(t, "log"); len(kept) != int(said.Seq+1) {
		t.Errorf("%d messages are stored, want %d", len(kept), said.Seq+1)
	}
}

// Wherever a member wants to be answered, nobody speaks there but themselves in
// their own inbox: nothing appears in a foreign room, under another name, in
// another's inbox, and no stream obeys.
func (r *rooms) replies(t *testing.T) {
	alice, mallory := r.plain(t, 1, r.alice), r.plain(t, 2, r.mallory)
	var mu sync.Mutex
	var heard []string
	for _, subject := range []string{bus.InboxSubscribe(r.alice.key), bus.NoticeSubscribe(r.alice.key), bus.FeedSubscribe("other"), bus.FeedSubscribe("log")} {
		if _, err := alice.Subscribe(subject, func(m *nats.Msg) {
			mu.Lock()
			defer mu.Unlock()
			heard = append(heard, m.Subject+" "+string(m.Data))
		}); err != nil {
			t.Fatal(err)
		}
	}
	r.must2(t, alice.Flush())
	before := len(r.stored(t, "log"))
	own := "room.log." + r.mallory.key.NKey() + ".sent"
	for _, reply := range []string{
		"room.other." + r.alice.key.NKey() + ".x", "room.log." + r.alice.key.NKey() + ".x", "store.other." + r.alice.key.NKey() + ".x", "store.log." + r.alice.key.NKey() + ".x",
		"feed.other." + r.alice.key.NKey() + ".x", "feed.log." + r.alice.key.NKey() + ".x", "feed.log._tip", bus.InboxPrefix(r.alice.key) + ".x", bus.NoticeSubject(r.alice.key, bus.NoticeRemoved),
		"$JS.API.STREAM.PURGE.ROOM_log", "$JS.API.STREAM.DELETE.ROOM_log", "$JS.API.STREAM.INFO.ROOM_log", "_INBOX_membership.x",
		bus.InboxPrefix(r.mallory.key) + ".>", bus.InboxPrefix(r.mallory.key), bus.InboxPrefix(r.mallory.key) + "x.y",
	} {
		for _, text := range []string{"{}", strings.Repeat("y", 10)} {
			r.must2(t, mallory.PublishRequest(own, reply, []byte(text)))
		}
		// refused ones are answered too: a topic that no recorder takes
		r.must2(t, mallory.PublishRequest("room.log."+r.mallory.key.NKey()+"."+strings.Repeat("z", 65), reply, []byte("refused")))
	}
	last := r.stores(t, mallory, "log", r.mallory, "sent", "the end", nil)
	cluster.WaitFor(t, 10*time.Second, "the feed to have brought all", func() error {
		mu.Lock()
		defer mu.Unlock()
		if len(heard) == 0 || !slices.ContainsFunc(heard, func(s string) bool { return strings.HasSuffix(s, "the end") }) {
			return fmt.Errorf("heard %d", len(heard))
		}
		return nil
	})
	mu.Lock()
	defer mu.Unlock()
	for _, s := range heard {
		if subject, _, _ := strings.Cut(s, " "); subject != "feed.log."+r.mallory.key.NKey()+".sent" && subject != bus.FeedTip("log") {
			t.Errorf("alice heard %s", s)
		}
		if strings.HasPrefix(s, bus.FeedTip("log")) {
			var tip bus.Tip
			if _, data, _ := strings.Cut(s, " "); json.Unmarshal([]byte(data), &tip) != nil || tip.Seq == 0 || tip.Seq > last {
				t.Errorf("a false tip: %s", s)
			}
		}
	}
	kept := r.stored(t, "log")
	if len(kept) != before+33 { // 16 replies, two messages each, and the end
		t.Errorf("%d messages are stored, want %d", len(kept), before+33)
	}
	for _, m := range kept[before:] {
		if m.Sender != r.mallory.key {
			t.Errorf("message %d is under the name of %s", m.Seq, m.NKey)
		}
	}
	if other := r.stored(t, "other"); len(other) != 0 {
		t.Errorf("the other room has stored %v", other)
	}
}

// A member's own subjects are all they may publish to: not what is stored, not
// the feed, not another's name. What is no topic is refused.
func (r *rooms) names(t *testing.T) {
	raw := r.connectRaw(1, r.mallory)
	for _, subject := range []string{
		"store.log." + r.mallory.key.NKey() + ".x", "feed.log." + r.mallory.key.NKey() + ".x", "feed.log._tip", "room.log." + r.alice.key.NKey() + ".x",
		"room.other." + r.mallory.key.NKey() + ".x", "$JS.API.STREAM.INFO.ROOM_log", "$JS.API.DIRECT.GET.ROOM_log", "$O.UNIBUS_blobs.C.x",
	} {
		if err := raw.Pub(subject, "", "{}"); err == nil {
			t.Errorf("mallory may publish %s", subject)
		}
	}
	for _, subject := range []string{"room.log.>", "store.log.>", "feed.other.>", "room.*.>", "$JS.EVENT.>"} {
		if err := raw.Sub(subject, "", "1"); err == nil {
			t.Errorf("mallory may subscribe to %s", subject)
		}
	}
	mallory, bob := r.plain(t, 2, r.mallory), r.plain(t, 2, r.bob)
	for what, said := range map[string]func() (bus.Recorded, error){
		"a long token": func() (bus.Recorded, error) {
			return recordAs(mallory, "log", r.mallory, strings.Repeat("x", 65), "", "x", nil)
		},
		"another alphabet": func() (bus.Recorded, error) { return recordAs(mallory, "log", r.mallory, "ä", "", "x", nil) },
		"an id":            func() (bus.Recorded, error) { return recordAs(mallory, "log", r.mallory, "x", "a b", "x", nil) },
		"a header": func() (bus.Recorded, error) {
			return recordAs(mallory, "log", r.mallory, "x", "", "x", nats.Header{"Unibus-Long": {strings.Repeat("x", 5000)}})
		},
	} {
		if got, err := said(); err != nil || got.Code != bus.Invalid || got.Seq != 0 {
			t.Errorf("%s: %+v %v", what, got, err)
		}
	}
	if _, err := recordAs(bob, "log", r.bob, "x", "", "a reader speaks", nil); err == nil {
		t.Error("a reader may write")
	}
}

// History is for members, in pages, by sequence, by time, and the newest; to
// everybody else, admins too, there is no such room.
func (r *rooms) history(t *testing.T) {
	alice := r.plain(t, 3, r.alice)
	var from time.Time
	for i := range 7 {
		r.stores(t, alice, "other", r.alice, "n."+fmt.Sprint(i), fmt.Sprint(i), nats.Header{"Unibus-Mark": {fmt.Sprint(i)}})
		if i == 2 {
			from = r.stored(t, "other")[2].Time
		}
	}
	type page struct {
		Messages []bus.StoredMessage
		Last     uint64
	}
	get := func(query string) (p page) {
		t.Helper()
		r.api(1, r.alice).want(t, http.StatusOK, "GET", "/v1/rooms/other/messages"+query, nil).decode(t, &p)
		return p
	}
	for query, want := range map[string][]uint64{
		"": {1, 2, 3, 4, 5, 6, 7}, "?after=4": {5, 6, 7}, "?after=4&limit=2": {5, 6}, "?after=7": {}, "?after=9": {}, "?newest=true&limit=2": {6, 7},
		"?since=" + from.Format(time.RFC3339Nano): {3, 4, 5, 6, 7}, "?since=2090-01-01T00:00:00Z": {},
	} {
		p := get(query)
		seqs := []uint64{}
		for _, m := range p.Messages {
			seqs = append(seqs, m.Seq)
			if i := m.Seq - 1; string(m.Data) != fmt.Sprint(i) || m.Topic != "n."+fmt.Sprint(i) || m.Sender != r.alice.key || len(m.Headers) != 1 || m.Headers[0] != (bus.MessageHeader{Name: "Unibus-Mark", Value: fmt.Sprint(i)}) {
				t.Errorf("message %+v", m)
			}
		}
		if !slices.Equal(seqs, want) {
			t.Errorf("%s: %v, want %v", query, seqs, want)
		}
		if last := p.Last; strings.Contains(query, "newest") && last != 7 || !strings.Contains(query, "newest") && last != 0 {
			t.Errorf("%s: last is %d", query, last)
		}
	}
	for _, p := range []*person{r.mallory, r.bob} {
		r.as(p).want(t, http.StatusNotFound, "GET", "/v1/rooms/other/messages", nil)
	}
	r.root.changes(t, "DELETE", "/v1/rooms/other/members/admin", nil)
	r.root.want(t, http.StatusNotFound, "GET", "/v1/rooms/other/messages", nil)
}

// What a room keeps is shown and changes at once; too much of it is refused.
func (r *rooms) retention(t *testing.T) {
	var shown struct{ Room bus.RoomDetail }
	show := func() *bus.Retention {
		r.root.want(t, http.StatusOK, "GET", "/v1/rooms/other", nil).decode(t, &shown)
		return shown.Room.Retention
	}
	if k := show(); k == nil || *k != (bus.Retention{MaxBytes: bus.DefaultRoomBytes}) {
		t.Errorf("kept by default: %+v", k)
	}
	r.root.changes(t, "PATCH", "/v1/rooms/other", dict{"retention": bus.Retention{MaxMessages: 3, MaxAgeSeconds: 3600, MaxBytes: 2 << 20}})
	if k := show(); k == nil || *k != (bus.Retention{MaxMessages: 3, MaxAgeSeconds: 3600, MaxBytes: 2 << 20}) {
		t.Errorf("kept then: %+v", k)
	}
	if kept := r.stored(t, "other"); len(kept) != 3 || kept[0].Seq != 5 {
		t.Errorf("%d messages are left, from %d", len(kept), kept[0].Seq)
	}
	for what, keep := range map[string]bus.Retention{"a moment": {MaxAgeSeconds: 1}, "a byte": {MaxBytes: 1}, "less than nothing": {MaxMessages: -1}} {
		if resp := r.root.do(t, "PATCH", "/v1/rooms/other", dict{"retention": keep}); resp.status != http.StatusBadRequest && resp.status != http.StatusUnprocessableEntity {
			t.Errorf("%s: %d", what, resp.status)
		}
	}
	r.root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "plain"})
	r.root.want(t, http.StatusBadRequest, "PATCH", "/v1/rooms/plain", dict{"retention": bus.Retention{MaxMessages: 3}})
	r.root.want(t, http.StatusConflict, "GET", "/v1/rooms/plain/messages", nil)
}

// Programs hear a durable room from where they want, ask and answer in it, and
// are told what they may not do.
func (r *rooms) programs(t *testing.T) {
	r.root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "sdk", "durable": true})
	r.root.changes(t, "PUT", "/v1/rooms/sdk/members/alice", dict{"role": "writer"})
	r.root.changes(t, "PUT", "/v1/rooms/sdk/members/mallory", dict{"role": "writer"})
	r.root.changes(t, "PUT", "/v1/rooms/sdk/members/bob", dict{"role": "reader"})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	alice, bob := r.enter(t, r.alice, "sdk"), r.enter(t, r.bob, "sdk")
	var at time.Time
	for i := range 6 {
		seq, err := alice.Publish(ctx, fmt.Sprintf("n.%d", i%2), []byte(fmt.Sprint(i)))
		if err != nil || seq != uint64(i+1) {
			t.Fatalf("message %d: stored as %d, %v", i, seq, err)
		}
	}
	at = r.stored(t, "sdk")[3].Time
	var heard []func()
	for what, c := range map[string]struct {
		hear sdk.Hear
		want []uint64
	}{
		"from the start":  {sdk.Hear{From: sdk.FromStart()}, []uint64{1, 2, 3, 4, 5, 6, 7}},
		"from a sequence": {sdk.Hear{From: sdk.FromSequence(5)}, []uint64{5, 6, 7}},
		"from a time":     {sdk.Hear{From: sdk.FromTime(at)}, []uint64{4, 5, 6, 7}},
		"from now":        {sdk.Hear{}, []uint64{7}},
		"one topic":       {sdk.Hear{From: sdk.FromStart(), Topic: "n.1"}, []uint64{2, 4, 6}},
		"from what comes": {sdk.Hear{From: sdk.FromSequence(7)}, []uint64{7}},
	} {
		var mu sync.Mutex
		var got []uint64
		hearing, err := bob.Subscribe(ctx, c.hear, func(m sdk.Message) {
			mu.Lock()
			defer mu.Unlock()
			if m.Seq < 7 && string(m.Data) != fmt.Sprint(m.Seq-1) || m.Sender != r.alice.key || m.Room != "sdk" || m.Time.IsZero() {
				t.Errorf("heard %+v", m)
			}
			got = append(got, m.Seq)
		})
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		heard = append(heard, func() {
			cluster.WaitFor(t, 20*time.Second, what, func() error {
				mu.Lock()
				defer mu.Unlock()
				if !slices.Equal(got, c.want) {
					return fmt.Errorf("%v, want %v; %+v", got, c.want, hearing.Stats())
				}
				return nil
			})
			hearing.Unsubscribe()
		})
	}
	if _, err := alice.Publish(ctx, "n.0", []byte("6")); err != nil {
		t.Fatal(err)
	}
	for _, check := range heard {
		check()
	}

	mallory := r.enter(t, r.mallory, "sdk")
	answering, err := mallory.Subscribe(ctx, sdk.Hear{Topic: "ask"}, func(m sdk.Message) {
		if !m.Asked() {
			t.Errorf("%+v asks for nothing", m)
		}
		go func() {
			if err := mallory.Reply(ctx, m, append([]byte("answer to "), m.Data...)); err != nil {
				t.Errorf("reply: %v", err)
			}
		}()
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		answer, err := alice.Request(ctx, "ask", []byte(fmt.Sprint(i)))
		if err != nil || answer.Sender != r.mallory.key || string(answer.Data) != fmt.Sprintf("answer to %d", i) {
			t.Errorf("request %d: %+v %v", i, answer, err)
		}
	}
	answering.Unsubscribe()

	if _, err := bob.Publish(ctx, "n.0", nil); bus.CodeOf(err) != bus.Forbidden {
		t.Errorf("a reader publishes: %v", err)
	}
	if _, err := r.dial(t, r.bob, nil).Room(ctx, "other"); bus.CodeOf(err) != bus.NotFound {
		t.Errorf("a foreign room: %v", err)
	}
	history, err := bob.History(ctx, sdk.MessageQuery{Newest: true, Limit: 2})
	if members, err2 := bob.Members(ctx); err != nil || err2 != nil || len(history) != 2 || len(members) != 4 {
		t.Errorf("history %v %v, members %v %v", history, err, members, err2)
	}
	r.root.changes(t, "PATCH", "/v1/rooms/sdk", dict{"retention": bus.Retention{MaxMessages: 2}})
	lost, first := make(chan [2]uint64, 1), make(chan uint64, 100)
	hearing, err := bob.Subscribe(ctx, sdk.Hear{From: sdk.FromSequence(3), Topic: ">", OnLost: func(first, last uint64) { lost <- [2]uint64{first, last} }}, func(m sdk.Message) { first <- m.Seq })
	if err != nil {
		t.Fatal(err)
	}
	defer hearing.Unsubscribe()
	select {
	case got := <-lost:
		if next := <-first; got[0] != 3 || next != got[1]+1 {
			t.Errorf("lost %v, and heard from %d on", got, next)
		}
	case <-ctx.Done():
		t.Errorf("nothing is said to be lost: %+v", hearing.Stats())
	}
}

// People say and hear things by unibusctl, and check the bus as a client.
func (r *rooms) commands(t *testing.T) {
	r.root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "cli", "durable": true})
	r.root.changes(t, "PUT", "/v1/rooms/cli/members/alice", dict{"role": "writer"})
	seed := r.alice.seedFile(t)
	run := func(code int, stdin, line string) cluster.Result {
		t.Helper()
		res := r.CLIEnvironment(map[string]string{"UNIBUS_IDENTITY": seed}, strings.NewReader(stdin), strings.Fields(line)...)
		if res.Code != code {
			t.Fatalf("%s: exit %d, want %d\n%s%s", line, res.Code, code, res.Stdout, res.Stderr)
		}
		return res
	}
	if res := run(0, "", "room pub cli hello --topic greet"); res.Stdout != "1\n" {
		t.Errorf("stored as %q", res.Stdout)
	}
	if res := run(0, "a\nb b\nc\n", "room pub cli"); res.Stdout != "2\n3\n4\n" {
		t.Errorf("stored as %q", res.Stdout)
	}
	run(0, `{"topic":"j.x","text":"from json","headers":[{"name":"Unibus-Mark","value":"1"}]}`+"\n"+`{"data":"/w=="}`+"\n", "room pub cli --lines json --json")
	if res := run(1, "{\n", "room pub cli --lines json"); !strings.Contains(res.Stderr, "no message") {
		t.Errorf("not JSON: %s", res.Stderr)
	}
	for line, want := range map[string][]string{
		"room history cli --limit 2":                      {"alice j.x: from json", "alice text: \uFFFD"},
		"room history cli --from start --topic text":      {"alice text: a", "alice text: b b", "alice text: c", "alice text: \uFFFD"},
		"room sub cli --from 2 --count 2":                 {"alice text: a", "alice text: b b"},
		"room sub cli --from 10m --follow --count 1":      {"alice greet: hello"},
		"room history cli --from start --limit 1 --json":  {`"seq":1,`},
		"room sub cli --from 5 --follow --count 1 --json": {`"headers":[{"name":"Unibus-Mark","value":"1"}`},
		"room history cli --from 2090-01-01 --limit 0":    {},
	} {
		got := strings.Split(strings.TrimSuffix(run(0, "", line).Stdout, "\n"), "\n")
		if len(want) == 0 && got[0] == "" {
			continue
		}
		if len(got) != len(want) {
			t.Errorf("%s: %q", line, got)
			continue
		}
		for i := range want {
			if !strings.Contains(got[i], want[i]) {
				t.Errorf("%s: line %d is %q, want %q in it", line, i, got[i], want[i])
			}
		}
	}
	run(2, "", "room sub cli --direct")
	run(1, "", "room sub cli --from yesterday")
	if res := run(1, "", "room history sdk-no"); !strings.Contains(res.Stderr, "no room sdk-no") {
		t.Errorf("a foreign room: %s", res.Stderr)
	}
	var report struct {
		Status       string
		Room         bus.RoomID
		Sent, Stored uint64
		CleanedUp    bool `json:"cleaned_up"`
		Nodes        []struct {
			Reached                               bool
			Received, Lost, Duplicated, Reordered uint64
		}
	}
	res := run(0, "", "check --duration 2s --rate 25 --json")
	if err := json.Unmarshal([]byte(res.Stdout), &report); err != nil {
		t.Fatalf("%v: %s", err, res.Stdout)
	}
	if report.Status != "ok" || report.Sent < 10 || report.Stored != report.Sent || len(report.Nodes) != 3 || !report.CleanedUp {
		t.Errorf("check: %s", res.Stdout)
	}
	for _, n := range report.Nodes {
		if !n.Reached || n.Received != report.Sent || n.Lost+n.Duplicated+n.Reordered != 0 {
			t.Errorf("check: %+v", n)
		}
	}
	var shown struct{ Room bus.RoomDetail }
	r.api(1, r.alice).want(t, http.StatusOK, "GET", "/v1/rooms/"+string(report.Room), nil).decode(t, &shown)
	if shown.Room.Status != bus.RoomArchived || !shown.Room.Purged {
		t.Errorf("the room of the check is left: %+v", shown.Room)
	}
}

// Who is removed is recorded no more, from the moment the removal returned: not
// what waits before a recorder either.
func (r *rooms) removed(t *testing.T) {
	p := r.addUser("leaver")
	r.root.changes(t, "PUT", "/v1/rooms/log/members/leaver", dict{"role": "writer"})
	for _, i := range r.Nodes() {
		r.SetEnv(i, cluster.Membership, "UNIBUS_DELAY_RECORD", "300ms")
		r.Term(i, cluster.Membership)
		r.StartNode(i, cluster.Membership)
	}
	r.WaitHealthy(30*time.Second, r.Nodes()...)
	alice, leaver := r.plain(t, 1, r.alice), r.plain(t, 1, p)
	cluster.WaitFor(t, 20*time.Second, "the slow recorders to hear the room", func() error {
		started := time.Now()
		if said, err := recordAs(alice, "log", r.alice, "x", "", "x", nil); err != nil || said.Seq == 0 || time.Since(started) < 300*time.Millisecond {
			return fmt.Errorf("%+v after %s: %w", said, time.Since(started), err)
		}
		return nil
	})
	const sent = 30 // three recorders work at them for 3 s
	for range sent {
		r.must2(t, leaver.Publish(bus.RoomSubject("log", p.key, "flood"), []byte("x")))
	}
	r.must2(t, leaver.Flush())
	seen := func() (n int) {
		for _, m := range r.stored(t, "log") {
			if m.Sender == p.key {
				n++
			}
		}
		return n
	}
	cluster.WaitFor(t, 10*time.Second, "one of them to be recorded", func() error {
		if seen() == 0 {
			return fmt.Errorf("nothing yet")
		}
		return nil
	})
	r.root.changes(t, "DELETE", "/v1/rooms/log/members/leaver", nil)
	hold(t.Context(), 200*time.Millisecond) // any replica answers: one may be behind
	before := seen()
	if before == sent {
		t.Fatalf("all %d messages were recorded before the removal: nothing is shown", sent)
	}
	cluster.Hold(t, 4*time.Second, "nothing more of who was removed", func() error {
		if after := seen(); after != before {
			return fmt.Errorf("%d messages were stored when the removal returned, and then %d", before, after)
		}
		return nil
	})
}

// A node that is stopped for an update has what came before it stored, and says
// so: senders that repeat nothing miss no answer in a rolling restart. The
// recorders are still the slow ones of removed.
func (r *rooms) drained(t *testing.T) {
	const sent = 12 // three recorders work at them for more than a second
	alice := r.plain(t, 1, r.alice)
	inbox := alice.NewInbox()
	answers, err := alice.SubscribeSync(inbox + ".*")
	r.must2(t, err)
	for _, i := range r.Nodes() {
		for n := range sent {
			r.must2(t, alice.PublishRequest(bus.RoomSubject("log", r.alice.key, "drain"), fmt.Sprintf("%s.%d", inbox, n), []byte("x")))
		}
		r.must2(t, alice.Flush())
		cluster.WaitFor(t, 10*time.Second, "one of them to be answered", func() error {
			if n, _, err := answers.Pending(); err != nil || n == 0 {
				return fmt.Errorf("%d are: %w", n, err)
			}
			return nil
		})
		r.Term(i, cluster.Membership)
		for range sent {
			m, err := answers.NextMsg(10 * time.Second)
			if err != nil {
				t.Fatalf("n%d was stopped, and a message is not answered for: %v", i, err)
			}
			var said bus.Recorded
			if err := json.Unmarshal(m.Data, &said); err != nil || said.Seq == 0 {
				t.Errorf("n%d was stopped: %s", i, m.Data)
			}
		}
		r.StartNode(i, cluster.Membership)
		r.WaitHealthy(30*time.Second, r.Nodes()...)
	}
}

// An archived room takes nothing, and keeps what it has for who was in it, or
// not, as was chosen.
func (r *rooms) archived(t *testing.T) {
	for _, id := range []bus.RoomID{"kept", "gone"} {
		r.root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": id, "durable": true})
		r.root.changes(t, "PUT", "/v1/rooms/"+string(id)+"/members/alice", dict{"role": "writer"})
		r.stores(t, r.plain(t, 1, r.alice), id, r.alice, "x", "x", nil)
	}
	r.root.changes(t, "DELETE", "/v1/rooms/kept", nil)
	r.root.changes(t, "DELETE", "/v1/rooms/gone?messages=purge", nil)
	if n := len(r.stored(t, "kept")); n != 1 {
		t.Errorf("%d messages are kept", n)
	}
	if n := len(r.stored(t, "gone")); n != 0 {
		t.Errorf("%d messages are left", n)
	}
	r.root.changes(t, "DELETE", "/v1/rooms/kept?messages=purge", nil) // afterwards, too
	if n := len(r.stored(t, "kept")); n != 0 {
		t.Errorf("%d messages are left afterwards", n)
	}
}
