package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"golang.org/x/term"

	"unibus.internal/bus"
)

// print is the one way data reaches stdout: v as JSON with --json, else the
// table that fill fills. v marshals to an object with snake_case names and
// times in UTC.
func (a *app) print(v any, fill func(t table.Writer)) error {
	if a.set.json {
		e := json.NewEncoder(a.out)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	t := table.NewWriter()
	fill(t)
	_, err := fmt.Fprintln(a.out, a.render(t))
	return err
}

// render draws borders for a person who has the room to see them, and plain
// columns for pipes, narrow windows and NO_COLOR.
func (a *app) render(t table.Writer) string {
	if width, ok := a.decorate(); ok {
		t.SetStyle(table.StyleRounded)
		s := printable(t.Render())
		if width == 0 || longestLine(s) <= width {
			return s
		}
	}
	t.SetStyle(plainStyle())
	lines := strings.Split(printable(t.Render()), "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}

// decorate reports whether stdout gets borders, and the width of its window,
// 0 if it has none.
func (a *app) decorate() (width int, ok bool) {
	f, isFile := a.out.(*os.File)
	tty := isFile && term.IsTerminal(int(f.Fd()))
	if tty {
		width, _, _ = term.GetSize(int(f.Fd()))
	}
	switch {
	case a.set.color == "always":
		return width, true
	case a.set.color == "never", a.getenv("NO_COLOR") != "":
		return 0, false
	}
	return width, tty
}

func plainStyle() table.Style {
	s := table.StyleDefault
	s.Options = table.OptionsNoBordersAndSeparators
	s.Box.PaddingLeft, s.Box.PaddingRight = "", "  "
	return s
}

func longestLine(s string) int {
	most := 0
	for l := range strings.SplitSeq(s, "\n") {
		most = max(most, text.StringWidthWithoutEscSequences(l))
	}
	return most
}

// printable replaces what would move a terminal's cursor or set its title:
// text from the bus may come from a hostile member.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// oneLine keeps a message on the line it was given.
func oneLine(s string) string {
	return strings.ReplaceAll(printable(strings.TrimSpace(s)), "\n", " ")
}

// quote shows a word of the person's own on one bounded line.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return strconv.Quote(s)
}

// say tells the person at stderr something that is not data. --quiet silences
// it.
func (a *app) say(format string, args ...any) {
	if !a.set.quiet {
		fmt.Fprintln(a.errw, printable(fmt.Sprintf(format, args...)))
	}
}

// confirm asks before something that cannot be taken back. Without a person to
// ask, only --yes is consent.
func (a *app) confirm(prompt string) error {
	if a.set.yes {
		return nil
	}
	f, ok := a.in.(*os.File)
	if a.set.noInput || !ok || !term.IsTerminal(int(f.Fd())) {
		return usagef("%s needs --yes when nobody can be asked", quote(oneLine(prompt)))
	}
	fmt.Fprintf(a.errw, "%s [y/N] ", oneLine(prompt))
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(io.LimitReader(a.in, 1<<10)).ReadString('\n')
		answer <- line
	}()
	select {
	case <-a.interrupted:
		fmt.Fprintln(a.errw)
		return errors.New("interrupted")
	case line := <-answer:
		if strings.EqualFold(strings.TrimSpace(line), "y") || strings.EqualFold(strings.TrimSpace(line), "yes") {
			return nil
		}
		return bus.E(bus.Forbidden, "not confirmed, nothing was changed")
	}
}

// report prints an error as at most two lines on stderr, what failed and what
// to do next, and returns the exit code.
func (a *app) report(err error) int {
	code := exitCode(err)
	if err == nil {
		return code
	}
	var check *checkResult
	if errors.As(err, &check) {
		if !a.set.json {
			fmt.Fprintln(a.out, oneLine(check.line))
		}
		return code
	}
	fmt.Fprintf(a.errw, "%s: %s\n", programName, oneLine(err.Error()))
	if hint := a.hint(err); hint != "" {
		fmt.Fprintf(a.errw, "Try: %s\n", oneLine(hint))
	}
	return code
}

func (a *app) hint(err error) string {
	var usage *usageError
	if errors.As(err, &usage) {
		if usage.hint != "" {
			return usage.hint
		}
		return a.command + " --help"
	}
	var e *bus.Error
	if !errors.As(err, &e) {
		return ""
	}
	if e.Code == bus.Unauthenticated && e.Hint == "" && !a.set.direct { // the API does not say why, to nobody
		return programName + " identity show " + a.set.identity + ": is this the key of an active user?"
	}
	if rest, ok := strings.CutPrefix(e.Hint, programName+" "); ok && a.set.direct && !strings.HasPrefix(rest, "--direct") {
		return programName + " --direct " + rest
	}
	return e.Hint
}
