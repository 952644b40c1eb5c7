package kv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// Names of the buckets, as KV tools show them. The stream of a bucket is
// KV_<name>, its subjects are $KV.<name>.<key>.
const (
	Users         = "UNIBUS_users"           // <user hex>
	Rooms         = "UNIBUS_rooms"           // <room>
	Members       = "UNIBUS_members"         // <room>.<user hex>: the authority on membership
	RoomsByMember = "UNIBUS_rooms_by_member" // <user hex>.<room>: proposes only
	RoomKeys      = "UNIBUS_room_keys"       // <room>.<epoch>: a roster; <room>.<epoch>.<user hex>: an envelope
	Nonces        = "UNIBUS_nonces"          // <hash>, create-only, expiring
	Handles       = "UNIBUS_handles"         // <handle>, a reservation
	Invites       = "UNIBUS_invites"         // <id>, expiring
	AuditStream   = "UNIBUS_AUDIT"
	AuditSubjects = "unibus.audit.>"
)

const (
	// Replicas of every stream. There is no smaller cluster.
	Replicas = 3
	// history keeps enough revisions that a View lagging behind a record that
	// is rewritten in a loop still sees each state it must acknowledge.
	history    = 64
	barrierTTL = 5 * time.Minute
	nonceTTL   = 5 * time.Minute
	inviteTTL  = MaxInvite + 24*time.Hour // an invite outlives its expiry, to be seen in the list
	mib        = 1 << 20
)

// StreamName returns the stream behind a bucket.
func StreamName(bucket string) string { return "KV_" + bucket }

func subjectOf(bucket, key string) string { return "$KV." + bucket + "." + key }

// Streams returns the definition of every stream of account CTRL, in the order
// they are created. MaxBytes are chosen so that their sum stays inside the
// account's cap in conf.d/accounts.conf: whatever users fill, a revoke commits.
func Streams() []jetstream.StreamConfig {
	direct := guard.Off(guard.FreshReads) // the control needs the stale path a careless bucket would have
	record := func(bucket string, maxBytes int64) jetstream.StreamConfig {
		return jetstream.StreamConfig{
			Name: StreamName(bucket), Subjects: []string{"$KV." + bucket + ".>"},
			Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardNew, Storage: jetstream.FileStorage,
			Replicas: Replicas, MaxMsgsPerSubject: history, MaxBytes: maxBytes, MaxMsgSize: 64 << 10,
			MaxMsgs: -1, MaxConsumers: -1, Duplicates: 2 * time.Minute,
			DenyDelete: true, DenyPurge: true, AllowRollup: false, AllowDirect: direct, AllowMsgTTL: true,
		}
	}
	nonces := record(Nonces, 64*mib)
	nonces.MaxMsgsPerSubject, nonces.MaxAge, nonces.MaxMsgs, nonces.MaxMsgSize = 1, nonceTTL, 200_000, 1<<10
	invites := record(Invites, 32*mib)
	invites.MaxAge = inviteTTL
	keys := record(RoomKeys, 512*mib)
	keys.MaxMsgSize = 256 << 10 // a roster of 2,000 members, in base64
	audit := jetstream.StreamConfig{
		Name: AuditStream, Subjects: []string{AuditSubjects},
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld, Storage: jetstream.FileStorage,
		Replicas: Replicas, MaxMsgsPerSubject: -1, MaxBytes: 512 * mib, MaxMsgSize: 64 << 10, MaxMsgs: -1, MaxConsumers: -1,
		Duplicates: 2 * time.Minute, DenyDelete: true, DenyPurge: true,
	}
	return []jetstream.StreamConfig{
		record(Users, 128*mib), record(Rooms, 64*mib), record(Members, 256*mib), record(RoomsByMember, 128*mib),
		keys, record(Handles, 32*mib), invites, nonces, audit,
	}
}

// definition returns one stream's definition; name is that of one of Streams.
func definition(name string) jetstream.StreamConfig {
	all := Streams()
	return all[slices.IndexFunc(all, func(s jetstream.StreamConfig) bool { return s.Name == name })]
}

// Bootstrap makes every stream that is missing and verifies those that exist.
// R3 creation needs three servers, so on a first start it waits for the third,
// telling progress each time the obstacle changes. After budget it gives up
// with bus.Unavailable. A stream that exists with another definition is never
// altered: bus.Conflict names stream and field.
func Bootstrap(ctx context.Context, nc *nats.Conn, budget time.Duration, progress func(string)) error {
	js, err := newJetStream(nc)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	said := ""
	for patience := hurried; ; {
		err := bootstrapOnce(ctx, js, patience)
		if err == nil || bus.CodeOf(err) == bus.Conflict {
			return err
		}
		if err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			progress(said)
		}
		if errors.Is(err, context.DeadlineExceeded) { // slow, perhaps, rather than leaderless
			patience = min(2*patience, mostPatience)
		}
		select {
		case <-ctx.Done():
			if said == "" {
				said = err.Error()
			}
			return bus.E(bus.Unavailable, "buckets are not ready after %s: %s", budget, said)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// mostPatience bounds one request of a bootstrap.
const mostPatience = 5 * time.Second

func bootstrapOnce(ctx context.Context, js jetstream.JetStream, patience time.Duration) error {
	for _, want := range Streams() {
		if err := ensure(ctx, js, want, patience); err != nil {
			return err
		}
	}
	return nil
}

// ensure makes a stream, or verifies the one that is there. Nobody answers what
// was asked while the servers had no leader: a lookup waits for patience, no
// longer, so that a cluster that has just started is asked again at once.
func ensure(ctx context.Context, js jetstream.JetStream, want jetstream.StreamConfig, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, mostPatience)
	defer cancel()
	lookup, found := context.WithTimeout(ctx, patience)
	defer found()
	s, err := js.Stream(lookup, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		s, err = js.CreateStream(ctx, want)
	}
	var api *jetstream.APIError
	switch {
	case err == nil:
		return Verify(s.CachedInfo().Config, want)
	case errors.As(err, &api) && api.ErrorCode == errNoPeers:
		return bus.E(bus.Unavailable, "waiting for node 3/3 (first start): %w", err)
	case errors.As(err, &api) && api.ErrorCode == errNameInUse:
		// Another node made it between our two calls; the next round verifies it.
		return bus.E(bus.Unavailable, "stream %s is being made by another node: %w", want.Name, err)
	default:
		return bus.E(bus.Unavailable, "waiting for a quorum of servers: stream %s: %w", want.Name, err)
	}
}

// nats-server's error codes, from its errors.json.
const (
	errNoPeers         = 10005
	errNameInUse       = 10058
	errWrongLastSeq    = 10071
	errWrongLastSeqAny = 10164
)

// Verify compares a stream with its definition in everything that durability
// or the decision rests on: a single replica, memory storage, direct reads,
// rollups, deletions or a mirror would each break a promise silently. It is the
// one list of settings, for buckets, rooms and files.
func Verify(got, want jetstream.StreamConfig) error {
	type field struct {
		name      string
		got, want any
	}
	fields := []field{
		{"num_replicas", got.Replicas, want.Replicas},
		{"storage", got.Storage, want.Storage},
		{"subjects", fmt.Sprint(got.Subjects), fmt.Sprint(want.Subjects)},
		{"allow_direct", got.AllowDirect, want.AllowDirect},
		{"allow_rollup_hdrs", got.AllowRollup, want.AllowRollup},
		{"deny_delete", got.DenyDelete, want.DenyDelete},
		{"deny_purge", got.DenyPurge, want.DenyPurge},
		{"discard", got.Discard, want.Discard},
		{"retention", got.Retention, want.Retention},
		{"max_age", got.MaxAge, want.MaxAge},
		{"max_msgs", got.MaxMsgs, want.MaxMsgs},
		{"allow_msg_ttl", got.AllowMsgTTL, want.AllowMsgTTL},
		{"sealed", got.Sealed, false},
		{"mirror", got.Mirror != nil, false},
		{"sources", len(got.Sources), 0},
		{"republish", republished(got.RePublish), republished(want.RePublish)},
		{"duplicate_window", got.Duplicates, want.Duplicates},
		{"allow_msg_counter", got.AllowMsgCounter, false},
		{"allow_msg_schedules", got.AllowMsgSchedules, false},
		{"allow_atomic", got.AllowAtomicPublish, false},
		{"allow_batched", got.AllowBatchPublish, false},
		{"no_ack", got.NoAck, false},
		{"subject_transform", got.SubjectTransform != nil, false},
		{"persist_mode", got.PersistMode, want.PersistMode},
	}
	if want.MaxMsgsPerSubject == history {
		fields = append(fields, field{"max_msgs_per_subject >= 64", got.MaxMsgsPerSubject >= history, true})
	} else {
		fields = append(fields, field{"max_msgs_per_subject", got.MaxMsgsPerSubject, want.MaxMsgsPerSubject})
	}
	fields = append(fields, field{"max_bytes set", got.MaxBytes > 0, true})
	i := slices.IndexFunc(fields, func(f field) bool { return f.got != f.want })
	if i < 0 {
		return nil
	}
	f := fields[i]
	e := bus.E(bus.Conflict, "stream %s has %s = %v, want %v", want.Name, f.name, f.got, f.want)
	if f.name == "num_replicas" {
		return e.WithHint("nats --context unibus-ops stream edit %s --replicas %d", want.Name, want.Replicas)
	}
	return e.WithHint("nats --context unibus-ops stream info %s", want.Name)
}

func republished(r *jetstream.RePublish) string {
	if r == nil {
		return "none"
	}
	return fmt.Sprintf("%s to %s, headers only %v", r.Source, r.Destination, r.HeadersOnly)
}

func newJetStream(nc *nats.Conn) (jetstream.JetStream, error) {
	js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(5*time.Second))
	if err != nil {
		return nil, bus.E(bus.Internal, "jetstream: %w", err)
	}
	return js, nil
}
