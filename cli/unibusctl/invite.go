package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
	"unibus.internal/bus/kv"
)

func (a *app) inviteCommand() *cli.Command {
	return &cli.Command{
		Name:        "invite",
		Category:    "access",
		Usage:       "let newcomers register a key of their own",
		Description: "An invite is good once and for a limited time. Whoever holds it becomes a user: send it over\na channel you trust.",
		Subcommands: []*cli.Command{
			a.inviteCreateCommand("create", "make an invite and print the command that the newcomer runs"),
			{
				Name: "list", Usage: "all invites that are remembered, newest first",
				Description: "   unibusctl invite list", Action: a.inviteList,
			},
			{
				Name: "withdraw", ArgsUsage: "ID", Usage: "make an open invite good for nothing",
				Description: "   unibusctl invite withdraw 9f86d081884c7d65 --yes", Action: a.inviteWithdraw,
			},
		},
	}
}

func (a *app) inviteCreateCommand(name, usage string) *cli.Command {
	return &cli.Command{
		Name: name, Usage: usage,
		Description: "The line on stdout is the whole command: API, invite, and the fingerprint of the CA, so that\n" +
			"the newcomer needs nothing else.\n\n" +
			"   unibusctl invite create --handle bob --room ops:writer --room dev:reader --expires 24h",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "role", Value: string(bus.Member), Usage: "`member|admin`"},
			&cli.StringFlag{Name: "handle", Usage: "`NAME` of the newcomer; default: they choose"},
			&cli.StringSliceFlag{Name: "room", Usage: "`ROOM:ROLE` into which it leads; reader, writer or owner (repeat)"},
			&cli.StringFlag{Name: "expires", Value: "24h", Usage: "`DURATION` for which it is good, 1m to 30d"},
		},
		Action: a.inviteCreate,
	}
}

func (a *app) inviteCreate(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	role, err := bus.ParseRole(c.String("role"))
	if err != nil {
		return err
	}
	i := client.NewInvite{Role: role}
	if h := c.String("handle"); h != "" {
		if i.Handle, err = bus.ParseHandle(h); err != nil {
			return err
		}
	}
	for _, s := range c.StringSlice("room") {
		room, err := invitedRoom(s)
		if err != nil {
			return err
		}
		i.Rooms = append(i.Rooms, room)
	}
	if i.TTL, err = parseDuration(c.String("expires")); err != nil {
		return err
	}
	if i.TTL < time.Minute || i.TTL > kv.MaxInvite || i.TTL%time.Second != 0 {
		return bus.E(bus.Invalid, "an invite is good for 1m to 30d, in whole seconds, not %s", c.String("expires"))
	}
	pin, err := caPin(a.set.ca)
	if err != nil {
		return err
	}
	b, err := a.open(c.Context)
	if err != nil {
		return err
	}
	defer b.Close()
	ctx, cancel := a.within(c.Context, changeWithin)
	defer cancel()
	made, err := b.CreateInvite(ctx, i)
	if err != nil {
		return err
	}
	join := a.joinLine(made.Token, pin)
	if a.set.json {
		err = a.print(map[string]any{"invite": made, "join": join}, nil)
	} else {
		a.say("invite %s for %s, until %s; the newcomer runs:", made.ID, describeInvite(made.InviteInfo), stamp(&made.ExpiresAt))
		_, err = fmt.Fprintln(a.out, join)
	}
	a.afterWrite(ctx, b)
	return err
}

// invitedRoom reads ROOM:ROLE; without a role it is writer, as in room add.
func invitedRoom(s string) (bus.InvitedRoom, error) {
	name, roleName, given := strings.Cut(s, ":")
	if !given {
		roleName = string(bus.Writer)
	}
	id, err := bus.ParseRoomID(name)
	if err != nil {
		return bus.InvitedRoom{}, err
	}
	role, err := bus.ParseRoomRole(roleName)
	return bus.InvitedRoom{Room: id, Role: role}, err
}

// joinLine is the command of a newcomer. It says which NATS servers only if
// that is not what join finds out by itself.
func (a *app) joinLine(token, pin string) string {
	line := fmt.Sprintf("%s join %s %s --ca-pin %s", programName, a.set.apiURL, token, pin)
	if id, err := readSigner(a.set.identity); err == nil && !a.set.direct { // the one way to the newcomer that no server can change
		line += " --admin " + id.Key().NKey()
	}
	if a.set.natsURL != natsOf(a.set.apiURL) && !a.defaulted("nats-url") {
		line += " --nats-url " + withoutUserinfo(a.set.natsURL)
	}
	return line
}

// defaulted reports whether nobody has chosen the value of a setting.
func (a *app) defaulted(name string) bool {
	for _, o := range a.set.origins {
		if o.Name == name {
			return o.From == "default"
		}
	}
	return false
}

// caPin is the SHA-256 of the first certificate of a file, in hex: what openssl
// x509 -fingerprint -sha256 shows with colons.
func caPin(file string) (string, error) {
	if file == "" {
		return "", &usageError{msg: "the CA is not known: set --ca FILE or UNIBUS_CA", hint: "unibusctl env"}
	}
	certs, err := readCerts(file)
	if err != nil {
		return "", bus.E(bus.Invalid, "%s %w", file, err)
	}
	sum := sha256.Sum256(certs[0].Raw)
	return hex.EncodeToString(sum[:]), nil
}

func describeInvite(i bus.InviteInfo) string {
	s := string(i.Role)
	if i.Handle != "" {
		s += " " + string(i.Handle)
	}
	return s
}

func (a *app) inviteList(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	var invites []bus.InviteInfo
	err := a.reading(c.Context, func(ctx context.Context, b backend) (err error) {
		invites, err = b.Invites(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if len(invites) == 0 {
		a.say("no invites; unibusctl invite create makes one")
	}
	now := a.now()
	return rows(a, "invites", invites, table.Row{"id", "status", "role", "handle", "rooms", "expires", "used by"}, func(i bus.InviteInfo) table.Row {
		status, used, rooms := string(i.Status), "-", make([]string, len(i.Rooms))
		if i.Status == bus.InviteOpen && !now.Before(i.ExpiresAt) {
			status = "expired"
		}
		if i.UsedBy != nil {
			used = i.UsedBy.NKey()
		}
		for n, r := range i.Rooms {
			rooms[n] = fmt.Sprintf("%s:%s", r.Room, r.Role)
		}
		return table.Row{i.ID, status, i.Role, i.Handle, strings.Join(rooms, " "), stamp(&i.ExpiresAt), used}
	})
}

func (a *app) inviteWithdraw(c *cli.Context) error {
	arg, err := positional(c, "ID")
	if err != nil {
		return err
	}
	if raw, err := hex.DecodeString(arg[0]); err != nil || len(raw) != 8 || strings.ToLower(arg[0]) != arg[0] {
		return bus.E(bus.Invalid, "an invite id is 16 hex digits").WithHint("unibusctl invite list")
	}
	if err := a.confirm(fmt.Sprintf("withdraw invite %s for good?", arg[0])); err != nil {
		return err
	}
	b, err := a.open(c.Context)
	if err != nil {
		return err
	}
	defer b.Close()
	ctx, cancel := a.within(c.Context, changeWithin)
	defer cancel()
	info, already, err := b.WithdrawInvite(ctx, arg[0])
	if err != nil {
		return err
	}
	what := "withdrawn invite " + info.ID
	if already {
		what = "already_" + what
	}
	if a.set.json {
		err = a.print(map[string]any{"what": what, "already": already, "invite": info}, nil)
	} else {
		_, err = fmt.Fprintln(a.out, what)
	}
	a.afterWrite(ctx, b)
	return err
}
