package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"regexp"

	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

// natsContext is a context file of the stock nats CLI, in its own field names.
type natsContext struct {
	Description string `json:"description"`
	URL         string `json:"url"`
	NKey        string `json:"nkey"`
	CA          string `json:"ca"`
	InboxPrefix string `json:"inbox_prefix"`
}

func (a *app) userContextCommand() *cli.Command {
	return &cli.Command{
		Name: "context", ArgsUsage: "USER|ops|sys",
		Usage: "write a context that the stock nats CLI uses as it is",
		Description: "For a user, --identity is their seed file. The names ops and sys mean the break-glass\n" +
			"identities in accounts CTRL and SYS; a user of that handle is named by key.\n\n" +
			"   unibusctl user context alice --identity alice.nk --select\n" +
			"   nats --context unibus-alice sub 'room.ops.>'",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "name", Usage: "`NAME` of the context; default unibus-<handle>"},
			a.sysSeedFlag(),
			&cli.BoolFlag{Name: "select", Usage: "make it the context that nats uses by default"},
		},
		Action: a.userContext,
	}
}

func (a *app) userContext(c *cli.Context) error {
	arg, err := positional(c, "USER")
	if err != nil {
		return err
	}
	if a.set.ca == "" {
		return &usageError{msg: "the CA is not known: set --ca FILE or UNIBUS_CA", hint: "unibusctl env"}
	}
	var label, seed, inbox string
	switch arg[0] {
	case "ops":
		label, seed, inbox = "ops", a.set.opsSeed, "_INBOX_ops"
	case "sys":
		label, inbox = "sys", "_INBOX_sys"
		if seed, err = a.sysSeedOf(c); err != nil {
			return err
		}
	default:
		u, err := a.contextUser(c, arg[0])
		if err != nil {
			return err
		}
		label, seed, inbox = string(u.Handle), a.set.identity, bus.InboxPrefix(u.SignPub)
	}
	if seed == "" {
		return &usageError{msg: "no seed file for " + label + ": set --ops-seed FILE"}
	}
	if _, err := readSecret(seed); err != nil {
		return err
	}
	return a.writeContext(label, seed, inbox, c.String("name"), c.Bool("select"))
}

// contextUser makes sure that the seed file is that user's: a context under
// alice's name with another's key would act under the other's name.
func (a *app) contextUser(c *cli.Context, who string) (bus.UserInfo, error) {
	who, err := userName(who)
	if err != nil {
		return bus.UserInfo{}, err
	}
	own, err := a.ownKey()
	if err != nil {
		return bus.UserInfo{}, err
	}
	var u bus.UserDetail
	err = a.reading(c.Context, func(ctx context.Context, b backend) (err error) {
		u, err = b.User(ctx, who)
		return err
	})
	if err != nil {
		return bus.UserInfo{}, err
	}
	if own != u.SignPub {
		return bus.UserInfo{}, bus.E(bus.Forbidden, "%s holds the key %s, not that of %s", a.set.identity, own, u.Handle).
			WithHint("%s %s --identity FILE, with the seed of %s", a.command, u.Handle, u.Handle)
	}
	return u.UserInfo, nil
}

func (a *app) writeContext(label, seed, inbox, name string, selected bool) error {
	name, path, err := a.makeContext(label, seed, inbox, name, selected)
	if err != nil {
		return err
	}
	if a.set.json {
		return a.print(map[string]any{"context": name, "file": path, "selected": selected}, nil)
	}
	fmt.Fprintf(a.out, "context %s: %s\n", name, path)
	a.say("use it: nats --context %s ...", name)
	return nil
}

// makeContext writes a context file. An empty name becomes unibus-<label>.
func (a *app) makeContext(label, seed, inbox, name string, selected bool) (made, path string, err error) {
	if seed, err = filepath.Abs(seed); err != nil {
		return "", "", err
	}
	ca, err := filepath.Abs(a.set.ca)
	if err != nil {
		return "", "", err
	}
	if name == "" {
		name = "unibus-" + label
	}
	if !contextName.MatchString(name) {
		return "", "", usagef("context name %s is refused: use a-z A-Z 0-9 _ -", quote(name))
	}
	dir, err := a.natsConfigDir()
	if err != nil {
		return "", "", err
	}
	value, err := json.MarshalIndent(natsContext{"unibus: " + label, a.set.natsURL, seed, ca, inbox}, "", "  ")
	if err != nil {
		return "", "", err
	}
	path = filepath.Join(dir, "context", name+".json")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", "", fmt.Errorf("make the directory of contexts: %w", err)
	}
	if err := writeFile(path, append(value, '\n'), 0o600, true); err != nil {
		return "", "", err
	}
	if selected {
		if err := writeFile(filepath.Join(dir, "context.txt"), []byte(name), 0o600, true); err != nil {
			return "", "", err
		}
	}
	return name, path, nil
}

var contextName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// natsConfigDir is where the nats CLI looks: $XDG_CONFIG_HOME/nats, else
// .config/nats in the home directory that the password database names.
func (a *app) natsConfigDir() (string, error) {
	if x := a.getenv("XDG_CONFIG_HOME"); x != "" {
		return filepath.Join(x, "nats"), nil
	}
	me, err := user.Current()
	if err != nil {
		return "", fmt.Errorf("find the home directory: %w", err)
	}
	return filepath.Join(me.HomeDir, ".config", "nats"), nil
}
