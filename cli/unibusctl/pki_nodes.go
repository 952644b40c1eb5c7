package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

const (
	// bringWithin bounds a stage over all nodes; shownWithin the wait for a node
	// to show what was put there, a reload that has been proven already, or
	// membership's next look at its files.
	bringWithin = 20 * time.Minute
	shownWithin = 30 * time.Second
)

// pkiNodes are all nodes of an inventory, as far as certificates go: what is on
// their disks, what they show on their ports, and the PKI directory that both
// should agree with.
type pkiNodes struct {
	app   *app
	dir   pkiDir
	inv   *inventory
	seed  string // file of the sys nkey
	hosts []*pkiHost
}

// pkiHost is one node, reached over ssh or in a directory of this machine.
type pkiHost struct {
	node node
	etc  string      // of a node on this machine
	ssh  *deployHost // nil for a node on this machine
}

func nodesFlags(a *app) []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "dir", Required: true, Usage: "`DIR` of the authorities and the nodes' certificates"},
		&cli.StringFlag{Name: "inventory", Required: true, TakesFile: true, Usage: "the nodes and how they are reached, `nodes.env`"},
		a.sysSeedFlag(),
		&cli.StringFlag{Name: "ssh-config", TakesFile: true, Usage: "`FILE` for ssh -F"},
		localFlag(),
	}
}

func localFlag() cli.Flag {
	return &cli.StringFlag{Name: "local", Usage: "not over ssh: the nodes' trees are `DIR`/NODE/etc on this machine"}
}

// newPKINodes points the command at the nodes of the inventory, with the trust
// of the PKI directory: it is the one that the nodes have, or are about to.
func (a *app) newPKINodes(c *cli.Context) (*pkiNodes, error) {
	if _, err := positional(c); err != nil {
		return nil, err
	}
	r := &pkiNodes{app: a, dir: pkiDir(c.String("dir"))}
	var err error
	if r.seed, err = a.sysSeedOf(c); err != nil {
		return nil, err
	}
	if r.inv, r.hosts, err = a.pkiHosts(c); err != nil {
		return nil, err
	}
	var apis, servers []string
	for _, n := range r.inv.nodes {
		apis = append(apis, "https://"+net.JoinHostPort(n.public, strconv.Itoa(n.ports.api)))
		servers = append(servers, "tls://"+net.JoinHostPort(n.public, strconv.Itoa(n.ports.nats)))
	}
	a.set.apiURL, a.set.natsURL, a.set.ca = strings.Join(apis, ","), strings.Join(servers, ","), r.dir.caCert(clientCA)
	return r, nil
}

// pkiHosts are all nodes: whether a change is safe is a question to every one.
func (a *app) pkiHosts(c *cli.Context) (*inventory, []*pkiHost, error) {
	inv, err := parseInventory(c.String("inventory"))
	if err != nil {
		return nil, nil, err
	}
	var hosts []*pkiHost
	if local := c.String("local"); local != "" {
		for _, n := range inv.nodes {
			etc := filepath.Join(local, n.name, "etc")
			if _, err := os.Stat(filepath.Join(etc, "tls")); err != nil {
				return nil, nil, bus.E(bus.NotFound, "%s is no tree of a node: %w", etc, err).WithHint("--local DIR: config render wrote to DIR/NODE/etc")
			}
			hosts = append(hosts, &pkiHost{node: n, etc: etc})
		}
		return inv, hosts, nil
	}
	d := &deployment{app: a, inv: inv}
	if err := d.reach(c.String("ssh-config"), nil); err != nil {
		return nil, nil, err
	}
	for _, h := range d.hosts {
		hosts = append(hosts, &pkiHost{node: h.node, ssh: h})
	}
	return inv, hosts, nil
}

// differs names what on the node is not as files say.
func (h *pkiHost) differs(ctx context.Context, files []nodeFile) ([]string, error) {
	if h.ssh == nil {
		return install(slices.Clone(files), h.etc, true)
	}
	h.ssh.files = nil
	for _, f := range files {
		d := etcFile(f)
		sum := sha256.Sum256(d.data)
		d.sum = hex.EncodeToString(sum[:])
		h.ssh.files = append(h.ssh.files, d)
	}
	h.ssh.missing = nil
	if err := h.ssh.probe(ctx); err != nil {
		return nil, err
	}
	switch {
	case h.ssh.is != h.node.name: // a certificate of one node on another would be shown, and refused
		return nil, bus.E(bus.Conflict, "%s is node %s, and the inventory calls it %s", h.ssh.node.ssh, quote(h.ssh.is), h.node.name).WithHint("unibusctl deploy plan ...")
	case len(h.ssh.missing) > 0:
		return nil, bus.E(bus.Invalid, "%s has no %s", h.node.name, strings.Join(h.ssh.missing, ", ")).WithHint("ssh %s apt-get install rsync", h.ssh.node.ssh)
	}
	var names []string
	for _, c := range h.ssh.changes {
		names = append(names, strings.TrimPrefix(c.Path, deployEtc+"/"))
	}
	return names, h.ssh.fits()
}

// read returns files below the node's etc; one that is missing is left out.
// Private keys are never asked for.
func (h *pkiHost) read(ctx context.Context, names ...string) (map[string][]byte, error) {
	out := map[string][]byte{}
	if h.ssh != nil {
		paths := make([]string, len(names))
		for i, name := range names {
			paths[i] = deployEtc + "/" + name
		}
		found, err := h.ssh.contents(ctx, paths)
		for p, data := range found {
			out[strings.TrimPrefix(p, deployEtc+"/")] = data
		}
		return out, err
	}
	for _, name := range names {
		data, err := os.ReadFile(filepath.Join(h.etc, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("look at %s: %w", h.node.name, err)
		}
		if err == nil {
			out[name] = data
		}
	}
	return out, nil
}

// place replaces what differs, each file in one step, and keeps what it
// replaces: on the node as deploy does, beside etc for a local one.
func (h *pkiHost) place(ctx context.Context, files []nodeFile, changed []string, id string) error {
	if h.ssh == nil {
		for _, name := range changed {
			data, err := os.ReadFile(filepath.Join(h.etc, name))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			kept := filepath.Join(filepath.Dir(h.etc), "backups", id, name)
			if err == nil {
				err = os.MkdirAll(filepath.Dir(kept), 0o700)
			}
			if err == nil {
				err = writeFile(kept, data, 0o600, true)
			}
			if err != nil {
				return fmt.Errorf("keep what is replaced on %s: %w", h.node.name, err)
			}
		}
		_, err := install(slices.Clone(files), h.etc, false)
		return err
	}
	work, err := os.MkdirTemp("", "unibus-pki-")
	if err != nil {
		return fmt.Errorf("make a working directory: %w", err)
	}
	defer os.RemoveAll(work) //nolint:errcheck // mode 0700; what stays behind is named by the system's own cleaning
	if err := h.ssh.send(ctx, work); err != nil {
		return err
	}
	_, err = h.ssh.run(ctx, "place", id)
	return err
}

// nodeSight is what one node has and shows at one moment.
type nodeSight struct {
	node    string
	changes []string // files that differ from the PKI directory
	trust   map[caRole][]*x509.Certificate
	disk    map[leafRole]*x509.Certificate
	shown   map[leafRole]*x509.Certificate
	accepts [][]byte // subjects of the authorities that the route port believes
}

func caFile(role caRole) string     { return "tls/" + string(role) + ".crt" }
func leafFile(role leafRole) string { return "tls/" + string(role) + ".crt" }

// look asks every node. One that cannot be asked is an error: nothing is known
// of it then, and what is not known is not safe.
func (r *pkiNodes) look(ctx context.Context) ([]*nodeSight, error) {
	sights, errs := make([]*nodeSight, len(r.hosts)), make([]error, len(r.hosts))
	var wait sync.WaitGroup
	for i, h := range r.hosts {
		wait.Go(func() { sights[i], errs[i] = r.lookAt(ctx, h) })
	}
	wait.Wait()
	return sights, errors.Join(errs...)
}

func (r *pkiNodes) lookAt(ctx context.Context, h *pkiHost) (*nodeSight, error) {
	s := &nodeSight{node: h.node.name, trust: map[caRole][]*x509.Certificate{}, disk: map[leafRole]*x509.Certificate{}}
	if err := r.lookAtDisk(ctx, h, s); err != nil {
		return nil, err
	}
	return s, r.lookAtPorts(ctx, h.node, s)
}

func (r *pkiNodes) lookAtDisk(ctx context.Context, h *pkiHost, s *nodeSight) error {
	files, err := tlsFiles(string(r.dir), r.inv.path, h.node.name)
	if err != nil {
		return err
	}
	if s.changes, err = h.differs(ctx, files); err != nil {
		return err
	}
	return s.readDisk(ctx, h)
}

// readDisk fills trust and disk. A file that holds no certificate is an error:
// what a node trusts has to be known before anything is changed.
func (s *nodeSight) readDisk(ctx context.Context, h *pkiHost) error {
	names := []string{}
	for _, role := range caRoles() {
		names = append(names, caFile(role))
	}
	for _, role := range leafRoles() {
		names = append(names, leafFile(role))
	}
	found, err := h.read(ctx, names...)
	if err != nil {
		return err
	}
	certs := map[string][]*x509.Certificate{}
	for name, data := range found {
		if certs[name], err = parseCerts(data); err != nil {
			return bus.E(bus.Invalid, "%s: %s %w", h.node.name, name, err).WithHint("unibusctl deploy stage --node %s ...", h.node.name)
		}
	}
	for _, role := range caRoles() {
		s.trust[role] = certs[caFile(role)]
	}
	for _, role := range leafRoles() {
		if len(certs[leafFile(role)]) > 0 {
			s.disk[role] = certs[leafFile(role)][0]
		}
	}
	return nil
}

func parseCerts(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("is damaged: %w", err)
		}
		out, data = append(out, cert), rest
	}
	if len(out) == 0 {
		return nil, errors.New("holds no certificate")
	}
	return out, nil
}

// lookAtPorts fills shown and accepts.
func (r *pkiNodes) lookAtPorts(ctx context.Context, n node, s *nodeSight) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	ports := nodePorts(r.inv, n)
	ends, errs := make([]*farSide, len(ports)), make([]error, len(ports))
	var wait sync.WaitGroup
	for i, p := range ports {
		wait.Go(func() {
			var err error
			if ends[i], err = farEnd(ctx, p.address); err != nil {
				errs[i] = bus.E(bus.Unavailable, "%s does not show the certificate of its %s port %s: %w", n.name, p.role, p.address, err).WithHint("unibusctl cluster status")
			}
		})
	}
	wait.Wait()
	if err := errors.Join(errs...); err != nil {
		return bus.E(bus.Unavailable, "%w", err)
	}
	s.shown = map[leafRole]*x509.Certificate{}
	for i, p := range ports {
		s.shown[p.role] = ends[i].cert
		if p.role == routeLeaf {
			s.accepts = ends[i].accepts
		}
	}
	return nil
}

// serverBehind says what the node's nats-server runs that differs from the
// node's own disk: "" if nothing does. The route port tells the subjects of the
// authorities it believes; of the client CA nats-server knows nothing.
func (s *nodeSight) serverBehind() string {
	for _, role := range []leafRole{serverLeaf, routeLeaf} {
		if d := s.disk[role]; d == nil || !d.Equal(s.shown[role]) {
			return fmt.Sprintf("shows another %s certificate than %s", role, leafFile(role))
		}
	}
	if !sameSubjects(s.accepts, s.trust[clusterCA]) {
		return "trusts other authorities on its route port than " + caFile(clusterCA)
	}
	return ""
}

func sameSubjects(raw [][]byte, certs []*x509.Certificate) bool {
	var a, b []string
	for _, r := range raw {
		a = append(a, string(r))
	}
	for _, c := range certs {
		b = append(b, string(c.RawSubject))
	}
	return len(without(a, b)) == 0 && len(without(b, a)) == 0
}

func (s *nodeSight) apiBehind() string {
	if d := s.disk[apiLeaf]; d == nil || !d.Equal(s.shown[apiLeaf]) {
		return "shows another api certificate than " + leafFile(apiLeaf)
	}
	return ""
}

// believes reports whether the node takes certificates of ca for good, by its
// file and, where that can be seen, on its port.
func (s *nodeSight) believes(role caRole, ca *x509.Certificate) string {
	if !slices.ContainsFunc(s.trust[role], ca.Equal) {
		return fmt.Sprintf("its %s lacks it", caFile(role))
	}
	if role == clusterCA && !slices.ContainsFunc(s.accepts, func(raw []byte) bool { return string(raw) == string(ca.RawSubject) }) {
		return "its route port does not accept it yet"
	}
	return ""
}

// broughtNode is a node in the JSON of renew and rotate-ca.
type broughtNode struct {
	Node    string   `json:"node"`
	Files   []string `json:"files"`   // replaced, or to be
	Reload  bool     `json:"reload"`  // nats-server loaded its configuration again, or is to
	Clients int      `json:"clients"` // of all servers before that reload
	Dropped int      `json:"dropped"` // at most so many were missing at one moment
	BackMS  int64    `json:"back_ms"` // until they were back
	Done    bool     `json:"done"`    // the node shows what the PKI directory holds
}

// bring has every node, one after the other, take over and show what the PKI
// directory holds. It ends at the first that does not; run again, it goes on
// there, for what is due is seen on the nodes.
func (r *pkiNodes) bring(ctx context.Context, sights []*nodeSight) ([]broughtNode, error) {
	id := r.app.now().UTC().Format("20060102T150405.000Z")
	var out []broughtNode
	for i, h := range r.hosts {
		b, err := r.bringOne(ctx, h, sights[i], id)
		out = append(out, b)
		if err != nil {
			return out, bus.E(bus.CodeOf(err), "%s: %w; no node after it was touched", h.node.name, err).WithHint("mend %s, then the same command again", h.node.name)
		}
	}
	return out, nil
}

func (r *pkiNodes) bringOne(ctx context.Context, h *pkiHost, s *nodeSight, id string) (broughtNode, error) {
	b := broughtNode{Node: h.node.name, Files: []string{}}
	files, err := tlsFiles(string(r.dir), r.inv.path, h.node.name)
	if err != nil {
		return b, err
	}
	changed, err := h.differs(ctx, files)
	if err != nil {
		return b, err
	}
	if len(changed) > 0 {
		b.Files = changed
		if err := r.app.everyNodeReady(ctx); err != nil {
			return b, err
		}
		if err := h.place(ctx, files, changed, id); err != nil {
			return b, err
		}
		if err := s.readDisk(ctx, h); err != nil {
			return b, err
		}
	}
	if why := s.serverBehind(); why != "" {
		b.Reload = true
		r.app.say("%s: its server %s: reload", h.node.name, why)
		if err := r.app.everyNodeReady(ctx); err != nil {
			return b, err
		}
		did, err := r.app.reloadOne(ctx, r.seed, h.node.name)
		if err != nil {
			return b, err
		}
		b.Clients, b.Dropped, b.BackMS = did.Clients, did.Dropped, did.BackMS
	}
	if err := r.shows(ctx, h, s); err != nil {
		return b, err
	}
	b.Done = true
	return b, nil
}

// shows waits until the node's ports show what is on its disk.
func (r *pkiNodes) shows(ctx context.Context, h *pkiHost, s *nodeSight) error {
	wait, cancel := context.WithTimeout(ctx, shownWithin)
	defer cancel()
	for {
		err := r.lookAtPorts(wait, h.node, s)
		if err == nil {
			why := s.serverBehind()
			if why == "" {
				why = s.apiBehind()
			}
			if why == "" {
				err = r.app.everyNodeReady(wait)
			} else {
				err = bus.E(bus.Unavailable, "it %s", why).WithHint("on %s: journalctl -u unibus-membership -u unibus-nats", h.node.name)
			}
		}
		if err == nil {
			return nil
		}
		select {
		case <-wait.Done():
			return err
		case <-time.After(backEvery):
		}
	}
}

// routes are all connections between servers, as they tell themselves: a route
// that was dropped and made again has another number.
func (r *pkiNodes) routes(ctx context.Context) (map[string]bool, error) {
	nc, err := r.app.dialFirst(ctx, r.seed, "_INBOX_sys")
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err == nil {
		err = nc.PublishRequest("$SYS.REQ.SERVER.PING.ROUTEZ", inbox, nil)
	}
	if err != nil {
		return nil, bus.E(bus.Unavailable, "the servers cannot be asked: %w", err)
	}
	wait, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out := map[string]bool{}
	for range r.hosts {
		m, err := sub.NextMsgWithContext(wait)
		if err != nil {
			return nil, bus.E(bus.Unavailable, "not every server tells its routes: %w", err).WithHint("unibusctl cluster status")
		}
		var answer struct {
			Server struct {
				ID string `json:"id"`
			} `json:"server"`
			Data struct {
				Routes []struct {
					ID     uint64 `json:"rid"`
					Remote string `json:"remote_id"`
				} `json:"routes"`
			} `json:"data"`
		}
		if err := json.Unmarshal(m.Data, &answer); err != nil || answer.Server.ID == "" {
			return nil, bus.E(bus.Internal, "a server tells its routes in an unknown form: %.80q", m.Data)
		}
		for _, route := range answer.Data.Routes {
			out[fmt.Sprintf("%s %d %s", answer.Server.ID, route.ID, route.Remote)] = true
		}
	}
	return out, nil
}

// certificateRun is the document of renew and rotate-ca.
type certificateRun struct {
	Authority     string        `json:"authority,omitempty"`
	Stage         string        `json:"stage,omitempty"`
	Done          bool          `json:"done"` // false: only what would be done
	Nodes         []broughtNode `json:"nodes"`
	Routes        int           `json:"routes"`         // connections between servers before
	RoutesDropped int           `json:"routes_dropped"` // of these, gone or made again
}

func (r *pkiNodes) print(run certificateRun) error {
	return r.app.print(run, func(t table.Writer) {
		t.AppendHeader(table.Row{"node", "files", "server", "done"})
		for _, n := range run.Nodes {
			files, server := strings.Join(n.Files, " "), ""
			if files == "" {
				files = "nothing differs"
			}
			switch {
			case n.Reload && !run.Done:
				server = "to be reloaded"
			case n.Reload:
				server = fmt.Sprintf("reloaded; %d of %d clients back after %d ms", n.Dropped, n.Clients, n.BackMS)
			}
			t.AppendRow(table.Row{n.Node, files, server, n.Done})
		}
	})
}

// carry brings the PKI directory to the nodes and tells what it came to.
func (r *pkiNodes) carry(ctx context.Context, sights []*nodeSight, run certificateRun) error {
	before, err := r.routes(ctx)
	if err != nil {
		return err
	}
	run.Done, run.Routes = true, len(before)
	run.Nodes, err = r.bring(ctx, sights)
	if err == nil {
		var after map[string]bool
		if after, err = r.routes(ctx); err == nil {
			for route := range before {
				if !after[route] {
					run.RoutesDropped++
				}
			}
		}
	}
	run.Done = err == nil
	if said := r.print(run); said != nil && err == nil {
		err = said
	}
	if err == nil && !r.app.set.json {
		r.app.say("%d routes, %d of them dropped", run.Routes, run.RoutesDropped)
	}
	return err
}
