package main

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A stage of a secret is what its files show, after each stage and after a crash
// inside one; what a node gets has two generations in every stage, and the old
// one in none after the last.
func TestSecretStages(t *testing.T) {
	a := &app{
		in: strings.NewReader(""), out: &bytes.Buffer{}, errw: &bytes.Buffer{},
		getenv: func(string) string { return "" }, now: time.Now, rand: rand.Reader,
	}
	for _, s := range rotatables() {
		t.Run(s.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "secrets")
			must(0, a.configInit(dir, false))(t)
			read := func(name string) string { return string(must(os.ReadFile(filepath.Join(dir, name)))(t)) }
			turn := func(stage string) {
				t.Helper()
				if err := turnSecret(a, dir, s, stage); err != nil {
					t.Fatal(err)
				}
			}
			// first is what the servers use; second what callouts accept besides.
			want := func(stage, first, second string) {
				t.Helper()
				if got := secretStage(dir, s); got != stage {
					t.Fatalf("stage %q, want %q", got, stage)
				}
				made := must(readSecrets(dir))(t)
				if s.file == routePasswordFile {
					if made.routePassword != strings.TrimSpace(first) || made.unasked != (stage != "") {
						t.Errorf("stage %q: the old password %v, asked for %v", stage, made.routePassword != strings.TrimSpace(first), !made.unasked)
					}
					return
				}
				if string(made.seeds[s.name]) != first || string(made.second[s.name]) != second {
					t.Errorf("stage %q: not the generations that it should have", stage)
				}
			}
			old := read(s.file)
			want("", old, old)
			turn(stageTrust)
			next := read(beside(s.file, "next"))
			if next == old {
				t.Error("the new one is the old one")
			}
			turn(stageTrust)
			want(stageTrust, old, next)
			// Stopped between the copy and the rename.
			if err := os.WriteFile(filepath.Join(dir, beside(s.file, "old")), []byte(old), 0o600); err != nil {
				t.Fatal(err)
			}
			want(stageTrust, old, next)
			turn(stageIssue)
			want(stageIssue, next, old)
			turn(stageIssue)
			want(stageIssue, next, old)
			turn(stageRetire)
			want("", next, next)
			turn(stageRetire)
			want("", next, next)
		})
	}
}

func TestSecretsInTheirTurn(t *testing.T) {
	for _, test := range []struct {
		done, want string
		allowed    bool
	}{
		{"", stageTrust, true},
		{"", stageIssue, false},
		{"", stageRetire, true},
		{stageTrust, stageIssue, true},
		{stageTrust, stageRetire, false},
		{stageIssue, stageTrust, false},
		{stageIssue, stageRetire, true},
	} {
		if err := inTurn("issuer", test.done, test.want); (err == nil) != test.allowed {
			t.Errorf("%s after %q: %v", test.want, test.done, err)
		}
	}
}
