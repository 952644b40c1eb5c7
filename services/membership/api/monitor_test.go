package api

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func TestMonitorURL(t *testing.T) {
	for _, bad := range []string{
		"", "127.0.0.1:8222", "https://127.0.0.1:8222", "http://", "http://127.0.0.1:8222/varz", "http://127.0.0.1:8222?x=1", "http://u:p@127.0.0.1:8222", "http://%",
	} {
		if _, err := NewMonitor(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	for _, good := range []string{"http://127.0.0.1:8222", "http://[::1]:8222/"} {
		if _, err := NewMonitor(good); err != nil {
			t.Error(err)
		}
	}
}

// TestMonitorOfNoServer: whatever is there that is no nats-server, or none that
// answers in time, a scrape ends soon and shows that there is none, and no figure.
func TestMonitorOfNoServer(t *testing.T) {
	done := make(chan struct{})
	defer close(done)
	for name, answer := range map[string]http.HandlerFunc{
		"garbage":  func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello")) },
		"an error": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "{}", http.StatusInternalServerError) },
		"elsewhere": func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/other" {
				_, _ = w.Write([]byte("{}"))
				return
			}
			http.Redirect(w, r, "/other", http.StatusFound)
		},
		"silence": func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-r.Context().Done():
			case <-done:
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(answer)
			defer server.Close()
			m, err := NewMonitor(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			reg := prometheus.NewRegistry()
			reg.MustRegister(m.Collector())
			began := time.Now()
			families, err := reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took > 4*monitorPatience {
				t.Errorf("a scrape took %s", took)
			}
			if len(families) != 2 {
				t.Errorf("%d metrics, want up and healthy", len(families))
			}
			for _, f := range families {
				if v := f.GetMetric()[0].GetGauge().GetValue(); v != 0 {
					t.Errorf("%s is %v", f.GetName(), v)
				}
			}
		})
	}
}
