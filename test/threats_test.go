package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
	"unibus.internal/test/cluster"
)

// balancer is a name under which every node of a threatened cluster is reached,
// as behind a load balancer: a request that is signed for it is good on all.
const balancer = "bus.test"

// TestThreats attacks the API of a live cluster. Each subtest is a row of
// docs/threat-model.md and stands on its own.
func TestThreats(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{
		// The limits have a test of their own; the others are to reach what is behind.
		Env:  map[cluster.Service]map[string]string{cluster.Membership: {"UNIBUS_RATE_KEY": "100000:100000", "UNIBUS_RATE_ADDRESS": "100000:100000"}},
		Edit: behindBalancer,
	})
	th := &threats{world: w, alice: w.addUser("alice"), bob: w.addUser("bob")}
	w.api(1, w.admin).want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "ops"})
	for _, s := range []struct {
		name string
		test func(*threats, *testing.T)
	}{
		{"T9 probing", (*threats).probing},
		{"T18 mass assignment", (*threats).massAssignment},
		{"T19 roles", (*threats).roles},
		{"T19 an invite used again", (*threats).inviteAgain},
		{"T27 revoked callers", (*threats).revokedCallers},
		{"T29 replays", (*threats).replays},
		{"T30 old nonces", (*threats).oldNonces},
		{"T31 changed requests", (*threats).changedRequests},
		{"T32 downgrades", (*threats).downgrades},
		{"T34 a nonce burned", (*threats).burnedNonces},
		{"T47 forged log lines", (*threats).forgedLogLines},
		{"T48 proxies and smuggling", (*threats).smuggling},
		{"slow and greedy clients", (*threats).greedyClients},
		{"too many requests", (*threats).tooMany},
	} {
		t.Run(s.name, func(t *testing.T) {
			ours, in := *th, *w
			in.Cluster, in.t = w.In(t), t
			ours.world = &in
			s.test(&ours, t)
		})
	}
}

// threats is a cluster with two members to attack, and to attack with.
type threats struct {
	*world
	alice, bob *person
}

// behindBalancer gives every node one more name.
func behindBalancer(l *cluster.Layout) error {
	for i := range l.Ports {
		file := filepath.Join(l.Etc(i+1), "membership.env")
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		line := regexp.MustCompile(`(?m)^(UNIBUS_AUTHORITIES="?)`)
		if !line.Match(text) {
			return errors.New("membership.env names no authorities")
		}
		if err := os.WriteFile(file, line.ReplaceAll(text, []byte("${1}"+balancer+",")), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// does asks node 1 as the first admin, and fails the test if it is not done.
func (w *world) does(t testing.TB, method, path string, body any) {
	t.Helper()
	if r := w.api(1, w.admin).do(t, method, path, body); r.status > 299 {
		t.Fatalf("%s %s: %s", method, path, r)
	}
}

// registers makes a user over the API.
func (w *world) registers(t testing.TB, handle string, role bus.Role) *person {
	t.Helper()
	p := newPerson(t, handle)
	w.does(t, "POST", "/v1/users", dict{"sign_pub": p.key.NKey(), "handle": handle, "role": role})
	return p
}

// impostor signs with a key of their own and says that it is somebody else's.
type impostor struct {
	*person
	as bus.UserKey
}

func (i impostor) Key() bus.UserKey { return i.as }

// probing: whoever has proven nothing, or holds a key that is nobody's, or
// brings a token that is not good, is told one thing, in the same time whether
// what they name exists or not.
func (th *threats) probing(t *testing.T) {
	rounds := 100
	if full {
		rounds = 200
	}
	revoked, suspended, expired := th.registers(t, "p-revoked", bus.Member), th.registers(t, "p-suspended", bus.Member), th.registers(t, "p-expired", bus.Member)
	th.does(t, "POST", "/v1/users/p-revoked/revoke", nil)
	th.does(t, "POST", "/v1/users/p-suspended/suspend", nil)
	soon := time.Now().Add(time.Second)
	th.does(t, "PATCH", "/v1/users/p-expired", dict{"expires_at": soon.UTC()})
	stranger := newPerson(t, "stranger")
	invite := func() string {
		var made struct{ Invite bus.InviteCreated }
		th.api(1, th.admin).want(t, http.StatusCreated, "POST", "/v1/invites", dict{"role": "member"}).decode(t, &made)
		return made.Invite.Token
	}
	open, used, withdrawn := invite(), invite(), invite()
	th.api(1, newPerson(t, "p-newcomer")).want(t, http.StatusCreated, "POST", "/v1/enroll", dict{"token": used, "handle": "p-newcomer"})
	th.does(t, "DELETE", "/v1/invites/"+strings.Split(withdrawn, "_")[1], nil)
	wrongSecret := func(token string) string { return token[:21] + strings.Repeat("a", 32) }

	type probe struct {
		name string
		who  sig.Signer // nil signs nothing
		apiRequest
	}
	get := func(path string) apiRequest { return apiRequest{method: "GET", path: path} }
	forged := func(as *person) sig.Signer { return impostor{stranger, as.key} }
	enroll := func(token string) apiRequest {
		return apiRequest{method: "POST", path: "/v1/enroll", body: []byte(fmt.Sprintf(`{"token":%q,"handle":"mallory"}`, token))}
	}
	// The probes of one class must not be told apart by time either. Between
	// the classes time differs, by what the sender knows of themselves anyway:
	// whether they have signed, and with which key.
	classes := [][]probe{
		{
			{"no signature", nil, get("/v1/me")},
			{"no signature, no such path", nil, get("/v1/nothing")},
			{"no signature, no such room", nil, get("/v1/rooms/nowhere")},
		},
		{
			{"bad signature of an admin", forged(th.admin), get("/v1/me")},
			{"bad signature of a member", forged(th.alice), get("/v1/me")},
			{"bad signature of a revoked user", forged(revoked), get("/v1/me")},
			{"bad signature of nobody", forged(newPerson(t, "nobody")), get("/v1/me")},
			{"bad signature, no such path", forged(th.admin), get("/v1/nothing")},
		},
		{
			{"unknown key", stranger, get("/v1/me")},
			{"suspended", suspended, get("/v1/me")},
			{"expired, no such path", expired, get("/v1/nothing")},
		},
		{
			{"revoked", revoked, get("/v1/me")},
			{"revoked, no such path", revoked, get("/v1/nothing")},
		},
		{
			{"unknown invite", stranger, enroll("ubi_0123456789abcdef_" + strings.Repeat("a", 32))},
			{"secret of an open invite wrong", stranger, enroll(wrongSecret(open))},
			{"secret of a used invite wrong", stranger, enroll(wrongSecret(used))},
			{"used invite", stranger, enroll(used)},
			{"withdrawn invite", stranger, enroll(withdrawn)},
		},
	}
	cluster.WaitFor(t, 10*time.Second, "the expiry", func() error {
		if time.Now().Before(soon) {
			return errors.New("not yet")
		}
		return nil
	})
	var want *apiResponse
	undecided := 0
	for _, class := range classes {
		took := make([][]time.Duration, len(class))
		for range rounds {
			for i, p := range class { // interleaved: what disturbs the machine disturbs all alike
				c := &apiClient{url: th.APIURL(1), http: th.http, signer: p.who}
				r, err := c.build(t.Context(), p.apiRequest)
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				resp, err := c.roundTrip(r)
				took[i] = append(took[i], time.Since(began))
				if err != nil {
					t.Fatalf("%s: %v", p.name, err)
				}
				if resp.undecided(http.MethodPost) { // a node without a lease says so to everybody alike
					if undecided++; undecided > rounds/10 {
						t.Fatalf("%s: %s, for the %dth time", p.name, resp, undecided)
					}
					th.WaitHealthy(30*time.Second, 1)
					continue
				}
				delete(resp.header, "Date")
				delete(resp.header, "X-Request-Id")
				if want == nil {
					want = resp
				}
				if resp.status != http.StatusUnauthorized || !bytes.Equal(resp.body, want.body) || !maps.EqualFunc(resp.header, want.header, slices.Equal) {
					t.Fatalf("%s: %s %v\nwant %s %v", p.name, resp, resp.header, want, want.header)
				}
			}
		}
		median := func(i int) time.Duration { slices.Sort(took[i]); return took[i][len(took[i])/2] }
		least, most := 0, 0
		for i := range class {
			if median(i) < median(least) {
				least = i
			}
			if median(i) > median(most) {
				most = i
			}
		}
		t.Logf("%q takes %s, %q %s", class[least].name, median(least), class[most].name, median(most))
		if median(most) > 2*median(least) {
			t.Errorf("time tells %q (%s) from %q (%s)", class[least].name, median(least), class[most].name, median(most))
		}
	}
}

// massAssignment: a document with one field more than it may have, or one
// field twice, or in other letters, changes nothing at all.
func (th *threats) massAssignment(t *testing.T) {
	mass := th.registers(t, "mass", bus.Member)
	th.api(1, mass).want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "mass"})
	th.does(t, "PUT", "/v1/rooms/mass/members/alice", dict{"role": "reader"})
	fresh := func() string { return newPerson(t, "x").key.Hex() }
	extras := dict{
		"role": "admin", "status": "active", "key": mass.key.Hex(), "sign_pub": mass.key.Hex(), "v": 2, "id": "mass", "created_by": "direct",
		"revision": 1, "expires_at": nil, "rotated_to": nil, "becomes": "active", "owner": "mass", "members": []string{"mass"}, "durable": true,
		"handle": "root", "__proto__": dict{"role": "admin"}, "constructor": dict{"prototype": dict{"role": "admin"}}, "": true,
	}
	type route struct {
		who          *person
		method, path string
		fields       dict
		known        []string // fields that the route has on top of these
		want         int
	}
	k := bus.EncryptionKey{N: 1, Public: make([]byte, bus.EncryptionKeySize), CreatedAt: time.Now().UTC().Truncate(time.Millisecond)}
	k.Signature, _ = mass.Sign(k.SignedBytes(mass.key))
	before := th.records(t, 1)
	tried := 0
	for _, r := range []route{
		{th.admin, "POST", "/v1/users", dict{"sign_pub": fresh(), "handle": "mass-new", "role": "member"}, nil, 400},
		{th.admin, "PATCH", "/v1/users/alice", dict{"handle": "mass-alice"}, []string{"role", "expires_at"}, 400},
		{th.admin, "POST", "/v1/users/alice/rotate", dict{"sign_pub": fresh()}, nil, 400},
		{mass, "POST", "/v1/users/mass/rotate", dict{"sign_pub": fresh()}, nil, 400},
		{th.admin, "POST", "/v1/invites", dict{"role": "member"}, []string{"handle", "rooms", "expires_in_seconds"}, 400},
		{newPerson(t, "new"), "POST", "/v1/enroll", dict{"token": "ubi_0123456789abcdef_" + strings.Repeat("a", 32)}, []string{"handle"}, 401},
		{mass, "POST", "/v1/rooms", dict{"room": "mass-new"}, []string{"durable", "encrypted", "description", "owner"}, 400},
		{mass, "PATCH", "/v1/rooms/mass", dict{"description": "other"}, nil, 400},
		{mass, "PUT", "/v1/rooms/mass/members/alice", dict{"role": "writer"}, nil, 400},
		{mass, "PUT", "/v1/me/encryption-key", dict{"n": 1, "public": k.Public, "created_at": k.CreatedAt, "signature": k.Signature}, nil, 400},
	} {
		base, err := json.Marshal(r.fields)
		if err != nil {
			t.Fatal(err)
		}
		add := func(name string, value any) []byte {
			v, err := json.Marshal(value)
			if err != nil {
				t.Fatal(err)
			}
			return append(bytes.TrimSuffix(bytes.Clone(base), []byte("}")), fmt.Sprintf(`,"%s":%s}`, name, v)...)
		}
		bodies := map[string][]byte{"an array around it": []byte("[" + string(base) + "]"), "two of it": append(bytes.Clone(base), base...)}
		for name, value := range extras {
			if r.fields[name] == nil && !slices.Contains(r.known, name) {
				bodies["with "+name] = add(name, value)
			}
		}
		for name, value := range r.fields {
			first, rest := name[:1], name[1:]
			for _, spelling := range []string{name, strings.ToUpper(name), strings.ToUpper(first) + rest, fmt.Sprintf(`\u%04x%s`, first[0], rest), name + " ", name + `\u0000`} {
				bodies["again as "+spelling] = add(spelling, value)
			}
			if strings.ContainsRune(name, 's') {
				bodies["with a long s in "+name] = add(strings.ReplaceAll(name, "s", "ſ"), value) // folds to s
			}
		}
		for name, body := range bodies {
			tried++
			resp, err := th.api(1, r.who).send(t.Context(), apiRequest{method: r.method, path: r.path, body: body})
			if err != nil || resp.status != r.want {
				t.Errorf("%s %s %s: %v %v, want %d", r.method, r.path, name, resp, err, r.want)
			}
		}
	}
	if after := th.records(t, 1); after != before {
		t.Errorf("records after\n%s\nbefore\n%s", after, before)
	}
	if me := th.api(2, mass).want(t, 200, "GET", "/v1/me", nil); bytes.Contains(me.body, []byte(`"n":1`)) {
		t.Errorf("the encryption key was taken: %s", me)
	}
	t.Logf("%d bodies", tried)
}

// roles: everybody may do on every route what is written here, and nothing
// else, whichever node they ask.
func (th *threats) roles(t *testing.T) {
	admin := th.registers(t, "m-admin", bus.Admin)
	owner, writer, reader := th.registers(t, "m-owner", bus.Member), th.registers(t, "m-writer", bus.Member), th.registers(t, "m-reader", bus.Member)
	outsider, removed := th.registers(t, "m-outsider", bus.Member), th.registers(t, "m-removed", bus.Member)
	suspended, stranger := th.registers(t, "m-suspended", bus.Member), newPerson(t, "m-stranger")
	for _, handle := range []string{"m-guest", "m-victim", "m-turned", "m-named"} {
		th.registers(t, handle, bus.Member)
	}
	th.does(t, "POST", "/v1/rooms", dict{"room": "matrix", "owner": "m-owner", "durable": true, "encrypted": true})
	for handle, role := range map[string]bus.RoomRole{"m-writer": bus.Writer, "m-reader": bus.Reader, "m-removed": bus.Owner, "m-suspended": bus.Owner, "m-guest": bus.Reader} {
		th.does(t, "PUT", "/v1/rooms/matrix/members/"+handle, dict{"role": role})
	}
	th.does(t, "DELETE", "/v1/rooms/matrix/members/m-removed", nil)
	th.does(t, "POST", "/v1/users/m-suspended/suspend", nil)
	var made struct{ Invite bus.InviteCreated }
	th.api(1, th.admin).want(t, http.StatusCreated, "POST", "/v1/invites", dict{"role": "member"}).decode(t, &made)

	// In the order of the columns; the last of them are those who may, for what
	// they do stays done.
	people := []*person{stranger, suspended, removed, outsider, reader, writer, owner, admin}
	fresh := func() any { return newPerson(t, "x").key.NKey() }
	doc := th.document(t)
	asked := map[string]bool{}
	// A body of the documented shape, in which no key or roster is anybody's.
	example := func(method, path string) func(*person) any {
		_, op := doc.operation(method, path)
		return func(p *person) any { return json.RawMessage(exampleBody(t, op, p)) }
	}
	file := func(*person) any { return json.RawMessage(`"a file"`) }
	for _, row := range []struct {
		method, path string
		body         func(p *person) any
		want         [8]int // stranger, suspended, removed, outsider, reader, writer, owner, admin
	}{
		{"GET", "/v1/me", nil, [8]int{401, 401, 200, 200, 200, 200, 200, 200}},
		{"PUT", "/v1/me/encryption-key", encryptionKeyOf, [8]int{401, 401, 200, 200, 200, 200, 200, 200}},
		{"POST", "/v1/users", func(p *person) any {
			return dict{"sign_pub": fresh(), "handle": p.name + "-friend", "role": "admin"}
		}, [8]int{401, 401, 403, 403, 403, 403, 403, 201}},
		{"GET", "/v1/users", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"GET", "/v1/users/m-reader", nil, [8]int{401, 401, 200, 200, 200, 200, 200, 200}},
		{"GET", "/v1/users/m-suspended", nil, [8]int{401, 401, 404, 404, 404, 404, 404, 200}},
		{"GET", "/v1/users/m-guest/access", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"GET", "/v1/connections", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"GET", "/v1/users/m-guest/connections", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"DELETE", "/v1/users/m-guest/connections", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"PATCH", "/v1/users/m-named", func(*person) any { return dict{"role": "admin"} }, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"POST", "/v1/users/m-turned/rotate", func(*person) any { return dict{"sign_pub": fresh()} }, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"POST", "/v1/users/m-victim/suspend", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"POST", "/v1/users/m-victim/resume", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"POST", "/v1/users/m-victim/revoke", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"POST", "/v1/invites", func(*person) any { return dict{"role": "admin"} }, [8]int{401, 401, 403, 403, 403, 403, 403, 201}},
		{"GET", "/v1/invites", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"DELETE", "/v1/invites/" + made.Invite.ID, nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"POST", "/v1/enroll", func(*person) any { return dict{"token": made.Invite.Token, "handle": "m-again"} }, [8]int{401, 401, 401, 401, 401, 401, 401, 401}},
		{"POST", "/v1/rooms", func(p *person) any { return dict{"room": p.name + "-own"} }, [8]int{401, 401, 201, 201, 201, 201, 201, 201}},
		{"POST", "/v1/rooms", func(p *person) any { return dict{"room": p.name + "-given", "owner": "m-guest"} }, [8]int{401, 401, 403, 403, 403, 403, 403, 201}},
		{"GET", "/v1/rooms", nil, [8]int{401, 401, 200, 200, 200, 200, 200, 200}},
		{"GET", "/v1/rooms?all=true", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"GET", "/v1/rooms/matrix", nil, [8]int{401, 401, 404, 404, 200, 200, 200, 200}},
		{"GET", "/v1/rooms/matrix/members", nil, [8]int{401, 401, 404, 404, 200, 200, 200, 200}},
		// Who is no member sees nothing of what is said in a room, an admin included,
		// who sees for whom there are keys.
		{"GET", "/v1/rooms/matrix/messages", nil, [8]int{401, 401, 404, 404, 200, 200, 200, 404}},
		{"GET", "/v1/rooms/matrix/keys", nil, [8]int{401, 401, 404, 404, 200, 200, 200, 200}},
		{"GET", "/v1/rooms/matrix/encryption-keys", nil, [8]int{401, 401, 404, 404, 200, 200, 200, 200}},
		{"PUT", "/v1/rooms/matrix/keys/m-guest", example("PUT", "/v1/rooms/matrix/keys/m-guest"), [8]int{401, 401, 404, 404, 403, 403, 409, 403}},
		{"POST", "/v1/rooms/matrix/epochs", example("POST", "/v1/rooms/matrix/epochs"), [8]int{401, 401, 400, 400, 400, 400, 400, 400}}, // no roster: whose room, is not asked
		{"GET", "/v1/rooms/matrix/blobs", nil, [8]int{401, 401, 404, 404, 200, 200, 200, 404}},
		{"PUT", "/v1/rooms/matrix/blobs/notes", file, [8]int{401, 401, 404, 404, 403, 201, 200, 404}},
		{"GET", "/v1/rooms/matrix/blobs/notes", nil, [8]int{401, 401, 404, 404, 200, 200, 200, 404}},
		{"DELETE", "/v1/rooms/matrix/blobs/notes", nil, [8]int{401, 401, 404, 404, 403, 200, 200, 404}},
		{"PATCH", "/v1/rooms/matrix", func(p *person) any { return dict{"description": p.name} }, [8]int{401, 401, 404, 404, 403, 403, 200, 200}},
		{"PUT", "/v1/rooms/matrix/members/m-guest", func(*person) any { return dict{"role": "writer"} }, [8]int{401, 401, 404, 404, 403, 403, 200, 200}},
		{"PUT", "/v1/rooms/matrix/members/ME", func(*person) any { return dict{"role": "owner"} }, [8]int{401, 401, 404, 404, 403, 403, 200, 200}},
		{"DELETE", "/v1/rooms/matrix/members/m-guest", nil, [8]int{401, 401, 404, 404, 403, 403, 200, 200}},
		{"DELETE", "/v1/rooms/matrix/members/m-owner", nil, [8]int{401, 401, 404, 404, 403, 403, 0, 0}},
		{"DELETE", "/v1/rooms/matrix/members/m-suspended", nil, [8]int{401, 401, 404, 404, 403, 403, 200, 200}},
		{"GET", "/v1/audit", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"GET", "/v1/audit/verify", nil, [8]int{401, 401, 403, 403, 403, 403, 403, 200}},
		{"DELETE", "/v1/rooms/matrix", nil, [8]int{401, 401, 404, 404, 403, 403, 200, 200}},
	} {
		if _, op := doc.operation(row.method, row.path); op != nil {
			asked[op["operationId"].(string)] = true
		}
		for i, p := range people {
			if row.want[i] == 0 {
				continue
			}
			var body any
			if row.body != nil {
				body = row.body(p)
			}
			path := strings.ReplaceAll(row.path, "ME", p.key.NKey())
			if r := th.api(1+i%3, p).answered(t, row.method, path, body); r.status != row.want[i] {
				t.Errorf("%s %s by %s: %s, want %d", row.method, path, p.name, r, row.want[i])
			}
		}
	}
	for path, item := range doc.raw["paths"].(map[string]any) {
		for method, op := range item.(map[string]any) {
			if id := op.(map[string]any)["operationId"].(string); strings.HasPrefix(path, "/v1/") && !asked[id] {
				t.Errorf("%s %s is not in the matrix", method, path)
			}
		}
	}
}

func encryptionKeyOf(p *person) any {
	k := bus.EncryptionKey{N: 1, Public: make([]byte, bus.EncryptionKeySize), CreatedAt: time.Now().UTC().Truncate(time.Millisecond)}
	k.Signature, _ = p.Sign(k.SignedBytes(p.key))
	return k
}

// inviteAgain: an invite gives what it gives once. Who was removed from the
// room that they were invited into, or whose inviter is an admin no more, gets
// nothing from repeating the call.
func (th *threats) inviteAgain(t *testing.T) {
	th.does(t, "POST", "/v1/rooms", dict{"room": "invited"})
	host := th.registers(t, "i-host", bus.Admin)
	guest := newPerson(t, "i-guest")
	var made, late struct{ Invite bus.InviteCreated }
	th.api(2, host).want(t, http.StatusCreated, "POST", "/v1/invites", dict{"role": "member", "rooms": []dict{{"room": "invited", "role": "owner"}}}).decode(t, &made)
	th.api(2, host).want(t, http.StatusCreated, "POST", "/v1/invites", dict{"role": "admin"}).decode(t, &late)
	enroll := func(want int) {
		t.Helper()
		th.api(3, guest).want(t, want, "POST", "/v1/enroll", dict{"token": made.Invite.Token, "handle": "i-guest"})
	}
	enroll(http.StatusCreated)
	th.api(1, guest).want(t, 200, "GET", "/v1/rooms/invited", nil)
	th.does(t, "PUT", "/v1/rooms/invited/members/i-guest", dict{"role": "reader"})
	enroll(http.StatusOK)
	if r := th.api(1, guest).do(t, "PATCH", "/v1/rooms/invited", dict{"description": "mine again"}); r.status != http.StatusForbidden {
		t.Errorf("repeating the invite gave the role back: %s", r)
	}
	th.does(t, "DELETE", "/v1/rooms/invited/members/i-guest", nil)
	enroll(http.StatusOK)
	if r := th.api(1, guest).do(t, "GET", "/v1/rooms/invited", nil); r.status != http.StatusNotFound {
		t.Errorf("repeating the invite led back into the room: %s", r)
	}
	th.does(t, "PATCH", "/v1/users/i-host", dict{"role": "member"})
	th.api(1, newPerson(t, "i-late")).want(t, http.StatusUnauthorized, "POST", "/v1/enroll", dict{"token": late.Invite.Token, "handle": "i-late"})
	th.does(t, "POST", "/v1/users/i-guest/revoke", nil)
	enroll(http.StatusUnauthorized)
}

// revokedCallers: once the call that takes access away has returned, nobody
// gets through on any route of any node, also who was asking all the time.
func (th *threats) revokedCallers(t *testing.T) {
	doc := th.document(t)
	type route struct{ method, path string }
	var routes []route
	for template, item := range doc.raw["paths"].(map[string]any) {
		for method := range item.(map[string]any) {
			if strings.HasPrefix(template, "/v1/") {
				path := strings.NewReplacer("{user}", "alice", "{room}", "ops", "{id}", "0123456789abcdef").Replace(template)
				routes = append(routes, route{strings.ToUpper(method), path})
			}
		}
	}
	everywhere := func(what string, p *person, want int, routes []route) {
		var all sync.WaitGroup
		for _, i := range th.Nodes() {
			for _, r := range routes {
				all.Go(func() {
					resp, err := th.api(i, p).send(t.Context(), apiRequest{method: r.method, path: r.path})
					if err != nil || resp.status != want {
						t.Errorf("%s, then %s %s on n%d: %v %v", what, r.method, r.path, i, resp, err)
					}
				})
			}
		}
		all.Wait()
	}
	for n, verb := range []string{"revoke", "suspend", "demote", "rotate", "expire"} {
		handle := "r-" + verb
		p := th.registers(t, handle, bus.Admin)
		// knocks on every node without a pause, and remembers the newest
		// question that was answered with yes.
		var last atomic.Int64
		stop := make(chan struct{})
		var knocking sync.WaitGroup
		for _, i := range th.Nodes() {
			knocking.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					began := time.Now()
					if r, err := th.api(i, p).send(t.Context(), apiRequest{method: "GET", path: "/v1/invites"}); err == nil && r.status == 200 {
						for old := last.Load(); old < began.UnixNano() && !last.CompareAndSwap(old, began.UnixNano()); old = last.Load() {
						}
					}
				}
			})
		}
		cluster.WaitFor(t, 10*time.Second, handle+" to be let in", func() error {
			if last.Load() == 0 {
				return errors.New("not yet")
			}
			return nil
		})
		over := time.Time{}
		by := th.api(1+n%3, th.admin)
		switch verb {
		case "demote":
			by.want(t, 200, "PATCH", "/v1/users/"+handle, dict{"role": "member"})
		case "rotate":
			by.want(t, 200, "POST", "/v1/users/"+handle+"/rotate", dict{"sign_pub": newPerson(t, "next").key.Hex()})
		case "expire":
			over = time.Now().Add(time.Second)
			by.want(t, 200, "PATCH", "/v1/users/"+handle, dict{"expires_at": over.UTC()})
			cluster.WaitFor(t, 5*time.Second, "the expiry", func() error {
				if time.Now().Before(over) {
					return errors.New("not yet")
				}
				return nil
			})
		default:
			by.want(t, 200, "POST", "/v1/users/"+handle+"/"+verb, nil)
		}
		if over.IsZero() {
			over = time.Now()
		}
		if verb == "demote" {
			everywhere(verb, p, http.StatusForbidden, []route{
				{"GET", "/v1/users"}, {"GET", "/v1/invites"}, {"GET", "/v1/audit"}, {"POST", "/v1/users/alice/revoke"}, {"DELETE", "/v1/invites/0123456789abcdef"},
			})
			everywhere(verb, p, http.StatusNotFound, []route{{"DELETE", "/v1/rooms/ops"}, {"GET", "/v1/rooms/ops"}})
		} else {
			everywhere(verb, p, http.StatusUnauthorized, routes)
		}
		close(stop)
		knocking.Wait()
		if ahead := time.Duration(last.Load() - over.UnixNano()); ahead > 0 {
			t.Errorf("%s: a request begun %s after it was done was served", verb, ahead)
		}
	}
}

// forgedLogLines: whatever a stranger, a member or an admin sends, every line
// of the log is one that the service wrote.
func (th *threats) forgedLogLines(t *testing.T) {
	const forged = "level=ERROR msg=forged"
	line := "x\ntime=2026-01-01T00:00:00Z " + forged
	ansi := "\x1b[2J\x1b[31m" + forged
	root := th.api(1, th.admin)
	for _, text := range []string{line, "x\r\n" + forged, ansi, "\u2028" + forged, "\u0085" + forged, `" ` + forged + ` x="`} {
		for path, body := range map[string]any{
			"/v1/users":  dict{"sign_pub": newPerson(t, "x").key.Hex(), "handle": text, "role": "member"},
			"/v1/rooms":  dict{"room": text, "description": text},
			"/v1/enroll": dict{"token": text, "handle": text},
			"/v1/rooms/" + strings.ReplaceAll(url.PathEscape(forged), "%20", "+"): nil,
		} {
			if r, err := root.send(t.Context(), apiRequest{method: "POST", path: path, body: mustJSON(t, body), header: http.Header{"User-Agent": {`" ` + forged}}}); err != nil || r.status < 400 || r.status > 499 {
				t.Errorf("POST %s with %q: %v %v", path, text, r, err)
			}
		}
	}
	// By hand: no client library sends these.
	for _, raw := range []string{
		"GET /v1/me HTTP/1.1\r\nHost: x\r\nConnection: close\r\nUser-Agent: " + ansi + "\r\n\r\n",
		"GET /v1/" + ansi + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /v1/%0atime=2026-01-01T00:00:00Z%20" + strings.ReplaceAll(forged, " ", "%20") + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
		"GET /" + strings.ReplaceAll(forged, " ", "%20") + " HTTP/1.1\r\nHost: " + strings.ReplaceAll(forged, " ", "_") + "\r\n\r\n",
		strings.ReplaceAll(forged, " ", "") + " /v1/me HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
		"GET /v1/me HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: " + forged + "\r\nX-Forwarded-For: " + forged + "\r\nSignature-Input: ub1=" + forged + "\r\n\r\n",
		forged + "\n\n",
	} {
		_ = th.raw(t, 1, raw)
	}
	form := regexp.MustCompile(`^time=\d{4}-\d\d-\d\dT[0-9:.+Z-]+ level=(DEBUG|INFO|WARN|ERROR) msg=("[a-zA-Z]|[a-zA-Z])`)
	for _, i := range th.Nodes() {
		log, err := os.ReadFile(th.LogFile(i, cluster.Membership))
		if err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(string(log)) {
			l = strings.TrimSuffix(l, "\n")
			if !form.MatchString(l) || strings.ContainsFunc(l, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' }) ||
				strings.Contains(l, forged) && forgedLine.MatchString(l) {
				t.Errorf("n%d logged %q", i, l)
			}
		}
	}
}

// forgedLine is a line with the forged words outside of quotes.
var forgedLine = regexp.MustCompile(`^(?:[^"]|"(?:[^"\\]|\\.)*")*level=ERROR msg=forged`)

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	if v == nil {
		return nil
	}
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// greedyClients: who sends slowly, much, or nothing at all is cut off in time,
// and others do not notice.
func (th *threats) greedyClients(t *testing.T) {
	idle := 300
	if full {
		idle = 1000
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dial := func() *tls.Conn {
		d := tls.Dialer{Config: th.trust}
		c, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(th.APIURL(1), "https://"))
		if err != nil {
			t.Errorf("dial: %v", err)
			return nil
		}
		return c.(*tls.Conn)
	}
	var greedy sync.WaitGroup
	// ends sends first, then, unless that is nothing, one byte every 200 ms, and
	// wants to be cut off.
	ends := func(name, first string, within time.Duration) {
		greedy.Go(func() {
			c := dial()
			if c == nil {
				return
			}
			defer func() { _ = c.Close() }()
			began := time.Now()
			_, err := io.WriteString(c, first)
			gone := make(chan struct{})
			go func() { defer close(gone); _, _ = io.Copy(io.Discard, c) }()
			tick := time.NewTicker(200 * time.Millisecond)
			defer tick.Stop()
			for err == nil {
				select {
				case <-gone:
					err = io.EOF
				case <-tick.C:
					if first != "" {
						_, err = io.WriteString(c, "x")
					}
				case <-ctx.Done():
					err = ctx.Err()
				}
			}
			if took := time.Since(began); took > within+5*time.Second {
				t.Errorf("%s: cut off after %s only", name, took.Round(time.Millisecond))
			}
		})
	}
	for range 10 {
		ends("slow header", "GET /v1/me HTTP/1.1\r\nHost: x\r\nX-Slow: ", 5*time.Second)
		ends("slow body", "POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n", 10*time.Second)
		ends("slow chunks", "POST /v1/users HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n", 10*time.Second)
		ends("nothing at all", "", 5*time.Second)
	}
	// Connections that have not even shaken hands.
	for range idle {
		greedy.Go(func() {
			c, err := net.Dial("tcp", strings.TrimPrefix(th.APIURL(1), "https://"))
			if err != nil {
				t.Errorf("dial: %v", err)
				return
			}
			defer func() { _ = c.Close() }()
			began := time.Now()
			_ = c.SetReadDeadline(began.Add(30 * time.Second))
			if _, err = c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("a connection that says nothing stays open for 30 s")
			}
		})
	}
	huge := th.raw(t, 1, "GET /v1/me HTTP/1.1\r\nHost: x\r\nX-Huge: "+strings.Repeat("x", 64<<10)+"\r\n\r\n")
	if !strings.HasPrefix(huge, "HTTP/1.1 431") {
		t.Errorf("a header of 64 KiB: %.60q", huge)
	}
	for size, want := range map[int]int{sig.MaxBody: 400, sig.MaxBody + 1: 401} {
		r := apiRequest{method: "POST", path: "/v1/users", body: bytes.Repeat([]byte(" "), min(size, sig.MaxBody))}
		if size > sig.MaxBody { // Sign would refuse it
			r.edit = func(q *http.Request) {
				q.Body, q.ContentLength = io.NopCloser(bytes.NewReader(make([]byte, size))), int64(size)
				q.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(make([]byte, size))), nil }
			}
		}
		if resp, err := th.api(1, th.admin).send(t.Context(), r); err != nil || resp.status != want {
			t.Errorf("a body of %d bytes: %v %v, want %d", size, resp, err, want)
		}
	}

	done := make(chan struct{})
	go func() { greedy.Wait(); close(done) }()
	var slowest time.Duration
	served := 0
	for others := true; others; served++ {
		select {
		case <-done:
			others = false
		case <-time.After(50 * time.Millisecond):
		}
		began := time.Now()
		if r := th.api(1, th.bob).do(t, "GET", "/v1/me", nil); r.status != 200 {
			t.Fatalf("bob beside greedy clients: %s", r)
		}
		slowest = max(slowest, time.Since(began))
	}
	t.Logf("%d requests of bob meanwhile, the slowest took %s", served, slowest.Round(time.Millisecond))
	if slowest > 3*time.Second {
		t.Errorf("bob waited %s", slowest)
	}
}

// tooMany: who asks too often is told to wait, by key and by address, and
// nobody else is.
func (th *threats) tooMany(t *testing.T) {
	for k, v := range map[string]string{"UNIBUS_RATE_KEY": "2:10", "UNIBUS_RATE_ADDRESS": "10:60"} {
		th.SetEnv(3, cluster.Membership, k, v)
	}
	th.Term(3, cluster.Membership)
	th.StartNode(3, cluster.Membership)
	th.WaitHealthy(time.Minute, 3)
	count := func(c *apiClient, n, want int) (limited int) {
		t.Helper()
		for range n {
			r := c.do(t, "GET", "/v1/me", nil)
			switch r.status {
			case want:
			case http.StatusTooManyRequests:
				if s := r.header.Get("Retry-After"); s != "1" || r.code() != bus.Unavailable {
					t.Errorf("429 with Retry-After %q: %s", s, r)
				}
				limited++
			default:
				t.Fatal(r)
			}
		}
		return limited
	}
	if n := count(th.api(3, th.alice), 20, 200); n == 0 {
		t.Error("20 requests of one key at once, and 10 are allowed")
	}
	if n := count(th.api(3, th.bob), 5, 200); n != 0 {
		t.Error("bob has to wait for what alice did")
	}
	from := func(address string, p *person) *apiClient {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
		c := th.api(3, p)
		c.http = &http.Client{Transport: &http.Transport{TLSClientConfig: th.trust.Clone(), DialContext: d.DialContext}, Timeout: 20 * time.Second}
		t.Cleanup(c.http.CloseIdleConnections)
		return c
	}
	if n := count(from("127.0.0.2", nil), 400, 401); n == 0 {
		t.Error("400 requests of one address at once, and 60 are allowed")
	}
	if n := count(from("127.0.0.3", th.admin), 5, 200); n != 0 {
		t.Error("another address has to wait, too")
	}
}
