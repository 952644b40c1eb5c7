package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
)

func (a *app) connCommand() *cli.Command {
	return &cli.Command{
		Name:     "conn",
		Category: "access",
		Usage:    "who is connected to the bus, and to close connections",
		Subcommands: []*cli.Command{
			{
				Name: "list", Usage: "open connections of users, on all servers",
				Description: "IN is what the client has sent, OUT what it was sent. A server that does not answer is named\n" +
					"and the exit code is 3: what is open there is not known.\n\n" +
					"   unibusctl conn list --user alice\n   unibusctl conn list --room ops --server n2",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "user", Usage: "only those of `USER`"},
					&cli.StringFlag{Name: "room", Usage: "only those of who is in `ROOM` now"},
					&cli.StringFlag{Name: "server", Usage: "only those to `NODE`"},
				},
				Action: a.connList,
			},
			{
				Name: "kick", ArgsUsage: "USER", Usage: "close a user's connections; their clients connect again",
				Description: "It takes no access away: that is user suspend, user revoke and room remove, which close\n" +
					"connections by themselves.\n\n" +
					"   unibusctl conn kick alice --yes\n   unibusctl conn kick alice --server n1 --cid 77 --yes",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "server", Usage: "only those to `NODE`"},
					&cli.Uint64Flag{Name: "cid", Usage: "only connection `NUMBER` of that server"},
					dryRunFlag(),
				},
				Action: a.connKick,
			},
		},
	}
}

func (a *app) connList(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	q := client.ConnectionQuery{Server: c.String("server")}
	var err error
	if u := c.String("user"); u != "" {
		if q.User, err = userName(u); err != nil {
			return err
		}
	}
	if r := c.String("room"); r != "" {
		if q.Room, err = bus.ParseRoomID(r); err != nil {
			return err
		}
	}
	var list bus.ConnectionList
	err = a.reading(c.Context, func(ctx context.Context, b backend) (err error) {
		list, err = b.Connections(ctx, q)
		return err
	})
	if err != nil {
		return err
	}
	if err := a.printConnections(list); err != nil {
		return err
	}
	return a.mustBeAll(list)
}

// mustBeAll is the error of a list in which servers are missing.
func (a *app) mustBeAll(list bus.ConnectionList) error {
	if len(list.Missing) == 0 {
		return nil
	}
	return bus.E(bus.Unavailable, "%s did not answer: what is open there is not known (servers %s)", strings.Join(list.Missing, ", "), list.Servers).
		WithHint("unibusctl cluster status")
}

func (a *app) printConnections(list bus.ConnectionList) error {
	if len(list.Connections) == 0 && !a.set.json {
		a.say("nobody that this selects is connected (servers %s)", list.Servers)
	}
	return a.print(list, func(t table.Writer) {
		t.AppendHeader(table.Row{"user", "server", "cid", "since", "address", "client", "in", "out", "subs"})
		for _, c := range list.Connections {
			t.AppendRow(table.Row{
				shownHandle(c), c.Server, c.CID, stamp(&c.Since), c.Address, clientOf(c),
				traffic(c.InMsgs, c.InBytes), traffic(c.OutMsgs, c.OutBytes), c.Subscriptions,
			})
		}
	})
}

func shownHandle(c bus.ConnectionInfo) string {
	if c.Handle == "" {
		return c.NKey
	}
	return string(c.Handle)
}

// clientOf is what a client calls itself, on one line.
func clientOf(c bus.ConnectionInfo) string {
	return oneLine(strings.TrimSpace(fmt.Sprintf("%s %s %s", c.Name, c.Lang, c.Version)))
}

func traffic(msgs, bytes int64) string { return fmt.Sprintf("%d (%s)", msgs, size(bytes)) }

// size is a number of bytes as people read it.
func size(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for ; f >= 1024 && i < len(units)-1; i++ {
		f /= 1024
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}

func (a *app) connKick(c *cli.Context) error {
	user, err := oneUser(c)
	if err != nil {
		return err
	}
	server, cid := c.String("server"), c.Uint64("cid")
	switch { // what a script left empty must not stand for all
	case c.IsSet("server") && server == "":
		return usagef("--server needs the name of a node")
	case c.IsSet("cid") && cid == 0:
		return usagef("--cid needs the number of a connection, from 1")
	case cid != 0 && server == "":
		return usagef("--cid counts on one server: say --server NODE too")
	}
	if c.Bool("dry-run") {
		return a.reading(c.Context, func(ctx context.Context, b backend) error {
			list, err := b.Connections(ctx, client.ConnectionQuery{User: user, Server: server})
			if err != nil {
				return err
			}
			details := []string{}
			for _, x := range list.Connections {
				if cid == 0 || x.CID == cid {
					details = append(details, fmt.Sprintf("%s/%d from %s, %s", x.Server, x.CID, x.Address, clientOf(x)))
				}
			}
			if err := a.plan(fmt.Sprintf("close %d connections of %s", len(details), user), details...); err != nil {
				return err
			}
			return a.mustBeAll(list)
		})
	}
	if err := a.confirm(fmt.Sprintf("close the connections of %s?", user)); err != nil {
		return err
	}
	return a.proving(c.Context, func(ctx context.Context, b backend) (bus.Change, error) { return b.Kick(ctx, user, server, cid) }, func(context.Context, backend) {})
}
