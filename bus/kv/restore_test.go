package kv

import (
	"slices"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus"
)

// side is one side of a restore, written by hand.
type side struct {
	t       *testing.T
	records records
}

func newSide(t *testing.T) *side {
	s := &side{t, records{}}
	for _, part := range writeOrder {
		s.records[part] = map[string]StoredRecord{}
	}
	return s
}

func (s *side) put(part, key string, value []byte) {
	s.records[part][key] = StoredRecord{Key: key, Revision: uint64(len(s.records[part]) + 1), At: time.Unix(1_700_000_000, 0), Value: value}
}

func (s *side) user(k bus.UserKey, h bus.Handle, edit func(u *bus.User)) {
	u := goodUser(k, h)
	if edit != nil {
		edit(&u)
	}
	s.put(PartUsers, k.Hex(), encode(s.t, u))
	if u.Status != bus.Revoked {
		s.put(PartHandles, string(h), encode(s.t, reservation{V: 1, User: k.Hex(), Handle: h}))
	}
}

func (s *side) room(id bus.RoomID, creator bus.UserKey, edit func(r *bus.Room)) {
	r := bus.Room{V: 1, ID: id, Status: bus.RoomActive, Creator: creator, CreatedAt: time.Unix(1_700_000_000, 0).UTC()}
	if edit != nil {
		edit(&r)
	}
	s.put(PartRooms, string(id), encode(s.t, r))
}

func (s *side) member(id bus.RoomID, k bus.UserKey, role bus.RoomRole) {
	m := bus.Membership{V: 1, Room: id, User: k, Role: role, Status: bus.Present, AddedAt: time.Unix(1_700_000_000, 0).UTC()}
	s.put(PartMembers, memberKey(id, k), encode(s.t, m))
}

func (s *side) snapshot() *Snapshot {
	snap := &Snapshot{At: time.Unix(1_700_000_100, 0)}
	for _, part := range writeOrder {
		p := Part{Name: part}
		for _, r := range s.records[part] {
			p.Records = append(p.Records, r)
		}
		sortRecords(p.Records)
		snap.Parts = append(snap.Parts, p)
	}
	if _, err := snap.Check(); err != nil {
		s.t.Fatal(err)
	}
	return snap
}

func plan(t *testing.T, was, here *side, o RestoreOptions) *restorePlan {
	t.Helper()
	p, err := planRestore(was.snapshot(), here.records, o, time.Unix(1_700_000_200, 0).UTC())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func revoked(u *bus.User) {
	at := time.Unix(1_700_000_050, 0).UTC()
	u.Status, u.RevokedAt = bus.Revoked, &at
}

// why is what the plan says about a record that it leaves out, or "".
func (p *restorePlan) why(part, key string) string {
	i := slices.IndexFunc(p.skipped, func(s SkippedRecord) bool { return s.Part == part && s.Key == key })
	if i < 0 {
		return ""
	}
	return p.skipped[i].Why
}

// Who is revoked on either side is revoked afterwards, whatever the other says;
// nothing else of the target is touched.
func TestRestoreTombstonesWin(t *testing.T) {
	a, b, c, d := newKey(t), newKey(t), newKey(t), newKey(t)
	was, here := newSide(t), newSide(t)
	was.user(a, "alice", nil)
	here.user(a, "alice", revoked)
	was.user(b, "bob", revoked)
	here.user(b, "bob", nil)
	was.user(c, "carol", func(u *bus.User) { u.Role = bus.Admin })
	here.user(c, "carol", nil)
	was.user(d, "dave", revoked)
	p := plan(t, was, here, RestoreOptions{Merge: true})
	if w, ok := p.writes[PartUsers][a.Hex()]; ok {
		t.Errorf("the revoked alice would be written over: %s", w.Value)
	}
	if !strings.Contains(p.why(PartUsers, a.Hex()), "revoked here") {
		t.Errorf("alice: %q", p.why(PartUsers, a.Hex()))
	}
	if !slices.Equal(p.revoke, []bus.UserKey{b}) {
		t.Errorf("revokes %v, want bob", p.revoke)
	}
	if _, ok := p.writes[PartUsers][c.Hex()]; ok || p.why(PartUsers, c.Hex()) == "" {
		t.Error("carol would be changed, or left out without a word")
	}
	if w := p.writes[PartUsers][d.Hex()]; !same(w, was.records[PartUsers][d.Hex()]) {
		t.Errorf("the tombstone of dave is not carried over: %s", w.Value)
	}
}

// A handle stays with who has it here, also if that is a revoked user; a room of
// the same id that is another room takes in no members and no keys.
func TestRestoreChangesNoHands(t *testing.T) {
	a, b, m := newKey(t), newKey(t), newKey(t)
	was, here := newSide(t), newSide(t)
	here.user(a, "alice", revoked)
	was.user(b, "alice", nil)
	was.user(m, "mallory", nil)
	was.room("ops", m, nil)
	was.member("ops", m, bus.Owner)
	was.member("ops", b, bus.Writer)
	was.put(PartRoomKeys, "ops.1."+m.Hex(), []byte(`{}`))
	here.room("ops", a, func(r *bus.Room) { r.CreatedAt = r.CreatedAt.Add(time.Hour) })
	p := plan(t, was, here, RestoreOptions{Merge: true})
	if p.why(PartUsers, b.Hex()) == "" || p.why(PartHandles, "alice") == "" {
		t.Errorf("the handle of a revoked user would go to another key: %v", p.skipped)
	}
	if len(p.writes[PartMembers]) > 0 || len(p.writes[PartRoomKeys]) > 0 || len(p.writes[PartRooms]) > 0 {
		t.Errorf("another room takes in members or keys: %v", p.writes)
	}
	if _, ok := p.writes[PartUsers][m.Hex()]; !ok {
		t.Error("mallory, whom nothing stands against, is left out")
	}
}

// Without Merge nothing may be there that the backup does not have, and the same
// backup may be restored again.
func TestRestoreWantsAnEmptyCluster(t *testing.T) {
	a, b := newKey(t), newKey(t)
	was, empty := newSide(t), newSide(t)
	was.user(a, "alice", nil)
	was.room("ops", a, nil)
	was.member("ops", a, bus.Owner)
	empty.put(PartHandles, "freed", encode(t, reservation{V: 1, Handle: "freed"}))
	p := plan(t, was, empty, RestoreOptions{})
	if n := len(p.writes[PartUsers]) + len(p.writes[PartRooms]) + len(p.writes[PartMembers]) + len(p.writes[PartHandles]); n != 4 || len(p.skipped) > 0 {
		t.Errorf("%d writes, want 4; skipped %v", n, p.skipped)
	}
	half := newSide(t)
	half.records[PartHandles]["alice"] = was.records[PartHandles]["alice"]
	half.records[PartUsers][a.Hex()] = was.records[PartUsers][a.Hex()]
	p = plan(t, was, half, RestoreOptions{})
	if len(p.writes[PartUsers]) != 0 || len(p.writes[PartRooms]) != 1 || p.parts[PartUsers].Same != 1 {
		t.Errorf("an interrupted restore is not taken up: %v", p.writes)
	}
	for name, edit := range map[string]func(*side){
		"another user":     func(s *side) { s.user(b, "bob", nil) },
		"the same, other":  func(s *side) { s.user(a, "alice", func(u *bus.User) { u.Role = bus.Admin }) },
		"another room":     func(s *side) { s.room("x", a, nil) },
		"a foreign handle": func(s *side) { s.put(PartHandles, "x", encode(t, reservation{V: 1, User: b.Hex(), Handle: "x"})) },
		"an unreadable":    func(s *side) { s.put(PartUsers, b.Hex(), []byte("?")) },
		"a key":            func(s *side) { s.put(PartRoomKeys, "ops.1."+a.Hex(), []byte("{}")) },
	} {
		here := newSide(t)
		edit(here)
		if _, err := planRestore(was.snapshot(), here.records, RestoreOptions{}, time.Now()); bus.CodeOf(err) != bus.Conflict {
			t.Errorf("%s: %v, want a conflict", name, err)
		}
	}
}

// Who was revoked after the backup comes back revoked, and what nobody can read
// comes back as it is.
func TestRestoreRevokedSince(t *testing.T) {
	a, b := newKey(t), newKey(t)
	was := newSide(t)
	was.user(a, "alice", nil)
	was.put(PartUsers, b.Hex(), []byte(`{"v":99}`))
	p := plan(t, was, newSide(t), RestoreOptions{Revoked: []bus.UserKey{a}})
	u, err := userOf(p.writes[PartUsers][a.Hex()])
	if err != nil || u.Status != bus.Revoked || u.RevokedAt == nil || u.Handle != "alice" {
		t.Errorf("alice comes back as %+v (%v)", u, err)
	}
	if w := p.writes[PartUsers][b.Hex()]; string(w.Value) != `{"v":99}` || p.parts[PartUsers].Unreadable != 1 {
		t.Errorf("the unreadable record comes back as %q; %+v", w.Value, p.parts[PartUsers])
	}
	again := newSide(t)
	again.records[PartUsers][a.Hex()] = p.writes[PartUsers][a.Hex()]
	if p := plan(t, was, again, RestoreOptions{Revoked: []bus.UserKey{a}}); len(p.skipped) > 0 || p.parts[PartUsers].Same != 1 {
		t.Errorf("the second run: %v", p.skipped)
	}
}

// A snapshot that says something twice, out of order or under a key that would
// be taken for something else is none.
func TestSnapshotCheck(t *testing.T) {
	a := newKey(t)
	good := func() *Snapshot {
		s := newSide(t)
		s.user(a, "alice", nil)
		s.put(PartRooms, "x", []byte("?"))
		return s.snapshot()
	}
	if broken, err := good().Check(); err != nil || len(broken) != 1 || broken[0].Key != "x" {
		t.Errorf("%v, %v", broken, err)
	}
	for name, edit := range map[string]func(s *Snapshot){
		"a barrier":      func(s *Snapshot) { s.Part(PartUsers).Records[0].Key = "_barrier.membership-n1.00" },
		"a pattern":      func(s *Snapshot) { s.Part(PartUsers).Records[0].Key = ">" },
		"an empty token": func(s *Snapshot) { s.Part(PartUsers).Records[0].Key = "a..b" },
		"a line break":   func(s *Snapshot) { s.Part(PartUsers).Records[0].Key = "a\r\nPUB x" },
		"twice":          func(s *Snapshot) { p := s.Part(PartUsers); p.Records = append(p.Records, p.Records[0]) },
		"a part twice":   func(s *Snapshot) { s.Parts = append(s.Parts, s.Parts[0]) },
		"a part missing": func(s *Snapshot) { s.Parts = s.Parts[1:] },
	} {
		s := good()
		edit(s)
		if _, err := s.Check(); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}
