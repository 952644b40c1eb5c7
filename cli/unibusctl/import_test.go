package main

import (
	"bytes"
	"crypto/ed25519"
	"database/sql"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// Another system is read in clear on this machine only, and no secret stands in
// a URL.
func TestImportTLS(t *testing.T) {
	for _, tt := range []struct {
		url     string
		secure  bool
		refused bool
	}{
		{"nats://127.0.0.1:4222", false, false},
		{"nats://[::1]:4222", false, false},
		{"nats://localhost:4222", false, false},
		{"tls://127.0.0.1:4222", true, false},
		{"nats://10.0.0.1:4222", true, false},
		{"nats://old.example:4222", true, false},
		{"nats://127.0.0.1.example:4222", true, false},
		{"nats://127.0.0.1:4222,nats://10.0.0.1:4222", true, false},
		{"nats://0.0.0.0:4222", true, false},
		{"tls://user:pass@127.0.0.1:4222", false, true},
		{"tls://token@127.0.0.1:4222", false, true},
		{"ws://127.0.0.1:4222", false, true},
		{"127.0.0.1:4222", false, true},
		{"", false, true},
	} {
		s := &natsSource{url: tt.url}
		if secure, err := s.secure(); secure != tt.secure || (err != nil) != tt.refused {
			t.Errorf("%s: TLS %v, %v", tt.url, secure, err)
		}
	}
}

// A record is read to the letter or not at all.
func TestImportRecord(t *testing.T) {
	flat := func(r sourceRecord) string {
		if r.problem != "" {
			return "! " + r.problem
		}
		var out []string
		for _, name := range slices.Sorted(maps.Keys(r.fields)) {
			v := r.fields[name]
			out = append(out, fmt.Sprintf("%s=%s:%s", name, v.kind, v.text))
		}
		return strings.Join(out, " ")
	}
	for in, want := range map[string]string{
		`{"a":"x","b":1.50,"c":true,"d":null,"e":[1,{"f":2}],"g":{"h":{"i":"j"}}}`: "a=text:x b=number:1.50 c=boolean:true d=null: e=list: g.h.i=text:j",
		`{}`:                                    "",
		`{"a":{}}`:                              "",
		`{"n":123456789012345678901234}`:        "n=number:123456789012345678901234",
		`{"role":"member","role":"admin"}`:      `! it has the field "role" twice`,
		`{"role":"member","r\u006fle":"admin"}`: `! it has the field "role" twice`,
		`{"a":{"b":1},"a.b":2}`:                 `! it has the field "a.b" twice`,
		`{"Role":"member","role":"admin"}`:      "Role=text:member role=text:admin",
		`[]`:                                    "! it is not a JSON object",
		`"x"`:                                   "! it is not a JSON object",
		`{"a":1} {"b":2}`:                       "! it is not JSON",
		`{"a":1`:                                "! it is not JSON",
		``:                                      "! it is not JSON",
		"{\"a\":\"\xff\"}":                      "! it is not JSON",
		strings.Repeat(`{"a":`, 40) + "1" + strings.Repeat("}", 40): "! it is nested too deep",
		`{"a":"` + strings.Repeat("x", maxImportRecord) + `"}`:      fmt.Sprintf("! it has %d bytes", maxImportRecord+8),
	} {
		if got := flat(decodeRecord([]byte(in))); got != want {
			t.Errorf("%.80s: %s, want %s", in, got, want)
		}
	}
}

// importKey is the same key for the same letter.
func importKey(letter byte) bus.UserKey {
	var k bus.UserKey
	copy(k[:], ed25519.NewKeyFromSeed(bytes.Repeat([]byte{letter}, 32)).Public().(ed25519.PublicKey))
	return k
}

// wholeMapping is what an operator would write who knows the old records.
func wholeMapping(t testing.TB, more ...string) *mapping {
	t.Helper()
	mapped := append([]string{
		"users=users", "rooms=rooms", "members=members", "users.status=state", "users.expires=until",
		"rooms.id=name", "rooms.creator=by", "rooms.status=state", "rooms.durable=keep", "rooms.encrypted=sealed", "rooms.description=about",
		"members.room=room", "members.user=who", "members.role=as", "members.status=state",
	}, more...)
	m, err := newMapping(mapped, nil, []string{
		"users.role:root=admin", "users.role:user=member", "users.status:@null=active", "users.status:off=suspended", "users.status:gone=revoked",
		"rooms.status:@null=active", "rooms.durable:@null=false", "rooms.encrypted:@null=false", "members.status:@null=present", "members.status:left=removed",
	}, nil, nil, timeRFC3339)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// planOf plans lines of the form KIND JSON against what is here, and returns one
// line for each item: KIND NAME OUTCOME DETAIL.
func planOf(t testing.TB, m *mapping, h *here, admins []string, lines ...string) ([]importItem, []string) {
	t.Helper()
	var source []container
	for _, kind := range importKinds {
		c := container{name: string(kind)}
		for _, l := range lines {
			if text, ok := strings.CutPrefix(l, string(kind)+" "); ok {
				r := decodeRecord([]byte(text))
				r.name = fmt.Sprintf("line %d", len(c.records)+1)
				c.records = append(c.records, r)
			}
		}
		source = append(source, c)
	}
	read := m.understand(source)
	may, err := adminsOf(admins, read)
	if err != nil {
		t.Fatal(err)
	}
	p := &planner{here: h, source: read, admins: may, mapped: map[importKind]bool{importUsers: true, importRooms: true, importMembers: true}}
	p.plan()
	var out []string
	for _, i := range p.items {
		out = append(out, fmt.Sprintf("%s %s %s: %s", i.Kind, i.Name, i.Outcome, i.Detail))
	}
	for _, kind := range importKinds {
		if names := p.onlyHere[kind]; len(names) > 0 {
			out = append(out, fmt.Sprintf("%s only here: %s", kind, strings.Join(names, " ")))
		}
	}
	return p.items, out
}

var importNow = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func emptyHere() *here {
	return &here{
		users: map[bus.UserKey]bus.User{}, handles: map[bus.Handle]bus.UserKey{}, rooms: map[bus.RoomID]bus.Room{},
		members: map[memberID]bus.Membership{}, unreadable: map[string]bool{}, now: importNow,
	}
}

func (h *here) withUser(letter byte, handle bus.Handle, role bus.Role, status bus.Status) *here {
	k := importKey(letter)
	h.users[k] = bus.User{V: 1, Key: k, Handle: handle, Role: role, Status: status}
	h.handles[handle] = k
	return h
}

func (h *here) withRoom(id bus.RoomID, status bus.RoomStatus) *here {
	h.rooms[id] = bus.Room{V: 1, ID: id, Status: status}
	return h
}

func (h *here) withMember(id bus.RoomID, letter byte, role bus.RoomRole, status bus.MembershipStatus) *here {
	h.members[memberID{id, importKey(letter)}] = bus.Membership{V: 1, Room: id, User: importKey(letter), Role: role, Status: status}
	return h
}

// user is a line of the old system.
func oldUser(letter byte, handle, role, more string) string {
	return fmt.Sprintf(`users {"sign_pub":%q,"handle":%q,"role":%q%s}`, importKey(letter).Hex(), handle, role, more)
}

// wantLines compares whole plans; in want K followed by a letter in angle
// brackets stands for a key.
func wantLines(t *testing.T, got []string, want ...string) {
	t.Helper()
	for i, w := range want {
		for l := byte('a'); l <= 'z'; l++ {
			w = strings.ReplaceAll(w, "K<"+string(l)+">", importKey(l).NKey())
		}
		want[i] = w
	}
	if !slices.Equal(got, want) {
		t.Errorf("plan\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

// On a fresh cluster everybody comes as they are there, admins as members.
func TestImportFresh(t *testing.T) {
	h := emptyHere().withUser('z', "boss", bus.Admin, bus.Active)
	_, got := planOf(
		t, wholeMapping(t), h, nil,
		oldUser('z', "boss", "root", ""),
		oldUser('a', "alice", "root", ""),
		oldUser('b', "bob", "user", `,"state":"off","until":"2027-01-01T00:00:00Z"`),
		oldUser('c', "carol", "user", `,"state":"gone","until":"2026-01-01T00:00:00Z"`),
		oldUser('d', "dan", "user", `,"until":"2026-01-01T00:00:00Z"`),
		`rooms {"name":"ops","by":"alice","keep":true,"about":"what happens"}`,
		`rooms {"name":"sealed","by":"alice","sealed":true}`,
		`rooms {"name":"old","by":"carol","state":"archived"}`,
		`members {"room":"ops","who":"alice","as":"owner"}`,
		`members {"room":"ops","who":"bob","as":"reader"}`,
		`members {"room":"ops","who":"carol","as":"writer"}`,
		`members {"room":"ops","who":"dan","as":"writer"}`,
		`members {"room":"old","who":"alice","as":"owner"}`,
		`members {"room":"sealed","who":"alice","as":"owner"}`,
		`members {"room":"sealed","who":"bob","as":"writer","state":"left"}`,
	)
	wantLines(
		t, got,
		"users alice create: K<a>, active; an admin there, and a member here without --admins alice",
		"users bob create: K<b>, member, suspended, until 2027-01-01T00:00:00Z",
		"users boss already: admin, active",
		"users carol create: K<c>, member, revoked",
		"users dan skipped: expired there at 2026-01-01T00:00:00Z",
		"rooms old create: made by K<c>, archived",
		"rooms ops create: made by K<a>, durable",
		"rooms sealed create: made by K<a>, encrypted",
		"members old/alice skipped: the room is archived",
		"members ops/alice create: owner",
		"members ops/bob create: reader",
		"members ops/carol skipped: the user is revoked",
		"members ops/dan skipped: the user expired there at 2026-01-01T00:00:00Z",
		"members sealed/alice create: owner",
		"members sealed/bob skipped: was removed there",
	)
}

// Nobody becomes an admin who is not named, and only who is one there can be.
func TestImportAdmins(t *testing.T) {
	h := emptyHere().withUser('z', "boss", bus.Admin, bus.Active)
	lines := []string{oldUser('a', "alice", "root", ""), oldUser('b', "bob", "root", ""), oldUser('c', "carol", "user", ""), oldUser('d', "dan", "root", `,"state":"gone"`)}
	items, _ := planOf(t, wholeMapping(t), h, []string{"bob"}, lines...)
	roles := map[string]bus.Role{}
	for _, i := range items {
		roles[i.Name] = i.user.Role
	}
	if want := map[string]bus.Role{"alice": bus.Member, "bob": bus.Admin, "carol": bus.Member, "dan": bus.Member}; !maps.Equal(roles, want) {
		t.Errorf("roles %v, want %v", roles, want)
	}
	read := readings{users: []readUser{
		{kvUser: kvUser{key: importKey('c'), handle: "carol", role: bus.Member, status: bus.Active}},
		{kvUser: kvUser{key: importKey('d'), handle: "dan", role: bus.Admin, status: bus.Revoked}},
	}}
	for _, name := range []string{"carol", "dan", "nobody", importKey('d').Hex()} {
		if _, err := adminsOf([]string{name}, read); err == nil {
			t.Errorf("--admins %s is accepted", name)
		}
	}
}

// What has ended here stays so, whatever the other system says of it.
func TestImportTombstones(t *testing.T) {
	h := emptyHere().withUser('z', "boss", bus.Admin, bus.Active).withUser('a', "alice", bus.Member, bus.Revoked).
		withUser('b', "bob", bus.Member, bus.Active).withUser('c', "carol", bus.Member, bus.Active).
		withUser('d', "dan", bus.Member, bus.Suspended).withRoom("ops", bus.RoomActive).withRoom("old", bus.RoomArchived).
		withMember("ops", 'b', bus.Writer, bus.Removed)
	items, got := planOf(
		t, wholeMapping(t), h, nil,
		oldUser('z', "boss", "root", ""),
		oldUser('a', "alice", "user", ""),
		oldUser('b', "bob", "user", ""),
		oldUser('c', "carol", "user", `,"state":"gone"`),
		oldUser('d', "dan", "user", ""),
		`rooms {"name":"ops","by":"boss"}`,
		`rooms {"name":"old","by":"boss"}`,
		`members {"room":"ops","who":"alice","as":"writer"}`,
		`members {"room":"ops","who":"bob","as":"writer"}`,
		`members {"room":"ops","who":"carol","as":"writer"}`,
		`members {"room":"old","who":"bob","as":"writer"}`,
	)
	for _, i := range items {
		if i.Outcome == toCreate {
			t.Errorf("%s %s comes back", i.Kind, i.Name)
		}
	}
	wantLines(
		t, got,
		"users alice kept: is revoked here, which is final; active there",
		"users bob already: member, active",
		"users boss already: admin, active",
		"users carol revoke: active here, revoked there",
		"users dan kept: is suspended here, active there",
		"rooms old kept: is archived here, which is final",
		"rooms ops already: active",
		"members old/bob skipped: the room is archived",
		"members ops/alice skipped: the user is revoked",
		"members ops/bob kept: was removed here",
		"members ops/carol skipped: the user is revoked",
	)
}

// What contradicts is named with the way out, and lends nothing to what rests
// on it.
func TestImportConflicts(t *testing.T) {
	h := emptyHere().withUser('z', "boss", bus.Admin, bus.Active).withUser('y', "alice", bus.Member, bus.Active).
		withUser('e', "eve", bus.Member, bus.Active).withRoom("ops", bus.RoomActive).withRoom("mine", bus.RoomActive).
		withRoom("late", bus.RoomActive).withMember("ops", 'e', bus.Owner, bus.Present).withMember("late", 'e', bus.Writer, bus.Present).
		withMember("late", 'z', bus.Owner, bus.Present)
	h.unreadable[kv.Users+" "+importKey('x').Hex()] = true
	_, got := planOf(
		t, wholeMapping(t), h, nil,
		oldUser('a', "alice", "user", ""),
		oldUser('b', "bob", "user", ""),
		oldUser('c', "bob", "user", ""),
		oldUser('d', "dan", "user", ""),
		oldUser('d', "dan", "user", `,"state":"gone"`),
		oldUser('e', "eve", "user", `,"state":"off"`),
		oldUser('x', "xenia", "user", ""),
		oldUser('f', "frank", "operator", ""),
		oldUser('g', "gus", "user", `,"state":"?"`),
		oldUser('h', "Hal", "user", ""),
		`rooms {"name":"ops","by":"boss","keep":true}`,
		`rooms {"name":"late","by":"boss"}`,
		`rooms {"name":"new","by":"bob"}`,
		`rooms {"name":"sealed","by":"eve","sealed":true}`,
		`members {"room":"ops","who":"eve","as":"reader"}`,
		`members {"room":"late","who":"eve","as":"reader"}`,
		`members {"room":"late","who":"alice","as":"reader"}`,
		`members {"room":"new","who":"bob","as":"reader"}`,
		fmt.Sprintf(`members {"room":"late","who":%q,"as":"reader"}`, importKey('d').Hex()),
		`members {"room":"nowhere","who":"eve","as":"reader"}`,
		`members {"room":"late","who":"frank","as":"reader"}`,
	)
	wantLines(
		t, got,
		"users alice conflict: the handle is that of K<y> here: --fix users/K<a>.handle=NAME",
		"users bob conflict: 2 users have the handle bob there: --fix users/K<b>.handle=NAME",
		"users bob conflict: 2 users have the handle bob there: --fix users/K<c>.handle=NAME",
		"users eve conflict: suspended there, active here: unibusctl user suspend eve",
		"users xenia conflict: the record here cannot be read: unibusctl user show K<x>",
		"rooms late already: active",
		"rooms new conflict: 2 users are called bob there: --fix rooms/new.creator=USER",
		"rooms ops conflict: durable false and encrypted false here, durable true and encrypted false there, which cannot be changed",
		"rooms sealed conflict: its creator is not imported: --fix rooms/sealed.creator=USER",
		"members late/K<d> conflict: their user is not imported",
		"members late/alice conflict: their user is not imported",
		"members late/eve conflict: their user is not imported",
		"members late/frank conflict: nobody is called frank",
		"members new/bob conflict: 2 users are called bob there",
		"members nowhere/eve conflict: their user is not imported",
		"members ops/eve conflict: their user is not imported",
		`users K<f> unknown: users.role: role "operator" is refused: a role is member or admin`,
		`users K<g> unknown: users.status: "?" is none of active, suspended, revoked`,
		`users K<h> unknown: users.handle: handle "Hal" is refused: a handle is 1 to 32 of a-z 0-9 _ - and starts with a letter`,
		"users K<d> unknown: one of 2 records of the same",
		"users K<d> unknown: one of 2 records of the same",
		"users only here: alice boss",
		"rooms only here: mine",
		"members only here: late/boss",
	)
}

// --fix corrects one record; who was meant by the old name is still found.
func TestImportFix(t *testing.T) {
	m, err := newMapping(
		[]string{"users=users", "rooms=rooms", "members=members", "rooms.id=name", "rooms.creator=@owner", "members.room=room", "members.user=who", "members.role=as"},
		[]string{"users.status=active", "rooms.status=active", "rooms.durable=false", "rooms.encrypted=false", "members.status=present"},
		[]string{"users.handle:Hal=hal", "members.user:Hal=hal"},
		[]string{"users/" + importKey('b').Hex() + ".handle=bob2", "rooms/two.creator=alice"}, nil, timeRFC3339)
	if err != nil {
		t.Fatal(err)
	}
	_, got := planOf(
		t, m, emptyHere(), nil,
		oldUser('a', "alice", "member", ""), oldUser('b', "alice", "member", ""), oldUser('h', "Hal", "member", ""),
		`rooms {"name":"one"}`, `rooms {"name":"two"}`,
		`members {"room":"one","who":"Hal","as":"owner"}`, `members {"room":"two","who":"alice","as":"owner"}`,
	)
	wantLines(
		t, got,
		"users alice create: K<a>, member, active",
		"users bob2 create: K<b>, member, active",
		"users hal create: K<h>, member, active",
		"rooms one create: made by K<h>",
		"rooms two conflict: 2 users are called alice there: --fix rooms/two.creator=USER",
		"members one/hal create: owner",
		"members two/alice conflict: 2 users are called alice there",
	)
	if len(m.used) != 2 {
		t.Errorf("fixes that met a record: %v", m.used)
	}
}

// Parts of a key, a list where a word is wanted, a kind without all its fields.
func TestImportMapping(t *testing.T) {
	m, err := newMapping([]string{"members=m", "members.room=@key.1", "members.user=@key.2", "members.role=role"}, []string{"members.status=present"}, nil, nil, nil, timeUnix)
	if err != nil {
		t.Fatal(err)
	}
	records := []sourceRecord{}
	for _, kv := range [][2]string{
		{"ops." + importKey('a').Hex(), `{"role":"owner"}`}, {"ops", `{"role":"owner"}`}, {"ops." + importKey('b').NKey(), `{"role":["owner"]}`},
	} {
		r := decodeRecord([]byte(kv[1]))
		r.name, r.key = kv[0], kv[0]
		records = append(records, r)
	}
	read := m.understand([]container{{name: "m", records: records}})
	if len(read.members) != 1 || read.members[0].user != importKey('a').NKey() || read.members[0].room != "ops" {
		t.Errorf("read %+v", read.members)
	}
	if len(read.unread) != 2 || !strings.Contains(read.unread[0].why, "members.user: it has none") || !strings.Contains(read.unread[1].why, "is a list") {
		t.Errorf("not understood: %+v", read.unread)
	}
	if got := m.missing(importUsers); !slices.Equal(got, []string{"users.status"}) {
		t.Errorf("of users there are missing %v", got)
	}
	if got := m.missing(importRooms); len(got) != 5 {
		t.Errorf("of rooms there are missing %v", got)
	}
	for unix, want := range map[string]string{"1767225600": "2026-01-01T00:00:00Z", "253402300800": "", "x": "", "": ""} {
		if at, err := m.time(unix); (err == nil) != (want != "") || err == nil && at.Format(time.RFC3339) != want {
			t.Errorf("%s is %s, %v", unix, at, err)
		}
	}
	none := []string{}
	for name, bad := range map[string][5][]string{
		"no equals":         {{"users"}, none, none, none},
		"unknown kind":      {{"people=x"}, none, none, none},
		"unknown field":     {{"users.color=x"}, none, none, none},
		"container twice":   {{"users=a", "users=b"}, none, none, none},
		"owner elsewhere":   {{"users.handle=@owner"}, none, none, none},
		"set without value": {none, {"users.role"}, none, none},
		"value twice":       {none, none, {"users.role:a=admin", "users.role:a=member"}, none},
		"value without":     {none, none, {"users.role=admin"}, none},
		"fix of a key":      {none, none, none, {"users/x.key=y"}},
		"fix of nothing":    {none, none, none, {"users.handle=y"}},
	} {
		if _, err := newMapping(bad[0], bad[1], bad[2], bad[3], nil, timeRFC3339); exitCode(err) != exitUsage {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A database is read as it is stored, with what its log holds and no reader has
// taken over yet; and nothing changes beside it.
func TestImportSQLite(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "unibus.db")
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=journal_mode(wal)")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close() //nolint:errcheck // a test's own
	for _, q := range []string{
		`CREATE TABLE "people ""1""" (k BLOB, handle TEXT, admin BOOLEAN, since DATETIME, score REAL, PRIMARY KEY(k)) WITHOUT ROWID`,
		`CREATE TABLE nonces (n TEXT)`,
		`INSERT INTO nonces VALUES ('secret'), ('other')`,
		`INSERT INTO "people ""1""" VALUES (x'0102', 'alice', 1, '2026-01-01 00:00:00', 1.5), (x'0103', 'bob', 0, NULL, NULL)`,
	} {
		if _, err := db.Exec(q); err != nil {
			t.Fatal(err)
		}
	}
	before := treeOf(t, dir)
	if !strings.Contains(before, "unibus.db-wal") {
		t.Fatal("there is no log to be taken over")
	}
	got, err := (&sqliteSource{path: path}).read(t.Context(), func(name string) bool { return name == "nonces" })
	if err != nil {
		t.Fatal(err)
	}
	if after := treeOf(t, dir); after != before {
		t.Errorf("the source changed:\n%s\nwas\n%s", after, before)
	}
	if len(got) != 2 || got[0].name != "nonces" || got[0].unread != 2 || got[0].records != nil || got[1].name != `people "1"` || len(got[1].records) != 2 {
		t.Fatalf("read %+v", got)
	}
	want := map[string]sourceValue{
		"k": {"0102", kindBytes}, "handle": {"alice", kindText}, "admin": {"1", kindNumber}, "since": {"2026-01-01 00:00:00", kindText}, "score": {"1.5", kindNumber},
	}
	if r := got[1].records[0]; !maps.Equal(r.fields, want) || r.name != "row 1" {
		t.Errorf("read %+v", r)
	}
	if v := got[1].records[1].fields["since"]; v.kind != kindNull {
		t.Errorf("nothing is read as %+v", v)
	}

	// A page is overwritten: a database that is not whole gives nobody access.
	if _, err := db.Exec("PRAGMA wal_checkpoint(TRUNCATE)"); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	copy(raw[4096:], bytes.Repeat([]byte{0xa5}, 4096))
	broken := filepath.Join(t.TempDir(), "broken.db")
	if err := os.WriteFile(broken, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{broken, filepath.Join(dir, "none.db"), dir} {
		if got, err := (&sqliteSource{path: p}).read(t.Context(), func(string) bool { return false }); err == nil {
			t.Errorf("%s is read: %+v", p, got)
		}
	}
}

// treeOf spells a directory: names, sizes, contents.
func treeOf(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		raw, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(e.Name(), "-shm") {
			raw = nil // the writer's own, shared memory
		}
		fmt.Fprintf(&out, "%s %x\n", e.Name(), raw)
	}
	return out.String()
}

// Lines of several files and of one mixed file come under their kinds; a line
// without a kind is kept to be reported.
func TestImportNDJSON(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	read := func(s *ndjsonSource) string {
		got, err := s.read(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, c := range got {
			for _, r := range c.records {
				out = append(out, fmt.Sprintf("%s/%s/%s", c.name, r.name, r.problem))
			}
		}
		return strings.Join(out, " ")
	}
	users := write("u", "{\"a\":1}\n\n{\"a\":2}\r\n{")
	mixed := write("m", `{"kind":"rooms"}`+"\n"+`{"kind":"users"}`+"\n"+`{"other":1}`+"\n"+"["+strings.Repeat(" ", maxImportRecord+100)+"]\n"+`{"kind":"rooms"}`)
	if got, want := read(&ndjsonSource{files: []namedFile{{"users", users}}}), "users/line 1/ users/line 3/ users/line 4/it is not JSON"; got != want {
		t.Errorf("read %s, want %s", got, want)
	}
	got := regexp.MustCompile(`\d+ bytes`).ReplaceAllString(read(&ndjsonSource{files: []namedFile{{"", mixed}}, kindField: "kind"}), "N bytes")
	if want := "(none)/line 3/ (none)/line 4/it has N bytes rooms/line 1/ rooms/line 5/ users/line 2/"; got != want {
		t.Errorf("read %s, want %s", got, want)
	}
}

// What is missing on the command line is said, and nothing is asked of any
// server.
func TestImportUsage(t *testing.T) {
	users := filepath.Join(t.TempDir(), "u.ndjson")
	if err := os.WriteFile(users, []byte(`{"sign_pub":"x","handle":"alice","secret":"hunter2"}`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args string
		code int
		want string
	}{
		{"", 2, "name one source"},
		{"--from-sqlite a --from-ndjson users=b", 2, "name one source"},
		{"--from-ndjson x", 2, "--from-ndjson users=x"},
		{"--from-nats nats://u:p@old:4222", 1, "holds a secret"},
		{"--from-ndjson users=" + users, 2, "works on the live KV only"},
		{"--from-ndjson users=" + users + " --direct", 1, "nobody says what users.status are"},
		{"--from-ndjson " + users + " --kind-field k", 1, "--map users=NAME"},
		{"--from-ndjson users=" + users + " --direct --set users.status=active --map rooms=none", 1, `the source has no "none" for rooms; it has "users"`},
		{"--from-ndjson users=" + users + " --direct --set users.status=active --ignore users", 2, "mapped and ignored"},
		{"--from-ndjson users=" + users + " --direct --set users.status=active --fix users/y.handle=z", 1, "meets no record"},
		{"--from-ndjson users=" + users + " --direct --set users.status=active --admins alice", 1, "nobody of that name is an active admin there"},
		{"--from-ndjson users=" + users + " --direct --set users.status=active", 2, "needs the ops seed"},
	} {
		var stdout, stderr bytes.Buffer
		a := &app{in: strings.NewReader(""), out: &stdout, errw: &stderr, getenv: func(string) string { return "" }, now: time.Now, rand: nil}
		code := a.run(t.Context(), append([]string{"import"}, strings.Fields(tt.args)...))
		all := stdout.String() + stderr.String()
		if code != tt.code || !strings.Contains(all, tt.want) {
			t.Errorf("import %s: exit %d, want %d and %q\n%s", tt.args, code, tt.code, tt.want, all)
		}
		if strings.Contains(all, "hunter2") {
			t.Errorf("import %s shows a value: %s", tt.args, all)
		}
	}
}

// FuzzImport: whatever the lines of another system hold, each of them is in the
// plan once; nobody comes back who is revoked here, or becomes an admin; and
// what would be written is a record that can be read.
func FuzzImport(f *testing.F) {
	for _, s := range []string{
		strings.Join([]string{oldUser('a', "alice", "root", ""), oldUser('b', "bob", "user", `,"state":"gone"`)}, "\n"),
		`users {"sign_pub":"` + importKey('r').Hex() + `","handle":"zed","role":"root","state":"active"}`,
		`users {"sign_pub":"` + importKey('r').NKey() + `","handle":"rosa","role":"user","role":"root"}`,
		`rooms {"name":"ops","by":"boss","keep":true,"sealed":false,"about":"x"}` + "\n" + `members {"room":"ops","who":"boss","as":"owner"}`,
		`members {"room":"gone","who":"rosa","as":"owner"}`,
		"users {}\nrooms []\nmembers x",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		h := emptyHere().withUser('z', "boss", bus.Admin, bus.Active).withUser('r', "rosa", bus.Member, bus.Revoked).
			withRoom("gone", bus.RoomArchived).withRoom("live", bus.RoomActive).withMember("live", 'z', bus.Writer, bus.Removed)
		lines := strings.Split(text, "\n")
		n := 0
		for _, l := range lines {
			for _, kind := range importKinds {
				if strings.HasPrefix(l, string(kind)+" ") {
					n++
				}
			}
		}
		items, _ := planOf(t, wholeMapping(t), h, nil, lines...)
		if len(items) != n {
			t.Errorf("%d items of %d lines", len(items), n)
		}
		seen := map[string]bool{}
		for _, i := range items {
			if i.Outcome != toCreate {
				if i.user != nil || i.room != nil || i.member != nil {
					t.Errorf("%+v would do something", i)
				}
				continue
			}
			what := string(i.Kind) + " " + i.Name
			if seen[what] {
				t.Errorf("%s is made twice", what)
			}
			seen[what] = true
			switch {
			case i.user != nil:
				u := bus.User{V: bus.UserVersion, Key: i.user.Key, Handle: i.user.Handle, Role: i.user.Role, Status: i.user.Status, ExpiresAt: i.user.ExpiresAt}
				if err := u.Validate(); err != nil || u.Role == bus.Admin || h.users[u.Key].V != 0 {
					t.Errorf("%+v: %v", u, err)
				}
				if _, err := json.Marshal(u); err != nil {
					t.Error(err)
				}
			case i.room != nil:
				if _, err := bus.ParseRoomID(string(i.room.ID)); err != nil || h.rooms[i.room.ID].V != 0 {
					t.Errorf("%+v: %v", i.room, err)
				}
			default:
				if i.member.user == importKey('r') || i.member.room == "gone" || h.members[*i.member].V != 0 || i.role.Rank() == 0 {
					t.Errorf("%+v", i)
				}
			}
		}
	})
}
