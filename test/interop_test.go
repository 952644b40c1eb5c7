package test

import (
	"bytes"
	"context"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/seal"
	"unibus.internal/bus/sig"
	"unibus.internal/test/cluster"
)

// memberProgram is a member of rooms on stock nats.js, from the pages of docs alone.
const memberProgram = "testdata/interop/room.cjs"

// vectors are those of docs/encryption.md.
type vectors struct {
	Users map[string]struct {
		Seed, SignPub string
		EncryptionKey bus.EncryptionKey `json:"encryption_key"`
	}
	RoomKeys []struct {
		Room string
		Key  []byte
	} `json:"room_keys"`
	Rosters   []struct{ Roster []byte }
	Envelopes []struct {
		Epoch             int
		From, To          string
		Context, Envelope []byte
	}
	Messages []struct {
		Epoch            int
		Sender, Topic    string
		Payload, Message []byte
	}
	Files []struct {
		Epoch         int
		Sender, Name  string
		Content, File []byte
	}
}

func readVectors(t *testing.T) (v vectors) {
	t.Helper()
	raw, err := os.ReadFile("../bus/seal/testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	raw = bytes.ReplaceAll(raw, []byte(`"sign_pub"`), []byte(`"SignPub"`))
	if err := json.Unmarshal(raw, &v); err != nil || len(v.Messages) == 0 || len(v.Files) == 0 || len(v.Envelopes) == 0 {
		t.Fatalf("vectors: %v", err)
	}
	return v
}

func (v *vectors) identity(t *testing.T, name string) (id *sig.Identity, seedFile string) {
	t.Helper()
	seed := []byte(v.Users[name].Seed)
	id, err := sig.ParseIdentity(seed)
	if err == nil {
		seedFile = filepath.Join(t.TempDir(), name+".nk")
		err = os.WriteFile(seedFile, seed, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return id, seedFile
}

func (v *vectors) epoch(t *testing.T, n int) seal.Epoch {
	t.Helper()
	roster, err := seal.ParseRoster(v.Rosters[n-1].Roster)
	if err != nil {
		t.Fatal(err)
	}
	return seal.Epoch{Roster: roster, Key: seal.Key(v.RoomKeys[n-1].Key)}
}

// TestInterop has a program in another language open the vectors of
// docs/encryption.md, and opens what it makes itself.
func TestInterop(t *testing.T) {
	t.Parallel()
	n, v := newNode(t, memberProgram), readVectors(t)
	t.Run("keys", func(t *testing.T) { interopKeys(t, n, v) })
	t.Run("what they refuse", func(t *testing.T) { interopRefusals(t, n, v) })
	ask := func(epoch int, q map[string]any) (data []byte, sender string) {
		t.Helper()
		q["room"], q["key"], q["roster"] = v.RoomKeys[epoch-1].Room, v.RoomKeys[epoch-1].Key, v.Rosters[epoch-1].Roster
		var out struct {
			Data   []byte
			Sender string
		}
		n.ask(q, &out)
		return out.Data, out.Sender
	}
	for _, m := range v.Messages {
		got, _ := ask(m.Epoch, map[string]any{"op": "open", "sender": v.Users[m.Sender].SignPub, "topic": m.Topic, "message": m.Message})
		if !bytes.Equal(got, m.Payload) {
			t.Errorf("message %q was read as %q", m.Payload, got)
		}
	}
	for _, f := range v.Files {
		got, sender := ask(f.Epoch, map[string]any{"op": "open_file", "name": f.Name, "file": f.File})
		if !bytes.Equal(got, f.Content) || sender != v.Users[f.Sender].SignPub {
			t.Errorf("file %s of %s was read as %q of %s", f.Name, f.Sender, got, sender)
		}
	}

	bob, seed := v.identity(t, "bob")
	e := v.epoch(t, 2)
	message, _ := ask(2, map[string]any{"op": "seal", "seed_file": seed, "topic": "disk.sda", "data": []byte("nearly full")})
	if m, err := e.Open(bob.Key(), "disk.sda", message); err != nil || string(m.Payload) != "nearly full" {
		t.Errorf("a message of theirs: %+v %v", m, err)
	}
	large := make([]byte, 2*seal.FileChunk+77)
	_, _ = rand.Read(large)
	for _, content := range [][]byte{nil, []byte("short"), large, large[:seal.FileChunk]} {
		file, _ := ask(2, map[string]any{"op": "seal_file", "seed_file": seed, "name": "runbook.pdf", "data": append([]byte{}, content...)})
		var out bytes.Buffer
		o := seal.NewOpener("runbook.pdf", &out, func(uint64) (seal.Epoch, error) { return e, nil })
		_, err := o.Write(file)
		if err != nil {
			t.Fatalf("a file of theirs, %d bytes: %v", len(content), err)
		}
		if f, err := o.Finish(); err != nil || f.Sender != bob.Key() || !bytes.Equal(out.Bytes(), content) {
			t.Errorf("a file of theirs, %d bytes: %+v %v", len(content), f, err)
		}
		ours, err := seal.NewFile(e, bob, "runbook.pdf", rand.Reader, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := io.ReadAll(ours.Encrypt(bytes.NewReader(content)))
		if err != nil {
			t.Fatal(err)
		}
		if got, sender := ask(2, map[string]any{"op": "open_file", "name": "runbook.pdf", "file": sealed}); !bytes.Equal(got, content) || sender != bob.Key().Hex() {
			t.Errorf("a file of ours, %d bytes, was read as %d", len(content), len(got))
		}
	}
}

// interopKeys: a key pair is derived alike on both sides, each opens the envelope
// that the other one sealed, and with what was in it they read each other.
func interopKeys(t *testing.T, n *node, v vectors) {
	for name, u := range v.Users {
		_, seed := v.identity(t, name)
		var got struct{ Public, Signature []byte }
		n.ask(map[string]any{"op": "encryption_key", "seed_file": seed, "n": u.EncryptionKey.N, "created_at": u.EncryptionKey.CreatedAt.UnixMilli()}, &got)
		if !bytes.Equal(got.Public, u.EncryptionKey.Public) || !bytes.Equal(got.Signature, u.EncryptionKey.Signature) {
			t.Errorf("they derive another encryption key of %s, or sign it otherwise", name)
		}
	}
	var out struct{ Data []byte }
	open := func(epoch int, to string, envelope []byte) []byte {
		t.Helper()
		_, seed := v.identity(t, to)
		n.ask(map[string]any{
			"op": "open_envelope", "room": v.RoomKeys[epoch-1].Room, "roster": v.Rosters[epoch-1].Roster, "newest": v.Rosters[len(v.Rosters)-1].Roster,
			"seed_file": seed, "n": v.Users[to].EncryptionKey.N, "envelope": envelope,
		}, &out)
		return out.Data
	}
	for _, e := range v.Envelopes {
		if got := open(e.Epoch, e.To, e.Envelope); !bytes.Equal(got, v.RoomKeys[e.Epoch-1].Key) {
			t.Errorf("the envelope of %s for %s, epoch %d, was opened as %x", e.From, e.To, e.Epoch, got)
		}
	}

	alice, aliceSeed := v.identity(t, "alice")
	bob, bobSeed := v.identity(t, "bob")
	e, ids := v.epoch(t, 2), map[string]any{"room": v.RoomKeys[1].Room, "roster": v.Rosters[1].Roster}
	ours, err := seal.SealEnvelope(alice, e.Roster, e.Key, bob.Key(), v.Users["bob"].EncryptionKey)
	if err != nil {
		t.Fatal(err)
	}
	key := open(2, "bob", ours)
	sender, err := seal.NewSender(alice, rand.Reader, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	said, err := sender.Seal(e, "disk", []byte("full"))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(q map[string]any) []byte {
		t.Helper()
		maps.Copy(q, ids)
		n.ask(q, &out)
		return out.Data
	}
	if got := ask(map[string]any{"op": "open", "key": key, "sender": alice.Key().Hex(), "topic": "disk", "message": said}); string(got) != "full" {
		t.Errorf("a message of ours, with the key out of an envelope of ours, was read as %q", got)
	}

	theirs := ask(map[string]any{"op": "seal_envelope", "key": e.Key[:], "seed_file": aliceSeed, "user": bob.Key().Hex(), "n": v.Users["bob"].EncryptionKey.N, "public": v.Users["bob"].EncryptionKey.Public})
	if err := seal.CheckEnvelope(theirs, e.Roster, alice.Key(), bob.Key(), v.Users["bob"].EncryptionKey); err != nil {
		t.Errorf("an envelope of theirs: %v", err)
	}
	private, err := seal.NewPrivateKey(bob, v.Users["bob"].EncryptionKey.N)
	if err != nil {
		t.Fatal(err)
	}
	opened, err := seal.OpenEnvelope(theirs, private, e.Roster, e.Roster)
	if err != nil {
		t.Fatalf("an envelope of theirs: %v", err)
	}
	said = ask(map[string]any{"op": "seal", "key": key, "seed_file": bobSeed, "topic": "disk.sda", "data": []byte("nearly full")})
	if m, err := (seal.Epoch{Roster: e.Roster, Key: opened}).Open(bob.Key(), "disk.sda", said); err != nil || string(m.Payload) != "nearly full" {
		t.Errorf("a message of theirs, with the key out of an envelope of theirs: %+v %v", m, err)
	}
}

// envelopeByHand is made as the page says, also of what our own code does not put
// into one.
func envelopeByHand(t *testing.T, s sig.Signer, r *seal.Roster, to bus.UserKey, n uint64, public []byte, k seal.Key) (context, envelope []byte) {
	t.Helper()
	sender, hash, keyHash := s.Key(), r.Hash(), sha256.Sum256(public)
	context = append([]byte{byte(len(r.Room))}, r.Room...)
	context = append(append(binary.BigEndian.AppendUint64(context, r.Epoch), hash[:]...), r.Commitment[:]...)
	context = append(binary.BigEndian.AppendUint64(append(context, to[:]...), n), keyHash[:]...)
	context = append(context, sender[:]...)
	pk, err := hpke.MLKEM768X25519().NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := hpke.Seal(pk, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), append([]byte("unibus/v1/room-key\x00"), context...), k[:])
	if err != nil {
		t.Fatal(err)
	}
	head := binary.BigEndian.AppendUint64(append([]byte{1}, sender[:]...), n)
	return context, signedEnvelope(t, s, context, append(head, sealed...))
}

// signedEnvelope puts the signature behind an envelope that has none.
func signedEnvelope(t *testing.T, s sig.Signer, context, unsigned []byte) []byte {
	t.Helper()
	sum := sha256.Sum256(unsigned[41:])
	signature, err := s.Sign(slices.Concat([]byte("unibus/v1/envelope\x00"), context, sum[:]))
	if err != nil {
		t.Fatal(err)
	}
	return append(bytes.Clone(unsigned), signature...)
}

// interopRefusals: what docs/encryption.md tells a reader to refuse, a reader
// written from that page alone refuses, and for that reason.
func interopRefusals(t *testing.T, n *node, v vectors) {
	alice, aliceSeed := v.identity(t, "alice")
	bob, bobSeed := v.identity(t, "bob")
	alicePublic, bobPublic := v.Users["alice"].EncryptionKey.Public, v.Users["bob"].EncryptionKey.Public
	e1, e2 := v.epoch(t, 1), v.epoch(t, 2)
	changed := func(b []byte, at int) []byte {
		b = bytes.Clone(b)
		b[at] ^= 1
		return b
	}
	try := func(what, why string, q, other map[string]any) {
		t.Helper()
		q = maps.Clone(q)
		maps.Copy(q, other)
		var out struct{ Data []byte }
		switch err := n.try(q, &out); {
		case why == "" && err != nil:
			t.Errorf("%s: %v", what, err)
		case why != "" && (err == nil || !strings.Contains(err.Error(), why)):
			t.Errorf("%s was read as %q (%v), want %q", what, out.Data, err, why)
		}
	}

	context, good := envelopeByHand(t, alice, e2.Roster, bob.Key(), 1, bobPublic, e2.Key)
	_, earlier := envelopeByHand(t, alice, e1.Roster, bob.Key(), 1, bobPublic, e1.Key)
	_, byWriter := envelopeByHand(t, bob, e2.Roster, alice.Key(), 1, alicePublic, e2.Key)
	_, anotherKey := envelopeByHand(t, alice, e2.Roster, bob.Key(), 1, bobPublic, e1.Key)
	second, err := seal.NewPrivateKey(bob, 2)
	if err != nil {
		t.Fatal(err)
	}
	secondPublic, _ := second.Public()
	_, unnamed := envelopeByHand(t, alice, e2.Roster, bob.Key(), 2, secondPublic, e2.Key)
	envelope := map[string]any{
		"op": "open_envelope", "room": "ops", "roster": v.Rosters[1].Roster, "newest": v.Rosters[1].Roster,
		"seed_file": bobSeed, "n": 1, "envelope": good,
	}
	const unsigned, unopened = "wrong signature", "unable to authenticate"
	try("what is as it should be", "", envelope, nil)
	try("an envelope for somebody else", unsigned, envelope, map[string]any{"seed_file": aliceSeed})
	try("an envelope for another key of theirs", "not an envelope for this key", envelope, map[string]any{"n": 2})
	try("an envelope of another epoch", unsigned, envelope, map[string]any{"envelope": earlier})
	try("an envelope of another room", "another room's roster", envelope, map[string]any{"room": "dev"})
	try("an envelope of who is no owner", "from nobody who may give the key", envelope, map[string]any{"seed_file": aliceSeed, "envelope": byWriter})
	try("an envelope with another key in it", "not the key of the roster", envelope, map[string]any{"envelope": anotherKey})
	try("an envelope to a key that the roster does not name", "the roster names another key", envelope, map[string]any{"n": 2, "envelope": unnamed})
	try("a changed roster", unsigned, envelope, map[string]any{"roster": changed(v.Rosters[1].Roster, 70)})
	const lattice, curve, cipher, tag, end = 41, 41 + 1088, 41 + 1120, 41 + 1167, 41 + 1168
	for what, c := range map[string]struct {
		at  int
		why string
	}{
		"the version": {0, "not an envelope"}, "the sender": {5, "from nobody"}, "the number": {40, "not an envelope"},
		"the sealed part": {cipher, unsigned}, "the signature": {end + 9, unsigned},
	} {
		try("an envelope changed in "+what, c.why, envelope, map[string]any{"envelope": changed(good, c.at)})
	}
	// A sender who signs what is not theirs to seal: the encryption holds by itself.
	for what, sealed := range map[string][]byte{
		"changed in its ML-KEM half": changed(good, lattice)[:end], "changed in its X25519 half": changed(good, curve)[:end],
		"changed": changed(good, cipher)[:end], "changed in its tag": changed(good, tag)[:end], "moved from another epoch": earlier[:end],
	} {
		try("a signed envelope, "+what, unopened, envelope, map[string]any{"envelope": signedEnvelope(t, alice, context, sealed)})
	}

	sender, err := seal.NewSender(alice, rand.Reader, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	said, err := sender.Seal(e2, "disk", []byte("full"))
	if err != nil {
		t.Fatal(err)
	}
	message := map[string]any{
		"op": "open", "room": "ops", "roster": v.Rosters[1].Roster, "key": e2.Key[:],
		"sender": alice.Key().Hex(), "topic": "disk", "message": said,
	}
	const invalid = "invalid tag"
	try("a message as it should be", "", message, nil)
	try("a message under another key", invalid, message, map[string]any{"key": e1.Key[:]})
	try("a message of another epoch", "another epoch", message, map[string]any{"roster": v.Rosters[0].Roster, "key": e1.Key[:]})
	try("a message in another topic", invalid, message, map[string]any{"topic": "disk.sda"})
	try("a message of somebody else", invalid, message, map[string]any{"sender": bob.Key().Hex()})
	for what, at := range map[string]int{"the session": 10, "the counter": 32, "the time": 40, "the nonce": 50, "the text": 70, "the tag": len(said) - 1} {
		try("a message changed in "+what, invalid, message, map[string]any{"message": changed(said, at)})
	}
}

// Members on two implementations talk to each other, in a room that stores
// nothing and in one that stores everything.
func (b *blobWorld) anotherLanguage(t *testing.T) {
	n := newNode(t, memberProgram)
	for _, durable := range []bool{false, true} {
		room, name := bus.RoomID("polyglot"), "a room"
		if durable {
			room, name = "minutes", "a durable room"
		}
		b.addRoom(room, b.owner, kv.RoomOptions{Durable: durable})
		b.join(room, b.writer, bus.Writer)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		conn := b.dial(t, b.owner, nil)
		r, err := conn.Room(ctx, room)
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var heard []string
		h, err := r.Subscribe(ctx, sdk.Hear{}, func(m sdk.Message) {
			mu.Lock()
			defer mu.Unlock()
			if m.Sender == b.writer.key {
				heard = append(heard, m.Topic+" "+string(m.Data))
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		say := []string{"one", "two", "three"}
		var said struct {
			Heard []struct {
				Sender, Topic string
				Data          []byte
			}
			Seqs []uint64
		}
		seed, talking := b.writer.seedFile(t), make(chan error, 1)
		go func() {
			talking <- n.try(map[string]any{
				"op": "talk", "url": strings.TrimPrefix(b.NATSURL(1), "tls://"), "ca": b.CA(), "seed_file": seed,
				"room": room, "durable": durable, "say": say, "hear": 2 * len(say),
			}, &said)
		}()
		cluster.WaitFor(t, 20*time.Second, "their messages in "+name, func() error {
			mu.Lock()
			defer mu.Unlock()
			if want := []string{"from.node one", "from.node two", "from.node three"}; !slices.Equal(heard, want) {
				return bus.E(bus.Unavailable, "heard %q, want %q", heard, want)
			}
			return nil
		})
		for _, s := range say {
			if _, err := r.Publish(ctx, "from.go", []byte(s)); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-talking; err != nil {
			t.Fatal(err)
		}
		var theirs []string
		for _, m := range said.Heard {
			theirs = append(theirs, m.Sender[:1]+" "+m.Topic+" "+string(m.Data))
			if m.Sender != b.writer.key.NKey() && m.Sender != b.owner.key.NKey() {
				t.Errorf("heard from %s", m.Sender)
			}
		}
		if want := []string{"U from.node one", "U from.node two", "U from.node three", "U from.go one", "U from.go two", "U from.go three"}; !slices.Equal(theirs, want) {
			t.Errorf("%s: they heard %q", name, theirs)
		}
		if durable && !slices.IsSorted(said.Seqs) || durable != (len(said.Seqs) == len(say)) {
			t.Errorf("%s: sequences %v", name, said.Seqs)
		}
		h.Unsubscribe()
		cancel()
	}
}
