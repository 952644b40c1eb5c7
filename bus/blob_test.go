package bus

import (
	"regexp"
	"strings"
	"testing"
)

// A name is one segment of a path and one file name everywhere; the pattern that
// is documented says the same as the code.
func TestBlobNames(t *testing.T) {
	pattern := regexp.MustCompile(BlobNamePattern)
	for name, want := range map[string]bool{
		"a": true, "_": true, "runbook.pdf": true, "a b": true, "A+b=c@d,e~f-g": true, "0": true, strings.Repeat("x", 128): true, "a..b": true,
		"": false, ".": false, "..": false, ".x": false, "a.": false, "a ": false, " a": false, "-rf": false, "~x": false, "a/b": false, `a\b`: false, "a\x00": false,
		"a\n": false, "ä": false, "a*": false, "a?": false, "a:b": false, "a%2f": false, strings.Repeat("x", 129): false,
	} {
		if _, err := ParseBlobName(name); (err == nil) != want || pattern.MatchString(name) != want {
			t.Errorf("%q: %v, the pattern %v, want %v", name, err, pattern.MatchString(name), want)
		}
	}
}

func FuzzBlobName(f *testing.F) {
	pattern := regexp.MustCompile(BlobNamePattern)
	f.Add("a b.c")
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := ParseBlobName(s); (err == nil) != pattern.MatchString(s) {
			t.Errorf("%q: %v, the pattern %v", s, err, pattern.MatchString(s))
		}
	})
}

func TestBlobLimits(t *testing.T) {
	for text, want := range map[string]BlobLimits{
		"2GiB:1000": DefaultBlobLimits(), "24MiB:12": {24 << 20, 12}, "1MiB:1": {1 << 20, 1},
		"": {}, "2GiB": {}, "2GB:10": {}, "0MiB:1": {}, "1GiB:0": {}, "1GiB:1001": {}, "1GiB:1 ": {}, "-1GiB:1": {}, "01GiB:1": {}, "9999999GiB:1": {},
	} {
		got, err := ParseBlobLimits(text)
		if got != want || (err == nil) != (want != BlobLimits{}) {
			t.Errorf("%q: %+v %v", text, got, err)
		}
	}
}

// A directory that says anything twice, or in another order, is refused.
func TestBlobDirectory(t *testing.T) {
	blob := func(name BlobName) StoredBlob {
		return StoredBlob{BlobInfo{Name: name, Size: 1, SHA256: strings.Repeat("0", 64)}, strings.Repeat("a", 32)}
	}
	good := func() BlobDirectory { return BlobDirectory{1, "ops", []StoredBlob{blob("a"), blob("b")}} }
	if err := good().Validate(); err != nil {
		t.Fatal(err)
	}
	for what, edit := range map[string]func(d *BlobDirectory){
		"version": func(d *BlobDirectory) { d.V = 2 }, "room": func(d *BlobDirectory) { d.Room = "a.b" },
		"order": func(d *BlobDirectory) { d.Blobs[0].Name = "c" }, "twice": func(d *BlobDirectory) { d.Blobs[0].Name = "b" },
		"name": func(d *BlobDirectory) { d.Blobs[0].Name = "../x" }, "size": func(d *BlobDirectory) { d.Blobs[0].Size = -1 },
		"digest": func(d *BlobDirectory) { d.Blobs[0].SHA256 = "x" }, "id": func(d *BlobDirectory) { d.Blobs[0].ID = ">" },
	} {
		d := good()
		if edit(&d); d.Validate() == nil {
			t.Errorf("another %s is accepted", what)
		}
	}
}
