package test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// TestJoin takes newcomers from an invite to the stock nats CLI, in one command
// that they were given as a whole.
func TestJoin(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: directLease})
	w.adminSeed(w.admin)
	w.addRoom("ops", w.admin, kv.RoomOptions{})
	w.addRoom("dev", w.admin, kv.RoomOptions{})
	w.WaitHealthy(30 * time.Second)
	j := &newcomers{stock: newStock(w)}
	t.Run("one command", j.oneCommand)
	t.Run("own handle", j.ownHandle)
	t.Run("refused", j.refused)
	t.Run("by CA file", j.byFile)
}

// newcomers have nothing of the cluster but what they are told.
type newcomers struct{ *stock }

// invited has the admin make an invite.
func (j *newcomers) invited(t *testing.T, args ...string) (bus.InviteCreated, []string) {
	t.Helper()
	r := j.w.CLI(append([]string{"invite", "create", "--json"}, args...)...)
	var made struct {
		Invite bus.InviteCreated
		Join   string
	}
	if err := json.Unmarshal([]byte(r.Stdout), &made); err != nil || r.Code != 0 {
		t.Fatalf("invite create: exit %d: %s%s (%v)", r.Code, r.Stdout, r.Stderr, err)
	}
	words := strings.Fields(made.Join)
	if len(words) < 4 || words[0] != "unibusctl" {
		t.Fatalf("the command is %q", made.Join)
	}
	return made.Invite, words[1:]
}

// run runs unibusctl without any setting of the cluster.
func (j *newcomers) run(args ...string) cluster.Result {
	bare := map[string]string{"XDG_CONFIG_HOME": j.config["XDG_CONFIG_HOME"]}
	for k := range j.w.CLIEnv("") {
		bare[k] = ""
	}
	return j.w.CLIEnvironment(bare, nil, args...)
}

func (j *newcomers) oneCommand(t *testing.T) {
	_, command := j.invited(t, "--handle", "bob", "--room", "ops:writer", "--room", "dev:reader")
	seed := filepath.Join(t.TempDir(), "bob.nk")
	r := j.run(append(command, "--out", seed)...)
	if r.Code != 0 || !strings.Contains(r.Stdout, "bob, member, who is now connected to n") ||
		!strings.Contains(r.Stderr, "the stock nats CLI works: nats --context unibus-bob pub room.ops.U") {
		t.Fatalf("join: exit %d:\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	info, err := os.Stat(seed)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key: %v %v", info, err)
	}
	_, example, _ := strings.Cut(strings.TrimSpace(r.Stderr), "the stock nats CLI works: nats ")
	words := strings.Fields(strings.ReplaceAll(example, "'hi all'", "hello"))
	j.must(words...)
	j.hears(t, "unibus-bob", "room.ops.>", "unibus-bob", words[3], "from the newcomer")
	j.denied(noPublish, "--context", "unibus-bob", "pub", strings.Replace(words[3], "room.ops.", "room.dev.", 1), "a reader does not speak")

	again := j.run(append(command, "--out", seed, "--json")...)
	var joined struct {
		Change bus.Change
		User   bus.UserDetail
		CA     string
	}
	if err := json.Unmarshal([]byte(again.Stdout), &joined); err != nil || again.Code != 0 || !joined.Change.Already || joined.User.Handle != "bob" {
		t.Errorf("joined again: exit %d: %s%s (%v)", again.Code, again.Stdout, again.Stderr, err)
	}
	want, err := os.ReadFile(j.w.CA())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(joined.CA); err != nil || string(got) != string(want) {
		t.Errorf("the CA that was fetched is another one (%v)", err)
	}
	if r := j.run(append(command, "--out", filepath.Join(t.TempDir(), "thief.nk"))...); r.Code != 1 || !strings.Contains(r.Stderr, "the invite is not accepted") {
		t.Errorf("the same invite with another key: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := j.w.CLI("audit", "list", "--action", "invite.*"); r.Code != 0 || !strings.Contains(r.Stdout, "invite.redeem") || strings.Contains(r.Stdout, command[2]) {
		t.Errorf("the audit of it: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// ownHandle lets the newcomer choose, and choose again; one node's API is dead
// meanwhile.
func (j *newcomers) ownHandle(t *testing.T) {
	_, command := j.invited(t, "--role", "admin")
	j.w.Kill(1, cluster.Membership)
	defer func() {
		j.w.StartNode(1, cluster.Membership)
		j.w.WaitHealthy(30 * time.Second)
	}()
	command = append(command, "--out", filepath.Join(t.TempDir(), "key.nk"))
	for _, s := range []struct {
		code  int
		words string
		args  []string
	}{
		{1, "--handle NAME", nil},
		{1, "is taken by", []string{"--handle", "admin"}},
		{0, "carla, admin, who is now connected", []string{"--handle", "carla", "--name", "carla", "--select"}},
	} {
		r := j.run(append(command[:len(command):len(command)], s.args...)...)
		if r.Code != s.code || !strings.Contains(r.Stdout+r.Stderr, s.words) {
			t.Errorf("join %v: exit %d, want %d and %q: %s%s", s.args, r.Code, s.code, s.words, r.Stdout, r.Stderr)
		}
	}
	id := command[len(command)-1]
	if r := j.w.CLIEnvironment(map[string]string{"UNIBUS_IDENTITY": id}, nil, "user", "list", "--names"); r.Code != 0 || !strings.Contains(r.Stdout, "carla") {
		t.Errorf("the new admin: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if out := j.must("context", "ls"); !strings.Contains(out, "carla") {
		t.Errorf("no context carla: %s", out)
	}
}

// refused wants no key, no user and no context from an invite that is not good,
// or from a server that is not the one that is meant.
func (j *newcomers) refused(t *testing.T) {
	invite, command := j.invited(t, "--handle", "mallory")
	wrong := append([]string{}, command...)
	for i := range wrong {
		if wrong[i] == "--ca-pin" {
			wrong[i+1] = strings.Repeat("0", 64)
		}
	}
	seed := filepath.Join(t.TempDir(), "m.nk")
	if r := j.run(append(wrong, "--out", seed)...); r.Code != 1 || !strings.Contains(r.Stderr, "does not show a CA with the fingerprint") {
		t.Errorf("another CA: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if _, err := os.Stat(seed); err == nil {
		t.Error("there is a key for a cluster that is not the one that is meant")
	}
	guessed := append([]string{}, command...)
	guessed[2] = "ubi_" + invite.ID + "_" + strings.Repeat("a", 32)
	if r := j.run(append(guessed, "--out", seed)...); r.Code != 1 || !strings.Contains(r.Stderr, "the invite is not accepted") {
		t.Errorf("a guessed secret: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := j.w.CLI("invite", "withdraw", invite.ID, "--yes"); r.Code != 0 {
		t.Fatalf("withdraw: exit %d: %s", r.Code, r.Stderr)
	}
	if r := j.run(append(command, "--out", seed)...); r.Code != 1 || !strings.Contains(r.Stderr, "the invite is not accepted") {
		t.Errorf("withdrawn: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := j.w.CLI("user", "show", "mallory"); r.Code != 1 || !strings.Contains(r.Stderr, "no user mallory") {
		t.Errorf("the user: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if out := j.must("context", "ls"); strings.Contains(out, "mallory") {
		t.Errorf("there is a context: %s", out)
	}
}

// byFile uses the CA's file in place of the fingerprint, and an invite made on a
// node.
func (j *newcomers) byFile(t *testing.T) {
	r := j.w.CLI("--direct", "user", "invite", "--handle", "frida")
	words := strings.Fields(r.Stdout)
	if r.Code != 0 || len(words) < 4 || words[1] != "join" || !strings.Contains(r.Stderr, "the newcomer runs") {
		t.Fatalf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	seed := filepath.Join(t.TempDir(), "frida.nk")
	r = j.run("join", words[2], words[3], "--ca", j.w.CA(), "--out", seed, "--nats-url", j.w.URLs(j.w.NATSURL))
	if r.Code != 0 || !strings.Contains(r.Stdout, "frida, member, who is now connected") {
		t.Errorf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := j.run("join", words[2], words[3], "--out", seed); r.Code != 2 || !strings.Contains(r.Stderr, "--ca-pin") {
		t.Errorf("without a CA: exit %d: %s", r.Code, r.Stderr)
	}
}
