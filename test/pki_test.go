package test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	sdk "unibus.internal/bus/client"
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
		greeting, err := routeGreeting(t, c, test.shown)
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
func routeGreeting(t *testing.T, c *cluster.Cluster, leaf string) (string, error) {
	t.Helper()
	return greetingFor(t, c, filepath.Join(c.PKI(), c.Node(2)), leaf)
}

func greetingFor(t *testing.T, c *cluster.Cluster, dir, leaf string) (string, error) {
	t.Helper()
	conn, lines := dialRoute(t, c, dir, leaf)
	if conn == nil {
		return "", errors.New("no handshake")
	}
	defer func() { _ = conn.Close() }()
	return lines.ReadString('\n')
}

// dialRoute connects to the route port of n1 with a certificate of dir; conn is
// nil if that was refused.
func dialRoute(t *testing.T, c *cluster.Cluster, dir, leaf string) (net.Conn, *bufio.Reader) {
	t.Helper()
	config := &tls.Config{RootCAs: trust(t, c, "cluster-ca")}
	if leaf != "" {
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, leaf+".crt"), filepath.Join(dir, leaf+".key"))
		if err != nil {
			t.Fatal(err)
		}
		// Offered whatever the server asks for: the refusal must be its own.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	conn, err := tls.Dial("tcp", cluster.Loopback(c.Ports[0].Route), config)
	if err != nil {
		return nil, nil
	}
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn, bufio.NewReader(conn)
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

// TestAuthorities replaces both authorities and every certificate of a cluster
// that is in use, with the commands of docs/operations.md: no process is
// restarted, no route dropped, nobody refused. Each stage is tried out of its
// turn, and with one node that is not where it should be.
func TestAuthorities(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	w.adminSeed(w.admin)
	w.WaitHealthy(30 * time.Second)
	p := &authorities{w: w, t: t, users: filepath.Join(w.Dir, "users-ca.crt")}
	p.give()
	old := filepath.Join(w.Dir, "old-pki")
	if err := os.CopyFS(old, os.DirFS(w.PKI())); err != nil {
		t.Fatal(err)
	}

	w.Term(3, cluster.Membership)
	p.refuses(3, "n3 does not show the certificate of its api port", "renew", "--all")
	w.StartNode(3, cluster.Membership)
	w.WaitHealthy(30 * time.Second)

	pids, routes := p.pids(), w.routes()
	p.connect(12)

	p.refuses(1, "the stage before is trust", p.stage("cluster", "issue")...)
	p.runs(0, "n1", "renew", "--all")
	if r := p.status(); r.Code != 0 {
		t.Errorf("renewed: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}

	// The cluster CA, behind whose back n2 is put where it should not be.
	p.runs(3, "reloaded", p.stage("cluster", "trust")...)
	p.refuses(1, "the stage before is issue", p.stage("cluster", "retire")...)
	both := p.swap(2, "cluster-ca.crt", filepath.Join(old, "cluster-ca.crt"))
	p.refuses(1, "n2 does not trust unibus cluster-route CA", p.stage("cluster", "issue")...)
	if r := p.status(); r.Code != 1 || !strings.Contains(r.Stdout, "the running server trusts others") {
		t.Errorf("n2 has another file than it runs: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	p.reload(2)
	if err := cluster.WriteFile(filepath.Join(w.Etc(2), "tls", "cluster-ca.crt"), both, 0o644); err != nil {
		t.Fatal(err)
	}
	p.refuses(1, "its route port does not accept it yet", p.stage("cluster", "issue")...)
	p.runs(1, "reloaded", p.stage("cluster", "trust")...) // n2 alone is due
	p.runs(3, "reloaded", p.stage("cluster", "issue")...)
	p.swap(3, "route.key", filepath.Join(old, "n3", "route.key"))
	p.swap(3, "route.crt", filepath.Join(old, "n3", "route.crt"))
	p.refuses(1, "n3 has on its disk a route certificate of unibus cluster-route CA", p.stage("cluster", "retire")...)
	if r := p.status(); r.Code != 1 || !strings.Contains(r.Stdout, "the node shows another one") {
		t.Errorf("n3 has another certificate than it shows: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	p.reload(3)
	p.refuses(1, "route certificate of unibus cluster-route CA", p.stage("cluster", "retire")...)
	p.runs(1, "reloaded", p.stage("cluster", "issue")...)
	p.runs(3, "reloaded", p.stage("cluster", "retire")...)
	if greeting, _ := greetingFor(t, w.Cluster, filepath.Join(old, "n2"), "route"); strings.HasPrefix(greeting, "INFO ") {
		t.Error("a certificate of the old cluster CA still opens a route")
	}

	// The client CA.
	p.runs(0, "client-ca.crt", p.stage("client", "trust")...)
	p.give()
	p.runs(3, "reloaded", p.stage("client", "issue")...)
	p.runs(0, "client-ca.crt", p.stage("client", "retire")...)
	p.give()
	if r := p.status(); r.Code != 0 || strings.Contains(r.Stdout, "is not the one in") {
		t.Errorf("at the end: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := w.In(t).CLI("pki", "verify", "--dir", w.PKI(), "--inventory", w.Inventory()); r.Code != 0 {
		t.Errorf("at the end: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}

	p.all()
	if now := p.pids(); !maps.Equal(now, pids) {
		t.Errorf("processes were restarted: %v, were %v", now, pids)
	}
	if now := w.routes(); !maps.Equal(now, routes) {
		t.Errorf("routes were dropped: %v, were %v", now, routes)
	}

	// What was taken over while running holds at a new connect.
	w.Kill(1, cluster.NATS)
	w.StartNode(1, cluster.NATS)
	w.WaitHealthy(60 * time.Second)
	p.all()
	w.foundNothing()
}

// authorities drives the rotation, with users who connect all the while.
type authorities struct {
	w     *world
	t     *testing.T
	users string // the CA file that users have
	keys  []string
	alive []func() error

	reloads int

	mu               sync.Mutex
	refused, unheard int // connects
	admitted         int
}

// give hands users the CA file as it is now.
func (p *authorities) give() {
	p.t.Helper()
	install(p.t, p.w.CA(), p.users)
}

func (p *authorities) stage(authority, stage string) []string {
	return []string{"rotate-ca", "--authority", authority, "--stage", stage}
}

func (p *authorities) command(args []string) cluster.Result {
	p.t.Helper()
	args = append(append([]string{"pki"}, args...), "--dir", p.w.PKI(), "--inventory", p.w.Inventory(), "--local", p.w.Dir, "--yes")
	env := map[string]string{"UNIBUS_GUARD_OFF": os.Getenv("UNIBUS_GUARD_OFF")} // the rule is unibusctl's own
	return p.w.In(p.t).CLIEnvironment(env, nil, args...)
}

// refuses wants a refusal for that reason, and nothing changed.
func (p *authorities) refuses(code int, why string, args ...string) {
	p.t.Helper()
	before := p.tree()
	if r := p.command(args); r.Code != code || !strings.Contains(r.Stderr, why) {
		p.t.Errorf("pki %s: exit %d, want %d and %q\n%s%s", strings.Join(args, " "), r.Code, code, why, r.Stdout, r.Stderr)
	}
	if after := p.tree(); !maps.Equal(before, after) {
		p.t.Errorf("pki %s was refused and changed files", strings.Join(args, " "))
	}
}

// runs wants so many servers reloaded, and no route dropped.
func (p *authorities) runs(reloads int, says string, args ...string) {
	p.t.Helper()
	r := p.command(args)
	p.t.Logf("pki %s\n%s%s", strings.Join(args, " "), r.Stdout, r.Stderr)
	got := strings.Count(r.Stdout, "reloaded;")
	p.reloads += got
	if r.Code != 0 || !strings.Contains(r.Stdout, says) || (reloads > 0 && got != reloads) || !strings.Contains(r.Stderr, " 0 of them dropped") {
		p.t.Fatalf("pki %s: exit %d, %d servers reloaded, want %d", strings.Join(args, " "), r.Code, got, reloads)
	}
}

func (p *authorities) status() cluster.Result {
	return p.w.In(p.t).CLI("pki", "status", "--dir", p.w.PKI(), "--inventory", p.w.Inventory(), "--live", "--local", p.w.Dir)
}

func (p *authorities) tree() map[string]string {
	p.t.Helper()
	out := map[string]string{}
	dirs := []string{p.w.PKI()}
	for _, i := range p.w.Nodes() {
		dirs = append(dirs, p.w.Etc(i))
	}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			data, err := os.ReadFile(path)
			out[path] = string(data)
			return err
		})
		if err != nil {
			p.t.Fatal(err)
		}
	}
	return out
}

// swap puts another file in the place of one of a node, and returns what was there.
func (p *authorities) swap(i int, name, from string) []byte {
	p.t.Helper()
	to := filepath.Join(p.w.Etc(i), "tls", name)
	was, err := os.ReadFile(to)
	if err != nil {
		p.t.Fatal(err)
	}
	install(p.t, from, to)
	return was
}

// reload has a server take its files over, past the command.
func (p *authorities) reload(i int) {
	p.t.Helper()
	p.reloads++
	if r := p.w.In(p.t).CLI("cluster", "reload", "--node", p.w.Node(i), "--yes"); r.Code != 0 {
		p.t.Fatal(r.Stderr)
	}
}

func (p *authorities) pids() map[string]int {
	out := map[string]int{}
	for _, i := range p.w.Nodes() {
		for _, s := range cluster.Services() {
			out[p.w.Node(i)+" "+string(s)] = p.w.PID(i, s)
		}
	}
	return out
}

// connect has n users on the bus, as programs of the SDK and as stock clients,
// and one more who connects anew all the time.
func (p *authorities) connect(n int) {
	p.t.Helper()
	t := p.t
	for i := range n {
		user := p.w.addUser(fmt.Sprintf("ca-%d", i))
		p.keys = append(p.keys, user.key.NKey())
		if i%2 == 0 {
			c := p.w.dial(t, user, func(cfg *sdk.DialConfig) { cfg.API, cfg.TLS, cfg.CAFile = nil, nil, p.users })
			p.alive = append(p.alive, func() error {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				return c.Flush(ctx)
			})
			continue
		}
		nc, err := nats.Connect(p.w.URLs(p.w.NATSURL), append(user.options(p.users), nats.MaxReconnects(-1), nats.IgnoreAuthErrorAbort(),
			nats.ReconnectWait(100*time.Millisecond), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { p.count(err) }))...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		p.alive = append(p.alive, func() error { return nc.FlushTimeout(10 * time.Second) })
	}
	newcomer := p.w.addUser("ca-newcomer")
	p.keys = append(p.keys, newcomer.key.NKey())
	ctx, stop := context.WithCancel(t.Context())
	var work sync.WaitGroup
	t.Cleanup(func() { stop(); work.Wait() })
	work.Go(func() {
		for i := 1; ctx.Err() == nil; i = i%3 + 1 {
			nc, err := nats.Connect(p.w.NATSURL(i), append(newcomer.options(p.users), nats.NoReconnect(), nats.Timeout(5*time.Second))...)
			p.count(err)
			if err == nil {
				nc.Close()
			}
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
}

func (p *authorities) count(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err == nil:
		p.admitted++
	case errors.Is(err, nats.ErrAuthorization):
		p.refused++
	default:
		p.unheard++
	}
}

// all wants everybody on the bus and nobody refused.
func (p *authorities) all() {
	p.t.Helper()
	for i, alive := range p.alive {
		if err := alive(); err != nil {
			p.t.Errorf("client %d is lost: %v", i, err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	// A server that reloads asks about each of its connections anew; one that has
	// not said yet who it is has no key, and is told no: a matter of milliseconds,
	// and of nats-server. Nobody who has shown a key may be.
	for _, i := range p.w.Nodes() {
		log, err := os.ReadFile(p.w.LogFile(i, cluster.Authcallout))
		if err != nil {
			p.t.Fatal(err)
		}
		for line := range strings.SplitSeq(string(log), "\n") {
			if strings.Contains(line, "result=deny") && slices.ContainsFunc(p.keys, func(key string) bool { return strings.Contains(line, key) }) {
				p.t.Errorf("n%d refused a user: %s", i, line)
			}
		}
	}
	if p.refused > p.reloads || p.admitted == 0 {
		p.t.Errorf("of all connects %d were refused, in %d reloads, %d unheard, %d admitted", p.refused, p.reloads, p.unheard, p.admitted)
	}
	p.t.Logf("connects: %d admitted, %d refused, %d that had to be repeated", p.admitted, p.refused, p.unheard)
}

// routes are all routes by their numbers, which are never used again, once every
// server has one to each other.
func (w *world) routes() map[string]int {
	w.t.Helper()
	out := map[string]int{}
	cluster.WaitFor(w.t, 10*time.Second, "two routes of every server", func() error {
		clear(out)
		for _, i := range w.Nodes() {
			var z struct {
				Routes []struct {
					ID     int    `json:"rid"`
					Remote string `json:"remote_name"`
				} `json:"routes"`
			}
			body, err := w.Monitor(w.t.Context(), i, "/routez")
			if err == nil {
				err = json.Unmarshal(body, &z)
			}
			if err != nil {
				return err
			}
			if len(z.Routes) != 2 {
				return fmt.Errorf("n%d has %d routes", i, len(z.Routes))
			}
			for _, r := range z.Routes {
				out[w.Node(i)+" "+r.Remote] = r.ID
			}
		}
		return nil
	})
	return out
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
