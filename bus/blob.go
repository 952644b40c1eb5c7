package bus

import (
	"fmt"
	"time"
)

// BlobName names a file in a room. It is one segment of a path, and part of no
// subject.
type BlobName string

// MaxBlobName is the longest name of a blob, in bytes.
const MaxBlobName = 128

// ParseBlobName accepts what is one file name on every system, and the same
// bytes to everybody who reads it: ASCII letters and digits, some punctuation
// and inner spaces, beginning with a letter, a digit or an underscore.
func ParseBlobName(s string) (BlobName, error) {
	if !isBlobName(s) {
		return "", E(Invalid, "file name %s is refused: a name is 1 to %d of A-Z a-z 0-9 . _ + = @ , ~ - and space, and starts with a letter, a digit or _", quoted(s), MaxBlobName)
	}
	return BlobName(s), nil
}

// BlobNamePattern is the grammar of ParseBlobName, for the documentation.
const BlobNamePattern = `^[A-Za-z0-9_]([A-Za-z0-9._ +=@,~-]{0,126}[A-Za-z0-9_+=@,~-])?$`

func isBlobName(s string) bool {
	if len(s) == 0 || len(s) > MaxBlobName {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_':
		case c == '+', c == '=', c == '@', c == ',', c == '~', c == '-':
			if i == 0 {
				return false
			}
		case c == '.', c == ' ': // not at the end: some systems drop them there, and so make one file of two
			if i == 0 || i == len(s)-1 {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// BlobInfo is one file of a room. What it says of the content is said of the
// bytes that are stored: in an encrypted room those are the sealed ones.
type BlobInfo struct {
	Name      BlobName  `json:"name"`
	Size      int64     `json:"size"`   // bytes
	SHA256    string    `json:"sha256"` // 64 lower-case hex digits
	CreatedAt time.Time `json:"created_at"`
	CreatedBy string    `json:"created_by"` // nkey of who stored it
}

// BlobList is what a room stores, and how much it may.
type BlobList struct {
	Room     RoomID     `json:"room"`
	Blobs    []BlobInfo `json:"blobs"` // by name
	Bytes    int64      `json:"bytes"` // of all of them
	MaxBytes int64      `json:"max_bytes"`
	MaxCount int        `json:"max_count"`
}

// BlobChange is what came of storing or deleting a file.
type BlobChange struct {
	Room    RoomID   `json:"room"`
	Blob    BlobInfo `json:"blob"`
	Already bool     `json:"already"` // these very bytes had that name, or none had it
}

// BlobDirectoryVersion is the version that this build writes and understands,
// with the meaning of UserVersion.
const BlobDirectoryVersion = 1

// BlobDirectory is the record of what a room stores: one for each room, so that
// one compare-and-set decides about a file and about the limits of its room. A
// file that is not in it does not exist, whatever chunks are stored.
type BlobDirectory struct {
	V     int          `json:"v"`
	Room  RoomID       `json:"room"`
	Blobs []StoredBlob `json:"blobs"` // by name
}

// StoredBlob is one file, with the name under which its chunks are stored: made
// by the service, and never said to users.
type StoredBlob struct {
	BlobInfo
	ID string `json:"id"` // 32 lower-case hex digits
}

// Validate checks every field that a decision rests on.
func (d BlobDirectory) Validate() error {
	if d.V != BlobDirectoryVersion {
		return E(Invalid, "directory version %d is not %d", d.V, BlobDirectoryVersion)
	}
	if _, err := ParseRoomID(string(d.Room)); err != nil {
		return err
	}
	last := BlobName("")
	for _, b := range d.Blobs {
		if _, err := ParseBlobName(string(b.Name)); err != nil {
			return err
		}
		switch {
		case b.Name <= last:
			return E(Invalid, "the directory of room %s is not sorted by name, or names one twice", d.Room)
		case b.Size < 0, !isHex(b.SHA256, 64), !isHex(b.ID, 32):
			return E(Invalid, "the directory of room %s describes %s wrongly", d.Room, b.Name)
		}
		last = b.Name
	}
	return nil
}

func isHex(s string, length int) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) == length
}

// BlobLimits is how much one room may store.
type BlobLimits struct {
	Bytes int64 // of all its files
	Count int
}

// DefaultBlobLimits are what a service uses unless told otherwise.
func DefaultBlobLimits() BlobLimits { return BlobLimits{Bytes: 2 << 30, Count: 1000} }

// MaxBlobCount is the most that a limit of files may be: a directory is one
// record.
const MaxBlobCount = 1000

// ParseBlobLimits reads "2GiB:1000": bytes in whole MiB or GiB, and files.
func ParseBlobLimits(s string) (BlobLimits, error) {
	var n int64
	var unit string
	var count int
	if _, err := fmt.Sscanf(s, "%d%3s:%d", &n, &unit, &count); err == nil && fmt.Sprintf("%d%s:%d", n, unit, count) == s {
		for name, size := range map[string]int64{"MiB": 1 << 20, "GiB": 1 << 30} {
			if unit == name && 1 <= n && n <= 1<<20 && 1 <= count && count <= MaxBlobCount {
				return BlobLimits{Bytes: n * size, Count: count}, nil
			}
		}
	}
	return BlobLimits{}, E(Invalid, "limit %s is not SIZE:FILES, such as 2GiB:1000 (MiB or GiB; at most %d files)", quoted(s), MaxBlobCount)
}
