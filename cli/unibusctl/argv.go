package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// commandLine is an argv that has been understood: cli/v2 will parse it the
// way the person meant it. Only parseLine makes one.
type commandLine struct {
	path          []*cli.Command // root first
	flags         [][]string     // flags[i] belongs to path[i], as "--name" or "--name=value"
	given         map[cli.Flag]bool
	args          []string
	help, version bool
}

// parseLine reads argv against the command tree.
//
// cli/v2 stops looking for flags at the first positional: "user revoke KEY
// --yes" would run with yes=false and "--yes" as an argument, silently. So
// flags may stand anywhere after their command, global flags anywhere at all,
// and what starts with a dash and is no flag is refused rather than passed on.
// "--" ends the flags. On error the returned line still names the command.
func parseLine(root *cli.Command, argv []string) (*commandLine, error) {
	l := &commandLine{path: []*cli.Command{root}, flags: [][]string{nil}, given: map[cli.Flag]bool{}}
	if len(argv) > 0 && argv[0] == "help" {
		l.help, argv = true, argv[1:]
	}
	for len(argv) > 0 {
		word := argv[0]
		argv = argv[1:]
		var err error
		switch {
		case word == "--":
			l.args, argv = append(l.args, argv...), nil
		case word == "--help" || word == "-h":
			l.help = true
		case word == "--version":
			l.version = true
		case isFlag(word):
			argv, err = l.takeFlag(word, argv)
		case len(l.leaf().Subcommands) > 0:
			err = l.descend(word)
		default:
			l.args = append(l.args, word)
		}
		if err != nil {
			return l, err
		}
	}
	if l.help || l.version {
		return l, nil
	}
	return l, l.complete()
}

// isFlag: a lone dash is an argument, by custom the standard input.
func isFlag(word string) bool { return len(word) > 1 && word[0] == '-' }

func (l *commandLine) leaf() *cli.Command { return l.path[len(l.path)-1] }

// name is the command as a person types it.
func (l *commandLine) name() string {
	names := make([]string, len(l.path))
	for i, c := range l.path {
		names[i] = c.Name
	}
	return strings.Join(names, " ")
}

// argv is the line in the one order that cli/v2 understands.
func (l *commandLine) argv() []string {
	var argv []string
	for i, c := range l.path {
		argv = append(append(argv, c.Name), l.flags[i]...)
	}
	if len(l.args) > 0 {
		argv = append(append(argv, "--"), l.args...)
	}
	return argv
}

func (l *commandLine) descend(word string) error {
	next := l.leaf().Command(word)
	if next == nil {
		return &usageError{msg: "unknown command " + quote(word) + didYouMean(word, commandNames(l.leaf()))}
	}
	l.path, l.flags = append(l.path, next), append(l.flags, nil)
	return nil
}

// takeFlag files one flag, and the value that follows it, under the innermost
// command that knows it. It returns what is left of argv.
func (l *commandLine) takeFlag(word string, rest []string) ([]string, error) {
	spelled, value, joined := strings.Cut(word, "=")
	level, flag := l.find(spelled)
	if flag == nil {
		return nil, usagef("unknown flag %s%s", quote(spelled), didYouMean(strings.TrimLeft(spelled, "-"), l.flagNames()))
	}
	name := "--" + flag.Names()[0]
	if l.given[flag] && !repeatable(flag) {
		return nil, usagef("%s is given twice", name)
	}
	l.given[flag] = true
	if !joined && takesValue(flag) {
		if len(rest) == 0 || isFlag(rest[0]) {
			return nil, usagef("%s needs a value (one that starts with a dash is written %s=VALUE)", name, name)
		}
		value, rest, joined = rest[0], rest[1:], true
	}
	if joined {
		name += "=" + value
	}
	l.flags[level] = append(l.flags[level], name)
	return rest, nil
}

// find looks a flag up as it is spelled: --name, or -x for names of one
// letter.
func (l *commandLine) find(spelled string) (level int, flag cli.Flag) {
	name := strings.TrimPrefix(spelled, "-")
	if len(name) > 1 {
		if name[0] != '-' || len(name) == 2 {
			return 0, nil
		}
		name = name[1:]
	}
	for level := len(l.path) - 1; level >= 0; level-- {
		for _, f := range l.path[level].Flags {
			if slices.Contains(f.Names(), name) {
				return level, f
			}
		}
	}
	return 0, nil
}

// complete checks what can be known only at the end of the line.
func (l *commandLine) complete() error {
	leaf := l.leaf()
	if len(leaf.Subcommands) > 0 {
		return usagef("%s needs a command: %s", l.name(), strings.Join(commandNames(leaf), ", "))
	}
	for _, f := range leaf.Flags {
		if r, ok := f.(cli.RequiredFlag); ok && r.IsRequired() && !l.given[f] {
			return usagef("--%s is missing", f.Names()[0])
		}
	}
	if leaf.ArgsUsage == "" && len(l.args) > 0 {
		return usagef("unexpected argument %s: %s takes flags only", quote(l.args[0]), l.name())
	}
	return nil
}

func takesValue(f cli.Flag) bool {
	d, ok := f.(cli.DocGenerationFlag)
	return ok && d.TakesValue()
}

func repeatable(f cli.Flag) bool {
	d, ok := f.(cli.DocGenerationSliceFlag)
	return ok && d.IsSliceFlag()
}

func commandNames(c *cli.Command) []string {
	var names []string
	for _, s := range c.Subcommands {
		if !s.Hidden {
			names = append(names, s.Name)
		}
	}
	return names
}

// flagNames are the long names that would be understood here.
func (l *commandLine) flagNames() []string {
	names := []string{"help", "version"}
	for _, c := range l.path {
		for _, f := range c.Flags {
			names = append(names, f.Names()[0])
		}
	}
	for i := range names {
		names[i] = "--" + names[i]
	}
	return names
}

// didYouMean names the nearest of names, if one is near enough to be a slip
// of the fingers.
func didYouMean(word string, names []string) string {
	best, least := "", 1+len(word)/3
	for _, n := range names {
		if d := distance(word, strings.TrimPrefix(n, "--")); d <= least {
			best, least = n, d-1
		}
	}
	if best == "" {
		return ""
	}
	return ", did you mean " + best + "?"
}

// distance is the Levenshtein distance with a swap of neighbours counted as
// one edit.
func distance(a, b string) int {
	prev2, prev, row := []int(nil), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = min(prev[j]+cost, prev[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], prev2[j-1]+1)
			}
		}
		prev2, prev, row = prev, row, make([]int, len(b)+1)
	}
	return prev[len(b)]
}
