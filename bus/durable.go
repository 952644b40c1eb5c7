package bus

import (
	"time"
)

// What travels between who sends into a durable room, the recorder, and who
// hears it.

// HeaderPrefix begins the headers of a message that a durable room keeps. All
// others are dropped: to a server they are commands.
const HeaderPrefix = "Unibus-"

const (
	// MessageIDHeader names a message of one sender, in 1 to 64 characters of a-z
	// A-Z 0-9 _ - . : whoever repeats a message under the same id within
	// DuplicateWindow finds it stored once.
	MessageIDHeader = HeaderPrefix + "Msg-Id"
	// OrderHeader holds "<session> <n> <base>": this is message n of a session of
	// the sender, counted from 1, and all before base are decided. Who hears a
	// message whose predecessors, from base on, are not there yet may wait for
	// them: they can still come, when several are sent at once.
	OrderHeader = HeaderPrefix + "Order"
)

// The headers that the server adds to a message of a feed. The recorder lets
// nobody else write them.
const (
	SequenceHeader = "Nats-Sequence"
	TimeHeader     = "Nats-Time-Stamp"
)

// DuplicateWindow is how long a stream knows the ids of messages.
const DuplicateWindow = 2 * time.Minute

// RoomStream is the stream of a durable room, in account BUS.
func RoomStream(room RoomID) string { return "ROOM_" + string(room) }

// Recorded is what the recorder answers a sender: the sequence under which a
// quorum has stored the message, or why it did not try to. No answer means that
// nobody knows: repeat it under the same id.
type Recorded struct {
	Seq       uint64 `json:"seq,omitempty"`
	Duplicate bool   `json:"duplicate,omitempty"` // the id was stored before
	Code      Code   `json:"code,omitempty"`      // Unavailable: try again
	Detail    string `json:"detail,omitempty"`
}

// Tip is what is told under FeedTip: the room's stream is at least so far. It is
// a hint, by which who has heard less fetches what is missing.
type Tip struct {
	Seq uint64 `json:"seq"`
}

// StoredMessage is one message of a durable room as the API gives it.
type StoredMessage struct {
	Seq     uint64          `json:"seq"`
	Time    time.Time       `json:"time"` // when it was stored
	Sender  UserKey         `json:"sign_pub"`
	NKey    string          `json:"nkey"` // of the sender
	Topic   string          `json:"topic"`
	Headers []MessageHeader `json:"headers"` // by name
	Data    []byte          `json:"data"`
}

// MessageHeader is one of a message's headers that begin with HeaderPrefix.
type MessageHeader struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Retention is how long and how much a durable room keeps. When a limit is
// reached the oldest messages go. 0 is no limit, of bytes it is the default.
type Retention struct {
	MaxAgeSeconds int64 `json:"max_age_seconds"`
	MaxBytes      int64 `json:"max_bytes"` // on each node, as stored
	MaxMessages   int64 `json:"max_messages"`
}

// The bounds of a Retention.
const (
	DefaultRoomBytes = 32 << 20
	minRoomBytes     = 1 << 20
	maxRoomBytes     = 4 << 30
	minRoomAge       = int64(DuplicateWindow / time.Second)
	maxRoomAge       = 10 * 366 * 24 * 3600
	maxRoomMessages  = 1 << 40
)

// Validate says whether a room can be kept so.
func (r Retention) Validate() error {
	switch {
	case r.MaxAgeSeconds != 0 && (r.MaxAgeSeconds < minRoomAge || r.MaxAgeSeconds > maxRoomAge):
		return E(Invalid, "max_age_seconds is 0 or %d to %d", minRoomAge, int64(maxRoomAge))
	case r.MaxBytes != 0 && (r.MaxBytes < minRoomBytes || r.MaxBytes > maxRoomBytes):
		return E(Invalid, "max_bytes is 0 or %d to %d", int64(minRoomBytes), int64(maxRoomBytes))
	case r.MaxMessages < 0 || r.MaxMessages > maxRoomMessages:
		return E(Invalid, "max_messages is 0 to %d", int64(maxRoomMessages))
	}
	return nil
}

// Filled is the retention with its defaults.
func (r Retention) Filled() Retention {
	if r.MaxBytes == 0 {
		r.MaxBytes = DefaultRoomBytes
	}
	return r
}

// ParseMessageID accepts 1 to 64 characters of a-z A-Z 0-9 _ - . :
func ParseMessageID(s string) (string, error) {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-', c == '.', c == ':':
		default:
			return "", badMessageID(s)
		}
	}
	if s == "" || len(s) > 64 {
		return "", badMessageID(s)
	}
	return s, nil
}

func badMessageID(s string) *Error {
	return E(Invalid, "message id %s is refused: an id is 1 to 64 of a-z A-Z 0-9 _ - . :", quoted(s))
}
