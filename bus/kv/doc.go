// Package kv is the only place that knows the buckets of unibus: their names,
// keys, records and revisions, and how to read and change them so that an
// answer is provably current.
//
// # Why reads go through a View
//
// A plain KV read is not evidence. Any replica may answer it, it is stale in a
// healthy cluster about one time in ten right after a write, and it goes on
// answering for ever on a node that has lost its quorum. So nothing here reads
// a bucket to decide. A [View] keeps users, rooms and members in memory, fed
// by one consumer per stream, and says for how long what it holds is proven.
//
// # Barrier
//
// A barrier proves a View current. The View writes a record with a fresh token
// under _barrier.<instance>.<boot> into each of the three streams and waits
// until its own feed delivers that very record. Everything committed before
// the write has then been applied. The sequence number of the acknowledgement
// would prove nothing: a stream that was deleted and made again counts from
// one, and an old reader would pass.
//
// # Lease
//
// A completed barrier gives a lease: for lease_ms from the barrier's start, by
// the monotonic and by the wall clock, decisions are made from memory. Without
// a lease nothing is decided. A lease (10 s) outlives the election of a stream
// leader (5 to 8 s), so the loss of one node does not stop admission.
//
// # Acknowledgement
//
// What makes a decision under a lease safe is that every change of access
// waits for it: [Store] returns from a change only when each holder of a lease
// has acknowledged that revision, or that holder's lease has run out. Holders
// are the boots whose barrier record was younger than their own lease plus two
// seconds at the change. A holder acknowledges a change when its View has
// applied it, every decision that began before has ended (see [View.Hold]), and
// whoever enforces changes is done with it (see ViewConfig.OnChange).
//
// # Invariants
//
//  1. A decision made at time t from a View with a lease reflects every change
//     whose call returned before t.
//  2. A View that has seen a gap, a foreign stream identity, or a barrier whose
//     stream time is more than two seconds off its own clock, has no lease
//     until it has loaded everything again.
//  3. A record that cannot be decoded denies its own key and no other.
//  4. Absence is only ever reported from a View, never from a failed read.
//
// A feed that falls silent (its server died, the consumer is gone) is rebuilt
// from nothing while the old tables serve until their lease runs out: they
// acknowledge nothing meanwhile, so writers wait (docs/adr/0003).
package kv
