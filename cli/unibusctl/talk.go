package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
)

// maxLine bounds one line of input: what a server takes.
const maxLine = 1 << 20

// talkCommands are what people do in rooms, as members.
func (a *app) talkCommands() []*cli.Command {
	topic := &cli.StringFlag{Name: "topic", Usage: "only messages under this `TOPIC`; * is any token, > at the end any others"}
	from := "`now|start|SEQUENCE|TIME|DURATION`: 42, 2027-01-31T12:00:00Z, 10m ago"
	return []*cli.Command{
		{
			Name: "pub", ArgsUsage: "ROOM [TEXT]", Usage: "say something in a room",
			Description: "Without TEXT each line of stdin is a message. In a durable room it returns when a quorum has stored\n" +
				"everything, and prints the sequences. --lines json reads objects with data (base64) or text, and topic.\n\n" +
				"   unibusctl room pub ops 'deploy begins' --topic deploy\n   journalctl -f | unibusctl room pub ops --topic log.n1",
			Flags: []cli.Flag{
				&cli.StringFlag{Name: "topic", Value: "text", Usage: "`TOPIC` of the messages"},
				&cli.StringFlag{Name: "id", Usage: "`ID` of the one message TEXT: repeated within two minutes, it is stored once"},
				&cli.StringFlag{Name: "lines", Value: "text", Usage: "`text|json` on stdin"},
			},
			Action: a.roomPub,
		},
		{
			Name: "sub", ArgsUsage: "ROOM", Usage: "hear a room, until interrupted",
			Description: "A durable room is heard without gaps. With --from and without --follow it ends with what is there.\n" +
				"With --json one object a line.\n\n   unibusctl room sub ops\n   unibusctl room sub ops --from 10m --follow --topic 'log.>'",
			Flags: []cli.Flag{
				topic,
				&cli.StringFlag{Name: "from", Value: "now", Usage: from},
				&cli.BoolFlag{Name: "follow", Usage: "go on with what comes"},
				&cli.IntFlag{Name: "count", Usage: "end after `N` messages"},
			},
			Action: a.roomSub,
		},
		{
			Name: "history", ArgsUsage: "ROOM", Usage: "what a durable room has stored",
			Description: "The newest --limit messages, or those from --from on.\n\n   unibusctl room history ops --limit 20\n   unibusctl room history ops --from 1h --json",
			Flags: []cli.Flag{
				topic,
				&cli.StringFlag{Name: "from", Usage: from},
				&cli.IntFlag{Name: "limit", Value: 100, Usage: "at most `N` messages; 0: all"},
			},
			Action: a.roomHistory,
		},
	}
}

// dial connects the identity to the bus. urls is a comma list; without keys it
// gets its own.
func (a *app) dial(ctx context.Context, urls, name string, keys *client.Keys, onStatus func(client.Status)) (*client.Conn, *client.Client, error) {
	if a.set.direct {
		return nil, nil, &usageError{msg: "--direct is for records: in rooms you are a member like others", hint: a.command}
	}
	b, err := a.openAPI()
	if err != nil {
		return nil, nil, err
	}
	id, err := readSigner(a.set.identity)
	if err != nil {
		return nil, nil, err
	}
	if keys == nil {
		if keys, err = a.keysOf(b.Client, id, a.set.identity); err != nil {
			b.Close()
			return nil, nil, err
		}
	}
	ctx, cancel := a.within(ctx, 15*time.Second)
	defer cancel()
	conn, err := client.Dial(ctx, client.DialConfig{
		URLs: strings.Split(urls, ","), CAFile: a.set.ca, Identity: id, Name: name, API: b.Client, Keys: keys, OnStatus: onStatus,
	})
	if err != nil {
		b.Close()
		return nil, nil, err
	}
	return conn, b.Client, nil
}

// inRoom connects, and does something in a room.
func (a *app) inRoom(ctx context.Context, id bus.RoomID, do func(ctx context.Context, r *client.Room) error) error {
	conn, api, err := a.dial(ctx, a.set.natsURL, programName, nil, func(s client.Status) {
		switch s {
		case client.Disconnected:
			a.say("WARNING: no server; trying again")
		case client.Refused:
			a.say("WARNING: the servers do not let you in; trying again")
		}
	})
	if err != nil {
		return err
	}
	defer api.Close()
	defer conn.Close()
	finding, cancel := a.within(ctx, readWithin)
	r, err := conn.Room(finding, id)
	cancel()
	if err != nil {
		return err
	}
	return do(ctx, r)
}

func (a *app) roomPub(c *cli.Context) error {
	args := c.Args().Slice()
	if len(args) == 0 {
		return usagef("ROOM is missing")
	}
	if len(args) > 2 {
		return usagef("unexpected argument %q: put TEXT in quotes", args[2])
	}
	id, err := bus.ParseRoomID(args[0])
	if err != nil {
		return err
	}
	if _, err := bus.ParseTopic(c.String("topic")); err != nil {
		return err
	}
	lines := c.String("lines")
	if err := oneOf(lines, "text", "json"); err != nil {
		return usagef("--lines: %v", err)
	}
	if c.String("id") != "" && len(args) == 1 {
		return usagef("--id names one message: give its TEXT")
	}
	return a.inRoom(c.Context, id, func(ctx context.Context, r *client.Room) error {
		if len(args) == 2 {
			ctx, cancel := a.within(ctx, changeWithin)
			defer cancel()
			return a.published(ctx, r, r.Send(ctx, client.Outgoing{Topic: c.String("topic"), Data: []byte(args[1]), ID: c.String("id")}))
		}
		return a.publishLines(ctx, r, c.String("topic"), lines == "json")
	})
}

// publishLines sends the lines of stdin, each when the one before is stored: so
// they are in their order for everybody, also in the room's history.
func (a *app) publishLines(ctx context.Context, r *client.Room, topic string, asJSON bool) error {
	in := bufio.NewScanner(a.in)
	in.Buffer(make([]byte, 64<<10), 2*maxLine)
	for in.Scan() {
		o := client.Outgoing{Topic: topic, Data: []byte(in.Text())}
		if asJSON {
			if err := parseOutgoing(in.Bytes(), &o); err != nil {
				return err
			}
		}
		if err := a.published(ctx, r, r.Send(ctx, o)); err != nil {
			return err
		}
	}
	if err := in.Err(); err != nil && !errors.Is(err, io.EOF) {
		return bus.E(bus.Invalid, "stdin: %w", err)
	}
	return nil
}

// parseOutgoing reads one line of JSON.
func parseOutgoing(line []byte, o *client.Outgoing) error {
	var in struct {
		Topic string              `json:"topic"`
		Data  []byte              `json:"data"`
		Text  *string             `json:"text"`
		ID    string              `json:"id"`
		Heads []bus.MessageHeader `json:"headers"`
	}
	d := json.NewDecoder(strings.NewReader(string(line)))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return bus.E(bus.Invalid, "a line of stdin is no message: %w", err).WithHint(`{"topic":"log.n1","text":"disk full"}`)
	}
	if in.Topic != "" {
		o.Topic = in.Topic
	}
	o.Data, o.ID = in.Data, in.ID
	if in.Text != nil {
		o.Data = []byte(*in.Text)
	}
	for _, h := range in.Heads {
		if o.Header == nil {
			o.Header = nats.Header{}
		}
		o.Header[h.Name] = []string{h.Value}
	}
	return nil
}

// published waits for a message to be stored, and says where.
func (a *app) published(ctx context.Context, r *client.Room, s *client.Sending) error {
	seq, err := s.Wait(ctx)
	if err != nil {
		return err
	}
	switch {
	case a.set.json:
		return json.NewEncoder(a.out).Encode(map[string]any{"room": r.ID(), "seq": seq})
	case r.Durable():
		_, err = fmt.Fprintln(a.out, seq)
	}
	return err
}

// startOf reads --from.
func (a *app) startOf(s string) (client.Start, client.MessageQuery, error) {
	switch s {
	case "now":
		return client.FromNow(), client.MessageQuery{}, nil
	case "start":
		return client.FromStart(), client.MessageQuery{}, nil
	}
	if seq, err := strconv.ParseUint(s, 10, 62); err == nil {
		return client.FromSequence(seq), client.MessageQuery{After: max(seq, 1) - 1}, nil
	}
	at, err := a.parseWhen(s, -1)
	return client.FromTime(at), client.MessageQuery{Since: at}, err
}

func (a *app) roomSub(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	from, query, err := a.startOf(c.String("from"))
	if err != nil {
		return err
	}
	hear := client.Hear{From: from, Topic: c.String("topic"), OnLost: func(first, last uint64) {
		a.say("WARNING: messages %d to %d are kept no more", first, last)
	}}
	return a.inRoom(c.Context, id, func(ctx context.Context, r *client.Room) error {
		names := a.handles(ctx, r)
		left := c.Int("count")
		if c.String("from") != "now" && !c.Bool("follow") {
			return a.printHistory(ctx, r, query, hear.Topic, left, names)
		}
		over := make(chan error, 1)
		end := func(err error) {
			select {
			case over <- err:
			default:
			}
		}
		starting, cancel := a.within(ctx, readWithin)
		defer cancel()
		hearing, err := r.Subscribe(starting, hear, func(m client.Message) {
			if left < 0 {
				return
			}
			if err := a.heard(m, names); err != nil {
				end(err)
			}
			if left--; left == 0 {
				left = -1
				end(nil)
			} else if left < 0 {
				left = 0
			}
		})
		if err != nil {
			return err
		}
		defer hearing.Unsubscribe()
		select {
		case err := <-over:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	})
}

func (a *app) roomHistory(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	limit := c.Int("limit")
	if limit < 0 {
		return usagef("--limit is 0 or more")
	}
	query := client.MessageQuery{Newest: limit > 0}
	if f := c.String("from"); f != "" {
		if _, query, err = a.startOf(f); err != nil {
			return err
		}
	}
	return a.inRoom(c.Context, id, func(ctx context.Context, r *client.Room) error {
		return a.printHistory(ctx, r, query, c.String("topic"), limit, a.handles(ctx, r))
	})
}

// printHistory prints what is there, most messages at most; 0: all.
func (a *app) printHistory(ctx context.Context, r *client.Room, q client.MessageQuery, topic string, most int, names map[bus.UserKey]bus.Handle) error {
	newest := q.Newest
	for printed := 0; ; {
		q.Limit = 1000
		if newest {
			q.Limit = min(most, 1000)
		}
		bound, cancel := a.within(ctx, readWithin)
		page, err := r.History(bound, q)
		cancel()
		if err != nil {
			return err
		}
		for _, m := range page {
			if !client.TopicMatches(topic, m.Topic) {
				continue
			}
			if err := a.heard(m, names); err != nil {
				return err
			}
			if printed++; printed == most {
				return nil
			}
		}
		if len(page) == 0 || newest {
			return nil
		}
		q = client.MessageQuery{After: page[len(page)-1].Seq}
	}
}

// handles are what members are called; those who are unknown are shown by key.
func (a *app) handles(ctx context.Context, r *client.Room) map[bus.UserKey]bus.Handle {
	names := map[bus.UserKey]bus.Handle{}
	ctx, cancel := a.within(ctx, readWithin)
	defer cancel()
	members, err := r.Members(ctx)
	if err != nil {
		return names
	}
	for _, m := range members {
		names[m.SignPub] = m.Handle
	}
	return names
}

// heard prints one message, on one line.
func (a *app) heard(m client.Message, names map[bus.UserKey]bus.Handle) error {
	if a.set.json {
		headers := []bus.MessageHeader{}
		for name, values := range m.Header {
			if strings.HasPrefix(name, bus.HeaderPrefix) && len(values) > 0 {
				headers = append(headers, bus.MessageHeader{Name: name, Value: values[0]})
			}
		}
		slices.SortFunc(headers, func(a, b bus.MessageHeader) int { return strings.Compare(a.Name, b.Name) })
		out := heardMessage{Room: m.Room, StoredMessage: bus.StoredMessage{Seq: m.Seq, Time: m.Time, Sender: m.Sender, NKey: m.Sender.NKey(), Topic: m.Topic, Headers: headers, Data: m.Data}}
		if m.Data == nil {
			out.Data = []byte{}
		}
		if utf8.Valid(m.Data) {
			text := string(m.Data)
			out.Text = &text
		}
		if m.Time.IsZero() {
			out.Time = a.now().UTC()
		}
		return json.NewEncoder(a.out).Encode(out)
	}
	who := m.Sender.NKey()
	if h, ok := names[m.Sender]; ok {
		who = string(h)
	}
	at := m.Time
	if at.IsZero() {
		at = a.now()
	}
	_, err := fmt.Fprintln(a.out, oneLine(fmt.Sprintf("%s %s %s: %s", stamp(&at), who, m.Topic, strings.ToValidUTF8(string(m.Data), "\uFFFD"))))
	return err
}

// heardMessage is a message as room sub and room history print it.
type heardMessage struct {
	Room bus.RoomID `json:"room"`
	bus.StoredMessage
	Text *string `json:"text,omitempty"` // data, if it is UTF-8
}
