package test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// TestInsiders shows, on one live cluster, what members, operators and thieves
// of a service's key cannot do: rows T22, T41 and T43 to T46 of the threat
// model.
func TestInsiders(t *testing.T) {
	t.Parallel()
	n := &insiders{apiWorld: newAPIWorld(t, cluster.Options{})}
	n.root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "ops"})
	n.root.changes(t, "PUT", "/v1/rooms/ops/members/alice", dict{"role": "writer"})
	n.root.changes(t, "PUT", "/v1/rooms/ops/members/bob", dict{"role": "reader"})
	for _, s := range []struct {
		name string
		test func(*testing.T)
	}{
		{"T22 subscriptions", n.subscriptions},
		{"T22 payload", n.payload},
		{"T22 a reader who does not read", n.slowReader},
		{"T41 the key of a membership", n.stolenMembership},
		{"T41 the key of an authcallout", n.stolenCallout},
		{"T43 one key added twice", n.twoAdds},
		{"T44 a second bootstrap", n.secondBootstrap},
		{"T45 the last admin", n.lastAdmin},
		{"T45 admins revoking each other", n.twoAdmins},
		{"T46 secrets", n.secrets}, // last: it looks at what all of the above left behind
	} {
		t.Run(s.name, s.test)
	}
}

type insiders struct {
	*apiWorld
	spoken [][]byte // secrets that were used beside those in files
}

// A member may hold so many subscriptions and no more; nobody else notices.
func (n *insiders) subscriptions(t *testing.T) {
	const most = 4096
	greedy, other := n.connectRaw(1, n.alice), n.connectRaw(1, n.bob)
	for i := range most {
		if err := greedy.Sub("room.ops.>", "", fmt.Sprint(i+1)); err != nil {
			t.Fatalf("subscription %d: %v", i+1, err)
		}
	}
	err := greedy.Sub("room.ops.>", "", "beyond")
	if !errors.Is(err, wire.ErrDenied) || !strings.Contains(strings.ToLower(err.Error()), "maximum subscriptions") {
		t.Errorf("subscription %d: %v", most+1, err)
	}
	if err := other.Sub("room.ops.>", "", "1"); err != nil {
		t.Errorf("somebody else: %v", err)
	}
	greedy.Close()
	other.Close()
}

// What is longer than the servers allow closes the connection that sent it and
// reaches nobody.
func (n *insiders) payload(t *testing.T) {
	reader := n.connectRaw(2, n.bob)
	if err := reader.Sub("room.ops.>", "", "1"); err != nil {
		t.Fatal(err)
	}
	subject := "room.ops." + n.alice.key.NKey() + "."
	largest := strings.Repeat("x", 1<<20)
	for what, c := range map[string]struct{ subject, payload, says string }{
		"payload": {subject + "big", largest + "x", "maximum payload"},
		"line":    {subject + strings.Repeat("x", 4<<10), "", "maximum control line"},
	} {
		writer := n.connectRaw(1, n.alice)
		err := writer.Pub(c.subject, "", c.payload)
		// The server hangs up on what it has not read: its reason may be lost.
		if err == nil || errors.Is(err, wire.ErrDenied) && !strings.Contains(strings.ToLower(err.Error()), c.says) {
			t.Errorf("%s: %v", what, err)
		}
		if writer.Flush() == nil {
			t.Errorf("%s: the connection goes on", what)
		}
	}
	writer := n.connectRaw(1, n.alice)
	cluster.WaitFor(t, 10*time.Second, "a message of exactly the limit", func() error {
		if err := writer.Pub(subject+"fits", "", largest); err != nil {
			return err
		}
		return reader.Flush()
	})
	for _, m := range reader.Messages {
		if !strings.HasSuffix(m.Subject, ".fits") {
			t.Errorf("heard %s of %d bytes", m.Subject, len(m.Payload))
		}
	}
	writer.Close()
	reader.Close()
}

// Who subscribes and does not read is closed; who reads gets every message, and
// the writer does not wait.
func (n *insiders) slowReader(t *testing.T) {
	slow := n.connectRaw(3, n.bob)
	if err := slow.Sub("room.ops.>", "", "1"); err != nil {
		t.Fatal(err)
	}
	sys := n.Sys()
	if got := len(n.live(sys, n.bob)); got != 1 {
		t.Fatalf("bob has %d connections", got)
	}
	client := func(p *person, node int) *nats.Conn {
		nc, err := nats.Connect(n.NATSURL(node), p.options(n.CA())...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	var heard atomic.Int64
	sub, err := client(n.alice, 3).Subscribe("room.ops.>", func(*nats.Msg) { heard.Add(1) })
	if err != nil {
		t.Fatal(err)
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		t.Fatal(err)
	}
	writer := client(n.alice, 3)
	block := bytes.Repeat([]byte("x"), 1<<19)
	sent := int64(0)
	cluster.WaitFor(t, time.Minute, "the reader who does not read to be closed", func() error {
		if got := heard.Load(); got != sent { // no faster than who reads can, or they would be slow readers too
			return fmt.Errorf("who reads has %d of %d", got, sent)
		}
		for range 20 {
			if err := writer.Publish("room.ops."+n.alice.key.NKey()+".flood", block); err != nil {
				return err
			}
			sent++
		}
		if err := writer.FlushTimeout(10 * time.Second); err != nil {
			return err
		}
		if got := n.live(sys, n.bob); len(got) > 0 {
			return fmt.Errorf("open are %v", got)
		}
		return nil
	})
	t.Logf("closed after %d MiB", sent>>1)
	cluster.WaitFor(t, 30*time.Second, "who reads to have everything", func() error {
		if got := heard.Load(); got != sent {
			return fmt.Errorf("%d of %d", got, sent)
		}
		return nil
	})
}

// everything is what the control account holds, for a comparison: the
// configuration of each stream and the newest message of each subject, but for
// what the services write all the time.
func (n *insiders) everything(t *testing.T) map[string]string {
	t.Helper()
	js, err := jetstream.New(n.Ops())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, def := range kv.Streams() {
		s, err := js.Stream(t.Context(), def.Name)
		if err != nil {
			t.Fatal(err)
		}
		info, err := s.Info(t.Context(), jetstream.WithSubjectFilter(">"))
		if err != nil {
			t.Fatal(err)
		}
		config, err := json.Marshal(info.Config)
		if err != nil {
			t.Fatal(err)
		}
		out[def.Name] = fmt.Sprintf("made %s: %s", info.Created, config)
		for subject := range info.State.Subjects {
			if strings.Contains(subject, "._barrier.") || strings.HasPrefix(subject, "unibus.audit.") || strings.HasPrefix(subject, "$KV.UNIBUS_nonces.") {
				continue
			}
			m, err := s.GetLastMsgForSubject(t.Context(), subject)
			if err != nil {
				t.Fatal(err)
			}
			out[subject] = fmt.Sprintf("%d %s", m.Sequence, m.Data)
		}
	}
	return out
}

// thief uses a service's key from outside: what it asks of JetStream is to be
// refused, or at least to get nowhere.
type thief struct {
	nc *nats.Conn
	js jetstream.JetStream
}

func (n *insiders) thief(t *testing.T, key, inbox string) thief {
	t.Helper()
	nc, err := kv.Connect(kv.Link{
		URL: n.NATSURL(2), SeedFile: n.Seed(key), CAFile: n.CA(), Name: "thief", Inbox: inbox, Timeout: 5 * time.Second, Once: true,
		Options: []nats.Option{nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})}, // each violation is told; what counts is what is left
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	return thief{nc, js}
}

// spoil tries to take the history of every stream away.
func (h thief) spoil(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	fails := func(what string, err error) {
		t.Helper()
		if err == nil {
			t.Errorf("%s: done", what)
		}
	}
	var wg sync.WaitGroup
	for _, def := range kv.Streams() {
		wg.Go(func() {
			fails("delete "+def.Name, h.js.DeleteStream(ctx, def.Name))
			def.MaxMsgs, def.DenyDelete = 1, false
			_, err := h.js.UpdateStream(ctx, def)
			fails("update "+def.Name, err)
		})
		for api, body := range map[string]string{
			"STREAM.PURGE.": "", "STREAM.MSG.DELETE.": `{"seq":1}`, "STREAM.RESTORE.": "{}", "STREAM.SNAPSHOT.": "{}", "STREAM.LEADER.STEPDOWN.": "",
		} {
			wg.Go(func() {
				m, err := h.nc.Request("$JS.API."+api+def.Name, []byte(body), patience)
				if err == nil && !bytes.Contains(m.Data, []byte(`"error"`)) {
					t.Errorf("%s%s: %s", api, def.Name, m.Data)
				}
			})
		}
	}
	wg.Wait()
}

// patience is how long a thief waits: what is not permitted is not answered.
const patience = 300 * time.Millisecond

// unchanged wants the buckets to be byte for byte what they were.
func (n *insiders) unchanged(t *testing.T, before map[string]string) {
	t.Helper()
	after := n.everything(t)
	for key, value := range before {
		if after[key] != value {
			t.Errorf("%s was %s\nand is %s", key, value, after[key])
		}
	}
	for key := range after {
		if _, there := before[key]; !there {
			t.Errorf("%s is new: %s", key, after[key])
		}
	}
}

// The key of a membership writes records, which is its trade, and nothing of
// the past; no other account is open to it.
func (n *insiders) stolenMembership(t *testing.T) {
	before := n.everything(t)
	h := n.thief(t, "membership-ctrl", "_INBOX_membership")
	h.spoil(t)
	var wg sync.WaitGroup
	for _, subject := range []string{
		"$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.PING.VARZ", "$SYS.REQ.ACCOUNT.BUS.CONNZ", "$SYS.REQ.USER.AUTH", "room.ops." + n.alice.key.NKey() + ".x",
		"notice." + n.alice.key.NKey() + ".x", "unibus.audit.authcallout-n1", "unibus.audit.unibusctl-direct",
	} {
		wg.Go(func() {
			if m, err := h.nc.Request(subject, []byte("{}"), patience); err == nil {
				t.Errorf("%s answered %s", subject, m.Data)
			}
		})
	}
	wg.Wait()
	n.unchanged(t, before)
}

// The key of an authcallout reads, and writes no record.
func (n *insiders) stolenCallout(t *testing.T) {
	before := n.everything(t)
	h := n.thief(t, "authcallout-ctrl", "_INBOX_authcallout")
	h.spoil(t)
	subjects := []string{}
	for subject := range before {
		if strings.HasPrefix(subject, "$KV.") {
			subjects = append(subjects, subject)
		}
	}
	for _, bucket := range []string{"users", "rooms", "members", "handles", "invites", "nonces", "rooms_by_member"} {
		subjects = append(subjects, "$KV.UNIBUS_"+bucket+".made-up")
	}
	var wg sync.WaitGroup
	for _, subject := range subjects {
		wg.Go(func() {
			if _, err := h.js.Publish(t.Context(), subject, []byte(`{"v":1,"status":"active","role":"admin"}`)); err == nil {
				t.Errorf("wrote %s", subject)
			}
		})
	}
	wg.Wait()
	n.unchanged(t, before)
	n.waitAdmits(n.alice, 1, 2, 3)
}

// Two admins, or one in two windows, add one key: one of them did.
func (n *insiders) twoAdds(t *testing.T) {
	for round := range 4 {
		p := newPerson(t, "twice")
		answers := n.together(t, func(node int) apiRequest {
			body := fmt.Appendf(nil, `{"sign_pub":%q,"handle":"twice-%d-%d","role":%q}`, p.key.NKey(), round, node, []string{"member", "admin", "member"}[node-1])
			return apiRequest{method: "POST", path: "/v1/users", body: body}
		}, n.admin, n.admin, n.admin)
		winner := 0
		for i, r := range answers {
			switch {
			case r.status == http.StatusCreated && winner == 0:
				winner = i + 1
			case r.status != http.StatusConflict:
				t.Errorf("node %d: %s", i+1, r)
			}
		}
		if winner == 0 {
			t.Fatalf("nobody won: %v", answers)
		}
		var out struct{ User bus.UserDetail }
		n.root.want(t, 200, "GET", "/v1/users/"+p.key.Hex(), nil).decode(t, &out)
		if u := out.User; string(u.Handle) != fmt.Sprintf("twice-%d-%d", round, winner) || (u.Role == bus.Admin) != (winner == 2) {
			t.Errorf("node %d won, and the record is %+v", winner, u)
		}
		// Again, with another role: refused, and nothing is flipped.
		again := n.root.want(t, http.StatusConflict, "POST", "/v1/users", dict{"sign_pub": p.key.Hex(), "handle": "other", "role": "admin"})
		if !strings.Contains(again.String(), "already registered") {
			t.Error(again)
		}
		n.root.changes(t, "POST", "/v1/users/"+p.key.Hex()+"/revoke", nil)
		n.root.want(t, http.StatusConflict, "POST", "/v1/users", dict{"sign_pub": p.key.Hex(), "handle": "other", "role": "member"})
	}
}

// together sends one request to each node at the same moment.
func (n *insiders) together(t *testing.T, make func(node int) apiRequest, callers ...*person) []*apiResponse {
	t.Helper()
	answers, errs := [3]*apiResponse{}, [3]error{}
	var wg sync.WaitGroup
	for i, p := range callers {
		wg.Go(func() { answers[i], errs[i] = n.api(i+1, p).send(t.Context(), make(i+1)) })
	}
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	return answers[:len(callers)]
}

// There is one first admin. The API knows no bootstrap at all.
func (n *insiders) secondBootstrap(t *testing.T) {
	before := n.admins(t)
	var wg sync.WaitGroup
	for i := range 3 {
		p := newPerson(t, "usurper")
		wg.Go(func() {
			r := decided(func() cluster.Result {
				return n.CLI("--direct", "bootstrap", "--handle", fmt.Sprintf("usurper-%d", i), "--sign-pub", p.key.NKey())
			})
			if r.Code != 1 || !strings.Contains(r.Stderr, "already bootstrapped") {
				t.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
			}
		})
	}
	wg.Wait()
	for _, path := range []string{"/v1/bootstrap", "/v1/users/bootstrap"} {
		if r := n.root.do(t, "POST", path, dict{"handle": "usurper"}); r.status/100 != 4 {
			t.Errorf("%s: %s", path, r)
		}
	}
	if after := n.admins(t); len(after) != len(before) {
		t.Errorf("admins were %v and are %v", before, after)
	}
}

// admins are the handles of all active admins.
func (n *insiders) admins(t *testing.T) (handles []string) {
	t.Helper()
	for _, u := range n.view.Users() {
		if u.Role == bus.Admin && u.ActiveAt(time.Now()) {
			handles = append(handles, string(u.Handle))
		}
	}
	return handles
}

// The last admin stays one, whichever way they would go.
func (n *insiders) lastAdmin(t *testing.T) {
	for _, q := range []struct {
		method, path string
		body         any
	}{
		{"POST", "/v1/users/admin/revoke", nil},
		{"POST", "/v1/users/admin/suspend", nil},
		{"PATCH", "/v1/users/admin", dict{"role": "member"}},
		{"PATCH", "/v1/users/admin", dict{"expires_at": time.Now().Add(time.Hour).UTC()}},
	} {
		if r := n.root.want(t, http.StatusConflict, q.method, q.path, q.body); !strings.Contains(r.String(), "last active admin") {
			t.Errorf("%s %s: %s", q.method, q.path, r)
		}
	}
	n.root.want(t, 200, "GET", "/v1/users", nil)
}

// Two admins revoke each other at the same moment through two nodes: one stays.
func (n *insiders) twoAdmins(t *testing.T) {
	for round := range 4 {
		other := newPerson(t, fmt.Sprintf("second-%d", round))
		n.root.want(t, http.StatusCreated, "POST", "/v1/users", dict{"sign_pub": other.key.NKey(), "handle": other.name, "role": "admin"})
		victim := []string{other.key.Hex(), n.admin.key.Hex()}
		answers := n.together(t, func(node int) apiRequest {
			return apiRequest{method: "POST", path: "/v1/users/" + victim[node-1] + "/revoke"}
		}, n.admin, other)
		won := 0
		for _, r := range answers {
			switch r.status {
			case http.StatusOK:
				won++
			case http.StatusConflict, http.StatusUnauthorized, http.StatusForbidden: // too late, as the last admin or as nobody
			default:
				t.Error(r)
			}
		}
		if won != 1 {
			t.Fatalf("%d revokes succeeded: %v", won, answers)
		}
		if answers[1].status == http.StatusOK {
			n.admin = other
			n.root = n.as(other)
		}
		cluster.WaitFor(t, 10*time.Second, "one admin", func() error {
			if left := n.admins(t); len(left) != 1 {
				return fmt.Errorf("admins %v", left)
			}
			return nil
		})
	}
}

// A day's work leaves secrets in the files that are theirs, and nowhere else: in
// no argument or environment of a service, in no log, in no stored record.
func (n *insiders) secrets(t *testing.T) {
	n.adminSeed(n.admin)
	n.daysWork(t)
	secrets := n.allSecrets(t)
	find := func(where string, text []byte) {
		for name, s := range secrets {
			if i := bytes.Index(text, s); i >= 0 {
				t.Errorf("%s holds %s", where, name)
			}
		}
	}
	for _, i := range n.Nodes() {
		for _, s := range cluster.Services() {
			for _, file := range []string{"cmdline", "environ"} {
				text, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(n.PID(i, s)), file))
				if err != nil || len(text) == 0 {
					t.Fatalf("%s of %s on n%d: %v", file, s, i, err)
				}
				find(fmt.Sprintf("%s of %s on n%d", file, s, i), text)
			}
		}
	}
	kept, logs := 0, 0
	err := filepath.WalkDir(n.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return nil // a file of a running server that went away meanwhile
		}
		rel, _ := filepath.Rel(n.Dir, path)
		if strings.Contains(rel, "/log/") || strings.Contains(rel, "/state/") {
			logs++
			find(rel, text)
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		for name, s := range secrets {
			if bytes.Contains(text, s) {
				kept++
				if info.Mode().Perm()&0o077 != 0 {
					t.Errorf("%s, which holds %s, has mode %s", rel, name, info.Mode())
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if kept < 10 || logs < 10 {
		t.Errorf("%d files with secrets, %d logs and records: this looked in the wrong place", kept, logs)
	}
}

// daysWork uses every kind of secret: invites, enrolments, seeds, signatures,
// good and bad.
func (n *insiders) daysWork(t *testing.T) {
	run := func(code int, args ...string) cluster.Result {
		t.Helper()
		r := n.CLI(args...)
		if r.Code != code {
			t.Errorf("unibusctl %s: exit %d, want %d: %s%s", strings.Join(args, " "), r.Code, code, r.Stdout, r.Stderr)
		}
		return r
	}
	for i := range 3 {
		r := run(0, "invite", "create", "--role", "member", "--json")
		var made struct{ Invite bus.InviteCreated }
		if err := json.Unmarshal([]byte(r.Stdout), &made); err != nil {
			t.Fatalf("%v: %s", err, r.Stdout)
		}
		n.spoken = append(n.spoken, []byte(made.Invite.Token[len("ubi_0123456789abcdef_"):]))
		p := newPerson(t, fmt.Sprintf("joiner-%d", i))
		switch i {
		case 0:
			n.as(p).want(t, http.StatusCreated, "POST", "/v1/enroll", dict{"token": made.Invite.Token, "handle": p.name})
			n.as(newPerson(t, "late")).want(t, http.StatusUnauthorized, "POST", "/v1/enroll", dict{"token": made.Invite.Token, "handle": "late"})
		case 1: // the token in places where it does not belong
			n.root.do(t, "DELETE", "/v1/invites/"+made.Invite.Token, nil)
			n.root.do(t, "GET", "/v1/users?after="+made.Invite.Token, nil)
			n.root.do(t, "GET", "/v1/audit?action="+made.Invite.Token, nil)
			n.root.do(t, "POST", "/v1/rooms", dict{"room": made.Invite.Token})
			n.root.do(t, "GET", "/v1/rooms/"+made.Invite.Token, nil)
		case 2:
			run(0, "invite", "withdraw", made.Invite.ID, "--yes")
		}
		seed, err := p.kp.Seed()
		if err != nil {
			t.Fatal(err)
		}
		n.spoken = append(n.spoken, seed)
		n.root.do(t, "POST", "/v1/users", dict{"sign_pub": string(seed), "handle": "pasted", "role": "member"})
		n.root.do(t, "GET", "/v1/users/"+string(seed), nil)
		run(1, "user", "add", "--handle", "pasted", "--sign-pub", string(seed))
	}
	run(0, "room", "create", "secret-room")
	run(0, "room", "add", "secret-room", "alice", "--role", "writer")
	run(0, "--direct", "user", "list")
	run(0, "acl", "explain", "alice")
	run(0, "audit", "list", "--limit", "500")
	run(0, "api", "GET", "/v1/me")
	for i := range 3 { // signatures, of which the last is refused
		q := apiRequest{method: "GET", path: "/v1/me", edit: func(r *http.Request) {
			_, encoded, _ := strings.Cut(r.Header.Get("Signature"), "ub1=:")
			n.spoken = append(n.spoken, []byte(strings.TrimSuffix(encoded, ":")))
			if i == 2 {
				r.Host = "elsewhere.example"
			}
		}}
		if _, err := n.api(i%3+1, n.admin).send(context.WithoutCancel(t.Context()), q); err != nil {
			t.Fatal(err)
		}
	}
	n.waitAdmits(n.alice, 1, 2, 3)
	if v, _ := n.attempt(1, newPerson(t, "stranger")); v != refused {
		t.Errorf("a stranger is %s", v)
	}
}

// allSecrets are the texts that must be nowhere else: of all files of secrets,
// of all people, and of what was sent.
func (n *insiders) allSecrets(t *testing.T) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	files, err := filepath.Glob(filepath.Join(n.Secrets(), "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if text = bytes.TrimSpace(text); len(text) > 20 && filepath.Ext(f) != ".pub" {
			out[filepath.Base(f)] = text
		}
	}
	if len(out) < 8 {
		t.Fatalf("%d secrets in %s", len(out), n.Secrets())
	}
	for _, p := range []*person{n.admin, n.alice, n.bob} {
		seed, err := p.kp.Seed()
		if err != nil {
			t.Fatal(err)
		}
		out["the seed of "+p.name] = seed
	}
	for i, s := range n.spoken {
		out[fmt.Sprintf("what was sent, %d", i)] = s
		out[fmt.Sprintf("what was sent, %d, in base64", i)] = []byte(base64.StdEncoding.EncodeToString(s))
	}
	return out
}
