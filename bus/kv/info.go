package kv

import (
	"errors"
	"fmt"
	"time"

	"unibus.internal/bus"
)

// This file says how what a View holds is shown to programs and people. The
// API and unibusctl --direct both answer with it.

// UserInfoOf shows a user.
func UserInfoOf(u UserRevision) bus.UserInfo {
	return bus.UserInfo{
		SignPub: u.Key, NKey: u.Key.NKey(), Handle: u.Handle, Role: u.Role, Status: u.Status,
		ExpiresAt: u.ExpiresAt, CreatedAt: u.CreatedAt, RevokedAt: u.RevokedAt, Revision: u.Revision,
	}
}

// UserDetail shows one user with their rooms. An unreadable record is an error
// of its own, never NotFound.
func (v *View) UserDetail(k bus.UserKey) (bus.UserDetail, error) {
	a, err := v.Access(k)
	if err != nil {
		return bus.UserDetail{}, err
	}
	if a == nil {
		return bus.UserDetail{}, bus.E(bus.NotFound, "no user %s", k).WithHint("unibusctl user list")
	}
	return bus.UserDetail{
		UserInfo: UserInfoOf(UserRevision{a.User, a.Revision}), Rooms: a.roomGrants(),
		EncryptionKey: a.User.EncryptionKey, RotatedTo: a.User.RotatedTo,
	}, nil
}

func (a *Access) roomGrants() []bus.RoomGrant {
	out := make([]bus.RoomGrant, len(a.Rooms))
	for i, g := range a.Rooms {
		out[i] = bus.RoomGrant{Room: g.Room, Role: g.Role, Durable: g.Durable, Encrypted: g.Encrypted}
	}
	return out
}

// RoomInfo shows a room.
func (v *View) RoomInfo(id bus.RoomID) (bus.RoomInfo, bool) {
	r, rev, ok := v.Room(id)
	if !ok {
		return bus.RoomInfo{}, false
	}
	return v.roomInfo(RoomRevision{r, rev}), true
}

// RoomInfos shows all rooms, sorted by id.
func (v *View) RoomInfos() []bus.RoomInfo {
	rooms := v.Rooms()
	out := make([]bus.RoomInfo, len(rooms))
	for i, r := range rooms {
		out[i] = v.roomInfo(r)
	}
	return out
}

func (v *View) roomInfo(r RoomRevision) bus.RoomInfo {
	var keep *bus.Retention
	if r.Durable {
		filled := r.Retention.Filled()
		keep = &filled
	}
	return bus.RoomInfo{
		Room: r.ID, Status: r.Status, Durable: r.Durable, Encrypted: r.Encrypted, Description: r.Description,
		Creator: r.Creator, CreatedAt: r.CreatedAt, ArchivedAt: r.ArchivedAt,
		Retention: keep, Purged: r.Purged, Members: v.present(r.ID), Revision: r.Revision,
	}
}

// present counts the present members of a room.
func (v *View) present(id bus.RoomID) (n int) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for u := range v.tables[membersIdx].byRoom[id] {
		if v.tables[membersIdx].members[u][id].m.Status == bus.Present {
			n++
		}
	}
	return n
}

// MemberInfos shows who is in a room, sorted by key; with all, also who was.
func (v *View) MemberInfos(id bus.RoomID, all bool) []bus.MemberInfo {
	out := []bus.MemberInfo{}
	for _, m := range v.Members(id) {
		if m.Status != bus.Present && !all {
			continue
		}
		u, _, _ := v.User(m.User)
		out = append(out, bus.MemberInfo{
			SignPub: m.User, NKey: m.User.NKey(), Handle: u.Handle, Role: m.Role, Status: m.Status, UserStatus: u.Status,
			AddedAt: m.AddedAt, RemovedAt: m.RemovedAt, Revision: m.Revision,
		})
	}
	return out
}

// Explain says what a user may do on NATS at that moment, and what grants it.
func (v *View) Explain(k bus.UserKey, now time.Time) (bus.AccessInfo, error) {
	a, err := v.Access(k)
	if err != nil {
		return bus.AccessInfo{}, err
	}
	if a == nil {
		return bus.AccessInfo{}, bus.E(bus.NotFound, "no user %s", k).WithHint("unibusctl user list")
	}
	admitted, reason := a.Admitted(now)
	out := bus.AccessInfo{
		User: UserInfoOf(UserRevision{a.User, a.Revision}), Admitted: admitted, Reason: reason, Rooms: a.roomGrants(),
		Publish: []bus.SubjectRule{}, Subscribe: []bus.SubjectRule{},
	}
	if admitted {
		out.Publish, out.Subscribe = a.Permissions()
	}
	return out, nil
}

// Admitted decides whether a user may use the bus at that moment: exactly one
// whose record says active, who has not expired, and whose rooms fit into a
// connection. The reason is the word that log, metrics and audit use.
func (a *Access) Admitted(now time.Time) (ok bool, reason string) {
	switch {
	case a.User.Status == bus.Revoked:
		return false, "revoked"
	case a.User.Status == bus.Suspended:
		return false, "suspended"
	case a.User.Status != bus.Active:
		return false, "unknown_status"
	case !a.User.ActiveAt(now):
		return false, "expired"
	case len(a.Rooms) > bus.MaxRoomsPerUser:
		return false, "too_many_rooms"
	}
	return true, "active"
}

// Permissions lists exactly the subjects that an access grants, each with what
// grants it: the whole access policy of account BUS. Neither list may be empty
// when it becomes a credential; an empty one would allow everything.
func (a *Access) Permissions() (publish, subscribe []bus.SubjectRule) {
	publish = make([]bus.SubjectRule, 0, len(a.Rooms))
	subscribe = make([]bus.SubjectRule, 0, len(a.Rooms)+2)
	subscribe = append(subscribe, bus.SubjectRule{Subject: bus.InboxSubscribe(a.User.Key)}, bus.SubjectRule{Subject: bus.NoticeSubscribe(a.User.Key)})
	say := bus.RoomPublishBy(a.User.Key)
	for _, g := range a.Rooms {
		if g.Role.MayPublish() {
			publish = append(publish, bus.SubjectRule{Subject: say(g.Room), Room: g.Room, Role: g.Role})
		}
		if g.Role.Rank() == 0 {
			continue
		}
		hear := bus.RoomSubscribe(g.Room)
		if g.Durable {
			hear = bus.FeedSubscribe(g.Room)
		}
		subscribe = append(subscribe, bus.SubjectRule{Subject: hear, Room: g.Room, Role: g.Role})
	}
	return publish, subscribe
}

// ChangeOf is a result as it is shown. A change that is committed but not
// proven is a change too: Verified is false, and no error is returned.
func ChangeOf(res Result, err error) (bus.Change, error) {
	c := bus.Change{
		What: res.What, Revision: res.Revision, Already: res.Already, Holders: res.Holders, Expired: instances(res.Expired),
		Callouts: res.Acknowledged("authcallout"), ElapsedMS: res.Elapsed.Milliseconds(), Verified: err == nil,
		Closed: res.Closed,
	}
	if w := res.Swept; w != nil {
		c.Servers = fmt.Sprintf("%d/%d", len(w.Answered), len(w.Answered)+len(w.Missing))
		c.Unproven = w.Missing
		c.Verified = c.Verified && len(w.Missing) == 0
	}
	if u := new(Unproven); errors.As(err, &u) {
		c.Revision, c.Waiting, err = u.Revision, instances(u.Waiting), nil
	}
	return c, err
}

func instances(hs []Holder) []string {
	out := []string{}
	for _, h := range hs {
		out = append(out, h.Instance)
	}
	return out
}
