package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// gateWithin outlasts a restarted node: its server catches up, a leader is
// elected, the services prove their state.
const gateWithin = 120 * time.Second

func (a *app) clusterGateCommand() *cli.Command {
	return &cli.Command{
		Name: "gate", Usage: "wait until one more node may go down",
		Description: "Open when every node may serve, every stream has three current replicas and takes a write, and doctor\n" +
			"finds nothing broken. Ends with 0 when open, with 3 and the reason when --timeout (120s) passes first.\n\n" +
			"   unibusctl cluster gate --inventory nodes.env",
		Flags: gateFlags(),
		Action: func(c *cli.Context) error {
			if _, err := positional(c); err != nil {
				return err
			}
			g, err := a.newGate(c)
			if err != nil {
				return err
			}
			started := a.now()
			if err := g.wait(c.Context, ""); err != nil {
				return err
			}
			took := a.now().Sub(started)
			if a.set.json {
				return a.print(map[string]any{"open": true, "nodes": len(g.inv.nodes), "elapsed_ms": took.Milliseconds()}, nil)
			}
			fmt.Fprintf(a.out, "open: all of %d nodes serve, every stream is current and takes writes, doctor finds nothing broken\n", len(g.inv.nodes))
			return nil
		},
	}
}

func gateFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "inventory", Required: true, TakesFile: true, Usage: "nodes.env"},
		&cli.StringFlag{Name: "sys-seed", TakesFile: true, EnvVars: []string{"UNIBUS_SYS_SEED"}, Usage: "`FILE` of the sys nkey: also ask every server about itself"},
	}
}

// gate says whether one more node may go down.
type gate struct {
	app     *app
	inv     *inventory
	request doctorRequest
}

// newGate points the whole command at the nodes of the inventory: a gate that
// asked other nodes than those that are restarted would prove nothing.
func (a *app) newGate(c *cli.Context) (*gate, error) {
	if a.set.opsSeed == "" {
		return nil, &usageError{msg: "the gate writes to every stream and needs the ops seed: set --ops-seed FILE or UNIBUS_OPS_SEED", hint: "unibusctl env"}
	}
	inv, err := parseInventory(c.String("inventory"))
	if err != nil {
		return nil, err
	}
	var apis, servers []string
	for _, n := range inv.nodes {
		apis = append(apis, "https://"+net.JoinHostPort(n.public, strconv.Itoa(n.ports.api)))
		servers = append(servers, "tls://"+net.JoinHostPort(n.public, strconv.Itoa(n.ports.nats)))
	}
	a.set.direct, a.set.apiURL, a.set.natsURL = true, strings.Join(apis, ","), strings.Join(servers, ",")
	return &gate{app: a, inv: inv, request: doctorRequest{inventory: c.String("inventory"), sysSeed: c.String("sys-seed")}}, nil
}

// look asks once. why is empty when the gate is open. With spare, the node of
// that name may be down: it is the one that is about to be restarted.
func (g *gate) look(ctx context.Context, spare string) (why string, err error) {
	nodes, err := g.app.askHealth(ctx)
	if err != nil {
		return "", err
	}
	spared := false
	for i, n := range nodes {
		name := g.inv.nodes[i].name // askHealth keeps the order of the URLs
		switch {
		case n.Ready && n.Node != name:
			return fmt.Sprintf("at the address of %s answers %s", name, quote(n.Node)), nil
		case n.Ready:
		case name == spare:
			spared = true
		default:
			return fmt.Sprintf("%s may not serve: %s", name, n.Error), nil
		}
	}
	streams, err := g.app.askStreams(ctx)
	if err != nil {
		return "the streams do not answer: " + err.Error(), nil //nolint:nilerr // a closed gate, not a failed command
	}
	code, line := judge(nodes, streams, g.app.probeWrites(ctx))
	switch {
	case code == 0, spared && code == 1: // a warning: a node or a replica less, which is the spared one's
		return "", nil
	}
	return line, nil
}

// wait is until the gate is open: all questions answered well in one go, and
// doctor content as well. Doctor may have to look twice: a service that was
// killed keeps its lease for some seconds, and changes wait for it.
func (g *gate) wait(ctx context.Context, spare string) error {
	if guard.Off(guard.RolloutGate) {
		return nil
	}
	ctx, cancel := g.app.within(ctx, gateWithin)
	defer cancel()
	said := ""
	for {
		why, err := g.look(ctx, spare)
		if err != nil {
			return err
		}
		if why == "" {
			err = g.examine(ctx, spare)
			if err == nil {
				return nil
			}
			why = err.Error()
		}
		if why != said && ctx.Err() == nil {
			said = why
			g.app.say("gate: %s", why)
		}
		select {
		case <-ctx.Done():
			return bus.E(bus.Unavailable, "the gate stays closed: %s", said).WithHint("unibusctl doctor --inventory %s", g.request.inventory)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (g *gate) examine(ctx context.Context, spare string) error {
	v := &doctorVisit{app: g.app, doctorRequest: g.request, unasked: map[string]bool{}}
	if err := v.meet(); err != nil {
		return err
	}
	bound, cancel := context.WithTimeout(ctx, doctorWithin)
	defer cancel()
	v.examine(bound)
	for _, s := range v.found {
		if s.Status == severityOK || s.Status == severityWarning || (spare != "" && s.Node == spare) {
			continue
		}
		if spare != "" && s.Check == "callouts" {
			continue // misses the word of the node that is down
		}
		return bus.E(bus.Unavailable, "doctor: %s %s: %s", s.Node, s.Check, s.Found)
	}
	return nil
}

func (a *app) clusterRolloutCommand() *cli.Command {
	flags := append(gateFlags(),
		&cli.StringFlag{Name: "ssh-config", TakesFile: true, Usage: "`FILE` for ssh -F"},
		&cli.StringFlag{Name: "from", Usage: "go on with this `NODE`; those before it are done"})
	verb := func(name, usage, description string) *cli.Command {
		return &cli.Command{
			Name: name, Usage: usage, Description: description + "\n\n   unibusctl cluster rollout " + name + " --inventory nodes.env --sys-seed secrets/sys.nk --yes",
			Flags:  flags,
			Action: func(c *cli.Context) error { return a.clusterRollout(c, name) },
		}
	}
	return &cli.Command{
		Name: "rollout", Usage: "restart, upgrade or reload all nodes, one at a time behind the gate",
		Description: "In the order of the inventory. Before each node the gate must be open for all others, after it for all:\n" +
			"the first that stays closed ends the rollout before the next node is touched. Shows what it would do until\n" +
			"it is told --yes. A node is reached over your own ssh, as by deploy.\n\n" +
			"   unibusctl cluster rollout upgrade --inventory nodes.env --sys-seed secrets/sys.nk --yes",
		Subcommands: []*cli.Command{
			verb("restart", "restart every unit of every node", "Ended half-way, it goes on with --from NODE, which it names."),
			verb("upgrade", "restart what does not run what deploy stage put in place",
				"A unit whose program, environment or server configuration was replaced since it started. What is current\n"+
					"is left alone, so the same line goes on where it ended. It needs --sys-seed."),
			verb("reload", "have every nats-server load its configuration and certificates, and prove that it did",
				"Every reload disconnects the users of that server; they come back. A configuration that runs already is not\n"+
					"loaded again. It needs --sys-seed: a reload that is refused looks like one that worked."),
		},
	}
}

// rolledNode is a node in the JSON of a rollout.
type rolledNode struct {
	Node      string   `json:"node"`
	Units     []string `json:"units"` // restarted or reloaded, or to be
	Done      bool     `json:"done"`
	ElapsedMS int64    `json:"elapsed_ms"` // with the gate behind it
}

func (a *app) clusterRollout(c *cli.Context, verb string) error {
	g, err := a.newGate(c)
	if err != nil {
		return err
	}
	if verb != "restart" && g.request.sysSeed == "" {
		return &usageError{msg: "only the sys key learns what a server runs: set --sys-seed FILE or UNIBUS_SYS_SEED", hint: "unibusctl env"}
	}
	d, err := a.newDeployment(c)
	if err != nil {
		return err
	}
	from := c.String("from")
	if from != "" {
		if _, err := g.inv.node(from); err != nil {
			return err
		}
		d.hosts = d.hosts[slices.IndexFunc(d.hosts, func(h *deployHost) bool { return h.node.name == from }):]
	}
	rolled := make([]rolledNode, len(d.hosts))
	for i, h := range d.hosts { // all, before anything is done to one
		rolled[i].Node = h.node.name
		if rolled[i].Units, err = g.due(c.Context, h, verb); err != nil {
			return err
		}
	}
	if a.set.yes {
		err := oneByOne(rolled, func(i int) error {
			started := a.now()
			if err := g.roll(c.Context, d.hosts[i], verb, rolled[i].Units); err != nil {
				return stoppedAt(err, rolled[i].Node, verb, g.request.inventory)
			}
			rolled[i].ElapsedMS = a.now().Sub(started).Milliseconds()
			a.say("%s: done, the gate is open again after %d ms", rolled[i].Node, rolled[i].ElapsedMS)
			return nil
		})
		if err != nil {
			return err
		}
	}
	if !a.set.yes {
		a.say("Nothing was changed. Next: the same with --yes")
	}
	return a.print(map[string]any{"verb": verb, "nodes": rolled}, func(t table.Writer) {
		t.AppendHeader(table.Row{"node", verb, "done", "seconds"})
		for _, r := range rolled {
			units := strings.Join(r.Units, " ")
			if units == "" {
				units = "nothing: it is current"
			}
			t.AppendRow(table.Row{r.Node, units, r.Done, r.ElapsedMS / 1000})
		}
	})
}

// oneByOne does the nodes that have something due, in order. The first that
// fails ends it: the next one would be the second that is away.
func oneByOne(rolled []rolledNode, do func(i int) error) error {
	for i := range rolled {
		if len(rolled[i].Units) == 0 {
			continue
		}
		if err := do(i); err != nil {
			if guard.Off(guard.RolloutStop) {
				continue
			}
			return err
		}
		rolled[i].Done = true
	}
	return nil
}

// stoppedAt keeps the code and the reason, and says how to go on.
func stoppedAt(err error, node, verb, inventory string) error {
	return bus.E(bus.CodeOf(err), "the rollout stopped at %s, and no node after it was touched: %w", node, err).
		WithHint("mend %s, then: unibusctl cluster rollout %s --inventory %s --from %s --yes", node, verb, inventory, node)
}

// due lists the units of a node that verb concerns; systemd orders them.
func (g *gate) due(ctx context.Context, h *deployHost, verb string) ([]string, error) {
	if verb == "restart" {
		lines, err := h.run(ctx, "report")
		if err != nil {
			return nil, err
		}
		return unitsIn(lines, func([]string) bool { return true }), nil
	}
	lines, err := h.run(ctx, "digest")
	if err != nil {
		return nil, err
	}
	runs, err := g.runningConfig(ctx, h.node)
	switch {
	case err != nil && verb == "reload":
		return nil, err
	case verb == "reload" && runs != configOnDisk(lines):
		return []string{"unibus-nats"}, nil
	}
	current := err == nil && runs == configOnDisk(lines)
	// New certificates do not change the digest: they are compared with what the
	// ports show. A restart for them alone would cost more than they need.
	why, unseen := g.certificatesDue(ctx, h)
	switch {
	case verb == "reload" && unseen != nil:
		return nil, unseen
	case verb == "reload" && why == "":
		return []string{}, nil
	case verb == "reload":
		g.app.say("%s: its server %s", h.node.name, why)
		return []string{"unibus-nats"}, nil
	case why != "" && current:
		g.app.say("%s: its server %s: unibusctl cluster rollout reload has it take them over without a restart", h.node.name, why)
	}
	if lines, err = h.run(ctx, "report"); err != nil {
		return nil, err
	}
	return unitsIn(lines, func(f []string) bool {
		return f[2] != "no" || f[1] != "active" || (f[0] == "nats" && !current)
	}), nil
}

// certificatesDue says in what the certificates and authorities of a running
// server differ from the node's disk: "" if in nothing.
func (g *gate) certificatesDue(ctx context.Context, h *deployHost) (string, error) {
	s := &nodeSight{node: h.node.name, trust: map[caRole][]*x509.Certificate{}, disk: map[leafRole]*x509.Certificate{}}
	if err := s.readDisk(ctx, &pkiHost{node: h.node, ssh: h}); err != nil {
		return "", err
	}
	if err := (&pkiNodes{app: g.app, inv: g.inv}).lookAtPorts(ctx, h.node, s); err != nil {
		return "", err
	}
	return s.serverBehind(), nil
}

// unitsIn picks units from the lines of report: name, state, what was replaced.
func unitsIn(lines []string, wanted func(fields []string) bool) []string {
	out := []string{}
	for _, l := range lines {
		if f := strings.Fields(l); len(f) >= 5 && f[0] == "unit" && wanted(f[1:]) {
			out = append(out, "unibus-"+f[1])
		}
	}
	return out
}

func configOnDisk(lines []string) string {
	for _, l := range lines {
		if digest, ok := strings.CutPrefix(l, "config "); ok {
			return digest
		}
	}
	return ""
}

// runningConfig is the digest of the configuration that a server has loaded, as
// it says itself.
func (g *gate) runningConfig(ctx context.Context, n node) (string, error) {
	z, err := g.varz(ctx, n)
	return digestForm.FindString(z.Digest), err
}

// varz is what the server of a node says of itself.
func (g *gate) varz(ctx context.Context, n node) (varz, error) {
	ctx, cancel := context.WithTimeout(ctx, questionWithin)
	defer cancel()
	v := &doctorVisit{app: g.app, doctorRequest: g.request, unasked: map[string]bool{}}
	p := &patient{name: n.name, natsURL: "tls://" + net.JoinHostPort(n.public, strconv.Itoa(n.ports.nats)), known: &n}
	v.greet(ctx, p)
	z, _, err := v.askVarz(ctx, p)
	if err != nil {
		return z, bus.E(bus.Unavailable, "the server of %s does not tell what it runs: %w", n.name, err).WithHint("unibusctl deploy status --node %s ...", n.name)
	}
	return z, nil
}

// roll does one node: the gate without it, the act, the gate with it.
func (g *gate) roll(ctx context.Context, h *deployHost, verb string, units []string) error {
	if err := g.wait(ctx, h.node.name); err != nil {
		return err
	}
	g.app.say("%s: %s %s", h.node.name, verb, strings.Join(units, " "))
	words := append([]string{"restart"}, units...)
	if verb == "reload" {
		words = []string{"reload"}
	}
	lines, err := h.run(ctx, words...)
	if err != nil {
		return err
	}
	for _, l := range lines {
		if f := strings.Fields(l); len(f) >= 3 && f[0] == "unit" && f[2] != "active" {
			return bus.E(bus.Unavailable, "%s: unibus-%s is %s after the restart", h.node.name, f[1], f[2]).WithHint("on %s: journalctl -u unibus-%s", h.node.name, f[1])
		}
	}
	if err := g.wait(ctx, ""); err != nil {
		return err
	}
	if g.request.sysSeed == "" || !slices.Contains(units, "unibus-nats") {
		return nil
	}
	runs, err := g.runningConfig(ctx, h.node)
	if err == nil && runs != configOnDisk(lines) {
		err = bus.E(bus.Conflict, "the server of %s goes on with its old configuration: it refused the new one", h.node.name).
			WithHint("on %s: journalctl -u unibus-nats; what cannot be reloaded needs cluster rollout upgrade", h.node.name)
	}
	if err != nil {
		return err
	}
	why, err := g.certificatesDue(ctx, h)
	if err == nil && why != "" {
		err = bus.E(bus.Conflict, "the server of %s %s after the %s", h.node.name, why, verb).WithHint("on %s: journalctl -u unibus-nats", h.node.name)
	}
	return err
}
