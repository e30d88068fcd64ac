package kubernetes

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"

	"github.com/sallyport/sallyport/backends"
)

// targetImage carries the agent (images/build target) and has to be on the cluster's nodes.
const targetImage = "sallyport/target:1"

// runTargetPod runs a pod to be joined until the test ends. It answers on 127.0.0.1:8080.
func runTargetPod(t *testing.T, ns string, uid int64, change func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	name := "target-" + strings.ToLower(rand.Text()[:10])
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns, Labels: map[string]string{"test.target": name}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: pointer(int64(300)),
			SecurityContext: &corev1.PodSecurityContext{
				RunAsNonRoot: pointer(true), RunAsUser: &uid, RunAsGroup: &uid,
				SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			},
			Containers: []corev1.Container{{
				Name: "main", Image: busyboxImage, ImagePullPolicy: corev1.PullNever,
				Command: []string{"sh", "-c", "echo secret of $(id -u) >/tmp/secret; mkdir -p /tmp/w; echo hello >/tmp/w/index.html; trap 'exit 0' TERM; httpd -p 127.0.0.1:8080 -h /tmp/w; while [ ! -e /tmp/end ]; do sleep 0.1; done"},
				SecurityContext: &corev1.SecurityContext{
					AllowPrivilegeEscalation: pointer(false), Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
				},
			}},
		},
	}
	if change != nil {
		change(pod)
	}
	ctx := context.Background()
	var made corev1.Pod
	if err := fixture.cluster.create(ctx, ns, "pods", pod, &made); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fixture.cluster.deletePod(ctx, ns, name, made.UID) })
	waitFor(t, "the target to run", func() bool {
		if err := fixture.cluster.get(ctx, ns, "pods", name, &made); err != nil {
			t.Fatal(err)
		}
		s := statusOf(made.Status.ContainerStatuses, "main")
		return made.Status.Phase == corev1.PodRunning && s != nil && s.State.Running != nil
	})
	return &made
}

func joiningSpec(pod *corev1.Pod, change func(*backends.Target)) backends.Spec {
	spec := newSpec(targetImage)
	spec.Template.Target = &backends.Target{Namespace: pod.Namespace, Labels: map[string]string{"test.target": pod.Name}}
	if change != nil {
		change(spec.Template.Target)
	}
	return spec
}

func withProcesses(t *backends.Target) { t.Processes = true }
func withFiles(t *backends.Target)     { t.Processes, t.Files = true, true }

func joinGate(t *testing.T, change func(*Config)) *Backend {
	return newBackend(t, func(c *Config) {
		c.AgentIn = []string{targetImage}
		c.Targets = Targets{Namespaces: []string{fixture.ns}, Processes: true, Files: true, MaxPerTarget: 2}
		if change != nil {
			change(c)
		}
	})
}

func startGuest(t *testing.T, b *Backend, spec backends.Spec) *guest {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	list, err := b.Targets(ctx, spec, "")
	if err != nil || len(list) != 1 {
		t.Fatalf("targets: %v, %v", list, err)
	}
	spec.Join = &list[0]
	s, err := b.Start(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	g := s.(*guest)
	t.Cleanup(func() {
		if err := g.Close(context.Background()); err != nil {
			t.Error(err)
		}
		// Its entry stays in the pod's status; nothing of it runs.
		var pod corev1.Pod
		if err := fixture.cluster.get(context.Background(), g.at.namespace, "pods", g.at.name, &pod); err == nil && pod.UID == g.uid && !finished(&pod) && pod.DeletionTimestamp == nil {
			if s := statusOf(pod.Status.EphemeralContainerStatuses, g.container); s == nil || s.State.Terminated == nil {
				t.Errorf("still runs: %+v", s)
			}
		}
	})
	return g
}

func gone(t *testing.T, s backends.Sandbox) error {
	t.Helper()
	select {
	case <-s.Done():
	case <-time.After(time.Minute):
		t.Fatal("the sandbox goes on")
	}
	return s.Err()
}

func TestTarget(t *testing.T) {
	requireCluster(t)
	t.Parallel()
	b := joinGate(t, nil)
	look := func(t *testing.T, s backends.Sandbox, line, want string) {
		t.Helper()
		if got := sh(t, s, line); !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
	const hello = "until curl -s http://127.0.0.1:8080/; do sleep 0.1; done"
	t.Run("network", func(t *testing.T) {
		t.Parallel()
		pod := runTargetPod(t, fixture.ns, 1000, nil) // the session's own uid, which here reaches nothing of the target's processes
		spec := joiningSpec(pod, nil)
		spec.Template.ExecAudit.Mode = backends.ExecAuditRequired
		var mu sync.Mutex
		var programs []string
		spec.Reports = func(r *backends.Report) error {
			mu.Lock()
			defer mu.Unlock()
			if r.Exec != nil {
				programs = append(programs, string(r.Exec.Path))
			}
			return nil
		}
		s := startGuest(t, b, spec)
		look(t, s, hello, "hello")
		look(t, s, "ps -e | grep -c [h]ttpd", "0\n")
		look(t, s, "tr '\\0' ' ' </proc/1/cmdline | cut -d' ' -f1,2", "/.sallyport/agent serve\n")
		look(t, s, "kill -9 1; kill -STOP 1; kill -TERM 1; echo alive", "alive\n")
		look(t, s, "cat /proc/1/environ /.sallyport/agent 2>&1 | grep -c denied", "2\n")
		look(t, s, "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t 0\\n'", "CapEff:CapBnd:NoNewPrivs:1Seccomp:2")
		look(t, s, "ls /var/run/secrets/kubernetes.io 2>&1", "No such file")
		mu.Lock()
		if !slices.ContainsFunc(programs, func(p string) bool { return strings.HasSuffix(p, "/curl") }) {
			t.Errorf("programs: %q", programs)
		}
		mu.Unlock()
		j := s.Info().Joined
		if j == nil || j.String() != pod.Namespace+"/"+pod.Name || j.ID != string(pod.UID) || j.Container != "main" || j.Image != busyboxImage ||
			!strings.Contains(j.Digest, "sha256:") || !slices.Equal(j.What, []string{"network"}) || s.Info().ExecAudit != "on" {
			t.Errorf("%+v, exec audit %q", j, s.Info().ExecAudit)
		}
		if text, err := json.Marshal(s.Info()); err != nil || !strings.Contains(string(text), `"runAsUser":1000`) {
			t.Errorf("%s, %v", text, err)
		}
	})
	t.Run("processes", func(t *testing.T) {
		t.Parallel()
		pod := runTargetPod(t, fixture.ns, 2000, nil)
		spec := joiningSpec(pod, withProcesses)
		spec.Template.ExecAudit.Mode = backends.ExecAuditRequired
		spec.Reports = func(*backends.Report) error { return nil }
		s := startGuest(t, b, spec)
		look(t, s, hello, "hello")
		look(t, s, "ps -e | grep -c [h]ttpd", "1\n")
		look(t, s, "cat /proc/1/root/tmp/secret 2>&1", "Permission denied")
		look(t, s, "cat /proc/1/environ 2>&1", "Permission denied")
		look(t, s, "kill -9 1 2>&1", "not permitted")
		look(t, s, "timeout 5 strace -p 1 2>&1", "Operation not permitted")
		look(t, s, "timeout 5 gdb -q -batch -p 1 2>&1", "not permitted")
		var got bytes.Buffer
		_, err := s.Exec(context.Background(), backends.Process{Kind: backends.KindExec, Stdout: &got, Stderr: io.Discard,
			Command: "a=$(pgrep -f '^/.sallyport/agent serve'); echo agent $a; kill -9 $a; while :; do /bin/echo executed; done"})
		if text := got.String(); !errors.Is(err, backends.ErrGone) || strings.Contains(text, "executed") {
			t.Errorf("the agent was killed, and then: %v, %.200q", err, text)
		}
		if err := gone(t, s); err == nil {
			t.Error("no reason")
		}
	})
	t.Run("stopped agent", func(t *testing.T) {
		t.Parallel()
		pod := runTargetPod(t, fixture.ns, 2000, nil)
		s := startGuest(t, b, joiningSpec(pod, withProcesses))
		ctx, stop := context.WithCancel(context.Background())
		defer stop()
		go s.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: "kill -STOP $(pgrep -f '^/.sallyport/agent serve'); sleep 1000"})
		gone(t, s)
	})
	t.Run("files", func(t *testing.T) {
		t.Parallel()
		pod := runTargetPod(t, fixture.ns, 1000, nil)
		spec := joiningSpec(pod, withProcesses)
		list, err := b.Targets(context.Background(), spec, pod.Name)
		if err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		spec.Join = &list[0]
		_, err = b.Start(context.Background(), spec)
		var said *backends.TextError
		if !errors.As(err, &said) || !strings.Contains(said.Text, "does not permit its files") {
			t.Fatalf("the target's uid without the permit: %v", err)
		}
		s := startGuest(t, b, joiningSpec(pod, withFiles))
		look(t, s, hello, "hello")
		look(t, s, "cat /proc/1/root/tmp/secret && echo written >/proc/1/root/tmp/w/index.html; curl -s http://127.0.0.1:8080/", "secret of 1000\nwritten\n")
		if w := s.Info().Joined.Weaker; !slices.ContainsFunc(w, func(s string) bool { return strings.Contains(s, "signals") }) {
			t.Errorf("%q", w)
		}
	})
	t.Run("deleted", func(t *testing.T) {
		t.Parallel()
		pod := runTargetPod(t, fixture.ns, 2000, nil)
		s := startGuest(t, b, joiningSpec(pod, nil))
		// With its whole grace period, which our container, that takes no signal, would have it wait for.
		if err := fixture.cluster.core.Delete().Namespace(pod.Namespace).Resource("pods").Name(pod.Name).Do(context.Background()).Error(); err != nil {
			t.Fatal(err)
		}
		var said *backends.TextError
		if err := gone(t, s); !errors.As(err, &said) || said.Text != "the target "+pod.Name+" is being deleted" {
			t.Errorf("%v", err)
		}
		s.Close(context.Background())
		waitFor(t, "the pod to go", func() bool {
			var now corev1.Pod
			err := fixture.cluster.get(context.Background(), pod.Namespace, "pods", pod.Name, &now)
			return err != nil
		})
	})
	t.Run("container ended", func(t *testing.T) {
		t.Parallel()
		pod := runTargetPod(t, fixture.ns, 1000, func(pod *corev1.Pod) { pod.Spec.RestartPolicy = corev1.RestartPolicyAlways })
		network := startGuest(t, b, joiningSpec(pod, nil))
		s := startGuest(t, b, joiningSpec(pod, withFiles))
		s.Exec(context.Background(), backends.Process{Kind: backends.KindExec, Command: "touch /proc/1/root/tmp/end; sleep 60"})
		var said *backends.TextError
		if err := gone(t, s); !errors.As(err, &said) || said.Text != "the target "+pod.Name+" has ended" {
			t.Errorf("%v", err)
		}
		look(t, network, "echo the pod is still there", "still there") // it is what is sick that is debugged
	})
	t.Run("limits", func(t *testing.T) {
		t.Parallel()
		pod := runTargetPod(t, fixture.ns, 2000, nil)
		other := joinGate(t, nil)
		startGuest(t, b, joiningSpec(pod, nil))
		startGuest(t, other, joiningSpec(pod, nil))
		spec := joiningSpec(pod, nil)
		list, err := other.Targets(context.Background(), spec, "")
		if err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		spec.Join = &list[0]
		_, err = other.Start(context.Background(), spec)
		var said *backends.TextError
		if !errors.As(err, &said) || !strings.Contains(said.Text, "2 sessions have joined") {
			t.Errorf("a third, of another gate: %v", err)
		}
	})
	t.Run("no such image", func(t *testing.T) {
		t.Parallel()
		pod := runTargetPod(t, fixture.ns, 2000, nil)
		other := joinGate(t, func(c *Config) { c.AgentIn = []string{"*"} })
		spec := joiningSpec(pod, nil)
		spec.Template.Image, spec.Template.PullPolicy = "sallyport/none:1", "never"
		list, _ := other.Targets(context.Background(), spec, "")
		spec.Join = &list[0]
		_, err := other.Start(context.Background(), spec)
		var said *backends.TextError
		if !errors.As(err, &said) || said.Text != noImage || strings.Contains(err.Error(), "end the sandbox") {
			t.Errorf("%v", err) // the container waits for ever, the user does not
		}
	})
}

// TestTargetLimitRace: many logins at once, over two gates, and never more than the limit get in.
func TestTargetLimitRace(t *testing.T) {
	requireCluster(t)
	t.Parallel()
	pod := runTargetPod(t, fixture.ns, 2000, nil)
	gates := []*Backend{joinGate(t, nil), joinGate(t, nil)}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var in []backends.Sandbox
	for n := range 6 {
		wg.Go(func() {
			b, spec := gates[n%2], joiningSpec(pod, nil)
			list, err := b.Targets(context.Background(), spec, pod.Name)
			if err != nil || len(list) != 1 {
				t.Error(list, err)
				return
			}
			spec.Join = &list[0]
			s, err := b.Start(context.Background(), spec)
			var said *backends.TextError
			if err == nil {
				mu.Lock()
				in = append(in, s)
				mu.Unlock()
			} else if !errors.As(err, &said) || !strings.Contains(said.Text, "sessions have joined") {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, s := range in {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}
	if len(in) != 2 {
		t.Errorf("%d got in", len(in))
	}
}

// TestTargetRole: a gate with the role of deploy/kubernetes/targets joins; without one of its verbs, each in turn, it does not.
func TestTargetRole(t *testing.T) {
	requireCluster(t)
	t.Parallel()
	text, err := os.ReadFile("../../deploy/kubernetes/targets/role.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var role rbacv1.Role
	if err := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096).Decode(&role); err != nil {
		t.Fatal(err)
	}
	pod := runTargetPod(t, fixture.ns, 2000, nil)
	try := func(t *testing.T, rules []rbacv1.PolicyRule, whole bool, lacks string) error {
		b := &Backend{
			config: Config{AgentIn: []string{targetImage}, Targets: Targets{Namespaces: []string{fixture.ns}, MaxPerTarget: 100}}.WithDefaults(),
			gate:   "test", log: slog.New(slog.DiscardHandler), cluster: accountWith(t, rules), tries: rate.NewLimiter(triesPerSecond, triesBurst),
		}
		defer b.Close()
		ctx, stop := context.WithTimeout(context.Background(), time.Minute)
		defer stop()
		waitFor(t, "what check says", func() bool { // a role takes a moment
			err := b.MayJoin(ctx)
			return whole && err == nil || !whole && err != nil && strings.Contains(err.Error(), lacks)
		})
		spec := joiningSpec(pod, nil)
		list, err := b.Targets(ctx, spec, "")
		if err != nil {
			return err
		}
		spec.Join = &list[0]
		s, err := b.Start(ctx, spec)
		if err != nil {
			return err
		}
		defer s.Close(ctx)
		w, err := b.cluster.watchOne(ctx, fixture.ns, pod.Name, "")
		if err == nil {
			w.Stop()
		}
		return err
	}
	if err := try(t, role.Rules, true, ""); err != nil {
		t.Fatalf("with the role: %v", err)
	}
	for i, rule := range role.Rules {
		for _, verb := range rule.Verbs {
			less := slices.Clone(role.Rules)
			less[i].Verbs = slices.DeleteFunc(slices.Clone(rule.Verbs), func(v string) bool { return v == verb })
			if len(less[i].Verbs) == 0 {
				less = slices.Delete(less, i, i+1)
			}
			// Side by side: an agent that nobody reaches, and that nobody may kill, ends by itself after 30 s.
			t.Run(rule.Resources[0]+" "+verb, func(t *testing.T) {
				t.Parallel()
				if err := try(t, less, false, "may not "+verb+" "+rule.Resources[0]+" in "+fixture.ns+": apply"); err == nil {
					t.Errorf("%v: %s is not needed", rule.Resources, verb)
				}
			})
		}
	}
}

// accountWith gives the access of a new service account that has these rights in the tests' namespace, and no other.
func accountWith(t *testing.T, rules []rbacv1.PolicyRule) *cluster {
	t.Helper()
	ctx, ns, name := context.Background(), fixture.ns, "gate-"+strings.ToLower(rand.Text()[:8])
	post := func(path string, o any) {
		body, err := json.Marshal(o)
		if err == nil {
			err = fixture.cluster.core.Post().AbsPath(path).SetHeader("Content-Type", "application/json").Body(body).Do(ctx).Error()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	meta := metav1.ObjectMeta{Name: name}
	post("/api/v1/namespaces/"+ns+"/serviceaccounts", corev1.ServiceAccount{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceAccount"}, ObjectMeta: meta})
	rbac := "/apis/rbac.authorization.k8s.io/v1/namespaces/" + ns
	post(rbac+"/roles", rbacv1.Role{TypeMeta: metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "Role"}, ObjectMeta: meta, Rules: rules})
	post(rbac+"/rolebindings", rbacv1.RoleBinding{
		TypeMeta: metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "RoleBinding"}, ObjectMeta: meta,
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: name},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Name: name, Namespace: ns}},
	})
	b, err := fixture.cluster.core.Post().Namespace(ns).Resource("serviceaccounts").Name(name).SubResource("token").
		SetHeader("Content-Type", "application/json").
		Body([]byte(`{"apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest","spec":{"audiences":null,"expirationSeconds":3600}}`)).Do(ctx).Raw()
	var token authenticationv1.TokenRequest
	if err == nil {
		err = json.Unmarshal(b, &token)
	}
	if err != nil {
		t.Fatal(err)
	}
	admin := rest.CopyConfig(fixture.cluster.config)
	if err := rest.LoadTLSFiles(admin); err != nil {
		t.Fatal(err)
	}
	ca, config := filepath.Join(t.TempDir(), "ca.pem"), filepath.Join(t.TempDir(), "kubeconfig")
	kubeconfig := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: gate
clusters: [{name: lab, cluster: {server: "%s", certificate-authority: "%s"}}]
users: [{name: gate, user: {token: "%s"}}]
contexts: [{name: gate, context: {cluster: lab, user: gate}}]
`, admin.Host, ca, token.Status.Token)
	if err := errors.Join(os.WriteFile(ca, admin.CAData, 0o600), os.WriteFile(config, []byte(kubeconfig), 0o600)); err != nil {
		t.Fatal(err)
	}
	c, err := newCluster(Config{Kubeconfig: config}.WithDefaults(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestTargetSelection: what is meant, by a table of pods that need no cluster.
func TestTargetSelection(t *testing.T) {
	yes := true
	pod := func(change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "web-abc-1", Namespace: "shop", UID: "u", Labels: map[string]string{"app": "web", "pod-template-hash": "abc"},
				OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-abc", Controller: &yes}}},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "first", Image: "i1"}, {Name: "second", Image: "i2"}}},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{
				{Name: "first", ImageID: "d1", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}},
				{Name: "second", ImageID: "d2", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}},
			}},
		}
		if change != nil {
			change(p)
		}
		return p
	}
	app := map[string]string{"app": "web"}
	b := &Backend{config: Config{Targets: Targets{Namespaces: []string{"shop"}, Labels: map[string]string{"app": "web"}}}}
	for name, test := range map[string]struct {
		target    backends.Target
		pod       *corev1.Pod
		want      string // "": it is one
		container string
	}{
		"labels":           {backends.Target{Labels: app}, pod(nil), "", "first"},
		"more labels":      {backends.Target{Labels: map[string]string{"app": "web", "tier": "x"}}, pod(nil), "is not what", ""},
		"name":             {backends.Target{Name: "web-abc-1"}, pod(nil), "", "first"},
		"prefix of a name": {backends.Target{Name: "web-abc"}, pod(nil), "is not what", ""},
		"deployment":       {backends.Target{Workload: "deployment/web"}, pod(nil), "", "first"},
		"other deployment": {backends.Target{Workload: "deployment/we"}, pod(nil), "is not what", ""},
		"replicaset":       {backends.Target{Workload: "replicaset/web-abc"}, pod(nil), "", "first"},
		"statefulset":      {backends.Target{Workload: "statefulset/web-abc"}, pod(nil), "is not what", ""},
		"bare pod, alike":  {backends.Target{Workload: "deployment/web"}, pod(func(p *corev1.Pod) { p.OwnerReferences = nil }), "is not what", ""},
		"container":        {backends.Target{Labels: app, Container: "second"}, pod(nil), "", "second"},
		"no container":     {backends.Target{Labels: app, Container: "third"}, pod(nil), "has no such", ""},
		"sick, processes":  {backends.Target{Labels: app, Container: "second", Processes: true}, pod(nil), "does not run", ""},
		"annotation": {backends.Target{Labels: app}, pod(func(p *corev1.Pod) {
			p.Annotations = map[string]string{"kubectl.kubernetes.io/default-container": "second"}
		}), "", "second"},
		"other namespace":   {backends.Target{Labels: app}, pod(func(p *corev1.Pod) { p.Namespace = "bank" }), "is not what", ""},
		"operator's label":  {backends.Target{Name: "web-abc-1"}, pod(func(p *corev1.Pod) { p.Labels["app"] = "db" }), "lacks a label", ""},
		"a sandbox":         {backends.Target{Labels: app}, pod(func(p *corev1.Pod) { p.Labels[labelManaged] = managed }), "is a session's", ""},
		"node's network":    {backends.Target{Labels: app}, pod(func(p *corev1.Pod) { p.Spec.HostNetwork = true }), "node's own", ""},
		"node's processes":  {backends.Target{Labels: app}, pod(func(p *corev1.Pod) { p.Spec.HostPID = true }), "node's own", ""},
		"shared processes":  {backends.Target{Labels: app}, pod(func(p *corev1.Pod) { p.Spec.ShareProcessNamespace = &yes }), "one process namespace", ""},
		"shared, permitted": {backends.Target{Labels: app, Processes: true}, pod(func(p *corev1.Pod) { p.Spec.ShareProcessNamespace = &yes }), "", "first"},
		"being deleted":     {backends.Target{Labels: app}, pod(func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{} }), "does not run", ""},
		"pending":           {backends.Target{Labels: app}, pod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }), "does not run", ""},
	} {
		test.target.Namespace = "shop"
		why := b.unfit(&test.target, test.pod)
		if test.want == "" && why != "" || test.want != "" && !strings.Contains(why, test.want) {
			t.Errorf("%s: %q, want %q", name, why, test.want)
		}
		if test.want == "" {
			if r := running(&test.target, test.pod); r.Container != test.container || r.Image == "" || r.Digest == "" {
				t.Errorf("%s: %+v", name, r)
			}
		}
	}
}

func TestTargetRefused(t *testing.T) {
	b := &Backend{config: Config{
		AgentIn: []string{"carrier:*"}, AllowRoot: true, AllowCaps: []string{"NET_RAW", "SYS_PTRACE"}, Targets: Targets{Namespaces: []string{"shop"}, Processes: true, Files: true},
	}.WithDefaults()}
	spec := func(change func(*backends.Spec)) backends.Spec {
		s := newSpec("carrier:1")
		s.Template.Target = &backends.Target{Namespace: "shop", Labels: map[string]string{"app": "web"}}
		change(&s)
		return s
	}
	if err := b.checkTarget(spec(func(*backends.Spec) {})); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*backends.Spec){
		`namespace "bank" is not listed`:    func(s *backends.Spec) { s.Template.Target.Namespace = "bank" },
		`namespace "" is not listed`:        func(s *backends.Spec) { s.Template.Target.Namespace = "" },
		"neither name, workload nor labels": func(s *backends.Spec) { s.Template.Target.Labels = nil },
		"does not carry the agent":          func(s *backends.Spec) { s.Template.Image = "other:1" },
		"name no network":                   func(s *backends.Spec) { s.Template.Network = "payments" },
		"name no memory":                    func(s *backends.Spec) { s.Template.Memory = 1 << 30 },
		"name no memory, cpus":              func(s *backends.Spec) { s.Template.CPUs = 1 },
		"name no mounts": func(s *backends.Spec) {
			s.Template.Mounts = []backends.Mount{{Type: "secret", Source: "s", Target: "/s"}}
		},
		"name none of them":          func(s *backends.Spec) { s.Template.Groups = []uint32{4} },
		"name no spread and no pod":  func(s *backends.Spec) { s.Template.Pod = []byte("{}") },
		"uid 0 is what its files":    func(s *backends.Spec) { s.Template.UID = 0 },
		"is the agent's own":         func(s *backends.Spec) { s.Template.UID = agentUID },
		"files are not permitted":    func(s *backends.Spec) { s.Template.Target.Files = true },
		"capabilities reach into":    func(s *backends.Spec) { s.Template.Target.Processes = true; s.Template.Caps = []string{"SYS_PTRACE"} },
		"is not listed (allow_caps)": func(s *backends.Spec) { s.Template.Caps = []string{"NET_ADMIN"} },
		"would open the agent":       func(s *backends.Spec) { s.Template.Caps = []string{"DAC_OVERRIDE"} },
		"bad session ID":             func(s *backends.Spec) { s.Owner.Session = "../x" },
	} {
		if err := b.checkTarget(spec(change)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	b.config.Targets.Processes, b.config.Targets.Files = false, false
	if err := b.checkTarget(spec(func(s *backends.Spec) { s.Template.Target.Processes = true })); err == nil {
		t.Error("processes, against the operator")
	}
	for _, bad := range []Targets{
		{Namespaces: []string{"*"}}, {Namespaces: []string{"a/b"}}, {Labels: map[string]string{"a b": "c"}}, {Labels: map[string]string{"a": "b c"}},
		{Files: true}, {MaxPerTarget: -1}, {MaxPerTarget: maxEntries + 1},
	} {
		if len(bad.validate()) == 0 {
			t.Errorf("%+v is valid", bad)
		}
	}
	// Odd names don't reach the API server.
	for _, name := range []string{"../secrets/x", "a/b", "a%2fb", "A", "a b", "a\n", "..", "a?b", strings.Repeat("a", 254)} {
		if list, err := b.Targets(context.Background(), spec(func(*backends.Spec) {}), name); err != nil || len(list) != 0 {
			t.Errorf("%q: %v, %v", name, list, err)
		}
	}
}
