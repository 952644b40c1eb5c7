// Command unibus-membership serves the API of a node: /healthz to load
// balancers, /v1 to users and admins. It keeps the buckets of the cluster in
// order. It runs on every node, holds no state and may die at any time.
//
// Exit codes are those of sysexits(3), which systemd prints by name: 0 stopped,
// 69 cannot bind, 78 wrong configuration (do not restart).
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/time/rate"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/services/membership/api"
	"unibus.internal/services/membership/recorder"
)

var version = "devel" // set by the linker

const (
	exitUnavailable = 69
	exitConfig      = 78
	bootstrapBudget = 120 * time.Second
	reconcileEvery  = time.Minute
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stderr))
}

// config is everything the operator sets; each field has a flag and a variable.
type config struct {
	node, natsURL, ca, creds string
	monitorURL               string
	listen, adminListen      string
	cert, key                string
	lease, drainDelay        time.Duration
	authorities              []string
	proxies                  []netip.Prefix
	rateKey, rateAddress     api.Rate
	rateRoom                 api.Rate
	maxRequests              int
	blobs                    bus.BlobLimits
	check                    bool
}

func parseConfig(args []string, getenv func(string) string, stderr io.Writer) (config, error) {
	var c config
	fs := flag.NewFlagSet("unibus-membership", flag.ContinueOnError)
	fs.SetOutput(stderr)
	env := func(name, fallback string) string {
		if v := getenv(name); v != "" {
			return v
		}
		return fallback
	}
	var lease, drain string
	fs.StringVar(&c.node, "node", env("UNIBUS_NODE", ""), "name of this node ($UNIBUS_NODE)")
	fs.StringVar(&c.natsURL, "nats-url", env("UNIBUS_NATS_URL", "tls://127.0.0.1:4250"), "this node's nats-server ($UNIBUS_NATS_URL)")
	fs.StringVar(&c.monitorURL, "monitor-url", env("UNIBUS_MONITOR_URL", "http://127.0.0.1:8222"), "monitor listener of this node's nats-server, for metrics ($UNIBUS_MONITOR_URL)")
	fs.StringVar(&c.ca, "ca", env("UNIBUS_CA", "/etc/unibus/tls/client-ca.crt"), "client CA ($UNIBUS_CA)")
	fs.StringVar(&c.creds, "creds-dir", env("UNIBUS_CREDS_DIR", env("CREDENTIALS_DIRECTORY", "/etc/unibus/creds")), "directory of membership-ctrl.nk and membership-bus.nk ($UNIBUS_CREDS_DIR, $CREDENTIALS_DIRECTORY)")
	fs.StringVar(&c.listen, "listen", env("UNIBUS_LISTEN", "0.0.0.0:8470"), "HTTPS address ($UNIBUS_LISTEN)")
	fs.StringVar(&c.adminListen, "admin-listen", env("UNIBUS_ADMIN_LISTEN", "127.0.0.1:9470"), "metrics and profiles, loopback only ($UNIBUS_ADMIN_LISTEN)")
	fs.StringVar(&c.cert, "api-cert", env("UNIBUS_API_CERT", "/etc/unibus/tls/api.crt"), "certificate ($UNIBUS_API_CERT)")
	fs.StringVar(&c.key, "api-key", env("UNIBUS_API_KEY", "/etc/unibus/tls/api.key"), "its key file ($UNIBUS_API_KEY)")
	fs.StringVar(&lease, "lease", env("UNIBUS_LEASE", "10s"), "how long a barrier allows decisions, 1s to 10s ($UNIBUS_LEASE)")
	fs.StringVar(&drain, "drain-delay", env("UNIBUS_DRAIN_DELAY", "15s"), "how long to say 503 before stopping ($UNIBUS_DRAIN_DELAY)")
	var authorities, proxies, rateKey, rateAddress, rateRoom, maxRequests string
	fs.StringVar(&authorities, "authorities", env("UNIBUS_AUTHORITIES", ""), "comma list of host:port under which clients reach this node, load balancers included; default: loopback ($UNIBUS_AUTHORITIES)")
	fs.StringVar(&proxies, "trusted-proxies", env("UNIBUS_TRUSTED_PROXIES", ""), "comma list of addresses or networks whose X-Forwarded-For is believed for rate limits and audit ($UNIBUS_TRUSTED_PROXIES)")
	fs.StringVar(&rateKey, "rate-key", env("UNIBUS_RATE_KEY", "50:200"), "requests of one user, PER_SECOND:BURST ($UNIBUS_RATE_KEY)")
	fs.StringVar(&rateAddress, "rate-address", env("UNIBUS_RATE_ADDRESS", "200:800"), "requests of one address, PER_SECOND:BURST ($UNIBUS_RATE_ADDRESS)")
	fs.StringVar(&rateRoom, "rate-room", env("UNIBUS_RATE_ROOM", "2000:4000"), "messages that this node records of one durable room, PER_SECOND:BURST ($UNIBUS_RATE_ROOM)")
	fs.StringVar(&maxRequests, "max-requests", env("UNIBUS_MAX_REQUESTS", "256"), "signed requests in flight at most ($UNIBUS_MAX_REQUESTS)")
	blobs := fs.String("blob-limits", env("UNIBUS_BLOB_LIMITS", "2GiB:1000"), "how much one room may store, SIZE:FILES; the same on every node ($UNIBUS_BLOB_LIMITS)")
	fs.BoolVar(&c.check, "check", false, "check the configuration and exit")
	if err := fs.Parse(args); err != nil {
		return c, err
	}
	if fs.NArg() > 0 {
		return c, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	var err1, err2 error
	c.lease, err1 = time.ParseDuration(lease)
	c.drainDelay, err2 = time.ParseDuration(drain)
	switch {
	case err1 != nil || c.lease < kv.MinLease || c.lease > kv.DefaultLease:
		return c, fmt.Errorf("lease %q is not a duration from 1s to 10s", lease)
	case err2 != nil || c.drainDelay < 0:
		return c, fmt.Errorf("drain delay %q is not a duration", drain)
	case c.node == "":
		return c, errors.New("the node has no name; set UNIBUS_NODE")
	}
	if err := c.limits(authorities, proxies, rateKey, rateAddress, rateRoom, maxRequests); err != nil {
		return c, err
	}
	monitor, err := api.NewMonitor(c.monitorURL)
	if err != nil {
		return c, err
	}
	if c.blobs, err = bus.ParseBlobLimits(*blobs); err != nil {
		return c, err
	}
	return c, errors.Join(onLoopback("admin", c.adminListen), onLoopback("monitor", monitor.Address()))
}

// limits reads who may ask, how often, and by which names.
func (c *config) limits(authorities, proxies, rateKey, rateAddress, rateRoom, maxRequests string) (err error) {
	if c.authorities, err = parseAuthorities(authorities, c.listen); err != nil {
		return err
	}
	for _, text := range list(proxies) {
		p, err := netip.ParsePrefix(text)
		if a, notNetwork := netip.ParseAddr(text); notNetwork == nil {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err != nil {
			return fmt.Errorf("trusted proxy %q is neither an address nor a network", text)
		}
		c.proxies = append(c.proxies, p.Masked())
	}
	if c.rateKey, err = api.ParseRate(rateKey); err != nil {
		return err
	}
	if c.rateAddress, err = api.ParseRate(rateAddress); err != nil {
		return err
	}
	if c.rateRoom, err = api.ParseRate(rateRoom); err != nil {
		return err
	}
	if c.maxRequests, err = strconv.Atoi(maxRequests); err != nil || c.maxRequests < 1 || c.maxRequests > 1<<16 {
		return fmt.Errorf("max requests %q is not 1 to 65536", maxRequests)
	}
	return nil
}

func list(s string) []string {
	var out []string
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part != "" {
			out = append(out, part)
		}
	}
	return out
}

// parseAuthorities reads the names that a signature may be for. Clients leave
// out the default port, so it is left out here too.
func parseAuthorities(s, listen string) ([]string, error) {
	names := list(s)
	if len(names) == 0 {
		_, port, err := net.SplitHostPort(listen)
		if err != nil {
			return nil, fmt.Errorf("listen address %q is not HOST:PORT", listen)
		}
		names = []string{net.JoinHostPort("127.0.0.1", port), net.JoinHostPort("localhost", port), net.JoinHostPort("::1", port)}
	}
	for i, name := range names {
		u, err := url.Parse("https://" + name)
		if err != nil || u.Host != name || u.Hostname() == "" {
			return nil, fmt.Errorf("authority %q is not HOST or HOST:PORT", name)
		}
		names[i] = strings.ToLower(strings.TrimSuffix(name, ":443"))
	}
	return names, nil
}

// onLoopback refuses to show metrics and profiles to the network, and to believe
// another machine about the own server.
func onLoopback(what, addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("%s address %q is not on loopback", what, addr)
	}
	return nil
}

func run(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) int {
	log := slog.New(slog.NewTextHandler(stderr, nil))
	c, err := parseConfig(args, getenv, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return fail(log, exitConfig, err)
	}
	certs, err := api.LoadCertificates(c.cert, c.key, c.ca, log)
	if err != nil {
		return fail(log, exitConfig, err)
	}
	seed := filepath.Join(c.creds, "membership-ctrl.nk")
	nc, err := kv.Connect(kv.Link{
		URL: c.natsURL, SeedFile: seed, CAFile: c.ca,
		Name: "unibus-membership " + c.node, Inbox: "_INBOX_membership", Timeout: 5 * time.Second,
	})
	if err != nil {
		return fail(log, exitConfig, err)
	}
	defer nc.Close()
	rooms, err := kv.Connect(kv.Link{
		URL: c.natsURL, SeedFile: filepath.Join(c.creds, "membership-bus.nk"), CAFile: c.ca,
		Name: "unibus-membership " + c.node, Inbox: "_INBOX_membership", Timeout: 5 * time.Second,
	})
	if err != nil {
		return fail(log, exitConfig, err)
	}
	defer rooms.Close()
	poked := make(chan struct{}, 1)
	poke := func() {
		select {
		case poked <- struct{}{}:
		default:
		}
	}
	var view *kv.View
	view, err = kv.NewView(kv.ViewConfig{
		Conn: nc, Service: "membership", Node: c.node, Lease: c.lease, Log: log, EncryptionKeys: true,
		OnLease: func(bool) { poke() },
		OnChange: func(ch kv.Change, done func(kv.Enforced)) {
			// Which rooms are durable is fixed. If each room that is made had all
			// looked at, many of them would keep the View too busy to acknowledge.
			if ch.Bucket == kv.Rooms {
				if r, _, ok := view.Room(ch.Room); !ok || r.Durable {
					poke()
				}
			}
			done(kv.Enforced{})
		},
	})
	if err != nil {
		return fail(log, exitConfig, err)
	}
	if c.check {
		return 0
	}
	store, err := kv.OpenStore(kv.StoreConfig{View: view, Actor: "reconciler"})
	if err != nil {
		return fail(log, exitConfig, err)
	}
	audit := kv.OpenAudit(kv.AuditConfig{
		Conn: nc, Instance: view.Instance(), Log: log, Now: time.Now, Signer: kv.SeedSigner(seed),
	})
	// A connection of its own: no message and no decision waits behind a file.
	files, err := kv.Connect(kv.Link{
		URL: c.natsURL, SeedFile: filepath.Join(c.creds, "membership-bus.nk"), CAFile: c.ca,
		Name: "unibus-membership " + c.node + " files", Inbox: "_INBOX_membership", Timeout: 5 * time.Second,
	})
	if err != nil {
		return fail(log, exitConfig, err)
	}
	defer files.Close()
	blobs, err := kv.OpenBlobs(kv.BlobsConfig{Conn: files, View: view, Limits: c.blobs, Log: log})
	if err != nil {
		return fail(log, exitConfig, err)
	}
	health := api.NewHealth(api.HealthConfig{
		Node: c.node, Version: version, View: view, Conn: nc, Roots: func() (*x509.CertPool, error) { return bus.Roots(c.ca) }, Certs: certs, Log: log, Now: time.Now,
	})
	monitor, err := api.NewMonitor(c.monitorURL)
	if err != nil {
		return fail(log, exitConfig, err)
	}
	registry := newRegistry(health, monitor)
	record, err := recorder.New(recorder.Config{
		Conn: rooms, View: view, Log: log, Now: time.Now, Metrics: registry,
		Rate: rate.Limit(c.rateRoom.PerSecond), Burst: c.rateRoom.Burst, Poked: poked,
	})
	if err != nil {
		return fail(log, exitConfig, err)
	}
	server := api.NewServer(api.Config{
		Health: health, Log: log, Version: version,
		TLS:  &tls.Config{GetCertificate: certs.Get, MinVersion: tls.VersionTLS12},
		View: view, Store: store, Audit: audit, Rooms: record, Conn: nc, Blobs: blobs, Lease: c.lease,
		Authorities: c.authorities, Proxies: c.proxies, RateKey: c.rateKey, RateAddress: c.rateAddress, MaxRequests: c.maxRequests,
		Metrics: registry,
	})
	ln, err := net.Listen("tcp", c.listen)
	if err != nil {
		return fail(log, exitUnavailable, err)
	}
	admin, err := net.Listen("tcp", c.adminListen)
	if err != nil {
		return fail(log, exitUnavailable, err)
	}
	return serve(ctx, c, log, parts{
		nc: nc, rooms: rooms, recorder: record, view: view, store: store, blobs: blobs, audit: audit, health: health, certs: certs, registry: registry,
		server: server, ln: ln, admin: admin,
	})
}

func fail(log *slog.Logger, code int, err error) int {
	log.Error("cannot start", "err", err)
	return code
}

func newRegistry(health *api.Health, monitor *api.Monitor) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "unibus_build_info", Help: "The running build.",
		ConstLabels: prometheus.Labels{"version": version, "go": runtime.Version(), "service": "membership"},
	})
	info.Set(1)
	reg.MustRegister(info, health.Collector(), monitor.Collector())
	return reg
}

func adminHandler(reg *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

func notify(state string) {
	_, _ = daemon.SdNotify(false, state) // outside systemd there is nobody to tell
}
