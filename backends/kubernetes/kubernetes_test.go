package kubernetes

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sallyport/sallyport/backends"
	"github.com/sallyport/sallyport/backends/backendtest"
)

func TestMain(m *testing.M) {
	if os.Getenv(inClusterEnv) != "" {
		os.Exit(inCluster())
	}
	code := 0
	func() {
		defer fixture.remove()
		code = m.Run()
	}()
	if code == 0 {
		if err := goleak.Find(
			// klog's, which a dependency starts in its init and nobody can end.
			goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"),
		); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// fixture is what all tests that need a cluster share.
var fixture clusterFixture

type clusterFixture struct {
	once    sync.Once
	err     error
	cluster *cluster // as an administrator
	ns      string   // of the sandboxes; Pod Security "restricted" is enforced in it
}

// busyboxImage has to be on the cluster's nodes, and the agent's image too (images/build agent), or that of
// SALLYPORT_TEST_AGENT_IMAGE.
const busyboxImage = "sallyport/busybox:1"

// kubeconfig is the administrator's of a cluster that the tests may use.
func kubeconfig() string { return os.Getenv("SALLYPORT_TEST_KUBECONFIG") }

// requireCluster returns an administrator's access, or ends the test if there is no cluster: as a failure where
// SALLYPORT_REQUIRE_KUBERNETES is set.
func requireCluster(t testing.TB) *cluster {
	t.Helper()
	if kubeconfig() == "" {
		if os.Getenv("SALLYPORT_REQUIRE_KUBERNETES") != "" {
			t.Fatal("SALLYPORT_TEST_KUBECONFIG names no cluster, and SALLYPORT_REQUIRE_KUBERNETES is set")
		}
		t.Skip("NOT TESTED: SALLYPORT_TEST_KUBECONFIG names no cluster")
	}
	fixture.once.Do(func() { fixture.err = fixture.setUp() })
	if fixture.err != nil {
		t.Fatal(fixture.err)
	}
	return fixture.cluster
}

func (f *clusterFixture) setUp() error {
	var err error
	if f.cluster, err = newCluster(Config{Kubeconfig: kubeconfig()}.WithDefaults(), slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	f.ns, err = f.makeNamespace()
	return err
}

// glibcImage is one in which this test's program can run.
const glibcImage = "sallyport/debug:1"

func (f *clusterFixture) makeNamespace() (string, error) { return f.makeNamespaceFor("restricted") }

// makeNamespaceFor makes a namespace in which a level of Pod Security is enforced.
func (f *clusterFixture) makeNamespaceFor(level string) (string, error) {
	ctx := context.Background()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name:   "sallyport-test-" + strings.ToLower(rand.Text()[:8]),
		Labels: map[string]string{"pod-security.kubernetes.io/enforce": level, "pod-security.kubernetes.io/enforce-version": "latest"},
	}}
	if err := f.cluster.create(ctx, "", "namespaces", ns, &corev1.Namespace{}); err != nil {
		return "", err
	}
	// Until its service account is there, no pod is admitted.
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := f.cluster.get(ctx, ns.Name, "serviceaccounts", "default", &corev1.ServiceAccount{})
		if err == nil || time.Now().After(end) {
			return ns.Name, err
		}
	}
}

func (f *clusterFixture) removeNamespace(name string) error {
	ctx := context.Background()
	if err := f.cluster.core.Delete().Resource("namespaces").Name(name).Do(ctx).Error(); err != nil {
		return err
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := f.cluster.get(ctx, "", "namespaces", name, &corev1.Namespace{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("namespace %s is still there (%v)", name, err)
		}
	}
}

func (f *clusterFixture) remove() {
	if f.cluster == nil {
		return
	}
	if f.ns != "" {
		if err := f.removeNamespace(f.ns); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	f.cluster.close()
}

// newNamespace is one of the test's own.
func newNamespace(t testing.TB) string {
	t.Helper()
	requireCluster(t)
	ns, err := fixture.makeNamespace()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fixture.removeNamespace(ns); err != nil {
			t.Error(err)
		}
	})
	return ns
}

// newBackend returns a running backend with a gate's name of its own, and checks at the end that it left nothing.
func newBackend(t testing.TB, change func(*Config)) *Backend {
	t.Helper()
	b, stop := newGate(t, "test-"+rand.Text(), change)
	t.Cleanup(func() {
		stop()
		if len(b.live) != 0 || len(b.used) != 0 {
			t.Errorf("%d sandboxes are still live, %d names taken", len(b.live), len(b.used))
		}
		for _, ns := range b.namespaces() {
			for _, pod := range pods(t, ns, b.ownLabels()) {
				t.Errorf("left: pod %s/%s, %s", ns, pod.Name, pod.Status.Phase)
			}
		}
	})
	return b
}

// newGate returns a running backend, and what ends it.
func newGate(t testing.TB, gate string, change func(*Config)) (*Backend, func()) {
	t.Helper()
	requireCluster(t)
	config := Config{Kubeconfig: kubeconfig(), Namespace: fixture.ns, CPUShare: 0.02, AgentImage: os.Getenv("SALLYPORT_TEST_AGENT_IMAGE")}
	if change != nil {
		change(&config)
	}
	b, err := New(context.Background(), config, gate, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b.Run(ctx)
	}()
	var once sync.Once
	return b, func() {
		once.Do(func() {
			cancel()
			<-ended
			b.Close()
		})
	}
}

func pods(t testing.TB, ns, labels string) []corev1.Pod {
	t.Helper()
	var list corev1.PodList
	if err := fixture.cluster.list(context.Background(), ns, "pods", listOptions{labels: labels}, &list); err != nil {
		t.Fatal(err)
	}
	return list.Items
}

// newSpec is a user's of its own, so that no test has another's pod names.
func newSpec(image string) backends.Spec {
	return backends.Spec{
		Template: backends.Template{Image: image, PullPolicy: "never", UID: 1000, GID: 1000},
		Owner: backends.Owner{
			Session: "test-" + rand.Text(), User: "alice@" + rand.Text(), Profile: "p", Grant: "OPS-1", Expires: time.Now().Add(time.Hour),
		},
	}
}

func startSandbox(t testing.TB, b *Backend, spec backends.Spec) *sandbox {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	s, err := b.Start(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s.(*sandbox)
}

func sh(t testing.TB, s backends.Sandbox, line string) string {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	var stdout, stderr bytes.Buffer
	_, err := s.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: line, Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return stdout.String() + stderr.String()
}

func TestContract(t *testing.T) {
	b := newBackend(t, nil)
	backendtest.Run(t, backendtest.Subject{
		Backend: b,
		Spec:    func() backends.Spec { return newSpec(busyboxImage) },
		Own:     insideDir,
		Kill: func(s backends.Sandbox) error {
			k := s.(*sandbox)
			return fixture.cluster.deletePod(context.Background(), k.at.namespace, k.at.name, k.uid)
		},
	})
}
