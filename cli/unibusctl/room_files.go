package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
)

// fileCommands are the verbs of room about files.
func (a *app) fileCommands() []*cli.Command {
	return []*cli.Command{
		{
			Name: "put", ArgsUsage: "ROOM FILE [NAME]", Usage: "store a file in a room",
			Description: "NAME is that of FILE unless given. All of it is stored or nothing; what is sent is signed\nand held to its digest at both ends.\n\n   unibusctl room put ops runbook.pdf",
			Flags:       []cli.Flag{&cli.BoolFlag{Name: "replace", Usage: "take the place of a file that has the name"}},
			Action:      a.roomPut,
		},
		{
			Name: "get", ArgsUsage: "ROOM NAME [FILE]", Usage: "read a file of a room",
			Description: "FILE is NAME in the working directory unless given; - is stdout. It appears when all of it\nis there and has the digest of what was stored.\n\n   unibusctl room get ops runbook.pdf",
			Flags:       []cli.Flag{&cli.BoolFlag{Name: "force", Usage: "overwrite FILE"}},
			Action:      a.roomGet,
		},
		{
			Name: "files", ArgsUsage: "ROOM", Usage: "the files of a room",
			Description: "   unibusctl room files ops --json", Action: a.roomFiles,
		},
		{
			Name: "rm", ArgsUsage: "ROOM NAME", Usage: "delete a file of a room",
			Description: "   unibusctl room rm ops runbook.pdf --yes", Action: a.roomRemoveFile,
		},
	}
}

// fileArguments are a room and one or two words more.
func fileArguments(c *cli.Context, second, third string) (id bus.RoomID, args []string, err error) {
	names := []string{"ROOM", second, third}
	if third == "" || c.NArg() == 2 {
		names = names[:2]
	}
	if args, err = positional(c, names...); err != nil {
		return "", nil, err
	}
	id, err = bus.ParseRoomID(args[0])
	return id, args[1:], err
}

// files is the API: with --direct there is no way to what rooms store, and an
// operator who is no member has no business there.
func (a *app) files() (*overAPI, error) {
	if a.set.direct {
		return nil, &usageError{msg: "files go over the API, as one of the room's members: leave --direct out"}
	}
	return a.openAPI()
}

func (a *app) roomPut(c *cli.Context) error {
	id, args, err := fileArguments(c, "FILE", "NAME")
	if err != nil {
		return err
	}
	path, given := args[0], filepath.Base(args[0])
	if len(args) == 2 {
		given = args[1]
	}
	name, err := bus.ParseBlobName(given)
	if err != nil {
		if e := new(bus.Error); len(args) == 1 && errors.As(err, &e) {
			return e.WithHint("%s ROOM FILE NAME gives it another name", a.command)
		}
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return bus.E(bus.Invalid, "cannot read the file: %w", err)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return bus.E(bus.Invalid, "%s is no regular file; what is piped has no length to be signed", quote(path))
	}
	b, err := a.files()
	if err != nil {
		return err
	}
	defer b.Close()
	keys, err := a.fileKeys(c, b, id)
	if err != nil {
		return err
	}
	p := a.progressBar(string(name))
	done, err := b.PutBlob(c.Context, id, name, f, client.BlobOptions{Replace: c.Bool("replace"), Progress: p.show, Keys: keys})
	p.clear()
	if err != nil {
		return err
	}
	return a.fileChanged(done, "stored", "already there")
}

// fileKeys are the identity's keys, announced if the room needs them.
func (a *app) fileKeys(c *cli.Context, b *overAPI, id bus.RoomID) (*client.Keys, error) {
	signer, err := readSigner(a.set.identity)
	if err != nil {
		return nil, err
	}
	keys, err := a.keysOf(b.Client, signer, a.set.identity)
	if err != nil {
		return nil, err
	}
	ctx, cancel := a.within(c.Context, changeWithin)
	defer cancel()
	room, err := b.Room(ctx, id)
	if err == nil && room.Encrypted {
		_, err = keys.Announce(ctx)
	}
	return keys, err
}

func (a *app) fileChanged(done bus.BlobChange, what, already string) error {
	if a.set.json {
		return a.print(done, nil)
	}
	if done.Already {
		what = already
	}
	s := fmt.Sprintf("%s in room %s: %s", done.Blob.Name, done.Room, what)
	if done.Blob.SHA256 != "" {
		s += fmt.Sprintf(", %s, sha256 %s", size(done.Blob.Size), done.Blob.SHA256)
	}
	_, err := fmt.Fprintln(a.out, oneLine(s))
	return err
}

func (a *app) roomGet(c *cli.Context) error {
	id, args, err := fileArguments(c, "NAME", "FILE")
	if err != nil {
		return err
	}
	name, err := bus.ParseBlobName(args[0])
	if err != nil {
		return err
	}
	path := string(name) // which is one segment, and neither . nor ..
	if len(args) == 2 {
		path = args[1]
	}
	b, err := a.files()
	if err != nil {
		return err
	}
	defer b.Close()
	keys, err := a.fileKeys(c, b, id)
	if err != nil {
		return err
	}
	if path == "-" {
		return a.fileToStdout(c, b, id, name, keys)
	}
	if _, err := os.Lstat(path); err == nil && !c.Bool("force") {
		return existsError(path)
	}
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithPermissions(0o600))
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer f.Cleanup() //nolint:errcheck // nothing is left to clean after a success
	p := a.progressBar(string(name))
	info, err := b.GetBlob(c.Context, id, name, f, client.BlobOptions{Progress: p.show, Keys: keys})
	p.clear()
	if err != nil {
		return err
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if a.set.json {
		return a.print(map[string]any{"room": id, "name": info.Name, "size": info.Size, "sha256": info.SHA256, "file": path}, nil)
	}
	_, err = fmt.Fprintln(a.out, oneLine(fmt.Sprintf("%s: %s, sha256 %s", path, size(info.Size), info.SHA256)))
	return err
}

func (a *app) fileToStdout(c *cli.Context, b *overAPI, id bus.RoomID, name bus.BlobName, keys *client.Keys) error {
	if f, ok := a.out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return usagef("a file is not written to a terminal; name a FILE, or pipe it")
	}
	if a.set.json {
		return usagef("stdout cannot be both the file and JSON; leave --json out")
	}
	p := a.progressBar(string(name))
	_, err := b.GetBlob(c.Context, id, name, a.out, client.BlobOptions{Progress: p.show, Keys: keys})
	p.clear()
	return err
}

func (a *app) roomFiles(c *cli.Context) error {
	id, err := oneRoom(c)
	if err != nil {
		return err
	}
	b, err := a.files()
	if err != nil {
		return err
	}
	defer b.Close()
	ctx, cancel := a.within(c.Context, readWithin)
	defer cancel()
	list, err := b.Blobs(ctx, id)
	if err != nil {
		return err
	}
	err = a.print(list, func(t table.Writer) {
		t.AppendHeader(table.Row{"name", "size", "stored", "by", "sha256"})
		for _, f := range list.Blobs {
			t.AppendRow(table.Row{f.Name, size(f.Size), stamp(&f.CreatedAt), f.CreatedBy, f.SHA256})
		}
	})
	a.say("%d of %d files, %s of %s", len(list.Blobs), list.MaxCount, size(list.Bytes), size(list.MaxBytes))
	return err
}

func (a *app) roomRemoveFile(c *cli.Context) error {
	id, args, err := fileArguments(c, "NAME", "")
	if err != nil {
		return err
	}
	name, err := bus.ParseBlobName(args[0])
	if err != nil {
		return err
	}
	b, err := a.files()
	if err != nil {
		return err
	}
	defer b.Close()
	if err := a.confirm(fmt.Sprintf("delete %s of room %s for all its members?", name, id)); err != nil {
		return err
	}
	ctx, cancel := a.within(c.Context, changeWithin)
	defer cancel()
	done, err := b.DeleteBlob(ctx, id, name)
	if err != nil {
		return err
	}
	return a.fileChanged(done, "deleted", "not there")
}

// progressBar is a line on a terminal's stderr, and nothing anywhere else.
type progressBar struct {
	w     io.Writer // nil: nobody looks
	name  string
	width int
	plain bool
	now   func() time.Time

	mu    sync.Mutex
	began time.Time
	drawn time.Time
}

func (a *app) progressBar(name string) *progressBar {
	p := &progressBar{name: oneLine(name), now: a.now}
	f, ok := a.errw.(*os.File)
	if a.set.quiet || !ok || !term.IsTerminal(int(f.Fd())) {
		return p
	}
	p.w, p.width, p.began = f, 80, a.now()
	if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
		p.width = width
	}
	p.plain = a.set.color == "never" || a.getenv("NO_COLOR") != ""
	return p
}

// show draws the line, at most ten times a second. It is called from whichever
// goroutine sends.
func (p *progressBar) show(done, total int64) {
	if p.w == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if done < total && now.Sub(p.drawn) < 100*time.Millisecond {
		return
	}
	p.drawn = now
	fmt.Fprint(p.w, "\r"+p.line(done, total, now.Sub(p.began)))
}

func (p *progressBar) line(done, total int64, took time.Duration) string {
	share := 1.0
	if total > 0 {
		share = float64(done) / float64(total)
	}
	tail := fmt.Sprintf(" %3.0f%% %9s of %s", 100*share, size(done), size(total))
	if s := took.Seconds(); s >= 1 {
		tail += fmt.Sprintf(", %s/s", size(int64(float64(done)/s)))
	}
	const most = 24
	name := p.name
	if len(name) > most {
		name = name[:most-3] + "..."
	}
	bar := p.width - len(name) - len(tail) - 4
	if bar < 8 {
		return fit(name+tail, p.width-1)
	}
	full, empty := "█", "░"
	if p.plain {
		full, empty = "#", "."
	}
	n := int(share * float64(bar))
	return name + " " + strings.Repeat(full, n) + strings.Repeat(empty, bar-n) + tail + " "
}

func fit(s string, width int) string {
	if len(s) > width {
		return s[:max(0, width)]
	}
	return s + strings.Repeat(" ", width-len(s))
}

// clear takes the line away, for what is said next.
func (p *progressBar) clear() {
	if p.w == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprint(p.w, "\r"+strings.Repeat(" ", max(0, p.width-1))+"\r")
}
