package kv

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// StreamState is what can be wrong with a whole stream.
type StreamState string

// A frozen stream answers reads and takes no write, for ever: a fault of the
// server (one message with an impossible expectation is enough) has stopped all
// replicas at the same place, and neither a restart nor other replicas help.
const (
	StreamWrites  StreamState = "writes"
	StreamFrozen  StreamState = "frozen"
	StreamMissing StreamState = "missing"
)

// frozenTries is how often a write has to fail: an election is no freeze.
const frozenTries = 6

// StreamNameOf accepts a stream of account CTRL by its own name, that of its
// bucket, or the last word of it.
func StreamNameOf(word string) (string, error) {
	names := []string{}
	for _, s := range Streams() {
		if word == s.Name || "KV_"+word == s.Name || "KV_UNIBUS_"+word == s.Name || "UNIBUS_"+strings.ToUpper(word) == s.Name {
			return s.Name, nil
		}
		names = append(names, s.Name)
	}
	return "", bus.E(bus.NotFound, "no stream %.70q: there are %s", word, strings.Join(names, ", "))
}

// StateOf tries the stream until it is clear which state it is in, up to a
// quarter of a minute. Unavailable says that it is not: without a quorum every
// stream looks frozen. It needs the rights of ops.
func StateOf(ctx context.Context, nc *nats.Conn, stream string) (StreamState, error) {
	js, err := newJetStream(nc)
	if err != nil {
		return "", err
	}
	ictx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	_, err = js.Stream(ictx, stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return StreamMissing, nil
	}
	var last error
	for range frozenTries {
		if last = probe(ctx, js, definition(stream)); last == nil {
			return StreamWrites, nil
		}
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
	}
	// It is the stream and not the cluster if another one takes a write now.
	for _, other := range Streams() {
		if other.Name != stream && probe(ctx, js, other) == nil {
			return StreamFrozen, nil
		}
	}
	return "", bus.E(bus.Unavailable, "no quorum: neither %s nor any other stream takes a write: %w", stream, last).WithHint("unibusctl cluster status")
}

// Extent is what a stream, or a copy of it, holds.
type Extent struct {
	Messages uint64 `json:"messages"`
	FirstSeq uint64 `json:"first_seq"`
	LastSeq  uint64 `json:"last_seq"`
}

const (
	jszWithin = 2 * time.Second
	// placements is how often a consumer is made until a wanted node serves it:
	// nobody can ask for one.
	placements = 60
)

// replicas asks every server what its own replica of a stream holds. sys is a
// connection in the system account.
func replicas(ctx context.Context, sys *nats.Conn, stream string) (map[string]Extent, error) {
	inbox := sys.NewInbox()
	sub, err := sys.SubscribeSync(inbox)
	if err == nil {
		err = sys.PublishRequest("$SYS.REQ.SERVER.PING.JSZ", inbox, []byte(`{"account":"CTRL","streams":true}`))
	}
	if err != nil {
		return nil, bus.E(bus.Unavailable, "the servers cannot be asked: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	wait, cancel := context.WithTimeout(ctx, jszWithin)
	defer cancel()
	out := map[string]Extent{}
	for len(out) < Replicas {
		m, err := sub.NextMsgWithContext(wait)
		if err != nil {
			break
		}
		var a struct {
			Server struct {
				Name string `json:"name"`
			} `json:"server"`
			Data struct {
				Accounts []struct {
					Name    string `json:"name"`
					Streams []struct {
						Name  string `json:"name"`
						State Extent `json:"state"`
					} `json:"stream_detail"`
				} `json:"account_details"`
			} `json:"data"`
		}
		if json.Unmarshal(m.Data, &a) != nil {
			continue
		}
		for _, account := range a.Data.Accounts {
			for _, s := range account.Streams {
				if account.Name == "CTRL" && s.Name == stream {
					out[a.Server.Name] = s.State
				}
			}
		}
	}
	if len(out) < 2 {
		return nil, bus.E(bus.Unavailable, "%d servers say what they hold of %s: two are needed to know that nothing is left out", len(out), stream).
			WithHint("unibusctl cluster status")
	}
	return out, ctx.Err()
}

// SaveStream hands out every message of a frozen stream, oldest first, under its
// subject. Such a stream has no leader who could say what was committed, and a
// replica that was away may hold less; but what was acknowledged is on two of
// three, so the fullest replica of two that answer has it all. That one is read.
func SaveStream(ctx context.Context, nc, sys *nats.Conn, stream string, each func(StoredRecord) error) (Extent, error) {
	fail := func(err error) (Extent, error) {
		return Extent{}, bus.E(bus.Unavailable, "stream %s cannot be copied: %w", stream, err).WithHint("the same command tries again")
	}
	held, err := replicas(ctx, sys, stream)
	if err != nil {
		return Extent{}, err
	}
	var most uint64
	for _, e := range held {
		most = max(most, e.LastSeq)
	}
	var t *tail
	for range placements {
		if t, err = openConsumer(ctx, nc, stream, nats.ConsumerConfig{DeliverPolicy: nats.DeliverAllPolicy}); err != nil {
			return fail(err)
		}
		if held[t.node].LastSeq == most {
			break
		}
		t.close()
		t = nil
	}
	if t == nil {
		return fail(fmt.Errorf("no consumer was placed on a node that holds sequence %d", most))
	}
	defer t.close()
	var out Extent
	for left := t.pending; left > 0; {
		m, err := t.sub.NextMsg(silence)
		switch {
		case ctx.Err() != nil:
			return fail(ctx.Err())
		case err != nil:
			return fail(err)
		}
		if status := m.Header.Get("Status"); status != "" {
			if err := control(nc, m, status, out.Messages); err != nil {
				return fail(err)
			}
			continue
		}
		md, err := m.Metadata()
		if err != nil {
			return fail(err)
		}
		if out.Messages++; md.Sequence.Consumer != out.Messages {
			return fail(errors.New("a message was lost on the way"))
		}
		if out.LastSeq, left = md.Sequence.Stream, md.NumPending; out.FirstSeq == 0 {
			out.FirstSeq = out.LastSeq
		}
		if err := each(messageRecord(m, md)); err != nil {
			return out, err
		}
	}
	return out, nil
}

func messageRecord(m *nats.Msg, md *nats.MsgMetadata) StoredRecord {
	r := StoredRecord{Key: m.Subject, Revision: md.Sequence.Stream, At: md.Timestamp, Value: m.Data}
	switch {
	case m.Header.Get("KV-Operation") != "" || m.Header.Get("Nats-Marker-Reason") != "":
		r.Value = nil
	case r.Value == nil:
		r.Value = []byte{}
	}
	return r
}

// DeleteStream removes a stream that StateOf has called frozen, and no other: one
// that takes a write after all could take a revoke between the copy and its end.
func DeleteStream(ctx context.Context, nc *nats.Conn, stream string) error {
	js, err := newJetStream(nc)
	if err != nil {
		return err
	}
	if probe(ctx, js, definition(stream)) == nil {
		if err := StreamWrites.Repairable(stream); err != nil {
			return err
		}
	}
	return deleteStream(ctx, nc, stream)
}

// Repairable refuses whatever is not frozen.
func (s StreamState) Repairable(stream string) error {
	switch {
	case s == StreamFrozen || s == StreamWrites && guard.Off(guard.OnlyFrozen):
		return nil
	case s == StreamMissing:
		return bus.E(bus.NotFound, "there is no stream %s", stream).WithHint("unibusctl cluster repair %s --from FILE", stream)
	}
	return bus.E(bus.Conflict, "stream %s is not frozen: it takes writes, and what is written to it must not be lost", stream).
		WithHint("unibusctl --direct cluster check")
}

func deleteStream(ctx context.Context, nc *nats.Conn, stream string) error {
	js, err := newJetStream(nc)
	if err != nil {
		return err
	}
	// Who answers is the stream's leader, and a frozen one has none: that it is
	// gone is the answer.
	for range 5 {
		dctx, cancel := context.WithTimeout(ctx, apiTimeout)
		err = js.DeleteStream(dctx, stream)
		cancel()
		if err == nil || errors.Is(err, jetstream.ErrStreamNotFound) {
			return nil
		}
	}
	return bus.E(bus.Unavailable, "stream %s cannot be deleted: %w", stream, err).WithHint("unibusctl cluster status")
}

// loadPrefix is where a stream that is being made again takes its messages from.
// Only ops may publish there.
const loadPrefix = "unibus.repair."

// Copy reads a copy from its beginning, as often as it is called.
type Copy func(each func(StoredRecord) error) error

// RemakeStream makes a missing stream again from a copy, with the definition of
// this build, and returns when all three replicas hold it, everything has been
// read back, and it takes writes.
//
// Until it is whole the stream listens to other subjects, so that nobody can
// write into it, and no View believes it: it appears at once. Of a bucket the
// newest record of each key is kept, behind all its old revisions; of the audit
// every message, at its old sequence. A service that started meanwhile may have
// made the stream, empty, or an earlier repair may not have come to its end:
// then that one is replaced.
func RemakeStream(ctx context.Context, nc *nats.Conn, stream string, from Copy) (Extent, error) {
	keep, first, err := chosen(stream, from)
	if err != nil {
		return Extent{}, err
	}
	js, err := newJetStream(nc)
	if err != nil {
		return Extent{}, err
	}
	if err := clearPlace(ctx, js, nc, stream); err != nil {
		return Extent{}, err
	}
	want := definition(stream)
	want.FirstSeq = first
	loading := want
	loading.Subjects = []string{loadPrefix + want.Subjects[0]}
	loading.SubjectTransform = &jetstream.SubjectTransformConfig{Source: loading.Subjects[0], Destination: want.Subjects[0]}
	// One replica at first: the log of several keeps each message under the subject
	// it was sent to, and a node that replayed it later, without the transform,
	// would store it there. What a new replica is given are stored subjects.
	loading.Replicas = 1
	if _, err := js.CreateStream(ctx, loading); err != nil {
		return Extent{}, bus.E(bus.Unavailable, "stream %s cannot be made: %w", stream, err).WithHint("unibusctl cluster repair %s --from FILE", stream)
	}
	sum, out, err := load(ctx, nc, stream, first, keep, from)
	if err != nil {
		return out, bus.E(bus.Unavailable, "stream %s cannot be filled: %w", stream, err).WithHint("unibusctl cluster repair %s --from FILE", stream)
	}
	loading.Replicas = Replicas
	if _, err := js.UpdateStream(ctx, loading); err != nil {
		return out, bus.E(bus.Unavailable, "stream %s is filled and gets no more replicas: %w", stream, err).WithHint("unibusctl cluster repair %s --from FILE", stream)
	}
	if err := spread(ctx, js, stream); err != nil {
		return out, err
	}
	if _, err := js.UpdateStream(ctx, want); err != nil {
		return out, bus.E(bus.Unavailable, "stream %s is filled and cannot be opened: %w", stream, err).WithHint("unibusctl cluster repair %s --from FILE", stream)
	}
	if err := settled(ctx, js, stream); err != nil {
		return out, err
	}
	return out, readBack(ctx, nc, stream, out, sum)
}

// chosen is which messages of a copy are kept, by sequence, and the sequence of
// the first one in the new stream.
func chosen(stream string, from Copy) (keep map[uint64]bool, first uint64, err error) {
	newest, last := map[string]uint64{}, uint64(0)
	keep = map[uint64]bool{}
	prefix := strings.TrimSuffix(definition(stream).Subjects[0], ">")
	err = from(func(r StoredRecord) error {
		key, ours := strings.CutPrefix(r.Key, prefix)
		if !ours || r.Revision <= last {
			return bus.E(bus.Invalid, "this is no copy of %s: sequence %d, subject %.80q", stream, r.Revision, r.Key)
		}
		if first == 0 {
			first = r.Revision
		}
		switch last = r.Revision; {
		case stream == AuditStream:
			keep[r.Revision] = true
		case !strings.HasPrefix(key, barrierKeys):
			delete(keep, newest[key])
			newest[key], keep[r.Revision] = r.Revision, true
		}
		return nil
	})
	if stream != AuditStream {
		first = last + 1
	}
	return keep, max(first, 1), err
}

// clearPlace removes what stands where a stream is to be made, if it holds
// nothing that could be missed.
func clearPlace(ctx context.Context, js jetstream.JetStream, nc *nats.Conn, stream string) error {
	st, err := js.Stream(ctx, stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	}
	if err != nil {
		return bus.E(bus.Unavailable, "stream %s: %w", stream, err)
	}
	if t := st.CachedInfo().Config.SubjectTransform; t != nil && strings.HasPrefix(t.Source, loadPrefix) {
		return deleteStream(ctx, nc, stream)
	}
	info, err := st.Info(ctx, jetstream.WithSubjectFilter(">"))
	if err != nil {
		return bus.E(bus.Unavailable, "stream %s: %w", stream, err)
	}
	prefix := strings.TrimSuffix(definition(stream).Subjects[0], ">")
	for subject := range info.State.Subjects {
		if !strings.HasPrefix(strings.TrimPrefix(subject, prefix), barrierKeys) {
			return bus.E(bus.Conflict, "stream %s is there and holds records: no copy takes its place", stream).
				WithHint("unibusctl --direct cluster check")
		}
	}
	return deleteStream(ctx, nc, stream)
}

// loadAhead bounds the messages under way at once.
const loadAhead = 256

// load publishes what is kept, in order, and returns a digest of it.
func load(ctx context.Context, nc *nats.Conn, stream string, first uint64, keep map[uint64]bool, from Copy) (sum [sha256.Size]byte, out Extent, err error) {
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(loadAhead), jetstream.WithDefaultTimeout(apiTimeout))
	if err != nil {
		return sum, out, err
	}
	hash := sha256.New()
	var acks []jetstream.PubAckFuture
	settle := func(left int) error {
		for len(acks) > left {
			select {
			case ack := <-acks[0].Ok():
				if ack.Sequence != first+out.Messages {
					return fmt.Errorf("sequence %d became %d: somebody else writes into it", first+out.Messages, ack.Sequence)
				}
				out.Messages++
				acks = acks[1:]
			case err := <-acks[0].Err():
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	}
	err = from(func(r StoredRecord) error {
		if !keep[r.Revision] {
			return nil
		}
		m := nats.NewMsg(loadPrefix + r.Key)
		if m.Data = r.Value; r.Value == nil {
			m.Header.Set("KV-Operation", "DEL")
		}
		digest(hash, r)
		ack, err := js.PublishMsgAsync(m)
		if err != nil {
			return err
		}
		acks = append(acks, ack)
		return settle(loadAhead / 2)
	})
	if err == nil {
		err = settle(0)
	}
	if out.FirstSeq = first; out.Messages > 0 {
		out.LastSeq = first + out.Messages - 1
	}
	return [sha256.Size]byte(hash.Sum(nil)), out, err
}

func digest(w io.Writer, r StoredRecord) {
	fmt.Fprintf(w, "%s %t %d ", r.Key, r.Value == nil, len(r.Value))
	_, _ = w.Write(r.Value) // a hash
}

// readBack holds what was stored to what was sent.
func readBack(ctx context.Context, nc *nats.Conn, stream string, want Extent, sum [sha256.Size]byte) error {
	if want.Messages == 0 {
		return nil
	}
	wrong := func(err error) error {
		return bus.E(bus.Internal, "stream %s was made again and does not hold what the copy holds: %w", stream, err).WithHint("keep the copy; unibusctl --direct cluster check")
	}
	t, err := openConsumer(ctx, nc, stream, nats.ConsumerConfig{DeliverPolicy: nats.DeliverAllPolicy})
	if err != nil {
		return wrong(err)
	}
	defer t.close()
	hash, n := sha256.New(), uint64(0)
	for n < want.Messages {
		m, err := t.sub.NextMsg(silence)
		if err != nil {
			return wrong(err)
		}
		if status := m.Header.Get("Status"); status != "" {
			if err := control(nc, m, status, n); err != nil {
				return wrong(err)
			}
			continue
		}
		md, err := m.Metadata()
		if err != nil {
			return wrong(err)
		}
		if n++; md.Sequence.Stream != want.FirstSeq+n-1 {
			return wrong(fmt.Errorf("sequence %d is missing", want.FirstSeq+n-1))
		}
		digest(hash, messageRecord(m, md))
	}
	if !bytes.Equal(hash.Sum(nil), sum[:]) {
		return wrong(errors.New("the digests differ"))
	}
	return ctx.Err()
}

// spread waits until three replicas hold what was loaded into one.
func spread(ctx context.Context, js jetstream.JetStream, stream string) error {
	for {
		h := streamHealth(ctx, js, definition(stream))
		if h.Replicas == Replicas && h.Leader != "" && h.FollowersCurrent == Replicas-1 && h.MaxLag == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return bus.E(bus.Unavailable, "stream %s is filled, and not on three nodes in time: leader=%s followers_current=%d/%d",
				stream, h.Leader, h.FollowersCurrent, Replicas-1).WithHint("unibusctl cluster repair %s --from FILE", stream)
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// settled waits until a stream that was made again has three current replicas
// and takes writes.
func settled(ctx context.Context, js jetstream.JetStream, stream string) error {
	for {
		h := streamHealth(ctx, js, definition(stream))
		if h.Err == nil && h.Leader != "" && h.FollowersCurrent == Replicas-1 && probe(ctx, js, definition(stream)) == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return bus.E(bus.Unavailable, "stream %s is made again, and not settled in time: leader=%s followers_current=%d/%d: %v",
				stream, h.Leader, h.FollowersCurrent, Replicas-1, h.Err).WithHint("unibusctl --direct cluster check")
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// Raised says what RaiseReplicas did with one stream.
type Raised struct {
	Stream           string `json:"stream"`
	Was              int    `json:"was"`
	Replicas         int    `json:"replicas"`
	Leader           string `json:"leader"`
	FollowersCurrent int    `json:"followers_current"`
	Written          bool   `json:"written"` // it took a write afterwards
}

// RaiseReplicas gives every stream three replicas, in place, and returns when
// all of them are current and take writes. A stream that differs from its
// definition in anything else is refused, before any is changed.
func RaiseReplicas(ctx context.Context, nc *nats.Conn, progress func(string)) ([]Raised, error) {
	js, err := newJetStream(nc)
	if err != nil {
		return nil, err
	}
	out := []Raised{}
	configs := map[string]jetstream.StreamConfig{}
	for _, want := range Streams() {
		st, err := js.Stream(ctx, want.Name)
		if err != nil {
			return nil, bus.E(bus.Unavailable, "stream %s: %w", want.Name, err).WithHint("unibusctl cluster status")
		}
		is := st.CachedInfo().Config
		out = append(out, Raised{Stream: want.Name, Was: is.Replicas})
		is.Replicas = Replicas
		if err := Verify(is, want); err != nil {
			return nil, err
		}
		configs[want.Name] = is
	}
	for i := range out {
		r := &out[i]
		if r.Was != Replicas {
			progress(fmt.Sprintf("%s: %d replicas become %d", r.Stream, r.Was, Replicas))
			if _, err := js.UpdateStream(ctx, configs[r.Stream]); err != nil {
				return out, bus.E(bus.Unavailable, "stream %s cannot get more replicas: %w", r.Stream, err).WithHint("unibusctl cluster wait")
			}
		}
	}
	for i := range out {
		r := &out[i]
		for !r.Written {
			h := streamHealth(ctx, js, definition(r.Stream))
			r.Replicas, r.Leader, r.FollowersCurrent = h.Replicas, h.Leader, h.FollowersCurrent
			if h.Err == nil && h.Leader != "" && h.FollowersCurrent == Replicas-1 {
				r.Written = probe(ctx, js, definition(r.Stream)) == nil
			}
			if r.Written {
				continue
			}
			select {
			case <-ctx.Done():
				return out, bus.E(bus.Unavailable, "stream %s: leader=%s followers_current=%d/%d: not proven in time", r.Stream, h.Leader, h.FollowersCurrent, Replicas-1).
					WithHint("the same command proves it again")
			case <-time.After(250 * time.Millisecond):
			}
		}
	}
	return slices.Clip(out), nil
}
