package kv

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
)

// Link says how one of our own programs reaches NATS: which server, by which
// static nkey, trusting which CA.
type Link struct {
	URL      string // one server or a comma list, tls://host:port
	SeedFile string // file with one nkey seed line
	CAFile   string // the client CA
	Name     string // shown in connection lists
	Inbox    string // inbox prefix; static users may hear no other
	Timeout  time.Duration
	Once     bool // give up on the first failure, as a command does; a service reconnects for ever
	Options  []nats.Option
}

// Connect opens a link. A service's link reconnects for ever, is never closed
// by authentication errors (two from one server would otherwise end a client
// for good) and buffers nothing while disconnected: no write may land later
// than its answer.
func Connect(l Link) (*nats.Conn, error) {
	auth, err := nkeyOption(l.SeedFile)
	if err != nil {
		return nil, err
	}
	if _, err := bus.Roots(l.CAFile); err != nil {
		return nil, err
	}
	opts := []nats.Option{
		auth,
		nats.Name(l.Name),
		// Read at each connect: while an authority is replaced, what a service
		// trusts changes under its feet, without a restart.
		nats.ClientTLSConfig(nil, func() (*x509.CertPool, error) { return bus.Roots(l.CAFile) }),
		nats.CustomInboxPrefix(l.Inbox),
		nats.IgnoreAuthErrorAbort(),
		nats.ReconnectBufSize(-1),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(250 * time.Millisecond),
		nats.ReconnectJitter(250*time.Millisecond, 250*time.Millisecond),
		nats.PingInterval(2 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.Timeout(l.Timeout),
		nats.RetryOnFailedConnect(!l.Once),
		nats.NoCallbacksAfterClientClose(),
		nats.IgnoreDiscoveredServers(),
	}
	nc, err := nats.Connect(l.URL, append(opts, l.Options...)...)
	if err != nil {
		return nil, bus.E(bus.Unavailable, "cannot reach %s: %w", l.URL, err)
	}
	return nc, nil
}

// nkeyOption reads the seed for each signature and wipes it, so that it does
// not stay in memory between connects.
func nkeyOption(file string) (nats.Option, error) {
	kp, err := readSeed(file)
	if err != nil {
		return nil, err
	}
	defer kp.Wipe()
	pub, err := kp.PublicKey()
	if err != nil || !strings.HasPrefix(pub, "U") {
		return nil, bus.E(bus.Invalid, "%s does not hold a user seed (SU...)", file)
	}
	return nats.Nkey(pub, func(nonce []byte) ([]byte, error) {
		if !bus.ServerNonce(nonce) {
			return nil, bus.E(bus.Internal, "the server's nonce has no known form")
		}
		kp, err := readSeed(file)
		if err != nil {
			return nil, err
		}
		defer kp.Wipe()
		return kp.Sign(nonce)
	}), nil
}

func readSeed(file string) (nkeys.KeyPair, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, bus.E(bus.Invalid, "cannot read the seed: %w", err)
	}
	defer func() { clear(raw) }()
	kp, err := nkeys.FromSeed([]byte(strings.TrimSpace(string(raw))))
	if err != nil {
		return nil, bus.E(bus.Invalid, "%s does not hold an nkey seed", file)
	}
	return kp, nil
}

// Trust is a TLS configuration that trusts the CAs in a file, as it is now, and
// nothing else.
func Trust(caFile string) (*tls.Config, error) {
	pool, err := bus.Roots(caFile)
	if err != nil {
		return nil, err
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}
