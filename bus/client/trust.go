package client

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/seal"
)

// Trust is what a user of encrypted rooms remembers, so that no server can tell
// them something else later: see Keys. It is pinned when it is first seen.
type Trust struct {
	V       int                          `json:"v"`
	Users   map[bus.UserKey]TrustedUser  `json:"users"`
	Handles map[bus.Handle]bus.UserKey   `json:"handles"` // which key a handle means
	Rooms   map[bus.RoomID]TrustedRoom   `json:"rooms"`
	Admins  map[bus.UserKey]TrustedAdmin `json:"admins"` // whose appointments of owners count
}

// TrustedUser is the newest encryption key that a user is known to have signed.
type TrustedUser struct {
	N        uint64     `json:"n,omitempty"` // 0: none seen
	Key      *seal.Hash `json:"key,omitempty"`
	Seen     time.Time  `json:"seen"`
	Verified *time.Time `json:"verified,omitempty"` // the numbers were compared
}

// TrustedRoom is the newest roster that was accepted. Nothing older, and nothing
// else of that epoch, is accepted any more.
type TrustedRoom struct {
	Epoch    uint64     `json:"epoch"`
	Roster   seal.Hash  `json:"roster"`
	Seen     time.Time  `json:"seen"`
	Verified *time.Time `json:"verified,omitempty"` // the numbers were compared, in this epoch or an earlier one
}

// TrustedAdmin is an admin whom this user trusts.
type TrustedAdmin struct {
	Seen time.Time `json:"seen"`
}

const trustVersion = 1

func (t *Trust) init() {
	t.V = trustVersion
	if t.Users == nil {
		t.Users = map[bus.UserKey]TrustedUser{}
	}
	if t.Handles == nil {
		t.Handles = map[bus.Handle]bus.UserKey{}
	}
	if t.Rooms == nil {
		t.Rooms = map[bus.RoomID]TrustedRoom{}
	}
	if t.Admins == nil {
		t.Admins = map[bus.UserKey]TrustedAdmin{}
	}
}

// handle holds what the servers say a handle means against what it meant.
func (t *Trust) handle(h bus.Handle, k bus.UserKey) error {
	if h == "" {
		return nil
	}
	if was, known := t.Handles[h]; known && was != k {
		return bus.E(bus.Forbidden, "the servers say that %s has the key %s; it was %s. Either the person was given another key, or somebody stands between you", h, k, was).
			WithHint("unibusctl user verify %s --accept, after comparing the number with theirs", h)
	}
	t.Handles[h] = k
	return nil
}

// encryptionKey holds a user's encryption key against what was known of it.
func (t *Trust) encryptionKey(user bus.UserKey, k *bus.EncryptionKey, now time.Time) error {
	if err := k.Verify(user); err != nil {
		return bus.E(bus.Forbidden, "the encryption key that the servers give for %s is not signed by them: %w", user, err)
	}
	known, hash := t.Users[user], seal.HashOf(k.Public)
	switch {
	case k.N < known.N:
		return bus.E(bus.Forbidden, "the servers give encryption key %d of %s; there is a newer one, %d", k.N, user, known.N)
	case k.N == known.N && known.Key != nil && *known.Key != hash:
		return bus.E(bus.Forbidden, "%s has signed two encryption keys under the number %d", user, k.N)
	case k.N > known.N:
		known.N, known.Key = k.N, &hash
	}
	if known.Seen.IsZero() {
		known.Seen = now.UTC().Truncate(time.Second)
	}
	t.Users[user] = known
	return nil
}

// TrustStore keeps a Trust. Update reads it, has f look at and change it, and
// writes it, while nobody else does; an error of f leaves it as it was and is
// returned.
type TrustStore interface {
	Update(f func(*Trust) error) error
}

// MemoryTrust forgets everything with the program: it can be shown the past as
// if it were the present by the servers, each time it starts.
func MemoryTrust() TrustStore { return &memoryTrust{} }

type memoryTrust struct {
	mu    sync.Mutex
	bytes []byte
}

func (m *memoryTrust) Update(f func(*Trust) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, err := updated(m.bytes, f)
	if err == nil {
		m.bytes = b
	}
	return err
}

func updated(old []byte, f func(*Trust) error) ([]byte, error) {
	t := &Trust{V: trustVersion}
	if len(bytes.TrimSpace(old)) > 0 {
		if err := json.Unmarshal(old, t); err != nil {
			return nil, bus.E(bus.Internal, "what is trusted cannot be read: %w", err)
		}
		if t.V != trustVersion {
			return nil, bus.E(bus.Internal, "what is trusted was written by a program that knows more (version %d)", t.V)
		}
	}
	t.init()
	if err := f(t); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(t, "", " ")
	if err != nil {
		return nil, bus.E(bus.Internal, "what is trusted cannot be written: %w", err)
	}
	return append(b, '\n'), nil
}

// FileTrust keeps it in a file of mode 0600, which is replaced as a whole.
// Programs that share it wait for each other. A file that others may write to is
// refused: whoever can write to it decides whom to trust.
func FileTrust(path string) TrustStore { return &fileTrust{path: path} }

type fileTrust struct {
	path string
	mu   sync.Mutex
}

func (s *fileTrust) Update(f func(*Trust) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	unlock, err := lockFile(s.path + ".lock")
	if err != nil {
		return bus.E(bus.Internal, "what is trusted cannot be locked: %w", err)
	}
	defer unlock()
	old, err := s.read()
	if err != nil {
		return err
	}
	b, err := updated(old, f)
	if err != nil || slices.Equal(b, old) {
		return err
	}
	if err := s.write(b); err != nil {
		return bus.E(bus.Internal, "what is trusted cannot be written: %w", err)
	}
	return nil
}

func (s *fileTrust) read() ([]byte, error) {
	info, err := os.Stat(s.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, bus.E(bus.Internal, "what is trusted cannot be read: %w", err)
	case info.Mode().Perm()&0o022 != 0:
		return nil, bus.E(bus.Forbidden, "%s may be written by others than its owner", s.path).WithHint("chmod 600 %s", s.path)
	}
	b, err := os.ReadFile(s.path)
	if err != nil {
		return nil, bus.E(bus.Internal, "what is trusted cannot be read: %w", err)
	}
	return b, nil
}

func (s *fileTrust) write(b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(s.path), "."+filepath.Base(s.path)+".*") // of mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), s.path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
