package kv

import (
	"context"
	"encoding/json"
	"time"

	"unibus.internal/bus"
)

// PlainAccess decides the way unibus must not: by reading the bucket. It
// exists for the negative control of fresh reads, which shows that such reads
// admit a revoked user and answer without a quorum. No ordinary build calls it.
func (v *View) PlainAccess(ctx context.Context, k bus.UserKey) (*Access, error) {
	var u bus.User
	if ok, err := v.plainGet(ctx, Users, k.Hex(), &u); !ok || err != nil {
		return nil, err
	}
	a := &Access{User: u}
	for _, r := range v.Rooms() {
		var m bus.Membership
		ok, err := v.plainGet(ctx, Members, memberKey(r.ID, k), &m)
		if err != nil {
			return nil, err
		}
		if ok && m.Status == bus.Present && r.Status == bus.RoomActive {
			a.Rooms = append(a.Rooms, Grant{Room: r.ID, Role: m.Role, Durable: r.Durable})
		}
	}
	return a, nil
}

func (v *View) plainGet(ctx context.Context, bucket, key string, into any) (bool, error) {
	rctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	m, err := v.cfg.Conn.RequestWithContext(rctx, "$JS.API.DIRECT.GET."+StreamName(bucket)+"."+subjectOf(bucket, key), nil)
	if err != nil {
		return false, err
	}
	if m.Header.Get("Status") != "" {
		return false, nil
	}
	return true, json.Unmarshal(m.Data, into)
}
