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

func (a *app) roomCommand() *cli.Command {
	return &cli.Command{
		Name:     "room",
		Category: "access",
		Usage:    "where users talk, and who belongs",
		Subcommands: []*cli.Command{
			{
				Name: "create", ArgsUsage: "ROOM",
				Usage:       "make a room; its id is never used again",
				Description: "The creator is the user of --identity, or --owner.\n\n   unibusctl --direct room create ops --owner alice",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "owner", Usage: "`USER` who owns the room; default: the user of --identity"},
					&cli.BoolFlag{Name: "durable", Usage: "keep messages on a quorum of nodes; cannot be changed later"},
					&cli.BoolFlag{Name: "encrypted", Usage: "end-to-end; cannot be changed later"},
				},
				Action: a.roomCreate,
			},
			{Name: "list", Usage: "all rooms", Description: "   unibusctl --direct room list --json", Action: a.reading(a.roomList)},
			{
				Name: "show", ArgsUsage: "ROOM", Usage: "one room and its members",
				Description: "   unibusctl --direct room show ops", Action: a.reading(a.roomShow),
			},
			{
				Name: "add", ArgsUsage: "ROOM USER", Usage: "add a user to a room, or change their role in it",
				Description: "   unibusctl --direct room add ops alice --role writer",
				Flags:       []cli.Flag{&cli.StringFlag{Name: "role", Value: string(bus.Writer), Usage: "`reader|writer|owner`"}},
				Action:      a.roomAdd,
			},
			{
				Name: "remove", ArgsUsage: "ROOM USER", Usage: "take a user out of a room",
				Description: "   unibusctl --direct room remove ops alice", Action: a.roomRemove,
			},
			{
				Name: "members", ArgsUsage: "ROOM", Usage: "who is in a room",
				Description: "   unibusctl --direct room members ops --json",
				Flags:       []cli.Flag{&cli.BoolFlag{Name: "all", Usage: "also those who left or were removed"}},
				Action:      a.reading(a.roomMembers),
			},
		},
	}
}

func (a *app) roomCreate(c *cli.Context) error {
	arg, err := positional(c, "ROOM")
	if err != nil {
		return err
	}
	id, err := bus.ParseRoomID(arg[0])
	if err != nil {
		return err
	}
	owner := c.String("owner")
	if owner == "" {
		if owner, err = a.ownKey(); err != nil {
			return err
		}
	}
	o := kv.RoomOptions{Durable: c.Bool("durable"), Encrypted: c.Bool("encrypted")}
	return a.changing(func(ctx context.Context, _ *cli.Context, d *direct) (string, kv.Result, error) {
		u, _, err := d.view.FindUser(owner)
		if err != nil {
			return "", kv.Result{}, err
		}
		res, err := d.store.CreateRoom(ctx, id, u.Key, o)
		return fmt.Sprintf("room %s, owned by %s", id, u.Handle), res, err
	})(c)
}

// ownKey is the key of --identity.
func (a *app) ownKey() (string, error) {
	if a.set.identity == "" {
		return "", &usageError{msg: "a room needs an owner: set --owner USER, or --identity FILE"}
	}
	pair, err := readIdentity(a.set.identity)
	if err != nil {
		return "", err
	}
	key, err := userKeyOf(pair)
	return key.NKey(), err
}

// roomView is one room as programs see it.
type roomView struct {
	Room      bus.RoomID     `json:"room"`
	Status    bus.RoomStatus `json:"status"`
	Durable   bool           `json:"durable"`
	Encrypted bool           `json:"encrypted"`
	Creator   bus.UserKey    `json:"creator"`
	CreatedAt time.Time      `json:"created_at"`
	Members   int            `json:"members"`
	Revision  uint64         `json:"revision"`
}

func roomViewOf(v *kv.View, r bus.Room, rev uint64) roomView {
	return roomView{r.ID, r.Status, r.Durable, r.Encrypted, r.Creator, r.CreatedAt, len(membersOf(v, r.ID, false)), rev}
}

func (a *app) roomList(c *cli.Context, d *direct) error {
	if _, err := positional(c); err != nil {
		return err
	}
	rooms := []roomView{}
	for _, r := range d.view.Rooms() {
		rooms = append(rooms, roomViewOf(d.view, r.Room, r.Revision))
	}
	err := a.print(map[string]any{"rooms": rooms}, func(t table.Writer) {
		t.AppendHeader(table.Row{"room", "status", "durable", "encrypted", "members", "created"})
		for _, r := range rooms {
			t.AppendRow(table.Row{r.Room, r.Status, r.Durable, r.Encrypted, r.Members, r.CreatedAt.Format(time.DateOnly)})
		}
	})
	if len(rooms) == 0 && err == nil {
		a.say("no rooms yet; unibusctl --direct room create ROOM --owner USER makes one")
	}
	return err
}

func (a *app) roomShow(c *cli.Context, d *direct) error {
	room, rev, err := findRoom(c, d)
	if err != nil {
		return err
	}
	v := struct {
		roomView
		Members []memberView `json:"members"`
	}{roomViewOf(d.view, room, rev), membersOf(d.view, room.ID, false)}
	return a.print(map[string]any{"room": v}, func(t table.Writer) {
		t.AppendRows([]table.Row{
			{"room", v.Room},
			{"status", v.Status},
			{"durable", v.Durable},
			{"encrypted", v.Encrypted},
			{"creator", v.Creator},
			{"created", stamp(&v.CreatedAt)},
			{"revision", v.Revision},
		})
		for _, m := range v.Members {
			t.AppendRow(table.Row{"member " + string(m.Handle), m.Role})
		}
	})
}

func findRoom(c *cli.Context, d *direct) (bus.Room, uint64, error) {
	arg, err := positional(c, "ROOM")
	if err != nil {
		return bus.Room{}, 0, err
	}
	id, err := bus.ParseRoomID(arg[0])
	if err != nil {
		return bus.Room{}, 0, err
	}
	room, rev, ok := d.view.Room(id)
	if !ok {
		return bus.Room{}, 0, bus.E(bus.NotFound, "no room %s", id).WithHint("unibusctl --direct room list")
	}
	return room, rev, nil
}

// memberView is one membership as programs see it.
type memberView struct {
	SignPub   bus.UserKey          `json:"sign_pub"`
	NKey      string               `json:"nkey"`
	Handle    bus.Handle           `json:"handle"`
	Role      bus.RoomRole         `json:"role"`
	Status    bus.MembershipStatus `json:"status"`
	UserState bus.Status           `json:"user_status"`
	AddedAt   time.Time            `json:"added_at"`
	RemovedAt *time.Time           `json:"removed_at"`
	Revision  uint64               `json:"revision"`
}

func membersOf(v *kv.View, id bus.RoomID, all bool) []memberView {
	members := []memberView{}
	for _, m := range v.Members(id) {
		if m.Status != bus.Present && !all {
			continue
		}
		u, _, _ := v.User(m.User)
		members = append(members, memberView{
			m.User, m.User.NKey(), u.Handle, m.Role, m.Status, u.Status, m.AddedAt, m.RemovedAt, m.Revision,
		})
	}
	return members
}

func (a *app) roomMembers(c *cli.Context, d *direct) error {
	room, _, err := findRoom(c, d)
	if err != nil {
		return err
	}
	members := membersOf(d.view, room.ID, c.Bool("all"))
	return a.print(map[string]any{"room": room.ID, "members": members}, func(t table.Writer) {
		t.AppendHeader(table.Row{"handle", "role", "status", "user", "nkey", "added"})
		for _, m := range members {
			t.AppendRow(table.Row{m.Handle, m.Role, m.Status, m.UserState, m.NKey, m.AddedAt.Format(time.DateOnly)})
		}
	})
}

func (a *app) roomAdd(c *cli.Context) error {
	role, err := bus.ParseRoomRole(c.String("role"))
	if err != nil {
		return err
	}
	return a.membership(c, func(ctx context.Context, d *direct, id bus.RoomID, u bus.User) (string, kv.Result, error) {
		res, err := d.store.SetMember(ctx, id, u.Key, role)
		if res.Already {
			return fmt.Sprintf("already_%s %s in room %s", role, u.Handle, id), res, err
		}
		return fmt.Sprintf("%s is %s of room %s", u.Handle, role, id), res, err
	})
}

func (a *app) roomRemove(c *cli.Context) error {
	return a.membership(c, func(ctx context.Context, d *direct, id bus.RoomID, u bus.User) (string, kv.Result, error) {
		res, err := d.store.RemoveMember(ctx, id, u.Key)
		if res.Already {
			return fmt.Sprintf("already_removed %s from room %s", u.Handle, id), res, err
		}
		return fmt.Sprintf("%s is removed from room %s", u.Handle, id), res, err
	})
}

func (a *app) membership(c *cli.Context, do func(context.Context, *direct, bus.RoomID, bus.User) (string, kv.Result, error)) error {
	arg, err := positional(c, "ROOM", "USER")
	if err != nil {
		return err
	}
	id, err := bus.ParseRoomID(arg[0])
	if err != nil {
		return err
	}
	return a.changing(func(ctx context.Context, _ *cli.Context, d *direct) (string, kv.Result, error) {
		u, _, err := d.view.FindUser(arg[1])
		if err != nil {
			return "", kv.Result{}, err
		}
		return do(ctx, d, id, u)
	})(c)
}
