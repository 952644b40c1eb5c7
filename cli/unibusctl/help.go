package main

import (
	"fmt"
	"regexp"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"
)

// printHelp writes the help that was asked for to stdout. Nothing else prints
// help: a mistake gets one line and a hint.
func (a *app) printHelp(l *commandLine) error {
	c := l.leaf()
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "%s - %s\n\nUsage:\n  %s\n", l.name(), c.Usage, usageLine(l))
	if len(c.Subcommands) > 0 {
		fmt.Fprintf(w, "\nCommands:\n")
		for _, s := range c.Subcommands {
			if !s.Hidden {
				fmt.Fprintf(w, "  %s\t%s\n", s.Name, s.Usage)
			}
		}
	}
	if len(c.Flags) > 0 {
		fmt.Fprintf(w, "\nFlags:\n")
		for _, f := range c.Flags {
			spelled, usage := describe(f)
			fmt.Fprintf(w, "  %s\t%s\n", spelled, usage)
		}
	}
	if c.Description != "" {
		fmt.Fprintf(w, "\n%s\n", c.Description)
	}
	if len(l.path) > 1 {
		fmt.Fprintf(w, "\nGlobal flags work anywhere on the line: %s --help\n", programName)
	}
	return w.Flush()
}

func usageLine(l *commandLine) string {
	c := l.leaf()
	switch {
	case c.UsageText != "":
		return c.UsageText
	case len(c.Subcommands) > 0:
		return l.name() + " COMMAND"
	}
	return strings.TrimSpace(l.name() + " [flags] " + c.ArgsUsage)
}

// valueName finds the `NAME` of a flag's value in its usage, by the custom
// of Go's flag package. One with bars lists every choice there is.
var valueName = regexp.MustCompile("`([^`]*)`")

// describe returns a flag as it is typed, and what it does.
func describe(f cli.Flag) (spelled, usage string) {
	d, ok := f.(cli.DocGenerationFlag)
	if !ok {
		return "--" + f.Names()[0], ""
	}
	spelled, usage = "--"+f.Names()[0], d.GetUsage()
	for _, alias := range f.Names()[1:] {
		spelled = strings.Repeat("-", min(len(alias), 2)) + alias + ", " + spelled
	}
	if d.TakesValue() {
		name := "VALUE"
		if m := valueName.FindStringSubmatch(usage); m != nil {
			name = m[1]
		}
		spelled += " " + name
	}
	usage = strings.ReplaceAll(usage, "`", "")
	if r, ok := f.(cli.RequiredFlag); ok && r.IsRequired() {
		usage += " (required)"
	}
	if v := d.GetValue(); d.TakesValue() && v != "" && v != `""` {
		usage += " (default " + v + ")"
	}
	return spelled, usage
}
