package api

import (
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"

	"unibus.internal/bus"
)

// A document is taken only if it cannot be read in two ways.
func TestDecode(t *testing.T) {
	s := shapeOf(reflect.TypeFor[createInviteRequest]()).body
	nested := `{"role":"member","rooms":[%s]}`
	for body, ok := range map[string]bool{
		`{"role":"member"}`:                                                                        true,
		" {\n\"role\" : \"member\"\t}\r\n":                                                         true,
		`{"role":"member","handle":"bob","rooms":[]}`:                                              true,
		fmt.Sprintf(nested, `{"room":"ops","role":"reader"}`):                                      true,
		fmt.Sprintf(nested, `{"room":"ops","role":"reader","role":"owner"}`):                       false,
		fmt.Sprintf(nested, `{"room":"ops","role":"reader","Role":"owner"}`):                       false,
		fmt.Sprintf(nested, `{"room":"ops"}`):                                                      false,
		fmt.Sprintf(nested, `[]`):                                                                  false,
		fmt.Sprintf(nested, `null`):                                                                false,
		fmt.Sprintf(nested, strings.Repeat(`{"room":"ops","role":"reader"},`, 500)+`{"room":"a"}`): false,
		`{"role":"member","expires_in_seconds":60}`:                                                true,
		`{"role":"member","expires_in_seconds":59}`:                                                false,
		`{"role":"member","expires_in_seconds":60.0}`:                                              false,
		`{"role":"member","expires_in_seconds":6e1}`:                                               false,
		`{"role":"member","expires_in_seconds":99999999999999999999}`:                              false,
		`{"role":"member","expires_in_seconds":"60"}`:                                              false,
		`{"role":"member","expires_in_seconds":null}`:                                              false,
		`{"role":"member","handle":""}`:                                                            false,
		`{"role":"member","handle":"bob\u0000"}`:                                                   false,
		"{\"role\":\"member\",\"handle\":\"bob\n\"}":                                               false,
		`{"role":"member","handle":"bob\n"}`:                                                       false,
		`{"role":"Member"}`:                                                                        false,
		`{"role":["member"]}`:                                                                      false,
		`{"role":true}`:                                                                            false,
		`{"role":"member","status":"used"}`:                                                        false,
		`{"role":"member","":1}`:                                                                   false,
		`{"role":"member"`:                                                                         false,
		`{"role":"member"}}`:                                                                       false,
		`{"role":"member"} `:                                                                       true,
		`{"role":"member"} 1`:                                                                      false,
		`{"role":"member"}{"role":"admin"}`:                                                        false,
		"\xef\xbb\xbf{\"role\":\"member\"}":                                                        false,
		`{"r\u006fle":"member"}`:                                                                   true, // the same name, spelled as JSON may
		``:                                                                                         false,
		`null`:                                                                                     false,
		`"member"`:                                                                                 false,
		strings.Repeat("[", 40000):                                                                 false,
	} {
		var in createInviteBody
		err := decode([]byte(body), s, &in)
		if (err == nil) != ok || err != nil && bus.CodeOf(err) != bus.Invalid {
			t.Errorf("%.200q: %v, want it taken: %v", body, err, ok)
		}
	}
}

// What was sent is not in what is answered: it may have been a secret that was
// pasted into the wrong place.
func TestRefusalsDoNotRepeatWhatWasSent(t *testing.T) {
	const secret = "SUAEVILSECRET"
	for _, o := range operations() {
		if o.shape.body == nil {
			continue
		}
		for name := range o.shape.body.Properties {
			body, err := json.Marshal(map[string]any{name: secret})
			if err != nil {
				t.Fatal(err)
			}
			err = decode(body, o.shape.body, reflect.New(reflect.TypeFor[any]()).Interface())
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("%s: %v", o.id, err)
			}
		}
		err := decode([]byte(`{"`+secret+`":1}`), o.shape.body, new(any))
		if err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", o.id, err)
		}
	}
}

// null and absence are two things where the API says so.
func TestPatchTellsNullFromAbsence(t *testing.T) {
	s := shapeOf(reflect.TypeFor[patchUserRequest]()).body
	for body, want := range map[string][2]bool{
		`{"role":"admin"}`:                      {false, false},
		`{"expires_at":null}`:                   {true, false},
		`{"expires_at":"2030-01-01T00:00:00Z"}`: {true, true},
	} {
		var in patchUserBody
		if err := decode([]byte(body), s, &in); err != nil {
			t.Errorf("%s: %v", body, err)
		}
		if got := [2]bool{in.ExpiresAt.set, in.ExpiresAt.value != nil}; got != want {
			t.Errorf("%s: %v, want %v", body, got, want)
		}
	}
	// 9999 here, and 10000 in UTC, in which no record could be written.
	if err := decode([]byte(`{"expires_at":"9999-12-31T23:59:59-01:00"}`), s, new(patchUserBody)); err == nil {
		t.Error("a time that has no JSON form was taken")
	}
	if err := decode([]byte(`{"handle":null}`), s, new(patchUserBody)); err == nil {
		t.Error("a handle of null was taken")
	}
}

func TestContentType(t *testing.T) {
	for header, ok := range map[string]bool{
		"application/json": true, "application/json; charset=utf-8": true, "Application/JSON;charset=UTF-8": true,
		"": false, "text/plain": false, "application/json; charset=utf-16": false, "application/json; q=1": false,
		"application/problem+json": false, "application/json, text/plain": false,
	} {
		if isJSON([]string{header}) != ok {
			t.Errorf("%q: taken is %v", header, !ok)
		}
	}
	if isJSON(nil) || isJSON([]string{"application/json", "application/json"}) {
		t.Error("none, or two, were taken")
	}
}

// The grammar that is documented and checked is the grammar of the nouns.
func FuzzID(f *testing.F) {
	for _, seed := range []string{"alice", "ops", "a-b_c", "0", "Ops", "a b", "a.b", "*", ">", "a\n", strings.Repeat("a", 33), exampleHex, exampleAlice.NKey(), `"12"`, "*", "5f0c1f2e3d4c5b6a"} {
		f.Add(seed)
	}
	params := shapeOf(reflect.TypeFor[struct {
		User   userName    `path:"user"`
		Room   bus.RoomID  `path:"room"`
		Handle bus.Handle  `path:"handle"`
		Key    newKey      `path:"key"`
		Tag    revisionTag `path:"tag"`
	}]()).params
	f.Fuzz(func(t *testing.T, s string) {
		ok := map[string]bool{}
		for _, p := range params {
			ok[p.name] = p.set(reflect.New(reflect.TypeFor[string]()).Elem(), s) == nil
		}
		_, roomErr := bus.ParseRoomID(s)
		_, handleErr := bus.ParseHandle(s)
		_, keyErr := bus.ParseUserKey(s)
		if ok["room"] != (roomErr == nil) || ok["handle"] != (handleErr == nil) {
			t.Errorf("%q: room %v %v, handle %v %v", s, ok["room"], roomErr, ok["handle"], handleErr)
		}
		if keyErr == nil && !ok["key"] || ok["user"] != (ok["handle"] || ok["key"]) {
			t.Errorf("%q: key %v %v, user %v", s, ok["key"], keyErr, ok["user"])
		}
		if ok["tag"] && s != "*" && revisionTag(s).revision() == 0 {
			t.Errorf("%q would match any revision", s)
		}
	})
}

// FuzzDecode throws bytes at every body of the API. What is taken, written
// again, has no field that was not sent under exactly that name, once.
func FuzzDecode(f *testing.F) {
	var bodies []*schema
	for _, o := range operations() {
		if o.shape.body == nil {
			continue
		}
		example, err := json.Marshal(o.body)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(len(bodies), example)
		bodies = append(bodies, o.shape.body)
	}
	f.Add(0, []byte(`{"n":1,"N":2}`))
	f.Add(0, []byte(`{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":1}}}}}}}}}`))
	f.Fuzz(func(t *testing.T, which int, body []byte) {
		s := bodies[uint(which)%uint(len(bodies))]
		var got map[string]any
		if err := decode(body, s, &got); err != nil {
			if bus.CodeOf(err) != bus.Invalid {
				t.Errorf("%q: %v", body, err)
			}
			return
		}
		for name := range got {
			if s.Properties[name] == nil {
				t.Errorf("%q: took %q", body, name)
			}
		}
		for _, name := range s.Required {
			if _, ok := got[name]; !ok {
				t.Errorf("%q: took it without %s", body, name)
			}
		}
	})
}

// A query is read as strictly as a body.
func TestQuery(t *testing.T) {
	s := shapeOf(reflect.TypeFor[listUsers]())
	for query, want := range map[string]*listUsers{
		"":           {Limit: defaultPage},
		"?limit=500": {Limit: maxPage},
		"?limit=7&status=active&role=admin&after=x": {Limit: 7, After: "x", Status: bus.Active, Role: bus.Admin},
		"?limit=0": nil, "?limit=501": nil, "?limit=07x": nil, "?limit=": nil, "?limit=1&limit=1": nil, "?limit=%31": {Limit: 1},
		"?status=": nil, "?status=gone": nil, "?Limit=1": nil, "?limit=1;after=x": nil, "?x=%zz": nil, "?other=1": nil,
	} {
		var in listUsers
		err := s.bind(httptest.NewRequest("GET", "/v1/users"+query, nil), nil, &in)
		if (err == nil) != (want != nil) || want != nil && in != *want {
			t.Errorf("%s: %+v %v, want %+v", query, in, err, want)
		}
	}
}

// Whoever is there throughout is on exactly one page, whatever is added or
// removed between two pages.
func TestCut(t *testing.T) {
	list := []string{"b", "d", "f", "h", "j", "l"}
	steps := []func(){
		func() { list = slices.Insert(list, 0, "a") },
		func() { list = slices.DeleteFunc(list, func(s string) bool { return s == "d" }) }, // the cursor itself goes
	}
	var seen []string
	after := ""
	for _, step := range append(steps, func() {}) {
		page, next := cut(list, 2, after, func(s string) string { return s })
		seen = append(seen, page...)
		if after = next; after == "" {
			break
		}
		step()
	}
	if got := strings.Join(seen, ""); got != "bdfhjl" {
		t.Errorf("pages %s", got)
	}
}
