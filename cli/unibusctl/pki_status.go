package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"
)

// probeTimeout bounds one question to a live port.
const probeTimeout = 5 * time.Second

// certRow is one certificate as `pki status` shows it.
type certRow struct {
	Source   string    `json:"source"` // file, or host:port
	Role     string    `json:"role"`
	Subject  string    `json:"subject"`
	Issuer   string    `json:"issuer"`
	Serial   string    `json:"serial"`
	Expires  time.Time `json:"expires,omitzero"`
	Days     int       `json:"days_left"`
	Severity severity  `json:"status"`
	Trusts   []string  `json:"trusts,omitempty"` // authorities that a route port believes
	Note     string    `json:"note,omitempty"`

	left time.Duration
}

func rowOf(source string, cert *x509.Certificate, now time.Time) certRow {
	left := cert.NotAfter.Sub(now)
	s, note := validity(cert, now)
	role := subjectRole(cert)
	if role == "" {
		role = "foreign"
	}
	return certRow{
		Source: source, Role: role, Subject: cert.Subject.CommonName, Issuer: cert.Issuer.CommonName,
		Serial: cert.SerialNumber.Text(16), Expires: cert.NotAfter.UTC(), Days: int(left.Hours() / 24),
		Severity: s, Note: note, left: left,
	}
}

func (r *certRow) worsen(s severity, note string) {
	r.Severity = r.Severity.worse(s)
	if r.Note != "" {
		note = r.Note + "; " + note
	}
	r.Note = note
}

// pkiStatus shows what expires when, and whether files, nodes and live ports
// agree.
func (a *app) pkiStatus(c *cli.Context) error {
	dir, inventoryPath, connect, live := c.String("dir"), c.String("inventory"), c.StringSlice("connect"), c.Bool("live")
	onNodes := c.Bool("nodes") || c.String("local") != ""
	if dir == "" && len(connect) == 0 && !live && !onNodes {
		return usagef("pki status needs --dir, --connect, --live or --nodes: what is to be looked at?")
	}
	if onNodes && inventoryPath == "" {
		return usagef("--nodes needs --inventory: which nodes?")
	}
	var ports []livePort
	for _, address := range connect {
		ports = append(ports, livePort{address: address})
	}
	var rows []certRow
	var inv *inventory
	if inventoryPath != "" {
		var err error
		if inv, err = parseInventory(inventoryPath); err != nil {
			return err
		}
	}
	switch {
	case live && inv != nil:
		ports = append(ports, livePorts(inv)...)
	case live:
		ports = append(ports, a.settingsPorts()...)
	}
	if dir != "" {
		var known []node
		if inv != nil {
			known = inv.nodes
		}
		rows = a.fileRows(pkiDir(dir), known)
	}
	if onNodes {
		_, hosts, err := a.pkiHosts(c)
		if err != nil {
			return err
		}
		rows = append(rows, (&pkiNodes{app: a, dir: pkiDir(dir), inv: inv, hosts: hosts}).diskRows(c.Context, live)...)
	}
	rows = append(rows, a.liveRows(c.Context, pkiDir(dir), ports)...)
	s := severityOK
	for _, r := range rows {
		s = s.worse(r.Severity)
	}
	if err := a.printCertificates(s, rows); err != nil {
		return err
	}
	return &checkResult{code: int(s), line: fmt.Sprintf("PKI %s - %s", strings.ToUpper(s.String()), summary(rows, s))}
}

// settingsPorts are the ports that unibusctl itself would connect to.
func (a *app) settingsPorts() []livePort {
	var out []livePort
	for _, u := range strings.Split(a.set.natsURL, ",") {
		out = append(out, livePort{hostOf(strings.TrimSpace(u)), serverLeaf})
	}
	for _, u := range strings.Split(a.set.apiURL, ",") {
		out = append(out, livePort{hostOf(strings.TrimSpace(u)), apiLeaf})
	}
	return out
}

// diskRows lists the certificates on the disks of the nodes, and what of them
// differs from the PKI directory and, if live, from what the node shows.
func (r *pkiNodes) diskRows(ctx context.Context, live bool) []certRow {
	lists := make([][]certRow, len(r.hosts))
	var wait sync.WaitGroup
	for i, h := range r.hosts {
		wait.Go(func() { lists[i] = r.nodeRows(ctx, h, live) })
	}
	wait.Wait()
	return slices.Concat(lists...)
}

func (r *pkiNodes) nodeRows(ctx context.Context, h *pkiHost, live bool) []certRow {
	s := &nodeSight{node: h.node.name, trust: map[caRole][]*x509.Certificate{}, disk: map[leafRole]*x509.Certificate{}}
	if err := s.readDisk(ctx, h); err != nil {
		return []certRow{{Source: h.node.name, Role: "unknown", Severity: severityUnknown, Note: err.Error()}}
	}
	if live && r.lookAtPorts(ctx, h.node, s) != nil {
		live = false // the rows of the ports say why
	}
	source := func(name string) string { return h.node.name + ":" + name }
	var rows []certRow
	for _, role := range caRoles() {
		name := caFile(role)
		if len(s.trust[role]) == 0 {
			rows = append(rows, certRow{Source: source(name), Role: string(role), Severity: severityCritical, Note: "is missing"})
		}
		for _, cert := range s.trust[role] {
			rows = append(rows, rowOf(source(name), cert, r.app.now()))
		}
		last := &rows[len(rows)-1]
		if filed, err := readCerts(r.dir.caCert(role)); r.dir != "" && err == nil && !slices.EqualFunc(filed, s.trust[role], (*x509.Certificate).Equal) {
			last.worsen(severityWarning, "is not "+r.dir.caCert(role))
		}
		if live && role == clusterCA && !sameSubjects(s.accepts, s.trust[clusterCA]) {
			last.worsen(severityWarning, "the running server trusts others: reload it")
		}
	}
	for _, role := range leafRoles() {
		cert := s.disk[role]
		if cert == nil {
			rows = append(rows, certRow{Source: source(leafFile(role)), Role: string(role), Severity: severityCritical, Note: "is missing"})
			continue
		}
		row := rowOf(source(leafFile(role)), cert, r.app.now())
		if filed, err := readCert(r.dir.node(h.node.name).cert(role)); r.dir != "" && err == nil && !filed.Equal(cert) {
			row.worsen(severityWarning, "is not "+r.dir.node(h.node.name).cert(role))
		}
		if live && !cert.Equal(s.shown[role]) {
			row.worsen(severityWarning, "the node shows another one: reload it")
		}
		rows = append(rows, row)
	}
	return rows
}

// livePort is a port to ask, and what it must show if that is known.
type livePort struct {
	address string   // host:port
	role    leafRole // "" when any will do
}

// livePorts are the TLS ports of every node in the inventory.
func livePorts(inv *inventory) []livePort {
	var out []livePort
	for _, n := range inv.nodes {
		out = append(out, nodePorts(inv, n)...)
	}
	return out
}

func nodePorts(inv *inventory, n node) []livePort {
	return []livePort{
		{net.JoinHostPort(n.public, strconv.Itoa(n.ports.nats)), serverLeaf},
		{net.JoinHostPort(n.public, strconv.Itoa(n.ports.api)), apiLeaf},
		{net.JoinHostPort(inv.routeAddress(n), strconv.Itoa(n.ports.route)), routeLeaf},
	}
}

// fileRows lists the certificates of a PKI directory or of a node's own.
func (a *app) fileRows(dir pkiDir, known []node) []certRow {
	var paths []string
	for _, role := range caRoles() {
		paths = append(paths, dir.caCert(role))
	}
	names := dir.nodeNames()
	for _, n := range known {
		if !slices.Contains(names, n.name) {
			names = append(names, n.name)
		}
	}
	leaves := []leafDir{leafDir(dir)}
	if !looksLikeNode(string(dir)) {
		leaves = nil
		for _, name := range names {
			leaves = append(leaves, dir.node(name))
		}
	}
	for _, l := range leaves {
		for _, role := range leafRoles() {
			paths = append(paths, l.cert(role))
		}
	}
	var rows []certRow
	for _, path := range paths {
		rows = append(rows, a.rowsOf(path)...)
	}
	return rows
}

// rowsOf lists all certificates of one file: a CA file holds two while its
// authority is being replaced.
func (a *app) rowsOf(path string) []certRow {
	certs, err := readCerts(path)
	if err != nil {
		role := strings.TrimSuffix(filepath.Base(path), ".crt")
		return []certRow{{Source: path, Role: role, Severity: severityCritical, Note: err.Error()}}
	}
	var rows []certRow
	for _, cert := range certs {
		rows = append(rows, rowOf(path, cert, a.now()))
	}
	return rows
}

// liveRows asks all ports at once.
func (a *app) liveRows(ctx context.Context, dir pkiDir, ports []livePort) []certRow {
	rows := make([]certRow, len(ports))
	var wait sync.WaitGroup
	for i, port := range ports {
		wait.Go(func() { rows[i] = a.liveRow(ctx, dir, port) })
	}
	wait.Wait()
	return rows
}

func (a *app) liveRow(ctx context.Context, dir pkiDir, port livePort) certRow {
	ctx, cancel := a.within(ctx, probeTimeout)
	defer cancel()
	end, err := farEnd(ctx, port.address)
	if err != nil {
		return certRow{Source: port.address, Role: "unknown", Severity: severityUnknown, Note: err.Error()}
	}
	cert, role := end.cert, end.role
	row := rowOf(port.address, cert, a.now())
	row.Trusts = subjectNames(end.accepts)
	host, _, _ := net.SplitHostPort(port.address)
	if err := cert.VerifyHostname(host); err != nil {
		row.worsen(severityCritical, "does not name "+host)
	}
	if role = cmp.Or(port.role, role); role != "" && row.Role != string(role) {
		row.worsen(severityCritical, fmt.Sprintf("is no %s certificate, as this port needs", role))
	}
	if dir != "" {
		a.compare(&row, dir, cert)
	}
	return row
}

// compare holds what a live port shows against the files.
func (a *app) compare(row *certRow, dir pkiDir, cert *x509.Certificate) {
	role := leafRole(subjectRole(cert))
	if !slices.Contains(leafRoles(), role) {
		row.worsen(severityCritical, "is no certificate of unibus")
		return
	}
	check := &pkiChecker{dir: dir, now: a.now()}
	check.authorities()
	if problem := check.chainProblem(cert, role.authority()); problem != "" {
		row.worsen(severityCritical, problem)
		return
	}
	leaves := dir.node(cert.Subject.CommonName)
	if looksLikeNode(string(dir)) {
		leaves = leafDir(dir)
	}
	if filed, err := readCert(leaves.cert(role)); err == nil && !filed.Equal(cert) {
		row.worsen(severityWarning, fmt.Sprintf("is not the one in %s: install that and reload", leaves.cert(role)))
	}
}

func (a *app) printCertificates(s severity, rows []certRow) error {
	return a.print(map[string]any{"status": s, "certificates": rows}, func(t table.Writer) {
		t.AppendHeader(table.Row{"certificate", "role", "subject", "signed by", "expires", "left", "status"})
		for _, r := range rows {
			state := r.Severity.String()
			if r.Note != "" {
				state += ": " + r.Note
			}
			expires, left := "", ""
			if len(r.Trusts) > 0 {
				state += "; trusts " + strings.Join(r.Trusts, ", ")
			}
			if !r.Expires.IsZero() {
				expires, left = r.Expires.Format(time.DateOnly), span(r.left)
			}
			t.AppendRow(table.Row{r.Source, r.Role, r.Subject, r.Issuer, expires, left, state})
		}
	})
}

// summary is the line that monitoring shows: the worst certificate, or the
// one that expires first.
func summary(rows []certRow, s severity) string {
	var first *certRow
	for i, r := range rows {
		if r.Severity == s && (first == nil || r.left < first.left) {
			first = &rows[i]
		}
	}
	if s == severityOK {
		return fmt.Sprintf("%d certificates, the first expires in %s (%s)", len(rows), span(first.left), first.Source)
	}
	return fmt.Sprintf("%s %s", first.Source, first.Note)
}

// farSide is what a live port says of itself in a handshake.
type farSide struct {
	cert *x509.Certificate
	role leafRole // serverLeaf if it is a NATS client port, else ""
	// accepts are the subjects of the authorities whose certificates it takes
	// from others: routes ask for one, and name whom they believe.
	accepts [][]byte
}

// farEnd asks who is on host:port, in a handshake that proves possession of the
// certificate's key. It works for client ports, route ports and the API alike,
// sends no credentials, and trusts nothing: judging the certificate is the
// caller's part.
func farEnd(ctx context.Context, address string) (*farSide, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("is not host:port: %w", err)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("no connection: %w", err)
	}
	defer func() { _ = conn.Close() }()
	greeted := &greetedConn{Conn: conn, in: bufio.NewReaderSize(conn, 64<<10)}
	end := &farSide{}
	session := tls.Client(greeted, &tls.Config{
		ServerName: host,
		// An expired or foreign certificate is what we are here to see.
		InsecureSkipVerify: true,
		MinVersion:         tls.VersionTLS12,
		GetClientCertificate: func(asked *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			end.accepts = asked.AcceptableCAs
			return &tls.Certificate{}, nil
		},
	})
	if err := session.HandshakeContext(ctx); err != nil {
		var plain tls.RecordHeaderError
		if errors.As(err, &plain) {
			return nil, errors.New("does not speak TLS")
		}
		return nil, fmt.Errorf("no TLS handshake: %w", err)
	}
	end.cert, end.role = session.ConnectionState().PeerCertificates[0], greeted.role
	return end, nil
}

// subjectNames are the common names of raw subjects, as tables show authorities.
func subjectNames(raw [][]byte) []string {
	var out []string
	for _, der := range raw {
		var rdn pkix.RDNSequence
		var name pkix.Name
		if _, err := asn1.Unmarshal(der, &rdn); err != nil {
			out = append(out, "unreadable")
			continue
		}
		name.FillFromRDNSequence(&rdn)
		out = append(out, name.CommonName)
	}
	return out
}

// greetedConn drops the one line that a nats-server says in clear before TLS,
// INFO {...}, on client ports only: routes and the API begin with TLS. Our
// ClientHello may cross it on the wire, so nobody has to guess, or to wait for
// a greeting that never comes.
type greetedConn struct {
	net.Conn
	in   *bufio.Reader
	read bool     // the greeting, or that there is none
	role leafRole // serverLeaf once greeted
}

func (c *greetedConn) Read(p []byte) (int, error) {
	if !c.read {
		if err := c.readGreeting(); err != nil {
			return 0, err
		}
		c.read = true
	}
	return c.in.Read(p)
}

func (c *greetedConn) readGreeting() error {
	first, err := c.in.Peek(1)
	if err != nil || first[0] != 'I' { // no TLS record begins like that
		return err
	}
	c.role = serverLeaf
	_, err = c.in.ReadSlice('\n')
	return err
}
