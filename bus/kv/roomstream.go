package kv

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
)

// RoomStream is the definition of the stream of a durable room. Rollups,
// lifetimes and purges would let one message take others away. Direct reads may
// lag, which a history may and a decision about access may not.
func RoomStream(room bus.RoomID, keep bus.Retention) jetstream.StreamConfig {
	keep = keep.Filled()
	none := func(n int64) int64 {
		if n == 0 {
			return -1
		}
		return n
	}
	return jetstream.StreamConfig{
		Name: bus.RoomStream(room), Subjects: []string{bus.StoreSubscribe(room)},
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld, Storage: jetstream.FileStorage, Replicas: Replicas,
		MaxMsgsPerSubject: -1, MaxConsumers: -1, MaxMsgSize: -1,
		MaxBytes: keep.MaxBytes, MaxMsgs: none(keep.MaxMessages), MaxAge: time.Duration(keep.MaxAgeSeconds) * time.Second,
		Duplicates: bus.DuplicateWindow, DenyDelete: true, DenyPurge: true, AllowDirect: true,
		RePublish: &jetstream.RePublish{Source: bus.StoreSubscribe(room), Destination: bus.FeedSubscribe(room)},
	}
}

// VerifyRoomStream is Verify for what must never differ in the stream of a room.
// Its limits may: they are brought to what the room's record says.
func VerifyRoomStream(got, want jetstream.StreamConfig) error {
	want.MaxBytes, want.MaxMsgs, want.MaxAge, want.AllowDirect = got.MaxBytes, got.MaxMsgs, got.MaxAge, got.AllowDirect
	return Verify(got, want)
}

const (
	// readPatience is how long the reading of a room may make no progress: an
	// election, twice.
	readPatience = 20 * time.Second
	// restoreChunk is how many bytes of messages are on their way to the server
	// at once; it waits for each to be taken.
	restoreChunk = 256 << 10
	// chunkWithin bounds the answer to one of them, loadedWithin that to the last
	// one, when everything is on the leader's disk.
	chunkWithin  = 20 * time.Second
	loadedWithin = 2 * time.Minute
)

// ReadRoom hands out what the stream of a durable room holds, oldest first, up
// to what its newest message is when asked. A record has the subject under which
// the message is stored, its headers, sequence and time. What the room's own
// limits drop meanwhile may be missing. The memory it needs does not depend on
// the room.
//
// What is the newest is said by the stream's leader, who must have heard another
// replica: one that was cut off alone is not believed. NotFound is proven: there
// is no such stream. Every other error is Unavailable, or that of each.
func ReadRoom(ctx context.Context, nc *nats.Conn, room bus.RoomID, each func(StoredRecord) error) (Extent, error) {
	js, err := newJetStream(nc)
	if err != nil {
		return Extent{}, err
	}
	state, err := roomState(ctx, js, room)
	if err != nil {
		return Extent{}, err
	}
	out := Extent{FirstSeq: state.FirstSeq, LastSeq: state.LastSeq}
	next, stuck := state.FirstSeq, time.Now().Add(readPatience)
	for next <= out.LastSeq && state.Msgs > 0 {
		before := next
		next, err = readRoomOnce(ctx, nc, js, room, next, out.LastSeq, func(r StoredRecord) error {
			if out.Messages++; out.Messages == 1 {
				out.FirstSeq = r.Revision
			}
			return each(r)
		})
		var stop *stopped
		switch {
		case errors.As(err, &stop):
			return out, stop.error
		case err == nil:
		case ctx.Err() != nil || next == before && time.Now().After(stuck):
			return out, unread(room, err)
		default:
			select {
			case <-ctx.Done():
			case <-time.After(againAfter):
			}
		}
		if next > before {
			stuck = time.Now().Add(readPatience)
		}
	}
	if out.Messages == 0 {
		out.FirstSeq = out.LastSeq + 1
	}
	return out, nil
}

func unread(room bus.RoomID, err error) error {
	return bus.E(bus.Unavailable, "the messages of room %s cannot be read: %w", room, err).WithHint("unibusctl cluster status")
}

// roomState is what the leader of a room's stream says, if it is one that a
// quorum follows.
func roomState(ctx context.Context, js jetstream.JetStream, room bus.RoomID) (jetstream.StreamState, error) {
	var last error
	for deadline := time.Now().Add(readPatience); ; {
		actx, cancel := context.WithTimeout(ctx, apiTimeout)
		s, err := js.Stream(actx, bus.RoomStream(room))
		cancel()
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return jetstream.StreamState{}, bus.E(bus.NotFound, "room %s has no stream: what it held cannot be read", room).WithHint("unibusctl room show %s", room)
		}
		if err == nil {
			info := s.CachedInfo()
			if c := info.Cluster; c != nil && c.Leader != "" && (len(c.Replicas) == 0 || slices.ContainsFunc(c.Replicas, func(p *jetstream.PeerInfo) bool { return p.Current && !p.Offline })) {
				return info.State, nil
			}
			err = errors.New("its leader hears no other replica")
		}
		last = err
		select {
		case <-ctx.Done():
			return jetstream.StreamState{}, unread(room, errors.Join(last, ctx.Err()))
		case <-time.After(againAfter):
		}
		if time.Now().After(deadline) {
			return jetstream.StreamState{}, unread(room, last)
		}
	}
}

// stopped is an error of who is handed the messages.
type stopped struct{ error }

// readRoomOnce reads from a sequence on until one is reached, and returns the
// sequence to go on with.
func readRoomOnce(ctx context.Context, nc *nats.Conn, js jetstream.JetStream, room bus.RoomID, next, last uint64, each func(StoredRecord) error) (uint64, error) {
	octx, cancel := context.WithTimeout(ctx, apiTimeout)
	t, err := openConsumer(octx, nc, bus.RoomStream(room), nats.ConsumerConfig{DeliverPolicy: nats.DeliverByStartSequencePolicy, OptStartSeq: next})
	cancel()
	if err != nil {
		return next, err
	}
	defer t.close()
	for got, idle := uint64(0), 0; next <= last; {
		m, err := t.sub.NextMsg(silence)
		switch {
		case ctx.Err() != nil:
			return next, ctx.Err()
		case err != nil:
			return next, err
		}
		if status := m.Header.Get("Status"); status != "" {
			if err := control(nc, m, status, got); err != nil {
				return next, err
			}
			// Nothing comes: the replica is behind, or the room keeps the rest no more.
			if idle++; idle%4 == 0 {
				if state, err := roomState(ctx, js, room); err != nil {
					return next, err
				} else if state.FirstSeq > last {
					return last + 1, nil
				}
			}
			if time.Duration(idle)*heartbeat > readPatience {
				return next, errors.New("a replica stays behind")
			}
			continue
		}
		idle = 0
		md, err := m.Metadata()
		if err != nil {
			return next, err
		}
		if got++; md.Sequence.Consumer != got {
			return next, errors.New("a message was lost on the way")
		}
		if md.Sequence.Stream > last {
			break
		}
		r := StoredRecord{Key: m.Subject, Revision: md.Sequence.Stream, At: md.Timestamp, Value: m.Data, Header: m.Header}
		if r.Value == nil {
			r.Value = []byte{}
		}
		if err := each(r); err != nil {
			return next, &stopped{err}
		}
		next = md.Sequence.Stream + 1
	}
	return last + 1, nil
}

// RoomDigest is what a row of messages says, all of it: subjects, headers,
// sequences, times, contents.
type RoomDigest struct{ h hash.Hash }

// NewRoomDigest is that of no message.
func NewRoomDigest() RoomDigest { return RoomDigest{sha256.New()} }

// Add takes the next message.
func (d RoomDigest) Add(r StoredRecord) {
	header := encodeHeader(r.Header)
	fmt.Fprintf(d.h, "%d %d %s %d %d ", r.Revision, r.At.UnixNano(), r.Key, len(header), len(r.Value))
	_, _ = d.h.Write(header) // a hash
	_, _ = d.h.Write(r.Value)
}

// Sum is 64 hex digits.
func (d RoomDigest) Sum() string { return hex.EncodeToString(d.h.Sum(nil)) }

// encodeHeader spells headers as the client library does.
func encodeHeader(h nats.Header) []byte {
	if len(h) == 0 {
		return nil
	}
	names := make([]string, 0, len(h))
	for name := range h {
		names = append(names, name)
	}
	slices.Sort(names)
	var b bytes.Buffer
	b.WriteString("NATS/1.0\r\n")
	for _, name := range names {
		for _, value := range h[name] {
			b.WriteString(name + ": " + value + "\r\n")
		}
	}
	b.WriteString("\r\n")
	return b.Bytes()
}

// CheckRoomMessage says whether a record can be a message of a room behind that
// of sequence after: nothing else may be put into its stream. It asks no more
// than the stream itself does, so that what can be read can be put back, also a
// message that no recorder would store.
func CheckRoomMessage(room bus.RoomID, r StoredRecord, after uint64) error {
	topic, ok := strings.CutPrefix(r.Key, strings.TrimSuffix(bus.StoreSubscribe(room), ">"))
	for token := range strings.SplitSeq(topic, ".") {
		ok = ok && token != "" && token != "*" && token != ">"
	}
	if !ok || strings.ContainsFunc(topic, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return bus.E(bus.Invalid, "%.80q is no message of room %s", r.Key, room)
	}
	if r.Revision <= after || r.Value == nil {
		return bus.E(bus.Invalid, "the messages of room %s are not in order at sequence %d", room, r.Revision)
	}
	for name, values := range r.Header {
		if name == "" || strings.ContainsAny(name+strings.Join(values, ""), "\r\n") {
			return bus.E(bus.Invalid, "message %d of room %s has the header %.80q, which is none", r.Revision, room, name)
		}
	}
	return nil
}

// RoomRestore fills the stream of a durable room that has none. It is used by one
// goroutine: Write for each message in order, then Finish. One that is not
// finished leaves no stream.
type RoomRestore struct {
	nc     *nats.Conn
	js     jetstream.JetStream
	room   bus.RoomID
	want   jetstream.StreamConfig
	extent Extent
	to     string // where the server takes the archive
	buf    bytes.Buffer
	digest RoomDigest
	last   uint64
	count  uint64
}

// BeginRoomRestore makes the server ready for a room's messages, which are said
// to be extent.
//
// It is the servers' own restore of a stream, with an archive that is made from
// messages: publishing them anew would give them another time, which is what a
// room's retention and `since` go by, and drop those whose ids are alike. No
// service may know the room yet: its stream would be made, and listen, already.
func BeginRoomRestore(ctx context.Context, nc *nats.Conn, room bus.RoomID, keep bus.Retention, extent Extent) (*RoomRestore, error) {
	js, err := newJetStream(nc)
	if err != nil {
		return nil, err
	}
	r := &RoomRestore{nc: nc, js: js, room: room, want: RoomStream(room, keep), extent: extent, digest: NewRoomDigest(), last: extent.FirstSeq - 1}
	config := r.want
	config.MaxAge = 0 // until it has been read back
	state := map[string]any{"messages": extent.Messages, "bytes": 0, "first_seq": extent.FirstSeq, "last_seq": extent.LastSeq, "consumer_count": 0}
	request, err := json.Marshal(map[string]any{"config": config, "state": state})
	if err != nil {
		return nil, bus.E(bus.Internal, "encode the restore of room %s: %w", room, err)
	}
	var answer struct {
		Error *jetstream.APIError `json:"error"`
		To    string              `json:"deliver_subject"`
	}
	raw, err := r.ask(ctx, "$JS.API.STREAM.RESTORE."+r.want.Name, request, chunkWithin)
	if err == nil {
		err = json.Unmarshal(raw, &answer)
	}
	switch {
	case err != nil:
		return nil, r.failed(err)
	case answer.Error != nil:
		return nil, r.failed(answer.Error)
	}
	r.to = answer.To
	// The server's archive, in the framing of snappy, which does not compress.
	r.frame(nil)
	r.framed([]byte("NATSARC1"))
	first, err := json.Marshal(state)
	if err != nil {
		return nil, bus.E(bus.Internal, "encode the restore of room %s: %w", room, err)
	}
	r.entry("state.json", time.Time{}, 0, nil, first)
	return r, nil
}

// ask requests, and tells a missing right from a server that does not answer.
func (r *RoomRestore) ask(ctx context.Context, subject string, data []byte, within time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	m, err := r.nc.RequestWithContext(ctx, subject, data)
	if err != nil {
		if last := r.nc.LastError(); last != nil && errors.Is(last, nats.ErrPermissionViolation) {
			err = errors.Join(err, last)
		}
		return nil, err
	}
	return m.Data, nil
}

func (r *RoomRestore) failed(err error) error {
	var api *jetstream.APIError
	switch {
	case errors.As(err, &api) && api.ErrorCode == errRestoreExists:
		return bus.E(bus.Conflict, "there is a stream of room %s already", r.room).WithHint("the same command with --dry-run")
	case errors.Is(err, nats.ErrPermissionViolation):
		return bus.E(bus.Unavailable, "the messages of room %s cannot be restored: the servers do not let this key: %w", r.room, err).
			WithHint("unibusctl config render, and deploy: the right is new")
	}
	return bus.E(bus.Unavailable, "the messages of room %s cannot be restored: %w", r.room, err).WithHint("the same command goes on")
}

// errRestoreExists is nats-server's JSStreamNameExistRestoreFailedErr.
const errRestoreExists = 10130

// entry adds one entry of the archive: lengths, time, sequence, name, headers,
// payload.
func (r *RoomRestore) entry(name string, at time.Time, seq uint64, header, data []byte) {
	var nanos int64
	if !at.IsZero() {
		nanos = at.UnixNano()
	}
	b := binary.AppendUvarint(nil, uint64(len(name)))
	b = binary.AppendVarint(b, nanos)
	b = binary.AppendUvarint(b, seq)
	b = binary.AppendUvarint(b, uint64(len(header)))
	b = binary.AppendUvarint(b, uint64(len(data)))
	r.framed(append(b, name...))
	r.framed(header)
	r.framed(data)
}

// framed adds bytes in frames of at most 64 KiB.
func (r *RoomRestore) framed(p []byte) {
	for part := range slices.Chunk(p, 64<<10) {
		r.frame(part)
	}
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// frame adds one frame: uncompressed data, or the head of the archive.
func (r *RoomRestore) frame(p []byte) {
	if p == nil {
		r.buf.WriteString("\xff\x06\x00\x00sNaPpY")
		return
	}
	n, sum := len(p)+4, crc32.Checksum(p, castagnoli)
	r.buf.Write([]byte{1, byte(n), byte(n >> 8), byte(n >> 16)})
	r.buf.Write(binary.LittleEndian.AppendUint32(nil, (sum>>15|sum<<17)+0xa282ead8))
	r.buf.Write(p)
}

// Write takes the next message.
func (r *RoomRestore) Write(ctx context.Context, m StoredRecord) error {
	if err := CheckRoomMessage(r.room, m, r.last); err != nil {
		return err
	}
	r.last = m.Revision
	r.count++
	r.digest.Add(m)
	r.entry(m.Key, m.At, m.Revision, encodeHeader(m.Header), m.Value)
	for r.buf.Len() >= restoreChunk {
		if err := r.send(ctx, r.buf.Next(restoreChunk)); err != nil {
			return err
		}
	}
	return nil
}

func (r *RoomRestore) send(ctx context.Context, chunk []byte) error {
	raw, err := r.ask(ctx, r.to, chunk, chunkWithin)
	if err == nil {
		err = refusedChunk(raw)
	}
	if err != nil {
		return r.failed(err)
	}
	return nil
}

// refusedChunk is what the server says of a chunk, if it says anything.
func refusedChunk(raw []byte) error {
	var answer struct {
		Error *jetstream.APIError `json:"error"`
	}
	if len(raw) == 0 {
		return nil
	}
	if err := json.Unmarshal(raw, &answer); err != nil {
		return err
	}
	if answer.Error != nil {
		return answer.Error
	}
	return nil
}

// Finish returns when the stream is on three nodes, has been read back and found
// to be what was written, and has the settings that the recorder demands.
func (r *RoomRestore) Finish(ctx context.Context) error {
	if r.count != r.extent.Messages || r.last > r.extent.LastSeq {
		return bus.E(bus.Invalid, "the backup has %d messages of room %s, not the %d that it says", r.count, r.room, r.extent.Messages)
	}
	r.entry("", time.Time{}, 0, nil, nil)
	if err := r.send(ctx, r.buf.Bytes()); err != nil {
		return err
	}
	raw, err := r.ask(ctx, r.to, nil, loadedWithin)
	if err == nil {
		err = refusedChunk(raw)
	}
	if err != nil {
		return r.failed(err)
	}
	if err := r.onThree(ctx); err != nil {
		return err
	}
	if err := r.readBack(ctx); err != nil {
		return err
	}
	s, err := r.js.UpdateStream(ctx, r.want)
	if err != nil {
		return r.failed(err)
	}
	return Verify(s.CachedInfo().Config, r.want)
}

// onThree waits until three replicas hold it.
func (r *RoomRestore) onThree(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, loadedWithin)
	defer cancel()
	for {
		s, err := r.js.Stream(ctx, r.want.Name)
		if err == nil {
			c, current := s.CachedInfo().Cluster, 0
			if c != nil && c.Leader != "" {
				for _, p := range c.Replicas {
					if p.Current && !p.Offline && p.Lag == 0 {
						current++
					}
				}
			}
			if current == Replicas-1 {
				return nil
			}
			err = fmt.Errorf("%d of %d followers are current", current, Replicas-1)
		}
		select {
		case <-ctx.Done():
			return r.failed(fmt.Errorf("the stream is not on three nodes in time: %w", err))
		case <-time.After(againAfter):
		}
	}
}

func (r *RoomRestore) readBack(ctx context.Context) error {
	got := NewRoomDigest()
	extent, err := ReadRoom(ctx, r.nc, r.room, func(m StoredRecord) error { got.Add(m); return nil })
	if err != nil {
		return err
	}
	if extent.LastSeq != r.extent.LastSeq || got.Sum() != r.digest.Sum() {
		return bus.E(bus.Internal, "room %s was restored and does not hold what the backup holds: %d messages up to %d, not %d up to %d",
			r.room, extent.Messages, extent.LastSeq, r.extent.Messages, r.extent.LastSeq).WithHint("keep the backup; unibusctl cluster check")
	}
	return nil
}

// DropRoomStream removes what an interrupted restore has left of a room's stream.
// The caller has made sure that it holds nothing else.
func DropRoomStream(ctx context.Context, nc *nats.Conn, room bus.RoomID) error {
	return deleteStream(ctx, nc, bus.RoomStream(room))
}
