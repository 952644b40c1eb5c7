package sys

import (
	"context"
	"encoding/json"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
)

// Outcome is what became of the closing of a connection.
type Outcome string

// The outcomes. Only Closed and Gone prove that the connection is no more.
const (
	Closed      Outcome = "closed"      // by us, or its end was reported
	Gone        Outcome = "gone"        // the server knows no such connection
	Unreachable Outcome = "unreachable" // no server of that id hears us
	Silent      Outcome = "silent"      // no answer in time
	Refused     Outcome = "refused"     // the server said something else
)

// Proven reports whether the connection is known to be no more.
func (o Outcome) Proven() bool { return o == Closed || o == Gone }

// KickRequest is what has a server close a connection, at once and without a
// word to its client (nats-server events.go, kickClient).
func KickRequest(server string, cid uint64) (subject string, body []byte) {
	return "$SYS.REQ.SERVER." + server + ".KICK", connectionRequest(cid)
}

// HintRequest is what has a server tell one client that it would do well to
// connect again (events.go, ldmClient). Without a reply subject the server does
// not act.
func HintRequest(server string, cid uint64) (subject string, body []byte) {
	return "$SYS.REQ.SERVER." + server + ".LDM", connectionRequest(cid)
}

func connectionRequest(cid uint64) []byte {
	return append(strconv.AppendUint([]byte(`{"cid":`), cid, 10), '}')
}

// OutcomeOf reads the answer to a KickRequest.
func OutcomeOf(m *nats.Msg) Outcome {
	if len(m.Data) == 0 {
		return Unreachable // no responders
	}
	var answer struct {
		Error *struct {
			Description string `json:"description"`
		} `json:"error"`
	}
	switch err := json.Unmarshal(m.Data, &answer); {
	case err != nil:
		return Refused
	case answer.Error == nil:
		return Closed
	case strings.Contains(answer.Error.Description, "no such client"):
		return Gone
	}
	return Refused
}

// Kick closes one connection and waits for the answer until ctx ends.
func Kick(ctx context.Context, nc *nats.Conn, server string, cid uint64) Outcome {
	subject, body := KickRequest(server, cid)
	m, err := nc.RequestWithContext(ctx, subject, body)
	switch {
	case err == nil:
		return OutcomeOf(m)
	case ctx.Err() != nil:
		return Silent
	}
	return Unreachable // nats.ErrNoResponders, or no connection to ask by
}
