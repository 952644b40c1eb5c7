package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

func benchRoom(n int) bus.RoomID { return bus.RoomID(fmt.Sprintf("bench-%d", n%benchRooms)) }

// roomsOf are the rooms of the nth user.
func roomsOf(n, count int) []bus.RoomID {
	rooms := make([]bus.RoomID, count)
	for i := range rooms {
		rooms[i] = benchRoom(n + i)
	}
	return rooms
}

func (b *bench) seedRooms() {
	now := time.Now().UTC()
	b.write(func(put func(bucket, key string, record any)) {
		for n := range benchRooms {
			id := benchRoom(n)
			put(kv.Rooms, string(id), bus.Room{V: bus.RoomVersion, ID: id, Status: bus.RoomActive, Creator: b.admin.key, CreatedAt: now})
		}
	})
}

// seedUsers registers n users, counted from first, with some rooms each, and
// returns when every service knows them.
func (b *bench) seedUsers(first, n, rooms int) []*person {
	b.t.Helper()
	people, now := make([]*person, n), time.Now().UTC()
	for i := range people {
		people[i] = newPerson(b.t, fmt.Sprintf("bench-%d", first+i))
	}
	b.write(func(put func(bucket, key string, record any)) {
		for i, p := range people {
			put(kv.Users, p.key.Hex(), bus.User{V: bus.UserVersion, Key: p.key, Handle: bus.Handle(p.name), Role: bus.Member, Status: bus.Active, CreatedAt: now})
			for _, id := range roomsOf(first+i, rooms) {
				put(kv.Members, string(id)+"."+p.key.Hex(), bus.Membership{
					V: bus.MembershipVersion, Room: id, User: p.key, Role: bus.Writer, Status: bus.Present, AddedAt: now,
				})
			}
		}
	})
	// The streams are ordered: who acknowledges this change has applied all before it.
	// Patiently, for 20,000 records may take longer than a change may wait for its barrier.
	res := b.patiently("load the users", func(ctx context.Context) (kv.Result, error) {
		return b.store.SetMember(ctx, benchRoom(0), b.admin.key, bus.Writer)
	})
	if len(res.Expired) > 0 {
		b.t.Fatalf("not everybody has loaded the users: waited for %v", res.Expired)
	}
	b.waitAdmits(people[n-1], b.Nodes()...)
	return people
}

// write stores records past the Store, which proves each change and so takes
// milliseconds for one: a benchmark needs 200,000.
func (b *bench) write(fill func(put func(bucket, key string, record any))) {
	b.t.Helper()
	js, err := jetstream.New(b.Ops(), jetstream.WithPublishAsyncMaxPending(1000), jetstream.WithPublishAsyncTimeout(30*time.Second))
	if err != nil {
		b.t.Fatal(err)
	}
	var written []jetstream.PubAckFuture
	fill(func(bucket, key string, record any) {
		value, err := json.Marshal(record)
		if err != nil {
			b.t.Fatal(err)
		}
		f, err := js.PublishAsync("$KV."+bucket+"."+key, value, jetstream.WithStallWait(30*time.Second))
		if err != nil {
			b.t.Fatal(err)
		}
		written = append(written, f)
	})
	for _, f := range written {
		select {
		case <-f.Ok():
		case err := <-f.Err():
			b.t.Fatal(err)
		}
	}
}

// startRival starts three stock servers with the same configuration, except
// that the users stand in it with their keys and rights instead of being asked
// for by the callout.
func startRival(t testing.TB, users []*person) *world {
	t.Helper()
	c := cluster.Start(t, cluster.Options{Edit: func(l *cluster.Layout) error {
		for i := range l.Ports {
			file := filepath.Join(l.Etc(i+1), "nats", "conf.d", "accounts.conf")
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if text, err = withStaticUsers(text, users); err != nil {
				return err
			}
			if err := os.WriteFile(file, text, 0o600); err != nil {
				return err
			}
		}
		return nil
	}})
	trust, err := wire.Trust(c.CA())
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Cluster: c, t: t, trust: trust}
	w.mustAuthenticate(users[0])
	return w
}

// withStaticUsers takes the callout out of a rendered accounts.conf and puts
// users into account BUS.
func withStaticUsers(text []byte, users []*person) ([]byte, error) {
	head, rest, found := bytes.Cut(text, []byte("  auth_callout {\n"))
	_, tail, ended := bytes.Cut(rest, []byte("\n  }\n"))
	accounts, bus_, inBus := bytes.Cut(tail, []byte("\n  BUS {"))
	limits, others, listed := bytes.Cut(bus_, []byte("    users: [\n"))
	if !found || !ended || !inBus || !listed {
		return nil, errors.New("accounts.conf has another form than this benchmark knows")
	}
	out := bytes.NewBuffer(bytes.Clone(head)) // it has room for more, which is what follows
	fmt.Fprintf(out, "%s\n  BUS {%s    users: [\n", accounts, limits)
	for n, p := range users {
		hears, says := []string{bus.InboxSubscribe(p.key), bus.NoticeSubscribe(p.key)}, []string{}
		for _, id := range roomsOf(n, roomsPerUser) {
			says, hears = append(says, bus.RoomPublish(id, p.key)), append(hears, bus.RoomSubscribe(id))
		}
		fmt.Fprintf(out, "      { nkey: %s, permissions: { publish: %s, subscribe: %s } }\n", p.key.NKey(), list(says), list(hears))
	}
	out.Write(others)
	return out.Bytes(), nil
}

func list(subjects []string) []byte {
	raw, _ := json.Marshal(subjects) // strings always encode
	return bytes.ReplaceAll(raw, []byte(`\u003e`), []byte(">"))
}

// mustAuthenticate makes sure that the rival does the work it is compared for.
func (w *world) mustAuthenticate(p *person) {
	w.t.Helper()
	if v, err := w.attempt(1, newPerson(w.t, "stranger")); v == admitted {
		w.t.Fatalf("a stranger to the static cluster is %s: %v", v, err)
	}
	c := w.connectRaw(1, p)
	if err := c.Pub(bus.RoomSubject(benchRoom(0), p.key, "t"), "", ""); err != nil {
		w.t.Fatalf("publish in an own room: %v", err)
	}
	if err := c.Pub(bus.RoomSubject(benchRoom(roomsPerUser), p.key, "t"), "", ""); !errors.Is(err, wire.ErrDenied) {
		w.t.Fatalf("publish in a foreign room: %v", err)
	}
}
