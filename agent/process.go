package agent

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/backends"
)

const (
	// typedChunk is how much input goes to a terminal between two looks at its state.
	typedChunk = 1 << 10

	// drainLimit bounds the wait for output of a process that was killed, and for a terminal's last output.
	drainLimit = time.Second
)

// process is one process as the agent sees it. Its life: start opens its files and spawns it; run carries stdin, orders
// and output until it has ended and its output is drained, then reports the exit.
type process struct {
	server  *server
	request request
	control *yamux.Stream
	data    *yamux.Stream // nil: the process has pipes of the gate's

	child  child
	tty    *os.File   // the terminal's master, or nil
	stdin  *os.File   // where input goes; the master, if there is one; nil with pipes of the gate's
	output []*os.File // where output comes from, by frame type less frameStdout
	theirs pipes      // the child's ends, closed once it runs
	tidy   func()     // removes what was made for it in the file system; nil: nothing

	reports sync.Mutex // one report at a time on control
	frames  sync.Mutex // one frame at a time on data
	typing  sync.Mutex // held over a write to tty and its report: none follows the exit; before reports
	kill    sync.Once
}

// serveProcess runs a process from its request to its exit.
func (s *server) serveProcess(p *process) {
	defer p.control.Close()
	if p.data != nil {
		defer p.data.Close()
	}
	err := p.start()
	if p.tidy != nil {
		defer p.tidy()
	}
	if err != nil {
		p.refuse(err)
	}
	p.theirs.close()
	if err == nil {
		p.run()
	}
}

// refuse answers a request that led to no process. Without a shell, a command that can't be executed is the user's
// error and is told as a shell would.
func (p *process) refuse(err error) {
	var spawned *spawnError
	if errors.As(err, &spawned) && backends.Kind(p.request.Kind) == backends.KindExec {
		code := 126
		if errors.Is(err, syscall.ENOENT) {
			code = 127
		}
		kind := byte(frameStderr)
		if p.request.Terminal != nil {
			kind = frameStdout
		}
		text := []byte(spawned.text + "\n")
		p.report(report{Started: true})
		if p.data == nil {
			p.theirs[2].Write(text)
			p.theirs.close()
		} else {
			p.send(kind, text)
			p.endOutput()
		}
		p.report(report{Exit: &exit{Code: code}})
		return
	}
	f := failure{Text: err.Error()}
	if errors.Is(err, backends.ErrNoShell) {
		f.Code = failedNoShell
	}
	p.report(report{Failed: &f})
}

func (p *process) start() error {
	prog, err := p.program()
	if err != nil {
		return err
	}
	if t := p.request.Terminal; t != nil {
		var name string
		if name, err = p.openTerminal(t); err == nil {
			prog.Env = environ(prog.Env, []string{"SSH_TTY=" + name, "TERM=" + t.Term}, p.request.Env)
		}
	} else if p.data != nil {
		err = p.openPipes()
	}
	if x := p.request.X11; x != nil && err == nil {
		var variables []string
		variables, p.tidy, err = x.environ()
		prog.Env = environ(prog.Env, variables)
	}
	if err == nil {
		p.child, err = spawn(p.server.reaper, prog, p.theirs, p.tty != nil, p.server.audit.Load(), p.request.Channel)
	}
	if err != nil {
		p.closeFiles()
	}
	return err
}

// program says what to execute for the request.
func (p *process) program() (program, error) {
	s, r := p.server, p.request
	prog := program{Dir: s.home, AnyDir: true}
	if r.Dir != "" {
		prog.Dir, prog.AnyDir = r.Dir, false
	}
	own := []string{"HOME=" + s.home, "USER=" + s.user, "LOGNAME=" + s.user}
	if s.shell != "" {
		own = append(own, "SHELL="+s.shell)
	}
	prog.Env = environ([]string{"PATH=" + defaultPath}, s.env, own, r.Env)
	switch backends.Kind(r.Kind) {
	case backends.KindShell:
		if s.shell == "" {
			return prog, backends.ErrNoShell
		}
		prog.Path, prog.Args = s.shell, []string{"-" + path.Base(s.shell)}
	case backends.KindExec:
		if s.shell != "" {
			prog.Path, prog.Args = s.shell, []string{path.Base(s.shell), "-c", r.Command}
			break
		}
		words, err := splitWords(r.Command)
		if err != nil {
			return prog, err
		}
		prog.Path, prog.Args = words[0], words
	case backends.KindSFTP:
		// The variables are the user's, and some of them steer a Go program.
		prog.Path, prog.Args, prog.Env = self, []string{sftpName}, own
	default:
		return prog, fmt.Errorf("unknown kind of process %d", r.Kind)
	}
	if strings.ContainsRune(r.Command, 0) || strings.ContainsRune(prog.Dir, 0) {
		return prog, errors.New("a zero byte in the request")
	}
	return prog, nil
}

func (p *process) openTerminal(t *terminal) (string, error) {
	master, slave, name, err := openPTY()
	if err != nil {
		return "", err
	}
	p.tty, p.stdin, p.output = master, master, []*os.File{master}
	p.theirs = pipes{slave, slave, slave}
	if err := resizePTY(slave, t.Size); err != nil {
		return "", fmt.Errorf("set the terminal's size: %w", err)
	}
	if err := setModes(slave, t.Modes); err != nil {
		return "", fmt.Errorf("set the terminal's modes: %w", err)
	}
	return name, nil
}

func (p *process) openPipes() error {
	for i := range p.theirs {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		onFd(w, func(fd int) error {
			_, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, pipeSize)
			return err
		})
		if i == 0 {
			p.theirs[i], p.stdin = r, w
		} else {
			p.theirs[i], p.output = w, append(p.output, r)
		}
	}
	return nil
}

func (p *process) closeFiles() {
	if p.stdin != nil {
		p.stdin.Close()
	}
	for _, f := range p.output {
		f.Close()
	}
}

func (p *process) run() {
	defer p.closeFiles()
	over := make(chan struct{})
	defer close(over)
	p.report(report{Started: true})
	if p.data != nil {
		go p.takeStdin()
	}
	go p.takeOrders(over)
	var output sync.WaitGroup
	for i, f := range p.output {
		output.Go(func() { p.sendOutput(byte(frameStdout+i), f) })
	}
	status := <-p.child.status
	if p.tty != nil {
		// The kernel hung the terminal up when its session's first process ended; what that wrote is still to be read.
		p.tty.SetDeadline(time.Now().Add(drainLimit))
	}
	output.Wait()
	e := exit{Code: status.ExitStatus()}
	if status.Signaled() {
		e = exit{Signal: strings.TrimPrefix(unix.SignalName(status.Signal()), "SIG"), CoreDumped: status.CoreDump()}
	}
	if r := p.server.audit.Load(); r != nil {
		r.settle() // the session may end with this exit
	}
	p.typing.Lock() // a write that is under way has reached the process, which may have ended by it
	defer p.typing.Unlock()
	p.report(report{Exit: &e})
}

func (p *process) report(r report) {
	p.reports.Lock()
	defer p.reports.Unlock()
	writeMessage(p.control, r) // takeOrders sees a stream that is broken
}

// send sends one frame of output.
func (p *process) send(kind byte, b []byte) error {
	frame := make([]byte, frameHeader+len(b))
	copy(frame[frameHeader:], b)
	return p.sendFrame(kind, frame)
}

// sendFrame sends one frame whose payload begins after room for the header.
func (p *process) sendFrame(kind byte, frame []byte) error {
	putFrameHeader(frame, kind, len(frame)-frameHeader)
	p.frames.Lock()
	defer p.frames.Unlock()
	_, err := p.data.Write(frame)
	return err
}

func (p *process) endOutput() {
	p.send(frameStdout, nil)
	if p.request.Terminal == nil {
		p.send(frameStderr, nil)
	}
}

// sendOutput sends what comes from f until its end: no process holds the other end any more.
func (p *process) sendOutput(kind byte, f *os.File) {
	b := make([]byte, frameHeader+maxFrame)
	for {
		n, err := f.Read(b[frameHeader:])
		if n > 0 {
			if p.sendFrame(kind, b[:frameHeader+n]) != nil {
				return
			}
		}
		if err != nil { // EIO from a terminal that was hung up
			break
		}
	}
	p.send(kind, nil)
}

// takeStdin hands input to the process until its end, and on until the stream's end, so that the gate is never held up.
func (p *process) takeStdin() {
	var f frames
	open := true
	emit := func(kind byte, b []byte) error {
		switch {
		case kind != frameStdin:
			return errFrame
		case !open:
		case b == nil && p.tty == nil:
			open = false
			p.stdin.Close()
		case p.tty != nil:
			open = p.typeIn(b) == nil
		default:
			// An error: no reader is left. What else comes is lost, as in a pipe.
			if _, err := p.stdin.Write(b); err != nil {
				open = false
				p.stdin.Close()
			}
		}
		return nil
	}
	b := make([]byte, chunk)
	for {
		n, err := p.data.Read(b)
		if f.feed(b[:n], emit) != nil || err != nil {
			return
		}
		b = grown(b, n, maxFrame)
	}
}

// typeIn writes input to the terminal and reports the state that each part of it met.
func (p *process) typeIn(b []byte) error {
	for len(b) > 0 {
		n, err := p.typePart(b[:min(len(b), typedChunk)])
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// typePart is typeIn for a part that is not divided. A process may end by what it reads, and the gate hears of nothing after its
// exit: so the report comes before that.
func (p *process) typePart(part []byte) (int, error) {
	p.typing.Lock()
	defer p.typing.Unlock()
	echo, canonical := terminalState(p.tty)
	n, err := p.tty.Write(part)
	if n > 0 && p.request.Typed {
		p.report(report{Typed: &typed{Bytes: uint32(n), Echo: echo, Canonical: canonical}})
	}
	return n, err
}

// takeOrders does what the gate asks until the stream ends. If that is before the process is over, the gate has lost
// interest in it and it is killed.
func (p *process) takeOrders(over <-chan struct{}) {
	for {
		var o order
		err := readMessage(p.control, maxReport, &o)
		select {
		case <-over:
			return
		default:
		}
		switch {
		case err != nil:
			p.end()
			return
		case o.Kill:
			go p.end()
		case o.Resize != nil && p.tty != nil:
			resizePTY(p.tty, *o.Resize)
		case o.Signal != "":
			p.signal(o.Signal)
		}
	}
}

// signal sends a signal to who would get it from a terminal: the foreground process group of one, else the group of
// the process.
func (p *process) signal(name string) {
	sig := unix.SignalNum("SIG" + name)
	if sig == 0 {
		return
	}
	group := p.child.pid
	if p.tty != nil {
		onFd(p.tty, func(fd int) error {
			if g, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP); err == nil && g > 1 {
				group = g
			}
			return nil
		})
	}
	syscall.Kill(-group, sig)
}

// end kills the process and all that it started, and lets run come to its end.
func (p *process) end() {
	p.kill.Do(func() {
		f := &family{session: p.child.pid}
		f.end(hangupGrace)
		limit := time.Now().Add(drainLimit)
		if p.data != nil {
			p.data.SetWriteDeadline(limit)
		}
		for _, f := range p.output {
			f.SetReadDeadline(limit)
		}
	})
}
