package main

import (
	"bytes"
	"errors"
	"strconv"
)

var errEvent = errors.New("no event of a connection")

// parseConnect takes out of a server's event which connection it opened: the
// server's id and its number for the client.
//
// Every instance hears every connection of the bus, so this is done three times
// for each. encoding/json would read each of the 1,200 bytes twice and cost as
// much as half a signature; one pass that skips what nobody asks for does not.
func parseConnect(event []byte) (server string, client uint64, err error) {
	s, err1 := member(event, "server")
	id, err2 := member(s, "id")
	c, err3 := member(event, "client")
	number, err4 := member(c, "id")
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return "", 0, err
	}
	client, err = strconv.ParseUint(string(number), 10, 64)
	if err != nil || id[0] != '"' {
		return "", 0, errEvent
	}
	return string(id[1 : len(id)-1]), client, nil
}

// member returns the raw value of the first member of a JSON object that has
// this name. Names and values inside of other values are not looked at, nor are
// escapes in names resolved: what a client may choose sits in string values,
// and can pretend nothing. The object must be well-formed as far as it is read.
func member(object []byte, name string) ([]byte, error) {
	rest, ok := bytes.CutPrefix(space(object), []byte("{"))
	for ok {
		rest = space(rest)
		n := skip(rest)
		if n < 2 || rest[0] != '"' {
			break
		}
		key := rest[1 : n-1]
		if rest, ok = bytes.CutPrefix(space(rest[n:]), []byte(":")); !ok {
			break
		}
		rest = space(rest)
		if n = skip(rest); n == 0 {
			break
		}
		if string(key) == name {
			return rest[:n], nil
		}
		rest, ok = bytes.CutPrefix(space(rest[n:]), []byte(","))
	}
	return nil, errEvent
}

func space(b []byte) []byte { return bytes.TrimLeft(b, " \t\r\n") }

// skip is the length of the value at the start of b, 0 if there is none.
func skip(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	switch b[0] {
	case '"':
		for i := 1; ; {
			n := bytes.IndexByte(b[i:], '"')
			if n < 0 {
				return 0
			}
			i += n + 1
			escapes := 0
			for b[i-2-escapes] == '\\' { // ends at b[0] at the latest
				escapes++
			}
			if escapes%2 == 0 {
				return i
			}
		}
	case '{', '[':
		depth := 0
		for i := 0; i < len(b); i++ {
			switch b[i] {
			case '"':
				n := skip(b[i:])
				if n == 0 {
					return 0
				}
				i += n - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
		}
		return 0
	}
	if n := bytes.IndexAny(b, ",}] \t\r\n"); n >= 0 {
		return n
	}
	return len(b)
}
