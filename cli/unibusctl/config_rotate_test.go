package main

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"
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

// Servers know both keys of a service that is replaced, with the same rights,
// and what they read does not change when the service takes the new one.
func TestBothKeysOfAService(t *testing.T) {
	a := &app{in: strings.NewReader(""), out: &bytes.Buffer{}, errw: &bytes.Buffer{}, getenv: func(string) string { return "" }, now: time.Now, rand: rand.Reader}
	inv := exampleInventory(t, "../../deploy/nats/nodes.env.example")
	for _, s := range rotatables() {
		if k := keyNamed(s.name); k == nil || k.prefix != nkeys.PrefixByteUser {
			continue
		}
		dir := filepath.Join(t.TempDir(), "secrets")
		must(0, a.configInit(dir, false))(t)
		rendered := func() (accounts, env string) {
			t.Helper()
			files := must(renderTemplates(newNodeConfig(inv, inv.nodes[0], must(readSecrets(dir))(t), "/etc/unibus", "/var/lib/unibus")))(t)
			for _, f := range files {
				switch f.name {
				case "nats/conf.d/accounts.conf":
					accounts = string(f.data[bytes.Index(f.data, []byte("# Who may do")):])
				case "authcallout.env":
					env = string(f.data)
				}
			}
			return accounts, env
		}
		key := func() string { return must(readSecrets(dir))(t).public[s.name] }
		old := key()
		one, _ := rendered()
		turn := func(stage string) {
			t.Helper()
			if err := turnSecret(a, dir, s, stage); err != nil {
				t.Fatal(err)
			}
		}
		turn(stageTrust)
		both, _ := rendered()
		turn(stageIssue)
		next := key()
		issued, env := rendered()
		if old == next || issued != both {
			t.Errorf("%s: what servers read changes in stage issue", s.name)
		}
		// With either key alone it is what it was, but for the key.
		if strings.Count(both, old) != 2 || strings.Count(both, next) != 2 {
			t.Errorf("%s: the old key stands in %d places, the new one in %d, want 2 and 2", s.name, strings.Count(both, old), strings.Count(both, next))
		}
		if services := strings.HasSuffix(s.name, "-bus"); services != (strings.Contains(env, old) && strings.Contains(env, next)) {
			t.Errorf("%s: in UNIBUS_SERVICE_KEYS: %v", s.name, !services)
		}
		turn(stageRetire)
		alone, env := rendered()
		if alone != strings.ReplaceAll(one, old, next) || strings.Contains(env, old) {
			t.Errorf("%s: after retire more than the key differs", s.name)
		}
	}
}

func keyNamed(name string) *keyFile {
	for _, k := range keyFiles {
		if k.name == name {
			return &k
		}
	}
	return nil
}
