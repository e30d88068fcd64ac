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

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
	"github.com/sallyport/sallyport/backends/backendtest"
)

// joiner is a backend in which pods run that can be joined.
type joiner struct {
	*backendtest.Memory
	pods []string

	mu     sync.Mutex
	joined []string
}

func (j *joiner) Targets(_ context.Context, spec backends.Spec, name string) (found []backends.Running, err error) {
	for _, pod := range j.pods {
		if name == "" || pod == name {
			found = append(found, backends.Running{
				ID: "uid-" + pod, Namespace: spec.Template.Target.Namespace, Name: pod, Labels: map[string]string{"app": "web"},
				Container: "main", Image: "web:1", Digest: "sha256:1",
			})
		}
	}
	return found, nil
}

// Start starts a sandbox that says what it has joined.
func (j *joiner) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	if spec.Join == nil {
		return nil, errors.New("nothing was chosen")
	}
	s, err := j.Memory.Start(ctx, spec)
	if err != nil {
		return nil, err
	}
	j.mu.Lock()
	j.joined = append(j.joined, spec.Join.Name)
	j.mu.Unlock()
	return joinedSandbox{s.(full), spec}, nil
}

type full interface {
	backends.Sandbox
	backends.Dialer
	backends.Listener
}

type joinedSandbox struct {
	full
	spec backends.Spec
}

func (s joinedSandbox) Info() backends.Info {
	info := s.full.Info()
	t := s.spec.Template.Target
	info.Joined = &backends.Joined{Running: *s.spec.Join, What: t.Parts(), Weaker: t.Weaknesses()}
	return info
}

// newJoinGate has a profile with a target, which is these pods; policy refuses those that begin with "secret".
func newJoinGate(t *testing.T, pods ...string) (*gate, *joiner) {
	g := newGate(t, nil)
	j := &joiner{Memory: g.backend, pods: pods}
	g.server.Backend = j
	login := g.rules.login
	g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
		d, err := login(in)
		d.Profile = "web-debug"
		d.Sandbox.Target = &authz.Target{Namespace: "shop", Labels: map[string]string{"app": "web"}}
		d.Permit.Target = &authz.TargetPermit{Network: true, Processes: true}
		switch {
		case in.Choice != "" && in.Choice != "web-debug" && in.Choice != "OPS-1":
			return authz.Login{Rule: "unknown-choice", Reason: "no grant " + in.Choice, ID: "d"}, nil
		case in.Target != nil && strings.HasPrefix(in.Target.Name, "secret"):
			return authz.Login{Rule: "deny", Reason: "not for you", ID: "d"}, nil
		case in.Target != nil && (in.Target.Namespace != "shop" || in.Target.Labels["app"] != "web" || in.Target.Container != "main" || in.Target.Image != "web:1"):
			return authz.Login{}, fmt.Errorf("asked about %+v", in.Target)
		}
		return d, err
	}
	return g, j
}

// ended waits for the ends of all connections, whose clients have left.
func ended(t *testing.T, g *gate) {
	t.Helper()
	for limit := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		g.server.mu.Lock()
		n := len(g.server.conns)
		g.server.mu.Unlock()
		if n == 0 {
			return
		}
		if time.Now().After(limit) {
			t.Fatalf("%d connections go on", n)
		}
	}
}

// runs runs a command without a terminal.
func runs(t *testing.T, g *gate, user, command string) (string, error) {
	t.Helper()
	c := g.dial(user)
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.CombinedOutput(command)
	c.Close()
	ended(t, g)
	return string(out), err
}

func TestTargetChosen(t *testing.T) {
	many := []string{"secret-1", "web-1", "web-2"}
	for user, test := range map[string]struct {
		pods   []string
		joined string // or
		says   string
	}{
		"alice":                     {pods: []string{"secret-1", "web-1"}, joined: "web-1"},
		"alice+web-debug":           {pods: many, says: "several targets, choose one: alice+web-debug/web-1, alice+web-debug/web-2"},
		"alice+OPS-1":               {pods: many, says: "choose one: alice+OPS-1/web-1, alice+OPS-1/web-2"},
		"alice+web-debug/web-2":     {pods: many, joined: "web-2"},
		"alice+OPS-1/web-1":         {pods: many, joined: "web-1"},
		"alice+web-debug/web":       {pods: many, says: "there is no target web for you; there is: alice+web-debug/web-1, alice+web-debug/web-2"},
		"alice+web-debug/secret-1":  {pods: many, says: "not for you"},
		"alice+web-debug/uid-web-1": {pods: many, says: "there is no target uid-web-1"},
		"alice+web-debug/shop":      {pods: []string{"secret-1"}, says: "there is no target shop for you (connection"},
		"alice+nothing/web-1":       {pods: many, says: ""},
	} {
		t.Run(user, func(t *testing.T) {
			g, j := newJoinGate(t, test.pods...)
			if test.says == "" && test.joined == "" {
				if c, err := ssh.Dial("tcp", g.addr, g.config(user)); err == nil {
					c.Close()
					t.Error("logged in")
				}
				return
			}
			out, err := runs(t, g, user, "echo ran")
			if test.joined != "" {
				if err != nil || out != "ran\n" || len(j.joined) != 1 || j.joined[0] != test.joined {
					t.Fatalf("%q, %v; joined %v", out, err, j.joined)
				}
				all := g.records()
				sb := bodies[*auditlog.Sandbox](all[0])
				if len(sb) != 1 || sb[0].Target != "shop/"+test.joined || sb[0].TargetID != "uid-"+test.joined || sb[0].TargetImage != "web:1" ||
					sb[0].TargetDigest != "sha256:1" || sb[0].TargetContainer != "main" || strings.Join(sb[0].Joined, " ") != "network processes" ||
					len(sb[0].Weaker) != 3 || !strings.Contains(sb[0].Weaker[1], "can kill") {
					t.Errorf("%+v", sb[0])
				}
				if alerts := bodies[*auditlog.Alert](all[0]); len(alerts) != 1 || alerts[0].Name != "target-joined" {
					t.Errorf("%+v", alerts)
				}
				if d := bodies[*auditlog.Decision](all[0]); len(d) != 2 {
					t.Errorf("%d decisions", len(d))
				}
				return
			}
			if err == nil || !strings.Contains(out, test.says) || strings.Contains(out, "secret") && !strings.Contains(user, "secret") {
				t.Errorf("%q, %v", out, err)
			}
			if len(j.joined) != 0 || g.backend.Started() != 0 {
				t.Errorf("joined %v", j.joined)
			}
			if got := g.cause(); got != "sandbox-failed" {
				t.Errorf("the end is %s", got)
			}
		})
	}
}

// ask opens a terminal and gives what was printed until a text came.
func ask(t *testing.T, g *gate) (s *ssh.Session, in io.WriteCloser, until func(string)) {
	t.Helper()
	s, err := g.dial("alice").NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	in, _ = s.StdinPipe()
	out, _ := s.StdoutPipe()
	if err := s.Start("stty -a >/dev/null; echo chosen; read line; echo got $line"); err != nil {
		t.Fatal(err)
	}
	var printed bytes.Buffer
	until = func(text string) {
		t.Helper()
		b := make([]byte, 1024)
		for !strings.Contains(printed.String(), text) {
			n, err := out.Read(b)
			printed.Write(b[:n])
			if err != nil {
				t.Fatalf("waited for %q: %v, %q", text, err, printed.String())
			}
		}
		_, after, _ := strings.Cut(printed.String(), text)
		printed.Reset()
		printed.WriteString(after)
	}
	return s, in, until
}

func TestTargetAsked(t *testing.T) {
	g, j := newJoinGate(t, "secret-1", "web-1", "web-2", "web-3")
	s, in, until := ask(t, g)
	until("3  web-3  (container main, image web:1)\r\nIts number, or q for none: ")
	// Out of range, no number, corrected, and what comes after belongs to the program.
	fmt.Fprint(in, "4\r")
	until("none: ")
	fmt.Fprint(in, "\x1b[A1;reboot\r")
	until("none: ")
	fmt.Fprint(in, "1\x7f2\rhello\r")
	until("chosen")
	until("got hello")
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
	if len(j.joined) != 1 || j.joined[0] != "web-2" {
		t.Errorf("joined %v", j.joined)
	}
	var output, input bytes.Buffer
	for _, d := range bodies[*auditlog.Data](g.records()[0]) {
		if d.Stream == auditlog.Input {
			input.Write(d.Data)
		} else {
			output.Write(d.Data)
		}
	}
	if !strings.Contains(output.String(), "2  web-2") || strings.Contains(output.String(), "secret") || !strings.HasPrefix(input.String(), "4\r\x1b[A1;reboot\r1\x7f2\r") {
		t.Errorf("recorded %q, typed %q", output.String(), input.String())
	}
}

func TestTargetNotChosen(t *testing.T) {
	for what, typed := range map[string]string{"^C": "\x03", "q": "q\r", "three wrong": "x\r9\r0\r", "long": strings.Repeat("1", 5000)} {
		t.Run(what, func(t *testing.T) {
			g, j := newJoinGate(t, "web-1", "web-2")
			s, in, until := ask(t, g)
			until("none: ")
			go fmt.Fprint(in, typed)
			until("several targets, choose one: alice+OPS-1/web-1, alice+OPS-1/web-2")
			var exit *ssh.ExitError
			if err := s.Wait(); !errors.As(err, &exit) || exit.ExitStatus() != failureCode {
				t.Error(err)
			}
			ended(t, g)
			if got := g.cause(); len(j.joined) != 0 || got != "sandbox-failed" {
				t.Errorf("joined %v, the end is %s", j.joined, got)
			}
		})
	}
	t.Run("hangs up", func(t *testing.T) {
		g, _ := newJoinGate(t, "web-1", "web-2")
		s, _, until := ask(t, g)
		until("none: ")
		s.Close()
		ended(t, g) // the connection has no use without a sandbox
		if got := g.cause(); got != "sandbox-failed" {
			t.Error(got)
		}
	})
}

// A target that policy takes back ends the session that has joined it, and no other.
func TestTargetRevoked(t *testing.T) {
	g, _ := newJoinGate(t, "web-1", "web-2")
	one, two := g.dial("alice+OPS-1/web-1"), g.dial("alice+OPS-1/web-2")
	for _, c := range []*ssh.Client{one, two} {
		s, err := c.NewSession()
		if err == nil {
			err = s.Run("true")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	login := g.rules.login
	g.rules.change(func() {
		g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
			if in.Target != nil && in.Target.Name == "web-1" {
				return authz.Login{Reason: "not any more", ID: "d"}, nil
			}
			return login(in)
		}
	})
	ended := make(chan struct{})
	go func() { one.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("the session goes on")
	}
	s, err := two.NewSession()
	if err == nil {
		err = s.Run("true")
	}
	if err != nil {
		t.Errorf("the other: %v", err)
	}
}

// A backend that can join nothing gives no sandbox.
func TestTargetNoJoiner(t *testing.T) {
	g, j := newJoinGate(t, "web-1")
	g.server.Backend = j.Memory
	if out, err := runs(t, g, "alice", "echo ran"); err == nil || !strings.Contains(out, "forbidden by this gate's own limits") {
		t.Errorf("%q, %v", out, err)
	}
}
