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
)

// backend is where the verbs about users, rooms and the audit take effect: the
// membership API (api.go), or with --direct the live KV itself (direct.go).
// Both obey the same rules and answer in the same documents, so that a command
// cannot tell them apart. A user is named by handle, hex or nkey. Errors are
// *bus.Error: who is not there is NotFound, and what is not known Unavailable.
//
// A change returns when no service decides on the state before it. One that is
// committed but not proven comes with Verified false and without an error;
// changing, below, makes an exit code of that.
type backend interface {
	// Me is the user of --identity.
	Me(ctx context.Context) (bus.UserDetail, error)

	Users(ctx context.Context) ([]bus.UserInfo, error)
	User(ctx context.Context, user string) (bus.UserDetail, error)
	AddUser(ctx context.Context, key bus.UserKey, handle bus.Handle, role bus.Role) (bus.Change, error)
	PatchUser(ctx context.Context, user string, p client.UserPatch) (bus.Change, error)
	RevokeUser(ctx context.Context, user string) (bus.Change, error)
	SuspendUser(ctx context.Context, user string) (bus.Change, error)
	ResumeUser(ctx context.Context, user string) (bus.Change, error)
	RotateUser(ctx context.Context, user string, to bus.UserKey) (bus.Change, error)
	Access(ctx context.Context, user string) (bus.AccessInfo, error)

	// Connections lists who is connected; a server that is missing is no error.
	Connections(ctx context.Context, q client.ConnectionQuery) (bus.ConnectionList, error)
	Kick(ctx context.Context, user, server string, cid uint64) (bus.Change, error)

	CreateInvite(ctx context.Context, i client.NewInvite) (bus.InviteCreated, error)
	Invites(ctx context.Context) ([]bus.InviteInfo, error)
	WithdrawInvite(ctx context.Context, id string) (info bus.InviteInfo, already bool, err error)

	// Rooms are all of them to an admin, and with --direct; else one's own.
	Rooms(ctx context.Context) ([]bus.RoomInfo, error)
	Room(ctx context.Context, id bus.RoomID) (bus.RoomDetail, error)
	CreateRoom(ctx context.Context, r client.NewRoom) (bus.Change, error)
	DescribeRoom(ctx context.Context, id bus.RoomID, description string, revision uint64) (bus.Change, error)
	RetainRoom(ctx context.Context, id bus.RoomID, keep bus.Retention, revision uint64) (bus.Change, error)
	ArchiveRoom(ctx context.Context, id bus.RoomID, purge bool) (bus.Change, error)
	Members(ctx context.Context, id bus.RoomID, gone bool) ([]bus.MemberInfo, error)
	SetMember(ctx context.Context, id bus.RoomID, user string, role bus.RoomRole) (bus.Change, error)
	RemoveMember(ctx context.Context, id bus.RoomID, user string) (bus.Change, error)

	Audit(ctx context.Context, q client.AuditQuery) (records []bus.AuditRecord, next string, err error)
	// VerifyAudit holds the audit to its chains; checkpoints count if their
	// signer is one of signers, or if signers is empty.
	VerifyAudit(ctx context.Context, signers []string) (bus.AuditReport, error)

	// AfterWrite is the line about the users bucket that is owed after each
	// write, "" if the backend cannot know it.
	AfterWrite(ctx context.Context) string
	Close()
}

var (
	_ backend = (*overAPI)(nil)
	_ backend = (*direct)(nil)
)

const (
	// readWithin lets two nodes that hang pass by.
	readWithin = 12 * time.Second
	// changeWithin is for a node that answers late and one that is asked then.
	changeWithin = 40 * time.Second
)

// open makes the backend that --direct chooses.
func (a *app) open(ctx context.Context) (backend, error) {
	if a.set.direct {
		return a.openDirect(ctx)
	}
	return a.openAPI()
}

// reading runs what changes nothing. As with changing, all that can be wrong
// with the command line is to be found before.
func (a *app) reading(ctx context.Context, do func(ctx context.Context, b backend) error) error {
	b, err := a.open(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	ctx, cancel := a.within(ctx, readWithin)
	defer cancel()
	return do(ctx, b)
}

// changing runs one change to its proof and prints it, then the line about the
// users bucket that scripts look for.
func (a *app) changing(ctx context.Context, do func(ctx context.Context, b backend) (bus.Change, error)) error {
	return a.proving(ctx, do, a.afterWrite)
}

// proving is changing without a record being written: then is what follows the
// print.
func (a *app) proving(ctx context.Context, do func(ctx context.Context, b backend) (bus.Change, error), then func(context.Context, backend)) error {
	b, err := a.open(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	ctx, cancel := a.within(ctx, changeWithin)
	defer cancel()
	change, err := do(ctx, b)
	if err != nil {
		return err
	}
	if change.Expired == nil {
		change.Expired = []string{}
	}
	switch {
	case a.set.json:
		if err := a.print(change, nil); err != nil {
			return err
		}
	case change.Verified:
		fmt.Fprintln(a.out, oneLine(changeLine(change)))
	}
	then(ctx, b)
	if len(change.Unproven) > 0 {
		on := strings.Join(change.Unproven, ", ")
		return bus.E(bus.Unavailable, "%s: committed, not proven on %s: revision %d, closed %d, servers %s", change.What, on, change.Revision, change.Closed, change.Servers).
			WithHint("repeat %s: it proves again; a node that never comes back: unibusctl cluster forget %s", a.command, change.Unproven[0])
	}
	if !change.Verified {
		return bus.E(bus.Unavailable, "%s: committed, not proven: revision %d, still waiting for %s",
			change.What, change.Revision, strings.Join(change.Waiting, ", ")).WithHint("repeat %s: it proves again", a.command)
	}
	return nil
}

func (a *app) afterWrite(ctx context.Context, b backend) {
	line := b.AfterWrite(ctx)
	switch {
	case line == "":
	case a.set.json: // stdout is for a program
		a.say("%s", line)
	default:
		fmt.Fprintln(a.out, line)
	}
}

func changeLine(c bus.Change) string {
	if c.Holders == 0 && c.Servers != "" { // nobody's access has changed
		return fmt.Sprintf("%s: servers %s, in %d ms", c.What, c.Servers, c.ElapsedMS)
	}
	s := fmt.Sprintf("%s: revision %d, proven by %d of %d lease holders in %d ms", c.What, c.Revision, c.Holders-len(c.Expired), c.Holders, c.ElapsedMS)
	if len(c.Expired) > 0 {
		s += "; waited out the lease of " + strings.Join(c.Expired, ", ")
	}
	if c.Servers != "" {
		s += fmt.Sprintf("; closed %d, servers %s", c.Closed, c.Servers)
	}
	return s
}

// plan prints what --dry-run found out: nothing was changed.
func (a *app) plan(what string, details ...string) error {
	if a.set.json {
		if details == nil {
			details = []string{}
		}
		return a.print(map[string]any{"dry_run": true, "what": what, "details": details}, nil)
	}
	fmt.Fprintln(a.out, oneLine("would "+what))
	for _, d := range details {
		fmt.Fprintln(a.out, "  "+oneLine(d))
	}
	a.say("nothing was changed")
	return nil
}

func dryRunFlag() cli.Flag {
	return &cli.BoolFlag{Name: "dry-run", Usage: "say what would change, and change nothing"}
}

// userName is a user as typed, in the one spelling that both backends use in
// their messages.
func userName(s string) (string, error) {
	if _, err := bus.ParseHandle(s); err == nil {
		return s, nil
	}
	key, err := bus.ParseUserKey(s)
	if err != nil {
		return "", bus.E(bus.Invalid, "%s is neither a handle nor a user key", quote(s))
	}
	return key.NKey(), nil
}

// parseWhen reads a time: RFC 3339, a date, or a duration from now, into the
// future (sign 1) or the past (-1). Durations may be in days, "30d".
func (a *app) parseWhen(s string, sign int) (time.Time, error) {
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC(), nil
		}
	}
	d, err := parseDuration(s)
	if err != nil {
		return time.Time{}, bus.E(bus.Invalid, "%s is neither a time (2027-01-31, 2027-01-31T12:00:00Z) nor a duration (90m, 24h, 30d)", quote(s))
	}
	return a.now().Add(time.Duration(sign) * d).UTC().Truncate(time.Millisecond), nil
}

func parseDuration(s string) (time.Duration, error) {
	var days int
	if n, err := fmt.Sscanf(s, "%dd", &days); n == 1 && err == nil && s == fmt.Sprintf("%dd", days) && days > 0 && days <= 36500 {
		return time.Duration(days) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, bus.E(bus.Invalid, "%s is not a duration such as 90m, 24h or 30d", quote(s))
	}
	return d, nil
}

// rows prints a list with its header, or as JSON under name.
func rows[T any](a *app, name string, list []T, header table.Row, row func(T) table.Row) error {
	return a.print(map[string]any{name: list}, func(t table.Writer) {
		t.AppendHeader(header)
		for _, v := range list {
			t.AppendRow(row(v))
		}
	})
}
