package seal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strings"

	"unibus.internal/bus"
)

// UserNumber is what two users read to each other to know that each has the
// other's true key: both see the same 40 digits, in eight groups of five. It is
// 132 bits long: somebody between them would have to find, out of all the keys
// they may make for either side, two that give one number, which takes 2^66 of
// them.
//
//	SHA-256 of "unibus/v1/user-number" 00 | the lesser key | the greater key
//
// of which each group takes 4 bytes, big-endian, modulo 100000.
func UserNumber(a, b bus.UserKey) string {
	if bytes.Compare(a[:], b[:]) > 0 {
		a, b = b, a
	}
	return number(append(append([]byte(domainUserNumber), a[:]...), b[:]...))
}

// RoomNumber is what members read to each other to know that they see the same
// room: its roster, and so all rosters before it.
//
//	SHA-256 of "unibus/v1/room-number" 00 | room, length and bytes | epoch, 8 bytes | hash of the roster
func RoomNumber(r *Roster) string {
	h := r.Hash()
	return number(append(appendU64(appendRoom([]byte(domainRoomNumber), r.Room), r.Epoch), h[:]...))
}

func number(of []byte) string {
	sum := sha256.Sum256(of)
	groups := make([]string, 8)
	for i := range groups {
		groups[i] = fmt.Sprintf("%05d", binary.BigEndian.Uint32(sum[4*i:])%100000)
	}
	return strings.Join(groups, " ")
}
