package cluster

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// The programs of a cluster: name of the binary, directory of the module, package.
var programs = []struct{ name, module, pkg string }{
	{"nats-server", "test", "github.com/nats-io/nats-server/v2"}, // at the version in test/go.mod
	{"unibusctl", "cli/unibusctl", "."},
	{"unibus-membership", "services/membership", "."},
	{"unibus-authcallout", "services/authcallout", "."},
	{"unibus-local", "test", "./cmd/unibus-local"},
}

var (
	buildPlain    = sync.OnceValues(func() (string, error) { return buildPrograms("") })
	buildControls = sync.OnceValues(func() (string, error) { return buildPrograms("controls") })
)

// Binaries builds every program of the repository as it would be released,
// once per test process, and returns the directory. With controls they are
// built with that tag and obey the switches of bus/guard.
func Binaries(t testing.TB, controls bool) string {
	t.Helper()
	build := buildPlain
	if controls {
		build = buildControls
	}
	dir, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// buildPrograms keeps the binaries in the user's cache, where go build finds
// them up to date the next time. The lock lets two test runs share it.
func buildPrograms(tags string) (string, error) {
	root := repository()
	dir, unlock, err := binaryCache(tags)
	if err != nil {
		return "", err
	}
	defer unlock()
	for _, p := range programs {
		cmd := exec.CommandContext(context.Background(), "go", "build", "-trimpath", "-tags", tags, "-o", filepath.Join(dir, p.name), p.pkg)
		cmd.Dir = filepath.Join(root, p.module)
		cmd.Env = append(os.Environ(), "GOWORK=off", "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s: %w\n%s", p.name, err, bytes.TrimSpace(out))
		}
	}
	return dir, nil
}

// NatsCLI builds the stock nats program at the version in tools.mk, once per
// user and version, and returns its path. It is no part of Binaries: most tests
// do without it and should not wait for it.
func NatsCLI(t testing.TB) string {
	t.Helper()
	version, err := pinnedVersion("NATSCLI_VERSION")
	if err != nil {
		t.Fatal(err)
	}
	return install(t, "nats", "github.com/nats-io/natscli/nats", version)
}

// OldServer builds a stock nats-server of another version than the one in
// tools.mk and returns its path.
func OldServer(t testing.TB, version string) string {
	t.Helper()
	return install(t, "nats-server", "github.com/nats-io/nats-server/v2", version)
}

// install builds a program that is not ours, once per user and version.
func install(t testing.TB, name, pkg, version string) string {
	t.Helper()
	path, err := installOnce(name, pkg, version)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func installOnce(name, pkg, version string) (string, error) {
	dir, unlock, err := binaryCache(name + " " + version)
	if err != nil {
		return "", err
	}
	defer unlock()
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err == nil { // go install renames it into place whole
		return path, nil
	}
	cmd := exec.CommandContext(context.Background(), "go", "install", "-trimpath", pkg+"@"+version)
	cmd.Dir = dir // outside of every module
	cmd.Env = append(os.Environ(), "GOWORK=off", "CGO_ENABLED=0", "GOBIN="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s %s: %w\n%s", name, version, err, bytes.TrimSpace(out))
	}
	return path, nil
}

// pinnedVersion reads one assignment of tools.mk.
func pinnedVersion(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(repository(), "tools.mk"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == name && f[1] == ":=" {
			return f[2], nil
		}
	}
	return "", fmt.Errorf("tools.mk does not set %s", name)
}

// repository is the root of the checkout that these tests were built from.
func repository() string {
	_, self, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(self)))
}

// binaryCache is a directory of this user for one kind of binaries of this
// checkout, locked until unlock.
func binaryCache(kind string) (dir string, unlock func(), err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	id := sha256.Sum256([]byte(repository() + "\x00" + kind))
	dir = filepath.Join(cache, "unibus-test", hex.EncodeToString(id[:8]))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", nil, err
	}
	unlock, err = lockFile(filepath.Join(dir, ".lock"))
	return dir, unlock, err
}

// lockFile waits for an exclusive lock, held until unlock or the end of the process.
func lockFile(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { _ = f.Close() }, nil
}
