package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/sallyport/sallyport/backends"
)

var (
	_ backends.Dialer   = (*Client)(nil)
	_ backends.Listener = (*Client)(nil)
)

// acceptLimit bounds the wait for an agent to hand a connection over, unlistenLimit for it to have ended a listener.
const (
	acceptLimit   = 5 * time.Second
	unlistenLimit = 5 * time.Second
)

var (
	errNoHost  = errors.New("no such host")
	errAnswer  = errors.New("agent: impossible answer")
	errStreams = errors.New("too many streams")
)

// err is a failure as an error of the gate's.
func (f *failure) err() error {
	switch f.Code {
	case failedRefused:
		return syscall.ECONNREFUSED
	case failedUnreachable:
		return syscall.EHOSTUNREACH
	case failedNoHost:
		return errNoHost
	case failedInUse:
		return syscall.EADDRINUSE
	case failedTimeout:
		return os.ErrDeadlineExceeded
	}
	return fmt.Errorf("agent: %s", printable(f.Text))
}

// openStream opens a stream with its first message, in the time of ctx.
func (c *Client) openStream(ctx context.Context, o opening) (*yamux.Stream, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if c.session.NumStreams() >= maxStreams {
		return nil, errStreams
	}
	stream, err := c.session.OpenStream()
	if err != nil {
		return nil, err
	}
	if err := writeMessage(stream, o); err != nil {
		hangUp(stream)
		return nil, err
	}
	return stream, nil
}

func hangUp(s *yamux.Stream) {
	s.SetDeadline(time.Unix(1, 0))
	s.Close()
}

// ask opens a stream and reads the agent's answer to its first message.
func (c *Client) ask(ctx context.Context, o opening) (*yamux.Stream, response, error) {
	var a response
	stream, err := c.openStream(ctx, o)
	if err != nil {
		return nil, a, c.lost(err)
	}
	stop := context.AfterFunc(ctx, func() { hangUp(stream) })
	err = readMessage(stream, maxReport, &a)
	switch {
	case !stop():
		err = context.Cause(ctx)
	case err != nil:
		err = c.lost(noEOF(err))
	case a.Failed != nil:
		err = a.Failed.err()
	}
	if err != nil {
		hangUp(stream)
		return nil, a, err
	}
	return stream, a, nil
}

// lost says more of an error when the whole sandbox is gone.
func (c *Client) lost(err error) error {
	if c.session.IsClosed() {
		return fmt.Errorf("%w: %w", backends.ErrGone, err)
	}
	return err
}

// Resolve implements backends.Dialer. An IPv4 address in the form of an IPv6 one is given as what it is.
func (c *Client) Resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a.Unmap()}, nil
	}
	if host == "" || len(host) > maxHost {
		return nil, fmt.Errorf("resolve: %w", errHost)
	}
	stream, a, err := c.ask(ctx, opening{Op: opResolve, Forward: forward{Address: host}})
	if err != nil {
		return nil, fmt.Errorf("resolve: %w", err)
	}
	hangUp(stream)
	list, err := addressesOf(a)
	if err != nil {
		return nil, fmt.Errorf("resolve: %w", err)
	}
	return list, nil
}

// addressesOf checks the answer to a name.
func addressesOf(a response) ([]netip.Addr, error) {
	if len(a.Addresses) == 0 || len(a.Addresses) > backends.MaxAddresses {
		return nil, errAnswer
	}
	list := make([]netip.Addr, 0, len(a.Addresses))
	for _, b := range a.Addresses {
		address, ok := netip.AddrFromSlice(b)
		if !ok {
			return nil, errAnswer
		}
		list = append(list, address.Unmap())
	}
	return list, nil
}

// DialContext implements backends.Dialer.
func (c *Client) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := c.dialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("dial: %w", err)
	}
	return conn, nil
}

func (c *Client) dialContext(ctx context.Context, network, address string) (net.Conn, error) {
	var remote net.Addr
	switch network {
	case "tcp":
		to, err := parseTarget(address)
		if err != nil {
			return nil, err
		}
		remote, address = net.TCPAddrFromAddrPort(to), to.String()
	case "unix":
		if err := checkSocketPath(address); err != nil {
			return nil, err
		}
		remote = &net.UnixAddr{Name: address, Net: network}
	default:
		return nil, errNetwork
	}
	stream, _, err := c.ask(ctx, opening{Op: opDial, Forward: forward{Network: network, Address: address}})
	if err != nil {
		return nil, err
	}
	return gateTunnel(stream, nowhere(network), remote), nil
}

// gateTunnel makes the gate's end of a forwarded connection.
func gateTunnel(stream *yamux.Stream, local, remote net.Addr) *tunnel {
	t := newTunnel(stream)
	t.local, t.remote, t.gate = local, remote, true
	return t
}

// nowhere is the address of an end that the agent did not tell.
func nowhere(network string) net.Addr {
	if network == "unix" {
		return &net.UnixAddr{Net: network}
	}
	return &net.TCPAddr{}
}

// Listen implements backends.Listener.
func (c *Client) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := c.listenAt(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return l, nil
}

func (c *Client) listenAt(ctx context.Context, network, address string) (net.Listener, error) {
	switch network {
	case "tcp":
		if _, err := listenFamily(address); err != nil {
			return nil, err
		}
	case "unix":
		if address != "" {
			if err := checkSocketPath(address); err != nil {
				return nil, err
			}
		}
	default:
		return nil, errNetwork
	}
	if c.listeners.Add(1) > backends.MaxListeners {
		c.listeners.Add(-1)
		return nil, errors.New("too many listeners")
	}
	l := &remoteListener{
		client: c, number: c.next.Add(1), network: network,
		arrivals: make(chan arrived, backends.MaxBacklog), ended: make(chan struct{}),
	}
	stream, a, err := c.ask(ctx, opening{Op: opListen, Forward: forward{Network: network, Address: address, Listener: l.number}})
	if err == nil {
		if l.addr, err = boundTo(network, address, a.Address); err != nil {
			hangUp(stream)
		}
	}
	if err != nil {
		c.listeners.Add(-1)
		return nil, err
	}
	l.stream = stream
	go l.takeArrivals()
	return l, nil
}

// boundTo checks the address that the agent says it listens at, of one that was asked for.
func boundTo(network, asked, got string) (net.Addr, error) {
	if network == "unix" {
		switch {
		case asked != "" && got != asked:
			return nil, errAnswer
		case asked == "" && (checkSocketPath(got) != nil || path.Clean(got) != got || printable(got) != got):
			return nil, errAnswer
		}
		return &net.UnixAddr{Name: got, Net: network}, nil
	}
	a, err := netip.ParseAddrPort(got)
	if err != nil || a.Port() == 0 {
		return nil, errAnswer
	}
	host, port, _ := net.SplitHostPort(asked)
	want, err := netip.ParseAddrPort(net.JoinHostPort("::", port))
	if err != nil || want.Port() != 0 && want.Port() != a.Port() {
		return nil, errAnswer
	}
	if host != "" {
		if want, err := netip.ParseAddr(host); err != nil || want.WithZone("").Unmap() != a.Addr().WithZone("").Unmap() {
			return nil, errAnswer
		}
	}
	return net.TCPAddrFromAddrPort(a), nil
}

// remoteListener is a listener inside, as the gate sees it.
type remoteListener struct {
	client  *Client
	number  uint64
	network string
	stream  *yamux.Stream
	addr    net.Addr

	arrivals chan arrived
	ended    chan struct{} // closed when the agent has ended it

	mu     sync.Mutex // guards what follows
	closed bool
}

// arrived is a connection that waits inside.
type arrived struct {
	number uint64
	remote net.Addr
}

// takeArrivals hears of connections until the listener ends. It holds no more of them than the agent does.
func (l *remoteListener) takeArrivals() {
	defer close(l.ended)
	defer l.client.listeners.Add(-1)
	defer hangUp(l.stream)
	for {
		var a arrival
		if readMessage(l.stream, maxReport, &a) != nil {
			return
		}
		from := arrived{a.Number, nowhere(l.network)}
		if l.network == "tcp" {
			origin, err := netip.ParseAddrPort(a.Origin)
			if err != nil {
				return
			}
			from.remote = net.TCPAddrFromAddrPort(netip.AddrPortFrom(origin.Addr().WithZone("").Unmap(), origin.Port()))
		} else if a.Origin != "" {
			return
		}
		select {
		case l.arrivals <- from:
		default: // those that wait are old, or the agent's limit is another: this one is closed inside before long
		}
	}
}

func (l *remoteListener) Addr() net.Addr { return l.addr }

// Accept passes over connections that are gone.
func (l *remoteListener) Accept() (net.Conn, error) {
	for {
		select {
		case <-l.ended:
			return nil, l.err()
		default:
		}
		select {
		case <-l.ended:
		case a := <-l.arrivals:
			if stream, err := l.take(a); err == nil {
				return gateTunnel(stream, l.addr, a.remote), nil
			}
		}
	}
}

// take has the agent hand a connection over.
func (l *remoteListener) take(a arrived) (*yamux.Stream, error) {
	ctx, cancel := context.WithTimeout(context.Background(), acceptLimit)
	defer cancel()
	stream, _, err := l.client.ask(ctx, opening{Op: opAccept, Forward: forward{Listener: l.number, Arrival: a.number}})
	return stream, err
}

// err says why there is nothing more to accept.
func (l *remoteListener) err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return net.ErrClosed
	}
	return fmt.Errorf("accept: %w", l.client.lost(io.ErrUnexpectedEOF))
}

// Close returns when the listener inside has ended.
func (l *remoteListener) Close() error {
	l.mu.Lock()
	first := !l.closed
	l.closed = true
	l.mu.Unlock()
	if first {
		l.stream.SetReadDeadline(time.Now().Add(unlistenLimit))
		l.stream.Close()
	}
	<-l.ended
	return nil
}
