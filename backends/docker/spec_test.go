package docker

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/image"
	"github.com/goccy/go-yaml"

	"github.com/sallyport/sallyport/backends"
)

// checker returns a Backend that can check specs and has no engine: a spec that passes the check fails on nil.
func checker(t *testing.T, c Config, guarded ...string) *Backend {
	t.Helper()
	b := &Backend{config: c.WithDefaults(), cpus: 4, live: make(map[string]*sandbox), log: slog.New(slog.DiscardHandler)}
	for _, p := range c.BindPrefixes {
		p, err := filepath.EvalSymlinks(p)
		if err != nil {
			t.Fatal(err)
		}
		b.prefixes = append(b.prefixes, p)
	}
	for _, p := range guarded {
		p, err := resolve(p)
		if err != nil {
			t.Fatal(err)
		}
		b.guarded = append(b.guarded, p)
	}
	return b
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"data/app", "data/state/spool", "other", "data-x"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	link := func(to, name string) {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	link("../other", "data/escape")
	link("state", "data/inside")
	link("/", "data/root")
	at := func(p string) string { return filepath.Join(dir, p) }
	config := Config{
		BindPrefixes: []string{at("data")}, Networks: []string{"payments", "bridge"}, Volumes: []string{"vol"},
		AllowCaps: []string{"NET_RAW"}, AllowRoot: true, Runtimes: []string{"runsc"},
	}
	bindTo := func(source string) func(*backends.Template) {
		return func(t *backends.Template) { t.Mounts = []backends.Mount{{Source: source, Target: "/logs"}} }
	}
	target := func(p string) func(*backends.Template) {
		return func(t *backends.Template) { t.Mounts = []backends.Mount{{Source: at("data/app"), Target: p}} }
	}
	for _, test := range []struct {
		name   string
		config Config
		change func(*backends.Template)
		reason string // empty: permitted
	}{
		{"plain", Config{}, func(*backends.Template) {}, ""},
		{"no image", config, func(t *backends.Template) { t.Image = "" }, "no image"},
		{"pull policy", config, func(t *backends.Template) { t.PullPolicy = "x" }, "pull policy"},
		{"root", Config{}, func(t *backends.Template) { t.UID = 0 }, "uid 0"},
		{"root listed", config, func(t *backends.Template) { t.UID = 0 }, ""},
		{"capability", Config{}, func(t *backends.Template) { t.Caps = []string{"NET_RAW"} }, "not listed"},
		{"capability listed", config, func(t *backends.Template) { t.Caps = []string{"NET_RAW"} }, ""},
		{"other capability", config, func(t *backends.Template) { t.Caps = []string{"NET_RAW", "SYS_ADMIN"} }, "not listed"},
		{"all capabilities", config, func(t *backends.Template) { t.Caps = []string{"ALL"} }, "all of them"},
		{"DAC_OVERRIDE", config, func(t *backends.Template) { t.Caps = []string{"DAC_OVERRIDE"} }, "open the agent"},
		{"spelling", config, func(t *backends.Template) { t.Caps = []string{"CAP_NET_RAW"} }, "written"},
		{"namespace", config, func(t *backends.Template) { t.Namespace = "x" }, "Kubernetes"},
		{"node", config, func(t *backends.Template) { t.Nodes = map[string]string{"a": "b"} }, "Kubernetes"},
		{"priority", config, func(t *backends.Template) { t.Priority = "x" }, "Kubernetes"},
		{"spread", config, func(t *backends.Template) { t.Spread = []string{"x"} }, "Kubernetes"},
		{"pod template", config, func(t *backends.Template) { t.Pod = []byte("{}") }, "Kubernetes"},
		{"config map", config, func(t *backends.Template) {
			t.Mounts = []backends.Mount{{Type: "configmap", Source: "vol", Target: "/v"}}
		}, "unknown"},
		{"network", Config{}, func(t *backends.Template) { t.Network = "payments" }, "not listed"},
		{"network listed", config, func(t *backends.Template) { t.Network = "payments" }, ""},
		{"bridge", Config{}, func(t *backends.Template) { t.Network = "bridge" }, "not listed"},
		{"bridge listed", config, func(t *backends.Template) { t.Network = "bridge" }, ""},
		{"bridge's other name", config, func(t *backends.Template) { t.Network = "default" }, "bridge"},
		{"host network", config, func(t *backends.Template) { t.Network = "host" }, "host's"},
		{"container network", config, func(t *backends.Template) { t.Network = "container:x" }, "another container"},
		{"runtime", config, func(t *backends.Template) { t.Runtime = "runc" }, "not listed"},
		{"runtime listed", config, func(t *backends.Template) { t.Runtime = "runsc" }, ""},
		{"host name", config, func(t *backends.Template) { t.Hostname = "a b" }, "host name"},
		{"extra host", config, func(t *backends.Template) { t.ExtraHosts = []string{"h:host-gateway"} }, "extra host"},
		{"extra host v6", config, func(t *backends.Template) { t.ExtraHosts = []string{"h:::1"} }, ""},
		{"environment", config, func(t *backends.Template) { t.Env = []string{"X"} }, "environment"},
		{"much memory", config, func(t *backends.Template) { t.Memory = 9 << 30 }, "memory"},
		{"little memory", config, func(t *backends.Template) { t.Memory = 1 }, "memory"},
		{"negative memory", config, func(t *backends.Template) { t.Memory = -1 }, "memory"},
		{"cpus", config, func(t *backends.Template) { t.CPUs = 5 }, "cpus"},
		{"negative cpus", config, func(t *backends.Template) { t.CPUs = -1 }, "cpus"},
		{"pids", config, func(t *backends.Template) { t.PIDs = 1 << 20 }, "pids"},
		{"unlimited pids", config, func(t *backends.Template) { t.PIDs = -1 }, "pids"},
		{"tmp", config, func(t *backends.Template) { t.TmpSize = 300 << 20 }, "larger than half"},
		{"tmp and home", config, func(t *backends.Template) { t.TmpSize, t.HomeSize = 200<<20, 57<<20 }, "larger than half"},
		{"tmp alone", config, func(t *backends.Template) { t.TmpSize = 255 << 20 }, ""},
		{"tmp all", config, func(t *backends.Template) { t.TmpSize = 256 << 20 }, "no room"},
		{"size overflow", config, func(t *backends.Template) { t.TmpSize, t.HomeSize = 1<<63-1, 1<<63-1 }, "larger"},
		{"scratch", config, func(t *backends.Template) { t.Scratch = "disk" }, "scratch"},
		{"bind", config, bindTo(at("data/app")), ""},
		{"bind of the prefix", config, bindTo(at("data")), "gate's"}, // it holds the state
		{"bind without prefix", Config{}, bindTo(at("data/app")), "no listed prefix"},
		{"bind elsewhere", config, bindTo(at("other")), "no listed prefix"},
		{"bind beside", config, bindTo(at("data-x")), "no listed prefix"},
		{"bind by dots", config, bindTo(at("data/app/../../other")), "no listed prefix"},
		{"bind by link", config, bindTo(at("data/escape")), "no listed prefix"},
		{"bind of the root by link", config, bindTo(at("data/root")), "no listed prefix"},
		{"bind through the root by link", config, bindTo(at("data/root") + dir + "/data/app"), ""},
		{"bind of state", config, bindTo(at("data/state")), "gate's"},
		{"bind in state", config, bindTo(at("data/state/spool")), "gate's"},
		{"bind of state by link", config, bindTo(at("data/inside")), "gate's"},
		{"bind of nothing", config, bindTo(at("data/none")), "bind source"},
		{"relative bind", config, bindTo("data"), "absolute"},
		{"volume", config, func(t *backends.Template) {
			t.Mounts = []backends.Mount{{Type: "volume", Source: "vol", Target: "/v"}}
		}, ""},
		{"other volume", config, func(t *backends.Template) {
			t.Mounts = []backends.Mount{{Type: "volume", Source: "/etc", Target: "/v"}}
		}, "not listed"},
		{"mount type", config, func(t *backends.Template) {
			t.Mounts = []backends.Mount{{Type: "npipe", Source: "vol", Target: "/v"}}
		}, "unknown"},
		{"target of the agent", config, target("/.sallyport/agent"), "not the profile's"},
		{"target above the agent", config, target("/.sallyport"), "not the profile's"},
		{"target root", config, target("/"), "not the profile's"},
		{"target proc", config, target("/proc/1"), "not the profile's"},
		{"target tmp", config, target("/tmp"), "twice"},
		{"target home", config, target(defaultHome), "twice"},
		{"relative target", config, target("logs"), "clean absolute"},
		{"unclean target", config, target("/a/../.sallyport"), "clean absolute"},
		{"home", config, func(t *backends.Template) { t.Home = "/proc" }, "not the profile's"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := checker(t, test.config, at("data/state"))
			spec := newSpec("image")
			test.change(&spec.Template)
			_, err := b.check(spec)
			var refused *backends.RefusedError
			switch {
			case test.reason == "" && err != nil:
				t.Error(err)
			case test.reason != "" && (!errors.As(err, &refused) || !strings.Contains(refused.Reason, test.reason)):
				t.Errorf("%v, want %q", err, test.reason)
			}
			if test.reason == "" {
				return
			}
			// It must not come as far as to ask the engine, of which there is none.
			if _, err := b.Start(context.Background(), spec); !errors.As(err, &refused) || len(b.live) != 0 {
				t.Errorf("Start: %v", err)
			}
		})
	}
	b := checker(t, config)
	spec := newSpec("image")
	for _, session := range []string{"", "..", "a/b", "-x", strings.Repeat("x", 65), "a\n"} {
		spec.Owner.Session = session
		if _, err := b.check(spec); err == nil {
			t.Errorf("session %q passed", session)
		}
	}
}

// TestBuild checks what is asked of the engine where nothing is set.
func TestBuild(t *testing.T) {
	b := checker(t, Config{})
	spec, err := b.check(newSpec("image"))
	if err != nil {
		t.Fatal(err)
	}
	r := build(spec, "gate", "KEY", image.InspectResponse{ID: "sha256:1"}, places{agent: "/a", run: "/r", hosts: "/h", scratch: "/s"})
	h := r.Host
	half := spec.Template.TmpSize + spec.Template.HomeSize
	for what, ok := range map[string]bool{
		"user":            r.Config.User == "1000:1000",
		"read-only":       h.ReadonlyRootfs,
		"not privileged":  !h.Privileged,
		"auto-remove":     h.AutoRemove,
		"no network":      h.NetworkMode == "none" && r.Config.NetworkDisabled,
		"capabilities":    len(h.CapDrop) == 1 && h.CapDrop[0] == "ALL" && len(h.CapAdd) == 0,
		"new privileges":  len(h.SecurityOpt) == 1 && h.SecurityOpt[0] == "no-new-privileges",
		"memory":          h.Memory == 512<<20 && h.MemorySwap == h.Memory,
		"tmpfs":           half <= h.Memory/2 && half > h.Memory/4,
		"cpus":            h.NanoCPUs == 1e9,
		"pids":            h.PidsLimit != nil && *h.PidsLimit == 256,
		"log":             h.LogConfig.Type == "none",
		"ipc":             h.IpcMode == "private",
		"pid, uts, users": h.PidMode == "" && h.UTSMode == "" && h.UsernsMode == "",
		"devices":         len(h.Devices) == 0 && len(h.DeviceRequests) == 0,
		"ports":           len(h.PortBindings) == 0 && !h.PublishAllPorts,
		"mounts":          len(h.Mounts) == 3 && h.Mounts[0].ReadOnly && h.Mounts[1].ReadOnly && h.Mounts[2].ReadOnly && len(h.Binds) == 0,
		"no init":         h.Init != nil && !*h.Init,
		"healthcheck":     r.Config.Healthcheck.Test[0] == "NONE",
		"entry point":     len(r.Config.Entrypoint) == 1 && r.Config.Entrypoint[0] == insideAgent,
		"labels":          r.Config.Labels[labelServer] == "gate" && r.Config.Labels[labelGrant] == "OPS-1",
	} {
		if !ok {
			t.Errorf("%s: %+v", what, r)
		}
	}
}

// TestBuildRelay checks what is asked of an engine that sees none of the gate's files: it is to mount none of them.
func TestBuildRelay(t *testing.T) {
	b := checker(t, Config{})
	b.relay = true
	asked := newSpec("image")
	asked.Template.Scratch = "volume"
	spec, err := b.check(asked)
	if err != nil {
		t.Fatal(err)
	}
	agents := agentFile{hash: strings.Repeat("0123456789abcdef", 4)}.mount()
	r := build(spec, "gate", "KEY", image.InspectResponse{ID: "sha256:1"}, places{volume: &agents, scratch: "scratch"})
	for what, ok := range map[string]bool{
		"agent": len(r.Host.Mounts) == 2 && r.Host.Mounts[0].Type == "volume" && r.Host.Mounts[0].Source == "sallyport-agent-0123456789abcdef0123456789abcdef" &&
			r.Host.Mounts[0].Target == insideDir && r.Host.Mounts[0].ReadOnly && r.Host.Mounts[0].VolumeOptions.NoCopy,
		"home": r.Host.Mounts[1].Type == "volume" && r.Host.Mounts[1].Source == "scratch" && r.Host.Mounts[1].Target == defaultHome &&
			!r.Host.Mounts[1].ReadOnly && len(r.Host.Tmpfs) == 1,
		"binds":      len(r.Host.Binds) == 0,
		"command":    strings.Join(r.Config.Cmd, " ") == "serve --key KEY --home /home/sandbox --relay /tmp/.sallyport-relay",
		"no network": r.Host.NetworkMode == "none" && !r.Config.NetworkDisabled, // the engine makes /etc/hosts
		"read-only":  r.Host.ReadonlyRootfs,
	} {
		if !ok {
			t.Errorf("%s: %+v", what, r)
		}
	}
}

// TestBindsOfEngine: at the paths of an engine elsewhere the gate can't look; they are compared as they are.
func TestBindsOfEngine(t *testing.T) {
	b := checker(t, Config{})
	b.relay, b.prefixes, b.guarded = true, []string{"/only/there"}, []string{"/only/there/engine"}
	for source, want := range map[string]string{
		"/only/there": "", "/only/there/logs": "/only/there/logs", "/only/there//a/./b": "/only/there/a/b",
		"/only/there/../etc": "", "/only/therefore": "", "only/there": "", "/only/there/engine/x": "", "/": "",
	} {
		got, err := b.checkBind(source)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%s: %q, %v", source, got, err)
		}
	}
}

func TestConfig(t *testing.T) {
	if err := (Config{}).Validate(); err != nil {
		t.Error(err)
	}
	for want, c := range map[string]Config{
		"ca, cert and key":    {Host: "tcp://127.0.0.1:2375"},
		"are needed for tcp":  {Host: "tcp://127.0.0.1:2376", TLS: TLS{CA: "/ca", Cert: "/cert"}},
		"is not tcp://HOST":   {Host: "tcp://engine", TLS: TLS{"/ca", "/cert", "/key"}},
		"neither unix":        {Host: "http://engine:2375", TLS: TLS{"/ca", "/cert", "/key"}},
		"neither unix:///":    {Host: "ssh://engine"},
		"tls":                 {TLS: TLS{CA: "/ca"}},
		"transport: \"pipe\"": {Transport: "pipe"},
		"transport: socket":   {Host: "tcp://engine:2376", TLS: TLS{"/ca", "/cert", "/key"}, Transport: "socket"},
		"is the agent's":      {Volumes: []string{volumePrefix + "x"}},
		"bind_prefixes":       {BindPrefixes: []string{"/"}},
		"clean absolute":      {BindPrefixes: []string{"/a/../b"}},
		"networks":            {Networks: []string{"host"}},
		"allow_caps":          {AllowCaps: []string{"DAC_READ_SEARCH"}},
		"memory":              {Memory: 9 << 30},
		"cpus":                {CPUs: 3, MaxCPUs: 2},
		"pids":                {PIDs: 5000},
	} {
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	for _, c := range []Config{
		{Host: "tcp://[::1]:2376", TLS: TLS{"/ca", "/cert", "/key"}}, {Transport: "relay"}, {Transport: "socket"},
		{Host: "tcp://engine.example.com:2376", TLS: TLS{"/ca", "/cert", "/key"}, Transport: "relay"},
	} {
		if err := c.Validate(); err != nil {
			t.Error(err)
		}
	}
	var c Config
	text := []byte("memory: 512Mi\nmax_memory: 4Gi\nallow_root: true\n")
	if err := yaml.UnmarshalWithOptions(text, &c, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	if c.Memory != 512<<20 || c.MaxMemory != 4<<30 {
		t.Errorf("%+v", c)
	}
	if err := yaml.Unmarshal([]byte("memory: 1073741824\n"), &c); err != nil || c.Memory != 1<<30 {
		t.Errorf("%v %v", c.Memory, err)
	}
	if err := yaml.Unmarshal([]byte("memory: 1GB\n"), &c); err == nil {
		t.Error("1GB is a size")
	}
	for text, want := range map[string]Size{"0": 0, "1Ki": 1024, "3": 3, "2Ti": 2 << 40} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want || s.String() != text {
			t.Errorf("%q: %v %v", text, s, err)
		}
	}
	for _, text := range []string{"", "Mi", "-1", "1.5Gi", "99999999999Ti", "1 Gi"} {
		if err := new(Size).UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is a size", text)
		}
	}
}

func TestDigest(t *testing.T) {
	img := image.InspectResponse{ID: "sha256:id", RepoDigests: []string{"other@sha256:1", "host:5000/a/b@sha256:2"}}
	for reference, want := range map[string]string{
		"host:5000/a/b:tag": "host:5000/a/b@sha256:2", "host:5000/a/b": "host:5000/a/b@sha256:2",
		"host:5000/a/b@sha256:2": "host:5000/a/b@sha256:2", "unknown": "other@sha256:1",
	} {
		if got := digest(reference, img); got != want {
			t.Errorf("%s: %s", reference, got)
		}
	}
	if got := digest("x", image.InspectResponse{ID: "sha256:id"}); got != "sha256:id" {
		t.Error(got)
	}
}
