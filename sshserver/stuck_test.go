package sshserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

// stuck is a backend whose Start hangs for one user until its context ends.
type stuck struct {
	backends.Backend
	user string
}

func (s *stuck) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	if spec.Owner.User == s.user {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	return s.Backend.Start(ctx, spec)
}

// failing is a backend that says why it can't.
type failing struct{ backends.Backend }

func (failing) Start(context.Context, backends.Spec) (backends.Sandbox, error) {
	return nil, fmt.Errorf("far: %w", &backends.TextError{Text: "no room: try again", Err: errors.New("node 10.0.0.1 is full")})
}

// The client reads what a backend has to say to it, and no more.
func TestTextError(t *testing.T) {
	g := newGate(t, nil)
	g.server.Backend = failing{g.backend}
	s, err := g.dial("alice").NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var errOut bytes.Buffer
	s.Stderr = &errOut
	if err := s.Run("true"); err == nil {
		t.Error("it ran")
	}
	if got := errOut.String(); !strings.Contains(got, "no room: try again") || strings.Contains(got, "10.0.0.1") {
		t.Errorf("stderr %q", got)
	}
}

// A call that hangs holds up its own connection and no other; the connection ends with a clear message.
func TestStuckBackend(t *testing.T) {
	// Long enough for the other's sandbox on a busy machine.
	g := newGate(t, func(c *Config) { c.StartTimeout = 15 * time.Second })
	g.rules.keys["bob"] = g.rules.keys["alice"]
	g.server.Backend = &stuck{g.backend, "bob"}
	bob := g.dial("bob")
	s, err := bob.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var errOut bytes.Buffer
	s.Stderr = &errOut
	if err := s.Start("true"); err != nil {
		t.Fatal(err)
	}
	alice := g.dial("alice")
	as, err := alice.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := as.Run("true"); err != nil {
		t.Errorf("another's session: %v", err)
	}
	if err := s.Wait(); err == nil {
		t.Error("bob's program ran")
	}
	if !strings.Contains(errOut.String(), "did not start in time") {
		t.Errorf("stderr %q", errOut.String())
	}
}

// The same for policy.
func TestStuckPolicy(t *testing.T) {
	g := newGate(t, nil)
	g.rules.keys["bob"] = g.rules.keys["alice"]
	g.server.Policy = &stuckPolicy{g.rules}
	failed := make(chan error, 1)
	go func() {
		c, err := ssh.Dial("tcp", g.addr, g.config("bob"))
		if err == nil {
			c.Close()
		}
		failed <- err
	}()
	alice := g.dial("alice")
	as, err := alice.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := as.Run("true"); err != nil {
		t.Errorf("another's session: %v", err)
	}
	if err := <-failed; err == nil {
		t.Error("bob was let in without a decision")
	}
}

type stuckPolicy struct{ *rules }

func (s *stuckPolicy) Login(ctx context.Context, in authz.LoginInput) (authz.Login, error) {
	if in.User == "bob" {
		<-ctx.Done()
		return authz.Login{Allow: true}, ctx.Err()
	}
	return s.rules.Login(ctx, in)
}

// screen collects what a terminal shows.
type screen struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *screen) await(t *testing.T, want string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		s.mu.Lock()
		found := strings.Contains(s.buf.String(), want)
		s.mu.Unlock()
		if found {
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t.Fatalf("no %q on the terminal: %q", want, s.buf.String())
}

func terminal(t *testing.T, g *gate) (*screen, io.WriteCloser) {
	t.Helper()
	s, err := g.dial("alice").NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestPty("xterm", 24, 80, ssh.TerminalModes{}); err != nil {
		t.Fatal(err)
	}
	out := &screen{}
	s.Stdout = out
	in, err := s.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	out.await(t, "is recorded")
	return out, in
}

// A terminal reads of a known end before it comes, and why when it does.
func TestWarnings(t *testing.T) {
	t.Run("before the grant's end", func(t *testing.T) {
		g := newGate(t, nil)
		end := time.Now().Add(62 * time.Second)
		inner := g.rules.login
		g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
			d, err := inner(in)
			d.NotAfter = end
			return d, err
		}
		out, _ := terminal(t, g)
		out.await(t, "this session ends in 1m0s")
	})
	t.Run("at its end", func(t *testing.T) {
		g := newGate(t, nil)
		out, _ := terminal(t, g)
		g.rules.change(func() {
			g.rules.login = func(authz.LoginInput) (authz.Login, error) { return authz.Login{}, nil }
		})
		out.await(t, "the grant OPS-1 has been taken back")
	})
	t.Run("drain", func(t *testing.T) {
		g := newGate(t, func(c *Config) { c.DrainTime = 2 * time.Second })
		out, in := terminal(t, g)
		stopped := make(chan struct{})
		go func() { g.server.Shutdown(context.Background()); close(stopped) }()
		out.await(t, "the gate is shutting down: this session ends in 2s")
		// The session goes on until then.
		io.WriteString(in, "echo still $((40+2))\n")
		out.await(t, "still 42")
		if _, err := ssh.Dial("tcp", g.addr, g.config("alice")); err == nil {
			t.Error("a new connection was taken")
		}
		<-stopped
	})
}
