package kv

import (
	"context"
	"fmt"
	"slices"

	"unibus.internal/bus"
)

// RotateUser gives a person's handle, role and rooms to a new key and revokes
// the old one. The old one may be revoked already, as after a theft.
//
// Write order, each step a compare-and-set that repeating the call, or the
// reconciler, takes up where it was left:
//
//  1. the new key's record, suspended: it grants nothing, but the key is taken
//  2. the new key's memberships: of a suspended user, so they grant nothing
//  3. the old key's record, revoked, naming its successor: from here on the
//     person has no access until
//  4. the new key's record says what the old one said
//  5. the old key's memberships, removed: of a revoked user, for tidiness
//
// An admin is never missing for longer than from 3 to 4, also the last one.
func (s *Store) RotateUser(ctx context.Context, from, to bus.UserKey) (Result, error) {
	if from == to {
		return Result{}, bus.E(bus.Invalid, "a rotation needs another key")
	}
	return s.retried(ctx, from.Hex(), func(s *Store) (Result, error) {
		already, err := s.succeed(ctx, from, to)
		if err != nil {
			return Result{}, err
		}
		moved, err := s.moveRooms(ctx, from, to)
		if err != nil {
			return Result{}, err
		}
		revoked, err := s.handOver(ctx, from, to)
		if err != nil {
			return Result{}, err
		}
		res, err := s.finishRotation(ctx, from, to)
		res.Closed = revoked.Closed
		res.Already = already && moved == 0
		res.What = fmt.Sprintf("rotated %s from %s to %s", s.nameOf(to), from, to)
		if res.Already {
			res.What = "already_" + res.What
		}
		return s.swept(ctx, res, err, map[bus.UserKey]narrowing{from: {}})
	})
}

// succeed is step 1. already reports that the rotation was complete before.
func (s *Store) succeed(ctx context.Context, from, to bus.UserKey) (already bool, err error) {
	want := s.allUsers(ctx)
	old, _, ok := s.view.User(from)
	if !ok {
		return false, s.noUser(from)
	}
	if old.RotatedTo != nil && *old.RotatedTo != to {
		return false, bus.E(bus.Conflict, "%s has moved to the key %s", old.Handle, *old.RotatedTo).
			WithHint("unibusctl user rotate %s --sign-pub KEY", *old.RotatedTo)
	}
	known, err := s.view.Access(to)
	if err != nil {
		return false, err
	}
	if known != nil {
		if known.User.Rotates == nil || *known.User.Rotates != from {
			return false, alreadyRegistered(to, known)
		}
		return known.User.Becomes == "", nil
	}
	if old.Becomes != "" {
		return false, changeable(old)
	}
	u := s.newUser(to, old.Handle, old.Role)
	u.Status, u.Rotates, u.Becomes, u.ExpiresAt = bus.Suspended, &from, bus.Active, old.ExpiresAt
	if old.Status == bus.Suspended {
		u.Becomes = bus.Suspended // a new key does not end a suspension
	}
	_, err = s.change(ctx, usersIdx, to.Hex(), u, want)
	return false, raced(err)
}

// moveRooms is step 2. It reports how many memberships it had to write.
func (s *Store) moveRooms(ctx context.Context, from, to bus.UserKey) (moved int, err error) {
	for _, m := range s.view.MembershipsOf(from) {
		room, _, ok := s.view.Room(m.Room)
		if m.Status != bus.Present || !ok || room.Status != bus.RoomActive {
			continue
		}
		want := s.allMemberships(ctx, to)
		if has, _, ok := s.view.Membership(m.Room, to); ok && has.Status == bus.Present {
			continue
		}
		if _, err := s.putMembership(ctx, s.newMembership(m.Room, to, m.Role), want); err != nil {
			return moved, err
		}
		moved++
	}
	return moved, nil
}

// handOver is step 3.
func (s *Store) handOver(ctx context.Context, from, to bus.UserKey) (Result, error) {
	want := s.allUsers(ctx) // nobody may take the successor away meanwhile: it may be the last admin
	old, _, ok := s.view.User(from)
	if !ok {
		return Result{}, s.noUser(from)
	}
	if u, _, ok := s.view.User(to); !ok || u.Status == bus.Revoked {
		return Result{}, successorGone(to)
	}
	if old.Status != bus.Revoked {
		now := s.stamp()
		old.Status, old.RevokedAt = bus.Revoked, &now
	}
	old.RotatedTo = &to
	// Written also if it is so already: that proves it again.
	res, err := s.change(ctx, usersIdx, from.Hex(), old, want)
	return res, raced(err)
}

// finishRotation is steps 4 and 5. It is what the reconciler does for a
// rotation that was interrupted after step 3.
func (s *Store) finishRotation(ctx context.Context, from, to bus.UserKey) (Result, error) {
	u, rev, ok := s.view.User(to)
	if !ok {
		return Result{}, s.noUser(to)
	}
	if u.Status == bus.Revoked {
		return Result{}, successorGone(to)
	}
	if u.Becomes != "" {
		u.Status, u.Becomes = u.Becomes, ""
	}
	res, err := s.change(ctx, usersIdx, to.Hex(), u, expectation{revision: rev})
	if err != nil {
		return res, raced(err)
	}
	for _, m := range s.view.MembershipsOf(from) {
		if m.Status != bus.Present {
			continue
		}
		now := s.stamp()
		m.Status, m.RemovedAt = bus.Removed, &now
		if _, err := s.putMembership(ctx, m.Membership, expectation{revision: m.Revision}); err != nil {
			return res, err
		}
	}
	return res, nil
}

func successorGone(to bus.UserKey) *bus.Error {
	return bus.E(bus.Conflict, "the new key %s is revoked and can take over nothing", to)
}

// interrupted lists the rotations that stopped between steps 3 and 5: the old
// key is revoked in favour of a new one that does not stand in for it yet.
func (v *View) interrupted() (out []rotation) {
	for _, old := range v.Users() {
		if old.RotatedTo == nil {
			continue
		}
		u, _, ok := v.User(*old.RotatedTo)
		if !ok || u.Rotates == nil || *u.Rotates != old.Key {
			continue
		}
		left := slices.ContainsFunc(v.MembershipsOf(old.Key), func(m MembershipRevision) bool { return m.Status == bus.Present })
		if u.Status != bus.Revoked && (u.Becomes != "" || left) {
			out = append(out, rotation{old.Key, u.Key})
		}
	}
	return out
}

// rotation is one that stopped half-way.
type rotation struct{ from, to bus.UserKey }
