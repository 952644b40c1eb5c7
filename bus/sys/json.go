package sys

import (
	"bytes"
	"encoding/json"
)

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
