package callout

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// script is a source whose answers a test writes. Each function is called as
// often as the Service asks.
type script struct {
	lease   func() (time.Time, bool)
	tells   func() (*kv.Access, error)
	barrier func() error

	mu   sync.Mutex
	said []string // what was asked, in order
	hold counter
}

func (s *script) note(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.said = append(s.said, what)
}

func (s *script) Lease() (time.Time, bool) { s.note("lease"); return s.lease() }

func (s *script) Access(bus.UserKey) (*kv.Access, error) { s.note("access"); return s.tells() }

func (s *script) PlainAccess(context.Context, bus.UserKey) (*kv.Access, error) {
	return nil, errors.New("decided on a plain read")
}

func (s *script) Barrier(context.Context) error { s.note("barrier"); return s.barrier() }

func (s *script) UsersBarrier(context.Context) error { s.note("users barrier"); return s.barrier() }

func (s *script) Hold(bus.UserKey) releaser { s.note("hold"); return &s.hold }

// stage is a Service on a script, and what became of a request.
type stage struct {
	*scene
	*script
	service *Service
	log     *bytes.Buffer
	metrics *prometheus.Registry
	mu      sync.Mutex
	replies [][]byte
	onReply func() error // instead of success
}

func newStage(t testing.TB) *stage {
	t.Helper()
	g := &stage{scene: newScene(t), log: &bytes.Buffer{}, metrics: prometheus.NewRegistry()}
	a := g.access(t, kv.Grant{Room: "ops", Role: bus.Writer})
	g.script = &script{
		lease:   func() (time.Time, bool) { return moment.Add(10 * time.Second), true },
		tells:   func() (*kv.Access, error) { return a, nil },
		barrier: func() error { return errors.New("a barrier nobody needs") },
	}
	var err error
	g.service, err = New(Config{
		Keys: []Keys{g.keys}, TTL: 12 * time.Hour, Now: at(moment),
		Log: slog.New(slog.NewTextHandler(g.log, nil)), Metrics: NewMetrics(g.metrics),
	})
	must(t, err)
	g.service.view = g.script
	return g
}

func (g *stage) job(m *nats.Msg) job { return job{m, g.respond, moment} }

func (g *stage) respond(b []byte) error {
	if g.onReply != nil {
		if err := g.onReply(); err != nil {
			return err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.replies = append(g.replies, b)
	return nil
}

// answer lets the Service handle one request and waits for it, also where it
// goes on behind a barrier.
func (g *stage) answer(t testing.TB, j job) {
	t.Helper()
	g.service.answer(t.Context(), j)
	for range cap(g.service.doubts) {
		g.service.doubts <- struct{}{}
	}
	for range cap(g.service.doubts) {
		<-g.service.doubts
	}
}

func (g *stage) connect(t testing.TB) { t.Helper(); g.answer(t, g.job(g.parts(t).message(t))) }

func (g *stage) wantSilence(t *testing.T, reason string) {
	t.Helper()
	if len(g.replies) > 0 {
		t.Errorf("answered %d times, want silence", len(g.replies))
	}
	g.wantCounted(t, "error", reason)
}

func (g *stage) wantCounted(t *testing.T, result, reason string) {
	t.Helper()
	if n := g.count(t, "unibus_auth_requests_total", reason, result); n != 1 {
		t.Errorf("%v requests counted as %s, %s; log:\n%s", n, result, reason, g.log)
	}
}

// count reads a counter as a scrape would; labels are values in the order of
// their names.
func (g *stage) count(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	families, err := g.metrics.Gather()
	must(t, err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var values []string
			for _, l := range m.GetLabel() {
				values = append(values, l.GetValue())
			}
			if f.GetName() == name && slices.Equal(values, labels) {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

// wantDenied wants one denial, for a reason that the client does not learn.
func (g *stage) wantDenied(t *testing.T, reason string) {
	t.Helper()
	if len(g.replies) != 1 {
		t.Fatalf("answered %d times, want one denial; log:\n%s", len(g.replies), g.log)
	}
	if answer, user := g.readAnswer(t, g.replies[0]); user != nil || answer.Error != Denied {
		t.Errorf("answer %+v, want a denial", answer)
	}
	g.wantCounted(t, "deny", reason)
}

func (g *stage) wantAdmitted(t *testing.T) (*jwt.AuthorizationResponseClaims, *jwt.UserClaims) {
	t.Helper()
	if len(g.replies) != 1 {
		t.Fatalf("answered %d times, want one admission; log:\n%s", len(g.replies), g.log)
	}
	answer, user := g.readAnswer(t, g.replies[0])
	if user == nil {
		t.Fatalf("refused: %s; log:\n%s", answer.Error, g.log)
	}
	g.wantCounted(t, "allow", "active")
	return answer, user
}

func (g *stage) wantAsked(t *testing.T, want string) {
	t.Helper()
	if got := strings.Join(g.said, " "); got != want {
		t.Errorf("asked %q, want %q", got, want)
	}
}

func TestAnAdmissionAsksForTheLeaseBeforeAndAfter(t *testing.T) {
	g := newStage(t)
	g.connect(t)
	answer, user := g.wantAdmitted(t)
	g.wantAsked(t, "hold lease access lease")
	if user.Name != g.client.pub || answer.Expires != moment.Add(2*time.Second).Unix() {
		t.Errorf("admitted %s until %d", user.Name, answer.Expires)
	}
	if line := g.log.String(); !strings.Contains(line, "result=allow reason=active") || !strings.Contains(line, "handle=alice rooms=1") {
		t.Errorf("logged %s", line)
	}
}

// An answer must not be worth more than the lease it was made on, whatever
// happens to it on its way.
func TestAnAnswerEndsWithItsLease(t *testing.T) {
	g := newStage(t)
	g.lease = func() (time.Time, bool) { return moment.Add(900 * time.Millisecond), true }
	g.connect(t)
	if answer, _ := g.wantAdmitted(t); answer.Expires != moment.Add(900*time.Millisecond).Unix() {
		t.Errorf("the answer lives until %d, longer than the lease", answer.Expires)
	}
}

func TestWithoutALeaseThereIsSilence(t *testing.T) {
	for name, held := range map[string][]bool{
		"never held":                   {false},
		"lost while it was minted":     {true, false},
		"lost at the barrier":          {true, false},
		"lost after a barrier's grant": {true, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			g := newStage(t)
			asked := 0
			g.lease = func() (time.Time, bool) {
				asked++
				return moment.Add(10 * time.Second), held[min(asked, len(held))-1]
			}
			reason := "no_lease"
			switch grant := g.tells; name {
			case "lost while it was minted":
				reason = "lease_lost"
			case "lost at the barrier":
				g.tells = func() (*kv.Access, error) { return nil, nil }
				g.barrier = func() error { return nil }
			case "lost after a barrier's grant":
				reason = "lease_lost"
				granted := false
				g.barrier = func() error { granted = true; return nil }
				g.tells = func() (*kv.Access, error) {
					if granted {
						return grant()
					}
					return nil, nil
				}
			}
			g.connect(t)
			g.wantSilence(t, reason)
			g.hold.want(t, 1)
		})
	}
}

// TestAGrantOfAMomentAgoIsNotMissed: whatever the View says against a proven
// key, short of a recorded revoke, may be older than a grant that has returned.
func TestAGrantOfAMomentAgoIsNotMissed(t *testing.T) {
	past := moment.Add(-time.Hour)
	crowd := make([]kv.Grant, bus.MaxRoomsPerUser+1)
	for name, before := range map[string]func(*kv.Access) (*kv.Access, error){
		"too_many_rooms": func(a *kv.Access) (*kv.Access, error) { a.Rooms = crowd; return a, nil },
		"unknown":        func(*kv.Access) (*kv.Access, error) { return nil, nil },
		"suspended":      func(a *kv.Access) (*kv.Access, error) { a.User.Status = bus.Suspended; return a, nil },
		"expired":        func(a *kv.Access) (*kv.Access, error) { a.User.ExpiresAt = &past; return a, nil },
		"broken_record":  func(*kv.Access) (*kv.Access, error) { return nil, errors.New("bad JSON") },
	} {
		stale := func(g *stage) (*kv.Access, error) { return before(g.access(t)) }
		barrier := "users barrier"
		if name == "too_many_rooms" { // the one refusal for which other records count
			barrier = "barrier"
		}
		t.Run(name+", then granted", func(t *testing.T) {
			g := newStage(t)
			grant, current := g.tells, false
			g.barrier = func() error { current = true; return nil }
			g.tells = func() (*kv.Access, error) {
				if current {
					return grant()
				}
				return stale(g)
			}
			g.connect(t)
			g.wantAdmitted(t)
			g.wantAsked(t, "hold lease access "+barrier+" lease access lease")
		})
		t.Run(name+", for good", func(t *testing.T) {
			g := newStage(t)
			g.tells = func() (*kv.Access, error) { return stale(g) }
			g.barrier = func() error { return nil }
			g.connect(t)
			g.wantDenied(t, name)
			g.hold.want(t, 1)
		})
		t.Run(name+", without a quorum", func(t *testing.T) {
			g := newStage(t)
			g.tells = func() (*kv.Access, error) { return stale(g) }
			g.connect(t)
			g.wantSilence(t, "no_barrier")
			g.hold.want(t, 1)
		})
	}
}

func TestARecordedRevokeNeedsNoBarrier(t *testing.T) {
	g := newStage(t)
	a := g.access(t)
	a.User.Status = bus.Revoked
	g.tells = func() (*kv.Access, error) { return a, nil }
	g.connect(t)
	g.wantDenied(t, "revoked")
	g.wantAsked(t, "hold lease access")
	g.hold.want(t, 1)
}

// A stranger who proves nothing costs neither a lookup nor a barrier.
func TestTheUnprovenAreNotLookedUp(t *testing.T) {
	g := newStage(t)
	p := g.parts(t)
	p.at("connect_opts")["sig"] = strings.Repeat("x", 86)
	g.answer(t, g.job(p.message(t)))
	g.wantDenied(t, "signature")
	g.wantAsked(t, "")
}

func TestNobodyAnswersWhatNoServerAsked(t *testing.T) {
	g := newStage(t)
	p := g.parts(t)
	p.signer = g.client
	g.answer(t, g.job(p.message(t)))
	g.wantSilence(t, "malformed")
	g.wantAsked(t, "")
}

// TestAnAdmissionHoldsUntilItsConnection: until the server has acted on an
// answer, a revoke of that user must not be acknowledged.
func TestAnAdmissionHoldsUntilItsConnection(t *testing.T) {
	g := newStage(t)
	g.connect(t)
	g.wantAdmitted(t)
	g.hold.want(t, 0)
	g.service.effects.end(g.server.pub, 7)
	g.hold.want(t, 1)
}

func TestAReportThatOvertakesTheAnswerCounts(t *testing.T) {
	g := newStage(t)
	g.onReply = func() error { g.service.effects.end(g.server.pub, 7); return nil }
	g.connect(t)
	g.wantAdmitted(t)
	g.hold.want(t, 1)
}

func TestAnAnswerThatWasNotSentHoldsNothing(t *testing.T) {
	g := newStage(t)
	g.onReply = func() error { return nats.ErrConnectionClosed }
	g.connect(t)
	g.wantSilence(t, "reply")
	g.hold.want(t, 1)
}

// Rights that do not fit into a message are refused aloud: they will not fit
// the next time either.
func TestTooManyRightsAreADenial(t *testing.T) {
	g := newStage(t)
	first := true
	g.onReply = func() error {
		if first {
			first = false
			return nats.ErrMaxPayload
		}
		return nil
	}
	g.connect(t)
	g.wantDenied(t, "too_large")
	g.hold.want(t, 1)
}

func TestStaleRequestsAreDropped(t *testing.T) {
	for age, dropped := range map[time.Duration]float64{Deadline: 0, Deadline + 1: 1} {
		g := newStage(t)
		j := g.job(g.parts(t).message(t))
		j.received = moment.Add(-age)
		g.answer(t, j)
		if n := g.count(t, "unibus_auth_shed_total"); n != dropped || len(g.replies) != 1-int(dropped) {
			t.Errorf("after %s: %v shed, %d answered", age, n, len(g.replies))
		}
	}
}

func TestAFullQueueSheds(t *testing.T) {
	g := newStage(t)
	m := g.parts(t).message(t)
	for range queueLength + 3 {
		g.service.take(m)
	}
	if n := g.count(t, "unibus_auth_shed_total"); n != 3 {
		t.Errorf("%v shed, want 3", n)
	}
}

// TestACrowdOfStrangersDoesNotKeepMembersWaiting: doubts wait for their barrier
// outside the workers, so many at most, and the one too many is dropped.
func TestACrowdOfStrangersDoesNotKeepMembersWaiting(t *testing.T) {
	const slots = 4
	g := newStage(t)
	g.service.doubts = make(chan struct{}, slots)
	grant, known := g.tells, false
	g.tells = func() (*kv.Access, error) {
		if known {
			return grant()
		}
		return nil, nil
	}
	quorum := make(chan struct{})
	g.barrier = func() error { <-quorum; return errors.New("no quorum") }
	m := g.parts(t).message(t)
	for range slots + 3 {
		g.service.answer(t.Context(), g.job(m)) // returns although no barrier does
	}
	if n := g.count(t, "unibus_auth_shed_total"); n != 3 {
		t.Errorf("%v shed, want 3", n)
	}
	g.hold.want(t, 3)
	known = true
	g.service.answer(t.Context(), g.job(m))
	g.wantAdmitted(t)
	close(quorum)
	for range slots {
		g.service.doubts <- struct{}{}
	}
	g.hold.want(t, 3+slots)
}

// TestRunAnswersWhatWasDelivered: after the signal to stop every queued request
// is still answered, and Run outlasts the effect of the answers, so that the
// lease is not released before.
func TestRunAnswersWhatWasDelivered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newStage(t)
		m := g.parts(t).message(t)
		for range 10 {
			g.service.jobs <- g.job(m)
		}
		stopped, stop := context.WithCancel(t.Context())
		stop()
		began := time.Now()
		g.service.Run(stopped)
		if len(g.replies) != 10 {
			t.Errorf("%d of 10 answered", len(g.replies))
		}
		if waited := time.Since(began); waited < answerLife {
			t.Errorf("Run ends %s after the last answer, which lives %s", waited, answerLife)
		}
		synctest.Wait() // the effect and Run's patience end in the same moment
		g.hold.want(t, 10)
	})
}

func TestRunWaitsForBarriers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newStage(t)
		g.tells = func() (*kv.Access, error) { return nil, nil }
		g.barrier = func() error { <-time.After(time.Second); return nil }
		g.service.jobs <- g.job(g.parts(t).message(t))
		stopped, stop := context.WithCancel(t.Context())
		stop()
		g.service.Run(stopped)
		g.wantDenied(t, "unknown")
		g.hold.want(t, 1)
	})
}

func TestExpectSeesAProvenRequest(t *testing.T) {
	g := newStage(t)
	k := key(t, g.client.pub)
	seen, forget := g.service.Expect(k)
	defer forget()
	p := g.parts(t)
	p.at("connect_opts")["sig"] = strings.Repeat("x", 86)
	g.answer(t, g.job(p.message(t)))
	select {
	case <-seen:
		t.Error("an unproven request counts as seen")
	default:
	}
	g.connect(t)
	select {
	case <-seen:
	default:
		t.Error("a proven request was not seen")
	}
	g.connect(t) // and a second one closes nothing twice
}

// TestTheLogKeepsItsLines: what a stranger sends cannot start a line of its own
// or fill the disk.
func TestTheLogKeepsItsLines(t *testing.T) {
	g := newStage(t)
	p := g.parts(t)
	p.at("connect_opts")["nkey"] = "U\ntime=2026 level=INFO msg=connect result=allow\x1b[2J" + strings.Repeat("y", 10_000)
	p.at("client_info")["host"] = "h\nresult=allow"
	g.answer(t, g.job(p.message(t)))
	g.wantDenied(t, "key")
	if text := g.log.String(); strings.Count(text, "\n") != 1 || len(text) > 600 || strings.Contains(text, "\x1b") {
		t.Errorf("logged %q", text)
	}
}

// FuzzOpen: no bytes and no header panic, and nothing but a sealed request of a
// genuine server opens.
func FuzzOpen(f *testing.F) {
	s := newScene(f)
	genuine := s.parts(f).message(f)
	f.Add(genuine.Data[:len(genuine.Data)-1], s.serverCurve.pub)
	f.Add(genuine.Data, s.curve.pub)
	f.Add([]byte(sealVersion), s.serverCurve.pub)
	f.Add([]byte{}, "")
	o := s.opener()
	f.Fuzz(func(t *testing.T, data []byte, header string) {
		m := nats.NewMsg(Subject)
		m.Data = data
		m.Header.Set(serverKeyHeader, header)
		if _, err := o.open(m); err == nil && (!bytes.Equal(data, genuine.Data) || header != s.serverCurve.pub) {
			t.Error("opened what no server made")
		}
	})
}

// BenchmarkAnswer is one accepted connect as the Service handles it, log line
// and metrics included.
func BenchmarkAnswer(b *testing.B) {
	g := newStage(b)
	a := g.access(b, benchRooms...)
	g.tells = func() (*kv.Access, error) { return a, nil }
	j := g.job(g.parts(b).message(b))
	j.respond = func([]byte) error { g.service.effects.end(g.server.pub, 7); return nil }
	b.ReportAllocs()
	defer reportCPU(b)()
	for b.Loop() {
		g.said = g.said[:0]
		g.log.Reset()
		g.service.answer(b.Context(), j)
	}
}
