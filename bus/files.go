package bus

import (
	"crypto/x509"
	"io/fs"
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

// OnlyOwnerReads refuses a secret that others can read, as Invalid. One that they
// could have read has to be replaced, not just hidden again, so this is an error
// and not a warning.
func OnlyOwnerReads(path string, mode fs.FileMode) error {
	if mode = mode.Perm(); mode&0o077 != 0 {
		return E(Invalid, "%s is a secret that others can read (mode %04o)", path, mode).WithHint("chmod 600 %s", path)
	}
	return nil
}
