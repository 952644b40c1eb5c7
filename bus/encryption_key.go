package bus

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"time"
)

// EncryptionKeySize is the length of a public key of the hybrid KEM
// MLKEM768X25519: 1184 bytes of ML-KEM-768 and 32 of X25519.
const EncryptionKeySize = 1184 + 32

// EncryptionKey is the key to which room keys are sealed for one user, bound to
// their identity by a signature, so that no server can put another one in its
// place. N counts the keys of one identity: a reader that has seen N accepts no
// lower one.
type EncryptionKey struct {
	N         uint64    `json:"n"` // from 1
	Public    []byte    `json:"public"`
	CreatedAt time.Time `json:"created_at"` // milliseconds
	Signature []byte    `json:"signature"`
}

// encryptionKeyDomain begins what is signed with a byte sequence that neither a
// NATS nonce nor an HTTP signature base can begin with.
const encryptionKeyDomain = "unibus/v1/encryption-key\x00"

// SignedBytes is what the identity key signs:
//
//	"unibus/v1/encryption-key" 00 | user, 32 bytes | n, 8 bytes big-endian |
//	created_at, Unix milliseconds, 8 bytes big-endian | public key
func (k EncryptionKey) SignedBytes(user UserKey) []byte {
	var b bytes.Buffer
	b.WriteString(encryptionKeyDomain)
	b.Write(user[:])
	b.Write(binary.BigEndian.AppendUint64(nil, k.N))
	b.Write(binary.BigEndian.AppendUint64(nil, uint64(k.CreatedAt.UnixMilli())))
	b.Write(k.Public)
	return b.Bytes()
}

// Verify checks that the key is one and that user has signed for it.
func (k EncryptionKey) Verify(user UserKey) error {
	switch {
	case k.N == 0:
		return E(Invalid, "an encryption key is counted from 1")
	case len(k.Public) != EncryptionKeySize:
		return E(Invalid, "an encryption key has %d bytes, not %d", EncryptionKeySize, len(k.Public))
	case k.CreatedAt.UnixMilli() < 0 || k.CreatedAt.UTC().Year() > 9999:
		return E(Invalid, "an encryption key has a time between 1970 and 9999")
	case len(k.Signature) != ed25519.SignatureSize || !ed25519.Verify(user[:], k.SignedBytes(user), k.Signature):
		return E(Invalid, "the encryption key is not signed by %s", user)
	}
	return nil
}
