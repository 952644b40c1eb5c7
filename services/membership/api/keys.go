package api

import (
	"context"
	"fmt"
	"net/http"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/seal"
)

// What the routes about keys answer is public among the members, or sealed to
// one of them. No key passes here that this service could use.

type roomKeysRequest struct {
	Room  bus.RoomID `path:"room"`
	After int        `query:"after" minimum:"0" maximum:"1000000000" default:"0" doc:"an epoch: the next one is the first to be listed"`
	Limit int        `query:"limit" minimum:"1" maximum:"32" default:"8"`
}

func (r *roomKeysRequest) room() bus.RoomID { return r.Room }

type roomKeysAnswer struct {
	Keys bus.RoomKeys `json:"keys"`
}

func (a *api) roomKeys(ctx context.Context, c *caller, in *roomKeysRequest) (roomKeysAnswer, error) {
	keys, err := a.store.RoomKeys(ctx, in.Room, c.key, uint64(in.After), in.Limit) //nolint:gosec // not negative, says the schema
	return roomKeysAnswer{keys}, err
}

type memberKeysAnswer struct {
	Room    bus.RoomID      `json:"room"`
	Members []bus.MemberKey `json:"members"`
}

func (a *api) memberKeys(_ context.Context, c *caller, in *roomPath) (memberKeysAnswer, error) {
	if err := a.authorize(c, roomKeys, a.inside(c, in.Room, bus.UserKey{})); err != nil {
		return memberKeysAnswer{}, err
	}
	if _, _, ok := a.view.Room(in.Room); !ok {
		return memberKeysAnswer{}, noRoom(in.Room)
	}
	return memberKeysAnswer{in.Room, a.view.MemberKeys(in.Room, a.now())}, nil
}

type newEpochRequest struct {
	Room bus.RoomID `path:"room"`
	Body newEpochBody
}

type newEpochBody struct {
	Roster    []byte   `json:"roster" doc:"as docs/encryption.md spells it, signed by the caller"`
	Envelopes [][]byte `json:"envelopes" maxItems:"2000" doc:"one for each member of the roster, in its order"`
}

func (a *api) newEpoch(_ *caller, in *newEpochRequest) (plan, error) {
	roster, err := seal.ParseRoster(in.Body.Roster)
	if bus.CodeOf(err) == bus.Unauthenticated { // of who signed the roster, not of who asks
		return plan{}, invalid("the roster is not signed by who it says")
	}
	if err != nil {
		return plan{}, err
	}
	if roster.Room != in.Room {
		return plan{}, invalid("the roster is of another room")
	}
	return plan{
		action: roomRekey, target: a.aboutRoom(in.Room, bus.UserKey{}),
		detail: summary("epoch", fmt.Sprint(roster.Epoch), "members", fmt.Sprint(len(roster.Members)), "roster", roster.Hash().String()),
		do: func(ctx context.Context, s *kv.Store) (effect, error) {
			return changed(s.NewEpoch(ctx, roster, in.Body.Envelopes))
		},
	}, nil
}

type grantKeysRequest struct {
	Room bus.RoomID `path:"room"`
	User userName   `path:"user"`
	Body grantKeysBody
}

type grantKeysBody struct {
	Envelopes []grantedKey `json:"envelopes" maxItems:"32"`
}

type grantedKey struct {
	Epoch    int64  `json:"epoch" minimum:"1" maximum:"1000000000"`
	Envelope []byte `json:"envelope"`
}

func (a *api) grantKeys(c *caller, in *grantKeysRequest) (plan, error) {
	granted := make([]bus.GrantedKey, len(in.Body.Envelopes))
	for i, g := range in.Body.Envelopes {
		granted[i] = bus.GrantedKey{Epoch: uint64(g.Epoch), Envelope: g.Envelope} //nolint:gosec // not negative, says the schema
	}
	return a.membership(c, memberPath{in.Room, in.User}, roomGrant, summary("epochs", fmt.Sprint(len(granted))),
		func(ctx context.Context, s *kv.Store, k bus.UserKey) (kv.Result, error) {
			return s.GrantKeys(ctx, in.Room, k, granted)
		})
}

// maxEpoch is what a roster of 2,000 members and their envelopes take, in base64.
const maxEpoch = 4 << 20

// The routes about the keys of encrypted rooms.
func keyOperations() []operation {
	changes := []int{http.StatusForbidden, http.StatusNotFound, http.StatusConflict}
	const noOracle = "To who is not a member there is no such room."
	user := exampleAlice
	epoch := change[newEpochRequest, bus.Change](spec{
		id: "newEpoch", method: http.MethodPost, path: "/v1/rooms/{room}/epochs", tag: "keys", summary: "Make the next epoch of an encrypted room",
		detail: "Owners. 409 if somebody else has made that epoch, or if a member, a role or an encryption key in the roster is not what the records say. Repeating the same request finishes it. The body may have 4 MiB. " + noOracle,
		body:   newEpochBody{Roster: []byte("roster"), Envelopes: [][]byte{[]byte("envelope")}}, answer: exampleChange, errors: changes,
	}, http.StatusOK, (*api).newEpoch)
	epoch.large = maxEpoch
	return []operation{
		consultRoom[*roomKeysRequest](spec{
			id: "roomKeys", method: http.MethodGet, path: "/v1/rooms/{room}/keys", tag: "keys", summary: "Show the rosters of a room and the caller's envelopes",
			detail: "Members and admins. Epochs after the given one, oldest first; give next as after for the following page, until it is 0. What of it to believe is said in docs/encryption.md. " + noOracle,
			answer: roomKeysAnswer{bus.RoomKeys{
				Room: "ops", Creator: exampleAlice, Epoch: 1, RekeyRequired: true, Why: []bus.RekeyReason{{Why: bus.RekeyDeparted, User: &user}},
				Waiting: []bus.WaitingMember{{User: exampleAlice, Handle: "alice", Role: bus.Writer, Key: true}},
				Epochs:  []bus.RoomEpoch{{Epoch: 1, Roster: []byte{}, Envelope: []byte{}, CreatedAt: exampleTime}},
			}}, errors: []int{http.StatusNotFound, http.StatusConflict},
		}, roomKeys, (*api).roomKeys),
		read(spec{
			id: "memberKeys", method: http.MethodGet, path: "/v1/rooms/{room}/encryption-keys", tag: "keys", summary: "List the encryption keys of the active members of a room",
			detail: "Members and admins. " + noOracle,
			answer: memberKeysAnswer{"ops", []bus.MemberKey{{SignPub: exampleAlice, Handle: "alice", Role: bus.Owner}}}, errors: []int{http.StatusNotFound},
		}, (*api).memberKeys),
		epoch,
		change[grantKeysRequest, bus.Change](spec{
			id: "grantKeys", method: http.MethodPut, path: "/v1/rooms/{room}/keys/{user}", tag: "keys", summary: "Give a member the keys of epochs before they came",
			detail: "Owners. " + noOracle, body: grantKeysBody{[]grantedKey{{Epoch: 1, Envelope: []byte("envelope")}}}, answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).grantKeys),
	}
}
