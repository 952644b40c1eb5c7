package api

import (
	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// action is what a caller asks for. The words are those of the audit.
type action string

// Every action of the API. allActions is the same list, for the tests.
const (
	meShow          action = "me.show"
	meEncryptionKey action = "user.encryption_key"
	userList        action = "user.list"
	userShow        action = "user.show"
	userAdd         action = "user.add"
	userPatch       action = "user.set"
	userRevoke      action = "user.revoke"
	userSuspend     action = "user.suspend"
	userResume      action = "user.resume"
	userRotate      action = "user.rotate"
	userAccess      action = "user.access"
	connectionList  action = "connection.list"
	connectionKick  action = "connection.kick"
	inviteCreate    action = "invite.create"
	inviteList      action = "invite.list"
	inviteWithdraw  action = "invite.withdraw"
	inviteRedeem    action = "invite.redeem"
	roomCreate      action = "room.create"
	roomList        action = "room.list"
	roomListAll     action = "room.list_all"
	roomShow        action = "room.show"
	roomPatch       action = "room.set"
	roomArchive     action = "room.archive"
	roomMessages    action = "room.messages"
	memberList      action = "room.member.list"
	memberSet       action = "room.member.set"
	memberRemove    action = "room.member.remove"
	roomKeys        action = "room.keys"
	roomRekey       action = "room.rekey"
	roomGrant       action = "room.grant"
	blobList        action = "room.blob.list"
	blobGet         action = "room.blob.get"
	blobPut         action = "room.blob.put"
	blobDelete      action = "room.blob.delete"
	auditList       action = "audit.list"
	auditVerify     action = "audit.verify"
)

// subject is who asks, as far as authorization cares.
type subject struct {
	key  bus.UserKey
	role bus.Role
}

// target is what an action is about.
type target struct {
	user bus.UserKey  // the user concerned; zero: nobody, or nobody who exists
	room bus.RoomID   // the room concerned
	role bus.RoomRole // the caller's own role in that room; empty: not a member, or no such room
	past bool         // the caller is or was in that room
}

// may is the whole authorization of the API: nil, or Forbidden, or NotFound. It
// is asked with the newest state before an answer leaves and before each write.
//
// To who is not in a room there is no such room, whatever they ask of it:
// NotFound in the words of a room that does not exist. Who is in it and may not
// change it is told so. An action that is not listed is forbidden to everyone.
func may(s subject, act action, t target) error {
	if guard.Off(guard.Authorize) {
		return nil
	}
	switch act {
	case meShow, meEncryptionKey, userShow, roomList:
		return nil // about the caller, or cut down to what they may see
	case userList, userAdd, userPatch, userRevoke, userSuspend, userResume,
		connectionList, connectionKick, inviteCreate, inviteList, inviteWithdraw, roomListAll, auditList, auditVerify:
		return allow(s.role == bus.Admin, "only an admin may do this")
	case userRotate, userAccess:
		return allow(s.role == bus.Admin || s.key == t.user, "only an admin may do this to somebody else")
	case roomCreate:
		return allow(s.role == bus.Admin || s.key == t.user, "only an admin may make a room for somebody else")
	case roomShow, memberList, roomKeys:
		return inRoom(s, t, t.role.Rank() > 0)
	case roomMessages: // what was said is for who is there: an admin who wants to read joins first, which shows
		if t.role.Rank() == 0 {
			return noRoom(t.room)
		}
		return nil
	case roomRekey, roomGrant: // an admin who is no owner has no key to give
		if t.role.Rank() == 0 && s.role != bus.Admin {
			return noRoom(t.room)
		}
		return allow(t.role == bus.Owner, "only an owner of the room may do this")
	case roomPatch, roomArchive, memberSet:
		return inRoom(s, t, t.role == bus.Owner)
	case memberRemove:
		if s.key == t.user && t.past { // leaving; and who has left may say so again
			return nil
		}
		return inRoom(s, t, t.role == bus.Owner)
	case blobList, blobGet:
		return member(t, t.role.Rank() > 0)
	case blobPut, blobDelete:
		return member(t, t.role.MayPublish())
	}
	return bus.E(bus.Forbidden, "nobody may do this")
}

func allow(allowed bool, otherwise string) error {
	if allowed {
		return nil
	}
	return bus.E(bus.Forbidden, "%s", otherwise)
}

// inRoom decides about a room: an admin may, a stranger finds nothing.
func inRoom(s subject, t target, allowed bool) error {
	switch {
	case s.role == bus.Admin:
		return nil
	case t.role.Rank() == 0:
		return noRoom(t.room)
	}
	return allow(allowed, "only an owner of the room or an admin may do this")
}

// member decides about what is said and stored in a room: it is its members', and
// no admin's who is not one of them.
func member(t target, allowed bool) error {
	if t.role.Rank() == 0 {
		return noRoom(t.room)
	}
	return allow(allowed, "only a writer or an owner of the room may do this")
}

func noRoom(id bus.RoomID) error {
	return bus.E(bus.NotFound, "no room %s", id).WithHint("unibusctl room list")
}
