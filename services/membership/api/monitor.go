package api

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// A scrape waits this long for a server that hangs, and then says so.
	monitorPatience = time.Second
	maxMonitorBody  = 4 << 20
)

// Monitor shows what the own nats-server tells on its monitor listener as
// metrics: nats-server has none. It asks at every scrape and keeps nothing, so
// that no figure is older than its scrape; what a server does not answer is
// left out, and unibus_nats_up says 0.
type Monitor struct {
	base   string
	client *http.Client
}

// NewMonitor prepares a Monitor of http://HOST:PORT. What is read there is
// believed: the caller sees to it that it is on loopback.
func NewMonitor(base string) (*Monitor, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		return nil, fmt.Errorf("monitor URL %q is not http://HOST:PORT", base)
	}
	return &Monitor{
		base: "http://" + u.Host,
		client: &http.Client{
			Timeout:       monitorPatience,
			Transport:     &http.Transport{MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute}, // no proxy of the environment
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Address is the HOST:PORT that is asked.
func (m *Monitor) Address() string { return strings.TrimPrefix(m.base, "http://") }

// Collector exposes it.
func (m *Monitor) Collector() prometheus.Collector { return monitorCollector{m} }

type monitorCollector struct{ m *Monitor }

var (
	descNATSUp       = prometheus.NewDesc("unibus_nats_up", "1 if the own nats-server answers on its monitor listener.", nil, nil)
	descNATSInfo     = prometheus.NewDesc("unibus_nats_info", "The running nats-server.", []string{"version"}, nil)
	descNATSHealthy  = prometheus.NewDesc("unibus_nats_healthy", "1 if the own nats-server says that it has caught up with the cluster.", nil, nil)
	descNATSStart    = prometheus.NewDesc("unibus_nats_start_timestamp_seconds", "When the own nats-server started.", nil, nil)
	descNATSConfig   = prometheus.NewDesc("unibus_nats_config_load_timestamp_seconds", "When the own nats-server last took its configuration over.", nil, nil)
	descNATSConns    = prometheus.NewDesc("unibus_nats_connections", "Connections of clients, services included, on the own nats-server.", nil, nil)
	descNATSAccepted = prometheus.NewDesc("unibus_nats_connections_accepted_total", "Connections that the own nats-server has taken, refused ones included.", nil, nil)
	descNATSSubs     = prometheus.NewDesc("unibus_nats_subscriptions", "Subscriptions that the own nats-server knows.", nil, nil)
	descNATSRoutes   = prometheus.NewDesc("unibus_nats_routes", "Other servers that the own nats-server has routes to.", nil, nil)
	descNATSPeers    = prometheus.NewDesc("unibus_nats_routes_wanted", "Other servers that JetStream of the own nats-server counts as its cluster.", nil, nil)
	descNATSMessages = prometheus.NewDesc("unibus_nats_client_messages_total", "Messages from (in) and to (out) clients of the own nats-server.", []string{"direction"}, nil)
	descNATSBytes    = prometheus.NewDesc("unibus_nats_client_bytes_total", "Payload from (in) and to (out) clients of the own nats-server.", []string{"direction"}, nil)
	descNATSSlow     = prometheus.NewDesc("unibus_nats_slow_consumers_total", "Connections that the own nats-server cut off because they read too slowly.", nil, nil)
	descNATSMemory   = prometheus.NewDesc("unibus_nats_resident_memory_bytes", "Memory of the own nats-server.", nil, nil)
	descNATSCPU      = prometheus.NewDesc("unibus_nats_cpu_cores", "Cores that the own nats-server keeps busy.", nil, nil)
	descNATSMeta     = prometheus.NewDesc("unibus_nats_meta_leader", "1 on the node that leads JetStream.", nil, nil)
	descNATSSeesMeta = prometheus.NewDesc("unibus_nats_meta_leader_known", "1 if the own nats-server knows a leader of JetStream.", nil, nil)
	descNATSStored   = prometheus.NewDesc("unibus_nats_storage_bytes", "What an account of JetStream stores on this node.", []string{"account"}, nil)
	descNATSReserved = prometheus.NewDesc("unibus_nats_storage_reserved_bytes", "What the streams on this node may grow to.", nil, nil)
	descNATSLimit    = prometheus.NewDesc("unibus_nats_storage_limit_bytes", "What JetStream may store on this node.", nil, nil)
	descNATSCert     = prometheus.NewDesc("unibus_nats_certificate_not_after_timestamp_seconds", "When a certificate of the own nats-server expires: of its listener for clients (server), of its routes (route).", []string{"role"}, nil)
	descNATSAPIError = prometheus.NewDesc("unibus_nats_jetstream_api_errors_total", "Requests to JetStream that the own nats-server answered with an error.", nil, nil)
)

// varz, jsz, routez and healthz are the parts of the server's answers that are
// shown. Their names are nats-server's.
type varz struct {
	Name           string    `json:"server_name"`
	Version        string    `json:"version"`
	Start          time.Time `json:"start"`
	ConfigLoadTime time.Time `json:"config_load_time"`
	Connections    float64   `json:"connections"`
	Accepted       float64   `json:"total_connections"`
	Subscriptions  float64   `json:"subscriptions"`
	InMsgs         float64   `json:"in_client_msgs"`
	InBytes        float64   `json:"in_client_bytes"`
	OutMsgs        float64   `json:"out_client_msgs"`
	OutBytes       float64   `json:"out_client_bytes"`
	SlowConsumers  float64   `json:"slow_consumers"`
	Mem            float64   `json:"mem"`
	CPU            float64   `json:"cpu"` // percent of one core
	NotAfter       time.Time `json:"tls_cert_not_after"`
	Cluster        struct {
		NotAfter time.Time `json:"tls_cert_not_after"`
	} `json:"cluster"`
}

type jsz struct {
	Reserved float64 `json:"reserved_storage"`
	Config   struct {
		MaxStore float64 `json:"max_storage"`
	} `json:"config"`
	API struct {
		Errors float64 `json:"errors"`
	} `json:"api"`
	Meta *struct {
		Leader string  `json:"leader"`
		Size   float64 `json:"cluster_size"`
	} `json:"meta_cluster"`
	Accounts []struct {
		Name  string  `json:"name"`
		Store float64 `json:"storage"`
	} `json:"account_details"`
}

type routez struct {
	Routes []struct {
		RemoteID string `json:"remote_id"`
	} `json:"routes"`
}

func (c monitorCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descNATSUp, descNATSInfo, descNATSHealthy, descNATSStart, descNATSConfig, descNATSConns, descNATSAccepted, descNATSSubs,
		descNATSRoutes, descNATSPeers, descNATSMessages, descNATSBytes, descNATSSlow, descNATSMemory, descNATSCPU, descNATSMeta,
		descNATSSeesMeta, descNATSStored, descNATSReserved, descNATSLimit, descNATSAPIError, descNATSCert,
	} {
		ch <- d
	}
}

func (c monitorCollector) Collect(ch chan<- prometheus.Metric) {
	var v varz
	var j jsz
	var r routez
	var vErr, jErr, rErr, hErr error
	var asking sync.WaitGroup
	asking.Go(func() { vErr = c.m.ask("/varz", &v) })
	asking.Go(func() { jErr = c.m.ask("/jsz?accounts=true", &j) })
	asking.Go(func() { rErr = c.m.ask("/routez", &r) })
	asking.Go(func() { hErr = c.m.ask("/healthz", &struct{}{}) })
	asking.Wait()
	one := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, kind, value, labels...)
	}
	one(descNATSUp, prometheus.GaugeValue, number(vErr == nil))
	one(descNATSHealthy, prometheus.GaugeValue, number(hErr == nil))
	if vErr == nil {
		v.collect(one)
	}
	if rErr == nil {
		others := map[string]bool{} // there may be several routes to one
		for _, route := range r.Routes {
			others[route.RemoteID] = true
		}
		one(descNATSRoutes, prometheus.GaugeValue, float64(len(others)))
	}
	if jErr == nil {
		j.collect(one, v.Name)
	}
}

type emit func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string)

func (v *varz) collect(one emit) {
	one(descNATSInfo, prometheus.GaugeValue, 1, v.Version)
	for d, at := range map[*prometheus.Desc]time.Time{descNATSStart: v.Start, descNATSConfig: v.ConfigLoadTime} {
		one(d, prometheus.GaugeValue, float64(at.Unix()))
	}
	for role, at := range map[string]time.Time{"server": v.NotAfter, "route": v.Cluster.NotAfter} {
		if !at.IsZero() {
			one(descNATSCert, prometheus.GaugeValue, float64(at.Unix()), role)
		}
	}
	for d, value := range map[*prometheus.Desc]float64{
		descNATSConns: v.Connections, descNATSSubs: v.Subscriptions, descNATSMemory: v.Mem, descNATSCPU: v.CPU / 100,
	} {
		one(d, prometheus.GaugeValue, value)
	}
	for d, value := range map[*prometheus.Desc]float64{descNATSAccepted: v.Accepted, descNATSSlow: v.SlowConsumers} {
		one(d, prometheus.CounterValue, value)
	}
	one(descNATSMessages, prometheus.CounterValue, v.InMsgs, "in")
	one(descNATSMessages, prometheus.CounterValue, v.OutMsgs, "out")
	one(descNATSBytes, prometheus.CounterValue, v.InBytes, "in")
	one(descNATSBytes, prometheus.CounterValue, v.OutBytes, "out")
}

func (j *jsz) collect(one emit, own string) {
	leader := ""
	if j.Meta != nil {
		leader = j.Meta.Leader
		one(descNATSPeers, prometheus.GaugeValue, max(0, j.Meta.Size-1))
	}
	one(descNATSSeesMeta, prometheus.GaugeValue, number(leader != ""))
	one(descNATSMeta, prometheus.GaugeValue, number(leader != "" && leader == own))
	one(descNATSReserved, prometheus.GaugeValue, j.Reserved)
	one(descNATSLimit, prometheus.GaugeValue, j.Config.MaxStore)
	one(descNATSAPIError, prometheus.CounterValue, j.API.Errors)
	for _, a := range j.Accounts { // accounts are four, and named by the configuration
		one(descNATSStored, prometheus.GaugeValue, a.Store, a.Name)
	}
}

// ask reads one answer. /healthz says with its status what the others say with
// a body.
func (m *Monitor) ask(path string, into any) error {
	resp, err := m.client.Get(m.base + path) // a scrape has no context; the client has a timeout
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %d", path, resp.StatusCode)
	}
	return json.NewDecoder(io.LimitReader(resp.Body, maxMonitorBody)).Decode(into)
}
