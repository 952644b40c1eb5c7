package callout

import (
	"bytes"
	"encoding/json"
	"strconv"
	"time"
)

// sight is one connection as a server tells of it: in an event (nats-server
// events.go, ClientInfo) or in a list (monitor.go, ConnInfo). The texts point
// into the message. What a client chose itself is host and name only.
type sight struct {
	cid        uint64
	start      time.Time
	user       []byte
	host, name []byte
}

// event is one CONNECT or DISCONNECT of a server.
type event struct {
	server, node []byte // id and name of the server
	sight
}

// parseEvent reads an event without building what nobody asks for: each
// instance hears two of them for every connection of the cluster.
func parseEvent(data []byte) (e event, ok bool) {
	ok = object(data, func(key, value []byte) {
		switch string(key) {
		case "server":
			object(value, func(key, value []byte) {
				switch string(key) {
				case "id":
					e.server = text(value)
				case "name":
					e.node = text(value)
				}
			})
		case "client":
			object(value, func(key, value []byte) { e.read(key, value) })
		}
	})
	return e, ok && len(e.server) > 0 && e.cid != 0
}

func (s *sight) read(key, value []byte) {
	switch string(key) {
	case "id", "cid":
		s.cid, _ = strconv.ParseUint(string(value), 10, 64)
	case "start":
		_ = s.start.UnmarshalJSON(value)
	case "user", "authorized_user":
		s.user = text(value)
	case "host", "ip":
		s.host = text(value)
	case "name":
		s.name = text(value)
	}
}

// page is one answer to a CONNZ request.
type page struct {
	server, node string
	offset       int
	rows         []sight // ascending by cid
	fault        string
}

func parsePage(data []byte) (p page, ok bool) {
	ok = object(data, func(key, value []byte) {
		switch string(key) {
		case "server":
			object(value, func(key, value []byte) {
				switch string(key) {
				case "id":
					p.server = string(text(value))
				case "name":
					p.node = string(text(value))
				}
			})
		case "data":
			object(value, func(key, value []byte) {
				switch string(key) {
				case "offset":
					p.offset, _ = strconv.Atoi(string(value))
				case "connections":
					elements(value, func(value []byte) {
						var s sight
						object(value, func(key, value []byte) { s.read(key, value) })
						p.rows = append(p.rows, s)
					})
				}
			})
		case "error":
			p.fault = string(value)
		}
	})
	return p, ok && p.server != ""
}

// object calls f with the raw members of the JSON object that data is, and
// reports whether it was one from end to end.
func object(data []byte, f func(key, value []byte)) bool {
	return list(data, '{', '}', func(rest []byte) ([]byte, bool) {
		key, rest, ok := value(rest)
		if !ok || key[0] != '"' {
			return nil, false
		}
		rest = space(rest)
		if len(rest) == 0 || rest[0] != ':' {
			return nil, false
		}
		v, rest, ok := value(space(rest[1:]))
		if ok {
			f(text(key), v)
		}
		return rest, ok
	})
}

// elements calls f with the raw elements of a JSON array.
func elements(data []byte, f func(value []byte)) bool {
	return list(data, '[', ']', func(rest []byte) ([]byte, bool) {
		v, rest, ok := value(rest)
		if ok {
			f(v)
		}
		return rest, ok
	})
}

func list(data []byte, begin, end byte, one func(rest []byte) ([]byte, bool)) bool {
	rest := space(data)
	if len(rest) == 0 || rest[0] != begin {
		return false
	}
	rest = space(rest[1:])
	if len(rest) > 0 && rest[0] == end {
		return len(space(rest[1:])) == 0
	}
	for {
		var ok bool
		if rest, ok = one(rest); !ok {
			return false
		}
		rest = space(rest)
		if len(rest) == 0 {
			return false
		}
		switch rest[0] {
		case ',':
			rest = space(rest[1:])
		case end:
			return len(space(rest[1:])) == 0
		default:
			return false
		}
	}
}

// value takes one raw JSON value from the front.
func value(data []byte) (v, rest []byte, ok bool) {
	if len(data) == 0 {
		return nil, nil, false
	}
	switch data[0] {
	case '"':
		n := quoted(data)
		return data[:max(n, 0)], data[max(n, 0):], n > 0
	case '{', '[':
		depth := 0
		for i := 0; i < len(data); i++ {
			switch data[i] {
			case '"':
				n := quoted(data[i:])
				if n < 0 {
					return nil, nil, false
				}
				i += n - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return data[:i+1], data[i+1:], true
				}
			}
		}
		return nil, nil, false
	}
	n := bytes.IndexAny(data, ",]} \t\r\n")
	if n < 0 {
		n = len(data)
	}
	return data[:n], data[n:], n > 0
}

// quoted is the length of the string at the front with its quotes, or -1.
func quoted(data []byte) int {
	for i := 1; ; {
		n := bytes.IndexByte(data[i:], '"')
		if n < 0 {
			return -1
		}
		i += n + 1
		escapes := 0
		for data[i-2-escapes] == '\\' { // ends at data[0] at the latest
			escapes++
		}
		if escapes%2 == 0 {
			return i
		}
	}
}

// text is what a raw JSON string says; nil for another value.
func text(raw []byte) []byte {
	if len(raw) < 2 || raw[0] != '"' {
		return nil
	}
	if bytes.IndexByte(raw, '\\') < 0 {
		return raw[1 : len(raw)-1]
	}
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return nil
	}
	return []byte(s)
}

func space(data []byte) []byte {
	for len(data) > 0 && (data[0] == ' ' || data[0] == '\n' || data[0] == '\r' || data[0] == '\t') {
		data = data[1:]
	}
	return data
}
