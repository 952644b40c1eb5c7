package kv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
	return s.retried(ctx, key.Hex(), func() (Result, error) {
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
		return res, err
	})
}

func alreadyBootstrapped() *bus.Error {
	return bus.E(bus.Conflict, "already bootstrapped: this cluster has, or had, users").WithHint("unibusctl user list")
}

func (s *Store) newUser(key bus.UserKey, handle bus.Handle, role bus.Role) bus.User {
	return bus.User{
		V: bus.UserVersion, Key: key, Handle: handle, Role: role, Status: bus.Active,
		CreatedAt: s.now().UTC().Truncate(time.Millisecond), CreatedBy: s.actor,
	}
}

// AddUser registers a key. Write order: the handle is reserved first, which
// grants nothing; the user record, conditional on the whole table of users
// being the one that was looked at, grants. A key that was ever registered is
// refused and nothing changes.
func (s *Store) AddUser(ctx context.Context, key bus.UserKey, handle bus.Handle, role bus.Role) (Result, error) {
	var claim uint64
	res, err := s.retried(ctx, key.Hex(), func() (Result, error) {
		// Taken before the look: a reservation without a user may be taken over
		// while its owner is still at it, so only this condition keeps two adds
		// from giving one handle to two keys.
		want := expectation{revision: s.view.revisionAnyUser(), filter: anyUser}
		if known, err := s.view.Access(key); known != nil || err != nil {
			return Result{}, alreadyRegistered(key, known)
		}
		if u, _, ok := s.view.UserByHandle(handle); ok {
			return Result{}, handleTaken(u)
		}
		var err error
		if claim, err = s.reserve(ctx, handle, key); err != nil {
			return Result{}, err
		}
		res, err := s.change(ctx, usersIdx, key.Hex(), s.newUser(key, handle, role), want)
		return res, raced(err)
	})
	if bus.CodeOf(err) == bus.Conflict && claim != 0 {
		s.free(ctx, handle, claim)
	}
	return res, err
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
	return s.retried(ctx, key.Hex(), func() (Result, error) {
		u, rev, ok := s.view.User(key)
		if !ok {
			return Result{}, s.noUser(key)
		}
		if u.Status == bus.Revoked {
			res, err := s.change(ctx, usersIdx, key.Hex(), u, expectation{revision: rev})
			res.Already = true
			return res, raced(err)
		}
		want := expectation{revision: rev}
		if u.Role == bus.Admin {
			// Every user record must still be the one that was counted.
			want = expectation{revision: s.view.revisionAnyUser(), filter: anyUser}
			if !s.anotherAdmin(key) {
				return Result{}, bus.E(bus.Conflict, "%s is the last active admin and cannot be revoked", u.Handle).
					WithHint("unibusctl user add --handle NAME --sign-pub KEY --role admin")
			}
		}
		now := s.now().UTC().Truncate(time.Millisecond)
		u.Status, u.RevokedAt = bus.Revoked, &now
		res, err := s.change(ctx, usersIdx, key.Hex(), u, want)
		return res, raced(err)
	})
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
	for _, u := range s.view.Users() {
		if u.Key != key && u.Role == bus.Admin && u.Status == bus.Active && u.ExpiresAt == nil {
			return true
		}
	}
	return false
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
			WithHint("choose another handle; unibusctl user show %s", u.Handle)
	}
	return bus.E(bus.Conflict, "handle %s is taken by %s", u.Handle, u.Key).WithHint("unibusctl user show %s", u.Handle)
}

// readReservation reads the stored reservation. It is not trusted to be
// current: the compare-and-set that follows is on the revision read here.
func (s *Store) readReservation(ctx context.Context, h bus.Handle) (reservation, uint64, error) {
	rctx, cancel := s.decide(ctx)
	defer cancel()
	st, err := s.js.Stream(rctx, StreamName(Handles))
	if err != nil {
		return reservation{}, 0, bus.E(bus.Unavailable, "no quorum: read of handle %s: %w", h, err)
	}
	m, err := st.GetLastMsgForSubject(rctx, subjectOf(Handles, string(h)))
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
