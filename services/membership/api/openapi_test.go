package api

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
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
