package kv

import (
	"context"
	"fmt"
	"time"

	"unibus.internal/bus"
)

// Records that come from another system are made by one write each, in the
// state they have there: somebody who is revoked there is active here at no
// moment. What was ever known here is refused, whatever the other system says
// of it, so that nothing that has ended comes back by an import.

// ImportedUser is a user as another system knows them.
type ImportedUser struct {
	Key       bus.UserKey
	Handle    bus.Handle
	Role      bus.Role
	Status    bus.Status
	ExpiresAt *time.Time // nil: never
}

// ImportUser registers a user in the state given. The rules and the order of
// writes are those of AddUser, and there has to be a first admin: Bootstrap
// would be refused for ever afterwards.
func (s *Store) ImportUser(ctx context.Context, i ImportedUser) (Result, error) {
	if i.ExpiresAt != nil && (!i.ExpiresAt.After(s.now()) || i.ExpiresAt.UTC().Year() > 9999) {
		return Result{}, bus.E(bus.Invalid, "an expiry is in the future and before the year 10000; %s is not", i.ExpiresAt.UTC().Format(time.RFC3339))
	}
	res, err := s.register(ctx, func(s *Store) (bus.User, error) {
		if s.view.revisionAnyUser() == 0 {
			return bus.User{}, bus.E(bus.Conflict, "there is no first admin yet").WithHint("unibusctl --direct bootstrap --handle NAME --sign-pub KEY")
		}
		u := s.newUser(i.Key, i.Handle, i.Role)
		u.Status = i.Status
		if i.ExpiresAt != nil {
			at := i.ExpiresAt.UTC().Truncate(time.Millisecond)
			u.ExpiresAt = &at
		}
		if i.Status == bus.Revoked {
			u.RevokedAt = &u.CreatedAt
		}
		return u, u.Validate()
	}, i.Key, i.Handle)
	res.What = fmt.Sprintf("registered %s as %s, %s, %s", i.Key, i.Handle, i.Role, i.Status)
	return res, err
}

// ImportedRoom is a room as another system knows it. Its creator is a name in
// the record and gets no access by it.
type ImportedRoom struct {
	ID       bus.RoomID
	Creator  bus.UserKey
	Archived bool
	RoomOptions
}

// ImportRoom makes a room without members. An archived one is a record only: it
// keeps the id from being used again.
func (s *Store) ImportRoom(ctx context.Context, i ImportedRoom) (Result, error) {
	description, err := bus.ParseDescription(i.Description)
	if err != nil {
		return Result{}, err
	}
	return s.retried(ctx, string(i.ID), func(s *Store) (Result, error) {
		if r, _, ok := s.view.Room(i.ID); ok {
			return Result{}, roomExists(r)
		}
		if _, _, ok := s.view.User(i.Creator); !ok {
			return Result{}, s.noUser(i.Creator)
		}
		now := s.stamp()
		r := bus.Room{
			V: bus.RoomVersion, ID: i.ID, Status: bus.RoomActive, Durable: i.Durable, Encrypted: i.Encrypted,
			Description: description, Creator: i.Creator, CreatedAt: now,
		}
		if i.Archived {
			r.Status, r.ArchivedAt = bus.RoomArchived, &now
		}
		if err := r.Validate(); err != nil {
			return Result{}, err
		}
		res, err := s.change(ctx, roomsIdx, string(i.ID), r, expectation{})
		if bus.CodeOf(err) == bus.Conflict { // perhaps a record that cannot be read
			return Result{}, bus.E(bus.Conflict, "room %s exists already", i.ID).WithHint("unibusctl room show %s", i.ID)
		}
		res.What = fmt.Sprintf("room %s, %s", i.ID, r.Status)
		return res, err
	})
}

// ImportMember adds a user to a room in which they never were. A membership
// that has ended here stays ended: only SetMember, by somebody who means it,
// begins it again.
func (s *Store) ImportMember(ctx context.Context, id bus.RoomID, k bus.UserKey, role bus.RoomRole) (Result, error) {
	return s.retried(ctx, memberKey(id, k), func(s *Store) (Result, error) {
		if err := s.mustBeOpen(id); err != nil {
			return Result{}, err
		}
		if err := s.mustBeActive(k); err != nil {
			return Result{}, err
		}
		want := s.allMemberships(ctx, k)
		if err := s.view.unreadable(membersIdx, memberKey(id, k)); err != nil {
			return Result{}, err
		}
		if m, _, ok := s.view.Membership(id, k); ok {
			return Result{}, bus.E(bus.Conflict, "%s is or was a member of room %s already: %s, %s", s.nameOf(k), id, m.Role, m.Status).
				WithHint("unibusctl room members %s --all", id)
		}
		if err := s.roomForOneMore(k); err != nil {
			return Result{}, err
		}
		res, err := s.putMembership(ctx, s.newMembership(id, k, role), want)
		res.What = fmt.Sprintf("%s is %s of room %s", s.nameOf(k), role, id)
		return res, err
	})
}

// unreadable is the error of a record that is there and cannot be understood. To
// write over it would be to guess what it was.
func (v *View) unreadable(i int, key string) error {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if b, ok := v.tables[i].broken[key]; ok {
		return bus.E(bus.Conflict, "record %s of %s cannot be read: %w", key, b.Bucket, b.Err)
	}
	return nil
}
