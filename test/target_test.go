package test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// targetImage carries the agent: images/build target.
const targetImage = "sallyport/target:1"

// serving is what a target does: it answers on its loopback, and holds a file.
const serving = `mkdir -p /tmp/w && echo "hello of $0" >/tmp/w/index.html && echo secret >/tmp/secret && exec python3 -m http.server -b 127.0.0.1 -d /tmp/w 8080`

// cmdTarget: target config | run PART UID | stop PART | profile NAME UID network|processes|files | idle
//
// config has the gate join what run starts, and sets TARGET, with which the names of these begin; profile writes a profile that
// joins them; stop ends one; idle waits until nothing runs in any.
func cmdTarget(ts *testscript.TestScript, neg bool, args []string) {
	s := get(ts)
	name := s.name + "-t"
	docker := func(args ...string) {
		out, err := exec.Command("docker", args...).CombinedOutput()
		if err != nil {
			ts.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	kube := func(args ...string) string {
		out, err := kubectlOutput(append([]string{"-n", s.namespace()}, args...)...)
		ts.Check(err)
		return string(out)
	}
	switch {
	case len(args) == 1 && args[0] == "config":
		ts.Setenv("TARGET", name)
		text := fmt.Sprintf("  targets:\n    labels: [e2e=%s]\n    processes: true\n    files: true\n", name)
		if onKubernetes {
			text = fmt.Sprintf("  agent_in: [%s]\n  targets:\n    namespaces: [%s]\n    labels: {e2e: %s}\n    processes: true\n    files: true\n", targetImage, s.namespace(), name)
		}
		f, err := os.OpenFile(filepath.Join(s.dir, "gate.yaml"), os.O_APPEND|os.O_WRONLY, 0)
		ts.Check(err)
		_, err = f.WriteString(text)
		ts.Check(err)
		ts.Check(f.Close())
	case len(args) == 3 && args[0] == "run":
		name += "-" + args[1]
		if !onKubernetes {
			docker("run", "-d", "--rm", "--name", name, "--network", "none", "--user", args[2]+":"+args[2], "--cap-drop", "ALL",
				"--label", "e2e="+s.name+"-t", "--label", "part="+args[1], image(), "sh", "-c", serving, args[1])
			ts.Defer(func() { exec.Command("docker", "rm", "-f", name).Run() })
			return
		}
		pod := map[string]any{
			"apiVersion": "v1", "kind": "Pod",
			"metadata": map[string]any{"name": name, "labels": map[string]any{"e2e": s.name + "-t", "part": args[1]}},
			"spec": map[string]any{
				"terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false, "securityContext": map[string]any{"runAsUser": number(ts, args[2]), "runAsGroup": number(ts, args[2])},
				"containers": []any{map[string]any{"name": "main", "image": image(), "imagePullPolicy": "Never", "command": []any{"sh", "-c", serving, args[1]},
					"securityContext": map[string]any{"allowPrivilegeEscalation": false, "capabilities": map[string]any{"drop": []any{"ALL"}}}}},
			},
		}
		file := filepath.Join(s.dir, args[1]+".pod.json")
		ts.Check(writeJSON(file, pod))
		// A new namespace has no service account yet, and admits no pod.
		var err error
		for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			if _, err = kubectlOutput("-n", s.namespace(), "create", "-f", file); err == nil || !strings.Contains(err.Error(), "serviceaccount") {
				break
			}
		}
		ts.Check(err)
		kube("wait", "--for=condition=Ready", "--timeout=60s", "pod/"+name)
	case len(args) == 2 && args[0] == "stop":
		if name += "-" + args[1]; onKubernetes {
			kube("delete", "pod", name, "--wait=false")
			return
		}
		docker("kill", name)
	case len(args) == 4 && args[0] == "profile":
		permit := map[string]any{"network": true, "processes": args[3] != "network", "files": args[3] == "files"}
		profile := map[string]any{
			"image": image(), "pull_policy": "never", "user": args[2] + ":" + args[2], "target": map[string]any{"labels": map[string]any{"e2e": name}},
			"permit": map[string]any{"shell": true, "exec": true, "target": permit},
		}
		if onKubernetes {
			profile["image"] = targetImage
			profile["target"].(map[string]any)["namespace"] = s.namespace()
		}
		ts.Check(writeJSON(filepath.Join(s.dir, "data/profiles", args[1]+".json"), profile))
	case len(args) == 1 && args[0] == "idle":
		var left string
		for end := time.Now().Add(90 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			if onKubernetes {
				left = notEnded(ts, kube("get", "pods", "-l", "e2e="+name, "-o", "json"))
			} else {
				own, err := s.own()
				ts.Check(err)
				left = strings.Join(own, " ")
			}
			if left == "" {
				return
			}
		}
		ts.Fatalf("target: %s runs", left)
	default:
		ts.Fatalf("usage: target config | run PART UID | stop PART | profile NAME UID WHAT | idle")
	}
}

// notEnded names the sandboxes of a list of pods that run, or may begin to.
func notEnded(ts *testscript.TestScript, list string) string {
	var pods struct {
		Items []struct {
			Spec struct {
				Ephemeral []struct{ Name string } `json:"ephemeralContainers"`
			}
			Status struct {
				Ephemeral []struct {
					Name  string
					State struct{ Terminated *struct{} }
				} `json:"ephemeralContainerStatuses"`
			}
		}
	}
	ts.Check(json.Unmarshal([]byte(list), &pods))
	var left []string
	for _, pod := range pods.Items {
		ended := map[string]bool{}
		for _, c := range pod.Status.Ephemeral {
			ended[c.Name] = c.State.Terminated != nil
		}
		for _, c := range pod.Spec.Ephemeral {
			if !ended[c.Name] {
				left = append(left, c.Name)
			}
		}
	}
	return strings.Join(left, " ")
}

func number(ts *testscript.TestScript, text string) int {
	var n int
	_, err := fmt.Sscan(text, &n)
	ts.Check(err)
	return n
}
