package test

import (
	"bufio"
	"bytes"
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/bus/sig"
	"unibus.internal/test/cluster"
)

// The half of TestThreats that is about the requests themselves.

// captured is a request that somebody recorded on its way, signed for the name
// of the load balancer.
type captured struct {
	request *http.Request
	client  *apiClient
}

// capture makes a request that nobody has sent yet. Its time lies ahead as far
// as may be, so that it stays good for as long as may be.
func (th *threats) capture(t testing.TB, p *person, method, path string, body any) captured {
	t.Helper()
	c := th.api(1, p)
	r, err := c.build(context.WithoutCancel(t.Context()), apiRequest{
		method: method, path: path, host: balancer, body: mustJSON(t, body), created: time.Now().Add(sig.Window - 5*time.Second),
	})
	if err != nil {
		t.Fatal(err)
	}
	return captured{r, c}
}

// to sends it to a node, as it is.
func (th *threats) to(i int, c captured) (*apiResponse, error) {
	r := c.request.Clone(c.request.Context())
	r.URL.Host = strings.TrimPrefix(th.APIURL(i), "https://")
	return c.client.roundTrip(r)
}

// written counts the records of each key in a bucket.
func (w *world) written(t testing.TB, bucket, keys string) map[string]uint64 {
	t.Helper()
	var info *jetstream.StreamInfo
	cluster.WaitFor(t, 30*time.Second, "the bucket to be read", func() error { // its leader may have died just now
		js, err := jetstream.New(w.Ops())
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		s, err := js.Stream(ctx, kv.StreamName(bucket))
		if err == nil {
			info, err = s.Info(ctx, jetstream.WithSubjectFilter("$KV."+bucket+"."+keys))
		}
		return err
	})
	out := map[string]uint64{}
	for subject, n := range info.State.Subjects {
		out[strings.TrimPrefix(subject, "$KV."+bucket+".")] = n
	}
	return out
}

// replays: a captured request that is sent over and over, to all nodes at
// once, has its effect once, by the count of the records that it writes and of
// the attempts on record. It has none later, with a service that was started
// since, or a node that died.
func (th *threats) replays(t *testing.T) {
	requests, copies := 25, 40
	if full {
		requests, copies = 100, 100
	}
	var making sync.WaitGroup
	all := make([]captured, requests)
	for n := range all {
		making.Go(func() {
			th.does(t, "POST", "/v1/rooms", dict{"room": fmt.Sprintf("rep-%d", n), "owner": "alice"})
		})
		// What this writes it writes each time that it is carried out.
		all[n] = th.capture(t, th.alice, "PATCH", fmt.Sprintf("/v1/rooms/rep-%d", n), dict{"description": "once"})
	}
	making.Wait()
	captured := time.Now()
	made := th.written(t, kv.Rooms, "*")
	type sending struct{ request, node int }
	var sendings []sending
	for k := range requests * copies {
		sendings = append(sendings, sending{k % requests, 1 + k/requests%3})
	}
	rand.Shuffle(len(sendings), func(i, j int) { sendings[i], sendings[j] = sendings[j], sendings[i] })
	served, unsure := make([]atomic.Int64, requests), make([]atomic.Int64, requests)
	work := make(chan sending)
	var workers sync.WaitGroup
	for range 48 {
		workers.Go(func() {
			for s := range work {
				switch r, err := th.to(s.node, all[s.request]); {
				case err != nil:
					t.Errorf("request %d to n%d: %v", s.request, s.node, err)
				case r.status < 300:
					served[s.request].Add(1)
				case r.status == http.StatusServiceUnavailable:
					unsure[s.request].Add(1)
				case r.status != http.StatusUnauthorized:
					t.Errorf("request %d to n%d: %s", s.request, s.node, r)
				}
			}
		})
	}
	for _, s := range sendings {
		work <- s
	}
	close(work)
	workers.Wait()
	once := func(when string) {
		t.Helper()
		doubts, now := int64(0), th.written(t, kv.Rooms, "*")
		for n := range all {
			id := fmt.Sprintf("rep-%d", n)
			effects, ok, doubt := now[id]-made[id], served[n].Load(), unsure[n].Load()
			doubts += doubt
			// A 503 is the answer of who does not know: the nonce may be used
			// up, and then the request was never carried out.
			if effects > 1 || ok > 1 || doubt == 0 && (effects != 1 || ok != 1) {
				t.Errorf("%s: request %d was served %d times, with %d effects (%d times 503)", when, n, ok, effects, doubt)
			}
		}
		if doubts > int64(len(sendings)/20) {
			t.Errorf("%s: %d of %d were answered with 503", when, doubts, len(sendings))
		}
	}
	once("at once")
	t.Logf("%d requests, %d sendings", requests, len(sendings))

	again := func(when string, nodes ...int) {
		t.Helper()
		if age := time.Since(captured); age > 2*sig.Window-10*time.Second {
			t.Errorf("%s: %s later nothing but age is tested", when, age)
		}
		for n := range all {
			for _, i := range nodes {
				if r, err := th.to(i, all[n]); err != nil || r.status != http.StatusUnauthorized {
					t.Errorf("%s: request %d to n%d: %v %v", when, n, i, r, err)
				}
			}
		}
		once(when)
	}
	th.Term(2, cluster.Membership)
	th.StartNode(2, cluster.Membership)
	th.WaitHealthy(time.Minute, 2)
	again("after a restart", 2)
	th.Kill(3)
	cluster.WaitFor(t, 30*time.Second, "the others to serve", func() error {
		for _, i := range []int{1, 2} {
			if r, err := th.api(i, th.bob).send(t.Context(), apiRequest{method: "GET", path: "/v1/me"}); err != nil || r.status != 200 {
				return fmt.Errorf("n%d: %v %w", i, r, err)
			}
		}
		return nil
	})
	again("after a node died", 1, 2)
	th.StartNode(3)
	th.WaitHealthy(time.Minute)

	attempts := map[bus.RoomID]int{}
	var page struct {
		Records []bus.AuditRecord
		Next    string
	}
	for after := ""; ; after = page.Next {
		page.Next = ""
		th.api(1, th.admin).want(t, 200, "GET", "/v1/audit?action=room.set&kind=attempt&actor=alice&limit=500&after="+after, nil).decode(t, &page)
		for _, r := range page.Records {
			attempts[r.Room]++
		}
		if page.Next == "" {
			break
		}
	}
	for n := range all {
		if got := attempts[bus.RoomID(fmt.Sprintf("rep-%d", n))]; got > 1 || got == 0 && unsure[n].Load() == 0 {
			t.Errorf("request %d was attempted %d times", n, got)
		}
	}
}

// oldNonces: a request is too old, for every clock that a node may serve with,
// before its nonce is forgotten.
func (th *threats) oldNonces(t *testing.T) {
	js, err := jetstream.New(th.Ops())
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), kv.StreamName(kv.Nonces))
	if err != nil {
		t.Fatal(err)
	}
	remembered := s.CachedInfo().Config.MaxAge
	if clocks := 4 * time.Second; remembered < 2*sig.Window+clocks {
		t.Errorf("nonces are remembered for %s, requests are good for %s", remembered, 2*sig.Window)
	}
	c := th.api(1, th.alice)
	ask := func(age time.Duration, want int) *http.Request {
		t.Helper()
		r, err := c.build(context.WithoutCancel(t.Context()), apiRequest{method: "GET", path: "/v1/me", created: time.Now().Add(-age)})
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := c.roundTrip(r); err != nil || resp.status != want {
			t.Errorf("a request of %s ago: %v %v, want %d", age, resp, err, want)
		}
		return r
	}
	const edge = 3 * time.Second
	ask(sig.Window+edge, 401)
	ask(-sig.Window-edge, 401)
	ask(time.Hour, 401)
	ask(sig.Window-edge, 200)
	last := ask(-sig.Window+edge, 200) // of all that are good now, good for the longest
	if resp, err := c.roundTrip(last); err != nil || resp.status != 401 {
		t.Errorf("replay: %v %v", resp, err)
	}
	if !full {
		return
	}
	cluster.WaitFor(t, remembered+time.Minute, "the nonces to be forgotten", func() error {
		info, err := s.Info(t.Context())
		if err != nil {
			return err
		}
		if info.State.Msgs > 0 {
			return fmt.Errorf("%d nonces", info.State.Msgs)
		}
		return nil
	})
	if resp, err := c.roundTrip(last); err != nil || resp.status != 401 {
		t.Errorf("replay when the nonce is forgotten: %v %v", resp, err)
	}
}

// burnedNonces: the nonce of somebody else cannot be used up, neither by who
// may sign requests, nor by who forges them, nor by who sends them to a node
// that they are not for.
func (th *threats) burnedNonces(t *testing.T) {
	for n := range 10 {
		victim := th.capture(t, th.alice, "GET", "/v1/me", nil)
		_, nonce, _ := strings.Cut(victim.request.Header.Get("Signature-Input"), `nonce="`)
		nonce, _, _ = strings.Cut(nonce, `"`)
		if r, err := th.api(1+n%3, th.bob).send(t.Context(), apiRequest{method: "GET", path: "/v1/me", nonce: nonce}); err != nil || r.status != 200 {
			t.Fatalf("bob with that nonce: %v %v", r, err)
		}
		forger := &apiClient{url: th.APIURL(1), http: th.http, signer: impostor{th.bob, th.alice.key}}
		other := &apiClient{url: th.APIURL(1), http: th.http, signer: th.alice}
		for _, try := range []struct {
			client *apiClient
			edit   func(*http.Request)
		}{
			{forger, nil},
			{other, func(r *http.Request) { r.Host = "elsewhere.test" }},
			{other, func(r *http.Request) { r.Method = "POST" }},
			{other, func(r *http.Request) { r.Header.Set("Content-Digest", "sha-256=:AAAA:") }},
		} {
			if r, err := try.client.send(t.Context(), apiRequest{method: "GET", path: "/v1/me", nonce: nonce, edit: try.edit}); err != nil || r.status != 401 {
				t.Errorf("forged: %v %v", r, err)
			}
		}
		if r, err := th.to(1+n%3, victim); err != nil || r.status != 200 {
			t.Errorf("alice, when all that had been tried: %v %v", r, err)
		}
	}
}

// raw sends bytes to a node over TLS and returns everything it says within two
// seconds or until it closes. It may be called from any goroutine.
func (th *threats) raw(t testing.TB, i int, text string) string {
	t.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", strings.TrimPrefix(th.APIURL(i), "https://"), th.trust)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	_, _ = io.WriteString(c, text) // may be cut off already
	said, _ := io.ReadAll(c)
	return string(said)
}

// statuses reads the status of each answer in what raw returned.
func statuses(said string) (out []int) {
	in := bufio.NewReader(strings.NewReader(said))
	for {
		r, err := http.ReadResponse(in, nil)
		if err != nil {
			return out
		}
		_, _ = io.Copy(io.Discard, r.Body)
		_ = r.Body.Close()
		out = append(out, r.StatusCode)
	}
}

// spell writes a request as it goes over the wire, with what is signed in it
// first. The connection is closed after the answer.
func spell(r *http.Request, body []byte) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", r.Method, r.URL.RequestURI(), r.Host)
	for _, name := range []string{"Content-Digest", "Signature-Input", "Signature"} {
		for _, v := range r.Header.Values(name) {
			fmt.Fprintf(&b, "%s: %s\r\n", name, v)
		}
	}
	for _, name := range []string{"Content-Type", "Trailer", "Transfer-Encoding", "Expect", "X-Forwarded-For", "X-Forwarded-Host"} {
		for _, v := range r.Header.Values(name) {
			fmt.Fprintf(&b, "%s: %s\r\n", name, v)
		}
	}
	if r.Header.Get("Transfer-Encoding") == "" {
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(body))
	}
	b.WriteString("Connection: close\r\n\r\n")
	b.Write(body)
	return b.Bytes()
}

// changedRequests: no byte of what a captured request says can be another, nor
// can the signature serve for another request, node or key. In the end the
// request itself is good: all that was refused for what was changed.
func (th *threats) changedRequests(t *testing.T) {
	th.does(t, "POST", "/v1/rooms", dict{"room": "forge", "owner": "alice"})
	th.does(t, "POST", "/v1/rooms", dict{"room": "forgf", "owner": "alice"})
	body := []byte(`{"description":"as it was written"}`)
	build := func(q apiRequest) *http.Request {
		t.Helper()
		q.created = time.Now().Add(sig.Window - 5*time.Second)
		r, err := th.api(1, th.alice).build(context.WithoutCancel(t.Context()), q)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	patch := apiRequest{method: "PATCH", path: "/v1/rooms/forge", body: body}
	original := build(patch)
	wire := spell(original, body)
	head := bytes.Index(wire, []byte("Content-Type:"))
	version := bytes.Index(wire, []byte("1.1\r\n")) // of HTTP, which is each hop's own
	rest := bytes.Index(wire, []byte("\r\n\r\n")) + 4
	step, flips := 11, []byte{0x01}
	if full {
		step, flips = 1, []byte{0x01, 0x02, 0x04, 0x10, 0x80}
	}
	var tries [][2]any // position and bits
	for _, flip := range flips {
		for at := 0; at < len(wire); at++ {
			if (at < head || at >= rest) && (at < version || at > version+2) && wire[at] != '\r' && wire[at] != '\n' && (at%step == 0 || at < 40) {
				tries = append(tries, [2]any{at, flip})
			}
		}
	}
	refused := func(said string) bool { // by us, or by the HTTP server before it reached us
		all := statuses(said)
		return len(all) == 1 && (all[0] == 401 || all[0] == 400 && !strings.Contains(said, "problem+json") || all[0] == 505 || all[0] == 501)
	}
	var sending sync.WaitGroup
	slots := make(chan struct{}, 16)
	for _, try := range tries {
		slots <- struct{}{}
		sending.Go(func() {
			defer func() { <-slots }()
			at, flip := try[0].(int), try[1].(byte)
			changed := bytes.Clone(wire)
			changed[at] ^= flip
			if said := th.raw(t, 1, string(changed)); said != "" && !refused(said) {
				t.Errorf("byte %d, %q instead of %q in %.90q: %s", at, changed[at], wire[at], changed, said)
			}
		})
	}
	sending.Wait()
	t.Logf("%d changed bytes", len(tries))

	set := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(name, value) }
	}
	replace := func(name, old, with string) func(*http.Request) {
		return func(r *http.Request) {
			if v := r.Header.Get(name); !strings.Contains(v, old) {
				t.Errorf("%s has no %s: %s", name, old, v)
			}
			r.Header.Set(name, strings.Replace(r.Header.Get(name), old, with, 1))
		}
	}
	other := []byte(`{"description":"as somebody wants"}`)
	sum := sha256.Sum256(other)
	second := build(patch)
	created := fmt.Sprintf("created=%d", time.Now().Unix())
	fields := map[string]func(*http.Request){
		"another method":         func(r *http.Request) { r.Method = "DELETE" },
		"another path":           func(r *http.Request) { r.URL.Path = "/v1/rooms/forgf" },
		"a query":                func(r *http.Request) { r.URL.RawQuery = "all=true" },
		"an empty query":         func(r *http.Request) { r.URL.ForceQuery = true },
		"another name of ours":   func(r *http.Request) { r.Host = balancer },
		"another node":           func(r *http.Request) { r.Host = strings.TrimPrefix(th.APIURL(2), "https://") },
		"another digest":         set("Content-Digest", "sha-256=:"+base64.StdEncoding.EncodeToString(sum[:])+":"),
		"another key":            replace("Signature-Input", th.alice.key.NKey(), th.admin.key.NKey()),
		"another time":           func(r *http.Request) { r.Header.Set("Signature-Input", createdForm(r, created)) },
		"another nonce":          replace("Signature-Input", `nonce="`, `nonce="A`),
		"another algorithm":      replace("Signature-Input", `"ed25519"`, `"ed25519ph"`),
		"another purpose":        replace("Signature-Input", `"unibus-v1"`, `"unibus-v2"`),
		"components of another":  set("Signature-Input", second.Header.Get("Signature-Input")),
		"a signature of another": set("Signature", second.Header.Get("Signature")),
	}
	for name, edit := range fields {
		r := original.Clone(original.Context())
		edit(r)
		if said := th.raw(t, 1, string(spell(r, body))); !refused(said) {
			t.Errorf("%s: %s", name, said)
		}
	}
	if said := th.raw(t, 1, string(spell(original, other))); !refused(said) {
		t.Errorf("another body: %s", said)
	}
	for _, i := range []int{2, 3} {
		if said := th.raw(t, i, string(wire)); !refused(said) {
			t.Errorf("to n%d: %s", i, said)
		}
	}
	if said := th.raw(t, 1, string(wire)); !slices.Equal(statuses(said), []int{200}) {
		t.Errorf("the request itself: %s", said)
	}
	if n := th.written(t, kv.Rooms, "forge")["forge"]; n != 2 {
		t.Errorf("the room was written %d times, not twice", n)
	}
	if n := th.written(t, kv.Rooms, "forgf")["forgf"]; n != 1 {
		t.Errorf("the other room was written %d times, not once", n)
	}
}

// createdForm is the Signature-Input of r with another time.
func createdForm(r *http.Request, created string) string {
	before, rest, _ := strings.Cut(r.Header.Get("Signature-Input"), "created=")
	_, after, _ := strings.Cut(rest, ";")
	return before + created + ";" + after
}

// downgrades: a signature of another shape is none, however well it is made.
func (th *threats) downgrades(t *testing.T) {
	const (
		method, authority, path, query, digest = `"@method"`, `"@authority"`, `"@path"`, `"@query"`, `"content-digest"`
		usual                                  = method + " " + authority + " " + path + " " + query + " " + digest
	)
	host := strings.TrimPrefix(th.APIURL(1), "https://")
	empty := sha256.Sum256(nil)
	values := map[string]string{
		method: "GET", authority: host, path: "/v1/me", query: "?", digest: "sha-256=:" + base64.StdEncoding.EncodeToString(empty[:]) + ":",
		`"date"`: "Thu, 01 Jan 2026 00:00:00 GMT", `"@target-uri"`: "https://" + host + "/v1/me", `"@scheme"`: "https", `"@request-target"`: "/v1/me",
	}
	n := 0
	// signed is a request with a genuine signature of alice over the components
	// and with the parameters that are given; %s is a nonce.
	signed := func(label, components, params string) http.Header {
		n++
		nonce := fmt.Sprintf("downgrade-%014d", n)
		params = strings.NewReplacer("NONCE", nonce, "NOW", fmt.Sprint(time.Now().Unix()), "KEY", th.alice.key.NKey()).Replace(params)
		var base strings.Builder
		for c := range strings.FieldsSeq(components) {
			fmt.Fprintf(&base, "%s: %s\n", c, values[c])
		}
		input := "(" + components + ")" + params
		signature, err := th.alice.Sign([]byte(base.String() + `"@signature-params": ` + input))
		if err != nil {
			t.Fatal(err)
		}
		return http.Header{
			"Content-Digest": {values[digest]}, "Date": {values[`"date"`]},
			"Signature-Input": {label + "=" + input},
			"Signature":       {label + "=:" + base64.StdEncoding.EncodeToString(signature) + ":"},
		}
	}
	const params = `;created=NOW;nonce="NONCE";keyid="KEY";alg="ed25519";tag="unibus-v1"`
	with := func(name string, values ...string) func(http.Header) {
		return func(h http.Header) {
			delete(h, name)
			if len(values) > 0 {
				h[name] = values
			}
		}
	}
	same := func(http.Header) {}
	twice := signed("ub1", usual, params)
	send := func(h http.Header) *apiResponse {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), "GET", th.APIURL(1)+"/v1/me", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header = h
		resp, err := th.api(1, nil).roundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	if r := send(signed("ub1", usual, params)); r.status != 200 {
		t.Fatalf("signed as it should be: %s", r)
	}
	for name, try := range map[string]struct {
		label, components, params string
		edit                      func(http.Header)
	}{
		"no signature":          {"ub1", usual, params, with("Signature")},
		"no input":              {"ub1", usual, params, with("Signature-Input")},
		"neither":               {"ub1", usual, params, func(h http.Header) { with("Signature")(h); with("Signature-Input")(h) }},
		"no digest":             {"ub1", usual, params, with("Content-Digest")},
		"an empty signature":    {"ub1", usual, params, with("Signature", "ub1=::")},
		"alg none":              {"ub1", usual, strings.Replace(params, "ed25519", "none", 1), same},
		"alg hmac":              {"ub1", usual, strings.Replace(params, "ed25519", "hmac-sha256", 1), same},
		"alg rsa":               {"ub1", usual, strings.Replace(params, "ed25519", "rsa-pss-sha512", 1), same},
		"no alg":                {"ub1", usual, strings.Replace(params, `;alg="ed25519"`, "", 1), same},
		"no tag":                {"ub1", usual, strings.Replace(params, `;tag="unibus-v1"`, "", 1), same},
		"no time":               {"ub1", usual, strings.Replace(params, ";created=NOW", "", 1), same},
		"no nonce":              {"ub1", usual, strings.Replace(params, `;nonce="NONCE"`, "", 1), same},
		"an empty nonce":        {"ub1", usual, strings.Replace(params, "NONCE", "", 1), same},
		"a key that is no nkey": {"ub1", usual, strings.Replace(params, "KEY", th.alice.key.Hex(), 1), same},
		"an expiry":             {"ub1", usual, params + ";expires=4102444800", same},
		"an expiry far away":    {"ub1", usual, strings.Replace(params, ";nonce", ";expires=4102444800;nonce", 1), same},
		"another label":         {"sig1", usual, params, same},
		"no method":             {"ub1", strings.Join([]string{authority, path, query, digest}, " "), params, same},
		"no body":               {"ub1", strings.Join([]string{method, authority, path, query}, " "), params, same},
		"no components":         {"ub1", "", params, same},
		"another order":         {"ub1", strings.Join([]string{authority, method, path, query, digest}, " "), params, same},
		"one component more":    {"ub1", usual + ` "date"`, params, same},
		"the target instead":    {"ub1", method + ` "@target-uri" ` + digest, params, same},
		"a component twice":     {"ub1", usual + " " + method, params, same},
		"two signatures":        {"ub1", usual, params, func(h http.Header) { h["Signature"] = append(h["Signature"], twice.Get("Signature")) }},
		"two inputs":            {"ub1", usual, params, func(h http.Header) { h["Signature-Input"] = append(h["Signature-Input"], twice.Get("Signature-Input")) }},
		"two labels":            {"ub1", usual, params, func(h http.Header) { h.Set("Signature-Input", h.Get("Signature-Input")+", ub2=()") }},
		"two labels, both signed": {"ub1", usual, params, func(h http.Header) {
			h.Set("Signature-Input", h.Get("Signature-Input")+", "+twice.Get("Signature-Input"))
		}},
		"two digests":     {"ub1", usual, params, with("Content-Digest", values[digest], values[digest])},
		"an encoded body": {"ub1", usual, params, with("Content-Encoding", "gzip")},
		"another spelling of it": {"ub1", usual, params, func(h http.Header) {
			h.Set("Signature-Input", strings.Replace(h.Get("Signature-Input"), ";nonce", "; nonce", 1))
		}},
		"a bearer token instead":   {"ub1", usual, params, func(h http.Header) { with("Signature")(h); h.Set("Authorization", "Bearer "+th.alice.key.NKey()) }},
		"a name in another header": {"ub1", usual, params, func(h http.Header) { with("Signature")(h); h.Set("X-Remote-User", th.alice.key.NKey()) }},
	} {
		h := signed(try.label, try.components, try.params)
		try.edit(h)
		if r := send(h); r.status != 401 || r.code() != bus.Unauthenticated {
			t.Errorf("%s: %s", name, r)
		}
	}
}

// smuggling: a request is what was signed, whoever stands between and whatever
// they say about it; nothing can be hidden in or behind it.
func (th *threats) smuggling(t *testing.T) {
	th.does(t, "POST", "/v1/rooms", dict{"room": "smuggle", "owner": "alice"})
	alice := th.api(1, th.alice)
	// Headers that other servers believe. The audit would name their address.
	lies := http.Header{}
	for _, name := range []string{"X-Forwarded-For", "X-Real-Ip", "True-Client-Ip", "X-Client-Ip"} {
		lies.Set(name, "198.18.7.7")
	}
	for name, value := range map[string]string{
		"X-Forwarded-Host": "elsewhere.test", "X-Forwarded-Proto": "http", "X-Forwarded-Prefix": "/v2", "Forwarded": "for=198.18.7.7;host=elsewhere.test",
		"X-Original-Url": "/v1/users", "X-Rewrite-Url": "/v1/users", "X-Http-Method-Override": "DELETE", "X-Http-Method": "DELETE", "X-Method-Override": "DELETE",
		"X-Forwarded-User": th.admin.key.NKey(), "Via": "1.1 elsewhere.test",
	} {
		lies.Set(name, value)
	}
	plain, err := alice.send(t.Context(), apiRequest{method: "GET", path: "/v1/rooms/smuggle"})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := alice.send(t.Context(), apiRequest{method: "GET", path: "/v1/rooms/smuggle", header: lies}); err != nil || r.status != 200 || !bytes.Equal(r.body, plain.body) {
		t.Errorf("with lies beside it: %v %v\nwithout: %s", r, err, plain)
	}
	if r, err := alice.send(t.Context(), apiRequest{method: "GET", path: "/v1/users", header: lies}); err != nil || r.status != 403 {
		t.Errorf("the list of users: %v %v", r, err)
	}
	cluster.WaitFor(t, 10*time.Second, "the refusal on record", func() error {
		var page struct{ Records []bus.AuditRecord }
		th.api(1, th.admin).want(t, 200, "GET", "/v1/audit?kind=denial&actor=alice&action=user.list&limit=500", nil).decode(t, &page)
		if len(page.Records) == 0 {
			return fmt.Errorf("none")
		}
		for _, r := range page.Records {
			if r.From != "127.0.0.1" {
				t.Errorf("the audit believes %+v", r)
			}
		}
		return nil
	})
	// A Host that is not one of ours, with one of ours beside it.
	if r, err := alice.send(t.Context(), apiRequest{
		method: "GET", path: "/v1/me", host: "elsewhere.test", header: http.Header{"X-Forwarded-Host": {strings.TrimPrefix(th.APIURL(1), "https://")}},
	}); err != nil || r.status != 401 {
		t.Errorf("signed for elsewhere: %v %v", r, err)
	}

	host := strings.TrimPrefix(th.APIURL(1), "https://")
	body := `{"description":"smuggled"}`
	// signed makes the headers for a request whose target may be anything.
	signed := func(method, target, body string) string {
		t.Helper()
		nonce, err := sig.NewNonce(crand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte(body))
		digest := "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
		path, query, _ := strings.Cut(target, "?")
		params := fmt.Sprintf(`("@method" "@authority" "@path" "@query" "content-digest");created=%d;nonce="%s";keyid="%s";alg="ed25519";tag="unibus-v1"`,
			time.Now().Unix(), nonce, th.alice.key.NKey())
		signature, err := th.alice.Sign([]byte("\"@method\": " + method + "\n\"@authority\": " + host + "\n\"@path\": " + path + "\n\"@query\": ?" + query +
			"\n\"content-digest\": " + digest + "\n\"@signature-params\": " + params))
		if err != nil {
			t.Fatal(err)
		}
		return "Content-Digest: " + digest + "\r\nSignature-Input: ub1=" + params + "\r\nSignature: ub1=:" + base64.StdEncoding.EncodeToString(signature) + ":\r\n"
	}
	const target = "/v1/rooms/smuggle"
	request := func(head, signedTarget, framing, rest string) string {
		method, _, _ := strings.Cut(head, " ")
		inner := ""
		if method == "PATCH" {
			inner = body
		}
		return head + "\r\nHost: " + host + "\r\nContent-Type: application/json\r\nConnection: close\r\n" + signed(method, signedTarget, inner) + framing + "\r\n\r\n" + rest
	}
	chunks := func(s string) string { return fmt.Sprintf("%x\r\n%s\r\n0\r\n", len(s), s) }
	length := fmt.Sprintf("Content-Length: %d", len(body))
	chunked := "Transfer-Encoding: chunked"
	// For whom is the second request? Nobody has signed it.
	second := "DELETE " + target + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n"
	var sending sync.WaitGroup
	get, patch := "GET "+target+" HTTP/1.1", "PATCH "+target+" HTTP/1.1"
	for name, c := range map[string]struct {
		raw  string
		want []int // any of these to each request
	}{
		"as it should be":        {request(get, target, "X-A: b", ""), []int{200}},
		"chunks":                 {request(patch, target, chunked, chunks(body)+"\r\n"), []int{200}},
		"two slashes":            {request("GET //v1/rooms/smuggle HTTP/1.1", "//v1/rooms/smuggle", "X-A: b", ""), []int{401}},
		"two slashes inside":     {request("GET /v1//rooms/smuggle HTTP/1.1", "/v1//rooms/smuggle", "X-A: b", ""), []int{401}},
		"a slash, encoded":       {request("GET /v1/rooms%2fsmuggle HTTP/1.1", "/v1/rooms%2fsmuggle", "X-A: b", ""), []int{401}},
		"a slash, signed plain":  {request("GET /v1/rooms%2fsmuggle HTTP/1.1", target, "X-A: b", ""), []int{401}},
		"a dot, encoded":         {request("GET /v1/%2e%2e/v1/me HTTP/1.1", "/v1/%2e%2e/v1/me", "X-A: b", ""), []int{401}},
		"dots":                   {request("GET /v1/rooms/../me HTTP/1.1", "/v1/rooms/../me", "X-A: b", ""), []int{401}},
		"dots after a probe":     {request("GET /healthz/../v1/me HTTP/1.1", "/healthz/../v1/me", "X-A: b", ""), []int{401}},
		"a NUL":                  {request("GET /v1/rooms/smuggle%00 HTTP/1.1", "/v1/rooms/smuggle%00", "X-A: b", ""), []int{401}},
		"a backslash":            {request(`GET /v1\rooms\smuggle HTTP/1.1`, `/v1\rooms\smuggle`, "X-A: b", ""), []int{400, 401}},
		"a parameter":            {request("GET /v1/rooms/smuggle;x=y HTTP/1.1", "/v1/rooms/smuggle;x=y", "X-A: b", ""), []int{400, 404}},
		"a slash at the end":     {request("GET /v1/rooms/smuggle/ HTTP/1.1", "/v1/rooms/smuggle/", "X-A: b", ""), []int{404}},
		"other letters":          {request("GET /V1/ROOMS/SMUGGLE HTTP/1.1", "/V1/ROOMS/SMUGGLE", "X-A: b", ""), []int{404}},
		"absolute form":          {request("GET https://"+host+target+" HTTP/1.1", target, "X-A: b", ""), []int{401}},
		"absolute, another host": {request("GET https://elsewhere.test"+target+" HTTP/1.1", target, "X-A: b", ""), []int{401}},
		"authority form":         {request("CONNECT "+host+" HTTP/1.1", target, "X-A: b", ""), []int{400, 401, 405}},
		"asterisk":               {request("OPTIONS * HTTP/1.1", "*", "X-A: b", ""), []int{200, 400, 401}}, // net/http answers this itself, with nothing
		"two hosts":              {strings.Replace(request(get, target, "X-A: b", ""), "Host:", "Host: elsewhere.test\r\nHost:", 1), []int{400}},
		"no host":                {strings.Replace(request(get, target, "X-A: b", ""), "Host: "+host+"\r\n", "", 1), []int{400}},
		"no host, HTTP/1.0":      {strings.Replace(request("GET "+target+" HTTP/1.0", target, "X-A: b", ""), "Host: "+host+"\r\n", "", 1), []int{401}},
		"HTTP/0.9":               {"GET " + target + "\r\n\r\n", []int{400}},
		"HTTP/3.0":               {request("GET "+target+" HTTP/3.0", target, "X-A: b", ""), []int{400, 505}},
		"a trailer announced":    {request(patch, target, chunked+"\r\nTrailer: X-Role", chunks(body)+"X-Role: admin\r\n\r\n"), []int{401}},
		"a trailer":              {request(patch, target, chunked, chunks(body)+"X-Role: admin\r\n\r\n"), []int{401}},
		"length and chunks":      {request(patch, target, length+"\r\n"+chunked, chunks(body)+"\r\n"+second), []int{200, 400, 401}},
		"chunks and length 0":    {request(patch, target, chunked+"\r\nContent-Length: 0", chunks(body)+"\r\n"+second), []int{200, 400, 401}},
		"two lengths":            {request(patch, target, length+"\r\nContent-Length: 4", body+second), []int{400}},
		"a length of two":        {request(patch, target, strings.Replace(length, ": ", ": 4, ", 1), body+second), []int{400}},
		"a signed length":        {request(patch, target, strings.Replace(length, ": ", ": +", 1), body+second), []int{400}},
		"chunks, spelled else":   {request(patch, target, "Transfer-Encoding: xchunked", chunks(body)+"\r\n"+second), []int{400, 501}},
		"chunks, twice":          {request(patch, target, chunked+"\r\n"+chunked, chunks(body)+"\r\n"+second), []int{400, 501}},
		"chunks, and identity":   {request(patch, target, chunked+", identity", chunks(body)+"\r\n"+second), []int{400, 501}},
		"chunks after a space":   {request(patch, target, "Transfer-Encoding : chunked", chunks(body)+"\r\n"+second), []int{400}},
		"chunks, folded":         {request(patch, target, "Transfer-Encoding:\r\n chunked", chunks(body)+"\r\n"+second), []int{200, 400, 401, 501}},
		"an upgrade":             {request(get, target, "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA", ""), []int{200, 401}},
		"a second one behind it": {strings.Replace(request(get, target, "X-A: b", second), "Connection: close\r\n", "", 1), []int{200, 401}},
		"a second one as body":   {strings.Replace(request(get, target, fmt.Sprintf("Content-Length: %d", len(second)), second), "Connection: close\r\n", "", 1), []int{401}},
	} {
		sending.Go(func() {
			said := th.raw(t, 1, c.raw)
			got := statuses(said)
			for i, s := range got {
				if !slices.Contains(c.want, s) || i > 0 && s < 400 {
					t.Errorf("%s: %v, want of %v: %s", name, got, c.want, said)
					break
				}
			}
			if len(got) == 0 {
				t.Errorf("%s: no answer: %.200q", name, said)
			}
		})
	}
	sending.Wait()
	// The room is still there, and nothing but our own descriptions were written.
	if r := th.api(2, th.alice).want(t, 200, "GET", target, nil); !bytes.Contains(r.body, []byte(`"status":"active"`)) {
		t.Errorf("%s", r)
	}
}
