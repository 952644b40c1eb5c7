package main

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus"
)

// rotating is the PKI directory of a lab with the code that turns it; nodes are
// not asked.
func (l *pkiLab) rotating() *pkiNodes {
	l.t.Helper()
	a := &app{
		in: strings.NewReader(""), out: &bytes.Buffer{}, errw: &bytes.Buffer{},
		getenv: func(string) string { return "" }, now: func() time.Time { return l.now }, rand: rand.Reader,
	}
	return &pkiNodes{app: a, dir: l.dir, inv: must(parseInventory(l.inventory))(l.t)}
}

func (l *pkiLab) turn(role caRole, stage string) {
	l.t.Helper()
	r := l.rotating()
	l.do(r.turn(l.stage(role), stage, must(r.app.signers(l.dir))(l.t)))
}

func (l *pkiLab) stage(role caRole) rotation {
	l.t.Helper()
	return must(l.dir.rotation(role))(l.t)
}

// A rotation is what the PKI directory shows, after each stage and after a crash
// at any point of one; the stage that was interrupted then goes through.
func TestRotationIsWhatTheDirectoryShows(t *testing.T) {
	for _, role := range caRoles() {
		t.Run(string(role), func(t *testing.T) {
			l := issuedPKILab(t)
			before := l.ca(role)
			ours := func(c *x509.Certificate) bool { return c.Equal(before.cert) }
			want := func(stage string) {
				t.Helper()
				r := l.stage(role)
				if r.stage != stage || !ours(r.old) || (r.next == nil) != (stage == "") {
					t.Fatalf("stage %q, old one is ours: %v; want stage %q", r.stage, ours(r.old), stage)
				}
				if code, out := l.verify(); code != 0 {
					t.Fatalf("in stage %q: %s", stage, out)
				}
			}
			want("")

			// Stopped when the key was there and the certificate not.
			l.plantKey(role, l.dir.nextKey(role))
			want("")
			l.turn(role, stageTrust)
			want(stageTrust)
			next := must(os.ReadFile(l.dir.nextKey(role)))(t)
			l.turn(role, stageTrust) // again: the same authority
			if now := must(os.ReadFile(l.dir.nextKey(role)))(t); !bytes.Equal(now, next) {
				t.Error("trust, repeated, made another authority")
			}
			leaf := serverLeaf
			if role == clusterCA {
				leaf = routeLeaf
			}
			l.must(0, "issue", "--dir", string(l.dir), "--inventory", l.inventory, "--force")
			if cert := l.cert(l.dir.node("n1").cert(leaf)); !chains(cert, []*x509.Certificate{before.cert}) {
				t.Error("in stage trust the new authority signs already")
			}

			// Stopped when the old key was kept and the new one not in its place.
			l.copy(l.dir.caKey(role), l.dir.oldKey(role))
			want(stageTrust)
			l.turn(role, stageIssue)
			want(stageIssue)
			now := l.stage(role)
			for _, n := range []string{"n1", "n2"} {
				if cert := l.cert(l.dir.node(n).cert(leaf)); !chains(cert, []*x509.Certificate{now.next}) {
					t.Errorf("%s has no certificate of the new authority", n)
				}
			}
			// Stopped when one node had its own.
			other := l.cert(l.dir.node("n1").cert(leaf))
			l.plant(must(l.minter().leaf(before, leaf, "n2", leafNames(l.rotating().inv.nodes[1])))(t), l.dir.node("n2").cert(leaf), l.dir.node("n2").key(leaf))
			l.turn(role, stageIssue)
			if cert := l.cert(l.dir.node("n2").cert(leaf)); !chains(cert, []*x509.Certificate{now.next}) {
				t.Error("issue, repeated, left a certificate of the old authority")
			}
			if cert := l.cert(l.dir.node("n1").cert(leaf)); !cert.Equal(other) {
				t.Error("issue, repeated, replaced a certificate of the new authority")
			}

			kept := must(os.ReadFile(l.dir.oldKey(role)))(t)
			l.turn(role, stageRetire)
			before = &keyPair{cert: now.next}
			want("")
			for _, key := range []string{l.dir.oldKey(role), l.dir.nextKey(role)} {
				if exists(key) {
					t.Errorf("%s is still there", key)
				}
			}
			// Stopped before the old key was removed.
			l.write(l.dir.oldKey(role), kept, 0o600)
			want("")
			l.turn(role, stageRetire)
			if exists(l.dir.oldKey(role)) {
				t.Error("retire, repeated, left the old key")
			}
		})
	}
}

// plantKey writes a new private key.
func (l *pkiLab) plantKey(role caRole, path string) {
	l.t.Helper()
	l.do(must(l.minter().authority(role))(l.t).writeKey(path, true))
}

func TestRotationInItsOrder(t *testing.T) {
	for _, test := range []struct {
		done, want string
		allowed    bool
	}{
		{"", stageTrust, true},
		{"", stageIssue, false},
		{"", stageRetire, true}, // finishes one that was interrupted; else nothing differs
		{stageTrust, stageTrust, true},
		{stageTrust, stageIssue, true},
		{stageTrust, stageRetire, false},
		{stageIssue, stageTrust, false},
		{stageIssue, stageIssue, true},
		{stageIssue, stageRetire, true},
	} {
		err := rotation{role: clientCA, stage: test.done}.order(test.want)
		if (err == nil) != test.allowed || (err != nil && bus.CodeOf(err) != bus.Conflict) {
			t.Errorf("%s after %q: %v", test.want, test.done, err)
		}
	}
	l := issuedPKILab(t)
	l.write(l.dir.caCert(clientCA), encodeCerts(l.ca(clientCA).cert, l.ca(clusterCA).cert, l.ca(clientCA).cert), 0o644)
	if _, err := l.dir.rotation(clientCA); bus.CodeOf(err) != bus.Invalid {
		t.Errorf("three authorities in one file: %v", err)
	}
}

// TestOverlap: before a certificate is shown every node trusts its authority, by
// its file and on its route port; before one is forgotten no node shows or has
// a certificate of it.
func TestOverlap(t *testing.T) {
	l := issuedPKILab(t)
	for _, role := range caRoles() {
		old := l.ca(role)
		next := must(l.minter().authority(role))(t)
		leaves := []leafRole{serverLeaf, apiLeaf}
		if role == clusterCA {
			leaves = []leafRole{routeLeaf}
		}
		sign := func(ca *keyPair, leaf leafRole) *x509.Certificate {
			return must(l.minter().leaf(ca, leaf, "n2", []string{"n2"}))(t).cert
		}
		// A node that trusts these authorities, and shows and has certificates of ca.
		sight := func(ca *keyPair, trusts ...*x509.Certificate) *nodeSight {
			s := &nodeSight{node: "n2", trust: map[caRole][]*x509.Certificate{role: trusts}, shown: map[leafRole]*x509.Certificate{}, disk: map[leafRole]*x509.Certificate{}}
			for _, leaf := range leaves {
				s.shown[leaf] = sign(ca, leaf)
				s.disk[leaf] = s.shown[leaf]
			}
			for _, c := range trusts {
				s.accepts = append(s.accepts, c.RawSubject)
			}
			return s
		}
		both := []*x509.Certificate{old.cert, next.cert}
		late := sight(old, both...)
		late.accepts = [][]byte{old.cert.RawSubject}
		halfway := sight(next, both...)
		halfway.shown[leaves[len(leaves)-1]] = sign(old, leaves[len(leaves)-1])
		unloaded := sight(next, both...)
		unloaded.disk[leaves[0]] = sign(old, leaves[0])
		twin := must(l.minter().authority(role))(t) // has the name of the new one, and another key
		twin.cert.RawSubject = next.cert.RawSubject

		for name, test := range map[string]struct {
			bundle []*x509.Certificate
			signer *x509.Certificate
			sight  *nodeSight
			want   string // in the refusal; "" for none
		}{
			"trust":                                 {both, old.cert, sight(old, old.cert), ""},
			"issue":                                 {both, next.cert, sight(old, both...), ""},
			"retire":                                {both[1:], next.cert, sight(next, both...), ""},
			"issue before the node trusts":          {both, next.cert, sight(old, old.cert), "does not trust"},
			"issue before anything is known of it":  {both, next.cert, sight(old), "does not trust"},
			"issue to who trusts one of that name":  {both, next.cert, sight(old, old.cert, twin.cert), "does not trust"},
			"issue before the server has loaded it": {both, next.cert, late, map[caRole]string{clusterCA: "does not accept it yet"}[role]},
			"retire while it shows an old one":      {both[1:], next.cert, halfway, "shows"},
			"retire while it has an old one":        {both[1:], next.cert, unloaded, "has on its disk"},
		} {
			for _, sights := range [][]*nodeSight{{test.sight}, {sight(next, both...), test.sight}} {
				if len(sights) == 2 && test.want == "" {
					continue
				}
				err := overlap(role, test.bundle, test.signer, sights)
				if (test.want == "") != (err == nil) || (err != nil && (bus.CodeOf(err) != bus.Conflict || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "n2"))) {
					t.Errorf("%s, %s: %v, want %q", role, name, err, test.want)
				}
			}
		}
	}
}

// Certificates of a running server are seen to differ from its disk, which no
// digest of its configuration shows.
func TestServerBehind(t *testing.T) {
	l := issuedPKILab(t)
	leaf := func(role leafRole) *x509.Certificate { return l.cert(l.dir.node("n1").cert(role)) }
	ca := l.ca(clusterCA).cert
	sight := func() *nodeSight {
		s := &nodeSight{trust: map[caRole][]*x509.Certificate{clusterCA: {ca}}, accepts: [][]byte{ca.RawSubject}, shown: map[leafRole]*x509.Certificate{}, disk: map[leafRole]*x509.Certificate{}}
		for _, role := range leafRoles() {
			s.shown[role], s.disk[role] = leaf(role), leaf(role)
		}
		return s
	}
	for name, test := range map[string]struct {
		edit func(*nodeSight)
		want string
	}{
		"nothing":       {func(*nodeSight) {}, ""},
		"server":        {func(s *nodeSight) { s.shown[serverLeaf] = leaf(apiLeaf) }, "server certificate"},
		"route":         {func(s *nodeSight) { s.disk[routeLeaf] = leaf(apiLeaf) }, "route certificate"},
		"no file":       {func(s *nodeSight) { delete(s.disk, routeLeaf) }, "route certificate"},
		"the API's own": {func(s *nodeSight) { s.shown[apiLeaf] = leaf(serverLeaf) }, ""},
		"a CA more":     {func(s *nodeSight) { s.trust[clusterCA] = append(s.trust[clusterCA], l.ca(clientCA).cert) }, "authorities"},
		"a CA less":     {func(s *nodeSight) { s.accepts = append(s.accepts, l.ca(clientCA).cert.RawSubject) }, "authorities"},
		"no answer":     {func(s *nodeSight) { s.accepts = nil }, "authorities"},
	} {
		s := sight()
		test.edit(s)
		if got := s.serverBehind(); (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
}

// What a local node loses by a change is kept beside it, and nothing else moves.
func TestPlaceKeepsWhatItReplaces(t *testing.T) {
	l := issuedPKILab(t)
	h := &pkiHost{node: node{name: "n1"}, etc: filepath.Join(t.TempDir(), "n1", "etc")}
	files := must(tlsFiles(string(l.dir), l.inventory, "n1"))(t)
	must(install(slices.Clone(files), h.etc, false))(t)
	was := must(os.ReadFile(filepath.Join(h.etc, "tls", "server.crt")))(t)
	l.must(0, "issue", "--dir", string(l.dir), "--inventory", l.inventory, "--node", "n1", "--force")
	files = must(tlsFiles(string(l.dir), l.inventory, "n1"))(t)
	changed := must(h.differs(t.Context(), files))(t)
	if len(changed) != 6 {
		t.Errorf("%d files differ: %v", len(changed), changed)
	}
	l.do(h.place(t.Context(), files, changed, "20260301T120000.000Z"))
	if left := must(h.differs(t.Context(), files))(t); len(left) > 0 {
		t.Errorf("still different: %v", left)
	}
	kept := filepath.Join(filepath.Dir(h.etc), "backups", "20260301T120000.000Z", "tls")
	if now := must(os.ReadFile(filepath.Join(kept, "server.crt")))(t); !bytes.Equal(now, was) {
		t.Error("the backup is not what was there")
	}
	wantMode(t, filepath.Join(kept, "server.key"), 0o600)
	if exists(filepath.Join(kept, "client-ca.crt")) {
		t.Error("what did not change was kept as well")
	}
}
