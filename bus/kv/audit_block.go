package kv

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
)

// The audit is a set of chains, one per writing instance, each on a subject of
// its own. docs/audit.md is the format, testdata/audit.json holds vectors.
const (
	auditPrefix  = "unibus.audit."
	auditBlocks  = auditPrefix + "*" // write probes have more tokens
	auditVersion = 1
	// auditDomain keeps a signed checkpoint from being anything else that the
	// same key signs.
	auditDomain     = "unibus/v1/audit-checkpoint\x00"
	maxBlock        = 60 << 10 // bytes; the stream takes 64 KiB with headers
	maxBlockEntries = 200
	maxBlockNumber  = 1<<53 - 1 // what every JSON reader holds exactly
	maxAuditText    = 200       // bytes of each text of an entry
	headSize        = 140       // bytes of a head in JSON, at most, without its name
	// clockBack is how far a writer's clock may go back between two blocks.
	clockBack   = 5 * time.Minute
	maxFindings = 100
)

var (
	auditInstance = regexp.MustCompile(`^[A-Za-z0-9_-]{1,129}$`)
	hashForm      = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// auditBlock is one message of a chain. A block with a signer is a checkpoint;
// its signature is a second line behind the JSON, so that what is signed is
// exactly what is stored and nobody needs a canonical form.
type auditBlock[E any] struct {
	V        int                  `json:"v"`
	Instance string               `json:"instance"`
	N        uint64               `json:"n"`                  // counts from 1
	Prev     string               `json:"prev"`               // hash of the block before, as stored; empty at 1
	PrevSeq  uint64               `json:"prev_seq,omitempty"` // where that one is stored: holds the order of the chains among each other
	At       time.Time            `json:"at"`
	Dropped  uint64               `json:"dropped,omitempty"` // entries lost since the block before
	Entries  []E                  `json:"entries,omitempty"`
	Heads    map[string]auditHead `json:"heads,omitempty"`
	Signer   string               `json:"signer,omitempty"`
}

// auditHead is the newest block of a chain.
type auditHead struct {
	N    uint64 `json:"n"`
	Seq  uint64 `json:"seq"`
	Hash string `json:"hash"`
}

// AuditSigner signs checkpoints. An nkeys.KeyPair is one; SeedSigner keeps no
// seed in memory.
type AuditSigner interface {
	PublicKey() (string, error)
	Sign(input []byte) ([]byte, error)
}

// encodeBlock makes the stored bytes of a block; signer must be that of
// b.Signer, or nil.
func encodeBlock(b auditBlock[json.RawMessage], signer AuditSigner) ([]byte, error) {
	line, err := json.Marshal(b)
	if err != nil || signer == nil {
		return line, err
	}
	sig, err := signer.Sign(append([]byte(auditDomain), line...))
	if err != nil {
		return nil, fmt.Errorf("sign a checkpoint: %w", err)
	}
	return base64.RawURLEncoding.AppendEncode(append(line, '\n'), sig), nil
}

// decodeBlock reads a block and checks its form, not its place and not its
// signature. sig is nil for a block that is no checkpoint.
func decodeBlock(data []byte) (b auditBlock[bus.AuditEntry], sig []byte, err error) {
	line, second, signed := bytes.Cut(data, []byte("\n"))
	if err := json.Unmarshal(line, &b); err != nil {
		return b, nil, err
	}
	switch {
	case b.V != auditVersion:
		return b, nil, fmt.Errorf("version %d", b.V)
	case !auditInstance.MatchString(b.Instance):
		return b, nil, fmt.Errorf("instance %.40q", b.Instance)
	case b.N < 1 || b.N > maxBlockNumber:
		return b, nil, fmt.Errorf("number %d", b.N)
	case b.N == 1 && (b.Prev != "" || b.PrevSeq > 0), b.N > 1 && (!hashForm.MatchString(b.Prev) || b.PrevSeq == 0):
		return b, nil, fmt.Errorf("block %d cannot follow %.40q", b.N, b.Prev)
	case len(b.Entries) > maxBlockEntries:
		return b, nil, fmt.Errorf("%d entries", len(b.Entries))
	case signed != (b.Signer != ""), !signed && len(b.Heads) > 0:
		return b, nil, errors.New("neither a block nor a signed checkpoint")
	}
	for name, h := range b.Heads {
		if !auditInstance.MatchString(name) || h.N < 1 || h.N > maxBlockNumber || h.Seq < 1 || !hashForm.MatchString(h.Hash) {
			return b, nil, fmt.Errorf("the head of %.40q has no known form", name)
		}
	}
	if signed {
		if sig, err = base64.RawURLEncoding.Strict().DecodeString(string(second)); err != nil || len(sig) != 64 {
			return b, nil, errors.New("the signature has no known form")
		}
	}
	return b, sig, nil
}

// genuine reports whether the signer that a checkpoint names has signed it.
func genuine(data []byte, signer string, sig []byte) bool {
	line, _, _ := bytes.Cut(data, []byte("\n"))
	key, err := nkeys.FromPublicKey(signer)
	return err == nil && nkeys.IsValidPublicUserKey(signer) && key.Verify(append([]byte(auditDomain), line...), sig) == nil
}

func hashOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// cleanEntry bounds an entry and makes it printable: some of it was chosen by
// strangers and will be shown on a terminal.
func cleanEntry(e bus.AuditEntry, now time.Time) bus.AuditEntry {
	for _, s := range []*string{(*string)(&e.Kind), &e.Action, &e.Actor, &e.User, (*string)(&e.Room), &e.From, &e.Request, &e.Result, (*string)(&e.Code), &e.Detail} {
		*s = cleanText(*s)
	}
	if y := e.At.Year(); y < 1970 || y > 9999 { // the latter has no JSON form
		e.At = now
	}
	e.At = e.At.UTC().Truncate(time.Millisecond)
	return e
}

func cleanText(s string) string {
	if len(s) > maxAuditText {
		cut := maxAuditText
		for cut > maxAuditText-utf8.UTFMax && !utf8.RuneStart(s[cut]) {
			cut-- // not half a character
		}
		s = s[:cut]
	}
	if strings.IndexFunc(s, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }) < 0 {
		return s
	}
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// auditVerifier checks the messages of the whole stream, in their order. It is
// a pure function of them, so what it finds can be tested byte by byte.
type auditVerifier struct {
	first   uint64          // of the stream: what is older was trimmed
	trusted map[string]bool // nil: any signer
	trails  map[string]*auditTrail
	report  bus.AuditReport
	more    int // findings beyond maxFindings
}

// auditTrail is what is known of one chain.
type auditTrail struct {
	tip     auditHead
	at      time.Time
	places  []auditHead // every block, by number
	missing []missingBlocks
	covered uint64               // newest block that a checkpoint confirms
	heads   map[string]auditHead // of its newest checkpoint
	broken  bool                 // a checkpoint has contradicted it already
	moved   bool                 // it is known to be stored elsewhere than it was written
}

type missingBlocks struct{ from, to, before uint64 } // before: sequence of the block that follows

func newAuditVerifier(first uint64, signers []string) *auditVerifier {
	v := &auditVerifier{first: first, trails: map[string]*auditTrail{}}
	v.report = bus.AuditReport{FirstSeq: first, Chains: []bus.AuditChain{}, Signers: []string{}, Findings: []bus.AuditFinding{}}
	if len(signers) > 0 {
		v.trusted = map[string]bool{}
		for _, s := range signers {
			v.trusted[s] = true
		}
	}
	return v
}

func (v *auditVerifier) find(seq uint64, instance string, n uint64, format string, args ...any) {
	if len(v.report.Findings) == maxFindings {
		v.more++
		return
	}
	v.report.Findings = append(v.report.Findings, bus.AuditFinding{Seq: seq, Instance: instance, N: n, Problem: fmt.Sprintf(format, args...)})
}

// message takes the next message of the stream.
func (v *auditVerifier) message(seq uint64, subject string, data []byte) {
	v.report.LastSeq = seq
	instance := strings.TrimPrefix(subject, auditPrefix)
	if strings.HasPrefix(instance, barrierKeys) {
		return // a write probe
	}
	if !auditInstance.MatchString(instance) {
		v.find(seq, "", 0, "a message on %.80q, where no instance writes", cleanText(subject))
		return
	}
	b, sig, err := decodeBlock(data)
	if err != nil {
		v.find(seq, instance, 0, "no readable block: %s", cleanText(err.Error()))
		return
	}
	if b.Instance != instance {
		v.find(seq, instance, b.N, "a block of %s stands in this chain", b.Instance)
		return
	}
	v.report.Blocks++
	v.report.Entries += len(b.Entries)
	v.report.Dropped += b.Dropped
	t := v.trails[instance]
	if t == nil {
		t = &auditTrail{}
		v.trails[instance] = t
	}
	here := auditHead{N: b.N, Seq: seq, Hash: hashOf(data)}
	if !v.link(t, b, here) {
		return
	}
	if b.At.Before(t.at.Add(-clockBack)) {
		v.find(seq, instance, b.N, "the writer's clock went back from %s to %s", t.at.Format(time.RFC3339), b.At.Format(time.RFC3339))
	}
	t.at = b.At
	if sig != nil {
		v.checkpoint(t, b, here, data, sig)
	}
}

// link puts a block into its chain. It is false if the block has no place
// there, so that what it says must not count.
func (v *auditVerifier) link(t *auditTrail, b auditBlock[bus.AuditEntry], here auditHead) bool {
	i, known := t.place(b.N)
	restart := false
	switch {
	case known && t.places[i].Hash == here.Hash:
		v.find(here.Seq, b.Instance, b.N, "block %d comes again, a copy of sequence %d", b.N, t.places[i].Seq)
		return false
	case known:
		v.find(here.Seq, b.Instance, b.N, "a second block %d: another stands at sequence %d", b.N, t.places[i].Seq)
		if restart = b.N == 1; !restart {
			return false
		}
	case b.N < t.tip.N:
		v.find(here.Seq, b.Instance, b.N, "out of order: block %d stands behind block %d", b.N, t.tip.N)
		t.arrived(b.N)
		t.places = slices.Insert(t.places, i, here)
		return false
	case t.tip.N == 0 && b.N > 1 && v.first > 1:
		// Its predecessors may have been trimmed with the oldest messages.
	case b.N > t.tip.N+1:
		t.missing = append(t.missing, missingBlocks{t.tip.N + 1, b.N - 1, here.Seq})
	case b.Prev != t.tip.Hash:
		v.find(t.tip.Seq, b.Instance, t.tip.N, "block %d is not the one that block %d (sequence %d) was written behind: one of the two was altered", t.tip.N, b.N, here.Seq)
	case b.PrevSeq != t.tip.Seq && !t.moved:
		t.moved = true // the rest of the chain may have moved with it
		v.find(t.tip.Seq, b.Instance, t.tip.N, "block %d stood at sequence %d when block %d was written: the stream was rewritten", t.tip.N, b.PrevSeq, b.N)
	}
	if !restart {
		t.places = slices.Insert(t.places, i, here)
	}
	t.tip = here
	return true
}

func (t *auditTrail) place(n uint64) (int, bool) {
	if n > t.tip.N && (len(t.places) == 0 || t.places[len(t.places)-1].N < n) {
		return len(t.places), false
	}
	return slices.BinarySearchFunc(t.places, n, func(h auditHead, n uint64) int { return cmp.Compare(h.N, n) })
}

// arrived takes a block that came late out of what is missing.
func (t *auditTrail) arrived(n uint64) {
	for i, m := range t.missing {
		if n < m.from || n > m.to {
			continue
		}
		var rest []missingBlocks
		if m.from < n {
			rest = append(rest, missingBlocks{m.from, n - 1, m.before})
		}
		if n < m.to {
			rest = append(rest, missingBlocks{n + 1, m.to, m.before})
		}
		t.missing = slices.Replace(t.missing, i, i+1, rest...)
		return
	}
}

// checkpoint holds every chain to what a signed checkpoint says of it.
func (v *auditVerifier) checkpoint(own *auditTrail, b auditBlock[bus.AuditEntry], here auditHead, data, sig []byte) {
	if !genuine(data, b.Signer, sig) {
		v.find(here.Seq, b.Instance, b.N, "the signature of the checkpoint is not of %.60s: it was forged or altered", cleanText(b.Signer))
		return
	}
	if v.trusted != nil && !v.trusted[b.Signer] {
		v.find(here.Seq, b.Instance, b.N, "the checkpoint is signed by %s, which is not trusted", b.Signer)
		return
	}
	v.report.Checkpoints++
	if !slices.Contains(v.report.Signers, b.Signer) {
		v.report.Signers = append(v.report.Signers, b.Signer)
	}
	own.covered = max(own.covered, b.N)
	for _, name := range slices.Sorted(maps.Keys(b.Heads)) {
		h, before := b.Heads[name], own.heads[name]
		if h.N < before.N && before.Seq >= v.first {
			v.find(here.Seq, b.Instance, b.N, "the checkpoint names block %d of %s, and the one before it block %d", h.N, name, before.N)
		}
		if h.Seq < v.first {
			continue // trimmed
		}
		v.hold(name, h, here.Seq)
	}
	for _, name := range slices.Sorted(maps.Keys(own.heads)) {
		if _, named := b.Heads[name]; !named && own.heads[name].Seq >= v.first {
			v.find(here.Seq, b.Instance, b.N, "the checkpoint forgets %s, which the one before it names", name)
		}
	}
	own.heads = b.Heads
}

// hold compares one chain with the head that a checkpoint at sequence by names.
func (v *auditVerifier) hold(name string, h auditHead, by uint64) {
	t := v.trails[name]
	if t == nil {
		t = &auditTrail{}
		v.trails[name] = t
	}
	if t.broken {
		return // said once: every later checkpoint says the same
	}
	i, known := t.place(h.N)
	t.broken = true
	switch {
	case !known:
		v.find(0, name, h.N, "block %d, which the checkpoint at sequence %d names, is missing", h.N, by)
	case t.places[i].Hash != h.Hash:
		v.find(t.places[i].Seq, name, h.N, "block %d is not the one that the checkpoint at sequence %d names: a block from %d to %d was altered", h.N, by, t.covered+1, h.N)
	case t.places[i].Seq != h.Seq:
		v.find(t.places[i].Seq, name, h.N, "block %d stood at sequence %d when the checkpoint at sequence %d was made: the stream was rewritten", h.N, h.Seq, by)
	default:
		t.broken = false
		t.covered = max(t.covered, h.N)
	}
}

// finish returns the verdict.
func (v *auditVerifier) finish() bus.AuditReport {
	for _, name := range slices.Sorted(maps.Keys(v.trails)) {
		t := v.trails[name]
		for _, m := range t.missing {
			if m.from == m.to {
				v.find(0, name, m.from, "block %d is missing before sequence %d", m.from, m.before)
			} else {
				v.find(0, name, m.from, "blocks %d to %d are missing before sequence %d", m.from, m.to, m.before)
			}
		}
		if len(t.places) == 0 {
			continue
		}
		i, known := t.place(t.covered)
		if known {
			i++
		}
		v.report.Unsigned += len(t.places) - i
		v.report.Chains = append(v.report.Chains, bus.AuditChain{Instance: name, First: t.places[0].N, Last: t.tip.N, Head: t.tip.Hash})
	}
	if v.more > 0 {
		v.report.Findings = append(v.report.Findings, bus.AuditFinding{Problem: fmt.Sprintf("and %d more findings", v.more)})
	}
	slices.Sort(v.report.Signers)
	v.report.OK = len(v.report.Findings) == 0
	return v.report
}
