package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus/kv"
)

// serverInfo is what a server says before anybody has proven anything.
type serverInfo struct {
	ID           string `json:"server_id"`
	Name         string `json:"server_name"`
	Version      string `json:"version"`
	AuthRequired bool   `json:"auth_required"`
	TLSRequired  bool   `json:"tls_required"`
	Nonce        string `json:"nonce"`
}

// greet reads the INFO of a server and proves that it is ours.
func (v *doctorVisit) greet(ctx context.Context, p *patient) {
	ctx, cancel := context.WithTimeout(ctx, questionWithin)
	defer cancel()
	info, err := readGreeting(ctx, hostOf(p.natsURL))
	if err != nil {
		v.add(severityCritical, p.name, "nats.tls", "systemctl status unibus-nats, on the node", "does not answer: %v", err)
		return
	}
	p.info = info
	if p.known == nil && info.Name != "" {
		p.name = info.Name
	}
	why := ""
	switch {
	case p.known != nil && info.Name != p.name:
		why = fmt.Sprintf("another server answers there: %s", quote(info.Name))
	case !info.AuthRequired:
		why = "asks nobody to authenticate"
	case !info.TLSRequired:
		why = "does not require TLS"
	default:
		why = v.handshake(ctx, hostOf(p.natsURL))
	}
	v.test(p.name, "nats.tls", "unibusctl pki status --connect "+hostOf(p.natsURL), "TLS, signed by the CA of --ca", why)
	why = ""
	if !serverAtFloor(info.Version) {
		why = fmt.Sprintf("runs nats-server %s, which lets clients around the auth callout; 2.15.2 or 2.14.9 is the oldest good one", quote(info.Version))
	}
	v.test(p.name, "nats.version", "install nats-server v2.15.2, one node at a time", "nats-server "+info.Version, why)
}

// serverAtFloor is the callout's own rule: 2.15.2, or 2.14.9 in its line.
func serverAtFloor(version string) bool {
	core, pre, _ := strings.Cut(version, "-")
	var n [3]int
	parts := strings.Split(core, ".")
	if len(parts) != 3 {
		return false
	}
	for i, s := range parts {
		x, err := strconv.ParseUint(s, 10, 16)
		if err != nil {
			return false
		}
		n[i] = int(x)
	}
	floor := oldestServer
	if n[0] == 2 && n[1] == 14 {
		floor = [3]int{2, 14, 9}
	}
	order := slices.Compare(n[:], floor[:])
	return order > 0 || order == 0 && pre == ""
}

func readGreeting(ctx context.Context, address string) (info serverInfo, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return info, err
	}
	defer func() { _ = conn.Close() }()
	setDeadline(ctx, conn)
	line, err := bufio.NewReaderSize(conn, 64<<10).ReadSlice('\n')
	if err != nil {
		return info, err
	}
	return info, json.Unmarshal([]byte(strings.TrimPrefix(string(line), "INFO ")), &info)
}

func setDeadline(ctx context.Context, conn net.Conn) {
	if by, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(by)
	}
}

// handshake says what keeps a client that trusts --ca from this server.
func (v *doctorVisit) handshake(ctx context.Context, address string) string {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = conn.Close() }()
	trust, err := kv.Trust(v.set.ca)
	if err != nil {
		return err.Error()
	}
	trust.ServerName, _, _ = net.SplitHostPort(address)
	session := tls.Client(&greetedConn{Conn: conn, in: bufio.NewReaderSize(conn, 64<<10)}, trust)
	if err := session.HandshakeContext(ctx); err != nil {
		return "its certificate is not good for --ca: " + err.Error()
	}
	return ""
}

// inspect asks what needs no probe user.
func (v *doctorVisit) inspect(ctx context.Context, p *patient) {
	var work sync.WaitGroup
	work.Go(func() { v.membership(ctx, p) })
	if p.apiURL != "" {
		work.Go(func() { v.certificate(ctx, p, "cert.api", livePort{hostOf(p.apiURL), apiLeaf}) })
	}
	if p.known != nil {
		route := net.JoinHostPort(v.inv.routeAddress(*p.known), strconv.Itoa(p.known.ports.route))
		work.Go(func() { v.certificate(ctx, p, "cert.route", livePort{route, routeLeaf}) })
		work.Go(func() { v.route(ctx, p, route) })
		work.Go(func() { v.outside(ctx, p) })
	}
	if p.info.ID != "" {
		work.Go(func() { v.certificate(ctx, p, "cert.client", livePort{hostOf(p.natsURL), serverLeaf}) })
		work.Go(func() { v.strangers(p) })
		work.Go(func() { v.serverSays(ctx, p) })
	}
	work.Wait()
}

// strangers tries to get in with nothing, and with a key nobody registered.
func (v *doctorVisit) strangers(p *patient) {
	kp, err := nkeys.CreateUser()
	if err != nil {
		v.add(severityUnknown, p.name, "deny.unknown", "", "no key could be made: %v", err)
		return
	}
	pub, _ := kp.PublicKey()
	v.refused(p, "deny.anonymous", "unibusctl config check, on the node")
	v.refused(p, "deny.unknown", "journalctl -u unibus-authcallout, on the node", nats.Nkey(pub, kp.Sign))
}

// refused wants an answer, and the answer no.
func (v *doctorVisit) refused(p *patient, check, next string, with ...nats.Option) {
	started := v.now()
	nc, err := nats.Connect(p.natsURL, v.natsOptions(with...)...)
	took := v.now().Sub(started).Round(time.Millisecond)
	why := ""
	switch {
	case err == nil:
		nc.Close()
		why = "ADMITTED"
	case !errors.Is(err, nats.ErrAuthorization):
		why = fmt.Sprintf("was not refused but heard nothing: %v", err)
	}
	v.test(p.name, check, next, fmt.Sprintf("refused in %s", took), why)
}

// membership asks /healthz, and the clock on the way.
func (v *doctorVisit) membership(ctx context.Context, p *patient) {
	if p.apiURL == "" {
		v.skip("the API of " + p.name + ": give its --api-url")
		return
	}
	trust, err := kv.Trust(v.set.ca)
	if err != nil {
		return // said at the start
	}
	var date string
	client := &http.Client{
		Timeout:   questionWithin,
		Transport: dated{&http.Transport{TLSClientConfig: trust, DisableKeepAlives: true}, &date},
	}
	began := v.now()
	h := oneHealth(ctx, client, p.apiURL)
	ended := v.now()
	next, why := "unibusctl cluster status", ""
	switch {
	case !h.Reached:
		why = "does not answer: " + h.Error
		next = "systemctl status unibus-membership, on the node"
	case p.known != nil && h.Node != p.name:
		why = fmt.Sprintf("another node answers there: %s", quote(h.Node))
	case !h.Ready:
		why = "may not serve: " + h.Error
	}
	v.test(p.name, "membership", next, "healthz 200, "+h.Version, why)
	if !h.Reached {
		return
	}
	at, err := http.ParseTime(date)
	off := clockOffset(at, began, ended)
	fix := "chronyc tracking, on the node"
	switch {
	case err != nil:
		v.add(severityUnknown, p.name, "clock", fix, "the API tells no time")
	case strings.Contains(h.Error, "clock:"):
		v.add(severityCritical, p.name, "clock", fix, "the service and the streams disagree: %s", h.Error)
	case off.Abs() >= 5*time.Second:
		v.add(severityCritical, p.name, "clock", fix, "off by %s or more from this machine's", off.Round(100*time.Millisecond))
	case off.Abs() >= 2*time.Second:
		v.add(severityWarning, p.name, "clock", fix, "off by %s or more from this machine's", off.Round(100*time.Millisecond))
	default:
		v.add(severityOK, p.name, "clock", "", "as this machine's, to the second")
	}
}

// clockOffset is by how much a date of whole seconds, said between two moments,
// must be off: zero while any clock that is right could have said it.
func clockOffset(said, began, ended time.Time) time.Duration {
	if ahead := said.Sub(ended); ahead > 0 {
		return ahead
	}
	if behind := said.Add(time.Second).Sub(began); behind < 0 {
		return behind
	}
	return 0
}

// dated notes the Date of the answer.
type dated struct {
	http.RoundTripper
	date *string
}

func (d dated) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := d.RoundTripper.RoundTrip(req)
	if err == nil {
		*d.date = resp.Header.Get("Date")
	}
	return resp, err
}

// certificate judges what a live port shows.
func (v *doctorVisit) certificate(ctx context.Context, p *patient, check string, port livePort) {
	ctx, cancel := context.WithTimeout(ctx, questionWithin)
	defer cancel()
	row := v.liveRow(ctx, "", port)
	next := fmt.Sprintf("unibusctl pki renew --node %s ...", p.name)
	switch row.Severity {
	case severityOK:
		if port.role != routeLeaf {
			if why := v.trusted(ctx, port.address, port.role); why != "" {
				v.add(severityCritical, p.name, check, next, "%s", why)
				return
			}
		}
		v.add(severityOK, p.name, check, "", "%d days left", row.Days)
	case severityUnknown:
		v.add(severityCritical, p.name, check, "unibusctl pki status --connect "+port.address, "%s", row.Note)
	default:
		v.add(row.Severity, p.name, check, next, "%s", row.Note)
	}
}

// trusted is a handshake with the trust of --ca.
func (v *doctorVisit) trusted(ctx context.Context, address string, role leafRole) string {
	if role == serverLeaf {
		return v.handshake(ctx, address)
	}
	trust, err := kv.Trust(v.set.ca)
	if err != nil {
		return err.Error()
	}
	conn, err := (&tls.Dialer{Config: trust}).DialContext(ctx, "tcp", address)
	if err != nil {
		return "its certificate is not good for --ca: " + err.Error()
	}
	_ = conn.Close()
	return ""
}

// route tries to join the cluster without a certificate, and with one of
// another authority; on the node itself, with the one its clients see.
func (v *doctorVisit) route(ctx context.Context, p *patient, address string) {
	tries := map[string][]tls.Certificate{"no certificate": nil}
	if own, err := v.foreignLeaf(); err == nil {
		tries["a certificate of another authority"] = []tls.Certificate{own}
	}
	if v.etc != "" && v.node == p.name {
		leaf := leafDir(filepath.Join(v.etc, "tls"))
		if pair, err := tls.LoadX509KeyPair(leaf.cert(serverLeaf), leaf.key(serverLeaf)); err == nil {
			tries["a certificate of the client CA"] = []tls.Certificate{pair}
		}
	}
	why := ""
	for with, certs := range tries {
		if said := tryRoute(ctx, address, certs); said != "" {
			why = fmt.Sprintf("with %s: %s", with, said)
		}
	}
	v.test(p.name, "route.tls", "unibusctl config check, on the node: cluster { tls { verify: true } }", fmt.Sprintf("TLS only, and %d strangers refused", len(tries)), why)
}

func (v *doctorVisit) foreignLeaf() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), v.rand)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: v.now().Add(-time.Hour), NotAfter: v.now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(v.rand, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// tryRoute says what is wrong: nothing when the server breaks the connection
// off. With TLS 1.3 the client's own handshake is done before the server has
// judged its certificate, so the verdict is the first thing read.
func tryRoute(ctx context.Context, address string, certs []tls.Certificate) string {
	ctx, cancel := context.WithTimeout(ctx, questionWithin)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return "does not answer: " + err.Error()
	}
	defer func() { _ = conn.Close() }()
	setDeadline(ctx, conn)
	session := tls.Client(conn, &tls.Config{
		// Who they are is another check; this one is about whom they take us for.
		InsecureSkipVerify: true,
		MinVersion:         tls.VersionTLS12,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if len(certs) == 0 {
				return &tls.Certificate{}, nil
			}
			return &certs[0], nil
		},
	})
	if err := session.HandshakeContext(ctx); err != nil {
		var plain tls.RecordHeaderError
		if errors.As(err, &plain) {
			return "speaks in clear, without TLS"
		}
		return timedOut(err)
	}
	if _, err := session.Read(make([]byte, 1)); err != nil {
		return timedOut(err)
	}
	return "ADMITTED: the server went on to speak"
}

// timedOut is a fault: whoever is refused is told or cut off at once.
func timedOut(err error) string {
	if e := net.Error(nil); errors.As(err, &e) && e.Timeout() {
		return "was not refused in time"
	}
	return ""
}

// outside knocks at what shall listen on loopback only.
func (v *doctorVisit) outside(ctx context.Context, p *patient) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	own := ownAddresses()
	var addresses []string
	local := false
	for _, address := range p.known.addresses() {
		ip := net.ParseIP(address)
		local = local || ip != nil && (ip.IsLoopback() || slices.Contains(own, ip.String()))
		if ip == nil || !ip.IsLoopback() {
			addresses = append(addresses, address)
		}
	}
	if local {
		addresses = append(addresses, own...)
	}
	if len(addresses) == 0 {
		v.skip("monitors from outside: this machine has no address but loopback")
		return
	}
	doors := map[string]int{"monitor": p.known.ports.monitor, "membership's admin listener": p.known.ports.membershipAdmin, "authcallout's admin listener": p.known.ports.authcalloutAdmin}
	var mu sync.Mutex
	open := []string{}
	var work sync.WaitGroup
	for name, port := range doors {
		for _, address := range addresses {
			work.Go(func() {
				conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(address, strconv.Itoa(port)))
				if err != nil {
					return
				}
				_ = conn.Close()
				mu.Lock()
				defer mu.Unlock()
				open = append(open, fmt.Sprintf("%s answers on %s:%d", name, address, port))
			})
		}
	}
	work.Wait()
	slices.Sort(open)
	v.test(p.name, "monitor.loopback", "unibusctl config check, on the node: http: \"127.0.0.1:8222\"", "not to be reached from outside", strings.Join(open, "; "))
}

// ownAddresses are those of this machine, without loopback and link-local ones.
func ownAddresses() (out []string) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLoopback() && !n.IP.IsLinkLocalUnicast() {
			out = append(out, n.IP.String())
		}
	}
	return out
}

// varz is the part of a server's own account of itself that is judged.
type varz struct {
	HTTPHost  string `json:"http_host"`
	HTTPPort  int    `json:"http_port"`
	HTTPSPort int    `json:"https_port"`
	Digest    string `json:"config_digest"`
	Metadata  map[string]string
	Gateway   struct{ Port int }
	Leaf      struct {
		Port    int
		Remotes []struct{}
	}
	MQTT      struct{ Port int }
	Websocket struct{ Port int }
	JetStream struct {
		Config *struct {
			SyncAlways bool `json:"sync_always"`
			Strict     bool `json:"strict"`
		}
	}
}

// serverSays asks a server about itself: as sys from anywhere, or on its own
// machine by the monitor.
func (v *doctorVisit) serverSays(ctx context.Context, p *patient) {
	ctx, cancel := context.WithTimeout(ctx, questionWithin)
	defer cancel()
	z, asked, err := v.askVarz(ctx, p)
	if !asked {
		v.skip("what the server of " + p.name + " says of itself: give --sys-seed")
		return
	}
	if err != nil {
		v.add(severityUnknown, p.name, "listeners", "nats --context unibus-sys server report", "the server does not tell about itself: %v", err)
		return
	}
	why := []string{}
	for name, port := range map[string]int{"gateway": z.Gateway.Port, "leafnode": z.Leaf.Port, "mqtt": z.MQTT.Port, "websocket": z.Websocket.Port, "https monitor": z.HTTPSPort} {
		if port != 0 {
			why = append(why, fmt.Sprintf("%s listener on port %d", name, port))
		}
	}
	if len(z.Leaf.Remotes) > 0 {
		why = append(why, "leafnode remotes")
	}
	if !isLoopback(z.HTTPHost) {
		why = append(why, fmt.Sprintf("the monitor is bound to %s, not to loopback", quote(z.HTTPHost)))
	}
	slices.Sort(why)
	v.test(p.name, "listeners", "unibusctl config check, on the node", "no leafnode, websocket, mqtt or gateway; the monitor on loopback", strings.Join(why, "; "))
	fault := ""
	if c := z.JetStream.Config; c == nil || !c.SyncAlways || !c.Strict {
		fault = "jetstream is off, or runs without sync_interval: always or strict: true"
	}
	v.test(p.name, "durability", "unibusctl config check, on the node", "every write is synced before it is acknowledged", fault)
	v.drift(ctx, p, z.Digest)
}

func (v *doctorVisit) askVarz(ctx context.Context, p *patient) (z varz, asked bool, err error) {
	if v.sysSeed != "" {
		nc, err := kv.Connect(kv.Link{URL: p.natsURL, SeedFile: v.sysSeed, CAFile: v.set.ca, Name: "unibus doctor", Inbox: "_INBOX_sys", Timeout: dialTimeout, Once: true})
		if err != nil {
			return z, true, err
		}
		defer nc.Close()
		m, err := nc.RequestWithContext(ctx, "$SYS.REQ.SERVER."+p.info.ID+".VARZ", nil)
		if err != nil {
			return z, true, err
		}
		var answer struct{ Data *varz }
		if err := json.Unmarshal(m.Data, &answer); err != nil || answer.Data == nil {
			return z, true, fmt.Errorf("no VARZ in %.80q", m.Data)
		}
		return *answer.Data, true, nil
	}
	if p.known == nil || !slices.ContainsFunc(p.known.addresses(), func(s string) bool { return isLoopback(s) || slices.Contains(ownAddresses(), s) }) {
		return z, false, nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/varz", p.known.ports.monitor), nil)
	if err != nil {
		return z, true, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return z, true, err
	}
	defer func() { _ = resp.Body.Close() }()
	return z, true, json.NewDecoder(http.MaxBytesReader(nil, resp.Body, 1<<20)).Decode(&z)
}

var digestForm = regexp.MustCompile(`[0-9a-f]{64}`)

// drift compares the running configuration with the one on disk.
func (v *doctorVisit) drift(ctx context.Context, p *patient, runs string) {
	if v.etc == "" || v.node != p.name {
		return
	}
	binary, err := findServer(v.server)
	if err != nil {
		v.add(severityUnknown, p.name, "config", "--nats-server BINARY", "not compared: %v", err)
		return
	}
	out, err := runServer(ctx, binary, "-t", "-c", filepath.Join(v.etc, filepath.FromSlash(mainConf)))
	disk := digestForm.FindString(out)
	why := ""
	switch {
	case err != nil:
		why = "the server refuses the configuration on disk: " + oneLine(out)
	case disk == "" || disk != digestForm.FindString(runs):
		why = "the server runs another configuration than the one on disk"
	}
	v.test(p.name, "config", "unibusctl config check --dir "+v.etc+", then reload the server", "the server runs what is on disk", why)
}
