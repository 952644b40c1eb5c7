package bus

// NoticeKind is the last token of the subject of a notice.
type NoticeKind string

// What services tell a user of their own access.
const (
	NoticeAdded          NoticeKind = "added"          // to a room
	NoticeRemoved        NoticeKind = "removed"        // from a room
	NoticeRole           NoticeKind = "role"           // in a room is another one
	NoticeArchived       NoticeKind = "archived"       // the room is no more
	NoticeRekey          NoticeKind = "rekey"          // to an owner: the room may need another key
	NoticeReauthenticate NoticeKind = "reauthenticate" // a new connection may do more than the one there is
	NoticeRevoked        NoticeKind = "revoked"        // the user is, for good; their connections are about to be closed
)

// Notice is what is told on notice.<U>.<kind>. It is a hint and nothing else:
// nobody signs it, it grants nothing, it may be lost or come twice, and whoever
// forges one makes its reader ask once more. Revoked counts with the refusal that
// follows it, and not without.
type Notice struct {
	V       int      `json:"v"`
	Room    RoomID   `json:"room,omitempty"`
	Role    RoomRole `json:"role,omitempty"` // the new one; none if removed or archived
	Durable bool     `json:"durable"`        // the room keeps its messages
}
