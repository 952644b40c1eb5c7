package kv

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
)

const (
	// DefaultInvite and MaxInvite bound how long an invite may wait for its
	// newcomer.
	DefaultInvite = 24 * time.Hour
	MaxInvite     = 30 * 24 * time.Hour
	minInvite     = time.Minute
	maxInvited    = 50 // rooms of one invite
)

// invite is a record of KV_UNIBUS_invites. The secret itself is nowhere: who
// reads the bucket or a backup of it can redeem nothing.
type invite struct {
	V         int               `json:"v"`
	ID        string            `json:"id"`
	Secret    string            `json:"secret_sha256"`
	Status    bus.InviteStatus  `json:"status"`
	Role      bus.Role          `json:"role"`
	Handle    bus.Handle        `json:"handle,omitempty"`
	Rooms     []bus.InvitedRoom `json:"rooms"`
	ExpiresAt time.Time         `json:"expires_at"`
	CreatedAt time.Time         `json:"created_at"`
	CreatedBy string            `json:"created_by"`
	UsedBy    *bus.UserKey      `json:"used_by,omitempty"`
	UsedAt    *time.Time        `json:"used_at,omitempty"`
}

func (i invite) info(rev uint64) bus.InviteInfo {
	rooms := i.Rooms
	if rooms == nil {
		rooms = []bus.InvitedRoom{}
	}
	return bus.InviteInfo{
		ID: i.ID, Status: i.Status, Role: i.Role, Handle: i.Handle, Rooms: rooms,
		ExpiresAt: i.ExpiresAt, CreatedAt: i.CreatedAt, CreatedBy: i.CreatedBy, UsedBy: i.UsedBy, Revision: rev,
	}
}

func (i invite) validate() error {
	_, err := bus.ParseRole(string(i.Role))
	if i.Handle != "" && err == nil {
		_, err = bus.ParseHandle(string(i.Handle))
	}
	for _, r := range i.Rooms {
		_, err1 := bus.ParseRoomID(string(r.Room))
		_, err2 := bus.ParseRoomRole(string(r.Role))
		err = errors.Join(err, err1, err2)
	}
	if i.V != 1 || err != nil {
		return bus.E(bus.Internal, "invite %s cannot be read: version %d: %w", i.ID, i.V, err)
	}
	return nil
}

// InviteRequest says what an invite shall lead to.
type InviteRequest struct {
	Role   bus.Role
	Handle bus.Handle // empty: the newcomer chooses
	Rooms  []bus.InvitedRoom
	TTL    time.Duration // 0: DefaultInvite
}

// CreateInvite makes an invite that one new key may redeem once. The token is in
// the answer and nowhere else.
func (s *Store) CreateInvite(ctx context.Context, r InviteRequest) (bus.InviteCreated, error) {
	if r.TTL == 0 {
		r.TTL = DefaultInvite
	}
	if r.TTL < minInvite || r.TTL > MaxInvite {
		return bus.InviteCreated{}, bus.E(bus.Invalid, "an invite is good for 1m to 720h, not %s", r.TTL)
	}
	if len(r.Rooms) > maxInvited {
		return bus.InviteCreated{}, bus.E(bus.Invalid, "an invite leads into at most %d rooms", maxInvited)
	}
	if err := s.current(ctx); err != nil {
		return bus.InviteCreated{}, err
	}
	s = s.As(s.caller)
	s.begin()
	defer s.end()
	for _, room := range r.Rooms {
		if err := s.mustBeOpen(room.Room); err != nil {
			return bus.InviteCreated{}, err
		}
	}
	if r.Handle != "" {
		if u, _, taken := s.view.UserByHandle(r.Handle); taken {
			return bus.InviteCreated{}, handleTaken(u)
		}
	}
	raw := make([]byte, 8+20)
	if _, err := rand.Read(raw); err != nil {
		return bus.InviteCreated{}, bus.E(bus.Internal, "randomness: %w", err)
	}
	token := inviteToken{id: hex.EncodeToString(raw[:8]), secret: secretText.EncodeToString(raw[8:])}
	i := invite{
		V: 1, ID: token.id, Secret: token.hash(), Status: bus.InviteOpen, Role: r.Role, Handle: r.Handle, Rooms: r.Rooms,
		ExpiresAt: s.stamp().Add(r.TTL), CreatedAt: s.stamp(), CreatedBy: s.caller.Name,
	}
	if err := i.validate(); err != nil {
		return bus.InviteCreated{}, bus.E(bus.Invalid, "this invite is refused: %w", err)
	}
	rev, err := s.write(ctx, Invites, i.ID, i, expectation{})
	return bus.InviteCreated{InviteInfo: i.info(rev), Token: token.String()}, err
}

// Invites lists all invites that are still remembered, newest first.
func (s *Store) Invites(ctx context.Context) ([]bus.InviteInfo, error) {
	out := []bus.InviteInfo{}
	rctx, cancel := s.decide(ctx)
	defer cancel()
	err := s.readAll(rctx, Invites, func(key string, value []byte, rev uint64) {
		var i invite
		if json.Unmarshal(value, &i) == nil && i.ID == key && i.validate() == nil {
			out = append(out, i.info(rev))
		}
	})
	slices.SortFunc(out, func(a, b bus.InviteInfo) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return out, err
}

// WithdrawInvite makes an open invite good for nothing. already reports that it
// was so before.
func (s *Store) WithdrawInvite(ctx context.Context, id string) (info bus.InviteInfo, already bool, err error) {
	if !inviteID.MatchString(id) {
		return info, false, bus.E(bus.Invalid, "an invite id is 16 hex digits").WithHint("unibusctl invite list")
	}
	for {
		i, rev, err := s.readInvite(ctx, id)
		switch {
		case err != nil:
			return info, false, err
		case i.Status == bus.InviteUsed:
			return info, false, bus.E(bus.Conflict, "invite %s was used by %s", id, i.UsedBy).WithHint("unibusctl user revoke %s", i.UsedBy)
		case i.Status == bus.InviteWithdrawn:
			return i.info(rev), true, nil
		}
		i.Status = bus.InviteWithdrawn
		rev, err = s.write(ctx, Invites, id, i, expectation{revision: rev})
		if bus.CodeOf(err) == bus.Conflict {
			continue // somebody redeemed or withdrew it just now
		}
		return i.info(rev), false, err
	}
}

// notRedeemable is the one answer to every token that is not good: who guesses
// learns nothing from it.
func notRedeemable(why string) *bus.Error {
	return bus.E(bus.Unauthenticated, "this invite cannot be redeemed: %s", why)
}

// CheckInvite reports whether key may redeem the token now: nil, or
// Unauthenticated with a reason for the log, or Unavailable.
func (s *Store) CheckInvite(ctx context.Context, token string, key bus.UserKey) error {
	_, _, err := s.redeemable(ctx, token, key)
	return err
}

func (s *Store) redeemable(ctx context.Context, token string, key bus.UserKey) (invite, uint64, error) {
	t, err := parseInviteToken(token)
	if err != nil {
		return invite{}, 0, err
	}
	i, rev, err := s.readInvite(ctx, t.id)
	if bus.CodeOf(err) == bus.NotFound {
		return invite{}, 0, notRedeemable("unknown")
	}
	if err != nil {
		return invite{}, 0, err
	}
	if subtle.ConstantTimeCompare([]byte(i.Secret), []byte(t.hash())) != 1 {
		return invite{}, 0, notRedeemable("secret")
	}
	switch {
	case i.Status == bus.InviteUsed && *i.UsedBy == key: // who began may finish, also a little late
	case i.Status != bus.InviteOpen:
		return invite{}, 0, notRedeemable(string(i.Status))
	case !s.now().Before(i.ExpiresAt):
		return invite{}, 0, notRedeemable("expired")
	}
	return i, rev, s.inviterStands(i)
}

// inviterStands refuses the invites of an admin who is none any more: a revoked
// one must not have left a door open.
func (s *Store) inviterStands(i invite) error {
	k, err := bus.ParseUserKey(i.CreatedBy)
	if err != nil { // made on a node, by who holds the ops seed
		return nil
	}
	u, _, ok := s.view.User(k)
	if !ok || u.Role != bus.Admin || !u.ActiveAt(s.now()) {
		return notRedeemable("the inviter is no admin any more")
	}
	return nil
}

// inviter is the caller on whose behalf an invite is redeemed. What it gives is
// theirs to give until the last write: they are asked about before each one, and
// held, so that their revoke returns only when no invite of theirs can let
// anybody in any more.
func (s *Store) inviter(i invite) Caller {
	c := Caller{Name: i.CreatedBy, Key: s.caller.Key}
	if k, err := bus.ParseUserKey(i.CreatedBy); err == nil {
		c.Key = k
	}
	check := s.caller.Check
	c.Check = func() error {
		lease, _ := s.view.Lease()
		if err := s.inviterStands(i); err != nil {
			return err
		}
		if s.view.cfg.Lease != 0 && !s.view.Lasts(lease) { // a View without leases has a barrier behind it
			return bus.E(bus.Unavailable, "whether the inviter is still an admin is not known now: %s", s.view.Fault())
		}
		if check == nil {
			return nil
		}
		return check()
	}
	return c
}

// RedeemInvite registers key as the invite says. Write order: the invite is
// bound to this key, which grants nothing and shuts out every other; then user
// and memberships, as AddUser and SetMember do. Interrupted, the same key
// finishes it by the same call, also with another handle.
func (s *Store) RedeemInvite(ctx context.Context, token string, key bus.UserKey, handle bus.Handle) (Result, error) {
	if err := s.current(ctx); err != nil {
		return Result{}, err
	}
	i, rev, err := s.redeemable(ctx, token, key)
	if err != nil {
		return Result{}, err
	}
	switch {
	case i.Handle != "" && handle != "" && handle != i.Handle:
		return Result{}, bus.E(bus.Conflict, "this invite is for the handle %s", i.Handle)
	case i.Handle != "":
		handle = i.Handle
	case handle == "":
		return Result{}, bus.E(bus.Invalid, "this invite leaves the handle to you: choose one").WithHint("unibusctl join URL INVITE --handle NAME")
	}
	known, err := s.view.Access(key)
	if err != nil {
		return Result{}, err
	}
	if i.Status == bus.InviteOpen {
		if known != nil {
			return Result{}, alreadyRegistered(key, known)
		}
		now := s.stamp()
		i.Status, i.UsedBy, i.UsedAt = bus.InviteUsed, &key, &now
		if _, err := s.write(ctx, Invites, i.ID, i, expectation{revision: rev}); err != nil {
			if bus.CodeOf(err) == bus.Conflict {
				return Result{}, notRedeemable("somebody else was faster")
			}
			return Result{}, err
		}
	}
	s = s.As(s.inviter(i)) // who is to be asked about the newcomer
	res, err := s.enrol(ctx, i, key, handle, known)
	if err != nil {
		return res, err
	}
	for _, r := range i.Rooms {
		// Who was in the room once has had what the invite gives: to repeat the
		// call must not bring back who was removed, or left.
		if _, _, ok := s.view.Membership(r.Room, key); ok {
			continue
		}
		_, err := s.SetMember(ctx, r.Room, key, r.Role)
		if code := bus.CodeOf(err); code == bus.Conflict || code == bus.NotFound { // archived since
			s.log.Warn("an invite led into a room that is closed", "invite", i.ID, "room", r.Room, "err", err)
			continue
		}
		if err != nil {
			return res, err
		}
	}
	return res, nil
}

// enrol registers the newcomer, or proves again that they are.
func (s *Store) enrol(ctx context.Context, i invite, key bus.UserKey, handle bus.Handle, known *Access) (Result, error) {
	if known == nil {
		return s.AddUser(ctx, key, handle, i.Role)
	}
	if known.User.Status != bus.Active {
		return Result{}, notRedeemable("the user is " + string(known.User.Status))
	}
	return s.alter(ctx, key, "registered", func(*bus.User) (bool, error) { return false, nil })
}

var inviteID = regexp.MustCompile(`^[0-9a-f]{16}$`)

func (s *Store) readInvite(ctx context.Context, id string) (invite, uint64, error) {
	rctx, cancel := s.decide(ctx)
	defer cancel()
	m, err := s.readLast(rctx, Invites, id)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return invite{}, 0, bus.E(bus.NotFound, "no invite %s", id).WithHint("unibusctl invite list")
	}
	if err != nil {
		return invite{}, 0, bus.E(bus.Unavailable, "no quorum: read of invite %s: %w", id, err)
	}
	var i invite
	if err := json.Unmarshal(m.Data, &i); err != nil {
		return invite{}, 0, bus.E(bus.Internal, "invite %s cannot be read: %w", id, err)
	}
	if i.ID != id || (i.Status == bus.InviteUsed && i.UsedBy == nil) {
		return invite{}, 0, bus.E(bus.Internal, "invite %s cannot be read", id)
	}
	return i, m.Sequence, i.validate()
}

// inviteToken is what a newcomer holds: ubi_<id>_<secret>, 160 random bits.
type inviteToken struct{ id, secret string }

var (
	secretText = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)
	tokenForm  = regexp.MustCompile(`^ubi_([0-9a-f]{16})_([a-z2-7]{32})$`)
)

func parseInviteToken(s string) (inviteToken, error) {
	m := tokenForm.FindStringSubmatch(s)
	if m == nil {
		return inviteToken{}, notRedeemable("not a token")
	}
	return inviteToken{m[1], m[2]}, nil
}

func (t inviteToken) String() string { return "ubi_" + t.id + "_" + t.secret }

func (t inviteToken) hash() string {
	h := sha256.Sum256([]byte(strings.Join([]string{"unibus/v1/invite", t.id, t.secret}, "\x00")))
	return fmt.Sprintf("%x", h)
}
