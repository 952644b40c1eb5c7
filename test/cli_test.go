package test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// adminSeed puts a person's seed where Cluster.CLI expects that of the admin.
func (w *world) adminSeed(p *person) {
	w.t.Helper()
	seed, err := p.kp.Seed()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.Dir, "admin.nk"), append(seed, '\n'), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// TestCLI runs unibusctl over the API, and the same lines with --direct.
func TestCLI(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: directLease})
	w.adminSeed(w.admin)
	w.WaitHealthy(30 * time.Second)
	direct := &way{world: w, tag: "d", flags: []string{"--direct"}}
	api := &way{world: w, tag: "a"}
	t.Run("the same over both", func(t *testing.T) { sameOverBoth(t, direct, api) })
	t.Run("audit", func(t *testing.T) { auditOverBoth(t, direct, api) })
	t.Run("self-service", func(t *testing.T) { selfService(t, api) })
	t.Run("any request", func(t *testing.T) { anyRequest(t, api) })
	t.Run("races", func(t *testing.T) { races(t, direct, api) })
	t.Run("without an audit", func(t *testing.T) { withoutAudit(t, direct, api) })
	t.Run("dead nodes", func(t *testing.T) { deadNodes(t, api) })
}

// way is one of the two ways to the cluster. Both use names of their own, which
// differ in the tag only.
type way struct {
	*world
	tag   string
	flags []string
	known []string // pairs for a strings.Replacer: what differs between the ways by design
}

func (y *way) name(base string) string { return base + "-" + y.tag }

// person is somebody whose key is hidden from the comparison.
func (y *way) person(t *testing.T, base string) *person {
	t.Helper()
	p := newPerson(t, y.name(base))
	y.known = append(y.known, p.key.NKey(), "<key of "+base+">", p.key.Hex(), "<hex of "+base+">")
	return p
}

func (y *way) run(args ...string) cluster.Result {
	return y.CLI(append(append([]string{}, y.flags...), args...)...)
}

var (
	changing  = regexp.MustCompile(`revision +\d+|in \d+ ms|\d+ of \d+ lease holders|\d{4}-\d\d-\d\d(T[0-9:.]+Z)?|ubi_[0-9a-f]{16}_[a-z2-7]{32}|\b[0-9a-f]{16}\b`)
	varying   = regexp.MustCompile(`"(revision|holders|elapsed_ms)": \d+|"callouts": "\d/\d"`)
	bucket    = regexp.MustCompile(`(?m)^KV_UNIBUS_users: leader=n[123] followers_current=\d/2 msgs=\d+\n`)
	waiting   = regexp.MustCompile(`(?m)^waiting for the lease of .*\n`)
	spaces    = regexp.MustCompile(` {2,}`)
	afterThat = regexp.MustCompile(`; waited out the lease of [^\n]*`)
)

// plain is what a command said, without what differs between two runs of it.
func (y *way) plain(s string) string {
	s = strings.NewReplacer(y.known...).Replace(s)
	s = strings.ReplaceAll(s, "unibusctl --direct ", "unibusctl ")
	s = regexp.MustCompile(`\b([a-z0-9]+)-`+y.tag+`\b`).ReplaceAllString(s, "$1")
	for _, r := range []*regexp.Regexp{bucket, waiting, afterThat} {
		s = r.ReplaceAllString(s, "")
	}
	s = varying.ReplaceAllString(s, `"$1": ?`)
	s = changing.ReplaceAllString(s, "?")
	return spaces.ReplaceAllString(s, " ")
}

// step is one line, wanted to end with the code and to say the words, in the
// same way over both ways.
type step struct {
	code  int
	words string
	line  func(y *way) []string
}

// line spells a step's arguments: a word that begins with @ is a name, with its
// tag added.
func line(words string) func(*way) []string {
	return func(y *way) []string {
		var out []string
		for _, f := range strings.Fields(words) {
			for _, w := range regexp.MustCompile(`@[a-z0-9]+`).FindAllString(f, -1) {
				f = strings.Replace(f, w, y.name(w[1:]), 1)
			}
			out = append(out, f)
		}
		return out
	}
}

// sameOverBoth tells one story over both ways: the same lines, with the same
// effects, say the same to the letter, as text and as JSON.
func sameOverBoth(t *testing.T, ways ...*way) {
	people := map[*way]map[string]*person{}
	for _, y := range ways {
		people[y] = map[string]*person{}
		for _, base := range []string{"alice", "bob", "bobsnew", "eve"} {
			people[y][base] = y.person(t, base)
		}
	}
	keyed := func(words string) func(*way) []string { // {alice} is her key
		return func(y *way) []string {
			out := line(words)(y)
			for i := range out {
				for base, p := range people[y] {
					out[i] = strings.ReplaceAll(out[i], "{"+base+"}", p.key.NKey())
					out[i] = strings.ReplaceAll(out[i], "{"+base+"hex}", p.key.Hex())
				}
			}
			return out
		}
	}
	steps := []step{
		{0, "registered", keyed("user add --handle @alice --sign-pub {alice}")},
		{1, "already registered", keyed("user add --handle @alice --sign-pub {alice} --role admin")},
		{0, "registered", keyed("user add --handle @bob --sign-pub {bob} --json")},
		{1, "is taken by", keyed("user add --handle @bob --sign-pub {eve}")},
		{1, "a handle is", keyed("user add --handle A --sign-pub {eve}")},
		{0, "", line("user show @alice")},
		{0, `"rooms": []`, line("user show @alice --json")},
		{0, "", keyed("user show {alice}")},
		{1, "no user nobody", line("user show nobody")},
		{1, "no user ", keyed("user show {eve}")},
		{1, "neither a handle nor a user key", line("user show A")},

		{0, "would change", line("user set @alice --role admin --expires never --dry-run")},
		{0, "role: member becomes admin", line("user set @alice --role admin --dry-run --json")},
		{0, "changed", line("user set @alice --role admin")},
		{0, "already_so", line("user set @alice --role admin")},
		{0, "changed", line("user set @alice --role member --json")},
		{0, "changed", line("user set @alice --handle @alicia")},
		{1, "no user", line("user show @alice")},
		{0, "changed", line("user set @alicia --handle @alice")},
		{0, "changed", line("user set @alice --expires 30d")},
		{0, "changed", line("user set @alice --expires never")},
		{1, "an expiry is in the future", line("user set @alice --expires 2001-01-01")},
		{1, "is taken by", line("user set @alice --handle @bob")},

		{0, "suspended", line("user suspend @alice")},
		{0, "already_suspended", line("user suspend @alice")},
		{0, "suspended", line("user list --status suspended")},
		{0, `"status": "suspended"`, line("user list --status suspended --json")},
		{1, "no: ", line("acl can-i @alice subscribe notice.x")},
		{0, "active", line("user resume @alice")},
		{0, "already_active", line("user resume @alice")},
		{0, "", line("user list --status suspended")},

		{0, "owned by", line("room create @ops --owner @alice --description first")},
		{1, "exists already", line("room create @ops --owner @bob")},
		{1, "no user nobody", line("room create @none --owner nobody")},
		{0, "owned by", line("room create @kept --owner @alice --durable --encrypted --json")},
		{0, "is reader of room", line("room add @ops @bob --role reader")},
		{0, "already_reader", line("room add @ops @bob --role reader")},
		{0, "is writer of room", keyed("room add @ops {bobhex} --json")},
		{1, "no room nowhere", line("room add nowhere @bob")},
		{1, "no user nobody", line("room add @ops nobody")},
		{1, "a room role is", line("room add @ops @bob --role boss")},
		{0, "bob", line("room members @ops")},
		{0, `"members": [`, line("room members @ops --json")},
		{0, "first", line("room show @ops")},
		{0, `"description": "first"`, line("room show @ops --json")},
		{1, "no room nowhere", line("room show nowhere")},
		{1, "no room nowhere", line("room members nowhere")},
		{0, "changed room", line("room set @ops --description second")},
		{0, "already_so", line("room set @ops --description second")},
		{0, "changed room", line("room set @ops --description= --json")},
		{1, "description", line("room set @ops --description " + strings.Repeat("x", 201))},

		{0, "writer of room", line("acl explain @bob")},
		{0, `"admitted": true`, line("acl explain @bob --json")},
		{0, "yes: writer of room", keyed("acl can-i @bob publish room.@ops.{bob}.x")},
		{1, "no: nothing lets", keyed("acl can-i @bob publish room.@ops.{alice}.x")},
		{0, `"allowed": true`, line("acl can-i @bob subscribe room.@ops.> --json")},
		{1, `"allowed": false`, line("acl can-i @bob subscribe room.> --json")},
		{0, "yes: every user", keyed("acl can-i @bob subscribe _INBOX_{bob}.>")},
		{0, "ops", line("user show @bob")},
		{0, `"role": "writer"`, line("user show @bob --json")},

		{0, "would give handle", keyed("user rotate @bob --sign-pub {bobsnew} --dry-run")},
		{2, "needs --yes", keyed("user rotate @bob --sign-pub {bobsnew}")},
		{1, "already registered", keyed("user rotate @bob --sign-pub {alice} --yes")},
		{0, "rotated", keyed("user rotate @bob --sign-pub {bobsnew} --yes")},
		{0, "already_rotated", keyed("user rotate {bob} --sign-pub {bobsnew} --yes --json")},
		{0, "ops", line("user show @bob")},
		{0, "rotated to", keyed("user show {bob}")},
		{0, "", line("room members @ops --all")},

		{0, "is removed from room", line("room remove @ops @bob")},
		{0, "already_removed", line("room remove @ops @bob")},
		{1, "no such member", line("room remove @kept @bob")},

		{0, "would archive", line("room archive @kept --dry-run")},
		{0, "archived room", line("room archive @kept --yes")},
		{0, "already_archived", line("room archive @kept --yes")},
		{0, "would prove again", line("room archive @kept --dry-run")},
		{1, "is archived", line("room add @kept @bob")},
		{1, "is archived", line("room set @kept --description x")},
		{1, "an id is never used again", line("room create @kept --owner @alice")},
		{1, "no room nowhere", line("room archive nowhere --yes")},

		{0, "nobody that this selects is connected", line("conn list --user @alice")},
		{0, `"connections": []`, line("conn list --user @alice --room @ops --server n1 --json")},
		{1, "no room nowhere", line("conn list --room nowhere")},
		{1, "no user nobody", line("conn list --user nobody")},
		{0, "would close 0 connections", line("conn kick @alice --dry-run")},
		{2, "needs --yes", line("conn kick @alice")},
		{2, "--cid counts on one server", line("conn kick @alice --cid 7 --yes")},
		{2, "--cid needs the number", line("conn kick @alice --server n1 --cid 0 --yes")},
		{1, "no server n9", line("conn kick @alice --server n9 --yes")},
		{1, "no server n9", line("conn list --server n9")},
		{0, ": servers 3/3", line("conn kick @alice --yes")},
		{1, "no user nobody", line("conn kick nobody --yes")},

		{0, "would revoke", line("user revoke @alice --dry-run")},
		{0, `"dry_run": true`, line("user revoke @alice --dry-run --json")},
		{0, "active", line("user show @alice")},
		{0, "revoked", line("user revoke @alice --yes")},
		{0, "already_revoked", line("user revoke @alice --yes")},
		{0, "would prove again", line("user revoke @alice --dry-run")},
		{1, "is revoked, which is final", line("user suspend @alice")},
		{1, "is revoked, which is final", line("user resume @alice")},
		{1, "is revoked, which is final", line("user set @alice --role admin")},
		{1, "is revoked", line("room add @ops @alice")},
		{1, "belongs to a revoked user", keyed("user add --handle @alice --sign-pub {eve}")},
		{0, "is not admitted: revoked", line("acl explain @alice")},

		{1, "no invite 0123456789abcdef", line("invite withdraw 0123456789abcdef --yes")},
		{1, "no room nowhere", line("invite create --room nowhere")},
		{1, "is taken by", line("invite create --handle @bob")},
		{2, "", line("user revoke @alice @bob --yes")},
	}
	said := map[*way][]string{}
	for _, y := range ways {
		for n, s := range steps {
			args := s.line(y)
			r := y.run(args...)
			if r.Code != s.code || !strings.Contains(r.Stdout+r.Stderr, s.words) {
				t.Errorf("step %d, unibusctl %s: exit %d, want %d and %q:\n%s%s", n, strings.Join(append(y.flags, args...), " "), r.Code, s.code, s.words, r.Stdout, r.Stderr)
			}
			y.lineOfWrites(t, args, r)
			said[y] = append(said[y], fmt.Sprintf("exit %d\nstdout:\n%sstderr:\n%s", r.Code, y.plain(r.Stdout), y.plain(r.Stderr)))
		}
	}
	for n, s := range steps {
		if d, a := said[ways[0]][n], said[ways[1]][n]; d != a {
			t.Errorf("step %d, %s\nsays with --direct:\n%s\nand over the API:\n%s", n, strings.Join(s.line(ways[1]), " "), d, a)
		}
	}
	t.Run("invites", func(t *testing.T) {
		for _, y := range ways {
			oneInvite(t, y)
		}
	})
	t.Run("first admin", func(t *testing.T) {
		key := newPerson(t, "late").key.NKey()
		for i, want := range []int{1, 2} { // refused by the cluster; and no matter for the API
			if r := ways[i].run("bootstrap", "--handle", "late", "--sign-pub", key); r.Code != want {
				t.Errorf("bootstrap: exit %d, want %d: %s%s", r.Code, want, r.Stdout, r.Stderr)
			}
		}
	})
}

// races lets both ways do what only one may, at the same moment.
func races(t *testing.T, direct, api *way) {
	both := func(d, a []string) [2]cluster.Result {
		var out [2]cluster.Result
		var wg sync.WaitGroup
		wg.Go(func() { out[0] = direct.run(d...) })
		wg.Go(func() { out[1] = api.run(a...) })
		wg.Wait()
		return out
	}
	for n := range 4 {
		p, q := newPerson(t, "x"), newPerson(t, "x")
		results := both(
			[]string{"user", "add", "--handle", fmt.Sprintf("key-d%d", n), "--sign-pub", p.key.NKey()},
			[]string{"user", "add", "--handle", fmt.Sprintf("key-a%d", n), "--sign-pub", p.key.Hex()},
		)
		oneWinner(t, "already registered", results[:])
		add := func(k *person) []string {
			return []string{"user", "add", "--handle", fmt.Sprintf("handle%d", n), "--sign-pub", k.key.NKey()}
		}
		results = both(add(q), add(newPerson(t, "x")))
		oneWinner(t, fmt.Sprintf("handle handle%d", n), results[:])
		create := func(owner string) []string {
			return []string{"room", "create", fmt.Sprintf("race%d", n), "--owner", owner}
		}
		results = both(create(fmt.Sprintf("handle%d", n)), create("admin"))
		oneWinner(t, fmt.Sprintf("room race%d exists already", n), results[:])
	}
	// The only two admins: one revokes the other over the API, somebody on a
	// node revokes the first. Who was revoked may be told so or may be unknown.
	other := newPerson(t, "second")
	if r := api.run("user", "add", "--handle", "second", "--sign-pub", other.key.NKey(), "--role", "admin"); r.Code != 0 {
		t.Fatalf("exit %d: %s", r.Code, r.Stderr)
	}
	results := both([]string{"user", "revoke", "admin", "--yes"}, []string{"user", "revoke", "second", "--yes"})
	if (results[0].Code == 0) == (results[1].Code == 0) {
		t.Errorf("not one winner: %+v", results)
	}
	if results[0].Code == 0 {
		direct.admin = other
		direct.adminSeed(other)
	}
	if r := api.run("user", "list", "--role", "admin", "--status", "active", "--names"); r.Code != 0 || r.Stdout != direct.admin.name+"\n" {
		t.Errorf("active admins: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// lineOfWrites wants the line about the users bucket after a write to the KV,
// and nothing that looks like it over the API, which cannot know it.
func (y *way) lineOfWrites(t *testing.T, args []string, r cluster.Result) {
	t.Helper()
	proven := strings.Contains(r.Stdout, "proven by") || strings.Contains(r.Stdout, `"verified"`)
	if want := proven && y.flags != nil; bucket.MatchString(r.Stdout+r.Stderr) != want {
		t.Errorf("unibusctl %s: line about the users bucket: %t, want %t\n%s%s", strings.Join(args, " "), !want, want, r.Stdout, r.Stderr)
	}
}

// oneInvite makes, lists and withdraws one.
func oneInvite(t *testing.T, y *way) {
	t.Helper()
	r := y.run("user", "invite", "--handle", y.name("carl"), "--room", y.name("ops")+":writer", "--expires", "2h", "--json")
	var made struct {
		Invite bus.InviteCreated
		Join   string
	}
	if err := json.Unmarshal([]byte(r.Stdout), &made); err != nil || r.Code != 0 {
		t.Fatalf("exit %d: %s%s (%v)", r.Code, r.Stdout, r.Stderr, err)
	}
	i := made.Invite
	if i.Handle != bus.Handle(y.name("carl")) || i.Role != bus.Member || i.Status != bus.InviteOpen || len(i.Rooms) != 1 ||
		!strings.HasPrefix(i.Token, "ubi_"+i.ID+"_") || !strings.Contains(made.Join, i.Token) || time.Until(i.ExpiresAt) > 2*time.Hour {
		t.Errorf("made: %+v %s", i, made.Join)
	}
	for _, s := range []struct {
		code  int
		words string
		args  []string
	}{
		{0, i.ID, []string{"invite", "list"}},
		{0, `"status": "open"`, []string{"invite", "list", "--json"}},
		{2, "needs --yes", []string{"invite", "withdraw", i.ID}},
		{0, "withdrawn invite " + i.ID, []string{"invite", "withdraw", i.ID, "--yes"}},
		{0, "already_withdrawn invite " + i.ID, []string{"invite", "withdraw", i.ID, "--yes"}},
		{0, `"status": "withdrawn"`, []string{"invite", "withdraw", i.ID, "--yes", "--json"}},
	} {
		r := y.run(s.args...)
		if r.Code != s.code || !strings.Contains(r.Stdout+r.Stderr, s.words) {
			t.Errorf("unibusctl %s: exit %d, want %d and %q: %s%s", strings.Join(s.args, " "), r.Code, s.code, s.words, r.Stdout, r.Stderr)
		}
		if strings.Contains(r.Stdout+r.Stderr, i.Token[len("ubi_"+i.ID+"_"):]) {
			t.Errorf("unibusctl %s shows the secret of the invite again", strings.Join(s.args, " "))
		}
	}
}

// auditOverBoth wants the same attempts and outcomes of a change, whoever made
// it, and the verdict of verify as exit code.
func auditOverBoth(t *testing.T, ways ...*way) {
	for _, y := range ways {
		actor := "direct"
		if y.flags == nil {
			actor = y.admin.key.NKey()
		}
		want := []string{
			"attempt user.suspend  " + actor, "outcome user.suspend refused " + actor, // alice is revoked
		}
		for _, reader := range ways {
			var list struct{ Records []bus.AuditRecord }
			cluster.WaitFor(t, 10*time.Second, "the outcome to be on record", func() error {
				r := reader.run("audit", "list", "--user", y.name("alice"), "--action", "user.suspend", "--since", "1h", "--json")
				if err := json.Unmarshal([]byte(r.Stdout), &list); err != nil || r.Code != 0 {
					return fmt.Errorf("exit %d: %s%s: %w", r.Code, r.Stdout, r.Stderr, err)
				}
				if len(list.Records) < 6 { // ok, already, refused: an attempt and an outcome each
					return fmt.Errorf("%d records: %+v", len(list.Records), list.Records)
				}
				return nil
			})
			var got []string
			requests := map[string]bool{}
			for _, r := range list.Records[4:] {
				got = append(got, fmt.Sprintf("%s %s %s %s", r.Kind, r.Action, r.Result, r.Actor))
				requests[r.Request] = true
			}
			if strings.Join(got, "\n") != strings.Join(want, "\n") || len(requests) != 1 {
				t.Errorf("%q in %v, want %q in one request", got, requests, want)
			}
		}
	}
	t.Run("filters", func(t *testing.T) {
		for _, y := range ways {
			for _, f := range []struct{ args, words, not string }{
				{"--room " + y.name("ops") + " --json", "room.member.set", "user.suspend"},
				{"--action user.* --json", "user.add", "room.create"},
				{"--kind connect --json", "allow", "attempt"},
				{"--actor direct --kind attempt --json", "direct", y.admin.key.NKey()},
				{"--actor " + y.admin.name, " admin ", y.admin.key.NKey()},
				{"--limit 1", "", ""},
			} {
				r := y.run(append([]string{"audit", "list"}, strings.Fields(f.args)...)...)
				if r.Code != 0 || !strings.Contains(r.Stdout, f.words) || f.not != "" && strings.Contains(r.Stdout, f.not) {
					t.Errorf("audit list %s: exit %d, want %q and no %q: %.2000s%s", f.args, r.Code, f.words, f.not, r.Stdout, r.Stderr)
				}
				if f.args == "--limit 1" && strings.Count(r.Stdout, "\n") != 2 {
					t.Errorf("--limit 1: %s", r.Stdout)
				}
			}
			if r := y.run("audit", "list", "--user", "nobody"); r.Code != 1 || !strings.Contains(r.Stderr, "no user nobody") {
				t.Errorf("audit of nobody: exit %d: %s", r.Code, r.Stderr)
			}
		}
	})
	t.Run("tail", func(t *testing.T) {
		for _, y := range ways {
			y.tails(t)
		}
	})
	t.Run("verify", func(t *testing.T) {
		stranger := newPerson(t, "x").key.NKey()
		for _, y := range ways {
			if r := y.run("audit", "verify"); r.Code != 0 || !strings.Contains(r.Stdout, "whole") {
				t.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
			}
			if r := y.run("audit", "verify", "--signer", stranger); r.Code != 1 || !strings.Contains(r.Stderr, "trusted") {
				t.Errorf("with a stranger's key only: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
			}
		}
		js, err := jetstream.New(ways[0].Ops())
		if err != nil {
			t.Fatal(err)
		}
		ack, err := js.Publish(t.Context(), "unibus.audit.unibusctl-direct", []byte(`{"v":1}`))
		if err != nil {
			t.Fatal(err)
		}
		for _, y := range ways {
			want := fmt.Sprintf("sequence %d", ack.Sequence)
			if r := y.run("audit", "verify"); r.Code != 1 || !strings.Contains(r.Stderr, want) {
				t.Errorf("exit %d, want 1 and %q: %s%s", r.Code, want, r.Stdout, r.Stderr)
			}
		}
	})
}

// tails follows the audit until it is interrupted.
func (y *way) tails(t *testing.T) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(y.Bin, "unibusctl"), append(append([]string{}, y.flags...), "audit", "tail", "--action", "room.*")...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + y.Dir}
	for k, v := range y.CLIEnv(filepath.Join(y.Dir, "admin.nk")) {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	var said lockedBuffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	round := 0
	cluster.WaitFor(t, 20*time.Second, "the tail to show a change", func() error {
		round++
		if r := y.run("room", "set", y.name("ops"), "--description", fmt.Sprintf("round %d", round)); r.Code != 0 {
			return fmt.Errorf("exit %d: %s", r.Code, r.Stderr)
		}
		if !strings.Contains(said.String(), "outcome room.set ok") {
			return fmt.Errorf("it said %q", said.String())
		}
		return nil
	})
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit %d after SIGINT: %s", code, said.String())
	}
}

// withoutAudit takes the stream away: what takes access away is done all the
// same and says so on a node, everything else is refused and changes nothing.
func withoutAudit(t *testing.T, direct, api *way) {
	js, err := jetstream.New(direct.Ops())
	if err != nil {
		t.Fatal(err)
	}
	people := map[*way]*person{direct: direct.addUser("narrow-d"), api: api.addUser("narrow-a")}
	if err := js.DeleteStream(t.Context(), kv.AuditStream); err != nil {
		t.Fatal(err)
	}
	for _, y := range []*way{direct, api} {
		name, wide := y.name("narrow"), y.name("wide")
		r := y.run("user", "add", "--handle", wide, "--sign-pub", newPerson(t, "x").key.NKey())
		if r.Code != 3 || !strings.Contains(r.Stderr, "audit") || r.Stdout != "" {
			t.Errorf("an add without an audit: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		if r := y.run("user", "show", wide); r.Code != 1 || !strings.Contains(r.Stderr, "no user") {
			t.Errorf("and there it is: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		for _, verb := range [][]string{{"user", "suspend", name}, {"user", "revoke", name, "--yes"}} {
			r := y.run(verb...)
			if r.Code != 0 || !strings.Contains(r.Stdout, "proven by") || strings.Contains(r.Stderr, "WARNING: the audit cannot be written") != (y == direct) {
				t.Errorf("%v without an audit: exit %d: %s%s", verb, r.Code, r.Stdout, r.Stderr)
			}
		}
		for i, v := range y.everywhere(people[y]) {
			if v == admitted {
				t.Errorf("n%d admits %s", i+1, name)
			}
		}
	}
	for _, s := range kv.Streams() {
		if s.Name == kv.AuditStream {
			if _, err := js.CreateStream(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
	}
	cluster.WaitFor(t, 20*time.Second, "the audit to be written again", func() error {
		if r := api.run("user", "add", "--handle", "again", "--sign-pub", newPerson(t, "x").key.NKey()); r.Code != 0 {
			return fmt.Errorf("exit %d: %s", r.Code, r.Stderr)
		}
		return nil
	})
}

// selfService is what a user who is no admin may do, and how the rest is
// refused.
func selfService(t *testing.T, y *way) {
	dora, eric := y.addUser("dora"), y.addUser("eric")
	y.addRoom("closed", eric, kv.RoomOptions{})
	as := map[string]string{"UNIBUS_IDENTITY": dora.seedFile(t), "XDG_CONFIG_HOME": t.TempDir()}
	next := newPerson(t, "dora")
	for _, s := range []struct {
		code  int
		words string
		line  string
	}{
		{0, "dora", "whoami"},
		{0, dora.key.Hex(), "whoami --json"},
		{0, "owned by dora", "room create mine --description own"},
		{0, "eric is reader of room mine", "room add mine eric --role reader"},
		{0, "mine", "room list"},
		{0, "eric", "room members mine"},
		{0, "reader", "acl explain dora --json"},
		{1, "only an admin may do this", "user list"},
		{1, "only an admin may do this", "user revoke eric --yes"},
		{1, "only an admin may do this", "audit list"},
		{1, "only an admin may do this", "invite create"},
		{1, "no room closed", "room show closed"},
		{1, "no room closed", "room add closed dora"},
		{1, "no room closed", "room archive closed --yes"},
		{0, "eric", "user show eric"},
		{0, "unibus-dora", "user context dora"},
		{1, "not that of eric", "user context eric"},
		{0, "eric is owner of room mine", "room add mine eric --role owner"},
		{0, "dora is removed from room mine", "room leave mine"},
		{1, "no room mine", "room show mine"},
		{0, "rotated dora", "user rotate dora --yes --sign-pub " + next.key.NKey()},
		{1, "", "whoami"},
	} {
		r := y.CLIEnvironment(as, nil, strings.Fields(s.line)...)
		if s.line == "acl explain dora --json" {
			s.words = `"role": "owner"`
		}
		if r.Code != s.code || !strings.Contains(r.Stdout+r.Stderr, s.words) {
			t.Errorf("as dora, unibusctl %s: exit %d, want %d and %q: %s%s", s.line, r.Code, s.code, s.words, r.Stdout, r.Stderr)
		}
		if s.line == "room list" && strings.Contains(r.Stdout, "closed") {
			t.Errorf("dora sees a room in which she is not: %s", r.Stdout)
		}
	}
}

// anyRequest uses unibusctl api as a script would.
func anyRequest(t *testing.T, y *way) {
	body := filepath.Join(t.TempDir(), "room.json")
	if err := os.WriteFile(body, []byte(`{"room":"scripted"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, s := range []struct {
		code  int
		words string
		args  []string
	}{
		{0, `"handle":"admin"`, []string{"GET", "/v1/me"}},
		{0, "room scripted, owned by admin", []string{"post", "/v1/rooms", "--data", "@" + body}},
		{1, "urn:unibus:error:conflict", []string{"POST", "/v1/rooms", "--data", "@" + body}},
		{0, `"description":"from stdin"`, []string{"GET", "/v1/rooms/scripted"}},
		{1, "urn:unibus:error:invalid", []string{"PATCH", "/v1/rooms/scripted", "--data", `{"room":"x"}`}},
		{1, "urn:unibus:error:not_found", []string{"GET", "/v1/nothing"}},
		{0, "already_archived", []string{"DELETE", "/v1/rooms/scripted"}},
	} {
		switch s.words {
		case `"description":"from stdin"`:
			if r := y.CLIEnvironment(nil, strings.NewReader(`{"description":"from stdin"}`), "api", "PATCH", "/v1/rooms/scripted", "--data", "-"); r.Code != 0 {
				t.Errorf("from stdin: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
			}
		case "already_archived":
			if r := y.run("api", "DELETE", "/v1/rooms/scripted"); r.Code != 0 {
				t.Errorf("archive: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
			}
		}
		if r := y.run(append([]string{"api"}, s.args...)...); r.Code != s.code || !strings.Contains(r.Stdout, s.words) {
			t.Errorf("api %s: exit %d, want %d and %q: %s%s", strings.Join(s.args, " "), r.Code, s.code, s.words, r.Stdout, r.Stderr)
		}
	}
}

// deadNodes takes away one service and then the quorum: the next node is asked,
// and then nothing is known.
func deadNodes(t *testing.T, y *way) {
	y.Kill(1, cluster.Membership)
	p := newPerson(t, "late")
	if r := y.run("user", "add", "--handle", "late", "--sign-pub", p.key.NKey()); r.Code != 0 || !strings.Contains(r.Stdout, "registered") {
		t.Errorf("with the first node's API dead: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	y.Pause(2, cluster.Membership)
	started := time.Now()
	if r := y.run("user", "revoke", "late", "--yes"); r.Code != 0 {
		t.Errorf("with the first dead and the second hanging: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	t.Logf("a revoke past a dead and a hanging node: %s", time.Since(started).Round(time.Millisecond))
	y.Resume(2, cluster.Membership)
	y.Kill(1, cluster.NATS)
	y.Kill(2, cluster.NATS)
	cluster.WaitFor(t, 30*time.Second, "n3 to know nothing any more", func() error {
		if r := y.run("user", "list"); r.Code != 3 {
			return fmt.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		return nil
	})
	started = time.Now()
	r := y.run("user", "suspend", "late")
	if took := time.Since(started); r.Code != 3 || r.Stdout != "" || took > 10*time.Second {
		t.Errorf("without a quorum: exit %d after %s: %s%s", r.Code, took.Round(time.Millisecond), r.Stdout, r.Stderr)
	}
}
