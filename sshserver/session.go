package sshserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/transfer"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

const (
	maxEnv      = 64  // variables a channel may set
	failureCode = 255 // exit status where no program ran, as ssh itself has for its own failures
)

// session is one session channel (RFC 4254, section 6). Its requests are read in order by serve; the one process it may
// have runs beside them.
type session struct {
	c  *conn
	id uint32
	ch ssh.Channel

	ctx    context.Context // ends with the channel
	cancel context.CancelFunc

	before  <-chan struct{} // closed when the global requests that came before the channel have taken effect
	env     []string
	resize  chan backends.WindowSize // newest only
	signals chan string
	started bool           // a program was asked for: there is only one (RFC 4254, section 6.5)
	process sync.WaitGroup // the program's goroutine

	in, out, err atomic.Uint64 // bytes recorded
	keeps        [3]*keep      // by stream, once a program was asked for

	inMu     sync.Mutex // guards inClosed; held while input is recorded, so that none is after the channel's end
	inClosed bool

	agent     bool          // auth-agent-req@openssh.com was permitted
	x11       *backends.X11 // x11-req; nil: none
	x11Single bool          // for one connection

	terminal *backends.Terminal // written before running is, read after it
	running  bool               // guarded by c.mu: the program is there, with its terminal if it has one
	screen   *outlet            // the terminal, once running
	bye      sync.Once          // the client is told why the connection ends
}

func newSession(c *conn, id uint32, ch ssh.Channel, before <-chan struct{}) *session {
	s := &session{c: c, id: id, ch: ch, before: before, resize: make(chan backends.WindowSize, 1), signals: make(chan string, 16)}
	s.ctx, s.cancel = context.WithCancel(c.ctx)
	return s
}

// serve reads the channel's requests until it is closed.
func (s *session) serve(reqs <-chan *ssh.Request) {
	defer s.close(reqs)
	for req := range reqs {
		if s.c.limit.Wait(s.ctx) != nil {
			return
		}
		s.c.touch()
		if !s.request(req) {
			return
		}
	}
}

func (s *session) close(reqs <-chan *ssh.Request) {
	s.cancel()
	s.ch.Close()
	s.process.Wait()
	s.inMu.Lock()
	s.inClosed = true
	s.inMu.Unlock()
	for _, k := range s.keeps {
		if k != nil {
			k.end()
		}
	}
	// The channel takes its place, and what the client sends its memory, until the client has closed it too.
	for range reqs {
	}
	s.c.record(s.id, &auditlog.ChannelClose{Input: s.in.Load(), Output: s.out.Load(), Error: s.err.Load()})
	s.c.mu.Lock()
	delete(s.c.sessions, s.id)
	s.c.mu.Unlock()
}

// request decodes, decides, records, answers and acts, in this order. It reports whether the channel goes on.
func (s *session) request(req *ssh.Request) bool {
	rec := auditlog.Request{Type: authz.Printable(req.Type, 100)}
	var act func()
	err := s.decode(req, &rec, &act)
	rec.OK = err == nil
	if err != nil {
		rec.Reason = authz.Printable(err.Error(), 500)
		if (errors.Is(err, errMalformed) || errors.Is(err, errUnknown)) && req.Type != typeX11Request { // which holds a secret
			rec.Payload = req.Payload[:min(len(req.Payload), 1024)]
		}
	}
	if s.c.record(s.id, &rec) != nil {
		return false
	}
	isProgram := req.Type == "shell" || req.Type == "exec" || req.Type == "subsystem"
	var refused *UserError
	if isProgram && !s.started && errors.As(err, &refused) {
		// OpenSSH's client leaves at a failure without having shown what came before it; so the program "runs", says why
		// it may not, and fails.
		if req.WantReply {
			req.Reply(true, nil)
		}
		s.started = true
		s.fail(err)
		s.finish(exitStatusMsg{failureCode})
		return true // until the client closes the channel
	}
	if req.WantReply {
		req.Reply(err == nil, nil)
	}
	if err == nil && act != nil {
		act()
	}
	// A channel whose only program was refused has no use any more; OpenSSH's client would wait for it.
	return err == nil || !isProgram || s.started
}

var errUnknown = errors.New("not supported")

func (s *session) decode(req *ssh.Request, rec *auditlog.Request, act *func()) error {
	switch req.Type {
	case "pty-req":
		t, err := parsePty(req.Payload)
		if err != nil {
			return err
		}
		rec.Term, rec.Columns, rec.Rows = t.Term, t.Size.Columns, t.Size.Rows
		if s.started || s.terminal != nil {
			return errors.New("out of order")
		}
		if err := s.c.permitted(s.ctx, authz.RequestInput{Type: req.Type}); err != nil {
			return err
		}
		*act = func() { s.terminal = t }
	case "env":
		m, err := parseEnv(req.Payload)
		if err != nil {
			return err
		}
		rec.Name, rec.Value = m.Name, m.Value
		if s.started || len(s.env) >= maxEnv {
			return errors.New("out of order, or too many variables")
		}
		if err := s.c.permitted(s.ctx, authz.RequestInput{Type: req.Type, Name: m.Name}); err != nil {
			rec.Value = "" // nobody gets it, and clients send things by accident
			return err
		}
		*act = func() { s.env = append(s.env, m.Name+"="+m.Value) }
	case "shell":
		return s.program(authz.RequestInput{Type: req.Type}, backends.Process{Kind: backends.KindShell}, act)
	case "exec":
		command, err := parseExec(req.Payload)
		rec.Command = []byte(command)
		if err != nil {
			return err
		}
		if err := s.mayCopy(command); err != nil {
			return err
		}
		return s.program(authz.RequestInput{Type: req.Type, Command: command},
			backends.Process{Kind: backends.KindExec, Command: command}, act)
	case "subsystem":
		var m subsystemMsg
		if err := ssh.Unmarshal(req.Payload, &m); err != nil {
			return fmt.Errorf("%w: subsystem: %w", errMalformed, err)
		}
		rec.Name = authz.Printable(m.Name, 100)
		if m.Name != "sftp" {
			return &UserError{Text: "there is no such subsystem: only sftp"}
		}
		return s.program(authz.RequestInput{Type: req.Type, Name: m.Name}, backends.Process{Kind: backends.KindSFTP}, act)
	case "window-change":
		size, err := parseWindowChange(req.Payload)
		if err != nil {
			return err
		}
		rec.Columns, rec.Rows = size.Columns, size.Rows
		if s.terminal == nil {
			return errors.New("no terminal")
		}
		*act = func() {
			select { // only the newest size matters
			case <-s.resize:
			default:
			}
			s.resize <- size
		}
	case "signal":
		name, err := parseSignal(req.Payload)
		if err != nil {
			return err
		}
		rec.Name = name
		if !s.started {
			return errors.New("no program")
		}
		if err := s.c.permitted(s.ctx, authz.RequestInput{Type: req.Type, Name: name}); err != nil {
			return err
		}
		*act = func() {
			select {
			case s.signals <- name:
			case <-s.ctx.Done():
			default: // 16 wait already
			}
		}
	case typeAgentRequest:
		if s.started || s.agent {
			return errors.New("out of order")
		}
		if err := s.c.permitted(s.ctx, authz.RequestInput{Type: req.Type}); err != nil {
			return err
		}
		*act = func() { s.agent = true }
	case typeX11Request:
		x, single, err := parseX11(req.Payload)
		if err != nil {
			return err
		}
		rec.Name, rec.Value = x.Protocol, fmt.Sprintf("screen %d", x.Screen) // the cookie is a secret
		if single {
			rec.Value += ", single connection"
		}
		if s.started || s.x11 != nil {
			return errors.New("out of order")
		}
		if err := s.c.permitted(s.ctx, authz.RequestInput{Type: req.Type}); err != nil {
			return err
		}
		*act = func() { s.x11, s.x11Single = x, single }
	default:
		return errUnknown
	}
	return nil
}

// mayCopy refuses an exec of scp that the profile's rules on transfers forbid as a whole.
func (s *session) mayCopy(command string) error {
	cmd, ok := transfer.ParseSCPCommand(command)
	if !ok {
		return nil
	}
	rules, err := readTransferRules(s.c.permit().Transfer)
	if err != nil {
		return &UserError{Text: "the profile's rules on transfers are wrong: tell an operator", Err: err}
	}
	if why := rules.scp(cmd); why != "" {
		return &UserError{Text: why}
	}
	return nil
}

// program checks a request for the channel's one program.
func (s *session) program(in authz.RequestInput, p backends.Process, act *func()) error {
	if s.started {
		return errors.New("the channel has a program already")
	}
	if err := s.c.permitted(s.ctx, in); err != nil {
		return err
	}
	*act = func() {
		s.started = true
		s.process.Add(1)
		s.c.spawn(func() {
			defer s.process.Done()
			s.run(p)
		})
	}
	return nil
}

// run runs the program to its end, and tells the client how it ended.
func (s *session) run(p backends.Process) {
	defer s.c.touch()
	s.chooseTarget()
	sb, err := s.c.ready(s.ctx)
	if err != nil {
		s.fail(&UserError{Text: startFailure(err), Err: err})
		s.lastWords()
		s.exit(failed(err))
		return
	}
	select { // a command after ssh -R may count on the listener
	case <-s.before:
	case <-s.ctx.Done():
		s.lastWords()
		s.exit(failed(context.Cause(s.ctx)))
		return
	}
	p.Channel, p.Resize, p.Signals = s.id, s.resize, s.signals
	p.Env = append(s.variables(), s.env...)
	for i := range s.keeps {
		s.keeps[i] = newKeep(s.c, s.id, auditlog.Stream(i), dataLimit(s.c.permit()))
	}
	out := &outlet{s: s, n: &s.out, keep: s.keeps[auditlog.Output], w: s.ch}
	p.Stdout = out
	if s.terminal != nil {
		p.Terminal = s.terminal
		var done func()
		p.Stdin, p.Typed, done = s.typed(out)
		defer done()
		s.c.mu.Lock()
		s.screen, s.running = out, true
		s.c.mu.Unlock()
		if p.Kind == backends.KindShell {
			s.notice(s.c.welcome())
		}
	} else {
		p.Stderr = &outlet{s: s, n: &s.err, keep: s.keeps[auditlog.Error], w: s.ch.Stderr()}
		p.Stdin = &inlet{s: s}
		s.c.mu.Lock()
		s.running = true
		s.c.mu.Unlock()
	}
	if s.agent || s.x11 != nil {
		stop := s.sessionForwards(&p)
		defer stop()
	}
	files, err := newRelay(s, p)
	if err != nil {
		s.fail(&UserError{Text: "the profile's rules on transfers are wrong: tell an operator", Err: err})
		s.exit(failed(err))
		return
	}
	if files != nil {
		p.Stdin, p.Stdout = files.stdin, files
		s.c.spawn(files.pump)
	}
	status, err := sb.Exec(s.ctx, p)
	if files != nil {
		files.finish()
	}
	s.lastWords() // a program that lost its client's bytes may end before finish has said why
	// Only now: finish waits for the farewells of those that run, and then closes the connection.
	s.c.mu.Lock()
	s.running = false
	s.c.mu.Unlock()
	switch {
	case err == nil:
		s.exit(auditlog.Exit{Code: uint32(status.Code), Signal: status.Signal, Core: status.CoreDumped})
	case errors.Is(err, backends.ErrGone):
		why := goneCause(sb, err)
		s.fail(&UserError{Text: why.text, Err: why.detail})
		// Said here too, not only by watch: the client leaves at once, and that is not the cause.
		s.c.end(&cause{word: why.word, detail: why.detail})
		s.exit(failed(why.detail))
	case errors.Is(err, backends.ErrNoShell):
		s.fail(&UserError{Text: "the image has no shell: give a command, as in ssh HOST 'program arguments'", Err: err})
		s.exit(failed(err))
	default:
		s.fail(err)
		s.exit(failed(err))
	}
}

// failed is the exit of a program that did not run, or was lost.
func failed(err error) auditlog.Exit {
	return auditlog.Exit{Code: failureCode, Error: authz.Printable(err.Error(), 500)}
}

// ready waits for the connection's sandbox.
func (c *conn) ready(ctx context.Context) (backends.Sandbox, error) {
	select {
	case <-c.sandboxDone:
		return c.sandbox, c.sandboxErr
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// goneCause is the end of a connection whose sandbox has ended; err is what is known if that says nothing.
func goneCause(sb backends.Sandbox, err error) *cause {
	c := &cause{word: "sandbox-gone", text: "the sandbox has ended", detail: whyGone(sb, err)}
	var known *backends.TextError
	if errors.As(c.detail, &known) {
		c.text = known.Text
	}
	return c
}

func startFailure(err error) string {
	var refused *backends.RefusedError
	var known *backends.TextError
	switch {
	case errors.As(err, &known):
		return known.Text
	case errors.As(err, &refused):
		return "the sandbox is forbidden by this gate's own limits: tell an operator"
	case errors.Is(err, context.DeadlineExceeded):
		return "the sandbox did not start in time: try again, or tell an operator"
	}
	return "the sandbox could not be started: tell an operator"
}

// variables are what the gate itself sets in the program's environment, as sshd does.
func (s *session) variables() []string {
	remote, local := hostPort(s.c.nc.RemoteAddr().String()), hostPort(s.c.nc.LocalAddr().String())
	env := []string{
		"USER=" + s.c.login.User, "LOGNAME=" + s.c.login.User,
		"SSH_CONNECTION=" + remote + " " + local, "SSH_CLIENT=" + remote + " " + local[strings.LastIndexByte(local, ' ')+1:],
		"SALLYPORT_SESSION=" + s.c.id,
	}
	if s.terminal != nil {
		env = append(env, "TERM="+s.terminal.Term)
	}
	return env
}

// hostPort writes "host:port" as sshd's variables have it: "host port".
func hostPort(addr string) string {
	i := strings.LastIndexByte(addr, ':')
	if i < 0 {
		return addr + " 0"
	}
	return strings.Trim(addr[:i], "[]") + " " + addr[i+1:]
}

// fail tells the client that no program ran, or that it was lost.
func (s *session) fail(err error) {
	if s.c.ctx.Err() == nil {
		s.c.s.Slog.Warn("program", "connection", s.c.id, "channel", s.id, "error", err)
		text := "sallyport: " + userText(err, s.c.id) + "\r\n"
		if s.terminal != nil {
			s.notice(text)
		} else {
			io.WriteString(s.ch.Stderr(), text)
		}
	}
}

// lastWords is farewell if the connection ends.
func (s *session) lastWords() {
	if s.c.ctx.Err() != nil {
		s.farewell(endCause(context.Cause(s.c.ctx)))
	}
}

// farewell tells the client, once, why its connection ends: on the terminal, or on standard error where there is none.
func (s *session) farewell(why *cause) {
	if why.text == "" {
		return
	}
	s.bye.Do(func() {
		text := "sallyport: this session ends: " + why.text + "\r\n"
		switch {
		case s.terminal == nil:
			io.WriteString(s.ch.Stderr(), text)
		case s.c.rec.Err() != nil: // that nothing can be recorded can't be recorded
			io.WriteString(s.ch, "\r\n*** "+text)
		default:
			s.notice("\r\n*** " + text)
		}
	})
}

// exit records how the program ended, and ends the channel.
func (s *session) exit(e auditlog.Exit) {
	s.c.record(s.id, &e)
	if e.Signal != "" {
		s.finish(exitSignalMsg{Signal: e.Signal, CoreDumped: e.Core, Message: e.Error})
	} else {
		s.finish(exitStatusMsg{e.Code})
	}
}

// finish ends the channel as sshd does: output, exit status or signal (RFC 4254, section 6.10), EOF, close. A client whose
// own side has ended may close at the EOF, and x/crypto sends nothing after that: an exit status behind it would be lost.
// The channel keeps its place until the client has closed it too (close).
func (s *session) finish(how any) {
	if s.screen != nil {
		s.screen.mu.Lock() // a notice may be on its way; none comes after the EOF
		s.screen.ended = true
		s.screen.mu.Unlock()
	}
	name := "exit-status"
	if _, ok := how.(exitSignalMsg); ok {
		name = "exit-signal"
	}
	s.ch.SendRequest(name, false, ssh.Marshal(how))
	s.ch.CloseWrite()
	s.ch.Close()
}

// notice writes a line of the gate's own to the terminal; it is recorded as the output it is.
func (s *session) notice(text string) {
	var w io.Writer = s.screen
	if s.screen == nil {
		w = s.c.tap(s.id, auditlog.Output, s.ch)
	}
	io.WriteString(w, text)
}

// welcome is what a user at a terminal reads before the prompt.
func (c *conn) welcome() string {
	c.mu.Lock()
	d := c.decision
	c.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "sallyport: %s, grant %s (%s), until %s.\r\n",
		c.login.User, authz.Printable(d.Ticket, 64), authz.Printable(d.Profile, 64), d.NotAfter.UTC().Format("2006-01-02 15:04:05 UTC"))
	if d.Why != "" {
		fmt.Fprintf(&b, "Reason: %s\r\n", authz.Printable(d.Why, 200))
	}
	if j := c.sandbox.Info().Joined; j != nil {
		fmt.Fprintf(&b, "Joined %s: %s.\r\n", authz.Printable(j.String(), 300), strings.Join(j.What, ", "))
	}
	fmt.Fprintf(&b, "This session is recorded: %s\r\n\r\n", c.id)
	return b.String()
}

// outlet is a program's output on its way to the client: recorded first, then written.
type outlet struct {
	s    *session
	keep *keep
	w    io.Writer // the client's
	n    *atomic.Uint64
	line *lastLine // of a terminal

	mu    sync.Mutex // one writer at a time: a notice must not stand in the middle of a record; guards ended
	ended bool       // the stream's EOF has been sent
}

func (o *outlet) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		return 0, io.ErrClosedPipe
	}
	o.s.c.touch()
	if o.line != nil {
		o.line.add(p)
	}
	if err := o.keep.record(p); err != nil {
		return 0, err
	}
	n, err := o.w.Write(p)
	o.n.Add(uint64(n))
	return n, err
}

// inlet is the client's input on its way to a program without a terminal: recorded first, then handed on.
type inlet struct{ s *session }

func (i *inlet) Read(p []byte) (int, error) {
	n, err := i.s.ch.Read(p)
	i.s.inMu.Lock()
	defer i.s.inMu.Unlock()
	if i.s.inClosed {
		return 0, io.EOF
	}
	if n > 0 {
		i.s.c.touch()
		if lost := i.s.keeps[auditlog.Input].record(p[:n]); lost != nil {
			return 0, lost
		}
		i.s.in.Add(uint64(n))
	}
	if errors.Is(err, io.EOF) {
		i.s.keeps[auditlog.Input].eof()
	}
	return n, err
}

// typed gives a terminal's input as the profile's permit.input says, and what to call when the program has ended.
func (s *session) typed(out *outlet) (io.Reader, func(int, backends.TerminalState), func()) {
	s.c.mu.Lock()
	mode := s.c.decision.Permit.Input
	s.c.mu.Unlock()
	touched := readerFunc(func(p []byte) (int, error) {
		n, err := s.ch.Read(p)
		s.c.touch()
		return n, err
	})
	switch mode {
	case inputAll:
		return &inlet{s: s}, nil, func() {}
	case inputNone:
		s.c.recordInput(s.id, &auditlog.Data{Stream: auditlog.Input, Hidden: true})
		return touched, nil, func() {}
	}
	out.line = &lastLine{}
	t := newTyped(touched, out.line, func(detail string) {
		s.c.record(s.id, &auditlog.Alert{Name: "hidden-input", Detail: detail})
	}, func(data []byte, hidden bool) {
		s.c.recordInput(s.id, &auditlog.Data{Stream: auditlog.Input, Data: data, Hidden: hidden})
		s.in.Add(uint64(len(data)))
	})
	return t, t.wrote, t.close
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
