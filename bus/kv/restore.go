package kv

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// RestoreOptions say how a snapshot is restored.
type RestoreOptions struct {
	// Merge allows records that are not in the snapshot. What is there stays as
	// it is; only what is missing is written, and tombstones of both sides win.
	Merge bool
	// Revoked are users who were revoked after the snapshot was taken: they come
	// back revoked.
	Revoked []bus.UserKey
	// DryRun plans and writes nothing.
	DryRun bool
}

// RestoreReport says what a restore did, or would do.
type RestoreReport struct {
	Parts    []PartReport    `json:"parts"`
	Revoked  []bus.UserKey   `json:"revoked"`  // active here, revoked in the snapshot or by RestoreOptions.Revoked: revoked now
	Archived []bus.RoomID    `json:"archived"` // the same for rooms
	Skipped  []SkippedRecord `json:"skipped"`
	Verified int             `json:"verified"` // records found as they must be, after the last write; 0 in a dry run
}

// PartReport counts the records of one part.
type PartReport struct {
	Part       string `json:"part"`
	Snapshot   int    `json:"snapshot"`
	Same       int    `json:"same"` // there already, to the byte
	Written    int    `json:"written"`
	Skipped    int    `json:"skipped"`
	Unreadable int    `json:"unreadable"` // denied their key before, and do so again
}

// SkippedRecord is a record of the snapshot that was not restored.
type SkippedRecord struct {
	Part string `json:"part"`
	Key  string `json:"key"`
	Why  string `json:"why"`
}

// writeOrder is the order in which a restore writes. A user's own record is what
// grants, so it is the last: interrupted, a restore has granted nobody more than
// the records say that are there.
var writeOrder = []string{PartHandles, PartRoomKeys, PartRooms, PartMembers, PartUsers}

// restoreWriters bounds the writes under way at once.
const restoreWriters = 32

// Restore brings a snapshot's records back, each only where no record ever was:
// nothing is overwritten. The Store's View must keep Raw records, and the
// streams must have three replicas.
//
// Without Merge it is refused (bus.Conflict) where anything is that the snapshot
// does not have; the same snapshot may be restored again, which finishes what
// was interrupted. A user who is revoked here, in the snapshot or by the options
// is revoked afterwards; a handle stays with the key that has it here. After the
// last write every record is read back behind a barrier and compared.
//
// The snapshot must come from somebody who is trusted to say who may do what.
func (s *Store) Restore(ctx context.Context, snap *Snapshot, o RestoreOptions) (RestoreReport, error) {
	if _, err := snap.Check(); err != nil {
		return RestoreReport{}, err
	}
	here, err := s.stored(ctx)
	if err != nil {
		return RestoreReport{}, err
	}
	plan, err := planRestore(snap, here, o, s.stamp())
	if err != nil || o.DryRun {
		return plan.report(), err
	}
	for _, part := range writeOrder {
		if err := s.writePart(ctx, part, plan); err != nil {
			return plan.report(), err
		}
	}
	if err := s.view.Barrier(ctx); err != nil {
		return plan.report(), err
	}
	for _, u := range plan.revoke {
		if _, err := s.RevokeUser(ctx, u); err != nil {
			return plan.report(), fmt.Errorf("revoke %s, who is revoked in the snapshot: %w", u, err)
		}
	}
	for _, id := range plan.archive {
		if _, err := s.ArchiveRoom(ctx, id, false); err != nil {
			return plan.report(), fmt.Errorf("archive room %s, which is archived in the snapshot: %w", id, err)
		}
	}
	// Before Reconcile, which finishes rotations that the snapshot caught half-way.
	if err := s.verifyRestore(ctx, plan); err != nil {
		return plan.report(), err
	}
	_, err = s.Reconcile(ctx)
	return plan.report(), err
}

// records are the records of one cluster by part and key.
type records map[string]map[string]StoredRecord

// stored reads everything that a restore could meet.
func (s *Store) stored(ctx context.Context) (records, error) {
	parts, _, err := s.view.cut(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{PartHandles, PartRoomKeys} {
		p, err := s.view.readBehind(ctx, name)
		if err != nil {
			return nil, err
		}
		parts = append(parts, p)
	}
	out := records{}
	for _, p := range parts {
		out[p.Name] = map[string]StoredRecord{}
		for _, r := range p.Records {
			out[p.Name][r.Key] = r
		}
	}
	return out, nil
}

// restorePlan is what a restore will do, decided before the first write.
type restorePlan struct {
	parts   map[string]*PartReport
	writes  records // what is to be written
	same    records // what is there already
	revoke  []bus.UserKey
	archive []bus.RoomID
	skipped []SkippedRecord
	leftOut map[string]bool // users who are not here and will not be, by hex key

	mu       sync.Mutex // guards skipped and parts while parts are written
	verified int
}

func (p *restorePlan) report() RestoreReport {
	r := RestoreReport{Parts: []PartReport{}, Revoked: p.revoke, Archived: p.archive, Skipped: p.skipped, Verified: p.verified}
	for _, name := range []string{PartUsers, PartRooms, PartMembers, PartHandles, PartRoomKeys} {
		if c := p.parts[name]; c != nil {
			r.Parts = append(r.Parts, *c)
		}
	}
	if r.Revoked == nil {
		r.Revoked = []bus.UserKey{}
	}
	if r.Archived == nil {
		r.Archived = []bus.RoomID{}
	}
	if r.Skipped == nil {
		r.Skipped = []SkippedRecord{}
	}
	slices.SortFunc(r.Skipped, func(a, b SkippedRecord) int { return cmp.Or(cmp.Compare(a.Part, b.Part), cmp.Compare(a.Key, b.Key)) })
	return r
}

func (p *restorePlan) skip(part, key, why string) {
	p.skipped = append(p.skipped, SkippedRecord{part, key, why})
	p.parts[part].Skipped++
}

// planRestore is pure. now is when users of RestoreOptions.Revoked are revoked.
func planRestore(snap *Snapshot, here records, o RestoreOptions, now time.Time) (*restorePlan, error) {
	p := &restorePlan{parts: map[string]*PartReport{}, writes: records{}, same: records{}, leftOut: map[string]bool{}}
	for _, name := range writeOrder {
		p.parts[name] = &PartReport{Part: name, Snapshot: len(snap.Part(name).Records)}
		p.writes[name], p.same[name] = map[string]StoredRecord{}, map[string]StoredRecord{}
		for _, r := range snap.Part(name).Records {
			if readable(name, r) != nil {
				p.parts[name].Unreadable++
			}
		}
	}
	ended := map[string]bool{}
	for _, k := range o.Revoked {
		ended[k.Hex()] = true
	}
	if !o.Merge {
		if err := onlyThis(snap, here, ended); err != nil {
			return p, err
		}
	}
	p.planUsers(snap, here, ended, now)
	foreign := p.planRooms(snap, here)
	p.planMembers(snap, here, foreign)
	p.planHandles(snap, here)
	p.planRoomKeys(snap, here, foreign)
	return p, nil
}

// onlyThis refuses a cluster that has anything which the snapshot does not have.
func onlyThis(snap *Snapshot, here records, ended map[string]bool) error {
	for _, part := range []string{PartUsers, PartRooms, PartMembers, PartRoomKeys, PartHandles} {
		was := map[string]StoredRecord{}
		for _, r := range snap.Part(part).Records {
			was[r.Key] = r
		}
		others, first := 0, ""
		for key, r := range here[part] {
			old, ok := was[key]
			if ok && (same(old, r) || part == PartUsers && ended[key]) {
				continue
			}
			if h, err := handleOf(r); part == PartHandles && err == nil && h.User == "" {
				continue // a handle that is nobody's
			}
			if others++; first == "" || key < first {
				first = key
			}
		}
		if others > 0 {
			return bus.E(bus.Conflict, "the cluster is not empty: %s has %d records that the backup does not have, %s the first", part, others, first).
				WithHint("the same command with --merge writes only what is missing, and lists the rest with --dry-run")
		}
	}
	return nil
}

// planUsers keeps the two rules that a restore must never break: who is revoked,
// here or there, is revoked afterwards, and a handle does not change hands.
func (p *restorePlan) planUsers(snap *Snapshot, here records, ended map[string]bool, now time.Time) {
	handles := map[bus.Handle]string{}
	for key, r := range here[PartUsers] {
		if u, err := userOf(r); err == nil && u.RotatedTo == nil {
			handles[u.Handle] = key
		}
	}
	users := slices.Clone(snap.Part(PartUsers).Records)
	for i, r := range users {
		if u, err := userOf(r); err == nil && ended[r.Key] && u.Status != bus.Revoked {
			users[i] = revokedRecord(r, &u, now)
		}
	}
	p.compare(PartUsers, users, here, func(r StoredRecord) {
		old, unreadable := userOf(r)
		if holder, taken := handles[old.Handle]; taken && unreadable == nil && old.RotatedTo == nil {
			p.leftOut[r.Key] = true
			p.skip(PartUsers, r.Key, fmt.Sprintf("the handle %s is that of %s here; this key stays unknown, which is denied", old.Handle, holder))
			return
		}
		p.writes[PartUsers][r.Key] = r
	}, func(r, there StoredRecord) {
		old, unreadable := userOf(r)
		cur, err := userOf(there)
		switch {
		case ended[r.Key] && err == nil && cur.Status == bus.Revoked:
			p.parts[PartUsers].Same++ // an earlier run of the same restore has revoked them
		case guard.Off(guard.Tombstones):
			p.writes[PartUsers][r.Key] = r
		case err != nil:
			p.skip(PartUsers, r.Key, "the record here cannot be read, and denies its key")
		case cur.Status == bus.Revoked:
			p.skip(PartUsers, r.Key, fmt.Sprintf("%s is revoked here, which is final", cur.Handle))
		case unreadable == nil && old.Status == bus.Revoked:
			p.revoke = append(p.revoke, cur.Key)
		default:
			p.skip(PartUsers, r.Key, fmt.Sprintf("%s is here, and stays as it is", cur.Handle))
		}
	})
}

// compare goes through a part's records: missing decides about what is not here,
// differs about what is here and not the same.
func (p *restorePlan) compare(part string, rs []StoredRecord, here records, missing func(r StoredRecord), differs func(r, there StoredRecord)) {
	for _, r := range rs {
		switch there, exists := here[part][r.Key]; {
		case !exists:
			missing(r)
		case same(there, r):
			p.same[part][r.Key] = r
			p.parts[part].Same++
		default:
			differs(r, there)
		}
	}
}

// stays is the differs of what is never touched where there is another.
func (p *restorePlan) stays(part, why string) func(r, there StoredRecord) {
	return func(r, _ StoredRecord) { p.skip(part, r.Key, why) }
}

// revokedRecord is a user's record as a revoke would have left it.
func revokedRecord(r StoredRecord, u *bus.User, now time.Time) StoredRecord {
	u.Status, u.RevokedAt, u.Becomes = bus.Revoked, &now, ""
	if value, err := json.Marshal(u); err == nil {
		r.Value = value
	}
	return r
}

// planRooms returns the rooms whose id belongs to another room here: what the
// snapshot says of their members and keys must not reach it.
func (p *restorePlan) planRooms(snap *Snapshot, here records) (foreign map[string]string) {
	foreign = map[string]string{}
	p.compare(PartRooms, snap.Part(PartRooms).Records, here, func(r StoredRecord) {
		if r.Value != nil {
			p.writes[PartRooms][r.Key] = r
		}
	}, func(r, there StoredRecord) {
		old, unreadable := roomOf(r)
		cur, err := roomOf(there)
		switch {
		case err != nil || unreadable != nil:
			foreign[r.Key] = "the record of this room here, or in the backup, cannot be read"
			p.skip(PartRooms, r.Key, foreign[r.Key])
		case anotherRoom(cur, old):
			foreign[r.Key] = "this room is another one here, made at " + cur.CreatedAt.UTC().Format(time.RFC3339)
			p.skip(PartRooms, r.Key, foreign[r.Key])
		case cur.Status == bus.RoomActive && old.Status == bus.RoomArchived:
			p.archive = append(p.archive, cur.ID)
		default:
			p.skip(PartRooms, r.Key, "the room is here, and stays as it is")
		}
	})
	return foreign
}

// Restorable says whether what a room of a snapshot held may be brought back, and
// with which record: why not, if not. known: the room is here already.
func (s *Store) Restorable(snap *Snapshot, id bus.RoomID) (room bus.Room, known bool, why string) {
	p := snap.Part(PartRooms)
	i := slices.IndexFunc(p.Records, func(r StoredRecord) bool { return r.Key == string(id) })
	if i < 0 {
		return room, false, "the backup has no such room"
	}
	room, err := roomOf(p.Records[i])
	if err != nil {
		return room, false, "the record of this room in the backup cannot be read"
	}
	here, _, known := s.view.Room(id)
	switch {
	case !known:
		return room, false, ""
	case anotherRoom(here, room):
		return room, true, "this room is another one here, made at " + here.CreatedAt.UTC().Format(time.RFC3339)
	case here.Purged:
		return room, true, "what this room held was taken away here"
	}
	return here, true, ""
}

// Kept are the rooms of a snapshot that have not been purged, sorted by id. One
// whose record cannot be read is left out.
func (s *Snapshot) Kept() []bus.Room {
	var out []bus.Room
	for _, r := range s.Part(PartRooms).Records {
		if room, err := roomOf(r); err == nil && !room.Purged {
			out = append(out, room)
		}
	}
	return out
}

func anotherRoom(a, b bus.Room) bool {
	return a.Creator != b.Creator || !a.CreatedAt.Equal(b.CreatedAt) || a.Durable != b.Durable || a.Encrypted != b.Encrypted
}

func (p *restorePlan) planMembers(snap *Snapshot, here records, foreign map[string]string) {
	present := map[string]int{}
	for _, r := range here[PartMembers] {
		if m, err := memberOf(r); err == nil && m.Status == bus.Present {
			present[m.User.Hex()]++
		}
	}
	p.compare(PartMembers, snap.Part(PartMembers).Records, here, func(r StoredRecord) {
		room, user, _ := strings.Cut(r.Key, ".")
		m, err := memberOf(r)
		switch {
		case foreign[room] != "":
			p.skip(PartMembers, r.Key, foreign[room])
		case p.leftOut[user]:
			p.skip(PartMembers, r.Key, "this user is left out")
		case r.Value == nil:
		case err == nil && m.Status == bus.Present && present[user] >= bus.MaxRoomsPerUser:
			p.skip(PartMembers, r.Key, fmt.Sprintf("this user is in %d rooms, the most there may be", bus.MaxRoomsPerUser))
		default:
			if err == nil && m.Status == bus.Present {
				present[user]++
			}
			p.writes[PartMembers][r.Key] = r
		}
	}, p.stays(PartMembers, "the membership is here, and stays as it is"))
}

func (p *restorePlan) planHandles(snap *Snapshot, here records) {
	p.compare(PartHandles, snap.Part(PartHandles).Records, here, func(r StoredRecord) {
		h, err := handleOf(r)
		switch {
		case r.Value == nil || err == nil && h.User == "": // nobody's
		case err == nil && p.leftOut[h.User]:
			p.skip(PartHandles, r.Key, "this user is left out")
		default:
			p.writes[PartHandles][r.Key] = r
		}
	}, p.stays(PartHandles, "the handle is reserved here, and stays with who has it"))
}

func (p *restorePlan) planRoomKeys(snap *Snapshot, here records, foreign map[string]string) {
	p.compare(PartRoomKeys, snap.Part(PartRoomKeys).Records, here, func(r StoredRecord) {
		room, _, _ := strings.Cut(r.Key, ".")
		switch {
		case foreign[room] != "":
			p.skip(PartRoomKeys, r.Key, foreign[room])
		case r.Value == nil:
		default:
			p.writes[PartRoomKeys][r.Key] = r
		}
	}, p.stays(PartRoomKeys, "there is another record here, which stays"))
}

// writePart writes one part's records, several at once. Users who are revoked
// come first, so that a rotation in the snapshot never has two standing keys.
func (s *Store) writePart(ctx context.Context, part string, p *restorePlan) error {
	rounds := make([][]StoredRecord, 2)
	for _, r := range p.writes[part] {
		round := 0
		if u, err := userOf(r); part == PartUsers && err == nil && u.Status != bus.Revoked {
			round = 1
		}
		rounds[round] = append(rounds[round], r)
	}
	for _, rs := range rounds {
		sortRecords(rs)
		if err := s.writeAll(ctx, part, rs, p); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) writeAll(ctx context.Context, part string, rs []StoredRecord, p *restorePlan) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	work := make(chan StoredRecord)
	var writers sync.WaitGroup
	for range min(restoreWriters, len(rs)) {
		writers.Go(func() {
			for r := range work {
				if err := s.writeStored(ctx, part, r, p); err != nil {
					cancel(err)
				}
			}
		})
	}
	for _, r := range rs {
		if ctx.Err() != nil {
			break
		}
		work <- r
	}
	close(work)
	writers.Wait()
	return context.Cause(ctx)
}

func (s *Store) writeStored(ctx context.Context, part string, r StoredRecord, p *restorePlan) error {
	if ctx.Err() != nil {
		return nil
	}
	m := nats.NewMsg(subjectOf(bucketOf[part], r.Key))
	if m.Data = r.Value; r.Value == nil {
		m.Header.Set("KV-Operation", "DEL")
	}
	want := expectation{}
	if guard.Off(guard.Tombstones) { // the control needs the restore that writes over what is there
		if last, err := s.readLast(ctx, bucketOf[part], r.Key); err == nil {
			want.revision = last.Sequence
		}
	}
	_, err := s.publish(ctx, bucketOf[part], r.Key, m, want)
	p.mu.Lock()
	defer p.mu.Unlock()
	if bus.CodeOf(err) == bus.Conflict {
		p.skip(part, r.Key, "somebody else wrote it at the same moment")
		delete(p.writes[part], r.Key)
		return nil
	}
	if err == nil {
		p.parts[part].Written++
	}
	return err
}

// verifyRestore reads everything back and holds it to the plan.
func (s *Store) verifyRestore(ctx context.Context, p *restorePlan) error {
	here, err := s.stored(ctx)
	if err != nil {
		return err
	}
	var wrong []string
	for _, part := range writeOrder {
		for _, wanted := range []map[string]StoredRecord{p.writes[part], p.same[part]} {
			for key, want := range wanted {
				got, ok := here[part][key]
				if !ok || !same(got, want) {
					wrong = append(wrong, part+" "+key)
					continue
				}
				p.verified++
			}
		}
	}
	for _, k := range p.revoke {
		if u, _, _ := s.view.User(k); u.Status != bus.Revoked {
			wrong = append(wrong, PartUsers+" "+k.Hex())
		}
	}
	if len(wrong) > 0 {
		slices.Sort(wrong)
		return bus.E(bus.Internal, "%d records are not what the backup says, the first is %s: somebody changed them meanwhile, or they were lost", len(wrong), wrong[0]).
			WithHint("the same command with --merge --dry-run shows the difference")
	}
	return nil
}
