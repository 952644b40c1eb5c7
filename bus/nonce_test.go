package bus

import (
	"strings"
	"testing"
)

// A key signs what a server asks for only if it cannot be anything else that
// the key signs: an HTTP request begins with a quotation mark, a statement of
// unibus with "unibus/v1/".
func TestServerNonceTakesNothingElse(t *testing.T) {
	for _, good := range []string{"AAAAAAAAAAA", "Zm9vYmFyLTEyMw", "a-b_c-d_e-f", strings.Repeat("x", 64)} {
		if !ServerNonce([]byte(good)) {
			t.Errorf("%q is refused", good)
		}
	}
	for _, bad := range []string{
		"", "short", "AAAAAAAAAA", strings.Repeat("x", 65), "AAAAAAAAAA=", "AAAAAAAAAA\n", "AAAAA AAAAAA", "AAAAAAAAAA.", "AAAAAAAAAA/",
		`"@method": POST`, "\"@method\": POST\n\"@authority\": n1:8470", "unibus/v1/room-key\x00ops", "unibus/v1/encryption-key", "AAAAAAAAAA\x00", "AAAAAAAAAAÄ",
	} {
		if ServerNonce([]byte(bad)) {
			t.Errorf("%q would be signed", bad)
		}
	}
}
