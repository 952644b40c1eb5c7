package kv

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
)

const (
	// A page reads no more than this, so that a rare filter over a long audit
	// costs many short requests and not one endless one.
	maxPageBlocks = 20_000
	maxPageTime   = time.Second
	maxPage       = 1000
	defaultPage   = 100
)

// AuditCursor is a place in the audit: an entry, by the sequence of its block
// and its index. The zero cursor is before everything.
type AuditCursor struct {
	Seq   uint64
	Index int
}

func (c AuditCursor) String() string { return fmt.Sprintf("%d.%d", c.Seq, c.Index) }

// ParseAuditCursor reads "<seq>.<index>"; an empty string is the zero cursor.
func ParseAuditCursor(s string) (AuditCursor, error) {
	if s == "" {
		return AuditCursor{}, nil
	}
	seq, index, _ := strings.Cut(s, ".")
	n, err1 := strconv.ParseUint(seq, 10, 63)
	i, err2 := strconv.ParseUint(index, 10, 15)
	c := AuditCursor{n, int(i)}
	if err1 != nil || err2 != nil || n == 0 || c.String() != s {
		return AuditCursor{}, bus.E(bus.Invalid, "%.40q is no place in the audit", s).WithHint("use the next of the page before")
	}
	return c, nil
}

// AuditQuery selects entries. Empty fields select all.
type AuditQuery struct {
	User   string // nkey of the user concerned
	Action string // exactly, or everything below "user." if it is "user.*"
	Kind   string
	Actor  string // nkey, or "direct"
	Room   bus.RoomID
	Since  time.Time
	After  AuditCursor // exclusive
	Limit  int         // of a page; 0 is 100, at most 1000
}

func (q *AuditQuery) wants(e *bus.AuditEntry) bool {
	prefix, below := strings.CutSuffix(q.Action, "*")
	return (q.User == "" || e.User == q.User) && (q.Kind == "" || string(e.Kind) == q.Kind) && (q.Actor == "" || e.Actor == q.Actor) &&
		(q.Room == "" || e.Room == q.Room) && (q.Action == "" || e.Action == q.Action || below && strings.HasPrefix(e.Action, prefix)) &&
		!e.At.Before(q.Since)
}

// start is where the stream is read from. A block is stored after its entries
// were made, by a clock that may be off by the tolerance of every service.
func (q *AuditQuery) start() nats.ConsumerConfig {
	switch {
	case q.After.Seq > 0:
		return nats.ConsumerConfig{DeliverPolicy: nats.DeliverByStartSequencePolicy, OptStartSeq: q.After.Seq, FilterSubject: auditBlocks}
	case !q.Since.IsZero():
		at := q.Since.Add(-2 * clockTolerance).UTC()
		return nats.ConsumerConfig{DeliverPolicy: nats.DeliverByStartTimePolicy, OptStartTime: &at, FilterSubject: auditBlocks}
	}
	return nats.ConsumerConfig{DeliverPolicy: nats.DeliverAllPolicy, FilterSubject: auditBlocks}
}

// records hands out what a block holds for a query until each is false. A
// message that is no block holds nothing: VerifyAudit is who complains.
func (q *AuditQuery) records(m storedMessage, each func(bus.AuditRecord) bool) bool {
	b, _, err := decodeBlock(m.data)
	if err != nil {
		return true
	}
	for i := range b.Entries {
		if m.seq < q.After.Seq || m.seq == q.After.Seq && i <= q.After.Index || !q.wants(&b.Entries[i]) {
			continue
		}
		if !each(bus.AuditRecord{AuditEntry: b.Entries[i], Seq: m.seq, Index: i, Instance: strings.TrimPrefix(m.subject, auditPrefix)}) {
			return false
		}
	}
	return true
}

// ReadAudit returns a page of entries, oldest first, and the cursor for the
// next page; it is empty when everything stored so far has been read. A page
// may hold fewer entries than the limit, and none, with more to come: a call
// reads at most 20,000 blocks or for 1 s, and gives up after 2 s.
//
// What it returns is what the stream holds; that nobody altered it is what
// VerifyAudit says. It is safe for concurrent use, as are the others.
func ReadAudit(ctx context.Context, nc *nats.Conn, q AuditQuery) (records []bus.AuditRecord, next string, err error) {
	switch {
	case q.Limit < 0 || q.Limit > maxPage:
		return nil, "", bus.E(bus.Invalid, "a page of the audit has 1 to %d entries, not %d", maxPage, q.Limit)
	case q.Limit == 0:
		q.Limit = defaultPage
	}
	ctx, cancel := context.WithTimeout(ctx, 2*maxPageTime)
	defer cancel()
	records = []bus.AuditRecord{}
	started, blocks := time.Now(), 0
	at := q.After
	more := false
	err = scanAudit(ctx, nc, q.start(), func(m storedMessage) bool {
		if more = !q.records(m, func(r bus.AuditRecord) bool {
			if len(records) == q.Limit {
				return false
			}
			records = append(records, r)
			at = AuditCursor{r.Seq, r.Index}
			return true
		}); more {
			return false
		}
		at = AuditCursor{m.seq, maxBlockEntries}
		blocks++
		more = m.pending > 0 && (blocks == maxPageBlocks || time.Since(started) > maxPageTime)
		return !more && m.pending > 0
	})
	if err != nil {
		return nil, "", err
	}
	if more {
		next = at.String()
	}
	return records, next, nil
}

// TailAudit calls each with every entry from now on, or after the query's
// cursor or since its time, until ctx ends or each fails. It goes on after
// faults of the cluster and misses nothing.
func TailAudit(ctx context.Context, nc *nats.Conn, q AuditQuery, each func(bus.AuditRecord) error) error {
	start := q.start()
	if q.After.Seq == 0 && q.Since.IsZero() {
		info, err := auditInfo(ctx, nc)
		if err != nil {
			return err
		}
		start.DeliverPolicy, start.OptStartSeq = nats.DeliverByStartSequencePolicy, info.State.LastSeq+1
	}
	var failed error
	for ctx.Err() == nil && failed == nil {
		err := followAudit(ctx, nc, start, func(m storedMessage) bool {
			q.records(m, func(r bus.AuditRecord) bool {
				failed = each(r)
				return failed == nil
			})
			start.DeliverPolicy, start.OptStartSeq, start.OptStartTime = nats.DeliverByStartSequencePolicy, m.seq+1, nil
			return failed == nil
		})
		if err != nil {
			wait(ctx, rebuildPause)
		}
	}
	return failed
}

// VerifyAudit reads the whole audit and holds it to its chains and its
// checkpoints: see docs/audit.md for what that proves and what it cannot.
// signers are the keys whose checkpoints count; with none, any key's do, and
// the report names them. The error is about the reading only: what is wrong
// with the audit is in the report. It reads one replica.
func VerifyAudit(ctx context.Context, nc *nats.Conn, signers []string) (bus.AuditReport, error) {
	info, err := auditInfo(ctx, nc)
	if err != nil {
		return bus.AuditReport{}, err
	}
	v := newAuditVerifier(info.State.FirstSeq, signers)
	if err := Verify(info.Config, definition(AuditStream)); err != nil {
		v.find(0, "", 0, "%s", err)
	}
	if info.Config.FirstSeq > 1 {
		v.find(0, "", 0, "the stream was made to begin at sequence %d", info.Config.FirstSeq)
	}
	// Discarding the oldest leaves a stream full but for one message.
	if info.State.FirstSeq > 1 && info.State.Bytes < uint64(info.Config.MaxBytes)/2 {
		v.find(0, "", 0, "the stream begins at sequence %d and holds %d of %d bytes: the oldest messages were taken out of it, not discarded",
			info.State.FirstSeq, info.State.Bytes, info.Config.MaxBytes)
	}
	if info.State.Msgs == 0 {
		return v.finish(), nil
	}
	start := nats.ConsumerConfig{DeliverPolicy: nats.DeliverAllPolicy}
	seen := false
	err = scanAudit(ctx, nc, start, func(m storedMessage) bool {
		if !seen { // what was discarded since the question is trimmed too
			v.first, v.report.FirstSeq, seen = m.seq, m.seq, true
		}
		v.message(m.seq, m.subject, m.data)
		return m.seq < info.State.LastSeq && m.pending > 0
	})
	if err != nil {
		return bus.AuditReport{}, err
	}
	return v.finish(), nil
}

// storedMessage is one message of the stream; pending counts those behind it.
type storedMessage struct {
	seq     uint64
	subject string
	data    []byte
	pending uint64
}

// scanAudit reads what is there from a start on until take is false or nothing
// is left. After a fault it goes on where it was.
func scanAudit(ctx context.Context, nc *nats.Conn, start nats.ConsumerConfig, take func(storedMessage) bool) error {
	done := false
	for {
		err := followAudit(ctx, nc, start, func(m storedMessage) bool {
			if start.DeliverPolicy != nats.DeliverLastPerSubjectPolicy {
				start.DeliverPolicy, start.OptStartSeq, start.OptStartTime = nats.DeliverByStartSequencePolicy, m.seq+1, nil
			}
			done = !take(m) || m.pending == 0
			return !done
		}, errNothingThere)
		switch {
		case done || errors.Is(err, errNothingThere):
			return nil
		case ctx.Err() != nil:
			return bus.E(bus.Unavailable, "the audit could not be read in time: %w", err)
		}
		wait(ctx, rebuildPause)
	}
}

// errNothingThere ends a scan that has nothing to read.
var errNothingThere = errors.New("nothing there")

// followAudit delivers messages in order and without gaps until take is false
// or anything at all is wrong. If empty is given, it is the error of a start
// behind which nothing is stored yet.
func followAudit(ctx context.Context, nc *nats.Conn, start nats.ConsumerConfig, take func(storedMessage) bool, empty ...error) error {
	octx, cancel := context.WithTimeout(ctx, apiTimeout)
	tail, err := openConsumer(octx, nc, AuditStream, start)
	cancel()
	if err != nil {
		return err
	}
	defer tail.close()
	if tail.pending == 0 && len(empty) > 0 {
		return empty[0]
	}
	for last := uint64(0); ; {
		mctx, cancel := context.WithTimeout(ctx, silence)
		msg, err := tail.sub.NextMsgWithContext(mctx)
		cancel()
		if err != nil {
			return err
		}
		if status := msg.Header.Get("Status"); status != "" {
			if err := control(nc, msg, status, last); err != nil {
				return err
			}
			continue
		}
		md, err := msg.Metadata()
		if err != nil {
			return err
		}
		if last++; md.Sequence.Consumer != last {
			return fmt.Errorf("gap before consumer sequence %d", md.Sequence.Consumer)
		}
		if !take(storedMessage{md.Sequence.Stream, msg.Subject, msg.Data, md.NumPending}) {
			return nil
		}
	}
}

func auditInfo(ctx context.Context, nc *nats.Conn) (*jetstream.StreamInfo, error) {
	js, err := newJetStream(nc)
	if err != nil {
		return nil, err
	}
	ictx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := js.Stream(ictx, AuditStream)
	if err != nil {
		return nil, bus.E(bus.Unavailable, "the audit does not answer: %w", err)
	}
	return s.CachedInfo(), nil
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
