package main

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"unibus.internal/bus"
)

// inventory is nodes.env: which nodes form the cluster and how they are
// reached. The file can also be sourced by a shell, so values are plain:
//
//	UNIBUS_CLUSTER=unibus
//	ROUTE_NETWORK=private          # routes run over public or private addresses
//	NATS_PORT=4250 API_PORT=8470   # optional; these are the defaults
//	API_AUTHORITIES=bus.corp.net   # optional; HOST or HOST:PORT of load balancers, a comma list
//	NODE_1="n1 ssh=root@host1 public=198.18.0.1 private=10.0.0.1"
//	NODE_2="n2 ssh=root@host2 public=198.18.0.2 private=10.0.0.2 nats=4251"
type inventory struct {
	path         string
	cluster      string // the NATS cluster's name
	routeNetwork string // "public" or "private"
	nodes        []node // by the number in NODE_<number>

	apiAuthorities []string // of load balancers: HOST, or HOST:PORT if not 443
}

// node is one machine of the cluster, or one of several on a single machine
// when their ports differ.
type node struct {
	name    string // server name, certificate SAN and directory name
	ssh     string // user@host; empty where nothing is deployed by ssh
	public  string // IP address or DNS name that clients and load balancers use
	private string // IP address or DNS name between nodes; may be empty on public routes
	ports   ports
	line    int // of its row, for error messages
}

// ports of one node. The monitor and the admin listeners are bound to
// loopback, the others to every address.
type ports struct {
	nats, route, monitor, api, membershipAdmin, authcalloutAdmin int
}

// routeAddress is the address under which the other nodes reach n's routes.
func (inv *inventory) routeAddress(n node) string {
	if inv.routeNetwork == "private" {
		return n.private
	}
	return n.public
}

// node finds a node by name.
func (inv *inventory) node(name string) (node, error) {
	var names []string
	for _, n := range inv.nodes {
		if n.name == name {
			return n, nil
		}
		names = append(names, n.name)
	}
	return node{}, bus.E(bus.NotFound, "there is no node %q in %s, only %s", name, inv.path, strings.Join(names, ", "))
}

// addresses are the names and IPs under which n is reached, without loopback,
// each once.
func (n node) addresses() []string {
	out := []string{n.public}
	if n.private != "" && n.private != n.public {
		out = append(out, n.private)
	}
	return out
}

// named lists the ports by their key in a node's row.
func (p *ports) named() map[string]*int {
	return map[string]*int{
		"nats": &p.nats, "route": &p.route, "monitor": &p.monitor, "api": &p.api,
		"membership_admin": &p.membershipAdmin, "authcallout_admin": &p.authcalloutAdmin,
	}
}

// parseInventory reads nodes.env. Everything wrong with it is an error that
// names file and line: the addresses end up in certificates, routes and
// firewall rules, where a leftover placeholder is found much later.
func parseInventory(path string) (*inventory, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the inventory: %w", err)
	}
	p := &inventoryParser{
		inv:  &inventory{path: path},
		rows: map[int]assignment{}, seen: map[string]int{},
		defaults: ports{nats: 4250, route: 6250, monitor: 8222, api: 8470, membershipAdmin: 9470, authcalloutAdmin: 9480},
	}
	for i, text := range strings.Split(string(data), "\n") {
		assignments, err := splitAssignments(strings.TrimSuffix(text, "\r"))
		if err != nil {
			return nil, p.errorf(i+1, "%w", err)
		}
		for _, a := range assignments {
			a.line = i + 1
			if err := p.assign(a); err != nil {
				return nil, err
			}
		}
	}
	return p.finish()
}

type assignment struct {
	key, value string
	line       int
}

var (
	assignmentPattern = regexp.MustCompile(`^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=("[^"]*"|'[^']*'|[^\s"'#;&|<>()]*)`)
	wordPattern       = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	nodeNamePattern   = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	hostPattern       = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*$`)
	sshPattern        = regexp.MustCompile(`^([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9.:-]*$`)
	nodeKeyPattern    = regexp.MustCompile(`^NODE_([1-9][0-9]{0,2})$`)
	placeholder       = regexp.MustCompile(`(?i)change[_-]?me|replace[_-]?me|<[^>]*>|\btodo\b|\bxxx+\b|(^|\.)example(\.(com|net|org))?$|your[_-](host|server|address|ip)`)
)

// splitAssignments takes one line apart as a shell would, and refuses what
// only a shell could resolve: this file must mean the same to both.
func splitAssignments(text string) ([]assignment, error) {
	var out []assignment
	for {
		text = strings.TrimSpace(text)
		if text == "" || text[0] == '#' {
			return out, nil
		}
		m := assignmentPattern.FindStringSubmatch(text)
		if m == nil {
			return nil, fmt.Errorf("expected KEY=VALUE, found %q", text)
		}
		text = text[len(m[0]):]
		if text != "" && text[0] != ' ' && text[0] != '\t' {
			return nil, fmt.Errorf("the value of %s goes on with %q: quote it", m[1], text)
		}
		value := m[2]
		if value != "" && (value[0] == '"' || value[0] == '\'') {
			value = value[1 : len(value)-1]
		}
		if strings.ContainsAny(value, "$`\\") {
			return nil, fmt.Errorf("%s: no variables, commands or backslashes here; write the value itself", m[1])
		}
		out = append(out, assignment{key: m[1], value: value})
	}
}

// inventoryParser collects assignments in any order; finish joins them.
type inventoryParser struct {
	inv      *inventory
	defaults ports
	rows     map[int]assignment // node rows by their number
	seen     map[string]int     // key -> line
}

func (p *inventoryParser) errorf(line int, format string, args ...any) error {
	return bus.E(bus.Invalid, "%s:%d: %w", p.inv.path, line, fmt.Errorf(format, args...))
}

func (p *inventoryParser) assign(a assignment) error {
	if before, ok := p.seen[a.key]; ok {
		return p.errorf(a.line, "%s is set already on line %d", a.key, before)
	}
	p.seen[a.key] = a.line
	if m := nodeKeyPattern.FindStringSubmatch(a.key); m != nil {
		number, _ := strconv.Atoi(m[1])
		p.rows[number] = a
		return nil
	}
	if a.value == "" || placeholder.MatchString(a.value) {
		return p.errorf(a.line, "%s=%q is a placeholder: write the real value", a.key, a.value)
	}
	switch a.key {
	case "UNIBUS_CLUSTER":
		if !wordPattern.MatchString(a.value) {
			return p.errorf(a.line, "UNIBUS_CLUSTER is letters, digits, dots and dashes, not %q", a.value)
		}
		p.inv.cluster = a.value
		return nil
	case "ROUTE_NETWORK":
		if a.value != "public" && a.value != "private" {
			return p.errorf(a.line, "ROUTE_NETWORK is public or private, not %q", a.value)
		}
		p.inv.routeNetwork = a.value
		return nil
	}
	if a.key == "API_AUTHORITIES" {
		return p.setAuthorities(a)
	}
	named := p.defaults.named()
	name, isPort := strings.CutSuffix(a.key, "_PORT")
	target := named[strings.ToLower(name)]
	if !isPort || target == nil || name != strings.ToUpper(name) {
		return p.unknownKey(a, named)
	}
	return p.setPort(a.line, a.key, a.value, target)
}

func (p *inventoryParser) unknownKey(a assignment, named map[string]*int) error {
	keys := []string{"UNIBUS_CLUSTER", "ROUTE_NETWORK", "NODE_1", "API_AUTHORITIES"}
	for name := range named {
		keys = append(keys, strings.ToUpper(name)+"_PORT")
	}
	slices.Sort(keys)
	if near := didYouMean(a.key, keys); near != "" {
		return p.errorf(a.line, "unknown key %s%s", a.key, near)
	}
	return p.errorf(a.line, "unknown key %s: expected NODE_<number> or one of %s", a.key, strings.Join(keys, ", "))
}

// setAuthorities reads the names of load balancers. Clients leave the default
// port out of what they sign, so it is left out here too.
func (p *inventoryParser) setAuthorities(a assignment) error {
	for name := range strings.SplitSeq(a.value, ",") {
		host, port, given := strings.Cut(name, ":")
		n, err := strconv.Atoi(port)
		if given && (err != nil || n < 1 || n > 65535) {
			return p.errorf(a.line, "API_AUTHORITIES: %q is not HOST or HOST:PORT", name)
		}
		if placeholder.MatchString(host) {
			return p.errorf(a.line, "API_AUTHORITIES: %q is a placeholder: write the real name", host)
		}
		if err := checkAddress(host); err != nil {
			return p.errorf(a.line, "API_AUTHORITIES: %q %w", host, err)
		}
		p.inv.apiAuthorities = append(p.inv.apiAuthorities, strings.ToLower(strings.TrimSuffix(name, ":443")))
	}
	return nil
}

func (p *inventoryParser) setPort(line int, key, value string, target *int) error {
	n, err := strconv.Atoi(value)
	if err != nil || n < 1 || n > 65535 {
		return p.errorf(line, "%s=%s is not a port (1 to 65535)", key, value)
	}
	*target = n
	return nil
}

// finish builds the nodes, now that all defaults are known, and checks what
// concerns several of them.
func (p *inventoryParser) finish() (*inventory, error) {
	for _, missing := range []struct{ key, value, such string }{
		{"UNIBUS_CLUSTER", p.inv.cluster, "UNIBUS_CLUSTER=unibus"},
		{"ROUTE_NETWORK", p.inv.routeNetwork, "ROUTE_NETWORK=private"},
	} {
		if missing.value == "" {
			return nil, bus.E(bus.Invalid, "%s: %s is missing; add a line such as %s", p.inv.path, missing.key, missing.such)
		}
	}
	if len(p.rows) == 0 {
		return nil, bus.E(bus.Invalid, `%s: there is no node; add a line such as NODE_1="n1 ssh=root@HOST public=ADDRESS private=ADDRESS"`, p.inv.path)
	}
	for _, number := range slices.Sorted(maps.Keys(p.rows)) {
		n, err := p.parseNode(p.rows[number])
		if err != nil {
			return nil, err
		}
		p.inv.nodes = append(p.inv.nodes, n)
	}
	return p.inv, p.checkCollisions()
}

// parseNode reads "name key=value ...".
func (p *inventoryParser) parseNode(row assignment) (node, error) {
	n := node{ports: p.defaults, line: row.line}
	words := strings.Fields(row.value)
	if len(words) == 0 {
		return n, p.errorf(row.line, `%s is empty; a row is "NAME ssh=USER@HOST public=ADDRESS private=ADDRESS"`, row.key)
	}
	n.name = words[0]
	if placeholder.MatchString(n.name) {
		return n, p.errorf(row.line, "node name %q is a placeholder: write the real name", n.name)
	}
	if !nodeNamePattern.MatchString(n.name) {
		return n, p.errorf(row.line, "node name %q must match %s", n.name, nodeNamePattern)
	}
	given := map[string]bool{}
	for _, word := range words[1:] {
		key, value, ok := strings.Cut(word, "=")
		if !ok {
			return n, p.errorf(row.line, "%s: expected key=value, found %q", n.name, word)
		}
		if given[key] {
			return n, p.errorf(row.line, "%s: %s is given twice", n.name, key)
		}
		given[key] = true
		if err := p.setField(&n, key, value); err != nil {
			return n, err
		}
	}
	if n.public == "" {
		return n, p.errorf(row.line, "%s: public=ADDRESS is missing", n.name)
	}
	if n.private == "" && p.inv.routeNetwork == "private" {
		return n, p.errorf(row.line, "%s: private=ADDRESS is missing, and ROUTE_NETWORK is private", n.name)
	}
	return n, nil
}

func (p *inventoryParser) setField(n *node, key, value string) error {
	if value == "" || placeholder.MatchString(value) {
		return p.errorf(n.line, "%s: %s=%s is a placeholder: write the real value", n.name, key, value)
	}
	switch key {
	case "public", "private":
		if err := checkAddress(value); err != nil {
			return p.errorf(n.line, "%s: %s=%s %w", n.name, key, value, err)
		}
		if key == "public" {
			n.public = value
		} else {
			n.private = value
		}
		return nil
	case "ssh":
		if _, host, ok := strings.Cut(value, "@"); !sshPattern.MatchString(value) || (ok && placeholder.MatchString(host)) {
			return p.errorf(n.line, "%s: ssh=%s is not [USER@]HOST", n.name, value)
		}
		n.ssh = value
		return nil
	}
	target := n.ports.named()[key]
	if target == nil {
		return p.errorf(n.line, "%s: unknown key %q: expected ssh, public, private, %s",
			n.name, key, strings.Join(slices.Sorted(maps.Keys(n.ports.named())), ", "))
	}
	return p.setPort(n.line, n.name+": "+key, value, target)
}

// checkAddress accepts an IP address or DNS name that another machine can
// connect to and that is somebody's: documentation ranges are placeholders.
func checkAddress(s string) error {
	ip, err := netip.ParseAddr(s)
	if err != nil {
		if !hostPattern.MatchString(s) || len(s) > 253 || strings.Trim(s, "0123456789.") == "" {
			return fmt.Errorf("is neither an IP address nor a DNS name")
		}
		return nil
	}
	if ip.IsUnspecified() || ip.IsMulticast() || ip.Zone() != "" {
		return fmt.Errorf("is not the address of one machine")
	}
	for _, example := range []string{"192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32"} {
		if netip.MustParsePrefix(example).Contains(ip) {
			return fmt.Errorf("is a documentation address (%s): write the real one", example)
		}
	}
	return nil
}

// checkCollisions refuses two nodes of one name, and two listeners on one
// address and port. Loopback listeners collide on one machine, which is where
// two nodes have the same innermost address.
func (p *inventoryParser) checkCollisions() error {
	names := map[string]int{}
	taken := map[string]string{} // endpoint -> "n1 nats (line 4)"
	for _, n := range p.inv.nodes {
		if before, ok := names[n.name]; ok {
			return p.errorf(n.line, "node %s is listed already on line %d", n.name, before)
		}
		names[n.name] = n.line

		machine := n.public
		if n.private != "" {
			machine = n.private
		}
		for _, name := range slices.Sorted(maps.Keys(n.ports.named())) {
			port := *n.ports.named()[name]
			addresses := []string{machine}
			if n.public != machine && (name == "nats" || name == "route" || name == "api") {
				addresses = append(addresses, n.public)
			}
			for _, address := range addresses {
				endpoint := fmt.Sprintf("port %d on %s", port, address)
				if other, ok := taken[endpoint]; ok {
					return p.errorf(n.line, "%s %s: %s is taken by %s", n.name, name, endpoint, other)
				}
				taken[endpoint] = fmt.Sprintf("%s %s (line %d)", n.name, name, n.line)
			}
		}
	}
	return nil
}
