package test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// removeAgentVolume removes the volume of the agent that was tested.
func removeAgentVolume() error {
	b, err := os.ReadFile(filepath.Join(binaries, "sallyport-agent"))
	if err != nil {
		return err
	}
	name := fmt.Sprintf("sallyport-agent-%x", sha256.Sum256(b))[:len("sallyport-agent-")+32]
	if out, err := exec.Command("docker", "volume", "rm", "--force", name).CombinedOutput(); err != nil {
		return fmt.Errorf("docker volume rm: %w: %s", err, out)
	}
	return nil
}

// TestGateInContainer runs a gate from an image as our Dockerfile makes it, with the engine's socket and no path in common
// with the engine. It is not root, and sees no process of the host.
func TestGateInContainer(t *testing.T) {
	if noEngine {
		t.Skip("no Docker engine answers")
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("giving files to the gate's user needs root, and CI is set")
		}
		t.Skip("NOT TESTED: giving files to the gate's user needs root")
	}
	dir := t.TempDir()
	s, err := newState(dir, "auto")
	if err != nil {
		t.Fatal(err)
	}
	image := "sallyport-test/gate:" + strconv.Itoa(os.Getpid())
	if err := importGate(image); err != nil {
		t.Fatal(err)
	}
	const uid = 65532
	for _, sub := range []string{"etc", "state", "log"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, sub), 0o700), os.Chown(filepath.Join(dir, sub), uid, uid)); err != nil {
			t.Fatal(err)
		}
	}
	config := fmt.Sprintf(`gate: %s
state: /var/lib/sallyport
ssh: {listen: "127.0.0.1:%d", host_keys: [host.key], drain_time: 2s}
policy: {data: /data}
audit: {store: {directory: /log}}
docker: {bind_prefixes: [%q]}
monitor: {listen: ""}
`, s.name, s.port, filepath.Join(dir, "production"))
	key, err := os.ReadFile(filepath.Join(dir, "host.key"))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"sallyport.yaml": []byte(config), "host.key": key} {
		name = filepath.Join(dir, "etc", name)
		if err := errors.Join(os.WriteFile(name, content, 0o600), os.Chown(name, uid, uid)); err != nil {
			t.Fatal(err)
		}
	}
	socket, err := os.Stat("/var/run/docker.sock")
	if err != nil {
		t.Fatal(err)
	}
	container := "sallyport-test-gate-" + strconv.Itoa(os.Getpid())
	run := func(flags []string, command ...string) *exec.Cmd {
		args := append([]string{
			"run", "--rm", "--network", "host", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
			"--user", fmt.Sprintf("%d:%d", uid, uid), "--group-add", strconv.Itoa(int(socket.Sys().(*syscall.Stat_t).Gid)),
			"-v", "/var/run/docker.sock:/var/run/docker.sock", "-v", filepath.Join(dir, "etc") + ":/etc/sallyport:ro",
			"-v", filepath.Join(dir, "data") + ":/data:ro", "-v", filepath.Join(dir, "state") + ":/var/lib/sallyport",
			"-v", filepath.Join(dir, "log") + ":/log",
		}, flags...)
		return exec.Command("docker", append(append(args, image), command...)...)
	}
	t.Cleanup(func() {
		exec.Command("docker", "rm", "--force", container).Run() // it is there only if the test has failed
		if out, err := exec.Command("docker", "image", "rm", "--force", image).CombinedOutput(); err != nil {
			t.Errorf("docker image rm: %v: %s", err, out)
		}
		if left, err := s.left(); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	})

	out, err := run(nil, "check", "--config", "/etc/sallyport/sallyport.yaml").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "sandboxes are reached by relay: the engine's processes are not visible here") {
		t.Fatalf("check: %v\n%s", err, out)
	}
	// With the host's processes in sight and the state directory at its own path there, a socket will do.
	state := filepath.Join(dir, "state")
	there := strings.Replace(config, "/var/lib/sallyport", state, 1)
	if err := os.WriteFile(filepath.Join(dir, "etc", "there.yaml"), []byte(there), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err = run([]string{"--pid", "host", "-v", state + ":" + state}, "check", "--config", "/etc/sallyport/there.yaml").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "sandboxes are reached by socket: the engine sees") {
		t.Errorf("check: %v\n%s", err, out)
	}

	open := func() {
		t.Helper()
		if out, err := run([]string{"--detach", "--name", container}, "serve", "--config", "/etc/sallyport/sallyport.yaml").CombinedOutput(); err != nil {
			t.Fatalf("docker run: %v: %s", err, out)
		}
		for end := time.Now().Add(time.Minute); exec.Command("ssh-keyscan", "-T", "2", "-p", strconv.Itoa(s.port), "127.0.0.1").Run() != nil; time.Sleep(100 * time.Millisecond) {
			if time.Now().After(end) {
				log, _ := exec.Command("docker", "logs", container).CombinedOutput()
				t.Fatalf("the gate does not open:\n%s", log)
			}
		}
	}
	ssh := func(command string) *exec.Cmd {
		return exec.Command("ssh", "-F", filepath.Join(dir, "ssh_config"), "gate", command)
	}
	open()
	if out, err := ssh("id -u; cat /production/app.log; getent hosts localhost | wc -l").Output(); err != nil || string(out) != "1000\norder 4711 refused\n1\n" {
		t.Errorf("ssh: %v, %q", err, out)
	}
	if out, err := ssh("exit 42").CombinedOutput(); exitCode(err) != 42 {
		t.Errorf("exit 42: %v, %s", err, out)
	}
	batch := exec.Command("sftp", "-F", filepath.Join(dir, "ssh_config"), "-b", "-", "gate")
	batch.Stdin = strings.NewReader("get /production/app.log " + filepath.Join(dir, "got") + "\n")
	if out, err := batch.CombinedOutput(); err != nil {
		t.Errorf("sftp: %v, %s", err, out)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "got")); err != nil || string(got) != "order 4711 refused\n" {
		t.Errorf("%q, %v", got, err)
	}

	// The gate is killed: its sandbox ends, and the next gate has the log sealed.
	long := ssh("echo up; sleep 600")
	up, err := long.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := long.Start(); err != nil {
		t.Fatal(err)
	}
	if b := make([]byte, 3); func() bool { _, err := up.Read(b); return err != nil || string(b) != "up\n" }() {
		t.Errorf("%q", b)
	}
	if out, err := exec.Command("docker", "kill", container).CombinedOutput(); err != nil {
		t.Fatalf("docker kill: %v: %s", err, out)
	}
	long.Wait()
	if left, err := s.left(); err != nil || len(left) > 0 {
		t.Errorf("a killed gate leaves %v, %v", left, err)
	}
	for end := time.Now().Add(30 * time.Second); exec.Command("docker", "inspect", container).Run() == nil && time.Now().Before(end); {
		time.Sleep(100 * time.Millisecond)
	}
	open()
	if out, err := ssh("echo again").Output(); err != nil || string(out) != "again\n" {
		t.Errorf("ssh: %v, %q", err, out)
	}
	if out, err := exec.Command("docker", "stop", container).CombinedOutput(); err != nil {
		t.Errorf("docker stop: %v: %s", err, out)
	}
	all, err := s.list()
	if err != nil || len(all) != 5 {
		t.Errorf("%d sessions, %v: %+v", len(all), err, all)
	}
	for _, one := range all {
		if one.State == "live" {
			t.Errorf("%+v", one)
		}
	}
	if out, err := s.audit("verify", filepath.Join(dir, "log")); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func exitCode(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	return -1
}

// importGate makes an image of the static commands, laid out as the Dockerfile does.
func importGate(name string) error {
	layer, err := gateLayer()
	if err != nil {
		return err
	}
	cmd := exec.Command("docker", "import", "--change", `ENTRYPOINT ["/usr/local/bin/sallyport"]`, "-", name)
	cmd.Stdin = bytes.NewReader(layer)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("docker import: %w: %s", err, out)
	}
	return nil
}

// gateLayer is the file system of that image as a tar archive.
func gateLayer() ([]byte, error) {
	dir, err := os.MkdirTemp("", "sallyport-gate-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := build(dir, false); err != nil {
		return nil, err
	}
	var packed bytes.Buffer
	w := tar.NewWriter(&packed)
	add := func(h tar.Header, content []byte) {
		if err == nil {
			h.Size = int64(len(content))
			err = w.WriteHeader(&h)
		}
		if err == nil {
			_, err = w.Write(content)
		}
	}
	for _, name := range []string{"sallyport", "sallyport-agent"} {
		content, rerr := os.ReadFile(filepath.Join(dir, name))
		if err = errors.Join(err, rerr); err != nil {
			return nil, err
		}
		add(tar.Header{Name: "usr/local/bin/" + name, Mode: 0o755}, content)
	}
	add(tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: int64(fs.ModePerm) | 0o1000}, nil)
	add(tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("sallyport:x:65532:65532::/var/lib/sallyport:/nonexistent\n"))
	err = errors.Join(err, w.Close())
	return packed.Bytes(), err
}
