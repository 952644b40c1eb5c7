package main

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

const (
	// probeAccess is how long a probe user may connect after a run. It ends by
	// the expiry in the record, so also when the doctor is killed.
	probeAccess = time.Minute
	// answerWithin is how long a change waits for every callout to answer.
	answerWithin = 2 * time.Second
)

// probeUser is one user of the doctor's own. Its key is derived from the ops
// seed, whose holder may write any user record anyway: it is stored nowhere,
// and every run finds the same user.
type probeUser struct {
	kp  nkeys.KeyPair
	key bus.UserKey
}

type probes struct {
	in, out, gone probeUser // in the probe room, in no room, revoked
	room          bus.RoomID
}

func deriveProbe(seedFile, purpose string) (p probeUser, err error) {
	line, err := readSecret(seedFile)
	if err != nil {
		return p, err
	}
	_, raw, err := nkeys.DecodeSeed([]byte(strings.TrimSpace(string(line))))
	if err != nil {
		return p, bus.E(bus.Invalid, "%s holds no seed", seedFile)
	}
	derived, err := hkdf.Key(sha256.New, raw, nil, "unibus/v1/doctor/"+purpose, 32)
	if err != nil {
		return p, err
	}
	seed, err := nkeys.EncodeSeed(nkeys.PrefixByteUser, derived)
	if err != nil {
		return p, err
	}
	if p.kp, err = nkeys.FromSeed(seed); err != nil {
		return p, err
	}
	pub, err := p.kp.PublicKey()
	if err != nil {
		return p, err
	}
	p.key, err = bus.ParseUserKey(pub)
	return p, err
}

// prepare opens the probe users' access for a minute, and makes them when this
// is the first run. It returns who holds a lease, too.
func (v *doctorVisit) prepare(ctx context.Context) (*probes, []kv.Holder) {
	p := &probes{}
	for _, u := range []struct {
		to      *probeUser
		purpose string
	}{{&p.in, "in"}, {&p.out, "out"}, {&p.gone, "gone"}} {
		var err error
		if *u.to, err = deriveProbe(v.set.opsSeed, u.purpose); err != nil {
			v.add(severityUnknown, "cluster", "probe", "unibusctl env", "no probe: %v", err)
			return nil, nil
		}
	}
	d, err := v.openDirect(ctx)
	if err != nil {
		v.add(severityCritical, "cluster", "store", "unibusctl cluster status", "the state cannot be proven current: %v", err)
		return nil, nil
	}
	defer d.close()
	v.add(severityOK, "cluster", "store", "", "a barrier was stored by a quorum")
	broken := []string{}
	for _, b := range d.view.Broken() {
		broken = append(broken, fmt.Sprintf("%s %s cannot be read", b.Bucket, b.Key))
	}
	v.test("cluster", "records", "unibusctl --direct user list; write the record again", "none is unreadable", strings.Join(broken, "; "))
	if err := v.admit(ctx, d, p); err != nil {
		v.add(severityUnknown, "cluster", "probe", "unibusctl --direct user list", "the probe users cannot be prepared: %v", err)
		return nil, d.view.Holders()
	}
	return p, d.view.Holders()
}

// admit makes what is missing and opens the access. A write that is committed
// and not proven is enough: who gains access is never refused on an old state.
func (v *doctorVisit) admit(ctx context.Context, d *direct, p *probes) error {
	if d.view.UserRecords() == 0 { // a probe user would be the first, and there could be no first admin any more
		return bus.E(bus.Conflict, "there are no users yet; run unibusctl --direct bootstrap first")
	}
	tag := p.in.key.Hex()[:8]
	p.room = bus.RoomID("doctor-" + tag)
	soon := func(action string, about bus.AuditEntry, do func(ctx context.Context) (kv.Result, error)) (bus.Change, error) {
		return d.record(ctx, action, about, func() (bus.Change, error) {
			wctx, cancel := context.WithTimeout(ctx, answerWithin)
			defer cancel()
			return kv.ChangeOf(do(wctx))
		})
	}
	for purpose, u := range map[string]probeUser{"in": p.in, "out": p.out, "gone": p.gone} {
		handle, about := bus.Handle("doctor-"+tag+"-"+purpose), bus.AuditEntry{User: u.key.NKey(), Detail: "probe of the doctor"}
		if _, _, ok := d.view.User(u.key); !ok {
			if _, err := soon("user.add", about, func(ctx context.Context) (kv.Result, error) { return d.slow.AddUser(ctx, u.key, handle, bus.Member) }); err != nil {
				return err
			}
		}
	}
	if u, _, _ := d.view.User(p.gone.key); u.Status != bus.Revoked {
		_, err := soon("user.revoke", bus.AuditEntry{User: p.gone.key.NKey()}, func(ctx context.Context) (kv.Result, error) { return d.slow.RevokeUser(ctx, p.gone.key) })
		if err != nil {
			return err
		}
	}
	for range 2 { // interrupted after the room, the same call goes on with its owner
		if _, _, ok := d.view.Membership(p.room, p.in.key); ok {
			break
		}
		_, err := soon("room.create", bus.AuditEntry{User: p.in.key.NKey(), Room: p.room}, func(ctx context.Context) (kv.Result, error) {
			return d.slow.CreateRoom(ctx, p.room, p.in.key, kv.RoomOptions{Description: "probe of unibusctl doctor"})
		})
		if err != nil {
			return err
		}
	}
	until := v.now().Add(probeAccess)
	var changes [2]bus.Change
	var failed [2]error
	var work sync.WaitGroup
	for i, u := range []probeUser{p.in, p.out} {
		work.Go(func() {
			changes[i], failed[i] = soon("user.set", bus.AuditEntry{User: u.key.NKey(), Detail: "expiry, by the doctor"}, func(ctx context.Context) (kv.Result, error) {
				return d.slow.PatchUser(ctx, u.key, kv.UserPatch{Expires: true, ExpiresAt: &until})
			})
		})
	}
	work.Wait()
	if err := errors.Join(failed[:]...); err != nil {
		return err
	}
	silent := slices.Concat(changes[0].Waiting, changes[1].Waiting)
	slices.Sort(silent)
	why := ""
	if silent = slices.Compact(silent); len(silent) > 0 {
		why = "a change of access waits for " + strings.Join(silent, ", ")
	}
	v.test("cluster", "callouts", "systemctl status unibus-authcallout unibus-membership, on that node", "every service that decides acknowledged a change: "+changes[0].Callouts+" callouts", why)
	return nil
}

// callouts wants one that holds a lease on every node.
func (v *doctorVisit) callouts(holders []kv.Holder) {
	for _, p := range v.nodes {
		why := ""
		if !slices.ContainsFunc(holders, func(h kv.Holder) bool { return h.Service == "authcallout" && h.Node == p.name }) {
			why = "no authcallout holds a lease on this node"
		}
		v.test(p.name, "callout", "journalctl -u unibus-authcallout, on the node", "holds a lease", why)
	}
}

// send goes to every node as each probe user.
func (v *doctorVisit) send(ctx context.Context, p *probes) {
	var mu sync.Mutex
	inside := map[string]*nats.Conn{}
	v.each(func(n *patient) {
		if n.info.ID == "" {
			return // said once, under nats.tls
		}
		var work sync.WaitGroup
		work.Go(func() {
			v.refused(n, "deny.revoked", "unibusctl user show "+p.gone.key.NKey(), nats.Nkey(p.gone.key.NKey(), p.gone.kp.Sign))
		})
		work.Go(func() { v.roomless(n, p) })
		work.Go(func() {
			if nc := v.roomed(ctx, n, p); nc != nil {
				mu.Lock()
				defer mu.Unlock()
				inside[n.name] = nc
			}
		})
		work.Wait()
	})
	v.across(ctx, p, inside)
	for _, nc := range inside {
		nc.Close()
	}
}

func (v *doctorVisit) enter(n *patient, u probeUser) (*nats.Conn, string) {
	nc, err := nats.Connect(n.natsURL, v.natsOptions(nats.Nkey(u.key.NKey(), u.kp.Sign), nats.CustomInboxPrefix(bus.InboxPrefix(u.key)))...)
	if err != nil {
		return nil, fmt.Sprintf("the probe user is not admitted: %v", err)
	}
	return nc, ""
}

// attempt is one operation that must be allowed or refused.
type attempt struct {
	publish bool
	subject string
}

func pub(subject string) attempt { return attempt{true, subject} }
func sub(subject string) attempt { return attempt{false, subject} }

func (t attempt) String() string {
	if t.publish {
		return "publish to " + t.subject
	}
	return "subscribe to " + t.subject
}

// try reports whether the server lets it through. Its -ERR comes before the
// PONG, so it is known when the flush returns.
func (t attempt) try(nc *nats.Conn) (allowed bool, err error) {
	if t.publish {
		err = nc.Publish(t.subject, []byte("doctor"))
	} else {
		_, err = nc.SubscribeSync(t.subject)
	}
	if err == nil {
		err = nc.FlushTimeout(questionWithin)
	}
	if err != nil {
		return false, err
	}
	last := nc.LastError()
	return last == nil || !strings.Contains(strings.ToLower(last.Error()), strings.ToLower(`"`+t.subject+`"`)), nil
}

// wrong lists the attempts that do not go as they must.
func wrong(nc *nats.Conn, mayPass bool, all ...attempt) string {
	var out []string
	for _, t := range all {
		allowed, err := t.try(nc)
		switch {
		case err != nil:
			return fmt.Sprintf("%s: %v", t, err)
		case allowed && !mayPass:
			out = append(out, "ALLOWED to "+t.String())
		case !allowed && mayPass:
			out = append(out, "refused to "+t.String())
		}
	}
	return strings.Join(out, "; ")
}

// beyond are subjects that no user may touch, whoever they are. What is
// published there would do no harm.
func beyond(p *probes, self, other bus.UserKey) []attempt {
	return []attempt{
		sub(">"), sub("room.>"), sub("store.>"), sub("feed.>"), sub("_INBOX.>"), sub(bus.InboxSubscribe(other)), sub(bus.NoticeSubscribe(other)),
		sub("$SYS.>"), sub("$JS.>"), sub("$KV.>"), sub(bus.RoomSubscribe("doctor-other")),
		pub(bus.RoomSubject("doctor-other", self, "probe")), pub(bus.RoomSubject(p.room, other, "forged")),
		pub(bus.InboxPrefix(other) + ".probe"), pub(bus.NoticeSubject(other, "probe")), pub("store." + string(p.room) + ".probe"),
		pub("$JS.API.INFO"), pub("$KV.UNIBUS_users.probe"), pub("$SYS.REQ.USER.INFO"), pub("doctor.probe"),
	}
}

func (v *doctorVisit) roomless(n *patient, p *probes) {
	nc, why := v.enter(n, p.out)
	if nc != nil {
		defer nc.Close()
		why = wrong(nc, true, sub(bus.InboxPrefix(p.out.key)+".probe"), sub(bus.NoticeSubscribe(p.out.key)))
		if why == "" {
			why = wrong(nc, false, append(beyond(p, p.out.key, p.in.key), sub(bus.RoomSubscribe(p.room)), pub(bus.RoomSubject(p.room, p.out.key, "probe")))...)
		}
	}
	v.test(n.name, "allow.roomless", "journalctl -u unibus-authcallout, on the node", "inbox and notices, nothing more", why)
}

// roomed returns a connection that hears the probe room, if there is one.
func (v *doctorVisit) roomed(ctx context.Context, n *patient, p *probes) *nats.Conn {
	next := "unibusctl --direct acl explain " + p.in.key.NKey()
	nc, why := v.enter(n, p.in)
	if nc != nil {
		why = v.echo(ctx, nc, p)
	}
	v.test(n.name, "allow.room", next, "heard its own message in the probe room", why)
	if nc == nil {
		return nil
	}
	v.test(n.name, "deny.beyond", next, "all else is refused", wrong(nc, false, beyond(p, p.in.key, p.out.key)...))
	return nc
}

func (v *doctorVisit) echo(ctx context.Context, nc *nats.Conn, p *probes) string {
	ctx, cancel := context.WithTimeout(ctx, questionWithin)
	defer cancel()
	heard, err := nc.SubscribeSync(bus.RoomSubscribe(p.room))
	if err != nil {
		return err.Error()
	}
	defer func() { _ = heard.Unsubscribe() }()
	token := "echo-" + nc.NewInbox()[len(bus.InboxPrefix(p.in.key))+1:]
	if why := wrong(nc, true, pub(bus.RoomSubject(p.room, p.in.key, token))); why != "" {
		return why
	}
	for {
		m, err := heard.NextMsgWithContext(ctx)
		if err != nil {
			return fmt.Sprintf("did not hear its own message: %v", err)
		}
		if strings.HasSuffix(m.Subject, "."+token) {
			return ""
		}
	}
}

// across sends one message from each node to all.
func (v *doctorVisit) across(ctx context.Context, p *probes, inside map[string]*nats.Conn) {
	if len(inside) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, questionWithin)
	defer cancel()
	heard := map[string]*nats.Subscription{}
	for name, nc := range inside {
		s, err := nc.SubscribeSync(bus.RoomSubscribe(p.room))
		if err == nil {
			err = nc.FlushTimeout(questionWithin)
		}
		if err != nil {
			v.add(severityUnknown, name, "room.across", "unibusctl cluster status", "%v", err)
			continue
		}
		heard[name] = s
	}
	// Interest needs a moment to reach the other nodes, so each token is said
	// again until all have heard it.
	said := map[string]*nats.Conn{}
	for _, nc := range inside {
		said[nc.NewInbox()[len(bus.InboxPrefix(p.in.key))+1:]] = nc
	}
	stop := make(chan struct{})
	var work, saying sync.WaitGroup
	for token, nc := range said {
		saying.Go(func() {
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for {
				_ = nc.Publish(bus.RoomSubject(p.room, p.in.key, token), []byte("doctor"))
				_ = nc.Flush()
				select {
				case <-stop:
					return
				case <-tick.C:
				}
			}
		})
	}
	for name, s := range heard {
		work.Go(func() {
			missing := len(said)
			seen := map[string]bool{}
			for missing > 0 {
				m, err := s.NextMsgWithContext(ctx)
				if err != nil {
					v.add(severityCritical, name, "room.across", "unibusctl cluster status", "heard %d of %d nodes: a route is missing", len(said)-missing, len(said))
					return
				}
				token := m.Subject[strings.LastIndexByte(m.Subject, '.')+1:]
				if said[token] != nil && !seen[token] {
					seen[token] = true
					missing--
				}
			}
			v.add(severityOK, name, "room.across", "", "heard all %d nodes", len(said))
		})
	}
	work.Wait()
	close(stop)
	saying.Wait()
}
