package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

// app is one invocation: what it reads and writes, and what was set. Tests
// build their own.
type app struct {
	in        io.Reader
	out, errw io.Writer
	getenv    func(string) string
	now       func() time.Time
	rand      io.Reader
	set       settings

	command     string          // as typed, "unibusctl user revoke"; for hints
	interrupted <-chan struct{} // closed by SIGINT and SIGTERM
}

// commands is the command tree. Each noun lives in the file of its name.
func (a *app) commands() []*cli.Command {
	return []*cli.Command{
		a.bootstrapCommand(),
		a.importCommand(),
		a.joinCommand(),
		a.whoamiCommand(),
		a.userCommand(),
		a.inviteCommand(),
		a.roomCommand(),
		a.connCommand(),
		a.aclCommand(),
		a.auditCommand(),
		a.clusterCommand(),
		a.doctorCommand(),
		a.checkCommand(),
		a.backupCommand(),
		a.restoreCommand(),
		a.identityCommand(),
		a.pkiCommand(),
		a.configCommand(),
		a.deployCommand(),
		a.envCommand(),
		a.apiCommand(),
		a.completionCommand(),
		a.manualCommand(),
	}
}

// run executes one command line and returns the exit code of the table in
// main.go.
func (a *app) run(ctx context.Context, argv []string) int {
	a.command, a.interrupted = programName, ctx.Done()
	err := a.dispatch(ctx, argv)
	if err != nil && ctx.Err() != nil {
		fmt.Fprintf(a.errw, "%s: interrupted\n", programName)
		return exitInterrupted
	}
	return a.report(err)
}

const programName = "unibusctl"

func (a *app) dispatch(ctx context.Context, argv []string) error {
	root := a.root()
	if words, ok := completionRequest(argv); ok {
		return a.complete(root, words)
	}
	line, err := parseLine(root, argv)
	a.command = line.name()
	switch {
	case err != nil:
		return err
	case line.help:
		return a.printHelp(line)
	case line.version:
		_, err := fmt.Fprintln(a.out, programName, version())
		return err
	}
	return a.cliApp(root).RunContext(ctx, line.argv())
}

// root is the whole tree as one command, which is how argv.go, help and
// completion see it.
func (a *app) root() *cli.Command {
	return &cli.Command{
		Name:        programName,
		Usage:       "operate a unibus: its users, rooms, nodes and keys",
		Flags:       globalFlags(),
		Subcommands: a.commands(),
		Description: "Example:\n  unibusctl identity new --out alice.nk\n  unibusctl user list --json",
	}
}

// cliApp hands the tree to cli/v2 for the typed parsing of flags. Its help,
// its suggestions and its exits stay off: parseLine has settled all that, and
// cli/v2 would print help on stdout and choose exit codes of its own.
func (a *app) cliApp(root *cli.Command) *cli.App {
	app := &cli.App{
		Name:            root.Name,
		Flags:           root.Flags,
		Commands:        root.Subcommands,
		HideHelp:        true,
		HideVersion:     true,
		HideHelpCommand: true,
		Reader:          a.in,
		Writer:          a.out,
		ErrWriter:       a.errw,
		ExitErrHandler:  func(*cli.Context, error) {},
		OnUsageError:    onUsageError,
		Before:          a.before,
	}
	dress(root.Subcommands)
	return app
}

func dress(commands []*cli.Command) {
	for _, c := range commands {
		c.OnUsageError = onUsageError
		dress(c.Subcommands)
	}
}

// onUsageError receives what only cli/v2 can find: a value of the wrong type.
func onUsageError(_ *cli.Context, err error, _ bool) error {
	return usagef("%s", strings.TrimSuffix(err.Error(), ": parse error"))
}

func (a *app) before(c *cli.Context) (err error) {
	a.set, err = resolveSettings(c, a.getenv)
	return err
}

// version is what the Go tool stamped into the binary.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version + " " + info.GoVersion
}

// The exit codes; main.go explains them.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotProven   = 3
	exitInterrupted = 130
)

// usageError is a command line that cannot be run as written.
type usageError struct{ msg, hint string }

func (e *usageError) Error() string { return e.msg }

// usagef returns an error for a wrong command line: exit code 2, with the
// command's help as the hint.
func usagef(format string, args ...any) error {
	return &usageError{msg: fmt.Sprintf(format, args...)}
}

// checkResult ends a check command with a Nagios code (0 OK, 1 WARNING,
// 2 CRITICAL, 3 UNKNOWN) and one line on stdout. With --json the command
// prints its own object and the line is left out.
type checkResult struct {
	code int
	line string
}

func (r *checkResult) Error() string { return r.line }

// exitCode maps an error to the table in main.go. A bare timeout is "not
// proven": it says nothing about what the cluster did.
func exitCode(err error) int {
	var usage *usageError
	var check *checkResult
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &check):
		return check.code
	case errors.As(err, &usage):
		return exitUsage
	case bus.CodeOf(err) == bus.Unavailable, errors.Is(err, context.DeadlineExceeded):
		return exitNotProven
	}
	return exitFailed
}

// positional returns exactly the named arguments of a command.
func positional(c *cli.Context, names ...string) ([]string, error) {
	args := c.Args().Slice()
	if len(args) < len(names) {
		return nil, usagef("%s is missing", names[len(args)])
	}
	if len(args) > len(names) {
		return nil, usagef("unexpected argument %q", args[len(names)])
	}
	return args, nil
}
