package docker

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/agent"
	"github.com/sallyport/sallyport/backends"
)

// reachLimit bounds the time from a container's start to the agent's call.
const reachLimit = 30 * time.Second

// sandbox is one container. Its life: Start registers it in live, makes its directory and socket, creates and starts
// the container, and is reached by its agent; watch sees its end; Close removes all of it.
type sandbox struct {
	backend *Backend
	session string
	id      string
	info    backends.Info
	client  *agent.Client
	joined  *joining // nil: the sandbox has joined no target

	death chan string            // why the container died, once, from the engine's events
	exit  atomic.Pointer[string] // the same, for who looks later
	done  chan struct{}
	err   error // set before done is closed

	closing sync.Mutex // held by the Close that removes
	gone    bool       // guarded by closing: all is removed
	ended   chan struct{}
	endOnce sync.Once // closes ended: Close was called
}

var (
	_ backends.Sandbox  = (*sandbox)(nil)
	_ backends.Dialer   = (*sandbox)(nil)
	_ backends.Listener = (*sandbox)(nil)
)

// Start implements backends.Backend.
func (b *Backend) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	spec, err := b.check(spec)
	if err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	s := &sandbox{
		backend: b, session: spec.Owner.Session,
		death: make(chan string, 1), done: make(chan struct{}), ended: make(chan struct{}),
	}
	b.mu.Lock()
	_, twice := b.live[s.session]
	if !twice {
		b.live[s.session] = s
	}
	b.mu.Unlock()
	if twice {
		return nil, errors.New("docker: the session has a sandbox already")
	}
	if err := s.start(ctx, spec); err != nil {
		err = fmt.Errorf("docker: %w", s.joinFailed(ctx, err))
		if ctx.Err() == nil {
			b.forgetVolume()
		}
		if rerr := s.remove(ctx); rerr != nil {
			err = errors.Join(err, rerr)
		}
		return nil, err
	}
	go s.watch()
	if s.joined != nil {
		go s.watchTarget()
	}
	return s, nil
}

func (s *sandbox) start(ctx context.Context, spec backends.Spec) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	b, t := s.backend, spec.Template
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	img, err := b.image(ctx, t.Image, t.PullPolicy)
	if err != nil {
		return err
	}
	for _, m := range t.Mounts {
		if m.Type != "volume" {
			continue
		}
		// The engine would make one that is missing, and leave it.
		if _, err := b.engine.VolumeInspect(ctx, m.Source); err != nil {
			return fmt.Errorf("find volume: %w", err)
		}
	}
	var at places
	var listener *net.UnixListener
	if b.relay {
		m := b.file.mount()
		at.volume = &m
		if t.Scratch != "" {
			at.scratch = namePrefix + s.session
			if err := b.makeScratchVolume(ctx, s.session, t.UID, t.GID); err != nil {
				return fmt.Errorf("make a scratch volume: %w", err)
			}
		}
	} else {
		at = places{agent: b.agent, run: s.path(runDir), hosts: filepath.Join(b.config.StateDir, hostsFile), scratch: s.path(scratchDir)}
		if listener, err = listen(at.run); err != nil {
			return err
		}
		defer listener.Close()
		if t.Scratch != "" {
			if err := makeScratch(at.scratch, t.UID, t.GID); err != nil {
				return err
			}
		}
	}
	r := build(spec, b.gate, base64.StdEncoding.EncodeToString(public), img, at)
	s.info = backends.Info{Backend: "docker", Image: t.Image, Digest: digest(t.Image, img), Node: b.node}
	if t.Target != nil {
		if s.joined, err = b.join(ctx, spec); err != nil {
			return err
		}
		defer s.joined.release()
		s.joined.into(&r)
		s.info.Joined = s.joined.info()
	}
	s.info.Spec = r

	err = s.run(ctx, r)
	if errors.Is(err, errNotStarted) && b.relay && ctx.Err() == nil {
		// Whoever can empty the agent's volume behind the gate's back can do much worse, and may have done this by mistake.
		if wrote, rerr := b.refillVolume(ctx); rerr != nil {
			err = errors.Join(err, rerr)
		} else if wrote {
			b.log.WarnContext(ctx, "the agent was missing from its volume", "session", s.session, "err", err)
			if err = b.removeContainer(ctx, s.id); err == nil {
				err = s.run(ctx, r)
			}
		}
	}
	if err != nil {
		return err
	}
	call := func(ctx context.Context) (net.Conn, error) { return s.answer(ctx, listener) }
	if b.relay {
		call = func(ctx context.Context) (net.Conn, error) { return s.startRelay(ctx, r.Config.User) }
	}
	return s.reach(ctx, call, private, agent.Hello{
		User: spec.Owner.User, Deadline: spec.Owner.Expires, Audit: t.ExecAudit, Reports: spec.Reports,
	})
}

// run creates the container and starts it. Both are carried through once begun: a request given up half-way leaves nobody
// knows what.
func (s *sandbox) run(ctx context.Context, r request) error {
	b := s.backend
	engineCtx, stop := detached(ctx)
	defer stop()
	created, err := b.engine.ContainerCreate(engineCtx, &r.Config, &r.Host, nil, nil, r.Name)
	if err != nil {
		b.images.drop(s.info.Image)
		return fmt.Errorf("create container: %w", err)
	}
	s.id = created.ID
	if s.joined != nil {
		s.joined.release()
	}
	for _, w := range created.Warnings {
		b.log.WarnContext(ctx, "engine", "session", s.session, "warning", w)
	}
	if b.relay {
		if err := b.keepVolume(ctx); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := b.engine.ContainerStart(engineCtx, s.id, container.StartOptions{}); err != nil {
		return fmt.Errorf("%w: %w", errNotStarted, err)
	}
	return nil
}

var errNotStarted = errors.New("start container")

// reach gets the stream to the agent by call and proves the gate to it.
func (s *sandbox) reach(ctx context.Context, call func(context.Context) (net.Conn, error), key ed25519.PrivateKey, hello agent.Hello) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timeout := time.AfterFunc(reachLimit, func() { cancel(errors.New("the agent could not be reached")) })
	defer timeout.Stop()
	finished := make(chan struct{})
	defer close(finished)
	go func() {
		select {
		case why := <-s.death:
			cancel(fmt.Errorf("the sandbox ended before it was reached: %s", why))
		case <-finished:
		}
	}()
	conn, err := call(ctx)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return err
	}
	if s.client, err = agent.NewClient(ctx, conn, key, hello); err != nil {
		return err
	}
	s.info.ExecAudit = s.client.ExecAudit()
	return nil
}

// answer takes the agent's call.
func (s *sandbox) answer(ctx context.Context, l *net.UnixListener) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// While the agent makes its way, the engine says who is to be expected.
	type inspected struct {
		container container.InspectResponse
		err       error
	}
	engine := make(chan inspected, 1)
	go func() {
		c, err := s.backend.engine.ContainerInspect(ctx, s.id)
		engine <- inspected{c, err}
	}()
	conn, peer, err := acceptOne(ctx, l)
	if err != nil {
		cancel()
		<-engine
		return nil, fmt.Errorf("wait for the agent: %w", err)
	}
	i := <-engine
	if i.err == nil && (i.container.State == nil || i.container.State.Pid != peer) {
		i.err = fmt.Errorf("process %d called, which is not the container's first", peer)
	}
	if i.err != nil {
		conn.Close()
		return nil, fmt.Errorf("identify the agent: %w", i.err)
	}
	// No process of the user's exists before this: none can find the socket.
	if err := os.Remove(filepath.Join(s.path(runDir), socketName)); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// path is this sandbox's own path below a directory of the state directory.
func (s *sandbox) path(dir string) string {
	return filepath.Join(s.backend.config.StateDir, dir, s.session)
}

// listen makes dir and a socket in it that any uid may dial; who is in the container only sees this directory, and
// nobody else can enter its parent.
func listen(dir string) (*net.UnixListener, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask is
		return nil, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	// The path of a unix socket is at most 107 bytes long; a state directory's may be longer.
	short := "/proc/self/fd/" + strconv.Itoa(int(d.Fd())) + "/" + socketName
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(filepath.Join(dir, socketName), 0o666); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// acceptOne takes one connection, and says which process made it.
func acceptOne(ctx context.Context, l *net.UnixListener) (*net.UnixConn, int, error) {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	conn, err := l.AcceptUnix()
	l.Close()
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, 0, err
	}
	pid, err := peerPID(conn)
	if err != nil {
		conn.Close()
		return nil, 0, err
	}
	return conn, pid, nil
}

// peerPID gives the process at the other end of a unix socket, as this one sees it: 0 if it can't.
func peerPID(conn *net.UnixConn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	var perr error
	if err := raw.Control(func(fd uintptr) { peer, perr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if perr != nil {
		return 0, perr
	}
	return int(peer.Pid), nil
}

// makeScratch makes a home on disk. Its parent is the gate's alone, so nobody else on the host can enter it.
func makeScratch(dir string, uid, gid uint32) error {
	if os.Geteuid() != 0 {
		return refused("a scratch volume needs a gate that runs as root, to give it to the uid")
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	return os.Chown(dir, int(uid), int(gid))
}

func (s *sandbox) ID() string            { return s.id }
func (s *sandbox) Info() backends.Info   { return s.info }
func (s *sandbox) Done() <-chan struct{} { return s.done }

func (s *sandbox) Err() error {
	select {
	case <-s.done:
		return s.err
	default:
		return nil
	}
}

func (s *sandbox) Exec(ctx context.Context, p backends.Process) (backends.ExitStatus, error) {
	return s.client.Exec(ctx, p)
}

func (s *sandbox) Resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	return s.client.Resolve(ctx, host)
}

func (s *sandbox) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return s.client.DialContext(ctx, network, address)
}

func (s *sandbox) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	return s.client.Listen(ctx, network, address)
}

// deathWait is how long the engine's word about a death is waited for.
const deathWait = time.Second

// watch finds out why the sandbox ended.
func (s *sandbox) watch() {
	defer close(s.done)
	select {
	case <-s.ended:
		return
	case <-s.client.Done():
	}
	s.err = s.client.Err()
	select {
	case why := <-s.death:
		// Both: the stream may have been ended first, for a reason of its own.
		if s.err == nil {
			s.err = errors.New(why)
		} else {
			s.err = fmt.Errorf("%s: %w", why, s.err)
		}
	case <-s.ended:
	case <-time.After(deathWait):
	}
	s.err = s.targetCause(s.err)
	if s.err == nil {
		s.err = errors.New("the sandbox ended")
	}
}

// Close implements backends.Sandbox.
func (s *sandbox) Close(ctx context.Context) error {
	s.endOnce.Do(func() { close(s.ended) })
	s.client.Close()
	err := s.remove(ctx)
	<-s.done
	return err
}

// remove removes all there is of the sandbox. If that fails, it stays known as nobody's, and Run tries again.
func (s *sandbox) remove(ctx context.Context) error {
	s.closing.Lock()
	defer s.closing.Unlock()
	if s.gone {
		return nil
	}
	ctx, stop := detached(ctx)
	defer stop()
	if s.client != nil {
		s.client.Close()
	}
	var err error
	if s.id != "" {
		err = s.backend.removeContainer(ctx, s.id)
	}
	err = errors.Join(err, os.RemoveAll(s.path(runDir)), os.RemoveAll(s.path(scratchDir)))
	if s.backend.relay {
		err = errors.Join(err, s.backend.removeVolume(ctx, namePrefix+s.session))
	}
	s.backend.mu.Lock()
	delete(s.backend.live, s.session)
	s.backend.mu.Unlock()
	if err != nil {
		return fmt.Errorf("docker: remove sandbox: %w", err)
	}
	s.gone = true
	return nil
}

// removeContainer returns when the container is gone.
func (b *Backend) removeContainer(ctx context.Context, id string) error {
	for {
		err := b.engine.ContainerRemove(ctx, id, container.RemoveOptions{Force: true, RemoveVolumes: true})
		if err == nil || errdefs.IsNotFound(err) {
			return nil
		}
		// A conflict: the engine is removing it already.
		if !errdefs.IsConflict(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}
