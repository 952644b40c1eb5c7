package bus_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"filippo.io/edwards25519"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
)

// lowOrder are the encodings of the points of order 1, 2, 4 and 8, canonical
// and not: for each of them somebody without a private key can sign.
var lowOrder = []string{
	"0100000000000000000000000000000000000000000000000000000000000000",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0000000000000000000000000000000000000000000000000000000000000080",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
	"0100000000000000000000000000000000000000000000000000000000000080",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
}

func TestKeysThatAnyoneCouldSignForAreRefused(t *testing.T) {
	for _, h := range lowOrder {
		if _, err := bus.ParseUserKey(h); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%s: %v, want invalid", h, err)
		}
		raw, _ := hex.DecodeString(h)
		n, err := nkeys.Encode(nkeys.PrefixByteUser, raw)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := bus.ParseUserKey(string(n)); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%s as nkey: %v, want invalid", h, err)
		}
	}
}

// TestCheckUserKeyAgreesWithThePoint compares with the encoding of the point
// itself, near the field's prime, where points have two, and at random.
func TestCheckUserKeyAgreesWithThePoint(t *testing.T) {
	var keys []bus.UserKey
	for low := range 256 {
		for _, next := range []byte{0x00, 0xfe, 0xff} {
			for _, top := range []byte{0x00, 0x7e, 0x7f, 0x80, 0xfe, 0xff} {
				k := bus.UserKey(bytes.Repeat([]byte{0xff}, 32))
				k[0], k[1], k[31] = byte(low), next, top
				keys = append(keys, k)
			}
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		var k bus.UserKey
		for i := range k {
			k[i] = byte(random.Uint32())
		}
		keys = append(keys, k)
	}
	good := 0
	for _, k := range keys {
		p, err := new(edwards25519.Point).SetBytes(k[:])
		want := err == nil && bytes.Equal(p.Bytes(), k[:]) && new(edwards25519.Point).MultByCofactor(p).Equal(edwards25519.NewIdentityPoint()) == 0
		if got := bus.CheckUserKey(k) == nil; got != want {
			t.Errorf("%s: accepted %t, want %t", k.Hex(), got, want)
		}
		if want {
			good++
		}
	}
	if good < len(keys)/4 || good == len(keys) {
		t.Errorf("%d of %d keys are good: the test compares nothing", good, len(keys))
	}
}

func TestUserKeyHasTwoSpellings(t *testing.T) {
	kp, _ := nkeys.CreateUser()
	pub, _ := kp.PublicKey()
	k, err := bus.ParseUserKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := bus.ParseUserKey(k.Hex()); err != nil || again != k || again.NKey() != pub {
		t.Errorf("hex spelling: %v, %v", again, err)
	}
	for _, bad := range []string{"", "x", strings.ToUpper(k.Hex()), k.Hex()[:62], pub[:55], pub + "A", strings.ToLower(pub), "A" + pub[1:], k.Hex() + "\n", " " + k.Hex()} {
		if _, err := bus.ParseUserKey(bad); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%q: %v, want invalid", bad, err)
		}
	}
}

func TestNamesThatCouldLeaveTheirTokenAreRefused(t *testing.T) {
	for _, bad := range []string{
		"", "a.b", "a*", ">", "*", "a b", "a\tb", "a\nb", "a\r", "\x00", "A", "Alice", "ä", "-", "$KV", "a/b", strings.Repeat("a", 33), "a\x1b[31m",
	} {
		if _, err := bus.ParseHandle(bad); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("handle %q is accepted", bad)
		}
		if _, err := bus.ParseRoomID(bad); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("room id %q is accepted", bad)
		}
		if _, err := bus.ParseTopic(bad); bad != "A" && bad != "Alice" && bad != "a.b" && bad != "-" && len(bad) != 33 && bus.CodeOf(err) != bus.Invalid {
			t.Errorf("topic %q is accepted", bad)
		}
		if err := func() error { _, err := bus.ParseHandle(bad); return err }(); err != nil && strings.ContainsAny(err.Error(), "\n\r\x1b\x00") {
			t.Errorf("the error for %q carries its control bytes", bad)
		}
	}
	for _, bad := range []string{"_x", "9lives", "_"} {
		if _, err := bus.ParseHandle(bad); err == nil {
			t.Errorf("handle %q is accepted", bad)
		}
	}
	for _, good := range []string{"a", "alice", "a_b-9", strings.Repeat("a", 32)} {
		if _, err := bus.ParseHandle(good); err != nil {
			t.Errorf("handle %q: %v", good, err)
		}
	}
	for _, good := range []string{"9", "ops", "a-b", strings.Repeat("0", 32)} {
		if _, err := bus.ParseRoomID(good); err != nil {
			t.Errorf("room id %q: %v", good, err)
		}
	}
	for _, bad := range []string{".a", "a.", "a..b", "a.>", "a.*", strings.Repeat("a", 65), strings.Repeat("a.", 16) + "a"} {
		if _, err := bus.ParseTopic(bad); err == nil {
			t.Errorf("topic %q is accepted", bad)
		}
	}
}

func TestForeignErrorsAreNeverADecision(t *testing.T) {
	if got := bus.CodeOf(errors.New("x")); got != bus.Internal {
		t.Errorf("code = %s", got)
	}
	cause := errors.New("cause")
	e := bus.E(bus.Unavailable, "no quorum: %w", cause)
	if !errors.Is(e, cause) || bus.CodeOf(e.WithHint("x")) != bus.Unavailable {
		t.Error("cause or code is lost")
	}
}

func TestActiveAt(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		status  bus.Status
		expires time.Duration
		want    bool
	}{
		{bus.Active, 0, true},
		{bus.Active, time.Hour, true},
		{bus.Active, -time.Nanosecond, false},
		{bus.Suspended, time.Hour, false},
		{bus.Revoked, time.Hour, false},
		{"", 0, false},
	} {
		u := bus.User{Status: c.status}
		if c.expires != 0 {
			at := now.Add(c.expires)
			u.ExpiresAt = &at
		}
		if got := u.ActiveAt(now); got != c.want {
			t.Errorf("%+v: active = %v", c, got)
		}
	}
	at := now
	if (bus.User{Status: bus.Active, ExpiresAt: &at}).ActiveAt(now) {
		t.Error("active at the moment of expiry")
	}
}

func FuzzParseNeverYieldsASubjectMetacharacter(f *testing.F) {
	f.Add("ops")
	f.Add("a.b")
	f.Add("ä>")
	f.Fuzz(func(t *testing.T, s string) {
		h, err1 := bus.ParseHandle(s)
		r, err2 := bus.ParseRoomID(s)
		if err1 == nil && strings.ContainsAny(string(h), ".*> \t\r\n$") || err2 == nil && strings.ContainsAny(string(r), ".*> \t\r\n$") {
			t.Errorf("%q passes", s)
		}
		if top, err := bus.ParseTopic(s); err == nil && (strings.ContainsAny(top, "*> \t\r\n$") || strings.Contains(top, "..")) {
			t.Errorf("topic %q passes", s)
		}
		if k, err := bus.ParseUserKey(s); err == nil && (len(k.NKey()) != 56 || strings.ContainsAny(k.NKey(), ".*>")) {
			t.Errorf("key %q passes", s)
		}
	})
}
