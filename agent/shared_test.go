package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestRelayShared: where the agent's number is not known, the relay takes an agent of its own container, and the agent a relay
// of its own.
func TestRelayShared(t *testing.T) {
	r := newRelayTest(t)
	r.listening()
	_, conn, stderr := r.start("--pid", "0")
	c, err := r.client(conn)
	if err != nil {
		t.Fatalf("%v: %s", err, stderr)
	}
	say(t, c, "echo said")
	c.Close()
	r.ended()
}

// inOtherGroup moves a process to a control group of its own, as a container's is, if this machine's tests may do so.
func inOtherGroup(t *testing.T, pid int) {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup/freezer", "/sys/fs/cgroup/pids", "/sys/fs/cgroup"} {
		own, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		dir := root
		for line := range strings.SplitSeq(string(own), "\n") {
			if parts := strings.SplitN(line, ":", 3); len(parts) == 3 && (parts[1] == filepath.Base(root) || parts[1] == "" && root == "/sys/fs/cgroup") {
				dir = filepath.Join(root, parts[2])
			}
		}
		dir = filepath.Join(dir, "sallyport-test-"+strconv.Itoa(pid))
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() {
			syscall.Kill(pid, syscall.SIGKILL)
			for end := time.Now().Add(limit); os.Remove(dir) != nil && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			}
		})
		if os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0) == nil {
			return
		}
	}
	if os.Getenv("CI") != "" {
		t.Fatal("no control group can be made here, and CI is set")
	}
	t.Skip("NOT TESTED: no control group can be made here")
}

func TestSameContainer(t *testing.T) {
	if !sameContainer(os.Getpid()) || sameContainer(1<<22+1) {
		t.Error("this process is not in its own container, or one that is not there is")
	}
	other := exec.Command("sleep", "600")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { other.Wait(); close(ended) }()
	t.Cleanup(func() { other.Process.Kill(); <-ended })
	if !sameContainer(other.Process.Pid) {
		t.Error("a child is in another container")
	}
	inOtherGroup(t, other.Process.Pid)
	if sameContainer(other.Process.Pid) {
		t.Error("a process of another control group is in this container")
	}
	if err := refuseSharedUID(); err != errSharedUID {
		t.Errorf("a process of this uid, in another container: %v", err)
	}
}

func TestHasUID(t *testing.T) {
	for _, test := range []struct {
		status, uid string
		want        bool
	}{
		{"Name:\tsh\nUid:\t1000\t1000\t1000\t1000\nGid:\t5\t5\t5\t5\n", "1000", true},
		{"Name:\tsh\nUid:\t1000\t1000\t1000\t1000\nGid:\t5\t5\t5\t5\n", "5", false},
		{"Uid:\t0\t0\t1000\t0\n", "1000", true}, // saved
		{"Uid:\t0\t0\t0\t1000\n", "1000", true}, // of files
		{"Uid:\t10001\t0\t0\t0\n", "1000", false},
		{"Name:\tUid:\t1000\nUid:\t0\t0\t0\t0\n", "1000", false}, // a name of the process's own
		{"", "1000", true},
		{"Name:\tsh\n", "1000", true},
	} {
		if got := hasUID(test.status, test.uid); got != test.want {
			t.Errorf("%q, %s: %v", test.status, test.uid, got)
		}
	}
}
