package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
)

// outcome is what an import does about one record of the source.
type outcome string

const (
	toCreate  outcome = "create"
	toRevoke  outcome = "revoke"  // revoked there, and not yet here
	isAlready outcome = "already" // here as it is there
	isKept    outcome = "kept"    // differs here, where somebody has changed it: left alone
	isSkipped outcome = "skipped" // has ended there, and gives nothing here
	isAgainst outcome = "conflict"
	isUnknown outcome = "unknown" // not understood
)

var outcomes = []outcome{toCreate, toRevoke, isAlready, isKept, isSkipped, isAgainst, isUnknown}

// importItem is one record of the source, and what becomes of it.
type importItem struct {
	Kind    importKind `json:"kind"`
	Name    string     `json:"name"`
	Source  string     `json:"source"`
	Outcome outcome    `json:"outcome"`
	Detail  string     `json:"detail"`
	Done    bool       `json:"done"` // created or revoked by this run

	user   *kv.ImportedUser
	room   *kv.ImportedRoom
	member *memberID // with role
	role   bus.RoomRole
	revoke bus.UserKey
}

type memberID struct {
	room bus.RoomID
	user bus.UserKey
}

// here is this cluster's side, behind one barrier.
type here struct {
	users      map[bus.UserKey]bus.User
	handles    map[bus.Handle]bus.UserKey
	rooms      map[bus.RoomID]bus.Room
	members    map[memberID]bus.Membership
	unreadable map[string]bool // BUCKET KEY
	now        time.Time
}

func hereOf(v *kv.View, now time.Time) *here {
	h := &here{
		users: map[bus.UserKey]bus.User{}, handles: map[bus.Handle]bus.UserKey{}, rooms: map[bus.RoomID]bus.Room{},
		members: map[memberID]bus.Membership{}, unreadable: map[string]bool{}, now: now,
	}
	for _, u := range v.Users() {
		h.users[u.Key] = u.User
		if owner, _, ok := v.UserByHandle(u.Handle); ok { // a rotation has two records of one handle
			h.handles[u.Handle] = owner.Key
		}
	}
	for _, r := range v.Rooms() {
		h.rooms[r.ID] = r.Room
	}
	for _, m := range v.Memberships() {
		h.members[memberID{m.Room, m.User}] = m.Membership
	}
	for _, b := range v.Broken() {
		h.unreadable[b.Bucket+" "+b.Key] = true
	}
	return h
}

// planner decides what becomes of each record. It asks nobody: the same two
// sides give the same plan.
type planner struct {
	here   *here
	source readings
	admins map[bus.UserKey]bool // who may become one
	mapped map[importKind]bool

	there    map[string][]bus.UserKey   // who is meant by a handle in the source
	handles  map[bus.Handle]int         // users of the source who are to have it here
	gone     map[bus.UserKey]string     // of the source, left out for a reason
	will     map[bus.UserKey]bus.Status // of everybody who will be known here afterwards
	open     map[bus.RoomID]bool        // rooms that will be there and take members
	inRooms  map[bus.UserKey]int
	items    []importItem
	onlyHere map[importKind][]string
}

// plan is the whole of it, in the order in which it is done.
func (p *planner) plan() {
	p.there, p.will = map[string][]bus.UserKey{}, map[bus.UserKey]bus.Status{}
	p.handles, p.gone = map[bus.Handle]int{}, map[bus.UserKey]string{}
	p.open, p.inRooms = map[bus.RoomID]bool{}, map[bus.UserKey]int{}
	p.onlyHere = map[importKind][]string{importUsers: {}, importRooms: {}, importMembers: {}}
	slices.SortFunc(p.source.users, func(x, y readUser) int {
		return cmp.Or(cmp.Compare(x.handle, y.handle), slices.Compare(x.key[:], y.key[:]))
	})
	slices.SortFunc(p.source.rooms, func(x, y readRoom) int { return cmp.Compare(x.id, y.id) })
	slices.SortFunc(p.source.members, func(x, y readMember) int { return cmp.Or(cmp.Compare(x.room, y.room), cmp.Compare(x.user, y.user)) })
	for _, u := range p.source.users {
		p.there[u.called] = append(p.there[u.called], u.key)
		p.handles[u.handle]++
	}
	for k, u := range p.here.users {
		p.will[k] = u.Status
	}
	for id, r := range p.here.rooms {
		p.open[id] = r.Status == bus.RoomActive
	}
	for id, m := range p.here.members {
		if m.Status == bus.Present && p.open[id.room] {
			p.inRooms[id.user]++
		}
	}
	// What is in doubt lends nothing to what rests on it.
	for _, u := range p.source.unread {
		if k, err := bus.ParseUserKey(u.name); err == nil && u.kind == importUsers {
			delete(p.will, k)
		}
		if u.kind == importRooms {
			delete(p.open, bus.RoomID(u.name))
		}
	}
	for _, u := range p.source.users {
		i := p.user(u)
		if i.Outcome == isAgainst {
			delete(p.will, u.key)
		}
		p.add(i, importUsers, string(u.handle), u.place)
	}
	for _, r := range p.source.rooms {
		i := p.room(r)
		if i.Outcome == isAgainst {
			delete(p.open, r.id)
		}
		p.add(i, importRooms, string(r.id), r.place)
	}
	for _, m := range p.source.members {
		p.add(p.membership(m), importMembers, string(m.room)+"/"+m.user, m.place)
	}
	for _, u := range p.source.unread {
		p.add(importItem{Outcome: isUnknown, Detail: u.why}, u.kind, u.name, u.place)
	}
	p.listOnlyHere()
}

func (p *planner) add(i importItem, kind importKind, name string, o place) {
	i.Kind, i.Name, i.Source = kind, name, o.String()
	p.items = append(p.items, i)
}

func against(format string, args ...any) importItem {
	return importItem{Outcome: isAgainst, Detail: fmt.Sprintf(format, args...)}
}

func kept(format string, args ...any) importItem {
	return importItem{Outcome: isKept, Detail: fmt.Sprintf(format, args...)}
}

// ended reports whether something has ended here for good, so that no other
// system brings it back.
func ended(is bool) bool { return is && !guard.Off(guard.ImportTombstone) }

func (p *planner) user(u readUser) importItem {
	if p.here.unreadable[kv.Users+" "+u.key.Hex()] {
		return against("the record here cannot be read: unibusctl user show %s", u.key)
	}
	if now, ok := p.here.users[u.key]; ok && (now.Status != bus.Revoked || ended(true)) {
		return p.knownUser(u, now)
	}
	if n := p.handles[u.handle]; n > 1 {
		return against("%d users have the handle %s there: --fix users/%s.handle=NAME", n, u.handle, u.key)
	}
	if owner, ok := p.here.handles[u.handle]; ok && owner != u.key {
		return against("the handle is that of %s here: --fix users/%s.handle=NAME", owner, u.key)
	}
	if u.expires != nil && !u.expires.After(p.here.now) && u.status != bus.Revoked {
		p.gone[u.key] = "expired there at " + stamp(u.expires)
		return importItem{Outcome: isSkipped, Detail: p.gone[u.key]}
	}
	i := importItem{Outcome: toCreate, user: &kv.ImportedUser{Key: u.key, Handle: u.handle, Role: u.role, Status: u.status, ExpiresAt: u.expires}}
	if u.status == bus.Revoked {
		i.user.ExpiresAt = nil
	}
	i.Detail = fmt.Sprintf("%s, %s, %s", u.key, u.role, u.status)
	if i.user.ExpiresAt != nil {
		i.Detail += ", until " + stamp(u.expires)
	}
	if u.role == bus.Admin && !p.admins[u.key] && !guard.Off(guard.ImportAdmins) {
		i.user.Role = bus.Member
		i.Detail = fmt.Sprintf("%s, %s; an admin there, and a member here without --admins %s", u.key, u.status, u.handle)
	}
	p.will[u.key] = u.status
	return i
}

// knownUser is somebody who was ever registered here. Nothing is given to them;
// that they are revoked there holds here as well.
func (p *planner) knownUser(u readUser, now bus.User) importItem {
	switch {
	case now.Status == bus.Revoked && u.status == bus.Revoked:
		return importItem{Outcome: isAlready, Detail: "revoked"}
	case now.Status == bus.Revoked && now.RotatedTo != nil:
		return kept("moved here to the key %s", *now.RotatedTo)
	case now.Status == bus.Revoked:
		return kept("is revoked here, which is final; %s there", u.status)
	case u.status == bus.Revoked:
		p.will[u.key] = bus.Revoked
		return importItem{Outcome: toRevoke, Detail: fmt.Sprintf("%s here, revoked there", now.Status), revoke: u.key}
	case u.status == bus.Suspended && now.Status == bus.Active:
		return against("suspended there, active here: unibusctl user suspend %s", now.Handle)
	case p.admins[u.key] && now.Role != bus.Admin:
		return against("a member here already: unibusctl user set %s --role admin", now.Handle)
	case now.Handle != u.handle:
		return kept("is %s here", now.Handle)
	case now.Status != u.status:
		return kept("is %s here, %s there", now.Status, u.status)
	case now.Role == bus.Admin && u.role != bus.Admin:
		return kept("is an admin here")
	case (now.ExpiresAt == nil) != (u.expires == nil) || now.ExpiresAt != nil && now.ExpiresAt.Sub(*u.expires).Abs() >= time.Second:
		return kept("expires here %s, there %s", expiry(now.ExpiresAt), expiry(u.expires))
	}
	return importItem{Outcome: isAlready, Detail: fmt.Sprintf("%s, %s", now.Role, now.Status)}
}

// find is the user that a record of the source names. A handle is meant as the
// source means it: somebody here of the same name may be somebody else.
func (p *planner) find(name string) (bus.UserKey, string) {
	if k, err := bus.ParseUserKey(name); err == nil {
		return k, ""
	}
	switch there := p.there[name]; len(there) {
	case 1:
		return there[0], ""
	case 0:
		if k, ok := p.here.handles[bus.Handle(name)]; ok && !p.mapped[importUsers] {
			return k, ""
		}
		return bus.UserKey{}, "nobody is called " + name
	default:
		return bus.UserKey{}, fmt.Sprintf("%d users are called %s there", len(there), name)
	}
}

func (p *planner) room(r readRoom) importItem {
	if p.here.unreadable[kv.Rooms+" "+string(r.id)] {
		return against("the record here cannot be read: unibusctl room show %s", r.id)
	}
	if now, ok := p.here.rooms[r.id]; ok && (now.Status == bus.RoomActive || ended(true)) {
		return knownRoom(r, now)
	}
	owners := p.ownersOf(r.id)
	var creator bus.UserKey
	why := ""
	switch {
	case r.creator != "":
		creator, why = p.find(r.creator)
	case len(owners) == 1:
		creator = owners[0]
	default:
		why = fmt.Sprintf("it has %d owners there", len(owners))
	}
	if _, known := p.will[creator]; why == "" && !known {
		why = "its creator is not imported"
	}
	if why == "" && r.encrypted && !r.archived && !slices.Contains(owners, creator) {
		why = "only an owner who made it can begin its keys, and its creator is none"
	}
	if why != "" {
		return against("%s: --fix rooms/%s.creator=USER", why, r.id)
	}
	p.open[r.id] = !r.archived
	i := importItem{Outcome: toCreate, room: &kv.ImportedRoom{
		ID: r.id, Creator: creator, Archived: r.archived,
		RoomOptions: kv.RoomOptions{Durable: r.durable, Encrypted: r.encrypted, Description: r.description},
	}}
	i.Detail = fmt.Sprintf("made by %s", creator)
	for _, w := range []struct {
		is   bool
		word string
	}{{r.durable, "durable"}, {r.encrypted, "encrypted"}, {r.archived, "archived"}, {len(owners) == 0 && !r.archived, "without an owner: an admin has to name one"}} {
		if w.is {
			i.Detail += ", " + w.word
		}
	}
	return i
}

// ownersOf are the present owners of a room, as the source has them.
func (p *planner) ownersOf(id bus.RoomID) (out []bus.UserKey) {
	for _, m := range p.source.members {
		if m.room != id || m.removed || m.role != bus.Owner {
			continue
		}
		if k, why := p.find(m.user); why == "" {
			out = append(out, k)
		}
	}
	return out
}

func knownRoom(r readRoom, now bus.Room) importItem {
	switch {
	case now.Status == bus.RoomArchived && r.archived:
		return importItem{Outcome: isAlready, Detail: "archived"}
	case now.Status == bus.RoomArchived:
		return kept("is archived here, which is final")
	case r.archived:
		return against("archived there, active here: unibusctl room archive %s", r.id)
	case now.Durable != r.durable || now.Encrypted != r.encrypted:
		return against("durable %v and encrypted %v here, durable %v and encrypted %v there, which cannot be changed", now.Durable, now.Encrypted, r.durable, r.encrypted)
	case now.Description != r.description:
		return kept("has another description here")
	}
	return importItem{Outcome: isAlready, Detail: "active"}
}

func (p *planner) membership(m readMember) importItem {
	k, why := p.find(m.user)
	if why != "" {
		return against("%s", why)
	}
	id := memberID{m.room, k}
	if p.here.unreadable[kv.Members+" "+string(m.room)+"."+k.Hex()] {
		return against("the record here cannot be read: unibusctl room members %s --all", m.room)
	}
	now, known := p.here.members[id]
	status, registered := p.will[k]
	open, exists := p.open[m.room]
	_, left := p.gone[k]
	switch {
	case known && now.Status == bus.Present && now.Role == m.role && !m.removed:
		return importItem{Outcome: isAlready, Detail: string(m.role)}
	case known && now.Status == bus.Present && m.removed:
		return against("removed there, %s here: unibusctl room remove %s %s", now.Role, m.room, k)
	case m.removed:
		return importItem{Outcome: isSkipped, Detail: "was removed there"}
	case left:
		return importItem{Outcome: isSkipped, Detail: "the user " + p.gone[k]}
	case !registered:
		return against("their user is not imported")
	case !exists:
		return against("their room is not imported")
	case known && now.Status == bus.Removed && ended(true):
		return kept("was removed here")
	case status == bus.Revoked && ended(true):
		return importItem{Outcome: isSkipped, Detail: "the user is revoked"}
	case !open:
		return importItem{Outcome: isSkipped, Detail: "the room is archived"}
	case known && now.Status == bus.Present:
		return against("%s there, %s here: unibusctl room add %s %s --role %s", m.role, now.Role, m.room, k, m.role)
	case p.inRooms[k] >= bus.MaxRoomsPerUser:
		return against("they would be in more than %d rooms", bus.MaxRoomsPerUser)
	}
	p.inRooms[k]++
	return importItem{Outcome: toCreate, Detail: string(m.role), member: &id, role: m.role}
}

// listOnlyHere names what has access here and is unknown to the source: made
// here, or deleted there without a trace.
func (p *planner) listOnlyHere() {
	there := map[bus.UserKey]bool{}
	for _, u := range p.source.users {
		there[u.key] = true
	}
	rooms := map[bus.RoomID]bool{}
	for _, r := range p.source.rooms {
		rooms[r.id] = true
	}
	members := map[memberID]bool{}
	for _, m := range p.source.members {
		if k, why := p.find(m.user); why == "" {
			members[memberID{m.room, k}] = true
		}
	}
	if p.mapped[importUsers] {
		for k, u := range p.here.users {
			if u.Status != bus.Revoked && !there[k] {
				p.onlyHere[importUsers] = append(p.onlyHere[importUsers], string(u.Handle))
			}
		}
	}
	if p.mapped[importRooms] {
		for id, r := range p.here.rooms {
			if r.Status == bus.RoomActive && !rooms[id] {
				p.onlyHere[importRooms] = append(p.onlyHere[importRooms], string(id))
			}
		}
	}
	if p.mapped[importMembers] {
		for id, m := range p.here.members {
			if u := p.here.users[id.user]; m.Status == bus.Present && rooms[id.room] && u.Status != bus.Revoked && !members[id] {
				p.onlyHere[importMembers] = append(p.onlyHere[importMembers], fmt.Sprintf("%s/%s", id.room, cmp.Or(string(u.Handle), id.user.NKey())))
			}
		}
	}
	for _, names := range p.onlyHere {
		slices.Sort(names)
	}
}

// counted sums up the outcomes of each kind.
func counted(items []importItem) map[importKind]map[outcome]int {
	out := map[importKind]map[outcome]int{}
	for _, k := range importKinds {
		out[k] = map[outcome]int{}
		for _, o := range outcomes {
			out[k][o] = 0
		}
	}
	for _, i := range items {
		out[i.Kind][i.Outcome]++
	}
	return out
}

// adminsOf resolves --admins. It only lets somebody stay what they are there:
// a name that is no active admin there is refused.
func adminsOf(names []string, source readings) (map[bus.UserKey]bool, error) {
	known := map[string]readUser{}
	for _, u := range source.users {
		known[string(u.handle)], known[u.key.NKey()] = u, u
	}
	out := map[bus.UserKey]bool{}
	for _, name := range names {
		spelled, err := userName(name)
		if err != nil {
			return nil, usagef("--admins: %v", err)
		}
		u, ok := known[spelled]
		if !ok || u.role != bus.Admin || u.status != bus.Active {
			return nil, bus.E(bus.Invalid, "--admins %s: nobody of that name is an active admin there", quote(name)).
				WithHint("one of: %s", listed(slices.Sorted(maps.Keys(activeAdmins(source)))))
		}
		out[u.key] = true
	}
	return out, nil
}

func activeAdmins(source readings) map[string]bool {
	out := map[string]bool{}
	for _, u := range source.users {
		if u.role == bus.Admin && u.status == bus.Active {
			out[string(u.handle)] = true
		}
	}
	return out
}
