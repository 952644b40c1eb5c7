package test

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// denialText is all that a refused client may learn, whatever the reason.
const denialText = "'Authorization Violation'"

// TestConnect tries to get in by every way that is not a proof of a known,
// active key: by hand, on each node of one live cluster.
func TestConnect(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	d := &door{world: w, alice: w.addUser("alice"), bob: w.addUser("bob")}
	w.addRoom("ops", d.alice, kv.RoomOptions{})
	w.waitAdmits(d.alice, w.Nodes()...)
	attempts := append(d.unproven(t), d.disallowed(t)...)
	for _, i := range w.Nodes() {
		t.Run(w.Node(i), func(t *testing.T) {
			for _, a := range attempts {
				t.Run(a.name, func(t *testing.T) { d.refuses(t, i, a) })
			}
			t.Run("replayed", func(t *testing.T) { d.refusesReplay(t, i) })
			t.Run("a nonce of another node", func(t *testing.T) { d.refusesForeignNonce(t, i) })
			t.Run("not the protocol", func(t *testing.T) { d.refusesNoise(t, i) })
			t.Run("another name beside the proof", func(t *testing.T) { d.grantsTheProofOnly(t, i) })
			t.Run("a second CONNECT", func(t *testing.T) { d.secondConnect(t, i) })
			if v, err := w.attempt(i, d.alice); v != admitted {
				t.Errorf("a good user right after: %s: %v", v, err)
			}
		})
	}
	t.Run("flood", d.flood)
}

// door is a cluster with two users to impersonate.
type door struct {
	*world
	alice, bob *person
}

// trespass is one CONNECT that must be refused. Its reason is what the log of a
// callout says, "" where the server refuses without asking.
type trespass struct {
	name   string
	reason string
	fields func(nonce string) map[string]any
}

// unproven are attempts in which nobody shows that they hold a known key.
func (d *door) unproven(t *testing.T) []trespass {
	alice, key := d.alice, d.alice.key.NKey()
	sig := func(name, sig string) trespass {
		return trespass{name, "signature", func(string) map[string]any { return map[string]any{"nkey": key, "sig": sig} }}
	}
	with := func(name, reason string, fields map[string]any) trespass {
		return trespass{name, reason, func(string) map[string]any { return fields }}
	}
	all := []trespass{
		// A server that sees no signature passes no nonce on.
		with("empty signature", "nonce", map[string]any{"nkey": key, "sig": ""}),
		with("key without a signature", "nonce", map[string]any{"nkey": key}),
		sig("64 bytes of x", base64.RawURLEncoding.EncodeToString([]byte(strings.Repeat("x", 64)))),
		sig("64 zero bytes", base64.RawURLEncoding.EncodeToString(make([]byte, 64))),
		sig("signature that is no base64", strings.Repeat("%", 86)),
		{"half a signature", "signature", func(nonce string) map[string]any {
			f := wire.Proof(alice.kp, nonce)
			f["sig"] = f["sig"].(string)[:43]
			return f
		}},
		{"signature of another nonce", "signature", func(string) map[string]any { return wire.Proof(alice.kp, rand.Text()[:15]) }},
		{"signature of the empty nonce", "signature", func(string) map[string]any { return wire.Proof(alice.kp, "") }},
		{"signature by another key", "signature", func(nonce string) map[string]any {
			f := wire.Proof(d.bob.kp, nonce)
			f["nkey"] = key
			return f
		}},
		{"signature without a key", "key", func(nonce string) map[string]any {
			return map[string]any{"sig": wire.Proof(alice.kp, nonce)["sig"]}
		}},
		{"key in hex", "key", func(nonce string) map[string]any {
			f := wire.Proof(alice.kp, nonce)
			f["nkey"] = alice.key.Hex()
			return f
		}},
		with("nothing", "anonymous", nil),
		with("user and password", "anonymous", map[string]any{"user": "alice", "pass": "alice"}),
		with("the key as a user", "anonymous", map[string]any{"user": key, "pass": key}),
		with("token", "anonymous", map[string]any{"auth_token": "s3cr3t"}),
		with("JWT of one's own making", "anonymous", map[string]any{"jwt": selfMade(t, alice)}),
		with("bearer of another's JWT", "signature", map[string]any{"jwt": selfMade(t, d.bob), "nkey": key, "sig": "x"}),
		{"account of one's choice", "", func(nonce string) map[string]any {
			f := wire.Proof(alice.kp, nonce)
			f["account"] = "CTRL"
			return f
		}},
	}
	return append(all, d.injected(t)...)
}

// injected are attempts that carry the name of a user whom the servers verify
// by themselves, in each field that could be mistaken for it.
func (d *door) injected(t *testing.T) (all []trespass) {
	for _, service := range []string{"ops", "sys", "authcallout-auth", "membership-ctrl"} {
		name := d.serviceKey(t, service)
		claim := func(field, reason string) trespass {
			return trespass{field + " " + service, reason, func(string) map[string]any { return map[string]any{field: name, "pass": name} }}
		}
		all = append(all,
			claim("user", "anonymous"), claim("auth_token", "anonymous"), claim("nkey", ""),
			trespass{"nkey " + service + " with alice's signature", "", func(nonce string) map[string]any {
				f := wire.Proof(d.alice.kp, nonce)
				f["nkey"] = name
				return f
			}})
	}
	return all
}

// serviceKey is the public key of a user that the servers' configuration names.
func (d *door) serviceKey(t *testing.T, service string) string {
	t.Helper()
	seed, err := os.ReadFile(d.Seed(service))
	if err != nil {
		t.Fatal(err)
	}
	kp, err := nkeys.FromSeed(bytes.TrimSpace(seed))
	if err != nil {
		t.Fatal(err)
	}
	name, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// selfMade is a JWT that a client signed for itself.
func selfMade(t *testing.T, p *person) string {
	t.Helper()
	enc := base64.RawURLEncoding.EncodeToString
	claims, err := json.Marshal(map[string]any{"sub": p.key.NKey(), "iss": p.key.NKey(), "aud": "CTRL", "nats": map[string]any{"type": "user", "version": 2}})
	if err != nil {
		t.Fatal(err)
	}
	text := enc([]byte(`{"typ":"JWT","alg":"ed25519-nkey"}`)) + "." + enc(claims)
	sig, err := p.kp.Sign([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + enc(sig)
}

// disallowed are people who do prove their key, or forge what anybody can, and
// whose record does not let them in.
func (d *door) disallowed(t *testing.T) []trespass {
	proof := func(name, reason string, p *person) trespass {
		return trespass{name, reason, func(nonce string) map[string]any { return wire.Proof(p.kp, nonce) }}
	}
	anHourAgo := time.Now().Add(-time.Hour)
	revoked := d.addUser("mallory")
	if _, err := d.store.RevokeUser(t.Context(), revoked.key); err != nil {
		t.Fatal(err)
	}
	suspended, expired := newPerson(t, "trent"), newPerson(t, "victor")
	d.put(t, suspended.key, record(t, suspended.key, func(u *bus.User) { u.Status = bus.Suspended }))
	d.put(t, expired.key, record(t, expired.key, func(u *bus.User) { u.ExpiresAt = &anHourAgo }))
	all := []trespass{
		proof("unknown", "unknown", newPerson(t, "stranger")),
		proof("revoked", "revoked", revoked),
		proof("suspended", "suspended", suspended),
		proof("expired", "expired", expired),
	}
	for name, value := range map[string]func(*person) []byte{
		"record of noise":            func(*person) []byte { return []byte("{") },
		"record of a later version":  func(p *person) []byte { return record(t, p.key, func(u *bus.User) { u.V = 2 }) },
		"record of an unknown state": func(p *person) []byte { return record(t, p.key, func(u *bus.User) { u.Status = "friendly" }) },
		"record of another key":      func(p *person) []byte { return record(t, d.alice.key, func(*bus.User) {}) },
	} {
		p := newPerson(t, "eve")
		d.put(t, p.key, value(p))
		all = append(all, proof(name, "broken_record", p))
	}
	return append(all, d.lowOrder(t)...)
}

// lowOrder are keys for which one signature verifies every message, with and
// without a record that somebody put by hand.
func (d *door) lowOrder(t *testing.T) (all []trespass) {
	identity, order2, twice := bus.UserKey{1}, bus.UserKey{0xec}, bus.UserKey{1}
	for i := 1; i < 31; i++ {
		order2[i] = 0xff
	}
	order2[31] = 0x7f
	twice[31] = 0x80 // the identity again, in an encoding that is not canonical
	for name, k := range map[string]bus.UserKey{"the identity": identity, "order 2": order2, "the identity spelled otherwise": twice, "zero": {}} {
		forged := base64.RawURLEncoding.EncodeToString(append(append([]byte{1}, make([]byte, 31)...), make([]byte, 32)...))
		attempt := trespass{"low order: " + name, "key", func(string) map[string]any { return map[string]any{"nkey": k.NKey(), "sig": forged} }}
		all = append(all, attempt)
		if k == identity {
			d.put(t, k, record(t, k, func(*bus.User) {}))
			all[len(all)-1].name += ", with a record"
		}
	}
	return all
}

// record is a good record of an admin with one thing changed.
func record(t *testing.T, k bus.UserKey, change func(*bus.User)) []byte {
	t.Helper()
	u := bus.User{V: bus.UserVersion, Key: k, Handle: "planted", Role: bus.Admin, Status: bus.Active, CreatedAt: time.Now()}
	change(&u)
	b, err := json.Marshal(u)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// put writes a record by hand, as an operator with the ops key could.
func (d *door) put(t *testing.T, k bus.UserKey, value []byte) {
	t.Helper()
	js, err := jetstream.New(d.Ops())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "$KV.UNIBUS_users."+k.Hex(), value); err != nil {
		t.Fatal(err)
	}
}

func (d *door) dial(t *testing.T, i int) *wire.Conn {
	t.Helper()
	c, err := wire.Dial(d.NATSURL(i), d.trust, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// wantDenied wants the constant text, in the time of an answer and not of a
// timeout.
func wantDenied(t *testing.T, started time.Time, err error) {
	t.Helper()
	if took := time.Since(started); took > denialWithin {
		t.Errorf("the verdict took %s", took)
	}
	if !errors.Is(err, wire.ErrDenied) || err.Error() != "denied: "+denialText {
		t.Errorf("verdict %v, want %s", err, denialText)
	}
}

func (d *door) refuses(t *testing.T, i int, a trespass) {
	c := d.dial(t, i)
	started := time.Now()
	wantDenied(t, started, c.Connect(a.fields(c.Info.Nonce)))
	if a.reason != "" {
		d.waitLogged(t, i, c.Info.ClientID, a.reason)
	}
}

// waitLogged wants the decision about one connection in a callout's log: proof
// that it was refused for this reason and not for another mistake of the test.
func (d *door) waitLogged(t *testing.T, node int, client uint64, reason string) {
	t.Helper()
	connection := fmt.Sprintf(" server=n%d client=%d ", node, client)
	cluster.WaitFor(t, 5*time.Second, "a callout to log the refusal", func() error {
		for _, i := range d.Nodes() {
			log, err := os.ReadFile(d.LogFile(i, cluster.Authcallout))
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(log)) {
				if !strings.Contains(line, connection) {
					continue
				}
				if !strings.Contains(line, " result=deny reason="+reason+" ") {
					t.Fatalf("refused for another reason than %q: %s", reason, line)
				}
				return nil
			}
		}
		return errors.New("no line about" + connection)
	})
}

// refusesReplay sends what admitted one connection on another.
func (d *door) refusesReplay(t *testing.T, i int) {
	first := d.dial(t, i)
	recorded := wire.Proof(d.alice.kp, first.Info.Nonce)
	if err := first.Connect(recorded); err != nil {
		t.Fatalf("the original is not admitted: %v", err)
	}
	for _, j := range d.Nodes() {
		d.refuses(t, j, trespass{"", "signature", func(string) map[string]any { return recorded }})
	}
	if err := first.Flush(); err != nil {
		t.Errorf("the original was harmed: %v", err)
	}
}

// refusesForeignNonce relays the challenge of one node to a client of another,
// as a server in the middle would.
func (d *door) refusesForeignNonce(t *testing.T, i int) {
	elsewhere := d.dial(t, i%3+1)
	d.refuses(t, i, trespass{"", "signature", func(string) map[string]any { return wire.Proof(d.alice.kp, elsewhere.Info.Nonce) }})
	if err := elsewhere.Connect(wire.Proof(d.alice.kp, elsewhere.Info.Nonce)); err != nil {
		t.Errorf("the challenge on its own connection: %v", err)
	}
}

// refusesNoise talks to a node without a CONNECT that could be judged.
func (d *door) refusesNoise(t *testing.T, i int) {
	good := func(c *wire.Conn) string {
		b, _ := json.Marshal(wire.Proof(d.alice.kp, c.Info.Nonce))
		return string(b)
	}
	for name, say := range map[string]func(*wire.Conn) error{
		"SUB before CONNECT":  func(c *wire.Conn) error { return c.Sub("room.ops.>", "", "1") },
		"PUB before CONNECT":  func(c *wire.Conn) error { return c.Pub("room.ops."+d.alice.key.NKey()+".x", "", "x") },
		"PING before CONNECT": func(c *wire.Conn) error { return c.Flush() },
		"overlong CONNECT":    func(c *wire.Conn) error { return c.ConnectRaw(`{"name":"` + strings.Repeat("x", 64<<10) + `"}`) },
		"malformed JSON":      func(c *wire.Conn) error { return c.ConnectRaw(good(c)[:40]) },
		"an array":            func(c *wire.Conn) error { return c.ConnectRaw("[" + good(c) + "]") },
		"no JSON":             func(c *wire.Conn) error { return c.ConnectRaw("please") },
		"empty":               func(c *wire.Conn) error { return c.ConnectRaw("") },
		"key is a number":     func(c *wire.Conn) error { return c.ConnectRaw(`{"nkey":7,"sig":7}`) },
	} {
		t.Run(name, func(t *testing.T) {
			c := d.dial(t, i)
			started := time.Now()
			err := say(c)
			if err == nil {
				t.Fatal("answered PONG")
			}
			if took := time.Since(started); took > denialWithin {
				t.Errorf("closed only after %s: %v", took, err)
			}
			if err := c.Sub(">", "", "2"); err == nil {
				t.Error("the connection goes on")
			}
			if len(c.Messages) > 0 {
				t.Errorf("heard %+v", c.Messages)
			}
		})
	}
}

// grantsTheProofOnly: a client that proves its key and names somebody else in
// every other field is who it proved to be.
func (d *door) grantsTheProofOnly(t *testing.T, i int) {
	name := d.serviceKey(t, "ops")
	c := d.dial(t, i)
	fields := map[string]any{"user": name, "pass": name, "auth_token": name, "name": name}
	maps.Copy(fields, wire.Proof(d.alice.kp, c.Info.Nonce))
	if err := c.Connect(fields); err != nil {
		t.Fatal(err)
	}
	wantAlice(t, c, d)
}

// wantAlice wants the rights of alice and no others.
func wantAlice(t *testing.T, c *wire.Conn, d *door) {
	t.Helper()
	if err := c.Pub("room.ops."+d.alice.key.NKey()+".x", "", "x"); err != nil {
		t.Errorf("alice in her room: %v", err)
	}
	for _, subject := range []string{"$JS.API.INFO", "$KV.UNIBUS_users.x", "$SYS.REQ.SERVER.PING", "room.ops." + d.bob.key.NKey() + ".x"} {
		if err := c.Pub(subject, "", "x"); !errors.Is(err, wire.ErrDenied) {
			t.Errorf("publish to %s: %v, want a denial", subject, err)
		}
	}
	for sid, subject := range []string{">", "$SYS.>", "unibus.>", "_INBOX_" + d.bob.key.NKey() + ".>"} {
		if err := c.Sub(subject, "", fmt.Sprint(sid+10)); !errors.Is(err, wire.ErrDenied) {
			t.Errorf("subscribe to %s: %v, want a denial", subject, err)
		}
	}
}

// secondConnect sends CONNECT twice on one connection. Who becomes another
// keeps nothing of the first, else a revoke would look for the wrong name and
// leave the first one's subscriptions alive.
func (d *door) secondConnect(t *testing.T, i int) {
	connected := func(t *testing.T) *wire.Conn {
		c := d.dial(t, i)
		if err := c.Connect(wire.Proof(d.alice.kp, c.Info.Nonce)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	t.Run("same proof", func(t *testing.T) {
		c := connected(t)
		if err := c.Connect(wire.Proof(d.alice.kp, c.Info.Nonce)); err != nil {
			t.Fatal(err)
		}
		wantAlice(t, c, d)
	})
	t.Run("forged", func(t *testing.T) {
		c := connected(t)
		f := wire.Proof(d.bob.kp, c.Info.Nonce)
		f["nkey"] = d.alice.key.NKey()
		started := time.Now()
		wantDenied(t, started, c.Connect(f))
		if err := c.Pub("room.ops."+d.alice.key.NKey()+".x", "", "x"); err == nil {
			t.Error("the first admission survives the refusal of the second")
		}
	})
	t.Run("another user", func(t *testing.T) {
		c := connected(t)
		if err := c.Sub("room.ops.>", "", "1"); err != nil {
			t.Fatal(err)
		}
		if err := c.Connect(wire.Proof(d.bob.kp, c.Info.Nonce)); err != nil {
			t.Fatal(err)
		}
		sender := d.connectRaw(i, d.alice)
		if err := sender.Pub("room.ops."+d.alice.key.NKey()+".x", "", "secret"); err != nil {
			t.Fatal(err)
		}
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
		if len(c.Messages) > 0 {
			t.Errorf("bob hears what alice subscribed to: %+v", c.Messages)
		}
		if err := c.Sub("room.ops.>", "", "2"); !errors.Is(err, wire.ErrDenied) {
			t.Errorf("bob subscribes to alice's room: %v", err)
		}
		if err := c.Pub("room.ops."+d.alice.key.NKey()+".x", "", "x"); !errors.Is(err, wire.ErrDenied) {
			t.Errorf("bob publishes as alice: %v", err)
		}
	})
}

// flood lets 300 strangers knock at once, half of them with forged signatures
// and half with unknown keys, which cost a barrier each; meanwhile a user comes.
func (d *door) flood(t *testing.T) {
	const strangers = 300
	var ready, gone sync.WaitGroup
	knock := make(chan struct{})
	refusals := make(chan error, strangers)
	unknown := newPerson(t, "unknown")
	for n := range strangers {
		ready.Add(1)
		gone.Go(func() {
			c, err := wire.Dial(d.NATSURL(n%3+1), d.trust, 15*time.Second)
			ready.Done()
			if err != nil {
				refusals <- fmt.Errorf("dial: %w", err)
				return
			}
			defer c.Close()
			fields := wire.Proof(unknown.kp, c.Info.Nonce)
			if n%2 == 0 {
				fields["nkey"] = d.alice.key.NKey()
			}
			<-knock
			refusals <- c.Connect(fields)
		})
	}
	ready.Wait()
	guests := make([]*wire.Conn, 3)
	for i := range guests {
		guests[i] = d.dial(t, i+1)
	}
	close(knock)
	for i, c := range guests {
		started := time.Now()
		if err := c.Connect(wire.Proof(d.alice.kp, c.Info.Nonce)); err != nil {
			t.Errorf("n%d, amid the flood: %v", i+1, err)
		}
		if took := time.Since(started); took > 2*time.Second {
			t.Errorf("n%d admits after %s", i+1, took)
		}
	}
	gone.Wait()
	close(refusals)
	other := 0
	for err := range refusals {
		switch {
		case err == nil:
			t.Error("a stranger of the flood is admitted")
		case !errors.Is(err, wire.ErrDenied): // silence is no admission
			other++
		case err.Error() != "denied: "+denialText:
			t.Errorf("a stranger learns %v", err)
		}
	}
	t.Logf("%d strangers, %d of them without a verdict", strangers, other)
	for _, i := range d.Nodes() {
		if v, err := d.attempt(i, d.alice); v != admitted {
			t.Errorf("n%d after the flood: %s: %v", i, v, err)
		}
	}
}
