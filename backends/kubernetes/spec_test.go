package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"

	"github.com/sallyport/sallyport/backends"
)

// checker returns a Backend that can check specs and has no cluster.
func checker(c Config) *Backend {
	return &Backend{
		config: c.WithDefaults(), gate: "gate", log: slog.New(slog.DiscardHandler), tries: rate.NewLimiter(1, 1),
		live: make(map[string]*sandbox), used: make(map[slot]bool),
	}
}

func plainSpec() backends.Spec {
	return backends.Spec{
		Template: backends.Template{Image: "debug:1", UID: 1000, GID: 1000},
		Owner:    backends.Owner{Session: "s1", User: "alice@corp", Profile: "p", Grant: "OPS/1", Expires: time.Unix(2e9, 0)},
	}
}

func TestRefusals(t *testing.T) {
	config := Config{
		Namespaces: []string{"debug"}, AllowCaps: []string{"NET_RAW"}, AllowRoot: true, Runtimes: []string{"gvisor"}, Runtime: "kata",
		Priorities: []string{"low"}, NodeLabels: []string{"pool", "zone"}, NodeSelector: map[string]string{"zone": "a"},
		Claims: []string{"logs", "work"}, WriteClaims: []string{"work"}, ConfigMaps: []string{"settings"}, Secrets: []string{"ca"},
		Images: []string{"tools/*", "data:1"}, HostPaths: []string{"/var/log"}, NodePIDs: 512,
		Networks: map[string]Network{"db": {}},
	}
	mount := func(m backends.Mount) func(*backends.Template) {
		if m.Target == "" {
			m.Target = "/data"
		}
		return func(t *backends.Template) { t.Mounts = []backends.Mount{m} }
	}
	at := func(target string) func(*backends.Template) {
		return mount(backends.Mount{Type: "configmap", Source: "settings", Target: target})
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
		{"namespace", Config{}, func(t *backends.Template) { t.Namespace = "debug" }, "not listed"},
		{"namespace listed", config, func(t *backends.Template) { t.Namespace = "debug" }, ""},
		{"namespace by default", Config{}, func(t *backends.Template) { t.Namespace = "sallyport-sandboxes" }, ""},
		{"root", Config{}, func(t *backends.Template) { t.UID = 0 }, "uid 0"},
		{"root listed", config, func(t *backends.Template) { t.UID = 0 }, ""},
		{"the agent's uid", config, func(t *backends.Template) { t.UID = agentUID }, "agent's"},
		{"capability", Config{}, func(t *backends.Template) { t.Caps = []string{"NET_RAW"} }, "not listed"},
		{"capability listed", config, func(t *backends.Template) { t.Caps = []string{"NET_RAW"} }, ""},
		{"all capabilities", config, func(t *backends.Template) { t.Caps = []string{"ALL"} }, "all of them"},
		{"DAC_READ_SEARCH", config, func(t *backends.Template) { t.Caps = []string{"DAC_READ_SEARCH"} }, "open the agent"},
		{"network", Config{}, func(t *backends.Template) { t.Network = "db" }, "not listed"},
		{"network listed", config, func(t *backends.Template) { t.Network = "db" }, ""},
		{"no network", config, func(t *backends.Template) { t.Network = "none" }, ""},
		{"node's network", config, func(t *backends.Template) { t.Network = "host" }, "node's network"},
		{"runtime", Config{}, func(t *backends.Template) { t.Runtime = "gvisor" }, "not listed"},
		{"runtime listed", config, func(t *backends.Template) { t.Runtime = "gvisor" }, ""},
		{"runtime by default", config, func(t *backends.Template) { t.Runtime = "kata" }, ""},
		{"priority", config, func(t *backends.Template) { t.Priority = "system-node-critical" }, "not listed"},
		{"priority listed", config, func(t *backends.Template) { t.Priority = "low" }, ""},
		{"node", config, func(t *backends.Template) { t.Nodes = map[string]string{"kubernetes.io/hostname": "x"} }, "not listed"},
		{"node listed", config, func(t *backends.Template) { t.Nodes = map[string]string{"pool": "x", "zone": "a"} }, ""},
		{"operator's node", config, func(t *backends.Template) { t.Nodes = map[string]string{"zone": "b"} }, "operator's"},
		{"host name", config, func(t *backends.Template) { t.Hostname = "a.b" }, "host name"},
		{"extra host", config, func(t *backends.Template) { t.ExtraHosts = []string{"h:host-gateway"} }, "extra host"},
		{"environment", config, func(t *backends.Template) { t.Env = []string{"X"} }, "environment"},
		{"much memory", config, func(t *backends.Template) { t.Memory = 9 << 30 }, "memory"},
		{"little memory", config, func(t *backends.Template) { t.Memory = 1 }, "memory"},
		{"cpus", config, func(t *backends.Template) { t.CPUs = 9 }, "cpus"},
		{"pids", config, func(t *backends.Template) { t.PIDs = 600 }, ""},
		{"fewer pids than nodes permit", config, func(t *backends.Template) { t.PIDs = 256 }, "node_pids"},
		{"pids of unknown nodes", Config{}, func(t *backends.Template) { t.PIDs = 4096 }, "node_pids"},
		{"tmp", config, func(t *backends.Template) { t.TmpSize = 300 << 20 }, "larger than half"},
		{"tmp and home", config, func(t *backends.Template) { t.TmpSize, t.HomeSize = 200<<20, 57<<20 }, "larger than half"},
		{"home on disk", config, func(t *backends.Template) { t.Scratch, t.HomeSize = "volume", 12<<30 }, ""},
		{"home on too much disk", config, func(t *backends.Template) { t.Scratch, t.HomeSize = "volume", 17<<30 }, "scratch volume"},
		{"size overflow", config, func(t *backends.Template) { t.TmpSize, t.HomeSize = 1<<63-1, 1<<63-1 }, "larger"},
		{"scratch", config, func(t *backends.Template) { t.Scratch = "disk" }, "scratch"},
		{"claim", config, mount(backends.Mount{Type: "pvc", Source: "logs"}), ""},
		{"other claim", config, mount(backends.Mount{Type: "pvc", Source: "etcd"}), "not listed"},
		{"claim to write", config, mount(backends.Mount{Type: "pvc", Source: "work", Write: true}), ""},
		{"claim not to write", config, mount(backends.Mount{Type: "pvc", Source: "logs", Write: true}), "write_claims"},
		{"config map", config, mount(backends.Mount{Type: "configmap", Source: "settings"}), ""},
		{"config map to write", config, mount(backends.Mount{Type: "configmap", Source: "settings", Write: true}), "only a claim"},
		{"other config map", config, mount(backends.Mount{Type: "configmap", Source: "ca"}), "not listed"},
		{"secret", config, mount(backends.Mount{Type: "secret", Source: "ca"}), ""},
		{"other secret", config, mount(backends.Mount{Type: "secret", Source: "settings"}), "not listed"},
		{"projected", config, mount(backends.Mount{Type: "projected", Source: "configmap:settings,secret:ca"}), ""},
		{"projected other", config, mount(backends.Mount{Type: "projected", Source: "configmap:settings,secret:settings"}), "not listed"},
		{"projected token", config, mount(backends.Mount{Type: "projected", Source: "serviceaccounttoken:x"}), "projected source"},
		{"projected nothing", config, mount(backends.Mount{Type: "projected", Source: ""}), "projected source"},
		{"image", config, mount(backends.Mount{Type: "image", Source: "tools/gdb:1"}), ""},
		{"other image", config, mount(backends.Mount{Type: "image", Source: "data:2"}), "not listed"},
		{"host path", config, mount(backends.Mount{Source: "/var/log/app"}), ""},
		{"host path by default", Config{}, mount(backends.Mount{Source: "/var/log/app"}), "no listed directory"},
		{"host path beside", config, mount(backends.Mount{Source: "/var/log-x"}), "no listed directory"},
		{"host path by dots", config, mount(backends.Mount{Source: "/var/log/../lib"}), "clean absolute"},
		{"host path to write", config, mount(backends.Mount{Source: "/var/log/app", Write: true}), "only a claim"},
		{"volume", config, mount(backends.Mount{Type: "volume", Source: "logs"}), "unknown"},
		{"target of the agent", config, at("/.sallyport/agent"), "not the profile's"},
		{"target above the agent", config, at("/.sallyport"), "not the profile's"},
		{"target root", config, at("/"), "not the profile's"},
		{"target of a token", config, at("/var/run/secrets/kubernetes.io/serviceaccount"), "not the profile's"},
		{"target tmp", config, at("/tmp"), "twice"},
		{"target home", config, at(defaultHome), "twice"},
		{"target below tmp", config, at("/tmp/.sallyport-relay"), "below"},
		{"relative target", config, at("logs"), "clean absolute"},
		{"home", config, func(t *backends.Template) { t.Home = "/proc" }, "not the profile's"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := checker(test.config)
			spec := plainSpec()
			test.change(&spec.Template)
			_, err := b.check(spec)
			var refused *backends.RefusedError
			switch {
			case test.reason == "" && err != nil:
				t.Error(err)
			case test.reason != "" && (!errors.As(err, &refused) || !strings.Contains(refused.Reason, test.reason)):
				t.Errorf("%v, want a refusal with %q", err, test.reason)
			}
			if test.reason != "" {
				// And nothing is asked of the cluster, which is nil.
				if _, err := b.Start(context.Background(), spec); !errors.As(err, &refused) || len(b.live) != 0 {
					t.Errorf("Start: %v", err)
				}
			}
		})
	}
}

func TestConfig(t *testing.T) {
	if err := (Config{}).Validate(); err != nil {
		t.Error(err)
	}
	for want, c := range map[string]Config{
		"in_cluster":         {InCluster: true, Context: "x"},
		"namespaces":         {Namespaces: []string{"A"}},
		"agent_by":           {AgentBy: "magic"},
		"stream":             {Stream: "magic"},
		"direct_from: say":   {Stream: "direct"},
		"direct_from: is":    {DirectFrom: []Peer{{CIDR: "192.0.2.0/24"}}},
		"direct_from: the":   {Stream: "direct", PolicyMode: "refer", DirectFrom: []Peer{{CIDR: "192.0.2.0/24"}}},
		"direct_from: write": {Stream: "direct", DirectFrom: []Peer{{}}},
		"direct_port":        {Stream: "direct", DirectPort: 22, DirectFrom: []Peer{{CIDR: "192.0.2.0/24"}}},
		"owner":              {Owner: "secret/x"},
		`owner: "config`:     {Owner: "configmap/A B"},
		"pod_templates: is":  {Taints: []string{"x"}},
		"the gate's own":     {PodTemplates: true, PodLabels: []string{"sallyport.network"}},
		"allow_host: with":   {PodTemplates: true, AllowHost: []string{"pid"}},
		`allow_host: "x`:     {PodTemplates: true, AllowHost: []string{"x"}},
		"network_policies":   {PolicyMode: "none"},
		"host_paths":         {HostPaths: []string{"/"}},
		"allow_caps":         {AllowCaps: []string{"ALL"}},
		"write_claims":       {WriteClaims: []string{"x"}},
		"tolerations":        {Tolerations: []Toleration{{Operator: "In"}}},
		`"none"`:             {Networks: map[string]Network{"none": {}}},
		"networks.db.egress": {Networks: map[string]Network{"db": {Egress: []Egress{{}}}}},
		"is no port":         {Networks: map[string]Network{"db": {Egress: []Egress{{CIDR: "192.0.2.0/24", TCP: []int32{0}}}}}},
		"is no network":      {Networks: map[string]Network{"db": {Egress: []Egress{{CIDR: "192.0.2.1/24"}}}}},
		"writes no policies": {PolicyMode: "refer", Networks: map[string]Network{"db": {Egress: []Egress{{CIDR: "192.0.2.0/24"}}}}},
		"the gate names":     {Networks: map[string]Network{"db": {Policy: "x"}}},
		"memory: must":       {Memory: 9 << 30},
		"cpus: must":         {CPUs: -1},
		"storage: must":      {Storage: 1},
		"cpu_share":          {CPUShare: 2},
		"node_pids":          {NodePIDs: -1},
		"max_per_user":       {MaxPerUser: 1001},
		"max_session":        {MaxSession: time.Second},
		"schedule_wait":      {ScheduleWait: -1},
	} {
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func built(t *testing.T, c Config, change func(*backends.Template)) *corev1.Pod {
	t.Helper()
	spec := plainSpec()
	if change != nil {
		change(&spec.Template)
	}
	b := checker(c)
	spec, err := b.check(spec)
	if err != nil {
		t.Fatal(err)
	}
	return build(spec, b.config, b.gate, "KEY", slotOf(spec.Template.Namespace, spec.Owner.User, 3))
}

// TestBuild looks at what the narrow default is; that Pod Security "restricted" takes it is tested on a cluster.
func TestBuild(t *testing.T) {
	pod := built(t, Config{}, nil)
	p := pod.Spec
	if pod.Namespace != "sallyport-sandboxes" || pod.Name != "sp-"+hashed("alice@corp")+"-3" {
		t.Errorf("%s/%s", pod.Namespace, pod.Name)
	}
	if pod.Labels[labelUser] != hashed("alice@corp") || pod.Annotations[labelUser] != "alice@corp" ||
		pod.Annotations[annotationGrant] != "OPS/1" || pod.Labels[labelSession] != "s1" || pod.Labels[labelNetwork] != "none" {
		t.Errorf("%+v", pod.ObjectMeta)
	}
	for key, value := range pod.Labels {
		if !labelPattern.MatchString(value) {
			t.Errorf("label %s: %q", key, value)
		}
	}
	if p.RestartPolicy != "Never" || *p.ActiveDeadlineSeconds != 24*3600 || *p.AutomountServiceAccountToken || *p.EnableServiceLinks ||
		p.HostNetwork || p.HostPID || p.HostIPC || p.ShareProcessNamespace != nil || *p.TerminationGracePeriodSeconds != 1 {
		t.Errorf("%+v", p)
	}
	if s := p.SecurityContext; !*s.RunAsNonRoot || *s.RunAsUser != 1000 || *s.RunAsGroup != 1000 || s.SeccompProfile.Type != "RuntimeDefault" {
		t.Errorf("%+v", s)
	}
	if len(p.Containers) != 1 || len(p.InitContainers) != 1 {
		t.Fatalf("%+v", p)
	}
	for _, c := range append(p.InitContainers, p.Containers...) {
		s := c.SecurityContext
		if *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || s.Capabilities.Drop[0] != "ALL" || s.Capabilities.Add != nil || s.Privileged != nil {
			t.Errorf("%s: %+v", c.Name, s)
		}
		if !reflect.DeepEqual(c.Resources.Limits, c.Resources.Requests) || len(c.Resources.Limits) != 3 {
			t.Errorf("%s: %+v", c.Name, c.Resources)
		}
		if c.LivenessProbe != nil || c.ReadinessProbe != nil || c.StartupProbe != nil || c.Lifecycle != nil || c.Stdin || c.TTY {
			t.Errorf("%s: %+v", c.Name, c)
		}
	}
	if *p.InitContainers[0].SecurityContext.RunAsUser == *p.SecurityContext.RunAsUser {
		t.Error("the agent's file belongs to the session")
	}
	for _, v := range p.Volumes {
		if v.EmptyDir == nil || v.EmptyDir.SizeLimit == nil || v.EmptyDir.Medium != "Memory" {
			t.Errorf("volume %+v", v)
		}
	}
	for _, m := range p.Containers[0].VolumeMounts {
		if m.ReadOnly != (m.MountPath == insideDir) {
			t.Errorf("mount %+v", m)
		}
	}
	if p.DNSPolicy != "None" {
		t.Errorf("DNS %s", p.DNSPolicy)
	}
	if b, err := json.Marshal(pod); err != nil || strings.Contains(string(b), `"hostPath"`) {
		t.Errorf("%s %v", b, err)
	}
}

func TestBuildMore(t *testing.T) {
	c := Config{
		AgentIn: []string{"own/*"}, ConfigMaps: []string{"cm"}, Secrets: []string{"s"}, Claims: []string{"c"}, Images: []string{"i"},
		Networks: map[string]Network{"db": {}}, ImagePullSecrets: []string{"pull"}, NodeSelector: map[string]string{"zone": "a"},
		NodeLabels: []string{"pool"}, Tolerations: []Toleration{{Key: "k", Operator: "Exists"}}, Runtime: "gvisor", Priority: "low",
		UserNamespaces: true,
	}
	pod := built(t, c, func(t *backends.Template) {
		t.Image, t.Network, t.Scratch, t.Groups = "own/debug:2", "db", "volume", []uint32{4}
		t.Nodes = map[string]string{"pool": "x"}
		t.Env = []string{"A=$(B) $x", "B=="}
		t.ExtraHosts = []string{"db:192.0.2.1"}
		t.Mounts = []backends.Mount{
			{Type: "configmap", Source: "cm", Target: "/a"}, {Type: "secret", Source: "s", Target: "/b"},
			{Type: "pvc", Source: "c", Target: "/c"}, {Type: "image", Source: "i", Target: "/d"},
			{Type: "projected", Source: "secret:s,configmap:cm", Target: "/e"},
		}
	})
	p := pod.Spec
	if len(p.InitContainers) != 0 {
		t.Error("an image that carries the agent is given one")
	}
	m := p.Containers[0]
	if m.Env[0].Value != "$$(B) $$x" || m.Env[1].Value != "=" {
		t.Errorf("%+v", m.Env)
	}
	if *p.RuntimeClassName != "gvisor" || p.PriorityClassName != "low" || *p.HostUsers || p.NodeSelector["zone"] != "a" ||
		p.NodeSelector["pool"] != "x" || p.Tolerations[0].Key != "k" || p.ImagePullSecrets[0].Name != "pull" ||
		p.HostAliases[0].IP != "192.0.2.1" || p.SecurityContext.SupplementalGroups[0] != 4 || p.DNSPolicy != "" {
		t.Errorf("%+v", p)
	}
	if got := m.Resources.Limits.StorageEphemeral().Value(); got != 1<<30 {
		t.Errorf("storage %d", got)
	}
	for _, v := range m.VolumeMounts {
		if v.ReadOnly != (strings.HasPrefix(v.Name, "data-")) {
			t.Errorf("%+v", v)
		}
	}
	if v := p.Volumes[1]; v.EmptyDir.Medium != "" || v.EmptyDir.SizeLimit.Value() != 1<<30 {
		t.Errorf("home %+v", v.EmptyDir)
	}
	c.AgentBy = "volume"
	pod = built(t, c, nil)
	if len(pod.Spec.InitContainers) != 0 || pod.Spec.Volumes[2].Image == nil {
		t.Errorf("%+v", pod.Spec.Volumes)
	}
}

func TestLabels(t *testing.T) {
	for in, same := range map[string]bool{"gate-1": true, "a": true, "a-": false, "": false, strings.Repeat("x", 64): false, "a@b": false} {
		got := labelValue(in)
		if !labelPattern.MatchString(got) || (got == in) != same {
			t.Errorf("%q: %q", in, got)
		}
	}
}

func TestPolicy(t *testing.T) {
	c := Config{Networks: map[string]Network{"db": {Egress: []Egress{
		{CIDR: "192.0.2.0/24", TCP: []int32{5433, 5432}, UDP: []int32{53}},
		{Namespace: map[string]string{"a": "b"}, Pod: map[string]string{"c": "d"}},
	}}}}.WithDefaults()
	p := policyOf(c, "ns", noNetwork)
	if p.Name != "sallyport-none" || len(p.Spec.PolicyTypes) != 2 || p.Spec.Ingress != nil || p.Spec.Egress != nil {
		t.Errorf("%+v", p)
	}
	p = policyOf(c, "ns", "db")
	if p.Spec.PodSelector.MatchLabels[labelNetwork] != "db" || p.Spec.Ingress != nil || len(p.Spec.Egress) != 2 {
		t.Fatalf("%+v", p.Spec)
	}
	if e := p.Spec.Egress[0]; len(e.Ports) != 3 || e.Ports[0].Port.IntValue() != 5432 || *e.Ports[2].Protocol != "UDP" || e.To[0].IPBlock.CIDR != "192.0.2.0/24" {
		t.Errorf("%+v", e)
	}
	if e := p.Spec.Egress[1]; e.Ports != nil || e.To[0].NamespaceSelector.MatchLabels["a"] != "b" || e.To[0].PodSelector.MatchLabels["c"] != "d" {
		t.Errorf("%+v", e)
	}
}

func TestSize(t *testing.T) {
	for in, want := range map[string]Size{"1": 1, "512Mi": 512 << 20, "2Gi": 2 << 30, "1k": 1000, "": -1, "-1": -1, "1.5": -1, "lots": -1, "1e30": -1} {
		var s Size
		err := s.UnmarshalText([]byte(in))
		if (err != nil) != (want < 0) || err == nil && s != want {
			t.Errorf("%q: %d, %v", in, s, err)
		}
	}
}
