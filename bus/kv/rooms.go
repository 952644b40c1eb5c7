package kv

import (
	"context"
	"fmt"
	"time"

	"unibus.internal/bus"
)

// RoomOptions are fixed when a room is made.
type RoomOptions struct {
	Durable     bool
	Encrypted   bool
	Description string
	Retention   bus.Retention // of a durable room; may change
}

// CreateRoom makes a room with its first owner. Write order: the room record,
// created only if the id was never used, admits nobody by itself; the owner's
// membership follows. Interrupted in between, the room has no members, and
// repeating the same call finishes it.
func (s *Store) CreateRoom(ctx context.Context, id bus.RoomID, owner bus.UserKey, o RoomOptions) (Result, error) {
	description, err := bus.ParseDescription(o.Description)
	if err != nil {
		return Result{}, err
	}
	if err := o.Retention.Validate(); err != nil {
		return Result{}, err
	}
	if !o.Durable && o.Retention != (bus.Retention{}) {
		return Result{}, errNothingKept
	}
	return s.retried(ctx, string(id), func(s *Store) (Result, error) {
		mayOwn := func() error {
			if err := s.mustBeActive(owner); err != nil {
				return err
			}
			return s.roomForOneMore(owner)
		}
		if err := mayOwn(); err != nil {
			return Result{}, err
		}
		if r, _, ok := s.view.Room(id); ok {
			same := r.Durable == o.Durable && r.Encrypted == o.Encrypted && r.Description == description && r.Retention == o.Retention
			if !same || r.Creator != owner || len(s.view.Members(id)) > 0 || r.Status != bus.RoomActive {
				return Result{}, roomExists(r)
			}
		} else {
			r := bus.Room{
				V: bus.RoomVersion, ID: id, Status: bus.RoomActive, Durable: o.Durable, Encrypted: o.Encrypted,
				Description: description, Creator: owner, CreatedAt: s.now().UTC().Truncate(time.Millisecond),
				Retention: o.Retention,
			}
			_, err := s.change(ctx, roomsIdx, string(id), r, expectation{})
			if bus.CodeOf(err) == bus.Conflict {
				return Result{}, bus.E(bus.Conflict, "room %s exists already", id).WithHint("unibusctl room show %s", id)
			}
			if err != nil {
				return Result{}, err
			}
		}
		want := s.allMemberships(ctx, owner)
		if err := mayOwn(); err != nil {
			return Result{}, err
		}
		res, err := s.putMembership(ctx, s.newMembership(id, owner, bus.Owner), want)
		res.What = fmt.Sprintf("room %s, owned by %s", id, s.nameOf(owner))
		return res, err
	})
}

// RoomPatch says what to change about a room; nil leaves as it is.
type RoomPatch struct {
	Description *string
	Retention   *bus.Retention
	Revision    uint64 // the change is made to this revision only; 0: to any
}

var errNothingKept = bus.E(bus.Invalid, "the room is not durable: it keeps nothing").WithHint("durable is chosen when a room is made: unibusctl room create --durable")

// PatchRoom changes what a room says of itself, and what it keeps.
func (s *Store) PatchRoom(ctx context.Context, id bus.RoomID, p RoomPatch) (Result, error) {
	return s.retried(ctx, string(id), func(s *Store) (Result, error) {
		if err := s.mustBeOpen(id); err != nil {
			return Result{}, err
		}
		r, rev, _ := s.view.Room(id)
		if err := matches(p.Revision, rev, string(id)); err != nil {
			return Result{}, err
		}
		before := r
		if p.Description != nil {
			d, err := bus.ParseDescription(*p.Description)
			if err != nil {
				return Result{}, err
			}
			r.Description = d
		}
		if p.Retention != nil {
			if err := p.Retention.Validate(); err != nil {
				return Result{}, err
			}
			if !r.Durable {
				return Result{}, errNothingKept
			}
			r.Retention = *p.Retention
		}
		res, err := s.change(ctx, roomsIdx, string(id), r, expectation{revision: rev})
		res.Already = r == before
		res.What = fmt.Sprintf("changed room %s", id)
		if res.Already {
			res.What = fmt.Sprintf("already_so: room %s", id)
		}
		return res, raced(err)
	})
}

// ArchiveRoom ends a room for good: nobody reaches it any more and its id is
// never used again. Its record and its members' stay. With purge what it has
// stored is marked to go, also of a room that is archived already; else it stays,
// for those who were in it. Repeating it proves it again.
func (s *Store) ArchiveRoom(ctx context.Context, id bus.RoomID, purge bool) (Result, error) {
	return s.retried(ctx, string(id), func(s *Store) (Result, error) {
		r, rev, ok := s.view.Room(id)
		if !ok {
			return Result{}, noRoom(id)
		}
		already := r.Status == bus.RoomArchived
		r.Purged = r.Purged || purge
		if !already {
			now := s.now().UTC().Truncate(time.Millisecond)
			r.Status, r.ArchivedAt = bus.RoomArchived, &now
		}
		res, err := s.change(ctx, roomsIdx, string(id), r, expectation{revision: rev})
		res.Already, res.What = already, fmt.Sprintf("archived room %s", id)
		if already {
			res.What = fmt.Sprintf("already_archived room %s", id)
		}
		who := map[bus.UserKey]narrowing{}
		for _, m := range s.view.Members(id) {
			if m.Status == bus.Present {
				who[m.User] = narrowing{since: m.AddedAt}
			}
		}
		return s.swept(ctx, res, raced(err), who)
	})
}

// matches refuses a change that was meant for another revision than there is.
func matches(want, have uint64, what string) error {
	if want != 0 && want != have {
		return bus.E(bus.Conflict, "%s is at revision %d, not %d: somebody changed it meanwhile", what, have, want)
	}
	return nil
}

// nameOf is how a change speaks of a user.
func (s *Store) nameOf(k bus.UserKey) string {
	if u, _, ok := s.view.User(k); ok {
		return string(u.Handle)
	}
	return k.NKey()
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
		AddedAt: s.now().UTC().Truncate(time.Millisecond), AddedBy: s.caller.Name,
	}
}

// SetMember adds a user to a room or changes their role there. Write order: the
// membership, which grants, then the index, which only proposes. Repeating it
// proves it again.
func (s *Store) SetMember(ctx context.Context, id bus.RoomID, k bus.UserKey, role bus.RoomRole) (Result, error) {
	return s.retried(ctx, memberKey(id, k), func(s *Store) (Result, error) {
		if err := s.mustBeOpen(id); err != nil {
			return Result{}, err
		}
		if err := s.mustBeActive(k); err != nil {
			return Result{}, err
		}
		var want expectation
		old, rev, ok := s.view.Membership(id, k)
		if !ok || old.Status != bus.Present { // another role is no more rooms, and waits for nobody
			want = s.allMemberships(ctx, k)
			old, rev, ok = s.view.Membership(id, k)
		}
		if !ok || old.Status != bus.Present {
			if err := s.roomForOneMore(k); err != nil {
				return Result{}, err
			}
			res, err := s.putMembership(ctx, s.newMembership(id, k, role), want)
			res.What = fmt.Sprintf("%s is %s of room %s", s.nameOf(k), role, id)
			return res, err
		}
		already := old.Role == role
		old.Role = role
		res, err := s.putMembership(ctx, old, expectation{revision: rev})
		res.Already, res.What = already, fmt.Sprintf("%s is %s of room %s", s.nameOf(k), role, id)
		if already {
			res.What = fmt.Sprintf("already_%s %s in room %s", role, s.nameOf(k), id)
		}
		if role.MayPublish() {
			return res, err
		}
		return s.swept(ctx, res, err, map[bus.UserKey]narrowing{k: {since: old.AddedAt, publish: true}})
	})
}

// RemoveMember takes a user out of a room. Write order: the membership, which
// denies, then the index. Repeating it proves it again.
func (s *Store) RemoveMember(ctx context.Context, id bus.RoomID, k bus.UserKey) (Result, error) {
	return s.retried(ctx, memberKey(id, k), func(s *Store) (Result, error) {
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
		res.Already, res.What = already, fmt.Sprintf("%s is removed from room %s", s.nameOf(k), id)
		if already {
			res.What = fmt.Sprintf("already_removed %s from room %s", s.nameOf(k), id)
		}
		return s.swept(ctx, res, err, map[bus.UserKey]narrowing{k: {since: m.AddedAt}})
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
func (s *Store) allMemberships(ctx context.Context, k bus.UserKey) expectation {
	filter := subjectOf(Members, "*."+k.Hex())
	s.awaitTurn(ctx, filter)
	return expectation{revision: s.view.newestMembership(k), filter: filter}
}

func (v *View) newestMembership(k bus.UserKey) uint64 {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.tables[membersIdx].newestOf[k.Hex()]
}

// putMembership writes the truth and then the index that proposes it.
func (s *Store) putMembership(ctx context.Context, m bus.Membership, want expectation) (Result, error) {
	res, err := s.change(ctx, membersIdx, memberKey(m.Room, m.User), m, want, func() {
		if err := s.writeIndex(ctx, m); err != nil {
			s.log.Warn("index not written; the reconciler will", "key", memberKey(m.Room, m.User), "err", err)
		}
	})
	return res, raced(err)
}
