// Package test holds what tests the whole: readable scripts with real OpenSSH against a real gate on a real engine
// (scripts/), and the rules that keep the packages apart (imports_test.go).
package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sallyport/sallyport/auditlog/s3/s3test"
	"github.com/sallyport/sallyport/test/ports"
)

// binaries is the directory of what is tested: the gate and the auditor's tool with the race detector, the agent as it
// is shipped.
var binaries string

func TestMain(m *testing.M) { os.Exit(run(m)) }

// build compiles our commands into dir.
func build(dir string, race bool) error {
	for _, name := range []string{"sallyport", "sallyport-audit", "sallyport-agent"} {
		args, env := []string{"build", "-o", filepath.Join(dir, name)}, "CGO_ENABLED=0"
		if race && name != "sallyport-agent" {
			args, env = append(args, "-race"), "CGO_ENABLED=1"
		}
		cmd := exec.Command("go", append(args, "github.com/sallyport/sallyport/cmd/"+name)...)
		cmd.Env = append(os.Environ(), env)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", name, err, out)
		}
	}
	return nil
}

func run(m *testing.M) int {
	if onKubernetes {
		if err := clusterAnswers(); err != nil {
			fmt.Fprintln(os.Stderr, "test:", err)
			return 1
		}
	} else if err := exec.Command("docker", "version").Run(); err != nil {
		if os.Getenv("SALLYPORT_REQUIRE_DOCKER") != "" {
			fmt.Fprintln(os.Stderr, "test: no Docker engine answers, and SALLYPORT_REQUIRE_DOCKER is set")
			return 1
		}
		fmt.Fprintln(os.Stderr, "test: no Docker engine answers: the end-to-end scripts are skipped (make test installs one)")
		noEngine = true
	}
	dir, err := os.MkdirTemp("", "sallyport-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binaries = dir
	if !noEngine || os.Getenv("SALLYPORT_TEST_KUBECONFIG") != "" {
		if err := errors.Join(build(dir, true), writeHelpers(dir)); err != nil {
			fmt.Fprintln(os.Stderr, "test:", err)
			return 1
		}
	}
	code := m.Run()
	if !noEngine {
		if err := removeAgentVolume(); err != nil {
			fmt.Fprintln(os.Stderr, "test:", err)
			code = 1
		}
	}
	return code
}

var noEngine bool

// image is the sandbox's image.
func image() string {
	if i := os.Getenv("SALLYPORT_TEST_IMAGE"); i != "" {
		return i
	}
	return "sallyport/debug:1"
}

func TestScripts(t *testing.T) {
	if noEngine {
		t.Skip("no Docker engine answers")
	}
	files, err := filepath.Glob("scripts/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts ", err)
	}
	if onKubernetes {
		files = slices.DeleteFunc(files, func(name string) bool {
			return slices.Contains(alike, strings.TrimSuffix(filepath.Base(name), ".txtar"))
		})
	}
	testscript.Run(t, params("auto", testscript.Params{Files: files}))
}

// alike are the scripts that prove the same on each backend, and run on Docker alone: about the log, where it lies and
// who reads it, and about the gate's own keys.
var alike = []string{"audit", "encrypted", "keys", "s3", "signing", "spool"}

// relayed are the scripts that run over the relay, too: as on an engine that does not see the gate's files. On Kubernetes all do.
var relayed = []string{"login", "crash", "forwarding"}

func TestRelayedScripts(t *testing.T) {
	if onKubernetes {
		t.Skip("there is no other way than the relay on Kubernetes")
	}
	if noEngine {
		t.Skip("no Docker engine answers")
	}
	var p testscript.Params
	for _, name := range relayed {
		p.Files = append(p.Files, filepath.Join("scripts", name+".txtar"))
	}
	testscript.Run(t, params("relay", p))
}

// params adds our commands and a gate that reaches its sandboxes in that way.
func params(transport string, p testscript.Params) testscript.Params {
	p.Setup = func(env *testscript.Env) error { return setUp(env, transport) }
	p.Condition, p.RequireExplicitExec = condition, true
	p.Cmds = map[string]func(*testscript.TestScript, bool, []string){
		"gate":       cmdGate,
		"data":       cmdData,
		"ssh-config": cmdSSHConfig,
		"sealed":     cmdSealed,
		"logcount":   cmdLogCount,
		"sandboxes":  cmdSandboxes,
		"made":       cmdMade,
		"until":      cmdUntil,
		"background": cmdBackground,
		"signal":     cmdSignal,
		"s3":         cmdS3,
		"ran":        cmdRan,
		"flipped":    cmdFlipped,
		"bigargv":    cmdBigargv,
		"postgres":   cmdPostgres,
		"answer":     cmdAnswer,
		"ask":        cmdAsk,
		"ports":      cmdPorts,
		"target":     cmdTarget,
	}
	return p
}

type state struct {
	port  int
	name  string // the gate's, unique in this run
	dir   string
	gate  *exec.Cmd
	gone  chan struct{}
	bin   string // directory of the binaries
	jobs  map[string]*exec.Cmd
	since time.Time      // when it was made
	s3    *s3test.Server // of scripts that start one

	killed  bool   // the gate did not end in order, and no other has started since
	version string // of the namespace's pods when it was made, on Kubernetes
}

type stateKey struct{}

func setUp(env *testscript.Env, transport string) error {
	s, err := newState(env.WorkDir, transport)
	if err != nil {
		return err
	}
	env.Values[stateKey{}] = s
	env.Setenv("PATH", binaries+string(os.PathListSeparator)+os.Getenv("PATH"))
	env.Setenv("PORT", strconv.Itoa(s.port))
	env.Setenv("STORE", filepath.Join(env.WorkDir, "log"))
	env.Setenv("SALLYPORT_LOG", filepath.Join(env.WorkDir, "log"))
	env.Setenv("DATA", filepath.Join(env.WorkDir, "data"))
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("IMAGE", image())
	env.Setenv("BACKEND", "docker")
	if onKubernetes {
		env.Setenv("BACKEND", "kubernetes")
	}
	env.Setenv("TERM", "xterm")
	env.Defer(func() {
		for _, j := range s.jobs {
			j.Process.Kill()
			j.Wait()
		}
		if err := s.end(); err != nil {
			env.T().Log(err)
			env.T().FailNow()
		}
	})
	return nil
}

// newState makes a directory with keys, data and configuration of a gate of its own.
func newState(dir, transport string) (*state, error) {
	port, err := ports.Take()
	if err != nil {
		return nil, err
	}
	s := &state{port: port, dir: dir, name: fmt.Sprintf("e2e-%d-%d", os.Getpid(), port), bin: binaries, jobs: map[string]*exec.Cmd{}, since: time.Now()}
	for _, sub := range []string{"data/users", "data/profiles", "data/grants", "log", "production"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "production", "app.log"), []byte("order 4711 refused\n"), 0o644); err != nil {
		return nil, err
	}
	for _, key := range []string{"alice", "mallory", "host"} {
		cmd := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", filepath.Join(dir, key+".key"))
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ssh-keygen: %w: %s", err, out)
		}
	}
	if onKubernetes {
		if err := s.makeNamespace(); err != nil {
			return nil, err
		}
	}
	pub := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name+".key.pub"))
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	profile := map[string]any{
		"image": image(), "memory": "4Gi", "pids": 512,
		"mounts": []any{map[string]any{"source": filepath.Join(dir, "production"), "target": "/production"}},
		"permit": map[string]any{"shell": true, "exec": true, "sftp": true, "env": []string{"LANG", "LC_*", "GIT_PROTOCOL"}},
	}
	if onKubernetes {
		delete(profile, "pids") // a pod has no limit of its own
	}
	write := func(name, text string) error {
		return os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600)
	}
	return s, errors.Join(
		write("known_hosts", fmt.Sprintf("[127.0.0.1]:%d %s\n", port, pub("host"))),
		write("gate.yaml", fmt.Sprintf(`gate: %s
state: state
ssh:
  listen: 127.0.0.1:%d
  host_keys: [host.key]
  drain_time: 2s
policy:
  data: data
audit:
  store:
    directory: log
monitor:
  listen: ""
%s`, s.name, port, s.backendConfig(transport))),
		writeJSON(filepath.Join(dir, "data/users/alice.json"), map[string]any{"keys": []string{pub("alice")}}),
		writeJSON(filepath.Join(dir, "data/users/mallory.json"), map[string]any{"keys": []string{pub("mallory")}}),
		writeJSON(filepath.Join(dir, "data/profiles/debug.json"), profile),
		s.grant("alice", "OPS-1", "debug", -time.Minute, time.Hour),
		s.sshConfig("alice"),
	)
}

// end stops the gate and says what it has left.
func (s *state) end() error {
	err := s.stop(syscall.SIGTERM)
	left, lerr := s.left()
	if len(left) > 0 {
		lerr = errors.Join(lerr, fmt.Errorf("sandboxes left behind: %v", left))
	}
	if onKubernetes {
		lerr = errors.Join(lerr, s.removeNamespace())
	}
	return errors.Join(err, lerr)
}

func writeJSON(name string, v any) error {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(name+".tmp", b, 0o644); err != nil {
		return err
	}
	return os.Rename(name+".tmp", name)
}

func (s *state) grant(user, ticket, profile string, from, to time.Duration) error {
	now := time.Now().UTC()
	return writeJSON(filepath.Join(s.dir, "data/grants", user+".json"), map[string]any{ticket: map[string]any{
		"profile": profile, "not_before": now.Add(from).Format(time.RFC3339Nano), "not_after": now.Add(to).Format(time.RFC3339Nano),
		"reason": "end-to-end test", "approved_by": "the script",
	}})
}

// sshConfig makes `ssh -F ssh_config gate` mean this user with this key.
func (s *state) sshConfig(user string, keys ...string) error {
	if len(keys) == 0 {
		key, _, _ := strings.Cut(user, "+")
		keys = []string{key}
	}
	var identities strings.Builder
	for _, key := range keys {
		fmt.Fprintf(&identities, "  IdentityFile %s\n", filepath.Join(s.dir, key+".key"))
	}
	return os.WriteFile(filepath.Join(s.dir, "ssh_config"), fmt.Appendf(nil, `Host gate
  HostName 127.0.0.1
  Port %d
  User %s
%s  IdentitiesOnly yes
  UserKnownHostsFile %s
  StrictHostKeyChecking yes
  BatchMode yes
  LogLevel INFO
`, s.port, user, identities.String(), filepath.Join(s.dir, "known_hosts")), 0o600)
}

func (s *state) start(config string) error {
	if s.gate != nil {
		return errors.New("the gate runs already")
	}
	f, err := os.OpenFile(filepath.Join(s.dir, "gate.err"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := exec.Command(filepath.Join(s.bin, "sallyport"), "serve", "--config", filepath.Join(s.dir, config))
	cmd.Stderr = f
	cmd.Env = append(os.Environ(), "GORACE=halt_on_error=1")
	if err := cmd.Start(); err != nil {
		return err
	}
	s.gate, s.gone, s.killed = cmd, make(chan struct{}), false
	go func(gone chan struct{}) { cmd.Wait(); close(gone) }(s.gone)
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if nc, err := net.Dial("tcp", "127.0.0.1:"+strconv.Itoa(s.port)); err == nil {
			nc.Close()
			return nil
		}
		select {
		case <-s.gone:
			s.gate = nil
			b, _ := os.ReadFile(filepath.Join(s.dir, "gate.err"))
			return fmt.Errorf("the gate ended:\n%s", b)
		default:
		}
	}
	return errors.New("the gate did not open")
}

func (s *state) stop(sig syscall.Signal) error {
	if s.gate == nil {
		return nil
	}
	s.gate.Process.Signal(sig)
	s.killed = sig == syscall.SIGKILL
	select {
	case <-s.gone:
	case <-time.After(90 * time.Second):
		s.gate.Process.Kill()
		<-s.gone
		return errors.New("the gate did not stop within 90 s")
	}
	st := s.gate.ProcessState
	s.gate = nil
	if sig == syscall.SIGTERM && !st.Success() {
		b, _ := os.ReadFile(filepath.Join(s.dir, "gate.err"))
		return fmt.Errorf("the gate ended with %v:\n%s", st, b)
	}
	return nil
}

// server is what the gate's containers are labelled with.
func (s *state) server() string {
	b, _ := os.ReadFile(filepath.Join(s.dir, "state", "instance"))
	return s.name + "-" + strings.TrimSpace(string(b))
}

// own are the sandboxes of this script's gate.
func (s *state) own() ([]string, error) {
	if onKubernetes {
		return s.ownPods()
	}
	out, err := exec.Command("docker", "ps", "-aq", "--no-trunc", "--filter", "label=sallyport.server="+s.server()).Output()
	if err != nil {
		return nil, fmt.Errorf("docker ps: %w", err)
	}
	return strings.Fields(string(out)), nil
}

// left are containers of this script's gate that are still there a while after the end.
func (s *state) left() (left []string, err error) {
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if left, err = s.own(); err != nil || len(left) == 0 || time.Now().After(end) {
			return left, err
		}
	}
}

func get(ts *testscript.TestScript) *state { return ts.Value(stateKey{}).(*state) }

// cmdGate: gate start [CONFIG] | stop | kill | log PATTERN...
func cmdGate(ts *testscript.TestScript, neg bool, args []string) {
	s := get(ts)
	if len(args) == 0 {
		ts.Fatalf("usage: gate start [CONFIG] | stop | kill")
	}
	var err error
	switch args[0] {
	case "start":
		config := "gate.yaml"
		if len(args) > 1 {
			config = args[1]
		}
		if err = s.start(config); err == nil {
			ts.Setenv("GATE_PID", strconv.Itoa(s.gate.Process.Pid))
		}
	case "stop":
		err = s.stop(syscall.SIGTERM)
	case "kill":
		err = s.stop(syscall.SIGKILL)
	default:
		ts.Fatalf("gate %s: unknown", args[0])
	}
	if (err != nil) != neg {
		ts.Fatalf("gate %s: %v", args[0], err)
	}
}

// cmdData: data grant USER TICKET PROFILE FROM TO | revoke USER
func cmdData(ts *testscript.TestScript, neg bool, args []string) {
	s := get(ts)
	switch {
	case len(args) == 6 && args[0] == "grant":
		from, err1 := time.ParseDuration(args[4])
		to, err2 := time.ParseDuration(args[5])
		ts.Check(errors.Join(err1, err2))
		ts.Check(s.grant(args[1], args[2], args[3], from, to))
	case len(args) == 2 && args[0] == "revoke":
		ts.Check(os.Remove(filepath.Join(s.dir, "data/grants", args[1]+".json")))
	default:
		ts.Fatalf("usage: data grant USER TICKET PROFILE FROM TO | data revoke USER")
	}
}

// cmdSSHConfig: ssh-config LOGIN [KEY,KEY...]: `ssh -F ssh_config gate` is LOGIN from here on.
func cmdSSHConfig(ts *testscript.TestScript, neg bool, args []string) {
	switch len(args) {
	case 1:
		ts.Check(get(ts).sshConfig(args[0]))
	case 2:
		ts.Check(get(ts).sshConfig(args[0], strings.Split(args[1], ",")...))
	default:
		ts.Fatalf("usage: ssh-config LOGIN [KEY,KEY...]")
	}
}

// audit runs the auditor's tool.
func (s *state) audit(args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "sallyport-audit"), append([]string{"--store", filepath.Join(s.dir, "log")}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("sallyport-audit %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return out, nil
}

// listed is what `sallyport-audit list --output json` says of a session.
type listed struct {
	ID    string `json:"id"`
	User  string `json:"user"`
	State string `json:"state"`
}

func (s *state) list() ([]listed, error) {
	out, err := s.audit("list", "--output", "json")
	if err != nil {
		return nil, err
	}
	var all []listed
	dec := json.NewDecoder(bytes.NewReader(out))
	for dec.More() {
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return nil, err
		}
		if len(raw) > 0 && raw[0] == '[' {
			var some []listed
			if err := json.Unmarshal(raw, &some); err != nil {
				return nil, err
			}
			all = append(all, some...)
			continue
		}
		var one listed
		if err := json.Unmarshal(raw, &one); err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].ID < all[j].ID })
	return all, nil
}

// cmdSealed: sealed N waits until the store has N sessions, none of them live, and sets SESSION to the newest one.
func cmdSealed(ts *testscript.TestScript, neg bool, args []string) {
	s := get(ts)
	want := 1
	if len(args) == 1 {
		n, err := strconv.Atoi(args[0])
		ts.Check(err)
		want = n
	}
	var all []listed
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if all, err = s.list(); err != nil {
			continue
		}
		live := 0
		for _, l := range all {
			if l.State == "live" {
				live++
			}
		}
		if len(all) == want && live == 0 {
			if want > 0 {
				ts.Setenv("SESSION", all[len(all)-1].ID)
			}
			return
		}
		if len(all) > want {
			break
		}
	}
	ts.Fatalf("sealed: want %d sealed sessions, have %+v (%v)", want, all, err)
}

// cmdLogCount: logcount N PATTERN: the newest session's records, as `cat` prints them, hold PATTERN on N lines.
func cmdLogCount(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: logcount N TEXT")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	out, err := get(ts).audit("cat", ts.Getenv("SESSION"))
	ts.Check(err)
	n := 0
	for _, line := range bytes.Split(out, []byte("\n")) {
		if bytes.Contains(line, []byte(args[1])) {
			n++
		}
	}
	if n != want {
		ts.Fatalf("logcount: %d lines with %q, want %d, in\n%s", n, args[1], want, out)
	}
}

// cmdSandboxes: sandboxes N: this gate has N containers, within 30 s.
func cmdSandboxes(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	var own []string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if own, err = get(ts).own(); err == nil && len(own) == want {
			if want > 0 {
				ts.Setenv("SANDBOX", own[0])
			}
			return
		}
	}
	ts.Fatalf("sandboxes: have %v (%v), want %d", own, err, want)
}

// cmdMade: made N: this gate has had N sandboxes created since its directory was made, as the engine's events tell, or the
// cluster's.
func cmdMade(ts *testscript.TestScript, neg bool, args []string) {
	s := get(ts)
	if onKubernetes {
		n, err := s.madePods()
		ts.Check(err)
		if strconv.Itoa(n) != args[0] {
			ts.Fatalf("made: %d pods were created, want %s", n, args[0])
		}
		return
	}
	out, err := exec.Command("docker", "events", "--since", strconv.FormatInt(s.since.Unix(), 10), "--until", "0s",
		"--filter", "event=create", "--filter", "label=sallyport.server="+s.server()).Output()
	ts.Check(err)
	if got := strconv.Itoa(bytes.Count(out, []byte("\n"))); got != args[0] {
		ts.Fatalf("made: %s containers were created, want %s:\n%s", got, args[0], out)
	}
}

// cmdUntil: until COMMAND ARGS... | until refused PATTERN: runs a command again until it succeeds, at most 30 s.
func cmdUntil(ts *testscript.TestScript, neg bool, args []string) {
	if args[0] == "refused" { // refused PATTERN: ssh fails, and says what matches
		args = []string{"sh", "-c", "! ssh -F ssh_config gate true 2>refusal && grep -E -- \"$1\" refusal", "sh", args[1]}
	}
	if args[0] == "ssh-key" { // ssh-key FILE: logs in with this key
		args = []string{"ssh", "-F", "ssh_config", "-o", "IdentityAgent=none", "-o", "IdentityFile=none", "-i", args[1], "gate", "echo ok"}
	}
	var last error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if last = ts.Exec(args[0], args[1:]...); (last == nil) != neg {
			return
		}
	}
	ts.Fatalf("until %v: %v", args, last)
}

// cmdBackground: background NAME COMMAND...: starts a command whose input stays open and whose output goes to NAME.out.
func cmdBackground(ts *testscript.TestScript, neg bool, args []string) {
	s := get(ts)
	out, err := os.Create(ts.MkAbs(args[0] + ".out"))
	ts.Check(err)
	defer out.Close()
	name := args[1]
	if own := filepath.Join(s.bin, name); filepath.Base(name) == name {
		if _, err := os.Stat(own); err == nil {
			name = own
		}
	}
	cmd := exec.Command(name, args[2:]...)
	cmd.Dir = s.dir
	r, w, err := os.Pipe()
	ts.Check(err)
	defer r.Close()
	ts.Defer(func() { w.Close() })
	cmd.Stdin, cmd.Stdout, cmd.Stderr = r, out, out
	ts.Check(cmd.Start())
	s.jobs[args[0]] = cmd
}

// cmdSignal: signal NAME SIGNAL|wait: sends a signal to a background command, and waits for its end.
func cmdSignal(ts *testscript.TestScript, neg bool, args []string) {
	s := get(ts)
	cmd := s.jobs[args[0]]
	if cmd == nil {
		ts.Fatalf("signal: no job %s", args[0])
	}
	switch args[1] {
	case "KILL":
		cmd.Process.Signal(syscall.SIGKILL)
	case "TERM":
		cmd.Process.Signal(syscall.SIGTERM)
	case "wait":
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		delete(s.jobs, args[0])
		if (err != nil) != neg && args[1] == "wait" {
			ts.Fatalf("signal: %s ended: %v", args[0], err)
		}
	case <-time.After(60 * time.Second):
		ts.Fatalf("signal: %s did not end", args[0])
	}
}

// freePort is a TCP port on loopback.
func freePort(t *testing.T) int {
	t.Helper()
	port, err := ports.Take()
	if err != nil {
		t.Fatal(err)
	}
	return port
}
