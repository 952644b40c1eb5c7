package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"unibus.internal/bus"
)

// importKind is what an import makes.
type importKind string

const (
	importUsers   importKind = "users"
	importRooms   importKind = "rooms"
	importMembers importKind = "members"
)

// importFields are the fields of each kind. A field without which a record
// would have to be guessed is required: who is left out of --map users.status
// would be active here although revoked there. Defaults are the words of the
// old command line, user add --handle --sign-pub --role; nothing else of the
// old system is known.
var importFields = map[importKind][]importField{
	importUsers: {
		{name: "key", required: true, source: "sign_pub"},
		{name: "handle", required: true, source: "handle"},
		{name: "role", required: true, source: "role"},
		{name: "status", required: true},
		{name: "expires"},
	},
	importRooms: {
		{name: "id", required: true},
		{name: "creator", required: true},
		{name: "status", required: true},
		{name: "durable", required: true},
		{name: "encrypted", required: true},
		{name: "description"},
	},
	importMembers: {
		{name: "room", required: true},
		{name: "user", required: true},
		{name: "role", required: true},
		{name: "status", required: true},
	},
}

type importField struct {
	name     string
	required bool
	source   string // by default
}

var importKinds = []importKind{importUsers, importRooms, importMembers}

// mapping says where each field comes from. Its keys are users.role and so on.
type mapping struct {
	containers map[importKind]string // kind -> bucket, table or kind of line
	ignored    []string
	sources    map[string]string            // field -> where it is in a record
	constants  map[string]string            // field -> the same for all
	values     map[string]map[string]string // field -> word there -> word here
	fixes      map[string]string            // kind/record.field -> value
	used       map[string]bool              // fixes that met a record
	times      string
}

const (
	fromKey     = "@key"   // the key of a KV entry; @key.2 its second token
	fromOwner   = "@owner" // rooms.creator: the only owner among the members
	wordNull    = "@null"  // --value: no value at all
	wordAny     = "@any"   // --value: every other one
	timeRFC3339 = "rfc3339"
	timeUnix    = "unix"
	timeUnixMS  = "unix-ms"
)

// newMapping reads the flags --map, --set, --value, --fix, --ignore, --times.
func newMapping(mapped, sets, values, fixes, ignored []string, times string) (*mapping, error) {
	m := &mapping{
		containers: map[importKind]string{}, ignored: ignored, sources: map[string]string{}, constants: map[string]string{},
		values: map[string]map[string]string{}, fixes: map[string]string{}, used: map[string]bool{}, times: times,
	}
	if err := oneOf(times, timeRFC3339, timeUnix, timeUnixMS); err != nil {
		return nil, usagef("--times: %v", err)
	}
	for kind, fields := range importFields {
		for _, f := range fields {
			if f.source != "" {
				m.sources[string(kind)+"."+f.name] = f.source
			}
		}
	}
	for _, s := range mapped {
		left, right, ok := strings.Cut(s, "=")
		switch kind := importKind(left); {
		case !ok || right == "":
			return nil, usagef("--map %s is neither KIND=CONTAINER nor KIND.FIELD=SOURCE", quote(s))
		case importFields[kind] != nil:
			if other, twice := m.containers[kind]; twice {
				return nil, usagef("--map %s twice: %s and %s", left, quote(other), quote(right))
			}
			m.containers[kind] = right
		default:
			if err := knownField(left); err != nil {
				return nil, err
			}
			if right == fromOwner && left != "rooms.creator" {
				return nil, usagef("--map %s: %s is for rooms.creator", quote(s), fromOwner)
			}
			m.sources[left] = right
		}
	}
	for _, s := range sets {
		left, right, ok := strings.Cut(s, "=")
		if !ok {
			return nil, usagef("--set %s is not KIND.FIELD=VALUE", quote(s))
		}
		if err := knownField(left); err != nil {
			return nil, err
		}
		m.constants[left] = right
	}
	for _, s := range values {
		left, right, ok := strings.Cut(s, "=")
		field, word, colon := strings.Cut(left, ":")
		if !ok || !colon {
			return nil, usagef("--value %s is not KIND.FIELD:THERE=HERE", quote(s))
		}
		if err := knownField(field); err != nil {
			return nil, err
		}
		if m.values[field] == nil {
			m.values[field] = map[string]string{}
		}
		if other, twice := m.values[field][word]; twice && other != right {
			return nil, usagef("--value %s:%s twice: %s and %s", field, word, quote(other), quote(right))
		}
		m.values[field][word] = right
	}
	for _, s := range fixes {
		left, right, ok := strings.Cut(s, "=")
		kind, record, slash := strings.Cut(left, "/")
		dot := strings.LastIndexByte(record, '.')
		if !ok || !slash || dot < 1 {
			return nil, usagef("--fix %s is not KIND/RECORD.FIELD=VALUE", quote(s))
		}
		if err := knownField(kind + "." + record[dot+1:]); err != nil {
			return nil, err
		}
		if slices.Contains(importIdentity[importKind(kind)], record[dot+1:]) {
			return nil, usagef("--fix %s would make another record of it", quote(s))
		}
		m.fixes[kind+"/"+recordName(record[:dot])+record[dot:]] = right
	}
	return m, nil
}

// recordName spells the key in the name of a record as a report does.
func recordName(s string) string {
	room, key, member := strings.Cut(s, "/")
	if !member {
		room, key = "", s
	}
	if k, err := bus.ParseUserKey(key); err == nil {
		key = k.NKey()
	}
	if member {
		return room + "/" + key
	}
	return key
}

// importIdentity is what names a record in --fix and in the report.
var importIdentity = map[importKind][]string{importUsers: {"key"}, importRooms: {"id"}, importMembers: {"room", "user"}}

func knownField(s string) error {
	kind, name, _ := strings.Cut(s, ".")
	fields, ok := importFields[importKind(kind)]
	if !ok {
		return usagef("%s begins with none of users, rooms, members", quote(s))
	}
	var names []string
	for _, f := range fields {
		if f.name == name {
			return nil
		}
		names = append(names, f.name)
	}
	return usagef("%s is no field of %s: %s", quote(name), kind, strings.Join(names, ", "))
}

// missing lists what is required of a kind and comes from nowhere.
func (m *mapping) missing(kind importKind) (out []string) {
	for _, f := range importFields[kind] {
		name := string(kind) + "." + f.name
		_, set := m.constants[name]
		if f.required && !set && m.sources[name] == "" {
			out = append(out, name)
		}
	}
	return out
}

func (m *mapping) kindOf(container string) (importKind, bool) {
	for kind, name := range m.containers {
		if name == container {
			return kind, true
		}
	}
	return "", false
}

// found is one value on its way. field is how the report speaks of it.
type found struct {
	text  string
	null  bool
	field string
}

// value takes one field of a record: a fix, else the constant, else what is
// there, in the words of --value.
func (m *mapping) value(kind importKind, r sourceRecord, identity, name string) (found, error) {
	field := string(kind) + "." + name
	if fix := string(kind) + "/" + identity + "." + name; identity != "" {
		if v, ok := m.fixes[fix]; ok {
			m.used[fix] = true
			return found{text: v, field: field}, nil
		}
	}
	if v, ok := m.constants[field]; ok {
		return found{text: v, field: field}, nil
	}
	out := found{field: field, null: true}
	switch source := m.sources[field]; {
	case source == "" || source == fromOwner:
		return out, nil
	case source == fromKey:
		out.text, out.null = r.key, r.key == ""
	case strings.HasPrefix(source, fromKey+"."):
		n, err := strconv.Atoi(strings.TrimPrefix(source, fromKey+"."))
		if tokens := strings.Split(r.key, "."); err == nil && n >= 1 && n <= len(tokens) {
			out.text, out.null = tokens[n-1], tokens[n-1] == ""
		}
	default:
		v, ok := r.fields[source]
		if ok && v.kind == kindList {
			return out, fmt.Errorf("%s: its %s is a list", field, quote(source))
		}
		out.text, out.null = v.text, !ok || v.kind == kindNull
	}
	words := m.values[field]
	if out.null {
		if to, ok := words[wordNull]; ok {
			out.text, out.null = to, false
		}
		return out, nil
	}
	if to, ok := words[out.text]; ok && out.text != wordNull && out.text != wordAny {
		out.text = to
	} else if to, ok := words[wordAny]; ok {
		out.text = to
	}
	return out, nil
}

func (f found) require() (string, error) {
	if f.null || f.text == "" {
		return "", fmt.Errorf("%s: it has none", f.field)
	}
	return f.text, nil
}

// The records of a source, understood.
type (
	readUser struct {
		place
		kvUser
		called string // the handle before a --fix: by it other records mean them
	}
	kvUser struct {
		key     bus.UserKey
		handle  bus.Handle
		role    bus.Role
		status  bus.Status
		expires *time.Time
	}
	readRoom struct {
		place
		id                           bus.RoomID
		creator                      string // a handle or a key; empty: the only owner
		archived, durable, encrypted bool
		description                  string
	}
	readMember struct {
		place
		room    bus.RoomID
		user    string // a handle or a key
		role    bus.RoomRole
		removed bool
	}
	// place is where a record was, and what names it there.
	place struct{ container, record string }
)

func (o place) String() string { return o.container + " " + o.record }

// unreadRecord is one that is not understood, with the reason.
type unreadRecord struct {
	place
	kind importKind
	name string
	why  string
}

// readings is a whole source, understood as far as it can be.
type readings struct {
	users   []readUser
	rooms   []readRoom
	members []readMember
	unread  []unreadRecord
}

// understand decodes the mapped containers. Nothing is filled in: a record with
// one field that has no meaning here is not understood as a whole.
func (m *mapping) understand(source []container) readings {
	var out readings
	for _, c := range source {
		kind, ok := m.kindOf(c.name)
		if !ok || slices.Contains(m.ignored, c.name) || len(m.missing(kind)) > 0 {
			continue
		}
		for _, r := range c.records {
			o := place{c.name, r.name}
			name, err := m.identity(kind, r)
			if r.problem != "" {
				name, err = r.name, fmt.Errorf("%s", r.problem)
			}
			if err == nil {
				err = out.add(m, kind, r, o, name)
			}
			if err != nil {
				out.unread = append(out.unread, unreadRecord{o, kind, cmp.Or(name, r.name), err.Error()})
			}
		}
	}
	out.setTwinsApart()
	return out
}

// identity spells what names a record, as --fix does.
func (m *mapping) identity(kind importKind, r sourceRecord) (string, error) {
	var words []string
	for _, name := range importIdentity[kind] {
		v, err := m.value(kind, r, "", name)
		if err != nil {
			return "", err
		}
		text, err := v.require()
		if err != nil {
			return "", err
		}
		if k, err := bus.ParseUserKey(text); err == nil {
			text = k.NKey()
		}
		words = append(words, text)
	}
	return strings.Join(words, "/"), nil
}

func (out *readings) add(m *mapping, kind importKind, r sourceRecord, o place, identity string) error {
	text := map[string]string{}
	for _, f := range importFields[kind] {
		v, err := m.value(kind, r, identity, f.name)
		if err == nil && f.required && m.sources[v.field] != fromOwner {
			_, err = v.require()
		}
		if err != nil {
			return err
		}
		text[f.name] = v.text
		if v.null {
			text[f.name] = ""
		}
	}
	var err error
	switch kind {
	case importUsers:
		u := readUser{place: o}
		if u.kvUser, err = m.user(text); err == nil {
			was, err := m.value(kind, r, "", "handle")
			if err != nil {
				return err
			}
			u.called = was.text
			out.users = append(out.users, u)
		}
	case importRooms:
		var room readRoom
		if room, err = roomOf(text); err == nil {
			room.place = o
			out.rooms = append(out.rooms, room)
		}
	case importMembers:
		var member readMember
		if member, err = memberOf(text); err == nil {
			member.place = o
			out.members = append(out.members, member)
		}
	}
	return err
}

func (m *mapping) user(text map[string]string) (u kvUser, err error) {
	if u.key, err = bus.ParseUserKey(text["key"]); err != nil {
		return u, fmt.Errorf("users.key: %w", err)
	}
	if u.handle, err = bus.ParseHandle(text["handle"]); err != nil {
		return u, fmt.Errorf("users.handle: %w", err)
	}
	if u.role, err = bus.ParseRole(text["role"]); err != nil {
		return u, fmt.Errorf("users.role: %w", err)
	}
	switch u.status = bus.Status(text["status"]); u.status {
	case bus.Active, bus.Suspended, bus.Revoked:
	default:
		return u, fmt.Errorf("users.status: %s is none of active, suspended, revoked", quote(text["status"]))
	}
	if s := text["expires"]; s != "" && s != "never" {
		at, err := m.time(s)
		if err != nil {
			return u, fmt.Errorf("users.expires: %w", err)
		}
		u.expires = &at
	}
	return u, nil
}

func (m *mapping) time(s string) (time.Time, error) {
	at, err := m.parseTime(s)
	if err == nil && (at.Year() < 1 || at.Year() > 9999) { // has no JSON form
		err = fmt.Errorf("%s is no time of this calendar (--times)", quote(s))
	}
	return at, err
}

func (m *mapping) parseTime(s string) (time.Time, error) {
	if m.times == timeRFC3339 {
		at, err := time.Parse(time.RFC3339, s)
		if err != nil {
			return time.Time{}, fmt.Errorf("%s is no time such as 2027-01-31T12:00:00Z (--times)", quote(s))
		}
		return at.UTC(), nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("%s is no whole number (--times)", quote(s))
	}
	if m.times == timeUnix {
		return time.Unix(n, 0).UTC(), nil
	}
	return time.UnixMilli(n).UTC(), nil
}

func roomOf(text map[string]string) (r readRoom, err error) {
	if r.id, err = bus.ParseRoomID(text["id"]); err != nil {
		return r, fmt.Errorf("rooms.id: %w", err)
	}
	switch bus.RoomStatus(text["status"]) {
	case bus.RoomActive:
	case bus.RoomArchived:
		r.archived = true
	default:
		return r, fmt.Errorf("rooms.status: %s is neither active nor archived", quote(text["status"]))
	}
	for _, f := range []struct {
		name string
		to   *bool
	}{{"durable", &r.durable}, {"encrypted", &r.encrypted}} {
		switch text[f.name] {
		case "true":
			*f.to = true
		case "false":
		default:
			return r, fmt.Errorf("rooms.%s: %s is neither true nor false", f.name, quote(text[f.name]))
		}
	}
	if r.description, err = bus.ParseDescription(text["description"]); err != nil {
		return r, fmt.Errorf("rooms.description: %w", err)
	}
	if r.creator = text["creator"]; r.creator == "" {
		return r, nil
	}
	if _, err := userName(r.creator); err != nil {
		return r, fmt.Errorf("rooms.creator: %w", err)
	}
	return r, nil
}

func memberOf(text map[string]string) (m readMember, err error) {
	if m.room, err = bus.ParseRoomID(text["room"]); err != nil {
		return m, fmt.Errorf("members.room: %w", err)
	}
	if m.user, err = userName(text["user"]); err != nil {
		return m, fmt.Errorf("members.user: %w", err)
	}
	if m.role, err = bus.ParseRoomRole(text["role"]); err != nil {
		return m, fmt.Errorf("members.role: %w", err)
	}
	switch bus.MembershipStatus(text["status"]) {
	case bus.Present:
	case bus.Removed:
		m.removed = true
	default:
		return m, fmt.Errorf("members.status: %s is neither present nor removed", quote(text["status"]))
	}
	return m, nil
}

// setTwinsApart takes out all records that speak of one and the same thing: of
// two records of a key, one active and one revoked, nobody knows which counts.
func (out *readings) setTwinsApart() {
	users := twins(out.users, func(u readUser) string { return u.key.NKey() })
	out.users = apart(out, importUsers, out.users, users, func(u readUser) (place, string) { return u.place, u.key.NKey() })
	rooms := twins(out.rooms, func(r readRoom) string { return string(r.id) })
	out.rooms = apart(out, importRooms, out.rooms, rooms, func(r readRoom) (place, string) { return r.place, string(r.id) })
	// One user of a room, by whichever name: handles are made keys first.
	handles := map[string]string{}
	for _, u := range out.users {
		handles[u.called] = u.key.NKey()
	}
	whole := func(m readMember) string { return string(m.room) + "/" + cmp.Or(handles[m.user], m.user) }
	members := twins(out.members, whole)
	out.members = apart(out, importMembers, out.members, members, func(m readMember) (place, string) { return m.place, whole(m) })
}

func twins[T any](list []T, of func(T) string) map[string]int {
	n := map[string]int{}
	for _, v := range list {
		n[of(v)]++
	}
	maps.DeleteFunc(n, func(_ string, n int) bool { return n == 1 })
	return n
}

func apart[T any](out *readings, kind importKind, list []T, twins map[string]int, of func(T) (place, string)) (alone []T) {
	for _, v := range list {
		o, name := of(v)
		if n := twins[name]; n > 0 {
			out.unread = append(out.unread, unreadRecord{o, kind, name, fmt.Sprintf("one of %d records of the same", n)})
			continue
		}
		alone = append(alone, v)
	}
	return alone
}
