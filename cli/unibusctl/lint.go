package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"
)

func (a *app) configCheckCommand() *cli.Command {
	return &cli.Command{
		Name:  "check",
		Usage: "find what is wrong with a node's configuration before a server meets it",
		Description: "Runs nats-server -t, and then looks for what that lets pass: settings that stop a server at its start,\n" +
			"that open a way around the auth callout, that lose data, or that no longer fit keys and certificates.\n" +
			"One line per finding: file:line: what is wrong; fix: how. Exit code 0 ok, 1 warning, 2 critical,\n" +
			"3 not all could be read or tried.\n\n" +
			"--against names the configuration that runs now, and tells what the change would do to the users.\n\n" +
			"   unibusctl config check --dir /etc/unibus\n" +
			"   unibusctl config check --dir n1 --inventory nodes.env --against n1.old",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "dir", Required: true, Usage: "`DIR` that config render wrote"},
			&cli.StringFlag{Name: "inventory", TakesFile: true, Usage: "compare names, ports and addresses with `nodes.env`"},
			&cli.StringFlag{Name: "against", Usage: "the `DIR` that the server runs with now"},
			&cli.StringFlag{Name: "nats-server", TakesFile: true, Usage: "nats-server `BINARY` (default: beside unibusctl, or on PATH)"},
		},
		Action: func(c *cli.Context) error {
			return a.configCheck(c.Context, lintRequest{
				dir: c.String("dir"), inventory: c.String("inventory"), against: c.String("against"), server: c.String("nats-server"),
			})
		},
	}
}

// mainConf is what nats-server is started with, below a node's directory.
const mainConf = "nats/nats-server.conf"

type lintRequest struct{ dir, inventory, against, server string }

func (a *app) configCheck(ctx context.Context, r lintRequest) error {
	var inv *inventory
	if r.inventory != "" {
		var err error
		if inv, err = parseInventory(r.inventory); err != nil {
			return err
		}
	}
	l := &linter{dir: filepath.Clean(r.dir), inv: inv, now: a.now(), getenv: a.getenv}
	l.check(r.against)
	l.tryServer(ctx, r.server)
	return a.finishLint(l)
}

// lintFinding is one thing wrong at one place, and what to do about it.
type lintFinding struct {
	File     string   `json:"file"`
	Line     int      `json:"line,omitempty"`
	Severity severity `json:"severity"`
	Problem  string   `json:"problem"`
	Fix      string   `json:"fix"`
}

// String is the one line for a person. Only what is not critical says so.
func (f lintFinding) String() string {
	where := f.File
	if f.Line > 0 {
		where = fmt.Sprintf("%s:%d", f.File, f.Line)
	}
	if f.Severity != severityCritical {
		where += ": " + f.Severity.String()
	}
	return fmt.Sprintf("%s: %s; fix: %s", where, f.Problem, f.Fix)
}

// linter looks at one node's directory and collects what is wrong. It only
// reads.
type linter struct {
	dir    string
	inv    *inventory // nil: nothing to compare with
	now    time.Time
	getenv func(string) string

	conf     *confFile // nil until read
	findings []lintFinding
}

func (l *linter) found(s severity, at confPos, problem, fix string) {
	f := lintFinding{File: at.file, Line: at.line, Severity: s, Problem: problem, Fix: fix}
	if !slices.Contains(l.findings, f) {
		l.findings = append(l.findings, f)
	}
}

func (l *linter) critical(at confPos, problem, fix string) {
	l.found(severityCritical, at, problem, fix)
}

func (l *linter) warning(at confPos, problem, fix string) {
	l.found(severityWarning, at, problem, fix)
}

func (l *linter) unknown(at confPos, problem, fix string) {
	l.found(severityUnknown, at, problem, fix)
}

// said reports whether a critical finding names this line already, so that one
// mistake makes one line.
func (l *linter) said(at confPos) bool {
	return slices.ContainsFunc(l.findings, func(f lintFinding) bool {
		return f.File == at.file && f.Line == at.line && f.Severity == severityCritical
	})
}

func (l *linter) severity() severity {
	s := severityOK
	for _, f := range l.findings {
		s = s.worse(f.Severity)
	}
	return s
}

// path names a file of the node.
func (l *linter) path(name string) string { return filepath.Join(l.dir, filepath.FromSlash(name)) }

// get returns a setting of nats-server, nil where it is not set.
func (l *linter) get(path ...string) *confValue { return l.conf.root.at(path...) }

// where is the place to mend a setting: its own, or the innermost block it
// belongs into.
func (l *linter) where(path ...string) confPos {
	for n := len(path); n > 0; n-- {
		if v := l.get(path[:n]...); v != nil {
			return v.pos
		}
	}
	return confPos{l.path(mainConf), 1}
}

// check is all that needs no nats-server. against may be empty.
func (l *linter) check(against string) {
	if !l.read() {
		return
	}
	l.settings()
	l.text()
	l.accounts()
	l.network()
	l.files()
	l.keys()
	l.certificates()
	l.edits()
	if against != "" {
		l.against(filepath.Clean(against))
	}
}

// read parses the configuration, and says whether there is one to look at.
func (l *linter) read() bool {
	conf, err := readConf(l.path(mainConf), l.getenv)
	var broken *confError
	switch {
	case err == nil:
		l.conf = conf
		return true
	case !errors.As(err, &broken):
		l.unknown(confPos{file: l.path(mainConf)}, err.Error(), "check the directory")
	case errors.Is(err, fs.ErrNotExist):
		l.unknown(confPos{file: broken.pos.file}, "there is no such file", "name with --dir what unibusctl config render wrote")
	case broken.unwanted != nil:
		l.unknown(broken.pos, broken.problem, broken.fix)
	default:
		l.critical(broken.pos, broken.problem, broken.fix)
	}
	return false
}

// finishLint prints the findings, the worst first, and ends with the Nagios
// code of the worst.
func (a *app) finishLint(l *linter) error {
	slices.SortStableFunc(l.findings, func(x, y lintFinding) int {
		switch {
		case x.Severity == y.Severity:
			return cmp.Or(strings.Compare(x.File, y.File), cmp.Compare(x.Line, y.Line))
		case x.Severity.worse(y.Severity) == x.Severity:
			return -1
		}
		return 1
	})
	s := l.severity()
	if a.set.json {
		findings := l.findings
		if findings == nil {
			findings = []lintFinding{}
		}
		if err := a.print(map[string]any{"dir": l.dir, "status": s, "findings": findings}, func(table.Writer) {}); err != nil {
			return err
		}
		return &checkResult{code: int(s)}
	}
	for _, f := range l.findings {
		fmt.Fprintln(a.out, oneLine(f.String()))
	}
	return &checkResult{code: int(s), line: l.summary(s)}
}

func (l *linter) summary(s severity) string {
	count := map[severity]int{}
	for _, f := range l.findings {
		count[f.Severity]++
	}
	var parts []string
	for _, level := range []severity{severityCritical, severityUnknown, severityWarning} {
		if count[level] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", count[level], level))
		}
	}
	if len(parts) == 0 {
		parts = []string{"nothing found"}
	}
	return fmt.Sprintf("CONFIG %s - %s: %s", strings.ToUpper(s.String()), l.dir, strings.Join(parts, ", "))
}

// modeOf returns a file's permissions; ok is false for what is not there.
func modeOf(path string) (mode fs.FileMode, ok bool) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, false
	}
	return info.Mode().Perm(), true
}
