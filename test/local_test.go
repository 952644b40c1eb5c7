package test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"unibus.internal/test/cluster"
)

// runner drives unibus-local (make up, down, status) on a run directory and
// ports of its own.
type runner struct {
	t        *testing.T
	bin, dir string
	env      []string
}

func newRunner(t *testing.T) *runner {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "run")
	r := &runner{
		t: t, bin: cluster.Binaries(t, false), dir: dir,
		env: []string{"PATH=" + os.Getenv("PATH"), "UNIBUS_RUN_DIR=" + dir, fmt.Sprintf("UNIBUS_PORT_BASE=%d", cluster.ReservePorts(t))},
	}
	t.Cleanup(func() {
		if res := r.run(context.Background(), "down"); res.Code != 0 {
			t.Errorf("down: exit %d\n%s", res.Code, res.Stderr)
		}
		for name, p := range r.processes() {
			if p.Alive() {
				t.Errorf("%s (pid %d) is left behind", name, p.PID)
			}
		}
	})
	return r
}

func (r *runner) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(r.bin, "unibus-local"), args...)
	cmd.Env = r.env
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	return cmd
}

func (r *runner) run(ctx context.Context, args ...string) cluster.Result {
	r.t.Helper()
	cmd := r.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	return cluster.Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
}

// must runs a command that has to end with the given code.
func (r *runner) must(code int, args ...string) cluster.Result {
	r.t.Helper()
	res := r.run(r.t.Context(), args...)
	if res.Code != code {
		r.t.Fatalf("%s: exit %d, want %d\n%s%s", strings.Join(args, " "), res.Code, code, res.Stdout, res.Stderr)
	}
	return res
}

// processes are those that up recorded and down has not stopped.
func (r *runner) processes() map[string]cluster.Process {
	b, err := os.ReadFile(filepath.Join(r.dir, "processes.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var state struct{ Processes map[string]cluster.Process }
	if err == nil {
		err = json.Unmarshal(b, &state)
	}
	if err != nil {
		r.t.Error(err)
	}
	return state.Processes
}

// description is cluster.json as programs read it.
type description struct {
	Name          string   `json:"name"`
	NATSURLs      []string `json:"nats_urls"`
	APIURLs       []string `json:"api_urls"`
	CA            string   `json:"ca"`
	AdminIdentity string   `json:"admin_identity"`
	OpsSeed       string   `json:"ops_seed"`
	SysSeed       string   `json:"sys_seed"`
	Nodes         []struct {
		Name    string         `json:"name"`
		Dir     string         `json:"dir"`
		NATSURL string         `json:"nats_url"`
		APIURL  string         `json:"api_url"`
		PIDs    map[string]int `json:"pids"`
	} `json:"nodes"`
}

func (r *runner) describe() (d description) {
	r.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.dir, "cluster.json"))
	if err == nil {
		err = json.Unmarshal(b, &d)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

// Two clusters side by side: up, again up, what they say about themselves, a
// killed process, down.
func TestLocalCluster(t *testing.T) {
	t.Parallel()
	a, b := newRunner(t), newRunner(t)
	ctx, cancel := context.WithCancel(t.Context())
	second := b.command(ctx, "up")
	var said bytes.Buffer
	second.Stderr = &said
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	wait := sync.OnceValue(second.Wait)
	defer func() { cancel(); _ = wait() }()
	a.must(0, "up")
	if err := wait(); err != nil {
		t.Fatalf("the second cluster, at the same time: %v\n%s", err, &said)
	}
	before := a.processes()
	for name, p := range b.processes() {
		if p == before[name] {
			t.Errorf("both clusters claim %s, pid %d", name, p.PID)
		}
	}
	a.must(0, "status")
	b.must(0, "status")

	again := a.must(0, "up")
	if !strings.Contains(again.Stderr, "nothing to do") {
		t.Errorf("the second up does not say that there was nothing to do:\n%s", again.Stderr)
	}
	sameProcesses(t, before, a.processes())
	t.Run("description", func(t *testing.T) { describesItself(t, a) })
	t.Run("environment", func(t *testing.T) { environmentWorks(t, a) })
	t.Run("the first program", func(t *testing.T) { firstProgramRuns(t, a) })

	// Nothing restarts a killed process, or a killed node, but the next up.
	if s := a.must(1, "kill", "n9"); !strings.Contains(s.Stderr, "n9") {
		t.Errorf("kill of a node that is none:\n%s", s.Stderr)
	}
	a.must(0, "kill", "n3")
	for _, service := range cluster.Services() {
		name := "n3/" + string(service)
		if before[name].Alive() {
			t.Errorf("%s runs after kill n3", name)
		}
		delete(before, name)
	}
	victim := before["n2/membership"]
	if err := victim.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if s := a.must(3, "status"); !strings.Contains(s.Stdout, "not running") {
		t.Errorf("status does not show the killed process:\n%s", s.Stdout)
	}
	a.must(0, "up")
	after := a.processes()
	if after["n2/membership"] == victim {
		t.Error("up did not start the killed process")
	}
	delete(before, "n2/membership")
	sameProcesses(t, before, after)

	// One that hears no SIGTERM is stopped all the same.
	if err := after["n1/nats"].Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	a.must(0, "down")
	for name, p := range after {
		if p.Alive() {
			t.Errorf("%s runs after down", name)
		}
	}
	a.must(0, "down")
	a.must(3, "status")
	b.must(0, "status") // the other one noticed nothing
}

func sameProcesses(t *testing.T, want, got map[string]cluster.Process) {
	t.Helper()
	for name, p := range want {
		if got[name] != p || !p.Alive() {
			t.Errorf("%s was %+v, is %+v (alive: %t)", name, p, got[name], got[name].Alive())
		}
	}
}

// cluster.json holds absolute paths to existing files and the pids of the
// processes themselves.
func describesItself(t *testing.T, r *runner) {
	d := r.describe()
	if d.Name == "" || len(d.NATSURLs) != 3 || len(d.APIURLs) != 3 || len(d.Nodes) != 3 {
		t.Fatalf("incomplete: %+v", d)
	}
	for _, path := range []string{d.CA, d.AdminIdentity, d.OpsSeed, d.SysSeed, d.Nodes[0].Dir} {
		if _, err := os.Stat(path); err != nil || !filepath.IsAbs(path) {
			t.Errorf("%q is no absolute path of a file: %v", path, err)
		}
	}
	running := r.processes()
	for _, n := range d.Nodes {
		for service, pid := range n.PIDs {
			p, ok := running[n.Name+"/"+service]
			if !ok || p.PID != pid || !p.Alive() {
				t.Errorf("%s/%s: pid %d is not the running process %+v", n.Name, service, pid, p)
			}
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil || !strings.HasPrefix(exe, r.bin) {
				t.Errorf("%s/%s: pid %d is %s, not one of our binaries (%v)", n.Name, service, pid, exe, err)
			}
		}
	}
}

// A shell that sources env reaches the cluster, and the first admin is there.
func environmentWorks(t *testing.T, r *runner) {
	cmd := exec.CommandContext(t.Context(), "sh", "-euc", `. "$1"; test -s "$UNIBUS_IDENTITY"; exec "$2" --direct user list --json`,
		"sh", filepath.Join(r.dir, "env"), filepath.Join(r.bin, "unibusctl"))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}
	cmd.Dir = t.TempDir()
	out, err := cmd.Output()
	var list struct {
		Users []struct{ Handle, Role, Status string }
	}
	if err == nil {
		err = json.Unmarshal(out, &list)
	}
	if err != nil || len(list.Users) != 1 || list.Users[0].Handle != "admin" || list.Users[0].Role != "admin" || list.Users[0].Status != "active" {
		t.Errorf("users after up: %s (%v)", out, err)
	}
}

// The program of the README is built by the lines of the README, in a module of
// its own, and says in that cluster what the README says.
func firstProgramRuns(t *testing.T, r *runner) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, there := strings.Cut(string(readme), "\n```go\n")
	program, rest, closed := strings.Cut(rest, "```\n")
	_, rest, lines := strings.Cut(rest, "```\n")
	shell, rest, end := strings.Cut(rest, "$ go run .\n")
	want, _, done := strings.Cut(rest, "\n")
	if !there || !closed || !lines || !end || !done {
		t.Fatal("README.md holds no program, or not how to run it")
	}
	dir := t.TempDir()
	bus, err := filepath.Abs("../bus")
	if err == nil {
		err = os.Symlink(bus, filepath.Join(dir, "bus"))
	}
	if err == nil {
		err = os.Mkdir(filepath.Join(dir, "hello"), 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "hello", "main.go"), []byte(program), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	var script []string
	for line := range strings.Lines(shell) {
		script = append(script, strings.TrimPrefix(line, "$ "))
	}
	sh := func(script string) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), "sh", "-euc", script, "sh", filepath.Join(r.dir, "env"), filepath.Join(r.bin, "unibusctl"))
		cmd.Dir, cmd.Env = dir, slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "UNIBUS_") })
		return cmd
	}
	if out, err := sh(`. "$1"; "$2" room create ops`).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := sh(strings.Join(script, "") + "go build -o hello .").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := sh(`. "$1"; exec hello/hello`)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	said, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || strings.TrimSpace(said) != want {
		t.Errorf("it says %q (%v), want %q\n%s", said, err, want, &stderr)
	}
	_ = cmd.Process.Signal(os.Interrupt)
	if err := cmd.Wait(); err != nil {
		t.Errorf("interrupted, it ends with %v\n%s", err, &stderr)
	}
}

func TestLocalClusterInterrupted(t *testing.T) {
	t.Parallel()
	r := newRunner(t)
	up := r.command(t.Context(), "up")
	if err := up.Start(); err != nil {
		t.Fatal(err)
	}
	cluster.WaitFor(t, time.Minute, "the first process", func() error {
		if len(r.processes()) == 0 {
			return errors.New("none yet")
		}
		return nil
	})
	if err := up.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = up.Wait()
	if code := up.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit %d after an interrupt, want 130", code)
	}
	started := r.processes()
	r.must(0, "down")
	for name, p := range started {
		if p.Alive() {
			t.Errorf("%s survived down", name)
		}
	}
}

func TestLocalClusterRefuses(t *testing.T) {
	t.Parallel()
	r := newRunner(t)
	base := r.env[len(r.env)-1]
	t.Run("a taken port", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
		port := l.Addr().(*net.TCPAddr).Port
		r.env[len(r.env)-1] = fmt.Sprintf("UNIBUS_PORT_BASE=%d", port)
		res := r.must(1, "up")
		r.env[len(r.env)-1] = base
		if !strings.Contains(res.Stderr, fmt.Sprintf("port %d", port)) || !strings.Contains(res.Stderr, "UNIBUS_PORT_OFFSET") {
			t.Errorf("the message names neither port %d nor the fix:\n%s", port, res.Stderr)
		}
		if n := len(r.processes()); n != 0 {
			t.Errorf("%d processes were started although a port was taken", n)
		}
	})
	for _, offset := range []string{"50", "1000", "-100", "x", "1e2"} {
		r.env[len(r.env)-1] = "UNIBUS_PORT_OFFSET=" + offset
		if res := r.must(2, "up"); !strings.Contains(res.Stderr, "UNIBUS_PORT_OFFSET="+offset) {
			t.Errorf("offset %s: %s", offset, res.Stderr)
		}
	}
	r.env[len(r.env)-1] = base
	for _, args := range [][]string{{}, {"start"}, {"up", "now"}} {
		r.must(2, args...)
	}
}
