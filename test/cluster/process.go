package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
)

// Command is everything needed to start one service process of a node.
type Command struct {
	Path string   // absolute path of the binary
	Args []string // without the program's name
	Env  []string // the whole environment: nothing is inherited
	Log  string   // stdout and stderr are appended to this file
}

// Process identifies one running process. The pid alone would not do: it is
// reused, and a signal to a reused pid would hit a stranger. Start and Exe
// come from /proc and together with the pid name exactly one process.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks from boot to the start of the process
	Exe   string `json:"exe"`
}

// Alive reports whether exactly this process still runs. A zombie is dead; a
// stopped (SIGSTOP) process is alive.
func (p Process) Alive() bool {
	if p.PID <= 0 {
		return false
	}
	now, state, err := inspect(p.PID)
	return err == nil && state != 'Z' && state != 'X' && now == p
}

// Signal sends sig to exactly this process, and to no other that got its pid
// later: the handle is opened first and the identity checked second.
// os.ErrProcessDone says that the process is gone.
func (p Process) Signal(sig syscall.Signal) error {
	if p.PID <= 0 {
		return os.ErrProcessDone
	}
	handle, err := os.FindProcess(p.PID)
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer func() { _ = handle.Release() }()
	if !p.Alive() {
		return os.ErrProcessDone
	}
	return handle.Signal(sig)
}

// Stopped reports whether every thread of the process stands still. SIGSTOP
// stops a process only once one of its threads is scheduled to see it: on a busy
// machine the others go on for milliseconds after kill(2) has returned.
func (p Process) Stopped() bool {
	threads, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(p.PID), "task", "*", "stat"))
	if err != nil || len(threads) == 0 {
		return false
	}
	for _, file := range threads {
		stat, err := os.ReadFile(file)
		if err != nil {
			return false
		}
		if state := strings.TrimPrefix(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " "); !strings.HasPrefix(state, "T") {
			return false
		}
	}
	return true
}

// inspect reads the identity and the state letter of a running process.
func inspect(pid int) (Process, byte, error) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return Process{}, 0, err
	}
	// The second field is the command in parentheses and may itself contain
	// blanks and parentheses: fields are counted from the last one.
	_, rest, ok := strings.Cut(string(stat[strings.LastIndexByte(string(stat), ')'):]), ") ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return Process{}, 0, fmt.Errorf("unexpected format of /proc/%d/stat", pid)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return Process{}, 0, fmt.Errorf("start time of process %d: %w", pid, err)
	}
	exe, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "exe"))
	if err != nil && fields[0] != "Z" {
		return Process{}, 0, err
	}
	// A binary that was rebuilt under a running process is shown as deleted.
	exe = strings.TrimSuffix(exe, " (deleted)")
	return Process{PID: pid, Start: start, Exe: exe}, fields[0][0], nil
}

// Launch starts c detached from the caller: in a session of its own, so that
// neither the terminal's signals nor the caller's end reach it.
func Launch(c Command) (Process, error) {
	cmd, err := c.start(&syscall.SysProcAttr{Setsid: true})
	if err != nil {
		return Process{}, err
	}
	p, _, err := inspect(cmd.Process.Pid)
	if err != nil {
		return Process{}, fmt.Errorf("%s ended at once: see %s", filepath.Base(c.Path), c.Log)
	}
	return p, cmd.Process.Release()
}

func (c Command) start(attr *syscall.SysProcAttr) (*exec.Cmd, error) {
	log, err := os.OpenFile(c.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	defer func() { _ = log.Close() }() // the child has its own descriptor
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = c.Env, log, log, attr
	cmd.Dir = filepath.Dir(c.Log)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	return cmd, nil
}

// nursery starts processes that die with the calling process, whatever kills
// it. The kernel sends the parent-death signal when the *thread* that forked
// ends, so all of them are forked by one goroutine that keeps its thread.
type nursery struct {
	jobs chan func()
	done chan struct{}
}

func newNursery() *nursery {
	n := &nursery{jobs: make(chan func()), done: make(chan struct{})}
	go func() {
		defer close(n.done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for job := range n.jobs {
			job()
		}
	}()
	return n
}

// child is a process of this one, reaped as soon as it ends.
type child struct {
	Process
	exited chan struct{} // closed when it has been reaped
}

// start runs c as a child of this process; in a network also inside the
// namespace of node i. No wrapper does that but the thread which forks, so the
// pid is that of the program.
func (n *nursery) start(c Command, w *network, i int) (*child, error) {
	var cmd *exec.Cmd
	err := errors.New("not started")
	started := make(chan struct{})
	n.jobs <- func() {
		defer close(started)
		back := func() error { return nil }
		if w != nil {
			if back, err = w.enter(i); err != nil {
				return
			}
		}
		cmd, err = c.start(&syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL})
		err = errors.Join(err, back())
	}
	<-started
	if err != nil {
		return nil, err
	}
	// Not yet reaped, so the pid cannot have been given to another process.
	p, _, err := inspect(cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	ch := &child{Process: p, exited: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // the exit code of a killed service says nothing
		close(ch.exited)
	}()
	return ch, nil
}

// close ends the thread; every child must be gone before.
func (n *nursery) close() {
	close(n.jobs)
	<-n.done
}
