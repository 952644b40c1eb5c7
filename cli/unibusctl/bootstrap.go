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
			"   unibusctl --direct bootstrap --handle admin --sign-pub UA...",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "handle", Required: true, Usage: "short `NAME` of the admin"},
			&cli.StringFlag{Name: "sign-pub", Required: true, Usage: "public `KEY`, 64 hex digits or U..."},
		},
		Action: func(c *cli.Context) error {
			handle, err := bus.ParseHandle(c.String("handle"))
			if err != nil {
				return err
			}
			key, err := bus.ParseUserKey(c.String("sign-pub"))
			if err != nil {
				return err
			}
			if _, err := positional(c); err != nil {
				return err
			}
			if !a.set.direct {
				return &usageError{msg: "the first admin is made on the live KV, by who holds the ops seed", hint: a.command + " --direct ..., with --ops-seed FILE"}
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
