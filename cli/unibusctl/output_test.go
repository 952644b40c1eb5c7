package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/jedib0t/go-pretty/v6/table"

	"unibus.internal/bus"
)

func TestTables(t *testing.T) {
	fill := func(w table.Writer) {
		w.AppendHeader(table.Row{"handle", "role"})
		w.AppendRow(table.Row{"alice", "admin"})
	}
	for _, tt := range []struct{ color, noColor, want string }{
		{"auto", "", "HANDLE  ROLE\nalice   admin\n"}, // a buffer is no terminal
		{"always", "", "╭────────┬───────╮\n│ HANDLE │ ROLE  │\n├────────┼───────┤\n│ alice  │ admin │\n╰────────┴───────╯\n"},
		{"never", "", "HANDLE  ROLE\nalice   admin\n"},
		{"auto", "1", "HANDLE  ROLE\nalice   admin\n"},
	} {
		a, out, _ := testApp()
		a.set.color = tt.color
		a.getenv = func(string) string { return tt.noColor }
		if err := a.print(nil, fill); err != nil {
			t.Fatal(err)
		}
		if out.String() != tt.want {
			t.Errorf("color %s: got\n%s", tt.color, out)
		}
	}
}

// A member who chooses their topic or file name must not write to the
// operator's terminal.
func TestTablesHoldNoEscapes(t *testing.T) {
	a, out, _ := testApp()
	if err := a.print(nil, func(w table.Writer) { w.AppendRow(table.Row{"a\x1b]0;owned\x07\u009b2Jb"}) }); err != nil {
		t.Fatal(err)
	}
	if strings.ContainsAny(out.String(), "\x1b\x07\u009b") {
		t.Errorf("escapes reach the terminal: %q", out)
	}
}

func TestErrorsAreTwoLines(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{errors.New("a\nb"), "unibusctl: a b\n"},
		{bus.E(bus.Conflict, "alice is there").WithHint("unibusctl user list"), "unibusctl: alice is there\nTry: unibusctl user list\n"},
		{usagef("x"), "unibusctl: x\nTry: unibusctl user add --help\n"},
	} {
		a, out, errw := testApp()
		a.command = "unibusctl user add"
		a.report(tt.err)
		if errw.String() != tt.want || out.Len() != 0 {
			t.Errorf("stderr %q, want %q; stdout %q", errw, tt.want, out)
		}
	}
}

func TestConfirmNeedsSomebodyToAsk(t *testing.T) {
	a, _, errw := testApp()
	a.in = strings.NewReader("y\n") // a pipe is nobody
	if err := a.confirm("revoke alice"); exitCode(err) != exitUsage {
		t.Errorf("without a terminal: %v", err)
	}
	a.set.yes = true
	if err := a.confirm("revoke alice"); err != nil || errw.Len() != 0 {
		t.Errorf("with --yes: %v, %q", err, errw)
	}
}
