package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

const (
	// decideWithin is how long a command may take to reach the cluster, prove
	// its View and commit. Without a quorum it is refused by then.
	decideWithin = 2400 * time.Millisecond
	dialTimeout  = 900 * time.Millisecond
	// proveWithin covers the longest lease with its margins.
	proveWithin = kv.DefaultLease + 5*time.Second
)

// direct is one command's own connection to the live KV: the break-glass path,
// which needs a quorum and the ops seed and no service. It decides on a View of
// its own and waits for every lease holder as a service does.
type direct struct {
	nc    *nats.Conn
	view  *kv.View
	store *kv.Store
	close func()
}

// openDirect proves a fresh View before it returns: what a command reads
// afterwards was committed no earlier than its start.
func (a *app) openDirect(ctx context.Context) (*direct, error) {
	if !a.set.direct {
		return nil, &usageError{msg: "this command works on the live KV only", hint: a.command + " --direct ..., on a node, with --ops-seed FILE"}
	}
	if a.set.opsSeed == "" {
		return nil, &usageError{msg: "--direct needs the ops seed: set --ops-seed FILE or UNIBUS_OPS_SEED", hint: "unibusctl env"}
	}
	by := a.now().Add(decideWithin)
	dctx, cancel := context.WithDeadline(ctx, by)
	defer cancel()
	nc, err := a.dialFirst(dctx, a.set.opsSeed, "_INBOX_ops")
	if err != nil {
		return nil, err
	}
	view, err := kv.NewView(kv.ViewConfig{Conn: nc, Service: "unibusctl", Node: "direct", EncryptionKeys: true})
	if err != nil {
		nc.Close()
		return nil, err
	}
	store, err := kv.OpenStore(kv.StoreConfig{View: view, Actor: "direct", By: by, OnWait: func(h kv.Holder, left time.Duration) {
		a.say("waiting for the lease of %s, %s", h.Instance, left.Round(time.Second))
	}})
	if err != nil {
		nc.Close()
		return nil, err
	}
	run, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { view.Run(run); close(done) }()
	d := &direct{nc: nc, view: view, store: store, close: func() { stop(); <-done; nc.Close() }}
	if err := view.Barrier(dctx); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// dialFirst connects to all servers at once and keeps the first that answers:
// a node that hangs must not use up the time of the ones that work.
func (a *app) dialFirst(ctx context.Context, seed, inbox string) (*nats.Conn, error) {
	if a.set.ca == "" {
		return nil, &usageError{msg: "the CA is not known: set --ca FILE or UNIBUS_CA", hint: "unibusctl env"}
	}
	if _, err := readSecret(seed); err != nil {
		return nil, err
	}
	urls := strings.Split(a.set.natsURL, ",")
	type dialed struct {
		nc  *nats.Conn
		err error
	}
	results := make(chan dialed, len(urls))
	for _, u := range urls {
		go func() {
			nc, err := kv.Connect(kv.Link{
				URL: strings.TrimSpace(u), SeedFile: seed, CAFile: a.set.ca, Name: "unibusctl", Inbox: inbox,
				Timeout: dialTimeout, Once: true,
			})
			results <- dialed{nc, err}
		}()
	}
	var failures []string
	for n := range urls {
		select {
		case r := <-results:
			if r.err == nil {
				go func() {
					for range len(urls) - n - 1 {
						if late := <-results; late.nc != nil {
							late.nc.Close()
						}
					}
				}()
				return r.nc, nil
			}
			if code := bus.CodeOf(r.err); code != bus.Unavailable {
				return nil, r.err
			}
			failures = append(failures, r.err.Error())
		case <-ctx.Done():
			failures = append(failures, "no answer in time")
		}
	}
	slices.Sort(failures)
	return nil, bus.E(bus.Unavailable, "no quorum: %s", strings.Join(slices.Compact(failures), "; ")).
		WithHint("unibusctl cluster status")
}

// reading runs an action on a freshly proven View.
func (a *app) reading(do func(c *cli.Context, d *direct) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		d, err := a.openDirect(c.Context)
		if err != nil {
			return err
		}
		defer d.close()
		if err := do(c, d); err != nil {
			return err
		}
		for _, b := range d.view.Broken() {
			a.say("WARNING: %s: record %s (revision %d) cannot be read and denies its key: %v", b.Bucket, b.Key, b.Revision, b.Err)
		}
		return nil
	}
}

// changed is what a write says: what it did, and the proof.
type changed struct {
	What      string   `json:"what"`
	Revision  uint64   `json:"revision"`
	Already   bool     `json:"already"`
	Holders   int      `json:"holders"`  // services that decided on a lease at the change
	Expired   []string `json:"expired"`  // of them, those that did not answer: their lease was waited out
	Callouts  string   `json:"callouts"` // authcallouts that acknowledged, of those that held a lease
	ElapsedMS int64    `json:"elapsed_ms"`
	Verified  bool     `json:"verified"`
}

// changing runs one change to its proof and prints both, then the line about
// the users bucket that scripts look for.
func (a *app) changing(do func(ctx context.Context, c *cli.Context, d *direct) (string, kv.Result, error)) cli.ActionFunc {
	return func(c *cli.Context) error {
		d, err := a.openDirect(c.Context)
		if err != nil {
			return err
		}
		defer d.close()
		ctx, cancel := a.within(c.Context, proveWithin)
		defer cancel()
		what, res, err := do(ctx, c, d)
		if err != nil {
			return unproven(err, a.command)
		}
		out := changed{
			What: what, Revision: res.Revision, Already: res.Already, Holders: res.Holders, Expired: instances(res.Expired),
			Callouts: res.Acknowledged("authcallout"), ElapsedMS: res.Elapsed.Milliseconds(), Verified: true,
		}
		if a.set.json {
			if err := a.print(out, nil); err != nil {
				return err
			}
		} else {
			fmt.Fprintln(a.out, out.String())
		}
		a.bucketLine(ctx, d)
		return nil
	}
}

func (r changed) String() string {
	s := fmt.Sprintf("%s: revision %d, proven by %d of %d lease holders in %d ms", r.What, r.Revision, r.Holders-len(r.Expired), r.Holders, r.ElapsedMS)
	if len(r.Expired) > 0 {
		s += "; waited out the lease of " + strings.Join(r.Expired, ", ")
	}
	return s
}

func instances(hs []kv.Holder) []string {
	out := []string{}
	for _, h := range hs {
		out = append(out, h.Instance)
	}
	return out
}

// unproven turns a change that is committed but not proven into exit 3.
func unproven(err error, command string) error {
	var u *kv.Unproven
	if errors.As(err, &u) {
		return bus.E(bus.Unavailable, "%w", u).WithHint("repeat %s: it proves again", command)
	}
	return err
}

// bucketLine reports the replicas of the users bucket after a write. It goes to
// stderr when stdout is for a program.
func (a *app) bucketLine(ctx context.Context, d *direct) {
	bctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	h := kv.HealthOf(bctx, d.nc, kv.Users)
	leader := h.Leader
	if h.Err != nil || leader == "" {
		leader = "unknown"
	}
	line := fmt.Sprintf("%s: leader=%s followers_current=%d/%d msgs=%d", h.Stream, leader, h.FollowersCurrent, kv.Replicas-1, d.view.UserRecords())
	if a.set.json {
		a.say("%s", line)
		return
	}
	fmt.Fprintln(a.out, line)
}
