package recorder

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
)

const (
	// MaxMessages bounds one page of a history, pageBytes the payload in it: one
	// message more than that fits always.
	MaxMessages = 1000
	pageBytes   = 1 << 20
)

// Messages reads a room's stored messages behind a sequence, or, if since is not
// zero, those stored from then on: the oldest first, up to limit, fewer when they
// are large, none when there are none so far. What is missing between two of them
// is kept no more. Any replica answers, so the newest may be missing for a moment;
// what is there is as a quorum has stored it. An error is Unavailable.
func (r *Recorder) Messages(ctx context.Context, room bus.RoomID, after uint64, since time.Time, limit int) ([]bus.StoredMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	type get struct {
		Seq       uint64     `json:"seq,omitempty"`
		StartTime *time.Time `json:"start_time,omitempty"`
		Batch     int        `json:"batch"`
		MaxBytes  int        `json:"max_bytes"`
		Next      string     `json:"next_by_subj"`
	}
	ask := get{Seq: after + 1, Batch: min(limit, MaxMessages), MaxBytes: pageBytes, Next: bus.StoreSubscribe(room)}
	if !since.IsZero() {
		ask.Seq, ask.StartTime = 0, &since
	}
	raw, err := json.Marshal(ask)
	if err != nil {
		return nil, bus.E(bus.Internal, "history: %w", err)
	}
	inbox := r.nc.NewInbox()
	sub, err := r.nc.SubscribeSync(inbox)
	if err != nil {
		return nil, noHistory(room, err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := r.nc.PublishRequest("$JS.API.DIRECT.GET."+bus.RoomStream(room), inbox, raw); err != nil {
		return nil, noHistory(room, err)
	}
	out := []bus.StoredMessage{}
	for {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return nil, noHistory(room, err)
		}
		switch m.Header.Get("Status") {
		case "":
		case "204", "404": // that was all; there is none
			return out, nil
		default:
			return nil, noHistory(room, errors.New(m.Header.Get("Status")+" "+m.Header.Get("Description")))
		}
		s, err := r.storedMessage(room, m)
		if err != nil {
			return nil, bus.E(bus.Internal, "a message of room %s cannot be read: %w", room, err)
		}
		out = append(out, s)
	}
}

// Newest is the sequence of the newest message of a room, kept or not, as the
// room's leader knows it; 0 if there was none. An error is Unavailable.
func (r *Recorder) Newest(ctx context.Context, room bus.RoomID) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	s, err := r.js.Stream(ctx, bus.RoomStream(room))
	if err != nil {
		return 0, noHistory(room, err)
	}
	return s.CachedInfo().State.LastSeq, nil
}

func noHistory(room bus.RoomID, err error) error {
	return bus.E(bus.Unavailable, "the messages of room %s cannot be read now: %w", room, err).WithHint("unibusctl cluster status")
}

// storedMessage reads what the server returns: the message with its own headers,
// and the server's. The recorder has let nobody write those.
func (r *Recorder) storedMessage(room bus.RoomID, m *nats.Msg) (bus.StoredMessage, error) {
	in, sender, topic, err := r.senders.ParseRoomSubject(m.Header.Get(nats.JSSubject))
	if err != nil {
		return bus.StoredMessage{}, err
	}
	seq, err := strconv.ParseUint(m.Header.Get(nats.JSSequence), 10, 64)
	if err != nil || in != room {
		return bus.StoredMessage{}, bus.E(bus.Internal, "the server returned no message of this room")
	}
	at, err := time.Parse(time.RFC3339Nano, m.Header.Get(nats.JSTimeStamp))
	if err != nil {
		return bus.StoredMessage{}, err
	}
	s := bus.StoredMessage{Seq: seq, Time: at.UTC(), Sender: sender, NKey: sender.NKey(), Topic: topic, Headers: []bus.MessageHeader{}, Data: m.Data}
	if s.Data == nil {
		s.Data = []byte{}
	}
	for name, values := range m.Header {
		if strings.HasPrefix(name, bus.HeaderPrefix) && len(values) > 0 {
			s.Headers = append(s.Headers, bus.MessageHeader{Name: name, Value: values[0]})
		}
	}
	slices.SortFunc(s.Headers, func(a, b bus.MessageHeader) int { return strings.Compare(a.Name, b.Name) })
	return s, nil
}
