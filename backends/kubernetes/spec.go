package kubernetes

import (
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sallyport/sallyport/backends"
)

// Where things are inside.
const (
	insideDir   = "/.sallyport"
	insideAgent = insideDir + "/agent"
	defaultHome = "/home/sandbox"
)

const (
	minMemory  = 64 << 20 // less does not hold the agent and a shell
	minCPUs    = 0.01
	minPIDs    = 32 // the agent's threads count
	minStorage = 16 << 20

	// agentRoom is the size of the volume that holds the agent; it counts as memory.
	agentRoom = 32 << 20
)

// agentUID owns the agent's file, in its image and in the volume; no session has it.
const agentUID = 65532

// Names in a pod.
const (
	mainContainer = "sandbox"
	initContainer = "agent"
	agentVolume   = "agent"
	tmpVolume     = "tmp"
	homeVolume    = "home"
)

// Labels of a pod; labels can't hold every name there is, so annotations of the same keys hold the words.
const (
	labelManaged = "app.kubernetes.io/managed-by" // "sallyport"
	labelServer  = "sallyport.server"
	labelSession = "sallyport.session"
	labelUser    = "sallyport.user" // a hash
	labelNetwork = "sallyport.network"

	annotationProfile = "sallyport.profile"
	annotationGrant   = "sallyport.grant"
)

const managed = "sallyport"

// noNetwork is the network of a profile that names none.
const noNetwork = "none"

var (
	sessionPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$`)
	dnsLabel       = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	dnsName        = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
	labelPattern   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
	nodeKey        = regexp.MustCompile(`^([a-z0-9][a-z0-9.-]{0,251}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
	hostPattern    = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`)
)

func refused(format string, args ...any) error {
	return &backends.RefusedError{Reason: fmt.Sprintf(format, args...)}
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

// hashed is a name that labels and objects' names can hold, for any text.
func hashed(s string) string {
	sum := sha256.Sum256([]byte(s))
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:10])) // 16 characters
}

// labelValue is s, or its hash where a label can't hold it.
func labelValue(s string) string {
	if labelPattern.MatchString(s) {
		return s
	}
	return "hash-" + hashed(s)
}

// slot is a pod's name: so many as there are for a user, so many sandboxes can they have, over all gates.
type slot struct{ namespace, name string }

func slotOf(namespace, user string, n int) slot {
	return slot{namespace, "sp-" + hashed(user) + "-" + strconv.Itoa(n)}
}

func (b *Backend) ownLabels() string {
	return labelManaged + "=" + managed + "," + labelServer + "=" + labelValue(b.gate)
}

// check refuses what the operator's configuration does not permit, and fills in defaults.
func (b *Backend) check(spec backends.Spec) (backends.Spec, error) {
	t := spec.Template
	c := b.config
	if !sessionPattern.MatchString(spec.Owner.Session) {
		return spec, errors.New("bad session ID")
	}
	if t.Image == "" {
		return spec, refused("no image is named")
	}
	switch t.PullPolicy {
	case "", "missing", "always", "never":
	default:
		return spec, refused("pull policy %q is unknown", t.PullPolicy)
	}
	if t.Namespace == "" {
		t.Namespace = c.Namespace
	}
	if t.Namespace != c.Namespace && !slices.Contains(c.Namespaces, t.Namespace) {
		return spec, refused("namespace %q is not listed (namespaces)", t.Namespace)
	}
	if t.UID == 0 && !c.AllowRoot {
		return spec, refused("uid 0 is not permitted (allow_root)")
	}
	if t.UID == agentUID {
		return spec, refused("uid %d is the agent's own", t.UID)
	}
	for _, name := range t.Caps {
		if reason := neverCap(name); reason != "" {
			return spec, refused("capability %q %s", name, reason)
		}
		if !slices.Contains(c.AllowCaps, name) {
			return spec, refused("capability %q is not listed (allow_caps)", name)
		}
	}
	if t.Network == "" {
		t.Network = noNetwork
	}
	if t.Network == "host" {
		return spec, refused("network %q shares the node's network", t.Network)
	}
	if _, ok := c.Networks[t.Network]; !ok && t.Network != noNetwork {
		return spec, refused("network %q is not listed (networks)", t.Network)
	}
	if t.Runtime != "" && !slices.Contains(c.Runtimes, t.Runtime) && t.Runtime != c.Runtime {
		return spec, refused("runtime %q is not listed (runtimes)", t.Runtime)
	}
	if t.Runtime == "" {
		t.Runtime = c.Runtime
	}
	if t.Priority != "" && !slices.Contains(c.Priorities, t.Priority) && t.Priority != c.Priority {
		return spec, refused("priority %q is not listed (priorities)", t.Priority)
	}
	if t.Priority == "" {
		t.Priority = c.Priority
	}
	for key, value := range t.Nodes {
		if !slices.Contains(c.NodeLabels, key) {
			return spec, refused("node label %q is not listed (node_labels)", key)
		}
		if own, ok := c.NodeSelector[key]; ok && own != value {
			return spec, refused("node label %q is the operator's (node_selector)", key)
		}
	}
	for _, key := range t.Spread {
		if !nodeKey.MatchString(key) {
			return spec, refused("spread: %q is no label's name", key)
		}
	}
	if t.Hostname != "" && !dnsLabel.MatchString(t.Hostname) {
		return spec, refused("host name %q can't be a pod's", t.Hostname)
	}
	for _, line := range t.ExtraHosts {
		name, address, _ := strings.Cut(line, ":")
		if _, err := netip.ParseAddr(address); err != nil || !hostPattern.MatchString(name) {
			return spec, refused("extra host %q is not NAME:ADDRESS", line)
		}
	}
	if err := t.CheckEnv(); err != nil {
		return spec, err
	}
	if err := b.checkLimits(&t); err != nil {
		return spec, err
	}
	if err := b.checkMounts(&t); err != nil {
		return spec, err
	}
	if len(t.Pod) > 0 && !b.config.PodTemplates {
		return spec, refused("pod templates are not permitted (pod_templates)")
	}
	spec.Template = t
	// So that nothing is begun for a template that fails.
	_, err := b.pod(spec, "", slotOf(t.Namespace, spec.Owner.User, 0), nil)
	return spec, err
}

// pod makes the pod of a checked spec, with the profile's template, and judges it.
func (b *Backend) pod(spec backends.Spec, key string, at slot, owner []metav1.OwnerReference) (*corev1.Pod, error) {
	plain := build(spec, b.config, b.gate, key, at)
	plain.OwnerReferences = owner
	pod := plain
	if len(spec.Template.Pod) > 0 {
		var err error
		if pod, err = apply(plain, spec.Template.Pod); err != nil {
			return nil, refused("pod template: %v", err)
		}
	}
	if err := b.config.judge(spec.Template, plain, pod); err != nil {
		return nil, refused("pod: %v", err)
	}
	return pod, nil
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
		t.CPUs = c.CPUs
	}
	if !(t.CPUs >= minCPUs && t.CPUs <= c.MaxCPUs) {
		return refused("%v cpus are not from %v to %v", t.CPUs, minCPUs, c.MaxCPUs)
	}
	// A pod can't limit its processes: the kubelet does, all pods alike.
	if t.PIDs != 0 && t.PIDs < minPIDs {
		return refused("%d pids are fewer than %d", t.PIDs, minPIDs)
	}
	if t.PIDs != 0 && (c.NodePIDs == 0 || c.NodePIDs > t.PIDs) {
		return refused("pids %d can't be kept: the nodes permit more, or it is not said (node_pids)", t.PIDs)
	}
	if t.TmpSize < 0 || t.HomeSize < 0 {
		return refused("a negative size")
	}
	half := t.Memory / 2
	home := t.HomeSize // of memory
	switch t.Scratch {
	case "":
	case "volume":
		home = 0
		if t.HomeSize == 0 {
			t.HomeSize = int64(c.Storage)
		}
		if t.HomeSize < minStorage || t.HomeSize > int64(c.MaxStorage) {
			return refused("a scratch volume of %v is not from %v to %v", Size(t.HomeSize), Size(minStorage), c.MaxStorage)
		}
	default:
		return refused("scratch %q is unknown", t.Scratch)
	}
	// A tmpfs is charged to the memory limit: one that could fill it would have processes killed, where "no space left"
	// is due.
	if t.TmpSize == 0 {
		t.TmpSize = min(half/2, max(half-home, 0))
	}
	if t.HomeSize == 0 {
		t.HomeSize = min(half/2, max(half-t.TmpSize, 0))
		home = t.HomeSize
	}
	if t.TmpSize > half || home > half || t.TmpSize+home > half {
		return refused("/tmp and home together are larger than half of the memory")
	}
	if t.TmpSize < 4096 || t.HomeSize < 4096 {
		return refused("no room is left for /tmp or home")
	}
	return nil
}

// checkMounts also checks home, as it is one.
func (b *Backend) checkMounts(t *backends.Template) error {
	c := b.config
	if t.Home == "" {
		t.Home = defaultHome
	}
	taken := targets{"/tmp": true}
	target := func(p string) error {
		if err := taken.add(p); err != nil {
			return refused("%v", err)
		}
		return nil
	}
	if err := target(t.Home); err != nil {
		return err
	}
	var mounts []backends.Mount
	for _, m := range t.Mounts {
		if err := target(m.Target); err != nil {
			return err
		}
		if m.Write && m.Type != "pvc" {
			return refused("mount %q: only a claim can be writable", m.Target)
		}
		switch m.Type {
		case "pvc":
			if !slices.Contains(c.Claims, m.Source) {
				return refused("claim %q is not listed (claims)", m.Source)
			}
			if m.Write && !slices.Contains(c.WriteClaims, m.Source) {
				return refused("claim %q is not listed as writable (write_claims)", m.Source)
			}
		case "image":
			if !listed(c.Images, m.Source) {
				return refused("image %q is not listed (images)", m.Source)
			}
		case "csi":
			driver, attributes, err := csiOf(m.Source)
			if err != nil {
				return err
			}
			if !listed(c.CSI, csiSource(driver, attributes)) {
				return refused("csi volume %q is not listed (csi)", m.Source)
			}
		case "", "bind":
			if !path.IsAbs(m.Source) || path.Clean(m.Source) != m.Source || strings.ContainsRune(m.Source, 0) {
				return refused("host path %q is not a clean absolute path", m.Source)
			}
			if !slices.ContainsFunc(c.HostPaths, func(p string) bool { return below(m.Source, p) }) {
				return refused("host path %q lies under no listed directory (host_paths)", m.Source)
			}
		case "configmap", "secret", "projected":
			parts, err := projections(m)
			if err != nil {
				return err
			}
			for _, p := range parts {
				if p.kind == "secret" && !slices.Contains(c.Secrets, p.name) {
					return refused("secret %q is not listed (secrets)", p.name)
				}
				if p.kind == "configmap" && !slices.Contains(c.ConfigMaps, p.name) {
					return refused("config map %q is not listed (config_maps)", p.name)
				}
			}
		default:
			return refused("mount type %q is unknown", m.Type)
		}
		mounts = append(mounts, m)
	}
	t.Mounts = mounts
	return nil
}

// targets are where things are mounted in a container.
type targets map[string]bool

// add adds one, if it is there that a profile may mount something.
func (taken targets) add(p string) error {
	if !path.IsAbs(p) || path.Clean(p) != p || strings.ContainsAny(p, ":,\x00\n") {
		return fmt.Errorf("target %q is not a clean absolute path", p)
	}
	for _, special := range []string{insideDir, "/proc", "/sys", "/dev", "/var/run/secrets/kubernetes.io"} {
		if overlap(p, special) {
			return fmt.Errorf("target %q is not the profile's to fill", p)
		}
	}
	// What lies in a directory that the session writes could be moved away; and the agent has its socket in /tmp.
	if below(p, "/tmp") && p != "/tmp" {
		return fmt.Errorf("target %q lies below /tmp", p)
	}
	if taken[p] {
		return fmt.Errorf("target %q is mounted twice", p)
	}
	taken[p] = true
	return nil
}

// projection is one part of a projected mount.
type projection struct{ kind, name string }

// projections reads the source of a mount: a name, or of a projected one "configmap:NAME,secret:NAME,...".
func projections(m backends.Mount) ([]projection, error) {
	if m.Type != "projected" {
		return []projection{{m.Type, m.Source}}, nil
	}
	var all []projection
	for part := range strings.SplitSeq(m.Source, ",") {
		kind, name, _ := strings.Cut(part, ":")
		if kind != "configmap" && kind != "secret" || !dnsName.MatchString(name) {
			return nil, refused("projected source %q is not configmap:NAME,secret:NAME", m.Source)
		}
		all = append(all, projection{kind, name})
	}
	return all, nil
}

// csiOf reads the source of a CSI mount: DRIVER, or DRIVER:NAME=VALUE,NAME=VALUE with attributes for the driver.
func csiOf(source string) (driver string, attributes map[string]string, err error) {
	driver, list, more := strings.Cut(source, ":")
	if !dnsName.MatchString(driver) || more && list == "" {
		return "", nil, refused("csi source %q is not DRIVER or DRIVER:NAME=VALUE,...", source)
	}
	for part := range strings.SplitSeq(list, ",") {
		name, value, ok := strings.Cut(part, "=")
		if !more {
			break
		}
		if _, twice := attributes[name]; !ok || name == "" || twice {
			return "", nil, refused("csi source %q is not DRIVER or DRIVER:NAME=VALUE,...", source)
		}
		if attributes == nil {
			attributes = make(map[string]string)
		}
		attributes[name] = value
	}
	return driver, attributes, nil
}

// csiSource is a CSI volume in the one way that the list writes it: attributes in the order of their names.
func csiSource(driver string, attributes map[string]string) string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(attributes)) {
		list = append(list, name+"="+attributes[name])
	}
	if len(list) == 0 {
		return driver
	}
	return driver + ":" + strings.Join(list, ",")
}

// below says whether p is dir, or lies in it. Both are clean.
func below(p, dir string) bool {
	return p == dir || dir == "/" || strings.HasPrefix(p, dir+"/")
}

func overlap(a, b string) bool { return below(a, b) || below(b, a) }

// build makes the pod of a checked spec. It is pure: the same in, the same out.
func build(spec backends.Spec, c Config, gate, key string, at slot) *corev1.Pod {
	t, o := spec.Template, spec.Owner
	no, yes := false, true
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: at.name, Namespace: at.namespace,
			Labels: map[string]string{
				labelManaged: managed, labelServer: labelValue(gate), labelSession: labelValue(o.Session),
				labelUser: hashed(o.User), labelNetwork: t.Network,
			},
			Annotations: map[string]string{
				labelServer: gate, labelSession: o.Session, labelUser: o.User,
				annotationProfile: o.Profile, annotationGrant: o.Grant,
			},
		},
		Spec: corev1.PodSpec{
			RestartPolicy:                 corev1.RestartPolicyNever,
			ActiveDeadlineSeconds:         pointer(int64(c.MaxSession / time.Second)),
			TerminationGracePeriodSeconds: pointer(int64(1)), // the agent takes no signal but SIGKILL
			ServiceAccountName:            c.ServiceAccount,
			AutomountServiceAccountToken:  &no,
			EnableServiceLinks:            &no,
			Hostname:                      t.Hostname,
			HostAliases:                   hostAliases(t.ExtraHosts),
			PriorityClassName:             t.Priority,
			SecurityContext: &corev1.PodSecurityContext{
				RunAsNonRoot:   pointer(t.UID != 0),
				RunAsUser:      pointer(int64(t.UID)),
				RunAsGroup:     pointer(int64(t.GID)),
				SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			},
		},
	}
	p := &pod.Spec
	for _, g := range t.Groups {
		p.SecurityContext.SupplementalGroups = append(p.SecurityContext.SupplementalGroups, int64(g))
	}
	if t.Runtime != "" {
		p.RuntimeClassName = &t.Runtime
	}
	if c.UserNamespaces {
		p.HostUsers = &no
	}
	for _, name := range c.ImagePullSecrets {
		p.ImagePullSecrets = append(p.ImagePullSecrets, corev1.LocalObjectReference{Name: name})
	}
	if len(c.NodeSelector)+len(t.Nodes) > 0 {
		p.NodeSelector = make(map[string]string)
		for _, m := range []map[string]string{t.Nodes, c.NodeSelector} {
			for key, value := range m {
				p.NodeSelector[key] = value
			}
		}
	}
	for _, t := range c.Tolerations {
		p.Tolerations = append(p.Tolerations, corev1.Toleration{
			Key: t.Key, Operator: corev1.TolerationOperator(t.Operator), Value: t.Value, Effect: corev1.TaintEffect(t.Effect),
		})
	}
	for _, key := range t.Spread {
		p.TopologySpreadConstraints = append(p.TopologySpreadConstraints, corev1.TopologySpreadConstraint{
			TopologyKey: key, MaxSkew: 1, WhenUnsatisfiable: corev1.ScheduleAnyway,
			LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{labelManaged: managed}},
		})
	}
	if t.Network == noNetwork {
		// Nothing can be asked; a resolver that can't be reached would have every look-up wait for its time-outs.
		p.DNSPolicy = corev1.DNSNone
		p.DNSConfig = &corev1.PodDNSConfig{Nameservers: []string{"127.0.0.1"}}
	}

	storage := int64(minStorage)
	p.Volumes = []corev1.Volume{memory(tmpVolume, t.TmpSize)}
	if t.Scratch != "" {
		storage = max(t.HomeSize, storage)
		p.Volumes = append(p.Volumes, corev1.Volume{Name: homeVolume, VolumeSource: corev1.VolumeSource{
			EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: quantity(t.HomeSize)},
		}})
	} else {
		p.Volumes = append(p.Volumes, memory(homeVolume, t.HomeSize))
	}
	main := corev1.Container{
		Name: mainContainer, Image: t.Image, ImagePullPolicy: pullPolicy(t.PullPolicy),
		Command:    []string{insideAgent},
		Args:       []string{"serve", "--key", key, "--relay", insideRelay, "--home", t.Home},
		WorkingDir: "/",
		Env:        environment(t.Env),
		Resources:  resources(c, t.Memory, t.CPUs, storage),
		VolumeMounts: []corev1.VolumeMount{
			{Name: tmpVolume, MountPath: "/tmp"},
			{Name: homeVolume, MountPath: t.Home},
		},
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: &no,
			ReadOnlyRootFilesystem:   &yes,
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: capabilities(t.Caps)},
		},
	}
	if c.Stream == streamDirect {
		main.Args = append(main.Args, "--direct", ":"+strconv.Itoa(int(c.DirectPort)))
	}
	if !listed(c.AgentIn, t.Image) {
		inject(p, &main, c, t)
	}
	for i, m := range t.Mounts {
		name := "data-" + strconv.Itoa(i)
		p.Volumes = append(p.Volumes, corev1.Volume{Name: name, VolumeSource: volume(m)})
		mount := corev1.VolumeMount{Name: name, MountPath: m.Target, ReadOnly: !m.Write}
		if !m.Write && (m.Type == "pvc" || m.Type == "" || m.Type == "bind") {
			mount.RecursiveReadOnly = pointer(corev1.RecursiveReadOnlyIfPossible)
		}
		main.VolumeMounts = append(main.VolumeMounts, mount)
	}
	p.Containers = []corev1.Container{main}
	return pod
}

// inject brings the agent into a container whose image does not carry it. The container has it read-only, so that nobody
// in it can change the file's mode, 0111.
func inject(p *corev1.PodSpec, main *corev1.Container, c Config, t backends.Template) {
	main.VolumeMounts = append(main.VolumeMounts, corev1.VolumeMount{Name: agentVolume, MountPath: insideDir, ReadOnly: true})
	if c.AgentBy == "volume" {
		p.Volumes = append(p.Volumes, corev1.Volume{Name: agentVolume, VolumeSource: corev1.VolumeSource{
			Image: &corev1.ImageVolumeSource{Reference: c.AgentImage, PullPolicy: corev1.PullIfNotPresent},
		}})
		return
	}
	p.Volumes = append(p.Volumes, memory(agentVolume, agentRoom))
	no, yes, owner := false, true, int64(agentUID)
	p.InitContainers = []corev1.Container{{
		Name: initContainer, Image: c.AgentImage, ImagePullPolicy: corev1.PullIfNotPresent,
		Command:      []string{"/agent", "install", insideDir},
		Resources:    resources(c, minMemory, t.CPUs, minStorage),
		VolumeMounts: []corev1.VolumeMount{{Name: agentVolume, MountPath: insideDir}},
		SecurityContext: &corev1.SecurityContext{
			RunAsUser: &owner, RunAsGroup: &owner, RunAsNonRoot: &yes,
			AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
	}}
}

// memory is a volume in memory, which counts as the pod's. On disk its limit would be kept by ending the pod.
func memory(name string, size int64) corev1.Volume {
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
		EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory, SizeLimit: quantity(max(size&^4095, 4096))},
	}}
}

// readable is the mode of files from config maps and secrets: they are root's, and the session is not.
var readable = int32(0o444)

// volume is the source of a checked mount.
func volume(m backends.Mount) corev1.VolumeSource {
	switch m.Type {
	case "pvc":
		return corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: m.Source, ReadOnly: !m.Write}}
	case "configmap":
		return corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: m.Source}, DefaultMode: &readable,
		}}
	case "secret":
		return corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: m.Source, DefaultMode: &readable}}
	case "image":
		return corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: m.Source, PullPolicy: corev1.PullIfNotPresent}}
	case "csi":
		driver, attributes, _ := csiOf(m.Source) // checked
		return corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: driver, ReadOnly: pointer(true), VolumeAttributes: attributes}}
	case "projected":
		v := &corev1.ProjectedVolumeSource{DefaultMode: &readable}
		parts, _ := projections(m) // checked
		for _, p := range parts {
			name := corev1.LocalObjectReference{Name: p.name}
			if p.kind == "secret" {
				v.Sources = append(v.Sources, corev1.VolumeProjection{Secret: &corev1.SecretProjection{LocalObjectReference: name}})
			} else {
				v.Sources = append(v.Sources, corev1.VolumeProjection{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: name}})
			}
		}
		return corev1.VolumeSource{Projected: v}
	}
	return corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: m.Source, Type: pointer(corev1.HostPathUnset)}}
}

func pullPolicy(policy string) corev1.PullPolicy {
	switch policy {
	case "always":
		return corev1.PullAlways
	case "never":
		return corev1.PullNever
	}
	return corev1.PullIfNotPresent
}

// environment escapes what a kubelet would take for a reference to another variable.
func environment(list []string) (env []corev1.EnvVar) {
	for _, line := range list {
		name, value, _ := strings.Cut(line, "=")
		env = append(env, corev1.EnvVar{Name: name, Value: strings.ReplaceAll(value, "$", "$$")})
	}
	return env
}

func capabilities(names []string) (caps []corev1.Capability) {
	for _, name := range names {
		caps = append(caps, corev1.Capability(name))
	}
	return caps
}

// hostAliases are "name:address" lines.
func hostAliases(lines []string) (aliases []corev1.HostAlias) {
	for _, line := range lines {
		name, address, _ := strings.Cut(line, ":")
		aliases = append(aliases, corev1.HostAlias{IP: address, Hostnames: []string{name}})
	}
	return aliases
}

// resources are requested as they are limited: nobody's sandbox is the first to be evicted, or runs on what others may want.
// The operator may have less of a CPU requested, which waiting can't break.
func resources(c Config, memory int64, cpus float64, storage int64) corev1.ResourceRequirements {
	list := func(cpus float64) corev1.ResourceList {
		return corev1.ResourceList{
			corev1.ResourceMemory:           *quantity(memory),
			corev1.ResourceCPU:              *resource.NewMilliQuantity(max(int64(cpus*1000), 1), resource.DecimalSI),
			corev1.ResourceEphemeralStorage: *quantity(storage),
		}
	}
	return corev1.ResourceRequirements{Requests: list(cpus * c.CPUShare), Limits: list(cpus)}
}

func quantity(n int64) *resource.Quantity { return resource.NewQuantity(n, resource.BinarySI) }

func pointer[T any](v T) *T { return &v }
