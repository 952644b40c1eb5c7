package kv

import (
	"context"
	"encoding/json"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
)

// indexEntry is a record of KV_UNIBUS_rooms_by_member. It proposes a room for a
// user and decides nothing; it can be rebuilt from the members at any time.
type indexEntry struct {
	V       int  `json:"v"`
	Present bool `json:"present"`
}

func indexKey(m bus.Membership) string { return m.User.Hex() + "." + string(m.Room) }

func (s *Store) writeIndex(ctx context.Context, m bus.Membership) error {
	wctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	value, err := json.Marshal(indexEntry{V: 1, Present: m.Status == bus.Present})
	if err != nil {
		return err
	}
	_, err = s.js.Publish(wctx, subjectOf(RoomsByMember, indexKey(m)), value, jetstream.WithExpectStream(StreamName(RoomsByMember)))
	return err
}

// Repairs counts what Reconcile found and mended.
type Repairs struct {
	Index     int // index entries that differed from the members
	Rotations int // rotations that had been interrupted after the old key was revoked
}

// Reconcile compares what may be rebuilt with the truth and repairs it, and
// finishes rotations whose decisive step was taken. It gives nobody more than
// an admin's call had already decided, so it may run anywhere, at any time and
// more than once.
func (s *Store) Reconcile(ctx context.Context) (Repairs, error) {
	if err := s.barrier(ctx); err != nil {
		return Repairs{}, err
	}
	index, err := s.readIndex(ctx)
	if err != nil {
		return Repairs{}, err
	}
	var done Repairs
	for _, m := range s.view.Memberships() {
		want := m.Status == bus.Present
		got, known := index[indexKey(m.Membership)]
		if got == want && (known || !want) {
			continue
		}
		if err := s.writeIndex(ctx, m.Membership); err != nil {
			return done, bus.E(bus.Unavailable, "index entry %s: %w", indexKey(m.Membership), err)
		}
		done.Index++
		s.log.Warn("index entry repaired", "key", indexKey(m.Membership), "present", want)
	}
	for _, r := range s.view.interrupted() {
		if _, err := s.RotateUser(ctx, r.from, r.to); err != nil {
			return done, err
		}
		done.Rotations++
		s.log.Warn("interrupted rotation finished", "from", r.from, "to", r.to)
	}
	return done, nil
}

// readIndex loads the whole index. It need not be current: writing an entry
// again is harmless.
func (s *Store) readIndex(ctx context.Context) (map[string]bool, error) {
	index := map[string]bool{}
	err := s.readAll(ctx, RoomsByMember, func(key string, value []byte, _ uint64) {
		var e indexEntry
		err := json.Unmarshal(value, &e)
		index[key] = err == nil && e.V == 1 && e.Present
	})
	return index, err
}

// readAll gives the newest record of every key of a bucket, as it was at some
// moment after the call. It decides nothing.
func (s *Store) readAll(ctx context.Context, bucket string, take func(key string, value []byte, rev uint64)) error {
	t, err := openTail(ctx, s.view.cfg.Conn, bucket)
	if err != nil {
		return bus.E(bus.Unavailable, "read %s: %w", bucket, err)
	}
	defer t.close()
	prefix := subjectOf(bucket, "")
	for left := t.pending; left > 0; {
		m, err := t.sub.NextMsgWithContext(ctx)
		if err != nil {
			return bus.E(bus.Unavailable, "read %s: %w", bucket, err)
		}
		if m.Header.Get("Status") != "" {
			if m.Reply != "" {
				_ = m.Respond(nil)
			}
			continue
		}
		md, err := m.Metadata()
		if err != nil {
			return bus.E(bus.Internal, "read %s: %w", bucket, err)
		}
		take(strings.TrimPrefix(m.Subject, prefix), m.Data, md.Sequence.Stream)
		left = md.NumPending
	}
	return ctx.Err()
}
