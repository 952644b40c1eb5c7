package bus

import "time"

// AuditKind says what an audit entry is about.
type AuditKind string

// The kinds of entries. A change leaves an attempt, written before it, and an
// outcome; a refusal of any kind leaves a denial; a connect is a decision of an
// authcallout.
const (
	AuditAttempt AuditKind = "attempt"
	AuditOutcome AuditKind = "outcome"
	AuditDenial  AuditKind = "denial"
	AuditConnect AuditKind = "connect"
)

// AuditEntry is one line of the audit. It never holds a secret: no token, seed,
// signature, payload or request body.
type AuditEntry struct {
	At       time.Time `json:"at"`
	Kind     AuditKind `json:"kind"`
	Action   string    `json:"action"`            // user.add, room.member.remove, connect, ...
	Actor    string    `json:"actor,omitempty"`   // nkey of the caller as far as proven, or "direct"
	User     string    `json:"user,omitempty"`    // nkey of the user concerned
	Room     RoomID    `json:"room,omitempty"`    // the room concerned
	From     string    `json:"from,omitempty"`    // address of the caller
	Request  string    `json:"request,omitempty"` // id of the request; attempt and outcome share it
	Result   string    `json:"result"`            // attempt: ""; else ok, already, unproven, refused, failed, allow, deny
	Code     Code      `json:"code,omitempty"`    // why it was refused or failed
	Revision uint64    `json:"revision,omitempty"`
	Detail   string    `json:"detail,omitempty"` // one bounded line for people
}

// AuditRecord is an entry with its place: the stream sequence of its block and
// its index within it.
type AuditRecord struct {
	AuditEntry
	Seq      uint64 `json:"seq"`
	Index    int    `json:"index"`
	Instance string `json:"instance"` // who wrote it: membership-n1, authcallout-n2, unibusctl-direct
}

// AuditReport is the verdict over the whole audit.
type AuditReport struct {
	OK          bool           `json:"ok"`
	Blocks      int            `json:"blocks"`
	Entries     int            `json:"entries"`
	Dropped     uint64         `json:"dropped"` // entries that writers say they had to drop
	Chains      []AuditChain   `json:"chains"`
	Checkpoints int            `json:"checkpoints"`
	Signers     []string       `json:"signers"`  // nkeys that signed the checkpoints
	Unsigned    int            `json:"unsigned"` // blocks that no checkpoint covers yet
	Findings    []AuditFinding `json:"findings"`
	FirstSeq    uint64         `json:"first_seq"`
	LastSeq     uint64         `json:"last_seq"`
}

// AuditChain is the chain of one writing instance.
type AuditChain struct {
	Instance string `json:"instance"`
	First    uint64 `json:"first"` // number of the oldest block that is still there
	Last     uint64 `json:"last"`
	Head     string `json:"head"` // hash of the last block, hex
}

// AuditFinding names what is wrong, and where.
type AuditFinding struct {
	Seq      uint64 `json:"seq"` // of the block, 0 if it is the absence of one
	Instance string `json:"instance"`
	N        uint64 `json:"n"`
	Problem  string `json:"problem"`
}
