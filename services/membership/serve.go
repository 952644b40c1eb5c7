package main

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
	"unibus.internal/services/membership/api"
	"unibus.internal/services/membership/recorder"
)

// certificatesEvery is how often the files of the certificate are looked at: who
// puts new ones there wants to see them on the port before the next node's turn.
const certificatesEvery = 5 * time.Second

// parts are the pieces that live as long as the process.
type parts struct {
	nc       *nats.Conn
	rooms    *nats.Conn // account BUS: durable rooms and blobs
	recorder *recorder.Recorder
	view     *kv.View
	store    *kv.Store
	blobs    *kv.Blobs
	audit    *kv.Audit
	health   *api.Health
	certs    *api.Certificates
	registry *prometheus.Registry
	server   *api.Server
	ln       net.Listener
	admin    net.Listener
}

// serve runs the node until ctx ends, then drains: 503 first, so that load
// balancers look away; requests in flight next; then the audit, which has heard
// of all of them; the lease last, when nothing decides any more.
func serve(ctx context.Context, c config, log *slog.Logger, p parts) int {
	work, stopWork := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWork()
	record, stopRecord := context.WithCancel(context.WithoutCancel(ctx))
	defer stopRecord()
	lease, stopLease := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLease()

	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)

	admin := &http.Server{Handler: adminHandler(p.registry), ReadHeaderTimeout: 5 * time.Second}
	failed := make(chan error, 2)
	go func() { failed <- p.server.Serve(p.ln) }()
	go func() { failed <- admin.Serve(p.admin) }()
	notify(daemon.SdNotifyReady)

	var background, records, recorded, decides sync.WaitGroup
	background.Go(func() { p.certs.Watch(work, certificatesEvery, hup) })
	background.Go(func() { p.health.Run(work) })
	background.Go(func() { tellSystemd(work, p.health) })
	decides.Go(func() {
		bootstrap(lease, log, p)
		p.view.Run(lease)
	})
	background.Go(func() { reconcile(work, log, p.view, p.store) })
	recording, stopRecording := context.WithCancel(lease)
	defer stopRecording()
	recorded.Go(func() { p.recorder.Run(recording) })
	background.Go(func() { keepBlobs(work, log, p) })
	records.Go(func() { p.audit.Run(record) })
	log.Info("serving", "node", c.node, "api", p.ln.Addr(), "admin", p.admin.Addr(), "version", version)

	code := 0
	select {
	case <-ctx.Done():
	case err := <-failed:
		log.Error("a listener failed", "err", err)
		code = exitUnavailable
	}
	log.Info("draining", "delay", c.drainDelay)
	notify(daemon.SdNotifyStopping)
	p.health.Drain()
	stopRecording() // the others take over
	if code == 0 {
		select {
		case <-time.After(c.drainDelay):
		case err := <-failed:
			log.Error("a listener failed", "err", err)
		}
	}
	bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.lease+api.ProofMargin) // a change may still be waiting for its proof
	defer cancel()
	if err := errors.Join(p.server.Shutdown(bound), admin.Shutdown(bound)); err != nil {
		log.Warn("requests were cut off", "err", err)
	}
	stopWork()
	background.Wait()
	stopRecord()
	records.Wait()
	recorded.Wait()
	stopLease()
	decides.Wait()
	log.Info("stopped")
	return code
}

// bootstrap makes or verifies the buckets, for as long as it takes: a node that
// is up before the others waits, and says for what.
func bootstrap(ctx context.Context, log *slog.Logger, p parts) {
	p.health.Starting("waiting for the cluster")
	for ctx.Err() == nil {
		err := kv.Bootstrap(ctx, p.nc, bootstrapBudget, func(obstacle string) {
			log.Info("not ready", "why", obstacle)
			p.health.Starting(obstacle)
		})
		if err == nil {
			log.Info("buckets verified")
			p.health.Starting("")
			return
		}
		if ctx.Err() != nil {
			return
		}
		log.Error("buckets are not ready; trying again", "err", err)
		p.health.Starting(err.Error())
		if bus.CodeOf(err) == bus.Conflict { // a wrong stream changes only by hand
			select {
			case <-ctx.Done():
			case <-time.After(5 * time.Second):
			}
		}
	}
}

// reconcile repairs what can be rebuilt, now and then, whenever this node may
// decide. Every node does; the writes are harmless twice.
func reconcile(ctx context.Context, log *slog.Logger, view *kv.View, store *kv.Store) {
	for {
		wait := reconcileEvery + rand.N(reconcileEvery)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if _, held := view.Lease(); !held {
			continue
		}
		bound, cancel := context.WithTimeout(ctx, 30*time.Second)
		if _, err := store.Reconcile(bound); err != nil {
			log.Warn("reconciler", "err", err)
		}
		cancel()
	}
}

// keepBlobs makes the store of files, and removes from it what interruptions
// left. A node serves without it: until it is there, requests for files are
// answered with Unavailable.
func keepBlobs(ctx context.Context, log *slog.Logger, p parts) {
	const retry = 2 * time.Second
	ready, said := false, ""
	for wait := time.Duration(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = reconcileEvery + rand.N(reconcileEvery)
		bound, cancel := context.WithTimeout(ctx, 30*time.Second)
		var err error
		if !ready {
			if err = p.blobs.Bootstrap(bound); err == nil {
				ready = true
				log.Info("the store of files is ready")
			}
			wait = retry
		} else if _, held := p.view.Lease(); held {
			var removed int
			if removed, err = p.blobs.Reconcile(bound); removed > 0 {
				log.Info("removed what interrupted uploads and deletions left", "files", removed)
			}
		}
		cancel()
		switch {
		case err == nil:
			said = ""
		case err.Error() != said && ctx.Err() == nil:
			said = err.Error()
			log.Warn("files", "err", err)
		}
	}
}

// tellSystemd feeds the watchdog from a living loop, never from a quorum, and
// shows in `systemctl status` what the node waits for.
func tellSystemd(ctx context.Context, health *api.Health) {
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	said := ""
	for {
		status := "serving"
		if ok, why := health.Ready(); !ok {
			status = "not ready: " + why
		}
		if status != said {
			said = status
			notify("STATUS=" + status)
		}
		notify(daemon.SdNotifyWatchdog)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
