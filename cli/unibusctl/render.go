package main

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"

	"github.com/jedib0t/go-pretty/v6/table"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// templates are the configuration of every cluster, local or production. They
// are part of the binary, so that a node's files and the unibusctl that
// rendered and checks them cannot drift apart, and embedding reaches only
// files of its own module. What an operator reads in deploy/nats is their
// rendering for an example inventory, held to them by a test.
//
//go:embed templates
var templates embed.FS

// localConf is the operator's own file: rendered once, then never touched.
const localConf = "nats/conf.d/local.conf"

type renderRequest struct {
	inventory, secrets, pki, node string
	out, etc, state               string
	dryRun                        bool
}

func (a *app) configRender(r renderRequest) error {
	files, err := r.files()
	if err != nil {
		return err
	}
	changed, err := install(files, r.out, r.dryRun)
	if err != nil {
		return err
	}
	verb := "wrote"
	if r.dryRun {
		verb = "would write"
	}
	for _, name := range changed {
		a.say("%s %s", verb, filepath.Join(r.out, name))
	}
	if len(changed) == 0 {
		a.say("nothing changed in %s", r.out)
	} else if !r.dryRun {
		a.say("Next: unibusctl config check --dir %s", r.out)
	}
	if changed == nil {
		changed = []string{}
	}
	value := map[string]any{"node": r.node, "dir": r.out, "dry_run": r.dryRun, "files": len(files), "changed": changed}
	if !a.set.json {
		return nil
	}
	return a.print(value, func(table.Writer) {})
}

// files is a node's whole tree, in memory: nothing is written before all of it
// is known to be right.
func (r *renderRequest) files() ([]nodeFile, error) {
	inv, err := parseInventory(r.inventory)
	if err != nil {
		return nil, err
	}
	n, err := inv.node(r.node)
	if err != nil {
		return nil, err
	}
	if len(inv.nodes) < kv.Replicas {
		return nil, bus.E(bus.Invalid, "%s lists %d nodes; every stream has %d replicas, so a cluster needs at least %d", r.inventory, len(inv.nodes), kv.Replicas, kv.Replicas).
			WithHint("add the missing NODE_ rows to %s", r.inventory)
	}
	if r.etc == "" {
		r.etc = r.out
	}
	paths := []*string{&r.etc, &r.state}
	for _, p := range paths {
		if *p, err = configPath(*p); err != nil {
			return nil, err
		}
	}
	s, err := readSecrets(r.secrets)
	if err != nil {
		return nil, err
	}
	files, err := renderTemplates(newNodeConfig(inv, n, s, r.etc, r.state))
	if err != nil {
		return nil, err
	}
	tls, err := tlsFiles(r.pki, r.inventory, n.name)
	if err != nil {
		return nil, err
	}
	files = append(files, tls...)
	for _, k := range keyFiles {
		if k.onNode {
			files = append(files, nodeFile{name: "creds/" + k.file(), mode: 0o600, data: s.seeds[k.name]})
		}
		if k.second() {
			files = append(files, nodeFile{name: "creds/" + beside(k.file(), "next"), mode: 0o600, data: s.second[k.name]})
		}
	}
	return files, nil
}

// configPath makes a path absolute, for a server may be started anywhere, and
// refuses what would have to be quoted differently by nats-server, systemd and
// a shell.
func configPath(p string) (string, error) {
	abs, err := filepath.Abs(p)
	if err != nil {
		return "", fmt.Errorf("find %s: %w", p, err)
	}
	for _, c := range abs {
		if c <= ' ' || c == 0x7f || strings.ContainsRune("\"'`\\$;#&|<>(){}*?!", c) {
			return "", bus.E(bus.Invalid, "the path %s holds %q, which configuration files cannot spell safely", quote(abs), c).
				WithHint("choose a directory without spaces and shell characters")
		}
	}
	return abs, nil
}

// tlsFiles collects what the PKI issued for a node. Of the authorities only the
// certificates leave the PKI.
func tlsFiles(pki, inventory, node string) ([]nodeFile, error) {
	var out []nodeFile
	for _, ca := range []string{"client-ca.crt", "cluster-ca.crt"} {
		data, err := os.ReadFile(filepath.Join(pki, ca))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, bus.E(bus.NotFound, "%s is missing", filepath.Join(pki, ca)).WithHint("unibusctl pki init --dir %s", pki)
		}
		if err != nil {
			return nil, fmt.Errorf("read a certificate: %w", err)
		}
		out = append(out, nodeFile{name: "tls/" + ca, mode: 0o644, data: data})
	}
	for _, leaf := range []string{"server", "route", "api"} {
		crt := filepath.Join(pki, node, leaf+".crt")
		certificate, err := os.ReadFile(crt)
		var key []byte
		if err == nil {
			key, err = readSecret(filepath.Join(pki, node, leaf+".key"))
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil, bus.E(bus.NotFound, "node %s has no complete certificate %s", node, crt).
				WithHint("unibusctl pki issue --dir %s --inventory %s --node %s", pki, inventory, node)
		}
		if err != nil {
			return nil, err
		}
		out = append(out,
			nodeFile{name: "tls/" + leaf + ".crt", mode: 0o644, data: certificate},
			nodeFile{name: "tls/" + leaf + ".key", mode: 0o600, data: key})
	}
	return out, nil
}

// nodeConfig is what the templates see.
type nodeConfig struct {
	Node, Cluster string
	Nodes         []string // all, this one included
	Etc, State    string

	Listen, RouteListen, APIListen string   // host:port
	Routes                         []string // host:port of the other nodes
	NATSURLs, APIURLs              string   // comma lists, the own node first
	Authorities                    string   // comma list of what clients may call this node's API
	Ports                          configPorts

	Key           map[string]string   // public keys by name
	Both          map[string][]string // of users: with the other generation while one is replaced
	BusServices   string              // comma list of the keys of services in account BUS
	Static        []string            // names of the keys that servers know themselves
	RoutePassword string
	RouteDemands  bool // the password, and not only a certificate of the cluster CA

	Buckets, ViewBuckets, Streams []string
	Audit                         string // the stream
	Caps                          caps

	Digest string // of everything else that nats-server reads
}

// configPorts are the ports that templates name.
type configPorts struct{ NATS, Monitor, MembershipAdmin, AuthcalloutAdmin int }

// caps are sizes in GiB. nats-server counts an R3 stream three times against
// the cap of its account, and once against the limit of each node.
type caps struct {
	Store             int // of a node
	Ctrl, Bus         int // of the accounts
	CtrlNode, BusNode int // what that is on one node
}

const (
	storePerNode = 16
	ctrlPerNode  = 2 // the buckets reserve 1.44
	busPerNode   = 9
)

func newNodeConfig(inv *inventory, n node, s *secrets, etc, state string) nodeConfig {
	c := nodeConfig{
		Node: n.name, Cluster: inv.cluster, Etc: etc, State: state,
		Listen:      hostPort(listenHost(n.public), n.ports.nats),
		RouteListen: hostPort(routeListenHost(inv, n), n.ports.route),
		APIListen:   hostPort(listenHost(n.public), n.ports.api),
		Ports: configPorts{
			NATS: n.ports.nats, Monitor: n.ports.monitor,
			MembershipAdmin: n.ports.membershipAdmin, AuthcalloutAdmin: n.ports.authcalloutAdmin,
		},
		Key: s.public, Both: s.both, BusServices: strings.Join(slices.Concat(s.both["authcallout-bus"], s.both["membership-bus"]), ","), RoutePassword: s.routePassword, RouteDemands: !s.unasked,
		ViewBuckets: []string{kv.Users, kv.Rooms, kv.Members}, Audit: kv.AuditStream,
		Caps: caps{Store: storePerNode, Ctrl: kv.Replicas * ctrlPerNode, Bus: kv.Replicas * busPerNode, CtrlNode: ctrlPerNode, BusNode: busPerNode},
	}
	natsURLs := []string{"tls://" + hostPort(n.public, n.ports.nats)}
	apiURLs := []string{"https://" + hostPort(n.public, n.ports.api)}
	for _, other := range inv.nodes {
		c.Nodes = append(c.Nodes, other.name)
		if other.name == n.name {
			continue
		}
		c.Routes = append(c.Routes, hostPort(inv.routeAddress(other), other.ports.route))
		natsURLs = append(natsURLs, "tls://"+hostPort(other.public, other.ports.nats))
		apiURLs = append(apiURLs, "https://"+hostPort(other.public, other.ports.api))
	}
	c.Authorities = strings.Join(authorities(inv, n), ",")
	c.NATSURLs, c.APIURLs = strings.Join(natsURLs, ","), strings.Join(apiURLs, ",")
	for _, k := range keyFiles {
		if k.name != "issuer" && k.name != "xkey" {
			c.Static = append(c.Static, k.name)
		}
	}
	for _, stream := range kv.Streams() {
		c.Streams = append(c.Streams, stream.Name)
		if bucket, ok := strings.CutPrefix(stream.Name, "KV_"); ok {
			c.Buckets = append(c.Buckets, bucket)
		}
	}
	return c
}

// authorities are the names under which requests to a node's API may be signed:
// its addresses, loopback, and what the load balancers in front of it are
// called. A request for one node is refused by the others.
func authorities(inv *inventory, n node) []string {
	var out []string
	for _, host := range append(n.addresses(), "127.0.0.1", "localhost", "::1") {
		if a := hostPort(host, n.ports.api); !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	for _, a := range inv.apiAuthorities {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

func hostPort(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }

// listenHost binds a cluster that lives on loopback to loopback, and others to
// every address: the public one may belong to a router in front of the node,
// and the node's own services come in over loopback.
func listenHost(address string) string {
	ip, err := netip.ParseAddr(address)
	switch {
	case address == "localhost":
		return "127.0.0.1"
	case err == nil && ip.IsLoopback():
		return address
	case err == nil && ip.Is6():
		return "::"
	}
	return "0.0.0.0"
}

// routeListenHost keeps the routes off the public network where there is a
// private one.
func routeListenHost(inv *inventory, n node) string {
	if _, err := netip.ParseAddr(n.private); err == nil && inv.routeNetwork == "private" {
		return n.private
	}
	return listenHost(inv.routeAddress(n))
}

// nodeFile is one file of a node's tree.
type nodeFile struct {
	name string // slash-separated, below the node's etc
	mode fs.FileMode
	data []byte
	once bool // an existing one stays as it is
}

const nodeConf = "nats/node.conf"

// renderTemplates is deterministic: equal input gives equal bytes.
func renderTemplates(c nodeConfig) ([]nodeFile, error) {
	names, err := templateNames()
	if err != nil {
		return nil, err
	}
	out := make([]nodeFile, len(names))
	digest := sha256.New()
	for i, name := range names {
		body, err := renderTemplate(name, c)
		if err != nil {
			return nil, err
		}
		out[i] = generated(name, body)
		if strings.HasPrefix(name, "nats/") && name != localConf {
			fmt.Fprintf(digest, "%s %d\n%s", name, len(body), body)
		}
	}
	// node.conf counts as it is without the digest that it shows.
	c.Digest = hex.EncodeToString(digest.Sum(nil))
	body, err := renderTemplate(nodeConf, c)
	if err != nil {
		return nil, err
	}
	out[slices.Index(names, nodeConf)] = generated(nodeConf, body)
	return out, nil
}

// templateNames lists the templates by the name of the file they become, in
// lexical order.
func templateNames() ([]string, error) {
	var names []string
	err := fs.WalkDir(templates, "templates", func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			names = append(names, strings.TrimPrefix(p, "templates/"))
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the built-in templates: %w", err)
	}
	return names, nil
}

func renderTemplate(name string, c nodeConfig) ([]byte, error) {
	t, err := template.New(path.Base(name)).Option("missingkey=error").ParseFS(templates, "templates/"+name)
	if err != nil {
		return nil, fmt.Errorf("read the template of %s: %w", name, err)
	}
	var b bytes.Buffer
	if err := t.Execute(&b, c); err != nil {
		return nil, fmt.Errorf("render %s: %w", name, err)
	}
	return b.Bytes(), nil
}

const (
	headerLine  = "# GENERATED by `unibusctl config render`: the next render overwrites changes made here.\n"
	headerSum   = "# sha256 of the lines below: "
	secretsConf = "nats/conf.d/secrets.conf"
)

// generated puts the header on a rendered body. The operator's own file has
// none, for nothing will be compared with it.
func generated(name string, body []byte) nodeFile {
	f := nodeFile{name: name, mode: 0o644, data: body}
	switch name {
	case localConf:
		f.once = true
		return f
	case secretsConf:
		f.mode = 0o600
	}
	f.data = fmt.Appendf(nil, "%s%s%s\n%s", headerLine, headerSum, bodySum(body), body)
	return f
}

func bodySum(body []byte) string {
	sum := sha256.Sum256(body)
	return hex.EncodeToString(sum[:])
}

// editedByHand reports whether a rendered file was changed since, and whether
// it is a rendered file at all.
func editedByHand(data []byte) (edited, rendered bool) {
	rest, ok := bytes.CutPrefix(data, []byte(headerLine))
	if !ok {
		return false, false
	}
	line, body, ok := bytes.Cut(rest, []byte("\n"))
	sum, ok2 := bytes.CutPrefix(line, []byte(headerSum))
	return !ok || !ok2 || string(sum) != bodySum(body), true
}

// install brings dir to what files say and returns the names of those that
// differed. It writes only these, each atomically, and takes nothing away.
func install(files []nodeFile, dir string, dryRun bool) (changed []string, err error) {
	slices.SortFunc(files, func(a, b nodeFile) int { return strings.Compare(a.name, b.name) })
	for _, f := range files {
		target := filepath.Join(dir, filepath.FromSlash(f.name))
		same, err := f.sameAs(target)
		if err != nil {
			return nil, err
		}
		if same {
			continue
		}
		changed = append(changed, f.name)
		if dryRun {
			continue
		}
		if err := f.write(dir, target); err != nil {
			return nil, err
		}
	}
	return changed, nil
}

func (f nodeFile) sameAs(target string) (bool, error) {
	info, err := os.Stat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("compare with the rendered file: %w", err)
	case f.once:
		return true, nil
	}
	// The mode of a secret counts: a render closes what was opened. Elsewhere
	// ownership and modes are left to whoever deploys.
	if f.mode&0o077 == 0 && info.Mode().Perm()&0o007 != 0 {
		return false, nil
	}
	data, err := os.ReadFile(target)
	if err != nil {
		return false, fmt.Errorf("compare with the rendered file: %w", err)
	}
	return bytes.Equal(data, f.data), nil
}

func (f nodeFile) write(dir, target string) error {
	mode := fs.FileMode(0o755)
	if path.Dir(f.name) == "creds" {
		mode = 0o700
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(target), mode); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	return writeFile(target, f.data, f.mode, true)
}
