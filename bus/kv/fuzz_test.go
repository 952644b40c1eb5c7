package kv

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"unibus.internal/bus"
)

// FuzzInviteToken: a token has one spelling, names a key of the bucket and
// nothing else, and its secret is 160 bits.
func FuzzInviteToken(f *testing.F) {
	const good = "ubi_5f0c1f2e3d4c5b6a_abcdefghijklmnopqrstuvwxyz234567"
	for _, s := range []string{good, good + "\n", " " + good, strings.ToUpper(good), good[4:], good + "a", "ubi_*_>", "ubi__", strings.ReplaceAll(good, "5", "５"), ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		token, err := parseInviteToken(s)
		if err != nil {
			if bus.CodeOf(err) != bus.Unauthenticated || token != (inviteToken{}) || len(s) > 8 && strings.Contains(err.Error(), s) {
				t.Errorf("%q: %+v, %v", s, token, err)
			}
			return
		}
		secret, err := secretText.DecodeString(token.secret)
		if err != nil || len(secret) != 20 || token.String() != s || !inviteID.MatchString(token.id) {
			t.Errorf("%q reads as %+v: %v", s, token, err)
		}
	})
}

// FuzzAuditCursor: a cursor has one spelling, is exactly the place it names,
// and a page that begins there can be asked of a server.
func FuzzAuditCursor(f *testing.F) {
	for _, s := range []string{"", "1.0", "91.200", "0.1", "+1.0", "01.0", "1.", ".1", "1.0.0", "1.-1", "9223372036854775807.32767", "9223372036854775808.0", "1.32768", "１.0", "1.0\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := ParseAuditCursor(s)
		if err != nil {
			if bus.CodeOf(err) != bus.Invalid || c != (AuditCursor{}) {
				t.Errorf("%q: %+v, %v", s, c, err)
			}
			return
		}
		if s != "" && (c.String() != s || c.Seq == 0 || c.Index < 0) {
			t.Errorf("%q reads as %+v", s, c)
		}
		q := AuditQuery{After: c}
		start := q.start()
		if _, err := json.Marshal(start); err != nil || (start.OptStartSeq != c.Seq) {
			t.Errorf("%q starts at %+v: %v", s, start, err)
		}
	})
}

// FuzzAuditTexts: whatever a stranger chose, what is kept of it is short and
// printable, the same by the queue and directly, and lies in a block that reads.
func FuzzAuditTexts(f *testing.F) {
	f.Add("alice", "user.add", "why", int64(1_700_000_000))
	f.Add("\x1b[2J\n", "\xff\xfe", strings.Repeat("é", 300), int64(-1))
	f.Add("\u202e\u2028\u0085", "�", "<&>\u2066", int64(253402300800))
	f.Fuzz(func(t *testing.T, user, action, detail string, at int64) {
		now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
		e := bus.AuditEntry{Kind: bus.AuditDenial, User: user, Action: action, Detail: detail, At: time.Unix(at%(1<<40), 0)}
		got := cleanEntry(e, now)
		if other := cleanEntry(boundEntry(e), now); other != got {
			t.Errorf("%+v directly, %+v by the queue", got, other)
		}
		for _, s := range []string{got.User, got.Action, got.Detail} {
			if len(s) > maxAuditText || !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("kept %q", s)
			}
		}
		raw, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		var back bus.AuditEntry
		if err := json.Unmarshal(raw, &back); err != nil || back != got {
			t.Errorf("%+v, read again %+v: %v", got, back, err)
		}
	})
}
