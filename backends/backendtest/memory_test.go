package backendtest

import (
	"context"
	"errors"
	"os"
	"path"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/agent"
	"github.com/sallyport/sallyport/backends"
)

func TestMain(m *testing.M) {
	agent.RunChild()
	goleak.VerifyTestMain(m)
}

// TestMemoryTidies ends a sandbox that has a socket and an X11 authority in the machine's own file system.
func TestMemoryTidies(t *testing.T) {
	m := NewMemory()
	s := start(t, Subject{Backend: m, Spec: func() backends.Spec { return backends.Spec{} }}).(forwarder)
	l := listen(t, s, "unix", "")
	out := newWatcher()
	ended := make(chan error, 1)
	go func() {
		_, err := s.Exec(context.Background(), backends.Process{
			Kind: backends.KindExec, Command: "echo $XAUTHORITY ready; exec sleep " + nap, Stdout: out, X11: &backends.X11{},
		})
		ended <- err
	}()
	if !out.wait("ready") {
		t.Fatal("did not start")
	}
	authority := strings.Fields(out.String())[0]
	if _, err := os.Stat(authority); err != nil {
		t.Error(err)
	}
	s.Close(withLimit(t))
	<-ended
	for _, name := range []string{authority, l.Addr().String()} {
		if _, err := os.Stat(path.Dir(name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("left: %s, %v", path.Dir(name), err)
		}
	}
}

// The ways in which the bytes of processes travel.
func TestMemory(t *testing.T) {
	for name, m := range map[string]*Memory{"Pipes": {}, "Streams": {Streams: true}, "Relay": {Relay: true}} {
		t.Run(name, func(t *testing.T) {
			Run(t, Subject{
				Backend: m,
				Spec:    func() backends.Spec { return backends.Spec{} },
				Kill:    func(s backends.Sandbox) error { return s.(*memorySandbox).Kill() },
			})
			if n := m.Running(); n != 0 {
				t.Errorf("%d sandboxes are left", n)
			}
		})
	}
}
