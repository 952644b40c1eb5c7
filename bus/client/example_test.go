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

// A program reports into a room, and does what is asked for there.
func ExampleDial() {
	err := func(ctx context.Context) error {
		seed, err := os.ReadFile("watcher.nk") // unibusctl identity new --out watcher.nk
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
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		conn, err := client.Dial(ctx, client.DialConfig{
			URLs:     []string{"tls://n1.example.org:4250", "tls://n2.example.org:4250", "tls://n3.example.org:4250"},
			TLS:      &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			Identity: id,
			Name:     "watcher",
			OnStatus: func(s client.Status) { fmt.Fprintln(os.Stderr, "bus:", s) },
		})
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := conn.Subscribe("ops", func(m client.Message) {
			if m.Sender != id.Key() {
				fmt.Println(m.Sender, m.Topic, string(m.Data))
			}
		}); err != nil {
			return err
		}
		if err := conn.Publish(ctx, "ops", "disk.full", []byte("/var on n2")); err != nil {
			return err
		}
		return conn.Flush(ctx)
	}(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

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

// A program keeps a log in a durable room, and reads what was said before.
func ExampleConn_Room() {
	err := func(ctx context.Context) error {
		seed, err := os.ReadFile("watcher.nk") // unibusctl identity new --out watcher.nk
		if err != nil {
			return err
		}
		id, err := sig.ParseIdentity(seed)
		if err != nil {
			return err
		}
		api, err := client.New(client.Config{
			URLs:   []string{"https://n1.example.org:8470", "https://n2.example.org:8470", "https://n3.example.org:8470"},
			CAFile: "client-ca.crt", Identity: id,
		})
		if err != nil {
			return err
		}
		defer api.Close()
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		conn, err := client.Dial(ctx, client.DialConfig{
			URLs:   []string{"tls://n1.example.org:4250", "tls://n2.example.org:4250", "tls://n3.example.org:4250"},
			CAFile: "client-ca.crt", Identity: id, API: api,
		})
		if err != nil {
			return err
		}
		defer conn.Close()

		room, err := conn.Room(ctx, "ops") // unibusctl room create ops --durable
		if err != nil {
			return err
		}
		hearing, err := room.Subscribe(ctx, client.Hear{From: client.FromTime(time.Now().Add(-time.Hour))}, func(m client.Message) {
			fmt.Println(m.Seq, m.Time, m.Sender, m.Topic, string(m.Data))
		})
		if err != nil {
			return err
		}
		defer hearing.Unsubscribe()
		seq, err := room.Publish(ctx, "disk.full", []byte("/var on n2"))
		if err != nil {
			return err
		}
		fmt.Println("two of three nodes have it as number", seq)
		return nil
	}(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}
