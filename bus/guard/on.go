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

// Delay returns the pause that UNIBUS_DELAY_<POINT> asks for at a named point,
// for tests of late answers. If UNIBUS_DELAY_FILE_<POINT> names a file, the
// pause applies only while that file exists.
func Delay(point string) time.Duration {
	key := strings.ToUpper(strings.ReplaceAll(point, "-", "_"))
	if f := os.Getenv("UNIBUS_DELAY_FILE_" + key); f != "" {
		if _, err := os.Stat(f); err != nil {
			return 0
		}
	}
	d, err := time.ParseDuration(os.Getenv("UNIBUS_DELAY_" + key))
	if err != nil {
		return 0
	}
	return d
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
