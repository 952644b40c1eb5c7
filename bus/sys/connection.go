package sys

import (
	"encoding/json"
	"strconv"
	"time"
)

// Connection is one connection as a server tells of it: in an event
// (nats-server events.go, ClientInfo) or in a list (monitor.go, ConnInfo). The
// texts point into the message. What a client chose itself is Host and Name
// only.
type Connection struct {
	CID        uint64
	Start      time.Time // by the server's clock
	User       []byte    // the nkey it has proven
	Host, Name []byte
	listed     []byte // what a list says of it, as it came
}

// Event is one CONNECT or DISCONNECT of a server.
type Event struct {
	Server, Node []byte // id and name of the server
	Connection
}

// ParseEvent reads an event without building what nobody asks for: each
// authcallout hears two of them for every connection of the cluster.
func ParseEvent(data []byte) (e Event, ok bool) {
	ok = object(data, func(key, value []byte) {
		switch string(key) {
		case "server":
			object(value, func(key, value []byte) {
				switch string(key) {
				case "id":
					e.Server = text(value)
				case "name":
					e.Node = text(value)
				}
			})
		case "client":
			object(value, func(key, value []byte) { e.read(key, value) })
		}
	})
	return e, ok && len(e.Server) > 0 && e.CID != 0
}

func (c *Connection) read(key, value []byte) {
	switch string(key) {
	case "id", "cid":
		c.CID, _ = strconv.ParseUint(string(value), 10, 64)
	case "start":
		_ = c.Start.UnmarshalJSON(value)
	case "user", "authorized_user":
		c.User = text(value)
	case "host", "ip":
		c.Host = text(value)
	case "name":
		c.Name = text(value)
	}
}

// Traffic is what else a list says of a connection. All of it is what the
// server has counted, but Lang and Version, which the client chose.
type Traffic struct {
	Port         int       `json:"port"`
	Lang         string    `json:"lang"`
	Version      string    `json:"version"`
	LastActivity time.Time `json:"last_activity"`
	InMsgs       int64     `json:"in_msgs"`
	OutMsgs      int64     `json:"out_msgs"`
	InBytes      int64     `json:"in_bytes"`
	OutBytes     int64     `json:"out_bytes"`
	Pending      int64     `json:"pending_bytes"`
	Subs         int       `json:"subscriptions"`
}

// Traffic reads the rest of a listed connection; of an event it is empty.
func (c *Connection) Traffic() (t Traffic) {
	_ = json.Unmarshal(c.listed, &t) // what cannot be read is not known
	return t
}
