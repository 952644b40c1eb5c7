package cluster

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What a node starts is in its namespace, is itself and no wrapper, and reaches
// the others until it is cut off, whichever way the cut goes.
func TestNetwork(t *testing.T) {
	needNetworks(t)
	base := ReservePorts(t)
	w := startNetwork(t, (base-firstBlock)/blockSize, 2)
	n := newNursery()
	defer n.close()
	c := sleeper(t)
	ch, err := n.start(c, w, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ch.Signal(syscall.SIGKILL); <-ch.exited }()
	var space, its, ours syscall.Stat_t
	for path, st := range map[string]*syscall.Stat_t{
		filepath.Join(namespaces, w.space(1)): &space, fmt.Sprintf("/proc/%d/ns/net", ch.PID): &its, "/proc/self/ns/net": &ours,
	} {
		if err := syscall.Stat(path, st); err != nil {
			t.Fatal(err)
		}
	}
	if its.Ino != space.Ino || its.Ino == ours.Ino || ch.Exe != c.Path {
		t.Errorf("%s runs in namespace %d, want %d and not ours, %d", ch.Exe, its.Ino, space.Ino, ours.Ino)
	}
	// Nobody listens: a reset is an answer, silence is a cut.
	answers := func(from, to int) bool {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		_, err := w.dial(ctx, from, "tcp", net.JoinHostPort(w.host(to), "9"))
		return err != nil && strings.Contains(err.Error(), "refused")
	}
	if !answers(1, 2) || !answers(2, 1) {
		t.Fatal("the nodes do not reach each other")
	}
	for _, how := range []Cut{CutBoth, CutOut, CutIn} {
		if err := w.cut(1, how); err != nil {
			t.Fatal(err)
		}
		if answers(1, 2) || answers(2, 1) {
			t.Errorf("%s: the nodes reach each other", how)
		}
		if !answers(1, 1) {
			t.Errorf("%s: a node does not reach itself", how)
		}
		if err := w.heal(1, how); err != nil {
			t.Fatal(err)
		}
		WaitFor(t, 5*time.Second, "the nodes to reach each other again", func() error {
			if !answers(1, 2) || !answers(2, 1) {
				return fmt.Errorf("not after %s", how)
			}
			return nil
		})
	}
}

// A test that was killed cannot clean up: the next one does.
func TestLeftoversOfAKilledTest(t *testing.T) {
	needNetworks(t)
	if os.Getenv("UNIBUS_TEST_NETWORK") != "" {
		w := startNetwork(t, blockNumberOfTest, 1)
		fmt.Fprintf(os.Stdout, "name=%s\n", w.name)
		select {}
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestLeftoversOfAKilledTest$")
	cmd.Env = append(os.Environ(), "UNIBUS_TEST_NETWORK=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	name := ""
	for lines := bufio.NewScanner(out); name == "" && lines.Scan(); {
		if s, ok := strings.CutPrefix(lines.Text(), "name="); ok {
			name = s
		}
	}
	if name == "" {
		t.Fatal("the other process made no network")
	}
	left := func() (found int) {
		for _, path := range []string{filepath.Join(namespaces, name+"n1"), "/sys/class/net/" + name + "v1", "/sys/class/net/" + name + "b"} {
			if _, err := os.Stat(path); err == nil {
				found++
			}
		}
		return found
	}
	removeLeftovers()
	if n := left(); n != 3 {
		t.Errorf("%d of 3 parts of a living process's network are there", n)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	removeLeftovers()
	if n := left(); n != 0 {
		t.Errorf("%d parts of a dead process's network are left", n)
	}
}

// blockNumberOfTest is no block that ReservePorts gives, so no other network
// has its addresses.
const blockNumberOfTest = 511
