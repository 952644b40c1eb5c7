package bus

import (
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// RoomID names a room for ever: an archived id is never used again.
type RoomID string

// ParseRoomID refuses everything that could span or leave a subject token.
func ParseRoomID(s string) (RoomID, error) {
	if !isRoomID(s) {
		return "", E(Invalid, "room id %s is refused: a room id is 1 to 32 of a-z 0-9 - and starts with a letter or digit", quoted(s))
	}
	return RoomID(s), nil
}

// isRoomID matches ^[a-z0-9][a-z0-9-]{0,31}$ by hand: a View that loads asks it
// for every membership.
func isRoomID(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && (c != '-' || i == 0) {
			return false
		}
	}
	return 1 <= len(s) && len(s) <= 32
}

// RoomRole is what a member may do in one room. Each role includes the ones
// before it.
type RoomRole string

// The room roles, weakest first.
const (
	Reader RoomRole = "reader"
	Writer RoomRole = "writer"
	Owner  RoomRole = "owner"
)

// ParseRoomRole accepts the known room roles only.
func ParseRoomRole(s string) (RoomRole, error) {
	switch r := RoomRole(s); r {
	case Reader, Writer, Owner:
		return r, nil
	}
	return "", E(Invalid, "room role %s is refused: a room role is reader, writer or owner", quoted(s))
}

// MayPublish reports whether the role may send into the room.
func (r RoomRole) MayPublish() bool { return r == Writer || r == Owner }

// Rank orders the roles: 0 for none or unknown, then reader, writer, owner. A
// change to a lower rank narrows access.
func (r RoomRole) Rank() int {
	switch r {
	case Reader:
		return 1
	case Writer:
		return 2
	case Owner:
		return 3
	}
	return 0
}

// RoomStatus is where a room stands. Archived is final.
type RoomStatus string

// The states of a room.
const (
	RoomActive   RoomStatus = "active"
	RoomArchived RoomStatus = "archived"
)

// RoomVersion and MembershipVersion are the record versions this build writes
// and understands, with the meaning of UserVersion.
const (
	RoomVersion       = 1
	MembershipVersion = 1
)

// MaxRoomsPerUser bounds the subjects of one connection: each room costs the
// servers about 8 us and 2 KiB per connection.
const MaxRoomsPerUser = 500

// MaxDescription bounds what a room says of itself, in characters.
const MaxDescription = 200

// ParseDescription accepts one line of printable text: it is shown in
// terminals, where control bytes would move the cursor.
func ParseDescription(s string) (string, error) {
	if !utf8.ValidString(s) || utf8.RuneCountInString(s) > MaxDescription || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		// It may be anything that was pasted, so it is not repeated.
		return "", E(Invalid, "a description is one line of at most %d printable characters", MaxDescription)
	}
	return s, nil
}

// Room is the record of one room, as stored under its id in KV_UNIBUS_rooms.
// Durable and Encrypted are fixed at creation.
type Room struct {
	V           int        `json:"v"`
	ID          RoomID     `json:"room"`
	Status      RoomStatus `json:"status"`
	Durable     bool       `json:"durable"`
	Encrypted   bool       `json:"encrypted"`
	Description string     `json:"description,omitempty"`
	Creator     UserKey    `json:"creator"`
	CreatedAt   time.Time  `json:"created_at"`
	ArchivedAt  *time.Time `json:"archived_at,omitempty"`
	Retention   Retention  `json:"retention,omitzero"` // of a durable room; what is zero is the default
	Purged      bool       `json:"purged,omitempty"`   // archived, and what it has stored is to go
}

// Validate checks every field that a decision rests on.
func (r Room) Validate() error {
	if r.V != RoomVersion {
		return E(Invalid, "room record version %d is not %d", r.V, RoomVersion)
	}
	if _, err := ParseRoomID(string(r.ID)); err != nil {
		return err
	}
	if r.Status != RoomActive && r.Status != RoomArchived {
		return E(Invalid, "unknown room status %s", quoted(string(r.Status)))
	}
	return nil
}

// MembershipStatus tells a present member from one who left or was removed;
// the record of the latter stays, so that nothing is ever inferred from the
// absence of a record.
type MembershipStatus string

// The states of a membership.
const (
	Present MembershipStatus = "present"
	Removed MembershipStatus = "removed"
)

// Membership is the record that makes a user a member of a room, as stored
// under <room>.<user hex> in KV_UNIBUS_members: the authority on membership.
type Membership struct {
	V         int              `json:"v"`
	Room      RoomID           `json:"room"`
	User      UserKey          `json:"user"`
	Role      RoomRole         `json:"role"`
	Status    MembershipStatus `json:"status"`
	AddedAt   time.Time        `json:"added_at"`
	AddedBy   string           `json:"added_by,omitempty"` // nkey of who added, or "direct"
	RemovedAt *time.Time       `json:"removed_at"`
}

// Validate checks every field that a decision rests on.
func (m Membership) Validate() error {
	if m.V != MembershipVersion {
		return E(Invalid, "membership record version %d is not %d", m.V, MembershipVersion)
	}
	if _, err := ParseRoomID(string(m.Room)); err != nil {
		return err
	}
	if err := CheckUserKey(m.User); err != nil {
		return err
	}
	if _, err := ParseRoomRole(string(m.Role)); err != nil {
		return err
	}
	if m.Status != Present && m.Status != Removed {
		return E(Invalid, "unknown membership status %s", quoted(string(m.Status)))
	}
	return nil
}

// quoted shows hostile input on one bounded line: control bytes and escapes
// must not forge log lines or move a terminal's cursor.
func quoted(s string) string {
	const most = 64
	if len(s) > most {
		return fmt.Sprintf("%q...", strings.ToValidUTF8(s[:most], "?"))
	}
	return fmt.Sprintf("%q", s)
}
