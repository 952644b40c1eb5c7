package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// against compares with the configuration that runs now, and tells what
// putting the new one into effect does. nats-server 2.15.2 authorizes every
// client again at every reload it accepts (accounts and users are always in
// the result of Server.diffOptions), and closes those whose key is not in the
// configuration: all that the auth callout admitted.
func (l *linter) against(old string) {
	before, err := readConf(filepath.Join(old, filepath.FromSlash(mainConf)), l.getenv)
	if err != nil {
		l.unknown(confPos{file: old}, "cannot be compared: "+err.Error(), "name with --against the directory that the server runs with")
		return
	}
	var reloaded []string
	first := confPos{}
	for _, c := range append(changes(before.root, l.conf.root), l.certificateChanges(old)...) {
		switch effect, why := c.effect(); effect {
		case effectRestart:
			l.warning(c.at, fmt.Sprintf("%s: a reload is refused as a whole, %s", c, why), "restart the nodes one at a time: unibusctl cluster wait between them")
		case effectLeave:
			l.warning(c.at, fmt.Sprintf("%s: after a reload the other nodes refuse this one", c), "keep it; a cluster gets another name only when all nodes are stopped")
		case effectReload:
			if len(reloaded) == 0 {
				first = c.at
			}
			reloaded = append(reloaded, c.String())
		}
	}
	if len(reloaded) > 0 {
		l.warning(first, strings.Join(reloaded, ", ")+": a reload, whatever it changes, closes the connections of all bus users on this server; they reconnect",
			"reload one node at a time, at a quiet hour")
	}
}

// certificateChanges compares the files that a reload reads besides the
// configuration.
func (l *linter) certificateChanges(old string) []change {
	var out []change
	for _, r := range references() {
		name := filepath.Join("tls", r.want)
		path := l.path(name)
		before, errBefore := os.ReadFile(filepath.Join(old, name))
		now, errNow := os.ReadFile(path)
		if errBefore == nil && errNow == nil && !bytes.Equal(before, now) {
			v := &confValue{}
			out = append(out, change{filepath.ToSlash(name), v, v, confPos{file: path}})
		}
	}
	return out
}

// change is one setting that differs.
type change struct {
	key      string // dotted, without list positions
	old, new *confValue
	at       confPos
}

func (c change) String() string {
	switch {
	case c.old == nil:
		return c.key + " was added"
	case c.new == nil:
		return c.key + " was removed"
	}
	return c.key + " was changed"
}

type effect int

const (
	effectNone    effect = iota // nothing by itself
	effectReload                // taken over by a reload
	effectLeave                 // takes the node out of its cluster
	effectRestart               // refused by a reload
)

// reloadRule says what a change of matching keys does; the first match counts.
// Source: Server.diffOptions and validateClusterOpts of nats-server 2.15.2. It
// refuses what it does not know, so the list ends with what it does.
type reloadRule struct {
	key    *regexp.Regexp
	effect effect
	why    string
}

func reloadRules() []reloadRule {
	rule := func(pattern string, e effect, why string) reloadRule {
		return reloadRule{regexp.MustCompile(`^(?:` + pattern + `)$`), e, why}
	}
	return []reloadRule{
		rule(`authorization\.(auth_callout|auth_hook)(\..*)?`, effectRestart, "for the auth callout is read at start only"),
		rule(`(accounts|authorization)(\..*)?`, effectReload, ""),
		rule(`cluster\.name`, effectLeave, ""),
		rule(`cluster\.(listen|host|net|port)`, effectRestart, "for the route listener stays as it started"),
		rule(`cluster(\..*)?`, effectReload, ""),
		rule(`jetstream\.max_(file|memory|mem)(_store)?`, effectReload, ""), // effect knows which way
		rule(`jetstream\.limits(\..*)?`, effectReload, ""),
		rule(`jetstream(\..*)?`, effectRestart, "for JetStream reads it at start only"),
		rule(`tls/.*`, effectReload, ""),
		rule(`(tls|server_tags|server_metadata|logging)(\..*)?`, effectReload, ""),
		rule(`debug|trace|trace_verbose|trace_headers|logtime|logtime_utc|logfile|log_file|syslog|remote_syslog`, effectReload, ""),
		rule(`max_connections|max_conn|max_payload|max_control_line|max_traced_msg_len|ping_interval|ping_max|write_deadline`, effectReload, ""),
		rule(`pidfile|pid_file|ports_file_dir|client_advertise|connect_error_reports|reconnect_error_reports|no_fast_producer_stall`, effectReload, ""),
		rule(`[A-Z][A-Z0-9_]*`, effectNone, ""), // a variable: what matters is where it is used
		rule(`.*`, effectRestart, "for the server reads it at start only"),
	}
}

func (c change) effect() (effect, string) {
	for _, r := range reloadRules() {
		if !r.key.MatchString(c.key) {
			continue
		}
		if strings.HasPrefix(c.key, "jetstream.max_") && !c.grew() {
			return effectRestart, "for storage limits only grow at a reload"
		}
		return r.effect, r.why
	}
	return effectRestart, "for the server reads it at start only"
}

func (c change) grew() bool {
	old, ok1 := c.old.number()
	now, ok2 := c.new.number()
	return ok1 && ok2 && now > old
}

// changes lists the settings that differ, each once. Lists are compared as a
// whole.
func changes(old, now *confValue) []change {
	var out []change
	var compare func(path []string, old, now *confValue)
	compare = func(path []string, old, now *confValue) {
		isMap := func(v *confValue) bool { return v != nil && v.kind == confMap }
		if !isMap(old) || !isMap(now) {
			if !same(old, now) {
				at := now
				if at == nil {
					at = old
				}
				out = append(out, change{strings.Join(path, "."), old, now, at.pos})
			}
			return
		}
		for _, key := range keysOf(old, now) {
			compare(append(slices.Clone(path), key), old.field(key), now.field(key))
		}
	}
	compare(nil, old, now)
	return out
}

func keysOf(values ...*confValue) []string {
	var keys []string
	for _, v := range values {
		for _, f := range v.fields {
			if !slices.ContainsFunc(keys, func(k string) bool { return strings.EqualFold(k, f.key) }) {
				keys = append(keys, f.key)
			}
		}
	}
	return keys
}

// same compares what the server would see: the same number may be spelled
// differently, and a place is no difference.
func same(a, b *confValue) bool {
	if a == nil || b == nil {
		return a == b
	}
	if x, ok := a.number(); ok {
		y, ok := b.number()
		return ok && x == y
	}
	if a.kind != b.kind || a.text != b.text || len(a.items) != len(b.items) {
		return false
	}
	for i := range a.items {
		if !same(a.items[i], b.items[i]) {
			return false
		}
	}
	for _, key := range keysOf(a, b) {
		if !same(a.field(key), b.field(key)) {
			return false
		}
	}
	return true
}
