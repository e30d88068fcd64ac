package sshserver

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/agent"
	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends/backendtest"
)

func TestMain(m *testing.M) {
	agent.RunChild()
	if config := os.Getenv(stalledClientEnv); config != "" {
		os.Exit(stalledClient(config))
	}
	goleak.VerifyTestMain(m)
}

// rules is a policy in Go: the real one has its own tests, and the end-to-end scripts use it.
type rules struct {
	mu      sync.Mutex
	keys    map[string]string // user to authorized_keys line
	login   func(authz.LoginInput) (authz.Login, error)
	request func(authz.RequestInput) (authz.Verdict, error)
	subs    map[chan struct{}]bool
}

func (r *rules) Offer(_ context.Context, in authz.OfferInput) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.keys[in.User] == in.Key.Line, nil
}

func (r *rules) Login(_ context.Context, in authz.LoginInput) (authz.Login, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.login(in)
}

func (r *rules) Request(_ context.Context, in authz.RequestInput) (authz.Verdict, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.request(in)
}

func (r *rules) Subscribe() (<-chan struct{}, func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ch := make(chan struct{}, 1)
	r.subs[ch] = true
	return ch, func() { r.mu.Lock(); defer r.mu.Unlock(); delete(r.subs, ch) }
}

// change changes the policy and tells the subscribers.
func (r *rules) change(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	for ch := range r.subs {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

// gate is a real server with the real log and the real agent, without containers.
type gate struct {
	t       *testing.T
	server  *Server
	backend *backendtest.Memory
	rules   *rules
	addr    string
	dir     string
	host    ssh.PublicKey
	key     ssh.Signer
	log     *auditlog.Log
	served  chan error
	stopped bool
}

func newGate(t *testing.T, change func(*Config)) *gate { t.Helper(); return newGateOn(t, change, nil) }

// newGateOn makes a gate whose log is as logs says.
func newGateOn(t *testing.T, change func(*Config), logs func(*auditlog.Config, auditlog.Store) auditlog.Store) *gate {
	t.Helper()
	newKey := func() ssh.Signer {
		_, k, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		s, err := ssh.NewSignerFromKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	g := &gate{t: t, dir: t.TempDir(), key: newKey(), backend: backendtest.NewMemory(), served: make(chan error, 1)}
	g.rules = &rules{
		keys: map[string]string{"alice": authzKey(g.key.PublicKey()).Line}, subs: map[chan struct{}]bool{},
		login: func(in authz.LoginInput) (authz.Login, error) {
			return authz.Login{
				Allow: true, Ticket: "OPS-1", Profile: "debug", NotAfter: time.Now().Add(time.Hour), Why: "a test",
				Sandbox: authz.Sandbox{Image: "none"}, ID: "d", Revision: "r",
			}, nil
		},
		request: func(authz.RequestInput) (authz.Verdict, error) { return authz.Verdict{Allow: true}, nil },
	}
	var store auditlog.Store
	store, err := file.NewStore(filepath.Join(g.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	logConfig := auditlog.Config{Spool: filepath.Join(g.dir, "spool")}
	if logs != nil {
		store = logs(&logConfig, store)
	}
	_, logKey, _ := ed25519.GenerateKey(rand.Reader)
	quiet := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	g.log, err = auditlog.Open(t.Context(), logConfig, logKey, store, "gate", quiet)
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Listen, cfg.DrainTime = "127.0.0.1:0", 0
	if change != nil {
		change(&cfg)
	}
	hostKey := newKey()
	g.host = hostKey.PublicKey()
	g.server, err = New(Options{
		Config: cfg, Gate: "gate", Version: "test", HostKeys: []ssh.Signer{hostKey}, Policy: g.rules, Backend: g.backend,
		Log: g.log, Slog: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		t.Fatal(err)
	}
	g.addr = l.Addr().String()
	go func() { g.served <- g.server.Serve(l) }()
	t.Cleanup(g.stop)
	return g
}

// stop shuts the gate down and looks at what is left.
func (g *gate) stop() {
	if g.stopped {
		return
	}
	g.stopped = true
	g.server.Shutdown(context.Background())
	if err := <-g.served; err != nil {
		g.t.Errorf("Serve: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := g.log.Close(ctx); err != nil {
		g.t.Errorf("log: %v", err)
	}
	if n := g.backend.Running(); n != 0 {
		g.t.Errorf("%d sandboxes are left", n)
	}
	g.server.mu.Lock()
	defer g.server.mu.Unlock()
	if len(g.server.conns) != 0 || len(g.server.users) != 0 || len(g.server.startups) != 0 || g.server.unproven != 0 {
		g.t.Errorf("left: %d connections, users %v, startups %v, unproven %d", len(g.server.conns), g.server.users, g.server.startups, g.server.unproven)
	}
}

func (g *gate) config(user string) *ssh.ClientConfig {
	return &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(g.key)}, HostKeyCallback: ssh.FixedHostKey(g.host),
		Timeout: 20 * time.Second,
	}
}

func (g *gate) dial(user string) *ssh.Client {
	g.t.Helper()
	c, err := ssh.Dial("tcp", g.addr, g.config(user))
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	return c
}

// records stops the gate and reads everything in its store; sessions in order of their IDs.
func (g *gate) records() [][]auditlog.Record {
	g.t.Helper()
	g.stop()
	src, err := file.OpenSource(filepath.Join(g.dir, "log"))
	if err != nil {
		g.t.Fatal(err)
	}
	defer src.Close()
	var all [][]auditlog.Record
	for log, err := range auditlog.Logs(context.Background(), src, auditlog.SessionPrefix) {
		if err != nil {
			g.t.Fatal(err)
		}
		all = append(all, readLog(g.t, src, log))
	}
	return all
}

func (g *gate) cause() string {
	g.t.Helper()
	all := g.records()
	if len(all) != 1 {
		g.t.Fatalf("%d sessions in the log, want one", len(all))
	}
	last := all[0][len(all[0])-1]
	end, ok := last.Body.(*auditlog.End)
	if !ok {
		g.t.Fatalf("the last record is %T", last.Body)
	}
	return end.Cause
}

func bodies[T auditlog.Body](records []auditlog.Record) (found []T) {
	for _, r := range records {
		if b, ok := r.Body.(T); ok {
			found = append(found, b)
		}
	}
	return found
}

func TestExec(t *testing.T) {
	g := newGate(t, nil)
	c := g.dial("alice")
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var out, errOut bytes.Buffer
	s.Stdout, s.Stderr, s.Stdin = &out, &errOut, strings.NewReader("input")
	err = s.Run("cat; echo err >&2; exit 7")
	var exit *ssh.ExitError
	if !errors.As(err, &exit) || exit.ExitStatus() != 7 || out.String() != "input" || errOut.String() != "err\n" {
		t.Fatalf("err %v, stdout %q, stderr %q", err, out.String(), errOut.String())
	}
	s, _ = c.NewSession()
	err = s.Run("kill -TERM $$")
	if !errors.As(err, &exit) || exit.Signal() != "TERM" {
		t.Errorf("err %v, want the signal TERM", err)
	}
	c.Close()
	all := g.records()
	if len(all) != 1 {
		t.Fatalf("%d sessions, want 1", len(all))
	}
	var kinds []auditlog.Kind
	for i, r := range all[0] {
		if r.Sequence != uint64(i) {
			t.Errorf("record %d has sequence %d", i, r.Sequence)
		}
		if r.Channel == 0 || r.Channel == 1 && r.Body.Kind() != auditlog.KindData {
			kinds = append(kinds, r.Body.Kind())
		}
	}
	for _, k := range []auditlog.Kind{
		auditlog.KindConnect, auditlog.KindHandshake, auditlog.KindAuthenticate, auditlog.KindDecision, auditlog.KindSandbox,
		auditlog.KindChannelOpen, auditlog.KindRequest, auditlog.KindExit, auditlog.KindChannelClose, auditlog.KindEnd,
	} {
		if !slices.Contains(kinds, k) {
			t.Errorf("no record of kind %v", k)
		}
	}
	if kinds[0] != auditlog.KindConnect || kinds[len(kinds)-1] != auditlog.KindEnd {
		t.Errorf("kinds %v: want connect first and end last", kinds)
	}
}

// What was recorded is what was passed: many channels at once, both ways, bulk and dribble.
func TestBytes(t *testing.T) {
	g := newGate(t, nil)
	c := g.dial("alice")
	type sums struct{ in, out [32]byte }
	const channels = 6
	want := make([]sums, channels)
	var wg sync.WaitGroup
	for i := range channels {
		s, err := c.NewSession() // opened in order: channel i+1
		if err != nil {
			t.Fatal(err)
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			data := make([]byte, 3<<20)
			src := mrand.NewChaCha8([32]byte{byte(i)})
			src.Read(data)
			if i%2 == 1 {
				data = data[:4000]
			}
			var out bytes.Buffer
			s.Stdout = &out
			in, _ := s.StdinPipe()
			if err := s.Start("cat"); err != nil {
				t.Error(err)
				return
			}
			if i%2 == 1 {
				for _, part := range slices.Collect(slices.Chunk(data, 37)) {
					in.Write(part)
					time.Sleep(100 * time.Microsecond)
				}
			} else {
				in.Write(data)
			}
			in.Close()
			if err := s.Wait(); err != nil {
				t.Error(err)
			}
			if !bytes.Equal(out.Bytes(), data) {
				t.Errorf("channel %d: %d bytes came back, not the %d sent", i, out.Len(), len(data))
			}
			want[i] = sums{sha256.Sum256(data), sha256.Sum256(out.Bytes())}
		}()
	}
	wg.Wait()
	c.Close()
	records := g.records()[0]
	for i := range channels {
		in, out := sha256.New(), sha256.New()
		for _, r := range records {
			if d, ok := r.Body.(*auditlog.Data); ok && r.Channel == uint32(i+1) {
				switch d.Stream {
				case auditlog.Input:
					in.Write(d.Data)
				case auditlog.Output:
					out.Write(d.Data)
				}
			}
		}
		if [32]byte(in.Sum(nil)) != want[i].in || [32]byte(out.Sum(nil)) != want[i].out {
			t.Errorf("channel %d: the log has other bytes than were passed", i+1)
		}
	}
}

func TestRefusals(t *testing.T) {
	for _, tc := range []struct {
		name, user, banner, cause string
		proven                    bool
		set                       func(*gate)
	}{
		{"unknown user", "bob", "", "", false, nil},
		{"name that is none", "../alice", "", "", false, nil},
		{"no grant", "alice", "no grant", "refused", true, func(g *gate) {
			g.rules.login = func(authz.LoginInput) (authz.Login, error) {
				return authz.Login{Reason: "no grant \x1b[31mfor alice"}, nil
			}
		}},
		{"policy fails", "alice", "policy gave no decision", "refused", true, func(g *gate) {
			g.rules.login = func(authz.LoginInput) (authz.Login, error) {
				return authz.Login{Allow: true, NotAfter: time.Now().Add(time.Hour)}, errors.New("secret detail")
			}
		}},
		{"allowed without an end", "alice", "policy gave no decision", "refused", true, func(g *gate) {
			g.rules.login = func(authz.LoginInput) (authz.Login, error) {
				return authz.Login{Allow: true, Sandbox: authz.Sandbox{Image: "x"}}, nil
			}
		}},
		{"bad profile", "alice", "profile", "refused", true, func(g *gate) {
			g.rules.login = func(authz.LoginInput) (authz.Login, error) {
				return authz.Login{Allow: true, NotAfter: time.Now().Add(time.Hour)}, nil
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newGate(t, nil)
			if tc.set != nil {
				tc.set(g)
			}
			cfg := g.config(tc.user)
			var banner string
			cfg.BannerCallback = func(m string) error { banner += m; return nil }
			c, err := ssh.Dial("tcp", g.addr, cfg)
			if err == nil {
				c.Close()
				t.Fatal("logged in")
			}
			if !strings.Contains(banner, tc.banner) || strings.ContainsAny(banner, "\x1b") || strings.Contains(banner, "secret") {
				t.Errorf("banner %q, want %q in it", banner, tc.banner)
			}
			all := g.records()
			if g.backend.Started() != 0 {
				t.Error("a sandbox was started")
			}
			if !tc.proven {
				if len(all) != 0 {
					t.Errorf("%d sessions in the log, want none", len(all))
				}
				return
			}
			if len(all) != 1 {
				t.Fatalf("%d sessions in the log, want 1", len(all))
			}
			end := bodies[*auditlog.End](all[0])
			if len(end) != 1 || end[0].Cause != tc.cause {
				t.Errorf("end %+v, want the cause %s", *end[0], tc.cause)
			}
			d := bodies[*auditlog.Decision](all[0])
			if len(d) != 1 {
				t.Errorf("%d decisions recorded, want 1", len(d))
			}
		})
	}
}

// A key that stands in nobody's data is refused without asking for a signature; the right one after it is taken.
func TestManyKeys(t *testing.T) {
	g := newGate(t, nil)
	cfg := g.config("alice")
	var signers []ssh.Signer
	for range 18 {
		_, k, _ := ed25519.GenerateKey(rand.Reader)
		s, _ := ssh.NewSignerFromKey(k)
		signers = append(signers, s)
	}
	cfg.Auth = []ssh.AuthMethod{ssh.PublicKeys(append(signers, g.key)...)}
	c, err := ssh.Dial("tcp", g.addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	refused := 0
	for _, a := range bodies[*auditlog.Authenticate](g.records()[0]) {
		if a.Result == "refused" && a.Method == "publickey" {
			refused++
		}
	}
	if refused != 18 {
		t.Errorf("%d refused offers in the log, want 18", refused)
	}
}

func TestEnds(t *testing.T) {
	// hold opens a session that sleeps, and gives its end.
	hold := func(g *gate) (*ssh.Client, chan error) {
		c := g.dial("alice")
		s, err := c.NewSession()
		if err != nil {
			g.t.Fatal(err)
		}
		out, _ := s.StdoutPipe()
		if err := s.Start("echo up; sleep 600"); err != nil {
			g.t.Fatal(err)
		}
		io.ReadFull(out, make([]byte, 3))
		done := make(chan error, 1)
		go func() { done <- s.Wait() }()
		return c, done
	}
	ended := func(t *testing.T, done chan error) {
		t.Helper()
		select {
		case err := <-done:
			if err == nil {
				t.Error("the program ended well")
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the session goes on")
		}
	}
	t.Run("revoked", func(t *testing.T) {
		g := newGate(t, nil)
		_, done := hold(g)
		g.rules.change(func() {
			g.rules.login = func(authz.LoginInput) (authz.Login, error) { return authz.Login{Reason: "gone"}, nil }
		})
		ended(t, done)
		if got := g.cause(); got != "revoked" {
			t.Errorf("cause %s", got)
		}
	})
	t.Run("expired", func(t *testing.T) {
		g := newGate(t, nil)
		end := time.Now().Add(1500 * time.Millisecond)
		inner := g.rules.login
		g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
			d, err := inner(in)
			d.NotAfter = end
			return d, err
		}
		_, done := hold(g)
		ended(t, done)
		if got := g.cause(); got != "expired" {
			t.Errorf("cause %s", got)
		}
	})
	t.Run("idle", func(t *testing.T) {
		g := newGate(t, func(c *Config) { c.IdleTimeout = 500 * time.Millisecond })
		_, done := hold(g)
		ended(t, done)
		if got := g.cause(); got != "idle" {
			t.Errorf("cause %s", got)
		}
	})
	t.Run("max-duration", func(t *testing.T) {
		g := newGate(t, func(c *Config) { c.MaxDuration = 1500 * time.Millisecond })
		_, done := hold(g)
		ended(t, done)
		if got := g.cause(); got != "max-duration" {
			t.Errorf("cause %s", got)
		}
	})
	t.Run("operator", func(t *testing.T) {
		g := newGate(t, nil)
		_, done := hold(g)
		all := g.server.Sessions()
		if len(all) != 1 || all[0].User != "alice" || all[0].Ticket != "OPS-1" {
			t.Fatalf("sessions %+v", all)
		}
		if !g.server.End(all[0].ID, "lunch") || g.server.End("nobody", "") {
			t.Error("End says the wrong thing")
		}
		ended(t, done)
		if got := g.cause(); got != "ended-by-operator" {
			t.Errorf("cause %s", got)
		}
	})
	t.Run("shutdown", func(t *testing.T) {
		g := newGate(t, nil)
		_, done := hold(g)
		go g.stop()
		ended(t, done)
		if got := g.causeAfterStop(); got != "shutdown" {
			t.Errorf("cause %s", got)
		}
	})
	t.Run("client vanishes", func(t *testing.T) {
		g := newGate(t, nil)
		c, _ := hold(g)
		c.Close()
		if got := g.causeSoon(); got != "client-left" {
			t.Errorf("cause %s", got)
		}
	})
	t.Run("panic in one connection", func(t *testing.T) {
		g := newGate(t, nil)
		_, done := hold(g)
		inner := g.rules.request
		g.rules.change(func() { g.rules.request = func(authz.RequestInput) (authz.Verdict, error) { panic("boom") } })
		c2 := g.dial("alice")
		s, err := c2.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if s.Run("true") == nil {
			t.Error("ran")
		}
		c2.Wait()
		g.rules.change(func() { g.rules.request = inner })
		select {
		case <-done:
			t.Error("the other connection ended too")
		default:
		}
		c3 := g.dial("alice")
		s, _ = c3.NewSession()
		if err := s.Run("true"); err != nil {
			t.Error(err)
		}
	})
	t.Run("sandbox start fails", func(t *testing.T) {
		g := newGate(t, nil)
		broken := errors.New("engine's own words")
		g.backend.StartErr.Store(&broken)
		c := g.dial("alice")
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		var errOut bytes.Buffer
		s.Stderr = &errOut
		err = s.Run("true")
		var exit *ssh.ExitError
		if !errors.As(err, &exit) || exit.ExitStatus() != failureCode {
			t.Errorf("err %v", err)
		}
		if got := errOut.String(); !strings.Contains(got, "could not be started") || !strings.Contains(got, "connection ") || strings.Contains(got, "engine") {
			t.Errorf("stderr %q", got)
		}
		c.Close()
		if got := g.causeSoon(); got != "sandbox-failed" {
			t.Errorf("cause %s", got)
		}
	})
}

// causeSoon waits for the connections to end by themselves.
func (g *gate) causeSoon() string {
	g.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		g.server.mu.Lock()
		n := len(g.server.conns)
		g.server.mu.Unlock()
		if n == 0 {
			break
		}
	}
	return g.cause()
}

// causeAfterStop is for a stop that runs already.
func (g *gate) causeAfterStop() string {
	g.t.Helper()
	g.server.wg.Wait()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if len(listAll(g.dir)) > 0 {
			break
		}
	}
	return g.cause()
}

func listAll(dir string) []string {
	var names []string
	filepath.WalkDir(filepath.Join(dir, "log"), func(path string, d os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".seg") {
			names = append(names, path)
		}
		return nil
	})
	return names
}

func TestPty(t *testing.T) {
	g := newGate(t, nil)
	c := g.dial("alice")
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestPty("xterm", 40, 132, ssh.TerminalModes{}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s.Stdout = &out
	in, _ := s.StdinPipe()
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(in, "stty size; echo $TERM; exit 3\n")
	err = s.Wait()
	var exit *ssh.ExitError
	if !errors.As(err, &exit) || exit.ExitStatus() != 3 {
		t.Errorf("err %v", err)
	}
	for _, want := range []string{"alice, grant OPS-1", "Reason: a test", "is recorded", "40 132", "xterm"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q on the terminal: %q", want, out.String())
		}
	}
	c.Close()
	var typed, seen bytes.Buffer
	for _, d := range bodies[*auditlog.Data](g.records()[0]) {
		if d.Stream == auditlog.Input {
			typed.Write(d.Data)
		} else {
			seen.Write(d.Data)
		}
	}
	if !strings.Contains(typed.String(), "stty size") || seen.String() != out.String() {
		t.Errorf("recorded input %q, output %q", typed.String(), seen.String())
	}
}

// Hostile and odd clients: each ends or is refused, and an honest one is served meanwhile.
func TestHostile(t *testing.T) {
	g := newGate(t, func(c *Config) { c.LoginGraceTime = time.Second; c.MaxChannels = 4 })
	honest := func() {
		t.Helper()
		c := g.dial("alice")
		defer c.Close()
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Run("true"); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("garbage", func(t *testing.T) {
		for _, garbage := range []string{"", "GET / HTTP/1.1\r\n\r\n", "SSH-2.0-x\r\n" + strings.Repeat("\xff", 4096), strings.Repeat("a", 1<<16)} {
			nc, err := net.Dial("tcp", g.addr)
			if err != nil {
				t.Fatal(err)
			}
			nc.SetDeadline(time.Now().Add(10 * time.Second))
			nc.Write([]byte(garbage))
			if _, err := io.Copy(io.Discard, nc); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("garbage %.20q: the connection stays open past the grace time", garbage)
			}
			nc.Close()
		}
		honest()
	})
	t.Run("channels", func(t *testing.T) {
		c := g.dial("alice")
		defer c.Close()
		refused := 0
		for range 40 {
			if _, _, err := c.OpenChannel("session", nil); err != nil {
				refused++
			}
		}
		if refused != 36 {
			t.Errorf("%d of 40 channels refused, want 36", refused)
		}
		for _, kind := range []string{"x11", "direct-tcpip", "tun@openssh.com", "\xff\x00"} {
			if _, _, err := c.OpenChannel(kind, []byte("junk")); err == nil {
				t.Errorf("channel %q opened", kind)
			}
		}
		honest()
	})
	t.Run("requests", func(t *testing.T) {
		c := g.dial("alice")
		defer c.Close()
		for _, tc := range []struct {
			name    string
			kind    string
			payload []byte
		}{
			{"exec without a length", "exec", nil},
			{"exec with a lying length", "exec", []byte{0xff, 0xff, 0xff, 0xff, 'a'}},
			{"NUL in the command", "exec", ssh.Marshal(execMsg{"a\x00b"})},
			{"junk in pty-req", "pty-req", []byte("junk")},
			{"escape in TERM", "pty-req", ssh.Marshal(ptyRequestMsg{Term: "x\x1b[31m"})},
			{"junk in env", "env", []byte{0}},
			{"signal before a program", "signal", ssh.Marshal(signalMsg{"TERM"})},
			{"window-change before pty-req", "window-change", ssh.Marshal(windowChangeMsg{80, 24, 0, 0})},
			{"x11", "x11-req", []byte("junk")},
			{"unknown", "\xff\xfe", []byte("junk")},
		} {
			ch, reqs, err := c.OpenChannel("session", nil)
			if err != nil {
				t.Fatal(tc.name, err)
			}
			go ssh.DiscardRequests(reqs)
			if ok, err := ch.SendRequest(tc.kind, true, tc.payload); ok {
				t.Errorf("%s: accepted, %v", tc.name, err)
			}
			ch.Close()
			for range 100 { // the channel's place is free when the gate has closed it too
				if open(g) < 4 {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
		for _, kind := range []string{"tcpip-forward", "streamlocal-forward@openssh.com", "unknown", ""} {
			if ok, _, _ := c.SendRequest(kind, true, []byte("junk")); ok {
				t.Errorf("global request %q accepted", kind)
			}
		}
		honest()
	})
	t.Run("blank and long commands", func(t *testing.T) {
		c := g.dial("alice")
		defer c.Close()
		for _, command := range []string{"", " ", "\n", ": " + strings.Repeat("x", 64<<10)} {
			s, err := c.NewSession()
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Run(command); err != nil {
				t.Errorf("command %.10q: %v", command, err)
			}
		}
	})
	t.Run("two programs on a channel", func(t *testing.T) {
		c := g.dial("alice")
		defer c.Close()
		s, _ := c.NewSession()
		if err := s.Start("sleep 0.2"); err != nil {
			t.Fatal(err)
		}
		if ok, _ := s.SendRequest("exec", true, ssh.Marshal(execMsg{"echo twice"})); ok {
			t.Error("a second program was started")
		}
		s.Wait()
	})
	t.Run("no more sessions", func(t *testing.T) {
		c := g.dial("alice")
		defer c.Close()
		if ok, _, err := c.SendRequest("no-more-sessions@openssh.com", true, nil); !ok || err != nil {
			t.Fatal(ok, err)
		}
		if _, err := c.NewSession(); err == nil {
			t.Error("a session was opened after all")
		}
	})
}

// open is how many channels the gate has open on its newest connection.
func open(g *gate) int {
	g.server.mu.Lock()
	defer g.server.mu.Unlock()
	n := 0
	for _, c := range g.server.conns {
		c.mu.Lock()
		n = max(n, len(c.sessions))
		c.mu.Unlock()
	}
	return n
}

func TestLimits(t *testing.T) {
	t.Run("sessions of a user", func(t *testing.T) {
		g := newGate(t, func(c *Config) { c.MaxSessionsPerUser = 2 })
		g.dial("alice")
		g.dial("alice")
		cfg := g.config("alice")
		var banner string
		cfg.BannerCallback = func(m string) error { banner += m; return nil }
		if c, err := ssh.Dial("tcp", g.addr, cfg); err == nil {
			c.Close()
			t.Error("a third session")
		}
		if !strings.Contains(banner, "2 sessions, the most allowed") {
			t.Errorf("banner %q", banner)
		}
	})
	t.Run("connections that don't authenticate", func(t *testing.T) {
		g := newGate(t, func(c *Config) { c.MaxStartupsPerSource = 3 })
		for range 3 {
			nc, err := net.Dial("tcp", g.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			io.ReadFull(nc, make([]byte, 8)) // the gate has taken it
		}
		nc, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(5 * time.Second))
		b, err := io.ReadAll(nc)
		if err != nil || !strings.HasPrefix(string(b), "sallyport: busy") {
			t.Errorf("read %q, %v", b, err)
		}
	})
}

// 10,000 connections that never authenticate write less than 1 MiB, and an honest login works meanwhile.
func TestFlood(t *testing.T) {
	if testing.Short() {
		t.Skip("not in -short")
	}
	g := newGate(t, func(c *Config) { c.MaxStartups, c.MaxStartupsPerSource = 50, 50 })
	var wg sync.WaitGroup
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range 1250 {
				nc, err := net.Dial("tcp", g.addr)
				if err != nil {
					t.Error(err)
					return
				}
				nc.Write([]byte("SSH-2.0-flood\r\n"))
				nc.Close()
			}
		}()
	}
	c := g.dial("alice")
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run("true"); err != nil {
		t.Error(err)
	}
	wg.Wait()
	c.Close()
	g.records()
	var size int64
	for _, name := range listAll(g.dir) {
		st, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		size += st.Size()
	}
	if size == 0 || size > 1<<20 {
		t.Errorf("%d bytes of log, want some and less than 1 MiB", size)
	}
}

// hostkeys-00 is announced, and the proof that OpenSSH asks for verifies.
func TestHostKeys(t *testing.T) {
	g := newGate(t, nil)
	nc, err := net.Dial("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	conn, chans, reqs, err := ssh.NewClientConn(nc, g.addr, g.config("alice"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		for ch := range chans {
			ch.Reject(ssh.Prohibited, "")
		}
	}()
	req := <-reqs
	if req.Type != "hostkeys-00@openssh.com" {
		t.Fatalf("first request %s", req.Type)
	}
	go ssh.DiscardRequests(reqs)
	ok, answer, err := conn.SendRequest("hostkeys-prove-00@openssh.com", true, req.Payload)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	var blob struct{ Sig []byte }
	var sig ssh.Signature
	if err := errors.Join(ssh.Unmarshal(answer, &blob), ssh.Unmarshal(blob.Sig, &sig)); err != nil {
		t.Fatal(err)
	}
	data := ssh.Marshal(struct {
		What    string
		Session []byte
		Key     []byte
	}{"hostkeys-prove-00@openssh.com", conn.SessionID(), g.host.Marshal()})
	if err := g.host.Verify(data, &sig); err != nil {
		t.Error(err)
	}
	if ok, _, _ := conn.SendRequest("hostkeys-prove-00@openssh.com", true, ssh.Marshal(struct{ Key []byte }{[]byte("another")})); ok {
		t.Error("proved a key that is not the gate's")
	}
}

// readLog reads a log whole, and it must be whole: sealed, without a problem.
func readLog(t *testing.T, src auditlog.Source, log auditlog.Stored) []auditlog.Record {
	t.Helper()
	r := auditlog.NewSessionReader(src, log)
	var records []auditlog.Record
	for rec := range r.Records(context.Background()) {
		records = append(records, rec)
	}
	if rep := r.Report(); rep.State != auditlog.Sealed || len(rep.Problems) > 0 {
		t.Fatalf("log: %+v", rep)
	}
	return records
}
