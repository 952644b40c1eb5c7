package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
)

const (
	dialTimeout = 1500 * time.Millisecond
	tlsTimeout  = 2500 * time.Millisecond
	readTimeout = 5 * time.Second
	// changeTimeout is longer than a service works at one change: the longest
	// lease (10 s), and 5 s around it.
	changeTimeout = 18 * time.Second
	// idleTimeout is far below the services': a connection that they have closed
	// meanwhile would make the answer of a change a matter of doubt.
	idleTimeout = 5 * time.Second
	// patience is the longest Retry-After that is waited for; who is asked to
	// wait longer tells the caller.
	patience    = time.Second
	minAttempts = 3
	maxAnswer   = 32 << 20
)

// Config configures a Client.
type Config struct {
	URLs     []string         // https://host:port of each node, or of what stands before them
	TLS      *tls.Config      // what to trust; nil: the system's authorities
	CAFile   string           // what to trust instead, read at each connect; may be empty
	Identity sig.Signer       // whose requests these are
	Now      func() time.Time // nil: time.Now
	Rand     io.Reader        // nil: crypto/rand; safe for concurrent use
	Log      *slog.Logger     // nil: silent. Told of failovers and clock corrections, never of bodies
}

// Client makes signed requests of one identity. It is safe for concurrent use.
type Client struct {
	identity  sig.Signer
	http      *http.Client
	transfers *http.Client // of files: one connection each
	nodes     []string     // scheme and authority, nothing behind it
	now       func() time.Time
	rand      io.Reader
	log       *slog.Logger

	mu      sync.Mutex
	first   int             // index of the node that answered last
	offsets []time.Duration // what each node's clock is ahead of ours, as far as it mattered
}

// New prepares a Client and connects to nothing yet.
func New(cfg Config) (*Client, error) {
	c := &Client{identity: cfg.Identity, now: cfg.Now, rand: cfg.Rand, log: cfg.Log}
	if c.identity == nil {
		return nil, bus.E(bus.Invalid, "a client needs an identity to sign with")
	}
	if c.now == nil {
		c.now = time.Now
	}
	if c.rand == nil {
		c.rand = rand.Reader
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	for _, raw := range cfg.URLs {
		u, err := url.Parse(strings.TrimSpace(raw))
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
			return nil, bus.E(bus.Invalid, "%.100q is no address of an API: https://host:port is expected", raw)
		}
		c.nodes = append(c.nodes, "https://"+u.Host)
	}
	if len(c.nodes) == 0 {
		return nil, bus.E(bus.Invalid, "a client needs the address of at least one API")
	}
	c.offsets = make([]time.Duration, len(c.nodes))
	trust := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.TLS != nil {
		trust = cfg.TLS.Clone()
	}
	transport := &http.Transport{
		DialContext:           (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSClientConfig:       trust,
		TLSHandshakeTimeout:   tlsTimeout,
		IdleConnTimeout:       idleTimeout,
		ExpectContinueTimeout: readTimeout,
		DisableCompression:    true,
	}
	if cfg.CAFile != "" {
		if _, err := bus.Roots(cfg.CAFile); err != nil {
			return nil, err
		}
		transport.DialTLSContext = dialTrusting(trust, cfg.CAFile)
	}
	// A signature names one server and one path; it is not handed on.
	stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	c.http = &http.Client{Transport: transport, CheckRedirect: stay}
	single := transport.Clone()
	single.DisableKeepAlives, single.WriteBufferSize, single.ReadBufferSize = true, transferBuffer, transferBuffer
	c.transfers = &http.Client{Transport: single, CheckRedirect: stay}
	return c, nil
}

// dialTrusting connects with the authorities that the file holds at that moment.
func dialTrusting(base *tls.Config, caFile string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		pool, err := bus.Roots(caFile)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, dialTimeout+tlsTimeout)
		defer cancel()
		trust := base.Clone()
		trust.RootCAs = pool
		dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: dialTimeout}, Config: trust}
		return dialer.DialContext(ctx, network, address)
	}
}

// Close closes idle connections. Requests under way are not disturbed.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Key is the identity's public key.
func (c *Client) Key() bus.UserKey { return c.identity.Key() }

// Do sends one signed request and returns whatever is answered; err is set only
// when nothing was. path begins with a slash and may hold a query; body is JSON
// or nil. GET and HEAD are repeated freely, PUT and DELETE too, since making
// them twice comes to the same; POST and PATCH only when they certainly did
// nothing.
func (c *Client) Do(ctx context.Context, method, path string, body []byte) (status int, header http.Header, answer []byte, err error) {
	a, err := c.send(ctx, call{
		method: method, path: path, body: body,
		again: slices.Contains([]string{http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete}, method),
	})
	if err != nil {
		return 0, nil, nil, err
	}
	return a.status, a.header, a.body, nil
}

// call is one request, to whichever node.
type call struct {
	method, path string
	header       http.Header
	body         []byte
	again        bool // it may be sent again although it may have had its effect
}

func (r call) reads() bool { return r.method == http.MethodGet || r.method == http.MethodHead }

type answer struct {
	status int
	header http.Header
	body   []byte
	date   time.Time // of the answering node; zero if it told none
	// doubtful: an earlier attempt of the same call may have had its effect
	doubtful bool
}

// patience is how long a node asked to be left alone.
func (a *answer) patience() time.Duration {
	s, err := strconv.ParseUint(a.header.Get("Retry-After"), 10, 16)
	if err != nil {
		return 0
	}
	return time.Duration(s) * time.Second
}

// nothingDone reports whether a refusal says of itself that the request had no
// effect: a 429 is told before anything else, and a 503 may carry EffectHeader.
func (a *answer) nothingDone() bool {
	return a.status == http.StatusTooManyRequests || a.header.Get(bus.EffectHeader) == bus.EffectNone
}

// send asks one node after the other, as the package comment says.
func (c *Client) send(ctx context.Context, r call) (*answer, error) {
	attempts := max(len(c.nodes), minAttempts)
	var told *answer // the last refusal of a node that could not serve now
	var failures []string
	var badCertificate error
	doubtful, corrected, resigned := false, false, false
	c.mu.Lock()
	first := c.first
	c.mu.Unlock()
	for n := 0; n < attempts; n++ {
		i := (first + n) % len(c.nodes)
		a, t, err := c.attempt(ctx, i, r)
		switch {
		case err != nil:
			if e := new(bus.Error); errors.As(err, &e) { // cannot be signed, by whomever
				return nil, err
			}
			if ctx.Err() != nil {
				return nil, c.gaveUp(ctx, r, i, doubtful || t.sent)
			}
			failures = append(failures, fmt.Sprintf("%s: %v", c.nodes[i], cause(err)))
			if e := new(tls.CertificateVerificationError); errors.As(err, &e) {
				badCertificate = bus.E(bus.Unauthenticated, "%s did not prove who it is: %w", c.nodes[i], err).
					WithHint("unibusctl env shows the CA in use")
			}
			if t.sent {
				if !r.again {
					return nil, lost(r, c.nodes[i], cause(err))
				}
				doubtful = true
			}
			c.log.Debug("no answer", "node", c.nodes[i], "method", r.method, "sent", t.sent, "err", err)
		case a.status == http.StatusUnauthorized && !corrected && c.correct(i, a.date):
			corrected = true
			n-- // the same node, by its own clock
			continue
		case a.status == http.StatusUnauthorized && t.resent && !resigned:
			// net/http repeats a read on a new connection with the bytes it has: if
			// the first did arrive, its nonce is used up.
			resigned = true
			n--
			continue
		case slices.Contains([]int{http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout}, a.status):
			told = a
			if !r.again && !a.nothingDone() {
				return c.answered(i, a, doubtful), nil
			}
			doubtful = doubtful || !r.reads() && !a.nothingDone()
			c.log.Debug("the node asks for patience", "node", c.nodes[i], "method", r.method, "status", a.status)
		default:
			return c.answered(i, a, doubtful), nil
		}
		if n+1 < attempts && !c.pause(ctx, n, told) {
			break
		}
	}
	switch {
	case told != nil:
		told.doubtful = doubtful
		return told, nil
	case ctx.Err() != nil:
		return nil, c.gaveUp(ctx, r, first, doubtful)
	case badCertificate != nil:
		return nil, badCertificate
	case doubtful && !r.reads():
		return nil, lost(r, "any node", errors.New(strings.Join(slices.Compact(failures), "; ")))
	}
	return nil, bus.E(bus.Unavailable, "no node answers: %s", strings.Join(slices.Compact(failures), "; ")).WithHint("unibusctl cluster status")
}

// answered remembers who works.
func (c *Client) answered(i int, a *answer, doubtful bool) *answer {
	a.doubtful = doubtful
	if a.status < 500 && a.status != http.StatusTooManyRequests {
		c.mu.Lock()
		c.first = i
		c.mu.Unlock()
	}
	return a
}

// correct takes over the clock of a node that refused, if ours is so far from
// it that this may be why. The date is as authentic as the node's certificate.
func (c *Client) correct(i int, date time.Time) bool {
	if date.IsZero() {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	offset := date.Sub(c.now())
	if (offset - c.offsets[i]).Abs() <= sig.Window {
		return false
	}
	c.log.Warn("the clocks differ", "node", c.nodes[i], "ahead", offset.Round(time.Second))
	c.offsets[i] = offset
	return true
}

// pause waits before attempt n+1: a moment before another node, longer before
// one that was asked already. It reports false if that is not worth it.
func (c *Client) pause(ctx context.Context, n int, told *answer) bool {
	var b [1]byte
	_, _ = io.ReadFull(c.rand, b[:]) // no jitter is no harm
	d := time.Duration(b[0]) * 50 * time.Millisecond / 255
	if n+1 >= len(c.nodes) { // once round
		d = 100*time.Millisecond + 4*d
		if told != nil {
			wait := told.patience()
			if wait > patience {
				return false
			}
			d = max(d, wait)
		}
	}
	if by, ok := ctx.Deadline(); ok && time.Until(by) <= d {
		return false
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// trace is how far one attempt went.
type trace struct {
	sent   bool // there was a connection: the node may have the request
	resent bool // net/http has taken a second connection for it
}

// attempt signs and sends once. An error that is a *bus.Error was raised before
// anything was sent; any other is a failure of the way to the node.
func (c *Client) attempt(ctx context.Context, i int, r call) (*answer, trace, error) {
	limit := changeTimeout
	if r.reads() {
		limit = readTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var mu sync.Mutex
	connections := 0
	traced := func() trace {
		mu.Lock()
		defer mu.Unlock()
		return trace{sent: connections > 0, resent: connections > 1}
	}
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) {
		mu.Lock()
		defer mu.Unlock()
		connections++
	}})
	req, err := c.request(ctx, i, r)
	if err != nil {
		return nil, trace{}, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, traced(), err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, traced(), err
	}
	if len(body) > maxAnswer {
		return nil, traced(), fmt.Errorf("the answer is larger than %d MiB", maxAnswer>>20)
	}
	a := &answer{status: resp.StatusCode, header: resp.Header, body: body}
	if t, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		a.date = t
	}
	return a, traced(), nil
}

func (c *Client) request(ctx context.Context, i int, r call) (*http.Request, error) {
	if !strings.HasPrefix(r.path, "/") {
		return nil, bus.E(bus.Invalid, "%.100q is no path: it begins with a slash", r.path)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, c.nodes[i]+r.path, bytes.NewReader(r.body))
	if err != nil {
		return nil, bus.E(bus.Invalid, "no request can be made of %.20q %.100q: %w", r.method, r.path, err)
	}
	for k, v := range r.header {
		req.Header[k] = v
	}
	req.Header.Set("Accept", "application/json, application/problem+json")
	if len(r.body) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	nonce, err := sig.NewNonce(c.rand)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	created := c.now().Add(c.offsets[i])
	c.mu.Unlock()
	// Which routes take a body that is larger than most, the services say.
	return req, sig.SignStream(req, sig.DigestOf(r.body), c.identity, created, nonce)
}

// cause is what went wrong without the URL in front of it.
func cause(err error) error {
	if u := new(url.Error); errors.As(err, &u) {
		return u.Err
	}
	return err
}

func lost(r call, node string, err error) error {
	return bus.E(bus.Unavailable, "no answer from %s: %s %s may or may not have been carried out: %w", node, r.method, r.path, err).
		WithHint("look before you repeat it")
}

func (c *Client) gaveUp(ctx context.Context, r call, i int, doubtful bool) error {
	if doubtful && !r.reads() {
		return lost(r, c.nodes[i], context.Cause(ctx))
	}
	return bus.E(bus.Unavailable, "no answer from %s in time: %w", c.nodes[i], context.Cause(ctx)).WithHint("unibusctl cluster status")
}

// exchange makes a call and decodes its answer. out may be nil.
func (c *Client) exchange(ctx context.Context, r call, in, out any) error {
	if in != nil {
		var err error
		if r.body, err = json.Marshal(in); err != nil {
			return bus.E(bus.Invalid, "this cannot be sent: %w", err)
		}
	}
	a, err := c.send(ctx, r)
	if err != nil {
		return err
	}
	if a.status < 200 || a.status > 299 {
		return a.problem()
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(a.body, out); err != nil {
		return bus.E(bus.Internal, "the answer to %s %s is not what was asked for: %w", r.method, r.path, err)
	}
	return nil
}

// problem is the error that the service raised.
func (a *answer) problem() error {
	e := ErrorOf(a.status, a.header, a.body)
	if b := new(bus.Error); a.doubtful && errors.As(e, &b) && b.Code == bus.Conflict {
		c := *b
		c.Msg += " (an earlier attempt got no answer, and may have done just that)"
		return &c
	}
	return e
}

// ErrorOf is the *bus.Error in an answer of Do: nil if it is a success, what the
// service raised if it is a problem document, and never a decision if it is
// something else, such as the page of a proxy.
func ErrorOf(status int, header http.Header, body []byte) error {
	if status >= 200 && status <= 299 {
		return nil
	}
	var p bus.Problem
	kind, _, _ := strings.Cut(header.Get("Content-Type"), ";")
	code, ours := bus.Code(""), false
	if kind == "application/problem+json" && json.Unmarshal(body, &p) == nil {
		var name string
		name, ours = strings.CutPrefix(p.Type, bus.ProblemType)
		code = bus.Code(name)
	}
	why := fmt.Errorf("status %d, request %q", status, p.RequestID)
	switch {
	case !ours && (status == http.StatusTooManyRequests || status >= http.StatusBadGateway && status <= http.StatusGatewayTimeout):
		return bus.E(bus.Unavailable, "what answers is not unibus but something before it, with status %d", status).WithHint("unibusctl cluster status")
	case !ours:
		return bus.E(bus.Internal, "what answers is not unibus, with status %d", status).WithHint("unibusctl env shows the address in use")
	}
	e := &bus.Error{Code: code, Msg: p.Detail, Hint: p.Hint, Err: why}
	if !slices.Contains([]bus.Code{bus.Invalid, bus.Unauthenticated, bus.Forbidden, bus.NotFound, bus.Conflict, bus.Unavailable}, code) {
		e.Code = bus.Internal
	}
	if e.Msg == "" {
		e.Msg = strings.ToLower(p.Title)
		if p.RequestID != "" {
			e.Msg += ", request " + p.RequestID
		}
	}
	return e
}
