package cluster

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sleeper is a process that does nothing for longer than any test.
func sleeper(t *testing.T) Command {
	t.Helper()
	path, err := exec.LookPath("sleep")
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return Command{Path: path, Args: []string{"1000"}, Log: filepath.Join(t.TempDir(), "log")}
}

func launch(t *testing.T, c Command) Process {
	t.Helper()
	p, err := Launch(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Signal(syscall.SIGKILL) })
	return p
}

// A process that got the pid of ours later must not hear a signal meant for ours.
func TestSignalSparesAStranger(t *testing.T) {
	p := launch(t, sleeper(t))
	older, other := p, p
	older.Start--
	other.Exe = "/bin/other"
	for _, stranger := range []Process{older, other, {}} {
		if stranger.Alive() {
			t.Errorf("%+v is taken for %+v", p, stranger)
		}
		if err := stranger.Signal(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("Signal = %v, want ErrProcessDone", err)
		}
	}
	if !p.Alive() {
		t.Fatal("the signal went through")
	}
}

func TestPausedIsAliveAndZombieIsNot(t *testing.T) {
	p := launch(t, sleeper(t))
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	WaitFor(t, 5*time.Second, "the process to stand still", func() error {
		if !p.Stopped() {
			return errors.New("it runs")
		}
		return nil
	})
	if !p.Alive() {
		t.Error("a stopped process counts as dead")
	}
	if (Process{PID: os.Getpid()}).Stopped() {
		t.Error("a running process counts as stopped")
	}
	// Launch does not reap, so the killed process stays a zombie of this one.
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	WaitFor(t, 5*time.Second, "the killed process to count as dead", func() error {
		if p.Alive() {
			return errors.New("alive")
		}
		return nil
	})
}

// What a test starts must end with it, also when it is killed in mid-flight
// and cannot clean up.
func TestChildrenDieWithTheirTest(t *testing.T) {
	if os.Getenv("UNIBUS_TEST_NURSERY") != "" {
		ch, err := newNursery().start(sleeper(t), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(os.Stdout, "pid=%d\n", ch.PID)
		select {}
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestChildrenDieWithTheirTest$")
	cmd.Env = append(os.Environ(), "UNIBUS_TEST_NURSERY=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := 0
	for lines := bufio.NewScanner(out); pid == 0 && lines.Scan(); {
		if s, ok := strings.CutPrefix(lines.Text(), "pid="); ok {
			pid, _ = strconv.Atoi(s)
		}
	}
	p, _, err := inspect(pid)
	if err != nil || !p.Alive() {
		t.Fatalf("the child does not run: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	WaitFor(t, 5*time.Second, "the child to die with its parent", func() error {
		if p.Alive() {
			return errors.New("it still runs")
		}
		return nil
	})
}

// Two test runs side by side must not meet, also while the servers of one are down.
func TestReservedPortsAreNotGivenTwice(t *testing.T) {
	first, release, err := reservePorts()
	if err != nil {
		t.Fatal(err)
	}
	second, releaseSecond, err := reservePorts()
	if err != nil {
		t.Fatal(err)
	}
	defer releaseSecond()
	if first == second {
		t.Fatalf("block %d was given twice", first)
	}
	release()
	third, releaseThird, err := reservePorts()
	if err != nil {
		t.Fatal(err)
	}
	defer releaseThird()
	if third == second {
		t.Fatalf("block %d was given twice", second)
	}
}
