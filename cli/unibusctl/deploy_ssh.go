package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"unibus.internal/bus"
)

// deployScript is the node's half. It travels with every call, so that the two
// halves are never of different versions.
//
//go:embed deploy.sh
var deployScript string

var backupPattern = regexp.MustCompile(`^[0-9TZ.]{1,32}$`)

// deployHost is one node and what it was found to have.
type deployHost struct {
	node   node
	config string // for ssh -F; may be empty

	files   []deployFile   // that it should have
	changes []deployChange // of these, what differs

	sudo       bool
	arch       string
	machine    string
	is         string // the node that it is already; empty: none
	missing    []string
	unfinished bool
	free       map[string]int64 // bytes by directory
	backup     string
}

// sshWithin bounds a call; a switch of all files takes a second.
const sshWithin = 2 * time.Minute

// becomeRoot is what ssh runs. It reads its script from stdin, so that nothing
// of it stands in an argument list of the node.
const becomeRoot = `if [ "$(id -u)" = 0 ]; then exec sh -s; else exec sudo -n sh -s; fi`

// sshOptions: never ask anybody anything, and never for long. Which hosts are
// known and which key is used stays with the operator's own ssh.
func (h *deployHost) sshOptions() []string {
	out := []string{"-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"}
	if h.config != "" {
		out = append([]string{"-F", h.config}, out...)
	}
	return out
}

// run calls a function of deploy.sh as root and returns its lines. Words are
// paths and ids without quotes or spaces (renderRequest and the tables of
// deploy.go see to that); they are quoted all the same.
func (h *deployHost) run(ctx context.Context, words ...string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, sshWithin)
	defer cancel()
	var script, stdout, stderr bytes.Buffer
	script.WriteString(deployScript)
	script.WriteString("main")
	for _, w := range words {
		fmt.Fprintf(&script, " '%s'", strings.ReplaceAll(w, "'", `'\''`))
	}
	script.WriteString("\n")
	cmd := exec.CommandContext(ctx, "ssh", append(h.sshOptions(), "--", h.node.ssh, becomeRoot)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &script, &stdout, &stderr
	err := cmd.Run()
	lines := strings.Split(strings.TrimSuffix(stdout.String(), "\n"), "\n")
	for _, l := range lines {
		if why, ok := strings.CutPrefix(l, "fault "); ok {
			return nil, bus.E(bus.Conflict, "%s: %s", h.node.name, why)
		}
	}
	// Without the last line the connection broke, and what was done is not known.
	if err != nil || lines[len(lines)-1] != "end" {
		return nil, h.failed(ctx, "ssh", err, stderr.String())
	}
	return lines[:len(lines)-1], nil
}

// failed says which node, and what the program that failed had to say.
func (h *deployHost) failed(ctx context.Context, program string, err error, said string) error {
	var exit *exec.ExitError
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	lines := strings.Split(strings.TrimSpace(said), "\n")
	detail := lines[len(lines)-1]
	for _, l := range lines { // rsync puts the reason before its own last word
		if strings.Contains(l, "No space left") || strings.Contains(l, "ermission denied") || strings.Contains(l, "verification failed") {
			detail = l
		}
	}
	if detail == "" && err != nil {
		detail = err.Error()
	}
	if errors.As(err, &exit) && exit.ExitCode() == 255 {
		return bus.E(bus.Unavailable, "%s is not reached by ssh %s: %s", h.node.name, h.node.ssh, detail).WithHint("ssh %s true", h.node.ssh)
	}
	return bus.E(bus.Unavailable, "%s: %s failed: %s", h.node.name, program, detail).WithHint("unibusctl deploy status --node %s ...; the same command again goes on", h.node.name)
}

// probe learns what the node is and has, and what of it differs.
func (h *deployHost) probe(ctx context.Context) error {
	words := []string{"probe"}
	for _, f := range h.files {
		words = append(words, f.path)
	}
	lines, err := h.run(ctx, words...)
	if err != nil {
		return err
	}
	there := map[string][]string{} // path -> sum, mode, owner
	h.free = map[string]int64{}
	for _, l := range lines {
		f := strings.Fields(l)
		switch {
		case len(f) == 2 && f[0] == "uid":
			h.sudo = f[1] != "0"
		case len(f) == 2 && f[0] == "arch":
			h.arch = f[1]
		case len(f) == 2 && f[0] == "machine":
			h.machine = f[1]
		case len(f) == 2 && f[0] == "node":
			h.is = f[1]
		case len(f) == 2 && f[0] == "missing":
			h.missing = append(h.missing, f[1])
		case len(f) == 2 && f[0] == "unfinished":
			h.unfinished = true
		case len(f) == 3 && f[0] == "free":
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return bus.E(bus.Internal, "%s: cannot tell its free space: %s", h.node.name, quote(l))
			}
			h.free[f[2]] = kib << 10
		case len(f) == 5 && f[0] == "file":
			there[f[4]] = f[1:4]
		}
	}
	h.compare(there)
	return nil
}

// compare fills changes. there has sum, mode and owner of each file that the
// node has.
func (h *deployHost) compare(there map[string][]string) {
	h.changes = []deployChange{}
	for _, f := range h.files {
		now, ok := there[f.path]
		switch {
		case !ok:
			h.changes = append(h.changes, deployChange{Path: f.path, What: "create", file: f})
		case f.once:
		case now[0] != f.sum:
			h.changes = append(h.changes, deployChange{Path: f.path, What: "replace", file: f})
		case now[1] != strconv.FormatInt(int64(f.mode), 8) || now[2] != f.owner:
			h.changes = append(h.changes, deployChange{Path: f.path, What: "owner", file: f})
		}
	}
}

// spare is what a stage leaves free beyond what it needs: a full disk stops the
// servers, and with them the bus.
const spare = 64 << 20

// fits refuses a node whose disk the new files would fill, before anything is
// sent. For a moment a file is there three times: as it arrived, beside its
// target, and what it replaces.
func (h *deployHost) fits() error {
	need := map[string]int64{}
	for _, c := range h.changes {
		size := int64(len(c.file.data))
		need["/var/lib"] += 2 * size
		if strings.HasPrefix(c.Path, "/usr/") {
			need["/usr"] += size
		} else {
			need["/etc"] += size
		}
	}
	all := int64(0)
	for _, n := range need {
		all += n
	}
	for _, dir := range []string{"/var/lib", "/usr", "/etc"} {
		want := need[dir]
		if dir == "/var/lib" {
			want = all // one file system for all of it is the usual case
		}
		if want > 0 && h.free[dir] < want+spare {
			return bus.E(bus.Conflict, "%s has %d MiB free in %s, and a stage needs %d", h.node.name, h.free[dir]>>20, dir, (want+spare)>>20).
				WithHint("make room on %s", h.node.ssh)
		}
	}
	return nil
}

// contents fetches files for a diff.
func (h *deployHost) contents(ctx context.Context, paths []string) (map[string][]byte, error) {
	out := map[string][]byte{}
	if len(paths) == 0 {
		return out, nil
	}
	lines, err := h.run(ctx, append([]string{"contents"}, paths...)...)
	if err != nil {
		return nil, err
	}
	for _, l := range lines {
		if f := strings.Fields(l); len(f) >= 2 && f[0] == "content" {
			data, err := base64.StdEncoding.DecodeString(strings.Join(f[2:], ""))
			if err != nil {
				return nil, bus.E(bus.Internal, "%s: %s came back damaged", h.node.name, f[1])
			}
			out[f[1]] = data
		}
	}
	return out, nil
}

// send brings what differs into the node's incoming directory, where nothing
// looks. rsync goes on where an earlier try ended.
func (h *deployHost) send(ctx context.Context, dir string) error {
	var manifest strings.Builder
	for _, c := range h.changes {
		target := filepath.Join(dir, "tree", filepath.FromSlash(c.Path))
		if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
			return fmt.Errorf("write what is to be sent: %w", err)
		}
		if err := os.WriteFile(target, c.file.data, 0o600); err != nil {
			return fmt.Errorf("write what is to be sent: %w", err)
		}
		fmt.Fprintf(&manifest, "%s %04o %s %s\n", c.file.sum, c.file.mode, c.file.owner, c.Path)
	}
	if err := os.WriteFile(filepath.Join(dir, "manifest"), []byte(manifest.String()), 0o600); err != nil {
		return fmt.Errorf("write what is to be sent: %w", err)
	}
	if _, err := h.run(ctx, "prepare"); err != nil {
		return err
	}
	ssh := append([]string{"ssh"}, h.sshOptions()...)
	for _, word := range ssh {
		if strings.ContainsAny(word, " \t'\"") {
			return bus.E(bus.Invalid, "rsync cannot pass on the path %s", quote(word)).WithHint("choose a path without spaces")
		}
	}
	args := []string{"-rt", "-z", "--checksum", "--partial", "--delete", "--chmod=D700,F600", "--timeout=60", "-e", strings.Join(ssh, " ")}
	if h.sudo {
		args = append(args, "--rsync-path", "sudo -n rsync")
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "rsync", append(args, dir+"/", rsyncHost(h.node.ssh)+":/var/lib/unibus-deploy/incoming/")...)
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return h.failed(ctx, "rsync", err, stderr.String())
	}
	return nil
}

// rsyncHost puts a bare IPv6 address into brackets, which rsync wants and ssh
// does not.
func rsyncHost(ssh string) string {
	user, host, found := strings.Cut(ssh, "@")
	if !found {
		user, host = "", ssh
	} else {
		user += "@"
	}
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return user + host
}

// restarts lists the units that read one of the changed files at their start,
// in the order in which they are stopped.
func (h *deployHost) restarts() []string {
	readers := []struct {
		unit  string
		reads []string
	}{
		{"unibus-membership", []string{"/usr/sbin/unibus-membership", "/etc/unibus/membership.env", "/etc/unibus/tls/client-ca.crt", "/etc/unibus/creds/membership-"}},
		{"unibus-authcallout", []string{"/usr/sbin/unibus-authcallout", "/etc/unibus/authcallout.env", "/etc/unibus/tls/client-ca.crt", "/etc/unibus/creds/authcallout-", "/etc/unibus/creds/issuer", "/etc/unibus/creds/xkey"}},
		{"unibus-nats", []string{"/usr/lib/unibus/nats-server", "/etc/unibus/nats/", "/etc/unibus/tls/server.", "/etc/unibus/tls/route.", "/etc/unibus/tls/cluster-ca.crt"}},
	}
	out := []string{}
	if h.is == "" { // nothing runs where nothing is staged
		return out
	}
	for _, r := range readers {
		reads := append(r.reads, "/usr/lib/systemd/system/"+r.unit+".service")
		if slices.ContainsFunc(h.changes, func(c deployChange) bool {
			return slices.ContainsFunc(reads, func(p string) bool { return strings.HasPrefix(c.Path, p) })
		}) {
			out = append(out, r.unit)
		}
	}
	return out
}
