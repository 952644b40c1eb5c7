package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"
)

// manualCommand prints unibusctl(1) for the packages: from the same tree as the
// help, so that neither can say what the other does not.
func (a *app) manualCommand() *cli.Command {
	return &cli.Command{
		Name:   "manual",
		Hidden: true,
		Usage:  "print the manual page, in roff",
		Description: "Example:\n  unibusctl manual > unibusctl.1\n" +
			"  man -l unibusctl.1",
		Action: func(c *cli.Context) error {
			if _, err := positional(c); err != nil {
				return err
			}
			w := &roff{w: a.out}
			w.manual(a.root())
			return w.err
		},
	}
}

// roff writes a page of man(7). Its error is that of the first write that failed.
type roff struct {
	w   io.Writer
	err error
}

// roffText makes text of ours text of roff's: a backslash would be an escape,
// and so would a dot or an apostrophe that begins a line. A minus that is typed
// must not become a hyphen.
var roffText = strings.NewReplacer(`\`, `\e`, "-", `\-`)

func (r *roff) line(format string, args ...any) {
	if r.err == nil {
		_, r.err = fmt.Fprintf(r.w, format+"\n", args...)
	}
}

func (r *roff) text(s string) {
	for line := range strings.SplitSeq(strings.TrimRight(s, "\n"), "\n") {
		line = roffText.Replace(line)
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			line = `\&` + line
		}
		if line == "" {
			line = ".sp" // an empty line outside of a macro is frowned upon
		}
		r.line("%s", line)
	}
}

func (r *roff) section(name string) { r.line(".SH %s", name) }

// asTyped is text whose lines stay as they are.
func (r *roff) asTyped(s string) {
	r.line(".nf")
	r.text(s)
	r.line(".fi")
}

func (r *roff) manual(root *cli.Command) {
	r.line(`.TH %s 1 "" "unibus" "unibus"`, strings.ToUpper(root.Name))
	r.section("NAME")
	r.text(root.Name + " - " + root.Usage)
	r.section("SYNOPSIS")
	r.text(root.Name + " COMMAND [flags] [arguments]")
	r.section("DESCRIPTION")
	r.text("Works over the API of a cluster with an identity of your own, or with --direct on its live records with the ops " +
		"seed. Flags and arguments may come in any order. What is printed for programs is on stdout, with --json as JSON; what is " +
		"said to people is on stderr.")
	r.section("GLOBAL FLAGS")
	r.flags(root.Flags)
	r.section("COMMANDS")
	r.commands(root.Name, root.Subcommands)
	r.section("EXIT STATUS")
	for _, s := range [][2]string{
		{"0", "done"},
		{"1", "refused or failed"},
		{"2", "wrong usage; nothing was done"},
		{"3", "not ready or not proven: no quorum, no answer in time. The same line again makes sense"},
		{"130", "interrupted"},
	} {
		r.item(s[0], s[1])
	}
	r.text("Commands named check, and doctor, use 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.")
	r.section("FILES")
	r.item("/etc/unibus", "the configuration of a node")
	r.item("/usr/share/doc/unibus/operations.md", "the runbook")
	r.section("SEE ALSO")
	r.text("unibus-membership(8), unibus-authcallout(8)")
}

func (r *roff) item(what, about string) {
	r.line(".TP")
	r.line(`.B "%s"`, strings.ReplaceAll(roffText.Replace(what), `"`, `\(dq`))
	r.text(about)
}

func (r *roff) flags(flags []cli.Flag) {
	for _, f := range flags {
		spelled, usage := describe(f)
		r.item(spelled, usage)
	}
}

// commands lists every command that does something by its whole name.
func (r *roff) commands(above string, commands []*cli.Command) {
	for _, c := range commands {
		name := above + " " + c.Name
		switch {
		case c.Hidden:
		case len(c.Subcommands) > 0:
			r.commands(name, c.Subcommands)
		default:
			r.line(`.SS "%s"`, roffText.Replace(strings.TrimSpace(name+" [flags] "+c.ArgsUsage)))
			r.text(c.Usage)
			if c.Description != "" {
				r.line(".sp")
				r.asTyped(c.Description)
			}
			r.flags(c.Flags)
		}
	}
}
