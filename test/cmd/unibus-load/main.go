// Unibus-load keeps clients of stock nats.go talking in a room until it is told
// to end (SIGTERM, SIGINT), and prints what they lived through as one line of
// JSON: what a rolling restart, a rotation or a lost node costs the users.
//
// Exit codes: 0 every client is connected and hears itself at the end, 1 not so,
// 2 usage.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
)

// silence is how long a client may not have heard itself at the end and still
// counts as there.
const silence = 3 * time.Second

// Report is what is printed. A gap is the time between two of its own messages
// that a client heard: what it could not do, whoever was to blame.
type Report struct {
	Clients    int    `json:"clients"`
	Lost       int    `json:"lost"`       // clients that do not hear themselves at the end
	Heard      int    `json:"heard"`      // own messages, of all clients
	Reconnects uint64 `json:"reconnects"` // of all clients
	Denials    int    `json:"denials"`    // connects answered with an authorization error
	LongestMS  int64  `json:"longest_gap_ms"`
	MedianMS   int64  `json:"median_longest_gap_ms"` // of the clients' longest
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	flags := flag.NewFlagSet("unibus-load", flag.ContinueOnError)
	urls := flags.String("nats-url", "", "comma list of servers")
	ca := flags.String("ca", "", "file of the CA of their certificates")
	identity := flags.String("identity", "", "file of the user's seed")
	room := flags.String("room", "", "room in which the user may write")
	n := flags.Int("clients", 30, "number of connections, at most 50")
	every := flags.Duration("every", 100*time.Millisecond, "pause between two messages of a client")
	if err := flags.Parse(args); err != nil || *urls == "" || *identity == "" || *room == "" {
		flags.Usage()
		return 2
	}
	report, err := load(ctx, *urls, *ca, *identity, bus.RoomID(*room), *n, *every)
	if err != nil {
		fmt.Fprintln(os.Stderr, "unibus-load:", err)
		return 1
	}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil || report.Lost > 0 {
		return 1
	}
	return 0
}

func load(ctx context.Context, urls, ca, identity string, room bus.RoomID, n int, every time.Duration) (*Report, error) {
	seed, err := os.ReadFile(identity)
	if err != nil {
		return nil, err
	}
	who, err := sig.ParseIdentity(seed)
	if err != nil {
		return nil, err
	}
	clients := make([]*client, n)
	for i := range clients {
		c := &client{subject: bus.RoomSubject(room, who.Key(), fmt.Sprintf("load.%d", i))}
		clients[i] = c
		opts := []nats.Option{
			nats.Nkey(who.Key().NKey(), who.Sign), nats.CustomInboxPrefix(bus.InboxPrefix(who.Key())), nats.Name("unibus-load"),
			nats.MaxReconnects(-1), nats.IgnoreAuthErrorAbort(), nats.ReconnectWait(250 * time.Millisecond),
			nats.ReconnectJitter(250*time.Millisecond, 250*time.Millisecond), nats.ReconnectBufSize(-1), nats.Timeout(5 * time.Second),
			nats.ErrorHandler(c.failed), nats.ReconnectErrHandler(func(nc *nats.Conn, err error) { c.failed(nc, nil, err) }),
		}
		if ca != "" {
			// Read at each connect: a CA is rotated under programs that go on running.
			opts = append(opts, nats.Secure(&tls.Config{MinVersion: tls.VersionTLS13}),
				nats.ClientTLSConfig(nil, func() (*x509.CertPool, error) { return bus.Roots(ca) }))
		}
		if c.nc, err = nats.Connect(urls, opts...); err != nil {
			return nil, err
		}
		defer c.nc.Close()
		if _, err := c.nc.Subscribe(c.subject, c.heardItself); err != nil {
			return nil, err
		}
	}
	fmt.Fprintf(os.Stderr, "unibus-load: %d clients talk in %s\n", n, room)
	var talking sync.WaitGroup
	for _, c := range clients {
		talking.Go(func() { c.talk(ctx, every) })
	}
	talking.Wait()
	return reportOf(clients, time.Now()), nil
}

// client hears nothing but its own messages.
type client struct {
	nc      *nats.Conn
	subject string

	mu      sync.Mutex
	last    time.Time
	heard   int
	longest time.Duration
	denials int
}

func (c *client) talk(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			_ = c.nc.Publish(c.subject, nil) // what is not heard is what counts
		}
	}
}

func (c *client) heardItself(*nats.Msg) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if c.heard++; c.heard > 1 {
		c.longest = max(c.longest, now.Sub(c.last))
	}
	c.last = now
}

func (c *client) failed(_ *nats.Conn, _ *nats.Subscription, err error) {
	if errors.Is(err, nats.ErrAuthorization) {
		c.mu.Lock()
		c.denials++
		c.mu.Unlock()
	}
}

func reportOf(clients []*client, now time.Time) *Report {
	r := &Report{Clients: len(clients)}
	longest := make([]time.Duration, 0, len(clients))
	for _, c := range clients {
		c.mu.Lock()
		quiet := now.Sub(c.last)
		if !c.nc.IsConnected() || quiet > silence {
			r.Lost++
		}
		longest = append(longest, max(c.longest, quiet))
		r.Heard += c.heard
		r.Denials += c.denials
		c.mu.Unlock()
		r.Reconnects += c.nc.Stats().Reconnects
	}
	slices.Sort(longest)
	if len(longest) > 0 {
		r.LongestMS, r.MedianMS = longest[len(longest)-1].Milliseconds(), longest[len(longest)/2].Milliseconds()
	}
	return r
}
