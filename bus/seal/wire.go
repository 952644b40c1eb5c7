package seal

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"

	"unibus.internal/bus"
)

// The beginnings of what is signed, hashed or derived: no two purposes share
// one, and the byte 0 ends each, so none is the beginning of another.
const (
	domainIdentity    = "unibus/v1/encryption-seed\x00"
	domainRoster      = "unibus/v1/roster\x00"
	domainAppointment = "unibus/v1/appointment\x00"
	domainRoomKey     = "unibus/v1/room-key\x00"
	domainEnvelope    = "unibus/v1/envelope\x00"
	domainMessage     = "unibus/v1/message\x00"
	domainFile        = "unibus/v1/file\x00"
	domainUserNumber  = "unibus/v1/user-number\x00"
	domainRoomNumber  = "unibus/v1/room-number\x00"
)

// Hash is a SHA-256, in JSON and text 64 lower-case hex digits.
type Hash [sha256.Size]byte

// String is the hex spelling.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText writes the hex spelling.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads the hex spelling.
func (h *Hash) UnmarshalText(b []byte) error {
	raw, err := hex.DecodeString(string(b))
	if err != nil || len(raw) != len(h) || !bytes.Equal(b, bytes.ToLower(b)) {
		return bus.E(bus.Invalid, "a hash is 64 lower-case hex digits")
	}
	copy(h[:], raw)
	return nil
}

// Key is the key of one epoch of one room.
type Key [32]byte

// NewKey takes a key from r.
func NewKey(r io.Reader) (k Key, err error) {
	if _, err := io.ReadFull(r, k[:]); err != nil {
		return Key{}, bus.E(bus.Internal, "no randomness for a room key: %w", err)
	}
	return k, nil
}

// Format prints no key, whatever the verb: one that reaches a log by way of %v
// is lost.
func (Key) Format(s fmt.State, _ rune) { fmt.Fprint(s, "(room key)") }

// Derive is the key for one purpose, one or more of a-z and -: nothing is
// encrypted under an epoch's key itself. HKDF-Expand with SHA-256 and as info
//
//	"unibus/v1/" | purpose | 00 | room, with its length before it as one byte | epoch, 8 bytes
func (k Key) Derive(purpose string, room bus.RoomID, epoch uint64) [32]byte {
	info := appendU64(appendRoom([]byte("unibus/v1/"+purpose+"\x00"), room), epoch)
	// Expand fails only for more output than 255 blocks.
	out, _ := hkdf.Expand(sha256.New, k[:], string(info), 32)
	return [32]byte(out)
}

// Commitment is what a roster says of the key without telling it: nobody can
// give two members two keys under one roster. ChaCha20-Poly1305 alone would let
// one message open under two keys.
func (k Key) Commitment(room bus.RoomID, epoch uint64) Hash {
	return Hash(k.Derive("commitment", room, epoch))
}

func appendRoom(b []byte, room bus.RoomID) []byte {
	return append(append(b, byte(len(room))), room...)
}

func appendU64(b []byte, n uint64) []byte { return binary.BigEndian.AppendUint64(b, n) }

// reader takes a format apart. After the first failure it only fails.
type reader struct {
	rest []byte
	bad  bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n > len(r.rest) {
		r.bad = true
		return make([]byte, min(n, 64)) // so that callers need not look each time
	}
	out := r.rest[:n]
	r.rest = r.rest[n:]
	return out
}

func (r *reader) u8() byte { return r.take(1)[0] }

func (r *reader) u32() uint32 { return binary.BigEndian.Uint32(r.take(4)) }

func (r *reader) u64() uint64 { return binary.BigEndian.Uint64(r.take(8)) }

func (r *reader) hash() Hash { return Hash(r.take(32)) }

func (r *reader) user() bus.UserKey { return bus.UserKey(r.take(32)) }

func (r *reader) literal(s string) {
	if string(r.take(len(s))) != s {
		r.bad = true
	}
}
