package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/backends"
)

// relayTest is an agent that waits for a relay.
type relayTest struct {
	t      *testing.T
	socket string
	key    ed25519.PrivateKey
	cmd    *exec.Cmd
	exited chan struct{}
}

func newRelayTest(t *testing.T) *relayTest {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	r := &relayTest{t: t, socket: filepath.Join(t.TempDir(), "s"), key: private, exited: make(chan struct{})}
	r.cmd = exec.Command("/proc/self/exe")
	r.cmd.Args = []string{serveName, "--relay", r.socket, "--home", "/", "--key", base64.StdEncoding.EncodeToString(public)}
	r.cmd.Stderr = os.Stderr
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { r.cmd.Wait(); close(r.exited) }()
	t.Cleanup(func() {
		r.cmd.Process.Kill()
		<-r.exited
	})
	return r
}

// listening waits until the agent has made its socket.
func (r *relayTest) listening() {
	r.t.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if st, err := os.Stat(r.socket); err == nil {
			if st.Mode().Perm() != 0o600 {
				r.t.Errorf("the socket has mode %v", st.Mode())
			}
			return
		}
	}
	r.t.Fatal("the agent makes no socket")
}

// ended waits for the end of the agent, and gives its exit code.
func (r *relayTest) ended() int {
	r.t.Helper()
	select {
	case <-r.exited:
		return r.cmd.ProcessState.ExitCode()
	case <-time.After(limit):
		r.t.Fatal("the agent goes on")
		return 0
	}
}

// start starts a relay, and gives the other end of its stdin and stdout.
func (r *relayTest) start(args ...string) (*exec.Cmd, net.Conn, *bytes.Buffer) {
	r.t.Helper()
	stdin, in, err := os.Pipe()
	if err != nil {
		r.t.Fatal(err)
	}
	out, stdout, err := os.Pipe()
	if err != nil {
		r.t.Fatal(err)
	}
	conn, err := NewPipeConn(out, in)
	if err != nil {
		r.t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{relayName, "--socket", r.socket, "--pid", strconv.Itoa(r.cmd.Process.Pid)}, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, &stderr
	err = cmd.Start()
	for _, f := range []*os.File{stdin, in, out, stdout} {
		f.Close()
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return cmd, conn, &stderr
}

func (r *relayTest) client(conn net.Conn) (*Client, error) {
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	return NewClient(ctx, conn, r.key, Hello{})
}

const limit = time.Minute

func say(t *testing.T, c *Client, line string) {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	var out bytes.Buffer
	if _, err := c.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: line, Stdout: &out}); err != nil || out.String() != "said\n" {
		t.Errorf("%q: %v, %q", line, err, out.String())
	}
}

// TestRelay: the relay hands over its descriptors and keeps none; stopped it holds up nothing; nobody comes after it; it ends
// with the agent.
func TestRelay(t *testing.T) {
	r := newRelayTest(t)
	relay, conn, _ := r.start()
	c, err := r.client(conn)
	if err != nil {
		t.Fatal(err)
	}
	say(t, c, "echo said")
	if _, err := os.Lstat(r.socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	for fd := range 2 {
		if to, _ := os.Readlink("/proc/" + strconv.Itoa(relay.Process.Pid) + "/fd/" + strconv.Itoa(fd)); to != os.DevNull && to != "" {
			t.Errorf("the relay's descriptor %d is %s", fd, to) // unreadable where the tests don't run as root
		}
	}
	relay.Process.Signal(syscall.SIGSTOP)
	say(t, c, "echo said")
	relay.Process.Signal(syscall.SIGCONT)
	c.Close()
	if code := r.ended(); code != 0 {
		t.Errorf("the agent's exit code is %d", code)
	}
	if err := relay.Wait(); err != nil {
		t.Errorf("the relay: %v", err)
	}
}

// TestRelayKilled: the session ends with its relay.
func TestRelayKilled(t *testing.T) {
	r := newRelayTest(t)
	relay, conn, _ := r.start()
	c, err := r.client(conn)
	if err != nil {
		t.Fatal(err)
	}
	relay.Process.Kill()
	relay.Wait()
	select {
	case <-c.Done():
	case <-time.After(limit):
		t.Error("the session goes on without its relay")
	}
	if code := r.ended(); code != ExitRelay {
		t.Errorf("the agent's exit code is %d", code)
	}
}

// TestRelayAfterAnother: a second relay finds nobody.
func TestRelayAfterAnother(t *testing.T) {
	r := newRelayTest(t)
	relay, conn, _ := r.start()
	c, err := r.client(conn)
	if err != nil {
		t.Fatal(err)
	}
	second, _, stderr := r.start()
	if err := second.Wait(); err == nil || !strings.Contains(stderr.String(), "reach the agent") {
		t.Errorf("a second relay: %v, %s", err, stderr)
	}
	say(t, c, "echo said")
	c.Close()
	relay.Wait()
}

// TestRelayStrangers: who comes first and does not speak as the relay of the gate ends the agent, which has told it nothing
// and done nothing for it.
func TestRelayStrangers(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	a, b, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer b.Close()
	for name, stranger := range map[string]func(*net.UnixConn) error{
		"leaves": func(c *net.UnixConn) error { return nil },
		"no descriptors": func(c *net.UnixConn) error {
			_, err := c.Write([]byte(relayMagic))
			return err
		},
		"too many": func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix([]byte(relayMagic), unix.UnixRights(int(a.Fd()), int(b.Fd()), int(b.Fd())), nil)
			return err
		},
		"other message": func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix([]byte("SLYPRLY0"), unix.UnixRights(int(a.Fd()), int(b.Fd())), nil)
			return err
		},
		"longer message": func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix([]byte(relayMagic+"x"), unix.UnixRights(int(a.Fd()), int(b.Fd())), nil)
			return err
		},
		"no pipes": func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix([]byte(relayMagic), unix.UnixRights(int(null.Fd()), int(null.Fd())), nil)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRelayTest(t)
			r.cmd.Stderr = nil
			r.listening()
			c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: r.socket, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := stranger(c); err != nil {
				t.Fatal(err)
			}
			if name == "leaves" {
				c.Close()
			}
			if code := r.ended(); code != 1 {
				t.Errorf("the agent's exit code is %d", code)
			}
			c.SetDeadline(time.Now().Add(limit))
			if n, _ := c.Read(make([]byte, 8)); n != 0 {
				t.Errorf("the agent has said something")
			}
		})
	}
	t.Run("without the key", func(t *testing.T) {
		r := newRelayTest(t)
		relay, conn, _ := r.start()
		if _, r.key, err = ed25519.GenerateKey(nil); err != nil {
			t.Fatal(err)
		}
		if _, err := r.client(conn); err == nil {
			t.Error("reached without the key")
		}
		if code := r.ended(); code != 1 {
			t.Errorf("the agent's exit code is %d", code)
		}
		relay.Wait()
	})
}

// TestRelayOfAnother: a relay gives itself to nobody but the agent.
func TestRelayOfAnother(t *testing.T) {
	r := newRelayTest(t)
	relay, _, stderr := r.start("--pid", "1")
	if err := relay.Wait(); err == nil || !strings.Contains(stderr.String(), "not the agent") {
		t.Errorf("a relay of another process: %v, %s", err, stderr)
	}
	if code := r.ended(); code != 1 {
		t.Errorf("the agent's exit code is %d", code)
	}
}

// TestRelayPathTaken: an agent whose path is taken serves nobody.
func TestRelayPathTaken(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "s")
	l, err := net.Listen("unixpacket", name)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	if r, err := takeRelay(ctx, name); err == nil {
		r.Close()
		t.Error("listens where another does")
	}
	if err := os.Symlink("/nowhere", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if r, err := takeRelay(ctx, filepath.Join(dir, "link")); err == nil {
		r.Close()
		t.Error("followed a link")
	}
	soon, stop2 := context.WithTimeout(ctx, 50*time.Millisecond)
	defer stop2()
	if _, err := takeRelay(soon, filepath.Join(dir, "alone")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody came: %v", err)
	}
}
