package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nkeys"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

func (a *app) configCommand() *cli.Command {
	return &cli.Command{
		Name:     "config",
		Category: "nodes",
		Usage:    "make and check the configuration of the nodes",
		Description: "Keys are made once, on the machine that administers the cluster; each node's configuration is\n" +
			"rendered from them, the inventory and the PKI, as often as needed and always to the same bytes.\n\n" +
			"   unibusctl config init --dir secrets\n" +
			"   unibusctl config render --inventory nodes.env --secrets secrets --pki pki --node n1 --out n1 --etc /etc/unibus",
		Subcommands: []*cli.Command{
			{
				Name:  "init",
				Usage: "make the keys of the services and of break glass, and the route password",
				Description: "DIR gets one file per key, mode 0600, and is all that a cluster keeps secret besides the two CAs:\n" +
					"back it up, and keep it off the nodes. Whoever holds issuer.nk owns the bus.\n\n" +
					"   unibusctl config init --dir secrets",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "dir", Required: true, Usage: "directory for the keys"},
					&cli.BoolFlag{Name: "force", Usage: "replace existing files"},
				},
				Action: func(c *cli.Context) error { return a.configInit(c.String("dir"), c.Bool("force")) },
			},
			{
				Name:  "render",
				Usage: "write the configuration of one node",
				Description: "Writes a node's whole /etc/unibus to --out: nats/, tls/, creds/ and the services' environment files.\n" +
					"Only what differs is written, and named; nats/conf.d/local.conf is the operator's and never replaced.\n\n" +
					"   unibusctl config render --inventory nodes.env --secrets secrets --pki pki --node n1 --out n1 --etc /etc/unibus",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "inventory", Required: true, TakesFile: true, Usage: "nodes.env"},
					&cli.StringFlag{Name: "secrets", Required: true, Usage: "directory of config init"},
					&cli.StringFlag{Name: "pki", Required: true, Usage: "directory of pki init and pki issue"},
					&cli.StringFlag{Name: "node", Required: true, Usage: "name of the node"},
					&cli.StringFlag{Name: "out", Required: true, Usage: "directory to write"},
					&cli.StringFlag{Name: "etc", Usage: "the directory's path on the node, written into the files (default: --out)"},
					&cli.StringFlag{Name: "state", Value: "/var/lib/unibus", Usage: "where the node keeps its data"},
					&cli.BoolFlag{Name: "dry-run", Usage: "name what would change and write nothing"},
				},
				Action: func(c *cli.Context) error {
					return a.configRender(renderRequest{
						inventory: c.String("inventory"), secrets: c.String("secrets"), pki: c.String("pki"), node: c.String("node"),
						out: c.String("out"), etc: c.String("etc"), state: c.String("state"), dryRun: c.Bool("dry-run"),
					})
				},
			},
			a.configCheckCommand(),
			a.configRotateCommand(),
		},
	}
}

// keyFile is one nkey of a cluster: <secrets>/<name>.nk.
type keyFile struct {
	name   string
	prefix nkeys.PrefixByte
	onNode bool // a service of every node needs the seed
}

// keyFiles lists every nkey. The callout has one identity per account because
// a static user lives in exactly one.
var keyFiles = []keyFile{
	{"authcallout-auth", nkeys.PrefixByteUser, true},
	{"authcallout-ctrl", nkeys.PrefixByteUser, true},
	{"authcallout-bus", nkeys.PrefixByteUser, true},
	{"membership-ctrl", nkeys.PrefixByteUser, true},
	{"membership-bus", nkeys.PrefixByteUser, true},
	{"ops", nkeys.PrefixByteUser, false},
	{"sys", nkeys.PrefixByteUser, false},
	{"issuer", nkeys.PrefixByteAccount, true},
	{"xkey", nkeys.PrefixByteCurve, true},
}

const routePasswordFile = "route.pass"

func (k keyFile) file() string { return k.name + ".nk" }

// second reports whether nodes hold two of them. They always do: a unit does not
// start without a credential that it names, and an old seed is gone when it is
// overwritten.
func (k keyFile) second() bool { return k.name == "issuer" || k.name == "xkey" }

func (a *app) configInit(dir string, force bool) error {
	made := make([]string, 0, len(keyFiles)+1)
	for _, k := range keyFiles {
		made = append(made, k.file())
	}
	made = append(made, routePasswordFile)
	if !force {
		if err := refuseExisting(dir, made); err != nil {
			return err
		}
	}
	if err := makePrivateDir(dir); err != nil {
		return err
	}
	public := map[string]string{}
	for _, k := range keyFiles {
		pub, err := makeKey(filepath.Join(dir, k.file()), k.prefix, a.rand, force)
		if err != nil {
			return err
		}
		public[k.name] = pub
	}
	if err := makePassword(filepath.Join(dir, routePasswordFile), a.rand, force); err != nil {
		return err
	}
	a.say("The seeds are in %s and nowhere else: back them up, and keep them off the nodes.", dir)
	a.say("Next: unibusctl pki init --dir pki")
	return a.print(map[string]any{"dir": dir, "public_keys": public}, func(t table.Writer) {
		t.AppendHeader(table.Row{"key", "public"})
		for _, k := range keyFiles {
			t.AppendRow(table.Row{k.file(), public[k.name]})
		}
	})
}

// refuseExisting looks before anything is written, so that a refusal leaves no
// mixture of old and new keys.
func refuseExisting(dir string, names []string) error {
	for _, name := range names {
		path := filepath.Join(dir, name)
		switch _, err := os.Lstat(path); {
		case err == nil:
			return bus.E(bus.Conflict, "%s exists already; nothing was changed", path).
				WithHint("use these keys: unibusctl config render --secrets %s ...; or replace all of them: --force", dir)
		case !errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("look for existing keys: %w", err)
		}
	}
	return nil
}

// makePrivateDir makes dir, or takes over one that nobody else can look into.
func makePrivateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return bus.E(bus.Invalid, "%s is open to others (mode %04o) and no place for keys", dir, mode).WithHint("chmod 700 %s", dir)
	}
	return nil
}

func makeKey(path string, prefix nkeys.PrefixByte, random io.Reader, force bool) (public string, err error) {
	var pair nkeys.KeyPair
	if prefix == nkeys.PrefixByteCurve {
		pair, err = nkeys.CreateCurveKeysWithRand(random)
	} else {
		pair, err = nkeys.CreatePairWithRand(prefix, random)
	}
	if err != nil {
		return "", fmt.Errorf("make a key: %w", err)
	}
	defer pair.Wipe()
	seed, err := pair.Seed()
	if err != nil {
		return "", fmt.Errorf("make a key: %w", err)
	}
	if public, err = pair.PublicKey(); err != nil {
		return "", fmt.Errorf("make a key: %w", err)
	}
	return public, writeFile(path, append(seed, '\n'), 0o600, force)
}

// makePassword writes 256 random bits in characters that need no quoting
// anywhere.
func makePassword(path string, random io.Reader, force bool) error {
	raw := make([]byte, 32)
	if _, err := io.ReadFull(random, raw); err != nil {
		return fmt.Errorf("make the route password: %w", err)
	}
	return writeFile(path, []byte(base64.RawURLEncoding.EncodeToString(raw)+"\n"), 0o600, force)
}

// secrets is what config init made, read back and checked.
type secrets struct {
	public        map[string]string // by key name
	seeds         map[string][]byte // by key name, as in the file
	routePassword string

	// While one is replaced (config rotate): the other generation of issuer and
	// xkey, and whether nodes demand the route password of each other.
	second  map[string][]byte
	unasked bool
	both    map[string][]string // public keys of users, sorted: what order they were made in changes nothing
}

func readSecrets(dir string) (*secrets, error) {
	s := &secrets{public: map[string]string{}, seeds: map[string][]byte{}}
	for _, k := range keyFiles {
		path := filepath.Join(dir, k.file())
		seed, err := readMadeSecret(path, dir)
		if err != nil {
			return nil, err
		}
		if s.public[k.name], err = publicOf(seed, k.prefix); err != nil {
			return nil, bus.E(bus.Invalid, "%s: %w", path, err).WithHint("restore it from the backup of %s", dir)
		}
		s.seeds[k.name] = seed
	}
	var err error
	if s.second, err = readSecond(dir, s.seeds); err != nil {
		return nil, err
	}
	s.both = map[string][]string{}
	for _, k := range keyFiles {
		if k.prefix != nkeys.PrefixByteUser {
			continue
		}
		other, err := publicOf(s.second[k.name], k.prefix)
		if err != nil {
			return nil, err
		}
		s.both[k.name] = slices.Compact(slices.Sorted(slices.Values([]string{s.public[k.name], other})))
	}
	for _, r := range rotatables() {
		s.unasked = s.unasked || (r.file == routePasswordFile && secretStage(dir, r) != "")
	}
	path := filepath.Join(dir, routePasswordFile)
	raw, err := readMadeSecret(path, dir)
	if err != nil {
		return nil, err
	}
	s.routePassword = strings.TrimSpace(string(raw))
	if !safePassword(s.routePassword) {
		return nil, bus.E(bus.Invalid, "%s must hold at least 32 of the characters a-z A-Z 0-9 _ -", path).
			WithHint("restore it from the backup of %s", dir)
	}
	return s, nil
}

// readSecond is the second generation of each key: the next one, the last one,
// or the same once more.
func readSecond(dir string, first map[string][]byte) (map[string][]byte, error) {
	out := map[string][]byte{}
	for _, k := range keyFiles {
		out[k.name] = first[k.name]
		for _, word := range []string{"old", "next"} {
			path := filepath.Join(dir, beside(k.file(), word))
			if !exists(path) {
				continue
			}
			seed, err := readSecret(path)
			if err != nil {
				return nil, err
			}
			if _, err := publicOf(seed, k.prefix); err != nil {
				return nil, bus.E(bus.Invalid, "%s: %w", path, err).WithHint("restore it from the backup of %s", dir)
			}
			out[k.name] = seed
		}
	}
	return out, nil
}

func readMadeSecret(path, dir string) ([]byte, error) {
	data, err := readSecret(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, bus.E(bus.NotFound, "%s is missing", path).WithHint("unibusctl config init --dir %s", dir)
	}
	return data, err
}

func publicOf(seed []byte, prefix nkeys.PrefixByte) (string, error) {
	line := []byte(strings.TrimSpace(string(seed)))
	if got, _, err := nkeys.DecodeSeed(line); err != nil || got != prefix {
		return "", fmt.Errorf("does not hold one %s seed (S%s...)", prefix, prefixLetter(prefix))
	}
	pair, err := pairOf(line, prefix)
	if err != nil {
		return "", errors.New("holds no valid seed")
	}
	defer pair.Wipe()
	return pair.PublicKey()
}

func pairOf(seed []byte, prefix nkeys.PrefixByte) (nkeys.KeyPair, error) {
	if prefix == nkeys.PrefixByteCurve {
		return nkeys.FromCurveSeed(seed)
	}
	return nkeys.FromSeed(seed)
}

// prefixLetter is what seeds of a kind show after the S.
func prefixLetter(p nkeys.PrefixByte) string {
	switch p {
	case nkeys.PrefixByteAccount:
		return "A"
	case nkeys.PrefixByteCurve:
		return "X"
	}
	return "U"
}

func safePassword(s string) bool {
	if len(s) < 32 {
		return false
	}
	return strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-") == ""
}
