package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A file that a render makes has the same owner and mode whether it is staged
// or copied by hand and left to tmpfiles.d.
func TestDeployOwnersAreThoseOfTmpfiles(t *testing.T) {
	f, err := os.Open("../../deploy/systemd/tmpfiles.d/unibus.conf")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // read only
	var rules [][]string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if w := strings.Fields(lines.Text()); len(w) == 5 && w[0] == "z" {
			rules = append(rules, w)
		}
	}
	l := newConfigLab(t)
	l.render(0, "n1")
	for name := range l.tree("n1") {
		got := etcFile(nodeFile{name: name})
		i := slices.IndexFunc(rules, func(w []string) bool { ok, _ := path.Match(w[1], got.path); return ok })
		if i < 0 {
			t.Errorf("tmpfiles.d does not know %s", got.path)
			continue
		}
		if want := rules[i][2] + " " + rules[i][3] + ":" + rules[i][4]; want != fmt.Sprintf("%04o %s", got.mode, got.owner) {
			t.Errorf("%s is staged %04o %s, and tmpfiles.d says %s", got.path, got.mode, got.owner, want)
		}
		if private := bytes.Contains([]byte(l.read("n1/"+name)), []byte("PRIVATE KEY")) || filepath.Ext(name) == ".nk" || name == secretsConf; private != got.secret {
			t.Errorf("%s: secret is %v", name, got.secret)
		}
		if got.secret && got.mode&0o007 != 0 {
			t.Errorf("%s is a secret and staged with mode %04o", name, got.mode)
		}
	}
}

// What differs is what is not there, has other bytes, or another owner or mode;
// the operator's own file only if it is not there.
func TestDeployCompare(t *testing.T) {
	h := &deployHost{is: "n1", files: []deployFile{
		{path: "/etc/unibus/authcallout.env", mode: 0o640, owner: "root:root", sum: "aa"},
		{path: "/etc/unibus/creds/issuer.nk", mode: 0o600, owner: "root:root", sum: "bb"},
		{path: "/etc/unibus/nats/conf.d/local.conf", mode: 0o640, owner: "root:unibus-nats", sum: "cc", once: true},
		{path: "/etc/unibus/tls/api.key", mode: 0o640, owner: "root:unibus-membership", sum: "dd"},
		{path: "/usr/bin/unibusctl", mode: 0o755, owner: "root:root", sum: "ee"},
	}}
	h.compare(map[string][]string{
		"/etc/unibus/authcallout.env":        {"a0", "640", "root:root"},
		"/etc/unibus/creds/issuer.nk":        {"bb", "644", "root:root"},
		"/etc/unibus/nats/conf.d/local.conf": {"c0", "600", "root:root"},
		"/usr/bin/unibusctl":                 {"ee", "755", "root:root"},
	})
	var got []string
	for _, c := range h.changes {
		got = append(got, c.What+" "+c.Path)
	}
	want := []string{"replace /etc/unibus/authcallout.env", "owner /etc/unibus/creds/issuer.nk", "create /etc/unibus/tls/api.key"}
	if !slices.Equal(got, want) {
		t.Errorf("changes %q, want %q", got, want)
	}
	if got := h.restarts(); !slices.Equal(got, []string{"unibus-authcallout"}) {
		t.Errorf("to restart: %q; membership reads its certificate while it runs", got)
	}
}

// A stage that would leave less than the spare room is refused; the file system
// of /var/lib may be the one of everything.
func TestDeployFits(t *testing.T) {
	const mib = 1 << 20
	h := &deployHost{
		changes: []deployChange{{Path: "/usr/bin/unibusctl", file: deployFile{data: make([]byte, 10*mib)}}},
		free:    map[string]int64{"/usr": 200 * mib, "/etc": 200 * mib, "/var/lib": 30*mib + spare},
	}
	if err := h.fits(); err != nil {
		t.Errorf("refused: %v", err)
	}
	h.free["/var/lib"]--
	if err := h.fits(); err == nil {
		t.Error("one byte less is accepted")
	}
	h.free["/var/lib"], h.free["/usr"] = 200*mib, 10*mib
	if err := h.fits(); err == nil {
		t.Error("a full /usr is accepted")
	}
}

// A node that is not what the inventory says, or cannot take a stage, ends it
// before anything is sent to any.
func TestDeployFit(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		want  string
		plant func(n3 *deployHost)
	}{
		{"", func(*deployHost) {}},
		{"n3 is aarch64, and the programs are for x86_64", func(h *deployHost) { h.arch = "aarch64" }},
		{"n3 has no rsync, flock", func(h *deployHost) { h.missing = []string{"rsync", "flock"} }},
		{"is node n2 already, and nodes.env:5 calls it n3", func(h *deployHost) { h.is = "n2" }},
		{"n1 and n3 are one machine", func(h *deployHost) { h.machine = "machine-n1" }},
		{"n3 has 63 MiB free in /var/lib", func(h *deployHost) { h.free["/var/lib"] = 63 * mib }},
	} {
		d := &deployment{inv: &inventory{path: "nodes.env"}, arch: "x86_64"}
		for i, name := range []string{"n1", "n2", "n3"} {
			d.hosts = append(d.hosts, &deployHost{
				node: node{name: name, ssh: "root@" + name, line: 3 + i}, arch: "x86_64", is: name, machine: "machine-" + name,
				changes: []deployChange{{Path: "/etc/unibus/node.env", file: deployFile{data: []byte("x")}}},
				free:    map[string]int64{"/usr": 200 * mib, "/etc": 200 * mib, "/var/lib": 200 * mib},
			})
		}
		tt.plant(d.hosts[2])
		if err := d.fit(); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v, want %q", err, tt.want)
		}
	}
}

// A program for another machine, or none at all, is refused before anything is
// sent.
func TestDeployPrograms(t *testing.T) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Skip("no Linux")
	}
	if _, err := machineOf(self); err != nil {
		t.Error(err)
	}
	other := bytes.Clone(self)
	other[18], other[19] = 0xf3, 0 // EM_RISCV
	for name, program := range map[string][]byte{"script": []byte("#!/bin/sh\n"), "riscv": other, "empty": nil} {
		if _, err := machineOf(program); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

// Every refusal that needs no node: a row without ssh, two rows of one machine, a
// placeholder, each with its line.
func TestDeployInventory(t *testing.T) {
	l := newConfigLab(t)
	row := func(n, ssh string) string {
		return fmt.Sprintf("NODE_%s=\"n%s%s public=198.18.0.%s private=10.0.0.%s\"\n", n, n, ssh, n, n)
	}
	for name, c := range map[string]struct{ rows, want string }{
		"none":        {row("1", " ssh=root@a.test") + row("2", "") + row("3", " ssh=c.test"), "nodes.env:4: n2: ssh=USER@HOST is missing"},
		"same":        {row("1", " ssh=root@a.test") + row("2", " ssh=root@a.test") + row("3", " ssh=c.test"), "nodes.env:4: n1 and n2 are the same machine"},
		"placeholder": {row("1", " ssh=root@a.test") + row("2", " ssh=<user>@b.test") + row("3", " ssh=c.test"), "nodes.env:4: n2: ssh=<user>@b.test is a placeholder"},
		"option":      {row("1", " ssh=-oProxyCommand=x") + row("2", " ssh=b.test") + row("3", " ssh=c.test"), "nodes.env:3: n1: ssh=-oProxyCommand=x is not"},
	} {
		l.write("nodes.env", "UNIBUS_CLUSTER=unibus\nROUTE_NETWORK=private\n"+c.rows)
		if out := l.must(1, "deploy", "start", "--inventory", l.path("nodes.env"), "--yes"); !strings.Contains(out, c.want) {
			t.Errorf("%s: %s, want %q", name, out, c.want)
		}
	}
}
