package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/backends"
)

// startClient starts an agent of its own process, and gives the gate's end.
func startClient(t testing.TB) *Client {
	t.Helper()
	public, private := newKey(t)
	conn, _, ended := startAgent(t, public)
	c, err := NewClient(context.Background(), conn, private, Hello{User: "u"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		<-ended
	})
	return c
}

func TestForwardSmoke(t *testing.T) {
	c := startClient(t)
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	for _, network := range []string{"tcp", "unix"} {
		address := map[string]string{"tcp": "127.0.0.1:0"}[network]
		l, err := c.Listen(ctx, network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Log(l.Addr())
		near, err := c.DialContext(ctx, network, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		far, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Log(far.RemoteAddr(), near.RemoteAddr())
		go func() {
			io.Copy(near, strings.NewReader(strings.Repeat("x", 1<<20)))
			near.(backends.HalfCloser).CloseWrite()
		}()
		b, err := io.ReadAll(far)
		if err != nil || len(b) != 1<<20 {
			t.Error(len(b), err)
		}
		io.WriteString(far, "answer")
		far.(backends.HalfCloser).CloseWrite()
		b, err = io.ReadAll(near)
		if err != nil || string(b) != "answer" {
			t.Errorf("%q %v", b, err)
		}
		near.Close()
		far.Close()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		_, err = c.DialContext(ctx, network, l.Addr().String())
		t.Log(err)
	}
	t.Log(c.Resolve(ctx, "localhost"))
	t.Log(c.Resolve(ctx, "nosuch.onion"))
	_, err := c.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: "env | grep -E 'DISPLAY|XAUTH'; ls -lR /tmp/xauth*; od -c $XAUTHORITY", X11: &backends.X11{Display: 10, Protocol: "MIT", Cookie: []byte("cookie")},
		Stdout: logWriter{t}, Stderr: logWriter{t}})
	t.Log(err)
}

type logWriter struct{ t testing.TB }

func (w logWriter) Write(p []byte) (int, error) { w.t.Logf("%s", p); return len(p), nil }
