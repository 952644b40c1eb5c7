package api

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"
)

// The page in docs is what the service serves. Write it anew with
// UNIBUS_UPDATE=1.
func TestOpenAPIIsDocumented(t *testing.T) {
	const page = "../../../docs/openapi.json"
	got := openAPI("v1")
	if os.Getenv("UNIBUS_UPDATE") != "" {
		if err := os.WriteFile(page, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(page)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("docs/openapi.json is not what is served (%v): UNIBUS_UPDATE=1 go test -run OpenAPI ./api", err)
	}
}

// Every operation has a name of its own, a summary, and examples that the
// service itself would take.
func TestOperationsAreDescribed(t *testing.T) {
	ids := map[string]bool{}
	for _, o := range operations() {
		if ids[o.id] || o.id == "" || o.summary == "" || o.tag == "" || o.answer == nil {
			t.Errorf("%s %s (%s) is not described, or twice", o.method, o.path, o.id)
		}
		ids[o.id] = true
		if strings.Count(o.path, "{") != countPath(o) {
			t.Errorf("%s: the parameters are not those of %s", o.id, o.path)
		}
		if o.shape.body == nil {
			continue
		}
		example, err := json.Marshal(o.body)
		if err != nil {
			t.Fatal(err)
		}
		if err := decode(example, o.shape.body, new(any)); err != nil {
			t.Errorf("%s would refuse its own example: %v", o.id, err)
		}
	}
}

func countPath(o operation) (n int) {
	for _, p := range o.shape.params {
		if p.in == "path" && strings.Contains(o.path, "{"+p.name+"}") {
			n++
		}
	}
	return n
}

// The document lists every route but its own, and no other.
func TestTheDocumentIsTheRoutes(t *testing.T) {
	var doc struct {
		Paths map[string]map[string]any
	}
	if err := json.Unmarshal(openAPI("v1"), &doc); err != nil {
		t.Fatal(err)
	}
	var documented, served []string
	for path, methods := range doc.Paths {
		for method := range methods {
			documented = append(documented, strings.ToUpper(method)+" "+path)
		}
	}
	s, _ := newTestServer(t, nil)
	for _, routes := range []chi.Router{s.public, s.signed} {
		if err := chi.Walk(routes, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
			if route != "/openapi.json" && method != http.MethodHead { // HEAD is what GET is, without a body
				served = append(served, method+" "+route)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(documented)
	slices.Sort(served)
	if !slices.Equal(documented, served) {
		t.Errorf("documented %q\nserved %q", documented, served)
	}
}
