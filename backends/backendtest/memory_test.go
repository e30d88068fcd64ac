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

func TestMemory(t *testing.T) {
	m := NewMemory()
	Run(t, Subject{
		Backend: m,
		Spec:    func() backends.Spec { return backends.Spec{} },
		Kill:    func(s backends.Sandbox) error { return s.(*memorySandbox).Kill() },
	})
	if n := m.Running(); n != 0 {
		t.Errorf("%d sandboxes are left", n)
	}
}
