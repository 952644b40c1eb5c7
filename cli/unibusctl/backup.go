package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nats.go"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

const (
	// liveWithin is how long the first proof of a backup or a restore may take:
	// nobody waits at a prompt for them, so an election is waited out.
	liveWithin = 15 * time.Second
	// cutWithin is for the records, backupWithin and restoreWithin also for what
	// rooms hold, of which there may be many gigabytes.
	cutWithin     = 2 * time.Minute
	backupWithin  = 2 * time.Hour
	restoreWithin = 4 * time.Hour
	// replicasWithin is how long followers may take to have what was restored.
	replicasWithin = time.Minute
)

func (a *app) backupCommand() *cli.Command {
	recipients := []cli.Flag{
		&cli.StringSliceFlag{Name: "recipient", Usage: "who can read it: an age recipient `age1...` (repeat)"},
		&cli.StringFlag{Name: "recipients-file", TakesFile: true, EnvVars: []string{"UNIBUS_BACKUP_RECIPIENTS"}, Usage: "`FILE` with one recipient a line"},
	}
	return &cli.Command{
		Name:     "backup",
		Category: "cluster",
		Usage:    "a signed, encrypted copy of who may do what, and of what rooms hold",
		Description: "Users, handles, rooms, members, sealed room keys and the heads of the audit, as they were at one\n" +
			"moment; behind it the messages of durable rooms, and files. It is signed by the key that made it\n" +
			"and encrypted to the given recipients: docs/backup.md.",
		Subcommands: []*cli.Command{
			{
				Name:  "create",
				Usage: "write a backup; nothing is ever overwritten",
				Description: "Works on the live KV, with the ops seed, or on a node with that of membership.\n\n" +
					"   unibusctl --direct backup create --out unibus.backup --recipients-file backup.recipients\n" +
					"   unibusctl backup create --membership-seed FILE --dir DIR --keep 30 --recipients-file FILE",
				Flags: append([]cli.Flag{
					&cli.StringFlag{Name: "out", TakesFile: true, Usage: "`FILE` to write"},
					&cli.StringFlag{Name: "dir", TakesFile: true, Usage: "`DIR` in which to write unibus-<time>.backup"},
					&cli.IntFlag{Name: "keep", Usage: "with --dir: afterwards remove all but the newest `N` of them"},
					&cli.StringFlag{Name: "membership-seed", TakesFile: true, Usage: "`FILE` with the seed of membership-ctrl, instead of ops"},
					busSeedFlag(),
				}, append(contentFlags(), recipients...)...),
				Action: a.backupCreate,
			},
			{
				Name:      "verify",
				ArgsUsage: "FILE",
				Usage:     "is it whole, and who signed it?",
				Description: "Without --age-identity it cannot look inside; the signature covers every byte all the same.\n\n" +
					"   unibusctl backup verify unibus.backup --signer U...",
				Flags:  a.backupReadFlags(),
				Action: a.backupVerify,
			},
			{
				Name:      "drill",
				ArgsUsage: "FILE",
				Usage:     "restore it into a cluster made for that and thrown away afterwards",
				Description: "Starts three nats-servers on this machine's loopback, restores, reads everything back, and\n" +
					"removes them. The live cluster is not touched, and not needed.\n\n" +
					"   unibusctl backup drill unibus.backup --signer U... --age-identity backup.key",
				Flags: append(append(a.backupReadFlags(), contentFlags()...), &cli.StringFlag{
					Name: "nats-server", TakesFile: true, Usage: "the server's `PROGRAM`; default: beside this one, /usr/lib/unibus, the PATH",
				}),
				Action: a.backupDrill,
			},
			{
				Name:  "key",
				Usage: "make a key that can read backups, and its recipient",
				Description: "FILE is the secret and belongs nowhere near the nodes; FILE.pub is what they need.\n\n" +
					"   unibusctl backup key --out backup.key",
				Flags:  []cli.Flag{&cli.StringFlag{Name: "out", Required: true, TakesFile: true, Usage: "`FILE` to write"}},
				Action: a.backupKey,
			},
		},
	}
}

func (a *app) backupReadFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "signer", EnvVars: []string{"UNIBUS_BACKUP_SIGNER"}, Usage: "public key `U...` that must have signed it; default: that of --ops-seed"},
		&cli.StringFlag{Name: "age-identity", TakesFile: true, Usage: "`FILE` with the key that can read it (unibusctl backup key)"},
	}
}

func (a *app) restoreCommand() *cli.Command {
	return &cli.Command{
		Name:      "restore",
		ArgsUsage: "FILE",
		Category:  "cluster",
		Usage:     "bring a backup back into an empty cluster",
		Description: "Nothing is overwritten. Who is revoked, here or in the backup, stays revoked, and a handle stays with\n" +
			"who has it. What happened after the backup is lost: name with --revoked who was revoked since.\n" +
			"The same line finishes a restore that was interrupted.\n\n" +
			"   unibusctl --direct restore unibus.backup --signer U... --age-identity backup.key --dry-run",
		Flags: append(append(a.backupReadFlags(), contentFlags()...),
			busSeedFlag(),
			&cli.BoolFlag{Name: "merge", Usage: "the cluster need not be empty: write only what is missing"},
			&cli.StringSliceFlag{Name: "revoked", Usage: "`USER` of the backup, by handle or key, who was revoked since (repeat)"},
			&cli.BoolFlag{Name: "dry-run", Usage: "show what it would do"},
		),
		Action: a.restore,
	}
}

// backupView is what `backup create` and `backup verify` print.
type backupView struct {
	File       string          `json:"file"`
	CreatedAt  time.Time       `json:"created_at"`
	Signer     string          `json:"signer"`
	Bytes      int64           `json:"bytes"`
	SHA256     string          `json:"sha256"`
	Parts      []partCount     `json:"parts"`
	Contents   []*roomContents `json:"contents"` // of rooms that hold something
	Unreadable []string        `json:"unreadable"`
	Removed    []string        `json:"removed"`
	Decrypted  bool            `json:"decrypted"`
}

func viewOf(path string, b *backupFile) backupView {
	return backupView{
		File: path, CreatedAt: b.CreatedAt, Signer: b.Signer, Bytes: b.Size, SHA256: b.Digest,
		Parts: []partCount{}, Contents: []*roomContents{}, Unreadable: []string{}, Removed: []string{},
	}
}

func (a *app) printBackup(v backupView, said string) error {
	if a.set.json {
		return a.print(v, nil)
	}
	words := []string{}
	for _, p := range v.Parts {
		if !isContents(p.Part) {
			words = append(words, fmt.Sprintf("%s %d", p.Part, p.Records))
		}
	}
	if said := sayContents(v.Contents); said != "" {
		words = append(words, said)
	}
	fmt.Fprintln(a.out, oneLine(fmt.Sprintf("%s %s: %d bytes, taken %s, signed by %s", said, v.File, v.Bytes, v.CreatedAt.UTC().Format(time.RFC3339), v.Signer)))
	if len(words) > 0 {
		fmt.Fprintln(a.out, oneLine("holds "+strings.Join(words, ", ")))
	}
	for _, r := range v.Removed {
		fmt.Fprintln(a.out, oneLine("removed "+r))
	}
	for _, u := range v.Unreadable {
		a.say("WARNING: %s cannot be read: it denies its key, and will again after a restore", u)
	}
	return nil
}

func (a *app) backupCreate(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	out, dir := c.String("out"), c.String("dir")
	switch {
	case (out == "") == (dir == ""):
		return usagef("one of --out and --dir says where to write")
	case dir == "" && c.IsSet("keep"), c.IsSet("keep") && c.Int("keep") < 1:
		return usagef("--keep is a number from 1, and needs --dir")
	}
	recipients, err := a.recipients(c)
	if err != nil {
		return err
	}
	link := liveLink{seed: c.String("membership-seed"), inbox: "_INBOX_membership", dial: a.dialWith, raw: true, patience: liveWithin}
	if link.seed == "" {
		if err := a.needDirect(); err != nil {
			return err
		}
		link.seed, link.inbox, link.dial = a.set.opsSeed, "_INBOX_ops", a.dialFirst
	}
	seedOfBus := ""
	if wantedContents(c).any() {
		if seedOfBus, err = busSeed(c, link.seed); err != nil {
			return err
		}
	}
	if dir != "" {
		out = filepath.Join(dir, "unibus-"+a.now().UTC().Format("20060102T150405Z")+".backup")
	}
	ctx, cancel := a.within(c.Context, backupWithin)
	defer cancel()
	d, err := a.openLive(ctx, link)
	if err != nil {
		return err
	}
	defer d.Close()
	cutting, stop := context.WithTimeout(ctx, cutWithin)
	defer stop()
	snap, err := d.view.TakeSnapshot(cutting)
	if err != nil {
		return err
	}
	unreadable, err := snap.Check()
	if err != nil {
		return err
	}
	sources, rooms := sourcesOf(snap), func() []*roomContents { return []*roomContents{} }
	if want := wantedContents(c); want.any() {
		l, err := a.openBus(ctx, seedOfBus, d.view)
		if err != nil {
			return err
		}
		defer l.Close()
		more, counted, err := contentSources(ctx, snap, d.view, l, want)
		if err != nil {
			return err
		}
		sources, rooms = append(sources, more...), counted
	}
	counts, written, err := saveBackup(out, snap.At.UTC().Truncate(time.Millisecond), sources, recipients, kv.SeedSigner(link.seed))
	if err != nil {
		return err
	}
	v := viewOf(out, written)
	v.Parts, v.Contents, v.Decrypted = counts, rooms(), true
	for _, b := range unreadable {
		v.Unreadable = append(v.Unreadable, b.Bucket+" "+b.Key)
	}
	if c.IsSet("keep") {
		if v.Removed, err = pruneBackups(dir, c.Int("keep"), out, a.now()); err != nil {
			return err
		}
	}
	return a.printBackup(v, "wrote")
}

// backupName is what `backup create --dir` writes, and all that --keep removes;
// unfinished is what a run left that was killed.
var (
	backupName = regexp.MustCompile(`^unibus-[0-9]{8}T[0-9]{6}Z\.backup$`)
	unfinished = regexp.MustCompile(`^\.unibus-[0-9]{8}T[0-9]{6}Z\.backup[0-9]+$`)
)

// pruneBackups removes the oldest backups of a directory, after a new one has
// been written and read back, and never that one.
func pruneBackups(dir string, keep int, newest string, now time.Time) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	removed, names := []string{}, []string{}
	remove := func(name string) error {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			return err
		}
		removed = append(removed, filepath.Join(dir, name))
		return nil
	}
	for _, e := range entries {
		switch {
		case !e.Type().IsRegular():
		case backupName.MatchString(e.Name()) && e.Name() != filepath.Base(newest):
			names = append(names, e.Name())
		case unfinished.MatchString(e.Name()):
			if info, err := e.Info(); err == nil && now.Sub(info.ModTime()) > time.Hour {
				if err := remove(e.Name()); err != nil {
					return removed, err
				}
			}
		}
	}
	slices.Sort(names) // by time
	for _, name := range names[:max(0, len(names)-(keep-1))] {
		if err := remove(name); err != nil {
			return removed, err
		}
	}
	return removed, nil
}

func (a *app) recipients(c *cli.Context) ([]age.Recipient, error) {
	text := strings.Join(c.StringSlice("recipient"), "\n") + "\n"
	if file := c.String("recipients-file"); file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read the recipients: %w", err)
		}
		text += string(data)
	}
	if strings.TrimSpace(text) == "" {
		return nil, &usageError{msg: "a backup is written for somebody: --recipient or --recipients-file", hint: "unibusctl backup key --out backup.key"}
	}
	out, err := age.ParseRecipients(strings.NewReader(text))
	if err != nil {
		return nil, bus.E(bus.Invalid, "the recipients cannot be used: %w", err).WithHint("unibusctl backup key --out backup.key")
	}
	return out, nil
}

// identities reads the key that can decrypt; nil if none is named.
func identities(c *cli.Context) ([]age.Identity, error) {
	file := c.String("age-identity")
	if file == "" {
		return nil, nil
	}
	data, err := readSecret(file)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	out, err := age.ParseIdentities(bytes.NewReader(data))
	if err != nil {
		return nil, bus.E(bus.Invalid, "%s does not hold a key of age (AGE-SECRET-KEY-...)", file)
	}
	return out, nil
}

// openSigned opens the one argument, if who must have signed it has.
func (a *app) openSigned(c *cli.Context) (string, *backupFile, error) {
	arg, err := positional(c, "FILE")
	if err != nil {
		return "", nil, err
	}
	signer := c.String("signer")
	if signer == "" {
		if a.set.opsSeed == "" {
			return "", nil, &usageError{msg: "who must have signed it? --signer U...", hint: a.command + " --help"}
		}
		if signer, err = kv.SeedSigner(a.set.opsSeed).PublicKey(); err != nil {
			return "", nil, err
		}
	}
	b, err := openBackup(arg[0], signer)
	return arg[0], b, err
}

func (a *app) backupVerify(c *cli.Context) error {
	path, b, err := a.openSigned(c)
	if err != nil {
		return err
	}
	defer b.Close()
	v := viewOf(path, b)
	keys, err := identities(c)
	if err != nil {
		return err
	}
	if keys != nil {
		in, err := b.inside(keys)
		if err != nil {
			return err
		}
		unreadable, err := in.snap.Check()
		if err != nil {
			return err
		}
		v.Parts, v.Contents, v.Decrypted = in.counts, in.rooms, true
		for _, u := range unreadable {
			v.Unreadable = append(v.Unreadable, u.Bucket+" "+u.Key)
		}
	} else {
		a.say("not looked inside: that needs --age-identity FILE")
	}
	return a.printBackup(v, "verified")
}

func (a *app) backupKey(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	path := c.String("out")
	key, err := age.GenerateHybridIdentity()
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	pub := path + ".pub"
	if _, err := os.Lstat(pub); !errors.Is(err, fs.ErrNotExist) {
		return bus.E(bus.Conflict, "%s exists already", pub).WithHint("another --out")
	}
	if err := writeFile(path, []byte(key.String()+"\n"), 0o600, false); err != nil {
		if bus.CodeOf(err) == bus.Conflict { // there is no --force: the old key is needed for the old backups
			return bus.E(bus.Conflict, "%s exists already", path).WithHint("another --out")
		}
		return err
	}
	if err := writeFile(pub, []byte(key.Recipient().String()+"\n"), 0o644, false); err != nil {
		return err
	}
	return a.print(map[string]string{"file": path, "recipients_file": pub}, func(t table.Writer) {
		t.AppendRows([]table.Row{{"file", path}, {"recipients file", pub}})
	})
}

// restoreView is what restore and drill print.
type restoreView struct {
	File      string    `json:"file"`
	CreatedAt time.Time `json:"created_at"`
	SHA256    string    `json:"sha256"`
	DryRun    bool      `json:"dry_run"`
	kv.RestoreReport
	Contents  []*contentsReport `json:"contents"` // of rooms
	Unknown   []partCount       `json:"unknown"`  // parts of a newer version: not restored
	ElapsedMS int64             `json:"elapsed_ms"`
}

// readableBackup is a backup that may be restored: verified, decrypted, checked.
type readableBackup struct {
	path string
	file *backupFile
	keys []age.Identity
	in   *backupInside
}

func (a *app) readable(c *cli.Context) (*readableBackup, error) {
	path, b, err := a.openSigned(c)
	if err != nil {
		return nil, err
	}
	r := &readableBackup{path: path, file: b}
	r.keys, err = identities(c)
	if err == nil && r.keys == nil {
		err = usagef("--age-identity names the key that can read it")
	}
	if err == nil {
		r.in, err = b.inside(r.keys)
	}
	if err == nil {
		_, err = r.in.snap.Check()
	}
	if err != nil {
		b.Close()
		return nil, err
	}
	return r, nil
}

// unknown are the parts of another version of unibus.
func (r *readableBackup) unknown() []partCount {
	return slices.DeleteFunc(slices.Clone(r.in.counts), func(p partCount) bool { return isContents(p.Part) || r.in.snap.Part(p.Part) != nil })
}

func (a *app) restore(c *cli.Context) error {
	if err := a.needDirect(); err != nil {
		return err
	}
	r, err := a.readable(c)
	if err != nil {
		return err
	}
	defer r.file.Close()
	o := kv.RestoreOptions{Merge: c.Bool("merge"), DryRun: c.Bool("dry-run")}
	if o.Revoked, err = usersOf(r.in.snap, c.StringSlice("revoked")); err != nil {
		return err
	}
	want, seed := wantedContents(c), ""
	if want.any() && len(r.in.rooms) > 0 {
		if seed, err = busSeed(c, a.set.opsSeed); err != nil {
			return err
		}
	}
	if !o.DryRun {
		if err := a.confirm(fmt.Sprintf("restore what the cluster was at %s? What was revoked since and is not named with --revoked comes back active", r.file.CreatedAt.UTC().Format(time.RFC3339))); err != nil {
			return err
		}
	}
	ctx, cancel := a.within(c.Context, restoreWithin)
	defer cancel()
	d, err := a.openLive(ctx, liveLink{seed: a.set.opsSeed, inbox: "_INBOX_ops", dial: a.dialFirst, raw: true, patience: liveWithin})
	if err != nil {
		return err
	}
	defer d.Close()
	if err := a.waitThree(ctx, d.nc); err != nil {
		return err
	}
	var l *busLink
	if seed != "" {
		if l, err = a.openBus(ctx, seed, d.view); err != nil {
			return err
		}
		defer l.Close()
	}
	v, err := d.restoreInto(ctx, r, l, want, o)
	if err != nil {
		return err
	}
	return a.printRestore(v)
}

// restoreInto restores into the cluster of d, recorded, and waits until all
// three nodes have it. What rooms held comes first, when everything is known to
// fit: who may read it comes last.
func (d *direct) restoreInto(ctx context.Context, r *readableBackup, l *busLink, want contentsWanted, o kv.RestoreOptions) (restoreView, error) {
	started, b := d.app.now(), r.file
	v := restoreView{File: r.path, CreatedAt: b.CreatedAt, SHA256: b.Digest, DryRun: o.DryRun, Contents: []*contentsReport{}, Unknown: r.unknown()}
	dry := o
	dry.DryRun = true
	var err error
	if v.RestoreReport, err = d.slow.Restore(ctx, r.in.snap, dry); err != nil {
		return v, err
	}
	contents := &contentsRestore{d: d, link: l, file: b, keys: r.keys, in: r.in, merge: o.Merge}
	if l != nil {
		if err := l.blobs.Bootstrap(ctx); err != nil {
			return v, err
		}
		if err := contents.plan(ctx, want); err != nil {
			return v, err
		}
		v.Contents = append(v.Contents, contents.report...)
	}
	if o.DryRun {
		return v, nil
	}
	detail := fmt.Sprintf("backup of %s sha256 %s", b.CreatedAt.UTC().Format(time.RFC3339), b.Digest)
	_, err = d.record(ctx, "cluster.restore", bus.AuditEntry{Detail: detail}, func() (bus.Change, error) {
		err := contents.write(ctx)
		if err == nil {
			v.RestoreReport, err = d.slow.Restore(ctx, r.in.snap, o)
		}
		return bus.Change{Verified: err == nil}, err
	})
	if err != nil {
		if written := v.writes(); written > 0 {
			d.app.say("%d records were written before that; the same line goes on", written)
		}
		return v, err
	}
	v.ElapsedMS = d.app.now().Sub(started).Milliseconds()
	return v, d.app.waitThree(ctx, d.nc)
}

func (v restoreView) writes() (n int) {
	for _, p := range v.Parts {
		n += p.Written
	}
	return n
}

// waitThree waits until all streams have three current replicas: a follower may
// be a moment behind in a healthy cluster.
func (a *app) waitThree(ctx context.Context, nc *nats.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, replicasWithin)
	defer cancel()
	for {
		err := threeCurrent(ctx, nc)
		if err == nil || bus.CodeOf(err) == bus.Conflict {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// threeCurrent wants every stream as defined, with all three replicas current.
func threeCurrent(ctx context.Context, nc *nats.Conn) error {
	for _, h := range kv.Health(ctx, nc) {
		switch {
		case h.Err != nil:
			return h.Err
		case h.Leader == "" || h.FollowersCurrent < kv.Replicas-1:
			return bus.E(bus.Unavailable, "stream %s: leader=%s followers_current=%d/%d: a restore wants all three replicas", h.Stream, h.Leader, h.FollowersCurrent, kv.Replicas-1).
				WithHint("unibusctl cluster wait")
		}
	}
	return nil
}

// usersOf resolves users of a snapshot, of whom the live cluster knows nothing.
func usersOf(snap *kv.Snapshot, names []string) ([]bus.UserKey, error) {
	var out []bus.UserKey
	for _, name := range names {
		k, err := snap.FindUser(name)
		if err != nil {
			return nil, err
		}
		out = append(out, k)
	}
	return out, nil
}

func (a *app) printRestore(v restoreView) error {
	if a.set.json {
		return a.print(v, nil)
	}
	err := a.print(nil, func(t table.Writer) {
		t.AppendHeader(table.Row{"part", "in the backup", "there already", "written", "skipped", "unreadable"})
		for _, p := range v.Parts {
			t.AppendRow(table.Row{p.Part, p.Snapshot, p.Same, p.Written, p.Skipped, p.Unreadable})
		}
	})
	for _, r := range v.Contents {
		word := map[string]string{contentsWrite: "written, read back", contentsSame: "there already", contentsSkip: "skipped: " + r.Why}[r.Done]
		if v.DryRun && r.Done == contentsWrite {
			word = "would be written"
		}
		fmt.Fprintln(a.out, oneLine(fmt.Sprintf("room %s: %d %s %s", r.Room, r.Count, r.What, word)))
	}
	for _, s := range v.Skipped {
		fmt.Fprintln(a.out, oneLine(fmt.Sprintf("skipped %s %s: %s", s.Part, s.Key, s.Why)))
	}
	for _, u := range v.Revoked {
		fmt.Fprintln(a.out, "revoked "+u.NKey()+": the backup says so")
	}
	for _, r := range v.Archived {
		fmt.Fprintln(a.out, "archived room "+string(r)+": the backup says so")
	}
	for _, p := range v.Unknown {
		fmt.Fprintln(a.out, oneLine(fmt.Sprintf("not restored: part %s, %d records, of another version of unibus", p.Part, p.Records)))
	}
	switch {
	case v.DryRun:
		fmt.Fprintf(a.out, "dry run: nothing was written\n")
	default:
		fmt.Fprintf(a.out, "restored the backup of %s: %d records written, %d read back as they must be, in %d ms\n",
			v.CreatedAt.UTC().Format(time.RFC3339), v.writes(), v.Verified, v.ElapsedMS)
		a.say("what happened after %s is lost: unibusctl user list, and compare with what you know", v.CreatedAt.UTC().Format(time.RFC3339))
	}
	return err
}
