package test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// staticUser is one key that the servers know themselves, and what it may do,
// written down by hand from the design and not read from the configuration.
type staticUser struct {
	name                 string
	publish, subscribe   []string
	cannotPub, cannotSub []string
}

var (
	// beyondServices are subjects that no service's key may use in any account.
	beyondServices = []string{
		"x", "room.ops.U.x", "feed.ops.U.x", "store.ops.U.x", "_INBOX.x", "_INBOX_UAAA.x", "_INBOX_ops.x",
		"$SYS.REQ.USER.AUTH", "$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.PING.VARZ", "$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.SERVER.x.RELOAD",
		"$SYS.REQ.ACCOUNT.PING.CONNZ", "$SYS.DEBUG.SUBSCRIBERS", "$SYS._INBOX.abcdefgh.ijklmnop.q",
		"$KV.UNIBUS_other.x", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST", "$JS.API.STREAM.CREATE.x", "$JS.API.ACCOUNT.PURGE.CTRL",
		"$JS.API.STREAM.DELETE.KV_UNIBUS_users", "$JS.API.STREAM.PURGE.KV_UNIBUS_users", "$JS.API.STREAM.MSG.DELETE.KV_UNIBUS_users",
		"$JS.API.STREAM.RESTORE.KV_UNIBUS_users", "$JS.API.STREAM.SNAPSHOT.KV_UNIBUS_users", "$JS.API.STREAM.PEER.REMOVE.KV_UNIBUS_users",
		"$JS.API.STREAM.LEADER.STEPDOWN.KV_UNIBUS_users", "$JS.API.META.LEADER.STEPDOWN", "$JS.API.SERVER.REMOVE",
		"$JS.API.DIRECT.GET.KV_UNIBUS_users", "$JS.API.DIRECT.GET.KV_UNIBUS_users.$KV.UNIBUS_users.x",
		"$JS.API.CONSUMER.CREATE.KV_UNIBUS_users.name", "$JS.API.CONSUMER.CREATE.KV_UNIBUS_users.name.filter",
		"$JS.API.CONSUMER.DURABLE.CREATE.KV_UNIBUS_users.x", "$JS.API.CONSUMER.MSG.NEXT.KV_UNIBUS_users.x", "$JS.ACK.KV_UNIBUS_users.x.1.1.1.1.0",
	}
	deafServices = []string{
		">", "*", "*.>", "_INBOX.>", "_INBOX_*.>", "_INBOX_ops.>", "$SYS.>", "$SYS.ACCOUNT.>", "$SYS.ACCOUNT.*.*", "$SYS.SERVER.*.>", "$SYS.REQ.>",
		"$JS.>", "$JS.API.>", "$KV.>", "$KV.UNIBUS_users.>", "unibus.>", "unibus.audit.>", "sys.connz", "room.>", "notice.>",
	}
	enforcement = []string{"$SYS.REQ.SERVER.NAAA.KICK", "$SYS.REQ.SERVER.NAAA.LDM", "sys.connz", "unibus.ack.a.b"}
)

func staticUsers() []staticUser {
	auth := staticUser{
		name:      "authcallout-auth",
		publish:   []string{"$SYS._INBOX.abcdefgh.ijklmnop"},
		subscribe: []string{"$SYS.REQ.USER.AUTH", "_INBOX_authcallout.>"},
		cannotPub: append([]string{"_INBOX_authcallout.x", "sys.connz", "unibus.ack.a.b", "notice.U.x", "$JS.API.INFO", "$SYS.REQ.USER.INFO", "$KV.UNIBUS_users.x"}, beyondServices...),
		cannotSub: append([]string{"$SYS._INBOX.>", "$SYS.REQ.USER.>", "$SYS.REQ.USER.*"}, deafServices...),
	}
	callout := staticUser{
		name: "authcallout-ctrl",
		publish: append([]string{
			"$JS.FC.KV_UNIBUS_users.c.x", "unibus.audit.authcallout-n1", "unibus.audit.authcallout-n2", "unibus.audit.authcallout-n3", "$JS.API.STREAM.MSG.GET.UNIBUS_AUDIT",
		}, enforcement...),
		subscribe: []string{"_INBOX_authcallout.>", "$SYS.ACCOUNT.BUS.*", "$SYS.ACCOUNT.BUS.CONNECT"},
		cannotPub: append([]string{
			"_INBOX_authcallout.x", "_INBOX_membership.x", "unibus.ack.a", "unibus.ack.a.b.c", "$JS.API.INFO", "$SYS.REQ.USER.INFO",
			"unibus.audit.membership-n1", "unibus.audit.authcallout-n4", "unibus.audit.unibusctl-direct", "unibus.audit.x",
			"$KV.UNIBUS_users._barrier", "$KV.UNIBUS_users._barrier.a", "$KV.UNIBUS_users._barrier.a.b.c", "$KV.UNIBUS_handles._barrier.a.b",
			"$JS.API.STREAM.UPDATE.KV_UNIBUS_users", "$JS.API.STREAM.CREATE.KV_UNIBUS_users", "$JS.API.STREAM.MSG.GET.KV_UNIBUS_users",
		}, beyondServices...),
		cannotSub: append([]string{"_INBOX_membership.>", "unibus.ack.*.*", "$KV.UNIBUS_users._barrier.>"}, deafServices...),
	}
	membership := staticUser{
		name:      "membership-ctrl",
		publish:   append([]string{"$JS.FC.KV_UNIBUS_users.c.x", "$JS.API.INFO", "$SYS.REQ.USER.INFO", "unibus.audit.membership-n3"}, enforcement...),
		subscribe: []string{"_INBOX_membership.>", "unibus.ack.*.*", "$SYS.ACCOUNT.BUS.*"},
		cannotPub: append([]string{"_INBOX_authcallout.x", "unibus.ack.a", "unibus.x", "unibus.audit.authcallout-n1", "unibus.audit.membership-n1.x", "unibus.audit.x"}, beyondServices...),
		cannotSub: append([]string{"_INBOX_authcallout.>"}, deafServices...),
	}
	notices := staticUser{
		name:      "authcallout-bus",
		publish:   []string{"notice.U.x", "notice.U.x.y"},
		subscribe: []string{"_INBOX_authcallout.>"},
		cannotPub: append([]string{"notice.U", "_INBOX_authcallout.x", "sys.connz", "unibus.ack.a.b", "$JS.API.INFO", "$SYS.REQ.USER.INFO", "$KV.UNIBUS_users.x"}, beyondServices...),
		cannotSub: append([]string{"notice.U.x", "_INBOX_membership.>"}, deafServices...),
	}
	rooms := staticUser{
		name: "membership-bus",
		publish: []string{
			"store.ops.U.x", "store.ops.U.x.y", "feed.ops._tip", "$O.UNIBUS_blobs.C.x", "$SYS.REQ.USER.INFO", "$JS.API.INFO", "$JS.FC.ROOM_ops.c.x",
			"$JS.API.STREAM.CREATE.ROOM_other", "$JS.API.STREAM.UPDATE.ROOM_other", "$JS.API.STREAM.INFO.ROOM_other", "$JS.API.STREAM.MSG.GET.ROOM_other",
			"$JS.API.STREAM.DELETE.ROOM_other", "$JS.API.STREAM.PURGE.OBJ_UNIBUS_blobs", "$JS.API.DIRECT.GET.ROOM_other", "$JS.API.CONSUMER.CREATE.ROOM_other.x.store.other.U",
			"$JS.API.STREAM.RESTORE.ROOM_other", "$JS.SNAPSHOT.RESTORE.ROOM_other.x",
		},
		subscribe: []string{"_INBOX_membership.>", "room.ops.>", "room.*.>"},
		cannotPub: []string{
			"x", "room.ops.U.x", "feed.ops.U.x", "feed.ops._tip.x", "feed.ops.U", "store.ops.U", "notice.U.x", "_INBOX_UAAA.x", "_INBOX_membership.x", "sys.connz", "unibus.ack.a.b",
			"$O.OTHER.x", "$KV.UNIBUS_users.x", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST", "$JS.API.STREAM.PURGE.ROOM_other", "$JS.API.STREAM.MSG.DELETE.ROOM_other",
			"$JS.API.STREAM.SNAPSHOT.ROOM_other", "$JS.API.STREAM.PEER.REMOVE.ROOM_other", "$JS.API.STREAM.LEADER.STEPDOWN.ROOM_other",
			"$JS.API.CONSUMER.DURABLE.CREATE.ROOM_other.x", "$JS.ACK.ROOM_other.x.1.1.1.1.0", "$SYS.REQ.USER.AUTH", "$SYS.REQ.ACCOUNT.PING.CONNZ", "$SYS.REQ.SERVER.PING",
		},
		cannotSub: []string{
			">", "*", "*.>", "room.>", "room.*", "_INBOX.>", "_INBOX_*.>", "_INBOX_authcallout.>", "feed.>", "feed.*.>", "store.>", "store.*.>", "notice.>", "$JS.>", "$SYS.>", "$O.>",
		},
	}
	for _, stream := range kv.Streams() {
		bucket, isBucket := strings.CutPrefix(stream.Name, "KV_")
		follow := []string{
			"$JS.API.STREAM.INFO." + stream.Name, "$JS.API.CONSUMER.CREATE." + stream.Name, "$JS.API.CONSUMER.DELETE." + stream.Name + ".x",
		}
		own := []string{"$JS.API.STREAM.CREATE." + stream.Name, "$JS.API.STREAM.MSG.GET." + stream.Name}
		if isBucket {
			own = append(own, "$KV."+bucket+".x", "$KV."+bucket+".x.y")
			callout.cannotPub = append(callout.cannotPub, "$KV."+bucket+".x", "$KV."+bucket+".x.y.z")
		}
		membership.publish = append(membership.publish, append(own, follow...)...)
		membership.cannotPub = append(membership.cannotPub, "$JS.API.STREAM.UPDATE."+stream.Name)
		if bucket == kv.Users || bucket == kv.Rooms || bucket == kv.Members {
			callout.publish = append(append(callout.publish, follow...), "$KV."+bucket+"._barrier.a.b")
		} else {
			callout.cannotPub = append(callout.cannotPub, follow...)
		}
	}
	return []staticUser{
		auth, callout, membership, notices, rooms,
		{name: "ops", publish: []string{"$JS.API.STREAM.NAMES", "$KV.UNIBUS_users.x", "sys.connz"}, subscribe: []string{">"}},
		{name: "sys", publish: []string{"$SYS.REQ.SERVER.PING"}, subscribe: []string{">"}},
	}
}

// TestStaticUsers renders three nodes through unibusctl and holds every static
// key to its table, on every node. No callout runs: none of them needs it.
func TestStaticUsers(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Options{})
	for _, u := range staticUsers() {
		t.Run(u.name, func(t *testing.T) {
			for _, i := range c.Nodes() {
				holdTo(t, dialStatic(t, c, i, u.name), u)
			}
		})
	}
	t.Run("strangers", func(t *testing.T) { refuseStrangers(t, c) })
	t.Run("routes", func(t *testing.T) { refuseRoutes(t, c) })
}

func holdTo(t *testing.T, conn *wire.Conn, u staticUser) {
	t.Helper()
	denied := func(what, subject string, err error, want bool) {
		t.Helper()
		if err != nil && !errors.Is(err, wire.ErrDenied) {
			t.Fatalf("%s %s %s: %v", u.name, what, subject, err)
		}
		if got := err != nil; got != want {
			t.Errorf("%s: %s %s: refused = %v, want %v (%v)", u.name, what, subject, got, want, err)
		}
	}
	for _, subject := range u.publish {
		denied("publish", subject, conn.Pub(subject, "", "{}"), false)
	}
	for _, subject := range u.cannotPub {
		denied("publish", subject, conn.Pub(subject, "", "{}"), true)
	}
	for _, queue := range []string{"", "q"} {
		for _, subject := range u.subscribe {
			denied("subscribe "+queue, subject, conn.Sub(subject, queue, "1"), false)
			if err := conn.Unsub("1"); err != nil {
				t.Fatal(err)
			}
		}
		for _, subject := range u.cannotSub {
			denied("subscribe "+queue, subject, conn.Sub(subject, queue, "1"), true)
		}
	}
}

func dialStatic(t *testing.T, c *cluster.Cluster, node int, name string) *wire.Conn {
	t.Helper()
	conn := dialWire(t, c, node, 5*time.Second)
	if err := conn.Connect(wire.Proof(seedOf(t, c, name), conn.Info.Nonce)); err != nil {
		t.Fatalf("connect as %s to n%d: %v", name, node, err)
	}
	return conn
}

func dialWire(t *testing.T, c *cluster.Cluster, node int, timeout time.Duration) *wire.Conn {
	t.Helper()
	trust, err := wire.Trust(c.CA())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := wire.Dial(c.NATSURL(node), trust, timeout)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

func seedOf(t *testing.T, c *cluster.Cluster, name string) nkeys.KeyPair {
	t.Helper()
	b, err := os.ReadFile(c.Seed(name))
	if err != nil {
		t.Fatal(err)
	}
	kp, err := nkeys.FromSeed([]byte(strings.TrimSpace(string(b))))
	if err != nil {
		t.Fatal(err)
	}
	return kp
}

// refuseStrangers knocks with everything that is not a listed key's own proof.
// With no callout to answer, the refusal comes after authorization.timeout.
func refuseStrangers(t *testing.T, c *cluster.Cluster) {
	stranger, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	ops, err := seedOf(t, c, "ops").PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	password, err := os.ReadFile(filepath.Join(c.Secrets(), "route.pass"))
	if err != nil {
		t.Fatal(err)
	}
	knocks := map[string]func(nonce string) map[string]any{
		"anonymous":                   func(string) map[string]any { return nil },
		"unknown key":                 func(nonce string) map[string]any { return wire.Proof(stranger, nonce) },
		"listed key, own signature":   func(nonce string) map[string]any { return forged(wire.Proof(stranger, nonce), "nkey", ops) },
		"listed key, no signature":    func(string) map[string]any { return map[string]any{"nkey": ops} },
		"listed key as user name":     func(string) map[string]any { return map[string]any{"user": ops, "pass": "x"} },
		"listed key as user, unknown": func(nonce string) map[string]any { return forged(wire.Proof(stranger, nonce), "user", ops) },
		"token":                       func(string) map[string]any { return map[string]any{"auth_token": ops} },
		"route password": func(string) map[string]any {
			return map[string]any{"user": "unibus-route", "pass": strings.TrimSpace(string(password))}
		},
	}
	// All at once: most are refused only when the time for a callout is over.
	verdicts := make(chan error)
	for name, fields := range knocks {
		for _, i := range c.Nodes() {
			conn := dialWire(t, c, i, 20*time.Second)
			go func() {
				err := conn.Connect(fields(conn.Info.Nonce))
				switch {
				case errors.Is(err, wire.ErrDenied):
					verdicts <- nil
				case err == nil:
					verdicts <- fmt.Errorf("%s on n%d: admitted", name, i)
				default:
					verdicts <- fmt.Errorf("%s on n%d: no verdict: %w", name, i, err)
				}
			}()
		}
	}
	for range len(knocks) * len(c.Nodes()) {
		if err := <-verdicts; err != nil {
			t.Error(err)
		}
	}
}

func forged(fields map[string]any, key, value string) map[string]any {
	fields[key] = value
	return fields
}

// refuseRoutes comes with a node's own route certificate, stolen as it were:
// without the password it opens no route.
func refuseRoutes(t *testing.T, c *cluster.Cluster) {
	trust, err := wire.Trust(filepath.Join(c.PKI(), "cluster-ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(c.Etc(2), "tls", "route.crt"), filepath.Join(c.Etc(2), "tls", "route.key"))
	if err != nil {
		t.Fatal(err)
	}
	trust.Certificates = []tls.Certificate{cert}
	for _, credentials := range []string{"", `,"user":"unibus-route"`, `,"user":"unibus-route","pass":"guess"`} {
		said, err := knockAsRoute(cluster.Loopback(c.Ports[0].Route), trust, credentials)
		if err != nil || !strings.Contains(said, "-ERR 'Authorization Violation'") {
			t.Errorf("a route with %q was told %q, %v", credentials, said, err)
		}
	}
	password, err := os.ReadFile(filepath.Join(c.Secrets(), "route.pass"))
	if err != nil {
		t.Fatal(err)
	}
	said, err := knockAsRoute(cluster.Loopback(c.Ports[0].Route), trust, fmt.Sprintf(`,"user":"unibus-route","pass":%q`, strings.TrimSpace(string(password))))
	if strings.Contains(said, "Authorization Violation") {
		t.Errorf("with the password the same knock was told %q, %v", said, err)
	}
}

// knockAsRoute speaks first, as a peer does: routes begin with TLS. It returns
// what the server said until it hung up or answered the PING.
func knockAsRoute(address string, trust *tls.Config, credentials string) (string, error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", address, trust)
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", err
	}
	const id = "NDUMMYDUMMYDUMMYDUMMYDUMMYDUMMYDUMMYDUMMYDUMMYDUMMYDUMMY"
	_, err = fmt.Fprintf(conn, "CONNECT {\"echo\":true,\"verbose\":false,\"pedantic\":false,\"tls_required\":true,\"name\":%q,\"cluster\":\"unibus\"%s}\r\nPING\r\n", id, credentials)
	if err != nil {
		return "", err
	}
	var said strings.Builder
	for r := bufio.NewReader(conn); ; {
		line, err := r.ReadString('\n')
		said.WriteString(line)
		switch {
		case errors.Is(err, io.EOF), strings.HasPrefix(line, "-ERR"), strings.HasPrefix(line, "PONG"):
			return said.String(), nil
		case err != nil:
			return said.String(), err
		}
	}
}

// TestServicesHaveEnoughRights lets the real code work under the services' own
// keys: membership makes and verifies every stream, both hold a lease, and the
// callout reaches every server for the enforcement of live changes.
func TestServicesHaveEnoughRights(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	link := func(name, inbox string) *nats.Conn {
		nc, err := kv.Connect(kv.Link{
			URL: c.NATSURL(1), SeedFile: c.Seed(name), CAFile: c.CA(), Name: "test-" + name, Inbox: inbox, Timeout: 5 * time.Second, Once: true,
			Options: []nats.Option{nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { t.Errorf("%s: %v", name, err) })},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	membership, callout := link("membership-ctrl", "_INBOX_membership"), link("authcallout-ctrl", "_INBOX_authcallout")
	if err := kv.Bootstrap(ctx, membership, time.Minute, func(s string) { t.Log(s) }); err != nil {
		t.Fatal(err)
	}
	for service, nc := range map[string]*nats.Conn{"membership": membership, "authcallout": callout} {
		v, err := kv.NewView(kv.ViewConfig{Conn: nc, Service: service, Node: "n1", EncryptionKeys: true, Lease: 5 * time.Second, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		running, stop := context.WithCancel(ctx)
		ended := make(chan struct{})
		go func() { v.Run(running); close(ended) }()
		err = v.WaitLease(ctx)
		auditAs(running, t, service, nc, c.Seed(service+"-ctrl"))
		stop()
		<-ended
		if err != nil {
			t.Fatalf("%s holds no lease: %v", service, err)
		}
	}
	reachEveryServer(t, callout)
	holdCaps(ctx, t, c)
}

// auditAs writes, and as membership also signs, reads and verifies, the audit.
func auditAs(ctx context.Context, t *testing.T, service string, nc *nats.Conn, seed string) {
	cfg := kv.AuditConfig{Conn: nc, Instance: service + "-n1"}
	if service == "membership" {
		cfg.Signer = kv.SeedSigner(seed)
	}
	a := kv.OpenAudit(cfg)
	actx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { a.Run(actx); close(done) }()
	err := a.Record(ctx, bus.AuditEntry{Kind: bus.AuditOutcome, Action: "test", Actor: "direct", Result: "ok"})
	stop()
	<-done
	if err != nil {
		t.Errorf("%s cannot write the audit: %v", service, err)
	}
	if cfg.Signer == nil {
		return
	}
	signer, err := cfg.Signer.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	if report, err := kv.VerifyAudit(ctx, nc, []string{signer}); err != nil || !report.OK || report.Checkpoints == 0 || report.Unsigned > 1 {
		t.Errorf("%s cannot sign and verify the audit: %+v, %v", service, report, err)
	}
	if records, _, err := kv.ReadAudit(ctx, nc, kv.AuditQuery{Actor: "direct"}); err != nil || len(records) == 0 {
		t.Errorf("%s reads %d records of the audit: %v", service, len(records), err)
	}
}

// reachEveryServer asks for connections and kicks one that does not exist, on
// each server.
func reachEveryServer(t *testing.T, callout *nats.Conn) {
	inbox := callout.NewInbox()
	answers, err := callout.SubscribeSync(inbox)
	if err != nil {
		t.Fatal(err)
	}
	if err := callout.PublishRequest("sys.connz", inbox, []byte(`{"auth":true,"acc":"BUS"}`)); err != nil {
		t.Fatal(err)
	}
	servers := map[string]string{}
	for range kv.Replicas {
		m, err := answers.NextMsg(5 * time.Second)
		if err != nil {
			t.Fatalf("%d of %d servers answered: %v", len(servers), kv.Replicas, err)
		}
		var answer struct{ Server struct{ Name, ID string } }
		if err := json.Unmarshal(m.Data, &answer); err != nil {
			t.Fatal(err)
		}
		servers[answer.Server.Name] = answer.Server.ID
	}
	if len(servers) != kv.Replicas {
		t.Fatalf("answers came from %v", servers)
	}
	for name, id := range servers {
		for _, what := range []string{"KICK", "LDM"} {
			m, err := callout.Request("$SYS.REQ.SERVER."+id+"."+what, []byte(`{"cid":999999}`), 5*time.Second)
			if err != nil || !strings.Contains(string(m.Data), "no such client") {
				t.Errorf("%s on %s: %v %v", what, name, err, m)
			}
		}
	}
}

// holdCaps fills account CTRL with reservations: what exceeds its cap, or names
// no bound, is refused.
func holdCaps(ctx context.Context, t *testing.T, c *cluster.Cluster) {
	js, err := jetstream.New(c.Ops())
	if err != nil {
		t.Fatal(err)
	}
	create := func(name string, maxBytes int64) error {
		_, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: name, Subjects: []string{"test." + name}, Replicas: kv.Replicas, MaxBytes: maxBytes})
		return err
	}
	if err := create("FITS", 64<<20); err != nil {
		t.Errorf("a stream that fits the cap: %v", err)
	}
	for what, maxBytes := range map[string]int64{"beyond the cap": 1 << 30, "without a bound": -1} {
		var refusal *jetstream.APIError
		if err := create("EXCEEDS", maxBytes); !errors.As(err, &refusal) {
			t.Errorf("a stream %s: %v", what, err)
		}
	}
}

// TestConfiguredServers compares what the running servers say of themselves
// with what durability and isolation rest on.
func TestConfiguredServers(t *testing.T) {
	c := cluster.Start(t, cluster.Options{})
	for _, i := range c.Nodes() {
		var varz struct {
			ServerName      string            `json:"server_name"`
			Metadata        map[string]string `json:"metadata"`
			AuthTimeout     float64           `json:"auth_timeout"`
			TLSTimeout      float64           `json:"tls_timeout"`
			TLSRequired     bool              `json:"tls_required"`
			MaxPayload      int               `json:"max_payload"`
			MaxConnections  int               `json:"max_connections"`
			MaxSubs         int               `json:"max_subscriptions"`
			PingMax         int               `json:"ping_max"`
			PingInterval    time.Duration     `json:"ping_interval"`
			SystemAccount   string            `json:"system_account"`
			ConnectURLs     []string          `json:"connect_urls"`
			Leaf            map[string]any    `json:"leaf"`
			MQTT, Websocket map[string]any
			Cluster         struct {
				Name        string
				PoolSize    int  `json:"pool_size"`
				TLSVerify   bool `json:"tls_verify"`
				TLSRequired bool `json:"tls_required"`
				URLs        []string
			}
			JetStream struct{ Config map[string]any }
		}
		getJSON(t, c.MonitorURL(i)+"/varz", &varz)
		node := c.Node(i)
		routes := []string{}
		for _, j := range c.Nodes() {
			if j != i {
				routes = append(routes, cluster.Loopback(c.Ports[j-1].Route))
			}
		}
		rendered, err := os.ReadFile(filepath.Join(c.Etc(i), "nats", "node.conf"))
		if err != nil {
			t.Fatal(err)
		}
		for _, check := range []struct {
			what      string
			got, want any
		}{
			{"server_name", varz.ServerName, node},
			{"unibus_config in node.conf", strings.Contains(string(rendered), varz.Metadata["unibus_config"]) && len(varz.Metadata["unibus_config"]) == 64, true},
			{"sync_always", varz.JetStream.Config["sync_always"], true},
			{"strict", varz.JetStream.Config["strict"], true},
			{"auth_timeout", varz.AuthTimeout, 10.0},
			{"tls_timeout", varz.TLSTimeout, 10.0},
			{"tls_required", varz.TLSRequired, true},
			{"max_payload", varz.MaxPayload, 1 << 20},
			{"max_connections", varz.MaxConnections, 10000},
			{"max_subscriptions", varz.MaxSubs, 4096},
			{"ping_interval", varz.PingInterval, 20 * time.Second},
			{"ping_max", varz.PingMax, 2},
			{"system_account", varz.SystemAccount, "SYS"},
			{"connect_urls", len(varz.ConnectURLs), 0},
			{"other listeners", fmt.Sprint(varz.Leaf, varz.MQTT, varz.Websocket), "map[] map[] map[]"},
			{"cluster name", varz.Cluster.Name, "unibus"},
			{"pool_size", varz.Cluster.PoolSize, -1},
			{"route TLS", varz.Cluster.TLSRequired && varz.Cluster.TLSVerify, true},
			{"routes", fmt.Sprint(varz.Cluster.URLs), fmt.Sprint(routes)},
		} {
			if check.got != check.want {
				t.Errorf("%s: %s is %v, want %v", node, check.what, check.got, check.want)
			}
		}
		loopbackOnly(t, node, c.Ports[i-1].Monitor)
	}
	localConfigWins(t, c)
}

// localConfigWins edits the operator's own file: it survives the next render,
// and a reload takes it.
func localConfigWins(t *testing.T, c *cluster.Cluster) {
	local := filepath.Join(c.Etc(3), "nats", "conf.d", "local.conf")
	if err := os.WriteFile(local, []byte("max_connections: 4242\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Reload(3)
	cluster.WaitFor(t, 10*time.Second, "the reloaded limit", func() error {
		var varz struct {
			MaxConnections int `json:"max_connections"`
		}
		getJSON(t, c.MonitorURL(3)+"/varz", &varz)
		if varz.MaxConnections != 4242 {
			return fmt.Errorf("max_connections is %d", varz.MaxConnections)
		}
		return nil
	})
}

func getJSON(t *testing.T, url string, into any) {
	t.Helper()
	client := http.Client{Timeout: 5 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		t.Fatal(err)
	}
}

// loopbackOnly tries the monitor on every other address of this machine.
func loopbackOnly(t *testing.T, node string, port int) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		ip, ok := a.(*net.IPNet)
		if !ok || ip.IP.IsLoopback() || ip.IP.IsLinkLocalUnicast() {
			continue
		}
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(ip.IP.String(), fmt.Sprint(port)), time.Second)
		if err == nil {
			_ = conn.Close()
			t.Errorf("%s: the monitor answers on %s", node, ip.IP)
		}
	}
}
