package sshserver

import (
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
)

// fromConn is a connection that comes from elsewhere.
type fromConn struct {
	net.Conn
	from net.Addr
}

func (c fromConn) RemoteAddr() net.Addr { return c.from }

// from is the address of a client as net gives it; an IPv4 address is one of 16 bytes, as on a socket for both.
func from(address string) net.Addr {
	a := netip.MustParseAddr(address)
	b := a.As16()
	return &net.TCPAddr{IP: b[:], Port: 50000, Zone: a.Zone()}
}

func TestSourceOf(t *testing.T) {
	for _, tc := range []struct{ from, source, network string }{
		{"192.0.2.1", "192.0.2.1", "192.0.2.1"},
		{"::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1"},
		{"127.0.0.1", "127.0.0.1", "127.0.0.1"},
		{"2001:db8:0:1::1", "2001:db8:0:1::1", "2001:db8:0:1::"},
		{"2001:db8:0:1:ffff:ffff:ffff:ffff", "2001:db8:0:1:ffff:ffff:ffff:ffff", "2001:db8:0:1::"},
		{"2001:db8:0:2::1", "2001:db8:0:2::1", "2001:db8:0:2::"},
		{"fe80::1%lo", "fe80::1%lo", "fe80::"},
		{"::1", "::1", "::1"},
	} {
		got := sourceOf(fromConn{from: from(tc.from)})
		if got.String() != tc.source || network(got).String() != tc.network {
			t.Errorf("%s: source %s, counted as %s; want %s, %s", tc.from, got, network(got), tc.source, tc.network)
		}
	}
	if a := sourceOf(fromConn{from: &net.UnixAddr{}}); a.IsValid() || network(a).IsValid() {
		t.Errorf("no IP address: %s", a)
	}
}

// Whoever has a network of IPv6 addresses has no more connections that don't authenticate than who has one address.
func TestLimitPerNetwork(t *testing.T) {
	g := newGate(t, func(c *Config) { c.MaxStartupsPerSource = 3 })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	// connect says what the gate says first to a client that comes from there and stays.
	connect := func(address string) string {
		t.Helper()
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		g.server.take(fromConn{server, from(address)})
		client.SetDeadline(time.Now().Add(20 * time.Second))
		said := make([]byte, 9)
		if _, err := io.ReadFull(client, said); err != nil {
			t.Fatal(err)
		}
		return string(said)
	}
	for _, tc := range []struct {
		address string
		busy    bool
	}{
		{"2001:db8:0:1::1", false}, {"2001:db8:0:1::2", false}, {"2001:db8:0:1:8000::", false},
		{"2001:db8:0:1::3", true}, {"2001:db8:0:1:ffff::", true},
		{"2001:db8:0:2::1", false},
		{"192.0.2.1", false}, {"::ffff:192.0.2.1", false}, {"192.0.2.1", false},
		{"::ffff:192.0.2.1", true}, {"192.0.2.1", true},
		{"192.0.2.2", false}, {"::ffff:198.51.100.1", false},
	} {
		if said := connect(tc.address); strings.HasPrefix(said, "sallyport") != tc.busy {
			t.Errorf("from %s: %q, want busy %v", tc.address, said, tc.busy)
		}
	}
}

// A gate that listens for both has IPv4 clients as such, and IPv6 clients by their own address.
func TestBothFamilies(t *testing.T) {
	if l, err := net.Listen("tcp6", "[::1]:0"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("this machine has no IPv6 loopback, and CI is set: ", err)
		}
		t.Skip("NOT TESTED: this machine has no IPv6 loopback: ", err)
	} else {
		l.Close()
	}
	for _, tc := range []struct{ listen, dial, source, record string }{
		{"[::1]:0", "::1", "::1", "[::1]:"},
		{":0", "::1", "::1", "[::1]:"},
		{":0", "127.0.0.1", "127.0.0.1", "127.0.0.1:"},
	} {
		t.Run(tc.listen+" "+tc.dial, func(t *testing.T) {
			g := newGate(t, func(c *Config) { c.Listen = tc.listen })
			inner := g.rules.login
			var asked []string
			g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
				asked = append(asked, in.Source)
				return inner(in)
			}
			_, port, err := net.SplitHostPort(g.addr)
			if err != nil {
				t.Fatal(err)
			}
			c, err := ssh.Dial("tcp", net.JoinHostPort(tc.dial, port), g.config("alice"))
			if err != nil {
				t.Fatal(err)
			}
			s, err := c.NewSession()
			if err != nil {
				t.Fatal(err)
			}
			if out, err := s.Output("echo served"); err != nil || string(out) != "served\n" {
				t.Errorf("%q, %v", out, err)
			}
			c.Close()
			g.ended(t)
			rec := bodies[*auditlog.Connect](g.records()[0])
			if len(rec) != 1 || !strings.HasPrefix(rec[0].Source, tc.record) {
				t.Errorf("recorded %+v, want %s", rec, tc.record)
			}
			for _, source := range asked {
				if source != tc.source {
					t.Errorf("policy was asked about %s", source)
				}
			}
			if len(asked) == 0 {
				t.Error("policy was not asked")
			}
		})
	}
}
