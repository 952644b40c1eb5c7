package sys

import (
	"testing"

	"github.com/nats-io/nats.go"
)

func TestWhatProvesThatAConnectionIsGone(t *testing.T) {
	for data, want := range map[string]Outcome{
		`{"server":{"name":"n1"}}`: Closed,
		`{"server":{"name":"n1"},"error":{"code":500,"description":"no such client or leafnode id"}}`: Gone,
		`{"server":{"name":"n1"},"error":{"code":500,"description":"server is not running"}}`:         Refused,
		`{"server":`: Refused,
		``:           Unreachable,
	} {
		if got := OutcomeOf(&nats.Msg{Data: []byte(data)}); got != want {
			t.Errorf("%q is %s, want %s", data, got, want)
		}
	}
}
