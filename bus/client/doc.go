// Package client is how a Go program manages a unibus over HTTPS: users,
// invites, rooms, members and the audit, with signed requests, from any
// machine that reaches one of the nodes.
//
//	id, err := sig.ParseIdentity(seed) // one line SU..., as unibusctl identity new wrote it
//	c, err := client.New(client.Config{
//		URLs:     []string{"https://n1.example.org:8470", "https://n2.example.org:8470"},
//		TLS:      tlsConfig, // trusts the client CA of the cluster
//		Identity: id,
//	})
//	defer c.Close()
//	change, err := c.SetMember(ctx, "ops", "alice", bus.Writer)
//
// The documents are those of package bus. A user is named by handle, by 64 hex
// digits or by nkey; what a caller may do depends on who they are (docs/protocol.md
// says it per route).
//
// # Errors
//
// Every error is a *bus.Error with the code, message and hint that the service
// raised; ask with bus.CodeOf. Unavailable means that it is not known, or not
// now: a timeout is never NotFound.
//
// # Changes
//
// A change returns when no service decides on the state before it any more.
// If that could not be proven in time, the change is made all the same,
// Change.Verified is false, and making it again proves it again.
//
// # Failover
//
// All nodes are equal, and the one that answered last is asked first. The next
// one is asked when a node cannot be reached, when it asks for patience (429,
// or 503 with Retry-After) or when its answer is lost; each attempt is signed
// anew. A change whose answer is lost may have been made, so only those that may
// be repeated are sent again: each method says so. For the others the error is
// Unavailable and says that the change may have been made.
//
// A client whose clock is wrong is told so by the Date of a refusal; it corrects
// itself, once per request and for each node by itself.
//
// # Limits
//
// Every call ends with its context. Without a deadline one attempt ends after 5
// s if it reads, after 18 s if it changes something, and there are at most three
// attempts, or one per node. Redirects are not followed and proxies of the
// environment are not used. A Client is safe for concurrent use.
package client
