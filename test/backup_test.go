package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// TestBackup takes a backup of a live cluster, repairs what can be repaired
// without it, wipes all three nodes and brings everybody back to exactly what
// they were. The subtests follow each other.
func TestBackup(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: directLease})
	w.adminSeed(w.admin)
	b := &backups{world: w, dir: t.TempDir()}
	b.people()
	for _, s := range []struct {
		name string
		test func(*testing.T)
	}{
		{"what rooms hold", b.talk},
		{"consistent amid changes", b.consistent},
		{"create and verify", b.create},
		{"a room that cannot be read", b.unreadableRoom},
		{"scheduled", b.scheduled},
		{"refused", b.refused},
		{"merge", b.merge},
		{"drill", b.drill},
		{"a frozen stream", b.frozen},
		{"one replica", b.oneReplica},
		{"one node wiped", b.nodeWiped},
		{"all nodes wiped", b.wiped},
	} {
		if !t.Run(s.name, s.test) {
			t.FailNow()
		}
	}
}

type backups struct {
	*world
	dir string

	alice, bob, carol, dave, erin, frank *person
	file, key, signer                    string

	bus   *nats.Conn        // as membership
	half  []kv.StoredRecord // the first messages of ops
	files bus.BlobList      // of ops
}

func (b *backups) run(t *testing.T, code int, words string, args ...string) cluster.Result {
	t.Helper()
	r := b.CLI(args...)
	if r.Code != code || !strings.Contains(r.Stdout+r.Stderr, words) {
		t.Errorf("unibusctl %s: exit %d, want %d and %q:\n%s%s", strings.Join(args, " "), r.Code, code, words, r.Stdout, r.Stderr)
	}
	return r
}

// people: alice and frank are writers, bob is revoked, carol is suspended, dave
// will be revoked after the backup, erin was removed from a room.
func (b *backups) people() {
	b.t.Helper()
	var err error
	b.bus, err = kv.Connect(kv.Link{
		URL: b.URLs(b.NATSURL), SeedFile: b.Seed("membership-bus"), CAFile: b.CA(), Name: "test-rooms", Inbox: "_INBOX_membership", Timeout: 5 * time.Second,
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(b.bus.Close)
	ctx := b.t.Context()
	b.alice, b.bob, b.carol, b.dave, b.erin = b.addUser("alice"), b.addUser("bob"), b.addUser("carol"), b.addUser("dave"), b.addUser("erin")
	b.frank = b.addUser("frank")
	b.addRoom("ops", b.alice, kv.RoomOptions{Durable: true, Description: "what was"})
	b.addRoom("old", b.alice, kv.RoomOptions{})
	b.addRoom("short", b.alice, kv.RoomOptions{Durable: true, Retention: bus.Retention{MaxMessages: 5, MaxAgeSeconds: 7200}})
	b.addRoom("quiet", b.alice, kv.RoomOptions{Durable: true})
	b.addRoom("purged", b.alice, kv.RoomOptions{Durable: true})
	for _, p := range []*person{b.bob, b.carol, b.dave, b.erin, b.frank} {
		b.join("ops", p, bus.Writer)
	}
	b.join("short", b.frank, bus.Writer)
	b.must(b.store.RevokeUser(ctx, b.bob.key))
	b.must(b.store.SuspendUser(ctx, b.carol.key))
	b.must(b.store.RemoveMember(ctx, "ops", b.erin.key))
	b.must(b.store.ArchiveRoom(ctx, "old", false))
	b.must(b.store.ArchiveRoom(ctx, "purged", true))
	for subject, value := range map[string]string{
		"$KV.UNIBUS_room_keys.ops.1." + b.alice.key.Hex():         `{"v":1,"sealed":"AAAA"}`,
		"$KV.UNIBUS_users." + newPerson(b.t, "x").key.Hex():       `{"v":99,"status":"of tomorrow"}`,
		"$KV.UNIBUS_members.ops." + newPerson(b.t, "y").key.Hex(): `nonsense`,
	} {
		if _, err := b.link.Request(subject, []byte(value), 2*time.Second); err != nil {
			b.t.Fatal(err)
		}
	}
}

// talk: what rooms hold. One keeps the last five of what is said in it.
func (b *backups) talk(t *testing.T) {
	var err error
	ops, short := b.enter(t, b.alice, "ops"), b.enter(t, b.frank, "short")
	for n := range 12 {
		for _, room := range []*sdk.Room{ops, short} {
			if _, err := room.Publish(t.Context(), "t", bytes.Repeat([]byte{byte(n)}, 10_000*n)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := b.client(t, b.alice).PutBlob(t.Context(), "ops", "a file.bin", bytes.NewReader(bytes.Repeat([]byte("file"), 100_000)), sdk.BlobOptions{}); err != nil {
		t.Fatal(err)
	}
	if b.files, err = b.client(t, b.alice).Blobs(t.Context(), "ops"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.client(t, b.alice).PutBlob(t.Context(), "quiet", "empty", bytes.NewReader(nil), sdk.BlobOptions{}); err != nil {
		t.Fatal(err)
	}
}

// said is everything that a room holds, and where it is.
func (b *backups) said(t *testing.T, room bus.RoomID) (out []string, at kv.Extent) {
	t.Helper()
	at, err := kv.ReadRoom(t.Context(), b.bus, room, func(r kv.StoredRecord) error {
		if room == "ops" && len(b.half) < 4 {
			b.half = append(b.half, r)
		}
		out = append(out, fmt.Sprintf("%d %s %s %v %x", r.Revision, r.At.Format(time.RFC3339Nano), r.Key, r.Header, sha256.Sum256(r.Value)))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out, at
}

// unreadableRoom: a backup that would lack what a room has said is none.
func (b *backups) unreadableRoom(t *testing.T) {
	b.addRoom("lost", b.alice, kv.RoomOptions{Durable: true})
	cluster.WaitFor(t, 30*time.Second, "the stream of the room", func() error {
		_, err := kv.ReadRoom(t.Context(), b.bus, "lost", func(kv.StoredRecord) error { return nil })
		return err
	})
	if err := kv.DropRoomStream(t.Context(), b.bus, "lost"); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(b.dir, "lacking.backup")
	create := []string{"--direct", "backup", "create", "--out", out, "--recipients-file", b.key + ".pub"}
	b.run(t, 1, "room lost has no stream", create...)
	if left, err := filepath.Glob(filepath.Join(b.dir, "*lacking*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	b.run(t, 2, "membership-bus.nk", append(create, "--membership-seed", filepath.Join(b.dir, "elsewhere.nk"))...)
	r := b.run(t, 0, "wrote", append(create, "--without-messages", "--without-files")...)
	if strings.Contains(r.Stdout, "messages of") {
		t.Errorf("a backup without messages: %s", r.Stdout)
	}
	b.must(b.store.ArchiveRoom(t.Context(), "lost", true))
}

// consistent: however many changes are under way, a snapshot never shows a later
// one without the one before it. Rooms and members are different streams.
func (b *backups) consistent(t *testing.T) {
	view, err := kv.NewView(kv.ViewConfig{Conn: b.link, Service: "unibusctl", Node: "raw", EncryptionKeys: true, Raw: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { view.Run(ctx) })
	var made atomic.Int64
	running.Go(func() {
		for ; ctx.Err() == nil; made.Add(1) {
			_, _ = b.store.CreateRoom(ctx, bus.RoomID(fmt.Sprintf("r%d", made.Load())), b.alice.key, kv.RoomOptions{})
		}
	})
	defer running.Wait()
	defer cancel()
	seen := map[int]bool{}
	for range 20 {
		snap, err := view.TakeSnapshot(ctx)
		if err != nil {
			t.Fatal(err)
		}
		rooms := map[string]bool{}
		for _, r := range snap.Part(kv.PartRooms).Records {
			rooms[r.Key] = true
		}
		// A room is written before its owner, so at most the newest has none.
		ownerless := len(rooms)
		for _, m := range snap.Part(kv.PartMembers).Records {
			room, user, _ := strings.Cut(m.Key, ".")
			if !rooms[room] {
				t.Fatalf("a member of room %s, and no such room", room)
			}
			if user == b.alice.key.Hex() {
				ownerless--
			}
		}
		if ownerless > 1 {
			t.Fatalf("%d rooms without an owner", ownerless)
		}
		seen[len(rooms)] = true
	}
	if len(seen) < 5 {
		t.Errorf("20 snapshots saw %d states: too few changes were made between them", len(seen))
	}
	t.Logf("20 snapshots amid %d changes: %d different states", 2*made.Load(), len(seen))
}

// roomContents is what a backup says of one room.
type roomContents struct {
	Room      bus.RoomID `json:"room"`
	Messages  uint64     `json:"messages"`
	FirstSeq  uint64     `json:"first_seq"`
	LastSeq   uint64     `json:"last_seq"`
	Files     int        `json:"files"`
	FileBytes int64      `json:"file_bytes"`
}

func (b *backups) create(t *testing.T) {
	b.key = filepath.Join(b.dir, "backup.key")
	b.run(t, 0, "backup.key.pub", "backup", "key", "--out", b.key)
	b.file = filepath.Join(b.dir, "one.backup")
	create := []string{"--direct", "backup", "create", "--out", b.file, "--recipients-file", b.key + ".pub"}
	r := b.run(t, 0, "", append(create, "--json")...)
	var v struct {
		Signer, SHA256 string
		Parts          []struct {
			Part    string
			Records int
		}
		Contents   []roomContents
		Unreadable []string
	}
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil {
		t.Fatal(err)
	}
	holds := []roomContents{
		{Room: "ops", Messages: 12, FirstSeq: 1, LastSeq: 12, Files: 1, FileBytes: 400_000},
		{Room: "quiet", FirstSeq: 1, Files: 1},
		{Room: "short", Messages: 5, FirstSeq: 8, LastSeq: 12},
	}
	if !slices.Equal(v.Contents, holds) {
		t.Errorf("it holds %+v, want %+v", v.Contents, holds)
	}
	counts := map[string]int{}
	for _, p := range v.Parts {
		counts[p.Part] = p.Records
	}
	if b.signer = v.Signer; counts["users"] != 8 || counts["room_keys"] != 1 || counts["handles"] != 7 || counts["audit"] < 3 || len(v.Unreadable) != 2 {
		t.Errorf("%+v", v)
	}
	b.run(t, 1, "exists already", create...)
	info, err := os.Stat(b.file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	// What is on the disk tells nobody who is who.
	data, err := os.ReadFile(b.file)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"alice", b.alice.key.Hex(), b.alice.key.NKey(), "what was"} {
		if bytes.Contains(data, []byte(secret)) {
			t.Errorf("the backup shows %q", secret)
		}
	}
	b.run(t, 0, "not looked inside", "backup", "verify", b.file, "--signer", b.signer)
	b.run(t, 0, "users 8", "backup", "verify", b.file, "--age-identity", b.key)
	b.run(t, 0, "17 messages of 2 rooms, 2 files of 2 rooms, 400000 bytes", "backup", "verify", b.file, "--age-identity", b.key)
	other := filepath.Join(b.dir, "other.key")
	b.run(t, 0, "other.key", "backup", "key", "--out", other)
	b.run(t, 1, "not encrypted to this key", "backup", "verify", b.file, "--age-identity", other)
	b.run(t, 1, "exists already", "backup", "key", "--out", b.key)
	b.run(t, 2, "for somebody", "--direct", "backup", "create", "--out", filepath.Join(b.dir, "x"))
}

// scheduled is what the timer of a node runs: with the key that the node has.
func (b *backups) scheduled(t *testing.T) {
	dir := filepath.Join(b.dir, "kept")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"unibus-20200101T000000Z.backup", "unibus-20200102T000000Z.backup", "mine.backup"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := map[string]string{"UNIBUS_OPS_SEED": "", "UNIBUS_NATS_URL": b.NATSURL(2)}
	r := b.CLIEnvironment(env, nil, "backup", "create", "--membership-seed", filepath.Join(b.Etc(2), "creds", "membership-ctrl.nk"),
		"--dir", dir, "--keep", "2", "--recipients-file", b.key+".pub")
	if r.Code != 0 || !strings.Contains(r.Stdout, "removed") {
		t.Fatalf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if len(names) != 3 || names[0] != "mine.backup" || names[1] != "unibus-20200102T000000Z.backup" {
		t.Errorf("left are %v", names)
	}
	// Signed by another key than ops: who restores has to say which.
	b.run(t, 1, "signed by", "backup", "verify", filepath.Join(dir, names[len(names)-1]))
}

// refused: nothing is used of a file that is not what was signed.
func (b *backups) refused(t *testing.T) {
	data, err := os.ReadFile(b.file)
	if err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(b.dir, "bad.backup")
	for name, spoilt := range map[string][]byte{
		"changed": append(append(bytes.Clone(data[:len(data)/2]), data[len(data)/2]^1), data[len(data)/2+1:]...),
		"cut off": data[:len(data)-1000],
		"nothing": nil,
	} {
		if err := os.WriteFile(bad, spoilt, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, command := range [][]string{{"backup", "verify"}, {"--direct", "restore", "--merge", "--yes"}, {"backup", "drill"}} {
			if r := b.CLI(append(command, bad, "--age-identity", b.key)...); r.Code != 1 || !strings.Contains(r.Stderr, "refused") {
				t.Errorf("%s, %v: exit %d: %s%s", name, command, r.Code, r.Stdout, r.Stderr)
			}
		}
	}
	stranger := newPerson(t, "stranger")
	b.run(t, 1, "signed by", "--direct", "restore", b.file, "--age-identity", b.key, "--signer", stranger.key.NKey(), "--merge", "--yes")
}

// merge: a backup never gives back what was taken away since.
func (b *backups) merge(t *testing.T) {
	ctx := t.Context()
	b.must(b.store.RevokeUser(ctx, b.dave.key))
	restore := []string{"--direct", "restore", b.file, "--age-identity", b.key}
	b.run(t, 1, "not empty", append(restore, "--yes")...)
	b.run(t, 2, "needs --yes", append(restore, "--merge")...)
	before := b.written(t, kv.Users, "*")
	for _, how := range []string{"--dry-run", "--yes"} {
		r := b.run(t, 0, "dave is revoked here", append(restore, "--merge", how)...)
		if !strings.Contains(r.Stdout, "skipped users "+b.dave.key.Hex()) {
			t.Errorf("%s: %s", how, r.Stdout)
		}
	}
	b.answers(refused, b.dave)
	b.answers(admitted, b.alice)
	if after := b.written(t, kv.Users, "*"); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("a restore has written over users: %v, then %v", before, after)
	}
}

// drill restores somewhere else, and leaves nothing behind.
func (b *backups) drill(t *testing.T) {
	tmp := t.TempDir()
	started := time.Now()
	r := b.CLIEnvironment(map[string]string{"TMPDIR": tmp, "UNIBUS_OPS_SEED": ""}, nil, "backup", "drill", b.file,
		"--age-identity", b.key, "--signer", b.signer, "--nats-server", filepath.Join(b.Bin, "nats-server"), "--json")
	var v struct {
		Verified int
		Parts    []kv.PartReport
		Contents []struct {
			Room, What, Done string
			Count            int
			Verified         bool
		}
	}
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil || r.Code != 0 || v.Verified < 15 {
		t.Errorf("exit %d, %v: %s%s", r.Code, err, r.Stdout, r.Stderr)
	}
	if got, want := fmt.Sprint(v.Contents), "[{ops messages write 12 true} {ops files write 1 true} {quiet files write 1 true} {short messages write 5 true}]"; got != want {
		t.Errorf("of rooms: %s, want %s", got, want)
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	t.Logf("drill: %d records verified in %s", v.Verified, time.Since(started).Round(time.Millisecond))
}

// freeze stops a stream as any client with a right to publish into it could.
func (b *backups) freeze(t *testing.T, subject string) {
	t.Helper()
	m := nats.NewMsg(subject)
	m.Header.Set("Nats-Expected-Last-Msg-Id", "nope")
	if _, err := b.link.RequestMsg(m, 2*time.Second); err != nil {
		t.Logf("the message that freezes: %v", err)
	}
}

// frozen: a stream that takes no write any more is made again from itself, and
// no revision is ever used twice; one that takes writes is left alone.
func (b *backups) frozen(t *testing.T) {
	copies := t.TempDir()
	repair := func(stream, dir string, more ...string) []string {
		return append([]string{"--direct", "cluster", "repair", stream, "--save", filepath.Join(copies, dir)}, more...)
	}
	b.run(t, 1, "takes writes", repair("users", "healthy", "--yes")...)
	if _, err := os.Stat(filepath.Join(copies, "healthy")); err == nil {
		t.Error("a refused repair has left a copy")
	}
	before, revisions := b.everything(t), b.revisions(t)
	audited := b.run(t, 0, "", "--direct", "audit", "verify")
	for _, s := range []struct{ name, stream, subject string }{
		{"users", "KV_UNIBUS_users", "$KV.UNIBUS_users._barrier.test.freeze"},
		{"audit", "UNIBUS_AUDIT", "unibus.audit._barrier.test.freeze"},
	} {
		if s.name != "users" && !full { // it takes a quarter of a minute to be sure that a stream is frozen
			continue
		}
		b.freeze(t, s.subject)
		started := time.Now()
		b.run(t, 0, "made "+s.stream+" again", repair(s.name, s.name, "--yes")...)
		t.Logf("repaired %s in %s", s.stream, time.Since(started).Round(time.Millisecond))
		b.WaitHealthy(60 * time.Second)
	}
	b.compare(t, before, b.everything(t))
	after := b.revisions(t)
	for key, was := range revisions {
		if after[key] <= was {
			t.Errorf("the record of %s had revision %d and has %d", key, was, after[key])
		}
	}
	if r := b.run(t, 0, "", "--direct", "audit", "verify"); r.Code != 0 {
		t.Errorf("the audit was right and is not: %s, then %s", audited.Stdout, r.Stdout)
	}
	b.run(t, 0, "cluster.repair", "--direct", "audit", "list")
	b.waitAdmits(b.alice, b.Nodes()...)
	b.answers(refused, b.bob)
	late := newPerson(t, "late")
	b.run(t, 0, "registered", "--direct", "user", "add", "--handle", "late", "--sign-pub", late.key.NKey())
	b.waitAdmits(late, b.Nodes()...)
	if !full {
		return
	}
	// Gone altogether, as after an interrupted repair: the copy is taken, but not
	// over a stream that holds anything.
	from := []string{"--direct", "cluster", "repair", "rooms", "--yes", "--from", filepath.Join(copies, "rooms")}
	b.freeze(t, "$KV.UNIBUS_rooms._barrier.test.freeze")
	b.run(t, 2, "needs --yes", repair("rooms", "rooms")...)
	b.run(t, 1, "holds records", from...)
	b.run(t, 0, "frozen", "--direct", "cluster", "repair", "rooms", "--dry-run")
	if err := b.deleteStream("KV_UNIBUS_rooms"); err != nil {
		t.Fatal(err)
	}
	b.run(t, 0, "missing", "--direct", "cluster", "repair", "rooms", "--dry-run")
	b.run(t, 0, "made KV_UNIBUS_rooms again", from...)
	b.WaitHealthy(60 * time.Second)
	b.run(t, 0, "what was", "--direct", "room", "show", "ops")
}

// oneReplica: what somebody has set to one replica has three again, in place.
func (b *backups) oneReplica(t *testing.T) {
	nc := b.Ops()
	js, err := nc.JetStream(nats.MaxWait(5 * time.Second))
	if err != nil {
		t.Fatal(err)
	}
	edit := func(stream string, change func(*nats.StreamConfig)) {
		t.Helper()
		info, err := js.StreamInfo(stream)
		if err != nil {
			t.Fatal(err)
		}
		change(&info.Config)
		if _, err := js.UpdateStream(&info.Config); err != nil {
			t.Fatal(err)
		}
	}
	before := b.everything(t)
	for _, stream := range []string{"KV_UNIBUS_users", "KV_UNIBUS_handles"} {
		edit(stream, func(c *nats.StreamConfig) { c.Replicas = 1 })
	}
	edit("KV_UNIBUS_rooms", func(c *nats.StreamConfig) { c.MaxAge = time.Hour })
	b.run(t, 1, "max_age", "--direct", "cluster", "replicas", "3")
	edit("KV_UNIBUS_rooms", func(c *nats.StreamConfig) { c.MaxAge = 0 })
	b.run(t, 1, "three replicas", "--direct", "cluster", "replicas", "1")
	r := b.run(t, 0, "", "--direct", "cluster", "replicas", "3", "--json")
	var v struct {
		Streams []kv.Raised
		Proven  bool
	}
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil || !v.Proven || len(v.Streams) != len(kv.Streams()) {
		t.Fatalf("%v: %s%s", err, r.Stdout, r.Stderr)
	}
	for _, s := range v.Streams {
		raised := s.Stream == "KV_UNIBUS_users" || s.Stream == "KV_UNIBUS_handles"
		if s.Replicas != 3 || s.FollowersCurrent != 2 || !s.Written || (s.Was == 1) != raised {
			t.Errorf("%+v", s)
		}
	}
	b.compare(t, before, b.everything(t))
	b.WaitHealthy(60 * time.Second)
}

// nodeWiped: a node that has lost its disk is filled by the others, and counts
// again: with it, the loss of another one is survived.
func (b *backups) nodeWiped(t *testing.T) {
	before := b.everything(t)
	b.Kill(3)
	meanwhile := newPerson(t, "meanwhile")
	cluster.WaitFor(t, 60*time.Second, "a change without the third node", func() error {
		if r := b.CLI("--direct", "user", "add", "--handle", "meanwhile", "--sign-pub", meanwhile.key.NKey()); r.Code != 0 {
			return fmt.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		return nil
	})
	b.wipe(t, 3)
	b.StartNode(3)
	started := time.Now()
	cluster.WaitFor(t, 90*time.Second, "three current replicas of everything", func() error {
		for _, h := range kv.Health(t.Context(), b.link) {
			if h.Err != nil || h.Leader == "" || h.FollowersCurrent != 2 {
				return fmt.Errorf("%s: leader %q, %d followers current: %w", h.Stream, h.Leader, h.FollowersCurrent, h.Err)
			}
		}
		return nil
	})
	t.Logf("filled again after %s", time.Since(started).Round(time.Millisecond))
	b.WaitHealthy(60 * time.Second)
	b.Kill(1)
	cluster.WaitFor(t, 60*time.Second, "a change with the node that was wiped as half of the quorum", func() error {
		if r := b.CLIEnvironment(map[string]string{"UNIBUS_NATS_URL": b.NATSURL(3)}, nil, "--direct", "room", "create", "after", "--owner", "alice"); r.Code != 0 {
			return fmt.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		return nil
	})
	b.StartNode(1)
	b.WaitHealthy(60 * time.Second)
	after := b.everything(t)
	for k, v := range before {
		if after[k] != v {
			t.Errorf("%s was %s and is %q", k, v, after[k])
		}
	}
}

// revisions are those of all users, by hex key.
func (b *backups) revisions(t *testing.T) map[string]uint64 {
	t.Helper()
	var v struct{ Users []bus.UserInfo }
	r := b.run(t, 0, "", "--direct", "user", "list", "--json")
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil {
		t.Fatal(err)
	}
	out := map[string]uint64{}
	for _, u := range v.Users {
		out[u.SignPub.Hex()] = u.Revision
	}
	return out
}

// wipe takes the disk of a node that does not run.
func (b *backups) wipe(t *testing.T, i int) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(b.NodeDir(i), "state")); err != nil {
		t.Fatal(err)
	}
}

// wiped: all three stores are lost.
func (b *backups) wiped(t *testing.T) {
	b.file = filepath.Join(b.dir, "two.backup")
	create := []string{"--direct", "backup", "create", "--out", b.file, "--recipients-file", b.key + ".pub"}
	if full {
		b.large(t, create...)
	} else {
		b.run(t, 0, "wrote", create...)
	}
	old := b.everything(t)
	said, at := map[bus.RoomID][]string{}, map[bus.RoomID]kv.Extent{}
	rooms := []bus.RoomID{"ops", "short"}
	if full {
		rooms = append(rooms, "large")
	}
	for _, room := range rooms {
		said[room], at[room] = b.said(t, room)
	}
	for _, i := range b.Nodes() {
		b.Kill(i)
	}
	for _, i := range b.Nodes() {
		b.wipe(t, i)
	}
	for _, i := range b.Nodes() {
		b.StartNode(i)
	}
	b.WaitHealthy(90 * time.Second)
	cluster.WaitFor(t, 30*time.Second, "nobody to be admitted", func() error {
		if v, err := b.attempt(1, b.alice); v != refused {
			return fmt.Errorf("%s: %w", v, err)
		}
		return nil
	})
	restore := []string{"--direct", "restore", b.file, "--age-identity", b.key, "--revoked", "alice"}
	b.run(t, 0, "room short: 5 messages would be written", append(restore, "--dry-run")...)
	b.answers(refused, b.admin)
	// A stream with something else in it is in the way, the half of an interrupted
	// restore is not.
	b.fill(t, "short", kv.StoredRecord{Key: bus.StoreSubject("short", b.frank.key, "t"), Revision: 8, At: time.Now(), Value: []byte("another")})
	b.run(t, 1, "messages of room short: the room holds other messages here, up to 8", append(restore, "--yes")...)
	if err := kv.DropRoomStream(t.Context(), b.bus, "short"); err != nil {
		t.Fatal(err)
	}
	b.fill(t, "ops", b.half...)
	if full {
		b.killed(t, append(restore, "--yes")...)
	}
	started := time.Now()
	r := b.run(t, 0, "read back as they must be", append(restore, "--yes")...)
	t.Logf("restored in %s: %s", time.Since(started).Round(time.Millisecond), r.Stdout)
	for room, want := range said {
		if got, now := b.said(t, room); !slices.Equal(got, want) || now != at[room] {
			t.Errorf("room %s holds %v\n%s\nwant %v\n%s", room, now, strings.Join(got, "\n"), at[room], strings.Join(want, "\n"))
		}
	}
	b.settings(t)
	b.waitAdmits(b.admin, b.Nodes()...)
	b.answers(admitted, b.erin)
	for _, p := range []*person{b.alice, b.bob, b.carol, b.dave} {
		b.answers(refused, p)
	}
	now := b.everything(t)
	key := "users " + b.alice.key.Hex()
	if !strings.Contains(now[key], `"status":"revoked"`) || !strings.Contains(old[key], `"status":"active"`) {
		t.Errorf("alice, who was revoked since, is now %s", now[key])
	}
	delete(old, key)
	delete(now, key)
	b.compare(t, old, now)
	b.goesOn(t)
	b.run(t, 0, "0 records written", append(restore, "--yes")...)
	b.run(t, 0, "cluster.restore", "--direct", "audit", "list")
	b.run(t, 1, "is taken by", "--direct", "user", "add", "--handle", "erin", "--sign-pub", newPerson(t, "z").key.NKey())
	b.run(t, 1, "belongs to a revoked user", "--direct", "user", "add", "--handle", "bob", "--sign-pub", newPerson(t, "z").key.NKey())
	if p := newPerson(t, "new"); true {
		b.run(t, 0, "registered", "--direct", "user", "add", "--handle", "new", "--sign-pub", p.key.NKey())
		b.waitAdmits(p, b.Nodes()...)
	}
	b.run(t, 1, "not empty", append(restore, "--yes")...)
}

// large: a room of half a gigabyte goes into a backup without being in memory.
func (b *backups) large(t *testing.T, create ...string) {
	const messages, size = 8 << 10, 64 << 10
	b.addRoom("large", b.alice, kv.RoomOptions{Durable: true, Retention: bus.Retention{MaxBytes: 1 << 30}})
	cluster.WaitFor(t, 30*time.Second, "the stream of the room", func() error {
		_, err := kv.ReadRoom(t.Context(), b.bus, "large", func(kv.StoredRecord) error { return nil })
		return err
	})
	js, err := jetstream.New(b.bus, jetstream.WithPublishAsyncMaxPending(64))
	if err != nil {
		t.Fatal(err)
	}
	subject := bus.StoreSubject("large", b.alice.key, "t")
	for n := range messages {
		if _, err := js.PublishAsync(subject, binary.BigEndian.AppendUint64(make([]byte, size), uint64(n)), jetstream.WithStallWait(20*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-time.After(2 * time.Minute):
		t.Fatal("the messages are not stored")
	}
	started := time.Now()
	var most int64
	b.watched(t, create, func(p *os.Process, _ string) { most = max(most, resident(p)) })
	t.Logf("a backup of %d MiB took %s; unibusctl had %d MiB", messages*size>>20, time.Since(started).Round(time.Millisecond), most>>10)
	if most == 0 || most > 192<<10 {
		t.Errorf("unibusctl had %d KiB", most)
	}
}

// killed: a restore that is killed in the middle of a room is finished by the
// same line, and until then nobody is let in.
func (b *backups) killed(t *testing.T, restore ...string) {
	r := b.watched(t, restore, func(p *os.Process, said string) {
		if strings.Contains(said, "room large") {
			_ = p.Kill()
		}
	})
	if r.Code == 0 || !strings.Contains(r.Stderr, "room large") {
		t.Errorf("it was not killed in time: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	b.answers(refused, b.admin)
}

// watched runs unibusctl and looks at it while it runs.
func (b *backups) watched(t *testing.T, args []string, look func(p *os.Process, said string)) cluster.Result {
	t.Helper()
	said, err := os.Create(filepath.Join(t.TempDir(), "said"))
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close() //nolint:errcheck // its name is read
	cmd := exec.CommandContext(t.Context(), filepath.Join(b.Bin, "unibusctl"), args...)
	for k, v := range b.CLIEnv(filepath.Join(b.Dir, "admin.nk")) {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		text, _ := os.ReadFile(said.Name()) // it is ours
		select {
		case err := <-ended:
			if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			return cluster.Result{Stdout: out.String(), Stderr: string(text), Code: cmd.ProcessState.ExitCode()}
		case <-tick.C:
			look(cmd.Process, string(text))
		}
	}
}

// resident is how much memory a process had at most, in KiB; 0 if it has ended.
func resident(p *os.Process) (kib int64) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid))
	if err != nil {
		return 0
	}
	_, peak, _ := strings.Cut(string(status), "VmHWM:")
	_, _ = fmt.Sscan(peak, &kib)
	return kib
}

// fill makes the stream of a room that nobody knows yet.
func (b *backups) fill(t *testing.T, room bus.RoomID, messages ...kv.StoredRecord) {
	t.Helper()
	ctx, last := t.Context(), len(messages)-1
	r, err := kv.BeginRoomRestore(ctx, b.bus, room, bus.Retention{}, kv.Extent{Messages: uint64(len(messages)), FirstSeq: messages[0].Revision, LastSeq: messages[last].Revision})
	for _, m := range messages {
		if err == nil {
			err = r.Write(ctx, m)
		}
	}
	if err == nil {
		err = r.Finish(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// settings: what was restored is what the recorder makes, to the field.
func (b *backups) settings(t *testing.T) {
	js, err := jetstream.New(b.bus)
	if err != nil {
		t.Fatal(err)
	}
	for room, keep := range map[bus.RoomID]bus.Retention{"ops": {}, "short": {MaxMessages: 5, MaxAgeSeconds: 7200}} {
		s, err := js.Stream(t.Context(), bus.RoomStream(room))
		if err != nil {
			t.Fatal(err)
		}
		got, want := s.CachedInfo().Config, kv.RoomStream(room, keep)
		if err := kv.Verify(got, want); err != nil || got.MaxBytes != want.MaxBytes {
			t.Errorf("%v, %d bytes", err, got.MaxBytes)
		}
	}
}

// goesOn: who was in a room is in it again, finds what was said, hears what is
// said now behind it, and its files.
func (b *backups) goesOn(t *testing.T) {
	b.waitAdmits(b.frank, b.Nodes()...)
	api := b.client(t, b.frank)
	history, _, err := api.Messages(t.Context(), "ops", sdk.MessageQuery{})
	if err != nil || len(history) != 12 || history[11].Seq != 12 || len(history[11].Data) != 110_000 || history[11].NKey != b.alice.key.NKey() {
		t.Errorf("%d messages, %v", len(history), err)
	}
	heard := make(chan uint64, 100)
	room := b.enter(t, b.frank, "ops")
	hearing, err := room.Subscribe(t.Context(), sdk.Hear{From: sdk.FromSequence(11)}, func(m sdk.Message) { heard <- m.Seq })
	if err != nil {
		t.Fatal(err)
	}
	defer hearing.Unsubscribe()
	if seq, err := room.Publish(t.Context(), "t", []byte("on")); err != nil || seq != 13 {
		t.Errorf("the first new message has sequence %d, %v", seq, err)
	}
	for want := uint64(11); want <= 13; want++ {
		select {
		case got := <-heard:
			if got != want {
				t.Errorf("heard %d, want %d", got, want)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%d is not heard", want)
		}
	}
	var file bytes.Buffer
	if _, err := api.GetBlob(t.Context(), "ops", "a file.bin", &file, sdk.BlobOptions{}); err != nil || !bytes.Equal(file.Bytes(), bytes.Repeat([]byte("file"), 100_000)) {
		t.Errorf("the file has %d bytes, %v", file.Len(), err)
	}
	if list, err := api.Blobs(t.Context(), "ops"); err != nil || fmt.Sprint(list.Blobs) != fmt.Sprint(b.files.Blobs) {
		t.Errorf("files %+v, want %+v, %v", list.Blobs, b.files.Blobs, err)
	}
}

// compare wants two states to be the same, record by record.
func (b *backups) compare(t *testing.T, before, after map[string]string) {
	t.Helper()
	for k, v := range before {
		if after[k] != v {
			t.Errorf("%s was %s and is %q", k, v, after[k])
		}
	}
	for k, v := range after {
		if _, ok := before[k]; !ok {
			t.Errorf("%s was nothing and is %s", k, v)
		}
	}
}

// everything is what the buckets hold, read as any client would. An index entry
// that proposes nothing is as good as none.
func (b *backups) everything(t *testing.T) map[string]string {
	t.Helper()
	nc := b.Ops()
	js, err := nc.JetStream(nats.MaxWait(5 * time.Second))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, bucket := range []string{kv.Users, kv.Rooms, kv.Members, kv.Handles, kv.RoomKeys, kv.RoomsByMember} {
		store, err := js.KeyValue(bucket)
		if err != nil {
			t.Fatal(err)
		}
		keys, err := store.Keys()
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(keys)
		for _, k := range keys {
			if strings.HasPrefix(k, "_") {
				continue
			}
			e, err := store.Get(k)
			if err != nil {
				t.Fatalf("%s %q: %v", bucket, k, err)
			}
			if bucket == kv.RoomsByMember && strings.Contains(string(e.Value()), `"present":false`) {
				continue
			}
			out[strings.TrimPrefix(bucket, "UNIBUS_")+" "+k] = string(e.Value())
		}
	}
	return out
}
