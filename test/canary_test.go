package test

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
	"golang.org/x/sys/unix"

	"unibus.internal/bus"
	sdk "unibus.internal/bus/client"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/seal"
	"unibus.internal/test/cluster"
)

// canaries are secrets, to be looked for in bytes of any kind at once.
type canaries struct {
	begins [1 << 16]bool // the first two bytes of a spelling
	spelt  map[[8]byte][]spelling
}

type spelling struct {
	what  string
	bytes []byte
}

func (c *canaries) add(what string, secret []byte) {
	spelt := [][]byte{secret, []byte(hex.EncodeToString(secret)), []byte(strings.ToUpper(hex.EncodeToString(secret)))}
	// As base64 a secret looks in three ways, by where it stands in what was encoded;
	// at both ends a character also shows what is beside it.
	for shift := range 3 {
		for _, encoding := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			whole := encoding.EncodeToString(append(make([]byte, shift), secret...))
			spelt = append(spelt, []byte(whole[(8*shift+5)/6:8*(shift+len(secret))/6]))
		}
	}
	if c.spelt == nil {
		c.spelt = map[[8]byte][]spelling{}
	}
	for _, b := range spelt {
		c.begins[binary.BigEndian.Uint16(b)] = true
		c.spelt[[8]byte(b)] = append(c.spelt[[8]byte(b)], spelling{what, b})
	}
}

// in names the secrets that are in some bytes.
func (c *canaries) in(data []byte) (found []string) {
	for i := 0; i+8 <= len(data); i++ {
		if !c.begins[binary.BigEndian.Uint16(data[i:])] {
			continue
		}
		for _, s := range c.spelt[[8]byte(data[i:])] {
			if bytes.HasPrefix(data[i:], s.bytes) && !slices.Contains(found, s.what) {
				found = append(found, s.what)
			}
		}
	}
	return found
}

func TestCanariesAreFoundHoweverTheyAreSpelt(t *testing.T) {
	t.Parallel()
	secret := []byte("it is \xfb\xff\xfe a secret")
	var c canaries
	c.add("it", secret)
	for before := range 4 {
		beside := bytes.Join([][]byte{bytes.Repeat([]byte{'b'}, before), secret, []byte("beside")}, nil)
		for _, spelt := range []string{
			string(beside), hex.EncodeToString(beside), fmt.Sprintf("%X", beside),
			base64.StdEncoding.EncodeToString(beside), base64.RawURLEncoding.EncodeToString(beside),
		} {
			if got := c.in([]byte(spelt)); len(got) != 1 {
				t.Errorf("not found in %q", spelt)
			}
		}
	}
	if got := c.in(bytes.Replace(secret, []byte("is"), []byte("was"), 1)); got != nil {
		t.Errorf("found what is not there: %v", got)
	}
}

// capture is what goes to and from some ports over the loopback interface.
type capture struct {
	fd   int
	done sync.WaitGroup
	stop atomic.Bool

	mu    sync.Mutex
	ports map[uint16]bool
	flows map[flow][]byte
	size  int
}

// flow is one direction of a connection.
type flow struct{ from, to uint16 }

// captureLimit bounds what a test keeps in memory.
const captureLimit = 512 << 20

// newCapture begins at once. It takes CAP_NET_RAW.
func newCapture(t *testing.T, ports ...int) (*capture, error) {
	t.Helper()
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return nil, err
	}
	// With this protocol, and not all of them, each packet comes once: as it arrives.
	ip := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(ip))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: ip, Ifindex: lo.Index}),
	); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	c := &capture{fd: fd, ports: map[uint16]bool{}, flows: map[flow][]byte{}}
	c.watch(ports...)
	c.done.Go(c.run)
	t.Cleanup(c.end)
	return c, nil
}

func (c *capture) watch(ports ...int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range ports {
		c.ports[uint16(p)] = true
	}
}

func (c *capture) run() {
	buf := make([]byte, 1<<17)
	for !c.stop.Load() {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		if err == nil {
			c.take(buf[:n])
		}
	}
	_ = unix.Close(c.fd)
}

// end may be called twice.
func (c *capture) end() {
	c.stop.Store(true)
	c.done.Wait()
}

// take keeps what a packet of IPv4 and TCP carries.
func (c *capture) take(p []byte) {
	if len(p) < 40 || p[0]>>4 != 4 || p[9] != unix.IPPROTO_TCP {
		return
	}
	tcp := p[min(int(p[0]&15)*4, len(p)):]
	if len(tcp) < 20 {
		return
	}
	f := flow{binary.BigEndian.Uint16(tcp), binary.BigEndian.Uint16(tcp[2:])}
	payload := tcp[min(int(tcp[12]>>4)*4, len(tcp)):]
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ports[f.from] && !c.ports[f.to] {
		return
	}
	if c.size += len(payload); c.size <= captureLimit {
		c.flows[f] = append(c.flows[f], payload...)
	}
}

// each goes through the directions of all connections.
func (c *capture) each(look func(flow, []byte)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for f, data := range c.flows {
		look(f, data)
	}
}

// sees sends something in the clear, and waits until the capture has it.
func (c *capture) sees(t *testing.T, clear []byte) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // only read from
	port := l.Addr().(*net.TCPAddr).Port
	c.watch(port)
	cluster.WaitFor(t, 15*time.Second, "the capture to see what is sent in the clear", func() error {
		conn, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			return err
		}
		defer conn.Close() //nolint:errcheck // what it has sent is looked for
		if _, err := conn.Write(clear); err != nil {
			return err
		}
		err = errors.New("it is not there")
		c.each(func(f flow, data []byte) {
			if int(f.to) == port && bytes.Contains(data, clear) {
				err = nil
			}
		})
		return err
	})
}

// tap hears every message as the servers have it, behind TLS: with the key of a
// membership, which hears all rooms.
type tap struct {
	nc *nats.Conn

	mu    sync.Mutex
	heard []byte
}

func newTap(t *testing.T, w *world) *tap {
	t.Helper()
	nc, err := kv.Connect(kv.Link{
		URL: w.URLs(w.NATSURL), SeedFile: w.Seed("membership-bus"), CAFile: w.CA(), Name: "test-tap", Inbox: "_INBOX_membership", Timeout: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	x := &tap{nc: nc}
	_, err = nc.Subscribe("room.*.>", func(m *nats.Msg) {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.heard = fmt.Appendf(x.heard, "\n%s %v\n%s", m.Subject, m.Header, m.Data)
	})
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// secret is a text that is nowhere else.
func secret(what string) string { return what + " " + rand.Text() }

// watching is what a test of secrets listens with, from before anybody has said
// anything.
type watching struct {
	live, stored, file string // what is said in encrypted rooms
	open, openFile     string // what is said in a room that is not
	tap                *tap
	wire               *capture // nil: noWire says why
	noWire             error
	commands           []byte // what unibusctl has said
}

func watch(t *testing.T, w *world) *watching {
	t.Helper()
	x := &watching{
		live: secret("said in a live room"), stored: secret("said in a durable room"), file: secret("a file of an encrypted room"),
		open: secret("said in an open room"), openFile: secret("a file of an open room"), tap: newTap(t, w),
	}
	var ports []int
	for _, p := range w.Ports {
		for _, of := range cluster.Services() {
			ports = append(ports, p.Of(of)...)
		}
	}
	x.wire, x.noWire = newCapture(t, ports...)
	return x
}

// canaries looks for what was said in encrypted rooms, for their keys and for
// the seeds of their members in everything that the servers were told, wrote,
// sent and backed up. What was said in an open room is found in each of these
// places, so the search can find.
func (s *sealedWorld) canaries(t *testing.T) {
	s.addRoom("open", s.alice.person, kv.RoomOptions{Durable: true})
	cluster.WaitFor(t, 15*time.Second, "the tap to hear an open room", func() error {
		if _, err := s.alice.room(t, "open").Publish(t.Context(), "x", []byte(s.said.open)); err != nil {
			return err
		}
		s.said.tap.mu.Lock()
		defer s.said.tap.mu.Unlock()
		if !bytes.Contains(s.said.tap.heard, []byte(s.said.open)) {
			return errors.New("not yet")
		}
		return nil
	})
	for room, file := range map[bus.RoomID]string{"ledger": s.said.file, "open": s.said.openFile} {
		if _, err := s.alice.api.PutBlob(t.Context(), room, "plan", strings.NewReader(strings.Repeat(file, 10_000)), sdk.BlobOptions{Keys: s.alice.keys}); err != nil {
			t.Fatal(err)
		}
	}

	var of canaries
	secrets := s.secrets(t)
	for what, b := range secrets {
		of.add(what, b)
	}
	of.add("open", []byte(s.said.open))
	of.add("open file", []byte(s.said.openFile))
	found := map[string][]string{}
	bytesOf := map[string]int{}
	look := func(kind, where string, data []byte) {
		bytesOf[kind] += len(data)
		for _, what := range of.in(data) {
			found[what] = append(found[what], kind)
			if _, hidden := secrets[what]; hidden {
				t.Errorf("%s is in %s", what, where)
			}
		}
	}
	s.onDisk(t, look)
	s.inStreams(t, look)
	s.inBackup(t, look)
	s.said.tap.mu.Lock()
	for _, room := range []string{"vault", "ledger"} {
		if !bytes.Contains(s.said.tap.heard, []byte("\nroom."+room+".")) {
			t.Errorf("the tap has heard nothing of room %s", room)
		}
	}
	look("the tap", "what servers hear", s.said.tap.heard)
	s.said.tap.mu.Unlock()
	look("unibusctl", "what unibusctl has said", s.said.commands)
	t.Run("capture", func(t *testing.T) { s.onTheWire(t, look) })

	for what, want := range map[string][]string{
		"open":      {"a disk", "a stream", "the backup", "the tap"},
		"open file": {"a disk", "a stream", "the backup"},
	} {
		for _, kind := range want {
			if !slices.Contains(found[what], kind) {
				t.Errorf("%q was not found in %s, where it must be", what, kind)
			}
		}
		if slices.Contains(found[what], "the wire") { // on which TLS hides all rooms alike
			t.Errorf("%q went over the wire in the clear", what)
		}
	}
	t.Logf("%d secrets, looked for in bytes: %v", len(secrets), bytesOf)
}

// secrets are what only members may have.
func (s *sealedWorld) secrets(t *testing.T) map[string][]byte {
	t.Helper()
	out := map[string][]byte{"the live text": []byte(s.said.live), "the stored text": []byte(s.said.stored), "the file": []byte(s.said.file)}
	private, _ := s.carol.sealKey(t, 1)
	for _, room := range []bus.RoomID{"vault", "ledger"} {
		rosters, envelopes := s.bucket(t, room)
		for epoch, r := range rosters {
			for _, e := range envelopes {
				if k, err := seal.OpenEnvelope(e, private, r, r); err == nil {
					out[fmt.Sprintf("the key of epoch %d of %s", epoch, room)] = k[:]
				}
			}
		}
	}
	if len(out) < 3+3 {
		t.Fatalf("only %d secrets are known", len(out))
	}
	for _, p := range []*keyed{s.alice, s.bob, s.carol, s.dave} {
		seed, err := p.kp.Seed()
		if err != nil {
			t.Fatal(err)
		}
		_, raw, err := nkeys.DecodeSeed(seed)
		if err != nil {
			t.Fatal(err)
		}
		derived, err := p.identity(t).Derive(binary.BigEndian.AppendUint64([]byte("unibus/v1/encryption-seed\x00"), 1))
		if err != nil {
			t.Fatal(err)
		}
		out["the seed of "+p.name], out["the seed of "+p.name+", spelt"], out["the encryption seed of "+p.name] = raw, seed, derived[:]
	}
	return out
}

// onDisk goes through the files of all nodes: stores, logs, configurations.
func (s *sealedWorld) onDisk(t *testing.T, look func(kind, where string, data []byte)) {
	t.Helper()
	for _, i := range s.Nodes() {
		if err := filepath.WalkDir(s.NodeDir(i), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil //nolint:nilerr // files come and go under a running server
			}
			if data, err := os.ReadFile(path); err == nil {
				look("a disk", path, data)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// inStreams goes through every message of every stream: all of CTRL, and of BUS
// the rooms' and the files'.
func (s *sealedWorld) inStreams(t *testing.T, look func(kind, where string, data []byte)) {
	t.Helper()
	ctrl, err := jetstream.New(s.Ops())
	if err != nil {
		t.Fatal(err)
	}
	users, err := jetstream.New(s.said.tap.nc)
	if err != nil {
		t.Fatal(err)
	}
	var buckets []string
	names := ctrl.StreamNames(t.Context())
	for name := range names.Name() {
		buckets = append(buckets, name)
	}
	if names.Err() != nil || len(buckets) < 7 {
		t.Fatalf("the streams of CTRL: %v %v", buckets, names.Err())
	}
	read := func(js jetstream.JetStream, stream string) {
		t.Helper()
		info, err := js.Stream(t.Context(), stream)
		if err != nil {
			t.Fatalf("%s: %v", stream, err)
		}
		if info.CachedInfo().State.Msgs == 0 {
			return
		}
		c, err := js.OrderedConsumer(t.Context(), stream, jetstream.OrderedConsumerConfig{})
		if err != nil {
			t.Fatalf("%s: %v", stream, err)
		}
		all, err := c.Messages()
		if err != nil {
			t.Fatalf("%s: %v", stream, err)
		}
		defer all.Stop()
		for {
			m, err := all.Next(jetstream.NextMaxWait(10 * time.Second))
			if err != nil {
				t.Fatalf("%s: %v", stream, err)
			}
			look("a stream", stream+", "+m.Subject(), fmt.Appendf(nil, "%s %v\n%s", m.Subject(), m.Headers(), m.Data()))
			if md, err := m.Metadata(); err != nil || md.NumPending == 0 {
				return
			}
		}
	}
	for _, stream := range buckets {
		read(ctrl, stream)
	}
	for _, stream := range []string{"ROOM_ledger", "ROOM_open", kv.BlobStream} {
		read(users, stream)
	}
}

// inBackup makes a backup of everything, and goes through it as who holds its key
// does: records inside are base64, and what they hold is so once more.
func (s *sealedWorld) inBackup(t *testing.T, look func(kind, where string, data []byte)) {
	t.Helper()
	dir := t.TempDir()
	key, file := filepath.Join(dir, "backup.key"), filepath.Join(dir, "all.backup")
	for _, args := range [][]string{
		{"backup", "key", "--out", key},
		{"--direct", "backup", "create", "--out", file, "--recipients-file", key + ".pub"},
	} {
		if r := s.CLI(args...); r.Code != 0 {
			t.Fatalf("unibusctl %s: exit %d\n%s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
		}
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	look("the backup as it lies there", file, raw)
	text, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	identities, err := age.ParseIdentities(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	const tail = 1 + 86 + 1 // docs/backup.md
	_, body, _ := bytes.Cut(raw, []byte("\n"))
	_, body, _ = bytes.Cut(body, []byte("\n"))
	plain, err := age.Decrypt(bytes.NewReader(body[:len(body)-tail]), identities...)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(plain)
	for {
		line, err := lines.ReadBytes('\n')
		look("the backup", "the backup", line)
		var record map[string]any
		if json.Unmarshal(line, &record) == nil {
			for name, v := range record {
				if text, ok := v.(string); ok {
					if inner, err := base64.StdEncoding.DecodeString(text); err == nil {
						look("the backup", "the backup, "+name, inner)
					}
				}
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			return
		}
	}
}

// onTheWire goes through all that went over the loopback interface since the
// cluster has been up.
func (s *sealedWorld) onTheWire(t *testing.T, look func(kind, where string, data []byte)) {
	c := s.said.wire
	if c == nil {
		t.Skipf("nothing was captured, which takes CAP_NET_RAW: %v", s.said.noWire)
	}
	c.sees(t, []byte(secret("in the clear")))
	c.end()
	greetings := 0
	c.each(func(f flow, data []byte) {
		look("the wire", fmt.Sprintf("what port %d sent to port %d", f.from, f.to), data)
		if bytes.HasPrefix(data, []byte(`INFO {"server_id"`)) { // before TLS
			greetings++
		}
	})
	if greetings < 10 || c.size > captureLimit {
		t.Errorf("%d connections of servers were captured from their beginning, %d bytes in all, of which %d are kept at most", greetings, c.size, captureLimit)
	}
}
