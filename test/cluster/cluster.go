package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Names, addresses and ports are fixed: one cluster per machine. A kubelet refuses a loopback address, so the node has
// that of a bridge of ours, which leads to nothing but the pods. The API server listens there too, for the pods; what
// only the cluster's own parts use is on 127.0.0.1.
const (
	node        = "sallyport"
	bridge      = "sallyport-k8s"
	nodeIP      = "10.231.7.1"
	podCIDR     = "10.231.7.0/24"
	serviceCIDR = "10.231.8.0/24"
	serviceIP   = "10.231.8.1" // of kubernetes.default
	cgroup      = "sallyport-cluster"

	apiURL          = "https://" + nodeIP + ":" + apiPort
	apiPort         = "16443"
	kubeletPort     = "20250"
	proxyHealthPort = "20256"
	proxyMetricPort = "20249"
	etcdURL         = "https://127.0.0.1:12379"
	etcdPeerURL     = "https://127.0.0.1:12380"

	// partMark is in the environment of all that the cluster runs, and of what that runs (containerd's shims), with the
	// directory and the part's name. So they are found without a file of process ids, which a kill could leave unwritten.
	partMark = "SALLYPORT_CLUSTER_PART"
)

// A cluster is a directory, in which everything of it lies.
type cluster struct{ dir string }

func (c cluster) path(elem ...string) string {
	return filepath.Join(append([]string{c.dir}, elem...)...)
}
func (c cluster) kubeconfig(user string) string { return c.path(user + ".kubeconfig") }
func (c cluster) socket() string                { return c.path("containerd.sock") }

func (c cluster) write(name string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(c.path(name)), 0o700); err != nil {
		return err
	}
	return os.WriteFile(c.path(name), content, 0o600)
}

// lock keeps one `up` or `down` from another's way. The kernel drops an abstract socket with its process.
func lock(ctx context.Context) (release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var l net.Listener
	err = until(ctx, "another up or down to end", func() error {
		l, err = net.Listen("unix", "@sallyport-cluster")
		return err
	})
	if err != nil {
		return nil, err
	}
	return func() { l.Close() }, nil
}

// start runs a part of the cluster; what it says goes to logs/NAME. If it ends while this process lives, parts is
// cancelled with the reason.
func (c cluster) start(parts context.CancelCauseFunc, name string, argv ...string) error {
	log, err := os.OpenFile(c.path("logs", name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = c.dir
	// Nothing of the user's environment, a proxy least of all.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.dir, partMark + "=" + c.dir + " " + name}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		err := cmd.Wait()
		end, _ := os.ReadFile(c.path("logs", name))
		parts(fmt.Errorf("%s ended: %v; the end of its log:\n%s", name, err, end[max(0, len(end)-3000):]))
	}()
	return nil
}

// processes lists the ids of the processes that belong to the named parts; of all parts if none is named.
func (c cluster) processes(names ...string) []int {
	var pids []int
	files, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, file := range files {
		environ, _ := os.ReadFile(file) // empty for a process that has ended
		for v := range bytes.SplitSeq(environ, []byte{0}) {
			name, ok := strings.CutPrefix(string(v), partMark+"="+c.dir+" ")
			if !ok || len(names) > 0 && !slices.Contains(names, name) {
				continue
			}
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// config is the administrator's access.
func (c cluster) config() (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.kubeconfig("admin"))
	if err != nil {
		return nil, err
	}
	config.Proxy = func(*http.Request) (*url.URL, error) { return nil, nil }
	return config, nil
}

// ready tells why a pod can't be created and run yet, or nil: the node is ready and without taints, and the default
// ServiceAccount is there.
func (c cluster) ready(ctx context.Context) error {
	config, err := c.config()
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	n, err := client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return err
	}
	isReady := errors.New("the node has not reported yet")
	for _, condition := range n.Status.Conditions {
		if condition.Type == corev1.NodeReady {
			isReady = nil
			if condition.Status != corev1.ConditionTrue {
				return fmt.Errorf("the node is not ready: %s", condition.Message)
			}
		}
	}
	if isReady != nil {
		return isReady
	}
	if len(n.Spec.Taints) > 0 {
		return fmt.Errorf("the node is tainted: %v", n.Spec.Taints)
	}
	_, err = client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
	return err
}

// run runs a command to its end.
func run(argv ...string) error {
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// until calls f twenty times a second until it succeeds or the context ends.
func until(ctx context.Context, what string, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w (%w)", what, context.Cause(ctx), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
