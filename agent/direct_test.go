package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// directTest is an agent that waits to be dialled, up to the moment that it would serve.
type directTest struct {
	t       *testing.T
	gate    ed25519.PrivateKey
	address string
	socket  string
	pin     Pin
	port    uint16
	cancel  context.CancelFunc
	taken   chan net.Conn // nil: it has given up
}

func newDirectTest(t *testing.T) *directTest {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &directTest{t: t, gate: private, address: l.Addr().String(), socket: filepath.Join(t.TempDir(), "s"), taken: make(chan net.Conn, 1)}
	at := netip.MustParseAddrPort(d.address)
	d.port = at.Port()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	d.cancel = cancel
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := takeDirect(ctx, d.socket, l, public)
		if err != nil {
			conn = nil
		}
		d.taken <- conn
	}()
	t.Cleanup(func() { cancel(); <-ended })
	var out bytes.Buffer
	if err := pin(d.socket, os.Getpid(), &out); err != nil {
		t.Fatal(err)
	}
	key, _, _ := strings.Cut(out.String(), " ")
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(key))
	if err != nil {
		t.Fatal(err)
	}
	d.pin = Pin{Key: raw, Addresses: []netip.Addr{at.Addr()}}
	return d
}

func (d *directTest) dial(p Pin, key ed25519.PrivateKey) (net.Conn, error) {
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	c, err := DialDirect(ctx, p, d.port, key)
	if err == nil {
		d.t.Cleanup(func() { c.Close() })
	}
	return c, err
}

// works says that the gate is still taken, after whatever was done before.
func (d *directTest) works() {
	d.t.Helper()
	c, err := d.dial(d.pin, d.gate)
	if err != nil {
		d.t.Fatal(err)
	}
	far := <-d.taken
	if far == nil {
		d.t.Fatal("the agent has given up")
	}
	defer far.Close()
	if s := far.(*tls.Conn).ConnectionState(); s.Version != tls.VersionTLS13 || s.DidResume {
		d.t.Errorf("%+v", s)
	}
	if _, err := c.Write([]byte("hi")); err != nil {
		d.t.Error(err)
	}
	var b [2]byte
	if _, err := io.ReadFull(far, b[:]); err != nil || string(b[:]) != "hi" {
		d.t.Errorf("%q, %v", b, err)
	}
	if _, err := os.Lstat(d.socket); !errors.Is(err, fs.ErrNotExist) {
		d.t.Errorf("the pin's socket is still there: %v", err)
	}
	// Nobody comes after the gate, whatever key they hold.
	if c, err := net.Dial("tcp", d.address); err == nil {
		c.Close()
		d.t.Error("the agent listens still")
	}
}

func otherKey(t *testing.T) (ed25519.PublicKey, ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return public, private
}

// refused says that a connection came to nothing.
func (d *directTest) refused(c net.Conn, err error) {
	d.t.Helper()
	if err != nil {
		return
	}
	c.SetDeadline(time.Now().Add(limit))
	c.Write([]byte("x"))
	if n, err := c.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		d.t.Errorf("served: %d bytes, %v", n, err)
	}
	select {
	case far := <-d.taken:
		d.t.Fatalf("taken for the gate: %v", far)
	default:
	}
}

func TestDirect(t *testing.T) { newDirectTest(t).works() }

// TestDirectStrangers: whoever is not the gate is not served, and keeps the gate from nothing.
func TestDirectStrangers(t *testing.T) {
	t.Run("another key", func(t *testing.T) {
		d := newDirectTest(t)
		_, other := otherKey(t)
		d.refused(d.dial(d.pin, other))
		d.works()
	})
	t.Run("the gate's certificate without its key", func(t *testing.T) {
		d := newDirectTest(t)
		config, err := pinned(d.gate, d.pin.Key)
		if err != nil {
			t.Fatal(err)
		}
		_, other := otherKey(t)
		config.Certificates[0].PrivateKey = other
		c, err := tls.Dial("tcp", d.address, config)
		if err != nil {
			c = nil
		}
		if c != nil {
			defer c.Close()
			d.refused(c, nil)
		}
		d.works()
	})
	t.Run("no certificate", func(t *testing.T) {
		d := newDirectTest(t)
		c, err := tls.Dial("tcp", d.address, &tls.Config{InsecureSkipVerify: true})
		if err == nil {
			defer c.Close()
			d.refused(c, nil)
		}
		d.works()
	})
	t.Run("an older TLS", func(t *testing.T) {
		d := newDirectTest(t)
		config, err := pinned(d.gate, d.pin.Key)
		if err != nil {
			t.Fatal(err)
		}
		config.MinVersion, config.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		if c, err := tls.Dial("tcp", d.address, config); err == nil {
			c.Close()
			t.Error("TLS 1.2 is spoken")
		}
		d.works()
	})
	t.Run("garbage", func(t *testing.T) {
		d := newDirectTest(t)
		for _, text := range []string{"", "GET / HTTP/1.1\r\n\r\n", strings.Repeat("\x00", 1<<16), "\x16\x03\x01\xff\xff" + rand.Text(), magic} {
			c, err := net.Dial("tcp", d.address)
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(limit))
			c.Write([]byte(text))
			c.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, c)
			c.Close()
		}
		d.works()
	})
	t.Run("slow ones", func(t *testing.T) {
		// As many as there are handshakes at a time, and more. They are hung up on, and the gate comes in again.
		d := newDirectTest(t)
		var wg sync.WaitGroup
		for range 3 * strangers {
			c, err := net.Dial("tcp", d.address)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			wg.Go(func() {
				c.SetDeadline(time.Now().Add(limit))
				c.Write([]byte{0x16})
				if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error("not hung up on")
				}
			})
		}
		wg.Wait()
		d.works()
	})
	t.Run("the gate twice", func(t *testing.T) {
		d := newDirectTest(t)
		var mu sync.Mutex
		var all []net.Conn
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if c, err := d.dial(d.pin, d.gate); err == nil {
					mu.Lock()
					defer mu.Unlock()
					all = append(all, c)
				}
			})
		}
		far := <-d.taken
		if far == nil {
			t.Fatal("the agent has given up")
		}
		wg.Wait()
		if _, err := far.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		served := 0
		for _, c := range all {
			c.SetDeadline(time.Now().Add(limit))
			if n, err := c.Read(make([]byte, 1)); n == 1 {
				served++
			} else if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("a second connection is neither served nor closed")
			}
		}
		far.Close()
		if served != 1 {
			t.Errorf("%d connections are served", served)
		}
	})
	t.Run("nobody", func(t *testing.T) {
		d := newDirectTest(t)
		d.cancel()
		if far := <-d.taken; far != nil {
			t.Error("taken")
		}
		if _, err := os.Lstat(d.socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the pin's socket is still there: %v", err)
		}
	})
}

// TestDirectImpostor: who answers at the sandbox's address is not spoken to without the agent's key, even if it has a connection
// to the agent itself.
func TestDirectImpostor(t *testing.T) {
	d := newDirectTest(t)
	other, private := otherKey(t)
	config, err := pinned(private, d.gate.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- nil
			return
		}
		defer c.Close()
		s := tls.Server(c, config)
		if err := s.Handshake(); err != nil {
			got <- err
			return
		}
		_, err = s.Read(make([]byte, 1))
		got <- err
	}()
	port := netip.MustParseAddrPort(l.Addr().String()).Port()
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	if c, err := DialDirect(ctx, d.pin, port, d.gate); err == nil {
		c.Close()
		t.Error("an impostor was taken for the agent")
	}
	if err := <-got; err == nil {
		t.Error("the gate has told an impostor something")
	}
	// The key that it does have is not the one pinned, though it is one of the protocol's.
	if c, err := DialDirect(ctx, Pin{Key: other, Addresses: d.pin.Addresses}, d.port, d.gate); err == nil {
		c.Close()
		t.Error("the agent was taken for another")
	}
	d.works()
}

// TestPin: what is printed, and what is read of it.
func TestPin(t *testing.T) {
	key := base64.StdEncoding.EncodeToString(make([]byte, ed25519.PublicKeySize))
	for text, ok := range map[string]bool{
		key + " 192.0.2.1\n":                           true,
		key + " 192.0.2.1 2001:db8::1\n":               true,
		key + "\n":                                     false,
		key + " 192.0.2.1":                             false, // cut
		key + " 192.0.2.1\nmore":                       false,
		key + " 127.0.0.1\n":                           false,
		key + " 169.254.169.254\n":                     false,
		key + " host.test\n":                           false,
		key + strings.Repeat(" 192.0.2.1", 9) + "\n":   false,
		key[:8] + " 192.0.2.1\n":                       false,
		strings.Repeat("A", 2*maxPin) + " 192.0.2.1\n": false,
		"": false,
		"sallyport-agent: reach the agent: connect: refused ": false,
	} {
		if _, err := ReadPin(strings.NewReader(text)); (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
	// One who listens in the agent's place is not believed.
	d := newDirectTest(t)
	if err := pin(d.socket, 1, io.Discard); err == nil || !strings.Contains(err.Error(), "not the agent") {
		t.Errorf("%v", err)
	}
	d.works()
}

func FuzzReadPin(f *testing.F) {
	f.Add([]byte(base64.StdEncoding.EncodeToString(make([]byte, 32)) + " 192.0.2.1 2001:db8::1\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ReadPin(bytes.NewReader(b))
		if err == nil && (len(p.Key) != ed25519.PublicKeySize || len(p.Addresses) == 0 || len(p.Addresses) > maxPinAddresses) {
			t.Errorf("%+v", p)
		}
	})
}
