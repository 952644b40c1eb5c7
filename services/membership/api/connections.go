package api

import (
	"context"
	"net/http"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

type connectionQuery struct {
	User   userName   `query:"user"`
	Room   bus.RoomID `query:"room" doc:"of who is in that room now"`
	Server nodeName   `query:"server"`
	After  string     `query:"after" doc:"next of the page before"`
	Limit  int        `query:"limit" minimum:"1" maximum:"500" default:"100"`
}

type userConnections struct {
	User  userName `path:"user"`
	After string   `query:"after" doc:"next of the page before"`
	Limit int      `query:"limit" minimum:"1" maximum:"500" default:"100"`
}

type kickRequest struct {
	User   userName `path:"user"`
	Server nodeName `query:"server" doc:"only those to that node"`
	CID    uint64   `query:"cid" minimum:"1" doc:"only that one"`
}

// connectionUser resolves whom a request is about. A key that is nobody's may
// be asked for: it may be connected for a moment yet.
func (a *api) connectionUser(name userName) (k bus.UserKey, err error) {
	if name == "" {
		return k, nil
	}
	if k, err = bus.ParseUserKey(string(name)); err == nil {
		return k, nil
	}
	u, _, err := a.view.FindUser(string(name))
	if err != nil {
		return k, noUser(name)
	}
	return u.Key, nil
}

func (a *api) connections(ctx context.Context, _ *caller, in *connectionQuery) (bus.ConnectionList, error) {
	var after func(bus.ConnectionInfo) bool
	if in.After != "" {
		var err error
		if after, err = kv.ParseConnectionCursor(in.After); err != nil {
			return bus.ConnectionList{}, invalid("after is not a cursor that this list gave")
		}
	}
	k, err := a.connectionUser(in.User)
	if err != nil {
		return bus.ConnectionList{}, err
	}
	if _, _, ok := a.view.Room(in.Room); in.Room != "" && !ok {
		return bus.ConnectionList{}, noRoom(in.Room)
	}
	list, err := a.store.Connections(ctx, kv.ConnectionQuery{User: k, Room: in.Room, Node: string(in.Server)})
	if err != nil {
		return list, err
	}
	page := list.Connections[:0]
	for _, c := range list.Connections {
		if after != nil && !after(c) {
			continue
		}
		if len(page) == in.Limit {
			list.Next = kv.ConnectionCursor(page[len(page)-1])
			break
		}
		page = append(page, c)
	}
	list.Connections = page
	return list, nil
}

func (a *api) connectionsOfUser(ctx context.Context, c *caller, in *userConnections) (bus.ConnectionList, error) {
	return a.connections(ctx, c, &connectionQuery{User: in.User, After: in.After, Limit: in.Limit})
}

func (a *api) kick(c *caller, in *kickRequest) (plan, error) {
	if in.CID != 0 && in.Server == "" {
		return plan{}, invalid("cid counts on one server: name it too")
	}
	return a.aboutUser(c, in.User, connectionKick, kv.KickDetail(string(in.Server), in.CID), func(ctx context.Context, s *kv.Store, k bus.UserKey) (kv.Result, error) {
		return s.Kick(ctx, kv.ConnectionQuery{User: k, Node: string(in.Server), CID: in.CID})
	})
}

// The routes about connections.
func connectionOperations() []operation {
	errors := []int{http.StatusForbidden, http.StatusNotFound}
	example := bus.ConnectionList{Connections: []bus.ConnectionInfo{exampleConnection}, Servers: "3/3", Missing: []string{}}
	return []operation{
		consult(spec{
			id: "listConnections", method: http.MethodGet, path: "/v1/connections", tag: "connections", summary: "List who is connected",
			detail: "Admins only. By server and cid; give next as after for what follows, until it is empty. Of servers that are missing nothing is known.",
			answer: example, errors: errors,
		}, connectionList, nil, (*api).connections),
		consult(spec{
			id: "listUserConnections", method: http.MethodGet, path: "/v1/users/{user}/connections", tag: "connections", summary: "List a user's connections",
			detail: "Admins only. As listConnections.",
			answer: example, errors: errors,
		}, connectionList, nil, (*api).connectionsOfUser),
		change[kickRequest, bus.Change](spec{
			id: "kickConnections", method: http.MethodDelete, path: "/v1/users/{user}/connections", tag: "connections", summary: "Close a user's connections",
			detail: "Admins only. All, or those to one server, or one of them. It takes no access away: clients connect again.",
			answer: exampleKick, errors: []int{http.StatusForbidden, http.StatusNotFound},
		}, http.StatusOK, (*api).kick),
	}
}
