package sshserver

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
)

// A flood that is still under way when its connection ends leaves nothing, and holds nothing up.
func TestFloodAtTheEnd(t *testing.T) {
	for _, kind := range []string{"channel-request", "global-request", "channel-open"} {
		t.Run(kind, func(t *testing.T) {
			g := newGate(t, nil)
			c := g.dial("alice")
			s, err := c.NewSession()
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Start("sleep 600"); err != nil {
				t.Fatal(err)
			}
			var flood sync.WaitGroup
			flood.Add(1)
			go func() {
				defer flood.Done()
				for range 3000 {
					switch kind {
					case "channel-request":
						if _, err := s.SendRequest("xyz", false, nil); err != nil {
							return
						}
					case "global-request":
						if _, _, err := c.SendRequest("xyz", false, nil); err != nil {
							return
						}
					case "channel-open":
						flood.Add(1)
						go func() { defer flood.Done(); c.OpenChannel("session", nil) }()
					}
				}
			}()
			time.Sleep(time.Second)
			began := time.Now()
			g.server.End(g.server.Sessions()[0].ID, "x")
			g.ended(t)
			if took := time.Since(began); took > finishTime/2 {
				t.Errorf("the end took %s", took)
			}
			c.Close()
			flood.Wait()
		})
	}
}

// ended waits until the gate has no connection.
func (g *gate) ended(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		g.server.mu.Lock()
		n := len(g.server.conns)
		g.server.mu.Unlock()
		if n == 0 {
			return
		}
	}
	t.Fatal("a connection does not end")
}

// One who is over their limit and stays connected locks nobody else out.
func TestOverLimitStays(t *testing.T) {
	g := newGate(t, func(c *Config) { c.MaxSessionsPerUser, c.MaxSessions, c.MaxStartupsPerSource = 1, 8, 8 })
	g.rules.keys["bob"] = g.rules.keys["alice"]
	g.dial("alice")
	for range 7 {
		nc, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		go func() { // keeps its end open after the refusal
			ssh.NewClientConn(keepOpen{nc}, g.addr, g.config("alice"))
		}()
	}
	var last error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		var c *ssh.Client
		if c, last = ssh.Dial("tcp", g.addr, g.config("bob")); last == nil {
			c.Close()
			return
		}
	}
	t.Errorf("bob is locked out: %v", last)
}

type keepOpen struct{ net.Conn }

func (keepOpen) Close() error { return nil }

// slowLink forwards to addr and lets rate bytes a second through towards the client, with little in its buffers.
func slowLink(t *testing.T, addr string, rate int) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		client, err := l.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", addr)
		if err != nil {
			client.Close()
			return
		}
		server.(*net.TCPConn).SetReadBuffer(16 << 10)
		wg.Add(1)
		go func() {
			defer wg.Done()
			io.Copy(server, client)
			server.Close()
		}()
		defer client.Close()
		buf := make([]byte, rate/20)
		for {
			n, err := server.Read(buf)
			if n > 0 {
				if _, err := client.Write(buf[:n]); err != nil {
					break
				}
				time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
			}
			if err != nil {
				break
			}
		}
		server.Close()
	}()
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// A client on a slow line is neither silent nor done before it has read everything.
func TestSlowLine(t *testing.T) {
	g := newGate(t, func(c *Config) { c.KeepAliveInterval, c.KeepAliveCount = time.Second, 2 })
	const size, rate = 1500000, 150 << 10 // ten seconds
	c, err := ssh.Dial("tcp", slowLink(t, g.addr, rate), g.config("alice"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s.Stdout = &out
	if err := s.Run("head -c 1500000 /dev/zero"); err != nil || out.Len() != size {
		t.Errorf("%v, %d bytes of %d", err, out.Len(), size)
	}
	c.Close()
	if got := g.causeSoon(); got != "client-left" {
		t.Errorf("cause %s", got)
	}
}

// A channel that the gate has closed and the client has not keeps its place: what it holds is bounded.
func TestUnansweredClose(t *testing.T) {
	g := newGate(t, func(c *Config) { c.MaxChannels = 3 })
	nc, err := net.Dial("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	// x/crypto's client answers a close by itself; this one stops hearing after it has sent its requests.
	deaf := &deafConn{Conn: nc}
	conn, chans, reqs, err := ssh.NewClientConn(deaf, g.addr, g.config("alice"))
	if err != nil {
		t.Fatal(err)
	}
	c := ssh.NewClient(conn, chans, reqs)
	defer c.Close()
	ch, chReqs, err := c.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ch.Close()
	go ssh.DiscardRequests(chReqs)
	deaf.stop.Store(true)
	if _, err := ch.SendRequest("exec", false, ssh.Marshal(execMsg{"true"})); err != nil {
		t.Fatal(err)
	}
	// The program has ended and the gate has closed the channel when its exit is recorded; the sandbox is idle then.
	time.Sleep(500 * time.Millisecond)
	if n := open(g); n != 1 {
		t.Errorf("the gate counts %d channels, want the one that the client has not closed", n)
	}
	nc.Close()
}

// deafConn swallows what comes once stop is set.
type deafConn struct {
	net.Conn
	stop atomic.Bool
}

func (d *deafConn) Read(p []byte) (int, error) {
	for {
		n, err := d.Conn.Read(p)
		if err != nil || !d.stop.Load() {
			return n, err
		}
	}
}

// The end of a grant comes on time, also while policy hangs.
func TestExpiryWhilePolicyHangs(t *testing.T) {
	g := newGate(t, nil)
	end := time.Now().Add(1500 * time.Millisecond)
	inner := g.rules.login
	var hang atomic.Bool
	g.server.Policy = &hanging{g.rules, &hang}
	g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
		d, err := inner(in)
		d.NotAfter = end
		return d, err
	}
	s, err := g.dial("alice").NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("sleep 600"); err != nil {
		t.Fatal(err)
	}
	hang.Store(true)
	g.rules.change(func() {})
	s.Wait()
	if late := time.Since(end); late > policyTimeout/2 {
		t.Errorf("the session ended %s after its grant", late)
	}
	if got := g.causeSoon(); got != "expired" {
		t.Errorf("cause %s", got)
	}
}

type hanging struct {
	*rules
	on *atomic.Bool
}

func (h *hanging) Login(ctx context.Context, in authz.LoginInput) (authz.Login, error) {
	if h.on.Load() {
		<-ctx.Done()
		return authz.Login{}, ctx.Err()
	}
	return h.rules.Login(ctx, in)
}

// A shell that reads with ECHO off is told to the auditor.
func TestHiddenShell(t *testing.T) {
	g := newGate(t, nil)
	out, in := terminal(t, g)
	io.WriteString(in, "stty -echo; PS1=; echo off-$((40+2)); exec sh\n")
	out.await(t, "off-42")
	io.WriteString(in, "echo done-$((40+2))\n")
	out.await(t, "done-42")
	io.WriteString(in, "exit\n")
	time.Sleep(300 * time.Millisecond)
	found := false
	for _, a := range bodies[*auditlog.Alert](g.records()[0]) {
		found = found || a.Name == "hidden-input"
	}
	if !found {
		t.Error("no alert in the log")
	}
}

// A refused program says why, so that OpenSSH's client shows it.
func TestRefusedProgram(t *testing.T) {
	g := newGate(t, nil)
	g.rules.request = func(in authz.RequestInput) (authz.Verdict, error) {
		return authz.Verdict{Reason: in.Type + " is not permitted by profile debug"}, nil
	}
	c := g.dial("alice")
	for what, run := range map[string]func(*ssh.Session) error{
		"exec":  func(s *ssh.Session) error { return s.Run("true") },
		"shell": func(s *ssh.Session) error { return errors.Join(s.Shell(), s.Wait()) },
	} {
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		var errOut bytes.Buffer
		s.Stderr = &errOut
		err = run(s)
		var exit *ssh.ExitError
		if !errors.As(err, &exit) || exit.ExitStatus() != failureCode || !strings.Contains(errOut.String(), what+" is not permitted") {
			t.Errorf("%s: %v, stderr %q", what, err, errOut.String())
		}
	}
	c.Close()
	for _, r := range bodies[*auditlog.Request](g.records()[0]) {
		if r.OK {
			t.Errorf("recorded as served: %+v", r)
		}
	}
}

// Handshakes that fail leave no goroutine of x/crypto's. drain must find its queue in this version.
func TestDrain(t *testing.T) {
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		nc, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return
		}
		ssh.NewClientConn(nc, "", &ssh.ClientConfig{User: "x", HostKeyCallback: ssh.InsecureIgnoreHostKey(), Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}})
	}()
	nc, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var pre ssh.ServerPreAuthConn
	cfg := &ssh.ServerConfig{
		PreAuthConnCallback: func(p ssh.ServerPreAuthConn) { pre = p },
		PublicKeyCallback:   func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, errors.New("no") },
	}
	cfg.AddHostKey(signer)
	if _, _, _, err := ssh.NewServerConn(nc, cfg); err == nil {
		t.Fatal("logged in")
	}
	done := make(chan bool, 1)
	go func() { done <- drain(pre) }()
	select {
	case found := <-done:
		if !found {
			t.Error("x/crypto's queue was not found: see drain")
		}
	case <-time.After(10 * time.Second):
		t.Error("the queue does not end")
	}
}

// Between the gate's NEWKEYS and its next answer a client gets few bytes read.
func TestLockstep(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	var heard atomic.Bool
	l := newLockstep(near, &heard)
	go io.Copy(io.Discard, far)
	newKeys := []byte{0, 0, 0, 12, 10, msgNewKeys, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if _, err := l.Write(newKeys); err != nil {
		t.Fatal(err)
	}
	go far.Write(make([]byte, 3*firstBudget))
	got := make(chan int, 100)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			n, err := l.Read(make([]byte, 200))
			if err != nil {
				return
			}
			got <- n
		}
	}()
	sum := func(want int) {
		t.Helper()
		total := 0
		for {
			select {
			case n := <-got:
				total += n
			case <-time.After(300 * time.Millisecond):
				if total != want {
					t.Errorf("%d bytes were read, want %d", total, want)
				}
				return
			}
		}
	}
	sum(firstBudget)
	if !heard.Load() {
		t.Error("not heard")
	}
	l.Write([]byte("an answer"))
	sum(firstBudget)
	l.release()
	sum(firstBudget)
	l.Close()
	<-ended
}

// What is written is written, in order and at the latest when the connection is closed; a reader that does not read holds
// up nobody for long.
func TestBatchConn(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	pair := func() (*batchConn, net.Conn) {
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return newBatchConn(server), client
	}
	b, client := pair()
	want := make([]byte, 5<<20)
	rand.Read(want)
	go func() {
		for rest := want; len(rest) > 0; {
			n := min(len(rest), 1+len(rest)%40000)
			b.Write(rest[:n])
			rest = rest[n:]
		}
		b.Close()
	}()
	got, err := io.ReadAll(client)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v: not what was written", len(got), err)
	}
	client.Close()
	if _, err := b.Write([]byte("x")); err == nil {
		t.Error("a write after Close")
	}

	b, client = pair()
	defer client.Close()
	go func() { client.Write(want); client.(*net.TCPConn).CloseWrite() }()
	if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	stuck := make(chan struct{})
	go func() {
		defer close(stuck)
		for {
			if _, err := b.Write(want); err != nil {
				return
			}
		}
	}()
	time.Sleep(200 * time.Millisecond)
	began := time.Now()
	b.Close()
	<-stuck
	if took := time.Since(began); took > 5*flushTime {
		t.Errorf("closing took %s", took)
	}
	runtime.KeepAlive(b)
}
