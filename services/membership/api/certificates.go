package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Certificates serves a certificate from files and takes a renewed pair without
// a restart. A bad new pair is reported and the good old one kept. It shows the
// CA too, for newcomers who know only its fingerprint (unibusctl join --ca-pin).
type Certificates struct {
	certFile, keyFile, caFile string
	log                       *slog.Logger

	mu    sync.Mutex
	pair  *tls.Certificate
	leaf  *x509.Certificate
	mtime time.Time
}

// LoadCertificates reads the pair and the CA; it fails if they are no good.
func LoadCertificates(certFile, keyFile, caFile string, log *slog.Logger) (*Certificates, error) {
	c := &Certificates{certFile: certFile, keyFile: keyFile, caFile: caFile, log: log}
	if err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// Reload reads the files again.
func (c *Certificates) Reload() error {
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("certificate %s: %w", c.certFile, err)
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return fmt.Errorf("certificate %s: %w", c.certFile, err)
	}
	if len(pair.Certificate) == 1 { // what brings a chain of its own is shown as it is
		if pair.Certificate, err = withIssuer(leaf, c.caFile); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pair, c.leaf, c.mtime = &pair, leaf, c.changed()
	return nil
}

// withIssuer is the certificate and the one of the CA's that has signed it. A
// certificate of somebody else's CA stands alone, as before.
func withIssuer(leaf *x509.Certificate, caFile string) ([][]byte, error) {
	rest, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("the CA: %w", err)
	}
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return [][]byte{leaf.Raw}, nil
		}
		ca, err := x509.ParseCertificate(block.Bytes)
		if err == nil && leaf.CheckSignatureFrom(ca) == nil {
			return [][]byte{leaf.Raw, ca.Raw}, nil
		}
	}
}

// changed is the newest modification time of the files.
func (c *Certificates) changed() time.Time {
	var newest time.Time
	for _, f := range []string{c.certFile, c.keyFile, c.caFile} {
		if st, err := os.Stat(f); err == nil && st.ModTime().After(newest) {
			newest = st.ModTime()
		}
	}
	return newest
}

// Watch reloads when the files change, looking every interval, and on each
// value from reload, until ctx ends.
func (c *Certificates) Watch(ctx context.Context, every time.Duration, reload <-chan os.Signal) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-reload:
		case <-tick.C:
			c.mu.Lock()
			same := c.changed().Equal(c.mtime)
			c.mu.Unlock()
			if same {
				continue
			}
		}
		if err := c.Reload(); err != nil {
			c.log.Error("keeping the old certificate", "err", err)
			continue
		}
		c.log.Info("certificate loaded", "file", c.certFile, "expires", c.NotAfter())
	}
}

// Get is for tls.Config.GetCertificate.
func (c *Certificates) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pair, nil
}

// NotAfter is when the served certificate expires.
func (c *Certificates) NotAfter() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leaf.NotAfter
}

func (c *Certificates) fault(now time.Time) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now.Before(c.leaf.NotBefore) || now.After(c.leaf.NotAfter) {
		return fmt.Sprintf("certificate %s is valid from %s to %s", c.certFile,
			c.leaf.NotBefore.UTC().Format(time.DateOnly), c.leaf.NotAfter.UTC().Format(time.DateOnly))
	}
	return ""
}
