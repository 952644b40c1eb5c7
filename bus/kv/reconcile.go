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
	Index int // index entries that differed from the members
}

// Reconcile compares what may be rebuilt with the truth and repairs it. It
// never touches a record that grants or denies, so it may run anywhere, at any
// time and more than once.
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
	return done, nil
}

// readIndex loads the whole index. It need not be current: writing an entry
// again is harmless.
func (s *Store) readIndex(ctx context.Context) (map[string]bool, error) {
	t, err := openTail(ctx, s.view.cfg.Conn, RoomsByMember)
	if err != nil {
		return nil, bus.E(bus.Unavailable, "read the index: %w", err)
	}
	defer t.close()
	index := map[string]bool{}
	prefix := subjectOf(RoomsByMember, "")
	for left := t.pending; left > 0; {
		m, err := t.sub.NextMsgWithContext(ctx)
		if err != nil {
			return nil, bus.E(bus.Unavailable, "read the index: %w", err)
		}
		if m.Header.Get("Status") != "" {
			if m.Reply != "" {
				_ = m.Respond(nil)
			}
			continue
		}
		md, err := m.Metadata()
		if err != nil {
			return nil, bus.E(bus.Internal, "read the index: %w", err)
		}
		var e indexEntry
		err = json.Unmarshal(m.Data, &e)
		index[strings.TrimPrefix(m.Subject, prefix)] = err == nil && e.V == 1 && e.Present
		left = md.NumPending
	}
	return index, ctx.Err()
}
