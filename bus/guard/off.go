//go:build !controls

package guard

import "time"

// Off is always false: see the package documentation.
func Off(Name) bool { return false }

// Delay is always zero: see the package documentation.
func Delay(string) time.Duration { return 0 }

// ClockSkew is always zero: see the package documentation.
func ClockSkew() time.Duration { return 0 }
