package recorder

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// definition is the stream of a durable room. Rollups, lifetimes and purges
// would let one message take others away. Direct reads may lag, which a history
// may and a decision about access may not.
func definition(room bus.RoomID, keep bus.Retention) jetstream.StreamConfig {
	keep = keep.Filled()
	none := func(n int64) int64 {
		if n == 0 {
			return -1
		}
		return n
	}
	return jetstream.StreamConfig{
		Name: bus.RoomStream(room), Subjects: []string{bus.StoreSubscribe(room)},
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld, Storage: jetstream.FileStorage, Replicas: kv.Replicas,
		MaxMsgsPerSubject: -1, MaxConsumers: -1, MaxMsgSize: -1,
		MaxBytes: keep.MaxBytes, MaxMsgs: none(keep.MaxMessages), MaxAge: time.Duration(keep.MaxAgeSeconds) * time.Second,
		Duplicates: bus.DuplicateWindow, DenyDelete: true, DenyPurge: true, AllowDirect: true,
		RePublish: &jetstream.RePublish{Source: bus.StoreSubscribe(room), Destination: bus.FeedSubscribe(room)},
	}
}

// verify compares what must never differ. The limits may: they are brought to
// what the room's record says.
func verify(got, want jetstream.StreamConfig) error {
	republish := func(r *jetstream.RePublish) string {
		if r == nil {
			return "none"
		}
		return fmt.Sprintf("%s to %s, headers only %v", r.Source, r.Destination, r.HeadersOnly)
	}
	for _, f := range []struct {
		name      string
		got, want any
	}{
		{"num_replicas", got.Replicas, want.Replicas},
		{"storage", got.Storage, want.Storage},
		{"subjects", fmt.Sprint(got.Subjects), fmt.Sprint(want.Subjects)},
		{"republish", republish(got.RePublish), republish(want.RePublish)},
		{"retention", got.Retention, want.Retention},
		{"discard", got.Discard, want.Discard},
		{"max_msgs_per_subject", got.MaxMsgsPerSubject, want.MaxMsgsPerSubject},
		{"duplicate_window", got.Duplicates, want.Duplicates},
		{"deny_delete", got.DenyDelete, want.DenyDelete},
		{"deny_purge", got.DenyPurge, want.DenyPurge},
		{"allow_rollup_hdrs", got.AllowRollup, want.AllowRollup},
		{"allow_msg_ttl", got.AllowMsgTTL, want.AllowMsgTTL},
		{"allow_msg_counter", got.AllowMsgCounter, false},
		{"allow_msg_schedules", got.AllowMsgSchedules, false},
		{"allow_atomic", got.AllowAtomicPublish, false},
		{"allow_batched", got.AllowBatchPublish, false},
		{"no_ack", got.NoAck, false},
		{"sealed", got.Sealed, false},
		{"mirror", got.Mirror != nil, false},
		{"sources", len(got.Sources), 0},
		{"subject_transform", got.SubjectTransform != nil, false},
		{"persist_mode", got.PersistMode, want.PersistMode},
	} {
		if f.got != f.want {
			return bus.E(bus.Conflict, "stream %s has %s = %v, want %v", want.Name, f.name, f.got, f.want)
		}
	}
	return nil
}

// Ensure makes the stream of a durable room, or brings its limits to what keep
// says. It is Conflict when the account has no space left for it, or when there
// is a stream of that name which is none of ours; else an error is Unavailable.
func (r *Recorder) Ensure(ctx context.Context, room bus.RoomID, keep bus.Retention) error {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	want := definition(room, keep)
	s, err := r.js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		s, err = r.js.CreateStream(ctx, want)
	}
	if err != nil {
		return streamError(room, err)
	}
	got := s.CachedInfo().Config
	if err := verify(got, want); err != nil {
		return err
	}
	if got.MaxBytes == want.MaxBytes && got.MaxMsgs == want.MaxMsgs && got.MaxAge == want.MaxAge && got.AllowDirect == want.AllowDirect {
		return nil
	}
	if _, err := r.js.UpdateStream(ctx, want); err != nil {
		return streamError(room, err)
	}
	return nil
}

// Purge takes the messages of an archived room away, with its stream: its id is
// never used again. It may be repeated.
func (r *Recorder) Purge(ctx context.Context, room bus.RoomID) error {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	if err := r.js.DeleteStream(ctx, bus.RoomStream(room)); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		return bus.E(bus.Unavailable, "the messages of room %s are not taken away yet: %w", room, err).WithHint("repeat it")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.purged[room] = true
	return nil
}

// The errors of nats-server that mean that an account or its servers are full.
var full = []jetstream.ErrorCode{
	10002, // resource limits exceeded for account
	10023, // insufficient resources
	10026, // maximum number of streams reached
	10028, // memory of the account
	10047, // insufficient storage resources available
}

func streamError(room bus.RoomID, err error) error {
	var api *jetstream.APIError
	if errors.As(err, &api) && slices.Contains(full, api.ErrorCode) {
		return bus.E(bus.Conflict, "there is no space for the messages of room %s: %s", room, strings.ToLower(api.Description)).
			WithHint("archive a durable room with --messages purge, or lower its retention")
	}
	return bus.E(bus.Unavailable, "the stream of room %s cannot be made now: %w", room, err).WithHint("unibusctl cluster status")
}
