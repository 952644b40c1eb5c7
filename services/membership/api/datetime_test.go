package api

import (
	"reflect"
	"testing"
	"time"
)

// Times are those of RFC 3339, in requests as in the document: package time
// takes more.
func TestTimesAreThoseOfTheDocument(t *testing.T) {
	s, _ := scalarOf(reflect.TypeFor[time.Time]())
	for _, good := range []string{"2026-01-31T12:00:00Z", "2026-01-31T12:00:00.123456789+23:59", "2024-02-29T00:00:00-00:00"} {
		if why := s.check(good); why != "" {
			t.Errorf("%s %s", good, why)
		}
	}
	for _, bad := range []string{
		"2030-01-01T00:00:00+24:00", "2030-01-01T00:00:00+23:60", "2030-01-01T00:00:00,5Z", "2030-01-01T0:00:00Z", "2030-01-01T24:00:00Z",
		"2030-02-30T00:00:00Z", "2030-01-01 00:00:00Z", "2030-01-01T00:00:00z", "2030-01-01", "9999-12-31T23:59:59-23:59", "1969-12-31T23:59:59Z", "",
	} {
		if why := s.check(bad); why == "" {
			t.Errorf("%q is taken for a time", bad)
		}
	}
}
