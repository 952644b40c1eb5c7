package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

func testApp() (a *app, out, errw *bytes.Buffer) {
	out, errw = new(bytes.Buffer), new(bytes.Buffer)
	return &app{in: strings.NewReader(""), out: out, errw: errw, getenv: func(string) string { return "" }}, out, errw
}

func testTree() *cli.Command {
	return &cli.Command{
		Name: programName, Flags: globalFlags(),
		Subcommands: []*cli.Command{{
			Name: "user",
			Subcommands: []*cli.Command{
				{Name: "revoke", ArgsUsage: "USER"},
				{Name: "add", Flags: []cli.Flag{
					&cli.StringFlag{Name: "handle", Required: true},
					&cli.StringSliceFlag{Name: "room"},
				}},
			},
		}},
	}
}

func TestArgumentOrder(t *testing.T) {
	const revoke = "unibusctl --yes user revoke -- alice"
	for line, want := range map[string]string{
		"user revoke alice --yes":               revoke,
		"user revoke --yes alice":               revoke,
		"user -y revoke alice":                  revoke,
		"--yes user revoke alice":               revoke,
		"user revoke -- --yes":                  "unibusctl user revoke -- --yes",
		"user revoke -":                         "unibusctl user revoke -- -",
		"user revoke a --timeout 5s":            "unibusctl --timeout=5s user revoke -- a",
		"user add --json --handle=-x":           "unibusctl --json user add --handle=-x",
		"user add --room a --handle h --room b": "unibusctl user add --room=a --handle=h --room=b",
	} {
		l, err := parseLine(testTree(), strings.Fields(line))
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		if got := strings.Join(l.argv(), " "); got != want {
			t.Errorf("%s\n got %s\nwant %s", line, got, want)
		}
	}
}

func TestRefusedLines(t *testing.T) {
	for line, want := range map[string]string{
		"":                               "unibusctl needs a command: user",
		"user":                           "unibusctl user needs a command: revoke, add",
		"usr":                            `unknown command "usr", did you mean user?`,
		"zebra":                          `unknown command "zebra"`,
		"user revoke alice --yse":        `unknown flag "--yse", did you mean --yes?`,
		"user revoke alice -yes":         `unknown flag "-yes", did you mean --yes?`,
		"user revoke -x":                 `unknown flag "-x"`,
		"user revoke a --yes -y":         "--yes is given twice",
		"user add --handle --json":       "--handle needs a value (one that starts with a dash is written --handle=VALUE)",
		"user add --handle":              "--handle needs a value (one that starts with a dash is written --handle=VALUE)",
		"user add":                       "--handle is missing",
		"user add --handle a --handle b": "--handle is given twice",
		"user add --handle a b":          `unexpected argument "b": unibusctl user add takes flags only`,
		"--handle a user add":            `unknown flag "--handle"`,
	} {
		_, err := parseLine(testTree(), strings.Fields(line))
		var usage *usageError
		if !errors.As(err, &usage) || usage.msg != want {
			t.Errorf("%q: got %v, want %s", line, err, want)
		}
	}
}

// No line may reach cli/v2 in an order in which it would read a flag as an
// argument, whatever is typed.
func FuzzParseLine(f *testing.F) {
	for _, s := range []string{"user revoke alice --yes", "user add --handle -x", "-- -y", "user - --"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := parseLine(testTree(), strings.Split(s, " "))
		if err != nil {
			return
		}
		argv := l.argv()
		if i := slices.Index(argv, "--"); i >= 0 && !slices.Equal(argv[i+1:], l.args) {
			t.Errorf("%q: arguments %q, after -- %q", s, l.args, argv[i+1:])
		}
		again, err := parseLine(testTree(), argv[1:])
		if err == nil && !l.help && !l.version && !slices.Equal(again.argv(), argv) {
			t.Errorf("%q is not stable: %q, then %q", s, argv, again.argv())
		}
	})
}

// Every command is documented the same way: what it does, and an example that
// itself parses far enough to name that command.
func TestHelpOfEveryCommand(t *testing.T) {
	a, out, _ := testApp()
	var walk func(path []string, c *cli.Command)
	walk = func(path []string, c *cli.Command) {
		name := strings.Join(path, " ")
		out.Reset()
		if code := a.run(context.Background(), append(slices.Clone(path), "--help")); code != exitDone {
			t.Errorf("%s --help exits %d", name, code)
		}
		if c.Usage == "" || !strings.Contains(out.String(), c.Usage) {
			t.Errorf("%s: no usage in its help", name)
		}
		if len(c.Subcommands) == 0 && !strings.Contains(c.Description, programName+" ") {
			t.Errorf("%s: no example in its help", name)
		}
		for _, s := range c.Subcommands {
			walk(append(slices.Clone(path), s.Name), s)
		}
	}
	walk(nil, a.root())
}

func TestExitCodes(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), 1},
		{bus.E(bus.Conflict, "x"), 1},
		{bus.E(bus.Internal, "x"), 1},
		{fmt.Errorf("add: %w", usagef("x")), 2},
		{fmt.Errorf("add: %w", bus.E(bus.Unavailable, "x")), 3},
		{fmt.Errorf("add: %w", context.DeadlineExceeded), 3},
		{&checkResult{code: 2, line: "CRITICAL"}, 2},
	} {
		if got := exitCode(tt.err); got != tt.want {
			t.Errorf("%v: exit %d, want %d", tt.err, got, tt.want)
		}
	}
}

func TestInterruptedExits130(t *testing.T) {
	a, _, errw := testApp()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if code := a.run(ctx, []string{"identity", "convert", "no-key"}); code != exitInterrupted {
		t.Errorf("exit %d, want %d; %s", code, exitInterrupted, errw)
	}
}
