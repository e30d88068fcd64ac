package agent

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"
)

const (
	// maxProcesses bounds the processes the gate may have running at once in one sandbox.
	maxProcesses = 256

	// endGrace is the time between SIGHUP and the end when the gate is gone.
	endGrace = 100 * time.Millisecond

	// tidyLimit bounds the removal of what the agent has made in the file system, at the end.
	tidyLimit = time.Second

	// expiryGrace is how long after the session's deadline the agent waits for the gate to end it.
	expiryGrace = 30 * time.Second
)

// Config says how an agent serves.
type Config struct {
	Key    ed25519.PublicKey // whoever holds its private half is the gate
	Socket string            // path of the gate's socket
	Relay  string            // instead of Socket: path of a socket to be made, for a relay
	Direct string            // with Relay: address to wait for the gate at; the path is then where the pin asks
	Conn   net.Conn          // instead of Socket
	Home   string            // directory of the session's processes; empty: as the environment or the image says
}

// Serve serves one gate, and returns when that is gone or none came. All processes of this one's tree, but itself, are
// dead then. It is for a process of its own: it takes all signals, and waits for all children.
func Serve(config Config) error {
	if err := prepare(); err != nil {
		return err
	}
	stop := make(chan struct{})
	defer close(stop)
	ctx, cancel := context.WithTimeout(context.Background(), handshakeLimit)
	defer cancel()
	conn := config.Conn
	var handed *relayed
	var err error
	switch {
	case conn != nil:
	case config.Direct != "":
		l, err := net.Listen("tcp", config.Direct)
		if err != nil {
			return fmt.Errorf("listen for the gate: %w", err)
		}
		if conn, err = takeDirect(ctx, config.Relay, l, config.Key); err != nil {
			return err
		}
	case config.Relay != "":
		if handed, err = takeRelay(ctx, config.Relay); err != nil {
			return err
		}
		defer handed.peer.Close()
		conn = handed.Conn
	default:
		if conn, err = dial(ctx, "unix", config.Socket); err != nil {
			return err
		}
	}
	defer conn.Close()
	limit, _ := ctx.Deadline()
	if err := conn.SetDeadline(limit); err != nil {
		return err
	}
	pipes, err := challenge(conn, config.Key)
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	if pipes != nil {
		defer pipes.Close()
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	session, err := yamux.Server(newCoalescer(&gulper{Conn: conn}), muxConfig(insideWindow))
	if err != nil {
		return err
	}
	defer session.Close()
	r := newReaper(stop)
	server := newServer(session, pipes, r, config.Home)
	server.connections = make(chan struct{}, connectionsIn(memoryLimit(memoryFiles)))
	if config.Conn == nil {
		server.own = ownDirs(config.Socket)
	}
	var gone atomic.Bool
	if handed != nil {
		server.relay = handed.who
		go func() {
			handed.wait()
			gone.Store(!session.IsClosed())
			session.Close()
		}()
	}
	err = server.serve(limit)
	if gone.Load() {
		err = errRelayGone
	}
	endAll(r, endGrace)
	server.settle()
	return err
}

// prepare makes this process fit to be the first of a sandbox.
func prepare() error {
	// No process of the session, whose uid may be the same, is to read or trace this one.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("set undumpable: %w", err)
	}
	if os.Getpid() != 1 {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("set subreaper: %w", err)
		}
	}
	takeSignals()
	// A session that uses up its processes must not keep the runtime from getting a thread, which it would not survive.
	startThreads(16)
	debug.SetMemoryLimit(48 << 20)
	return nil
}

// dial tries until somebody listens or ctx ends.
func dial(ctx context.Context, network, path string) (net.Conn, error) {
	for {
		conn, err := new(net.Dialer).DialContext(ctx, network, path)
		if err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("dial: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// server is the agent's end of the stream.
type server struct {
	session *yamux.Session
	pipes   *taker // nil: the gate gives none
	reaper  *reaper
	audit   atomic.Pointer[recorder] // nil: what is executed is not reported
	relay   proc                     // the process from outside that is known; zero: none
	pace    pace
	env     []string
	home    string
	user    string
	shell   string

	own         []string      // directories of the agent's own, which no forwarding leads to
	connections chan struct{} // holds one of each that is forwarded
	lookups     chan struct{} // holds one of each name that is being looked up
	paths       chan struct{} // holds one of each path that is being looked up
	limits      forwardLimits

	serving sync.WaitGroup // what serves a stream

	mu sync.Mutex // guards what follows
	// waiting holds data streams whose process has not been asked for yet, and channels of processes whose data stream
	// has not come yet: the gate opens the two at once, and they are met in any order.
	waiting   map[uint64]chan *yamux.Stream
	listeners map[uint64]*listening // by the gate's number
}

func newServer(session *yamux.Session, pipes *net.UnixConn, r *reaper, home string) *server {
	s := &server{
		session: session, reaper: r, pace: normalPace, env: ownEnviron(),
		connections: make(chan struct{}, maxConnections), lookups: make(chan struct{}, maxLookups),
		paths: make(chan struct{}, maxPaths), limits: normalLimits,
		waiting: make(map[uint64]chan *yamux.Stream), listeners: make(map[uint64]*listening),
	}
	if pipes != nil {
		s.pipes = newTaker(pipes)
	}
	var a account
	if f, err := os.Open("/etc/passwd"); err == nil {
		a = lookUp(f, os.Getuid())
		f.Close()
	}
	s.home = home
	for _, other := range []string{getenv(s.env, "HOME"), a.home, "/"} {
		if s.home == "" {
			s.home = other
		}
	}
	s.user, s.shell = a.name, findShell(a.shell)
	return s
}

// serve returns when the stream has ended, or should.
func (s *server) serve(limit time.Time) error {
	control, err := s.session.AcceptStream()
	if err != nil {
		return err
	}
	control.SetDeadline(limit)
	var o opening
	if err := readMessage(control, maxRequest, &o); err != nil {
		return noEOF(err)
	}
	if o.Op != opControl || o.Greeting.Version != Version {
		return errors.New("the gate speaks another version of the protocol")
	}
	if err := writeMessage(control, welcome{Version: Version}); err != nil {
		return err
	}
	control.SetDeadline(time.Time{})
	if o.Greeting.User != "" {
		s.user = o.Greeting.User
	}
	if d := o.Greeting.Deadline; d != 0 {
		t := time.AfterFunc(time.Until(time.Unix(d, 0))+expiryGrace, func() { s.session.Close() })
		defer t.Stop()
	}
	go s.beat(control)
	go s.listen(control)
	return s.accept()
}

func (s *server) beat(control *yamux.Stream) {
	t := time.NewTicker(s.pace.every)
	defer t.Stop()
	for {
		select {
		case <-s.session.CloseChan():
			return
		case <-t.C:
		}
		control.SetWriteDeadline(time.Now().Add(s.pace.missed))
		if _, err := control.Write([]byte{0}); err != nil {
			s.session.Close()
			return
		}
	}
}

func (s *server) listen(control *yamux.Stream) {
	defer s.session.Close()
	var b [16]byte
	for {
		control.SetReadDeadline(time.Now().Add(s.pace.missed))
		if _, err := control.Read(b[:]); err != nil {
			return
		}
	}
}

// accept serves streams until there are no more to come.
func (s *server) accept() error {
	slots := make(chan struct{}, maxProcesses)
	for {
		stream, err := s.session.AcceptStream()
		if err != nil {
			return nil // the gate is gone: the end of every session
		}
		if s.session.NumStreams() > maxStreams {
			stream.Close()
			continue
		}
		s.serving.Go(func() { s.serveStream(stream, slots) })
	}
}

// settle waits for what serves streams to have tidied up, now that the gate and all processes are gone.
func (s *server) settle() {
	done := make(chan struct{})
	go func() {
		s.serving.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(tidyLimit):
	}
}

func (s *server) serveStream(stream *yamux.Stream, slots chan struct{}) {
	stream.SetReadDeadline(time.Now().Add(handshakeLimit))
	var o opening
	if err := readMessage(stream, maxRequest, &o); err != nil {
		stream.Close()
		return
	}
	stream.SetReadDeadline(time.Time{})
	switch o.Op {
	case opData:
		select {
		case s.meet(o.Process) <- stream:
		default:
			stream.Close() // a second one
		}
	case opProcess:
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			writeMessage(stream, report{Failed: &failure{Text: "too many processes"}})
			stream.Close()
			return
		}
		if o.Request.Pipes {
			s.servePiped(stream, o)
			return
		}
		defer s.part(o.Process)
		select {
		case data := <-s.meet(o.Process):
			s.serveProcess(&process{server: s, request: o.Request, control: stream, data: data})
		case <-s.session.CloseChan():
		case <-time.After(handshakeLimit):
			stream.Close()
		}
	case opReports:
		s.serveReports(stream, o.Audit)
	case opResolve:
		s.serveResolve(stream, o.Forward)
	case opDial:
		s.serveDial(stream, o.Forward)
	case opListen:
		s.serveListen(stream, o.Forward)
	case opAccept:
		s.serveAccept(stream, o.Forward)
	default:
		stream.Close()
	}
}

// servePiped runs a process whose pipes came from the gate.
func (s *server) servePiped(control *yamux.Stream, o opening) {
	err := errors.New("pipes that were never offered")
	var theirs *pipes
	if s.pipes != nil {
		theirs, err = s.pipes.take(o.Process)
	}
	if err != nil {
		writeMessage(control, report{Failed: &failure{Text: err.Error()}})
		control.Close()
		return
	}
	s.serveProcess(&process{server: s, request: o.Request, control: control, theirs: *theirs})
}

func (s *server) meet(process uint64) chan *yamux.Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.waiting[process]
	if c == nil {
		c = make(chan *yamux.Stream, 1)
		s.waiting[process] = c
	}
	return c
}

func (s *server) part(process uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.waiting, process)
}
