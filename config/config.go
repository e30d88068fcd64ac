// Package config reads the gate's one YAML file. Each package has its own part; this one composes them, reads strictly,
// and fills in what follows from the state directory.
package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/auditlog/s3"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends/docker"
	"github.com/sallyport/sallyport/backends/kubernetes"
	"github.com/sallyport/sallyport/sshserver"
)

// maxFile bounds the configuration file, in bytes.
const maxFile = 1 << 20

// Config is the whole file.
type Config struct {
	// Gate is this gate's name in records and on its sandboxes. Empty: the host's name.
	Gate string `yaml:"gate"`
	// State is the directory of all the gate keeps: host keys, log key, spool, the agent's copies. One gate has it.
	State string `yaml:"state"`
	// SSH is the gate itself.
	SSH sshserver.Config `yaml:"ssh"`
	// Policy is where users, profiles, grants and rules lie.
	Policy authz.Config `yaml:"policy"`
	// Audit is the log.
	Audit Audit `yaml:"audit"`
	// Backend says which of the two that follow runs the sandboxes: docker or kubernetes.
	Backend string `yaml:"backend"`
	// Docker is the engine that runs the sandboxes, and its limits.
	Docker docker.Config `yaml:"docker"`
	// Kubernetes is the cluster that runs the sandboxes, and its limits.
	Kubernetes kubernetes.Config `yaml:"kubernetes"`
	// Monitor serves health and metrics.
	Monitor Monitor `yaml:"monitor"`
	// Admin is the socket of the session and grant commands.
	Admin Admin `yaml:"admin"`
	// Logging is the gate's own log to standard error.
	Logging Logging `yaml:"logging"`
}

// Values of Config.Backend.
const (
	BackendDocker     = "docker"
	BackendKubernetes = "kubernetes"
)

// Audit is the log's part.
type Audit struct {
	auditlog.Config `yaml:",inline"`
	// Key is the file of the Ed25519 key that signs the log; made at the first start. Empty: log.key in the state directory.
	Key string `yaml:"key"`
	// SigningCommand signs instead of a key in a file: it gets the message on its standard input and writes the 64 bytes of the
	// Ed25519 signature. SigningAgent is the unix socket of an ssh-agent that does. One of the two, with PublicKey.
	SigningCommand []string `yaml:"signing_command"`
	SigningAgent   string   `yaml:"signing_agent"`
	// PublicKey is the file of the public key with which the command or the agent signs.
	PublicKey string `yaml:"public_key"`
	// Data is all, or none: then what sessions pass is not recorded, only what was asked for and how it ended, and every
	// session's log says so.
	Data string `yaml:"data"`
	// Store is where sealed segments go.
	Store Store `yaml:"store"`
}

func (a Audit) validateSigner() error {
	command, agent := len(a.SigningCommand) > 0, a.SigningAgent != ""
	switch {
	case command && agent:
		return errors.New("audit: signing_command and signing_agent: write one of them")
	case !command && !agent && a.PublicKey != "":
		return errors.New("audit.public_key: is of signing_command or signing_agent, and neither is there")
	case !command && !agent:
		return nil
	case a.Key != "":
		return errors.New("audit.key: a key in a file, and signing_command or signing_agent: write one of them")
	case a.PublicKey == "":
		return errors.New("audit.public_key: the file of the public key is needed beside signing_command and signing_agent")
	case command && !filepath.IsAbs(a.SigningCommand[0]):
		return fmt.Errorf("audit.signing_command: %q: the program needs its whole path", a.SigningCommand[0])
	}
	return nil
}

// Store is one store: a directory or a bucket.
type Store struct {
	// Directory is a directory on this machine. Empty, and no other store: log in the state directory.
	Directory string `yaml:"directory"`
	// Prune says which logs a directory forgets. A bucket forgets by rules of its own: the gate can't remove anything there.
	Prune file.Prune `yaml:"prune"`
	// S3 is a bucket. The gate's credential needs s3:PutObject on the prefix and nothing else.
	S3 *s3.Config `yaml:"s3"`
}

// paths are the store's files on this machine; some may be empty.
func (s Store) paths() []string {
	if s.S3 == nil {
		return []string{s.Directory}
	}
	return []string{s.S3.CredentialsFile, s.S3.SSE.KeyFile}
}

func (s Store) validate() error {
	if s.S3 == nil {
		if err := s.Prune.Validate(); err != nil {
			return fmt.Errorf("audit.store.prune.%w", err)
		}
		return nil
	}
	if s.Directory != "" {
		return errors.New("audit.store: directory and s3: write one of them")
	}
	if s.Prune.Enabled() {
		return errors.New("audit.store.prune: only a directory is pruned: give the bucket a lifecycle rule")
	}
	if err := s.S3.WithDefaults().Validate(); err != nil {
		return fmt.Errorf("audit.store.s3.%w", err)
	}
	return nil
}

// Monitor is the listener of /healthz, /readyz and /metrics.
type Monitor struct {
	// Listen is a TCP address; empty: none.
	Listen string `yaml:"listen"`
}

// Admin is the operator's socket.
type Admin struct {
	// Socket is a unix socket with mode 0600. Empty: admin.sock in the state directory.
	Socket string `yaml:"socket"`
}

// Logging is the gate's own log.
type Logging struct {
	// Format is text or json.
	Format string `yaml:"format"`
	// Level is debug, info, warn or error.
	Level string `yaml:"level"`
}

// Default is the configuration of an empty file.
func Default() Config {
	return Config{
		State:      "/var/lib/sallyport",
		SSH:        sshserver.DefaultConfig(),
		Backend:    BackendDocker,
		Docker:     docker.Config{}.WithDefaults(),
		Kubernetes: kubernetes.Config{}.WithDefaults(),
		Audit:      Audit{Config: auditlog.Config{Index: true}.WithDefaults(), Data: "all"},
		Monitor:    Monitor{Listen: "127.0.0.1:9222"},
		Logging:    Logging{Format: "text", Level: "info"},
	}
}

// Load reads a file. Relative paths in it are relative to its directory. Errors name line and column where they can.
func Load(file string) (Config, error) {
	f, err := os.Open(file)
	if err != nil {
		return Config{}, fmt.Errorf("config: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return Config{}, fmt.Errorf("config %s: %w", file, err)
	}
	dir, err := filepath.Abs(filepath.Dir(file))
	if err != nil {
		return Config{}, fmt.Errorf("config %s: %w", file, err)
	}
	c, err := Parse(b, dir)
	if err != nil {
		return Config{}, fmt.Errorf("config %s: %w", file, err)
	}
	c.Docker.ProtectedPaths = append(c.Docker.ProtectedPaths, filepath.Join(dir, filepath.Base(file)))
	return c, nil
}

var gateName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$`)

// Parse reads a configuration whose relative paths are relative to dir.
func Parse(b []byte, dir string) (Config, error) {
	c := Default()
	if len(b) > maxFile {
		return c, errors.New("larger than 1 MiB")
	}
	dec := yaml.NewDecoder(bytes.NewReader(b), yaml.Strict())
	switch err := dec.Decode(&c); {
	case errors.Is(err, io.EOF): // nothing in it; the decoder has cleared c
		c = Default()
	case err != nil:
		return c, fmt.Errorf("%s%s", strings.TrimSpace(yaml.FormatError(err, false, true)), sizePlace(b))
	}
	if c.Gate == "" {
		h, err := os.Hostname()
		if err != nil {
			return c, fmt.Errorf("gate: no name given, and %w", err)
		}
		c.Gate = strings.ReplaceAll(h, ".", "-")
	}
	if !gateName.MatchString(c.Gate) {
		return c, fmt.Errorf("gate: %q: write letters, digits, dash and underscore, at most 63", c.Gate)
	}
	if c.State == "" {
		return c, errors.New("state: a directory is needed")
	}
	if c.Policy.Data == "" {
		return c, errors.New("policy.data: the directory of users, profiles and grants is needed")
	}
	abs := func(p *string, def string) {
		if *p == "" {
			*p = def
		}
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	abs(&c.State, "")
	in := func(name string) string { return filepath.Join(c.State, name) }
	if len(c.SSH.HostKeys) == 0 {
		for _, n := range sshserver.HostKeyNames {
			c.SSH.HostKeys = append(c.SSH.HostKeys, in(n))
		}
	}
	for i := range c.SSH.HostKeys {
		abs(&c.SSH.HostKeys[i], "")
	}
	abs(&c.Policy.Data, "")
	abs(&c.Policy.Policy, "")
	if len(c.Audit.SigningCommand) == 0 && c.Audit.SigningAgent == "" {
		abs(&c.Audit.Key, in("log.key"))
	}
	abs(&c.Audit.Key, "")
	abs(&c.Audit.SigningAgent, "")
	abs(&c.Audit.PublicKey, "")
	c.Audit.Tree = in("tlog")
	abs(&c.Audit.Spool, in("spool"))
	abs(&c.Audit.RecipientsFile, "")
	if c.Audit.Store.S3 == nil {
		abs(&c.Audit.Store.Directory, in("log"))
	} else {
		abs(&c.Audit.Store.S3.CredentialsFile, "")
		abs(&c.Audit.Store.S3.CAFile, "")
		abs(&c.Audit.Store.S3.SSE.KeyFile, "")
	}
	abs(&c.Admin.Socket, in("admin.sock"))
	abs(&c.Docker.StateDir, in("docker"))
	if c.Docker.Agent == "" {
		// The agent's file lies beside the gate's.
		if exe, err := os.Executable(); err == nil {
			c.Docker.Agent = filepath.Join(filepath.Dir(exe), "sallyport-agent")
		}
	}
	abs(&c.Docker.Agent, "")
	abs(&c.Kubernetes.Kubeconfig, "")
	for _, p := range []*string{&c.Docker.TLS.CA, &c.Docker.TLS.Cert, &c.Docker.TLS.Key} {
		if abs(p, ""); *p != "" {
			c.Docker.ProtectedPaths = append(c.Docker.ProtectedPaths, *p)
		}
	}
	for i := range c.Docker.BindPrefixes {
		abs(&c.Docker.BindPrefixes[i], "")
	}
	// What a sandbox may never see, whatever policy and prefixes say.
	c.Docker.ProtectedPaths = append(c.Docker.ProtectedPaths, c.State, c.Policy.Data, c.Audit.Spool, c.Admin.Socket)
	if c.Audit.Key != "" {
		c.Docker.ProtectedPaths = append(c.Docker.ProtectedPaths, c.Audit.Key)
	}
	for _, p := range append(c.Audit.Store.paths(), c.Audit.SigningAgent) {
		if p != "" {
			c.Docker.ProtectedPaths = append(c.Docker.ProtectedPaths, p)
		}
	}
	c.Docker.ProtectedPaths = append(c.Docker.ProtectedPaths, c.SSH.HostKeys...)
	if c.Policy.Policy != "" {
		c.Docker.ProtectedPaths = append(c.Docker.ProtectedPaths, c.Policy.Policy)
	}
	return c, c.validate()
}

// sizePlace is the place of a size that does not parse: the decoder gives none for types with a text form of their own.
func sizePlace(b []byte) string {
	for at, size := range map[string]encoding.TextUnmarshaler{
		"$.docker.memory": new(docker.Size), "$.docker.max_memory": new(docker.Size),
		"$.kubernetes.memory": new(kubernetes.Size), "$.kubernetes.max_memory": new(kubernetes.Size),
		"$.kubernetes.storage": new(kubernetes.Size), "$.kubernetes.max_storage": new(kubernetes.Size),
	} {
		path, err := yaml.PathString(at)
		if err != nil {
			continue
		}
		var text string
		if path.Read(bytes.NewReader(b), &text) != nil || size.UnmarshalText([]byte(text)) == nil {
			continue
		}
		if source, err := path.AnnotateSource(b, false); err == nil {
			return fmt.Sprintf(" (%s)\n%s", strings.TrimPrefix(at, "$."), strings.TrimRight(string(source), "\n"))
		}
	}
	return ""
}

func (c Config) validate() error {
	if err := c.Docker.Validate(); err != nil {
		return fmt.Errorf("docker.%w", err)
	}
	if err := c.SSH.Validate(); err != nil {
		return err
	}
	if err := c.Audit.Store.validate(); err != nil {
		return err
	}
	if err := c.Audit.validateSigner(); err != nil {
		return err
	}
	switch c.Backend {
	case BackendDocker:
	case BackendKubernetes:
		if err := c.Kubernetes.Validate(); err != nil {
			return fmt.Errorf("kubernetes.%w", err)
		}
	default:
		return fmt.Errorf("backend: %q is none of docker, kubernetes", c.Backend)
	}
	if c.Monitor.Listen != "" {
		if _, _, err := net.SplitHostPort(c.Monitor.Listen); err != nil {
			return fmt.Errorf("monitor.listen: %q is no address: write host:port, or \"\" for none", c.Monitor.Listen)
		}
	}
	switch c.Audit.Data {
	case "all", "none":
	default:
		return fmt.Errorf("audit.data: %q is none of all, none", c.Audit.Data)
	}
	switch c.Logging.Format {
	case "text", "json":
	default:
		return fmt.Errorf("logging.format: %q is none of text, json", c.Logging.Format)
	}
	switch c.Logging.Level {
	case "debug", "info", "warn", "error":
	default:
		return fmt.Errorf("logging.level: %q is none of debug, info, warn, error", c.Logging.Level)
	}
	return nil
}

// MakeState makes the state directory, readable by its owner alone.
func (c Config) MakeState() error {
	if err := os.MkdirAll(c.State, 0o700); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	st, err := os.Stat(c.State)
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	if st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("state: %s has mode %04o, so others can write it: %w", c.State, st.Mode().Perm(), fs.ErrPermission)
	}
	return nil
}
