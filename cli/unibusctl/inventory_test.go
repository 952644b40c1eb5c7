package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"unibus.internal/bus"
)

const goodInventory = `# three nodes
UNIBUS_CLUSTER=unibus
ROUTE_NETWORK=private   # routes stay inside
NATS_PORT=4300 API_PORT=8500 API_AUTHORITIES=Bus.corp.net:443,10.0.0.9:9443
NODE_2="n2 ssh=root@h2 public=198.18.0.2 private=10.0.0.2 nats=4251"
NODE_1='n1 ssh=root@h1 public=198.18.0.1 private=10.0.0.1'
NODE_10="n10 public=node10.bus.internal private=fd00::10"
`

func writeInventory(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nodes.env")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestInventory(t *testing.T) {
	inv, err := parseInventory(writeInventory(t, goodInventory))
	if err != nil {
		t.Fatal(err)
	}
	if inv.cluster != "unibus" || inv.routeNetwork != "private" || len(inv.nodes) != 3 {
		t.Fatalf("got %+v", inv)
	}
	n, err := inv.node("n2")
	if err != nil {
		t.Fatal(err)
	}
	want := node{"n2", "root@h2", "198.18.0.2", "10.0.0.2", ports{4251, 6250, 8222, 8500, 9470, 9480}, 5}
	if n != want || inv.nodes[1] != want {
		t.Errorf("got %+v, want %+v", n, want)
	}
	if got := inv.routeAddress(n); got != "10.0.0.2" {
		t.Errorf("routes of a private network run over %s", got)
	}
	if inv.nodes[2].name != "n10" {
		t.Errorf("node 10 is not after node 2: %+v", inv.nodes)
	}
	got := strings.Join(authorities(inv, n), " ")
	if want := "198.18.0.2:8500 10.0.0.2:8500 127.0.0.1:8500 localhost:8500 [::1]:8500 bus.corp.net 10.0.0.9:9443"; got != want {
		t.Errorf("authorities %s, want %s", got, want)
	}
	if _, err := inv.node("n3"); bus.CodeOf(err) != bus.NotFound {
		t.Errorf("n3: %v", err)
	}
}

func TestInventoryOnOneHost(t *testing.T) {
	text := "UNIBUS_CLUSTER=u\nROUTE_NETWORK=public\nNODE_1=\"n1 public=127.0.0.1\"\n"
	own := " nats=1 route=2 monitor=3 api=4 membership_admin=5 authcallout_admin=6"
	if _, err := parseInventory(writeInventory(t, text+`NODE_2="n2 public=127.0.0.1`+own+`"`)); err != nil {
		t.Error(err)
	}
	_, err := parseInventory(writeInventory(t, text+`NODE_2="n2 public=127.0.0.1`+strings.Replace(own, "=6", "=9480", 1)+`"`))
	if err == nil || !strings.Contains(err.Error(), ":4: ") || !strings.Contains(err.Error(), "port 9480 on 127.0.0.1") {
		t.Errorf("two listeners on one port: %v", err)
	}
}

func TestRefusedInventories(t *testing.T) {
	row := func(s string) string { return "UNIBUS_CLUSTER=u\nROUTE_NETWORK=private\nNODE_1=\"" + s + "\"\n" }
	for _, tt := range []struct{ text, want string }{
		{"", "UNIBUS_CLUSTER is missing"},
		{"UNIBUS_CLUSTER=u\nROUTE_NETWORK=private\n", "there is no node"},
		{"UNIBUS_CLUSTER=u\nNAT_PORT=1\n", ":2: unknown key NAT_PORT, did you mean NATS_PORT?"},
		{"UNIBUS_CLUSTER=u\nUNIBUS_CLUSTER=v\n", ":2: UNIBUS_CLUSTER is set already on line 1"},
		{"ROUTE_NETWORK=both\n", ":1: ROUTE_NETWORK is public or private"},
		{"\nUNIBUS_CLUSTER=CHANGE_ME\n", ":2: "},
		{"UNIBUS_CLUSTER=$NAME\n", ":1: "},
		{"UNIBUS_CLUSTER=u; reboot\n", ":1: "},
		{"UNIBUS_CLUSTER=`id`\n", ":1: "},
		{"NATS_PORT=70000\n", ":1: NATS_PORT=70000 is not a port"},
		{"API_AUTHORITIES=bus.example.com\n", ":1: "},
		{"API_AUTHORITIES=bus.corp.net:https\n", ":1: API_AUTHORITIES: "},
		{"API_AUTHORITIES=bus.corp.net,\n", ":1: API_AUTHORITIES: "},
		{row("n1 public=CHANGE_ME private=10.0.0.1"), ":3: n1: public=CHANGE_ME is a placeholder"},
		{row("n1 public=<ADDR> private=10.0.0.1"), ":3: n1: public=<ADDR> is a placeholder"},
		{row("n1 public=n1.example.com private=10.0.0.1"), ":3: n1: public=n1.example.com is a placeholder"},
		{row("n1 public=n1.example private=10.0.0.1"), ":3: "},
		{row("n1 ssh=root@n1.example.org public=198.18.0.1 private=10.0.0.1"), ":3: "},
		{row("n1 ssh=-oProxyCommand=id public=198.18.0.1 private=10.0.0.1"), ":3: n1: ssh="},
		{row("n1 public=198.18.0.1"), ":3: n1: private=ADDRESS is missing"},
		{row("n1 private=10.0.0.1"), ":3: n1: public=ADDRESS is missing"},
		{row("n1 public=0.0.0.0 private=10.0.0.1"), ":3: "},
		{row("n1 public=198.18.0.1:4250 private=10.0.0.1"), ":3: "},
		{row("n1 public=198.18.0.1 private=10.0.0.1 colour=red"), `:3: n1: unknown key "colour"`},
		{row("n1 public=198.18.0.1 private=10.0.0.1 nats=1 nats=2"), ":3: n1: nats is given twice"},
		{row("../n1 public=198.18.0.1 private=10.0.0.1"), ":3: node name"},
		{row("n1 public=198.18.0.1 private=10.0.0.1 api=4250"), ":3: "},
		{row("n1 public=198.18.0.1 private=10.0.0.1") + "NODE_2=\"n1 public=198.18.0.2 private=10.0.0.2\"\n", ":4: node n1 is listed already on line 3"},
	} {
		_, err := parseInventory(writeInventory(t, tt.text))
		if bus.CodeOf(err) != bus.Invalid || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q\n got %v\nwant %s", tt.text, err, tt.want)
		}
	}
}
