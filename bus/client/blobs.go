package client

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/seal"
	"unibus.internal/bus/sig"
)

const (
	// stallTimeout is how long a transfer may make no progress before it is cut
	// and begun again elsewhere. A service tries for 20 s to store one piece.
	stallTimeout = 30 * time.Second
	// commitTimeout is for the answer, once all was sent.
	commitTimeout = 45 * time.Second
	// transferPatience is how long a transfer that was under way is tried to be
	// taken up again: longer than two elections.
	transferPatience = 40 * time.Second
	transferPause    = 300 * time.Millisecond
	transferBuffer   = 64 << 10
	maxChangeAnswer  = 64 << 10
)

// BlobOptions say how a file is transferred. The zero value is fine.
type BlobOptions struct {
	// Replace: a file that has the name is replaced. Without it that is a
	// Conflict, unless it holds the same bytes.
	Replace bool
	// Progress is told how many bytes are done, after each piece; less than before
	// when an upload begins again. May be nil.
	Progress func(done, total int64)
	// Keys encrypt and decrypt in encrypted rooms; without them such a room is
	// refused.
	Keys *Keys
}

func blobPath(id bus.RoomID, name bus.BlobName) (string, error) {
	room, err := roomPath(id)
	if err != nil {
		return "", err
	}
	if _, err := bus.ParseBlobName(string(name)); err != nil {
		return "", err
	}
	return room + "/blobs/" + url.PathEscape(string(name)), nil
}

// Blobs lists the files of a room.
func (c *Client) Blobs(ctx context.Context, id bus.RoomID) (bus.BlobList, error) {
	var out bus.BlobList
	path, err := roomPath(id)
	if err == nil {
		err = c.get(ctx, path+"/blobs", nil, &out)
	}
	return out, err
}

// DeleteBlob deletes a file of a room. May be sent again.
func (c *Client) DeleteBlob(ctx context.Context, id bus.RoomID, name bus.BlobName) (bus.BlobChange, error) {
	var out bus.BlobChange
	path, err := blobPath(id, name)
	if err == nil {
		err = c.exchange(ctx, call{method: http.MethodDelete, path: path, again: true}, nil, &out)
	}
	return out, err
}

// PutBlob stores what content holds from its beginning on as a file of a room. It
// is read twice: once for its digest, which is signed, and once to be sent; it
// is sent again from the beginning when a node fails. Nothing of a file shows
// before all of it is stored and found to be what was signed. No more of it than
// a piece is in memory.
func (c *Client) PutBlob(ctx context.Context, id bus.RoomID, name bus.BlobName, content io.ReadSeeker, o BlobOptions) (bus.BlobChange, error) {
	path, err := blobPath(id, name)
	if err != nil {
		return bus.BlobChange{}, err
	}
	sealed, err := c.encrypts(ctx, id, o.Keys)
	if err != nil {
		return bus.BlobChange{}, err
	}
	if sealed {
		f, err := o.Keys.file(ctx, id, name)
		if err != nil {
			return bus.BlobChange{}, err
		}
		content = &sealedContent{file: f, content: content}
	}
	sum := sha256.New()
	size, err := digest(ctx, sum, content)
	if err != nil {
		return bus.BlobChange{}, err
	}
	u := &upload{client: c, path: path, content: content, size: size, digest: sig.Digest(sum.Sum(nil)), options: o}
	return u.run(ctx)
}

// encrypts says whether what a room stores is encrypted.
func (c *Client) encrypts(ctx context.Context, id bus.RoomID, k *Keys) (bool, error) {
	r, err := c.Room(ctx, id)
	if err != nil {
		return false, err
	}
	if r.Encrypted && k == nil {
		return false, bus.E(bus.Invalid, "room %s is encrypted, and no keys are given: see BlobOptions.Keys", id)
	}
	return k.encrypted(id, r.Encrypted)
}

// sealedContent is a file as an encrypted room stores it.
type sealedContent struct {
	file    *seal.File
	content io.ReadSeeker
	out     io.Reader
}

// Seek goes to the beginning, and nowhere else.
func (s *sealedContent) Seek(offset int64, whence int) (int64, error) {
	if offset != 0 || whence != io.SeekStart {
		return 0, errors.ErrUnsupported
	}
	s.out = s.file.Encrypt(s.content)
	return s.content.Seek(0, io.SeekStart) //nolint:wrapcheck // as io.Seeker wants it
}

func (s *sealedContent) Read(p []byte) (int, error) {
	return s.out.Read(p) //nolint:wrapcheck // as io.Reader wants it
}

func digest(ctx context.Context, sum hash.Hash, content io.ReadSeeker) (size int64, err error) {
	if _, err := content.Seek(0, io.SeekStart); err != nil {
		return 0, bus.E(bus.Invalid, "the file cannot be read from its beginning: %w", err)
	}
	buf := make([]byte, transferBuffer)
	for {
		n, err := content.Read(buf)
		sum.Write(buf[:n])
		size += int64(n)
		switch {
		case errors.Is(err, io.EOF):
			return size, nil
		case err != nil:
			return 0, bus.E(bus.Invalid, "the file cannot be read: %w", err)
		case ctx.Err() != nil:
			return 0, bus.E(bus.Unavailable, "nothing was stored: %w", context.Cause(ctx))
		}
	}
}

// failover is one transfer's way through the nodes.
type failover struct {
	client    *Client
	node      int
	tries     int       // since there was progress
	started   bool      // there was some
	since     time.Time // of the last of it
	corrected bool
}

func (c *Client) newFailover() failover {
	c.mu.Lock()
	defer c.mu.Unlock()
	return failover{client: c, node: c.first, since: time.Now()}
}

func (f *failover) progress() { f.started, f.tries, f.since = true, 0, time.Now() }

// next waits a moment and goes to the next node. It reports false when it is not
// worth it any more.
func (f *failover) next(ctx context.Context) bool {
	f.node = (f.node + 1) % len(f.client.nodes)
	f.tries++
	if f.started && time.Since(f.since) > transferPatience || !f.started && f.tries >= max(len(f.client.nodes), minAttempts) {
		return false
	}
	t := time.NewTimer(transferPause)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// again reports whether an answer is one that another attempt may better.
func (f *failover) again(a *answer) (retry, same bool) {
	switch {
	case a.status == http.StatusUnauthorized && !f.corrected && f.client.correct(f.node, a.date):
		f.corrected = true
		return true, true
	case slices.Contains([]int{http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout}, a.status):
		return true, false
	}
	return false, false
}

// open signs and sends one request of a transfer, over a connection of its own:
// net/http repeats nothing by itself on a new one.
func (c *Client) open(ctx context.Context, node int, req *http.Request, d sig.Digest) (*http.Response, error) {
	nonce, err := sig.NewNonce(c.rand)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	created := c.now().Add(c.offsets[node])
	c.mu.Unlock()
	if err := sig.SignStream(req, d, c.identity, created, nonce); err != nil {
		return nil, err
	}
	return c.transfers.Do(req.WithContext(ctx))
}

// small reads an answer that is no file.
func small(resp *http.Response) (*answer, error) {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxChangeAnswer))
	if err != nil {
		return nil, err
	}
	a := &answer{status: resp.StatusCode, header: resp.Header, body: body}
	if t, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		a.date = t
	}
	return a, nil
}

// watchdog ends ctx when nobody has called feed for a while.
type watchdog struct {
	cancel context.CancelFunc
	timer  *time.Timer
}

func newWatchdog(ctx context.Context) (context.Context, *watchdog) {
	ctx, cancel := context.WithCancel(ctx)
	return ctx, &watchdog{cancel: cancel, timer: time.AfterFunc(stallTimeout, cancel)}
}

func (w *watchdog) feed(d time.Duration) { w.timer.Reset(d) }

func (w *watchdog) end() {
	w.timer.Stop()
	w.cancel()
}

// upload is one file on its way to a node.
type upload struct {
	client  *Client
	path    string
	content io.ReadSeeker
	size    int64
	digest  sig.Digest
	options BlobOptions
	most    int64 // bytes that any attempt has sent
}

func (u *upload) run(ctx context.Context) (bus.BlobChange, error) {
	var out bus.BlobChange
	f := u.client.newFailover()
	var told *answer
	var failure error
	for {
		a, err := u.attempt(ctx, &f)
		var ours *bus.Error
		switch {
		case errors.As(err, &ours):
			return out, err
		case ctx.Err() != nil:
			return out, bus.E(bus.Unavailable, "the upload was given up; the file may be stored all the same: %w", context.Cause(ctx))
		case err != nil:
			failure, told = err, nil
			u.client.log.Debug("an upload was cut off", "node", u.client.nodes[f.node], "err", err)
		default:
			retry, same := f.again(a)
			if !retry {
				u.client.answered(f.node, a, false)
				if a.status < 200 || a.status > 299 {
					return out, a.problem()
				}
				if err := json.Unmarshal(a.body, &out); err != nil {
					return out, bus.E(bus.Internal, "the answer to an upload is not what was asked for: %w", err)
				}
				return out, nil
			}
			told = a
			if same {
				continue
			}
		}
		if !f.next(ctx) {
			if told != nil {
				return out, told.problem()
			}
			return out, bus.E(bus.Unavailable, "no node takes the file: %w", cause(failure)).WithHint("unibusctl cluster status")
		}
	}
}

// attempt sends all of it to one node. An error that is a *bus.Error is final.
func (u *upload) attempt(ctx context.Context, f *failover) (*answer, error) {
	if _, err := u.content.Seek(0, io.SeekStart); err != nil {
		return nil, bus.E(bus.Invalid, "the file cannot be read from its beginning: %w", err)
	}
	ctx, dog := newWatchdog(ctx)
	defer dog.end()
	body := &outgoing{upload: u, failover: f, dog: dog}
	defer func() { _ = body.detach() }()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, u.client.nodes[f.node]+u.path, body)
	if err != nil {
		return nil, bus.E(bus.Invalid, "no request can be made of %.200q: %w", u.path, err)
	}
	req.ContentLength = u.size
	if u.size == 0 {
		req.Body = http.NoBody
	} else {
		req.Header.Set("Expect", "100-continue") // a node that refuses, or has the file, says so before it is sent
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	req.Header.Set("Accept", "application/json, application/problem+json")
	if !u.options.Replace {
		req.Header.Set("If-None-Match", "*")
	}
	resp, err := u.client.open(ctx, f.node, req, u.digest)
	if err != nil {
		if local := body.detach(); local != nil {
			return nil, bus.E(bus.Invalid, "the file cannot be read: %w", local)
		}
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	return small(resp)
}

// outgoing is the body of an upload as net/http reads it: from a goroutine that
// may outlive the request.
type outgoing struct {
	mu       sync.Mutex
	upload   *upload // nil: detached
	failover *failover
	dog      *watchdog
	sent     int64
	local    error // of the content itself
}

// detach takes the content back: nobody reads it any more.
func (o *outgoing) detach() (local error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.upload = nil
	return o.local
}

func (o *outgoing) Read(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.upload == nil {
		return 0, io.ErrClosedPipe
	}
	n, err := o.upload.content.Read(p)
	o.sent += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		o.local = err
	}
	if o.sent >= o.upload.size {
		o.dog.feed(commitTimeout)
	} else {
		o.dog.feed(stallTimeout)
	}
	if n > 0 {
		if o.sent > o.upload.most { // else it has only come as far as an attempt before it
			o.upload.most = o.sent
			o.failover.progress()
		}
		if o.upload.options.Progress != nil {
			o.upload.options.Progress(o.sent, o.upload.size)
		}
	}
	return n, err //nolint:wrapcheck // as io.Reader wants it
}

// GetBlob writes a file of a room to w, and says of it what is in it: in an
// encrypted room what was decrypted, by whom it was proven to be stored, and when
// that was by their clock. A transfer that is cut off goes on where
// it was, at the next node. An error, also the last one, means that what w has
// got is not to be used: only nil says that all of it is what was stored. No more
// of it than a piece is in memory.
func (c *Client) GetBlob(ctx context.Context, id bus.RoomID, name bus.BlobName, w io.Writer, o BlobOptions) (bus.BlobInfo, error) {
	path, err := blobPath(id, name)
	if err != nil {
		return bus.BlobInfo{}, err
	}
	sealed, err := c.encrypts(ctx, id, o.Keys)
	if err != nil {
		return bus.BlobInfo{}, err
	}
	d := &download{client: c, path: path, w: w, sum: sha256.New(), options: o}
	if sealed {
		opener := o.Keys.opener(ctx, id, name, w)
		d.w = opener
		var f seal.OpenedFile
		if err = d.run(ctx); err == nil {
			f, err = opener.Finish()
		}
		switch bus.CodeOf(err) {
		case "":
		case bus.Forbidden, bus.Unauthenticated:
			if d.tag != "" { // not the word of the service, which gave a file: it does not belong there
				o.Keys.alert(id, bus.UserKey{}, err)
			}
			fallthrough
		default:
			return bus.BlobInfo{}, err
		}
		return bus.BlobInfo{Name: name, Size: f.Size, SHA256: f.SHA256.String(), CreatedAt: f.CreatedAt, CreatedBy: f.Sender.NKey()}, nil
	}
	if err := d.run(ctx); err != nil {
		return bus.BlobInfo{}, err
	}
	return bus.BlobInfo{Name: name, Size: d.size, SHA256: strings.Trim(d.tag, `"`)}, nil
}

// download is one file on its way from a node.
type download struct {
	client  *Client
	path    string
	w       io.Writer
	sum     hash.Hash
	options BlobOptions

	tag    string // ETag of the file, once it is known
	digest sig.Digest
	size   int64
	done   int64
}

func (d *download) run(ctx context.Context) error {
	f := d.client.newFailover()
	var told *answer
	var failure error
	for {
		a, err := d.attempt(ctx, &f)
		var ours *bus.Error
		switch {
		case errors.As(err, &ours):
			return err
		case ctx.Err() != nil:
			return bus.E(bus.Unavailable, "the download was given up: %w", context.Cause(ctx))
		case err != nil:
			failure, told = err, nil
			d.client.log.Debug("a download was cut off", "node", d.client.nodes[f.node], "at", d.done, "err", err)
		case a == nil:
			return d.check()
		default:
			retry, same := f.again(a)
			if !retry {
				return a.problem()
			}
			told = a
			if same {
				continue
			}
		}
		if !f.next(ctx) {
			if told != nil {
				return told.problem()
			}
			return bus.E(bus.Unavailable, "no node gives the file, after %d of %d bytes: %w", d.done, d.size, cause(failure)).WithHint("unibusctl cluster status")
		}
	}
}

func (d *download) check() error {
	if sig.Digest(d.sum.Sum(nil)) != d.digest {
		return bus.E(bus.Internal, "what was received is not what was stored: its digest is another")
	}
	return nil
}

// attempt reads what is missing from one node. An error that is a *bus.Error is
// final; nil and nil means that all is there.
func (d *download) attempt(ctx context.Context, f *failover) (*answer, error) {
	ctx, dog := newWatchdog(ctx)
	defer dog.end()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.client.nodes[f.node]+d.path, nil)
	if err != nil {
		return nil, bus.E(bus.Invalid, "no request can be made of %.200q: %w", d.path, err)
	}
	if d.done > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(d.done, 10)+"-")
	}
	if d.tag != "" {
		req.Header.Set("If-Match", d.tag)
	}
	resp, err := d.client.open(ctx, f.node, req, sig.DigestOf(nil))
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusPartialContent {
		a, err := small(resp)
		if err == nil && a.status >= 200 && a.status <= 299 {
			err = errNotAFile
		}
		return a, err
	}
	if err := d.begin(resp); err != nil {
		return nil, err
	}
	return nil, d.copy(resp.Body, dog, f)
}

var errNotAFile = bus.E(bus.Internal, "the answer is not the file that was asked for")

// begin holds the headers to what is known of the file already.
func (d *download) begin(resp *http.Response) error {
	tag, length := resp.Header.Get("ETag"), resp.ContentLength
	digest, ok := sig.ParseDigest(resp.Header.Get("Repr-Digest"))
	if !ok || tag == "" || length < 0 {
		return errNotAFile
	}
	if d.tag == "" {
		if resp.StatusCode != http.StatusOK {
			return errNotAFile
		}
		d.tag, d.digest, d.size = tag, digest, length
		return nil
	}
	rest := fmt.Sprintf("bytes %d-%d/%d", d.done, d.size-1, d.size)
	whole := resp.StatusCode == http.StatusOK && d.done == 0 && length == d.size
	part := resp.StatusCode == http.StatusPartialContent && d.done > 0 && length == d.size-d.done && resp.Header.Get("Content-Range") == rest
	if tag != d.tag || digest != d.digest || !whole && !part {
		return errNotAFile
	}
	return nil
}

func (d *download) copy(body io.Reader, dog *watchdog, f *failover) error {
	buf := make([]byte, transferBuffer)
	for d.done < d.size {
		n, err := body.Read(buf[:min(int64(len(buf)), d.size-d.done)])
		if n > 0 {
			dog.feed(stallTimeout)
			d.sum.Write(buf[:n])
			if _, err := d.w.Write(buf[:n]); err != nil {
				if e := new(bus.Error); errors.As(err, &e) { // what does not open
					return err //nolint:wrapcheck // it is ours
				}
				return bus.E(bus.Invalid, "what was received cannot be written: %w", err)
			}
			d.done += int64(n)
			f.progress()
			if d.options.Progress != nil {
				d.options.Progress(d.done, d.size)
			}
		}
		if err != nil && d.done < d.size {
			return err //nolint:wrapcheck // of the way to the node: see run
		}
	}
	return nil
}
