package cluster

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
)

// Ports are the six listeners of one node, all on 127.0.0.1.
type Ports struct {
	NATS, Route, Monitor, API, MembershipAdmin, AuthcalloutAdmin int
}

// StandardPorts are the ports of node i (1, 2, 3) of a local cluster, as the
// README shows them, moved by offset.
func StandardPorts(i, offset int) Ports {
	n := i - 1 + offset
	return Ports{
		NATS: 4250 + n, Route: 6250 + n, Monitor: 8222 + n,
		API: 8470 + n, MembershipAdmin: 9470 + n, AuthcalloutAdmin: 9480 + n,
	}
}

// BlockPorts are the ports of node i in a block of consecutive ports.
func BlockPorts(i, base int) Ports {
	n := base + (i-1)*portsPerNode
	return Ports{NATS: n, Route: n + 1, Monitor: n + 2, API: n + 3, MembershipAdmin: n + 4, AuthcalloutAdmin: n + 5}
}

// Of lists the ports that one service listens on.
func (p Ports) Of(s Service) []int {
	switch s {
	case NATS:
		return []int{p.NATS, p.Route, p.Monitor}
	case Membership:
		return []int{p.API, p.MembershipAdmin}
	case Authcallout:
		return []int{p.AuthcalloutAdmin}
	}
	return nil
}

const (
	portsPerNode = 6
	blockSize    = 40 // up to six nodes
	// Below the kernel's range for outgoing connections (32768 and up), which
	// could otherwise take a port while its server is down in a test.
	firstBlock, lastBlock = 20000, 32000
)

// ReservePorts gives a test a block of free ports for BlockPorts, until it ends.
func ReservePorts(t testing.TB) (base int) {
	t.Helper()
	base, release, err := reservePorts()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	return base
}

// reservePorts finds a block of free ports and holds it until release is
// called. A lock file per block keeps two test runs apart, also while a
// server of one of them is down and its ports look free.
func reservePorts() (base int, release func(), err error) {
	dir := filepath.Join(os.TempDir(), "unibus-test-ports-"+strconv.Itoa(os.Getuid()))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, nil, err
	}
	for base := firstBlock; base < lastBlock; base += blockSize {
		lock, err := os.OpenFile(filepath.Join(dir, strconv.Itoa(base)), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return 0, nil, err
		}
		if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil && blockFree(base) {
			return base, func() { _ = lock.Close() }, nil
		}
		_ = lock.Close()
	}
	return 0, nil, fmt.Errorf("no free block of %d ports between %d and %d", blockSize, firstBlock, lastBlock)
}

func blockFree(base int) bool {
	for port := base; port < base+blockSize; port++ {
		if !PortFree(port) {
			return false
		}
	}
	return true
}

// PortFree reports whether a server could listen on the port now, on every
// address: a listener on any one of them would be in its way.
func PortFree(port int) bool {
	l, err := net.Listen("tcp", ":"+strconv.Itoa(port))
	if err != nil {
		return false
	}
	return l.Close() == nil
}

// Loopback is the address of a port on this machine.
func Loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
