package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/nats-io/nkeys"
)

// files checks who can change the node's directory, and the environment files
// of the services.
func (l *linter) files() {
	err := filepath.WalkDir(l.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			l.unknown(confPos{file: path}, err.Error(), "run as a user who may read it, such as root")
			return nil
		}
		if mode, ok := modeOf(path); ok && mode&0o022 != 0 && d.Type()&fs.ModeSymlink == 0 {
			l.critical(confPos{file: path}, fmt.Sprintf("others can change it (mode %04o), and with it who gets in", mode), "chmod go-w "+path)
		}
		if filepath.Ext(path) == ".env" {
			l.envFile(path)
		}
		return nil
	})
	if err != nil {
		l.unknown(confPos{file: l.dir}, err.Error(), "check the directory")
	}
}

// edits warns of what the next render takes back, for it may be the one thing
// that keeps this node working. An edit that broke something has been named
// for that already, and a file that cannot be read by files.
func (l *linter) edits() {
	if l.severity() == severityCritical {
		return
	}
	names, err := templateNames()
	if err != nil {
		l.unknown(confPos{file: l.dir}, err.Error(), "this is a fault of unibusctl")
		return
	}
	for _, name := range names {
		data, err := os.ReadFile(l.path(name))
		if edited, _ := editedByHand(data); err == nil && edited {
			l.warning(confPos{file: l.path(name)}, "was edited after it was rendered, and the next render takes that back",
				"move it to "+localConf+" or nodes.env, and render again")
		}
	}
}

// envFile looks for placeholders and seeds in KEY=VALUE lines.
func (l *linter) envFile(path string) {
	data, err := os.ReadFile(path)
	if err != nil {
		l.unknown(confPos{file: path}, err.Error(), "run as a user who may read it, such as root")
		return
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for n := 1; lines.Scan(); n++ {
		key, value, ok := strings.Cut(strings.TrimSpace(lines.Text()), "=")
		if !ok || strings.HasPrefix(key, "#") {
			continue
		}
		value = strings.Trim(value, `"'`)
		at := confPos{path, n}
		switch {
		case placeholder.MatchString(value) || strings.Contains(value, "{{"):
			l.critical(at, fmt.Sprintf("%s is still the placeholder %s", key, quote(value)), "write the real value")
		case isSeed(value):
			l.critical(at, key+" holds a secret seed: an environment can be read from outside the process", "keep seeds in creds only, and make new ones")
		}
	}
}

// seedNames maps the public keys of this node's seeds to their names. Seeds
// that cannot be read are missing in it; keys tells why.
func (l *linter) seedNames() map[string]string {
	names := map[string]string{}
	for _, k := range keyFiles {
		if data, err := os.ReadFile(l.seedPath(k)); err == nil {
			if public, err := publicOf(data, k.prefix); err == nil {
				names[public] = k.name
			}
		}
	}
	return names
}

func (l *linter) seedPath(k keyFile) string { return l.path("creds/" + k.file()) }

// keys checks each seed by itself, and against the configuration that the
// servers know its public half from.
func (l *linter) keys() {
	for _, k := range keyFiles {
		at := confPos{file: l.seedPath(k)}
		data, err := os.ReadFile(at.file)
		switch {
		case errors.Is(err, fs.ErrNotExist) && !k.onNode:
			continue
		case errors.Is(err, fs.ErrNotExist):
			l.critical(at, "is missing: a service cannot log in", fixRender)
			continue
		case err != nil:
			l.unknown(at, err.Error(), "run as a user who may read it, such as root")
			continue
		case !k.onNode:
			l.critical(at, "is break glass, and no service of a node needs it", "keep it off the nodes: move it to where config init made it")
		}
		if mode, ok := modeOf(at.file); ok && mode&0o077 != 0 {
			l.critical(at, fmt.Sprintf("is a secret that others can read (mode %04o)", mode), fmt.Sprintf("chmod 600 %s, and make a new one if others were on this machine", at.file))
		}
		public, err := publicOf(data, k.prefix)
		if err != nil {
			l.critical(at, err.Error(), "restore it from what config init made; "+fixRender)
			continue
		}
		l.keyIsKnown(k, at, public)
	}
	l.secondKeys()
}

// secondKeys checks the other generation of issuer and xkey, which callouts
// accept beside the one of the servers while it is replaced.
func (l *linter) secondKeys() {
	for _, k := range keyFiles {
		if !k.second() {
			continue
		}
		at := confPos{file: l.path("creds/" + beside(k.file(), "next"))}
		data, err := os.ReadFile(at.file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			l.critical(at, "is missing: unibus-authcallout does not start without it", fixRender)
			continue
		case err != nil:
			l.unknown(at, err.Error(), "run as a user who may read it, such as root")
			continue
		}
		if mode, ok := modeOf(at.file); ok && mode&0o077 != 0 {
			l.critical(at, fmt.Sprintf("is a secret that others can read (mode %04o)", mode), fmt.Sprintf("chmod 600 %s, and make a new one if others were on this machine", at.file))
		}
		if _, err := publicOf(data, k.prefix); err != nil {
			l.critical(at, err.Error(), "restore it from what config init made; "+fixRender)
		}
	}
}

// keyIsKnown finds a key's public half where the servers look for it.
func (l *linter) keyIsKnown(k keyFile, at confPos, public string) {
	callout := []string{"authorization", "auth_callout|auth_hook"}
	switch k.prefix {
	case nkeys.PrefixByteAccount, nkeys.PrefixByteCurve:
		v := l.get(append(callout, k.name)...)
		valid := nkeys.IsValidPublicAccountKey(v.string()) || nkeys.IsValidPublicCurveKey(v.string())
		if valid && v.text != public {
			l.critical(v.pos, fmt.Sprintf("auth_callout.%s is not the public key of %s: no answer of the callout would be believed", k.name, at.file), fixRender)
		}
	default:
		_, account, _ := strings.Cut(k.name, "-")
		account = strings.ToUpper(account)
		for _, u := range l.staticUsers() {
			if u.nkey == public && (account == "" || u.account == account) {
				return
			}
		}
		l.critical(at, fmt.Sprintf("its public key %s is no user of account %s: the service cannot log in", public, account), fixRender)
	}
}

// certificates checks what the configuration names, and the tls directory by
// the rules of `unibusctl pki verify`.
func (l *linter) certificates() {
	l.references()
	check := &pkiChecker{dir: pkiDir(l.path("tls")), now: l.now, onNode: true}
	n, known := l.self()
	switch name := l.get("server_name").string(); {
	case known:
		check.inventory = l.inv.path
	case name == "" || l.inv != nil: // named already; the certificates are judged by themselves
		n = check.nodeHere(nil)
	default:
		n = node{name: name}
	}
	check.authorities()
	check.leaves(leafDir(check.dir), n.name, leafNames(n))
	for _, f := range check.findings {
		l.found(f.Severity, confPos{file: f.File}, f.Problem, f.Fix)
	}
	if !known {
		l.namedInCertificates()
	}
}

// namedInCertificates compares certificates with the configuration's own
// addresses, where no inventory tells them.
func (l *linter) namedInCertificates() {
	for _, c := range []struct {
		role  leafRole
		paths [][]string
	}{
		{serverLeaf, [][]string{{"listen"}, {"host|net"}, {"client_advertise"}}},
		{routeLeaf, [][]string{{"cluster", "listen"}, {"cluster", "host|net"}, {"cluster", "cluster_advertise|advertise"}}},
	} {
		file := leafDir(l.path("tls")).cert(c.role)
		cert, err := readCert(file)
		if err != nil {
			continue // named already
		}
		for _, path := range c.paths {
			v := l.get(path...)
			host := v.string()
			if h, _, err := net.SplitHostPort(host); err == nil {
				host = h
			}
			ip := net.ParseIP(host)
			if v == nil || host == "" || v.kind == confNumber || ip != nil && ip.IsUnspecified() {
				continue
			}
			if len(without([]string{canonicalName(host)}, certNames(cert))) > 0 {
				l.critical(v.pos, fmt.Sprintf("%s is %s, which %s does not name: TLS to it fails", spelled(path), host, file), "issue a certificate that names it, or listen on an address it names")
			}
		}
	}
}

// reference is a file that nats-server reads, and the one of the node's tls
// directory that it has to be.
type reference struct {
	path []string
	want string
	why  string
}

func references() []reference {
	return []reference{
		{[]string{"tls", "cert_file"}, "server.crt", "clients trust the client CA alone"},
		{[]string{"tls", "key_file"}, "server.key", "it belongs to server.crt"},
		{[]string{"cluster", "tls", "cert_file"}, "route.crt", "the other nodes trust the cluster CA alone"},
		{[]string{"cluster", "tls", "key_file"}, "route.key", "it belongs to route.crt"},
		{[]string{"cluster", "tls", "ca_file"}, "cluster-ca.crt", "under another authority, whoever has one of its certificates becomes a node"},
	}
}

// references holds the file names in the configuration against the layout:
// this is where the two authorities are mixed up by hand.
func (l *linter) references() {
	for _, r := range references() {
		v := l.get(r.path...)
		switch {
		case !isSet(v):
			l.critical(l.where(r.path...), spelled(r.path)+" is missing: this link would not be encrypted, or its end not proven", fixRender)
		case !filepath.IsAbs(v.text):
			l.critical(v.pos, fmt.Sprintf("%s is %s: relative to wherever the server is started", spelled(r.path), v.text), fixRender)
		case filepath.Base(v.text) != r.want || filepath.Base(filepath.Dir(v.text)) != "tls":
			l.critical(v.pos, fmt.Sprintf("%s is %s, not tls/%s: %s", spelled(r.path), v.text, r.want, r.why), "name tls/"+r.want)
		}
	}
	if v := l.get("tls", "ca_file"); isSet(v) && filepath.Base(v.text) != "client-ca.crt" {
		l.critical(v.pos, fmt.Sprintf("tls.ca_file is %s, not tls/client-ca.crt: clients and routes must never share an authority", v.text), "remove it, or name tls/client-ca.crt")
	}
}

// etc is the path of the node's directory that the configuration names its
// certificates by. It differs from where the files are when they were rendered
// for another place (config render --etc).
func (l *linter) etc() string {
	if l.conf == nil {
		return ""
	}
	v := l.get("tls", "cert_file")
	if !isSet(v) || !filepath.IsAbs(v.text) {
		return ""
	}
	return filepath.Dir(filepath.Dir(v.text))
}
