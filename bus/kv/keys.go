package kv

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/seal"
)

// This file keeps the public half of encrypted rooms: rosters, and envelopes
// that nobody here can open. Nothing in it decides access; what it checks spares
// members from records that their clients would refuse anyway.

const (
	// epochUploads bounds how long an epoch may be without its envelopes before
	// it counts as abandoned, and the room as in need of another one.
	epochUploads = 10 * time.Second
	// envelopeWriters write the envelopes of one epoch side by side.
	envelopeWriters = 64
	// epochLife is for how long a key is used: whoever got hold of one unnoticed
	// reads no longer than that.
	epochLife = 30 * 24 * time.Hour
	// clockDoubt is how far the clocks of two services may be apart when times
	// that they wrote are compared; what is inside counts as later.
	clockDoubt = 5 * time.Second
)

// epochRecord is <room>.<epoch> in KV_UNIBUS_room_keys. Whoever creates it has
// made the epoch; it is written once more when all envelopes are there.
type epochRecord struct {
	V         int        `json:"v"`
	Room      bus.RoomID `json:"room"`
	Epoch     uint64     `json:"epoch"`
	Roster    []byte     `json:"roster"`
	CreatedAt time.Time  `json:"created_at"` // by the clock of the service
	Members   uint64     `json:"members"`    // revision of the newest membership of the room that was looked at
	Complete  bool       `json:"complete"`   // every envelope is written

	roster *seal.Roster
	rev    uint64
}

// envelopeRecord is <room>.<epoch>.<user hex>.
type envelopeRecord struct {
	V        int    `json:"v"`
	Envelope []byte `json:"envelope"`
}

func epochKey(room bus.RoomID, epoch uint64) string {
	return string(room) + "." + strconv.FormatUint(epoch, 10)
}

func (s *Store) readEpoch(ctx context.Context, room bus.RoomID, epoch uint64) (*epochRecord, error) {
	return s.epochAt(ctx, epochKey(room, epoch), room)
}

// epochAt reads the newest record under a key that may hold a wildcard. nil is
// none.
func (s *Store) epochAt(ctx context.Context, key string, room bus.RoomID) (*epochRecord, error) {
	rctx, cancel := s.decide(ctx)
	defer cancel()
	m, err := s.readLast(rctx, RoomKeys, key)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, bus.E(bus.Unavailable, "no quorum: read of the keys of room %s: %w", room, err)
	}
	r := &epochRecord{rev: m.Sequence}
	if err := json.Unmarshal(m.Data, r); err != nil || r.V != 1 || r.Room != room || m.Subject != subjectOf(RoomKeys, epochKey(room, r.Epoch)) {
		return nil, bus.E(bus.Internal, "the record of an epoch of room %s cannot be read: %w", room, err)
	}
	if r.roster, err = seal.ParseRoster(r.Roster); err != nil {
		return nil, bus.E(bus.Internal, "the roster of epoch %d of room %s cannot be read: %w", r.Epoch, room, err)
	}
	return r, nil
}

// newestEpoch is nil if the room has no key yet. An epoch is written again when
// it is complete, so the newest record need not be that of the newest epoch.
func (s *Store) newestEpoch(ctx context.Context, room bus.RoomID) (*epochRecord, error) {
	r, err := s.epochAt(ctx, string(room)+".*", room)
	for err == nil && r != nil {
		var next *epochRecord
		if next, err = s.readEpoch(ctx, room, r.Epoch+1); next == nil {
			break
		}
		r = next
	}
	return r, err
}

func (s *Store) readEnvelope(ctx context.Context, room bus.RoomID, epoch uint64, user bus.UserKey) ([]byte, error) {
	rctx, cancel := s.decide(ctx)
	defer cancel()
	m, err := s.readLast(rctx, RoomKeys, epochKey(room, epoch)+"."+user.Hex())
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, bus.E(bus.Unavailable, "no quorum: read of the keys of room %s: %w", room, err)
	}
	var e envelopeRecord
	if err := json.Unmarshal(m.Data, &e); err != nil || e.V != 1 {
		return nil, bus.E(bus.Internal, "an envelope of epoch %d of room %s cannot be read: %w", epoch, room, err)
	}
	return e.Envelope, nil
}

// MaxEpochs bounds one page of RoomKeys, and pageBytes the rosters in it.
const (
	MaxEpochs = 32
	pageBytes = 1 << 20
)

// RoomKeys is what the servers have of the keys of an encrypted room, for one
// user: all rosters after an epoch, the user's own envelopes, and what the
// records of members and users say against the newest roster.
func (s *Store) RoomKeys(ctx context.Context, room bus.RoomID, user bus.UserKey, after uint64, limit int) (bus.RoomKeys, error) {
	r, _, ok := s.view.Room(room)
	if !ok {
		return bus.RoomKeys{}, noRoom(room)
	}
	out := bus.RoomKeys{Room: room, Creator: r.Creator, Why: []bus.RekeyReason{}, Waiting: []bus.WaitingMember{}, Epochs: []bus.RoomEpoch{}}
	if !r.Encrypted {
		return out, notEncrypted(room)
	}
	newest, err := s.newestEpoch(ctx, room)
	if err != nil {
		return out, err
	}
	out.Why, out.Waiting = s.standing(room, newest)
	out.RekeyRequired = len(out.Why) > 0
	if newest == nil {
		return out, nil
	}
	out.Epoch = newest.Epoch
	size := 0
	for epoch := after + 1; epoch <= newest.Epoch; epoch++ {
		if len(out.Epochs) == limit || size > pageBytes {
			out.Next = epoch - 1
			break
		}
		e := newest
		if epoch != newest.Epoch {
			if e, err = s.readEpoch(ctx, room, epoch); err != nil {
				return out, err
			}
			if e == nil {
				return out, bus.E(bus.Internal, "room %s has no epoch %d, and has %d", room, epoch, newest.Epoch)
			}
		}
		envelope, err := s.readEnvelope(ctx, room, epoch, user)
		if err != nil {
			return out, err
		}
		out.Epochs = append(out.Epochs, bus.RoomEpoch{Epoch: epoch, Roster: e.Roster, Envelope: envelope, CreatedAt: e.CreatedAt})
		size += len(e.Roster)
	}
	return out, nil
}

func notEncrypted(room bus.RoomID) *bus.Error {
	return bus.E(bus.Conflict, "room %s is not encrypted; that is fixed when a room is made", room)
}

// standing compares the newest roster with the records. Nothing is marked when
// somebody departs: it is worked out each time, so no crash between two writes
// can lose it.
func (s *Store) standing(room bus.RoomID, newest *epochRecord) (why []bus.RekeyReason, waiting []bus.WaitingMember) {
	why, waiting = []bus.RekeyReason{}, []bus.WaitingMember{}
	roster := &seal.Roster{}
	if newest == nil {
		why = append(why, bus.RekeyReason{Why: bus.RekeyFirst})
	} else {
		roster = newest.roster
		if !newest.Complete && s.now().Sub(newest.CreatedAt) > epochUploads {
			why = append(why, bus.RekeyReason{Why: bus.RekeyIncomplete})
		}
		if s.now().Sub(newest.CreatedAt) > epochLife {
			why = append(why, bus.RekeyReason{Why: bus.RekeyOld})
		}
		for _, m := range roster.Members {
			if reason := s.againstLine(room, newest, m); reason != "" {
				why = append(why, bus.RekeyReason{Why: reason, User: &m.User})
			}
		}
	}
	for _, m := range s.view.Members(room) {
		u, _, ok := s.view.User(m.User)
		if m.Status != bus.Present || !ok || !u.ActiveAt(s.now()) {
			continue
		}
		if line, in := roster.Member(m.User); !in || line.Role.Rank() < m.Role.Rank() {
			waiting = append(waiting, bus.WaitingMember{User: m.User, Handle: u.Handle, Role: m.Role, Has: line.Role, Key: u.EncryptionKey != nil})
		}
	}
	return why, waiting
}

// againstLine says why the room needs another key for one line of its roster.
func (s *Store) againstLine(room bus.RoomID, e *epochRecord, line seal.Member) bus.RekeyWhy {
	m, rev, ok := s.view.Membership(room, line.User)
	u, _, known := s.view.User(line.User)
	since := e.CreatedAt.Add(-clockDoubt)
	switch {
	case !ok || m.Status != bus.Present || !known || !u.ActiveAt(s.now()):
		return bus.RekeyDeparted
	// Who was away for a time must not read what was said meanwhile.
	case rev > e.Members && m.AddedAt.After(since), u.InterruptedAt != nil && u.InterruptedAt.After(since):
		return bus.RekeyReturned
	case m.Role.Rank() < line.Role.Rank():
		return bus.RekeyDemoted
	case u.EncryptionKey == nil || u.EncryptionKey.N != line.N || seal.HashOf(u.EncryptionKey.Public) != line.Key:
		return bus.RekeyNewKey
	}
	return ""
}

// NewEpoch makes the next epoch of a room. Write order: the epoch, created only
// if nobody made one of that number, which settles every race; then the
// envelopes; then the epoch again, as complete. Interrupted in between, members
// have no key of it, RoomKeys calls it incomplete, and the same call with the
// same roster finishes it. Conflict: somebody else was faster, or a record has
// changed since the roster was made.
func (s *Store) NewEpoch(ctx context.Context, roster *seal.Roster, envelopes [][]byte) (Result, error) {
	room := roster.Room
	done, err := s.exclusively(ctx, "epoch "+string(room))
	if err != nil {
		return Result{}, err
	}
	defer done()
	if err := s.current(ctx); err != nil {
		return Result{}, err
	}
	started := s.now()
	s = s.As(s.caller)
	s.begin()
	defer s.end()
	newest, err := s.newestEpoch(ctx, room)
	if err != nil {
		return Result{}, err
	}
	rec := &epochRecord{V: 1, Room: room, Epoch: roster.Epoch, Roster: roster.Bytes(), CreatedAt: s.stamp(), roster: roster}
	again := newest != nil && newest.Epoch == roster.Epoch && bytes.Equal(newest.Roster, rec.Roster)
	if again {
		rec = newest
	} else if err := s.mayFollow(roster, newest); err != nil {
		return Result{}, err
	}
	if rec.Members, err = s.checkEpoch(roster, envelopes, again && rec.Complete); err != nil {
		return Result{}, err
	}
	if !again {
		if rec.rev, err = s.write(ctx, RoomKeys, epochKey(room, roster.Epoch), rec, expectation{}); err != nil {
			if bus.CodeOf(err) == bus.Conflict {
				return Result{}, lostEpoch(roster)
			}
			return Result{}, err
		}
	}
	already := again && rec.Complete
	if !already {
		if err := s.writeEnvelopes(ctx, roster, envelopes); err != nil {
			return Result{}, err
		}
		rec.Complete = true
		if rec.rev, err = s.write(ctx, RoomKeys, epochKey(room, roster.Epoch), rec, expectation{revision: rec.rev}); err != nil {
			return Result{}, err
		}
	}
	res := Result{What: fmt.Sprintf("room %s has epoch %d, of %d members", room, roster.Epoch, len(roster.Members)), Revision: rec.rev, Already: already, Elapsed: s.now().Sub(started)}
	if already {
		res.What = "already_so: " + res.What
	}
	return res, nil
}

func lostEpoch(r *seal.Roster) *bus.Error {
	return bus.E(bus.Conflict, "somebody else has made epoch %d of room %s", r.Epoch, r.Room).WithHint("unibusctl room rekey %s makes the next one if it is needed", r.Room)
}

// mayFollow refuses a roster that no member would accept.
func (s *Store) mayFollow(r *seal.Roster, newest *epochRecord) error {
	room, _, ok := s.view.Room(r.Room)
	switch {
	case !ok:
		return noRoom(r.Room)
	case room.Status != bus.RoomActive:
		return bus.E(bus.Conflict, "room %s is archived", r.Room)
	case !room.Encrypted:
		return notEncrypted(r.Room)
	}
	var before *seal.Roster
	next, previous := uint64(1), seal.Hash{}
	if newest != nil {
		before, next, previous = newest.roster, newest.Epoch+1, newest.roster.Hash()
	}
	if r.Epoch != next || r.Previous != previous {
		return lostEpoch(r)
	}
	return r.Follows(before, r.Room, room.Creator, func(k bus.UserKey) bool {
		u, _, ok := s.view.User(k)
		return ok && u.Role == bus.Admin && u.ActiveAt(s.now())
	})
}

// checkEpoch holds a roster and its envelopes against the records, and returns
// the revision of the newest membership that it saw.
func (s *Store) checkEpoch(r *seal.Roster, envelopes [][]byte, stored bool) (newest uint64, err error) {
	if len(envelopes) != len(r.Members) {
		return 0, bus.E(bus.Invalid, "there are %d envelopes for %d members", len(envelopes), len(r.Members))
	}
	if r.Signer != s.caller.Key {
		return 0, bus.E(bus.Forbidden, "the roster is signed by %s, and not by who sends it", r.Signer)
	}
	for _, m := range s.view.Members(r.Room) {
		newest = max(newest, m.Revision)
	}
	if stored {
		return newest, nil
	}
	for i, line := range r.Members {
		m, _, ok := s.view.Membership(r.Room, line.User)
		u, _, known := s.view.User(line.User)
		switch {
		case !ok || m.Status != bus.Present || !known || !u.ActiveAt(s.now()):
			return 0, bus.E(bus.Conflict, "%s is no member of room %s, or not active", line.User, r.Room).WithHint("unibusctl room check %s", r.Room)
		case m.Role.Rank() < line.Role.Rank():
			return 0, bus.E(bus.Conflict, "%s is %s of room %s, and not %s", u.Handle, m.Role, r.Room, line.Role)
		case u.EncryptionKey == nil || u.EncryptionKey.N != line.N || seal.HashOf(u.EncryptionKey.Public) != line.Key:
			return 0, bus.E(bus.Conflict, "the encryption key of %s is another one now", u.Handle)
		}
		if err := seal.CheckEnvelope(envelopes[i], r, r.Signer, line.User, *u.EncryptionKey); err != nil {
			return 0, bus.E(bus.Invalid, "envelope %d is refused: %w", i, err)
		}
	}
	return newest, nil
}

// writeEnvelopes writes many records at once: one after the other, those of a
// thousand members would take seconds.
func (s *Store) writeEnvelopes(ctx context.Context, r *seal.Roster, envelopes [][]byte) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var writers sync.WaitGroup
	next := make(chan int)
	for range min(envelopeWriters, len(envelopes)) {
		writers.Go(func() {
			for i := range next {
				if err := s.writeEnvelope(ctx, r.Room, r.Epoch, r.Members[i].User, envelopes[i]); err != nil {
					cancel(err)
				}
			}
		})
	}
	for i := range envelopes {
		select {
		case next <- i:
		case <-ctx.Done():
		}
	}
	close(next)
	writers.Wait()
	if err := context.Cause(ctx); err != nil {
		if bus.CodeOf(err) == bus.Internal {
			return bus.E(bus.Unavailable, "the envelopes of epoch %d of room %s are not all written: %w", r.Epoch, r.Room, err)
		}
		return err
	}
	return nil
}

// writeEnvelope replaces what there is: an epoch that is finished later has the
// same recipients, and other bytes that hold the same key.
func (s *Store) writeEnvelope(ctx context.Context, room bus.RoomID, epoch uint64, user bus.UserKey, envelope []byte) error {
	value, err := json.Marshal(envelopeRecord{V: 1, Envelope: envelope})
	if err != nil {
		return bus.E(bus.Internal, "encode an envelope: %w", err)
	}
	if err := s.allowed(); err != nil {
		return err
	}
	m := nats.NewMsg(subjectOf(RoomKeys, epochKey(room, epoch)+"."+user.Hex()))
	m.Data = value
	wctx, cancel := s.decide(ctx)
	defer cancel()
	if _, err := s.js.PublishMsg(wctx, m, jetstream.WithExpectStream(StreamName(RoomKeys)), jetstream.WithRetryAttempts(0)); err != nil {
		return bus.E(bus.Unavailable, "no quorum: an envelope of room %s was not stored: %w", room, err)
	}
	return nil
}

// GrantKeys gives a member keys of epochs in whose rosters they are not: what
// was said before they came. Only what an owner has sealed for them opens.
func (s *Store) GrantKeys(ctx context.Context, room bus.RoomID, user bus.UserKey, envelopes []bus.GrantedKey) (Result, error) {
	if err := s.current(ctx); err != nil {
		return Result{}, err
	}
	started := s.now()
	s = s.As(s.caller)
	s.begin()
	defer s.end()
	if err := s.mustBeOpen(room); err != nil {
		return Result{}, err
	}
	if r, _, _ := s.view.Room(room); !r.Encrypted {
		return Result{}, notEncrypted(room)
	}
	m, _, ok := s.view.Membership(room, user)
	u, _, known := s.view.User(user)
	if !ok || m.Status != bus.Present || !known || !u.ActiveAt(s.now()) || u.EncryptionKey == nil {
		return Result{}, bus.E(bus.Conflict, "%s is no active member of room %s with an encryption key", user, room).WithHint("unibusctl room members %s", room)
	}
	newest, err := s.newestEpoch(ctx, room)
	if err != nil {
		return Result{}, err
	}
	if newest == nil || !newest.roster.IsOwner(s.caller.Key) {
		return Result{}, bus.E(bus.Forbidden, "only an owner in the newest roster of room %s gives keys", room)
	}
	slices.SortFunc(envelopes, func(a, b bus.GrantedKey) int { return cmp.Compare(a.Epoch, b.Epoch) })
	for _, g := range envelopes {
		e, err := s.readEpoch(ctx, room, g.Epoch)
		if err != nil {
			return Result{}, err
		}
		if e == nil {
			return Result{}, bus.E(bus.NotFound, "room %s has no epoch %d", room, g.Epoch)
		}
		if _, in := e.roster.Member(user); in && e.Complete {
			return Result{}, bus.E(bus.Conflict, "%s has the key of epoch %d", u.Handle, g.Epoch)
		}
		if err := seal.CheckEnvelope(g.Envelope, e.roster, s.caller.Key, user, *u.EncryptionKey); err != nil {
			return Result{}, bus.E(bus.Invalid, "the envelope for epoch %d is refused: %w", g.Epoch, err)
		}
		if err := s.writeEnvelope(ctx, room, g.Epoch, user, g.Envelope); err != nil {
			return Result{}, err
		}
	}
	return Result{What: fmt.Sprintf("%s has the keys of %d more epochs of room %s", u.Handle, len(envelopes), room), Revision: newest.rev, Elapsed: s.now().Sub(started)}, nil
}

// MemberKeys lists the active members of a room with their encryption keys, as
// their records have them.
func (v *View) MemberKeys(room bus.RoomID, now time.Time) []bus.MemberKey {
	out := []bus.MemberKey{}
	for _, m := range v.Members(room) {
		u, _, ok := v.User(m.User)
		if m.Status == bus.Present && ok && u.ActiveAt(now) {
			out = append(out, bus.MemberKey{SignPub: m.User, Handle: u.Handle, Role: m.Role, EncryptionKey: u.EncryptionKey})
		}
	}
	return out
}

// Departure lists who is to be told that a room needs another key, after a
// change that the View has just applied: the owners of encrypted rooms that
// somebody is, or may be, no longer in. It errs on the side of telling.
func (v *View) Departure(c Change, now time.Time) map[bus.RoomID][]bus.UserKey {
	var rooms []bus.RoomID
	switch {
	case c.User == (bus.UserKey{}):
		return nil
	case c.Room != "":
		rooms = []bus.RoomID{c.Room}
	default:
		if u, _, ok := v.User(c.User); ok && u.ActiveAt(now) && u.InterruptedAt == nil {
			return nil
		}
		for _, m := range v.MembershipsOf(c.User) {
			if m.Status == bus.Present {
				rooms = append(rooms, m.Room)
			}
		}
	}
	out := map[bus.RoomID][]bus.UserKey{}
	for _, id := range rooms {
		if r, _, ok := v.Room(id); !ok || !r.Encrypted || r.Status != bus.RoomActive {
			continue
		}
		for _, m := range v.Members(id) {
			if m.Status == bus.Present && m.Role == bus.Owner && m.User != c.User {
				out[id] = append(out[id], m.User)
			}
		}
	}
	return out
}
