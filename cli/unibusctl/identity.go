package main

import (
	"bytes"
	"fmt"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nkeys"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

func (a *app) identityCommand() *cli.Command {
	return &cli.Command{
		Name:     "identity",
		Category: "keys",
		Usage:    "make and read the key of a user",
		Description: "An identity is one ed25519 key. Its file holds the nkey seed SU... on one line, mode 0600,\n" +
			"which is what `nats --nkey FILE` reads. Its public half has two spellings: 64 hex digits and U...",
		Subcommands: []*cli.Command{
			{
				Name:  "new",
				Usage: "make an identity; the seed goes to the file and nowhere else",
				Description: "The file is created with mode 0600 and never replaced without --force:\n" +
					"a lost seed cannot be got back.\n\n" +
					"Example:\n  unibusctl identity new --out alice.nk",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "out", Required: true, TakesFile: true, Usage: "seed file to write"},
					&cli.BoolFlag{Name: "force", Usage: "replace existing files"},
				},
				Action: func(c *cli.Context) error { return a.identityNew(c.String("out"), c.Bool("force")) },
			},
			{
				Name:        "show",
				Usage:       "print the public key of a seed file, in both spellings",
				ArgsUsage:   "FILE",
				Description: "The seed itself is never printed.\n\nExample:\n  unibusctl identity show alice.nk",
				Action: func(c *cli.Context) error {
					arg, err := positional(c, "FILE")
					if err != nil {
						return err
					}
					return a.identityShow(arg[0])
				},
			},
			{
				Name:        "convert",
				Usage:       "print a public key in both spellings",
				ArgsUsage:   "KEY",
				Description: "KEY is 64 hex digits or U...\n\nExample:\n  unibusctl identity convert UA...",
				Action: func(c *cli.Context) error {
					arg, err := positional(c, "KEY")
					if err != nil {
						return err
					}
					key, err := bus.ParseUserKey(arg[0])
					if err != nil {
						return err
					}
					return a.printKey(key, "")
				},
			},
		},
	}
}

func (a *app) identityNew(path string, force bool) error {
	if path == "" {
		return usagef("--out names no file")
	}
	key, err := a.makeIdentity(path, force)
	if err != nil {
		return err
	}
	return a.printKey(key, path)
}

// makeIdentity writes a new seed to a file.
func (a *app) makeIdentity(path string, force bool) (bus.UserKey, error) {
	pair, err := nkeys.CreatePairWithRand(nkeys.PrefixByteUser, a.rand)
	if err != nil {
		return bus.UserKey{}, fmt.Errorf("make a key: %w", err)
	}
	seed, err := pair.Seed()
	if err != nil {
		return bus.UserKey{}, fmt.Errorf("make a key: %w", err)
	}
	key, err := userKeyOf(pair)
	if err != nil {
		return bus.UserKey{}, err
	}
	return key, writeFile(path, append(seed, '\n'), 0o600, force)
}

func (a *app) identityShow(path string) error {
	pair, err := readIdentity(path)
	if err != nil {
		return err
	}
	key, err := userKeyOf(pair)
	if err != nil {
		return err
	}
	return a.printKey(key, path)
}

func (a *app) printKey(key bus.UserKey, path string) error {
	value := struct {
		File    string `json:"file,omitempty"`
		SignPub string `json:"sign_pub"`
		NKey    string `json:"nkey"`
	}{path, key.Hex(), key.NKey()}
	return a.print(value, func(t table.Writer) {
		if path != "" {
			t.AppendRow(table.Row{"file", path})
		}
		t.AppendRows([]table.Row{{"sign_pub", key.Hex()}, {"nkey", key.NKey()}})
	})
}

// readIdentity reads a user's seed file: one line SU..., readable by its owner
// only.
func readIdentity(path string) (nkeys.KeyPair, error) {
	data, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	seed := bytes.TrimSpace(data)
	prefix, _, err := nkeys.DecodeSeed(seed)
	if err != nil {
		return nil, bus.E(bus.Invalid, "%s holds no nkey seed: one line SU... is expected", path).
			WithHint("unibusctl identity new --out FILE")
	}
	if prefix != nkeys.PrefixByteUser {
		return nil, bus.E(bus.Invalid, "%s holds the seed of a key of type %s, not of a user (SU...)", path, prefix)
	}
	return nkeys.FromSeed(seed)
}

func userKeyOf(pair nkeys.KeyPair) (bus.UserKey, error) {
	pub, err := pair.PublicKey()
	if err != nil {
		return bus.UserKey{}, fmt.Errorf("derive the public key: %w", err)
	}
	return bus.ParseUserKey(pub)
}
