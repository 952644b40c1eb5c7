package test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus/guard"
)

// control names a test that must fail when one protection is taken away.
type control struct {
	off  guard.Name
	dir  string // of the test, from the root of the repository
	test string // its name
	live bool   // needs a cluster: only in make controls
}

// controls is the table of docs/controls.md.
var controls = []control{
	{guard.FreshReads, "test", "TestCurrencyWithoutQuorum", true},
	{guard.AckWait, "test", "TestCurrencySlowView", true},
	{guard.OwnBarrier, "bus/kv", "TestSequenceIsNoProof", false},
	{guard.Lease, "test", "TestCurrencyWithoutQuorum", true},
	{guard.Lease, "test", "TestPartition", true},
	{guard.ResponseExpiry, "test", "TestCurrencyLateAnswer", true},
	{guard.ClientSignature, "services/authcallout/callout", "TestProveRefuses", false},
	{guard.Nonce, "services/authcallout/callout", "TestProveRefuses", false},
	{guard.EmptyPermissions, "test", "TestAccessMatrix", true},
	{guard.NoReplyPermissions, "test", "TestAccessMatrix", true},
	{guard.Kick, "test", "TestEnforce", true},
	{guard.ConnectRecheck, "test", "TestEnforceRace", true},
	{guard.Sweep, "test", "TestEnforceAcrossRestarts", true},
	{guard.Cap, "test", "TestEnforceCap", true},
	{guard.SweepFirst, "test", "TestEnforceSilentServer", true},
	{guard.SweepFirst, "test", "TestPartition", true},
	{guard.WriterSweep, "test", "TestProof/a_paused_server", true},
	{guard.LowOrderKey, "bus", "TestKeysThatAnyoneCouldSignForAreRefused", false},
	{guard.RequestSignature, "bus/sig", "TestEveryByteOfARequestIsSigned", false},
	{guard.Authorize, "services/membership/api", "TestMay", false},
	{guard.CallerRecheck, "test", "TestLifecycle", true},
	{guard.CallerRecheck, "test", "TestAPIPausedRequest", true},
	{guard.NonceOnce, "test", "TestLifecycle", true},
	{guard.NonceOnce, "test", "TestThreats/T29_replays", true},
	{guard.RequestSignature, "test", "TestThreats/T31_changed_requests", true},
	{guard.CallerRecheck, "test", "TestInterrupted/stopped_while_asked", true},
}

// TestControls takes each protection away in turn and demands that the test
// which guards it fails, and that it passes with the protection in place.
func TestControls(t *testing.T) {
	if os.Getenv("UNIBUS_GUARD_OFF") != "" {
		t.Skip("this is the run of a control")
	}
	for _, c := range controls {
		t.Run(string(c.off), func(t *testing.T) {
			if c.live && !full {
				t.Skip("needs a cluster of its own: make controls")
			}
			if out, err := c.run(t.Context(), ""); err != nil {
				t.Fatalf("%s fails with the protection in place: %v\n%s", c.test, err, tail(out))
			}
			out, err := c.run(t.Context(), c.off)
			if err == nil || !strings.Contains(out, "--- FAIL: "+c.test) {
				t.Errorf("%s passes without %s: it would not notice (%v)\n%s", c.test, c.off, err, tail(out))
			}
		})
	}
}

func (c control) run(ctx context.Context, off guard.Name) (string, error) {
	bound, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(bound, "go", "test", "-count=1", "-tags", "controls", "-run", "^"+c.test+"$", ".")
	cmd.Dir = filepath.Join("..", filepath.FromSlash(c.dir))
	cmd.Env = append(os.Environ(), "UNIBUS_GUARD_OFF="+string(off), "UNIBUS_FULL=", "GOWORK=off")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func tail(s string) string {
	const most = 3000
	if len(s) > most {
		return "..." + s[len(s)-most:]
	}
	return s
}
