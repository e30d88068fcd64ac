package test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// onKubernetes has the scripts run on the cluster of SALLYPORT_TEST_KUBECONFIG: BACKEND=kubernetes. That has to be one of this
// machine, as sandboxes mount a script's directory.
var onKubernetes = os.Getenv("BACKEND") == "kubernetes"

// namespace is where a gate of the scripts has its pods.
func (s *state) namespace() string { return "sallyport-" + s.name }

// kubectl is a command on the tests' cluster: this machine's, or the one that the cluster's own binary holds.
func kubectl(args ...string) *exec.Cmd {
	name := kubectlName()
	cmd := exec.Command(name[0], append(name[1:], args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+os.Getenv("SALLYPORT_TEST_KUBECONFIG"))
	return cmd
}

func kubectlName() []string {
	if own := os.Getenv("SALLYPORT_TEST_CLUSTER"); own != "" {
		return []string{own, "kubectl"}
	}
	return []string{"kubectl"}
}

func kubectlOutput(args ...string) ([]byte, error) {
	cmd := kubectl(args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return out, nil
}

// makeNamespace gives the gate a namespace, and remembers what has happened in it until now: nothing.
func (s *state) makeNamespace() error {
	if _, err := kubectlOutput("create", "namespace", s.namespace()); err != nil {
		return err
	}
	out, err := kubectlOutput("get", "--raw", "/api/v1/namespaces/"+s.namespace()+"/pods")
	if err != nil {
		return err
	}
	var list struct {
		Metadata struct {
			ResourceVersion string `json:"resourceVersion"`
		} `json:"metadata"`
	}
	err = json.Unmarshal(out, &list)
	s.version = list.Metadata.ResourceVersion
	return err
}

func (s *state) removeNamespace() error {
	if s.version == "" {
		return nil
	}
	_, err := kubectlOutput("delete", "namespace", s.namespace(), "--wait=false")
	return err
}

// ownPods are the pods of this script's gate. One that has finished is an object still, until a gate removes it: after a
// kill they don't count.
func (s *state) ownPods() ([]string, error) {
	args := []string{"get", "pods", "-n", s.namespace(), "-o", "name"}
	if server := s.server(); !strings.HasSuffix(server, "-") { // else no gate was started: there is no pod at all
		args = append(args, "-l", "sallyport.server="+server)
	}
	if s.killed {
		args = append(args, "--field-selector=status.phase!=Succeeded,status.phase!=Failed")
	}
	out, err := kubectlOutput(args...)
	return strings.Fields(strings.ReplaceAll(string(out), "pod/", s.namespace()+"/")), err
}

// madePods counts the pods that were ever created in the namespace.
func (s *state) madePods() (int, error) {
	out, err := kubectlOutput("get", "--raw", "/api/v1/namespaces/"+s.namespace()+"/pods?watch=1&timeoutSeconds=2&resourceVersion="+s.version)
	if err != nil {
		return 0, err
	}
	n := 0
	for line := range bytes.Lines(out) {
		var event struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(line, &event); err != nil {
			return 0, err
		}
		if event.Type == "ERROR" {
			return 0, fmt.Errorf("watch: %s", line)
		}
		if event.Type == "ADDED" {
			n++
		}
	}
	return n, nil
}

// backendConfig is the gate's part about its backend.
func (s *state) backendConfig(transport string) string {
	if !onKubernetes {
		return "docker:\n  bind_prefixes: [production]\n  transport: " + transport + "\n"
	}
	return fmt.Sprintf(`backend: kubernetes
kubernetes:
  kubeconfig: %s
  namespace: %s
  host_paths: [%s]
  cpu_share: 0.02
  agent_image: %s
`, os.Getenv("SALLYPORT_TEST_KUBECONFIG"), s.namespace(), os.TempDir(), cmp.Or(os.Getenv("SALLYPORT_TEST_AGENT_IMAGE"), "sallyport/agent:1"))
}

// writeHelpers writes what scripts do to sandboxes from outside, for either backend: `inside SANDBOX COMMAND...`,
// `kill-sandbox SANDBOX` and `evict-sandbox SANDBOX`, the last on Kubernetes alone, and in a script's directory, `own-sandbox`.
func writeHelpers(dir string) error {
	scripts := map[string]string{
		"inside":       `exec docker exec "$@"`,
		"kill-sandbox": `exec docker kill "$1"`,
		"own-sandbox":  `exec docker ps -q --filter "label=sallyport.server=$(sed -n 's/^gate: //p' gate.yaml)-$(cat state/instance)"`,
	}
	if onKubernetes {
		kubectl := `kubectl() { KUBECONFIG='` + os.Getenv("SALLYPORT_TEST_KUBECONFIG") + `' command ` + strings.Join(kubectlName(), " ") + ` "$@"; }` + "\n"
		scripts = map[string]string{
			"inside":       kubectl + `s=$1; shift; kubectl exec -n "${s%/*}" "${s#*/}" -c sandbox -- "$@"`,
			"kill-sandbox": kubectl + `kubectl delete pod -n "${1%/*}" "${1#*/}" --grace-period=0 --force`,
			"evict-sandbox": kubectl + `printf '{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"namespace":"%s","name":"%s"}}' "${1%/*}" "${1#*/}" |` + "\n" +
				`kubectl create --raw "/api/v1/namespaces/${1%/*}/pods/${1#*/}/eviction" -f -`,
			"own-sandbox": kubectl + `ns=$(sed -n 's/^  namespace: //p' gate.yaml)` + "\n" +
				`kubectl get pods -n "$ns" -o name | sed "s,^pod/,$ns/,"`,
		}
	}
	for name, text := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			return err
		}
	}
	return nil
}

var errNoCluster = errors.New("BACKEND is kubernetes, and SALLYPORT_TEST_KUBECONFIG names no cluster that answers")

func clusterAnswers() error {
	if os.Getenv("SALLYPORT_TEST_KUBECONFIG") == "" {
		return errNoCluster
	}
	if _, err := kubectlOutput("get", "--raw", "/readyz"); err != nil {
		return fmt.Errorf("%w: %w", errNoCluster, err)
	}
	return nil
}
