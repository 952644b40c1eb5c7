package recorder

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// Ensure makes the stream of a durable room, or brings its limits to what keep
// says. It is Conflict when the account has no space left for it, or when there
// is a stream of that name which is none of ours; else an error is Unavailable.
func (r *Recorder) Ensure(ctx context.Context, room bus.RoomID, keep bus.Retention) error {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	want := kv.RoomStream(room, keep)
	s, err := r.js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		s, err = r.js.CreateStream(ctx, want)
	}
	if err != nil {
		return streamError(room, err)
	}
	got := s.CachedInfo().Config
	if err := kv.VerifyRoomStream(got, want); err != nil {
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
