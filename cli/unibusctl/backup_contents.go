package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"filippo.io/age"
	"github.com/nats-io/nats.go"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// This file is about what rooms hold: messages of durable ones, and files. A
// backup has a part for each, room:<room> and files:<room>, which is read from
// the cluster while it is written and the other way round, and is never in
// memory.

const (
	roomPart  = "room:"
	filesPart = "files:"
)

// roomContents is what a backup holds of one room, and what a restore does with
// it.
type roomContents struct {
	Room     bus.RoomID `json:"room"`
	Messages uint64     `json:"messages"`
	FirstSeq uint64     `json:"first_seq"` // of the oldest message; one more than LastSeq if there is none
	LastSeq  uint64     `json:"last_seq"`  // 0: there was never one, or they are in no backup
	Files    int        `json:"files"`
	Bytes    int64      `json:"file_bytes"`

	stored []bus.StoredBlob
}

func (r *roomContents) extent() kv.Extent {
	return kv.Extent{Messages: r.Messages, FirstSeq: r.FirstSeq, LastSeq: r.LastSeq}
}

func (r *roomContents) take(files []bus.StoredBlob) {
	r.stored, r.Files, r.Bytes = files, len(files), 0
	for _, s := range files {
		r.Bytes += s.Size
	}
}

// contentsCheck looks at what rooms hold, part by part.
type contentsCheck struct {
	byRoom map[bus.RoomID]*roomContents
	parts  map[string]bool

	room  *roomContents // whose messages come, or
	last  uint64
	files *kv.FileCheck // whose files
}

func (c *contentsCheck) of(id bus.RoomID) *roomContents {
	if c.byRoom[id] == nil {
		c.byRoom[id] = &roomContents{Room: id}
	}
	return c.byRoom[id]
}

// begin returns without a word for the parts of another version.
func (c *contentsCheck) begin(part string) error {
	c.room, c.files = nil, nil
	name, files := strings.CutPrefix(part, filesPart)
	name, messages := strings.CutPrefix(name, roomPart)
	if files == messages {
		return nil
	}
	id, err := bus.ParseRoomID(name)
	if err != nil {
		return err
	}
	if c.parts[part] {
		return fmt.Errorf("it has the part %s twice", part)
	}
	if c.parts == nil {
		c.parts = map[string]bool{}
	}
	c.parts[part] = true
	if files {
		c.files = &kv.FileCheck{Room: id}
		return nil
	}
	c.room, c.last = c.of(id), 0
	return nil
}

func (c *contentsCheck) each(r kv.StoredRecord) error {
	switch {
	case c.files != nil:
		return c.files.Add(r)
	case c.room == nil:
		return nil
	}
	if err := kv.CheckRoomMessage(c.room.Room, r, c.last); err != nil {
		return err
	}
	if c.last == 0 {
		c.room.FirstSeq = r.Revision
	}
	c.last = r.Revision
	return nil
}

func (c *contentsCheck) end(e kv.Extent) error {
	switch {
	case c.files != nil:
		c.of(c.files.Room).take(c.files.Files)
	case c.room != nil:
		if e.Messages > 0 && (c.room.FirstSeq != e.FirstSeq || c.last > e.LastSeq) || e.Messages == 0 && e.LastSeq > 0 && e.FirstSeq != e.LastSeq+1 {
			return fmt.Errorf("the messages of room %s are not those from %d to %d", c.room.Room, e.FirstSeq, e.LastSeq)
		}
		c.room.Messages, c.room.FirstSeq, c.room.LastSeq = e.Messages, e.FirstSeq, e.LastSeq
	}
	c.room, c.files = nil, nil
	return nil
}

func (c *contentsCheck) rooms() []*roomContents {
	out := []*roomContents{}
	for _, r := range c.byRoom {
		if r.LastSeq > 0 || r.Files > 0 {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b *roomContents) int { return cmp.Compare(a.Room, b.Room) })
	return out
}

// isContents says whether a part is one that a restore of rooms knows.
func isContents(part string) bool {
	return strings.HasPrefix(part, roomPart) || strings.HasPrefix(part, filesPart)
}

// contentFlags are those of backup create, restore and drill.
func contentFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "without-messages", Usage: "leave out what durable rooms hold"},
		&cli.BoolFlag{Name: "without-files", Usage: "leave out the files of rooms"},
	}
}

func busSeedFlag() cli.Flag {
	return &cli.StringFlag{Name: "bus-seed", TakesFile: true, EnvVars: []string{"UNIBUS_BUS_SEED"}, Usage: "`FILE` with the seed of membership-bus; default: beside the other seed"}
}

// contentsWanted are which of them a command is about.
type contentsWanted struct{ messages, files bool }

func wantedContents(c *cli.Context) contentsWanted {
	return contentsWanted{messages: !c.Bool("without-messages"), files: !c.Bool("without-files")}
}

func (w contentsWanted) any() bool { return w.messages || w.files }

// busSeed is the file with the key by which account BUS is reached: that of
// membership, which stores what rooms hold.
func busSeed(c *cli.Context, beside string) (string, error) {
	if file := c.String("bus-seed"); file != "" {
		return file, nil
	}
	file := filepath.Join(filepath.Dir(beside), "membership-bus.nk")
	switch _, err := os.Stat(file); {
	case errors.Is(err, fs.ErrNotExist):
		return "", &usageError{
			msg:  "messages and files of rooms need the key membership-bus.nk, which is not beside " + beside + ": --bus-seed FILE",
			hint: "leave them out: --without-messages --without-files",
		}
	case err != nil:
		return "", err
	}
	return file, nil
}

// busLink is a connection to account BUS and the files of rooms behind it.
type busLink struct {
	nc    *nats.Conn
	blobs *kv.Blobs
}

func (a *app) openBus(ctx context.Context, seed string, view *kv.View) (*busLink, error) {
	nc, err := a.dialWith(ctx, seed, "_INBOX_membership")
	if err != nil {
		return nil, err
	}
	return newBusLink(nc, view)
}

func newBusLink(nc *nats.Conn, view *kv.View) (*busLink, error) {
	// The limits of rooms are the services' to say; what was within them comes back.
	limits := bus.BlobLimits{Bytes: 1 << 50, Count: bus.MaxBlobCount}
	blobs, err := kv.OpenBlobs(kv.BlobsConfig{Conn: nc, View: view, Limits: limits, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		nc.Close()
		return nil, err
	}
	return &busLink{nc, blobs}, nil
}

func (l *busLink) Close() {
	if l != nil {
		l.nc.Close()
	}
}

// contentSources are the parts of what rooms hold, behind the cut: a durable room
// up to its newest message when its part begins, a file if it is whole. What
// cannot be read fails the backup and is named.
func contentSources(ctx context.Context, snap *kv.Snapshot, view *kv.View, l *busLink, want contentsWanted) ([]backupSource, func() []*roomContents, error) {
	seen := contentsCheck{byRoom: map[bus.RoomID]*roomContents{}}
	var messages, files []backupSource
	for _, room := range snap.Kept() {
		if want.messages && room.Durable {
			messages = append(messages, backupSource{name: roomPart + string(room.ID), stream: bus.RoomStream(room.ID), created: room.CreatedAt, each: func(emit func(kv.StoredRecord) error) (kv.Extent, error) {
				last := uint64(0)
				extent, err := kv.ReadRoom(ctx, l.nc, room.ID, func(m kv.StoredRecord) error {
					// What could not be restored is found out now.
					if err := kv.CheckRoomMessage(room.ID, m, last); err != nil {
						return err
					}
					last = m.Revision
					return emit(m)
				})
				if now, _, _ := view.Room(room.ID); bus.CodeOf(err) == bus.NotFound && now.Purged {
					return kv.Extent{}, nil
				}
				if err != nil {
					return extent, withoutHint(err, "--without-messages")
				}
				c := seen.of(room.ID)
				c.Messages, c.FirstSeq, c.LastSeq = extent.Messages, extent.FirstSeq, extent.LastSeq
				return extent, nil
			}})
		}
		if !want.files {
			continue
		}
		stored, err := l.blobs.Stored(ctx, room.ID)
		if err != nil {
			return nil, nil, withoutHint(fmt.Errorf("the files of room %s cannot be read: %w", room.ID, err), "--without-files")
		}
		if len(stored) == 0 {
			continue
		}
		files = append(files, backupSource{name: filesPart + string(room.ID), stream: kv.BlobStream, created: room.CreatedAt, each: func(emit func(kv.StoredRecord) error) (kv.Extent, error) {
			saved, err := l.blobs.SaveFiles(ctx, room.ID, emit)
			if err != nil {
				return kv.Extent{}, withoutHint(err, "--without-files")
			}
			seen.of(room.ID).take(saved)
			return kv.Extent{}, nil
		}})
	}
	return append(messages, files...), seen.rooms, nil
}

// withoutHint names the way to a backup all the same.
func withoutHint(err error, flag string) error {
	code := bus.CodeOf(err)
	if code == bus.NotFound { // that a stream is missing says nothing about the command's own object
		code = bus.Internal
	}
	return bus.E(code, "%w", err).WithHint("mend it; or leave it out, and know that: %s", flag)
}

// What a restore does with messages or files of a room.
const (
	contentsWrite = "write"
	contentsSame  = "same"
	contentsSkip  = "skip"
)

// contentsReport is what a restore did, or would do, with what one room held.
type contentsReport struct {
	Room     bus.RoomID `json:"room"`
	What     string     `json:"what"` // messages or files
	Count    uint64     `json:"count"`
	LastSeq  uint64     `json:"last_seq,omitempty"`
	Bytes    int64      `json:"bytes,omitempty"`
	Done     string     `json:"done"` // write, same or skip
	Why      string     `json:"why,omitempty"`
	Verified bool       `json:"verified"` // written and read back, or there already

	room  bus.Room
	again bool // an interrupted restore has left a part of it
	files map[string]bus.StoredBlob
}

// contentsRestore brings back what rooms held, before their records: nobody
// knows the rooms yet, so nothing of it can be read, and no recorder listens.
type contentsRestore struct {
	d      *direct
	link   *busLink
	file   *backupFile
	keys   []age.Identity
	in     *backupInside
	merge  bool
	report []*contentsReport
}

// part names the part of the backup that it is about.
func (r *contentsReport) part() string {
	if r.What == "files" {
		return filesPart + string(r.Room)
	}
	return roomPart + string(r.Room)
}

func (r *contentsRestore) scan(h lineHandler) error {
	lines, err := r.file.lines(r.keys)
	if err != nil {
		return err
	}
	_, _, err = scanLines(lines, h)
	return err
}

// plan decides for each room, and writes nothing. Conflict: something is here
// that the backup does not have, and this is no merge.
func (r *contentsRestore) plan(ctx context.Context, want contentsWanted) error {
	type here struct {
		extent kv.Extent
		known  bool
		digest string
		now    kv.RoomDigest
		of     *contentsReport
	}
	there := map[string]*here{}
	for _, c := range r.in.rooms {
		room, known, why := r.d.slow.Restorable(r.in.snap, c.Room)
		if c.LastSeq > 0 && want.messages {
			p := &contentsReport{Room: c.Room, What: "messages", Count: c.Messages, LastSeq: c.LastSeq, Done: contentsWrite, room: room}
			r.report = append(r.report, p)
			if why != "" {
				p.Done, p.Why = contentsSkip, why
				continue
			}
			digest := kv.NewRoomDigest()
			extent, err := kv.ReadRoom(ctx, r.link.nc, c.Room, func(m kv.StoredRecord) error {
				if m.Revision <= c.LastSeq {
					digest.Add(m)
				}
				return nil
			})
			switch {
			case err == nil:
				there[p.part()] = &here{extent, known, digest.Sum(), kv.NewRoomDigest(), p}
			case bus.CodeOf(err) != bus.NotFound:
				return err
			}
		}
		if c.Files > 0 && want.files {
			if err := r.planFiles(ctx, c, room, why); err != nil {
				return err
			}
		}
	}
	if len(there) > 0 {
		err := r.scan(lineHandler{
			each: func(part string, m kv.StoredRecord) error {
				if h := there[part]; h != nil && m.Revision >= h.extent.FirstSeq && m.Revision <= h.extent.LastSeq {
					h.now.Add(m)
				}
				return nil
			},
		})
		if err != nil {
			return err
		}
	}
	for _, h := range there {
		alike := h.digest == h.now.Sum()
		switch {
		case alike && h.extent.LastSeq >= h.of.LastSeq:
			h.of.Done, h.of.Verified = contentsSame, true
		case alike && !h.known:
			h.of.again = true
		default:
			h.of.Done, h.of.Why = contentsSkip, fmt.Sprintf("the room holds other messages here, up to %d, which stay", h.extent.LastSeq)
		}
	}
	if r.merge {
		return nil
	}
	for _, p := range r.report {
		if p.Done == contentsSkip {
			return bus.E(bus.Conflict, "the cluster is not empty: %s of room %s: %s", p.What, p.Room, p.Why).
				WithHint("the same command with --merge writes only what is missing, and lists the rest with --dry-run")
		}
	}
	return nil
}

func (r *contentsRestore) planFiles(ctx context.Context, c *roomContents, room bus.Room, why string) error {
	add := func(done, why string) *contentsReport {
		i := slices.IndexFunc(r.report, func(p *contentsReport) bool {
			return p.Room == c.Room && p.What == "files" && p.Done == done && p.Why == why
		})
		if i >= 0 {
			return r.report[i]
		}
		p := &contentsReport{Room: c.Room, What: "files", Done: done, Why: why, Verified: done == contentsSame, room: room, files: map[string]bus.StoredBlob{}}
		r.report = append(r.report, p)
		return p
	}
	stored := []bus.StoredBlob{}
	if why == "" {
		var err error
		if stored, err = r.link.blobs.Stored(ctx, c.Room); err != nil {
			return err
		}
	}
	for _, s := range c.stored {
		i := slices.IndexFunc(stored, func(h bus.StoredBlob) bool { return h.Name == s.Name })
		var p *contentsReport
		switch {
		case why != "":
			p = add(contentsSkip, why)
		case i < 0:
			p = add(contentsWrite, "")
		case stored[i].SHA256 == s.SHA256:
			p = add(contentsSame, "")
		default:
			p = add(contentsSkip, fmt.Sprintf("there is another file %s here, which stays", s.Name))
		}
		p.Count++
		p.Bytes += s.Size
		p.files[s.ID] = s
	}
	return nil
}

// write carries the plan out, in one reading of the backup.
func (r *contentsRestore) write(ctx context.Context) error {
	writes := map[string]*contentsReport{}
	for _, p := range r.report {
		if p.Done == contentsWrite {
			writes[p.part()] = p
		}
	}
	if len(writes) == 0 {
		return nil
	}
	extents := map[bus.RoomID]kv.Extent{}
	for _, c := range r.in.rooms {
		extents[c.Room] = c.extent()
	}
	var now *contentsReport
	var room *kv.RoomRestore
	var files fileRestore
	defer func() { files.abort(ctx) }()
	return r.scan(lineHandler{
		begin: func(part kv.Part) (err error) {
			if now = writes[part.Name]; now == nil {
				return nil
			}
			if now.What == "files" {
				files = fileRestore{blobs: r.link.blobs, room: now.Room, want: now.files}
				return nil
			}
			r.d.app.say("room %s: %d messages", now.Room, now.Count)
			if now.again {
				if err := kv.DropRoomStream(ctx, r.link.nc, now.Room); err != nil {
					return err
				}
			}
			room, err = kv.BeginRoomRestore(ctx, r.link.nc, now.Room, now.room.Retention, extents[now.Room])
			return err
		},
		each: func(_ string, m kv.StoredRecord) error {
			switch {
			case now == nil:
				return nil
			case now.What == "files":
				return files.take(ctx, m)
			}
			return room.Write(ctx, m)
		},
		end: func(string, kv.Extent) error {
			if now == nil {
				return nil
			}
			if now.What == "messages" {
				if err := room.Finish(ctx); err != nil {
					return err
				}
			}
			now.Verified = true
			return nil
		},
	})
}

// fileRestore stores one file after the other.
type fileRestore struct {
	blobs *kv.Blobs
	room  bus.RoomID
	want  map[string]bus.StoredBlob

	id string
	up *kv.Upload
}

func (f *fileRestore) take(ctx context.Context, r kv.StoredRecord) error {
	id, what, _ := strings.Cut(r.Key, ".")
	s, ok := f.want[id]
	if !ok {
		return nil
	}
	if f.id != id {
		up, err := f.blobs.BeginRestored(ctx, f.room, s.BlobInfo)
		if err != nil {
			return err
		}
		f.id, f.up = id, up
	}
	if what == kv.FileEnd {
		up := f.up
		f.id, f.up = "", nil
		return up.FinishRestored(ctx)
	}
	buf := f.blobs.Buffer()
	return f.up.Write(buf, copy(buf[:], r.Value))
}

// abort removes what there is of an unfinished file, also when the command was
// interrupted.
func (f *fileRestore) abort(ctx context.Context) {
	if f.up == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dialTimeout)
	defer cancel()
	f.up.Abort(ctx)
}

// sayContents is what is said of rooms in one line; empty if there is nothing.
func sayContents(rooms []*roomContents) string {
	var messages uint64
	var durable, files, with int
	var size int64
	for _, r := range rooms {
		if r.LastSeq > 0 {
			durable++
			messages += r.Messages
		}
		if r.Files > 0 {
			with++
			files += r.Files
			size += r.Bytes
		}
	}
	words := []string{}
	if durable > 0 {
		words = append(words, fmt.Sprintf("%d messages of %d rooms", messages, durable))
	}
	if with > 0 {
		words = append(words, fmt.Sprintf("%d files of %d rooms, %d bytes", files, with, size))
	}
	return strings.Join(words, ", ")
}
