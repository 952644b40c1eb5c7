package api

import (
	"context"
	"net/http"
	"reflect"
	"strings"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
)

type invitesAnswer struct {
	Invites []bus.InviteInfo `json:"invites"`
}

type inviteCreatedAnswer struct {
	Invite bus.InviteCreated `json:"invite"`
}

type inviteWithdrawnAnswer struct {
	Invite  bus.InviteInfo `json:"invite"`
	Already bool           `json:"already"`
}

type createInviteRequest struct {
	Body createInviteBody
}

type createInviteBody struct {
	Role             bus.Role          `json:"role"`
	Handle           bus.Handle        `json:"handle,omitempty" doc:"if absent, the newcomer chooses"`
	Rooms            []bus.InvitedRoom `json:"rooms,omitempty" doc:"rooms that the newcomer will be in"`
	ExpiresInSeconds int               `json:"expires_in_seconds,omitempty" minimum:"60" maximum:"2592000" doc:"if absent, a day"`
}

func (a *api) createInvite(_ *caller, in *createInviteRequest) (plan, error) {
	b := in.Body
	return plan{
		action: inviteCreate, target: func(*caller) target { return target{} },
		detail: strings.TrimSuffix(summary("role", string(b.Role), "handle", string(b.Handle)), " handle "),
		do: func(ctx context.Context, s *kv.Store) (effect, error) {
			i, err := s.CreateInvite(ctx, kv.InviteRequest{
				Role: b.Role, Handle: b.Handle, Rooms: b.Rooms, TTL: time.Duration(b.ExpiresInSeconds) * time.Second,
			})
			return effect{body: inviteCreatedAnswer{i}, verified: true, revision: i.Revision}, err
		},
	}, nil
}

func (a *api) invites(ctx context.Context, _ *caller, _ *none) (invitesAnswer, error) {
	all, err := a.store.Invites(ctx)
	return invitesAnswer{all}, err
}

type invitePath struct {
	ID inviteID `path:"id"`
}

func (a *api) withdrawInvite(_ *caller, in *invitePath) (plan, error) {
	return plan{
		action: inviteWithdraw, target: func(*caller) target { return target{} }, detail: summary("invite", string(in.ID)),
		do: func(ctx context.Context, s *kv.Store) (effect, error) {
			i, already, err := s.WithdrawInvite(ctx, string(in.ID))
			return effect{body: inviteWithdrawnAnswer{i, already}, already: already, verified: true, revision: i.Revision}, err
		},
	}, nil
}

// Enrolling is the one route that a key reaches which is nobody's yet: see
// gate.admitNewcomer, which reads the body before the invite is proven.
const (
	enrollID     = "enroll"
	enrollMethod = http.MethodPost
	enrollPath   = "/v1/enroll"
)

type enrollRequest struct {
	Body enrollBody
}

type enrollBody struct {
	Token  inviteToken `json:"token"`
	Handle string      `json:"handle,omitempty" maxLength:"64" doc:"needed if the invite leaves it open"`
}

var enrollShape = shapeOf(reflect.TypeFor[enrollRequest]())

// enroll makes a user of a newcomer.
func enroll(s spec) operation {
	o := newOperation[enrollRequest, bus.Change](s, http.StatusOK, http.StatusCreated, http.StatusAccepted)
	o.serve = func(a *api, x *exchange) error {
		n := x.newcomer
		if n == nil {
			return errRefused
		}
		if err := o.shape.bind(x.r, x.body, new(enrollRequest)); err != nil {
			return err
		}
		if n.handle != "" {
			if _, err := bus.ParseHandle(n.handle); err != nil {
				return invalid("handle must be 1 to 32 of a-z 0-9 _ - and start with a letter")
			}
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(x.r.Context()), a.patrol)
		defer cancel()
		e := a.audit.entry(n.key, n.request, n.from, inviteRedeem, target{user: n.key})
		if err := a.audit.attempt(ctx, e); err != nil {
			x.w.Header().Set(bus.EffectHeader, bus.EffectNone)
			return err
		}
		guard.Pause("mutate")
		done, err := changed(a.store.As(kv.Caller{Name: n.key.NKey(), Key: n.key, Check: a.leased}).
			RedeemInvite(ctx, string(n.token), n.key, bus.Handle(n.handle)))
		a.audit.outcome(e, done, err)
		if err != nil {
			return err
		}
		x.finish(done, http.StatusCreated)
		return nil
	}
	return o
}

// The routes about invites.
func inviteOperations() []operation {
	return []operation{
		change[createInviteRequest, inviteCreatedAnswer](spec{
			id: "createInvite", method: http.MethodPost, path: "/v1/invites", tag: "invites", summary: "Invite somebody",
			detail: "Admins only. The token is in this answer and nowhere else; whoever holds it becomes a user, once.",
			body:   createInviteBody{Role: bus.Member, Handle: "bob", Rooms: []bus.InvitedRoom{{Room: "ops", Role: bus.Writer}}, ExpiresInSeconds: 3600},
			answer: inviteCreatedAnswer{exampleInviteCreated}, errors: []int{http.StatusForbidden, http.StatusNotFound, http.StatusConflict},
		}, http.StatusCreated, (*api).createInvite),
		consult(spec{
			id: "listInvites", method: http.MethodGet, path: "/v1/invites", tag: "invites", summary: "List invites, newest first",
			detail: "Admins only. Never with their tokens.", answer: invitesAnswer{[]bus.InviteInfo{exampleInvite}}, errors: []int{http.StatusForbidden},
		}, inviteList, nil, (*api).invites),
		change[invitePath, inviteWithdrawnAnswer](spec{
			id: "withdrawInvite", method: http.MethodDelete, path: "/v1/invites/{id}", tag: "invites", summary: "Withdraw an invite",
			detail: "Admins only. Goes on when the audit cannot be written.", answer: inviteWithdrawnAnswer{exampleInvite, false},
			errors: []int{http.StatusForbidden, http.StatusNotFound, http.StatusConflict},
		}, http.StatusOK, (*api).withdrawInvite),
		enroll(spec{
			id: enrollID, method: enrollMethod, path: enrollPath, tag: "invites", summary: "Become a user by an invite",
			detail: "Signed with the new key, which proves that the newcomer holds it. Until the invite is proven every failure is the same 401. Repeating it finishes what was interrupted.",
			body:   enrollBody{Token: exampleToken, Handle: "bob"}, answer: exampleChange, errors: []int{http.StatusConflict},
		}),
	}
}
