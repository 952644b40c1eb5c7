package api

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Rate is how often somebody may ask.
type Rate struct {
	PerSecond float64
	Burst     int
}

// ParseRate reads "50:200": 50 a second, 200 at once.
func ParseRate(s string) (Rate, error) {
	per, burst, ok := strings.Cut(s, ":")
	p, err1 := strconv.ParseFloat(per, 64)
	b, err2 := strconv.Atoi(burst)
	if !ok || err1 != nil || err2 != nil || !(p > 0 && p <= 1e6) || b < 1 || b > 1e6 {
		return Rate{}, fmt.Errorf("rate %q is not PER_SECOND:BURST, such as 50:200", s)
	}
	return Rate{PerSecond: p, Burst: b}, nil
}

// maxBuckets bounds the memory of a limiter, twice.
const maxBuckets = 8192

// limiter keeps one token bucket per key, in bounded memory: when a generation
// is full it becomes the old one, and what is in neither is forgotten. Whoever
// has that many addresses has as many budgets anyway.
type limiter[K comparable] struct {
	rate Rate

	mu         sync.Mutex
	young, old map[K]*rate.Limiter
}

func newLimiter[K comparable](r Rate) *limiter[K] {
	return &limiter[K]{rate: r, young: map[K]*rate.Limiter{}}
}

// take spends one token, or says how long to wait for one.
func (l *limiter[K]) take(k K, now time.Time) (wait time.Duration, ok bool) {
	l.mu.Lock()
	b := l.young[k]
	if b == nil {
		if b = l.old[k]; b == nil {
			b = rate.NewLimiter(rate.Limit(l.rate.PerSecond), l.rate.Burst)
		}
		if len(l.young) >= maxBuckets {
			l.old, l.young = l.young, map[K]*rate.Limiter{}
		}
		l.young[k] = b
	}
	l.mu.Unlock()
	if b.AllowN(now, 1) {
		return 0, true
	}
	return time.Duration(float64(time.Second) / l.rate.PerSecond), false
}

// clientAddress is who sent a request: the peer, or, behind a trusted proxy,
// the last address in X-Forwarded-For that is not a trusted proxy itself. It
// serves the rate limit, the log and the audit, and decides nothing.
func clientAddress(r *http.Request, trusted []netip.Prefix) netip.Addr {
	peer := parseAddress(r.RemoteAddr)
	if !inAny(trusted, peer) {
		return peer
	}
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(hops) - 1; i >= 0; i-- {
		hop := parseAddress(strings.TrimSpace(hops[i]))
		if !hop.IsValid() {
			return peer // whatever stands before it may be made up
		}
		if !inAny(trusted, hop) {
			return hop
		}
	}
	return peer
}

func inAny(prefixes []netip.Prefix, a netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func parseAddress(s string) netip.Addr {
	if host, _, err := net.SplitHostPort(s); err == nil {
		s = host
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}
	}
	return a.Unmap().WithZone("")
}

// budgetOf is what shares one budget: an IPv4 address, or an IPv6 network, of
// which everybody has 2^64 addresses.
func budgetOf(a netip.Addr) netip.Prefix {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}
