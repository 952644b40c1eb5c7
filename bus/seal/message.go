package seal

import (
	"crypto/ed25519"
	"encoding/binary"
	"io"
	"math"
	"sync"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/sig"
)

const (
	messageVersion = 1
	headerSize     = 1 + 8 + sessionSize + 8 + 8 + chacha20poly1305.NonceSizeX
	sessionSize    = 16

	// MessageOverhead is by how much an encrypted message is longer than what is
	// in it.
	MessageOverhead = headerSize + ed25519.SignatureSize + chacha20poly1305.Overhead
)

// Session names one run of one sender: counters begin anew with each.
type Session [sessionSize]byte

// Epoch is a roster with its key: what messages are encrypted under.
type Epoch struct {
	Roster *Roster
	Key    Key
}

// Sender encrypts messages of one member in one room. It counts them, so that a
// reader sees what is missing, what comes twice and what comes late.
type Sender struct {
	signer sig.Signer
	random io.Reader
	now    func() time.Time

	mu      sync.Mutex
	session Session
	counter uint64
}

// NewSender begins a session. random must be safe for concurrent use.
func NewSender(s sig.Signer, random io.Reader, now func() time.Time) (*Sender, error) {
	out := &Sender{signer: s, random: random, now: now}
	if _, err := io.ReadFull(random, out.session[:]); err != nil {
		return nil, bus.E(bus.Internal, "no randomness for a session: %w", err)
	}
	return out, nil
}

// Seal encrypts one message. The bytes:
//
//	01 | epoch, 8 bytes | session, 16 bytes | counter, 8 bytes, from 1 |
//	sent_at, Unix milliseconds, 8 bytes | nonce, 24 bytes |
//	XChaCha20-Poly1305 of (signature, 64 bytes | payload)
//
// The key is Key.Derive("message-key"). The associated data:
//
//	"unibus/v1/message" 00 | room, length and bytes | hash of the roster |
//	sender | topic, with its length before it as two bytes | the 65 bytes of the
//	header: everything before the ciphertext
//
// The signature is the sender's over the associated data and the payload: all
// members have the key, so the key alone would let each speak for every other.
func (s *Sender) Seal(e Epoch, topic string, payload []byte) ([]byte, error) {
	if m, ok := e.Roster.Member(s.signer.Key()); !ok || !m.Role.MayPublish() {
		return nil, bus.E(bus.Forbidden, "the roster of room %s, epoch %d, does not let %s write", e.Roster.Room, e.Roster.Epoch, s.signer.Key())
	}
	if len(topic) > math.MaxUint16 {
		return nil, bus.E(bus.Invalid, "a topic of %d bytes is too long", len(topic))
	}
	s.mu.Lock()
	s.counter++
	counter := s.counter
	s.mu.Unlock()
	h := appendU64([]byte{messageVersion}, e.Roster.Epoch)
	h = appendU64(append(h, s.session[:]...), counter)
	h = appendU64(h, uint64(s.now().UnixMilli()))
	h = append(h, make([]byte, chacha20poly1305.NonceSizeX)...)
	nonce := h[headerSize-chacha20poly1305.NonceSizeX:]
	if _, err := io.ReadFull(s.random, nonce); err != nil {
		return nil, bus.E(bus.Internal, "no randomness for a message: %w", err)
	}
	ad := messageData(e.Roster, s.signer.Key(), topic, h)
	signature, err := s.signer.Sign(append(ad[:len(ad):len(ad)], payload...))
	if err != nil || len(signature) != ed25519.SignatureSize {
		return nil, bus.E(bus.Internal, "sign a message: %w", err)
	}
	key := e.Key.Derive("message-key", e.Roster.Room, e.Roster.Epoch)
	aead, err := chacha20poly1305.NewX(key[:])
	if err != nil {
		return nil, bus.E(bus.Internal, "encrypt a message: %w", err)
	}
	out := append(make([]byte, 0, MessageOverhead+len(payload)), h...)
	return aead.Seal(out, nonce, append(signature, payload...), ad), nil
}

func messageData(r *Roster, sender bus.UserKey, topic string, header []byte) []byte {
	b := appendRoom([]byte(domainMessage), r.Room)
	b = append(append(b, r.hash[:]...), sender[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(topic))) //nolint:gosec // callers bound it
	return append(append(b, topic...), header...)
}

// Message is one that was opened.
type Message struct {
	Epoch   uint64
	Session Session
	Counter uint64
	SentAt  time.Time // by the sender's clock
	Payload []byte
}

// MessageEpoch is the epoch under which a message says to be encrypted: which
// key to look for. Nothing is proven yet.
func MessageEpoch(raw []byte) (uint64, error) {
	if len(raw) < MessageOverhead || raw[0] != messageVersion {
		return 0, bus.E(bus.Invalid, "this is no encrypted message")
	}
	return binary.BigEndian.Uint64(raw[1:]), nil
}

// Open decrypts a message and proves that sender sent it into this room, under
// this topic and roster, as somebody who may. Whether it came before, a Tracker
// says.
func (e Epoch) Open(sender bus.UserKey, topic string, raw []byte) (Message, error) {
	epoch, err := MessageEpoch(raw)
	if err != nil {
		return Message{}, err
	}
	r := e.Roster
	if epoch != r.Epoch {
		return Message{}, bus.E(bus.Invalid, "the message is of epoch %d, not %d", epoch, r.Epoch)
	}
	if m, ok := r.Member(sender); !ok || !m.Role.MayPublish() {
		return Message{}, bus.E(bus.Forbidden, "the roster of room %s, epoch %d, does not let %s write", r.Room, r.Epoch, sender)
	}
	if len(topic) > math.MaxUint16 {
		return Message{}, bus.E(bus.Invalid, "a topic of %d bytes is too long", len(topic))
	}
	header := raw[:headerSize]
	key := e.Key.Derive("message-key", r.Room, r.Epoch)
	aead, err := chacha20poly1305.NewX(key[:])
	if err != nil {
		return Message{}, bus.E(bus.Internal, "decrypt a message: %w", err)
	}
	ad := messageData(r, sender, topic, header)
	plain, err := aead.Open(nil, header[headerSize-chacha20poly1305.NonceSizeX:], raw[headerSize:], ad)
	if err != nil {
		return Message{}, bus.E(bus.Unauthenticated, "a message of %s in room %s does not open: it was not sent there and so, or was changed", sender, r.Room)
	}
	signature, payload := plain[:ed25519.SignatureSize], plain[ed25519.SignatureSize:]
	if !ed25519.Verify(sender[:], append(ad[:len(ad):len(ad)], payload...), signature) && !guard.Off(guard.MessageSender) {
		return Message{}, bus.E(bus.Unauthenticated, "a message in room %s was not sent by %s but by another member in their name", r.Room, sender)
	}
	p := &reader{rest: header[9:]}
	m := Message{Epoch: epoch, Session: Session(p.take(sessionSize)), Counter: p.u64(), Payload: payload}
	millis := p.u64()
	if m.Counter == 0 || millis > 1<<53 {
		return Message{}, bus.E(bus.Invalid, "a message of %s in room %s counts or dates wrongly", sender, r.Room)
	}
	m.SentAt = time.UnixMilli(int64(millis)).UTC()
	return m, nil
}
