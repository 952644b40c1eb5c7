package client

import (
	"encoding/pem"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nkeys"

	"unibus.internal/bus"
)

// Whoever forgets a variable, or names a file that is not there, is told which.
func TestEnvironment(t *testing.T) {
	f := newFake(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"user":{"rooms":[]}}`)) })
	pair, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := pair.Seed()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})
	for name, content := range map[string][]byte{"id.nk": append(seed, '\n'), "ca.crt": ca} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good := map[string]string{
		"UNIBUS_IDENTITY": filepath.Join(dir, "id.nk"), "UNIBUS_CA": filepath.Join(dir, "ca.crt"),
		"UNIBUS_NATS_URL": "tls://n1:4250, tls://n2:4250", "UNIBUS_API_URL": f.URL,
	}
	cfg, err := Environment(func(name string) string { return good[name] })
	if err != nil {
		t.Fatal(err)
	}
	defer cfg.API.Close()
	if !slices.Equal(cfg.URLs, []string{"tls://n1:4250", "tls://n2:4250"}) || cfg.CAFile != good["UNIBUS_CA"] || cfg.Identity.Key() != cfg.API.Key() {
		t.Errorf("%+v", cfg)
	}
	if _, err := cfg.API.Me(t.Context()); err != nil {
		t.Errorf("the API that it names: %v", err)
	}
	for name := range good {
		for _, value := range []string{"", filepath.Join(dir, "nothing")} {
			if value != "" && name == "UNIBUS_NATS_URL" {
				continue // shows when it is dialled
			}
			bad := maps.Clone(good)
			bad[name] = value
			_, err := Environment(func(name string) string { return bad[name] })
			if bus.CodeOf(err) != bus.Invalid || value == "" && !strings.Contains(err.Error(), name) {
				t.Errorf("%s=%q: %v", name, value, err)
			}
		}
	}
	if err := os.Chmod(good["UNIBUS_IDENTITY"], 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := Environment(func(name string) string { return good[name] }); bus.CodeOf(err) != bus.Invalid || !strings.Contains(err.Error(), "others can read") {
		t.Errorf("a seed that others can read: %v", err)
	}
}
