package agent

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/sallyport/sallyport/backends"
)

const (
	// resolveLimit bounds the answer to a name, bindLimit a listener's making.
	resolveLimit = 10 * time.Second
	bindLimit    = 10 * time.Second

	// maxLookups bounds the names looked up at once, maxPaths the paths: each of those may hold a thread.
	maxLookups = 16
	maxPaths   = 4

	// maxHost is the longest name that is looked up.
	maxHost = 255
)

// forwardLimits are how long forwarding waits.
type forwardLimits struct {
	dial  time.Duration // for a connection to come about
	take  time.Duration // for the gate to take one that came to a listener
	probe time.Duration // between looks after one that takes no bytes: the gate may have hung up
}

var normalLimits = forwardLimits{dial: 15 * time.Second, take: 30 * time.Second, probe: 5 * time.Second}

var (
	errAddress     = errors.New("not an IP address and a port")
	errUnspecified = errors.New("an address that is nobody's")
	errNetwork     = errors.New("unknown network")
	errMany        = errors.New("too many connections")
	errHost        = errors.New("not a host name")
)

const (
	// stalledMemory is what a connection that stalls in both directions holds in the agent, with some room.
	stalledMemory = 768 << 10

	// minConnections are allowed in the smallest sandbox.
	minConnections = 16
)

// memoryFiles say how much memory the sandbox may use: those of the second version of control groups, and of the first.
var memoryFiles = []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}

// memoryLimit gives the sandbox's memory in bytes, or as much as there can be.
func memoryLimit(files []string) int64 {
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil {
			return n
		}
	}
	return math.MaxInt64
}

// connectionsIn says how many connections may be forwarded in a sandbox of so much memory: were all stalled, they would
// hold half of it. The kernel's memory for their sockets is the sandbox's, too.
func connectionsIn(memory int64) int64 {
	return min(max(memory/2/stalledMemory, minConnections), maxConnections)
}

// failureOf says why something could not be done.
func failureOf(err error) *failure {
	f := &failure{Text: err.Error()}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		f.Text = errno.Error()
	}
	var unknown *net.DNSError
	var none *net.AddrError
	var timed net.Error
	switch {
	case errno == syscall.ECONNREFUSED:
		f.Code = failedRefused
	case errno == syscall.ENETUNREACH || errno == syscall.EHOSTUNREACH:
		f.Code = failedUnreachable
	case errno == syscall.EADDRINUSE:
		f.Code = failedInUse
	case errors.As(err, &unknown) && unknown.IsNotFound || errors.As(err, &none):
		f.Code = failedNoHost
	case errno == syscall.EAGAIN: // a unix socket's backlog is full, which Go would take for a time-out
	case errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timed) && timed.Timeout():
		f.Code = failedTimeout
	}
	if len(f.Text) > maxReport/2 {
		f.Text = f.Text[:maxReport/2]
	}
	return f
}

// attend gives a context that ends with limit, or when the gate hangs up. The function ends the attention, and says whether
// the stream is still the gate's and of use.
func attend(stream *yamux.Stream, limit time.Duration) (context.Context, func() bool) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	present := make(chan bool, 1)
	go func() {
		var b [1]byte
		_, err := stream.Read(b[:]) // the gate has nothing to say yet
		cancel()
		present <- errors.Is(err, yamux.ErrTimeout)
	}()
	return ctx, func() bool {
		stream.SetReadDeadline(time.Unix(1, 0))
		defer cancel()
		defer stream.SetReadDeadline(time.Time{})
		return <-present
	}
}

// turnOf takes one of the places of what is bounded. The function gives it back.
func turnOf(ctx context.Context, places chan struct{}) (func(), error) {
	select {
	case places <- struct{}{}:
		return func() { <-places }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *server) serveResolve(stream *yamux.Stream, f forward) {
	defer stream.Close()
	ctx, present := attend(stream, resolveLimit)
	list, err := s.resolve(ctx, f.Address)
	if !present() {
		return
	}
	a := response{}
	if err != nil {
		a.Failed = failureOf(err)
	}
	for _, address := range list {
		a.Addresses = append(a.Addresses, address.AsSlice())
	}
	writeMessage(stream, a)
}

// resolver reads the sandbox's own files and asks its name servers; the C library's is not there.
var resolver = net.Resolver{PreferGo: true}

func (s *server) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	name := strings.TrimSuffix(strings.ToLower(host), ".")
	switch {
	case name == "" || len(name) > maxHost || strings.ContainsRune(name, 0):
		return nil, errHost
	case name == "localhost": // RFC 6761, section 6.3: no name server is asked, and an image may lack the file
		return loopback(), nil
	}
	done, err := turnOf(ctx, s.lookups)
	if err != nil {
		return nil, err
	}
	defer done()
	list, err := resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	return list[:min(len(list), backends.MaxAddresses)], nil
}

func loopback() []netip.Addr {
	list := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	six := netip.IPv6Loopback()
	b, _ := os.ReadFile("/proc/net/if_inet6")
	if strings.Contains(string(b), strings.Repeat("0", 31)+"1 ") {
		list = append(list, six)
	}
	return list
}

// serveDial connects, and carries the connection to its end.
func (s *server) serveDial(stream *yamux.Stream, f forward) {
	t := newTunnel(stream)
	defer t.Close()
	select {
	case s.connections <- struct{}{}:
		defer func() { <-s.connections }()
	default:
		writeMessage(stream, response{Failed: failureOf(errMany)})
		return
	}
	ctx, present := attend(stream, s.limits.dial)
	conn, err := s.dial(ctx, f.Network, f.Address)
	here := present()
	if err != nil {
		if here {
			writeMessage(stream, response{Failed: failureOf(err)})
		}
		return
	}
	defer conn.Close()
	if here && writeMessage(stream, response{}) == nil {
		t.carry(conn, s.limits.probe)
	}
}

func (s *server) dial(ctx context.Context, network, address string) (backends.HalfCloser, error) {
	var d net.Dialer
	d.SetMultipathTCP(false)
	switch network {
	case "tcp":
		to, err := parseTarget(address)
		if err != nil {
			return nil, err
		}
		conn, err := d.DialContext(ctx, "tcp", to.String())
		if err != nil {
			return nil, err
		}
		return conn.(*net.TCPConn), nil
	case "unix":
		done, err := turnOf(ctx, s.paths)
		if err != nil {
			return nil, err
		}
		defer done()
		return dialUnix(ctx, address, s.own)
	}
	return nil, errNetwork
}

// parseTarget parses the address of a "tcp" connection. The one that is no host's is refused: the kernel takes it for
// loopback, which is then not what was decided on.
func parseTarget(address string) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(address)
	switch {
	case err != nil || a.Port() == 0:
		return a, errAddress
	case a.Addr().Unmap().IsUnspecified():
		return a, errUnspecified
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}

// carry carries a connection to its end: both directions have ended, it was cut off, or the gate has hung up.
func (t *tunnel) carry(conn backends.HalfCloser, probe time.Duration) {
	ended := make(chan struct{}) // closed when the gate's direction has ended
	var inwards sync.WaitGroup
	inwards.Go(func() {
		t.takeIn(conn, probe, sync.OnceFunc(func() { close(ended) }))
		t.Close()
		conn.Close()
	})
	if t.sendOut(conn) {
		<-ended
	}
	conn.Close()
	t.Close()
	inwards.Wait()
}

// takeIn hands what the gate sends to conn, and calls ended when there is no more. It returns when the gate has hung up.
func (t *tunnel) takeIn(conn backends.HalfCloser, probe time.Duration, ended func()) {
	defer ended()
	var large *[]byte
	defer func() { putTunnelBuffer(large) }()
	small := make([]byte, chunk)
	b, open := small, true
	for {
		n, err := t.Read(b)
		if n > 0 && open {
			if werr := t.hand(conn, b[:n], probe); werr != nil {
				// Nobody reads it any more. What else comes is lost, as in a pipe, so that the gate is not held up.
				open = false
				ended()
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				conn.CloseWrite()
				ended()
				t.stream.Read(make([]byte, 1)) // the end of the stream
			}
			return
		}
		b = refill(b, small, n, 0, &large)
	}
}

// hand writes b to conn. While conn takes nothing it looks whether the gate is still there.
func (t *tunnel) hand(conn backends.HalfCloser, b []byte, probe time.Duration) error {
	for {
		conn.SetWriteDeadline(time.Now().Add(probe))
		n, err := conn.Write(b)
		if b = b[n:]; err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		// Reading nothing tells of the end of a stream as soon as yamux has given it up, a while after the gate did.
		t.stream.SetReadDeadline(time.Unix(1, 0))
		_, err = t.stream.Read(nil)
		t.stream.SetReadDeadline(time.Time{})
		if err != nil && !errors.Is(err, yamux.ErrTimeout) || t.closed.Load() {
			return net.ErrClosed
		}
	}
}

// sendOut sends what comes from conn to the gate, and says whether it has come to its end.
func (t *tunnel) sendOut(conn net.Conn) bool {
	var large *[]byte
	defer func() { putTunnelBuffer(large) }()
	small := make([]byte, frameHeader+chunk)
	b := small
	for {
		n, err := conn.Read(b[frameHeader:])
		if n > 0 {
			t.writing.Lock()
			werr := t.writeFrame(frameBytes, b[:frameHeader+n])
			t.writing.Unlock()
			if werr != nil {
				return false
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return t.CloseWrite() == nil
		case err != nil:
			t.cut()
			return false
		}
		b = refill(b, small, n, frameHeader, &large)
	}
}

// refill gives the buffer for the next read, after one of n bytes into b behind head bytes: a connection that passes little
// holds no large one.
func refill(b, small []byte, n, head int, large **[]byte) []byte {
	switch {
	case *large == nil && head+n == len(b):
		*large = tunnelBuffers.Get().(*[]byte)
		return **large
	case *large != nil && n < chunk:
		putTunnelBuffer(*large)
		*large = nil
		return small
	}
	return b
}

func putTunnelBuffer(b *[]byte) {
	if b != nil {
		tunnelBuffers.Put(b)
	}
}

// listening is a listener inside.
type listening struct {
	net.Listener
	remove func() // what is left of it in the file system

	mu      sync.Mutex // guards what follows
	waiting map[uint64]*waitingConn
	last    uint64 // number of the last connection
	closed  bool
}

// waitingConn is a connection that the gate has not taken yet.
type waitingConn struct {
	backends.HalfCloser
	timer   *time.Timer
	release func() // its place among the connections
}

func (w *waitingConn) drop() {
	w.timer.Stop()
	w.Close()
	w.release()
}

// serveListen listens until the gate closes the stream.
func (s *server) serveListen(stream *yamux.Stream, f forward) {
	defer stream.Close()
	l, addr, err := s.listenInside(f)
	if err != nil {
		writeMessage(stream, response{Failed: failureOf(err)})
		return
	}
	var accepting sync.WaitGroup
	defer accepting.Wait()
	defer s.endListening(f.Listener, l)
	if writeMessage(stream, response{Address: addr}) != nil {
		return
	}
	accepting.Go(func() { s.acceptInside(stream, l) })
	stream.Read(make([]byte, 1)) // the gate has nothing to say: it hung up
	stream.SetWriteDeadline(time.Unix(1, 0))
}

func (s *server) listenInside(f forward) (*listening, string, error) {
	l := &listening{remove: func() {}, waiting: make(map[uint64]*waitingConn)}
	s.mu.Lock()
	_, twice := s.listeners[f.Listener]
	full := len(s.listeners) >= backends.MaxListeners
	if !twice && !full {
		s.listeners[f.Listener] = l
	}
	s.mu.Unlock()
	if twice || full {
		return nil, "", errors.New("too many listeners")
	}
	addr, err := s.bind(l, f.Network, f.Address)
	if err != nil {
		s.mu.Lock()
		delete(s.listeners, f.Listener)
		s.mu.Unlock()
		return nil, "", err
	}
	return l, addr, nil
}

// bind makes the socket of l.
func (s *server) bind(l *listening, network, address string) (addr string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), bindLimit)
	defer cancel()
	var c net.ListenConfig
	c.SetMultipathTCP(false)
	switch network {
	case "tcp":
		family, err := listenFamily(address)
		if err != nil {
			return "", err
		}
		if l.Listener, err = c.Listen(ctx, family, address); err != nil {
			return "", err
		}
		return l.Addr().String(), nil
	case "unix":
		done, err := turnOf(ctx, s.paths)
		if err != nil {
			return "", err
		}
		defer done()
		if address == "" {
			l.Listener, l.remove, addr, err = listenPrivate(s.own)
		} else {
			l.Listener, l.remove, err = listenUnix(address, s.own)
			addr = address
		}
		return addr, err
	}
	return "", errNetwork
}

// listenFamily gives the network to listen at for an address of "tcp": Go takes 0.0.0.0 for all of both families.
func listenFamily(address string) (string, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", errAddress
	}
	if host == "" {
		_, err := netip.ParseAddrPort("0.0.0.0:" + port)
		if err != nil {
			return "", errAddress
		}
		return "tcp", nil
	}
	a, err := netip.ParseAddrPort(address)
	switch {
	case err != nil:
		return "", errAddress
	case a.Addr().Is4():
		return "tcp4", nil
	}
	return "tcp6", nil
}

// endListening ends l, with what waits in it.
func (s *server) endListening(number uint64, l *listening) {
	l.Close()
	l.remove()
	l.mu.Lock()
	l.closed = true
	waiting := l.waiting
	l.waiting = nil
	l.mu.Unlock()
	for _, w := range waiting {
		w.drop()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, number)
}

// acceptInside tells the gate of the connections that come.
func (s *server) acceptInside(stream *yamux.Stream, l *listening) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(100 * time.Millisecond) // no descriptor is free
			continue
		}
		number, ok := s.hold(l, conn)
		if !ok {
			continue
		}
		a := arrival{Number: number}
		if from, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
			a.Origin = from.String()
		}
		if writeMessage(stream, a) != nil {
			return
		}
	}
}

// hold keeps a connection for the gate to take, or refuses it where there is no room.
func (s *server) hold(l *listening, conn net.Conn) (uint64, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	room := !l.closed && len(l.waiting) < backends.MaxBacklog
	if room {
		select {
		case s.connections <- struct{}{}:
		default:
			room = false
		}
	}
	if !room {
		if c, ok := conn.(*net.TCPConn); ok {
			c.SetLinger(0) // a reset, as of a port at which nobody listens
		}
		conn.Close()
		return 0, false
	}
	l.last++
	number := l.last
	w := &waitingConn{HalfCloser: conn.(backends.HalfCloser), release: func() { <-s.connections }}
	w.timer = time.AfterFunc(s.limits.take, func() {
		if w := l.take(number); w != nil {
			w.drop()
		}
	})
	l.waiting[number] = w
	return number, true
}

// take gives the connection of a number, if it still waits.
func (l *listening) take(number uint64) *waitingConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.waiting[number]
	delete(l.waiting, number)
	return w
}

// serveAccept carries a connection that came to a listener.
func (s *server) serveAccept(stream *yamux.Stream, f forward) {
	t := newTunnel(stream)
	defer t.Close()
	s.mu.Lock()
	l := s.listeners[f.Listener]
	s.mu.Unlock()
	var w *waitingConn
	if l != nil {
		w = l.take(f.Arrival)
	}
	if w == nil {
		writeMessage(stream, response{Failed: failureOf(net.ErrClosed)})
		return
	}
	defer w.drop()
	w.timer.Stop()
	if writeMessage(stream, response{}) == nil {
		t.carry(w.HalfCloser, s.limits.probe)
	}
}
