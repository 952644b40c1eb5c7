package test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sig"
	"unibus.internal/test/cluster"
)

// blobWorld is a cluster whose room ops stores files.
type blobWorld struct {
	*world
	owner, writer, reader, stranger *person
	limits                          bus.BlobLimits
	bus                             *nats.Conn // as membership: sees what is stored
}

// TestBlobs stores files in a room of a real cluster, by every way that is
// allowed and several that are not.
func TestBlobs(t *testing.T) {
	t.Parallel()
	limits := "24MiB:12"
	if full {
		limits = "2GiB:12"
	}
	w := newWorld(t, cluster.Options{Env: map[cluster.Service]map[string]string{cluster.Membership: {"UNIBUS_BLOB_LIMITS": limits}}})
	b := &blobWorld{world: w, owner: w.addUser("olga"), writer: w.addUser("willy"), reader: w.addUser("rita"), stranger: w.addUser("stranger")}
	var err error
	if b.limits, err = bus.ParseBlobLimits(limits); err != nil {
		t.Fatal(err)
	}
	w.addRoom("ops", b.owner, kv.RoomOptions{})
	w.join("ops", b.writer, bus.Writer)
	w.join("ops", b.reader, bus.Reader)
	b.bus, err = kv.Connect(kv.Link{
		URL: w.URLs(w.NATSURL), SeedFile: w.Seed("membership-bus"), CAFile: w.CA(), Name: "test-files", Inbox: "_INBOX_membership", Timeout: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.bus.Close)
	cluster.WaitFor(t, 30*time.Second, "the store of files", func() error {
		_, err := b.client(t, b.reader).Blobs(t.Context(), "ops")
		return err
	})
	for _, s := range []struct {
		name string
		test func(*testing.T)
	}{
		{"there and back", b.thereAndBack},
		{"ranges", b.ranges},
		{"who may", b.whoMay},
		{"not what was signed", b.notWhatWasSigned},
		{"limits", b.limited},
		{"revoked in mid upload", b.revokedInMidUpload},
		{"removed in mid download", b.removedInMidDownload},
		{"command line", b.commandLine},
		{"encrypted", b.encrypted},
		{"another language", b.anotherLanguage},
		{"memory", b.memory},
		{"leftovers", b.leftovers},
		{"a killed node", b.killedNode},
	} {
		t.Run(s.name, s.test)
	}
}

// content is a file of random bytes.
func content(t testing.TB, size int64) []byte {
	t.Helper()
	data := make([]byte, size)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	return data
}

func hexOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func (b *blobWorld) put(t testing.TB, p *person, name bus.BlobName, data []byte) bus.BlobChange {
	t.Helper()
	done, err := b.client(t, p).PutBlob(t.Context(), "ops", name, bytes.NewReader(data), sdk.BlobOptions{Replace: true})
	if err != nil {
		t.Fatalf("put %s: %v", name, err)
	}
	return done
}

func (b *blobWorld) clear(t testing.TB) {
	t.Helper()
	c := b.client(t, b.owner)
	list, err := c.Blobs(t.Context(), "ops")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list.Blobs {
		if done, err := c.DeleteBlob(t.Context(), "ops", f.Name); err != nil || done.Already || done.Blob.SHA256 != f.SHA256 {
			t.Fatalf("delete %s: %+v %v", f.Name, done, err)
		}
	}
	b.nothingStored(t)
}

// stored is how many chunks and markers of a room the stream holds.
func (b *blobWorld) stored(t testing.TB, id bus.RoomID) (chunks, markers int) {
	t.Helper()
	js, err := jetstream.New(b.bus)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), kv.BlobStream)
	if err != nil {
		t.Fatal(err)
	}
	info, err := s.Info(t.Context(), jetstream.WithSubjectFilter("$O.UNIBUS_blobs.>"))
	if err != nil {
		t.Fatal(err)
	}
	for subject, n := range info.State.Subjects {
		switch {
		case n != 1:
			t.Errorf("%d messages of %s", n, subject)
		case strings.HasPrefix(subject, "$O.UNIBUS_blobs.C."+string(id)+"."):
			chunks++
		case strings.HasPrefix(subject, "$O.UNIBUS_blobs.U."+string(id)+"."):
			markers++
		}
	}
	return chunks, markers
}

// nothingStored wants no byte of any file to be left, soon.
func (b *blobWorld) nothingStored(t testing.TB) {
	t.Helper()
	cluster.WaitFor(t, 10*time.Second, "the last chunk to be removed", func() error {
		if chunks, markers := b.stored(t, "ops"); chunks+markers > 0 {
			return fmt.Errorf("%d chunks and %d markers are left", chunks, markers)
		}
		return nil
	})
}

// What is stored by one node is read from every other, byte for byte, whatever
// its size; the second time it is there already.
func (b *blobWorld) thereAndBack(t *testing.T) {
	for i, size := range []int64{0, 1, kv.BlobChunk - 1, kv.BlobChunk, kv.BlobChunk + 1, 3*kv.BlobChunk + 7, 5 << 20} {
		data := content(t, size)
		name := bus.BlobName(fmt.Sprintf("file %d, a+b=c@~_.txt", i))
		done := b.put(t, b.writer, name, data)
		if done.Already || done.Blob.Size != size || done.Blob.SHA256 != hexOf(data) || done.Blob.CreatedBy != b.writer.key.NKey() {
			t.Errorf("%d bytes: %+v", size, done)
		}
		if done := b.put(t, b.owner, name, data); !done.Already || done.Blob.CreatedBy != b.writer.key.NKey() {
			t.Errorf("%d bytes again: %+v", size, done)
		}
		var out bytes.Buffer
		info, err := b.client(t, b.reader).GetBlob(t.Context(), "ops", name, &out, sdk.BlobOptions{})
		if err != nil || !bytes.Equal(out.Bytes(), data) || info.SHA256 != hexOf(data) {
			t.Errorf("%d bytes: %+v %v, %d came back", size, info, err, out.Len())
		}
	}
	c := b.client(t, b.writer)
	other := content(t, 100)
	if _, err := c.PutBlob(t.Context(), "ops", "file 1, a+b=c@~_.txt", bytes.NewReader(other), sdk.BlobOptions{}); bus.CodeOf(err) != bus.Conflict {
		t.Errorf("another file of that name: %v", err)
	}
	if done, err := c.PutBlob(t.Context(), "ops", "file 1, a+b=c@~_.txt", bytes.NewReader(other), sdk.BlobOptions{Replace: true}); err != nil || done.Already {
		t.Errorf("replaced: %+v %v", done, err)
	}
	list, err := c.Blobs(t.Context(), "ops")
	if err != nil || len(list.Blobs) != 7 || list.Blobs[1].SHA256 != hexOf(other) || list.MaxBytes != b.limits.Bytes || list.MaxCount != b.limits.Count {
		t.Errorf("list: %+v %v", list, err)
	}
	if done, err := c.DeleteBlob(t.Context(), "ops", "nothing"); err != nil || !done.Already {
		t.Errorf("delete what is not there: %+v %v", done, err)
	}
	if _, err := c.GetBlob(t.Context(), "ops", "nothing", io.Discard, sdk.BlobOptions{}); bus.CodeOf(err) != bus.NotFound {
		t.Errorf("get what is not there: %v", err)
	}
	b.clear(t)
}

// A stock client asks for any part of a file, and gets that part or the whole.
func (b *blobWorld) ranges(t *testing.T) {
	data := content(t, 2*kv.BlobChunk+100)
	b.put(t, b.writer, "r", data)
	size, chunk := len(data), kv.BlobChunk
	for _, r := range []struct {
		header     string
		status     int
		from, upTo int
	}{
		{"", 200, 0, size},
		{"bytes=0-", 206, 0, size},
		{"bytes=0-0", 206, 0, 1},
		{"bytes=5-9", 206, 5, 10},
		{fmt.Sprintf("bytes=%d-%d", chunk-1, chunk), 206, chunk - 1, chunk + 1},
		{fmt.Sprintf("bytes=%d-", chunk), 206, chunk, size},
		{fmt.Sprintf("bytes=%d-%d", 2*chunk, 10*size), 206, 2 * chunk, size},
		{"bytes=-7", 206, size - 7, size},
		{fmt.Sprintf("bytes=-%d", 2*size), 206, 0, size},
		{fmt.Sprintf("bytes=%d-", size), 416, 0, 0},
		{"bytes=-0", 416, 0, 0},
		{"bytes=9-5", 200, 0, size},
		{"bytes=1-2,4-5", 200, 0, size},
		{"lines=1-2", 200, 0, size},
		{"bytes=a-b", 200, 0, size},
	} {
		h := http.Header{}
		if r.header != "" {
			h.Set("Range", r.header)
		}
		resp, err := b.api(2, b.reader).send(t.Context(), apiRequest{method: "GET", path: "/v1/rooms/ops/blobs/r", header: h})
		if err != nil || resp.status != r.status {
			t.Fatalf("%q: %v %v, want %d", r.header, resp, err, r.status)
		}
		if r.status == 416 {
			if resp.code() != bus.Invalid || resp.header.Get("Content-Range") != fmt.Sprintf("bytes */%d", size) {
				t.Errorf("%q: %s %v", r.header, resp, resp.header)
			}
			continue
		}
		want := ""
		if r.status == 206 {
			want = fmt.Sprintf("bytes %d-%d/%d", r.from, r.upTo-1, size)
		}
		if !bytes.Equal(resp.body, data[r.from:r.upTo]) || resp.header.Get("Content-Range") != want ||
			resp.header.Get("Repr-Digest") != sig.DigestOf(data).Field() || resp.header.Get("ETag") != strconv.Quote(hexOf(data)) {
			t.Errorf("%q: %d bytes, %v", r.header, len(resp.body), resp.header)
		}
	}
	for tag, want := range map[string]int{strconv.Quote(hexOf(data)): 200, strconv.Quote(hexOf(nil)): 409, "x": 400} {
		resp, err := b.api(3, b.reader).send(t.Context(), apiRequest{method: "GET", path: "/v1/rooms/ops/blobs/r", header: http.Header{"If-Match": {tag}}})
		if err != nil || resp.status != want {
			t.Errorf("If-Match %s: %d %v, want %d", tag, resp.status, err, want)
		}
	}
}

// The files of a room are its members': read by all, written by writers and
// owners. To everybody else, admins included, there is no such room.
func (b *blobWorld) whoMay(t *testing.T) {
	former := b.addUser("former")
	b.join("ops", former, bus.Writer)
	if _, err := b.store.RemoveMember(t.Context(), "ops", former.key); err != nil {
		t.Fatal(err)
	}
	body := []byte("contents")
	for _, row := range []struct {
		who       *person
		get, list int
		put, del  int
	}{
		{b.owner, 200, 200, 201, 200},
		{b.writer, 200, 200, 201, 200},
		{b.reader, 200, 200, 403, 403},
		{former, 404, 404, 404, 404},
		{b.stranger, 404, 404, 404, 404},
		{b.admin, 404, 404, 404, 404},
		{newPerson(t, "nobody"), 401, 401, 401, 401},
	} {
		for _, q := range []struct {
			method, path string
			want         int
		}{
			{"GET", "/v1/rooms/ops/blobs/r", row.get},
			{"GET", "/v1/rooms/ops/blobs", row.list},
			{"PUT", "/v1/rooms/ops/blobs/by-" + row.who.name, row.put},
			{"DELETE", "/v1/rooms/ops/blobs/by-" + row.who.name, row.del},
		} {
			resp := b.upload(t, 1, row.who, q.method, q.path, body, nil)
			if resp.status != q.want {
				t.Errorf("%s %s as %s: %s, want %d", q.method, q.path, row.who.name, resp, q.want)
			}
		}
	}
	if resp := b.upload(t, 1, b.owner, "PUT", "/v1/rooms/nowhere/blobs/x", body, nil); resp.status != http.StatusNotFound {
		t.Errorf("put into no room: %s", resp)
	}
	archived := bus.RoomID("attic")
	b.addRoom(archived, b.owner, kv.RoomOptions{})
	if resp := b.upload(t, 1, b.owner, "PUT", "/v1/rooms/attic/blobs/x", body, nil); resp.status != 201 {
		t.Fatalf("put: %s", resp)
	}
	// What an archived room keeps is read by who was in it; purged, by nobody.
	for _, step := range []struct {
		messages string
		want     map[string]int
	}{
		{"keep", map[string]int{"PUT /y": 409, "GET /x": 200, "GET ": 200, "DELETE /x": 409}},
		{"purge", map[string]int{"PUT /y": 409, "GET /x": 404, "GET ": 409, "DELETE /x": 409}},
	} {
		b.api(1, b.owner).want(t, 200, "DELETE", "/v1/rooms/attic?messages="+step.messages, nil)
		for q, want := range step.want {
			method, name, _ := strings.Cut(q, " ")
			if resp := b.upload(t, 2, b.owner, method, "/v1/rooms/attic/blobs"+name, body, nil); resp.status != want {
				t.Errorf("%s in an archived room, %s: %s, want %d", q, step.messages, resp, want)
			}
		}
	}
	if chunks, _ := b.stored(t, archived); chunks != 0 {
		t.Errorf("%d chunks of a purged room are left", chunks)
	}
	// Names are one segment of a path, and nothing that a system would read in its own way.
	for _, name := range []string{".hidden", "%20a", "a%20", "a.", "a*b", "a%3eb", strings.Repeat("x", 129), "%C3%A4"} {
		if resp := b.upload(t, 1, b.owner, "PUT", "/v1/rooms/ops/blobs/"+name, body, nil); resp.status != http.StatusBadRequest && resp.status != http.StatusUnauthorized {
			t.Errorf("the name %q: %s", name, resp)
		}
	}
	// However a name is escaped, it is the same name.
	if resp := b.upload(t, 1, b.owner, "PUT", "/v1/rooms/ops/blobs/a%2Bb%2C%63", body, nil); resp.status != 201 {
		t.Errorf("an escaped name: %s", resp)
	}
	if resp := b.upload(t, 1, b.owner, "GET", "/v1/rooms/ops/blobs/a+b,c", nil, nil); resp.status != 200 || !bytes.Equal(resp.body, body) {
		t.Errorf("the same name: %s", resp)
	}
	// What the gate takes for a file is one to the router too, and nothing else is.
	for _, path := range []string{"/v1/rooms/ops", "/v1/rooms/ops/blobs", "/v1/rooms/ops/blobs/x/y", "/v1/rooms/ops/blobs/x/"} {
		if resp := b.upload(t, 1, b.owner, "PUT", path, body, nil); resp.status/100 != 4 {
			t.Errorf("PUT %s: %s", path, resp)
		}
	}
}

// upload asks with a body that may be a file, signed as it is or by edit as it is
// not. It may also be used without a body.
func (b *blobWorld) upload(t testing.TB, node int, p *person, method, path string, body []byte, edit func(*http.Request)) *apiResponse {
	t.Helper()
	if method != http.MethodPut {
		body = nil
	}
	resp, err := b.api(node, p).send(t.Context(), apiRequest{method: method, path: path, body: body, stream: body != nil, edit: func(r *http.Request) {
		if body != nil {
			r.Header.Set("Content-Type", "application/octet-stream")
		}
		if edit != nil {
			edit(r)
		}
	}})
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp
}

// A body that is not what was signed is not stored, and leaves nothing.
func (b *blobWorld) notWhatWasSigned(t *testing.T) {
	b.clear(t)
	data := content(t, 3*kv.BlobChunk+1)
	for name, edit := range map[string]func(r *http.Request){
		"another byte": func(r *http.Request) {
			other := bytes.Clone(data)
			other[len(other)-1] ^= 1
			setBody(r, other)
		},
		"longer":  func(r *http.Request) { setBody(r, append(bytes.Clone(data), 0)) },
		"shorter": func(r *http.Request) { setBody(r, data[:len(data)-1]) },
		"chunked": func(r *http.Request) { setBody(r, data); r.ContentLength = -1 },
		"trailers": func(r *http.Request) {
			setBody(r, data)
			r.ContentLength = -1
			r.Trailer = http.Header{"X-Checksum": {"1"}}
		},
		"another digest": func(r *http.Request) { r.Header.Set("Content-Digest", sig.DigestOf(data[1:]).Field()) },
		"encoded":        func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") },
	} {
		resp := b.upload(t, 1, b.writer, "PUT", "/v1/rooms/ops/blobs/x", data, edit)
		if resp.status != http.StatusBadRequest && resp.status != http.StatusUnauthorized {
			t.Errorf("%s: %s", name, resp)
		}
	}
	list, err := b.client(t, b.reader).Blobs(t.Context(), "ops")
	if err != nil || len(list.Blobs) > 0 {
		t.Errorf("stored all the same: %+v %v", list, err)
	}
	b.nothingStored(t)
}

func setBody(r *http.Request, data []byte) {
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(data)), int64(len(data))
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
}

// However many store at once, through whichever node, a room holds no more files
// and bytes than it may, and what was refused leaves nothing.
func (b *blobWorld) limited(t *testing.T) {
	b.clear(t)
	data := content(t, 1000)
	var mu sync.Mutex
	codes := map[bus.Code]int{}
	store := func(n int, size int64) {
		var storing sync.WaitGroup
		for i := range n {
			p := []*person{b.owner, b.writer}[i%2]
			storing.Go(func() {
				body := append(bytes.Clone(data), byte(i))
				r := b.api(i%3+1, p)
				var resp *apiResponse
				for { // at most four at once of one user
					var err error
					resp, err = r.send(t.Context(), apiRequest{method: "PUT", path: fmt.Sprintf("/v1/rooms/ops/blobs/f%d-%d", size, i), body: body})
					if err != nil {
						t.Error(err)
						return
					}
					if resp.status != http.StatusTooManyRequests && resp.status != http.StatusServiceUnavailable {
						break
					}
				}
				mu.Lock()
				codes[resp.code()]++
				mu.Unlock()
			})
		}
		storing.Wait()
	}
	store(b.limits.Count+4, 0)
	if codes[""] != b.limits.Count || codes[bus.Conflict] != 4 {
		t.Errorf("of %d files: %v", b.limits.Count+4, codes)
	}
	list, err := b.client(t, b.reader).Blobs(t.Context(), "ops")
	if err != nil || len(list.Blobs) != b.limits.Count {
		t.Errorf("%d files of %d, %v", len(list.Blobs), b.limits.Count, err)
	}
	if chunks, _ := b.stored(t, "ops"); chunks != b.limits.Count {
		t.Errorf("%d chunks of %d files", chunks, b.limits.Count)
	}
	b.clear(t)

	// What is too long is refused before it is sent, by what it says of itself.
	long := func(n int64) *apiResponse {
		return b.upload(t, 1, b.writer, "PUT", "/v1/rooms/ops/blobs/long", data, func(r *http.Request) {
			r.Body, r.GetBody, r.ContentLength = io.NopCloser(endless{}), nil, n
			r.Header.Set("Expect", "100-continue")
		})
	}
	if resp := long(b.limits.Bytes + 1); resp.status != http.StatusBadRequest {
		t.Errorf("one byte too long: %s", resp)
	}
	b.nothingStored(t)
}

// endless is a body that never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// slow is an upload whose body the test hands over as it likes.
type slow struct {
	w      *io.PipeWriter
	answer chan *apiResponse
}

func (b *blobWorld) slowly(t testing.TB, node int, p *person, name string, data []byte) slow {
	t.Helper()
	r, w := io.Pipe()
	s := slow{w: w, answer: make(chan *apiResponse, 1)}
	req, err := b.api(node, p).build(t.Context(), apiRequest{method: "PUT", path: "/v1/rooms/ops/blobs/" + name, edit: func(*http.Request) {}})
	if err != nil {
		t.Fatal(err)
	}
	nonce, err := sig.NewNonce(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := sig.SignStream(req, sig.DigestOf(data), p, time.Now(), nonce); err != nil {
		t.Fatal(err)
	}
	req.Body, req.GetBody, req.ContentLength = r, nil, int64(len(data))
	go func() {
		resp, err := b.http.Do(req)
		if err != nil {
			_ = r.CloseWithError(err)
			s.answer <- nil
			return
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		_ = r.CloseWithError(errors.New("answered"))
		s.answer <- &apiResponse{resp.StatusCode, resp.Header, body}
	}()
	return s
}

// begin hands over the first part, and waits until it is stored.
func (b *blobWorld) begin(t testing.TB, s slow, part []byte) {
	t.Helper()
	before, _ := b.stored(t, "ops")
	if _, err := s.w.Write(part); err != nil {
		t.Fatal(err)
	}
	cluster.WaitFor(t, 10*time.Second, "the first part to be stored", func() error {
		if chunks, markers := b.stored(t, "ops"); chunks < before+len(part)/kv.BlobChunk || markers == 0 {
			return fmt.Errorf("%d chunks, %d markers", chunks, markers)
		}
		return nil
	})
}

// Who loses the right in the middle of an upload has changed nothing: the change
// that took it returns when that is sure, and the rest is refused.
func (b *blobWorld) revokedInMidUpload(t *testing.T) {
	b.clear(t)
	data := content(t, 8*kv.BlobChunk)
	revoked, demoted := b.addUser("revoked"), b.addUser("demoted")
	for _, c := range []struct {
		who    *person
		take   func() (kv.Result, error)
		status int
	}{
		{revoked, func() (kv.Result, error) { return b.store.RevokeUser(t.Context(), revoked.key) }, http.StatusUnauthorized},
		{demoted, func() (kv.Result, error) { return b.store.SetMember(t.Context(), "ops", demoted.key, bus.Reader) }, http.StatusForbidden},
	} {
		b.join("ops", c.who, bus.Writer)
		up := b.slowly(t, 1, c.who, c.who.name, data)
		b.begin(t, up, data[:4*kv.BlobChunk])
		if _, err := c.take(); err != nil {
			t.Fatal(err)
		}
		_, _ = up.w.Write(data[4*kv.BlobChunk:])
		_ = up.w.Close()
		if resp := <-up.answer; resp == nil || resp.status != c.status {
			t.Errorf("%s: %v, want %d", c.who.name, resp, c.status)
		}
	}
	list, err := b.client(t, b.reader).Blobs(t.Context(), "ops")
	if err != nil || len(list.Blobs) > 0 {
		t.Errorf("stored all the same: %+v %v", list, err)
	}
	b.nothingStored(t)
}

// Who is removed in the middle of a download does not get the rest.
func (b *blobWorld) removedInMidDownload(t *testing.T) {
	b.clear(t)
	data := content(t, 20<<20)
	b.put(t, b.writer, "large", data)
	gone := b.addUser("gone")
	b.join("ops", gone, bus.Reader)
	req, err := b.api(1, gone).build(t.Context(), apiRequest{method: "GET", path: "/v1/rooms/ops/blobs/large"})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := b.http.Do(req)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%v %v", resp, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if _, err := io.CopyN(io.Discard, resp.Body, 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := b.store.RemoveMember(t.Context(), "ops", gone.key); err != nil {
		t.Fatal(err)
	}
	rest, err := io.Copy(io.Discard, resp.Body)
	t.Logf("%d KiB after the first MiB were on their way already", rest>>10)
	if !errors.Is(err, io.ErrUnexpectedEOF) || rest >= 19<<20 {
		t.Errorf("%d bytes more, %v", rest, err)
	}
}

// The commands say what they did, to people and programs, and leave no half file.
func (b *blobWorld) commandLine(t *testing.T) {
	b.clear(t)
	dir := t.TempDir()
	file, out := filepath.Join(dir, "run book.txt"), filepath.Join(dir, "out")
	data := content(t, 300_000)
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	as := func(p *person) map[string]string { return map[string]string{"UNIBUS_IDENTITY": p.seedFile(t)} }
	run := func(p *person, code int, args ...string) cluster.Result {
		t.Helper()
		r := b.CLIEnvironment(as(p), nil, args...)
		if r.Code != code {
			t.Errorf("unibusctl %v: %+v, want %d", args, r, code)
		}
		return r
	}
	var stored bus.BlobChange
	if err := json.Unmarshal([]byte(run(b.writer, 0, "room", "put", "ops", file, "--json").Stdout), &stored); err != nil || stored.Blob.SHA256 != hexOf(data) || stored.Blob.Name != "run book.txt" {
		t.Errorf("put: %+v %v", stored, err)
	}
	if r := run(b.writer, 0, "room", "put", "ops", file); !strings.Contains(r.Stdout, "already there") || r.Stderr != "" {
		t.Errorf("put again: %+v", r)
	}
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := run(b.writer, 1, "room", "put", "ops", other, "run book.txt"); !strings.Contains(r.Stderr, "--replace") {
		t.Errorf("put another: %+v", r)
	}
	run(b.reader, 1, "room", "put", "ops", other)
	run(b.stranger, 1, "room", "files", "ops")
	run(b.writer, 1, "room", "put", "ops", dir)
	run(b.writer, 2, "room", "put", "ops", file, "--direct")
	if r := run(b.reader, 0, "room", "files", "ops"); !strings.Contains(r.Stdout, "run book.txt") || !strings.Contains(r.Stdout, "293.0 KiB") {
		t.Errorf("files: %+v", r)
	}
	run(b.reader, 0, "room", "get", "ops", "run book.txt", out)
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Errorf("get: %d bytes %v", len(got), err)
	}
	run(b.reader, 1, "room", "get", "ops", "run book.txt", out)
	run(b.reader, 0, "room", "get", "ops", "run book.txt", out, "--force")
	if r := run(b.reader, 0, "room", "get", "ops", "run book.txt", "-"); r.Stdout != string(data) {
		t.Errorf("to stdout: %d bytes, %s", len(r.Stdout), r.Stderr)
	}
	run(b.reader, 1, "room", "get", "ops", "nothing", filepath.Join(dir, "nothing"))
	run(b.writer, 2, "room", "rm", "ops", "run book.txt")
	run(b.writer, 0, "room", "rm", "ops", "run book.txt", "--yes")
	if r := run(b.writer, 0, "room", "rm", "ops", "run book.txt", "--yes", "--json"); !strings.Contains(r.Stdout, `"already": true`) {
		t.Errorf("rm again: %+v", r)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 3 {
		t.Errorf("left in the directory: %v %v", left, err)
	}
}

// In an encrypted room the servers store what they cannot read, and a file that
// they have changed is noticed by who reads it.
func (b *blobWorld) encrypted(t *testing.T) {
	dir := t.TempDir()
	identity := map[*person]string{b.owner: b.owner.seedFile(t), b.reader: b.reader.seedFile(t)}
	run := func(p *person, code int, args ...string) cluster.Result {
		t.Helper()
		r := b.CLIEnvironment(map[string]string{"UNIBUS_IDENTITY": identity[p]}, nil, args...)
		if r.Code != code {
			t.Fatalf("unibusctl %v as %s: %+v, want %d", args, p.name, r, code)
		}
		return r
	}
	canary := []byte("the canary sings at midnight")
	data := bytes.Repeat(canary, 10_000)
	file, out := filepath.Join(dir, "plan"), filepath.Join(dir, "out")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	run(b.reader, 0, "user", "verify", "olga") // publishes an encryption key
	run(b.owner, 0, "room", "create", "vault", "--encrypted")
	run(b.owner, 0, "room", "rekey", "vault")
	run(b.owner, 0, "room", "add", "vault", "rita", "--role", "reader")
	run(b.owner, 0, "room", "put", "vault", file)
	run(b.reader, 0, "room", "get", "vault", "plan", out)
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes came back, %v", len(got), err)
	}
	raw := b.upload(t, 1, b.reader, "GET", "/v1/rooms/vault/blobs/plan", nil, nil)
	if raw.status != 200 || len(raw.body) <= len(data) || bytes.Contains(raw.body, canary[:12]) {
		t.Errorf("stored: %d, %d bytes of %d", raw.status, len(raw.body), len(data))
	}
	for name, c := range map[string]func() error{
		"put": func() error {
			_, err := b.client(t, b.owner).PutBlob(t.Context(), "vault", "x", bytes.NewReader(data), sdk.BlobOptions{})
			return err
		},
		"get": func() error {
			_, err := b.client(t, b.reader).GetBlob(t.Context(), "vault", "plan", io.Discard, sdk.BlobOptions{})
			return err
		},
	} {
		if err := c(); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%s without keys: %v", name, err)
		}
	}
	changed := bytes.Clone(raw.body)
	changed[len(changed)/2] ^= 1
	for name, served := range map[string][]byte{"a byte": changed, "cut off": raw.body[:len(raw.body)-100], "plain": data} {
		up, err := b.blobs(t, time.Now).Begin(t.Context(), "vault", bus.BlobInfo{Name: "plan", Size: int64(len(served)), SHA256: hexOf(served), CreatedBy: b.owner.key.NKey()})
		if err != nil {
			t.Fatal(err)
		}
		for rest := served; len(rest) > 0; {
			buf := new([kv.BlobChunk]byte)
			n := copy(buf[:], rest)
			if err := up.Write(buf, n); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if _, err := up.Commit(t.Context(), kv.Caller{}, false); err != nil {
			t.Fatal(err)
		}
		if r := run(b.reader, 1, "room", "get", "vault", "plan", out, "--force"); !strings.Contains(r.Stderr, "WARNING") {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Errorf("what was there before is now %d bytes, %v", len(got), err)
	}
}

// transferLimit is by how much the memory of a service or a client may grow with
// a file of any size.
const transferLimit = 64 << 10 // KiB

// A large file goes through membership and unibusctl without being in the memory
// of either, encrypted or not. At full numbers a node dies in the middle of the
// last download.
func (b *blobWorld) memory(t *testing.T) {
	b.clear(t)
	l := &largeFile{blobWorld: b, size: 20 << 20, dir: t.TempDir(), identity: b.writer.seedFile(t)}
	if full {
		l.size = 1 << 30
	}
	f, err := os.Create(l.file())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(f, sum), rand.Reader, l.size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	l.digest = sum.Sum(nil)
	l.idle = l.run(t, nil, "room", "files", "ops")
	l.run(t, nil, "room", "create", "strongbox", "--encrypted")
	l.run(t, nil, "room", "rekey", "strongbox")
	for _, room := range []string{"ops", "strongbox"} {
		t.Run(room, func(t *testing.T) { l.thereAndBack(t, room) })
	}
}

// largeFile is one on its way through a cluster.
type largeFile struct {
	*blobWorld
	size          int64
	digest        []byte
	dir, identity string
	idle          int64 // KiB of a unibusctl that does next to nothing
}

func (l *largeFile) file() string { return filepath.Join(l.dir, "large") }

func (l *largeFile) thereAndBack(t *testing.T, room string) {
	l.measured(t, nil, "room", "put", room, l.file())
	out := filepath.Join(l.dir, "out "+room)
	l.measured(t, nil, "room", "get", room, "large", out)
	l.same(t, out)
	if full {
		var kill sync.Once
		l.measured(t, func() {
			if l.written(t, room) > l.size/4 {
				kill.Do(func() { l.Kill(1) })
			}
		}, "room", "get", room, "large", out, "--force")
		if l.Alive(1, cluster.Membership) {
			t.Error("the download ended before its node was killed")
		}
		l.same(t, out)
		l.StartNode(1)
		l.WaitHealthy(time.Minute, 1, 2, 3)
	}
	if err := os.Remove(out); err != nil {
		t.Fatal(err)
	}
	l.run(t, nil, "room", "rm", room, "large", "--yes")
}

// written is how much of a download from a room is on the disk, beside what may be
// there of an earlier one.
func (l *largeFile) written(t *testing.T, room string) (size int64) {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && e.Name() != "large" && e.Name() != "out "+room {
			size += info.Size()
		}
	}
	return size
}

func (l *largeFile) same(t *testing.T, out string) {
	t.Helper()
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	got := sha256.New()
	if _, err := io.Copy(got, f); err != nil || !bytes.Equal(got.Sum(nil), l.digest) {
		t.Errorf("what came back is something else: %v", err)
	}
}

// measured runs unibusctl and bounds by how much it and any membership grow.
func (l *largeFile) measured(t *testing.T, meanwhile func(), args ...string) {
	t.Helper()
	before := map[int]int64{}
	for _, i := range l.Nodes() {
		before[i] = forget(t, l.PID(i, cluster.Membership))
	}
	began := time.Now()
	grew := l.run(t, meanwhile, args...) - l.idle
	took, service := time.Since(began), int64(0)
	for i, n := range before {
		if !l.Alive(i, cluster.Membership) {
			continue
		}
		after, err := memoryOf(l.PID(i, cluster.Membership), "VmHWM")
		if err != nil {
			t.Fatal(err)
		}
		service = max(service, after-n)
	}
	t.Logf("%s %s: %s, %.1f MiB/s, membership grew by %d KiB, unibusctl by %d", args[1], args[2], took.Round(10*time.Millisecond), float64(l.size)/(1<<20)/took.Seconds(), service, grew)
	if grew > transferLimit || service > transferLimit {
		t.Errorf("%v: unibusctl grew by %d KiB, membership by %d KiB", args[:3], grew, service)
	}
}

// run runs unibusctl, and meanwhile something again and again; peak is the most
// memory that it had, in KiB.
func (l *largeFile) run(t *testing.T, meanwhile func(), args ...string) (peak int64) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(l.Bin, "unibusctl"), args...)
	cmd.Env = append(os.Environ(), "UNIBUS_API_URL="+l.URLs(l.APIURL), "UNIBUS_CA="+l.CA(), "UNIBUS_IDENTITY="+l.identity)
	var text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &text, &text
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// What the kernel reports of an ended child is not less than its parent had
	// when it was started, so look while it runs.
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	look := time.NewTicker(2 * time.Millisecond)
	defer look.Stop()
	for running := true; running; {
		select {
		case err := <-ended:
			if running = false; err != nil {
				t.Fatalf("%v: %v\n%s", args, err, &text)
			}
		case <-look.C:
			if n, err := memoryOf(cmd.Process.Pid, "VmHWM"); err == nil {
				peak = n // which never falls
			}
			if meanwhile != nil {
				meanwhile()
			}
		}
	}
	return peak
}

// forget makes the peak of a process that of now, in KiB.
func forget(t testing.TB, pid int) int64 {
	t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0o600); err != nil {
		t.Fatal(err)
	}
	n, err := memoryOf(pid, "VmRSS")
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// memoryOf is what the kernel says of a process, in KiB.
func memoryOf(pid int, field string) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			return strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 10, 64)
		}
	}
	return 0, fmt.Errorf("no %s of %d", field, pid)
}

// blobs is the store as a service of the test's own has it, at another time.
func (b *blobWorld) blobs(t testing.TB, now func() time.Time) *kv.Blobs {
	t.Helper()
	s, err := kv.OpenBlobs(kv.BlobsConfig{Conn: b.bus, View: b.view, Limits: b.limits, Log: slog.New(slog.DiscardHandler), Now: now})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// What a service leaves that dies in the middle of an upload is removed when
// nobody can be at it any more, and what is listed never.
func (b *blobWorld) leftovers(t *testing.T) {
	b.clear(t)
	data := content(t, 8*kv.BlobChunk)
	kept := b.put(t, b.writer, "kept", data)
	before, _ := b.stored(t, "ops")
	up := b.slowly(t, 2, b.writer, "cut", data)
	b.begin(t, up, data[:4*kv.BlobChunk])
	b.Kill(2, cluster.Membership)
	_ = up.w.Close()
	<-up.answer
	b.StartNode(2)

	// A marker may also have outlived the commit that it was for.
	found, err := b.blobs(t, time.Now).Find(t.Context(), "ops", "kept")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.bus.Publish("$O.UNIBUS_blobs.U.ops."+found.ID, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.bus.Flush(); err != nil {
		t.Fatal(err)
	}
	later := func() time.Time { return time.Now().Add(20 * time.Minute) }
	if n, err := b.blobs(t, time.Now).Reconcile(t.Context()); n != 0 || err != nil {
		t.Errorf("at once %d are removed, %v: whose upload was that?", n, err)
	}
	if chunks, _ := b.stored(t, "ops"); chunks < before+3 {
		t.Errorf("%d chunks, of %d before: what should be left is not", chunks, before)
	}

	// An upload that sleeps longer than its marker counts is not committed.
	clock := time.Now
	sleeper := b.blobs(t, func() time.Time { return clock() })
	sleeping, err := sleeper.Begin(t.Context(), "ops", bus.BlobInfo{Name: "sleeper", Size: 1, SHA256: hexOf([]byte{0}), CreatedBy: b.writer.key.NKey()})
	if err != nil {
		t.Fatal(err)
	}
	if err := sleeping.Write(sleeper.Buffer(), 1); err != nil {
		t.Fatal(err)
	}
	if n, err := b.blobs(t, later).Reconcile(t.Context()); n != 2 || err != nil {
		t.Errorf("later %d are removed, %v, want 2", n, err)
	}
	clock = later
	if _, err := sleeping.Commit(t.Context(), kv.Caller{}, true); bus.CodeOf(err) != bus.Unavailable {
		t.Errorf("an upload that slept: %v", err)
	}
	if chunks, markers := b.stored(t, "ops"); chunks != before || markers != 0 {
		t.Errorf("%d chunks and %d markers are left, want %d and none", chunks, markers, before)
	}
	var out bytes.Buffer
	if _, err := b.client(t, b.reader).GetBlob(t.Context(), "ops", "kept", &out, sdk.BlobOptions{}); err != nil || hexOf(out.Bytes()) != kept.Blob.SHA256 {
		t.Errorf("what was kept: %v", err)
	}
	b.WaitHealthy(time.Minute, 2)
}

// A transfer whose node dies goes on at another one: a download where it was, an
// upload from the beginning. Without a quorum nothing is said of files at all.
func (b *blobWorld) killedNode(t *testing.T) {
	b.clear(t)
	size := int64(16 << 20)
	if full {
		size = 256 << 20
	}
	data := content(t, size)
	b.put(t, b.writer, "large", data)
	b.api(1, b.reader).want(t, 200, "GET", "/v1/rooms/ops/blobs", nil)
	c := b.client(t, b.reader) // asks node 1 first
	var kill sync.Once
	var out bytes.Buffer
	began := time.Now()
	back := false
	last := int64(0)
	info, err := c.GetBlob(t.Context(), "ops", "large", &out, sdk.BlobOptions{Progress: func(done, total int64) {
		back = back || done < last
		last = done
		if done > total/4 {
			kill.Do(func() { b.Kill(1) })
		}
	}})
	if err != nil || !bytes.Equal(out.Bytes(), data) || info.SHA256 != hexOf(data) || back {
		t.Errorf("download over a killed node: %d bytes of %d, begun again: %v, %v", out.Len(), size, back, err)
	}
	t.Logf("download over a killed node: %s", time.Since(began).Round(time.Millisecond))
	b.StartNode(1)
	b.WaitHealthy(time.Minute, 1, 2, 3)

	kill = sync.Once{}
	began = time.Now()
	w := b.client(t, b.writer)
	done, err := w.PutBlob(t.Context(), "ops", "again", bytes.NewReader(data[:size/4]), sdk.BlobOptions{Progress: func(done, total int64) {
		if done > total/2 {
			kill.Do(func() { b.Kill(1) })
		}
	}})
	if err != nil || done.Blob.SHA256 != hexOf(data[:size/4]) {
		t.Errorf("upload over a killed node: %+v %v", done, err)
	}
	t.Logf("upload over a killed node: %s", time.Since(began).Round(time.Millisecond))

	local := b.blobs(t, time.Now)
	b.Kill(2)
	if _, err := local.List(t.Context(), "ops"); bus.CodeOf(err) != bus.Unavailable {
		t.Errorf("list without a quorum: %v", err)
	}
	if _, err := local.Find(t.Context(), "ops", "nothing"); bus.CodeOf(err) != bus.Unavailable {
		t.Errorf("find without a quorum: %v", err)
	}
}
