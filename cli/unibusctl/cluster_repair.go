package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nats.go"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

const (
	repairWithin   = 5 * time.Minute
	replicasBudget = 2 * time.Minute
)

func (a *app) clusterRepairCommand() *cli.Command {
	return &cli.Command{
		Name: "repair", ArgsUsage: "STREAM", Usage: "make a frozen stream again, from itself",
		Description: "A frozen stream answers reads and takes no write, for ever; only its end helps. It is copied to\n" +
			"--save from its fullest replica, then deleted, made again from the copy, and compared. While that\n" +
			"lasts nothing of it is decided: everybody waits. A stream that takes writes is refused.\n" +
			"Interrupted after it was deleted, --from takes the copy.\n\n" +
			"   unibusctl --direct cluster repair users --save FILE\n" +
			"   unibusctl --direct cluster repair users --from FILE",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "save", TakesFile: true, Usage: "new `FILE` for the copy"},
			&cli.StringFlag{Name: "from", TakesFile: true, Usage: "the stream is missing: make it from the copy in `FILE`"},
			a.sysSeedFlag(),
			&cli.BoolFlag{Name: "dry-run", Usage: "only say in which state the stream is"},
		},
		Action: a.clusterRepair,
	}
}

func (a *app) clusterReplicasCommand() *cli.Command {
	return &cli.Command{
		Name: "replicas", ArgsUsage: "3", Usage: "give every stream three replicas, in place, and prove it",
		Description: "Every stream ends with a leader, two current followers and a write that it took. A stream that\n" +
			"differs from its definition in anything else is refused, before any is changed.\n\n" +
			"   unibusctl --direct cluster replicas 3",
		Action: a.clusterReplicas,
	}
}

// opsConn is a connection as ops.
func (a *app) opsConn(ctx context.Context) (*nats.Conn, error) {
	if err := a.needDirect(); err != nil {
		return nil, err
	}
	dctx, cancel := context.WithTimeout(ctx, decideWithin)
	defer cancel()
	return a.dialFirst(dctx, a.set.opsSeed, "_INBOX_ops")
}

func (a *app) clusterReplicas(c *cli.Context) error {
	arg, err := positional(c, "3")
	if err != nil {
		return err
	}
	if arg[0] != "3" {
		return bus.E(bus.Invalid, "%s is refused: unibus keeps three replicas of everything", quote(arg[0]))
	}
	ctx, cancel := a.within(c.Context, replicasBudget)
	defer cancel()
	nc, err := a.opsConn(ctx)
	if err != nil {
		return err
	}
	defer nc.Close()
	streams, err := kv.RaiseReplicas(ctx, nc, func(what string) { a.say("%s", what) })
	if streams != nil {
		shown := a.print(map[string]any{"streams": streams, "proven": err == nil}, func(t table.Writer) {
			t.AppendHeader(table.Row{"stream", "was", "replicas", "leader", "followers current", "takes writes"})
			for _, s := range streams {
				t.AppendRow(table.Row{s.Stream, s.Was, s.Replicas, s.Leader, fmt.Sprintf("%d/%d", s.FollowersCurrent, kv.Replicas-1), s.Written})
			}
		})
		err = errors.Join(err, shown)
	}
	return err
}

// repairView is what cluster repair prints.
type repairView struct {
	Stream    string         `json:"stream"`
	State     kv.StreamState `json:"state"` // before
	Copy      string         `json:"copy,omitempty"`
	Saved     *kv.Extent     `json:"saved,omitempty"`
	Restored  *kv.Extent     `json:"restored,omitempty"`
	ElapsedMS int64          `json:"elapsed_ms"`
}

func (a *app) clusterRepair(c *cli.Context) error {
	arg, err := positional(c, "STREAM")
	if err != nil {
		return err
	}
	stream, err := kv.StreamNameOf(arg[0])
	if err != nil {
		return err
	}
	save, from, dry := c.String("save"), c.String("from"), c.Bool("dry-run")
	if !dry && (save == "") == (from == "") {
		return usagef("one of --save and --from names the file of the copy")
	}
	ctx, cancel := a.within(c.Context, repairWithin)
	defer cancel()
	nc, err := a.opsConn(ctx)
	if err != nil {
		return err
	}
	defer nc.Close()
	v := repairView{Stream: stream}
	if v.State, err = kv.StateOf(ctx, nc, stream); err != nil {
		return err
	}
	if dry {
		return a.printRepair(v)
	}
	started := a.now()
	if save != "" {
		if err := v.State.Repairable(stream); err != nil {
			return err
		}
		v.Copy = save
		v.Saved, err = a.saveAndDelete(ctx, c, nc, stream, save)
	} else {
		v.Copy, err = from, a.confirm(fmt.Sprintf("make %s again from %s? What was written after it was made is lost", stream, from))
	}
	if err != nil {
		return err
	}
	restored, err := kv.RemakeStream(ctx, nc, stream, copyIn(v.Copy, stream))
	if err != nil {
		return err
	}
	v.Restored, v.ElapsedMS = &restored, a.now().Sub(started).Milliseconds()
	a.noteRepair(ctx, nc, v)
	return a.printRepair(v)
}

// saveAndDelete ends a frozen stream when its copy lies on the disk.
func (a *app) saveAndDelete(ctx context.Context, c *cli.Context, nc *nats.Conn, stream, path string) (*kv.Extent, error) {
	seed, err := a.sysSeedOf(c)
	if err != nil {
		return nil, err
	}
	sys, err := a.dialFirst(ctx, seed, "_INBOX_sys")
	if err != nil {
		return nil, err
	}
	defer sys.Close()
	extent, err := a.saveCopy(ctx, nc, sys, stream, path)
	if err != nil {
		return nil, err
	}
	a.say("copied %d messages, up to sequence %d, to %s", extent.Messages, extent.LastSeq, path)
	if err := a.confirm(fmt.Sprintf("delete %s and make it again from that copy? Until then nothing of it is decided", stream)); err != nil {
		return nil, err
	}
	return &extent, kv.DeleteStream(ctx, nc, stream)
}

// saveCopy writes every message of a stream as the lines of a backup, in clear:
// nothing in the streams is secret from who holds the ops seed, and the hour of
// a repair is none for looking for another key.
func (a *app) saveCopy(ctx context.Context, nc, sys *nats.Conn, stream, path string) (extent kv.Extent, err error) {
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(0o600))
	if err != nil {
		return extent, fmt.Errorf("write %s: %w", path, err)
	}
	defer f.Cleanup() //nolint:errcheck // nothing is left to clean after a success
	w := bufio.NewWriterSize(f, 64<<10)
	now := a.now().UTC()
	_, err = writeLines(w, now, []backupSource{{name: stream, stream: stream, created: now, each: func(emit func(kv.StoredRecord) error) (_ kv.Extent, err error) {
		extent, err = kv.SaveStream(ctx, nc, sys, stream, emit)
		return extent, err
	}}})
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return extent, err
	}
	return extent, nameFile(f.Name(), path)
}

// copyIn reads a copy as often as it is asked to.
func copyIn(path, stream string) kv.Copy {
	return func(each func(kv.StoredRecord) error) error {
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("read the copy: %w", err)
		}
		defer f.Close() //nolint:errcheck // nothing was written
		begin := func(p kv.Part) error {
			if p.Name != stream {
				return bus.E(bus.Invalid, "%s is a copy of %s, not of %s", path, quote(p.Name), stream)
			}
			return nil
		}
		_, counts, err := scanLines(f, lineHandler{begin: begin, each: func(_ string, r kv.StoredRecord) error { return each(r) }})
		if err == nil && len(counts) != 1 {
			err = bus.E(bus.Invalid, "%s is no copy of a stream", path)
		}
		return err
	}
}

// noteRepair leaves a trace: whoever repairs could have put another stream in
// the place of the one there was.
func (a *app) noteRepair(ctx context.Context, nc *nats.Conn, v repairView) {
	audit := kv.OpenAudit(kv.AuditConfig{Conn: nc, Instance: "unibusctl-direct", Now: a.now})
	e := bus.AuditEntry{
		At: a.now().UTC().Truncate(time.Millisecond), Kind: bus.AuditOutcome, Action: "cluster.repair", Actor: directActor, Result: "ok",
		Detail: fmt.Sprintf("%s was %s; made again up to sequence %d", v.Stream, v.State, v.Restored.LastSeq),
	}
	run, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { audit.Run(run); close(done) }()
	rctx, cancel := context.WithTimeout(ctx, auditWithin)
	defer cancel()
	if err := audit.Record(rctx, e); err != nil {
		a.say("WARNING: the audit does not tell of this: %v", err)
	}
	stop()
	<-done
}

func (a *app) printRepair(v repairView) error {
	if a.set.json {
		return a.print(v, nil)
	}
	if v.Restored == nil {
		_, err := fmt.Fprintf(a.out, "%s: %s\n", v.Stream, map[kv.StreamState]string{
			kv.StreamWrites: "takes writes; there is nothing to repair", kv.StreamFrozen: "frozen: --save FILE repairs it",
			kv.StreamMissing: "missing: --from FILE makes it from a copy; without one, restart a membership and restore a backup",
		}[v.State])
		return err
	}
	_, err := fmt.Fprintf(a.out, "made %s again: %d messages, sequences %d to %d, three replicas current, takes writes, in %d ms\n",
		v.Stream, v.Restored.Messages, v.Restored.FirstSeq, v.Restored.LastSeq, v.ElapsedMS)
	a.say("%s is not needed any more once every node is healthy: unibusctl cluster wait", v.Copy)
	return err
}
