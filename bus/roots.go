package bus

import (
	"crypto/x509"
	"os"
)

// Roots are the authorities in a file: two while one is being replaced. What
// outlives a rotation reads them again at each connect. An error is Invalid.
func Roots(caFile string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, E(Invalid, "cannot read the CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, E(Invalid, "%s holds no certificate", caFile)
	}
	return pool, nil
}
