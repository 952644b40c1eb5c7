package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
	"unibus.internal/bus/seal"
)

// trustSuffix makes the name of the file in which an identity remembers whom
// and what it trusts: beside the seed, for it is worth as much.
const trustSuffix = ".trust"

// keyCommands are about the keys of encrypted rooms.
func (a *app) keyCommands() []*cli.Command {
	return []*cli.Command{
		{
			Name: "rekey", ArgsUsage: "ROOM",
			Usage: "give an encrypted room another key, if it needs one",
			Description: "Owners. Whoever is in the room's roster and still a member gets the new key. Others only if\n" +
				"--admit names them: that the servers call somebody a member is no reason to give them a key.\n\n" +
				"   unibusctl room rekey vault\n   unibusctl room rekey vault --admit bob --admit carol:reader",
			Flags: []cli.Flag{
				&cli.StringSliceFlag{Name: "admit", Usage: "`USER[:ROLE]` who gets it too, or rises to that role; without a role the one they have"},
				&cli.BoolFlag{Name: "force", Usage: "also if the room needs no other key"},
				&cli.StringFlag{Name: "appointment", Usage: "`uba_...` by which a trusted admin made you owner (room appoint)"},
			},
			Action: a.roomRekey,
		},
		{
			Name: "check", ArgsUsage: "[ROOM]",
			Usage: "encrypted rooms whose key is not that of their members",
			Description: "Your encrypted rooms, or ROOM. Exit code for a monitoring system: 0 all is well, 1 somebody\n" +
				"waits to be admitted, 2 a room needs another key, 3 it cannot be said.\n\n   unibusctl room check",
			Action: a.roomCheck,
		},
		{
			Name: "verify", ArgsUsage: "ROOM",
			Usage: "the number by which members see that they are in the same room",
			Description: "Compare it with another member's, by voice or in person: the same number means the same\n" +
				"roster, and the same history of rosters. --yes records that you have.\n\n   unibusctl room verify vault",
			Action: a.roomVerify,
		},
		{
			Name: "grant", ArgsUsage: "ROOM USER",
			Usage: "let a member read what was said before they came",
			Description: "Owners. Gives the member the keys of all epochs they were not in, as far as you have them.\n\n" +
				"   unibusctl room grant vault dave --from-epoch 3",
			Flags:  []cli.Flag{&cli.Uint64Flag{Name: "from-epoch", Value: 1, Usage: "the first `EPOCH` that they may read"}},
			Action: a.roomGrant,
		},
		{
			Name: "appoint", ArgsUsage: "ROOM USER",
			Usage: "as an admin, name an owner of an encrypted room whose owners are all lost",
			Description: "Prints an appointment for the new owner, who runs room rekey --appointment. You learn no key.\n" +
				"Only members who trust you as an admin (join --admin, user verify --admin) accept it.\n\n" +
				"   unibusctl room add vault bob --role owner\n   unibusctl room appoint vault bob",
			Action: a.roomAppoint,
		},
	}
}

// userVerifyCommand compares keys of users.
func (a *app) userVerifyCommand() *cli.Command {
	return &cli.Command{
		Name: "verify", ArgsUsage: "USER",
		Usage: "the number by which you and a user see that you have each other's true key",
		Description: "Both of you run it, each with the other's name, and compare the number by voice or in person.\n" +
			"--yes records that you have. A name that meant another key before is refused everywhere until\n" +
			"--accept says that the new one is right.\n\n   unibusctl user verify alice",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "accept", Usage: "the name means this key from now on"},
			&cli.BoolFlag{Name: "admin", Usage: "trust them to appoint owners of rooms, too"},
		},
		Action: a.userVerify,
	}
}

// keysOf prepares the keys of an identity; alerts go to stderr.
func (a *app) keysOf(api *client.Client, id seal.Identity, identityFile string) (*client.Keys, error) {
	return client.NewKeys(client.KeysConfig{
		API: api, Identity: id, Trust: client.FileTrust(identityFile + trustSuffix), Now: a.now,
		OnAlert: func(al client.Alert) { a.say("WARNING: %s", oneLine(al.Err.Error())) },
	})
}

// withKeys runs what needs the identity's keys: it publishes the public half of
// them first, so that others can admit it.
func (a *app) withKeys(ctx context.Context, do func(ctx context.Context, k *client.Keys, api *client.Client) error) error {
	if a.set.direct {
		return &usageError{msg: "keys belong to members, and go over the API: leave --direct out", hint: a.command}
	}
	b, err := a.openAPI()
	if err != nil {
		return err
	}
	defer b.Close()
	id, err := readSigner(a.set.identity)
	if err != nil {
		return err
	}
	k, err := a.keysOf(b.Client, id, a.set.identity)
	if err != nil {
		return err
	}
	ctx, cancel := a.within(ctx, changeWithin)
	defer cancel()
	if _, err := k.Announce(ctx); err != nil {
		return err
	}
	return do(ctx, k, b.Client)
}

func (a *app) roomRekey(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	o := client.RekeyOptions{Force: c.Bool("force")}
	if s := c.String("appointment"); s != "" {
		if o.Appointment, err = client.ParseAppointment(s); err != nil {
			return err
		}
	}
	return a.withKeys(c.Context, func(ctx context.Context, k *client.Keys, api *client.Client) error {
		for _, s := range c.StringSlice("admit") {
			who, err := a.admission(ctx, k, api, id, s)
			if err != nil {
				return err
			}
			o.Admit = append(o.Admit, who)
		}
		done, err := k.Rekey(ctx, id, o)
		if err != nil {
			return err
		}
		return a.printRekeyed(done)
	})
}

// admission reads USER[:ROLE]. Without a role it is the one that they have as
// members.
func (a *app) admission(ctx context.Context, k *client.Keys, api *client.Client, id bus.RoomID, s string) (client.Admission, error) {
	name, roleName, given := strings.Cut(s, ":")
	user, err := k.Resolve(ctx, name)
	if err != nil {
		return client.Admission{}, err
	}
	if given {
		role, err := bus.ParseRoomRole(roleName)
		return client.Admission{User: user, Role: role}, err
	}
	members, err := api.Members(ctx, id, false)
	if err != nil {
		return client.Admission{}, err
	}
	for _, m := range members {
		if m.SignPub == user {
			return client.Admission{User: user, Role: m.Role}, nil
		}
	}
	return client.Admission{}, bus.E(bus.NotFound, "%s is no member of room %s", name, id).WithHint("unibusctl room add %s %s", id, name)
}

func (a *app) printRekeyed(done client.Rekeyed) error {
	if a.set.json {
		return a.print(done, nil)
	}
	if done.Already {
		fmt.Fprintf(a.out, "already_so: room %s needs no other key; epoch %d, %d members\n", done.Room, done.Epoch, done.Members)
		return nil
	}
	fmt.Fprintf(a.out, "room %s has epoch %d, of %d members\n", done.Room, done.Epoch, done.Members)
	for _, d := range done.Changes {
		switch {
		case d.Was == "":
			a.say("  in:  %s as %s", d.User, d.Now)
		case d.Now == "":
			a.say("  out: %s", d.User)
		default:
			a.say("  now: %s is %s, was %s", d.User, d.Now, d.Was)
		}
	}
	return nil
}

func (a *app) roomCheck(c *cli.Context) error {
	var only bus.RoomID
	if c.Args().Present() {
		var err error
		if only, err = oneRoom(c); err != nil {
			return err
		}
	}
	list := []client.RoomStanding{}
	code := 0
	var said []string
	err := a.withKeys(c.Context, func(ctx context.Context, k *client.Keys, api *client.Client) error {
		rooms := []bus.RoomID{only}
		if only == "" {
			rooms = nil
			infos, err := api.AllRooms(ctx, client.RoomQuery{})
			if err != nil {
				return err
			}
			for _, r := range infos {
				if r.Encrypted && r.Status == bus.RoomActive {
					rooms = append(rooms, r.Room)
				}
			}
		}
		for _, id := range rooms {
			s, err := k.Room(ctx, id)
			if err != nil {
				return err
			}
			list = append(list, s)
			switch {
			case s.RekeyRequired:
				code = 2
				said = append(said, fmt.Sprintf("%s needs another key (%s)", id, reasons(s)))
			case len(s.Waiting) > 0:
				code = max(code, 1)
				said = append(said, fmt.Sprintf("in %s %d wait to be admitted", id, len(s.Waiting)))
			}
		}
		return nil
	})
	if err != nil {
		if bus.CodeOf(err) == bus.Unavailable {
			return &checkResult{3, "UNKNOWN: " + oneLine(err.Error())}
		}
		return err
	}
	if a.set.json {
		if err := a.print(map[string]any{"rooms": list}, nil); err != nil {
			return err
		}
	}
	if len(said) == 0 {
		said = []string{fmt.Sprintf("%d encrypted rooms", len(list))}
	}
	return &checkResult{code, []string{"OK", "WARNING", "CRITICAL"}[code] + ": " + oneLine(strings.Join(said, "; "))}
}

func reasons(s client.RoomStanding) string {
	var out []string
	for _, w := range s.Why {
		if w.User == nil {
			out = append(out, string(w.Why))
			continue
		}
		out = append(out, fmt.Sprintf("%s %s", w.User.NKey()[:8], w.Why))
	}
	return strings.Join(out, ", ")
}

func (a *app) roomVerify(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	return a.withKeys(c.Context, func(ctx context.Context, k *client.Keys, _ *client.Client) error {
		s, err := k.Room(ctx, id)
		if err != nil {
			return err
		}
		if s.Epoch == 0 {
			return bus.E(bus.Conflict, "room %s has no key yet", id).WithHint("its maker runs: unibusctl room rekey %s", id)
		}
		if err := a.print(s, func(t table.Writer) {
			t.AppendRows([]table.Row{
				{"room", s.Room},
				{"epoch", s.Epoch},
				{"number", s.Number},
				{"members", s.Members},
				{"signed by", s.Signer.NKey()},
				{"we have its key", s.HasKey},
				{"compared", compared(s.Verified)},
			})
		}); err != nil {
			return err
		}
		if !a.set.yes {
			a.say("the same number at another member means the same room; --yes records that you have compared")
			return nil
		}
		return k.ConfirmRoom(s)
	})
}

func compared(at *time.Time) string {
	if at == nil {
		return "never"
	}
	return stamp(at)
}

func (a *app) roomGrant(c *cli.Context) error {
	return a.withKeysAbout(c, func(ctx context.Context, k *client.Keys, id bus.RoomID, name string, user bus.UserKey) error {
		n, err := k.Grant(ctx, id, user, c.Uint64("from-epoch"))
		if err != nil {
			return err
		}
		if a.set.json {
			return a.print(map[string]any{"room": id, "sign_pub": user, "epochs": n}, nil)
		}
		fmt.Fprintf(a.out, "%s has the keys of %d more epochs of room %s\n", oneLine(name), n, id)
		return nil
	})
}

func (a *app) roomAppoint(c *cli.Context) error {
	return a.withKeysAbout(c, func(ctx context.Context, k *client.Keys, id bus.RoomID, _ string, user bus.UserKey) error {
		text, err := k.Appoint(ctx, id, user)
		if err != nil {
			return err
		}
		if a.set.json {
			return a.print(map[string]any{"room": id, "sign_pub": user, "appointment": text}, nil)
		}
		a.say("the new owner runs: unibusctl room rekey %s --appointment %s", id, text)
		fmt.Fprintln(a.out, text)
		return nil
	})
}

// withKeysAbout is for the lines ROOM USER; name is how USER was written.
func (a *app) withKeysAbout(c *cli.Context, f func(ctx context.Context, k *client.Keys, id bus.RoomID, name string, user bus.UserKey) error) error {
	arg, err := positional(c, "ROOM", "USER")
	if err != nil {
		return err
	}
	id, err := bus.ParseRoomID(arg[0])
	if err != nil {
		return err
	}
	return a.withKeys(c.Context, func(ctx context.Context, k *client.Keys, _ *client.Client) error {
		user, err := k.Resolve(ctx, arg[1])
		if err != nil {
			return err
		}
		return f(ctx, k, id, arg[1], user)
	})
}

func (a *app) userVerify(c *cli.Context) error {
	arg, err := positional(c, "USER")
	if err != nil {
		return err
	}
	name, err := userName(arg[0])
	if err != nil {
		return err
	}
	return a.withKeys(c.Context, func(ctx context.Context, k *client.Keys, _ *client.Client) error {
		n, err := k.Number(ctx, name)
		if err != nil {
			return err
		}
		if err := a.print(n, func(t table.Writer) {
			t.AppendRows([]table.Row{{"user", name}, {"key", n.NKey}, {"number", n.Number}, {"compared", compared(n.Verified)}, {"trusted admin", n.Admin}})
			if n.Was != nil {
				t.AppendRow(table.Row{"was", n.Was.NKey()})
			}
		}); err != nil {
			return err
		}
		accept := c.Bool("accept")
		switch {
		case n.Was != nil && !accept:
			return bus.E(bus.Forbidden, "%s had another key before: the person was given a new one, or somebody stands between you", name).
				WithHint("compare the number, then: unibusctl user verify %s --accept --yes", name)
		case !a.set.yes && !accept && !c.Bool("admin"):
			a.say("the same number at their end means that each has the other's true key; --yes records that you have compared")
			return nil
		}
		if err := a.confirm(fmt.Sprintf("is the number at %s's end %s?", name, n.Number)); err != nil {
			return err
		}
		return k.Confirm(name, n.User, c.Bool("admin"))
	})
}

// encryptedNext does what belongs to a change of an encrypted room: its first
// key, a member's key, or another key after somebody went. What is not this
// user's to do is said, and is no failure of the change.
func (a *app) encryptedNext(ctx context.Context, b backend, id bus.RoomID, do func(ctx context.Context, k *client.Keys) error) error {
	over, ok := b.(*overAPI)
	if !ok {
		return nil // a node has no identity; an owner online does it
	}
	if r, err := b.Room(ctx, id); err != nil || !r.Encrypted {
		return nil //nolint:nilerr // whoever left, or made a room for somebody else, is not in it
	}
	id2, err := readSigner(a.set.identity)
	if err != nil {
		return err
	}
	k, err := a.keysOf(over.Client, id2, a.set.identity)
	if err != nil {
		return err
	}
	if _, err = k.Announce(ctx); err == nil {
		err = do(ctx, k)
	}
	if err != nil {
		a.say("the room's key is not changed by that: %s", oneLine(err.Error()))
		a.say("an owner runs: unibusctl room rekey %s", id)
	}
	return nil
}
