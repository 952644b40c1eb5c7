package api

import (
	"context"
	"net/http"
	"slices"

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
	Room        bus.RoomID `json:"room"`
	Durable     bool       `json:"durable,omitempty" doc:"what is sent is kept; fixed for ever"`
	Encrypted   bool       `json:"encrypted,omitempty" doc:"end to end; fixed for ever"`
	Description string     `json:"description,omitempty" maxLength:"200"`
	Owner       userName   `json:"owner,omitempty" doc:"the first owner, if not the caller; admins only"`
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
	return plan{
		action: roomCreate, target: func(*caller) target { return target{room: in.Body.Room, user: owner} },
		do: func(ctx context.Context, s *kv.Store) (effect, error) {
			return changed(s.CreateRoom(ctx, in.Body.Room, owner, o))
		},
	}, nil
}

type patchRoomRequest struct {
	Room    bus.RoomID  `path:"room"`
	IfMatch revisionTag `header:"If-Match"`
	Body    patchRoomBody
}

type patchRoomBody struct {
	Description string `json:"description" maxLength:"200"`
}

func (a *api) patchRoom(_ *caller, in *patchRoomRequest) (plan, error) {
	p := kv.RoomPatch{Description: &in.Body.Description, Revision: in.IfMatch.revision()}
	return plan{
		action: roomPatch, target: a.aboutRoom(in.Room, bus.UserKey{}),
		do: func(ctx context.Context, s *kv.Store) (effect, error) { return changed(s.PatchRoom(ctx, in.Room, p)) },
	}, nil
}

func (a *api) archiveRoom(_ *caller, in *roomPath) (plan, error) {
	return plan{
		action: roomArchive, target: a.aboutRoom(in.Room, bus.UserKey{}),
		do: func(ctx context.Context, s *kv.Store) (effect, error) { return changed(s.ArchiveRoom(ctx, in.Room)) },
	}, nil
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
			id: "changeRoom", method: http.MethodPatch, path: "/v1/rooms/{room}", tag: "rooms", summary: "Change a room's description",
			detail: "Owners and admins. With If-Match, only if the record is still at that revision, else 409. " + noOracle,
			body:   patchRoomBody{"nightly jobs"}, answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).patchRoom),
		change[roomPath, bus.Change](spec{
			id: "archiveRoom", method: http.MethodDelete, path: "/v1/rooms/{room}", tag: "rooms", summary: "Archive a room for good",
			detail: "Owners and admins. Nobody reaches it any more; its record stays. Goes on when the audit cannot be written. " + noOracle, answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).archiveRoom),
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
