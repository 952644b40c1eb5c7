package main

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

const (
	doctorWithin   = 15 * time.Second // the whole examination
	questionWithin = 3 * time.Second  // one question to one listener
)

func (a *app) doctorCommand() *cli.Command {
	return &cli.Command{
		Name:     "doctor",
		Category: "cluster",
		Usage:    "prove on every node, while it runs, that unibus keeps its promises",
		Description: "Needs --ops-seed and --ca. It uses two probe users and a probe room of its own, made once; their access\n" +
			"ends by itself a minute after each run. Ends with 0 all well, 1 warnings, 2 something is broken,\n" +
			"3 something could not be asked.\n\n" +
			"   unibusctl doctor --inventory nodes.env --sys-seed sys.nk\n" +
			"   unibusctl doctor --inventory nodes.env --node n1 --etc /etc/unibus --json",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "inventory", TakesFile: true, Usage: "`nodes.env`: also ask route ports, certificates of routes and monitors"},
			&cli.StringFlag{Name: "sys-seed", TakesFile: true, EnvVars: []string{"UNIBUS_SYS_SEED"}, Usage: "`FILE`: ask every server about itself, also from afar"},
			&cli.StringFlag{Name: "node", Usage: "with --etc: the `NODE` it belongs to"},
			&cli.StringFlag{Name: "etc", Usage: "compare a node's configuration in `DIR` with what its server runs"},
			&cli.StringFlag{Name: "nats-server", Usage: "`BINARY` that reads it; default: beside unibusctl, or on PATH"},
		},
		Action: func(c *cli.Context) error {
			if _, err := positional(c); err != nil {
				return err
			}
			return a.doctor(c.Context, doctorRequest{
				inventory: c.String("inventory"), sysSeed: c.String("sys-seed"), node: c.String("node"), etc: c.String("etc"), server: c.String("nats-server"),
			})
		},
	}
}

type doctorRequest struct{ inventory, sysSeed, node, etc, server string }

// symptom is one check: what was tested where, what was found, and which
// promise that proves or breaks.
type symptom struct {
	Status severity `json:"status"`
	Node   string   `json:"node"` // "cluster" for what concerns all
	Check  string   `json:"check"`
	Found  string   `json:"found"`
	Proves string   `json:"proves"`
	Next   string   `json:"next"` // the next command; empty when all is well
}

// promises says what each check proves. A check that is not listed here cannot
// be reported.
func promises() map[string]string {
	return map[string]string{
		"nats.tls":         "clients reach the server, and it is ours",
		"nats.version":     "nobody walks around the callout by a known hole",
		"deny.anonymous":   "who shows no key gets nothing",
		"deny.unknown":     "who is not registered gets nothing, and hears it at once",
		"deny.revoked":     "who is revoked gets nothing",
		"allow.roomless":   "who is in no room has an inbox and notices, nothing more",
		"allow.room":       "a member reaches the room: the callout is in the path and the users bucket is what it asks",
		"deny.beyond":      "a member reaches nothing but the room",
		"room.across":      "a message reaches members on every node",
		"route.tls":        "nobody joins the cluster without its authority's certificate",
		"cert.client":      "clients go on trusting the server",
		"cert.api":         "clients and load balancers go on trusting the API",
		"cert.route":       "nodes go on trusting each other",
		"membership":       "the node may serve the API",
		"clock":            "signatures, leases and expiries mean the same everywhere",
		"monitor.loopback": "nobody outside reads the monitor and the admin listeners",
		"listeners":        "there is no door beside the callout",
		"durability":       "what was acknowledged survives a power cut",
		"config":           "what runs is what is on disk",
		"callout":          "the node decides about connects, on a proven state",
		"callouts":         "a change of access is applied everywhere before it is reported done",
		"store":            "there is a quorum, and the state can be proven current",
		"bucket":           "the state survives the loss of a node",
		"write":            "a revoke commits",
		"records":          "every record means what somebody wrote",
		"probe":            "the probes tell of this cluster as it is",
	}
}

// doctorVisit is one run. Its methods may be called from any goroutine.
type doctorVisit struct {
	*app
	doctorRequest
	inv     *inventory // nil without --inventory
	nodes   []*patient
	mu      sync.Mutex
	found   []symptom
	unasked map[string]bool
}

// patient is one node, as far as the addresses are known.
type patient struct {
	name, natsURL, apiURL string
	known                 *node      // in the inventory
	info                  serverInfo // zero while it has not answered
}

func (v *doctorVisit) add(s severity, node, check, next, format string, args ...any) {
	if s == severityOK {
		next = ""
	}
	kind, _, _ := strings.Cut(check, " ") // "bucket KV_UNIBUS_users"
	v.mu.Lock()
	defer v.mu.Unlock()
	v.found = append(v.found, symptom{s, node, check, oneLine(fmt.Sprintf(format, args...)), promises()[kind], next})
}

// test adds an OK, or a failure for the reason why.
func (v *doctorVisit) test(node, check, next, ok, why string) {
	if why != "" {
		v.add(severityCritical, node, check, next, "%s", why)
		return
	}
	v.add(severityOK, node, check, "", "%s", ok)
}

// skip notes what nobody gave us the means to ask.
func (v *doctorVisit) skip(what string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.unasked[what] = true
}

func (a *app) doctor(ctx context.Context, r doctorRequest) error {
	started := a.now()
	v := &doctorVisit{app: a, doctorRequest: r, unasked: map[string]bool{}}
	a.set.direct = true // hints and the store are those of the ops seed
	if a.set.opsSeed == "" {
		return &usageError{msg: "doctor needs the ops seed: set --ops-seed FILE or UNIBUS_OPS_SEED", hint: "unibusctl env"}
	}
	if a.set.ca == "" {
		return &usageError{msg: "the CA is not known: set --ca FILE or UNIBUS_CA", hint: "unibusctl env"}
	}
	if (r.etc == "") != (r.node == "") {
		return usagef("--etc and --node belong together: which node's configuration is it?")
	}
	if _, err := kv.Trust(a.set.ca); err != nil {
		return &checkResult{code: 3, line: "DOCTOR UNKNOWN - " + err.Error()}
	}
	if err := v.meet(); err != nil {
		return err
	}
	ctx, cancel := a.within(ctx, doctorWithin)
	defer cancel()
	v.examine(ctx)
	return v.finish(a.now().Sub(started))
}

// meet lists the nodes: those of the inventory, else those of the URLs.
func (v *doctorVisit) meet() (err error) {
	if v.inventory != "" {
		if v.inv, err = parseInventory(v.inventory); err != nil {
			return err
		}
		for _, n := range v.inv.nodes {
			at := func(port int) string { return net.JoinHostPort(n.public, strconv.Itoa(port)) }
			v.nodes = append(v.nodes, &patient{name: n.name, natsURL: "tls://" + at(n.ports.nats), apiURL: "https://" + at(n.ports.api), known: &n})
		}
	} else {
		v.skip("route ports, admin listeners and monitors: give --inventory")
		apis := strings.Split(v.set.apiURL, ",")
		for i, u := range strings.Split(v.set.natsURL, ",") {
			p := &patient{name: strings.TrimPrefix(strings.TrimSpace(u), "tls://"), natsURL: strings.TrimSpace(u)}
			if i < len(apis) {
				p.apiURL = strings.TrimRight(strings.TrimSpace(apis[i]), "/")
			}
			v.nodes = append(v.nodes, p)
		}
	}
	if v.node != "" && !slices.ContainsFunc(v.nodes, func(p *patient) bool { return p.name == v.node }) && v.inv != nil {
		return usagef("there is no node %s in %s", quote(v.node), v.inventory)
	}
	return nil
}

// examine asks everything that needs no probe user at once, makes the probes
// meanwhile, and sends them to every node.
func (v *doctorVisit) examine(ctx context.Context) {
	v.each(func(p *patient) { v.greet(ctx, p) })
	var work sync.WaitGroup
	for _, p := range v.nodes {
		work.Go(func() { v.inspect(ctx, p) })
	}
	work.Go(func() { v.streams(ctx) })
	probes, holders := v.prepare(ctx)
	if probes != nil {
		v.callouts(holders)
		v.send(ctx, probes)
	}
	work.Wait()
}

func (v *doctorVisit) each(do func(p *patient)) {
	var work sync.WaitGroup
	for _, p := range v.nodes {
		work.Go(func() { do(p) })
	}
	work.Wait()
}

// streams asks every stream, and writes to it: a report is no evidence.
func (v *doctorVisit) streams(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, questionWithin)
	defer cancel()
	nc, err := v.dialFirst(ctx, v.set.opsSeed, "_INBOX_ops")
	if err != nil {
		v.add(severityCritical, "cluster", "store", "unibusctl cluster status", "no server takes the ops seed: %v", err)
		return
	}
	defer nc.Close()
	var failed map[string]error
	var work sync.WaitGroup
	work.Go(func() { failed = kv.Probe(ctx, nc) })
	reports := v.settled(ctx, nc)
	work.Wait()
	for _, h := range reports {
		v.bucket(h)
		next := "unibusctl cluster status --direct"
		why := ""
		if err := failed[h.Stream]; err != nil {
			why = "takes no write: " + err.Error()
		}
		v.test("cluster", "write "+h.Stream, next, "a record was stored by a quorum", why)
	}
}

// settled asks again while a follower is behind: a busy stream has one that is
// a record behind at any one moment, a broken one has it all the time.
func (v *doctorVisit) settled(ctx context.Context, nc *nats.Conn) []kv.StreamHealth {
	reports := kv.Health(ctx, nc)
	again := time.NewTicker(250 * time.Millisecond)
	defer again.Stop()
	for tries := 0; tries < 6 && slices.ContainsFunc(reports, func(h kv.StreamHealth) bool { return h.Err == nil && h.FollowersCurrent < kv.Replicas-1 }); tries++ {
		select {
		case <-ctx.Done():
			return reports
		case <-again.C:
		}
		for i, now := range kv.Health(ctx, nc) {
			if reports[i].FollowersCurrent < kv.Replicas-1 && now.Err == nil {
				reports[i] = now
			}
		}
	}
	return reports
}

func (v *doctorVisit) bucket(h kv.StreamHealth) {
	check, next := "bucket "+h.Stream, "nats --context unibus-ops stream info "+h.Stream
	said := fmt.Sprintf("R%d, leader %s, followers current %d/%d", h.Replicas, h.Leader, h.FollowersCurrent, kv.Replicas-1)
	switch {
	case h.Err != nil:
		if e := bus.CodeOf(h.Err); e == bus.Conflict && h.Replicas != kv.Replicas {
			next = fmt.Sprintf("nats --context unibus-ops stream edit %s --replicas %d", h.Stream, kv.Replicas)
		}
		v.add(severityCritical, "cluster", check, next, "%v", h.Err)
	case h.Leader == "":
		v.add(severityCritical, "cluster", check, next, "no leader: %s", said)
	case h.FollowersCurrent < kv.Replicas-1:
		v.add(severityWarning, "cluster", check, next, "%s", said)
	default:
		v.add(severityOK, "cluster", check, "", "%s, defined as it must be", said)
	}
}

// finish prints what was found, the worst of all in the last line.
func (v *doctorVisit) finish(took time.Duration) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	slices.SortStableFunc(v.found, func(x, y symptom) int {
		return cmp.Or(cmp.Compare(x.Node, y.Node), cmp.Compare(x.Check, y.Check))
	})
	worst, bad := severityOK, []string{}
	for _, s := range v.found {
		worst = worst.worse(s.Status)
		if s.Status != severityOK {
			bad = append(bad, s.Node+" "+s.Check)
		}
	}
	unasked := []string{}
	for what := range v.unasked {
		unasked = append(unasked, what)
	}
	slices.Sort(unasked)
	if v.set.json {
		out := map[string]any{"status": worst, "code": int(worst), "elapsed_ms": took.Milliseconds(), "checks": v.found, "unasked": unasked}
		if err := v.print(out, nil); err != nil {
			return err
		}
	} else {
		v.lines(unasked)
	}
	line := fmt.Sprintf("DOCTOR OK - %d checks on %d nodes in %s", len(v.found), len(v.nodes), took.Round(100*time.Millisecond))
	if worst != severityOK {
		line = fmt.Sprintf("DOCTOR %s - %d of %d checks: %s", strings.ToUpper(worst.String()), len(bad), len(v.found), strings.Join(bad, ", "))
	}
	return &checkResult{code: int(worst), line: line}
}

func (v *doctorVisit) lines(unasked []string) {
	words := map[severity]string{severityOK: "OK", severityWarning: "WARN", severityCritical: "FAIL", severityUnknown: "UNKNOWN"}
	for _, s := range v.found {
		line := fmt.Sprintf("%-7s %-8s %-17s %s (%s)", words[s.Status], s.Node, s.Check, s.Found, s.Proves)
		if s.Next != "" {
			line += "; next: " + s.Next
		}
		fmt.Fprintln(v.out, oneLine(line))
	}
	for _, what := range unasked {
		v.say("not asked: %s", what)
	}
}

// hostOf is host:port of a URL.
func hostOf(raw string) string {
	if u, err := url.Parse(raw); err == nil && u.Host != "" {
		return u.Host
	}
	return raw
}

// natsOptions are those of every connection of the doctor: one try, one server.
func (v *doctorVisit) natsOptions(more ...nats.Option) []nats.Option {
	trust, _ := kv.Trust(v.set.ca) // read successfully before
	return append([]nats.Option{
		nats.Secure(trust), nats.NoReconnect(), nats.Timeout(questionWithin), nats.Name("unibus doctor"), nats.IgnoreDiscoveredServers(),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
	}, more...)
}
