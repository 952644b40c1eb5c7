package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/seal"
	"unibus.internal/bus/sig"
)

// villain is the servers of an attacker: they have everything that clients send
// them, and answer what they like. Left alone they answer what real ones would.
type villain struct {
	*httptest.Server

	mu        sync.Mutex
	creator   bus.UserKey
	users     map[bus.UserKey]*bus.MemberKey // by what they say of them; also those who are in no room
	members   map[bus.UserKey]bus.RoomRole
	rosters   []*seal.Roster
	raw       [][]byte
	envelopes map[string][]byte
	required  bool

	lie    func(caller bus.UserKey, k *bus.RoomKeys) // about the keys of the room; may be nil
	swap   func([]bus.MemberKey) []bus.MemberKey     // about its members; may be nil
	before func(r *http.Request)                     // called before a request is worked on; may be nil
}

func newVillain(t *testing.T) *villain {
	v := &villain{users: map[bus.UserKey]*bus.MemberKey{}, members: map[bus.UserKey]bus.RoomRole{}, envelopes: map[string][]byte{}}
	v.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		who, err := sig.Verify(r, body, []string{r.Host}, time.Now())
		if err != nil {
			t.Error(err)
		}
		if v.before != nil {
			v.before(r)
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		v.answer(w, r, who.Key, body)
	}))
	t.Cleanup(v.Close)
	return v
}

func (v *villain) answer(w http.ResponseWriter, r *http.Request, caller bus.UserKey, body []byte) {
	say := func(doc any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(doc)
	}
	me := v.users[caller]
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	switch {
	case path == "me":
		say(map[string]any{"user": bus.UserDetail{UserInfo: bus.UserInfo{SignPub: caller, Handle: me.Handle}, EncryptionKey: me.EncryptionKey}})
	case path == "me/encryption-key":
		me.EncryptionKey = &bus.EncryptionKey{}
		_ = json.Unmarshal(body, me.EncryptionKey)
		proven(w, r)
	case strings.HasPrefix(path, "users/"):
		for k, u := range v.users {
			if string(u.Handle) == strings.TrimPrefix(path, "users/") {
				say(map[string]any{"user": bus.UserDetail{UserInfo: bus.UserInfo{SignPub: k, Handle: u.Handle}, EncryptionKey: u.EncryptionKey}})
				return
			}
		}
		writeProblem(w, http.StatusNotFound, bus.NotFound, "no user", "")
	case strings.HasPrefix(path, "rooms/ops/members/"):
		k, _ := bus.ParseUserKey(strings.TrimPrefix(path, "rooms/ops/members/"))
		var in struct{ Role bus.RoomRole }
		_ = json.Unmarshal(body, &in)
		v.members[k] = in.Role
		proven(w, r)
	case path == "rooms/ops/encryption-keys":
		list := []bus.MemberKey{}
		for k, role := range v.members {
			u := *v.users[k]
			u.Role = role
			list = append(list, u)
		}
		if v.swap != nil {
			list = v.swap(list)
		}
		say(map[string]any{"room": "ops", "members": list})
	case path == "rooms/ops/keys":
		after, _ := strconv.Atoi(r.URL.Query().Get("after"))
		k := bus.RoomKeys{Room: "ops", Creator: v.creator, Epoch: uint64(len(v.raw)), RekeyRequired: v.required || len(v.raw) == 0}
		for i := after; i < len(v.raw); i++ {
			k.Epochs = append(k.Epochs, bus.RoomEpoch{Epoch: uint64(i + 1), Roster: v.raw[i], Envelope: v.envelopes[slot(uint64(i+1), caller)]})
		}
		if v.lie != nil {
			v.lie(caller, &k)
		}
		say(map[string]any{"keys": k})
	case path == "rooms/ops/epochs":
		var in struct {
			Roster    []byte
			Envelopes [][]byte
		}
		_ = json.Unmarshal(body, &in)
		roster, err := seal.ParseRoster(in.Roster)
		if err != nil || roster.Epoch != uint64(len(v.raw)+1) {
			writeProblem(w, http.StatusConflict, bus.Conflict, "somebody else was faster", "")
			return
		}
		v.take(roster, in.Envelopes)
		proven(w, r)
	case strings.HasPrefix(path, "rooms/ops/keys/"):
		k, _ := bus.ParseUserKey(strings.TrimPrefix(path, "rooms/ops/keys/"))
		var in struct{ Envelopes []bus.GrantedKey }
		_ = json.Unmarshal(body, &in)
		for _, g := range in.Envelopes {
			v.envelopes[slot(g.Epoch, k)] = g.Envelope
		}
		proven(w, r)
	default:
		writeProblem(w, http.StatusNotFound, bus.NotFound, "no such route "+path, "")
	}
}

func slot(epoch uint64, k bus.UserKey) string { return fmt.Sprint(epoch, " ", k) }

func (v *villain) take(r *seal.Roster, envelopes [][]byte) {
	v.rosters, v.raw, v.required = append(v.rosters, r), append(v.raw, r.Bytes()), false
	for i, m := range r.Members {
		v.envelopes[slot(r.Epoch, m.User)] = envelopes[i]
	}
}

// set changes what the servers have, or say.
func (v *villain) set(f func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	f()
}

// sealed is one user of encrypted rooms.
type sealed struct {
	*sig.Identity
	keys   *Keys
	trust  TrustStore
	name   string
	now    func() time.Time
	mu     sync.Mutex
	alerts []Alert
}

func (v *villain) user(t *testing.T, name string) *sealed {
	t.Helper()
	s := &sealed{Identity: newIdentity(t), name: name, trust: MemoryTrust()}
	v.set(func() { v.users[s.Key()] = &bus.MemberKey{SignPub: s.Key(), Handle: bus.Handle(name)} })
	s.start(t, v)
	if _, err := s.keys.Announce(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// start is a new program of that user, with the memory of the one before.
func (s *sealed) start(t *testing.T, v *villain) {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(v.Certificate())
	api, err := New(Config{URLs: []string{v.URL}, TLS: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, Identity: s.Identity})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Close)
	s.now = func() time.Time { return time.Now() }
	s.keys, err = NewKeys(KeysConfig{
		API: api, Identity: s.Identity, Trust: s.trust, Now: func() time.Time { return s.now() },
		OnAlert: func(a Alert) { s.mu.Lock(); defer s.mu.Unlock(); s.alerts = append(s.alerts, a) },
	})
	if err != nil {
		t.Fatal(err)
	}
}

// later is s in a time in which nothing that was asked for counts as fresh.
func (s *sealed) later(d time.Duration) {
	was := s.now()
	s.now = func() time.Time { return was.Add(d) }
}

func (s *sealed) alarms() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.alerts)
}

func (s *sealed) seal(t *testing.T, text string) ([]byte, error) {
	t.Helper()
	return s.keys.of("ops").seal(t.Context(), "disk", []byte(text))
}

// company is a room of alice, an owner, bob, a writer, and carol, another owner.
func company(t *testing.T) (v *villain, alice, bob, carol *sealed) {
	t.Helper()
	v = newVillain(t)
	alice, bob, carol = v.user(t, "alice"), v.user(t, "bob"), v.user(t, "carol")
	v.set(func() { v.creator, v.members[alice.Key()] = alice.Key(), bus.Owner })
	fine(t, alice.rekey(t, RekeyOptions{}))
	for who, role := range map[string]bus.RoomRole{"bob": bus.Writer, "carol": bus.Owner} {
		if _, _, err := alice.keys.AddMember(t.Context(), "ops", who, role); err != nil {
			t.Fatal(err)
		}
	}
	return v, alice, bob, carol
}

func (s *sealed) rekey(t *testing.T, o RekeyOptions) error {
	_, err := s.keys.Rekey(t.Context(), "ops", o)
	return err
}

func fine(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func refused(t *testing.T, err error, code bus.Code, words string) {
	t.Helper()
	if bus.CodeOf(err) != code || !strings.Contains(err.Error(), words) {
		t.Fatalf("%v (%q), want %q with %q", err, bus.CodeOf(err), code, words)
	}
}

// Members of an encrypted room understand each other, and a new one from when
// they came, or from before if an owner grants it.
func TestKeys(t *testing.T) {
	v, alice, bob, carol := company(t)
	listen := bob.keys.of("ops").listen(true)
	for i := range 3 {
		raw, err := alice.seal(t, fmt.Sprint("message ", i))
		fine(t, err)
		if bytes.Contains(raw, []byte("message")) {
			t.Fatal("the message is not encrypted")
		}
		got, err := listen.open(t.Context(), alice.Key(), "disk", raw)
		fine(t, err)
		if string(got) != fmt.Sprint("message ", i) {
			t.Fatalf("%q was heard", got)
		}
	}
	if n := bob.alarms(); n != 0 {
		t.Fatalf("%d alarms without a cause: %+v", n, bob.alerts)
	}
	raw, err := alice.seal(t, "before dave")
	fine(t, err)
	dave := v.user(t, "dave")
	_, done, err := carol.keys.AddMember(t.Context(), "ops", "dave", bus.Reader)
	fine(t, err)
	if len(done.Changes) != 1 || done.Changes[0].User != dave.Key() || done.Members != 4 {
		t.Fatalf("%+v", done)
	}
	read := func() error {
		_, err := dave.keys.of("ops").listen(false).open(t.Context(), alice.Key(), "disk", raw)
		return err
	}
	refused(t, read(), bus.Forbidden, "no key")
	if _, err := dave.keys.Grant(t.Context(), "ops", bob.Key(), 1); bus.CodeOf(err) != bus.Forbidden {
		t.Fatalf("a reader grants: %v", err)
	}
	n, err := carol.keys.Grant(t.Context(), "ops", dave.Key(), 1)
	fine(t, err)
	if n == 0 {
		t.Fatal("nothing was granted")
	}
	dave.later(2 * askAgain)
	fine(t, read())
	if _, err := dave.seal(t, "x"); bus.CodeOf(err) != bus.Forbidden {
		t.Fatalf("a reader writes: %v", err)
	}

	// Bob goes. The next owner online makes another key; what bob has opens
	// nothing of it, whatever the servers give him.
	v.set(func() { delete(v.members, bob.Key()); v.required = true })
	fine(t, bob.keys.Duty(t.Context(), "ops")) // not his to do
	if v.required != true {
		t.Fatal("a writer made a key")
	}
	fine(t, carol.keys.Duty(t.Context(), "ops"))
	alice.later(2 * keysFresh)
	raw, err = alice.seal(t, "after bob")
	fine(t, err)
	v.set(func() {
		v.lie = func(caller bus.UserKey, k *bus.RoomKeys) {
			for i := range k.Epochs { // everybody's envelopes, one after the other
				for _, e := range v.envelopes {
					if caller == bob.Key() && k.Epochs[i].Envelope == nil {
						k.Epochs[i].Envelope = e
					}
				}
			}
		}
	})
	bob.later(2 * keysFresh)
	if _, err := listen.open(t.Context(), alice.Key(), "disk", raw); bus.CodeOf(err) != bus.Forbidden {
		t.Fatalf("bob reads on: %v", err)
	}
	if _, err := bob.seal(t, "still there"); bus.CodeOf(err) != bus.Forbidden {
		t.Fatalf("bob writes on: %v", err)
	}
}

// Of two owners who make one epoch, one has made it; the other discards theirs
// and goes on with what there is.
func TestKeysRace(t *testing.T) {
	v, alice, bob, carol := company(t)
	v.set(func() { delete(v.members, bob.Key()); v.required = true })
	before := len(v.raw)
	var both sync.WaitGroup
	arrived := make(chan struct{}, 2)
	ready := make(chan struct{})
	once := sync.OnceFunc(func() { close(ready) })
	v.before = func(r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/epochs") {
			if arrived <- struct{}{}; len(arrived) == 2 {
				once()
			}
			<-ready
		}
	}
	for _, s := range []*sealed{alice, carol} {
		both.Go(func() {
			if err := s.keys.Duty(context.Background(), "ops"); err != nil {
				t.Error(err)
			}
		})
	}
	both.Wait()
	if n := len(v.raw) - before; n != 1 {
		t.Fatalf("%d epochs were made", n)
	}
	raw, err := alice.seal(t, "x")
	fine(t, err)
	_, err = carol.keys.of("ops").listen(true).open(t.Context(), alice.Key(), "disk", raw)
	fine(t, err)
}

// The servers put nobody into a room, and make nobody its owner: whom they name
// as a member gets no key from an owner who did not say so.
func TestKeysNoGhost(t *testing.T) {
	v, alice, bob, carol := company(t)
	ghost := v.user(t, "ghost")
	v.set(func() {
		v.members[ghost.Key()], v.members[bob.Key()] = bus.Owner, bus.Owner
		v.required = true
	})
	fine(t, carol.keys.Duty(t.Context(), "ops"))
	fine(t, alice.rekey(t, RekeyOptions{Force: true}))
	newest := v.rosters[len(v.rosters)-1]
	if _, in := newest.Member(ghost.Key()); in {
		t.Fatal("a ghost is in the roster")
	}
	if m, _ := newest.Member(bob.Key()); m.Role != bus.Writer {
		t.Fatalf("bob was made %s", m.Role)
	}
	if v.envelopes[slot(newest.Epoch, ghost.Key())] != nil {
		t.Fatal("a ghost has an envelope")
	}

	// A roster that the ghost makes is believed by nobody, and they say so.
	k, err := seal.NewKey(rand.Reader)
	fine(t, err)
	own := v.users[ghost.Key()].EncryptionKey
	forged := seal.Roster{
		Room: "ops", Epoch: newest.Epoch + 1, Previous: newest.Hash(), CreatedAt: time.Now(), Commitment: k.Commitment("ops", newest.Epoch+1),
		Members: append(slices.Clone(newest.Members), seal.Member{User: ghost.Key(), Role: bus.Owner, N: 1, Key: seal.HashOf(own.Public)}),
	}
	signed, err := forged.Sign(ghost)
	fine(t, err)
	var envelopes [][]byte
	for _, m := range signed.Members {
		e, err := seal.SealEnvelope(ghost, signed, k, m.User, *v.users[m.User].EncryptionKey)
		fine(t, err)
		envelopes = append(envelopes, e)
	}
	v.set(func() { v.take(signed, envelopes) })
	for _, s := range []*sealed{alice, bob, carol} {
		alarms := s.alarms()
		s.later(2 * keysFresh)
		_, err := s.seal(t, "x")
		refused(t, err, bus.Forbidden, "who was no owner")
		if s.alarms() == alarms {
			t.Errorf("%s was silent", s.name)
		}
	}
}

// Whatever the servers do to the history of a room, who has seen it refuses, and
// does not send: not after a restart either.
func TestKeysServerForgets(t *testing.T) {
	v, alice, bob, carol := company(t)
	mallory := v.user(t, "mallory")
	fine(t, alice.rekey(t, RekeyOptions{Force: true}))
	for _, s := range []*sealed{alice, bob, carol} {
		if _, err := s.seal(t, "x"); err != nil {
			t.Fatal(err)
		}
	}
	n := len(v.raw)
	fork := func() [][]byte { // a true owner's other branch, as a former owner could make one
		before := v.rosters[n-2]
		k, err := seal.NewKey(rand.Reader)
		fine(t, err)
		r, err := seal.Roster{Room: "ops", Epoch: before.Epoch + 1, Previous: before.Hash(), CreatedAt: time.Now(), Commitment: k.Commitment("ops", before.Epoch+1), Members: before.Members}.Sign(carol)
		fine(t, err)
		return [][]byte{r.Bytes()}
	}()
	for name, c := range map[string]struct {
		lie   func(bus.UserKey, *bus.RoomKeys)
		words string
	}{
		"rolled back": {func(_ bus.UserKey, k *bus.RoomKeys) {
			k.Epoch = uint64(n - 1)
			k.Epochs = slices.DeleteFunc(k.Epochs, func(e bus.RoomEpoch) bool { return e.Epoch >= uint64(n) })
		}, "an old state"},
		"gone": {func(_ bus.UserKey, k *bus.RoomKeys) { k.Epoch, k.Epochs = 0, nil }, "an old state"},
		"another branch": {func(_ bus.UserKey, k *bus.RoomKeys) {
			for i := range k.Epochs {
				if k.Epochs[i].Epoch == uint64(n) {
					k.Epochs[i].Roster = fork[0]
				}
			}
		}, "than before"},
		"another beginning": {func(_ bus.UserKey, k *bus.RoomKeys) {
			key, _ := seal.NewKey(rand.Reader)
			r, err := seal.Roster{
				Room: "ops", Epoch: 1, CreatedAt: time.Now(), Commitment: key.Commitment("ops", 1),
				Members: []seal.Member{{User: mallory.Key(), Role: bus.Owner, N: 1, Key: seal.HashOf(v.users[mallory.Key()].EncryptionKey.Public)}},
			}.Sign(mallory)
			fine(t, err)
			k.Creator, k.Epoch, k.Epochs, k.Next = mallory.Key(), 1, []bus.RoomEpoch{{Epoch: 1, Roster: r.Bytes()}}, 0
		}, ""},
		"epochs left out": {func(_ bus.UserKey, k *bus.RoomKeys) {
			k.Epochs = slices.DeleteFunc(k.Epochs, func(e bus.RoomEpoch) bool { return e.Epoch == 2 })
		}, ""},
		"epochs renamed": {func(_ bus.UserKey, k *bus.RoomKeys) {
			for i := range k.Epochs {
				k.Epochs[i].Epoch += 1000
			}
		}, "as that of epoch"},
	} {
		t.Run(name, func(t *testing.T) {
			v.set(func() { v.lie = c.lie })
			defer v.set(func() { v.lie = nil })
			s := bob
			s.start(t, v) // what it knows is what it remembers
			alarms := s.alarms()
			_, err := s.seal(t, "secret")
			refused(t, err, bus.Forbidden, c.words)
			if s.alarms() == alarms {
				t.Error("it was silent")
			}
		})
	}
	bob.start(t, v)
	if _, err := bob.seal(t, "x"); err != nil {
		t.Fatalf("and when the servers are honest again: %v", err)
	}
	// The running program, which has state of its own, is no different.
	v.set(func() { v.lie = func(_ bus.UserKey, k *bus.RoomKeys) { k.Epoch, k.Epochs = uint64(n-1), nil } })
	alice.later(2 * keysFresh)
	_, err := alice.seal(t, "secret")
	refused(t, err, bus.Forbidden, "an old state")
}

// Servers that call a room plain that is remembered as encrypted are not believed,
// also by a program that starts anew: nothing is sent in the clear.
func TestKeysServerCallsItPlain(t *testing.T) {
	v, alice, _, _ := company(t)
	alice.start(t, v)
	if is, err := alice.keys.encrypted("ops", true); err != nil || !is {
		t.Fatalf("an encrypted room: %t, %v", is, err)
	}
	_, err := alice.keys.encrypted("ops", false)
	refused(t, err, bus.Forbidden, "not encrypted, and it is")
	refused(t, (&Conn{cfg: DialConfig{Keys: alice.keys}}).inTheClear("ops"), bus.Forbidden, "not encrypted, and it is")
	if alice.alarms() != 2 {
		t.Errorf("%d alarms, want one for each attempt", alice.alarms())
	}
	for room, keys := range map[bus.RoomID]*Keys{"other": alice.keys, "ops": nil} {
		if is, err := keys.encrypted(room, false); err != nil || is {
			t.Errorf("room %s, of which nothing is remembered: %t, %v", room, is, err)
		}
	}
}

// Whose key the servers swap is not encrypted to: an encryption key is signed by
// its user, its number only grows, and a handle means who it meant.
func TestKeysSwapped(t *testing.T) {
	v, alice, bob, _ := company(t)
	mallory := v.user(t, "mallory")
	stolen := v.users[mallory.Key()].EncryptionKey
	first := *v.users[bob.Key()].EncryptionKey
	if _, err := bob.keys.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.set(func() { v.required = true })
	fine(t, alice.keys.Duty(t.Context(), "ops"))
	epochs := len(v.raw)
	for name, swap := range map[string]*bus.EncryptionKey{
		"another's key":       stolen,
		"an older key":        &first,
		"a key nobody signed": {N: 3, Public: first.Public, CreatedAt: first.CreatedAt, Signature: first.Signature},
		"no key":              nil,
		"another public half": {N: 2, Public: stolen.Public, CreatedAt: first.CreatedAt, Signature: first.Signature},
	} {
		v.set(func() {
			v.swap = func(list []bus.MemberKey) []bus.MemberKey {
				for i := range list {
					if list[i].SignPub == bob.Key() {
						list[i].EncryptionKey = swap
					}
				}
				return list
			}
		})
		if err := alice.rekey(t, RekeyOptions{Force: true}); err == nil {
			t.Errorf("%s is sealed to", name)
		}
	}
	if len(v.raw) != epochs {
		t.Fatal("an epoch was made")
	}
	v.set(func() {
		v.swap = nil
		v.users[bob.Key()].Handle, v.users[mallory.Key()].Handle = "robert", "bob"
	})
	_, _, err := alice.keys.AddMember(t.Context(), "ops", "bob", bus.Owner)
	refused(t, err, bus.Forbidden, "the servers say that bob has the key")
	n, err := alice.keys.Number(t.Context(), "bob")
	fine(t, err)
	if n.Was == nil || *n.Was != bob.Key() || n.User != mallory.Key() {
		t.Fatalf("%+v", n)
	}
	// Under our own name, too.
	v.set(func() { v.users[bob.Key()].EncryptionKey = stolen })
	bob.start(t, v)
	_, err = bob.keys.Announce(t.Context())
	refused(t, err, bus.Forbidden, "it is not ours")
}

// An envelope that was moved gives no key, and who has no key of the newest
// epoch does not send.
func TestKeysEnvelopesMoved(t *testing.T) {
	v, alice, bob, carol := company(t)
	n := uint64(len(v.raw))
	for name, from := range map[string]string{
		"of another member": slot(n, carol.Key()),
		"of another epoch":  slot(n-1, alice.Key()),
	} {
		v.set(func() {
			v.lie = func(caller bus.UserKey, k *bus.RoomKeys) {
				for i := range k.Epochs {
					if caller == bob.Key() && k.Epochs[i].Epoch == n {
						k.Epochs[i].Envelope = v.envelopes[from]
					}
				}
			}
		})
		bob.start(t, v)
		alarms := bob.alarms()
		_, err := bob.seal(t, "x")
		refused(t, err, bus.Unavailable, "is not there yet")
		if bob.alarms() == alarms {
			t.Errorf("%s: it was silent", name)
		}
	}
	_ = alice
}

// What is repeated, left out, late, old or not encrypted is refused, or told.
func TestKeysMessages(t *testing.T) {
	v, alice, bob, carol := company(t)
	var raw [][]byte
	for range 5 {
		m, err := alice.seal(t, "x")
		fine(t, err)
		raw = append(raw, m)
	}
	l := bob.keys.of("ops").listen(true)
	open := func(from *sealed, m []byte) error {
		_, err := l.open(t.Context(), from.Key(), "disk", m)
		return err
	}
	fine(t, open(alice, raw[0]))
	refused(t, open(alice, raw[0]), bus.Conflict, "has come before")
	refused(t, open(carol, raw[1]), bus.Unauthenticated, "does not open")
	refused(t, open(alice, []byte("plain text")), bus.Forbidden, "not encrypted")
	alarms := bob.alarms()
	fine(t, open(alice, raw[3]))
	fine(t, open(alice, raw[2]))
	if bob.alarms() != alarms+2 {
		t.Fatalf("a gap and a late message are not told: %+v", bob.alerts[alarms:])
	}
	// Who starts anew is not shown yesterday as today.
	bob.start(t, v)
	bob.later(2 * clockTolerance)
	l = bob.keys.of("ops").listen(true)
	refused(t, open(alice, raw[4]), bus.Forbidden, "was sent")
	l = bob.keys.of("ops").listen(false) // a room that stores what is said may
	fine(t, open(alice, raw[4]))

	// An epoch that is over is over for live rooms.
	last, err := alice.seal(t, "x")
	fine(t, err)
	fine(t, carol.rekey(t, RekeyOptions{Force: true}))
	bob.start(t, v)
	if _, err := bob.keys.Room(t.Context(), "ops"); err != nil {
		t.Fatal(err)
	}
	l = bob.keys.of("ops").listen(true)
	fine(t, open(alice, last)) // it was under way
	bob.later(2 * oldEpochGrace)
	l = bob.keys.of("ops").listen(true)
	refused(t, open(alice, last), bus.Forbidden, "which is over")
}

// A room without an owner is recovered by an owner whom an admin names, for
// those who have pinned this admin, and for nobody else.
func TestKeysAppointment(t *testing.T) {
	v, alice, bob, carol := company(t)
	root := v.user(t, "root")
	v.set(func() {
		delete(v.members, alice.Key())
		v.members[carol.Key()], v.members[bob.Key()] = bus.Writer, bus.Owner
		v.required = true
	})
	if err := bob.rekey(t, RekeyOptions{}); bus.CodeOf(err) != bus.Forbidden {
		t.Fatalf("bob made himself an owner: %v", err)
	}
	text, err := root.keys.Appoint(t.Context(), "ops", bob.Key())
	fine(t, err)
	a, err := ParseAppointment(text)
	fine(t, err)
	fine(t, bob.keys.Confirm("root", root.Key(), true))
	fine(t, bob.rekey(t, RekeyOptions{Appointment: a}))
	_, err = bob.seal(t, "x")
	fine(t, err)
	carol.later(2 * keysFresh)
	_, err = carol.seal(t, "x")
	refused(t, err, bus.Forbidden, "no admin that is trusted here")
	fine(t, carol.keys.Confirm("root", root.Key(), true))
	_, err = carol.seal(t, "x")
	fine(t, err)
	if err := bob.rekey(t, RekeyOptions{Appointment: a, Force: true}); err == nil {
		t.Fatal("an appointment is good twice")
	}
}

// What is trusted is in a file that nobody else may write, and two programs
// lose nothing of each other's.
func TestFileTrust(t *testing.T) {
	path := filepath.Join(t.TempDir(), "trust.json")
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			s := FileTrust(path) // as another program
			for n := range 10 {
				if err := s.Update(func(tr *Trust) error {
					tr.Rooms[bus.RoomID(fmt.Sprintf("r%d-%d", i, n))] = TrustedRoom{Epoch: 1}
					return nil
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	count := 0
	fine(t, FileTrust(path).Update(func(tr *Trust) error { count = len(tr.Rooms); return nil }))
	info, err := os.Stat(path)
	fine(t, err)
	if count != 80 || info.Mode().Perm() != 0o600 {
		t.Fatalf("%d rooms, mode %v", count, info.Mode())
	}
	fine(t, os.Chmod(path, 0o622))
	refused(t, FileTrust(path).Update(func(*Trust) error { return nil }), bus.Forbidden, "by others")
	fine(t, os.Chmod(path, 0o600))
	fine(t, os.WriteFile(path, []byte("{"), 0o600))
	refused(t, FileTrust(path).Update(func(*Trust) error { return nil }), bus.Internal, "cannot be read")
}
