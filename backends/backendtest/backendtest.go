// Package backendtest is the contract of backends.Backend as a test suite, and a backend without containers for unit
// tests.
package backendtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pkg/sftp"

	"github.com/sallyport/sallyport/backends"
)

// Subject is a backend to be tested. Its sandboxes need a shell and the tools of busybox.
type Subject struct {
	Backend backends.Backend
	// Spec returns a spec that the backend can start, with an Owner of its own.
	Spec func() backends.Spec
	// Kill ends a sandbox from outside, as an operator or the kernel would.
	Kill func(backends.Sandbox) error
	// Own is a directory of the agent's own, as seen inside; empty: there is none.
	Own string
}

// limit is how long anything in a test may take.
const limit = 60 * time.Second

// nap is for how many seconds the processes sleep that a test must end: a number of this run alone, as a backend may
// show the processes of others.
var nap = strconv.Itoa(100000 + mathrand.IntN(900000))

// Run tests a backend.
func Run(t *testing.T, s Subject) {
	tests := []struct {
		name string
		run  func(*testing.T, backends.Sandbox)
	}{
		{"ExitStatus", exitStatus},
		{"Signals", signals},
		{"Environment", environment},
		{"Streams", streams},
		{"Reopen", reopen},
		{"HalfClose", halfClose},
		{"EarlyExit", earlyExit},
		{"BulkOut", bulkOut},
		{"BulkBoth", bulkBoth},
		{"Dribble", dribble},
		{"ManyAtOnce", manyAtOnce},
		{"LargeEnvironment", largeEnvironment},
		{"Background", background},
		{"FailingWriter", failingWriter},
		{"Cancel", cancel},
		{"CancelStalled", cancelStalled},
		{"CancelDetached", cancelDetached},
		{"Terminal", terminal},
		{"TerminalModes", terminalModes},
		{"TerminalLastOutput", terminalLastOutput},
		{"TerminalCancel", terminalCancel},
		{"Typed", typed},
		{"TypedLast", typedLast},
		{"SFTP", sftpBoth},
	}
	t.Run("OneSandbox", func(t *testing.T) {
		sandbox := start(t, s)
		for _, test := range tests {
			t.Run(test.name, func(t *testing.T) { test.run(t, sandbox) })
		}
		t.Run("Forward", func(t *testing.T) { forwarding(t, sandbox, s) })
		t.Run("NothingRuns", func(t *testing.T) { nothingRuns(t, sandbox) })
	})
	t.Run("Close", func(t *testing.T) { closing(t, s) })
	t.Run("Death", func(t *testing.T) { death(t, s) })
	t.Run("ForwardClose", func(t *testing.T) {
		forwardEnd(t, s, func(sandbox backends.Sandbox) error { return sandbox.Close(withLimit(t)) })
	})
	t.Run("ForwardDeath", func(t *testing.T) { forwardEnd(t, s, s.Kill) })
	t.Run("StartCancelled", func(t *testing.T) { startCancelled(t, s) })
	t.Run("StartedAtOnce", func(t *testing.T) { startedAtOnce(t, s) })
}

func start(t *testing.T, s Subject) backends.Sandbox {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	sandbox, err := s.Backend.Start(ctx, s.Spec())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, stop := context.WithTimeout(context.Background(), limit)
		defer stop()
		if err := sandbox.Close(ctx); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return sandbox
}

// result is what a process gave.
type result struct {
	status         backends.ExitStatus
	stdout, stderr string
	err            error
}

func execute(t *testing.T, s backends.Sandbox, p backends.Process) result {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	var stdout, stderr bytes.Buffer
	if p.Stdout == nil {
		p.Stdout = &stdout
	}
	if p.Stderr == nil {
		p.Stderr = &stderr
	}
	status, err := s.Exec(ctx, p)
	return result{status, stdout.String(), stderr.String(), err}
}

// command runs a command that must succeed, and returns its output.
func command(t *testing.T, s backends.Sandbox, line string, env ...string) string {
	t.Helper()
	r := execute(t, s, backends.Process{Kind: backends.KindExec, Command: line, Env: env})
	if r.err != nil || r.status != (backends.ExitStatus{}) {
		t.Fatalf("%q: %+v", line, r)
	}
	return r.stdout
}

func exitStatus(t *testing.T, s backends.Sandbox) {
	for line, want := range map[string]backends.ExitStatus{
		"true":                 {},
		"exit 1":               {Code: 1},
		"exit 255":             {Code: 255},
		"kill -TERM $$":        {Signal: "TERM"},
		"kill -KILL $$":        {Signal: "KILL"},
		"no-such-command-here": {Code: 127},
	} {
		r := execute(t, s, backends.Process{Kind: backends.KindExec, Command: line})
		if r.err != nil || r.status != want {
			t.Errorf("%q: %+v, want %+v", line, r, want)
		}
	}
}

func signals(t *testing.T, s backends.Sandbox) {
	names := make(chan string)
	out := newWatcher()
	go func() {
		out.wait("ready")
		names <- "USR1"
		out.wait("one")
		names <- "NONSENSE"
		names <- "TERM"
		close(names)
	}()
	// Stdin that is never read must not hold up a signal.
	stdin, feed := io.Pipe()
	defer feed.Close()
	go func() {
		for {
			if _, err := feed.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}()
	r := execute(t, s, backends.Process{
		Kind: backends.KindExec, Command: `trap 'echo one' USR1; echo ready; while :; do sleep 0.05; done`,
		Signals: names, Stdin: stdin, Stdout: out,
	})
	stdin.Close()
	if r.err != nil || r.status.Signal != "TERM" {
		t.Errorf("%+v, output %q", r, out.String())
	}
}

func environment(t *testing.T, s backends.Sandbox) {
	out := command(t, s, `echo "$HOME|$PWD|$A|$B|${PATH:+path}|${SHELL:+shell}|${TERM-no}"`,
		"A=first", "A=a b\xff'", "B=", "=x", "novalue", "Z=\x00")
	f := strings.Split(strings.TrimSuffix(out, "\n"), "|")
	if len(f) != 7 || f[0] == "" || f[0] != f[1] || f[2] != "a b\xff'" || f[3] != "" || f[4] != "path" ||
		f[5] != "shell" {
		t.Errorf("%q", out)
	}
	r := execute(t, s, backends.Process{Kind: backends.KindExec, Command: "pwd", Dir: "/"})
	if r.stdout != "/\n" {
		t.Errorf("Dir: %+v", r)
	}
	r = execute(t, s, backends.Process{Kind: backends.KindExec, Command: "pwd", Dir: "/no/such/dir"})
	if r.err == nil && r.status.Code == 0 {
		t.Errorf("missing Dir: %+v", r)
	}
	r = execute(t, s, backends.Process{Kind: backends.KindShell, Stdin: strings.NewReader("echo $0; exit 3\n")})
	if r.err != nil || r.status.Code != 3 || !strings.HasPrefix(r.stdout, "-") {
		t.Errorf("shell: %+v", r)
	}
}

func largeEnvironment(t *testing.T, s backends.Sandbox) {
	big := strings.Repeat("x", 100<<10)
	if out := command(t, s, `echo ${#BIG}`, "BIG="+big); out != strconv.Itoa(len(big))+"\n" {
		t.Errorf("%q", out)
	}
	line := "echo ok #" + strings.Repeat("y", 100<<10)
	if out := command(t, s, line); out != "ok\n" {
		t.Errorf("%q", out)
	}
}

func streams(t *testing.T, s backends.Sandbox) {
	r := execute(t, s, backends.Process{Kind: backends.KindExec, Command: "echo out; echo err >&2; echo out2"})
	if r.stdout != "out\nout2\n" || r.stderr != "err\n" || r.err != nil {
		t.Errorf("%+v", r)
	}
	// Without stdin a reader meets the end at once.
	if out := command(t, s, "cat; echo end"); out != "end\n" {
		t.Errorf("%q", out)
	}
	// A closed stdout or stderr does not end the other.
	r = execute(t, s, backends.Process{Kind: backends.KindExec, Command: "exec >&-; sleep 0.1; echo late >&2"})
	if r.stderr != "late\n" || r.err != nil {
		t.Errorf("%+v", r)
	}
}

// reopen opens the standard files by name, as scripts do: they must be the user's.
func reopen(t *testing.T, s backends.Sandbox) {
	r := execute(t, s, backends.Process{
		Kind: backends.KindExec, Command: "cat /dev/stdin; echo out >/dev/stdout; echo err >/dev/stderr", Stdin: strings.NewReader("in\n"),
	})
	if r.stdout != "in\nout\n" || r.stderr != "err\n" || r.err != nil {
		t.Errorf("%+v", r)
	}
}

func halfClose(t *testing.T, s backends.Sandbox) {
	r := execute(t, s, backends.Process{
		Kind: backends.KindExec, Command: "cat; echo done", Stdin: strings.NewReader("some input\n"),
	})
	if r.stdout != "some input\ndone\n" || r.err != nil {
		t.Errorf("%+v", r)
	}
}

func earlyExit(t *testing.T, s backends.Sandbox) {
	stdin, feed := io.Pipe()
	defer feed.Close()
	r := execute(t, s, backends.Process{Kind: backends.KindExec, Command: "exit 4", Stdin: stdin})
	if r.status.Code != 4 || r.err != nil {
		t.Errorf("idle stdin: %+v", r)
	}
	stdin.Close()
	r = execute(t, s, backends.Process{
		Kind: backends.KindExec, Command: "head -c 10; exit 5", Stdin: io.LimitReader(rand.Reader, 8<<20),
	})
	if r.status.Code != 5 || len(r.stdout) != 10 || r.err != nil {
		t.Errorf("unread stdin: %v %d %v", r.status, len(r.stdout), r.err)
	}
}

func bulkOut(t *testing.T, s backends.Sandbox) {
	const size = 64 << 20
	h := sha256.New()
	var n counter
	r := execute(t, s, backends.Process{
		Kind: backends.KindExec, Command: fmt.Sprintf("yes 0123456789abcde | head -c %d", size),
		Stdout: io.MultiWriter(h, &n),
	})
	want := sha256.New()
	io.CopyN(want, repeat("0123456789abcde\n"), size)
	if r.err != nil || int64(n) != size || !bytes.Equal(h.Sum(nil), want.Sum(nil)) {
		t.Errorf("%d bytes, %+v", n, r)
	}
}

func bulkBoth(t *testing.T, s backends.Sandbox) {
	const size = 16 << 20
	in, out := sha256.New(), sha256.New()
	var n counter
	r := execute(t, s, backends.Process{
		Kind: backends.KindExec, Command: "cat",
		Stdin: io.TeeReader(io.LimitReader(rand.Reader, size), in), Stdout: io.MultiWriter(out, &n),
	})
	if r.err != nil || int64(n) != size || !bytes.Equal(in.Sum(nil), out.Sum(nil)) {
		t.Errorf("%d bytes, %+v", n, r)
	}
}

func dribble(t *testing.T, s backends.Sandbox) {
	var in, out bytes.Buffer
	r := execute(t, s, backends.Process{
		Kind: backends.KindExec, Command: "cat", Stdin: io.TeeReader(&dribbler{n: 300}, &in), Stdout: &out,
	})
	if r.err != nil || !bytes.Equal(in.Bytes(), out.Bytes()) || in.Len() == 0 {
		t.Errorf("%d bytes in, %d out: %+v", in.Len(), out.Len(), r)
	}
}

// dribbler gives n odd little pieces, slowly.
type dribbler struct{ n int }

func (d *dribbler) Read(p []byte) (int, error) {
	if d.n == 0 {
		return 0, io.EOF
	}
	d.n--
	time.Sleep(time.Millisecond)
	return rand.Read(p[:1+d.n%7])
}

func manyAtOnce(t *testing.T, s backends.Sandbox) {
	const each = 1 << 20
	var all sync.WaitGroup
	for i := range 24 {
		all.Go(func() {
			in, out := sha256.New(), sha256.New()
			r := execute(t, s, backends.Process{
				Kind: backends.KindExec, Command: fmt.Sprintf("cat; exit %d", i),
				Stdin: io.TeeReader(io.LimitReader(rand.Reader, each), in), Stdout: out,
			})
			if r.err != nil || r.status.Code != i || !bytes.Equal(in.Sum(nil), out.Sum(nil)) {
				t.Errorf("%d: %+v", i, r)
			}
		})
	}
	all.Wait()
}

func background(t *testing.T, s backends.Sandbox) {
	// Output of a child that outlives the process is waited for, as sshd does.
	if out := command(t, s, "(sleep 0.3; echo late) & echo early"); out != "early\nlate\n" {
		t.Errorf("%q", out)
	}
	// One that holds no pipe is not.
	begin := time.Now()
	pid := command(t, s, "sleep 20 >/dev/null 2>&1 </dev/null & echo $!")
	if d := time.Since(begin); d > 15*time.Second {
		t.Errorf("took %v", d)
	}
	command(t, s, "kill "+pid)
}

func failingWriter(t *testing.T, s backends.Sandbox) {
	failure := errors.New("nobody reads")
	r := execute(t, s, backends.Process{
		Kind: backends.KindExec, Command: "yes",
		Stdout: writeFunc(func([]byte) (int, error) { return 0, failure }),
	})
	if !errors.Is(r.err, failure) {
		t.Errorf("%+v", r)
	}
}

func cancel(t *testing.T, s backends.Sandbox) {
	// It and its children ignore SIGHUP, hold the pipes, and one has left the process group.
	script := strings.ReplaceAll(`trap '' HUP; (trap '' HUP; sleep N) & setsid sleep N & echo ready; sleep N`, "N", nap)
	why := errors.New("enough")
	ctx, stop := context.WithCancelCause(context.Background())
	out := newWatcher()
	go func() { out.wait("ready"); stop(why) }()
	begin := time.Now()
	_, err := s.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: script, Stdout: out, Stderr: io.Discard})
	if !errors.Is(err, why) {
		t.Errorf("Exec: %v", err)
	}
	if d := time.Since(begin); d > 10*time.Second {
		t.Errorf("took %v", d)
	}
	if out := command(t, s, "ps -ef 2>/dev/null || ps"); strings.Contains(out, "sleep "+nap) {
		t.Errorf("still running:\n%s", out)
	}
	if _, err := s.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: "true"}); !errors.Is(err, why) {
		t.Errorf("Exec with an ended context: %v", err)
	}
}

// cancelStalled ends a process whose output nobody reads, until its context ends.
// cancelDetached ends a process one of whose children has left its session with the output open.
func cancelDetached(t *testing.T, s backends.Sandbox) {
	ctx, end := context.WithCancel(context.Background())
	defer end()
	out := newWatcher()
	ended := make(chan error, 1)
	go func() {
		_, err := s.Exec(ctx, backends.Process{
			Kind: backends.KindExec, Command: "setsid sleep " + nap + " & echo $! up; exec sleep " + nap, Stdout: out, Stderr: io.Discard,
		})
		ended <- err
	}()
	if !out.wait("up") {
		t.Fatal("did not start")
	}
	end()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(limit):
		t.Fatal("still runs")
	}
	command(t, s, "kill "+strings.Fields(out.String())[0]+" 2>&-; true")
}

func cancelStalled(t *testing.T, s backends.Sandbox) {
	ctx, stop := context.WithCancel(context.Background())
	time.AfterFunc(200*time.Millisecond, stop)
	_, err := s.Exec(ctx, backends.Process{
		Kind: backends.KindExec, Command: "yes", Stdout: writeFunc(func(b []byte) (int, error) {
			<-ctx.Done()
			return 0, io.ErrClosedPipe
		}),
	})
	if err == nil {
		t.Error("no error")
	}
	command(t, s, "true")
}

func terminal(t *testing.T, s backends.Sandbox) {
	resize := make(chan backends.WindowSize)
	stdin, feed := io.Pipe()
	out := newWatcher()
	ended := make(chan result, 1)
	go func() {
		ended <- execute(t, s, backends.Process{
			Kind: backends.KindShell, Stdin: stdin, Stdout: out, Resize: resize,
			Terminal: &backends.Terminal{Term: "xterm-test", Size: backends.WindowSize{Columns: 91, Rows: 33}},
			Env:      []string{"PS1=> "},
		})
	}()
	fmt.Fprint(feed, "stty size; echo term=$TERM; tty; test \"$(tty)\" = \"$SSH_TTY\" && echo same=$((40+2))\r")
	out.wait("33 91")
	out.wait("term=xterm-test")
	out.wait("same=42")
	resize <- backends.WindowSize{Columns: 120, Rows: 40, Width: 1200, Height: 800}
	out.waitFor(feed, "stty size\r", "40 120")
	// ^C reaches what runs in the foreground, and not the shell.
	fmt.Fprint(feed, "echo sle''eping; sleep "+nap+"\r")
	out.wait("sleeping")
	time.Sleep(100 * time.Millisecond)
	fmt.Fprint(feed, "\x03")
	fmt.Fprint(feed, "echo st''ill here; exit 7\r")
	out.wait("still here")
	r := <-ended
	feed.Close()
	if r.err != nil || r.status.Code != 7 {
		t.Errorf("%+v\n%s", r, out.String())
	}
}

func terminalModes(t *testing.T, s backends.Sandbox) {
	mode := func(op byte, value uint32) []byte { return binary.BigEndian.AppendUint32([]byte{op}, value) }
	modes := bytes.Join([][]byte{
		mode(1, 1), mode(53, 0), mode(70, 0), mode(38, 0), mode(3, 8), mode(99, 5), mode(129, 9600), {0}, mode(51, 0),
	}, nil)
	var out bytes.Buffer
	r := execute(t, s, backends.Process{
		Kind: backends.KindExec, Command: "stty -a", Stdout: &out, Terminal: &backends.Terminal{Modes: modes},
	})
	for _, want := range []string{"intr = ^A", "-echo ", "-opost", "-ixon", "erase = ^H", " icanon", "9600 baud"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in %+v\n%s", want, r, out.String())
		}
	}
	// A list cut short, and none, are no errors.
	for _, modes := range [][]byte{{1}, {1, 0, 0}, {255}, nil} {
		r := execute(t, s, backends.Process{
			Kind: backends.KindExec, Command: "true", Terminal: &backends.Terminal{Modes: modes},
		})
		if r.err != nil || r.status.Code != 0 {
			t.Errorf("%v: %+v", modes, r)
		}
	}
}

func terminalLastOutput(t *testing.T, s backends.Sandbox) {
	for range 20 {
		var out bytes.Buffer
		r := execute(t, s, backends.Process{
			Kind: backends.KindExec, Command: "yes | head -c 20000; echo; echo the end", Stdout: &out,
			Terminal: &backends.Terminal{},
		})
		if r.err != nil || !strings.HasSuffix(out.String(), "the end\r\n") || out.Len() < 30000 {
			t.Fatalf("%+v, %d bytes, ends %q", r, out.Len(), out.String()[max(0, out.Len()-20):])
		}
	}
	// What is left in the background does not keep the session open: the kernel hangs the terminal up.
	begin := time.Now()
	execute(t, s, backends.Process{
		Kind: backends.KindExec, Command: "sleep 20 & echo x", Terminal: &backends.Terminal{},
	})
	if d := time.Since(begin); d > 15*time.Second {
		t.Errorf("took %v", d)
	}
}

func terminalCancel(t *testing.T, s backends.Sandbox) {
	ctx, stop := context.WithCancel(context.Background())
	out := newWatcher()
	go func() { out.wait("ready"); stop() }()
	_, err := s.Exec(ctx, backends.Process{
		Kind: backends.KindExec, Command: "trap '' HUP; echo ready; sleep " + nap + "; sleep " + nap, Stdout: out,
		Terminal: &backends.Terminal{},
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if out := command(t, s, "ps -ef 2>/dev/null || ps"); strings.Contains(out, "sleep "+nap) {
		t.Errorf("still running:\n%s", out)
	}
}

// typed checks that each acknowledged byte carries the state that the terminal was in when it was written.
func typed(t *testing.T, s backends.Sandbox) {
	stdin, feed := io.Pipe()
	out := newWatcher()
	type ack struct {
		n     int
		state backends.TerminalState
	}
	acks := make(chan ack, 64)
	ended := make(chan result, 1)
	go func() {
		ended <- execute(t, s, backends.Process{
			Kind: backends.KindExec, Stdin: stdin, Stdout: out, Terminal: &backends.Terminal{},
			Command: "echo plain; read a; stty -echo; echo secret; read b; stty echo -icanon; echo raw; read c; echo $a$b$c",
			Typed:   func(n int, state backends.TerminalState) { acks <- ack{n, state} },
		})
	}()
	for _, step := range []struct {
		prompt, input string
		want          backends.TerminalState
	}{
		{"plain", "abc\r", backends.TerminalState{Echo: true, Canonical: true}},
		{"secret", "hunter2\r", backends.TerminalState{Canonical: true}},
		{"raw", "k\r", backends.TerminalState{Echo: true}},
	} {
		out.wait(step.prompt)
		fmt.Fprint(feed, step.input)
		for n := 0; n < len(step.input); {
			select {
			case a := <-acks:
				n += a.n
				if a.state != step.want {
					t.Errorf("%s: %+v, want %+v", step.prompt, a.state, step.want)
				}
			case r := <-ended:
				t.Fatalf("%s: ended before all was acknowledged: %+v\n%s", step.prompt, r, out.String())
			case <-time.After(limit):
				t.Fatalf("%s: %d bytes acknowledged\n%s", step.prompt, n, out.String())
			}
		}
	}
	r := <-ended
	feed.Close()
	if r.err != nil || !strings.Contains(out.String(), "abchunter2k") {
		t.Errorf("%+v\n%s", r, out.String())
	}
	if n := strings.Count(out.String(), "hunter2"); n != 1 {
		t.Errorf("the secret was echoed: %q", out.String())
	}
}

// typedLast checks that what a process ends by is acknowledged before its end is told: a password may be the last that is typed.
func typedLast(t *testing.T, s backends.Sandbox) {
	for i := range 30 {
		stdin, feed := io.Pipe()
		out := newWatcher()
		var acknowledged atomic.Int64
		ended := make(chan result, 1)
		go func() {
			ended <- execute(t, s, backends.Process{
				Kind: backends.KindExec, Stdin: stdin, Stdout: out, Terminal: &backends.Terminal{}, Command: "stty -echo; echo ready; read a",
				Typed: func(n int, state backends.TerminalState) {
					if !state.Echo {
						acknowledged.Add(int64(n))
					}
				},
			})
		}()
		out.wait("ready")
		fmt.Fprint(feed, "hunter2\r")
		r := <-ended
		feed.Close()
		if n := acknowledged.Load(); r.err != nil || n != 8 {
			t.Fatalf("%d: %d bytes acknowledged, %+v\n%s", i, n, r, out.String())
		}
	}
}

func sftpBoth(t *testing.T, s backends.Sandbox) {
	stdin, feed := io.Pipe()
	out, stdout := io.Pipe()
	ended := make(chan result, 1)
	go func() {
		r := execute(t, s, backends.Process{
			Kind: backends.KindSFTP, Stdin: stdin, Stdout: stdout, Env: []string{"GODEBUG=nonsense=1", "GOMAXPROCS=x"},
		})
		stdout.CloseWithError(io.EOF)
		ended <- r
	}()
	c, err := sftp.NewClientPipe(out, feed)
	if err != nil {
		t.Fatal(err)
	}
	content := make([]byte, 3<<20+17)
	rand.Read(content)
	f, err := c.Create("put.bin")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(content); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if f, err = c.Open("put.bin"); err != nil {
		t.Fatal(err)
	}
	var back bytes.Buffer
	if _, err := f.WriteTo(&back); err != nil || !bytes.Equal(back.Bytes(), content) {
		t.Errorf("got %d bytes back: %v", back.Len(), err)
	}
	f.Close()
	dir, err := c.Getwd()
	if home := strings.TrimSpace(command(t, s, "echo $HOME")); err != nil || dir != home {
		t.Errorf("starts in %q, not %q: %v", dir, home, err)
	}
	c.Close()
	feed.Close()
	if r := <-ended; r.err != nil || r.status != (backends.ExitStatus{}) {
		t.Errorf("%+v", r)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(content))
	if out := command(t, s, "sha256sum put.bin; rm put.bin"); !strings.HasPrefix(out, sum) {
		t.Errorf("%q, want %s", out, sum)
	}
}

// nothingRuns checks that the tests before it left no process.
func nothingRuns(t *testing.T, s backends.Sandbox) {
	out := command(t, s, "ps -ef 2>/dev/null || ps")
	if strings.Contains(out, "sleep "+nap) {
		t.Errorf("left:\n%s", out)
	}
}

func closing(t *testing.T, s Subject) {
	before := runtime.NumGoroutine()
	sandbox := start(t, s)
	if sandbox.ID() == "" || sandbox.Info().Backend == "" {
		t.Errorf("ID %q, Info %+v", sandbox.ID(), sandbox.Info())
	}
	if err := sandbox.Err(); err != nil {
		t.Errorf("Err of a running sandbox: %v", err)
	}
	out := newWatcher()
	ended := make(chan error, 1)
	go func() {
		_, err := sandbox.Exec(context.Background(), backends.Process{
			Kind: backends.KindExec, Command: "echo ready; sleep " + nap, Stdout: out,
		})
		ended <- err
	}()
	out.wait("ready")
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	for range 3 {
		if err := sandbox.Close(ctx); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	if err := <-ended; !errors.Is(err, backends.ErrGone) {
		t.Errorf("Exec under Close: %v", err)
	}
	select {
	case <-sandbox.Done():
	default:
		t.Error("not done after Close")
	}
	if err := sandbox.Err(); err != nil {
		t.Errorf("Err after Close: %v", err)
	}
	_, err := sandbox.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: "true"})
	if !errors.Is(err, backends.ErrGone) {
		t.Errorf("Exec after Close: %v", err)
	}
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("%d goroutines before, %d after", before, runtime.NumGoroutine())
			break
		}
	}
}

func death(t *testing.T, s Subject) {
	sandbox := start(t, s)
	out := newWatcher()
	ended := make(chan error, 1)
	go func() {
		_, err := sandbox.Exec(context.Background(), backends.Process{
			Kind: backends.KindExec, Command: "echo ready; sleep " + nap, Stdout: out,
		})
		ended <- err
	}()
	out.wait("ready")
	if err := s.Kill(sandbox); err != nil {
		t.Fatal(err)
	}
	select {
	case <-sandbox.Done():
	case <-time.After(limit):
		t.Fatal("not done")
	}
	if sandbox.Err() == nil {
		t.Error("no error after death")
	}
	if err := <-ended; !errors.Is(err, backends.ErrGone) {
		t.Errorf("Exec: %v", err)
	}
}

func startCancelled(t *testing.T, s Subject) {
	for _, after := range []time.Duration{0, 5 * time.Millisecond, 50 * time.Millisecond, 150 * time.Millisecond} {
		ctx, stop := context.WithTimeout(context.Background(), after)
		sandbox, err := s.Backend.Start(ctx, s.Spec())
		stop()
		if err == nil {
			sandbox.Close(context.Background())
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %v: %v", after, err)
		}
	}
}

func startedAtOnce(t *testing.T, s Subject) {
	var all sync.WaitGroup
	var mu sync.Mutex // guards ids
	ids := make(map[string]bool)
	for range 4 {
		all.Go(func() {
			ctx, stop := context.WithTimeout(context.Background(), limit)
			defer stop()
			sandbox, err := s.Backend.Start(ctx, s.Spec())
			if err != nil {
				t.Error(err)
				return
			}
			defer sandbox.Close(ctx)
			if r := execute(t, sandbox, backends.Process{Kind: backends.KindExec, Command: "echo hi"}); r.stdout != "hi\n" {
				t.Errorf("%+v", r)
			}
			mu.Lock()
			ids[sandbox.ID()] = true
			mu.Unlock()
		})
	}
	all.Wait()
	if len(ids) != 4 {
		t.Errorf("%d sandboxes", len(ids))
	}
}

// watcher is a Writer whose content can be waited for.
type watcher struct {
	mu      sync.Mutex // guards content
	content bytes.Buffer
}

func newWatcher() *watcher { return &watcher{} }

func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.content.Write(p)
}

func (w *watcher) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.content.String()
}

// wait waits until s has been written. When that does not happen, the test's own limit ends it.
func (w *watcher) wait(s string) bool { return w.waitFor(io.Discard, "", s) }

// waitFor does the same, and writes input again and again meanwhile.
func (w *watcher) waitFor(to io.Writer, input, s string) bool {
	for end, next := time.Now().Add(limit/2), time.Now(); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if strings.Contains(w.String(), s) {
			return true
		}
		if input != "" && time.Now().After(next) {
			io.WriteString(to, input)
			next = time.Now().Add(time.Second)
		}
	}
	return false
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

type writeFunc func([]byte) (int, error)

func (f writeFunc) Write(p []byte) (int, error) { return f(p) }

// repeat gives s without end.
func repeat(s string) io.Reader { return &repeater{s: s} }

type repeater struct {
	s  string
	at int
}

func (r *repeater) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = r.s[r.at]
		r.at = (r.at + 1) % len(r.s)
	}
	return len(p), nil
}
