package kv

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"strings"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

// A copy of a room's files is a row of records:
//
//	<id>.00000000, <id>.00000001, ...   the chunks of one file
//	<id>.file                           what it is: a bus.StoredBlob
//
// Chunks without the last line are no file: it was removed while it was copied.

// FileEnd is what stands behind the id of a file in its last record.
const FileEnd = "file"

// SaveFiles hands out what a room stores, file by file, each only with its end
// if all of it has been read and is what its digest says. A file that is removed
// or replaced meanwhile has none. The memory it needs does not depend on them.
func (b *Blobs) SaveFiles(ctx context.Context, id bus.RoomID, each func(StoredRecord) error) ([]bus.StoredBlob, error) {
	d, _, err := b.directory(ctx, id)
	if err != nil {
		return nil, err
	}
	check := FileCheck{Room: id}
	for _, s := range d.Blobs {
		n := uint64(0)
		hand := func(what string, value []byte) error {
			n++
			r := StoredRecord{Key: s.ID + "." + what, Revision: n, At: s.CreatedAt, Value: value}
			if err := check.Add(r); err != nil {
				return &stopped{bus.E(bus.Internal, "file %s: %w", s.Name, err).WithHint("unibusctl room rm %s %s, or leave files out: --without-files", id, s.Name)}
			}
			if err := each(r); err != nil {
				return &stopped{err}
			}
			return nil
		}
		err := b.Read(ctx, id, s, 0, s.Size, func(p []byte) error { return hand(fmt.Sprintf("%08d", n), p) })
		if err == nil {
			var value []byte
			if value, err = json.Marshal(s); err == nil {
				err = hand(FileEnd, value)
			}
		}
		var stop *stopped
		switch {
		case errors.As(err, &stop):
			return check.Files, stop.error
		case bus.CodeOf(err) == bus.NotFound:
		case err != nil:
			return check.Files, fmt.Errorf("file %s of room %s: %w", s.Name, id, err)
		}
	}
	return check.Files, nil
}

// FileCheck reads a copy of one room's files and believes what is whole.
type FileCheck struct {
	Room  bus.RoomID
	Files []bus.StoredBlob

	id    string // whose chunks come
	next  uint64
	size  int64
	sum   hash.Hash
	names map[bus.BlobName]bool
}

// Add takes the next record. Invalid: this is no copy.
func (f *FileCheck) Add(r StoredRecord) error {
	wrong := func(why string) error {
		return bus.E(bus.Invalid, "the files of room %s are not whole at %.60q: %s", f.Room, r.Key, why)
	}
	id, what, _ := strings.Cut(r.Key, ".")
	if id != f.id || f.sum == nil {
		f.id, f.next, f.size, f.sum = id, 0, 0, sha256.New()
	}
	if what != FileEnd {
		if what != fmt.Sprintf("%08d", f.next) {
			return wrong("a piece is missing")
		}
		if len(r.Value) == 0 || len(r.Value) > BlobChunk || f.size != int64(f.next)*BlobChunk {
			return wrong("a piece has another size")
		}
		f.next++
		f.size += int64(len(r.Value))
		f.sum.Write(r.Value)
		return nil
	}
	var s bus.StoredBlob
	if err := json.Unmarshal(r.Value, &s); err != nil {
		return wrong("its description cannot be read")
	}
	one := bus.BlobDirectory{V: bus.BlobDirectoryVersion, Room: f.Room, Blobs: []bus.StoredBlob{s}}
	switch err := one.Validate(); {
	case err != nil:
		return wrong(err.Error())
	case s.ID != id || f.names[s.Name]:
		return wrong("it is described twice, or as another")
	case (s.Size != f.size || s.SHA256 != hex.EncodeToString(f.sum.Sum(nil))) && !guard.Off(guard.BackupWhole):
		return wrong("it is not what its digest says")
	}
	if f.names == nil {
		f.names = map[bus.BlobName]bool{}
	}
	f.names[s.Name] = true
	f.Files = append(f.Files, s)
	f.id, f.sum = "", nil
	return nil
}

// Stored is what a room stores now, as List, for who copies it.
func (b *Blobs) Stored(ctx context.Context, id bus.RoomID) ([]bus.StoredBlob, error) {
	d, _, err := b.directory(ctx, id)
	return d.Blobs, err
}

// BeginRestored is Begin for a file of a backup: it keeps its time. It has to be
// ended by FinishRestored or Abort.
func (b *Blobs) BeginRestored(ctx context.Context, id bus.RoomID, info bus.BlobInfo) (*Upload, error) {
	u, err := b.Begin(ctx, id, info)
	if err == nil {
		u.dated = true
	}
	return u, err
}

// FinishRestored commits it, if nothing has its name, and reads it back.
func (u *Upload) FinishRestored(ctx context.Context) error {
	if _, err := u.Commit(ctx, Caller{}, true); err != nil {
		return err
	}
	s, err := u.store.Find(ctx, u.room, u.info.Name)
	if err != nil {
		return err
	}
	sum := sha256.New()
	if err := u.store.Read(ctx, u.room, s, 0, s.Size, func(p []byte) error { sum.Write(p); return nil }); err != nil {
		return err
	}
	if hex.EncodeToString(sum.Sum(nil)) != u.info.SHA256 || s.SHA256 != u.info.SHA256 {
		return bus.E(bus.Internal, "file %s of room %s was restored and is not what the backup holds", u.info.Name, u.room).WithHint("keep the backup")
	}
	return nil
}
