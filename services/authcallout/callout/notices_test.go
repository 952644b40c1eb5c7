package callout

import (
	"encoding/json"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

func TestNoticesSayWhatDiffers(t *testing.T) {
	access := func(rooms ...kv.Grant) *kv.Access { return &kv.Access{Rooms: rooms} }
	g := func(room bus.RoomID, role bus.RoomRole, durable bool) kv.Grant {
		return kv.Grant{Room: room, Role: role, Durable: durable}
	}
	archived := func(id bus.RoomID) bool { return id == "old" }
	for _, tt := range []struct {
		name          string
		before, after *kv.Access
		want          []string
	}{
		{"nothing", access(g("ops", bus.Writer, false)), access(g("ops", bus.Writer, false)), nil},
		{"added", access(g("ops", bus.Writer, false)), access(g("log", bus.Reader, true), g("ops", bus.Writer, false)), []string{`added {"v":1,"room":"log","role":"reader","durable":true}`}},
		{"role", access(g("ops", bus.Writer, false)), access(g("ops", bus.Reader, false)), []string{`role {"v":1,"room":"ops","role":"reader","durable":false}`}},
		{"removed", access(g("dev", bus.Owner, false), g("ops", bus.Writer, false)), access(g("ops", bus.Writer, false)), []string{`removed {"v":1,"room":"dev","durable":false}`}},
		{"archived", access(g("old", bus.Owner, true)), access(), []string{`archived {"v":1,"room":"old","durable":false}`}},
		{"all at once", access(g("old", bus.Owner, false), g("ops", bus.Reader, false)), access(g("new", bus.Owner, false), g("ops", bus.Owner, false)), []string{
			`added {"v":1,"room":"new","role":"owner","durable":false}`, `role {"v":1,"room":"ops","role":"owner","durable":false}`, `archived {"v":1,"room":"old","durable":false}`,
		}},
	} {
		var got []string
		for _, n := range noticesOf(tt.before, tt.after, archived) {
			body, err := json.Marshal(n.body)
			must(t, err)
			got = append(got, string(n.kind)+" "+string(body))
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// Who was admitted on the state before a widening, and is seen only after it, is
// hinted then: nobody else would tell them. Once is enough.
func TestWhoOpensBesideAWideningIsHinted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarden(t)
		h := &counter{}
		before := w.access[w.user]
		w.cfg.Service.effects.begin(&call{serverID: "NA", clientID: 1}, before, h, time.Hour)
		w.cfg.Service.effects.begin(&call{serverID: "NA", clientID: 2}, before, h, time.Hour)
		w.changes(w.ofUser("dev"), w.rights(t, dev, ops))
		w.wantSent(t)
		w.opens(1)
		w.wantSent(t, `NA LDM {"cid":1}`)
		w.opens(2) // now the user has been judged already
		w.wantSent(t, `NA LDM {"cid":2}`)
		w.Resync()
		w.opens(3) // on the new state
		w.wantSent(t)
	})
}
