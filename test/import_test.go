package test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/test/cluster"
	"unibus.internal/test/wire"
)

// TestImport is the cut-over from an old system beside the new one on the same
// machine: a single server with six buckets, whose records are this test's own
// invention, is read over TLS by a user who may only read; its users come over
// with their keys and rooms, whoever had ended stays so, and the old system goes
// on as if nothing had been, for the way back.
func TestImport(t *testing.T) {
	t.Parallel()
	w := &world{Cluster: cluster.Start(t, cluster.Options{Authcallout: true, Membership: true, Lease: directLease}), t: t}
	trust, err := wire.Trust(w.CA())
	if err != nil {
		t.Fatal(err)
	}
	w.trust = trust
	m := &migration{direct: &direct{w}, old: newOldSystem(t, w)}
	w.WaitHealthy(30 * time.Second)
	for _, s := range []struct {
		name string
		test func(*testing.T)
	}{
		{"before the first admin", m.beforeTheFirstAdmin},
		{"refused", m.refused},
		{"unmapped", m.unmapped},
		{"dry run", m.dryRun},
		{"interrupted", m.interrupted},
		{"again", m.again},
		{"the clients move", m.clientsMove},
		{"what has ended", m.ended},
		{"the way back", m.wayBack},
	} {
		t.Run(s.name, s.test)
	}
}

type migration struct {
	*direct
	old *oldSystem
}

// oldCrowd is how many more members the old system has.
const oldCrowd = 40

// oldSystem is a server of another cluster on this machine.
type oldSystem struct {
	t      testing.TB
	url    string
	ca     string
	reader *person // may read buckets, and nothing else
	own    *person // the old system itself
	people map[string]*person
	js     jetstream.JetStream // of own
}

func newOldSystem(t *testing.T, w *world) *oldSystem {
	t.Helper()
	o := &oldSystem{t: t, reader: newPerson(t, "internal"), own: newPerson(t, "old"), people: map[string]*person{}}
	for _, name := range []string{"boss", "alice", "bob", "carol", "dan", "eve"} {
		o.people[name] = newPerson(t, name)
	}
	cert, key := selfSigned(t)
	o.ca = cert
	var users strings.Builder
	for _, p := range o.people {
		fmt.Fprintf(&users, "{ nkey: %s, permissions: { publish: [\"chat.>\"], subscribe: [\"chat.>\", \"_INBOX.>\"] } }\n", p.key.NKey())
	}
	url := w.bareServer(t, fmt.Sprintf(`
server_name: old
jetstream { store_dir: %q, max_file_store: 64MB, max_memory_store: 1MB }
tls { cert_file: %q, key_file: %q }
authorization { users: [
  { nkey: %s, permissions: {
      publish: ["$JS.API.STREAM.NAMES", "$JS.API.STREAM.INFO.*", "$JS.API.STREAM.MSG.GET.*"], subscribe: ["_INBOX.>"] } }
  { nkey: %s }
  %s
] }`, t.TempDir(), cert, key, o.reader.key.NKey(), o.own.key.NKey(), users.String()))
	o.url = url
	cluster.WaitFor(t, 20*time.Second, "the old system", func() error {
		nc, err := o.connect(o.own)
		if err != nil {
			return err
		}
		t.Cleanup(nc.Close)
		o.js, err = jetstream.New(nc)
		return err
	})
	js := o.js
	for _, b := range []string{"users", "rooms", "members", "rooms_by_member", "room_keys", "nonces"} {
		if _, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "UNIBUS_" + b, History: 5, Replicas: 1}); err != nil {
			t.Fatal(err)
		}
	}
	o.put(t, "users", o.hex("boss"), `{"sign_pub":%q,"handle":"boss","role":"admin","disabled":null}`, o.hex("boss"))
	o.put(t, "users", o.hex("alice"), `{"sign_pub":%q,"handle":"alice","role":"member","disabled":null}`, o.hex("alice"))
	o.put(t, "users", o.hex("alice"), `{"sign_pub":%q,"handle":"alice","role":"admin","disabled":null}`, o.hex("alice"))
	o.put(t, "users", o.hex("bob"), `{"sign_pub":%q,"handle":"bob","role":"member","disabled":null}`, o.hex("bob"))
	o.put(t, "users", o.hex("carol"), `{"sign_pub":%q,"handle":"carol","role":"member","disabled":"2026-01-01"}`, o.hex("carol"))
	o.put(t, "users", o.hex("dan"), `{"sign_pub":%q,"handle":"dan","role":"admin"}`, o.hex("dan"))
	o.put(t, "users", o.hex("eve"), `{"sign_pub":%q,"handle":"eve","role":"member","disabled":"pause"}`, o.hex("eve"))
	o.put(t, "users", "ffff", `{"sign_pub":"ffff","handle":"broken","role":"member"}`)
	o.put(t, "users", "deleted", `{"sign_pub":"deleted","handle":"deleted","role":"member"}`)
	kv, err := js.KeyValue(t.Context(), "UNIBUS_users")
	if err != nil {
		t.Fatal(err)
	}
	if err := kv.Delete(t.Context(), "deleted"); err != nil {
		t.Fatal(err)
	}
	o.put(t, "rooms", "ops", `{"owner":%q}`, o.hex("alice"))
	o.put(t, "rooms", "attic", `{"owner":%q,"closed":true}`, o.hex("carol"))
	for name, role := range map[string]string{"alice": "owner", "bob": "write", "carol": "write"} {
		o.put(t, "members", "ops."+o.hex(name), `{"role":%q}`, role)
		o.put(t, "rooms_by_member", o.hex(name)+".ops", `{}`)
	}
	for i := range oldCrowd {
		p := newPerson(t, fmt.Sprintf("user%02d", i))
		o.put(t, "users", p.key.Hex(), `{"sign_pub":%q,"handle":%q,"role":"member","disabled":null}`, p.key.Hex(), p.name)
		o.put(t, "members", "ops."+p.key.Hex(), `{"role":"read"}`)
	}
	o.put(t, "room_keys", "ops.1", `{"secret":"c2VjcmV0IG9mIHRoZSBvbGQ"}`)
	o.put(t, "nonces", "n1", `plain text`)
	return o
}

func (o *oldSystem) hex(name string) string { return o.people[name].key.Hex() }

// put writes one entry as the old system would.
func (o *oldSystem) put(t *testing.T, bucket, key, format string, args ...any) {
	t.Helper()
	kv, err := o.js.KeyValue(t.Context(), "UNIBUS_"+bucket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kv.Put(t.Context(), key, fmt.Appendf(nil, format, args...)); err != nil {
		t.Fatal(err)
	}
}

// connect is a client of the old system.
func (o *oldSystem) connect(p *person) (*nats.Conn, error) {
	return nats.Connect(o.url, nats.RootCAs(o.ca), nats.Nkey(p.key.NKey(), p.kp.Sign), nats.Timeout(5*time.Second), nats.MaxReconnects(-1))
}

// streams tells all that a reader could have changed.
func (o *oldSystem) streams(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for s := range o.js.ListStreams(t.Context()).Info() {
		out[s.Config.Name] = fmt.Sprintf("%d messages up to %d, %d consumers, %d deleted", s.State.Msgs, s.State.LastSeq, s.State.Consumers, s.State.NumDeleted)
	}
	return out
}

// selfSigned is a certificate for loopback that is its own authority.
func selfSigned(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "old"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "old.crt"), filepath.Join(dir, "old.key")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

// line is a whole import, with what more is asked.
func (m *migration) line(more ...string) []string {
	return append([]string{
		"import", "--from-nats", m.old.url, "--nkey", m.old.reader.seedFile(m.old.t), "--from-ca", m.old.ca,
		"--map", "users=UNIBUS_users", "--map", "users.status=disabled", "--value", "users.status:@null=active", "--value", "users.status:@any=revoked",
		"--value", "users.status:pause=suspended", "--admins", "dan",
		"--map", "rooms=UNIBUS_rooms", "--map", "rooms.id=@key", "--map", "rooms.creator=owner",
		"--map", "rooms.status=closed", "--value", "rooms.status:@null=active", "--value", "rooms.status:true=archived", "--set", "rooms.durable=false", "--set", "rooms.encrypted=false",
		"--map", "members=UNIBUS_members", "--map", "members.room=@key.1", "--map", "members.user=@key.2", "--map", "members.role=role",
		"--value", "members.role:write=writer", "--value", "members.role:read=reader", "--set", "members.status=present",
		"--ignore", "UNIBUS_rooms_by_member", "--ignore", "UNIBUS_room_keys", "--ignore", "UNIBUS_nonces",
	}, more...)
}

type importDocument struct {
	DryRun     bool `json:"dry_run"`
	Complete   bool `json:"complete"`
	Containers []struct {
		Name, Use        string
		Records, Deleted int
	}
	Counts map[string]map[string]int
	Items  []struct {
		Kind, Name, Outcome, Detail string
		Done                        bool
	}
	OnlyHere map[string][]string `json:"only_here"`
}

func (m *migration) report(t *testing.T, code int, args ...string) importDocument {
	t.Helper()
	r := m.run(append(args, "--json")...)
	var d importDocument
	if err := json.Unmarshal([]byte(r.Stdout), &d); err != nil || r.Code != code {
		t.Fatalf("exit %d, want %d: %v\n%s%s", r.Code, code, err, r.Stdout, r.Stderr)
	}
	if strings.Contains(r.Stdout+r.Stderr, "c2VjcmV0") {
		t.Errorf("it shows what the old system keeps secret")
	}
	return d
}

// handles of everybody who is registered here, sorted.
func (m *migration) registered(t *testing.T) []string {
	t.Helper()
	return strings.Fields(m.want(t, 0, "", "user", "list", "--names").Stdout)
}

// beforeTheFirstAdmin: a fresh cluster lets nobody in, and the first admin comes
// by the ops seed alone.
func (m *migration) beforeTheFirstAdmin(t *testing.T) {
	for i, v := range m.everywhere(m.old.people["boss"]) {
		if v != refused {
			t.Errorf("n%d before there is an admin: %s", i+1, v)
		}
	}
	m.want(t, 1, "no first admin yet", m.line("--yes", "--partial")...)
	if r := m.CLI("bootstrap", "--handle", "boss", "--sign-pub", m.old.hex("boss")); r.Code != 2 {
		t.Errorf("a bootstrap without the ops seed: exit %d", r.Code)
	}
	m.want(t, 0, "first admin boss", "bootstrap", "--handle", "boss", "--sign-pub", m.old.hex("boss"))
	m.want(t, 1, "already bootstrapped", "bootstrap", "--handle", "alice", "--sign-pub", m.old.hex("alice"))
	m.openStore()
	m.waitAdmits(m.old.people["boss"], m.Nodes()...)
}

// refused: a wrong authority, a wrong key, no TLS are each named.
func (m *migration) refused(t *testing.T) {
	stranger := newPerson(t, "stranger").seedFile(t)
	internal := m.old.reader.seedFile(t)
	open := filepath.Join(t.TempDir(), "open.nk")
	if err := os.WriteFile(open, []byte("SU\n"), 0o644); err != nil { //nolint:gosec // readable on purpose
		t.Fatal(err)
	}
	for _, f := range []struct {
		code int
		want string
		args []string
	}{
		{3, "unknown authority", []string{"--from-nats", m.old.url, "--nkey", internal}}, // the CA of --ca
		{3, "Authorization Violation", []string{"--from-nats", m.old.url, "--nkey", stranger, "--from-ca", m.old.ca}},
		{3, "Authorization Violation", []string{"--from-nats", m.old.url, "--from-ca", m.old.ca}},
		{3, "unknown authority", []string{"--from-nats", strings.Replace(m.old.url, "tls", "nats", 1), "--nkey", internal}},
		{1, "others can read", []string{"--from-nats", m.old.url, "--nkey", open, "--from-ca", m.old.ca}},
		{3, "does not let us in", []string{"--from-nats", "tls://" + cluster.Loopback(freePort(t)), "--nkey", internal, "--from-ca", m.old.ca}},
		{3, "does not answer STREAM.NAMES", []string{"--from-nats", m.old.url, "--nkey", m.old.people["bob"].seedFile(t), "--from-ca", m.old.ca}},
	} {
		m.want(t, f.code, f.want, append([]string{"import"}, f.args...)...)
	}
}

// unmapped: the report tells names and types of what is there, to map it by.
func (m *migration) unmapped(t *testing.T) {
	args := []string{"import", "--from-nats", m.old.url, "--nkey", m.old.reader.seedFile(t), "--from-ca", m.old.ca}
	d := m.report(t, 1, args...)
	var got []string
	for _, c := range d.Containers {
		got = append(got, fmt.Sprintf("%s %s %d", c.Name, c.Use, c.Records))
	}
	want := []string{
		fmt.Sprintf("UNIBUS_members unknown %d", oldCrowd+3), "UNIBUS_nonces unknown 1", "UNIBUS_room_keys unknown 1", "UNIBUS_rooms unknown 2",
		"UNIBUS_rooms_by_member unknown 3", fmt.Sprintf("UNIBUS_users unknown %d", oldCrowd+7),
	}
	if !slices.Equal(got, want) {
		t.Errorf("containers %q, want %q", got, want)
	}
	if r := m.run(args...); !strings.Contains(spaces.ReplaceAllString(r.Stdout, " "), "UNIBUS_users disabled null|text") {
		t.Errorf("the fields are not shown:\n%s%s", r.Stdout, r.Stderr)
	}
	m.want(t, 1, "nobody says what users.status are", append(args, "--map", "users=UNIBUS_users")...)
}

// dryRun reports all and changes nothing, as does --yes while something is left
// over.
func (m *migration) dryRun(t *testing.T) {
	before := m.registered(t)
	for _, more := range [][]string{nil, {"--yes"}, {"--yes", "--partial", "--dry-run"}} {
		d := m.report(t, 1, m.line(more...)...)
		if !d.DryRun || d.Complete || d.Counts["users"]["create"] != oldCrowd+5 || d.Counts["users"]["already"] != 1 || d.Counts["users"]["unknown"] != 1 ||
			d.Counts["rooms"]["create"] != 2 || d.Counts["members"]["create"] != oldCrowd+2 || d.Counts["members"]["skipped"] != 1 {
			t.Errorf("%v: %+v", more, d.Counts)
		}
		if d.Containers[5].Deleted != 1 {
			t.Errorf("a deletion is not counted: %+v", d.Containers[5])
		}
	}
	if after := m.registered(t); !slices.Equal(before, after) {
		t.Errorf("a dry run registered %v", after)
	}
	m.want(t, 1, "is neither mapped nor ignored", m.line("--yes", "--ignore", "x")[:len(m.line())-2]...)
}

// interrupted: ended half-way by Ctrl-C, the same line completes it.
func (m *migration) interrupted(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), filepath.Join(m.Bin, "unibusctl"), append([]string{"--direct"}, m.line("--yes", "--partial")...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + m.Dir}
	for k, v := range m.CLIEnv("") {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	var said lockedBuffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cluster.WaitFor(t, 60*time.Second, "some users to be there", func() error {
		if n := len(m.view.Users()); n < 8 {
			return fmt.Errorf("%d are there", n)
		}
		return nil
	})
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	there := len(m.registered(t))
	if code := cmd.ProcessState.ExitCode(); code != 130 || there >= oldCrowd+6 {
		t.Fatalf("exit %d with %d users registered: %s", code, there, said.String())
	}
	d := m.report(t, 0, m.line("--yes", "--partial")...)
	if d.DryRun || d.Complete || d.Counts["users"]["create"]+d.Counts["users"]["already"] != oldCrowd+6 || d.Counts["users"]["already"] != there {
		t.Errorf("%d were there: %+v", there, d.Counts)
	}
	for _, i := range d.Items {
		if i.Done != (i.Outcome == "create") {
			t.Errorf("%s %s: %s, done %v", i.Kind, i.Name, i.Outcome, i.Done)
		}
	}
}

// again: everything is there already, and nothing is written.
func (m *migration) again(t *testing.T) {
	revision := func() (n uint64) {
		for _, u := range m.view.Users() {
			n = max(n, u.Revision)
		}
		return n
	}
	before := revision()
	d := m.report(t, 0, m.line("--yes", "--partial")...)
	if n := d.Counts["users"]["create"] + d.Counts["rooms"]["create"] + d.Counts["members"]["create"]; n != 0 || d.Counts["members"]["already"] != oldCrowd+2 || revision() != before {
		t.Errorf("a second run: %+v, revision %d, before %d", d.Counts, revision(), before)
	}
}

// clientsMove: with the keys they have, to the addresses of the new cluster.
func (m *migration) clientsMove(t *testing.T) {
	roles := map[string]string{}
	for _, u := range m.view.Users() {
		roles[string(u.Handle)] = fmt.Sprintf("%s %s", u.Role, u.Status)
	}
	for name, want := range map[string]string{"boss": "admin active", "alice": "member active", "bob": "member active", "carol": "member revoked", "dan": "admin active", "eve": "member suspended"} {
		if roles[name] != want {
			t.Errorf("%s is %q, want %q", name, roles[name], want)
		}
	}
	alice, bob := m.old.people["alice"], m.old.people["bob"]
	m.waitAdmits(alice, m.Nodes()...)
	for _, name := range []string{"carol", "eve"} {
		for i, v := range m.everywhere(m.old.people[name]) {
			if v != refused {
				t.Errorf("n%d answers %s, who has no access in the old system: %s", i+1, name, v)
			}
		}
	}
	m.want(t, 1, "was archived", "room", "create", "attic", "--owner", "alice")
	reader, err := m.Dial(2, alice.options(m.CA())...)
	if err != nil {
		t.Fatal(err)
	}
	sub, err := reader.SubscribeSync("room.ops.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := reader.Flush(); err != nil {
		t.Fatal(err)
	}
	writer, err := m.Dial(1, bob.options(m.CA())...)
	if err != nil {
		t.Fatal(err)
	}
	cluster.WaitFor(t, 10*time.Second, "alice to hear bob", func() error {
		if err := writer.Publish("room.ops."+bob.key.NKey()+".hello", []byte("moved")); err != nil {
			return err
		}
		_, err := sub.NextMsg(time.Second)
		return err
	})
	m.want(t, 0, "user.import", "audit", "list", "--action", "user.import")
	m.want(t, 0, "", "audit", "verify")
}

// ended: what ends here never comes back by an import; who is revoked there
// afterwards is revoked here by the next one, and thrown out.
func (m *migration) ended(t *testing.T) {
	m.want(t, 0, "revoked dan", "user", "revoke", "dan", "--yes")
	m.want(t, 0, "removed", "room", "remove", "ops", "user00")
	bob := m.old.people["bob"]
	live, err := m.Dial(3, bob.options(m.CA())...)
	if err != nil {
		t.Fatal(err)
	}
	m.old.put(t, "users", bob.key.Hex(), `{"sign_pub":%q,"handle":"bob","role":"admin","disabled":"2026-11-25"}`, bob.key.Hex())
	d := m.report(t, 0, m.line("--yes", "--partial")...)
	said := map[string]string{}
	for _, i := range d.Items {
		said[i.Kind+" "+i.Name] = i.Outcome
	}
	user00 := "members ops/"
	for _, u := range m.view.Users() {
		if u.Handle == "user00" {
			user00 += u.Key.NKey()
		}
	}
	for what, want := range map[string]string{"users dan": "kept", user00: "kept", "users bob": "revoke", "members ops/" + bob.key.NKey(): "already"} {
		if said[what] != want {
			t.Errorf("%s: %s, want %s", what, said[what], want)
		}
	}
	cluster.WaitFor(t, 5*time.Second, "bob to be thrown out", func() error {
		if live.IsConnected() {
			return fmt.Errorf("he is still connected")
		}
		return nil
	})
	for _, name := range []string{"dan", "bob"} {
		for i, v := range m.everywhere(m.old.people[name]) {
			if v != refused {
				t.Errorf("n%d answers %s: %s", i+1, name, v)
			}
		}
	}
	if u, _, _ := m.view.UserByHandle("bob"); u.Status != bus.Revoked {
		t.Errorf("bob is %s", u.Status)
	}
	m.old.put(t, "users", bob.key.Hex(), `{"sign_pub":%q,"handle":"bob","role":"member","disabled":null}`, bob.key.Hex())
	m.report(t, 0, m.line("--yes", "--partial")...)
	if u, _, _ := m.view.UserByHandle("bob"); u.Status != bus.Revoked {
		t.Errorf("bob came back: %s", u.Status)
	}
}

// wayBack: the old system was never touched, and its clients go back to it by
// going back to its addresses.
func (m *migration) wayBack(t *testing.T) {
	before := m.old.streams(t)
	m.report(t, 0, m.line("--yes", "--partial")...)
	after := m.old.streams(t)
	for name, state := range before {
		if after[name] != state || !strings.Contains(state, " 0 consumers") {
			t.Errorf("the import changed %s of the old system: %s, was %s", name, after[name], state)
		}
	}
	if len(before) != 6 || len(after) != 6 {
		t.Errorf("streams %v, were %v", after, before)
	}
	for _, name := range []string{"alice", "bob", "carol"} {
		nc, err := m.old.connect(m.old.people[name])
		if err != nil {
			t.Errorf("%s does not get back in: %v", name, err)
			continue
		}
		if err := nc.Publish("chat.ops", []byte("back")); err != nil || nc.Flush() != nil || nc.LastError() != nil {
			t.Errorf("%s cannot talk in the old system: %v, %v", name, err, nc.LastError())
		}
		nc.Close()
	}
}
