package sshserver

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sort"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

// Policy is what the gate asks of package authz. An error is a refusal.
type Policy interface {
	Offer(ctx context.Context, in authz.OfferInput) (bool, error)
	Login(ctx context.Context, in authz.LoginInput) (authz.Login, error)
	Request(ctx context.Context, in authz.RequestInput) (authz.Verdict, error)
	// Subscribe gives a channel that has a value after each change of policy or data, until cancel is called.
	Subscribe() (changed <-chan struct{}, cancel func())
}

// Config is the gate's own part of the configuration file.
type Config struct {
	// Listen is the TCP address to listen on.
	Listen string `yaml:"listen"`
	// HostKeys are files of private host keys, at most one of each type. Empty: ssh_host_ed25519_key,
	// ssh_host_ecdsa_key and ssh_host_rsa_key in the state directory.
	HostKeys []string `yaml:"host_keys"`
	// CreateHostKeys makes host key files that don't exist at the first start.
	CreateHostKeys bool `yaml:"create_host_keys"`
	// LoginGraceTime is how long a connection may take to authenticate.
	LoginGraceTime time.Duration `yaml:"login_grace_time"`
	// MaxStartups caps connections that have not authenticated, MaxStartupsPerSource those of one IPv4 address or one
	// IPv6 network of 64 bits.
	MaxStartups          int `yaml:"max_startups"`
	MaxStartupsPerSource int `yaml:"max_startups_per_source"`
	// MaxSessions caps connections, MaxSessionsPerUser those of one user, MaxChannels the open channels of one.
	MaxSessions        int `yaml:"max_sessions"`
	MaxSessionsPerUser int `yaml:"max_sessions_per_user"`
	MaxChannels        int `yaml:"max_channels"`
	// KeepAliveInterval is how often a silent client is asked whether it is there, KeepAliveCount how many questions
	// may go unanswered.
	KeepAliveInterval time.Duration `yaml:"keepalive_interval"`
	KeepAliveCount    int           `yaml:"keepalive_count"`
	// IdleTimeout ends a session without traffic, MaxDuration every session. 0: no limit.
	IdleTimeout time.Duration `yaml:"idle_timeout"`
	MaxDuration time.Duration `yaml:"max_duration"`
	// DrainTime is how long sessions may go on after SIGTERM.
	DrainTime time.Duration `yaml:"drain_time"`
	// StartTimeout bounds a sandbox's start.
	StartTimeout time.Duration `yaml:"start_timeout"`
}

// DefaultConfig is the configuration where the file says nothing.
func DefaultConfig() Config {
	return Config{
		Listen:               ":2222",
		CreateHostKeys:       true,
		LoginGraceTime:       time.Minute,
		MaxStartups:          100,
		MaxStartupsPerSource: 20,
		MaxSessions:          1000,
		MaxSessionsPerUser:   20,
		MaxChannels:          32,
		KeepAliveInterval:    15 * time.Second,
		KeepAliveCount:       3,
		IdleTimeout:          0,
		MaxDuration:          12 * time.Hour,
		DrainTime:            30 * time.Second,
		StartTimeout:         time.Minute,
	}
}

// Validate says what is wrong with a configuration.
func (c Config) Validate() error {
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("ssh.listen: %q is no address: write host:port", c.Listen)
	}
	for _, p := range []struct {
		name string
		v    int
	}{
		{"max_startups", c.MaxStartups}, {"max_startups_per_source", c.MaxStartupsPerSource},
		{"max_sessions", c.MaxSessions}, {"max_sessions_per_user", c.MaxSessionsPerUser},
		{"max_channels", c.MaxChannels}, {"keepalive_count", c.KeepAliveCount},
	} {
		if p.v < 1 {
			return fmt.Errorf("ssh.%s: must be at least 1", p.name)
		}
	}
	for _, p := range []struct {
		name string
		v    time.Duration
	}{
		{"login_grace_time", c.LoginGraceTime}, {"keepalive_interval", c.KeepAliveInterval},
		{"start_timeout", c.StartTimeout},
	} {
		if p.v < time.Second {
			return fmt.Errorf("ssh.%s: must be at least 1s", p.name)
		}
	}
	if c.IdleTimeout < 0 || c.MaxDuration < 0 || c.DrainTime < 0 {
		return errors.New("ssh: idle_timeout, max_duration and drain_time can't be negative")
	}
	return nil
}

// Options are what a Server is made of.
type Options struct {
	Config   Config
	Gate     string // the gate's name, in records and labels
	Version  string // of the program, in the first record of every session
	HostKeys []ssh.Signer
	Policy   Policy
	Backend  backends.Backend
	Log      *auditlog.Log
	NoData   bool // what sessions pass is not recorded; every session's log says so
	Slog     *slog.Logger
	Metrics  *Metrics // nil: none are kept
}

// Server takes SSH connections.
type Server struct {
	Options

	ctx    context.Context // ends with a *cause: every connection's parent
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // connections

	mu        sync.Mutex // guards what follows
	draining  bool
	drain     chan struct{}      // closed when draining begins
	startups  map[netip.Addr]int // by network
	unproven  int
	conns     map[string]*conn
	users     map[string]int // sessions by user
	listeners map[net.Listener]bool
}

// New makes a Server. Its Serve takes connections until Shutdown.
func New(o Options) (*Server, error) {
	if err := o.Config.Validate(); err != nil {
		return nil, err
	}
	if len(o.HostKeys) == 0 {
		return nil, errors.New("no host keys")
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	s := &Server{
		Options: o, drain: make(chan struct{}), startups: map[netip.Addr]int{}, conns: map[string]*conn{},
		users: map[string]int{}, listeners: map[net.Listener]bool{},
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s, nil
}

// Serve takes connections from l until Shutdown closes it, and then returns nil.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.draining {
		s.mu.Unlock()
		return l.Close()
	}
	s.listeners[l] = true
	s.mu.Unlock()
	var pause time.Duration
	for {
		nc, err := l.Accept()
		if err != nil {
			s.mu.Lock()
			draining := s.draining
			s.mu.Unlock()
			if draining {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept: %w", err)
			}
			// Out of descriptors, or a client that left before we looked: go on, but don't spin.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.Slog.Warn("accept", "error", err, "pause", pause)
			select {
			case <-time.After(pause):
			case <-s.drain:
			}
			continue
		}
		pause = 0
		s.take(nc)
	}
}

// take starts a connection, or closes it where too many wait to authenticate.
func (s *Server) take(nc net.Conn) {
	source := sourceOf(nc)
	s.mu.Lock()
	var why string
	switch {
	case s.draining:
		why = "shutdown"
	case s.unproven >= s.Config.MaxStartups:
		why = "too many connections that have not authenticated (max_startups)"
	case s.startups[network(source)] >= s.Config.MaxStartupsPerSource:
		why = "too many connections from this address that have not authenticated (max_startups_per_source)"
	case len(s.conns) >= s.Config.MaxSessions:
		why = "too many connections (max_sessions)"
	}
	if why != "" {
		s.mu.Unlock()
		// A line before the version string is allowed (RFC 4253, section 4.2); the client may have gone already.
		nc.SetWriteDeadline(time.Now().Add(time.Second))
		nc.Write([]byte("sallyport: busy, try again later\r\n"))
		nc.Close()
		s.Metrics.refused.WithLabelValues("limit").Inc()
		s.Log.Refused(auditlog.Refused{Source: source.String(), Count: 1, Reason: why})
		return
	}
	s.unproven++
	s.startups[network(source)]++
	c := newConn(s, nc, source)
	s.conns[c.id] = c
	s.wg.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.wg.Done()
		defer s.forget(c)
		c.run()
	}()
}

// proven counts a connection among a user's sessions instead of those that wait. It reports whether there is room.
func (s *Server) proven(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users[c.login.User] >= s.Config.MaxSessionsPerUser {
		return false // it still counts among those that wait, until it is closed
	}
	s.authenticatedLocked(c)
	s.users[c.login.User]++
	c.counted = c.login.User
	return true
}

func (s *Server) authenticatedLocked(c *conn) {
	if c.waiting {
		c.waiting = false
		s.unproven--
		n := network(c.source)
		if s.startups[n]--; s.startups[n] <= 0 {
			delete(s.startups, n)
		}
	}
}

func (s *Server) forget(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.authenticatedLocked(c)
	delete(s.conns, c.id)
	if c.counted != "" {
		if s.users[c.counted]--; s.users[c.counted] <= 0 {
			delete(s.users, c.counted)
		}
	}
}

// Shutdown closes the listeners, tells the sessions, and waits for them at most the drain time, or until ctx ends.
// What is left then is ended. It returns when every connection has ended and its log is closed.
func (s *Server) Shutdown(ctx context.Context) {
	s.mu.Lock()
	if !s.draining {
		s.draining = true
		close(s.drain)
		for l := range s.listeners {
			l.Close()
		}
	}
	// A connection that has not authenticated has nothing to finish.
	for _, c := range s.conns {
		if c.waiting {
			c.end(&cause{word: "shutdown"})
		}
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() { s.wg.Wait(); close(done) }()
	timer := time.NewTimer(s.Config.DrainTime)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	case <-ctx.Done():
	}
	s.cancel(&cause{word: "shutdown", text: "the gate is shutting down"})
	<-done // every connection's end is bounded, see conn.finish
}

// SessionInfo is one running session, for an operator.
type SessionInfo struct {
	ID      string    `json:"id"`
	Gate    string    `json:"gate"`
	User    string    `json:"user"`
	Source  string    `json:"source"`
	Ticket  string    `json:"ticket"`
	Profile string    `json:"profile"`
	Sandbox string    `json:"sandbox"`
	Started time.Time `json:"started"`
	Expires time.Time `json:"expires"`
}

// Sessions lists the running sessions, oldest first.
func (s *Server) Sessions() []SessionInfo {
	s.mu.Lock()
	conns := make([]*conn, 0, len(s.conns))
	for _, c := range s.conns {
		if c.counted != "" {
			conns = append(conns, c)
		}
	}
	s.mu.Unlock()
	out := make([]SessionInfo, 0, len(conns))
	for _, c := range conns {
		out = append(out, c.info())
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out
}

// End ends a session as an operator's act. It reports whether there was one.
func (s *Server) End(id, reason string) bool {
	s.mu.Lock()
	c := s.conns[id]
	s.mu.Unlock()
	if c == nil {
		return false
	}
	text := "an operator has ended this session"
	if r := authz.Printable(reason, 200); r != "" {
		text += ": " + r
	}
	var detail error
	if reason != "" {
		detail = errors.New(authz.Printable(reason, 1000))
	}
	c.end(&cause{word: "ended-by-operator", text: text, detail: detail})
	return true
}

func sourceOf(nc net.Conn) netip.Addr {
	if a, ok := nc.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// network is what startups are counted by: an address, or the network of an IPv6 customer.
func network(addr netip.Addr) netip.Addr {
	if addr.Is6() && !addr.IsLoopback() {
		if p, err := addr.WithZone("").Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return addr
}

var idEncoding = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

// newID makes a session ID: 48 bits of time in milliseconds and 80 random bits in Crockford's base 32, so that IDs sort
// by time.
func newID(now time.Time) string {
	var b [16]byte
	rand.Read(b[6:]) // never fails: crypto/rand.Read
	ms := uint64(now.UnixMilli())
	var t [8]byte
	binary.BigEndian.PutUint64(t[:], ms)
	copy(b[:6], t[2:])
	return idEncoding.EncodeToString(b[:])
}
