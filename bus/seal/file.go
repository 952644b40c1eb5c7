package seal

import (
	"bufio"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"hash"
	"io"
	"math"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/sig"
)

const (
	fileVersion    = 1
	fileSaltSize   = 32
	fileHeaderSize = 1 + 8 + 32 + fileSaltSize + 8

	// FileChunk is how much of a file is encrypted at once, in bytes.
	FileChunk         = 64 << 10
	fileChunkOverhead = chacha20poly1305.NonceSizeX + chacha20poly1305.Overhead
	fileSealedChunk   = FileChunk + fileChunkOverhead
)

// File encrypts one file for a room, as a stream and as often as it must be
// sent: the same content becomes the same bytes. It is used by one goroutine.
// The bytes:
//
//	header    = 01 | epoch, 8 bytes | sender, 32 bytes | salt, 32 random bytes |
//	            created_at, Unix milliseconds, 8 bytes
//	file      = header | chunk 0 | chunk 1 | ... | signature, 64 bytes
//	chunk i   = nonce, 24 bytes | XChaCha20-Poly1305 of the next 65,536 bytes
//
// The last chunk holds what is left: 1 to 65,536 bytes; of an empty file, none.
// With
//
//	data      = "unibus/v1/file" 00 | room, length and bytes | hash of the roster |
//	            name, with its length before it as two bytes | header
//	keys      = HKDF-Expand-SHA256(Key.Derive("file-key"), info = data, 64 bytes)
//	position  = i, 8 bytes | 01 if it is the last chunk, else 00
//
// the first 32 bytes of keys encrypt, position is the associated data, and
// nonce is the first 24 bytes of HMAC-SHA256(last 32 bytes of keys, position |
// plaintext): a file that changes while it is sent a second time gets other
// nonces, and never two contents under one. The signature is the sender's over
//
//	data | SHA-256 of all chunks
type File struct {
	room   bus.RoomID
	signer sig.Signer
	header []byte
	data   []byte
	aead   cipher.AEAD
	mac    []byte

	signed    [sha256.Size]byte // what signature is of
	signature []byte
}

// NewFile prepares to encrypt a file of that name.
func NewFile(e Epoch, s sig.Signer, name bus.BlobName, random io.Reader, now time.Time) (*File, error) {
	if m, ok := e.Roster.Member(s.Key()); !ok || !m.Role.MayPublish() {
		return nil, bus.E(bus.Forbidden, "the roster of room %s, epoch %d, does not let %s write", e.Roster.Room, e.Roster.Epoch, s.Key())
	}
	h := appendU64([]byte{fileVersion}, e.Roster.Epoch)
	key := s.Key()
	h = append(h, key[:]...)
	salt := make([]byte, fileSaltSize)
	if _, err := io.ReadFull(random, salt); err != nil {
		return nil, bus.E(bus.Internal, "no randomness for a file: %w", err)
	}
	h = appendU64(append(h, salt...), uint64(now.UnixMilli())) //nolint:gosec // after 1970
	f := &File{room: e.Roster.Room, signer: s, header: h, data: fileData(e.Roster, name, h)}
	var err error
	f.aead, f.mac, err = fileKeys(e, f.data)
	return f, err
}

func fileData(r *Roster, name bus.BlobName, header []byte) []byte {
	b := appendRoom([]byte(domainFile), r.Room)
	b = append(b, r.hash[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(min(len(name), math.MaxUint16))) //nolint:gosec // bounded right there
	return append(append(b, name...), header...)
}

func fileKeys(e Epoch, data []byte) (aead cipher.AEAD, mac []byte, err error) {
	key := e.Key.Derive("file-key", e.Roster.Room, e.Roster.Epoch)
	keys, err := hkdf.Expand(sha256.New, key[:], string(data), 64)
	if err == nil {
		aead, err = chacha20poly1305.NewX(keys[:32])
	}
	if err != nil {
		return nil, nil, bus.E(bus.Internal, "derive the keys of a file: %w", err)
	}
	return aead, keys[32:], nil
}

func filePosition(i uint64, last bool) []byte {
	p := appendU64(nil, i)
	if last {
		return append(p, 1)
	}
	return append(p, 0)
}

func fileNonce(mac, position, plain []byte) []byte {
	h := hmac.New(sha256.New, mac)
	h.Write(position)
	h.Write(plain)
	return h.Sum(nil)[:chacha20poly1305.NonceSizeX]
}

// Encrypt is the encrypted file, of content from where it stands to its end. No
// more than two chunks are in memory.
func (f *File) Encrypt(content io.Reader) io.Reader {
	return &fileReader{file: f, in: bufio.NewReaderSize(content, FileChunk), sum: sha256.New(), out: f.header}
}

type fileReader struct {
	file  *File
	in    *bufio.Reader
	sum   hash.Hash
	plain [FileChunk]byte
	out   []byte // encrypted, and not read yet
	buf   []byte
	i     uint64
	state int // chunks, signature, end
}

func (r *fileReader) Read(p []byte) (int, error) {
	for len(r.out) == 0 {
		switch r.state {
		case 0:
			if err := r.chunk(); err != nil {
				return 0, err
			}
		case 1:
			signature, err := r.file.sign([sha256.Size]byte(r.sum.Sum(nil)))
			if err != nil {
				return 0, err
			}
			r.out, r.state = signature, 2
		default:
			return 0, io.EOF
		}
	}
	n := copy(p, r.out)
	r.out = r.out[n:]
	return n, nil
}

func (r *fileReader) chunk() error {
	n, err := io.ReadFull(r.in, r.plain[:])
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err //nolint:wrapcheck // of the content, as io.Reader wants it
	}
	last := n < FileChunk
	if !last {
		if _, err := r.in.Peek(1); errors.Is(err, io.EOF) {
			last = true
		} else if err != nil {
			return err //nolint:wrapcheck // of the content, as io.Reader wants it
		}
	}
	position := filePosition(r.i, last)
	r.buf = append(r.buf[:0], fileNonce(r.file.mac, position, r.plain[:n])...)
	r.buf = r.file.aead.Seal(r.buf, r.buf[:chacha20poly1305.NonceSizeX], r.plain[:n], position)
	r.sum.Write(r.buf)
	r.out = r.buf
	r.i++
	if last {
		r.state = 1
	}
	return nil
}

func (f *File) sign(sum [sha256.Size]byte) ([]byte, error) {
	if f.signature == nil || f.signed != sum {
		signature, err := f.signer.Sign(append(f.data[:len(f.data):len(f.data)], sum[:]...))
		if err != nil || len(signature) != ed25519.SignatureSize {
			return nil, bus.E(bus.Internal, "sign a file: %w", err)
		}
		f.signed, f.signature = sum, signature
	}
	return f.signature, nil
}

// OpenedFile is what is proven of a file that was decrypted to its end.
type OpenedFile struct {
	Epoch     uint64
	Sender    bus.UserKey
	CreatedAt time.Time // by the sender's clock
	Size      int64     // of what was in it
	SHA256    Hash      // of what was in it
}

// Opener decrypts a file that is written to it. What it hands on is not to be
// used before Finish has said that all of it is there and whose it is: until
// then, another member might have written it in the sender's name.
type Opener struct {
	w     io.Writer
	name  bus.BlobName
	epoch func(epoch uint64) (Epoch, error)

	buf    []byte // not decrypted yet
	opened bool   // the header is read
	file   OpenedFile
	data   []byte
	aead   cipher.AEAD
	mac    []byte
	i      uint64
	chunks hash.Hash
	plain  hash.Hash
	out    []byte
}

// NewOpener writes what is in the file of that name to w. epoch is asked once for
// the roster and key of the epoch that the file says it is of.
func NewOpener(name bus.BlobName, w io.Writer, epoch func(uint64) (Epoch, error)) *Opener {
	return &Opener{w: w, name: name, epoch: epoch, chunks: sha256.New(), plain: sha256.New()}
}

func (o *Opener) Write(p []byte) (int, error) {
	o.buf = append(o.buf, p...)
	if !o.opened {
		if len(o.buf) < fileHeaderSize {
			return len(p), nil
		}
		if err := o.begin(); err != nil {
			return 0, err
		}
	}
	done := 0
	for len(o.buf)-done > fileSealedChunk+ed25519.SignatureSize { // something follows it, so it is not the last
		if err := o.chunk(o.buf[done:done+fileSealedChunk], false); err != nil {
			return 0, err
		}
		done += fileSealedChunk
	}
	o.buf = append(o.buf[:0], o.buf[done:]...)
	return len(p), nil
}

func (o *Opener) begin() error {
	header := append([]byte(nil), o.buf[:fileHeaderSize]...)
	o.buf = append(o.buf[:0], o.buf[fileHeaderSize:]...)
	p := &reader{rest: header}
	version := p.u8()
	o.file.Epoch, o.file.Sender = p.u64(), p.user()
	p.take(fileSaltSize)
	millis := p.u64()
	if version != fileVersion || millis > 1<<53 || bus.CheckUserKey(o.file.Sender) != nil {
		return bus.E(bus.Forbidden, "this is no encrypted file")
	}
	o.file.CreatedAt = time.UnixMilli(int64(millis)).UTC()
	e, err := o.epoch(o.file.Epoch)
	if err != nil {
		return err
	}
	r := e.Roster
	if r.Epoch != o.file.Epoch {
		return bus.E(bus.Invalid, "the file is of epoch %d, not %d", o.file.Epoch, r.Epoch)
	}
	if m, ok := r.Member(o.file.Sender); !ok || !m.Role.MayPublish() {
		return bus.E(bus.Forbidden, "the roster of room %s, epoch %d, does not let %s write", r.Room, r.Epoch, o.file.Sender)
	}
	o.data = fileData(r, o.name, header)
	o.aead, o.mac, err = fileKeys(e, o.data)
	o.opened = true
	return err
}

func (o *Opener) chunk(sealed []byte, last bool) error {
	position := filePosition(o.i, last)
	nonce := sealed[:chacha20poly1305.NonceSizeX]
	plain, err := o.aead.Open(o.out[:0], nonce, sealed[chacha20poly1305.NonceSizeX:], position)
	if err != nil || subtle.ConstantTimeCompare(nonce, fileNonce(o.mac, position, plain)) != 1 {
		return o.broken("a part of it does not open")
	}
	if len(plain) == 0 && o.i > 0 {
		return o.broken("it is spelt in another way")
	}
	o.chunks.Write(sealed)
	o.plain.Write(plain)
	o.file.Size += int64(len(plain))
	o.out = plain
	o.i++
	if _, err := o.w.Write(plain); err != nil {
		return bus.E(bus.Invalid, "what was decrypted cannot be written: %w", err)
	}
	return nil
}

// broken is what was not stored there and so, or was changed.
func (o *Opener) broken(why string) error {
	return bus.E(bus.Unauthenticated, "file %s was not stored here and so by %s, or was changed: %s", o.name, o.file.Sender, why)
}

// Finish decrypts the end, and proves that the sender stored all of it as the
// file of that name in this room, as somebody who may.
func (o *Opener) Finish() (OpenedFile, error) {
	end := len(o.buf) - ed25519.SignatureSize
	if !o.opened || end < fileChunkOverhead {
		return OpenedFile{}, bus.E(bus.Forbidden, "this is no encrypted file, or its end is missing")
	}
	if err := o.chunk(o.buf[:end], true); err != nil {
		return OpenedFile{}, err
	}
	signed := o.chunks.Sum(o.data[:len(o.data):len(o.data)])
	if !ed25519.Verify(o.file.Sender[:], signed, o.buf[end:]) && !guard.Off(guard.MessageSender) {
		return OpenedFile{}, o.broken("its signature is another's")
	}
	copy(o.file.SHA256[:], o.plain.Sum(nil))
	return o.file, nil
}
