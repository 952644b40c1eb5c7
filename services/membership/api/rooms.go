package api

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

type roomPath struct {
	Room bus.RoomID `path:"room"`
}

type memberPath struct {
	Room bus.RoomID `path:"room"`
	User userName   `path:"user"`
}

type roomsAnswer struct {
	Rooms []bus.RoomInfo `json:"rooms"`
	Next  string         `json:"next"`
}

type roomAnswer struct {
	Room bus.RoomDetail `json:"room"`
}

func (r roomAnswer) revision() uint64 { return r.Room.Revision }

type membersAnswer struct {
	Room    bus.RoomID       `json:"room"`
	Members []bus.MemberInfo `json:"members"`
}

// inside is a room as a target for a caller: with the role that they have in
// it now. The role outlives the room, so that archiving it again is repeating
// and not a riddle.
func (a *api) inside(c *caller, id bus.RoomID, user bus.UserKey) target {
	t := target{room: id, user: user}
	m, _, ok := a.view.Membership(id, c.key)
	if ok {
		t.past = true
		if m.Status == bus.Present {
			t.role = m.Role
		}
	}
	return t
}

func (a *api) aboutRoom(id bus.RoomID, user bus.UserKey) func(*caller) target {
	return func(c *caller) target { return a.inside(c, id, user) }
}

type listRooms struct {
	Limit int    `query:"limit" minimum:"1" maximum:"500" default:"100"`
	After string `query:"after" doc:"next of the page before"`
	All   bool   `query:"all" doc:"every room, not only the caller's own; admins only"`
}

func (a *api) rooms(_ context.Context, c *caller, in *listRooms) (roomsAnswer, error) {
	act := roomList
	if in.All {
		act = roomListAll
	}
	if err := a.authorize(c, act, target{}); err != nil {
		return roomsAnswer{}, err
	}
	if in.After != "" {
		if _, err := bus.ParseRoomID(in.After); err != nil {
			return roomsAnswer{}, invalid("after is not a cursor that this list gave")
		}
	}
	var ids []bus.RoomID
	if in.All {
		for _, r := range a.view.Rooms() {
			ids = append(ids, r.ID)
		}
	} else {
		for _, m := range a.view.MembershipsOf(c.key) {
			if m.Status == bus.Present {
				ids = append(ids, m.Room)
			}
		}
	}
	slices.Sort(ids)
	page, next := cut(ids, in.Limit, in.After, func(id bus.RoomID) string { return string(id) })
	out := roomsAnswer{Rooms: make([]bus.RoomInfo, 0, len(page)), Next: next}
	for _, id := range page {
		if r, ok := a.view.RoomInfo(id); ok {
			out.Rooms = append(out.Rooms, r)
		}
	}
	return out, nil
}

func (a *api) room(_ context.Context, c *caller, in *roomPath) (roomAnswer, error) {
	if err := a.authorize(c, roomShow, a.inside(c, in.Room, bus.UserKey{})); err != nil {
		return roomAnswer{}, err
	}
	r, ok := a.view.RoomInfo(in.Room)
	if !ok {
		return roomAnswer{}, noRoom(in.Room)
	}
	return roomAnswer{bus.RoomDetail{RoomInfo: r, Members: a.view.MemberInfos(in.Room, false)}}, nil
}

type createRoomRequest struct {
	Body createRoomBody
}

type createRoomBody struct {
	Room        bus.RoomID     `json:"room"`
	Durable     bool           `json:"durable,omitempty" doc:"what is sent is kept; fixed for ever"`
	Encrypted   bool           `json:"encrypted,omitempty" doc:"end to end; fixed for ever"`
	Description string         `json:"description,omitempty" maxLength:"200"`
	Retention   *bus.Retention `json:"retention,omitempty" doc:"what a durable room keeps; may be changed"`
	Owner       userName       `json:"owner,omitempty" doc:"the first owner, if not the caller; admins only"`
}

func (a *api) createRoom(c *caller, in *createRoomRequest) (plan, error) {
	owner := c.key
	if in.Body.Owner != "" {
		if owner = a.known(c, in.Body.Owner, ""); owner != c.key {
			if err := a.authorize(c, roomCreate, target{room: in.Body.Room, user: owner}); err != nil {
				return plan{}, err
			}
			if owner == (bus.UserKey{}) {
				return plan{}, noUser(in.Body.Owner)
			}
		}
	}
	o := kv.RoomOptions{Durable: in.Body.Durable, Encrypted: in.Body.Encrypted, Description: in.Body.Description}
	if in.Body.Retention != nil {
		o.Retention = *in.Body.Retention
	}
	return plan{
		action: roomCreate, target: func(*caller) target { return target{room: in.Body.Room, user: owner} },
		do: func(ctx context.Context, s *kv.Store) (effect, error) {
			if err := a.stream(ctx, c, in.Body.Room, o); err != nil {
				return effect{}, err
			}
			return changed(s.CreateRoom(ctx, in.Body.Room, owner, o))
		},
	}, nil
}

// maxDurableRooms bounds the durable rooms that one member has made and not
// archived: each takes space that the others then have not.
const maxDurableRooms = 16

// stream makes the stream of a durable room before the room: a room without one
// would be there and take nothing. A stream without a room is empty, and waits
// for it.
func (a *api) stream(ctx context.Context, c *caller, id bus.RoomID, o kv.RoomOptions) error {
	if _, _, there := a.view.Room(id); !o.Durable || there {
		return nil // there: the Store says so
	}
	if err := o.Retention.Validate(); err != nil {
		return err
	}
	if c.access.User.Role != bus.Admin {
		made := 0
		for _, r := range a.view.DurableRooms() {
			if r.Status == bus.RoomActive && r.Creator == c.key {
				made++
			}
		}
		if made >= maxDurableRooms {
			return bus.E(bus.Conflict, "you have made %d durable rooms, the most a member may", made).WithHint("unibusctl room archive ROOM --messages purge")
		}
	}
	return a.stored.Ensure(ctx, id, o.Retention)
}

type patchRoomRequest struct {
	Room    bus.RoomID  `path:"room"`
	IfMatch revisionTag `header:"If-Match"`
	Body    patchRoomBody
}

type patchRoomBody struct {
	Description *string        `json:"description,omitempty" maxLength:"200"`
	Retention   *bus.Retention `json:"retention,omitempty" doc:"of a durable room; when it gets less, the oldest messages go at once"`
}

func (a *api) patchRoom(_ *caller, in *patchRoomRequest) (plan, error) {
	p := kv.RoomPatch{Description: in.Body.Description, Retention: in.Body.Retention, Revision: in.IfMatch.revision()}
	if p.Description == nil && p.Retention == nil {
		return plan{}, invalid("there is nothing to change")
	}
	return plan{
		action: roomPatch, target: a.aboutRoom(in.Room, bus.UserKey{}),
		do: func(ctx context.Context, s *kv.Store) (effect, error) {
			done, err := changed(s.PatchRoom(ctx, in.Room, p))
			if err == nil && p.Retention != nil {
				err = a.stored.Ensure(ctx, in.Room, *p.Retention)
			}
			return done, err
		},
	}, nil
}

type archiveRoomRequest struct {
	Room     bus.RoomID `path:"room"`
	Messages string     `query:"messages" enum:"keep,purge" default:"keep" doc:"what the room has stored, messages and files: keep it for who was in it at the end, or take it away"`
}

func (a *api) archiveRoom(_ *caller, in *archiveRoomRequest) (plan, error) {
	purge := in.Messages == "purge"
	return plan{
		action: roomArchive, target: a.aboutRoom(in.Room, bus.UserKey{}), detail: summary("messages", in.Messages),
		do: func(ctx context.Context, s *kv.Store) (effect, error) {
			done, err := changed(s.ArchiveRoom(ctx, in.Room, purge))
			if err != nil || !purge {
				return done, err
			}
			if r, _, _ := a.view.Room(in.Room); r.Durable {
				err = a.stored.Purge(ctx, in.Room) // a recorder will, otherwise
			}
			if a.blobs != nil {
				err = errors.Join(err, a.blobs.PurgeRoom(ctx, in.Room)) // the reconciler will, otherwise
			}
			return done, err
		},
	}, nil
}

type listMessages struct {
	Room   bus.RoomID `path:"room"`
	After  uint64     `query:"after" doc:"messages behind this sequence"`
	Since  time.Time  `query:"since" doc:"messages stored from this time on; after is not looked at"`
	Newest bool       `query:"newest" doc:"the newest limit messages; after and since are not looked at"`
	Limit  int        `query:"limit" minimum:"1" maximum:"1000" default:"100"`
}

type messagesAnswer struct {
	Room     bus.RoomID          `json:"room"`
	Messages []bus.StoredMessage `json:"messages"`
	Last     uint64              `json:"last"`
}

func (a *api) messages(ctx context.Context, _ *caller, in *listMessages) (messagesAnswer, error) {
	out := messagesAnswer{Room: in.Room, Messages: []bus.StoredMessage{}}
	r, _, ok := a.view.Room(in.Room)
	switch {
	case !ok:
		return out, noRoom(in.Room)
	case !r.Durable:
		return out, bus.E(bus.Conflict, "room %s is not durable: it has stored nothing", in.Room)
	case r.Purged:
		return out, nil
	}
	after, since := in.After, in.Since
	if in.Newest {
		last, err := a.stored.Newest(ctx, in.Room)
		if err != nil {
			return out, err
		}
		out.Last, since = last, time.Time{}
		after = last - min(last, uint64(in.Limit))
	}
	messages, err := a.stored.Messages(ctx, in.Room, after, since, in.Limit)
	if err == nil {
		out.Messages = messages
	}
	return out, err
}

type listMembers struct {
	Room bus.RoomID `path:"room"`
	All  bool       `query:"all" doc:"also who left or was removed"`
}

func (a *api) members(_ context.Context, c *caller, in *listMembers) (membersAnswer, error) {
	if err := a.authorize(c, memberList, a.inside(c, in.Room, bus.UserKey{})); err != nil {
		return membersAnswer{}, err
	}
	if _, ok := a.view.RoomInfo(in.Room); !ok {
		return membersAnswer{}, noRoom(in.Room)
	}
	return membersAnswer{in.Room, a.view.MemberInfos(in.Room, in.All)}, nil
}

type setMemberRequest struct {
	Room bus.RoomID `path:"room"`
	User userName   `path:"user"`
	Body setMemberBody
}

type setMemberBody struct {
	Role bus.RoomRole `json:"role"`
}

func (a *api) setMember(c *caller, in *setMemberRequest) (plan, error) {
	return a.membership(c, memberPath{in.Room, in.User}, memberSet, summary("role", string(in.Body.Role)),
		func(ctx context.Context, s *kv.Store, k bus.UserKey) (kv.Result, error) {
			return s.SetMember(ctx, in.Room, k, in.Body.Role)
		})
}

func (a *api) removeMember(c *caller, in *memberPath) (plan, error) {
	return a.membership(c, *in, memberRemove, "", func(ctx context.Context, s *kv.Store, k bus.UserKey) (kv.Result, error) {
		return s.RemoveMember(ctx, in.Room, k)
	})
}

// membership plans a change of one member. The room is decided about first:
// to who is not in it, every user is as unknown as the room.
func (a *api) membership(c *caller, p memberPath, act action, detail string, do func(context.Context, *kv.Store, bus.UserKey) (kv.Result, error)) (plan, error) {
	k := a.known(c, p.User, p.Room)
	if err := a.authorize(c, act, a.inside(c, p.Room, k)); err != nil {
		return plan{}, err
	}
	if _, _, ok := a.view.Room(p.Room); !ok {
		return plan{}, noRoom(p.Room)
	}
	if k == (bus.UserKey{}) {
		_, err := a.find(c, p.User, p.Room)
		return plan{}, err
	}
	return plan{
		action: act, target: a.aboutRoom(p.Room, k), detail: detail,
		do: func(ctx context.Context, s *kv.Store) (effect, error) { return changed(do(ctx, s, k)) },
	}, nil
}

// The routes about rooms.
func roomOperations() []operation {
	notFound := []int{http.StatusNotFound}
	changes := []int{http.StatusForbidden, http.StatusNotFound, http.StatusConflict}
	noOracle := "To who is not a member there is no such room."
	return []operation{
		change[createRoomRequest, bus.Change](spec{
			id: "createRoom", method: http.MethodPost, path: "/v1/rooms", tag: "rooms", summary: "Make a room",
			detail: "Every user may, and becomes its owner. An id is never used twice, also not after the room is archived.",
			body:   createRoomBody{Room: "ops", Description: "what happens on the machines"}, answer: exampleChange, errors: changes,
		}, http.StatusCreated, (*api).createRoom),
		read(spec{
			id: "listRooms", method: http.MethodGet, path: "/v1/rooms", tag: "rooms", summary: "List rooms",
			detail: "The caller's own, archived ones included; for admins with all=true every room. Sorted by id; give next as after for the following page, until it is empty.",
			answer: roomsAnswer{[]bus.RoomInfo{exampleRoom}, ""}, errors: []int{http.StatusForbidden},
		}, (*api).rooms),
		read(spec{
			id: "showRoom", method: http.MethodGet, path: "/v1/rooms/{room}", tag: "rooms", summary: "Show a room and its members",
			detail: "Members and admins. " + noOracle, answer: roomAnswer{exampleRoomDetail}, errors: notFound,
		}, (*api).room),
		change[patchRoomRequest, bus.Change](spec{
			id: "changeRoom", method: http.MethodPatch, path: "/v1/rooms/{room}", tag: "rooms", summary: "Change a room's description, or what it keeps",
			detail: "Owners and admins. With If-Match, only if the record is still at that revision, else 409. " + noOracle,
			body:   map[string]any{"description": "nightly jobs"}, answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).patchRoom),
		change[archiveRoomRequest, bus.Change](spec{
			id: "archiveRoom", method: http.MethodDelete, path: "/v1/rooms/{room}", tag: "rooms", summary: "Archive a room for good",
			detail: "Owners and admins. Nobody writes into it any more; its record stays, and what it has stored for who was in it at the end, unless messages=purge. Goes on when the audit cannot be written. " + noOracle, answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).archiveRoom),
		consult(spec{
			id: "listMessages", method: http.MethodGet, path: "/v1/rooms/{room}/messages", tag: "rooms", summary: "Read what a durable room has stored",
			detail: "Members only, admins too; also of an archived room, by who was in it at the end. The oldest first, or the newest with newest=true, and then last is the sequence of the newest message, kept or not; there may be more until none comes. A sequence that is left out between two messages is kept no more; the newest may be missing for a moment. " + noOracle,
			answer: messagesAnswer{"ops", []bus.StoredMessage{exampleMessage}, 0}, errors: []int{http.StatusNotFound, http.StatusConflict},
		}, roomMessages, func(a *api, c *caller, in *listMessages) target { return a.inside(c, in.Room, bus.UserKey{}) }, (*api).messages),
		read(spec{
			id: "listMembers", method: http.MethodGet, path: "/v1/rooms/{room}/members", tag: "rooms", summary: "List the members of a room",
			detail: "Members and admins. " + noOracle, answer: membersAnswer{"ops", []bus.MemberInfo{exampleMember}}, errors: notFound,
		}, (*api).members),
		change[setMemberRequest, bus.Change](spec{
			id: "setMember", method: http.MethodPut, path: "/v1/rooms/{room}/members/{user}", tag: "rooms", summary: "Add a member, or change their role",
			detail: "Owners and admins. " + noOracle, body: setMemberBody{bus.Writer}, answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).setMember),
		change[memberPath, bus.Change](spec{
			id: "removeMember", method: http.MethodDelete, path: "/v1/rooms/{room}/members/{user}", tag: "rooms", summary: "Remove a member, or leave",
			detail: "Owners and admins; users themselves may leave. Goes on when the audit cannot be written. " + noOracle,
			answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).removeMember),
	}
}
