//go:build controls

package guard

import (
	"os"
	"slices"
	"strings"
	"time"
)

// Off reports whether UNIBUS_GUARD_OFF (a comma list) names n.
func Off(n Name) bool {
	return slices.Contains(strings.Split(os.Getenv("UNIBUS_GUARD_OFF"), ","), string(n))
}

// Pause waits as long as UNIBUS_DELAY_<POINT> says, so that a test can make an
// answer or a View late.
func Pause(point string) {
	d, err := time.ParseDuration(os.Getenv("UNIBUS_DELAY_" + strings.ToUpper(point)))
	if err == nil {
		<-time.After(d)
	}
}

// ClockSkew is how far this process shall believe its wall clock is off
// (UNIBUS_CLOCK_SKEW), for tests of clocks that disagree.
func ClockSkew() time.Duration {
	d, err := time.ParseDuration(os.Getenv("UNIBUS_CLOCK_SKEW"))
	if err != nil {
		return 0
	}
	return d
}
