package callout

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

func newTestMinter(t testing.TB, keys ...Keys) *minter {
	t.Helper()
	m, err := newMinter(keys, 12*time.Hour, at(moment))
	must(t, err)
	return m
}

// readAnswer does with an answer what nats-server does (auth_callout.go): it
// opens, decodes and validates, and takes a warning for a refusal. The library
// compares expiries with the wall clock, so those issues are left to the caller.
func (s *scene) readAnswer(t testing.TB, reply []byte) (*jwt.AuthorizationResponseClaims, *jwt.UserClaims) {
	t.Helper()
	token, err := s.serverCurve.Open(reply, s.curve.pub)
	must(t, err)
	answer, err := jwt.DecodeAuthorizationResponseClaims(string(token))
	must(t, err)
	refuseIssues(t, answer)
	if answer.Jwt == "" {
		return answer, nil
	}
	user, err := jwt.DecodeUserClaims(answer.Jwt)
	must(t, err)
	refuseIssues(t, user)
	return answer, user
}

func refuseIssues(t testing.TB, c interface{ Validate(*jwt.ValidationResults) }) {
	t.Helper()
	vr := jwt.CreateValidationResults()
	c.Validate(vr)
	for _, issue := range vr.Issues {
		if !issue.TimeCheck {
			t.Errorf("the server would refuse: %s", issue.Description)
		}
	}
}

// TestAdmit compares what a server reads with what was decided, claim by claim.
func TestAdmit(t *testing.T) {
	s := newScene(t)
	c, req := s.genuine(t)
	u := s.client.pub
	own := jwt.StringList{"_INBOX_" + u + ".>", "notice." + u + ".>"}
	nothing := jwt.Permission{Deny: jwt.StringList{">"}}
	for name, tt := range map[string]struct {
		rooms []kv.Grant
		pub   jwt.Permission
		sub   jwt.StringList
	}{
		"no rooms":             {nil, nothing, own},
		"a reader":             {[]kv.Grant{{Room: "ops", Role: bus.Reader}}, nothing, append(slices.Clone(own), "room.ops.>")},
		"a writer":             {[]kv.Grant{{Room: "ops", Role: bus.Writer}}, jwt.Permission{Allow: jwt.StringList{"room.ops." + u + ".>"}}, append(slices.Clone(own), "room.ops.>")},
		"an owner":             {[]kv.Grant{{Room: "ops", Role: bus.Owner}}, jwt.Permission{Allow: jwt.StringList{"room.ops." + u + ".>"}}, append(slices.Clone(own), "room.ops.>")},
		"a durable room":       {[]kv.Grant{{Room: "log", Role: bus.Writer, Durable: true}}, jwt.Permission{Allow: jwt.StringList{"room.log." + u + ".>"}}, append(slices.Clone(own), "feed.log.>")},
		"a durable room's ear": {[]kv.Grant{{Room: "log", Role: bus.Reader, Durable: true}}, nothing, append(slices.Clone(own), "feed.log.>")},
		"a role nobody knows":  {[]kv.Grant{{Room: "ops", Role: "god"}}, nothing, own},
		"no role":              {[]kv.Grant{{Room: "ops"}}, nothing, own},
		"a role in wrong case": {[]kv.Grant{{Room: "ops", Role: "Owner"}}, nothing, own},
		"reader here, not there": {
			[]kv.Grant{{Room: "a", Role: bus.Owner}, {Room: "b", Role: bus.Reader}},
			jwt.Permission{Allow: jwt.StringList{"room.a." + u + ".>"}},
			append(slices.Clone(own), "room.a.>", "room.b.>"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			reply, err := newTestMinter(t, s.keys).admit(c, req, s.access(t, tt.rooms...), moment.Add(answerLife))
			must(t, err)
			answer, user := s.readAnswer(t, reply)
			if answer.Subject != s.session.pub || answer.Audience != s.server.pub || answer.Issuer != s.issuer.pub || answer.IssuerAccount != "" || answer.Error != "" {
				t.Errorf("answer %+v", answer)
			}
			if answer.Expires != moment.Add(answerLife).Unix() {
				t.Errorf("the answer expires at %d, want %d", answer.Expires, moment.Add(answerLife).Unix())
			}
			if user.Subject != s.session.pub || user.Audience != "BUS" || user.Name != u || user.Issuer != s.issuer.pub || user.IssuerAccount != "" {
				t.Errorf("user %+v", user.ClaimsData)
			}
			if ttl := time.Unix(user.Expires, 0).Sub(moment); ttl > 12*time.Hour || ttl < 12*time.Hour*9/10-time.Second {
				t.Errorf("the session lives %s", ttl)
			}
			want := jwt.User{
				UserPermissionLimits: jwt.UserPermissionLimits{
					Permissions:            jwt.Permissions{Pub: tt.pub, Sub: jwt.Permission{Allow: tt.sub}},
					Limits:                 jwt.Limits{NatsLimits: jwt.NatsLimits{Subs: jwt.NoLimit, Data: jwt.NoLimit, Payload: jwt.NoLimit}},
					AllowedConnectionTypes: jwt.StringList{"STANDARD"},
				},
				GenericFields: jwt.GenericFields{Type: jwt.UserClaim, Version: 2},
			}
			gotJSON, _ := json.Marshal(user.User)
			wantJSON, _ := json.Marshal(want)
			if !bytes.Equal(gotJSON, wantJSON) {
				t.Errorf("rights\n %s, want\n %s", gotJSON, wantJSON)
			}
			if user.Resp != nil {
				t.Error("the JWT carries response permissions")
			}
		})
	}
}

// TestAdmitNeverOutlives: neither the user's expiry nor the answer's.
func TestAdmitNeverOutlives(t *testing.T) {
	s := newScene(t)
	c, req := s.genuine(t)
	a := s.access(t)
	end := moment.Add(90 * time.Second)
	a.User.ExpiresAt = &end
	lease := moment.Add(700 * time.Millisecond)
	reply, err := newTestMinter(t, s.keys).admit(c, req, a, lease)
	must(t, err)
	answer, user := s.readAnswer(t, reply)
	if user.Expires != end.Unix() {
		t.Errorf("the session ends at %d, the user at %d", user.Expires, end.Unix())
	}
	if answer.Expires != lease.Unix() {
		t.Errorf("the answer expires at %d, the lease at %d", answer.Expires, lease.Unix())
	}
}

func TestSessionsDoNotEndTogether(t *testing.T) {
	s := newScene(t)
	c, req := s.genuine(t)
	m := newTestMinter(t, s.keys)
	ends := map[int64]bool{}
	for range 20 {
		reply, err := m.admit(c, req, s.access(t), moment.Add(answerLife))
		must(t, err)
		_, user := s.readAnswer(t, reply)
		ends[user.Expires] = true
	}
	if len(ends) < 10 {
		t.Errorf("20 sessions end at %d moments", len(ends))
	}
}

// TestTheLargestAnswerFits: nobody is locked out by their own rooms while the
// servers' max_payload is the 1 MB of the shipped configuration.
func TestTheLargestAnswerFits(t *testing.T) {
	s := newScene(t)
	c, req := s.genuine(t)
	var rooms []kv.Grant
	for i := range bus.MaxRoomsPerUser {
		id, err := bus.ParseRoomID(fmt.Sprintf("%032d", i))
		must(t, err)
		rooms = append(rooms, kv.Grant{Room: id, Role: bus.Owner})
	}
	reply, err := newTestMinter(t, s.keys).admit(c, req, s.access(t, rooms...), moment.Add(answerLife))
	must(t, err)
	if _, user := s.readAnswer(t, reply); len(user.Pub.Allow) != bus.MaxRoomsPerUser {
		t.Errorf("%d rooms to publish in, want %d", len(user.Pub.Allow), bus.MaxRoomsPerUser)
	}
	if len(reply) > 512<<10 {
		t.Errorf("the answer has %d bytes", len(reply))
	}
	t.Logf("%d bytes", len(reply))
}

func TestDenySaysNothing(t *testing.T) {
	s := newScene(t)
	c, _ := s.genuine(t)
	reply, err := newTestMinter(t, s.keys).deny(c, moment.Add(answerLife))
	must(t, err)
	answer, user := s.readAnswer(t, reply)
	if user != nil || answer.Error != "not authorized" || answer.Subject != s.session.pub || answer.Audience != s.server.pub || answer.Expires == 0 {
		t.Errorf("denial %+v", answer)
	}
}

// TestAnswersAreSealed: the same answer twice is two different messages, and
// nothing of it can be read on the way.
func TestAnswersAreSealed(t *testing.T) {
	s := newScene(t)
	c, req := s.genuine(t)
	m := newTestMinter(t, s.keys)
	one, err := m.admit(c, req, s.access(t), moment.Add(answerLife))
	must(t, err)
	two, err := m.admit(c, req, s.access(t), moment.Add(answerLife))
	must(t, err)
	if bytes.Equal(one[4:28], two[4:28]) {
		t.Error("a nonce is used twice")
	}
	if bytes.Contains(one, []byte("eyJ")) {
		t.Error("the answer is legible")
	}
	if _, err := newPair(t, nkeys.PrefixByteCurve, 44).Open(one, s.curve.pub); err == nil {
		t.Error("somebody else opens the answer")
	}
}

func TestAdmitRefusesAnotherUsersAccess(t *testing.T) {
	s := newScene(t)
	c, req := s.genuine(t)
	a := s.access(t)
	a.User.Key = key(t, newPair(t, nkeys.PrefixByteUser, 77).pub)
	if _, err := newTestMinter(t, s.keys).admit(c, req, a, moment.Add(answerLife)); err == nil {
		t.Error("minted the rights of one user for another")
	}
}

// TestSecondLock feeds check what a broken permit could produce.
func TestSecondLock(t *testing.T) {
	s := newScene(t)
	me, other := key(t, s.client.pub), newPair(t, nkeys.PrefixByteUser, 77).pub
	good := func() permissions { return permit(s.access(t, kv.Grant{Room: "ops", Role: bus.Owner})) }
	if err := good().check(me); err != nil {
		t.Fatalf("good permissions are refused: %v", err)
	}
	allow := func(list *[]string, subject string) { *list = append(*list, subject) }
	for name, spoil := range map[string]func(*permissions){
		"no rules to publish":         func(p *permissions) { p.Pub = rules{} },
		"no rules to subscribe":       func(p *permissions) { p.Sub = rules{} },
		"response permissions":        func(p *permissions) { p.Resp = &responses{Max: 1} },
		"publish everywhere":          func(p *permissions) { allow(&p.Pub.Allow, ">") },
		"publish in every room":       func(p *permissions) { allow(&p.Pub.Allow, "room.>") },
		"publish in a whole room":     func(p *permissions) { allow(&p.Pub.Allow, "room.ops.>") },
		"publish as somebody else":    func(p *permissions) { allow(&p.Pub.Allow, "room.ops."+other+".>") },
		"publish by wildcard room":    func(p *permissions) { allow(&p.Pub.Allow, "room.*."+s.client.pub+".>") },
		"publish to the store":        func(p *permissions) { allow(&p.Pub.Allow, "store.ops."+s.client.pub+".>") },
		"publish to JetStream":        func(p *permissions) { allow(&p.Pub.Allow, "$JS.API.>") },
		"publish nothing":             func(p *permissions) { allow(&p.Pub.Allow, "") },
		"publish notices":             func(p *permissions) { allow(&p.Pub.Allow, "notice."+s.client.pub+".>") },
		"subscribe everywhere":        func(p *permissions) { allow(&p.Sub.Allow, ">") },
		"subscribe to all rooms":      func(p *permissions) { allow(&p.Sub.Allow, "room.>") },
		"subscribe by wildcard":       func(p *permissions) { allow(&p.Sub.Allow, "room.*.>") },
		"subscribe to another inbox":  func(p *permissions) { allow(&p.Sub.Allow, "_INBOX_"+other+".>") },
		"subscribe to all inboxes":    func(p *permissions) { allow(&p.Sub.Allow, "_INBOX.>") },
		"subscribe to other notices":  func(p *permissions) { allow(&p.Sub.Allow, "notice."+other+".>") },
		"subscribe to the store":      func(p *permissions) { allow(&p.Sub.Allow, "store.ops.>") },
		"subscribe to the system":     func(p *permissions) { allow(&p.Sub.Allow, "$SYS.>") },
		"subscribe with a queue name": func(p *permissions) { allow(&p.Sub.Allow, "room.ops.> q") },
	} {
		t.Run(name, func(t *testing.T) {
			p := good()
			spoil(&p)
			if err := p.check(me); err == nil {
				t.Errorf("passes: %+v", p)
			}
		})
	}
}

// TestRenderedOncePerChange: the same access is not rendered again, another is.
func TestRenderedOncePerChange(t *testing.T) {
	s := newScene(t)
	m := newTestMinter(t, s.keys)
	a := s.access(t, kv.Grant{Room: "ops", Role: bus.Writer})
	one, err := m.permissionsOf(a)
	must(t, err)
	two, err := m.permissionsOf(a)
	must(t, err)
	if &one[0] != &two[0] {
		t.Error("rendered twice")
	}
	three, err := m.permissionsOf(s.access(t))
	must(t, err)
	if bytes.Contains(three, []byte("ops")) {
		t.Error("a changed access is answered with the old rights")
	}
	four, err := m.permissionsOf(a)
	must(t, err)
	if !bytes.Equal(one, four) {
		t.Errorf("%s, want %s", four, one)
	}
}

// TestAdmitDoesNotShareMemory: the cached text is common to all answers.
func TestAdmitDoesNotShareMemory(t *testing.T) {
	s := newScene(t)
	c, req := s.genuine(t)
	m := newTestMinter(t, s.keys)
	a := s.access(t)
	raw, err := m.permissionsOf(a)
	must(t, err)
	before := string(raw)
	for range 3 {
		_, err := m.admit(c, req, a, moment.Add(answerLife))
		must(t, err)
	}
	if string(raw) != before {
		t.Errorf("minting changed the cached rights to %s", raw)
	}
}

// TestGoldenPermissions fixes the bytes that docs/protocol.md describes.
func TestGoldenPermissions(t *testing.T) {
	s := newScene(t)
	raw, err := newTestMinter(t, s.keys).permissionsOf(s.access(t,
		kv.Grant{Room: "dev", Role: bus.Reader}, kv.Grant{Room: "log", Role: bus.Owner, Durable: true}, kv.Grant{Room: "ops", Role: bus.Writer}))
	must(t, err)
	path := filepath.Join("testdata", "permissions.json")
	want, err := os.ReadFile(path)
	must(t, err)
	if got := []byte("{" + string(raw) + "}\n"); !bytes.Equal(got, want) {
		t.Errorf("permissions are\n%s, want (%s)\n%s", got, path, want)
	}
}

func TestParseKeys(t *testing.T) {
	s := newScene(t)
	if s.keys.Issuer.Public != s.issuer.pub || s.keys.Curve.Public != s.curve.pub {
		t.Errorf("public keys %s %s, want %s %s", s.keys.Issuer.Public, s.keys.Curve.Public, s.issuer.pub, s.curve.pub)
	}
	for name, seeds := range map[string][2][]byte{
		"issuer is a user":    {s.client.seed(t), s.curve.seed(t)},
		"issuer is a curve":   {s.curve.seed(t), s.curve.seed(t)},
		"curve is an account": {s.issuer.seed(t), s.issuer.seed(t)},
		"no issuer":           {nil, s.curve.seed(t)},
		"no curve":            {s.issuer.seed(t), nil},
		"issuer is public":    {[]byte(s.issuer.pub), s.curve.seed(t)},
	} {
		_, err := ParseKeys(seeds[0], seeds[1])
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
		var e *bus.Error
		if !errors.As(err, &e) {
			t.Errorf("%s: %v is no bus.Error", name, err)
		}
		for _, seed := range seeds {
			if len(seed) > 0 && err != nil && strings.Contains(err.Error(), string(seed)) {
				t.Errorf("%s: the error shows a seed", name)
			}
		}
	}
}

func TestMinterRefusesItsConfiguration(t *testing.T) {
	s := newScene(t)
	for name, err := range map[string]error{
		"no keys":   second(newMinter(nil, time.Hour, time.Now)),
		"short ttl": second(newMinter([]Keys{s.keys}, 59*time.Second, time.Now)),
		"long ttl":  second(newMinter([]Keys{s.keys}, 721*time.Hour, time.Now)),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// covers reports whether a permission covers a literal subject, by the rules of
// NATS and not by ours.
func covers(permission, subject string) bool {
	p, s := strings.Split(permission, "."), strings.Split(subject, ".")
	for i, token := range p {
		switch {
		case token == ">":
			return len(s) > i
		case i >= len(s), token != "*" && token != s[i]:
			return false
		}
	}
	return len(p) == len(s)
}

// FuzzPermit: no grant covers a subject of a room the user is not in, of
// another sender, or of anything else; and no direction is without rules.
func FuzzPermit(f *testing.F) {
	f.Add([]byte{}, "ops", "x")
	f.Add([]byte{1, 2, 3, 4, 5, 6}, "room-1", "room.x.y")
	f.Add([]byte{0, 0, 255, 7, 9}, "a", "$JS.API.INFO")
	s := newScene(f)
	other := newPair(f, nkeys.PrefixByteUser, 77).pub
	me := s.client.pub
	f.Fuzz(func(t *testing.T, shape []byte, extra, wild string) {
		a := s.access(t)
		in := map[bus.RoomID]kv.Grant{}
		add := func(id string, kind byte) {
			room, err := bus.ParseRoomID(id)
			if _, double := in[room]; err != nil || double || len(in) == bus.MaxRoomsPerUser {
				return
			}
			g := kv.Grant{Room: room, Role: []bus.RoomRole{bus.Reader, bus.Writer, bus.Owner, "", "x"}[kind%5], Durable: kind >= 128}
			in[room] = g
			a.Rooms = append(a.Rooms, g)
		}
		for i, kind := range shape {
			add(fmt.Sprintf("room-%d", i), kind)
		}
		add(extra, byte(len(shape)))
		raw, err := newTestMinter(t, s.keys).permissionsOf(a)
		must(t, err)
		var p permissions
		must(t, json.Unmarshal([]byte("{"+string(raw)+"}"), &p))
		if len(p.Pub.Allow)+len(p.Pub.Deny) == 0 || len(p.Sub.Allow)+len(p.Sub.Deny) == 0 || p.Resp != nil {
			t.Fatalf("permissions %s", raw)
		}
		may := func(list []string, subject string) bool {
			return slices.ContainsFunc(list, func(s string) bool { return covers(s, subject) })
		}
		rooms := []bus.RoomID{"room-0", "room-1", "elsewhere", "ops", "a"}
		for room := range in {
			rooms = append(rooms, room)
		}
		for _, room := range rooms {
			g, member := in[room]
			known := member && g.Role.Rank() > 0
			check := func(what string, got, want bool, subject string) {
				t.Helper()
				if got != want {
					t.Errorf("%s %s: %t, want %t (%s)", what, subject, got, want, raw)
				}
			}
			r := string(room)
			check("publish", may(p.Pub.Allow, "room."+r+"."+me+".t"), member && g.Role.MayPublish(), r)
			check("publish as another", may(p.Pub.Allow, "room."+r+"."+other+".t"), false, r)
			check("publish to the store", may(p.Pub.Allow, "store."+r+"."+me+".t") || may(p.Pub.Allow, "feed."+r+"."+me+".t"), false, r)
			check("hear the room", may(p.Sub.Allow, "room."+r+"."+other+".t"), known && !g.Durable, r)
			check("hear the feed", may(p.Sub.Allow, "feed."+r+"."+other+".t"), known && g.Durable, r)
			check("hear the store", may(p.Sub.Allow, "store."+r+"."+other+".t"), false, r)
		}
		for _, subject := range []string{
			"_INBOX." + wild, "_INBOX_" + other + ".x", "notice." + other + ".x", "$JS.API." + wild, "$KV." + wild, "$SYS." + wild, "x." + wild,
		} {
			if may(p.Pub.Allow, subject) || may(p.Sub.Allow, subject) {
				t.Errorf("%q is granted by %s", subject, raw)
			}
		}
		if may(p.Pub.Allow, "notice."+me+".x") || may(p.Pub.Allow, "_INBOX_"+me+".x") {
			t.Errorf("the user may speak as a service: %s", raw)
		}
	})
}

var benchRooms = func() []kv.Grant {
	var out []kv.Grant
	for i := range 20 {
		out = append(out, kv.Grant{Room: bus.RoomID(fmt.Sprintf("room-%02d", i)), Role: bus.Writer})
	}
	return out
}()

// BenchmarkConnect is the whole work of one accepted connect without the
// network: the aim is 0.42 ms of CPU, or 2.1
// times the floor below.
func BenchmarkConnect(b *testing.B) {
	s := newScene(b)
	o, m, a, msg := s.opener(), newTestMinter(b, s.keys), s.access(b, benchRooms...), s.parts(b).message(b)
	b.ReportAllocs()
	defer reportCPU(b)()
	for b.Loop() {
		c, err := o.open(msg)
		must(b, err)
		req, why := c.prove()
		if why != "" {
			b.Fatal(why)
		}
		if out := decide(a, nil, moment); !out.allow {
			b.Fatal(out.reason)
		}
		if _, err := m.admit(c, req, a, moment.Add(answerLife)); err != nil {
			b.Fatal(err)
		}
	}
}

// reportCPU adds what the process itself consumed, which a busy machine does
// not blur as it does the wall clock.
func reportCPU(b *testing.B) (stop func()) {
	used := func() time.Duration {
		var u syscall.Rusage
		must(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	return func() { b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op") }
}

func BenchmarkOpen(b *testing.B) {
	s := newScene(b)
	o, msg := s.opener(), s.parts(b).message(b)
	b.ReportAllocs()
	for b.Loop() {
		_, err := o.open(msg)
		must(b, err)
	}
}

func BenchmarkProve(b *testing.B) {
	s := newScene(b)
	c, _ := s.genuine(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, why := c.prove(); why != "" {
			b.Fatal(why)
		}
	}
}

func BenchmarkAdmit(b *testing.B) {
	s := newScene(b)
	m, a := newTestMinter(b, s.keys), s.access(b, benchRooms...)
	c, req := s.genuine(b)
	b.ReportAllocs()
	for b.Loop() {
		_, err := m.admit(c, req, a, moment.Add(answerLife))
		must(b, err)
	}
}

// BenchmarkFloor is the cryptography alone: two verifications, two signatures.
func BenchmarkFloor(b *testing.B) {
	s := newScene(b)
	text := bytes.Repeat([]byte("x"), 2000)
	raw, err := base64.RawURLEncoding.DecodeString(s.sign(b, s.client, string(text)))
	must(b, err)
	kp, err := nkeys.FromPublicKey(s.client.pub)
	must(b, err)
	defer reportCPU(b)()
	for b.Loop() {
		for range 2 {
			must(b, kp.Verify(text, raw))
			_, err := s.issuer.Sign(text)
			must(b, err)
		}
	}
}
