package kv

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"unibus.internal/bus"
)

// copyOf is a copy of a stream with these subjects, from sequence first on.
func copyOf(first uint64, subjects ...string) Copy {
	return func(each func(StoredRecord) error) error {
		for i, s := range subjects {
			if err := each(StoredRecord{Key: s, Revision: first + uint64(i), At: time.Unix(1, 0), Value: []byte{byte(i)}}); err != nil {
				return err
			}
		}
		return nil
	}
}

// Of a bucket the newest record of each key is kept, behind all its old
// revisions; of the audit everything, in its place; of anything else nothing.
func TestChosen(t *testing.T) {
	users, audit := "$KV.UNIBUS_users.", "unibus.audit."
	for _, c := range []struct {
		stream string
		from   Copy
		keep   []uint64
		first  uint64
		fails  bool
	}{
		{stream: "KV_UNIBUS_users", from: copyOf(7, users+"a", users+"b", users+"_barrier.x.1", users+"a", users+"_barrier.x.1"), keep: []uint64{8, 10}, first: 12},
		{stream: "KV_UNIBUS_users", from: copyOf(1), first: 1},
		{stream: AuditStream, from: copyOf(3, audit+"n1", audit+"_barrier.probe.ops", audit+"n1"), keep: []uint64{3, 4, 5}, first: 3},
		{stream: AuditStream, from: copyOf(1), first: 1},
		{stream: "KV_UNIBUS_users", from: copyOf(1, users+"a", "$KV.UNIBUS_rooms.ops"), fails: true},
		{stream: "KV_UNIBUS_users", from: func(each func(StoredRecord) error) error {
			for range 2 {
				if err := each(StoredRecord{Key: users + "a", Revision: 5}); err != nil {
					return err
				}
			}
			return nil
		}, fails: true},
	} {
		keep, first, err := chosen(c.stream, c.from)
		if c.fails {
			if bus.CodeOf(err) != bus.Invalid {
				t.Errorf("%s: kept %v, %v", c.stream, keep, err)
			}
			continue
		}
		var got []uint64
		for seq := range keep {
			got = append(got, seq)
		}
		slices.Sort(got)
		if err != nil || first != c.first || fmt.Sprint(got) != fmt.Sprint(c.keep) {
			t.Errorf("%s: kept %v from %d on (%v), want %v from %d on", c.stream, got, first, err, c.keep, c.first)
		}
	}
}

// Only a stream that is frozen is ended.
func TestRepairable(t *testing.T) {
	for state, want := range map[StreamState]bus.Code{StreamFrozen: "", StreamWrites: bus.Conflict, StreamMissing: bus.NotFound} {
		if err := state.Repairable("KV_UNIBUS_users"); bus.CodeOf(err) != want {
			t.Errorf("%s: %v, want %q", state, err, want)
		}
	}
}

// A stream is named as people name it.
func TestStreamNameOf(t *testing.T) {
	for word, want := range map[string]string{
		"users": "KV_UNIBUS_users", "UNIBUS_users": "KV_UNIBUS_users", "KV_UNIBUS_users": "KV_UNIBUS_users",
		"audit": "UNIBUS_AUDIT", "UNIBUS_AUDIT": "UNIBUS_AUDIT", "room_keys": "KV_UNIBUS_room_keys", "user": "", "": "",
	} {
		if got, err := StreamNameOf(word); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", word, got, err)
		}
	}
}
