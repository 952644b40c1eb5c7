package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
	"unibus.internal/bus/kv"
)

const (
	// decideWithin is how long a command may take to reach the cluster, prove
	// its View and commit. Without a quorum it is refused by then.
	decideWithin = 2400 * time.Millisecond
	dialTimeout  = 900 * time.Millisecond
)

// direct is the backend of one command's own connection to the live KV: the
// break-glass path, which needs a quorum and the ops seed and no service. It
// decides on a View of its own, waits for every lease holder as a service does,
// and leaves the same traces in the audit.
type direct struct {
	app   *app
	nc    *nats.Conn
	view  *kv.View
	store *kv.Store // every write is decided by the time the command has for it
	// slow is for changes of several writes, each proven before the next: waiting
	// out one lease may take longer than a single write may.
	slow  *kv.Store
	audit *kv.Audit
	close func()
}

// openDirect proves a fresh View before it returns: what a command reads
// afterwards was committed no earlier than its start.
func (a *app) openDirect(ctx context.Context) (*direct, error) {
	if err := a.needDirect(); err != nil {
		return nil, err
	}
	return a.openLive(ctx, liveLink{seed: a.set.opsSeed, inbox: "_INBOX_ops", dial: a.dialFirst})
}

// needDirect is the usage error of what works on the live KV only.
func (a *app) needDirect() error {
	if !a.set.direct {
		return &usageError{msg: "this command works on the live KV only", hint: a.command + " --direct ..., on a node, with --ops-seed FILE"}
	}
	if a.set.opsSeed == "" {
		return &usageError{msg: "--direct needs the ops seed: set --ops-seed FILE or UNIBUS_OPS_SEED", hint: "unibusctl env"}
	}
	return nil
}

// liveLink is by which key, and how, a command reaches the live KV.
type liveLink struct {
	seed, inbox string
	dial        func(ctx context.Context, seed, inbox string) (*nats.Conn, error)
	raw         bool          // the View keeps records as they are stored
	patience    time.Duration // for the first proof; 0: decideWithin
}

func (a *app) openLive(ctx context.Context, l liveLink) (*direct, error) {
	by := a.now().Add(cmp.Or(l.patience, decideWithin))
	dctx, cancel := context.WithDeadline(ctx, by)
	defer cancel()
	nc, err := l.dial(dctx, l.seed, l.inbox)
	if err != nil {
		return nil, err
	}
	d := &direct{app: a, nc: nc}
	if d.view, err = kv.NewView(kv.ViewConfig{Conn: nc, Service: "unibusctl", Node: "direct", EncryptionKeys: true, Raw: l.raw}); err != nil {
		nc.Close()
		return nil, err
	}
	for _, s := range []struct {
		store **kv.Store
		by    time.Time
	}{{&d.store, by}, {&d.slow, time.Time{}}} {
		*s.store, err = kv.OpenStore(kv.StoreConfig{View: d.view, Actor: directActor, By: s.by, OnWait: func(h kv.Holder, left time.Duration) {
			a.say("waiting for the lease of %s, %s", h.Instance, left.Round(time.Second))
		}})
		if err != nil {
			nc.Close()
			return nil, err
		}
	}
	d.audit = kv.OpenAudit(kv.AuditConfig{Conn: nc, Instance: "unibusctl-direct", Now: a.now})
	run, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { d.view.Run(run) })
	running.Go(func() { d.audit.Run(run) })
	d.close = func() { stop(); running.Wait(); nc.Close() }
	if err := d.view.Barrier(dctx); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// directActor is who did it, in records and in the audit: whoever holds the ops
// seed.
const directActor = "direct"

// Close writes what the audit still holds, and disconnects.
func (d *direct) Close() {
	for _, b := range d.view.Broken() {
		d.app.say("WARNING: %s: record %s (revision %d) cannot be read and denies its key: %v", b.Bucket, b.Key, b.Revision, b.Err)
	}
	d.close()
}

// dialFirst connects to all servers at once and keeps the first that answers:
// a node that hangs must not use up the time of the ones that work.
func (a *app) dialFirst(ctx context.Context, seed, inbox string) (*nats.Conn, error) {
	if _, err := readSecret(seed); err != nil {
		return nil, err
	}
	return a.dialWith(ctx, seed, inbox)
}

// dialWith is dialFirst with a seed whose mode is not ours to judge.
func (a *app) dialWith(ctx context.Context, seed, inbox string) (*nats.Conn, error) {
	if a.set.ca == "" {
		return nil, &usageError{msg: "the CA is not known: set --ca FILE or UNIBUS_CA", hint: "unibusctl env"}
	}
	urls := strings.Split(a.set.natsURL, ",")
	type dialed struct {
		nc  *nats.Conn
		err error
	}
	results := make(chan dialed, len(urls))
	for _, u := range urls {
		go func() {
			nc, err := kv.Connect(kv.Link{
				URL: strings.TrimSpace(u), SeedFile: seed, CAFile: a.set.ca, Name: "unibusctl", Inbox: inbox,
				Timeout: dialTimeout, Once: true,
			})
			results <- dialed{nc, err}
		}()
	}
	var failures []string
	for n := range urls {
		select {
		case r := <-results:
			if r.err == nil {
				go func() {
					for range len(urls) - n - 1 {
						if late := <-results; late.nc != nil {
							late.nc.Close()
						}
					}
				}()
				return r.nc, nil
			}
			if code := bus.CodeOf(r.err); code != bus.Unavailable {
				return nil, r.err
			}
			failures = append(failures, r.err.Error())
		case <-ctx.Done():
			failures = append(failures, "no answer in time")
		}
	}
	slices.Sort(failures)
	return nil, bus.E(bus.Unavailable, "no quorum: %s", strings.Join(slices.Compact(failures), "; ")).
		WithHint("unibusctl cluster status")
}

// find is the user that somebody named.
func (d *direct) find(user string) (bus.User, error) {
	u, _, err := d.view.FindUser(user)
	return u, err
}

// narrows are the changes that only take access away. They are made even if the
// audit cannot be written: else who can stop the audit could stop every revoke.
var narrows = []string{"user.revoke", "user.suspend", "room.archive", "room.member.remove", "invite.withdraw"}

// auditWithin bounds the write that a change waits for.
const auditWithin = time.Second

// record writes the attempt, does it, and writes what came of it, in the words
// of the API. about says what it is about: User, Room and Detail.
func (d *direct) record(ctx context.Context, action string, about bus.AuditEntry, do func() (bus.Change, error)) (bus.Change, error) {
	var id [8]byte
	if _, err := io.ReadFull(d.app.rand, id[:]); err != nil {
		return bus.Change{}, bus.E(bus.Internal, "randomness: %w", err)
	}
	e := about
	e.At, e.Kind, e.Action, e.Actor, e.Request = d.stamp(), bus.AuditAttempt, action, directActor, hex.EncodeToString(id[:])
	actx, cancel := context.WithTimeout(ctx, auditWithin)
	err := d.audit.Record(actx, e)
	cancel()
	if err != nil {
		if !slices.Contains(narrows, action) {
			return bus.Change{}, bus.E(bus.Unavailable, "the audit cannot be written, so nothing was changed: %w", err).WithHint("unibusctl cluster status")
		}
		d.app.say("WARNING: the audit cannot be written, and this takes access away, so it is done all the same: %v", err)
	}
	change, err := do()
	e.At, e.Kind, e.Code, e.Revision = d.stamp(), bus.AuditOutcome, bus.CodeOf(err), change.Revision
	switch {
	case e.Code == bus.Unavailable || e.Code == bus.Internal:
		e.Result = "failed"
	case e.Code != "":
		e.Result = "refused"
	case !change.Verified:
		e.Result = "unproven"
	case change.Already:
		e.Result = "already"
	default:
		e.Result = "ok"
	}
	d.audit.Note(e) // Close writes it
	return change, err
}

func (d *direct) stamp() time.Time { return d.app.now().UTC().Truncate(time.Millisecond) }

// changeUser is a recorded change of one user.
func (d *direct) changeUser(ctx context.Context, action, user, detail string, do func(bus.UserKey) (kv.Result, error)) (bus.Change, error) {
	u, err := d.find(user)
	if err != nil {
		return bus.Change{}, err
	}
	return d.record(ctx, action, bus.AuditEntry{User: u.Key.NKey(), Detail: detail}, func() (bus.Change, error) { return kv.ChangeOf(do(u.Key)) })
}

func (d *direct) Me(context.Context) (bus.UserDetail, error) {
	key, err := d.app.ownKey()
	if err != nil {
		return bus.UserDetail{}, err
	}
	return d.view.UserDetail(key)
}

func (d *direct) Users(context.Context) ([]bus.UserInfo, error) {
	out := []bus.UserInfo{}
	for _, u := range d.view.Users() {
		out = append(out, kv.UserInfoOf(u))
	}
	return out, nil
}

func (d *direct) User(_ context.Context, user string) (bus.UserDetail, error) {
	u, err := d.find(user)
	if err != nil {
		return bus.UserDetail{}, err
	}
	return d.view.UserDetail(u.Key)
}

// Bootstrap makes the first admin. Only here: the API has nobody yet who could
// ask for it.
func (d *direct) Bootstrap(ctx context.Context, key bus.UserKey, handle bus.Handle) (bus.Change, error) {
	return d.record(ctx, "user.bootstrap", bus.AuditEntry{User: key.NKey(), Detail: "handle " + string(handle)}, func() (bus.Change, error) {
		return kv.ChangeOf(d.store.Bootstrap(ctx, key, handle))
	})
}

func (d *direct) AddUser(ctx context.Context, key bus.UserKey, handle bus.Handle, role bus.Role) (bus.Change, error) {
	return d.record(ctx, "user.add", bus.AuditEntry{User: key.NKey(), Detail: fmt.Sprintf("handle %s role %s", handle, role)}, func() (bus.Change, error) {
		return kv.ChangeOf(d.store.AddUser(ctx, key, handle, role))
	})
}

func (d *direct) PatchUser(ctx context.Context, user string, p client.UserPatch) (bus.Change, error) {
	var words []string
	if p.Handle != nil {
		words = append(words, "handle "+string(*p.Handle))
	}
	if p.Role != nil {
		words = append(words, "role "+string(*p.Role))
	}
	if p.Expires {
		words = append(words, "expiry")
	}
	return d.changeUser(ctx, "user.set", user, strings.Join(words, " "), func(k bus.UserKey) (kv.Result, error) {
		return d.store.PatchUser(ctx, k, kv.UserPatch{Handle: p.Handle, Role: p.Role, Expires: p.Expires, ExpiresAt: p.ExpiresAt, Revision: p.Revision})
	})
}

func (d *direct) RevokeUser(ctx context.Context, user string) (bus.Change, error) {
	return d.changeUser(ctx, "user.revoke", user, "", func(k bus.UserKey) (kv.Result, error) { return d.store.RevokeUser(ctx, k) })
}

func (d *direct) SuspendUser(ctx context.Context, user string) (bus.Change, error) {
	return d.changeUser(ctx, "user.suspend", user, "", func(k bus.UserKey) (kv.Result, error) { return d.store.SuspendUser(ctx, k) })
}

func (d *direct) ResumeUser(ctx context.Context, user string) (bus.Change, error) {
	return d.changeUser(ctx, "user.resume", user, "", func(k bus.UserKey) (kv.Result, error) { return d.store.ResumeUser(ctx, k) })
}

func (d *direct) RotateUser(ctx context.Context, user string, to bus.UserKey) (bus.Change, error) {
	return d.changeUser(ctx, "user.rotate", user, "to "+to.NKey(), func(k bus.UserKey) (kv.Result, error) { return d.slow.RotateUser(ctx, k, to) })
}

func (d *direct) Access(_ context.Context, user string) (bus.AccessInfo, error) {
	u, err := d.find(user)
	if err != nil {
		return bus.AccessInfo{}, err
	}
	return d.view.Explain(u.Key, d.app.now())
}

func (d *direct) Connections(ctx context.Context, q client.ConnectionQuery) (bus.ConnectionList, error) {
	of := kv.ConnectionQuery{Room: q.Room, Node: q.Server}
	if q.User != "" {
		u, err := d.find(q.User)
		if err != nil {
			return bus.ConnectionList{}, err
		}
		of.User = u.Key
	}
	if _, _, ok := d.view.Room(q.Room); q.Room != "" && !ok {
		return bus.ConnectionList{}, bus.E(bus.NotFound, "no room %s", q.Room).WithHint("unibusctl room list")
	}
	return d.store.Connections(ctx, of)
}

func (d *direct) Kick(ctx context.Context, user, server string, cid uint64) (bus.Change, error) {
	return d.changeUser(ctx, "connection.kick", user, kv.KickDetail(server, cid), func(k bus.UserKey) (kv.Result, error) {
		return d.store.Kick(ctx, kv.ConnectionQuery{User: k, Node: server, CID: cid})
	})
}

func (d *direct) CreateInvite(ctx context.Context, i client.NewInvite) (out bus.InviteCreated, err error) {
	_, err = d.record(ctx, "invite.create", bus.AuditEntry{Detail: strings.TrimSpace(fmt.Sprintf("role %s handle %s", i.Role, i.Handle))}, func() (bus.Change, error) {
		out, err = d.store.CreateInvite(ctx, kv.InviteRequest{Role: i.Role, Handle: i.Handle, Rooms: i.Rooms, TTL: i.TTL})
		return bus.Change{Revision: out.Revision, Verified: true}, err
	})
	return out, err
}

func (d *direct) Invites(ctx context.Context) ([]bus.InviteInfo, error) { return d.store.Invites(ctx) }

func (d *direct) WithdrawInvite(ctx context.Context, id string) (info bus.InviteInfo, already bool, err error) {
	_, err = d.record(ctx, "invite.withdraw", bus.AuditEntry{Detail: "invite " + id}, func() (bus.Change, error) {
		info, already, err = d.store.WithdrawInvite(ctx, id)
		return bus.Change{Revision: info.Revision, Already: already, Verified: true}, err
	})
	return info, already, err
}

func (d *direct) Rooms(context.Context) ([]bus.RoomInfo, error) { return d.view.RoomInfos(), nil }

func (d *direct) room(id bus.RoomID) (bus.RoomInfo, error) {
	r, ok := d.view.RoomInfo(id)
	if !ok {
		return bus.RoomInfo{}, bus.E(bus.NotFound, "no room %s", id).WithHint("unibusctl room list")
	}
	return r, nil
}

func (d *direct) Room(_ context.Context, id bus.RoomID) (bus.RoomDetail, error) {
	r, err := d.room(id)
	if err != nil {
		return bus.RoomDetail{}, err
	}
	return bus.RoomDetail{RoomInfo: r, Members: d.view.MemberInfos(id, false)}, nil
}

// CreateRoom makes a room of --owner, or of the user of --identity: the ops
// seed is no user.
func (d *direct) CreateRoom(ctx context.Context, r client.NewRoom) (bus.Change, error) {
	if r.Owner == "" {
		key, err := d.app.ownKey()
		if err != nil {
			return bus.Change{}, err
		}
		r.Owner = key.NKey()
	}
	u, err := d.find(r.Owner)
	if err != nil {
		return bus.Change{}, err
	}
	return d.record(ctx, "room.create", bus.AuditEntry{User: u.Key.NKey(), Room: r.Room}, func() (bus.Change, error) {
		return kv.ChangeOf(d.slow.CreateRoom(ctx, r.Room, u.Key, kv.RoomOptions{Durable: r.Durable, Encrypted: r.Encrypted, Description: r.Description, Retention: r.Retention}))
	})
}

func (d *direct) DescribeRoom(ctx context.Context, id bus.RoomID, description string, revision uint64) (bus.Change, error) {
	return d.record(ctx, "room.set", bus.AuditEntry{Room: id}, func() (bus.Change, error) {
		return kv.ChangeOf(d.store.PatchRoom(ctx, id, kv.RoomPatch{Description: &description, Revision: revision}))
	})
}

// RetainRoom writes what the room is to keep; a membership has its stream keep it.
func (d *direct) RetainRoom(ctx context.Context, id bus.RoomID, keep bus.Retention, revision uint64) (bus.Change, error) {
	return d.record(ctx, "room.set", bus.AuditEntry{Room: id}, func() (bus.Change, error) {
		return kv.ChangeOf(d.store.PatchRoom(ctx, id, kv.RoomPatch{Retention: &keep, Revision: revision}))
	})
}

// ArchiveRoom marks what is stored to go, if purge; a membership takes it away.
func (d *direct) ArchiveRoom(ctx context.Context, id bus.RoomID, purge bool) (bus.Change, error) {
	return d.record(ctx, "room.archive", bus.AuditEntry{Room: id}, func() (bus.Change, error) {
		return kv.ChangeOf(d.store.ArchiveRoom(ctx, id, purge))
	})
}

func (d *direct) Members(_ context.Context, id bus.RoomID, gone bool) ([]bus.MemberInfo, error) {
	if _, err := d.room(id); err != nil {
		return nil, err
	}
	return d.view.MemberInfos(id, gone), nil
}

func (d *direct) SetMember(ctx context.Context, id bus.RoomID, user string, role bus.RoomRole) (bus.Change, error) {
	return d.membership(ctx, "room.member.set", id, user, "role "+string(role), func(k bus.UserKey) (kv.Result, error) { return d.store.SetMember(ctx, id, k, role) })
}

func (d *direct) RemoveMember(ctx context.Context, id bus.RoomID, user string) (bus.Change, error) {
	return d.membership(ctx, "room.member.remove", id, user, "", func(k bus.UserKey) (kv.Result, error) { return d.store.RemoveMember(ctx, id, k) })
}

func (d *direct) membership(ctx context.Context, action string, id bus.RoomID, user, detail string, do func(bus.UserKey) (kv.Result, error)) (bus.Change, error) {
	if _, err := d.room(id); err != nil {
		return bus.Change{}, err
	}
	u, err := d.find(user)
	if err != nil {
		return bus.Change{}, err
	}
	return d.record(ctx, action, bus.AuditEntry{User: u.Key.NKey(), Room: id, Detail: detail}, func() (bus.Change, error) { return kv.ChangeOf(do(u.Key)) })
}

func (d *direct) Audit(ctx context.Context, q client.AuditQuery) ([]bus.AuditRecord, string, error) {
	after, err := kv.ParseAuditCursor(q.After)
	if err != nil {
		return nil, "", err
	}
	out := kv.AuditQuery{Action: q.Action, Kind: string(q.Kind), Room: q.Room, Since: q.Since, After: after, Limit: q.Limit}
	if out.User, err = d.nkeyOf(q.User); err != nil {
		return nil, "", err
	}
	if out.Actor = q.Actor; q.Actor != directActor {
		if out.Actor, err = d.nkeyOf(q.Actor); err != nil {
			return nil, "", err
		}
	}
	return kv.ReadAudit(ctx, d.nc, out)
}

// nkeyOf is how the audit names a user. It outlives records and handles, so a
// key that is nobody's may be asked for too.
func (d *direct) nkeyOf(user string) (string, error) {
	if user == "" {
		return "", nil
	}
	if k, err := bus.ParseUserKey(user); err == nil {
		return k.NKey(), nil
	}
	u, err := d.find(user)
	if err != nil {
		return "", err
	}
	return u.Key.NKey(), nil
}

func (d *direct) VerifyAudit(ctx context.Context, signers []string) (bus.AuditReport, error) {
	return kv.VerifyAudit(ctx, d.nc, signers)
}

// AfterWrite reports the replicas of the users bucket, once they have had up to
// a second to take what was just written.
func (d *direct) AfterWrite(ctx context.Context) string {
	bctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	h := kv.HealthOf(bctx, d.nc, kv.Users)
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for h.Settling() && bctx.Err() == nil {
		select {
		case <-bctx.Done():
		case <-again.C:
			if now := kv.HealthOf(bctx, d.nc, kv.Users); now.Err == nil {
				h = now
			}
		}
	}
	leader := h.Leader
	if h.Err != nil || leader == "" {
		leader = "unknown"
	}
	return fmt.Sprintf("%s: leader=%s followers_current=%d/%d msgs=%d", h.Stream, leader, h.FollowersCurrent, kv.Replicas-1, d.view.UserRecords())
}
