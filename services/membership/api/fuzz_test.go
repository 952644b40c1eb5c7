package api

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"

	"unibus.internal/bus"
)

// inputsOf makes what the handlers of some operations take: one of each kind of
// parameter and body.
func inputsOf() map[string]func() any {
	return map[string]func() any{
		"listUsers": func() any { return new(listUsers) }, "changeUser": func() any { return new(patchUserRequest) },
		"listRooms": func() any { return new(listRooms) }, "changeRoom": func() any { return new(patchRoomRequest) },
		"listMembers": func() any { return new(listMembers) }, "setMember": func() any { return new(setMemberRequest) },
		"listAudit": func() any { return new(auditQuery) }, "createInvite": func() any { return new(createInviteRequest) },
		"setEncryptionKey": func() any { return new(encryptionKeyRequest) }, "withdrawInvite": func() any { return new(invitePath) },
	}
}

// FuzzBind throws a path, a query, two headers and a body at the binding of
// parameters. What is taken is within its grammar, was sent once and under its
// documented name, and can be written as JSON again: a time or a number that
// cannot would fail later, in the middle of a change.
func FuzzBind(f *testing.F) {
	type target struct {
		operation
		input func() any
	}
	var targets []target
	inputs := inputsOf()
	for _, o := range operations() {
		if inputs[o.id] == nil {
			continue
		}
		var body []byte
		if o.shape.body != nil {
			var err error
			if body, err = json.Marshal(o.body); err != nil {
				f.Fatal(err)
			}
		}
		for _, query := range []string{"", "limit=7&after=x&status=active&role=admin", "limit=1&limit=2", "all=true", "all=TRUE", "since=9999-12-31T23:59:59-23:59&action=user.add", "limit=%30", "%zz", "a;b"} {
			f.Add(len(targets), "alice", query, `"12"`, "application/json", body)
		}
		targets = append(targets, target{o, inputs[o.id]})
	}
	if len(targets) != len(inputs) {
		f.Fatalf("%d operations of %d", len(targets), len(inputs))
	}
	for i, o := range targets {
		if o.id == "changeUser" {
			f.Add(i, "alice", "", "*", "application/json; charset=utf-8", []byte(`{"expires_at":"9999-12-31T23:59:59-23:59"}`))
		}
	}
	f.Fuzz(func(t *testing.T, which int, name, query, tag, kind string, body []byte) {
		o := targets[uint(which)%uint(len(targets))]
		r := httptest.NewRequest(o.method, "/", bytes.NewReader(body))
		r.URL.RawQuery = query
		r.Header["If-Match"], r.Header["Content-Type"] = []string{tag}, []string{kind}
		rc := chi.NewRouteContext()
		for _, p := range o.shape.params {
			if p.in == "path" {
				rc.URLParams.Add(p.name, name)
			}
		}
		r = r.WithContext(context.WithValue(r.Context(), chi.RouteCtxKey, rc))
		in := o.input()
		if err := o.shape.bind(r, body, in); err != nil {
			if bus.CodeOf(err) != bus.Invalid {
				t.Errorf("%s: %v", o.id, err)
			}
			for _, sent := range []string{name, query, tag, kind} {
				// Long enough not to be a word of ours by chance.
				if len(sent) > 24 && strings.Contains(err.Error(), sent) {
					t.Errorf("%s: repeats what was sent: %v", o.id, err)
				}
			}
			return
		}
		raw, err := json.Marshal(in)
		if err != nil {
			t.Fatalf("%s took what cannot be written: %v", o.id, err)
		}
		for _, at := range timesIn(reflect.ValueOf(in)) {
			if y := at.UTC().Year(); !at.IsZero() && (y < 1970 || y > 9999) {
				t.Errorf("%s took the year %d: %s", o.id, y, raw)
			}
		}
		for given, values := range r.URL.Query() {
			documented := false
			for _, p := range o.shape.params {
				documented = documented || p.in == "query" && p.name == given
			}
			if !documented || len(values) != 1 {
				t.Errorf("%s took %q of %q", o.id, given, query)
			}
		}
		for _, p := range o.shape.params {
			text, given := name, true
			switch p.in {
			case "header":
				text = tag
			case "query":
				text, given = r.URL.Query().Get(p.name), r.URL.Query().Has(p.name)
			}
			if given && p.schema.pattern != nil && !p.schema.pattern.MatchString(text) {
				t.Errorf("%s took %s = %q", o.id, p.name, text)
			}
		}
	})
}

// timesIn are all times in a value, however deep.
func timesIn(v reflect.Value) (all []time.Time) {
	if v.IsValid() && v.Type() == reflect.TypeFor[time.Time]() {
		return []time.Time{v.Interface().(time.Time)}
	}
	switch v.Kind() {
	case reflect.Pointer:
		return timesIn(v.Elem())
	case reflect.Struct:
		if p, ok := v.Addr().Interface().(*patchTime); ok {
			return timesIn(reflect.ValueOf(p.value))
		}
		for i := range v.NumField() {
			all = append(all, timesIn(v.Field(i))...)
		}
	}
	return all
}

// FuzzClientAddress: whose budget a request takes is never for the client to
// choose. A peer that is no proxy is itself, whatever it claims; behind a proxy
// it is what the proxy itself added last.
func FuzzClientAddress(f *testing.F) {
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
	for _, s := range []string{"203.0.113.9", "10.1.1.1", "1.2.3.4, 10.0.0.1", "evil, 1.2.3.4", "::ffff:10.0.0.1", "fe80::1%eth0", "[2001:db8::1]:443", ",,", "", "1.2.3.4:99, unknown", "203.0.113.9\n10.0.0.1"} {
		f.Add("198.51.100.7:1234", s)
		f.Add("10.0.0.2:1234", s)
		f.Add("[fd00::2]:1234", s)
	}
	f.Fuzz(func(t *testing.T, peer, forwarded string) {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = peer
		plain := clientAddress(r, nil)
		r.Header["X-Forwarded-For"] = []string{forwarded}
		if got := clientAddress(r, nil); got != plain {
			t.Errorf("%q without proxies is %s with the header, %s without", peer, got, plain)
		}
		got := clientAddress(r, trusted)
		if !inAny(trusted, plain) && got != plain {
			t.Errorf("%q is no proxy and passes for %s by %q", peer, got, forwarded)
		}
		if got.Zone() != "" || got.Is4In6() {
			t.Errorf("%q, %q: %s has two spellings", peer, forwarded, got)
		}
		if inAny(trusted, plain) {
			r.Header["X-Forwarded-For"] = []string{forwarded + ", 203.0.113.50"}
			if got := clientAddress(r, trusted); got != netip.MustParseAddr("203.0.113.50") {
				t.Errorf("the proxy saw 203.0.113.50, and by %q it is %s", forwarded, got)
			}
		}
		if b := budgetOf(got); got.IsValid() && (!b.IsValid() || !b.Contains(got) || b.Bits() < 32) {
			t.Errorf("%s has the budget %s", got, b)
		}
	})
}
