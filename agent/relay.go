package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"
)

// Where the gate shares no file system with the sandbox, the stream to the agent is that of a program which the runtime
// starts in the sandbox (docker exec, pods/exec): the relay. It hands its stdin and stdout to the agent and then only waits,
// so that no byte is copied once more. The runtime starts it before any process of the session exists; what it dials
// is gone by then.

// RelaySocket is where an agent waits for its relay, unless told otherwise: in the sandbox's own /tmp.
const RelaySocket = "/tmp/.sallyport-relay"

// ExitRelay is the exit code of an agent that ended because its relay did.
const ExitRelay = 3

const (
	// relayMagic goes with the descriptors.
	relayMagic = "SLYPRLY" + Version

	// relayTaken is the agent's answer.
	relayTaken = 't'

	// relayWait is how long a relay tries to find its agent, which may have been started at the same time.
	relayWait = 10 * time.Second
)

// errRelayGone is the end of an agent whose relay has ended.
var errRelayGone = errors.New("the relay has ended")

// relayed is a stream that a relay has handed over.
type relayed struct {
	net.Conn               // its stdin and stdout
	peer     *net.UnixConn // ends with the relay; its Close ends the relay
	who      proc          // the relay's process
}

// takeRelay waits for a relay at the path of a socket, which it makes and removes, and takes its descriptors. It takes one
// peer in its life: whoever comes first and is not the relay, or has none of the gate's words to pass, has ended this
// sandbox before it began.
func takeRelay(ctx context.Context, name string) (_ *relayed, err error) {
	dir, err := look(path.Dir(name), unix.O_DIRECTORY, nil)
	if err != nil {
		return nil, fmt.Errorf("relay's socket: %w", err)
	}
	defer dir.close()
	l, remove, err := listenIn("unixpacket", dir, path.Base(name))
	if err != nil {
		return nil, fmt.Errorf("relay's socket: %w", err)
	}
	defer remove()
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	c, err := l.Accept()
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("wait for the relay: %w", err)
	}
	l.Close()
	remove()
	peer := c.(*net.UnixConn)
	defer func() {
		if err != nil {
			peer.Close()
		}
	}()
	limit, _ := ctx.Deadline()
	if err := peer.SetDeadline(limit); err != nil {
		return nil, err
	}
	cred, err := peerOf(peer)
	if err != nil {
		return nil, fmt.Errorf("who is the relay: %w", err)
	}
	r := &relayed{peer: peer}
	for _, p := range procTable() {
		if p.pid == int(cred.Pid) {
			r.who = key(p)
		}
	}
	if r.who.pid == 0 || int(cred.Uid) != os.Getuid() || os.Getpid() != 1 && !sameContainer(int(cred.Pid)) {
		return nil, errors.New("the relay is none of this sandbox's processes")
	}
	if r.Conn, err = takePipes(peer); err != nil {
		return nil, fmt.Errorf("take the relay's descriptors: %w", err)
	}
	if _, err := peer.Write([]byte{relayTaken}); err != nil {
		r.Conn.Close()
		return nil, fmt.Errorf("answer the relay: %w", err)
	}
	if err := peer.SetDeadline(time.Time{}); err != nil {
		r.Conn.Close()
		return nil, err
	}
	return r, nil
}

// takePipes takes the one message of a relay.
func takePipes(peer *net.UnixConn) (net.Conn, error) {
	var message [len(relayMagic)]byte
	oob := make([]byte, unix.CmsgSpace(2*4))
	n, oobn, flags, _, err := peer.ReadMsgUnix(message[:], oob)
	if err != nil {
		return nil, err
	}
	files, err := descriptors(oob[:oobn])
	if err == nil && (string(message[:n]) != relayMagic || len(files) != 2 || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
		err = errors.New("not the message of a relay")
	}
	var conn net.Conn
	if err == nil {
		conn, err = NewPipeConn(files[0], files[1])
	}
	for _, f := range files {
		f.Close()
	}
	return conn, err
}

// wait returns when the relay has ended or the agent has closed the connection to it.
func (r *relayed) wait() {
	var b [1]byte
	r.peer.Read(b[:]) // a relay has nothing to say
}

func peerOf(c *net.UnixConn) (*unix.Ucred, error) {
	var cred *unix.Ucred
	var cerr error
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	return cred, cerr
}

// relay hands this process's stdin and stdout to the agent of that pid, or to this container's whatever its pid is if that is 0,
// at the path of its socket, and returns when the agent is done with them.
func relay(name string, pid int) error {
	// Executed from a file that nobody can read it is undumpable already. No session's process is to trace it.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("set undumpable: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), relayWait)
	defer cancel()
	c, err := dial(ctx, "unixpacket", name)
	if err != nil {
		return fmt.Errorf("reach the agent: %w", err)
	}
	defer c.Close()
	peer := c.(*net.UnixConn)
	cred, err := peerOf(peer)
	if err != nil {
		return fmt.Errorf("who is the agent: %w", err)
	}
	// In a process namespace that is another container's the agent has any number. No process of the session's exists yet, so
	// what this container's own processes are is the agent.
	if pid != 0 && int(cred.Pid) != pid || pid == 0 && !sameContainer(int(cred.Pid)) {
		return fmt.Errorf("process %d listens, which is not the agent", cred.Pid)
	}
	if err := peer.SetDeadline(time.Now().Add(handshakeLimit)); err != nil {
		return err
	}
	if _, _, err := peer.WriteMsgUnix([]byte(relayMagic), unix.UnixRights(0, 1), nil); err != nil {
		return fmt.Errorf("hand over: %w", err)
	}
	// From here on the agent alone holds the stream: its end is seen outside.
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("let go of the stream: %w", err)
	}
	for fd := range 2 {
		if err := unix.Dup3(null, fd, 0); err != nil {
			return fmt.Errorf("let go of the stream: %w", err)
		}
	}
	var answer [1]byte
	if n, err := peer.Read(answer[:]); err != nil || n == 0 || answer[0] != relayTaken {
		return errors.New("the agent has not taken the stream")
	}
	if err := peer.SetDeadline(time.Time{}); err != nil {
		return err
	}
	peer.Read(answer[:]) // until the agent is done
	return nil
}

// pipeConn is a connection of two descriptors that can be waited for: pipes or sockets.
type pipeConn struct{ in, out *os.File }

// NewPipeConn makes a connection of two pipes or sockets, one to read from and one to write to. The files stay the caller's
// to close.
func NewPipeConn(in, out *os.File) (net.Conn, error) {
	c := new(pipeConn)
	for _, end := range []struct {
		fd uintptr
		to **os.File
	}{{rawFd(in), &c.in}, {rawFd(out), &c.out}} {
		var st unix.Stat_t
		err := unix.Fstat(int(end.fd), &st)
		if kind := st.Mode & unix.S_IFMT; err == nil && kind != unix.S_IFIFO && kind != unix.S_IFSOCK {
			err = errors.New("neither a pipe nor a socket")
		}
		fd := -1
		if err == nil {
			fd, err = unix.FcntlInt(end.fd, unix.F_DUPFD_CLOEXEC, 0)
		}
		if err == nil {
			if err = unix.SetNonblock(fd, true); err != nil {
				unix.Close(fd)
			}
		}
		if err != nil {
			c.Close()
			return nil, err
		}
		// Large writes take fewer turns of those who carry them on; a small pipe will do.
		unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, pipeSize)
		*end.to = os.NewFile(uintptr(fd), "relay")
	}
	return c, nil
}

func (c *pipeConn) Read(b []byte) (int, error)  { return c.in.Read(b) }
func (c *pipeConn) Write(b []byte) (int, error) { return c.out.Write(b) }

func (c *pipeConn) Close() error {
	var errs []error
	for _, f := range []*os.File{c.in, c.out} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

func (c *pipeConn) SetDeadline(t time.Time) error {
	return errors.Join(c.in.SetReadDeadline(t), c.out.SetWriteDeadline(t))
}
func (c *pipeConn) SetReadDeadline(t time.Time) error  { return c.in.SetReadDeadline(t) }
func (c *pipeConn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }

func (c *pipeConn) LocalAddr() net.Addr  { return pipeAddr{} }
func (c *pipeConn) RemoteAddr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "relay" }
