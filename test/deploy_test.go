package test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// gateImage is what the gates' pods run in this test.
const gateImage = "sallyport-test/gate:1"

// clusterBinary is the command of the cluster on this machine, which takes images. build/test names it where the cluster is one of
// this machine's.
func clusterBinary(t *testing.T) string {
	t.Helper()
	name := os.Getenv("SALLYPORT_TEST_CLUSTER")
	if name == "" {
		if os.Getenv("CI") != "" {
			t.Fatal("SALLYPORT_TEST_CLUSTER names no cluster of this machine, and CI is set")
		}
		// A cluster of the user's own is a choice that make test tells of; none at all is not.
		if os.Getenv("SALLYPORT_REQUIRE_KUBERNETES") != "" && os.Getenv("SALLYPORT_TEST_KUBECONFIG") == "" {
			t.Fatal("neither SALLYPORT_TEST_CLUSTER nor SALLYPORT_TEST_KUBECONFIG names a cluster, and SALLYPORT_REQUIRE_KUBERNETES is set")
		}
		t.Skip("NOT TESTED: the cluster is not this machine's (SALLYPORT_TEST_CLUSTER): it has neither our image nor our S3 server")
	}
	return name
}

// importImage gives the cluster an image of one layer, as docker save would write it.
func importImage(t *testing.T, name string, layer []byte) {
	t.Helper()
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"User": "65532:65532", "Entrypoint": []string{"/usr/local/bin/sallyport"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal([]any{map[string]any{"Config": "config.json", "RepoTags": []string{name}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, file := range []struct {
		name    string
		content []byte
	}{{"config.json", config}, {"layer.tar", layer}, {"manifest.json", manifest}} {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Name: file.name, Mode: 0o644, Size: int64(len(file.content))}))
		if err == nil {
			_, err = w.Write(file.content)
		}
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(clusterBinary(t), "import", "-")
	cmd.Stdin = &archive
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("import: %v: %s", err, out)
	}
}

// reachable gives the address at which the cluster's pods find what listens on a loopback address: the node's, which is
// this machine's.
func reachable(t *testing.T, target string) string {
	t.Helper()
	node, err := kubectlOutput("get", "nodes", "-o", `jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}`)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(string(node), "0"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer from.Close()
				to, err := net.Dial("tcp", target)
				if err != nil {
					return // the server is not there: as the client is to see it
				}
				defer to.Close()
				stop := time.AfterFunc(10*time.Minute, func() { from.Close(); to.Close() })
				defer stop.Stop()
				wg.Go(func() { io.Copy(to, from); to.(*net.TCPConn).CloseWrite() })
				io.Copy(from, to)
			})
		}
	})
	t.Cleanup(func() { l.Close() }) // the copies end with their ends, at the latest with the S3 server
	return l.Addr().String()
}

// deployment is the gates' on the cluster, as deploy/kubernetes makes it.
type deployment struct {
	*fleet
	overlay string
	address string // the Service's
}

func (d *deployment) apply() []byte {
	d.t.Helper()
	return d.kubectl("apply", "--server-side", "-k", d.overlay)
}

// put merges a file into one of the config maps that the gates read; nil content removes it.
func (d *deployment) put(configMap, file string, content any) {
	d.t.Helper()
	var text any
	if content != nil {
		b, err := json.Marshal(content)
		if err != nil {
			d.t.Fatal(err)
		}
		text = string(b)
	}
	patch, err := json.Marshal(map[string]any{"data": map[string]any{file: text}})
	if err != nil {
		d.t.Fatal(err)
	}
	d.kubectl("patch", "configmap", configMap, "-n", d.gates, "--type=merge", "--field-manager=ticketing", "-p", string(patch))
	// A kubelet looks once a minute, or when something about the pod changes.
	d.kubectl("annotate", "pods", "-n", d.gates, "--all", "--overwrite", fmt.Sprintf("sallyport.data=%d", time.Now().UnixNano()))
}

// pod is a gate's.
type pod struct {
	Metadata struct {
		Name, UID         string
		DeletionTimestamp string
	}
	Status struct {
		PodIP             string
		ContainerStatuses []struct {
			Ready        bool
			RestartCount int
		}
	}
}

// ready says that the pod takes logins, and will go on to.
func (p pod) ready() bool {
	return p.Metadata.DeletionTimestamp == "" && len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].Ready
}

func (d *deployment) pods() ([]pod, error) {
	out, err := kubectlOutput("get", "pods", "-n", d.gates, "-l", "app.kubernetes.io/name=sallyport", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct{ Items []pod }
	err = json.Unmarshal(out, &list)
	return list.Items, err
}

// rolledOut waits until n pods are ready and no others are to come, and returns them.
func (d *deployment) rolledOut(n int) (ready []pod) {
	d.t.Helper()
	out, err := kubectlOutput("rollout", "status", "deployment/sallyport", "-n", d.gates, "--timeout=180s")
	if err != nil {
		said, _ := kubectl("logs", "-n", d.gates, "-l", "app.kubernetes.io/name=sallyport", "--tail=20").CombinedOutput()
		events, _ := kubectl("get", "events", "-n", d.gates).CombinedOutput()
		d.t.Fatalf("%v: %s\n%s\n%s", err, out, said, events)
	}
	eventually(d.t, "the pods", func() error {
		pods, err := d.pods()
		ready = slices.DeleteFunc(slices.Clone(pods), func(p pod) bool { return !p.ready() })
		if err == nil && len(ready) != n {
			err = fmt.Errorf("%d of %+v are ready, want %d", len(ready), pods, n)
		}
		return err
	})
	return ready
}

// client is a command over the Service.
func (d *deployment) client(user string, command ...string) *exec.Cmd {
	return d.ssh(user, d.address, 22, command...)
}

// gateOf is the gate of a user's only session, as any of the gates lists it.
func (d *deployment) gateOf(user string) (string, error) {
	out, err := kubectlOutput("exec", "-n", d.gates, "deployment/sallyport", "--", "/usr/local/bin/sallyport", "session", "list", "--all", "--output", "json")
	if err != nil {
		return "", err
	}
	var all []shown
	if err := json.Unmarshal(out, &all); err != nil {
		return "", err
	}
	var found []string
	for _, s := range all {
		if s.User == user {
			found = append(found, s.Gate)
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%s has sessions at %q: %s", user, found, out)
	}
	return found[0], nil
}

func deploy(t *testing.T) *deployment {
	t.Helper()
	f := newFleet(t)
	clusterBinary(t)
	f.useS3()
	layer, err := gateLayer()
	if err != nil {
		t.Fatal(err)
	}
	importImage(t, gateImage, layer)
	d := &deployment{fleet: f, overlay: filepath.Join(f.manifests, "overlays", "test")}

	// The overlay of a user who keeps the log in a bucket, with the test's endpoint.
	s3 := reachable(t, strings.TrimPrefix(f.s3.Endpoint(), "http://"))
	config, err := os.ReadFile(filepath.Join(f.manifests, "overlays", "s3", "sallyport.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(config)
	for _, r := range []struct{ from, to string }{
		{`endpoint: ""`, fmt.Sprintf("insecure: true\n      endpoint: %q", "http://"+s3)},
		{"region: eu-central-1", "region: us-east-1"},
		{"network_policies: refer", "network_policies: refer\n  cpu_share: 0.01"},
	} {
		if strings.Count(text, r.from) != 1 {
			t.Fatalf("overlays/s3/sallyport.yaml has no %q", r.from)
		}
		text = strings.Replace(text, r.from, r.to, 1)
	}
	f.keygen("alice")
	name, tag, _ := strings.Cut(gateImage, ":")
	files := map[string]string{
		"sallyport.yaml": text,
		"debug.yaml":     fmt.Sprintf("image: %s\npull_policy: never\nmemory: 64Mi\ncpus: 0.5\npermit: {shell: true, exec: true}\n", busyboxImage),
		"tools.yaml":     fmt.Sprintf("image: %s\npull_policy: never\nmemory: 256Mi\npermit: {exec: true}\n", image()),
		"alice.yaml":     fmt.Sprintf("keys: [%q]\n", f.public("alice")),
		"kustomization.yaml": fmt.Sprintf(`resources: [../s3]
images: [{name: sallyport, newName: %s, newTag: %q}]
replicas: [{name: sallyport, count: 2}]
configMapGenerator:
  - {name: sallyport-config, namespace: %s, behavior: replace, files: [sallyport.yaml]}
  - {name: sallyport-profiles, namespace: %[3]s, behavior: merge, files: [debug.yaml, tools.yaml], options: {disableNameSuffixHash: true}}
  - {name: sallyport-users, namespace: %[3]s, behavior: merge, files: [alice.yaml], options: {disableNameSuffixHash: true}}
`, name, tag, f.gates),
	}
	if err := os.MkdirAll(d.overlay, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(d.overlay, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d.apply()

	// The keys, by the script that the page names: twice, as the second time nothing may change.
	var said []byte
	for range 2 {
		cmd := exec.Command(filepath.Join(f.manifests, "keys"), f.gates)
		cmd.Env = append(kubectl().Env, "KUBECTL="+strings.Join(kubectlName(), " "))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("keys: %v: %s", err, out)
		}
		if i := bytes.Index(out, []byte("For known_hosts")); said == nil {
			said = out[i:]
		} else if !bytes.Equal(said, out[i:]) {
			t.Errorf("keys made others the second time: %s\n%s", said, out)
		}
	}
	host := regexp.MustCompile(`(?m)^ssh-ed25519 \S+`).Find(said)
	log := regexp.MustCompile(`(?m)^ed25519 \S+`).Find(said)
	if host == nil || log == nil {
		t.Fatalf("keys: %s", said)
	}
	if err := errors.Join(
		os.WriteFile(filepath.Join(f.dir, "host.key.pub"), append(host, '\n'), 0o644),
		os.WriteFile(filepath.Join(f.dir, "log.pub"), append(log, '\n'), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	f.kubectl("create", "secret", "generic", "sallyport-s3", "-n", f.gates, "--from-file=credentials="+filepath.Join(f.dir, "putter"))
	d.put("sallyport-grants", "alice.json", grantOf("debug"))
	d.address = string(f.kubectl("get", "service", "sallyport", "-n", f.gates, "-o", "jsonpath={.spec.clusterIP}"))
	return d
}

// TestDeploy deploys the manifests as docs/deploy-kubernetes.md says, and uses and attacks what they make.
func TestDeploy(t *testing.T) {
	d := deploy(t)
	gates := d.rolledOut(2)

	// Applied again nothing changes, and what others have put into the config maps stays.
	d.apply()
	if out, err := kubectl("diff", "--server-side", "-k", d.overlay).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("diff: %v\n%s", err, out)
	}

	// Any gate is the same host; the sandbox is in the other namespace.
	eventually(t, "a login over the Service", func() error {
		out, err := d.client("alice", "hostname").CombinedOutput()
		if err == nil && !strings.HasPrefix(string(out), "sp-") {
			err = errors.New("no pod of the sandboxes'")
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	for _, p := range gates {
		if out, err := d.ssh("alice", p.Status.PodIP, 2222, "echo in").CombinedOutput(); err != nil || !strings.Contains(string(out), "in\n") {
			t.Errorf("pod %s: %v: %s", p.Metadata.Name, err, out)
		}
	}

	t.Run("attack", d.attack)
	t.Run("data", d.data)
	t.Run("drain", d.drain)
	t.Run("crash", d.crash)

	d.kubectl("scale", "deployment/sallyport", "-n", d.gates, "--replicas=0")
	eventually(t, "the gates to go", func() error {
		pods, err := d.pods()
		if err == nil && len(pods) > 0 {
			err = fmt.Errorf("%d are there", len(pods))
		}
		return err
	})
	if pods, err := d.podsOf("app.kubernetes.io/managed-by=sallyport"); err != nil || len(pods) != 0 {
		t.Errorf("left: %v, %v", pods, err)
	}
	if out, err := d.audit("verify", "--key", filepath.Join(d.dir, "log.pub")); err != nil || !strings.Contains(out, " 0 live, 0 damaged") {
		t.Errorf("verify: %v\n%s", err, out)
	}
}

// attack looks for the gates' rights from inside a sandbox.
func (d *deployment) attack(t *testing.T) {
	d.keygen("mallory")
	d.put("sallyport-users", "mallory.json", map[string]any{"keys": []string{d.public("mallory")}})
	d.put("sallyport-grants", "mallory.json", grantOf("tools"))
	eventually(t, "a login of mallory's", func() error {
		out, err := d.client("mallory", "true").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	server := strings.TrimSpace(string(d.kubectl("get", "service", "kubernetes", "-n", "default", "-o", "jsonpath={.spec.clusterIP}:{.spec.ports[0].port}")))
	script := `
echo "tokens: $(find / -xdev \( -name token -o -name 'ca.crt' -o -name '*kubeconfig*' \) 2>/dev/null | grep -v '^/usr/' | wc -l) $(ls /var/run/secrets /run/secrets 2>/dev/null | wc -l)"
echo "mounts: $(grep -c serviceaccount /proc/self/mounts)"
echo "agent: $(tr '\0' '\n' </proc/1/environ 2>/dev/null | grep -ci token)"
for path in /api/v1/secrets /api/v1/namespaces/` + d.gates + `/secrets/sallyport-log-key /api/v1/namespaces/` + d.sandboxes + `/pods; do
	curl -sk -m 20 -o /dev/null -w 'api: %{http_code}\n' https://` + server + `$path
done
curl -sk -m 20 -o /dev/null -w 'api: %{http_code}\n' -X POST -H 'Content-Type: application/json' -d '{}' https://` + server + `/api/v1/namespaces/` + d.sandboxes + `/pods
exit 0
`
	out, err := d.client("mallory", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{"tokens: 0 0\n", "mounts: 0\n", "agent: 0\n"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	// The tests' cluster does not enforce NetworkPolicies, so the API server answers: nothing, to nobody. Where they are
	// enforced, curl says 000.
	answers := regexp.MustCompile(`(?m)^api: (\d+)`).FindAllStringSubmatch(string(out), -1)
	if len(answers) != 4 {
		t.Errorf("%d answers:\n%s", len(answers), out)
	}
	for _, a := range answers {
		if !slices.Contains([]string{"000", "401", "403"}, a[1]) {
			t.Errorf("the API server answers a sandbox %s", a[1])
		}
	}

	// What a network plugin that enforces them goes by.
	var policies struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct {
				PodSelector struct{ MatchLabels map[string]string }
				PolicyTypes []string
				Ingress     []any
				Egress      []any
			}
		}
	}
	if err := json.Unmarshal(d.kubectl("get", "networkpolicies", "-n", d.sandboxes, "-o", "json"), &policies); err != nil {
		t.Fatal(err)
	}
	selects := map[string]map[string]string{}
	for _, p := range policies.Items {
		if len(p.Spec.PolicyTypes) != 2 || len(p.Spec.Ingress)+len(p.Spec.Egress) != 0 {
			t.Errorf("policy %s lets something through: %+v", p.Metadata.Name, p.Spec)
		}
		selects[p.Metadata.Name] = p.Spec.PodSelector.MatchLabels
	}
	if all, ok := selects["default-deny"]; !ok || len(all) != 0 || selects["sallyport-none"]["sallyport.network"] != "none" {
		t.Errorf("policies select %v", selects)
	}

	// What the accounts may do.
	for _, c := range []struct{ account, namespace, verb, resource string }{
		{d.sandboxes + ":default", d.sandboxes, "get", "secrets"},
		{d.sandboxes + ":default", d.sandboxes, "create", "pods"},
		{d.sandboxes + ":default", d.sandboxes, "list", "pods"},
		{d.gates + ":sallyport", d.sandboxes, "get", "secrets"},
		{d.gates + ":sallyport", d.sandboxes, "get", "configmaps"},
		{d.gates + ":sallyport", d.sandboxes, "patch", "pods"},
		{d.gates + ":sallyport", d.sandboxes, "update", "networkpolicies"},
		{d.gates + ":sallyport", d.sandboxes, "deletecollection", "pods"},
		{d.gates + ":sallyport", d.gates, "get", "secrets"},
		{d.gates + ":sallyport", d.gates, "create", "pods"},
		{d.gates + ":sallyport", "default", "create", "pods"},
		{d.gates + ":sallyport", "kube-system", "list", "pods"},
		{d.gates + ":sallyport", "default", "list", "nodes"},
	} {
		out, _ := kubectl("auth", "can-i", c.verb, c.resource, "-n", c.namespace, "--as=system:serviceaccount:"+c.account).Output()
		if got := strings.TrimSpace(string(out)); got != "no" {
			t.Errorf("may %s %s %s in %s: %q", c.account, c.verb, c.resource, c.namespace, got)
		}
	}
}

// data: what is written into a config map takes effect in the gates, both ways, and a file that is bad takes none out of service.
func (d *deployment) data(t *testing.T) {
	d.keygen("bob")
	d.put("sallyport-users", "bob.json", map[string]any{"keys": []string{d.public("bob")}})
	d.put("sallyport-grants", "bob.json", grantOf("debug"))
	var s *session
	eventually(t, "a login by a new grant", func() (err error) {
		s, err = begin(t, d.client("bob", "cat"))
		return err
	})
	d.put("sallyport-grants", "carol.json", "not a grant")
	d.put("sallyport-grants", "bob.json", nil)
	s.wait()
	eventually(t, "the log of the session whose grant was removed", func() error {
		out, err := d.audit("list", "--output", "json")
		if err == nil && !strings.Contains(out, `"cause":"revoked"`) && !strings.Contains(out, `"cause": "revoked"`) {
			err = errors.New("no session was ended for that: " + s.stderr.String())
		}
		return err
	})
	eventually(t, "the gates to say what is wrong with the file", func() error {
		pods, err := d.pods()
		for _, p := range pods {
			out, rerr := exec.Command("curl", "-sS", "-m", "20", "http://"+net.JoinHostPort(p.Status.PodIP, "9222")+"/readyz").CombinedOutput()
			if rerr == nil && !strings.Contains(string(out), "carol.json") {
				rerr = errors.New("no word of it")
			}
			if rerr != nil {
				err = errors.Join(err, fmt.Errorf("%w: %s", rerr, out))
			}
		}
		return err
	})
	if got := d.rolledOut(2); len(got) != 2 {
		t.Errorf("%d gates are ready", len(got))
	}
	if out, err := d.client("alice", "echo in").CombinedOutput(); err != nil {
		t.Errorf("a login beside a bad file: %v: %s", err, out)
	}
	d.put("sallyport-grants", "carol.json", nil)
}

// drain: a rolling restart cuts no session; new logins go to the new gates; an old one goes when its last session has ended.
func (d *deployment) drain(t *testing.T) {
	s, err := begin(t, d.client("alice", "cat"))
	if err != nil {
		t.Fatal(err)
	}
	old, err := d.gateOf("alice")
	if err != nil {
		t.Fatal(err)
	}
	before, err := d.pods()
	if err != nil {
		t.Fatal(err)
	}
	d.kubectl("rollout", "restart", "deployment/sallyport", "-n", d.gates)
	after := d.rolledOut(2)
	for _, p := range after {
		if slices.ContainsFunc(before, func(b pod) bool { return b.Metadata.UID == p.Metadata.UID }) {
			t.Errorf("pod %s is none of the new", p.Metadata.Name)
		}
	}
	eventually(t, "the old gate to drain", func() error {
		out, err := kubectlOutput("logs", "-n", d.gates, old)
		if err == nil && !strings.Contains(string(out), `"msg":"draining"`) {
			err = errors.New("it does not say so")
		}
		return err
	})
	if err := s.says("still here"); err != nil {
		t.Errorf("a session of a gate that drains: %v: %s", err, s.stderr.String())
	}
	d.keygen("dave")
	d.put("sallyport-users", "dave.json", map[string]any{"keys": []string{d.public("dave")}})
	d.put("sallyport-grants", "dave.json", grantOf("debug"))
	var s2 *session
	eventually(t, "a login", func() (err error) {
		s2, err = begin(t, d.client("dave", "cat"))
		return err
	})
	if gate, err := d.gateOf("dave"); err != nil || !slices.ContainsFunc(after, func(p pod) bool { return p.Metadata.Name == gate }) {
		t.Errorf("dave is at gate %s: %v", gate, err)
	}
	if err := s2.finish(false); err != nil {
		t.Errorf("cat: %v", err)
	}
	if err := s.says("to the last"); err != nil {
		t.Error(err)
	}
	if err := s.finish(false); err != nil {
		t.Errorf("cat: %v: %s", err, s.stderr.String())
	}
	eventually(t, "the old gate to go", func() error {
		pods, err := d.pods()
		if err == nil && len(pods) != 2 {
			err = fmt.Errorf("%d pods", len(pods))
		}
		return err
	})
}

// crash: a gate that dies is started again in its pod, where its spool still is, and seals what it had begun.
func (d *deployment) crash(t *testing.T) {
	s, err := begin(t, d.client("alice", "cat"))
	if err != nil {
		t.Fatal(err)
	}
	gate, err := d.gateOf("alice")
	if err != nil {
		t.Fatal(err)
	}
	states, err := d.states()
	if err != nil {
		t.Fatal(err)
	}
	var uid string
	pods, err := d.pods()
	for _, p := range pods {
		if p.Metadata.Name == gate {
			uid = p.Metadata.UID
		}
	}
	if err != nil || uid == "" {
		t.Fatalf("no pod %s, %v", gate, err)
	}
	process, err := gateProcess(uid)
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Kill(); err != nil {
		t.Fatal(err)
	}
	s.wait()
	eventually(t, "the gate to be started again", func() error {
		pods, err := d.pods()
		for _, p := range pods {
			if p.Metadata.Name == gate && p.ready() && p.Status.ContainerStatuses[0].RestartCount == 1 {
				return nil
			}
		}
		return fmt.Errorf("%w%+v", err, pods)
	})
	eventually(t, "the log to be sealed", func() error {
		now, err := d.states()
		if err == nil && (now["interrupted"] != states["interrupted"]+1 || now["live"] != 0) {
			err = fmt.Errorf("%v, before %v", now, states)
		}
		return err
	})
}

// gateProcess finds the gate of a pod among this machine's processes.
func gateProcess(uid string) (*os.Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cgroup, err1 := os.ReadFile(filepath.Join("/proc", e.Name(), "cgroup"))
		command, err2 := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err1 != nil || err2 != nil {
			continue
		}
		inPod := bytes.Contains(cgroup, []byte(uid)) || bytes.Contains(cgroup, []byte(strings.ReplaceAll(uid, "-", "_")))
		if inPod && bytes.HasPrefix(command, []byte("/usr/local/bin/sallyport\x00serve\x00")) {
			return os.FindProcess(pid)
		}
	}
	return nil, fmt.Errorf("no gate runs in pod %s on this machine", uid)
}

// TestManifests renders all that deploy/kubernetes offers.
func TestManifests(t *testing.T) {
	requireCluster(t) // for its kubectl
	f := newFleet(t)
	all := filepath.Join(f.manifests, "overlays", "all")
	if err := os.MkdirAll(all, 0o755); err != nil {
		t.Fatal(err)
	}
	text := "resources: [../s3]\ncomponents: [../../components/loadbalancer, ../../components/servicemonitor, ../../components/state-pvc]\n"
	if err := os.WriteFile(filepath.Join(all, "kustomization.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, wants := range map[string][]string{
		"trial": {"kind: Deployment\n", "replicas: 1\n", "debug.yaml: |"},
		"s3":    {"kind: Deployment\n", "replicas: 3\n", "kind: PodDisruptionBudget\n", "secretName: sallyport-s3\n", "maxUnavailable: 0\n"},
		"all": {
			"kind: StatefulSet\n", "volumeClaimTemplates:\n", "kind: ServiceMonitor\n", "type: LoadBalancer\n", "externalTrafficPolicy: Local\n",
			"secretName: sallyport-s3\n", "replicas: 3\n",
		},
	} {
		out := string(f.kubectl("kustomize", filepath.Join(f.manifests, "overlays", name)))
		for _, want := range wants {
			if !strings.Contains(out, want) {
				t.Errorf("%s: no %q", name, want)
			}
		}
		for _, never := range []string{"kind: Secret\n", "PRIVATE KEY", "kind: ClusterRole", "hostPath", "privileged"} {
			if strings.Contains(out, never) {
				t.Errorf("%s: has %q", name, never)
			}
		}
		if name == "all" && (strings.Contains(out, "kind: Deployment\n") || strings.Contains(out, "emptyDir")) {
			t.Errorf("%s: the state is in no claim", name)
		}
		// Room for the drain: preStop, drain_time, and the bounds of what comes after it.
		number := func(pattern string) int {
			m := regexp.MustCompile(pattern).FindStringSubmatch(out)
			if m == nil {
				t.Fatalf("%s: no %s", name, pattern)
			}
			return must(strconv.Atoi(m[1]))
		}
		grace, wait, drain := number(`terminationGracePeriodSeconds: (\d+)`), number(`seconds: (\d+)`), number(`drain_time: (\d+)m`)
		if grace < wait+60*drain+75 {
			t.Errorf("%s: %d s are too few for preStop %d s, drain_time %d min, the sessions' end and the log", name, grace, wait, drain)
		}
	}
	// The API server takes each of them for valid; namespaces have to be there for that.
	f.kubectl("apply", "--server-side", "-f", filepath.Join(f.manifests, "base", "namespaces.yaml"))
	for _, name := range []string{"trial", "s3"} {
		f.kubectl("apply", "--server-side", "--dry-run=server", "-k", filepath.Join(f.manifests, "overlays", name))
	}
	// All but the ServiceMonitor, whose definition is not in the tests' cluster.
	text = "resources: [../s3]\ncomponents: [../../components/loadbalancer, ../../components/state-pvc]\n"
	if err := os.WriteFile(filepath.Join(all, "kustomization.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	f.kubectl("apply", "--server-side", "--dry-run=server", "-k", all)
}
