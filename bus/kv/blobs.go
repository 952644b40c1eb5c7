package kv

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// BlobStream holds the files of all rooms, in account BUS. Its subjects are
//
//	$O.UNIBUS_blobs.D.<room>              the directory: which files there are
//	$O.UNIBUS_blobs.C.<room>.<id>.<n>     chunk n of what was stored under an id
//	$O.UNIBUS_blobs.U.<room>.<id>         whatever is stored under it is refuse, unless a directory names it
//	$O.UNIBUS_blobs.B.<instance>          the barrier of one service
//
// and keep one message each. No part of a subject comes from a user but the room,
// which is a parsed id; names of files stand inside of directories only.
const (
	BlobStream   = "OBJ_UNIBUS_blobs"
	blobSubjects = "$O.UNIBUS_blobs."
)

const (
	// BlobChunk is what one message holds, in bytes; the last chunk of a file may
	// be shorter. It is part of the format.
	BlobChunk = 128 << 10
	// blobWindow is how many chunks of one file are under way at once, each in
	// memory.
	blobWindow = 8
	blobStore  = 4 << 30 // bytes of the stream

	// chunkPatience is how long one chunk is tried for: an election (5 to 8 s),
	// twice.
	chunkPatience = 20 * time.Second
	chunkTimeout  = 4 * time.Second
	againAfter    = 250 * time.Millisecond
	// purgeTimeout is for the chunks of a large file: removing 1 GiB took the
	// servers 4.5 s. Who gives up before leaves the rest to the reconciler.
	purgeTimeout = 10 * time.Second

	// An upload that has not renewed its marker for markerFresh is not committed,
	// and one that has not for markerStale is removed. Between the two are more
	// than a pause of either side and the clocks' difference.
	markerRenew = time.Minute
	markerFresh = 5 * time.Minute
	markerStale = 15 * time.Minute
)

// blobStream is the definition of BlobStream. Direct reads serve chunks, which
// never change, from any replica, also while there is no leader; a directory is
// only read behind a barrier. Purges remove what was deleted.
func blobStream() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: BlobStream, Subjects: []string{blobSubjects + ">"},
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardNew, Storage: jetstream.FileStorage,
		Replicas: Replicas, MaxMsgsPerSubject: 1, MaxBytes: blobStore, MaxMsgSize: 512 << 10,
		MaxMsgs: -1, MaxConsumers: -1, Duplicates: 2 * time.Minute, AllowDirect: true, DenyDelete: true,
	}
}

// BlobsConfig configures Blobs.
type BlobsConfig struct {
	Conn   *nats.Conn // to account BUS
	View   *View      // whose instance this is, and who decides
	Limits bus.BlobLimits
	Log    *slog.Logger
	Now    func() time.Time // nil: time.Now
	Random io.Reader        // nil: crypto/rand
}

// Blobs stores files of rooms. It decides nothing about who may: see Caller. It
// is safe for concurrent use.
type Blobs struct {
	cfg     BlobsConfig
	js      jetstream.JetStream
	buffers sync.Pool // of *[BlobChunk]byte

	mu      sync.Mutex
	pending map[bus.RoomID]int64 // bytes of uploads under way here
	purged  map[bus.RoomID]bool  // archived rooms of which nothing is left
}

// OpenBlobs prepares a store. Nothing is asked yet: see Bootstrap.
func OpenBlobs(cfg BlobsConfig) (*Blobs, error) {
	js, err := newJetStream(cfg.Conn)
	if err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Random == nil {
		cfg.Random = rand.Reader
	}
	b := &Blobs{cfg: cfg, js: js, pending: map[bus.RoomID]int64{}, purged: map[bus.RoomID]bool{}}
	b.buffers.New = func() any { return new([BlobChunk]byte) }
	return b, nil
}

// Bootstrap makes the stream if it is missing and verifies it: Unavailable while
// that cannot be known, Conflict if it is another than defined.
func (b *Blobs) Bootstrap(ctx context.Context) error {
	return ensure(ctx, b.js, blobStream(), apiTimeout)
}

// Limits is how much each room may store.
func (b *Blobs) Limits() bus.BlobLimits { return b.cfg.Limits }

func directorySubject(id bus.RoomID) string { return blobSubjects + "D." + string(id) }

func chunkSubject(id bus.RoomID, blob string, n int64) string {
	return blobSubjects + "C." + string(id) + "." + blob + "." + strconv.FormatInt(n, 10)
}

func chunksFilter(id bus.RoomID, blob string) string {
	return blobSubjects + "C." + string(id) + "." + blob + ".>"
}

func markerSubject(id bus.RoomID, blob string) string {
	return blobSubjects + "U." + string(id) + "." + blob
}

// List is what a room stores now. Every change that was answered before is in it.
func (b *Blobs) List(ctx context.Context, id bus.RoomID) (bus.BlobList, error) {
	d, _, err := b.directory(ctx, id)
	if err != nil {
		return bus.BlobList{}, err
	}
	out := bus.BlobList{Room: id, Blobs: make([]bus.BlobInfo, len(d.Blobs)), MaxBytes: b.cfg.Limits.Bytes, MaxCount: b.cfg.Limits.Count}
	for i, s := range d.Blobs {
		out.Blobs[i] = s.BlobInfo
		out.Bytes += s.Size
	}
	return out, nil
}

// Find is the file of that name as it is now. NotFound is proven.
func (b *Blobs) Find(ctx context.Context, id bus.RoomID, name bus.BlobName) (bus.StoredBlob, error) {
	d, _, err := b.directory(ctx, id)
	if err != nil {
		return bus.StoredBlob{}, err
	}
	i, ok := find(d, name)
	if !ok {
		return bus.StoredBlob{}, bus.E(bus.NotFound, "room %s has no file %s", id, name).WithHint("unibusctl room files %s", id)
	}
	return d.Blobs[i], nil
}

func find(d bus.BlobDirectory, name bus.BlobName) (int, bool) {
	return slices.BinarySearchFunc(d.Blobs, name, func(s bus.StoredBlob, n bus.BlobName) int { return strings.Compare(string(s.Name), string(n)) })
}

// directory is the record of a room and its sequence, 0 if there was never one.
func (b *Blobs) directory(ctx context.Context, id bus.RoomID) (bus.BlobDirectory, uint64, error) {
	d := bus.BlobDirectory{V: bus.BlobDirectoryVersion, Room: id}
	msgs, err := b.current(ctx, directorySubject(id))
	if err != nil || len(msgs) == 0 {
		return d, 0, err
	}
	if err := json.Unmarshal(msgs[0].data, &d); err != nil {
		return d, 0, bus.E(bus.Internal, "the directory of room %s cannot be read: %w", id, err)
	}
	if err := d.Validate(); err != nil || d.Room != id {
		return d, 0, bus.E(bus.Internal, "the directory of room %s is refused: %v", id, err)
	}
	return d, msgs[0].sequence, nil
}

// blobMessage is one message of the stream.
type blobMessage struct {
	subject  string
	sequence uint64
	at       time.Time
	data     []byte
}

// current reads the last message of every subject that matches filter, as of
// now: whoever answers must show the barrier that was written just before, or a
// later one, so that neither a lagging replica nor a leader without a quorum can
// pass for the truth. At most 1,023 subjects may match.
func (b *Blobs) current(ctx context.Context, filter string) ([]blobMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, chunkTimeout)
	defer cancel()
	barrier := blobSubjects + "B." + b.cfg.View.Instance()
	if guard.Off(guard.BlobBarrier) {
		return b.multi(ctx, []string{filter})
	}
	ack, err := b.js.Publish(ctx, barrier, nil, jetstream.WithExpectStream(BlobStream), jetstream.WithRetryAttempts(0))
	if err != nil {
		return nil, b.refused(err, "the blob store cannot be read now")
	}
	for {
		msgs, err := b.multi(ctx, []string{barrier, filter})
		if err != nil {
			return nil, bus.E(bus.Unavailable, "the blob store cannot be read now: %w", err)
		}
		proven := false
		rest := msgs[:0]
		for _, m := range msgs {
			if m.subject == barrier {
				proven = m.sequence >= ack.Sequence
				continue
			}
			rest = append(rest, m)
		}
		if proven {
			return rest, nil
		}
		select { // a replica that is behind
		case <-ctx.Done():
			return nil, bus.E(bus.Unavailable, "the blob store cannot be read now: %w", context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (b *Blobs) multi(ctx context.Context, filters []string) ([]blobMessage, error) {
	request, err := json.Marshal(map[string]any{"multi_last": filters})
	if err != nil {
		return nil, err
	}
	inbox := b.cfg.Conn.NewInbox()
	sub, err := b.cfg.Conn.SubscribeSync(inbox)
	if err != nil {
		return nil, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := b.cfg.Conn.PublishRequest("$JS.API.DIRECT.GET."+BlobStream, inbox, request); err != nil {
		return nil, err
	}
	var out []blobMessage
	for {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return nil, err
		}
		switch status := m.Header.Get("Status"); {
		case status == "204":
			return out, nil
		case status == "404": // nothing: a replica that has not even the barrier says so too
			return out, nil
		case status != "":
			return nil, fmt.Errorf("status %s %s", status, m.Header.Get("Description"))
		}
		at, err1 := time.Parse(time.RFC3339Nano, m.Header.Get(jetstream.TimeStampHeaer))
		seq, err2 := strconv.ParseUint(m.Header.Get(jetstream.SequenceHeader), 10, 64)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		out = append(out, blobMessage{m.Header.Get(jetstream.SubjectHeader), seq, at, m.Data})
	}
}

// refused tells a store that takes no more from one that cannot now, by
// nats-server's error codes (its errors.json): the account is full, or the
// stream.
func (b *Blobs) refused(err error, what string) *bus.Error {
	const errInsufficient, errStorage, errStoreFailed = 10023, 10047, 10077
	var api *jetstream.APIError
	if errors.As(err, &api) && (api.ErrorCode == errInsufficient || api.ErrorCode == errStorage ||
		api.ErrorCode == errStoreFailed && strings.Contains(api.Description, "maximum bytes")) {
		return bus.E(bus.Conflict, "the blob store of the cluster is full: %w", err).WithHint("unibusctl room rm ROOM FILE")
	}
	return bus.E(bus.Unavailable, "%s: %w", what, err).WithHint("unibusctl cluster status")
}

// Upload is one file on its way into a room. It is used by one goroutine, and
// ends with Commit or Abort.
type Upload struct {
	store   *Blobs
	ctx     context.Context // of the chunks
	cancel  context.CancelFunc
	room    bus.RoomID
	info    bus.StoredBlob
	chunks  int64
	dated   bool // its time is that of another cluster's
	renewed time.Time
	window  chan struct{}
	writing sync.WaitGroup

	mu  sync.Mutex
	err error // of chunks
}

// Begin makes ready for a file of a size. It is Conflict if the room has not got
// the space now; Commit decides it.
func (b *Blobs) Begin(ctx context.Context, id bus.RoomID, info bus.BlobInfo) (*Upload, error) {
	d, _, err := b.directory(ctx, id)
	if err != nil {
		return nil, err
	}
	raw := make([]byte, 16)
	if _, err := io.ReadFull(b.cfg.Random, raw); err != nil {
		return nil, bus.E(bus.Internal, "no randomness: %w", err)
	}
	u := &Upload{store: b, room: id, info: bus.StoredBlob{BlobInfo: info, ID: hex.EncodeToString(raw)}, window: make(chan struct{}, blobWindow)}
	b.mu.Lock()
	_, err = b.with(d, u.info, b.pending[id])
	if err == nil {
		b.pending[id] += info.Size
	}
	b.mu.Unlock()
	if err != nil {
		return nil, err
	}
	u.ctx, u.cancel = context.WithCancel(ctx)
	if err := u.renew(ctx); err != nil {
		u.end()
		return nil, err
	}
	return u, nil
}

func (u *Upload) end() {
	u.cancel()
	u.writing.Wait()
	u.store.mu.Lock()
	defer u.store.mu.Unlock()
	if u.store.pending[u.room] -= u.info.Size; u.store.pending[u.room] <= 0 {
		delete(u.store.pending, u.room)
	}
}

// with is a directory with one file more, or another of that name. beside is
// what else is on its way.
func (b *Blobs) with(d bus.BlobDirectory, s bus.StoredBlob, beside int64) (bus.BlobDirectory, error) {
	i, there := find(d, s.Name)
	blobs := slices.Clone(d.Blobs)
	if there {
		blobs[i] = s
	} else {
		blobs = slices.Insert(blobs, i, s)
	}
	total := beside
	for _, s := range blobs {
		total += s.Size
	}
	l := b.cfg.Limits
	switch {
	case guard.Off(guard.BlobLimits):
	case len(blobs) > min(l.Count, bus.MaxBlobCount):
		return d, bus.E(bus.Conflict, "room %s has %d files, the most it may have", d.Room, len(d.Blobs)).WithHint("unibusctl room rm %s FILE", d.Room)
	case s.Size > l.Bytes:
		return d, bus.E(bus.Invalid, "a file may have at most %d bytes", l.Bytes)
	case total > l.Bytes:
		return d, bus.E(bus.Conflict, "room %s would hold %d bytes of at most %d, with what is on its way", d.Room, total, l.Bytes).WithHint("unibusctl room files %s", d.Room)
	}
	d.Blobs = blobs
	return d, nil
}

// renew writes the marker: what is stored under this id is on its way.
func (u *Upload) renew(ctx context.Context) error {
	before := u.store.cfg.Now()
	if err := u.store.mark(ctx, u.room, u.info.ID); err != nil {
		return err
	}
	u.renewed = before
	return nil
}

// age is how long ago the marker was renewed, by whichever clock says longer: the
// monotonic one may stand still while a machine sleeps.
func (u *Upload) age() time.Duration {
	now := u.store.cfg.Now()
	return max(now.Sub(u.renewed), now.Round(0).Sub(u.renewed.Round(0)))
}

func (b *Blobs) mark(ctx context.Context, id bus.RoomID, blob string) error {
	ctx, cancel := context.WithTimeout(ctx, chunkPatience)
	defer cancel()
	return b.put(ctx, markerSubject(id, blob), []byte(b.cfg.View.Instance()))
}

// put stores one message until it is stored, or ctx ends. Twice is the same as
// once. An attempt is waited for even then: one that is still under way could
// land behind the purge that is to remove it. errDoubtful: one may do so yet.
func (b *Blobs) put(ctx context.Context, subject string, data []byte) error {
	doubtful := false
	failed := func(err error) *bus.Error {
		e := b.refused(err, "the file cannot be stored now")
		if doubtful {
			e.Err = errors.Join(errDoubtful, e.Err)
		}
		return e
	}
	for {
		try, cancel := context.WithTimeout(context.WithoutCancel(ctx), chunkTimeout)
		_, err := b.js.Publish(try, subject, data, jetstream.WithExpectStream(BlobStream), jetstream.WithRetryAttempts(0))
		cancel()
		if err == nil {
			return nil
		}
		var api *jetstream.APIError
		doubtful = doubtful || !errors.As(err, &api)
		if err := failed(err); err.Code != bus.Unavailable {
			return err
		}
		select {
		case <-ctx.Done():
			return failed(err)
		case <-time.After(againAfter):
		}
	}
}

// Buffer is a chunk to be filled and given to Write. Whoever does not write it
// may forget it.
func (b *Blobs) Buffer() *[BlobChunk]byte { return b.buffers.Get().(*[BlobChunk]byte) } //nolint:forcetypeassert // New makes no other

// Write takes the next n bytes: a whole chunk, unless it is the last. It returns
// before they are stored, with the error of an earlier chunk, and waits while
// too many are under way. The buffer is the store's again.
func (u *Upload) Write(buf *[BlobChunk]byte, n int) error {
	if err := u.failed(); err != nil {
		return err
	}
	if u.age() > markerRenew {
		if err := u.renew(u.ctx); err != nil {
			return err
		}
	}
	select {
	case u.window <- struct{}{}:
	case <-u.ctx.Done():
		return u.failure(context.Cause(u.ctx))
	}
	subject := chunkSubject(u.room, u.info.ID, u.chunks)
	u.chunks++
	u.writing.Go(func() {
		defer func() { <-u.window }()
		ctx, cancel := context.WithTimeout(u.ctx, chunkPatience)
		defer cancel()
		if err := u.store.put(ctx, subject, buf[:n]); err != nil {
			u.mu.Lock()
			u.err = errors.Join(u.err, err)
			u.mu.Unlock()
			u.cancel()
			return
		}
		u.store.buffers.Put(buf)
	})
	return nil
}

func (u *Upload) failed() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.err
}

func (u *Upload) failure(cause error) error {
	if err := u.failed(); err != nil {
		return err
	}
	return bus.E(bus.Unavailable, "the upload was cut off: %w", cause)
}

// Abort removes what was stored so far. While a chunk may still land, the marker
// stays, for the reconciler.
func (u *Upload) Abort(ctx context.Context) {
	u.end()
	if err := u.failed(); !errors.Is(err, errDoubtful) {
		u.store.remove(ctx, u.room, u.info.ID)
		return
	}
	if err := u.store.purge(ctx, chunksFilter(u.room, u.info.ID)); err != nil {
		u.store.cfg.Log.Warn("chunks not removed; the reconciler will", "room", u.room, "blob", u.info.ID, "err", err)
	}
}

// remove throws away what is stored under an id, then its marker. What an
// interruption leaves, Reconcile removes.
func (b *Blobs) remove(ctx context.Context, id bus.RoomID, blob string) {
	err := b.purge(ctx, chunksFilter(id, blob))
	if err == nil {
		err = b.purge(ctx, markerSubject(id, blob))
	}
	if err != nil {
		b.cfg.Log.Warn("chunks not removed; the reconciler will", "room", id, "blob", blob, "err", err)
	}
}

func (b *Blobs) purge(ctx context.Context, filter string) error {
	ctx, cancel := context.WithTimeout(ctx, purgeTimeout)
	defer cancel()
	request, err := json.Marshal(map[string]any{"filter": filter})
	if err != nil {
		return err
	}
	m, err := b.cfg.Conn.RequestWithContext(ctx, "$JS.API.STREAM.PURGE."+BlobStream, request)
	if err != nil {
		return err
	}
	var answer struct {
		Success bool                `json:"success"`
		Error   *jetstream.APIError `json:"error"`
	}
	switch err := json.Unmarshal(m.Data, &answer); {
	case err != nil:
		return err
	case answer.Error != nil:
		return answer.Error
	case !answer.Success:
		return errors.New("the purge did not succeed")
	}
	return nil
}

// Commit makes the file be there, all at once, in the place of what had its
// name. fresh: nothing may have it. It waits until every chunk is stored; then
// one compare-and-set on the directory decides, with the caller looked at again
// right before, and held, as every change of a Store is. If it fails, nothing
// has changed and what was stored is removed; only Unavailable leaves it open.
func (u *Upload) Commit(ctx context.Context, c Caller, fresh bool) (bus.BlobInfo, error) {
	u.writing.Wait()
	if err := u.failed(); err != nil {
		u.Abort(ctx)
		return bus.BlobInfo{}, err
	}
	var old []string
	err := u.store.change(ctx, u.room, c, func(d bus.BlobDirectory) (bus.BlobDirectory, error) {
		old = old[:0]
		if i, there := find(d, u.info.Name); there {
			if fresh {
				return d, fileExists(u.room, u.info.Name)
			}
			old = append(old, d.Blobs[i].ID)
		}
		// After the directory was read: else somebody may have removed the chunks of
		// an upload that slept since, and touched the directory before that.
		if u.age() > markerFresh {
			return d, bus.E(bus.Unavailable, "the upload took too long to be finished")
		}
		for _, blob := range old {
			if err := u.store.mark(ctx, u.room, blob); err != nil {
				return d, err
			}
		}
		if !u.dated {
			u.info.CreatedAt = u.store.cfg.Now().UTC().Truncate(time.Millisecond)
		}
		return u.store.with(d, u.info, 0)
	})
	switch {
	case errors.Is(err, errDoubtful):
		u.end() // it may be there: the chunks stay until the reconciler knows
		return bus.BlobInfo{}, err
	case err != nil:
		u.Abort(ctx)
		return bus.BlobInfo{}, err
	}
	u.end()
	for _, blob := range old {
		u.store.remove(ctx, u.room, blob)
	}
	if err := u.store.purge(ctx, markerSubject(u.room, u.info.ID)); err != nil {
		u.store.cfg.Log.Warn("marker not removed; the reconciler will", "room", u.room, "blob", u.info.ID, "err", err)
	}
	return u.info.BlobInfo, nil
}

func fileExists(id bus.RoomID, name bus.BlobName) error {
	return bus.E(bus.Conflict, "room %s has a file %s already", id, name).WithHint("unibusctl room put --replace")
}

// Delete removes a file. already: there was none.
func (b *Blobs) Delete(ctx context.Context, id bus.RoomID, name bus.BlobName, c Caller) (gone bus.BlobInfo, already bool, err error) {
	var old bus.StoredBlob
	err = b.change(ctx, id, c, func(d bus.BlobDirectory) (bus.BlobDirectory, error) {
		i, there := find(d, name)
		if already = !there; already {
			return d, errNothingToDo
		}
		old = d.Blobs[i]
		if err := b.mark(ctx, id, old.ID); err != nil {
			return d, err
		}
		d.Blobs = slices.Delete(slices.Clone(d.Blobs), i, i+1)
		return d, nil
	})
	if err != nil || already {
		return bus.BlobInfo{Name: name}, already, err
	}
	b.remove(ctx, id, old.ID)
	return old.BlobInfo, false, nil
}

var (
	// errDoubtful marks a write that may have landed.
	errDoubtful = errors.New("the write was not confirmed")
	// errNothingToDo ends a change that would change nothing.
	errNothingToDo = errors.New("nothing to do")
)

// change is one compare-and-set on a room's directory, tried again with the
// newest one when somebody else was faster. The caller is held from before the
// look until the write is committed or refused.
func (b *Blobs) change(ctx context.Context, id bus.RoomID, c Caller, edit func(bus.BlobDirectory) (bus.BlobDirectory, error)) error {
	for try := 0; ; try++ {
		err := b.changeOnce(ctx, id, c, edit)
		switch {
		case errors.Is(err, errNothingToDo):
			return nil
		case !errors.Is(err, errRaced) || try == 64:
			return err
		}
	}
}

func (b *Blobs) changeOnce(ctx context.Context, id bus.RoomID, c Caller, edit func(bus.BlobDirectory) (bus.BlobDirectory, error)) error {
	d, sequence, err := b.directory(ctx, id)
	if err != nil {
		return err
	}
	if d, err = edit(d); err != nil {
		if errors.Is(err, errNothingToDo) && c.Check != nil { // also who changes nothing is told only what they may know
			if err := c.Check(); err != nil {
				return err
			}
		}
		return err
	}
	value, err := json.Marshal(d)
	if err != nil {
		return bus.E(bus.Internal, "encode the directory of room %s: %w", id, err)
	}
	hold := b.cfg.View.Hold(c.Key)
	defer hold.Release()
	if c.Check != nil && !guard.Off(guard.CallerRecheck) {
		if err := c.Check(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, err = b.js.Publish(ctx, directorySubject(id), value, jetstream.WithExpectStream(BlobStream),
		jetstream.WithRetryAttempts(0), jetstream.WithExpectLastSequencePerSubject(sequence))
	var api *jetstream.APIError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &api) && (api.ErrorCode == errWrongLastSeq || api.ErrorCode == errWrongLastSeqAny):
		return raced(bus.E(bus.Conflict, "the files of room %s were changed by somebody else at the same moment", id))
	case errors.As(err, &api):
		return b.refused(err, "the file cannot be stored now")
	}
	e := bus.E(bus.Unavailable, "no quorum: the change of room %s was not confirmed and may or may not have landed", id)
	e.Err = errors.Join(errDoubtful, err)
	return e
}

// Read gives n bytes of a file from an offset on to emit, piece by piece, in
// order. A piece is good until emit returns. It asks ahead for what comes next.
// NotFound: the file was removed meanwhile.
func (b *Blobs) Read(ctx context.Context, id bus.RoomID, s bus.StoredBlob, offset, n int64, emit func([]byte) error) error {
	if n == 0 {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type piece struct {
		data []byte
		err  error
	}
	first, last := offset/BlobChunk, (offset+n-1)/BlobChunk
	ahead := make(chan chan piece, blobWindow/2-1)
	go func() {
		defer close(ahead)
		for k := first; k <= last; k++ {
			p := make(chan piece, 1)
			select {
			case ahead <- p:
			case <-ctx.Done():
				return
			}
			go func() {
				data, err := b.chunk(ctx, id, s, k)
				p <- piece{data, err}
			}()
		}
	}()
	for k := first; k <= last; k++ {
		p, ok := <-ahead
		if !ok {
			return bus.E(bus.Unavailable, "reading was cut off: %w", context.Cause(ctx))
		}
		got := <-p
		if got.err != nil {
			return got.err
		}
		data := got.data
		if end := offset + n - k*BlobChunk; end < int64(len(data)) {
			data = data[:end]
		}
		if k == first {
			data = data[offset-k*BlobChunk:]
		}
		if err := emit(data); err != nil {
			return err
		}
	}
	return nil
}

// chunk reads one chunk from whichever replica answers.
func (b *Blobs) chunk(ctx context.Context, id bus.RoomID, s bus.StoredBlob, k int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, chunkPatience)
	defer cancel()
	subject := chunkSubject(id, s.ID, k)
	want := min(s.Size-k*BlobChunk, BlobChunk)
	for {
		try, stop := context.WithTimeout(ctx, chunkTimeout)
		m, err := b.cfg.Conn.RequestWithContext(try, "$JS.API.DIRECT.GET."+BlobStream+"."+subject, nil)
		stop()
		switch {
		case err == nil && m.Header.Get("Status") == "":
			if int64(len(m.Data)) != want {
				return nil, bus.E(bus.Internal, "chunk %d of %s has %d bytes, not %d", k, s.ID, len(m.Data), want)
			}
			return m.Data, nil
		case err == nil && m.Header.Get("Status") == "404":
			// A replica that is behind, or the file was removed since it was looked up.
			if now, err := b.Find(ctx, id, s.Name); err != nil || now.ID != s.ID {
				if err == nil {
					err = bus.E(bus.NotFound, "the file was replaced meanwhile")
				}
				return nil, err
			}
		}
		select {
		case <-ctx.Done():
			return nil, bus.E(bus.Unavailable, "chunk %d of a file cannot be read now: %w", k, errors.Join(err, context.Cause(ctx)))
		case <-time.After(againAfter):
		}
	}
}

// PurgeRoom removes everything that a room stores. The room must be one into
// which nobody may store any more.
func (b *Blobs) PurgeRoom(ctx context.Context, id bus.RoomID) error {
	for _, filter := range []string{directorySubject(id), blobSubjects + "C." + string(id) + ".>", blobSubjects + "U." + string(id) + ".>"} {
		if err := b.purge(ctx, filter); err != nil {
			return bus.E(bus.Unavailable, "the files of room %s are not all removed: %w", id, err).WithHint("repeat it")
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.purged[id] = true
	return nil
}

// purgeRooms finishes what who archived a room may have left.
func (b *Blobs) purgeRooms(ctx context.Context) error {
	for _, r := range b.cfg.View.Rooms() {
		b.mu.Lock()
		done := b.purged[r.ID]
		b.mu.Unlock()
		if !r.Purged || done {
			continue
		}
		if err := b.PurgeRoom(ctx, r.ID); err != nil {
			return err
		}
	}
	return nil
}

// Reconcile removes what interrupted uploads, deletions and purges have left, and
// says of how many files. Any node may do it, and several at once.
//
// The directory is written again before chunks of an upload are removed: its
// committer, if it only slept, loses the compare-and-set, looks again, and finds
// that its own marker is too old.
func (b *Blobs) Reconcile(ctx context.Context) (removed int, err error) {
	if err := b.purgeRooms(ctx); err != nil {
		return 0, err
	}
	markers, err := b.current(ctx, blobSubjects+"U.*.*")
	if err != nil {
		return 0, err
	}
	for _, m := range markers {
		if b.cfg.Now().Sub(m.at) < markerStale {
			continue
		}
		room, blob, _ := strings.Cut(strings.TrimPrefix(m.subject, blobSubjects+"U."), ".")
		id, err := bus.ParseRoomID(room)
		if err != nil || blob == "" {
			b.cfg.Log.Warn("a marker of no room", "subject", m.subject)
			continue
		}
		listed := false
		err = b.change(ctx, id, Caller{}, func(d bus.BlobDirectory) (bus.BlobDirectory, error) {
			listed = slices.ContainsFunc(d.Blobs, func(s bus.StoredBlob) bool { return s.ID == blob })
			if listed {
				return d, errNothingToDo
			}
			return d, nil
		})
		if err != nil {
			return removed, err
		}
		if listed {
			err = b.purge(ctx, m.subject)
		} else {
			err = errors.Join(b.purge(ctx, chunksFilter(id, blob)), b.purge(ctx, m.subject))
			removed++
		}
		if err != nil {
			return removed, bus.E(bus.Unavailable, "chunks of room %s not removed: %w", id, err)
		}
	}
	return removed, nil
}
