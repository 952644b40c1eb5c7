package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
)

func (a *app) userCommand() *cli.Command {
	return &cli.Command{
		Name:     "user",
		Category: "access",
		Usage:    "who may use the bus",
		Description: "USER is a handle, 64 hex digits or U... All of it needs an admin, except what is about\n" +
			"yourself.",
		Subcommands: []*cli.Command{
			{
				Name:  "add",
				Usage: "register a public key under a handle",
				Description: "A key is registered once and for ever: adding it again is refused and changes nothing.\n" +
					"unibusctl invite create lets newcomers register their own key.\n\n" +
					"   unibusctl user add --handle alice --sign-pub UA... --role member",
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
				Description: "   unibusctl user list --status suspended --json",
				Flags: []cli.Flag{
					&cli.BoolFlag{Name: "names", Usage: "handles only, one a line"},
					&cli.StringFlag{Name: "status", Usage: "only `active|suspended|revoked`"},
					&cli.StringFlag{Name: "role", Usage: "only `member|admin`"},
				},
				Action: a.userList,
			},
			{
				Name: "show", ArgsUsage: "USER",
				Usage:       "one user and their rooms",
				Description: "   unibusctl user show alice",
				Action:      a.userShow,
			},
			{
				Name: "set", ArgsUsage: "USER",
				Usage: "change a user's handle, role or expiry",
				Description: "Refused if somebody changes the user at the same moment. The last active admin stays one.\n\n" +
					"   unibusctl user set alice --role admin\n" +
					"   unibusctl user set contractor --expires 30d",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "handle", Usage: "new `NAME`; the old one is free again"},
					&cli.StringFlag{Name: "role", Usage: "`member|admin`"},
					&cli.StringFlag{Name: "expires", Usage: "end of access: a `TIME`, a duration (24h, 30d) or never"},
					dryRunFlag(),
				},
				Action: a.userSet,
			},
			{
				Name: "suspend", ArgsUsage: "USER",
				Usage: "take a user's access away until resume",
				Description: "A client library gives up after two refusals unless it is told otherwise: after resume the\n" +
					"user may have to restart their program.\n\n" +
					"   unibusctl user suspend alice",
				Action: a.userChange(func(ctx context.Context, b backend, user string) (bus.Change, error) { return b.SuspendUser(ctx, user) }),
			},
			{
				Name: "resume", ArgsUsage: "USER",
				Usage:       "give a suspended user their access back",
				Description: "   unibusctl user resume alice",
				Action:      a.userChange(func(ctx context.Context, b backend, user string) (bus.Change, error) { return b.ResumeUser(ctx, user) }),
			},
			{
				Name: "revoke", ArgsUsage: "USER",
				Usage: "end a user's access for good",
				Description: "The record and the handle stay. It returns when no service admits the user any more;\n" +
					"repeating it proves that again.\n\n   unibusctl user revoke alice --yes",
				Flags:  []cli.Flag{dryRunFlag()},
				Action: a.userRevoke,
			},
			{
				Name: "rotate", ArgsUsage: "USER",
				Usage: "give a user's handle, role and rooms to a new key, and revoke the old one",
				Description: "For a lost or stolen key, also when it is revoked already. Repeating it finishes what was\n" +
					"interrupted. Users may rotate themselves, with the old key as --identity.\n\n" +
					"   unibusctl user rotate alice --sign-pub UB... --yes",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "sign-pub", Required: true, Usage: "the new public `KEY`, 64 hex digits or U..."},
					dryRunFlag(),
				},
				Action: a.userRotate,
			},
			a.userVerifyCommand(),
			a.userContextCommand(),
			a.inviteCreateCommand("invite", "the same as unibusctl invite create"),
		},
	}
}

func (a *app) whoamiCommand() *cli.Command {
	return &cli.Command{
		Name: "whoami", Category: "access",
		Usage:       "the user of --identity, as the cluster knows them",
		Description: "   unibusctl whoami --json",
		Action: func(c *cli.Context) error {
			if _, err := positional(c); err != nil {
				return err
			}
			return a.reading(c.Context, func(ctx context.Context, b backend) error {
				me, err := b.Me(ctx)
				if err != nil {
					return err
				}
				return a.printUser(me)
			})
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
	return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) { return b.AddUser(ctx, key, handle, role) })
}

func (a *app) userList(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	status, role := c.String("status"), c.String("role")
	if !slices.Contains([]string{"", string(bus.Active), string(bus.Suspended), string(bus.Revoked)}, status) {
		return bus.E(bus.Invalid, "status %s is refused: a status is active, suspended or revoked", quote(status))
	}
	if _, err := bus.ParseRole(role); role != "" && err != nil {
		return err
	}
	var users []bus.UserInfo
	err := a.reading(c.Context, func(ctx context.Context, b backend) (err error) {
		users, err = b.Users(ctx)
		return err
	})
	if err != nil {
		return err
	}
	none := len(users) == 0
	users = slices.DeleteFunc(users, func(u bus.UserInfo) bool {
		return status != "" && string(u.Status) != status || role != "" && string(u.Role) != role
	})
	// A handle may be that of a revoked key and of the one that took it over.
	slices.SortFunc(users, func(x, y bus.UserInfo) int {
		return cmp.Or(cmp.Compare(x.Handle, y.Handle), cmp.Compare(x.Status, y.Status), slices.Compare(x.SignPub[:], y.SignPub[:]))
	})
	if c.Bool("names") {
		for _, u := range users {
			fmt.Fprintln(a.out, u.Handle)
		}
		return nil
	}
	if none {
		a.say("no users yet; unibusctl --direct bootstrap --handle NAME --sign-pub KEY makes the first admin")
	}
	return rows(a, "users", users, table.Row{"handle", "role", "status", "nkey", "created"}, func(u bus.UserInfo) table.Row {
		return table.Row{u.Handle, u.Role, u.Status, u.NKey, u.CreatedAt.Format(time.DateOnly)}
	})
}

func (a *app) userShow(c *cli.Context) error {
	user, err := oneUser(c)
	if err != nil {
		return err
	}
	return a.reading(c.Context, func(ctx context.Context, b backend) error {
		u, err := b.User(ctx, user)
		if err != nil {
			return err
		}
		return a.printUser(u)
	})
}

func (a *app) printUser(u bus.UserDetail) error {
	return a.print(map[string]any{"user": u}, func(t table.Writer) {
		t.AppendRows([]table.Row{
			{"handle", u.Handle},
			{"role", u.Role},
			{"status", u.Status},
			{"nkey", u.NKey},
			{"sign_pub", u.SignPub.Hex()},
			{"created", stamp(&u.CreatedAt)},
			{"expires", stamp(u.ExpiresAt)},
			{"revoked", stamp(u.RevokedAt)},
		})
		if u.RotatedTo != nil {
			t.AppendRow(table.Row{"rotated to", *u.RotatedTo})
		}
		if u.EncryptionKey != nil {
			t.AppendRow(table.Row{"encryption key", fmt.Sprintf("number %d, since %s", u.EncryptionKey.N, stamp(&u.EncryptionKey.CreatedAt))})
		}
		t.AppendRow(table.Row{"revision", u.Revision})
		for _, g := range u.Rooms {
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

// oneUser is the only argument of a command.
func oneUser(c *cli.Context) (string, error) {
	arg, err := positional(c, "USER")
	if err != nil {
		return "", err
	}
	return userName(arg[0])
}

// userChange is a change that needs nothing but the user.
func (a *app) userChange(do func(ctx context.Context, b backend, user string) (bus.Change, error)) cli.ActionFunc {
	return func(c *cli.Context) error {
		user, err := oneUser(c)
		if err != nil {
			return err
		}
		return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) { return do(ctx, b, user) })
	}
}

func (a *app) userRevoke(c *cli.Context) error {
	user, err := oneUser(c)
	if err != nil {
		return err
	}
	if c.Bool("dry-run") {
		return a.reading(c.Context, func(ctx context.Context, b backend) error {
			u, err := b.User(ctx, user)
			if err != nil {
				return err
			}
			if u.Status == bus.Revoked {
				return a.plan(fmt.Sprintf("prove again that %s is revoked", u.Handle))
			}
			return a.plan(fmt.Sprintf("revoke %s for good: %s, %s, %s", u.Handle, u.NKey, u.Role, u.Status), loses(u)...)
		})
	}
	if err := a.confirm(fmt.Sprintf("revoke %s for good?", user)); err != nil {
		return err
	}
	return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) { return b.RevokeUser(ctx, user) })
}

// loses lists the rooms of a user for --dry-run.
func loses(u bus.UserDetail) []string {
	out := []string{}
	for _, g := range u.Rooms {
		out = append(out, fmt.Sprintf("%s of room %s", g.Role, g.Room))
	}
	return out
}

func (a *app) userRotate(c *cli.Context) error {
	user, err := oneUser(c)
	if err != nil {
		return err
	}
	to, err := bus.ParseUserKey(c.String("sign-pub"))
	if err != nil {
		return err
	}
	if c.Bool("dry-run") {
		return a.reading(c.Context, func(ctx context.Context, b backend) error {
			u, err := b.User(ctx, user)
			if err != nil {
				return err
			}
			return a.plan(fmt.Sprintf("give handle and role of %s (%s) to %s, with these rooms, and revoke %s", u.Handle, u.Role, to, u.NKey), loses(u)...)
		})
	}
	if err := a.confirm(fmt.Sprintf("rotate %s to the new key and revoke the old one for good?", user)); err != nil {
		return err
	}
	return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) { return b.RotateUser(ctx, user, to) })
}

func (a *app) userSet(c *cli.Context) error {
	user, err := oneUser(c)
	if err != nil {
		return err
	}
	p, err := a.userPatch(c)
	if err != nil {
		return err
	}
	if c.Bool("dry-run") {
		return a.reading(c.Context, func(ctx context.Context, b backend) error {
			u, err := b.User(ctx, user)
			if err != nil {
				return err
			}
			return a.plan("change "+string(u.Handle), differences(u.UserInfo, p)...)
		})
	}
	return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) {
		u, err := b.User(ctx, user)
		if err != nil {
			return bus.Change{}, err
		}
		p.Revision = u.Revision
		return b.PatchUser(ctx, u.NKey, p)
	})
}

// userPatch is what the flags of user set ask for.
func (a *app) userPatch(c *cli.Context) (client.UserPatch, error) {
	var p client.UserPatch
	if c.IsSet("handle") {
		h, err := bus.ParseHandle(c.String("handle"))
		if err != nil {
			return p, err
		}
		p.Handle = &h
	}
	if c.IsSet("role") {
		r, err := bus.ParseRole(c.String("role"))
		if err != nil {
			return p, err
		}
		p.Role = &r
	}
	if c.IsSet("expires") {
		p.Expires = true
		if s := c.String("expires"); s != "never" {
			at, err := a.parseWhen(s, 1)
			if err != nil {
				return p, err
			}
			p.ExpiresAt = &at
		}
	}
	if p.Handle == nil && p.Role == nil && !p.Expires {
		return p, usagef("nothing to change: --handle, --role or --expires")
	}
	return p, nil
}

// differences spells out a patch against what is there.
func differences(u bus.UserInfo, p client.UserPatch) []string {
	out := []string{}
	differ := func(what, from, to string) {
		if from != to {
			out = append(out, fmt.Sprintf("%s: %s becomes %s", what, from, to))
		}
	}
	if p.Handle != nil {
		differ("handle", string(u.Handle), string(*p.Handle))
	}
	if p.Role != nil {
		differ("role", string(u.Role), string(*p.Role))
	}
	if p.Expires {
		differ("expires", expiry(u.ExpiresAt), expiry(p.ExpiresAt))
	}
	return out
}

func expiry(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return stamp(t)
}
