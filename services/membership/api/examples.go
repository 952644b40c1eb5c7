package api

import (
	"time"

	"unibus.internal/bus"
)

// What the documentation shows. The values have the types of what is served, so
// they cannot be examples of something else.

const (
	exampleHex   = "0f6e7a3b9f0f2f0e4f7d8d3e6f1c5b2a4d3c2b1a09f8e7d6c5b4a39281706f5e"
	exampleToken = inviteToken("ubi_5f0c1f2e3d4c5b6a_abcdefghijklmnopqrstuvwxyz234567")
)

var (
	exampleTime  = time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	exampleAlice = bus.UserKey{
		0x0f, 0x6e, 0x7a, 0x3b, 0x9f, 0x0f, 0x2f, 0x0e, 0x4f, 0x7d, 0x8d, 0x3e, 0x6f, 0x1c, 0x5b, 0x2a,
		0x4d, 0x3c, 0x2b, 0x1a, 0x09, 0xf8, 0xe7, 0xd6, 0xc5, 0xb4, 0xa3, 0x92, 0x81, 0x70, 0x6f, 0x5e,
	}
	exampleUser = bus.UserInfo{
		SignPub: exampleAlice, NKey: exampleAlice.NKey(), Handle: "alice", Role: bus.Member, Status: bus.Active,
		CreatedAt: exampleTime, Revision: 12,
	}
	exampleGrant  = bus.RoomGrant{Room: "ops", Role: bus.Writer}
	exampleDetail = bus.UserDetail{UserInfo: exampleUser, Rooms: []bus.RoomGrant{exampleGrant}}
	exampleAccess = bus.AccessInfo{
		User: exampleUser, Admitted: true, Reason: "active", Rooms: []bus.RoomGrant{exampleGrant},
		Publish:   []bus.SubjectRule{{Subject: bus.RoomPublish("ops", exampleAlice), Room: "ops", Role: bus.Writer}},
		Subscribe: []bus.SubjectRule{{Subject: bus.InboxSubscribe(exampleAlice)}, {Subject: bus.RoomSubscribe("ops"), Room: "ops", Role: bus.Writer}},
	}
	exampleChange = bus.Change{
		What: "revoked alice", Revision: 13, Holders: 6, Expired: []string{}, Callouts: "3/3", Closed: 2, Servers: "3/3", ElapsedMS: 9, Verified: true,
	}
	exampleConnection = bus.ConnectionInfo{
		Server: "n1", CID: 77, SignPub: exampleAlice, NKey: exampleAlice.NKey(), Handle: "alice", Address: "198.51.100.7:53124",
		Since: exampleTime, LastActivity: exampleTime, Name: "backup job", Lang: "go", Version: "1.55.0", Subscriptions: 3,
		InMsgs: 12, OutMsgs: 4711, InBytes: 1830, OutBytes: 730211,
	}
	exampleKick = bus.Change{
		What: "closed 2 of alice", Revision: 12, Expired: []string{}, Callouts: "0/0", Closed: 2, Servers: "3/3", ElapsedMS: 3, Verified: true,
	}
	exampleRoom = bus.RoomInfo{
		Room: "ops", Status: bus.RoomActive, Description: "what happens on the machines", Creator: exampleAlice,
		CreatedAt: exampleTime, Members: 1, Revision: 3,
	}
	exampleMessage = bus.StoredMessage{
		Seq: 42, Time: exampleTime, Sender: exampleAlice, NKey: exampleAlice.NKey(), Topic: "log.n1",
		Headers: []bus.MessageHeader{{Name: bus.MessageIDHeader, Value: "c2pG3mJqUQWk"}}, Data: []byte("disk 91 % full"),
	}
	exampleMember = bus.MemberInfo{
		SignPub: exampleAlice, NKey: exampleAlice.NKey(), Handle: "alice", Role: bus.Owner, Status: bus.Present,
		UserStatus: bus.Active, AddedAt: exampleTime, Revision: 4,
	}
	exampleRoomDetail = bus.RoomDetail{
		RoomInfo: bus.RoomInfo{
			Room: "ops", Status: bus.RoomActive, Description: "what happens on the machines", Creator: exampleAlice,
			CreatedAt: exampleTime, Revision: 3,
		},
		Members: []bus.MemberInfo{exampleMember},
	}
	exampleInvite = bus.InviteInfo{
		ID: "5f0c1f2e3d4c5b6a", Status: bus.InviteOpen, Role: bus.Member, Handle: "bob",
		Rooms:     []bus.InvitedRoom{{Room: "ops", Role: bus.Writer}},
		ExpiresAt: exampleTime.Add(time.Hour), CreatedAt: exampleTime, CreatedBy: exampleAlice.NKey(), Revision: 5,
	}
	exampleInviteCreated = bus.InviteCreated{InviteInfo: exampleInvite, Token: string(exampleToken)}
	exampleEncryptionKey = encryptionKeyBody{
		N: 1, Public: make([]byte, bus.EncryptionKeySize), CreatedAt: exampleTime, Signature: make([]byte, 64),
	}
	exampleRecord = bus.AuditRecord{
		AuditEntry: bus.AuditEntry{
			At: exampleTime, Kind: bus.AuditOutcome, Action: string(userRevoke), Actor: exampleAlice.NKey(), User: exampleAlice.NKey(),
			From: "198.18.0.9", Request: "5f0c1f2e3d4c5b6a", Result: "ok", Revision: 13,
		},
		Seq: 81, Instance: "membership-n1",
	}
	exampleReport = bus.AuditReport{
		OK: true, Blocks: 81, Entries: 97, Checkpoints: 3, Signers: []string{exampleAlice.NKey()}, FirstSeq: 1, LastSeq: 84,
		Chains:   []bus.AuditChain{{Instance: "membership-n1", First: 1, Last: 81, Head: exampleHex}},
		Findings: []bus.AuditFinding{},
	}
)

var (
	exampleBlob = bus.BlobInfo{
		Name: "runbook.pdf", Size: 48_213, SHA256: exampleHex, CreatedAt: exampleTime, CreatedBy: exampleAlice.NKey(),
	}
	exampleBlobChange = bus.BlobChange{Room: "ops", Blob: exampleBlob}
	exampleBlobList   = bus.BlobList{Room: "ops", Blobs: []bus.BlobInfo{exampleBlob}, Bytes: 48_213, MaxBytes: 2 << 30, MaxCount: 1000}
)

// exampleProblem is made by the code that makes the real ones.
func exampleProblem(status int) bus.Problem {
	for code, s := range statusOf {
		if s == status {
			p, _ := problemOf(bus.E(code, "in words for people"), "5f0c1f2e3d4c5b6a")
			return p
		}
	}
	p, _ := problemOf(tooMany(time.Second, "key"), "5f0c1f2e3d4c5b6a") // 429 is no code's own
	return p
}
