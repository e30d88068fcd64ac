package kubernetes

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sallyport/sallyport/agent"
	"github.com/sallyport/sallyport/backends"
)

// Targets says which pods sandboxes may join, whatever profiles ask for, and how. The gate's rights in their namespaces are a
// role of its own (deploy/kubernetes/targets).
type Targets struct {
	Namespaces []string          `yaml:"namespaces"` // whose pods may be joined; default none
	Labels     map[string]string `yaml:"labels"`     // that a pod must have besides, all of them; default none
	Processes  bool              `yaml:"processes"`  // whether a container's process namespace may be joined
	Files      bool              `yaml:"files"`      // whether the uid of its processes may be had there
	// MaxPerTarget is how many sandboxes may have joined a pod at a time, over all gates; default 4.
	MaxPerTarget int `yaml:"max_per_target"`
}

const defaultPerTarget = 4

// targetPrefix begins the names of the ephemeral containers; a hash of the user and something random follow.
const targetPrefix = "sallyport-"

// maxEntries bounds the ephemeral containers of ours that a pod ever has: what has ended stays in its specification.
const maxEntries = 200

// targetHome is where sessions are at home: an ephemeral container can have no volume of its own.
const targetHome = "/tmp"

func (t Targets) validate() (errs []error) {
	for _, ns := range t.Namespaces {
		if !dnsLabel.MatchString(ns) {
			errs = append(errs, fmt.Errorf("targets.namespaces: %q is no namespace's name", ns))
		}
	}
	for key, value := range t.Labels {
		if _, err := labels.ValidatedSelectorFromSet(labels.Set{key: value}); err != nil {
			errs = append(errs, fmt.Errorf("targets.labels: %w", err))
		}
	}
	if t.Files && !t.Processes {
		errs = append(errs, errors.New("targets.files: can't be had without processes"))
	}
	if t.MaxPerTarget < 0 || t.MaxPerTarget > maxEntries {
		errs = append(errs, fmt.Errorf("targets.max_per_target: must be from 0, which is %d, to %d", defaultPerTarget, maxEntries))
	}
	return errs
}

// checkTarget refuses what an ephemeral container can't have, or what the operator's configuration does not permit of it.
func (b *Backend) checkTarget(spec backends.Spec) error {
	t := spec.Template
	c, target := b.config.Targets, t.Target
	if !sessionPattern.MatchString(spec.Owner.Session) {
		return errors.New("bad session ID")
	}
	switch {
	case !slices.Contains(c.Namespaces, target.Namespace):
		return refused("target: namespace %q is not listed (targets.namespaces)", target.Namespace)
	case target.Name == "" && target.Workload == "" && len(target.Labels) == 0:
		return refused("target: neither name, workload nor labels are set")
	case target.Processes && !c.Processes:
		return refused("target: processes are not permitted (targets.processes)")
	case target.Files && (!c.Files || !target.Processes):
		return refused("target: files are not permitted (targets.files)")
	case !listed(b.config.AgentIn, t.Image):
		return refused("target: image %q does not carry the agent (agent_in), and nothing can be mounted into an ephemeral container", t.Image)
	case t.Network != "" || t.Hostname != "" || len(t.ExtraHosts) > 0:
		return refused("target: its network, hostname and hosts are joined; name no network, hostname and extra_hosts")
	case t.Memory != 0 || t.CPUs != 0 || t.PIDs != 0 || t.TmpSize != 0 || t.HomeSize != 0 || t.Scratch != "":
		return refused("target: an ephemeral container has no limits and no volumes of its own; name no memory, cpus, pids, sizes and scratch")
	case len(t.Mounts) > 0:
		return refused("target: nothing can be mounted into an ephemeral container; name no mounts")
	case t.Namespace != "" || len(t.Nodes) > 0 || t.Priority != "" || t.Runtime != "" || len(t.Groups) > 0:
		return refused("target: its pod has namespace, node, priority, runtime and groups already; name none of them")
	case len(t.Spread) > 0 || len(t.Pod) > 0:
		return refused("target: its pod is there already; name no spread and no pod")
	case t.UID == 0 && !b.config.AllowRoot:
		return refused("uid 0 is not permitted (allow_root)")
	case t.UID == 0 && !target.Files:
		return refused("target: uid 0 is what its files are permitted for (permit.target.files)")
	case t.UID == agentUID:
		return refused("uid %d is the agent's own", t.UID)
	case target.Processes && !target.Files && len(t.Caps) > 0:
		return refused("target: capabilities reach into its processes, as its files' permit does (permit.target.files)")
	}
	for _, name := range t.Caps {
		if reason := neverCap(name); reason != "" {
			return refused("capability %q %s", name, reason)
		}
		if !slices.Contains(b.config.AllowCaps, name) {
			return refused("capability %q is not listed (allow_caps)", name)
		}
	}
	switch t.PullPolicy {
	case "", "missing", "always", "never":
	default:
		return refused("pull policy %q is unknown", t.PullPolicy)
	}
	return t.CheckEnv()
}

// Of a namespace, so many pods are looked at for a target, in pages.
const maxListed, pageSize = 5000, 500

// Targets implements backends.Joiner.
func (b *Backend) Targets(ctx context.Context, spec backends.Spec, name string) ([]backends.Running, error) {
	target := spec.Template.Target
	if target == nil {
		return nil, nil
	}
	if err := b.checkTarget(spec); err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	wanted := cmp.Or(name, target.Name)
	if name != "" && target.Name != "" && name != target.Name {
		return nil, nil
	}
	var found []backends.Running
	look := func(pod *corev1.Pod) {
		if b.unfit(target, pod) == "" {
			found = append(found, running(target, pod))
		}
	}
	if wanted != "" {
		if !dnsName.MatchString(wanted) { // it becomes part of a request's path
			return nil, nil
		}
		var pod corev1.Pod
		err := b.cluster.get(ctx, target.Namespace, "pods", wanted, &pod)
		if apierrors.IsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, targetFailed("look at the target", err)
		}
		look(&pod)
		return found, nil
	}
	selector := labels.Set{}
	for _, set := range []map[string]string{b.config.Targets.Labels, target.Labels} {
		for key, value := range set {
			if v, ok := selector[key]; ok && v != value {
				return nil, nil
			}
			selector[key] = value
		}
	}
	valid, err := labels.ValidatedSelectorFromSet(selector)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", refused("target: %v", err))
	}
	seen := 0
	for more := ""; ; {
		var pods corev1.PodList
		if err := b.cluster.list(ctx, target.Namespace, "pods", listOptions{labels: valid.String(), limit: pageSize, next: more}, &pods); err != nil {
			return nil, targetFailed("find the target", err)
		}
		for i := range pods.Items {
			look(&pods.Items[i])
		}
		seen += len(pods.Items)
		if more = pods.Continue; more == "" || seen >= maxListed {
			break
		}
	}
	slices.SortFunc(found, func(a, b backends.Running) int { return cmp.Compare(a.Name, b.Name) })
	return found[:min(len(found), backends.MaxTargets)], nil
}

// joinRights are what deploy/kubernetes/targets gives.
var joinRights = []authorizationv1.ResourceAttributes{
	{Verb: "get", Resource: "pods"}, {Verb: "list", Resource: "pods"}, {Verb: "watch", Resource: "pods"},
	{Verb: "patch", Resource: "pods", Subresource: "ephemeralcontainers"}, {Verb: "create", Resource: "pods", Subresource: "exec"},
}

// MayJoin asks whether the gate has the rights that targets need, in each of their namespaces. The error names all it lacks.
func (b *Backend) MayJoin(ctx context.Context) error {
	var lacking []string
	for _, ns := range b.config.Targets.Namespaces {
		for _, right := range joinRights {
			right.Namespace = ns
			may, err := b.cluster.may(ctx, right)
			if err != nil {
				return fmt.Errorf("kubernetes: ask for the rights in namespace %s: %w", ns, err)
			}
			if !may {
				what := right.Resource
				if right.Subresource != "" {
					what += "/" + right.Subresource
				}
				lacking = append(lacking, fmt.Sprintf("%s %s in %s", right.Verb, what, ns))
			}
		}
	}
	if len(lacking) > 0 {
		return fmt.Errorf("kubernetes: targets: the gate may not %s: apply deploy/kubernetes/targets", strings.Join(lacking, ", "))
	}
	return nil
}

// unfit says why a pod can't be the target; empty: it can.
func (b *Backend) unfit(target *backends.Target, pod *corev1.Pod) string {
	switch {
	case pod.Namespace != target.Namespace,
		target.Name != "" && pod.Name != target.Name,
		!target.Has(pod.Labels),
		target.Workload != "" && !ownedBy(pod, target.Workload):
		return "is not what the profile names"
	case !(&backends.Target{Labels: b.config.Targets.Labels}).Has(pod.Labels):
		return "lacks a label that the operator asks for (targets.labels)"
	case pod.Labels[labelManaged] == managed:
		return "is a session's sandbox"
	case pod.Spec.HostNetwork || pod.Spec.HostPID || pod.Spec.HostIPC:
		return "has the node's own namespaces"
	case pod.Spec.ShareProcessNamespace != nil && *pod.Spec.ShareProcessNamespace && !target.Processes:
		return "has one process namespace for all its containers, and processes are not permitted"
	case pod.DeletionTimestamp != nil || pod.Status.Phase != corev1.PodRunning:
		return "does not run"
	}
	container := containerOf(target, pod)
	if container == "" {
		return "has no such container"
	}
	if s := statusOf(pod.Status.ContainerStatuses, container); target.Processes && (s == nil || s.State.Running == nil) {
		return "does not run"
	}
	return ""
}

// ownedBy says whether a pod is one of a workload's, "deployment/NAME", by its controller. A deployment's pods are a replica
// set's, whose name the deployment makes of its own and the label pod-template-hash.
func ownedBy(pod *corev1.Pod, workload string) bool {
	kind, name, _ := strings.Cut(workload, "/")
	owner := metav1.GetControllerOf(pod)
	if owner == nil || name == "" {
		return false
	}
	if kind == "deployment" {
		hash := pod.Labels["pod-template-hash"]
		return owner.Kind == "ReplicaSet" && hash != "" && owner.Name == name+"-"+hash
	}
	return strings.ToLower(owner.Kind) == kind && owner.Name == name
}

// containerOf is the container that is meant: the profile's, else that of the annotation which kubectl looks at, else the first.
func containerOf(target *backends.Target, pod *corev1.Pod) string {
	name := target.Container
	if name == "" {
		name = pod.Annotations["kubectl.kubernetes.io/default-container"]
	}
	for _, c := range pod.Spec.Containers {
		if c.Name == name || name == "" {
			return c.Name
		}
	}
	return ""
}

func statusOf(list []corev1.ContainerStatus, name string) *corev1.ContainerStatus {
	for i := range list {
		if list[i].Name == name {
			return &list[i]
		}
	}
	return nil
}

func running(target *backends.Target, pod *corev1.Pod) backends.Running {
	r := backends.Running{
		ID: string(pod.UID), Namespace: pod.Namespace, Name: pod.Name, Labels: pod.Labels, Container: containerOf(target, pod),
	}
	for _, c := range pod.Spec.Containers {
		if c.Name == r.Container {
			r.Image = c.Image
		}
	}
	if s := statusOf(pod.Status.ContainerStatuses, r.Container); s != nil {
		r.Digest = s.ImageID
	}
	return r
}

// targetFailed adds words for the user to the API server's refusal of what concerns a target.
func targetFailed(what string, err error) error {
	err = fmt.Errorf("kubernetes: %s: %w", what, err)
	switch text := refusal(err); {
	case apierrors.IsForbidden(err):
		return &backends.TextError{Text: "the cluster does not let this gate join the target: tell an operator", Err: err}
	case apierrors.IsNotFound(err), apierrors.IsInvalid(err):
		return &backends.TextError{Text: "the cluster does not take the sandbox into the target: tell an operator", Err: err}
	case text != "":
		return &backends.TextError{Text: text, Err: err}
	}
	return err
}

// guest is a sandbox in a target: one ephemeral container of a pod. Its life: start adds it to the pod and reaches its agent
// through a relay; watch sees its end, and the pod's; Close sees to it that it does not run any more. The pod's specification
// and status keep it as long as there is the pod.
type guest struct {
	inside
	user      string
	target    *backends.Target
	at        slot      // the target
	uid       types.UID // of the pod
	restarts  int32     // of the target's container when it was joined
	container string    // ephemeral

	mu   sync.Mutex
	fate *backends.TextError // what became of the target; guarded by mu

	closing sync.Mutex // held by the Close that removes
	gone    bool       // guarded by closing: nothing of it runs
	added   bool       // guarded by closing: the pod may have it
}

var (
	_ backends.Joiner   = (*Backend)(nil)
	_ backends.Sandbox  = (*guest)(nil)
	_ backends.Dialer   = (*guest)(nil)
	_ backends.Listener = (*guest)(nil)
)

// startGuest starts a sandbox in its target.
func (b *Backend) startGuest(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	if err := b.checkTarget(spec); err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	if spec.Join == nil {
		return nil, errors.New("kubernetes: no target was chosen")
	}
	g := &guest{
		inside: b.inside(spec), user: spec.Owner.User, target: spec.Template.Target,
		at: slot{spec.Join.Namespace, spec.Join.Name}, uid: types.UID(spec.Join.ID),
		container: targetPrefix + hashed(spec.Owner.User) + "-" + strings.ToLower(rand.Text()[:10]),
	}
	if !b.admit(g) {
		return nil, &backends.TextError{
			Text: fmt.Sprintf("you have %d sandboxes already: end one of them first", b.config.MaxPerUser),
			Err:  errors.New("max_per_user is reached"),
		}
	}
	if err := g.start(ctx, spec); err != nil {
		if rerr := g.remove(ctx); rerr != nil {
			err = errors.Join(err, rerr)
		}
		return nil, err
	}
	go g.watch()
	return g, nil
}

// admit counts a guest, if its user may have one more of this gate's.
func (b *Backend) admit(g *guest) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for other := range b.guests {
		if other.user == g.user {
			n++
		}
	}
	if n >= b.config.MaxPerUser {
		return false
	}
	if b.guests == nil {
		b.guests = make(map[*guest]bool)
	}
	b.guests[g] = true
	return true
}

func (g *guest) start(ctx context.Context, spec backends.Spec) error {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	container, err := ephemeral(spec, g.backend.gate, g.container, base64.StdEncoding.EncodeToString(public))
	if err != nil {
		return err
	}
	pod, err := g.add(ctx, container)
	if err != nil {
		return err
	}
	now := running(g.target, pod)
	if s := statusOf(pod.Status.ContainerStatuses, now.Container); s != nil {
		g.restarts = s.RestartCount
	}
	weaker := append(g.target.Weaknesses(),
		"the pod's hostname, IPC and /dev/shm are shared",
		"no limits of its own: memory, CPU, processes and disk are the pod's, and the pod's containers can be killed or evicted for them",
		"the image's file system can be written")
	g.info = backends.Info{
		Backend: "kubernetes", Image: spec.Template.Image, Digest: pinned(spec.Template.Image), Node: pod.Spec.NodeName, Spec: container,
		Joined: &backends.Joined{Running: now, What: g.target.Parts(), Weaker: weaker},
	}
	if err := g.reach(ctx, private, agent.Hello{
		User: spec.Owner.User, Deadline: spec.Owner.Expires, Audit: spec.Template.ExecAudit, Reports: spec.Reports,
	}); err != nil {
		return err
	}
	g.info.ExecAudit = g.client.ExecAudit()
	return nil
}

// ephemeral makes the container of a checked spec. It is pure: the same in, the same out. The API permits it neither resources
// nor a volume that the pod does not have; and the agent's socket wants a /tmp that can be written.
func ephemeral(spec backends.Spec, gate, name, key string) (corev1.EphemeralContainer, error) {
	t := spec.Template
	no := false
	home := cmp.Or(t.Home, targetHome)
	o := spec.Owner
	owner, err := json.Marshal(guestOwner{Gate: gate, Session: o.Session, User: o.User, Profile: o.Profile, Grant: o.Grant})
	if err != nil {
		return corev1.EphemeralContainer{}, err
	}
	c := corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon{
		Name: name, Image: t.Image, ImagePullPolicy: pullPolicy(t.PullPolicy),
		Command:    []string{insideAgent},
		Args:       []string{"serve", "--key", key, "--relay", insideRelay, "--home", home},
		WorkingDir: "/",
		Env:        append(environment(t.Env), environment([]string{agent.OwnerEnv + "=" + string(owner)})...),
		SecurityContext: &corev1.SecurityContext{
			RunAsUser: pointer(int64(t.UID)), RunAsGroup: pointer(int64(t.GID)), RunAsNonRoot: pointer(t.UID != 0),
			Privileged: &no, AllowPrivilegeEscalation: &no,
			Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: capabilities(t.Caps)},
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
	}}
	if t.Target.Processes {
		c.TargetContainerName = spec.Join.Container
		if !t.Target.Files {
			c.Args = append(c.Args, "--own-uid")
		}
	}
	return c, nil
}

// guestOwner says in an ephemeral container whose it is: it has no labels and no annotations of its own.
type guestOwner struct {
	Gate    string `json:"gate"` // as in the pods' labelServer
	Session string `json:"session"`
	User    string `json:"user"`
	Profile string `json:"profile"`
	Grant   string `json:"grant"`
}

// guestsIn are the sessions that have joined a pod, and go on. It is what those say who may add containers to it: to be shown, and
// nothing else.
func guestsIn(pod *corev1.Pod) (guests []backends.Session) {
	for _, c := range pod.Spec.EphemeralContainers {
		s := statusOf(pod.Status.EphemeralContainerStatuses, c.Name)
		if !strings.HasPrefix(c.Name, targetPrefix) || s == nil || s.State.Running == nil {
			continue
		}
		var o guestOwner
		for _, e := range c.Env { // of several the last counts
			if e.Name == agent.OwnerEnv {
				o = guestOwner{}
				_ = json.Unmarshal([]byte(strings.ReplaceAll(e.Value, "$$", "$")), &o) // what is none names no session
			}
		}
		if sessionPattern.MatchString(o.Session) {
			guests = append(guests, backends.Session{Session: o.Session, Server: o.Gate, User: o.User, Profile: o.Profile, Grant: o.Grant,
				ID: pod.Namespace + "/" + pod.Name + "/" + c.Name, Started: s.State.Running.StartedAt.Time})
		}
	}
	return guests
}

// runningGuests are the sessions of all gates that have joined a target, and go on. With an error there are those of the namespaces that
// could be read.
func (b *Backend) runningGuests(ctx context.Context) ([]backends.Session, error) {
	selector, err := labels.ValidatedSelectorFromSet(b.config.Targets.Labels)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: targets.labels: %w", err)
	}
	var guests []backends.Session
	var failed error
	for _, ns := range b.config.Targets.Namespaces {
		seen := 0
		for more := ""; ; {
			var pods corev1.PodList
			if err := b.cluster.list(ctx, ns, "pods", listOptions{labels: selector.String(), limit: pageSize, next: more}, &pods); err != nil {
				failed = errors.Join(failed, fmt.Errorf("kubernetes: list targets in namespace %s: %w", ns, err))
				break
			}
			for i := range pods.Items {
				guests = append(guests, guestsIn(&pods.Items[i])...)
			}
			if seen += len(pods.Items); pods.Continue == "" {
				break
			}
			if seen >= maxListed {
				failed = errors.Join(failed, fmt.Errorf("kubernetes: namespace %s has more than %d pods that may be targets: the others are not looked at", ns, maxListed))
				break
			}
			more = pods.Continue
		}
	}
	return guests, failed
}

// addTries bounds the attempts to add a container to a pod that others change at the same time.
const addTries = 20

// add adds the container to the pod. The API server takes it only for the pod that was counted, so the limits hold over all
// gates.
func (g *guest) add(ctx context.Context, container corev1.EphemeralContainer) (*corev1.Pod, error) {
	b := g.backend
	// A request given up half-way leaves nobody knows what.
	detachedCtx, stop := detached(ctx)
	defer stop()
	for try := 0; ; try++ {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		var pod corev1.Pod
		err := b.cluster.get(detachedCtx, g.at.namespace, "pods", g.at.name, &pod)
		if apierrors.IsNotFound(err) || err == nil && (pod.UID != g.uid || pod.DeletionTimestamp != nil) {
			return nil, &backends.TextError{Text: "the target " + g.at.name + " is not there any more: try again", Err: errors.New("kubernetes: target: gone since it was chosen")}
		}
		if err != nil {
			return nil, targetFailed("look at the target", err)
		}
		if why := b.unfit(g.target, &pod); why != "" {
			return nil, fmt.Errorf("kubernetes: %w", refused("target %s %s", g.at.name, why))
		}
		if err := g.room(&pod); err != nil {
			return nil, err
		}
		if g.target.Processes {
			container.TargetContainerName = containerOf(g.target, &pod)
		}
		patch, err := json.Marshal(map[string]any{
			"metadata": map[string]any{"uid": pod.UID, "resourceVersion": pod.ResourceVersion},
			"spec":     map[string]any{"ephemeralContainers": []corev1.EphemeralContainer{container}},
		})
		if err != nil {
			return nil, err
		}
		g.closing.Lock()
		g.added = true
		g.closing.Unlock()
		var changed corev1.Pod
		err = b.cluster.patch(detachedCtx, g.at.namespace, "pods", g.at.name, "ephemeralcontainers", patch, &changed)
		switch {
		case err == nil:
			return &changed, nil
		case apierrors.IsConflict(err) && try < addTries:
			select {
			case <-ctx.Done():
			case <-time.After(time.Duration(try+1) * 10 * time.Millisecond):
			}
		default:
			return nil, targetFailed("add the ephemeral container", err)
		}
	}
}

// room says whether the pod may have one more.
func (g *guest) room(pod *corev1.Pod) error {
	most := cmp.Or(g.backend.config.Targets.MaxPerTarget, defaultPerTarget)
	ever, live := 0, 0
	for _, c := range pod.Spec.EphemeralContainers {
		if !strings.HasPrefix(c.Name, targetPrefix) {
			continue
		}
		ever++
		if s := statusOf(pod.Status.EphemeralContainerStatuses, c.Name); s == nil || s.State.Terminated == nil {
			live++
		}
	}
	if live >= most {
		return &backends.TextError{
			Text: fmt.Sprintf("%d sessions have joined %s, the most allowed: try again later", live, g.at.name),
			Err:  errors.New("kubernetes: max_per_target is reached"),
		}
	}
	if ever >= maxEntries {
		return &backends.TextError{
			Text: fmt.Sprintf("%s has had %d sessions, the most that its specification is to hold: another pod, or a restarted one, will do", g.at.name, ever),
			Err:  errors.New("kubernetes: the pod's ephemeral containers stay as long as it does"),
		}
	}
	return nil
}

// reach gets to the agent by its relay, and proves the gate to it.
func (g *guest) reach(ctx context.Context, key ed25519.PrivateKey, hello agent.Hello) error {
	var flags []string
	if g.target.Processes {
		flags = []string{"--pid", "0"}
	}
	try := func(over protocol) (*agent.Client, error) {
		return g.backend.relay(ctx, g.at, g.container, over, key, hello, flags...)
	}
	err := g.inside.reach(ctx, try, func(err error, due bool) error {
		if !due && !noPod(err) {
			return nil
		}
		return g.look(ctx)
	})
	if err != nil {
		return fmt.Errorf("kubernetes: %w", err)
	}
	return nil
}

// look says why the container will not come up; nil: it may.
func (g *guest) look(ctx context.Context) error {
	var pod corev1.Pod
	err := g.backend.cluster.get(ctx, g.at.namespace, "pods", g.at.name, &pod)
	if err != nil && !apierrors.IsNotFound(err) {
		return nil
	}
	if why := g.targetFate(&pod, err != nil); why != nil {
		return why
	}
	s := statusOf(pod.Status.EphemeralContainerStatuses, g.container)
	switch {
	case s == nil:
	case s.State.Terminated != nil && s.State.Terminated.ExitCode == agent.ExitShared:
		return &backends.TextError{
			Text: "the target has processes of the session's own user, and the profile does not permit its files: tell an operator",
			Err:  errors.New("kubernetes: a process of the target has the session's uid, which permit.target.files is for"),
		}
	case s.State.Terminated != nil:
		t := s.State.Terminated
		return &backends.TextError{Text: noStart, Err: fmt.Errorf("kubernetes: container %s ended: %s, exit code %d: %s", g.container, t.Reason, t.ExitCode, t.Message)}
	case s.State.Waiting != nil:
		if why := troubleOfStatus(s); why != nil {
			return why
		}
	}
	return nil
}

// targetFate says that the target is no more what was joined; nil: it is.
func (g *guest) targetFate(pod *corev1.Pod, deleted bool) *backends.TextError {
	die := func(text string, err error) *backends.TextError {
		return &backends.TextError{Text: "the target " + g.at.name + " " + text, Err: fmt.Errorf("kubernetes: target %s/%s: %w", g.at.namespace, g.at.name, err)}
	}
	if deleted || pod.UID != g.uid {
		return die("was deleted", errors.New("the pod is gone"))
	}
	whole := *pod
	whole.Status.InitContainerStatuses, whole.Status.ContainerStatuses = nil, nil // of one that is sick they come and go
	if short, why := fate(&whole, deleted); short != "" {
		return die(short, errors.New(why))
	}
	if !g.target.Processes {
		return nil // the network stays
	}
	s := statusOf(pod.Status.ContainerStatuses, containerOf(g.target, pod))
	if s != nil && (s.State.Terminated != nil || s.RestartCount > g.restarts) {
		return die("has ended", fmt.Errorf("container %s was restarted %d times before it was joined, %d now", s.Name, g.restarts, s.RestartCount))
	}
	return nil
}

// hear watches the target until ctx ends or its fate is known.
func (g *guest) hear(ctx context.Context) {
	told := func(why *backends.TextError) bool {
		if why != nil {
			g.mu.Lock()
			if g.fate == nil {
				g.fate = why
			}
			g.mu.Unlock()
			// At once: a pod that is deleted waits for all its containers, and this one takes no signal.
			g.client.Close()
		}
		return why != nil
	}
	wait := minRewatch
	for {
		began := time.Now()
		var pod corev1.Pod
		err := g.backend.cluster.get(ctx, g.at.namespace, "pods", g.at.name, &pod)
		if err == nil || apierrors.IsNotFound(err) {
			if told(g.targetFate(&pod, err != nil)) {
				return
			}
			w, err := g.backend.cluster.watchOne(ctx, g.at.namespace, g.at.name, pod.ResourceVersion)
			if err == nil {
				for e := range w.ResultChan() {
					if pod, ok := e.Object.(*corev1.Pod); ok && told(g.targetFate(pod, e.Type == "DELETED")) {
						break
					}
				}
				w.Stop()
				g.mu.Lock()
				known := g.fate != nil
				g.mu.Unlock()
				if known {
					return
				}
			}
		}
		if time.Since(began) > time.Minute {
			wait = minRewatch
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = min(2*wait, maxRewatch)
	}
}

// watch finds out why the sandbox ended.
func (g *guest) watch() {
	ctx, stop := context.WithCancel(context.Background())
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		g.hear(ctx)
	}()
	defer close(g.done)
	defer func() { stop(); <-heard }()
	select {
	case <-g.ended:
		return
	case <-g.client.Done():
	}
	g.err = g.client.Err()
	// The target's end is the reason that says most; it is known a moment later.
	limit := time.NewTimer(deathWait)
	defer limit.Stop()
	select {
	case <-heard:
	case <-g.ended:
	case <-limit.C:
	}
	g.mu.Lock()
	fate := g.fate
	g.mu.Unlock()
	switch {
	case fate != nil:
		g.err = fate
	case g.err == nil:
		g.err = errors.New("the sandbox ended")
	}
}

func (g *guest) ID() string {
	return g.at.namespace + "/" + g.at.name + "/" + g.container
}

// Close implements backends.Sandbox.
func (g *guest) Close(ctx context.Context) error {
	g.end()
	err := g.remove(ctx)
	<-g.done
	return err
}

// Waits of remove: for an agent to end by itself, and from look to look.
const (
	ownEnd  = 3 * time.Second
	endLook = 100 * time.Millisecond
)

// remove returns when the container does not run. An agent ends when its stream does; one that was stopped by its user, where it
// is not the first process, is killed by a program that the cluster executes beside it. What waits for an image that can't be had
// is not waited for: should it come to run, its agent, which nobody reaches, ends by itself.
func (g *guest) remove(ctx context.Context) error {
	g.closing.Lock()
	defer g.closing.Unlock()
	b := g.backend
	defer func() {
		b.mu.Lock()
		delete(b.guests, g)
		b.mu.Unlock()
	}()
	if g.gone || !g.added {
		return nil
	}
	ctx, stop := detached(ctx)
	defer stop()
	if g.client != nil {
		g.client.Close()
	}
	began := time.Now()
	var last error
	for {
		var pod corev1.Pod
		err := b.cluster.get(ctx, g.at.namespace, "pods", g.at.name, &pod)
		switch {
		case apierrors.IsNotFound(err) || err == nil && (pod.UID != g.uid || finished(&pod)):
			g.gone = true
			return nil
		case err != nil:
			last = err
		default:
			if there := slices.ContainsFunc(pod.Spec.EphemeralContainers, func(c corev1.EphemeralContainer) bool { return c.Name == g.container }); !there {
				g.gone = true
				return nil
			}
			if s := statusOf(pod.Status.EphemeralContainerStatuses, g.container); s != nil &&
				(s.State.Terminated != nil || g.client == nil && troubleOfStatus(s) != nil) {
				g.gone = true
				return nil
			}
			if time.Since(began) > ownEnd {
				last = g.kill(ctx)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("kubernetes: end the sandbox in %s: %w", g.ID(), errors.Join(context.Cause(ctx), last))
		case <-time.After(endLook):
		}
	}
}

// kill has the cluster execute a program that kills all others of the container.
func (g *guest) kill(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, answerWait)
	defer stop()
	stream, err := g.backend.cluster.execIn(ctx, g.at, g.container, overSPDY, insideAgent, "end")
	if err != nil {
		return err
	}
	defer stream.Close()
	stopRead := context.AfterFunc(ctx, func() { stream.Conn.Close() })
	defer stopRead()
	var b [256]byte
	for {
		if _, err := stream.Read(b[:]); err != nil {
			return stream.why()
		}
	}
}
