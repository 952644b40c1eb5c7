package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sig"
)

// This file is the files of rooms. Their bodies are the only ones that are
// neither JSON nor small: they go through in pieces, and no more than a few
// pieces of each transfer are ever in memory. Each piece is decided about anew,
// so that a transfer ends soon after the caller's access.

const (
	// maxTransfers is how many files may be on their way through a node, and
	// maxTransfersOf those of one user: they last, and each holds one of the slots
	// that all requests need.
	maxTransfers   = 32
	maxTransfersOf = 4
	// pieceTimeout is how long one piece may take to be received or sent. What is
	// slower than this ties up the node.
	pieceTimeout = 15 * time.Second
)

const octets = "application/octet-stream"

type blobPath struct {
	Room bus.RoomID   `path:"room"`
	Name bus.BlobName `path:"name"`
}

type putBlob struct {
	Room  bus.RoomID   `path:"room"`
	Name  bus.BlobName `path:"name"`
	Fresh anyTag       `header:"If-None-Match" doc:"*: only if nothing has this name"`
}

type getBlob struct {
	Room    bus.RoomID   `path:"room"`
	Name    bus.BlobName `path:"name"`
	IfMatch blobTag      `header:"If-Match" doc:"the ETag of what is to be read, as for its rest"`
	Range   string       `header:"Range" maxLength:"100" doc:"one range of bytes; anything else is answered with the whole"`
}

// anyTag is the * of If-None-Match.
type anyTag string

// blobTag is an ETag: the SHA-256 in hex, in quotes.
type blobTag string

func blobETag(b bus.BlobInfo) string { return strconv.Quote(b.SHA256) }

// errRange is a range that the file has nothing of.
var errRange = bus.E(bus.Invalid, "the file has no such range")

// transfers counts files on their way.
type transfers struct {
	mu  sync.Mutex
	all int
	of  map[bus.UserKey]int
}

// enter makes room for one more, until leave.
func (t *transfers) enter(k bus.UserKey) (leave func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.all >= maxTransfers:
		return nil, bus.E(bus.Unavailable, "this node has too many files on their way")
	case t.of[k] >= maxTransfersOf:
		return nil, tooMany(time.Second, "key")
	}
	t.all++
	t.of[k]++
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.all--
		if t.of[k]--; t.of[k] == 0 {
			delete(t.of, k)
		}
	}, nil
}

func (t *transfers) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.all
}

// inRoom decides about a caller and the files of a room, as the View has both now.
// The room is looked at under the same lease: see still. What an archived room
// has kept is read by who was in it at the end, as its messages are.
func (a *api) inRoom(id bus.RoomID, writes bool, decide func() error) error {
	lease, _ := a.view.Lease()
	r, _, ok := a.view.Room(id)
	if err := decide(); err != nil {
		return err
	}
	switch {
	case !ok:
		return noRoom(id)
	case r.Purged:
		return bus.E(bus.Conflict, "room %s was archived, and what it stored was taken away", id)
	case writes && r.Status != bus.RoomActive:
		return bus.E(bus.Conflict, "room %s is archived", id)
	}
	return a.still(lease)
}

// again looks at who reads, or is about to write, once more.
func (a *api) again(c *caller, act action, id bus.RoomID) error {
	return a.inRoom(id, act == blobPut, func() error {
		now, err := a.current(c)
		if err != nil {
			return err
		}
		return may(now.subject(), act, a.inside(now, id, bus.UserKey{}))
	})
}

func (a *api) listBlobs(x *exchange, in *roomPath) error {
	c := x.caller
	if err := a.authorize(c, blobList, a.inside(c, in.Room, bus.UserKey{})); err != nil {
		return err
	}
	list, err := a.blobs.List(x.r.Context(), in.Room)
	if err != nil {
		return err
	}
	hold := a.view.Hold(c.key)
	defer hold.Release()
	err = a.again(c, blobList, in.Room)
	hold.Release()
	return x.answer(list, err)
}

// putBlob stores a file while it comes in. Nothing shows of it before all of it
// is stored and is what was signed.
func (a *api) putBlob(x *exchange, in *putBlob) error {
	c, size := x.caller, x.r.ContentLength
	about := a.aboutRoom(in.Room, bus.UserKey{})
	if err := a.authorize(c, blobPut, about(c)); err != nil {
		return err
	}
	if err := a.again(c, blobPut, in.Room); err != nil {
		return err
	}
	if size < 0 {
		return invalid("Content-Length must say how long the file is")
	}
	leave, err := a.transfers.enter(c.key)
	if err != nil {
		x.w.Header().Set(bus.EffectHeader, bus.EffectNone)
		return err
	}
	defer leave()
	info := bus.BlobInfo{Name: in.Name, Size: size, SHA256: hex.EncodeToString(x.digest[:]), CreatedBy: c.key.NKey()}
	// Who repeats an upload whose answer was lost need not send it all again.
	if old, err := a.blobs.Find(x.r.Context(), in.Room, in.Name); err == nil && old.SHA256 == info.SHA256 && old.Size == size {
		hold := a.view.Hold(c.key)
		defer hold.Release()
		err := a.again(c, blobPut, in.Room)
		hold.Release()
		return x.answer(bus.BlobChange{Room: in.Room, Blob: old.BlobInfo, Already: true}, err)
	} else if err != nil && bus.CodeOf(err) != bus.NotFound {
		return err
	}
	return a.make(x, c, plan{
		action: blobPut, target: about, detail: summary(string(in.Name), fmt.Sprintf("bytes=%d", size)), success: http.StatusCreated,
		do: func(_ context.Context, s *kv.Store) (effect, error) {
			who := s.Caller()
			may := who.Check
			who.Check = func() error { return a.inRoom(in.Room, true, may) }
			stored, err := a.receive(x, in, info, who)
			return effect{body: bus.BlobChange{Room: in.Room, Blob: stored}, verified: true}, err
		},
	})
}

// receive takes the body in.
func (a *api) receive(x *exchange, in *putBlob, info bus.BlobInfo, who kv.Caller) (bus.BlobInfo, error) {
	ctx := x.r.Context()
	up, err := a.blobs.Begin(ctx, in.Room, info)
	if err != nil {
		return bus.BlobInfo{}, err
	}
	err = a.pump(x, up, who, info.Size)
	_ = http.NewResponseController(x.w).SetWriteDeadline(time.Now().Add(a.patrol + pieceTimeout))
	// Who ends the request, as its client may, must not end the clearing up.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.patrol)
	defer cancel()
	if err != nil {
		up.Abort(end)
		a.metrics.transfers.WithLabelValues(transferIn, transferFailed).Inc()
		return bus.BlobInfo{}, err
	}
	guard.Pause("blob")
	stored, err := up.Commit(end, who, in.Fresh != "")
	result := transferDone
	if err != nil {
		result = transferFailed
	}
	a.metrics.transfers.WithLabelValues(transferIn, result).Inc()
	return stored, err
}

// pump reads the body to its end, piece by piece, and holds it to what was
// signed.
func (a *api) pump(x *exchange, up *kv.Upload, who kv.Caller, size int64) error {
	ctl := http.NewResponseController(x.w)
	sum := sha256.New()
	for left := size; left > 0; {
		_ = ctl.SetReadDeadline(time.Now().Add(pieceTimeout))
		buf := a.blobs.Buffer()
		n := int(min(left, int64(len(buf))))
		if _, err := io.ReadFull(x.r.Body, buf[:n]); err != nil {
			return bus.E(bus.Invalid, "the file ends before it is complete, or comes too slowly: %w", err)
		}
		sum.Write(buf[:n])
		a.metrics.transferred.WithLabelValues(transferIn).Add(float64(n))
		if err := who.Check(); err != nil && !guard.Off(guard.CallerRecheck) { // spares the rest; what counts is asked at the end
			return err
		}
		if err := up.Write(buf, n); err != nil {
			return err
		}
		left -= int64(n)
	}
	_ = ctl.SetReadDeadline(time.Now().Add(pieceTimeout))
	if n, err := x.r.Body.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) || len(x.r.Trailer) > 0 {
		return invalid("the body is not as long as it says, or trailers follow it")
	}
	if got := sig.Digest(sum.Sum(nil)); got != x.digest && !guard.Off(guard.BlobDigest) {
		return invalid("Content-Digest is not that of the body: nothing was stored")
	}
	return nil
}

func (a *api) deleteBlob(x *exchange, in *blobPath) error {
	c := x.caller
	about := a.aboutRoom(in.Room, bus.UserKey{})
	if err := a.authorize(c, blobDelete, about(c)); err != nil {
		return err
	}
	return a.make(x, c, plan{
		action: blobDelete, target: about, detail: string(in.Name), success: http.StatusOK,
		do: func(ctx context.Context, s *kv.Store) (effect, error) {
			who := s.Caller()
			may := who.Check
			who.Check = func() error { return a.inRoom(in.Room, true, may) }
			gone, already, err := a.blobs.Delete(ctx, in.Room, in.Name, who)
			return effect{body: bus.BlobChange{Room: in.Room, Blob: gone, Already: already}, already: already, verified: true}, err
		},
	})
}

// getBlob sends a file, or a range of it.
func (a *api) getBlob(x *exchange, in *getBlob) error {
	c := x.caller
	if err := a.authorize(c, blobGet, a.inside(c, in.Room, bus.UserKey{})); err != nil {
		return err
	}
	leave, err := a.transfers.enter(c.key)
	if err != nil {
		return err
	}
	defer leave()
	blob, err := a.blobs.Find(x.r.Context(), in.Room, in.Name)
	if err != nil {
		return err
	}
	if err := a.again(c, blobGet, in.Room); err != nil {
		return err
	}
	if in.IfMatch != "" && string(in.IfMatch) != blobETag(blob.BlobInfo) {
		return bus.E(bus.Conflict, "the file %s of room %s is another one now", in.Name, in.Room).WithHint("unibusctl room get %s %s", in.Room, in.Name)
	}
	digest, err := hex.DecodeString(blob.SHA256)
	if err != nil || len(digest) != sha256.Size {
		return bus.E(bus.Internal, "the digest of a file cannot be read: %v", err)
	}
	offset, n, partial, err := parseRange(in.Range, blob.Size)
	h := x.w.Header()
	if err != nil {
		h.Set("Content-Range", fmt.Sprintf("bytes */%d", blob.Size))
		return err
	}
	for name, value := range map[string]string{
		"Content-Type": octets, "Content-Length": strconv.FormatInt(n, 10), "Accept-Ranges": "bytes", "ETag": blobETag(blob.BlobInfo),
		"Repr-Digest": sig.Digest(digest).Field(), "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
		"Content-Disposition": "attachment", // what a member has stored is no page of ours
	} {
		h.Set(name, value)
	}
	x.status = http.StatusOK
	if partial {
		x.status = http.StatusPartialContent
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", offset, offset+n-1, blob.Size))
	}
	x.w.WriteHeader(x.status)
	result := transferDone
	if err := a.deliver(x, in.Room, blob, offset, n); err != nil {
		// The status is sent. A body that is shorter than announced says the rest.
		result, x.reason = transferFailed, "cut_off"
		x.gate.log.Warn("a file was not sent to its end", "request", x.id, "room", in.Room, "blob", blob.ID, "err", err)
	}
	a.metrics.transfers.WithLabelValues(transferOut, result).Inc()
	return nil
}

// deliver sends the bytes. The last piece of a whole file is held back until all
// of it was seen to be what was stored.
func (a *api) deliver(x *exchange, id bus.RoomID, blob bus.StoredBlob, offset, n int64) error {
	ctl := http.NewResponseController(x.w)
	var sum hash.Hash
	if n == blob.Size {
		sum = sha256.New()
	}
	return a.blobs.Read(x.r.Context(), id, blob, offset, n, func(piece []byte) error {
		if err := a.again(x.caller, blobGet, id); err != nil {
			return err
		}
		n -= int64(len(piece))
		if sum != nil {
			sum.Write(piece)
			if n == 0 && hex.EncodeToString(sum.Sum(nil)) != blob.SHA256 {
				return bus.E(bus.Internal, "file %s is not what was stored", blob.ID)
			}
		}
		_ = ctl.SetWriteDeadline(time.Now().Add(pieceTimeout))
		_, err := x.w.Write(piece)
		a.metrics.transferred.WithLabelValues(transferOut).Add(float64(len(piece)))
		return err
	})
}

// parseRange reads a header Range (RFC 9110, section 14.2). What is no range of
// bytes, or more than one, is answered with the whole.
func parseRange(header string, size int64) (offset, n int64, partial bool, err error) {
	spec, ok := strings.CutPrefix(header, "bytes=")
	from, to, dashed := strings.Cut(spec, "-")
	if !ok || !dashed || !digits(from) || !digits(to) || from == "" && to == "" {
		return 0, size, false, nil
	}
	first, err1 := strconv.ParseInt("0"+from, 10, 64)
	last, err2 := strconv.ParseInt("0"+to, 10, 64)
	switch {
	case err1 != nil || err2 != nil:
		return 0, 0, false, errRange
	case from == "": // the last bytes
		if last = min(last, size); last == 0 {
			return 0, 0, false, errRange
		}
		return size - last, last, true, nil
	case to == "":
		last = size - 1
	case last < first:
		return 0, size, false, nil
	}
	if first >= size {
		return 0, 0, false, errRange
	}
	last = min(last, size-1)
	return first, last - first + 1, true, nil
}

func digits(s string) bool { return strings.Trim(s, "0123456789") == "" }

// transfer makes an operation whose handler answers by itself.
func transfer[In, Out any](s spec, statuses []int, h func(a *api, x *exchange, in *In) error) operation {
	o := newOperation[In, Out](s, statuses...)
	o.serve = func(a *api, x *exchange) error {
		in := new(In)
		if err := o.shape.bind(x.r, x.body, in); err != nil {
			return err
		}
		if err := a.blobsReady(); err != nil {
			return err
		}
		return h(a, x, in)
	}
	return o
}

func (a *api) blobsReady() error {
	if a.blobs == nil {
		return bus.E(bus.Unavailable, "this node stores no files")
	}
	return nil
}

// The routes about files.
func blobOperations() []operation {
	errs := []int{http.StatusForbidden, http.StatusNotFound, http.StatusConflict}
	noOracle := "To who is not a member, admins included, there is no such room."
	put := transfer[putBlob, bus.BlobChange](spec{
		id: "putBlob", method: http.MethodPut, path: "/v1/rooms/{room}/blobs/{name}", tag: "blobs", summary: "Store a file",
		detail: "Writers and owners. The body is streamed: Content-Length and Content-Digest say before what it is, and nothing is stored if it is something else. " +
			"It takes the place of what had its name, all at once. 200 with already=true: these bytes have that name already, and the body was not read; send Expect: 100-continue to profit. " + noOracle,
		answer: exampleBlobChange, errors: errs,
	}, []int{http.StatusOK, http.StatusCreated}, (*api).putBlob)
	put.streams = true
	get := transfer[getBlob, bus.BlobInfo](spec{
		id: "getBlob", method: http.MethodGet, path: "/v1/rooms/{room}/blobs/{name}", tag: "blobs", summary: "Read a file, or a range of it",
		detail: "Members. Repr-Digest is the SHA-256 of the whole file, and so is the ETag; with If-Match the rest of a file is that of the same file, else 409. " + noOracle,
		answer: "the bytes", errors: append([]int{http.StatusRequestedRangeNotSatisfiable}, errs...),
	}, []int{http.StatusOK, http.StatusPartialContent}, (*api).getBlob)
	get.content = octets
	return []operation{
		transfer[roomPath, bus.BlobList](spec{
			id: "listBlobs", method: http.MethodGet, path: "/v1/rooms/{room}/blobs", tag: "blobs", summary: "List the files of a room",
			detail: "Members. Sorted by name. " + noOracle,
			answer: exampleBlobList, errors: errs,
		}, []int{http.StatusOK}, (*api).listBlobs),
		put,
		get,
		transfer[blobPath, bus.BlobChange](spec{
			id: "deleteBlob", method: http.MethodDelete, path: "/v1/rooms/{room}/blobs/{name}", tag: "blobs", summary: "Delete a file",
			detail: "Writers and owners, whoever stored it. already=true: there was none. " + noOracle,
			answer: exampleBlobChange, errors: errs,
		}, []int{http.StatusOK}, (*api).deleteBlob),
	}
}
