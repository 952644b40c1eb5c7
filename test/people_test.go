package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// person is somebody with a key of their own.
type person struct {
	name string
	kp   nkeys.KeyPair
	key  bus.UserKey
}

func newPerson(t testing.TB, name string) *person {
	t.Helper()
	kp, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	key, err := bus.ParseUserKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return &person{name: name, kp: kp, key: key}
}

// seedFile writes the person's seed where a CLI can read it.
func (p *person) seedFile(t testing.TB) string {
	t.Helper()
	seed, err := p.kp.Seed()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), p.name+".nk")
	if err := os.WriteFile(path, append(seed, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// options are what a default nats.go client of this person would use.
func (p *person) options(ca string) []nats.Option {
	return []nats.Option{
		nats.RootCAs(ca), nats.Nkey(p.key.NKey(), p.kp.Sign), nats.CustomInboxPrefix(bus.InboxPrefix(p.key)), nats.Name(p.name),
	}
}

// world is a cluster with a View and a Store of the test's own, which obey the
// same rules as unibusctl --direct.
type world struct {
	*cluster.Cluster
	t     testing.TB
	store *kv.Store
	view  *kv.View
	link  *nats.Conn // of store and view
	trust *tls.Config
	admin *person

	http *http.Client // of all requests to the API
}

// newWorld starts a cluster with callouts and a first admin.
func newWorld(t testing.TB, o cluster.Options) *world {
	t.Helper()
	o.Authcallout, o.Membership = true, true
	withoutGuard(&o)
	w := &world{Cluster: cluster.Start(t, o), t: t}
	trust, err := wire.Trust(w.CA())
	if err != nil {
		t.Fatal(err)
	}
	w.trust = trust
	w.http = apiHTTP(t, trust)
	w.openStore()
	w.admin = newPerson(t, "admin")
	if _, err := w.store.Bootstrap(t.Context(), w.admin.key, "admin"); err != nil {
		t.Fatalf("bootstrap: %v", err)
	}
	w.waitAdmits(w.admin, w.Nodes()...)
	return w
}

// withoutGuard passes the one protection that a negative control takes away on
// to the services: see controls_test.go.
func withoutGuard(o *cluster.Options) {
	off := os.Getenv("UNIBUS_GUARD_OFF")
	if off == "" {
		return
	}
	o.Controls = true
	if o.Env == nil {
		o.Env = map[cluster.Service]map[string]string{}
	}
	for _, s := range []cluster.Service{cluster.Authcallout, cluster.Membership} {
		env := maps.Clone(o.Env[s])
		if env == nil {
			env = map[string]string{}
		}
		env["UNIBUS_GUARD_OFF"] = off
		o.Env[s] = env
	}
	if off == string(guard.FreshReads) { // a careless bus would allow the reads it decides on
		o.Edit = func(l *cluster.Layout) error {
			for i := range l.Ports {
				file := filepath.Join(l.Etc(i+1), "nats", "conf.d", "accounts.conf")
				text, err := os.ReadFile(file)
				if err != nil {
					return err
				}
				text = bytes.ReplaceAll(text, []byte(`"unibus.ack.*.*"`), []byte(`"unibus.ack.*.*", "$JS.API.DIRECT.GET.>"`))
				if err := os.WriteFile(file, text, 0o600); err != nil {
					return err
				}
			}
			return nil
		}
	}
}

func (w *world) openStore() {
	w.t.Helper()
	nc, err := kv.Connect(kv.Link{
		URL: w.URLs(w.NATSURL), SeedFile: w.Seed("ops"), CAFile: w.CA(), Name: "test-store", Inbox: "_INBOX_ops", Timeout: 2 * time.Second,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	view, err := kv.NewView(kv.ViewConfig{Conn: nc, Service: "unibusctl", Node: "test", EncryptionKeys: true})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { view.Run(ctx); close(done) }()
	w.t.Cleanup(func() { cancel(); <-done; nc.Close() })
	w.view, w.link = view, nc
	w.store, err = kv.OpenStore(kv.StoreConfig{View: view, Actor: "test"})
	if err != nil {
		w.t.Fatal(err)
	}
}

// patiently repeats a change while the cluster has no quorum for it.
func (w *world) patiently(what string, change func(context.Context) (kv.Result, error)) kv.Result {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 90*time.Second)
	defer cancel()
	began := time.Now()
	for {
		res, err := change(ctx)
		w.t.Logf("%s: %s: %v", what, time.Since(began).Round(time.Millisecond), err)
		var u *kv.Unproven
		switch {
		case err == nil:
			return res
		case ctx.Err() != nil, bus.CodeOf(err) != bus.Unavailable && !errors.As(err, &u):
			w.t.Fatalf("%s: %v", what, err)
		}
	}
}

func (w *world) addUser(name string) *person {
	w.t.Helper()
	p := newPerson(w.t, name)
	w.given("add "+name, func(ctx context.Context) error {
		_, err := w.store.AddUser(ctx, p.key, bus.Handle(name), bus.Member)
		return err
	})
	return p
}

func (w *world) addRoom(id bus.RoomID, owner *person, o kv.RoomOptions) {
	w.t.Helper()
	w.given(fmt.Sprintf("create room %s", id), func(ctx context.Context) error {
		_, err := w.store.CreateRoom(ctx, id, owner.key, o)
		return err
	})
}

func (w *world) join(id bus.RoomID, p *person, role bus.RoomRole) {
	w.t.Helper()
	w.given(fmt.Sprintf("add %s to %s", p.name, id), func(ctx context.Context) error {
		_, err := w.store.SetMember(ctx, id, p.key, role)
		return err
	})
}

// given makes a change that a test begins with. A machine that stands still for
// longer than a lease leaves the test's own View without one for a moment: then
// nothing is written, and the change is made when there is one again.
func (w *world) given(what string, change func(context.Context) error) {
	w.t.Helper()
	bound, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	var err error
	_ = cluster.Poll(bound, func(context.Context) error {
		if err = change(w.t.Context()); bus.CodeOf(err) == bus.Unavailable && strings.Contains(err.Error(), withoutLease) {
			return err
		}
		return nil
	})
	if err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
}

// withoutLease is what a View says that may not decide.
const withoutLease = "no barrier within the lease"

// verdict is what came of one attempt to connect.
type verdict int

const (
	admitted verdict = iota
	refused          // an explicit denial
	silent           // no answer in time: the service did not know, or the node is away
)

func (v verdict) String() string { return [...]string{"admitted", "refused", "silent"}[v] }

// denialWithin separates a denial, which is answered at once, from silence,
// which the server turns into the same words only after its own deadline.
const denialWithin = 1900 * time.Millisecond

// knock opens a connection to node i, from its own machine where it has one.
func (w *world) knock(i int, timeout time.Duration) (*wire.Conn, error) {
	raw, err := w.From(i).Dial("tcp", strings.TrimPrefix(w.NATSURL(i), "tls://"))
	if err != nil {
		return nil, err
	}
	return wire.Over(raw, w.trust, timeout)
}

// attempt connects once to node i with a proper proof. It may be called from
// any goroutine.
func (w *world) attempt(i int, p *person) (verdict, error) {
	c, err := w.knock(i, 3*time.Second)
	if err != nil {
		return silent, err
	}
	defer c.Close()
	started := time.Now()
	err = c.Connect(wire.Proof(p.kp, c.Info.Nonce))
	switch {
	case err == nil:
		return admitted, nil
	case errors.Is(err, wire.ErrDenied) && time.Since(started) < denialWithin:
		return refused, err
	}
	return silent, err
}

// connectRaw returns an admitted raw connection. Silence is no refusal: then it
// knocks again.
func (w *world) connectRaw(i int, p *person) (c *wire.Conn) {
	w.t.Helper()
	bound, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	var err error
	_ = cluster.Poll(bound, func(context.Context) error {
		if c, err = w.knock(i, 5*time.Second); err != nil {
			return err
		}
		began := time.Now()
		if err = c.Connect(wire.Proof(p.kp, c.Info.Nonce)); err != nil {
			c.Close()
		}
		if errors.Is(err, wire.ErrDenied) && time.Since(began) < denialWithin {
			return nil
		}
		return err
	})
	if err != nil {
		w.t.Fatalf("%s is not admitted to n%d: %v", p.name, i, err)
	}
	w.t.Cleanup(c.Close)
	return c
}

// waitAdmits waits until the nodes answer p with admission.
func (w *world) waitAdmits(p *person, nodes ...int) {
	w.t.Helper()
	for _, i := range nodes {
		cluster.WaitFor(w.t, 30*time.Second, fmt.Sprintf("n%d to admit %s", i, p.name), func() error {
			v, err := w.attempt(i, p)
			if v != admitted {
				return fmt.Errorf("%s: %w", v, err)
			}
			return nil
		})
	}
}
