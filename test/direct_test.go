package test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// directLease is short, so that waiting one out does not make the tests long.
const directLease = 4 * time.Second

// TestDirect runs unibusctl --direct against one cluster, from before its first
// admin on. The subtests follow each other and share its users.
func TestDirect(t *testing.T) {
	t.Parallel()
	d := &direct{world: &world{Cluster: cluster.Start(t, cluster.Options{Authcallout: true, Membership: true, Lease: directLease}), t: t}}
	trust, err := wire.Trust(d.CA())
	if err != nil {
		t.Fatal(err)
	}
	d.trust = trust
	d.openStore()
	for _, s := range []struct {
		name string
		test func(*testing.T)
	}{
		{"three bootstraps at once", d.bootstraps},
		{"line about the users bucket", d.bucketLine},
		{"add again", d.addAgain},
		{"two adds of one key", d.oneKeyTwice},
		{"two adds of one handle", d.oneHandleTwice},
		{"names that are refused", d.names},
		{"keys that are refused", d.keys},
		{"revoke", d.revokes},
		{"last admin", d.lastAdmin},
		{"admins revoking each other", d.admins},
		{"rooms", d.rooms},
		{"room limit", d.roomLimit},
		{"bad records", d.badRecords},
		{"a silent holder", d.silentHolder},
		{"interrupted", d.interrupted},
		{"full streams", d.fullStreams},
	} {
		if !t.Run(s.name, s.test) {
			t.FailNow()
		}
	}
}

// direct is a world that is driven through the command line.
type direct struct{ *world }

// run is unibusctl --direct. It may be called from any goroutine.
func (d *direct) run(args ...string) cluster.Result {
	return d.CLI(append([]string{"--direct"}, args...)...)
}

// want runs a command that has to end with the code and say the words.
func (d *direct) want(t *testing.T, code int, words string, args ...string) cluster.Result {
	t.Helper()
	r := d.run(args...)
	if r.Code != code || !strings.Contains(r.Stdout+r.Stderr, words) {
		t.Errorf("unibusctl --direct %s: exit %d, want %d and %q:\n%s%s", strings.Join(args, " "), r.Code, code, words, r.Stdout, r.Stderr)
	}
	return r
}

// add registers a new person.
func (d *direct) add(t *testing.T, name string) *person {
	t.Helper()
	p := newPerson(t, name)
	d.want(t, 0, "registered", "user", "add", "--handle", name, "--sign-pub", p.key.NKey())
	return p
}

// atOnce runs commands at the same moment and returns their results in order.
func (d *direct) atOnce(lines ...[]string) []cluster.Result {
	out := make([]cluster.Result, len(lines))
	var wg sync.WaitGroup
	for i, args := range lines {
		wg.Go(func() { out[i] = decided(func() cluster.Result { return d.run(args...) }) })
	}
	wg.Wait()
	return out
}

// decided has a command repeated for as long as it ends with 3 and says that it
// has changed nothing: a machine that stands still for a moment leaves it without
// a lease, or its audit without an answer.
func decided(run func() cluster.Result) (r cluster.Result) {
	for began := time.Now(); ; {
		r = run()
		nothing := strings.Contains(r.Stderr, withoutLease) || strings.Contains(r.Stderr, "so nothing was changed")
		if r.Code != 3 || !nothing || time.Since(began) > 30*time.Second {
			return r
		}
	}
}

// oneWinner wants exit 0 once and exit 1 with the words from all others.
func oneWinner(t *testing.T, words string, results []cluster.Result) (winner int) {
	t.Helper()
	winner = -1
	for i, r := range results {
		switch {
		case r.Code == 0 && winner < 0:
			winner = i
		case r.Code != 1 || !strings.Contains(r.Stderr, words):
			t.Errorf("loser %d: exit %d, want 1 and %q:\n%s%s", i, r.Code, words, r.Stdout, r.Stderr)
		}
	}
	if winner < 0 {
		t.Fatalf("nobody won: %+v", results)
	}
	return winner
}

// jsonUser is a user as user list --json shows one.
type jsonUser struct {
	SignPub   string  `json:"sign_pub"`
	NKey      string  `json:"nkey"`
	Handle    string  `json:"handle"`
	Role      string  `json:"role"`
	Status    string  `json:"status"`
	RevokedAt *string `json:"revoked_at"`
	Revision  uint64  `json:"revision"`
}

func (d *direct) list(t *testing.T) []jsonUser {
	t.Helper()
	var out struct{ Users []jsonUser }
	d.decode(t, &out, "user", "list")
	return out.Users
}

// decode runs a command with --json and reads what it prints.
func (d *direct) decode(t *testing.T, into any, args ...string) {
	t.Helper()
	r := d.run(append(args, "--json")...)
	if err := json.Unmarshal([]byte(r.Stdout), into); err != nil || r.Code != 0 {
		t.Fatalf("unibusctl --direct %s --json: exit %d: %s%s (%v)", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr, err)
	}
}

// user is one entry of the list, or the zero value.
func (d *direct) user(t *testing.T, p *person) jsonUser {
	t.Helper()
	for _, u := range d.list(t) {
		if u.SignPub == p.key.Hex() {
			return u
		}
	}
	return jsonUser{}
}

func (d *direct) bootstraps(t *testing.T) {
	people := []*person{newPerson(t, "root"), newPerson(t, "root"), newPerson(t, "root")}
	var lines [][]string
	for _, p := range people {
		lines = append(lines, []string{"bootstrap", "--handle", p.name, "--sign-pub", p.key.NKey()})
	}
	d.admin = people[oneWinner(t, "already bootstrapped", d.atOnce(lines...))]
	if users := d.list(t); len(users) != 1 || users[0].SignPub != d.admin.key.Hex() || users[0].Role != "admin" || users[0].Status != "active" {
		t.Errorf("after three bootstraps: %+v", users)
	}
	late := newPerson(t, "late")
	d.want(t, 1, "already bootstrapped", "bootstrap", "--handle", "late", "--sign-pub", late.key.NKey())
	d.want(t, 1, "already bootstrapped", "bootstrap", "--handle", d.admin.name, "--sign-pub", d.admin.key.NKey())
	// One that makes the key keeps it, for the next attempt.
	out := filepath.Join(t.TempDir(), "late.nk")
	d.want(t, 1, "already bootstrapped", "bootstrap", "--handle", "late", "--out", out)
	seed, err := os.ReadFile(out)
	d.want(t, 1, "already bootstrapped", "bootstrap", "--handle", "late", "--out", out)
	if again, _ := os.ReadFile(out); err != nil || !bytes.HasPrefix(seed, []byte("SU")) || !bytes.Equal(seed, again) {
		t.Errorf("a second attempt with a new key (%v): another seed", err)
	}
	d.waitAdmits(d.admin, 1, 2, 3)
	for _, p := range people {
		if v, err := d.attempt(1, p); (v == admitted) != (p == d.admin) {
			t.Errorf("a bootstrap that won, %t: %s (%v)", p == d.admin, v, err)
		}
	}
}

// bucketLine wants the line that scripts look for after every kind of write,
// counting users and not the barriers that fill the same stream.
func (d *direct) bucketLine(t *testing.T) {
	p := newPerson(t, "line")
	line := regexp.MustCompile(`(?m)^KV_UNIBUS_users: leader=n[123] followers_current=2/2 msgs=2$`)
	for _, args := range [][]string{
		{"user", "add", "--handle", "line", "--sign-pub", p.key.Hex(), "--role", "member"},
		{"room", "create", "line", "--owner", "line"},
		{"room", "add", "line", d.admin.name, "--role", "reader"},
		{"room", "remove", "line", d.admin.name},
		{"user", "revoke", "line", "--yes"},
	} {
		if r := d.run(args...); r.Code != 0 || !line.MatchString(r.Stdout) {
			t.Errorf("%v: exit %d, no line %q in:\n%s%s", args, r.Code, line, r.Stdout, r.Stderr)
		}
	}
	r := d.run("user", "revoke", "line", "--yes", "--json")
	var change struct {
		Already, Verified bool
		Callouts          string
	}
	if err := json.Unmarshal([]byte(r.Stdout), &change); err != nil || !line.MatchString(r.Stderr) || !change.Already || !change.Verified || change.Callouts != "3/3" {
		t.Errorf("with --json: %s%s (%v)", r.Stdout, r.Stderr, err)
	}
	if r := d.run("user", "list"); strings.Contains(r.Stdout+r.Stderr, "KV_UNIBUS_users:") {
		t.Error("a read prints the line about the bucket")
	}
}

func (d *direct) addAgain(t *testing.T) {
	p := d.add(t, "again")
	before := d.user(t, p)
	if before.Handle != "again" || before.Role != "member" || before.Status != "active" || before.NKey != p.key.NKey() {
		t.Fatalf("added: %+v", before)
	}
	for _, args := range [][]string{
		{"--handle", "again", "--sign-pub", p.key.NKey()},
		{"--handle", "again", "--sign-pub", p.key.Hex(), "--role", "admin"},
		{"--handle", "other", "--sign-pub", p.key.NKey(), "--role", "admin"},
	} {
		r := d.want(t, 1, "already registered", append([]string{"user", "add"}, args...)...)
		if r.Stdout != "" {
			t.Errorf("a refused add prints data: %s", r.Stdout)
		}
	}
	if after := d.user(t, p); after != before {
		t.Errorf("adding again changed %+v to %+v", before, after)
	}
	d.want(t, 1, "is taken by "+p.key.NKey(), "user", "add", "--handle", "again", "--sign-pub", newPerson(t, "x").key.NKey())
	d.add(t, "other") // the refused add has not kept the handle
}

func (d *direct) oneKeyTwice(t *testing.T) {
	for n := range 4 {
		p := newPerson(t, "twice")
		results := d.atOnce(
			[]string{"user", "add", "--handle", fmt.Sprintf("twice-a%d", n), "--sign-pub", p.key.NKey()},
			[]string{"user", "add", "--handle", fmt.Sprintf("twice-b%d", n), "--sign-pub", p.key.Hex(), "--role", "admin"},
		)
		won := oneWinner(t, "already registered", results)
		if u := d.user(t, p); u.Handle != fmt.Sprintf("twice-%c%d", 'a'+won, n) || (u.Role == "admin") != (won == 1) {
			t.Errorf("winner %d, but the record is %+v", won, u)
		}
		d.add(t, fmt.Sprintf("twice-%c%d", 'a'+1-won, n)) // the loser's handle is free
		d.want(t, 0, "revoked", "user", "revoke", p.key.Hex(), "--yes")
	}
}

func (d *direct) oneHandleTwice(t *testing.T) {
	for n := range 8 {
		handle := fmt.Sprintf("same%d", n)
		var lines [][]string
		for range 3 {
			lines = append(lines, []string{"user", "add", "--handle", handle, "--sign-pub", newPerson(t, handle).key.NKey()})
		}
		oneWinner(t, "handle "+handle, d.atOnce(lines...))
		holders := 0
		for _, u := range d.list(t) {
			if u.Handle == handle {
				holders++
			}
		}
		if holders != 1 {
			t.Errorf("%d users have the handle %s", holders, handle)
		}
	}
}

// names wants the rule and exit 1 for everything that could be read as
// something else in a subject, a key, a log line or a shell.
func (d *direct) names(t *testing.T) {
	key := newPerson(t, "x").key.NKey()
	bad := []string{"", "a.b", "a*", "*", ">", "a b", "a\nb", "a\n", "Upper", "ä", strings.Repeat("a", 33), "-a", "a/b", "a\x00"[:1] + "\x1b[2J", "$x"}
	before := d.list(t)
	for _, name := range append(bad, "1a", "_a") {
		d.want(t, 1, "a handle is 1 to 32 of a-z 0-9 _ - and starts with a letter", "user", "add", "--handle="+name, "--sign-pub", key)
	}
	for _, name := range append(bad, "a_b", "_a") {
		d.want(t, 1, "a room id is 1 to 32 of a-z 0-9 - and starts with a letter or digit", "room", "create", "--owner", d.admin.name, "--", name)
		d.want(t, 1, "a room id is", "room", "add", "--", name, d.admin.name)
		d.want(t, 1, "a room id is", "room", "members", "--", name)
	}
	d.want(t, 1, "a role is member or admin", "user", "add", "--handle", "x", "--sign-pub", key, "--role", "root")
	d.want(t, 1, "a room role is reader, writer or owner", "room", "add", "line", d.admin.name, "--role", "admin")
	d.want(t, 2, "", "user", "add", "--handle", "x")
	d.want(t, 2, "", "room", "create")
	d.want(t, 2, "", "user", "revoke", "x", "y", "--yes")
	d.want(t, 2, "--yes", "user", "revoke", d.admin.name) // nobody can be asked
	if after := d.list(t); len(after) != len(before) {
		t.Errorf("%d users became %d", len(before), len(after))
	}
	d.want(t, 0, "registered", "user", "add", "--handle", "a"+strings.Repeat("-", 31), "--sign-pub", key)
}

// keys tries keys that anyone could sign for, or that spell one point twice.
func (d *direct) keys(t *testing.T) {
	for _, k := range []string{
		"0100000000000000000000000000000000000000000000000000000000000000", // the identity
		"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", // order 2
		"0000000000000000000000000000000000000000000000000000000000000000", // order 4
		"0000000000000000000000000000000000000000000000000000000000000080",
		"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05", // order 8
		"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
		"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", // not canonical
		"0200000000000000000000000000000000000000000000000000000000000000", // no point
	} {
		raw, err := hex.DecodeString(k)
		if err != nil {
			t.Fatal(err)
		}
		for _, spelling := range []string{k, bus.UserKey(raw).NKey()} {
			d.want(t, 1, "this user key", "user", "add", "--handle", "low", "--sign-pub", spelling)
		}
	}
	good := newPerson(t, "x").key
	for _, k := range []string{"", "x", strings.ToUpper(good.Hex()), good.Hex()[1:], good.NKey()[1:], "A" + good.NKey()[1:], good.NKey() + " ", good.Hex() + "\n"} {
		d.want(t, 1, "a user key is", "user", "add", "--handle", "low", "--sign-pub="+k)
	}
}

// revokes shows that a revoke is final, may be repeated, and keeps the handle.
func (d *direct) revokes(t *testing.T) {
	p := d.add(t, "gone")
	d.waitAdmits(p, 1, 2, 3)
	for n, spelling := range []string{"gone", p.key.Hex(), p.key.NKey()} {
		words := "revoked gone"
		if n > 0 {
			words = "already_revoked gone"
		}
		r := d.want(t, 0, words, "user", "revoke", spelling, "--yes")
		if !strings.Contains(r.Stdout, "proven by") {
			t.Errorf("revoke %d proves nothing: %s", n, r.Stdout)
		}
		for i, v := range d.everywhere(p) {
			if v != refused {
				t.Errorf("n%d: %s after revoke %d", i+1, v, n)
			}
		}
	}
	if u := d.user(t, p); u.Status != "revoked" || u.RevokedAt == nil || u.Handle != "gone" {
		t.Errorf("the record of a revoked user: %+v", u)
	}
	d.want(t, 1, "not given to another key", "user", "add", "--handle", "gone", "--sign-pub", newPerson(t, "x").key.NKey())
	d.want(t, 1, "already registered", "user", "add", "--handle", "gone2", "--sign-pub", p.key.NKey())
	d.want(t, 1, "is revoked", "room", "add", "line", "gone")
	d.want(t, 1, "is revoked", "room", "create", "goneroom", "--owner", "gone")
	d.want(t, 1, "no user nobody", "user", "revoke", "nobody", "--yes")
	d.want(t, 1, "no user "+newPerson(t, "x").key.NKey()[:1], "user", "revoke", newPerson(t, "x").key.Hex(), "--yes")
}

func (d *direct) lastAdmin(t *testing.T) {
	before := d.user(t, d.admin)
	d.want(t, 1, "is the last active admin", "user", "revoke", d.admin.name, "--yes")
	if after := d.user(t, d.admin); after != before {
		t.Errorf("the refused revoke changed %+v to %+v", before, after)
	}
	d.waitAdmits(d.admin, 1)
}

// admins lets the only two admins revoke each other at the same moment. Either
// one is left, or the cluster is nobody's.
func (d *direct) admins(t *testing.T) {
	for n := range 5 {
		other := newPerson(t, fmt.Sprintf("admin%d", n))
		d.want(t, 0, "registered", "user", "add", "--handle", other.name, "--sign-pub", other.key.NKey(), "--role", "admin")
		results := d.atOnce(
			[]string{"user", "revoke", d.admin.name, "--yes"},
			[]string{"user", "revoke", other.name, "--yes"},
		)
		if oneWinner(t, "is the last active admin", results) == 0 {
			d.admin = other
		}
		var active []string
		for _, u := range d.list(t) {
			if u.Role == "admin" && u.Status == "active" {
				active = append(active, u.Handle)
			}
		}
		if len(active) != 1 || active[0] != d.admin.name {
			t.Fatalf("round %d: active admins %v, want %s alone", n, active, d.admin.name)
		}
	}
}

func (d *direct) rooms(t *testing.T) {
	owner, guest := d.add(t, "owner"), d.add(t, "guest")
	d.want(t, 0, "room den, owned by owner", "room", "create", "den", "--owner", "owner")
	d.want(t, 1, "room den exists already", "room", "create", "den", "--owner", "owner")
	d.want(t, 1, "room den exists already", "room", "create", "den", "--owner", "guest")
	won := oneWinner(t, "room race exists already", d.atOnce(
		[]string{"room", "create", "race", "--owner", "owner"},
		[]string{"room", "create", "race", "--owner", "guest"},
	))
	winner := []string{"owner", "guest"}[won]

	d.want(t, 0, "guest is reader of room den", "room", "add", "den", "guest", "--role", "reader")
	d.want(t, 0, "already_reader guest", "room", "add", "den", "guest", "--role", "reader")
	d.want(t, 0, "guest is writer of room den", "room", "add", "den", guest.key.Hex())
	d.want(t, 1, "no room nowhere", "room", "add", "nowhere", "guest")
	d.want(t, 1, "no user nobody", "room", "add", "den", "nobody")
	d.want(t, 1, "no such member", "room", "remove", "den", d.admin.name)

	var members struct {
		Room    string
		Members []struct {
			Handle, Role, Status, NKey string
			SignPub                    string `json:"sign_pub"`
			UserStatus                 string `json:"user_status"`
			RemovedAt                  *string
		}
	}
	roles := func(args ...string) map[string]string {
		t.Helper()
		members.Members = nil
		d.decode(t, &members, append([]string{"room", "members", "den"}, args...)...)
		out := map[string]string{}
		for _, m := range members.Members {
			out[m.Handle] = m.Role + " " + m.Status + " " + m.UserStatus
		}
		return out
	}
	wantRoles := func(want map[string]string, args ...string) {
		t.Helper()
		if got := roles(args...); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("members of den %v: %v, want %v", args, got, want)
		}
	}
	wantRoles(map[string]string{"owner": "owner present active", "guest": "writer present active"})
	d.want(t, 0, "guest is removed from room den", "room", "remove", "den", "guest")
	d.want(t, 0, "already_removed guest", "room", "remove", "den", "guest")
	wantRoles(map[string]string{"owner": "owner present active"})
	wantRoles(map[string]string{"owner": "owner present active", "guest": "writer removed active"}, "--all")
	d.want(t, 0, "guest is owner of room den", "room", "add", "den", "guest", "--role", "owner")
	wantRoles(map[string]string{"owner": "owner present active", "guest": "owner present active"})

	d.want(t, 0, "", "room", "create", "kept", "--owner", "owner", "--durable", "--encrypted")
	var list struct {
		Rooms []struct {
			Room, Status, Creator string
			Durable, Encrypted    bool
			Members               int
		}
	}
	d.decode(t, &list, "room", "list")
	seen := map[string]string{}
	for _, r := range list.Rooms {
		seen[r.Room] = fmt.Sprintf("%s %t %t %d", r.Status, r.Durable, r.Encrypted, r.Members)
	}
	for room, want := range map[string]string{"den": "active false false 2", "kept": "active true true 1", "race": "active false false 1"} {
		if seen[room] != want {
			t.Errorf("room %s in the list: %q, want %q", room, seen[room], want)
		}
	}
	var show struct {
		Room struct {
			Room, Creator string
			Members       []struct{ Handle, Role string }
		}
	}
	d.decode(t, &show, "room", "show", "race")
	if len(show.Room.Members) != 1 || show.Room.Members[0].Handle != winner || show.Room.Members[0].Role != "owner" {
		t.Errorf("room race, made by %s: %+v", winner, show)
	}
	var user struct {
		User struct {
			Handle string
			Rooms  []struct{ Room, Role string }
		}
	}
	d.decode(t, &user, "user", "show", owner.key.NKey())
	if user.User.Handle != "owner" || len(user.User.Rooms) < 2 || user.User.Rooms[0].Room != "den" || user.User.Rooms[0].Role != "owner" {
		t.Errorf("user show: %+v", user)
	}
}

// roomLimit fills one user's rooms through the Store, which the command line
// uses, with racers for the last places: a user in one room too many
// could not connect at all. The command line refuses the next one.
func (d *direct) roomLimit(t *testing.T) {
	p := d.add(t, "busy")
	const racers, places = 16, 8
	var made, over atomic.Int64
	create := func(n int) {
		switch _, err := d.store.CreateRoom(t.Context(), bus.RoomID(fmt.Sprintf("busy%d", n)), p.key, kv.RoomOptions{}); {
		case err == nil:
			made.Add(1)
		case bus.CodeOf(err) == bus.Conflict && strings.Contains(err.Error(), "the most a user may be in"):
			over.Add(1)
		default:
			t.Errorf("room %d: %v", n, err)
		}
	}
	for n := range bus.MaxRoomsPerUser - places {
		create(n)
	}
	var wg sync.WaitGroup
	for n := range racers {
		wg.Go(func() { create(bus.MaxRoomsPerUser - places + n) })
	}
	wg.Wait()
	if made.Load() != bus.MaxRoomsPerUser || over.Load() != racers-places {
		t.Fatalf("%d rooms were made, %d refused; the limit is %d", made.Load(), over.Load(), bus.MaxRoomsPerUser)
	}
	d.want(t, 1, "500 rooms, the most a user may be in", "room", "add", "den", "busy")
	d.want(t, 1, "500 rooms, the most a user may be in", "room", "create", "toomany", "--owner", "busy")
	d.want(t, 1, "no room toomany", "room", "show", "toomany")
	d.waitAdmits(p, 1, 2, 3) // with all of their rules
	d.want(t, 0, "is removed", "room", "remove", "busy0", "busy")
	d.want(t, 0, "is writer", "room", "add", "den", "busy")
}

// badRecords puts by hand what no program of ours would write. Each denies its
// own key, is reported everywhere, and touches nobody else.
func (d *direct) badRecords(t *testing.T) {
	s := newStock(d.world)
	if r := s.context("user", "context", "ops"); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	victim, copied, neighbour := d.add(t, "victim"), newPerson(t, "copied"), d.add(t, "neighbour")
	future, odd, garbage, erased := d.add(t, "future"), d.add(t, "odd"), newPerson(t, "garbage"), d.add(t, "erased")
	get := func(p *person) string {
		return s.run("--context", "unibus-ops", "kv", "get", kv.Users, p.key.Hex(), "--raw").Stdout
	}
	put := func(p *person, value string) {
		t.Helper()
		s.must("--context", "unibus-ops", "kv", "put", kv.Users, p.key.Hex(), value)
	}
	good := get(victim)
	if !strings.Contains(good, `"victim"`) {
		t.Fatalf("nats kv get: %q", good)
	}
	put(victim, `{"v":1,"sign_pub":`)
	put(copied, get(neighbour)) // an active user's record under another key
	put(future, strings.Replace(get(future), `"v":1`, `"v":2`, 1))
	put(odd, strings.Replace(get(odd), `"member"`, `"emperor"`, 1))
	put(garbage, "garbage")
	s.must("--context", "unibus-ops", "kv", "del", kv.Users, erased.key.Hex(), "--force")
	bad := []*person{victim, copied, future, odd, garbage, erased}
	for _, p := range bad {
		for i, v := range d.everywhere(p) {
			if v != refused {
				t.Errorf("n%d: %s, whose record is bad: %s", i+1, p.name, v)
			}
		}
	}
	d.waitAdmits(neighbour, 1, 2, 3)
	d.waitAdmits(d.admin, 1, 2, 3)

	r := d.want(t, 0, "WARNING", "user", "list")
	for _, p := range bad {
		if !strings.Contains(r.Stderr, p.key.Hex()) {
			t.Errorf("the warnings do not name %s:\n%s", p.name, r.Stderr)
		}
		d.want(t, 1, "already registered", "user", "add", "--handle", "fresh", "--sign-pub", p.key.Hex())
	}
	d.want(t, 1, "cannot be read", "user", "revoke", victim.key.Hex(), "--yes")
	for _, i := range d.Nodes() {
		for _, service := range []cluster.Service{cluster.Authcallout, cluster.Membership} {
			d.metric(t, i, service, "unibus_kv_broken_records", len(bad))
			if log := d.LogTail(i, service, 10_000); !strings.Contains(log, "record cannot be decoded") || !strings.Contains(log, victim.key.Hex()) {
				t.Errorf("the log of %s of n%d does not tell", service, i)
			}
		}
	}
	d.add(t, "unharmed")
	put(victim, good) // the repair
	d.waitAdmits(victim, 1, 2, 3)
	d.metric(t, 1, cluster.Authcallout, "unibus_kv_broken_records", len(bad)-1)
}

// metric waits until a service's metric has the value.
func (d *direct) metric(t *testing.T, i int, s cluster.Service, name string, want int) {
	t.Helper()
	line := fmt.Sprintf("\n%s %d\n", name, want)
	cluster.WaitFor(t, 5*time.Second, fmt.Sprintf("%s of %s of n%d to be %d", name, s, i, want), func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, d.AdminURL(i, s)+"/metrics", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err == nil && !strings.Contains(string(body), line) {
			err = errors.New(regexp.MustCompile("(?m)^"+name+".*$").FindString(string(body)) + " is there instead")
		}
		return err
	})
}

// silentHolder stops one callout in its tracks: a revoke says for whom it
// waits, waits for its lease and no longer, and holds when the callout wakes.
func (d *direct) silentHolder(t *testing.T) {
	p := d.add(t, "slow")
	d.waitAdmits(p, 1, 2, 3)
	d.Pause(2, cluster.Authcallout)
	defer d.Resume(2, cluster.Authcallout)
	started := time.Now()
	r := d.want(t, 0, "waiting for the lease of authcallout-n2", "user", "revoke", "slow", "--yes")
	took := time.Since(started)
	if took > directLease+3*time.Second || took < directLease {
		t.Errorf("the revoke took %s with a silent lease of %s", took.Round(time.Millisecond), directLease)
	}
	if !strings.Contains(r.Stderr, "waiting for the lease of authcallout-n2") || !strings.Contains(r.Stdout, "waited out the lease of authcallout-n2") ||
		strings.Contains(r.Stderr, "authcallout-n1") {
		t.Errorf("it said:\n%s%s", r.Stdout, r.Stderr)
	}
	t.Logf("a revoke with a silent holder: %s", took.Round(time.Millisecond))
	for i, v := range d.everywhere(p) {
		if v == admitted {
			t.Errorf("n%d admitted after the revoke", i+1)
		}
	}
	d.Resume(2, cluster.Authcallout)
	for i, v := range d.everywhere(p) {
		if v == admitted {
			t.Errorf("n%d admitted after the callout woke up", i+1)
		}
	}
	d.WaitHealthy(15 * time.Second)
}

// interrupted ends a revoke by Ctrl-C while it waits. The change is made, and
// the next one proves it.
func (d *direct) interrupted(t *testing.T) {
	p := d.add(t, "cut")
	d.Pause(2, cluster.Authcallout)
	defer d.Resume(2, cluster.Authcallout)
	cmd := exec.CommandContext(t.Context(), filepath.Join(d.Bin, "unibusctl"), "--direct", "user", "revoke", "cut", "--yes")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + d.Dir}
	for k, v := range d.CLIEnv(filepath.Join(d.Dir, "admin.nk")) {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	var said lockedBuffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cluster.WaitFor(t, directLease, "the revoke to wait", func() error {
		if !strings.Contains(said.String(), "waiting for the lease of authcallout-n2") {
			return fmt.Errorf("it said %q", said.String())
		}
		return nil
	})
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	sent := time.Now()
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 || time.Since(sent) > time.Second {
		t.Errorf("exit %d, %s after SIGINT: %s", code, time.Since(sent).Round(time.Millisecond), said.String())
	}
	d.Resume(2, cluster.Authcallout)
	d.want(t, 0, "already_revoked cut", "user", "revoke", "cut", "--yes")
	for i, v := range d.everywhere(p) {
		if v == admitted {
			t.Errorf("n%d admitted a revoked user", i+1)
		}
	}
	d.WaitHealthy(15 * time.Second)
}

// lockedBuffer may be read while a process writes to it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// fullStreams fills what can be filled, to the refusal, and the account's whole
// reservation: an add and a revoke commit all the same. No key of the
// configuration can make a stream in account BUS. In short form the larger
// streams are left alone.
func (d *direct) fullStreams(t *testing.T) {
	streams := map[string]int{kv.StreamName(kv.Nonces): 900, kv.StreamName(kv.RoomsByMember): 60 << 10}
	if full {
		streams[kv.StreamName(kv.RoomKeys)] = 60 << 10
		streams[kv.AuditStream] = 60 << 10
	}
	for stream, size := range streams {
		sent, err := d.fill(t, stream, size)
		t.Logf("%s: %d records of %d bytes: %v", stream, sent, size, err)
		if stream != kv.AuditStream && err == nil { // the audit drops its oldest lines instead
			t.Errorf("%s takes more than its cap", stream)
		}
	}
	d.fillReservation(t)
	p := d.add(t, "fits")
	d.waitAdmits(p, 1, 2, 3)
	d.want(t, 0, "is writer of room den", "room", "add", "den", "fits")
	d.want(t, 0, "revoked fits", "user", "revoke", "fits", "--yes")
	for i, v := range d.everywhere(p) {
		if v != refused {
			t.Errorf("n%d: %s after the revoke", i+1, v)
		}
	}
}

// fill publishes records to a stream until it refuses one, or has taken a tenth
// more than its cap.
func (d *direct) fill(t *testing.T, stream string, size int) (sent int, err error) {
	t.Helper()
	var limit int64
	for _, s := range kv.Streams() {
		if s.Name == stream {
			limit = s.MaxBytes
		}
	}
	prefix := "$KV." + strings.TrimPrefix(stream, "KV_") + ".fill."
	if stream == kv.AuditStream {
		prefix = "unibus.audit.fill."
	}
	js, err := jetstream.New(d.Ops(), jetstream.WithPublishAsyncMaxPending(64), jetstream.WithPublishAsyncTimeout(30*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	value := bytes.Repeat([]byte("x"), size)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	var batch []jetstream.PubAckFuture
	for ctx.Err() == nil && int64(sent)*int64(size) < limit+limit/10 {
		batch = batch[:0]
		for range 64 {
			ack, err := js.PublishMsgAsync(&nats.Msg{Subject: fmt.Sprintf("%s%d", prefix, sent), Data: value})
			if err != nil {
				return sent, err
			}
			batch = append(batch, ack)
			sent++
		}
		for _, ack := range batch {
			select {
			case <-ack.Ok():
			case err := <-ack.Err():
				return sent, err
			case <-ctx.Done():
				t.Fatalf("%s: %d records in four minutes", stream, sent)
			}
		}
	}
	return sent, nil
}

// fillReservation takes what account CTRL may still reserve, as an operator's
// own stream would.
func (d *direct) fillReservation(t *testing.T) {
	t.Helper()
	js, err := jetstream.New(d.Ops())
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for size := int64(1 << 30); size >= 1<<20; size /= 2 {
		name := fmt.Sprintf("fill-%d", size)
		_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
			Name: name, Subjects: []string{"fill." + name}, MaxBytes: size, Replicas: kv.Replicas, Storage: jetstream.FileStorage,
		})
		var api *jetstream.APIError
		switch {
		case errors.As(err, &api):
			refused++
			t.Logf("%s: %v", name, err)
		case err != nil:
			t.Fatalf("%s: %v", name, err)
		}
	}
	if refused == 0 {
		t.Error("account CTRL has no cap")
	}
}
