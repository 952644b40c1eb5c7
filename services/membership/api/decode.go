package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-chi/chi/v5"

	"unibus.internal/bus"
)

func invalid(format string, args ...any) error { return bus.E(bus.Invalid, format, args...) }

// decode reads a JSON document into a value, and only a document in which
// every byte means what its writer and any other reader think it means: UTF-8,
// one value, no name twice, no name that differs from ours in anything (Go
// alone would take "ROLE" for "role"), nothing that the schema does not know. It
// is read as deeply as the schema goes and no deeper.
func decode(body []byte, s *schema, into any) error {
	if !utf8.Valid(body) || !json.Valid(body) {
		return invalid("the body is not one JSON document in UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	if err := walk(d, s, "the body"); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return invalid("the body holds more than one JSON document")
	}
	if err := json.Unmarshal(body, into); err != nil {
		// Its text may quote what was sent.
		e := bus.E(bus.Invalid, "the body is not what %s", "the API documents: see /openapi.json")
		e.Err = err
		return e
	}
	return nil
}

// walk checks the next value of d, which json.Valid has seen.
func walk(d *json.Decoder, s *schema, at string) error {
	t, err := d.Token()
	if err != nil {
		return invalid("%s cannot be read", at)
	}
	delim, composed := t.(json.Delim)
	switch {
	case !composed:
		if why := s.check(t); why != "" {
			return invalid("%s %s", at, why)
		}
		return nil
	case delim == '{' && s.kind() == "object":
		return walkObject(d, s, at)
	case delim == '[' && s.kind() == "array":
		return walkArray(d, s, at)
	}
	return invalid("%s must be %s", at, article(s.kind()))
}

func walkObject(d *json.Decoder, s *schema, at string) error {
	seen := map[string]bool{}
	for d.More() {
		t, err := d.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return invalid("%s cannot be read", at)
		}
		p := s.Properties[name]
		switch {
		case p == nil:
			return invalid("%s has a field that is not documented; known are %s", at, strings.Join(names(s.Properties), ", "))
		case seen[name]:
			return invalid("%s has the field %s twice", at, name)
		}
		seen[name] = true
		if err := walk(d, p, name); err != nil {
			return err
		}
	}
	for _, name := range s.Required {
		if !seen[name] {
			return invalid("%s lacks the field %s", at, name)
		}
	}
	_, err := d.Token() // the closing brace
	return err
}

func walkArray(d *json.Decoder, s *schema, at string) error {
	n := 0
	for d.More() {
		if n++; s.MaxItems != nil && n > *s.MaxItems {
			return invalid("%s has more than %d entries", at, *s.MaxItems)
		}
		if err := walk(d, s.Items, "an entry of "+at); err != nil {
			return err
		}
	}
	_, err := d.Token() // the closing bracket
	return err
}

func names(m map[string]*schema) []string {
	out := make([]string, 0, len(m))
	for name := range m {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// parameter is one field of a request that is not in the body.
type parameter struct {
	name, in string // in: path, query or header
	field    int
	schema   *schema
}

// shape is what a request of one operation looks like.
type shape struct {
	params []parameter
	body   *schema // nil: there must be none
	field  int     // of the body
}

// shapeOf reads the struct that a handler takes.
func shapeOf(t reflect.Type) *shape {
	s := &shape{}
	c := &schemas{inline: true}
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Name == "Body" {
			s.body, s.field = c.of(f.Type), i
			continue
		}
		for _, in := range []string{"path", "query", "header"} {
			if name := f.Tag.Get(in); name != "" {
				p := parameter{name: name, in: in, field: i, schema: c.of(f.Type)}
				describe(p.schema, f.Tag)
				s.params = append(s.params, p)
			}
		}
	}
	return s
}

// bind fills a handler's struct from a request, or says Invalid.
func (s *shape) bind(r *http.Request, body []byte, into any) error {
	v := reflect.ValueOf(into).Elem()
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return invalid("the query cannot be read")
	}
	known := map[string]bool{}
	for _, p := range s.params {
		var values []string
		switch p.in {
		case "path":
			value := chi.URLParam(r, p.name)
			if plain, err := url.PathUnescape(value); err == nil && r.URL.RawPath != "" && v.Field(p.field).Type() == reflect.TypeFor[bus.BlobName]() {
				value = plain // clients differ in what they escape, and names may hold what some do
			}
			values = []string{value}
		case "query":
			known[p.name], values = true, query[p.name]
		case "header":
			values = r.Header.Values(p.name)
		}
		if len(values) > 1 {
			return invalid("%s is given twice", p.name)
		}
		if len(values) == 0 {
			if d, ok := p.schema.Default.(int64); ok {
				v.Field(p.field).SetInt(d)
			}
			continue
		}
		if err := p.set(v.Field(p.field), values[0]); err != nil {
			return err
		}
	}
	for name := range query {
		if !known[name] {
			return invalid("the query has a parameter that is not documented for this route")
		}
	}
	switch {
	case s.body == nil && len(body) > 0:
		return invalid("this route takes no body")
	case s.body == nil:
		return nil
	case !isJSON(r.Header.Values("Content-Type")):
		return invalid("the body must have Content-Type: application/json")
	}
	return decode(body, s.body, v.Field(s.field).Addr().Interface())
}

func isJSON(contentType []string) bool {
	if len(contentType) != 1 {
		return false
	}
	kind, params, err := mime.ParseMediaType(contentType[0])
	if err != nil || kind != "application/json" {
		return false
	}
	charset, given := params["charset"]
	return len(params) == 0 || len(params) == 1 && given && strings.EqualFold(charset, "utf-8")
}

// set parses one parameter by the type of its field.
func (p parameter) set(f reflect.Value, text string) error {
	var v any = text
	switch p.schema.kind() {
	case "integer":
		v = json.Number(text)
	case "boolean":
		if text != "true" && text != "false" {
			return invalid("%s must be true or false", p.name)
		}
		v = text == "true"
	}
	if why := p.schema.check(v); why != "" {
		return invalid("%s %s", p.name, why)
	}
	switch f.Kind() {
	case reflect.Bool:
		f.SetBool(text == "true")
	case reflect.Int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return invalid("%s must be a whole number", p.name)
		}
		f.SetInt(int64(n))
	case reflect.Uint64:
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return invalid("%s must be a whole number", p.name)
		}
		f.SetUint(n)
	case reflect.String:
		f.SetString(text)
	default:
		t, err := time.Parse(time.RFC3339, text)
		if err != nil {
			return invalid("%s must be a time", p.name)
		}
		f.Set(reflect.ValueOf(t))
	}
	return nil
}

// revision is that of an If-Match; 0 stands for any.
func (t revisionTag) revision() uint64 {
	n, err := strconv.ParseUint(strings.Trim(string(t), `"`), 10, 64)
	if err != nil {
		return 0 // absent, or *
	}
	return n
}
