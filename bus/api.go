package bus

import "time"

// This file is the documents of the HTTP API: what membership answers, what
// the SDK returns and what unibusctl prints with --json, so that the three
// cannot drift apart. Times are UTC; lists are never null.

// UserInfo is one user as programs see it.
type UserInfo struct {
	SignPub   UserKey    `json:"sign_pub"`
	NKey      string     `json:"nkey"`
	Handle    Handle     `json:"handle"`
	Role      Role       `json:"role"`
	Status    Status     `json:"status"`
	ExpiresAt *time.Time `json:"expires_at"`
	CreatedAt time.Time  `json:"created_at"`
	RevokedAt *time.Time `json:"revoked_at"`
	Revision  uint64     `json:"revision"`
}

// UserDetail is one user with what belongs to them.
type UserDetail struct {
	UserInfo
	Rooms         []RoomGrant    `json:"rooms"`
	EncryptionKey *EncryptionKey `json:"encryption_key"`
	RotatedTo     *UserKey       `json:"rotated_to"` // the key that has taken over handle, role and rooms
}

// RoomGrant is one active room in which a user is present.
type RoomGrant struct {
	Room      RoomID   `json:"room"`
	Role      RoomRole `json:"role"`
	Durable   bool     `json:"durable"`
	Encrypted bool     `json:"encrypted"`
}

// RoomInfo is one room.
type RoomInfo struct {
	Room        RoomID     `json:"room"`
	Status      RoomStatus `json:"status"`
	Durable     bool       `json:"durable"`
	Encrypted   bool       `json:"encrypted"`
	Description string     `json:"description"`
	Creator     UserKey    `json:"creator"`
	CreatedAt   time.Time  `json:"created_at"`
	ArchivedAt  *time.Time `json:"archived_at"`
	Retention   *Retention `json:"retention"` // null: the room is not durable
	Purged      bool       `json:"purged"`    // what it had stored is gone, or going
	Members     int        `json:"members"`   // those present
	Revision    uint64     `json:"revision"`
}

// RoomDetail is a room with those who are present in it: their list takes the
// place of the number that RoomInfo gives under the same name.
type RoomDetail struct {
	RoomInfo
	Members []MemberInfo `json:"members"`
}

// RoomKeys is what the servers have of the keys of an encrypted room, as one
// member may see it. None of it is to be believed before it is verified: see
// package seal.
type RoomKeys struct {
	Room          RoomID          `json:"room"`
	Creator       UserKey         `json:"creator"`
	Epoch         uint64          `json:"epoch"`          // the newest; 0: the room has no key yet
	RekeyRequired bool            `json:"rekey_required"` // an owner is to make the next epoch
	Why           []RekeyReason   `json:"why"`
	Waiting       []WaitingMember `json:"waiting"` // members whom no owner has admitted to the newest roster
	Epochs        []RoomEpoch     `json:"epochs"`  // in order
	Next          uint64          `json:"next"`    // the epoch after which the next page begins; 0 at the end
}

// RoomEpoch is one epoch of a room.
type RoomEpoch struct {
	Epoch     uint64    `json:"epoch"`
	Roster    []byte    `json:"roster"`
	Envelope  []byte    `json:"envelope,omitempty"` // the caller's; absent: there is none
	CreatedAt time.Time `json:"created_at"`
}

// RekeyWhy is a reason for the next epoch.
type RekeyWhy string

// The reasons. Most are of somebody who is in the newest roster.
const (
	RekeyFirst      RekeyWhy = "no_key"     // the room has no key yet
	RekeyIncomplete RekeyWhy = "incomplete" // whoever made the newest epoch did not finish it
	RekeyDeparted   RekeyWhy = "departed"   // removed, gone, revoked, suspended or expired
	RekeyReturned   RekeyWhy = "returned"   // was away, and has the key of what was said meanwhile
	RekeyDemoted    RekeyWhy = "demoted"    // has less rights than the roster says
	RekeyNewKey     RekeyWhy = "new_key"    // has another encryption key
	RekeyOld        RekeyWhy = "old"        // of nobody: the newest key has been used for long enough
)

// RekeyReason is a reason and whom it concerns; nil: everybody.
type RekeyReason struct {
	Why  RekeyWhy `json:"why"`
	User *UserKey `json:"user"`
}

// WaitingMember is in the room as the servers have it, and not, or with a lower
// role, in the newest roster.
type WaitingMember struct {
	User   UserKey  `json:"sign_pub"`
	Handle Handle   `json:"handle"`
	Role   RoomRole `json:"role"`
	Has    RoomRole `json:"has,omitempty"` // the role in the newest roster; absent: none
	Key    bool     `json:"key"`           // has published an encryption key; without one nobody can be admitted
}

// MemberKey is an active member with what room keys are sealed to.
type MemberKey struct {
	SignPub       UserKey        `json:"sign_pub"`
	Handle        Handle         `json:"handle"`
	Role          RoomRole       `json:"role"`
	EncryptionKey *EncryptionKey `json:"encryption_key"` // null: none published
}

// GrantedKey is the envelope of an epoch for somebody who came later.
type GrantedKey struct {
	Epoch    uint64 `json:"epoch"`
	Envelope []byte `json:"envelope"`
}

// MemberInfo is one membership. A revoked user stays listed and has no access:
// UserStatus says so.
type MemberInfo struct {
	SignPub    UserKey          `json:"sign_pub"`
	NKey       string           `json:"nkey"`
	Handle     Handle           `json:"handle"`
	Role       RoomRole         `json:"role"`
	Status     MembershipStatus `json:"status"`
	UserStatus Status           `json:"user_status"`
	AddedAt    time.Time        `json:"added_at"`
	RemovedAt  *time.Time       `json:"removed_at"`
	Revision   uint64           `json:"revision"`
}

// Change is the proof of a change: what it did, and how far it is known that
// nobody decides on the state before it any more, and that nothing which was
// opened on that state is left.
type Change struct {
	What      string   `json:"what"`
	Revision  uint64   `json:"revision"`
	Already   bool     `json:"already"`
	Holders   int      `json:"holders"`            // services that decided on a lease at the change
	Expired   []string `json:"expired"`            // of them, those that did not answer: their lease was waited out
	Callouts  string   `json:"callouts"`           // authcallouts that acknowledged, of those that held a lease
	Closed    int      `json:"closed"`             // connections that it ended
	Servers   string   `json:"servers,omitempty"`  // servers that keep none it ends, of all; empty if it takes nothing away
	ElapsedMS int64    `json:"elapsed_ms"`         // from the write to the proof
	Verified  bool     `json:"verified"`           // false: committed, not proven; repeating the change proves it again
	Waiting   []string `json:"waiting,omitempty"`  // for whom the proof still waited when it was given up
	Unproven  []string `json:"unproven,omitempty"` // nodes whose server did not say that nothing is left open there
}

// ConnectionInfo is one open connection of a user. Name, Lang and Version are
// what the client calls itself; the rest is what the server has seen.
type ConnectionInfo struct {
	Server        string    `json:"server"` // name of the node
	CID           uint64    `json:"cid"`    // given once for the life of that server
	SignPub       UserKey   `json:"sign_pub"`
	NKey          string    `json:"nkey"`
	Handle        Handle    `json:"handle"`
	Address       string    `json:"address"` // host:port
	Since         time.Time `json:"since"`
	LastActivity  time.Time `json:"last_activity"`
	Name          string    `json:"name"`
	Lang          string    `json:"lang"`
	Version       string    `json:"version"`
	Subscriptions int       `json:"subscriptions"`
	InMsgs        int64     `json:"in_msgs"` // from the client
	OutMsgs       int64     `json:"out_msgs"`
	InBytes       int64     `json:"in_bytes"`
	OutBytes      int64     `json:"out_bytes"`
	PendingBytes  int64     `json:"pending_bytes"` // written to the client and not taken yet
}

// ConnectionList is who is connected, by server and cid. Of the servers in
// Missing nothing is known.
type ConnectionList struct {
	Connections []ConnectionInfo `json:"connections"`
	Servers     string           `json:"servers"` // that answered, of all
	Missing     []string         `json:"missing"`
	Next        string           `json:"next"` // over the API: the page that follows; empty at the end
}

// AccessInfo explains what a user may do on NATS, and why.
type AccessInfo struct {
	User      UserInfo      `json:"user"`
	Admitted  bool          `json:"admitted"` // a connection would be opened now
	Reason    string        `json:"reason"`   // the callout's word for its decision
	Publish   []SubjectRule `json:"publish"`
	Subscribe []SubjectRule `json:"subscribe"`
	Rooms     []RoomGrant   `json:"rooms"`
}

// SubjectRule is one subject that a minted credential allows. Room and Role
// name what grants it; they are empty for what every user has.
type SubjectRule struct {
	Subject string   `json:"subject"`
	Room    RoomID   `json:"room,omitempty"`
	Role    RoomRole `json:"role,omitempty"`
}

// InviteStatus is where an invite stands.
type InviteStatus string

// The states of an invite. Used and withdrawn are final; an open one ends by
// itself when it expires.
const (
	InviteOpen      InviteStatus = "open"
	InviteUsed      InviteStatus = "used"
	InviteWithdrawn InviteStatus = "withdrawn"
)

// InviteInfo is one invite. The secret that redeems it is in none of them: it
// is shown once, when the invite is made.
type InviteInfo struct {
	ID        string        `json:"id"`
	Status    InviteStatus  `json:"status"`
	Role      Role          `json:"role"`
	Handle    Handle        `json:"handle,omitempty"` // empty: the newcomer chooses
	Rooms     []InvitedRoom `json:"rooms"`
	ExpiresAt time.Time     `json:"expires_at"`
	CreatedAt time.Time     `json:"created_at"`
	CreatedBy string        `json:"created_by"` // nkey of the admin, or "direct"
	UsedBy    *UserKey      `json:"used_by"`
	Revision  uint64        `json:"revision"`
}

// InvitedRoom is a room into which an invite leads.
type InvitedRoom struct {
	Room RoomID   `json:"room"`
	Role RoomRole `json:"role"`
}

// InviteCreated is an invite at the one moment at which its token is known.
type InviteCreated struct {
	InviteInfo
	Token string `json:"token"` // ubi_<id>_<secret>: whoever holds it becomes a user
}

// Problem is an error as it crosses HTTP, an RFC 9457 document.
type Problem struct {
	Type      string `json:"type"` // urn:unibus:error:<code>
	Title     string `json:"title"`
	Status    int    `json:"status"`
	Detail    string `json:"detail,omitempty"`
	Hint      string `json:"hint,omitempty"` // the next command to run
	RequestID string `json:"request_id,omitempty"`
}

// ProblemType is the prefix of Problem.Type in front of the code.
const ProblemType = "urn:unibus:error:"

// EffectHeader with the value EffectNone is in an answer that says of itself
// that the request changed nothing, so that it may be sent again, to another
// node, whatever it asks for.
const (
	EffectHeader = "Unibus-Effect"
	EffectNone   = "none"
)
