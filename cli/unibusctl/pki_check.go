package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"
)

// A certificate is reported this long before its end.
const (
	expiryWarning  = 30 * 24 * time.Hour
	expiryCritical = 7 * 24 * time.Hour
)

// severity of a finding: its number is the Nagios exit code.
type severity int

const (
	severityOK severity = iota
	severityWarning
	severityCritical
	severityUnknown // nobody answered: neither well nor broken
)

func (s severity) String() string {
	return [...]string{"ok", "warning", "critical", "unknown"}[s]
}

// MarshalText puts the word into JSON.
func (s severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// worse returns the one to report of two: what is known to be broken outranks
// what is not known, and that outranks a warning.
func (s severity) worse(t severity) severity {
	rank := [...]int{severityOK: 0, severityWarning: 1, severityUnknown: 2, severityCritical: 3}
	if rank[t] > rank[s] {
		return t
	}
	return s
}

// pkiFinding is one thing wrong with one file, and what to do about it.
type pkiFinding struct {
	File     string   `json:"file"`
	Problem  string   `json:"problem"`
	Fix      string   `json:"fix"`
	Severity severity `json:"severity"`
}

func (f pkiFinding) String() string {
	return fmt.Sprintf("%s: %s: %s", f.File, f.Problem, f.Fix)
}

// pkiChecker looks at the files of a PKI and collects what is wrong. It only
// reads. Commands that sign use the very same rules, so that nothing is signed
// by, or kept beside, an authority that verify would name.
type pkiChecker struct {
	dir pkiDir
	now time.Time
	// inventory is the file findings refer to; empty without one.
	inventory string
	// onNode says that dir is a node's own tls directory: one set of leaves
	// beside the CA certificates, keys readable by the services' group, and
	// no CA key.
	onNode bool

	trust    map[caRole][]*x509.Certificate
	files    int
	findings []pkiFinding
}

func (k *pkiChecker) found(s severity, file, problem, fix string) {
	k.findings = append(k.findings, pkiFinding{File: file, Problem: problem, Fix: fix, Severity: s})
}

func (k *pkiChecker) critical(file, problem, fix string) {
	k.found(severityCritical, file, problem, fix)
}

func (k *pkiChecker) warning(file, problem, fix string) {
	k.found(severityWarning, file, problem, fix)
}

// first returns the first critical finding, or nil.
func (k *pkiChecker) first() *pkiFinding {
	for i, f := range k.findings {
		if f.Severity == severityCritical {
			return &k.findings[i]
		}
	}
	return nil
}

func (k *pkiChecker) severity() severity {
	s := severityOK
	for _, f := range k.findings {
		s = s.worse(f.Severity)
	}
	return s
}

// authorities checks both CAs and fills k.trust with those certificates that
// are what their file name says. A certificate of the wrong role is trusted
// for nothing.
func (k *pkiChecker) authorities() {
	k.directory(string(k.dir))
	k.trust = map[caRole][]*x509.Certificate{}
	for _, role := range caRoles() {
		k.authority(role)
	}
	for _, client := range k.trust[clientCA] {
		for _, cluster := range k.trust[clusterCA] {
			if samePublic(client.PublicKey, cluster.PublicKey) {
				k.critical(k.dir.caCert(clusterCA), "has the same key as "+k.dir.caCert(clientCA)+": a client certificate would open the routes", k.startOver())
			}
		}
	}
}

func (k *pkiChecker) authority(role caRole) {
	path := k.dir.caCert(role)
	k.files++
	certs, err := readCerts(path)
	if err != nil {
		k.critical(path, err.Error(), k.restore(role))
		return
	}
	for _, cert := range certs {
		if problem, fix := k.authorityProblem(role, cert); problem != "" {
			k.critical(path, problem, fix)
			continue
		}
		k.dates(path, cert, k.startOver())
		k.trust[role] = append(k.trust[role], cert)
	}
	k.authorityKey(role, certs)
}

func (k *pkiChecker) authorityProblem(role caRole, cert *x509.Certificate) (problem, fix string) {
	switch got := subjectRole(cert); {
	case got == string(role.other()):
		return fmt.Sprintf("holds the %s: clients and routes must never share one", role.other()), k.restore(role)
	case got != string(role):
		return fmt.Sprintf("is not a %s of unibus (subject %s)", role, cert.Subject), k.restore(role)
	case !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return "cannot sign certificates", k.restore(role)
	case cert.MaxPathLen != 0 || !cert.MaxPathLenZero:
		return "may make further authorities (no path length 0)", k.startOver()
	case !slices.Equal(cert.ExtKeyUsage, role.usage()):
		return "is not limited to " + usageNames(role.usage()), k.startOver()
	case cert.CheckSignatureFrom(cert) != nil:
		return "is damaged: its signature is not its own", k.restore(role)
	}
	return "", ""
}

// authorityKey checks the CA's private key where there is one. None is well:
// it may be kept offline, and belongs on no node.
func (k *pkiChecker) authorityKey(role caRole, certs []*x509.Certificate) {
	for _, path := range []string{k.dir.nextKey(role), k.dir.oldKey(role)} { // while the authority is replaced
		switch {
		case !exists(path):
		case k.onNode:
			k.critical(path, "is the key of an authority, and this is a node", "move it to the PKI directory, off the node")
		default:
			k.keyMode(path)
		}
	}
	path := k.dir.caKey(role)
	key, err := readKey(path)
	switch {
	case errors.Is(err, errMissing):
		return
	case k.onNode:
		k.critical(path, "is the key of an authority, and this is a node", "move it to the PKI directory, off the node")
		return
	}
	k.files++
	k.keyMode(path)
	if err != nil {
		k.critical(path, err.Error(), k.restore(role))
		return
	}
	matches := func(c *x509.Certificate) bool { return samePublic(c.PublicKey, key.Public()) }
	if !slices.ContainsFunc(certs, matches) {
		k.critical(path, "does not belong to "+k.dir.caCert(role), k.restore(role))
	}
}

// leaves checks one node's certificates. names are those the certificates must
// be good for, no more and no less.
func (k *pkiChecker) leaves(dir leafDir, node string, names []string) {
	if !hasLeaf(dir) {
		k.critical(string(dir), "has no certificates", k.issue(node, false))
		return
	}
	k.directory(string(dir))
	for _, role := range leafRoles() {
		k.leaf(dir, role, node, names)
	}
}

// leaf checks one certificate with its key.
func (k *pkiChecker) leaf(dir leafDir, role leafRole, node string, names []string) {
	path := dir.cert(role)
	k.files += 2
	cert, err := readCert(path)
	if err != nil {
		k.critical(path, err.Error(), k.issue(node, true))
	} else {
		for _, problem := range k.leafProblems(cert, role, node, names) {
			k.critical(path, problem, k.issue(node, true))
		}
		k.dates(path, cert, k.issue(node, true))
	}
	k.leafKey(dir.key(role), path, cert, node)
}

func (k *pkiChecker) leafKey(path, certPath string, cert *x509.Certificate, node string) {
	key, err := readKey(path)
	if err != nil {
		k.critical(path, err.Error(), k.issue(node, true))
		return
	}
	k.keyMode(path)
	if cert != nil && !samePublic(cert.PublicKey, key.Public()) {
		k.critical(path, "does not belong to "+certPath, k.issue(node, true))
	}
}

// leafProblems is everything but the dates.
func (k *pkiChecker) leafProblems(cert *x509.Certificate, role leafRole, node string, names []string) []string {
	var problems []string
	if got := subjectRole(cert); got != string(role) {
		problems = append(problems, fmt.Sprintf("is no %s certificate of unibus (subject %s)", role, cert.Subject))
	}
	if got := cert.Subject.CommonName; got != node {
		problems = append(problems, fmt.Sprintf("belongs to node %s, not %s", got, node))
	}
	// Without its authority nothing chains, and the authority is a finding already.
	if problem := k.chainProblem(cert, role.authority()); problem != "" && len(k.trust[role.authority()]) > 0 {
		problems = append(problems, problem)
	}
	if cert.IsCA {
		problems = append(problems, "is itself an authority")
	}
	if !slices.Equal(cert.ExtKeyUsage, role.usage()) || len(cert.UnknownExtKeyUsage) > 0 {
		problems = append(problems, fmt.Sprintf("is good for %s, not for %s", usageNames(cert.ExtKeyUsage), usageNames(role.usage())))
	}
	got := certNames(cert)
	if missing := without(names, got); len(missing) > 0 {
		problems = append(problems, "does not name "+strings.Join(missing, ", "))
	} else if extra := without(got, names); len(extra) > 0 && k.inventory != "" {
		problems = append(problems, fmt.Sprintf("names %s, which %s does not give to %s", strings.Join(extra, ", "), k.inventory, node))
	}
	return problems
}

// chainProblem says why cert is not vouched for by the right authority alone.
// The dates are another matter: the chain is built as of the leaf's first day.
func (k *pkiChecker) chainProblem(cert *x509.Certificate, role caRole) string {
	if chains(cert, k.trust[role.other()]) {
		return fmt.Sprintf("is signed by the %s, not by the %s", role.other(), role)
	}
	if !chains(cert, k.trust[role]) {
		return fmt.Sprintf("is not signed by the %s in %s", role, k.dir)
	}
	return ""
}

func chains(cert *x509.Certificate, trust []*x509.Certificate) bool {
	return slices.ContainsFunc(trust, func(ca *x509.Certificate) bool { return cert.CheckSignatureFrom(ca) == nil })
}

func (k *pkiChecker) dates(path string, cert *x509.Certificate, fix string) {
	if s, problem := validity(cert, k.now); s != severityOK {
		k.found(s, path, problem, fix)
	}
}

// validity judges a certificate's dates, and says the problem in words.
func validity(cert *x509.Certificate, now time.Time) (severity, string) {
	left := cert.NotAfter.Sub(now)
	switch {
	case now.Before(cert.NotBefore):
		return severityCritical, "is not valid before " + cert.NotBefore.UTC().Format(time.RFC3339)
	case left <= 0:
		return severityCritical, "has expired on " + cert.NotAfter.UTC().Format(time.RFC3339)
	case left < expiryCritical:
		return severityCritical, "expires in " + span(left)
	case left < expiryWarning:
		return severityWarning, "expires in " + span(left)
	}
	return severityOK, ""
}

// span is a duration as an operator plans with it.
func span(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + span(-d)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d d", int(d.Hours()/24))
}

// keyMode names a private key that others than its owner can read: on a node
// the services' group may.
func (k *pkiChecker) keyMode(path string) {
	mask, chmod := fs.FileMode(0o077), "600"
	if k.onNode {
		mask, chmod = 0o037, "640"
	}
	if info, err := os.Stat(path); err == nil && info.Mode()&mask != 0 {
		k.critical(path, "is readable by others", fmt.Sprintf("chmod %s %s", chmod, path))
	}
}

// directory names one in which others could put an authority of their own.
func (k *pkiChecker) directory(path string) {
	info, err := os.Stat(path)
	switch {
	case err != nil: // the files in it will say so
	case info.Mode()&0o022 != 0:
		k.critical(path, "is writable by others", "chmod 700 "+path)
	case !k.onNode && info.Mode()&0o077 != 0:
		k.warning(path, "is open to others", "chmod 700 "+path)
	}
}

// strangers warns of leaves of nodes that the inventory does not have: they
// stay good until they expire, whoever has the machine now.
func (k *pkiChecker) strangers(known []node) {
	for _, name := range k.dir.nodeNames() {
		if !slices.ContainsFunc(known, func(n node) bool { return n.name == name }) {
			dir := string(k.dir.node(name))
			k.warning(dir, "belongs to no node of "+k.inventory, "rm -r "+dir)
		}
	}
}

// nodeNames lists the sub-directories that hold leaves.
func (d pkiDir) nodeNames() []string {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil // an unreadable directory has unreadable authorities, which are named
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && hasLeaf(d.node(e.Name())) {
			names = append(names, e.Name())
		}
	}
	return names
}

// hasLeaf reports whether dir holds any part of a node's certificates.
func hasLeaf(dir leafDir) bool {
	return slices.ContainsFunc(leafRoles(), func(r leafRole) bool { return exists(dir.cert(r)) || exists(dir.key(r)) })
}

// pkiVerify checks a whole PKI directory, or the tls directory of one node.
func (a *app) pkiVerify(dir, inventoryPath string) error {
	check := &pkiChecker{dir: pkiDir(dir), now: a.now(), onNode: looksLikeNode(dir)}
	var known []node
	if inventoryPath != "" {
		inv, err := parseInventory(inventoryPath)
		if err != nil {
			return err
		}
		check.inventory, known = inv.path, inv.nodes
	}
	check.authorities()
	check.everyLeaf(known)
	return a.finishVerify(check)
}

// everyLeaf checks the leaves of all nodes, or of the one whose tls directory
// this is. Without an inventory a node's addresses are not known, only what it
// calls itself.
func (k *pkiChecker) everyLeaf(known []node) {
	switch {
	case k.onNode:
		n := k.nodeHere(known)
		k.leaves(leafDir(k.dir), n.name, leafNames(n))
	case k.inventory != "":
		for _, n := range known {
			k.leaves(k.dir.node(n.name), n.name, leafNames(n))
		}
		k.strangers(known)
	default:
		for _, name := range k.dir.nodeNames() {
			k.leaves(k.dir.node(name), name, leafNames(node{name: name}))
		}
	}
}

// nodeHere is the node that a node's own server certificate names.
func (k *pkiChecker) nodeHere(known []node) node {
	cert, err := readCert(leafDir(k.dir).cert(serverLeaf))
	if err != nil {
		return node{name: "this node"} // the certificate itself becomes the finding
	}
	name := cert.Subject.CommonName
	if i := slices.IndexFunc(known, func(n node) bool { return n.name == name }); i >= 0 {
		return known[i]
	}
	if k.inventory != "" {
		k.critical(leafDir(k.dir).cert(serverLeaf), fmt.Sprintf("belongs to node %s, which %s does not have", name, k.inventory), k.issue(name, true))
	}
	return node{name: name}
}

func (a *app) finishVerify(check *pkiChecker) error {
	if check.findings == nil {
		check.findings = []pkiFinding{}
	}
	s := check.severity()
	if a.set.json {
		err := a.print(map[string]any{"status": s, "files": check.files, "findings": check.findings}, nil)
		if err != nil {
			return err
		}
	} else {
		for _, f := range check.findings {
			fmt.Fprintln(a.out, oneLine(f.String()))
		}
	}
	summary := fmt.Sprintf("%d files checked, all right", check.files)
	if n := len(check.findings); n > 0 {
		summary = fmt.Sprintf("%d files checked, findings: %d", check.files, n)
	}
	return &checkResult{code: int(s), line: fmt.Sprintf("PKI %s - %s", strings.ToUpper(s.String()), summary)}
}

// The fixes. They are commands wherever one command does it.

func (k *pkiChecker) issue(node string, force bool) string {
	inventory := k.inventory
	if inventory == "" {
		inventory = "nodes.env"
	}
	if k.onNode {
		return fmt.Sprintf("issue new certificates for %s and install them", node)
	}
	command := fmt.Sprintf("unibusctl pki issue --dir %s --inventory %s --node %s", k.dir, inventory, node)
	if force {
		command += " --force"
	}
	return command
}

func (k *pkiChecker) startOver() string {
	if k.onNode {
		return "install the CA certificates of the PKI directory again"
	}
	return fmt.Sprintf("unibusctl pki init --dir %s --force, then issue all certificates again", k.dir)
}

// restore is the fix for a CA file that is not what it should be. A new
// authority is the last resort: every node needs new certificates then.
func (k *pkiChecker) restore(role caRole) string {
	if k.onNode {
		return fmt.Sprintf("install %s.crt of the PKI directory again", role)
	}
	if !exists(k.dir.caCert(role.other())) {
		return fmt.Sprintf("unibusctl pki init --dir %s", k.dir)
	}
	return "put the right file back from a backup, or " + k.startOver()
}

func usageNames(usages []x509.ExtKeyUsage) string {
	var names []string
	for _, u := range usages {
		switch u {
		case x509.ExtKeyUsageServerAuth:
			names = append(names, "serverAuth")
		case x509.ExtKeyUsageClientAuth:
			names = append(names, "clientAuth")
		default:
			names = append(names, fmt.Sprintf("usage %d", u))
		}
	}
	if len(names) == 0 {
		return "any purpose"
	}
	return strings.Join(names, " and ")
}

// without returns the elements of a that b lacks.
func without(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}

// looksLikeNode reports whether dir is the tls directory of a node.
func looksLikeNode(dir string) bool { return hasLeaf(leafDir(dir)) }
