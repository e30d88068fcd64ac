package test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// regressDir is where Debian's package openssh-tests puts OpenSSH's regression suite.
const regressDir = "/usr/lib/openssh/regress"

// regressEdit changes a script of the suite: from a line that begins with from (blanks aside) until one that begins with
// until, which stays, all lines give way to text. An empty until means that line alone, theEnd the rest.
type regressEdit struct{ from, until, text string }

const theEnd = "\x00"

// regressScripts are the scripts that run, those that take longest first, and what of them is left out because the gate is no sshd: docs/clients.md has
// the reasons.
var regressScripts = []struct {
	name  string
	edits []regressEdit
}{
	{"rekey", []regressEdit{
		// The client's own limits by time, once; then those of sshd's configuration.
		{"for s in 5 10; do", "", "for s in 5; do"},
		{"for s in 5 10; do", "", "for s in 5; do"},
		{"for s in 16 1k 128k 256k; do\n\tverbose \"server", "rm -f ${COPY} ${DATA}", ""},
	}},
	{"multiplex", []regressEdit{
		{"P=3301", "", "P=3399"}, // forwarding uses the other
		// The test's own listeners, in reach of the sandbox.
		{"${SSH} -Nn2 -MS$CTL", "", "\t${SSH} -Nn2 -MS$CTL -R $PORT:127.0.0.1:$PORT -R $(($PORT+1)):127.0.0.1:$(($PORT+1)) " +
			"-F $OBJ/ssh_config -oSendEnv=\"_XXX_TEST\" somehost \\"},
		{"for s in 0 1 4 5 44; do", "", "for s in 0 44; do"}, // exit-status has them all
		{`verbose "test $tid: cmd forward remote (TCP)"`, `verbose "test $tid: cmd forward local (UNIX)"`, ""},
		// What a server says to who speaks no SSH is sshd's own; ours introduces itself.
		{"echo \"\" | $NC -U", `|| fail "connect to local`, `echo "" | $NC -N -U $OBJ/unix-1.fwd | grep -q SSH-2.0 \`},
		{"echo \"\" | $NC -U", `|| fail "connect to remote`, `echo "" | $NC -N -U $OBJ/unix-1.fwd | grep -q SSH-2.0 \`},
	}},
	{"sftp-cmds", nil},
	{"sftp-badcmds", nil},
	{"sftp-batch", nil},
	{"sftp-glob", nil},
	{"sftp-perm", []regressEdit{
		// The gate has no list of the only requests that are permitted.
		{"# Whitelist\n", "# Blacklist", ""},
		{"# Whitelist with", "}", ""},
		// No rule is about how full a file system is.
		{"perm_test \\\n\t\"statvfs\"", "# XXX need good tests", ""},
	}},
	{"sftp-uri", nil},
	{"scp", nil},
	{"scp3", nil},
	{"scp-uri", nil},
	{"connect", nil},
	{"connect-uri", nil},
	{"exit-status", nil},
	{"exit-status-signal", nil},
	{"envpass", []regressEdit{{`trace "server setenv wins"`, "rm -f $OBJ/ssh_proxy_envpass", ""}}},
	{"transfer", nil},
	{"stderr-data", nil},
	{"stderr-after-eof", nil},
	{"yes-head", nil},
	{"try-ciphers", nil},
	{"forwarding", []regressEdit{
		{"DATA=/bin/ls", "", ""}, // the sandbox has another
		// From here on the server's side of a forward must be the client's machine.
		{`trace "stdio forwarding"`, theEnd, ""},
	}},
	{"dynamic-forward", []regressEdit{
		{"FWDPORT=", "", "FWDPORT=`expr $PORT + 3`"}, // multiplex uses the other
		// -D: the gate, in reach of the sandbox. -R: the proxy in the sandbox, in reach of the test.
		{"-$direction $FWDPORT", "", "\t    -$direction $FWDPORT -oExitOnForwardFailure=yes \\\n\t    `case $direction in " +
			"D) echo -R $PORT:127.0.0.1:$PORT ;; R) echo -L $FWDPORT:127.0.0.1:$FWDPORT ;; esac` \\"},
	}},
}

// regressUser is the suite's user: who runs the tests, or nobody if that is root, whom a sandbox must not be.
func regressUser(t *testing.T) *user.User {
	t.Helper()
	u, err := user.Current()
	if err == nil && u.Uid == "0" {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// TestOpenSSHRegress runs OpenSSH's own tests with the gate in sshd's place. Sandbox and tests see the same files, and are
// the same uid.
func TestOpenSSHRegress(t *testing.T) {
	needClients(t, regressDir+"/test-exec.sh", "ssh-agent", "openssl")
	u := regressUser(t)
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	// Short, as the sockets of shared connections lie below it.
	dir, err := os.MkdirTemp("", "sr-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	src, obj := filepath.Join(dir, "src"), filepath.Join(dir, "obj")
	for _, d := range []string{src, obj} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Chmod(dir, 0o755))
	shims, err := filepath.Abs("clients/regress")
	check(err)
	check(exec.Command("cp", "-a", shims, filepath.Join(dir, "bin")).Run()) // where every uid can reach them
	check(exec.Command("sh", "-c", `cp "$1"/*.sh "$2"`, "sh", regressDir, src).Run())

	// The suite takes the same keys for users and for hosts.
	gate := filepath.Join(dir, "gate")
	check(os.Mkdir(gate, 0o700))
	s, err := newState(gate, "auto")
	check(err)
	keys := filepath.Join(dir, "keys")
	check(os.Mkdir(keys, 0o755))
	var public []string
	for name, args := range map[string][]string{
		"ssh-ed25519": nil, "ssh-rsa": {"-t", "rsa"}, "ecdsa-sha2-nistp256": {"-t", "ecdsa"},
		"ecdsa-sha2-nistp384": {"-t", "ecdsa", "-b", "384"}, "ecdsa-sha2-nistp521": {"-t", "ecdsa", "-b", "521"},
	} {
		file := filepath.Join(keys, name)
		if args == nil {
			args = []string{"-t", "ed25519"}
		}
		check(exec.Command("ssh-keygen", append(args, "-q", "-N", "", "-f", file)...).Run())
		b, err := os.ReadFile(file + ".pub")
		check(err)
		public = append(public, strings.TrimSpace(string(b)))
	}
	b, err := os.ReadFile(filepath.Join(keys, "ssh-ed25519"))
	check(err)
	check(os.WriteFile(filepath.Join(gate, "host.key"), b, 0o600))

	check(writeJSON(filepath.Join(gate, "data/users", u.Username+".json"), map[string]any{"keys": public}))
	grants := map[string]any{}
	for name, transfer := range map[string]map[string]any{
		"regress": nil, "readonly": {"deny_upload": true}, "nodownload": {"deny_download": true}, "nopaths": {"deny_paths": []string{"/"}},
	} {
		permit := map[string]any{"shell": true, "exec": true, "sftp": true, "env": []string{"_XXX_TEST", "_XXX_TEST_*"}}
		if transfer != nil {
			permit["transfer"] = transfer
		} else {
			permit["forward"] = []string{"*:*", "unix:" + obj + "/**"}
			permit["listen"] = []string{"localhost:*", "unix:" + obj + "/**"}
		}
		check(writeJSON(filepath.Join(gate, "data/profiles", name+".json"), map[string]any{
			"image": image(), "pull_policy": "never", "memory": "1Gi", "pids": 512, "user": u.Uid + ":" + u.Gid,
			"mounts": []any{map[string]any{"source": obj, "target": obj, "write": true}}, "permit": permit,
		}))
		grants[name] = map[string]any{
			"profile": name, "not_before": time.Now().Add(-time.Minute).UTC().Format(time.RFC3339),
			"not_after": time.Now().Add(time.Hour).UTC().Format(time.RFC3339), "reason": "regression", "approved_by": "the test",
		}
	}
	check(writeJSON(filepath.Join(gate, "data/grants", u.Username+".json"), grants))
	config, err := os.ReadFile(filepath.Join(gate, "gate.yaml"))
	check(err)
	config = bytes.Replace(config, []byte("[production]"), fmt.Appendf(nil, "[%s]", obj), 1)
	port := s.port
	s.port = quietPorts(t, 4) // scripts use those after the gate's
	config = bytes.Replace(config, fmt.Appendf(nil, "127.0.0.1:%d", port), fmt.Appendf(nil, "127.0.0.1:%d", s.port), 1)
	check(os.WriteFile(filepath.Join(gate, "gate.yaml"), config, 0o600))
	check(s.start("gate.yaml"))
	t.Cleanup(func() {
		if err := s.end(); err != nil {
			t.Error(err)
		}
	})

	// Most of their time they wait.
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, 4)
	for _, script := range regressScripts {
		file := filepath.Join(src, script.name+".sh")
		text, err := os.ReadFile(file)
		check(err)
		for _, e := range script.edits {
			if text, err = e.apply(text); err != nil {
				t.Fatalf("%s: %v: is it another version of the suite?", script.name, err)
			}
		}
		check(os.WriteFile(file, text, 0o644))
		own := filepath.Join(obj, script.name)
		check(exec.Command("cp", "-a", keys, own).Run())
		for _, tool := range []string{"netcat", "mkdtemp", "check-perm", "modpipe"} {
			check(exec.Command("cp", filepath.Join(regressDir, tool), own).Run())
		}
		check(exec.Command("chown", "-R", u.Uid+":"+u.Gid, own).Run())
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			t.Run(script.name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
				defer cancel()
				cmd := exec.CommandContext(ctx, "sh", filepath.Join(src, "test-exec.sh"), own, file)
				if os.Geteuid() == 0 {
					cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
				}
				cmd.Dir = own
				bin := filepath.Join(dir, "bin")
				cmd.Env = []string{
					"PATH=" + os.Getenv("PATH"), "HOME=" + own, "SHELL=/bin/sh", "USER=" + u.Username, "LOGNAME=" + u.Username,
					"OBJ=" + own, "TEST_SHELL=sh", "BUILDDIR=" + own, "TEST_SSH_PORT=" + strconv.Itoa(s.port), "TEST_SSH_UNSAFE_PERMISSIONS=1",
					"TEST_SSH_SSH=" + filepath.Join(bin, "ssh"), "TEST_SSH_SSHD=" + filepath.Join(bin, "sshd"),
					"TEST_SSH_SFTPSERVER=" + filepath.Join(bin, "sftp-server"),
				}
				cmd.WaitDelay = 10 * time.Second // for what it leaves in the background
				out, err := cmd.CombinedOutput()
				// The connections that its sftp servers shared.
				masters, _ := filepath.Glob(filepath.Join(own, "cm-*"))
				for _, m := range masters {
					exit := exec.Command("ssh", "-o", "ControlPath="+m, "-O", "exit", "gate")
					exit.Run() //nolint:errcheck // it may have ended by itself
				}
				if err != nil {
					t.Errorf("%v\n%s\n%s", err, out, tail(filepath.Join(own, "failed-regress.log"), filepath.Join(own, "failed-ssh.log")))
				}
			})
		})
	}
}

// quietPorts gives the first of n ports in a row that are free, and that no outgoing connection gets by chance: an ssh that
// finds its port taken on 127.0.0.1 is content with ::1.
func quietPorts(t *testing.T, n int) int {
	t.Helper()
	for port := 20000 + os.Getpid()%5000; port < 32000; port += n {
		free := 0
		for i := range n {
			l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port+i))
			if err != nil {
				break
			}
			l.Close()
			free++
		}
		if free == n {
			return port
		}
	}
	t.Fatal("no free ports")
	return 0
}

// apply makes the edit.
func (e regressEdit) apply(text []byte) ([]byte, error) {
	lines := strings.SplitAfter(string(text), "\n")
	for i := range lines {
		rest := strings.TrimLeft(strings.Join(lines[i:], ""), " \t")
		if !strings.HasPrefix(rest, e.from) {
			continue
		}
		end := i + 1
		for e.until != "" && end < len(lines) && !strings.HasPrefix(strings.TrimLeft(lines[end], " \t"), e.until) {
			end++
		}
		if end == len(lines) && e.until != "" && e.until != theEnd {
			return nil, fmt.Errorf("no line %q", e.until)
		}
		t := e.text
		if t != "" {
			t += "\n"
		}
		return []byte(strings.Join(lines[:i], "") + t + strings.Join(lines[end:], "")), nil
	}
	return nil, fmt.Errorf("no line %q", e.from)
}

// tail is the end of files, as far as there are any.
func tail(names ...string) []byte {
	var all []byte
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		b, _ := io.ReadAll(f)
		f.Close()
		all = append(all, b[max(0, len(b)-4000):]...)
	}
	return all
}
