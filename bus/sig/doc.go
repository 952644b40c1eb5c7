// Package sig signs and verifies HTTP requests in the one shape that unibus
// knows: unibus-v1, a closed profile of RFC 9421 and RFC 9530 (ADR 0008;
// docs/protocol.md section 7.1 tells how to write a client in any language).
//
// A signature covers method, authority, path, query and the digest of the
// body, and says when it was made, a nonce, and the key:
//
//	"@method": GET
//	"@authority": n1.example.org:8470
//	"@path": /v1/rooms
//	"@query": ?
//	"content-digest": sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:
//	"@signature-params": ("@method" ...);created=1795484695;nonce="...";keyid="U...";alg="ed25519";tag="unibus-v1"
//
// RFC 9421 allows so many spellings that a verifier's parser becomes its weak
// point. Here is no parser to speak of: Verify takes three values out of the
// headers (created, nonce, keyid), writes the headers anew from them and from
// what came over the wire, and compares bytes. Sign writes with the same code.
// What is not that text, to the byte, is refused; so is every path and query
// that a router, a proxy and a reader could understand differently.
//
// Verified says: the holder of this key signed this request within Window. It
// does not say that the key belongs to anybody, nor that the nonce is fresh:
// the caller must look the user up and then consume (key, nonce) once for all
// nodes, in this order, or strangers fill the store of nonces.
//
// Every error of Verify is Unauthenticated. Its text is for the log: to who
// asked, all refusals look the same.
//
// What is signed begins with a double quote, which no NATS nonce may contain.
// A server that could choose the nonce of a connection can therefore not have
// a request signed with it, nor the other way round.
//
// The package has no state, does no I/O, and takes clock and randomness as
// arguments. It is safe for concurrent use, except that Sign changes its
// request.
package sig
