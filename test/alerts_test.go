package test

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/test/cluster"
)

// alertFault is something that goes wrong on a live cluster, and the alerts that
// must say so.
type alertFault struct {
	name   string
	alerts []string // fire, and end when it is mended
	counts []string // fire because something was counted, which nothing mends
	// inflict returns how it is mended; nil if it cannot be.
	inflict func(t *testing.T, m *monitored, p *prometheus) (mend func())
}

func alertFaults() []alertFault {
	return []alertFault{
		{"a service is dead", []string{"UnibusServiceDown"}, nil, serviceDead},
		{"a server is dead", []string{"UnibusNATSDown", "UnibusRouteMissing", "UnibusReplicaBehind"}, nil, serverDead},
		{
			"a server hangs, and somebody on it is revoked",
			[]string{"UnibusNATSDown", "UnibusNotReady", "UnibusCalloutWithoutLease", "UnibusServerSilent", "UnibusClosingUnproven"},
			[]string{"UnibusChangeUnproven"},
			serverHangs,
		},
		{"two servers are dead", []string{"UnibusQuorumLost", "UnibusNoNodeReady"}, []string{"UnibusMessagesNotStored"}, quorumLost},
		{"a bucket with one replica", []string{"UnibusUnderReplicated"}, nil, oneReplica},
		{"a bucket that is nearly full", []string{"UnibusBucketNearLimit"}, nil, bucketNearLimit},
		{"a certificate with five days left", []string{"UnibusCertificateExpiring", "UnibusCertificateExpiresSoon"}, nil, certificateEnds},
		{"a record that is no record", nil, []string{"UnibusBrokenRecords"}, brokenRecord},
		{"a request sent nine times", nil, []string{"UnibusReplayedRequests"}, replayed},
		{"strangers without a quorum", nil, []string{"UnibusConnectsUnanswered"}, unprovable},
		{"an audit that cannot be written", nil, []string{"UnibusAuditIncomplete"}, auditRefused},
		{"events that do not arrive", nil, []string{"UnibusSweepFindings"}, eventsLost},
		{"a client that does not read", nil, []string{"UnibusSlowConsumers"}, slowConsumer},
		{"a recorder without a right", []string{"UnibusRoomsUnrecorded"}, nil, recorderRefused},
		{"a store that is too small", []string{"UnibusStorageNearLimit"}, nil, smallStore},
		{"a node is no longer scraped", []string{"UnibusTargetMissing"}, nil, targetGone},
	}
}

func (f alertFault) all() []string { return slices.Concat(f.alerts, f.counts) }

// TestAlerts inflicts each fault on a live cluster and waits for its alerts, by
// a real Prometheus with the rules of deploy/monitoring; what can be mended is,
// and the alert has to go. Only the times for which a fault must last are cut.
func TestAlerts(t *testing.T) {
	t.Parallel()
	if !full {
		t.Skip("UNIBUS_FULL is not set: make monitoring")
	}
	m := newMonitored(t, cluster.Options{})
	p := m.prometheus(t)
	cluster.WaitFor(t, time.Minute, "all targets to be scraped", func() error { return p.targetsUp(6) })
	cluster.Hold(t, 10*time.Second, "no alert while nothing is wrong", func() error { return p.silent() })
	for _, f := range alertFaults() {
		t.Run(f.name, func(t *testing.T) {
			mend := f.inflict(t, m.in(t), p)
			for _, name := range f.all() {
				cluster.WaitFor(t, 100*time.Second, name, func() error { return p.fires(name) })
			}
			if mend == nil {
				return
			}
			mend()
			for _, name := range f.alerts {
				cluster.WaitFor(t, 100*time.Second, name+" to end", func() error { return p.ended(name) })
			}
		})
	}
}

// in is the same for a subtest, when the test's own View is current again.
func (m *monitored) in(t *testing.T) *monitored {
	t.Helper()
	cluster.WaitFor(t, 30*time.Second, "the test's own barrier", func() error { return m.view.Barrier(t.Context()) })
	own, w := *m, *m.world
	w.Cluster, w.t = m.In(t), t
	own.world = &w
	return &own
}

func serviceDead(_ *testing.T, m *monitored, _ *prometheus) func() {
	m.Kill(3, cluster.Membership)
	return func() {
		m.StartNode(3, cluster.Membership)
		m.WaitHealthy(time.Minute)
	}
}

func serverDead(_ *testing.T, m *monitored, _ *prometheus) func() {
	m.Kill(3, cluster.NATS)
	return func() {
		m.StartNode(3, cluster.NATS)
		m.WaitHealthy(time.Minute)
	}
}

func serverHangs(t *testing.T, m *monitored, _ *prometheus) func() {
	there := m.newcomer("there")
	m.waitAdmits(there, 3)
	known := m.metric("unibus_enforce_connections")
	c := m.connectRaw(3, there)
	cluster.WaitFor(t, 10*time.Second, "all callouts to have heard of the connection", func() error {
		if now := m.metric("unibus_enforce_connections"); now < known+3 {
			return fmt.Errorf("%v, and %v before", now, known)
		}
		return nil
	})
	m.Pause(3, cluster.NATS)
	resp := m.api(1, m.admin).do(t, "POST", "/v1/users/there/revoke", nil)
	if resp.status != http.StatusAccepted {
		t.Fatalf("revoke with a server that hangs: %s", resp)
	}
	return func() {
		m.Resume(3, cluster.NATS)
		m.WaitHealthy(time.Minute)
		cluster.WaitFor(t, 10*time.Second, "the connection to be closed", func() error {
			if c.Flush() == nil {
				return errors.New("it is open")
			}
			return nil
		})
	}
}

func quorumLost(t *testing.T, m *monitored, _ *prometheus) func() {
	m.api(1, m.admin).want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "kept", "durable": true})
	cluster.WaitFor(t, 30*time.Second, "all nodes to record the room", func() error {
		if n := m.metricOf(cluster.Membership, "unibus_recorder_rooms"); n != 3 {
			return fmt.Errorf("%v do", n)
		}
		return nil
	})
	nc, err := m.Dial(1, append(m.admin.options(m.CA()), nats.NoReconnect())...)
	if err != nil {
		t.Fatal(err)
	}
	m.Kill(2, cluster.NATS)
	m.Kill(3, cluster.NATS)
	for range 20 {
		if err := nc.Publish("room.kept."+m.admin.key.NKey()+".x", []byte("lost")); err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		m.StartNode(2, cluster.NATS)
		m.StartNode(3, cluster.NATS)
		m.WaitHealthy(time.Minute)
	}
}

func oneReplica(t *testing.T, m *monitored, _ *prometheus) func() {
	js, err := jetstream.New(m.Ops())
	if err != nil {
		t.Fatal(err)
	}
	replicas := func(n int) {
		s, err := js.Stream(t.Context(), "KV_UNIBUS_room_keys")
		if err != nil {
			t.Fatal(err)
		}
		cfg := s.CachedInfo().Config
		cfg.Replicas = n
		if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	replicas(1)
	return func() {
		replicas(3)
		m.WaitHealthy(time.Minute)
	}
}

// bucketNearLimit brings the limit down to what is there.
func bucketNearLimit(t *testing.T, m *monitored, _ *prometheus) func() {
	js, err := jetstream.New(m.Ops())
	if err != nil {
		t.Fatal(err)
	}
	limit := func(change func(jetstream.StreamInfo) int64) {
		s, err := js.Stream(t.Context(), "KV_UNIBUS_users")
		if err != nil {
			t.Fatal(err)
		}
		cfg := s.CachedInfo().Config
		cfg.MaxBytes = change(*s.CachedInfo())
		if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	was := int64(0)
	limit(func(i jetstream.StreamInfo) int64 {
		was = i.Config.MaxBytes
		return int64(i.State.Bytes) * 10 / 9 //nolint:gosec // some kilobytes
	})
	return func() { limit(func(jetstream.StreamInfo) int64 { return was }) }
}

func certificateEnds(t *testing.T, m *monitored, _ *prometheus) func() {
	file := filepath.Join(m.Etc(2), "tls", "api.crt")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	show := func(text []byte) {
		if err := cluster.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		m.Reload(2, cluster.Membership)
	}
	show([]byte(endingIn(t, m.world, file, 5*24*time.Hour)))
	return func() { show(good) }
}

// plant writes a record of a user by hand, as an operator with the ops key could.
func (m *monitored) plant(t *testing.T, k bus.UserKey, value []byte) {
	t.Helper()
	js, err := jetstream.New(m.Ops())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "$KV.UNIBUS_users."+k.Hex(), value); err != nil {
		t.Fatal(err)
	}
}

func brokenRecord(t *testing.T, m *monitored, _ *prometheus) func() {
	m.plant(t, newPerson(t, "broken").key, []byte("{"))
	return nil
}

func replayed(t *testing.T, m *monitored, _ *prometheus) func() {
	c := m.api(2, m.admin)
	r, err := c.build(t.Context(), apiRequest{method: "GET", path: "/v1/me"})
	if err != nil {
		t.Fatal(err)
	}
	for n := range 9 {
		resp, err := c.roundTrip(r)
		if err != nil || (resp.status == http.StatusOK) != (n == 0) {
			t.Fatalf("time %d: %v %v", n+1, resp, err)
		}
	}
	return nil
}

// unprovable lets strangers knock while a lease lasts and the quorum is gone: to
// refuse them takes a barrier, so they are not answered.
func unprovable(t *testing.T, m *monitored, _ *prometheus) func() {
	m.Kill(2, cluster.NATS)
	m.Kill(3, cluster.NATS)
	var knocking sync.WaitGroup
	for range 40 {
		p := newPerson(t, "stranger")
		knocking.Go(func() {
			if v, _ := m.attempt(1, p); v == admitted {
				t.Error("a stranger was admitted")
			}
		})
	}
	knocking.Wait()
	return func() {
		m.StartNode(2, cluster.NATS)
		m.StartNode(3, cluster.NATS)
		m.WaitHealthy(time.Minute)
	}
}

// accounts changes accounts.conf of some nodes and has their servers load it.
func (m *monitored) accounts(t *testing.T, nodes []int, gone string) (back func()) {
	t.Helper()
	good := map[int][]byte{}
	load := func(i int, text []byte) {
		t.Helper()
		if err := cluster.WriteFile(filepath.Join(m.Etc(i), "nats", "conf.d", "accounts.conf"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		m.Reload(i, cluster.NATS)
		m.WaitHealthy(time.Minute)
	}
	for _, i := range nodes {
		text, err := os.ReadFile(filepath.Join(m.Etc(i), "nats", "conf.d", "accounts.conf"))
		if err != nil {
			t.Fatal(err)
		}
		good[i] = text
		bad := bytes.ReplaceAll(text, []byte(gone), nil)
		if bytes.Equal(text, bad) {
			t.Fatalf("accounts.conf has no %s", gone)
		}
		load(i, bad)
	}
	return func() {
		for i, text := range good {
			load(i, text)
		}
	}
}

// auditRefused takes away membership's right to write the audit, on one server:
// it must refuse what gives access, and do what takes it away.
func auditRefused(t *testing.T, m *monitored, _ *prometheus) func() {
	leaves := m.newcomer("leaves")
	m.waitAdmits(leaves, 1)
	back := m.accounts(t, []int{1}, `"unibus.audit.membership-n1"`)
	cluster.WaitFor(t, 30*time.Second, "n1 to refuse what it cannot record", func() error {
		if resp := m.api(1, m.admin).do(t, "POST", "/v1/users/leaves/suspend", nil); resp.status >= 300 {
			return fmt.Errorf("not suspended: %s", resp)
		}
		if resp := m.api(1, m.admin).do(t, "POST", "/v1/users/leaves/resume", nil); resp.status < 300 {
			return fmt.Errorf("resumed: %s", resp)
		}
		return nil
	})
	return back
}

// recorderRefused takes away membership's right to ask for the streams of rooms,
// on one server. A recorder that hears its rooms goes on; one that starts hears
// none, and does not stop trying.
func recorderRefused(t *testing.T, m *monitored, _ *prometheus) func() {
	if resp := m.api(1, m.admin).do(t, "POST", "/v1/rooms", dict{"room": "kept", "durable": true}); resp.status != http.StatusCreated && resp.status != http.StatusConflict {
		t.Fatal(resp)
	}
	back := m.accounts(t, []int{3}, `"$JS.API.STREAM.INFO.*", `)
	m.Term(3, cluster.Membership)
	const failures = "unibus_recorder_stream_errors_total"
	others := m.metricOf(cluster.Membership, failures)
	m.StartNode(3, cluster.Membership)
	for _, times := range []float64{1, 3} {
		cluster.WaitFor(t, time.Minute, fmt.Sprintf("the recorder of n3 to have failed %v times", times), func() error {
			if n := m.metricOf(cluster.Membership, failures) - others; n < times {
				return fmt.Errorf("it has %v times", n)
			}
			return nil
		})
	}
	return back
}

// eventsLost keeps the servers' reports of connects from the callouts: only their
// sweeps see then who is there. Nobody sweeps for whoever suspends this user.
func eventsLost(t *testing.T, m *monitored, _ *prometheus) func() {
	back := m.accounts(t, m.Nodes(), `{ stream: { account: SYS, subject: "$SYS.ACCOUNT.BUS.*" } }`)
	for n := range 3 { // the sweep of every half minute may have come between
		stays := m.newcomer(fmt.Sprintf("stays%d", n))
		m.waitAdmits(stays, 1)
		hold(t.Context(), 6*time.Second) // sweeps follow one another after a change
		c := m.connectRaw(1, stays)
		hold(t.Context(), 4*time.Second)
		u, _, ok := m.view.User(stays.key)
		if !ok {
			t.Fatal("no record")
		}
		u.Status = bus.Suspended
		value, err := json.Marshal(u)
		if err != nil {
			t.Fatal(err)
		}
		m.plant(t, stays.key, value)
		cluster.WaitFor(t, 10*time.Second, "a sweep to close the connection", func() error {
			if c.Flush() == nil {
				return errors.New("it is open")
			}
			return nil
		})
		if m.metric("unibus_enforce_sweep_findings_total") > 0 {
			break
		}
	}
	return back
}

func slowConsumer(t *testing.T, m *monitored, _ *prometheus) func() {
	slow := m.newcomer("slow")
	m.join(bus.RoomID(m.room), slow, bus.Reader)
	m.waitAdmits(slow, 1)
	c := m.connectRaw(1, slow)
	if err := c.Sub("room."+m.room+".>", "", "1"); err != nil {
		t.Fatal(err)
	}
	nc, err := m.Dial(1, append(m.admin.options(m.CA()), nats.NoReconnect())...)
	if err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, 900<<10)
	_, _ = rand.Read(payload)
	for range 120 { // more than the server keeps for anybody
		if err := nc.Publish("room."+m.room+"."+m.admin.key.NKey()+".x", payload); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.FlushTimeout(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	return nil
}

func smallStore(t *testing.T, m *monitored, _ *prometheus) func() {
	file := filepath.Join(m.Etc(3), "nats", "conf.d", "jetstream.conf")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	small := bytes.ReplaceAll(good, []byte("16GB"), []byte("128KB"))
	if bytes.Equal(good, small) {
		t.Fatal("jetstream.conf names another limit")
	}
	restart := func(text []byte) {
		if err := cluster.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		m.Kill(3, cluster.NATS)
		m.StartNode(3, cluster.NATS)
	}
	restart(small)
	return func() {
		restart(good)
		m.WaitHealthy(time.Minute)
	}
}

func targetGone(t *testing.T, _ *monitored, p *prometheus) func() {
	p.scrape(t, p.groups[:len(p.groups)-1])
	return func() { p.scrape(t, p.groups) }
}
