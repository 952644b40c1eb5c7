// Command unibus-authcallout decides, for the nats-server of its node and in
// need for the others, who may connect and to which subjects. It runs on every
// node, holds no state and may die at any time.
//
// Exit codes are those of sysexits(3), which systemd prints by name: 0 stopped,
// 69 cannot bind, 78 wrong configuration (do not restart).
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/services/authcallout/callout"
)

var version = "devel" // set by the linker

const (
	exitUnavailable = 69
	exitConfig      = 78
	// authConnections per instance: a server handles the answers of one
	// connection one after another.
	authConnections = 2
	inbox           = "_INBOX_authcallout"
	authSeed        = "authcallout-auth.nk"
	ctrlSeed        = "authcallout-ctrl.nk"
	busSeed         = "authcallout-bus.nk"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	signal.Ignore(syscall.SIGHUP) // there is nothing to reload, and a reload of all units must not end this one
	leaveProcessors(os.Getenv)
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stderr))
}

// leaveProcessors takes half of the processors, unless GOMAXPROCS says
// otherwise. A request is handed from goroutine to goroutine five times, and at
// each hand-over Go wakes another thread where a processor is free, which finds
// the work done and sleeps again: a twentieth of an admission, a seventh of a
// refusal, a quarter of the work at rest. Half is enough: for each connection
// the servers spend four times as much as we do, so that even one instance alone
// keeps up with three of them.
func leaveProcessors(getenv func(string) string) {
	if getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(1, runtime.GOMAXPROCS(0)/2))
	}
}

// config is everything the operator sets; each field has a flag and a variable.
type config struct {
	node, natsURL, ca, creds string
	adminListen, issuer      string
	services                 []string // nkeys of services in account BUS, besides the own
	lease, ttl               time.Duration
	perUser                  int // connections
	logFormat                string
	secured                  bool // the seeds' modes are systemd's business
	check                    bool
}

func parseConfig(args []string, getenv func(string) string, stderr io.Writer) (config, error) {
	var c config
	fs := flag.NewFlagSet("unibus-authcallout", flag.ContinueOnError)
	fs.SetOutput(stderr)
	env := func(name, fallback string) string {
		if v := getenv(name); v != "" {
			return v
		}
		return fallback
	}
	var lease, ttl, perUser, services string
	fs.StringVar(&c.node, "node", env("UNIBUS_NODE", ""), "name of this node ($UNIBUS_NODE)")
	fs.StringVar(&c.natsURL, "nats-url", env("UNIBUS_NATS_URL", "tls://127.0.0.1:4250"), "this node's nats-server ($UNIBUS_NATS_URL)")
	fs.StringVar(&c.ca, "ca", env("UNIBUS_CA", "/etc/unibus/tls/client-ca.crt"), "client CA ($UNIBUS_CA)")
	fs.StringVar(&c.creds, "creds-dir", env("UNIBUS_CREDS_DIR", env("CREDENTIALS_DIRECTORY", "/etc/unibus/creds")), "directory of the seeds ($UNIBUS_CREDS_DIR, $CREDENTIALS_DIRECTORY)")
	fs.StringVar(&c.adminListen, "admin-listen", env("UNIBUS_ADMIN_LISTEN", "127.0.0.1:9480"), "metrics and profiles, loopback only ($UNIBUS_ADMIN_LISTEN)")
	fs.StringVar(&c.issuer, "issuer", env("UNIBUS_ISSUER", ""), "public key that issuer.nk must have ($UNIBUS_ISSUER)")
	fs.StringVar(&services, "service-keys", env("UNIBUS_SERVICE_KEYS", ""), "comma list of the public keys of services in account BUS, whose connections are nobody's to close ($UNIBUS_SERVICE_KEYS)")
	fs.StringVar(&lease, "lease", env("UNIBUS_LEASE", "10s"), "how long a barrier allows decisions, 1s to 10s ($UNIBUS_LEASE)")
	fs.StringVar(&ttl, "user-ttl", env("UNIBUS_USER_TTL", "12h"), "how long a session lives at most ($UNIBUS_USER_TTL)")
	fs.StringVar(&perUser, "user-connections", env("UNIBUS_USER_CONNECTIONS", strconv.Itoa(callout.DefaultUserConnections)), "connections a user may hold; beyond it the oldest are closed ($UNIBUS_USER_CONNECTIONS)")
	fs.StringVar(&c.logFormat, "log-format", env("UNIBUS_LOG_FORMAT", "text"), "text or json ($UNIBUS_LOG_FORMAT)")
	fs.BoolVar(&c.check, "check", false, "check the configuration and exit")
	if err := fs.Parse(args); err != nil {
		return c, err
	}
	if fs.NArg() > 0 {
		return c, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	var err1, err2, err4 error
	c.perUser, err4 = strconv.Atoi(perUser)
	c.lease, err1 = time.ParseDuration(lease)
	c.ttl, err2 = time.ParseDuration(ttl)
	c.secured = c.creds == getenv("CREDENTIALS_DIRECTORY")
	host, _, err3 := net.SplitHostPort(c.adminListen)
	ip := net.ParseIP(host)
	switch {
	case err1 != nil || c.lease < kv.MinLease || c.lease > kv.DefaultLease:
		return c, fmt.Errorf("lease %q is not a duration from 1s to 10s", lease)
	case err2 != nil:
		return c, fmt.Errorf("user ttl %q is not a duration", ttl)
	case err4 != nil || c.perUser < 1:
		return c, fmt.Errorf("user connections %q is not a number from 1", perUser)
	case c.logFormat != "text" && c.logFormat != "json":
		return c, fmt.Errorf("log format %q is not text or json", c.logFormat)
	case c.node == "":
		return c, errors.New("the node has no name; set UNIBUS_NODE")
	case err3 != nil || ip == nil || !ip.IsLoopback():
		return c, fmt.Errorf("admin address %q is not on loopback", c.adminListen)
	}
	for key := range strings.SplitSeq(services, ",") {
		if key = strings.TrimSpace(key); key == "" {
			continue
		}
		if !nkeys.IsValidPublicUserKey(key) {
			return c, fmt.Errorf("service key %q is no public key of a user (U...)", key)
		}
		c.services = append(c.services, key)
	}
	return c, nil
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
	if c.logFormat == "json" {
		log = slog.New(slog.NewJSONHandler(stderr, nil))
	}
	p, err := prepare(c, log)
	if err != nil {
		return fail(log, exitConfig, err)
	}
	if c.check {
		fmt.Fprintln(stderr, "unibus-authcallout: the configuration is valid")
		return 0
	}
	admin, err := net.Listen("tcp", c.adminListen)
	if err != nil {
		return fail(log, exitUnavailable, err)
	}
	defer func() { _ = admin.Close() }()
	p.startAdmin(admin)
	if err := p.inspectServer(ctx); err != nil {
		return fail(log, exitConfig, err)
	}
	if ctx.Err() != nil {
		return 0
	}
	defer p.closeConnections()
	if err := p.connect(); err != nil {
		return fail(log, exitConfig, err)
	}
	return p.serve(ctx)
}

// prepare reads every file the service needs, so that -check finds what a start
// would.
func prepare(c config, log *slog.Logger) (*process, error) {
	keys, err := loadKeys(c)
	if err != nil {
		return nil, err
	}
	if _, err := bus.Roots(c.ca); err != nil {
		return nil, err
	}
	busKey := ""
	for _, seed := range []string{authSeed, ctrlSeed, busSeed} {
		raw, err := readSecret(c, seed)
		if err != nil {
			return nil, err
		}
		public, err := userKey(raw)
		clear(raw)
		if err != nil {
			return nil, fmt.Errorf("%s does not hold a user seed (SU...)", filepath.Join(c.creds, seed))
		}
		if seed == busSeed {
			busKey = public
		}
	}
	p := newProcess(c, log, keys)
	p.busKey = busKey
	return p, nil
}

// userKey is the public half of a user seed.
func userKey(seed []byte) (string, error) {
	kp, err := nkeys.FromSeed(seed)
	if err != nil {
		return "", err
	}
	defer kp.Wipe()
	public, err := kp.PublicKey()
	if err == nil && !nkeys.IsValidPublicUserKey(public) {
		err = errors.New("no user key")
	}
	return public, err
}

func fail(log *slog.Logger, code int, err error) int {
	log.Error("cannot start", "err", err)
	return code
}

// loadKeys reads the current generation, and the next one if a rotation is
// under way.
func loadKeys(c config) ([]callout.Keys, error) {
	var keys []callout.Keys
	for _, suffix := range []string{"", "-next"} {
		issuer, err := readSecret(c, "issuer"+suffix+".nk")
		if suffix != "" && errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return nil, err
		}
		curve, err := readSecret(c, "xkey"+suffix+".nk")
		if err != nil {
			return nil, err
		}
		k, err := callout.ParseKeys(issuer, curve)
		clear(issuer)
		clear(curve)
		if err != nil {
			return nil, fmt.Errorf("%s, issuer%s.nk and xkey%s.nk: %w", c.creds, suffix, suffix, err)
		}
		keys = append(keys, k)
	}
	for _, k := range keys {
		if c.issuer == "" || k.Issuer.Public == c.issuer {
			return keys, nil
		}
	}
	return nil, fmt.Errorf("%s holds the seed of %s, and UNIBUS_ISSUER is %s", filepath.Join(c.creds, "issuer.nk"), keys[0].Issuer.Public, c.issuer)
}

// readSecret refuses a file that others may read: whoever holds the issuer
// seed can open a session in any account.
func readSecret(c config, name string) ([]byte, error) {
	path := filepath.Join(c.creds, name)
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read a seed: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 && !c.secured {
		return nil, fmt.Errorf("%s is readable by others: chmod 600 %s", path, path)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read a seed: %w", err)
	}
	return bytes.TrimSpace(raw), nil
}

func (p *process) link(seed, purpose string, more ...nats.Option) kv.Link {
	return kv.Link{
		URL: p.cfg.natsURL, SeedFile: filepath.Join(p.cfg.creds, seed), CAFile: p.cfg.ca,
		Name: "unibus-authcallout " + p.cfg.node + " " + purpose, Inbox: inbox, Timeout: 5 * time.Second,
		Options: append([]nats.Option{nats.ErrorHandler(p.natsError)}, more...),
	}
}
