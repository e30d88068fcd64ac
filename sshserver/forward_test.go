package sshserver

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	sshagent "golang.org/x/crypto/ssh/agent"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

// service listens on loopback and gives each connection to serve. The in-memory backend has no network of its own.
func service(t *testing.T, network, address string, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { defer nc.Close(); serve(nc) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

func echo(nc net.Conn) { io.Copy(nc, nc) }

// halfClosers are what a test needs of both ends.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// request has policy answer by f.
func (g *gate) request(f func(authz.RequestInput) bool) {
	g.rules.change(func() {
		g.rules.request = func(in authz.RequestInput) (authz.Verdict, error) {
			if f(in) {
				return authz.Verdict{Allow: true}, nil
			}
			return authz.Verdict{Reason: in.Type + " is not permitted by profile debug"}, nil
		}
	})
}

// permit is what logins give from now on.
func (g *gate) permit(p authz.Permit) {
	inner := g.rules.login
	g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
		d, err := inner(in)
		d.Permit = p
		return d, err
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within 20 s: " + what)
		}
	}
}

// places are how many forwards and listeners the gate's connections have.
func places(g *gate) (n int) {
	g.server.mu.Lock()
	defer g.server.mu.Unlock()
	for _, c := range g.server.conns {
		c.mu.Lock()
		n += len(c.forwards) + len(c.listeners)
		c.mu.Unlock()
	}
	return n
}

// Bytes pass both ways unchanged, many connections at once, and each direction ends by itself.
func TestForwardBytes(t *testing.T) {
	g := newGate(t, nil)
	// It reads to the end, and answers only then: what came, and its hash.
	addr := service(t, "tcp", "127.0.0.1:0", func(nc net.Conn) {
		data, err := io.ReadAll(nc)
		if err != nil {
			t.Error(err)
		}
		nc.Write(data)
		sum := sha256.Sum256(data)
		nc.Write(sum[:])
	})
	c := g.dial("alice")
	const connections = 8
	var wg sync.WaitGroup
	for i := range connections {
		wg.Go(func() {
			nc, err := c.Dial("tcp", addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer nc.Close()
			data := make([]byte, 1+i*300_000)
			mrand.NewChaCha8([32]byte{byte(i)}).Read(data)
			if _, err := nc.Write(data); err != nil {
				t.Error(err)
			}
			nc.(halfCloser).CloseWrite()
			got, err := io.ReadAll(nc)
			sum := sha256.Sum256(data)
			if err != nil || !bytes.Equal(got, append(data, sum[:]...)) {
				t.Errorf("connection %d: %d bytes back of %d, %v", i, len(got), len(data), err)
			}
		})
	}
	wg.Wait()
	eventually(t, "the places are free", func() bool { return places(g) == 0 })
	c.Close()
	records := g.records()[0]
	opens, forwards, closes := bodies[*auditlog.ChannelOpen](records), bodies[*auditlog.Forward](records), bodies[*auditlog.ChannelClose](records)
	if len(opens) != connections || len(forwards) != connections || len(closes) != connections {
		t.Fatalf("%d opens, %d forwards, %d closes", len(opens), len(forwards), len(closes))
	}
	if o := opens[0]; o.Type != "direct-tcpip" || o.Target != addr || o.Error != "" {
		t.Errorf("open %+v", o)
	}
	ends := map[uint32]*auditlog.ChannelClose{}
	for _, r := range records {
		if c, ok := r.Body.(*auditlog.ChannelClose); ok {
			ends[r.Channel] = c
		}
	}
	var in, out uint64
	for _, r := range records {
		f, ok := r.Body.(*auditlog.Forward)
		if !ok {
			continue
		}
		end := ends[r.Channel]
		if f.Type != "direct-tcpip" || f.Target != addr || f.Address != addr || f.Result != "ended" || f.Detail != "" ||
			f.Output != f.Input+32 || f.First.IsZero() || f.Last.Before(f.First) || end == nil || end.Input != f.Input || end.Output != f.Output {
			t.Errorf("forward %+v, close %+v", f, end)
		}
		in, out = in+f.Input, out+f.Output
	}
	if want := uint64(connections + 28*300_000); in != want || out != want+32*connections {
		t.Errorf("%d bytes in, %d out, want %d", in, out, want)
	}
	if n := len(bodies[*auditlog.Data](records)); n != 0 {
		t.Errorf("%d records of content, which is off", n)
	}
}

// The sandbox's side may end its direction first; what the client sends after that arrives.
func TestForwardHalfClosedInside(t *testing.T) {
	g := newGate(t, nil)
	got := make(chan string, 2)
	serve := func(nc net.Conn) {
		io.WriteString(nc, "hello")
		nc.(halfCloser).CloseWrite()
		b, _ := io.ReadAll(nc)
		got <- string(b)
	}
	c := g.dial("alice")
	for network, address := range map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(t.TempDir(), "s")} {
		nc, err := c.Dial(network, service(t, network, address, serve))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(nc); string(b) != "hello" || err != nil {
			t.Fatalf("read %q, %v", b, err)
		}
		io.WriteString(nc, "late")
		nc.(halfCloser).CloseWrite()
		if s := <-got; s != "late" {
			t.Errorf("%s: the sandbox's side read %q", network, s)
		}
		nc.Close()
	}
	c.Close()
	for _, f := range bodies[*auditlog.Forward](g.records()[0]) {
		if f.Result != "ended" || f.Input != 4 || f.Output != 5 {
			t.Errorf("forward %+v", f)
		}
	}
}

// What a client sent before it closed its channel arrives.
func TestForwardClosedByClient(t *testing.T) {
	g := newGate(t, nil)
	got := make(chan int, 1)
	addr := service(t, "tcp", "127.0.0.1:0", func(nc net.Conn) {
		time.Sleep(300 * time.Millisecond)
		b, _ := io.ReadAll(nc)
		got <- len(b)
	})
	c := g.dial("alice")
	nc, err := c.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	nc.Write(make([]byte, 1<<20))
	nc.Close()
	if n := <-got; n != 1<<20 {
		t.Errorf("%d bytes arrived", n)
	}
	eventually(t, "the place is free", func() bool { return places(g) == 0 })
}

// A target that takes nothing of what a client sent before it left does not hold its place for ever.
func TestForwardLingers(t *testing.T) {
	defer func(d time.Duration) { lingerTime = d }(lingerTime)
	lingerTime = 500 * time.Millisecond
	g := newGate(t, nil)
	done := make(chan struct{})
	addr := service(t, "tcp", "127.0.0.1:0", func(nc net.Conn) { <-done })
	defer close(done)
	c := g.dial("alice")
	nc, err := c.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		for b := make([]byte, 32<<10); ; {
			if _, err := nc.Write(b); err != nil {
				return
			}
		}
	}()
	var last uint64
	eventually(t, "it stands still", func() bool {
		time.Sleep(300 * time.Millisecond)
		was := last
		g.server.mu.Lock()
		defer g.server.mu.Unlock()
		for _, c := range g.server.conns {
			c.mu.Lock()
			for _, f := range c.forwards {
				last = f.in.Load()
			}
			c.mu.Unlock()
		}
		return last > 0 && last == was
	})
	nc.Close()
	<-wrote
	eventually(t, "the place is free", func() bool { return places(g) == 0 })
	c.Close()
	if f := bodies[*auditlog.Forward](g.records()[0])[0]; f.Result != "cut-off" || !strings.Contains(f.Detail, "was not taken") {
		t.Errorf("forward %+v", f)
	}
}

// powerless is a backend whose sandboxes only run processes.
type powerless struct{ backends.Backend }

func (p powerless) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	sb, err := p.Backend.Start(ctx, spec)
	return struct{ backends.Sandbox }{sb}, err
}

// resolving is a backend whose sandboxes' names are a table's; all else is the real one's.
type resolving struct {
	backends.Backend
	names map[string][]netip.Addr
	asked atomic.Int32
}

type resolvingSandbox struct {
	backends.Sandbox
	backends.Dialer
	r *resolving
}

func (r *resolving) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	sb, err := r.Backend.Start(ctx, spec)
	if err != nil {
		return nil, err
	}
	return &resolvingSandbox{sb, sb.(backends.Dialer), r}, nil
}

func (s *resolvingSandbox) Resolve(_ context.Context, host string) ([]netip.Addr, error) {
	s.r.asked.Add(1)
	return s.r.names[host], nil
}

// Each refusal: the client reads why, with the reason of RFC 4254, and the log has it.
func TestForwardRefused(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint32(closed.Addr().(*net.TCPAddr).Port)
	closed.Close()
	target := func(host string, port uint32) []byte { return ssh.Marshal(directTCPMsg{host, port, "192.0.2.9", 4711}) }
	allow := func(authz.RequestInput) bool { return true }
	for _, tc := range []struct {
		name   string
		kind   string
		extra  []byte
		policy func(authz.RequestInput) bool
		reason ssh.RejectionReason
		client string // in what the client reads
		log    string // in the channel-open's error
		failed string // in the forward's detail, if there is one
	}{
		{name: "by policy", extra: target("127.0.0.1", port), policy: func(authz.RequestInput) bool { return false },
			reason: ssh.Prohibited, client: "direct-tcpip is not permitted by profile debug", log: "direct-tcpip is not permitted by profile debug"},
		{name: "socket by policy", kind: typeDirectUnix, extra: ssh.Marshal(directUnixMsg{Path: "/run/s"}),
			policy: func(authz.RequestInput) bool { return false },
			reason: ssh.Prohibited, client: "not permitted", log: "not permitted by profile debug"},
		{name: "no listener", extra: target("127.0.0.1", port), policy: allow,
			reason: ssh.ConnectionFailed, client: "was refused there", failed: "connection refused"},
		{name: "no socket", kind: typeDirectUnix, extra: ssh.Marshal(directUnixMsg{Path: "/nonexistent/s"}), policy: allow,
			reason: ssh.ConnectionFailed, client: "failed", failed: "failed"},
		{name: "no such name", extra: target("nothing.invalid", 80), policy: allow,
			reason: ssh.ConnectionFailed, client: "has no address", log: "nothing.invalid has no address"},
		{name: "all addresses by policy", extra: target("two.example", 80), policy: func(in authz.RequestInput) bool { return in.Address == "" },
			reason: ssh.Prohibited, client: "not permitted", log: "not permitted"},
		{name: "junk", extra: []byte("junk"), policy: allow, reason: ssh.Prohibited, client: "malformed", log: "malformed request: direct-tcpip"},
		{name: "port 0", extra: target("127.0.0.1", 0), policy: allow, reason: ssh.Prohibited, client: "malformed", log: "port 0"},
		{name: "port 65536", extra: target("127.0.0.1", 65536), policy: allow, reason: ssh.Prohibited, client: "malformed", log: "port 65536"},
		{name: "no host", extra: target("", 80), policy: allow, reason: ssh.Prohibited, client: "malformed", log: "host name"},
		{name: "a host with a newline", extra: target("a\nb", 80), policy: allow, reason: ssh.Prohibited, client: "malformed", log: "host name"},
		{name: "an address with a zone", extra: target("fe80::1%lo", 80), policy: allow, reason: ssh.Prohibited, client: "malformed", log: "zone"},
		{name: "a path that is not clean", kind: typeDirectUnix, extra: ssh.Marshal(directUnixMsg{Path: "/run/../s"}), policy: allow,
			reason: ssh.Prohibited, client: "malformed", log: "absolute"},
		{name: "an abstract name", kind: typeDirectUnix, extra: ssh.Marshal(directUnixMsg{Path: "@s"}), policy: allow,
			reason: ssh.Prohibited, client: "malformed", log: "absolute"},
		{name: "a path with NUL", kind: typeDirectUnix, extra: ssh.Marshal(directUnixMsg{Path: "/run/s\x00x"}), policy: allow,
			reason: ssh.Prohibited, client: "malformed", log: "absolute"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newGate(t, nil)
			names := &resolving{Backend: g.backend, names: map[string][]netip.Addr{
				"two.example": {netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
			}}
			g.server.Backend = names
			g.request(tc.policy)
			c := g.dial("alice")
			kind := tc.kind
			if kind == "" {
				kind = typeDirectTCP
			}
			_, _, err := c.OpenChannel(kind, tc.extra)
			var refused *ssh.OpenChannelError
			if !errors.As(err, &refused) || refused.Reason != tc.reason || !strings.Contains(refused.Message, tc.client) {
				t.Errorf("client: %v, want %v with %q", err, tc.reason, tc.client)
			}
			eventually(t, "the place is free", func() bool { return places(g) == 0 })
			c.Close()
			records := g.records()[0]
			opens, forwards := bodies[*auditlog.ChannelOpen](records), bodies[*auditlog.Forward](records)
			if len(opens) != 1 || !strings.Contains(opens[0].Error, tc.log) || (opens[0].Error == "") != (tc.log == "") {
				t.Errorf("log: %+v, want %q", opens, tc.log)
			}
			if (tc.failed != "") != (len(forwards) == 1) || len(forwards) == 1 &&
				(forwards[0].Result != "failed" || !strings.Contains(forwards[0].Detail, tc.failed)) {
				t.Errorf("forwards %+v, want %q", forwards, tc.failed)
			}
		})
	}
}

// A name that nothing could admit is not looked up, and an address is never looked up.
func TestForwardResolvesOnlyWhatCouldBe(t *testing.T) {
	g := newGate(t, nil)
	names := &resolving{Backend: g.backend}
	g.server.Backend = names
	g.request(func(authz.RequestInput) bool { return false })
	c := g.dial("alice")
	for _, host := range []string{"secret.example:80", "127.0.0.1:80"} {
		if _, err := c.Dial("tcp", host); err == nil {
			t.Fatal("connected to " + host)
		}
	}
	if n := names.asked.Load(); n != 0 {
		t.Errorf("%d names were looked up", n)
	}
}

// The addresses that policy admits are tried in order, and no other; the name is looked up once.
func TestForwardAddresses(t *testing.T) {
	g := newGate(t, nil)
	addr := netip.MustParseAddrPort(service(t, "tcp", "127.0.0.1:0", echo))
	names := &resolving{Backend: g.backend, names: map[string][]netip.Addr{"db.example": {
		netip.MustParseAddr("127.0.0.3"), netip.MustParseAddr("::1"), netip.MustParseAddr("127.0.0.2"),
		netip.MustParseAddr("::ffff:127.0.0.1"), netip.MustParseAddr("127.0.0.1"),
	}}}
	g.server.Backend = names
	g.permit(authz.Permit{Forward: []string{"127.0.0.0/30:*"}}) // decided by the function below
	var mu sync.Mutex
	asked := map[string]bool{}
	g.request(func(in authz.RequestInput) bool {
		mu.Lock()
		defer mu.Unlock()
		asked[in.Host+" "+in.Address] = true
		return in.Address == "127.0.0.1" || in.Address == "127.0.0.2"
	})
	c := g.dial("alice")
	nc, err := c.Dial("tcp", fmt.Sprintf("DB.Example.:%d", addr.Port()))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(nc, "x")
	io.ReadFull(nc, make([]byte, 1))
	nc.Close()
	c.Close()
	records := g.records()[0]
	open, forward := bodies[*auditlog.ChannelOpen](records)[0], bodies[*auditlog.Forward](records)[0]
	if !slices.Equal(open.Addresses, []string{"127.0.0.2", "127.0.0.1"}) || open.Target != fmt.Sprintf("db.example:%d", addr.Port()) {
		t.Errorf("open %+v", open)
	}
	if forward.Address != addr.String() || forward.Target != open.Target {
		t.Errorf("forward %+v", forward)
	}
	if names.asked.Load() != 1 {
		t.Errorf("the name was looked up %d times", names.asked.Load())
	}
	for _, q := range []string{"db.example ", "db.example 127.0.0.3", "db.example ::1", "db.example 127.0.0.2", "db.example 127.0.0.1"} {
		if !asked[q] {
			t.Errorf("policy was not asked about %q, but about %v", q, asked)
		}
	}
}

// Forwards count among the channels, and a sandbox that can't forward is said to be one.
func TestForwardLimits(t *testing.T) {
	t.Run("channels", func(t *testing.T) {
		g := newGate(t, func(c *Config) { c.MaxChannels = 3 })
		addr := service(t, "tcp", "127.0.0.1:0", echo)
		c := g.dial("alice")
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		var open []net.Conn
		for range 2 {
			nc, err := c.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, nc)
		}
		var refused *ssh.OpenChannelError
		if _, err := c.Dial("tcp", addr); !errors.As(err, &refused) || refused.Reason != ssh.ResourceShortage {
			t.Errorf("a fourth channel: %v", err)
		}
		if _, err := c.NewSession(); !errors.As(err, &refused) || refused.Reason != ssh.ResourceShortage {
			t.Errorf("a fourth channel: %v", err)
		}
		open[0].Close()
		eventually(t, "there is room again", func() bool {
			nc, err := c.Dial("tcp", addr)
			if err == nil {
				nc.Close()
			}
			return err == nil
		})
	})
	t.Run("listeners", func(t *testing.T) {
		g := newGate(t, nil)
		c := g.dial("alice")
		listening := 0
		for range backends.MaxListeners + 1 {
			if ok, _, err := c.SendRequest(typeListenTCP, true, ssh.Marshal(listenTCPMsg{"127.0.0.1", 0})); ok && err == nil {
				listening++
			}
		}
		if listening != backends.MaxListeners {
			t.Errorf("%d listeners, want %d", listening, backends.MaxListeners)
		}
	})
	t.Run("power", func(t *testing.T) {
		g := newGate(t, nil)
		g.server.Backend = powerless{g.backend}
		c := g.dial("alice")
		var refused *ssh.OpenChannelError
		if _, err := c.Dial("tcp", "127.0.0.1:1"); !errors.As(err, &refused) || !strings.Contains(refused.Message, "can't forward") {
			t.Errorf("dial: %v", err)
		}
		if ok, _, _ := c.SendRequest(typeListenTCP, true, ssh.Marshal(listenTCPMsg{"127.0.0.1", 0})); ok {
			t.Error("it listens")
		}
		s, _ := c.NewSession()
		if err := sshagent.RequestAgentForwarding(s); err != nil {
			t.Fatal(err)
		}
		var errOut bytes.Buffer
		s.Stderr = &errOut
		if err := s.Run("true"); err != nil || !strings.Contains(errOut.String(), "can't forward") {
			t.Errorf("session: %v, %q", err, errOut.String())
		}
		c.Close()
		records := g.records()[0]
		requests := bodies[*auditlog.Request](records)
		if r := requests[0]; r.OK || !strings.Contains(r.Reason, "can't forward") || r.Name != "127.0.0.1:0" {
			t.Errorf("request %+v", r)
		}
	})
	t.Run("no-more-sessions is about sessions", func(t *testing.T) {
		g := newGate(t, nil)
		addr := service(t, "tcp", "127.0.0.1:0", echo)
		c := g.dial("alice")
		c.SendRequest(noMoreSessions, false, nil)
		nc, err := c.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		nc.Close()
		if _, err := c.NewSession(); err == nil {
			t.Error("a session was opened after all")
		}
	})
}

// A client listens inside: each way to say where, the answer, the connections, the end.
func TestListen(t *testing.T) {
	for _, tc := range []struct {
		name, network, address string
		loopback6              bool
	}{
		{"localhost", "tcp", "localhost:0", true},
		{"IPv4", "tcp", "127.0.0.1:0", false},
		{"all", "tcp", ":0", false},
		{"all of IPv4", "tcp", "0.0.0.0:0", false},
		{"socket", "unix", filepath.Join(t.TempDir(), "s"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newGate(t, nil)
			c := g.dial("alice")
			channels := map[string]<-chan ssh.NewChannel{"tcp": c.HandleChannelOpen(typeForwardedTCP), "unix": c.HandleChannelOpen(typeForwardedUnix)}[tc.network]
			listen, cancel, payload, at := typeListenUnix, typeCancelUnix, ssh.Marshal(listenUnixMsg{tc.address}), tc.address
			if tc.network == "tcp" {
				host, _, _ := net.SplitHostPort(tc.address)
				listen, cancel, payload = typeListenTCP, typeCancelTCP, ssh.Marshal(listenTCPMsg{host, 0})
			}
			ok, answer, err := c.SendRequest(listen, true, payload)
			if !ok || err != nil {
				t.Fatal(ok, err)
			}
			var port uint32
			if tc.network == "tcp" {
				var m struct{ Port uint32 }
				if err := ssh.Unmarshal(answer, &m); err != nil || m.Port == 0 {
					t.Fatalf("answer %x", answer)
				}
				host, _, _ := net.SplitHostPort(tc.address)
				port, payload, at = m.Port, ssh.Marshal(listenTCPMsg{host, m.Port}), fmt.Sprintf("127.0.0.1:%d", m.Port)
			}
			inside, err := net.Dial(tc.network, at)
			if err != nil {
				t.Fatal(err)
			}
			defer inside.Close()
			nc := <-channels
			if tc.network == "tcp" {
				var m directTCPMsg
				host, _, _ := net.SplitHostPort(tc.address)
				from := inside.LocalAddr().(*net.TCPAddr)
				if err := ssh.Unmarshal(nc.ExtraData(), &m); err != nil || m != (directTCPMsg{host, port, "127.0.0.1", uint32(from.Port)}) {
					t.Errorf("channel %+v, %v", m, err)
				}
			} else {
				var m forwardedUnixMsg
				if err := ssh.Unmarshal(nc.ExtraData(), &m); err != nil || m.Path != tc.address {
					t.Errorf("channel %+v, %v", m, err)
				}
			}
			ch, reqs, err := nc.Accept()
			if err != nil {
				t.Fatal(err)
			}
			go ssh.DiscardRequests(reqs)
			io.WriteString(inside, "ping")
			b := make([]byte, 4)
			if _, err := io.ReadFull(ch, b); err != nil || string(b) != "ping" {
				t.Fatalf("%q, %v", b, err)
			}
			if tc.loopback6 {
				if six, err := net.Dial("tcp6", fmt.Sprintf("[::1]:%d", port)); err == nil {
					(<-channels).Reject(ssh.Prohibited, "no")
					if n, err := six.Read(b); n != 0 || err == nil {
						t.Errorf("a refused connection reads %d, %v", n, err)
					}
					six.Close()
				} else if _, err := net.Listen("tcp6", "[::1]:0"); err == nil {
					t.Error("it does not listen on ::1")
				}
			}
			if ok, _, _ := c.SendRequest(cancel, true, payload); !ok {
				t.Error("cancel was refused")
			}
			if nc, err := net.Dial(tc.network, at); err == nil {
				nc.Close()
				t.Error("it listens after the cancel")
			}
			if ok, _, _ := c.SendRequest(cancel, true, payload); ok {
				t.Error("a second cancel was accepted")
			}
			// The connection that was there goes on, half closed too.
			inside.(halfCloser).CloseWrite()
			if b, err := io.ReadAll(ch); len(b) != 0 || err != nil {
				t.Errorf("read %q, %v", b, err)
			}
			io.WriteString(ch, "pong")
			ch.CloseWrite()
			if b, err := io.ReadAll(inside); string(b) != "pong" || err != nil {
				t.Errorf("read %q, %v", b, err)
			}
			ch.Close()
			eventually(t, "the places are free", func() bool { return places(g) == 0 })
			c.Close()
			records := g.records()[0]
			request := bodies[*auditlog.Request](records)[0]
			if !request.OK || request.Type != listen || request.Name == "" || request.Value == "" {
				t.Errorf("request %+v", request)
			}
			forwards := bodies[*auditlog.Forward](records)
			end := slices.IndexFunc(forwards, func(f *auditlog.Forward) bool { return f.Type == listen })
			if end < 0 || forwards[end].Result != "ended" || forwards[end].Connections == 0 || forwards[end].Target != request.Name || forwards[end].Address != request.Value {
				t.Errorf("forwards %+v", forwards)
			}
			carried := slices.IndexFunc(forwards, func(f *auditlog.Forward) bool { return f.Input == 4 && f.Output == 4 && f.Result == "ended" })
			if carried < 0 || forwards[carried].Originator == "" {
				t.Errorf("forwards %+v", forwards)
			}
		})
	}
}

// What can't be listened on fails alone: by policy, in use, malformed. The log has why.
func TestListenRefused(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	g := newGate(t, nil)
	g.request(func(in authz.RequestInput) bool { return in.Port != 81 && in.Path != "/tmp/refused" })
	c := g.dial("alice")
	port := uint32(taken.Addr().(*net.TCPAddr).Port)
	var want []string
	for _, tc := range []struct {
		kind    string
		payload []byte
		reason  string
	}{
		{typeListenTCP, ssh.Marshal(listenTCPMsg{"127.0.0.1", 81}), "tcpip-forward is not permitted by profile debug"},
		{typeListenUnix, ssh.Marshal(listenUnixMsg{"/tmp/refused"}), "streamlocal-forward@openssh.com is not permitted"},
		{typeListenTCP, ssh.Marshal(listenTCPMsg{"127.0.0.1", port}), "address already in use"},
		{typeListenTCP, ssh.Marshal(listenTCPMsg{"some.name", 0}), "must be an IP address"},
		{typeListenTCP, ssh.Marshal(listenTCPMsg{"127.0.0.1", 65536}), "port 65536"},
		{typeListenTCP, []byte("junk"), "malformed"},
		{typeListenUnix, []byte("junk"), "malformed"},
		{typeListenUnix, ssh.Marshal(listenUnixMsg{"relative"}), "absolute"},
		{typeCancelTCP, ssh.Marshal(listenTCPMsg{"127.0.0.1", 1}), "nothing is listened on"},
		{typeCancelTCP, []byte("junk"), "malformed"},
		{typeCancelUnix, ssh.Marshal(listenUnixMsg{"/tmp/x"}), "nothing is listened on"},
	} {
		if ok, _, err := c.SendRequest(tc.kind, true, tc.payload); ok || err != nil {
			t.Errorf("%s %q: %v, %v", tc.kind, tc.payload, ok, err)
		}
		want = append(want, tc.reason)
	}
	if n := places(g); n != 0 {
		t.Errorf("%d places are taken", n)
	}
	c.Close()
	requests := bodies[*auditlog.Request](g.records()[0])
	for i, r := range requests {
		if r.OK || !strings.Contains(r.Reason, want[i]) {
			t.Errorf("request %+v, want %q", r, want[i])
		}
	}
	if len(requests) != len(want) {
		t.Errorf("%d requests in the log, want %d", len(requests), len(want))
	}
}

// late is a backend whose Start waits.
type late struct {
	backends.Backend
	go_ chan struct{}
}

func (l *late) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	select {
	case <-l.go_:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return l.Backend.Start(ctx, spec)
}

// Global requests are answered in their order; one that waits for the sandbox holds up nothing else, and no-more-sessions
// holds at once.
func TestListenWaits(t *testing.T) {
	g := newGate(t, func(c *Config) { c.MaxChannels = 4 * maxGlobal })
	slow := &late{g.backend, make(chan struct{})}
	g.server.Backend = slow
	c := g.dial("alice")
	var mu sync.Mutex
	var order []string
	var wg sync.WaitGroup
	send := func(name string, payload []byte) {
		sent := make(chan struct{})
		wg.Go(func() {
			close(sent)
			ok, _, err := c.SendRequest(name, true, payload) // x/crypto sends one at a time, in the order of its lock
			mu.Lock()
			defer mu.Unlock()
			order = append(order, fmt.Sprint(name, " ", ok, " ", err))
		})
		<-sent
	}
	send(typeListenTCP, ssh.Marshal(listenTCPMsg{"127.0.0.1", 0}))
	// Requests without an answer go past x/crypto's lock.
	for range 20 {
		c.SendRequest(typeListenTCP, false, []byte("junk"))
	}
	// Sessions open meanwhile, though their programs wait, and so do targets: more of them than the queues hold.
	if _, err := c.NewSession(); err != nil {
		t.Fatal(err)
	}
	target := service(t, "tcp", "127.0.0.1:0", echo)
	dialled := make(chan error, 3*maxGlobal)
	for range cap(dialled) {
		go func() {
			nc, err := c.Dial("tcp", target)
			if err == nil {
				nc.Close()
			}
			dialled <- err
		}()
	}
	eventually(t, "all of them are known", func() bool { return places(g) >= cap(dialled) })
	c.SendRequest(noMoreSessions, false, nil)
	if _, err := c.NewSession(); err == nil {
		t.Error("a session was opened after no-more-sessions")
	}
	close(slow.go_)
	wg.Wait()
	for range cap(dialled) {
		if err := <-dialled; err != nil {
			t.Error(err)
		}
	}
	if len(order) != 1 || order[0] != typeListenTCP+" true <nil>" {
		t.Errorf("answers %q", order)
	}
}

// A client that does not take a connection made inside leaves it no longer than offerTime, and the flood of others goes on.
func TestForwardUnanswered(t *testing.T) {
	defer func(d time.Duration) { offerTime = d }(offerTime)
	offerTime = 200 * time.Millisecond
	g := newGate(t, func(c *Config) { c.MaxChannels = 2 })
	c := g.dial("alice")
	channels := c.HandleChannelOpen(typeForwardedTCP) // nobody answers what comes here
	_, answer, err := c.SendRequest(typeListenTCP, true, ssh.Marshal(listenTCPMsg{"127.0.0.1", 0}))
	if err != nil {
		t.Fatal(err)
	}
	var m struct{ Port uint32 }
	ssh.Unmarshal(answer, &m)
	for range 3 { // the third finds no place
		nc, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", m.Port))
		if err != nil {
			t.Fatal(err)
		}
		nc.SetDeadline(time.Now().Add(20 * time.Second))
		if n, err := nc.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read %d, %v", n, err)
		}
		nc.Close()
	}
	// A late answer finds nobody: the channel is closed.
	ch, reqs, err := (<-channels).Accept()
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	if b, err := io.ReadAll(ch); len(b) != 0 || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
	ch.Close()
	c.Close()
	records := g.records()[0]
	failed, full := 0, 0
	for _, f := range bodies[*auditlog.Forward](records) {
		if f.Type == typeForwardedTCP && f.Result == "failed" && f.Detail == "the client did not answer" {
			failed++
		}
	}
	for _, o := range bodies[*auditlog.ChannelOpen](records) {
		if strings.Contains(o.Error, "2 channels are open") {
			full++
		}
	}
	if failed != 2 || full != 1 {
		t.Errorf("%d unanswered, %d without a place", failed, full)
	}
}

// The client's agent is reached from inside, as long as the session lasts.
func TestAgentForwarding(t *testing.T) {
	g := newGate(t, nil)
	c := g.dial("alice")
	keyring := sshagent.NewKeyring()
	if err := sshagent.ForwardToAgent(c, keyring); err != nil {
		t.Fatal(err)
	}
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := sshagent.RequestAgentForwarding(s); err != nil {
		t.Fatal(err)
	}
	if ok, _ := s.SendRequest(typeAgentRequest, true, nil); ok {
		t.Error("asked for twice")
	}
	in, _ := s.StdinPipe()
	out, _ := s.StdoutPipe()
	if err := s.Start(`echo "$SSH_AUTH_SOCK"; cat`); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 200)
	n, err := out.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	socket := strings.TrimSpace(string(line[:n]))
	if st, err := os.Stat(filepath.Dir(socket)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the socket's directory: %v, %v", st, err)
	}
	nc, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if keys, err := sshagent.NewClient(nc).List(); err != nil || len(keys) != 0 {
		t.Errorf("%v, %v", keys, err)
	}
	nc.Close()
	in.Close()
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
	eventually(t, "the socket is gone", func() bool { _, err := os.Stat(socket); return err != nil })
	c.Close()
	records := g.records()[0]
	forwards := bodies[*auditlog.Forward](records)
	if len(forwards) != 2 || forwards[0].Type != typeAgentChannel || forwards[0].Output == 0 || forwards[1].Type != typeAgentRequest ||
		forwards[1].Connections != 1 || forwards[1].Address != socket {
		t.Errorf("forwards %+v", forwards)
	}
	opens := bodies[*auditlog.ChannelOpen](records)
	if len(opens) != 2 || opens[1].Type != typeAgentChannel || opens[1].Session != 1 {
		t.Errorf("opens %+v", opens)
	}
}

// X11: a display inside leads to the client, once if it says so, and the log has no cookie.
func TestX11Forwarding(t *testing.T) {
	const cookie = "0123456789abcdef0123456789abcdef"
	g := newGate(t, nil)
	c := g.dial("alice")
	channels := c.HandleChannelOpen(typeX11Channel)
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []x11RequestMsg{
		{false, "", cookie, 0}, {false, "MIT MAGIC", cookie, 0}, {false, "MIT-MAGIC-COOKIE-1", "xyz", 0}, {false, "MIT-MAGIC-COOKIE-1", "", 0},
		{false, "MIT-MAGIC-COOKIE-1", cookie, 1 << 20}, {false, "MIT-MAGIC-COOKIE-1", strings.Repeat(cookie, 9), 0},
	} {
		if ok, _ := s.SendRequest(typeX11Request, true, ssh.Marshal(bad)); ok {
			t.Errorf("accepted %+v", bad)
		}
	}
	if ok, err := s.SendRequest(typeX11Request, true, ssh.Marshal(x11RequestMsg{true, "MIT-MAGIC-COOKIE-1", cookie, 0})); !ok {
		t.Fatal(err)
	}
	in, _ := s.StdinPipe()
	out, _ := s.StdoutPipe()
	if err := s.Start(`echo "$DISPLAY"; cat`); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 200)
	n, err := out.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	var display int
	text := string(line[:n])
	if _, err := fmt.Sscanf(text[strings.IndexByte(text, ':')+1:], "%d", &display); err != nil || display < 10 {
		t.Fatalf("DISPLAY %q, %v", text, err)
	}
	at := fmt.Sprintf("127.0.0.1:%d", 6000+display)
	nc, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	ch, reqs, err := (<-channels).Accept()
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	io.WriteString(nc, "l")
	if _, err := io.ReadFull(ch, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	eventually(t, "it listens no more", func() bool {
		second, err := net.Dial("tcp", at)
		if err == nil {
			second.Close()
		}
		return err != nil
	})
	ch.Close()
	in.Close()
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
	c.Close()
	records := g.records()[0]
	for _, r := range records {
		if text := fmt.Sprintf("%q", r.Body); strings.Contains(text, cookie[:16]) || strings.Contains(text, `\x01#Eg`) {
			t.Errorf("the cookie is in the log: %+v", r.Body)
		}
	}
	for _, f := range bodies[*auditlog.Forward](records) {
		if f.Type == typeX11Request && (f.Result != "ended" || f.Connections != 1 || f.Address != at) {
			t.Errorf("forward %+v", f)
		}
	}
}

// A change of policy ends what it does not permit any more, says so in the log, and leaves the rest.
func TestForwardNarrowed(t *testing.T) {
	g := newGate(t, nil)
	kept, cut := service(t, "tcp", "127.0.0.1:0", echo), service(t, "tcp", "127.0.0.1:0", echo)
	cutPort := netip.MustParseAddrPort(cut).Port()
	c := g.dial("alice")
	a, err := c.Dial("tcp", kept)
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.Dial("tcp", cut)
	if err != nil {
		t.Fatal(err)
	}
	l, err := c.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listened := l.Addr().String()
	inside, err := net.Dial("tcp", listened)
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	taken, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(inside, "x")
	if _, err := io.ReadFull(taken, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	// One whose listener has gone meanwhile is asked about as well.
	gone, err := c.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	orphan, err := net.Dial("tcp", gone.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer orphan.Close()
	left, err := gone.Accept()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(orphan, "x")
	if _, err := io.ReadFull(left, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	gone.Close()
	g.request(func(in authz.RequestInput) bool { return in.Type != typeListenTCP && in.Port != cutPort })
	for name, nc := range map[string]net.Conn{"direct": b, "forwarded": taken, "orphan": left} {
		if rest, err := io.ReadAll(nc); len(rest) != 0 || err != nil {
			t.Errorf("%s: read %q, %v", name, rest, err)
		}
		nc.Close()
	}
	eventually(t, "it listens no more", func() bool {
		nc, err := net.Dial("tcp", listened)
		if err == nil {
			nc.Close()
		}
		return err != nil
	})
	io.WriteString(a, "x")
	if _, err := io.ReadFull(a, make([]byte, 1)); err != nil {
		t.Errorf("what is permitted: %v", err)
	}
	a.Close()
	eventually(t, "the places are free", func() bool { return places(g) == 0 })
	c.Close()
	cuts := 0
	for _, f := range bodies[*auditlog.Forward](g.records()[0]) {
		switch {
		case f.Target == kept && f.Result == "ended":
		case f.Result == "cut-off" && strings.Contains(f.Detail, "policy has changed: "):
			cuts++
		case f.Type == typeForwardedTCP: // the test's own attempts
		case f.Type == typeListenTCP && f.Detail == "the client cancelled it":
		default:
			t.Errorf("forward %+v", f)
		}
	}
	if cuts != 4 {
		t.Errorf("%d were cut off, want 4", cuts)
	}
}

// Content is recorded where the profile says so, as far as its limit, before it passes.
func TestForwardContent(t *testing.T) {
	g := newGate(t, nil)
	g.permit(authz.Permit{ForwardContent: "full", DataLimit: "10"})
	addr := service(t, "tcp", "127.0.0.1:0", echo)
	c := g.dial("alice")
	nc, err := c.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(nc, "0123456789more")
	nc.(halfCloser).CloseWrite()
	io.ReadAll(nc)
	nc.Close()
	eventually(t, "the place is free", func() bool { return places(g) == 0 })
	c.Close()
	records := g.records()[0]
	var streams [2]string
	for _, d := range bodies[*auditlog.Data](records) {
		streams[d.Stream] += string(d.Data)
	}
	rests := bodies[*auditlog.DataRest](records)
	if streams[0] != "0123456789" || streams[1] != "0123456789" || len(rests) != 4 {
		t.Errorf("data %q, rests %+v", streams, rests)
	}
	sum := sha256.Sum256([]byte("0123456789more"))
	for _, r := range rests {
		if r.End && (r.Bytes != 14 || !bytes.Equal(r.SHA256, sum[:])) {
			t.Errorf("rest %+v", r)
		}
	}
}

// A sandbox that ends, and a connection that ends, leave nothing and are in the log.
func TestForwardLost(t *testing.T) {
	g := newGate(t, nil)
	addr := service(t, "tcp", "127.0.0.1:0", func(nc net.Conn) {
		io.WriteString(nc, "x")
		io.Copy(io.Discard, nc)
	})
	c := g.dial("alice")
	nc, err := c.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	io.ReadFull(nc, make([]byte, 1))
	if _, err := c.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	forwards := bodies[*auditlog.Forward](g.records()[0])
	if len(forwards) != 2 {
		t.Fatalf("forwards %+v", forwards)
	}
	for _, f := range forwards {
		if f.Result != "cut-off" || f.Detail == "" {
			t.Errorf("forward %+v", f)
		}
	}
}

// FuzzForwardMessages: whatever a client or a sandbox sends is decoded or refused, and what is accepted is in bounds.
func FuzzForwardMessages(f *testing.F) {
	f.Add(ssh.Marshal(directTCPMsg{"db.example", 5432, "127.0.0.1", 1}))
	f.Add(ssh.Marshal(directTCPMsg{"[::ffff:10.0.0.1]", 5432, "", 0}))
	f.Add(ssh.Marshal(directUnixMsg{"/run/s", "", 0}))
	f.Add(ssh.Marshal(listenTCPMsg{"localhost", 0}))
	f.Add(ssh.Marshal(listenUnixMsg{"/tmp/s"}))
	f.Add(ssh.Marshal(x11RequestMsg{true, "MIT-MAGIC-COOKIE-1", "0011", 0}))
	f.Fuzz(func(t *testing.T, payload []byte) {
		if q, _, err := parseDirectTCP(payload); err == nil {
			if q.Port == 0 || (q.Host == "") == (q.Address == "") || len(q.Host) > maxHost || strings.ToLower(q.Host) != q.Host {
				t.Errorf("%+v", q)
			}
			if a, err := netip.ParseAddr(q.Address); q.Address != "" && (err != nil || a.Is4In6() || a.Zone() != "") {
				t.Errorf("%+v", q)
			}
		}
		if q, err := parseDirectUnix(payload); err == nil && (!filepath.IsAbs(q.Path) || filepath.Clean(q.Path) != q.Path || strings.ContainsRune(q.Path, 0)) {
			t.Errorf("%+v", q)
		}
		for _, parse := range []func([]byte) (listenRequest, error){parseListenTCP, parseListenUnix} {
			if l, err := parse(payload); err == nil {
				if qs, err := l.questions(); err != nil || len(qs) == 0 || len(qs) > 2 {
					t.Errorf("%+v: %+v, %v", l, qs, err)
				}
			}
		}
		if x, _, err := parseX11(payload); err == nil && (len(x.Cookie) == 0 || len(x.Cookie) > maxX11Cookie || strings.ContainsAny(x.Protocol, "\x00\n ")) {
			t.Errorf("%+v", x)
		}
	})
}

// unhurried is a sandbox whose listeners take their time.
type unhurried struct{ backends.Backend }

type unhurriedSandbox struct {
	backends.Sandbox
	backends.Dialer
	backends.Listener
}

func (b unhurried) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	s, err := b.Backend.Start(ctx, spec)
	if err != nil {
		return nil, err
	}
	return &unhurriedSandbox{s, s.(backends.Dialer), s.(backends.Listener)}, nil
}

func (s *unhurriedSandbox) Listen(ctx context.Context, network, addr string) (net.Listener, error) {
	time.Sleep(200 * time.Millisecond)
	return s.Listener.Listen(ctx, network, addr)
}

// A session that the client opens after it has asked for a listener is opened after that is there.
func TestListenBeforeSession(t *testing.T) {
	g := newGate(t, nil)
	g.server.Backend = unhurried{g.backend}
	c := g.dial("alice")
	path := filepath.Join(t.TempDir(), "s")
	if _, _, err := c.SendRequest(typeListenUnix, false, ssh.Marshal(listenUnixMsg{path})); err != nil {
		t.Fatal(err)
	}
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Run("test -S " + path); err != nil {
		t.Errorf("the listener was not there: %v", err)
	}
	// A target may be one of the client's own listeners, too.
	channels := c.HandleChannelOpen(typeForwardedUnix)
	go func() {
		for nc := range channels {
			nc.Reject(ssh.Prohibited, "seen")
		}
	}()
	path += "2"
	if _, _, err := c.SendRequest(typeListenUnix, false, ssh.Marshal(listenUnixMsg{path})); err != nil {
		t.Fatal(err)
	}
	nc, err := c.Dial("unix", path)
	if err != nil {
		t.Fatalf("the listener was not there: %v", err)
	}
	nc.Close()
}
