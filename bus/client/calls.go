package client

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"unibus.internal/bus"
)

// The sentence "may be sent again" in a comment says that the client does so
// by itself when an answer is lost: see the package comment. Reads always may.

// get is a read.
func (c *Client) get(ctx context.Context, path string, query url.Values, out any) error {
	if q := query.Encode(); q != "" {
		path += "?" + q
	}
	return c.exchange(ctx, call{method: http.MethodGet, path: path, again: true}, nil, out)
}

// again makes a change that may be sent again.
func (c *Client) again(ctx context.Context, method, path string, in any) (bus.Change, error) {
	var out bus.Change
	err := c.exchange(ctx, call{method: method, path: path, again: true}, in, &out)
	return out, err
}

// once makes a change that must not be sent twice.
func (c *Client) once(ctx context.Context, method, path string, in any) (bus.Change, error) {
	var out bus.Change
	err := c.exchange(ctx, call{method: method, path: path}, in, &out)
	return out, err
}

// patch changes what was read at a revision, or whatever is there now if the
// revision is 0.
func (c *Client) patch(ctx context.Context, path string, in any, revision uint64) (bus.Change, error) {
	var out bus.Change
	r := call{method: http.MethodPatch, path: path, again: revision != 0}
	if revision != 0 {
		r.header = http.Header{"If-Match": {`"` + strconv.FormatUint(revision, 10) + `"`}}
	}
	err := c.exchange(ctx, r, in, &out)
	return out, err
}

// userPath is the path of a user who is named as a person would.
func userPath(user string) (string, error) {
	if _, err := bus.ParseHandle(user); err == nil {
		return "/v1/users/" + user, nil
	}
	if _, err := bus.ParseUserKey(user); err != nil {
		return "", bus.E(bus.Invalid, "%s is neither a handle nor a user key", fmt.Sprintf("%.70q", user))
	}
	return "/v1/users/" + user, nil
}

func roomPath(id bus.RoomID) (string, error) {
	id, err := bus.ParseRoomID(string(id))
	return "/v1/rooms/" + string(id), err
}

func memberPath(id bus.RoomID, user string) (string, error) {
	room, err := roomPath(id)
	if err != nil {
		return "", err
	}
	_, err = userPath(user)
	return room + "/members/" + user, err
}

// Me is the caller.
func (c *Client) Me(ctx context.Context) (bus.UserDetail, error) {
	var out struct{ User bus.UserDetail }
	err := c.get(ctx, "/v1/me", nil, &out)
	return out.User, err
}

// SetEncryptionKey publishes the caller's key of that number. May be sent
// again: the same key with the same number is the same.
func (c *Client) SetEncryptionKey(ctx context.Context, k bus.EncryptionKey) (bus.Change, error) {
	return c.again(ctx, http.MethodPut, "/v1/me/encryption-key", k)
}

// UserQuery selects users. After is the cursor that the page before it gave;
// Limit 0 leaves the size of a page to the service.
type UserQuery struct {
	Status bus.Status // empty: any
	Role   bus.Role   // empty: any
	After  string
	Limit  int
}

// Users is one page of all users; next is the cursor of the next one, empty at
// the end. Admins only.
func (c *Client) Users(ctx context.Context, q UserQuery) (users []bus.UserInfo, next string, err error) {
	var out struct {
		Users []bus.UserInfo
		Next  string
	}
	err = c.get(ctx, "/v1/users", values("status", string(q.Status), "role", string(q.Role), "after", q.After, "limit", number(q.Limit)), &out)
	return out.Users, out.Next, err
}

// AllUsers reads every page from q on.
func (c *Client) AllUsers(ctx context.Context, q UserQuery) ([]bus.UserInfo, error) {
	return all(func(after string) ([]bus.UserInfo, string, error) {
		if after != "" {
			q.After = after
		}
		return c.Users(ctx, q)
	})
}

// User is one user. Only an admin and the user see rooms and see who is not
// active; to everyone else the latter are not_found.
func (c *Client) User(ctx context.Context, user string) (bus.UserDetail, error) {
	var out struct{ User bus.UserDetail }
	path, err := userPath(user)
	if err == nil {
		err = c.get(ctx, path, nil, &out)
	}
	return out.User, err
}

// AddUser registers a key. Not sent again when its answer is lost: Conflict
// "already registered" would not tell whose add it was.
func (c *Client) AddUser(ctx context.Context, key bus.UserKey, handle bus.Handle, role bus.Role) (bus.Change, error) {
	return c.once(ctx, http.MethodPost, "/v1/users", map[string]any{"sign_pub": key, "handle": handle, "role": role})
}

// UserPatch says what to change of a user; nil fields stay as they are.
type UserPatch struct {
	Handle    *bus.Handle
	Role      *bus.Role
	Expires   bool       // change the expiry, to ExpiresAt
	ExpiresAt *time.Time // nil: never
	Revision  uint64     // of the record that was read; Conflict if it has changed since. 0: any
}

// PatchUser changes a user. With a revision it may be sent again, and a
// Conflict then may mean that the first attempt did it; without one it is not,
// because it could undo what somebody else changed in between.
func (c *Client) PatchUser(ctx context.Context, user string, p UserPatch) (bus.Change, error) {
	path, err := userPath(user)
	if err != nil {
		return bus.Change{}, err
	}
	in := map[string]any{}
	if p.Handle != nil {
		in["handle"] = *p.Handle
	}
	if p.Role != nil {
		in["role"] = *p.Role
	}
	if p.Expires {
		in["expires_at"] = p.ExpiresAt
	}
	return c.patch(ctx, path, in, p.Revision)
}

// RevokeUser ends a user's access for good. May be sent again: it is
// already_revoked then.
func (c *Client) RevokeUser(ctx context.Context, user string) (bus.Change, error) {
	return c.userAction(ctx, user, "revoke", nil)
}

// SuspendUser ends a user's access until ResumeUser. May be sent again.
func (c *Client) SuspendUser(ctx context.Context, user string) (bus.Change, error) {
	return c.userAction(ctx, user, "suspend", nil)
}

// ResumeUser ends a suspension. May be sent again.
func (c *Client) ResumeUser(ctx context.Context, user string) (bus.Change, error) {
	return c.userAction(ctx, user, "resume", nil)
}

// RotateUser gives a user's handle, role and rooms to a new key and revokes the
// old one. May be sent again: it takes up where it was interrupted.
func (c *Client) RotateUser(ctx context.Context, user string, to bus.UserKey) (bus.Change, error) {
	return c.userAction(ctx, user, "rotate", map[string]any{"sign_pub": to})
}

func (c *Client) userAction(ctx context.Context, user, action string, in any) (bus.Change, error) {
	path, err := userPath(user)
	if err != nil {
		return bus.Change{}, err
	}
	return c.again(ctx, http.MethodPost, path+"/"+action, in)
}

// Access explains what a user may do on NATS, and why.
func (c *Client) Access(ctx context.Context, user string) (bus.AccessInfo, error) {
	var out struct{ Access bus.AccessInfo }
	path, err := userPath(user)
	if err == nil {
		err = c.get(ctx, path+"/access", nil, &out)
	}
	return out.Access, err
}

// ConnectionQuery selects connections; what is empty selects all.
type ConnectionQuery struct {
	User   string
	Room   bus.RoomID // of who is in that room now
	Server string     // name of a node
}

// Connections lists who is connected, all pages of it. The servers named in
// Missing did not answer: what is open there is not known. Admins only.
func (c *Client) Connections(ctx context.Context, q ConnectionQuery) (bus.ConnectionList, error) {
	var last bus.ConnectionList
	missing, servers := map[string]bool{}, 0
	connections, err := all(func(after string) ([]bus.ConnectionInfo, string, error) {
		last = bus.ConnectionList{}
		err := c.get(ctx, "/v1/connections", values("user", q.User, "room", string(q.Room), "server", q.Server, "after", after, "limit", "500"), &last)
		for _, m := range last.Missing {
			missing[m] = true
		}
		var answered, of int
		if n, _ := fmt.Sscanf(last.Servers, "%d/%d", &answered, &of); n == 2 {
			servers = max(servers, of)
		}
		return last.Connections, last.Next, err
	})
	// Each page is a list of its own: a server that failed one of them is missing.
	last.Servers = fmt.Sprintf("%d/%d", max(servers-len(missing), 0), servers)
	last.Connections, last.Missing = connections, slices.AppendSeq([]string{}, maps.Keys(missing))
	slices.Sort(last.Missing)
	return last, err
}

// Kick closes a user's connections: all, those to one server, or one of them
// (cid is not 0). It takes no access away, their clients connect again. May be
// sent again.
func (c *Client) Kick(ctx context.Context, user, server string, cid uint64) (bus.Change, error) {
	path, err := userPath(user)
	if err != nil {
		return bus.Change{}, err
	}
	number := ""
	if cid != 0 {
		number = strconv.FormatUint(cid, 10)
	}
	path += "/connections"
	if q := values("server", server, "cid", number); len(q) > 0 {
		path += "?" + q.Encode()
	}
	return c.again(ctx, http.MethodDelete, path, nil)
}

// NewInvite says what an invite shall lead to.
type NewInvite struct {
	Role   bus.Role
	Handle bus.Handle        // empty: the newcomer chooses
	Rooms  []bus.InvitedRoom // with the role in each
	TTL    time.Duration     // whole seconds; 0: the service's default
}

// CreateInvite makes an invite. Its token is in the answer and nowhere else.
// Not sent again when its answer is lost: nobody has the token of the first
// one, so it is harmless, but it is there until it expires.
func (c *Client) CreateInvite(ctx context.Context, i NewInvite) (bus.InviteCreated, error) {
	var out struct{ Invite bus.InviteCreated }
	in := map[string]any{"role": i.Role}
	if i.Handle != "" {
		in["handle"] = i.Handle
	}
	if len(i.Rooms) > 0 {
		in["rooms"] = i.Rooms
	}
	if i.TTL != 0 {
		in["expires_in_seconds"] = int64(i.TTL / time.Second)
	}
	err := c.exchange(ctx, call{method: http.MethodPost, path: "/v1/invites"}, in, &out)
	return out.Invite, err
}

// Invites lists all invites that are still remembered, newest first.
func (c *Client) Invites(ctx context.Context) ([]bus.InviteInfo, error) {
	var out struct{ Invites []bus.InviteInfo }
	err := c.get(ctx, "/v1/invites", nil, &out)
	return out.Invites, err
}

// WithdrawInvite makes an open invite good for nothing; already reports that it
// was so before. May be sent again.
func (c *Client) WithdrawInvite(ctx context.Context, id string) (info bus.InviteInfo, already bool, err error) {
	var out struct {
		Invite  bus.InviteInfo
		Already bool
	}
	err = c.exchange(ctx, call{method: http.MethodDelete, path: "/v1/invites/" + url.PathEscape(id), again: true}, nil, &out)
	return out.Invite, out.Already, err
}

// Enroll redeems an invite: the caller's key, which is nobody's yet, becomes a
// user. handle may be empty if the invite names one. May be sent again: the key
// that began may finish.
func (c *Client) Enroll(ctx context.Context, token string, handle bus.Handle) (bus.Change, error) {
	in := map[string]any{"token": token}
	if handle != "" {
		in["handle"] = handle
	}
	return c.again(ctx, http.MethodPost, "/v1/enroll", in)
}

// NewRoom says what room to make.
type NewRoom struct {
	Room        bus.RoomID
	Owner       string // a user; empty: the caller. Admins only
	Durable     bool
	Encrypted   bool
	Description string
	Retention   bus.Retention // of a durable room
}

// CreateRoom makes a room. Not sent again when its answer is lost: Conflict
// would not tell whose room it is.
func (c *Client) CreateRoom(ctx context.Context, r NewRoom) (bus.Change, error) {
	in := map[string]any{"room": r.Room}
	if r.Owner != "" {
		in["owner"] = r.Owner
	}
	if r.Durable {
		in["durable"] = true
	}
	if r.Encrypted {
		in["encrypted"] = true
	}
	if r.Description != "" {
		in["description"] = r.Description
	}
	if r.Retention != (bus.Retention{}) {
		in["retention"] = r.Retention
	}
	return c.once(ctx, http.MethodPost, "/v1/rooms", in)
}

// RoomQuery selects rooms. Without All they are those in which the caller is;
// with it every room, for admins only.
type RoomQuery struct {
	All   bool
	After string
	Limit int
}

// Rooms is one page of rooms; next is the cursor of the next one, empty at the
// end.
func (c *Client) Rooms(ctx context.Context, q RoomQuery) (rooms []bus.RoomInfo, next string, err error) {
	var out struct {
		Rooms []bus.RoomInfo
		Next  string
	}
	err = c.get(ctx, "/v1/rooms", values("all", truth(q.All), "after", q.After, "limit", number(q.Limit)), &out)
	return out.Rooms, out.Next, err
}

// AllRooms reads every page from q on.
func (c *Client) AllRooms(ctx context.Context, q RoomQuery) ([]bus.RoomInfo, error) {
	return all(func(after string) ([]bus.RoomInfo, string, error) {
		if after != "" {
			q.After = after
		}
		return c.Rooms(ctx, q)
	})
}

// Room is one room with its members. To who is not in it, it is not_found.
func (c *Client) Room(ctx context.Context, id bus.RoomID) (bus.RoomDetail, error) {
	var out struct{ Room bus.RoomDetail }
	path, err := roomPath(id)
	if err == nil {
		err = c.get(ctx, path, nil, &out)
	}
	return out.Room, err
}

// DescribeRoom changes a room's description. With a revision it may be sent
// again, and a Conflict then may mean that the first attempt did it; 0 means any
// revision.
func (c *Client) DescribeRoom(ctx context.Context, id bus.RoomID, description string, revision uint64) (bus.Change, error) {
	path, err := roomPath(id)
	if err != nil {
		return bus.Change{}, err
	}
	return c.patch(ctx, path, map[string]any{"description": description}, revision)
}

// RetainRoom changes what a durable room keeps. When it gets less, the oldest
// messages go at once. Revision as with DescribeRoom.
func (c *Client) RetainRoom(ctx context.Context, id bus.RoomID, keep bus.Retention, revision uint64) (bus.Change, error) {
	path, err := roomPath(id)
	if err != nil {
		return bus.Change{}, err
	}
	return c.patch(ctx, path, map[string]any{"retention": keep}, revision)
}

// ArchiveRoom closes a room for good. With purge what it has stored goes; else
// it stays for who was in it at the end. May be sent again.
func (c *Client) ArchiveRoom(ctx context.Context, id bus.RoomID, purge bool) (bus.Change, error) {
	path, err := roomPath(id)
	if err != nil {
		return bus.Change{}, err
	}
	if purge {
		path += "?messages=purge"
	}
	return c.again(ctx, http.MethodDelete, path, nil)
}

// MessageQuery says which messages of a durable room are wanted: those behind a
// sequence, those stored since a time, or the newest; at most Limit, or 100. They
// come by sequence, the oldest first.
type MessageQuery struct {
	After  uint64
	Since  time.Time // if not zero, After is not looked at
	Newest bool      // neither is looked at
	Limit  int       // up to 1000
}

// Messages reads what a durable room has stored, by sequence. There may be more
// than it returns until it returns none. A sequence that is left out between two
// messages was never there, or is kept no more. A message that was stored a
// moment ago may be missing at the end, and come with a later call. With Newest,
// last is the sequence of the newest message, whether it is kept or not.
func (c *Client) Messages(ctx context.Context, id bus.RoomID, q MessageQuery) (messages []bus.StoredMessage, last uint64, err error) {
	path, err := roomPath(id)
	if err != nil {
		return nil, 0, err
	}
	v := values("limit", number(q.Limit), "newest", truth(q.Newest))
	switch {
	case q.Newest:
	case !q.Since.IsZero():
		v.Set("since", q.Since.UTC().Format(time.RFC3339Nano))
	case q.After > 0:
		v.Set("after", strconv.FormatUint(q.After, 10))
	}
	var out struct {
		Messages []bus.StoredMessage
		Last     uint64
	}
	err = c.get(ctx, path+"/messages", v, &out)
	return out.Messages, out.Last, err
}

// Members lists who is in a room; with gone, also who was.
func (c *Client) Members(ctx context.Context, id bus.RoomID, gone bool) ([]bus.MemberInfo, error) {
	var out struct{ Members []bus.MemberInfo }
	path, err := roomPath(id)
	if err == nil {
		err = c.get(ctx, path+"/members", values("all", truth(gone)), &out)
	}
	return out.Members, err
}

// SetMember makes a user a member of a room in that role, or changes the role.
// May be sent again.
func (c *Client) SetMember(ctx context.Context, id bus.RoomID, user string, role bus.RoomRole) (bus.Change, error) {
	path, err := memberPath(id, user)
	if err != nil {
		return bus.Change{}, err
	}
	return c.again(ctx, http.MethodPut, path, map[string]any{"role": role})
}

// RemoveMember takes a user out of a room; everybody may take themselves out.
// May be sent again.
func (c *Client) RemoveMember(ctx context.Context, id bus.RoomID, user string) (bus.Change, error) {
	path, err := memberPath(id, user)
	if err != nil {
		return bus.Change{}, err
	}
	return c.again(ctx, http.MethodDelete, path, nil)
}

// RoomKeys is a page of what the servers have of the keys of an encrypted room:
// the epochs behind after. Nothing of it is verified; Keys does that.
func (c *Client) RoomKeys(ctx context.Context, id bus.RoomID, after uint64) (bus.RoomKeys, error) {
	var out struct{ Keys bus.RoomKeys }
	path, err := roomPath(id)
	if err == nil {
		err = c.get(ctx, path+"/keys", url.Values{"after": {strconv.FormatUint(after, 10)}, "limit": {"32"}}, &out)
	}
	return out.Keys, err
}

// MemberKeys lists the active members of a room with their encryption keys, not
// verified.
func (c *Client) MemberKeys(ctx context.Context, id bus.RoomID) ([]bus.MemberKey, error) {
	var out struct{ Members []bus.MemberKey }
	path, err := roomPath(id)
	if err == nil {
		err = c.get(ctx, path+"/encryption-keys", nil, &out)
	}
	return out.Members, err
}

// NewEpoch makes the next epoch of an encrypted room; Keys.Rekey makes what it
// takes. May be sent again: the same roster is the same epoch.
func (c *Client) NewEpoch(ctx context.Context, id bus.RoomID, roster []byte, envelopes [][]byte) (bus.Change, error) {
	path, err := roomPath(id)
	if err != nil {
		return bus.Change{}, err
	}
	return c.again(ctx, http.MethodPost, path+"/epochs", map[string]any{"roster": roster, "envelopes": envelopes})
}

// GrantKeys gives a member keys of epochs before they came. May be sent again.
func (c *Client) GrantKeys(ctx context.Context, id bus.RoomID, user bus.UserKey, granted []bus.GrantedKey) (bus.Change, error) {
	path, err := roomPath(id)
	if err != nil {
		return bus.Change{}, err
	}
	return c.again(ctx, http.MethodPut, path+"/keys/"+user.NKey(), map[string]any{"envelopes": granted})
}

// AuditQuery selects audit entries; empty fields select all. User and Actor are
// nkeys, Actor may also be "direct".
type AuditQuery struct {
	User, Action, Actor string
	Kind                bus.AuditKind
	Room                bus.RoomID
	Since               time.Time
	After               string // cursor
	Limit               int
}

// Audit is one page of the audit, oldest first; next is the cursor of the next
// one, empty at the end. Admins only.
func (c *Client) Audit(ctx context.Context, q AuditQuery) (records []bus.AuditRecord, next string, err error) {
	var out struct {
		Records []bus.AuditRecord
		Next    string
	}
	since := ""
	if !q.Since.IsZero() {
		since = q.Since.UTC().Format(time.RFC3339Nano)
	}
	err = c.get(ctx, "/v1/audit", values("user", q.User, "room", string(q.Room), "action", q.Action, "actor", q.Actor,
		"kind", string(q.Kind), "since", since, "after", q.After, "limit", number(q.Limit)), &out)
	return out.Records, out.Next, err
}

// VerifyAudit has the answering node check the whole audit. It is as honest as
// that node: unibusctl --direct audit verify checks by itself.
func (c *Client) VerifyAudit(ctx context.Context) (bus.AuditReport, error) {
	var out struct{ Report bus.AuditReport }
	err := c.get(ctx, "/v1/audit/verify", nil, &out)
	return out.Report, err
}

// all follows cursors to the end.
func all[T any](page func(after string) ([]T, string, error)) ([]T, error) {
	out := []T{}
	for after := ""; ; {
		part, next, err := page(after)
		if err != nil {
			return nil, err
		}
		out = append(out, part...)
		if next == "" {
			return out, nil
		}
		if next == after {
			return nil, bus.E(bus.Internal, "the service's pages do not end: cursor %.40q twice", next)
		}
		after = next
	}
}

// values is a query of those pairs whose value is not empty.
func values(pairs ...string) url.Values {
	v := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			v.Set(pairs[i], pairs[i+1])
		}
	}
	return v
}

func number(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

func truth(b bool) string {
	if b {
		return "true"
	}
	return ""
}
