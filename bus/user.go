package bus

import (
	"regexp"
	"time"
)

// Handle is a user's short name: unique, for people and tables only. It is
// never part of a subject or of a key that grants anything.
type Handle string

var handleGrammar = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`)

// ParseHandle refuses whatever could be read as something else in a subject, a
// key, a log line or a shell.
func ParseHandle(s string) (Handle, error) {
	if !handleGrammar.MatchString(s) {
		return "", E(Invalid, "handle %s is refused: a handle is 1 to 32 of a-z 0-9 _ - and starts with a letter", quoted(s))
	}
	return Handle(s), nil
}

// Role is what a user may do to the bus itself.
type Role string

// The roles. An unknown one in a record denies that record's user.
const (
	Member Role = "member"
	Admin  Role = "admin"
)

// ParseRole accepts the known roles only.
func ParseRole(s string) (Role, error) {
	switch r := Role(s); r {
	case Member, Admin:
		return r, nil
	}
	return "", E(Invalid, "role %s is refused: a role is member or admin", quoted(s))
}

// Status is where a user stands. Revoked is final: nothing leads back.
type Status string

// The states of a user.
const (
	Active    Status = "active"
	Suspended Status = "suspended"
	Revoked   Status = "revoked"
)

func parseStatus(s Status) error {
	switch s {
	case Active, Suspended, Revoked:
		return nil
	}
	return E(Invalid, "unknown user status %s", quoted(string(s)))
}

// User is the record of one user, as stored under its key in KV_UNIBUS_users.
type User struct {
	V         int        `json:"v"`
	Key       UserKey    `json:"sign_pub"`
	Handle    Handle     `json:"handle"`
	Role      Role       `json:"role"`
	Status    Status     `json:"status"`
	ExpiresAt *time.Time `json:"expires_at"`
	CreatedAt time.Time  `json:"created_at"`
	CreatedBy string     `json:"created_by,omitempty"` // nkey of the admin, or "direct"
	RevokedAt *time.Time `json:"revoked_at"`

	// InterruptedAt is when the user was last suspended, or let in again after
	// an expiry: whatever was said meanwhile in an encrypted room is not theirs.
	InterruptedAt *time.Time `json:"interrupted_at,omitempty"`

	EncryptionKey *EncryptionKey `json:"encryption_key,omitempty"`

	// A rotation moves handle, role and rooms from one key to another. RotatedTo
	// is in the record of the old one; Rotates in that of the new one, together
	// with Becomes, the status it will have, as long as the rotation is under way.
	RotatedTo *UserKey `json:"rotated_to,omitempty"`
	Rotates   *UserKey `json:"rotates,omitempty"`
	Becomes   Status   `json:"becomes,omitempty"`
}

// UserVersion is the only record version this build writes and understands. A
// change that narrows what a record means takes a new number, so that an older
// service denies instead of misreading.
const UserVersion = 1

// Validate checks every field that a decision rests on. A record that fails
// denies its own key and no other.
func (u User) Validate() error {
	if u.V != UserVersion {
		return E(Invalid, "user record version %d is not %d", u.V, UserVersion)
	}
	if err := CheckUserKey(u.Key); err != nil {
		return err
	}
	if _, err := ParseHandle(string(u.Handle)); err != nil {
		return err
	}
	if _, err := ParseRole(string(u.Role)); err != nil {
		return err
	}
	if u.Becomes != "" && (u.Status != Suspended || u.Rotates == nil) {
		return E(Invalid, "a rotation under way is no status %s", quoted(string(u.Status)))
	}
	return parseStatus(u.Status)
}

// ActiveAt reports whether the user may use the bus at that moment: active,
// and not past the expiry. The moment of expiry itself is already past.
func (u User) ActiveAt(now time.Time) bool {
	return u.Status == Active && (u.ExpiresAt == nil || now.Before(*u.ExpiresAt))
}
