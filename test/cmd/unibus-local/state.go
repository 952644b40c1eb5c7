package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"unibus.internal/test/cluster"
)

const nodes = 3

// local is the cluster in one run directory.
type local struct {
	layout    *cluster.Layout
	state     state
	out, errw io.Writer
}

// state is what must be known to stop the cluster, kept in DIR/processes.json
// and rewritten at every start and stop: an interrupted up leaves nothing
// that down would not find.
type state struct {
	Ports     []cluster.Ports     `json:"ports"`
	Processes map[string]*process `json:"processes"` // by "n1/nats"
}

// process is a started service, with the digest of the configuration and
// binary it was started with.
type process struct {
	cluster.Process
	Digest string `json:"digest"`
}

func openLocal(dir, bin string, ports []cluster.Ports, out, errw io.Writer) *local {
	return &local{layout: &cluster.Layout{Dir: dir, Bin: bin, Ports: ports}, out: out, errw: errw}
}

// portsFrom picks the fixed ports of a local cluster. UNIBUS_PORT_BASE, not
// for people, gives a test a block of free ports instead.
func portsFrom(getenv func(string) string) ([]cluster.Ports, error) {
	ports := make([]cluster.Ports, nodes)
	if base, err := strconv.Atoi(getenv("UNIBUS_PORT_BASE")); err == nil {
		for i := range ports {
			ports[i] = cluster.BlockPorts(i+1, base)
		}
		return ports, nil
	}
	offset, err := portOffset(getenv("UNIBUS_PORT_OFFSET"))
	if err != nil {
		return nil, err
	}
	for i := range ports {
		ports[i] = cluster.StandardPorts(i+1, offset)
	}
	return ports, nil
}

func key(i int, s cluster.Service) string { return fmt.Sprintf("n%d/%s", i, s) }

func (l *local) file(name string) string { return filepath.Join(l.layout.Dir, name) }

// exclusive keeps two commands from working on one run directory at once.
func (l *local) exclusive(work func() error) error {
	if err := os.MkdirAll(l.layout.Dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(l.file("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		return fmt.Errorf("another up or down works on %s: wait until it is done", l.layout.Dir)
	}
	if err := l.load(); err != nil {
		return err
	}
	return work()
}

func (l *local) load() error {
	l.state = state{Processes: map[string]*process{}}
	b, err := os.ReadFile(l.file("processes.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(b, &l.state)
	}
	if err != nil {
		return fmt.Errorf("read the list of started processes: %w", err)
	}
	return nil
}

func (l *local) save() error {
	return l.writeJSON("processes.json", l.state)
}

func (l *local) writeJSON(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return cluster.WriteFile(l.file(name), append(b, '\n'), 0o600)
}

// alive returns the running process of a service, or nil.
func (l *local) alive(i int, s cluster.Service) *process {
	if p := l.state.Processes[key(i, s)]; p != nil && p.Alive() {
		return p
	}
	return nil
}

// description is cluster.json: what a program needs to use the cluster. All
// paths are absolute.
type description struct {
	Name          string            `json:"name"`
	NATSURLs      []string          `json:"nats_urls"`
	APIURLs       []string          `json:"api_urls"`
	CA            string            `json:"ca"`
	AdminIdentity string            `json:"admin_identity"`
	OpsSeed       string            `json:"ops_seed"`
	SysSeed       string            `json:"sys_seed"`
	Nodes         []nodeDescription `json:"nodes"`
}

type nodeDescription struct {
	Name                string                  `json:"name"`
	Dir                 string                  `json:"dir"`
	NATSURL             string                  `json:"nats_url"`
	APIURL              string                  `json:"api_url"`
	MonitorURL          string                  `json:"monitor_url"`
	MembershipAdminURL  string                  `json:"membership_admin_url"`
	AuthcalloutAdminURL string                  `json:"authcallout_admin_url"`
	PIDs                map[cluster.Service]int `json:"pids"` // 0: not running
}

// describe writes cluster.json and env.
func (l *local) describe() error {
	y := l.layout
	d := description{
		Name: "unibus", CA: y.CA(), AdminIdentity: l.admin(), OpsSeed: y.Seed("ops"), SysSeed: y.Seed("sys"),
	}
	for i := 1; i <= nodes; i++ {
		d.NATSURLs = append(d.NATSURLs, y.NATSURL(i))
		d.APIURLs = append(d.APIURLs, y.APIURL(i))
		n := nodeDescription{
			Name: y.Node(i), Dir: y.NodeDir(i), NATSURL: y.NATSURL(i), APIURL: y.APIURL(i), MonitorURL: y.MonitorURL(i),
			MembershipAdminURL:  y.AdminURL(i, cluster.Membership),
			AuthcalloutAdminURL: y.AdminURL(i, cluster.Authcallout),
			PIDs:                map[cluster.Service]int{},
		}
		for _, s := range cluster.Services() {
			n.PIDs[s] = 0
			if p := l.alive(i, s); p != nil {
				n.PIDs[s] = p.PID
			}
		}
		d.Nodes = append(d.Nodes, n)
	}
	if err := l.writeJSON("cluster.json", d); err != nil {
		return err
	}
	return cluster.WriteFile(l.file("env"), l.envLines(), 0o600)
}

// admin is the identity file of the first admin.
func (l *local) admin() string { return l.file("admin.nk") }

// envLines is for a shell: source .run/env.
func (l *local) envLines() []byte {
	env := l.layout.CLIEnv(l.admin())
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(env)) {
		fmt.Fprintf(&b, "export %s='%s'\n", k, strings.ReplaceAll(env[k], "'", `'\''`))
	}
	return []byte(b.String())
}
