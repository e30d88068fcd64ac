package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Where the gate can dial the sandbox, the stream is a TLS 1.3 connection to the agent, between two keys of this session alone.
// The gate's is the one that the agent's command line names. The agent's is made when the agent starts, and told to a program
// that the runtime executes in the sandbox (the pin): over the same way, that is, by which the runtime is trusted to execute
// anything there, and before any process of the session exists. Who answers at the sandbox's address without the agent's
// key is not spoken to, and who comes without the gate's is not served. A signature in TLS 1.3 is one of this handshake
// (RFC 8446, section 4.4.3), so neither can be made use of by who stands between.

const (
	// pinMagic begins what the agent tells its pin.
	pinMagic = "SLYPPIN" + Version

	// strangers is how many handshakes go on at a time; who comes when there are that many is hung up on, and may come again.
	strangers = 16

	// strangerLimit bounds a handshake.
	strangerLimit = 5 * time.Second

	// maxPin bounds what a pin prints, maxPinAddresses the addresses in it.
	maxPin          = 1 << 10
	maxPinAddresses = 8
)

// selfSigned is a certificate for a key, which says nothing but the key.
func selfSigned(key ed25519.PrivateKey) (tls.Certificate, error) {
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// pinned is what both ends of a direct connection have in common: the other end is the holder of that key, or nobody.
// It proves that by the handshake; what else its certificate says means nothing.
func pinned(own ed25519.PrivateKey, other ed25519.PublicKey) (*tls.Config, error) {
	certificate, err := selfSigned(own)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{certificate},
		ClientAuth:             tls.RequireAnyClientCert,
		InsecureSkipVerify:     true, // no names, no authorities: VerifyConnection compares the key
		SessionTicketsDisabled: true, // each connection proves the keys itself
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errNotPinned
			}
			if key, ok := s.PeerCertificates[0].PublicKey.(ed25519.PublicKey); !ok || !key.Equal(other) {
				return errNotPinned
			}
			return nil
		},
	}, nil
}

var errNotPinned = errors.New("agent: the peer does not hold the key of this session")

// takeDirect waits at a listener, which it closes, for the gate, and takes one connection: the first that proves the gate's key.
// Until then it tells its own key to who asks at the path of a socket, which it makes and removes.
func takeDirect(ctx context.Context, name string, l net.Listener, gate ed25519.PublicKey) (net.Conn, error) {
	defer l.Close()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	config, err := pinned(private, gate)
	if err != nil {
		return nil, err
	}
	dir, err := look(path.Dir(name), unix.O_DIRECTORY, nil)
	if err != nil {
		return nil, fmt.Errorf("pin's socket: %w", err)
	}
	defer dir.close()
	pins, remove, err := listenIn("unixpacket", dir, path.Base(name))
	if err != nil {
		return nil, fmt.Errorf("pin's socket: %w", err)
	}
	defer remove()
	defer pins.Close()
	go tellPins(pins, public)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // and so ends the handshakes that go on
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	proven := make(chan net.Conn, 1)
	var first atomic.Bool
	slots := make(chan struct{}, strangers)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				time.Sleep(10 * time.Millisecond) // of descriptors, say, there are none
				continue
			}
			select {
			case slots <- struct{}{}:
			default:
				conn.Close()
				continue
			}
			go func() {
				defer func() { <-slots }()
				c := proves(ctx, conn, config)
				switch {
				case c == nil:
				case first.CompareAndSwap(false, true):
					l.Close()
					proven <- c
				default:
					c.Close() // the gate, twice
				}
			}()
		}
	}()
	select {
	case conn := <-proven:
		return conn, nil
	case <-ctx.Done():
		if !first.CompareAndSwap(false, true) {
			return <-proven, nil
		}
		return nil, fmt.Errorf("wait for the gate: %w", context.Cause(ctx))
	}
}

// proves makes the handshake; nil: it was not the gate.
func proves(ctx context.Context, conn net.Conn, config *tls.Config) net.Conn {
	ctx, cancel := context.WithTimeout(ctx, strangerLimit)
	defer cancel()
	c := tls.Server(conn, config)
	if err := c.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil
	}
	return c
}

// tellPins answers one after the other.
func tellPins(l net.Listener, key ed25519.PublicKey) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		c.SetDeadline(time.Now().Add(strangerLimit))
		c.Write(append([]byte(pinMagic), key...))
		c.Close()
	}
}

// Pin is what the gate has to know of an agent to dial it.
type Pin struct {
	Key       ed25519.PublicKey
	Addresses []netip.Addr // of the sandbox, in the order to try them; any of them may be unreachable, or another's
}

// pin asks the agent of that pid for its key, and prints that with this sandbox's addresses.
func pin(name string, pid int, out io.Writer) error {
	ctx, cancel := context.WithTimeout(context.Background(), relayWait)
	defer cancel()
	c, err := dial(ctx, "unixpacket", name)
	if err != nil {
		return fmt.Errorf("reach the agent: %w", err)
	}
	defer c.Close()
	cred, err := peerOf(c.(*net.UnixConn))
	if err != nil {
		return fmt.Errorf("who is the agent: %w", err)
	}
	if int(cred.Pid) != pid {
		return fmt.Errorf("process %d listens, which is not the agent", cred.Pid)
	}
	c.SetDeadline(time.Now().Add(strangerLimit))
	var told [len(pinMagic) + ed25519.PublicKeySize + 1]byte
	n, err := c.Read(told[:])
	if err != nil || n != len(told)-1 || string(told[:len(pinMagic)]) != pinMagic {
		return errors.New("the agent does not tell its key")
	}
	line := base64.StdEncoding.EncodeToString(told[len(pinMagic):n])
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("which are the addresses: %w", err)
	}
	for _, a := range addresses {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() {
			line += " " + p.Addr().String()
		}
	}
	_, err = io.WriteString(out, line+"\n")
	return err
}

// ReadPin reads what a pin printed, to its end.
func ReadPin(r io.Reader) (Pin, error) {
	var p Pin
	b, err := io.ReadAll(io.LimitReader(r, maxPin))
	if err != nil {
		return p, fmt.Errorf("read the agent's key: %w", err)
	}
	line, rest, whole := strings.Cut(string(b), "\n")
	fields := strings.Fields(line)
	if !whole || rest != "" || len(fields) < 2 || len(fields) > 1+maxPinAddresses {
		return p, errors.New("no key and addresses of an agent")
	}
	key, err := base64.StdEncoding.Strict().DecodeString(fields[0])
	if err != nil || len(key) != ed25519.PublicKeySize {
		return p, errors.New("no key of an agent")
	}
	p.Key = key
	for _, f := range fields[1:] {
		a, err := netip.ParseAddr(f)
		if err != nil || !a.IsGlobalUnicast() {
			return Pin{}, errors.New("no address of a sandbox")
		}
		p.Addresses = append(p.Addresses, a)
	}
	return p, nil
}

// DialDirect connects to the agent that pin names, on that port, and proves the session's key to it. It returns when the agent
// has proven its own; whether it takes the gate's is seen when something is read.
func DialDirect(ctx context.Context, p Pin, port uint16, key ed25519.PrivateKey) (net.Conn, error) {
	config, err := pinned(key, p.Key)
	if err != nil {
		return nil, err
	}
	dial := func(a netip.Addr) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, strangerLimit)
		defer cancel()
		d := tls.Dialer{Config: config}
		return d.DialContext(ctx, "tcp", netip.AddrPortFrom(a, port).String())
	}
	var errs []error
	for _, a := range p.Addresses {
		conn, err := dial(a)
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("dial the sandbox: %w", errors.Join(errs...))
}

// pinCommand parses the command line of a pin.
func pinCommand(args []string) error {
	socket, pid, err := relayFlags(args)
	if err != nil {
		return err
	}
	return pin(socket, pid, os.Stdout)
}
