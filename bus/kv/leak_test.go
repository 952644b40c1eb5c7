package kv

import (
	"testing"

	"go.uber.org/goleak"
)

// Whatever the tests of this package do, nothing of it runs on when they are over.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
