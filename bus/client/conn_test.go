package client

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
)

// watched is a signer that remembers what it was asked to sign.
type watched struct {
	sig.Signer
	mu     sync.Mutex
	signed []string
}

func (w *watched) Sign(b []byte) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.signed = append(w.signed, string(b))
	return w.Signer.Sign(b)
}

func (w *watched) saw() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.signed
}

// stranger is a server as an attacker would write it: it has a certificate that
// is trusted, asks for the signature of whatever it likes, and lets everybody
// in. What real servers do is tested with real ones.
func stranger(t *testing.T, nonce string) (url string, trust *tls.Config) {
	t.Helper()
	return scripted(t, nonce, func(say func(string), line string) bool {
		if line == "PING" {
			say("PONG")
		}
		return true
	})
}

// scripted is one that answers the lines of its clients as a test says, until
// it is told to hang up.
func scripted(t *testing.T, nonce string, answer func(say func(string), line string) bool) (url string, trust *tls.Config) {
	t.Helper()
	f := newFake(t, nil) // for its certificate
	quoted, err := json.Marshal(nonce)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var open sync.WaitGroup
	var accepted []net.Conn
	open.Go(func() {
		for {
			plain, err := l.Accept()
			if err != nil {
				for _, c := range accepted { // a client that is never closed must not keep the test waiting
					_ = c.Close()
				}
				return
			}
			accepted = append(accepted, plain)
			open.Go(func() {
				defer func() { _ = plain.Close() }()
				_, _ = fmt.Fprintf(plain, "INFO {\"server_id\":\"NX\",\"version\":\"2.15.2\",\"proto\":1,\"headers\":true,\"max_payload\":1048576,\"tls_required\":true,\"nonce\":%s}\r\n", quoted)
				c := tls.Server(plain, &tls.Config{Certificates: f.TLS.Certificates, MinVersion: tls.VersionTLS12})
				say := func(s string) { _, _ = fmt.Fprint(c, s+"\r\n") }
				for lines := bufio.NewScanner(c); lines.Scan() && answer(say, lines.Text()); {
				}
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); open.Wait() })
	roots := x509.NewCertPool()
	roots.AddCert(f.Certificate())
	return "tls://" + l.Addr().String(), &tls.Config{RootCAs: roots, ServerName: "example.com", MinVersion: tls.VersionTLS12}
}

// A server chooses what is signed to log in. It gets no signature of anything
// that could be an HTTP request or a statement of unibus.
func TestDialSignsNonces(t *testing.T) {
	for name, tt := range map[string]struct {
		nonce string
		want  bool
	}{
		"a nonce":         {"Zm9vYmFyLTEyMw", true},
		"a request":       {"\"@method\": POST\n\"@authority\": n1:8470", false},
		"a statement":     {"unibus/v1/room-key\x00ops", false},
		"nothing":         {"", false},
		"far too much":    {string(make([]byte, 4096)), false},
		"not quite":       {"Zm9vYmFyLTEyMw==", false},
		"a line too many": {"Zm9vYmFyLTEyMw\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url, trust := stranger(t, tt.nonce)
			id := &watched{Signer: newIdentity(t)}
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if tt.want {
				ctx = t.Context()
			}
			c, err := Dial(ctx, DialConfig{URLs: []string{url}, TLS: trust, Identity: id})
			if err == nil {
				c.Close()
			}
			if (err == nil) != tt.want {
				t.Errorf("Dial: %v", err)
			}
			if saw := id.saw(); (len(saw) > 0) != tt.want {
				t.Errorf("signed: %q", saw)
			}
			if err != nil && bus.CodeOf(err) != bus.Unavailable {
				t.Errorf("code %s: %v", bus.CodeOf(err), err)
			}
		})
	}
}

// A connection that is closed leaves nothing behind, and has said that it is.
func TestCloseLeavesNothing(t *testing.T) {
	leavesNothing(t)
	url, trust := stranger(t, "Zm9vYmFyLTEyMw")
	id := newIdentity(t)
	round := func() {
		var told []Status
		c, err := Dial(t.Context(), DialConfig{URLs: []string{url}, TLS: trust, Identity: id, OnStatus: func(s Status) { told = append(told, s) }})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Subscribe("ops", func(Message) {}); err != nil {
			t.Fatal(err)
		}
		if err := c.Publish(t.Context(), "ops", "x", nil); err != nil {
			t.Fatal(err)
		}
		if err := c.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.Close()
		if n := len(told); n == 0 || told[n-1] != Closed {
			t.Errorf("told: %v", told)
		}
		if err := c.Publish(t.Context(), "ops", "x", nil); bus.CodeOf(err) != bus.Unavailable {
			t.Errorf("published after the end: %v", err)
		}
		if _, err := c.Subscribe("ops", func(Message) {}); bus.CodeOf(err) != bus.Unavailable {
			t.Errorf("subscribed after the end: %v", err)
		}
	}
	for range 3 {
		round()
	}
}

// Only a notice and a refusal together mean that it is over for good. Whoever is
// refused without having been told goes on trying, and so does who was told, let
// in all the same, and refused later.
func TestOnlyWhoIsToldAndRefusedGivesUp(t *testing.T) {
	for name, tt := range map[string]struct {
		told bool
		from int64 // the connect from which on it is refused
		want Status
	}{
		"told and refused":        {true, 2, Revoked},
		"refused":                 {false, 2, Refused},
		"told, and refused later": {true, 3, Refused},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			id := newIdentity(t)
			var connects, pings atomic.Int64
			refusals := make(chan struct{}, 1000)
			url, trust := scripted(t, "Zm9vYmFyLTEyMw", func(say func(string), line string) bool {
				switch {
				case strings.HasPrefix(line, "CONNECT "):
					pings.Store(0)
					if connects.Add(1) >= tt.from {
						say("-ERR 'Authorization Violation'")
						refusals <- struct{}{}
						return false
					}
				case strings.HasPrefix(line, "SUB notice.") && connects.Load() == 1 && tt.told:
					say("MSG " + bus.NoticeSubject(id.Key(), bus.NoticeRevoked) + " " + line[strings.LastIndexByte(line, ' ')+1:] + " 7\r\n{\"v\":1}")
				case line == "PING":
					say("PONG")
					return pings.Add(1) == 1 // it hangs up on who asks again
				}
				return true
			})
			status := make(chan Status, 100)
			c, err := Dial(t.Context(), DialConfig{URLs: []string{url}, TLS: trust, Identity: id, OnStatus: func(s Status) { status <- s }})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			wait := func(want Status) {
				t.Helper()
				late := time.After(10 * time.Second)
				for {
					select {
					case s := <-status:
						if s == want {
							return
						}
						if s == Revoked {
							t.Fatal("it has given up")
						}
					case <-late:
						t.Fatalf("status %s, want %s", c.Status(), want)
					}
				}
			}
			wait(Connected)
			for range tt.from - 2 {
				_ = c.line().Flush()
				wait(Connected)
			}
			_ = c.line().Flush()
			wait(tt.want)
			<-refusals
			if tt.want == Refused {
				for range 3 {
					<-refusals
				}
				if s := c.Status(); s == Revoked {
					t.Error("it has given up")
				}
				return
			}
			select {
			case <-refusals:
				t.Error("it tries again")
			case <-time.After(500 * time.Millisecond):
			}
			if err := c.Publish(t.Context(), "ops", "x", nil); bus.CodeOf(err) != bus.Unauthenticated {
				t.Errorf("published: %v", err)
			}
			if err := c.Flush(t.Context()); bus.CodeOf(err) != bus.Unauthenticated {
				t.Errorf("flushed: %v", err)
			}
			if _, err := c.Subscribe("ops", func(Message) {}); bus.CodeOf(err) != bus.Unauthenticated {
				t.Errorf("subscribed: %v", err)
			}
		})
	}
}

// A room that is heard, and a message that nobody stores, end with their
// connection and leave nothing behind.
func TestRoomLeavesNothing(t *testing.T) {
	leavesNothing(t)
	url, trust := stranger(t, "Zm9vYmFyLTEyMw")
	id := newIdentity(t)
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/rooms/d":
			_, _ = io.WriteString(w, `{"room":{"room":"d","durable":true}}`)
		case "/v1/rooms/d/messages":
			_, _ = io.WriteString(w, `{"room":"d","messages":[],"last":0}`)
		default:
			_, _ = io.WriteString(w, `{"user":{"rooms":[{"room":"d","role":"writer","durable":true}]}}`)
		}
	})
	round := func() {
		api, err := New(Config{URLs: []string{f.URL}, TLS: f.Client().Transport.(*http.Transport).TLSClientConfig, Identity: id})
		if err != nil {
			t.Fatal(err)
		}
		defer api.Close()
		c, err := Dial(t.Context(), DialConfig{URLs: []string{url}, TLS: trust, Identity: id, API: api})
		if err != nil {
			t.Fatal(err)
		}
		room, err := c.Room(t.Context(), "d")
		if err != nil {
			t.Fatal(err)
		}
		if same, err := c.Room(t.Context(), "d"); err != nil || same != room {
			t.Errorf("another Room of the same room: %v", err)
		}
		hearing, err := room.Subscribe(t.Context(), Hear{}, func(Message) {})
		if err != nil {
			t.Fatal(err)
		}
		sending := room.Send(t.Context(), Outgoing{Topic: "x"})
		c.Close()
		if _, err := sending.Wait(t.Context()); bus.CodeOf(err) != bus.Unavailable {
			t.Errorf("sent into the end: %v", err)
		}
		if _, err := room.Send(t.Context(), Outgoing{Topic: "x"}).Wait(t.Context()); bus.CodeOf(err) != bus.Unavailable {
			t.Errorf("sent after the end: %v", err)
		}
		if _, err := room.Subscribe(t.Context(), Hear{}, func(Message) {}); bus.CodeOf(err) != bus.Unavailable {
			t.Errorf("heard after the end: %v", err)
		}
		hearing.Unsubscribe()
	}
	for range 3 {
		round()
	}
}
