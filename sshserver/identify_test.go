package sshserver

import (
	"context"
	"testing"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/backends"
	"github.com/sallyport/sallyport/backends/backendtest"
)

// lateBackend learns of an image's digest when the sandbox is closed, or never.
type lateBackend struct {
	*backendtest.Memory
	digest string
}

func (b lateBackend) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	s, err := b.Memory.Start(ctx, spec)
	if err != nil {
		return nil, err
	}
	return lateSandbox{s.(full), b.digest}, nil
}

type lateSandbox struct {
	full
	digest string
}

func (s lateSandbox) Info() backends.Info {
	info := s.full.Info()
	info.Digest = ""
	return info
}

func (s lateSandbox) Digest() func(context.Context) string {
	return func(ctx context.Context) string {
		select {
		case <-s.Done():
			return s.digest
		case <-ctx.Done():
			return ""
		}
	}
}

// TestIdentify: a digest that is told at the very end is in the log, as a second record of the same sandbox; one that is never
// told leaves the first alone, and holds up nothing.
func TestIdentify(t *testing.T) {
	for _, digest := range []string{"sha256:late", ""} {
		g := newGate(t, nil)
		g.server.Backend = lateBackend{g.backend, digest}
		c := g.dial("alice")
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Run("echo hi"); err != nil {
			t.Fatal(err)
		}
		c.Close()
		ended(t, g)
		found := bodies[*auditlog.Sandbox](g.records()[0])
		if len(found) == 0 || found[0].Digest != "" {
			t.Fatalf("%+v", found)
		}
		if digest == "" {
			if len(found) != 1 {
				t.Errorf("%+v", found)
			}
			continue
		}
		if len(found) != 2 || found[1].Digest != digest || found[1].ID != found[0].ID || found[1].ExecAudit != found[0].ExecAudit || found[1].Took != 0 {
			t.Errorf("%+v", found)
		}
	}
}
