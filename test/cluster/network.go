package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Cut is one way in which the network takes a node away from the others.
type Cut int

// The ways. In each of them packets vanish without a word, as they do behind a
// switch that has failed: nobody gets an error or a reset.
const (
	CutBoth Cut = iota // nothing arrives in either direction
	CutOut             // the others hear nothing from the node, and it hears them
	CutIn              // the node hears nothing from the others, and they hear it
)

func (c Cut) String() string { return [...]string{"both directions", "outwards", "inwards"}[c] }

// network is one namespace for each node, joined by a bridge that this process
// is on as well. It needs root.
type network struct {
	name   string // of everything the kernel shows of it, with our pid
	prefix string // of the addresses, with its last dot
	spaces []*os.File
}

// Names tell whose they are, so that a later run removes what a killed one left.
var networkName = regexp.MustCompile(`^ub(\d+)x\d+[bnv]\d*$`)

var networks atomic.Int64 // made by this process

// needNetworks skips a test where no namespace can be made.
func needNetworks(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("there is no ip (Debian: apt-get install iproute2)")
	}
	probe := nextNetworkName() + "n0"
	if err := ip("netns", "add", probe); err != nil {
		t.Skipf("no network namespace can be made here: %v", err)
	}
	if err := ip("netns", "del", probe); err != nil {
		t.Fatal(err)
	}
}

func nextNetworkName() string { return fmt.Sprintf("ub%dx%d", os.Getpid(), networks.Add(1)) }

// startNetwork makes a network of n nodes until the test ends. number is one
// that no other running test has.
func startNetwork(t testing.TB, number, n int) *network {
	t.Helper()
	removeLeftovers()
	// RFC 2544 gives 198.18.0.0/15 to tests between networks: no real one is hidden.
	w := &network{name: nextNetworkName(), prefix: fmt.Sprintf("198.%d.%d.", 18+number/256, number%256)}
	t.Cleanup(w.close)
	if err := w.make(n); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *network) make(n int) error {
	for _, args := range [][]string{
		{"link", "add", w.bridge(), "type", "bridge"},
		{"addr", "add", w.prefix + "254/24", "dev", w.bridge()},
		{"link", "set", w.bridge(), "up"},
	} {
		if err := ip(args...); err != nil {
			return err
		}
	}
	for i := 1; i <= n; i++ {
		ns := w.space(i)
		for _, args := range [][]string{
			{"netns", "add", ns},
			{"link", "add", w.wire(i), "type", "veth", "peer", "name", "eth0", "netns", ns},
			{"link", "set", w.wire(i), "master", w.bridge(), "up"},
			{"-n", ns, "addr", "add", w.host(i) + "/24", "dev", "eth0"},
			{"-n", ns, "link", "set", "lo", "up"},
			{"-n", ns, "link", "set", "eth0", "up"},
		} {
			if err := ip(args...); err != nil {
				return err
			}
		}
		f, err := os.Open(filepath.Join(namespaces, ns))
		if err != nil {
			return err
		}
		w.spaces = append(w.spaces, f)
	}
	return nil
}

func (w *network) bridge() string     { return w.name + "b" }
func (w *network) space(i int) string { return fmt.Sprintf("%sn%d", w.name, i) }
func (w *network) wire(i int) string  { return fmt.Sprintf("%sv%d", w.name, i) }
func (w *network) host(i int) string  { return w.prefix + strconv.Itoa(i) }

// cut takes node i away from the other nodes, and with CutBoth from us.
func (w *network) cut(i int, how Cut) error {
	switch how {
	case CutBoth: // the port of the switch, not the cable: the node sees its link up
		return ip("link", "set", w.wire(i), "nomaster")
	case CutOut:
		return w.others(i, func(j int) error { return w.blackhole("add", i, j) })
	case CutIn:
		return w.others(i, func(j int) error { return w.blackhole("add", j, i) })
	}
	return fmt.Errorf("there is no cut %d", how)
}

func (w *network) heal(i int, how Cut) error {
	switch how {
	case CutBoth:
		return ip("link", "set", w.wire(i), "master", w.bridge())
	case CutOut:
		return w.others(i, func(j int) error { return w.blackhole("del", i, j) })
	case CutIn:
		return w.others(i, func(j int) error { return w.blackhole("del", j, i) })
	}
	return fmt.Errorf("there is no cut %d", how)
}

// blackhole drops what node from would send to node to.
func (w *network) blackhole(verb string, from, to int) error {
	return ip("-n", w.space(from), "route", verb, "blackhole", w.host(to)+"/32")
}

func (w *network) others(i int, do func(j int) error) error {
	for j := 1; j <= len(w.spaces); j++ {
		if j == i {
			continue
		}
		if err := do(j); err != nil {
			return err
		}
	}
	return nil
}

// close removes everything. The wires go first: a namespace, and what is in it,
// outlives its name for as long as anybody has a socket of it.
func (w *network) close() {
	for i, f := range w.spaces {
		_ = ip("link", "del", w.wire(i+1))
		_ = f.Close()
	}
	for i := range w.spaces {
		_ = ip("netns", "del", w.space(i+1))
	}
	_ = ip("link", "del", w.bridge())
}

const namespaces = "/run/netns" // where ip keeps them

// removeLeftovers removes the networks of processes that are gone.
func removeLeftovers() {
	dead := func(name string) bool {
		m := networkName.FindStringSubmatch(name)
		if m == nil {
			return false
		}
		_, err := os.Stat(filepath.Join("/proc", m[1]))
		return errors.Is(err, os.ErrNotExist)
	}
	for dir, remove := range map[string][]string{"/sys/class/net": {"link", "del"}, namespaces: {"netns", "del"}} {
		entries, _ := os.ReadDir(dir) // without it there is nothing to remove
		for _, e := range entries {
			if dead(e.Name()) {
				_ = ip(append(remove, e.Name())...) // a wire is gone with its other end
			}
		}
	}
}

func ip(args ...string) error {
	cmd := exec.CommandContext(context.Background(), "ip", args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip %v: %w: %s", args, err, bytes.TrimSpace(out))
	}
	return nil
}

// enter moves the calling thread, which must be locked, into the namespace of
// node i. back moves it home again.
func (w *network) enter(i int) (back func() error, err error) {
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	if err := unix.Setns(int(w.spaces[i-1].Fd()), unix.CLONE_NEWNET); err != nil {
		_ = home.Close()
		return nil, fmt.Errorf("enter %s: %w", w.space(i), err)
	}
	return func() error {
		defer func() { _ = home.Close() }()
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("leave %s: %w", w.space(i), err)
		}
		return nil
	}, nil
}

// dial connects from inside node i. A socket belongs to the namespace that it
// was made in, whoever uses it later. address is an address, not a name.
func (w *network) dial(ctx context.Context, i int, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	dialled := make(chan result, 1)
	go func() {
		// Never unlocked: the thread has been elsewhere and ends here.
		runtime.LockOSThread()
		if _, err := w.enter(i); err != nil {
			dialled <- result{nil, err}
			return
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		dialled <- result{conn, err}
	}()
	r := <-dialled
	return r.conn, r.err
}

// Dialer connects from the machine of one node.
type Dialer struct {
	layout *Layout
	node   int
}

// From is a dialer on the machine of node i: with a network of namespaces from
// inside the node's own, where a partition does not come between, else from
// here like everything. It is a nats.CustomDialer.
func (l *Layout) From(i int) Dialer { return Dialer{l, i} }

// Dial connects within 5 s.
func (d Dialer) Dial(network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return d.DialContext(ctx, network, address)
}

// DialContext connects until ctx ends.
func (d Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if d.layout.network == nil {
		return new(net.Dialer).DialContext(ctx, network, address)
	}
	return d.layout.network.dial(ctx, d.node, network, address)
}

// Cut takes node i away from the others, until Heal. Only with Networks.
func (c *Cluster) Cut(i int, how Cut) {
	c.t.Helper()
	if err := c.network.cut(i, how); err != nil {
		c.t.Fatal(err)
	}
}

// Heal undoes a Cut.
func (c *Cluster) Heal(i int, how Cut) {
	c.t.Helper()
	if err := c.network.heal(i, how); err != nil {
		c.t.Fatal(err)
	}
}
