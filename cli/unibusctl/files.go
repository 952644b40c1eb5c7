package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"unibus.internal/bus"
)

// writeFile writes a whole file or nothing: readers and crashes never see half
// of it. Without force an existing file stays, also when two writers race, for
// what is lost with a key cannot be got back.
func writeFile(path string, data []byte, mode fs.FileMode, force bool) error {
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(mode))
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer f.Cleanup() //nolint:errcheck // nothing is left to clean after a success
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if force {
		if err := f.CloseAtomicallyReplace(); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
		return nil
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	switch err := os.Link(f.Name(), path); {
	case errors.Is(err, fs.ErrExist):
		return existsError(path)
	case err != nil:
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func existsError(path string) error {
	return bus.E(bus.Conflict, "%s exists already", path).WithHint("the same command with --force, if it may be lost")
}

// readSecret reads a file that only its owner may read.
func readSecret(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read a secret: %w", err)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read a secret: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, bus.E(bus.Invalid, "%s is not a regular file", path)
	}
	if err := bus.OnlyOwnerReads(path, info.Mode()); err != nil {
		return nil, err
	}
	const limit = 64 << 10
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read a secret: %w", err)
	}
	if len(data) > limit {
		return nil, bus.E(bus.Invalid, "%s is no key: it has %d bytes", path, info.Size())
	}
	return data, nil
}
