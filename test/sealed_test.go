package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/seal"
	"unibus.internal/test/cluster"
)

// sealedWorld is a cluster with people who talk in encrypted rooms.
type sealedWorld struct {
	*world
	alice, bob, carol, dave *keyed
	said                    *watching
}

// keyed is a person with keys, connected.
type keyed struct {
	*person
	api  *sdk.Client
	keys *sdk.Keys
	conn *sdk.Conn

	mu     sync.Mutex
	heard  []sdk.Message
	alerts []sdk.Alert
}

func (w *world) keyed(t *testing.T, p *person) *keyed {
	t.Helper()
	k := &keyed{person: p, api: w.client(t, p)}
	var err error
	k.keys, err = sdk.NewKeys(sdk.KeysConfig{API: k.api, Identity: p.identity(t), Trust: sdk.MemoryTrust(), OnAlert: func(a sdk.Alert) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.alerts = append(k.alerts, a)
	}})
	if err == nil {
		_, err = k.keys.Announce(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	k.conn = w.dial(t, p, func(cfg *sdk.DialConfig) { cfg.API, cfg.Keys = k.api, k.keys })
	return k
}

func (k *keyed) room(t *testing.T, id bus.RoomID) *sdk.Room {
	t.Helper()
	r, err := k.conn.Room(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (k *keyed) hears(t *testing.T, id bus.RoomID, from sdk.Start) {
	t.Helper()
	h, err := k.room(t, id).Subscribe(t.Context(), sdk.Hear{From: from}, func(m sdk.Message) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.heard = append(k.heard, m)
	})
	if err == nil {
		err = k.conn.Flush(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Unsubscribe)
}

func (k *keyed) heardText(text string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.ContainsFunc(k.heard, func(m sdk.Message) bool { return string(m.Data) == text })
}

// has waits until k has heard a text.
func (k *keyed) has(t *testing.T, text string) {
	t.Helper()
	cluster.WaitFor(t, 15*time.Second, fmt.Sprintf("%s to hear %q", k.name, text), func() error {
		if k.heardText(text) {
			return nil
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		return fmt.Errorf("%d messages, %d alerts: %+v", len(k.heard), len(k.alerts), k.alerts)
	})
}

// TestSealed talks in encrypted rooms on a live cluster: live and stored; who is
// removed reads nothing more, with everything that the servers have; and nothing
// readable is in what the servers keep and say.
func TestSealed(t *testing.T) {
	t.Parallel()
	s := &sealedWorld{world: newWorld(t, cluster.Options{})}
	s.said = watch(t, s.world)
	s.alice, s.bob = s.keyed(t, s.addUser("alice")), s.keyed(t, s.addUser("bob"))
	s.carol, s.dave = s.keyed(t, s.addUser("carol")), s.keyed(t, s.addUser("dave"))
	for _, step := range []struct {
		name string
		test func(*testing.T)
	}{
		{"talk", s.talk},
		{"stored", s.stored},
		{"removed", s.removed},
		{"commands", s.commands},
		{"canaries", s.canaries},
		{"the benchmark still runs", func(t *testing.T) { s.measureRekey(t, table{io.Discard}, 12) }},
	} {
		if !t.Run(step.name, step.test) {
			t.FailNow()
		}
	}
}

// make makes an encrypted room of alice, bob (writer) and carol (owner).
func (s *sealedWorld) make(t *testing.T, id bus.RoomID, durable bool) {
	t.Helper()
	s.addRoom(id, s.alice.person, kv.RoomOptions{Encrypted: true, Durable: durable})
	if _, err := s.alice.keys.Rekey(t.Context(), id, sdk.RekeyOptions{}); err != nil {
		t.Fatal(err)
	}
	for who, role := range map[string]bus.RoomRole{"bob": bus.Writer, "carol": bus.Owner} {
		if _, _, err := s.alice.keys.AddMember(t.Context(), id, who, role); err != nil {
			t.Fatal(err)
		}
	}
}

func (s *sealedWorld) talk(t *testing.T) {
	s.make(t, "vault", false)
	s.bob.hears(t, "vault", sdk.FromNow())
	s.carol.hears(t, "vault", sdk.FromNow())
	say := func(text string) {
		t.Helper()
		if _, err := s.alice.room(t, "vault").Publish(t.Context(), "news", []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	// A live room keeps nothing, and the other servers hear of a subscription a
	// moment after it was made.
	cluster.WaitFor(t, 15*time.Second, "what alice says to reach both", func() error {
		say("ready")
		if !s.bob.heardText("ready") || !s.carol.heardText("ready") {
			return errors.New("not yet")
		}
		return nil
	})
	say(s.said.live)
	s.bob.has(t, s.said.live)
	s.carol.has(t, s.said.live)
	if err := s.alice.conn.Publish(t.Context(), "vault", "news", []byte("x")); err == nil {
		cluster.WaitFor(t, 10*time.Second, "alice's rooms to be known", func() error {
			if bus.CodeOf(s.alice.conn.Publish(t.Context(), "vault", "news", []byte("x"))) != bus.Invalid {
				return fmt.Errorf("a plain message may be published into an encrypted room")
			}
			return nil
		})
	}
	// Requests and answers are messages, too.
	answers, err := s.bob.room(t, "vault").Subscribe(t.Context(), sdk.Hear{Topic: "ask"}, func(m sdk.Message) {
		if err := s.bob.room(t, "vault").Reply(t.Context(), m, append([]byte("re: "), m.Data...)); err != nil {
			t.Error(err)
		}
	})
	if err == nil {
		defer answers.Unsubscribe()
		err = s.bob.conn.Flush(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	m, err := s.alice.room(t, "vault").Request(ctx, "ask", []byte("who"))
	if err != nil || string(m.Data) != "re: who" || m.Sender != s.bob.key {
		t.Fatalf("%q from %s: %v", m.Data, m.Sender, err)
	}
	stranger := s.dial(t, s.addUser("keyless"), nil)
	if _, err := stranger.Room(t.Context(), "vault"); bus.CodeOf(err) != bus.NotFound {
		t.Fatalf("a stranger: %v", err)
	}
}

func (s *sealedWorld) stored(t *testing.T) {
	s.make(t, "ledger", true)
	room := s.alice.room(t, "ledger")
	for i := range 20 {
		text := fmt.Sprint("entry ", i)
		if i == 10 {
			text = s.said.stored
			if _, err := s.carol.keys.Rekey(t.Context(), "ledger", sdk.RekeyOptions{Force: true}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := room.Publish(t.Context(), "entry", []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	s.bob.hears(t, "ledger", sdk.FromStart())
	s.bob.has(t, "entry 0")
	s.bob.has(t, s.said.stored)
	s.bob.has(t, "entry 19")
	h, err := s.carol.room(t, "ledger").History(t.Context(), sdk.MessageQuery{})
	if err != nil || len(h) != 20 || string(h[10].Data) != s.said.stored {
		t.Fatalf("%d messages in carol's history: %v", len(h), err)
	}
	// Dave comes later: he reads from then on, and before only by a grant.
	if _, _, err := s.alice.keys.AddMember(t.Context(), "ledger", "dave", bus.Reader); err != nil {
		t.Fatal(err)
	}
	if _, err := room.Publish(t.Context(), "entry", []byte("for dave")); err != nil {
		t.Fatal(err)
	}
	texts := func() (out []string) {
		h, err := s.dave.room(t, "ledger").History(t.Context(), sdk.MessageQuery{})
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range h {
			out = append(out, string(m.Data))
		}
		return out
	}
	if got := texts(); !slices.Equal(got, []string{"for dave"}) {
		t.Fatalf("dave reads %q", got)
	}
	if _, err := s.carol.keys.Grant(t.Context(), "ledger", s.dave.key, 1); err != nil {
		t.Fatal(err)
	}
	cluster.WaitFor(t, 10*time.Second, "dave to read what was before", func() error {
		if got := texts(); len(got) != 21 {
			return fmt.Errorf("%d messages", len(got))
		}
		return nil
	})
}

// removed takes bob out of a room. An owner who is online makes the next key by
// herself; what bob has, with all that is in the servers, opens nothing of it.
func (s *sealedWorld) removed(t *testing.T) {
	before, err := s.carol.keys.Room(t.Context(), "vault")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	s.patiently("remove bob", func(ctx context.Context) (kv.Result, error) { return s.store.RemoveMember(ctx, "vault", s.bob.key) })
	var now sdk.RoomStanding
	cluster.WaitFor(t, 20*time.Second, "an owner to make another key", func() error {
		if now, err = s.carol.keys.Room(t.Context(), "vault"); err != nil || now.Epoch == before.Epoch || now.RekeyRequired {
			return fmt.Errorf("%+v %w", now, err)
		}
		return nil
	})
	t.Logf("from removal to the next key: %s", time.Since(began).Round(time.Millisecond))

	// What goes over the wire after that, and everything in the bucket.
	wire := make(chan *nats.Msg, 16)
	nc := s.plain(t, 1, s.carol.person)
	if _, err := nc.ChanSubscribe(bus.RoomSubscribe("vault"), wire); err != nil {
		t.Fatal(err)
	}
	s.must2(t, nc.Flush())
	if _, err := s.carol.room(t, "vault").Publish(t.Context(), "news", []byte("bob is gone")); err != nil {
		t.Fatal(err)
	}
	raw := (<-wire).Data
	if epoch, err := seal.MessageEpoch(raw); err != nil || epoch != now.Epoch {
		t.Fatalf("the message is under epoch %d (%v), not %d", epoch, err, now.Epoch)
	}
	private, _ := s.bob.sealKey(t, 1)
	rosters, envelopes := s.bucket(t, "vault")
	newest := rosters[now.Epoch]
	if _, in := newest.Member(s.bob.key); in {
		t.Fatal("bob is in the newest roster")
	}
	opened := 0
	for _, e := range envelopes {
		for _, r := range rosters {
			k, err := seal.OpenEnvelope(e, private, r, newest)
			if err != nil {
				continue
			}
			opened++
			for _, r := range rosters {
				if _, err := (seal.Epoch{Roster: r, Key: k}).Open(s.carol.key, "news", raw); err == nil {
					t.Fatalf("bob reads with the key of epoch %d", r.Epoch)
				}
			}
		}
	}
	if opened == 0 { // else it would prove nothing
		t.Fatal("bob's old envelopes do not open")
	}
	carol, _ := s.carol.sealKey(t, 1)
	for _, e := range envelopes {
		if k, err := seal.OpenEnvelope(e, carol, newest, newest); err == nil {
			if _, err := (seal.Epoch{Roster: newest, Key: k}).Open(s.carol.key, "news", raw); err != nil {
				t.Fatalf("carol does not read her own: %v", err)
			}
			return
		}
	}
	t.Fatal("carol has no envelope of the newest epoch")
}

// bucket is everything that the servers have of a room's keys.
func (s *sealedWorld) bucket(t *testing.T, room bus.RoomID) (rosters map[uint64]*seal.Roster, envelopes [][]byte) {
	t.Helper()
	js, err := jetstream.New(s.Ops())
	if err != nil {
		t.Fatal(err)
	}
	c, err := js.OrderedConsumer(t.Context(), kv.StreamName(kv.RoomKeys), jetstream.OrderedConsumerConfig{FilterSubjects: []string{"$KV." + kv.RoomKeys + "." + string(room) + ".>"}})
	if err != nil {
		t.Fatal(err)
	}
	rosters = map[uint64]*seal.Roster{}
	for {
		m, err := c.Next(jetstream.FetchMaxWait(10 * time.Second))
		if err != nil {
			t.Fatal(err)
		}
		var r struct{ Roster, Envelope []byte }
		if err := json.Unmarshal(m.Data(), &r); err != nil {
			t.Fatal(err)
		}
		if r.Roster != nil {
			roster, err := seal.ParseRoster(r.Roster)
			if err != nil {
				t.Fatal(err)
			}
			rosters[roster.Epoch] = roster
		} else {
			envelopes = append(envelopes, r.Envelope)
		}
		md, err := m.Metadata()
		if err != nil {
			t.Fatal(err)
		}
		if md.NumPending == 0 {
			return rosters, envelopes
		}
	}
}

// commands does the same with unibusctl: make a room, let somebody in, verify,
// remove, check.
func (s *sealedWorld) commands(t *testing.T) {
	alice, bob := s.addUser("anna"), s.addUser("bert")
	seeds := map[*person]string{alice: alice.seedFile(t), bob: bob.seedFile(t)}
	run := func(p *person, args ...string) cluster.Result {
		t.Helper()
		r := s.CLIEnvironment(map[string]string{"UNIBUS_IDENTITY": seeds[p]}, nil, args...)
		if !slices.Contains(args, "history") { // whose purpose it is to show them
			s.said.commands = append(s.said.commands, r.Stdout+r.Stderr...)
		}
		return r
	}
	want := func(p *person, code int, says string, args ...string) string {
		t.Helper()
		r := run(p, args...)
		if r.Code != code || !strings.Contains(r.Stdout+r.Stderr, says) {
			t.Fatalf("unibusctl %s: exit %d, want %d with %q:\n%s\n%s", strings.Join(args, " "), r.Code, code, says, r.Stdout, r.Stderr)
		}
		return r.Stdout
	}
	want(alice, 0, "room desk", "room", "create", "desk", "--encrypted", "--durable")
	want(alice, 0, "OK", "room", "check", "desk")
	want(alice, 0, "bert is writer", "room", "add", "desk", "bert") // has published no key yet
	want(alice, 1, "1 wait", "room", "check", "desk")               // so he waits
	want(bob, 0, "number", "room", "verify", "desk")                // and publishes it
	want(alice, 0, "has epoch 2", "room", "rekey", "desk", "--admit", "bert")
	want(alice, 0, "OK", "room", "check")
	want(alice, 0, "", "room", "pub", "desk", s.said.stored, "--topic", "greeting")
	want(bob, 0, s.said.stored, "room", "history", "desk")
	number := func(p *person) string {
		var out struct{ Number string }
		if err := json.Unmarshal([]byte(want(p, 0, "number", "--json", "room", "verify", "desk")), &out); err != nil || len(out.Number) != 47 {
			t.Fatalf("%q %v", out.Number, err)
		}
		return out.Number
	}
	if number(alice) != number(bob) {
		t.Error("two members see two numbers of one room")
	}
	want(alice, 0, seal.UserNumber(alice.key, bob.key), "user", "verify", "bert", "--yes")
	want(bob, 0, seal.UserNumber(alice.key, bob.key), "user", "verify", "anna")
	want(alice, 0, "removed", "room", "remove", "desk", "bert")
	want(alice, 0, "OK", "room", "check", "desk") // the removal made the next key
	want(alice, 0, "already_so", "room", "rekey", "desk")
	if info, err := os.Stat(seeds[alice] + ".trust"); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the trust file: %v %v", info, err)
	}
	// A key that the name never had before is refused until it is accepted.
	s.patiently("rotate bert", func(ctx context.Context) (kv.Result, error) {
		return s.store.RotateUser(ctx, bob.key, newPerson(t, "bert").key)
	})
	want(alice, 1, "had another key before", "user", "verify", "bert")
	want(alice, 0, "", "room", "add", "desk", "bert")
	want(alice, 1, "wait", "room", "check", "desk") // the API adds; her keys refuse
	want(alice, 0, "", "user", "verify", "bert", "--accept", "--yes")
}
