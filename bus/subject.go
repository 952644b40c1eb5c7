package bus

import (
	"strings"
	"sync"
)

// This file is the subject grammar of account BUS. No other file spells a
// subject of a user. Every argument has been parsed by its type, so that no
// token can hold a dot, a wildcard or a space.

// RoomPublish is the one subject space in which a user may send into a room.
// It carries the sender, so the server's permission check is the proof of who
// sent: room.<room>.<U>.<topic...>.
func RoomPublish(room RoomID, user UserKey) string { return RoomPublishBy(user)(room) }

// RoomPublishBy is RoomPublish for one user and many rooms: to spell the key
// again for each costs more than all other work on a list of rights.
func RoomPublishBy(user UserKey) func(RoomID) string {
	behind := "." + user.NKey() + ".>"
	return func(room RoomID) string { return "room." + string(room) + behind }
}

// RoomSubject is the subject of one message; topic is one or more valid tokens
// (see ParseTopic).
func RoomSubject(room RoomID, user UserKey, topic string) string {
	return "room." + string(room) + "." + user.NKey() + "." + topic
}

// RoomSubscribe is what a member of a room without durability hears.
func RoomSubscribe(room RoomID) string { return "room." + string(room) + ".>" }

// FeedSubscribe is what a member of a durable room hears: messages that a
// quorum has stored, republished by the server.
func FeedSubscribe(room RoomID) string { return "feed." + string(room) + ".>" }

// StoreSubject is where the recorder writes a message of a durable room, and
// nobody else may. A stream takes it, and republishes it under FeedSubscribe
// with the sequence that it has there.
func StoreSubject(room RoomID, user UserKey, topic string) string {
	return "store." + string(room) + "." + user.NKey() + "." + topic
}

// StoreSubscribe is what the stream of a durable room takes.
func StoreSubscribe(room RoomID) string { return "store." + string(room) + ".>" }

// FeedTip is where the members of a durable room hear how far it is.
func FeedTip(room RoomID) string { return "feed." + string(room) + "._tip" }

// ParseRoomSubject takes the subject of a message of a room apart: one below
// room, store or feed. Where it stands in the subject says who sent it; whether
// that is proven depends on who could have published there.
func ParseRoomSubject(s string) (room RoomID, user UserKey, topic string, err error) {
	return new(Senders).ParseRoomSubject(s)
}

// Senders remembers the keys of who sends: to see that one is a sound point of
// the curve, spelled in the one way, costs more than all else that is done with
// a message, and a key that is sound once is for ever. The zero value knows
// nobody. It is safe for concurrent use.
type Senders struct {
	mu    sync.Mutex
	known map[string]UserKey
}

// manySenders bounds what a Senders remembers: whoever makes up keys, as far as
// the servers let them, costs time and no memory.
const manySenders = 4096

// Key reads the token of a subject that names the sender, in the one spelling
// that it may have, so that none is taken for another.
func (s *Senders) Key(token string) (UserKey, error) {
	s.mu.Lock()
	k, ok := s.known[token]
	s.mu.Unlock()
	if ok {
		return k, nil
	}
	k, err := ParseUserKey(token)
	if err != nil {
		return UserKey{}, err
	}
	if k.NKey() != token {
		return UserKey{}, E(Invalid, "%s is not how a sender is spelled", quoted(token))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil || len(s.known) == manySenders {
		s.known = map[string]UserKey{}
	}
	s.known[strings.Clone(token)] = k // the token is part of a longer string
	return k, nil
}

// ParseRoomSubject is the function of that name, for who hears many messages.
func (s *Senders) ParseRoomSubject(subject string) (room RoomID, user UserKey, topic string, err error) {
	token := strings.SplitN(subject, ".", 4)
	if len(token) != 4 {
		return "", UserKey{}, "", E(Invalid, "%s is no subject of a room", quoted(subject))
	}
	if room, err = ParseRoomID(token[1]); err != nil {
		return "", UserKey{}, "", err
	}
	if user, err = s.Key(token[2]); err != nil {
		return "", UserKey{}, "", err
	}
	topic, err = ParseTopic(token[3])
	return room, user, topic, err
}

// InboxPrefix is the only inbox a user may hear. Services answer there and
// nowhere else: an answer to any other subject would let a member choose under
// whose name the service speaks.
func InboxPrefix(user UserKey) string { return "_INBOX_" + user.NKey() }

// InboxSubscribe is the permission that covers a user's own inbox.
func InboxSubscribe(user UserKey) string { return InboxPrefix(user) + ".>" }

// OwnInbox says whether a subject is one literal subject in a user's own inbox:
// where a service may answer them.
func OwnInbox(user UserKey, subject string) bool {
	rest, ok := strings.CutPrefix(subject, InboxPrefix(user)+".")
	if !ok || len(rest) > 128 {
		return false
	}
	for token := range strings.SplitSeq(rest, ".") {
		if token == "" || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' || c == '*' || c == '>' }) {
			return false
		}
	}
	return true
}

// NoticeSubscribe is the permission that covers the hints a user gets about
// their own access.
func NoticeSubscribe(user UserKey) string { return "notice." + user.NKey() + ".>" }

// NoticeSubject is where services tell a user of one kind of event.
func NoticeSubject(user UserKey, kind NoticeKind) string {
	return "notice." + user.NKey() + "." + string(kind)
}

// ParseTopic checks the free part of a room subject: 1 to 16 tokens of 1 to 64
// characters a-z A-Z 0-9 _ - each.
func ParseTopic(s string) (string, error) {
	tokens, length := 1, 0
	for i := range len(s) {
		switch c := s[i]; {
		case c == '.':
			if length == 0 {
				return "", badTopic(s)
			}
			tokens, length = tokens+1, 0
			continue
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-':
		default:
			return "", badTopic(s)
		}
		if length++; length > 64 {
			return "", badTopic(s)
		}
	}
	if length == 0 || tokens > 16 {
		return "", badTopic(s)
	}
	return s, nil
}

func badTopic(s string) *Error {
	return E(Invalid, "topic %s is refused: a topic is 1 to 16 tokens of a-z A-Z 0-9 _ - joined by dots", quoted(s))
}
