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

	// beside is what stands behind the protection and would hide that it is
	// gone. It is taken away in both runs, so that the test passes by the
	// protection alone.
	beside guard.Name
}

// controls is the table of docs/controls.md.
var controls = []control{
	{off: guard.FreshReads, dir: "test", test: "TestCurrencyWithoutQuorum", live: true},
	{off: guard.AckWait, dir: "test", test: "TestCurrencySlowView", live: true},
	{off: guard.OwnBarrier, dir: "bus/kv", test: "TestSequenceIsNoProof"},
	{off: guard.Lease, dir: "test", test: "TestCurrencyWithoutQuorum", live: true},
	{off: guard.Lease, dir: "test", test: "TestPartition", live: true},
	{off: guard.ResponseExpiry, dir: "test", test: "TestCurrencyLateAnswer", live: true},
	{off: guard.ClientSignature, dir: "services/authcallout/callout", test: "TestProveRefuses"},
	{off: guard.Nonce, dir: "services/authcallout/callout", test: "TestProveRefuses"},
	{off: guard.EmptyPermissions, dir: "test", test: "TestAccessMatrix", live: true},
	{off: guard.NoReplyPermissions, dir: "test", test: "TestAccessMatrix", live: true},
	{off: guard.Kick, dir: "test", test: "TestEnforce", live: true},
	{off: guard.ConnectRecheck, dir: "test", test: "TestEnforceRace", live: true, beside: guard.WriterSweep},
	{off: guard.Sweep, dir: "test", test: "TestEnforceAcrossRestarts", live: true},
	{off: guard.Cap, dir: "test", test: "TestEnforceCap", live: true},
	{off: guard.SweepFirst, dir: "test", test: "TestPartition", live: true},
	{off: guard.WriterSweep, dir: "test", test: "TestProof/a_paused_server", live: true},
	{off: guard.LowOrderKey, dir: "bus", test: "TestKeysThatAnyoneCouldSignForAreRefused"},
	{off: guard.NonceGrammar, dir: "bus/client", test: "TestDialSignsNonces"},
	{off: guard.NonceGrammar, dir: "bus", test: "TestServerNonceTakesNothingElse"},
	{off: guard.RequestSignature, dir: "bus/sig", test: "TestEveryByteOfARequestIsSigned"},
	{off: guard.Authorize, dir: "services/membership/api", test: "TestMay"},
	{off: guard.CallerRecheck, dir: "test", test: "TestLifecycle", live: true},
	{off: guard.CallerRecheck, dir: "test", test: "TestAPIPausedRequest", live: true},
	{off: guard.NonceOnce, dir: "test", test: "TestLifecycle", live: true},
	{off: guard.NonceOnce, dir: "test", test: "TestThreats/T29_replays", live: true},
	{off: guard.RequestSignature, dir: "test", test: "TestThreats/T31_changed_requests", live: true},
	{off: guard.CallerRecheck, dir: "test", test: "TestInterrupted/stopped_while_asked", live: true},
	{off: guard.CleanHeaders, dir: "test", test: "TestRooms/headers", live: true},
	{off: guard.OwnInbox, dir: "test", test: "TestRooms/replies", live: true},
	{off: guard.RecordRecheck, dir: "test", test: "TestRooms/removed", live: true},
	{off: guard.FeedRepair, dir: "test", test: "TestDurable", live: true},
	{off: guard.CallerRecheck, dir: "test", test: "TestBlobs/revoked_in_mid_upload", live: true},
	{off: guard.BlobBarrier, dir: "test", test: "TestBlobs/a_killed_node", live: true},
	{off: guard.BlobLimits, dir: "test", test: "TestBlobs/limits", live: true},
	{off: guard.BlobDigest, dir: "test", test: "TestBlobs/not_what_was_signed", live: true},
	{off: guard.RosterSigner, dir: "bus/seal", test: "TestFollows"},
	{off: guard.RosterChain, dir: "bus/seal", test: "TestFollows"},
	{off: guard.EnvelopeContext, dir: "bus/seal", test: "TestEnvelopeMoved"},
	{off: guard.MessageSender, dir: "bus/seal", test: "TestMemberForgesMember"},
	{off: guard.Replay, dir: "bus/seal", test: "TestTracker"},
	{off: guard.CAOverlap, dir: "cli/unibusctl", test: "TestOverlap"},
	{off: guard.CAOverlap, dir: "test", test: "TestAuthorities", live: true},
	{off: guard.Replay, dir: "bus/client", test: "TestKeysMessages"},
	{off: guard.RoomPin, dir: "bus/client", test: "TestKeysServerForgets"},
	{off: guard.RoomPin, dir: "bus/client", test: "TestKeysServerCallsItPlain"},
	{off: guard.AdmitByOwner, dir: "bus/client", test: "TestKeysNoGhost"},
	{off: guard.RosterSigner, dir: "bus/client", test: "TestKeysNoGhost"},
	{off: guard.ImportTLS, dir: "cli/unibusctl", test: "TestImportTLS"},
	{off: guard.ImportTombstone, dir: "cli/unibusctl", test: "TestImportTombstones"},
	{off: guard.ImportAdmins, dir: "cli/unibusctl", test: "TestImportAdmins"},
	{off: guard.DeployCheck, dir: "test", test: "TestDeployPlanted"},
	{off: guard.DeployLook, dir: "cli/unibusctl", test: "TestDeployFit"},
	{off: guard.RolloutStop, dir: "cli/unibusctl", test: "TestRolloutStopsAtTheFirst"},
	{off: guard.RolloutGate, dir: "test", test: "TestGate", live: true},
	{off: guard.Tombstones, dir: "bus/kv", test: "TestRestoreTombstonesWin"},
	{off: guard.OnlyFrozen, dir: "bus/kv", test: "TestRepairable"},
	{off: guard.BackupWhole, dir: "cli/unibusctl", test: "TestBackupContents"},
	{off: guard.BackupSignature, dir: "cli/unibusctl", test: "TestBackupSignature"},
	{off: guard.LeaveAtOnce, dir: "test", test: "TestServerAwayForLongerThanALease", live: true},
}

// TestControls takes each protection away in turn and demands that the test
// which guards it fails, and that it passes with the protection in place.
func TestControls(t *testing.T) {
	if os.Getenv("UNIBUS_GUARD_OFF") != "" {
		t.Skip("this is the run of a control")
	}
	t.Parallel()
	runs := controlRuns{dir: t.TempDir(), built: map[string]string{}, passed: map[string]bool{}}
	for _, c := range controls {
		t.Run(string(c.off), func(t *testing.T) {
			if c.live && !full {
				t.Skip("needs a cluster of its own: make controls")
			}
			inPlace := c.dir + " " + c.test + " " + string(c.beside)
			if !runs.passed[inPlace] {
				if out, err := runs.run(t, c, ""); err != nil {
					t.Fatalf("%s fails with the protection in place: %v\n%s", c.test, err, tail(out))
				}
				runs.passed[inPlace] = true
			}
			out, err := runs.run(t, c, c.off)
			if err == nil || !strings.Contains(out, "--- FAIL: "+c.test) {
				t.Errorf("%s passes without %s: it would not notice (%v)\n%s", c.test, c.off, err, tail(out))
			}
		})
	}
}

// controlRuns builds the tests of each package once: linking them takes longer
// than most of them run.
type controlRuns struct {
	dir    string
	built  map[string]string // by directory of the package
	passed map[string]bool   // what was seen to pass with everything in place
}

func (r *controlRuns) run(t *testing.T, c control, off guard.Name) (string, error) {
	t.Helper()
	bound, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	dir := filepath.Join("..", filepath.FromSlash(c.dir))
	env := append(os.Environ(), "UNIBUS_FULL=", "GOWORK=off")
	if r.built[c.dir] == "" {
		binary := filepath.Join(r.dir, strings.ReplaceAll(c.dir, "/", "-")+".test")
		build := exec.CommandContext(bound, "go", "test", "-c", "-tags", "controls", "-o", binary, ".")
		build.Dir, build.Env = dir, env
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", c.dir, err, out)
		}
		r.built[c.dir] = binary
	}
	cmd := exec.CommandContext(bound, r.built[c.dir], "-test.count=1", "-test.timeout=5m", "-test.run=^"+c.test+"$")
	cmd.Dir = dir
	cmd.Env = append(env, "UNIBUS_GUARD_OFF="+strings.Trim(string(c.beside)+","+string(off), ","))
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
