package test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"io"
	"os"
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

// TestInterop has a program in another language open the vectors of
// docs/encryption.md, and opens what it makes itself.
func TestInterop(t *testing.T) {
	t.Parallel()
	n := newNode(t, memberProgram)
	raw, err := os.ReadFile("../bus/seal/testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Users    map[string]struct{ Seed, SignPub string }
		RoomKeys []struct {
			Room string
			Key  []byte
		} `json:"room_keys"`
		Rosters  []struct{ Roster []byte }
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
	raw = bytes.ReplaceAll(raw, []byte(`"sign_pub"`), []byte(`"SignPub"`))
	if err := json.Unmarshal(raw, &v); err != nil || len(v.Messages) == 0 || len(v.Files) == 0 {
		t.Fatalf("vectors: %v", err)
	}
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

	seed := t.TempDir() + "/bob.nk"
	if err := os.WriteFile(seed, []byte(v.Users["bob"].Seed), 0o600); err != nil {
		t.Fatal(err)
	}
	bob, err := sig.ParseIdentity([]byte(v.Users["bob"].Seed))
	if err != nil {
		t.Fatal(err)
	}
	roster, err := seal.ParseRoster(v.Rosters[1].Roster)
	if err != nil {
		t.Fatal(err)
	}
	e := seal.Epoch{Roster: roster, Key: seal.Key(v.RoomKeys[1].Key)}
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
