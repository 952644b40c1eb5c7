package seal

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"testing"
	"testing/iotest"

	"unibus.internal/bus"
)

func encrypted(t testing.TB, e Epoch, p person, name bus.BlobName, content []byte) []byte {
	t.Helper()
	f, err := NewFile(e, p, name, rand.Reader, moment)
	must(t, err)
	out, err := io.ReadAll(f.Encrypt(bytes.NewReader(content)))
	must(t, err)
	return out
}

func opened(e Epoch, name bus.BlobName, raw []byte, piece int) ([]byte, OpenedFile, error) {
	var out bytes.Buffer
	o := NewOpener(name, &out, func(uint64) (Epoch, error) { return e, nil })
	for len(raw) > 0 {
		n := min(piece, len(raw))
		if _, err := o.Write(raw[:n]); err != nil {
			return nil, OpenedFile{}, err
		}
		raw = raw[n:]
	}
	f, err := o.Finish()
	return out.Bytes(), f, err
}

// A file of any size comes back as it was, however it is cut on the way, and
// becomes the same bytes each time it is sent.
func TestFile(t *testing.T) {
	alice, bob := someone(t, "alice"), someone(t, "bob")
	e := epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer))
	for _, size := range []int{0, 1, FileChunk - 1, FileChunk, FileChunk + 1, 2 * FileChunk, 3*FileChunk + 5} {
		content := make([]byte, size)
		_, _ = rand.Read(content)
		f, err := NewFile(e, bob, "x", rand.Reader, moment)
		must(t, err)
		raw, err := io.ReadAll(f.Encrypt(bytes.NewReader(content)))
		must(t, err)
		again, err := io.ReadAll(f.Encrypt(iotest.HalfReader(bytes.NewReader(content))))
		must(t, err)
		chunks := max(1, (size+FileChunk-1)/FileChunk)
		if want := fileHeaderSize + size + chunks*fileChunkOverhead + 64; len(raw) != want || !bytes.Equal(raw, again) {
			t.Errorf("%d bytes became %d, want %d; the same again: %v", size, len(raw), want, bytes.Equal(raw, again))
		}
		for _, piece := range []int{1000, FileChunk, len(raw)} {
			got, info, err := opened(e, "x", raw, piece)
			must(t, err)
			if !bytes.Equal(got, content) || info.Sender != bob.Key() || info.Size != int64(size) || info.SHA256 != HashOf(content) || !info.CreatedAt.Equal(moment) {
				t.Errorf("%d bytes in pieces of %d: %+v", size, piece, info)
			}
		}
	}
}

// No bit of a file can be changed, no part be left out, moved, repeated or put
// elsewhere, and nobody can store one in another's name.
func TestFileMoved(t *testing.T) {
	alice, bob, carol := someone(t, "alice"), someone(t, "bob"), someone(t, "carol")
	e1 := epoch(t, alice, nil, alice.as(bus.Owner), bob.as(bus.Writer), carol.as(bus.Reader))
	e2 := epoch(t, alice, e1.Roster, alice.as(bus.Owner), bob.as(bus.Writer))
	content := bytes.Repeat([]byte("0123456789abcdef"), 3*FileChunk/16)
	raw := encrypted(t, e1, bob, "x", content)
	refused := func(what string, e Epoch, name bus.BlobName, raw []byte) {
		t.Helper()
		if _, _, err := opened(e, name, raw, 1<<20); err == nil {
			t.Errorf("%s is accepted", what)
		}
	}
	refused("another name", e1, "y", raw)
	refused("another epoch", e2, "x", raw)
	other := Epoch{e1.Roster, keyFrom("another")}
	refused("another key", other, "x", raw)
	for _, at := range []int{0, 5, 9, 40, 41, 73, fileHeaderSize, fileHeaderSize + 24, fileHeaderSize + fileSealedChunk, len(raw) - 65, len(raw) - 1} {
		changed := bytes.Clone(raw)
		changed[at] ^= 1
		refused(fmt.Sprintf("a bit at %d", at), e1, "x", changed)
	}
	chunk := func(i int) []byte {
		return raw[fileHeaderSize+i*fileSealedChunk : fileHeaderSize+(i+1)*fileSealedChunk]
	}
	signature := raw[len(raw)-64:]
	join := func(parts ...[]byte) []byte { return bytes.Join(append([][]byte{raw[:fileHeaderSize]}, parts...), nil) }
	refused("without its last part", e1, "x", join(chunk(0), chunk(1), signature))
	refused("without its first part", e1, "x", join(chunk(1), chunk(2), signature))
	refused("parts exchanged", e1, "x", join(chunk(1), chunk(0), chunk(2), signature))
	refused("a part twice", e1, "x", join(chunk(0), chunk(0), chunk(1), chunk(2), signature))
	refused("more behind it", e1, "x", append(bytes.Clone(raw), 0))
	refused("without a signature", e1, "x", raw[:len(raw)-64])
	refused("nothing", e1, "x", nil)
	another := encrypted(t, e1, bob, "x", content)
	refused("a part of another", e1, "x", join(another[fileHeaderSize:fileHeaderSize+fileSealedChunk], chunk(1), chunk(2), signature))

	// Members all have the key, and still cannot speak for each other.
	forged, err := NewFile(e1, inTheNameOf{carol, bob.Key()}, "x", rand.Reader, moment)
	must(t, err)
	inBobsName, err := io.ReadAll(forged.Encrypt(bytes.NewReader(content)))
	must(t, err)
	_, _, err = opened(e1, "x", inBobsName, 1<<20)
	wantCode(t, err, bus.Unauthenticated, "a file in another's name")
	if _, err := NewFile(e1, carol, "x", rand.Reader, moment); bus.CodeOf(err) != bus.Forbidden {
		t.Errorf("a reader writes: %v", err)
	}
}

// What is written while it is sent is never encrypted under a nonce that was
// used for other content.
func TestFileThatChanges(t *testing.T) {
	alice := someone(t, "alice")
	e := epoch(t, alice, nil, alice.as(bus.Owner))
	f, err := NewFile(e, alice, "x", rand.Reader, moment)
	must(t, err)
	one, err := io.ReadAll(f.Encrypt(bytes.NewReader([]byte("one"))))
	must(t, err)
	two, err := io.ReadAll(f.Encrypt(bytes.NewReader([]byte("two"))))
	must(t, err)
	if bytes.Equal(one[fileHeaderSize:fileHeaderSize+24], two[fileHeaderSize:fileHeaderSize+24]) {
		t.Error("two contents under one nonce")
	}
	got, _, err := opened(e, "x", two, 1<<20)
	must(t, err)
	if string(got) != "two" {
		t.Errorf("%q", got)
	}
}

// Whatever is in a file that a server made up, opening it ends.
func FuzzFile(f *testing.F) {
	alice := someone(f, "alice")
	e := epoch(f, alice, nil, alice.as(bus.Owner))
	file, err := NewFile(e, alice, "x", bytes.NewReader(make([]byte, fileSaltSize)), moment) // each worker makes the same one
	must(f, err)
	good, err := io.ReadAll(file.Encrypt(bytes.NewReader([]byte("content"))))
	must(f, err)
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Fuzz(func(t *testing.T, raw []byte) {
		_, _, err := opened(e, "x", raw, 100)
		if (err == nil) != bytes.Equal(raw, good) {
			t.Errorf("%x: %v", raw, err)
		}
	})
}
