package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sallyport/sallyport/backends"
)

// TestOwner: pods go with the config map that owns them, and with nothing else.
func TestOwner(t *testing.T) {
	t.Parallel()
	ns := newNamespace(t)
	ctx := context.Background()
	b := newBackend(t, func(c *Config) { c.Namespace, c.Owner = ns, "configmap/gate" })
	var known *backends.TextError
	if _, err := b.Start(ctx, newSpec(busyboxImage)); !errors.As(err, &known) || !strings.Contains(known.Text, "owner is not there") {
		t.Errorf("without an owner: %v", err)
	}
	owner := func() {
		put(t, ns, "configmaps", &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "gate"}})
	}
	remove := func(name string) {
		if err := fixture.cluster.core.Delete().Namespace(ns).Resource("configmaps").Name(name).Do(ctx).Error(); err != nil {
			t.Fatal(err)
		}
	}
	owner()
	put(t, ns, "configmaps", &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "other"}})
	s := startSandbox(t, b, newSpec(busyboxImage))
	remove("other")
	sh(t, s, "true")
	remove("gate")
	select {
	case <-s.Done():
	case <-time.After(2 * time.Minute):
		t.Fatal("the sandbox has not ended with its owner")
	}
	if err := s.Err(); err == nil || !strings.Contains(err.Error(), "deleted") {
		t.Errorf("%v", err)
	}
	// A config map that was made anew is another: pods that it owns stay.
	owner()
	again := startSandbox(t, b, newSpec(busyboxImage))
	sh(t, again, "true")
	var pod corev1.Pod
	if err := fixture.cluster.get(ctx, ns, "pods", again.at.name, &pod); err != nil || len(pod.OwnerReferences) != 1 {
		t.Errorf("%v, owners %+v", err, pod.OwnerReferences)
	}
}

// TestOwnerPod: what does not fit is said when the gate starts.
func TestOwnerPod(t *testing.T) {
	b := newBackend(t, nil)
	s := startSandbox(t, b, newSpec(busyboxImage)) // stands in for the gate's pod
	open := func(name, ns string, uid any, change func(*Config)) error {
		t.Setenv(envPodName, name)
		t.Setenv(envPodNamespace, ns)
		t.Setenv(envPodUID, fmt.Sprint(uid))
		config := Config{Kubeconfig: kubeconfig(), Namespace: fixture.ns, Owner: ownerPod}
		if change != nil {
			change(&config)
		}
		b, err := New(context.Background(), config, "test", slog.New(slog.DiscardHandler))
		if err == nil {
			b.Close()
		}
		return err
	}
	for want, err := range map[string]error{
		"POD_UID":                            open(s.at.name, fixture.ns, "", nil),
		"can't own sandboxes in":             open(s.at.name, "default", s.uid, nil),
		"can't own sandboxes in other":       open(s.at.name, fixture.ns, s.uid, func(c *Config) { c.Namespaces = []string{"default"} }),
		"not found":                          open("nobody", fixture.ns, s.uid, nil),
		"has the UID " + string(s.uid):       open(s.at.name, fixture.ns, "other", nil),
		"owner: \"secret/x\" is none of pod": open("", "", "", func(c *Config) { c.Owner = "secret/x" }),
	} {
		if err == nil || !strings.Contains(err.Error(), strings.TrimSuffix(want, " other")) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := open(s.at.name, fixture.ns, s.uid, nil); err != nil {
		t.Error(err)
	}
}

// inClusterEnv has this test's program be a gate in a pod.
const inClusterEnv = "SALLYPORT_TEST_IN_CLUSTER"

// inCluster is what it does there: all by the pod's own service account.
func inCluster() int {
	config := Config{InCluster: true, Namespace: os.Getenv(envPodNamespace), Owner: ownerPod, CPUShare: 0.02}
	err := func() error {
		ctx, stop := context.WithTimeout(context.Background(), time.Minute)
		defer stop()
		b, err := New(ctx, config, "in-cluster", slog.New(slog.NewTextHandler(os.Stdout, nil)))
		if err != nil {
			return err
		}
		defer b.Close()
		s, err := b.Start(ctx, newSpec(busyboxImage))
		if err != nil {
			return err
		}
		var out strings.Builder
		_, err = s.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: "echo inside", Stdout: &out})
		owners, _ := json.Marshal(s.Info().Spec.(*corev1.Pod).OwnerReferences)
		return errors.Join(err, s.Close(ctx), func() error { _, err := fmt.Printf("%s%s\n", out.String(), owners); return err }())
	}()
	if err != nil {
		fmt.Println("failed:", err)
		return 1
	}
	return 0
}

// TestInCluster runs this test's program as a gate in a pod, with the account and the rights of docs/kubernetes.md. The cluster has
// to be on this machine.
func TestInCluster(t *testing.T) {
	requireCluster(t)
	t.Parallel()
	ctx := context.Background()
	ns, err := fixture.makeNamespaceFor("privileged") // the program comes from a host path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fixture.removeNamespace(ns); err != nil {
			t.Error(err)
		}
	})
	account := gateAccount(t, ns)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	field := func(name, path string) corev1.EnvVar {
		return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}}
	}
	gate := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "gate"},
		Spec: corev1.PodSpec{
			ServiceAccountName: account, RestartPolicy: corev1.RestartPolicyNever,
			Volumes: []corev1.Volume{{Name: "test", VolumeSource: corev1.VolumeSource{
				HostPath: &corev1.HostPathVolumeSource{Path: filepath.Dir(program)},
			}}},
			Containers: []corev1.Container{{
				Name: "gate", Image: glibcImage, ImagePullPolicy: corev1.PullNever, Command: []string{"/test/" + filepath.Base(program)},
				Env: []corev1.EnvVar{
					{Name: inClusterEnv, Value: "1"}, field(envPodName, "metadata.name"), field(envPodNamespace, "metadata.namespace"),
					field(envPodUID, "metadata.uid"),
				},
				VolumeMounts: []corev1.VolumeMount{{Name: "test", MountPath: "/test", ReadOnly: true}},
			}},
		},
	}
	put(t, ns, "pods", gate)
	var pod corev1.Pod
	waitFor(t, "the gate in the pod to end", func() bool {
		return fixture.cluster.get(ctx, ns, "pods", "gate", &pod) == nil && finished(&pod)
	})
	said, err := fixture.cluster.core.Get().Namespace(ns).Resource("pods").Name("gate").SubResource("log").DoRaw(ctx)
	if err != nil || pod.Status.Phase != corev1.PodSucceeded || !strings.Contains(string(said), "inside\n") ||
		!strings.Contains(string(said), string(pod.UID)) {
		t.Errorf("%s, %v:\n%s", pod.Status.Phase, err, said)
	}
	if left := pods(t, ns, labelManaged+"="+managed); len(left) != 0 {
		t.Errorf("%d pods are left", len(left))
	}
}

// TestContexts: which cluster is meant, by kubeconfig, context and environment.
func TestContexts(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	write := func(server string) string {
		name := filepath.Join(t.TempDir(), "config")
		text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: one
clusters: [{name: a, cluster: {server: "https://%[1]s-a.test"}}, {name: b, cluster: {server: "https://%[1]s-b.test"}}]
users: [{name: u, user: {token: t}}]
contexts: [{name: one, context: {cluster: a, user: u}}, {name: two, context: {cluster: b, user: u}}]
`, server)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	t.Setenv("KUBECONFIG", write("env"))
	file := write("file")
	for _, test := range []struct {
		config Config
		want   string // of the error, if that begins with !
	}{
		{Config{}, "https://env-a.test"},
		{Config{Context: "two"}, "https://env-b.test"},
		{Config{Kubeconfig: file}, "https://file-a.test"},
		{Config{Kubeconfig: file, Context: "two"}, "https://file-b.test"},
		{Config{Kubeconfig: file, Context: "three"}, `!context "three" does not exist`},
		{Config{Kubeconfig: file + "x"}, "!no such file"},
		{Config{InCluster: true}, "!in-cluster"},
	} {
		got, err := restConfig(test.config)
		if want, fails := strings.CutPrefix(test.want, "!"); fails {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%+v: %v, want %q", test.config, err, want)
			}
		} else if err != nil || got.Host != test.want {
			t.Errorf("%+v: %v, want %s", test.config, err, test.want)
		}
	}
}
