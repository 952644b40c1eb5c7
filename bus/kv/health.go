package kv

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
)

// StreamHealth is what a stream reports about its replicas. It is a report,
// not evidence: a stream may name a leader and current followers and still
// take no write. Evidence is the lease, and Probe.
type StreamHealth struct {
	Stream           string `json:"stream"`
	Replicas         int    `json:"replicas"`
	Leader           string `json:"leader"`
	FollowersCurrent int    `json:"followers_current"`
	Followers        int    `json:"followers"`
	MaxLag           uint64 `json:"max_follower_lag"`
	Messages         uint64 `json:"messages"`
	Bytes            uint64 `json:"bytes"`
	LimitBytes       uint64 `json:"-"` // at which it takes no more; 0: it drops the oldest instead
	Err              error  `json:"-"`

	offline int // followers whose node is down
}

// Settling reports whether a follower that is up is a moment behind, as one
// often is right behind a write: who asks again soon will hear better.
func (h StreamHealth) Settling() bool {
	return h.Err == nil && h.FollowersCurrent+h.offline < h.Followers
}

// Health asks every stream of account CTRL for its state, all at once. It never
// fails as a whole: an unreachable stream carries its error.
func Health(ctx context.Context, nc *nats.Conn) []StreamHealth {
	wants := Streams()
	out := make([]StreamHealth, len(wants))
	js, err := newJetStream(nc)
	done := make(chan struct{}, len(wants))
	for i, want := range wants {
		go func() {
			defer func() { done <- struct{}{} }()
			out[i] = StreamHealth{Stream: want.Name, Err: err}
			if err == nil {
				out[i] = streamHealth(ctx, js, want)
			}
		}()
	}
	for range wants {
		<-done
	}
	return out
}

// HealthOf asks one bucket's stream.
func HealthOf(ctx context.Context, nc *nats.Conn, bucket string) StreamHealth {
	js, err := newJetStream(nc)
	if err != nil {
		return StreamHealth{Stream: StreamName(bucket), Err: err}
	}
	return streamHealth(ctx, js, definition(StreamName(bucket)))
}

func streamHealth(ctx context.Context, js jetstream.JetStream, want jetstream.StreamConfig) StreamHealth {
	h := StreamHealth{Stream: want.Name}
	s, err := js.Stream(ctx, want.Name)
	if err != nil {
		h.Err = bus.E(bus.Unavailable, "stream %s: %w", want.Name, err)
		return h
	}
	info := s.CachedInfo()
	h.Replicas, h.Messages, h.Bytes = info.Config.Replicas, info.State.Msgs, info.State.Bytes
	if info.Config.Discard == jetstream.DiscardNew {
		h.LimitBytes = uint64(max(0, info.Config.MaxBytes)) //nolint:gosec // not negative
	}
	h.Err = Verify(info.Config, want)
	if info.Cluster == nil {
		return h
	}
	h.Leader = info.Cluster.Leader
	for _, r := range info.Cluster.Replicas {
		h.Followers++
		switch {
		case r.Offline:
			h.offline++
		case r.Current:
			h.FollowersCurrent++
		}
		h.MaxLag = max(h.MaxLag, r.Lag)
	}
	return h
}

// Peers names the nodes that hold the users, dead ones included: those whose
// word counts when the question is what there is on all nodes. It takes two
// seconds at most. A leader that is paused or has just died never answers, and
// its successor hears only who asks again; a change that is proven but for this
// must not wait for either.
func Peers(ctx context.Context, nc *nats.Conn) ([]string, error) {
	js, err := newJetStream(nc)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, sweepPatience)
	defer cancel()
	var s jetstream.Stream
	for {
		try, cancel := context.WithTimeout(ctx, sweepPatience/4)
		s, err = js.Stream(try, StreamName(Users))
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return nil, bus.E(bus.Unavailable, "stream %s: %w", StreamName(Users), err)
	}
	c := s.CachedInfo().Cluster
	if c == nil || c.Leader == "" {
		return nil, bus.E(bus.Unavailable, "stream %s has no leader", StreamName(Users))
	}
	names := []string{c.Leader}
	for _, r := range c.Replicas {
		names = append(names, r.Name)
	}
	return names, nil
}

// probeKey is what Probe writes: shaped like a barrier, so that it is a record
// in no bucket and no expectation on records ever sees it.
const probeKey = barrierKeys + "probe.ops"

// Probe writes one record to every stream of account CTRL, to all at once, and
// returns what failed, by stream. A stream that reports a leader and current
// replicas may still hang every write, so a rolling restart asks this before it
// goes on. It needs the rights of ops.
func Probe(ctx context.Context, nc *nats.Conn) map[string]error {
	js, err := newJetStream(nc)
	wants := Streams()
	failures := make([]error, len(wants))
	var writes sync.WaitGroup
	for i, want := range wants {
		if failures[i] = err; err != nil {
			continue
		}
		writes.Go(func() { failures[i] = probe(ctx, js, want) })
	}
	writes.Wait()
	failed := map[string]error{}
	for i, want := range wants {
		if failures[i] != nil {
			failed[want.Name] = failures[i]
		}
	}
	return failed
}

func probe(ctx context.Context, js jetstream.JetStream, want jetstream.StreamConfig) error {
	subject := "unibus.audit." + probeKey
	if want.Name != AuditStream {
		subject = "$KV." + want.Name[len("KV_"):] + "." + probeKey
	}
	m := nats.NewMsg(subject)
	if want.AllowMsgTTL {
		m.Header.Set("Nats-TTL", (10 * time.Second).String())
	}
	pctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, err := js.PublishMsg(pctx, m, jetstream.WithExpectStream(want.Name), jetstream.WithRetryAttempts(0))
	return err
}
