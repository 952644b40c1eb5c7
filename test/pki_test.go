package test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"unibus.internal/test/cluster"
)

// Whoever holds a certificate that clients see, the API's or a server's, gets
// nothing on a route port; and nobody who trusts the client CA takes a route's
// certificate for a server of the bus.
func TestTheTwoAuthoritiesOpenNothingOfEachOther(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Options{})
	route, client := cluster.Loopback(c.Ports[0].Route), cluster.Loopback(c.Ports[0].NATS)

	for _, test := range []struct {
		shown   string // leaf of n2 shown to n1's route port
		greeted bool
	}{
		{"route", true},
		{"server", false},
		{"api", false},
		{"", false},
	} {
		greeting, err := routeGreeting(t, c, route, test.shown)
		if got := strings.HasPrefix(greeting, "INFO "); got != test.greeted {
			t.Errorf("route port, shown the certificate %q: greeting %q, %v", test.shown, greeting, err)
		}
	}

	var unknown x509.UnknownAuthorityError
	if _, err := tls.Dial("tcp", route, &tls.Config{RootCAs: trust(t, c, "client-ca")}); !errors.As(err, &unknown) {
		t.Errorf("who trusts the client CA takes a route port for a server: %v", err)
	}
	nc, err := nats.Connect("tls://"+client, nats.Secure(&tls.Config{RootCAs: trust(t, c, "cluster-ca")}))
	if !errors.As(err, &unknown) {
		t.Errorf("who trusts the cluster CA takes the client port for its own: %v", err)
	}
	if nc != nil {
		nc.Close()
	}
	c.Ops() // the control: the client CA leads to a session
}

// routeGreeting connects to a route port with one of n2's certificates, "" for
// none, and returns the first line the server says.
func routeGreeting(t *testing.T, c *cluster.Cluster, address, leaf string) (string, error) {
	t.Helper()
	config := &tls.Config{RootCAs: trust(t, c, "cluster-ca")}
	if leaf != "" {
		dir := filepath.Join(c.PKI(), c.Node(2))
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, leaf+".crt"), filepath.Join(dir, leaf+".key"))
		if err != nil {
			t.Fatal(err)
		}
		// Offered whatever the server asks for: the refusal must be its own.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return bufio.NewReader(conn).ReadString('\n')
}

func trust(t *testing.T, c *cluster.Cluster, authority string) *x509.CertPool {
	t.Helper()
	pem, err := os.ReadFile(filepath.Join(c.PKI(), authority+".crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		t.Fatalf("%s.crt holds no certificate", authority)
	}
	return pool
}

// A renewal is reloaded without a restart, and `pki status` tells a port that
// shows its file's certificate from one that still has the old one.
func TestRenewedCertificatesAreReloaded(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Options{})
	status := func() cluster.Result {
		return c.CLI("pki", "status", "--dir", c.PKI(),
			"--connect", cluster.Loopback(c.Ports[0].NATS), "--connect", cluster.Loopback(c.Ports[0].Route))
	}
	if r := status(); r.Code != 0 {
		t.Fatalf("before: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := c.CLI("pki", "issue", "--dir", c.PKI(), "--inventory", c.Inventory(), "--node", c.Node(1), "--force"); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	if r := status(); r.Code != 1 || strings.Count(r.Stdout, "install that and reload") < 2 {
		t.Fatalf("renewed, not installed: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	pid := c.PID(1, cluster.NATS)
	for _, name := range []string{"server.crt", "server.key", "route.crt", "route.key"} {
		install(t, filepath.Join(c.PKI(), c.Node(1), name), filepath.Join(c.Etc(1), "tls", name))
	}
	c.Reload(1, cluster.NATS)
	cluster.WaitFor(t, 20*time.Second, "n1 to show its new certificates", func() error {
		if r := status(); r.Code != 0 {
			return fmt.Errorf("exit %d\n%s", r.Code, r.Stdout)
		}
		return nil
	})
	if c.PID(1, cluster.NATS) != pid || !c.Alive(1, cluster.NATS) {
		t.Error("n1 was restarted")
	}
}

func install(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := cluster.WriteFile(to, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
