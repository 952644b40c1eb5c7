package main

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
)

func (a *app) checkCommand() *cli.Command {
	return &cli.Command{
		Name:     "check",
		Category: "cluster",
		Usage:    "publish and subscribe as a client would, on every node",
		Description: "Makes an encrypted durable room for itself, sends numbers into it at --rate while one subscriber on each node of\n" +
			"--nats-url listens, and says what came of them: also while you stop nodes, one at a time. The room is\n" +
			"archived and emptied at the end; its id stays taken, so a job that runs often uses one --room for ever.\n" +
			"Exits as Nagios wants: 0 all well, 1 slow or a node away, 2 messages lost, doubled or out of order, 3 cannot tell.\n\n" +
			"   unibusctl check\n   unibusctl check --duration 10m --rate 200 --json",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "duration", Value: 10 * time.Second, Usage: "how `LONG` to send"},
			&cli.IntFlag{Name: "rate", Value: 20, Usage: "`MESSAGES` a second"},
			&cli.IntFlag{Name: "size", Value: 256, Usage: "`BYTES` of a message"},
			&cli.DurationFlag{Name: "max-gap", Value: 15 * time.Second, Usage: "warn if a subscriber hears nothing for this `TIME`"},
			&cli.BoolFlag{Name: "plain", Usage: "make a room that is not encrypted"},
			&cli.StringFlag{Name: "room", Usage: "`ROOM` to use, durable, in which you may write; default: a new one"},
		},
		Action: a.check,
	}
}

// checkReport is the JSON of unibusctl check.
type checkReport struct {
	Status       string      `json:"status"` // ok, warning, critical or unknown
	Room         bus.RoomID  `json:"room"`
	Sent         uint64      `json:"sent"`
	Stored       uint64      `json:"stored"`
	AckP50MS     float64     `json:"ack_p50_ms"`
	AckP99MS     float64     `json:"ack_p99_ms"`
	AckMaxMS     float64     `json:"ack_max_ms"`
	Nodes        []checkNode `json:"nodes"`
	CleanedUp    bool        `json:"cleaned_up"`
	Interrupted  bool        `json:"interrupted"`
	DurationSecs float64     `json:"duration_seconds"`
}

// checkNode is what one subscriber has heard.
type checkNode struct {
	Node         string  `json:"node"`
	Reached      bool    `json:"reached"`
	Received     uint64  `json:"received"`
	Lost         uint64  `json:"lost"`
	Duplicated   uint64  `json:"duplicated"`
	Reordered    uint64  `json:"reordered"`
	Fetched      uint64  `json:"fetched"` // the feed had left them out
	LongestGapMS float64 `json:"longest_gap_ms"`
	Disconnects  int     `json:"disconnects"`
}

const (
	checkSettle  = 30 * time.Second // for what is under way when the sending ends
	checkCleanup = 30 * time.Second
	checkHeader  = 8
)

// checker is one run.
type checker struct {
	*app
	c     *cli.Context
	ears  []*ear
	voice *client.Room
	room  bus.RoomID
	keys  *client.Keys

	mu     sync.Mutex
	sent   uint64
	stored uint64
	acks   []time.Duration
}

// ear is the subscriber on one node.
type ear struct {
	name    string
	conn    *client.Conn
	api     *client.Client
	hearing *client.Hearing

	mu    sync.Mutex
	seen  map[uint64]bool
	last  uint64
	at    time.Time
	found checkNode
}

func (a *app) check(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	if c.Int("rate") < 1 || c.Int("rate") > 10_000 || c.Int("size") < checkHeader || c.Int("size") > maxLine/2 || c.Duration("duration") <= 0 {
		return usagef("--rate is 1 to 10000, --size %d to %d, --duration more than nothing", checkHeader, maxLine/2)
	}
	k := &checker{app: a, c: c}
	r, err := k.run(c.Context)
	if err != nil {
		return &checkResult{code: 3, line: "UNKNOWN: " + err.Error()}
	}
	if err := a.print(r, func(t table.Writer) {
		t.AppendHeader(table.Row{"node", "received", "lost", "duplicated", "reordered", "fetched", "longest gap", "disconnects"})
		for _, n := range r.Nodes {
			if !n.Reached {
				t.AppendRow(table.Row{n.Node, "not reached"})
				continue
			}
			t.AppendRow(table.Row{n.Node, n.Received, n.Lost, n.Duplicated, n.Reordered, n.Fetched, fmt.Sprintf("%.0f ms", n.LongestGapMS), n.Disconnects})
		}
	}); err != nil {
		return err
	}
	return k.verdict(r)
}

// verdict says in one line what the report means.
func (k *checker) verdict(r checkReport) error {
	code := map[string]int{"ok": 0, "warning": 1, "critical": 2}[r.Status]
	return &checkResult{code: code, line: fmt.Sprintf("%s: sent %d in %.0f s, stored %d, answers p50 %.1f ms, p99 %.1f ms, at most %.0f ms; %d of %d nodes heard all",
		strings.ToUpper(r.Status), r.Sent, r.DurationSecs, r.Stored, r.AckP50MS, r.AckP99MS, r.AckMaxMS, k.complete(r), len(r.Nodes))}
}

func (k *checker) complete(r checkReport) (n int) {
	for _, node := range r.Nodes {
		if node.Reached && node.Lost+node.Duplicated+node.Reordered == 0 {
			n++
		}
	}
	return n
}

func (k *checker) run(ctx context.Context) (r checkReport, err error) {
	if k.set.direct {
		return r, errors.New("--direct is for records: the check is a client like others")
	}
	over, err := k.openAPI()
	if err != nil {
		return r, err
	}
	defer over.Close()
	id, err := readSigner(k.set.identity)
	if err != nil {
		return r, err
	}
	if k.keys, err = k.keysOf(over.Client, id, k.set.identity); err != nil { // one for all connections: they are one user's
		return r, err
	}
	conn, api, err := k.dial(ctx, k.set.natsURL, "unibusctl check", k.keys, nil)
	if err != nil {
		return r, err
	}
	defer api.Close()
	defer conn.Close()
	clean, err := k.makeRoom(ctx, api)
	if err != nil {
		return r, err
	}
	cleaned := false
	defer func() {
		if !cleaned {
			clean()
		}
	}()
	if k.voice, err = k.enter(ctx, conn); err != nil {
		return r, err
	}
	for _, u := range strings.Split(k.set.natsURL, ",") {
		k.ears = append(k.ears, k.listen(ctx, u))
	}
	defer func() {
		for _, e := range k.ears {
			e.close()
		}
	}()
	begun := k.now()
	k.speak(ctx)
	r.DurationSecs = k.now().Sub(begun).Seconds()
	k.settle(ctx)
	r.Room, r.Interrupted = k.room, ctx.Err() != nil
	k.sum(&r)
	cleaned, r.CleanedUp = true, clean()
	return r, nil
}

// makeRoom makes the room, and returns what takes it away again.
func (k *checker) makeRoom(ctx context.Context, api *client.Client) (clean func() bool, err error) {
	if k.room, err = bus.ParseRoomID(k.c.String("room")); err == nil {
		return func() bool { return true }, nil
	} else if k.c.String("room") != "" {
		return nil, err
	}
	var b [8]byte
	if _, err := io.ReadFull(k.rand, b[:]); err != nil {
		return nil, fmt.Errorf("randomness: %w", err)
	}
	k.room = bus.RoomID("check-" + hex.EncodeToString(b[:]))
	bound, cancel := k.within(ctx, changeWithin)
	defer cancel()
	room := client.NewRoom{Room: k.room, Durable: true, Encrypted: !k.c.Bool("plain"), Description: "unibusctl check", Retention: bus.Retention{MaxAgeSeconds: 3600}}
	if _, err := api.CreateRoom(bound, room); err != nil {
		return nil, err
	}
	clean = func() bool {
		bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkCleanup)
		defer cancel()
		if _, err := api.ArchiveRoom(bound, k.room, true); err != nil {
			k.say("WARNING: room %s is left: %v", k.room, err)
			k.say("Try: unibusctl room archive %s --messages purge --yes", k.room)
			return false
		}
		return true
	}
	if room.Encrypted {
		if _, err = k.keys.Announce(bound); err == nil {
			_, err = k.keys.Rekey(bound, k.room, client.RekeyOptions{})
		}
	}
	if err != nil {
		clean()
		return nil, err
	}
	return clean, nil
}

func (k *checker) enter(ctx context.Context, conn *client.Conn) (*client.Room, error) {
	bound, cancel := k.within(ctx, readWithin)
	defer cancel()
	r, err := conn.Room(bound, k.room)
	if err == nil && !r.Durable() {
		err = bus.E(bus.Invalid, "room %s is not durable", k.room)
	}
	return r, err
}

// listen subscribes on one node and no other.
func (k *checker) listen(ctx context.Context, at string) *ear {
	e := &ear{name: at, seen: map[uint64]bool{}}
	if u, err := url.Parse(at); err == nil && u.Host != "" {
		e.name = u.Host
	}
	fail := func(err error) *ear {
		k.say("WARNING: %s: %v", e.name, err)
		e.close()
		e.conn = nil
		return e
	}
	var err error
	if e.conn, e.api, err = k.dial(ctx, at, "unibusctl check", k.keys, e.status); err != nil {
		return fail(err)
	}
	room, err := k.enter(ctx, e.conn)
	if err != nil {
		return fail(err)
	}
	bound, cancel := k.within(ctx, readWithin)
	defer cancel()
	if e.hearing, err = room.Subscribe(bound, client.Hear{Topic: "check"}, e.hear); err != nil {
		return fail(err)
	}
	e.found.Reached = true
	return e
}

func (e *ear) status(s client.Status) {
	if s == client.Disconnected || s == client.Refused {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.found.Disconnects++
	}
}

func (e *ear) hear(m client.Message) {
	if len(m.Data) < checkHeader {
		return
	}
	n, now := binary.BigEndian.Uint64(m.Data), time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.at.IsZero() {
		e.found.LongestGapMS = max(e.found.LongestGapMS, float64(now.Sub(e.at).Microseconds())/1000)
	}
	e.at = now
	switch {
	case e.seen[n]:
		e.found.Duplicated++
		return
	case n < e.last:
		e.found.Reordered++
	}
	e.seen[n], e.last = true, max(e.last, n)
	e.found.Received++
}

func (e *ear) close() {
	if e.conn != nil {
		e.conn.Close()
	}
	if e.api != nil {
		e.api.Close()
		e.api = nil
	}
}

// speak sends numbers at the rate that is asked for, whether answers come or
// not, and waits for the answers.
func (k *checker) speak(ctx context.Context) {
	speaking, cancel := context.WithTimeout(ctx, k.c.Duration("duration"))
	defer cancel()
	answering, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var answers sync.WaitGroup
	tick := time.NewTicker(time.Second / time.Duration(k.c.Int("rate")))
	defer tick.Stop()
	for speaking.Err() == nil {
		select {
		case <-speaking.Done():
			continue
		case <-tick.C:
		}
		k.sent++
		data := make([]byte, k.c.Int("size"))
		binary.BigEndian.PutUint64(data, k.sent)
		begun := time.Now()
		s := k.voice.Send(answering, client.Outgoing{Topic: "check", Data: data})
		answers.Go(func() {
			if _, err := s.Wait(answering); err != nil {
				return
			}
			took := time.Since(begun)
			k.mu.Lock()
			defer k.mu.Unlock()
			k.stored++
			k.acks = append(k.acks, took)
		})
	}
	late := time.AfterFunc(checkSettle, stop)
	defer late.Stop()
	answers.Wait()
}

// settle waits until every ear has heard what was sent, or for as long as it is
// worth.
func (k *checker) settle(ctx context.Context) {
	// Also behind an interruption, which ends the sending and not what was sent.
	bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkSettle)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		waits := false
		for _, e := range k.ears {
			e.mu.Lock()
			waits = waits || e.found.Reached && e.found.Received < k.stored
			e.mu.Unlock()
		}
		if !waits {
			return
		}
		select {
		case <-bound.Done():
			return
		case <-tick.C:
		}
	}
}

func (k *checker) sum(r *checkReport) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r.Sent, r.Stored = k.sent, k.stored
	slices.Sort(k.acks)
	at := func(q float64) float64 {
		if len(k.acks) == 0 {
			return 0
		}
		return float64(k.acks[min(len(k.acks)-1, int(q*float64(len(k.acks))))].Microseconds()) / 1000
	}
	r.AckP50MS, r.AckP99MS, r.AckMaxMS = at(.5), at(.99), at(1)
	r.Status = "ok"
	worse := func(s string) {
		if r.Status != "critical" {
			r.Status = s
		}
	}
	if k.stored < k.sent {
		worse("critical")
	}
	for _, e := range k.ears {
		e.mu.Lock()
		n := e.found
		e.mu.Unlock()
		n.Node = e.name
		if n.Reached {
			n.Fetched, n.Lost = e.hearing.Stats().Fetched, k.stored-min(k.stored, n.Received)
		}
		switch {
		case !n.Reached, n.LongestGapMS > float64(k.c.Duration("max-gap").Milliseconds()):
			worse("warning")
		case n.Lost+n.Duplicated+n.Reordered > 0:
			worse("critical")
		}
		r.Nodes = append(r.Nodes, n)
	}
}
