package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// This file reads the configuration language of nats-server, as far as a lint
// needs it: what stands where. nats-server -t stays the judge of what is valid.
//
//	key value    key: value    key = value    key { ... }
//	values: bare words, 'raw', "escaped", numbers with suffixes (4MB), true,
//	[ ... ], { ... }, and $NAME, which is a variable only as a whole bare word
//	comments: # and //    separators: new line , ;    include "relative/path"

// confPos is where something stands.
type confPos struct {
	file string
	line int
}

type confKind int

const (
	confMap confKind = iota
	confArray
	confString
	confNumber
	confBool
)

// confValue is one value. Exactly one of fields, items and text is in use,
// after kind. A nil *confValue is a value that is not there: all methods work.
type confValue struct {
	kind   confKind
	pos    confPos // where it is written, also when a variable stands for it
	text   string  // a scalar, without quotes and escapes
	fields []confField
	items  []*confValue
}

type confField struct {
	key   string
	pos   confPos
	value *confValue
}

// field returns the value of the first of names that is set. Of a key that is
// set twice the last value counts, as it does for the server, which also
// ignores case.
func (v *confValue) field(names ...string) *confValue {
	if v == nil {
		return nil
	}
	for _, name := range names {
		for _, f := range slices.Backward(v.fields) {
			if strings.EqualFold(f.key, name) {
				return f.value
			}
		}
	}
	return nil
}

// at follows a path of keys. Aliases are separated by a bar: "http_port|monitor_port".
func (v *confValue) at(path ...string) *confValue {
	for _, names := range path {
		v = v.field(strings.Split(names, "|")...)
	}
	return v
}

func (v *confValue) string() string {
	if v == nil {
		return ""
	}
	return v.text
}

func (v *confValue) isTrue() bool {
	return v != nil && v.kind == confBool && slices.Contains([]string{"true", "yes", "on"}, strings.ToLower(v.text))
}

// list returns an array's items, and any other value as a list of one: the
// server takes both for lists of subjects, URLs and keys.
func (v *confValue) list() []*confValue {
	switch {
	case v == nil:
		return nil
	case v.kind == confArray:
		return v.items
	}
	return []*confValue{v}
}

func (v *confValue) strings() []string {
	var out []string
	for _, item := range v.list() {
		out = append(out, item.text)
	}
	return out
}

var (
	numberPattern = regexp.MustCompile(`^(-?[0-9]+(?:\.[0-9]+)?)(?:([kKmMgGtTpPeE])([iIbB]*))?$`)
	intPowers     = map[string]int{"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}
)

// number is a scalar's value by the server's rules: 1K is 1000, 1KB is 1024.
func (v *confValue) number() (float64, bool) {
	if v == nil || v.kind != confNumber {
		return 0, false
	}
	m := numberPattern.FindStringSubmatch(v.text)
	if m == nil {
		return 0, false
	}
	n, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		return 0, false
	}
	base := 1000.0
	if m[3] != "" {
		base = 1024
	}
	for range intPowers[strings.ToLower(m[2])] {
		n *= base
	}
	return n, true
}

// walk visits v and everything in it, with the keys that lead there.
func (v *confValue) walk(path []string, visit func(path []string, v *confValue)) {
	if v == nil {
		return
	}
	visit(path, v)
	for _, f := range v.fields {
		f.value.walk(append(slices.Clone(path), f.key), visit)
	}
	for _, item := range v.items {
		item.walk(path, visit)
	}
}

// confError is a place that cannot be read, and how to mend it.
type confError struct {
	pos      confPos
	problem  string
	fix      string
	unwanted error // the cause where it is not the operator's text: no permission
}

func (e *confError) Error() string {
	return fmt.Sprintf("%s:%d: %s", e.pos.file, e.pos.line, e.problem)
}

func (e *confError) Unwrap() error { return e.unwanted }

// confFile is a parsed configuration with all its includes.
type confFile struct {
	root  *confValue
	files []string // in the order they were read
}

// readConf parses path and what it includes. getenv answers for variables that
// no file defines.
func readConf(path string, getenv func(string) string) (*confFile, error) {
	c := &confFile{}
	root, err := c.read(path, confPos{path, 1}, getenv, nil)
	c.root = root
	return c, err
}

// read parses one file, from says who asked for it. As in the server, an
// included file does not see the variables of the file that includes it.
func (c *confFile) read(path string, from confPos, getenv func(string) string, open []string) (*confValue, error) {
	if slices.Contains(open, path) {
		return nil, &confError{pos: from, problem: "includes itself through " + path, fix: "remove the include"}
	}
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && len(open) > 0:
		return nil, &confError{
			pos: from, problem: fmt.Sprintf("the included file %s does not exist: the server would not start", path),
			fix: "create it, it may be empty, or remove the include (paths are relative to this file)",
		}
	case err != nil:
		return nil, &confError{pos: from, problem: err.Error(), fix: "run as a user who may read the configuration", unwanted: err}
	}
	c.files = append(c.files, path)
	p := &confParser{conf: c, path: path, src: string(data), line: 1, getenv: getenv, open: append(slices.Clone(open), path)}
	return p.file()
}

// confParser reads one file. Its scopes are the maps that are open, innermost
// last; variables are looked up in them.
type confParser struct {
	conf   *confFile
	path   string
	src    string
	pos    int
	line   int
	getenv func(string) string
	open   []string // files being read, to notice a circle
	scopes []*confValue
}

func (p *confParser) here() confPos { return confPos{p.path, p.line} }

func (p *confParser) errorf(format string, args ...any) error {
	return &confError{pos: p.here(), problem: fmt.Sprintf(format, args...), fix: "correct the line; nats-server -t shows what it expects"}
}

// peek returns the next byte, 0 at the end.
func (p *confParser) peek() byte {
	if p.pos >= len(p.src) {
		return 0
	}
	return p.src[p.pos]
}

func (p *confParser) next() byte {
	c := p.peek()
	if c == '\n' {
		p.line++
	}
	p.pos++
	return c
}

func (p *confParser) eof() bool { return p.pos >= len(p.src) }

// skip passes over blanks, comments and the bytes in also.
func (p *confParser) skip(also string) {
	for !p.eof() {
		rest := p.src[p.pos:]
		switch {
		case strings.IndexByte(" \t\r"+also, rest[0]) >= 0:
			p.next()
		case rest[0] == '#', strings.HasPrefix(rest, "//"):
			for !p.eof() && p.peek() != '\n' {
				p.next()
			}
		default:
			return
		}
	}
}

const confSeparators = "\n,;"

func (p *confParser) file() (*confValue, error) {
	root := &confValue{kind: confMap, pos: p.here()}
	// A whole file may stand in braces, as JSON does.
	if p.skip(confSeparators); p.peek() == '{' {
		p.next()
		if err := p.mapInto(root, '}'); err != nil {
			return nil, err
		}
		p.skip(confSeparators)
	}
	return root, p.mapInto(root, 0)
}

// mapInto reads keys and values into m until end.
func (p *confParser) mapInto(m *confValue, end byte) error {
	p.scopes = append(p.scopes, m)
	defer func() { p.scopes = p.scopes[:len(p.scopes)-1] }()
	for {
		p.skip(confSeparators)
		switch {
		case p.eof() && end == 0:
			return nil
		case p.eof():
			return &confError{pos: m.pos, problem: "this block is never closed", fix: "add the missing }"}
		case p.peek() == end:
			p.next()
			return nil
		}
		if err := p.fieldInto(m); err != nil {
			return err
		}
	}
}

func (p *confParser) fieldInto(m *confValue) error {
	pos := p.here()
	key, quoted, err := p.key()
	if err != nil {
		return err
	}
	if !quoted && strings.EqualFold(key, "include") && strings.IndexByte(" \t", p.peek()) >= 0 {
		return p.include(m, pos)
	}
	p.skip("\n")
	if c := p.peek(); c == ':' || c == '=' {
		p.next()
		p.skip("\n")
	}
	v, err := p.value()
	if err != nil {
		return err
	}
	m.fields = append(m.fields, confField{key, pos, v})
	return nil
}

func (p *confParser) key() (key string, quoted bool, err error) {
	if c := p.peek(); c == '"' || c == '\'' {
		p.next()
		key, err = p.until(c)
		return key, true, err
	}
	start := p.pos
	for !p.eof() && strings.IndexByte(" \t\r\n:=", p.peek()) < 0 {
		p.next()
	}
	if p.pos == start {
		return "", false, p.errorf("expected a key, found %q", p.peek())
	}
	return p.src[start:p.pos], false, nil
}

// until reads up to a closing quote.
func (p *confParser) until(quote byte) (string, error) {
	start, from := p.here(), p.pos
	for !p.eof() {
		if p.next() == quote {
			return p.src[from : p.pos-1], nil
		}
	}
	return "", &confError{pos: start, problem: "the quote is never closed", fix: "add the closing " + string(quote)}
}

func (p *confParser) include(m *confValue, pos confPos) error {
	p.skip("")
	var name string
	var err error
	if c := p.peek(); c == '"' || c == '\'' {
		p.next()
		name, err = p.until(c)
	} else {
		name = p.bare()
	}
	if err != nil {
		return err
	}
	included, err := p.conf.read(filepath.Join(filepath.Dir(p.path), name), pos, p.getenv, p.open)
	if err != nil {
		return err
	}
	m.fields = append(m.fields, included.fields...)
	return nil
}

func (p *confParser) value() (*confValue, error) {
	v := &confValue{kind: confString, pos: p.here()}
	var err error
	switch p.peek() {
	case '{':
		p.next()
		v.kind = confMap
		return v, p.mapInto(v, '}')
	case '[':
		p.next()
		v.kind = confArray
		return v, p.arrayInto(v)
	case '\'':
		p.next()
		v.text, err = p.until('\'')
		return v, err
	case '"':
		p.next()
		v.text, err = p.escaped()
		return v, err
	case '(':
		return nil, p.errorf("a text block ( ) is not understood here")
	}
	text := p.bare()
	if text == "" {
		return nil, p.errorf("expected a value")
	}
	if name, ok := strings.CutPrefix(text, "$"); ok && !strings.HasPrefix(name, "2a$") { // not a bcrypt hash
		return p.variable(name, v.pos)
	}
	return scalar(text, v.pos), nil
}

func scalar(text string, pos confPos) *confValue {
	v := &confValue{kind: confString, pos: pos, text: text}
	switch strings.ToLower(text) {
	case "true", "false", "yes", "no", "on", "off":
		v.kind = confBool
	}
	if numberPattern.MatchString(text) {
		v.kind = confNumber
	}
	return v
}

// bare reads a word without quotes.
func (p *confParser) bare() string {
	start := p.pos
	for !p.eof() && strings.IndexByte(" \t\r\n,;]}", p.peek()) < 0 {
		p.next()
	}
	return p.src[start:p.pos]
}

// escaped reads the rest of a string in double quotes.
func (p *confParser) escaped() (string, error) {
	start := p.here()
	var b strings.Builder
	for !p.eof() {
		switch c := p.next(); c {
		case '"':
			return b.String(), nil
		case '\\':
			if err := p.escape(&b); err != nil {
				return "", err
			}
		default:
			b.WriteByte(c)
		}
	}
	return "", &confError{pos: start, problem: "the quote is never closed", fix: `add the closing "`}
}

func (p *confParser) escape(b *strings.Builder) error {
	switch c := p.next(); c {
	case 't', 'n', 'r':
		b.WriteByte(map[byte]byte{'t': '\t', 'n': '\n', 'r': '\r'}[c])
	case '"', '\\':
		b.WriteByte(c)
	case 'x':
		if p.pos+2 > len(p.src) {
			return p.errorf("\\x needs two hexadecimal digits")
		}
		n, err := strconv.ParseUint(p.src[p.pos:p.pos+2], 16, 8)
		if err != nil {
			return p.errorf("\\x needs two hexadecimal digits")
		}
		p.pos += 2
		b.WriteByte(byte(n))
	default:
		return p.errorf("\\%c is no escape", c)
	}
	return nil
}

func (p *confParser) arrayInto(v *confValue) error {
	for {
		p.skip("\n,")
		switch {
		case p.eof():
			return &confError{pos: v.pos, problem: "this list is never closed", fix: "add the missing ]"}
		case p.peek() == ']':
			p.next()
			return nil
		}
		item, err := p.value()
		if err != nil {
			return err
		}
		v.items = append(v.items, item)
	}
}

// variable returns what $name stands for: a key that was set before in this
// file or in a file it included, else the environment. It keeps the place of
// the definition, which is what one would edit.
func (p *confParser) variable(name string, pos confPos) (*confValue, error) {
	for _, scope := range slices.Backward(p.scopes) {
		for _, f := range slices.Backward(scope.fields) {
			if f.key == name {
				return f.value, nil
			}
		}
	}
	if text := p.getenv(name); text != "" {
		return scalar(strings.Trim(text, `'"`), pos), nil
	}
	return nil, &confError{
		pos: pos, problem: "nothing defines $" + name + ": the server would not start",
		fix: "set " + name + " before this line; an included file does not see the variables of the file that includes it",
	}
}
