package kubernetes

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// failing takes so many bytes and then fails.
type failing struct{ left int }

func (f *failing) Write(b []byte) (int, error) {
	if f.left -= len(b); f.left < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(b), nil
}

// TestOutput: all bytes pass in whatever pieces they come, and the first error of either side is told.
func TestOutput(t *testing.T) {
	data := make([]byte, 200<<10)
	rand.Read(data)
	pieces := func(sizes ...int) io.Reader { // of a connection: one piece at each read at most
		r, w := io.Pipe()
		go func() {
			rest := data
			for i := 0; len(rest) > 0; i++ {
				n := min(sizes[i%len(sizes)], len(rest))
				w.Write(rest[:n])
				rest = rest[n:]
			}
			w.Close()
		}()
		return r
	}
	for name, r := range map[string]io.Reader{
		"whole": bytes.NewReader(data), "end with data": iotest.DataErrReader(bytes.NewReader(data)), "halves": iotest.HalfReader(bytes.NewReader(data)),
		"small": pieces(1, 7, 100), "large": pieces(32 << 10), "mixed": pieces(1, 32<<10, 2<<10, 2047, 2049, 5, 40<<10),
	} {
		var got bytes.Buffer
		n, err := output{struct{ io.Writer }{&got}}.ReadFrom(r)
		if err != nil || n != int64(len(data)) || !bytes.Equal(got.Bytes(), data) {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
	broken := errors.New("cut")
	if _, err := (output{io.Discard}).ReadFrom(io.MultiReader(bytes.NewReader(data), iotest.ErrReader(broken))); err != broken {
		t.Errorf("a broken stream: %v", err)
	}
	if _, err := (output{&failing{left: 100 << 10}}).ReadFrom(bytes.NewReader(data)); err != io.ErrClosedPipe {
		t.Errorf("a closed connection: %v", err)
	}
}

func TestTailOfStream(t *testing.T) {
	var all tail
	n, err := io.Copy(&all, struct{ io.Reader }{strings.NewReader(" " + strings.Repeat("x", 5*maxTail))})
	if err != nil || n != 5*maxTail+1 || all.String() != strings.Repeat("x", maxTail-1) {
		t.Errorf("%d bytes, %v, %q", n, err, all.String())
	}
}
