package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

func (a *app) userCommand() *cli.Command {
	return &cli.Command{
		Name:     "user",
		Category: "access",
		Usage:    "who may use the bus",
		Subcommands: []*cli.Command{
			{
				Name:  "add",
				Usage: "register a public key under a handle",
				Description: "A key is registered once and for ever: adding it again is refused and changes nothing.\n\n" +
					"   unibusctl --direct user add --handle alice --sign-pub UA... --role member",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "handle", Required: true, Usage: "short `NAME`: a-z 0-9 _ -, starting with a letter"},
					&cli.StringFlag{Name: "sign-pub", Required: true, Usage: "public `KEY`, 64 hex digits or U..."},
					&cli.StringFlag{Name: "role", Value: string(bus.Member), Usage: "`member|admin`"},
				},
				Action: a.userAdd,
			},
			{
				Name:        "list",
				Usage:       "all users with role and status",
				Description: "   unibusctl --direct user list --json",
				Flags:       []cli.Flag{&cli.BoolFlag{Name: "names", Usage: "handles only, one a line"}},
				Action:      a.reading(a.userList),
			},
			{
				Name: "show", ArgsUsage: "USER",
				Usage:       "one user and their rooms",
				Description: "USER is a handle, 64 hex digits or U...\n\n   unibusctl --direct user show alice",
				Action:      a.reading(a.userShow),
			},
			{
				Name: "revoke", ArgsUsage: "USER",
				Usage: "end a user's access for good",
				Description: "The record and the handle stay. It returns when no service admits the user any more;\n" +
					"repeating it proves that again.\n\n   unibusctl --direct user revoke alice --yes",
				Action: a.userRevoke,
			},
			a.userContextCommand(),
		},
	}
}

func (a *app) userAdd(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	handle, err := bus.ParseHandle(c.String("handle"))
	if err != nil {
		return err
	}
	key, err := bus.ParseUserKey(c.String("sign-pub"))
	if err != nil {
		return err
	}
	role, err := bus.ParseRole(c.String("role"))
	if err != nil {
		return err
	}
	return a.changing(func(ctx context.Context, _ *cli.Context, d *direct) (string, kv.Result, error) {
		res, err := d.store.AddUser(ctx, key, handle, role)
		return fmt.Sprintf("registered %s as %s, %s", key, handle, role), res, err
	})(c)
}

// userView is one user as programs see it.
type userView struct {
	SignPub   bus.UserKey `json:"sign_pub"`
	NKey      string      `json:"nkey"`
	Handle    bus.Handle  `json:"handle"`
	Role      bus.Role    `json:"role"`
	Status    bus.Status  `json:"status"`
	ExpiresAt *time.Time  `json:"expires_at"`
	CreatedAt time.Time   `json:"created_at"`
	RevokedAt *time.Time  `json:"revoked_at"`
	Revision  uint64      `json:"revision"`
}

func viewOf(u bus.User, rev uint64) userView {
	return userView{u.Key, u.Key.NKey(), u.Handle, u.Role, u.Status, u.ExpiresAt, u.CreatedAt, u.RevokedAt, rev}
}

func (a *app) userList(c *cli.Context, d *direct) error {
	if _, err := positional(c); err != nil {
		return err
	}
	users := []userView{}
	for _, u := range d.view.Users() {
		users = append(users, viewOf(u.User, u.Revision))
	}
	if c.Bool("names") {
		for _, u := range users {
			fmt.Fprintln(a.out, u.Handle)
		}
		return nil
	}
	err := a.print(map[string]any{"users": users}, func(t table.Writer) {
		t.AppendHeader(table.Row{"handle", "role", "status", "nkey", "created"})
		for _, u := range users {
			t.AppendRow(table.Row{u.Handle, u.Role, u.Status, u.NKey, u.CreatedAt.Format(time.DateOnly)})
		}
	})
	if len(users) == 0 && err == nil {
		a.say("no users yet; unibusctl --direct bootstrap --handle NAME --sign-pub KEY makes the first admin")
	}
	return err
}

// grantView is one room of a user.
type grantView struct {
	Room    bus.RoomID   `json:"room"`
	Role    bus.RoomRole `json:"role"`
	Durable bool         `json:"durable"`
}

func (a *app) userShow(c *cli.Context, d *direct) error {
	arg, err := positional(c, "USER")
	if err != nil {
		return err
	}
	u, rev, err := d.view.FindUser(arg[0])
	if err != nil {
		return err
	}
	access, err := d.view.Access(u.Key)
	if err != nil {
		return err
	}
	rooms := []grantView{}
	for _, g := range access.Rooms {
		rooms = append(rooms, grantView{g.Room, g.Role, g.Durable})
	}
	v := struct {
		userView
		Rooms []grantView `json:"rooms"`
	}{viewOf(u, rev), rooms}
	return a.print(map[string]any{"user": v}, func(t table.Writer) {
		t.AppendRows([]table.Row{
			{"handle", v.Handle},
			{"role", v.Role},
			{"status", v.Status},
			{"nkey", v.NKey},
			{"sign_pub", v.SignPub.Hex()},
			{"created", stamp(&v.CreatedAt)},
			{"expires", stamp(v.ExpiresAt)},
			{"revoked", stamp(v.RevokedAt)},
			{"revision", v.Revision},
		})
		for _, g := range rooms {
			t.AppendRow(table.Row{"room " + string(g.Room), g.Role})
		}
	})
}

func stamp(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

func (a *app) userRevoke(c *cli.Context) error {
	arg, err := positional(c, "USER")
	if err != nil {
		return err
	}
	if err := a.confirm(fmt.Sprintf("revoke %s for good?", arg[0])); err != nil {
		return err
	}
	return a.changing(func(ctx context.Context, _ *cli.Context, d *direct) (string, kv.Result, error) {
		u, _, err := d.view.FindUser(arg[0])
		if err != nil {
			return "", kv.Result{}, err
		}
		res, err := d.store.RevokeUser(ctx, u.Key)
		if res.Already {
			return fmt.Sprintf("already_revoked %s", u.Handle), res, err
		}
		return fmt.Sprintf("revoked %s", u.Handle), res, err
	})(c)
}
