// Command unibusctl operates a unibus: its users, rooms, nodes and keys.
//
// Exit codes, the same for every command:
//
//	0    done
//	1    refused or failed, including a handle, room id or key that is not one
//	2    usage: unknown command or flag, missing or extra argument; nothing was done
//	3    not ready or not proven: no quorum, no answer in time; retry makes sense
//	130  interrupted (SIGINT, SIGTERM)
//
// Commands named "check" speak to monitoring and use 0 OK, 1 WARNING,
// 2 CRITICAL, 3 UNKNOWN instead. Data goes to stdout, everything said to a
// person goes to stderr.
package main

import (
	"context"
	"crypto/rand"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// After the first signal the handler steps aside: a second one ends a
	// command that does not listen to its context.
	context.AfterFunc(ctx, stop)
	a := &app{in: os.Stdin, out: os.Stdout, errw: os.Stderr, getenv: os.Getenv, now: time.Now, rand: rand.Reader}
	os.Exit(a.run(ctx, os.Args[1:]))
}
