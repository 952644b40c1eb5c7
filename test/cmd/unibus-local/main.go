// Unibus-local runs a three-node cluster of real processes on this machine:
// it stands behind make up, make down and make status.
//
// Exit codes: 0 done (status: everything healthy), 1 failed, 2 usage,
// 3 not healthy, 130 interrupted.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
)

const usage = `usage: unibus-local up|down|status|render|kill NODE

  up       start what is not running, wait until it is healthy, make the first admin
  down     stop everything that up started
  status   show every process; exit 0 if all are healthy, else 3
  render   write keys, certificates and configuration only
  kill     end all processes of n1, n2 or n3 as a power cut would; up starts them again

UNIBUS_RUN_DIR      directory of the cluster (default: .run)
UNIBUS_PORT_OFFSET  moves every port: 0, 100, ... 900 (default: 0)
`

// errUsage and errUnhealthy select the exit codes 2 and 3.
var (
	errUsage     = errors.New("usage")
	errUnhealthy = errors.New("not healthy")
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	os.Exit(exitCode(ctx, run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr), os.Stderr))
}

func exitCode(ctx context.Context, err error, errw io.Writer) int {
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil:
		fmt.Fprintln(errw, "unibus-local: interrupted; make down stops what was started")
		return 130
	case errors.Is(err, errUnhealthy):
		return 3
	}
	fmt.Fprintln(errw, "unibus-local:", err)
	if errors.Is(err, errUsage) {
		return 2
	}
	return 1
}

func run(ctx context.Context, args []string, getenv func(string) string, out, errw io.Writer) error {
	if len(args) == 1 && (args[0] == "-h" || args[0] == "--help" || args[0] == "help") {
		_, err := io.WriteString(out, usage)
		return err
	}
	if len(args) == 0 || len(args) != 1 && args[0] != "kill" || len(args) != 2 && args[0] == "kill" {
		return fmt.Errorf("%w: unibus-local up|down|status|render|kill NODE", errUsage)
	}
	l, err := newLocal(getenv, out, errw)
	if err != nil {
		return err
	}
	switch args[0] {
	case "up":
		return l.exclusive(func() error { return l.up(ctx) })
	case "down":
		return l.exclusive(func() error { return l.down(ctx) })
	case "status":
		return l.status(ctx)
	case "render":
		return l.exclusive(func() error { return l.layout.Prepare(ctx) })
	case "kill":
		return l.exclusive(func() error { return l.kill(ctx, args[1]) })
	}
	return fmt.Errorf("%w: unknown command %q, not one of up, down, status, render, kill", errUsage, args[0])
}

// newLocal reads where the cluster shall be. The binaries are those beside
// this program.
func newLocal(getenv func(string) string, out, errw io.Writer) (*local, error) {
	dir := getenv("UNIBUS_RUN_DIR")
	if dir == "" {
		dir = ".run"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	ports, err := portsFrom(getenv)
	if err != nil {
		return nil, err
	}
	return openLocal(dir, filepath.Dir(self), ports, out, errw), nil
}

// portOffset reads UNIBUS_PORT_OFFSET. Steps of 100 keep the ranges of two
// clusters apart; beyond 900 the ranges of different listeners would meet.
func portOffset(s string) (int, error) {
	if s == "" {
		return 0, nil
	}
	offset, err := strconv.Atoi(s)
	if err != nil || offset < 0 || offset > 900 || offset%100 != 0 {
		return 0, fmt.Errorf("%w: UNIBUS_PORT_OFFSET=%s is not one of 0, 100, 200, ... 900", errUsage, s)
	}
	return offset, nil
}
