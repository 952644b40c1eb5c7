package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Lifetimes, from first to last moment. 397 days is the longest leaf that every
// TLS client still takes; the backdate forgives a node whose clock is behind.
const (
	caLifetime   = 10 * 365 * 24 * time.Hour
	leafLifetime = 397 * 24 * time.Hour
	backdate     = 5 * time.Minute
)

const pkiOrganization = "unibus"

// caRole is the one job of a certificate authority. It stands in the
// certificate (OU), so that a file under the other's name is noticed: with the
// two mixed, whoever holds a certificate meant for clients could join the
// cluster as a route and read and write every account.
type caRole string

const (
	clientCA  caRole = "client-ca"  // what clients, unibusctl and load balancers trust
	clusterCA caRole = "cluster-ca" // what the routes between nodes trust, both ways
)

func caRoles() []caRole { return []caRole{clientCA, clusterCA} }

func (r caRole) other() caRole {
	if r == clientCA {
		return clusterCA
	}
	return clientCA
}

func (r caRole) String() string {
	if r == clusterCA {
		return "cluster-route CA"
	}
	return "client CA"
}

// usage bounds what the authority's certificates can ever be used for.
// Verifiers (Go's and OpenSSL's among them) apply it to the whole chain, so
// the client CA cannot make a certificate that opens a route, even where it is
// trusted by mistake.
func (r caRole) usage() []x509.ExtKeyUsage {
	if r == clusterCA {
		return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
}

// leafRole is what a node shows a certificate for.
type leafRole string

const (
	serverLeaf leafRole = "server" // the NATS client port
	apiLeaf    leafRole = "api"    // the membership API
	routeLeaf  leafRole = "route"  // the routes: server and client of each other
)

func leafRoles() []leafRole { return []leafRole{serverLeaf, apiLeaf, routeLeaf} }

func (r leafRole) authority() caRole {
	if r == routeLeaf {
		return clusterCA
	}
	return clientCA
}

// usage is the exact set a leaf of this role carries.
func (r leafRole) usage() []x509.ExtKeyUsage { return r.authority().usage() }

// pkiDir is the directory the authorities live in, one sub-directory per node.
type pkiDir string

func (d pkiDir) caCert(r caRole) string { return filepath.Join(string(d), string(r)+".crt") }
func (d pkiDir) caKey(r caRole) string  { return filepath.Join(string(d), string(r)+".key") }

// node is the directory of one node's leaves; it is laid out as the tls/
// directory on the node itself.
func (d pkiDir) node(name string) leafDir { return leafDir(filepath.Join(string(d), name)) }

type leafDir string

func (d leafDir) cert(r leafRole) string { return filepath.Join(string(d), string(r)+".crt") }
func (d leafDir) key(r leafRole) string  { return filepath.Join(string(d), string(r)+".key") }

// keyPair is a private key with its certificate.
type keyPair struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// minter makes keys and certificates as of one moment.
type minter struct {
	now  time.Time
	rand io.Reader
}

// authority makes a new self-signed authority that can sign leaves only.
func (m minter) authority(role caRole) (*keyPair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), m.rand)
	if err != nil {
		return nil, fmt.Errorf("make the key of the %s: %w", role, err)
	}
	tag, err := m.bits(32)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		// The tag tells an authority from its successor in messages and tables.
		Subject:               pkiSubject(string(role), fmt.Sprintf("unibus %s %08x", role, tag)),
		NotBefore:             m.now.Add(-backdate),
		NotAfter:              m.now.Add(caLifetime - backdate),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		ExtKeyUsage:           role.usage(),
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	return m.sign(template, key, &keyPair{cert: template, key: key})
}

// leaf makes a node's certificate for one role, good for exactly these names
// (addresses or DNS names). It never outlives its authority.
func (m minter) leaf(ca *keyPair, role leafRole, node string, names []string) (*keyPair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), m.rand)
	if err != nil {
		return nil, fmt.Errorf("make the %s key of %s: %w", role, node, err)
	}
	template := &x509.Certificate{
		Subject:               pkiSubject(string(role), node),
		NotBefore:             latest(m.now.Add(-backdate), ca.cert.NotBefore),
		NotAfter:              earliest(m.now.Add(leafLifetime-backdate), ca.cert.NotAfter),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           role.usage(),
		BasicConstraintsValid: true,
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	return m.sign(template, key, ca)
}

func (m minter) sign(template *x509.Certificate, key crypto.Signer, ca *keyPair) (*keyPair, error) {
	serial, err := m.bits(128)
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(m.rand, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of %s: %w", template.Subject.CommonName, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back the certificate of %s: %w", template.Subject.CommonName, err)
	}
	return &keyPair{cert: cert, key: key}, nil
}

func (m minter) bits(n int) (*big.Int, error) {
	raw := make([]byte, n/8)
	if _, err := io.ReadFull(m.rand, raw); err != nil {
		return nil, fmt.Errorf("read randomness: %w", err)
	}
	return new(big.Int).SetBytes(raw), nil
}

func pkiSubject(role, name string) pkix.Name {
	return pkix.Name{
		Organization:       []string{pkiOrganization},
		OrganizationalUnit: []string{role},
		CommonName:         name,
	}
}

// subjectRole is the role a certificate was made for, "" when it is none of ours.
func subjectRole(cert *x509.Certificate) string {
	s := cert.Subject
	if !slices.Equal(s.Organization, []string{pkiOrganization}) || len(s.OrganizationalUnit) != 1 {
		return ""
	}
	return s.OrganizationalUnit[0]
}

// leafNames are the names every certificate of a node is good for: how others
// reach it, and how its own services do.
func leafNames(n node) []string {
	var names []string
	for _, name := range []string{n.public, n.private, n.name, "localhost", "127.0.0.1", "::1"} {
		if name = canonicalName(name); name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// canonicalName gives an address or DNS name the one spelling it is compared in.
func canonicalName(name string) string {
	name = strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	if ip := net.ParseIP(name); ip != nil {
		return ip.String()
	}
	return strings.ToLower(strings.TrimSuffix(name, "."))
}

// certNames are the names a certificate is good for, spelled as leafNames does.
func certNames(cert *x509.Certificate) []string {
	var names []string
	for _, name := range cert.DNSNames {
		names = append(names, canonicalName(name))
	}
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	return names
}

// write stores a pair. The key goes first: a crash in between leaves a
// certificate that does not match its key, which every check names, and never
// a certificate whose key is lost.
func (p *keyPair) write(certPath, keyPath string, force bool) error {
	if err := p.writeKey(keyPath, force); err != nil {
		return err
	}
	return writeFile(certPath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw}), 0o644, force)
}

func (p *keyPair) writeKey(path string, force bool) error {
	der, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	return writeFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600, force)
}

// readCerts reads a file of one or more certificates and nothing else.
func readCerts(path string) ([]*x509.Certificate, error) {
	blocks, err := readPEM(path, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for _, der := range blocks {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("holds no certificate: %w", err)
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

// readCert reads a file of exactly one certificate.
func readCert(path string) (*x509.Certificate, error) {
	certs, err := readCerts(path)
	if err != nil {
		return nil, err
	}
	if len(certs) != 1 {
		return nil, fmt.Errorf("holds %d certificates, not one", len(certs))
	}
	return certs[0], nil
}

// readKey reads a file of exactly one PKCS #8 private key.
func readKey(path string) (crypto.Signer, error) {
	blocks, err := readPEM(path, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	if len(blocks) != 1 {
		return nil, fmt.Errorf("holds %d keys, not one", len(blocks))
	}
	key, err := x509.ParsePKCS8PrivateKey(blocks[0])
	if err != nil {
		return nil, fmt.Errorf("holds no private key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("holds a key that cannot sign")
	}
	return signer, nil
}

// readPEM returns the blocks of a file that has blocks of one kind only. Its
// errors say what the file is, to be put after the file's name.
func readPEM(path, kind string) ([][]byte, error) {
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, errMissing
	case err != nil:
		return nil, fmt.Errorf("cannot be read: %w", errors.Unwrap(err))
	}
	var blocks [][]byte
	for len(bytes.TrimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("is no PEM file, or damaged")
		}
		if block.Type != kind {
			return nil, fmt.Errorf("holds a %s, not a %s", block.Type, kind)
		}
		blocks, data = append(blocks, block.Bytes), rest
	}
	if len(blocks) == 0 {
		return nil, errors.New("is empty")
	}
	return blocks, nil
}

var errMissing = errors.New("is missing")

// samePublic reports whether the two halves belong together.
func samePublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
