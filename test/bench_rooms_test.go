package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// roomScale says how much a run of the benchmark of rooms measures: so many
// messages one after the other, and of a crowd together.
type roomScale struct{ rounds, clients, alone, crowd int }

const (
	heardWithin = time.Minute
	// asyncWindow is how many bare publishes are under way of one publisher: as
	// many as the SDK allows one room.
	asyncWindow = 256
)

// TestBenchRoomsStillRuns keeps the benchmark from rotting, at numbers that
// measure nothing.
func TestBenchRoomsStillRuns(t *testing.T) {
	t.Parallel()
	runBenchRooms(t, io.Discard, roomScale{rounds: 1, clients: 3, alone: 2, crowd: 6})
}

// BenchmarkRooms measures, on one live cluster and whatever b.N is, what a
// message costs in each kind of room, beside bare NATS and beside a bare
// JetStream publish to the same stream, and prints a table for
// docs/performance.md.
func BenchmarkRooms(b *testing.B) {
	runBenchRooms(b, os.Stdout, roomScale{rounds: 5, clients: 32, alone: 300, crowd: 9600})
}

// roomBench is one run. All ways are asked in turn, in each round.
type roomBench struct {
	roomScale
	table
	t testing.TB
	w *world

	ear      *member // hears on node 2
	bareEar  *nats.Conn
	mouths   []*member // speak, number c on node c%3+1
	bare     []*nats.Conn
	services []*nats.Conn          // membership's own, which may write to streams
	streams  []jetstream.JetStream // by them
	kept     bus.RoomID            // durable
	vault    bus.RoomID            // durable and encrypted; the same node leads its stream
}

// member is somebody in all rooms.
type member struct {
	*person
	keys  *sdk.Keys
	conn  *sdk.Conn
	rooms map[bus.RoomID]*sdk.Room
}

func runBenchRooms(t testing.TB, out io.Writer, s roomScale) {
	// What a room may record a second is a limit for people, not one of the machine.
	w := newWorld(t, cluster.Options{Env: map[cluster.Service]map[string]string{cluster.Membership: {"UNIBUS_RATE_ROOM": "1000000:1000000"}}})
	b := &roomBench{roomScale: s, table: table{out}, t: t, w: w}
	b.open()
	fmt.Fprintf(b, "\n%s, %d CPUs (%s), %s. %d rounds; %d messages of 256 bytes one after the other, %d of %d clients.\n\n",
		time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), cpuModel(), runtime.Version(), s.rounds, s.alone, s.crowd, s.clients)
	b.row("measure", "aim", "result")
	b.row("---", "---", "---")
	b.received()
	b.stored()
}

// open connects everybody and makes the rooms.
func (b *roomBench) open() {
	b.ear = b.member("ear", 2)
	for c := range b.clients {
		b.mouths = append(b.mouths, b.member("mouth-"+strconv.Itoa(c), c%3+1))
		nc, err := kv.Connect(kv.Link{
			URL: b.w.NATSURL(c%3 + 1), SeedFile: b.w.Seed("membership-bus"), CAFile: b.w.CA(), Name: "bench", Inbox: "_INBOX_membership", Timeout: 5 * time.Second,
		})
		if err != nil {
			b.t.Fatal(err)
		}
		b.t.Cleanup(nc.Close)
		js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(asyncWindow), jetstream.WithPublishAsyncTimeout(heardWithin))
		if err != nil {
			b.t.Fatal(err)
		}
		b.services, b.streams = append(b.services, nc), append(b.streams, js)
	}
	keep := bus.Retention{MaxBytes: 128 << 20}
	b.room("plain", kv.RoomOptions{})
	b.room("secret", kv.RoomOptions{Encrypted: true})
	b.kept = "kept"
	b.room(b.kept, kv.RoomOptions{Durable: true, Retention: keep})
	for n := 1; b.vault == ""; n++ { // not for ever: each takes space
		id := bus.RoomID("vault-" + strconv.Itoa(n))
		b.w.addRoom(id, b.ear.person, kv.RoomOptions{Durable: true, Encrypted: true, Retention: keep})
		if n < 8 && b.leader(id) != b.leader(b.kept) { // a way to another node would be part of what is compared
			continue
		}
		b.vault = id
		b.fill(id, true)
	}
	b.bareEar = b.dialBare(2, b.ear) // their rights are those of when they connect
	for c, m := range b.mouths {
		b.bare = append(b.bare, b.dialBare(c%3+1, m))
	}
}

func (b *roomBench) member(name string, node int) *member {
	m := &member{person: b.w.addUser(name), rooms: map[bus.RoomID]*sdk.Room{}}
	api := b.w.client(b.t, m.person)
	var err error
	m.keys, err = sdk.NewKeys(sdk.KeysConfig{API: api, Identity: m.identity(b.t), Trust: sdk.MemoryTrust()})
	if err == nil {
		_, err = m.keys.Announce(b.t.Context())
	}
	if err != nil {
		b.t.Fatal(err)
	}
	m.conn = b.w.dial(b.t, m.person, func(cfg *sdk.DialConfig) { cfg.URLs, cfg.API, cfg.Keys = []string{b.w.NATSURL(node)}, api, m.keys })
	return m
}

func (b *roomBench) dialBare(node int, m *member) *nats.Conn {
	nc, err := b.w.Dial(node, m.options(b.w.CA())...)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(nc.Close)
	return nc
}

func (b *roomBench) room(id bus.RoomID, o kv.RoomOptions) {
	b.w.addRoom(id, b.ear.person, o)
	b.fill(id, o.Encrypted)
}

// fill lets everybody in.
func (b *roomBench) fill(id bus.RoomID, encrypted bool) {
	var admit []sdk.Admission
	for _, m := range b.mouths {
		b.w.join(id, m.person, bus.Writer)
		admit = append(admit, sdk.Admission{User: m.key, Role: bus.Writer})
	}
	if encrypted {
		if done, err := b.ear.keys.Rekey(b.t.Context(), id, sdk.RekeyOptions{Admit: admit}); err != nil || done.Members != len(admit)+1 {
			b.t.Fatalf("key of room %s: %+v %v", id, done, err)
		}
	}
	for _, m := range append(b.mouths, b.ear) {
		cluster.WaitFor(b.t, 20*time.Second, m.name+" to enter "+string(id), func() (err error) {
			m.rooms[id], err = m.conn.Room(b.t.Context(), id)
			return err
		})
	}
}

// leader is the node that leads a room's stream.
func (b *roomBench) leader(id bus.RoomID) (name string) {
	cluster.WaitFor(b.t, 20*time.Second, "a leader of "+string(id), func() error {
		s, err := b.streams[0].Stream(b.t.Context(), bus.RoomStream(id))
		if err == nil && s.CachedInfo().Cluster != nil {
			name = s.CachedInfo().Cluster.Leader
		}
		if err == nil && name == "" {
			err = errors.New("none")
		}
		return err
	})
	return name
}

// passage is one way in which a message gets from a publisher to a listener.
type passage struct {
	name string
	base int // the way it is compared with
	send func(client int, topic string, data []byte) error
	sent func(client int) error                // when all of a client are stored, or on their way
	hear func(func(data []byte)) (stop func()) // all that is sent from now on

	alone, crowd []load
	spent        []cpuOf // of each crowd
}

// cpuOf is CPU time per message, in us.
type cpuOf struct{ servers, recorders, clients float64 }

func (b *roomBench) cpu() cpuOf {
	return cpuOf{b.w.cpu(cluster.NATS), b.w.cpu(cluster.Membership), b.w.ownCPU()}
}

func (c cpuOf) since(before cpuOf, messages int) cpuOf {
	per := func(now, then float64) float64 { return (now - then) * 1000 / float64(messages) }
	return cpuOf{per(c.servers, before.servers), per(c.recorders, before.recorders), per(c.clients, before.clients)}
}

func (b *roomBench) ways() []*passage {
	done := func(int) error { return nil }
	bareHear := func(subject string) func(func([]byte)) func() {
		return func(hand func([]byte)) func() {
			sub, err := b.bareEar.Subscribe(subject, func(m *nats.Msg) {
				if m.Subject != bus.FeedTip(b.kept) { // the recorder's, and no message
					hand(m.Data)
				}
			})
			if err == nil {
				err = b.bareEar.Flush()
			}
			if err != nil {
				b.t.Fatal(err)
			}
			return func() { _ = sub.Unsubscribe() }
		}
	}
	core := &passage{name: "bare NATS", base: 0, sent: done, hear: bareHear(bus.RoomSubscribe("plain"))}
	core.send = func(c int, topic string, data []byte) error {
		return b.bare[c].Publish(bus.RoomSubject("plain", b.mouths[c].key, topic), data)
	}
	stream := &passage{name: "bare JetStream", base: 3, hear: bareHear(bus.FeedSubscribe(b.kept))}
	stream.send = func(c int, topic string, data []byte) error {
		_, err := b.streams[c].PublishAsync(bus.StoreSubject(b.kept, b.mouths[c].key, topic), data, jetstream.WithStallWait(heardWithin))
		return err
	}
	stream.sent = func(c int) error {
		select {
		case <-b.streams[c].PublishAsyncComplete():
			return nil
		case <-time.After(heardWithin):
			return errors.New("not stored")
		}
	}
	return []*passage{
		core, b.roomWay("plain room", 0, "plain"), b.roomWay("encrypted room", 0, "secret"),
		stream, b.roomWay("durable room", 3, b.kept), b.roomWay("encrypted durable room", 3, b.vault),
	}
}

func (b *roomBench) roomWay(name string, base int, id bus.RoomID) *passage {
	under := make([][]*sdk.Sending, b.clients)
	return &passage{
		name: name, base: base,
		send: func(c int, topic string, data []byte) error {
			under[c] = append(under[c], b.mouths[c].rooms[id].Send(b.t.Context(), sdk.Outgoing{Topic: topic, Data: data}))
			return nil
		},
		sent: func(c int) error {
			for _, s := range under[c] {
				if _, err := s.Wait(b.t.Context()); err != nil {
					return err
				}
			}
			under[c] = under[c][:0]
			return nil
		},
		hear: func(hand func([]byte)) func() {
			h, err := b.ear.rooms[id].Subscribe(b.t.Context(), sdk.Hear{}, func(m sdk.Message) { hand(m.Data) })
			if err == nil {
				err = b.ear.conn.Flush(b.t.Context())
			}
			if err != nil {
				b.t.Fatal(err)
			}
			return h.Unsubscribe
		},
	}
}

// received compares the time from publishing to a listener's handler, and how
// much comes through.
func (b *roomBench) received() {
	ways := b.ways()
	for range b.rounds {
		for _, w := range ways {
			w.alone, w.crowd = append(w.alone, b.oneByOne(w)), append(w.crowd, b.together(w))
		}
	}
	for _, w := range ways {
		b.row("published to heard, "+w.name, "", "%s", beside(w.alone, ways[w.base].alone, w == ways[w.base]))
	}
	for _, w := range ways {
		name := fmt.Sprintf("heard a second, %d publishers, %s", b.clients, w.name)
		ratio := ""
		if w != ways[w.base] {
			ratio = fmt.Sprintf(", %.2fx", medianRatio(w.crowd, ways[w.base].crowd, func(l load) float64 { return l.rate }))
		}
		b.row(name, "", "%.0f%s", rateOf(w.crowd), ratio)
	}
	for _, w := range ways {
		of := func(part func(cpuOf) float64) float64 {
			all := make([]float64, len(w.spent))
			for i, c := range w.spent {
				all[i] = part(c)
			}
			return median(all)
		}
		b.row("  CPU of each: servers / recorders / clients, "+w.name, "", "%.0f / %.0f / %.0f us", of(func(c cpuOf) float64 { return c.servers }),
			of(func(c cpuOf) float64 { return c.recorders }), of(func(c cpuOf) float64 { return c.clients }))
	}
}

// beside shows what loads took, and how many times what others took in the same
// round.
func beside(ours, base []load, same bool) string {
	text := fmt.Sprintf("%.2f / %.2f ms", p50of(ours), p99of(ours))
	if same {
		return text
	}
	return fmt.Sprintf("%s, %.1fx / %.1fx", text,
		medianRatio(ours, base, func(l load) float64 { return l.p50.Seconds() }), medianRatio(ours, base, func(l load) float64 { return l.p99.Seconds() }))
}

func medianRatio(ours, base []load, of func(load) float64) float64 {
	ratios := make([]float64, len(ours))
	for i := range ours {
		ratios[i] = of(ours[i]) / of(base[i])
	}
	return median(ratios)
}

// listen hears a way, and returns when its listener is known on all nodes.
func (b *roomBench) listen(w *passage, hand func(string)) (stop func()) {
	warm := make(chan struct{}, 1)
	stop = w.hear(func(data []byte) {
		text := strings.TrimRight(string(data), " ")
		if text != "warm" {
			hand(text)
			return
		}
		select {
		case warm <- struct{}{}:
		default:
		}
	})
	for c := range min(3, b.clients) { // one on each node
		cluster.WaitFor(b.t, heardWithin, w.name+" to be heard", func() error {
			if err := w.send(c, "there", fmt.Appendf(nil, "%-256s", "warm")); err != nil {
				return err
			}
			select {
			case <-warm:
				return w.sent(c)
			case <-time.After(200 * time.Millisecond):
				return errors.New("nothing heard")
			}
		})
	}
	return stop
}

// oneByOne sends each message when the one before was heard.
func (b *roomBench) oneByOne(w *passage) load {
	b.t.Helper()
	heard := make(chan string, 1)
	stop := b.listen(w, func(text string) {
		select {
		case heard <- text:
		case <-b.t.Context().Done():
		}
	})
	defer stop()
	n := 0
	l := loading(b.t, 1, b.alone, func(_, _ int) error {
		n++
		if err := w.send(0, "there", fmt.Appendf(nil, "%-256d", n)); err != nil {
			return err
		}
		select {
		case got := <-heard:
			if got != strconv.Itoa(n) {
				return fmt.Errorf("%s: heard %s instead of %d", w.name, got, n)
			}
			return nil
		case <-time.After(heardWithin):
			return fmt.Errorf("%s: %d is not heard", w.name, n)
		}
	})
	if err := w.sent(0); err != nil {
		b.t.Fatal(err)
	}
	return l
}

// together lets everybody send as fast as they are let, until all is heard.
func (b *roomBench) together(w *passage) load {
	b.t.Helper()
	each := b.crowd / b.clients
	var heard atomic.Int64
	all := make(chan struct{})
	stop := b.listen(w, func(string) {
		if heard.Add(1) == int64(each*b.clients) {
			close(all)
		}
	})
	defer stop()
	began, before := time.Now(), b.cpu()
	errs := make([]error, b.clients)
	var publishers sync.WaitGroup
	for c := range b.clients {
		publishers.Go(func() {
			for n := 0; n < each && errs[c] == nil; n++ {
				errs[c] = w.send(c, "there", fmt.Appendf(nil, "%-256d", n))
			}
		})
	}
	publishers.Wait()
	if err := errors.Join(errs...); err != nil {
		b.t.Fatalf("%s: %v", w.name, err)
	}
	select {
	case <-all:
	case <-time.After(heardWithin):
		b.t.Fatalf("%s: %d of %d heard", w.name, heard.Load(), each*b.clients)
	}
	took := time.Since(began)
	w.spent = append(w.spent, b.cpu().since(before, each*b.clients))
	for c := range b.clients {
		if err := w.sent(c); err != nil {
			b.t.Fatalf("%s: %v", w.name, err)
		}
	}
	return load{rate: float64(each*b.clients) / took.Seconds()}
}

// stored compares the time to a quorum's answer through the recorder with that
// of a bare publish to the same stream.
func (b *roomBench) stored() {
	payload := make([]byte, 256)
	bare := func(_, c int) error {
		m, err := b.services[c].Request(bus.StoreSubject(b.kept, b.mouths[c].key, "c"), payload, 10*time.Second)
		if err != nil {
			return err
		}
		var ack struct{ Seq uint64 }
		if err := json.Unmarshal(m.Data, &ack); err != nil || ack.Seq == 0 {
			return fmt.Errorf("answered %s: %w", m.Data, err)
		}
		return nil
	}
	in := func(id bus.RoomID) func(int, int) error {
		return func(_, c int) error {
			_, err := b.mouths[c].rooms[id].Publish(b.t.Context(), "c", payload)
			return err
		}
	}
	ways := []struct {
		name         string
		ask          func(int, int) error
		alone, crowd []load
	}{{name: "bare publish to the stream", ask: bare}, {name: "durable room", ask: in(b.kept)}, {name: "encrypted durable room", ask: in(b.vault)}}
	for range b.rounds {
		for i := range ways {
			w := &ways[i]
			w.alone = append(w.alone, loading(b.t, 1, b.alone, w.ask))
			w.crowd = append(w.crowd, loading(b.t, b.clients, max(b.clients, b.crowd/4), w.ask)) // each waits for a disk
		}
	}
	for i, w := range ways {
		aim := ""
		if i == 1 {
			aim = "p50 <= 2x"
		}
		b.row("stored, one after the other, "+w.name, aim, "%s", beside(w.alone, ways[0].alone, i == 0))
	}
	for i, w := range ways {
		aim, ratio := "", ""
		if i == 1 {
			aim = ">= 0.4x"
		}
		if i > 0 {
			ratio = fmt.Sprintf(", %.2fx", medianRatio(w.crowd, ways[0].crowd, func(l load) float64 { return l.rate }))
		}
		b.row(fmt.Sprintf("stored a second, %d at a time, %s", b.clients, w.name), aim, "%.0f%s", rateOf(w.crowd), ratio)
	}
}
