package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// stock is the stock nats program with a configuration directory of its own,
// into which unibusctl user context writes.
type stock struct {
	w      *world
	bin    string
	config map[string]string
}

func newStock(w *world) *stock {
	return &stock{w: w, bin: cluster.NatsCLI(w.t), config: map[string]string{"XDG_CONFIG_HOME": filepath.Join(w.t.TempDir(), "config")}}
}

func (s *stock) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.bin, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.w.Dir, "XDG_CONFIG_HOME=" + s.config["XDG_CONFIG_HOME"]}
	return cmd
}

// run runs nats to its end, which has to come within 20 s.
func (s *stock) run(args ...string) cluster.Result {
	s.w.t.Helper()
	ctx, cancel := context.WithTimeout(s.w.t.Context(), 20*time.Second)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := s.command(ctx, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		s.w.t.Fatalf("nats %s: %v", strings.Join(args, " "), errors.Join(err, ctx.Err()))
	}
	return cluster.Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
}

// must runs nats and wants it to succeed.
func (s *stock) must(args ...string) string {
	s.w.t.Helper()
	r := s.run(args...)
	if r.Code != 0 {
		s.w.t.Fatalf("nats %s: exit %d: %s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout + r.Stderr
}

// denied runs nats and wants the servers to refuse it with these words.
func (s *stock) denied(words string, args ...string) {
	s.w.t.Helper()
	if r := s.run(args...); r.Code == 0 || !strings.Contains(r.Stdout+r.Stderr, words) {
		s.w.t.Errorf("nats %s: exit %d, want a refusal with %q: %s%s", strings.Join(args, " "), r.Code, words, r.Stdout, r.Stderr)
	}
}

// context has unibusctl write one.
func (s *stock) context(args ...string) cluster.Result {
	s.w.t.Helper()
	return s.w.CLIEnvironment(s.config, nil, args...)
}

const (
	noPublish   = "Permissions Violation for Publish"
	noSubscribe = "Permissions Violation for Subscription"
	noEntry     = "Authorization Violation"
)

// TestContext uses the stock nats CLI with nothing but what unibusctl user
// context wrote.
func TestContext(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{Lease: 4 * time.Second})
	alice, bob := w.addUser("alice"), w.addUser("bob")
	w.addRoom("ops", alice, kv.RoomOptions{})
	w.addRoom("dev", w.admin, kv.RoomOptions{})
	w.join("ops", bob, bus.Reader)
	s := newStock(w)
	for _, p := range []*person{alice, bob} {
		r := s.context("--direct", "user", "context", p.name, "--identity", p.seedFile(t))
		if r.Code != 0 || !strings.Contains(r.Stdout, "unibus-"+p.name) {
			t.Fatalf("context of %s: exit %d: %s%s", p.name, r.Code, r.Stdout, r.Stderr)
		}
	}

	t.Run("own room", func(t *testing.T) {
		s.hears(t, "unibus-bob", "room.ops.>", "unibus-alice", "room.ops."+alice.key.NKey()+".greeting", "hello, room")
	})
	t.Run("outside", func(t *testing.T) {
		u := alice.key.NKey()
		for _, subject := range []string{
			"room.dev." + u + ".x", "room.ops." + bob.key.NKey() + ".x", "feed.ops." + u + ".x", "notice." + u + ".x",
			"_INBOX_" + bob.key.NKey() + ".x", "$KV.UNIBUS_users.x", "unibus.ack.x.y", "x",
		} {
			s.denied(noPublish, "--context", "unibus-alice", "pub", subject, "x")
		}
		for _, subject := range []string{"room.dev.>", "room.*.>", ">", "_INBOX.>", "_INBOX_" + bob.key.NKey() + ".>", "notice.>", "$SYS.>"} {
			s.denied(noSubscribe, "--context", "unibus-alice", "sub", subject, "--wait", "5s")
		}
		s.denied(noPublish, "--context", "unibus-bob", "pub", "room.ops."+bob.key.NKey()+".x", "a reader does not speak")
		s.denied(noPublish, "--context", "unibus-alice", "--timeout", "1s", "kv", "ls")
	})
	t.Run("selected", func(t *testing.T) {
		r := s.context("--direct", "user", "context", alice.key.NKey(), "--identity", alice.seedFile(t), "--name", "mine", "--select", "--json")
		var wrote struct {
			Context, File string
			Selected      bool
		}
		if err := json.Unmarshal([]byte(r.Stdout), &wrote); err != nil || r.Code != 0 || wrote.Context != "mine" || !wrote.Selected {
			t.Fatalf("exit %d: %s%s (%v)", r.Code, r.Stdout, r.Stderr, err)
		}
		if info, err := os.Stat(wrote.File); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", wrote.File, info, err)
		}
		s.must("pub", "room.ops."+alice.key.NKey()+".x", "the selected context")
	})
	t.Run("not the own key", func(t *testing.T) {
		r := s.context("--direct", "user", "context", "alice", "--identity", bob.seedFile(t), "--name", "stolen")
		if r.Code != 1 || !strings.Contains(r.Stderr, "not that of alice") {
			t.Errorf("exit %d: %s", r.Code, r.Stderr)
		}
		s.denied("", "--context", "stolen", "pub", "x", "x")
	})
	t.Run("ops", func(t *testing.T) { s.opsWorks(t) })
	t.Run("sys", func(t *testing.T) {
		if r := s.context("user", "context", "sys"); r.Code != 0 {
			t.Fatalf("exit %d: %s", r.Code, r.Stderr)
		}
		out := s.must("--context", "unibus-sys", "server", "list")
		for _, i := range w.Nodes() {
			if !strings.Contains(out, " "+w.Node(i)+" ") {
				t.Errorf("nats server list does not show %s:\n%s", w.Node(i), out)
			}
		}
		s.denied(noPublish, "--context", "unibus-alice", "--timeout", "1s", "server", "list")
	})
	t.Run("revoked", func(t *testing.T) {
		if r := w.CLI("--direct", "user", "revoke", "bob", "--yes"); r.Code != 0 {
			t.Fatalf("revoke: exit %d: %s", r.Code, r.Stderr)
		}
		s.denied(noEntry, "--context", "unibus-bob", "sub", "room.ops.>", "--wait", "5s")
	})
}

// hears subscribes with one context, publishes with another until the message
// has arrived, and wants subject and text to be shown.
func (s *stock) hears(t *testing.T, reader, filter, writer, subject, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var heard bytes.Buffer
	sub := s.command(ctx, "--context", reader, "sub", filter, "--count", "1")
	sub.Stdout, sub.Stderr = &heard, &heard
	if err := sub.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- sub.Wait() }()
	for {
		s.must("--context", writer, "pub", subject, text)
		select {
		case err := <-ended:
			if err != nil || !strings.Contains(heard.String(), subject) || !strings.Contains(heard.String(), text) {
				t.Errorf("nats sub: %v: %s", err, &heard)
			}
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// opsWorks uses the break-glass context as the runbook does, with every callout
// of the cluster dead.
func (s *stock) opsWorks(t *testing.T) {
	for _, i := range s.w.Nodes() {
		s.w.Kill(i, cluster.Authcallout)
	}
	defer func() {
		for _, i := range s.w.Nodes() {
			s.w.StartNode(i, cluster.Authcallout)
		}
		s.w.waitAdmits(s.w.admin, s.w.Nodes()...)
	}()
	if r := s.context("user", "context", "ops"); r.Code != 0 {
		t.Fatalf("exit %d: %s", r.Code, r.Stderr)
	}
	buckets := s.must("--context", "unibus-ops", "kv", "ls")
	for _, b := range []string{kv.Users, kv.Rooms, kv.Members, kv.RoomsByMember, kv.RoomKeys, kv.Nonces, kv.Handles} {
		if !strings.Contains(buckets, b) {
			t.Errorf("nats kv ls does not show %s:\n%s", b, buckets)
		}
	}
	var info struct {
		Config struct {
			Replicas int `json:"num_replicas"`
		}
	}
	out := s.run("--context", "unibus-ops", "stream", "info", kv.StreamName(kv.Users), "--json")
	if err := json.Unmarshal([]byte(out.Stdout), &info); err != nil || info.Config.Replicas != kv.Replicas {
		t.Errorf("nats stream info: exit %d, %d replicas (%v): %.300s%s", out.Code, info.Config.Replicas, err, out.Stdout, out.Stderr)
	}
	if r := s.run("--context", "unibus-ops", "--timeout", "1s", "server", "list"); strings.Contains(r.Stdout, " n1 ") {
		t.Errorf("ops sees account SYS:\n%s", r.Stdout)
	}
}
