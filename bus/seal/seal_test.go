package seal

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
)

var moment = time.Date(2026, 11, 25, 10, 0, 0, 0, time.UTC)

// person is a user as the tests make them: from a name, so that vectors stay.
type person struct {
	*sig.Identity
	seed    string
	private *PrivateKey
	public  bus.EncryptionKey
}

func someone(t testing.TB, name string) person {
	t.Helper()
	raw := sha256.Sum256([]byte("unibus test identity " + name))
	seed, err := nkeys.EncodeSeed(nkeys.PrefixByteUser, raw[:])
	must(t, err)
	id, err := sig.ParseIdentity(seed)
	must(t, err)
	p := person{Identity: id, seed: string(seed)}
	p.private, err = NewPrivateKey(id, 1)
	must(t, err)
	p.public, err = p.private.Bind(id, moment)
	must(t, err)
	return p
}

func (p person) as(role bus.RoomRole) Member {
	return Member{User: p.Key(), Role: role, N: p.public.N, Key: HashOf(p.public.Public)}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t testing.TB, err error, want bus.Code, what string) {
	t.Helper()
	if got := bus.CodeOf(err); got != want {
		t.Fatalf("%s: %v (%q), want %q", what, err, got, want)
	}
}

func keyFrom(text string) Key { return sha256.Sum256([]byte(text)) }

// epoch makes the roster that follows before, and its key.
func epoch(t testing.TB, signer person, before *Roster, members ...Member) Epoch {
	t.Helper()
	r := Roster{Room: "ops", Epoch: 1, CreatedAt: moment, Members: members}
	if before != nil {
		r.Room, r.Epoch, r.Previous = before.Room, before.Epoch+1, before.Hash()
	}
	k := keyFrom(fmt.Sprintf("key %s %d", r.Room, r.Epoch))
	r.Commitment = k.Commitment(r.Room, r.Epoch)
	signed, err := r.Sign(signer)
	must(t, err)
	return Epoch{signed, k}
}

func sender(t testing.TB, p person) *Sender {
	t.Helper()
	s, err := NewSender(p, rand.Reader, func() time.Time { return moment })
	must(t, err)
	return s
}

// A roster is accepted after the one it names, from an owner of that one, and
// from nobody else: not from a member, not from somebody who was removed, not
// from a stranger who makes himself an owner in it.
func TestFollows(t *testing.T) {
	alice, bob, carol, mallory := someone(t, "alice"), someone(t, "bob"), someone(t, "carol"), someone(t, "mallory")
	first := epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer), carol.as(bus.Owner)).Roster
	second := epoch(t, carol, first, alice.as(bus.Owner), carol.as(bus.Owner)).Roster
	follows := func(r, before *Roster) error { return r.Follows(before, "ops", alice.Key(), nil) }
	must(t, follows(first, nil))
	must(t, follows(second, first))

	for what, c := range map[string]struct{ r, before *Roster }{
		"a first roster by another than the creator": {epoch(t, mallory, nil, mallory.as(bus.Owner)).Roster, nil},
		"a ghost who makes himself owner":            {epoch(t, mallory, first, alice.as(bus.Owner), mallory.as(bus.Owner)).Roster, first},
		"a member who makes himself owner":           {epoch(t, bob, first, alice.as(bus.Owner), bob.as(bus.Owner)).Roster, first},
		"a roll back to the first":                   {first, second},
		"the same once more":                         {second, second},
		"an epoch left out":                          {epoch(t, carol, second, carol.as(bus.Owner)).Roster, first},
		"a second beginning":                         {first, first},
		"no beginning":                               {second, nil},
	} {
		wantCode(t, follows(c.r, c.before), bus.Forbidden, what)
	}

	rival := epoch(t, alice, first, alice.as(bus.Owner)).Roster
	must(t, follows(rival, first)) // a fork is no error of form: who has seen second sees it
	wantCode(t, follows(epoch(t, alice, rival, alice.as(bus.Owner)).Roster, second), bus.Forbidden, "a successor of the other branch")

	wantCode(t, first.Follows(nil, "dev", alice.Key(), nil), bus.Forbidden, "the roster of another room")
}

// When all owners are lost, an admin whom the reader trusts may name one; the
// naming is good for one roster after one other.
func TestAppointment(t *testing.T) {
	alice, bob, root := someone(t, "alice"), someone(t, "bob"), someone(t, "root")
	first := epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer)).Roster
	trusted := func(k bus.UserKey) bool { return k == root.Key() }
	a, err := Appoint(root, "ops", 2, first.Hash(), bob.Key())
	must(t, err)
	k := keyFrom("2")
	next := Roster{Room: "ops", Epoch: 2, Previous: first.Hash(), CreatedAt: moment, Commitment: k.Commitment("ops", 2), Appointed: a, Members: []Member{bob.as(bus.Owner)}}
	signed, err := next.Sign(bob)
	must(t, err)
	must(t, signed.Follows(first, "ops", alice.Key(), trusted))
	wantCode(t, signed.Follows(first, "ops", alice.Key(), nil), bus.Forbidden, "nobody trusted")
	wantCode(t, signed.Follows(first, "ops", alice.Key(), func(k bus.UserKey) bool { return k == bob.Key() }), bus.Forbidden, "another admin trusted")

	for what, change := range map[string]func(*Roster){
		"another epoch":  func(r *Roster) { r.Epoch = 3 },
		"another before": func(r *Roster) { r.Previous = keyHash("x") },
		"another room":   func(r *Roster) { r.Room = "dev" },
	} {
		r := next
		change(&r)
		_, err := r.Sign(bob)
		wantCode(t, err, bus.Unauthenticated, what)
	}
	other := next
	other.Members = []Member{alice.as(bus.Owner)}
	_, err = other.Sign(alice)
	wantCode(t, err, bus.Unauthenticated, "another owner than the one appointed")
}

func keyHash(s string) Hash { return sha256.Sum256([]byte(s)) }

// Whatever bit of a roster is changed, it is refused.
func TestRosterBits(t *testing.T) {
	alice, bob := someone(t, "alice"), someone(t, "bob")
	r := epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Reader)).Roster
	raw := r.Bytes()
	for i := range raw {
		bad := bytes.Clone(raw)
		bad[i] ^= 1
		if _, err := ParseRoster(bad); err == nil {
			t.Fatalf("byte %d of %d may be changed", i, len(raw))
		}
	}
	for _, bad := range [][]byte{nil, raw[:len(raw)-1], append(bytes.Clone(raw), 0)} {
		_, err := ParseRoster(bad)
		if err == nil {
			t.Fatal("a roster of another length is accepted")
		}
	}
	if _, err := (Roster{Room: "ops", Epoch: 1, Members: []Member{alice.as(bus.Owner), alice.as(bus.Reader)}}).Sign(alice); err == nil {
		t.Fatal("somebody may be in a roster twice")
	}
	if _, err := (Roster{Room: "ops", Epoch: 1, Members: []Member{alice.as(bus.Writer)}}).Sign(alice); err == nil {
		t.Fatal("a roster may be without an owner")
	}
}

// An envelope opens for its recipient, in its room, epoch and roster, from its
// sender, and nowhere else.
func TestEnvelopeMoved(t *testing.T) {
	alice, bob, carol := someone(t, "alice"), someone(t, "bob"), someone(t, "carol")
	e1 := epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer), carol.as(bus.Owner))
	e2 := epoch(t, alice, e1.Roster, alice.as(bus.Owner), bob.as(bus.Writer), carol.as(bus.Owner))
	raw, err := SealEnvelope(alice, e1.Roster, e1.Key, bob.Key(), bob.public)
	must(t, err)
	if len(raw) != EnvelopeSize {
		t.Fatalf("an envelope has %d bytes", len(raw))
	}
	must(t, CheckEnvelope(raw, e1.Roster, alice.Key(), bob.Key(), bob.public))
	k, err := OpenEnvelope(raw, bob.private, e1.Roster, e2.Roster)
	must(t, err)
	if k != e1.Key {
		t.Fatal("another key came out")
	}

	elsewhere := Roster{Room: "dev", Epoch: 1, CreatedAt: moment, Commitment: e1.Roster.Commitment, Members: e1.Roster.Members}
	dev, err := elsewhere.Sign(alice)
	must(t, err)
	bob2, err := NewPrivateKey(bob, 2)
	must(t, err)
	for what, c := range map[string]struct {
		p *PrivateKey
		r *Roster
	}{
		"to another epoch":            {bob.private, e2.Roster},
		"to another room":             {bob.private, dev},
		"to another member":           {carol.private, e1.Roster},
		"to a key of another number":  {bob2, e1.Roster},
		"to another roster of epoch1": {bob.private, epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Owner)).Roster},
	} {
		_, err := OpenEnvelope(raw, c.p, c.r, e2.Roster)
		if code := bus.CodeOf(err); code != bus.Unauthenticated && code != bus.Forbidden {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range raw {
		bad := bytes.Clone(raw)
		bad[i] ^= 1
		if _, err := OpenEnvelope(bad, bob.private, e1.Roster, e2.Roster); err == nil {
			t.Fatalf("byte %d of an envelope may be changed", i)
		}
	}

	// A member who is no owner gives nobody a key.
	forged, err := SealEnvelope(bob, e1.Roster, e1.Key, carol.Key(), carol.public)
	must(t, err)
	_, err = OpenEnvelope(forged, carol.private, e1.Roster, e1.Roster)
	wantCode(t, err, bus.Forbidden, "an envelope of a writer")

	// Somebody who joins later may be given what was before, by who is an owner
	// now.
	dave := someone(t, "dave")
	e3 := epoch(t, alice, e2.Roster, alice.as(bus.Owner), bob.as(bus.Owner), dave.as(bus.Reader))
	grant, err := SealEnvelope(bob, e1.Roster, e1.Key, dave.Key(), dave.public)
	must(t, err)
	_, err = OpenEnvelope(grant, dave.private, e1.Roster, e3.Roster)
	must(t, err)
	_, err = OpenEnvelope(grant, dave.private, e1.Roster, e2.Roster)
	wantCode(t, err, bus.Forbidden, "a grant of who is no owner yet")
}

// An owner who gives one member another key than the roster commits to is
// found out by that member.
func TestCommitment(t *testing.T) {
	alice, bob := someone(t, "alice"), someone(t, "bob")
	e := epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer))
	_, err := SealEnvelope(alice, e.Roster, keyFrom("another"), bob.Key(), bob.public)
	wantCode(t, err, bus.Internal, "sealing another key")

	lying := *e.Roster // a sealer without that check
	other := keyFrom("another")
	lying.Commitment = other.Commitment("ops", 1)
	raw, err := SealEnvelope(alice, &lying, other, bob.Key(), bob.public)
	must(t, err)
	_, err = OpenEnvelope(raw, bob.private, e.Roster, e.Roster)
	wantCode(t, err, bus.Unauthenticated, "another commitment signed")
	// The commitment is checked by itself too, not only as part of what is signed.
	if got := other.Commitment("ops", 1); got == e.Roster.Commitment {
		t.Fatal("two keys have one commitment")
	}
}

// A message opens as what it was sent as, and as nothing else.
func TestMessageMoved(t *testing.T) {
	alice, bob, carol := someone(t, "alice"), someone(t, "bob"), someone(t, "carol")
	members := []Member{alice.as(bus.Owner), bob.as(bus.Writer), carol.as(bus.Reader)}
	e1 := epoch(t, alice, nil, members...)
	e2 := epoch(t, alice, e1.Roster, members...)
	raw, err := sender(t, bob).Seal(e1, "disk", []byte("full"))
	must(t, err)
	if len(raw) != MessageOverhead+4 {
		t.Fatalf("the message has %d bytes", len(raw))
	}
	m, err := e1.Open(bob.Key(), "disk", raw)
	must(t, err)
	if string(m.Payload) != "full" || m.Counter != 1 || m.Epoch != 1 || !m.SentAt.Equal(moment) {
		t.Fatalf("%+v came out", m)
	}

	open := func(e Epoch, from person, topic string, raw []byte) error {
		_, err := e.Open(from.Key(), topic, raw)
		return err
	}
	wantCode(t, open(e1, alice, "disk", raw), bus.Unauthenticated, "as another's")
	wantCode(t, open(e1, bob, "disk.sda", raw), bus.Unauthenticated, "under another topic")
	wantCode(t, open(e2, bob, "disk", raw), bus.Invalid, "in another epoch")
	moved := bytes.Clone(raw)
	moved[8] = 2
	wantCode(t, open(e2, bob, "disk", moved), bus.Unauthenticated, "as of another epoch")
	wantCode(t, open(Epoch{e1.Roster, e2.Key}, bob, "disk", raw), bus.Unauthenticated, "with another key")
	fork := epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer))
	wantCode(t, open(Epoch{fork.Roster, e1.Key}, bob, "disk", raw), bus.Unauthenticated, "under another roster with the same key")
	for i := range raw {
		bad := bytes.Clone(raw)
		bad[i] ^= 1
		if open(e1, bob, "disk", bad) == nil {
			t.Fatalf("byte %d of a message may be changed", i)
		}
	}
	for n := range len(raw) {
		if open(e1, bob, "disk", raw[:n]) == nil {
			t.Fatalf("a message may be cut to %d bytes", n)
		}
	}
	_, err = sender(t, carol).Seal(e1, "disk", nil)
	wantCode(t, err, bus.Forbidden, "a reader who sends")
}

// The key is everybody's in the room: it does not let one speak for another.
func TestMemberForgesMember(t *testing.T) {
	alice, bob := someone(t, "alice"), someone(t, "bob")
	e := epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer))
	// Bob signs, and says that it is from alice.
	forger, err := NewSender(inTheNameOf{bob, alice.Key()}, rand.Reader, func() time.Time { return moment })
	must(t, err)
	raw, err := forger.Seal(e, "x", []byte("I resign"))
	must(t, err)
	_, err = e.Open(alice.Key(), "x", raw)
	wantCode(t, err, bus.Unauthenticated, "a message in another's name")
	if err != nil && !strings.Contains(err.Error(), "by another member") {
		t.Errorf("it was refused for another reason: %v", err)
	}
}

type inTheNameOf struct {
	person
	name bus.UserKey
}

func (f inTheNameOf) Key() bus.UserKey { return f.name }

// What comes twice is refused, what is missing or late is told.
func TestTracker(t *testing.T) {
	alice, bob := someone(t, "alice").Key(), someone(t, "bob").Key()
	tr := NewTracker()
	see := func(who bus.UserKey, session byte, n uint64) (Order, error) {
		return tr.See(who, Message{Session: Session{session}, Counter: n, SentAt: moment.Add(time.Duration(n) * time.Second)})
	}
	steps := []struct {
		n    uint64
		want Order
		code bus.Code
	}{
		{7, Order{}, ""}, // joined late: nothing is missing
		{8, Order{}, ""},
		{8, Order{}, bus.Conflict},
		{7, Order{}, bus.Conflict},
		{11, Order{Missing: 2}, ""},
		{10, Order{Late: true}, ""},
		{10, Order{}, bus.Conflict},
		{9, Order{Late: true}, ""},
		{11, Order{}, bus.Conflict},
		{12, Order{}, ""},
		{12 + windowSize, Order{Missing: windowSize - 1}, ""},
		{12, Order{}, bus.Conflict}, // outside the window: cannot be told from a replay
		{13, Order{Late: true}, ""},
		{12 + 10*windowSize, Order{Missing: 9*windowSize - 1}, ""},
		{13 + 9*windowSize, Order{Late: true}, ""},
		{13 + 9*windowSize, Order{}, bus.Conflict},
		{5, Order{}, bus.Conflict},
	}
	for _, s := range steps {
		got, err := see(alice, 1, s.n)
		if bus.CodeOf(err) != s.code || got != s.want {
			t.Fatalf("message %d: %+v, %v, want %+v, %q", s.n, got, err, s.want, s.code)
		}
	}
	if _, err := see(alice, 2, 8); err != nil {
		t.Error("another session counts by itself:", err)
	}
	if _, err := see(bob, 1, 8); err != nil {
		t.Error("another sender counts by themselves:", err)
	}
}

// A sender who uses up their sessions can have no old message taken for new.
func TestTrackerForgets(t *testing.T) {
	alice := someone(t, "alice").Key()
	tr := NewTracker()
	at := func(i int) Message {
		return Message{Session: Session{byte(i), byte(i >> 8)}, Counter: 1, SentAt: moment.Add(time.Duration(i) * time.Second)}
	}
	for i := range 3 * maxSessions {
		_, err := tr.See(alice, at(i))
		must(t, err)
	}
	if n := len(tr.senders[alice].seen); n > maxSessions {
		t.Errorf("%d sessions are remembered", n)
	}
	for i := range 3 * maxSessions {
		_, err := tr.See(alice, at(i))
		wantCode(t, err, bus.Conflict, fmt.Sprintf("session %d once more", i))
	}
}

// Two people see one number, and other people see another.
func TestNumbers(t *testing.T) {
	a, b, c := someone(t, "alice").Key(), someone(t, "bob").Key(), someone(t, "mallory").Key()
	if UserNumber(a, b) != UserNumber(b, a) || UserNumber(a, b) == UserNumber(a, c) {
		t.Error("the numbers of users are wrong")
	}
	if n := UserNumber(a, b); len(strings.Fields(n)) != 8 || len(n) != 47 {
		t.Errorf("the number is %q", n)
	}
}

// A secret that reaches a format shows nothing.
func TestKeyIsNotPrinted(t *testing.T) {
	k := keyFrom("secret")
	e := Epoch{Key: k}
	for _, verb := range []string{"%v", "%+v", "%#v", "%x", "%s", "%d"} {
		if s := fmt.Sprintf(verb, k) + fmt.Sprintf(verb, e); strings.Contains(s, fmt.Sprintf("%x", k[:4])) || strings.Contains(s, fmt.Sprint(k[0], " ", k[1])) {
			t.Errorf("%s prints the key: %s", verb, s)
		}
	}
}

// signed keeps what it signs.
type signed struct {
	person
	all *[][]byte
}

func (s signed) Sign(b []byte) ([]byte, error) {
	*s.all = append(*s.all, bytes.Clone(b))
	return s.person.Sign(b)
}

// No server can have a key, a roster, an envelope, an appointment or a message
// signed as the nonce of a connection, nor the other way round.
func TestNothingSignedIsANonce(t *testing.T) {
	var all [][]byte
	alice := signed{someone(t, "alice"), &all}
	_, err := alice.private.Bind(alice, moment)
	must(t, err)
	k := keyFrom("k")
	r, err := Roster{Room: "ops", Epoch: 1, CreatedAt: moment, Commitment: k.Commitment("ops", 1), Members: []Member{alice.as(bus.Owner)}}.Sign(alice)
	must(t, err)
	_, err = SealEnvelope(alice, r, k, alice.Key(), alice.public)
	must(t, err)
	_, err = Appoint(alice, "ops", 2, r.Hash(), alice.Key())
	must(t, err)
	s, err := NewSender(alice, rand.Reader, func() time.Time { return moment })
	must(t, err)
	_, err = s.Seal(Epoch{r, k}, "x", nil)
	must(t, err)
	if len(all) != 5 {
		t.Fatalf("%d signatures, want one of each kind", len(all))
	}
	for i, b := range all {
		begin, _, ended := bytes.Cut(b, []byte{0})
		if bus.ServerNonce(b) || !ended || !strings.HasPrefix(string(begin), "unibus/v1/") {
			t.Errorf("signature %d is over %q", i, b[:min(len(b), 40)])
		}
		for j, other := range all {
			if i != j && bytes.HasPrefix(other, append(begin, 0)) {
				t.Errorf("signatures %d and %d begin alike", i, j)
			}
		}
	}
}

// vectors is every byte format, for who writes them in another language.
type vectors struct {
	Note  string                `json:"note"`
	Users map[string]vectorUser `json:"users"`

	RoomKeys    []vectorKey      `json:"room_keys"`
	Rosters     []vectorRoster   `json:"rosters"`
	Appointment vectorSigned     `json:"appointment"`
	Envelopes   []vectorEnvelope `json:"envelopes"`
	Messages    []vectorMessage  `json:"messages"`
	Files       []vectorOfFile   `json:"files"`
	UserNumber  string           `json:"user_number_alice_bob"`
	RoomNumber  string           `json:"room_number_epoch_2"`
}

type vectorUser struct {
	Seed           string            `json:"seed"`
	SignPub        string            `json:"sign_pub"`
	EncryptionSeed []byte            `json:"encryption_seed"` // derived for n = 1
	EncryptionKey  bus.EncryptionKey `json:"encryption_key"`
	SignedBytes    []byte            `json:"signed_bytes"`
	KeyHash        Hash              `json:"key_hash"`
}

type vectorKey struct {
	Room       bus.RoomID `json:"room"`
	Epoch      uint64     `json:"epoch"`
	Key        []byte     `json:"key"`
	Commitment Hash       `json:"commitment"`
	MessageKey []byte     `json:"message_key"`
}

type vectorRoster struct {
	What   string `json:"what"`
	Roster []byte `json:"roster"`
	Hash   Hash   `json:"hash"`
}

type vectorSigned struct {
	SignedBytes []byte `json:"signed_bytes"`
	Signature   []byte `json:"signature"`
}

type vectorEnvelope struct {
	Epoch    uint64 `json:"epoch"`
	From     string `json:"from"`
	To       string `json:"to"`
	Context  []byte `json:"context"`
	Envelope []byte `json:"envelope"`
	Opens    []byte `json:"opens_to"`
}

type vectorMessage struct {
	Epoch   uint64 `json:"epoch"`
	Sender  string `json:"sender"`
	Topic   string `json:"topic"`
	Payload []byte `json:"payload"`
	Session []byte `json:"session"`
	Counter uint64 `json:"counter"`
	SentAt  int64  `json:"sent_at"` // Unix milliseconds
	Nonce   []byte `json:"nonce"`
	AD      []byte `json:"associated_data"`
	Message []byte `json:"message"`
}

type vectorOfFile struct {
	Epoch     uint64 `json:"epoch"`
	Sender    string `json:"sender"`
	Name      string `json:"name"`
	Content   []byte `json:"content"`
	Salt      []byte `json:"salt"`
	CreatedAt int64  `json:"created_at"` // Unix milliseconds
	FileKey   []byte `json:"file_key"`   // of the epoch
	Data      []byte `json:"data"`
	File      []byte `json:"file"`
}

const vectorFile = "testdata/vectors.json"

// The formats are fixed: what was written once is written again and read
// again. UNIBUS_UPDATE=1 makes new vectors; those of envelopes are random.
func TestVectors(t *testing.T) {
	made := makeVectors(t)
	if os.Getenv("UNIBUS_UPDATE") != "" {
		out, err := json.MarshalIndent(made, "", " ")
		must(t, err)
		must(t, os.MkdirAll("testdata", 0o755))
		must(t, os.WriteFile(vectorFile, append(out, '\n'), 0o644))
	}
	raw, err := os.ReadFile(vectorFile)
	must(t, err)
	var have vectors
	must(t, json.Unmarshal(raw, &have))

	alice, bob := someone(t, "alice"), someone(t, "bob")
	people := map[string]person{"alice": alice, "bob": bob}
	var rosters []*Roster
	for _, v := range have.Rosters {
		r, err := ParseRoster(v.Roster)
		must(t, err)
		if r.Hash() != v.Hash || !bytes.Equal(r.Bytes(), v.Roster) {
			t.Errorf("roster %q has changed", v.What)
		}
		rosters = append(rosters, r)
	}
	for _, v := range have.Envelopes {
		r := rosters[v.Epoch-1]
		k, err := OpenEnvelope(v.Envelope, people[v.To].private, r, r)
		must(t, err)
		if !bytes.Equal(k[:], v.Opens) {
			t.Errorf("the envelope for %s opens to another key", v.To)
		}
	}
	for _, v := range have.Messages {
		e := Epoch{rosters[v.Epoch-1], Key(have.RoomKeys[v.Epoch-1].Key)}
		m, err := e.Open(people[v.Sender].Key(), v.Topic, v.Message)
		must(t, err)
		if !bytes.Equal(m.Payload, v.Payload) || m.Counter != v.Counter || m.SentAt.UnixMilli() != v.SentAt || !bytes.Equal(m.Session[:], v.Session) {
			t.Errorf("%+v was read where %+v was written", m, v)
		}
	}
	for _, v := range have.Files {
		e := Epoch{rosters[v.Epoch-1], Key(have.RoomKeys[v.Epoch-1].Key)}
		got, f, err := opened(e, bus.BlobName(v.Name), v.File, 1000)
		must(t, err)
		if !bytes.Equal(got, v.Content) || f.Sender != people[v.Sender].Key() || f.CreatedAt.UnixMilli() != v.CreatedAt {
			t.Errorf("%+v was read where %+v was written", f, v)
		}
	}
	// HPKE draws its randomness itself; all else is as it was.
	for i := range made.Envelopes {
		made.Envelopes[i].Envelope = have.Envelopes[i].Envelope
	}
	a, _ := json.Marshal(made)
	b, _ := json.Marshal(have)
	if !bytes.Equal(a, b) {
		t.Errorf("the formats have changed:\n%s\nwant\n%s", a, b)
	}
}

func makeVectors(t *testing.T) vectors {
	alice, bob, root := someone(t, "alice"), someone(t, "bob"), someone(t, "root")
	v := vectors{Note: "See docs/encryption.md. Bytes are base64, hashes and sign_pub hex.", Users: map[string]vectorUser{}}
	for name, p := range map[string]person{"alice": alice, "bob": bob, "root": root} {
		seed, err := p.Derive(appendU64([]byte(domainIdentity), 1))
		must(t, err)
		v.Users[name] = vectorUser{
			Seed: p.seed, SignPub: p.Key().Hex(), EncryptionSeed: seed[:], EncryptionKey: p.public,
			SignedBytes: p.public.SignedBytes(p.Key()), KeyHash: HashOf(p.public.Public),
		}
	}
	e1 := epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer))
	e2 := epoch(t, alice, e1.Roster, alice.as(bus.Owner), bob.as(bus.Writer))
	a, err := Appoint(root, "ops", 3, e2.Roster.Hash(), bob.Key())
	must(t, err)
	k3 := keyFrom("key ops 3")
	next := Roster{Room: "ops", Epoch: 3, Previous: e2.Roster.Hash(), CreatedAt: moment, Commitment: k3.Commitment("ops", 3), Appointed: a, Members: []Member{bob.as(bus.Owner)}}
	r3, err := next.Sign(bob)
	must(t, err)
	v.Appointment = vectorSigned{appointmentBytes("ops", 3, e2.Roster.Hash(), bob.Key()), a.Signature}
	epochs := []Epoch{e1, e2, {r3, k3}}
	for i, what := range []string{"the first, by the creator alice", "the second", "the third: bob, whom root appointed"} {
		e := epochs[i]
		mk := e.Key.Derive("message-key", "ops", e.Roster.Epoch)
		v.Rosters = append(v.Rosters, vectorRoster{what, e.Roster.Bytes(), e.Roster.Hash()})
		v.RoomKeys = append(v.RoomKeys, vectorKey{"ops", e.Roster.Epoch, e.Key[:], e.Roster.Commitment, mk[:]})
	}
	for _, c := range []struct {
		e        Epoch
		from, to person
		names    [2]string
	}{{e1, alice, bob, [2]string{"alice", "bob"}}, {e2, alice, alice, [2]string{"alice", "alice"}}, {Epoch{r3, k3}, bob, bob, [2]string{"bob", "bob"}}} {
		raw, err := SealEnvelope(c.from, c.e.Roster, c.e.Key, c.to.Key(), c.to.public)
		must(t, err)
		m, _ := c.e.Roster.Member(c.to.Key())
		v.Envelopes = append(v.Envelopes, vectorEnvelope{c.e.Roster.Epoch, c.names[0], c.names[1], envelopeContext(c.e.Roster, m, c.from.Key()), raw, c.e.Key[:]})
	}
	random := bytes.NewReader(bytes.Repeat([]byte("0123456789abcdef"), 64))
	s, err := NewSender(bob, random, func() time.Time { return moment })
	must(t, err)
	for i, payload := range []string{"full", "", "disk sda is full \u2014 90 %"} {
		e, topic := epochs[i%2], []string{"disk", "a", "disk.sda"}[i]
		raw, err := s.Seal(e, topic, []byte(payload))
		must(t, err)
		v.Messages = append(v.Messages, vectorMessage{
			Epoch: e.Roster.Epoch, Sender: "bob", Topic: topic, Payload: []byte(payload), Session: s.session[:], Counter: uint64(i + 1),
			SentAt: moment.UnixMilli(), Nonce: slices.Clone(raw[41:65]), AD: messageData(e.Roster, bob.Key(), topic, raw[:headerSize]), Message: raw,
		})
	}
	for i, content := range [][]byte{[]byte("in case of fire"), nil} {
		e, name := epochs[i], []bus.BlobName{"runbook.txt", "empty"}[i]
		f, err := NewFile(e, bob, name, random, moment)
		must(t, err)
		raw, err := io.ReadAll(f.Encrypt(bytes.NewReader(content)))
		must(t, err)
		key := e.Key.Derive("file-key", "ops", e.Roster.Epoch)
		v.Files = append(v.Files, vectorOfFile{
			Epoch: e.Roster.Epoch, Sender: "bob", Name: string(name), Content: content, Salt: slices.Clone(raw[41:73]),
			CreatedAt: moment.UnixMilli(), FileKey: key[:], Data: f.data, File: raw,
		})
	}
	v.UserNumber, v.RoomNumber = UserNumber(alice.Key(), bob.Key()), RoomNumber(e2.Roster)
	return v
}

func seeds(f *testing.F, pick func(vectors) [][]byte) {
	raw, err := os.ReadFile(vectorFile)
	must(f, err)
	var v vectors
	must(f, json.Unmarshal(raw, &v))
	for _, b := range pick(v) {
		f.Add(b)
	}
}

// Whatever comes in, a roster that is accepted is the one spelling of itself.
func FuzzRoster(f *testing.F) {
	seeds(f, func(v vectors) (out [][]byte) {
		for _, r := range v.Rosters {
			out = append(out, r.Roster)
		}
		return out
	})
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := ParseRoster(raw)
		if err != nil {
			return
		}
		if again := r.signedBytes(); !bytes.Equal(again, raw[:len(raw)-64]) {
			t.Errorf("%s is spelt in two ways", base64.StdEncoding.EncodeToString(raw))
		}
	})
}

// No bytes but those that were sealed open.
func FuzzEnvelope(f *testing.F) {
	alice, bob := someone(f, "alice"), someone(f, "bob")
	e := epoch(f, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer))
	var good []byte
	seeds(f, func(v vectors) [][]byte { good = v.Envelopes[0].Envelope; return [][]byte{good} })
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, err := OpenEnvelope(raw, bob.private, e.Roster, e.Roster); (err == nil) != bytes.Equal(raw, good) {
			t.Errorf("%x opens: %v", raw, err)
		}
	})
}

// No bytes but those that were sent open.
func FuzzMessage(f *testing.F) {
	alice, bob := someone(f, "alice"), someone(f, "bob")
	e := epoch(f, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer))
	var good []byte
	seeds(f, func(v vectors) [][]byte { good = v.Messages[0].Message; return [][]byte{good} })
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, err := e.Open(bob.Key(), "disk", raw); (err == nil) != bytes.Equal(raw, good) {
			t.Errorf("%x opens: %v", raw, err)
		}
	})
}

func BenchmarkSealEnvelope(b *testing.B) {
	alice, bob := someone(b, "alice"), someone(b, "bob")
	e := epoch(b, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer))
	for b.Loop() {
		if _, err := SealEnvelope(alice, e.Roster, e.Key, bob.Key(), bob.public); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMessage(b *testing.B) {
	alice, bob := someone(b, "alice"), someone(b, "bob")
	e := epoch(b, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer))
	s, payload := sender(b, bob), make([]byte, 256)
	raw, err := s.Seal(e, "disk", payload)
	must(b, err)
	b.Run("seal", func(b *testing.B) {
		for b.Loop() {
			_, _ = s.Seal(e, "disk", payload)
		}
	})
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			_, _ = e.Open(bob.Key(), "disk", raw)
		}
	})
}
