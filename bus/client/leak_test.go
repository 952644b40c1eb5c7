package client

import (
	"context"
	"crypto/tls"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
)

// Whatever the tests of this package do, nothing of it runs on when they are over.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// leavesNothing fails a test if a goroutine that it began outlives it and all its
// cleanups. The test must not run beside others.
func leavesNothing(t *testing.T) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
}

// elsewhere is a bus that goes away, refuses and hints as a test says. Of the API
// it knows a durable room d, a room e that is encrypted and durable, and a room
// slow, whose messages it never gives out.
type elsewhere struct {
	t     *testing.T
	url   string
	trust *tls.Config
	api   *fake

	away, refuse, hint, revoke atomic.Bool
	hinted                     atomic.Int64
}

func newElsewhere(t *testing.T) *elsewhere {
	t.Helper()
	w := &elsewhere{t: t}
	w.url, w.trust = scripted(t, "Zm9vYmFyLTEyMw", func(say func(string), line string) bool {
		switch {
		case w.away.Load():
			return false
		case w.refuse.Load():
			say("-ERR 'Authorization Violation'")
			return false
		case strings.HasPrefix(line, "SUB notice.") && w.revoke.Load():
			subject, id, _ := strings.Cut(strings.TrimPrefix(line, "SUB "), " ")
			say("MSG " + strings.TrimSuffix(subject, ">") + string(bus.NoticeRevoked) + " " + id + " 7\r\n{\"v\":1}")
		case line == "PING":
			if w.hint.CompareAndSwap(true, false) {
				say(`INFO {"server_id":"NX","version":"2.15.2","proto":1,"headers":true,"max_payload":1048576,"ldm":true}`)
				w.hinted.Add(1)
			}
			say("PONG")
		}
		return true
	})
	w.api = newFake(t, func(rw http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/rooms/d", "/v1/rooms/slow":
			_, _ = io.WriteString(rw, `{"room":{"room":"d","durable":true}}`)
		case "/v1/rooms/plain":
			_, _ = io.WriteString(rw, `{"room":{"room":"plain"}}`)
		case "/v1/rooms/ops":
			_, _ = io.WriteString(rw, `{"room":{"room":"ops","durable":true,"encrypted":true}}`)
		case "/v1/rooms/d/messages", "/v1/rooms/ops/messages":
			_, _ = io.WriteString(rw, `{"room":"d","messages":[],"last":0}`)
		case "/v1/rooms/slow/messages":
			<-r.Context().Done()
			cut(rw, r)
		default:
			_, _ = io.WriteString(rw, `{"user":{"rooms":[{"room":"d","role":"writer","durable":true},{"room":"ops","role":"owner","durable":true,"encrypted":true}]}}`)
		}
	})
	return w
}

// dial connects somebody there; id may be nil. The test closes the Conn.
func (w *elsewhere) dial(id *sig.Identity, keys *Keys) *Conn {
	w.t.Helper()
	if id == nil {
		id = newIdentity(w.t)
	}
	api, err := New(Config{URLs: []string{w.api.URL}, TLS: w.api.Client().Transport.(*http.Transport).TLSClientConfig, Identity: id})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(api.Close)
	c, err := Dial(w.t.Context(), DialConfig{URLs: []string{w.url}, TLS: w.trust, Identity: id, API: api, Keys: keys})
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

func (w *elsewhere) room(c *Conn, id bus.RoomID) *Room {
	w.t.Helper()
	r, err := c.Room(w.t.Context(), id)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *elsewhere) hear(r *Room) *Hearing {
	w.t.Helper()
	h, err := r.Subscribe(w.t.Context(), Hear{}, func(Message) {})
	if err != nil {
		w.t.Fatal(err)
	}
	return h
}

// becomes waits for a state of a connection.
func (w *elsewhere) becomes(c *Conn, want Status) {
	w.t.Helper()
	late := time.After(10 * time.Second)
	for {
		moved, _ := c.movement()
		if c.Status() == want {
			return
		}
		select {
		case <-moved:
		case <-late:
			w.t.Fatalf("status %s, want %s", c.Status(), want)
		}
	}
}

// soon is a context that ends in the middle of what it is for.
func (w *elsewhere) soon() (context.Context, context.CancelFunc) {
	return context.WithTimeout(w.t.Context(), 100*time.Millisecond)
}

// wants is what everything says that did not come to pass.
func (w *elsewhere) wants(what string, err error, code bus.Code) {
	w.t.Helper()
	if bus.CodeOf(err) != code {
		w.t.Errorf("%s: %v, want %s", what, err, code)
	}
}

// However a connection, a room or a hearing ends or fails to begin, it takes all
// its goroutines along.
func TestNothingIsLeft(t *testing.T) {
	for name, do := range map[string]func(*elsewhere){
		"closed under its hearings": func(w *elsewhere) {
			c := w.dial(nil, nil)
			w.hear(w.room(c, "d"))
			w.hear(w.room(c, "plain"))
			w.room(c, "d").Send(w.t.Context(), Outgoing{Topic: "x"})
			c.Close()
			c.Close()
		},
		"unsubscribed first": func(w *elsewhere) {
			c := w.dial(nil, nil)
			defer c.Close()
			for range 5 {
				for _, id := range []bus.RoomID{"d", "plain"} {
					w.hear(w.room(c, id)).Unsubscribe()
				}
			}
		},
		"contexts that end": func(w *elsewhere) {
			c := w.dial(nil, nil)
			defer c.Close()
			ctx, cancel := w.soon()
			defer cancel()
			_, err := w.room(c, "slow").Subscribe(ctx, Hear{}, func(Message) {})
			w.wants("hear a room whose API is stuck", err, bus.Unavailable)
			c.mu.Lock()
			if n := len(c.subs); n != 0 {
				w.t.Errorf("%d subscriptions of who hears nothing", n)
			}
			c.mu.Unlock()
			ctx, cancel = w.soon()
			defer cancel()
			_, err = w.room(c, "d").Publish(ctx, "x", nil)
			w.wants("publish what nobody records", err, bus.Unavailable)
			ctx, cancel = w.soon()
			defer cancel()
			_, err = w.room(c, "plain").Request(ctx, "x", nil)
			w.wants("ask nobody", err, bus.Unavailable)
			ended, cancel := context.WithCancel(w.t.Context())
			cancel()
			_, err = c.Room(ended, "other")
			w.wants("a room", err, bus.Unavailable)
			_, err = w.room(c, "d").Subscribe(ended, Hear{}, func(Message) {})
			w.wants("hear", err, bus.Unavailable)
			_, err = Dial(ended, c.cfg)
			w.wants("dial", err, bus.Unavailable)
		},
		"nobody there": func(w *elsewhere) {
			ctx, cancel := w.soon()
			defer cancel()
			_, err := Dial(ctx, DialConfig{URLs: []string{strings.Replace(nowhere(w.t), "https", "tls", 1)}, TLS: w.trust, Identity: newIdentity(w.t)})
			w.wants("dial", err, bus.Unavailable)
		},
		"refused": func(w *elsewhere) {
			w.refuse.Store(true)
			ctx, cancel := w.soon()
			defer cancel()
			_, err := Dial(ctx, DialConfig{URLs: []string{w.url}, TLS: w.trust, Identity: newIdentity(w.t)})
			w.wants("dial", err, bus.Unauthenticated)
		},
		"not trusted": func(w *elsewhere) {
			ctx, cancel := w.soon()
			defer cancel()
			_, err := Dial(ctx, DialConfig{URLs: []string{w.url}, TLS: &tls.Config{ServerName: "example.com", MinVersion: tls.VersionTLS12}, Identity: newIdentity(w.t)})
			w.wants("dial", err, bus.Unavailable)
		},
		"an outage": func(w *elsewhere) {
			c := w.dial(nil, nil)
			d, plain := w.room(c, "d"), w.room(c, "plain")
			before := w.hear(d)
			w.away.Store(true)
			_ = c.line().Flush()
			w.becomes(c, Disconnected)
			before.Unsubscribe()
			ctx, cancel := w.soon()
			defer cancel()
			_, err := d.Subscribe(ctx, Hear{}, func(Message) {})
			w.wants("hear during the outage", err, bus.Unavailable)
			w.hear(plain).Unsubscribe()
			ctx, cancel = w.soon()
			defer cancel()
			_, err = d.Publish(ctx, "x", nil)
			w.wants("publish during the outage", err, bus.Unavailable)
			w.hear(plain)
			c.Close()
		},
		"an outage that ends": func(w *elsewhere) {
			c := w.dial(nil, nil)
			w.hear(w.room(c, "d"))
			w.away.Store(true)
			_ = c.line().Flush()
			w.becomes(c, Disconnected)
			w.away.Store(false)
			w.becomes(c, Connected)
			c.Close()
		},
		"handed over": func(w *elsewhere) {
			c := w.dial(nil, nil)
			w.hear(w.room(c, "d"))
			w.hear(w.room(c, "plain"))
			for range 3 {
				was := c.line()
				w.hint.Store(true)
				_ = was.Flush()
				for end := time.Now().Add(10 * time.Second); !was.IsClosed(); {
					if time.Now().After(end) {
						w.t.Fatal("the old connection is never closed")
					}
					_ = c.Flush(w.t.Context())
				}
			}
			w.hint.Store(true)
			_ = c.line().Flush()
			c.Close() // into the middle of one
			if n := w.hinted.Load(); n != 4 {
				w.t.Errorf("%d hints", n)
			}
		},
		"revoked": func(w *elsewhere) {
			w.revoke.Store(true)
			c := w.dial(nil, nil)
			w.hear(w.room(c, "d"))
			_ = c.Flush(w.t.Context())
			w.refuse.Store(true)
			_ = c.line().Flush()
			w.becomes(c, Revoked)
			_, err := w.room(c, "d").Publish(w.t.Context(), "x", nil)
			w.wants("publish", err, bus.Unauthenticated)
			c.Close()
		},
		"encrypted": func(w *elsewhere) {
			_, alice, _, _ := company(w.t)
			c := w.dial(alice.Identity, alice.keys)
			w.hear(w.room(c, "ops"))
			w.room(c, "ops").Send(w.t.Context(), Outgoing{Topic: "x", Data: []byte("x")})
			c.Close()
			fine(w.t, alice.rekey(w.t, RekeyOptions{})) // keys outlive their connection
		},
	} {
		t.Run(name, func(t *testing.T) {
			leavesNothing(t)
			do(newElsewhere(t))
		})
	}
}
