package client

import (
	"context"
	"math/rand/v2"
	"time"

	"unibus.internal/bus"
)

const (
	// dutyEvery is how often an owner asks whether a room needs another key, if
	// no notice makes them ask: notices may be lost.
	dutyEvery = 2 * time.Minute
	// dutyJitter spreads the owners of a room: whoever comes first makes its key,
	// and the others find that there is nothing left to do.
	dutyJitter  = 2 * time.Second
	dutyTimeout = time.Minute
)

// keeping publishes the user's encryption key, and does an owner's duty in the
// encrypted rooms that are theirs.
func (c *Conn) keeping(ctx context.Context) {
	announced := false
	for {
		if !announced {
			if _, err := c.cfg.Keys.Announce(ctx); err != nil {
				c.log.Warn("the encryption key is not published", "err", err)
			} else {
				announced = true
			}
		}
		for _, g := range c.Rooms() {
			if g.Encrypted && g.Role == bus.Owner && announced {
				c.duty(ctx, g.Room)
			}
		}
		patience := dutyEvery/2 + rand.N(dutyEvery)
		if !announced { // until then nobody can let the user in
			patience = lastDelay
		}
		wait := time.NewTimer(patience)
		select {
		case <-ctx.Done():
		case <-c.rekey:
		case <-wait.C:
		}
		wait.Stop()
		select {
		case <-ctx.Done():
			return
		case <-time.After(rand.N(dutyJitter)):
		}
	}
}

func (c *Conn) duty(ctx context.Context, room bus.RoomID) {
	ctx, cancel := context.WithTimeout(ctx, dutyTimeout)
	defer cancel()
	if err := c.cfg.Keys.Duty(ctx, room); err != nil && ctx.Err() == nil {
		c.log.Warn("a room may need another key, and has none", "room", room, "err", err)
	}
}
