package backendtest

import (
	"fmt"
	"io"
	"testing"

	"github.com/sallyport/sallyport/backends"
)

// BenchmarkBytes measures bytes through one process, out of and into the sandbox.
func BenchmarkBytes(b *testing.B) {
	const size = 256 << 20
	s, err := NewMemory().Start(b.Context(), backends.Spec{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close(b.Context())
	for _, test := range []struct {
		name, command string
		stdin         io.Reader
	}{
		{"out", fmt.Sprintf("dd if=/dev/zero bs=64k count=%d 2>/dev/null", size>>16), nil},
		{"in", "dd of=/dev/null bs=64k 2>/dev/null", zeros{}},
	} {
		b.Run(test.name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				p := backends.Process{Kind: backends.KindExec, Command: test.command, Stdout: io.Discard}
				if test.stdin != nil {
					p.Stdin = io.LimitReader(test.stdin, size)
				}
				if _, err := s.Exec(b.Context(), p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func BenchmarkPrograms(b *testing.B) {
	BenchmarkExecAudit(b, NewMemory(), func() backends.Spec { return backends.Spec{} })
}
