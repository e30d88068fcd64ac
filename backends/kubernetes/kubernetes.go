// Package kubernetes starts sandboxes as pods of a Kubernetes cluster.
//
// A sandbox is a pod whose only program from the gate's side is the agent: an init container puts it into a volume that
// the session's container has read-only, or the image carries it. The gate executes the agent's relay in the pod (pods/exec),
// and speaks to the pod's first process through it. What a sandbox may be is limited here, by the operator's Config,
// whatever policy asks for; what the cluster itself forbids stays forbidden.
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sallyport/sallyport/backends"
)

// Config is the operator's: where the cluster is, and what no policy can exceed.
type Config struct {
	// Kubeconfig is a file as kubectl reads it. Empty: the pod's own service account where there is one, else KUBECONFIG,
	// else ~/.kube/config.
	Kubeconfig string `yaml:"kubeconfig"`
	Context    string `yaml:"context"`    // of the kubeconfig; empty: its current one
	InCluster  bool   `yaml:"in_cluster"` // the pod's own service account, and nothing else

	Namespace  string   `yaml:"namespace"`  // where a profile names none; default sallyport-sandboxes
	Namespaces []string `yaml:"namespaces"` // that a profile may name besides; default none

	// AgentImage is the image that brings the agent (images/agent); default sallyport/agent:1.
	AgentImage string `yaml:"agent_image"`
	// AgentBy is how: "init", by an init container, or "volume", by mounting the image (Kubernetes 1.35, containerd 2.1).
	AgentBy string `yaml:"agent_by"`
	// AgentIn are images that carry the agent themselves, as /.sallyport/agent; one may end in *. Default none.
	AgentIn []string `yaml:"agent_in"`

	// Stream is how the gate reaches the agent: "exec" (default), pods/exec by way of the API server, or "direct", TLS to the pod's
	// address, which both ends prove keys of the session's for.
	Stream     string `yaml:"stream"`
	DirectPort uint16 `yaml:"direct_port"` // of every pod, until its gate has come; default 7420
	DirectFrom []Peer `yaml:"direct_from"` // where gates are, for the policies that the gate keeps

	// Where and how all pods run.
	ServiceAccount   string   `yaml:"service_account"`    // its token is never in the pod; default "default"
	ImagePullSecrets []string `yaml:"image_pull_secrets"` // by name
	// Owner is an object with which the cluster deletes pods: "pod", the gate's own, of the pods' namespace and known by POD_NAME,
	// POD_NAMESPACE and POD_UID of the environment, or "configmap/NAME", in each namespace. Default none.
	Owner          string            `yaml:"owner"`
	NodeSelector   map[string]string `yaml:"node_selector"`   // labels of the nodes
	Tolerations    []Toleration      `yaml:"tolerations"`     // taints of the nodes
	Runtime        string            `yaml:"runtime"`         // RuntimeClass where a profile names none
	Priority       string            `yaml:"priority"`        // PriorityClass where a profile names none
	UserNamespaces bool              `yaml:"user_namespaces"` // hostUsers: false; the nodes must be able to

	// What a profile may name; default none.
	Claims      []string `yaml:"claims"`       // persistent volume claims
	WriteClaims []string `yaml:"write_claims"` // of these, those that may be mounted writable
	ConfigMaps  []string `yaml:"config_maps"`  // always read-only
	Secrets     []string `yaml:"secrets"`      // always read-only
	Images      []string `yaml:"images"`       // images that may be mounted, read-only; one may end in *
	CSI         []string `yaml:"csi"`          // CSI volumes, DRIVER:NAME=VALUE,..., always read-only; one may end in *
	HostPaths   []string `yaml:"host_paths"`   // directories of the nodes below which mounts may lie, read-only
	Runtimes    []string `yaml:"runtimes"`     // RuntimeClasses
	Priorities  []string `yaml:"priorities"`   // PriorityClasses
	NodeLabels  []string `yaml:"node_labels"`  // keys that a profile's node selector may have
	AllowCaps   []string `yaml:"allow_caps"`   // capabilities, as "NET_RAW"
	AllowRoot   bool     `yaml:"allow_root"`   // whether uid 0 is permitted
	// PodTemplates says whether a profile may bring a pod template. It is judged by all these lists, and by those that follow.
	PodTemplates   bool     `yaml:"pod_templates"`
	PodLabels      []string `yaml:"pod_labels"`      // keys that it may add; network policies and services select by labels
	PodAnnotations []string `yaml:"pod_annotations"` // keys that it may add
	Taints         []string `yaml:"taints"`          // keys of taints that it may tolerate
	Containers     []string `yaml:"containers"`      // images of containers that it may add; one may end in *
	AllowHost      []string `yaml:"allow_host"`      // what of the node's it may share: "network", "ipc"

	Targets    Targets            `yaml:"targets"`          // pods that may be joined; default none
	Networks   map[string]Network `yaml:"networks"`         // what a profile's network may be
	PolicyMode string             `yaml:"network_policies"` // "create" (default): the gate keeps them; "refer": they must be there

	Memory     Size    `yaml:"memory"`      // where a profile names none; default 512Mi
	CPUs       float64 `yaml:"cpus"`        // where a profile names none; default 1
	CPUShare   float64 `yaml:"cpu_share"`   // the part of the CPU limit that is requested too; default 1
	Storage    Size    `yaml:"storage"`     // ephemeral storage, a scratch volume included; default 1Gi
	MaxMemory  Size    `yaml:"max_memory"`  // largest permitted; default 8Gi
	MaxCPUs    float64 `yaml:"max_cpus"`    // largest permitted; default 8
	MaxStorage Size    `yaml:"max_storage"` // largest permitted; default 16Gi
	// NodePIDs is what the kubelets' podPidsLimit is: a pod can't say. 0: not known, and a profile that names pids is refused.
	NodePIDs int64 `yaml:"node_pids"`

	// MaxPerUser is how many sandboxes a user may have in a namespace, over all gates; default 20.
	MaxPerUser int `yaml:"max_per_user"`
	// MaxSession is the longest life of a pod, whatever becomes of the gate; default 24h.
	MaxSession time.Duration `yaml:"max_session"`
	// ScheduleWait is how long a pod may be found unschedulable before the login fails; default 5s. Longer where nodes are
	// added on demand.
	ScheduleWait time.Duration `yaml:"schedule_wait"`
}

// Toleration is one of a pod's, as in Kubernetes.
type Toleration struct {
	Key      string `yaml:"key"`
	Operator string `yaml:"operator"` // Equal (default) or Exists
	Value    string `yaml:"value"`
	Effect   string `yaml:"effect"` // empty: all
}

// Network is what a sandbox may reach; nothing reaches a sandbox.
type Network struct {
	// Policy is the name of a NetworkPolicy that selects the label sallyport.network: NAME; empty: sallyport-NAME.
	Policy string `yaml:"policy"`
	// Egress is what the gate writes into it where it keeps it.
	Egress []Egress `yaml:"egress"`
}

// Peer is whom a policy lets reach something: one of addresses, or of pods.
type Peer struct {
	CIDR      string            `yaml:"cidr"`      // or
	Namespace map[string]string `yaml:"namespace"` // labels of namespaces, and
	Pod       map[string]string `yaml:"pod"`       // of pods in them, or in the sandbox's own namespace
}

// Egress is addresses and ports that may be reached.
type Egress struct {
	CIDR      string            `yaml:"cidr"`      // or
	Namespace map[string]string `yaml:"namespace"` // labels of namespaces, and
	Pod       map[string]string `yaml:"pod"`       // of pods in them, or in the sandbox's own namespace
	TCP       []int32           `yaml:"tcp"`       // ports; with no port of either kind: all
	UDP       []int32           `yaml:"udp"`
}

// WithDefaults gives the configuration with its unset values set.
func (c Config) WithDefaults() Config {
	for _, s := range []struct {
		at    *string
		value string
	}{
		{&c.Namespace, "sallyport-sandboxes"}, {&c.AgentImage, "sallyport/agent:1"}, {&c.AgentBy, "init"},
		{&c.Stream, streamExec},
		{&c.PolicyMode, "create"}, {&c.ServiceAccount, "default"},
	} {
		if *s.at == "" {
			*s.at = s.value
		}
	}
	for _, s := range []struct {
		at    *Size
		value Size
	}{{&c.Memory, 512 << 20}, {&c.MaxMemory, 8 << 30}, {&c.Storage, 1 << 30}, {&c.MaxStorage, 16 << 30}} {
		if *s.at == 0 {
			*s.at = s.value
		}
	}
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.CPUShare == 0 {
		c.CPUShare = 1
	}
	if c.MaxCPUs == 0 {
		c.MaxCPUs = 8
	}
	if c.DirectPort == 0 {
		c.DirectPort = 7420
	}
	if c.MaxPerUser == 0 {
		c.MaxPerUser = 20
	}
	if c.MaxSession == 0 {
		c.MaxSession = 24 * time.Hour
	}
	if c.ScheduleWait == 0 {
		c.ScheduleWait = 5 * time.Second
	}
	return c
}

// maxPerUser bounds max_per_user: so many names may be tried at a login.
const maxPerUser = 1000

// Validate says what is wrong in the configuration, without asking the cluster.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	c = c.WithDefaults()
	if c.InCluster && (c.Kubeconfig != "" || c.Context != "") {
		bad("in_cluster: write no kubeconfig and no context beside it")
	}
	for _, n := range append([]string{c.Namespace}, c.Namespaces...) {
		if !dnsLabel.MatchString(n) {
			bad("namespaces: %q is no namespace's name", n)
		}
	}
	switch c.AgentBy {
	case "init", "volume":
	default:
		bad("agent_by: %q is none of init, volume", c.AgentBy)
	}
	switch c.Stream {
	case streamExec:
		if len(c.DirectFrom) > 0 {
			bad("direct_from: is for stream: direct")
		}
	case streamDirect:
		if c.DirectPort < 1024 {
			bad("direct_port: %d can't be listened on by a session's user", c.DirectPort)
		}
		if c.PolicyMode == "create" && len(c.DirectFrom) == 0 {
			bad("direct_from: say where the gates are, or no policy lets them reach a sandbox")
		}
		if c.PolicyMode == "refer" && len(c.DirectFrom) > 0 {
			bad("direct_from: the gate writes no policies where network_policies is refer")
		}
	default:
		bad("stream: %q is none of exec, direct", c.Stream)
	}
	for _, p := range c.DirectFrom {
		if err := p.validate(); err != nil {
			bad("direct_from: %w", err)
		}
	}
	switch c.PolicyMode {
	case "create", "refer":
	default:
		bad("network_policies: %q is none of create, refer", c.PolicyMode)
	}
	if err := c.validateOwner(); err != nil {
		bad("%w", err)
	}
	for _, what := range c.AllowHost {
		switch what {
		case "network", "ipc":
		case "pid":
			bad("allow_host: with the node's processes, the agent would not be the sandbox's first: it can't be permitted")
		default:
			bad("allow_host: %q is none of network, ipc", what)
		}
	}
	for _, key := range append(slices.Clone(c.PodLabels), c.PodAnnotations...) {
		if key == labelManaged || strings.HasPrefix(key, "sallyport.") {
			bad("pod_labels, pod_annotations: %q is the gate's own", key)
		}
	}
	if !c.PodTemplates && len(c.PodLabels)+len(c.PodAnnotations)+len(c.Taints)+len(c.Containers)+len(c.AllowHost) > 0 {
		bad("pod_templates: is off, and lists for pod templates are not empty")
	}
	for _, p := range c.HostPaths {
		if !path.IsAbs(p) || path.Clean(p) != p || p == "/" {
			bad("host_paths: %q is not a clean absolute path below /", p)
		}
	}
	for _, name := range c.AllowCaps {
		if reason := neverCap(name); reason != "" {
			bad("allow_caps: %q %s", name, reason)
		}
	}
	for _, name := range c.WriteClaims {
		if !slices.Contains(c.Claims, name) {
			bad("write_claims: %q is not among claims", name)
		}
	}
	for _, t := range c.Tolerations {
		switch t.Operator {
		case "", "Equal", "Exists":
		default:
			bad("tolerations: operator %q is none of Equal, Exists", t.Operator)
		}
	}
	for name, n := range c.Networks {
		if name == noNetwork || !dnsLabel.MatchString(name) {
			bad("networks: %q can't be a network's name", name)
		}
		for _, e := range n.Egress {
			if err := e.validate(); err != nil {
				bad("networks.%s.egress: %w", name, err)
			}
		}
		if c.PolicyMode == "refer" && len(n.Egress) > 0 {
			bad("networks.%s.egress: the gate writes no policies where network_policies is refer", name)
		}
		if c.PolicyMode == "create" && n.Policy != "" {
			bad("networks.%s.policy: the gate names the policies where network_policies is create", name)
		}
	}
	errs = append(errs, c.Targets.validate()...)
	if c.Memory < minMemory || c.Memory > c.MaxMemory {
		bad("memory: must be from %v to max_memory", Size(minMemory))
	}
	if c.CPUs < minCPUs || c.CPUs > c.MaxCPUs {
		bad("cpus: must be from %v to max_cpus", minCPUs)
	}
	if !(c.CPUShare >= minCPUs && c.CPUShare <= 1) {
		bad("cpu_share: must be from %v to 1", minCPUs)
	}
	if c.Storage < minStorage || c.Storage > c.MaxStorage {
		bad("storage: must be from %v to max_storage", Size(minStorage))
	}
	if c.NodePIDs < 0 {
		bad("node_pids: can't be negative")
	}
	if c.MaxPerUser < 1 || c.MaxPerUser > maxPerUser {
		bad("max_per_user: must be from 1 to %d", maxPerUser)
	}
	if c.MaxSession < time.Minute {
		bad("max_session: must be 1m or more")
	}
	if c.ScheduleWait < 0 {
		bad("schedule_wait: can't be negative")
	}
	return errors.Join(errs...)
}

// How the gate reaches agents.
const streamExec, streamDirect = "exec", "direct"

func (p Peer) validate() error {
	selects := len(p.Namespace)+len(p.Pod) > 0
	if (p.CIDR != "") == selects {
		return errors.New("write either cidr, or namespace and pod")
	}
	if p.CIDR != "" {
		if n, err := netip.ParsePrefix(p.CIDR); err != nil || n != n.Masked() {
			return fmt.Errorf("cidr: %q is no network as 192.0.2.0/24", p.CIDR)
		}
	}
	return nil
}

func (e Egress) peer() Peer { return Peer{e.CIDR, e.Namespace, e.Pod} }

func (e Egress) validate() error {
	if err := e.peer().validate(); err != nil {
		return err
	}
	for _, port := range append(slices.Clone(e.TCP), e.UDP...) {
		if port < 1 || port > 65535 {
			return fmt.Errorf("%d is no port", port)
		}
	}
	return nil
}

// Attempts to reach agents, over all logins that are under way: each is a connection of its own to the API server.
const triesPerSecond, triesBurst = 150, 50

// Backend starts pods. It is safe for concurrent use.
type Backend struct {
	config  Config
	gate    string
	log     *slog.Logger
	cluster *cluster

	ownPod   *metav1.OwnerReference // nil: owns nothing
	policies policyCache
	tries    *rate.Limiter // of all starts' attempts to reach an agent

	mu   sync.Mutex          // guards what follows
	live map[string]*sandbox // by session: from before anything of it exists until all of it is gone
	used map[slot]bool       // names that sandboxes of this gate have

	guests map[*guest]bool // sandboxes in targets
}

var _ backends.Backend = (*Backend)(nil)

// New prepares a backend for the gate of that name, which must be its alone in the cluster: what bears it and is not known to
// this Backend is removed by Run. The cluster must answer. The pods' fate is only heard of while Run runs.
func New(ctx context.Context, config Config, gate string, log *slog.Logger) (*Backend, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	if gate == "" {
		return nil, errors.New("kubernetes: the gate's name is missing")
	}
	config = config.WithDefaults()
	c, err := newCluster(config, log)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	b := &Backend{
		config: config, gate: gate, log: log, cluster: c,
		tries: rate.NewLimiter(triesPerSecond, triesBurst), live: make(map[string]*sandbox), used: make(map[slot]bool),
	}
	err = b.Ready(ctx)
	if err == nil {
		if err = b.findOwnPod(ctx); err != nil {
			err = fmt.Errorf("kubernetes: %w", err)
		}
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return b, nil
}

// namespaces are all that pods of this gate can be in.
func (b *Backend) namespaces() []string {
	all := append([]string{b.config.Namespace}, b.config.Namespaces...)
	slices.Sort(all)
	return slices.Compact(all)
}

// Ready says whether the cluster answers, and lets the gate see its pods.
func (b *Backend) Ready(ctx context.Context) error {
	for _, ns := range b.namespaces() {
		var pods corev1.PodList
		if err := b.cluster.list(ctx, ns, "pods", listOptions{labels: b.ownLabels(), limit: 1}, &pods); err != nil {
			return fmt.Errorf("kubernetes: ask for pods in namespace %s: %w", ns, err)
		}
	}
	return nil
}

// Transport says how sandboxes are reached.
func (b *Backend) Transport() (transport, why string) {
	if b.config.Stream == streamDirect {
		return "direct", fmt.Sprintf("TLS to port %d of each pod's address; its key is asked for by pods/exec", b.config.DirectPort)
	}
	return "relay", "pods/exec by way of the API server, over SPDY, or WebSocket where that does not get through"
}

// Close closes the connections to the cluster. It ends no sandbox: those end when they are closed, or the gate does.
func (b *Backend) Close() error {
	b.cluster.close()
	return nil
}

// removeWait bounds what is done to leave nothing behind, whatever became of the context that it was done under.
const removeWait = time.Minute

func detached(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), removeWait)
}

// listed says whether name is in list, whose entries may end in *.
func listed(list []string, name string) bool {
	return slices.ContainsFunc(list, func(entry string) bool {
		prefix, open := strings.CutSuffix(entry, "*")
		return entry == name || open && strings.HasPrefix(name, prefix)
	})
}
