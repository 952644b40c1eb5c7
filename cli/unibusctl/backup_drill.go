package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// drillStart is how long three servers on one machine may take to agree, on a
// busy one.
const drillStart = 2 * time.Minute

// backupDrill restores into three servers of its own: the same code, the same
// replicas and the same verification as a restore in earnest. One server would
// be less work and would prove less, for every stream is checked to have three.
func (a *app) backupDrill(c *cli.Context) error {
	r, err := a.readable(c)
	if err != nil {
		return err
	}
	defer r.file.Close()
	program, err := findServer(c.String("nats-server"))
	if err != nil {
		return bus.E(bus.NotFound, "there is no nats-server: %w", err).WithHint("--nats-server PROGRAM")
	}
	ctx, cancel := a.within(c.Context, restoreWithin)
	defer cancel()
	cluster, err := a.startDrill(ctx, program)
	if err != nil {
		return err
	}
	v, err := a.drillInto(ctx, cluster, r, wantedContents(c))
	if stopped := cluster.stop(); err == nil {
		err = stopped
	}
	if err != nil {
		return err
	}
	a.say("restored into three servers on this machine, which are gone again")
	return a.printRestore(v)
}

func (a *app) drillInto(ctx context.Context, cluster *drillCluster, r *readableBackup, want contentsWanted) (restoreView, error) {
	dial := func(ctx context.Context, _, _ string) (*nats.Conn, error) {
		nc, err := cluster.connect(ctx, "drill")
		if err == nil {
			err = kv.Bootstrap(ctx, nc, drillStart, func(why string) { a.say("%s", why) })
		}
		return nc, err
	}
	d, err := a.openLive(ctx, liveLink{dial: dial, raw: true, patience: drillStart})
	if err != nil {
		return restoreView{}, fmt.Errorf("%w; the servers say:\n%s", err, cluster.log())
	}
	defer d.Close()
	nc, err := cluster.connect(ctx, "rooms")
	if err != nil {
		return restoreView{}, err
	}
	l, err := newBusLink(nc, d.view)
	if err != nil {
		return restoreView{}, err
	}
	defer l.Close()
	return d.restoreInto(ctx, r, l, want, kv.RestoreOptions{})
}

// drillCluster is three nats-servers on loopback, in a directory of their own.
type drillCluster struct {
	dir      string
	password string
	urls     []string
	servers  []*exec.Cmd
}

func (a *app) startDrill(ctx context.Context, program string) (_ *drillCluster, err error) {
	secret := make([]byte, 16)
	if _, err := io.ReadFull(a.rand, secret); err != nil {
		return nil, bus.E(bus.Internal, "randomness: %w", err)
	}
	ports, err := freePorts(2 * kv.Replicas)
	if err != nil {
		return nil, err
	}
	d := &drillCluster{password: hex.EncodeToString(secret)}
	if d.dir, err = os.MkdirTemp("", "unibus-drill-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = d.stop()
		}
	}()
	for i := range kv.Replicas {
		d.urls = append(d.urls, fmt.Sprintf("nats://127.0.0.1:%d", ports[i]))
		conf := filepath.Join(d.dir, fmt.Sprintf("d%d.conf", i+1))
		if err := os.WriteFile(conf, []byte(d.config(i, ports)), 0o600); err != nil {
			return nil, err
		}
		cmd := exec.CommandContext(ctx, program, "-c", conf)
		cmd.Dir, cmd.Env = d.dir, []string{}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the terminal's interrupt is for us, who then stop them
		if err := cmd.Start(); err != nil {
			return nil, fmt.Errorf("start %s: %w", program, err)
		}
		d.servers = append(d.servers, cmd)
	}
	return d, nil
}

// config has no TLS: everything is on this machine's loopback, behind a password
// that nobody else can read.
func (d *drillCluster) config(i int, ports []int) string {
	routes := []string{}
	for j := range kv.Replicas {
		if j != i {
			routes = append(routes, fmt.Sprintf("nats-route://drill:%s@127.0.0.1:%d", d.password, ports[kv.Replicas+j]))
		}
	}
	return fmt.Sprintf(`server_name: d%d
listen: 127.0.0.1:%d
log_file: %q
jetstream { store_dir: %q, max_file_store: 32GB, max_memory_store: 64MB }
cluster {
  name: unibus-drill, listen: 127.0.0.1:%d, no_advertise: true
  authorization { user: drill, password: %q, timeout: 10 }
  routes: [%s]
}
system_account: SYS
accounts {
  SYS {}
  CTRL { jetstream: enabled, users: [{user: drill, password: %q}] }
  BUS { jetstream: enabled, users: [{user: rooms, password: %q}] }
}
`, i+1, ports[i], filepath.Join(d.dir, fmt.Sprintf("d%d.log", i+1)), filepath.Join(d.dir, fmt.Sprintf("d%d", i+1)),
		ports[kv.Replicas+i], d.password, strings.Join(routes, ", "), d.password, d.password)
}

func (d *drillCluster) connect(ctx context.Context, user string) (*nats.Conn, error) {
	for {
		nc, err := nats.Connect(strings.Join(d.urls, ","), nats.UserInfo(user, d.password), nats.Name("unibusctl drill"), nats.Timeout(dialTimeout))
		if err == nil {
			return nc, nil
		}
		select {
		case <-ctx.Done():
			return nil, bus.E(bus.Unavailable, "the servers of the drill do not answer: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// log is what the servers last said.
func (d *drillCluster) log() string {
	const most = 600
	var out []string
	for i := range d.servers {
		data, err := os.ReadFile(filepath.Join(d.dir, fmt.Sprintf("d%d.log", i+1)))
		if err == nil {
			out = append(out, string(data[max(0, len(data)-most):]))
		}
	}
	return strings.Join(out, "\n")
}

// stop ends the servers and removes all that they held.
func (d *drillCluster) stop() error {
	for _, s := range d.servers {
		_ = s.Process.Kill()
	}
	for _, s := range d.servers {
		_ = s.Wait() // killed: its exit code says nothing
	}
	if err := os.RemoveAll(d.dir); err != nil {
		return fmt.Errorf("what the drill decrypted is still in %s: %w", d.dir, err)
	}
	return nil
}

// freePorts asks the system for ports that nobody uses; all are held until the
// last is known, so that no two are the same.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() //nolint:errcheck // nothing was sent
		addr, ok := l.Addr().(*net.TCPAddr)
		if !ok {
			return nil, bus.E(bus.Internal, "%s is no port", l.Addr())
		}
		ports = append(ports, addr.Port)
	}
	return ports, nil
}
