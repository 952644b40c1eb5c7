// Command unibus-membership serves /healthz to load balancers and keeps the
// buckets of the cluster in order. It runs on every node, holds no state and
// may die at any time.
//
// Exit codes are those of sysexits(3), which systemd prints by name: 0 stopped,
// 69 cannot bind, 78 wrong configuration (do not restart).
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"unibus.internal/bus/kv"
	"unibus.internal/services/membership/api"
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
	listen, adminListen      string
	cert, key                string
	lease, drainDelay        time.Duration
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
	fs.StringVar(&c.ca, "ca", env("UNIBUS_CA", "/etc/unibus/tls/client-ca.crt"), "client CA ($UNIBUS_CA)")
	fs.StringVar(&c.creds, "creds-dir", env("UNIBUS_CREDS_DIR", env("CREDENTIALS_DIRECTORY", "/etc/unibus/creds")), "directory of membership-ctrl.nk ($UNIBUS_CREDS_DIR, $CREDENTIALS_DIRECTORY)")
	fs.StringVar(&c.listen, "listen", env("UNIBUS_LISTEN", "0.0.0.0:8470"), "HTTPS address ($UNIBUS_LISTEN)")
	fs.StringVar(&c.adminListen, "admin-listen", env("UNIBUS_ADMIN_LISTEN", "127.0.0.1:9470"), "metrics and profiles, loopback only ($UNIBUS_ADMIN_LISTEN)")
	fs.StringVar(&c.cert, "api-cert", env("UNIBUS_API_CERT", "/etc/unibus/tls/api.crt"), "certificate ($UNIBUS_API_CERT)")
	fs.StringVar(&c.key, "api-key", env("UNIBUS_API_KEY", "/etc/unibus/tls/api.key"), "its key file ($UNIBUS_API_KEY)")
	fs.StringVar(&lease, "lease", env("UNIBUS_LEASE", "10s"), "how long a barrier allows decisions, 1s to 10s ($UNIBUS_LEASE)")
	fs.StringVar(&drain, "drain-delay", env("UNIBUS_DRAIN_DELAY", "10s"), "how long to say 503 before stopping ($UNIBUS_DRAIN_DELAY)")
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
	return c, onLoopback(c.adminListen)
}

// onLoopback refuses to show metrics and profiles to the network.
func onLoopback(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("admin address %q is not on loopback", addr)
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
	certs, err := api.LoadCertificates(c.cert, c.key, log)
	if err != nil {
		return fail(log, exitConfig, err)
	}
	roots, err := kv.Trust(c.ca)
	if err != nil {
		return fail(log, exitConfig, err)
	}
	nc, err := kv.Connect(kv.Link{
		URL: c.natsURL, SeedFile: filepath.Join(c.creds, "membership-ctrl.nk"), CAFile: c.ca,
		Name: "unibus-membership " + c.node, Inbox: "_INBOX_membership", Timeout: 5 * time.Second,
	})
	if err != nil {
		return fail(log, exitConfig, err)
	}
	defer nc.Close()
	view, err := kv.NewView(kv.ViewConfig{Conn: nc, Service: "membership", Node: c.node, Lease: c.lease, Log: log, EncryptionKeys: true})
	if err != nil {
		return fail(log, exitConfig, err)
	}
	if c.check {
		return 0
	}
	health := api.NewHealth(api.HealthConfig{
		Node: c.node, Version: version, View: view, Conn: nc, CA: roots, Certs: certs, Log: log, Now: time.Now,
	})
	server := api.NewServer(api.Config{
		Health: health, Log: log,
		TLS: &tls.Config{GetCertificate: certs.Get, MinVersion: tls.VersionTLS12},
	})
	ln, err := net.Listen("tcp", c.listen)
	if err != nil {
		return fail(log, exitUnavailable, err)
	}
	admin, err := net.Listen("tcp", c.adminListen)
	if err != nil {
		return fail(log, exitUnavailable, err)
	}
	return serve(ctx, c, log, parts{nc: nc, view: view, health: health, certs: certs, server: server, ln: ln, admin: admin})
}

func fail(log *slog.Logger, code int, err error) int {
	log.Error("cannot start", "err", err)
	return code
}

func adminHandler(health *api.Health) http.Handler {
	reg := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "unibus_build_info", Help: "The running build.",
		ConstLabels: prometheus.Labels{"version": version, "go": runtime.Version(), "service": "membership"},
	})
	info.Set(1)
	reg.MustRegister(info, health.Collector())
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
