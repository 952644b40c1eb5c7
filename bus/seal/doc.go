// Package seal is the cryptography of encrypted rooms: keys, rosters,
// envelopes and messages, as bytes (docs/encryption.md is enough to write them
// in another language).
//
// Each user has an encryption key, derived from the seed of the identity and a
// counter, and signed by the identity (bus.EncryptionKey). A room's life is a
// sequence of epochs. Each has a random Key, and a Roster that says who has it:
// signed by an owner of the roster before, and naming that roster by its hash.
// The key is given to each member in an Envelope that only they can open, and
// that is good for this room, epoch, roster, recipient and sender alone.
// Messages are encrypted under the epoch and signed by their sender.
//
// What that stops: who runs the servers can neither read nor forge a message,
// nor put somebody into a roster, nor make somebody an owner, nor move an
// envelope or a message to another place, nor, against a reader who remembers
// the newest roster they have seen, go back to an older one or show two readers
// two futures for longer than until they compare (RoomNumber).
//
// What it does not stop is said in docs/encryption.md: in particular, who has
// an epoch's key reads all messages of that epoch, and a removed member keeps
// what they had.
//
// Everything that is signed begins with "unibus/v1/": no NATS nonce and no HTTP
// signature base begins so. Every format has one spelling: a decoder accepts
// nothing that its encoder would not write.
//
// The package does no I/O and has no state but Sender and Tracker. What fails
// to decode is Invalid, what is not proven is Unauthenticated, and who may not
// have signed it is Forbidden. Roster, Key and the functions are safe for
// concurrent use; Sender and Tracker are too.
package seal
