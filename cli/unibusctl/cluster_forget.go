package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

// forgetWithin outlasts the election of a new leader of the servers, after the
// old one has died.
const forgetWithin = 20 * time.Second

func (a *app) clusterForgetCommand() *cli.Command {
	return &cli.Command{
		Name: "forget", ArgsUsage: "NODE", Usage: "give a dead node up: nothing waits for its word any more",
		Description: "The servers take the node out of the cluster of the buckets. Changes that take access away are\n" +
			"proven without it from then on, and whatever may still be connected to it nobody can know: forget a\n" +
			"node only when it is certain that it does not run. Two nodes are left, and the loss of one more stops\n" +
			"the bus, until a node of that name, or another one, has joined with an EMPTY store directory.\n\n" +
			"   unibusctl cluster forget n3 --sys-seed secrets/sys.nk",
		Flags:  []cli.Flag{a.sysSeedFlag()},
		Action: a.clusterForget,
	}
}

func (a *app) sysSeedFlag() cli.Flag {
	return &cli.StringFlag{Name: "sys-seed", TakesFile: true, EnvVars: []string{"UNIBUS_SYS_SEED"}, Usage: "`FILE` of the sys nkey; default: sys.nk beside the ops seed"}
}

func (a *app) sysSeedOf(c *cli.Context) (string, error) {
	if seed := c.String("sys-seed"); seed != "" {
		return seed, nil
	}
	if a.set.opsSeed == "" {
		return "", &usageError{msg: "only the sys key may do this: set --sys-seed FILE or UNIBUS_SYS_SEED", hint: "unibusctl env"}
	}
	return filepath.Join(filepath.Dir(a.set.opsSeed), "sys.nk"), nil
}

func (a *app) clusterForget(c *cli.Context) error {
	arg, err := positional(c, "NODE")
	if err != nil {
		return err
	}
	node := arg[0]
	if !nodeNamePattern.MatchString(node) {
		return bus.E(bus.Invalid, "%s is no name of a node", quote(node))
	}
	seed, err := a.sysSeedOf(c)
	if err != nil {
		return err
	}
	ctx, cancel := a.within(c.Context, forgetWithin)
	defer cancel()
	nc, err := a.dialFirst(ctx, seed, "_INBOX_sys")
	if err != nil {
		return err
	}
	defer nc.Close()
	answering, err := askServers(ctx, nc, 0)
	if err != nil {
		return err
	}
	there := names(answering)
	if slices.Contains(there, node) {
		return bus.E(bus.Conflict, "%s is there: the other servers hear it", node).WithHint("stop unibus-nats on %s first, if it is to be given up", node)
	}
	if len(there) < 2 {
		return bus.E(bus.Unavailable, "only %s answers: without a second node there is no quorum to decide this", strings.Join(there, ", ")).WithHint("unibusctl cluster status")
	}
	if err := a.confirm(fmt.Sprintf("forget %s for good? It may come back only with an empty store", node)); err != nil {
		return err
	}
	if err := removePeer(ctx, nc, node); err != nil {
		return err
	}
	if a.set.json {
		return a.print(map[string]any{"forgotten": node, "left": there}, nil)
	}
	fmt.Fprintf(a.out, "forgot %s: left are %s\n", node, strings.Join(there, ", "))
	a.say("two nodes are no reserve: start a new one with an empty store directory soon")
	return nil
}

// removePeer has the servers' leader take a node out of the cluster of
// JetStream (nats-server jetstream_api.go, jsLeaderServerRemoveRequest). Only
// the leader answers, and there may be none for some seconds.
func removePeer(ctx context.Context, nc *nats.Conn, node string) error {
	body, err := json.Marshal(map[string]string{"peer": node})
	if err != nil {
		return err
	}
	for {
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		m, err := nc.RequestWithContext(try, "$JS.API.SERVER.REMOVE", body)
		cancel()
		switch {
		case ctx.Err() != nil:
			return bus.E(bus.Unavailable, "the servers have no leader who could forget %s", node).WithHint("unibusctl cluster status")
		case err == nil:
			return removed(node, m.Data)
		case !errors.Is(err, nats.ErrNoResponders) && !errors.Is(err, context.DeadlineExceeded):
			return bus.E(bus.Unavailable, "the servers cannot be asked: %w", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func removed(node string, data []byte) error {
	var answer struct {
		Success bool `json:"success"`
		Error   *struct {
			Code        int    `json:"err_code"`
			Description string `json:"description"`
		} `json:"error"`
	}
	switch err := json.Unmarshal(data, &answer); {
	case err != nil:
		return bus.E(bus.Internal, "the servers say %.80q", data)
	case answer.Error != nil && answer.Error.Code == serverNotMember:
		return bus.E(bus.NotFound, "no node %s holds buckets: it was never here, or is forgotten", node).WithHint("unibusctl cluster status --direct")
	case answer.Error != nil:
		return bus.E(bus.Conflict, "the servers refuse: %s", answer.Error.Description)
	case !answer.Success:
		return bus.E(bus.Internal, "the servers say %.80q", data)
	}
	return nil
}

// serverNotMember is nats-server's JSClusterServerNotMemberErr.
const serverNotMember = 10044
