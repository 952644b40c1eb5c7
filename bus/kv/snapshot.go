package kv

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
)

// The parts of a snapshot, in the order in which they are kept. Invites and
// nonces are in none: what was used or withdrawn since must not come back open.
const (
	PartUsers    = "users"
	PartRooms    = "rooms"
	PartMembers  = "members"
	PartHandles  = "handles"
	PartRoomKeys = "room_keys" // sealed to their members; nobody here can open one
	PartAudit    = "audit"     // the newest block of every chain: evidence, restored nowhere
)

// bucketOf is where the records of a part are stored. The index is in no part:
// Reconcile makes it from the members.
var bucketOf = map[string]string{
	PartUsers: Users, PartRooms: Rooms, PartMembers: Members, PartHandles: Handles, PartRoomKeys: RoomKeys,
}

// StoredRecord is a record with the bytes that its bucket holds, which need not
// be readable: a record that denies its key here shall deny it after a restore.
type StoredRecord struct {
	Key      string
	Revision uint64
	At       time.Time   // when it was stored, by the stream's leader
	Value    []byte      // nil: deleted by hand
	Header   nats.Header // of a message of a room; nil for a record
}

// Part is one part of a Snapshot, its records sorted by key.
type Part struct {
	Name    string
	Stream  string
	Created time.Time // of the stream
	Records []StoredRecord
}

// Snapshot is what account CTRL said at one moment.
type Snapshot struct {
	At    time.Time // the cut, by the clock of who took it
	Parts []Part
}

// Part returns one part, or nil.
func (s *Snapshot) Part(name string) *Part {
	i := slices.IndexFunc(s.Parts, func(p Part) bool { return p.Name == name })
	if i < 0 {
		return nil
	}
	return &s.Parts[i]
}

// cutPatience is how often a cut is tried. Between its two barriers lie some
// milliseconds, so that only a flood of changes spoils many of them.
const cutPatience = 50

// TakeSnapshot returns a consistent snapshot. v must keep Raw records.
//
// Consistent means: users, rooms and members are what all three streams held at
// one and the same moment, no earlier than the call. One barrier proves that the
// View holds all that was committed before it; the tables are copied together;
// a second barrier proves that nothing was committed until then, or the cut is
// made again. Handles and room keys are read after that moment, each behind a
// record of our own, so that they hold at least what the cut rests on: they
// grant nothing by themselves.
//
// Unavailable: no quorum, or the records changed all the time. It needs the
// rights to write into the buckets.
func (v *View) TakeSnapshot(ctx context.Context) (*Snapshot, error) {
	parts, at, err := v.cut(ctx)
	if err != nil {
		return nil, err
	}
	out := &Snapshot{At: at, Parts: parts}
	for _, name := range []string{PartHandles, PartRoomKeys} {
		p, err := v.readBehind(ctx, name)
		if err != nil {
			return nil, err
		}
		out.Parts = append(out.Parts, p)
	}
	heads, err := auditHeads(ctx, v.cfg.Conn)
	if err != nil {
		return nil, err
	}
	out.Parts = append(out.Parts, heads)
	return out, nil
}

// viewParts are the parts that a View holds, by streamIndex.
var viewParts = [3]string{PartUsers, PartRooms, PartMembers}

func (v *View) cut(ctx context.Context) ([]Part, time.Time, error) {
	if !v.cfg.Raw {
		return nil, time.Time{}, bus.E(bus.Internal, "a snapshot of a View that keeps no raw records")
	}
	type mark struct {
		created time.Time
		newest  uint64
	}
	marks := func() (m [3]mark) {
		for i, t := range v.tables {
			m[i] = mark{t.created, t.newest}
		}
		return m
	}
	for range cutPatience {
		if err := v.Barrier(ctx); err != nil {
			return nil, time.Time{}, err
		}
		v.mu.RLock()
		at, before := v.cfg.Now(), marks()
		parts := make([]Part, len(viewParts))
		for i, t := range v.tables {
			parts[i] = Part{Name: viewParts[i], Stream: StreamName(viewBuckets[i]), Created: t.created, Records: slices.Collect(maps.Values(t.raw))}
		}
		v.mu.RUnlock()
		if err := v.Barrier(ctx); err != nil {
			return nil, time.Time{}, err
		}
		v.mu.RLock()
		unmoved := before == marks()
		v.mu.RUnlock()
		if unmoved {
			for i := range parts {
				sortRecords(parts[i].Records)
			}
			return parts, at, nil
		}
	}
	return nil, time.Time{}, bus.E(bus.Unavailable, "the records change faster than they can be looked at together: %d tries", cutPatience).
		WithHint("repeat the command when fewer changes are made")
}

func sortRecords(rs []StoredRecord) {
	slices.SortFunc(rs, func(a, b StoredRecord) int { return cmp.Compare(a.Key, b.Key) })
}

// behindKeys is what readBehind writes: shaped like a barrier, so that it is a
// record in no bucket.
const behindKeys = barrierKeys + "backup."

// readBehind reads a bucket that no View follows, up to a record of our own: a
// replica that lags would else show it as it was.
func (v *View) readBehind(ctx context.Context, part string) (Part, error) {
	bucket := bucketOf[part]
	fail := func(err error) (Part, error) {
		return Part{}, bus.E(bus.Unavailable, "read %s: %w", bucket, err).WithHint("unibusctl cluster status")
	}
	st, err := v.js.Stream(ctx, StreamName(bucket))
	if err != nil {
		return fail(err)
	}
	if err := Verify(st.CachedInfo().Config, definition(StreamName(bucket))); err != nil {
		return Part{}, err
	}
	id := make([]byte, 8)
	if _, err := rand.Read(id); err != nil {
		return Part{}, bus.E(bus.Internal, "randomness: %w", err)
	}
	m := nats.NewMsg(subjectOf(bucket, behindKeys+hex.EncodeToString(id)))
	m.Header.Set("Nats-TTL", time.Minute.String())
	pctx, cancel := context.WithTimeout(ctx, writeTimeout)
	ack, err := v.js.PublishMsg(pctx, m, jetstream.WithExpectStream(StreamName(bucket)), jetstream.WithRetryAttempts(0))
	cancel()
	if err != nil {
		return fail(err)
	}
	t, err := openTail(ctx, v.cfg.Conn, bucket)
	if err != nil {
		return fail(err)
	}
	defer t.close()
	records, prefix := map[string]StoredRecord{}, subjectOf(bucket, "")
	for last, at := uint64(0), uint64(0); at < ack.Sequence; {
		m, err := t.sub.NextMsg(silence)
		switch {
		case ctx.Err() != nil:
			return fail(ctx.Err())
		case err != nil:
			return fail(err)
		}
		if status := m.Header.Get("Status"); status != "" {
			if err := control(v.cfg.Conn, m, status, last); err != nil {
				return fail(err)
			}
			continue
		}
		md, err := m.Metadata()
		if err != nil {
			return fail(err)
		}
		if last++; md.Sequence.Consumer != last {
			return fail(errors.New("a record was lost on the way"))
		}
		at = md.Sequence.Stream
		key := strings.TrimPrefix(m.Subject, prefix)
		if strings.HasPrefix(key, barrierKeys) {
			continue
		}
		r := StoredRecord{Key: key, Revision: at, At: md.Timestamp, Value: m.Data}
		if m.Header.Get("KV-Operation") != "" || m.Header.Get("Nats-Marker-Reason") != "" {
			r.Value = nil
		}
		records[key] = r
	}
	p := Part{Name: part, Stream: StreamName(bucket), Created: st.CachedInfo().Created, Records: slices.Collect(maps.Values(records))}
	sortRecords(p.Records)
	return p, nil
}

// auditHeads is the newest block of every chain that has one: who has the
// snapshot can later show that the audit once went that far.
func auditHeads(ctx context.Context, nc *nats.Conn) (Part, error) {
	info, err := auditInfo(ctx, nc)
	if err != nil {
		return Part{}, err
	}
	p := Part{Name: PartAudit, Stream: AuditStream, Created: info.Created}
	start := nats.ConsumerConfig{DeliverPolicy: nats.DeliverLastPerSubjectPolicy, FilterSubject: auditBlocks}
	heads := map[string]StoredRecord{}
	err = scanAudit(ctx, nc, start, func(m storedMessage) bool {
		name := strings.TrimPrefix(m.subject, auditPrefix)
		if b, _, err := decodeBlock(m.data); err == nil && b.Instance == name {
			if head, err := json.Marshal(auditHead{b.N, m.seq, hashOf(m.data)}); err == nil {
				heads[name] = StoredRecord{Key: name, Revision: m.seq, At: b.At, Value: head}
			}
		}
		return m.pending > 0
	})
	p.Records = slices.Collect(maps.Values(heads))
	sortRecords(p.Records)
	return p, err
}

// Check reads every record as a View would, and returns those that it could not
// read: they deny their keys, before a restore and after it. The error says that
// the snapshot itself is none.
func (s *Snapshot) Check() ([]Broken, error) {
	var out []Broken
	seen := map[string]bool{}
	for _, p := range s.Parts {
		if seen[p.Name] {
			return nil, bus.E(bus.Invalid, "the snapshot has the part %s twice", p.Name)
		}
		seen[p.Name] = true
		bucket, known := bucketOf[p.Name]
		for i, r := range p.Records {
			if i > 0 && p.Records[i-1].Key >= r.Key {
				return nil, bus.E(bus.Invalid, "the snapshot's part %s is not in order at %.80q", p.Name, r.Key)
			}
			if !known {
				continue
			}
			if !recordKey(r.Key) {
				return nil, bus.E(bus.Invalid, "the snapshot's part %s has a record under the impossible key %.80q", p.Name, r.Key)
			}
			if err := readable(p.Name, r); err != nil {
				out = append(out, Broken{Bucket: bucket, Key: r.Key, Revision: r.Revision, Err: err})
			}
		}
	}
	for _, name := range []string{PartUsers, PartRooms, PartMembers, PartHandles, PartRoomKeys} {
		if !seen[name] {
			return nil, bus.E(bus.Invalid, "the snapshot has no part %s", name)
		}
	}
	return out, nil
}

// recordKey reports whether a key can be the subject of one record: not a
// pattern, and nothing that a View takes for a barrier, which would be believed.
func recordKey(key string) bool {
	if key == "" || len(key) > 200 || strings.HasPrefix(key, "_") {
		return false
	}
	for token := range strings.SplitSeq(key, ".") {
		if token == "" || strings.ContainsFunc(token, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_' && r != '='
		}) {
			return false
		}
	}
	return true
}

// readable is what a View says of one record.
func readable(part string, r StoredRecord) error {
	t := newTable(time.Time{})
	rec := record{key: r.Key, rev: r.Revision, at: r.At, value: r.Value}
	switch part {
	case PartUsers:
		return t.putUser(rec)
	case PartRooms:
		return t.putRoom(rec)
	case PartMembers:
		return t.putMember(rec)
	case PartHandles:
		if r.Value == nil {
			return nil
		}
		_, err := handleOf(r)
		return err
	}
	return nil
}

func handleOf(r StoredRecord) (reservation, error) {
	var h reservation
	if err := json.Unmarshal(r.Value, &h); err != nil {
		return h, err
	}
	if h.V != 1 || string(h.Handle) != r.Key {
		return h, errMisfiled
	}
	return h, nil
}

// userOf decodes a user's record that readable has passed.
func userOf(r StoredRecord) (u bus.User, err error) {
	t := newTable(time.Time{})
	if err := t.putUser(record{key: r.Key, rev: r.Revision, at: r.At, value: r.Value}); err != nil {
		return u, err
	}
	for _, e := range t.users {
		u = e.user
	}
	return u, nil
}

func roomOf(r StoredRecord) (room bus.Room, err error) {
	t := newTable(time.Time{})
	if err := t.putRoom(record{key: r.Key, rev: r.Revision, at: r.At, value: r.Value}); err != nil {
		return room, err
	}
	e, ok := t.rooms[bus.RoomID(r.Key)]
	if !ok {
		return room, errForgotten
	}
	return e.room, nil
}

func memberOf(r StoredRecord) (m bus.Membership, err error) {
	t := newTable(time.Time{})
	if err := t.putMember(record{key: r.Key, rev: r.Revision, at: r.At, value: r.Value}); err != nil {
		return m, err
	}
	for _, rooms := range t.members {
		for _, e := range rooms {
			return e.m, nil
		}
	}
	return m, errForgotten
}

// same reports whether two records say the same.
func same(a, b StoredRecord) bool {
	return (a.Value == nil) == (b.Value == nil) && bytes.Equal(a.Value, b.Value)
}

// FindUser resolves a handle, hex or nkey to a user of the snapshot.
func (s *Snapshot) FindUser(name string) (bus.UserKey, error) {
	key, keyErr := bus.ParseUserKey(name)
	var found *bus.User
	for _, r := range s.Part(PartUsers).Records {
		u, err := userOf(r)
		if err != nil {
			continue
		}
		if keyErr == nil && u.Key == key || keyErr != nil && string(u.Handle) == name && (found == nil || standing(u) > standing(*found)) {
			found = &u
		}
	}
	if found == nil {
		return key, bus.E(bus.NotFound, "the backup has no user %.70q", name)
	}
	return found.Key, nil
}
