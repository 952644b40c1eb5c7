package bus

import (
	"encoding/hex"
	"strings"

	"filippo.io/edwards25519"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus/guard"
)

// UserKey is a user's identity: the 32 bytes of an ed25519 public key. Storage
// and JSON spell it as 64 lower-case hex digits, NATS as an nkey U...; both
// are the same bytes. It is comparable and serves as a map key.
type UserKey [32]byte

// ParseUserKey accepts either spelling and refuses every key that does not
// belong to exactly one holder of a private key (see CheckUserKey).
func ParseUserKey(s string) (UserKey, error) {
	var k UserKey
	switch {
	case len(s) == 64 && s == strings.ToLower(s):
		b, err := hex.DecodeString(s)
		if err != nil {
			return UserKey{}, badKey()
		}
		copy(k[:], b)
	case len(s) == 56 && s[0] == 'U':
		b, err := nkeys.Decode(nkeys.PrefixByteUser, []byte(s))
		if err != nil || len(b) != len(k) {
			return UserKey{}, badKey()
		}
		copy(k[:], b)
	default:
		return UserKey{}, badKey()
	}
	if err := CheckUserKey(k); err != nil {
		return UserKey{}, err
	}
	return k, nil
}

func badKey() *Error {
	return E(Invalid, "a user key is 64 lower-case hex digits or an nkey U... of 56 characters").
		WithHint("unibusctl identity show FILE prints both")
}

// CheckUserKey refuses ed25519 encodings that anyone could sign for or that
// spell one point twice: points of low order (for them a fixed signature
// verifies every message, RFC 8032 section 5.1.7 without the cofactor check),
// non-canonical encodings, and bytes that are no point at all.
func CheckUserKey(k UserKey) error {
	if guard.Off(guard.LowOrderKey) {
		return nil
	}
	p, err := new(edwards25519.Point).SetBytes(k[:])
	if err != nil || !k.reduced() {
		return E(Invalid, "this user key is not a canonical ed25519 public key")
	}
	if new(edwards25519.Point).MultByCofactor(p).Equal(edwards25519.NewIdentityPoint()) == 1 {
		return E(Invalid, "this user key has low order: anyone could sign for it")
	}
	return nil
}

// reduced reports whether the y coordinate is less than the field's prime
// 2^255 - 19, by its bytes: to encode the point again and compare would double
// the time in which a View loads. The other encodings that spell a point twice,
// x = 0 with a sign, are of low order.
func (k UserKey) reduced() bool {
	for _, b := range k[1:31] {
		if b != 0xff {
			return true
		}
	}
	return k[31]&0x7f != 0x7f || k[0] < 0xed
}

// Hex is the spelling of storage and JSON.
func (k UserKey) Hex() string { return hex.EncodeToString(k[:]) }

// NKey is the spelling of NATS: U followed by 55 base32 characters.
func (k UserKey) NKey() string {
	b, err := nkeys.Encode(nkeys.PrefixByteUser, k[:])
	if err != nil { // only for a wrong prefix or length, which the type rules out
		return ""
	}
	return string(b)
}

// String returns NKey.
func (k UserKey) String() string { return k.NKey() }

// MarshalText writes the hex spelling.
func (k UserKey) MarshalText() ([]byte, error) { return []byte(k.Hex()), nil }

// UnmarshalText parses with ParseUserKey, so that no record can smuggle in a
// key that registration would refuse.
func (k *UserKey) UnmarshalText(b []byte) error {
	p, err := ParseUserKey(string(b))
	if err != nil {
		return err
	}
	*k = p
	return nil
}
