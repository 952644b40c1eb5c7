package api

import (
	"testing"

	"unibus.internal/bus"
)

// Who may do what, written by hand from the design: y, f (forbidden) or n (not
// found). The columns are the callers of TestMay, in that order.
var mayTable = map[action]string{
	//               admin owner writer reader former stranger self
	meShow:          "y     y     y      y      y      y        y",
	meEncryptionKey: "y     y     y      y      y      y        y",
	userShow:        "y     y     y      y      y      y        y",
	roomList:        "y     y     y      y      y      y        y",
	userList:        "y     f     f      f      f      f        f",
	userAdd:         "y     f     f      f      f      f        f",
	userPatch:       "y     f     f      f      f      f        f",
	userRevoke:      "y     f     f      f      f      f        f",
	userSuspend:     "y     f     f      f      f      f        f",
	userResume:      "y     f     f      f      f      f        f",
	connectionList:  "y     f     f      f      f      f        f",
	connectionKick:  "y     f     f      f      f      f        f",
	inviteCreate:    "y     f     f      f      f      f        f",
	inviteList:      "y     f     f      f      f      f        f",
	inviteWithdraw:  "y     f     f      f      f      f        f",
	roomListAll:     "y     f     f      f      f      f        f",
	auditList:       "y     f     f      f      f      f        f",
	auditVerify:     "y     f     f      f      f      f        f",
	userRotate:      "y     f     f      f      f      f        y",
	userAccess:      "y     f     f      f      f      f        y",
	roomCreate:      "y     f     f      f      f      f        y", // for whom: see the targets
	roomShow:        "y     y     y      y      n      n        y",
	memberList:      "y     y     y      y      n      n        y",
	roomPatch:       "y     y     f      f      n      n        f",
	roomArchive:     "y     y     f      f      n      n        f",
	blobList:        "n     y     y      y      n      n        y",
	blobGet:         "n     y     y      y      n      n        y",
	blobPut:         "n     y     y      f      n      n        f",
	blobDelete:      "n     y     y      f      n      n        f",
	memberSet:       "y     y     f      f      n      n        f",
	memberRemove:    "y     y     f      f      n      n        y",
	roomKeys:        "y     y     y      y      n      n        y",
	roomRekey:       "f     y     f      f      n      n        f",
	roomGrant:       "f     y     f      f      n      n        f",
	inviteRedeem:    "f     f     f      f      f      f        f", // of newcomers only, by another way in
	"room.destroy":  "f     f     f      f      f      f        f", // what nobody has thought of
}

func TestMay(t *testing.T) {
	me, other := bus.UserKey{1}, bus.UserKey{2}
	callers := []struct {
		name    string
		subject subject
		target  target
	}{
		{"admin", subject{me, bus.Admin}, target{user: other, room: "ops"}},
		{"owner", subject{me, bus.Member}, target{user: other, room: "ops", role: bus.Owner, past: true}},
		{"writer", subject{me, bus.Member}, target{user: other, room: "ops", role: bus.Writer, past: true}},
		{"reader", subject{me, bus.Member}, target{user: other, room: "ops", role: bus.Reader, past: true}},
		{"former member", subject{me, bus.Member}, target{user: other, room: "ops", past: true}},
		{"stranger", subject{me, bus.Member}, target{user: other, room: "ops"}},
		{"self", subject{me, bus.Member}, target{user: me, room: "ops", role: bus.Reader, past: true}},
	}
	for act, row := range mayTable {
		column := 0
		for _, want := range row {
			if want == ' ' {
				continue
			}
			c := callers[column]
			column++
			err := may(c.subject, act, c.target)
			if got := bus.CodeOf(err); got != map[rune]bus.Code{'y': "", 'f': bus.Forbidden, 'n': bus.NotFound}[want] {
				t.Errorf("%s as %s: %v, want %c", act, c.name, err, want)
			}
		}
		if column != len(callers) {
			t.Errorf("%s has %d columns", act, column)
		}
	}
	// Leaving again is repeating; a room in which one never was is none.
	for past, want := range map[bool]bus.Code{true: "", false: bus.NotFound} {
		if err := may(subject{me, bus.Member}, memberRemove, target{user: me, room: "ops", past: past}); bus.CodeOf(err) != want {
			t.Errorf("leaving, past %v: %v", past, err)
		}
	}
	// An unknown room role is none; an unknown bus role is no admin.
	for _, s := range []subject{{me, "root"}, {me, ""}, {me, "Admin"}} {
		if err := may(s, roomShow, target{room: "ops", role: "god"}); bus.CodeOf(err) != bus.NotFound {
			t.Errorf("%q: %v", s.role, err)
		}
		if err := may(s, userRevoke, target{user: other}); bus.CodeOf(err) != bus.Forbidden {
			t.Errorf("%q: %v", s.role, err)
		}
	}
	// The zero key stands for a user who does not exist: nobody is them.
	if err := may(subject{me, bus.Member}, userRotate, target{}); bus.CodeOf(err) != bus.Forbidden {
		t.Errorf("rotate nobody: %v", err)
	}
}
