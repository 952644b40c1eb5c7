package main

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
	"unibus.internal/services/authcallout/callout"
)

// process is the running service: connections, the View, the callout.
type process struct {
	cfg     config
	log     *slog.Logger
	keys    []callout.Keys
	reg     *prometheus.Registry
	status  atomic.Value // string, for systemd and /readyz
	auth    []*nats.Conn
	ctrl    *nats.Conn
	bus     *nats.Conn
	busKey  string // nkey of bus
	view    *kv.View
	audit   *kv.Audit
	service *callout.Service
	enforce *callout.Enforcer
	ready   atomic.Bool
	leases  chan bool
}

func newProcess(cfg config, log *slog.Logger, keys []callout.Keys) *process {
	p := &process{cfg: cfg, log: log, keys: keys, reg: prometheus.NewRegistry(), leases: make(chan bool, 16)}
	p.say("starting")
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "unibus_build_info", Help: "The running build.",
		ConstLabels: prometheus.Labels{"version": version, "go": runtime.Version(), "service": "authcallout"},
	})
	info.Set(1)
	p.reg.MustRegister(info)
	return p
}

// roots is whom the probes trust, as the connections of kv.Connect do.
func (p *process) roots() (*x509.CertPool, error) { return bus.Roots(p.cfg.ca) }

// say shows in `systemctl status` and /readyz what the process waits for.
func (p *process) say(status string) {
	if p.status.Swap(status) != status {
		_, _ = daemon.SdNotify(false, "STATUS="+status)
		p.log.Info("status", "is", status)
	}
}

func (p *process) natsError(_ *nats.Conn, sub *nats.Subscription, err error) {
	subject := ""
	if sub != nil {
		subject = sub.Subject
	}
	p.log.Error("nats", "err", err, "subject", subject)
}

// serverInfo is what a server says before anybody has proven anything.
type serverInfo struct {
	Version      string `json:"version"`
	AuthRequired bool   `json:"auth_required"`
	TLSRequired  bool   `json:"tls_required"`
	Nonce        string `json:"nonce"`
}

// inspectServer waits for the own server and refuses to start behind one whose
// configuration could admit strangers: no authentication, no nonce to sign, no
// TLS, or a version with a hole in the callout.
func (p *process) inspectServer(ctx context.Context) error {
	for ctx.Err() == nil {
		info, err := readInfo(ctx, p.cfg.natsURL)
		if err != nil {
			p.say("waiting for the own nats-server: " + err.Error())
			_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
			pause(ctx, 500*time.Millisecond)
			continue
		}
		return info.fault(p.cfg.natsURL)
	}
	return nil
}

// fault names what could admit a stranger.
func (i serverInfo) fault(server string) error {
	switch {
	case !i.AuthRequired:
		return fmt.Errorf("%s asks nobody to authenticate: see authorization in conf.d/accounts.conf", server)
	case i.Nonce == "":
		return fmt.Errorf("%s offers no nonce to sign, so no key can be proven: at least one user of its configuration must be an nkey", server)
	case !i.TLSRequired:
		return fmt.Errorf("%s does not require TLS: see conf.d/tls.conf", server)
	case !callout.ServerAtFloor(i.Version):
		return fmt.Errorf("%s is nats-server %s; 2.15.2 or 2.14.9 is the oldest that cannot be tricked around its callout", server, i.Version)
	}
	return nil
}

func readInfo(ctx context.Context, server string) (info serverInfo, err error) {
	u, err := url.Parse(server)
	if err != nil {
		return info, err
	}
	d := net.Dialer{Timeout: 2 * time.Second}
	conn, err := d.DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return info, err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	line, err := bufio.NewReaderSize(conn, 64<<10).ReadString('\n')
	if err != nil {
		return info, err
	}
	return info, json.Unmarshal([]byte(strings.TrimPrefix(line, "INFO ")), &info)
}

func (p *process) connect() (err error) {
	for n := range authConnections {
		nc, err := kv.Connect(p.link(authSeed, fmt.Sprintf("auth %d", n+1)))
		if err != nil {
			return err
		}
		p.auth = append(p.auth, nc)
	}
	if p.ctrl, err = kv.Connect(p.link(ctrlSeed, "control")); err != nil {
		return err
	}
	p.view, err = kv.NewView(kv.ViewConfig{
		Conn: p.ctrl, Service: "authcallout", Node: p.cfg.node, Lease: p.cfg.lease, Log: p.log,
		OnLease:  func(held bool) { p.leases <- held },
		OnChange: func(c kv.Change, done func(kv.Enforced)) { p.enforce.Changed(c, done) },
	})
	if err != nil {
		return err
	}
	p.audit = kv.OpenAudit(kv.AuditConfig{Conn: p.ctrl, Instance: p.view.Instance(), Log: p.log})
	p.service, err = callout.New(callout.Config{
		View: p.view, Keys: p.keys, TTL: p.cfg.ttl, Log: p.log, Metrics: callout.NewMetrics(p.reg), Audit: p.audit, Now: time.Now,
		Swept: func(node string) bool { return p.enforce.Swept(node) },
	})
	if err != nil {
		return err
	}
	if p.bus, err = kv.Connect(p.link(busSeed, "notices")); err != nil {
		return err
	}
	p.enforce = callout.NewEnforcer(callout.EnforcerConfig{
		View: p.view, Service: p.service, Control: p.ctrl, Notices: p.bus, Services: append([]string{p.busKey}, p.cfg.services...),
		Peers: func(ctx context.Context) ([]string, error) { return kv.Peers(ctx, p.ctrl) },
		Node:  p.cfg.node, Limit: p.cfg.perUser, Log: p.log, Metrics: callout.NewEnforceMetrics(p.reg), Now: time.Now,
	})
	p.ctrl.SetReconnectHandler(func(*nats.Conn) { p.enforce.Resync() })
	p.ctrl.SetErrorHandler(func(nc *nats.Conn, sub *nats.Subscription, err error) {
		p.natsError(nc, sub, err)
		if errors.Is(err, nats.ErrSlowConsumer) {
			p.enforce.Resync()
		}
	})
	p.service.Listen(p.auth...)
	p.reg.MustRegister(
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "unibus_audit_dropped_total", Help: "Entries that the audit lost: too many at once, or no quorum for too long.",
		}, func() float64 { return float64(p.audit.Dropped()) }),
		gauge("unibus_lease_held", "1 while decisions may be made.", func() float64 {
			_, held := p.view.Lease()
			return number(held)
		}),
		gauge("unibus_kv_broken_records", "Records that cannot be decoded; each denies its own key.", func() float64 { return float64(len(p.view.Broken())) }),
		gauge("unibus_enforce_connections", "Connections of users known to be open, on all servers.", func() float64 { return float64(p.enforce.Connections()) }),
		gauge("unibus_enforce_connections_closing", "Connections that must be closed and of which no server has said so yet.", func() float64 { return float64(p.enforce.Closing()) }),
	)
	return p.enforce.Watch()
}

func gauge(name, help string, f func() float64) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
}

func number(ok bool) float64 {
	if ok {
		return 1
	}
	return 0
}

func (p *process) closeConnections() {
	for _, nc := range append(p.auth, p.ctrl, p.bus) {
		if nc != nil {
			nc.Close()
		}
	}
}

// serve answers until ctx ends. The lease is released, and the audit written to
// its end, last, when no answer can have an effect any more.
func (p *process) serve(ctx context.Context) int {
	answering, stopAnswering := context.WithCancel(context.WithoutCancel(ctx))
	deciding, stopDeciding := context.WithCancel(context.WithoutCancel(ctx))
	defer stopDeciding()
	defer stopAnswering()
	var work, state sync.WaitGroup
	work.Go(func() { p.service.Run(answering) })
	state.Go(func() { p.view.Run(deciding) })
	state.Go(func() { p.audit.Run(deciding) })
	state.Go(func() { p.enforce.Run(deciding) })
	proven := make(chan error, 1)
	go func() { proven <- p.provePath(answering) }()
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	p.say("waiting for a lease")
	code := 0
loop:
	for {
		select {
		case <-ctx.Done():
			break loop
		case held := <-p.leases:
			p.leaseChanged(ctx, held)
		case err := <-proven:
			if err != nil {
				code = fail(p.log, exitConfig, err)
				break loop
			}
			p.ready.Store(true)
			p.log.Info("proven: the own server asks this service about strangers and refuses them")
		case <-tick.C:
			p.tell(ctx)
		}
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	p.ready.Store(false)
	stopAnswering()
	work.Wait()
	stopDeciding()
	state.Wait()
	p.log.Info("stopped")
	return code
}

func (p *process) leaseChanged(ctx context.Context, held bool) {
	if !held {
		if !guard.Off(guard.FreshReads) { // that control answers from plain reads, lease or not
			p.service.Leave()
		}
		return
	}
	if !p.enforce.SweepOwn(ctx) {
		p.say("waiting for the own server's list of connections")
		return
	}
	if err := p.service.Join(); err != nil {
		p.log.Error("cannot answer", "err", err)
	}
	p.enforce.Resync()
}

// tell feeds the watchdog from this living loop and joins again if an earlier
// try failed.
func (p *process) tell(ctx context.Context) {
	_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
	_, held := p.view.Lease()
	switch {
	case !held:
		p.say("no lease: " + p.view.Fault())
	case !p.service.Joined():
		p.leaseChanged(ctx, true)
	default:
		p.say("answering")
	}
}

// provePath connects to the own server without credentials and with an unknown
// key. Both must be refused, and the second must have been asked of us: a
// server that does not ask would refuse every member, or admit anybody.
func (p *process) provePath(ctx context.Context) error {
	for asked := 0; ctx.Err() == nil; {
		if err := p.view.WaitLease(ctx); err != nil {
			return nil // stopping
		}
		if !p.listening() {
			pause(ctx, 100*time.Millisecond)
			continue
		}
		arrived, admitted, refused := p.probe()
		switch {
		case admitted:
			return fmt.Errorf("%s admits strangers", p.cfg.natsURL)
		case arrived:
			return nil
		case refused && p.service.Joined():
			if asked++; asked == probes {
				return fmt.Errorf("%s refuses strangers without asking this service: see auth_callout in conf.d/accounts.conf", p.cfg.natsURL)
			}
		}
		pause(ctx, probePause)
	}
	return nil
}

// A server hands a request to any instance of the queue group at random, not
// to the one beside it first. With three instances every third probe arrives
// here on average; that none of fifty does has a chance of 10^-9.
const (
	probes     = 50
	probePause = 200 * time.Millisecond
)

// listening reports whether the own server can ask this instance now.
func (p *process) listening() bool {
	for _, nc := range p.auth {
		if !nc.IsConnected() {
			return false
		}
	}
	return p.service.Joined()
}

func (p *process) probe() (arrived, admitted, refused bool) {
	kp, err := nkeys.CreateUser()
	if err != nil {
		return false, false, false
	}
	pub, _ := kp.PublicKey()
	key, err := bus.ParseUserKey(pub)
	if err != nil {
		return false, false, false
	}
	seen, forget := p.service.Expect(key)
	defer forget()
	common := []nats.Option{nats.ClientTLSConfig(nil, p.roots), nats.NoReconnect(), nats.Timeout(2 * time.Second), nats.Name("unibus-authcallout probe")}
	for _, own := range []nats.Option{nats.Nkey(pub, kp.Sign), nil} {
		opts := common
		if own != nil {
			opts = append(opts, own)
		}
		nc, err := nats.Connect(p.cfg.natsURL, opts...)
		if err == nil {
			nc.Close()
			return false, true, false
		}
		refused = errors.Is(err, nats.ErrAuthorization)
	}
	select {
	case <-seen:
		return true, false, refused
	default:
		return false, false, refused
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// startAdmin serves metrics and profiles on loopback. From then on the unit
// counts as started: were it to wait for a quorum, the first node of a cluster
// could never start.
func (p *process) startAdmin(ln net.Listener) {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(p.reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, `{"status":"ok"}`) })
	mux.HandleFunc("/readyz", p.serveReadyz)
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		if err := srv.Serve(ln); err != nil && !errors.Is(err, net.ErrClosed) {
			p.log.Error("admin listener", "err", err)
		}
	}()
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
}

// serveReadyz is 200 while this instance answers and the path to it is proven.
func (p *process) serveReadyz(w http.ResponseWriter, _ *http.Request) {
	status, _ := p.status.Load().(string)
	code := http.StatusServiceUnavailable
	if p.ready.Load() {
		if _, held := p.view.Lease(); held && p.service.Joined() {
			code = http.StatusOK
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]string{"status": status})
}
