package backendtest

import (
	"errors"
	"fmt"
	"io"
	"net"
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

// BenchmarkForward measures bytes through one forwarded connection, out of and into the sandbox, to a peer on loopback.
func BenchmarkForward(b *testing.B) {
	const size = 256 << 20
	sandbox, err := NewMemory().Start(b.Context(), backends.Spec{})
	if err != nil {
		b.Fatal(err)
	}
	defer sandbox.Close(b.Context())
	for _, test := range []struct {
		name string
		peer func(net.Conn) error
		ours func(backends.HalfCloser) error
	}{
		{"out", func(c net.Conn) error {
			_, err := io.Copy(c, io.LimitReader(zeros{}, size))
			return err
		}, func(c backends.HalfCloser) error {
			_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, c, make([]byte, 64<<10))
			return err
		}},
		{"in", func(c net.Conn) error {
			_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 64<<10))
			return err
		}, func(c backends.HalfCloser) error {
			if _, err := io.CopyBuffer(c, io.LimitReader(zeros{}, size), make([]byte, 64<<10)); err != nil {
				return err
			}
			if err := c.CloseWrite(); err != nil {
				return err
			}
			_, err := c.Read(make([]byte, 1)) // the peer's end: it has all
			if err == io.EOF {
				err = nil
			}
			return err
		}},
	} {
		b.Run(test.name, func(b *testing.B) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			b.SetBytes(size)
			for b.Loop() {
				served := make(chan error, 1)
				go func() {
					c, err := l.Accept()
					if err == nil {
						err = test.peer(c)
						c.Close()
					}
					served <- err
				}()
				c, err := sandbox.(backends.Dialer).DialContext(b.Context(), "tcp", l.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				if err := errors.Join(test.ours(c.(backends.HalfCloser)), <-served, c.Close()); err != nil {
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
