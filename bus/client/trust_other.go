//go:build !unix

package client

// lockFile has no lock to wait for: two programs must not share a file here.
func lockFile(string) (unlock func(), err error) { return func() {}, nil }
