package test

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog/s3/s3test"
)

// busyboxImage is on the nodes of the tests' cluster.
const busyboxImage = "sallyport/busybox:1"

// patience bounds each wait for a condition; a slow machine under load takes long.
const patience = 3 * time.Minute

// requireCluster ends the test where no cluster is to be tested: as a failure if SALLYPORT_REQUIRE_KUBERNETES is set.
func requireCluster(t *testing.T) {
	t.Helper()
	if os.Getenv("SALLYPORT_TEST_KUBECONFIG") != "" {
		return
	}
	if os.Getenv("SALLYPORT_REQUIRE_KUBERNETES") != "" {
		t.Fatal("SALLYPORT_TEST_KUBECONFIG names no cluster, and SALLYPORT_REQUIRE_KUBERNETES is set")
	}
	t.Skip("NOT TESTED: SALLYPORT_TEST_KUBECONFIG names no cluster")
}

func requireS3(t *testing.T) {
	t.Helper()
	if ok, err := hasS3(); err != nil {
		t.Fatal(err)
	} else if !ok {
		t.Skip("NOT TESTED: no S3 server to start: make test builds one")
	}
}

// eventually waits until f is nil.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// fleet is a cluster's part for several gates: the manifests of deploy/kubernetes, with namespaces of the test's own, what all
// gates share, and gates that run outside with the service account's token.
type fleet struct {
	t          *testing.T
	dir        string
	manifests  string // the copy of deploy/kubernetes
	gates      string // the gates' namespace
	sandboxes  string // the sandboxes'
	kubeconfig string // with the gates' token
	store      string // of the log, as the auditor's tool takes it
	s3         *s3test.Server

	startTimeout time.Duration // of the gates that run outside

	mu    sync.Mutex // guards known
	known map[string]bool
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	requireCluster(t)
	name := "sallyport-gates-" + strings.ToLower(rand.Text()[:8])
	f := &fleet{t: t, dir: t.TempDir(), gates: name, sandboxes: name + "-pods", startTimeout: patience, known: map[string]bool{}}
	f.manifests = filepath.Join(f.dir, "deploy")
	if err := f.copyManifests(filepath.Join("..", "deploy", "kubernetes")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := kubectlOutput("delete", "namespace", f.gates, f.sandboxes, "--wait=false", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	for _, sub := range []string{"data/users", "data/profiles", "data/grants", "log"} {
		if err := os.MkdirAll(filepath.Join(f.dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	f.keygen("host")
	f.store = filepath.Join(f.dir, "log")
	f.profile("debug", map[string]any{
		"image": busyboxImage, "pull_policy": "never", "memory": "64Mi", "cpus": 0.5, "permit": map[string]any{"shell": true, "exec": true},
	})
	return f
}

// copyManifests copies the manifests with the namespaces' names replaced by the test's own.
func (f *fleet) copyManifests(from string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		to := filepath.Join(f.manifests, rel)
		if d.IsDir() {
			return os.MkdirAll(to, 0o755)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text := strings.NewReplacer(
			"sallyport-sandboxes", f.sandboxes, "namespace: sallyport\n", "namespace: "+f.gates+"\n", "namespace: sallyport}", "namespace: "+f.gates+"}",
			"kind: Namespace\nmetadata:\n  name: sallyport\n", "kind: Namespace\nmetadata:\n  name: "+f.gates+"\n",
		).Replace(string(b))
		info, err := d.Info()
		if err != nil {
			return err
		}
		return os.WriteFile(to, []byte(text), info.Mode().Perm())
	})
}

// useS3 has the gates' logs in a bucket.
func (f *fleet) useS3() {
	f.t.Helper()
	requireS3(f.t)
	server, err := s3test.Start(filepath.Join(f.dir, "s3"))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { server.Stop() })
	f.s3, f.store = server, "s3://"+s3test.Bucket+"/"+s3test.Prefix
	if err := errors.Join(s3test.Putter.WriteCredentials(filepath.Join(f.dir, "putter")), s3test.Reader.WriteCredentials(filepath.Join(f.dir, "reader"))); err != nil {
		f.t.Fatal(err)
	}
}

// prepare makes the namespaces, the gates' rights and the sandboxes' policies, and a kubeconfig for the gates.
func (f *fleet) prepare() {
	f.t.Helper()
	base := filepath.Join(f.manifests, "base")
	f.kubectl("apply", "--server-side", "-f", filepath.Join(base, "namespaces.yaml"))
	f.kubectl("apply", "--server-side", "-f", filepath.Join(base, "rbac.yaml"), "-f", filepath.Join(base, "sandboxes.yaml"))
	var config struct {
		Clusters []struct {
			Cluster map[string]any `json:"cluster"`
		} `json:"clusters"`
	}
	if err := json.Unmarshal(f.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"), &config); err != nil || len(config.Clusters) != 1 {
		f.t.Fatalf("kubeconfig: %v, %d clusters", err, len(config.Clusters))
	}
	token := strings.TrimSpace(string(f.kubectl("create", "token", "sallyport", "-n", f.gates, "--duration=2h")))
	f.kubeconfig = filepath.Join(f.dir, "kubeconfig")
	err := writeJSON(f.kubeconfig, map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "gate",
		"clusters": []any{map[string]any{"name": "c", "cluster": config.Clusters[0].Cluster}},
		"users":    []any{map[string]any{"name": "gate", "user": map[string]any{"token": token}}},
		"contexts": []any{map[string]any{"name": "gate", "context": map[string]any{"cluster": "c", "user": "gate"}}},
	})
	if err := errors.Join(err, os.Chmod(f.kubeconfig, 0o600)); err != nil {
		f.t.Fatal(err)
	}
}

// kubectl runs it as an administrator.
func (f *fleet) kubectl(args ...string) []byte {
	f.t.Helper()
	out, err := kubectlOutput(args...)
	if err != nil {
		f.t.Fatal(err)
	}
	return out
}

func (f *fleet) keygen(name string) {
	f.t.Helper()
	cmd := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", filepath.Join(f.dir, name+".key"))
	if out, err := cmd.CombinedOutput(); err != nil {
		f.t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
}

func (f *fleet) public(name string) string {
	f.t.Helper()
	b, err := os.ReadFile(filepath.Join(f.dir, name+".key.pub"))
	if err != nil {
		f.t.Error(err) // not Fatal: sessions begin in goroutines
	}
	return strings.TrimSpace(string(b))
}

func (f *fleet) profile(name string, profile map[string]any) {
	f.t.Helper()
	if err := writeJSON(filepath.Join(f.dir, "data/profiles", name+".json"), profile); err != nil {
		f.t.Fatal(err)
	}
}

// user makes a user with a key and a grant of that profile.
func (f *fleet) user(name, profile string) {
	f.t.Helper()
	f.keygen(name)
	if err := errors.Join(
		writeJSON(filepath.Join(f.dir, "data/users", name+".json"), map[string]any{"keys": []string{f.public(name)}}),
		writeJSON(filepath.Join(f.dir, "data/grants", name+".json"), grantOf(profile)),
	); err != nil {
		f.t.Fatal(err)
	}
}

func grantOf(profile string) map[string]any {
	now := time.Now().UTC()
	return map[string]any{"OPS-1": map[string]any{
		"profile": profile, "not_before": now.Add(-time.Minute).Format(time.RFC3339), "not_after": now.Add(2 * time.Hour).Format(time.RFC3339),
		"reason": "end-to-end test", "approved_by": "the test",
	}}
}

// ssh is a client's command to an address.
func (f *fleet) ssh(user, host string, port int, command ...string) *exec.Cmd {
	known := filepath.Join(f.dir, "known-"+strconv.Itoa(port)+"-"+host)
	at := host
	if port != 22 {
		at = "[" + host + "]:" + strconv.Itoa(port)
	}
	f.mu.Lock()
	if !f.known[known] {
		f.known[known] = true
		if err := os.WriteFile(known, []byte(at+" "+f.public("host")+"\n"), 0o600); err != nil {
			f.t.Error(err)
		}
	}
	f.mu.Unlock()
	args := []string{
		"-F", "none", "-i", filepath.Join(f.dir, user+".key"), "-o", "IdentitiesOnly=yes", "-o", "UserKnownHostsFile=" + known,
		"-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "GlobalKnownHostsFile=none", "-p", strconv.Itoa(port), user + "@" + host,
	}
	return exec.Command("ssh", append(args, command...)...)
}

// audit runs the auditor's tool on the gates' common store.
func (f *fleet) audit(args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(binaries, "sallyport-audit"), append([]string{"--store", f.store}, args...)...)
	if f.s3 != nil {
		cmd.Env = append(os.Environ(), "AWS_ENDPOINT_URL="+f.s3.Endpoint(), "AWS_SHARED_CREDENTIALS_FILE="+filepath.Join(f.dir, "reader"))
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("sallyport-audit %s: %w: %s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out), err
}

// states counts the sessions in the store by their state.
func (f *fleet) states() (map[string]int, error) {
	out, err := f.audit("list", "--output", "json")
	if err != nil {
		return nil, err
	}
	states := map[string]int{}
	for dec := json.NewDecoder(strings.NewReader(out)); dec.More(); {
		var one listed
		if err := dec.Decode(&one); err != nil {
			return nil, err
		}
		states[one.State]++
	}
	return states, nil
}

// gate is one of a fleet, as a process.
type gate struct {
	f    *fleet
	name string
	port int
	cmd  *exec.Cmd
	gone chan struct{}
}

// gateConfig is a gate's configuration but for its name; more is added to its part of Kubernetes.
func (f *fleet) gateConfig(name string, port int, more string) string {
	store := "directory: log"
	if f.s3 != nil {
		store = fmt.Sprintf("s3: {bucket: %s, prefix: %s, endpoint: %q, credentials_file: putter}", s3test.Bucket, s3test.Prefix, f.s3.Endpoint())
	}
	return fmt.Sprintf(`gate: %s
state: state-%[1]s
ssh: {listen: "127.0.0.1:%[2]d", host_keys: [host.key], drain_time: 2s, start_timeout: %[6]s, max_sessions_per_user: 200, max_startups: 200, max_startups_per_source: 200}
policy: {data: data}
audit: {store: {%[3]s}}
monitor: {listen: ""}
backend: kubernetes
kubernetes:
  kubeconfig: kubeconfig
  namespace: %[4]s
  network_policies: refer
  cpu_share: 0.01
%[5]s`, name, port, store, f.sandboxes, more, f.startTimeout)
}

// newGate starts a gate, which is stopped at the test's end.
func (f *fleet) newGate(t *testing.T, name, more string) *gate {
	t.Helper()
	g := &gate{f: f, name: name, port: freePort(t)}
	g.configure(t, more)
	t.Cleanup(func() { g.end(t, syscall.SIGTERM) })
	g.start(t)
	return g
}

func (g *gate) configure(t *testing.T, more string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(g.f.dir, g.name+".yaml"), []byte(g.f.gateConfig(g.name, g.port, more)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// kill ends a gate whatever it has left to do.
func (g *gate) kill() {
	if g.cmd != nil {
		g.cmd.Process.Kill()
		<-g.gone
		g.cmd = nil
	}
}

func (g *gate) start(t *testing.T) {
	t.Helper()
	if err := g.open(); err != nil {
		t.Fatal(err)
	}
}

// open starts the process, and gives what it said if it ended.
func (g *gate) open() error {
	log, err := os.OpenFile(filepath.Join(g.f.dir, g.name+".err"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(binaries, "sallyport"), "serve", "--config", filepath.Join(g.f.dir, g.name+".yaml"))
	cmd.Stderr = log
	cmd.Env = append(os.Environ(), "GORACE=halt_on_error=1")
	if err := cmd.Start(); err != nil {
		return err
	}
	g.cmd, g.gone = cmd, make(chan struct{})
	go func(gone chan struct{}) { cmd.Wait(); close(gone) }(g.gone)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if nc, err := net.Dial("tcp", "127.0.0.1:"+strconv.Itoa(g.port)); err == nil {
			nc.Close()
			return nil
		}
		select {
		case <-g.gone:
			g.cmd = nil
			return fmt.Errorf("gate %s ended:\n%s", g.name, g.log())
		default:
		}
	}
	return fmt.Errorf("gate %s did not open", g.name)
}

func (g *gate) log() string {
	b, _ := os.ReadFile(filepath.Join(g.f.dir, g.name+".err"))
	return string(b)
}

func (g *gate) end(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if g.cmd == nil {
		return
	}
	cmd := g.cmd
	g.cmd = nil
	cmd.Process.Signal(sig)
	select {
	case <-g.gone:
	case <-time.After(patience):
		cmd.Process.Kill()
		<-g.gone
		t.Errorf("gate %s did not stop", g.name)
	}
	if sig == syscall.SIGTERM && !cmd.ProcessState.Success() {
		t.Errorf("gate %s ended with %v:\n%s", g.name, cmd.ProcessState, g.log())
	}
}

func (g *gate) ssh(user string, command ...string) *exec.Cmd {
	return g.f.ssh(user, "127.0.0.1", g.port, command...)
}

// tool runs the operator's tool on this gate.
func (g *gate) tool(args ...string) (string, error) {
	out, err := exec.Command(filepath.Join(binaries, "sallyport"), append(args, "--config", filepath.Join(g.f.dir, g.name+".yaml"))...).CombinedOutput()
	return string(out), err
}

// label selects the gate's pods.
func (g *gate) label(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(g.f.dir, "state-"+g.name, "instance"))
	if err != nil {
		t.Fatal(err)
	}
	return "sallyport.server=" + g.name + "-" + strings.TrimSpace(string(b))
}

// session is a client that says back what it is told: `cat` in the sandbox.
type session struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	stderr lockedBuffer
	once   sync.Once
	err    error
}

// lockedBuffer may be read while a command writes it.
type lockedBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// begin starts a session with a command of f.ssh that executes cat, and waits until it answers. It is an error if it was refused.
func begin(t *testing.T, cmd *exec.Cmd) (*session, error) {
	s := &session{cmd: cmd}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	s.in, s.out, cmd.Stderr = in, bufio.NewReader(out), &s.stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	t.Cleanup(func() { s.finish(true) })
	if err := s.says("hello"); err != nil {
		s.finish(true)
		return nil, fmt.Errorf("%w: %s", err, s.stderr.String())
	}
	return s, nil
}

// says sends a line, and is an error if it does not come back.
func (s *session) says(line string) error {
	if _, err := io.WriteString(s.in, line+"\n"); err != nil {
		return err
	}
	type answer struct {
		line string
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		line, err := s.out.ReadString('\n')
		got <- answer{line, err}
	}()
	select {
	case a := <-got:
		if a.err != nil || a.line != line+"\n" {
			return fmt.Errorf("%q came back as %q, %w", line, a.line, errors.Join(errWrong, a.err))
		}
		return nil
	case <-time.After(patience):
		return errors.New("no answer")
	}
}

var errWrong = errors.New("the session does not answer")

// wait is for a session that the gate or the cluster ends.
func (s *session) wait() {
	s.once.Do(func() {
		stop := time.AfterFunc(patience, func() { s.cmd.Process.Kill() })
		defer stop.Stop()
		s.err = s.cmd.Wait()
	})
}

// finish ends the session: by its user, or its client is killed. It returns how the client ended.
func (s *session) finish(kill bool) error {
	s.once.Do(func() {
		s.in.Close()
		if kill {
			s.cmd.Process.Kill()
		}
		s.err = s.cmd.Wait()
	})
	return s.err
}
