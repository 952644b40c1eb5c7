package sig

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"

	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
)

// Signer signs with an identity. *Identity implements it; so may something
// that keeps the private key elsewhere. It is safe for concurrent use.
type Signer interface {
	Key() bus.UserKey
	Sign(message []byte) ([]byte, error)
}

// Identity is a user's private key. It is safe for concurrent use.
type Identity struct {
	key     bus.UserKey
	private ed25519.PrivateKey // expanded: nkeys would derive it for each signature
}

// ParseIdentity reads what an identity file holds: one nkey seed SU..., with
// white space around it. Its errors never quote it.
func ParseIdentity(seed []byte) (*Identity, error) {
	prefix, raw, err := nkeys.DecodeSeed(bytes.TrimSpace(seed))
	if err != nil || len(raw) != ed25519.SeedSize {
		return nil, bus.E(bus.Invalid, "this is no nkey seed: one line SU... is expected").
			WithHint("unibusctl identity new --out FILE")
	}
	if prefix != nkeys.PrefixByteUser {
		return nil, bus.E(bus.Invalid, "this is the seed of a key of type %s, not of a user (SU...)", prefix)
	}
	id := &Identity{private: ed25519.NewKeyFromSeed(raw)}
	copy(id.key[:], id.private[ed25519.SeedSize:])
	return id, nil
}

// Key is the public half.
func (id *Identity) Key() bus.UserKey { return id.key }

// Sign signs message as it is. Whoever calls it makes sure that message cannot
// be taken for something else that the same key signs: see ADR 0007.
func (id *Identity) Sign(message []byte) ([]byte, error) {
	return ed25519.Sign(id.private, message), nil
}

// Derive is a secret that only this identity can derive, another one for each
// purpose: HKDF with SHA-256 over the 32 bytes of the seed, no salt, purpose as
// info. It serves to make keys of other kinds, so that a user has one file to
// keep. What is derived tells nothing about the seed.
func (id *Identity) Derive(purpose []byte) (out [32]byte, err error) {
	secret, err := hkdf.Key(sha256.New, id.private.Seed(), nil, string(purpose), len(out))
	if err != nil {
		return out, bus.E(bus.Internal, "derive a key: %w", err)
	}
	copy(out[:], secret)
	return out, nil
}

// Format prints the public half, whatever the verb: a private key that reaches
// a log by way of %v is lost.
func (id Identity) Format(s fmt.State, _ rune) { fmt.Fprint(s, id.key.NKey()) }

// NewNonce returns 128 bits of r as 22 characters of base64url.
func NewNonce(r io.Reader) (string, error) {
	var b [16]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return "", bus.E(bus.Internal, "no randomness for a nonce: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(b[:]), nil
}
