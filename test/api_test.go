package test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
	"unibus.internal/test/cluster"
)

// TestAPI asks a live cluster everything that the API offers. Every answer is
// held against the document that the node itself serves.
func TestAPI(t *testing.T) {
	t.Parallel()
	a := newAPIWorld(t, cluster.Options{})
	for _, s := range []struct {
		name string
		test func(*testing.T)
	}{
		{"users", a.users},
		{"invites", a.invites},
		{"rooms", a.rooms},
		{"keys", a.keys},
		{"files", a.files},
		{"rotate", a.rotate},
		{"audit", a.audit},
		{"connections", a.connections},
		{"pages", a.pages},
		{"a crowd", a.crowd},
		{"if-match", a.ifMatch},
		{"who may", a.whoMay},
		{"strict requests", a.strictRequests},
		{"one 401", a.one401},
		{"HTTP/2", a.http2},
		{"limits", a.limits},
		{"every route was asked", a.complete},
	} {
		if !t.Run(s.name, s.test) {
			t.FailNow()
		}
	}
}

// apiWorld is a cluster with the people of the tests of the API.
type apiWorld struct {
	*world
	doc   *apiDocument
	alice *person // member
	bob   *person // member
	root  *checkedClient
}

func newAPIWorld(t *testing.T, o cluster.Options) *apiWorld {
	t.Helper()
	w := newWorld(t, o)
	a := &apiWorld{world: w, doc: w.document(t)}
	a.root = a.as(a.admin)
	a.alice, a.bob = a.add(t, "alice"), a.add(t, "bob")
	return a
}

// crowd: very many changes that exclude each other, all at once, all take
// effect. A user's rooms are one table, of which each compare-and-set wants the
// newest state.
func (a *apiWorld) crowd(t *testing.T) {
	var asking sync.WaitGroup
	for n := range 190 { // as many as one key may ask for at once
		asking.Go(func() {
			body, _ := json.Marshal(dict{"room": fmt.Sprintf("crowd-%d", n), "owner": "bob"})
			r, err := a.api(1, a.admin).send(t.Context(), apiRequest{method: "POST", path: "/v1/rooms", body: body})
			if err != nil || r.status != http.StatusCreated {
				t.Errorf("room %d: %v %v", n, r, err)
			}
		})
	}
	asking.Wait()
}

// as is a client of node 1 whose answers are checked against the document.
func (a *apiWorld) as(p *person) *checkedClient { return &checkedClient{a.api(1, p), a.doc} }

func (a *apiWorld) add(t *testing.T, handle string) *person {
	t.Helper()
	p := newPerson(t, handle)
	c := a.root.want(t, http.StatusCreated, "POST", "/v1/users", dict{"sign_pub": p.key.NKey(), "handle": handle, "role": "member"}).change(t)
	if !c.Verified || c.Revision == 0 || c.Already {
		t.Fatalf("add %s: %+v", handle, c)
	}
	return p
}

// apiDocument is /openapi.json, and which of its operations were answered how.
type apiDocument struct {
	raw    map[string]any
	schema *jsonschema.Compiler
	seen   map[string]bool // operationId
}

const documentURL = "https://unibus.internal/openapi.json"

func (w *world) document(t *testing.T) *apiDocument {
	t.Helper()
	resp := w.api(1, nil).want(t, http.StatusOK, "GET", "/openapi.json", nil)
	parsed, err := jsonschema.UnmarshalJSON(bytes.NewReader(resp.body))
	if err != nil {
		t.Fatal(err)
	}
	d := &apiDocument{raw: parsed.(map[string]any), schema: jsonschema.NewCompiler(), seen: map[string]bool{}}
	d.schema.DefaultDraft(jsonschema.Draft2020)
	d.schema.AssertFormat()
	if err := d.schema.AddResource(documentURL, parsed); err != nil {
		t.Fatal(err)
	}
	return d
}

// operation finds the documented operation of a request, and its template.
func (d *apiDocument) operation(method, path string) (template string, op map[string]any) {
	path, _, _ = strings.Cut(path, "?")
	for template, item := range d.raw["paths"].(map[string]any) {
		form := "^" + regexp.MustCompile(`\{[a-z]+\}`).ReplaceAllString(template, "[^/]+") + "$"
		op, ok := item.(map[string]any)[strings.ToLower(method)].(map[string]any)
		exact := template == path
		if ok && (exact || regexp.MustCompile(form).MatchString(path) && d.raw["paths"].(map[string]any)[path] == nil) {
			return template, op
		}
	}
	return "", nil
}

// check holds an answer against the document.
func (d *apiDocument) check(method, path string, r *apiResponse) error {
	template, op := d.operation(method, path)
	if op == nil {
		return nil // nothing is promised of what is not there
	}
	status := fmt.Sprint(r.status)
	documented, ok := op["responses"].(map[string]any)[status].(map[string]any)
	if !ok {
		return fmt.Errorf("status %s is not documented", status)
	}
	d.seen[op["operationId"].(string)] = d.seen[op["operationId"].(string)] || r.status < 300
	location := "#/paths/" + pointer(template) + "/" + strings.ToLower(method) + "/responses/" + status
	if ref, ok := documented["$ref"].(string); ok {
		location = ref
	}
	kind := r.header.Get("Content-Type")
	schema, err := d.schema.Compile(documentURL + location + "/content/" + pointer(kind) + "/schema")
	if err != nil {
		return fmt.Errorf("content type %q is not documented: %w", kind, err)
	}
	if strings.HasPrefix(template, "/v1/") && r.header.Get("X-Request-Id") == "" {
		return fmt.Errorf("no X-Request-Id")
	}
	if kind == "application/octet-stream" {
		return nil
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(r.body))
	if err != nil {
		return err
	}
	return schema.Validate(value)
}

func pointer(s string) string {
	s = strings.ReplaceAll(strings.ReplaceAll(s, "~", "~0"), "/", "~1")
	return strings.NewReplacer("{", "%7B", "}", "%7D", "+", "%2B").Replace(s)
}

// checkedClient is an apiClient that believes no answer which the document
// does not describe.
type checkedClient struct {
	*apiClient
	doc *apiDocument
}

func (c *checkedClient) do(t testing.TB, method, path string, body any) *apiResponse {
	t.Helper()
	r := c.apiClient.do(t, method, path, body)
	if err := c.doc.check(method, path, r); err != nil {
		t.Errorf("%s %s answered %s\nwhich is not documented: %v", method, path, r, err)
	}
	return r
}

func (c *checkedClient) want(t testing.TB, status int, method, path string, body any) *apiResponse {
	t.Helper()
	r := c.do(t, method, path, body)
	if r.status != status {
		t.Fatalf("%s %s: %s, want %d", method, path, r, status)
	}
	return r
}

// changes asks for a change and wants it proven.
func (c *checkedClient) changes(t testing.TB, method, path string, body any) bus.Change {
	t.Helper()
	ch := c.want(t, http.StatusOK, method, path, body).change(t)
	if !ch.Verified || ch.Revision == 0 {
		t.Fatalf("%s %s: %+v", method, path, ch)
	}
	return ch
}

// Every action on a user does what it says, shows it, and says already the
// second time.
func (a *apiWorld) users(t *testing.T) {
	var out struct{ User bus.UserDetail }
	a.as(a.alice).want(t, 200, "GET", "/v1/me", nil).decode(t, &out)
	if me := out.User; me.SignPub != a.alice.key || me.Handle != "alice" || me.Role != bus.Member || me.Rooms == nil {
		t.Errorf("me: %+v", me)
	}
	again := a.root.want(t, http.StatusConflict, "POST", "/v1/users", dict{"sign_pub": a.alice.key.Hex(), "handle": "other", "role": "admin"})
	if !strings.Contains(again.String(), "already registered") {
		t.Errorf("add again: %s", again)
	}

	carol := a.add(t, "carol")
	state := func(want bus.Status) {
		t.Helper()
		var out struct{ User bus.UserDetail }
		a.root.want(t, 200, "GET", "/v1/users/carol", nil).decode(t, &out)
		if out.User.Status != want {
			t.Errorf("carol is %s, want %s", out.User.Status, want)
		}
	}
	for _, step := range []struct {
		verb string
		then bus.Status
	}{{"suspend", bus.Suspended}, {"resume", bus.Active}, {"revoke", bus.Revoked}} {
		if c := a.root.changes(t, "POST", "/v1/users/carol/"+step.verb, nil); c.Already {
			t.Errorf("%s: %+v", step.verb, c)
		}
		state(step.then)
		if c := a.root.changes(t, "POST", "/v1/users/"+carol.key.Hex()+"/"+step.verb, nil); !c.Already || !strings.HasPrefix(c.What, "already_") {
			t.Errorf("%s again: %+v", step.verb, c)
		}
	}
	a.as(carol).want(t, http.StatusUnauthorized, "GET", "/v1/me", nil)

	dave := a.add(t, "dave")
	a.root.changes(t, "PATCH", "/v1/users/dave", dict{"handle": "david", "role": "admin", "expires_at": time.Now().Add(time.Hour).UTC()})
	a.as(dave).want(t, 200, "GET", "/v1/users", nil)
	a.root.changes(t, "PATCH", "/v1/users/david", dict{"role": "member", "expires_at": nil})
	a.root.want(t, 200, "GET", "/v1/users/david", nil).decode(t, &out)
	if out.User.Role != bus.Member || out.User.ExpiresAt != nil {
		t.Errorf("david: %+v", out.User)
	}

	k := bus.EncryptionKey{N: 1, Public: make([]byte, bus.EncryptionKeySize), CreatedAt: time.Now().UTC().Truncate(time.Millisecond)}
	k.Signature, _ = a.alice.Sign(k.SignedBytes(a.alice.key))
	a.as(a.alice).changes(t, "PUT", "/v1/me/encryption-key", k)
	a.as(a.bob).want(t, http.StatusBadRequest, "PUT", "/v1/me/encryption-key", k) // not signed by bob
	a.as(a.bob).want(t, 200, "GET", "/v1/users/alice", nil).decode(t, &out)
	if out.User.EncryptionKey == nil || !bytes.Equal(out.User.EncryptionKey.Public, k.Public) {
		t.Errorf("bob does not see alice's key: %+v", out.User)
	}
	var x struct{ Access bus.AccessInfo }
	a.as(a.alice).want(t, 200, "GET", "/v1/users/alice/access", nil).decode(t, &x)
	if !x.Access.Admitted || len(x.Access.Subscribe) == 0 {
		t.Errorf("access: %+v", x)
	}
}

// An invite makes a user once, of the key that redeems it.
func (a *apiWorld) invites(t *testing.T) {
	a.root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "welcome"})
	invite := func(body dict) (made struct{ Invite bus.InviteCreated }) {
		a.root.want(t, http.StatusCreated, "POST", "/v1/invites", body).decode(t, &made)
		return made
	}
	made := invite(dict{"role": "member", "rooms": []dict{{"room": "welcome", "role": "reader"}}, "expires_in_seconds": 3600})
	eve := newPerson(t, "eve")
	a.as(eve).want(t, http.StatusUnauthorized, "GET", "/v1/me", nil)
	a.as(eve).want(t, http.StatusBadRequest, "POST", "/v1/enroll", dict{"token": made.Invite.Token, "handle": "Eve!"})
	c := a.as(eve).want(t, http.StatusCreated, "POST", "/v1/enroll", dict{"token": made.Invite.Token, "handle": "eve"}).change(t)
	if !c.Verified {
		t.Errorf("enroll: %+v", c)
	}
	if c := a.as(eve).changes(t, "POST", "/v1/enroll", dict{"token": made.Invite.Token, "handle": "eve"}); !c.Already {
		t.Errorf("enroll again: %+v", c)
	}
	a.as(newPerson(t, "late")).want(t, http.StatusUnauthorized, "POST", "/v1/enroll", dict{"token": made.Invite.Token, "handle": "late"})
	a.as(eve).want(t, 200, "GET", "/v1/rooms/welcome", nil)

	gone := invite(dict{"role": "member"})
	var w struct {
		Invite  bus.InviteInfo
		Already bool
	}
	for _, already := range []bool{false, true} {
		a.root.want(t, 200, "DELETE", "/v1/invites/"+gone.Invite.ID, nil).decode(t, &w)
		if w.Already != already || w.Invite.Status != bus.InviteWithdrawn {
			t.Errorf("withdraw: %+v", w)
		}
	}
	a.as(newPerson(t, "late")).want(t, http.StatusUnauthorized, "POST", "/v1/enroll", dict{"token": gone.Invite.Token, "handle": "late"})
	a.root.want(t, http.StatusConflict, "DELETE", "/v1/invites/"+made.Invite.ID, nil)
	a.root.want(t, http.StatusNotFound, "DELETE", "/v1/invites/0123456789abcdef", nil)
	list := a.root.want(t, 200, "GET", "/v1/invites", nil)
	if !bytes.Contains(list.body, []byte(made.Invite.ID)) || bytes.Contains(list.body, []byte("ubi_")) {
		t.Errorf("invites: %s", list)
	}
}

// A room lives from its making to its archive, and members come and go.
func (a *apiWorld) rooms(t *testing.T) {
	alice, bob := a.as(a.alice), a.as(a.bob)
	c := alice.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "ops", "description": "what happens"}).change(t)
	if !c.Verified {
		t.Errorf("create: %+v", c)
	}
	alice.want(t, http.StatusConflict, "POST", "/v1/rooms", dict{"room": "ops"})
	bob.want(t, http.StatusNotFound, "GET", "/v1/rooms/ops", nil)
	alice.want(t, http.StatusConflict, "GET", "/v1/rooms/ops/messages", nil)
	bob.want(t, http.StatusNotFound, "GET", "/v1/rooms/ops/messages", nil)
	alice.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "minutes", "durable": true, "retention": dict{"max_age_seconds": 3600, "max_bytes": 0, "max_messages": 10}})
	alice.want(t, http.StatusOK, "GET", "/v1/rooms/minutes/messages", nil)
	alice.changes(t, "PUT", "/v1/rooms/ops/members/bob", dict{"role": "reader"})
	if c := alice.changes(t, "PUT", "/v1/rooms/ops/members/"+a.bob.key.NKey(), dict{"role": "reader"}); !c.Already {
		t.Errorf("add again: %+v", c)
	}
	var room struct {
		Room struct {
			Room        bus.RoomID
			Description string
			Members     []bus.MemberInfo
		}
	}
	bob.want(t, 200, "GET", "/v1/rooms/ops", nil).decode(t, &room)
	if room.Room.Room != "ops" || len(room.Room.Members) != 2 || room.Room.Description != "what happens" {
		t.Errorf("room: %+v", room)
	}
	bob.want(t, http.StatusForbidden, "PATCH", "/v1/rooms/ops", dict{"description": "mine"})
	alice.changes(t, "PATCH", "/v1/rooms/ops", dict{"description": "what happened"})
	bob.changes(t, "DELETE", "/v1/rooms/ops/members/bob", nil)
	if c := bob.changes(t, "DELETE", "/v1/rooms/ops/members/bob", nil); !c.Already {
		t.Errorf("leave again: %+v", c)
	}
	bob.want(t, http.StatusNotFound, "GET", "/v1/rooms/ops/members", nil)
	var members struct{ Members []bus.MemberInfo }
	alice.want(t, 200, "GET", "/v1/rooms/ops/members?all=true", nil).decode(t, &members)
	if len(members.Members) != 2 {
		t.Errorf("all members: %+v", members)
	}
	var rooms struct{ Rooms []bus.RoomInfo }
	alice.want(t, 200, "GET", "/v1/rooms", nil).decode(t, &rooms)
	if len(rooms.Rooms) != 2 {
		t.Errorf("alice's rooms: %+v", rooms)
	}
	a.root.want(t, 200, "GET", "/v1/rooms?all=true", nil).decode(t, &rooms)
	if len(rooms.Rooms) != 3 {
		t.Errorf("all rooms: %+v", rooms)
	}
	alice.changes(t, "DELETE", "/v1/rooms/ops", nil)
	if c := alice.changes(t, "DELETE", "/v1/rooms/ops", nil); !c.Already {
		t.Errorf("archive again: %+v", c)
	}
	alice.want(t, http.StatusConflict, "PUT", "/v1/rooms/ops/members/bob", dict{"role": "reader"})
	a.root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "given", "owner": "bob"})
	bob.want(t, http.StatusForbidden, "POST", "/v1/rooms", dict{"room": "not-mine", "owner": "alice"})
	bob.changes(t, "PUT", "/v1/rooms/given/members/alice", dict{"role": "owner"})
}

// Users may give themselves a new key, all steps of it, although the old one
// ends half-way.
func (a *apiWorld) rotate(t *testing.T) {
	old := a.add(t, "frank")
	a.root.changes(t, "PUT", "/v1/rooms/welcome/members/frank", dict{"role": "writer"})
	next := newPerson(t, "frank")
	a.as(a.alice).want(t, http.StatusForbidden, "POST", "/v1/users/frank/rotate", dict{"sign_pub": next.key.NKey()})
	a.as(old).changes(t, "POST", "/v1/users/frank/rotate", dict{"sign_pub": next.key.NKey()})
	a.as(old).want(t, http.StatusUnauthorized, "GET", "/v1/me", nil)
	var out struct{ User bus.UserDetail }
	a.as(next).want(t, 200, "GET", "/v1/me", nil).decode(t, &out)
	if me := out.User; me.Handle != "frank" || len(me.Rooms) != 1 || me.Rooms[0].Role != bus.Writer {
		t.Errorf("after the rotation: %+v", me)
	}
}

// Every change left an attempt and an outcome with one request id, every
// refusal of somebody known a denial; no secret is in any of it.
func (a *apiWorld) audit(t *testing.T) {
	type page struct {
		Records []bus.AuditRecord
		Next    string
	}
	var p page
	cluster.WaitFor(t, 10*time.Second, "attempt and outcome of the revoke", func() error {
		a.root.want(t, 200, "GET", "/v1/audit?action=user.revoke&limit=500", nil).decode(t, &p)
		kinds := map[bus.AuditKind]string{}
		for _, r := range p.Records {
			if r.Result == "" || r.Result == "ok" {
				kinds[r.Kind] = r.Request
			}
			if r.Actor != a.admin.key.NKey() || r.From != "127.0.0.1" {
				return fmt.Errorf("record %+v", r)
			}
		}
		if id := kinds[bus.AuditAttempt]; id == "" || kinds[bus.AuditOutcome] == "" {
			return fmt.Errorf("records %+v", p.Records)
		}
		return nil
	})
	cluster.WaitFor(t, 10*time.Second, "denial of bob", func() error {
		a.root.want(t, 200, "GET", "/v1/audit?kind=denial&actor=bob", nil).decode(t, &p)
		if !slices.ContainsFunc(p.Records, func(r bus.AuditRecord) bool {
			return r.Action == "room.set" && r.Room == "ops" && r.Code == bus.Forbidden
		}) {
			return fmt.Errorf("records %+v", p.Records)
		}
		return nil
	})
	cluster.WaitFor(t, 10*time.Second, "denial of the revoked", func() error {
		a.root.want(t, 200, "GET", "/v1/audit?kind=denial&user=carol", nil).decode(t, &p)
		if len(p.Records) == 0 || p.Records[0].Detail != "revoked" {
			return fmt.Errorf("records %+v", p.Records)
		}
		return nil
	})
	all := a.root.want(t, 200, "GET", "/v1/audit?limit=500", nil)
	if found := regexp.MustCompile(`ubi_|ub1=|\bSU[A-Z2-7]{56}\b`).Find(all.body); found != nil {
		t.Errorf("the audit holds %s", found)
	}
	var report struct{ Report bus.AuditReport }
	a.root.want(t, 200, "GET", "/v1/audit/verify", nil).decode(t, &report)
	if !report.Report.OK {
		t.Errorf("verify: %+v", report.Report)
	}
}

// Pages join to the whole list while users come.
func (a *apiWorld) pages(t *testing.T) {
	var whole, page struct {
		Users []bus.UserInfo
		Next  string
	}
	a.root.want(t, 200, "GET", "/v1/users", nil).decode(t, &whole)
	seen := map[bus.UserKey]int{}
	for after, n := "", 0; ; n++ {
		page.Next = ""
		a.root.want(t, 200, "GET", "/v1/users?limit=2&after="+after, nil).decode(t, &page)
		for _, u := range page.Users {
			seen[u.SignPub]++
		}
		if n == 1 {
			a.add(t, "late-comer")
		}
		if after = page.Next; after == "" {
			break
		}
	}
	for _, u := range whole.Users {
		if seen[u.SignPub] != 1 {
			t.Errorf("%s was on %d pages", u.Handle, seen[u.SignPub])
		}
	}
	a.root.want(t, 200, "GET", "/v1/users?status=revoked&role=member", nil).decode(t, &page)
	for _, u := range page.Users {
		if u.Status != bus.Revoked || u.Role != bus.Member {
			t.Errorf("filtered: %+v", u)
		}
	}
	for _, bad := range []string{"limit=0", "limit=501", "limit=x", "after=alice", "status=none", "unknown=1", "limit=1&limit=2"} {
		a.root.want(t, http.StatusBadRequest, "GET", "/v1/users?"+bad, nil)
	}
}

// If-Match makes a change conditional on what was seen.
func (a *apiWorld) ifMatch(t *testing.T) {
	for _, path := range []string{"/v1/users/bob", "/v1/rooms/given"} {
		body := []byte(`{"role":"member"}`)
		if strings.Contains(path, "rooms") {
			body = []byte(`{"description":"new"}`)
		}
		tag := a.root.want(t, 200, "GET", path, nil).header.Get("ETag")
		for _, step := range []struct {
			tag  string
			want int
		}{{tag, 200}, {tag, 409}, {"*", 200}, {"W/" + tag, 400}, {"2", 400}, {`"99999999999999999999"`, 400}} {
			r, err := a.root.send(t.Context(), apiRequest{method: "PATCH", path: path, body: body, header: http.Header{"If-Match": {step.tag}}})
			if err != nil || r.status != step.want {
				t.Errorf("PATCH %s with If-Match %s: %v %v, want %d", path, step.tag, r, err, step.want)
			}
		}
	}
}

// A member sees no more than a member may.
func (a *apiWorld) whoMay(t *testing.T) {
	bob := a.as(a.bob)
	for _, q := range []struct {
		method, path string
		body         any
		want         int
	}{
		{"GET", "/v1/users", nil, 403},
		{"POST", "/v1/users", dict{"sign_pub": newPerson(t, "x").key.Hex(), "handle": "x", "role": "member"}, 403},
		{"PATCH", "/v1/users/bob", dict{"role": "admin"}, 403},
		{"POST", "/v1/users/alice/revoke", nil, 403},
		{"POST", "/v1/users/nobody/revoke", nil, 403},
		{"POST", "/v1/users/alice/suspend", nil, 403},
		{"POST", "/v1/users/alice/resume", nil, 403},
		{"GET", "/v1/users/alice/access", nil, 403},
		{"POST", "/v1/invites", dict{"role": "admin"}, 403},
		{"GET", "/v1/invites", nil, 403},
		{"DELETE", "/v1/invites/0123456789abcdef", nil, 403},
		{"GET", "/v1/rooms?all=true", nil, 403},
		{"GET", "/v1/rooms/welcome", nil, 404},
		{"PATCH", "/v1/rooms/welcome", dict{"description": ""}, 404},
		{"DELETE", "/v1/rooms/welcome", nil, 404},
		{"GET", "/v1/rooms/welcome/members", nil, 404},
		{"PUT", "/v1/rooms/welcome/members/bob", dict{"role": "owner"}, 404},
		{"DELETE", "/v1/rooms/welcome/members/bob", nil, 404},
		{"DELETE", "/v1/rooms/welcome/members/eve", nil, 404},
		{"GET", "/v1/audit", nil, 403},
		{"GET", "/v1/audit/verify", nil, 403},
	} {
		bob.want(t, q.want, q.method, q.path, q.body)
	}
	same := func(x, y string) {
		t.Helper()
		strip := func(path, word string) string {
			r := bob.want(t, 404, "GET", path, nil)
			var p bus.Problem
			r.decode(t, &p)
			p.RequestID = ""
			return strings.ReplaceAll(fmt.Sprint(p), word, "*")
		}
		if got, want := strip("/v1/"+x, x[strings.Index(x, "/")+1:]), strip("/v1/"+y, y[strings.Index(y, "/")+1:]); got != want {
			t.Errorf("%s and %s differ: %s, %s", x, y, got, want)
		}
	}
	same("rooms/welcome", "rooms/nowhere")
	same("users/carol", "users/nobody") // carol is revoked
	var out struct{ User bus.UserDetail }
	bob.want(t, 200, "GET", "/v1/users/eve", nil).decode(t, &out)
	if len(out.User.Rooms) != 0 {
		t.Errorf("bob sees eve's rooms: %+v", out.User.Rooms)
	}
}

// Whatever could be read in two ways is refused, and not repeated.
func (a *apiWorld) strictRequests(t *testing.T) {
	const canary = "SUACANARYCANARY"
	hex := newPerson(t, "x").key.Hex()
	user := func(rest string) string { return `{"sign_pub":"` + hex + `","handle":"x","role":"member"` + rest }
	for name, q := range map[string]apiRequest{
		"unknown field":     {body: []byte(user(`,"status":"active"}`))},
		"other case":        {body: []byte(user(`,"ROLE":"admin"}`))},
		"field twice":       {body: []byte(user(`,"role":"admin"}`))},
		"trailing":          {body: []byte(user(`} {}`))},
		"not JSON":          {body: []byte(user(`,}`))},
		"not UTF-8":         {body: []byte(user(",\"\xff\":1}"))},
		"no object":         {body: []byte(`[]`)},
		"null":              {body: []byte(`null`)},
		"missing":           {body: []byte(`{"sign_pub":"` + hex + `","handle":"x"}`)},
		"null field":        {body: []byte(`{"sign_pub":"` + hex + `","handle":null,"role":"member"}`)},
		"a seed":            {body: []byte(`{"sign_pub":"` + canary + `","handle":"` + canary + `","role":"` + canary + `"}`)},
		"low order":         {body: []byte(`{"sign_pub":"` + "01" + strings.Repeat("00", 31) + `","handle":"x","role":"member"}`)},
		"deep":              {body: []byte(strings.Repeat(`{"a":`, 5000) + "1" + strings.Repeat("}", 5000))},
		"no body":           {},
		"other type":        {body: []byte(user(`}`)), header: http.Header{"Content-Type": {"text/plain"}}},
		"no type":           {body: []byte(user(`}`)), edit: func(r *http.Request) { r.Header.Del("Content-Type") }},
		"parameter unknown": {body: []byte(user(`}`)), path: "/v1/users?role=admin"},
	} {
		q.method = "POST"
		if q.path == "" {
			q.path = "/v1/users"
		}
		r, err := a.root.send(t.Context(), q)
		if err != nil || r.status != http.StatusBadRequest || r.code() != bus.Invalid || bytes.Contains(r.body, []byte(canary)) {
			t.Errorf("%s: %v %v", name, r, err)
		}
	}
	if r := a.root.do(t, "POST", "/v1/users/bob/suspend", dict{}); r.status != http.StatusBadRequest {
		t.Errorf("a body where none belongs: %s", r)
	}
	r := a.root.do(t, "PUT", "/v1/users", nil)
	if allow := slices.Sorted(slices.Values(r.header.Values("Allow"))); r.status != http.StatusMethodNotAllowed || !slices.Equal(allow, []string{"GET", "POST"}) {
		t.Errorf("PUT /v1/users: %s, Allow %v", r, allow)
	}
	a.root.want(t, http.StatusNotFound, "GET", "/v1/nothing", nil)
}

// Who is not known is told one and the same thing, whatever they try.
func (a *apiWorld) one401(t *testing.T) {
	carol := newPerson(t, "revoked")
	a.root.want(t, http.StatusCreated, "POST", "/v1/users", dict{"sign_pub": carol.key.NKey(), "handle": "revoked", "role": "member"})
	a.root.changes(t, "POST", "/v1/users/revoked/revoke", nil)
	suspended := a.add(t, "suspended")
	a.root.changes(t, "POST", "/v1/users/suspended/suspend", nil)
	nonce, err := sig.NewNonce(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	bob := a.api(1, a.bob)
	first := apiRequest{method: "GET", path: "/v1/me", nonce: nonce}
	if r, err := bob.send(t.Context(), first); err != nil || r.status != 200 {
		t.Fatalf("%v %v", r, err)
	}
	get := apiRequest{method: "GET", path: "/v1/me"}
	broken := func(name, value string) apiRequest {
		return apiRequest{method: "GET", path: "/v1/me", edit: func(r *http.Request) { r.Header.Set(name, value) }}
	}
	other := a.api(2, a.bob)
	other.url = a.APIURL(1)
	large := bytes.Repeat([]byte("x"), sig.MaxBody+1)
	var want *apiResponse
	for _, q := range []struct {
		name   string
		client *apiClient
		apiRequest
	}{
		{"unsigned", a.api(1, nil), get},
		{"unsigned, unknown path", a.api(1, nil), apiRequest{method: "GET", path: "/v1/nothing"}},
		{"unsigned, no path of ours", a.api(1, nil), apiRequest{method: "DELETE", path: "/"}},
		{"unsigned, unknown method", a.api(1, nil), apiRequest{method: "BREW", path: "/v1/me"}},
		{"unsigned, a probe by another method", a.api(1, nil), apiRequest{method: "POST", path: "/healthz"}},
		{"unsigned, large", a.api(1, nil), apiRequest{method: "POST", path: "/v1/users", body: large}},
		{"bad signature", bob, broken("Signature", "ub1=:"+strings.Repeat("A", 86)+"==:")},
		{"bad digest", bob, broken("Content-Digest", "sha-256=:AAAA:")},
		{"other node", bob, apiRequest{method: "GET", path: "/v1/me", edit: func(r *http.Request) { r.Host = "bus.corp.net" }}},
		{"unknown key", a.api(1, newPerson(t, "nobody")), get},
		{"unknown key, unknown path", a.api(1, newPerson(t, "nobody")), apiRequest{method: "GET", path: "/v1/nothing"}},
		{"revoked", a.api(1, carol), get},
		{"suspended", a.api(1, suspended), get},
		{"replay", bob, first},
		{"too old", bob, apiRequest{method: "GET", path: "/v1/me", created: time.Now().Add(-2 * time.Minute)}},
		{"too new", bob, apiRequest{method: "GET", path: "/v1/me", created: time.Now().Add(2 * time.Minute)}},
		{"enroll without a token", a.api(1, newPerson(t, "nobody")), apiRequest{method: "POST", path: "/v1/enroll"}},
		{"enroll with a bad token", a.api(1, newPerson(t, "nobody")), apiRequest{method: "POST", path: "/v1/enroll", body: []byte(`{"token":"ubi_0123456789abcdef_abcdefghijklmnopqrstuvwxyz234567"}`)}},
		{"enroll with a bad body", a.api(1, newPerson(t, "nobody")), apiRequest{method: "POST", path: "/v1/enroll", body: []byte(`{"token":1}`)}},
	} {
		r, err := q.client.send(context.WithoutCancel(t.Context()), q.apiRequest)
		if err != nil {
			t.Errorf("%s: %v", q.name, err)
			continue
		}
		if r.header.Get("Date") == "" {
			t.Errorf("%s: no Date", q.name)
		}
		for _, own := range []string{"Date", "X-Request-Id"} {
			r.header.Del(own)
		}
		if want == nil {
			want = r
		}
		if r.status != 401 || !bytes.Equal(r.body, want.body) || !maps.EqualFunc(r.header, want.header, slices.Equal) {
			t.Errorf("%s: %s %v\nwant %s %v", q.name, r, r.header, want, want.header)
		}
	}
	if !json.Valid(want.body) || want.code() != bus.Unauthenticated {
		t.Errorf("401: %s", want)
	}
}

// The same requests come over HTTP/2, where neither Host nor a request line is
// on the wire as such.
func (a *apiWorld) http2(t *testing.T) {
	c := a.api(1, a.bob)
	transport := &http.Transport{TLSClientConfig: a.trust.Clone(), ForceAttemptHTTP2: true}
	c.http = &http.Client{Transport: protocol{t, transport, 2}, Timeout: 10 * time.Second}
	t.Cleanup(transport.CloseIdleConnections)
	c.want(t, 200, "GET", "/v1/rooms?limit=5", nil)
	c.want(t, http.StatusForbidden, "POST", "/v1/invites", dict{"role": "admin"})
	other := a.api(1, newPerson(t, "nobody"))
	other.http = c.http
	other.want(t, http.StatusUnauthorized, "GET", "/v1/rooms", nil)
}

// protocol wants every answer to come over one version of HTTP.
type protocol struct {
	t     *testing.T
	next  http.RoundTripper
	major int
}

func (p protocol) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := p.next.RoundTrip(r)
	if err == nil && resp.ProtoMajor != p.major {
		p.t.Errorf("answered over %s", resp.Proto)
	}
	return resp, err
}

// One user who asks too often is told to wait, and nobody else. What a proxy
// says of who asks is believed of a trusted one only, and goes into the audit.
func (a *apiWorld) limits(t *testing.T) {
	a.SetEnv(3, cluster.Membership, "UNIBUS_RATE_KEY", "0.05:3")
	a.SetEnv(3, cluster.Membership, "UNIBUS_TRUSTED_PROXIES", "127.0.0.1")
	a.Term(3, cluster.Membership)
	a.StartNode(3, cluster.Membership)
	a.WaitHealthy(time.Minute, 3)
	bob := a.api(3, a.bob)
	forwarded := http.Header{"X-Forwarded-For": {"203.0.113.9, 198.18.7.7"}}
	for range 3 {
		r, err := bob.send(t.Context(), apiRequest{method: "GET", path: "/v1/users", header: forwarded})
		if err != nil || r.status != http.StatusForbidden {
			t.Fatalf("within the rate: %v %v", r, err)
		}
	}
	r := bob.want(t, http.StatusTooManyRequests, "GET", "/v1/me", nil)
	if r.code() != bus.Unavailable || r.header.Get("Retry-After") != "20" {
		t.Errorf("429: %s %v", r, r.header)
	}
	a.api(3, a.alice).want(t, 200, "GET", "/v1/me", nil)
	a.api(3, newPerson(t, "nobody")).want(t, http.StatusUnauthorized, "GET", "/v1/me", nil)
	a.api(1, a.bob).want(t, 200, "GET", "/v1/me", nil)

	var p struct{ Records []bus.AuditRecord }
	cluster.WaitFor(t, 10*time.Second, "the forwarded address in the audit", func() error {
		a.root.want(t, 200, "GET", "/v1/audit?kind=denial&action=user.*&actor=bob&limit=500", nil).decode(t, &p)
		if !slices.ContainsFunc(p.Records, func(r bus.AuditRecord) bool { return r.From == "198.18.7.7" && r.Instance == "membership-n3" }) {
			return fmt.Errorf("records %+v", p.Records)
		}
		return nil
	})
	if slices.ContainsFunc(p.Records, func(r bus.AuditRecord) bool { return r.From == "203.0.113.9" }) {
		t.Error("an address that the client made up is in the audit")
	}
}

// putFile stores a file over the API as it is documented.
func (a *apiWorld) putFile(t *testing.T, p *person, path string, data []byte) *apiResponse {
	t.Helper()
	r, err := a.api(1, p).send(t.Context(), apiRequest{
		method: "PUT", path: path, body: data, stream: true, header: http.Header{"Content-Type": {"application/octet-stream"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.doc.check("PUT", path, r); err != nil {
		t.Errorf("PUT %s answered %s\nwhich is not documented: %v", path, r, err)
	}
	return r
}

// Every answer about files is one that the document describes. What they do is
// in TestBlobs.
func (a *apiWorld) files(t *testing.T) {
	alice, bob := a.as(a.alice), a.as(a.bob)
	alice.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "files"})
	alice.changes(t, "PUT", "/v1/rooms/files/members/bob", dict{"role": "reader"})
	const path = "/v1/rooms/files/blobs/a%20file.txt"
	for _, q := range []struct {
		who  *person
		data string
		want int
	}{{a.alice, "one", 201}, {a.alice, "one", 200}, {a.alice, "two", 201}, {a.bob, "three", 403}, {a.admin, "four", 404}} {
		if r := a.putFile(t, q.who, path, []byte(q.data)); r.status != q.want {
			t.Errorf("put as %s: %s, want %d", q.who.name, r, q.want)
		}
	}
	if r := bob.want(t, 200, "GET", path, nil); string(r.body) != "two" {
		t.Errorf("get: %s", r)
	}
	bob.want(t, 404, "GET", path+"x", nil)
	var list bus.BlobList
	bob.want(t, 200, "GET", "/v1/rooms/files/blobs", nil).decode(t, &list)
	if len(list.Blobs) != 1 || list.Bytes != 3 {
		t.Errorf("list: %+v", list)
	}
	bob.want(t, 403, "DELETE", path, nil)
	for _, already := range []bool{false, true} {
		var gone bus.BlobChange
		alice.want(t, 200, "DELETE", path, nil).decode(t, &gone)
		if gone.Already != already {
			t.Errorf("delete: %+v", gone)
		}
	}
	cluster.WaitFor(t, 10*time.Second, "two files stored and two deletions in the audit", func() error {
		var out struct{ Records []bus.AuditRecord }
		a.root.want(t, 200, "GET", "/v1/audit?action=room.blob.*&kind=outcome", nil).decode(t, &out)
		if len(out.Records) != 4 {
			return fmt.Errorf("%+v", out.Records)
		}
		return nil
	})
}

// Nothing that is documented was left out above.
func (a *apiWorld) complete(t *testing.T) {
	for path, item := range a.doc.raw["paths"].(map[string]any) {
		for method, op := range item.(map[string]any) {
			id := op.(map[string]any)["operationId"].(string)
			if strings.HasPrefix(path, "/v1/") && !a.doc.seen[id] {
				t.Errorf("%s %s (%s) never succeeded", method, path, id)
			}
		}
	}
}
