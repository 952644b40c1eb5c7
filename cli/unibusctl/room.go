package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
)

func (a *app) roomCommand() *cli.Command {
	return &cli.Command{
		Name:        "room",
		Category:    "access",
		Usage:       "where users talk, and who belongs",
		Description: "Every user may make rooms. Owners and admins change them; members see them; to everybody\nelse they do not exist.",
		Subcommands: append([]*cli.Command{
			{
				Name: "create", ArgsUsage: "ROOM",
				Usage:       "make a room; its id is never used again",
				Description: "The owner is the user of --identity, or --owner.\n\n   unibusctl room create ops --description 'what happens on the machines'",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "owner", Usage: "`USER` who owns the room; default: the user of --identity"},
					&cli.BoolFlag{Name: "durable", Usage: "keep messages on a quorum of nodes; cannot be changed later"},
					&cli.BoolFlag{Name: "encrypted", Usage: "end-to-end; cannot be changed later"},
					&cli.StringFlag{Name: "description", Usage: "one line `TEXT`, up to 200 characters"},
					&cli.DurationFlag{Name: "max-age", Usage: "of a durable room: keep messages for this `TIME`; default: for ever"},
					&cli.StringFlag{Name: "max-bytes", Usage: "of a durable room: keep at most this `SIZE`, such as 64MiB, on each node; default: 32MiB"},
					&cli.Int64Flag{Name: "max-messages", Usage: "of a durable room: keep at most this `NUMBER`; default: any"},
				},
				Action: a.roomCreate,
			},
			{
				Name: "list", Usage: "your rooms; all of them for an admin",
				Description: "   unibusctl room list --json", Action: a.roomList,
			},
			{
				Name: "show", ArgsUsage: "ROOM", Usage: "one room and its members",
				Description: "   unibusctl room show ops", Action: a.roomShow,
			},
			{
				Name: "set", ArgsUsage: "ROOM", Usage: "change what a room says of itself, or what it keeps",
				Description: "When a durable room is to keep less, the oldest messages go at once.\n\n   unibusctl room set ops --description 'on call: alice'\n   unibusctl room set ops --max-age 720h --max-bytes 64MiB",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "description", Usage: "one line `TEXT`, up to 200 characters; empty for none"},
					&cli.DurationFlag{Name: "max-age", Usage: "keep messages for this `TIME`; 0: for ever"},
					&cli.StringFlag{Name: "max-bytes", Usage: "keep at most this `SIZE`, such as 64MiB, on each node"},
					&cli.Int64Flag{Name: "max-messages", Usage: "keep at most this `NUMBER`; 0: any"},
				},
				Action: a.roomSet,
			},
			{
				Name: "archive", ArgsUsage: "ROOM", Usage: "close a room for good",
				Description: "Nobody writes into it any more and its id is never used again. The record stays. What a durable\nroom has stored stays too, for who was in it at the end, unless --messages purge takes it away.\n\n   unibusctl room archive ops --yes",
				Flags:       []cli.Flag{dryRunFlag(), &cli.StringFlag{Name: "messages", Value: "keep", Usage: "`keep|purge` what the room has stored"}},
				Action:      a.roomArchive,
			},
			{
				Name: "add", ArgsUsage: "ROOM USER", Usage: "add a user to a room, or change their role in it",
				Description: "   unibusctl room add ops alice --role writer",
				Flags:       []cli.Flag{&cli.StringFlag{Name: "role", Value: string(bus.Writer), Usage: "`reader|writer|owner`"}},
				Action:      a.roomAdd,
			},
			{
				Name: "remove", ArgsUsage: "ROOM USER", Usage: "take a user out of a room",
				Description: "   unibusctl room remove ops alice", Action: a.roomRemove,
			},
			{
				Name: "leave", ArgsUsage: "ROOM", Usage: "leave a room yourself",
				Description: "Only an owner or an admin can bring you back.\n\n   unibusctl room leave ops", Action: a.roomLeave,
			},
			{
				Name: "members", ArgsUsage: "ROOM", Usage: "who is in a room",
				Description: "   unibusctl room members ops --json",
				Flags:       []cli.Flag{&cli.BoolFlag{Name: "all", Usage: "also those who left or were removed"}},
				Action:      a.roomMembers,
			},
		}, slices.Concat(a.talkCommands(), a.keyCommands(), a.fileCommands())...),
	}
}

func (a *app) roomCreate(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	r := client.NewRoom{Room: id, Durable: c.Bool("durable"), Encrypted: c.Bool("encrypted")}
	if r.Description, err = bus.ParseDescription(c.String("description")); err != nil {
		return err
	}
	if err := retention(c, &r.Retention); err != nil {
		return err
	}
	if owner := c.String("owner"); owner != "" {
		if r.Owner, err = userName(owner); err != nil {
			return err
		}
	} else if a.set.identity == "" {
		return &usageError{msg: "a room needs an owner: set --owner USER, or --identity FILE"}
	}
	return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) {
		change, err := b.CreateRoom(ctx, r)
		if err == nil && r.Encrypted && r.Owner == "" {
			err = a.encryptedNext(ctx, b, id, func(ctx context.Context, k *client.Keys) error {
				_, err := k.Rekey(ctx, id, client.RekeyOptions{})
				return err
			})
		}
		return change, err
	})
}

// retention reads the flags that say what a room keeps into what it keeps so far.
func retention(c *cli.Context, keep *bus.Retention) error {
	if c.IsSet("max-age") {
		keep.MaxAgeSeconds = int64(c.Duration("max-age") / time.Second)
	}
	if c.IsSet("max-messages") {
		keep.MaxMessages = c.Int64("max-messages")
	}
	if c.IsSet("max-bytes") {
		n, err := byteSize(c.String("max-bytes"))
		if err != nil {
			return err
		}
		keep.MaxBytes = n
	}
	return keep.Validate()
}

// byteSize reads a number of bytes, or of KiB, MiB or GiB.
func byteSize(s string) (int64, error) {
	digits, factor := s, int64(1)
	for i, unit := range []string{"KiB", "MiB", "GiB"} {
		if d, ok := strings.CutSuffix(s, unit); ok {
			digits, factor = d, int64(1)<<(10*(i+1))
		}
	}
	n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 32)
	if err != nil && factor == 1 {
		n, err = strconv.ParseInt(digits, 10, 53)
	}
	if err != nil || n < 0 {
		return 0, &usageError{msg: fmt.Sprintf("%s is no size", quote(s)), hint: "a number of bytes, or of KiB, MiB or GiB: 64MiB"}
	}
	return n * factor, nil
}

// ownKey is the public key of --identity.
func (a *app) ownKey() (bus.UserKey, error) {
	if a.set.identity == "" {
		return bus.UserKey{}, &usageError{msg: "this is about yourself: set --identity FILE or UNIBUS_IDENTITY", hint: "unibusctl identity new --out FILE"}
	}
	id, err := readSigner(a.set.identity)
	if err != nil {
		return bus.UserKey{}, err
	}
	return id.Key(), nil
}

func (a *app) roomList(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	var rooms []bus.RoomInfo
	err := a.reading(c.Context, func(ctx context.Context, b backend) (err error) {
		rooms, err = b.Rooms(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if len(rooms) == 0 {
		a.say("no rooms yet; unibusctl room create ROOM makes one")
	}
	return rows(a, "rooms", rooms, table.Row{"room", "status", "durable", "encrypted", "members", "created", "description"}, func(r bus.RoomInfo) table.Row {
		return table.Row{r.Room, r.Status, r.Durable, r.Encrypted, r.Members, r.CreatedAt.Format(time.DateOnly), r.Description}
	})
}

// oneRoom is the only argument of a command.
func oneRoom(c *cli.Context) (bus.RoomID, error) {
	arg, err := positional(c, "ROOM")
	if err != nil {
		return "", err
	}
	return bus.ParseRoomID(arg[0])
}

func (a *app) roomShow(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	var r bus.RoomDetail
	err = a.reading(c.Context, func(ctx context.Context, b backend) (err error) {
		r, err = b.Room(ctx, id)
		return err
	})
	if err != nil {
		return err
	}
	byHandle(r.Members)
	return a.print(map[string]any{"room": r}, func(t table.Writer) {
		t.AppendRows([]table.Row{
			{"room", r.Room},
			{"status", r.Status},
			{"durable", r.Durable},
			{"encrypted", r.Encrypted},
			{"description", r.Description},
			{"creator", r.Creator},
			{"created", stamp(&r.CreatedAt)},
			{"archived", stamp(r.ArchivedAt)},
			{"revision", r.Revision},
		})
		if k := r.Retention; k != nil {
			t.AppendRow(table.Row{"keeps", keeps(*k, r.Purged)})
		}
		for _, m := range r.Members {
			t.AppendRow(table.Row{"member " + string(m.Handle), m.Role})
		}
	})
}

// keeps says in words what a room keeps.
func keeps(k bus.Retention, purged bool) string {
	if purged {
		return "nothing: taken away"
	}
	s := fmt.Sprintf("%d MiB on each node", k.MaxBytes>>20)
	if k.MaxMessages > 0 {
		s += fmt.Sprintf(", %d messages", k.MaxMessages)
	}
	if k.MaxAgeSeconds > 0 {
		s += fmt.Sprintf(", %s", time.Duration(k.MaxAgeSeconds)*time.Second)
	}
	return s
}

func (a *app) roomMembers(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	var members []bus.MemberInfo
	err = a.reading(c.Context, func(ctx context.Context, b backend) (err error) {
		members, err = b.Members(ctx, id, c.Bool("all"))
		return err
	})
	if err != nil {
		return err
	}
	byHandle(members)
	return a.print(map[string]any{"room": id, "members": members}, func(t table.Writer) {
		t.AppendHeader(table.Row{"handle", "role", "status", "user", "nkey", "added"})
		for _, m := range members {
			t.AppendRow(table.Row{m.Handle, m.Role, m.Status, m.UserStatus, m.NKey, m.AddedAt.Format(time.DateOnly)})
		}
	})
}

// byHandle sorts members as people look for them.
func byHandle(members []bus.MemberInfo) {
	slices.SortFunc(members, func(x, y bus.MemberInfo) int {
		return cmp.Or(cmp.Compare(x.Handle, y.Handle), cmp.Compare(x.Status, y.Status), slices.Compare(x.SignPub[:], y.SignPub[:]))
	})
}

func (a *app) roomSet(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	retains := c.IsSet("max-age") || c.IsSet("max-bytes") || c.IsSet("max-messages")
	if retains == c.IsSet("description") {
		return &usageError{msg: "set --description, or what the room keeps by --max-age, --max-bytes and --max-messages", hint: "unibusctl room show " + string(id)}
	}
	description, err := bus.ParseDescription(c.String("description"))
	if err != nil {
		return err
	}
	return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) {
		r, err := b.Room(ctx, id)
		if err != nil {
			return bus.Change{}, err
		}
		if !retains {
			return b.DescribeRoom(ctx, id, description, r.Revision)
		}
		var keep bus.Retention
		if r.Retention != nil {
			keep = *r.Retention
		}
		if err := retention(c, &keep); err != nil {
			return bus.Change{}, err
		}
		return b.RetainRoom(ctx, id, keep, r.Revision)
	})
}

func (a *app) roomArchive(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	purge := c.String("messages") == "purge"
	if m := c.String("messages"); !purge && m != "keep" {
		return &usageError{msg: fmt.Sprintf("--messages is keep or purge, not %s", quote(m))}
	}
	if c.Bool("dry-run") {
		return a.reading(c.Context, func(ctx context.Context, b backend) error {
			r, err := b.Room(ctx, id)
			if err != nil {
				return err
			}
			if r.Status == bus.RoomArchived {
				return a.plan(fmt.Sprintf("prove again that room %s is archived", id))
			}
			lost := []string{}
			for _, m := range r.Members {
				lost = append(lost, fmt.Sprintf("%s, %s", m.Handle, m.Role))
			}
			return a.plan(fmt.Sprintf("archive room %s for good, which these %d lose", id, len(lost)), lost...)
		})
	}
	question := fmt.Sprintf("archive room %s for good?", id)
	if purge {
		question = fmt.Sprintf("archive room %s for good, and take away all that it has stored?", id)
	}
	if err := a.confirm(question); err != nil {
		return err
	}
	return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) { return b.ArchiveRoom(ctx, id, purge) })
}

func (a *app) roomAdd(c *cli.Context) error {
	role, err := bus.ParseRoomRole(c.String("role"))
	if err != nil {
		return err
	}
	return a.membership(c, func(ctx context.Context, b backend, id bus.RoomID, user string) (bus.Change, error) {
		change, err := b.SetMember(ctx, id, user, role)
		if err == nil {
			err = a.encryptedNext(ctx, b, id, func(ctx context.Context, k *client.Keys) error {
				key, err := k.Resolve(ctx, user)
				if err == nil {
					_, err = k.Rekey(ctx, id, client.RekeyOptions{Admit: []client.Admission{{User: key, Role: role}}})
				}
				return err
			})
		}
		return change, err
	})
}

func (a *app) roomRemove(c *cli.Context) error {
	return a.membership(c, func(ctx context.Context, b backend, id bus.RoomID, user string) (bus.Change, error) {
		change, err := b.RemoveMember(ctx, id, user)
		if err == nil {
			err = a.encryptedNext(ctx, b, id, func(ctx context.Context, k *client.Keys) error { return k.Duty(ctx, id) })
		}
		return change, err
	})
}

func (a *app) membership(c *cli.Context, do func(ctx context.Context, b backend, id bus.RoomID, user string) (bus.Change, error)) error {
	arg, err := positional(c, "ROOM", "USER")
	if err != nil {
		return err
	}
	id, err := bus.ParseRoomID(arg[0])
	if err != nil {
		return err
	}
	user, err := userName(arg[1])
	if err != nil {
		return err
	}
	return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) { return do(ctx, b, id, user) })
}

func (a *app) roomLeave(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	key, err := a.ownKey()
	if err != nil {
		return err
	}
	return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) { return b.RemoveMember(ctx, id, key.NKey()) })
}
