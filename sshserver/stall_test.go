package sshserver

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
)

// Of TestForwardStalled, and of docs/forwarding.md: what a forwarded connection holds of the gate's memory at most when
// both its ends take nothing.
const (
	stalled      = 100
	stalledBound = 64*(40<<10) + // x/crypto's window of what the client sends, 2 MiB, in packets of 32 KiB and their header
		1<<20 + // yamux' window of what the sandbox sends, 512 KiB, in a buffer that doubles
		256<<10 // the gate's own buffers, goroutines
)

const stalledClientEnv = "SALLYPORT_STALLED_CLIENT" // address, host key, user's key, target, echo

// stalledClient is the client of TestForwardStalled, a process of its own, so that the gate's memory can be told from its.
func stalledClient(config string) int {
	if err := runStalledClient(strings.Fields(config)); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func runStalledClient(args []string) error {
	blob, err := base64.StdEncoding.DecodeString(args[1])
	if err != nil {
		return err
	}
	host, err := ssh.ParsePublicKey(blob)
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(args[2])
	if err != nil {
		return err
	}
	key, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		return err
	}
	c, err := ssh.Dial("tcp", args[0], &ssh.ClientConfig{
		User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.FixedHostKey(host),
	})
	if err != nil {
		return err
	}
	defer c.Close()
	for range stalled {
		nc, err := c.Dial("tcp", args[3])
		if err != nil {
			return err
		}
		go func() { // nobody reads it
			b := make([]byte, 32<<10)
			for {
				if _, err := nc.Write(b); err != nil {
					return
				}
			}
		}()
	}
	fmt.Println("open")
	in := bufio.NewReader(os.Stdin)
	if _, err := in.ReadString('\n'); err != nil { // all of them stand still
		return err
	}
	nc, err := c.Dial("tcp", args[4])
	if err != nil {
		return err
	}
	defer nc.Close()
	sent := strings.Repeat("x", 1<<20)
	go func() {
		io.WriteString(nc, sent)
		nc.(halfCloser).CloseWrite()
	}()
	got, err := io.ReadAll(nc)
	if err != nil || string(got) != sent {
		return fmt.Errorf("%d bytes came back, %v", len(got), err)
	}
	fmt.Println("passed")
	in.ReadString('\n')
	return nil
}

// A hundred connections whose ends take nothing, in both directions, hold no more than the documented bound, and hold up
// nobody else, not even on the same SSH connection.
func TestForwardStalled(t *testing.T) {
	if testing.Short() {
		t.Skip("not in -short")
	}
	g := newGate(t, func(c *Config) { c.MaxChannels = stalled + 1 })
	done := make(chan struct{})
	target := service(t, "tcp", "127.0.0.1:0", func(nc net.Conn) { // it reads nothing, and sends without end
		go func() { <-done; nc.Close() }()
		nc.(*net.TCPConn).SetReadBuffer(64 << 10) // what the kernel holds is of no interest here
		b := make([]byte, 32<<10)
		for {
			if _, err := nc.Write(b); err != nil {
				return
			}
		}
	})
	defer close(done)
	echoing := service(t, "tcp", "127.0.0.1:0", echo)
	keyFile := t.TempDir() + "/ed25519"
	if err := CreateKey(keyFile); err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		t.Fatal(err)
	}
	g.rules.change(func() { g.rules.keys["alice"] = authzKey(key.PublicKey()).Line })
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), stalledClientEnv+"="+strings.Join([]string{
		g.addr, base64.StdEncoding.EncodeToString(g.host.Marshal()), keyFile, target, echoing,
	}, " "))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	out := bufio.NewReader(stdout)
	await := func(want string) {
		t.Helper()
		if line, err := out.ReadString('\n'); line != want+"\n" {
			t.Fatalf("the client says %q, %v", line, err)
		}
	}
	await("open")
	passed := func() (in, out uint64) {
		g.server.mu.Lock()
		defer g.server.mu.Unlock()
		for _, c := range g.server.conns {
			c.mu.Lock()
			for _, f := range c.forwards {
				in, out = in+f.in.Load(), out+f.out.Load()
			}
			c.mu.Unlock()
		}
		return in, out
	}
	var in, sent uint64
	for still, end := 0, time.Now().Add(2*time.Minute); still < 4; time.Sleep(500 * time.Millisecond) {
		i, o := passed()
		if still++; i != in || o != sent || i == 0 || o < stalled<<20 {
			still = 0
		}
		in, sent = i, o
		if time.Now().After(end) {
			t.Fatalf("they don't stand still: %d in, %d out", in, sent)
		}
	}
	held := heap() - before
	t.Logf("%d connections stand still and hold %.1f MiB, %.2f each; %d bytes had passed in, %d out", stalled, float64(held)/(1<<20),
		float64(held)/(1<<20)/stalled, in, sent)
	if held > stalled*stalledBound {
		t.Errorf("the gate holds %d bytes for %d connections, %d each, want at most %d", held, stalled, held/stalled, stalledBound)
	}
	// Less would mean that they don't stand still where they should.
	if held < stalled*(2<<20) {
		t.Errorf("the gate holds %d bytes, less than the windows", held)
	}
	io.WriteString(stdin, "\n")
	await("passed")
	cmd.Process.Kill()
	cmd.Wait()
	eventually(t, "the places are free", func() bool { return places(g) == 0 })
	records := g.records()[0]
	forwards := bodies[*auditlog.Forward](records)
	cut := 0
	for _, f := range forwards {
		if f.Result == "cut-off" && f.Input > 0 && f.Output > 0 {
			cut++
		}
	}
	if len(forwards) != stalled+1 || cut != stalled {
		t.Errorf("%d forwards, %d cut off", len(forwards), cut)
	}
}
