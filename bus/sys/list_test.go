package sys

import (
	"slices"
	"testing"
)

// A list of many pages is read without a gap while connections come and go.
func TestListingMissesNothing(t *testing.T) {
	serve := func(have []uint64, offset int) page {
		offset = min(offset, len(have))
		p := page{server: "N", node: "n1", offset: offset}
		for _, cid := range have[offset:min(len(have), offset+pageLimit)] {
			p.rows = append(p.rows, Connection{CID: cid})
		}
		return p
	}
	var start []uint64
	for n := range 5000 {
		start = append(start, uint64(n+1))
	}
	for name, change := range map[string]func(page int, have []uint64) []uint64{
		"at rest":                  func(_ int, have []uint64) []uint64 { return have },
		"one of the first closes":  func(_ int, have []uint64) []uint64 { return have[1:] },
		"many of the first close":  func(n int, have []uint64) []uint64 { return have[min(len(have), 300/(n+1)):] },
		"all close at once":        func(int, []uint64) []uint64 { return nil },
		"all but the newest close": func(_ int, have []uint64) []uint64 { return have[max(0, len(have)-10):] },
		"new ones open":            func(n int, have []uint64) []uint64 { return append(slices.Clone(have), uint64(10000+n)) },
	} {
		t.Run(name, func(t *testing.T) {
			have, offset := start, 0
			l := &Listing{}
			for n := 0; ; n++ {
				if n > 60 {
					t.Fatal("no end")
				}
				offset = l.take(serve(have, offset))
				if l.done {
					break
				}
				have = change(n, have)
			}
			seen := map[uint64]bool{}
			last := uint64(0)
			for _, r := range l.Rows {
				if r.CID <= last {
					t.Fatalf("%d follows %d", r.CID, last)
				}
				last = r.CID
				seen[r.CID] = true
			}
			for _, cid := range have { // open all the while
				if cid <= 5000 && !seen[cid] {
					t.Fatalf("%d is missing", cid)
				}
			}
		})
	}
}
