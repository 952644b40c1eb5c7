package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus/guard"
	"unibus.internal/test/cluster"
)

// The aims of the API: section 7, goal 9 of the figures that this project set
// out with.
const (
	aimWriteP50  = "p50 <= 3 ms, p99 <= 8 ms"
	aimWriteRate = ">= 1500"
)

// apiScale says how much a run of the API's benchmark measures: so many reads
// of one client, and of a crowd together; half as many writes.
type apiScale struct{ rounds, clients, alone, crowd int }

// TestBenchAPIStillRuns keeps the benchmark from rotting, at numbers that
// measure nothing: every request of it must succeed.
func TestBenchAPIStillRuns(t *testing.T) {
	t.Parallel()
	runBenchAPI(t, io.Discard, apiScale{rounds: 1, clients: 3, alone: 2, crowd: 6})
}

// BenchmarkAPI measures the API of a live cluster once, whatever b.N is, beside
// raw writes on the same cluster and beside the same service with the
// authentication of requests taken out, and prints a table for
// docs/performance.md.
func BenchmarkAPI(b *testing.B) {
	runBenchAPI(b, os.Stdout, apiScale{rounds: 5, clients: 32, alone: 200, crowd: 1600})
}

// benchAPI is one run. Both clusters are up all the time, and asked in turn.
type benchAPI struct {
	apiScale
	table
	t            testing.TB
	ours, open   *apiSite // open: the same binaries, that verify no signature and record no nonce
	ops          *nats.Conn
	put1, putAll []load // raw writes
}

// apiSite is a cluster with one room for each client, whose owner it is, and
// one member in it whose role it changes.
type apiSite struct {
	*world
	owners []*person
	bodies [2][]byte // of a change of role, in turn
	rooms  atomic.Int64
	turn   atomic.Int64
}

func runBenchAPI(t testing.TB, out io.Writer, s apiScale) {
	b := &benchAPI{apiScale: s, table: table{out}, t: t}
	b.ours = newAPISite(t, s.clients, nil)
	b.open = newAPISite(t, s.clients, map[string]string{"UNIBUS_GUARD_OFF": fmt.Sprintf("%s,%s", guard.RequestSignature, guard.NonceOnce)})
	b.ops = b.ours.Ops()
	fmt.Fprintf(b, "\n%s, %d CPUs (%s), %s. %d rounds; %d requests of one client, %d of %d clients.\n\n",
		time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), cpuModel(), runtime.Version(), s.rounds, s.alone, s.crowd, s.clients)
	b.row("measure", "aim", "result")
	b.row("---", "---", "---")
	for range s.rounds {
		b.put1 = append(b.put1, loading(t, 1, s.alone, b.put))
		b.putAll = append(b.putAll, loading(t, s.clients, s.crowd, b.put))
	}
	b.row("raw R3 put, 1 client: p50 / p99", "", "%.1f / %.1f ms", p50of(b.put1), p99of(b.put1))
	b.row("raw R3 puts/s, all clients", "", "%.0f", rateOf(b.putAll))
	for _, k := range []struct {
		name  string
		ask   func(s *apiSite, node, client int) error
		write bool
	}{
		{"GET /v1/me", (*apiSite).getMe, false},
		{"GET /v1/rooms", (*apiSite).getRooms, false},
		{"PUT .../members/{user}", (*apiSite).putMember, true},
		{"POST /v1/rooms", (*apiSite).postRoom, true},
	} {
		b.measure(k.name, k.write, k.ask)
	}
}

func newAPISite(t testing.TB, clients int, off map[string]string) *apiSite {
	env := maps.Clone(fuzzedRates[cluster.Membership])
	maps.Copy(env, off)
	s := &apiSite{world: newWorld(t, cluster.Options{
		Controls: off != nil, Env: map[cluster.Service]map[string]string{cluster.Membership: env},
	})}
	for i, role := range []string{"reader", "writer"} {
		s.bodies[i], _ = json.Marshal(dict{"role": role})
	}
	root := s.api(1, s.admin)
	for i := range clients {
		owner, member := newPerson(t, fmt.Sprintf("owner-%d", i)), newPerson(t, fmt.Sprintf("member-%d", i))
		for _, p := range []*person{owner, member} {
			root.want(t, http.StatusCreated, "POST", "/v1/users", dict{"sign_pub": p.key.NKey(), "handle": p.name, "role": "member"})
		}
		s.api(1, owner).want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": fmt.Sprintf("bench-%d", i)})
		s.owners = append(s.owners, owner)
	}
	return s
}

// ask asks again, as clients do, what a service could not do at that moment:
// nothing of it was done. The time of all tries counts.
func (s *apiSite) ask(node, client int, status int, q apiRequest) error {
	r, err := s.api(node, s.owners[client]).send(context.Background(), q)
	for try := 1; try < 5 && err == nil && r.status == http.StatusServiceUnavailable; try++ {
		r, err = s.api(node, s.owners[client]).send(context.Background(), q)
	}
	if err == nil && r.status != status {
		err = fmt.Errorf("%s %s: %s", q.method, q.path, r)
	}
	return err
}

func (s *apiSite) getMe(node, client int) error {
	return s.ask(node, client, http.StatusOK, apiRequest{method: "GET", path: "/v1/me"})
}

func (s *apiSite) getRooms(node, client int) error {
	return s.ask(node, client, http.StatusOK, apiRequest{method: "GET", path: "/v1/rooms"})
}

func (s *apiSite) putMember(node, client int) error {
	path := fmt.Sprintf("/v1/rooms/bench-%d/members/member-%d", client, client)
	return s.ask(node, client, http.StatusOK, apiRequest{method: "PUT", path: path, body: s.bodies[s.turn.Add(1)%2]})
}

// postRoom lets the owners take turns, whoever asks: nobody may be in more than
// 500 rooms.
func (s *apiSite) postRoom(node, _ int) error {
	i := s.rooms.Add(1)
	body := fmt.Appendf(nil, `{"room":"made-%d"}`, i)
	return s.ask(node, int(i)%len(s.owners), http.StatusCreated, apiRequest{method: "POST", path: "/v1/rooms", body: body})
}

// put is one replicated write of about the size of a record, to a bucket that
// nobody has in memory.
func (b *benchAPI) put(_, client int) error {
	js, err := b.ops.JetStream(nats.MaxWait(10 * time.Second))
	if err != nil {
		return err
	}
	_, err = js.Publish(fmt.Sprintf("$KV.UNIBUS_nonces.bench-%d-%d", client, b.ours.turn.Add(1)), make([]byte, 300))
	return err
}

// load is what one run of equal requests took.
type load struct {
	rate     float64 // a second
	p50, p99 time.Duration
}

// loading asks n times, by so many clients at a time; client c asks node c%3+1
// of what takes a node.
func loading(t testing.TB, clients, n int, ask func(node, client int) error) load {
	t.Helper()
	took, errs := make([]time.Duration, n), make([]error, n)
	var next atomic.Int64
	var wg sync.WaitGroup
	started := time.Now()
	for c := range clients {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				begun := time.Now()
				errs[i] = ask(c%3+1, c)
				took[i] = time.Since(begun)
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(started)
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	return load{float64(n) / elapsed.Seconds(), quantile(took, .50), quantile(took, .99)}
}

// measure asks one thing in three ways, of both clusters in turn.
func (b *benchAPI) measure(name string, write bool, ask func(*apiSite, int, int) error) {
	type pair struct{ ours, open []load }
	n1, nAll := b.alone, b.crowd
	if write {
		n1, nAll = max(1, b.alone/2), b.crowd/2
	}
	var alone, node, all pair
	for range b.rounds {
		for _, w := range []struct {
			pair       *pair
			clients, n int
			node       int // 0: each client its own
		}{{&alone, 1, n1, 1}, {&node, b.clients, nAll, 1}, {&all, b.clients, nAll, 0}} {
			at := func(s *apiSite) func(int, int) error {
				return func(node, client int) error {
					if w.node != 0 {
						node = w.node
					}
					return ask(s, node, client)
				}
			}
			w.pair.open = append(w.pair.open, loading(b.t, w.clients, w.n, at(b.open)))
			w.pair.ours = append(w.pair.ours, loading(b.t, w.clients, w.n, at(b.ours)))
		}
	}
	aimLatency, aimRate := "", ""
	if write {
		aimLatency, aimRate = aimWriteP50, aimWriteRate
	}
	b.row(name+", 1 client: p50 / p99", aimLatency, "%.1f / %.1f ms", p50of(alone.ours), p99of(alone.ours))
	b.row("  without authentication", "", "%.1f / %.1f ms", p50of(alone.open), p99of(alone.open))
	b.row("  p50 in raw puts", "", "%.1fx", p50of(alone.ours)/p50of(b.put1))
	b.row(fmt.Sprintf("%s, %d clients, one node: a second", name, b.clients), "", "%.0f", rateOf(node.ours))
	b.row("  without authentication; ratio", "", "%.0f; %.2f", rateOf(node.open), rateOf(node.ours)/rateOf(node.open))
	b.row(fmt.Sprintf("%s, %d clients, three nodes: a second", name, b.clients), aimRate, "%.0f", rateOf(all.ours))
	b.row("  p50 / p99", "", "%.1f / %.1f ms", p50of(all.ours), p99of(all.ours))
	b.row("  without authentication; ratio", "", "%.0f; %.2f", rateOf(all.open), rateOf(all.ours)/rateOf(all.open))
	b.row("  part of raw puts/s", "", "%.2f", rateOf(all.ours)/rateOf(b.putAll))
}

func rateOf(all []load) float64 { return medianLoad(all, func(l load) float64 { return l.rate }) }

func p50of(all []load) float64 {
	return medianLoad(all, func(l load) float64 { return l.p50.Seconds() * 1000 })
}

func p99of(all []load) float64 {
	return medianLoad(all, func(l load) float64 { return l.p99.Seconds() * 1000 })
}

func medianLoad(all []load, of func(load) float64) float64 {
	figures := make([]float64, len(all))
	for i, l := range all {
		figures[i] = of(l)
	}
	return median(figures)
}
