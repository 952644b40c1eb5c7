package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"filippo.io/age"
	"github.com/google/renameio/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
)

// This file is the format of docs/backup.md. A backup is a plain head, an age
// file, and a signature over both:
//
//	unibus-backup 1\n
//	{"created_at":"...","signer":"U..."}\n
//	age-encryption.org/v1 ... (binary)
//	\n<86 characters of unpadded base64url>\n
//
// Signed is what lies on a disk, so that whoever keeps backups can check them
// without being able to read them, and nothing is decrypted before it has been
// checked. What is encrypted is a line of JSON per record, in named parts.

const (
	backupMagic  = "unibus-backup 1\n"
	backupDomain = "unibus/v1/backup\x00" // no nonce, request or roster begins like this
	backupTail   = 1 + 86 + 1
	backupBlock  = 1 << 20
	// mostLine bounds one record: 64 KiB of a bucket, 1 MiB of a room, as base64.
	mostLine = 4 << 20
	// mostSnapshot bounds what a restore holds in memory: the sum of the
	// buckets' MaxBytes is less.
	mostSnapshot = 1 << 30
)

type backupHead struct {
	CreatedAt time.Time `json:"created_at"`
	Signer    string    `json:"signer"`
}

// backupLine is one line of what is encrypted.
type backupLine struct {
	Snapshot int        `json:"unibus_snapshot,omitempty"` // first line: 1
	Program  string     `json:"program,omitempty"`
	Part     string     `json:"part,omitempty"` // begins a part
	Stream   string     `json:"stream,omitempty"`
	Key      string     `json:"key,omitempty"` // a record
	Revision uint64     `json:"rev,omitempty"`
	Data     []byte     `json:"data,omitempty"`
	Deleted  bool       `json:"deleted,omitempty"`
	At       *time.Time `json:"at,omitempty"`  // of the snapshot, of the stream, of the record
	End      string     `json:"end,omitempty"` // ends a part, or the snapshot
	Count    *int       `json:"count,omitempty"`

	Header   nats.Header `json:"headers,omitempty"`   // of a message
	FirstSeq uint64      `json:"first_seq,omitempty"` // of a room's stream, at its end
	LastSeq  uint64      `json:"last_seq,omitempty"`
}

// backupSource is a part that is written while it is read: the seam for what
// does not fit into memory.
type backupSource struct {
	name, stream string
	created      time.Time
	each         func(emit func(kv.StoredRecord) error) (kv.Extent, error) // an Extent of a room's stream only
}

func sourcesOf(s *kv.Snapshot) []backupSource {
	out := make([]backupSource, len(s.Parts))
	for i, p := range s.Parts {
		out[i] = backupSource{p.Name, p.Stream, p.Created, func(emit func(kv.StoredRecord) error) (kv.Extent, error) {
			for _, r := range p.Records {
				if err := emit(r); err != nil {
					return kv.Extent{}, err
				}
			}
			return kv.Extent{}, nil
		}}
	}
	return out
}

// writeLines writes what is encrypted, and counts each part's records.
func writeLines(w io.Writer, at time.Time, sources []backupSource) ([]partCount, error) {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	if err := e.Encode(backupLine{Snapshot: 1, Program: programName, At: &at}); err != nil {
		return nil, err
	}
	counts := []partCount{}
	for _, s := range sources {
		created := s.created.UTC()
		if err := e.Encode(backupLine{Part: s.name, Stream: s.stream, At: &created}); err != nil {
			return nil, err
		}
		n := 0
		extent, err := s.each(func(r kv.StoredRecord) error {
			n++
			stored := r.At.UTC()
			return e.Encode(backupLine{Key: r.Key, Revision: r.Revision, At: &stored, Data: r.Value, Deleted: r.Value == nil, Header: r.Header})
		})
		if err == nil {
			err = e.Encode(backupLine{End: s.name, Count: &n, FirstSeq: extent.FirstSeq, LastSeq: extent.LastSeq})
		}
		if err != nil {
			return nil, err
		}
		counts = append(counts, partCount{s.name, n})
	}
	total := len(sources)
	return counts, e.Encode(backupLine{End: "snapshot", Count: &total})
}

type partCount struct {
	Part    string `json:"part"`
	Records int    `json:"records"`
}

// backupSigner is the key that vouches for a backup, read for the one signature.
type backupSigner interface {
	PublicKey() (string, error)
	Sign([]byte) ([]byte, error)
}

// writeBackup writes a whole file of the format.
func writeBackup(w io.Writer, at time.Time, sources []backupSource, recipients []age.Recipient, signer backupSigner) ([]partCount, error) {
	pub, err := signer.PublicKey()
	if err != nil {
		return nil, err
	}
	hash := sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(w, hash), 64<<10)
	head, err := json.Marshal(backupHead{at, pub})
	if err != nil {
		return nil, err
	}
	if _, err := out.WriteString(backupMagic + string(head) + "\n"); err != nil {
		return nil, err
	}
	sealed, err := age.Encrypt(out, recipients...)
	if err != nil {
		return nil, bus.E(bus.Invalid, "these recipients cannot be used: %w", err)
	}
	counts, err := writeLines(sealed, at, sources)
	if err == nil {
		err = sealed.Close()
	}
	if err == nil {
		err = out.Flush()
	}
	if err != nil {
		return nil, err
	}
	sig, err := signer.Sign(hash.Sum([]byte(backupDomain)))
	if err != nil {
		return nil, fmt.Errorf("sign the backup: %w", err)
	}
	_, err = fmt.Fprintf(w, "\n%s\n", base64.RawURLEncoding.EncodeToString(sig))
	return counts, err
}

// saveBackup writes a backup beside its place, reads it back, and only then
// gives it its name: a full disk, a crash or a second run leaves no half of one
// and replaces none.
func saveBackup(path string, at time.Time, sources []backupSource, recipients []age.Recipient, signer backupSigner) ([]partCount, *backupFile, error) {
	dir := filepath.Dir(path)
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(0o600))
	if err != nil {
		return nil, nil, fmt.Errorf("write %s: %w", path, err)
	}
	defer f.Cleanup() //nolint:errcheck // nothing is left to clean after a success
	counts, err := writeBackup(f, at, sources, recipients, signer)
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("write %s: %w", path, err)
	}
	pub, err := signer.PublicKey()
	if err != nil {
		return nil, nil, err
	}
	written, err := openBackup(f.Name(), pub)
	if err != nil {
		return nil, nil, fmt.Errorf("what was written to %s cannot be read back: %w", dir, err)
	}
	defer written.Close()
	return counts, written, nameFile(f.Name(), path)
}

// nameFile gives a finished file its name, if nothing has it.
func nameFile(finished, path string) error {
	switch err := os.Link(finished, path); {
	case errors.Is(err, fs.ErrExist):
		return bus.E(bus.Conflict, "%s exists already, and is not overwritten", path).WithHint("another name")
	case err != nil:
		return fmt.Errorf("write %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes a new name in a directory survive a power cut.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// backupFile is a backup whose signature has been verified. What is read from it
// later is held to what was verified, block by block: the file may have been
// changed in between.
type backupFile struct {
	backupHead
	Size   int64
	Digest string // SHA-256 of the file, hex

	f          *os.File
	begin, end int64 // of the age file
	blocks     [][sha256.Size]byte
}

func (b *backupFile) Close() { _ = b.f.Close() }

// openBackup reads a whole file and believes it if signer, a public nkey, has
// signed every byte of it.
func openBackup(path, signer string) (*backupFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the backup: %w", err)
	}
	b := &backupFile{f: f}
	if err := b.verify(signer); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

func (b *backupFile) verify(signer string) error {
	refuse := func(why string) error {
		return bus.E(bus.Invalid, "%s is refused: %s", b.f.Name(), why).WithHint("use another backup; nothing was taken from this one")
	}
	info, err := b.f.Stat()
	if err != nil {
		return err
	}
	b.Size = info.Size()
	if b.end = b.Size - backupTail; !info.Mode().IsRegular() || b.end < int64(len(backupMagic)) {
		return refuse("it is cut off, or no backup")
	}
	head := bufio.NewReaderSize(io.NewSectionReader(b.f, 0, b.end), 4<<10)
	magic, err := head.ReadSlice('\n')
	if err != nil || string(magic) != backupMagic {
		return refuse("it is no backup of this version")
	}
	line, err := head.ReadSlice('\n')
	if err != nil || json.Unmarshal(line, &b.backupHead) != nil {
		return refuse("its head cannot be read")
	}
	b.begin = int64(len(backupMagic) + len(line))
	tail := make([]byte, backupTail)
	if _, err := b.f.ReadAt(tail, b.end); err != nil {
		return fmt.Errorf("read the backup: %w", err)
	}
	sig, err := base64.RawURLEncoding.Strict().DecodeString(string(tail[1 : backupTail-1]))
	if err != nil || tail[0] != '\n' || tail[backupTail-1] != '\n' {
		return refuse("it is cut off: there is no signature at its end")
	}
	if b.Signer != signer && !guard.Off(guard.BackupSignature) {
		return refuse("it is signed by " + quote(b.Signer) + ", not by " + signer)
	}
	whole, signed := sha256.New(), sha256.New()
	block := make([]byte, backupBlock)
	for at := int64(0); at < b.end; at += backupBlock {
		part := block[:min(backupBlock, b.end-at)]
		if _, err := b.f.ReadAt(part, at); err != nil {
			return fmt.Errorf("read the backup: %w", err)
		}
		signed.Write(part)
		whole.Write(part)
		b.blocks = append(b.blocks, sha256.Sum256(part))
	}
	whole.Write(tail)
	b.Digest = hex.EncodeToString(whole.Sum(nil))
	key, err := nkeys.FromPublicKey(signer)
	if err != nil || !nkeys.IsValidPublicUserKey(signer) {
		return bus.E(bus.Invalid, "%s is no public key of a signer (U...)", quote(signer))
	}
	if key.Verify(signed.Sum([]byte(backupDomain)), sig) != nil && !guard.Off(guard.BackupSignature) {
		return refuse("its signature is wrong: it was changed, or is cut off")
	}
	return nil
}

// ReadAt implements io.ReaderAt over the signed bytes, each block of which must
// still be what was verified.
func (b *backupFile) ReadAt(p []byte, off int64) (n int, err error) {
	block := make([]byte, backupBlock)
	for n < len(p) && off < b.end {
		i := off / backupBlock
		part := block[:min(backupBlock, b.end-i*backupBlock)]
		if _, err := b.f.ReadAt(part, i*backupBlock); err != nil {
			return n, err
		}
		if sha256.Sum256(part) != b.blocks[i] {
			return n, bus.E(bus.Invalid, "%s was changed while it was read", b.f.Name())
		}
		c := copy(p[n:], part[off-i*backupBlock:])
		n, off = n+c, off+int64(c)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// lines decrypts.
func (b *backupFile) lines(identities []age.Identity) (io.Reader, error) {
	held := bufio.NewReaderSize(io.NewSectionReader(b, b.begin, b.end-b.begin), backupBlock)
	r, err := age.Decrypt(held, identities...)
	var none *age.NoIdentityMatchError
	switch {
	case errors.As(err, &none):
		return nil, bus.E(bus.Invalid, "%s is not encrypted to this key", b.f.Name()).WithHint("--age-identity FILE of one of its recipients")
	case err != nil:
		return nil, bus.E(bus.Invalid, "%s cannot be decrypted: %w", b.f.Name(), err)
	}
	return r, nil
}

// backupInside is what a backup holds: the records, and what there is of rooms.
type backupInside struct {
	snap   *kv.Snapshot
	counts []partCount
	rooms  []*roomContents
}

// inside decrypts and reads the parts that a restore knows; what rooms held is
// looked at and not kept. The parts of another version of unibus are counted, and
// left alone.
func (b *backupFile) inside(identities []age.Identity) (*backupInside, error) {
	r, err := b.lines(identities)
	if err != nil {
		return nil, err
	}
	in, err := readLines(r)
	if err != nil {
		return nil, bus.E(bus.Invalid, "%s is refused: %w", b.f.Name(), err)
	}
	return in, nil
}

// readLines is the reverse of writeLines, for what a restore knows. A snapshot
// that does not end is none.
func readLines(r io.Reader) (*backupInside, error) {
	known := map[string]bool{
		kv.PartUsers: true, kv.PartRooms: true, kv.PartMembers: true, kv.PartHandles: true, kv.PartRoomKeys: true, kv.PartAudit: true,
	}
	in, size := &backupInside{snap: &kv.Snapshot{}}, 0
	contents := contentsCheck{byRoom: map[bus.RoomID]*roomContents{}}
	at, counts, err := scanLines(r, lineHandler{
		begin: func(p kv.Part) error {
			if known[p.Name] {
				p.Records = []kv.StoredRecord{}
				in.snap.Parts = append(in.snap.Parts, p)
				return nil
			}
			return contents.begin(p.Name)
		},
		each: func(part string, r kv.StoredRecord) error {
			if !known[part] {
				return contents.each(r)
			}
			if size += len(r.Key) + len(r.Value); size > mostSnapshot {
				return fmt.Errorf("its records are more than %d MiB", mostSnapshot>>20)
			}
			p := &in.snap.Parts[len(in.snap.Parts)-1]
			p.Records = append(p.Records, r)
			return nil
		},
		end: func(part string, e kv.Extent) error {
			if known[part] {
				return nil
			}
			return contents.end(e)
		},
	})
	in.snap.At, in.counts, in.rooms = at, counts, contents.rooms()
	return in, err
}

// lineHandler is told what scanLines reads; begin and end may be nil.
type lineHandler struct {
	begin func(kv.Part) error
	each  func(part string, r kv.StoredRecord) error
	end   func(part string, e kv.Extent) error // its Messages are the part's records
}

// scanLines hands out parts and records as they come. Only without an error was
// what it handed out the whole of it.
func scanLines(r io.Reader, h lineHandler) (taken time.Time, counts []partCount, err error) {
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 64<<10), mostLine)
	counts = []partCount{}
	open, count, ended := "", 0, false
	for n := 1; in.Scan(); n++ {
		if in.Err() != nil { // this line is what there was before the fault
			break
		}
		var l backupLine
		d := json.NewDecoder(bytes.NewReader(in.Bytes()))
		if err := d.Decode(&l); err != nil || d.More() {
			return taken, nil, fmt.Errorf("line %d cannot be read", n)
		}
		at := time.Time{}
		if l.At != nil {
			at = *l.At
		}
		switch {
		case ended:
			return taken, nil, fmt.Errorf("line %d comes after the end", n)
		case n == 1 && l.Snapshot == 1:
			taken = at
		case n == 1:
			return taken, nil, fmt.Errorf("version %d of the snapshot is unknown", l.Snapshot)
		case l.Part != "" && open == "":
			open, count = l.Part, 0
			if h.begin != nil {
				err = h.begin(kv.Part{Name: l.Part, Stream: l.Stream, Created: at})
			}
		case l.Key != "" && open != "":
			count++
			switch {
			case l.Deleted:
				l.Data = nil
			case l.Data == nil:
				l.Data = []byte{}
			}
			err = h.each(open, kv.StoredRecord{Key: l.Key, Revision: l.Revision, At: at, Value: l.Data, Header: l.Header})
		case l.End != "" && l.Count != nil && open != "" && l.End == open && *l.Count == count:
			counts = append(counts, partCount{open, count})
			if h.end != nil {
				err = h.end(open, kv.Extent{Messages: uint64(count), FirstSeq: l.FirstSeq, LastSeq: l.LastSeq})
			}
			open = ""
		case l.End == "snapshot" && l.Count != nil && open == "" && *l.Count == len(counts):
			ended = true
		default:
			return taken, nil, fmt.Errorf("line %d does not belong there", n)
		}
		if err != nil {
			return taken, nil, err
		}
	}
	switch {
	case in.Err() != nil:
		return taken, nil, in.Err()
	case !ended:
		return taken, nil, errors.New("it is cut off")
	}
	return taken, counts, nil
}
