package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// backupVector is testdata/backup/vector.json: with v1.backup beside it, all
// that another program needs to check its reading of the format.
type backupVector struct {
	AgeIdentity string   `json:"age_identity"`
	SignerSeed  string   `json:"signer_seed"`
	Signer      string   `json:"signer"`
	SHA256      string   `json:"sha256"`
	Lines       []string `json:"lines"`
}

func vectorSnapshot() *kv.Snapshot {
	at := time.Date(2026, 11, 25, 10, 0, 0, 0, time.UTC)
	rec := func(key, value string, rev uint64) kv.StoredRecord {
		return kv.StoredRecord{Key: key, Revision: rev, At: at.Add(time.Duration(rev) * time.Second), Value: []byte(value)}
	}
	user := strings.Repeat("ab", 32)
	return &kv.Snapshot{At: at.Add(time.Minute), Parts: []kv.Part{
		{Name: kv.PartUsers, Stream: "KV_UNIBUS_users", Created: at, Records: []kv.StoredRecord{rec(user, `{"v":1}`, 3), {Key: "gone", Revision: 4, At: at}}},
		{Name: kv.PartRooms, Stream: "KV_UNIBUS_rooms", Created: at, Records: []kv.StoredRecord{rec("ops", `{"v":1,"room":"ops","description":"<&>"}`, 1)}},
		{Name: kv.PartMembers, Stream: "KV_UNIBUS_members", Created: at, Records: []kv.StoredRecord{rec("ops."+user, "", 1)}},
		{Name: kv.PartHandles, Stream: "KV_UNIBUS_handles", Created: at, Records: []kv.StoredRecord{}},
		{Name: kv.PartRoomKeys, Stream: "KV_UNIBUS_room_keys", Created: at, Records: []kv.StoredRecord{}},
		{Name: kv.PartAudit, Stream: "UNIBUS_AUDIT", Created: at, Records: []kv.StoredRecord{rec("membership-n1", `{"n":7,"seq":9,"hash":"00"}`, 9)}},
	}}
}

// vectorSources is the vectorSnapshot with what one room holds: two messages, the
// last one of which is gone, and a file.
func vectorSources() []backupSource {
	at := time.Date(2026, 11, 25, 10, 0, 0, 0, time.UTC)
	alice := "UDLVVGABQKYQVN6VJP7NHSLEA45A5YLS6PNKMIZFV4BBU2HXA5IRUVAL"
	messages := []kv.StoredRecord{
		{
			Key: "store.ops." + alice + ".deploy.done", Revision: 41, At: at.Add(123456789), Value: []byte("one"),
			Header: nats.Header{"Nats-Msg-Id": {alice + ":a1"}, "Unibus-Msg-Id": {"a1"}},
		},
		{Key: "store.ops." + alice + ".chat", Revision: 43, At: at.Add(time.Second), Value: []byte{}},
	}
	id := strings.Repeat("0f", 16)
	blob, _ := json.Marshal(bus.StoredBlob{ID: id, BlobInfo: bus.BlobInfo{
		Name: "a.txt", Size: 5, SHA256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", CreatedAt: at, CreatedBy: alice,
	}})
	files := []kv.StoredRecord{
		{Key: id + ".00000000", Revision: 1, At: at, Value: []byte("hello")},
		{Key: id + ".file", Revision: 2, At: at, Value: blob},
	}
	part := func(name, stream string, rs []kv.StoredRecord, e kv.Extent) backupSource {
		return backupSource{name, stream, at, func(emit func(kv.StoredRecord) error) (kv.Extent, error) {
			for _, r := range rs {
				if err := emit(r); err != nil {
					return e, err
				}
			}
			return e, nil
		}}
	}
	return append(sourcesOf(vectorSnapshot()),
		part("room:ops", "ROOM_ops", messages, kv.Extent{FirstSeq: 41, LastSeq: 44}), part("files:ops", "OBJ_UNIBUS_blobs", files, kv.Extent{}))
}

// What a backup says of rooms is held together: messages of other rooms, out of
// order or with something behind a header, and files that are not whole,
// are not taken.
func TestBackupContents(t *testing.T) {
	var good bytes.Buffer
	if _, err := writeLines(&good, vectorSnapshot().At, vectorSources()); err != nil {
		t.Fatal(err)
	}
	if in, err := readLines(bytes.NewReader(good.Bytes())); err != nil || len(in.rooms) != 1 || in.rooms[0].stored[0].Name != "a.txt" {
		t.Fatalf("%v", err)
	}
	for name, edit := range map[string][2]string{
		"another room":      {"store.ops.UD", "store.old.UD"},
		"no stored subject": {"store.ops.UD", "feed.ops.UD"},
		"a pattern":         {`.chat"`, `.>"`},
		"an empty token":    {`.chat"`, `..chat"`},
		"a break": {`["a1"]`, `["a1
Nats-Rollup: all"]`},
		"out of order":    {`"rev":43`, `"rev":41`},
		"behind the end":  {`"last_seq":44`, `"last_seq":42`},
		"not the first":   {`"first_seq":41`, `"first_seq":40`},
		"a part twice":    {`{"part":"files:ops"`, `{"part":"room:ops"`},
		"a piece missing": {".00000000", ".00000001"},
		"another content": {"aGVsbG8=", "aGVsbHA="},
		"no file":         {`"key":"0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f.file","rev":2,"data":"`, `"key":"0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f.file","rev":2,"data":"AAAA`},
		"of another id":   {".file", "0.file"},
	} {
		bad := strings.Replace(good.String(), edit[0], edit[1], 1)
		if bad == good.String() {
			t.Fatalf("%s: nothing to replace", name)
		}
		if in, err := readLines(strings.NewReader(bad)); err == nil {
			t.Errorf("%s is taken: %+v", name, in.rooms)
		}
	}
	// A file that was removed while it was copied has no end, and is none.
	cut := good.String()
	begin, end := strings.Index(cut, `{"key":"0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f.file"`), strings.Index(cut, `{"end":"files:ops"`)
	cut = strings.Replace(cut[:begin]+cut[end:], `{"end":"files:ops","count":2}`, `{"end":"files:ops","count":1}`, 1)
	if in, err := readLines(strings.NewReader(cut)); err != nil || in.rooms[0].Files != 0 {
		t.Errorf("a file without an end: %v", err)
	}
}

// The format stays what docs/backup.md says: the file of this repository is
// read, and what is encrypted is written, to the byte.
func TestBackupVector(t *testing.T) {
	dir := filepath.Join("testdata", "backup")
	var v backupVector
	if os.Getenv("UNIBUS_UPDATE") != "" {
		v = newBackupVector(t, dir)
	}
	data, err := os.ReadFile(filepath.Join(dir, "vector.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	b, err := openBackup(filepath.Join(dir, "v1.backup"), v.Signer)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if b.Digest != v.SHA256 {
		t.Errorf("digest %s, want %s", b.Digest, v.SHA256)
	}
	keys, err := age.ParseIdentities(strings.NewReader(v.AgeIdentity))
	if err != nil {
		t.Fatal(err)
	}
	r, err := b.lines(keys)
	if err != nil {
		t.Fatal(err)
	}
	inside, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Split(strings.TrimSuffix(string(inside), "\n"), "\n"); !slices.Equal(got, v.Lines) {
		t.Errorf("inside is\n%s", inside)
	}
	var out bytes.Buffer
	want := vectorSnapshot()
	if _, err := writeLines(&out, want.At, vectorSources()); err != nil || !bytes.Equal(out.Bytes(), inside) {
		t.Errorf("%v; what is written is\n%s", err, out.Bytes())
	}
	got, err := b.inside(keys)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got.snap) != fmt.Sprint(want) || len(got.counts) != 8 {
		t.Errorf("read %+v, want %+v", got.snap, want)
	}
	room := *got.rooms[0]
	room.stored = nil
	if w := (roomContents{Room: "ops", Messages: 2, FirstSeq: 41, LastSeq: 44, Files: 1, Bytes: 5}); len(got.rooms) != 1 || fmt.Sprint(room) != fmt.Sprint(w) {
		t.Errorf("read %+v, want %+v", room, w)
	}
	if r := got.snap.Part(kv.PartMembers).Records[0]; r.Value == nil || len(r.Value) != 0 {
		t.Error("an empty record has become a deleted one")
	}
}

func newBackupVector(t *testing.T, dir string) (v backupVector) {
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	signer, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	seed, _ := signer.Seed()
	v.AgeIdentity, v.SignerSeed = key.String(), string(seed)
	v.Signer, _ = signer.PublicKey()
	var file, lines bytes.Buffer
	snap := vectorSnapshot()
	if _, err := writeBackup(&file, snap.At, vectorSources(), []age.Recipient{key.Recipient()}, signer); err != nil {
		t.Fatal(err)
	}
	if _, err := writeLines(&lines, snap.At, vectorSources()); err != nil {
		t.Fatal(err)
	}
	v.Lines = strings.Split(strings.TrimSuffix(lines.String(), "\n"), "\n")
	if err := os.WriteFile(filepath.Join(dir, "v1.backup"), file.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	b, err := openBackup(filepath.Join(dir, "v1.backup"), v.Signer)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	v.SHA256 = b.Digest
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "vector.json"), append(data, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
	return v
}

// backupFixture is a backup on disk, whoever signed it.
func backupFixture(t *testing.T) (path, signer string, key *age.X25519Identity) {
	t.Helper()
	pair, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	signer, _ = pair.PublicKey()
	if key, err = age.GenerateX25519Identity(); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "x.backup")
	snap := vectorSnapshot()
	// Three blocks, so that the last one is not the first.
	big := kv.Part{Name: "of tomorrow", Stream: "ROOM_ops", Created: snap.At}
	for i := range 10 {
		big.Records = append(big.Records, kv.StoredRecord{Key: fmt.Sprintf("%d", i), At: snap.At, Value: bytes.Repeat([]byte{byte(i)}, 200<<10)})
	}
	snap.Parts = append(snap.Parts, big)
	if _, b, err := saveBackup(path, snap.At, sourcesOf(snap), []age.Recipient{key.Recipient()}, pair); err != nil || b.Signer != signer {
		t.Fatal(err)
	}
	return path, signer, key
}

// Nothing is taken from a file of which one byte is not what was signed, which
// is cut off, or which somebody else has signed.
func TestBackupSignature(t *testing.T) {
	path, signer, key := backupFixture(t)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(whole) < 2*backupBlock {
		t.Fatalf("the fixture has %d bytes", len(whole))
	}
	b, err := openBackup(path, signer)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if in, err := b.inside([]age.Identity{key}); err != nil || len(in.counts) != 7 || in.counts[6] != (partCount{"of tomorrow", 10}) {
		t.Fatalf("%v %v", in, err)
	}
	try := func(name string, data []byte, by string) {
		t.Helper()
		file := filepath.Join(t.TempDir(), "y.backup")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := openBackup(file, by); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%s: %v", name, err)
			if got != nil {
				got.Close()
			}
		}
	}
	for _, at := range []int{0, 5, 20, 60, 200, backupBlock - 1, backupBlock, len(whole) - 500, len(whole) - 89, len(whole) - 88, len(whole) - 60, len(whole) - 1} {
		changed := bytes.Clone(whole)
		changed[at] ^= 1
		try(fmt.Sprintf("byte %d changed", at), changed, signer)
	}
	for _, n := range []int{0, 10, 100, 300, backupBlock, len(whole) - 100, len(whole) - 1} {
		try(fmt.Sprintf("cut at %d", n), whole[:n], signer)
	}
	try("longer", append(bytes.Clone(whole), '\n'), signer)
	other, _ := nkeys.CreateUser()
	stranger, _ := other.PublicKey()
	try("signed by somebody else", whole, stranger)
	try("no signer", whole, "")
	// Somebody who has the recipients can make a backup that says what they want.
	forged := &bytes.Buffer{}
	snap := vectorSnapshot()
	if _, err := writeBackup(forged, snap.At, sourcesOf(snap), []age.Recipient{key.Recipient()}, other); err != nil {
		t.Fatal(err)
	}
	try("forged", forged.Bytes(), signer)
	try("forged, under the right name", bytes.Replace(forged.Bytes(), []byte(stranger), []byte(signer), 1), signer)
}

// What was verified is what is read: a file that changes in between is noticed.
func TestBackupChangedMeanwhile(t *testing.T) {
	path, signer, key := backupFixture(t)
	b, err := openBackup(path, signer)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1, 2, 3, 4}, backupBlock+1000); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.inside([]age.Identity{key}); err == nil || !strings.Contains(err.Error(), "changed while it was read") {
		t.Errorf("%v", err)
	}
}

// failing is a disk that is full after some bytes.
type failing struct{ left int }

func (f *failing) Write(p []byte) (int, error) {
	if len(p) > f.left {
		return f.left, errors.New("no space left on device")
	}
	f.left -= len(p)
	return len(p), nil
}

// A backup that cannot be finished leaves no file, and none replaces another.
func TestBackupIsWholeOrNotThere(t *testing.T) {
	path, _, key := backupFixture(t)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	pair, _ := nkeys.CreateUser()
	snap := vectorSnapshot()
	if _, _, err := saveBackup(path, snap.At, sourcesOf(snap), []age.Recipient{key.Recipient()}, pair); bus.CodeOf(err) != bus.Conflict {
		t.Errorf("over a backup: %v", err)
	}
	broken := append(sourcesOf(snap), backupSource{name: "z", each: func(func(kv.StoredRecord) error) (kv.Extent, error) {
		return kv.Extent{}, errors.New("the stream went away")
	}})
	if _, _, err := saveBackup(filepath.Join(filepath.Dir(path), "half"), snap.At, broken, []age.Recipient{key.Recipient()}, pair); err == nil {
		t.Error("a source that fails makes a backup")
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the old backup was touched: %v", err)
	}
	for _, left := range []int{0, 10, 500, 700} {
		if _, err := writeBackup(&failing{left}, snap.At, sourcesOf(snap), []age.Recipient{key.Recipient()}, pair); err == nil {
			t.Errorf("a disk with %d bytes takes a backup", left)
		}
	}
}

// --keep removes the oldest backups only: neither the new one, nor what has
// another name, nor what a run that is still at work is writing.
func TestBackupKeep(t *testing.T) {
	dir := t.TempDir()
	now := time.Date(2026, 11, 25, 10, 0, 0, 0, time.UTC)
	for _, name := range []string{
		"unibus-20261121T030000Z.backup", "unibus-20261122T030000Z.backup", "unibus-20261123T030000Z.backup", "unibus-20261125T100000Z.backup",
		"unibus-before-upgrade.backup", "notes.txt", ".unibus-20261120T030000Z.backup123", ".unibus-20261125T095900Z.backup77",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		at := now
		if strings.HasPrefix(name, ".unibus-20261120") {
			at = now.Add(-2 * time.Hour)
		}
		if err := os.Chtimes(filepath.Join(dir, name), at, at); err != nil {
			t.Fatal(err)
		}
	}
	removed, err := pruneBackups(dir, 2, filepath.Join(dir, "unibus-20261125T100000Z.backup"), now)
	for i := range removed {
		removed[i] = filepath.Base(removed[i])
	}
	slices.Sort(removed)
	want := []string{".unibus-20261120T030000Z.backup123", "unibus-20261121T030000Z.backup", "unibus-20261122T030000Z.backup"}
	if err != nil || !slices.Equal(removed, want) {
		t.Errorf("removed %v (%v), want %v", removed, err, want)
	}
}

// FuzzBackupLines: whatever is inside, reading it ends with a snapshot that says
// the same when it is written again, or with an error.
func FuzzBackupLines(f *testing.F) {
	var good bytes.Buffer
	snap := vectorSnapshot()
	if _, err := writeLines(&good, snap.At, sourcesOf(snap)); err != nil {
		f.Fatal(err)
	}
	f.Add(good.Bytes())
	good.Reset()
	if _, err := writeLines(&good, snap.At, vectorSources()); err != nil {
		f.Fatal(err)
	}
	f.Add(bytes.Clone(good.Bytes()))
	f.Add([]byte(`{"unibus_snapshot":1}` + "\n" + `{"part":"users"}` + "\n" + `{"end":"users","count":0}` + "\n" + `{"end":"snapshot","count":1}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		in, err := readLines(bytes.NewReader(data))
		if err != nil {
			return
		}
		snap := in.snap
		if _, err := snap.Check(); err != nil || len(in.counts) != len(snap.Parts) {
			return
		}
		var out bytes.Buffer
		if _, err := writeLines(&out, snap.At, sourcesOf(snap)); err != nil {
			return // a time that JSON cannot spell
		}
		again, err := readLines(&out)
		if err != nil || fmt.Sprint(again.snap.Parts) != fmt.Sprint(snap.Parts) {
			t.Errorf("%v: %+v became %+v", err, snap, again)
		}
	})
}
