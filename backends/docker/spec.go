package docker

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/mount"

	"github.com/sallyport/sallyport/agent"
	"github.com/sallyport/sallyport/backends"
)

// Where things are inside.
const (
	insideDir   = "/.sallyport"
	insideName  = "agent"
	insideAgent = insideDir + "/" + insideName
	insideRun   = insideDir + "/run"
	defaultHome = "/home/sandbox"
)

const (
	minMemory = 64 << 20 // less does not hold the agent and a shell
	minCPUs   = 0.01     // the engine's own
	minPIDs   = 32       // the agent's threads count
)

// Labels of a container.
const (
	labelServer  = "sallyport.server"
	labelSession = "sallyport.session"
	labelUser    = "sallyport.user"
	labelProfile = "sallyport.profile"
	labelGrant   = "sallyport.grant"
	labelImage   = "sallyport.image"
)

// namePrefix begins every container's name; the session follows.
const namePrefix = "sallyport-"

var (
	sessionPattern  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$`)
	hostnamePattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$`)
)

func refused(format string, args ...any) error {
	return &backends.RefusedError{Reason: fmt.Sprintf(format, args...)}
}

// neverNetwork says why a network can't even be listed by the operator.
func neverNetwork(name string) string {
	switch {
	case name == "host":
		return "shares the host's network"
	case name == "none" || name == "":
		return "is what there is without a network"
	case name == "default":
		return "is another name of bridge"
	case strings.Contains(name, ":"):
		return "shares another container's network"
	}
	return ""
}

// neverCap says why a capability can't even be listed by the operator.
func neverCap(name string) string {
	switch strings.TrimPrefix(strings.ToUpper(name), "CAP_") {
	case "ALL":
		return "is no capability, but all of them"
	case "DAC_OVERRIDE", "DAC_READ_SEARCH":
		return "would open the agent to its own session"
	}
	if strings.HasPrefix(name, "CAP_") || name != strings.ToUpper(name) {
		return "must be written as \"NET_RAW\""
	}
	return ""
}

// check refuses what the operator's configuration does not permit, and fills in defaults. Sources of binds are
// replaced by what they resolve to.
func (b *Backend) check(spec backends.Spec) (backends.Spec, error) {
	t := spec.Template
	c := b.config
	if !sessionPattern.MatchString(spec.Owner.Session) {
		return spec, errors.New("bad session ID")
	}
	if t.Image == "" {
		return spec, refused("no image is named")
	}
	if t.Target != nil {
		if err := b.checkTarget(t); err != nil {
			return spec, err
		}
	}
	switch t.PullPolicy {
	case "", "missing", "always", "never":
	default:
		return spec, refused("pull policy %q is unknown", t.PullPolicy)
	}
	if t.UID == 0 && !c.AllowRoot {
		return spec, refused("uid 0 is not permitted (allow_root)")
	}
	for _, name := range t.Caps {
		if reason := neverCap(name); reason != "" {
			return spec, refused("capability %q %s", name, reason)
		}
		if !slices.Contains(c.AllowCaps, name) {
			return spec, refused("capability %q is not listed (allow_caps)", name)
		}
	}
	if t.Namespace != "" || len(t.Nodes) > 0 || t.Priority != "" || len(t.Spread) > 0 || len(t.Pod) > 0 {
		return spec, refused("namespace, nodes, priority, spread and pod are Kubernetes' alone")
	}
	if t.Network != "" && t.Network != "none" {
		if reason := neverNetwork(t.Network); reason != "" {
			return spec, refused("network %q %s", t.Network, reason)
		}
		if !slices.Contains(c.Networks, t.Network) {
			return spec, refused("network %q is not listed (networks)", t.Network)
		}
	} else {
		t.Network = "none"
	}
	if t.Runtime != "" && !slices.Contains(c.Runtimes, t.Runtime) {
		return spec, refused("runtime %q is not listed (runtimes)", t.Runtime)
	}
	if t.Hostname != "" && !hostnamePattern.MatchString(t.Hostname) {
		return spec, refused("host name %q can't be one", t.Hostname)
	}
	for _, line := range t.ExtraHosts {
		name, address, _ := strings.Cut(line, ":")
		if _, err := netip.ParseAddr(address); err != nil || !hostnamePattern.MatchString(name) {
			return spec, refused("extra host %q is not NAME:ADDRESS", line)
		}
	}
	if err := t.CheckEnv(); err != nil {
		return spec, err
	}
	if err := b.checkLimits(&t); err != nil {
		return spec, err
	}
	var err error
	if t.Mounts, err = b.checkMounts(t); err != nil {
		return spec, err
	}
	spec.Template = t
	return spec, nil
}

func (b *Backend) checkLimits(t *backends.Template) error {
	c := b.config
	if t.Memory == 0 {
		t.Memory = int64(c.Memory)
	}
	if t.Memory < minMemory || t.Memory > int64(c.MaxMemory) {
		return refused("memory %v is not from %v to %v", Size(t.Memory), Size(minMemory), c.MaxMemory)
	}
	if t.CPUs == 0 {
		t.CPUs = min(c.CPUs, b.cpus)
	}
	most := b.cpus
	if c.MaxCPUs != 0 {
		most = min(most, c.MaxCPUs)
	}
	if !(t.CPUs >= minCPUs && t.CPUs <= most) {
		return refused("%v cpus are not from %v to %v", t.CPUs, minCPUs, most)
	}
	if t.PIDs == 0 {
		t.PIDs = c.PIDs
	}
	if t.PIDs < minPIDs || t.PIDs > c.MaxPIDs {
		return refused("%d pids are not from %d to %d", t.PIDs, minPIDs, c.MaxPIDs)
	}
	if t.TmpSize < 0 || t.HomeSize < 0 {
		return refused("a negative size")
	}
	switch t.Scratch {
	case "":
	case "volume":
		t.HomeSize = 0
	default:
		return refused("scratch %q is unknown", t.Scratch)
	}
	// A tmpfs is charged to the memory limit: one that could fill it would have processes killed, where "no space left"
	// is due.
	half := t.Memory / 2
	if t.TmpSize == 0 {
		t.TmpSize = min(half/2, max(half-t.HomeSize, 0))
	}
	if t.HomeSize == 0 && t.Scratch == "" {
		t.HomeSize = min(half/2, max(half-t.TmpSize, 0))
	}
	if t.TmpSize > half || t.HomeSize > half || t.TmpSize+t.HomeSize > half {
		return refused("/tmp and home together are larger than half of the memory")
	}
	if t.TmpSize < 4096 || t.HomeSize < 4096 && t.Scratch == "" {
		return refused("no room is left for /tmp or home")
	}
	return nil
}

// checkMounts also checks home, as it is one.
func (b *Backend) checkMounts(t backends.Template) ([]backends.Mount, error) {
	home := t.Home
	if home == "" {
		home = defaultHome
	}
	taken := []string{"/tmp"}
	target := func(p string) error {
		if !path.IsAbs(p) || path.Clean(p) != p || strings.ContainsAny(p, ":,\x00\n") {
			return refused("target %q is not a clean absolute path", p)
		}
		for _, special := range []string{insideDir, "/proc", "/sys", "/dev"} {
			if overlap(p, special) {
				return refused("target %q is not the profile's to fill", p)
			}
		}
		if slices.Contains(taken, p) {
			return refused("target %q is mounted twice", p)
		}
		taken = append(taken, p)
		return nil
	}
	if err := target(home); err != nil {
		return nil, err
	}
	var mounts []backends.Mount
	for _, m := range t.Mounts {
		if err := target(m.Target); err != nil {
			return nil, err
		}
		switch m.Type {
		case "", "bind":
			source, err := b.checkBind(m.Source)
			if err != nil {
				return nil, err
			}
			m.Type, m.Source = "bind", source
		case "volume":
			if !slices.Contains(b.config.Volumes, m.Source) {
				return nil, refused("volume %q is not listed (volumes)", m.Source)
			}
		default:
			return nil, refused("mount type %q is unknown", m.Type)
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

// checkBind returns what source resolves to, if that may be mounted. Where the engine has other files than the gate, it
// resolves to itself.
func (b *Backend) checkBind(source string) (string, error) {
	if !filepath.IsAbs(source) || strings.ContainsRune(source, 0) {
		return "", refused("bind source %q is not an absolute path", source)
	}
	resolved := filepath.Clean(source)
	if !b.relay {
		var err error
		if resolved, err = filepath.EvalSymlinks(source); err != nil {
			return "", refused("bind source: %v", err)
		}
	}
	if !slices.ContainsFunc(b.prefixes, func(p string) bool { return below(resolved, p) }) {
		return "", refused("bind source %q (%s) lies under no listed prefix (bind_prefixes)", source, resolved)
	}
	for _, p := range b.guarded {
		if overlap(resolved, p) {
			return "", refused("bind source %q (%s) would show what is the gate's or the engine's", source, resolved)
		}
	}
	return resolved, nil
}

// below says whether p is dir, or lies in it. Both are clean.
func below(p, dir string) bool {
	return p == dir || dir == "/" || strings.HasPrefix(p, dir+"/")
}

func overlap(a, b string) bool { return below(a, b) || below(b, a) }

// resolve follows symlinks as far as the path exists.
func resolve(p string) (string, error) {
	p, err := filepath.Abs(p)
	if err != nil {
		return "", err
	}
	rest := ""
	for dir := p; ; dir = filepath.Dir(dir) {
		resolved, err := filepath.EvalSymlinks(dir)
		if err == nil {
			return filepath.Join(resolved, rest), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || dir == "/" {
			return "", err
		}
		rest = filepath.Join(filepath.Base(dir), rest)
	}
}

// request is what the engine is asked for.
type request struct {
	Name   string               `json:"name"`
	Config container.Config     `json:"config"`
	Host   container.HostConfig `json:"host_config"`
}

// places are the host paths of one sandbox; or, where the engine sees none of the gate's, the volume that holds the agent,
// and scratch is a volume, too.
type places struct {
	agent, run, hosts, scratch string
	volume                     *mount.Mount
}

// build makes the engine's request of a checked spec. It is pure: the same in, the same out.
func build(spec backends.Spec, gate, key string, img image.InspectResponse, at places) request {
	t := spec.Template
	home := t.Home
	if home == "" {
		home = defaultHome
	}
	no := false
	config := container.Config{
		Hostname:   t.Hostname,
		User:       id(t.UID) + ":" + id(t.GID),
		Env:        t.Env,
		Image:      img.ID, // not the reference, which may be another image by now
		Entrypoint: []string{insideAgent},
		Cmd:        []string{"serve", "--key", key, "--home", home},
		WorkingDir: "/",
		StopSignal: "SIGKILL", // the agent takes no other
		// It would run outside the agent's tree, with the user's uid.
		Healthcheck: &container.HealthConfig{Test: []string{"NONE"}},
		Labels: map[string]string{
			labelServer:  gate,
			labelSession: spec.Owner.Session,
			labelUser:    spec.Owner.User,
			labelProfile: spec.Owner.Profile,
			labelGrant:   spec.Owner.Grant,
			labelImage:   t.Image,
		},
	}
	host := container.HostConfig{
		AutoRemove:     true,
		NetworkMode:    container.NetworkMode(t.Network),
		RestartPolicy:  container.RestartPolicy{Name: container.RestartPolicyDisabled},
		CapDrop:        []string{"ALL"},
		CapAdd:         t.Caps,
		CgroupnsMode:   container.CgroupnsModePrivate,
		IpcMode:        container.IPCModePrivate,
		SecurityOpt:    []string{"no-new-privileges"},
		ReadonlyRootfs: true,
		// PID 1's output holds no session's bytes, and a driver would only store what a session makes it say.
		LogConfig:  container.LogConfig{Type: "none"},
		ExtraHosts: t.ExtraHosts,
		Runtime:    t.Runtime,
		Init:       &no, // the agent must be the first process itself
		ShmSize:    min(64<<20, t.Memory/16),
		Resources: container.Resources{
			Memory:     t.Memory,
			MemorySwap: t.Memory, // memory and swap together: no swap
			NanoCPUs:   int64(t.CPUs * 1e9),
			PidsLimit:  &t.PIDs,
			Ulimits:    []*container.Ulimit{{Name: "core", Soft: 0, Hard: 0}},
		},
		Tmpfs: map[string]string{"/tmp": tmpfs(t, t.TmpSize)},
	}
	if at.volume != nil {
		config.Cmd = append(config.Cmd, "--relay", agent.RelaySocket)
		host.Mounts = []mount.Mount{*at.volume}
	} else {
		config.Cmd = append(config.Cmd, "--socket", insideRun+"/"+socketName)
		host.Mounts = []mount.Mount{bind(at.agent, insideAgent, false), bind(at.run, insideRun, false)}
	}
	for _, g := range t.Groups {
		host.GroupAdd = append(host.GroupAdd, id(g))
	}
	taken := map[string]bool{"/tmp": true, home: true}
	switch {
	case t.Scratch != "" && at.volume != nil:
		v := readVolume(at.scratch, home)
		v.ReadOnly = false
		host.Mounts = append(host.Mounts, v)
	case t.Scratch != "":
		host.Mounts = append(host.Mounts, bind(at.scratch, home, true))
	default:
		host.Tmpfs[home] = tmpfs(t, t.HomeSize)
	}
	if t.Network == "none" && len(t.ExtraHosts) == 0 && at.hosts != "" {
		// The engine then only makes the network namespace, in which there is a loopback and nothing else, and does not
		// set one up by a program of its own: half of a start's time (measured: 266 and 110 ms). What it leaves out
		// besides is /etc/hosts.
		config.NetworkDisabled = true
		if !slices.ContainsFunc(t.Mounts, func(m backends.Mount) bool { return m.Target == "/etc/hosts" }) {
			host.Mounts = append(host.Mounts, bind(at.hosts, "/etc/hosts", false))
		}
	}
	for _, m := range t.Mounts {
		taken[m.Target] = true
		if m.Type == "bind" {
			host.Mounts = append(host.Mounts, bind(m.Source, m.Target, m.Write))
			continue
		}
		v := readVolume(m.Source, m.Target)
		v.ReadOnly = !m.Write
		host.Mounts = append(host.Mounts, v)
	}
	// The engine would make of each VOLUME of an image a writable and unlimited directory on the host.
	if img.Config != nil {
		var volumes []string
		for p := range img.Config.Volumes {
			if p = path.Clean("/" + p); !taken[p] && !overlap(p, insideDir) && p != "/" {
				taken[p] = true
				volumes = append(volumes, p)
			}
		}
		for _, p := range volumes {
			host.Tmpfs[p] = tmpfs(t, t.Memory/16/int64(len(volumes)))
		}
	}
	return request{Name: namePrefix + spec.Owner.Session, Config: config, Host: host}
}

func id(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

// tmpfs returns mount options. The engine's default is noexec, on which no script of the user's runs. Inodes are
// bounded as their memory is charged to the sandbox beyond size.
func tmpfs(t backends.Template, size int64) string {
	size = max(size&^4095, 4096)
	return fmt.Sprintf("rw,exec,nosuid,nodev,size=%d,nr_inodes=%d,uid=%d,gid=%d,mode=0700",
		size, max(size/4096, 64), t.UID, t.GID)
}

func readVolume(name, target string) mount.Mount {
	return mount.Mount{
		Type: mount.TypeVolume, Source: name, Target: target, ReadOnly: true,
		VolumeOptions: &mount.VolumeOptions{NoCopy: true},
	}
}

func bind(source, target string, write bool) mount.Mount {
	return mount.Mount{
		Type: mount.TypeBind, Source: source, Target: target, ReadOnly: !write,
		BindOptions: &mount.BindOptions{
			Propagation: mount.PropagationRPrivate,
			// The engine makes only the mount itself read-only, not those below it: so there are none.
			NonRecursive: !write,
		},
	}
}
