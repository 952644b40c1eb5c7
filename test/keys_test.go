package test

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/seal"
	"unibus.internal/bus/sig"
)

// identity is a person as package seal needs them.
func (p *person) identity(t testing.TB) *sig.Identity {
	t.Helper()
	seed, err := p.kp.Seed()
	if err != nil {
		t.Fatal(err)
	}
	id, err := sig.ParseIdentity(seed)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// sealKey is a person's n-th encryption key.
func (p *person) sealKey(t testing.TB, n uint64) (*seal.PrivateKey, bus.EncryptionKey) {
	t.Helper()
	private, err := seal.NewPrivateKey(p.identity(t), n)
	if err != nil {
		t.Fatal(err)
	}
	public, err := private.Bind(p.identity(t), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return private, public
}

// line is a person in a roster, with their first key.
func (p *person) line(t testing.TB, role bus.RoomRole) seal.Member {
	_, public := p.sealKey(t, 1)
	return seal.Member{User: p.key, Role: role, N: 1, Key: seal.HashOf(public.Public)}
}

// epochOf makes the body of POST epochs.
func epochOf(t testing.TB, signer *person, room bus.RoomID, before *seal.Roster, people map[*person]bus.RoomRole) (*seal.Roster, seal.Key, dict) {
	t.Helper()
	k, err := seal.NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r := seal.Roster{Room: room, Epoch: 1, CreatedAt: time.Now()}
	if before != nil {
		r.Epoch, r.Previous = before.Epoch+1, before.Hash()
	}
	r.Commitment = k.Commitment(room, r.Epoch)
	who := map[bus.UserKey]*person{}
	for p, role := range people {
		r.Members = append(r.Members, p.line(t, role))
		who[p.key] = p
	}
	signed, err := r.Sign(signer)
	if err != nil {
		t.Fatal(err)
	}
	var envelopes [][]byte
	for _, m := range signed.Members {
		_, public := who[m.User].sealKey(t, 1)
		e, err := seal.SealEnvelope(signer, signed, k, m.User, public)
		if err != nil {
			t.Fatal(err)
		}
		envelopes = append(envelopes, e)
	}
	return signed, k, dict{"roster": base64.StdEncoding.EncodeToString(signed.Bytes()), "envelopes": envelopes}
}

// largeBodies: the route of epochs takes more than others, of who is known, whole
// and as it was signed.
func (a *apiWorld) largeBodies(t *testing.T, p *person, path string, body dict) {
	t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	padded := func(size int) []byte { return append(bytes.Repeat([]byte(" "), size-len(raw)), raw...) }
	for what, c := range map[string]struct {
		by   *person
		body []byte
		edit func(*http.Request)
		want int
	}{
		"more than fits": {p, padded(5 << 20), nil, http.StatusBadRequest},
		"by nobody":      {newPerson(t, "nobody"), padded(1 << 20), nil, http.StatusUnauthorized},
		"by a stranger":  {a.bob, padded(1 << 20), nil, http.StatusNotFound},
		"another than signed": {p, padded(1 << 20), func(r *http.Request) {
			r.GetBody = func() (io.ReadCloser, error) {
				other := padded(1 << 20)
				other[0] = '\n'
				return io.NopCloser(bytes.NewReader(other)), nil
			}
		}, http.StatusUnauthorized},
	} {
		r, err := a.api(1, c.by).send(t.Context(), apiRequest{method: "POST", path: path, body: c.body, edit: c.edit, stream: true})
		if err != nil || r.status != c.want {
			t.Errorf("%s: %v %v, want %d", what, r, err, c.want)
		}
	}
	// A plain route takes no such body.
	r, err := a.api(1, p).send(t.Context(), apiRequest{method: "POST", path: "/v1/rooms", body: padded(70 << 10), stream: true})
	if err == nil && r.status != http.StatusUnauthorized {
		t.Errorf("a large body for a plain route: %v", r)
	}
}

// keys makes epochs of an encrypted room. The service takes no roster that a
// member would refuse, and none that differs from its records; of two who make
// one epoch, one has made it; and it says by itself when another is needed.
func (a *apiWorld) keys(t *testing.T) {
	const room = "/v1/rooms/vault"
	type answer struct{ Keys bus.RoomKeys }
	alice, bob := a.add(t, "seal-alice"), a.add(t, "seal-bob")
	carol, dave := a.add(t, "seal-carol"), a.add(t, "seal-dave")
	as := func(p *person) *checkedClient { return a.as(p) }
	as(alice).want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "vault", "encrypted": true})
	as(alice).want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "glass"})
	for p, role := range map[*person]string{bob: "owner", carol: "reader"} {
		as(alice).changes(t, "PUT", room+"/members/"+p.name, dict{"role": role})
	}
	for _, p := range []*person{alice, bob, carol, dave} {
		if p != carol {
			_, k := p.sealKey(t, 1)
			as(p).changes(t, "PUT", "/v1/me/encryption-key", k)
		}
	}
	look := func(p *person, after int) bus.RoomKeys {
		t.Helper()
		var out answer
		as(p).want(t, 200, "GET", fmt.Sprintf("%s/keys?after=%d", room, after), nil).decode(t, &out)
		return out.Keys
	}
	why := func(want ...bus.RekeyWhy) {
		t.Helper()
		k := look(alice, 0)
		var got []bus.RekeyWhy
		for _, r := range k.Why {
			got = append(got, r.Why)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) || k.RekeyRequired != (len(want) > 0) {
			t.Fatalf("another key is needed because of %v (%v), want %v", got, k.RekeyRequired, want)
		}
	}
	why(bus.RekeyFirst)

	r1, k1, first := epochOf(t, alice, "vault", nil, map[*person]bus.RoomRole{alice: bus.Owner, bob: bus.Owner})
	_, _, byBob := epochOf(t, bob, "vault", nil, map[*person]bus.RoomRole{alice: bus.Owner, bob: bus.Owner})
	_, _, ghost := epochOf(t, alice, "vault", nil, map[*person]bus.RoomRole{alice: bus.Owner, dave: bus.Reader})
	_, _, keyless := epochOf(t, alice, "vault", nil, map[*person]bus.RoomRole{alice: bus.Owner, carol: bus.Reader})
	as(bob).want(t, 403, "POST", room+"/epochs", byBob) // not the creator
	as(bob).want(t, 403, "POST", room+"/epochs", first) // not who signed it
	as(alice).want(t, 409, "POST", room+"/epochs", ghost)
	as(alice).want(t, 409, "POST", room+"/epochs", keyless)
	as(alice).want(t, 400, "POST", room+"/epochs", dict{"roster": first["roster"], "envelopes": [][]byte{}})
	as(alice).want(t, 400, "POST", room+"/epochs", dict{"roster": first["roster"], "envelopes": ghost["envelopes"]})
	as(alice).want(t, 400, "POST", "/v1/rooms/glass/epochs", first)
	as(alice).want(t, 409, "GET", "/v1/rooms/glass/keys", nil)
	as(carol).want(t, 403, "POST", room+"/epochs", first)
	as(dave).want(t, 404, "POST", room+"/epochs", first)
	as(dave).want(t, 404, "GET", room+"/keys", nil)
	as(dave).want(t, 404, "GET", room+"/encryption-keys", nil)
	a.root.want(t, 403, "POST", room+"/epochs", first)
	why(bus.RekeyFirst)
	a.largeBodies(t, alice, room+"/epochs", first)

	if c := as(alice).changes(t, "POST", room+"/epochs", first); c.Already {
		t.Errorf("%+v", c)
	}
	if c := as(alice).changes(t, "POST", room+"/epochs", first); !c.Already {
		t.Errorf("%+v", c)
	}
	why()
	k := look(bob, 0)
	if len(k.Waiting) != 1 || k.Waiting[0].User != carol.key || k.Waiting[0].Key {
		t.Fatalf("carol does not wait: %+v", k)
	}
	private, _ := bob.sealKey(t, 1)
	if got, err := seal.OpenEnvelope(k.Epochs[0].Envelope, private, r1, r1); err != nil || got != k1 {
		t.Fatalf("bob's envelope: %v", err)
	}
	if k := look(carol, 0); k.Epochs[0].Envelope != nil {
		t.Fatal("carol was given an envelope")
	}

	// Carol publishes a key and is admitted; the rival of that epoch is late.
	_, ck := carol.sealKey(t, 1)
	as(carol).changes(t, "PUT", "/v1/me/encryption-key", ck)
	var members struct{ Members []bus.MemberKey }
	as(carol).want(t, 200, "GET", room+"/encryption-keys", nil).decode(t, &members)
	if len(members.Members) != 3 {
		t.Fatalf("%+v", members)
	}
	all := map[*person]bus.RoomRole{alice: bus.Owner, bob: bus.Owner, carol: bus.Reader}
	r2, _, second := epochOf(t, bob, "vault", r1, all)
	_, _, rival := epochOf(t, alice, "vault", r1, all)
	_, _, above := epochOf(t, alice, "vault", r1, map[*person]bus.RoomRole{alice: bus.Owner, carol: bus.Writer})
	as(alice).want(t, 409, "POST", room+"/epochs", above) // carol is no writer
	as(bob).changes(t, "POST", room+"/epochs", second)
	as(alice).want(t, 409, "POST", room+"/epochs", rival)
	as(alice).want(t, 409, "POST", room+"/epochs", first)
	why()

	// What was before is carol's only by an owner's grant.
	_, public := carol.sealKey(t, 1)
	grant, err := seal.SealEnvelope(bob, r1, k1, carol.key, public)
	if err != nil {
		t.Fatal(err)
	}
	granted := dict{"envelopes": []dict{{"epoch": 1, "envelope": grant}}}
	as(alice).want(t, 400, "PUT", room+"/keys/seal-carol", granted) // bob's, not alice's
	as(carol).want(t, 403, "PUT", room+"/keys/seal-carol", granted)
	as(bob).want(t, 404, "PUT", room+"/keys/seal-carol", dict{"envelopes": []dict{{"epoch": 9, "envelope": grant}}})
	as(bob).want(t, 409, "PUT", room+"/keys/seal-carol", dict{"envelopes": []dict{{"epoch": 2, "envelope": grant}}})
	as(bob).changes(t, "PUT", room+"/keys/seal-carol", granted)
	cp, _ := carol.sealKey(t, 1)
	k = look(carol, 0)
	if got, err := seal.OpenEnvelope(k.Epochs[0].Envelope, cp, r1, r2); err != nil || got != k1 {
		t.Fatalf("carol's grant: %v", err)
	}
	if k := look(carol, 1); len(k.Epochs) != 1 || k.Epochs[0].Epoch != 2 {
		t.Fatalf("after=1: %+v", k.Epochs)
	}

	// Every departure asks for another key, and so does a return.
	a.root.changes(t, "POST", "/v1/users/seal-bob/suspend", nil)
	why(bus.RekeyDeparted)
	a.root.changes(t, "POST", "/v1/users/seal-bob/resume", nil)
	why(bus.RekeyReturned)
	_, k2 := carol.sealKey(t, 2)
	as(carol).changes(t, "PUT", "/v1/me/encryption-key", k2)
	as(alice).changes(t, "PUT", room+"/members/seal-bob", dict{"role": "writer"})
	got := look(alice, 0)
	if len(got.Why) != 2 {
		t.Fatalf("%+v", got.Why)
	}
	as(carol).changes(t, "DELETE", room+"/members/seal-carol", nil)
	a.root.changes(t, "POST", "/v1/users/seal-bob/revoke", nil)
	why(bus.RekeyDeparted, bus.RekeyDeparted)
	_, _, third := epochOf(t, alice, "vault", r2, map[*person]bus.RoomRole{alice: bus.Owner})
	as(alice).changes(t, "POST", room+"/epochs", third)
	why()
	if as(carol).want(t, 404, "GET", room+"/keys", nil); len(look(alice, 2).Epochs) != 1 {
		t.Fatal("the third epoch is not there")
	}
}
