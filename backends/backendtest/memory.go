package backendtest

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sallyport/sallyport/agent"
	"github.com/sallyport/sallyport/backends"
)

// Memory is a backend without containers, for unit tests: each sandbox is the real agent, over a socket pair, with a
// home directory of its own. It isolates nothing, and heeds only Env, Home and Owner of a Spec.
//
// The agent is the test's own program executed anew, so TestMain of every package that uses it must begin with
// agent.RunChild().
type Memory struct {
	// StartErr, when it holds an error, is what Start fails with.
	StartErr atomic.Pointer[error]
	// Streams has the bytes of all processes travel on the agent's stream, as where it comes over no unix socket.
	Streams bool
	// Relay has the stream handed to the agent by a relay, as where an engine starts one.
	Relay bool

	started atomic.Int64
	running atomic.Int64
}

// NewMemory returns a backend without containers.
func NewMemory() *Memory { return &Memory{} }

// Started says how many sandboxes were started so far.
func (m *Memory) Started() int { return int(m.started.Load()) }

// Running says how many sandboxes there are.
func (m *Memory) Running() int { return int(m.running.Load()) }

// Start implements backends.Backend.
func (m *Memory) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	if !agent.Hooked() {
		return nil, errors.New("backendtest: TestMain does not call agent.RunChild")
	}
	if err := m.StartErr.Load(); err != nil {
		return nil, *err
	}
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	ours, theirs, err := m.stream()
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	base, err := os.MkdirTemp("", "sandbox-")
	if err != nil {
		ours.Close()
		return nil, err
	}
	way := []string{"--fd", "3"}
	if m.Relay {
		way = []string{"--relay", filepath.Join(base, "relay")}
	}
	home := spec.Template.Home
	if home == "" {
		home = base
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{"agent-serve", "--home", home, "--key", base64.StdEncoding.EncodeToString(public)}, way...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, spec.Template.Env...)
	cmd.Dir = base
	if !m.Relay {
		cmd.ExtraFiles = theirs
	}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		ours.Close()
		os.RemoveAll(base)
		return nil, fmt.Errorf("start agent: %w", err)
	}
	s := &memorySandbox{backend: m, base: base, cmd: cmd, exited: make(chan struct{}), image: spec.Template.Image}
	m.started.Add(1)
	m.running.Add(1)
	go func() {
		cmd.Wait() // the agent's exit code says nothing that the stream's end does not
		close(s.exited)
	}()
	if m.Relay {
		if err := s.startRelay(theirs, way[1]); err != nil {
			ours.Close()
			s.cmd.Process.Kill()
			s.remove()
			return nil, err
		}
	}
	for _, f := range theirs {
		f.Close()
	}
	if m.Streams {
		ours = struct{ net.Conn }{ours}
	}
	s.Client, err = agent.NewClient(ctx, ours, private, agent.Hello{
		User: spec.Owner.User, Deadline: spec.Owner.Expires, Audit: spec.Template.ExecAudit, Reports: spec.Reports,
	})
	if err != nil {
		s.remove()
		return nil, err
	}
	return s, nil
}

// stream makes a stream: the gate's end of it, and the agent's as files.
func (m *Memory) stream() (net.Conn, []*os.File, error) {
	if !m.Relay {
		ours, theirs, err := socketPair()
		return ours, []*os.File{theirs}, err
	}
	stdin, in, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer in.Close()
	out, stdout, err := os.Pipe()
	if err != nil {
		stdin.Close()
		return nil, nil, err
	}
	defer out.Close()
	ours, err := agent.NewPipeConn(out, in)
	if err != nil {
		stdin.Close()
		stdout.Close()
		return nil, nil, err
	}
	return ours, []*os.File{stdin, stdout}, nil
}

// startRelay starts the relay of the agent that waits at the path.
func (s *memorySandbox) startRelay(stdio []*os.File, path string) error {
	s.relay = exec.Command("/proc/self/exe")
	s.relay.Args = []string{"agent-relay", "--socket", path, "--pid", strconv.Itoa(s.cmd.Process.Pid)}
	s.relay.Stdin, s.relay.Stdout, s.relay.Stderr = stdio[0], stdio[1], os.Stderr
	s.relay.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.relay.Start(); err != nil {
		s.relay = nil
		return fmt.Errorf("start relay: %w", err)
	}
	return nil
}

func socketPair() (net.Conn, *os.File, error) {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	f := os.NewFile(uintptr(pair[0]), "stream")
	defer f.Close()
	theirs := os.NewFile(uintptr(pair[1]), "stream")
	ours, err := net.FileConn(f)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

type memorySandbox struct {
	*agent.Client
	backend *Memory
	base    string // directory, removed at the end
	image   string
	cmd     *exec.Cmd
	relay   *exec.Cmd     // nil: none
	exited  chan struct{} // closed when cmd has been waited for
	gone    sync.Once
}

func (s *memorySandbox) ID() string { return strconv.Itoa(s.cmd.Process.Pid) }

func (s *memorySandbox) Info() backends.Info {
	return backends.Info{Backend: "memory", Image: s.image, Digest: "none", ExecAudit: s.ExecAudit()}
}

// Kill ends the sandbox as if by itself, for tests. As the kernel does in a container, it ends all processes.
func (s *memorySandbox) Kill() error {
	all := descendants(s.cmd.Process.Pid)
	err := s.cmd.Process.Kill()
	for _, pid := range all {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	return err
}

func descendants(pid int) []int {
	var all []int
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		b, _ := os.ReadFile(list)
		for _, field := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(field); err == nil {
				all = append(append(all, child), descendants(child)...)
			}
		}
	}
	return all
}

func (s *memorySandbox) Close(context.Context) error {
	s.Client.Close()
	s.remove()
	return nil
}

func (s *memorySandbox) remove() {
	s.gone.Do(func() {
		select {
		case <-s.exited:
		case <-time.After(10 * time.Second):
			s.cmd.Process.Kill()
			<-s.exited
		}
		if s.relay != nil {
			s.relay.Wait() // it ends with the agent
		}
		os.RemoveAll(s.base)
		s.backend.running.Add(-1)
	})
}
