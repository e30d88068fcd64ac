package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A process without a terminal reads and writes pipes. Where the stream to the agent is a unix socket, the gate makes
// them and hands the process's ends to the agent (SCM_RIGHTS), so that bytes don't pass the agent, and the gate's own
// ends never leave the gate: nothing inside can change their flags. Elsewhere the agent makes the pipes, and the bytes
// travel as frames on a stream.

const (
	// pipeSize is asked for each pipe; the kernel may grant less.
	pipeSize = 256 << 10

	// handMessage is the size of a message that accompanies descriptors: the number of their process.
	handMessage = 8
)

// pipes are a process's stdin, stdout and stderr: one end of each.
type pipes [3]*os.File

func (p *pipes) close() {
	for _, f := range p {
		if f != nil {
			f.Close()
		}
	}
}

// hander is the gate's end of a socket by which descriptors go to the agent. It is safe for concurrent use.
type hander struct {
	conn     *net.UnixConn
	uid, gid int // the agent's, as the gate sees them
}

// newHander makes the socket, and gives the agent's end of it, for an agent at the other end of stream. Both are nil if
// that is no unix socket.
func newHander(stream net.Conn) (*hander, *os.File, error) {
	u, ok := stream.(*net.UnixConn)
	if !ok {
		return nil, nil, nil
	}
	peer, err := peerOf(u)
	if err != nil {
		return nil, nil, fmt.Errorf("who is the agent: %w", err)
	}
	conn, far, err := packetPair()
	if err != nil {
		return nil, nil, err
	}
	return &hander{conn: conn, uid: int(peer.Uid), gid: int(peer.Gid)}, far, nil
}

// packetPair makes two ends of a socket that keeps messages and their descriptors apart from the next.
func packetPair() (*net.UnixConn, *os.File, error) {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	near, far := os.NewFile(uintptr(pair[0]), "pipes"), os.NewFile(uintptr(pair[1]), "pipes")
	conn, err := packetConn(near)
	if err != nil {
		far.Close()
	}
	return conn, far, err
}

// packetConn makes a connection of f, and closes f.
func packetConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("not a unix socket")
	}
	return u, nil
}

// hand makes the pipes of a process, hands the process's ends to the agent, and returns the gate's. They are nil if
// this gate may not give pipes to the agent's uid, which then couldn't open them again, as /dev/stdout is opened.
func (h *hander) hand(process uint64) (*pipes, error) {
	ours, theirs := new(pipes), new(pipes)
	defer theirs.close()
	for i := range ours {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			ours.close()
			return nil, fmt.Errorf("pipe: %w", err)
		}
		near, far := fds[1], fds[0]
		if i > 0 {
			near, far = far, near
		}
		// Only this end: the program expects a blocking one.
		err := syscall.SetNonblock(near, true)
		ours[i], theirs[i] = os.NewFile(uintptr(near), "pipe"), os.NewFile(uintptr(far), "pipe")
		if err != nil {
			ours.close()
			return nil, fmt.Errorf("pipe: %w", err)
		}
		if err := unix.Fchown(far, h.uid, h.gid); err != nil {
			ours.close()
			return nil, nil
		}
		unix.FcntlInt(uintptr(far), unix.F_SETPIPE_SZ, pipeSize) // a smaller one will do
	}
	var fds []int
	for _, f := range theirs {
		fds = append(fds, int(rawFd(f)))
	}
	message := binary.BigEndian.AppendUint64(nil, process)
	h.conn.SetWriteDeadline(time.Now().Add(orderWait))
	if _, _, err := h.conn.WriteMsgUnix(message, unix.UnixRights(fds...), nil); err != nil {
		ours.close()
		return nil, fmt.Errorf("hand pipes to the agent: %w", err)
	}
	return ours, nil
}

// taker is the agent's end of the gate's hander. It is safe for concurrent use.
type taker struct {
	conn *net.UnixConn

	mu      sync.Mutex // guards what follows, and reading
	waiting map[uint64]*pipes
}

func newTaker(conn *net.UnixConn) *taker {
	return &taker{conn: conn, waiting: make(map[uint64]*pipes)}
}

// take gives the pipes of a process. They were sent before the process was asked for.
func (t *taker) take(process uint64) (*pipes, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		if p := t.waiting[process]; p != nil {
			delete(t.waiting, process)
			return p, nil
		}
		t.conn.SetReadDeadline(time.Now().Add(handshakeLimit))
		var message [handMessage]byte
		oob := make([]byte, unix.CmsgSpace(3*4))
		n, oobn, _, _, err := t.conn.ReadMsgUnix(message[:], oob)
		if err != nil {
			return nil, fmt.Errorf("take pipes: %w", err)
		}
		files, err := descriptors(oob[:oobn])
		if err == nil && (n != handMessage || len(files) != 3) {
			err = errors.New("not the pipes of a process")
		}
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, fmt.Errorf("take pipes: %w", err)
		}
		if len(t.waiting) < maxProcesses {
			t.waiting[binary.BigEndian.Uint64(message[:])] = (*pipes)(files)
		} else {
			(*pipes)(files).close()
		}
	}
}

// descriptors gives the files that came with a message.
func descriptors(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "pipe"))
		}
	}
	return files, nil
}
