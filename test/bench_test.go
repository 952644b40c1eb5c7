package test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// scale says how much a benchmark run measures.
type scale struct {
	rounds, users                int // pairs of storms, one connection per user each
	idle                         time.Duration
	strangers, barriers, changes int
	byRooms                      int // connects for each number of rooms, in each round
	many                         int // users in the buckets when memory is measured
}

const (
	benchConcurrency = 32
	roomsPerUser     = 20
	benchRooms       = bus.MaxRoomsPerUser
	settle           = 500 * time.Millisecond
	roomsInCrowd     = 2 // of each user who is only there to take memory
	// The aims of reference/performance.md: measured figures stand beside them.
	aimCalloutCPU = "0.42"
	aimRatio      = "0.60"
)

// TestBenchStillRuns keeps the benchmark from rotting, at numbers that measure
// nothing; what it drives must work: everybody admitted, strangers refused,
// changes acknowledged by every service.
func TestBenchStillRuns(t *testing.T) {
	t.Parallel()
	runBench(t, io.Discard, scale{rounds: 1, users: 12, idle: 100 * time.Millisecond, strangers: 4, barriers: 3, changes: 3, byRooms: 4, many: 40})
}

// BenchmarkUnibus measures a live cluster of three nodes once, whatever b.N is,
// and prints the table of docs/performance.md.
func BenchmarkUnibus(b *testing.B) {
	s := scale{rounds: 5, users: 1000, idle: 10 * time.Second, strangers: 1000, barriers: 200, changes: 200, byRooms: 100, many: 10_000}
	runBench(b, os.Stdout, s)
}

// bench is one run: a unibus cluster and its rival, both up all the time, so
// that each round finds the same machine.
type bench struct {
	*world
	scale
	users []*person
	rival *world // not a unibus: see startRival
	rest  storm  // what the leases cost while nobody connects, in ms a second
	table
}

func runBench(t testing.TB, out io.Writer, s scale) {
	b := &bench{world: newWorld(t, cluster.Options{}), scale: s, table: table{out}}
	rss := b.memory(cluster.Authcallout)
	b.seedRooms()
	b.users = b.seedUsers(0, s.users, roomsPerUser)
	b.rival = startRival(t, b.users)
	b.head()
	b.storms()
	b.refusals()
	b.barriers()
	b.changes()
	b.closings()
	b.fill(rss)
	b.connectsByRooms() // last: its users have more rooms than those whose memory is measured
}

// storm is what one burst of connections cost.
type storm struct {
	rate              float64 // connections a second
	p50, p99          time.Duration
	callouts, servers float64 // CPU ms per connection, summed over the nodes
	clients           float64 // the same for our side of the connections
}

// storms lets the same users connect to both clusters in turn: a machine that
// slows down or has other work slows both.
func (b *bench) storms() {
	b.rest = b.measureIdle()
	var ours, theirs, net []storm
	var ratios, byCPU []float64
	for range b.rounds {
		t := storming(b.rival, b.users, nil)
		o := storming(b.world, b.users, nil)
		n := b.withoutRest(o)
		theirs, ours, net = append(theirs, t), append(ours, o), append(net, n)
		ratios = append(ratios, o.rate/t.rate)
		byCPU = append(byCPU, (t.servers+t.clients)/(n.servers+n.callouts+n.clients))
	}
	floor := signatureFloor()
	rate := func(s storm) float64 { return s.rate }
	callouts := func(s storm) float64 { return s.callouts }
	servers := func(s storm) float64 { return s.servers }
	clients := func(s storm) float64 { return s.clients }
	p50 := func(s storm) float64 { return s.p50.Seconds() * 1000 }
	p99 := func(s storm) float64 { return s.p99.Seconds() * 1000 }
	b.row("connects/s, static nkeys", "", "%s", spread(theirs, rate, "%.0f"))
	b.row("connects/s, callout", "", "%s", spread(ours, rate, "%.0f"))
	b.row("callout / static, same round", ">= "+aimRatio, "%.2f (%.2f to %.2f)", median(ratios), slices.Min(ratios), slices.Max(ratios))
	b.row("the same by CPU: what a full machine would do", "", "%.2f (%.2f to %.2f)", median(byCPU), slices.Min(byCPU), slices.Max(byCPU))
	b.row("connect p50 / p99, static nkeys", "", "%.0f / %.0f ms", medianBy(theirs, p50), medianBy(theirs, p99))
	b.row("connect p50 / p99, callout", "", "%.0f / %.0f ms", medianBy(ours, p50), medianBy(ours, p99))
	b.row("authcallout CPU a connect", "<= "+aimCalloutCPU+" ms", "%s ms", spread(net, callouts, "%.2f"))
	b.row("the same, with idle work", "", "%s ms", spread(ours, callouts, "%.2f"))
	b.row("4 ed25519 operations of it: the floor, and how far above", "<= 2.1x", "%.2f ms, %.1fx", floor, medianBy(net, callouts)/floor)
	b.row("servers' CPU a connect, static nkeys", "", "%s ms", spread(theirs, servers, "%.2f"))
	b.row("servers' CPU a connect, callout", "", "%s ms", spread(net, servers, "%.2f"))
	b.row("clients' CPU a connect, static nkeys / callout", "", "%.2f / %.2f ms", medianBy(theirs, clients), medianBy(ours, clients))
	b.row("idle: authcallout / servers", "", "%.1f / %.1f ms CPU a second", b.rest.callouts, b.rest.servers)
}

// withoutRest takes off what the leases cost anyway while a storm lasted.
func (b *bench) withoutRest(s storm) storm {
	s.callouts -= b.rest.callouts / s.rate
	s.servers -= b.rest.servers / s.rate
	return s
}

// storming connects every user once, at most benchConcurrency at a time, spread
// over the nodes, and holds the connections until the clock has stopped. want
// is what each must meet: nil, or wire.ErrDenied.
func storming(w *world, users []*person, want error) storm {
	w.t.Helper()
	return w.connecting(users, benchConcurrency, want)
}

// connecting is storming, so many at a time.
func (w *world) connecting(users []*person, atATime int, want error) storm {
	w.t.Helper()
	conns, took, errs := make([]*wire.Conn, len(users)), make([]time.Duration, len(users)), make([]error, len(users))
	callouts, servers, clients := w.cpu(cluster.Authcallout), w.cpu(cluster.NATS), w.ownCPU()
	started := time.Now()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range atATime {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(users); i = int(next.Add(1)) - 1 {
				begun := time.Now()
				conns[i], errs[i] = w.connectOnce(i%3+1, users[i])
				took[i] = time.Since(begun)
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(started)
	n := float64(len(users))
	callouts, servers, clients = w.cpu(cluster.Authcallout)-callouts, w.cpu(cluster.NATS)-servers, w.ownCPU()-clients
	for i, err := range errs {
		if conns[i] != nil {
			conns[i].Close()
		}
		if !errors.Is(err, want) {
			w.t.Fatalf("%s on n%d: %v, want %v", users[i].name, i%3+1, err, want)
		}
	}
	hold(w.t.Context(), settle) // or the next storm pays for the end of these connections
	return storm{rate: n / elapsed.Seconds(), p50: quantile(took, .50), p99: quantile(took, .99), callouts: callouts / n, servers: servers / n, clients: clients / n}
}

func (w *world) connectOnce(i int, p *person) (*wire.Conn, error) {
	c, err := wire.Dial(w.NATSURL(i), w.trust, 10*time.Second)
	if err != nil {
		return nil, err
	}
	return c, c.Connect(wire.Proof(p.kp, c.Info.Nonce))
}

// measureIdle is the CPU that leases cost while nobody connects, in ms a second.
func (b *bench) measureIdle() storm {
	callouts, servers, started := b.cpu(cluster.Authcallout), b.cpu(cluster.NATS), time.Now()
	hold(b.t.Context(), b.idle)
	s := time.Since(started).Seconds()
	return storm{callouts: (b.cpu(cluster.Authcallout) - callouts) / s, servers: (b.cpu(cluster.NATS) - servers) / s}
}

// connectsByRooms measures what each further room of a user costs when they
// connect, one after the other so that nobody waits in a queue.
func (b *bench) connectsByRooms() {
	type group struct {
		rooms  int
		users  []*person
		storms []storm
		// Of each round: the callout's own time, in ms, and the size of its sealed
		// answer, in KiB.
		took, answer []float64
	}
	groups, first := []*group{{rooms: 1}, {rooms: roomsPerUser}, {rooms: 100}, {rooms: benchRooms}}, 0
	for _, g := range groups {
		few := b.seedUsers(b.many+first, min(b.byRooms, 10), g.rooms)
		first += len(few)
		for i := range b.byRooms { // below the number of connections that one user may have
			g.users = append(g.users, few[i%len(few)])
		}
	}
	calls := func() (n, seconds float64) {
		return b.metric("unibus_auth_duration_seconds_count"), b.metric("unibus_auth_duration_seconds_sum")
	}
	for range b.rounds {
		for _, g := range groups {
			n, seconds := calls()
			answers, size := b.answered()
			g.storms = append(g.storms, b.withoutRest(b.connecting(g.users, 1, nil)))
			n2, seconds2 := calls()
			answers2, size2 := b.answered()
			g.took = append(g.took, (seconds2-seconds)/(n2-n)*1000)
			g.answer = append(g.answer, (size2-size)/(answers2-answers)/1024)
		}
	}
	p50 := func(s storm) float64 { return s.p50.Seconds() * 1000 }
	p99 := func(s storm) float64 { return s.p99.Seconds() * 1000 }
	ratio := func(g *group, of func(storm) float64) float64 {
		ratios := make([]float64, len(g.storms))
		for i := range ratios {
			ratios[i] = of(g.storms[i]) / of(groups[0].storms[i])
		}
		return median(ratios)
	}
	for _, g := range groups {
		b.row(fmt.Sprintf("rooms of a user: %d. Connect p50 / p99, beside 1 room", g.rooms), "", "%.1f / %.1f ms, %.1fx / %.1fx", medianBy(g.storms, p50), medianBy(g.storms, p99), ratio(g, p50), ratio(g, p99))
	}
	for _, g := range groups {
		b.row(fmt.Sprintf("  %d: time of the callout; its answer, with the JWT", g.rooms), "", "%.2f ms; %.1f KiB", median(g.took), median(g.answer))
	}
	for _, g := range groups {
		b.row(fmt.Sprintf("  %d: CPU of callouts / servers", g.rooms), "", "%.2f / %.2f ms",
			medianBy(g.storms, func(s storm) float64 { return s.callouts }), medianBy(g.storms, func(s storm) float64 { return s.servers }))
	}
}

// answered is how many answers the callouts have given so far, and of how many
// bytes: all that they say in their own account.
func (b *bench) answered() (n, size float64) {
	b.t.Helper()
	for _, i := range b.Nodes() {
		var all struct {
			Connections []struct {
				Messages float64 `json:"in_msgs"`
				Bytes    float64 `json:"in_bytes"`
			} `json:"connections"`
		}
		body, err := b.Monitor(b.t.Context(), i, "/connz?acc=AUTH")
		if err == nil {
			err = json.Unmarshal(body, &all)
		}
		if err != nil {
			b.t.Fatal(err)
		}
		for _, c := range all.Connections {
			n, size = n+c.Messages, size+c.Bytes
		}
	}
	return n, size
}

// refusals measures what strangers with a proper signature can make us spend.
func (b *bench) refusals() {
	strangers := make([]*person, b.strangers)
	for i := range strangers {
		strangers[i] = newPerson(b.t, "stranger")
	}
	s := b.withoutRest(storming(b.world, strangers, wire.ErrDenied))
	b.row("strangers refused/s", "", "%.0f", s.rate)
	b.row("refusal p50 / p99", "", "%s / %s", ms(s.p50), ms(s.p99))
	b.row("CPU a refusal: authcallout / servers", "<= 0.25 ms /", "%.2f / %.2f ms", s.callouts, s.servers)
}

// barriers are taken one at a time, further apart than the View spaces them.
func (b *bench) barriers() {
	took := make([]time.Duration, b.scale.barriers)
	for i := range took {
		hold(b.t.Context(), 30*time.Millisecond)
		started := time.Now()
		if err := b.view.Barrier(b.t.Context()); err != nil {
			b.t.Fatal(err)
		}
		took[i] = time.Since(started)
	}
	b.row("barrier p50 / p99", "", "%s / %s", ms(quantile(took, .50)), ms(quantile(took, .99)))
}

// changes are made at rest, one after another, all six services holding leases.
func (b *bench) changes() {
	people := make([]*person, b.scale.changes)
	for i := range people {
		people[i] = newPerson(b.t, fmt.Sprintf("changing-%d", i))
	}
	room := benchRoom(0)
	for _, c := range []struct {
		name string
		make func(context.Context, *person) (kv.Result, error)
	}{
		{"user add", func(ctx context.Context, p *person) (kv.Result, error) {
			return b.store.AddUser(ctx, p.key, bus.Handle(p.name), bus.Member)
		}},
		{"room add", func(ctx context.Context, p *person) (kv.Result, error) {
			return b.store.SetMember(ctx, room, p.key, bus.Writer)
		}},
		{"room remove", func(ctx context.Context, p *person) (kv.Result, error) {
			return b.store.RemoveMember(ctx, room, p.key)
		}},
		{"user revoke", func(ctx context.Context, p *person) (kv.Result, error) {
			return b.store.RevokeUser(ctx, p.key)
		}},
	} {
		returned, applied := make([]time.Duration, len(people)), make([]time.Duration, len(people))
		for i, p := range people {
			hold(b.t.Context(), 15*time.Millisecond)
			started := time.Now()
			res, err := c.make(b.t.Context(), p)
			returned[i], applied[i] = time.Since(started), res.Elapsed
			if err != nil || res.Holders != 6 || len(res.Expired) > 0 {
				b.t.Fatalf("%s %s: %v, %d holders, waited out %v; want 6 and none", c.name, p.name, err, res.Holders, res.Expired)
			}
		}
		b.row(c.name+": return p50 / p99", "", "%s / %s", ms(quantile(returned, .50)), ms(quantile(returned, .99)))
		b.row(c.name+": write to 6 of 6 Views p50 / p99", "p99 <= 5 ms", "%s / %s", ms(quantile(applied, .50)), ms(quantile(applied, .99)))
	}
}

// closings revokes people who are connected to every node, from the call to the
// moment at which the last of their connections has noticed.
func (b *bench) closings() {
	took := make([]time.Duration, b.scale.changes)
	for i := range took {
		p := b.addUser(fmt.Sprintf("closing-%d", i))
		closed := make(chan time.Time, len(b.Nodes()))
		for _, c := range b.rawEverywhere(p) {
			go func() {
				_, _ = c.Await(func(wire.Message) bool { return false })
				closed <- time.Now()
			}()
		}
		started := time.Now()
		if _, err := b.store.RevokeUser(b.t.Context(), p.key); err != nil {
			b.t.Fatal(err)
		}
		for range cap(closed) {
			took[i] = max(took[i], (<-closed).Sub(started))
		}
	}
	b.row("revoke to all 3 connections closed p50 / p99", "p99 <= 40 ms", "%s / %s", ms(quantile(took, .50)), ms(quantile(took, .99)))
}

// fill fills the buckets and looks at memory and at the time to load them.
func (b *bench) fill(before float64) {
	b.seedUsers(len(b.users), b.many-len(b.users), roomsInCrowd)
	memberships := len(b.users)*roomsPerUser + (b.many-len(b.users))*roomsInCrowd
	b.row("authcallout RSS, 1 user", "", "%.0f MiB", before)
	b.row(fmt.Sprintf("authcallout RSS, %d users, %d memberships", b.many, memberships), "", "%.0f MiB", b.memory(cluster.Authcallout))
	took, heap := b.loadView()
	b.row("a new View of them: load, to the first barrier", "<= 2 s", "%.2f s", took.Seconds())
	b.row("heap of that View", "<= 400 B a record", "%.0f MiB, %.0f B a record", heap/(1<<20), heap/float64(b.many+memberships))
	b.Term(3, cluster.Authcallout)
	started := time.Now()
	b.StartNode(3, cluster.Authcallout)
	b.WaitHealthy(time.Minute, 3)
	b.row("authcallout: start until it answers", "", "%.2f s", time.Since(started).Seconds())
	b.row("authcallout RSS after that", "", "%.0f MiB", b.resident(3, cluster.Authcallout))
}

// loadView loads a View from nothing and returns the time and its heap in bytes.
func (b *bench) loadView() (time.Duration, float64) {
	b.t.Helper()
	nc, err := kv.Connect(kv.Link{
		URL: b.URLs(b.NATSURL), SeedFile: b.Seed("ops"), CAFile: b.CA(), Name: "test-load", Inbox: "_INBOX_ops", Timeout: 2 * time.Second,
	})
	if err != nil {
		b.t.Fatal(err)
	}
	defer nc.Close()
	view, err := kv.NewView(kv.ViewConfig{Conn: nc, Service: "unibusctl", Node: "load", EncryptionKeys: true})
	if err != nil {
		b.t.Fatal(err)
	}
	before := heapInUse()
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	done := make(chan struct{})
	started := time.Now()
	go func() { view.Run(ctx); close(done) }()
	err = view.Barrier(ctx)
	took := time.Since(started)
	heap := heapInUse() - before
	users := view.UserRecords()
	cancel()
	<-done
	if err != nil || users < b.many {
		b.t.Fatalf("a new View holds %d users, want %d: %v", users, b.many, err)
	}
	return took, heap
}

func heapInUse() float64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// signatureFloor is the CPU, in ms, of the signatures that no callout can do
// without: two verified (the server's, the client's) and two made (the user's
// JWT, the answer). Measured on one thread.
func signatureFloor() float64 {
	pub, priv, _ := ed25519.GenerateKey(rand.Reader)
	text := make([]byte, 2000)
	sig := ed25519.Sign(priv, text)
	const n = 300
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := threadCPU()
	for range n {
		for range 2 {
			ed25519.Verify(pub, text, sig)
			sig = ed25519.Sign(priv, text)
		}
	}
	return (threadCPU() - before) / n
}

func threadCPU() float64 {
	const thisThread = 1 // RUSAGE_THREAD of getrusage(2)
	var u syscall.Rusage
	_ = syscall.Getrusage(thisThread, &u)
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e6
}

// cpu is what one service of all nodes has used so far, in ms; 0 for a service
// that the cluster does not have.
func (w *world) cpu(s cluster.Service) (sum float64) {
	w.t.Helper()
	for _, i := range w.Nodes() {
		pid := w.PID(i, s)
		if pid == 0 {
			continue
		}
		ms, err := processCPU(pid)
		if err != nil {
			w.t.Fatalf("CPU time of %s of n%d: %v", s, i, err)
		}
		sum += ms
	}
	return sum
}

// ownCPU is what this process, the load generator, has used so far, in ms.
func (w *world) ownCPU() float64 {
	w.t.Helper()
	ms, err := processCPU(os.Getpid())
	if err != nil {
		w.t.Fatalf("own CPU time: %v", err)
	}
	return ms
}

// processCPU asks the kernel's clock of a process, which counts nanoseconds:
// the ticks in /proc would add 0.03 ms to or take it from each of 1,000
// connections.
func processCPU(pid int) (float64, error) {
	const scheduled = 2 // CPUCLOCK_SCHED of clock_getcpuclockid(3): ^pid<<3 | 2
	var t syscall.Timespec
	clock := uintptr(^pid<<3 | scheduled)
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clock, uintptr(unsafe.Pointer(&t)), 0); errno != 0 {
		return 0, errno
	}
	return float64(t.Nano()) / 1e6, nil
}

// memory is the mean resident memory of a service over the nodes, in MiB.
func (w *world) memory(s cluster.Service) (mean float64) {
	for _, i := range w.Nodes() {
		mean += w.resident(i, s) / 3
	}
	return mean
}

func (w *world) resident(i int, s cluster.Service) float64 {
	w.t.Helper()
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(w.PID(i, s)), "status"))
	if err != nil {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kib, _ := strconv.ParseFloat(f[1], 64)
			return kib / 1024
		}
	}
	w.t.Fatalf("%s of n%d has no VmRSS", s, i)
	return 0
}
