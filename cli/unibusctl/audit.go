package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nkeys"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
)

// verifyWithin bounds the reading of a whole audit.
const verifyWithin = 2 * time.Minute

func (a *app) auditCommand() *cli.Command {
	filters := func() []cli.Flag {
		return []cli.Flag{
			&cli.StringFlag{Name: "user", Usage: "only what concerns `USER`"},
			&cli.StringFlag{Name: "room", Usage: "only what concerns `ROOM`"},
			&cli.StringFlag{Name: "action", Usage: "only that `ACTION`: user.revoke, connect; user.* for all below it"},
			&cli.StringFlag{Name: "kind", Usage: "only `attempt|outcome|denial|connect`"},
			&cli.StringFlag{Name: "actor", Usage: "only what `USER` did; direct for break-glass"},
		}
	}
	return &cli.Command{
		Name:        "audit",
		Category:    "access",
		Usage:       "who did what, who was refused, who connected",
		Description: "Every change leaves an attempt and an outcome, every refusal a denial.",
		Subcommands: []*cli.Command{
			{
				Name: "list", Usage: "what is on record, oldest first",
				Description: "   unibusctl audit list --user alice --since 7d\n   unibusctl audit list --action 'user.*' --limit 20",
				Flags: append(filters(),
					&cli.StringFlag{Name: "since", Value: "24h", Usage: "from that `TIME` on, or that long ago (90m, 30d)"},
					&cli.IntFlag{Name: "limit", Usage: "only the newest `N` of them"}),
				Action: a.auditList,
			},
			{
				Name: "tail", Usage: "what comes from now on, until interrupted",
				Description: "With --json one object a line.\n\n   unibusctl audit tail --action 'user.*'",
				Flags:       append(filters(), &cli.StringFlag{Name: "since", Usage: "begin at that `TIME`, or that long ago"}),
				Action:      a.auditTail,
			},
			{
				Name: "verify", Usage: "is the record whole? exit code 0 yes, 1 no, with what is wrong",
				Description: "Follows every chain and checks every signed checkpoint. Over the API a node does it; with\n" +
					"--direct this machine does. --signer names keys whose checkpoints count: keep their names\n" +
					"elsewhere than in the cluster.\n\n" +
					"   unibusctl --direct audit verify --signer UA...",
				Flags:  []cli.Flag{&cli.StringSliceFlag{Name: "signer", Usage: "trust the checkpoints of that public `NKEY` only (repeat)"}},
				Action: a.auditVerify,
			},
		},
	}
}

func (a *app) auditQuery(c *cli.Context) (q client.AuditQuery, err error) {
	if _, err := positional(c); err != nil {
		return q, err
	}
	q = client.AuditQuery{Action: c.String("action"), Kind: bus.AuditKind(c.String("kind")), Limit: 500}
	switch q.Kind {
	case "", bus.AuditAttempt, bus.AuditOutcome, bus.AuditDenial, bus.AuditConnect:
	default:
		return q, bus.E(bus.Invalid, "kind %s is refused: a kind is attempt, outcome, denial or connect", quote(string(q.Kind)))
	}
	if s := c.String("user"); s != "" {
		if q.User, err = userName(s); err != nil {
			return q, err
		}
	}
	if q.Actor = c.String("actor"); q.Actor != "" && q.Actor != directActor {
		if q.Actor, err = userName(q.Actor); err != nil {
			return q, err
		}
	}
	if s := c.String("room"); s != "" {
		if q.Room, err = bus.ParseRoomID(s); err != nil {
			return q, err
		}
	}
	if s := c.String("since"); s != "" {
		q.Since, err = a.parseWhen(s, -1)
	}
	return q, err
}

func (a *app) auditList(c *cli.Context) error {
	q, err := a.auditQuery(c)
	if err != nil {
		return err
	}
	limit := c.Int("limit")
	if c.IsSet("limit") && limit < 1 {
		return usagef("--limit %d is no number of entries", limit)
	}
	records := []bus.AuditRecord{}
	b, err := a.open(c.Context)
	if err != nil {
		return err
	}
	defer b.Close()
	ctx, cancel := a.within(c.Context, verifyWithin)
	defer cancel()
	for {
		page, next, err := b.Audit(ctx, q)
		if err != nil {
			return err
		}
		if records = append(records, page...); limit > 0 && len(records) > limit {
			records = records[len(records)-limit:]
		}
		if next == "" {
			break
		}
		q.After = next
	}
	if len(records) == 0 {
		a.say("nothing since %s", stamp(&q.Since))
	}
	called := a.namesOf(ctx, b)
	return rows(a, "records", records, table.Row{"at", "kind", "action", "result", "actor", "user", "room", "from", "detail"}, func(r bus.AuditRecord) table.Row {
		return table.Row{stamp(&r.At), r.Kind, r.Action, verdict(r), called(r.Actor), called(r.User), r.Room, r.From, r.Detail}
	})
}

// namesOf calls keys by handle, for people who read a table. Keys that are not
// known, and those that share their handle with the key that took it over, stay
// as they are, for a name that could be two is none.
func (a *app) namesOf(ctx context.Context, b backend) func(nkey string) string {
	handles, holders := map[string]bus.Handle{}, map[bus.Handle]int{}
	if users, err := b.Users(ctx); err == nil && !a.set.json {
		for _, u := range users {
			handles[u.NKey] = u.Handle
			holders[u.Handle]++
		}
	}
	return func(nkey string) string {
		if h := handles[nkey]; h != "" && holders[h] == 1 {
			return string(h)
		}
		return nkey
	}
}

// verdict is the result with the reason.
func verdict(r bus.AuditRecord) string {
	if r.Code == "" || string(r.Code) == r.Result {
		return r.Result
	}
	return strings.TrimSpace(r.Result + " " + string(r.Code))
}

func (a *app) auditTail(c *cli.Context) error {
	q, err := a.auditQuery(c)
	if err != nil {
		return err
	}
	if q.Since.IsZero() {
		q.Since = a.now()
	}
	b, err := a.open(c.Context)
	if err != nil {
		return err
	}
	defer b.Close()
	called := a.namesOf(c.Context, b)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for failed := ""; ; {
		next, err := a.tailed(c.Context, b, &q, called)
		switch {
		case c.Err() != nil:
			return c.Err()
		case bus.CodeOf(err) == bus.Unavailable: // it will come back; nothing is missed meanwhile
			if failed != err.Error() {
				failed = err.Error()
				a.say("WARNING: %v", err)
			}
		case err != nil:
			return err
		case next:
			continue
		default:
			failed = ""
		}
		select {
		case <-c.Done():
			return c.Err()
		case <-tick.C:
		}
	}
}

// tailed prints one page and moves the cursor behind it. more reports that the
// next page is there already.
func (a *app) tailed(ctx context.Context, b backend, q *client.AuditQuery, called func(string) string) (more bool, err error) {
	ctx, cancel := a.within(ctx, readWithin)
	defer cancel()
	page, next, err := b.Audit(ctx, *q)
	if err != nil {
		return false, err
	}
	for _, r := range page {
		if a.set.json {
			if err := json.NewEncoder(a.out).Encode(r); err != nil {
				return false, err
			}
			continue
		}
		line := fmt.Sprintf("%s %-7s %s %s actor=%s user=%s room=%s from=%s %s", stamp(&r.At), r.Kind, r.Action, verdict(r), called(r.Actor), called(r.User), r.Room, r.From, r.Detail)
		if _, err := fmt.Fprintln(a.out, oneLine(line)); err != nil {
			return false, err
		}
	}
	switch {
	case next != "":
		q.After = next
	case len(page) > 0:
		last := page[len(page)-1]
		q.After = fmt.Sprintf("%d.%d", last.Seq, last.Index)
	}
	return next != "", nil
}

func (a *app) auditVerify(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	signers := c.StringSlice("signer")
	for _, s := range signers {
		if !nkeys.IsValidPublicKey(s) {
			return bus.E(bus.Invalid, "%s is no public nkey", quote(s))
		}
	}
	b, err := a.open(c.Context)
	if err != nil {
		return err
	}
	defer b.Close()
	ctx, cancel := a.within(c.Context, verifyWithin)
	defer cancel()
	r, err := b.VerifyAudit(ctx, signers)
	if err != nil {
		return err
	}
	// Whoever rewrites all of it can leave the checkpoints out.
	if len(signers) > 0 && !slices.ContainsFunc(r.Signers, func(s string) bool { return slices.Contains(signers, s) }) {
		r.OK = false
		r.Findings = append(r.Findings, bus.AuditFinding{Problem: "no checkpoint is signed by a trusted key"})
	}
	err = a.print(map[string]any{"report": r}, func(t table.Writer) {
		t.AppendRows([]table.Row{
			{"verdict", map[bool]string{true: "whole", false: "NOT WHOLE"}[r.OK]},
			{"entries", fmt.Sprintf("%d in %d blocks, sequences %d to %d", r.Entries, r.Blocks, r.FirstSeq, r.LastSeq)},
			{"dropped", r.Dropped},
			{"checkpoints", fmt.Sprintf("%d; %d blocks after the last one", r.Checkpoints, r.Unsigned)},
			{"signed by", strings.Join(r.Signers, " ")},
		})
		for _, ch := range r.Chains {
			t.AppendRow(table.Row{"chain " + ch.Instance, fmt.Sprintf("blocks %d to %d", ch.First, ch.Last)})
		}
		for _, f := range r.Findings {
			t.AppendRow(table.Row{"FINDING", describeFinding(f)})
		}
	})
	if err != nil || r.OK {
		return err
	}
	why := "the audit is not whole"
	if len(r.Findings) > 0 {
		why += ": " + describeFinding(r.Findings[0])
	}
	return bus.E(bus.Conflict, "%s", why)
}

func describeFinding(f bus.AuditFinding) string {
	where := ""
	if f.Seq != 0 {
		where += fmt.Sprintf("sequence %d: ", f.Seq)
	}
	if f.Instance != "" {
		where += fmt.Sprintf("block %d of %s: ", f.N, f.Instance)
	}
	return where + f.Problem
}
