package seal

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hpke"
	"crypto/sha256"
	"crypto/subtle"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/sig"
)

const (
	envelopeVersion = 1
	sealedSize      = 1120 + 32 + 16 // encapsulated key, room key, tag

	// EnvelopeSize is the length of every envelope.
	EnvelopeSize = 1 + 32 + 8 + sealedSize + ed25519.SignatureSize
)

// envelope is one as it is stored: what a reader knows anyway (room, epoch,
// roster, whom it is for) is in none of its bytes and in all of its proofs, so
// that there is nothing in it that could be believed.
//
//	01 | sender | n of the recipient's key, 8 bytes |
//	1168 bytes of HPKE: encapsulated key, then ciphertext | 64 bytes of signature
type envelope struct {
	sender    bus.UserKey
	n         uint64
	sealed    []byte
	signature []byte
}

func parseEnvelope(raw []byte) (e envelope, err error) {
	if len(raw) != EnvelopeSize || raw[0] != envelopeVersion {
		return e, bus.E(bus.Invalid, "these %d bytes are no envelope", len(raw))
	}
	p := &reader{rest: raw[1:]}
	e.sender, e.n, e.sealed, e.signature = p.user(), p.u64(), p.take(sealedSize), p.take(ed25519.SignatureSize)
	return e, bus.CheckUserKey(e.sender)
}

// envelopeContext is what an envelope is good for, and nothing else:
//
//	room, length and bytes | epoch, 8 bytes | hash of the roster | commitment |
//	recipient | n, 8 bytes | hash of the recipient's encryption key | sender
//
// HPKE's info is "unibus/v1/room-key" 00 and this; the sender signs
// "unibus/v1/envelope" 00, this, and the SHA-256 of the 1168 bytes.
func envelopeContext(r *Roster, to Member, sender bus.UserKey) []byte {
	if guard.Off(guard.EnvelopeContext) {
		return nil
	}
	b := appendU64(appendRoom(nil, r.Room), r.Epoch)
	b = append(append(b, r.hash[:]...), r.Commitment[:]...)
	b = appendU64(append(b, to.User[:]...), to.N)
	return append(append(b, to.Key[:]...), sender[:]...)
}

func envelopeSigned(context, sealed []byte) []byte {
	sum := sha256.Sum256(sealed)
	return append(append([]byte(domainEnvelope), context...), sum[:]...)
}

// SealEnvelope gives the key of the roster's epoch to one user. public is their
// encryption key, which the caller has verified. A user who is not in the
// roster gets it as a grant of history.
func SealEnvelope(s sig.Signer, r *Roster, k Key, user bus.UserKey, public bus.EncryptionKey) ([]byte, error) {
	to := Member{User: user, N: public.N, Key: HashOf(public.Public)}
	if m, ok := r.Member(user); ok && (m.N != to.N || m.Key != to.Key) {
		return nil, bus.E(bus.Conflict, "the roster names another encryption key of %s", user)
	}
	if k.Commitment(r.Room, r.Epoch) != r.Commitment {
		return nil, bus.E(bus.Internal, "the key is not that of the roster")
	}
	kem, kdf, aead := suite()
	pk, err := kem.NewPublicKey(public.Public)
	if err != nil {
		return nil, bus.E(bus.Invalid, "the encryption key of %s is none: %w", user, err)
	}
	context := envelopeContext(r, to, s.Key())
	sealed, err := hpke.Seal(pk, kdf, aead, append([]byte(domainRoomKey), context...), k[:])
	if err != nil {
		return nil, bus.E(bus.Internal, "seal a room key: %w", err)
	}
	signature, err := s.Sign(envelopeSigned(context, sealed))
	if err != nil {
		return nil, bus.E(bus.Internal, "sign an envelope: %w", err)
	}
	sender := s.Key()
	out := append([]byte{envelopeVersion}, sender[:]...)
	return append(append(appendU64(out, to.N), sealed...), signature...), nil
}

// CheckEnvelope verifies that an envelope is one that sender made for a user
// under this roster. It needs no secret: that the right key is inside, only the
// recipient sees.
func CheckEnvelope(raw []byte, r *Roster, sender, user bus.UserKey, public bus.EncryptionKey) error {
	e, err := parseEnvelope(raw)
	if err != nil {
		return err
	}
	return e.check(r, sender, Member{User: user, N: public.N, Key: HashOf(public.Public)})
}

func (e *envelope) check(r *Roster, sender bus.UserKey, to Member) error {
	if e.sender != sender || e.n != to.N || !ed25519.Verify(sender[:], envelopeSigned(envelopeContext(r, to, sender), e.sealed), e.signature) {
		return bus.E(bus.Unauthenticated, "the envelope of %s for epoch %d of room %s was not made by %s for that", to.User, r.Epoch, r.Room, sender)
	}
	return nil
}

// EnvelopeN is the number of the encryption key that opens an envelope.
func EnvelopeN(raw []byte) (uint64, error) {
	e, err := parseEnvelope(raw)
	return e.n, err
}

// OpenEnvelope takes the key out. r is the verified roster of the envelope's
// epoch, newest the newest verified one of the room. Only an owner gives keys:
// an owner in r, or, of what was before, one in newest.
func OpenEnvelope(raw []byte, p *PrivateKey, r, newest *Roster) (Key, error) {
	e, err := parseEnvelope(raw)
	if err != nil {
		return Key{}, err
	}
	if !r.IsOwner(e.sender) && !newest.IsOwner(e.sender) {
		return Key{}, bus.E(bus.Forbidden, "the envelope for epoch %d of room %s is from %s, who is no owner", r.Epoch, r.Room, e.sender)
	}
	_, hash := p.Public()
	to := Member{User: p.user, N: p.n, Key: hash}
	if m, ok := r.Member(p.user); ok && (m.N != to.N || m.Key != to.Key) {
		return Key{}, bus.E(bus.Unauthenticated, "the roster of room %s, epoch %d, names an encryption key that is not ours", r.Room, r.Epoch)
	}
	if err := e.check(r, e.sender, to); err != nil {
		return Key{}, err
	}
	_, kdf, aead := suite()
	plain, err := hpke.Open(p.key, kdf, aead, append([]byte(domainRoomKey), envelopeContext(r, to, e.sender)...), e.sealed)
	if err != nil || len(plain) != len(Key{}) {
		return Key{}, bus.E(bus.Unauthenticated, "the envelope for epoch %d of room %s does not open: %w", r.Epoch, r.Room, err)
	}
	k := Key(bytes.Clone(plain))
	have := k.Commitment(r.Room, r.Epoch)
	if subtle.ConstantTimeCompare(have[:], r.Commitment[:]) != 1 {
		return Key{}, bus.E(bus.Unauthenticated, "the envelope for epoch %d of room %s holds another key than the roster says: its sender gives different members different keys", r.Epoch, r.Room)
	}
	return k, nil
}
