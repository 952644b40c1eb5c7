package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// Where a node keeps things. Units, owners and these have to agree; the fleet
// test boots systems that show whether they do.
const (
	deployEtc   = "/etc/unibus"
	deployState = "/var/lib/unibus"
)

func (a *app) deployCommand() *cli.Command {
	nodes := []cli.Flag{
		&cli.StringFlag{Name: "inventory", Required: true, TakesFile: true, Usage: "nodes.env"},
		&cli.StringSliceFlag{Name: "node", Usage: "only this node; may be repeated (default: all)"},
		&cli.StringFlag{Name: "ssh-config", TakesFile: true, Usage: "`FILE` for ssh -F"},
	}
	what := append(slices.Clone(nodes),
		&cli.StringFlag{Name: "secrets", Required: true, Usage: "directory of config init"},
		&cli.StringFlag{Name: "pki", Required: true, Usage: "directory of pki init and pki issue"},
		&cli.StringFlag{Name: "bin", Usage: "`DIR` of unibusctl, the services and nats-server for the nodes (default: beside this unibusctl)"},
		&cli.StringFlag{Name: "units", Value: "deploy/systemd", Usage: "`DIR` of the units"})
	return &cli.Command{
		Name:     "deploy",
		Category: "nodes",
		Usage:    "bring programs, units and configuration to the nodes, over your own ssh and rsync",
		Description: "plan shows and changes nothing; the others do the same until they are told --yes. A node is reached as\n" +
			"its row in the inventory says (ssh=USER@HOST), by root or by a user who may sudo without a password.\n" +
			"Nothing is ever started or restarted but by `deploy start`, which leaves alone what runs.\n\n" +
			"   unibusctl deploy plan  --inventory nodes.env --secrets secrets --pki pki\n" +
			"   unibusctl deploy stage --inventory nodes.env --secrets secrets --pki pki --yes\n" +
			"   unibusctl deploy start --inventory nodes.env --yes",
		Subcommands: []*cli.Command{
			{
				Name: "plan", Usage: "what a stage would change on each node, as a diff",
				Description: "Ends with 0 whether something would change or not. Secrets are named, never shown.\n\n" +
					"   unibusctl deploy plan --inventory nodes.env --secrets secrets --pki pki",
				Flags:  what,
				Action: func(c *cli.Context) error { return a.deployStage(c, false) },
			},
			{
				Name: "stage", Usage: "put what differs in its place on each node, with a backup",
				Description: "All nodes are looked at first, and everything is sent and compared before the first file is replaced\n" +
					"anywhere: a node out of reach, a full disk or a wrong configuration ends it with nothing done.\n" +
					"Interrupted, the same line finishes it. What runs goes on with what it has.\n\n" +
					"   unibusctl deploy stage --inventory nodes.env --secrets secrets --pki pki --yes",
				Flags:  what,
				Action: func(c *cli.Context) error { return a.deployStage(c, a.set.yes) },
			},
			{
				Name: "start", Usage: "start the staged nodes, now and at every boot",
				Description: "What runs already goes on as it is: a new program or setting needs a restart, one node at a time.\n\n" +
					"   unibusctl deploy start --inventory nodes.env --yes",
				Flags:  nodes,
				Action: a.deployStart,
			},
			{
				Name: "status", Usage: "each unit of each node, what it waits for, and whether it runs what is on disk",
				Description: "Ends with 0 when every unit of every node runs, else 3. Whether they serve is for cluster status.\n\n" +
					"   unibusctl deploy status --inventory nodes.env",
				Flags:  nodes,
				Action: a.deployStatus,
			},
			{
				Name: "rollback", Usage: "put back what the last stage replaced",
				Description: "The backup of a stage that was interrupted comes first. What a rollback replaces is the next backup: a\n" +
					"second rollback takes the first one back. Nothing is restarted.\n\n" +
					"   unibusctl deploy rollback --inventory nodes.env --node n1 --yes",
				Flags:  append(slices.Clone(nodes), &cli.StringFlag{Name: "to", Usage: "`ID` of a backup (default: the last)"}),
				Action: a.deployRollback,
			},
		},
	}
}

// deployFile is one file of a node, with its place and its owner there.
type deployFile struct {
	path   string // on the node
	mode   fs.FileMode
	owner  string // USER:GROUP
	data   []byte
	sum    string // sha256 in hex
	once   bool   // the operator's: one that is there stays
	secret bool   // never shown
}

// A file is text if a diff of it tells a person something.
func (f deployFile) text() bool {
	return !f.secret && !bytes.ContainsRune(f.data, 0)
}

// deployOwners says who may read what below /etc/unibus, by the first pattern
// that fits; tmpfiles.d says the same for trees that are copied by hand. What is
// not listed here is a secret of root's.
var deployOwners = []struct {
	pattern string
	mode    fs.FileMode
	group   string
	secret  bool
}{
	{"nats/conf.d/secrets.conf", 0o640, "unibus-nats", true},
	{"nats/*.conf", 0o640, "unibus-nats", false},
	{"nats/conf.d/*.conf", 0o640, "unibus-nats", false},
	{"tls/*.crt", 0o644, "root", false},
	{"tls/server.key", 0o640, "unibus-nats", true},
	{"tls/route.key", 0o640, "unibus-nats", true},
	{"tls/api.key", 0o640, "unibus-membership", true},
	{"node.env", 0o644, "root", false},
	{"*.env", 0o640, "root", false},
}

func etcFile(f nodeFile) deployFile {
	out := deployFile{path: path.Join(deployEtc, f.name), mode: 0o600, owner: "root:root", data: f.data, once: f.once, secret: true}
	for _, o := range deployOwners {
		if ok, _ := path.Match(o.pattern, f.name); ok {
			out.mode, out.owner, out.secret = o.mode, "root:"+o.group, o.secret
			break
		}
	}
	return out
}

// deployPrograms by their name in --bin. The distribution has a nats-server in
// /usr/sbin that is too old; it is left alone.
var deployPrograms = map[string]string{
	"unibusctl":          "/usr/bin/unibusctl",
	"unibus-authcallout": "/usr/sbin/unibus-authcallout",
	"unibus-membership":  "/usr/sbin/unibus-membership",
	"nats-server":        "/usr/lib/unibus/nats-server",
}

// deployUnits by a pattern in --units.
var deployUnits = []struct{ pattern, dir string }{
	{"*.service", "/usr/lib/systemd/system"},
	{"*.target", "/usr/lib/systemd/system"},
	{"*.timer", "/usr/lib/systemd/system"},
	{"sysusers.d/*.conf", "/usr/lib/sysusers.d"},
	{"tmpfiles.d/*.conf", "/usr/lib/tmpfiles.d"},
	{"dropins/*.conf", "/usr/share/unibus/dropins"},
}

// deployCommon is what is the same on every node: programs and units. arch is
// what they were built for, as uname -m spells it.
func deployCommon(bin, units string) (files []deployFile, arch string, err error) {
	if bin == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, "", fmt.Errorf("find the programs: %w", err)
		}
		bin = filepath.Dir(self)
	}
	for name, target := range deployPrograms {
		f, err := readDeployed(filepath.Join(bin, name), target, 0o755)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, "", bus.E(bus.NotFound, "%s is missing", filepath.Join(bin, name)).WithHint("make build, or --bin DIR")
		}
		if err != nil {
			return nil, "", err
		}
		machine, err := machineOf(f.data)
		switch {
		case err != nil:
			return nil, "", bus.E(bus.Invalid, "%s: %w", filepath.Join(bin, name), err).WithHint("build it with GOOS=linux")
		case arch != "" && machine != arch:
			return nil, "", bus.E(bus.Invalid, "the programs in %s are for different machines (%s, %s)", bin, arch, machine).WithHint("make build")
		}
		arch = machine
		files = append(files, f)
	}
	for _, u := range deployUnits {
		names, err := filepath.Glob(filepath.Join(units, u.pattern))
		if err != nil {
			return nil, "", fmt.Errorf("find the units: %w", err)
		}
		if len(names) == 0 {
			return nil, "", bus.E(bus.NotFound, "there is no %s", filepath.Join(units, u.pattern)).WithHint("--units DIR: deploy/systemd of the repository")
		}
		for _, name := range names {
			f, err := readDeployed(name, path.Join(u.dir, filepath.Base(name)), 0o644)
			if err != nil {
				return nil, "", err
			}
			files = append(files, f)
		}
	}
	return files, arch, nil
}

func readDeployed(name, target string, mode fs.FileMode) (deployFile, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return deployFile{}, fmt.Errorf("read what is to be deployed: %w", err)
	}
	return deployFile{path: target, mode: mode, owner: "root:root", data: data}, nil
}

// machineOf is the machine that a program runs on, as uname -m spells it. A
// program for another one would be found out at the restart, too late.
func machineOf(program []byte) (string, error) {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return "", errors.New("is no program for Linux")
	}
	switch f.Machine {
	case elf.EM_X86_64:
		return "x86_64", nil
	case elf.EM_AARCH64:
		return "aarch64", nil
	}
	return "", fmt.Errorf("is for a machine that unibus is not built for (%s)", f.Machine)
}

// deployment is one run over some nodes.
type deployment struct {
	app   *app
	inv   *inventory
	hosts []*deployHost
	work  string // private directory of this run, on this machine
	arch  string // of the programs
}

// newDeployment reads the inventory and picks the nodes.
func (a *app) newDeployment(c *cli.Context) (*deployment, error) {
	if _, err := positional(c); err != nil {
		return nil, err
	}
	inv, err := parseInventory(c.String("inventory"))
	if err != nil {
		return nil, err
	}
	only := c.StringSlice("node")
	for _, name := range only {
		if _, err := inv.node(name); err != nil {
			return nil, err
		}
	}
	d := &deployment{app: a, inv: inv}
	if err := d.reach(c.String("ssh-config"), only); err != nil {
		return nil, err
	}
	return d, nil
}

// reach says how the nodes are reached, all of them or those named.
func (d *deployment) reach(sshConfig string, only []string) error {
	seen := map[string]string{}
	for _, n := range d.inv.nodes {
		if n.ssh == "" {
			return bus.E(bus.Invalid, "%s:%d: %s: ssh=USER@HOST is missing", d.inv.path, n.line, n.name).WithHint("write how the node is reached by ssh")
		}
		if other := seen[n.ssh]; other != "" {
			return bus.E(bus.Invalid, "%s:%d: %s and %s are the same machine %s", d.inv.path, n.line, other, n.name, n.ssh).
				WithHint("the units hold one node for each machine")
		}
		seen[n.ssh] = n.name
		if len(only) == 0 || slices.Contains(only, n.name) {
			d.hosts = append(d.hosts, &deployHost{node: n, config: sshConfig})
		}
	}
	return nil
}

// deployStage is plan too: the same, without the last step.
func (a *app) deployStage(c *cli.Context, act bool) error {
	d, err := a.newDeployment(c)
	if err != nil {
		return err
	}
	if d.work, err = os.MkdirTemp("", "unibus-deploy-"); err != nil {
		return fmt.Errorf("make a working directory: %w", err)
	}
	defer os.RemoveAll(d.work) //nolint:errcheck // mode 0700; what stays behind is named by the system's own cleaning
	common, arch, err := deployCommon(c.String("bin"), c.String("units"))
	if err != nil {
		return err
	}
	d.arch = arch
	for _, h := range d.hosts {
		r := renderRequest{
			inventory: c.String("inventory"), secrets: c.String("secrets"), pki: c.String("pki"), node: h.node.name,
			out: filepath.Join(d.work, h.node.name, "etc"), etc: deployEtc, state: deployState,
		}
		if err := d.compose(c.Context, h, common, r, filepath.Join(c.String("bin"), "nats-server")); err != nil {
			return err
		}
	}
	if err := d.look(c.Context); err != nil {
		return err
	}
	if act {
		if err := d.stage(c.Context); err != nil {
			return err
		}
	}
	return d.printPlan(c.Context, act)
}

// compose makes all files of a node, and refuses a configuration that config
// check would: on the nodes it would stop the server at its next start.
func (d *deployment) compose(ctx context.Context, h *deployHost, common []deployFile, r renderRequest, server string) error {
	files, err := r.files()
	if err != nil {
		return err
	}
	if _, err := install(files, r.out, false); err != nil {
		return err
	}
	if _, err := os.Stat(server); err != nil {
		server = ""
	}
	l := &linter{dir: r.out, inv: d.inv, now: d.app.now(), getenv: d.app.getenv}
	l.check("")
	l.tryServer(ctx, server)
	for _, f := range l.findings {
		if f.Severity != severityWarning && !guard.Off(guard.DeployCheck) {
			return bus.E(bus.Invalid, "the configuration of %s would not work: %s", h.node.name, f).
				WithHint("correct it, then: unibusctl config render ... --node %s and config check", h.node.name)
		}
	}
	h.files = slices.Clone(common)
	for _, f := range files {
		h.files = append(h.files, etcFile(f))
	}
	for i, f := range h.files {
		sum := sha256.Sum256(f.data)
		h.files[i].sum = hex.EncodeToString(sum[:])
	}
	slices.SortFunc(h.files, func(x, y deployFile) int { return strings.Compare(x.path, y.path) })
	return nil
}

// look asks every node what it has, all of them before anything is done to one.
func (d *deployment) look(ctx context.Context) error {
	for _, h := range d.hosts {
		if err := h.probe(ctx); err != nil {
			return err
		}
	}
	return d.fit()
}

// fit refuses nodes that are not what the inventory says, or cannot take what
// is sent, by what look has learned.
func (d *deployment) fit() error {
	if guard.Off(guard.DeployLook) {
		return nil
	}
	machines := map[string]string{}
	for _, h := range d.hosts {
		switch other := machines[h.machine]; {
		case h.arch != d.arch:
			return bus.E(bus.Invalid, "%s is %s, and the programs are for %s", h.node.name, h.arch, d.arch).WithHint("build for it, and --bin DIR with --node %s", h.node.name)
		case len(h.missing) > 0:
			return bus.E(bus.Invalid, "%s has no %s", h.node.name, strings.Join(h.missing, ", ")).WithHint("ssh %s apt-get install rsync", h.node.ssh)
		case h.is != "" && h.is != h.node.name:
			return bus.E(bus.Conflict, "%s is node %s already, and %s:%d calls it %s: one store under two names would split the cluster", h.node.ssh, h.is, d.inv.path, h.node.line, h.node.name).
				WithHint("correct the rows of the inventory")
		case other != "" && h.machine != "unknown":
			return bus.E(bus.Conflict, "%s and %s are one machine (machine-id %s)", other, h.node.name, h.machine).
				WithHint("correct the inventory; a cloned system needs a machine-id of its own")
		}
		machines[h.machine] = h.node.name
		if err := h.fits(); err != nil {
			return err
		}
	}
	return nil
}

// stage sends to all nodes, then switches one after the other.
func (d *deployment) stage(ctx context.Context) error {
	id := d.app.now().UTC().Format("20060102T150405.000Z")
	for _, h := range d.hosts {
		if len(h.changes) == 0 {
			continue
		}
		d.app.say("%s: sending %d files", h.node.name, len(h.changes))
		if err := h.send(ctx, filepath.Join(d.work, h.node.name, "send")); err != nil {
			return err
		}
	}
	for _, h := range d.hosts {
		if len(h.changes) == 0 {
			if h.unfinished {
				if _, err := h.run(ctx, "settle"); err != nil {
					return err
				}
			}
			continue
		}
		lines, err := h.run(ctx, "place", id)
		if err != nil {
			return err
		}
		for _, l := range lines {
			if name, ok := strings.CutPrefix(l, "backup "); ok {
				h.backup = name
			}
		}
		d.app.say("%s: %d files in place, backup %s", h.node.name, len(h.changes), h.backup)
	}
	return nil
}

// deployedNode is a node in the JSON of plan, stage and rollback.
type deployedNode struct {
	Node    string         `json:"node"`
	SSH     string         `json:"ssh"`
	Changes []deployChange `json:"changes"`
	Restart []string       `json:"restart"` // units that run what was replaced, if they run
	Backup  string         `json:"backup"`
}

// deployChange is one file that differs.
type deployChange struct {
	Path string `json:"path"`
	What string `json:"what"` // create, replace, owner
	file deployFile
}

func (d *deployment) printPlan(ctx context.Context, done bool) error {
	nodes, total := []deployedNode{}, 0
	for _, h := range d.hosts {
		total += len(h.changes)
		nodes = append(nodes, deployedNode{Node: h.node.name, SSH: h.node.ssh, Changes: h.changes, Restart: h.restarts(), Backup: h.backup})
	}
	if d.app.set.json {
		return d.app.print(map[string]any{"done": done, "nodes": nodes}, func(table.Writer) {})
	}
	for i, h := range d.hosts {
		if len(h.changes) == 0 {
			fmt.Fprintf(d.app.out, "%s: nothing differs\n", h.node.name)
			continue
		}
		if !done {
			if err := d.printDiff(ctx, h); err != nil {
				return err
			}
		}
		for _, unit := range nodes[i].Restart {
			d.app.say("%s: %s runs with the new files after its next restart", h.node.name, unit)
		}
	}
	switch {
	case total == 0:
	case done:
		d.app.say("Next: unibusctl deploy start --inventory %s --yes; what runs already: restart one node at a time, cluster wait between", d.inv.path)
	default:
		d.app.say("Nothing was changed. Next: unibusctl deploy stage ... --yes")
	}
	return nil
}

// printDiff shows each file that differs; text as `diff -u` does.
func (d *deployment) printDiff(ctx context.Context, h *deployHost) error {
	var wanted []string
	for _, c := range h.changes {
		if c.What == "replace" && c.file.text() {
			wanted = append(wanted, c.Path)
		}
	}
	now, err := h.contents(ctx, wanted)
	if err != nil {
		return err
	}
	for _, c := range h.changes {
		note := ""
		if c.file.secret {
			note = ", secret"
		}
		fmt.Fprintf(d.app.out, "%s: %s %s (%04o %s%s)\n", h.node.name, c.What, c.Path, c.file.mode, c.file.owner, note)
		old, ok := now[c.Path]
		if !ok || bytes.ContainsRune(old, 0) {
			continue
		}
		out, err := d.diff(ctx, h.node.name, c.file, old)
		if err != nil {
			return err
		}
		fmt.Fprint(d.app.out, printable(strings.ReplaceAll(out, "\t", "    ")))
	}
	return nil
}

// diff uses the machine's own diff; without one the names have to do.
func (d *deployment) diff(ctx context.Context, node string, f deployFile, old []byte) (string, error) {
	program, err := exec.LookPath("diff")
	if err != nil {
		return "", nil //nolint:nilerr // a plan without the text of the changes is one still
	}
	a, b := filepath.Join(d.work, "old"), filepath.Join(d.work, "new")
	if err := errors.Join(os.WriteFile(a, old, 0o600), os.WriteFile(b, f.data, 0o600)); err != nil {
		return "", fmt.Errorf("compare: %w", err)
	}
	out, err := exec.CommandContext(ctx, program, "-u", "--label", node+":"+f.path, "--label", "new", a, b).Output()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		return "", fmt.Errorf("compare with diff: %w", err)
	}
	return string(out), nil
}

func (a *app) deployStart(c *cli.Context) error {
	d, err := a.newDeployment(c)
	if err != nil {
		return err
	}
	if !a.set.yes {
		for _, h := range d.hosts {
			a.say("%s: would start unibus.target, and enable it for every boot", h.node.name)
		}
		a.say("Nothing was changed. Next: the same with --yes")
		return nil
	}
	return d.report(c.Context, "start")
}

func (a *app) deployStatus(c *cli.Context) error {
	d, err := a.newDeployment(c)
	if err != nil {
		return err
	}
	return d.report(c.Context, "report")
}

// deployedUnit is a unit in the JSON of start and status.
type deployedUnit struct {
	Node     string `json:"node"`
	Unit     string `json:"unit"`
	State    string `json:"state"`    // of systemd: active, failed, ...; "unreachable"
	Stale    string `json:"stale"`    // program or environment was replaced since it started; else ""
	Restarts string `json:"restarts"` // by systemd itself
	Status   string `json:"status"`   // what it waits for, or why it is not known
}

// report runs verb on each node and shows the units. A node that does not answer
// is a line, and the others are asked all the same; only a start ends there, for
// whoever starts wants to know before the next node.
func (d *deployment) report(ctx context.Context, verb string) error {
	units, bad := []deployedUnit{}, ""
	for _, h := range d.hosts {
		lines, err := h.run(ctx, verb)
		if err != nil {
			if verb == "start" {
				return err
			}
			units = append(units, deployedUnit{Node: h.node.name, Unit: "-", State: "unreachable", Status: oneLine(err.Error())})
			bad = h.node.name
			continue
		}
		for _, l := range lines {
			if id, ok := strings.CutPrefix(l, "unfinished "); ok {
				d.app.say("WARNING: %s: stage %s was interrupted: stage again, or roll back", h.node.name, id)
			}
			rest, ok := strings.CutPrefix(l, "unit ")
			f := strings.SplitN(rest, " ", 5)
			if !ok || len(f) < 4 {
				continue
			}
			u := deployedUnit{Node: h.node.name, Unit: "unibus-" + f[0], State: f[1], Restarts: f[3], Status: strings.Join(f[4:], "")}
			if f[2] != "no" {
				u.Stale = f[2]
			}
			if u.State != "active" {
				bad = h.node.name
			}
			units = append(units, u)
		}
	}
	err := d.app.print(map[string]any{"units": units}, func(t table.Writer) {
		t.AppendHeader(table.Row{"node", "unit", "state", "restarts", "replaced since", "status"})
		for _, u := range units {
			t.AppendRow(table.Row{u.Node, u.Unit, u.State, u.Restarts, u.Stale, u.Status})
		}
	})
	if err == nil && bad != "" {
		return bus.E(bus.Unavailable, "not every unit of %s runs", bad).WithHint("on the node: journalctl -u 'unibus-*'")
	}
	return err
}

func (a *app) deployRollback(c *cli.Context) error {
	d, err := a.newDeployment(c)
	if err != nil {
		return err
	}
	to := c.String("to")
	if to != "" && !backupPattern.MatchString(to) {
		return usagef("%s is no id of a backup", quote(to))
	}
	words := map[string]string{"kept": "restore", "absent": "remove"}
	nodes := []deployedNode{}
	for _, h := range d.hosts { // all, before anything is done to one
		lines, err := h.run(c.Context, "entries", to)
		if err != nil {
			return err
		}
		h.is = h.node.name
		for _, l := range lines {
			what, name, _ := strings.Cut(l, " ")
			if what == "backup" {
				h.backup = name
			} else if words[what] != "" {
				h.changes = append(h.changes, deployChange{Path: name, What: words[what]})
			}
		}
		nodes = append(nodes, deployedNode{Node: h.node.name, SSH: h.node.ssh, Changes: h.changes, Restart: h.restarts(), Backup: h.backup})
	}
	if a.set.yes {
		id := a.now().UTC().Format("20060102T150405.000Z")
		for _, h := range d.hosts {
			if _, err := h.run(c.Context, "back", h.backup, id); err != nil {
				return err
			}
			a.say("%s: %d files as they were before %s", h.node.name, len(h.changes), h.backup)
		}
	}
	if a.set.json {
		return a.print(map[string]any{"done": a.set.yes, "nodes": nodes}, func(table.Writer) {})
	}
	if a.set.yes {
		return nil
	}
	for _, n := range nodes {
		for _, change := range n.Changes {
			fmt.Fprintf(a.out, "%s: %s %s\n", n.Node, change.What, change.Path)
		}
	}
	a.say("Nothing was changed. Next: the same with --yes")
	return nil
}
