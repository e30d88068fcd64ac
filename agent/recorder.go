package agent

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/backends"
)

const (
	// slowRead is how long the reading of one process's memory may hold up the others of its listener: a page of it may
	// be on a file system that does not answer.
	slowRead = 100 * time.Millisecond

	// foldTime is how long identical attempts are counted before the count is reported.
	foldTime = time.Second

	// scanEvery is how often processes from outside are looked for.
	scanEvery = 5 * time.Second

	// gatherEnds is how long ends of processes are gathered.
	gatherEnds = 10 * time.Millisecond

	// settleLimit bounds the wait for the reports of a process that has ended.
	settleLimit = 2 * time.Second

	// finishLimit bounds the wait for the last reports of a session.
	finishLimit = 2 * time.Second
)

// recorder reports what the processes of the session execute and connect to. The kernel holds each such call until the
// recorder has let it pass (seccomp_unotify(2)). One listener belongs to each process that the gate asked for, and to
// all its descendants.
//
// What it learns is checked as far as that goes: the arguments of execve(2) stand in memory that another thread may
// change, so they are read again when the new program has started; an address of connect(2) stays a claim.
type recorder struct {
	reports   *reports
	fail      func(error) // ends the session
	exits     bool        // the kernel does not keep exit statuses for pidfds (before Linux 6.15): exit_group is notified
	pollFirst bool        // the kernel does not tell a waiting receiver that no process is left (before Linux 6.11)
	uid       uint32
	relay     proc        // from outside, and known
	epoll     int         // pidfds of tracked processes
	noVM      atomic.Bool // see memory
	noOpenat2 atomic.Bool // it is forbidden, or not there
	oneRoot   bool        // all processes have this one's root directory

	mu    sync.Mutex // guards what follows; never held while something is waited for
	procs map[int]*tracked

	ends    sync.Mutex // held while ends are reported, so that who takes it afterwards knows of those before
	scripts scriptCache
	folds   folder
}

// tracked is a process that has executed something, or tried to.
type tracked struct {
	pid     int
	pidfd   int // -1: none
	channel uint32
	exec    uint64 // sequence of its last Exec
	pending bool   // that has not been seen to start
	asked   mark   // its arguments
	by      uint64 // the program that asked for it
	program []byte // file of what was last seen to start
	running mark   // its arguments
}

// watch is one listener, and what is known of the process that it began with.
type watch struct {
	*recorder
	listener *listener
	channel  uint32
	first    int // pid of stage 2

	mu      sync.Mutex // guards what follows
	asked   *program   // what stage 2 was told to become; nil once it has
	told    uint64     // sequence of the Exec that told it
	script  bool       // that is a script's
	stage2  *os.File   // the pair to it, closed on its side by its exec
	readers int
}

// watch starts to answer what is notified on l.
func (r *recorder) watch(l *listener, channel uint32, pid int, p *program, stage2 *os.File) *watch {
	w := &watch{recorder: r, listener: l, channel: channel, first: pid, asked: p, stage2: stage2, readers: 1}
	go w.read()
	return w
}

// begun is called when stage 2 has become its program, or has failed. Its start is known by that, whether the program makes
// the call that tells it, or not. A script is left to its interpreter's.
func (w *watch) begun(became bool) {
	w.mu.Lock()
	told, script := w.told, w.script
	w.asked, w.stage2 = nil, nil
	w.mu.Unlock()
	if !became || told == 0 || script {
		return
	}
	var path procPath
	var link [backends.MaxReportPath]byte
	s := backends.Started{Exec: told, PID: w.first, File: bytes.Clone(path.set(w.first, "exe").readlink(link[:]))}
	w.recorder.mu.Lock()
	t := w.procs[w.first]
	if t == nil || t.exec != told || !t.pending {
		w.recorder.mu.Unlock()
		return
	}
	t.pending, t.program, t.running = false, s.File, t.asked
	w.recorder.mu.Unlock()
	if _, err := w.reports.add(&backends.Report{Channel: w.channel, Started: &s}, false); err != nil {
		w.fail(err)
	}
}

// becoming gives what stage 2 is about to become, if it is still stage 2 that calls: its memory can't be read.
func (w *watch) becoming(pid int) *program {
	if pid != w.first {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.asked == nil {
		return nil
	}
	gone := true
	onFd(w.stage2, func(fd int) error {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
		_, err := unix.Poll(p, 0)
		gone = err != nil || p[0].Revents&(unix.POLLHUP|unix.POLLRDHUP) != 0
		return nil
	})
	if gone {
		w.asked, w.stage2 = nil, nil
	}
	return w.asked
}

// reader is a goroutine that answers notifications, with its buffers.
type reader struct {
	*watch
	n      notification
	path   procPath
	mem    memory
	args   argCollector
	report backends.Report
	text   []byte
	link   [backends.MaxReportPath]byte
	since  atomic.Int64 // when the current reading began, Unix nanoseconds; 0: none is under way
	idle   atomic.Bool  // the guard is not looking
}

func (w *watch) read() {
	r := &reader{watch: w}
	r.mem.path, r.mem.noVM = &r.path, &w.noVM
	r.idle.Store(true)
	guard := make(chan struct{}, 1)
	defer close(guard)
	go r.guard(guard)
	for {
		if r.pollFirst {
			if over, err := w.listener.wait(-1); over || err != nil {
				break
			}
		}
		if w.listener.receive(&r.n) != nil {
			break
		}
		r.since.Store(time.Now().UnixNano())
		if r.idle.CompareAndSwap(true, false) {
			guard <- struct{}{}
		}
		errno, err := r.handle()
		r.since.Store(0)
		if err != nil {
			r.fail(err) // the call is not answered: the caller waits, and ends with the session
			break
		}
		if errno != 0 {
			err = w.listener.deny(r.n.id, errno)
		} else {
			err = w.listener.proceed(r.n.id)
		}
		if err != nil {
			r.fail(fmt.Errorf("answer a notification: %w", err))
			break
		}
		if r.replaced() {
			return
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.readers--; w.readers == 0 {
		w.listener.close()
	}
}

// guard starts a second reader when this one is held up. It looks only while there is something to do.
func (r *reader) guard(wake <-chan struct{}) {
	for range wake {
		for quiet := 0; quiet < 10; {
			time.Sleep(slowRead / 2)
			since := r.since.Load()
			if since == 0 {
				quiet++
				continue
			}
			quiet = 0
			if time.Since(time.Unix(0, since)) < slowRead {
				continue
			}
			r.mu.Lock()
			if r.readers == 1 {
				r.readers++
				go r.watch.read()
			}
			r.mu.Unlock()
		}
		r.idle.Store(true)
	}
}

// replaced says whether another reader has taken the place of this one.
func (r *reader) replaced() bool {
	r.watch.mu.Lock()
	defer r.watch.mu.Unlock()
	if r.readers > 1 {
		r.readers--
		return true
	}
	return false
}

// handle reports the call that was notified, and says whether it fails.
func (r *reader) handle() (syscall.Errno, error) {
	n := &r.n
	m := machineOf(n.arch)
	if m == nil {
		return unix.ENOSYS, nil
	}
	switch n.nr {
	case m.setTIDAddress:
		return 0, r.started()
	case m.execve:
		return 0, r.exec(m, call{path: n.args[0], args: n.args[1], name: m.entry})
	case m.execveat:
		name := strings.TrimSpace(m.entry + " execveat")
		return 0, r.exec(m, call{path: n.args[1], args: n.args[2], name: name, at: true, dir: int32(n.args[0])})
	case m.connect:
		return 0, r.connect("connect", n.args[1], n.args[2])
	case m.sendto:
		return 0, r.connect("sendto", n.args[4], n.args[5])
	case m.sendmsg:
		return 0, r.message("sendmsg", m, n.args[1])
	case m.sendmmsg:
		return 0, r.message("sendmmsg", m, n.args[1])
	case m.socketcall:
		return 0, r.socketcall(m)
	case m.exitGroup:
		return 0, r.exitGroup()
	case m.prlimit64, m.schedSetparam, m.schedSetscheduler, m.schedSetaffinity, m.schedSetattr:
		return protect(int32(n.args[0]), false), nil
	case m.setpriority:
		return protectClass(int32(n.args[0])-unix.PRIO_PROCESS, int32(n.args[1])), nil
	case m.ioprioSet:
		return protectClass(int32(n.args[0])-ioprioWhoProcess, int32(n.args[1])), nil
	}
	return 0, nil
}

func machineOf(arch uint32) *machine {
	for i := range ownMachines {
		if ownMachines[i].arch == arch {
			return &ownMachines[i]
		}
	}
	return nil
}

// protect refuses what changes a thread of the agent's.
func protect(target int32, group bool) syscall.Errno {
	switch {
	case group && int(target) == syscall.Getpgrp(), unix.Access("/proc/self/task/"+strconv.Itoa(int(target)), 0) == nil && !group:
		return unix.EPERM
	}
	return 0
}

// protectClass is protect for a process (0), a process group (1) or all processes of a user (2).
func protectClass(class, who int32) syscall.Errno {
	switch {
	case class == 0 && who != 0:
		return protect(who, false)
	case class == 1 && who != 0:
		return protect(who, true)
	case class == 2:
		return unix.EPERM // the agent has the session's uid
	}
	return 0
}

// call is an execution that was asked for.
type call struct {
	path, args uint64 // where they stand
	name       string // of the call, if not the usual one
	at         bool   // execveat
	dir        int32
}

// exec reports an execution.
func (r *reader) exec(m *machine, c call) error {
	who := r.identify(int(r.n.tid))
	e := backends.Exec{PID: who.pid, Parent: who.parent, UID: who.uid, Entry: c.name, By: r.by(who)}
	r.args.reset()
	missing := false
	if p := r.becoming(who.pid); p != nil {
		r.watch.mu.Lock()
		told := r.told
		r.watch.mu.Unlock()
		if told != 0 { // the search along PATH goes on
			return nil
		}
		for _, s := range p.Args {
			r.args.write([]byte(s))
			r.args.end()
		}
		e.Path, e.Dir, e.Entry = cut([]byte(p.Path)), cut([]byte(p.Dir)), ""
		if r.oneRoot && strings.HasPrefix(p.Path, "/") && p.Path != self { // else only its process knows where that is
			if fd, errno := r.openAbsolute(e.Path); errno == 0 {
				var err error
				e.Script, err = r.scripts.look(r.recorder, fd, e.Path, r.channel)
				unix.Close(fd)
				if err != nil {
					return err
				}
			}
		}
	} else {
		var err error
		if missing, err = r.readExec(m, c, &e); err != nil {
			return err
		}
		if !r.listener.valid(r.n.id) {
			return nil // the caller is gone, and nothing of this happens
		}
	}
	e.Args = r.args.done()
	asked := r.args.mark()
	key := ""
	if missing && !r.reports.strict {
		key = strconv.Itoa(e.PID) + "\x00" + string(e.Path) + "\x00" + string(asked)
	}
	r.report = backends.Report{Channel: r.channel, Exec: &e}
	seq, err := r.folds.add(r.recorder, key, &r.report)
	if err != nil {
		return err
	}
	r.track(who, r.channel, seq, e.By, asked)
	if who.pid == r.first {
		r.watch.mu.Lock()
		r.told, r.script = seq, len(e.Script) > 0
		r.watch.mu.Unlock()
	}
	return nil
}

// cut bounds a path for a report.
func cut(b []byte) []byte { return b[:min(len(b), backends.MaxReportPath)] }

// readExec reads what was asked for from the caller's memory; missing says that there is no such file.
func (r *reader) readExec(m *machine, c call, e *backends.Exec) (missing bool, err error) {
	r.mem.open(int(r.n.tid))
	var whole bool
	var errno syscall.Errno
	r.text, whole, errno = r.mem.text(r.text[:0], c.path, backends.MaxReportPath)
	e.Path = r.text
	if errno == 0 && !whole {
		e.Error = "the path is too long"
	}
	if errno == 0 {
		errno = r.mem.args(&r.args, c.args, m.pointer)
	}
	r.mem.close()
	if errno != 0 {
		e.Error = "read memory: " + errno.Error()
	}
	tid := int(r.n.tid)
	e.Dir = bytes.Clone(r.path.set(tid, "cwd").readlink(r.link[:]))
	if e.Error != "" {
		return false, nil
	}
	fd, errno := -1, unix.ENOENT
	switch {
	case c.at && c.dir != unix.AT_FDCWD && !bytes.HasPrefix(e.Path, []byte("/")):
		at, name := "fd/"+strconv.Itoa(int(c.dir)), e.Path
		e.Path = bytes.Clone(r.path.set(tid, at).readlink(r.link[:]))
		if len(name) == 0 {
			fd, errno = r.path.open(openFlags)
			break
		}
		fd, errno = r.openBelow(at, name)
		e.Path = cut(append(append(e.Path, '/'), name...))
	case bytes.HasPrefix(e.Path, []byte("/")):
		fd, errno = r.openAbsolute(e.Path)
	case len(e.Path) > 0:
		fd, errno = r.openBelow("cwd", e.Path)
	}
	switch errno {
	case 0:
	case unix.ENOENT, unix.ENOTDIR:
		return true, nil
	case unix.ELOOP:
		e.Error = "the file is behind a link that only its process can follow"
		return false, nil
	default:
		return false, nil
	}
	e.Script, err = r.scripts.look(r.recorder, fd, e.Path, r.channel)
	unix.Close(fd)
	return false, err
}

const openFlags = unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY

// ownLinks are the names of what is another thing for each process, and what /proc/PID/ has for them.
var ownLinks = [...]struct{ name, in string }{
	{"/proc/self/", ""}, {"/proc/thread-self/", ""}, {"/dev/fd/", "fd/"},
	{"/dev/stdin", "fd/0"}, {"/dev/stdout", "fd/1"}, {"/dev/stderr", "fd/2"},
}

// openAbsolute opens a file as the caller would find it. Links in /proc, which lead each process to files of its own, are
// followed only where their names stand in the path: ELOOP.
func (r *reader) openAbsolute(path []byte) (int, unix.Errno) {
	tid := int(r.n.tid)
	for _, l := range ownLinks {
		if rest, ok := bytes.CutPrefix(path, []byte(l.name)); ok {
			return r.path.set(tid, l.in+string(rest)).open(openFlags)
		}
	}
	if r.oneRoot { // The way by /proc makes the kernel prepare an entry that is used once.
		return r.openat2(unix.AT_FDCWD, path, 0)
	}
	return r.openBelow("root", path)
}

// openBelow is for a path that begins at a directory of the caller's, which has that name in /proc/PID/.
func (r *reader) openBelow(at string, path []byte) (int, unix.Errno) {
	dir, errno := r.path.set(int(r.n.tid), at).open(unix.O_PATH | unix.O_DIRECTORY)
	if errno != 0 {
		return -1, errno
	}
	defer unix.Close(dir)
	resolve := uint64(0)
	if at == "root" {
		resolve = unix.RESOLVE_IN_ROOT
	}
	return r.openat2(dir, path, resolve)
}

func (r *reader) openat2(dir int, path []byte, resolve uint64) (int, unix.Errno) {
	for !r.noOpenat2.Load() {
		how := unix.OpenHow{Flags: openFlags | unix.O_CLOEXEC, Resolve: resolve | unix.RESOLVE_NO_MAGICLINKS}
		fd, err := unix.Openat2(dir, string(path), &how)
		switch errno, _ := err.(unix.Errno); errno {
		case unix.ENOSYS, unix.EPERM: // before Linux 5.6, or an older engine's profile
			r.noOpenat2.Store(true)
		case unix.EINTR:
		case unix.EXDEV:
			return -1, unix.ELOOP
		default:
			return fd, errno
		}
	}
	name := string(path)
	if dir != unix.AT_FDCWD {
		name = strings.TrimLeft(name, "/")
	}
	fd, err := unix.Openat(dir, name, openFlags|unix.O_CLOEXEC, 0)
	errno, _ := err.(unix.Errno)
	return fd, errno
}

// identity is who made a call.
type identity struct {
	pid, parent int
	uid         uint32
	pidfd       int // of pid, new; -1: it is tracked already, or there is none
}

// pidfdInfo is struct pidfd_info in its first form (Linux 6.13; the exit status since 6.15).
type pidfdInfo struct {
	mask                                         uint64
	cgroup                                       uint64
	pid, tgid, ppid                              uint32
	ruid, rgid, euid, egid, suid, sgid, fsu, fsg uint32
	status                                       int32
}

const (
	pidfdGetInfo   = 0xc040ff0b
	pidfdInfoPID   = 1 << 0
	pidfdInfoCreds = 1 << 1
	pidfdInfoExit  = 1 << 3
)

func (i *pidfdInfo) get(fd int, mask uint64) bool {
	i.mask = mask
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), pidfdGetInfo, uintptr(unsafe.Pointer(i)))
	return errno == 0 && i.mask&mask == mask
}

// identify says of which process tid is a thread, and whose that is.
func (r *reader) identify(tid int) identity {
	var info pidfdInfo
	who := identity{pid: tid, pidfd: -1}
	r.recorder.mu.Lock()
	t := r.procs[tid]
	r.recorder.mu.Unlock()
	if t != nil && t.pidfd >= 0 {
		if info.get(t.pidfd, pidfdInfoPID|pidfdInfoCreds) {
			who.parent, who.uid = int(info.ppid), info.euid
			return who
		}
	}
	fd, err := unix.PidfdOpen(tid, 0)
	if err == nil && info.get(fd, pidfdInfoPID|pidfdInfoCreds) {
		who.parent, who.uid, who.pidfd = int(info.ppid), info.euid, fd
		return who
	}
	if err == nil {
		who.pidfd = fd
	}
	// An older kernel, or not the first thread of its process.
	s := readStatus(tid, &r.path)
	who.parent, who.uid = s.parent, s.uid
	if s.pid != 0 && s.pid != tid {
		who.pid = s.pid
		who.pidfd, _ = unix.PidfdOpen(s.pid, 0)
	}
	return who
}

// maxAncestors bounds the way up from a process to one that has executed something.
const maxAncestors = 16

// by gives the last execution of the process, or of its nearest ancestor that has one.
func (r *reader) by(who identity) uint64 {
	for pid, n := who.pid, 0; pid > 1 && n < maxAncestors; n++ {
		r.recorder.mu.Lock()
		t := r.procs[pid]
		var exec uint64
		if t != nil {
			if exec = t.exec; t.pending && n == 0 {
				exec = t.by // that one failed
			}
		}
		r.recorder.mu.Unlock()
		if t != nil {
			return exec
		}
		if n == 0 {
			pid = who.parent
		} else {
			pid = readStatus(pid, &r.path).parent
		}
	}
	// Its parents are gone: but all below this listener come from one.
	r.watch.mu.Lock()
	defer r.watch.mu.Unlock()
	return r.told
}

// track remembers a process's last execution.
func (r *recorder) track(who identity, channel uint32, seq, by uint64, asked mark) {
	r.mu.Lock()
	t := r.procs[who.pid]
	var old *tracked
	if t != nil && who.pidfd >= 0 {
		if t.pidfd >= 0 && alive(t.pidfd) {
			unix.Close(who.pidfd)
		} else {
			old, t = t, nil // the number has a new owner
		}
	}
	if t == nil {
		t = &tracked{pid: who.pid, pidfd: who.pidfd, channel: channel}
		r.procs[who.pid] = t
		if t.pidfd >= 0 {
			ev := unix.EpollEvent{Fd: int32(t.pidfd), Pad: int32(t.pid)}
			if r.exits {
				ev.Events = unix.EPOLLIN
			} // else EPOLLHUP alone, which comes when its status is there: it has been waited for
			unix.EpollCtl(r.epoll, unix.EPOLL_CTL_ADD, t.pidfd, &ev)
		}
	}
	t.exec, t.pending, t.asked, t.by = seq, true, asked, by
	r.mu.Unlock()
	if old != nil {
		r.end(old)
	}
}

func alive(pidfd int) bool {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 0
}

// started reports that a program runs, and what it really got.
func (r *reader) started() error {
	pid := int(r.n.tid)
	r.recorder.mu.Lock()
	t := r.procs[pid]
	r.recorder.mu.Unlock()
	if t == nil {
		return nil // not a program's start: a fork with musl
	}
	file := r.path.set(pid, "exe").readlink(r.link[:])
	r.args.reset()
	r.readCommandLine(pid)
	if !r.listener.valid(r.n.id) {
		return nil
	}
	r.recorder.mu.Lock()
	if !t.pending && bytes.Equal(t.program, file) && r.args.is(t.running) {
		r.recorder.mu.Unlock()
		return nil // that is known
	}
	s := backends.Started{PID: pid, File: bytes.Clone(file)}
	if t.pending {
		s.Exec = t.exec
	}
	running := t.asked
	if !t.pending || !r.args.is(t.asked) {
		args := r.args.done()
		s.Args = &args
		running = r.args.mark()
	}
	t.pending, t.program, t.running = false, s.File, running
	r.recorder.mu.Unlock()
	if bytes.HasSuffix(file, []byte(" (deleted)")) {
		if fd, errno := r.path.set(pid, "exe").open(unix.O_RDONLY); errno == 0 {
			f := os.NewFile(uintptr(fd), "exe")
			if hash, _, _, err := hashFile(f, nil); err == nil {
				s.Image = hash
			}
			f.Close()
		}
	}
	r.report = backends.Report{Channel: r.channel, Started: &s}
	_, err := r.reports.add(&r.report, s.Args != nil)
	return err
}

// readCommandLine reads what the process was started with.
func (r *reader) readCommandLine(pid int) {
	fd, errno := r.path.set(pid, "cmdline").open(unix.O_RDONLY)
	if errno != 0 {
		r.args.cut = true
		return
	}
	defer unix.Close(fd)
	for r.args.total < maxRead {
		n, err := unix.Read(fd, r.mem.window[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return
		}
		r.args.stream(r.mem.window[:n])
		if n < stringRead { // the kernel gives as much as there is
			return
		}
	}
	r.args.cut = true
}

// exitGroup reports the end of a process where the kernel keeps no status. A death by a signal is not seen.
func (r *reader) exitGroup() error {
	pid := r.identify(int(r.n.tid))
	if pid.pidfd >= 0 {
		unix.Close(pid.pidfd)
	}
	r.recorder.mu.Lock()
	t := r.procs[pid.pid]
	delete(r.procs, pid.pid)
	r.recorder.mu.Unlock()
	if t == nil {
		return nil
	}
	if t.pidfd >= 0 {
		unix.Close(t.pidfd)
	}
	_, err := r.reports.add(&backends.Report{Channel: t.channel, Ended: &backends.Ended{
		Exec: t.exec, PID: t.pid, Code: int(r.n.args[0] & 0xff)}}, false)
	return err
}

// watchEnds reports the ends of tracked processes.
func (r *recorder) watchEnds() {
	for {
		if !r.takeEnds(-1) {
			return
		}
		time.Sleep(gatherEnds)
	}
}

// takeEnds reports those that have ended, after waiting for one at most that long.
func (r *recorder) takeEnds(milliseconds int) bool {
	var events [64]unix.EpollEvent
	for {
		n, err := unix.EpollWait(r.epoll, events[:], milliseconds)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return false
		}
		r.ends.Lock()
		for _, ev := range events[:n] {
			r.mu.Lock()
			t := r.procs[int(ev.Pad)]
			mine := t != nil && t.pidfd == int(ev.Fd)
			if mine {
				delete(r.procs, t.pid)
			}
			r.mu.Unlock()
			if mine {
				r.end(t)
			}
		}
		r.ends.Unlock()
		if n < len(events) {
			return true
		}
		milliseconds = 0
	}
}

// end reports a process's end. t is not in procs any more.
func (r *recorder) end(t *tracked) {
	if t.pidfd < 0 {
		return
	}
	var info pidfdInfo
	known := info.get(t.pidfd, pidfdInfoExit)
	unix.Close(t.pidfd)
	if !known || r.exits {
		return
	}
	status := syscall.WaitStatus(info.status)
	e := backends.Ended{Exec: t.exec, PID: t.pid}
	if status.Signaled() {
		e.Signal, e.CoreDumped = strings.TrimPrefix(signalText(status.Signal()), "SIG"), status.CoreDump()
	} else {
		e.Code = status.ExitStatus()
	}
	if _, err := r.reports.add(&backends.Report{Channel: t.channel, Ended: &e}, false); err != nil {
		r.fail(err)
	}
}

// signalText names a signal; those for the program's own use have none but a number.
func signalText(s syscall.Signal) string {
	if name := unix.SignalName(s); name != "" {
		return name
	}
	return "RT" + strconv.Itoa(int(s))
}

// finish ends all processes and the reports: the gate ends the session.
func (r *recorder) finish() {
	send := killDescendants
	if os.Getpid() == 1 {
		send = func(sig syscall.Signal) { syscall.Kill(-1, sig) }
	}
	for end := time.Now().Add(finishLimit / 2); time.Now().Before(end) && r.watching(); {
		send(syscall.SIGKILL)
		r.takeEnds(5)
	}
	r.takeEnds(0) // after those that watchEnds has in its hands
	r.folds.flush(r)
	r.reports.settle(finishLimit / 2)
	r.reports.stream.Close()
}

// watching says whether a process is there whose end will be seen.
func (r *recorder) watching() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.procs {
		if t.pidfd >= 0 {
			return true
		}
	}
	return false
}

// settle waits until the gate has what was reported so far, the ends of processes among it.
func (r *recorder) settle() {
	r.takeEnds(0)
	r.folds.flush(r)
	r.reports.settle(settleLimit)
}

// folder counts identical executions of files that are not there, and identical connections, that follow one another.
type folder struct {
	mu    sync.Mutex // held over add, so that a count stands before what comes next
	key   string
	last  backends.Report // what is repeated
	count uint32
	timer *time.Timer
}

// add reports rep, whose like follow it if key is not empty, or counts it. Executions that wait for their turn wait here.
func (f *folder) add(r *recorder, key string, rep *backends.Report) (uint64, error) {
	f.mu.Lock()
	if key != "" && key == f.key {
		defer f.mu.Unlock()
		if f.count++; f.count == 1 {
			f.timer = time.AfterFunc(foldTime, func() { f.flush(r) })
		}
		return f.last.Sequence, nil
	}
	err := f.flushLocked(r)
	f.key = ""
	f.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if d := r.reports.pace(); d > 0 {
		select {
		case <-time.After(d):
		case <-r.reports.done:
		}
	}
	seq, err := r.reports.add(rep, true)
	if err == nil && key != "" {
		f.mu.Lock()
		f.key, f.last = key, backends.Report{Sequence: seq, Channel: rep.Channel}
		if rep.Exec != nil {
			e := *rep.Exec
			e.Path, e.Dir = bytes.Clone(e.Path), bytes.Clone(e.Dir)
			e.Args.List = nil // as those of the one that is repeated
			f.last.Exec = &e
		}
		if rep.Connect != nil {
			c := *rep.Connect
			f.last.Connect = &c
		}
		f.mu.Unlock()
	}
	return seq, err
}

func (f *folder) flush(r *recorder) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.flushLocked(r); err != nil {
		r.fail(err)
	}
}

func (f *folder) flushLocked(r *recorder) error {
	if f.count == 0 {
		return nil
	}
	f.timer.Stop()
	rep := f.last
	if rep.Exec != nil {
		e := *rep.Exec
		e.Count, e.Of = f.count, f.last.Sequence
		e.Args = backends.Args{}
		rep.Exec = &e
	}
	if rep.Connect != nil {
		c := *rep.Connect
		c.Count = f.count
		rep.Connect = &c
	}
	f.count = 0
	_, err := r.reports.add(&rep, false)
	return err
}

// scriptCache knows the scripts that were reported.
type scriptCache struct {
	mu    sync.Mutex
	files map[scriptFile][]byte // hash by file
	known map[string]bool       // by hash
}

type scriptFile struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

const (
	maxScripts    = 4096     // entries of each map
	maxScriptRead = 16 << 20 // bytes of a file that are hashed
)

// look reports the file if it is executed and no binary program, and gives its hash.
func (c *scriptCache) look(r *recorder, fd int, path []byte, channel uint32) ([]byte, error) {
	var magic [4]byte
	n, err := unix.Pread(fd, magic[:], 0)
	if err != nil || n == 0 || string(magic[:]) == "\x7fELF" {
		return nil, nil
	}
	var st unix.Stat_t
	// What nobody may execute is data, which is not the log's business.
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o111 == 0 {
		return nil, nil
	}
	key := scriptFile{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
	c.mu.Lock()
	hash, ok := c.files[key]
	c.mu.Unlock()
	if ok {
		return hash, nil
	}
	data := make([]byte, 0, min(st.Size, backends.MaxReportScript))
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, nil
	}
	f := os.NewFile(uintptr(dup), "script")
	defer f.Close()
	hash, data, whole, err := hashFile(f, data)
	if err != nil {
		return nil, nil // an unreadable file is an unreadable script
	}
	c.mu.Lock()
	if len(c.files) >= maxScripts || len(c.known) >= maxScripts {
		clear(c.files)
		clear(c.known)
	}
	again := c.known[string(hash)]
	c.files[key], c.known[string(hash)] = hash, true
	c.mu.Unlock()
	if again {
		return hash, nil
	}
	_, err = r.reports.add(&backends.Report{Channel: channel, Script: &backends.Script{
		Hash: hash, Size: st.Size, Path: path, Data: data, Cut: !whole}}, false)
	return hash, err
}

// hashFile gives the SHA-256 of a file as far as maxScriptRead, and as much of its beginning as data has room for.
func hashFile(f *os.File, data []byte) (hash, begin []byte, whole bool, err error) {
	h := sha256.New()
	b := make([]byte, 64<<10)
	var at int64
	for at < maxScriptRead {
		n, err := f.ReadAt(b, at)
		h.Write(b[:n])
		data = append(data, b[:min(n, cap(data)-len(data))]...)
		at += int64(n)
		if errors.Is(err, io.EOF) {
			return h.Sum(nil), data, true, nil
		}
		if err != nil {
			return nil, nil, false, err
		}
	}
	return h.Sum(nil), data, false, nil
}

// scan looks for processes that entered from outside, and forgets those that are gone, until the queue ends. It is for
// the first process of a container: who has no parent in it was put there by the engine.
func (r *recorder) scan() {
	var path procPath
	own := readStatus(os.Getpid(), &path)
	told, suspects := make(map[proc]bool), make(map[proc]bool)
	for {
		select {
		case <-r.reports.done:
			return
		case <-time.After(scanEvery):
		}
		table := procTable()
		there := make(map[int]bool, len(table))
		now, suspected := make(map[proc]bool), make(map[proc]bool)
		for _, p := range table {
			there[p.pid] = true
			if p.pid == os.Getpid() || p.zombie || key(p) == r.relay {
				continue
			}
			s := readStatus(p.pid, &path)
			outside := s.parent == 0 || s.filters >= 0 && s.filters <= own.filters
			if s.pid == 0 || !outside {
				continue
			}
			if s.parent == os.Getpid() && !suspects[key(p)] {
				suspected[key(p)] = true // stage 2, which has no filter for a moment; or an orphan
				continue
			}
			now[key(p)] = true
			if !told[key(p)] {
				r.tellUnaudited(p.pid, s.uid)
			}
		}
		told, suspects = now, suspected
		r.mu.Lock()
		maps.DeleteFunc(r.procs, func(pid int, t *tracked) bool { return t.pidfd < 0 && !there[pid] })
		r.mu.Unlock()
	}
}

func (r *recorder) tellUnaudited(pid int, uid uint32) {
	w := &reader{watch: &watch{recorder: r}}
	u := backends.Unaudited{PID: pid, UID: uid}
	u.File = bytes.Clone(w.path.set(pid, "exe").readlink(w.link[:]))
	w.readCommandLine(pid)
	u.Args = w.args.done()
	if _, err := r.reports.add(&backends.Report{Unaudited: &u}, false); err != nil {
		r.fail(err)
	}
}

// status is what /proc/PID/status says.
type status struct {
	pid, parent int
	uid         uint32
	filters     int // -1: the kernel doesn't say (before Linux 5.9)
}

func readStatus(tid int, path *procPath) status {
	s := status{filters: -1}
	fd, errno := path.set(tid, "status").open(unix.O_RDONLY)
	if errno != 0 {
		return s
	}
	defer unix.Close(fd)
	var b [4096]byte
	n, err := unix.Read(fd, b[:])
	if err != nil {
		return s
	}
	for line := range bytes.Lines(b[:n]) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		f := bytes.Fields(value)
		if len(f) == 0 {
			continue
		}
		number, _ := strconv.Atoi(string(f[0]))
		switch string(name) {
		case "Tgid":
			s.pid = number
		case "PPid":
			s.parent = number
		case "Uid":
			if len(f) > 1 {
				number, _ = strconv.Atoi(string(f[1])) // the effective one
			}
			s.uid = uint32(number)
		case "Seccomp_filters":
			s.filters = number
		}
	}
	return s
}
