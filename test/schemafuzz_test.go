package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nkeys"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
	"unibus.internal/test/cluster"
)

const (
	schemaFuzzShort   = 10 * time.Second
	schemaFuzzLong    = 5 * time.Minute
	schemaFuzzWorkers = 6
	enoughIsWrong     = 10 // requests, to see what they have in common
)

// fuzzedRates let a test ask as fast as it can.
var fuzzedRates = map[cluster.Service]map[string]string{
	cluster.Membership: {"UNIBUS_RATE_KEY": "1000000:1000000", "UNIBUS_RATE_ADDRESS": "1000000:1000000"},
}

// TestSchemaFuzz asks a live cluster what its own /openapi.json allows and
// forbids, as an admin, an owner, a member and a stranger. No answer is a fault
// of the service, every answer is one that the document describes, what the
// document excludes is refused, and what was sent does not come back in a
// refusal. Request i of a seed is always the same but for its signature:
// UNIBUS_FUZZ_SEED repeats a run.
func TestSchemaFuzz(t *testing.T) {
	t.Parallel()
	seed, length := uint64(1), schemaFuzzShort
	if full {
		seed, length = uint64(time.Now().UnixNano()), schemaFuzzLong
	}
	if s := os.Getenv("UNIBUS_FUZZ_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("UNIBUS_FUZZ_SEED=%d", seed)
	f := newSchemaFuzz(t, seed)
	f.run(t, length)
	f.unharmed(t)
	if f.wrong.Load() == 0 { // else it did not get that far
		for _, o := range f.ops {
			t.Logf("%-18s %v", o.id, f.statuses[o.id])
		}
		for _, m := range f.unreached() {
			t.Error(m)
		}
	}
}

// schemaFuzz is the document, and what is known of the cluster that makes a
// request mean something.
type schemaFuzz struct {
	*apiWorld
	seed    uint64
	ops     []*fuzzOp
	people  map[string]*person
	victims []*person
	tokens  []string // of invites that nobody redeemed yet
	invites []string // ids of others
	sealer  *person  // owns the room vault, which is encrypted
	epoch   dict     // the next one of vault
	asked   atomic.Int64
	wrong   atomic.Int64

	mu       sync.Mutex // guards doc, and the tables below
	statuses map[string]map[int]int
}

// fuzzOp is one operation of the document.
type fuzzOp struct {
	id, method, path string
	params           []fuzzParam
	body             map[string]any // its schema; nil: it takes none
	file             bool           // the body is a file
	check            *jsonschema.Schema
}

type fuzzParam struct {
	name, in string
	schema   map[string]any
	check    *jsonschema.Schema
}

// fuzzCase is one request, and what must come of it.
type fuzzCase struct {
	i       int
	op      *fuzzOp
	caller  string
	signer  *person
	method  string
	path    string // with the query
	body    []byte
	header  http.Header
	changed []string // what was done to it
	refuse  bool     // it is not what the document allows
	unknown bool     // nobody in particular asks: 401
}

func (c *fuzzCase) String() string {
	return fmt.Sprintf("request %d (%s, %s): %s %.300s %v\n%.600q", c.i, c.caller, strings.Join(c.changed, ", "), c.method, c.path, c.header, c.body)
}

func newSchemaFuzz(t *testing.T, seed uint64) *schemaFuzz {
	f := &schemaFuzz{
		apiWorld: newAPIWorld(t, cluster.Options{Env: fuzzedRates}), seed: seed,
		statuses: map[string]map[int]int{},
	}
	f.people = map[string]*person{"admin": f.admin, "owner": f.alice, "member": f.bob, "stranger": newPerson(t, "stranger")}
	for i := range 6 {
		f.victims = append(f.victims, f.add(t, fmt.Sprintf("victim-%d", i)))
	}
	alice := f.as(f.alice)
	alice.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "ops"})
	alice.changes(t, "PUT", "/v1/rooms/ops/members/bob", dict{"role": "reader"})
	for _, room := range []string{"lab", "gone-0", "gone-1"} {
		f.root.want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": room, "durable": room == "lab"})
	}
	f.sealer = f.add(t, "sealer")
	_, public := f.sealer.sealKey(t, 1)
	f.as(f.sealer).changes(t, "PUT", "/v1/me/encryption-key", public)
	f.as(f.sealer).want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": "vault", "encrypted": true})
	roster, _, body := epochOf(t, f.sealer, "vault", nil, map[*person]bus.RoomRole{f.sealer: bus.Owner})
	f.as(f.sealer).changes(t, "POST", "/v1/rooms/vault/epochs", body)
	_, _, f.epoch = epochOf(t, f.sealer, "vault", roster, map[*person]bus.RoomRole{f.sealer: bus.Owner})
	for _, name := range []string{"file", "refuse"} {
		if r := f.putFile(t, f.admin, "/v1/rooms/lab/blobs/"+name, []byte("contents")); r.status != http.StatusCreated {
			t.Fatal(r)
		}
	}
	for i := range 16 {
		var made struct{ Invite bus.InviteCreated }
		f.root.want(t, http.StatusCreated, "POST", "/v1/invites", dict{"role": "member"}).decode(t, &made)
		if i%2 == 0 {
			f.tokens = append(f.tokens, made.Invite.Token)
		} else {
			f.invites = append(f.invites, made.Invite.ID)
		}
	}
	f.doc.seen = map[string]bool{} // what the fuzzer reaches counts, not this
	paths := f.doc.raw["paths"].(map[string]any)
	for _, path := range slices.Sorted(maps.Keys(paths)) {
		item := paths[path].(map[string]any)
		for _, method := range slices.Sorted(maps.Keys(item)) {
			f.ops = append(f.ops, f.operation(t, path, method, item[method].(map[string]any)))
		}
	}
	return f
}

func (f *schemaFuzz) operation(t *testing.T, path, method string, raw map[string]any) *fuzzOp {
	compile := func(at string) *jsonschema.Schema {
		s, err := f.doc.schema.Compile(documentURL + "#/paths/" + pointer(path) + "/" + method + at)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	o := &fuzzOp{id: raw["operationId"].(string), method: strings.ToUpper(method), path: path}
	params, _ := raw["parameters"].([]any)
	for i, p := range params {
		p := p.(map[string]any)
		o.params = append(o.params, fuzzParam{
			p["name"].(string), p["in"].(string), p["schema"].(map[string]any), compile(fmt.Sprintf("/parameters/%d/schema", i)),
		})
	}
	if body, ok := raw["requestBody"].(map[string]any); ok {
		document, ok := body["content"].(map[string]any)["application/json"].(map[string]any)
		if o.file = !ok; ok {
			o.body = document["schema"].(map[string]any)
			o.check = compile("/requestBody/content/" + pointer("application/json") + "/schema")
		}
	}
	return o
}

// run asks for as long as it may, and on a slow machine until every kind of
// thing was done to each operation once.
func (f *schemaFuzz) run(t *testing.T, length time.Duration) {
	end := time.Now().Add(length)
	most := int64(len(f.ops) * 100)
	var wg sync.WaitGroup
	for range schemaFuzzWorkers {
		wg.Go(func() {
			for f.wrong.Load() < enoughIsWrong {
				i := f.asked.Add(1) - 1
				if time.Now().After(end) && (i >= most || len(f.unreached()) == 0) {
					return
				}
				f.ask(t, f.build(int(i)))
			}
		})
	}
	wg.Wait()
	t.Logf("%d requests", f.asked.Load())
}

// hostile are values that have broken parsers before. The seed is what people
// paste into the wrong field.
var hostile = []any{
	nil, true, false, 0, -1, 1, 1.5, json.Number("1e2"), json.Number("1.0"), json.Number("-0"), json.Number("1e400"),
	json.Number("9223372036854775807"), json.Number("9223372036854775808"), json.Number("99999999999999999999999"),
	"", " ", ".", "..", "*", ">", "a.b", "a/b", "null", "true", "0", "\x00", "a\n", "\r\nX: y", "\u2028", "\u202eops", "ｏｐｓ", "🦊", "é", "e\u0301",
	"A", "OPS", "-", "_", "%", "%2e", "%00", "$KV", "' OR 1=1", "../../etc", "<script>", "${x}", strings.Repeat("a", 33), strings.Repeat("a", 1025),
	strings.Repeat("0", 64), strings.Repeat("f", 64), "U" + strings.Repeat("A", 55), `"0"`, `W/"1"`, `"99999999999999999999"`,
	"1969-12-31T23:59:59Z", "1970-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "9999-12-31T23:59:59-23:59", "0000-01-01T00:00:00Z",
	"2030-01-01T00:00:00,5Z", "2030-01-01T24:00:00Z", "2030-01-01T00:00:00+24:00", "2030-02-30T00:00:00Z", "2030-01-01 00:00:00Z", "2030-01-01T23:59:60Z",
	"2030-01-01t00:00:00z", "2030-01-01T00:00:00.999999999Z", "1.0", "0.0", "9223372036854775807.32767",
	plantedSeed, "x\x07" + plantedSeed,
	[]any{},
	[]any{nil},
	[]any{[]any{}},
	map[string]any{},
	map[string]any{"$ref": "#"},
	map[string]any{"": nil},
}

// plantedSeed looks like the seed of an identity, and is nobody's.
const plantedSeed = "SUAPLANTEDPLANTEDPLANTEDPLANTEDPLANTEDPLANTEDPLANTEDPLANTE"

// build makes request i.
func (f *schemaFuzz) build(i int) *fuzzCase {
	rng := rand.New(rand.NewPCG(f.seed, uint64(i))) //nolint:gosec // a test that can be repeated
	c := &fuzzCase{i: i, op: f.ops[i%len(f.ops)], header: http.Header{}}
	c.method = c.op.method
	round := i / len(f.ops)
	c.caller = "admin"
	if round > 1 {
		c.caller = []string{"admin", "admin", "admin", "owner", "owner", "member", "member", "stranger"}[rng.IntN(8)]
	}
	c.signer = f.people[c.caller]
	if c.op.id == "enroll" && (round < 2 || c.caller == "stranger" || rng.IntN(2) == 0) { // who enrolls is no stranger any more
		c.caller, c.signer = "newcomer", seededPerson(rng)
	}
	if (c.op.id == "newEpoch" || c.op.id == "grantKeys") && (round < 2 || rng.IntN(2) == 0) {
		c.caller, c.signer = "sealer", f.sealer
	}
	c.unknown = c.caller == "stranger"

	values := map[string]any{}
	for _, p := range c.op.params {
		if p.in == "path" || rng.IntN(3) == 0 && round > 0 {
			values[p.name] = f.value(rng, c, p.name, p.schema)
		}
	}
	var body any
	if c.op.body != nil {
		body = f.object(rng, c, c.op.body)
		c.header.Set("Content-Type", "application/json")
	}
	query := url.Values{}
	var raw []byte
	if c.op.file {
		c.header.Set("Content-Type", "application/octet-stream")
		body = strings.Repeat("contents", rng.IntN(20))
	}
	if round > 1 && rng.IntN(2) == 0 {
		body = f.spoil(rng, c, values, query, body)
	}
	if body != nil {
		raw = written(body)
	}
	f.lay(c, values, query, raw)
	if round > 1 && rng.IntN(8) == 0 {
		f.spoilBytes(rng, c)
	}
	return c
}

// lay puts the parts together, and says whether the document allows them.
func (f *schemaFuzz) lay(c *fuzzCase, values map[string]any, query url.Values, raw []byte) {
	path := c.op.path
	for _, p := range c.op.params {
		v, given := values[p.name]
		if !given {
			continue
		}
		text := fmt.Sprint(v)
		if p.in != "header" || printableASCII.MatchString(text) { // the client would not send others
			c.refuse = c.refuse || !allowed(p, text)
		}
		switch p.in {
		case "path":
			path = strings.ReplaceAll(path, "{"+p.name+"}", url.PathEscape(text))
		case "query":
			query.Add(p.name, text)
		case "header":
			if printableASCII.MatchString(text) {
				c.header.Set(p.name, text)
			}
		}
	}
	c.path = path
	if len(query) > 0 {
		c.path += "?" + query.Encode()
	}
	c.body = raw
	if c.op.check != nil {
		value, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
		c.refuse = c.refuse || err != nil || c.op.check.Validate(value) != nil
	}
}

var printableASCII = regexp.MustCompile(`^[!-~]([ -~]*[!-~])?$`)

// allowed holds the text of a parameter against its schema.
func allowed(p fuzzParam, text string) bool {
	var v any = text
	switch p.schema["type"] {
	case "integer":
		if !regexp.MustCompile(`^-?[0-9]{1,18}$`).MatchString(text) {
			return false
		}
		v = json.Number(text)
	case "boolean":
		if text != "true" && text != "false" {
			return false
		}
		v = text == "true"
	}
	return p.check.Validate(v) == nil
}

// spoil does one or two things to a request that its schema may or may not
// allow.
func (f *schemaFuzz) spoil(rng *rand.Rand, c *fuzzCase, values map[string]any, query url.Values, body any) any {
	fields, _ := body.(map[string]any)
	did := func(format string, args ...any) { c.changed = append(c.changed, fmt.Sprintf(format, args...)) }
	for range 1 + rng.IntN(2) {
		bad := hostile[rng.IntN(len(hostile))]
		switch what := rng.IntN(10); {
		case what < 4 && len(c.op.params) > 0:
			p := c.op.params[rng.IntN(len(c.op.params))]
			if s, ok := bad.(string); !ok || rng.IntN(3) == 0 {
				bad = nearly(rng, fmt.Sprint(f.value(rng, c, p.name, p.schema)))
			} else if len(s) > 300 {
				bad = s[:300]
			}
			values[p.name] = bad
			did("%s %s", p.in, p.name)
		case what < 8 && len(fields) > 0:
			name := pick(rng, slices.Sorted(maps.Keys(fields)))
			switch rng.IntN(6) {
			case 0:
				delete(fields, name)
				did("without %s", name)
			case 1:
				fields[strings.ToUpper(name)] = fields[name]
				did("%s in capitals", name)
			case 2:
				fields[pick(rng, []string{"status", "admin", "__proto__", "v", "", "revision", plantedSeed})] = bad
				did("a field more")
			case 3:
				if s, ok := fields[name].(string); ok {
					bad = nearly(rng, s)
				}
				fallthrough
			default:
				fields[name] = bad
				did("%s", name)
			}
		case what == 8:
			query.Add(pick(rng, []string{"limit", "Limit", "after", "all", "x", "", "role"}), fmt.Sprint(rng.IntN(600)))
			did("a parameter")
			c.refuse = c.refuse || !f.queryIsFine(c, query)
		default:
			body = bad
			did("the body")
			if c.op.body == nil {
				c.header.Set("Content-Type", "application/json")
				c.refuse = c.refuse || body != nil && !c.op.file
			}
			return body
		}
	}
	return body
}

// queryIsFine reports whether every parameter is documented, given once and
// within its schema.
func (f *schemaFuzz) queryIsFine(c *fuzzCase, query url.Values) bool {
	for name, given := range query {
		i := slices.IndexFunc(c.op.params, func(p fuzzParam) bool { return p.in == "query" && p.name == name })
		if i < 0 || len(given) != 1 || !allowed(c.op.params[i], given[0]) {
			return false
		}
	}
	return true
}

// spoilBytes breaks what no JSON value can express.
func (f *schemaFuzz) spoilBytes(rng *rand.Rand, c *fuzzCase) {
	did := func(what string, refuse bool) { c.changed = append(c.changed, what); c.refuse = c.refuse || refuse }
	if c.op.file { // whose bytes may be any
		c.body = bytes.Repeat([]byte{byte(c.i)}, rng.IntN(2*sig.MaxBody))
		did("other bytes", false)
		return
	}
	hasBody := c.op.body != nil
	switch rng.IntN(9) {
	case 0:
		c.method = pick(rng, []string{"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "BREW", "get"})
		c.refuse = false // that of another operation, perhaps
		did("method", false)
	case 1:
		c.header["Content-Type"] = []string{pick(rng, []string{"text/plain", "application/xml", "application/json; charset=utf-16", "application/jsonp", "multipart/form-data; boundary=x", "application/json, text/html", "/"})}
		did("content type", hasBody)
	case 2:
		if i := bytes.LastIndexByte(c.body, '}'); i > 1 && c.body[0] == '{' && hasBody { // the first field once more
			field, _, _ := bytes.Cut(c.body[1:i], []byte(","))
			if bytes.ContainsAny(field, "{[") || !bytes.Contains(field, []byte(":")) {
				return
			}
			c.body = slices.Concat(c.body[:i], []byte(","), field, []byte("}"))
			did("a field twice", true)
		}
	case 3:
		c.body = append(slices.Clone(c.body), pick(rng, []string{"{}", " 1", "\x00", ",", "}"})...)
		did("more behind it", true)
	case 4:
		c.body = append([]byte(pick(rng, []string{"\xef\xbb\xbf", "\xff\xfe", "/**/", "[", "\x00"})), c.body...)
		did("more before it", true)
	case 5:
		c.body = bytes.Repeat([]byte(`{"a":`), 1+rng.IntN(12_000))
		did("deep", true)
	case 6:
		c.body = append(bytes.Repeat([]byte(" "), 60_000), c.body...)
		did("spaces", false)
	case 7:
		if c.op.id == "newEpoch" { // takes more: see largeBodies
			break
		}
		c.body = append(bytes.Repeat([]byte(" "), sig.MaxBody), c.body...)
		did("too large", false)
		c.unknown = c.unknown || len(c.body) > sig.MaxBody
	case 8:
		if len(c.body) > 2 {
			c.body = slices.Clone(c.body[:len(c.body)-1-rng.IntN(len(c.body)-1)])
			did("cut off", true)
		}
	}
	if !hasBody && len(c.body) > 0 {
		c.refuse = true
	}
}

// nearly is a text that is almost another.
func nearly(rng *rand.Rand, s string) string {
	switch rng.IntN(8) {
	case 0:
		return s + "\n"
	case 1:
		return " " + s
	case 2:
		return strings.ToUpper(s)
	case 3:
		return s + s
	case 4:
		return s[:rng.IntN(len(s)+1)]
	case 5:
		return s + "\x00"
	case 6:
		return strings.Replace(s, "a", "а", 1) // Cyrillic
	}
	return s + string(rune(rng.IntN(0x2000)))
}

func pick[T any](rng *rand.Rand, list []T) T { return list[rng.IntN(len(list))] }

// object makes a body that its schema allows.
func (f *schemaFuzz) object(rng *rand.Rand, c *fuzzCase, schema map[string]any) map[string]any {
	out := map[string]any{}
	required, _ := schema["required"].([]any)
	properties := schema["properties"].(map[string]any)
	for _, name := range slices.Sorted(maps.Keys(properties)) {
		if slices.Contains(required, any(name)) || rng.IntN(2) == 0 {
			out[name] = f.value(rng, c, name, properties[name].(map[string]any))
		}
	}
	switch c.op.id { // what no schema can say
	case "setEncryptionKey":
		k := bus.EncryptionKey{N: uint64(c.i) + 1, Public: make([]byte, bus.EncryptionKeySize), CreatedAt: time.Unix(1_800_000_000, 0).UTC()}
		k.Signature, _ = c.signer.Sign(k.SignedBytes(c.signer.key))
		out = map[string]any{"n": k.N, "public": k.Public, "created_at": k.CreatedAt, "signature": k.Signature}
	case "enroll":
		out["handle"] = fmt.Sprintf("newcomer-%d", c.i)
	case "newEpoch":
		if c.signer == f.sealer {
			out = maps.Clone(f.epoch)
		}
	case "grantKeys":
		if c.i < len(f.ops) {
			out = map[string]any{"envelopes": []any{}}
		}
	case "changeRoom": // a retention is for durable rooms, and for rooms of which something is kept
		if c.i < len(f.ops) {
			out = map[string]any{"description": "changed"}
		}
	case "changeUser":
		if len(out) == 0 {
			out["role"] = "member"
		}
	}
	return out
}

// value makes a value that its schema allows, and that means something to the
// cluster if its name says which thing it names.
func (f *schemaFuzz) value(rng *rand.Rand, c *fuzzCase, name string, schema map[string]any) any {
	if v := f.meant(rng, c, name); v != nil {
		return v
	}
	if list, ok := schema["enum"].([]any); ok {
		return pick(rng, list)
	}
	kind, _ := schema["type"].(string)
	if list, ok := schema["type"].([]any); ok {
		kind = fmt.Sprint(pick(rng, list))
	}
	switch kind {
	case "null":
		return nil
	case "boolean":
		return rng.IntN(2) == 0
	case "integer":
		low, high := bound(schema["minimum"], 0), bound(schema["maximum"], 1<<40)
		return pick(rng, []int64{low, high, low + rng.Int64N(high-low+1)})
	case "array":
		list := []any{}
		for range pick(rng, []int{0, 1, 3, int(bound(schema["maxItems"], 8))}) {
			list = append(list, f.value(rng, c, "", schema["items"].(map[string]any)))
		}
		return list
	case "object":
		return f.object(rng, c, schema)
	}
	switch pattern, _ := schema["pattern"].(string); {
	case pattern != "":
		re, err := syntax.Parse(pattern, syntax.Perl)
		if err != nil {
			panic(err) // jsonschema has compiled it
		}
		return matching(rng, re.Simplify())
	case schema["format"] == "date-time":
		return pick(rng, []string{"2099-12-31T23:59:59Z", "2030-06-01T12:00:00.123+02:00", "9999-12-31T23:59:59Z"})
	case schema["contentEncoding"] == "base64":
		return []byte("bytes")
	}
	return strings.Repeat(pick(rng, []string{"x", "é", "🦊"}), int(pick(rng, []int64{0, 1, bound(schema["maxLength"], 64)})))
}

// meant is a value that names something, or somebody, in the cluster. What ends
// a thing is done to those that nobody needs any more.
func (f *schemaFuzz) meant(rng *rand.Rand, c *fuzzCase, name string) any {
	first := c.i < len(f.ops) // must succeed
	switch name {
	case "user":
		list := []string{"alice", "bob", f.bob.key.Hex(), f.alice.key.NKey(), "victim-5", "nobody"}
		switch c.op.id {
		case "revokeUser":
			list = []string{"victim-0", f.victims[0].key.Hex(), "nobody"}
		case "suspendUser", "resumeUser":
			list = []string{"victim-1", "victim-2", f.victims[2].key.NKey(), "victim-0"}
		case "rotateUser":
			list = []string{"victim-3", f.victims[4].key.Hex()}
		case "changeUser":
			list = []string{f.victims[5].key.NKey(), f.victims[2].key.Hex(), f.victims[0].key.NKey()}
		case "removeMember":
			list = []string{"bob", "victim-5", "nobody"}
		case "grantKeys":
			list = []string{"sealer", "bob", "nobody"}
		}
		if first {
			return list[0]
		}
		return pick(rng, list)
	case "name":
		switch {
		case !strings.Contains(c.op.path, "/blobs/"):
			return nil
		case c.op.id == "deleteBlob":
			return pick(rng, []string{"refuse", "stored-1", "stored-2"})
		case c.op.id == "putBlob":
			return fmt.Sprintf("stored-%d", rng.IntN(5))
		case first:
			return "file"
		}
		return pick(rng, []string{"file", "stored-0", "stored-3", "nothing"})
	case "room":
		switch {
		case strings.Contains(c.op.path, "/blobs") && first: // the admin is no member of the others
			return "lab"
		case c.op.id == "createRoom":
			return fmt.Sprintf("room-%d", c.i)
		case c.op.id == "archiveRoom":
			return fmt.Sprintf("gone-%d", rng.IntN(2))
		case first && slices.Contains([]string{"roomKeys", "newEpoch", "grantKeys"}, c.op.id):
			return "vault"
		case first && c.op.id == "listMessages":
			return "lab"
		case first:
			return "ops"
		}
		return pick(rng, []string{"ops", "lab", "vault", "gone-0", "nowhere"})
	case "handle":
		return fmt.Sprintf("%s-%d", pick(rng, []string{"h", "handle_"}), c.i)
	case "owner":
		return pick(rng, []string{"alice", "bob", "admin"})
	case "sign_pub":
		k := seededPerson(rng).key
		return pick(rng, []string{k.Hex(), k.NKey()})
	case "token":
		if first {
			return f.tokens[0]
		}
		return pick(rng, f.tokens)
	case "id":
		if first {
			return f.invites[0]
		}
		return pick(rng, append([]string{"0123456789abcdef"}, f.invites...))
	case "If-Match":
		return pick(rng, []string{"*", `"1"`, `"999999999999999999"`})
	case "after":
		return pick(rng, []string{f.bob.key.Hex(), "ops", "1.0", "9223372036854775807.0"})
	case "actor":
		return pick(rng, []string{"direct", "admin", f.bob.key.NKey()})
	}
	return nil
}

func bound(v any, otherwise int64) int64 {
	n, ok := v.(json.Number)
	if !ok {
		return otherwise
	}
	i, err := n.Int64()
	if err != nil {
		return otherwise
	}
	return i
}

// matching is a text that an expression matches: often a shortest or longest.
func matching(rng *rand.Rand, re *syntax.Regexp) string {
	switch re.Op {
	case syntax.OpLiteral:
		return string(re.Rune)
	case syntax.OpCharClass:
		i := 2 * rng.IntN(len(re.Rune)/2)
		return string(re.Rune[i] + rng.Int32N(re.Rune[i+1]-re.Rune[i]+1))
	case syntax.OpCapture:
		return matching(rng, re.Sub[0])
	case syntax.OpConcat:
		var b strings.Builder
		for _, sub := range re.Sub {
			b.WriteString(matching(rng, sub))
		}
		return b.String()
	case syntax.OpAlternate:
		return matching(rng, pick(rng, re.Sub))
	case syntax.OpQuest:
		if rng.IntN(3) == 0 {
			return ""
		}
		return matching(rng, re.Sub[0])
	case syntax.OpStar, syntax.OpPlus:
		var b strings.Builder
		for range 1 + rng.IntN(4) {
			b.WriteString(matching(rng, re.Sub[0]))
		}
		return b.String()
	}
	return "" // the ends of the text
}

// seededPerson is somebody new whom the seed makes.
func seededPerson(rng *rand.Rand) *person {
	raw := make([]byte, 32)
	for i := range raw {
		raw[i] = byte(rng.Uint32())
	}
	seed, err := nkeys.EncodeSeed(nkeys.PrefixByteUser, raw)
	if err != nil {
		panic(err)
	}
	kp, err := nkeys.FromSeed(seed)
	if err != nil {
		panic(err)
	}
	pub, _ := kp.PublicKey()
	key, err := bus.ParseUserKey(pub)
	if err != nil {
		panic(err) // a key pair has a sound public key
	}
	return &person{name: "newcomer", kp: kp, key: key}
}

// written is JSON that json.Marshal would not write: numbers as they are.
func written(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(err)
	}
	return bytes.TrimSpace(b.Bytes())
}

var oddPath = regexp.MustCompile(`//|/\.\.?(/|$)|/$|%(0|1|2e|2f|5c|7f)`)

// ask sends one request and judges its answer.
func (f *schemaFuzz) ask(t *testing.T, c *fuzzCase) {
	client := f.api(c.i%3+1, c.signer)
	q := apiRequest{method: c.method, path: c.path, body: c.body, header: c.header, stream: c.op.file}
	if _, err := client.build(t.Context(), q); err != nil { // no such thing can be signed
		client.signer, c.unknown = nil, true
		c.changed = append(c.changed, "unsigned")
	}
	probe := !strings.HasPrefix(c.op.path, "/v1/")
	if probe { // by other methods it is one more path that nobody knows
		client.signer = nil
		c.unknown = c.method != c.op.method && (c.method != http.MethodHead || c.op.id != "healthz")
	}
	r, err := client.send(t.Context(), q)
	if err != nil {
		f.wrong.Add(1)
		t.Errorf("%s: %v", c, err)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.statuses[c.op.id] == nil {
		f.statuses[c.op.id] = map[int]int{}
	}
	f.statuses[c.op.id][r.status]++
	bare, _, _ := strings.Cut(c.path, "?")
	odd := oddPath.MatchString(strings.ToLower(bare))
	complain := func(why string) {
		f.wrong.Add(1)
		t.Errorf("%s\nanswered %.1000s\n%s", c, r, why)
	}
	switch {
	case r.status >= 500:
		complain("a fault of the service")
	case probe && c.method == c.op.method:
	case c.unknown && r.status != http.StatusUnauthorized:
		complain("nobody who is known asked: want 401")
	case odd && r.status/100 != 4:
		complain("an odd path leads somewhere")
	case c.refuse && !odd && c.method == c.op.method && r.status != http.StatusBadRequest && r.status != http.StatusUnauthorized:
		complain("the document does not allow it: want 400")
	case c.refuse && r.status == http.StatusUnauthorized && !c.unknown && !odd && c.op.id != "enroll":
		complain("the caller is known: want 400")
	}
	if r.status >= 400 && !probe && c.method != http.MethodHead {
		var p bus.Problem
		if r.header.Get("Content-Type") != "application/problem+json" || json.Unmarshal(r.body, &p) != nil ||
			p.Status != r.status || !strings.HasPrefix(p.Type, bus.ProblemType) || p.Title == "" {
			complain("no problem document")
		}
		for _, secret := range append([]string{plantedSeed}, f.tokens...) {
			if bytes.Contains(r.body, []byte(secret)) {
				complain("repeats a secret")
			}
		}
	}
	if c.method == http.MethodHead || c.method != strings.ToUpper(c.method) { // not that of an operation
		return
	}
	if err := f.doc.check(c.method, bare, r); err != nil {
		complain(err.Error())
	}
}

// unreached says what the requests so far have left out: each operation of the
// document succeeds once, and each that can be refused is.
func (f *schemaFuzz) unreached() (missing []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, o := range f.ops {
		statuses := f.statuses[o.id]
		if !f.doc.seen[o.id] {
			missing = append(missing, fmt.Sprintf("%s never succeeded: %v", o.id, statuses))
		}
		if strings.HasPrefix(o.path, "/v1/") && (statuses[http.StatusBadRequest] == 0 && o.id != "enroll" || statuses[http.StatusUnauthorized] == 0) {
			missing = append(missing, fmt.Sprintf("%s was never refused: %v", o.id, statuses))
		}
	}
	return missing
}

// unharmed: all of that left a cluster that serves, with an audit that
// verifies, and no fault in any log.
func (f *schemaFuzz) unharmed(t *testing.T) {
	for _, i := range f.Nodes() {
		if err := f.Healthy(t.Context(), i); err != nil {
			t.Error(err)
		}
		log, err := os.ReadFile(f.LogFile(i, cluster.Membership))
		if err != nil {
			t.Fatal(err)
		}
		for _, bad := range []string{`level=ERROR`, `"level":"ERROR"`, "panic", plantedSeed, "ubi_"} {
			if at := bytes.Index(log, []byte(bad)); at >= 0 {
				t.Errorf("the log of n%d holds %s:\n%.600s", i, bad, log[max(0, at-200):])
			}
		}
	}
	var report struct{ Report bus.AuditReport }
	f.root.want(t, 200, "GET", "/v1/audit/verify", nil).decode(t, &report)
	if !report.Report.OK {
		t.Errorf("verify: %+v", report.Report)
	}
}
