package kv

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
)

var update = flag.Bool("update", false, "rewrite the golden vectors")

// chainMaker writes an audit as its writers would, message by message.
type chainMaker struct {
	t      testing.TB
	signer nkeys.KeyPair
	public string
	heads  map[string]auditHead
	stored []storedMessage
	at     time.Time
}

func newChainMaker(t testing.TB) *chainMaker {
	t.Helper()
	m := &chainMaker{t: t, heads: map[string]auditHead{}, at: time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)}
	m.signer, m.public = auditKey(t, 7)
	return m
}

func auditKey(t testing.TB, fill byte) (nkeys.KeyPair, string) {
	t.Helper()
	kp, err := nkeys.FromRawSeed(nkeys.PrefixByteUser, bytes.Repeat([]byte{fill}, 32))
	if err != nil {
		t.Fatal(err)
	}
	public, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	return kp, public
}

func (m *chainMaker) append(b auditBlock[json.RawMessage], signer AuditSigner) {
	m.t.Helper()
	head := m.heads[b.Instance]
	m.at = m.at.Add(time.Second)
	b.V, b.N, b.Prev, b.PrevSeq, b.At = 1, head.N+1, head.Hash, head.Seq, m.at
	data, err := encodeBlock(b, signer)
	if err != nil {
		m.t.Fatal(err)
	}
	seq := uint64(len(m.stored) + 1)
	m.stored = append(m.stored, storedMessage{seq: seq, subject: auditPrefix + b.Instance, data: data})
	m.heads[b.Instance] = auditHead{b.N, seq, hashOf(data)}
}

// block appends a block with one entry per action.
func (m *chainMaker) block(instance string, actions ...string) {
	m.t.Helper()
	b := auditBlock[json.RawMessage]{Instance: instance}
	for _, action := range actions {
		raw, err := json.Marshal(cleanEntry(bus.AuditEntry{
			At: m.at, Kind: bus.AuditOutcome, Action: action, Actor: m.public, User: m.public, Request: "r1", Result: "ok", Revision: 12,
		}, m.at))
		if err != nil {
			m.t.Fatal(err)
		}
		b.Entries = append(b.Entries, raw)
	}
	m.append(b, nil)
}

func (m *chainMaker) checkpoint(instance string) {
	m.t.Helper()
	heads := map[string]auditHead{}
	for name, h := range m.heads {
		heads[name] = h
	}
	m.append(auditBlock[json.RawMessage]{Instance: instance, Heads: heads, Signer: m.public}, m.signer)
}

// usual is two chains of one block per turn, with a checkpoint in the middle and
// one at the end, and a probe: sequences 1 to 14.
func usual(t testing.TB) *chainMaker {
	m := newChainMaker(t)
	for i := range 3 {
		m.block("authcallout-n1", fmt.Sprintf("connect.%d", i), "connect.x")
		m.block("membership-n1", fmt.Sprintf("user.add.%d", i))
	}
	m.checkpoint("membership-n1") // 7
	m.stored = append(m.stored, storedMessage{seq: 8, subject: auditPrefix + probeKey})
	for i := range 2 {
		m.block("authcallout-n1", fmt.Sprintf("connect.late.%d", i))
		m.block("membership-n1", fmt.Sprintf("room.create.%d", i), "room.member.add")
	}
	m.checkpoint("membership-n1") // 13
	m.block("authcallout-n1", "connect.last")
	return m
}

func verdictOn(messages []storedMessage, first uint64, signers ...string) bus.AuditReport {
	v := newAuditVerifier(first, signers)
	for _, m := range messages {
		v.message(m.seq, m.subject, m.data)
	}
	return v.finish()
}

// copied is a stream somebody may work on; numbers are given anew, as by a
// stream that is made again.
func (m *chainMaker) copied() []storedMessage {
	out := slices.Clone(m.stored)
	for i := range out {
		out[i].data = bytes.Clone(out[i].data)
	}
	return out
}

func renumber(ms []storedMessage) []storedMessage {
	for i := range ms {
		ms[i].seq = uint64(i + 1)
	}
	return ms
}

// rechain recomputes the numbers and hashes of one chain from a message on, as
// somebody would who can write the stream and has no key for checkpoints.
func rechain(t testing.TB, ms []storedMessage, instance string) {
	t.Helper()
	var tip auditHead
	for i := range ms {
		if ms[i].subject != auditPrefix+instance {
			continue
		}
		line, second, signed := bytes.Cut(ms[i].data, []byte("\n"))
		var b auditBlock[json.RawMessage]
		if err := json.Unmarshal(line, &b); err != nil {
			t.Fatal(err)
		}
		if b.N != tip.N+1 || b.Prev != tip.Hash || b.PrevSeq != tip.Seq {
			b.N, b.Prev, b.PrevSeq = tip.N+1, tip.Hash, tip.Seq
			data, err := encodeBlock(b, nil)
			if err != nil {
				t.Fatal(err)
			}
			if signed {
				data = append(append(data, '\n'), second...)
			}
			ms[i].data = data
		}
		tip = auditHead{b.N, ms[i].seq, hashOf(ms[i].data)}
	}
}

// TestVerifyAudit: an audit as it was written is found good, and whatever is
// altered in it is named by sequence, instance and number.
func TestVerifyAudit(t *testing.T) {
	m := usual(t)
	good := verdictOn(m.stored, 1, m.public)
	if !good.OK || good.Blocks != 13 || good.Entries != 16 || good.Checkpoints != 2 || good.Unsigned != 1 || len(good.Chains) != 2 ||
		!slices.Equal(good.Signers, []string{m.public}) || good.FirstSeq != 1 || good.LastSeq != 14 {
		t.Fatalf("the audit as written: %+v", good)
	}
	replace := func(ms []storedMessage, seq int, from, to string) {
		changed := bytes.Replace(ms[seq-1].data, []byte(from), []byte(to), 1)
		if bytes.Equal(changed, ms[seq-1].data) {
			t.Fatalf("%q is not in %s", from, ms[seq-1].data)
		}
		ms[seq-1].data = changed
	}
	swapEntries := func(ms []storedMessage, seq int) {
		replace(ms, seq, `connect.1"`, `connect.y"`)
		replace(ms, seq, `connect.x"`, `connect.1"`)
		replace(ms, seq, `connect.y"`, `connect.x"`)
	}
	type place struct {
		seq      uint64
		instance string
		n        uint64
	}
	const callout, member = "authcallout-n1", "membership-n1"
	for _, c := range []struct {
		name   string
		tamper func(ms []storedMessage) []storedMessage
		found  place
		says   string
	}{
		{"an entry is altered", func(ms []storedMessage) []storedMessage {
			replace(ms, 3, "connect.1", "connect.9")
			return ms
		}, place{3, callout, 2}, "was altered"},
		{"an entry is altered and the chain recomputed", func(ms []storedMessage) []storedMessage {
			replace(ms, 3, "connect.1", "connect.9")
			rechain(t, ms, callout)
			return ms
		}, place{5, callout, 3}, "a block from 1 to 3 was altered"},
		{"an entry is altered between the checkpoints and the chain recomputed", func(ms []storedMessage) []storedMessage {
			replace(ms, 11, "connect.late.1", "connect.late.8")
			rechain(t, ms, callout)
			return ms
		}, place{11, callout, 5}, "a block from 4 to 5 was altered"},
		{"the checkpoint's own chain is recomputed", func(ms []storedMessage) []storedMessage {
			replace(ms, 4, "user.add.1", "user.add.9")
			rechain(t, ms, member)
			return ms
		}, place{7, member, 4}, "forged or altered"},
		{"a block is removed", func(ms []storedMessage) []storedMessage {
			return slices.Delete(ms, 2, 3)
		}, place{0, callout, 2}, "block 2 is missing before sequence 5"},
		{"blocks are removed and the chain recomputed", func(ms []storedMessage) []storedMessage {
			ms = slices.Delete(ms, 2, 3)
			rechain(t, ms, callout)
			return ms
		}, place{0, callout, 3}, "which the checkpoint at sequence 7 names, is missing"},
		{"two blocks are swapped", func(ms []storedMessage) []storedMessage {
			ms[2].data, ms[4].data = ms[4].data, ms[2].data
			return ms
		}, place{5, callout, 2}, "out of order"},
		{"blocks of two chains are swapped", func(ms []storedMessage) []storedMessage {
			ms[2], ms[3] = ms[3], ms[2]
			return renumber(ms)
		}, place{4, callout, 2}, "stood at sequence 3"},
		{"the entries of a block are swapped", func(ms []storedMessage) []storedMessage {
			swapEntries(ms, 3)
			return ms
		}, place{3, callout, 2}, "was altered"},
		{"a block is moved to another chain", func(ms []storedMessage) []storedMessage {
			ms[2].subject = auditPrefix + member
			return ms
		}, place{3, member, 2}, "a block of authcallout-n1"},
		{"a forged block is put between and the chain recomputed", func(ms []storedMessage) []storedMessage {
			forged := ms[2]
			forged.data = bytes.Replace(forged.data, []byte("connect.1"), []byte("connect.7"), 1)
			ms = renumber(slices.Insert(ms, 3, forged))
			rechain(t, ms, callout)
			return ms
		}, place{4, callout, 3}, "is not the one that the checkpoint"},
		{"a block is stored twice", func(ms []storedMessage) []storedMessage {
			return renumber(slices.Insert(ms, 6, ms[4]))
		}, place{7, callout, 3}, "a copy of sequence 5"},
		{"a second version of a block", func(ms []storedMessage) []storedMessage {
			other := ms[4]
			other.data = bytes.Replace(other.data, []byte("connect.2"), []byte("connect.3"), 1)
			return renumber(slices.Insert(ms, 6, other))
		}, place{7, callout, 3}, "another stands at sequence 5"},
		{"the tail is cut behind a checkpoint that is kept", func(ms []storedMessage) []storedMessage {
			kept := slices.Concat(ms[:4], ms[5:8]) // without block 3 of the callout, and all that followed
			return kept
		}, place{0, callout, 3}, "which the checkpoint at sequence 7 names, is missing"},
		{"a checkpoint is forged with another key", func(ms []storedMessage) []storedMessage {
			forger := &chainMaker{t: t, heads: map[string]auditHead{}, at: m.at}
			forger.signer, forger.public = auditKey(t, 9)
			forger.heads[member] = m.heads[member]
			forger.stored = ms
			forger.checkpoint(member)
			return forger.stored
		}, place{15, member, 8}, "not trusted"},
		{"a checkpoint is forged in the name of the key", func(ms []storedMessage) []storedMessage {
			forger := &chainMaker{t: t, heads: map[string]auditHead{member: m.heads[member]}, at: m.at, stored: ms, public: m.public}
			forger.signer, _ = auditKey(t, 9)
			forger.checkpoint(member)
			return forger.stored
		}, place{15, member, 8}, "forged or altered"},
		{"an old checkpoint is replayed", func(ms []storedMessage) []storedMessage {
			old := ms[6]
			old.seq = 15
			return append(ms, old)
		}, place{15, member, 4}, "a copy of sequence 7"},
		{"an old checkpoint is replayed in the next place", func(ms []storedMessage) []storedMessage {
			old := ms[6]
			old.seq, old.data = 15, bytes.Replace(old.data, []byte(`"n":4`), []byte(`"n":8`), 1)
			old.data = bytes.Replace(old.data, []byte(`"prev":"`+m.prevOf(7)), []byte(`"prev":"`+m.heads[member].Hash), 1)
			return append(ms, old)
		}, place{15, member, 8}, "forged or altered"},
		{"a checkpoint goes back", func(ms []storedMessage) []storedMessage {
			forger := &chainMaker{t: t, heads: map[string]auditHead{member: m.heads[member]}, at: m.at, stored: ms, signer: m.signer, public: m.public}
			forger.heads[callout] = auditHead{3, 5, hashOf(ms[4].data)}
			forger.checkpoint(member)
			return forger.stored
		}, place{15, member, 8}, "names block 3 of authcallout-n1, and the one before it block 5"},
		{"a checkpoint forgets a chain", func(ms []storedMessage) []storedMessage {
			forger := &chainMaker{t: t, heads: map[string]auditHead{member: m.heads[member]}, at: m.at, stored: ms, signer: m.signer, public: m.public}
			forger.checkpoint(member)
			return forger.stored
		}, place{15, member, 8}, "forgets authcallout-n1"},
		{"the oldest messages are gone and were not trimmed", func(ms []storedMessage) []storedMessage {
			return renumber(ms[3:])
		}, place{0, callout, 1}, "blocks 1 to 2 are missing"},
		{"a chain begins again", func(ms []storedMessage) []storedMessage {
			again := newChainMaker(t)
			again.stored = ms
			again.block(callout, "connect.new")
			again.block(callout, "connect.new2")
			return again.stored
		}, place{15, callout, 1}, "a second block 1"},
		{"noise", func(ms []storedMessage) []storedMessage {
			return append(ms, storedMessage{seq: 15, subject: auditPrefix + callout, data: []byte("noise\x1b[2J")})
		}, place{15, callout, 0}, "no readable block"},
		{"a foreign subject", func(ms []storedMessage) []storedMessage {
			return append(ms, storedMessage{seq: 15, subject: auditPrefix + "a.b", data: ms[0].data})
		}, place{15, "", 0}, "where no instance writes"},
		{"a clock goes back", func(ms []storedMessage) []storedMessage {
			forger := &chainMaker{t: t, heads: m.copyHeads(), at: m.at.Add(-time.Hour), stored: ms}
			forger.block(callout, "connect.early")
			return forger.stored
		}, place{15, callout, 7}, "clock went back"},
	} {
		t.Run(c.name, func(t *testing.T) {
			report := verdictOn(c.tamper(m.copied()), 1, m.public)
			if report.OK {
				t.Fatal("nothing was found")
			}
			if !slices.ContainsFunc(report.Findings, func(f bus.AuditFinding) bool {
				return (place{f.Seq, f.Instance, f.N}) == c.found && strings.Contains(f.Problem, c.says)
			}) {
				t.Errorf("%v %q is not among %+v", c.found, c.says, report.Findings)
			}
			for _, f := range report.Findings {
				if strings.ContainsFunc(f.Problem, func(r rune) bool { return r < ' ' }) {
					t.Errorf("%q could write on a terminal", f.Problem)
				}
			}
		})
	}
}

func (m *chainMaker) copyHeads() map[string]auditHead {
	out := map[string]auditHead{}
	for k, v := range m.heads {
		out[k] = v
	}
	return out
}

func (m *chainMaker) prevOf(seq int) string {
	b, _, err := decodeBlock(m.stored[seq-1].data)
	if err != nil {
		m.t.Fatal(err)
	}
	return b.Prev
}

// TestVerifyAuditPrecision: one altered byte is one finding, at the block that
// was altered, wherever it is and whichever byte it is.
func TestVerifyAuditPrecision(t *testing.T) {
	m := usual(t)
	for i, stored := range m.stored {
		if len(stored.data) == 0 || i > 8 { // every chain goes on behind these
			continue
		}
		for at := i % 5; at < len(stored.data); at += 5 {
			ms := m.copied()
			ms[i].data[at] ^= 1
			report := verdictOn(ms, 1, m.public)
			here := func(f bus.AuditFinding) bool {
				return f.Seq == stored.seq || f.Seq == 0 && auditPrefix+f.Instance == stored.subject || f.Instance == "authcallout-n0" || strings.Contains(f.Problem, fmt.Sprintf("sequence %d)", stored.seq))
			}
			if report.OK || !slices.ContainsFunc(report.Findings, here) {
				t.Fatalf("byte %d of sequence %d: %+v", at, stored.seq, report.Findings)
			}
		}
	}
}

// TestVerifyAuditLimits: what nothing can find is not claimed. The newest blocks
// are covered by no checkpoint, and a rewritten tail passes; the report counts
// them.
func TestVerifyAuditLimits(t *testing.T) {
	m := usual(t)
	cut := verdictOn(m.copied()[:13], 1, m.public)
	if !cut.OK || cut.Unsigned != 0 {
		t.Errorf("the tail behind the last checkpoint is cut: %+v", cut)
	}
	any := verdictOn(m.copied(), 1)
	if !any.OK || any.Checkpoints != 2 || !slices.Equal(any.Signers, []string{m.public}) {
		t.Errorf("without trusted keys: %+v", any)
	}
	none := verdictOn(m.copied()[:6], 1)
	if !none.OK || none.Unsigned != 6 || none.Checkpoints != 0 {
		t.Errorf("without a checkpoint: %+v", none)
	}
}

// TestVerifyAuditTrimmed: what a full stream has discarded is no finding,
// wherever the cut goes, and what is left is still held to its checkpoints.
func TestVerifyAuditTrimmed(t *testing.T) {
	m := usual(t)
	for cut := 1; cut < len(m.stored); cut++ {
		report := verdictOn(m.stored[cut:], m.stored[cut].seq, m.public)
		if !report.OK {
			t.Errorf("trimmed before sequence %d: %+v", m.stored[cut].seq, report.Findings)
		}
	}
	ms := m.copied()[4:]
	ms[0].data = bytes.Replace(ms[0].data, []byte("connect.2"), []byte("connect.3"), 1)
	if report := verdictOn(ms, 5, m.public); report.OK {
		t.Error("an altered block at the cut was not found")
	}
}

// TestVerifyAuditFlood: a stream full of noise costs a bounded report.
func TestVerifyAuditFlood(t *testing.T) {
	m := usual(t)
	ms := m.copied()
	for i := range 1000 {
		ms = append(ms, storedMessage{seq: uint64(15 + i), subject: fmt.Sprintf("%sx.%d", auditPrefix, i)})
	}
	report := verdictOn(ms, 1)
	if len(report.Findings) != maxFindings+1 || report.Findings[maxFindings].Problem != "and 900 more findings" {
		t.Errorf("%d findings, the last %+v", len(report.Findings), report.Findings[len(report.Findings)-1])
	}
	far := newChainMaker(t)
	far.heads["a"] = auditHead{maxBlockNumber - 1, 1, strings.Repeat("0", 64)}
	far.block("a", "x")
	far.block("a", "y") // beyond what a number may be
	if report := verdictOn(far.stored, 1); len(report.Findings) != 2 {
		t.Errorf("a huge number: %+v", report.Findings)
	}
}

// auditVector is testdata/audit.json: messages as stored, for readers in other
// languages.
type auditVector struct {
	Signer   string        `json:"signer"`
	Seed     string        `json:"seed"` // of the signer; used nowhere else
	Signed   string        `json:"signed"`
	Messages []auditStored `json:"messages"`
}

type auditStored struct {
	Seq     uint64 `json:"seq"`
	Subject string `json:"subject"`
	Data    string `json:"data"`
	SHA256  string `json:"sha256"`
}

// TestAuditVectors holds the format to its vectors: two blocks and a checkpoint
// over them.
func TestAuditVectors(t *testing.T) {
	m := newChainMaker(t)
	m.block("membership-n1", "user.add", "room.create")
	m.block("membership-n1", "user.revoke")
	m.checkpoint("membership-n1")
	seed, err := m.signer.Seed()
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := bytes.Cut(m.stored[2].data, []byte("\n"))
	v := auditVector{Signer: m.public, Seed: string(seed), Signed: auditDomain + string(line)}
	for _, s := range m.stored {
		v.Messages = append(v.Messages, auditStored{s.seq, s.subject, string(s.data), hashOf(s.data)})
	}
	var want bytes.Buffer
	enc := json.NewEncoder(&want)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	const file = "testdata/audit.json"
	if *update {
		if err := os.WriteFile(file, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Fatalf("%s is not what the code writes now:\n%s", file, want.Bytes())
	}
	var read auditVector
	if err := json.Unmarshal(got, &read); err != nil {
		t.Fatal(err)
	}
	var stored []storedMessage
	for _, s := range read.Messages {
		stored = append(stored, storedMessage{seq: s.Seq, subject: s.Subject, data: []byte(s.Data)})
	}
	if report := verdictOn(stored, 1, read.Signer); !report.OK || report.Checkpoints != 1 || report.Unsigned != 0 {
		t.Errorf("the vectors: %+v", report)
	}
}

// FuzzAuditBlock: whatever lies in the stream, reading it ends, and a block that
// reads well says who it is.
func FuzzAuditBlock(f *testing.F) {
	m := usual(f)
	for _, s := range m.stored {
		f.Add(s.data)
	}
	f.Add([]byte(`{"v":1,"instance":"a","n":1,"prev":"","at":"2026-11-25T00:00:00Z","heads":{"a":{}},"signer":"U"}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, sig, err := decodeBlock(data)
		if err == nil && (b.N == 0 || !auditInstance.MatchString(b.Instance) || len(b.Entries) > maxBlockEntries || (sig != nil) != (b.Signer != "")) {
			t.Errorf("%q reads as %+v", data, b)
		}
		v := newAuditVerifier(1, nil)
		for seq, s := range m.stored[:7] {
			v.message(uint64(2*seq+1), s.subject, s.data)
			v.message(uint64(2*seq+2), s.subject, data)
		}
		if r := v.finish(); r.OK {
			t.Errorf("a foreign message after each block of two chains, and nothing found: %q", data)
		}
	})
}

// TestAuditEntriesAreBounded: what a stranger chose cannot grow a block or reach
// a terminal.
func TestAuditEntriesAreBounded(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 123456789, time.UTC)
	long := "x" + strings.Repeat("é", 500) + "\x00" // a character across the end
	hostile := bus.AuditEntry{
		Kind: "connect", Action: "a\nb\x1b[2Jc", Actor: "\xff\xfe", User: long, Room: bus.RoomID("x\u202ey"), From: "::1", Request: "r\tr",
		Result: "deny", Code: bus.Code("c\u0085"), Detail: strings.Repeat("<", 10_000) + "aé",
	}
	kept := boundEntry(hostile)
	if len(kept.User) > maxAuditText+utf8.UTFMax || len(kept.Detail) > maxAuditText+utf8.UTFMax {
		t.Errorf("%d and %d bytes wait", len(kept.User), len(kept.Detail))
	}
	e := cleanEntry(kept, now)
	if e != cleanEntry(hostile, now) {
		t.Errorf("%+v by one way, %+v by the other", e, cleanEntry(hostile, now))
	}
	for _, s := range []string{string(e.Kind), e.Action, e.Actor, e.User, string(e.Room), e.From, e.Request, e.Result, string(e.Code), e.Detail} {
		if len(s) > maxAuditText || !utf8.ValidString(s) || strings.ContainsAny(s, "\n\t\x00\x1b\u202e\u0085") {
			t.Errorf("%q", s)
		}
	}
	if e.Action != "a?b?[2Jc" || e.User != "x"+strings.Repeat("é", 99) || !e.At.Equal(now.Truncate(time.Millisecond)) {
		t.Errorf("%+v", e)
	}
}

// TestAuditBlocksAreBounded: the queue fills blocks that the stream takes, in
// order, and what it cannot hold is counted.
func TestAuditBlocksAreBounded(t *testing.T) {
	a := OpenAudit(AuditConfig{Instance: "membership-n1"})
	a.fault = nil // it never writes to a server here
	for i := range maxQueued + 5 {
		a.Note(bus.AuditEntry{Kind: bus.AuditOutcome, Action: fmt.Sprintf("n%d", i), Detail: strings.Repeat("<", 300), From: strings.Repeat("\"", 300)})
	}
	if a.Dropped() != 5 {
		t.Errorf("%d dropped of 5", a.Dropped())
	}
	next, dropped := 0, uint64(0)
	for f := a.take(); f != nil; f = a.take() {
		dropped += f.dropped
		if err := a.build(f); err != nil {
			t.Fatal(err)
		}
		if len(f.data) > maxBlock {
			t.Fatalf("a block of %d bytes", len(f.data))
		}
		b, _, err := decodeBlock(f.data)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range b.Entries {
			if e.Action != fmt.Sprintf("n%d", next) {
				t.Fatalf("%s in the place of n%d", e.Action, next)
			}
			next++
		}
		a.landed(f, f.n)
	}
	if next != maxQueued || dropped != 5 || a.patience() <= 0 {
		t.Errorf("%d entries, %d dropped", next, dropped)
	}
}

// TestAuditFolds: whoever knocks in a loop, under whatever names, leaves a few
// entries a minute and a count; whoever comes from a new address is seen.
func TestAuditFolds(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	a := OpenAudit(AuditConfig{Instance: "authcallout-n1", Now: func() time.Time { return now }})
	a.fault = nil
	deny := func(code bus.Code, user, from string) {
		a.Note(bus.AuditEntry{Kind: bus.AuditConnect, Action: "connect", User: user, From: from, Result: "deny", Code: code})
	}
	for i := range 1000 {
		deny(bus.Unauthenticated, fmt.Sprintf("U%d", i), "10.0.0.1")
	}
	if a.notes != foldPass {
		t.Errorf("%d entries for a stranger of many names", a.notes)
	}
	for i := range 1000 {
		deny(bus.Forbidden, "UA", "10.0.0.1")
		if i == 999 {
			deny(bus.Forbidden, "UA", "10.0.0.2")
		}
	}
	deny(bus.Forbidden, "UB", "10.0.0.1")
	if a.notes != 2*foldPass+2 {
		t.Errorf("%d entries, want %d", a.notes, 2*foldPass+2)
	}
	now = now.Add(foldTime)
	a.mu.Lock()
	a.sweepLocked(now, false)
	a.mu.Unlock()
	told := map[string]int{}
	for _, i := range a.queue[2*foldPass+2:] {
		told[i.entry.Detail]++
	}
	if len(told) != 1 || told["984 more like this within 1m0s"] != 2 || len(a.folds) != 0 {
		t.Errorf("told %v", told)
	}
	for i := range maxFolds + 10 {
		deny(bus.Forbidden, fmt.Sprintf("U%d", i), "10.0.0.1")
	}
	if len(a.folds) > maxFolds || a.Dropped() == 0 {
		t.Errorf("%d folds, %d dropped", len(a.folds), a.Dropped())
	}
}

// TestRecordWithoutAStream: who must know that something is recorded hears that
// it is not, in time, and the entry does not come later behind their back.
func TestRecordWithoutAStream(t *testing.T) {
	if err := OpenAudit(AuditConfig{Instance: "a.b"}).Record(t.Context(), bus.AuditEntry{}); bus.CodeOf(err) != bus.Internal {
		t.Errorf("an impossible name: %v", err)
	}
	a := OpenAudit(AuditConfig{Instance: "membership-n1"})
	a.fault = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Record(ctx, bus.AuditEntry{Action: "user.add"}); bus.CodeOf(err) != bus.Unavailable || !strings.Contains(err.Error(), "nothing was recorded") {
		t.Errorf("nobody writes: %v", err)
	}
	if len(a.queue) != 0 || a.records != 0 {
		t.Errorf("the entry still waits: %d", len(a.queue))
	}
}

// TestAuditCursor: a cursor has one spelling.
func TestAuditCursor(t *testing.T) {
	for s, want := range map[string]AuditCursor{"": {}, "1.0": {1, 0}, "91.200": {91, 200}} {
		if got, err := ParseAuditCursor(s); err != nil || got != want {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"1", "1.", ".1", "0.1", "01.1", "1.01", "+1.1", "1.-1", "1.1.1", "99999999999999999999.1", "a.b", "1.99999"} {
		if _, err := ParseAuditCursor(s); bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// TestAuditWriterNeverGoesBack: a stream that has lost or altered what a writer
// knows does not draw the writer along.
func TestAuditWriterNeverGoesBack(t *testing.T) {
	m := usual(t)
	a := OpenAudit(AuditConfig{Instance: "authcallout-n1"})
	at := func(seq int) *storedMessage { return &m.stored[seq-1] }
	a.adopt(at(5))
	if a.head.N != 3 || a.last != 5 {
		t.Fatalf("%+v", a.head)
	}
	known := a.head
	altered := *at(5)
	altered.data = bytes.Replace(altered.data, []byte("connect.2"), []byte("connect.3"), 1)
	noise := storedMessage{seq: 9, subject: auditPrefix + "authcallout-n1", data: []byte("noise")}
	for name, m := range map[string]*storedMessage{"older": at(3), "altered": &altered, "gone": nil, "noise": &noise} {
		a.adopt(m)
		if a.head != known || m != nil && a.last != m.seq || m == nil && a.last != 0 {
			t.Errorf("%s: %+v, last %d", name, a.head, a.last)
		}
	}
	a.adopt(at(9))
	if a.head.N != 4 || a.last != 9 {
		t.Errorf("a block of another process: %+v", a.head)
	}
}

// TestALinkSignsOnlyNonces: the key that answers a server's nonce signs
// checkpoints too, and the server chooses the nonce.
func TestALinkSignsOnlyNonces(t *testing.T) {
	kp, _ := auditKey(t, 7)
	seed, err := kp.Seed()
	if err != nil {
		t.Fatal(err)
	}
	file := t.TempDir() + "/x.nk"
	if err := os.WriteFile(file, seed, 0o600); err != nil {
		t.Fatal(err)
	}
	option, err := nkeyOption(file)
	if err != nil {
		t.Fatal(err)
	}
	var o nats.Options
	if err := option(&o); err != nil {
		t.Fatal(err)
	}
	if _, err := o.SignatureCB([]byte("dGVzdCBub25jZQ_-")); err != nil {
		t.Errorf("a nonce: %v", err)
	}
	for _, crafted := range []string{auditDomain + `{"v":1}`, "", "short", "\"@method\": GET", strings.Repeat("a", 65)} {
		if sig, err := o.SignatureCB([]byte(crafted)); err == nil {
			t.Errorf("signed %q: %x", crafted, sig)
		}
	}
}
