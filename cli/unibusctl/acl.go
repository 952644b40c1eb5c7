package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

func (a *app) aclCommand() *cli.Command {
	return &cli.Command{
		Name:     "acl",
		Category: "access",
		Usage:    "what a user may do on NATS, and why",
		Subcommands: []*cli.Command{
			{
				Name: "explain", ArgsUsage: "USER",
				Usage: "every subject that a user may publish or subscribe, and what grants it",
				Description: "These are exactly the subjects of the credential that a connect would get now.\n\n" +
					"   unibusctl acl explain alice",
				Action: a.aclExplain,
			},
			{
				Name: "can-i", ArgsUsage: "USER publish|subscribe SUBJECT",
				Usage: "may that user do that? exit code 0 yes, 1 no",
				Description: "A subject to subscribe may hold wildcards; all that it matches must be allowed.\n\n" +
					"   unibusctl acl can-i alice subscribe 'room.ops.>'",
				Action: a.aclCan,
			},
		},
	}
}

func (a *app) aclExplain(c *cli.Context) error {
	user, err := oneUser(c)
	if err != nil {
		return err
	}
	x, err := a.access(c, user)
	if err != nil {
		return err
	}
	if !x.Admitted {
		a.say("%s is not admitted: %s", x.User.Handle, x.Reason)
	}
	return a.print(map[string]any{"access": x}, func(t table.Writer) {
		t.AppendHeader(table.Row{"may", "subject", "because of"})
		for _, r := range x.Publish {
			t.AppendRow(table.Row{"publish", r.Subject, because(r)})
		}
		for _, r := range x.Subscribe {
			t.AppendRow(table.Row{"subscribe", r.Subject, because(r)})
		}
	})
}

func (a *app) access(c *cli.Context, user string) (x bus.AccessInfo, err error) {
	err = a.reading(c.Context, func(ctx context.Context, b backend) (err error) {
		x, err = b.Access(ctx, user)
		return err
	})
	return x, err
}

func because(r bus.SubjectRule) string {
	if r.Room == "" {
		return "every user"
	}
	return fmt.Sprintf("%s of room %s", r.Role, r.Room)
}

func (a *app) aclCan(c *cli.Context) error {
	arg, err := positional(c, "USER", "publish|subscribe", "SUBJECT")
	if err != nil {
		return err
	}
	user, err := userName(arg[0])
	if err != nil {
		return err
	}
	verb, subject := arg[1], arg[2]
	if verb != "publish" && verb != "subscribe" {
		return usagef("%s is neither publish nor subscribe", quote(verb))
	}
	if !validSubject(subject, verb == "subscribe") {
		return bus.E(bus.Invalid, "%s is no subject to %s", quote(subject), verb)
	}
	x, err := a.access(c, user)
	if err != nil {
		return err
	}
	rules := x.Publish
	if verb == "subscribe" {
		rules = x.Subscribe
	}
	answer := struct {
		Allowed bool             `json:"allowed"`
		Reason  string           `json:"reason"`
		Rule    *bus.SubjectRule `json:"rule"`
	}{Reason: fmt.Sprintf("nothing lets %s %s this", x.User.Handle, verb)}
	if !x.Admitted {
		answer.Reason = fmt.Sprintf("%s is not admitted: %s", x.User.Handle, x.Reason)
	}
	for _, r := range rules {
		if covers(r.Subject, subject) {
			answer.Allowed, answer.Reason, answer.Rule = true, because(r), &r
			break
		}
	}
	line := map[bool]string{true: "yes: ", false: "no: "}[answer.Allowed] + answer.Reason
	if a.set.json {
		if err := a.print(answer, nil); err != nil {
			return err
		}
	}
	if !answer.Allowed {
		return &checkResult{code: exitFailed, line: line}
	}
	if !a.set.json {
		fmt.Fprintln(a.out, line)
	}
	return nil
}

// covers reports whether everything that subject matches is matched by rule. A
// subject may hold wildcards of its own: "room.*.>" is more than "room.ops.>".
func covers(rule, subject string) bool {
	have, want := strings.Split(rule, "."), strings.Split(subject, ".")
	for i, h := range have {
		switch {
		case h == ">":
			return len(want) > i
		case len(want) <= i || want[i] == ">":
			return false
		case h == "*":
		case h != want[i]:
			return false
		}
	}
	return len(have) == len(want)
}

// validSubject holds a subject to the grammar of NATS; wildcards are for
// subscriptions.
func validSubject(s string, wildcards bool) bool {
	tokens := strings.Split(s, ".")
	for i, t := range tokens {
		switch {
		case t == "" || strings.ContainsAny(t, " \t\r\n\x00"):
			return false
		case t == ">" && i < len(tokens)-1:
			return false
		case !wildcards && (t == "*" || t == ">"):
			return false
		}
	}
	return true
}
