package agent

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/sallyport/sallyport/backends"
)

// killWait is how long Exec waits after the end of its context for the agent to say that the process is gone.
const killWait = 5 * time.Second

// orderWait bounds the sending of an order, which a live agent always takes at once.
const orderWait = 15 * time.Second

// chunk is what is read at once of a process that passes little: an idle one holds two of them. A read that fills its
// buffer is followed by larger ones.
const chunk = 4 << 10

// grown gives the buffer for the next read, after one of n bytes into b.
func grown(b []byte, n, most int) []byte {
	if n < len(b) || len(b) >= most {
		return b
	}
	return make([]byte, most)
}

// Hello is what an agent is told about the session it serves.
type Hello struct {
	User     string    // USER and LOGNAME of the session's processes; empty: what the image calls the uid
	Deadline time.Time // the agent ends by itself then; zero: never

	Audit   backends.ExecAudit
	Reports func(*backends.Report) error // see backends.Spec
}

// Client is the gate's end of the stream to one agent. It is safe for concurrent use.
type Client struct {
	session *yamux.Session
	control *yamux.Stream
	hander  *hander // nil: processes' bytes travel on streams
	pace    pace
	next    atomic.Uint64 // number of the last process or listener

	listeners atomic.Int32 // how many there are

	channels atomic.Uint32 // the highest one that has had a process
	audited  string        // see ExecAudit
	reported *reported     // nil: nothing is

	done chan struct{} // closed when the stream has ended

	mu     sync.Mutex // guards what follows
	err    error      // why the stream ended; nil after Close
	closed bool       // done is closed, or about to be
}

// NewClient proves itself to the agent at the other end of conn with the session's key, and returns when the agent is
// ready to run processes. It owns conn from then on, and closes it if it fails or ctx ends first.
func NewClient(ctx context.Context, conn net.Conn, key ed25519.PrivateKey, hello Hello) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	c, err := newClient(conn, key, hello, normalPace)
	if !stop() && err == nil {
		c.Close()
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("reach the agent: %w", err)
	}
	return c, nil
}

func newClient(conn net.Conn, key ed25519.PrivateKey, hello Hello, pace pace) (client *Client, err error) {
	h, far, err := newHander(conn)
	if err != nil {
		return nil, err
	}
	if h != nil {
		defer far.Close()
		defer func() {
			if err != nil {
				h.conn.Close()
			}
		}()
	}
	if err := conn.SetDeadline(time.Now().Add(handshakeLimit)); err != nil {
		return nil, err
	}
	if err := prove(conn, key, far); err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	session, err := yamux.Client(newCoalescer(&guard{Conn: &gulper{Conn: conn}}), muxConfig(window))
	if err != nil {
		return nil, err
	}
	c := &Client{session: session, hander: h, pace: pace, done: make(chan struct{})}
	if err := c.greet(hello); err != nil {
		session.Close()
		return nil, err
	}
	go c.beat()
	go c.listen()
	if err := c.audit(hello.Audit, hello.Reports); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Client) greet(hello Hello) error {
	var err error
	if c.control, err = c.session.OpenStream(); err != nil {
		return err
	}
	c.control.SetDeadline(time.Now().Add(handshakeLimit))
	o := opening{Op: opControl, Greeting: greeting{Version: Version, User: hello.User}}
	if !hello.Deadline.IsZero() {
		o.Greeting.Deadline = hello.Deadline.Unix()
	}
	if err := writeMessage(c.control, o); err != nil {
		return err
	}
	var w welcome
	if err := readMessage(c.control, maxReport, &w); err != nil {
		return noEOF(err)
	}
	if w.Version != Version {
		return errors.New("the agent speaks another version of the protocol")
	}
	c.control.SetDeadline(time.Time{})
	return nil
}

// beat sends heartbeats until the stream ends.
func (c *Client) beat() {
	t := time.NewTicker(c.pace.every)
	defer t.Stop()
	for {
		select {
		case <-c.done:
			return
		case <-t.C:
		}
		c.control.SetWriteDeadline(time.Now().Add(c.pace.missed))
		if _, err := c.control.Write([]byte{0}); err != nil {
			c.end(fmt.Errorf("send heartbeat: %w", err))
			return
		}
	}
}

// listen hears the agent's heartbeats until the stream ends.
func (c *Client) listen() {
	var b [16]byte
	for {
		c.control.SetReadDeadline(time.Now().Add(c.pace.missed))
		_, err := c.control.Read(b[:])
		switch {
		case err == nil:
		case errors.Is(err, yamux.ErrTimeout):
			c.end(errors.New("no heartbeat from the sandbox"))
			return
		default:
			c.end(errors.New("the stream to the sandbox ended"))
			return
		}
	}
}

// end ends the stream because of err; nil means that Close was called. The first call counts.
func (c *Client) end(err error) {
	c.mu.Lock()
	first := !c.closed
	if first {
		c.closed, c.err = true, err
	}
	c.mu.Unlock()
	c.session.Close()
	if c.hander != nil {
		c.hander.conn.Close()
	}
	if first {
		close(c.done)
	}
}

// Done is closed when the stream has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the stream ended; it is nil before that and after Close.
func (c *Client) Err() error {
	select {
	case <-c.done:
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.err
	default:
		return nil
	}
}

// Close ends the stream, and with it the agent and all its processes.
func (c *Client) Close() error {
	c.lastReports()
	c.end(nil)
	return nil
}

// Exec runs a process in the sandbox: see backends.Sandbox. Beyond that: it never writes to p.Stdout or p.Stderr after
// it has returned, so a Write that hangs keeps it from returning. It may return while a Read of p.Stdin is still
// under way; what that Read gives is lost, and the goroutine that is in it ends when the Read does.
func (c *Client) Exec(ctx context.Context, p backends.Process) (backends.ExitStatus, error) {
	status, err := c.exec(ctx, p)
	if err != nil {
		select {
		case <-c.session.CloseChan():
			if ctx.Err() == nil {
				err = fmt.Errorf("%w: %w", backends.ErrGone, err)
			}
		default:
		}
		return status, fmt.Errorf("exec: %w", err)
	}
	// Not its own end, but that of a sandbox which is being closed under it: see lastReports.
	if r := c.reported; status.Signal == "KILL" && r != nil && r.asked.Load() && ctx.Err() == nil {
		return status, fmt.Errorf("exec: %w: its processes were killed", backends.ErrGone)
	}
	return status, nil
}

func (c *Client) exec(ctx context.Context, p backends.Process) (backends.ExitStatus, error) {
	if err := ctx.Err(); err != nil {
		return backends.ExitStatus{}, context.Cause(ctx)
	}
	r, err := newRunning(c, p)
	if err != nil {
		return backends.ExitStatus{}, err
	}
	return r.wait(ctx)
}

// running is one process as the gate sees it. Its life: newRunning opens the streams or pipes and sends the request;
// goroutines carry stdin, orders, reports and output; wait ends it.
type running struct {
	client  *Client
	p       backends.Process
	control *yamux.Stream
	data    *yamux.Stream // nil with pipes
	pipes   *pipes        // nil with data

	sent    atomic.Int64  // bytes of stdin handed to the data stream
	orders  sync.Mutex    // one order at a time on control
	over    chan struct{} // closed when the process is over for the gate
	reports chan outcome  // the only value: how the reports ended
	output  chan error    // one value of each that carries output: how that ended
	outputs int           // how many carry output
}

// outcome is the end of the reports: an exit, or an error.
type outcome struct {
	exit *exit
	err  error
}

func newRunning(c *Client, p backends.Process) (*running, error) {
	id := c.next.Add(1)
	for at := c.channels.Load(); p.Channel > at && !c.channels.CompareAndSwap(at, p.Channel); at = c.channels.Load() {
	}
	r := &running{
		client: c, p: p,
		over: make(chan struct{}), reports: make(chan outcome, 1), output: make(chan error, 2), outputs: 1,
	}
	if err := r.open(id); err != nil {
		r.hangUp()
		return nil, err
	}
	go r.readReports()
	go r.sendOrders()
	if r.pipes == nil {
		go func() { r.output <- r.takeOutput() }()
		go r.sendStdin()
		return r, nil
	}
	r.outputs = 2
	go func() { r.output <- readPipe(r.pipes[1], p.Stdout) }()
	go func() { r.output <- readPipe(r.pipes[2], p.Stderr) }()
	go r.feedPipe()
	return r, nil
}

// open opens what the process's bytes take, and sends the request.
func (r *running) open(id uint64) (err error) {
	c, p := r.client, r.p
	if p.Terminal == nil && c.hander != nil {
		if r.pipes, err = c.hander.hand(id); err != nil {
			return err
		}
	}
	if r.pipes == nil {
		if r.data, err = c.session.OpenStream(); err != nil {
			return err
		}
		if err := writeMessage(r.data, opening{Op: opData, Process: id}); err != nil {
			return err
		}
	}
	if r.control, err = c.session.OpenStream(); err != nil {
		return err
	}
	o := opening{Op: opProcess, Process: id, Request: request{
		Kind: uint8(p.Kind), Command: p.Command, Env: p.Env, Dir: p.Dir,
		Typed: p.Typed != nil && p.Terminal != nil, Pipes: r.pipes != nil, Channel: p.Channel,
	}}
	if t := p.Terminal; t != nil {
		o.Request.Terminal = &terminal{Term: t.Term, Size: sizeOf(t.Size), Modes: t.Modes}
	}
	if x := p.X11; x != nil {
		o.Request.X11 = &x11{Display: x.Display, Screen: x.Screen, Protocol: x.Protocol, Cookie: x.Cookie}
	}
	return writeMessage(r.control, o)
}

// hangUp ends the streams and pipes. An agent that still runs the process kills it then.
func (r *running) hangUp() {
	past := time.Unix(1, 0)
	for _, s := range []*yamux.Stream{r.data, r.control} {
		if s != nil {
			s.SetDeadline(past)
			s.Close()
		}
	}
	if r.pipes != nil {
		r.pipes.close()
	}
}

// cutOutput ends the output soon, where nothing more is to come: what a process has written is still read, but one
// that has left its session may keep a pipe open.
func (r *running) cutOutput() {
	if r.pipes == nil {
		return
	}
	limit := time.Now().Add(drainLimit)
	for _, f := range r.pipes[1:] {
		f.SetReadDeadline(limit)
	}
}

// wait waits for the exit and the end of the output, in either order.
func (r *running) wait(ctx context.Context) (backends.ExitStatus, error) {
	defer r.hangUp()
	defer close(r.over)
	var (
		status  backends.ExitStatus
		failed  error
		cut     error
		reports = r.reports
		outputs = r.outputs
		ended   = ctx.Done()
		limit   <-chan time.Time
	)
	// kill is for the end of ctx, and for output that could not be delivered.
	kill := func(err error) {
		ended = nil
		if failed == nil {
			failed = err
			limit = time.After(killWait)
			go r.order(order{Kill: true}) //nolint:errcheck // limit covers it
		}
	}
	for reports != nil || outputs > 0 {
		select {
		case o := <-reports:
			reports = nil
			if o.err != nil || failed != nil {
				r.cutOutput()
			}
			if o.err != nil {
				if r.data != nil {
					r.hangUp() // nothing more is to be expected from the stream
				}
				if failed == nil {
					failed = o.err
				}
				continue
			}
			status = backends.ExitStatus{Code: o.exit.Code, Signal: o.exit.Signal, CoreDumped: o.exit.CoreDumped}
		case err := <-r.output:
			outputs--
			if errors.Is(err, errCut) {
				// The reports may have a better reason, and may have it later.
				cut = err
				limit = time.After(killWait)
			} else if err != nil {
				kill(err)
			}
		case <-ended:
			kill(context.Cause(ctx))
		case <-limit:
			limit = nil
			r.hangUp()
		}
	}
	if failed == nil {
		failed = cut
	}
	return status, failed
}

// errCut is the end of a process's output before its end was told.
var errCut = errors.New("the output was cut off")

func (r *running) readReports() {
	e, err := r.takeReports()
	r.reports <- outcome{e, err}
}

func (r *running) takeReports() (*exit, error) {
	var acknowledged int64
	started := false
	for {
		var m report
		if err := readMessage(r.control, maxReport, &m); err != nil {
			return nil, noEOF(err)
		}
		switch {
		case m.Failed != nil:
			if m.Failed.Code == failedNoShell {
				return nil, backends.ErrNoShell
			}
			return nil, fmt.Errorf("agent: %s", printable(m.Failed.Text))
		case m.Started && !started:
			started = true
		case m.Typed != nil && r.p.Typed != nil && r.p.Terminal != nil:
			acknowledged += int64(m.Typed.Bytes)
			if acknowledged > r.sent.Load() {
				return nil, errors.New("agent: acknowledged input that was not sent")
			}
			r.p.Typed(int(m.Typed.Bytes), backends.TerminalState{Echo: m.Typed.Echo, Canonical: m.Typed.Canonical})
		case m.Exit != nil:
			if m.Exit.Code < 0 || m.Exit.Code > 255 || !signalName(m.Exit.Signal) {
				return nil, errors.New("agent: impossible exit status")
			}
			return m.Exit, nil
		default:
			return nil, errors.New("agent: unexpected report")
		}
	}
}

// signalName says whether s can be a signal's name, or is empty.
func signalName(s string) bool {
	if len(s) > 16 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'A' || c > 'Z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}

// printable makes text of a sandbox fit for a log and a terminal.
func printable(s string) string {
	if len(s) > 512 {
		s = s[:512]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}

// readPipe hands on what comes from f until no process holds the other end any more.
func readPipe(f *os.File, to io.Writer) error {
	b := make([]byte, chunk)
	for {
		n, err := f.Read(b)
		if n > 0 && to != nil {
			if _, werr := to.Write(b[:n]); werr != nil {
				return werr
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("%w: %w", errCut, err)
		}
		b = grown(b, n, maxFrame)
	}
}

// feedPipe hands input to the process. When nobody reads it any more it is still taken, so that the client is never
// held up.
func (r *running) feedPipe() {
	f := r.pipes[0]
	defer f.Close()
	b := make([]byte, chunk)
	for open := true; r.p.Stdin != nil; {
		n, err := r.p.Stdin.Read(b)
		select {
		case <-r.over:
			return
		default:
		}
		if open && n > 0 {
			if _, werr := f.Write(b[:n]); werr != nil {
				open = false
				f.Close()
			}
		}
		if err != nil {
			return
		}
		b = grown(b, n, maxFrame)
	}
}

// takeOutput hands output on until both directions have ended.
func (r *running) takeOutput() error {
	var f frames
	stdoutOpen, stderrOpen := true, r.p.Terminal == nil
	emit := func(kind byte, b []byte) error {
		var to io.Writer
		switch {
		case kind == frameStdout && stdoutOpen:
			to, stdoutOpen = r.p.Stdout, b != nil
		case kind == frameStderr && stderrOpen:
			to, stderrOpen = r.p.Stderr, b != nil
		default:
			return errFrame
		}
		if len(b) == 0 || to == nil {
			return nil
		}
		_, err := to.Write(b)
		return err
	}
	b := make([]byte, chunk)
	for stdoutOpen || stderrOpen {
		n, err := r.data.Read(b)
		if ferr := f.feed(b[:n], emit); ferr != nil {
			return ferr
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errCut, noEOF(err))
		}
		b = grown(b, n, maxFrame)
	}
	if f.inFrame() {
		return errFrame
	}
	return nil
}

func (r *running) sendStdin() {
	b := make([]byte, frameHeader+chunk)
	for r.p.Stdin != nil {
		n, err := r.p.Stdin.Read(b[frameHeader:])
		select {
		case <-r.over:
			return
		default:
		}
		if n > 0 {
			putFrameHeader(b, frameStdin, n)
			r.sent.Add(int64(n))
			if _, werr := r.data.Write(b[:frameHeader+n]); werr != nil {
				return
			}
		}
		if err != nil {
			break
		}
		b = grown(b, frameHeader+n, frameHeader+maxFrame)
	}
	putFrameHeader(b, frameStdin, 0)
	r.data.Write(b[:frameHeader]) // an error is seen by the reader of the same stream
}

func (r *running) sendOrders() {
	resize, signals := r.p.Resize, r.p.Signals
	for resize != nil || signals != nil {
		var o order
		select {
		case <-r.over:
			return
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			s := sizeOf(size)
			o.Resize = &s
		case name, ok := <-signals:
			if !ok {
				signals = nil
				continue
			}
			o.Signal = name
		}
		if r.order(o) != nil {
			return
		}
	}
}

func (r *running) order(o order) error {
	r.orders.Lock()
	defer r.orders.Unlock()
	r.control.SetWriteDeadline(time.Now().Add(orderWait))
	return writeMessage(r.control, o)
}
