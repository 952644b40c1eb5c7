package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sig"
)

func (a *app) joinCommand() *cli.Command {
	return &cli.Command{
		Name: "join", ArgsUsage: "URL INVITE", Category: "access",
		Usage: "become a user: from an invite to a connected nats CLI",
		Description: "URL is the API, or a comma list of the nodes' APIs; INVITE is what an admin's unibusctl invite\n" +
			"create printed, or - to read it from stdin. It makes a key if the file of --out is not there, redeems the invite with it,\n" +
			"writes a context for the stock nats CLI and connects once. Repeated, it finishes what was\n" +
			"interrupted.\n\n" +
			"With --ca-pin no CA file is needed: the CA is taken from the API's own connection if it has that\n" +
			"fingerprint (openssl x509 -in CA -noout -fingerprint -sha256), and written beside the key.\n\n" +
			"   unibusctl join https://n1:8470 ubi_... --handle bob --ca-pin 5f2c...",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "handle", Usage: "your `NAME`, if the invite leaves it to you"},
			&cli.StringFlag{Name: "out", TakesFile: true, Usage: "`FILE` of your key; default: that of --identity, else HANDLE.nk"},
			&cli.StringFlag{Name: "ca-pin", Usage: "SHA-256 of the CA's certificate, in `HEX`, in place of --ca"},
			&cli.StringFlag{Name: "admin", Usage: "`KEY` of the admin who invites you: trusted to name owners of encrypted rooms that have lost theirs"},
			&cli.StringFlag{Name: "name", Usage: "`NAME` of the nats context; default unibus-<handle>"},
			&cli.BoolFlag{Name: "select", Usage: "make it the context that nats uses by default"},
			dryRunFlag(),
		},
		Action: a.join,
	}
}

// joining is one run of join, all of it checked before anything is done.
type joining struct {
	urls, token string
	handle      bus.Handle
	seed, ca    string // files
	pin         string // hex, or empty: the CA file is there
	admin       bus.UserKey
	context     string // name, or empty
	selected    bool
}

var inviteForm = regexp.MustCompile(`^ubi_[0-9a-f]{16}_[a-z2-7]{32}$`)

func (a *app) join(c *cli.Context) error {
	j, err := a.joining(c)
	if err != nil {
		return err
	}
	if c.Bool("dry-run") {
		return a.planJoin(j)
	}
	ctx, cancel := a.within(c.Context, changeWithin)
	defer cancel()
	if err := a.joinTrust(ctx, j); err != nil {
		return err
	}
	if !exists(j.seed) {
		if _, err := a.makeIdentity(j.seed, false); err != nil {
			return err
		}
		a.say("made a key: %s. It cannot be got back if it is lost", j.seed)
	}
	return a.redeem(ctx, j)
}

func (a *app) joining(c *cli.Context) (*joining, error) {
	arg, err := positional(c, "URL", "INVITE")
	if err != nil {
		return nil, err
	}
	if a.set.direct {
		return nil, &usageError{msg: "join goes over the API: leave --direct out", hint: "unibusctl --direct user add"}
	}
	j := &joining{urls: arg[0], token: arg[1], seed: c.String("out"), ca: a.set.ca, context: c.String("name"), selected: c.Bool("select")}
	if j.token == "-" { // an argument is seen by everybody on this machine
		line, err := bufio.NewReader(io.LimitReader(a.in, 1<<10)).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read the invite: %w", err)
		}
		j.token = strings.TrimSpace(line)
	}
	if !inviteForm.MatchString(j.token) {
		return nil, usagef("%s is no invite: one is ubi_<id>_<secret>", quote(j.token[:min(len(j.token), 8)]))
	}
	if h := c.String("handle"); h != "" {
		if j.handle, err = bus.ParseHandle(h); err != nil {
			return nil, err
		}
	}
	if k := c.String("admin"); k != "" {
		if j.admin, err = bus.ParseUserKey(k); err != nil {
			return nil, err
		}
	}
	if j.context != "" && !contextName.MatchString(j.context) {
		return nil, usagef("context name %s is refused: use a-z A-Z 0-9 _ -", quote(j.context))
	}
	if j.seed == "" {
		j.seed = a.set.identity
	}
	if j.seed == "" {
		j.seed = "unibus.nk"
		if j.handle != "" {
			j.seed = string(j.handle) + ".nk"
		}
	}
	if a.defaulted("nats-url") {
		a.set.natsURL = natsOf(j.urls)
	}
	if _, err := a.clientOf(client.Config{URLs: strings.Split(j.urls, ","), Identity: anybody{}}, a.command+" --help"); err != nil {
		return nil, err
	}
	return j, a.joinPin(c, j)
}

// joinPin decides between the CA file and the pin.
func (a *app) joinPin(c *cli.Context, j *joining) error {
	pin := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(c.String("ca-pin"), "sha256:"), ":", ""))
	if pin == "" {
		if j.ca == "" {
			return &usageError{
				msg:  "the CA is not known: set --ca FILE, or --ca-pin HEX as unibusctl invite create prints it",
				hint: "ask who invited you for the whole command",
			}
		}
		_, err := kv.Trust(j.ca)
		return err
	}
	if raw, err := hex.DecodeString(pin); err != nil || len(raw) != sha256.Size {
		return usagef("--ca-pin is no SHA-256 in hex")
	}
	if j.ca != "" {
		have, err := caPin(j.ca)
		switch {
		case err == nil && have == pin:
			return nil
		case c.IsSet("ca"):
			return bus.E(bus.Invalid, "%s is not the CA with the fingerprint %s", j.ca, pin).WithHint("leave --ca out")
		}
	}
	j.pin, j.ca = pin, filepath.Join(filepath.Dir(j.seed), "unibus-ca.crt")
	if have, err := caPin(j.ca); err == nil && have == pin {
		j.pin = ""
	} else if exists(j.ca) {
		return bus.E(bus.Conflict, "%s is there already and holds another CA", j.ca).WithHint("%s ... --out FILE, in another directory", a.command)
	}
	return nil
}

// anybody signs nothing: it stands for a key while addresses are checked.
type anybody struct{}

func (anybody) Key() bus.UserKey { return bus.UserKey{} }

func (anybody) Sign([]byte) ([]byte, error) { return nil, errors.New("nobody's key") }

func (a *app) planJoin(j *joining) error {
	made := map[bool]string{true: "use the key", false: "make a key"}[exists(j.seed)]
	ca := "trust " + j.ca
	if j.pin != "" {
		ca = fmt.Sprintf("take the CA %s from the API and write it to %s", j.pin, j.ca)
	}
	return a.plan("join "+j.urls, ca, made+" "+j.seed, "redeem the invite with it", "write a context for nats, with the servers "+withoutUserinfo(a.set.natsURL), "connect once")
}

// joinTrust fetches the CA if only its fingerprint is known. The connection
// that brings it proves nothing until the certificate in it has that
// fingerprint and has signed the server's own.
func (a *app) joinTrust(ctx context.Context, j *joining) error {
	if j.pin == "" {
		return nil
	}
	var failures []string
	for raw := range strings.SplitSeq(j.urls, ",") {
		u, err := url.Parse(strings.TrimSpace(raw))
		if err != nil {
			return err
		}
		ca, err := pinnedCA(ctx, u, j.pin, a.now())
		if err != nil {
			if bus.CodeOf(err) == bus.Unauthenticated {
				return err
			}
			failures = append(failures, fmt.Sprintf("%s: %v", u.Host, err))
			continue
		}
		return writeFile(j.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}), 0o644, false)
	}
	return bus.E(bus.Unavailable, "no node answers: %s", strings.Join(failures, "; ")).WithHint("repeat it, or try the address of another node")
}

func pinnedCA(ctx context.Context, u *url.URL, pin string, now time.Time) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	addr := u.Host
	if u.Port() == "" {
		addr = net.JoinHostPort(u.Hostname(), "443")
	}
	// Nothing but certificates is read from this connection, and they are
	// verified below.
	d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12, ServerName: u.Hostname()}}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	secured, ok := conn.(*tls.Conn)
	if !ok {
		return nil, errors.New("no TLS")
	}
	shown := secured.ConnectionState().PeerCertificates
	for _, cert := range shown {
		if sum := sha256.Sum256(cert.Raw); hex.EncodeToString(sum[:]) != pin || !cert.IsCA {
			continue
		}
		pool := x509.NewCertPool()
		pool.AddCert(cert)
		if _, err := shown[0].Verify(x509.VerifyOptions{Roots: pool, DNSName: u.Hostname(), CurrentTime: now}); err != nil {
			return nil, bus.E(bus.Unauthenticated, "%s shows the right CA, which has not signed its own certificate: %w", u.Host, err)
		}
		return cert, nil
	}
	return nil, bus.E(bus.Unauthenticated, "%s does not show a CA with the fingerprint %s", u.Host, pin).
		WithHint("compare it with who invited you, or get the CA's file and use --ca FILE")
}

// natsOf guesses where NATS is from where the API is: the same hosts, 4220
// ports below, as every node of unibus has it.
func natsOf(apiURLs string) string {
	var out []string
	for raw := range strings.SplitSeq(apiURLs, ",") {
		u, err := url.Parse(strings.TrimSpace(raw))
		if err != nil {
			continue
		}
		port := 4250
		if p, err := strconv.Atoi(u.Port()); err == nil && p >= 8470 && p < 9470 {
			port = p - 4220
		}
		out = append(out, "tls://"+net.JoinHostPort(u.Hostname(), strconv.Itoa(port)))
	}
	return strings.Join(out, ",")
}

// joined is what join did.
type joined struct {
	Change      bus.Change     `json:"change"`
	User        bus.UserDetail `json:"user"`
	Identity    string         `json:"identity"`
	CA          string         `json:"ca"`
	Context     string         `json:"context"`
	ContextFile string         `json:"context_file"`
	Server      string         `json:"server"` // the nats-server that admitted us
}

// redeem enrolls the key, writes the context and connects.
func (a *app) redeem(ctx context.Context, j *joining) error {
	id, err := readSigner(j.seed)
	if err != nil {
		return err
	}
	api, err := a.apiClient(j.urls, j.ca, id)
	if err != nil {
		return err
	}
	defer api.Close()
	change, err := api.Enroll(ctx, j.token, j.handle)
	if bus.CodeOf(err) == bus.Unauthenticated && !errors.As(err, new(*tls.CertificateVerificationError)) {
		return bus.E(bus.Unauthenticated, "the invite is not accepted: it is mistyped, used, expired or withdrawn").
			WithHint("ask who invited you for a new one")
	}
	if err != nil {
		return err
	}
	me, err := api.Me(ctx)
	if err != nil {
		return err
	}
	if err := a.joinKeys(ctx, api, id, j); err != nil {
		return err
	}
	a.set.ca = j.ca
	name, file, err := a.makeContext(string(me.Handle), j.seed, bus.InboxPrefix(id.Key()), j.context, j.selected)
	if err != nil {
		return err
	}
	nc, err := kv.Connect(kv.Link{
		URL: a.set.natsURL, SeedFile: j.seed, CAFile: j.ca, Name: "unibusctl join", Inbox: bus.InboxPrefix(id.Key()),
		Timeout: 10 * time.Second, Once: true,
	})
	if err != nil {
		return bus.E(bus.Unavailable, "%s is registered, and NATS does not admit yet: %w", me.Handle, err).
			WithHint("repeat the command; if NATS is elsewhere than %s, with --nats-url URLS", withoutUserinfo(a.set.natsURL))
	}
	server := nc.ConnectedServerName()
	nc.Close()
	return a.printJoined(joined{change, me, j.seed, j.ca, name, file, server})
}

// joinKeys publishes the newcomer's encryption key, so that owners can let them
// into encrypted rooms, and pins the admin of whom the invite spoke: later, only
// the servers could say who is one.
func (a *app) joinKeys(ctx context.Context, api *client.Client, id *sig.Identity, j *joining) error {
	k, err := a.keysOf(api, id, j.seed)
	if err != nil {
		return err
	}
	if j.admin != (bus.UserKey{}) {
		if err := k.TrustAdmin(j.admin); err != nil {
			return err
		}
	}
	_, err = k.Announce(ctx)
	return err
}

func (a *app) printJoined(r joined) error {
	if a.set.json {
		if err := a.print(r, nil); err != nil {
			return err
		}
	} else {
		fmt.Fprintln(a.out, oneLine(fmt.Sprintf("%s, who is now connected to %s", strings.TrimPrefix(r.Change.What, "already_"), r.Server)))
		err := a.print(nil, func(t table.Writer) {
			t.AppendRows([]table.Row{{"handle", r.User.Handle}, {"nkey", r.User.NKey}, {"key file", r.Identity}, {"ca", r.CA}, {"context", r.Context}})
			for _, g := range r.User.Rooms {
				t.AppendRow(table.Row{"room " + string(g.Room), g.Role})
			}
		})
		if err != nil {
			return err
		}
	}
	a.say("the stock nats CLI works: %s", exampleLine(r))
	if !r.Change.Verified {
		return bus.E(bus.Unavailable, "%s: committed, not proven", r.Change.What).WithHint("repeat %s: it proves again", a.command)
	}
	return nil
}

// exampleLine is a command of the nats CLI that this user may run.
func exampleLine(r joined) string {
	for _, g := range r.User.Rooms {
		if g.Role.MayPublish() {
			return fmt.Sprintf("nats --context %s pub %s 'hi all'", r.Context, bus.RoomSubject(g.Room, r.User.SignPub, "hello"))
		}
	}
	subject := bus.NoticeSubscribe(r.User.SignPub)
	if len(r.User.Rooms) > 0 {
		subject = bus.RoomSubscribe(r.User.Rooms[0].Room)
		if r.User.Rooms[0].Durable {
			subject = bus.FeedSubscribe(r.User.Rooms[0].Room)
		}
	}
	return fmt.Sprintf("nats --context %s sub '%s'", r.Context, subject)
}
