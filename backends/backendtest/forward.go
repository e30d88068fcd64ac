package backendtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/backends"
)

// forwarder is what a sandbox that forwards connections can do.
type forwarder interface {
	backends.Sandbox
	backends.Dialer
	backends.Listener
}

// forwards are the tests of a sandbox that forwards connections, which every backend's does.
var forwards = []struct {
	name string
	run  func(*testing.T, forwarder, Subject)
}{
	{"Inside", forwardInside},
	{"HalfClose", forwardHalfClose},
	{"HangUp", forwardHangUp},
	{"Refused", forwardRefused},
	{"Cancelled", forwardCancelled},
	{"Addresses", forwardAddresses},
	{"Paths", forwardPaths},
	{"Resolve", forwardResolve},
	{"Ports", forwardPorts},
	{"Sockets", forwardSockets},
	{"Backlog", forwardBacklog},
	{"Listeners", forwardListeners},
	{"ManyAtOnce", forwardMany},
	{"X11", forwardX11},
}

func forwarding(t *testing.T, sandbox backends.Sandbox, s Subject) {
	f, ok := sandbox.(forwarder)
	if !ok {
		t.Fatalf("%T does not forward", sandbox)
	}
	for _, test := range forwards {
		t.Run(test.name, func(t *testing.T) { test.run(t, f, s) })
	}
}

func withLimit(t *testing.T) context.Context {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), limit)
	t.Cleanup(stop)
	return ctx
}

func listen(t *testing.T, s forwarder, network, address string) net.Listener {
	t.Helper()
	l, err := s.Listen(withLimit(t), network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func dial(t *testing.T, s forwarder, a net.Addr) backends.HalfCloser {
	t.Helper()
	c, err := s.DialContext(withLimit(t), a.Network(), a.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(limit))
	return c.(backends.HalfCloser)
}

func accept(t *testing.T, l net.Listener) backends.HalfCloser {
	t.Helper()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Errorf("Accept: %v", err)
		}
		accepted <- c
	}()
	select {
	case c := <-accepted:
		if c == nil {
			t.FailNow()
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(limit))
		return c.(backends.HalfCloser)
	case <-time.After(limit):
		t.Fatal("nothing to accept")
	}
	return nil
}

// connect gives both ends of a connection that begins and ends in the sandbox.
func connect(t *testing.T, s forwarder, l net.Listener) (near, far backends.HalfCloser) {
	t.Helper()
	near = dial(t, s, l.Addr())
	return near, accept(t, l)
}

// eachNetwork runs a test with a listener of each network.
func eachNetwork(t *testing.T, s forwarder, run func(*testing.T, net.Listener)) {
	for network, address := range map[string]string{"tcp": "127.0.0.1:0", "unix": ""} {
		t.Run(network, func(t *testing.T) { run(t, listen(t, s, network, address)) })
	}
}

// listed says whether a port of IPv4 is listened at, as a process inside sees it.
func listed(t *testing.T, s backends.Sandbox, port int) bool {
	out := command(t, s, "cat /proc/net/tcp")
	return strings.Contains(out, fmt.Sprintf(":%04X 00000000:0000 0A", port))
}

func forwardInside(t *testing.T, s forwarder, _ Subject) {
	l := listen(t, s, "tcp", "127.0.0.1:0")
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok || addr.Port == 0 || !addr.IP.Equal(net.IPv4(127, 0, 0, 1)) {
		t.Fatalf("Addr: %v", l.Addr())
	}
	if !listed(t, s, addr.Port) {
		t.Error("no such listener inside")
	}
	near, far := connect(t, s, l)
	if near.RemoteAddr().String() != addr.String() || far.LocalAddr().String() != addr.String() {
		t.Errorf("dialed %v, accepted at %v", near.RemoteAddr(), far.LocalAddr())
	}
	origin, ok := far.RemoteAddr().(*net.TCPAddr)
	if !ok || origin.Port == 0 || !origin.IP.IsLoopback() {
		t.Errorf("originator: %v", far.RemoteAddr())
	}
	// The connection is of the sandbox's own network.
	if out := command(t, s, "cat /proc/net/tcp"); !strings.Contains(out, fmt.Sprintf(":%04X 0100007F:%04X 01", origin.Port, addr.Port)) {
		t.Errorf("no such connection inside:\n%s", out)
	}
}

// pass writes random bytes to one end and its end, and compares what comes out of the other.
func pass(t *testing.T, from, to backends.HalfCloser, size int64) {
	t.Helper()
	sent, got := sha256.New(), sha256.New()
	wrote := make(chan error, 1)
	go func() {
		_, err := io.Copy(from, io.TeeReader(io.LimitReader(rand.Reader, size), sent))
		wrote <- errors.Join(err, from.CloseWrite())
	}()
	n, err := io.Copy(got, to)
	if werr := <-wrote; err != nil || werr != nil || n != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Errorf("%d of %d bytes: read %v, write %v", n, size, err, werr)
	}
}

func forwardHalfClose(t *testing.T, s forwarder, _ Subject) {
	eachNetwork(t, s, func(t *testing.T, l net.Listener) {
		for _, size := range []int64{0, 1, 3<<20 + 17} {
			near, far := connect(t, s, l)
			pass(t, near, far, size)
			pass(t, far, near, 3<<20+17) // after the end of the other direction
			near, far = connect(t, s, l)
			pass(t, far, near, size)
			pass(t, near, far, 3<<20+17)
		}
		// Both at once.
		near, far := connect(t, s, l)
		var all sync.WaitGroup
		all.Go(func() { pass(t, near, far, 8<<20) })
		all.Go(func() { pass(t, far, near, 8<<20) })
		all.Wait()
	})
}

// forwardHangUp closes one end, at rest and while bytes wait in both directions: the other end ends.
func forwardHangUp(t *testing.T, s forwarder, _ Subject) {
	eachNetwork(t, s, func(t *testing.T, l net.Listener) {
		near, far := connect(t, s, l)
		near.Close()
		if _, err := io.ReadAll(far); err != nil && errors.Is(err, backends.ErrGone) {
			t.Errorf("at rest: %v", err)
		}
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read after Close: %v", err)
		}
		if _, err := near.Write(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write after Close: %v", err)
		}
		near, far = connect(t, s, l)
		fill(near)
		fill(far)
		near.Close()
		far.SetDeadline(time.Now().Add(limit))
		if _, err := io.Copy(io.Discard, far); isTimeout(err) {
			t.Errorf("while bytes wait: %v", err)
		}
		near, far = connect(t, s, l)
		near.Close()
		io.Copy(io.Discard, far)
		if _, err := io.Copy(far, repeat("x")); err == nil || isTimeout(err) || errors.Is(err, backends.ErrGone) {
			t.Errorf("Write to who is gone: %v", err)
		}
		// A Read and a Write that wait are ended by Close.
		near, _ = connect(t, s, l)
		fill(near)
		near.SetDeadline(time.Time{})
		var waiting sync.WaitGroup
		waiting.Go(func() { near.Read(make([]byte, 1)) })
		waiting.Go(func() { near.Write(make([]byte, 1<<20)) })
		time.Sleep(20 * time.Millisecond)
		near.Close()
		waiting.Wait()
	})
}

// fill writes until nothing more goes in. No more can be written then.
func fill(c net.Conn) {
	b := make([]byte, 64<<10)
	for {
		c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

func forwardRefused(t *testing.T, s forwarder, _ Subject) {
	begin := time.Now()
	for _, network := range []string{"tcp", "unix"} {
		address := map[string]string{"tcp": "127.0.0.1:0"}[network]
		l := listen(t, s, network, address)
		l.Close()
		if c, err := s.DialContext(withLimit(t), network, l.Addr().String()); err == nil {
			c.Close()
			t.Errorf("%s: connected", network)
		} else if network == "tcp" && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v", network, err)
		}
	}
	// A path at which nobody listens any more.
	name := path.Join(strings.TrimSpace(command(t, s, "mktemp -d")), "s")
	l := listen(t, s, "unix", name)
	command(t, s, fmt.Sprintf("mv %s %s.old", name, name))
	l.Close()
	if _, err := s.DialContext(withLimit(t), "unix", name+".old"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("unix: %v", err)
	}
	command(t, s, "rm -r "+path.Dir(name))
	if d := time.Since(begin); d > 15*time.Second {
		t.Errorf("took %v", d)
	}
}

func forwardCancelled(t *testing.T, s forwarder, _ Subject) {
	why := errors.New("enough")
	ctx, stop := context.WithCancelCause(context.Background())
	stop(why)
	if _, err := s.DialContext(ctx, "tcp", "127.0.0.1:1"); !errors.Is(err, why) {
		t.Errorf("DialContext: %v", err)
	}
	if _, err := s.Listen(ctx, "tcp", "127.0.0.1:0"); !errors.Is(err, why) {
		t.Errorf("Listen: %v", err)
	}
	if _, err := s.Resolve(ctx, "nosuch.onion"); !errors.Is(err, why) {
		t.Errorf("Resolve: %v", err)
	}
}

func forwardAddresses(t *testing.T, s forwarder, _ Subject) {
	port := listen(t, s, "tcp", ":0").Addr().(*net.TCPAddr).Port
	for _, host := range []string{"0.0.0.0", "::", "::ffff:0.0.0.0"} {
		if c, err := s.DialContext(withLimit(t), "tcp", net.JoinHostPort(host, fmt.Sprint(port))); err == nil {
			c.Close()
			t.Errorf("dialed %s, which is nobody's", host)
		}
	}
	for _, a := range []struct{ network, address string }{
		{"tcp", "localhost:80"}, {"tcp", "127.0.0.1"}, {"tcp", "127.0.0.1:0"}, {"tcp", "127.0.0.1:http"}, {"tcp", ":80"},
		{"tcp", "0.0.0.0:80"}, {"tcp", "[::]:80"}, {"tcp", "[::ffff:0.0.0.0]:80"}, {"tcp", "127.0.0.1:65536"}, {"tcp", "127.1:80"}, {"tcp", ""},
		{"udp", "127.0.0.1:80"}, {"ip4:icmp", "127.0.0.1"}, {"", "127.0.0.1:80"}, {"unixgram", "/x"},
	} {
		if c, err := s.DialContext(withLimit(t), a.network, a.address); err == nil {
			c.Close()
			t.Errorf("dialed %q %q", a.network, a.address)
		}
	}
	for _, a := range []struct{ network, address string }{
		{"tcp", "localhost:0"}, {"tcp", "127.0.0.1"}, {"tcp", "127.0.0.1:x"}, {"tcp", ":65536"}, {"tcp", "name:0"}, {"tcp", ""},
		{"udp", "127.0.0.1:0"}, {"unixpacket", "/tmp/x"}, {"", ""},
	} {
		if l, err := s.Listen(withLimit(t), a.network, a.address); err == nil {
			l.Close()
			t.Errorf("listens at %q %q", a.network, a.address)
		}
	}
}

func forwardPaths(t *testing.T, s forwarder, subject Subject) {
	dir := strings.TrimSpace(command(t, s, "mktemp -d"))
	defer command(t, s, "rm -r "+dir)
	command(t, s, fmt.Sprintf("cd %s; mkdir d; echo >file; ln -s %s/there link; ln -s nowhere dangling", dir, dir))
	l := listen(t, s, "unix", dir+"/there")
	near, far := connect(t, s, listener{l, &net.UnixAddr{Name: dir + "/link", Net: "unix"}}) // a link is followed
	pass(t, near, far, 100)
	bad := []string{
		"", "@x", "\x00x", "x", "./x", dir, dir + "/", dir + "/file/x", dir + "/d/", dir + "/there/", dir + "/x\x00y",
		"/" + strings.Repeat("x", 107), "/proc/self/fd/3", "/proc/1/fd/3", "/dev/null/x", "/", "//", "/.", "/..",
	}
	own := []string{}
	if subject.Own != "" {
		command(t, s, fmt.Sprintf("cd %s; ln -s %s own; ln -s own/x ownfile; ln -s own/new ownnew", dir, subject.Own))
		own = []string{
			subject.Own, subject.Own + "/x", dir + "/own/x", dir + "/ownfile", dir + "/ownnew", dir + "/../" + subject.Own + "/x",
			"/proc/self/root" + subject.Own + "/x", "/proc/1/root" + subject.Own + "/x",
		}
	}
	for _, name := range slices.Concat(bad, own, []string{dir + "/file", dir + "/d", dir + "/no", dir + "/dangling", "/dev/null"}) {
		if c, err := s.DialContext(withLimit(t), "unix", name); err == nil {
			c.Close()
			t.Errorf("dialed %q", name)
		}
	}
	for _, name := range slices.Concat(bad[1:], own, []string{dir + "/file", dir + "/d", dir + "/link", dir + "/dangling", dir + "/there", dir + "/no/x"}) {
		if l, err := s.Listen(withLimit(t), "unix", name); err == nil {
			l.Close()
			t.Errorf("listens at %q", name)
		}
	}
}

// listener is a listener with another address.
type listener struct {
	net.Listener
	at net.Addr
}

func (l listener) Addr() net.Addr { return l.at }

func forwardResolve(t *testing.T, s forwarder, _ Subject) {
	one := netip.MustParseAddr
	for host, want := range map[string]netip.Addr{
		"127.0.0.1": one("127.0.0.1"), "192.0.2.7": one("192.0.2.7"), "::1": one("::1"), "2001:db8::1": one("2001:db8::1"),
		"::ffff:192.0.2.7": one("192.0.2.7"), "localhost": one("127.0.0.1"), "LocalHost.": one("127.0.0.1"),
	} {
		got, err := s.Resolve(withLimit(t), host)
		if err != nil || len(got) == 0 || got[0] != want || host != "localhost" && host != "LocalHost." && len(got) > 1 {
			t.Errorf("%q: %v, %v", host, got, err)
		}
	}
	// None of these is a question to a name server: RFC 7686 keeps .onion from it.
	for _, host := range []string{"", "nosuch.onion", "a..b", "two words", "x\x00y", strings.Repeat("x", 300), "-", "[::1]", "127.0.0.1:80"} {
		if got, err := s.Resolve(withLimit(t), host); err == nil {
			t.Errorf("%q: %v", host, got)
		}
	}
}

func forwardPorts(t *testing.T, s forwarder, _ Subject) {
	l := listen(t, s, "tcp", "127.0.0.1:0")
	port := l.Addr().(*net.TCPAddr).Port
	if _, err := s.Listen(withLimit(t), "tcp", l.Addr().String()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a port that is taken: %v", err)
	}
	_, _ = connect(t, s, l)
	if err := l.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
	if listed(t, s, port) {
		t.Error("the listener is still there")
	}
	// The port is free at once, and a connection that was accepted goes on.
	l = listen(t, s, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	near, far := connect(t, s, l)
	waiting := dial(t, s, l.Addr())
	l.Close()
	pass(t, near, far, 1<<20)
	pass(t, far, near, 1<<20)
	if n, err := waiting.Read(make([]byte, 1)); n > 0 || err == nil {
		t.Error("a connection that was not accepted lives on")
	}
	// All addresses, of one family or both.
	for _, host := range []string{"", "0.0.0.0"} {
		l := listen(t, s, "tcp", net.JoinHostPort(host, "0"))
		near, far := connect(t, s, listener{l, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: l.Addr().(*net.TCPAddr).Port}})
		pass(t, near, far, 100)
		if from := far.RemoteAddr().(*net.TCPAddr); from.IP.To4() == nil || from.String() != fmt.Sprintf("127.0.0.1:%d", from.Port) {
			t.Errorf("originator: %v", from)
		}
	}
}

func forwardSockets(t *testing.T, s forwarder, _ Subject) {
	l := listen(t, s, "unix", "")
	name := l.Addr().String()
	if got := command(t, s, fmt.Sprintf("stat -c '%%a %%F %%u' %s %s; id -u", path.Dir(name), name)); !strings.HasPrefix(got, "700 directory ") ||
		!strings.Contains(got, "\n600 socket ") {
		t.Errorf("%q", got)
	}
	l.Close()
	if got := command(t, s, "ls -d "+path.Dir(name)+" 2>&1; true"); !strings.Contains(got, "No such") {
		t.Errorf("left: %q", got)
	}
	dir := strings.TrimSpace(command(t, s, "mktemp -d"))
	defer command(t, s, "rm -r "+dir)
	l = listen(t, s, "unix", dir+"/s")
	if got := command(t, s, "umask 0; stat -c '%a' "+dir+"/s"); got != "600\n" {
		t.Errorf("mode %q", got)
	}
	near, far := connect(t, s, l)
	l.Close()
	pass(t, near, far, 100)
	if got := command(t, s, "ls -A "+dir); got != "" {
		t.Errorf("left: %q", got)
	}
	// What someone else has put in its place stays.
	l = listen(t, s, "unix", dir+"/s")
	command(t, s, fmt.Sprintf("rm %s/s; echo mine >%s/s", dir, dir))
	l.Close()
	if got := command(t, s, "cat "+dir+"/s"); got != "mine\n" {
		t.Errorf("%q", got)
	}
}

// forwardBacklog lets connections wait: no more than there may, and those are all there to be accepted.
func forwardBacklog(t *testing.T, s forwarder, _ Subject) {
	l := listen(t, s, "tcp", "127.0.0.1:0")
	var conns []backends.HalfCloser
	for range backends.MaxBacklog {
		c := dial(t, s, l.Addr())
		io.WriteString(c, "hello")
		c.CloseWrite()
		conns = append(conns, c)
	}
	for range 20 {
		c, err := s.DialContext(withLimit(t), "tcp", l.Addr().String())
		if err != nil {
			continue
		}
		c.SetDeadline(time.Now().Add(limit))
		if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
			t.Fatalf("not refused: %v", err)
		}
		c.Close()
	}
	for range conns {
		c := accept(t, l)
		b, err := io.ReadAll(c)
		if string(b) != "hello" || err != nil {
			t.Fatalf("%q, %v", b, err)
		}
		io.WriteString(c, "bye")
		c.Close()
	}
	for _, c := range conns {
		if b, err := io.ReadAll(c); string(b) != "bye" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
	}
	near, far := connect(t, s, l) // there is room again
	pass(t, near, far, 100)
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

func forwardListeners(t *testing.T, s forwarder, _ Subject) {
	var all []net.Listener
	for range backends.MaxListeners {
		all = append(all, listen(t, s, "tcp", "127.0.0.1:0"))
	}
	if _, err := s.Listen(withLimit(t), "tcp", "127.0.0.1:0"); err == nil {
		t.Error("one more than there may be")
	}
	for _, l := range all {
		l.Close()
	}
	near, far := connect(t, s, listen(t, s, "unix", ""))
	pass(t, near, far, 100)
}

// forwardMany has many connections at once, one of which nobody reads.
func forwardMany(t *testing.T, s forwarder, _ Subject) {
	l := listen(t, s, "tcp", "127.0.0.1:0")
	near, far := connect(t, s, l)
	fill(near)
	fill(far)
	var all sync.WaitGroup
	for range 100 {
		near, far := connect(t, s, l)
		all.Go(func() { pass(t, near, far, 256<<10) })
		all.Go(func() { pass(t, far, near, 256<<10) })
	}
	all.Wait()
	command(t, s, "true")
}

func forwardX11(t *testing.T, s forwarder, _ Subject) {
	out := newWatcher()
	r := execute(t, s, backends.Process{
		Kind: backends.KindExec, Env: []string{"DISPLAY=mine:0", "XAUTHORITY=/mine"}, Stdout: out,
		Command: `echo $DISPLAY $XAUTHORITY; d=$(dirname $XAUTHORITY); stat -c %a:%F $d $XAUTHORITY; cat $XAUTHORITY`,
		X11:     &backends.X11{Display: 12, Screen: 3, Protocol: "MIT-MAGIC-COOKIE-1", Cookie: []byte("\x00cookie\xff")},
	})
	line, rest, _ := strings.Cut(out.String(), "\n")
	display, file, _ := strings.Cut(line, " ")
	if r.err != nil || r.status != (backends.ExitStatus{}) || display != "localhost:12.3" || !strings.HasPrefix(file, "/tmp/") {
		t.Fatalf("%+v, %q", r, out.String())
	}
	entry := "\x00\x0212\x00\x12MIT-MAGIC-COOKIE-1\x00\x08\x00cookie\xff"
	if !strings.HasPrefix(rest, "700:directory\n600:regular file\n\x01\x00") || !strings.HasSuffix(rest, entry+"\xff\xff\x00\x00"+entry) {
		t.Errorf("%q", rest)
	}
	if got := command(t, s, "ls -d "+path.Dir(file)+" 2>&1; true"); !strings.Contains(got, "No such") {
		t.Errorf("left: %q", got)
	}
	if got := command(t, s, "echo ${DISPLAY-none}", "X=y"); got != "none\n" {
		t.Errorf("without a display: %q", got)
	}
}

// forwardEnd ends a sandbox: its connections and listeners end with it.
func forwardEnd(t *testing.T, s Subject, end func(backends.Sandbox) error) {
	sandbox := start(t, s).(forwarder)
	l := listen(t, sandbox, "tcp", "127.0.0.1:0")
	near, far := connect(t, sandbox, l)
	var waiting sync.WaitGroup
	for _, c := range []net.Conn{near, far} {
		waiting.Go(func() {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, backends.ErrGone) {
				t.Errorf("Read: %v", err)
			}
		})
	}
	waiting.Go(func() {
		if _, err := l.Accept(); !errors.Is(err, backends.ErrGone) {
			t.Errorf("Accept: %v", err)
		}
	})
	if err := end(sandbox); err != nil {
		t.Fatal(err)
	}
	waiting.Wait()
	if err := l.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if _, err := sandbox.DialContext(withLimit(t), "tcp", l.Addr().String()); !errors.Is(err, backends.ErrGone) {
		t.Errorf("DialContext: %v", err)
	}
	if _, err := sandbox.Listen(withLimit(t), "tcp", "127.0.0.1:0"); !errors.Is(err, backends.ErrGone) {
		t.Errorf("Listen: %v", err)
	}
	if _, err := sandbox.Resolve(withLimit(t), "nosuch.onion"); !errors.Is(err, backends.ErrGone) {
		t.Errorf("Resolve: %v", err)
	}
}
