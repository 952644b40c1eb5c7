package api

import (
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"unibus.internal/bus"
)

// schema is one JSON Schema (2020-12) of the OpenAPI document. Requests are
// checked against the same values that the document shows, so that what is
// promised and what is accepted cannot drift apart.
type schema struct {
	Ref         string             `json:"$ref,omitempty"`
	Type        any                `json:"type,omitempty"` // a string, or a list with "null"
	Format      string             `json:"format,omitempty"`
	Pattern     string             `json:"pattern,omitempty"`
	Enum        []any              `json:"enum,omitempty"`
	Minimum     *int64             `json:"minimum,omitempty"`
	Maximum     *int64             `json:"maximum,omitempty"`
	MaxLength   *int               `json:"maxLength,omitempty"`
	MaxItems    *int               `json:"maxItems,omitempty"`
	Encoding    string             `json:"contentEncoding,omitempty"`
	Default     any                `json:"default,omitempty"`
	Description string             `json:"description,omitempty"`
	Items       *schema            `json:"items,omitempty"`
	AnyOf       []*schema          `json:"anyOf,omitempty"`
	Properties  map[string]*schema `json:"properties,omitempty"`
	Required    []string           `json:"required,omitempty"`
	Additional  *bool              `json:"additionalProperties,omitempty"`

	pattern  *regexp.Regexp
	nullable bool
}

// kind is the type without null.
func (s *schema) kind() string {
	switch t := s.Type.(type) {
	case string:
		return t
	case []string:
		return t[0]
	}
	return ""
}

func str(pattern, description string) schema {
	return schema{Type: "string", Pattern: pattern, Description: description}
}

func enum(description string, values ...string) schema {
	s := schema{Type: "string", Description: description}
	for _, v := range values {
		s.Enum = append(s.Enum, v)
	}
	return s
}

// userName is how a request names a user: by handle, hex or nkey.
type userName string

// newKey is a key that a request brings: by hex or nkey, of somebody who need not
// be a user.
type newKey string

// patchTime tells an absent time from null.
type patchTime struct {
	set   bool
	value *time.Time
}

func (p *patchTime) UnmarshalJSON(b []byte) error {
	p.set = true
	return json.Unmarshal(b, &p.value)
}

// revisionTag is the value of If-Match.
type revisionTag string

// inviteToken is the secret of an invite. It is never shown again.
type inviteToken string

// inviteID names an invite.
type inviteID string

// dateTime is what RFC 3339 (section 5.6) asks of a time beyond what package
// time does: hours of an offset end at 23, and digits follow a full stop.
var dateTime = regexp.MustCompile(`^[0-9]{4}-[0-9]{2}-[0-9]{2}T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$`)

// nodeName names a server.
type nodeName string

// auditWord is the name of an action, or with a star what it begins with.
type auditWord string

// auditActor is a user, or direct.
type auditActor string

const maxText = 1024 // bytes of a free text, before whoever reads it has a stricter word

// scalarOf is the grammar of every type that is not composed of others.
func scalarOf(t reflect.Type) (schema, bool) {
	length := maxText
	switch t {
	case reflect.TypeFor[bus.UserKey]():
		return str(`^[0-9a-f]{64}$`, "ed25519 public key, hex"), true
	case reflect.TypeFor[bus.Handle]():
		return str(`^[a-z][a-z0-9_-]{0,31}$`, ""), true
	case reflect.TypeFor[bus.RoomID]():
		return str(`^[a-z0-9][a-z0-9-]{0,31}$`, ""), true
	case reflect.TypeFor[userName]():
		return str(`^([a-z][a-z0-9_-]{0,31}|[0-9a-f]{64}|U[A-Z2-7]{55})$`, "a user: handle, key in hex, or nkey"), true
	case reflect.TypeFor[newKey]():
		return str(`^([0-9a-f]{64}|U[A-Z2-7]{55})$`, "ed25519 public key, in hex or as nkey"), true
	case reflect.TypeFor[bus.Role]():
		return enum("", string(bus.Member), string(bus.Admin)), true
	case reflect.TypeFor[bus.Status]():
		return enum("", string(bus.Active), string(bus.Suspended), string(bus.Revoked)), true
	case reflect.TypeFor[bus.RoomRole]():
		return enum("", string(bus.Reader), string(bus.Writer), string(bus.Owner)), true
	case reflect.TypeFor[bus.RoomStatus]():
		return enum("", string(bus.RoomActive), string(bus.RoomArchived)), true
	case reflect.TypeFor[bus.MembershipStatus]():
		return enum("", string(bus.Present), string(bus.Removed)), true
	case reflect.TypeFor[bus.InviteStatus]():
		return enum("", string(bus.InviteOpen), string(bus.InviteUsed), string(bus.InviteWithdrawn)), true
	case reflect.TypeFor[bus.RekeyWhy]():
		return enum("", string(bus.RekeyFirst), string(bus.RekeyIncomplete), string(bus.RekeyDeparted), string(bus.RekeyReturned),
			string(bus.RekeyDemoted), string(bus.RekeyNewKey), string(bus.RekeyOld)), true
	case reflect.TypeFor[bus.AuditKind]():
		return enum("", string(bus.AuditAttempt), string(bus.AuditOutcome), string(bus.AuditDenial), string(bus.AuditConnect)), true
	case reflect.TypeFor[bus.Code]():
		return enum("", string(bus.Invalid), string(bus.Unauthenticated), string(bus.Forbidden), string(bus.NotFound),
			string(bus.Conflict), string(bus.Unavailable), string(bus.Internal)), true
	case reflect.TypeFor[bus.BlobName]():
		return str(bus.BlobNamePattern, "a file name"), true
	case reflect.TypeFor[anyTag]():
		return str(`^\*$`, ""), true
	case reflect.TypeFor[blobTag]():
		return str(`^"[0-9a-f]{64}"$`, ""), true
	case reflect.TypeFor[revisionTag]():
		return str(`^("[1-9][0-9]{0,17}"|\*)$`, "the ETag of what is to be changed"), true
	case reflect.TypeFor[inviteID]():
		return str(`^[0-9a-f]{16}$`, ""), true
	case reflect.TypeFor[nodeName]():
		return str(`^[a-z][a-z0-9-]{0,31}$`, "such as n1"), true
	case reflect.TypeFor[auditWord]():
		return str(`^[a-z][a-z._-]{0,62}\*?$`, "such as user.add"), true
	case reflect.TypeFor[auditActor]():
		return str(`^([a-z][a-z0-9_-]{0,31}|[0-9a-f]{64}|U[A-Z2-7]{55})$`, ""), true
	case reflect.TypeFor[inviteToken]():
		return str(`^[A-Za-z0-9_-]{1,256}$`, ""), true
	case reflect.TypeFor[time.Time]():
		return schema{Type: "string", Format: "date-time"}, true
	case reflect.TypeFor[patchTime]():
		return schema{Type: []string{"string", "null"}, Format: "date-time", nullable: true}, true
	case reflect.TypeFor[[]byte]():
		return schema{Type: "string", Encoding: "base64"}, true
	}
	switch t.Kind() {
	case reflect.String:
		return schema{Type: "string", MaxLength: &length}, true
	case reflect.Bool:
		return schema{Type: "boolean"}, true
	case reflect.Int, reflect.Int64:
		return schema{Type: "integer"}, true
	case reflect.Uint64:
		zero := int64(0)
		return schema{Type: "integer", Minimum: &zero}, true
	}
	return schema{}, false
}

// schemas collects the documents that answers are made of. In a request
// (inline) everything stands where it is used, nothing may be added, and a
// pointer is a field that may be absent; in an answer it is one that may be null.
type schemas struct {
	inline     bool
	components map[string]*schema
}

func (c *schemas) of(t reflect.Type) *schema {
	if t.Kind() == reflect.Pointer {
		s := c.of(t.Elem())
		switch {
		case c.inline:
			return s
		case s.Ref != "":
			return &schema{AnyOf: []*schema{s, {Type: "null"}}}
		}
		s.Type, s.nullable = []string{s.kind(), "null"}, true
		return s
	}
	if s, ok := scalarOf(t); ok {
		if !c.inline && s.MaxLength != nil {
			s.MaxLength = nil // a limit of requests
		}
		if s.Pattern != "" {
			s.pattern = regexp.MustCompile(s.Pattern)
		}
		return &s
	}
	switch t.Kind() {
	case reflect.Slice:
		s := &schema{Type: "array", Items: c.of(t.Elem())}
		if most := maxListed; c.inline {
			s.MaxItems = &most
		}
		return s
	case reflect.Struct:
		if c.inline || t.Name() == "" {
			return c.object(t)
		}
		name := strings.ToUpper(t.Name()[:1]) + t.Name()[1:]
		if _, ok := c.components[name]; !ok {
			c.components[name] = &schema{} // ends the recursion of a type that holds itself
			c.components[name] = c.object(t)
		}
		return &schema{Ref: "#/components/schemas/" + name}
	}
	panic(fmt.Sprintf("api: no schema for %s", t)) // the table of routes is wrong: no request can reach this
}

// maxListed bounds every list in a request.
const maxListed = bus.MaxRoomsPerUser

func (c *schemas) object(t reflect.Type) *schema {
	s := &schema{Type: "object", Properties: map[string]*schema{}}
	if c.inline {
		closed := false
		s.Additional = &closed
	}
	for _, f := range reflect.VisibleFields(t) {
		name, options, tagged := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous || name == "" || name == "-" || !tagged && options != "" {
			continue
		}
		p := c.of(f.Type)
		describe(p, f.Tag)
		s.Properties[name] = p
		if optional := strings.Contains(options, "omitempty") || c.inline && (f.Type.Kind() == reflect.Pointer || f.Type == reflect.TypeFor[patchTime]()); !optional {
			s.Required = append(s.Required, name)
		}
	}
	return s
}

// describe takes over what a field of a request says of itself in its tag.
func describe(s *schema, tag reflect.StructTag) {
	if d := tag.Get("doc"); d != "" {
		s.Description = d
	}
	bound := func(name string, into **int64) {
		if n, err := strconv.ParseInt(tag.Get(name), 10, 64); err == nil {
			*into = &n
		}
	}
	bound("minimum", &s.Minimum)
	bound("maximum", &s.Maximum)
	if n, err := strconv.Atoi(tag.Get("maxLength")); err == nil {
		s.MaxLength = &n
	}
	if n, err := strconv.Atoi(tag.Get("maxItems")); err == nil {
		s.MaxItems = &n
	}
	if d := tag.Get("default"); d != "" {
		if n, err := strconv.ParseInt(d, 10, 64); err == nil {
			s.Default = n
		} else {
			s.Default = d
		}
	}
	if e := tag.Get("enum"); e != "" {
		s.Enum = nil
		for v := range strings.SplitSeq(e, ",") {
			s.Enum = append(s.Enum, v)
		}
	}
}

// check says in words what is wrong with a scalar, without repeating it: a
// seed pasted into the wrong field must not come back in an answer or a log.
func (s *schema) check(v any) (why string) {
	switch v := v.(type) {
	case nil:
		if !s.nullable {
			return "must not be null"
		}
	case string:
		switch {
		case s.kind() != "string":
			return "must be " + article(s.kind())
		case s.pattern != nil && !s.pattern.MatchString(v):
			return "must match " + s.Pattern
		case len(s.Enum) > 0 && !slices.Contains(s.Enum, any(v)):
			return "must be one of " + strings.Trim(fmt.Sprint(s.Enum), "[]")
		case s.MaxLength != nil && len([]rune(v)) > *s.MaxLength:
			return fmt.Sprintf("must not be longer than %d characters", *s.MaxLength)
		case s.Format == "date-time":
			// In UTC, as it is kept: with an offset, 9999 can be the year 10000,
			// which no record can hold.
			if t, err := time.Parse(time.RFC3339, v); err != nil || !dateTime.MatchString(v) || t.UTC().Year() < 1970 || t.UTC().Year() > 9999 {
				return "must be a time such as 2026-01-31T12:00:00Z"
			}
		}
	case bool:
		if s.kind() != "boolean" {
			return "must be " + article(s.kind())
		}
	case json.Number:
		n, err := strconv.ParseInt(v.String(), 10, 64)
		switch {
		case s.kind() != "integer":
			return "must be " + article(s.kind())
		case err != nil:
			return "must be a whole number"
		case s.Minimum != nil && n < *s.Minimum:
			return fmt.Sprintf("must be at least %d", *s.Minimum)
		case s.Maximum != nil && n > *s.Maximum:
			return fmt.Sprintf("must be at most %d", *s.Maximum)
		}
	default:
		return "must be " + article(s.kind())
	}
	return ""
}

func article(kind string) string {
	switch kind {
	case "array", "integer", "object":
		return "an " + kind
	}
	return "a " + kind
}
