package api

import (
	"context"
	"net/http"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

type auditAnswer struct {
	Records []bus.AuditRecord `json:"records"`
	Next    string            `json:"next"`
}

type auditReportAnswer struct {
	Report bus.AuditReport `json:"report"`
}

type auditQuery struct {
	User   userName      `query:"user" doc:"who is concerned"`
	Room   bus.RoomID    `query:"room"`
	Action auditWord     `query:"action" doc:"exactly, or all that begin so with a star: user.*"`
	Actor  auditActor    `query:"actor" doc:"who asked: a user, or direct"`
	Kind   bus.AuditKind `query:"kind"`
	Since  time.Time     `query:"since"`
	After  string        `query:"after" doc:"next of the page before"`
	Limit  int           `query:"limit" minimum:"1" maximum:"500" default:"100"`
}

// nkeyOf is how the audit names a user. It outlives records and handles, so a
// key that is nobody's may be asked for too.
func (a *api) nkeyOf(name userName) (string, error) {
	if name == "" {
		return "", nil
	}
	if k, err := bus.ParseUserKey(string(name)); err == nil {
		return k.NKey(), nil
	}
	u, _, err := a.view.FindUser(string(name))
	if err != nil {
		return "", noUser(name)
	}
	return u.Key.NKey(), nil
}

func (a *api) auditRecords(ctx context.Context, _ *caller, in *auditQuery) (auditAnswer, error) {
	q := kv.AuditQuery{Room: in.Room, Action: string(in.Action), Kind: string(in.Kind), Since: in.Since, Limit: in.Limit}
	var err error
	if q.User, err = a.nkeyOf(in.User); err != nil {
		return auditAnswer{}, err
	}
	if q.Actor = string(in.Actor); q.Actor != actorDirect {
		if q.Actor, err = a.nkeyOf(userName(in.Actor)); err != nil {
			return auditAnswer{}, err
		}
	}
	if in.After != "" {
		if q.After, err = kv.ParseAuditCursor(in.After); err != nil {
			return auditAnswer{}, invalid("after is not a cursor that this list gave")
		}
	}
	records, next, err := kv.ReadAudit(ctx, a.conn, q)
	if records == nil {
		records = []bus.AuditRecord{}
	}
	return auditAnswer{records, next}, err
}

const actorDirect = "direct"

func (a *api) auditReport(ctx context.Context, _ *caller, _ *none) (auditReportAnswer, error) {
	select { // one at a time reads all of it
	case a.verifying <- struct{}{}:
		defer func() { <-a.verifying }()
	case <-ctx.Done():
		return auditReportAnswer{}, bus.E(bus.Unavailable, "others are having this node verify the audit")
	}
	// A checkpoint that anybody could have signed would prove nothing.
	r, err := kv.VerifyAudit(ctx, a.conn, a.audit.audit.Signers())
	return auditReportAnswer{r}, err
}

// The routes about the audit.
func auditOperations() []operation {
	return []operation{
		consult(spec{
			id: "listAudit", method: http.MethodGet, path: "/v1/audit", tag: "audit", summary: "Read the audit",
			detail: "Admins only. Oldest first; give next as after for what follows, until it is empty.",
			answer: auditAnswer{[]bus.AuditRecord{exampleRecord}, ""}, errors: []int{http.StatusForbidden, http.StatusNotFound},
		}, auditList, nil, (*api).auditRecords),
		consult(spec{
			id: "verifyAudit", method: http.MethodGet, path: "/v1/audit/verify", tag: "audit", summary: "Verify the whole audit",
			detail: "Admins only. Who does not trust the service verifies with unibusctl audit verify --direct.",
			answer: auditReportAnswer{exampleReport}, errors: []int{http.StatusForbidden},
		}, auditVerify, nil, (*api).auditReport),
	}
}
