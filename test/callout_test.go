package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// exitConfig is EX_CONFIG of sysexits(3): the unit is not restarted.
const exitConfig = 78

// TestCalloutRefusesToStart: a callout whose configuration, or whose server's,
// could admit strangers ends with one line that says why.
func TestCalloutRefusesToStart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	w.Kill(1, cluster.Authcallout) // its place and its ports are the test's now
	t.Run("configuration", func(t *testing.T) { refusesConfiguration(t, w) })
	t.Run("server", func(t *testing.T) { refusesServer(t, w) })
	t.Run("no server", func(t *testing.T) { waitsForServer(t, w) })
	t.Run("not in path", func(t *testing.T) { refusesToBeBypassed(t, w) })
}

// ended is what became of one run of unibus-authcallout.
type ended struct {
	code int
	log  string
}

// callout runs node 1's authcallout with its own files until it ends. change
// gets the environment; an ended context is a SIGTERM.
func (w *world) callout(ctx context.Context, t *testing.T, change func(env map[string]string), args ...string) ended {
	t.Helper()
	c, err := w.Command(1, cluster.Authcallout)
	if err != nil {
		t.Fatal(err)
	}
	env := map[string]string{}
	for _, kv := range c.Env {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	if change != nil {
		change(env)
	}
	bound, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	cmd := exec.CommandContext(bound, c.Path, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && bound.Err() == nil {
		t.Fatal(err)
	}
	return ended{cmd.ProcessState.ExitCode(), log.String()}
}

func (e ended) want(t *testing.T, code int, says string) {
	t.Helper()
	if e.code != code || !strings.Contains(e.log, says) {
		t.Errorf("exit %d, want %d and %q:\n%s", e.code, code, says, e.log)
	}
}

// copyCreds gives a test credentials of its own to spoil.
func (w *world) copyCreds(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(w.Etc(1), "creds"))); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*.nk"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no credentials in %s: %v", dir, err)
	}
	for _, n := range names {
		if err := os.Chmod(n, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func refusesConfiguration(t *testing.T, w *world) {
	set := func(k, v string) func(map[string]string) { return func(env map[string]string) { env[k] = v } }
	w.callout(t.Context(), t, nil, "-check").want(t, 0, "is valid")
	for name, tt := range map[string]struct {
		change func(map[string]string)
		args   []string
		says   string
	}{
		"no name":             {set("UNIBUS_NODE", ""), nil, "has no name"},
		"unknown flag":        {nil, []string{"-admit-everyone"}, "not defined"},
		"argument":            {nil, []string{"start"}, "unexpected argument"},
		"lease too long":      {set("UNIBUS_LEASE", "11s"), nil, "1s to 10s"},
		"lease is no time":    {set("UNIBUS_LEASE", "ten"), nil, "1s to 10s"},
		"sessions for ever":   {set("UNIBUS_USER_TTL", "87600h"), nil, "1m and 720h"},
		"no connections":      {set("UNIBUS_USER_CONNECTIONS", "0"), nil, "a number from 1"},
		"metrics to all":      {set("UNIBUS_ADMIN_LISTEN", "0.0.0.0:9480"), nil, "not on loopback"},
		"metrics by name":     {set("UNIBUS_ADMIN_LISTEN", "localhost:9480"), nil, "not on loopback"},
		"log of another form": {set("UNIBUS_LOG_FORMAT", "xml"), nil, "text or json"},
		"no CA":               {set("UNIBUS_CA", "/nonexistent/ca.crt"), nil, "ca.crt"},
		"service of no key":   {set("UNIBUS_SERVICE_KEYS", "AAAA"), nil, "no public key of a user"},
		"another issuer":      {set("UNIBUS_ISSUER", "AAAA"), nil, "UNIBUS_ISSUER"},
	} {
		t.Run(name, func(t *testing.T) {
			w.callout(t.Context(), t, tt.change, tt.args...).want(t, exitConfig, tt.says)
		})
	}
	for name, tt := range map[string]struct {
		spoil func(dir string) error
		says  string
	}{
		"issuer readable by others": {func(d string) error { return os.Chmod(filepath.Join(d, "issuer.nk"), 0o644) }, "readable by others"},
		"own seed readable by others": {
			func(d string) error { return os.Chmod(filepath.Join(d, "authcallout-ctrl.nk"), 0o640) }, "readable by others",
		},
		"no issuer":        {func(d string) error { return os.Remove(filepath.Join(d, "issuer.nk")) }, "issuer.nk"},
		"no xkey":          {func(d string) error { return os.Remove(filepath.Join(d, "xkey.nk")) }, "xkey.nk"},
		"xkey is no curve": {func(d string) error { return copyFile(d, "issuer.nk", "xkey.nk") }, "curve seed"},
		"issuer is a user": {func(d string) error { return copyFile(d, "authcallout-auth.nk", "issuer.nk") }, "account seed"},
		"half of a rotation": {
			func(d string) error { return os.Remove(filepath.Join(d, "xkey-next.nk")) }, "xkey-next.nk",
		},
		"own seed is an account": {func(d string) error { return copyFile(d, "issuer.nk", "authcallout-auth.nk") }, "user seed"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := w.copyCreds(t)
			if err := tt.spoil(dir); err != nil {
				t.Fatal(err)
			}
			for _, args := range [][]string{nil, {"-check"}} {
				w.callout(t.Context(), t, set("UNIBUS_CREDS_DIR", dir), args...).want(t, exitConfig, tt.says)
			}
		})
	}
}

func copyFile(dir, from, to string) error {
	b, err := os.ReadFile(filepath.Join(dir, from))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, to), b, 0o600)
}

// refusesServer runs stock servers with a hole and points the callout at them.
func refusesServer(t *testing.T, w *world) {
	nkey := newPerson(t, "x").key.NKey()
	tls := fmt.Sprintf("tls { cert_file: %q, key_file: %q }", filepath.Join(w.Etc(1), "tls", "server.crt"), filepath.Join(w.Etc(1), "tls", "server.key"))
	for name, tt := range map[string]struct{ config, says string }{
		"open to all":   {tls, "asks nobody to authenticate"},
		"no nonce":      {tls + "\nauthorization { user: a, password: b }", "offers no nonce"},
		"no encryption": {fmt.Sprintf("authorization { users: [ { nkey: %q } ] }", nkey), "does not require TLS"},
	} {
		t.Run(name, func(t *testing.T) {
			url := w.bareServer(t, tt.config)
			w.callout(t.Context(), t, func(env map[string]string) { env["UNIBUS_NATS_URL"] = url }).want(t, exitConfig, tt.says)
		})
	}
}

// bareServer is a nats-server with a configuration of the test's own.
func (w *world) bareServer(t *testing.T, config string) (url string) {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "server.conf")
	port := cluster.BlockPorts(1, cluster.ReservePorts(t)).NATS
	text := fmt.Sprintf("listen: %q\n%s\n", cluster.Loopback(port), config)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, filepath.Join(w.Bin, "nats-server"), "-c", file)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // killed on purpose
		if t.Failed() {
			t.Log(log.String())
		}
	})
	return "tls://" + cluster.Loopback(port)
}

// waitsForServer: a server that is away is no fault of the configuration.
func waitsForServer(t *testing.T, w *world) {
	nowhere := cluster.Loopback(cluster.BlockPorts(1, cluster.ReservePorts(t)).NATS)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	over := make(chan ended, 1)
	go func() {
		over <- w.callout(ctx, t, func(env map[string]string) { env["UNIBUS_NATS_URL"] = "tls://" + nowhere })
	}()
	admin := w.AdminURL(1, cluster.Authcallout)
	cluster.WaitFor(t, 10*time.Second, "the callout to say what it waits for", func() error {
		if code, body, err := fetch(t.Context(), admin+"/livez"); err != nil || code != 200 {
			return fmt.Errorf("livez: %d %s: %w", code, body, err)
		}
		code, body, err := fetch(t.Context(), admin+"/readyz")
		if err != nil || code != 503 || !strings.Contains(body, "waiting for the own nats-server") {
			return fmt.Errorf("readyz: %d %s: %w", code, body, err)
		}
		return nil
	})
	stop()
	(<-over).want(t, 0, "waiting for the own nats-server")
}

func fetch(ctx context.Context, url string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	return res.StatusCode, string(body), err
}

// refusesToBeBypassed edits the server of node 1 so that it no longer asks, and
// then so that it admits whoever brings nothing.
func refusesToBeBypassed(t *testing.T, w *world) {
	file := filepath.Join(w.Etc(1), "nats", "conf.d", "accounts.conf")
	original, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(original), "  auth_callout {\n")
	_, after, ok2 := strings.Cut(rest, "\n  }\n")
	if !ok || !ok2 {
		t.Fatalf("no auth_callout block in %s", file)
	}
	head, bus, ok := strings.Cut(before+after, "  BUS {\n")
	if !ok {
		t.Fatalf("no account BUS in %s", file)
	}
	anyone := strings.Replace(bus, "users: [", "users: [ { user: anyone, password: anyone, permissions: { publish: x, subscribe: x } }", 1)
	for _, tt := range []struct{ name, config, says string }{
		{"not asked", before + after, "without asking this service"},
		{"anonymous", head + "  BUS {\n" + anyone + "\nno_auth_user: anyone\n", "asks nobody to authenticate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w.reconfigure(t, file, tt.config)
			w.callout(t.Context(), t, nil).want(t, exitConfig, tt.says)
		})
	}
	w.reconfigure(t, file, string(original))
	w.StartNode(1, cluster.Authcallout)
	w.waitAdmits(w.admin, 1, 2, 3)
}

// reconfigure restarts node 1's server with another text in one file.
func (w *world) reconfigure(t *testing.T, file, text string) {
	t.Helper()
	w.Term(1, cluster.NATS)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	w.StartNode(1, cluster.NATS)
	cluster.WaitFor(t, 20*time.Second, "n1 to be back", func() error { return w.NATSHealthy(t.Context(), 1) })
}

// TestCalloutStopsWithoutHarm stops callouts one after another under a steady
// stream of connects: nobody is refused, and a stopped one keeps no writer
// waiting for its lease.
func TestCalloutStopsWithoutHarm(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	p := w.addUser("alice")
	w.waitAdmits(p, 1, 2, 3)
	w.Reload(1, cluster.Authcallout) // SIGHUP means nothing to it, and is not the end

	stop := make(chan struct{})
	var guests sync.WaitGroup
	counts := [3]int{}
	var mu sync.Mutex
	for _, i := range w.Nodes() {
		guests.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				v, err := w.attempt(i, p)
				mu.Lock()
				counts[v]++
				mu.Unlock()
				if v != admitted {
					t.Logf("n%d: %s: %v", i, v, err)
				}
			}
		})
	}
	for _, i := range w.Nodes() {
		stopping := time.Now()
		w.Term(i, cluster.Authcallout)
		t.Logf("n%d's callout took %s to stop", i, time.Since(stopping).Round(time.Millisecond))
		started := time.Now()
		res, err := w.store.RevokeUser(t.Context(), w.addUser(fmt.Sprintf("gone%d", i)).key)
		if err != nil || len(res.Expired) > 0 {
			t.Errorf("a revoke after n%d's callout stopped waited for %+v: %v", i, res.Expired, err)
		}
		t.Logf("add and revoke took %s without n%d's callout", time.Since(started).Round(time.Millisecond), i)
		w.StartNode(i, cluster.Authcallout)
		cluster.WaitFor(t, 20*time.Second, "the callout to be back", func() error { return w.CalloutReady(t.Context(), i) })
	}
	close(stop)
	guests.Wait()
	t.Logf("admitted %d, refused %d, unanswered %d", counts[admitted], counts[refused], counts[silent])
	if counts[refused] > 0 || counts[admitted] == 0 {
		t.Errorf("%d members were refused, %d admitted", counts[refused], counts[admitted])
	}
	// A request may be on its way over a route when the last member of the
	// queue group on that server leaves; no more than one a stop.
	if counts[silent] > 3 {
		t.Errorf("%d members had no answer", counts[silent])
	}
}

// TestCalloutKeyRotation replaces the issuer and the xkey of a live cluster,
// node by node: callouts that hold both generations answer both. It is the
// drill for a stolen issuer seed (T40): its thief admits anybody before the
// rotation, and nobody after it.
func TestCalloutKeyRotation(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	p := w.addUser("alice")
	stranger := newPerson(t, "stranger")
	stolen := &thiefOfIssuer{w: w, issuer: pairOf(t, w.Seed("issuer"))}
	stolen.answering(t, func() {
		for _, i := range w.Nodes() {
			if v, err := w.attempt(i, stranger); v != admitted {
				t.Errorf("n%d: with the issuer's seed anybody gets in, before the rotation: %s: %v", i, v, err)
			}
		}
	})
	secrets := []string{"issuer", "xkey"}
	if full { // of a service, the servers have to be restarted in each stage
		secrets = append(secrets, "authcallout-auth", "authcallout-ctrl", "authcallout-bus", "membership-ctrl", "membership-bus", "ops", "sys")
	}
	rotate := func(stage string) {
		t.Helper()
		w.rotated(t, stage, secrets...)
	}
	render := func() { // as deploy stage does over ssh
		t.Helper()
		if err := w.Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	// As cluster rollout upgrade does, for what has changed.
	restart := func(stage string) {
		t.Helper()
		for _, i := range w.Nodes() { // one node at a time
			w.restartCallout(i)
			if full {
				w.Term(i, cluster.Membership)
			}
			if full || stage == "issue" { // read at start only
				w.Term(i, cluster.NATS)
			}
			w.StartNode(i)
			w.WaitHealthy(60 * time.Second)
			w.waitAdmits(p, 1, 2, 3) // both generations are in use
			// Silence is right while the feeds of a restarted server catch up.
			cluster.WaitFor(w.t, 20*time.Second, fmt.Sprintf("n%d to refuse a stranger", i), func() error {
				v, err := w.attempt(i, stranger)
				if v == admitted {
					t.Errorf("n%d admits a stranger", i)
				}
				if v != refused {
					return fmt.Errorf("%s: %w", v, err)
				}
				return nil
			})
		}
	}
	rotate("trust")
	w.notRotated(t, "does not have the stage before on its disk", "issue", "issuer")
	w.notRotated(t, "the stage before is issue", "retire", "issuer")
	render()
	restart("trust")
	rotate("issue")
	render()
	w.notRotated(t, "the server of n1 does not run the stage before yet", "retire", "xkey")
	restart("issue")
	rotate("retire")
	render()
	restart("retire") // the old generation is gone
	w.foundNothing()

	stolen.answering(t, func() {
		for _, i := range w.Nodes() {
			if v, _ := w.attempt(i, stranger); v == admitted {
				t.Errorf("n%d admits by the old seed", i)
			}
		}
	})
}

// thiefOfIssuer answers authorization requests with a stolen issuer's seed and,
// worse for us, whatever else of a callout is in use at the moment.
type thiefOfIssuer struct {
	w      *world
	issuer nkeys.KeyPair
}

// answering lets the thief be the only one who answers while do runs.
func (h *thiefOfIssuer) answering(t *testing.T, do func()) {
	t.Helper()
	for _, i := range h.w.Nodes() {
		h.w.Term(i, cluster.Authcallout)
	}
	creds := filepath.Join(h.w.Etc(1), "creds")
	xkey := pairOf(t, filepath.Join(creds, "xkey.nk"))
	nc, err := kv.Connect(kv.Link{
		URL: h.w.URLs(h.w.NATSURL), SeedFile: filepath.Join(creds, "authcallout-auth.nk"), CAFile: h.w.CA(), Name: "thief",
		Inbox: "_INBOX_authcallout", Timeout: 5 * time.Second, Once: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	var answered atomic.Int64
	if _, err := nc.Subscribe("$SYS.REQ.USER.AUTH", func(m *nats.Msg) {
		switch err := h.answer(m, xkey); {
		case err == nil:
			answered.Add(1)
		case !errors.Is(err, nats.ErrConnectionClosed): // that is the end of the drill
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	do()
	if answered.Load() < int64(len(h.w.Nodes())) {
		t.Errorf("the thief answered %d times", answered.Load())
	}
	for _, i := range h.w.Nodes() {
		h.w.StartNode(i, cluster.Authcallout)
	}
	h.w.waitAdmits(h.w.admin, h.w.Nodes()...)
}

// answer admits whoever asks to everything in BUS.
func (h *thiefOfIssuer) answer(m *nats.Msg, xkey nkeys.KeyPair) error {
	server := m.Header.Get("Nats-Server-Xkey")
	plain, err := xkey.Open(m.Data, server)
	if err != nil {
		return err
	}
	request, err := jwt.DecodeAuthorizationRequestClaims(string(plain))
	if err != nil {
		return err
	}
	user := jwt.NewUserClaims(request.UserNkey)
	user.Audience = "BUS"
	answer := jwt.NewAuthorizationResponseClaims(request.UserNkey)
	answer.Audience = request.Server.ID
	if answer.Jwt, err = user.Encode(h.issuer); err != nil {
		return err
	}
	token, err := answer.Encode(h.issuer)
	if err != nil {
		return err
	}
	sealed, err := xkey.Seal([]byte(token), server)
	if err != nil {
		return err
	}
	return m.Respond(sealed)
}

// restartCallout is one step of a rolling restart.
func (w *world) restartCallout(i int) {
	w.t.Helper()
	w.Term(i, cluster.Authcallout)
	w.StartNode(i, cluster.Authcallout)
	cluster.WaitFor(w.t, 20*time.Second, "the callout to be back", func() error { return w.CalloutReady(w.t.Context(), i) })
}

type seed struct {
	text   []byte
	public string
}

func newSeed(t *testing.T, prefix nkeys.PrefixByte) seed {
	t.Helper()
	kp, err := nkeys.CreatePair(prefix)
	if err != nil {
		t.Fatal(err)
	}
	text, err := kp.Seed()
	if err != nil {
		t.Fatal(err)
	}
	public, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	return seed{text, public}
}

func (s seed) write(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, append(s.text, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
}

func publicOf(t *testing.T, file string) string {
	t.Helper()
	public, err := pairOf(t, file).PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	return public
}

func pairOf(t *testing.T, file string) nkeys.KeyPair {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := bytes.TrimSpace(raw)
	kp, err := nkeys.FromSeed(text)
	if bytes.HasPrefix(text, []byte("SX")) {
		kp, err = nkeys.FromCurveSeed(text)
	}
	if err != nil {
		t.Fatal(err)
	}
	return kp
}

// TestCalloutLetsGoOfAConnectedUser: the answer that opened a connection holds
// back the acknowledgement of changes only until a server reports it open, not
// for as long as a lost answer could still arrive.
func TestCalloutLetsGoOfAConnectedUser(t *testing.T) {
	t.Parallel()
	w := newWorld(t, cluster.Options{})
	for _, i := range w.Nodes() {
		p := w.addUser(fmt.Sprintf("p%d", i))
		w.connectRaw(i, p)
		started := time.Now()
		res, err := w.store.RevokeUser(t.Context(), p.key)
		took := time.Since(started)
		if err != nil || len(res.Expired) > 0 || took > 2*time.Second {
			t.Errorf("n%d: a revoke right after the connect took %s, waited for %+v: %v", i, took, res.Expired, err)
		}
		t.Logf("n%d: %s", i, took.Round(time.Millisecond))
	}
}
