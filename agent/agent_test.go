package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/hashicorp/yamux"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/backends"
)

func TestMain(m *testing.M) {
	oldKernel = os.Getenv(oldKernelName) != ""
	RunChild()
	goleak.VerifyTestMain(m)
}

func TestSplitWords(t *testing.T) {
	for in, want := range map[string][]string{
		`a b`:              {"a", "b"},
		"  a\t\n b  ":      {"a", "b"},
		`a 'b  c' "d  e"`:  {"a", "b  c", "d  e"},
		`a''b"c"d`:         {"abcd"},
		`''`:               {""},
		`a\ b \'`:          {"a b", "'"},
		`"\a\"\$\\" '\a'`:  {`\a"$\`, `\a`},
		"$HOME * ~ `x` #y": {"$HOME", "*", "~", "`x`", "#y"},
		``:                 nil, `  `: nil, `'a`: nil, `"a`: nil, `a\`: nil,
	} {
		got, err := splitWords(in)
		if !reflect.DeepEqual(got, want) || (err != nil) != (want == nil) {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestEnviron(t *testing.T) {
	got := environ([]string{"A=1", "B=2", "bad", "=x", "C=\x00"}, []string{"A=3=4", "D="})
	if want := []string{"A=3=4", "B=2", "D="}; !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
}

func TestLookUp(t *testing.T) {
	const passwd = "root:x:0:0::/root:/bin/sh\n# comment\nbad:1000\nu:x:1000:1:,,:/home/u:/bin/zsh\nv:x:1000:1::/v:/v\n"
	if got, want := lookUp(strings.NewReader(passwd), 1000), (account{"u", "/home/u", "/bin/zsh"}); got != want {
		t.Errorf("%+v", got)
	}
	if got := lookUp(strings.NewReader(passwd), 7); got != (account{}) {
		t.Errorf("%+v", got)
	}
	if findShell("/usr/sbin/nologin") == "/usr/sbin/nologin" || findShell("/etc/passwd") == "/etc/passwd" ||
		findShell("relative") == "relative" || findShell("/tmp") == "/tmp" {
		t.Error("took what is no shell")
	}
}

func TestApplyModes(t *testing.T) {
	m := func(pairs ...uint32) (b []byte) {
		for i := 0; i < len(pairs); i += 2 {
			b = binary.BigEndian.AppendUint32(append(b, byte(pairs[i])), pairs[i+1])
		}
		return b
	}
	full := unix.Termios{Iflag: ^uint32(0), Lflag: ^uint32(0), Oflag: ^uint32(0), Cflag: ^uint32(0)}
	for _, test := range []struct {
		name  string
		modes []byte
		begin unix.Termios
		check func(unix.Termios) bool
	}{
		{"character", m(1, 3), full, func(x unix.Termios) bool { return x.Cc[unix.VINTR] == 3 }},
		{"none", m(1, 255), unix.Termios{Cc: [19]uint8{5}}, func(x unix.Termios) bool { return x.Cc[unix.VINTR] == 0 }},
		{"clear", m(53, 0, 38, 0, 70, 0, 92, 0), full, func(x unix.Termios) bool {
			return x.Lflag&unix.ECHO == 0 && x.Iflag&unix.IXON == 0 && x.Oflag&unix.OPOST == 0 && x.Cflag&unix.PARENB == 0 &&
				x.Lflag == ^uint32(unix.ECHO) && x.Iflag == ^uint32(unix.IXON)
		}},
		{"set", m(51, 1, 42, 7), unix.Termios{}, func(x unix.Termios) bool {
			return x.Lflag == unix.ICANON && x.Iflag == unix.IUTF8 && x.Cflag == 0 && x.Oflag == 0
		}},
		{"size", m(90, 1, 91, 1), full, func(x unix.Termios) bool { return x.Cflag&unix.CSIZE == unix.CS8 }},
		{"speed", m(129, 19200, 128, 9600), full, func(x unix.Termios) bool {
			return x.Cflag&unix.CBAUD == unix.B19200 && x.Ospeed == unix.B19200 && x.Ispeed == unix.B9600
		}},
		{"unknown", m(99, 1, 51, 1), unix.Termios{}, func(x unix.Termios) bool { return x.Lflag == unix.ICANON }},
		{"end", m(0, 0, 51, 1), unix.Termios{}, func(x unix.Termios) bool { return x.Lflag == 0 }},
		{"cut", append(m(51, 1), 53, 0, 0), unix.Termios{}, func(x unix.Termios) bool { return x.Lflag == unix.ICANON }},
	} {
		applyModes(&test.begin, test.modes)
		if !test.check(test.begin) {
			t.Errorf("%s: %+v", test.name, test.begin)
		}
	}
}

func FuzzModes(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 3, 0})
	f.Fuzz(func(t *testing.T, b []byte) { applyModes(&unix.Termios{}, b) })
}

func TestFrames(t *testing.T) {
	var stream []byte
	add := func(kind byte, s string) {
		h := make([]byte, frameHeader)
		putFrameHeader(h, kind, len(s))
		stream = append(append(stream, h...), s...)
	}
	add(1, "hello")
	add(2, "x")
	add(1, "")
	add(2, strings.Repeat("y", maxFrame))
	for _, step := range []int{1, 3, 7, 1 << 20} {
		var f frames
		var got [3]bytes.Buffer
		var ends []byte
		for b := stream; len(b) > 0; {
			n := min(step, len(b))
			if err := f.feed(b[:n], func(kind byte, p []byte) error {
				if p == nil {
					ends = append(ends, kind)
				}
				got[kind].Write(p)
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			b = b[n:]
		}
		if got[1].String() != "hello" || got[2].Len() != 1+maxFrame || !bytes.Equal(ends, []byte{1}) || f.inFrame() {
			t.Errorf("step %d: %q, %d, %v", step, got[1].String(), got[2].Len(), ends)
		}
	}
	var f frames
	if err := f.feed([]byte{1, 0, 1, 0, 1}, nil); !errors.Is(err, errFrame) {
		t.Errorf("too long a frame: %v", err)
	}
}

// pair returns both ends of a unix stream socket.
func pair(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		if conns[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
		t.Cleanup(func() { conns[i].Close() })
	}
	return conns[0], conns[1]
}

func newKey(t testing.TB) (ed25519.PublicKey, ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return public, private
}

func TestHandshake(t *testing.T) {
	public, private := newKey(t)
	_, other := newKey(t)
	for name, test := range map[string]struct {
		key  ed25519.PrivateKey
		want error
	}{"the gate": {private, nil}, "another": {other, ErrNotGate}} {
		gate, inside := pair(t)
		go prove(gate, test.key, nil)
		if _, err := challenge(inside, public); !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A signature made for one nonce is none for another.
	gate, inside := pair(t)
	go func(gate net.Conn) {
		io.ReadFull(gate, make([]byte, len(magic)+nonceSize))
		gate.Write(ed25519.Sign(private, append([]byte(signatureContext), make([]byte, nonceSize)...)))
	}(gate)
	if _, err := challenge(inside, public); !errors.Is(err, ErrNotGate) {
		t.Errorf("replayed: %v", err)
	}
	gate, inside = pair(t)
	go inside.Write(bytes.Repeat([]byte("SSH-2.0-"), 8))
	if err := prove(gate, private, nil); err == nil {
		t.Error("signed for who is not an agent")
	}
}

func TestCoalescer(t *testing.T) {
	a, b := pair(t)
	c := newCoalescer(a)
	var got bytes.Buffer
	read := make(chan error, 1)
	go func() {
		_, err := io.Copy(&got, b)
		read <- err
	}()
	var want bytes.Buffer
	for i := range 3000 {
		p := bytes.Repeat([]byte{byte(i)}, i%1500)
		if i == 77 {
			p = make([]byte, 3*coalesceLimit+5)
		}
		want.Write(p)
		if n, err := c.Write(p); n != len(p) || err != nil {
			t.Fatal(n, err)
		}
	}
	for { // until all is written
		c.mu.Lock()
		idle := c.pending == nil
		c.mu.Unlock()
		if idle {
			break
		}
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond)
	c.Close()
	if err := <-read; err != nil {
		t.Error(err)
	}
	if !bytes.Equal(got.Bytes(), want.Bytes()) {
		t.Errorf("%d bytes, want %d", got.Len(), want.Len())
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("wrote after Close")
	}
	// A writer that waits for room is freed by Close.
	a, _ = pair(t)
	c = newCoalescer(a)
	freed := make(chan error, 1)
	go func() {
		for {
			if _, err := c.Write(make([]byte, 64<<10)); err != nil {
				freed <- err
				return
			}
		}
	}()
	time.Sleep(20 * time.Millisecond)
	c.Close()
	if err := <-freed; err == nil {
		t.Error("no error")
	}
}

func TestGulper(t *testing.T) {
	a, b := pair(t)
	want := make([]byte, 3<<20+17)
	rand.Read(want)
	go func() {
		for rest, i := want, 1; len(rest) > 0; i++ {
			n := min(len(rest), i*977%(200<<10)+1)
			a.Write(rest[:n])
			rest = rest[n:]
		}
		a.Close()
	}()
	g := &gulper{Conn: b}
	got, err := io.ReadAll(iotest.OneByteReader(io.LimitReader(g, 100)))
	if err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(bufio.NewReader(g))
	if err != nil || !bytes.Equal(append(got, rest...), want) {
		t.Errorf("%d bytes, want %d: %v", len(got)+len(rest), len(want), err)
	}
	if g.buffer != nil && !g.busy {
		t.Error("an idle reader holds a buffer")
	}
}

// fakeAgent is an agent that a test has in hand: the handshake and the greeting are honest.
type fakeAgent struct {
	conn    net.Conn
	session *yamux.Session
	control *yamux.Stream
}

func newFakeAgent(t testing.TB, p pace) (*Client, *fakeAgent) {
	t.Helper()
	gate, inside := pair(t)
	public, private := newKey(t)
	made := make(chan *fakeAgent, 1)
	go func() {
		a := &fakeAgent{conn: inside}
		defer func() { made <- a }()
		if _, err := challenge(inside, public); err != nil {
			return
		}
		a.session, _ = yamux.Server(inside, muxConfig(insideWindow))
		a.control, _ = a.session.AcceptStream()
		var o opening
		if readMessage(a.control, maxRequest, &o) == nil {
			writeMessage(a.control, welcome{Version: Version})
		}
	}()
	c, err := newClient(struct{ net.Conn }{gate}, private, Hello{}, p) // no unix socket: bytes travel on streams
	if err != nil {
		t.Fatal(err)
	}
	a := <-made
	t.Cleanup(func() {
		c.Close()
		a.session.Close()
	})
	return c, a
}

// process takes a process's two streams.
func (a *fakeAgent) process() (control, data *yamux.Stream, err error) {
	for range 2 {
		s, err := a.session.AcceptStream()
		if err != nil {
			return nil, nil, err
		}
		var o opening
		if err := readMessage(s, maxRequest, &o); err != nil {
			return nil, nil, err
		}
		if o.Op == opData {
			data = s
		} else {
			control = s
		}
	}
	return control, data, nil
}

func waitDone(t *testing.T, c *Client) {
	t.Helper()
	select {
	case <-c.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the stream has not ended")
	}
	if c.Err() == nil {
		t.Error("no error")
	}
}

func TestHeartbeat(t *testing.T) {
	quick := pace{20 * time.Millisecond, 300 * time.Millisecond}
	c, a := newFakeAgent(t, quick)
	begin := time.Now()
	for i := range 30 {
		a.control.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := a.control.Read(make([]byte, 8)); err != nil {
			t.Fatalf("beat %d: %v", i, err)
		}
		if _, err := a.control.Write([]byte{0}); err != nil {
			t.Fatalf("beat %d: %v", i, err)
		}
	}
	if c.Err() != nil || time.Since(begin) < quick.missed {
		t.Fatalf("after %v: %v", time.Since(begin), c.Err())
	}
	// The agent is silent, though its connection is open.
	waitDone(t, c)
	if !strings.Contains(c.Err().Error(), "heartbeat") {
		t.Error(c.Err())
	}
}

// TestForbiddenFrames has an agent do what ours never does: each ends the stream.
func TestForbiddenFrames(t *testing.T) {
	frame := func(version, kind byte, flags uint16, stream, length uint32) []byte {
		b := binary.BigEndian.AppendUint16([]byte{version, kind}, flags)
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, stream), length)
	}
	for name, b := range map[string][]byte{
		"open a stream":   frame(0, muxWindowUpdate, muxSYN, 2, 0),
		"open with data":  append(frame(0, muxData, muxSYN, 2, 1), 0),
		"ping":            frame(0, 2, muxSYN, 0, 1),
		"pong":            frame(0, 2, 2, 0, 1),
		"unknown type":    frame(0, 9, 0, 0, 0),
		"unknown version": frame(1, 0, 0, 1, 0),
		"large frame":     frame(0, muxData, 0, 1, window+1),
		"large window":    frame(0, muxWindowUpdate, 0, 1, window+1),
		"garbage":         bytes.Repeat([]byte("\xffgarbage"), 5),
	} {
		t.Run(name, func(t *testing.T) {
			c, a := newFakeAgent(t, normalPace)
			a.conn.Write(b)
			waitDone(t, c)
			if strings.Contains(c.Err().Error(), "heartbeat") {
				t.Error("only silence ended it")
			}
		})
	}
}

// TestHostileReports has an agent answer a request with nonsense: Exec returns an error, and the stream lives on.
func TestHostileReports(t *testing.T) {
	frame := func(kind byte, s string) []byte {
		h := make([]byte, frameHeader)
		putFrameHeader(h, kind, len(s))
		return append(h, s...)
	}
	message := func(v any) []byte {
		var b bytes.Buffer
		if err := writeMessage(&b, v); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	type answer struct{ control, data []byte }
	for name, x := range map[string]answer{
		"huge message":      {control: []byte{0xff, 0xff, 0xff, 0xff}},
		"bad CBOR":          {control: []byte{0, 0, 0, 2, 0x9f, 0x9f}},
		"empty report":      {control: message(report{})},
		"started twice":     {control: append(message(report{Started: true}), message(report{Started: true})...)},
		"impossible code":   {control: message(report{Exit: &exit{Code: 256}})},
		"impossible signal": {control: message(report{Exit: &exit{Signal: "X\x1b[2J"}})},
		"typed nothing":     {control: message(report{Typed: &typed{Bytes: 1}})},
		"failed":            {control: message(report{Failed: &failure{Text: "\x1b[2Jno\n" + strings.Repeat("x", 2000)}})},
		"stdin frame":       {data: frame(0, "x")},
		"unknown frame":     {data: frame(7, "x")},
		"stderr of a pty":   {data: frame(2, "x")},
		"after the end":     {data: append(frame(1, ""), frame(1, "x")...)},
		"huge frame":        {data: []byte{1, 0xff, 0, 0, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			c, a := newFakeAgent(t, normalPace)
			go func() {
				control, data, err := a.process()
				if err != nil {
					return
				}
				control.Write(x.control)
				data.Write(x.data)
				if x.control == nil { // obeys the order to kill
					var o order
					for readMessage(control, maxRequest, &o) == nil && !o.Kill {
					}
					writeMessage(control, report{Exit: &exit{Signal: "KILL"}})
				}
				data.Close()
				control.Close()
			}()
			ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
			defer stop()
			_, err := c.Exec(ctx, backends.Process{
				Kind: backends.KindShell, Terminal: &backends.Terminal{}, Stdout: io.Discard,
				Typed: func(int, backends.TerminalState) { t.Error("Typed was called") },
			})
			if err == nil || ctx.Err() != nil || errors.Is(err, backends.ErrGone) {
				t.Errorf("%v", err)
			}
			if strings.ContainsAny(fmt.Sprint(err), "\x1b\n") || len(fmt.Sprint(err)) > 600 {
				t.Errorf("%q", err)
			}
			if c.Err() != nil {
				t.Errorf("the stream ended: %v", c.Err())
			}
		})
	}
}

// FuzzClientMessages feeds a client whatever an agent could send: after the handshake, or on a process's streams.
func FuzzClientMessages(f *testing.F) {
	var b bytes.Buffer
	for _, v := range []report{
		{Started: true}, {Typed: &typed{Bytes: 3, Echo: true}}, {Exit: &exit{Code: 3}}, {Exit: &exit{Signal: "TERM"}},
		{Failed: &failure{Code: failedNoShell}}, {Failed: &failure{Text: "x"}},
	} {
		writeMessage(&b, v)
		f.Add(uint8(0), b.Bytes())
	}
	f.Add(uint8(1), []byte{1, 0, 0, 0, 2, 'h', 'i', 1, 0, 0, 0, 0, 2, 0, 0, 0, 0})
	f.Add(uint8(2), []byte{0, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0})
	f.Add(uint8(2), []byte{0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0, 1, 7})
	f.Fuzz(func(t *testing.T, where uint8, b []byte) {
		c, a := newFakeAgent(t, normalPace)
		go func() {
			control, data, err := a.process()
			if err != nil {
				return
			}
			switch where % 3 {
			case 0:
				control.Write(b)
			case 1:
				data.Write(b)
			case 2:
				a.conn.Write(b)
			}
			control.Close()
			data.Close()
			a.session.Close()
		}()
		c.Exec(context.Background(), backends.Process{
			Kind: backends.KindExec, Stdin: strings.NewReader("in"), Stdout: io.Discard, Stderr: io.Discard,
		})
		c.Close()
	})
}

// FuzzRequests feeds an agent's parsers.
func FuzzRequests(f *testing.F) {
	var b bytes.Buffer
	writeMessage(&b, opening{Op: opProcess, Process: 3, Request: request{Kind: 2, Command: "x", Env: []string{"A=b"}}})
	f.Add(b.Bytes())
	b.Reset()
	writeMessage(&b, opening{Op: opDial, Forward: forward{Network: "tcp", Address: "127.0.0.1:80"}, Request: request{X11: &x11{Display: 1}}})
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		var o opening
		if readMessage(bytes.NewReader(b), maxRequest, &o) == nil {
			splitWords(o.Request.Command)
			parseTarget(o.Forward.Address)
			listenFamily(o.Forward.Address)
			checkSocketPath(o.Forward.Address)
			if o.Request.X11 != nil {
				o.Request.X11.authority("")
			}
		}
		var r order
		readMessage(bytes.NewReader(b), maxReport, &r)
	})
}

// startAgent starts an agent of its own process. The channel is closed when it has ended.
func startAgent(t testing.TB, key ed25519.PublicKey) (net.Conn, *exec.Cmd, <-chan struct{}) {
	t.Helper()
	ours, theirs := pair(t)
	f, err := theirs.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	defer f.Close()
	cmd := exec.Command(self)
	cmd.Args = []string{serveName, "--fd", "3", "--home", t.TempDir(), "--key", base64.StdEncoding.EncodeToString(key)}
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
	})
	return ours, cmd, ended
}

func waitEnd(t *testing.T, ended <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal(what + ": the agent has not ended")
	}
}

func TestAgentEndsWithoutGate(t *testing.T) {
	public, _ := newKey(t)
	_, other := newKey(t)
	conn, _, ended := startAgent(t, public)
	conn.Close()
	waitEnd(t, ended, "closed")
	conn, _, ended = startAgent(t, public)
	go prove(conn, other, nil)
	waitEnd(t, ended, "another key")
}

// TestAgentEndsAll ends the stream: what the session started is dead when the agent has ended, however it tried to
// live.
func TestAgentEndsAll(t *testing.T) {
	public, private := newKey(t)
	conn, cmd, ended := startAgent(t, public)
	c, err := NewClient(context.Background(), conn, private, Hello{User: "u"})
	if err != nil {
		t.Fatal(err)
	}
	var out lockedBuffer
	gone := make(chan error, 1)
	go func() {
		_, err := c.Exec(context.Background(), backends.Process{
			Kind: backends.KindExec, Stdout: &out, Stderr: &out,
			Command: `trap '' HUP TERM; (setsid sh -c 'trap "" HUP; echo $$; exec sleep 1000' &) ; ` +
				`(setsid sleep 1000 & echo $!) & echo $$; sleep 1000`,
		})
		gone <- err
	}()
	for end := time.Now().Add(10 * time.Second); strings.Count(out.String(), "\n") < 3; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no output: %q", out.String())
		}
	}
	// No signal that its session can send ends it.
	for _, sig := range []syscall.Signal{
		syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGSEGV, syscall.SIGPIPE, syscall.SIGUSR1,
		syscall.SIGABRT, syscall.SIGALRM, syscall.SIGBUS, syscall.SIGCHLD,
	} {
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatalf("%v: %v", sig, err)
		}
	}
	if _, err := c.Exec(context.Background(), backends.Process{Kind: backends.KindExec, Command: "true"}); err != nil {
		t.Errorf("after the signals: %v", err)
	}
	c.Close()
	if err := <-gone; !errors.Is(err, backends.ErrGone) {
		t.Errorf("Exec: %v", err)
	}
	waitEnd(t, ended, "stream closed")
	for _, pid := range strings.Fields(out.String()) {
		if _, err := os.Stat("/proc/" + pid); err == nil {
			t.Errorf("process %s is alive", pid)
		}
	}
}

func TestAgentEndsAtItsDeadline(t *testing.T) {
	public, private := newKey(t)
	conn, _, ended := startAgent(t, public)
	c, err := NewClient(context.Background(), conn, private, Hello{Deadline: time.Now().Add(-expiryGrace)})
	if err == nil {
		defer c.Close()
	}
	waitEnd(t, ended, "deadline")
}

func TestNewClientCancelled(t *testing.T) {
	gate, _ := pair(t)
	_, private := newKey(t)
	ctx, stop := context.WithCancel(context.Background())
	time.AfterFunc(10*time.Millisecond, stop)
	if _, err := NewClient(ctx, gate, private, Hello{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := gate.Write([]byte("x")); err == nil {
		t.Error("the connection is open")
	}
}

func TestMainCommand(t *testing.T) {
	for _, test := range []struct {
		args []string
		code int
	}{
		{[]string{"x", "version"}, 0}, {[]string{"x"}, 1}, {[]string{"x", "serve"}, 1}, {[]string{"x", "nonsense"}, 1},
		{[]string{"x", "serve", "--key", "AAAA", "--socket", "/x"}, 1}, {[]string{"x", "serve", "--bad"}, 1},
	} {
		var out, errs bytes.Buffer
		if code := Main(test.args, &out, &errs); code != test.code || (code != 0) == (errs.Len() == 0) {
			t.Errorf("%q: %d, %q", test.args, code, errs.String())
		}
	}
}

type lockedBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
