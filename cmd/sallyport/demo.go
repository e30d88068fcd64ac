package main

import (
	"bytes"
	"context"
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
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/backends/kubernetes"
	"github.com/sallyport/sallyport/sshserver"
)

const (
	demoUser   = "alice"
	demoTicket = "DEMO-1"
	demoHour   = time.Hour
	demoWait   = 30 * time.Second // for the gate to open, and for it to close
)

func demoCommand() *cobra.Command {
	d := demo{}
	cmd := &cobra.Command{
		Use: "demo", Short: "Set up and run a gate to try, in one directory (make demo)", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d.out, d.err = cmd.OutOrStdout(), cmd.ErrOrStderr()
			return d.run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&d.dir, "dir", "demo", "directory that holds all of it")
	cmd.Flags().IntVar(&d.port, "port", 2222, "port on 127.0.0.1")
	cmd.Flags().StringVar(&d.image, "image", "sallyport/debug:1", "the profile's image")
	cmd.Flags().StringVar(&d.bin, "bin", "", "directory of the binaries (default: this one's)")
	cmd.Flags().StringVar(&d.kubeconfig, "kubeconfig", "", "run the sandboxes on this cluster, in a namespace of the demo's own")
	cmd.Flags().StringVar(&d.agentImage, "agent-image", "sallyport/agent:1", "the image that brings the agent, on a cluster")
	cmd.Flags().BoolVar(&d.once, "once", false, "end after the proof")
	return cmd
}

// demo is a gate with one user, one profile and a grant of an hour.
type demo struct {
	dir, image, bin string
	port            int
	once            bool

	kubeconfig, agentImage string
	cluster                *kubernetes.Demo // nil: on Docker

	out, err io.Writer

	gate *exec.Cmd
	gone chan error // the gate's end
}

func (d *demo) path(name ...string) string { return filepath.Join(append([]string{d.dir}, name...)...) }

func (d *demo) run(ctx context.Context) (err error) {
	if d.dir, err = filepath.Abs(d.dir); err != nil {
		return err
	}
	if d.kubeconfig != "" {
		if d.kubeconfig, err = filepath.Abs(d.kubeconfig); err != nil {
			return err
		}
		if d.cluster, err = kubernetes.NewDemo(ctx, d.kubeconfig); err != nil {
			return fmt.Errorf("demo: %w", err)
		}
		defer func() { err = errors.Join(err, d.cluster.Remove()) }()
	}
	if err := d.setUp(); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	if err := d.start(ctx); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	fmt.Fprintf(d.out, "\nThe gate is open. In another terminal:\n\n  %s\n\n", strings.Join(d.ssh("ssh"), " "))
	if err := d.prove(ctx); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	if d.once {
		return nil
	}
	fmt.Fprintf(d.out, "\nThe gate stays open until Ctrl-C; the grant lasts an hour. Log in:\n\n  %s\n\nand read what was recorded, or prove it:\n\n  %[2]s --store %[3]s list\n  %[2]s verify %[3]s --key %[4]s\n\n",
		strings.Join(d.ssh("ssh"), " "), rel(d.path("bin", "sallyport-audit")), rel(d.path("log")), rel(d.path("state", "log.key.pub")))
	select {
	case <-ctx.Done():
		fmt.Fprintln(d.out, "\nstopping")
		return nil
	case err := <-d.gone:
		d.gone <- err
		return fmt.Errorf("the gate has ended: %v; its log is %s", err, d.path("gate.log"))
	}
}

// rel is a path as one would type it.
func rel(path string) string {
	if wd, err := os.Getwd(); err == nil {
		if r, err := filepath.Rel(wd, path); err == nil && !strings.HasPrefix(r, "..") {
			return r
		}
	}
	return path
}

// setUp writes keys, data and configuration. What is there already stays, but for the grant, which is renewed.
func (d *demo) setUp() error {
	for _, dir := range []string{"", "bin", "state", "log", "data", "data/users", "data/profiles", "data/grants", "production"} {
		if err := os.MkdirAll(d.path(dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(d.path("state"), 0o700); err != nil {
		return err
	}
	if d.bin == "" {
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		d.bin = filepath.Dir(exe)
	}
	for _, name := range []string{"sallyport", "sallyport-audit", "sallyport-agent"} {
		if err := copyFile(filepath.Join(d.bin, name), d.path("bin", name)); err != nil {
			return err
		}
	}
	key := d.path("id_ed25519")
	if _, err := os.Stat(key); errors.Is(err, fs.ErrNotExist) {
		if err := sshserver.CreateKey(key); err != nil {
			return err
		}
	}
	hostKey := d.path("state", "ssh_host_ed25519_key")
	if _, err := os.Stat(hostKey); errors.Is(err, fs.ErrNotExist) {
		if err := sshserver.CreateKey(hostKey); err != nil {
			return err
		}
	}
	hostPub, err := os.ReadFile(hostKey + ".pub")
	if err != nil {
		return err
	}
	userPub, err := os.ReadFile(key + ".pub")
	if err != nil {
		return err
	}
	known := fmt.Sprintf("[127.0.0.1]:%d %s", d.port, hostPub)
	sample := "2026-01-01T00:00:00Z payments: started\n2026-01-01T00:00:07Z payments: order 4711: card refused (code 51)\n"
	files := map[string]string{
		"known_hosts":             known,
		"production/payments.log": sample,
		"sallyport.yaml": fmt.Sprintf(`# Written by sallyport demo; see docs/configuration.md.
gate: demo
state: state
ssh:
  listen: 127.0.0.1:%d
policy:
  data: data
audit:
  store:
    directory: log
monitor:
  listen: ""
%s`, d.port, d.backendConfig()),
	}
	for name, text := range files {
		if err := os.WriteFile(d.path(name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	now := time.Now().UTC().Truncate(time.Second)
	data := map[string]any{
		"users/" + demoUser: map[string]any{"keys": []string{strings.TrimSpace(string(userPub))}},
		"profiles/demo": map[string]any{
			"image": d.image, "memory": "4Gi", "home_size": "1536Mi", "tmp_size": "512Mi",
			"mounts": []any{map[string]any{"source": d.path("production"), "target": "/production"}},
			"permit": map[string]any{
				"shell": true, "exec": true, "sftp": true,
				"env":     []string{"LANG", "LC_*", "GIT_PROTOCOL", "COLORTERM", "EDITOR"},
				"forward": []string{"*:*", "unix:/**"}, "listen": []string{"*:*", "unix:/**"}, "agent": true, "x11": true,
			},
		},
		"grants/" + demoUser: map[string]any{demoTicket: map[string]any{
			"profile": "demo", "not_before": now.Add(-time.Minute).Format(time.RFC3339),
			"not_after": now.Add(demoHour).Format(time.RFC3339), "reason": "to try Sallyport", "approved_by": "make demo",
		}},
	}
	if profile := data["profiles/demo"].(map[string]any); d.cluster != nil {
		// Smaller, as a cluster to try may be small; and the data is not on its nodes.
		profile["memory"], profile["home_size"], profile["tmp_size"] = "1Gi", "256Mi", "128Mi"
		profile["mounts"] = []any{map[string]any{"type": "configmap", "source": "production", "target": "/production"}}
		if err := d.cluster.PutConfigMap("production", map[string]string{"payments.log": sample}); err != nil {
			return err
		}
	} else {
		profile["pids"] = 1024
	}
	for name, v := range data {
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		// Renamed into place, as any writer of grants should: a gate that runs must not read half a file.
		tmp := d.path("data", name+".tmp")
		if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
			return err
		}
		if err := os.Rename(tmp, d.path("data", name+".json")); err != nil {
			return err
		}
	}
	return nil
}

// backendConfig is the configuration's part about what runs the sandboxes.
func (d *demo) backendConfig() string {
	if d.cluster == nil {
		return "docker:\n  bind_prefixes: [production]\n"
	}
	return fmt.Sprintf(`backend: kubernetes
kubernetes:
  kubeconfig: %q
  namespace: %s
  agent_image: %q
  config_maps: [production]
  cpu_share: 0.1
`, d.kubeconfig, d.cluster.Namespace, d.agentImage)
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if a, err := in.Stat(); err == nil {
		if b, err := os.Stat(to); err == nil && os.SameFile(a, b) {
			return nil
		}
	}
	tmp := to + ".tmp" // renamed: the old one may be running
	out, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Rename(tmp, to)
}

// start starts the gate as a process of its own, so that scripts can do to it what may happen to one.
func (d *demo) start(ctx context.Context) error {
	addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(d.port))
	if l, err := net.Listen("tcp", addr); err != nil {
		return fmt.Errorf("%w: choose another port: make demo PORT=2223", err)
	} else {
		l.Close()
	}
	logFile, err := os.OpenFile(d.path("gate.log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer logFile.Close()
	d.gate = exec.Command(d.path("bin", "sallyport"), "serve", "--config", d.path("sallyport.yaml"))
	d.gate.Stderr = logFile
	// A group of its own: Ctrl-C is for the demo, which then stops the gate in order. And no gate outlives its demo.
	d.gate.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	d.gone = make(chan error, 1)
	started := make(chan error)
	go func() { // Pdeathsig looks at the thread that started it
		if err := d.gate.Start(); err != nil {
			started <- err
			return
		}
		close(started)
		d.gone <- d.gate.Wait()
	}()
	if err := <-started; err != nil {
		return err
	}
	deadline := time.NewTimer(demoWait)
	defer deadline.Stop()
	for {
		if nc, err := net.DialTimeout("tcp", addr, time.Second); err == nil {
			nc.Close()
			break
		}
		select {
		case err := <-d.gone:
			text, _ := os.ReadFile(d.path("gate.log"))
			return fmt.Errorf("the gate did not start: %v\n%s", err, bytes.TrimSpace(text))
		case <-deadline.C:
			d.stop()
			return fmt.Errorf("the gate did not open its port; its log is %s", d.path("gate.log"))
		case <-ctx.Done():
			d.stop()
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	env := []string{
		"SALLYPORT_HOST=127.0.0.1", "SALLYPORT_PORT=" + strconv.Itoa(d.port), "SALLYPORT_USER=" + demoUser,
		"SALLYPORT_KEY=" + quote(d.path("id_ed25519")), "SALLYPORT_LOG=" + quote(d.path("log")),
		"SALLYPORT_DATA=" + quote(d.path("data")), "SALLYPORT_PID=" + strconv.Itoa(d.gate.Process.Pid),
	}
	return os.WriteFile(d.path("env"), []byte(strings.Join(env, "\n")+"\n"), 0o644)
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// stop stops the gate and waits for it.
func (d *demo) stop() error {
	os.Remove(d.path("env"))
	d.gate.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-d.gone:
		d.gone <- err
		if err != nil {
			return fmt.Errorf("the gate ended: %w; its log is %s", err, d.path("gate.log"))
		}
		return nil
	case <-time.After(demoWait + time.Minute):
		d.gate.Process.Kill()
		return errors.New("the gate did not stop and was killed")
	}
}

// ssh is an OpenSSH client's command line up to the destination.
func (d *demo) ssh(program string, more ...string) []string {
	port := "-p"
	if program != "ssh" {
		port = "-P"
	}
	args := []string{program, port, strconv.Itoa(d.port), "-i", rel(d.path("id_ed25519")),
		"-o", "UserKnownHostsFile=" + rel(d.path("known_hosts")), "-o", "IdentitiesOnly=yes"}
	return append(append(args, more...), demoUser+"@127.0.0.1")
}

// prove runs one session: a command and an upload on one connection, and prints what the auditor's tool reads of it.
func (d *demo) prove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	// A unix socket's path is short: not below the demo's directory.
	tmp, err := os.MkdirTemp("", "sallyport-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	// No configuration of the user's own may change what is proven.
	batch := []string{"-F", "none", "-o", "BatchMode=yes", "-o", "ControlPath=" + filepath.Join(tmp, "c")}
	run := func(stdin string, args []string) error {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), d.out, d.err
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w; the gate's log is %s", args[0], err, d.path("gate.log"))
		}
		return nil
	}
	before, err := d.sealed(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintln(d.out, "Proof: a command ...")
	began := time.Now()
	master := append(batch, "-o", "ControlMaster=yes", "-o", "ControlPersist=60")
	if err := run("", append(d.ssh("ssh", master...), "id; grep refused /production/payments.log")); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "... took %s with the client; an upload by sftp in the same sandbox ...\n", time.Since(began).Round(time.Millisecond))
	if err := run("put "+quote(d.path("sallyport.yaml"))+" uploaded.yaml\nls -l uploaded.yaml\n",
		d.ssh("sftp", append(batch, "-b", "-")...)); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "ssh", append(d.ssh("ssh", batch...)[1:], "-O", "exit")...).CombinedOutput(); err != nil {
		return fmt.Errorf("ssh -O exit: %w: %s", err, out)
	}
	fmt.Fprint(d.out, "\nWhat sallyport-audit reads of it:\n\n")
	// A session's last segment is in the store a moment after its connection ended.
	for {
		now, err := d.sealed(ctx)
		if err != nil {
			return err
		}
		if now > before {
			break
		}
		select {
		case <-ctx.Done():
			return errors.New("the session's log was not sealed")
		case <-time.After(50 * time.Millisecond):
		}
	}
	for _, args := range [][]string{{"show", "latest"}, {"verify", "--quiet", "--key", d.path("state", "log.key.pub")}} {
		if err := run("", append([]string{d.path("bin", "sallyport-audit"), "--store", d.path("log")}, args...)); err != nil {
			return err
		}
	}
	return nil
}

// sealed counts the sessions whose log is whole and closed.
func (d *demo) sealed(ctx context.Context) (int, error) {
	out, err := exec.CommandContext(ctx, d.path("bin", "sallyport-audit"), "--store", d.path("log"), "list").Output()
	if err != nil {
		return 0, fmt.Errorf("sallyport-audit list: %w", err)
	}
	return strings.Count(string(out), "sealed"), nil
}
