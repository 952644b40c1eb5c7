// Package client is how a Go program uses a unibus, and manages it.
//
// # On the bus
//
// Dial connects a user to the bus. The connection keeps itself up, and follows
// what its user may do. A Room is a room as one of its members uses it:
//
//	cfg, err := client.Environment(os.Getenv) // or a DialConfig of your own
//	conn, err := client.Dial(ctx, cfg)
//	defer conn.Close()
//	room, err := conn.Room(ctx, "ops")
//	hearing, err := room.Subscribe(ctx, client.Hear{}, func(m client.Message) { fmt.Println(m.Sender, m.Topic, string(m.Data)) })
//	_, err = room.Publish(ctx, "disk", []byte("full"))
//
// That is a program (README.md has it whole). Environment reads UNIBUS_IDENTITY,
// UNIBUS_CA, UNIBUS_NATS_URL and UNIBUS_API_URL; a DialConfig says the same in Go:
//
//	id, err := sig.ParseIdentity(seed) // one line SU..., as unibusctl identity new wrote it
//	cfg := client.DialConfig{
//		URLs:     []string{"tls://n1.example.org:4250", "tls://n2.example.org:4250"},
//		CAFile:   "client-ca.crt", // read again at each connect
//		Identity: id,
//		API:      api, // a Client, see below; Conn.Room needs it
//	}
//
// Without an API, Conn.Publish and Conn.Subscribe still do for rooms that store
// nothing and are not encrypted.
//
// A room stores nothing unless it was made durable: its messages reach who is
// connected, at most once. See Dial for what that means when a server dies.
//
// # Durable rooms
//
// A durable room keeps what is sent. Its Room publishes, and returns when a
// quorum of nodes has stored the message; and subscribes, from now, a sequence, a
// time or the start on, without gaps or duplicates and with the messages of each
// sender in their order, whichever node dies meanwhile:
//
//	room, err := conn.Room(ctx, "ops") // made by: unibusctl room create ops --durable
//	seq, err := room.Publish(ctx, "deploy", []byte("begins"))
//	hearing, err := room.Subscribe(ctx, client.Hear{From: client.FromTime(yesterday), Topic: "log.>"}, func(m client.Message) {
//		fmt.Println(m.Seq, m.Time, m.Sender, m.Topic, string(m.Data))
//	})
//	defer hearing.Unsubscribe()
//
// Send does not wait, so that many messages can be under way at once. Request
// and Reply are a question and an answer inside a room; History reads a page of
// what is stored. All of it works in rooms that are not durable, too, except
// what needs a history.
//
// # Encrypted rooms
//
// What is said in a room made with Encrypted only its members can read. Keys
// holds what that takes, and DialConfig.Keys is all a program adds: Room then
// encrypts and decrypts.
//
//	keys, err := client.NewKeys(client.KeysConfig{
//		API: c, Identity: id, Trust: client.FileTrust("alice.nk.trust"),
//		OnAlert: func(a client.Alert) { log.Print(a.Room, a.Err) },
//	})
//	_, err = c.CreateRoom(ctx, client.NewRoom{Room: "vault", Encrypted: true})
//	_, err = keys.Rekey(ctx, "vault", client.RekeyOptions{}) // its first key
//	_, _, err = keys.AddMember(ctx, "vault", "bob", bus.Writer)
//
// The servers are not believed. What they show is held against what was signed
// and what was seen before; what does not fit is Forbidden and told to OnAlert.
// Whom the servers call a member gets no key until an owner has said so by key
// (AddMember, or RekeyOptions.Admit). A message is not sent if the newest roster
// is newer than the newest key. When somebody goes, an owner who is connected
// makes the next key; Rekey does it at once.
//
// # Over HTTPS
//
// A Client makes signed requests: users, invites, rooms, members and the audit,
// from any machine that reaches one of the nodes.
//
//	c, err := client.New(client.Config{
//		URLs:     []string{"https://n1.example.org:8470", "https://n2.example.org:8470"},
//		CAFile:   "client-ca.crt", // read again at each connect
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
