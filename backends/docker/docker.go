// Package docker starts sandboxes as containers of a Docker engine on the same host.
//
// A sandbox is a container whose only program from the gate's side is the agent, mounted read-only from a copy in the
// state directory. The gate listens on a unix socket in a directory made for that sandbox alone; the agent dials it.
// What a sandbox may be is limited here, by the operator's Config, whatever policy asks for.
package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/docker/client"

	"github.com/sallyport/sallyport/backends"
)

// Config is the operator's: where the engine is, and what no policy can exceed.
type Config struct {
	Host  string `yaml:"host"`  // engine's socket; default unix:///var/run/docker.sock
	Agent string `yaml:"agent"` // path of the sallyport-agent binary

	BindPrefixes []string `yaml:"bind_prefixes"` // host directories below which bind mounts may lie; default none
	Volumes      []string `yaml:"volumes"`       // volumes that may be mounted; default none
	Networks     []string `yaml:"networks"`      // networks that may be joined; default none, and "bridge" only if listed
	Runtimes     []string `yaml:"runtimes"`      // OCI runtimes that may be named; default none
	AllowCaps    []string `yaml:"allow_caps"`    // capabilities that may be added, as "NET_RAW"; default none
	AllowRoot    bool     `yaml:"allow_root"`    // whether uid 0 is permitted

	Memory    Size    `yaml:"memory"`     // where a profile names none; default 512Mi
	CPUs      float64 `yaml:"cpus"`       // where a profile names none; default 1
	PIDs      int64   `yaml:"pids"`       // where a profile names none; default 256
	MaxMemory Size    `yaml:"max_memory"` // largest permitted; default 8Gi
	MaxCPUs   float64 `yaml:"max_cpus"`   // largest permitted; default all that the engine has
	MaxPIDs   int64   `yaml:"max_pids"`   // largest permitted; default 4096

	// StateDir is a directory of the gate's own, on the engine's host, for the agent's copy, sockets and scratch space.
	StateDir string `yaml:"-"`
	// ProtectedPaths are never mounted, nor anything in or above them: the gate's config, state, spool, keys, policy.
	ProtectedPaths []string `yaml:"-"`
}

// WithDefaults gives the configuration with its unset values set.
func (c Config) WithDefaults() Config {
	if c.Host == "" {
		c.Host = client.DefaultDockerHost
	}
	if c.Memory == 0 {
		c.Memory = 512 << 20
	}
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.PIDs == 0 {
		c.PIDs = 256
	}
	if c.MaxMemory == 0 {
		c.MaxMemory = 8 << 30
	}
	if c.MaxPIDs == 0 {
		c.MaxPIDs = 4096
	}
	return c
}

// Validate says what is wrong in the configuration, without looking at the machine.
func (c Config) Validate() error {
	var errs []error
	c = c.WithDefaults()
	if !strings.HasPrefix(c.Host, "unix:///") {
		errs = append(errs, fmt.Errorf("host: %q is not a unix socket; the engine must be on the gate's own host", c.Host))
	}
	for _, p := range c.BindPrefixes {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || p == "/" {
			errs = append(errs, fmt.Errorf("bind_prefixes: %q is not a clean absolute path below /", p))
		}
	}
	for _, n := range c.Networks {
		if reason := neverNetwork(n); reason != "" {
			errs = append(errs, fmt.Errorf("networks: %q %s", n, reason))
		}
	}
	for _, name := range c.AllowCaps {
		if reason := neverCap(name); reason != "" {
			errs = append(errs, fmt.Errorf("allow_caps: %q %s", name, reason))
		}
	}
	if c.Memory < minMemory || c.Memory > c.MaxMemory {
		errs = append(errs, fmt.Errorf("memory: must be from %v to max_memory", Size(minMemory)))
	}
	if c.CPUs < minCPUs || c.MaxCPUs != 0 && c.CPUs > c.MaxCPUs {
		errs = append(errs, fmt.Errorf("cpus: must be from %v to max_cpus", minCPUs))
	}
	if c.PIDs < minPIDs || c.PIDs > c.MaxPIDs {
		errs = append(errs, fmt.Errorf("pids: must be from %d to max_pids", minPIDs))
	}
	return errors.Join(errs...)
}

// Backend starts containers. It is safe for concurrent use.
type Backend struct {
	config Config
	gate   string
	log    *slog.Logger
	engine *client.Client
	agent  string // host path of the agent's copy

	// Of the engine, read once by New.
	node     string
	cpus     float64
	prefixes []string // BindPrefixes after symlinks
	guarded  []string // what no bind may touch, after symlinks

	images imageCache

	mu   sync.Mutex          // guards live
	live map[string]*sandbox // by session: from before anything of it exists until all of it is gone
}

var _ backends.Backend = (*Backend)(nil)

// New prepares a backend for the gate of that name, which must be its alone on the engine: what bears it and is not
// known to this Backend is removed by Run. The engine must answer.
func New(ctx context.Context, config Config, gate string, log *slog.Logger) (*Backend, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	if gate == "" || config.StateDir == "" {
		return nil, errors.New("docker: the gate's name or the state directory is missing")
	}
	config = config.WithDefaults()
	// Negotiated: the engine of Debian 12 speaks 1.41.
	engine, err := client.NewClientWithOpts(client.WithHost(config.Host), client.WithAPIVersionNegotiation())
	if err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	b := &Backend{config: config, gate: gate, log: log, engine: engine, live: make(map[string]*sandbox)}
	if err := b.prepare(ctx); err != nil {
		engine.Close()
		return nil, fmt.Errorf("docker: %w", err)
	}
	return b, nil
}

func (b *Backend) prepare(ctx context.Context) error {
	info, err := b.engine.Info(ctx)
	if err != nil {
		return fmt.Errorf("ask the engine: %w", err)
	}
	b.node, b.cpus = info.Name, float64(info.NCPU)
	if b.config.StateDir, err = filepath.Abs(b.config.StateDir); err != nil {
		return err
	}
	for _, dir := range []string{"", runDir, scratchDir} {
		if err := os.MkdirAll(filepath.Join(b.config.StateDir, dir), 0o700); err != nil {
			return err
		}
	}
	hosts := filepath.Join(b.config.StateDir, hostsFile)
	if err := os.WriteFile(hosts, []byte("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"), 0o644); err != nil {
		return err
	}
	if err := os.Chmod(hosts, 0o644); err != nil { // whatever the umask: sandboxes read it
		return err
	}
	if b.agent, err = installAgent(b.config.Agent, filepath.Join(b.config.StateDir, agentDir)); err != nil {
		return fmt.Errorf("install the agent: %w", err)
	}
	host, err := url.Parse(b.config.Host)
	if err != nil {
		return err
	}
	b.guarded = []string{
		"/proc", "/sys", "/dev", "/etc/docker", "/run/containerd", "/run/docker", "/run/docker.sock",
		"/var/lib/containerd", host.Path, info.DockerRootDir, b.config.StateDir,
	}
	b.guarded = append(b.guarded, b.config.ProtectedPaths...)
	for i, p := range b.guarded {
		if b.guarded[i], err = resolve(p); err != nil {
			return fmt.Errorf("protected path: %w", err)
		}
	}
	for _, p := range b.config.BindPrefixes {
		if p, err = filepath.EvalSymlinks(p); err != nil {
			// A prefix that is not there permits nothing.
			b.log.WarnContext(ctx, "bind prefix", "err", err)
			continue
		}
		b.prefixes = append(b.prefixes, p)
	}
	return nil
}

// Ready says whether the engine answers and confines containers as it should.
func (b *Backend) Ready(ctx context.Context) error {
	info, err := b.engine.Info(ctx)
	if err != nil {
		return fmt.Errorf("docker: ask the engine: %w", err)
	}
	if !slices.ContainsFunc(info.SecurityOptions, func(s string) bool {
		return strings.HasPrefix(s, "name=seccomp") && !strings.Contains(s, "unconfined")
	}) {
		return errors.New("docker: the engine applies no seccomp profile")
	}
	if !info.MemoryLimit || !info.PidsLimit {
		return errors.New("docker: the engine can't limit memory or processes")
	}
	return nil
}

// Close closes the connections to the engine. It ends no sandbox: those end when they are closed, or the gate does.
func (b *Backend) Close() error {
	if err := b.engine.Close(); err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	return nil
}

// removeWait bounds what is done to leave nothing behind, whatever became of the context that it was done under.
const removeWait = time.Minute

func detached(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), removeWait)
}
