package seal

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/sig"
)

// MaxMembers bounds a roster: 2,000 members are 146 KB.
const MaxMembers = 2000

// Member is one line of a roster: who has the key, as what, and to which of
// their encryption keys it was sealed.
type Member struct {
	User bus.UserKey
	Role bus.RoomRole
	N    uint64 // of the encryption key
	Key  Hash   // of its public half
}

// Roster says who has the key of one epoch. It is immutable.
type Roster struct {
	Room       bus.RoomID
	Epoch      uint64 // from 1
	Previous   Hash   // of the roster of the epoch before; zero for the first
	CreatedAt  time.Time
	Commitment Hash
	Signer     bus.UserKey  // an owner
	Appointed  *Appointment // of the signer, if no owner of the roster before could sign
	Members    []Member     // sorted by user

	hash Hash
	raw  []byte
}

// Appointment is by whom, and the proof that, the signer of a roster was made
// an owner when all owners of a room were lost. The admin learns no key by it.
// It is good for one roster at most: the one that follows Previous.
type Appointment struct {
	Admin     bus.UserKey
	Signature []byte
}

// Appoint makes owner the one who may sign the roster of that epoch although
// they are no owner in the one before.
func Appoint(admin sig.Signer, room bus.RoomID, epoch uint64, previous Hash, owner bus.UserKey) (*Appointment, error) {
	s, err := admin.Sign(appointmentBytes(room, epoch, previous, owner))
	if err != nil {
		return nil, bus.E(bus.Internal, "sign an appointment: %w", err)
	}
	a := &Appointment{Admin: admin.Key(), Signature: s}
	return a, a.verify(room, epoch, previous, owner)
}

// appointmentBytes are what the admin signs:
//
//	"unibus/v1/appointment" 00 | room, length and bytes | epoch, 8 bytes |
//	hash of the roster before | owner
func appointmentBytes(room bus.RoomID, epoch uint64, previous Hash, owner bus.UserKey) []byte {
	b := appendU64(appendRoom([]byte(domainAppointment), room), epoch)
	return append(append(b, previous[:]...), owner[:]...)
}

func (a *Appointment) verify(room bus.RoomID, epoch uint64, previous Hash, owner bus.UserKey) error {
	if len(a.Signature) != ed25519.SignatureSize || !ed25519.Verify(a.Admin[:], appointmentBytes(room, epoch, previous, owner), a.Signature) {
		return bus.E(bus.Unauthenticated, "the appointment of %s as owner of room %s is not signed by %s", owner, room, a.Admin)
	}
	return nil
}

const kindOrdinary, kindAppointed = 0, 1

// signedBytes are what the signer signs, and what Hash is over:
//
//	"unibus/v1/roster" 00 | room, length and bytes | epoch, 8 bytes |
//	hash of the roster before | created_at, Unix milliseconds, 8 bytes |
//	commitment | signer | 00, or 01 and the admin and 64 bytes of signature |
//	number of members, 4 bytes | for each: user | role: 1 reader, 2 writer,
//	3 owner | n, 8 bytes | hash of the encryption key
func (r *Roster) signedBytes() []byte {
	b := appendU64(appendRoom([]byte(domainRoster), r.Room), r.Epoch)
	b = append(b, r.Previous[:]...)
	b = appendU64(b, uint64(r.CreatedAt.UnixMilli()))
	b = append(b, r.Commitment[:]...)
	b = append(b, r.Signer[:]...)
	if r.Appointed == nil {
		b = append(b, kindOrdinary)
	} else {
		b = append(append(append(b, kindAppointed), r.Appointed.Admin[:]...), r.Appointed.Signature...)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(r.Members))) //nolint:gosec // check bounds it
	for _, m := range r.Members {
		b = append(append(b, m.User[:]...), byte(m.Role.Rank()))
		b = append(appendU64(b, m.N), m.Key[:]...)
	}
	return b
}

// Sign completes a roster: it sorts the members and returns it as ParseRoster
// would. The signer must be an owner in it; that they are in the one before,
// Follows says.
func (r Roster) Sign(s sig.Signer) (*Roster, error) {
	r.Signer, r.CreatedAt = s.Key(), r.CreatedAt.UTC().Truncate(time.Millisecond)
	r.Members = slices.SortedFunc(slices.Values(r.Members), func(a, b Member) int { return bytes.Compare(a.User[:], b.User[:]) })
	if err := r.check(); err != nil {
		return nil, err
	}
	body := r.signedBytes()
	signature, err := s.Sign(body)
	if err != nil {
		return nil, bus.E(bus.Internal, "sign a roster: %w", err)
	}
	return ParseRoster(append(body, signature...))
}

// check holds a roster to its grammar.
func (r *Roster) check() error {
	if _, err := bus.ParseRoomID(string(r.Room)); err != nil {
		return err
	}
	switch {
	case r.Epoch == 0:
		return bus.E(bus.Invalid, "epochs are counted from 1")
	case (r.Epoch == 1) != (r.Previous == Hash{}):
		return bus.E(bus.Invalid, "the first roster, and only that, has none before it")
	case len(r.Members) > MaxMembers:
		return bus.E(bus.Invalid, "a roster has %d members, more than %d", len(r.Members), MaxMembers)
	case r.CreatedAt.UnixMilli() < 0 || r.CreatedAt.UTC().Year() > 9999:
		return bus.E(bus.Invalid, "a roster has a time between 1970 and 9999")
	}
	for i, m := range r.Members {
		if err := bus.CheckUserKey(m.User); err != nil {
			return err
		}
		if m.Role.Rank() == 0 || m.N == 0 {
			return bus.E(bus.Invalid, "the line of %s in the roster has no role or no key", m.User)
		}
		if i > 0 && bytes.Compare(r.Members[i-1].User[:], m.User[:]) >= 0 {
			return bus.E(bus.Invalid, "the members of the roster are not sorted, or somebody is in it twice")
		}
	}
	if m, ok := r.Member(r.Signer); !ok || m.Role != bus.Owner {
		return bus.E(bus.Invalid, "a roster is signed by one of its owners")
	}
	return nil
}

// ParseRoster reads a roster and verifies the signatures in it, by whoever it
// says. Whether that signer may follow the roster before, Follows says.
func ParseRoster(raw []byte) (*Roster, error) {
	malformed := bus.E(bus.Invalid, "these %d bytes are no roster", len(raw))
	if len(raw) < ed25519.SignatureSize {
		return nil, malformed
	}
	body, signature := raw[:len(raw)-ed25519.SignatureSize], raw[len(raw)-ed25519.SignatureSize:]
	p := &reader{rest: body}
	p.literal(domainRoster)
	r := &Roster{raw: slices.Clone(raw), hash: sha256.Sum256(body)}
	r.Room = bus.RoomID(p.take(int(p.u8())))
	r.Epoch, r.Previous = p.u64(), p.hash()
	millis := p.u64()
	if millis > 1<<53 {
		return nil, malformed
	}
	r.CreatedAt = time.UnixMilli(int64(millis)).UTC()
	r.Commitment, r.Signer = p.hash(), p.user()
	switch p.u8() {
	case kindOrdinary:
	case kindAppointed:
		r.Appointed = &Appointment{Admin: p.user(), Signature: bytes.Clone(p.take(ed25519.SignatureSize))}
	default:
		return nil, malformed
	}
	n := p.u32()
	if p.bad || n > MaxMembers {
		return nil, malformed
	}
	r.Members = make([]Member, n)
	for i := range r.Members {
		m := Member{User: p.user()}
		role := p.u8()
		m.N, m.Key = p.u64(), p.hash()
		if role < 1 || role > 3 {
			return nil, malformed
		}
		m.Role = []bus.RoomRole{bus.Reader, bus.Writer, bus.Owner}[role-1]
		r.Members[i] = m
	}
	if p.bad || len(p.rest) != 0 {
		return nil, malformed
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	if err := bus.CheckUserKey(r.Signer); err != nil {
		return nil, err
	}
	if !ed25519.Verify(r.Signer[:], body, signature) {
		return nil, bus.E(bus.Unauthenticated, "the roster of room %s, epoch %d, is not signed by %s", r.Room, r.Epoch, r.Signer)
	}
	if a := r.Appointed; a != nil {
		if err := bus.CheckUserKey(a.Admin); err != nil {
			return nil, err
		}
		if err := a.verify(r.Room, r.Epoch, r.Previous, r.Signer); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Bytes are the roster as it is stored and sent: what is signed, and the
// signature.
func (r *Roster) Bytes() []byte { return bytes.Clone(r.raw) }

// Hash is over what is signed.
func (r *Roster) Hash() Hash { return r.hash }

// Member finds a user's line.
func (r *Roster) Member(u bus.UserKey) (Member, bool) {
	i, ok := slices.BinarySearchFunc(r.Members, u, func(m Member, u bus.UserKey) int { return bytes.Compare(m.User[:], u[:]) })
	if !ok {
		return Member{}, false
	}
	return r.Members[i], true
}

// IsOwner reports whether the roster makes a user an owner.
func (r *Roster) IsOwner(u bus.UserKey) bool {
	m, ok := r.Member(u)
	return ok && m.Role == bus.Owner
}

// Follows reports whether r is a successor that the roster before it, or the
// creator of the room for the first one, allows. admin says whose appointments
// the reader trusts, and is asked only about one; nil trusts nobody.
//
// To be an owner in the roster itself proves nothing: whoever wrote it could
// say so. Forbidden means that somebody tried.
func (r *Roster) Follows(before *Roster, room bus.RoomID, creator bus.UserKey, admin func(bus.UserKey) bool) error {
	wantEpoch, wantHash, maySign := uint64(1), Hash{}, func(u bus.UserKey) bool { return u == creator }
	if before != nil {
		wantEpoch, wantHash, maySign = before.Epoch+1, before.hash, before.IsOwner
	}
	if guard.Off(guard.RosterSigner) {
		maySign = func(bus.UserKey) bool { return true }
	}
	if guard.Off(guard.RosterChain) {
		wantEpoch, wantHash = r.Epoch, r.Previous
	}
	switch {
	case r.Room != room || before != nil && before.Room != room:
		return bus.E(bus.Forbidden, "the roster is of room %s, not of %s", r.Room, room)
	case r.Epoch != wantEpoch:
		return bus.E(bus.Forbidden, "the roster of room %s is of epoch %d where %d comes next", room, r.Epoch, wantEpoch)
	case r.Previous != wantHash:
		return bus.E(bus.Forbidden, "the roster of room %s, epoch %d, follows another roster than the one that came before: the room's history was changed", room, r.Epoch)
	case r.Appointed != nil && (admin == nil || !admin(r.Appointed.Admin)):
		return bus.E(bus.Forbidden, "the roster of room %s, epoch %d, rests on an appointment by %s, who is no admin that is trusted here", room, r.Epoch, r.Appointed.Admin).
			WithHint("unibusctl user verify %s --admin trusts them, after comparing the number with theirs", r.Appointed.Admin)
	case r.Appointed == nil && !maySign(r.Signer):
		return bus.E(bus.Forbidden, "the roster of room %s, epoch %d, is signed by %s, who was no owner of the room", room, r.Epoch, r.Signer)
	}
	return nil
}

// Difference is how one roster differs from another, for people.
type Difference struct {
	User bus.UserKey  `json:"sign_pub"`
	Was  bus.RoomRole `json:"was"` // empty: not in it
	Now  bus.RoomRole `json:"now"`
}

// Differences lists who came, went or changed from before to r; before may be
// nil.
func (r *Roster) Differences(before *Roster) (out []Difference) {
	if before == nil {
		before = &Roster{}
	}
	for _, m := range r.Members {
		if old, _ := before.Member(m.User); old.Role != m.Role {
			out = append(out, Difference{m.User, old.Role, m.Role})
		}
	}
	for _, m := range before.Members {
		if _, ok := r.Member(m.User); !ok {
			out = append(out, Difference{m.User, m.Role, ""})
		}
	}
	slices.SortFunc(out, func(a, b Difference) int { return cmp.Compare(a.User.Hex(), b.User.Hex()) })
	return out
}
