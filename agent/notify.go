package agent

import (
	"bytes"
	"errors"
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// notification is struct seccomp_notif: a system call that waits for an answer.
type notification struct {
	id    uint64
	tid   uint32 // the calling thread, in this process's numbers
	flags uint32
	nr    uint32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

// answer is struct seccomp_notif_resp.
type answer struct {
	id    uint64
	value int64
	errno int32 // negative; 0 with flags: the call is made
	flags uint32
}

// ioctls that x/sys has for some machines only; these numbers are the same on amd64 and arm64.
const (
	notifIDValid  = 0x40082102
	notifSetFlags = 0x40082104
)

// listener is the descriptor on which the system calls of one process of the gate's, and of all that it starts, are
// notified.
type listener struct{ fd int }

// newListener takes fd.
func newListener(fd int) *listener {
	// Linux 6.6: who waits for an answer gets the processor at once. Without it all works as well, some 10 µs slower.
	unix.Syscall(unix.SYS_IOCTL, uintptr(fd), notifSetFlags, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
	return &listener{fd}
}

// receive waits for the next notification. It gives an error when there will be none any more: on Linux before 6.11 it
// doesn't notice by itself, see wait.
func (l *listener) receive(n *notification) error {
	for {
		*n = notification{} // the kernel insists
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(l.fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(n)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		case unix.ENOENT: // the caller was killed meanwhile; or no process is left
			if over, _ := l.wait(0); over {
				return errOver
			}
		default:
			return errno
		}
	}
}

var errOver = errors.New("no process is left")

// wait waits until there is a notification, or says that no process is left. A negative time is for ever.
func (l *listener) wait(milliseconds int) (over bool, err error) {
	for {
		p := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
		_, err := unix.Poll(p, milliseconds)
		if err == unix.EINTR {
			continue
		}
		return err == nil && p[0].Revents&unix.POLLIN == 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0, err
	}
}

// valid says whether the caller still waits: what was read of its process before was its own.
func (l *listener) valid(id uint64) bool {
	return l.ioctl(notifIDValid, unsafe.Pointer(&id)) != unix.ENOENT
}

// ioctl is made again when a signal came: the kernel does not wait for its lock then, and this runtime sends itself many.
func (l *listener) ioctl(request uintptr, arg unsafe.Pointer) unix.Errno {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(l.fd), request, uintptr(arg))
		if errno != unix.EINTR {
			return errno
		}
	}
}

// proceed lets the call be made.
func (l *listener) proceed(id uint64) error {
	return l.send(&answer{id: id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE})
}

// deny has the call fail.
func (l *listener) deny(id uint64, errno syscall.Errno) error {
	return l.send(&answer{id: id, errno: -int32(errno)})
}

func (l *listener) send(a *answer) error {
	errno := l.ioctl(unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(a))
	if errno == 0 || errno == unix.ENOENT { // ENOENT: the caller was killed
		return nil
	}
	return errno
}

func (l *listener) close() { unix.Close(l.fd) }

// sendListener hands the listener to the agent, with one byte.
func sendListener(f *os.File, fd int) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := c.Control(func(pair uintptr) {
		// It is under the filter already, which lets this pass.
		err = unix.Sendmsg(int(pair), []byte{1}, unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL)
	})
	return errors.Join(cerr, err)
}

// takeListener is the agent's side of sendListener. Without a listener, stage 2 says in what follows why there is none.
func takeListener(f *os.File) (l *listener, follows io.Reader, err error) {
	c, err := f.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var (
		b       [1]byte
		oob     = make([]byte, unix.CmsgSpace(4))
		n, oobn int
	)
	rerr := c.Read(func(fd uintptr) bool {
		n, oobn, _, _, err = unix.Recvmsg(int(fd), b[:], oob, unix.MSG_CMSG_CLOEXEC)
		return err != unix.EAGAIN && err != unix.EINTR
	})
	if err := errors.Join(rerr, err); err != nil {
		return nil, nil, err
	}
	if n == 0 {
		return nil, nil, errors.New("stage 2 has ended")
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) == 0 {
		return nil, io.MultiReader(bytes.NewReader(b[:n]), f), err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, nil, errors.Join(err, errors.New("stage 2 sent no listener"))
	}
	return newListener(fds[0]), f, nil
}
