// Package wire speaks the NATS client protocol by hand, so that a test can send
// what no client library would: any CONNECT, any subject, any reply subject, any
// header. Every operation is followed by a PING, so its answer is known when the
// call returns.
package wire

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nkeys"
)

// Info is the part of a server's INFO that tests look at.
type Info struct {
	ServerID    string `json:"server_id"`
	Nonce       string `json:"nonce"`
	ClientID    uint64 `json:"client_id"`
	TLSRequired bool   `json:"tls_required"`
	AuthNeeded  bool   `json:"auth_required"`
}

// Message is one delivered MSG or HMSG.
type Message struct {
	Subject, Sid, Reply string
	Header, Payload     string
}

// Conn is one connection. It is not safe for concurrent use, but for Flush and
// Close.
type Conn struct {
	Info     Info
	Messages []Message // delivered so far
	conn     net.Conn
	r        *bufio.Reader
	timeout  time.Duration
	pending  []string // -ERR lines not yet taken
	flushing sync.Mutex
	closed   chan struct{}
	closing  sync.Once
}

// ErrDenied is the server's refusal of a connection or an operation.
var ErrDenied = errors.New("denied")

// Trust reads a CA file.
func Trust(caFile string) (*tls.Config, error) {
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", caFile)
	}
	return &tls.Config{RootCAs: pool, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12}, nil
}

// Dial reads the server's INFO and upgrades to TLS; nothing is sent yet. url is
// tls://host:port; timeout bounds every later answer.
func Dial(url string, trust *tls.Config, timeout time.Duration) (*Conn, error) {
	raw, err := net.DialTimeout("tcp", strings.TrimPrefix(url, "tls://"), timeout)
	if err != nil {
		return nil, err
	}
	return Over(raw, trust, timeout)
}

// Over is Dial on a connection that has been made already; on an error it is
// closed.
func Over(raw net.Conn, trust *tls.Config, timeout time.Duration) (_ *Conn, err error) {
	c := &Conn{conn: raw, r: bufio.NewReader(raw), timeout: timeout, closed: make(chan struct{})}
	_ = raw.SetDeadline(time.Now().Add(timeout))
	line, err := c.r.ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(strings.TrimPrefix(line, "INFO ")), &c.Info)
	}
	if err == nil {
		upgraded := tls.Client(raw, trust)
		err = upgraded.Handshake()
		c.conn, c.r = upgraded, bufio.NewReader(upgraded)
	}
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	return c, nil
}

// Close closes the connection.
func (c *Conn) Close() {
	c.closing.Do(func() { close(c.closed) })
	_ = c.conn.Close()
}

// KeepAlive flushes now and then until Close, since a server gives up whoever
// answers none of its pings: after 40 to 60 s, as ours are configured.
func (c *Conn) KeepAlive() {
	go func() {
		for again := time.NewTicker(10 * time.Second); ; {
			select {
			case <-c.closed:
				again.Stop()
				return
			case <-again.C:
				_ = c.Flush() // whoever looks at the connection will see
			}
		}
	}()
}

// Connect sends CONNECT with the given fields and waits for the verdict: nil
// when admitted, an error wrapping ErrDenied when refused, any other error when
// there was no verdict in time.
func (c *Conn) Connect(fields map[string]any) error {
	all := map[string]any{"verbose": false, "pedantic": false, "lang": "wire", "version": "1", "protocol": 1, "headers": true, "no_responders": true, "tls_required": true}
	for k, v := range fields {
		all[k] = v
	}
	b, err := json.Marshal(all)
	if err != nil {
		return err
	}
	return c.ConnectRaw(string(b))
}

// ConnectRaw sends CONNECT with the given text, whatever it is.
func (c *Conn) ConnectRaw(text string) error {
	if err := c.write("CONNECT " + text + "\r\n"); err != nil {
		return err
	}
	return c.Flush()
}

// Proof is the pair of CONNECT fields by which the holder of a key proves it.
func Proof(kp nkeys.KeyPair, nonce string) map[string]any {
	pub, _ := kp.PublicKey()
	sig, _ := kp.Sign([]byte(nonce))
	return map[string]any{"nkey": pub, "sig": base64.RawURLEncoding.EncodeToString(sig)}
}

// Flush sends PING and waits for PONG. A -ERR on the way is returned wrapped in
// ErrDenied; messages on the way are kept.
func (c *Conn) Flush() error {
	c.flushing.Lock()
	defer c.flushing.Unlock()
	if err := c.write("PING\r\n"); err != nil {
		return c.verdict(err)
	}
	for {
		line, err := c.read()
		if err != nil {
			return c.verdict(err)
		}
		if line == "PONG" {
			return c.verdict(nil)
		}
	}
}

// verdict prefers what the server said over how the connection ended.
func (c *Conn) verdict(err error) error {
	if len(c.pending) > 0 {
		said := strings.Join(c.pending, "; ")
		c.pending = nil
		return fmt.Errorf("%w: %s", ErrDenied, said)
	}
	return err
}

func (c *Conn) write(s string) error {
	_ = c.conn.SetDeadline(time.Now().Add(c.timeout))
	_, err := io.WriteString(c.conn, s)
	return err
}

// read takes one protocol line, storing messages and errors.
func (c *Conn) read() (string, error) {
	_ = c.conn.SetDeadline(time.Now().Add(c.timeout))
	line, err := c.r.ReadString('\n')
	if err != nil {
		return "", err
	}
	line = strings.TrimRight(line, "\r\n")
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "-ERR":
		c.pending = append(c.pending, rest)
	case "PING":
		return line, c.write("PONG\r\n")
	case "MSG", "HMSG":
		return line, c.message(word, strings.Fields(rest))
	}
	return line, nil
}

func (c *Conn) message(word string, f []string) error {
	sizes := 1
	if word == "HMSG" {
		sizes = 2
	}
	if len(f) < 2+sizes {
		return fmt.Errorf("short %s: %v", word, f)
	}
	m := Message{Subject: f[0], Sid: f[1]}
	if len(f) > 2+sizes {
		m.Reply = f[2]
	}
	total, err := strconv.Atoi(f[len(f)-1])
	if err != nil {
		return err
	}
	body := make([]byte, total+2)
	if _, err := io.ReadFull(c.r, body); err != nil {
		return err
	}
	m.Payload = string(body[:total])
	if sizes == 2 {
		n, err := strconv.Atoi(f[len(f)-2])
		if err != nil || n > total {
			return fmt.Errorf("bad HMSG sizes %v", f)
		}
		m.Header, m.Payload = m.Payload[:n], m.Payload[n:]
	}
	c.Messages = append(c.Messages, m)
	return nil
}

// Sub subscribes; queue may be empty. The answer is the server's verdict.
func (c *Conn) Sub(subject, queue, sid string) error {
	if queue != "" {
		subject += " " + queue
	}
	if err := c.write("SUB " + subject + " " + sid + "\r\n"); err != nil {
		return err
	}
	return c.Flush()
}

// Unsub ends a subscription.
func (c *Conn) Unsub(sid string) error { return c.write("UNSUB " + sid + "\r\n") }

// Pub publishes; reply may be empty. The answer is the server's verdict.
func (c *Conn) Pub(subject, reply, payload string) error {
	if reply != "" {
		subject += " " + reply
	}
	if err := c.write(fmt.Sprintf("PUB %s %d\r\n%s\r\n", subject, len(payload), payload)); err != nil {
		return err
	}
	return c.Flush()
}

// HPub publishes with headers, given as "Name: value" lines.
func (c *Conn) HPub(subject, reply string, headers []string, payload string) error {
	if reply != "" {
		subject += " " + reply
	}
	h := "NATS/1.0\r\n" + strings.Join(headers, "\r\n") + "\r\n\r\n"
	if err := c.write(fmt.Sprintf("HPUB %s %d %d\r\n%s%s\r\n", subject, len(h), len(h)+len(payload), h, payload)); err != nil {
		return err
	}
	return c.Flush()
}

// Await reads until a message for which want returns true has been delivered,
// among those already there or those to come.
func (c *Conn) Await(want func(Message) bool) (Message, error) {
	for seen := 0; ; {
		for ; seen < len(c.Messages); seen++ {
			if want(c.Messages[seen]) {
				return c.Messages[seen], nil
			}
		}
		if _, err := c.read(); err != nil {
			return Message{}, err
		}
	}
}
