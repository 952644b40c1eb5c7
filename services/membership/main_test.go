package main

import (
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"unibus.internal/services/membership/api"
)

// The environment decides by whom, under which names and how often a node may
// be asked; a value that could be meant otherwise is refused at start.
func TestConfig(t *testing.T) {
	parse := func(env map[string]string, args ...string) (config, error) {
		return parseConfig(append([]string{"-node", "n1"}, args...), func(k string) string { return env[k] }, io.Discard)
	}
	c, err := parse(nil, "-listen", "0.0.0.0:9999")
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"127.0.0.1:9999", "localhost:9999", "[::1]:9999"}; !slices.Equal(c.authorities, want) {
		t.Errorf("authorities %q, want %q", c.authorities, want)
	}
	if c.rateKey != (api.Rate{PerSecond: 50, Burst: 200}) || c.rateAddress != (api.Rate{PerSecond: 200, Burst: 800}) || c.maxRequests != 256 || c.proxies != nil {
		t.Errorf("defaults %+v", c)
	}
	c, err = parse(map[string]string{
		"UNIBUS_AUTHORITIES": "N1.corp.net:8470, bus.corp.net:443,[fd00::1]:8470", "UNIBUS_TRUSTED_PROXIES": "10.0.0.7/8,fd00::5",
		"UNIBUS_RATE_KEY": "5:10", "UNIBUS_RATE_ADDRESS": "0.5:1", "UNIBUS_MAX_REQUESTS": "8",
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"n1.corp.net:8470", "bus.corp.net", "[fd00::1]:8470"}; !slices.Equal(c.authorities, want) {
		t.Errorf("authorities %q, want %q", c.authorities, want)
	}
	if want := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::5/128")}; !slices.Equal(c.proxies, want) {
		t.Errorf("proxies %v, want %v", c.proxies, want)
	}
	for name, values := range map[string][]string{
		"UNIBUS_AUTHORITIES":     {"https://n1:8470", "n1:8470/v1", "user@n1", "n1:port", "a b"},
		"UNIBUS_TRUSTED_PROXIES": {"lb.corp.net", "10.0.0.0/33", "10.0.0.1:80"},
		"UNIBUS_RATE_KEY":        {"50", "50/200", "0:1"},
		"UNIBUS_RATE_ADDRESS":    {"x"},
		"UNIBUS_MAX_REQUESTS":    {"0", "-1", "many"},
		"UNIBUS_ADMIN_LISTEN":    {"0.0.0.0:9470", ":9470"},
		"UNIBUS_LEASE":           {"11s", "0"},
	} {
		for _, v := range values {
			if _, err := parse(map[string]string{name: v}); err == nil {
				t.Errorf("%s=%s was taken", name, v)
			}
		}
	}
	if _, err := parse(nil, "stray"); err == nil || !strings.Contains(err.Error(), "stray") {
		t.Errorf("a stray argument: %v", err)
	}
}
