package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

func (a *app) clusterCommand() *cli.Command {
	return &cli.Command{
		Name:     "cluster",
		Category: "cluster",
		Usage:    "how the nodes are",
		Subcommands: []*cli.Command{
			{
				Name:  "status",
				Usage: "every node's health and, with --direct, every stream's replicas",
				Description: "Ends with 0 when every node may serve, else 3.\n\n" +
					"   unibusctl cluster status --json",
				Action: a.clusterStatus,
			},
			{
				Name:  "check",
				Usage: "one line and an exit code for a monitoring system",
				Description: "0 OK; 1 WARNING, a node or a replica is missing; 2 CRITICAL, no quorum or a wrong stream;\n" +
					"3 UNKNOWN, nothing answered. With --direct it also writes to every stream.\n\n" +
					"   unibusctl cluster check",
				Action: a.clusterCheck,
			},
			{
				Name:  "wait",
				Usage: "wait until every node may serve",
				Description: "Ends with 3 when --timeout (120s) passes first.\n\n" +
					"   unibusctl cluster wait --timeout 60s",
				Flags:  []cli.Flag{&cli.IntFlag{Name: "nodes", Usage: "how many nodes are enough; default: all"}},
				Action: a.clusterWait,
			},
			a.clusterReloadCommand(),
			a.clusterForgetCommand(),
			a.clusterReplicasCommand(),
			a.clusterRepairCommand(),
			a.clusterGateCommand(),
			a.clusterRolloutCommand(),
		},
	}
}

// nodeHealth is one node's own answer at /healthz.
type nodeHealth struct {
	URL      string `json:"url"`
	Node     string `json:"node"`
	Status   string `json:"status"`
	Error    string `json:"error"`
	Version  string `json:"version"`
	Replicas int    `json:"replicas"`
	Enforce  bool   `json:"enforce"`
	ACL      bool   `json:"acl"`
	TLS      bool   `json:"tls"`
	Cluster  bool   `json:"cluster"`
	Ready    bool   `json:"ready"`
	Reached  bool   `json:"reached"`
}

const healthTimeout = 2 * time.Second

// askHealth asks every node at once, in the order of --api-url.
func (a *app) askHealth(ctx context.Context) ([]nodeHealth, error) {
	if a.set.ca == "" {
		return nil, &usageError{msg: "the CA is not known: set --ca FILE or UNIBUS_CA", hint: "unibusctl env"}
	}
	trust, err := kv.Trust(a.set.ca)
	if err != nil {
		return nil, err
	}
	client := &http.Client{
		Timeout:       healthTimeout,
		Transport:     &http.Transport{TLSClientConfig: trust, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	urls := strings.Split(a.set.apiURL, ",")
	out := make([]nodeHealth, len(urls))
	done := make(chan struct{}, len(urls))
	for i, u := range urls {
		go func() {
			out[i] = oneHealth(ctx, client, strings.TrimRight(strings.TrimSpace(u), "/"))
			done <- struct{}{}
		}()
	}
	for range urls {
		<-done
	}
	return out, nil
}

func oneHealth(ctx context.Context, client *http.Client, url string) nodeHealth {
	h := nodeHealth{URL: url, Status: "unreachable"}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/healthz", nil)
	if err != nil {
		h.Error = err.Error()
		return h
	}
	resp, err := client.Do(req)
	if err != nil {
		h.Error = err.Error()
		return h
	}
	defer func() { _ = resp.Body.Close() }()
	if err := json.NewDecoder(http.MaxBytesReader(nil, resp.Body, 64<<10)).Decode(&h); err != nil {
		h.Error = "the answer is not that of a membership service: " + err.Error()
		return h
	}
	h.URL, h.Reached, h.Ready = url, true, resp.StatusCode == http.StatusOK
	return h
}

// streamView is one stream's report.
type streamView struct {
	kv.StreamHealth
	Error string `json:"error"`
}

func (a *app) clusterStatus(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	nodes, err := a.askHealth(c.Context)
	if err != nil {
		return err
	}
	streams := []streamView{}
	if a.set.direct {
		if streams, err = a.askStreams(c.Context); err != nil {
			a.say("WARNING: streams: %v", err)
		}
	}
	v := map[string]any{"nodes": nodes, "streams": streams}
	err = a.print(v, func(t table.Writer) {
		t.AppendHeader(table.Row{"node", "status", "version", "url", "why"})
		for _, n := range nodes {
			t.AppendRow(table.Row{n.Node, n.Status, n.Version, n.URL, n.Error})
		}
	})
	if err != nil {
		return err
	}
	if !a.set.json && len(streams) > 0 {
		err = a.print(nil, func(t table.Writer) {
			t.AppendHeader(table.Row{"stream", "leader", "replicas", "followers current", "messages", "why"})
			for _, s := range streams {
				t.AppendRow(table.Row{s.Stream, s.Leader, s.Replicas, fmt.Sprintf("%d/%d", s.FollowersCurrent, kv.Replicas-1), s.Messages, s.Error})
			}
		})
	}
	if ready := countReady(nodes); err == nil && ready < len(nodes) {
		return bus.E(bus.Unavailable, "%d of %d nodes may serve", ready, len(nodes)).WithHint("unibusctl cluster wait")
	}
	return err
}

func countReady(nodes []nodeHealth) (ready int) {
	for _, n := range nodes {
		if n.Ready {
			ready++
		}
	}
	return ready
}

// askStreams reads every stream's report as ops.
func (a *app) askStreams(ctx context.Context) ([]streamView, error) {
	if a.set.opsSeed == "" {
		return nil, &usageError{msg: "--direct needs the ops seed: set --ops-seed FILE or UNIBUS_OPS_SEED", hint: "unibusctl env"}
	}
	dctx, cancel := context.WithTimeout(ctx, decideWithin)
	defer cancel()
	nc, err := a.dialFirst(dctx, a.set.opsSeed, "_INBOX_ops")
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	out := []streamView{}
	for _, h := range kv.Health(dctx, nc) {
		v := streamView{StreamHealth: h}
		if h.Err != nil {
			v.Error = h.Err.Error()
			if e := new(bus.Error); errors.As(h.Err, &e) && e.Hint != "" {
				v.Error += "; fix: " + e.Hint
			}
		}
		out = append(out, v)
	}
	return out, nil
}

func (a *app) clusterCheck(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	nodes, err := a.askHealth(c.Context)
	if err != nil {
		return &checkResult{code: 3, line: "UNKNOWN: " + err.Error()}
	}
	var streams []streamView
	writes := map[string]error{}
	if a.set.direct {
		if streams, err = a.askStreams(c.Context); err != nil {
			return &checkResult{code: 2, line: "CRITICAL: " + err.Error()}
		}
		writes = a.probeWrites(c.Context)
	}
	code, line := judge(nodes, streams, writes)
	if a.set.json {
		if err := a.print(map[string]any{"code": code, "line": line, "nodes": nodes, "streams": streams}, nil); err != nil {
			return err
		}
	}
	if code == 0 && !a.set.json {
		fmt.Fprintln(a.out, line)
		return nil
	}
	if code == 0 {
		return nil
	}
	return &checkResult{code: code, line: line}
}

// probeWrites writes to every stream: a leader and current followers do not
// prove that a stream takes writes.
func (a *app) probeWrites(ctx context.Context) map[string]error {
	nc, err := a.dialFirst(ctx, a.set.opsSeed, "_INBOX_ops")
	if err != nil {
		return map[string]error{"connection": err}
	}
	defer nc.Close()
	return kv.Probe(ctx, nc)
}

// judge turns what was measured into a Nagios code and its line. It is pure.
func judge(nodes []nodeHealth, streams []streamView, writes map[string]error) (int, string) {
	ready, reached := countReady(nodes), 0
	var down []string
	for _, n := range nodes {
		if n.Reached {
			reached++
		}
		if !n.Ready {
			name := n.Node
			if name == "" {
				name = n.URL
			}
			down = append(down, name+": "+n.Error)
		}
	}
	switch {
	case reached == 0:
		return 3, "UNKNOWN: no node answers: " + strings.Join(down, "; ")
	case ready == 0:
		return 2, "CRITICAL: no node may serve: " + strings.Join(down, "; ")
	}
	for _, s := range streams {
		if s.Error != "" {
			return 2, "CRITICAL: " + s.Error
		}
	}
	for stream, err := range writes {
		return 2, fmt.Sprintf("CRITICAL: stream %s takes no write: %v", stream, err)
	}
	if ready < len(nodes) {
		return 1, fmt.Sprintf("WARNING: %d of %d nodes may serve: %s", ready, len(nodes), strings.Join(down, "; "))
	}
	for _, s := range streams {
		if s.FollowersCurrent < kv.Replicas-1 || s.Leader == "" {
			return 1, fmt.Sprintf("WARNING: stream %s: leader=%s followers_current=%d/%d", s.Stream, s.Leader, s.FollowersCurrent, kv.Replicas-1)
		}
	}
	return 0, fmt.Sprintf("OK: %d of %d nodes may serve", ready, len(nodes))
}

func (a *app) clusterWait(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	ctx, cancel := a.within(c.Context, 120*time.Second)
	defer cancel()
	said := ""
	for {
		nodes, err := a.askHealth(ctx)
		if err != nil {
			return err
		}
		want := c.Int("nodes")
		if want <= 0 || want > len(nodes) {
			want = len(nodes)
		}
		_, line := judge(nodes, nil, nil)
		if countReady(nodes) >= want {
			fmt.Fprintln(a.out, line)
			return nil
		}
		if line != said {
			said = line
			a.say("waiting: %s", line)
		}
		select {
		case <-ctx.Done():
			if c.Err() != nil {
				return c.Err()
			}
			return bus.E(bus.Unavailable, "not ready in time: %s", said).WithHint("unibusctl cluster status")
		case <-time.After(500 * time.Millisecond):
		}
	}
}
