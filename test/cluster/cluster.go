// Package cluster runs a unibus cluster of real processes on this machine:
// stock nats-servers and our services, configured by the commands an operator
// uses. Tests start it on free ports and may kill, pause and restart every
// process; unibus-local (make up) runs the same layout on fixed ports.
package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/bus/kv"
)

// stopBound is how long a service may take to stop after SIGTERM.
const stopBound = 15 * time.Second

// Options say what a test needs. The zero value is three bare nats-servers.
type Options struct {
	Nodes       int   // 3 if zero
	Start       []int // nodes to start at once; all if nil
	Authcallout bool
	Membership  bool
	Lease       time.Duration // UNIBUS_LEASE of the services; their default if zero
	Controls    bool          // binaries that obey bus/guard
	Networks    bool          // a network namespace for each node: Cut and Heal; skips the test where there are none
	Env         map[Service]map[string]string
	NoWait      bool                  // return before the started nodes are healthy
	Edit        func(l *Layout) error // changes the rendered configuration before anything starts; may be nil
}

// Cluster is a running cluster of a test. Its methods fail the test instead
// of returning errors and so belong into the test's goroutine, except where
// they return an error.
type Cluster struct {
	*Layout
	*machinery
	t testing.TB
}

// machinery is what all views of one cluster share.
type machinery struct {
	services []Service
	nursery  *nursery

	mu    sync.Mutex
	procs map[procKey]*child
	env   map[procKey]map[string]string
	other map[procKey]string // binaries in the place of the usual ones
}

type procKey struct {
	node    int
	service Service
}

// Start builds the binaries, makes a new cluster in a temporary directory and
// starts it. When the test ends every process is killed, paused or not; if it
// failed, the ends of all logs are shown.
func Start(t testing.TB, o Options) *Cluster {
	t.Helper()
	if o.Nodes == 0 {
		o.Nodes = 3
	}
	if o.Networks {
		needNetworks(t)
	}
	base := ReservePorts(t)
	c := &Cluster{
		Layout: &Layout{Dir: t.TempDir(), Bin: Binaries(t, o.Controls), Env: o.environment()},
		machinery: &machinery{
			services: o.services(),
			nursery:  newNursery(),
			procs:    map[procKey]*child{},
			env:      map[procKey]map[string]string{},
			other:    map[procKey]string{},
		},
		t: t,
	}
	if o.Networks {
		c.network = startNetwork(t, (base-firstBlock)/blockSize, o.Nodes)
	}
	t.Cleanup(c.stop)
	for i := range o.Nodes {
		c.Ports = append(c.Ports, BlockPorts(i+1, base))
	}
	if err := c.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if o.Edit != nil {
		if err := o.Edit(c.Layout); err != nil {
			t.Fatal(err)
		}
	}
	if o.Start == nil {
		o.Start = c.Nodes()
	}
	for _, i := range o.Start {
		c.StartNode(i)
	}
	if !o.NoWait {
		c.WaitHealthy(time.Minute, o.Start...)
	}
	return c
}

// In is the same cluster for a subtest, which its failures then end.
func (c *Cluster) In(t testing.TB) *Cluster {
	return &Cluster{Layout: c.Layout, machinery: c.machinery, t: t}
}

func (o Options) services() []Service {
	s := []Service{NATS}
	if o.Authcallout {
		s = append(s, Authcallout)
	}
	if o.Membership {
		s = append(s, Membership)
	}
	return s
}

func (o Options) environment() map[Service]map[string]string {
	env := map[Service]map[string]string{}
	for _, s := range Services() {
		env[s] = map[string]string{}
		if o.Lease != 0 && s != NATS {
			env[s]["UNIBUS_LEASE"] = o.Lease.String()
		}
		maps.Copy(env[s], o.Env[s])
	}
	return env
}

// Nodes lists the numbers of all nodes: 1, 2, 3.
func (c *Cluster) Nodes() []int {
	all := make([]int, len(c.Ports))
	for i := range all {
		all[i] = i + 1
	}
	return all
}

// StartNode starts the named services of node i, or all that the cluster was
// made with; what runs already is left alone.
func (c *Cluster) StartNode(i int, services ...Service) {
	c.t.Helper()
	for _, s := range c.or(services) {
		if c.Alive(i, s) {
			continue
		}
		if err := c.start(procKey{i, s}); err != nil {
			c.t.Fatal(err)
		}
	}
}

func (c *Cluster) start(key procKey) error {
	cmd, err := c.Command(key.node, key.service)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, v := range c.env[key] {
		cmd.Env = append(cmd.Env, k+"="+v) // the last one wins
	}
	if other := c.other[key]; other != "" {
		cmd.Path = other
	}
	p, err := c.nursery.start(cmd, c.network, key.node)
	if err != nil {
		return err
	}
	c.procs[key] = p
	return nil
}

// SetEnv sets a variable for later starts of one service of node i.
func (c *Cluster) SetEnv(i int, s Service, key, value string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := procKey{i, s}
	if c.env[k] == nil {
		c.env[k] = map[string]string{}
	}
	c.env[k][key] = value
}

// SetBinary has later starts of one service of node i run another program; the
// usual one if path is empty.
func (c *Cluster) SetBinary(i int, s Service, path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.other[procKey{i, s}] = path
}

// Kill ends services of node i as a power cut would (SIGKILL) and returns when
// they are gone. Without services: the whole node. A dead one is left alone.
func (c *Cluster) Kill(i int, services ...Service) {
	c.t.Helper()
	c.end(i, syscall.SIGKILL, services)
}

// Term asks services of node i to stop (SIGTERM) and waits until they are
// gone. Not answering within 15 s fails the test.
func (c *Cluster) Term(i int, services ...Service) {
	c.t.Helper()
	c.end(i, syscall.SIGTERM, services)
}

// Pause stops services of node i in their tracks (SIGSTOP): their connections
// stay open and nothing answers from the moment it returns.
func (c *Cluster) Pause(i int, services ...Service) {
	c.t.Helper()
	c.signal(i, syscall.SIGSTOP, services)
	bound := time.Now().Add(stopBound)
	for _, s := range c.or(services) {
		for p := c.proc(i, s); p.Alive() && !p.Stopped(); runtime.Gosched() {
			if time.Now().After(bound) {
				c.t.Fatalf("%s of %s still runs %s after SIGSTOP", s, c.Node(i), stopBound)
			}
		}
	}
}

// Resume continues paused services of node i.
func (c *Cluster) Resume(i int, services ...Service) {
	c.t.Helper()
	c.signal(i, syscall.SIGCONT, services)
}

// Reload sends SIGHUP: nats-server reads its configuration again.
func (c *Cluster) Reload(i int, services ...Service) {
	c.t.Helper()
	c.signal(i, syscall.SIGHUP, services)
}

// Alive reports whether every named service of node i runs (paused counts as
// running), or all that the cluster was made with.
func (c *Cluster) Alive(i int, services ...Service) bool {
	for _, s := range c.or(services) {
		if p := c.proc(i, s); p == nil || !p.Alive() {
			return false
		}
	}
	return true
}

// PID is the process id of a service of node i; 0 if it was never started.
func (c *Cluster) PID(i int, s Service) int {
	if p := c.proc(i, s); p != nil {
		return p.PID
	}
	return 0
}

func (c *Cluster) signal(i int, sig syscall.Signal, services []Service) {
	c.t.Helper()
	for _, s := range c.or(services) {
		p := c.proc(i, s)
		if p == nil {
			c.t.Fatalf("%s of %s was never started", s, c.Node(i))
		}
		if err := p.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
			c.t.Fatalf("%s to %s of %s: %v", sig, s, c.Node(i), err)
		}
	}
}

func (c *Cluster) end(i int, sig syscall.Signal, services []Service) {
	c.t.Helper()
	c.signal(i, sig, services)
	bound := time.NewTimer(stopBound)
	defer bound.Stop()
	for _, s := range c.or(services) {
		select {
		case <-c.proc(i, s).exited:
		case <-bound.C:
			c.t.Fatalf("%s of %s still runs %s after %s", s, c.Node(i), stopBound, sig)
		}
	}
}

func (c *Cluster) proc(i int, s Service) *child {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.procs[procKey{i, s}]
}

func (c *Cluster) or(services []Service) []Service {
	if len(services) == 0 {
		return c.services
	}
	return services
}

// stop ends every process for good: SIGKILL also ends a paused one.
func (c *Cluster) stop() {
	if c.t.Failed() {
		c.dumpLogs()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.procs {
		_ = p.Signal(syscall.SIGKILL)
	}
	for _, p := range c.procs {
		<-p.exited
	}
	c.nursery.close()
}

func (c *Cluster) dumpLogs() {
	for _, i := range c.Nodes() {
		for _, s := range c.services {
			lines := strings.Split(c.LogTail(i, s, 1000), "\n")
			lines = slices.DeleteFunc(lines, func(l string) bool {
				return strings.Contains(l, "Healthcheck failed") // the answer to our own polling
			})
			c.t.Logf("--- %s of %s ---\n%s", s, c.Node(i), strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	}
}

// LogTail returns the last lines of the log of one service of node i.
func (c *Cluster) LogTail(i int, s Service, lines int) string {
	return Tail(c.LogFile(i, s), lines)
}

// Ready returns nil if every service of node i is healthy.
func (c *Cluster) Ready(ctx context.Context, i int) error {
	if err := c.NATSHealthy(ctx, i); err != nil {
		return err
	}
	if slices.Contains(c.services, Authcallout) {
		if err := c.CalloutReady(ctx, i); err != nil {
			return err
		}
	}
	if slices.Contains(c.services, Membership) {
		return c.Healthy(ctx, i)
	}
	return nil
}

// WaitHealthy waits until every service of the given nodes, or of all nodes,
// is healthy.
func (c *Cluster) WaitHealthy(timeout time.Duration, nodes ...int) {
	c.t.Helper()
	if len(nodes) == 0 {
		nodes = c.Nodes()
	}
	WaitFor(c.t, timeout, fmt.Sprintf("nodes %v to be healthy", nodes), func() error {
		for _, i := range nodes {
			if err := c.Ready(c.t.Context(), i); err != nil {
				return err
			}
		}
		return nil
	})
}

// Ops connects as the operator's break-glass user in account CTRL.
func (c *Cluster) Ops() *nats.Conn { c.t.Helper(); return c.static("ops") }

// Sys connects as the operator's user in the system account.
func (c *Cluster) Sys() *nats.Conn { c.t.Helper(); return c.static("sys") }

func (c *Cluster) static(name string) *nats.Conn {
	c.t.Helper()
	nc, err := kv.Connect(kv.Link{
		URL: c.URLs(c.NATSURL), SeedFile: c.Seed(name), CAFile: c.CA(),
		Name: "test-" + name, Inbox: "_INBOX_" + name, Timeout: probeTimeout, Once: true,
	})
	if err != nil {
		c.t.Fatalf("connect as %s: %v", name, err)
	}
	c.t.Cleanup(nc.Close)
	return nc
}

// Dial connects to node i with exactly the given options and the client CA.
func (c *Cluster) Dial(i int, opts ...nats.Option) (*nats.Conn, error) {
	nc, err := nats.Connect(c.NATSURL(i), append([]nats.Option{nats.RootCAs(c.CA()), nats.Timeout(probeTimeout)}, opts...)...)
	if err == nil {
		c.t.Cleanup(nc.Close)
	}
	return nc, err
}

// Result is what a run of a program left behind.
type Result struct {
	Stdout, Stderr string
	Code           int // exit code; -1 if a signal ended it
}

// CLI runs unibusctl against this cluster, with the identity in DIR/admin.nk
// and the ops seed for --direct.
func (c *Cluster) CLI(args ...string) Result {
	c.t.Helper()
	return c.CLIEnvironment(nil, nil, args...)
}

// CLIEnvironment runs unibusctl with further variables and standard input.
func (c *Cluster) CLIEnvironment(extra map[string]string, stdin io.Reader, args ...string) Result {
	c.t.Helper()
	env := c.CLIEnv(filepath.Join(c.Dir, "admin.nk"))
	maps.Copy(env, extra)
	cmd := exec.CommandContext(c.t.Context(), filepath.Join(c.Bin, "unibusctl"), args...)
	cmd.Env, cmd.Stdin = baseEnv(c.Dir), stdin
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatalf("unibusctl %s: %v", strings.Join(args, " "), err)
	}
	return Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
}
