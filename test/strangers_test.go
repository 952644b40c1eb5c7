package test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"unibus.internal/test/cluster"
)

// Who has nothing gets nothing: a complete node listens where it says and
// nowhere else, what is not protected is on loopback, and no listener says
// more to a stranger than that it is there.
func TestStrangers(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Options{Membership: true, Authcallout: true})
	t.Run("listeners", func(t *testing.T) { listensNowhereElse(t, c.In(t)) })
	t.Run("without TLS", func(t *testing.T) { refusesPlaintext(t, c.In(t)) })
	t.Run("without a signature", func(t *testing.T) { servesNothingUnsigned(t, c.In(t)) })
}

// listensNowhereElse compares the sockets that the kernel shows with the ports
// a node shall have.
func listensNowhereElse(t *testing.T, c *cluster.Cluster) {
	for _, i := range c.Nodes() {
		p := c.Ports[i-1]
		loopback := []int{p.Monitor, p.MembershipAdmin, p.AuthcalloutAdmin}
		for _, s := range cluster.Services() {
			var seen []int
			for _, l := range listeners(t, c.PID(i, s)) {
				seen = append(seen, l.Port)
				if slices.Contains(loopback, l.Port) && !l.IP.IsLoopback() {
					t.Errorf("%s of n%d: port %d is on %s, not on loopback", s, i, l.Port, l.IP)
				}
			}
			slices.Sort(seen)
			want := slices.Sorted(slices.Values(p.Of(s)))
			if !slices.Equal(slices.Compact(seen), want) {
				t.Errorf("%s of n%d listens on %v, want %v", s, i, seen, want)
			}
		}
	}
}

// listeners are the listening TCP sockets of one process.
func listeners(t *testing.T, pid int) (found []net.TCPAddr) {
	t.Helper()
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	fds, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]bool{}
	for _, fd := range fds {
		if link, err := os.Readlink(filepath.Join(proc, "fd", fd.Name())); err == nil {
			own[link] = true
		}
	}
	for _, table := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(filepath.Join(proc, "net", table))
		if err != nil {
			continue // no IPv6 on this machine
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			const listening = "0A"
			if len(f) > 9 && f[3] == listening && own["socket:["+f[9]+"]"] {
				found = append(found, kernelAddr(t, f[1]))
			}
		}
	}
	return found
}

// kernelAddr reads an address of /proc/net/tcp: hexadecimal, in words of four
// bytes with the last byte first.
func kernelAddr(t *testing.T, s string) net.TCPAddr {
	t.Helper()
	host, port, _ := strings.Cut(s, ":")
	n, err := strconv.ParseUint(port, 16, 16)
	ip := make(net.IP, len(host)/2)
	if _, scanErr := fmt.Sscanf(host, "%x", (*[]byte)(&ip)); err != nil || scanErr != nil {
		t.Fatalf("address %q: %v %v", s, err, scanErr)
	}
	for word := range slices.Chunk(ip, 4) {
		slices.Reverse(word)
	}
	return net.TCPAddr{IP: ip, Port: int(n)}
}

// refusesPlaintext speaks every listener's language without TLS.
func refusesPlaintext(t *testing.T, c *cluster.Cluster) {
	p := c.Ports[0]
	for _, knock := range []struct {
		name string
		port int
		say  string
		not  string // in an answer to somebody who is let in
	}{
		{"client", p.NATS, "CONNECT {\"verbose\":true,\"tls_required\":false}\r\nPING\r\n", "PONG"},
		{"client without CONNECT", p.NATS, "SUB > 1\r\nPING\r\n", "PONG"},
		{"route", p.Route, "CONNECT {\"cluster\":\"unibus\",\"name\":\"n9\",\"tls_required\":false}\r\nPING\r\n", "PONG"},
		{"API", p.API, "GET /healthz HTTP/1.1\r\nHost: n1\r\n\r\n", "200 OK"},
	} {
		conn, err := net.DialTimeout("tcp", cluster.Loopback(knock.port), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(conn, knock.say); err != nil {
			t.Errorf("%s: %v", knock.name, err)
		}
		said, err := io.ReadAll(bufio.NewReader(conn))
		if bytes.Contains(said, []byte(knock.not)) || bytes.Contains(said, []byte("+OK")) {
			t.Errorf("%s: a stranger without TLS was told %.200q", knock.name, said)
		}
		if nerr, ok := err.(net.Error); ok && nerr.Timeout() { //nolint:errorlint // ReadAll does not wrap
			t.Errorf("%s: the connection of a stranger stays open", knock.name)
		}
	}
}

// servesNothingUnsigned asks the API for more than health.
func servesNothingUnsigned(t *testing.T, c *cluster.Cluster) {
	client, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/v1/me", "/v1/users", "/v1/rooms", "/v1/audit", "/v1/", "/metrics", "/debug/pprof/", "/debug/vars"} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodDelete} {
			req, err := http.NewRequestWithContext(t.Context(), method, c.APIURL(1)+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Errorf("%s %s: %v", method, path, err)
				continue
			}
			_ = resp.Body.Close()
			if resp.StatusCode < 400 || resp.StatusCode > 499 {
				t.Errorf("%s %s, unsigned: %s", method, path, resp.Status)
			}
		}
	}
}
