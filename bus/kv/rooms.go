package kv

import (
	"context"
	"time"

	"unibus.internal/bus"
)

// RoomOptions are fixed when a room is made.
type RoomOptions struct {
	Durable   bool
	Encrypted bool
}

// CreateRoom makes a room with its first owner. Write order: the room record,
// created only if the id was never used, admits nobody by itself; the owner's
// membership follows. Interrupted in between, the room has no members, and
// repeating the same call finishes it.
func (s *Store) CreateRoom(ctx context.Context, id bus.RoomID, owner bus.UserKey, o RoomOptions) (Result, error) {
	return s.retried(ctx, string(id), func() (Result, error) {
		want := s.view.allMemberships(owner)
		if err := s.mustBeActive(owner); err != nil {
			return Result{}, err
		}
		if err := s.roomForOneMore(owner); err != nil {
			return Result{}, err
		}
		if r, _, ok := s.view.Room(id); ok {
			if r.Creator != owner || len(s.view.Members(id)) > 0 || r.Status != bus.RoomActive {
				return Result{}, roomExists(r)
			}
		} else {
			r := bus.Room{
				V: bus.RoomVersion, ID: id, Status: bus.RoomActive, Durable: o.Durable, Encrypted: o.Encrypted,
				Creator: owner, CreatedAt: s.now().UTC().Truncate(time.Millisecond),
			}
			_, err := s.change(ctx, roomsIdx, string(id), r, expectation{})
			if bus.CodeOf(err) == bus.Conflict {
				return Result{}, bus.E(bus.Conflict, "room %s exists already", id).WithHint("unibusctl room show %s", id)
			}
			if err != nil {
				return Result{}, err
			}
		}
		return s.putMembership(ctx, s.newMembership(id, owner, bus.Owner), want)
	})
}

func roomExists(r bus.Room) *bus.Error {
	if r.Status == bus.RoomArchived {
		return bus.E(bus.Conflict, "room %s was archived; an id is never used again", r.ID)
	}
	return bus.E(bus.Conflict, "room %s exists already", r.ID).WithHint("unibusctl room show %s", r.ID)
}

func (s *Store) mustBeActive(k bus.UserKey) error {
	u, _, ok := s.view.User(k)
	if !ok {
		return s.noUser(k)
	}
	if u.Status == bus.Revoked {
		return bus.E(bus.Conflict, "%s is revoked", u.Handle).WithHint("unibusctl user show %s", u.Handle)
	}
	return nil
}

// roomForOneMore keeps a user's permissions small enough to connect with.
func (s *Store) roomForOneMore(k bus.UserKey) error {
	a, err := s.view.Access(k)
	if err != nil {
		return err
	}
	if a != nil && len(a.Rooms) >= bus.MaxRoomsPerUser {
		return bus.E(bus.Conflict, "%s is in %d rooms, the most a user may be in", a.User.Handle, len(a.Rooms))
	}
	return nil
}

func (s *Store) newMembership(id bus.RoomID, k bus.UserKey, role bus.RoomRole) bus.Membership {
	return bus.Membership{
		V: bus.MembershipVersion, Room: id, User: k, Role: role, Status: bus.Present,
		AddedAt: s.now().UTC().Truncate(time.Millisecond), AddedBy: s.actor,
	}
}

// SetMember adds a user to a room or changes their role there. Write order: the
// membership, which grants, then the index, which only proposes. Repeating it
// proves it again.
func (s *Store) SetMember(ctx context.Context, id bus.RoomID, k bus.UserKey, role bus.RoomRole) (Result, error) {
	return s.retried(ctx, memberKey(id, k), func() (Result, error) {
		if err := s.mustBeOpen(id); err != nil {
			return Result{}, err
		}
		if err := s.mustBeActive(k); err != nil {
			return Result{}, err
		}
		want := s.view.allMemberships(k)
		old, rev, ok := s.view.Membership(id, k)
		present := ok && old.Status == bus.Present
		if !present {
			if err := s.roomForOneMore(k); err != nil {
				return Result{}, err
			}
			return s.putMembership(ctx, s.newMembership(id, k, role), want)
		}
		already := old.Role == role
		old.Role = role
		res, err := s.putMembership(ctx, old, expectation{revision: rev})
		res.Already = already
		return res, err
	})
}

// RemoveMember takes a user out of a room. Write order: the membership, which
// denies, then the index. Repeating it proves it again.
func (s *Store) RemoveMember(ctx context.Context, id bus.RoomID, k bus.UserKey) (Result, error) {
	return s.retried(ctx, memberKey(id, k), func() (Result, error) {
		if _, _, ok := s.view.Room(id); !ok {
			return Result{}, noRoom(id)
		}
		m, rev, ok := s.view.Membership(id, k)
		if !ok {
			return Result{}, bus.E(bus.NotFound, "no such member of room %s", id).WithHint("unibusctl room members %s", id)
		}
		already := m.Status == bus.Removed
		if !already {
			now := s.now().UTC().Truncate(time.Millisecond)
			m.Status, m.RemovedAt = bus.Removed, &now
		}
		res, err := s.putMembership(ctx, m, expectation{revision: rev})
		res.Already = already
		return res, err
	})
}

func (s *Store) mustBeOpen(id bus.RoomID) error {
	r, _, ok := s.view.Room(id)
	if !ok {
		return noRoom(id)
	}
	if r.Status != bus.RoomActive {
		return bus.E(bus.Conflict, "room %s is archived", id)
	}
	return nil
}

func noRoom(id bus.RoomID) *bus.Error {
	return bus.E(bus.NotFound, "no room %s", id).WithHint("unibusctl room list")
}

// allMemberships makes a write conditional on every membership record of a user,
// readable or not, being the one that was looked at: two rooms taking in one
// user at the same moment would else pass the limit, and nobody beyond it can
// connect. Take it before the look.
func (v *View) allMemberships(k bus.UserKey) expectation {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return expectation{revision: v.tables[membersIdx].newestOf[k.Hex()], filter: subjectOf(Members, "*."+k.Hex())}
}

// putMembership writes the truth and then the index that proposes it.
func (s *Store) putMembership(ctx context.Context, m bus.Membership, want expectation) (Result, error) {
	res, err := s.change(ctx, membersIdx, memberKey(m.Room, m.User), m, want)
	if err != nil {
		return res, raced(err)
	}
	if err := s.writeIndex(ctx, m); err != nil {
		s.log.Warn("index not written; the reconciler will", "key", memberKey(m.Room, m.User), "err", err)
	}
	return res, nil
}
