// Package guard lets a test take one protection of unibus away and watch the
// named test that depends on it fail.
//
// In every ordinary build Off is a constant false that the compiler removes
// together with the branch behind it: a released binary holds no switch that
// an attacker or an operator could throw (make check looks for it). Only a
// build with the tag "controls" reads UNIBUS_GUARD_OFF, and prints so.
package guard

// Name is one protection that a negative control takes away.
type Name string

// The protections with a negative control. docs/controls.md lists the test
// that fails without each.
const (
	FreshReads         Name = "fresh-reads"          // off: decide on plain KV reads
	AckWait            Name = "ack-wait"             // off: a change returns without waiting for lease holders
	OwnBarrier         Name = "own-barrier"          // off: a sequence, not the own record, proves a barrier
	Lease              Name = "lease"                // off: decide without a lease
	ResponseExpiry     Name = "response-expiry"      // off: authorization responses carry no exp
	ClientSignature    Name = "client-signature"     // off: the client's signature is not verified
	Nonce              Name = "nonce"                // off: an empty nonce is accepted
	EmptyPermissions   Name = "empty-permissions"    // off: a user without rights gets empty lists
	NoReplyPermissions Name = "no-reply-permissions" // off: minted JWTs carry response permissions
	LowOrderKey        Name = "low-order-key"        // off: low-order keys are accepted
	Kick               Name = "kick"                 // off: a change closes no connection
	ConnectRecheck     Name = "connect-recheck"      // off: nobody looks again at a connection that opened beside a change
	Sweep              Name = "sweep"                // off: sweeps find nothing
	SweepFirst         Name = "sweep-first"          // off: a server that was cut off admits before its old connections were looked at
	WriterSweep        Name = "writer-sweep"         // off: who made a change does not ask the servers whether they have closed
	Cap                Name = "cap"                  // off: a user may hold any number of connections
	RequestSignature   Name = "request-signature"    // off: the signature of a request is not verified
	Authorize          Name = "authorize"            // off: everybody may do everything over the API
	CallerRecheck      Name = "caller-recheck"       // off: who asked for a change is not looked at again before it is written
	CleanHeaders       Name = "clean-headers"        // off: the recorder stores every header of a message
	OwnInbox           Name = "own-inbox"            // off: the recorder answers wherever the sender wants
	RecordRecheck      Name = "record-recheck"       // off: the recorder does not look whether the sender may still write
	FeedRepair         Name = "feed-repair"          // off: a subscription fetches nothing that the feed left out
	NonceOnce          Name = "nonce-once"           // off: a nonce is good more than once
	NonceGrammar       Name = "nonce-grammar"        // off: who logs in signs whatever the server sends as its nonce
	RosterSigner       Name = "roster-signer"        // off: whoever signed a roster is taken for one who may
	RosterChain        Name = "roster-chain"         // off: a roster need not follow the one before it
	EnvelopeContext    Name = "envelope-context"     // off: an envelope is not bound to what it is for
	MessageSender      Name = "message-sender"       // off: the sender's signature of a message is not verified
	Replay             Name = "replay"               // off: a message may come any number of times
	CAOverlap          Name = "ca-overlap"           // off: certificates change without asking whether every node trusts them
	RoomPin            Name = "room-pin"             // off: a client does not hold a room against what it remembers
	AdmitByOwner       Name = "admit-by-owner"       // off: whom the servers name as a member gets the next key
	ImportTLS          Name = "import-tls"           // off: another system is read in clear from anywhere
	ImportTombstone    Name = "import-tombstone"     // off: an import takes no notice of what has ended here
	ImportAdmins       Name = "import-admins"        // off: who is an admin elsewhere becomes one here by an import
	DeployCheck        Name = "deploy-check"         // off: a configuration that would not work is brought to the nodes
	DeployLook         Name = "deploy-look"          // off: what a node has and is does not stop a stage
	RolloutGate        Name = "rollout-gate"         // off: one more node goes down whatever the cluster is like
	RolloutStop        Name = "rollout-stop"         // off: a rollout goes on behind a node that did not come back
	BlobBarrier        Name = "blob-barrier"         // off: a directory of files is read without proof that it is current
	BlobLimits         Name = "blob-limits"          // off: a room may store any number of files of any size
	BlobDigest         Name = "blob-digest"          // off: what was uploaded is not held to the digest that was signed
	Tombstones         Name = "tombstones"           // off: a restore writes over what is there
	OnlyFrozen         Name = "only-frozen"          // off: a stream that takes writes is repaired too
	BackupWhole        Name = "backup-whole"         // off: a file of a room in a backup need not be what its digest says
	BackupSignature    Name = "backup-signature"     // off: the signature of a backup is not verified
	LeaveAtOnce        Name = "leave-at-once"        // off: a callout without a lease leaves the queue group by and by
)
