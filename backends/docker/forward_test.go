package docker

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/network"

	"github.com/sallyport/sallyport/backends"
)

// soon gives a context that ends when a test has taken too long.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(stop)
	return ctx
}

func listenInside(t *testing.T, s *sandbox, network, address string) net.Listener {
	t.Helper()
	l, err := s.Listen(soon(t), network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// TestForwardPrograms has real programs at the inner end.
func TestForwardPrograms(t *testing.T) {
	s := startSandbox(t, newBackend(t, nil), newSpec(busyboxImage))
	l := listenInside(t, s, "tcp", "127.0.0.1:0")
	answered := make(chan string, 1)
	go func() {
		answered <- sh(t, s, fmt.Sprintf("echo question | nc 127.0.0.1 %d", l.Addr().(*net.TCPAddr).Port))
	}()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "answer\n")
	b := make([]byte, 9)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "question\n" {
		t.Errorf("%q, %v", b, err)
	}
	c.Close()
	if got := <-answered; got != "answer\n" {
		t.Errorf("%q", got)
	}
	serving := make(chan string, 1)
	go func() { serving <- sh(t, s, "nc -l -p 4711 -e /bin/cat") }()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err = s.DialContext(soon(t), "tcp", "127.0.0.1:4711")
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	defer c.Close()
	go func() {
		io.Copy(c, strings.NewReader(strings.Repeat("x", 1<<20)))
		c.(backends.HalfCloser).CloseWrite()
	}()
	if b, err := io.ReadAll(c); len(b) != 1<<20 || err != nil {
		t.Errorf("%d bytes back, %v", len(b), err)
	}
	if got := <-serving; got != "" {
		t.Errorf("%q", got)
	}
}

// TestForwardToNeighbour resolves and dials a container of the same network by its name.
func TestForwardToNeighbour(t *testing.T) {
	engine := requireEngine(t)
	ctx := context.Background()
	name := "sallyport-test-" + rand.Text()
	created, err := engine.NetworkCreate(ctx, name, network.CreateOptions{Driver: "bridge", Internal: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := engine.NetworkRemove(ctx, created.ID); err != nil {
			t.Error(err)
		}
	})
	b := newBackend(t, func(c *Config) { c.Networks = []string{name} })
	var both [2]*sandbox
	for i := range both {
		spec := newSpec(busyboxImage)
		spec.Template.Network = name
		both[i] = startSandbox(t, b, spec)
	}
	l := listenInside(t, both[1], "tcp", ":0")
	addresses, err := both[0].Resolve(soon(t), namePrefix+both[1].session)
	if err != nil || len(addresses) != 1 {
		t.Fatalf("%v, %v", addresses, err)
	}
	target := net.JoinHostPort(addresses[0].String(), strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	near, err := both[0].DialContext(soon(t), "tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	own, err := both[1].Resolve(soon(t), namePrefix+both[0].session)
	if err != nil || len(own) != 1 {
		t.Fatalf("%v, %v", own, err)
	}
	if from := far.RemoteAddr().(*net.TCPAddr); !from.IP.Equal(own[0].AsSlice()) {
		t.Errorf("originator %v, not %v", from, own)
	}
	io.WriteString(near, "hello")
	near.(backends.HalfCloser).CloseWrite()
	if b, err := io.ReadAll(far); string(b) != "hello" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// TestForwardWithoutShell forwards in an image that has no file but a program.
func TestForwardWithoutShell(t *testing.T) {
	s := startSandbox(t, newBackend(t, nil), newSpec(scratchImage))
	if got, err := s.Resolve(soon(t), "localhost"); err != nil || got[0].String() != "127.0.0.1" {
		t.Errorf("%v, %v", got, err)
	}
	for network, address := range map[string]string{"tcp": "127.0.0.1:0", "unix": ""} {
		l := listenInside(t, s, network, address)
		c, err := s.DialContext(soon(t), network, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

// TestForwardAttacks has the session's user work against the agent that forwards.
func TestForwardAttacks(t *testing.T) {
	b := newBackend(t, nil)
	spec := newSpec(busyboxImage)
	spec.Template.Memory, spec.Template.PIDs = 128<<20, 64
	s := startSandbox(t, b, spec)
	attack := func(line string) func() {
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			s.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: line})
		}()
		return func() {
			stop()
			<-ended
		}
	}
	alive := func(what string) {
		t.Helper()
		if got := sh(t, s, "echo lives"); got != "lives\n" {
			t.Errorf("%s: %q", what, got)
		}
	}

	t.Run("links", func(t *testing.T) {
		end := attack("mkdir /tmp/d; while :; do ln -sfn /.sallyport/run /tmp/l; ln -sfn /tmp/d /tmp/l; done")
		defer end()
		made := 0
		for until := time.Now().Add(2 * time.Second); time.Now().Before(until); {
			if l, err := s.Listen(soon(t), "unix", "/tmp/l/x"); err == nil {
				made++
				if c, err := s.DialContext(soon(t), "unix", "/tmp/d/x"); err != nil {
					t.Errorf("a socket that is elsewhere: %v", err)
				} else {
					c.Close()
				}
				l.Close()
			}
			if files, err := os.ReadDir(s.path(runDir)); err != nil || len(files) > 0 {
				t.Fatalf("%v, %v", files, err)
			}
		}
		if made == 0 {
			t.Error("never listened")
		}
		alive("links")
	})
	t.Run("flood", func(t *testing.T) {
		l := listenInside(t, s, "tcp", "127.0.0.1:0")
		end := attack(fmt.Sprintf("for i in 1 2 3 4; do while :; do nc 127.0.0.1 %d </dev/null >/dev/null 2>&1 & sleep 0.01; done & done; wait",
			l.Addr().(*net.TCPAddr).Port))
		for range 200 {
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
		end()
		alive("flood")
	})
	t.Run("processes", func(t *testing.T) {
		end := attack("f() { f | f & }; f; sleep 1000")
		time.Sleep(500 * time.Millisecond)
		for range 50 {
			if l, err := s.Listen(soon(t), "tcp", "127.0.0.1:0"); err != nil {
				t.Error(err)
			} else {
				if c, err := s.DialContext(soon(t), "tcp", l.Addr().String()); err != nil {
					t.Error(err)
				} else {
					c.Close()
				}
				l.Close()
			}
			s.DialContext(soon(t), "unix", "/tmp/nothing")
			s.Resolve(soon(t), "nosuch.onion")
		}
		end()
		alive("processes")
	})
	t.Run("memory", func(t *testing.T) {
		l := listenInside(t, s, "unix", "") // whose sockets hold less in the kernel: it is the agent that is to be filled
		var all sync.WaitGroup
		fill := func(c net.Conn) {
			all.Go(func() {
				for {
					c.SetWriteDeadline(time.Now().Add(2 * time.Second))
					if _, err := c.Write(make([]byte, 32<<10)); err != nil {
						return
					}
				}
			})
		}
		accepted := make(chan []net.Conn)
		go func() {
			var conns []net.Conn
			for {
				c, err := l.Accept()
				if err != nil {
					accepted <- conns
					return
				}
				conns = append(conns, c)
				fill(c)
			}
		}()
		made := 0
		for range 100 { // each is two of the agent's
			c, err := s.DialContext(soon(t), "unix", l.Addr().String())
			if err != nil {
				if !strings.Contains(err.Error(), "too many connections") {
					t.Error(err)
				}
				break
			}
			defer c.Close()
			made++
			fill(c)
		}
		all.Wait()
		l.Close()
		for _, c := range <-accepted {
			defer c.Close()
		}
		t.Logf("%d connections: %s", made, sh(t, s, "grep -E 'VmRSS|VmHWM' /proc/1/status"))
		if made < 32 {
			t.Errorf("only %d connections", made)
		}
		alive("memory")
	})
	if err := s.client.Err(); err != nil {
		t.Error(err)
	}
}
