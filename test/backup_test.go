package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
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
		{"consistent amid changes", b.consistent},
		{"create and verify", b.create},
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

	alice, bob, carol, dave, erin *person
	file, key, signer             string
}

func (b *backups) run(t *testing.T, code int, words string, args ...string) cluster.Result {
	t.Helper()
	r := b.CLI(args...)
	if r.Code != code || !strings.Contains(r.Stdout+r.Stderr, words) {
		t.Errorf("unibusctl %s: exit %d, want %d and %q:\n%s%s", strings.Join(args, " "), r.Code, code, words, r.Stdout, r.Stderr)
	}
	return r
}

// people: alice is a writer, bob is revoked, carol is suspended, dave will be
// revoked after the backup, erin was removed from a room.
func (b *backups) people() {
	b.t.Helper()
	ctx := b.t.Context()
	b.alice, b.bob, b.carol, b.dave, b.erin = b.addUser("alice"), b.addUser("bob"), b.addUser("carol"), b.addUser("dave"), b.addUser("erin")
	b.addRoom("ops", b.alice, kv.RoomOptions{Durable: true, Description: "what was"})
	b.addRoom("old", b.alice, kv.RoomOptions{})
	for _, p := range []*person{b.bob, b.carol, b.dave, b.erin} {
		b.join("ops", p, bus.Writer)
	}
	b.must(b.store.RevokeUser(ctx, b.bob.key))
	b.must(b.store.SuspendUser(ctx, b.carol.key))
	b.must(b.store.RemoveMember(ctx, "ops", b.erin.key))
	b.must(b.store.ArchiveRoom(ctx, "old", false))
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
		Unreadable []string
	}
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	for _, p := range v.Parts {
		counts[p.Part] = p.Records
	}
	if b.signer = v.Signer; counts["users"] != 7 || counts["room_keys"] != 1 || counts["handles"] != 6 || counts["audit"] < 3 || len(v.Unreadable) != 2 {
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
	b.run(t, 0, "users 7", "backup", "verify", b.file, "--age-identity", b.key)
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
	}
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil || r.Code != 0 || v.Verified < 15 {
		t.Errorf("exit %d, %v: %s%s", r.Code, err, r.Stdout, r.Stderr)
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
	b.run(t, 0, "wrote", "--direct", "backup", "create", "--out", b.file, "--recipients-file", b.key+".pub")
	old := b.everything(t)
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
	b.run(t, 0, "nothing was written", append(restore, "--dry-run")...)
	b.answers(refused, b.admin)
	started := time.Now()
	b.run(t, 0, "read back as they must be", append(restore, "--yes")...)
	t.Logf("restored in %s", time.Since(started).Round(time.Millisecond))
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
