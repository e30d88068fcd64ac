package transfer

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/agent/sftp"
)

// relayEnv names the socket that the test's binary joins to its stdin and stdout: real sftp and scp clients start it in
// the place of ssh.
const relayEnv = "SALLYPORT_TRANSFER_RELAY"

func TestMain(m *testing.M) {
	if socket := os.Getenv(relayEnv); socket != "" {
		relay(socket)
		return
	}
	goleak.VerifyTestMain(m)
}

func relay(socket string) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Fprintf(c, "%s\n", os.Args[len(os.Args)-1])
	go func() {
		io.Copy(c, os.Stdin)
		c.(*net.UnixConn).CloseWrite()
	}()
	io.Copy(os.Stdout, c)
	os.Exit(0)
}

// recording is what a decoder said.
type recording struct {
	mu      sync.Mutex
	events  []*Event
	raw     [2]bytes.Buffer
	rawAt   [2]int64 // -1: none
	content map[string][]byte
	kept    int
}

func newRecording() *recording {
	return &recording{rawAt: [2]int64{-1, -1}, content: make(map[string][]byte)}
}

func (r *recording) config(server, client io.Writer) Config {
	return Config{
		Server: server, Client: client,
		Event: func(e *Event) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.events = append(r.events, e)
			return nil
		},
		Raw: func(d Direction, offset uint64, p []byte) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.rawAt[d] < 0 {
				r.rawAt[d] = int64(offset)
			} else if int64(offset) != r.rawAt[d]+int64(r.raw[d].Len()) {
				panic("a gap in the raw bytes")
			}
			r.raw[d].Write(p)
			return nil
		},
		Content: func(id uint64, d Direction, offset uint64, p []byte) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			k := fmt.Sprint(id, d)
			b := r.content[k]
			if need := int(offset) + len(p); need > len(b) {
				b = append(b, make([]byte, need-len(b))...)
			}
			copy(b[offset:], p)
			r.content[k] = b
			r.kept += len(p)
			return nil
		},
		FileLimit: 1 << 30, SessionLimit: 1 << 30,
	}
}

func (r *recording) of(k Kind) (list []*Event) {
	for _, e := range r.events {
		if e.Kind == k {
			list = append(list, e)
		}
	}
	return list
}

// one is the only event of a kind whose path ends so.
func (r *recording) one(t *testing.T, k Kind, suffix string) *Event {
	t.Helper()
	var found *Event
	for _, e := range r.of(k) {
		if strings.HasSuffix(e.Path.Asked, suffix) {
			if found != nil {
				t.Fatalf("two events %s of %s:\n%s", k, suffix, dump(r.events))
			}
			found = e
		}
	}
	if found == nil {
		t.Fatalf("no event %s of %s:\n%s", k, suffix, dump(r.events))
	}
	return found
}

func dump(events []*Event) string {
	var b strings.Builder
	for _, e := range events {
		fmt.Fprintf(&b, "%+v\n", *e)
	}
	return b.String()
}

// decoder is SFTP or SCP.
type decoder interface {
	Client([]byte) error
	Server([]byte) error
	Finish() error
}

// server is the program behind a decoder.
type server func(t *testing.T, command, dir string) (in io.WriteCloser, out io.Reader, wait func())

// requireClients is the environment's word that no test may be skipped for want of OpenSSH's programs.
const requireClients = "SALLYPORT_REQUIRE_CLIENTS"

// opensshServer is OpenSSH's sftp-server.
func opensshServer(t *testing.T, _, dir string) (io.WriteCloser, io.Reader, func()) {
	return program(t, dir, sftpServer(t))
}

func sftpServer(t *testing.T) string {
	for _, p := range []string{"/usr/lib/openssh/sftp-server", "/usr/libexec/sftp-server", "/usr/lib/ssh/sftp-server"} {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	if os.Getenv(requireClients) != "" {
		t.Fatal("the package openssh-sftp-server is missing, and " + requireClients + " is set")
	}
	t.Skip("NOT TESTED: no sftp-server on this machine; the tests with our own server remain")
	return ""
}

func shell(t *testing.T, command, dir string) (io.WriteCloser, io.Reader, func()) {
	return program(t, dir, "/bin/sh", "-c", command)
}

func program(t *testing.T, dir, name string, args ...string) (io.WriteCloser, io.Reader, func()) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW := io.Pipe()
	cmd.Stdout = outW
	cmd.Stderr = testWriter{t}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		cmd.Wait()
		outW.Close()
		close(done)
	}()
	return in, outR, func() { <-done }
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("server: %s", p)
	return len(p), nil
}

// agentServer is the server our agent has.
func agentServer(t *testing.T, _, dir string) (io.WriteCloser, io.Reader, func()) {
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	done := make(chan struct{})
	go func() {
		if err := sftp.Serve(inR, outW, sftp.Config{Dir: dir, Home: dir}); err != nil {
			t.Logf("server: %v", err)
		}
		inR.Close()
		outW.Close()
		close(done)
	}()
	return inW, outR, func() { <-done }
}

// couple joins a client's connection and a server through a decoder until both have ended.
func couple(t *testing.T, c io.ReadWriteCloser, in io.WriteCloser, out io.Reader, d decoder) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		feed(out, d.Server)
		c.Close()
		io.Copy(io.Discard, out)
	}()
	feed(c, d.Client)
	in.Close()
	<-done
	if err := d.Finish(); err != nil {
		t.Errorf("Finish: %v", err)
	}
}

func feed(r io.Reader, f func([]byte) error) error {
	b := make([]byte, 32<<10)
	for {
		n, err := r.Read(b)
		if n > 0 {
			if err := f(b[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
	}
}

// client runs a real client, whose ssh is a relay to a decoder before the server. It returns what the client printed and
// whether it ended well.
func client(t *testing.T, dir string, srv server, decoderFor func(command string, server, client io.Writer) decoder,
	name string, args ...string) (string, bool) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		if os.Getenv(requireClients) != "" {
			t.Fatalf("%v, and %s is set", err, requireClients)
		}
		t.Skip("NOT TESTED: ", err)
	}
	short, err := os.MkdirTemp("", "tr")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(short)
	l, err := net.Listen("unix", filepath.Join(short, "s"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			var command []byte
			for b := []byte{0}; ; {
				if _, err := c.Read(b); err != nil || b[0] == '\n' {
					break
				}
				command = append(command, b[0])
			}
			in, out, wait := srv(t, string(command), dir)
			couple(t, c, in, out, decoderFor(string(command), in, c))
			wait()
		}
	}()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name, append([]string{"-S", self}, args...)...)
	cmd.Env = append(os.Environ(), relayEnv+"="+filepath.Join(short, "s"))
	cmd.Dir = dir
	b, err := cmd.CombinedOutput()
	l.Close()
	<-done
	t.Logf("%s %q:\n%s", name, args, b)
	return string(b), err == nil
}
