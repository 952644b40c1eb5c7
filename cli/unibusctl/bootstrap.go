package main

import (
	"context"

	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

func (a *app) bootstrapCommand() *cli.Command {
	return &cli.Command{
		Name:     "bootstrap",
		Category: "access",
		Usage:    "register the first admin, once in the life of a cluster",
		Description: "Works on the live KV only, on a node, with the ops seed. It is refused as soon as any user\n" +
			"exists or ever existed; of several at once exactly one succeeds.\n\n" +
			"   unibusctl --direct bootstrap --handle admin --out admin.nk\n" +
			"   unibusctl --direct bootstrap --handle admin --sign-pub UA...",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "handle", Required: true, Usage: "short `NAME` of the admin"},
			&cli.StringFlag{Name: "sign-pub", Usage: "public `KEY`, 64 hex digits or U..."},
			&cli.StringFlag{Name: "out", TakesFile: true, Usage: "make the key, its seed into this `FILE`; the key of one that is there is taken"},
		},
		Action: func(c *cli.Context) error {
			handle, err := bus.ParseHandle(c.String("handle"))
			if err != nil {
				return err
			}
			if _, err := positional(c); err != nil {
				return err
			}
			if (c.String("sign-pub") == "") == (c.String("out") == "") {
				return usagef("either --sign-pub KEY of an identity that exists, or --out FILE for a new one")
			}
			if !a.set.direct {
				return &usageError{msg: "the first admin is made on the live KV, by who holds the ops seed", hint: a.command + " --direct ..., with --ops-seed FILE"}
			}
			key, err := a.firstAdmin(c.String("sign-pub"), c.String("out"))
			if err != nil {
				return err
			}
			return a.changing(c.Context, func(ctx context.Context, b backend) (bus.Change, error) {
				d, ok := b.(*direct)
				if !ok {
					return bus.Change{}, bus.E(bus.Internal, "bootstrap without a KV")
				}
				return d.Bootstrap(ctx, key, handle)
			})
		},
	}
}

// firstAdmin is the key to register. One that is made is in its file before
// anything else happens: nobody could act as an admin whose seed is lost. A file
// that is there is from an attempt that did not get through.
func (a *app) firstAdmin(public, out string) (bus.UserKey, error) {
	if out == "" {
		return bus.ParseUserKey(public)
	}
	if !exists(out) {
		return a.makeIdentity(out, false)
	}
	pair, err := readIdentity(out)
	if err != nil {
		return bus.UserKey{}, err
	}
	return userKeyOf(pair)
}
