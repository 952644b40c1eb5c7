package test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/test/cluster"
)

// BenchmarkRekey measures on a live cluster, whatever b.N is, what another key
// costs in rooms of 100 and of 1,000 members, and prints a table for
// docs/performance.md.
func BenchmarkRekey(b *testing.B) {
	w := newWorld(b, cluster.Options{})
	for _, n := range []int{100, 1000} {
		w.measureRekey(b, table{os.Stdout}, n)
	}
}

// measureRekey lets an owner give a room of n members its key, and another one
// when somebody was removed.
func (w *world) measureRekey(t testing.TB, out table, n int) {
	t.Helper()
	room := bus.RoomID(fmt.Sprintf("rekey-%d", n))
	owner := w.addUser(fmt.Sprintf("rekeyer-%d", n))
	api, err := sdk.New(sdk.Config{URLs: strings.Split(w.URLs(w.APIURL), ","), TLS: w.trust, Identity: owner})
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	keys, err := sdk.NewKeys(sdk.KeysConfig{API: api, Identity: owner.identity(t), Trust: sdk.MemoryTrust()})
	if err == nil {
		_, err = keys.Announce(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	w.addRoom(room, owner, kv.RoomOptions{Encrypted: true})
	var admit []sdk.Admission
	var last *person
	now := time.Now().UTC().Truncate(time.Millisecond)
	(&bench{world: w}).write(func(put func(bucket, key string, record any)) {
		for i := range n - 1 {
			last = newPerson(t, fmt.Sprintf("rekeyed-%d-%d", n, i))
			_, public := last.sealKey(t, 1)
			put(kv.Users, last.key.Hex(), bus.User{
				V: bus.UserVersion, Key: last.key, Handle: bus.Handle(last.name), Role: bus.Member, Status: bus.Active, CreatedAt: now, EncryptionKey: &public,
			})
			put(kv.Members, string(room)+"."+last.key.Hex(), bus.Membership{
				V: bus.MembershipVersion, Room: room, User: last.key, Role: bus.Writer, Status: bus.Present, AddedAt: now,
			})
			admit = append(admit, sdk.Admission{User: last.key, Role: bus.Writer})
		}
	})
	w.patiently("load the members", func(ctx context.Context) (kv.Result, error) {
		return w.store.SetMember(ctx, room, owner.key, bus.Owner)
	})
	timed := func(what string, o sdk.RekeyOptions, members int) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		done, err := keys.Rekey(ctx, room, o)
		if err != nil || done.Members != members || done.Already {
			t.Fatalf("%s: %+v %v", what, done, err)
		}
		out.row(fmt.Sprintf("%s, %d members", what, members), "", "%s", ms(time.Since(began)))
	}
	timed("first key", sdk.RekeyOptions{Admit: admit}, n)
	w.patiently("remove one", func(ctx context.Context) (kv.Result, error) { return w.store.RemoveMember(ctx, room, last.key) })
	timed("another key after a removal", sdk.RekeyOptions{}, n-1)
}
