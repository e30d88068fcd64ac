package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/klog/v2"
)

const (
	podWait     = 3 * time.Minute // for a pod to come up, and to be gone
	sandboxName = "sandbox"       // a pod's main container
	tryEvery    = 20 * time.Millisecond
)

// cluster is the Kubernetes cluster, used without a gate, in a namespace of the run's own.
type cluster struct {
	kubeconfig string
	kubectl    []string
	namespace  string
	config     *rest.Config
	core       *rest.RESTClient
	params     runtime.ParameterCodec
}

func newCluster(ctx context.Context, kubeconfig string, kubectl []string) (*cluster, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = -1, -1
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	config.APIPath, config.GroupVersion = "/api", &corev1.SchemeGroupVersion
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	k := &cluster{kubeconfig: kubeconfig, kubectl: kubectl, config: config, params: runtime.NewParameterCodec(scheme)}
	k.namespace = "sallyport-bench-" + strings.ToLower(rand.Text()[:8])
	if k.core, err = rest.RESTClientFor(config); err != nil {
		return nil, err
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: k.namespace, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"},
	}}
	if err := k.core.Post().Resource("namespaces").Body(ns).Do(ctx).Error(); err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", k.namespace, err)
	}
	return k, nil
}

// close removes the namespace and waits until all in it is gone.
func (k *cluster) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), podWait)
	defer cancel()
	for {
		err := k.core.Delete().Resource("namespaces").Name(k.namespace).Do(ctx).Error()
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil && !apierrors.IsConflict(err) {
			return fmt.Errorf("remove namespace %s: %w", k.namespace, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (k *cluster) pods(ctx context.Context) ([]corev1.Pod, error) {
	var list corev1.PodList
	err := k.core.Get().Namespace(k.namespace).Resource("pods").Do(ctx).Into(&list)
	return list.Items, err
}

// settle waits until no pod is left, and for a moment more: the node takes away what the API server has forgotten.
func (k *cluster) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, podWait)
	defer cancel()
	for {
		all, err := k.pods(ctx)
		if err != nil {
			return err
		}
		wait := 20 * time.Millisecond
		if len(all) == 0 {
			wait = time.Second
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("after %v, %d pods are left", podWait, len(all))
		}
		if len(all) == 0 {
			return nil
		}
	}
}

// start creates a pod and says how long it took until a program in it had run: tried as often as the gate tries it.
func (k *cluster) start(ctx context.Context, pod *corev1.Pod) (name string, took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, podWait)
	defer cancel()
	began := time.Now()
	var made corev1.Pod
	if err := k.core.Post().Namespace(k.namespace).Resource("pods").Body(pod).Do(ctx).Into(&made); err != nil {
		return "", 0, fmt.Errorf("create pod: %w", err)
	}
	for {
		err := k.exec(ctx, made.Name, "/bin/true")
		if err == nil {
			return made.Name, time.Since(began), nil
		}
		select {
		case <-ctx.Done():
			return made.Name, 0, fmt.Errorf("no program runs in the pod: %w", err)
		case <-time.After(tryEvery):
		}
	}
}

func (k *cluster) exec(ctx context.Context, pod string, command ...string) error {
	r := k.core.Post().Namespace(k.namespace).Resource("pods").Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: sandboxName, Command: command, Stdout: true, Stderr: true}, k.params)
	e, err := remotecommand.NewWebSocketExecutor(k.config, http.MethodGet, r.URL().String())
	if err != nil {
		return err
	}
	return e.StreamWithContext(klog.NewContext(ctx, logr.Discard()), remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard})
}

func (k *cluster) delete(ctx context.Context, pod string) error {
	now := int64(0)
	return k.core.Delete().Namespace(k.namespace).Resource("pods").Name(pod).
		Body(&metav1.DeleteOptions{GracePeriodSeconds: &now}).Do(ctx).Error()
}

// command is kubectl in the run's namespace.
func (k *cluster) command(ctx context.Context, args ...string) (*exec.Cmd, context.CancelFunc) {
	cmd, cancel := command(ctx, k.kubectl[0], slices.Concat(k.kubectl[1:], []string{"--namespace=" + k.namespace}, args)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+k.kubeconfig)
	return cmd, cancel
}

// kubectlRun runs true in a pod of that shape, as a person without a gate does: kubectl run --rm.
func (k *cluster) kubectlRun(ctx context.Context, shape *corev1.Pod) error {
	pod := shape.DeepCopy()
	for i := range pod.Spec.Containers {
		pod.Spec.Containers[i].Command, pod.Spec.Containers[i].Args = []string{"/bin/true"}, nil
	}
	overrides, err := json.Marshal(map[string]any{"spec": pod.Spec})
	if err != nil {
		return err
	}
	cmd, cancel := k.command(ctx, "run", "bench-"+strings.ToLower(rand.Text()[:8]), "--image="+pod.Spec.Containers[0].Image,
		"--restart=Never", "--rm", "--attach", "--quiet", "--overrides="+string(overrides))
	defer cancel()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("kubectl run: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// podShape is the pod of the one session that there is, to be made once more.
func (k *cluster) podShape(ctx context.Context) (*corev1.Pod, error) {
	all, err := k.pods(ctx)
	if err != nil {
		return nil, err
	}
	if len(all) != 1 {
		return nil, fmt.Errorf("there are %d pods where one should be", len(all))
	}
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "floor-"}, Spec: all[0].Spec}
	p.Spec.NodeName, p.Spec.Priority, p.Spec.PreemptionPolicy = "", nil, nil
	return p, nil
}

// clusterProfiles are the users of the cluster's gates, by what their profiles differ in.
func (b *bench) clusterProfiles() map[string]func(map[string]any) {
	return map[string]func(map[string]any){
		"plain": func(p map[string]any) { delete(p, "mounts") },
		"carried": func(p map[string]any) {
			delete(p, "mounts")
			p["image"] = b.carried
		},
		"small": func(p map[string]any) {
			delete(p, "mounts")
			p["memory"], p["home_size"], p["tmp_size"] = "64Mi", "8Mi", "8Mi"
		},
	}
}

// setUpCluster has sallyport demo write the configuration of a gate on the cluster, and starts it.
func (b *bench) setUpCluster(ctx context.Context) (err error) {
	b.say("setting up the gate on the cluster with sallyport demo")
	if b.cluster, err = newCluster(ctx, b.kubeconfig, strings.Fields(b.kubectl)); err != nil {
		return err
	}
	b.later(b.cluster.close)
	demo := b.path("demo-cluster")
	ports, err := freePorts(3)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(b.bin, "sallyport"), "demo", "--once", "--dir", demo, "--port", ports[0],
		"--image", b.image, "--bin", b.bin, "--kubeconfig", b.kubeconfig, "--agent-image", b.agentImage)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopWait
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("sallyport demo: %w\n%s", err, out)
	}
	// The key that the client has is the one of the other gates.
	pub, err := os.ReadFile(b.path("demo", "id_ed25519.pub"))
	if err != nil {
		return err
	}
	user, err := json.Marshal(map[string]any{"keys": []string{strings.TrimSpace(string(pub))}})
	if err != nil {
		return err
	}
	data := filepath.Join(demo, "data")
	err = errors.Join(os.WriteFile(filepath.Join(data, "users", gateUser+".json"), user, 0o644),
		prolong(filepath.Join(data, "grants", gateUser+".json")), addUsers(data, b.clusterProfiles()))
	if err != nil {
		return err
	}
	b.onCluster, err = b.clusterGate("Sallyport on the cluster", "", ports[1], ports[2], b.kubeconfig)
	if err != nil {
		return err
	}
	if err := b.onCluster.start(ctx); err != nil {
		return err
	}
	b.later(b.onCluster.stop)
	hostKey, err := b.onCluster.hostKey()
	if err != nil {
		return err
	}
	return b.client.know(&b.onCluster.target, hostKey)
}

// clusterGate is a gate with the cluster's configuration. It isn't started.
func (b *bench) clusterGate(name, suffix, port, monitor, kubeconfig string) (*gate, error) {
	demo := b.path("demo-cluster")
	shipped, err := os.ReadFile(filepath.Join(demo, "sallyport.yaml"))
	if err != nil {
		return nil, err
	}
	text, err := withSettings(shipped, map[string]any{
		"state": "state" + suffix, "audit.store.directory": "log" + suffix, "ssh.listen": "127.0.0.1:" + port,
		"monitor.listen": "127.0.0.1:" + monitor, "kubernetes.namespace": b.cluster.namespace, "kubernetes.kubeconfig": kubeconfig,
		"kubernetes.agent_in": []string{b.carried}, "kubernetes.max_per_user": 200, "kubernetes.cpu_share": 0.01,
		"ssh.max_sessions_per_user": 200, "ssh.max_startups_per_source": 200, "ssh.max_startups": 200,
	})
	if err != nil {
		return nil, err
	}
	g := &gate{
		binary: filepath.Join(demo, "bin", "sallyport"), config: filepath.Join(demo, "bench"+suffix+".yaml"),
		state: filepath.Join(demo, "state"+suffix), log: filepath.Join(demo, "log"+suffix), monitor: "127.0.0.1:" + monitor,
		target: target{name: name, addr: "127.0.0.1:" + port, user: "plain"},
	}
	g.rest = func(ctx context.Context, b *bench) error {
		if err := b.cluster.settle(ctx); err != nil {
			return err
		}
		return g.stored(ctx)
	}
	g.cpu = func() (time.Duration, error) { return cpuTime(g.process.pid()) }
	return g, os.WriteFile(g.config, text, 0o644)
}

// version says what the cluster is.
func (k *cluster) version(ctx context.Context) (string, error) {
	text, err := k.core.Get().AbsPath("/version").Do(ctx).Raw()
	if err != nil {
		return "", err
	}
	var v struct {
		GitVersion string `json:"gitVersion"`
	}
	if err := json.Unmarshal(text, &v); err != nil {
		return "", err
	}
	var nodes corev1.NodeList
	if err := k.core.Get().Resource("nodes").Do(ctx).Into(&nodes); err != nil {
		return "", err
	}
	if len(nodes.Items) == 0 {
		return "", errors.New("the cluster has no node")
	}
	where := ""
	if u, err := url.Parse(k.config.Host); err == nil && strings.HasPrefix(u.Hostname(), "10.231.7.") {
		where = ", build/cluster on this machine"
	}
	return fmt.Sprintf("Kubernetes %s, %d node, %s%s", v.GitVersion, len(nodes.Items), nodes.Items[0].Status.NodeInfo.ContainerRuntimeVersion, where), nil
}
