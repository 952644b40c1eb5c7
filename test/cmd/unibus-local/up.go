package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nkeys"

	"unibus.internal/test/cluster"
)

const (
	healthyBound = 3 * time.Minute // the services' own bootstrap budget is 120 s
	stopBound    = 15 * time.Second
)

// up starts what is dead or would run differently now, and nothing else.
func (l *local) up(ctx context.Context) error {
	l.say("keys, certificates and configuration in %s", l.layout.Dir)
	if err := l.layout.Prepare(ctx); err != nil {
		return err
	}
	l.state.Ports = l.layout.Ports
	if err := l.stopStale(ctx); err != nil {
		return err
	}
	started, err := l.startDead()
	if err := errors.Join(err, l.describe()); err != nil {
		return err
	}
	if err := l.waitHealthy(ctx); err != nil {
		return err
	}
	bootstrapped, err := l.bootstrap(ctx)
	if err != nil {
		return err
	}
	if started == 0 && !bootstrapped {
		l.say("nothing to do: all processes run, are healthy and current")
	}
	l.summary()
	return nil
}

// stopStale stops running services whose binary or configuration changed.
func (l *local) stopStale(ctx context.Context) error {
	var stale []string
	for _, s := range cluster.Services() {
		for i := 1; i <= nodes; i++ {
			digest, err := l.layout.Digest(i, s)
			if err != nil {
				return err
			}
			if p := l.alive(i, s); p != nil && p.Digest != digest {
				l.say("stop %s: its binary or configuration changed", key(i, s))
				stale = append(stale, key(i, s))
			}
		}
	}
	return l.stop(ctx, stale)
}

// startDead starts every service that does not run and returns their number.
func (l *local) startDead() (started int, err error) {
	if err := l.portsFree(); err != nil {
		return 0, err
	}
	for _, s := range cluster.Services() {
		for i := 1; i <= nodes; i++ {
			if l.alive(i, s) != nil {
				continue
			}
			if err := l.start(i, s); err != nil {
				return started, err
			}
			started++
		}
	}
	return started, nil
}

func (l *local) start(i int, s cluster.Service) error {
	cmd, err := l.layout.Command(i, s)
	if err != nil {
		return err
	}
	digest, err := l.layout.Digest(i, s)
	if err != nil {
		return err
	}
	p, err := cluster.Launch(cmd)
	if err != nil {
		return err
	}
	l.say("start %-14s pid %d", key(i, s), p.PID)
	l.state.Processes[key(i, s)] = &process{Process: p, Digest: digest}
	return l.save()
}

// portsFree looks before anything is started: half a cluster helps nobody.
func (l *local) portsFree() error {
	for i := 1; i <= nodes; i++ {
		for _, s := range cluster.Services() {
			if l.alive(i, s) != nil {
				continue
			}
			for _, port := range l.layout.Ports[i-1].Of(s) {
				if !cluster.PortFree(port) {
					return fmt.Errorf("port %d (%s of n%d) is taken by another program: stop it, or move this cluster: UNIBUS_PORT_OFFSET=100 make up", port, s, i)
				}
			}
		}
	}
	return nil
}

func (l *local) waitHealthy(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, healthyBound, fmt.Errorf("not healthy after %s", healthyBound))
	defer cancel()
	l.say("wait until all nodes are healthy")
	said := ""
	var died error
	err := cluster.Poll(ctx, func(ctx context.Context) error {
		if died = l.dead(); died != nil {
			return nil
		}
		err := l.healthy(ctx)
		if err != nil && err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			l.say("  %s", said)
		}
		return err
	})
	return errors.Join(died, err)
}

// dead names a process that ended by itself, with the end of its log.
func (l *local) dead() error {
	for _, s := range cluster.Services() {
		for i := 1; i <= nodes; i++ {
			if l.alive(i, s) == nil {
				log := l.layout.LogFile(i, s)
				return fmt.Errorf("%s ended, the last lines of %s are:\n%s", key(i, s), log, cluster.Tail(log, 5))
			}
		}
	}
	return nil
}

func (l *local) healthy(ctx context.Context) error {
	for i := 1; i <= nodes; i++ {
		for _, s := range cluster.Services() {
			if err := l.serviceHealthy(ctx, i, s); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *local) serviceHealthy(ctx context.Context, i int, s cluster.Service) error {
	switch s {
	case cluster.NATS:
		return l.layout.NATSHealthy(ctx, i)
	case cluster.Authcallout:
		return l.layout.CalloutReady(ctx, i)
	default:
		return l.layout.Healthy(ctx, i)
	}
}

// bootstrap makes the first admin, and reports whether there was none yet.
func (l *local) bootstrap(ctx context.Context) (bool, error) {
	if _, err := os.Stat(l.admin()); errors.Is(err, fs.ErrNotExist) {
		if out, err := l.unibusctl(ctx, "identity", "new", "--out", l.admin()); err != nil {
			return false, fmt.Errorf("make the first admin's identity: %w: %s", err, out)
		}
	}
	pub, err := publicKey(l.admin())
	if err != nil {
		return false, err
	}
	out, err := l.unibusctl(ctx, "--direct", "bootstrap", "--handle", "admin", "--sign-pub", pub)
	switch {
	case err == nil:
		l.say("first admin: %s", pub)
		return true, nil
	case strings.Contains(out, "already bootstrapped"):
		return false, nil
	}
	return false, fmt.Errorf("register the first admin: %w: %s", err, out)
}

func publicKey(seedFile string) (string, error) {
	seed, err := os.ReadFile(seedFile)
	if err != nil {
		return "", err
	}
	pair, err := nkeys.FromSeed(bytes.TrimSpace(seed))
	if err != nil {
		return "", fmt.Errorf("%s: %w", seedFile, err)
	}
	defer pair.Wipe()
	return pair.PublicKey()
}

func (l *local) unibusctl(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(l.layout.Bin, "unibusctl"), args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + l.layout.Dir}
	for k, v := range l.layout.CLIEnv(l.admin()) {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	out, err := cmd.CombinedOutput()
	return string(bytes.TrimSpace(out)), err
}

func (l *local) summary() {
	env := l.file("env")
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, env); err == nil && filepath.IsLocal(rel) {
			env = rel
		}
	}
	fmt.Fprintf(l.errw, `
The cluster is up: three nodes, clients at %s.

  source %s            addresses, CA and the first admin's identity
  bin/unibusctl cluster status    what the cluster says about itself
  make status | make down         its processes
`, l.layout.URLs(l.layout.NATSURL), env)
}

// down stops every started process: the services first, so that they can say
// goodbye to a running server.
func (l *local) down(ctx context.Context) error {
	var services, servers []string
	for k := range l.state.Processes {
		if strings.HasSuffix(k, "/"+string(cluster.NATS)) {
			servers = append(servers, k)
		} else {
			services = append(services, k)
		}
	}
	if len(services)+len(servers) == 0 {
		l.say("nothing is running")
		return nil
	}
	if err := errors.Join(l.stop(ctx, services), l.stop(ctx, servers)); err != nil {
		return err
	}
	l.say("stopped; the data stays in %s", l.layout.Dir)
	l.layout.Ports = l.state.Ports
	return l.describe()
}

// stop ends processes by SIGTERM, and by SIGKILL what has not gone by then.
// They are forgotten only once they are gone.
func (l *local) stop(ctx context.Context, keys []string) error {
	slices.Sort(keys)
	if err := l.signal(keys, syscall.SIGTERM, syscall.SIGCONT); err != nil { // a paused one must wake to hear it
		return err
	}
	term, cancel := context.WithTimeout(ctx, stopBound)
	defer cancel()
	if l.waitGone(term, keys) != nil {
		if err := l.signal(keys, syscall.SIGKILL); err != nil {
			return err
		}
		kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopBound)
		defer cancel()
		if err := l.waitGone(kill, keys); err != nil {
			return err
		}
	}
	for _, k := range keys {
		delete(l.state.Processes, k)
	}
	return l.save()
}

// kill ends every process of one node by SIGKILL: for demonstrations. It is
// an error if none runs.
func (l *local) kill(ctx context.Context, node string) error {
	var running []string
	for i := 1; i <= nodes; i++ {
		for _, s := range cluster.Services() {
			if l.layout.Node(i) == node && l.alive(i, s) != nil {
				running = append(running, key(i, s))
			}
		}
	}
	if len(running) == 0 {
		return fmt.Errorf("nothing of node %q is running: it is one of n1 to n%d, see unibus-local status", node, nodes)
	}
	if err := l.signal(running, syscall.SIGKILL); err != nil {
		return err
	}
	for _, k := range running {
		l.say("kill -9 %-14s pid %d", k, l.state.Processes[k].PID)
	}
	ctx, cancel := context.WithTimeout(ctx, stopBound)
	defer cancel()
	if err := l.waitGone(ctx, running); err != nil {
		return err
	}
	l.layout.Ports = l.state.Ports
	return l.describe()
}

func (l *local) signal(keys []string, signals ...syscall.Signal) error {
	for _, k := range keys {
		for _, sig := range signals {
			if err := l.state.Processes[k].Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
				return fmt.Errorf("%s to %s: %w", sig, k, err)
			}
		}
	}
	return nil
}

func (l *local) waitGone(ctx context.Context, keys []string) error {
	return cluster.Poll(ctx, func(context.Context) error {
		for _, k := range keys {
			if p := l.state.Processes[k]; p.Alive() {
				return fmt.Errorf("%s (pid %d) still runs", k, p.PID)
			}
		}
		return nil
	})
}

// status shows every process and asks each for its health.
func (l *local) status(ctx context.Context) error {
	if err := l.load(); err != nil {
		return err
	}
	if l.state.Ports != nil {
		l.layout.Ports = l.state.Ports // where it runs, whatever the environment says now
	}
	table := tabwriter.NewWriter(l.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "NODE\tSERVICE\tPID\tPORT\tSTATE")
	healthy := true
	for i := 1; i <= nodes; i++ {
		for _, s := range cluster.Services() {
			pid, state := "-", "not running"
			if p := l.alive(i, s); p != nil {
				pid, state = fmt.Sprint(p.PID), "healthy"
				if err := l.serviceHealthy(ctx, i, s); err != nil {
					state = err.Error()
				}
			}
			healthy = healthy && state == "healthy"
			fmt.Fprintf(table, "n%d\t%s\t%s\t%d\t%s\n", i, s, pid, l.layout.Ports[i-1].Of(s)[0], state)
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if !healthy {
		l.say("not healthy: make up starts what is missing")
		return errUnhealthy
	}
	return nil
}

func (l *local) say(format string, args ...any) {
	fmt.Fprintf(l.errw, format+"\n", args...)
}
