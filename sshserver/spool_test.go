package sshserver

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
)

// awayStore refuses all until it is back.
type awayStore struct {
	auditlog.Store
	back atomic.Bool
}

func (s *awayStore) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if !s.back.Load() {
		return errors.New("store is away")
	}
	return s.Store.Put(ctx, name, r, size)
}

// syncBuffer is a buffer that is read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}
func (b *syncBuffer) String() string { b.mu.Lock(); defer b.mu.Unlock(); return b.b.String() }

// The store is away for so long that the spool reaches its limit: the sessions that pass anything end with a message, on the
// terminal as on standard error, and are counted; readiness says why, and a login is refused with the reason. When the store is
// back, logins are served, and the logs of those that ended are whole and say how they ended.
func TestSpoolLimit(t *testing.T) {
	store := &awayStore{}
	g := newGateOn(t, nil, func(c *auditlog.Config, s auditlog.Store) auditlog.Store {
		c.SpoolLimit, c.SegmentBytes, c.Codec, c.SegmentAge = 1<<20, 64<<10, "none", 100*time.Millisecond
		store.Store = s
		return store
	})
	const text = "this session ends: the session can't be recorded any more and ends"
	terminal, plain := &syncBuffer{}, &syncBuffer{}
	ended := make(chan error, 2)
	var begin []io.Writer
	for _, pty := range []bool{true, false} {
		s, err := g.dial("alice").NewSession()
		if err != nil {
			t.Fatal(err)
		}
		s.Stderr = plain
		if pty {
			s.Stdout = terminal
			if err := s.RequestPty("xterm", 24, 80, ssh.TerminalModes{}); err != nil {
				t.Fatal(err)
			}
		}
		in, err := s.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		begin = append(begin, in)
		if !pty {
			s.Stdout = plain
		}
		if err := s.Start("echo begun; read go; while :; do echo 0123456789012345678901234567890123456789012345678901234567890123456789; done"); err != nil {
			t.Fatal(err)
		}
		go func() { ended <- s.Wait() }()
	}
	// Both run before one fills the spool.
	until(t, func() bool {
		return strings.Contains(terminal.String(), "begun") && strings.Contains(plain.String(), "begun")
	})
	for _, in := range begin {
		io.WriteString(in, "\n")
	}
	for range 2 {
		select {
		case err := <-ended:
			if err == nil {
				t.Error("a session that could not be recorded ended well")
			}
		case <-time.After(2 * time.Minute):
			t.Fatal("a session goes on without its log")
		}
	}
	if !strings.Contains(terminal.String(), text) || !strings.Contains(plain.String(), text) {
		t.Errorf("the terminal has %q at its end, standard error %q", terminal.String()[max(0, len(terminal.String())-200):], plain.String())
	}
	if err := g.log.Ready(); !errors.Is(err, auditlog.ErrSpoolLimit) {
		t.Errorf("ready: %v", err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(g.server.Metrics.ended)
	until(t, func() bool {
		families, err := registry.Gather()
		if err != nil || len(families) != 1 {
			return false
		}
		for _, m := range families[0].GetMetric() {
			if m.GetLabel()[0].GetValue() == "audit-lost" {
				return m.GetCounter().GetValue() == 2
			}
		}
		return false
	})
	var banner string
	cfg := g.config("alice")
	cfg.BannerCallback = func(m string) error { banner += m; return nil }
	if c, err := ssh.Dial("tcp", g.addr, cfg); err == nil {
		c.Close()
		t.Error("a login while nothing can be recorded")
	}
	if !strings.Contains(banner, "sessions can't be recorded at the moment") {
		t.Errorf("banner %q", banner)
	}

	store.back.Store(true)
	until(t, func() bool { return g.log.Ready() == nil })
	s, err := g.dial("alice").NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := s.Output("echo again"); err != nil || string(out) != "again\n" {
		t.Errorf("%q %v", out, err)
	}
	lost := 0
	for _, records := range g.records() {
		if bodies[*auditlog.End](records)[0].Cause == "audit-lost" {
			lost++
		}
	}
	if lost != 2 {
		t.Errorf("%d logs end with audit-lost", lost)
	}
}

func until(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within 2 minutes")
		}
	}
}
