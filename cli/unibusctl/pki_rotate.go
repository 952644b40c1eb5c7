package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

func (a *app) pkiRenewCommand() *cli.Command {
	return &cli.Command{
		Name: "renew", Usage: "give the nodes new certificates while they run",
		Description: "Those that end within 30 days or are not what they should be, with --all every one. Nodes take them\n" +
			"over one after the other, without a restart: nats-server by a reload, which cuts off that server's users\n" +
			"for a moment, the API by itself. A certificate is put nowhere before every node trusts who signed it.\n" +
			"Shows what it would do until it is told --yes; interrupted, the same line goes on.\n\n" +
			"   unibusctl pki renew --dir pki --inventory nodes.env --sys-seed secrets/sys.nk --yes",
		Flags: append(nodesFlags(a),
			&cli.StringSliceFlag{Name: "node", Usage: "new certificates for `NODE` only (repeat); what differs goes to all"},
			&cli.BoolFlag{Name: "all", Usage: "also those that are good for longer"}),
		Action: a.pkiRenew,
	}
}

func (a *app) pkiRotateCommand() *cli.Command {
	return &cli.Command{
		Name: "rotate-ca", Usage: "replace an authority in three stages, while everything runs",
		Description: "trust   a new authority is made, and every node trusts it beside the old one\n" +
			"issue   every node gets certificates of the new one\n" +
			"retire  the old one is trusted no more\n\n" +
			"Each stage is proven on all nodes before the next is allowed: by their files, by what their ports show,\n" +
			"and by the authorities that their route ports name. Nothing is restarted and no route is dropped.\n" +
			"Of the client CA: between trust and issue give DIR/client-ca.crt, which holds both, to all users and\n" +
			"load balancers; nobody can ask them whether they have it.\n" +
			"Shows what it would do until it is told --yes; interrupted, the same line goes on.\n\n" +
			"   unibusctl pki rotate-ca --authority cluster --stage trust --dir pki --inventory nodes.env --sys-seed secrets/sys.nk --yes",
		Flags: append(nodesFlags(a),
			&cli.StringFlag{Name: "authority", Required: true, Usage: "`client|cluster`"},
			&cli.StringFlag{Name: "stage", Required: true, Usage: "`trust|issue|retire`"}),
		Action: a.pkiRotate,
	}
}

// The stages of a rotation, in their order.
const (
	stageTrust  = "trust"
	stageIssue  = "issue"
	stageRetire = "retire"
)

// rotation is how far the replacement of one authority is, as the PKI directory
// tells it. Each step of it is one rename, so that a crash leaves one of these:
//
//	CA.crt    CA.key  CA-next.key  CA-old.key   stage
//	old       old                               none under way
//	old, new  old     new                       trust
//	old, new  new                  old          issue
type rotation struct {
	role  caRole
	stage string            // the last one that was begun: "", trust or issue
	old   *x509.Certificate // the only one when none is under way
	next  *x509.Certificate // nil when none is under way
}

func (d pkiDir) nextKey(r caRole) string { return strings.TrimSuffix(d.caKey(r), ".key") + "-next.key" }

func (d pkiDir) oldKey(r caRole) string { return strings.TrimSuffix(d.caKey(r), ".key") + "-old.key" }

func (d pkiDir) rotation(role caRole) (rotation, error) {
	r := rotation{role: role}
	certs, err := readCerts(d.caCert(role))
	if err != nil {
		return r, bus.E(bus.Invalid, "%s %w", d.caCert(role), err).WithHint("unibusctl pki verify --dir %s", d)
	}
	key, err := readKey(d.caKey(role))
	if err != nil {
		return r, bus.E(bus.Invalid, "%s %w", d.caKey(role), err).WithHint("put it back: without it nothing can be signed")
	}
	signs := slices.IndexFunc(certs, func(c *x509.Certificate) bool { return samePublic(c.PublicKey, key.Public()) })
	switch {
	case signs < 0:
		return r, bus.E(bus.Invalid, "%s does not belong to %s", d.caKey(role), d.caCert(role)).WithHint("unibusctl pki verify --dir %s", d)
	case len(certs) == 1:
		r.old = certs[0]
		return r, nil
	case len(certs) > 2:
		return r, bus.E(bus.Invalid, "%s holds %d authorities; a rotation has two", d.caCert(role), len(certs)).WithHint("unibusctl pki verify --dir %s", d)
	}
	signing, other := certs[signs], certs[1-signs]
	if next, err := readKey(d.nextKey(role)); err == nil && samePublic(other.PublicKey, next.Public()) {
		r.stage, r.old, r.next = stageTrust, signing, other
	} else {
		r.stage, r.old, r.next = stageIssue, other, signing
	}
	return r, nil
}

// order refuses a stage whose turn it is not.
func (r rotation) order(want string) error {
	switch {
	case want == stageTrust && r.stage == stageIssue:
		return bus.E(bus.Conflict, "the new %s signs already: the stage after issue is retire", r.role)
	case want == stageIssue && r.stage == "":
		return bus.E(bus.Conflict, "there is no new %s to issue from: the stage before is trust", r.role)
	case want == stageRetire && r.stage == stageTrust:
		return bus.E(bus.Conflict, "the new %s has signed nothing yet: the stage before is issue", r.role)
	}
	return nil
}

// after is who is trusted and who signs when the stage is done.
func (r rotation) after(stage string) (bundle []*x509.Certificate, signer *x509.Certificate) {
	switch {
	case r.next == nil:
		return []*x509.Certificate{r.old}, r.old
	case stage == stageIssue:
		return []*x509.Certificate{r.old, r.next}, r.next
	case stage == stageRetire:
		return []*x509.Certificate{r.next}, r.next
	case r.stage == stageIssue:
		return []*x509.Certificate{r.old, r.next}, r.next
	}
	return []*x509.Certificate{r.old, r.next}, r.old
}

// overlap is the rule that every change of certificates obeys: nobody shows what
// another does not trust yet, and nobody forgets whose certificate another still
// shows. signer will sign, bundle will be trusted.
func overlap(role caRole, bundle []*x509.Certificate, signer *x509.Certificate, sights []*nodeSight) error {
	if guard.Off(guard.CAOverlap) {
		return nil
	}
	for _, s := range sights {
		if why := s.believes(role, signer); why != "" {
			return bus.E(bus.Conflict, "%s does not trust %s: %s", s.node, signer.Subject.CommonName, why).
				WithHint("unibusctl pki rotate-ca --authority %s --stage trust ... --yes", authorityName(role))
		}
		for _, leaf := range leafRoles() {
			if leaf.authority() != role {
				continue
			}
			for what, cert := range map[string]*x509.Certificate{"shows": s.shown[leaf], "has on its disk": s.disk[leaf]} {
				if cert != nil && !chains(cert, bundle) {
					return bus.E(bus.Conflict, "%s %s a %s certificate of %s, which would not be trusted any more", s.node, what, leaf, cert.Issuer.CommonName).
						WithHint("unibusctl pki rotate-ca --authority %s --stage issue ... --yes", authorityName(role))
				}
			}
		}
	}
	return nil
}

func authorityName(role caRole) string { return strings.TrimSuffix(string(role), "-ca") }

func (a *app) pkiRotate(c *cli.Context) error {
	role, stage := caRole(c.String("authority")+"-ca"), c.String("stage")
	if !slices.Contains(caRoles(), role) {
		return usagef("--authority is client or cluster, not %s", quote(c.String("authority")))
	}
	if err := oneOf(stage, stageTrust, stageIssue, stageRetire); err != nil {
		return usagef("--stage: %v", err)
	}
	r, err := a.newPKINodes(c)
	if err != nil {
		return err
	}
	ctx, cancel := a.within(c.Context, bringWithin)
	defer cancel()
	cas, err := a.signers(r.dir) // neither authority may be what verify would name
	if err != nil {
		return err
	}
	now, err := r.dir.rotation(role)
	if err != nil {
		return err
	}
	if err := now.order(stage); err != nil {
		return err
	}
	sights, err := r.look(ctx)
	if err != nil {
		return err
	}
	bundle, signer := now.after(stage)
	if err := overlap(role, bundle, signer, sights); err != nil {
		return err
	}
	run := certificateRun{Authority: authorityName(role), Stage: stage}
	if !a.set.yes {
		run.Nodes = r.planned(now, stage, sights)
		a.say("Nothing was changed. Next: the same with --yes")
		return r.print(run)
	}
	if err := a.everyNodeReady(ctx); err != nil {
		return err
	}
	if err := r.turn(now, stage, cas); err != nil {
		return err
	}
	if err := r.carry(ctx, sights, run); err != nil {
		return err
	}
	a.nextStage(now, stage)
	return nil
}

// planned is what a stage would replace. What differs from the PKI directory
// already comes with it.
func (r *pkiNodes) planned(now rotation, stage string, sights []*nodeSight) []broughtNode {
	var out []broughtNode
	for _, s := range sights {
		files := slices.Clone(s.changes)
		add := func(name string) {
			if !slices.Contains(files, name) {
				files = append(files, name)
			}
		}
		switch {
		case stage == stageTrust && now.stage == "", stage == stageRetire && now.stage == stageIssue:
			add(caFile(now.role))
		case stage == stageIssue:
			for _, leaf := range leafRoles() {
				if cert := s.disk[leaf]; leaf.authority() == now.role && (cert == nil || !chains(cert, []*x509.Certificate{now.next})) {
					add(leafFile(leaf))
					add("tls/" + string(leaf) + ".key")
				}
			}
		}
		slices.Sort(files)
		reload := s.serverBehind() != "" || slices.ContainsFunc(files, readByServer)
		out = append(out, broughtNode{Node: s.node, Files: append([]string{}, files...), Reload: reload})
	}
	return out
}

// readByServer tells the files that nats-server reads when it loads its
// configuration.
func readByServer(name string) bool {
	return name == caFile(clusterCA) || strings.HasPrefix(name, "tls/server.") || strings.HasPrefix(name, "tls/route.")
}

// turn brings the PKI directory to the stage. Repeated after a crash it finishes
// what was begun.
func (r *pkiNodes) turn(now rotation, stage string, cas map[caRole]*keyPair) error {
	switch stage {
	case stageTrust:
		if now.stage != "" {
			return nil
		}
		pair, err := r.app.minter().authority(now.role)
		if err != nil {
			return err
		}
		// The key first: a certificate whose key is lost would be trusted for
		// nothing.
		if err := pair.writeKey(r.dir.nextKey(now.role), true); err != nil {
			return err
		}
		return writeFile(r.dir.caCert(now.role), encodeCerts(now.old, pair.cert), 0o644, true)
	case stageIssue:
		if now.stage == stageTrust {
			if err := r.dir.switchKeys(now.role); err != nil {
				return err
			}
			var err error
			if cas, err = r.app.signers(r.dir); err != nil {
				return err
			}
		}
		return r.issueAll(cas, func(n node, role leafRole, cert *x509.Certificate) bool {
			return role.authority() == now.role && !chains(cert, []*x509.Certificate{now.next})
		})
	}
	if now.stage == stageIssue {
		if err := writeFile(r.dir.caCert(now.role), encodeCerts(now.next), 0o644, true); err != nil {
			return err
		}
	}
	for _, key := range []string{r.dir.oldKey(now.role), r.dir.nextKey(now.role)} {
		if err := os.Remove(key); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the key of the old authority: %w", err)
		}
	}
	return nil
}

// switchKeys makes the next key the one that signs.
func (d pkiDir) switchKeys(role caRole) error {
	old, err := readSecret(d.caKey(role))
	if err != nil {
		return err
	}
	if err := writeFile(d.oldKey(role), old, 0o600, true); err != nil {
		return err
	}
	if err := os.Rename(d.nextKey(role), d.caKey(role)); err != nil {
		return fmt.Errorf("switch to the new authority: %w", err)
	}
	return nil
}

func encodeCerts(certs ...*x509.Certificate) []byte {
	var out bytes.Buffer
	for _, c := range certs {
		out.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return out.Bytes()
}

// issueAll makes new certificates in the PKI directory for those that due says.
func (r *pkiNodes) issueAll(cas map[caRole]*keyPair, due func(node, leafRole, *x509.Certificate) bool) error {
	for _, n := range r.inv.nodes {
		for _, role := range leafRoles() {
			dir := r.dir.node(n.name)
			cert, err := readCert(dir.cert(role))
			if err == nil && !due(n, role, cert) {
				continue
			}
			if err := os.MkdirAll(string(dir), 0o700); err != nil {
				return fmt.Errorf("make the directory of %s: %w", n.name, err)
			}
			pair, err := r.app.minter().leaf(cas[role.authority()], role, n.name, leafNames(n))
			if err != nil {
				return err
			}
			if err := pair.write(dir.cert(role), dir.key(role), true); err != nil {
				return err
			}
		}
	}
	return nil
}

func (a *app) nextStage(now rotation, stage string) {
	switch {
	case stage == stageTrust && now.role == clientCA:
		a.say("Every node trusts both. Give client-ca.crt to all users and load balancers; when they have it: --stage issue")
	case stage == stageTrust:
		a.say("Every node trusts both. Next: --stage issue")
	case stage == stageIssue:
		a.say("Every node shows certificates of the new authority. Next: --stage retire")
	default:
		a.say("The old authority is trusted no more.")
	}
}

func (a *app) pkiRenew(c *cli.Context) error {
	r, err := a.newPKINodes(c)
	if err != nil {
		return err
	}
	only := c.StringSlice("node")
	for _, name := range only {
		if _, err := r.inv.node(name); err != nil {
			return err
		}
	}
	ctx, cancel := a.within(c.Context, bringWithin)
	defer cancel()
	cas, err := a.signers(r.dir)
	if err != nil {
		return err
	}
	sights, err := r.look(ctx)
	if err != nil {
		return err
	}
	for _, role := range caRoles() {
		now, err := r.dir.rotation(role)
		if err != nil {
			return err
		}
		bundle, signer := now.after("")
		if err := overlap(role, bundle, signer, sights); err != nil {
			return err
		}
	}
	due := func(n node, role leafRole, cert *x509.Certificate) bool {
		return (len(only) == 0 || slices.Contains(only, n.name)) && (c.Bool("all") || r.due(n, role, cert, cas))
	}
	if !a.set.yes {
		a.say("Nothing was changed. Next: the same with --yes")
		return r.print(certificateRun{Nodes: r.renewals(sights, due)})
	}
	if err := a.everyNodeReady(ctx); err != nil {
		return err
	}
	if err := r.issueAll(cas, due); err != nil {
		return err
	}
	return r.carry(ctx, sights, certificateRun{})
}

// due are certificates that end soon, or are not what would be issued now.
func (r *pkiNodes) due(n node, role leafRole, cert *x509.Certificate, cas map[caRole]*keyPair) bool {
	check := &pkiChecker{dir: r.dir, now: r.app.now(), inventory: r.inv.path, trust: map[caRole][]*x509.Certificate{}}
	for of, ca := range cas {
		check.trust[of] = []*x509.Certificate{ca.cert}
	}
	s, _ := validity(cert, check.now)
	key, err := readKey(r.dir.node(n.name).key(role))
	return s != severityOK || len(check.leafProblems(cert, role, n.name, leafNames(n))) > 0 || err != nil || !samePublic(cert.PublicKey, key.Public())
}

func (r *pkiNodes) renewals(sights []*nodeSight, due func(node, leafRole, *x509.Certificate) bool) []broughtNode {
	var out []broughtNode
	for i, n := range r.inv.nodes {
		files := slices.Clone(sights[i].changes)
		for _, role := range leafRoles() {
			if cert, err := readCert(r.dir.node(n.name).cert(role)); err != nil || due(n, role, cert) {
				files = append(files, leafFile(role), "tls/"+string(role)+".key")
			}
		}
		slices.Sort(files)
		files = slices.Compact(files)
		out = append(out, broughtNode{Node: n.name, Files: append([]string{}, files...), Reload: sights[i].serverBehind() != "" || slices.ContainsFunc(files, readByServer)})
	}
	return out
}
