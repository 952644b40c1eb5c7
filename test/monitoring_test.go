package test

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"unibus.internal/bus"
	"unibus.internal/test/cluster"
)

// deployFile reads a file of deploy/ or docs/ of this checkout.
func repositoryFile(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", filepath.FromSlash(path)))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var (
	metricWord = regexp.MustCompile(`\bunibus_[a-z0-9_]+\b`)
	// A histogram is documented by its own name, and asked by these.
	seriesSuffix = regexp.MustCompile(`_(bucket|sum|count)$`)
)

func metricsIn(text string) []string {
	found := metricWord.FindAllString(text, -1)
	slices.Sort(found)
	return slices.Compact(found)
}

// documented are the metrics of docs/metrics.md, by the heading they stand under.
func documentedMetrics(t testing.TB) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	heading := ""
	for line := range strings.Lines(repositoryFile(t, "docs/metrics.md")) {
		if h, ok := strings.CutPrefix(line, "## "); ok {
			heading = strings.TrimSpace(h)
		}
		if cells := strings.Split(line, "|"); len(cells) > 2 {
			for _, m := range regexp.MustCompile("`(unibus_[a-z0-9_]+)`").FindAllStringSubmatch(cells[1], -1) {
				out[heading] = append(out[heading], m[1])
			}
		}
	}
	return out
}

// TestMetricsAreDocumented: every metric that a service makes has its row in
// docs/metrics.md, and every row its metric; dashboards and alerts name no other.
func TestMetricsAreDocumented(t *testing.T) {
	var made []string
	literal := regexp.MustCompile(`"(unibus_[a-z0-9_]+)"`)
	for _, dir := range []string{"../services", "../bus"} {
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			b, err := os.ReadFile(path)
			for _, m := range literal.FindAllStringSubmatch(string(b), -1) {
				made = append(made, m[1])
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(made)
	made = slices.Compact(made)
	var rows []string
	for _, names := range documentedMetrics(t) {
		rows = append(rows, names...)
	}
	slices.Sort(rows)
	if twice := len(rows) - len(slices.Compact(slices.Clone(rows))); twice != 0 {
		t.Errorf("%d metrics stand twice in docs/metrics.md", twice)
	}
	for _, name := range made {
		if !slices.Contains(rows, name) {
			t.Errorf("%s has no row in docs/metrics.md", name)
		}
	}
	for _, name := range rows {
		if !slices.Contains(made, name) {
			t.Errorf("docs/metrics.md has %s, which nothing makes", name)
		}
	}
	for file, text := range monitoringFiles(t) {
		for _, name := range metricsIn(text) {
			if !slices.Contains(rows, name) && !slices.Contains(rows, seriesSuffix.ReplaceAllString(name, "")) {
				t.Errorf("%s asks for %s, which nothing makes", file, name)
			}
		}
	}
}

// monitoringFiles are the rules and dashboards.
func monitoringFiles(t testing.TB) map[string]string {
	t.Helper()
	out := map[string]string{"unibus.rules.yml": repositoryFile(t, "deploy/monitoring/unibus.rules.yml")}
	boards, err := filepath.Glob("../deploy/monitoring/grafana/*.json")
	if err != nil || len(boards) < 3 {
		t.Fatalf("%d dashboards: %v", len(boards), err)
	}
	for _, path := range boards {
		out["grafana/"+filepath.Base(path)] = repositoryFile(t, "deploy/monitoring/grafana/"+filepath.Base(path))
	}
	return out
}

// dashboardExpressions are what the panels of all dashboards ask, by where they stand.
func dashboardExpressions(t testing.TB) map[string]string {
	t.Helper()
	out := map[string]string{}
	for file, text := range monitoringFiles(t) {
		if !strings.HasSuffix(file, ".json") {
			continue
		}
		var board dashboard
		if err := json.Unmarshal([]byte(text), &board); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, p := range board.Panels {
			for n, target := range p.Targets {
				out[fmt.Sprintf("%s: %s, %d", file, p.Title, n+1)] = target.Expr
			}
		}
	}
	return out
}

// dashboard is one, as far as tests look at it.
type dashboard struct {
	UID, Title string
	Panels     []struct {
		ID      int
		Title   string
		Targets []struct{ Expr string }
	}
}

// TestDashboards: every panel of every dashboard asks for something, of the
// cluster that was chosen.
func TestDashboards(t *testing.T) {
	uids := map[string]bool{}
	for file, text := range monitoringFiles(t) {
		if !strings.HasSuffix(file, ".json") {
			continue
		}
		var board dashboard
		if err := json.Unmarshal([]byte(text), &board); err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		if board.UID == "" || board.Title == "" || uids[board.UID] || len(board.Panels) == 0 {
			t.Errorf("%s: uid %q, title %q, %d panels", file, board.UID, board.Title, len(board.Panels))
		}
		uids[board.UID] = true
		for _, p := range board.Panels {
			if len(p.Targets) == 0 || p.Title == "" {
				t.Errorf("%s: panel %d %q asks for nothing", file, p.ID, p.Title)
			}
			for _, target := range p.Targets {
				if !strings.Contains(target.Expr, `cluster="$cluster"`) || len(metricsIn(target.Expr)) == 0 {
					t.Errorf("%s: %q asks for %q", file, p.Title, target.Expr)
				}
			}
		}
	}
}

// alertRule is one alert of unibus.rules.yml, as far as tests look at it.
type alertRule struct{ name, severity, summary, runbook string }

func alertRules(t testing.TB) (rules []alertRule) {
	t.Helper()
	for line := range strings.Lines(repositoryFile(t, "deploy/monitoring/unibus.rules.yml")) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), ": ")
		if key == "- alert" {
			rules = append(rules, alertRule{name: value})
		}
		if !ok || len(rules) == 0 {
			continue
		}
		switch r := &rules[len(rules)-1]; key {
		case "severity":
			r.severity = value
		case "summary":
			r.summary = value
		case "runbook_url":
			r.runbook = value
		}
	}
	return rules
}

// TestAlertRules: every alert says how bad it is, what is wrong and where the
// runbook is, at a heading that exists; promtool sees it fire and not fire; and
// TestAlerts inflicts its fault on a live cluster.
func TestAlertRules(t *testing.T) {
	var headings []string
	for line := range strings.Lines(repositoryFile(t, "docs/operations.md")) {
		if strings.HasPrefix(line, "#") {
			h := strings.ToLower(strings.TrimSpace(strings.TrimLeft(line, "#")))
			h = regexp.MustCompile("[^a-z0-9 _-]").ReplaceAllString(h, "")
			headings = append(headings, "docs/operations.md#"+strings.ReplaceAll(h, " ", "-"))
		}
	}
	tests := repositoryFile(t, "deploy/monitoring/unibus.rules.test.yml")
	var live []string
	for _, f := range alertFaults() {
		live = append(live, f.all()...)
	}
	seen := map[string]bool{}
	for _, r := range alertRules(t) {
		for _, c := range []struct {
			wrong bool
			what  string
		}{
			{seen[r.name], "is there twice"},
			{r.severity != "critical" && r.severity != "warning", "has the severity " + r.severity},
			{r.summary == "", "says nothing"},
			{!slices.Contains(headings, r.runbook), "names no heading: " + r.runbook},
			{!regexp.MustCompile(`alertname: ` + r.name + `\n +exp_alerts:\n`).MatchString(tests), "is not seen to fire by promtool"},
			{!strings.Contains(tests, "alertname: "+r.name+", exp_alerts: []"), "is not seen to be silent by promtool"},
			{!slices.Contains(live, r.name), "is not seen to fire on a live cluster"},
		} {
			if c.wrong {
				t.Errorf("%s %s", r.name, c.what)
			}
		}
		seen[r.name] = true
	}
	for _, name := range live {
		if !seen[name] {
			t.Errorf("there is no alert %s", name)
		}
	}
}

// program finds a program that is not ours: where make puts it, else in PATH.
func program(t testing.TB, name, debian string) string {
	t.Helper()
	if path, err := filepath.Abs(filepath.Join("..", "bin", "tools", name)); err == nil {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("there is no %s (make tools, or Debian: apt-get install %s)", name, debian)
	}
	return path
}

// start runs a program that is not ours until the test ends, without a wrapper,
// and shows what it said if the test fails.
func start(t testing.TB, path string, args ...string) {
	t.Helper()
	logFile := filepath.Join(t.TempDir(), filepath.Base(path)+".log")
	log, err := os.Create(logFile)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = log.Close()
		if t.Failed() {
			t.Logf("--- %s ---\n%s", filepath.Base(path), cluster.Tail(logFile, 40))
		}
	})
}

// exposition is what one service of node i shows.
func (m *monitored) exposition(t testing.TB, i int, s cluster.Service) string {
	t.Helper()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: m.From(i).DialContext, DisableKeepAlives: true}}
	resp, err := client.Get(m.AdminURL(i, s) + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("metrics of %s of n%d: %d %v", s, i, resp.StatusCode, err)
	}
	return string(body)
}

// shown are the names of the metrics in an exposition.
func shown(exposition string) (names []string) {
	for line := range strings.Lines(exposition) {
		if f := strings.Fields(line); len(f) == 4 && f[0] == "#" && f[1] == "TYPE" {
			names = append(names, f[2])
		}
	}
	return names
}

// TestMonitoring looks at a running cluster as a Prometheus and a load balancer do.
func TestMonitoring(t *testing.T) {
	t.Parallel()
	m := newMonitored(t, cluster.Options{Edit: behindBalancer, Env: map[cluster.Service]map[string]string{
		// The limits have tests of their own. A node that stops says so for as long as rendered.
		cluster.Membership: {"UNIBUS_RATE_KEY": "100000:100000", "UNIBUS_RATE_ADDRESS": "100000:100000", "UNIBUS_DRAIN_DELAY": "15s"},
	}})
	t.Run("metrics", func(t *testing.T) { m.in(t).metricsAreThere(t) })
	t.Run("a dead server", func(t *testing.T) { m.in(t).deadServer(t) })
	t.Run("prometheus", func(t *testing.T) { m.in(t).watched(t) })
	t.Run("haproxy", func(t *testing.T) { m.in(t).drains(t) })
}

// monitored is a cluster with somebody who is connected.
type monitored struct {
	*world
	room string
}

func newMonitored(t *testing.T, o cluster.Options) *monitored {
	t.Helper()
	m := &monitored{world: newWorld(t, o), room: "ops"}
	m.api(1, m.admin).want(t, http.StatusCreated, "POST", "/v1/rooms", dict{"room": m.room})
	return m
}

// newcomer adds a user, also while the cluster still recovers: a write that was
// not confirmed may have landed.
func (m *monitored) newcomer(name string) *person {
	m.t.Helper()
	p := newPerson(m.t, name)
	cluster.WaitFor(m.t, 30*time.Second, name+" to be added", func() error {
		_, err := m.store.AddUser(m.t.Context(), p.key, bus.Handle(name), bus.Member)
		if bus.CodeOf(err) == bus.Conflict {
			return nil
		}
		return err
	})
	return p
}

// metricsAreThere: after some use each service shows exactly the metrics that
// docs/metrics.md lists for it, as promtool would have them, and none names
// anybody.
func (m *monitored) metricsAreThere(t *testing.T) {
	promtool := ""
	if _, err := os.Stat("../bin/tools/promtool"); err == nil {
		promtool = program(t, "promtool", "prometheus")
	}
	someone := m.newcomer("someone")
	m.waitAdmits(someone, m.Nodes()...)
	rows := documentedMetrics(t)
	for _, i := range m.Nodes() {
		m.api(i, someone).want(t, http.StatusOK, "GET", "/v1/me", nil)
		for _, s := range []cluster.Service{cluster.Membership, cluster.Authcallout} {
			want := slices.Concat(rows["Both services"], rows["unibus-"+string(s)])
			text := m.exposition(t, i, s)
			got := shown(text)
			slices.Sort(want)
			slices.Sort(got)
			for _, name := range want {
				if !slices.Contains(got, name) {
					t.Errorf("%s of n%d does not show %s", s, i, name)
				}
			}
			for _, name := range got {
				if !slices.Contains(want, name) {
					t.Errorf("%s of n%d shows %s, which docs/metrics.md does not list for it", s, i, name)
				}
			}
			for _, secret := range []string{someone.key.NKey(), someone.key.String(), "someone", "127.0.0.1"} {
				if strings.Contains(text, secret) {
					t.Errorf("%s of n%d shows %q", s, i, secret)
				}
			}
			if promtool == "" {
				continue
			}
			cmd := exec.CommandContext(t.Context(), promtool, "check", "metrics")
			cmd.Stdin = strings.NewReader(text)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("promtool about %s of n%d: %v\n%s", s, i, err, out)
			}
		}
	}
	if n := m.metricOf(cluster.Membership, "unibus_nats_meta_leader"); n != 1 {
		t.Errorf("%v nodes lead JetStream", n)
	}
	for name, want := range map[string]float64{
		"unibus_nats_up": 3, "unibus_nats_healthy": 3, "unibus_nats_routes": 6, "unibus_nats_routes_wanted": 6, "unibus_nats_meta_leader_known": 3,
		`unibus_rooms{durable="false",encrypted="false",status="active"}`: 3,
	} {
		if got := m.metricOf(cluster.Membership, name); got != want {
			t.Errorf("%s adds up to %v, want %v", name, got, want)
		}
	}
}

// loopbackOnly: metrics, profiles and the monitor listener are reached from the
// machine of the node, and from no other. Only with Networks.
func (w *world) loopbackOnly(t *testing.T) {
	for _, i := range w.Nodes() {
		other := i%3 + 1
		for what, port := range map[string]int{
			"monitor listener": w.Ports[i-1].Monitor, "metrics of membership": w.Ports[i-1].MembershipAdmin, "metrics of authcallout": w.Ports[i-1].AuthcalloutAdmin,
		} {
			if c, err := w.From(i).Dial("tcp", cluster.Loopback(port)); err != nil {
				t.Errorf("%s of n%d, from n%d: %v", what, i, i, err)
			} else {
				_ = c.Close()
			}
			for _, from := range []int{i, other} { // by the address it is not there even for itself
				if c, err := w.From(from).Dial("tcp", net.JoinHostPort(w.Host(i), strconv.Itoa(port))); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("%s of n%d, from n%d: %v, %v", what, i, from, c, err)
				}
			}
		}
		if c, err := w.From(other).Dial("tcp", net.JoinHostPort(w.Host(i), strconv.Itoa(w.Ports[i-1].API))); err != nil { // the control
			t.Errorf("API of n%d, from n%d: %v", i, other, err)
		} else {
			_ = c.Close()
		}
	}
}

// deadServer: a scrape of a node whose server hangs or is dead is answered, in
// time, and says so.
func (m *monitored) deadServer(t *testing.T) {
	up := func(want string) {
		t.Helper()
		began := time.Now()
		text := m.exposition(t, 3, cluster.Membership)
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("a scrape took %s", took)
		}
		if !strings.Contains(text, "\nunibus_nats_up "+want+"\n") || !strings.Contains(text, "\nunibus_nats_healthy "+want+"\n") {
			t.Errorf("unibus_nats_up and unibus_nats_healthy are not %s", want)
		}
		if there := slices.Contains(shown(text), "unibus_nats_connections"); there != (want == "1") {
			t.Errorf("unibus_nats_connections is there: %t", there)
		}
	}
	up("1")
	m.Pause(3, cluster.NATS)
	up("0")
	m.Resume(3, cluster.NATS)
	m.Kill(3, cluster.NATS)
	up("0")
	m.StartNode(3, cluster.NATS)
	m.WaitHealthy(time.Minute)
	up("1")
}

// watched: a real Prometheus gets an answer to everything that the dashboards
// ask, and raises and ends the alerts of a node whose server is dead. The other
// faults take minutes: TestAlerts.
func (m *monitored) watched(t *testing.T) {
	p := m.prometheus(t)
	cluster.WaitFor(t, time.Minute, "all targets to be scraped", func() error { return p.targetsUp(6) })
	for where, expr := range dashboardExpressions(t) {
		expr = strings.ReplaceAll(expr, "$cluster", "unibus")
		cluster.WaitFor(t, 20*time.Second, where, func() error { // a rate takes two scrapes
			n, err := p.query(expr)
			if err == nil && n == 0 && !strings.HasSuffix(expr, " > 0") {
				err = fmt.Errorf("nothing answers %s", expr)
			}
			return err
		})
	}
	cluster.WaitFor(t, 20*time.Second, "no alert while nothing is wrong", func() error { return p.silent() })
	alerts := []string{"UnibusNATSDown", "UnibusRouteMissing", "UnibusReplicaBehind"}
	m.Kill(3, cluster.NATS)
	for _, name := range alerts {
		cluster.WaitFor(t, time.Minute, name, func() error { return p.fires(name) })
	}
	m.StartNode(3, cluster.NATS)
	m.WaitHealthy(time.Minute)
	for _, name := range alerts {
		cluster.WaitFor(t, time.Minute, name+" to end", func() error { return p.ended(name) })
	}
}

// forward listens on loopback for what listens on that of node i, until the
// test ends: a node may be on a network of its own.
func (m *monitored) forward(t testing.TB, i int, to string) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = in.Close() }()
				out, err := m.From(i).Dial("tcp", strings.TrimPrefix(to, "http://"))
				if err != nil {
					return
				}
				defer func() { _ = out.Close() }()
				go func() { _, _ = io.Copy(out, in) }()
				_, _ = io.Copy(in, out)
			}()
		}
	}()
	return ln.Addr().String()
}

// prometheus is a running one with the rules of deploy/monitoring.
type prometheus struct {
	url     string
	targets string // file
	groups  []scrapeGroup
}

type scrapeGroup struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

func (m *monitored) prometheus(t *testing.T) *prometheus {
	t.Helper()
	path := program(t, "prometheus", "prometheus")
	dir := t.TempDir()
	p := &prometheus{
		url:     "http://" + cluster.Loopback(cluster.ReservePorts(t)),
		targets: filepath.Join(dir, "targets.json"),
	}
	for _, i := range m.Nodes() {
		for _, s := range []cluster.Service{cluster.Membership, cluster.Authcallout} {
			p.groups = append(p.groups, scrapeGroup{
				[]string{m.forward(t, i, m.AdminURL(i, s))},
				map[string]string{"job": "unibus-" + string(s), "cluster": "unibus", "node": m.Node(i)},
			})
		}
	}
	p.scrape(t, p.groups)
	// Patience is what is shortened, and nothing else.
	rules := regexp.MustCompile(`(?m)^(\s+for:) .*$`).ReplaceAllString(repositoryFile(t, "deploy/monitoring/unibus.rules.yml"), "$1 2s")
	config := fmt.Sprintf("global: {scrape_interval: 2s, scrape_timeout: 2s, evaluation_interval: 1s}\nrule_files: [rules.yml]\n"+
		"scrape_configs:\n  - job_name: unibus\n    file_sd_configs:\n      - {files: [%q], refresh_interval: 1s}\n", p.targets)
	for name, text := range map[string]string{"rules.yml": rules, "prometheus.yml": config} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	start(t, path, "--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+strings.TrimPrefix(p.url, "http://"), "--log.level=warn")
	return p
}

// scrape tells which targets there are from now on.
func (p *prometheus) scrape(t testing.TB, groups []scrapeGroup) {
	t.Helper()
	text, err := json.Marshal(groups)
	if err != nil {
		t.Fatal(err)
	}
	if err := cluster.WriteFile(p.targets, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (p *prometheus) get(path string, into any) error {
	client := &http.Client{Timeout: 5 * time.Second}
	resp, err := client.Get(p.url + path)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %d", path, resp.StatusCode)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

func (p *prometheus) targetsUp(want int) error {
	var answer struct {
		Data struct {
			Active []struct{ Health, LastError string } `json:"activeTargets"`
		}
	}
	if err := p.get("/api/v1/targets", &answer); err != nil {
		return err
	}
	up := 0
	for _, target := range answer.Data.Active {
		if target.Health == "up" {
			up++
		}
	}
	if up != want {
		return fmt.Errorf("%d of %d targets are up", up, want)
	}
	return nil
}

// query evaluates an expression and counts the series of its answer.
func (p *prometheus) query(expr string) (series int, err error) {
	var answer struct {
		Data struct{ Result []json.RawMessage }
	}
	err = p.get("/api/v1/query?query="+url.QueryEscape(expr), &answer)
	return len(answer.Data.Result), err
}

// firing are the alerts that fire: name, and where.
func (p *prometheus) firing() (map[string][]string, error) {
	var answer struct {
		Data struct {
			Alerts []struct {
				State       string
				Labels      map[string]string
				Annotations map[string]string
			}
		}
	}
	if err := p.get("/api/v1/alerts", &answer); err != nil {
		return nil, err
	}
	out := map[string][]string{}
	for _, a := range answer.Data.Alerts {
		if a.State == "firing" {
			out[a.Labels["alertname"]] = append(out[a.Labels["alertname"]], a.Annotations["summary"])
		}
	}
	return out, nil
}

func (p *prometheus) fires(name string) error {
	firing, err := p.firing()
	if err == nil && len(firing[name]) == 0 {
		err = fmt.Errorf("firing are %v", slices.Sorted(maps.Keys(firing)))
	}
	return err
}

func (p *prometheus) ended(name string) error {
	firing, err := p.firing()
	if err == nil && len(firing[name]) > 0 {
		err = errors.New(strings.Join(firing[name], "; "))
	}
	return err
}

func (p *prometheus) silent() error {
	firing, err := p.firing()
	if err == nil && len(firing) > 0 {
		err = fmt.Errorf("%v", firing)
	}
	return err
}

// drains sends requests through a HAProxy with the configuration of
// deploy/haproxy while a node is stopped and started: none fails, and before the
// node stops answering the proxy has turned away from it.
func (m *monitored) drains(t *testing.T) {
	path := program(t, "haproxy", "haproxy")
	port := freePort(t)
	dir := t.TempDir()
	pair := filepath.Join(dir, "unibus.pem")
	var text []byte
	for _, name := range []string{"api.crt", "api.key"} { // as any certificate that clients of the proxy trust
		b, err := os.ReadFile(filepath.Join(m.Etc(1), "tls", name))
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, b...)
	}
	if err := os.WriteFile(pair, text, 0o600); err != nil {
		t.Fatal(err)
	}
	config := repositoryFile(t, "deploy/haproxy/haproxy.cfg")
	socket := filepath.Join(dir, "stats")
	for from, to := range map[string]string{
		"bind :443": "bind " + cluster.Loopback(port), "/etc/haproxy/unibus.pem": pair, "/etc/unibus/tls/client-ca.crt": m.CA(),
		"192.0.2.1:8470": strings.TrimPrefix(m.APIURL(1), "https://"), "192.0.2.2:8470": strings.TrimPrefix(m.APIURL(2), "https://"),
		"192.0.2.3:8470": strings.TrimPrefix(m.APIURL(3), "https://"), "\nglobal\n": "\nglobal\n  stats socket " + socket + "\n",
	} {
		if !strings.Contains(config, from) {
			t.Fatalf("deploy/haproxy has no %q", from)
		}
		config = strings.ReplaceAll(config, from, to)
	}
	file := filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), path, "-c", "-f", file).CombinedOutput(); err != nil || bytes.Contains(out, []byte("WARNING")) {
		t.Fatalf("haproxy -c: %v\n%s", err, out)
	}
	start(t, path, "-f", file, "-db")
	through := func(p *person) *apiClient {
		c := m.api(1, p)
		c.url = "https://" + cluster.Loopback(port)
		return c
	}
	cluster.WaitFor(t, 10*time.Second, "haproxy to answer", func() error {
		resp, err := through(m.admin).send(t.Context(), apiRequest{method: "GET", path: "/v1/me", host: balancer})
		if err == nil && resp.status != http.StatusOK {
			err = errors.New(resp.String())
		}
		return err
	})

	ctx, stop := context.WithCancel(t.Context())
	var users sync.WaitGroup
	var done, failed atomic.Int64
	ask := func(c *apiClient, method, path string, body []byte) {
		// Begun is finished: the end of the test fails no request.
		resp, err := c.send(context.WithoutCancel(ctx), apiRequest{method: method, path: path, host: balancer, body: body})
		if err == nil && resp.status/100 != 2 {
			err = errors.New(resp.String())
		}
		if done.Add(1); err != nil && failed.Add(1) <= 5 {
			t.Errorf("%s %s: %v", method, path, err)
		}
	}
	guest := m.newcomer("guest")
	for range 4 {
		users.Go(func() {
			for ctx.Err() == nil {
				ask(through(m.admin), "GET", "/v1/rooms/"+m.room, nil)
			}
		})
	}
	users.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			role := []string{"reader", "writer"}[n%2]
			ask(through(m.admin), "PUT", "/v1/rooms/"+m.room+"/members/"+guest.key.NKey(), []byte(`{"role":"`+role+`"}`))
		}
	})
	began := time.Now()
	hold(ctx, time.Second)
	if err := syscall.Kill(m.PID(2, cluster.Membership), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	cluster.WaitFor(t, 14*time.Second, "haproxy to turn away from the node that stops", func() error {
		state, err := haproxyState(socket, "n2")
		if err == nil && state != "DOWN" {
			err = errors.New(state)
		}
		return err
	})
	if !m.Alive(2, cluster.Membership) {
		t.Error("the node stopped before haproxy had turned away")
	}
	cluster.WaitFor(t, 30*time.Second, "the node to stop", func() error {
		if m.Alive(2, cluster.Membership) {
			return errors.New("it runs")
		}
		return nil
	})
	hold(ctx, time.Second)
	m.StartNode(2, cluster.Membership)
	m.WaitHealthy(time.Minute)
	cluster.WaitFor(t, 15*time.Second, "haproxy to take it back", func() error {
		state, err := haproxyState(socket, "n2")
		if err == nil && state != "UP" {
			err = errors.New(state)
		}
		return err
	})
	hold(ctx, time.Second)
	stop()
	users.Wait()
	t.Logf("%d requests in %s, %d failed", done.Load(), time.Since(began).Round(time.Second), failed.Load())
	if done.Load() < 200 {
		t.Error("too few requests to show anything")
	}
}

// haproxyState is what the proxy thinks of a server of backend nodes.
func haproxyState(socket, server string) (string, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "show stat\n"); err != nil {
		return "", err
	}
	rows, err := csv.NewReader(c).ReadAll()
	if err != nil {
		return "", err
	}
	column := slices.Index(rows[0], "status")
	for _, row := range rows {
		if row[0] == "nodes" && row[1] == server {
			state, _, _ := strings.Cut(row[column], " ")
			return state, nil
		}
	}
	return "", fmt.Errorf("haproxy knows no %s", server)
}
