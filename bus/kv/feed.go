package kv

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

const (
	heartbeat = 500 * time.Millisecond
	// silence is how long a feed may say nothing, not even a heartbeat, before
	// its consumer is given up. Detecting it and electing a leader must fit
	// into one lease.
	silence      = 3 * heartbeat
	rebuildPause = 200 * time.Millisecond
	// mostPause keeps many Views that all reload from keeping an overloaded
	// cluster overloaded; with detection and a reload it still fits into a lease.
	mostPause  = 2 * time.Second
	apiTimeout = 2 * time.Second
	// hurried is how long a request may go unanswered while a lease is running
	// out. Nobody answers one that was sent during an election, and an election
	// may take 9 of the lease's 10 s: what is left is not for waiting.
	hurried = 700 * time.Millisecond
)

// Run feeds the View and keeps its lease until ctx ends, then releases the
// lease. It never returns early.
func (v *View) Run(ctx context.Context) {
	done := make(chan struct{}, len(viewBuckets)+1)
	for i := range viewBuckets {
		go func() { v.follow(ctx, i); done <- struct{}{} }()
	}
	go func() { v.keepLease(ctx); done <- struct{}{} }()
	for range cap(done) {
		<-done
	}
}

// follow keeps one table fed. Each attempt loads the stream from nothing into a
// new table; the old one serves, unacknowledging, until its lease runs out.
func (v *View) follow(ctx context.Context, i int) {
	pause := rebuildPause
	var lost time.Time // when the feed that worked ended
	for next := hurried; ctx.Err() == nil; {
		hurry := v.cfg.Now().Sub(lost) < v.cfg.Lease
		patience := hurried
		if !hurry { // at a start there may be no leader yet, either: longer only where that was not enough
			patience, next = next, min(2*next, apiTimeout)
		}
		opened, err := v.feed(ctx, i, patience)
		if ctx.Err() != nil {
			return
		}
		v.mu.Lock()
		if v.live[i] { // it worked until now
			pause, lost, next = rebuildPause, v.cfg.Now(), hurried
		}
		v.live[i] = false
		if errors.Is(err, errUntrusted) {
			v.dropLocked(err.Error())
		}
		v.wake()
		v.mu.Unlock()
		v.log.Warn("feed lost; reloading", "stream", StreamName(viewBuckets[i]), "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(pause/2 + mrand.N(pause)): // not all at the same moment
		}
		if opened || !hurry { // to ask again costs the cluster little, to load again much
			pause = min(2*pause, mostPause)
		}
	}
}

// errUntrusted marks a feed whose past answers cannot be trusted either: the
// lease ends at once instead of running out. A lost message is no such thing:
// what came before it came without a gap, so that each barrier among it proved
// what it proved, and nothing behind it is taken.
var errUntrusted = errors.New("untrusted")

// feed follows one stream until anything at all is wrong with it. Opened says
// that it got as far as a consumer; a request for that may take patience.
func (v *View) feed(ctx context.Context, i int, patience time.Duration) (opened bool, err error) {
	stream := StreamName(viewBuckets[i])
	actx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s, err := v.js.Stream(actx, stream)
	if err != nil {
		return false, fmt.Errorf("stream %s: %w", stream, err)
	}
	info := s.CachedInfo()
	if err := Verify(info.Config, definition(stream)); err != nil {
		return false, fmt.Errorf("%w: %w", errUntrusted, err)
	}
	if err := v.checkIdentity(i, info.Created); err != nil {
		return false, err
	}
	tail, err := openTail(actx, v.cfg.Conn, viewBuckets[i])
	if err != nil {
		return false, fmt.Errorf("stream %s: %w", stream, err)
	}
	defer tail.close()
	return true, v.consume(ctx, i, tail.sub, info, tail.pending)
}

// tail is an ordered consumer. That of openTail delivers the newest record of
// every key of a bucket and then whatever follows.
type tail struct {
	sub     *nats.Subscription
	pending uint64 // records that were there when it was made
	node    string // whose replica it reads
	close   func()
}

func openTail(ctx context.Context, nc *nats.Conn, bucket string) (*tail, error) {
	return openConsumer(ctx, nc, StreamName(bucket), nats.ConsumerConfig{
		DeliverPolicy: nats.DeliverLastPerSubjectPolicy, FilterSubject: "$KV." + bucket + ".>",
	})
}

// openConsumer makes an ordered consumer; start says where it begins.
func openConsumer(ctx context.Context, nc *nats.Conn, stream string, start nats.ConsumerConfig) (*tail, error) {
	sub, err := nc.SubscribeSync(nc.NewInbox())
	if err != nil {
		return nil, err
	}
	if err := sub.SetPendingLimits(2_000_000, 512<<20); err != nil {
		return nil, errors.Join(err, sub.Unsubscribe())
	}
	js, err := nc.JetStream(nats.MaxWait(apiTimeout))
	if err != nil {
		return nil, errors.Join(err, sub.Unsubscribe())
	}
	start.DeliverSubject, start.AckPolicy, start.MaxDeliver, start.Replicas, start.MemoryStorage = sub.Subject, nats.AckNonePolicy, 1, 1, true
	start.Heartbeat, start.FlowControl, start.InactiveThreshold = heartbeat, true, 10*time.Second
	consumer, err := js.AddConsumer(stream, &start, nats.Context(ctx))
	if err != nil {
		return nil, errors.Join(err, sub.Unsubscribe())
	}
	node := ""
	if consumer.Cluster != nil {
		node = consumer.Cluster.Leader
	}
	return &tail{sub: sub, pending: consumer.NumPending, node: node, close: func() {
		_ = sub.Unsubscribe()
		_ = js.DeleteConsumer(stream, consumer.Name, nats.MaxWait(100*time.Millisecond))
	}}, nil
}

// checkIdentity drops everything when a stream is not the one the View knows:
// it was deleted and made again, so no earlier revision means anything.
func (v *View) checkIdentity(i int, created time.Time) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	known := v.tables[i].created
	if known.IsZero() || known.Equal(created) {
		return nil
	}
	v.tables[i] = newTable(time.Time{})
	clear(v.access)
	return fmt.Errorf("%w: stream %s was made again at %s", errUntrusted, StreamName(viewBuckets[i]), created.Format(time.RFC3339Nano))
}

func (v *View) consume(ctx context.Context, i int, sub *nats.Subscription, info *jetstream.StreamInfo, pending uint64) error {
	t := newTable(info.Created)
	t.withoutKeys = !v.cfg.EncryptionKeys
	if v.cfg.Raw {
		t.raw = map[string]StoredRecord{}
	}
	loading := pending > 0
	if !loading {
		v.install(i, t)
	}
	stop := context.AfterFunc(ctx, func() { _ = sub.Unsubscribe() }) // cheaper than a context for each message
	defer stop()
	var last uint64 // consumer sequence of the last message
	for {
		msg, err := sub.NextMsg(silence)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, nats.ErrSlowConsumer):
			return fmt.Errorf("stream %s: the feed overflowed", info.Config.Name)
		case err != nil:
			return fmt.Errorf("stream %s: silent for %s: %w", info.Config.Name, silence, err)
		}
		if status := msg.Header.Get("Status"); status != "" {
			if err := control(v.cfg.Conn, msg, status, last); err != nil {
				return fmt.Errorf("stream %s: %w", info.Config.Name, err)
			}
			continue
		}
		md, err := msg.Metadata()
		if err != nil {
			return fmt.Errorf("%w: stream %s: %w", errUntrusted, info.Config.Name, err)
		}
		if md.Sequence.Consumer != last+1 {
			return fmt.Errorf("stream %s: gap after consumer sequence %d", info.Config.Name, last)
		}
		last = md.Sequence.Consumer
		rec := record{key: strings.TrimPrefix(msg.Subject, "$KV."+viewBuckets[i]+"."), rev: md.Sequence.Stream, at: md.Timestamp, value: msg.Data}
		if op := msg.Header.Get("KV-Operation"); op != "" || msg.Header.Get("Nats-Marker-Reason") != "" {
			rec.value = nil
		}
		if loading {
			v.load(i, t, rec)
			if md.NumPending == 0 {
				loading = false
				v.install(i, t)
			}
			continue
		}
		if err := v.apply(i, t, rec); err != nil {
			return err
		}
	}
}

// control handles a message without payload: heartbeat or flow control. A
// heartbeat names the last message sent; not having it means one was lost.
func control(nc *nats.Conn, msg *nats.Msg, status string, last uint64) error {
	if status != "100" {
		return fmt.Errorf("consumer ended with status %s %s", status, msg.Header.Get("Description"))
	}
	if msg.Reply != "" {
		return msg.Respond(nil)
	}
	if stalled := msg.Header.Get("Nats-Consumer-Stalled"); stalled != "" {
		return nc.Publish(stalled, nil)
	}
	if sent := msg.Header.Get("Nats-Last-Consumer"); sent != "" && sent != fmt.Sprint(last) {
		return fmt.Errorf("gap: last consumer sequence is %s, have %d", sent, last)
	}
	return nil
}

// record is one message of a stream; a nil value is a deletion.
type record struct {
	key   string
	rev   uint64
	at    time.Time
	value []byte
}

const barrierKeys = "_barrier."

func (v *View) load(i int, t *table, r record) {
	t.note(r)
	if strings.HasPrefix(r.key, barrierKeys) {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.sawHolder(i, r)
		return
	}
	t.put(i, r)
}

// install makes a freshly loaded table the one that answers, and acknowledges
// whatever it holds newer than the one before: those changes were applied in
// bulk, and somebody may be waiting for them.
func (v *View) install(i int, t *table) {
	v.mu.Lock()
	old := v.tables[i]
	v.tables[i] = t
	v.live[i] = true
	clear(v.access)
	if v.allLive() && v.fault == faultLoading {
		v.fault = "no barrier yet"
	}
	acks := v.holds.pendingFor(t.newerThan(i, old), t.created)
	v.wake()
	v.mu.Unlock()
	for _, b := range t.broken {
		v.alert(b)
	}
	v.changed(acks)
}

// apply takes one live record into the table that answers.
func (v *View) apply(i int, t *table, r record) error {
	barrier := strings.HasPrefix(r.key, barrierKeys)
	if !barrier { // a barrier is as late as the change before it; were each one paused, the feed would never catch up
		guard.Pause("apply")
	}
	v.mu.Lock()
	t.note(r)
	if barrier {
		moved, err := v.sawBarrier(i, r)
		if moved {
			v.wake()
		}
		v.mu.Unlock()
		return err
	}
	t.put(i, r)
	c := changeOf(i, r.key, r.rev)
	v.invalidate(c)
	acks := v.holds.pendingFor([]Change{c}, t.created)
	broken, isBroken := t.broken[r.key]
	v.wake()
	v.mu.Unlock()
	if isBroken {
		v.alert(broken)
	}
	v.changed(acks)
	return nil
}

// alert says that somebody should look: a record that nobody can read.
func (v *View) alert(b Broken) {
	v.log.Error("record cannot be decoded; its key is denied", "bucket", b.Bucket, "key", b.Key, "revision", b.Revision, "err", b.Err)
}

// invalidate needs mu. A room touches everyone who was ever its member.
func (v *View) invalidate(c Change) {
	if c.Room == "" || c.User != (bus.UserKey{}) {
		delete(v.access, c.User)
		return
	}
	for u := range v.tables[membersIdx].byRoom[c.Room] {
		delete(v.access, u)
	}
}

func changeOf(i int, key string, rev uint64) Change {
	c := Change{Bucket: viewBuckets[i], Key: key, Revision: rev}
	switch i {
	case usersIdx:
		c.User, _ = bus.ParseUserKey(key)
	case roomsIdx:
		c.Room = bus.RoomID(key)
	case membersIdx:
		room, user, _ := strings.Cut(key, ".")
		c.Room = bus.RoomID(room)
		c.User, _ = bus.ParseUserKey(user)
	}
	return c
}

func (t *table) note(r record) {
	t.lastSeq, t.lastTime = r.rev, r.at
}

// put decodes a record into the table. A record that cannot be decoded, or
// that sits under a key other than the one it speaks of, removes what was
// there and is kept as broken: it denies that key only.
func (t *table) put(i int, r record) {
	if !strings.Contains(r.key, ".") {
		t.lastKey = r.rev // what the filter anyUser matches
	}
	t.newest = r.rev
	if t.raw != nil {
		t.raw[r.key] = StoredRecord{Key: r.key, Revision: r.rev, At: r.at, Value: r.value}
	}
	delete(t.broken, r.key)
	var err error
	switch i {
	case usersIdx:
		err = t.putUser(r)
	case roomsIdx:
		err = t.putRoom(r)
	case membersIdx:
		_, user, _ := strings.Cut(r.key, ".")
		t.newestOf[user] = r.rev
		err = t.putMember(r)
	}
	if err != nil {
		t.broken[r.key] = Broken{Bucket: viewBuckets[i], Key: r.key, Revision: r.rev, Err: err}
	}
}

var errMisfiled = errors.New("the record names another key than the one it is stored under")

// errForgotten marks a user record that was deleted by hand. A key that was ever
// registered is never free again, so this is not the same as no record.
var errForgotten = errors.New("the record was deleted; write it again as it was")

func (t *table) putUser(r record) error {
	k, err := bus.ParseUserKey(r.key)
	if err != nil || k.Hex() != r.key {
		return errMisfiled
	}
	delete(t.users, k)
	if r.value == nil {
		return errForgotten
	}
	var stored struct {
		bus.User
		Key string `json:"sign_pub"` // of which r.key has been checked
	}
	if err := json.Unmarshal(r.value, &stored); err != nil {
		return err
	}
	if stored.Key != r.key {
		return errMisfiled
	}
	u := stored.User
	u.Key = k
	if t.withoutKeys {
		u.EncryptionKey = nil
	}
	if err := u.Validate(); err != nil {
		return err
	}
	t.users[k] = userEntry{u, r.rev}
	return nil
}

func (t *table) putRoom(r record) error {
	id, err := bus.ParseRoomID(r.key)
	if err != nil {
		return errMisfiled
	}
	delete(t.rooms, id)
	if r.value == nil {
		return nil
	}
	var room bus.Room
	if err := json.Unmarshal(r.value, &room); err != nil {
		return err
	}
	if room.ID != id {
		return errMisfiled
	}
	if err := room.Validate(); err != nil {
		return err
	}
	t.rooms[id] = roomEntry{room, r.rev, r.at.UnixMilli()}
	return nil
}

// memberOf reads the user of a membership. A key that is there already has been
// checked: each check costs as much as the rest of the record, and a View that
// loads would make it once for every room of a user.
func (t *table) memberOf(user string) (k bus.UserKey, err error) {
	if len(user) == hex.EncodedLen(len(k)) {
		if _, err := hex.Decode(k[:], []byte(user)); err == nil && t.members[k] != nil && k.Hex() == user {
			return k, nil
		}
	}
	k, err = bus.ParseUserKey(user)
	if err == nil && k.Hex() != user {
		err = errMisfiled
	}
	return k, err
}

func (t *table) putMember(r record) error {
	room, user, ok := strings.Cut(r.key, ".")
	id, err1 := bus.ParseRoomID(room)
	k, err2 := t.memberOf(user)
	if !ok || err1 != nil || err2 != nil {
		return errMisfiled
	}
	delete(t.members[k], id)
	delete(t.byRoom[id], k)
	if r.value == nil {
		return nil
	}
	var stored struct {
		bus.Membership
		User string `json:"user"` // of which r.key has been checked
	}
	if err := json.Unmarshal(r.value, &stored); err != nil {
		return err
	}
	if stored.Room != id || stored.User != user {
		return errMisfiled
	}
	m := stored.Membership
	m.User = k
	if err := m.Validate(); err != nil {
		return err
	}
	if t.members[k] == nil {
		t.members[k] = map[bus.RoomID]memberEntry{}
	}
	t.members[k][id] = memberEntry{m, r.rev, r.at.UnixMilli()}
	if t.byRoom[id] == nil {
		t.byRoom[id] = map[bus.UserKey]struct{}{}
	}
	t.byRoom[id][k] = struct{}{}
	return nil
}

// newerThan lists what t holds at a newer revision than old did, and what it
// holds no more: nothing on the first load, since nobody waits for a boot that
// had no barrier yet.
func (t *table) newerThan(i int, old *table) []Change {
	if old.created.IsZero() {
		return nil
	}
	var changes []Change
	for k, e := range t.users {
		if old.users[k].rev < e.rev {
			changes = append(changes, changeOf(i, k.Hex(), e.rev))
		}
	}
	for id, e := range t.rooms {
		if old.rooms[id].rev < e.rev {
			changes = append(changes, changeOf(i, string(id), e.rev))
		}
	}
	for k, rooms := range t.members {
		for id, e := range rooms {
			if old.members[k][id].rev < e.rev {
				changes = append(changes, changeOf(i, memberKey(id, k), e.rev))
			}
		}
	}
	for key, b := range t.broken {
		changes = append(changes, changeOf(i, key, b.Revision))
	}
	return append(changes, t.missing(i, old)...)
}

// missing lists what old held and t does not, at revision 0: nobody waits for
// its acknowledgement, but access has gone with it.
func (t *table) missing(i int, old *table) (changes []Change) {
	gone := func(key string) {
		if _, ok := t.broken[key]; !ok {
			changes = append(changes, changeOf(i, key, 0))
		}
	}
	for k := range old.users {
		if _, ok := t.users[k]; !ok {
			gone(k.Hex())
		}
	}
	for id := range old.rooms {
		if _, ok := t.rooms[id]; !ok {
			gone(string(id))
		}
	}
	for k, rooms := range old.members {
		for id := range rooms {
			if _, ok := t.members[k][id]; !ok {
				gone(memberKey(id, k))
			}
		}
	}
	return changes
}

func memberKey(id bus.RoomID, k bus.UserKey) string { return string(id) + "." + k.Hex() }

// allLive needs mu.
func (v *View) allLive() bool {
	return v.live == [3]bool{true, true, true}
}
