package seal

import (
	"crypto/hpke"
	"crypto/sha256"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
)

// The one suite of HPKE (RFC 9180, base mode): MLKEM768-X25519 (X-Wing, KEM
// 0x647a), HKDF-SHA256 (0x0001), ChaCha20-Poly1305 (0x0003). Who records the
// traffic today and has a quantum computer later gets no room key.
func suite() (hpke.KEM, hpke.KDF, hpke.AEAD) {
	return hpke.MLKEM768X25519(), hpke.HKDFSHA256(), hpke.ChaCha20Poly1305()
}

// Identity is what a member brings: it signs, and it derives secrets that it
// alone can derive. *sig.Identity is one.
type Identity interface {
	sig.Signer
	Derive(purpose []byte) ([32]byte, error)
}

// PrivateKey opens envelopes. It is derived, so there is nothing to store and
// nothing to lose but the identity.
type PrivateKey struct {
	user bus.UserKey
	n    uint64
	key  hpke.PrivateKey
}

// NewPrivateKey derives the n-th encryption key of an identity, from 1. Its
// X-Wing seed is the identity's secret for
//
//	"unibus/v1/encryption-seed" 00 | n, 8 bytes
func NewPrivateKey(id Identity, n uint64) (*PrivateKey, error) {
	if n == 0 {
		return nil, bus.E(bus.Invalid, "an encryption key is counted from 1")
	}
	seed, err := id.Derive(appendU64([]byte(domainIdentity), n))
	if err != nil {
		return nil, bus.E(bus.Internal, "derive an encryption key: %w", err)
	}
	kem, _, _ := suite()
	key, err := kem.NewPrivateKey(seed[:])
	if err != nil {
		return nil, bus.E(bus.Internal, "derive an encryption key: %w", err)
	}
	return &PrivateKey{user: id.Key(), n: n, key: key}, nil
}

// N is the key's number.
func (p *PrivateKey) N() uint64 { return p.n }

// Public is what others seal to, and the hash by which rosters name it.
func (p *PrivateKey) Public() (public []byte, hash Hash) {
	public = p.key.PublicKey().Bytes()
	return public, HashOf(public)
}

// HashOf is how a roster names an encryption key.
func HashOf(public []byte) Hash { return sha256.Sum256(public) }

// Bind signs the public half, so that it can be published.
func (p *PrivateKey) Bind(id sig.Signer, created time.Time) (bus.EncryptionKey, error) {
	public, _ := p.Public()
	k := bus.EncryptionKey{N: p.n, Public: public, CreatedAt: created.UTC().Truncate(time.Millisecond)}
	var err error
	if k.Signature, err = id.Sign(k.SignedBytes(p.user)); err != nil {
		return bus.EncryptionKey{}, bus.E(bus.Internal, "sign an encryption key: %w", err)
	}
	return k, k.Verify(p.user)
}
