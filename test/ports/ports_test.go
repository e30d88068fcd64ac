package ports

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

const childEnv = "SALLYPORT_TEST_PORTS_CHILD"

// No port is handed out twice, not to two processes that begin at the same one, and not where somebody listens already.
func TestTake(t *testing.T) {
	if os.Getenv(childEnv) != "" {
		next = 0
		for range 20 {
			fmt.Println("port", take(t))
		}
		return
	}
	next = 0
	seen := make(map[int]bool)
	for i := range 20 {
		port := take(t)
		if port < first || port >= first+count || seen[port] {
			t.Fatalf("port %d", port)
		}
		seen[port] = true
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			l.Close()
		} else {
			defer l.Close()
		}
	}
	next = 0
	if port := take(t); seen[port] {
		t.Errorf("port %d a second time", port)
	}
	other := exec.Command(os.Args[0], "-test.run", "TestTake$", "-test.v")
	other.Env = append(os.Environ(), childEnv+"=1")
	out, err := other.CombinedOutput()
	if err != nil || strings.Count(string(out), "port ") != 20 {
		t.Fatalf("%v\n%s", err, out)
	}
	for port := range seen {
		if strings.Contains(string(out), fmt.Sprintln("port", port)) {
			t.Errorf("port %d to another process, too", port)
		}
	}
	var foreign net.Listener
	for next += 100; foreign == nil; next++ { // one that is free: others may run
		if next >= count {
			t.Fatal(err)
		}
		foreign, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+next))
	}
	defer foreign.Close()
	next--
	if port := take(t); port == foreign.Addr().(*net.TCPAddr).Port {
		t.Errorf("port %d, on which somebody listens", port)
	}
}

func take(t *testing.T) int {
	t.Helper()
	port, err := Take()
	if err != nil {
		t.Fatal(err)
	}
	return port
}
