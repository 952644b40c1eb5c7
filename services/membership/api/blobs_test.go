package api

import (
	"math"
	"net/http"
	"net/http/httptest"
	"testing"

	"unibus.internal/bus"
)

// Every header Range leads to bytes that are there, or to the whole.
func FuzzParseRange(f *testing.F) {
	for _, s := range []string{"bytes=0-", "bytes=-5", "bytes=5-9", "bytes=9-5", "bytes=18446744073709551616-", "bytes=-", "bytes=--1", "lines=1-2", "bytes=0-9223372036854775807"} {
		f.Add(s, int64(10))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		size &= math.MaxInt64
		offset, n, partial, err := parseRange(header, size)
		switch {
		case err != nil:
		case offset < 0 || n < 0 || offset > size || n > size-offset, partial && n == 0, !partial && (offset != 0 || n != size):
			t.Errorf("%q of %d: %d bytes from %d, partial %v", header, size, n, offset, partial)
		}
	})
}

// A user takes no more than their part of the transfers, and a node no more than
// it can bear.
func TestTransfersAreBounded(t *testing.T) {
	tr := transfers{of: map[bus.UserKey]int{}}
	var leave []func()
	for i := range maxTransfers {
		l, err := tr.enter(bus.UserKey{byte(i / maxTransfersOf)})
		if err != nil {
			t.Fatal(err)
		}
		leave = append(leave, l)
		if (i+1)%maxTransfersOf == 0 && i+1 < maxTransfers {
			if _, err := tr.enter(bus.UserKey{byte(i / maxTransfersOf)}); err == nil {
				t.Errorf("%d of one user", maxTransfersOf+1)
			}
		}
	}
	if _, err := tr.enter(bus.UserKey{255}); bus.CodeOf(err) != bus.Unavailable {
		t.Errorf("%d at once: %v", maxTransfers+1, err)
	}
	for _, l := range leave {
		l()
	}
	if tr.count() != 0 || len(tr.of) != 0 {
		t.Errorf("%d are left, of %d users", tr.all, len(tr.of))
	}
}

// The gate leaves a body to the route of files and to no other, whatever the
// path is spelt like: else nobody would hold it to its signature.
func TestWhoseBodyIsStreamed(t *testing.T) {
	streams := streamRoutes()
	for _, q := range []struct {
		method, path string
		want         bool
	}{
		{"PUT", "/v1/rooms/ops/blobs/x", true},
		{"PUT", "/v1/rooms/ops/blobs/a%20b", true},
		{"PUT", "/v1/rooms/ops/blobs/a%2Cb", true},
		{"GET", "/v1/rooms/ops/blobs/x", false},
		{"POST", "/v1/rooms/ops/blobs/x", false},
		{"DELETE", "/v1/rooms/ops/blobs/x", false},
		{"PUT", "/v1/rooms/ops/blobs", false},
		{"PUT", "/v1/rooms/ops/blobs/", false},
		{"PUT", "/v1/rooms/ops/blobs/x/y", false},
		{"PUT", "/v1/rooms/ops/members/alice", false},
		{"PUT", "/v1/me/encryption-key", false},
		{"put", "/v1/rooms/ops/blobs/x", false},
	} {
		r := httptest.NewRequest(http.MethodGet, q.path, nil)
		r.Method = q.method
		if got := streams(r); got != q.want {
			t.Errorf("%s %s: %v", q.method, q.path, got)
		}
	}
	n := 0
	for _, o := range operations() {
		if o.streams {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d routes take streams", n)
	}
}
