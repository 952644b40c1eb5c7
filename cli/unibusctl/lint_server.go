package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// oldestServer is the first nats-server without the known ways around an auth
// callout.
var oldestServer = [3]int{2, 15, 2}

// serverTimeout bounds one run of nats-server, which answers in milliseconds.
const serverTimeout = 20 * time.Second

// tryServer lets nats-server itself read the configuration.
func (l *linter) tryServer(ctx context.Context, binary string) {
	binary, err := findServer(binary)
	at := confPos{file: l.path(mainConf)}
	if err != nil {
		l.unknown(at, "not tried with nats-server: "+err.Error(), "--nats-server BINARY")
		return
	}
	l.serverVersion(ctx, binary)
	if l.conf == nil {
		return // the parser said already why no server could read this
	}
	file := l.path(mainConf)
	if etc := l.etc(); etc != "" && !sameFile(etc, l.dir) {
		dir, err := l.relocated(etc)
		if err != nil {
			l.unknown(at, "not tried with nats-server: "+err.Error(), "check the temporary directory")
			return
		}
		defer os.RemoveAll(dir) //nolint:errcheck // a directory of the temporary ones stays behind at worst
		file = filepath.Join(dir, filepath.FromSlash(mainConf))
	}
	out, err := runServer(ctx, binary, "-t", "-c", file)
	var failed *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &failed):
		l.serverFindings(out, strings.TrimSuffix(file, filepath.FromSlash(mainConf)))
	default:
		l.unknown(at, "not tried with nats-server: "+err.Error(), "--nats-server BINARY")
	}
}

// findServer returns the binary that was asked for, else the one installed
// with unibusctl, else the one on PATH.
func findServer(asked string) (string, error) {
	if asked != "" {
		return exec.LookPath(asked)
	}
	if self, err := os.Executable(); err == nil {
		if beside, err := exec.LookPath(filepath.Join(filepath.Dir(self), "nats-server")); err == nil {
			return beside, nil
		}
	}
	if packaged, err := exec.LookPath("/usr/lib/unibus/nats-server"); err == nil {
		return packaged, nil
	}
	return exec.LookPath("nats-server")
}

func runServer(ctx context.Context, binary string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, serverTimeout)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return out.String(), err
}

func (l *linter) serverVersion(ctx context.Context, binary string) {
	at := confPos{file: binary}
	out, err := runServer(ctx, binary, "--version")
	m := regexp.MustCompile(`v(\d+)\.(\d+)\.(\d+)`).FindStringSubmatch(out)
	if err != nil || m == nil {
		l.unknown(at, "does not tell its version", "--nats-server BINARY")
		return
	}
	var got [3]int
	for i := range got {
		got[i], _ = strconv.Atoi(m[i+1])
	}
	if slices.Compare(got[:], oldestServer[:]) < 0 {
		l.critical(at, fmt.Sprintf("is %s, which lets clients around the auth callout", m[0]),
			fmt.Sprintf("install nats-server v%d.%d.%d or newer", oldestServer[0], oldestServer[1], oldestServer[2]))
	}
}

var serverLine = regexp.MustCompile(`^(?:nats-server: )?(.+?):(\d+):\d+: (.*)$`)

// serverFindings takes nats-server's words over, where the lint has not said
// the same about the same line better.
func (l *linter) serverFindings(out, root string) {
	const fix = "correct the line; unibusctl config render makes a good one"
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(strings.ReplaceAll(line, root, l.dir+string(filepath.Separator)))
		if line == "" {
			continue
		}
		at, problem := confPos{file: l.path(mainConf)}, strings.TrimPrefix(line, "nats-server: ")
		if m := serverLine.FindStringSubmatch(line); m != nil {
			n, _ := strconv.Atoi(m[2])
			at, problem = confPos{m[1], n}, m[3]
		}
		if !l.said(at) {
			l.critical(at, "nats-server refuses it: "+problem, fix)
		}
	}
}

// relocated copies the configuration to a new directory, with the certificates
// of the directory that is checked in place of those at etc. The copy holds
// the route password; the directory is the caller's to remove.
func (l *linter) relocated(etc string) (dir string, err error) {
	if dir, err = os.MkdirTemp("", "unibus-check-"); err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir) //nolint:errcheck // the first error is the one to tell
		}
	}()
	here, err := filepath.Abs(l.dir)
	if err != nil {
		return dir, err
	}
	for _, file := range l.conf.files {
		name, err := filepath.Rel(l.dir, file)
		if err != nil || !filepath.IsLocal(name) {
			return dir, fmt.Errorf("%s is included from outside of %s", file, l.dir)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return dir, err
		}
		data = bytes.ReplaceAll(data, []byte(filepath.Join(etc, "tls")+"/"), []byte(filepath.Join(here, "tls")+"/"))
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o700); err != nil {
			return dir, err
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return dir, err
		}
	}
	return dir, nil
}

func sameFile(a, b string) bool {
	x, errA := os.Stat(a)
	y, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(x, y)
}
