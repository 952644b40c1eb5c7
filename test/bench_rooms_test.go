package test

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// roomScale says how much a run of the benchmark of rooms measures: so many
// messages one after the other, and of a crowd together.
type roomScale struct{ rounds, clients, alone, crowd int }

// TestBenchRoomsStillRuns keeps the benchmark from rotting, at numbers that
// measure nothing.
func TestBenchRoomsStillRuns(t *testing.T) {
	t.Parallel()
	runBenchRooms(t, io.Discard, roomScale{rounds: 1, clients: 3, alone: 2, crowd: 6})
}

// BenchmarkRooms measures, on one live cluster and whatever b.N is, what a
// message costs in a plain and in a durable room, beside bare NATS and beside a
// bare JetStream publish to the same stream, and prints a table for
// docs/performance.md.
func BenchmarkRooms(b *testing.B) {
	runBenchRooms(b, os.Stdout, roomScale{rounds: 5, clients: 32, alone: 500, crowd: 6400})
}

// roomBench is one run. All ways are asked in turn, in each round.
type roomBench struct {
	roomScale
	table
	t testing.TB
	w *world

	service *nats.Conn // membership's own, which may write to streams
	key     *person
	kept    []*sdk.Room // one connection for each client of a crowd
	plain   *sdk.Room
	arrived map[string]chan string
}

func runBenchRooms(t testing.TB, out io.Writer, s roomScale) {
	w := newWorld(t, cluster.Options{})
	b := &roomBench{roomScale: s, table: table{out}, t: t, w: w, arrived: map[string]chan string{}}
	b.key = w.addUser("speaker")
	w.addRoom("kept", b.key, kv.RoomOptions{Durable: true, Retention: bus.Retention{MaxBytes: 1 << 30}})
	w.addRoom("plain", b.key, kv.RoomOptions{})
	var err error
	b.service, err = kv.Connect(kv.Link{
		URL: w.NATSURL(1), SeedFile: w.Seed("membership-bus"), CAFile: w.CA(), Name: "bench", Inbox: "_INBOX_membership", Timeout: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.service.Close)
	b.plain = b.enter("plain")
	for range s.clients {
		b.kept = append(b.kept, b.enter("kept"))
	}
	fmt.Fprintf(b, "\n%s, %d CPUs (%s), %s. %d rounds; %d messages of 256 bytes one after the other, %d of %d clients.\n\n",
		time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), cpuModel(), runtime.Version(), s.rounds, s.alone, s.crowd, s.clients)
	b.row("measure", "aim", "result")
	b.row("---", "---", "---")
	b.stored()
	b.received()
}

func (b *roomBench) enter(id bus.RoomID) *sdk.Room {
	room, err := b.w.dial(b.t, b.key, nil).Room(b.t.Context(), id)
	if err != nil {
		b.t.Fatal(err)
	}
	return room
}

// stored compares the time to a quorum's answer through the recorder with that
// of a bare publish to the same stream.
func (b *roomBench) stored() {
	payload := make([]byte, 256)
	bare := func(_, client int) error {
		m, err := b.service.Request(bus.StoreSubject("kept", b.key.key, "c"+strconv.Itoa(client)), payload, 10*time.Second)
		if err != nil {
			return err
		}
		var ack struct{ Seq uint64 }
		if err := json.Unmarshal(m.Data, &ack); err != nil || ack.Seq == 0 {
			return fmt.Errorf("answered %s: %w", m.Data, err)
		}
		return nil
	}
	recorded := func(_, client int) error {
		_, err := b.kept[client].Publish(b.t.Context(), "c"+strconv.Itoa(client), payload)
		return err
	}
	var bare1, bareAll, recorded1, recordedAll []load
	for range b.rounds {
		bare1 = append(bare1, loading(b.t, 1, b.alone, bare))
		recorded1 = append(recorded1, loading(b.t, 1, b.alone, recorded))
		bareAll = append(bareAll, loading(b.t, b.clients, b.crowd, bare))
		recordedAll = append(recordedAll, loading(b.t, b.clients, b.crowd, recorded))
	}
	p50 := func(l load) float64 { return float64(l.p50.Microseconds()) / 1000 }
	p99 := func(l load) float64 { return float64(l.p99.Microseconds()) / 1000 }
	rate := func(l load) float64 { return l.rate }
	show := func(name string, ls []load) {
		b.row(name, "", "%.0f/s, p50 %.1f, p99 %.1f ms", medianOf(ls, rate), medianOf(ls, p50), medianOf(ls, p99))
	}
	show("bare publish to the stream, one after the other", bare1)
	show("durable room, one after the other", recorded1)
	b.row("... its p50 beside the bare one", "<= 2", "%.2f", medianOf(recorded1, p50)/medianOf(bare1, p50))
	show(fmt.Sprintf("bare publish, %d at a time", b.clients), bareAll)
	show(fmt.Sprintf("durable room, %d at a time", b.clients), recordedAll)
	b.row("... its rate beside the bare one", ">= 0.4", "%.2f", medianOf(recordedAll, rate)/medianOf(bareAll, rate))
}

// received compares the time from publishing to a listener's handler.
func (b *roomBench) received() {
	hear := func(m sdk.Message) {
		select {
		case b.arrived[string(m.Room)] <- string(m.Data):
		case <-b.t.Context().Done():
		}
	}
	payload := make([]byte, 256)
	ways := map[bus.RoomID]*sdk.Room{"plain": b.enter("plain"), "kept": b.enter("kept")}
	ears := map[bus.RoomID]*sdk.Room{"plain": b.enter("plain"), "kept": b.enter("kept")}
	took := map[bus.RoomID][]load{}
	for _, id := range []bus.RoomID{"plain", "kept"} {
		b.arrived[string(id)] = make(chan string, 1)
		hearing, err := ears[id].Subscribe(b.t.Context(), sdk.Hear{Topic: "there"}, hear)
		if err != nil {
			b.t.Fatal(err)
		}
		defer hearing.Unsubscribe()
	}
	cluster.WaitFor(b.t, 10*time.Second, "a plain room to be heard", func() error {
		if _, err := ways["plain"].Publish(b.t.Context(), "there", payload); err != nil {
			return err
		}
		select {
		case <-b.arrived["plain"]:
			return nil
		case <-time.After(100 * time.Millisecond):
			return fmt.Errorf("nothing heard")
		}
	})
	n := 0
	for range b.rounds {
		for id, room := range ways {
			took[id] = append(took[id], loading(b.t, 1, b.alone, func(_, _ int) error {
				n++
				text := fmt.Sprintf("%-256d", n)
				room.Send(b.t.Context(), sdk.Outgoing{Topic: "there", Data: []byte(text)})
				late := time.After(10 * time.Second)
				for {
					select {
					case got := <-b.arrived[string(id)]:
						if got == text { // else it is of a warm-up
							return nil
						}
					case <-late:
						return fmt.Errorf("room %s: not heard", id)
					}
				}
			}))
		}
	}
	p50 := func(l load) float64 { return float64(l.p50.Microseconds()) / 1000 }
	p99 := func(l load) float64 { return float64(l.p99.Microseconds()) / 1000 }
	for _, id := range []bus.RoomID{"plain", "kept"} {
		b.row(fmt.Sprintf("published to heard, room %s", id), "", "p50 %.2f, p99 %.2f ms", medianOf(took[id], p50), medianOf(took[id], p99))
	}
}

func medianOf(ls []load, of func(load) float64) float64 {
	all := make([]float64, len(ls))
	for i, l := range ls {
		all[i] = of(l)
	}
	return median(all)
}
