package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The names (argv[0]) under which the agent executes itself. They are no secrets: who runs the agent's file under one
// of them gets a process of their own, with their own rights.
const (
	stage2Name = "agent-stage2"
	sftpName   = "agent-sftp"
	serveName  = "agent-serve"
	relayName  = "agent-relay"
	pinName    = "agent-pin"
	probeName  = "agent-probe"
)

const (
	self = "/proc/self/exe"

	// spawnLimit bounds the time from a start to the execution of the program.
	spawnLimit = 30 * time.Second

	// childOOMScore makes the kernel choose any process of the session before the agent.
	childOOMScore = 500

	// stage2File is stage 2's end of the pair on which it gets its program.
	stage2File = 3
)

// program is what stage 2 becomes.
type program struct {
	Path   string   `cbor:"1,keyasint"` // without a slash: searched for in Env's PATH
	Args   []string `cbor:"2,keyasint"`
	Env    []string `cbor:"3,keyasint"`
	Dir    string   `cbor:"4,keyasint"`
	AnyDir bool     `cbor:"5,keyasint,omitempty"` // "/" will do when Dir can't be entered
	Audit  bool     `cbor:"6,keyasint,omitempty"` // under the filter, whose listener the agent gets
	Exits  bool     `cbor:"7,keyasint,omitempty"` // see buildFilter
}

// spawnFailure is stage 2's answer when it can't become the program.
type spawnFailure struct {
	Errno uint32 `cbor:"1,keyasint,omitempty"`
	Text  string `cbor:"2,keyasint"`
}

// spawnError is why a program could not be executed. It unwraps to the errno.
type spawnError struct {
	text  string
	errno syscall.Errno
}

func (e *spawnError) Error() string { return e.text }
func (e *spawnError) Unwrap() error { return e.errno }

// child is a started process: the first of a session of its own.
type child struct {
	pid    int
	status <-chan syscall.WaitStatus
}

// spawn starts p in a session of its own with the three files. With tty, the first is the session's terminal. With rec,
// what p and its descendants execute is reported as of the channel. It is the only place where the agent starts a process.
func spawn(r *reaper, p program, files [3]*os.File, tty bool, rec *recorder, channel uint32) (child, error) {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return child{}, fmt.Errorf("socketpair: %w", err)
	}
	ours := os.NewFile(uintptr(pair[0]), "stage 2")
	defer ours.Close()
	theirs := os.NewFile(uintptr(pair[1]), "stage 2")
	defer theirs.Close()
	attr := &syscall.ProcAttr{
		Dir: "/",
		Env: []string{}, // stage 2 is ours: no variable of the session's may steer it
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: tty, Ctty: 0},
	}
	for _, f := range append(files[:], theirs) {
		fd := rawFd(f)
		// Programs expect blocking files; this runtime opens none.
		syscall.SetNonblock(int(fd), false)
		attr.Files = append(attr.Files, fd)
	}
	pid, status, err := r.start(self, []string{stage2Name}, attr)
	runtime.KeepAlive(files)
	if err != nil {
		return child{}, fmt.Errorf("start stage 2: %w", err)
	}
	theirs.Close()
	c := child{pid, status}
	ours.SetDeadline(time.Now().Add(spawnLimit))
	var failed spawnFailure
	if rec != nil {
		p.Audit, p.Exits = true, rec.exits
	}
	err = writeMessage(ours, p)
	var said io.Reader = ours
	became := false
	if err == nil && rec != nil {
		var l *listener
		if l, said, err = takeListener(ours); l != nil {
			w := rec.watch(l, channel, pid, &p, ours)
			defer func() { w.begun(became) }()
		}
	}
	if err == nil {
		err = readMessage(said, maxReport, &failed)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			syscall.Kill(pid, syscall.SIGKILL)
		} else if err != nil {
			// The end of the stream: stage 2's descriptor was closed by its exec.
			raiseOOMScore(pid)
			became = true
			return c, nil
		}
	} else {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	<-status
	if err != nil {
		return child{}, fmt.Errorf("stage 2: %w", err)
	}
	return child{}, &spawnError{failed.Text, syscall.Errno(failed.Errno)}
}

// rawFd returns the descriptor without making it blocking, as File.Fd does.
func rawFd(f *os.File) uintptr {
	var fd uintptr
	if c, err := f.SyscallConn(); err == nil {
		c.Control(func(n uintptr) { fd = n })
	}
	return fd
}

// raiseOOMScore is done from outside and after the exec: stage 2 itself can't open its own /proc files, as the agent's
// file is unreadable and so its process belongs to root there.
func raiseOOMScore(pid int) {
	// It fails for an unreadable program, which then is as likely chosen as the agent.
	os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(strconv.Itoa(childOOMScore)), 0)
}

// stage2 becomes the program it is told, or says why not.
func stage2() int {
	// A seccomp filter would be on this thread alone, and it is this one that survives the exec.
	runtime.LockOSThread()
	syscall.CloseOnExec(stage2File)
	f := os.NewFile(stage2File, "stage 2")
	err := become(f)
	var errno syscall.Errno
	errors.As(err, &errno)
	text := err.Error()
	if len(text) > maxReport/2 {
		text = text[:maxReport/2]
	}
	writeMessage(f, spawnFailure{Errno: uint32(errno), Text: text})
	return 127
}

func become(f *os.File) error {
	var p program
	if err := readMessage(f, 2*maxRequest, &p); err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	unix.Prctl(unix.PR_SET_TIMERSLACK, ordinarySlack, 0, 0, 0) // the agent's own is none for programs
	if p.Audit {
		l, err := installFilter(p.Exits)
		if err != nil {
			return err
		}
		if err := sendListener(f, l); err != nil {
			return fmt.Errorf("send the listener: %w", err)
		}
		unix.Close(l)
	}
	if err := os.Chdir(p.Dir); err != nil {
		if !p.AnyDir {
			return fmt.Errorf("change to the directory: %w", err)
		}
		os.Chdir("/")
	}
	return execute(p)
}

// execute searches as execvp(3) does: a file that is there but may not be executed is remembered, and the search goes
// on.
func execute(p program) error {
	name := p.Path
	if strings.Contains(name, "/") {
		return fmt.Errorf("%s: %w", name, syscall.Exec(name, p.Args, p.Env))
	}
	err := error(syscall.ENOENT)
	for _, dir := range strings.Split(getenv(p.Env, "PATH"), ":") {
		if dir == "" {
			dir = "."
		}
		switch e := syscall.Exec(dir+"/"+name, p.Args, p.Env); e {
		case syscall.ENOENT, syscall.ENOTDIR:
		case syscall.EACCES:
			err = e
		default:
			return fmt.Errorf("%s: %w", name, e)
		}
	}
	return fmt.Errorf("%s: %w", name, err)
}
