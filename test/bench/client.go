package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// The same for every target: what a current client would choose of what all of them have.
const (
	keyExchange = "curve25519-sha256"
	aes         = "aes128-gcm@openssh.com"
	chacha      = "chacha20-poly1305@openssh.com"
)

const (
	commandLimit = 10 * time.Minute // of one command of OpenSSH's client
	promptLimit  = time.Minute
	checkBytes   = 16 << 20
)

// sshClient is how targets are reached: with OpenSSH's programs, or with one in Go where phases are to be told apart.
type sshClient struct {
	key    string // file
	known  string // file
	memory string // directory for control sockets, whose paths must be short
	config *ssh.ClientConfig
}

func newClient(b *bench) (*sshClient, error) {
	c := &sshClient{key: b.path("demo", "id_ed25519"), known: b.path("known_hosts"), memory: b.memory}
	var lines strings.Builder
	add := func(t target, pub string) {
		host, port, _ := net.SplitHostPort(t.addr)
		fmt.Fprintf(&lines, "[%s]:%s %s\n", host, port, strings.TrimSpace(pub))
	}
	add(b.sshd.target, b.sshd.pub)
	for _, g := range []*gate{b.gate, b.off, b.encrypted} {
		pub, err := g.hostKey()
		if err != nil {
			return nil, err
		}
		add(g.target, pub)
	}
	if err := os.WriteFile(c.known, []byte(lines.String()), 0o600); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(c.key)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.ParsePrivateKey(text)
	if err != nil {
		return nil, err
	}
	c.config = &ssh.ClientConfig{
		Config: ssh.Config{KeyExchanges: []string{keyExchange}, Ciphers: []string{aes}},
		Auth:   []ssh.AuthMethod{ssh.PublicKeys(signer)},
		// Servers of our own on loopback; OpenSSH's client checks the keys in known_hosts all the same.
		HostKeyCallback:   ssh.InsecureIgnoreHostKey(),
		HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
	}
	for _, name := range []string{"ssh", "sftp"} {
		if _, err := exec.LookPath(name); err != nil {
			return nil, fmt.Errorf("%w: install openssh-client", err)
		}
	}
	return c, nil
}

// know adds a target's host key.
func (c *sshClient) know(t *target, pub string) error {
	f, err := os.OpenFile(c.known, os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	host, port, _ := net.SplitHostPort(t.addr)
	_, err = fmt.Fprintf(f, "[%s]:%s %s\n", host, port, strings.TrimSpace(pub))
	return errors.Join(err, f.Close())
}

// options are those of ssh and sftp alike.
func (c *sshClient) options(t *target, cipher string) []string {
	_, port, _ := net.SplitHostPort(t.addr)
	args := []string{"-F", "none", "-i", c.key}
	for _, o := range []string{
		"Port=" + port, "BatchMode=yes", "IdentitiesOnly=yes", "KexAlgorithms=" + keyExchange, "Ciphers=" + cipher,
		"UserKnownHostsFile=" + c.known, "GlobalKnownHostsFile=none", "StrictHostKeyChecking=yes", "LogLevel=ERROR",
		"IgnoreUnknown=ObscureKeystrokeTiming", "ObscureKeystrokeTiming=no",
	} {
		args = append(args, "-o", o)
	}
	return args
}

func (t *target) login() string { return t.user + "@127.0.0.1" }

// command is one of OpenSSH's client programs. Its end is bounded.
func command(ctx context.Context, name string, args ...string) (*exec.Cmd, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	return cmd, cancel
}

// ssh runs a command on the target to its end. more are further options.
func (c *sshClient) ssh(ctx context.Context, t *target, cipher string, more []string, stdin io.Reader, stdout io.Writer,
	remote string) error {
	args := append(append(c.options(t, cipher), more...), t.login(), remote)
	cmd, cancel := command(ctx, "ssh", args...)
	defer cancel()
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("ssh %q: %w: %s", remote, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return nil
}

// master is a connection that is there, for channels to be opened on it.
type master struct {
	c      *sshClient
	t      *target
	cipher string
	socket string
	cmd    *exec.Cmd
	cancel context.CancelFunc
	gone   chan error
	once   sync.Once // closes it
}

// connect opens a connection; a sandbox is there when it returns.
func (c *sshClient) connect(ctx context.Context, t *target, cipher string) (*master, error) {
	m := &master{c: c, t: t, cipher: cipher, socket: filepath.Join(c.memory, rand.Text()[:8]), gone: make(chan error, 1)}
	m.cmd, m.cancel = command(ctx, "ssh", append(c.options(t, cipher), "-M", "-N", "-S", m.socket, t.login())...)
	var stderr bytes.Buffer
	m.cmd.Stderr = &stderr
	if err := m.cmd.Start(); err != nil {
		m.cancel()
		return nil, err
	}
	go func() { m.gone <- m.cmd.Wait() }()
	for {
		if _, err := os.Stat(m.socket); err == nil { // ssh makes it when it has logged in
			break
		}
		select {
		case err := <-m.gone:
			m.cancel()
			return nil, fmt.Errorf("ssh -M: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
		case <-time.After(5 * time.Millisecond):
		}
	}
	if err := m.run(ctx, nil, nil, "true"); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *master) run(ctx context.Context, stdin io.Reader, stdout io.Writer, remote string) error {
	return m.c.ssh(ctx, m.t, m.cipher, []string{"-S", m.socket}, stdin, stdout, remote)
}

// close ends the connection. A second close does nothing.
func (m *master) close() {
	m.once.Do(func() {
		defer m.cancel()
		// A signal between ssh's look for one and its wait for the connection is seen when something comes next, which may
		// be never: it is sent until it works, at the latest until command's limit is over.
		for {
			m.cmd.Process.Signal(syscall.SIGTERM) // it may be gone
			select {
			case <-m.gone:
				return
			case <-time.After(200 * time.Millisecond):
			}
		}
	})
}

// check compares what passes a target, both ways.
func (b *bench) check(ctx context.Context, t *target) error {
	f, err := os.Open(b.path("demo", "production", "random"))
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, io.LimitReader(f, checkBytes)); err != nil {
		return err
	}
	want := hex.EncodeToString(sum.Sum(nil))
	sum.Reset()
	head := fmt.Sprintf("head -c %d %s/random", checkBytes, t.data)
	if err := b.client.ssh(ctx, t, aes, nil, nil, sum, head); err != nil {
		return err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		return errors.New("what came down is not what was sent")
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	var out bytes.Buffer
	if err := b.client.ssh(ctx, t, aes, nil, io.LimitReader(f, checkBytes), &out, "sha256sum"); err != nil {
		return err
	}
	if got, _, _ := strings.Cut(out.String(), " "); got != want {
		return errors.New("what came up is not what was sent")
	}
	return nil
}

// goConn is a connection of the client in Go.
type goConn struct {
	*ssh.Client
	handshake time.Duration // connect, key exchange, authentication
}

func (c *sshClient) dial(ctx context.Context, t *target) (*goConn, error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, promptLimit)
	defer cancel()
	nc, err := new(net.Dialer).DialContext(ctx, "tcp", t.addr)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	config := *c.config
	config.User = t.user
	conn, channels, requests, err := ssh.NewClientConn(nc, t.addr, &config)
	if !stop() || err != nil {
		nc.Close()
		return nil, errors.Join(err, ctx.Err())
	}
	return &goConn{Client: ssh.NewClient(conn, channels, requests), handshake: time.Since(began)}, nil
}

// phases are the steps of a `true`.
type phases struct{ open, reply, exit time.Duration }

// runTrue runs true on a channel of its own.
func (c *goConn) runTrue() (phases, error) {
	var p phases
	limit := time.AfterFunc(promptLimit, func() { c.Close() })
	defer limit.Stop()
	began := time.Now()
	ch, requests, err := c.OpenChannel("session", nil)
	if err != nil {
		return p, err
	}
	defer ch.Close()
	p.open = time.Since(began)
	began = time.Now()
	ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{"true"}))
	if err != nil || !ok {
		return p, fmt.Errorf("exec: accepted %v: %w", ok, err)
	}
	p.reply = time.Since(began)
	began = time.Now()
	for r := range requests {
		if r.Type != "exit-status" {
			continue
		}
		p.exit = time.Since(began)
		var m struct{ Code uint32 }
		if err := ssh.Unmarshal(r.Payload, &m); err != nil || m.Code != 0 {
			return p, fmt.Errorf("true ended with %d: %w", m.Code, err)
		}
		return p, nil
	}
	return p, errors.New("the channel was closed without an exit status")
}

// terminal is a shell at its prompt.
type terminal struct {
	session *ssh.Session
	in      io.WriteCloser
	out     *tail
}

// shell asks for a terminal and a shell, and waits for the prompt. What it prints is read to its end.
func (c *goConn) shell() (*terminal, error) {
	s, err := c.NewSession()
	if err != nil {
		return nil, err
	}
	t := &terminal{session: s, out: newTail()}
	s.Stdout = t.out
	if t.in, err = s.StdinPipe(); err != nil {
		return nil, err
	}
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		return nil, err
	}
	if err := s.Shell(); err != nil {
		return nil, err
	}
	return t, t.out.wait(isPrompt)
}

// tail keeps the end of what is written to it.
type tail struct {
	mu  sync.Mutex // guards buf
	buf []byte
	new chan struct{} // something was written; holds one
}

func newTail() *tail { return &tail{new: make(chan struct{}, 1)} }

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	t.buf = append(t.buf, p...)
	if n := len(t.buf) - 4096; n > 0 {
		t.buf = append(t.buf[:0], t.buf[n:]...)
	}
	t.mu.Unlock()
	select {
	case t.new <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (t *tail) clear() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = nil
}

// wait waits until what was written is as wanted.
func (t *tail) wait(wanted func([]byte) bool) error {
	limit := time.NewTimer(promptLimit)
	defer limit.Stop()
	for {
		t.mu.Lock()
		ok := wanted(t.buf)
		text := string(t.buf)
		t.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-t.new:
		case <-limit.C:
			return fmt.Errorf("no prompt came within %v, but %q", promptLimit, text)
		}
	}
}

var escapes = regexp.MustCompile("\x1b(\\[[0-9;?]*[a-zA-Z]|\\][^\x07]*\x07)")

// isPrompt says whether text ends as the prompt of a shell does.
func isPrompt(text []byte) bool {
	text = escapes.ReplaceAll(text, nil)
	return bytes.HasSuffix(text, []byte("$ ")) || bytes.HasSuffix(text, []byte("# "))
}
