package backendtest

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/agent"
	"github.com/sallyport/sallyport/backends"
)

func TestMain(m *testing.M) {
	agent.RunChild()
	goleak.VerifyTestMain(m)
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
