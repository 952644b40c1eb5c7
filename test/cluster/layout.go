package cluster

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Service is one of the three kinds of processes of a node.
type Service string

// The services, in the order in which a node starts them.
const (
	NATS        Service = "nats"
	Authcallout Service = "authcallout"
	Membership  Service = "membership"
)

// Services lists all of them in starting order.
func Services() []Service { return []Service{NATS, Authcallout, Membership} }

var binaryOf = map[Service]string{
	NATS: "nats-server", Authcallout: "unibus-authcallout", Membership: "unibus-membership",
}

// Layout is where one cluster on this machine lives: its directory, binaries
// and ports. Its configuration is made by the same unibusctl commands that an
// operator runs, so that nothing here can differ from production.
//
//	DIR/nodes.env            inventory
//	DIR/secrets/, DIR/pki/   unibusctl config init, pki init and pki issue
//	DIR/n1/etc/              unibusctl config render
//	DIR/n1/state/, log/      JetStream store; one log per service
type Layout struct {
	Dir   string // absolute
	Bin   string // directory of the binaries
	Ports []Ports
	Env   map[Service]map[string]string // on top of the rendered environment files

	network *network // nil: every node is on this machine's own network
}

// Node is the name of node i: n1, n2, n3.
func (l *Layout) Node(i int) string { return fmt.Sprintf("n%d", i) }

// NodeDir holds everything of node i.
func (l *Layout) NodeDir(i int) string { return filepath.Join(l.Dir, l.Node(i)) }

// Etc is node i's counterpart of /etc/unibus.
func (l *Layout) Etc(i int) string { return filepath.Join(l.NodeDir(i), "etc") }

// LogFile is the log of one service of node i.
func (l *Layout) LogFile(i int, s Service) string {
	return filepath.Join(l.NodeDir(i), "log", string(s)+".log")
}

// Inventory is the path of the cluster's nodes.env.
func (l *Layout) Inventory() string { return filepath.Join(l.Dir, "nodes.env") }

// PKI is the directory of both certificate authorities and the leaves.
func (l *Layout) PKI() string { return filepath.Join(l.Dir, "pki") }

// Secrets is the directory of the services' seeds.
func (l *Layout) Secrets() string { return filepath.Join(l.Dir, "secrets") }

// CA is the certificate that clients trust.
func (l *Layout) CA() string { return filepath.Join(l.PKI(), "client-ca.crt") }

// Seed is the file of a static user's nkey seed, such as "ops" or "sys".
func (l *Layout) Seed(name string) string { return filepath.Join(l.Secrets(), name+".nk") }

// Host is the address of node i.
func (l *Layout) Host(i int) string {
	if l.network == nil {
		return "127.0.0.1"
	}
	return l.network.host(i)
}

func (l *Layout) at(i, port int) string { return net.JoinHostPort(l.Host(i), strconv.Itoa(port)) }

// NATSURL is where users reach node i.
func (l *Layout) NATSURL(i int) string { return "tls://" + l.at(i, l.Ports[i-1].NATS) }

// APIURL is the membership API of node i.
func (l *Layout) APIURL(i int) string { return "https://" + l.at(i, l.Ports[i-1].API) }

// MonitorURL is the monitoring listener of node i's nats-server, on the
// loopback of its machine.
func (l *Layout) MonitorURL(i int) string { return "http://" + Loopback(l.Ports[i-1].Monitor) }

// AdminURL is the metrics listener of a service of node i, on the loopback of
// its machine.
func (l *Layout) AdminURL(i int, s Service) string {
	port := l.Ports[i-1].MembershipAdmin
	if s == Authcallout {
		port = l.Ports[i-1].AuthcalloutAdmin
	}
	return "http://" + Loopback(port)
}

// URLs joins one address of every node to a comma list.
func (l *Layout) URLs(of func(i int) string) string {
	urls := make([]string, len(l.Ports))
	for i := range urls {
		urls[i] = of(i + 1)
	}
	return strings.Join(urls, ",")
}

// CLIEnv is what unibusctl needs to find this cluster; both seeds are paths.
func (l *Layout) CLIEnv(identity string) map[string]string {
	return map[string]string{
		"UNIBUS_API_URL":  l.URLs(l.APIURL),
		"UNIBUS_NATS_URL": l.URLs(l.NATSURL),
		"UNIBUS_CA":       l.CA(),
		"UNIBUS_IDENTITY": identity,
		"UNIBUS_OPS_SEED": l.Seed("ops"),
	}
}

// Prepare writes inventory, secrets, certificates and configuration. What is
// there already is kept, except the rendered configuration, which is rendered
// again (to the same bytes unless something changed).
func (l *Layout) Prepare(ctx context.Context) error {
	if err := os.MkdirAll(l.Dir, 0o700); err != nil {
		return err
	}
	if err := WriteFile(l.Inventory(), l.inventory(), 0o600); err != nil {
		return err
	}
	if err := l.makeOnce(ctx, l.Seed("issuer"), "config", "init", "--dir", l.Secrets()); err != nil {
		return err
	}
	if err := l.makeOnce(ctx, l.CA(), "pki", "init", "--dir", l.PKI()); err != nil {
		return err
	}
	for i := range l.Ports {
		if err := l.prepareNode(ctx, i+1); err != nil {
			return err
		}
	}
	return nil
}

func (l *Layout) prepareNode(ctx context.Context, i int) error {
	name := l.Node(i)
	err := l.makeOnce(ctx, filepath.Join(l.PKI(), name, "server.crt"),
		"pki", "issue", "--dir", l.PKI(), "--inventory", l.Inventory(), "--node", name)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(l.NodeDir(i), "log"), 0o700); err != nil {
		return err
	}
	return l.unibusctl(ctx, "config", "render", "--inventory", l.Inventory(), "--secrets", l.Secrets(), "--pki", l.PKI(),
		"--node", name, "--out", l.Etc(i), "--state", filepath.Join(l.NodeDir(i), "state"))
}

func (l *Layout) inventory() []byte {
	var b bytes.Buffer
	b.WriteString("# Local cluster: all nodes on this machine, each with ports of its own.\n")
	b.WriteString("UNIBUS_CLUSTER=unibus\nROUTE_NETWORK=private\n")
	for i, p := range l.Ports {
		host := l.Host(i + 1)
		fmt.Fprintf(&b, "NODE_%d=\"%s public=%s private=%s nats=%d route=%d monitor=%d api=%d membership_admin=%d authcallout_admin=%d\"\n",
			i+1, l.Node(i+1), host, host, p.NATS, p.Route, p.Monitor, p.API, p.MembershipAdmin, p.AuthcalloutAdmin)
	}
	return b.Bytes()
}

// makeOnce runs a command that refuses to overwrite, unless what it makes is there.
func (l *Layout) makeOnce(ctx context.Context, product string, args ...string) error {
	switch _, err := os.Stat(product); {
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return l.unibusctl(ctx, args...)
}

func (l *Layout) unibusctl(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(l.Bin, "unibusctl"), args...)
	cmd.Env = baseEnv(l.Dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		said := strings.TrimPrefix(string(bytes.TrimSpace(out)), "unibusctl: ")
		return fmt.Errorf("unibusctl %s %s: %w: %s", args[0], args[1], err, said)
	}
	return nil
}

// baseEnv is all that a program of ours gets from the environment: a test or
// a local cluster must not depend on UNIBUS_* of the shell it runs in.
func baseEnv(home string) []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "LC_ALL=C.UTF-8"}
}

// Command is the command line and environment of one service of node i, as
// its unit file would have them.
func (l *Layout) Command(i int, s Service) (Command, error) {
	c := Command{
		Path: filepath.Join(l.Bin, binaryOf[s]),
		Env:  baseEnv(l.NodeDir(i)),
		Log:  l.LogFile(i, s),
	}
	path, err := filepath.EvalSymlinks(c.Path) // as /proc/PID/exe shows it
	if err != nil {
		return Command{}, err
	}
	c.Path = path
	env := map[string]string{}
	if s == NATS {
		c.Args = []string{"-c", filepath.Join(l.Etc(i), "nats", "nats-server.conf")}
	} else {
		if env, err = readEnvFile(filepath.Join(l.Etc(i), string(s)+".env")); err != nil {
			return Command{}, err
		}
		env["UNIBUS_CREDS_DIR"] = filepath.Join(l.Etc(i), "creds") // systemd's LoadCredential in production
		env["UNIBUS_DRAIN_DELAY"] = "0s"                           // no load balancer has to notice first
	}
	maps.Copy(env, l.Env[s])
	for _, k := range slices.Sorted(maps.Keys(env)) {
		c.Env = append(c.Env, k+"="+env[k])
	}
	return c, nil
}

// Digest changes when a service of node i would run differently: its command,
// environment, binary, or any file of its configuration.
func (l *Layout) Digest(i int, s Service) (string, error) {
	c, err := l.Command(i, s)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	fmt.Fprintf(h, "%q %q\n", c.Args, c.Env[len(baseEnv("")):])
	files := []string{c.Path}
	for _, sub := range configOf[s] {
		found, err := regularFiles(filepath.Join(l.Etc(i), sub))
		if err != nil {
			return "", err
		}
		files = append(files, found...)
	}
	for _, f := range files {
		if err := hashFile(h, f); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// configOf says which parts of a node's etc directory a service reads.
var configOf = map[Service][]string{
	NATS: {"nats", "tls"}, Authcallout: {"creds", "tls"}, Membership: {"creds", "tls"},
}

func regularFiles(dir string) (files []string, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, path)
		}
		return err
	})
	return files, err
}

func hashFile(h io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	fmt.Fprintf(h, "%s\n", path)
	_, err = io.Copy(h, f)
	return err
}

// readEnvFile reads KEY=VALUE lines as systemd's EnvironmentFile does, as far
// as our rendered files use it: comments, and values in optional quotes.
func readEnvFile(path string) (map[string]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	env := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			return nil, fmt.Errorf("%s: %q is not KEY=VALUE", path, line)
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		env[key] = value
	}
	return env, lines.Err()
}

// Tail returns the last lines of a file; nothing if it cannot be read.
func Tail(file string, lines int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// WriteFile replaces a file in one step, so that no reader sees half of it.
// An unchanged file is left alone.
func WriteFile(path string, content []byte, mode fs.FileMode) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
		return nil
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.Write(content)
	if err := errors.Join(err, tmp.Chmod(mode), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
