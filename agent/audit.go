package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/backends"
)

// terms is what the gate wants of the stream of reports.
type terms struct {
	Strict bool  `cbor:"1,keyasint,omitempty"`
	Limit  int64 `cbor:"2,keyasint,omitempty"` // nanoseconds a report may wait
}

// stuckGrace is how much longer than backends.ExecAudit.StuckLimit the agent waits: the gate, if it can, ends the session first,
// because it knows why.
const stuckGrace = time.Second

// auditing answers terms: the first message of the stream of reports, and the last one if it says why there are none.
type auditing struct {
	On     bool   `cbor:"1,keyasint,omitempty"`
	Reason string `cbor:"2,keyasint,omitempty"`
}

// probeLimit bounds the look whether this kernel lets the agent see what the session executes.
const probeLimit = 5 * time.Second

// serveReports begins to report on the stream, once in an agent's life and before the first process.
func (s *server) serveReports(stream *yamux.Stream, t terms) {
	rec, err := newRecorder(s.reaper)
	if err != nil {
		writeMessage(stream, auditing{Reason: err.Error()})
		stream.Close()
		return
	}
	rec.relay = s.relay
	rec.reports = newReports(stream, t.Strict, time.Duration(t.Limit))
	rec.reports.mu.Lock()
	rec.reports.finish = rec.finish
	rec.reports.mu.Unlock()
	rec.fail = func(err error) {
		rec.reports.fail(err)
		s.session.Close()
	}
	// In this order: the gate asks for processes as soon as it has the answer, and each must find the recorder.
	if !s.audit.CompareAndSwap(nil, rec) {
		rec.fail(errors.New("a second stream of reports"))
		return
	}
	if err := writeMessage(stream, auditing{On: true}); err != nil {
		rec.fail(fmt.Errorf("answer the gate: %w", err))
		return
	}
	go rec.watchEnds()
	if os.Getpid() == 1 {
		go rec.scan()
	}
	<-rec.reports.done
	s.session.Close() // nothing runs unreported
}

// newRecorder finds out whether and how this kernel notifies. Nobody's program runs for it.
func newRecorder(reap *reaper) (*recorder, error) {
	r := &recorder{
		procs: make(map[int]*tracked), uid: uint32(os.Getuid()),
		scripts: scriptCache{files: make(map[scriptFile][]byte), known: make(map[string]bool)},
	}
	if err := r.probe(reap); err != nil {
		return nil, fmt.Errorf("programs can't be audited: %w", err)
	}
	var err error
	if r.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	return r, nil
}

// oldKernel is set by tests: as little is to be relied on as on the oldest kernel, and under the narrowest profile.
var oldKernel bool

// probe has a child install the filter and make a call that is notified.
func (r *recorder) probe(reap *reaper) error {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "probe"), os.NewFile(uintptr(pair[1]), "probe")
	defer ours.Close()
	fd := rawFd(theirs)
	syscall.SetNonblock(int(fd), false)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		theirs.Close()
		return err
	}
	files := []uintptr{rawFd(null), rawFd(null), rawFd(null), fd}
	pid, status, err := reap.start(self, []string{probeName}, &syscall.ProcAttr{Dir: "/", Env: []string{}, Files: files})
	runtime.KeepAlive(theirs)
	theirs.Close()
	null.Close()
	if err != nil {
		return fmt.Errorf("start a probe: %w", err)
	}
	pidfd, _ := unix.PidfdOpen(pid, 0)
	defer unix.Close(pidfd)
	deadline := time.Now().Add(probeLimit)
	ours.SetDeadline(deadline)
	l, follows, err := takeListener(ours)
	if l == nil {
		syscall.Kill(pid, syscall.SIGKILL)
		<-status
		if err != nil {
			return err
		}
		text, _ := io.ReadAll(io.LimitReader(follows, 512))
		return errors.New(printable(strings.TrimSpace(string(text))))
	}
	ended := make(chan error, 1)
	go func() {
		var n notification
		err := l.receive(&n)
		if err == nil {
			err = l.proceed(n.id)
		}
		ended <- err
		if err == nil {
			err = l.receive(&n)
		}
		ended <- err
	}()
	timeout := time.NewTimer(probeLimit)
	defer timeout.Stop()
	var code syscall.WaitStatus
	select {
	case err = <-ended:
	case <-timeout.C:
		err = errors.New("a notification did not come")
	}
	if err != nil {
		syscall.Kill(pid, syscall.SIGKILL)
		<-status
		return err
	}
	select {
	case code = <-status:
	case <-timeout.C:
		syscall.Kill(pid, syscall.SIGKILL)
		<-status
		return errors.New("a notified call did not return")
	}
	switch {
	case code.Exited() && code.ExitStatus() == probeOneRoot:
		r.oneRoot = true
	case !code.Exited() || code.ExitStatus() != 0:
		return errors.New("a notified call was not made")
	}
	var info pidfdInfo
	r.exits = !info.get(pidfd, pidfdInfoExit)
	if oldKernel {
		r.exits, r.pollFirst, r.oneRoot = true, true, false
		r.noVM.Store(true)
		r.noOpenat2.Store(true)
	}
	select {
	case <-ended:
		l.close()
	case <-time.After(200 * time.Millisecond):
		r.pollFirst = true // that receiver waits for ever, and keeps the listener
	}
	return nil
}

// probeChild is the probe. Its errors are for a person.
func probeChild() int {
	runtime.LockOSThread()
	f := os.NewFile(stage2File, "probe")
	err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	var l int
	if err == nil {
		l, err = installFilter(false)
	}
	if err != nil {
		// The first byte says that it comes without a listener.
		io.WriteString(f, " "+err.Error())
		return 1
	}
	if err := sendListener(f, l); err != nil {
		return 1
	}
	unix.Close(l)
	bad := -1
	if _, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(bad), 0, 0); errno != unix.EBADF {
		return 1
	}
	// Who could make a user namespace would have all capabilities in it. Where it is not forbidden, it fails otherwise: this
	// process has threads.
	err = unix.Unshare(unix.CLONE_NEWUSER)
	if (err == unix.EPERM || err == unix.ENOSYS) && unix.Chroot("/") == unix.EPERM {
		return probeOneRoot
	}
	return 0
}

// probeOneRoot is the exit code of a probe that has found that no process of the session can change its root directory.
const probeOneRoot = 3

// reportLimits says what is wrong with a report from a sandbox, whose agent may have been replaced by anything.
func reportLimits(r *backends.Report) error {
	count := 0
	for _, set := range [...]bool{r.Exec != nil, r.Started != nil, r.Ended != nil, r.Connect != nil, r.Script != nil, r.Unaudited != nil} {
		if set {
			count++
		}
	}
	paths := func(all ...[]byte) bool {
		for _, p := range all {
			if len(p) > backends.MaxReportPath {
				return false
			}
		}
		return true
	}
	hashes := func(all ...[]byte) bool {
		for _, h := range all {
			if len(h) != 0 && len(h) != 32 {
				return false
			}
		}
		return true
	}
	pid := func(n int) bool { return n >= 0 && n <= 1<<22 }
	earlier := func(n uint64) bool { return n < r.Sequence }
	ok := count == 1 && r.Time >= 0
	switch {
	case r.Exec != nil:
		e := r.Exec
		ok = ok && pid(e.PID) && pid(e.Parent) && paths(e.Path, e.Dir) && hashes(e.Script) && argLimits(&e.Args) &&
			len(e.Error) <= 256 && len(e.Entry) <= 32 && earlier(e.Of) && earlier(e.By)
	case r.Started != nil:
		s := r.Started
		ok = ok && pid(s.PID) && paths(s.File) && hashes(s.Image) && (s.Args == nil || argLimits(s.Args)) && earlier(s.Exec)
	case r.Ended != nil:
		e := r.Ended
		ok = ok && pid(e.PID) && e.Code >= 0 && e.Code <= 255 && signalName(e.Signal) && earlier(e.Exec)
	case r.Connect != nil:
		c := r.Connect
		ok = ok && pid(c.PID) && paths(c.Program) && c.Address.Zone() == "" && len(c.Call) <= 32 && len(c.Error) <= 256 && earlier(c.Exec)
	case r.Script != nil:
		s := r.Script
		ok = ok && len(s.Hash) == 32 && s.Size >= 0 && paths(s.Path) && len(s.Data) <= backends.MaxReportScript
	case r.Unaudited != nil:
		u := r.Unaudited
		ok = ok && pid(u.PID) && paths(u.File) && argLimits(&u.Args)
	}
	if !ok {
		return errors.New("agent: impossible report of the audit")
	}
	return nil
}

func argLimits(a *backends.Args) bool {
	n := 0
	for _, s := range a.List {
		n += len(s) + 1
	}
	return len(a.List) <= backends.MaxReportStrings && n <= backends.MaxReportArgs+1 && (len(a.Hash) == 0 || len(a.Hash) == 32)
}

// audited opens the stream of reports, and says in what state the audit is: an error is one of the stream's, or that
// it is required and can't be done.
func (c *Client) audit(a backends.ExecAudit, reports func(*backends.Report) error) error {
	if a.Mode == "" || a.Mode == backends.ExecAuditOff || reports == nil {
		c.audited = backends.ExecAuditOff
		return nil
	}
	limit := a.StuckLimit
	if limit <= 0 {
		limit = defaultStuckLimit
	}
	stream, err := c.session.OpenStream()
	if err != nil {
		return err
	}
	stream.SetDeadline(time.Now().Add(handshakeLimit))
	err = writeMessage(stream, opening{Op: opReports, Audit: terms{Strict: a.Strict, Limit: int64(limit + stuckGrace)}})
	if err != nil {
		return err
	}
	var answer auditing
	if err := readMessage(stream, maxReport, &answer); err != nil {
		return noEOF(err)
	}
	stream.SetDeadline(time.Time{})
	if !answer.On {
		stream.Close()
		reason := printable(answer.Reason)
		if a.Mode == backends.ExecAuditRequired {
			return fmt.Errorf("agent: %s", reason)
		}
		c.audited = "off: " + reason
		return nil
	}
	c.audited = "on"
	if a.Strict {
		c.audited = "on, strict"
	}
	c.reported = &reported{stream: stream, over: make(chan struct{})}
	go c.takeReports(stream, reports, limit)
	return nil
}

// reported is the gate's end of the stream of reports.
type reported struct {
	stream *yamux.Stream
	over   chan struct{} // closed when no more are taken
	last   sync.Once
	asked  atomic.Bool // for the last ones
}

// lastReports has the agent end all processes and tell what they did to their ends, before the stream is ended: what they
// did last is not in the gate yet. A sandbox that doesn't comply is waited for as long as that is likely to help.
func (c *Client) lastReports() {
	r := c.reported
	if r == nil {
		return
	}
	r.last.Do(func() {
		select {
		case <-c.done:
			return
		default:
		}
		r.stream.SetWriteDeadline(time.Now().Add(finishLimit))
		r.asked.Store(true)
		if writeMessage(r.stream, ack{Finish: true}) != nil {
			return
		}
		timer := time.NewTimer(finishLimit)
		defer timer.Stop()
		select {
		case <-r.over:
		case <-c.done:
		case <-timer.C:
		}
	})
}

// ExecAudit says how executed programs are reported: "on", "on, strict", "off", or "off: " and why they can't be.
func (c *Client) ExecAudit() string { return c.audited }

// takeReports hands reports on and acknowledges them until the stream ends, which ends the session, as does a report that
// is not taken within limit.
func (c *Client) takeReports(stream *yamux.Stream, reports func(*backends.Report) error, limit time.Duration) {
	defer close(c.reported.over)
	stuck := time.AfterFunc(time.Hour, func() {
		c.end(fmt.Errorf("reports of executed programs: not recorded within %v", limit))
	})
	stuck.Stop()
	in := &buffered{r: stream, b: make([]byte, 0, 4<<10)}
	var last uint64
	for {
		rep, err := readReport(in, last)
		if err == nil && rep.Channel > c.channels.Load() {
			err = errors.New("agent: a report of a channel that is not there")
		}
		if err == nil {
			last = rep.Sequence
			stuck.Reset(limit)
			err = reports(rep)
			stuck.Stop()
		}
		if err == nil && len(in.rest) == 0 { // one acknowledgement for all that has come
			stream.SetWriteDeadline(time.Now().Add(orderWait))
			err = writeMessage(stream, ack{Sequence: last})
		}
		if err != nil {
			select {
			case <-c.done:
			default:
				if errors.Is(err, io.EOF) && c.reported.asked.Load() {
					return
				}
				c.end(fmt.Errorf("reports of executed programs: %w", err))
			}
			return
		}
	}
}

// readReport reads and checks the report that follows the one numbered last.
func readReport(r io.Reader, last uint64) (*backends.Report, error) {
	rep := new(backends.Report)
	if err := readMessage(r, maxReportBytes, rep); err != nil {
		return nil, err
	}
	if rep.Sequence != last+1 {
		return nil, errors.New("agent: a report is missing")
	}
	return rep, reportLimits(rep)
}

// buffered reads as much as there is at once, and tells what is left of it.
type buffered struct {
	r    io.Reader
	b    []byte
	rest []byte
}

func (b *buffered) Read(p []byte) (int, error) {
	if len(b.rest) == 0 {
		n, err := b.r.Read(b.b[:cap(b.b)])
		if n == 0 {
			return 0, err
		}
		b.rest = b.b[:n]
		b.b = grown(b.b[:cap(b.b)], n, 64<<10)
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}
