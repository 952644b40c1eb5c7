package kv

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
)

// anyUser matches every user record and no barrier: barrier keys have more
// tokens. An expectation on it makes a write atomic over the whole table of
// users, so that two admins cannot each remove the last other one.
const anyUser = "$KV." + Users + ".*"

// reservation says who holds a handle; an empty User is a free one. It grants
// nothing: the user's own record does.
type reservation struct {
	V      int        `json:"v"`
	User   string     `json:"user"`
	Handle bus.Handle `json:"handle"`
}

// Bootstrap makes the first admin. It succeeds once in the life of a cluster:
// the write is conditional on no user record ever having existed.
func (s *Store) Bootstrap(ctx context.Context, key bus.UserKey, handle bus.Handle) (Result, error) {
	return s.retried(ctx, key.Hex(), func(s *Store) (Result, error) {
		if last := s.view.revisionAnyUser(); last != 0 {
			return Result{}, alreadyBootstrapped()
		}
		claim, err := s.reserve(ctx, handle, key)
		if err != nil {
			return Result{}, raced(err) // there is no user yet, so the other one is a bootstrap too
		}
		u := s.newUser(key, handle, bus.Admin)
		res, err := s.change(ctx, usersIdx, key.Hex(), u, expectation{filter: anyUser})
		if bus.CodeOf(err) == bus.Conflict {
			s.free(ctx, handle, claim)
			return Result{}, alreadyBootstrapped()
		}
		res.What = fmt.Sprintf("first admin %s is %s", handle, key)
		return res, err
	})
}

func alreadyBootstrapped() *bus.Error {
	return bus.E(bus.Conflict, "already bootstrapped: this cluster has, or had, users").WithHint("unibusctl user list")
}

func (s *Store) newUser(key bus.UserKey, handle bus.Handle, role bus.Role) bus.User {
	return bus.User{
		V: bus.UserVersion, Key: key, Handle: handle, Role: role, Status: bus.Active,
		CreatedAt: s.stamp(), CreatedBy: s.caller.Name,
	}
}

// stamp is the time as records spell it.
func (s *Store) stamp() time.Time { return s.now().UTC().Truncate(time.Millisecond) }

// AddUser registers a key. Write order: the handle is reserved first, which
// grants nothing; the user record, conditional on the whole table of users
// being the one that was looked at, grants. A key that was ever registered is
// refused and nothing changes.
func (s *Store) AddUser(ctx context.Context, key bus.UserKey, handle bus.Handle, role bus.Role) (Result, error) {
	res, err := s.register(ctx, func(s *Store) (bus.User, error) { return s.newUser(key, handle, role), nil }, key, handle)
	res.What = fmt.Sprintf("registered %s as %s, %s", key, handle, role)
	return res, err
}

// register writes the first record of a user, which record makes behind the
// last barrier.
func (s *Store) register(ctx context.Context, record func(*Store) (bus.User, error), key bus.UserKey, handle bus.Handle) (Result, error) {
	var claim uint64
	res, err := s.retried(ctx, key.Hex(), func(s *Store) (Result, error) {
		// Taken before the look: a reservation without a user may be taken over
		// while its owner is still at it, so only this condition keeps two adds
		// from giving one handle to two keys.
		want := s.allUsers(ctx)
		if known, err := s.view.Access(key); known != nil || err != nil {
			return Result{}, alreadyRegistered(key, known)
		}
		if u, _, ok := s.view.UserByHandle(handle); ok {
			return Result{}, handleTaken(u)
		}
		u, err := record(s)
		if err != nil {
			return Result{}, err
		}
		if claim, err = s.reserve(ctx, handle, key); err != nil {
			return Result{}, err
		}
		res, err := s.change(ctx, usersIdx, key.Hex(), u, want)
		return res, raced(err)
	})
	if bus.CodeOf(err) == bus.Conflict && claim != 0 {
		s.free(ctx, handle, claim)
	}
	return res, err
}

// allUsers makes a write conditional on every user record being the one that
// was looked at. Take it before the look.
func (s *Store) allUsers(ctx context.Context) expectation {
	s.awaitTurn(ctx, anyUser)
	return expectation{revision: s.view.revisionAnyUser(), filter: anyUser}
}

func alreadyRegistered(key bus.UserKey, known *Access) *bus.Error {
	e := bus.E(bus.Conflict, "already registered: %s", key)
	if known == nil {
		return e
	}
	return bus.E(bus.Conflict, "already registered: %s is %s (%s, %s)", key, known.User.Handle, known.User.Role, known.User.Status).
		WithHint("unibusctl user show %s", known.User.Handle)
}

// RevokeUser ends a user's access for good. The record stays. Repeating it
// writes the record again and proves it again.
func (s *Store) RevokeUser(ctx context.Context, key bus.UserKey) (Result, error) {
	return s.alter(ctx, key, "revoked", func(u *bus.User) (bool, error) {
		if u.Status == bus.Revoked {
			return false, nil
		}
		now := s.stamp()
		u.Status, u.RevokedAt, u.Becomes = bus.Revoked, &now, ""
		return true, nil
	})
}

// SuspendUser takes a user's access away until ResumeUser gives it back.
func (s *Store) SuspendUser(ctx context.Context, key bus.UserKey) (Result, error) {
	return s.alter(ctx, key, "suspended", func(u *bus.User) (bool, error) {
		if err := changeable(*u); err != nil {
			return false, err
		}
		changed := u.Status != bus.Suspended
		if changed {
			now := s.stamp()
			u.InterruptedAt = &now
		}
		u.Status = bus.Suspended
		return changed, nil
	})
}

// ResumeUser ends a suspension.
func (s *Store) ResumeUser(ctx context.Context, key bus.UserKey) (Result, error) {
	return s.alter(ctx, key, "active", func(u *bus.User) (bool, error) {
		if err := changeable(*u); err != nil {
			return false, err
		}
		changed := u.Status != bus.Active
		u.Status = bus.Active
		return changed, nil
	})
}

// changeable refuses what is final, and what a rotation is still at work on.
func changeable(u bus.User) error {
	switch {
	case u.RotatedTo != nil:
		return bus.E(bus.Conflict, "%s has moved to the key %s", u.Handle, *u.RotatedTo).WithHint("unibusctl user show %s", u.Handle)
	case u.Status == bus.Revoked:
		return bus.E(bus.Conflict, "%s is revoked, which is final", u.Handle).
			WithHint("unibusctl user rotate %s --sign-pub KEY gives the handle to a new key", u.Handle)
	case u.Becomes != "":
		return bus.E(bus.Conflict, "a rotation of %s to the key %s is not finished", u.Handle, u.Key).
			WithHint("unibusctl user rotate %s --sign-pub %s finishes it", u.Rotates.NKey(), u.Key)
	}
	return nil
}

// UserPatch says what to change about a user; what is nil stays as it is.
type UserPatch struct {
	Handle    *bus.Handle
	Role      *bus.Role
	Expires   bool       // ExpiresAt is meant
	ExpiresAt *time.Time // nil: never
	Revision  uint64     // the change is made to this revision only; 0: to any
}

// PatchUser changes a user's handle, role or expiry. Write order: a new handle
// is reserved first, which grants nothing; then the record; then the old handle
// is given back.
func (s *Store) PatchUser(ctx context.Context, key bus.UserKey, p UserPatch) (Result, error) {
	if p.Expires && p.ExpiresAt != nil && !p.ExpiresAt.After(s.now()) {
		return Result{}, bus.E(bus.Invalid, "an expiry is in the future; %s is not", p.ExpiresAt.UTC().Format(time.RFC3339)).
			WithHint("unibusctl user suspend takes access away now")
	}
	if p.ExpiresAt != nil && p.ExpiresAt.UTC().Year() > 9999 { // has no JSON form
		return Result{}, bus.E(bus.Invalid, "an expiry is before the year 10000").WithHint("without one, access never expires")
	}
	var old bus.Handle
	var claim uint64
	res, err := s.retried(ctx, key.Hex(), func(s *Store) (Result, error) {
		want := s.allUsers(ctx)
		u, rev, ok := s.view.User(key)
		if !ok {
			return Result{}, s.noUser(key)
		}
		if err := matches(p.Revision, rev, string(u.Handle)); err != nil {
			return Result{}, err
		}
		if err := changeable(u); err != nil {
			return Result{}, err
		}
		was := u
		if p.Role != nil {
			u.Role = *p.Role
		}
		if p.Expires {
			if now := s.stamp(); u.ExpiresAt != nil && !now.Before(*u.ExpiresAt) {
				u.InterruptedAt = &now
			}
			u.ExpiresAt = p.ExpiresAt
			if u.ExpiresAt != nil {
				at := u.ExpiresAt.UTC().Truncate(time.Millisecond)
				u.ExpiresAt = &at
			}
		}
		if p.Handle != nil && *p.Handle != u.Handle {
			if other, _, taken := s.view.UserByHandle(*p.Handle); taken {
				return Result{}, handleTaken(other)
			}
			var err error
			if claim, err = s.reserve(ctx, *p.Handle, key); err != nil {
				return Result{}, err
			}
			old, u.Handle = u.Handle, *p.Handle
		}
		if err := s.keepsAnAdmin(was, u); err != nil {
			return Result{}, err
		}
		res, err := s.change(ctx, usersIdx, key.Hex(), u, want)
		res.Already = u.Handle == was.Handle && u.Role == was.Role && sameTime(u.ExpiresAt, was.ExpiresAt)
		res.What = fmt.Sprintf("changed %s: %s, %s, expires %s", was.Handle, u.Handle, u.Role, spelled(u.ExpiresAt))
		if res.Already {
			res.What = fmt.Sprintf("already_so %s: %s, expires %s", u.Handle, u.Role, spelled(u.ExpiresAt))
		}
		return s.sweptIfOut(ctx, res, raced(err), u)
	})
	switch {
	case claim == 0:
	case bus.CodeOf(err) == bus.Conflict:
		s.free(ctx, *p.Handle, claim)
	case err == nil:
		s.giveBack(ctx, old, key)
	}
	return res, err
}

func sameTime(a, b *time.Time) bool {
	return a == nil && b == nil || a != nil && b != nil && a.Equal(*b)
}

func spelled(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return t.UTC().Format(time.RFC3339)
}

// SetEncryptionKey publishes the key to which room keys are sealed for a user.
// Its counter only grows.
func (s *Store) SetEncryptionKey(ctx context.Context, key bus.UserKey, k bus.EncryptionKey) (Result, error) {
	k.CreatedAt = k.CreatedAt.UTC()
	if err := k.Verify(key); err != nil {
		return Result{}, err
	}
	return s.alter(ctx, key, fmt.Sprintf("encryption_key_%d", k.N), func(u *bus.User) (bool, error) {
		if err := changeable(*u); err != nil {
			return false, err
		}
		if old := u.EncryptionKey; old != nil && old.N >= k.N {
			if old.N == k.N && bytes.Equal(old.Public, k.Public) {
				return false, nil
			}
			return false, bus.E(bus.Conflict, "%s has encryption key %d; the next one has a higher number", u.Handle, old.N)
		}
		u.EncryptionKey = &k
		return true, nil
	})
}

// alter changes one user's record; state is how the result is called. edit
// reports whether it changed anything; if not the record is written again as it
// is, to prove it again. A change that costs an admin is conditional on every
// user record being the one that was looked at.
func (s *Store) alter(ctx context.Context, key bus.UserKey, state string, edit func(u *bus.User) (bool, error)) (Result, error) {
	return s.retried(ctx, key.Hex(), func(s *Store) (Result, error) {
		var all expectation
		was, rev, ok := s.view.User(key)
		if ok && was.Role == bus.Admin {
			all = s.allUsers(ctx)
			was, rev, ok = s.view.User(key)
		}
		if !ok {
			return Result{}, s.noUser(key)
		}
		u := was
		changed, err := edit(&u)
		if err != nil {
			return Result{}, err
		}
		want := expectation{revision: rev}
		if was.Role == bus.Admin && changed {
			want = all
			if err := s.keepsAnAdmin(was, u); err != nil {
				return Result{}, err
			}
		}
		res, err := s.change(ctx, usersIdx, key.Hex(), u, want)
		res.Already, res.What = !changed, fmt.Sprintf("%s %s", state, u.Handle)
		if !changed {
			res.What = "already_" + res.What
		}
		return s.sweptIfOut(ctx, res, raced(err), u)
	})
}

// sweptIfOut is swept for a user who may not connect any more.
func (s *Store) sweptIfOut(ctx context.Context, res Result, err error, u bus.User) (Result, error) {
	if in, _ := (&Access{User: u}).Admitted(s.now()); in {
		return res, err
	}
	return s.swept(ctx, res, err, map[bus.UserKey]narrowing{u.Key: {}})
}

// keepsAnAdmin refuses a change after which no active admin without an expiry
// would be left.
func (s *Store) keepsAnAdmin(was, is bus.User) error {
	if !s.lasting(was) || s.lasting(is) || s.anotherAdmin(was.Key) {
		return nil
	}
	return bus.E(bus.Conflict, "%s is the last active admin and cannot be %s", was.Handle, loss(is)).
		WithHint("unibusctl user add --handle NAME --sign-pub KEY --role admin")
}

// lasting is an admin who will still be one tomorrow: without an expiry, and
// active, or the only one who stands for a key that has handed over to it.
func (s *Store) lasting(u bus.User) bool {
	if u.Role != bus.Admin || u.ExpiresAt != nil {
		return false
	}
	if u.Becomes == bus.Active {
		old, _, ok := s.view.User(*u.Rotates)
		return ok && old.RotatedTo != nil && *old.RotatedTo == u.Key
	}
	return u.Status == bus.Active
}

func loss(is bus.User) string {
	switch {
	case is.Status != bus.Active:
		return string(is.Status)
	case is.Role != bus.Admin:
		return "made a " + string(is.Role)
	}
	return "given an expiry"
}

// noUser distinguishes a key that never existed from a record nobody can read.
func (s *Store) noUser(key bus.UserKey) error {
	if _, err := s.view.Access(key); err != nil {
		return err
	}
	return bus.E(bus.NotFound, "no user %s", key).WithHint("unibusctl user list")
}

// anotherAdmin reports whether an active admin without an expiry remains when
// key is gone. An admin who expires is no safety.
func (s *Store) anotherAdmin(key bus.UserKey) bool {
	return slices.ContainsFunc(s.view.Users(), func(u UserRevision) bool { return u.Key != key && s.lasting(u.User) })
}

// reserve claims a handle for a key, by compare-and-set on its reservation. A
// reservation whose user never came to be, left by an interrupted add, is
// taken over; one that a user's record names is not.
func (s *Store) reserve(ctx context.Context, h bus.Handle, key bus.UserKey) (uint64, error) {
	claim := reservation{V: 1, User: key.Hex(), Handle: h}
	rev, err := s.write(ctx, Handles, string(h), claim, expectation{})
	if bus.CodeOf(err) != bus.Conflict {
		return rev, err
	}
	if u, _, ok := s.view.UserByHandle(h); ok {
		return 0, handleTaken(u)
	}
	old, oldRev, err := s.readReservation(ctx, h)
	if err != nil {
		return 0, err
	}
	if old.User == key.Hex() {
		return oldRev, nil
	}
	if owner, err := bus.ParseUserKey(old.User); err == nil {
		if a, err := s.view.Access(owner); err != nil || (a != nil && a.User.Handle == h) {
			return 0, bus.E(bus.Conflict, "handle %s is taken", h)
		}
	}
	rev, err = s.write(ctx, Handles, string(h), claim, expectation{revision: oldRev})
	if bus.CodeOf(err) == bus.Conflict {
		return 0, bus.E(bus.Conflict, "handle %s is being taken by somebody else", h)
	}
	return rev, err
}

func handleTaken(u bus.User) *bus.Error {
	if u.Status == bus.Revoked {
		return bus.E(bus.Conflict, "handle %s belongs to a revoked user and is not given to another key", u.Handle).
			WithHint("unibusctl user rotate %s --sign-pub KEY, if it is the same person with a new key", u.Handle)
	}
	return bus.E(bus.Conflict, "handle %s is taken by %s", u.Handle, u.Key).WithHint("unibusctl user show %s", u.Handle)
}

// readReservation reads the stored reservation. It is not trusted to be
// current: the compare-and-set that follows is on the revision read here.
func (s *Store) readReservation(ctx context.Context, h bus.Handle) (reservation, uint64, error) {
	rctx, cancel := s.decide(ctx)
	defer cancel()
	m, err := s.readLast(rctx, Handles, string(h))
	if errors.Is(err, jetstream.ErrMsgNotFound) { // proposed by somebody else at this moment, and not yet stored
		return reservation{}, 0, fmt.Errorf("%w: %w", errRaced,
			bus.E(bus.Unavailable, "handle %s is being reserved and cannot be read yet", h).WithHint("repeat the command"))
	}
	if err != nil {
		return reservation{}, 0, bus.E(bus.Unavailable, "no quorum: read of handle %s: %w", h, err)
	}
	var r reservation
	if err := json.Unmarshal(m.Data, &r); err != nil || r.V != 1 {
		return reservation{}, 0, bus.E(bus.Internal, "the reservation of handle %s cannot be read", h)
	}
	return r, m.Sequence, nil
}

// free gives back a handle that the loser of a race had reserved. Failing to
// is harmless: the next add takes over a reservation without a user.
func (s *Store) free(ctx context.Context, h bus.Handle, rev uint64) {
	if _, err := s.write(ctx, Handles, string(h), reservation{V: 1, Handle: h}, expectation{revision: rev}); err != nil {
		s.log.Warn("a lost race left a handle reserved", "handle", h, "err", err)
	}
}

// giveBack frees the handle that a user no longer has. Failing to is harmless:
// the next add takes over a reservation whose user has another handle.
func (s *Store) giveBack(ctx context.Context, h bus.Handle, key bus.UserKey) {
	r, rev, err := s.readReservation(ctx, h)
	if err == nil && r.User == key.Hex() {
		s.free(ctx, h, rev)
	}
}

// FindUser resolves what a person typed - a handle, hex or nkey - to a user,
// behind the last barrier.
func (v *View) FindUser(s string) (bus.User, uint64, error) {
	if h, err := bus.ParseHandle(s); err == nil {
		u, rev, ok := v.UserByHandle(h)
		if !ok {
			return bus.User{}, 0, bus.E(bus.NotFound, "no user %s", h).WithHint("unibusctl user list")
		}
		return u, rev, nil
	}
	k, err := bus.ParseUserKey(s)
	if err != nil {
		return bus.User{}, 0, bus.E(bus.Invalid, "%s is neither a handle nor a user key", fmt.Sprintf("%.70q", s))
	}
	if _, err := v.Access(k); err != nil {
		return bus.User{}, 0, err
	}
	u, rev, ok := v.User(k)
	if !ok {
		return bus.User{}, 0, bus.E(bus.NotFound, "no user %s", k).WithHint("unibusctl user list")
	}
	return u, rev, nil
}
