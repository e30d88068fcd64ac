package kubernetes

import (
	"fmt"
	"maps"
	"path"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sallyport/sallyport/backends"
)

// judge is the last look at every pod before it is asked for, whether a template has changed it or not: an error names what
// this gate's configuration does not permit. plain is the pod without the template. What the judge does not know a template may
// set, it may not: the pod must be the plain one but for that.
func (c Config) judge(t backends.Template, plain, pod *corev1.Pod) error {
	j := judge{config: c, template: t, plain: plain}
	p := pod.Spec
	if err := j.meta(pod.ObjectMeta); err != nil {
		return err
	}
	for _, check := range []func(corev1.PodSpec) error{j.wholePod, j.placing, j.volumes, j.main, j.others, j.total} {
		if err := check(p); err != nil {
			return err
		}
	}
	// What was judged above is taken for equal; all the rest has to be.
	rest := pod.DeepCopy()
	s, was := &rest.Spec, plain.Spec
	rest.Labels, rest.Annotations = plain.Labels, plain.Annotations
	s.Affinity, s.TopologySpreadConstraints = was.Affinity, was.TopologySpreadConstraints
	s.NodeSelector, s.Tolerations = was.NodeSelector, was.Tolerations
	s.RuntimeClassName, s.PriorityClassName = was.RuntimeClassName, was.PriorityClassName
	s.DNSPolicy, s.DNSConfig, s.HostAliases = was.DNSPolicy, was.DNSConfig, was.HostAliases
	s.HostNetwork, s.HostIPC = was.HostNetwork, was.HostIPC
	s.ActiveDeadlineSeconds = was.ActiveDeadlineSeconds
	s.Volumes, s.InitContainers = was.Volumes, was.InitContainers
	m := &s.Containers[0]
	m.Env, m.EnvFrom, m.VolumeMounts = was.Containers[0].Env, was.Containers[0].EnvFrom, was.Containers[0].VolumeMounts
	if at := differ(reflect.ValueOf(*plain), reflect.ValueOf(*rest), ""); at != "" {
		return fmt.Errorf("%s is not a template's to set", at)
	}
	return nil
}

type judge struct {
	config   Config
	template backends.Template
	plain    *corev1.Pod
}

func (j judge) meta(m metav1.ObjectMeta) error {
	for _, s := range []struct {
		what, list string
		now, plain map[string]string
		permitted  []string
	}{
		{"label", "pod_labels", m.Labels, j.plain.Labels, j.config.PodLabels},
		{"annotation", "pod_annotations", m.Annotations, j.plain.Annotations, j.config.PodAnnotations},
	} {
		for key, value := range s.plain {
			if now, ok := s.now[key]; !ok || now != value {
				return fmt.Errorf("metadata: %s %q is the gate's", s.what, key)
			}
		}
		for key := range s.now {
			if _, own := s.plain[key]; !own && !slices.Contains(s.permitted, key) {
				return fmt.Errorf("metadata: %s %q is not listed (%s)", s.what, key, s.list)
			}
		}
	}
	return nil
}

// wholePod judges what no pod may be, and what its security context says.
func (j judge) wholePod(p corev1.PodSpec) error {
	c := j.config
	switch {
	case p.HostPID || p.ShareProcessNamespace != nil && *p.ShareProcessNamespace:
		return fmt.Errorf("spec: the agent must be the first of the sandbox's own processes (hostPID, shareProcessNamespace)")
	case p.HostNetwork && !slices.Contains(c.AllowHost, "network"):
		return fmt.Errorf("spec.hostNetwork: the node's network is not permitted (allow_host)")
	case p.HostNetwork && c.Stream == streamDirect:
		return fmt.Errorf("spec.hostNetwork: the agent would listen on the node (stream: direct)")
	case p.HostIPC && !slices.Contains(c.AllowHost, "ipc"):
		return fmt.Errorf("spec.hostIPC: the node's IPC is not permitted (allow_host)")
	case p.AutomountServiceAccountToken == nil || *p.AutomountServiceAccountToken:
		return fmt.Errorf("spec.automountServiceAccountToken: no sandbox has a token")
	case p.ServiceAccountName != c.ServiceAccount:
		return fmt.Errorf("spec.serviceAccountName: is the operator's (service_account)")
	case p.RestartPolicy != corev1.RestartPolicyNever:
		return fmt.Errorf("spec.restartPolicy: a sandbox starts once")
	case len(p.EphemeralContainers) > 0:
		return fmt.Errorf("spec.ephemeralContainers: can't be made with a pod")
	}
	longest := int64(c.MaxSession / time.Second)
	if d := p.ActiveDeadlineSeconds; d == nil || *d < 1 || *d > longest {
		return fmt.Errorf("spec.activeDeadlineSeconds: must be from 1 to %d (max_session)", longest)
	}
	s := p.SecurityContext
	if s == nil || s.RunAsUser == nil || *s.RunAsUser != int64(j.template.UID) || !c.AllowRoot && (s.RunAsNonRoot == nil || !*s.RunAsNonRoot) {
		return fmt.Errorf("spec.securityContext: runAsUser and runAsNonRoot are as the profile's user says")
	}
	if s.SeccompProfile == nil || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		return fmt.Errorf("spec.securityContext.seccompProfile: must be RuntimeDefault")
	}
	return nil
}

// placing judges which nodes may have the pod.
func (j judge) placing(p corev1.PodSpec) error {
	c := j.config
	for key, value := range c.NodeSelector {
		if now, ok := p.NodeSelector[key]; !ok || now != value {
			return fmt.Errorf("spec.nodeSelector: %q is the operator's (node_selector)", key)
		}
	}
	for key := range p.NodeSelector {
		if _, own := c.NodeSelector[key]; !own && !slices.Contains(c.NodeLabels, key) {
			return fmt.Errorf("spec.nodeSelector: %q is not listed (node_labels)", key)
		}
	}
	for _, t := range p.Tolerations {
		own := slices.ContainsFunc(j.plain.Spec.Tolerations, func(o corev1.Toleration) bool { return equality.Semantic.DeepEqual(o, t) })
		if !own && !slices.Contains(c.Taints, t.Key) {
			return fmt.Errorf("spec.tolerations: taint %q is not listed (taints)", t.Key)
		}
	}
	if name := p.RuntimeClassName; name == nil {
		if j.plain.Spec.RuntimeClassName != nil {
			return fmt.Errorf("spec.runtimeClassName: can't be taken away")
		}
	} else if *name != c.Runtime && !slices.Contains(c.Runtimes, *name) {
		return fmt.Errorf("spec.runtimeClassName: %q is not listed (runtimes)", *name)
	}
	if name := p.PriorityClassName; name != c.Priority && !slices.Contains(c.Priorities, name) {
		return fmt.Errorf("spec.priorityClassName: %q is not listed (priorities)", name)
	}
	for _, s := range p.TopologySpreadConstraints {
		if len(s.TopologyKey) == 0 || s.MaxSkew < 1 {
			return fmt.Errorf("spec.topologySpreadConstraints: topologyKey and maxSkew are needed")
		}
	}
	a := p.Affinity
	if a == nil {
		return nil
	}
	if n := a.NodeAffinity; n != nil {
		terms := []corev1.NodeSelectorTerm{}
		if n.RequiredDuringSchedulingIgnoredDuringExecution != nil {
			terms = n.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
		}
		for _, t := range n.PreferredDuringSchedulingIgnoredDuringExecution {
			terms = append(terms, t.Preference)
		}
		for _, t := range terms {
			if len(t.MatchFields) > 0 {
				return fmt.Errorf("spec.affinity.nodeAffinity: matchFields name single nodes")
			}
			for _, e := range t.MatchExpressions {
				if !slices.Contains(c.NodeLabels, e.Key) {
					return fmt.Errorf("spec.affinity.nodeAffinity: %q is not listed (node_labels)", e.Key)
				}
			}
		}
	}
	var terms []corev1.PodAffinityTerm
	var weighted []corev1.WeightedPodAffinityTerm
	if a.PodAffinity != nil {
		terms = append(terms, a.PodAffinity.RequiredDuringSchedulingIgnoredDuringExecution...)
		weighted = append(weighted, a.PodAffinity.PreferredDuringSchedulingIgnoredDuringExecution...)
	}
	if a.PodAntiAffinity != nil {
		terms = append(terms, a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution...)
		weighted = append(weighted, a.PodAntiAffinity.PreferredDuringSchedulingIgnoredDuringExecution...)
	}
	for _, w := range weighted {
		terms = append(terms, w.PodAffinityTerm)
	}
	for _, t := range terms {
		if len(t.Namespaces) > 0 || t.NamespaceSelector != nil {
			return fmt.Errorf("spec.affinity: pods of other namespaces are not a template's to ask for")
		}
	}
	return nil
}

// own are the volumes of the plain pod.
func (j judge) own(name string) *corev1.Volume {
	for i, v := range j.plain.Spec.Volumes {
		if v.Name == name {
			return &j.plain.Spec.Volumes[i]
		}
	}
	return nil
}

func (j judge) volumes(p corev1.PodSpec) error {
	seen := make(map[string]bool)
	for _, v := range p.Volumes {
		seen[v.Name] = true
		if own := j.own(v.Name); own != nil {
			if !equality.Semantic.DeepEqual(*own, v) {
				return fmt.Errorf("spec.volumes: %q is the gate's", v.Name)
			}
			continue
		}
		if err := j.volume(v); err != nil {
			return fmt.Errorf("spec.volumes: %q: %w", v.Name, err)
		}
	}
	for _, v := range j.plain.Spec.Volumes {
		if !seen[v.Name] {
			return fmt.Errorf("spec.volumes: %q is the gate's", v.Name)
		}
	}
	return nil
}

// volume judges one that a template brings: each kind by the list that a profile's mounts have.
func (j judge) volume(v corev1.Volume) error {
	c := j.config
	need := func(list []string, name, what, key string) error {
		if !slices.Contains(list, name) {
			return fmt.Errorf("%s %q is not listed (%s)", what, name, key)
		}
		return nil
	}
	s := v.VolumeSource
	known := corev1.VolumeSource{ // and nothing else
		EmptyDir: s.EmptyDir, PersistentVolumeClaim: s.PersistentVolumeClaim, ConfigMap: s.ConfigMap, Secret: s.Secret, Image: s.Image,
		HostPath: s.HostPath, CSI: s.CSI, DownwardAPI: s.DownwardAPI, Projected: s.Projected,
	}
	if !equality.Semantic.DeepEqual(known, s) {
		return fmt.Errorf("no volume of this kind can be a template's")
	}
	switch {
	case s.EmptyDir != nil:
		e := s.EmptyDir
		limit := c.MaxStorage
		if e.Medium != corev1.StorageMediumDefault {
			limit = c.MaxMemory
		}
		if e.SizeLimit == nil || e.SizeLimit.Sign() <= 0 || e.SizeLimit.Cmp(*quantity(int64(limit))) > 0 {
			return fmt.Errorf("emptyDir needs a sizeLimit up to %v", limit)
		}
	case s.PersistentVolumeClaim != nil:
		return need(c.Claims, s.PersistentVolumeClaim.ClaimName, "claim", "claims")
	case s.ConfigMap != nil:
		return need(c.ConfigMaps, s.ConfigMap.Name, "config map", "config_maps")
	case s.Secret != nil:
		return need(c.Secrets, s.Secret.SecretName, "secret", "secrets")
	case s.Image != nil:
		if !listed(c.Images, s.Image.Reference) {
			return fmt.Errorf("image %q is not listed (images)", s.Image.Reference)
		}
	case s.HostPath != nil:
		p := s.HostPath.Path
		if s.HostPath.Type != nil && *s.HostPath.Type != corev1.HostPathUnset && *s.HostPath.Type != corev1.HostPathDirectory && *s.HostPath.Type != corev1.HostPathFile {
			return fmt.Errorf("host path %q: type %q is not a template's", p, *s.HostPath.Type)
		}
		if path.Clean(p) != p || !slices.ContainsFunc(c.HostPaths, func(dir string) bool { return below(p, dir) }) {
			return fmt.Errorf("host path %q lies under no listed directory (host_paths)", p)
		}
	case s.CSI != nil:
		if s.CSI.ReadOnly == nil || !*s.CSI.ReadOnly || s.CSI.NodePublishSecretRef != nil {
			return fmt.Errorf("csi must be readOnly, without a nodePublishSecretRef")
		}
		for name, value := range s.CSI.VolumeAttributes {
			if strings.ContainsAny(name, ",=:") || strings.Contains(value, ",") {
				return fmt.Errorf("csi attribute %q can't be compared with the list (csi)", name)
			}
		}
		if source := csiSource(s.CSI.Driver, s.CSI.VolumeAttributes); !listed(c.CSI, source) {
			return fmt.Errorf("csi volume %q is not listed (csi)", source)
		}
	case s.DownwardAPI != nil: // the pod's own
	case s.Projected != nil:
		for _, part := range s.Projected.Sources {
			switch {
			case !equality.Semantic.DeepEqual(part, corev1.VolumeProjection{Secret: part.Secret, ConfigMap: part.ConfigMap, DownwardAPI: part.DownwardAPI}):
				return fmt.Errorf("projected: only secrets, config maps and the downward API can be a template's")
			case part.Secret != nil:
				if err := need(c.Secrets, part.Secret.Name, "secret", "secrets"); err != nil {
					return err
				}
			case part.ConfigMap != nil:
				if err := need(c.ConfigMaps, part.ConfigMap.Name, "config map", "config_maps"); err != nil {
					return err
				}
			}
		}
	default:
		return fmt.Errorf("it has no source")
	}
	return nil
}

// mounts judges those of a container, taken being what lies there already.
func (j judge) mounts(p corev1.PodSpec, list []corev1.VolumeMount, taken targets) error {
	for _, m := range list {
		if err := taken.add(m.MountPath); err != nil {
			return err
		}
		i := slices.IndexFunc(p.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name })
		if i < 0 || j.own(m.Name) != nil {
			return fmt.Errorf("%q at %s: only the template's own volumes can be mounted", m.Name, m.MountPath)
		}
		v := p.Volumes[i]
		if m.MountPropagation != nil && *m.MountPropagation != corev1.MountPropagationNone || m.SubPathExpr != "" {
			return fmt.Errorf("%q at %s: mountPropagation and subPathExpr are not a template's", m.Name, m.MountPath)
		}
		if m.SubPath != "" && (v.HostPath != nil || v.PersistentVolumeClaim != nil) {
			return fmt.Errorf("%q at %s: no subPath of host paths and claims", m.Name, m.MountPath)
		}
		claim := v.PersistentVolumeClaim
		if !m.ReadOnly && v.EmptyDir == nil && (claim == nil || !slices.Contains(j.config.WriteClaims, claim.ClaimName)) {
			return fmt.Errorf("%q at %s: must be readOnly", m.Name, m.MountPath)
		}
	}
	return nil
}

func (j judge) environment(env []corev1.EnvVar, from []corev1.EnvFromSource) error {
	secret := func(name string) error {
		if !slices.Contains(j.config.Secrets, name) {
			return fmt.Errorf("env: secret %q is not listed (secrets)", name)
		}
		return nil
	}
	settings := func(name string) error {
		if !slices.Contains(j.config.ConfigMaps, name) {
			return fmt.Errorf("env: config map %q is not listed (config_maps)", name)
		}
		return nil
	}
	var err error
	for _, e := range env {
		switch f := e.ValueFrom; {
		case err != nil || f == nil:
		case !equality.Semantic.DeepEqual(*f, corev1.EnvVarSource{
			FieldRef: f.FieldRef, ResourceFieldRef: f.ResourceFieldRef, ConfigMapKeyRef: f.ConfigMapKeyRef, SecretKeyRef: f.SecretKeyRef}):
			err = fmt.Errorf("env: %s: no value of this kind can be a template's", e.Name)
		case f.SecretKeyRef != nil:
			err = secret(f.SecretKeyRef.Name)
		case f.ConfigMapKeyRef != nil:
			err = settings(f.ConfigMapKeyRef.Name)
		}
	}
	for _, f := range from {
		if err == nil && f.SecretRef != nil {
			err = secret(f.SecretRef.Name)
		}
		if err == nil && f.ConfigMapRef != nil {
			err = settings(f.ConfigMapRef.Name)
		}
	}
	return err
}

// main judges the session's container; it has to be the only one that is no init container, as the pod ends with it.
func (j judge) main(p corev1.PodSpec) error {
	if len(p.Containers) != 1 || p.Containers[0].Name != mainContainer {
		return fmt.Errorf("spec.containers: there is one, %q; further ones are initContainers, with restartPolicy Always if they go on", mainContainer)
	}
	m, plain := p.Containers[0], j.plain.Spec.Containers[0]
	if err := j.confined(m, j.template.Caps); err != nil {
		return fmt.Errorf("spec.containers[0].%w", err)
	}
	if err := j.environment(m.Env, m.EnvFrom); err != nil {
		return fmt.Errorf("spec.containers[0].%w", err)
	}
	taken := targets{}
	var more []corev1.VolumeMount
	for _, v := range plain.VolumeMounts {
		if !slices.ContainsFunc(m.VolumeMounts, func(o corev1.VolumeMount) bool { return equality.Semantic.DeepEqual(o, v) }) {
			return fmt.Errorf("spec.containers[0].volumeMounts: %s is the gate's", v.MountPath)
		}
		taken[v.MountPath] = true
	}
	for _, v := range m.VolumeMounts {
		if !slices.ContainsFunc(plain.VolumeMounts, func(o corev1.VolumeMount) bool { return equality.Semantic.DeepEqual(o, v) }) {
			more = append(more, v)
		}
	}
	if err := j.mounts(p, more, taken); err != nil {
		return fmt.Errorf("spec.containers[0].volumeMounts: %w", err)
	}
	return nil
}

// confined judges what no container may be.
func (j judge) confined(m corev1.Container, caps []string) error {
	s := m.SecurityContext
	switch {
	case s == nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation:
		return fmt.Errorf("securityContext.allowPrivilegeEscalation: must be false")
	case s.Privileged != nil && *s.Privileged:
		return fmt.Errorf("securityContext.privileged: must be false")
	case s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem:
		return fmt.Errorf("securityContext.readOnlyRootFilesystem: must be true")
	case s.Capabilities == nil || !slices.Contains(s.Capabilities.Drop, "ALL"):
		return fmt.Errorf("securityContext.capabilities: must drop ALL")
	case s.SeccompProfile != nil && s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault:
		return fmt.Errorf("securityContext.seccompProfile: must be RuntimeDefault")
	case s.RunAsNonRoot != nil && !*s.RunAsNonRoot && !j.config.AllowRoot, s.RunAsUser != nil && *s.RunAsUser == 0 && !j.config.AllowRoot:
		return fmt.Errorf("securityContext: root is not permitted (allow_root)")
	}
	for _, name := range s.Capabilities.Add {
		if neverCap(string(name)) != "" || !slices.Contains(j.config.AllowCaps, string(name)) || !slices.Contains(caps, string(name)) {
			return fmt.Errorf("securityContext.capabilities: %q is not permitted", name)
		}
	}
	return nil
}

// others judges init containers: the gate's own, and those of listed images, which have nothing of the gate's.
func (j judge) others(p corev1.PodSpec) error {
	own := make(map[string]corev1.Container)
	for _, m := range j.plain.Spec.InitContainers {
		own[m.Name] = m
	}
	left := maps.Clone(own)
	for i, m := range p.InitContainers {
		at := fmt.Sprintf("spec.initContainers[%d]", i)
		if plain, ok := own[m.Name]; ok {
			if !equality.Semantic.DeepEqual(plain, m) {
				return fmt.Errorf("%s: %q is the gate's", at, m.Name)
			}
			delete(left, m.Name)
			continue
		}
		if err := j.other(p, m); err != nil {
			return fmt.Errorf("%s.%w", at, err)
		}
	}
	for name := range left {
		return fmt.Errorf("spec.initContainers: %q is the gate's", name)
	}
	return nil
}

func (j judge) other(p corev1.PodSpec, m corev1.Container) error {
	if !listed(j.config.Containers, m.Image) {
		return fmt.Errorf("image: %q is not listed (containers)", m.Image)
	}
	if err := j.confined(m, nil); err != nil {
		return err
	}
	s := m.SecurityContext
	if s.RunAsUser != nil && *s.RunAsUser == agentUID {
		return fmt.Errorf("securityContext.runAsUser: %d is the agent's own", agentUID)
	}
	if m.RestartPolicy != nil && *m.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		return fmt.Errorf("restartPolicy: Always, or none")
	}
	for _, name := range []corev1.ResourceName{corev1.ResourceMemory, corev1.ResourceCPU, corev1.ResourceEphemeralStorage} {
		limit, ok := m.Resources.Limits[name]
		if !ok || limit.Sign() <= 0 {
			return fmt.Errorf("resources.limits: %s is missing", name)
		}
		if request, ok := m.Resources.Requests[name]; ok && (request.Sign() < 0 || request.Cmp(limit) > 0) {
			return fmt.Errorf("resources.requests: more %s than its limit", name)
		}
	}
	if len(m.Resources.Limits) != 3 || len(m.Resources.Requests) > 3 || len(m.Resources.Claims) > 0 {
		return fmt.Errorf("resources: only memory, cpu and ephemeral-storage can be a template's")
	}
	if err := j.environment(m.Env, m.EnvFrom); err != nil {
		return err
	}
	if err := j.mounts(p, m.VolumeMounts, targets{}); err != nil {
		return fmt.Errorf("volumeMounts: %w", err)
	}
	known := corev1.Container{
		Name: m.Name, Image: m.Image, ImagePullPolicy: m.ImagePullPolicy, Command: m.Command, Args: m.Args, WorkingDir: m.WorkingDir,
		Env: m.Env, EnvFrom: m.EnvFrom, VolumeMounts: m.VolumeMounts, Resources: m.Resources, RestartPolicy: m.RestartPolicy,
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: s.AllowPrivilegeEscalation, ReadOnlyRootFilesystem: s.ReadOnlyRootFilesystem,
			Capabilities: s.Capabilities, SeccompProfile: s.SeccompProfile, Privileged: s.Privileged,
			RunAsNonRoot: s.RunAsNonRoot, RunAsUser: s.RunAsUser, RunAsGroup: s.RunAsGroup,
		},
	}
	if at := differ(reflect.ValueOf(known), reflect.ValueOf(m), ""); at != "" {
		return fmt.Errorf("%s is not a template's to set", at)
	}
	return nil
}

// total judges all containers and volumes in memory together: what goes on beside the session counts as the sandbox's.
func (j judge) total(p corev1.PodSpec) error {
	if len(p.InitContainers) == len(j.plain.Spec.InitContainers) && len(p.Volumes) == len(j.plain.Spec.Volumes) {
		return nil // check has judged it
	}
	c := j.config
	for name, limit := range map[corev1.ResourceName]*resource.Quantity{
		corev1.ResourceMemory:           quantity(int64(c.MaxMemory)),
		corev1.ResourceCPU:              resource.NewMilliQuantity(int64(c.MaxCPUs*1000), resource.DecimalSI),
		corev1.ResourceEphemeralStorage: quantity(int64(c.MaxStorage)),
	} {
		sum := p.Containers[0].Resources.Limits[name].DeepCopy()
		for _, m := range p.InitContainers {
			one := m.Resources.Limits[name]
			if m.RestartPolicy != nil {
				sum.Add(one)
			} else if one.Cmp(*limit) > 0 {
				return fmt.Errorf("spec.initContainers: %q has more %s than is permitted", m.Name, name)
			}
		}
		if sum.Cmp(*limit) > 0 {
			return fmt.Errorf("spec: all containers together have more %s than is permitted: %v", name, limit)
		}
	}
	return nil
}

// differ gives the place where two values are not the same, as a path of their JSON; empty: they are.
func differ(a, b reflect.Value, at string) string {
	if equality.Semantic.DeepEqual(a.Interface(), b.Interface()) {
		return ""
	}
	switch a.Kind() {
	case reflect.Pointer:
		if !a.IsNil() && !b.IsNil() {
			return differ(a.Elem(), b.Elem(), at)
		}
	case reflect.Struct:
		for i := range a.NumField() {
			f := a.Type().Field(i)
			if !f.IsExported() {
				continue
			}
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			where := strings.TrimSuffix(at+"."+name, ".")
			if found := differ(a.Field(i), b.Field(i), strings.TrimPrefix(where, ".")); found != "" {
				return found
			}
		}
	case reflect.Slice:
		for i := range min(a.Len(), b.Len()) {
			if found := differ(a.Index(i), b.Index(i), fmt.Sprintf("%s[%d]", at, i)); found != "" {
				return found
			}
		}
	}
	return at
}
