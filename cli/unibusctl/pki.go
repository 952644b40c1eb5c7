package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

func (a *app) pkiCommand() *cli.Command {
	dir := &cli.StringFlag{Name: "dir", Required: true, Usage: "`DIR` of the authorities and the nodes' certificates"}
	someDir := &cli.StringFlag{Name: "dir", Usage: dir.Usage}
	inventory := &cli.StringFlag{Name: "inventory", Usage: "the nodes and their addresses, `nodes.env`"}
	neededInventory := &cli.StringFlag{Name: "inventory", Required: true, Usage: inventory.Usage}
	force := &cli.BoolFlag{Name: "force", Usage: "replace existing files"}
	return &cli.Command{
		Name:  "pki",
		Usage: "make and check the certificates of the cluster",
		Description: "Two authorities: the client CA signs what clients see (NATS, API), the cluster CA what the\n" +
			"nodes show each other on routes. They are never mixed. Keep DIR off the nodes.\n\n" +
			"Example:\n  unibusctl pki init --dir pki\n  unibusctl pki issue --dir pki --inventory nodes.env",
		Subcommands: []*cli.Command{
			{
				Name:  "init",
				Usage: "make the two authorities, and with an inventory the nodes' certificates",
				Description: "Replacing an authority makes every certificate it signed worthless.\n\n" +
					"Example:\n  unibusctl pki init --dir pki --inventory nodes.env",
				Flags: []cli.Flag{dir, inventory, force},
				Action: func(c *cli.Context) error {
					return a.pkiInit(pkiDir(c.String("dir")), c.String("inventory"), c.Bool("force"))
				},
			},
			{
				Name:  "issue",
				Usage: "make the certificates of the nodes",
				Description: "Certificates that are still right are kept; one that is not is replaced with --force only.\n\n" +
					"Example:\n  unibusctl pki issue --dir pki --inventory nodes.env\n" +
					"  unibusctl pki issue --dir pki --inventory nodes.env --node n1 --force",
				Flags: []cli.Flag{dir, neededInventory, &cli.StringFlag{Name: "node", Usage: "only this `NODE`"}, force},
				Action: func(c *cli.Context) error {
					return a.pkiIssue(pkiDir(c.String("dir")), c.String("inventory"), c.String("node"), c.Bool("force"))
				},
			},
			{
				Name:  "verify",
				Usage: "check every file: right authority, names, purpose, keys, dates, modes",
				Description: "DIR may also be the tls directory of a node. Exit code 0 ok, 1 warning, 2 critical.\n\n" +
					"Example:\n  unibusctl pki verify --dir pki --inventory nodes.env",
				Flags:  []cli.Flag{dir, inventory},
				Action: func(c *cli.Context) error { return a.pkiVerify(c.String("dir"), c.String("inventory")) },
			},
			{
				Name:  "status",
				Usage: "list certificates and when they expire, in files and on live ports",
				Description: "Exit code 0 ok, 1 for less than 30 days left, 2 for less than 7 days or worse,\n" +
					"3 if a port or a node does not answer. A route port also tells which authorities it trusts.\n\n" +
					"Example:\n  unibusctl pki status --dir pki\n  unibusctl pki status --connect host:4250 --connect host:8470\n" +
					"  unibusctl pki status --dir pki --inventory nodes.env --live --nodes",
				Flags: []cli.Flag{
					someDir, inventory,
					&cli.StringSliceFlag{Name: "connect", Usage: "also ask the live `HOST:PORT` (NATS, route or API; repeat)"},
					&cli.BoolFlag{Name: "live", Usage: "also ask every port of the inventory, or without one those of --nats-url and --api-url"},
					&cli.BoolFlag{Name: "nodes", Usage: "also read the files on every node of the inventory, over ssh"},
					&cli.StringFlag{Name: "ssh-config", TakesFile: true, Usage: "`FILE` for ssh -F"},
					localFlag(),
				},
				Action: a.pkiStatus,
			},
			a.pkiRenewCommand(),
			a.pkiRotateCommand(),
		},
	}
}

func (a *app) minter() minter { return minter{now: a.now(), rand: a.rand} }

// pkiInit makes both authorities, or neither where any file is in the way or the
// inventory is not right.
func (a *app) pkiInit(dir pkiDir, inventoryPath string, force bool) error {
	if inventoryPath != "" {
		if _, err := parseInventory(inventoryPath); err != nil {
			return err
		}
	}
	for _, role := range caRoles() {
		for _, path := range []string{dir.caKey(role), dir.caCert(role)} {
			if exists(path) && !force {
				return bus.E(bus.Conflict, "%s exists already: a new authority would make every certificate of the old one worthless", path).
					WithHint("unibusctl pki verify --dir %s, or the same command with --force", dir)
			}
		}
	}
	if err := os.MkdirAll(string(dir), 0o700); err != nil {
		return fmt.Errorf("make the PKI directory: %w", err)
	}
	var rows []certRow
	for _, role := range caRoles() {
		pair, err := a.minter().authority(role)
		if err != nil {
			return err
		}
		if err := pair.write(dir.caCert(role), dir.caKey(role), force); err != nil {
			return err
		}
		rows = append(rows, rowOf(dir.caCert(role), pair.cert, a.now()))
	}
	if inventoryPath != "" {
		return a.pkiIssue(dir, inventoryPath, "", force)
	}
	if names := dir.nodeNames(); len(names) > 0 {
		a.say("the certificates of %s are signed by no authority now: unibusctl pki issue --dir %s --inventory nodes.env --force", strings.Join(names, ", "), dir)
	}
	return a.printCertificates(severityOK, rows)
}

// issued is one certificate after `pki issue`.
type issued struct {
	Node    string    `json:"node"`
	Role    leafRole  `json:"role"`
	File    string    `json:"file"`
	Expires time.Time `json:"expires"`
	State   string    `json:"state"` // issued, kept, replaced
}

// pkiIssue gives the nodes their certificates. All that would be refused is
// looked for before the first file is written.
func (a *app) pkiIssue(dir pkiDir, inventoryPath, only string, force bool) error {
	inv, err := parseInventory(inventoryPath)
	if err != nil {
		return err
	}
	nodes := inv.nodes
	if only != "" {
		n, err := inv.node(only)
		if err != nil {
			return err
		}
		nodes = []node{n}
	}
	cas, err := a.signers(dir)
	if err != nil {
		return err
	}
	run := &issuance{app: a, dir: dir, inventory: inv.path, cas: cas, force: force}
	for _, n := range nodes {
		for _, role := range leafRoles() {
			if err := run.plan(n, role); err != nil {
				return err
			}
		}
	}
	return run.write()
}

// signers loads both authorities with their keys. One bad authority stops the
// other from signing too: where they are mixed up, neither can be believed.
func (a *app) signers(dir pkiDir) (map[caRole]*keyPair, error) {
	check := &pkiChecker{dir: dir, now: a.now()}
	check.authorities()
	if f := check.first(); f != nil {
		return nil, bus.E(bus.Invalid, "%s %s", f.File, f.Problem).WithHint("%s", f.Fix)
	}
	cas := map[caRole]*keyPair{}
	for _, role := range caRoles() {
		key, err := readKey(dir.caKey(role))
		if err != nil {
			return nil, bus.E(bus.Invalid, "%s %w", dir.caKey(role), err).WithHint("put it back: without it nothing can be signed")
		}
		for _, cert := range check.trust[role] {
			if samePublic(cert.PublicKey, key.Public()) {
				cas[role] = &keyPair{cert: cert, key: key}
			}
		}
	}
	return cas, nil
}

// issuance is one run of `pki issue`: first a plan, then the writing.
type issuance struct {
	app       *app
	dir       pkiDir
	inventory string
	cas       map[caRole]*keyPair
	force     bool
	planned   []plannedLeaf
}

type plannedLeaf struct {
	issued
	names []string // to be issued; nil to be kept
}

// plan decides on one certificate: keep it, make it, or refuse.
func (p *issuance) plan(n node, role leafRole) error {
	dir := p.dir.node(n.name)
	l := plannedLeaf{issued: issued{Node: n.name, Role: role, File: dir.cert(role), State: "issued"}, names: leafNames(n)}
	if exists(dir.cert(role)) || exists(dir.key(role)) {
		l.State = "replaced"
		if !p.force {
			cert, err := p.keep(n, role)
			if err != nil {
				return err
			}
			l.State, l.Expires, l.names = "kept", cert.NotAfter.UTC(), nil
		}
	}
	p.planned = append(p.planned, l)
	return nil
}

// keep returns an existing certificate that is still what would be issued.
func (p *issuance) keep(n node, role leafRole) (*x509.Certificate, error) {
	check := &pkiChecker{dir: p.dir, now: p.app.now(), inventory: p.inventory, trust: map[caRole][]*x509.Certificate{}}
	for r, ca := range p.cas {
		check.trust[r] = []*x509.Certificate{ca.cert}
	}
	dir := p.dir.node(n.name)
	check.leaf(dir, role, n.name, leafNames(n))
	if f := check.first(); f != nil {
		return nil, bus.E(bus.Conflict, "%s exists and is not replaced: %s %s", dir.cert(role), f.File, f.Problem).WithHint("%s", f.Fix)
	}
	for _, f := range check.findings {
		p.app.say("%s", f)
	}
	return readCert(dir.cert(role))
}

func (p *issuance) write() error {
	var done []issued
	for _, l := range p.planned {
		if l.names != nil {
			cert, err := p.make(l)
			if err != nil {
				return err
			}
			l.Expires = cert.NotAfter.UTC()
		}
		done = append(done, l.issued)
	}
	return p.app.print(map[string]any{"certificates": done}, func(t table.Writer) {
		t.AppendHeader(table.Row{"node", "role", "file", "expires", "state"})
		for _, l := range done {
			t.AppendRow(table.Row{l.Node, l.Role, l.File, l.Expires.Format(time.DateOnly), l.State})
		}
	})
}

func (p *issuance) make(l plannedLeaf) (*x509.Certificate, error) {
	dir := p.dir.node(l.Node)
	if err := os.MkdirAll(string(dir), 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of %s: %w", l.Node, err)
	}
	pair, err := p.app.minter().leaf(p.cas[l.Role.authority()], l.Role, l.Node, l.names)
	if err != nil {
		return nil, err
	}
	return pair.cert, pair.write(dir.cert(l.Role), dir.key(l.Role), p.force)
}

// exists errs on the side of a file being there: what cannot be looked at is
// not overwritten.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
