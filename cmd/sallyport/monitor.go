package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// readiness is one thing that a gate needs to take logins.
type readiness struct {
	name  string
	ready func(context.Context) error
}

// readyWait bounds one answer of /readyz.
const readyWait = 5 * time.Second

// allReady asks all but those that are left out, which must be known.
func allReady(ctx context.Context, checks []readiness, exclude []string) error {
	var errs []error
	left := slices.Clone(exclude)
	for _, c := range checks {
		if slices.Contains(exclude, c.name) {
			left = slices.DeleteFunc(left, func(name string) bool { return name == c.name })
			continue
		}
		if err := c.ready(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.name, err))
		}
	}
	for range left {
		errs = append(errs, errors.New("exclude: a check of that name is not made here"))
	}
	return errors.Join(errs...)
}

// monitor serves health and metrics on a listener of its own. What note says is shown by a gate that is ready all the same.
func monitor(addr string, registry *prometheus.Registry, checks []readiness, note func() string, log *slog.Logger) (stop func(), err error) {
	if addr == "" {
		return func() {}, nil
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("monitor: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	// Where a probe takes gates out of service, one bad file of policy would take all of them: ?exclude=policy.
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), readyWait)
		defer cancel()
		if err := allReady(ctx, checks, r.URL.Query()["exclude"]); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "ok\n"+note())
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	return serveHTTP(l, mux, log, "monitor"), nil
}
