// Package bus holds the nouns of unibus - users, rooms, memberships - and the
// rules that decide whether bytes may become one of them.
//
// unibus is a message bus for operations teams. Three stock nats-servers form
// an R3 JetStream cluster that keeps all state; unibus-authcallout admits each
// user to exactly the subjects of their rooms; unibus-membership tells a load
// balancer whether a node may serve, and changes users, rooms and members.
//
// Three boundaries are worth knowing before reading further:
//
//   - Strangers end at authcallout: it proves possession of a key before any
//     lookup, and only package callout turns a decision into a signed JWT.
//   - Members end at the subject rules of subject.go: a user publishes only
//     under their own token, so a subject proves its sender.
//   - Services end at account CTRL: users cannot name its streams at all.
//
// Without quorum nothing is decided: package kv gives out answers only while
// a lease, renewed by acknowledged writes, proves them current.
//
// Every type here is parsed, never cast: a value of type UserKey, Handle or
// RoomID that came from outside has passed its Parse function. The package has
// no state, does no I/O but what Roots reads, and is safe for concurrent use.
package bus
