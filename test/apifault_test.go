package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// TestAPIWithoutQuorum takes two of three nodes away. From the first moment on
// every route answers 503 inside two seconds: while the lease lasts because no
// nonce can be recorded, afterwards also to who has signed nothing. Nothing of
// what was asked meanwhile happens, then or later.
func TestAPIWithoutQuorum(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: directLease})
	doc := w.document(t)
	root := w.api(1, w.admin)
	root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "ops"})
	late := newPerson(t, "late")

	asked := func(c *apiClient, signed bool) {
		t.Helper()
		var all sync.WaitGroup
		for template, item := range doc.raw["paths"].(map[string]any) {
			if !strings.HasPrefix(template, "/v1/") {
				continue
			}
			for method, op := range item.(map[string]any) {
				path := strings.NewReplacer("{user}", "admin", "{room}", "ops", "{id}", "0123456789abcdef", "{name}", "notes.txt").Replace(template)
				q := apiRequest{method: strings.ToUpper(method), path: path, body: exampleBody(t, op, late), stream: method == "put" && strings.Contains(template, "/blobs/")}
				all.Go(func() {
					started := time.Now()
					r, err := c.send(t.Context(), q)
					took := time.Since(started)
					switch {
					case err != nil:
						t.Errorf("%s %s: %v", q.method, path, err)
					case !signed && r.status == http.StatusUnauthorized: // the lease is not over yet
					case r.status != http.StatusServiceUnavailable || r.code() != bus.Unavailable || r.header.Get("Retry-After") == "" ||
						r.header.Get("Content-Type") != "application/problem+json":
						t.Errorf("%s %s without a quorum: %s %v", q.method, path, r, r.header)
					case took > 2*time.Second:
						t.Errorf("%s %s: 503 after %s", q.method, path, took)
					}
				})
			}
		}
		all.Wait()
	}
	before := w.records(t, 1)
	w.Kill(2)
	w.Kill(3)
	asked(root, true)
	cluster.WaitFor(t, noQuorumSeen, "the lease to be over", func() error {
		r, err := w.api(1, nil).send(t.Context(), apiRequest{method: "GET", path: "/v1/nothing"})
		if err != nil || r.status != http.StatusServiceUnavailable {
			return fmt.Errorf("%v %w", r, err)
		}
		return nil
	})
	asked(root, true)
	asked(w.api(1, nil), false)

	w.StartNode(2)
	w.StartNode(3)
	w.WaitHealthy(time.Minute)
	if after := w.records(t, 1); after != before {
		t.Errorf("records after\n%s\nbefore\n%s", after, before)
	}
}

// exampleBody is what the document gives as an example, for a key that nobody
// has.
func exampleBody(t *testing.T, op any, p *person) []byte {
	t.Helper()
	request, ok := op.(map[string]any)["requestBody"].(map[string]any)
	if !ok {
		return nil
	}
	body, ok := request["content"].(map[string]any)["application/json"].(map[string]any)
	if !ok {
		return []byte("a file")
	}
	raw, err := json.Marshal(body["example"])
	if err != nil {
		t.Fatal(err)
	}
	var signPub struct {
		SignPub string `json:"sign_pub"`
	}
	if json.Unmarshal(raw, &signPub) == nil && signPub.SignPub != "" {
		raw = bytes.ReplaceAll(raw, []byte(signPub.SignPub), []byte(p.key.Hex()))
	}
	return raw
}

// records is what an admin sees on a node of users, rooms and invites.
func (w *world) records(t *testing.T, node int) string {
	t.Helper()
	c := w.api(node, w.admin)
	out := c.want(t, 200, "GET", "/v1/users", nil).String() + c.want(t, 200, "GET", "/v1/rooms?all=true", nil).String() +
		c.want(t, 200, "GET", "/v1/invites", nil).String()
	if r := c.do(t, "GET", "/v1/rooms/ops", nil); r.status == http.StatusOK {
		out += r.String()
	}
	return out
}

// TestAPIPausedRequest pauses requests of an admin between authorization and
// write, and revokes that admin meanwhile on another node. Once the revoke has
// returned, none of them changes anything.
func TestAPIPausedRequest(t *testing.T) {
	t.Parallel()
	const pause = 8 * time.Second
	w := newWorld(t, cluster.Options{Controls: true})
	second := newPerson(t, "second")
	w.api(2, w.admin).want(t, http.StatusCreated, "POST", "/v1/users", dict{"sign_pub": second.key.NKey(), "handle": "second", "role": "admin"})
	w.api(2, w.admin).want(t, http.StatusCreated, "POST", "/v1/users", dict{"sign_pub": newPerson(t, "victim").key.NKey(), "handle": "victim", "role": "member"})
	w.api(2, w.admin).want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "ops"})
	w.SetEnv(1, cluster.Membership, "UNIBUS_DELAY_MUTATE", pause.String())
	w.Term(1, cluster.Membership)
	w.StartNode(1, cluster.Membership)
	w.WaitHealthy(time.Minute, 1)

	started := time.Now()
	slow := w.api(1, second)
	var paused sync.WaitGroup
	for _, q := range []apiRequest{
		{method: "POST", path: "/v1/users", body: []byte(fmt.Sprintf(`{"sign_pub":%q,"handle":"mallory","role":"admin"}`, newPerson(t, "mallory").key.Hex()))},
		{method: "POST", path: "/v1/users/victim/revoke"},
		{method: "PATCH", path: "/v1/users/victim", body: []byte(`{"role":"admin"}`)},
		{method: "POST", path: "/v1/rooms", body: []byte(`{"room":"back-door"}`)},
		{method: "PUT", path: "/v1/rooms/ops/members/second", body: []byte(`{"role":"owner"}`)},
		{method: "POST", path: "/v1/invites", body: []byte(`{"role":"admin"}`)},
	} {
		paused.Go(func() {
			r, err := slow.send(t.Context(), q)
			if err != nil || r.status != http.StatusUnauthorized {
				t.Errorf("%s %s by a revoked admin: %v %v", q.method, q.path, r, err)
			}
		})
	}
	// All six are on record as attempts, and so past their authorization.
	cluster.WaitFor(t, pause, "six attempts", func() error {
		var p struct{ Records []bus.AuditRecord }
		w.api(2, w.admin).want(t, 200, "GET", "/v1/audit?kind=attempt&actor=second", nil).decode(t, &p)
		if len(p.Records) != 6 {
			return fmt.Errorf("%d attempts", len(p.Records))
		}
		return nil
	})
	if c := w.api(2, w.admin).want(t, 200, "POST", "/v1/users/second/revoke", nil).change(t); !c.Verified {
		t.Fatalf("revoke: %+v", c)
	}
	if took := time.Since(started); took > pause {
		t.Fatalf("the revoke came after %s, when nothing was paused any more", took)
	}
	before := w.records(t, 2)
	paused.Wait()
	if after := w.records(t, 2); after != before {
		t.Errorf("after the revoke\n%s\nbecame\n%s", before, after)
	}
}

// TestAPIInFlight stops a node while it changes something, and takes the audit
// away: what was begun is finished and on record, and what cannot be put on
// record is not done, except to take access away.
func TestAPIInFlight(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Controls: true})
	root := w.api(2, w.admin)
	add := func(handle string) (apiRequest, *person) {
		p := newPerson(t, handle)
		return apiRequest{method: "POST", path: "/v1/users", body: []byte(fmt.Sprintf(`{"sign_pub":%q,"handle":%q,"role":"member"}`, p.key.Hex(), handle))}, p
	}

	w.SetEnv(1, cluster.Membership, "UNIBUS_DELAY_MUTATE", "2s")
	w.Term(1, cluster.Membership)
	w.StartNode(1, cluster.Membership)
	w.WaitHealthy(time.Minute, 1)
	q, alice := add("alice")
	answers := make(chan *apiResponse, 1)
	go func() {
		r, err := w.api(1, w.admin).send(t.Context(), q)
		if err != nil {
			t.Errorf("the node that stopped: %v", err)
		}
		answers <- r
	}()
	var trail struct{ Records []bus.AuditRecord }
	find := func(kind bus.AuditKind) error {
		trail.Records = nil
		root.want(t, 200, "GET", "/v1/audit?action=user.add&user="+alice.key.NKey()+"&kind="+string(kind), nil).decode(t, &trail)
		if len(trail.Records) != 1 {
			return fmt.Errorf("%d records of kind %s", len(trail.Records), kind)
		}
		return nil
	}
	cluster.WaitFor(t, 5*time.Second, "the attempt", func() error { return find(bus.AuditAttempt) })
	w.Term(1, cluster.Membership)
	if r := <-answers; r == nil || r.status != http.StatusCreated {
		t.Errorf("a change on a node that stopped: %v", r)
	}
	// The process is gone, so its audit was flushed before: nothing to wait for.
	if err := find(bus.AuditOutcome); err != nil {
		t.Errorf("after the stop: %v", err)
	} else if r := trail.Records[0]; r.Result != "ok" || r.Instance != "membership-n1" || r.Revision == 0 {
		t.Errorf("outcome %+v", r)
	}

	if err := w.deleteStream(kv.AuditStream); err != nil {
		t.Fatal(err)
	}
	before := w.records(t, 3)
	for _, q := range []apiRequest{
		func() apiRequest { q, _ := add("bob"); return q }(),
		{method: "POST", path: "/v1/rooms", body: []byte(`{"room":"ops"}`)},
		{method: "PATCH", path: "/v1/users/alice", body: []byte(`{"role":"admin"}`)},
		{method: "POST", path: "/v1/invites", body: []byte(`{"role":"admin"}`)},
	} {
		r, err := root.send(t.Context(), q)
		if err != nil || r.status != http.StatusServiceUnavailable || r.header.Get(bus.EffectHeader) != bus.EffectNone {
			t.Errorf("%s %s without an audit: %v %v", q.method, q.path, r, err)
		}
	}
	if after := w.records(t, 3); after != before {
		t.Errorf("without an audit\n%s\nbecame\n%s", before, after)
	}
	for _, path := range []string{"/v1/users/alice/suspend", "/v1/users/alice/revoke"} {
		if c := root.want(t, 200, "POST", path, nil).change(t); !c.Verified {
			t.Errorf("%s without an audit: %+v", path, c)
		}
	}
}

// deleteStream is what a careless holder of the ops seed could do.
func (w *world) deleteStream(name string) error {
	js, err := w.Ops().JetStream()
	if err != nil {
		return err
	}
	return js.DeleteStream(name)
}
