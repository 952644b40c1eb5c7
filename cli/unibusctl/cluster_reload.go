package main

import (
	"cmp"
	"context"
	"encoding/json"
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
	// reloadWithin bounds one server's reload, backWithin the wait for the
	// cluster behind it: an election, and clients that wait before they try again.
	reloadWithin = 15 * time.Second
	backWithin   = 60 * time.Second
	backEvery    = 100 * time.Millisecond
)

func (a *app) clusterReloadCommand() *cli.Command {
	return &cli.Command{
		Name: "reload", Usage: "have the servers read their configuration again, one after the other",
		Description: "A change in accounts.conf ends every user's connection to the server that takes it over: clients are\n" +
			"back at once, but all servers at the same moment would be an outage. Each server must say that it has\n" +
			"taken its configuration over, every node must be ready and the clients back, before the next one is\n" +
			"asked; the first that is not ends it. Run again, it begins where --node says.\n\n" +
			"   unibusctl cluster reload --sys-seed secrets/sys.nk\n   unibusctl cluster reload --node n2 --node n3 --yes",
		Flags: []cli.Flag{
			a.sysSeedFlag(),
			&cli.StringSliceFlag{Name: "node", Usage: "only `NODE` (repeat), in that order; default: all, by name"},
			dryRunFlag(),
		},
		Action: a.clusterReload,
	}
}

// reloaded is what one reload came to.
type reloaded struct {
	Node       string `json:"node"`
	Clients    int    `json:"clients"`      // connected to all servers before
	Dropped    int    `json:"dropped"`      // at most so many were missing at one moment
	BackMS     int64  `json:"back_ms"`      // until as many were there as before; 0: none was missing
	ReadyMS    int64  `json:"ready_ms"`     // until every node was ready and took its configuration over
	LoadedAt   string `json:"loaded_at"`    // by the server's clock
	NotAllBack bool   `json:"not_all_back"` // some have not come back; they may have ended
}

func (a *app) clusterReload(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	seed, err := a.sysSeedOf(c)
	if err != nil {
		return err
	}
	ctx, cancel := a.within(c.Context, 5*time.Minute)
	defer cancel()
	nc, err := a.dialFirst(ctx, seed, "_INBOX_sys")
	if err != nil {
		return err
	}
	defer nc.Close()
	there, err := askServers(ctx, nc, 0)
	if err != nil {
		return err
	}
	want, err := chosen(c.StringSlice("node"), there)
	if err != nil {
		return err
	}
	if err := a.everyNodeReady(ctx); err != nil {
		return err
	}
	if c.Bool("dry-run") {
		return a.plan("reload " + strings.Join(want, ", ") + ", one after the other")
	}
	if err := a.confirm(fmt.Sprintf("reload %s, one after the other?", strings.Join(want, ", "))); err != nil {
		return err
	}
	done := []reloaded{}
	for i, node := range want {
		r, err := a.reloadOne(ctx, seed, node)
		if err != nil {
			if left := want[i+1:]; len(left) > 0 {
				a.say("not reloaded: %s", strings.Join(left, ", "))
			}
			e := bus.E(bus.CodeOf(err), "%s: %w", node, err)
			return e.WithHint("unibusctl cluster status, and then: unibusctl cluster reload --node %s", strings.Join(want[i:], " --node "))
		}
		done = append(done, r)
		if !a.set.json {
			fmt.Fprintln(a.out, oneLine(reloadLine(r)))
		}
	}
	if a.set.json {
		return a.print(map[string]any{"reloaded": done}, nil)
	}
	return nil
}

func reloadLine(r reloaded) string {
	s := fmt.Sprintf("reloaded %s: ready in %d ms", r.Node, r.ReadyMS)
	switch {
	case r.NotAllBack:
		return s + fmt.Sprintf("; of %d clients some did not come back, at most %d were missing", r.Clients, r.Dropped)
	case r.Dropped > 0:
		return s + fmt.Sprintf("; %d of %d clients were cut off and back after %d ms", r.Dropped, r.Clients, r.BackMS)
	}
	return s + fmt.Sprintf("; none of %d clients was cut off", r.Clients)
}

// chosen is the order in which servers are reloaded.
func chosen(named []string, there []serverState) ([]string, error) {
	all := names(there)
	if len(named) == 0 {
		return all, nil
	}
	for _, n := range named {
		if !slices.Contains(all, n) {
			return nil, bus.E(bus.NotFound, "no server %s answers; there are %s", quote(n), strings.Join(all, ", ")).WithHint("unibusctl cluster status")
		}
	}
	return named, nil
}

// everyNodeReady refuses to touch a cluster that is not whole.
func (a *app) everyNodeReady(ctx context.Context) error {
	nodes, err := a.askHealth(ctx)
	if err != nil {
		return err
	}
	if _, line := judge(nodes, nil, nil); countReady(nodes) < len(nodes) {
		return bus.E(bus.Unavailable, "%s", line).WithHint("unibusctl cluster wait")
	}
	return nil
}

// reloadOne reloads one server and waits for the cluster behind it.
func (a *app) reloadOne(ctx context.Context, seed, node string) (r reloaded, err error) {
	nc, err := a.dialServer(ctx, seed, node)
	if err != nil {
		return r, err
	}
	defer nc.Close()
	before, err := askServers(ctx, nc, 0)
	if err != nil {
		return r, err
	}
	i := slices.IndexFunc(before, func(s serverState) bool { return s.Name == node })
	if i < 0 {
		return r, bus.E(bus.Unavailable, "the server does not answer")
	}
	r = reloaded{Node: node, Clients: clients(before)}
	began := a.now()
	if err := requestReload(ctx, nc, before[i].ID); err != nil {
		return r, err
	}
	gate, cancel := context.WithTimeout(ctx, backWithin)
	defer cancel()
	why := "the server says nothing of a new configuration"
	for {
		now, err := askServers(gate, nc, len(before))
		if err == nil {
			j := slices.IndexFunc(now, func(s serverState) bool { return s.Name == node })
			switch missing := r.Clients - clients(now); {
			case missing > 0:
				r.Dropped, r.BackMS, why = max(r.Dropped, missing), 0, fmt.Sprintf("%d clients are not back", missing)
			case r.Dropped > 0 && r.BackMS == 0:
				r.BackMS = a.now().Sub(began).Milliseconds()
			}
			if r.ReadyMS == 0 && j >= 0 && now[j].LoadedAt.After(before[i].LoadedAt) {
				if err := a.everyNodeReady(gate); err == nil {
					r.ReadyMS, r.LoadedAt = a.now().Sub(began).Milliseconds(), now[j].LoadedAt.UTC().Format(time.RFC3339Nano)
				} else {
					why = err.Error()
				}
			}
			settled := a.now().Sub(began) > time.Second // a server closes connections a moment after it has answered
			if r.ReadyMS > 0 && settled && (r.Dropped == 0 || r.BackMS > 0) {
				return r, nil
			}
			if r.ReadyMS > 0 && a.now().Sub(began) > reloadWithin { // who ends meanwhile never comes back
				r.NotAllBack = true
				return r, nil
			}
		}
		select {
		case <-gate.Done():
			if ctx.Err() != nil {
				return r, ctx.Err()
			}
			return r, bus.E(bus.Unavailable, "not as before within %s: %s", backWithin, why)
		case <-time.After(backEvery):
		}
	}
}

// dialServer connects to the server itself where its address is known: by way of
// another one, the answer to a reload that makes its routes anew would be lost.
func (a *app) dialServer(ctx context.Context, seed, node string) (*nats.Conn, error) {
	for _, u := range strings.Split(a.set.natsURL, ",") {
		nc, err := kv.Connect(kv.Link{
			URL: strings.TrimSpace(u), SeedFile: seed, CAFile: a.set.ca, Name: "unibusctl", Inbox: "_INBOX_sys", Timeout: dialTimeout, Once: true,
		})
		switch {
		case err != nil:
		case nc.ConnectedServerName() == node:
			return nc, nil
		default:
			nc.Close()
		}
	}
	return a.dialFirst(ctx, seed, "_INBOX_sys")
}

// requestReload has a server read its configuration (nats-server events.go,
// reloadConfig). One that refuses it goes on with what it had.
func requestReload(ctx context.Context, nc *nats.Conn, id string) error {
	asking, cancel := context.WithTimeout(ctx, reloadWithin)
	defer cancel()
	m, err := nc.RequestWithContext(asking, "$SYS.REQ.SERVER."+id+".RELOAD", nil)
	if err != nil {
		return bus.E(bus.Unavailable, "the server does not answer: %w", err)
	}
	var answer struct {
		Error *struct {
			Description string `json:"description"`
		} `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return bus.E(bus.Internal, "the server says %.80q", m.Data)
	}
	if answer.Error != nil {
		return bus.E(bus.Invalid, "the server refuses its configuration and goes on with the old one: %s", answer.Error.Description)
	}
	return nil
}

// serverState is what a server says of itself.
type serverState struct {
	Name, ID string
	LoadedAt time.Time
	Clients  int
}

func names(servers []serverState) (out []string) {
	for _, s := range servers {
		out = append(out, s.Name)
	}
	return out
}

func clients(servers []serverState) (n int) {
	for _, s := range servers {
		n += s.Clients
	}
	return n
}

// askServers asks every server about itself, sorted by name: when it took its
// configuration over, and how many connections of users it has. Without a number
// of servers it waits for whoever may still answer.
func askServers(ctx context.Context, nc *nats.Conn, number int) ([]serverState, error) {
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err == nil {
		err = nc.PublishRequest("$SYS.REQ.SERVER.PING.VARZ", inbox, nil)
	}
	if err == nil {
		err = nc.PublishRequest("$SYS.REQ.SERVER.PING.CONNZ", inbox, []byte(`{"auth":true,"acc":"BUS","limit":1}`))
	}
	if err != nil {
		return nil, bus.E(bus.Unavailable, "the servers cannot be asked: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	wait, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	found, whole := map[string]*serverState{}, 0
	for number == 0 || whole < number {
		m, err := sub.NextMsgWithContext(wait)
		if err != nil {
			break
		}
		var answer struct {
			Server struct {
				Name string `json:"name"`
				ID   string `json:"id"`
			} `json:"server"`
			Data struct {
				LoadedAt *time.Time `json:"config_load_time"` // VARZ
				Total    *int       `json:"total"`            // CONNZ
			} `json:"data"`
		}
		if err := json.Unmarshal(m.Data, &answer); err != nil || answer.Server.ID == "" {
			continue
		}
		s := found[answer.Server.ID]
		if s == nil {
			s = &serverState{Name: answer.Server.Name, ID: answer.Server.ID, Clients: -1}
			found[s.ID] = s
		}
		if answer.Data.LoadedAt != nil {
			s.LoadedAt = *answer.Data.LoadedAt
		} else if answer.Data.Total != nil {
			s.Clients = *answer.Data.Total
		}
		if !s.LoadedAt.IsZero() && s.Clients >= 0 {
			whole++
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if whole < max(number, 1) || whole < len(found) {
		return nil, bus.E(bus.Unavailable, "%d of %d servers tell about themselves", whole, max(number, len(found), 1)).WithHint("unibusctl cluster status")
	}
	var out []serverState
	for _, s := range found {
		out = append(out, *s)
	}
	slices.SortFunc(out, func(a, b serverState) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}
