package bus

import (
	"strconv"
	"strings"
	"testing"

	"github.com/nats-io/nkeys"
)

// Whoever hears many messages learns of each sender once, and of no sender what
// ParseRoomSubject would refuse; what is remembered is bounded.
func TestSenders(t *testing.T) {
	var s Senders
	kp, _ := nkeys.CreateUser()
	pub, _ := kp.PublicKey()
	k, err := ParseUserKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		room, user, topic, err := s.ParseRoomSubject("feed.ops." + k.NKey() + ".a.b")
		if err != nil || room != "ops" || user != k || topic != "a.b" {
			t.Errorf("%s %s %s %v", room, user, topic, err)
		}
	}
	for _, token := range []string{k.Hex(), strings.ToLower(k.NKey()), k.NKey()[:55] + "A", "", "x"} {
		if _, err := s.Key(token); CodeOf(err) != Invalid {
			t.Errorf("%q is a sender: %v", token, err)
		}
	}
	if len(s.known) != 1 {
		t.Errorf("%d senders are remembered", len(s.known))
	}
	s.known = map[string]UserKey{}
	for i := range manySenders {
		s.known[strconv.Itoa(i)] = UserKey{}
	}
	if got, err := s.Key(k.NKey()); err != nil || got != k || len(s.known) != 1 {
		t.Errorf("beyond what is remembered: %v %v, %d", got, err, len(s.known))
	}
}

// BenchmarkSenders is what it costs to know who sent a message.
func BenchmarkSenders(b *testing.B) {
	kp, _ := nkeys.CreateUser()
	pub, _ := kp.PublicKey()
	subject := "feed.ops." + pub + ".a.b"
	b.Run("unknown", func(b *testing.B) {
		for b.Loop() {
			_, _, _, _ = ParseRoomSubject(subject)
		}
	})
	b.Run("known", func(b *testing.B) {
		var s Senders
		for b.Loop() {
			_, _, _, _ = s.ParseRoomSubject(subject)
		}
	})
}
