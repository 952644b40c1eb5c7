package kv

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// ConsumeNonce makes a nonce of a key good for nothing any more, on every node.
// Unauthenticated: it was used before. Unavailable: whether it was is not
// known, and it may be used up by this very call; the caller signs again with
// another one.
//
// It is one create-only write. Its key is a hash over user and nonce: nobody
// can use up the nonce of somebody else. Only call it for a caller who is known
// and has signed: strangers must not be able to fill the bucket.
func (s *Store) ConsumeNonce(ctx context.Context, key bus.UserKey, nonce string) error {
	if guard.Off(guard.NonceOnce) {
		return nil
	}
	id := sha256.Sum256(append(append(key[:], 0), nonce...))
	m := nats.NewMsg(subjectOf(Nonces, hex.EncodeToString(id[:])))
	wctx, cancel := s.decide(ctx)
	defer cancel()
	_, err := s.js.PublishMsg(wctx, m, jetstream.WithExpectStream(StreamName(Nonces)),
		jetstream.WithRetryAttempts(0), jetstream.WithExpectLastSequencePerSubject(0))
	var api *jetstream.APIError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &api) && (api.ErrorCode == errWrongLastSeq || api.ErrorCode == errWrongLastSeqAny):
		return bus.E(bus.Unauthenticated, "the nonce was used before")
	case errors.As(err, &api):
		return bus.E(bus.Unavailable, "the nonce cannot be recorded: %w", err)
	}
	return bus.E(bus.Unavailable, "no quorum: the nonce was not recorded: %w", err)
}
