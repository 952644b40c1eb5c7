package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"unibus.internal/bus/kv"
)

var update = flag.Bool("update", false, "rewrite deploy/nats from the templates")

// configLab is a cluster's keys, certificates and inventory on disk.
type configLab struct {
	t   *testing.T
	dir string
}

const threeNodes = `UNIBUS_CLUSTER=unibus
ROUTE_NETWORK=private
NODE_1="n1 public=bus1.acme.test private=10.0.0.1"
NODE_2="n2 public=198.18.0.2 private=10.0.0.2"
NODE_3="n3 public=198.18.0.3 private=10.0.0.3 nats=4251"
`

func newConfigLab(t *testing.T) *configLab {
	t.Helper()
	l := &configLab{t: t, dir: t.TempDir()}
	l.write("nodes.env", threeNodes)
	l.must(0, "config", "init", "--dir", l.path("secrets"))
	l.must(0, "pki", "init", "--dir", l.path("pki"))
	l.must(0, "pki", "issue", "--dir", l.path("pki"), "--inventory", l.path("nodes.env"))
	return l
}

func (l *configLab) path(name string) string { return filepath.Join(l.dir, filepath.FromSlash(name)) }

func (l *configLab) read(name string) string {
	l.t.Helper()
	b, err := os.ReadFile(l.path(name))
	if err != nil {
		l.t.Fatal(err)
	}
	return string(b)
}

func (l *configLab) write(name, text string) {
	l.t.Helper()
	if err := os.WriteFile(l.path(name), []byte(text), 0o600); err != nil {
		l.t.Fatal(err)
	}
}

func (l *configLab) must(code int, args ...string) string {
	l.t.Helper()
	var stdout, stderr bytes.Buffer
	a := &app{
		in: strings.NewReader(""), out: &stdout, errw: &stderr,
		getenv: func(string) string { return "" }, now: time.Now, rand: rand.Reader,
	}
	if got := a.run(l.t.Context(), args); got != code {
		l.t.Fatalf("unibusctl %s: exit %d, want %d\n%s%s", strings.Join(args, " "), got, code, &stdout, &stderr)
	}
	return stdout.String() + stderr.String()
}

// render renders a node into the directory of its name, for /etc/unibus unless
// extra says otherwise.
func (l *configLab) render(code int, node string, extra ...string) string {
	l.t.Helper()
	args := []string{"config", "render", "--inventory", l.path("nodes.env"), "--secrets", l.path("secrets"), "--pki", l.path("pki"), "--node", node, "--out", l.path(node)}
	if !slices.Contains(extra, "--etc") {
		extra = append(extra, "--etc", "/etc/unibus")
	}
	return l.must(code, append(args, extra...)...)
}

// tree maps each file below dir to its mode and content.
func (l *configLab) tree(dir string) map[string]string {
	l.t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(l.path(dir), func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(l.path(dir), p)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(p)
		out[filepath.ToSlash(name)] = info.Mode().String() + "\n" + string(b)
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return out
}

func TestRenderIsRepeatable(t *testing.T) {
	l := newConfigLab(t)
	l.render(0, "n1")
	first := l.tree("n1")
	if said := l.render(0, "n1"); !strings.Contains(said, "nothing changed") {
		t.Errorf("the second run said %q", said)
	}
	second := l.tree("n1")
	if len(first) != len(second) {
		t.Errorf("%d files, then %d", len(first), len(second))
	}
	for name, content := range first {
		if second[name] != content {
			t.Errorf("%s differs between two runs", name)
		}
	}
	for _, name := range []string{
		"creds/issuer.nk", "creds/xkey.nk", "creds/authcallout-auth.nk", "creds/authcallout-ctrl.nk", "creds/authcallout-bus.nk",
		"creds/membership-ctrl.nk", "creds/membership-bus.nk", "tls/server.key", "tls/route.key", "tls/api.key", "nats/conf.d/secrets.conf",
	} {
		if !strings.HasPrefix(first[name], "-rw-------\n") {
			t.Errorf("%s is missing or has mode %.10s", name, first[name])
		}
	}
	for name := range first {
		if strings.Contains(name, "ops") || strings.Contains(name, "sys.nk") || strings.HasSuffix(name, "-ca.key") {
			t.Errorf("%s does not belong on a node", name)
		}
	}
}

// Nodes differ in node.conf, secrets.conf (their peers) and their own keys and
// paths, and in nothing else: what holds for one holds for all.
func TestRenderedNodesShareTheirConfiguration(t *testing.T) {
	l := newConfigLab(t)
	trees := map[string]map[string]string{}
	for _, node := range []string{"n1", "n2", "n3"} {
		l.render(0, node)
		trees[node] = l.tree(node)
	}
	for name, content := range trees["n1"] {
		shared := strings.HasPrefix(name, "nats/") && name != nodeConf && name != secretsConf || strings.HasPrefix(name, "creds/")
		if same := trees["n2"][name] == content && trees["n3"][name] == content; shared && !same {
			t.Errorf("%s differs between the nodes", name)
		}
		if !strings.HasPrefix(name, "tls/") && strings.Contains(content, l.dir) {
			t.Errorf("%s names a path of this machine", name)
		}
	}
	secrets := trees["n1"][secretsConf]
	for _, peer := range []string{"@10.0.0.2:6250\"", "@10.0.0.3:6250\""} {
		if !strings.Contains(secrets, peer) {
			t.Errorf("n1 has no route to %s", peer)
		}
	}
	if strings.Contains(secrets, "10.0.0.1") {
		t.Error("n1 has a route to itself")
	}
	for name, want := range map[string]string{
		nodeConf:         "listen: \"0.0.0.0:4250\"",
		"membership.env": "UNIBUS_NATS_URL=tls://127.0.0.1:4250\n",
		"node.env":       "UNIBUS_NATS_URL=tls://bus1.acme.test:4250,tls://198.18.0.2:4250,tls://198.18.0.3:4251\n",
	} {
		if !strings.Contains(trees["n1"][name], want) {
			t.Errorf("%s lacks %q", name, want)
		}
	}
}

func TestRenderKeepsWhatIsTheOperators(t *testing.T) {
	l := newConfigLab(t)
	l.render(0, "n1")
	l.write("n1/"+localConf, "max_connections: 7\n")
	accounts := l.read("n1/nats/conf.d/accounts.conf")
	l.write("n1/nats/conf.d/accounts.conf", accounts+"# mine\n")
	if edited, rendered := editedByHand([]byte(accounts + "# mine\n")); !edited || !rendered {
		t.Errorf("an edited file passes: edited %t, rendered %t", edited, rendered)
	}
	if err := os.Chmod(l.path("n1/creds/issuer.nk"), 0o604); err != nil {
		t.Fatal(err)
	}

	dry := l.render(0, "n1", "--dry-run")
	for _, want := range []string{"would write", "accounts.conf", "issuer.nk"} {
		if !strings.Contains(dry, want) {
			t.Errorf("the dry run did not name %s:\n%s", want, dry)
		}
	}
	if !strings.HasSuffix(l.read("n1/nats/conf.d/accounts.conf"), "# mine\n") {
		t.Error("the dry run wrote")
	}
	said := l.render(0, "n1")
	if strings.Count(said, "wrote ") != 2 || strings.Contains(said, "local.conf") {
		t.Errorf("the render said:\n%s", said)
	}
	if got := l.read("n1/nats/conf.d/accounts.conf"); got != accounts {
		t.Error("the edit of a generated file stayed")
	}
	if edited, rendered := editedByHand([]byte(accounts)); edited || !rendered {
		t.Errorf("an untouched file fails: edited %t, rendered %t", edited, rendered)
	}
	if got := l.read("n1/" + localConf); got != "max_connections: 7\n" {
		t.Errorf("local.conf is now %q", got)
	}
	if info, err := os.Stat(l.path("n1/creds/issuer.nk")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the opened secret: %v, %v", info.Mode(), err)
	}
}

func TestRenderRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		breaks func(l *configLab)
		node   string
		extra  []string
		want   []string
	}{
		"unknown node":       {node: "n9", want: []string{`"n9"`, "n1, n2, n3"}},
		"no secrets":         {breaks: func(l *configLab) { l.remove("secrets") }, want: []string{"is missing", "config init"}},
		"a lost seed":        {breaks: func(l *configLab) { l.remove("secrets/xkey.nk") }, want: []string{"xkey.nk is missing"}},
		"swapped seeds":      {breaks: func(l *configLab) { l.write("secrets/issuer.nk", l.read("secrets/ops.nk")) }, want: []string{"issuer.nk", "SA..."}},
		"a weak password":    {breaks: func(l *configLab) { l.write("secrets/route.pass", "geheim\n") }, want: []string{"route.pass", "32"}},
		"an open seed":       {breaks: func(l *configLab) { l.chmod("secrets/issuer.nk", 0o644) }, want: []string{"issuer.nk", "0644"}},
		"no authority":       {breaks: func(l *configLab) { l.remove("pki/client-ca.crt") }, want: []string{"client-ca.crt is missing", "pki init"}},
		"no certificate":     {breaks: func(l *configLab) { l.remove("pki/n1/route.crt") }, want: []string{"route.crt", "pki issue"}},
		"two nodes":          {breaks: func(l *configLab) { l.write("nodes.env", threeNodes[:strings.Index(threeNodes, "NODE_3")]) }, want: []string{"lists 2 nodes"}},
		"a path to quote":    {extra: []string{"--etc", "/etc/uni bus"}, want: []string{"/etc/uni bus", "' '"}},
		"a path that breaks": {extra: []string{"--state", `/var/"; no_auth_user: x #`}, want: []string{"cannot spell"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newConfigLab(t)
			if c.breaks != nil {
				c.breaks(l)
			}
			node := "n1"
			if c.node != "" {
				node = c.node
			}
			said := l.render(1, node, c.extra...)
			for _, want := range c.want {
				if !strings.Contains(said, want) {
					t.Errorf("%q is missing in:\n%s", want, said)
				}
			}
			if _, err := os.Stat(l.path(node)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a refused render left something behind: %v", err)
			}
		})
	}
}

func (l *configLab) remove(name string) {
	l.t.Helper()
	if err := os.RemoveAll(l.path(name)); err != nil {
		l.t.Fatal(err)
	}
}

func (l *configLab) chmod(name string, mode fs.FileMode) {
	l.t.Helper()
	if err := os.Chmod(l.path(name), mode); err != nil {
		l.t.Fatal(err)
	}
}

func TestInitNeverLosesKeys(t *testing.T) {
	l := &configLab{t: t, dir: t.TempDir()}
	said := l.must(0, "config", "init", "--dir", l.path("secrets"))
	before := l.tree("secrets")
	for name, content := range before {
		mode, secret, _ := strings.Cut(content, "\n")
		if mode != "-rw-------" {
			t.Errorf("%s has mode %s", name, mode)
		}
		if strings.Contains(said, strings.TrimSpace(secret)) {
			t.Errorf("%s was printed", name)
		}
	}
	l.must(1, "config", "init", "--dir", l.path("secrets"))
	// One key that is left of many is no reason to mix it with new ones.
	for name := range before {
		if name != "ops.nk" {
			l.remove("secrets/" + name)
		}
	}
	if said := l.must(1, "config", "init", "--dir", l.path("secrets")); !strings.Contains(said, "ops.nk") {
		t.Errorf("the refusal does not name the file:\n%s", said)
	}
	if after := l.tree("secrets"); len(after) != 1 || after["ops.nk"] != before["ops.nk"] {
		t.Errorf("a refused init changed something: %d files", len(after))
	}
	l.must(0, "config", "init", "--dir", l.path("secrets"), "--force")
	if after := l.tree("secrets"); len(after) != len(before) || after["ops.nk"] == before["ops.nk"] {
		t.Error("--force did not replace all keys")
	}
	l.must(0, "config", "init", "--dir", l.path("more/secrets"))
	l.chmod("more/secrets", 0o755)
	if said := l.must(1, "config", "init", "--dir", l.path("more/secrets"), "--force"); !strings.Contains(said, "open to others") {
		t.Errorf("an open directory was taken:\n%s", said)
	}
}

// A cluster's caps leave a third of the disk to what no account is charged
// for, and CTRL can hold all of its buckets.
func TestCapsHoldTheBuckets(t *testing.T) {
	var reserved int64
	for _, s := range kv.Streams() {
		reserved += s.MaxBytes
	}
	if reserved > ctrlPerNode<<30 {
		t.Errorf("the buckets reserve %d bytes of a node, CTRL may have %d", reserved, ctrlPerNode<<30)
	}
	if (ctrlPerNode+busPerNode)*10 >= storePerNode*7 {
		t.Errorf("CTRL %d + BUS %d are not below 70 %% of %d", ctrlPerNode, busPerNode, storePerNode)
	}
}

// TestDeployNATS holds deploy/nats, and the environment files in deploy/systemd,
// to the templates: it is what an operator reads before there is a cluster. `go test -run TestDeployNATS -update`
// rewrites it.
func TestDeployNATS(t *testing.T) {
	const dir = "../../deploy/nats"
	inv := exampleInventory(t, dir+"/nodes.env.example")
	public, both := map[string]string{}, map[string][]string{}
	for _, k := range keyFiles {
		public[k.name] = "<public key of " + k.file() + ">"
		both[k.name] = []string{public[k.name]}
	}
	c := newNodeConfig(inv, inv.nodes[0], &secrets{public: public, both: both, routePassword: "<" + routePasswordFile + ">"}, "/etc/unibus", "/var/lib/unibus")
	files, err := renderTemplates(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		path := "../../deploy/systemd/" + f.name + ".example"
		if name, ok := strings.CutPrefix(f.name, "nats/"); ok {
			path = filepath.Join(dir, filepath.FromSlash(name))
		}
		if *update {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, f.data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, f.data) {
			t.Errorf("%s is not what the templates give (%v); go test -run TestDeployNATS -update", path, err)
		}
	}
}

// exampleInventory reads the example with addresses that a real cluster could
// have, and then puts the example's own back: as they are, they are refused.
func exampleInventory(t *testing.T, path string) *inventory {
	t.Helper()
	example, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseInventory(path); err == nil {
		t.Errorf("%s is accepted as it is", path)
	}
	const documentation, real = "192.0.2.", "198.18.0."
	filled := filepath.Join(t.TempDir(), "nodes.env")
	if err := os.WriteFile(filled, bytes.ReplaceAll(example, []byte(documentation), []byte(real)), 0o600); err != nil {
		t.Fatal(err)
	}
	inv, err := parseInventory(filled)
	if err != nil {
		t.Fatal(err)
	}
	for i := range inv.nodes {
		inv.nodes[i].public = strings.Replace(inv.nodes[i].public, real, documentation, 1)
	}
	return inv
}
