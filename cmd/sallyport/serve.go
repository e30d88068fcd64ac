package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/auditlog/s3"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
	"github.com/sallyport/sallyport/backends/docker"
	"github.com/sallyport/sallyport/backends/kubernetes"
	"github.com/sallyport/sallyport/config"
	"github.com/sallyport/sallyport/sshserver"
)

const defaultConfig = "/etc/sallyport/sallyport.yaml"

// logCloseTime is how long a stopping gate waits for the store to take what is in the spool; the rest goes there after
// the next start.
const logCloseTime = 20 * time.Second

func serveCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "serve", Short: "Run the gate until SIGTERM", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(file)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), cfg, cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&file, "config", defaultConfig, "configuration file")
	return cmd
}

func logger(cfg config.Logging, w io.Writer) *slog.Logger {
	var level slog.Level
	level.UnmarshalText([]byte(cfg.Level)) // validated with the configuration
	o := &slog.HandlerOptions{Level: level}
	if cfg.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// serve runs a gate until ctx ends, and then drains it.
func serve(ctx context.Context, cfg config.Config, stderr io.Writer) (err error) {
	log := logger(cfg.Logging, stderr)
	if err := cfg.MakeState(); err != nil {
		return err
	}
	unlock, err := lockState(cfg.State)
	if err != nil {
		return err
	}
	defer unlock()

	hostKeys, err := sshserver.LoadHostKeys(cfg.SSH.HostKeys, cfg.SSH.CreateHostKeys)
	if err != nil {
		return err
	}
	policy, err := authz.Open(cfg.Policy, log)
	if err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	defer policy.Close()
	instance, err := instanceName(cfg)
	if err != nil {
		return err
	}
	backend, err := openBackend(ctx, cfg, instance, log)
	if err != nil {
		return err
	}
	defer backend.Close()
	way, why := backend.Transport()
	log.Info("sandboxes", "transport", way, "because", why)
	stopReaper := background(backend.Run)
	defer stopReaper()
	audit, err := openLog(ctx, cfg, log)
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), logCloseTime)
		defer cancel()
		if e := audit.Close(ctx); e != nil {
			log.Error("log: not all of it has reached the store; the next start goes on with it", "error", e)
		}
	}()

	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	server, err := sshserver.New(sshserver.Options{
		Config: cfg.SSH, Gate: cfg.Gate, Version: version, HostKeys: hostKeys, Policy: policy, Backend: backend,
		Log: audit, NoData: cfg.Audit.Data == "none", Slog: log, Metrics: sshserver.NewMetrics(registry),
	})
	if err != nil {
		return err
	}
	registry.MustRegister(server, auditMetrics{audit}, policyMetric(policy))
	if limits := cfg.Audit.Store.Prune; limits.Enabled() {
		stopPruning := background(func(ctx context.Context) { prune(ctx, cfg.Audit.Store.Directory, limits, audit, log) })
		defer stopPruning()
	}

	var draining atomic.Bool
	ready := []readiness{
		{"drain", func(context.Context) error {
			if draining.Load() {
				return errors.New("under way")
			}
			return nil
		}},
		{"policy", func(context.Context) error { return policy.Ready() }},
		{cfg.Backend, backend.Ready},
		{"audit", func(context.Context) error { return audit.Ready() }},
	}
	stopMonitor, err := monitor(cfg.Monitor.Listen, registry, ready, func() string { return storeNote(audit) }, log)
	if err != nil {
		return err
	}
	defer stopMonitor()
	stopAdmin, err := admin(cfg.Admin.Socket, server, backend, policy, log)
	if err != nil {
		return err
	}
	defer stopAdmin()

	l, err := net.Listen("tcp", cfg.SSH.Listen)
	if err != nil {
		return fmt.Errorf("ssh: %w", err)
	}
	log.Info("the gate is open", "address", l.Addr().String(), "gate", cfg.Gate, "version", version, "pid", os.Getpid())
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	select {
	case err = <-served:
	case <-ctx.Done():
		log.Info("draining", "time", cfg.SSH.DrainTime.String())
	}
	draining.Store(true)
	// A second signal ends the drain time.
	again, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	server.Shutdown(again)
	return err
}

// backend is what runs sandboxes, and what a gate does with it besides.
type backend interface {
	backends.Backend
	Run(context.Context)
	Ready(context.Context) error
	// Transport says how sandboxes are reached, and why that way.
	Transport() (transport, why string)
	Close() error
}

func openBackend(ctx context.Context, cfg config.Config, instance string, log *slog.Logger) (backend, error) {
	if cfg.Backend == config.BackendKubernetes {
		b, err := kubernetes.New(ctx, cfg.Kubernetes, instance, log)
		if err != nil {
			return nil, err
		}
		return b, nil
	}
	b, err := docker.New(ctx, cfg.Docker, instance, log)
	if err != nil {
		return nil, err
	}
	return b, nil
}

// background runs f until the function it returns is called.
func background(f func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); f(ctx) }()
	return func() { cancel(); <-done }
}

var errStateInUse = errors.New("another gate uses the state directory")

// lockState sees to it that one gate has a state directory.
func lockState(dir string) (unlock func(), err error) {
	name := filepath.Join(dir, "lock")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("state: %w: stop it, or give this one a directory other than %s", errStateInUse, dir)
		}
		return nil, fmt.Errorf("state: lock %s: %w", name, err)
	}
	return func() { f.Close() }, nil
}

// instanceID is the length of the random part of an instance's name.
const instanceID = 10

// instanceName tells this gate's sandboxes from every other gate's on the engine or cluster, also from one of the same name: the
// name and a random number that stays in the state directory.
func instanceName(cfg config.Config) (string, error) {
	file := filepath.Join(cfg.State, "instance")
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		b = []byte(strings.ToLower(rand.Text()[:instanceID]) + "\n")
		err = writeFile(file, b)
	}
	if err != nil {
		return "", fmt.Errorf("state: %w", err)
	}
	id := strings.TrimSpace(string(b))
	if len(id) != instanceID {
		return "", fmt.Errorf("state: %s is damaged: remove it, and this gate's sandboxes (label sallyport.server)", file)
	}
	return cfg.Gate + "-" + id, nil
}

// writeFile makes a file (0600) whole or not at all, also if the power is cut: one left empty would hold up the next start.
func writeFile(name string, b []byte) error {
	f, err := os.OpenFile(name+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// gateOf is the gate's name in an instance's.
func gateOf(instance string) string {
	if n := len(instance) - instanceID - 1; n > 0 && instance[n] == '-' {
		return instance[:n]
	}
	return instance
}

func openLog(ctx context.Context, cfg config.Config, log *slog.Logger) (*auditlog.Log, error) {
	key, err := logSigner(cfg.Audit, true)
	if err != nil {
		return nil, err
	}
	store, err := openStore(cfg.Audit.Store, log)
	if err != nil {
		return nil, err
	}
	return auditlog.Open(ctx, cfg.Audit.Config, key, store, cfg.Gate, log)
}

// openStore opens the log's store; a bucket is not asked yet whether it is there.
func openStore(cfg config.Store, log *slog.Logger) (auditlog.Store, error) {
	if cfg.S3 != nil {
		return s3.NewStore(*cfg.S3, log)
	}
	return file.NewStore(cfg.Directory)
}

// serveHTTP serves until the function it returns is called.
func serveHTTP(l net.Listener, h http.Handler, log *slog.Logger, name string) (stop func()) {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 2 * time.Minute,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error(name, "error", err)
		}
	}()
	return func() { srv.Close(); <-done }
}
