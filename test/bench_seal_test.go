package test

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/seal"
	"unibus.internal/test/cluster"
)

// BenchmarkRekey measures on a live cluster, whatever b.N is, what another key
// costs in rooms of 100 and of 1,000 members, and prints a table for
// docs/performance.md.
func BenchmarkRekey(b *testing.B) {
	w, out := newWorld(b, cluster.Options{}), table{os.Stdout}
	fmt.Fprintf(out, "\n%s, %d CPUs (%s), %s.\n\n", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), cpuModel(), runtime.Version())
	out.row("measure", "aim", "result")
	out.row("---", "---", "---")
	few, many := 100, 1000
	first, another := w.measureRekey(b, out, few)
	first2, another2 := w.measureRekey(b, out, many)
	each := func(less, more time.Duration) float64 { return (more - less).Seconds() * 1000 / float64(many-few) }
	out.row("each further member: first key, another key", "", "%.2f / %.2f ms", each(first, first2), each(another, another2))
	out.row("  of that, to seal the key to them, on one processor", "", "%.2f ms", sealing(b))
}

// sealing is the CPU, in ms, of giving a key to one member.
func sealing(t testing.TB) float64 {
	owner, member := newPerson(t, "owner"), newPerson(t, "member")
	_, mine := owner.sealKey(t, 1)
	_, theirs := member.sealKey(t, 1)
	key, err := seal.NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r, err := seal.Roster{
		Room: "sealing", Epoch: 1, CreatedAt: time.Now(), Commitment: key.Commitment("sealing", 1),
		Members: []seal.Member{{User: owner.key, Role: bus.Owner, N: 1, Key: seal.HashOf(mine.Public)}, {User: member.key, Role: bus.Writer, N: 1, Key: seal.HashOf(theirs.Public)}},
	}.Sign(owner.identity(t))
	if err != nil {
		t.Fatal(err)
	}
	const n = 300
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := threadCPU()
	for range n {
		if _, err := seal.SealEnvelope(owner.identity(t), r, key, member.key, theirs); err != nil {
			t.Fatal(err)
		}
	}
	return (threadCPU() - before) / n
}

// measureRekey lets an owner give a room of n members its key, and another one
// when somebody was removed, and returns what each took.
func (w *world) measureRekey(t testing.TB, out table, n int) (first, another time.Duration) {
	t.Helper()
	room := bus.RoomID(fmt.Sprintf("rekey-%d", n))
	owner := w.addUser(fmt.Sprintf("rekeyer-%d", n))
	api := w.client(t, owner)
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
	timed := func(what string, o sdk.RekeyOptions, members int) time.Duration {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		done, err := keys.Rekey(ctx, room, o)
		took := time.Since(began)
		if err != nil || done.Members != members || done.Already {
			t.Fatalf("%s: %+v %v", what, done, err)
		}
		out.row(fmt.Sprintf("%s, %d members", what, members), "", "%s", ms(took))
		return took
	}
	first = timed("first key", sdk.RekeyOptions{Admit: admit}, n)
	w.patiently("remove one", func(ctx context.Context) (kv.Result, error) { return w.store.RemoveMember(ctx, room, last.key) })
	return first, timed("another key after a removal", sdk.RekeyOptions{}, n-1)
}
