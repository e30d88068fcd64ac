// Package proof shows on the real thing that the cluster is what the tests of the gate rely on, and that nothing of it
// is left. It uses the binary alone, so it is compiled in a second.
package proof

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	api     = "10.231.7.1:16443"
	markVar = "SALLYPORT_CLUSTER_PART="
)

var (
	binary = os.Getenv("SALLYPORT_TEST_CLUSTER")
	dir    = filepath.Join("/var/lib", "sallyport-cluster-proof")
)

// hardened is a pod as the gate makes them.
const hardened = `apiVersion: v1
kind: Pod
metadata: {name: hardened}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: 0
  securityContext: {runAsNonRoot: true, runAsUser: 1234, runAsGroup: 1234, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: main
    image: sallyport/busybox:1
    command: [sleep, inf]
    resources: {limits: {cpu: 100m, memory: 32Mi, ephemeral-storage: 16Mi}}
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: home, mountPath: /home}]
  volumes: [{name: home, emptyDir: {sizeLimit: 16Mi}}]
`

func TestCluster(t *testing.T) {
	if binary == "" {
		if os.Getenv("SALLYPORT_REQUIRE_KUBERNETES") != "" {
			t.Fatal("SALLYPORT_TEST_CLUSTER doesn't name the binary")
		}
		t.Skip("SALLYPORT_TEST_CLUSTER doesn't name the binary: make test builds it")
	}
	cluster(t, "", "down") // a killed test's
	before := traces(t)
	t.Cleanup(func() { cluster(t, "", "down") })

	killInTheMiddle(t)
	out := cluster(t, "", "up")
	if want := "export KUBECONFIG=" + dir + "/admin.kubeconfig\n"; out != want {
		t.Fatalf("up says %q, want %q", out, want)
	}
	t.Run("up again", func(t *testing.T) {
		parts := processes(t)
		if again := cluster(t, "", "up"); again != out {
			t.Errorf("says %q", again)
		}
		if !slices.Equal(processes(t), parts) {
			t.Error("has started something")
		}
	})
	t.Run("node", func(t *testing.T) {
		got := kubectl(t, "", "get", "node", "sallyport", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		if got != "True" {
			t.Errorf("Ready is %q", got)
		}
	})
	kubectl(t, "", "create", "namespace", "proof")
	kubectl(t, "", "label", "namespace", "proof", "pod-security.kubernetes.io/enforce=restricted")
	startPod(t)
	t.Run("pod", testPod)
	t.Run("exec by WebSocket", testWebSocket)
	t.Run("restricted", func(t *testing.T) {
		out, err := command("", "kubectl", "-n", "proof", "run", "plain", "--image=sallyport/busybox:1")
		if err == nil || !strings.Contains(out, `violates PodSecurity "restricted`) {
			t.Errorf("a plain pod: %v: %s", err, out)
		}
	})
	t.Run("anonymous", func(t *testing.T) {
		client := http.Client{Transport: &http.Transport{TLSClientConfig: authority(t)}, Timeout: time.Minute}
		response, err := client.Get("https://" + api + "/api/v1/namespaces/proof/pods")
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusForbidden && response.StatusCode != http.StatusUnauthorized {
			t.Errorf("answered %s", response.Status)
		}
	})

	// Killed with a pod running, in one blow: what containerd and the kubelet would have undone is still there.
	for _, pid := range processes(t) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	cluster(t, "", "up")
	if out, err := command("", "kubectl", "-n", "proof", "get", "pod", "hardened"); err == nil {
		t.Errorf("the pod of the killed cluster is there: %s", out)
	}
	if left := mentioning(t, "/proc/[0-9]*/cgroup", "sallyport-cluster"); len(left) > 0 {
		t.Errorf("processes of the killed cluster's pod are there: %v", left)
	}
	kubectl(t, "", "create", "namespace", "proof")
	startPod(t)
	cluster(t, "", "down")
	after := traces(t)
	for what, b := range before {
		if a := after[what]; !slices.Equal(a, b) {
			t.Errorf("down leaves %s:\nbefore %q\nafter  %q", what, b, a)
		}
	}
}

// killInTheMiddle kills an `up` that has started some parts.
func killInTheMiddle(t *testing.T) {
	t.Helper()
	up := exec.Command(binary, "up")
	up.Env = append(os.Environ(), "SALLYPORT_CLUSTER_DIR="+dir)
	if err := up.Start(); err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(time.Minute)
	for len(mentioning(t, "/proc/[0-9]*/environ", markVar+dir+" kube-apiserver")) == 0 {
		if time.Now().After(end) {
			t.Error("up has not started an API server in a minute")
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	up.Process.Kill()
	up.Wait()
	if len(processes(t)) == 0 {
		t.Error("no part was running when up was killed")
	}
}

func startPod(t *testing.T) {
	t.Helper()
	kubectl(t, hardened, "-n", "proof", "apply", "-f", "-")
	kubectl(t, "", "-n", "proof", "wait", "--for=condition=Ready", "pod/hardened", "--timeout=2m")
}

func testPod(t *testing.T) {
	for _, c := range []struct{ what, script, want string }{
		{"user", "id -u; id -g", `^1234\n1234\n$`},
		{"capabilities", "grep -E '^Cap(Prm|Eff|Bnd)' /proc/self/status", `^(Cap...:\t0{16}\n){3}$`},
		{"seccomp", "grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status", `^NoNewPrivs:\t1\nSeccomp:\t2\n$`},
		{"root", "touch /x 2>&1; touch /home/x && ls /home", `Read-only file system\nx\n$`},
		{"token", "ls /var/run/secrets 2>&1", `No such file`},
		{"routes", "ip route", `^10\.231\.7\.0/24 dev eth0 [^/]*\n10\.231\.8\.0/24 via 10\.231\.7\.1 dev eth0 \n$`},
		{"resolver", "grep nameserver /etc/resolv.conf", `^nameserver 127\.0\.0\.1\n$`},
		{"exit code", "sh -c 'exit 7'; echo $?", `^7\n$`},
	} {
		out, err := command("", "kubectl", "-n", "proof", "exec", "hardened", "--", "sh", "-c", c.script+"; true")
		if err != nil || !regexp.MustCompile(c.want).MatchString(out) {
			t.Errorf("%s: %v: %q, want %s", c.what, err, out, c.want)
		}
	}
}

// testWebSocket runs a command by the protocol of RFC 6455 itself: kubectl would fall back to SPDY unseen.
func testWebSocket(t *testing.T) {
	config := authority(t)
	client, err := tls.X509KeyPair(fromKubeconfig(t, "client-certificate-data"), fromKubeconfig(t, "client-key-data"))
	if err != nil {
		t.Fatal(err)
	}
	config.Certificates = []tls.Certificate{client}
	conn, err := tls.Dial("tcp", api, config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	io.WriteString(conn, "GET /api/v1/namespaces/proof/pods/hardened/exec?command=echo&command=hello&stdout=true "+
		"HTTP/1.1\r\nHost: "+api+"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n")
	r := bufio.NewReader(conn)
	response, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if response.StatusCode != http.StatusSwitchingProtocols ||
		response.Header.Get("Sec-WebSocket-Protocol") != "v5.channel.k8s.io" {
		t.Fatalf("answered %s, %v", response.Status, response.Header)
	}
	var stdout string
	for stdout != "hello\n" {
		var head [2]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			t.Fatalf("after %q: %v", stdout, err)
		}
		if head[1] > 125 {
			t.Fatalf("a frame of a kind that isn't expected: % x", head)
		}
		payload := make([]byte, head[1])
		if _, err := io.ReadFull(r, payload); err != nil {
			t.Fatal(err)
		}
		if len(payload) > 0 && payload[0] == 1 { // the channel
			stdout += string(payload[1:])
		}
	}
}

// command runs the cluster's binary with input, and returns what it says on both outputs.
func command(input string, args ...string) (string, error) {
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "SALLYPORT_CLUSTER_DIR="+dir, "KUBECONFIG=")
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// cluster runs a command that has to succeed, and returns its standard output.
func cluster(t *testing.T, input string, args ...string) string {
	t.Helper()
	began := time.Now()
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "SALLYPORT_CLUSTER_DIR="+dir, "KUBECONFIG=")
	cmd.Stdin = strings.NewReader(input)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	// One of our files, as a caller may have a lock's: the parts that up starts must not hold it.
	mine, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	cmd.ExtraFiles = []*os.File{theirs}
	out, err := cmd.Output()
	theirs.Close()
	mine.SetReadDeadline(time.Now().Add(time.Minute))
	if _, eof := mine.Read(make([]byte, 1)); eof != io.EOF {
		t.Errorf("%s: a file of its caller is still open: %v", args[0], eof)
	}
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	if args[0] != "kubectl" {
		t.Logf("%s took %.1f s\n%s", args[0], time.Since(began).Seconds(), stderr.String())
	}
	return string(out)
}

func kubectl(t *testing.T, input string, args ...string) string {
	t.Helper()
	return cluster(t, input, append([]string{"kubectl"}, args...)...)
}

func fromKubeconfig(t *testing.T, key string) []byte {
	t.Helper()
	text, err := os.ReadFile(dir + "/admin.kubeconfig")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(key + `: ([A-Za-z0-9+/=]+)`).FindSubmatch(text)
	if m == nil {
		t.Fatalf("no %s in the kubeconfig", key)
	}
	value, err := base64.StdEncoding.DecodeString(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func authority(t *testing.T) *tls.Config {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(fromKubeconfig(t, "certificate-authority-data")) {
		t.Fatal("no authority in the kubeconfig")
	}
	return &tls.Config{RootCAs: pool}
}

// processes lists those of the cluster's parts and their shims.
func processes(t *testing.T) []int {
	t.Helper()
	return mentioning(t, "/proc/[0-9]*/environ", markVar+dir+" ")
}

// mentioning lists the processes whose file holds the text.
func mentioning(t *testing.T, pattern, text string) []int {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, file := range files {
		content, _ := os.ReadFile(file) // a process that has ended
		if pid, err := strconv.Atoi(strings.Split(file, "/")[2]); err == nil && strings.Contains(string(content), text) {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// traces is what a cluster could leave on the machine.
func traces(t *testing.T) map[string][]string {
	t.Helper()
	output := func(argv ...string) []string {
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", argv, err, out)
		}
		lines := strings.Split(string(out), "\n")
		slices.Sort(lines)
		return lines
	}
	all := map[string][]string{
		"links":          output("sh", "-c", "ip -o link show | cut -d: -f2"),
		"routes":         output("ip", "route"),
		"nft tables":     output("nft", "list", "tables"),
		"iptables rules": output("sh", "-c", "iptables -S; ip6tables -S"),
		"mounts":         output("sh", "-c", "cut -d' ' -f5 /proc/self/mountinfo"),
		"cgroups":        output("sh", "-c", "ls -d /sys/fs/cgroup/* /sys/fs/cgroup/*/*/ 2>/dev/null; true"),
		"files": output("sh", "-c", "ls -d /run/* /run/netns/* /run/containerd/* /run/containerd/s/* /var/lib/* "+
			"/var/log/* 2>/dev/null; true"),
		"settings": output("sh", "-c", "cd /proc/sys; grep . net/ipv4/ip_forward net/ipv4/conf/*/route_localnet "+
			"net/bridge/* net/netfilter/nf_conntrack_max vm/overcommit_memory vm/panic_on_oom kernel/panic "+
			"kernel/panic_on_oops kernel/keys/root_max* 2>/dev/null; true"),
	}
	for _, pid := range append(processes(t), mentioning(t, "/proc/[0-9]*/cgroup", "sallyport-cluster")...) {
		all["processes"] = append(all["processes"], strconv.Itoa(pid))
	}
	return all
}
