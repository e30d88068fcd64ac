package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/sallyport/sallyport/backends"
)

// newInside starts the inside end in this process, which runs no processes then, and gives the gate's end.
func newInside(t *testing.T, change func(*server)) (*Client, *server) {
	t.Helper()
	gate, inside := pair(t)
	public, private := newKey(t)
	serving := make(chan *server, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer close(serving)
		if _, err := challenge(inside, public); err != nil {
			t.Error(err)
			return
		}
		session, err := yamux.Server(newCoalescer(&gulper{Conn: inside}), muxConfig(insideWindow))
		if err != nil {
			t.Error(err)
			return
		}
		defer session.Close()
		s := newServer(session, nil, nil, "/")
		change(s)
		serving <- s
		s.serve(time.Now().Add(handshakeLimit))
	}()
	c, err := newClient(struct{ net.Conn }{gate}, private, Hello{}, normalPace)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		<-ended
	})
	return c, <-serving
}

func short(t *testing.T) context.Context {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(stop)
	return ctx
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what + ": not so")
		}
	}
}

func (s *server) idle() bool { return len(s.connections)+len(s.lookups)+len(s.paths) == 0 }

// peer is a listener beside the agent, whose connections are given to a function.
func peer(t *testing.T, serve func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	return l.Addr().String()
}

// TestForwardNotTaken lets a connection wait for longer than it may.
func TestForwardNotTaken(t *testing.T) {
	c, s := newInside(t, func(s *server) { s.limits.take = 50 * time.Millisecond })
	l, err := c.Listen(short(t), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	old, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	old.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := old.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("one that was not taken: %v", err)
	}
	until(t, "its place is free", s.idle)
	accepted := make(chan net.Conn)
	go func() {
		conn, _ := l.Accept()
		accepted <- conn
	}()
	// Accept passes over the old one. It has begun, or begins in time for this one, or for the next.
	for {
		late, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer late.Close()
		select {
		case conn := <-accepted:
			if conn == nil || conn.RemoteAddr().String() == old.LocalAddr().String() {
				t.Errorf("accepted %v", conn)
			}
			conn.Close()
			l.Close()
			until(t, "all is free", s.idle)
			return
		case <-time.After(time.Second):
		}
	}
}

// TestForwardStalledHangUp has the gate leave a connection whose peer takes no bytes.
func TestForwardStalledHangUp(t *testing.T) {
	defer func(d time.Duration) { streamCloseLimit = d }(streamCloseLimit)
	streamCloseLimit = 300 * time.Millisecond
	c, s := newInside(t, func(s *server) { s.limits.probe = 50 * time.Millisecond })
	leave := make(chan struct{})
	defer close(leave)
	address := peer(t, func(*net.TCPConn) { <-leave })
	conn, err := c.DialContext(short(t), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, err = conn.Write(make([]byte, 64<<10))
	}
	conn.Close()
	until(t, "its place is free", s.idle)
}

// TestForwardBounds makes as many connections as there may be.
func TestForwardBounds(t *testing.T) {
	c, s := newInside(t, func(*server) {})
	address := peer(t, func(c *net.TCPConn) { io.Copy(c, c) })
	var all []net.Conn
	for range maxConnections {
		conn, err := c.DialContext(short(t), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, conn)
	}
	if _, err := c.DialContext(short(t), "tcp", address); err == nil || !strings.Contains(err.Error(), errMany.Error()) {
		t.Errorf("one too many: %v", err)
	}
	if _, err := c.Resolve(short(t), "localhost"); err != nil {
		t.Errorf("Resolve: %v", err)
	}
	// To a listener inside, too.
	l, err := c.Listen(short(t), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if conn, err := net.Dial("tcp", l.Addr().String()); err == nil {
		conn.SetDeadline(time.Now().Add(30 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("not refused: %v", err)
		}
		conn.Close()
	}
	for _, conn := range all {
		conn.Close()
	}
	until(t, "all is free", s.idle)
	until(t, "no stream is left", func() bool { return c.session.NumStreams() == 2 }) // control, and the listener's
	conn, err := c.DialContext(short(t), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	l.Close()
}

// deaf gives the address of a listener whose backlog is full: connecting takes long.
func deaf(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	address := fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
	for range 4 {
		conn, err := net.DialTimeout("tcp", address, 200*time.Millisecond)
		if err != nil {
			return address
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Fatal("the backlog has no end")
	return ""
}

func TestForwardSlowDial(t *testing.T) {
	address := deaf(t)
	c, s := newInside(t, func(s *server) { s.limits.dial = 100 * time.Millisecond })
	if _, err := c.DialContext(short(t), "tcp", address); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("in the agent's time: %v", err)
	}
	until(t, "its place is free", s.idle)
	c, s = newInside(t, func(s *server) { s.limits.dial = time.Hour })
	ctx, stop := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer stop()
	if _, err := c.DialContext(ctx, "tcp", address); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("in the caller's time: %v", err)
	}
	until(t, "its place is free, as the gate hung up", s.idle)
}

// TestForwardCut resets a connection inside: the gate sees that it was cut off.
func TestForwardCut(t *testing.T) {
	c, s := newInside(t, func(*server) {})
	address := peer(t, func(c *net.TCPConn) {
		io.WriteString(c, "hi")
		c.Read(make([]byte, 1))
		c.SetLinger(0)
	})
	conn, err := c.DialContext(short(t), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "x")
	b, err := io.ReadAll(conn)
	if string(b) != "hi" || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%q, %v", b, err)
	}
	until(t, "its place is free", s.idle)
}

// TestForwardLeavesNothing makes and ends many connections, and counts what is open at both ends.
func TestForwardLeavesNothing(t *testing.T) {
	c, s := newInside(t, func(*server) {})
	open := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	l, err := c.Listen(short(t), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	before := open()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 25 {
				near, err := c.DialContext(short(t), "tcp", l.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				io.WriteString(near, "x")
				far, err := l.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				far.Read(make([]byte, 1))
				far.Close()
				near.Close()
				c.DialContext(short(t), "unix", "/no/such/socket")
				c.DialContext(short(t), "unix", "/dev/null")
				c.Resolve(short(t), "nosuch.onion")
			}
		})
	}
	all.Wait()
	until(t, "all descriptors are closed", func() bool { return open() <= before })
	until(t, "all places are free", s.idle)
	until(t, "all streams are closed", func() bool { return c.session.NumStreams() <= 2 })
}

// TestSocketPathRace swaps a link between an allowed directory and the agent's own, while paths through it are used.
func TestSocketPathRace(t *testing.T) {
	base, err := os.MkdirTemp("", "race") // a short name
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(base)
	if base, err = filepath.EvalSymlinks(base); err != nil {
		t.Fatal(err)
	}
	mine, own := filepath.Join(base, "mine"), filepath.Join(base, "own")
	for _, dir := range []string{mine, own} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", filepath.Join(dir, "s"))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, filepath.Base(dir))
				c.Close()
			}
		}()
	}
	link, file := filepath.Join(base, "link"), filepath.Join(base, "file")
	stop := make(chan struct{})
	var swapping sync.WaitGroup
	swapping.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			to := []string{mine, own}[i%2]
			os.Symlink(to, link+".new")
			os.Rename(link+".new", link)
			os.Symlink(filepath.Join(to, "s"), file+".new")
			os.Rename(file+".new", file)
		}
	})
	defer swapping.Wait()
	defer close(stop)
	until(t, "the links are there", func() bool {
		_, err := os.Lstat(file)
		return err == nil
	})
	outcomes := make(map[string]int)
	for i, end := 0, time.Now().Add(2*time.Second); time.Now().Before(end); i++ {
		name := []string{link + "/s", file}[i%2]
		conn, err := dialUnix(context.Background(), name, []string{own})
		switch {
		case err == nil:
			b, _ := io.ReadAll(conn)
			conn.Close()
			outcomes[string(b)]++
		case errors.Is(err, errOwn):
			outcomes["refused"]++
		default:
			t.Fatal(err)
		}
		l, remove, err := listenUnix(link+"/new", []string{own})
		switch {
		case err == nil:
			outcomes["listened"]++
			if _, err := os.Lstat(own + "/new"); err == nil {
				t.Fatal("listens in the agent's own directory")
			}
			l.Close()
			remove()
		case errors.Is(err, errOwn):
			outcomes["not listened"]++
		default:
			t.Fatal(err)
		}
	}
	t.Log(outcomes)
	if outcomes["own"] != 0 {
		t.Error("reached the agent's own socket")
	}
	for _, must := range []string{"mine", "refused", "listened", "not listened"} {
		if outcomes[must] == 0 {
			t.Errorf("never %q", must)
		}
	}
}

func TestOwnDirs(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if got := ownDirs("/.sallyport/run/gate"); !slices.Equal(got, []string{"/.sallyport/run", filepath.Dir(exe)}) {
		t.Errorf("%q", got)
	}
}

func TestConnectionsIn(t *testing.T) {
	dir := t.TempDir()
	two, one := filepath.Join(dir, "memory.max"), filepath.Join(dir, "memory.limit_in_bytes")
	for _, x := range []struct {
		two, one string
		want     int64
	}{
		{"134217728\n", "", 85}, {"max\n", "", maxConnections}, {"", "67108864\n", 42}, {"", "9223372036854771712\n", maxConnections},
		{"", "", maxConnections}, {"1\n", "", minConnections}, {"max\n", "134217728\n", 85},
	} {
		for name, content := range map[string]string{two: x.two, one: x.one} {
			os.Remove(name)
			if content != "" {
				if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		if got := connectionsIn(memoryLimit([]string{two, one})); got != x.want {
			t.Errorf("%q, %q: %d, want %d", x.two, x.one, got, x.want)
		}
	}
}

func TestFailures(t *testing.T) {
	for text, test := range map[string]struct{ err, want error }{
		"connection refused":   {&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, syscall.ECONNREFUSED},
		"no route to host":     {syscall.ENETUNREACH, syscall.EHOSTUNREACH},
		"address already":      {syscall.EADDRINUSE, syscall.EADDRINUSE},
		"no such host":         {&net.DNSError{Err: "x", Name: "secret\n", IsNotFound: true}, errNoHost},
		"i/o timeout":          {&net.OpError{Op: "dial", Err: context.DeadlineExceeded}, os.ErrDeadlineExceeded},
		"agent: resource temp": {os.NewSyscallError("connect", syscall.EAGAIN), nil},
		"agent: permission d":  {fmt.Errorf("x: %w", syscall.EACCES), nil},
		"agent: some?thing":    {errors.New("some\x1bthing"), nil},
		"agent: not an IP add": {errAddress, nil},
	} {
		got := failureOf(test.err).err()
		if !strings.HasPrefix(got.Error(), text) || test.want != nil && !errors.Is(got, test.want) {
			t.Errorf("%v: %v, want %s", test.err, got, text)
		}
	}
}

func TestBoundTo(t *testing.T) {
	for _, x := range []struct {
		network, asked, got string
		ok                  bool
	}{
		{"tcp", "127.0.0.1:0", "127.0.0.1:4000", true}, {"tcp", ":0", "[::]:4000", true}, {"tcp", ":80", "[::]:80", true},
		{"tcp", "[::1]:80", "[::1]:80", true}, {"tcp", "127.0.0.1:80", "127.0.0.1:81", false},
		{"tcp", "127.0.0.1:0", "127.0.0.1:0", false}, {"tcp", "127.0.0.1:0", "10.0.0.1:4000", false}, {"tcp", "127.0.0.1:0", "", false},
		{"tcp", "127.0.0.1:0", "/tmp/x", false}, {"unix", "/tmp/x", "/tmp/x", true}, {"unix", "/tmp/x", "/tmp/y", false},
		{"unix", "", "/tmp/y", true}, {"unix", "", "tmp/y", false}, {"unix", "", "/tmp/\x1b", false}, {"unix", "", "/tmp/../x", false},
		{"unix", "", "", false}, {"unix", "", "/" + strings.Repeat("x", 200), false},
	} {
		if _, err := boundTo(x.network, x.asked, x.got); (err == nil) != x.ok {
			t.Errorf("%+v: %v", x, err)
		}
	}
}

// TestHostileForwards has an agent answer with nonsense: there is an error, and the stream lives on.
func TestHostileForwards(t *testing.T) {
	message := func(v any) []byte {
		var b bytes.Buffer
		if err := writeMessage(&b, v); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	list := func(n, size int) response {
		return response{Addresses: slices.Repeat([][]byte{make([]byte, size)}, n)}
	}
	after := func(b ...byte) []byte { return append(message(response{}), b...) }
	listening := message(response{Address: "127.0.0.1:80"})
	for name, b := range map[string][]byte{
		"huge message": {0xff, 0xff, 0xff, 0xff}, "bad CBOR": {0, 0, 0, 2, 0x9f, 0x9f}, "nothing": {},
		"failed":             message(response{Failed: &failure{Text: "\x1b[2Jno\n" + strings.Repeat("x", 2000)}}),
		"unknown failure":    message(response{Failed: &failure{Code: 99, Text: "\x1b"}}),
		"no addresses":       message(list(0, 0)),
		"too many addresses": message(list(backends.MaxAddresses+1, 4)), "short address": message(list(1, 3)), "long address": message(list(1, 17)),
		"other port": message(response{Address: "127.0.0.1:81"}), "other address": message(response{Address: "10.0.0.1:80"}),
		"unknown frame": after(7, 0, 0, 0, 1, 'x'), "huge frame": after(0, 0, 1, 0, 1), "end with bytes": after(1, 0, 0, 0, 1, 'x'),
		"cut": after(1, 0, 0, 0, 0), "cut short": after(0, 0, 0, 0, 9, 'x'),
		"bad originator": append(slices.Clone(listening), message(arrival{Number: 1, Origin: "\x1b[2J"})...),
		"flood": append(slices.Clone(listening),
			bytes.Repeat(message(arrival{Number: 1, Origin: "192.0.2.1:1"}), 20*backends.MaxBacklog)...),
	} {
		t.Run(name, func(t *testing.T) {
			c, a := newFakeAgent(t, normalPace)
			go func() {
				for {
					s, err := a.session.AcceptStream()
					if err != nil {
						return
					}
					go func() {
						var o opening
						readMessage(s, maxRequest, &o)
						if o.Op == opAccept {
							writeMessage(s, response{Failed: &failure{Text: "gone"}})
						} else {
							s.Write(b)
						}
						s.Close()
					}()
				}
			}()
			check := func(what string, err error) {
				if err == nil || strings.ContainsAny(err.Error(), "\x1b\n") || len(err.Error()) > 600 || errors.Is(err, backends.ErrGone) {
					t.Errorf("%s: %q", what, err)
				}
			}
			_, err := c.Resolve(short(t), "name")
			check("Resolve", err)
			conn, err := c.DialContext(short(t), "tcp", "192.0.2.1:80")
			if err == nil {
				_, err = io.ReadAll(conn)
				conn.Close()
			}
			check("DialContext", err)
			l, err := c.Listen(short(t), "tcp", "127.0.0.1:80")
			if err == nil {
				_, err = l.Accept()
				l.Close()
			}
			check("Listen", err)
			if c.Err() != nil {
				t.Errorf("the stream ended: %v", c.Err())
			}
		})
	}
}

// TestHostileLinger has an agent send on, and leave the stream open, when the gate has closed its side.
func TestHostileLinger(t *testing.T) {
	c, a := newFakeAgent(t, normalPace)
	for range 3 {
		opened := make(chan *yamux.Stream, 1)
		go func() {
			s, err := a.session.AcceptStream()
			if err != nil {
				return
			}
			var o opening
			readMessage(s, maxRequest, &o)
			writeMessage(s, response{})
			opened <- s
		}()
		conn, err := c.DialContext(short(t), "tcp", "192.0.2.1:80")
		if err != nil {
			t.Fatal(err)
		}
		reading := make(chan error, 1)
		go func() {
			_, err := conn.Read(make([]byte, 1))
			reading <- err
		}()
		time.Sleep(10 * time.Millisecond)
		conn.Close()
		if err := <-reading; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read under Close: %v", err)
		}
		s := <-opened
		s.SetWriteDeadline(time.Now().Add(20 * time.Second))
		if n, err := s.Write(make([]byte, 8*window)); err != nil {
			t.Errorf("the gate holds what nobody reads: %d, %v", n, err)
		}
		s.Close()
	}
	until(t, "no stream is left", func() bool { return c.session.NumStreams() == 1 })
}

// FuzzForwards feeds a client whatever an agent could answer.
func FuzzForwards(f *testing.F) {
	var b bytes.Buffer
	for _, v := range []any{
		response{}, response{Failed: &failure{Code: failedRefused}}, response{Addresses: [][]byte{{127, 0, 0, 1}}},
		response{Address: "127.0.0.1:4000"}, arrival{Number: 3, Origin: "192.0.2.1:5"},
	} {
		writeMessage(&b, v)
		f.Add(uint8(0), b.Bytes())
	}
	b.Reset()
	writeMessage(&b, response{})
	b.Write([]byte{0, 0, 0, 0, 2, 'h', 'i', 0, 0, 0, 0, 0})
	f.Add(uint8(1), b.Bytes())
	b.Reset()
	writeMessage(&b, response{Address: "127.0.0.1:4000"})
	writeMessage(&b, arrival{Number: 1, Origin: "192.0.2.1:5"})
	f.Add(uint8(2), b.Bytes())
	f.Fuzz(func(t *testing.T, what uint8, b []byte) {
		c, a := newFakeAgent(t, normalPace)
		go func() {
			for range 4 {
				s, err := a.session.AcceptStream()
				if err != nil {
					return
				}
				var o opening
				readMessage(s, maxRequest, &o)
				s.Write(b)
				s.Close()
			}
			a.session.Close()
		}()
		ctx := context.Background()
		switch what % 3 {
		case 0:
			list, err := c.Resolve(ctx, "name")
			if err == nil && (len(list) == 0 || len(list) > backends.MaxAddresses || slices.ContainsFunc(list, netip.Addr.Is4In6)) {
				t.Errorf("%v", list)
			}
		case 1:
			if conn, err := c.DialContext(ctx, "unix", "/x"); err == nil {
				io.WriteString(conn, "in")
				io.Copy(io.Discard, conn)
				conn.Close()
			}
		case 2:
			if l, err := c.Listen(ctx, "tcp", "127.0.0.1:0"); err == nil {
				for range 2 {
					if conn, err := l.Accept(); err == nil {
						conn.Close()
					}
				}
				l.Close()
			}
		}
		c.Close()
	})
}

func TestXauthority(t *testing.T) {
	x := x11{Display: 10, Protocol: "P", Cookie: []byte{0, 1}}
	got, err := x.authority("host")
	want := "\x01\x00\x00\x04host\x00\x0210\x00\x01P\x00\x02\x00\x01" + "\xff\xff\x00\x00\x00\x0210\x00\x01P\x00\x02\x00\x01"
	if err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
	for _, x := range []x11{{Display: -1}, {Display: 60000}, {Cookie: make([]byte, 2000)}, {Protocol: strings.Repeat("x", 2000)}} {
		if _, err := x.authority(""); err == nil {
			t.Errorf("%+v", x)
		}
	}
}
