package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var pkiEpoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

const day = 24 * time.Hour

// pkiLab is a directory with an inventory of two nodes, and a clock.
type pkiLab struct {
	t         *testing.T
	dir       pkiDir
	inventory string
	now       time.Time
}

const labInventory = `UNIBUS_CLUSTER=unibus
ROUTE_NETWORK=private
NODE_1="n1 public=bus1.acme.test private=10.0.0.1"
NODE_2="n2 public=198.18.0.2 private=fd00::2"
`

func newPKILab(t *testing.T) *pkiLab {
	t.Helper()
	root := t.TempDir()
	l := &pkiLab{t: t, dir: pkiDir(filepath.Join(root, "pki")), inventory: filepath.Join(root, "nodes.env"), now: pkiEpoch}
	l.write(l.inventory, []byte(labInventory), 0o644)
	return l
}

// issuedPKILab has both authorities and the certificates of both nodes.
func issuedPKILab(t *testing.T) *pkiLab {
	t.Helper()
	l := newPKILab(t)
	l.must(0, "init", "--dir", string(l.dir))
	l.must(0, "issue", "--dir", string(l.dir), "--inventory", l.inventory)
	return l
}

// run executes `unibusctl pki ARGS`.
func (l *pkiLab) run(args ...string) (code int, out, errs string) {
	var stdout, stderr bytes.Buffer
	a := &app{
		in: strings.NewReader(""), out: &stdout, errw: &stderr,
		getenv: func(string) string { return "" }, now: func() time.Time { return l.now }, rand: rand.Reader,
	}
	code = a.run(l.t.Context(), append([]string{"pki"}, args...))
	return code, stdout.String(), stderr.String()
}

func (l *pkiLab) must(code int, args ...string) string {
	l.t.Helper()
	got, out, errs := l.run(args...)
	if got != code {
		l.t.Fatalf("pki %s: exit %d, want %d\n%s%s", strings.Join(args, " "), got, code, out, errs)
	}
	return out + errs
}

func (l *pkiLab) verify() (int, string) {
	code, out, errs := l.run("verify", "--dir", string(l.dir), "--inventory", l.inventory)
	return code, out + errs
}

func (l *pkiLab) minter() minter { return minter{now: l.now, rand: rand.Reader} }

// ca loads an authority as it is on disk.
func (l *pkiLab) ca(role caRole) *keyPair {
	l.t.Helper()
	return &keyPair{cert: l.cert(l.dir.caCert(role)), key: must(readKey(l.dir.caKey(role)))(l.t)}
}

func (l *pkiLab) cert(path string) *x509.Certificate {
	l.t.Helper()
	return must(readCert(path))(l.t)
}

// plant replaces a pair on disk.
func (l *pkiLab) plant(p *keyPair, certPath, keyPath string) {
	l.t.Helper()
	if err := p.write(certPath, keyPath, true); err != nil {
		l.t.Fatal(err)
	}
}

// plantLeaf replaces a certificate of n1 by one of l's authority ca.
func (l *pkiLab) plantLeaf(ca caRole, as, role leafRole, name string, names []string) {
	l.t.Helper()
	pair := must(l.minter().leaf(l.ca(ca), as, name, names))(l.t)
	l.plant(pair, l.dir.node("n1").cert(role), l.dir.node("n1").key(role))
}

func (l *pkiLab) write(path string, data []byte, mode os.FileMode) {
	l.t.Helper()
	if err := os.WriteFile(path, data, mode); err != nil {
		l.t.Fatal(err)
	}
}

func (l *pkiLab) copy(from, to string) {
	l.t.Helper()
	l.write(to, must(os.ReadFile(from))(l.t), 0o600)
}

func (l *pkiLab) do(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// names of n1 as labInventory gives them.
func n1Names() []string {
	return []string{"bus1.acme.test", "10.0.0.1", "n1", "localhost", "127.0.0.1", "::1"}
}

func TestPKIAuthorities(t *testing.T) {
	l := newPKILab(t)
	l.must(0, "init", "--dir", string(l.dir))
	serials := map[string]bool{}
	for _, role := range caRoles() {
		cert := l.cert(l.dir.caCert(role))
		if key, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
			t.Errorf("%s: key %T, want P-256", role, cert.PublicKey)
		}
		if !cert.IsCA || !cert.MaxPathLenZero || cert.MaxPathLen != 0 {
			t.Errorf("%s: CA %v, path length %d", role, cert.IsCA, cert.MaxPathLen)
		}
		if got := cert.NotAfter.Sub(cert.NotBefore); got != 3650*day {
			t.Errorf("%s lives %v", role, got)
		}
		if got := l.now.Sub(cert.NotBefore); got != 5*time.Minute {
			t.Errorf("%s: backdated by %v", role, got)
		}
		// 128 random bits: fewer than 64 would be a one in 2^64 event.
		if n := cert.SerialNumber.BitLen(); n > 128 || n < 64 {
			t.Errorf("%s: serial of %d bits", role, n)
		}
		serials[cert.SerialNumber.String()] = true
		wantMode(t, l.dir.caKey(role), 0o600)
	}
	if len(serials) != 2 {
		t.Error("both authorities have one serial")
	}
	wantMode(t, string(l.dir), 0o700)
	if samePublic(l.cert(l.dir.caCert(clientCA)).PublicKey, l.cert(l.dir.caCert(clusterCA)).PublicKey) {
		t.Error("both authorities have one key")
	}
}

func wantMode(t *testing.T, path string, want os.FileMode) {
	t.Helper()
	if got := must(os.Stat(path))(t).Mode().Perm(); got != want {
		t.Errorf("%s has mode %04o, want %04o", path, got, want)
	}
}

// Each leaf is accepted as what it is for, by the verifier nats-server uses,
// and as nothing else.
func TestPKILeafIsGoodForItsPurposeOnly(t *testing.T) {
	l := issuedPKILab(t)
	serverAuth, clientAuth := x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth
	for _, test := range []struct {
		role       leafRole
		trust      caRole
		as         x509.ExtKeyUsage
		acceptable bool
	}{
		{serverLeaf, clientCA, serverAuth, true},
		{serverLeaf, clientCA, clientAuth, false},
		{serverLeaf, clusterCA, serverAuth, false},
		{serverLeaf, clusterCA, clientAuth, false},
		{apiLeaf, clientCA, serverAuth, true},
		{apiLeaf, clientCA, clientAuth, false},
		{apiLeaf, clusterCA, clientAuth, false},
		{routeLeaf, clusterCA, serverAuth, true},
		{routeLeaf, clusterCA, clientAuth, true},
		{routeLeaf, clientCA, serverAuth, false},
		{routeLeaf, clientCA, clientAuth, false},
	} {
		cert := l.cert(l.dir.node("n1").cert(test.role))
		err := verifyAs(cert, l.cert(l.dir.caCert(test.trust)), test.as, l.now)
		if (err == nil) != test.acceptable {
			t.Errorf("%s leaf, trust in %s, usage %v: %v", test.role, test.trust, test.as, err)
		}
		if life := cert.NotAfter.Sub(cert.NotBefore); life != 397*day {
			t.Errorf("%s lives %v", test.role, life)
		}
		for _, name := range n1Names() {
			if err := cert.VerifyHostname(name); err != nil {
				t.Errorf("%s: %v", test.role, err)
			}
		}
		if err := cert.VerifyHostname("10.0.0.2"); err == nil {
			t.Errorf("%s of n1 also names n2", test.role)
		}
	}
}

func verifyAs(cert, ca *x509.Certificate, usage x509.ExtKeyUsage, now time.Time) error {
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	_, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
	return err
}

// Even where the client CA is trusted on routes by mistake, a certificate it
// signed for both purposes opens none.
func TestPKIClientCACannotSignForRoutes(t *testing.T) {
	l := issuedPKILab(t)
	forged := must(l.minter().leaf(l.ca(clientCA), routeLeaf, "n1", n1Names()))(t)
	if !slices.Contains(forged.cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		t.Fatal("the forged leaf does not even ask for clientAuth")
	}
	if err := verifyAs(forged.cert, l.ca(clientCA).cert, x509.ExtKeyUsageClientAuth, l.now); err == nil {
		t.Error("a leaf of the client CA passes as a route's")
	}
	if err := verifyAs(forged.cert, l.ca(clientCA).cert, x509.ExtKeyUsageServerAuth, l.now); err != nil {
		t.Errorf("the control failed: %v", err)
	}
}

// A leaf never outlives the authority that signed it.
func TestPKILeafEndsWithItsAuthority(t *testing.T) {
	l := newPKILab(t)
	l.must(0, "init", "--dir", string(l.dir))
	l.now = pkiEpoch.Add(3600 * day)
	l.must(0, "issue", "--dir", string(l.dir), "--inventory", l.inventory)
	ca, leaf := l.cert(l.dir.caCert(clientCA)), l.cert(l.dir.node("n1").cert(serverLeaf))
	if !leaf.NotAfter.Equal(ca.NotAfter) {
		t.Errorf("leaf until %v, authority until %v", leaf.NotAfter, ca.NotAfter)
	}
}

func TestPKIVerify(t *testing.T) {
	path := func(parts ...string) string { return filepath.Join(parts...) }
	for _, test := range []struct {
		name  string
		plant func(l *pkiLab)
		code  int
		want  string // in the output; PKI stands for the directory
	}{
		{"nothing wrong", func(*pkiLab) {}, 0, "PKI OK - 16 files checked, all right"},
		{
			"client CA under the cluster CA's name",
			func(l *pkiLab) { l.copy(l.dir.caCert(clientCA), l.dir.caCert(clusterCA)) },
			2, "PKI/cluster-ca.crt: holds the client CA",
		},
		{
			"cluster CA under the client CA's name",
			func(l *pkiLab) { l.copy(l.dir.caCert(clusterCA), l.dir.caCert(clientCA)) },
			2, "PKI/client-ca.crt: holds the cluster-route CA",
		},
		{
			"a bundle of both",
			func(l *pkiLab) {
				both := append(must(os.ReadFile(l.dir.caCert(clusterCA)))(l.t), must(os.ReadFile(l.dir.caCert(clientCA)))(l.t)...)
				l.write(l.dir.caCert(clusterCA), both, 0o644)
			},
			2, "PKI/cluster-ca.crt: holds the client CA",
		},
		{
			"old and new CA in one file, as during a rotation",
			func(l *pkiLab) {
				next := must(l.minter().authority(clusterCA))(l.t)
				old := must(os.ReadFile(l.dir.caCert(clusterCA)))(l.t)
				l.write(l.dir.caCert(clusterCA), append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: next.cert.Raw}), old...), 0o644)
			},
			0, "PKI OK",
		},
		{
			"two authorities with one key",
			func(l *pkiLab) {
				l.plant(selfSigned(l, clusterCA, l.ca(clientCA), nil), l.dir.caCert(clusterCA), l.dir.caKey(clusterCA))
			},
			2, "PKI/cluster-ca.crt: has the same key as PKI/client-ca.crt",
		},
		{
			"an authority that can make authorities",
			func(l *pkiLab) {
				deep := selfSigned(l, clusterCA, l.ca(clusterCA), func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false })
				l.plant(deep, l.dir.caCert(clusterCA), l.dir.caKey(clusterCA))
			},
			2, "PKI/cluster-ca.crt: may make further authorities",
		},
		{
			"a client CA for every purpose",
			func(l *pkiLab) {
				wide := selfSigned(l, clientCA, l.ca(clientCA), func(c *x509.Certificate) { c.ExtKeyUsage = nil })
				l.plant(wide, l.dir.caCert(clientCA), l.dir.caKey(clientCA))
			},
			2, "PKI/client-ca.crt: is not limited to serverAuth",
		},
		{
			"a foreign authority",
			func(l *pkiLab) {
				foreign := selfSigned(l, clientCA, l.ca(clientCA), func(c *x509.Certificate) { c.Subject.Organization = []string{"acme"} })
				l.plant(foreign, l.dir.caCert(clientCA), l.dir.caKey(clientCA))
			},
			2, "PKI/client-ca.crt: is not a client CA of unibus",
		},
		{
			"an authority that is none",
			func(l *pkiLab) {
				plain := selfSigned(l, clientCA, l.ca(clientCA), func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false })
				l.plant(plain, l.dir.caCert(clientCA), l.dir.caKey(clientCA))
			},
			2, "PKI/client-ca.crt: cannot sign certificates",
		},
		{
			"an authority with a changed byte",
			func(l *pkiLab) {
				raw := slices.Clone(l.ca(clusterCA).cert.Raw)
				raw[len(raw)-1] ^= 1
				l.write(l.dir.caCert(clusterCA), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw}), 0o644)
			},
			2, "PKI/cluster-ca.crt: is damaged",
		},
		{
			"a leaf that is an authority",
			func(l *pkiLab) {
				file, key := l.dir.node("n1").cert(routeLeaf), l.dir.node("n1").key(routeLeaf)
				template := *l.cert(file)
				template.IsCA = true
				signer := must(readKey(key))(l.t)
				l.plant(must(l.minter().sign(&template, signer, l.ca(clusterCA)))(l.t), file, key)
			},
			2, "PKI/n1/route.crt: is itself an authority",
		},
		{
			"a leaf under the CA's name",
			func(l *pkiLab) { l.copy(l.dir.node("n1").cert(serverLeaf), l.dir.caCert(clientCA)) },
			2, "PKI/client-ca.crt: is not a client CA of unibus",
		},
		{
			"the other CA's key",
			func(l *pkiLab) { l.copy(l.dir.caKey(clientCA), l.dir.caKey(clusterCA)) },
			2, "PKI/cluster-ca.key: does not belong to PKI/cluster-ca.crt",
		},
		{
			"CA keys kept offline",
			func(l *pkiLab) { l.do(os.Remove(l.dir.caKey(clientCA))); l.do(os.Remove(l.dir.caKey(clusterCA))) },
			0, "PKI OK",
		},
		{
			"no CA",
			func(l *pkiLab) { l.do(os.Remove(l.dir.caCert(clientCA))) },
			2, "PKI/client-ca.crt: is missing: put the right file back",
		},
		{
			"a CA key others can read",
			func(l *pkiLab) { l.do(os.Chmod(l.dir.caKey(clientCA), 0o604)) },
			2, "PKI/client-ca.key: is readable by others: chmod 600 PKI/client-ca.key",
		},
		{
			"a leaf key the group can read",
			func(l *pkiLab) { l.do(os.Chmod(l.dir.node("n2").key(routeLeaf), 0o640)) },
			2, "PKI/n2/route.key: is readable by others: chmod 600 PKI/n2/route.key",
		},
		{
			"a directory others can write",
			func(l *pkiLab) { l.do(os.Chmod(string(l.dir), 0o777)) },
			2, "PKI: is writable by others: chmod 700 PKI",
		},
		{
			"a directory others can read",
			func(l *pkiLab) { l.do(os.Chmod(string(l.dir.node("n1")), 0o755)) },
			1, "PKI/n1: is open to others: chmod 700 PKI/n1",
		},
		{
			"a route leaf of the client CA",
			func(l *pkiLab) { l.plantLeaf(clientCA, routeLeaf, routeLeaf, "n1", n1Names()) },
			2, "PKI/n1/route.crt: is signed by the client CA, not by the cluster-route CA",
		},
		{
			"a server leaf of the cluster CA",
			func(l *pkiLab) { l.plantLeaf(clusterCA, serverLeaf, serverLeaf, "n1", n1Names()) },
			2, "PKI/n1/server.crt: is signed by the cluster-route CA, not by the client CA",
		},
		{
			"a leaf of an unknown authority",
			func(l *pkiLab) {
				stranger := must(l.minter().authority(clientCA))(l.t)
				pair := must(l.minter().leaf(stranger, apiLeaf, "n1", n1Names()))(l.t)
				l.plant(pair, l.dir.node("n1").cert(apiLeaf), l.dir.node("n1").key(apiLeaf))
			},
			2, "PKI/n1/api.crt: is not signed by the client CA in PKI",
		},
		{
			"a route certificate for the client port",
			func(l *pkiLab) { l.plantLeaf(clientCA, routeLeaf, serverLeaf, "n1", n1Names()) },
			2, "PKI/n1/server.crt: is good for serverAuth and clientAuth, not for serverAuth",
		},
		{
			"server and api swapped",
			func(l *pkiLab) { l.plantLeaf(clientCA, apiLeaf, serverLeaf, "n1", n1Names()) },
			2, "PKI/n1/server.crt: is no server certificate of unibus",
		},
		{
			"another node's certificate",
			func(l *pkiLab) { l.plantLeaf(clientCA, serverLeaf, serverLeaf, "n2", n1Names()) },
			2, "PKI/n1/server.crt: belongs to node n2, not n1",
		},
		{
			"an address missing",
			func(l *pkiLab) { l.plantLeaf(clientCA, serverLeaf, serverLeaf, "n1", n1Names()[1:]) },
			2, "PKI/n1/server.crt: does not name bus1.acme.test: unibusctl pki issue --dir PKI --inventory NODES --node n1 --force",
		},
		{
			"an address too many",
			func(l *pkiLab) { l.plantLeaf(clusterCA, routeLeaf, routeLeaf, "n1", append(n1Names(), "10.0.0.2")) },
			2, "PKI/n1/route.crt: names 10.0.0.2, which NODES does not give to n1",
		},
		{
			"a key of another certificate",
			func(l *pkiLab) { l.copy(l.dir.node("n1").key(apiLeaf), l.dir.node("n1").key(serverLeaf)) },
			2, "PKI/n1/server.key: does not belong to PKI/n1/server.crt",
		},
		{
			"a key missing",
			func(l *pkiLab) { l.do(os.Remove(l.dir.node("n1").key(serverLeaf))) },
			2, "PKI/n1/server.key: is missing",
		},
		{
			"a certificate cut short",
			func(l *pkiLab) {
				file := l.dir.node("n1").cert(serverLeaf)
				l.do(os.Truncate(file, must(os.Stat(file))(l.t).Size()/2))
			},
			2, "PKI/n1/server.crt: is no PEM file, or damaged",
		},
		{
			"a key where the certificate should be",
			func(l *pkiLab) { l.copy(l.dir.node("n1").key(serverLeaf), l.dir.node("n1").cert(serverLeaf)) },
			2, "PKI/n1/server.crt: holds a PRIVATE KEY, not a CERTIFICATE",
		},
		{
			"an empty file",
			func(l *pkiLab) { l.do(os.Truncate(l.dir.node("n1").cert(serverLeaf), 0)) },
			2, "PKI/n1/server.crt: is empty",
		},
		{
			"a node without certificates",
			func(l *pkiLab) { l.do(os.RemoveAll(string(l.dir.node("n2")))) },
			2, "PKI/n2: has no certificates: unibusctl pki issue --dir PKI --inventory NODES --node n2",
		},
		{
			"a node that is gone",
			func(l *pkiLab) { l.do(os.Rename(string(l.dir.node("n2")), path(string(l.dir), "n9"))) },
			2, "PKI/n9: belongs to no node of NODES: rm -r PKI/n9",
		},
		{"29 days left", func(l *pkiLab) { l.now = pkiEpoch.Add(368 * day) }, 1, "PKI/n1/server.crt: expires in 28 d: unibusctl pki issue"},
		{"31 days left", func(l *pkiLab) { l.now = pkiEpoch.Add(366*day - time.Hour) }, 0, "PKI OK"},
		{"6 days left", func(l *pkiLab) { l.now = pkiEpoch.Add(391 * day) }, 2, "PKI/n1/route.crt: expires in 5 d"},
		{"expired", func(l *pkiLab) { l.now = pkiEpoch.Add(398 * day) }, 2, "PKI/n2/api.crt: has expired on 2027-04-02"},
		{"clock far behind", func(l *pkiLab) { l.now = pkiEpoch.Add(-time.Hour) }, 2, "PKI/client-ca.crt: is not valid before 2026-03-01"},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := issuedPKILab(t)
			test.plant(l)
			code, out := l.verify()
			out = strings.ReplaceAll(strings.ReplaceAll(out, string(l.dir), "PKI"), l.inventory, "NODES")
			if code != test.code {
				t.Errorf("exit %d, want %d", code, test.code)
			}
			if !strings.Contains("\n"+out, "\n"+test.want) {
				t.Errorf("no line that begins with %q in\n%s", test.want, out)
			}
		})
	}
}

// selfSigned makes an authority certificate of key's, as change leaves it.
func selfSigned(l *pkiLab, role caRole, key *keyPair, change func(*x509.Certificate)) *keyPair {
	l.t.Helper()
	template := *must(l.minter().authority(role))(l.t).cert
	template.PublicKey, template.RawSubject = nil, nil
	template.SubjectKeyId, template.AuthorityKeyId = nil, nil
	if change != nil {
		change(&template)
	}
	self := &keyPair{cert: &template, key: key.key}
	return must(l.minter().sign(&template, key.key, self))(l.t)
}

// The tls directory of a node: CA certificates, its own leaves, keys for the
// services' group.
func TestPKIVerifyOnANode(t *testing.T) {
	l := issuedPKILab(t)
	dir := filepath.Join(t.TempDir(), "tls")
	l.do(os.Mkdir(dir, 0o750))
	for _, role := range caRoles() {
		l.copy(l.dir.caCert(role), pkiDir(dir).caCert(role))
	}
	for _, role := range leafRoles() {
		l.copy(l.dir.node("n1").cert(role), leafDir(dir).cert(role))
		l.copy(l.dir.node("n1").key(role), leafDir(dir).key(role))
		l.do(os.Chmod(leafDir(dir).key(role), 0o640))
	}
	l.must(0, "verify", "--dir", dir)
	l.must(0, "verify", "--dir", dir, "--inventory", l.inventory)
	l.must(0, "status", "--dir", dir)

	l.do(os.Chmod(leafDir(dir).key(apiLeaf), 0o644))
	if out := l.must(2, "verify", "--dir", dir); !strings.Contains(out, "api.key: is readable by others: chmod 640 ") {
		t.Error(out)
	}
	l.do(os.Chmod(leafDir(dir).key(apiLeaf), 0o640))
	l.copy(l.dir.caKey(clientCA), pkiDir(dir).caKey(clientCA))
	if out := l.must(2, "verify", "--dir", dir); !strings.Contains(out, "client-ca.key: is the key of an authority, and this is a node") {
		t.Error(out)
	}
}

// snapshot reads every file below the PKI directory.
func (l *pkiLab) snapshot() map[string]string {
	l.t.Helper()
	files := map[string]string{}
	l.do(filepath.WalkDir(string(l.dir), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		files[path] = string(data)
		return err
	}))
	return files
}

func (l *pkiLab) wantUnchanged(before map[string]string) {
	l.t.Helper()
	after := l.snapshot()
	if len(after) != len(before) {
		l.t.Errorf("%d files, there were %d", len(after), len(before))
	}
	for path, data := range before {
		if after[path] != data {
			l.t.Errorf("%s was changed", path)
		}
	}
}

func TestPKIInitReplacesNothing(t *testing.T) {
	for _, left := range []string{"client-ca.crt", "client-ca.key", "cluster-ca.crt", "cluster-ca.key"} {
		t.Run(left, func(t *testing.T) {
			l := newPKILab(t)
			l.do(os.Mkdir(string(l.dir), 0o700))
			l.write(filepath.Join(string(l.dir), left), []byte("precious"), 0o600)
			before := l.snapshot()
			if out := l.must(1, "init", "--dir", string(l.dir)); !strings.Contains(out, left+" exists already") {
				t.Error(out)
			}
			l.wantUnchanged(before)
			l.must(0, "init", "--dir", string(l.dir), "--force")
			l.must(0, "verify", "--dir", string(l.dir))
		})
	}
}

// A replaced key takes no wide mode over from the file it replaces.
func TestPKIForceNarrowsModes(t *testing.T) {
	l := issuedPKILab(t)
	l.do(os.Chmod(l.dir.node("n1").key(serverLeaf), 0o644))
	l.must(0, "issue", "--dir", string(l.dir), "--inventory", l.inventory, "--node", "n1", "--force")
	wantMode(t, l.dir.node("n1").key(serverLeaf), 0o600)
	l.do(os.Chmod(l.dir.caKey(clientCA), 0o644))
	l.must(0, "init", "--dir", string(l.dir), "--force")
	wantMode(t, l.dir.caKey(clientCA), 0o600)
}

func TestPKIIssueKeepsWhatIsRight(t *testing.T) {
	l := issuedPKILab(t)
	l.do(os.RemoveAll(string(l.dir.node("n2"))))
	before := l.snapshot()
	out := l.must(0, "issue", "--dir", string(l.dir), "--inventory", l.inventory)
	if strings.Count(out, "kept") != 3 || strings.Count(out, "issued") != 3 {
		t.Error(out)
	}
	for path, data := range before {
		if l.snapshot()[path] != data {
			t.Errorf("%s was changed", path)
		}
	}
	l.must(0, "verify", "--dir", string(l.dir), "--inventory", l.inventory)
}

// What is refused is refused before the first file is written, for any node.
func TestPKIIssueRefuses(t *testing.T) {
	for _, test := range []struct {
		name  string
		plant func(l *pkiLab)
		want  string
	}{
		{
			"a certificate for another address",
			func(l *pkiLab) {
				l.write(l.inventory, []byte(strings.ReplaceAll(labInventory, "fd00::2", "fd00::3")), 0o644)
			},
			"n2/server.crt exists and is not replaced",
		},
		{
			"a certificate without its key",
			func(l *pkiLab) { l.do(os.Remove(l.dir.node("n2").key(routeLeaf))) },
			"n2/route.key is missing",
		},
		{
			"an expired certificate",
			func(l *pkiLab) { l.now = pkiEpoch.Add(400 * day) },
			"n1/server.crt has expired",
		},
		{
			"mixed authorities",
			func(l *pkiLab) {
				l.copy(l.dir.caCert(clientCA), l.dir.caCert(clusterCA))
				l.copy(l.dir.caKey(clientCA), l.dir.caKey(clusterCA))
			},
			"cluster-ca.crt holds the client CA",
		},
		{
			"authorities under each other's name",
			func(l *pkiLab) {
				client, cluster := l.ca(clientCA), l.ca(clusterCA)
				l.plant(client, l.dir.caCert(clusterCA), l.dir.caKey(clusterCA))
				l.plant(cluster, l.dir.caCert(clientCA), l.dir.caKey(clientCA))
			},
			"client-ca.crt holds the cluster-route CA",
		},
		{
			"two authorities with one key",
			func(l *pkiLab) {
				l.plant(selfSigned(l, clusterCA, l.ca(clientCA), nil), l.dir.caCert(clusterCA), l.dir.caKey(clusterCA))
			},
			"cluster-ca.crt has the same key as",
		},
		{
			"a CA key others can read",
			func(l *pkiLab) { l.do(os.Chmod(l.dir.caKey(clusterCA), 0o644)) },
			"cluster-ca.key is readable by others",
		},
		{
			"no CA key",
			func(l *pkiLab) { l.do(os.Remove(l.dir.caKey(clusterCA))) },
			"cluster-ca.key is missing",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := issuedPKILab(t)
			l.do(os.RemoveAll(string(l.dir.node("n1")) + "/api.crt"))
			l.do(os.RemoveAll(string(l.dir.node("n1")) + "/api.key"))
			test.plant(l)
			before := l.snapshot()
			if out := l.must(1, "issue", "--dir", string(l.dir), "--inventory", l.inventory); !strings.Contains(out, test.want) {
				t.Errorf("no %q in\n%s", test.want, out)
			}
			l.wantUnchanged(before)
		})
	}
}

// tlsPort serves one kind of port, as nats-server and the API do, until the
// test ends, and returns its address.
func tlsPort(t *testing.T, host string, dir leafDir, role leafRole, greeting string, config *tls.Config) string {
	t.Helper()
	config.Certificates = []tls.Certificate{must(tls.LoadX509KeyPair(dir.cert(role), dir.key(role)))(t)}
	listener := must(net.Listen("tcp", host+":0"))(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, greeting)
			// A client that is refused still has to learn it: the error is its.
			_ = tls.Server(conn, config).Handshake()
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() { _ = listener.Close(); <-done })
	return listener.Addr().String()
}

const natsGreeting = `INFO {"server_id":"N","tls_required":true}` + "\r\n"

func TestPKIStatusOfLivePorts(t *testing.T) {
	l := newPKILab(t)
	l.now = time.Now() // a TLS handshake knows no other clock
	l.must(0, "init", "--dir", string(l.dir))
	l.must(0, "issue", "--dir", string(l.dir), "--inventory", l.inventory)
	n1 := l.dir.node("n1")
	routes := x509.NewCertPool()
	routes.AddCert(l.cert(l.dir.caCert(clusterCA)))
	mutual := func() *tls.Config { return &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: routes} }

	nats := tlsPort(t, "127.0.0.1", n1, serverLeaf, natsGreeting, &tls.Config{})
	api := tlsPort(t, "127.0.0.1", n1, apiLeaf, "", &tls.Config{})
	route := tlsPort(t, "127.0.0.1", n1, routeLeaf, "", mutual())
	out := l.must(0, "status", "--dir", string(l.dir), "--connect", nats, "--connect", api, "--connect", route)
	for _, want := range []string{nats + "  server ", api + "  api ", route + "  route "} {
		if !strings.Contains(strings.Join(strings.Fields(out), " "), strings.Join(strings.Fields(want), " ")) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}

	mixed := tlsPort(t, "127.0.0.1", n1, routeLeaf, natsGreeting, &tls.Config{})
	if out := l.must(2, "status", "--connect", mixed); !strings.Contains(out, "is no server certificate, as this port needs") {
		t.Error(out)
	}
	elsewhere := tlsPort(t, "127.0.0.2", n1, apiLeaf, "", &tls.Config{})
	if out := l.must(2, "status", "--connect", elsewhere); !strings.Contains(out, "does not name 127.0.0.2") {
		t.Error(out)
	}
}

func TestPKIStatusOfOtherPorts(t *testing.T) {
	l := issuedPKILab(t)
	plain := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	t.Cleanup(func() { _ = plain.Close() })
	go func() {
		for {
			conn, err := plain.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, "220 ready\r\n")
			_, _ = bufio.NewReader(conn).Peek(1)
			_ = conn.Close()
		}
	}()
	if out := l.must(3, "status", "--connect", plain.Addr().String()); !strings.Contains(out, "does not speak TLS") {
		t.Error(out)
	}
	closed := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	_ = closed.Close()
	if out := l.must(3, "status", "--connect", closed.Addr().String()); !strings.Contains(out, "no connection") {
		t.Error(out)
	}
	silent := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	t.Cleanup(func() { _ = silent.Close() })
	if out := l.must(3, "status", "--timeout", "50ms", "--connect", silent.Addr().String()); !strings.Contains(out, "no TLS handshake") {
		t.Error(out)
	}
	// What is known to be broken outranks what does not answer.
	l.now = pkiEpoch.Add(400 * day)
	l.must(2, "status", "--dir", string(l.dir), "--connect", closed.Addr().String())
}

// A port that went on with its old certificate after a renewal is found.
func TestPKIStatusNamesAnOldCertificate(t *testing.T) {
	l := newPKILab(t)
	l.now = time.Now()
	l.must(0, "init", "--dir", string(l.dir))
	l.must(0, "issue", "--dir", string(l.dir), "--inventory", l.inventory)
	nats := tlsPort(t, "127.0.0.1", l.dir.node("n1"), serverLeaf, natsGreeting, &tls.Config{})
	l.must(0, "issue", "--dir", string(l.dir), "--inventory", l.inventory, "--force")
	if out := l.must(1, "status", "--dir", string(l.dir), "--connect", nats); !strings.Contains(out, "install that and reload") {
		t.Error(out)
	}
	l.must(0, "init", "--dir", string(l.dir), "--force")
	if out := l.must(2, "status", "--dir", string(l.dir), "--connect", nats); !strings.Contains(out, "is not signed by the client CA") {
		t.Error(out)
	}
}

// An interrupted status ends at once and is no verdict.
func TestPKIStatusInterrupted(t *testing.T) {
	l := issuedPKILab(t)
	silent := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	t.Cleanup(func() { _ = silent.Close() })
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		if conn, err := silent.Accept(); err == nil {
			cancel()
			_ = conn.Close()
		}
	}()
	a := &app{
		in: strings.NewReader(""), out: new(bytes.Buffer), errw: new(bytes.Buffer),
		getenv: func(string) string { return "" }, now: func() time.Time { return l.now }, rand: rand.Reader,
	}
	if code := a.run(ctx, []string{"pki", "status", "--connect", silent.Addr().String()}); code != exitInterrupted {
		t.Errorf("exit %d, want %d", code, exitInterrupted)
	}
}
