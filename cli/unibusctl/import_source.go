package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	_ "modernc.org/sqlite" // the driver, in Go alone: a node needs no library for it

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/kv"
)

// What an import reads at most. A source beyond it is refused, not cut.
const (
	maxImportRecords = 1_000_000
	maxImportRecord  = 1 << 20 // bytes
	maxImportFields  = 256     // of one record
	maxImportDepth   = 16
	sourceWithin     = 10 * time.Minute
)

// sourceValue is a scalar of a record, as text. Whole numbers and decimals keep
// the digits they were written with.
type sourceValue struct {
	text string
	kind valueKind
}

type valueKind string

const (
	kindText   valueKind = "text"
	kindNumber valueKind = "number"
	kindBool   valueKind = "boolean"
	kindNull   valueKind = "null"
	kindBytes  valueKind = "bytes" // as hex
	kindList   valueKind = "list"  // cannot be mapped
)

// sourceRecord is one record of another system: its fields, those of nested
// objects as a.b. problem says why it cannot be read.
type sourceRecord struct {
	name    string // within its container: the key, "line 12", "row 3"
	key     string // in a KV bucket
	fields  map[string]sourceValue
	problem string
}

// container is a bucket, a table, or the lines of one kind.
type container struct {
	name    string
	records []sourceRecord
	unread  int  // entries, of one that is ignored
	deleted int  // keys of a bucket whose last entry is a deletion
	moved   bool // it was written to while it was read
}

// importSource reads everything but what is ignored, and changes nothing where it
// reads.
type importSource interface {
	read(ctx context.Context, ignored func(container string) bool) ([]container, error)
	String() string
}

// natsSource reads KV buckets by asking for one message after the other
// (STREAM.MSG.GET): a consumer would be a change of the other system. The
// leader answers these, so nothing is as old as a lagging replica.
type natsSource struct {
	url, seedFile, caFile string
}

func (s *natsSource) String() string { return s.url }

// secure reports whether TLS is demanded. What is read decides who gets access
// here: off this machine nobody in between may write it.
func (s *natsSource) secure() (bool, error) {
	demanded := false
	for u := range strings.SplitSeq(s.url, ",") {
		p, err := url.Parse(strings.TrimSpace(u))
		if err != nil || p.Host == "" || (p.Scheme != "nats" && p.Scheme != "tls") {
			return false, bus.E(bus.Invalid, "%s is not nats://HOST:PORT or tls://HOST:PORT", quote(withoutUserinfo(u)))
		}
		if p.User != nil {
			return false, bus.E(bus.Invalid, "%s holds a secret, which everybody on this machine can read in the list of processes", quote(withoutUserinfo(u))).
				WithHint("--nkey FILE")
		}
		ip := net.ParseIP(p.Hostname())
		loopback := p.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
		if p.Scheme == "tls" || (!loopback && !guard.Off(guard.ImportTLS)) {
			demanded = true
		}
	}
	return demanded, nil
}

func (s *natsSource) connect() (*nats.Conn, error) {
	secure, err := s.secure()
	if err != nil {
		return nil, err
	}
	opts := []nats.Option{
		nats.Name("unibusctl import"), nats.NoReconnect(), nats.Timeout(5 * time.Second), nats.IgnoreDiscoveredServers(),
		nats.NoCallbacksAfterClientClose(),
	}
	switch {
	case s.caFile != "":
		trust, err := kv.Trust(s.caFile)
		if err != nil {
			return nil, err
		}
		opts = append(opts, func(o *nats.Options) error {
			o.Secure, o.TLSConfig = secure, trust // a server may ask for TLS itself
			return nil
		})
	case secure:
		return nil, &usageError{msg: "the CA of the other system is not known: set --from-ca FILE", hint: "unibusctl import --help"}
	}
	if s.seedFile != "" {
		auth, err := seedOption(s.seedFile)
		if err != nil {
			return nil, err
		}
		opts = append(opts, auth)
	}
	nc, err := nats.Connect(s.url, opts...)
	if err == nil {
		return nc, nil
	}
	var unknown x509.UnknownAuthorityError
	hint := "is it up, and the address right?"
	switch {
	case errors.As(err, &unknown):
		hint = "--from-ca FILE: the CA that signed its certificate"
	case errors.Is(err, nats.ErrAuthorization):
		hint = "--nkey FILE: the seed of a user who may read its buckets"
	case errors.Is(err, nats.ErrSecureConnWanted):
		hint = "tls://, and --from-ca FILE"
	case errors.Is(err, nats.ErrSecureConnRequired):
		hint = "a server without TLS is read from its own machine only, by nats://127.0.0.1"
	}
	return nil, bus.E(bus.Unavailable, "the other system does not let us in at %s: %w", s.url, err).WithHint("%s", hint)
}

// seedOption answers for the user of a seed file.
func seedOption(file string) (nats.Option, error) {
	seed := func() (nkeys.KeyPair, error) {
		raw, err := readSecret(file)
		if err != nil {
			return nil, err
		}
		defer clear(raw)
		kp, err := nkeys.FromSeed(bytes.TrimSpace(raw))
		if err != nil {
			return nil, bus.E(bus.Invalid, "%s does not hold an nkey seed", file).WithHint("one line SU..., as nats --nkey reads it")
		}
		return kp, nil
	}
	kp, err := seed()
	if err != nil {
		return nil, err
	}
	defer kp.Wipe()
	pub, err := kp.PublicKey()
	if err != nil || !strings.HasPrefix(pub, "U") {
		return nil, bus.E(bus.Invalid, "%s does not hold the seed of a user (SU...)", file)
	}
	return nats.Nkey(pub, func(nonce []byte) ([]byte, error) {
		if !bus.ServerNonce(nonce) { // it would be a signature under a text of somebody's choice
			return nil, bus.E(bus.Invalid, "the nonce of the other system has no known form")
		}
		kp, err := seed()
		if err != nil {
			return nil, err
		}
		defer kp.Wipe()
		return kp.Sign(nonce)
	}), nil
}

func (s *natsSource) read(ctx context.Context, ignored func(string) bool) ([]container, error) {
	nc, err := s.connect()
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	names, err := bucketsOf(ctx, nc)
	if err != nil {
		return nil, err
	}
	total := 0
	var out []container
	for _, name := range names {
		c, err := readBucket(ctx, nc, name, maxImportRecords-total, ignored(name))
		if err != nil {
			return nil, err
		}
		total += len(c.records)
		out = append(out, c)
	}
	return out, nil
}

const bucketPrefix = "KV_"

// askJetStream asks one question of JetStream's API. gone is the answer that
// there is no such message.
func askJetStream(ctx context.Context, nc *nats.Conn, subject string, question, answer any) (gone bool, err error) {
	body, err := json.Marshal(question)
	if err != nil {
		return false, bus.E(bus.Internal, "ask the other system: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	m, err := nc.RequestWithContext(ctx, "$JS.API."+subject, body)
	if err != nil {
		return false, bus.E(bus.Unavailable, "the other system does not answer %s: %w", subject, err).
			WithHint("may the user of --nkey ask $JS.API.STREAM.NAMES, $JS.API.STREAM.INFO.* and $JS.API.STREAM.MSG.GET.*?")
	}
	var fault struct {
		Error *struct {
			Code        int    `json:"err_code"`
			Description string `json:"description"`
		} `json:"error"`
	}
	const noMessage = 10037
	switch err := json.Unmarshal(m.Data, &fault); {
	case err != nil:
		return false, bus.E(bus.Internal, "the other system answers %s with something else: %w", subject, err)
	case fault.Error != nil && fault.Error.Code == noMessage:
		return true, nil
	case fault.Error != nil:
		return false, bus.E(bus.Unavailable, "the other system refuses %s: %s", subject, quote(fault.Error.Description))
	}
	if err := json.Unmarshal(m.Data, answer); err != nil {
		return false, bus.E(bus.Internal, "the other system answers %s with something else: %w", subject, err)
	}
	return false, nil
}

func bucketsOf(ctx context.Context, nc *nats.Conn) (names []string, err error) {
	for seen := 0; ; {
		var page struct {
			Total   int      `json:"total"`
			Streams []string `json:"streams"`
		}
		if _, err := askJetStream(ctx, nc, "STREAM.NAMES", map[string]int{"offset": seen}, &page); err != nil {
			return nil, err
		}
		for _, s := range page.Streams {
			if name, ok := strings.CutPrefix(s, bucketPrefix); ok && kvName(name) {
				names = append(names, name)
			}
		}
		seen += len(page.Streams)
		if seen >= page.Total || len(page.Streams) == 0 {
			slices.Sort(names)
			return slices.Compact(names), nil
		}
	}
}

// kvName holds a foreign name to the grammar of buckets before it becomes part
// of a subject.
func kvName(s string) bool {
	return s != "" && len(s) <= 200 && !strings.ContainsFunc(s, func(r rune) bool {
		return r != '_' && r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	})
}

// readBucket takes the newest entry of each key. Entries are asked for in order
// of their sequence up to the newest one at the start.
func readBucket(ctx context.Context, nc *nats.Conn, name string, room int, ignored bool) (container, error) {
	type state struct {
		State struct {
			Last     uint64 `json:"last_seq"`
			Messages int    `json:"messages"`
		} `json:"state"`
	}
	var before, after state
	if _, err := askJetStream(ctx, nc, "STREAM.INFO."+bucketPrefix+name, struct{}{}, &before); err != nil {
		return container{}, err
	}
	if ignored {
		return container{name: name, unread: before.State.Messages}, nil
	}
	newest := map[string]sourceRecord{}
	gone := map[string]bool{}
	for seq := uint64(1); seq <= before.State.Last; {
		var got struct {
			Message struct {
				Subject string `json:"subject"`
				Seq     uint64 `json:"seq"`
				Headers []byte `json:"hdrs"`
				Data    []byte `json:"data"`
			} `json:"message"`
		}
		end, err := askJetStream(ctx, nc, "STREAM.MSG.GET."+bucketPrefix+name, map[string]any{"seq": seq, "next_by_subj": "$KV." + name + ".>"}, &got)
		if err != nil {
			return container{}, err
		}
		m := got.Message
		if end || m.Seq > before.State.Last {
			break
		}
		if m.Seq < seq {
			return container{}, bus.E(bus.Internal, "the other system goes backwards in bucket %s", name)
		}
		seq = m.Seq + 1
		key := strings.TrimPrefix(m.Subject, "$KV."+name+".")
		delete(newest, key)
		delete(gone, key)
		if op := headerOf(m.Headers, "KV-Operation"); op == "DEL" || op == "PURGE" || headerOf(m.Headers, "Nats-Marker-Reason") != "" {
			gone[key] = true
			continue
		}
		r := decodeRecord(m.Data)
		r.name, r.key = key, key
		newest[key] = r
		if len(newest) > room {
			return container{}, tooMany()
		}
	}
	if _, err := askJetStream(ctx, nc, "STREAM.INFO."+bucketPrefix+name, struct{}{}, &after); err != nil {
		return container{}, err
	}
	c := container{name: name, deleted: len(gone), moved: after.State.Last != before.State.Last}
	for _, r := range newest {
		c.records = append(c.records, r)
	}
	slices.SortFunc(c.records, func(x, y sourceRecord) int { return strings.Compare(x.name, y.name) })
	return c, nil
}

func headerOf(raw []byte, name string) string {
	for line := range strings.SplitSeq(string(raw), "\r\n") {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.EqualFold(key, name) {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func tooMany() error {
	return bus.E(bus.Invalid, "the source has more than %d records", maxImportRecords)
}

// decodeRecord reads one JSON object into flat fields. Names are exact, and a
// name that comes twice makes the record unreadable: of two roles nobody knows
// which one counts.
func decodeRecord(data []byte) sourceRecord {
	r := sourceRecord{fields: map[string]sourceValue{}}
	fail := func(format string, args ...any) sourceRecord {
		return sourceRecord{problem: fmt.Sprintf(format, args...)}
	}
	if len(data) > maxImportRecord {
		return fail("it has %d bytes", len(data))
	}
	if !utf8.Valid(data) || !json.Valid(data) {
		return fail("it is not JSON")
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := r.object(d, "", 0); err != nil {
		return fail("%v", err)
	}
	return r
}

func (r *sourceRecord) object(d *json.Decoder, prefix string, depth int) error {
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return errors.New("it is not a JSON object")
	}
	return r.members(d, prefix, depth)
}

// members reads what stands between the braces of an object.
func (r *sourceRecord) members(d *json.Decoder, prefix string, depth int) error {
	if depth > maxImportDepth {
		return errors.New("it is nested too deep")
	}
	for d.More() {
		t, err := d.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return errors.New("it is not JSON")
		}
		name = prefix + name
		if t, err = d.Token(); err != nil {
			return errors.New("it is not JSON")
		}
		switch v := t.(type) {
		case json.Delim:
			if v == '{' {
				if err := r.members(d, name+".", depth+1); err != nil {
					return err
				}
				continue
			}
			if err := skipList(d); err != nil {
				return err
			}
			err = r.put(name, sourceValue{kind: kindList})
		case string:
			err = r.put(name, sourceValue{v, kindText})
		case json.Number:
			err = r.put(name, sourceValue{v.String(), kindNumber})
		case bool:
			err = r.put(name, sourceValue{strconv.FormatBool(v), kindBool})
		default:
			err = r.put(name, sourceValue{kind: kindNull})
		}
		if err != nil {
			return err
		}
	}
	_, err := d.Token() // the brace that closes it
	return err
}

func skipList(d *json.Decoder) error {
	for depth := 1; depth > 0; {
		t, err := d.Token()
		if err != nil {
			return errors.New("it is not JSON")
		}
		switch t {
		case json.Delim('['), json.Delim('{'):
			depth++
		case json.Delim(']'), json.Delim('}'):
			depth--
		}
	}
	return nil
}

func (r *sourceRecord) put(name string, v sourceValue) error {
	if _, twice := r.fields[name]; twice {
		return fmt.Errorf("it has the field %s twice", quote(name))
	}
	if len(r.fields) == maxImportFields {
		return fmt.Errorf("it has more than %d fields", maxImportFields)
	}
	r.fields[name] = v
	return nil
}

// ndjsonSource reads files with one JSON object a line. The kind of a line is
// the container that its file was given under, or what its field kindField says.
type ndjsonSource struct {
	files     []namedFile
	kindField string
	stdin     io.Reader
}

type namedFile struct{ container, path string }

func (s *ndjsonSource) String() string {
	var paths []string
	for _, f := range s.files {
		paths = append(paths, f.path)
	}
	return strings.Join(paths, ",")
}

func (s *ndjsonSource) read(context.Context, func(string) bool) ([]container, error) {
	by := map[string]*container{}
	total := 0
	for _, f := range s.files {
		in := s.stdin
		if f.path != "-" {
			file, err := os.Open(f.path)
			if err != nil {
				return nil, fmt.Errorf("read the source: %w", err)
			}
			defer file.Close() //nolint:errcheck // nothing was written
			in = file
		}
		lines := bufio.NewReaderSize(in, 64<<10)
		for n := 1; ; n++ {
			line, err := boundedLine(lines)
			if err != nil && !errors.Is(err, io.EOF) {
				return nil, fmt.Errorf("read %s: %w", f.path, err)
			}
			if len(bytes.TrimSpace(line)) > 0 {
				if total++; total > maxImportRecords {
					return nil, tooMany()
				}
				r := decodeRecord(line)
				r.name = fmt.Sprintf("line %d", n)
				if len(s.files) > 1 {
					r.name = filepath.Base(f.path) + " " + r.name
				}
				name := f.container
				if name == "" {
					name = cmp.Or(r.fields[s.kindField].text, "(none)")
				}
				if by[name] == nil {
					by[name] = &container{name: name}
				}
				by[name].records = append(by[name].records, r)
			}
			if err != nil {
				break
			}
		}
	}
	var out []container
	for _, c := range by {
		out = append(out, *c)
	}
	slices.SortFunc(out, func(x, y container) int { return strings.Compare(x.name, y.name) })
	return out, nil
}

// boundedLine reads up to the next newline. Of a line that is too long only so
// much is kept that it is refused.
func boundedLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line) <= maxImportRecord {
			line = append(line, part...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return bytes.TrimSuffix(line, []byte("\n")), err
		}
	}
}

// sqliteSource reads the tables of a database file. It works on a copy: SQLite
// itself writes beside the file that it reads, and takes up an unfinished
// transaction by writing into it.
type sqliteSource struct{ path string }

func (s *sqliteSource) String() string { return s.path }

func (s *sqliteSource) read(ctx context.Context, ignored func(string) bool) (out []container, err error) {
	dir, err := os.MkdirTemp("", "unibus-import-")
	if err != nil {
		return nil, fmt.Errorf("make a working directory: %w", err)
	}
	defer func() {
		if gone := os.RemoveAll(dir); gone != nil && err == nil {
			err = fmt.Errorf("the copy of the source stays behind in %s: %w", dir, gone)
		}
	}()
	file := filepath.Join(dir, "copy.db")
	if err := s.copyTo(file); err != nil {
		return nil, err
	}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: file, RawQuery: "_pragma=trusted_schema(0)&_pragma=query_only(1)"}).String())
	if err != nil {
		return nil, bus.E(bus.Internal, "open the copy of %s: %w", s.path, err)
	}
	defer db.Close() //nolint:errcheck // a copy that was only read
	db.SetMaxOpenConns(1)
	var sound string
	if err := db.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&sound); err != nil || sound != "ok" {
		return nil, bus.E(bus.Invalid, "%s is not a sound SQLite database: %s", s.path, quote(complaint(sound, err))).
			WithHint("stop the program that writes it, or read a backup: sqlite3 unibus.db '.backup copy.db'")
	}
	tables, err := tablesOf(ctx, db)
	if err != nil {
		return nil, bus.E(bus.Invalid, "%s: %w", s.path, err)
	}
	total := 0
	for _, t := range tables {
		c, err := readTable(ctx, db, t, maxImportRecords-total, ignored(t))
		if err != nil {
			return nil, bus.E(bus.Invalid, "%s, table %s: %w", s.path, quote(t), err)
		}
		total += len(c.records)
		out = append(out, c)
	}
	return out, nil
}

func complaint(said string, err error) string {
	if err != nil {
		return err.Error()
	}
	return said
}

// copyTo copies the database with its journals, and refuses one that moves
// meanwhile.
func (s *sqliteSource) copyTo(file string) error {
	type mark struct {
		size int64
		at   time.Time
	}
	marks := func() (out [3]mark, err error) {
		for i, ending := range sqliteFiles {
			info, err := os.Stat(s.path + ending)
			switch {
			case i > 0 && errors.Is(err, fs.ErrNotExist):
			case err != nil:
				return out, fmt.Errorf("read the source: %w", err)
			case !info.Mode().IsRegular():
				return out, bus.E(bus.Invalid, "%s is not a regular file", s.path+ending)
			default:
				out[i] = mark{info.Size(), info.ModTime()}
			}
		}
		return out, nil
	}
	before, err := marks()
	if err != nil {
		return err
	}
	for i, ending := range sqliteFiles {
		if before[i] == (mark{}) {
			continue
		}
		if err := copyFile(s.path+ending, file+ending); err != nil {
			return fmt.Errorf("copy the source: %w", err)
		}
	}
	after, err := marks()
	if err != nil {
		return err
	}
	if after != before {
		return bus.E(bus.Unavailable, "%s was written to while it was copied", s.path).
			WithHint("stop the program that writes it, or read a backup: sqlite3 unibus.db '.backup copy.db'")
	}
	return nil
}

// A database, its write-ahead log, its rollback journal.
var sqliteFiles = [3]string{"", "-wal", "-journal"}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // nothing was written
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func tablesOf(ctx context.Context, db *sql.DB) (names []string, err error) {
	rows, err := db.QueryContext(ctx, `SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\_%' ESCAPE '\' ORDER BY name`)
	if err != nil {
		return nil, err
	}
	defer rows.Close() //nolint:errcheck // Err below says it
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, rows.Err()
}

func readTable(ctx context.Context, db *sql.DB, table string, room int, ignored bool) (container, error) {
	quoted := func(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }
	c := container{name: table}
	if ignored {
		return c, db.QueryRowContext(ctx, "SELECT count(*) FROM "+quoted(table)).Scan(&c.unread)
	}
	probe, err := db.QueryContext(ctx, "SELECT * FROM "+quoted(table)+" LIMIT 0")
	if err != nil {
		return container{}, err
	}
	columns, err := probe.Columns()
	if err := errors.Join(err, probe.Close()); err != nil {
		return container{}, err
	}
	var list []string
	for _, c := range columns {
		list = append(list, "+"+quoted(c)) // as stored: the driver turns a column that is declared a time into one
	}
	rows, err := db.QueryContext(ctx, "SELECT "+strings.Join(list, ",")+" FROM "+quoted(table))
	if err != nil {
		return container{}, err
	}
	defer rows.Close() //nolint:errcheck // Err below says it
	for n := 1; rows.Next(); n++ {
		if n > room {
			return container{}, tooMany()
		}
		values := make([]any, len(columns))
		for i := range values {
			values[i] = new(any)
		}
		if err := rows.Scan(values...); err != nil {
			return container{}, err
		}
		r := sourceRecord{name: fmt.Sprintf("row %d", n), fields: map[string]sourceValue{}}
		for i, name := range columns {
			v, ok := columnValue(*values[i].(*any))
			if !ok {
				r.problem = fmt.Sprintf("its column %s is too long or no text", quote(name))
			} else if err := r.put(name, v); err != nil {
				r.problem = err.Error()
			}
		}
		c.records = append(c.records, r)
	}
	return c, rows.Err()
}

func columnValue(v any) (sourceValue, bool) {
	switch v := v.(type) {
	case nil:
		return sourceValue{kind: kindNull}, true
	case int64:
		return sourceValue{strconv.FormatInt(v, 10), kindNumber}, true
	case float64:
		return sourceValue{strconv.FormatFloat(v, 'g', -1, 64), kindNumber}, true
	case string:
		return sourceValue{v, kindText}, len(v) <= maxImportRecord && utf8.ValidString(v)
	case []byte:
		return sourceValue{hex.EncodeToString(v), kindBytes}, len(v) <= maxImportRecord
	}
	return sourceValue{}, false
}
