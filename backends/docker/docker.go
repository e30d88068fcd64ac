// Package docker starts sandboxes as containers of a Docker engine.
//
// A sandbox is a container whose only program from the gate's side is the agent. Where gate and engine share a file
// system, the agent is mounted read-only from a copy in the state directory, and the gate listens on a unix socket in a
// directory made for that sandbox alone, which the agent dials. Elsewhere the agent lies in a volume, and is reached by
// a relay that the engine executes in the container. What a sandbox may be is limited here, by the operator's Config, whatever policy asks for.
package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/docker/docker/client"

	"github.com/sallyport/sallyport/backends"
)

// Config is the operator's: where the engine is, and what no policy can exceed.
type Config struct {
	Host      string `yaml:"host"`      // unix:///PATH or tcp://HOST:PORT; default unix:///var/run/docker.sock
	TLS       TLS    `yaml:"tls"`       // for tcp, and required there
	Transport string `yaml:"transport"` // how agents are reached: auto (default), socket or relay
	Agent     string `yaml:"agent"`     // path of the sallyport-agent binary

	BindPrefixes []string `yaml:"bind_prefixes"` // host directories below which bind mounts may lie; default none
	Volumes      []string `yaml:"volumes"`       // volumes that may be mounted; default none
	Networks     []string `yaml:"networks"`      // networks that may be joined; default none, and "bridge" only if listed
	Runtimes     []string `yaml:"runtimes"`      // OCI runtimes that may be named; default none
	AllowCaps    []string `yaml:"allow_caps"`    // capabilities that may be added, as "NET_RAW"; default none
	AllowRoot    bool     `yaml:"allow_root"`    // whether uid 0 is permitted
	Targets      Targets  `yaml:"targets"`       // containers that may be joined; default none

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

// TLS are the files, in PEM, that gate and engine know each other by.
type TLS struct {
	CA   string `yaml:"ca"`   // certificates that may have signed the engine's; no others may
	Cert string `yaml:"cert"` // the gate's, for its client
	Key  string `yaml:"key"`  // its private key
}

// WithDefaults gives the configuration with its unset values set.
func (c Config) WithDefaults() Config {
	if c.Host == "" {
		c.Host = client.DefaultDockerHost
	}
	if c.Transport == "" {
		c.Transport = transportAuto
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
	errs = append(errs, c.validateHost()...)
	for _, v := range c.Volumes {
		if strings.HasPrefix(v, volumePrefix) {
			errs = append(errs, fmt.Errorf("volumes: %q is the agent's", v))
		}
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
	errs = append(errs, c.Targets.validate()...)
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

func (c Config) validateHost() (errs []error) {
	switch {
	case strings.HasPrefix(c.Host, "unix:///"):
		if c.TLS != (TLS{}) {
			errs = append(errs, errors.New("tls: a unix socket has none; write host: tcp://HOST:PORT"))
		}
	case strings.HasPrefix(c.Host, "tcp://"):
		host, port, err := net.SplitHostPort(strings.TrimPrefix(c.Host, "tcp://"))
		if n, nerr := strconv.ParseUint(port, 10, 16); err != nil || host == "" || nerr != nil || n == 0 {
			errs = append(errs, fmt.Errorf("host: %q is not tcp://HOST:PORT", c.Host))
		}
		// Who can speak to an engine without it is root on its machine, and so is who can listen on the way.
		if c.TLS.CA == "" || c.TLS.Cert == "" || c.TLS.Key == "" {
			errs = append(errs, errors.New("tls: ca, cert and key are needed for tcp"))
		}
	default:
		errs = append(errs, fmt.Errorf("host: %q is neither unix:///PATH nor tcp://HOST:PORT", c.Host))
	}
	switch c.Transport {
	case transportAuto, transportRelay:
	case transportSocket:
		if !strings.HasPrefix(c.Host, "unix://") {
			errs = append(errs, errors.New("transport: socket needs an engine on the gate's own machine, by a unix socket"))
		}
	default:
		errs = append(errs, fmt.Errorf("transport: %q is none of auto, socket, relay", c.Transport))
	}
	return errs
}

// Backend starts containers. It is safe for concurrent use.
type Backend struct {
	config Config
	gate   string
	log    *slog.Logger
	engine *client.Client
	file   agentFile
	relay  bool   // agents are reached by relays, and the engine sees no file of the gate's
	why    string // relay is so
	agent  string // host path of the agent's copy, without relay

	// Of the engine, read once by New.
	node     string
	cpus     float64
	prefixes []string // BindPrefixes after symlinks
	guarded  []string // what no bind may touch, after symlinks

	helperAge time.Duration // less in a test

	filling sync.Mutex // one fills the agent's volume at a time

	images imageCache
	joins  sync.Mutex // held while a target's sandboxes are counted and one more is created

	mu     sync.Mutex          // guards filled and live
	filled string              // the word of the volume that is known to hold the agent
	live   map[string]*sandbox // by session: from before anything of it exists until all of it is gone
}

var (
	_ backends.Backend = (*Backend)(nil)
	_ backends.Joiner  = (*Backend)(nil)
)

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
	options := []client.Opt{client.WithHost(config.Host), client.WithAPIVersionNegotiation()}
	if config.TLS != (TLS{}) {
		options = append(options, client.WithTLSClientConfig(config.TLS.CA, config.TLS.Cert, config.TLS.Key))
	}
	engine, err := client.NewClientWithOpts(options...)
	if err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	b := &Backend{config: config, gate: gate, log: log, engine: engine, live: make(map[string]*sandbox), helperAge: helperAge}
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
	if b.file, err = readAgent(b.config.Agent); err != nil {
		return fmt.Errorf("read the agent: %w", err)
	}
	if err := b.choose(ctx); err != nil {
		return err
	}
	if b.relay {
		if err = b.replaceVolume(ctx); err == nil {
			_, err = b.fillVolume(ctx)
		}
	} else {
		b.agent, err = installAgent(b.file, filepath.Join(b.config.StateDir, agentDir))
		b.file.content = nil // the copy stays; a volume, which may be removed, is filled again from memory
	}
	if err != nil {
		return fmt.Errorf("install the agent: %w", err)
	}
	b.guarded = []string{
		"/proc", "/sys", "/dev", "/etc/docker", "/run/containerd", "/run/docker", "/run/docker.sock", "/var/run/docker.sock",
		"/var/lib/containerd", info.DockerRootDir, b.config.StateDir,
	}
	if path, ok := strings.CutPrefix(b.config.Host, "unix://"); ok {
		b.guarded = append(b.guarded, path)
	}
	b.guarded = append(b.guarded, b.config.ProtectedPaths...)
	for i, p := range b.guarded {
		if b.guarded[i], err = resolve(p); err != nil {
			return fmt.Errorf("protected path: %w", err)
		}
	}
	for _, p := range b.config.BindPrefixes {
		if b.relay {
			b.prefixes = append(b.prefixes, p) // the engine's, which nobody here can look at
			continue
		}
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
