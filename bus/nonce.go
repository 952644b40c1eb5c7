package bus

import "unibus.internal/bus/guard"

// ServerNonce reports whether that may be signed to log in: a nats-server asks
// for the signature of 11 to 64 characters A-Z a-z 0-9 _ - (nats-server nkey.go,
// base64url without padding). The other end chooses the bytes, so a server of
// an attacker could ask for the signature of an HTTP request or of a room's
// roster instead; nothing else that this key signs has that form.
func ServerNonce(nonce []byte) bool {
	if guard.Off(guard.NonceGrammar) {
		return true
	}
	if len(nonce) < 11 || len(nonce) > 64 {
		return false
	}
	for _, c := range nonce {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}
