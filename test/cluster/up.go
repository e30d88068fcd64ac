package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/rest"
)

// containerdConfig keeps root, state and socket apart from those of a dockerd's or the machine's own containerd. The
// pods' network namespaces are mounted below the state, so that down finds all mounts in one place. In 1.6 the CRI
// service isn't loaded without io.containerd.runtime.v1.linux, so that one is not disabled. restrict_oom_score_adj:
// where root lacks CAP_SYS_RESOURCE (in a container), runc could not give a pod's sandbox the score it should have.
const containerdConfig = `version = 2
root = "DIR/containerd/root"
state = "DIR/containerd/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "DIR/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "DIR/containerd/opt"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "IMAGE"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "DIR/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      Root = "DIR/containerd/runc"
`

// cniConfig gives a pod a leg on the bridge and a route to the services. There is no default route: a pod reaches pods,
// services and the node's address, and nothing else.
const cniConfig = `{
  "cniVersion": "0.4.0",
  "name": "sallyport",
  "plugins": [{
    "type": "bridge", "bridge": "BRIDGE", "isGateway": true, "ipMasq": false, "hairpinMode": true,
    "ipam": {
      "type": "host-local", "dataDir": "DIR/ipam",
      "ranges": [[{"subnet": "POD_CIDR"}]], "routes": [{"dst": "SERVICE_CIDR"}]
    }
  }]
}
`

// kubeletConfig: images are imported and could not be pulled again, so none is collected as garbage, and the disk has
// to be nearly full before a pod is evicted. resolvConf "" keeps this machine's resolver out of the pods. From 1.35 on
// a kubelet refuses cgroup v1 unless told otherwise.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: NODE_IP
port: KUBELET_PORT
healthzPort: 0
tlsCertFile: DIR/pki/kubelet-server.crt
tlsPrivateKeyFile: DIR/pki/kubelet-server.key
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: DIR/pki/ca.crt}
authorization: {mode: Webhook}
containerRuntimeEndpoint: unix://DIR/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /CGROUP
failCgroupV1: false
failSwapOn: false
makeIPTablesUtilChains: false
resolvConf: ""
clusterDomain: cluster.local
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard:
  memory.available: 100Mi
  nodefs.available: 1%
  nodefs.inodesFree: 1%
  imagefs.available: 1%
  imagefs.inodesFree: 1%
serializeImagePulls: false
maxPods: 200
podLogsDir: DIR/pod-logs
volumePluginDir: DIR/kubelet/volume-plugins
`

// proxyConfig: in nftables mode all rules are in tables of its own. The zeros leave the machine's limits alone.
const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: NODE
clientConnection: {kubeconfig: DIR/kube-proxy.kubeconfig}
clusterCIDR: POD_CIDR
healthzBindAddress: 127.0.0.1:PROXY_HEALTH_PORT
metricsBindAddress: 127.0.0.1:PROXY_METRIC_PORT
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`

// forwardRule lets pods reach each other where bridged packets pass iptables and Docker has set the policy to DROP.
var forwardRule = []string{"FORWARD", "-i", bridge, "-o", bridge, "-m", "comment", "--comment", bridge, "-j", "ACCEPT"}

// forwardRules is what iptables says of forwarding. Adding or deleting a rule would make a table where there is none.
func forwardRules() string {
	out, _ := exec.Command("iptables", "-w", "-S", "FORWARD").Output()
	return strings.TrimSpace(string(out))
}

// up starts the cluster unless it runs already, and prints the line that sets KUBECONFIG.
func (c cluster) up(ctx context.Context) error {
	ctx, cancel := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer cancel()
	release, err := lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	if !c.isRunning(ctx) {
		keepFiles()
		if err := c.check(); err != nil {
			return err
		}
		if err := c.clear(); err != nil {
			return fmt.Errorf("clear what an earlier one left: %w", err)
		}
		if _, err := net.InterfaceByName(bridge); err == nil {
			return fmt.Errorf("the link %s is there: another cluster of this kind, with a SALLYPORT_CLUSTER_DIR of its "+
				"own, runs on this machine", bridge)
		}
		if err := c.startAll(ctx); err != nil {
			return errors.Join(err, c.clear())
		}
	}
	fmt.Printf("export KUBECONFIG=%s\n", c.kubeconfig("admin"))
	return nil
}

// keepFiles keeps from the parts the files that our caller has open, such as a lock's: they would hold it while they run.
func keepFiles() {
	names, _ := filepath.Glob("/proc/self/fd/*")
	for _, name := range names {
		if fd, err := strconv.Atoi(filepath.Base(name)); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}

func (c cluster) isRunning(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return len(c.processes("kubelet")) > 0 && len(c.processes("containerd")) > 0 && c.ready(ctx) == nil
}

// check tells what is missing on this machine, and guards a directory that is not a cluster's from down.
func (c cluster) check() error {
	if os.Getuid() != 0 {
		return errors.New("a node needs root")
	}
	if !filepath.IsAbs(c.dir) || strings.ContainsAny(c.dir, " \"\n") || len(c.dir) > 60 {
		return fmt.Errorf("%q: an absolute path of up to 60 characters is needed, without spaces and quotes", c.dir)
	}
	entries, err := os.ReadDir(c.dir)
	if err == nil && len(entries) > 0 && !c.exists() {
		return fmt.Errorf("%s has other things in it", c.dir)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, program := range []string{"containerd", "containerd-shim-runc-v2", "ctr", "runc", "ip", "iptables", "nft",
		"busybox", "/usr/lib/cni/bridge"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%w (Debian: apt-get install containerd runc iproute2 iptables nftables busybox-static "+
				"containernetworking-plugins)", err)
		}
	}
	return nil
}

// startAll starts everything in a directory that is empty or not there.
func (c cluster) startAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	ctx, parts := context.WithCancelCause(ctx)
	defer parts(nil)
	began := time.Now()
	lap := func(what string) { fmt.Fprintf(os.Stderr, "%5.1f s  %s\n", time.Since(began).Seconds(), what) }

	if err := c.prepare(); err != nil {
		return err
	}
	if err := c.start(parts, "containerd", "containerd", "--config", c.path("containerd.toml")); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	component := func(name string, args ...string) error {
		return c.start(parts, name, append([]string{self, name}, args...)...)
	}
	pki := func(file string) string { return c.path("pki", file) }
	if err := component("etcd", "--name="+node, "--data-dir="+c.path("etcd"), "--log-level=warn", "--unsafe-no-fsync",
		"--listen-client-urls="+etcdURL, "--advertise-client-urls="+etcdURL, "--listen-peer-urls="+etcdPeerURL,
		"--initial-advertise-peer-urls="+etcdPeerURL, "--initial-cluster="+node+"="+etcdPeerURL,
		"--client-cert-auth", "--trusted-ca-file="+pki("ca.crt"),
		"--cert-file="+pki("etcd.crt"), "--key-file="+pki("etcd.key"),
		"--peer-client-cert-auth", "--peer-trusted-ca-file="+pki("ca.crt"),
		"--peer-cert-file="+pki("etcd.crt"), "--peer-key-file="+pki("etcd.key")); err != nil {
		return err
	}
	// An API server that finds no etcd at first waits long before it looks again.
	config, err := c.config()
	if err != nil {
		return err
	}
	transport, err := rest.TransportFor(config)
	if err != nil {
		return err
	}
	if err := until(ctx, "etcd", func() error { return get(ctx, transport, etcdURL+"/health") }); err != nil {
		return err
	}
	lap("etcd")
	if err := component("kube-apiserver",
		"--etcd-servers="+etcdURL, "--etcd-cafile="+pki("ca.crt"),
		"--etcd-certfile="+pki("etcd.crt"), "--etcd-keyfile="+pki("etcd.key"),
		"--bind-address="+nodeIP, "--secure-port="+apiPort, "--service-cluster-ip-range="+serviceCIDR,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--client-ca-file="+pki("ca.crt"),
		"--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"),
		"--kubelet-certificate-authority="+pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--kubelet-client-certificate="+pki("apiserver-kubelet.crt"),
		"--kubelet-client-key="+pki("apiserver-kubelet.key"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file="+pki("service-accounts.key"),
		"--service-account-signing-key-file="+pki("service-accounts.key"),
		"--allow-privileged=true", "--profiling=false"); err != nil {
		return err
	}

	// The kubelet needs the sandbox image before it is ready.
	if err := until(ctx, "containerd", func() error { return run("ctr", "-a", c.socket(), "version") }); err != nil {
		return err
	}
	if err := writeImage(c.path("busybox.tar")); err != nil {
		return err
	}
	if err := c.importImages([]string{c.path("busybox.tar")}); err != nil {
		return err
	}
	lap("containerd and its image")
	if err := until(ctx, "the API server", func() error { return get(ctx, transport, apiURL+"/readyz") }); err != nil {
		return err
	}
	lap("API server")

	access := func(user string) string { return "--kubeconfig=" + c.kubeconfig(user) }
	for _, argv := range [][]string{
		// Each controller makes itself a ServiceAccount first: at the usual 20 requests a second that takes 4 seconds.
		{"kube-controller-manager", access("kube-controller-manager"), "--secure-port=0", "--leader-elect=false",
			"--kube-api-qps=500", "--kube-api-burst=1000", "--use-service-account-credentials=true",
			"--root-ca-file=" + pki("ca.crt"),
			"--service-account-private-key-file=" + pki("service-accounts.key")},
		{"kube-scheduler", access("kube-scheduler"), "--secure-port=0", "--leader-elect=false"},
		{"kubelet", access("kubelet"), "--config=" + c.path("kubelet.yaml"), "--hostname-override=" + node,
			"--node-ip=" + nodeIP, "--root-dir=" + c.path("kubelet"), "--cert-dir=" + c.path("kubelet/pki")},
		{"kube-proxy", "--config=" + c.path("kube-proxy.yaml")},
	} {
		if err := component(argv[0], argv[1:]...); err != nil {
			return err
		}
	}
	if err := until(ctx, "the node", func() error { return c.ready(ctx) }); err != nil {
		return err
	}
	lap("node ready")
	return nil
}

// prepare notes what down has to restore, and writes and makes all that the parts find there.
func (c cluster) prepare() error {
	if err := c.note(); err != nil {
		return err
	}
	// Whose it is, from the first moment on: a script that is killed later finds it again.
	if owner := os.Getenv("SALLYPORT_CLUSTER_OWNER"); owner != "" {
		if err := c.write("owner", []byte(owner+"\n")); err != nil {
			return err
		}
	}
	for _, dir := range []string{"logs", "etcd", "kubelet", "pod-logs"} {
		if err := os.MkdirAll(c.path(dir), 0o700); err != nil {
			return err
		}
	}
	if err := c.writePKI(); err != nil {
		return err
	}
	fill := strings.NewReplacer("DIR", c.dir, "IMAGE", "docker.io/"+busyboxImage, "CGROUP", cgroup, "BRIDGE", bridge,
		"POD_CIDR", podCIDR, "SERVICE_CIDR", serviceCIDR, "NODE_IP", nodeIP, "NODE", node, "KUBELET_PORT", kubeletPort,
		"PROXY_HEALTH_PORT", proxyHealthPort, "PROXY_METRIC_PORT", proxyMetricPort)
	for name, text := range map[string]string{
		"containerd.toml": containerdConfig,
		"cni/10.conflist": cniConfig,
		"kubelet.yaml":    kubeletConfig,
		"kube-proxy.yaml": proxyConfig,
	} {
		if err := c.write(name, []byte(fill.Replace(text))); err != nil {
			return err
		}
	}
	if err := makeCgroups(); err != nil {
		return err
	}
	_, bits, _ := strings.Cut(podCIDR, "/")
	for _, argv := range [][]string{
		{"ip", "link", "add", bridge, "type", "bridge"},
		{"ip", "address", "add", nodeIP + "/" + bits, "dev", bridge},
		{"ip", "link", "set", bridge, "up"},
	} {
		if err := run(argv...); err != nil {
			return err
		}
	}
	if forwardRules() == "-P FORWARD ACCEPT" {
		return nil
	}
	return run(append([]string{"iptables", "-w", "-I"}, forwardRule...)...)
}

func get(ctx context.Context, transport http.RoundTripper, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, response.Status)
	}
	return nil
}
