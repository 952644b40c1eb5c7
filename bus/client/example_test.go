package client_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
	"unibus.internal/bus/sig"
)

// An admin's program takes a user into a room, whichever node answers.
func Example() {
	err := func(ctx context.Context) error {
		seed, err := os.ReadFile("admin.nk") // unibusctl identity new --out admin.nk
		if err != nil {
			return err
		}
		id, err := sig.ParseIdentity(seed)
		if err != nil {
			return err
		}
		pem, err := os.ReadFile("client-ca.crt")
		if err != nil {
			return err
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(pem) {
			return errors.New("client-ca.crt holds no certificate")
		}
		c, err := client.New(client.Config{
			URLs:     []string{"https://n1.example.org:8470", "https://n2.example.org:8470", "https://n3.example.org:8470"},
			TLS:      &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			Identity: id,
		})
		if err != nil {
			return err
		}
		defer c.Close()

		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		change, err := c.SetMember(ctx, "ops", "alice", bus.Writer)
		switch {
		case bus.CodeOf(err) == bus.NotFound:
			return fmt.Errorf("there is no such user, or no such room: %w", err)
		case err != nil:
			return err
		case !change.Verified: // made, but some service may not know it yet
			_, err = c.SetMember(ctx, "ops", "alice", bus.Writer)
		}
		return err
	}(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}
