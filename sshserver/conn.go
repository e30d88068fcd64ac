package sshserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/time/rate"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

// What a connection may ask for in a second; more waits its turn.
const (
	requestRate  = 100
	requestBurst = 500
)

const (
	noMoreSessions = "no-more-sessions@openssh.com"
	maxGlobal      = 64 // global requests that wait for their turn
)

const (
	tellTime     = time.Second      // for the last words on the terminals
	partTime     = time.Second      // for the client to leave after them
	closeTimeout = 30 * time.Second // for a sandbox's removal
	finishTime   = 15 * time.Second // for the connection's goroutines
	failedGrace  = 2 * time.Second  // for channels to report a failed start, or a sandbox's end
)

// conn is one connection. Its life:
//
//  1. newConn opens a Recorder: in memory until a key is proven.
//  2. run records the connect, and has x/crypto do the handshake and authentication under the login grace time.
//  3. offer answers for each key whether a signature is worth asking for; login, called with a proven key, makes the
//     Recorder a session's, asks policy, and starts the sandbox in the background (auth.go).
//  4. serve carries global requests and channels; each session channel is a session (session.go).
//  5. watch waits for what ends a connection: the client leaves, the grant ends or is taken back, a limit is reached,
//     the sandbox or the log is lost, an operator or the gate's own end. The first cause wins: it cancels ctx.
//  6. finish tells the terminals, closes the connection, removes the sandbox, waits for the goroutines, and writes the
//     cause as the log's last record.
type conn struct {
	s       *Server
	id      string
	nc      net.Conn
	source  netip.Addr
	started time.Time
	rec     *auditlog.Recorder
	limit   *rate.Limiter // requests and channel opens
	opens   *rate.Limiter // connections made inside to what is forwarded

	ctx    context.Context
	cancel context.CancelCauseFunc // with a *cause
	wg     sync.WaitGroup          // goroutines of this connection

	waiting bool   // not authenticated; guarded by s.mu
	counted string // user it is counted under; guarded by s.mu

	// Written while authenticating, before any other goroutine of the connection runs.
	pre       ssh.ServerPreAuthConn
	login     authz.LoginInput
	authError *cause // a proven key was refused
	sc        *ssh.ServerConn

	heard  atomic.Bool  // the client has sent something since keepAlive looked
	active atomic.Int64 // time of the last traffic, Unix nanoseconds

	changed chan struct{} // has a value after the decision changed: see narrowed

	choice      *choice       // of the sandbox's target; nil: it has none
	left        chan struct{} // closed when the client has left
	sandboxDone chan struct{} // closed when the start has ended; then sandbox or sandboxErr is set
	sandbox     backends.Sandbox
	sandboxErr  error

	mu             sync.Mutex          // guards what follows
	decision       authz.Login         // the newest one that allowed
	target         *authz.LoginTarget  // what it was about; nil: no target, or none yet
	sandboxID      string              //
	sessions       map[uint32]*session // open channels
	forwards       map[uint32]*forward // open, under way, and refused by a client that has not said so
	listeners      map[*listener]bool  // inside, for the client
	kept           contentKept         // of transferred files
	channels       uint32              // channels ever opened
	noMoreSessions bool                // no-more-sessions@openssh.com
}

func newConn(s *Server, nc net.Conn, source netip.Addr) *conn {
	now := time.Now()
	c := &conn{
		s: s, id: newID(now), nc: newBatchConn(nc), source: source, started: now, waiting: true,
		limit: rate.NewLimiter(requestRate, requestBurst), opens: rate.NewLimiter(requestRate, requestBurst),
		changed: make(chan struct{}, 1), left: make(chan struct{}), sessions: map[uint32]*session{}, forwards: map[uint32]*forward{}, listeners: map[*listener]bool{},
	}
	c.ctx, c.cancel = context.WithCancelCause(s.ctx)
	c.rec = s.Log.New(c.id)
	return c
}

// end ends the connection for the cause; the first one counts.
func (c *conn) end(why *cause) { c.cancel(why) }

// spawn runs f in a goroutine of the connection. A panic ends this connection only.
func (c *conn) spawn(f func()) {
	c.wg.Add(1)
	go func() {
		defer c.wg.Done()
		defer c.contain()
		f()
	}()
}

func (c *conn) contain() {
	if p := recover(); p != nil {
		c.s.Slog.Error("panic in a connection", "connection", c.id, "panic", p, "stack", string(debug.Stack()))
		c.s.Metrics.panics.Inc()
		c.end(&cause{word: "internal-error", text: "internal error", detail: fmt.Errorf("panic: %v", p)})
	}
}

func (c *conn) run() {
	defer c.finish()
	defer c.contain()
	c.touch()
	c.record(0, &auditlog.Connect{
		Gate: c.s.Gate, Source: c.nc.RemoteAddr().String(), Local: c.nc.LocalAddr().String(), Version: c.s.Version,
	})
	// A key exchange that stands still would hold the connection past its end otherwise.
	stop := context.AfterFunc(c.ctx, func() { c.nc.Close() })
	c.nc.SetDeadline(time.Now().Add(c.s.Config.LoginGraceTime))
	wire := newLockstep(c.nc, &c.heard)
	sc, channels, requests, err := ssh.NewServerConn(wire, c.serverConfig(wire))
	if err != nil {
		stop()
		wire.Close()
		if c.pre != nil && !drain(c.pre) {
			c.s.Slog.Error("a failed handshake could not be cleaned up", "connection", c.id)
		}
		c.end(c.handshakeCause(err))
		return
	}
	if !stop() {
		sc.Close()
		go ssh.DiscardRequests(requests)
		for range channels {
		}
		return
	}
	c.nc.SetDeadline(time.Time{})
	c.sc = sc
	c.s.Metrics.logins.WithLabelValues("accepted").Inc()
	c.serve(channels, requests)
	c.watch()
}

// handshakeCause is why a connection that never became a session ends.
func (c *conn) handshakeCause(err error) *cause {
	if c.authError != nil {
		return c.authError
	}
	var auth *ssh.ServerAuthError
	switch {
	case errors.As(err, &auth):
		return &cause{word: "refused", detail: errors.New("no key was proven")}
	case errors.Is(err, errTimeout(err)):
		return &cause{word: "refused", detail: errors.New("login grace time is over")}
	case gone(err):
		return &cause{word: "client-left", detail: errors.New("before authentication")}
	}
	return &cause{word: "protocol-error", detail: errors.New(authz.Printable(err.Error(), 300))}
}

// errTimeout gives err back when it is a time-out, so that it can stand in errors.Is.
func errTimeout(err error) error {
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		return err
	}
	return errors.ErrUnsupported
}

func gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ETIMEDOUT)
}

// tap gives a writer that records what goes to w, first.
func (c *conn) tap(channel uint32, stream auditlog.Stream, w io.Writer) io.Writer {
	if c.s.NoData {
		return w
	}
	return c.rec.Tap(channel, stream, w)
}

// recordInput records what a client sent.
func (c *conn) recordInput(channel uint32, data *auditlog.Data) error {
	if c.s.NoData {
		return nil
	}
	return c.record(channel, data)
}

// record writes one record. A record that can't be written ends the connection.
func (c *conn) record(channel uint32, body auditlog.Body) error {
	err := c.rec.Record(channel, body)
	if err != nil {
		c.auditLost(err)
	}
	return err
}

func (c *conn) auditLost(err error) {
	c.end(&cause{word: "audit-lost", text: "the session can't be recorded any more and ends", detail: err})
}

func (c *conn) touch() { c.active.Store(time.Now().UnixNano()) }

// serve starts what carries the connection. Everything it starts ends when the connection is closed.
func (c *conn) serve(channels <-chan ssh.NewChannel, requests <-chan *ssh.Request) {
	turns := make(chan turn)
	c.spawn(func() { c.globalRequests(requests, turns) })
	c.spawn(func() { c.newChannels(channels, turns) })
	c.spawn(c.keepAlive)
	c.spawn(c.narrowed)
	c.spawn(func() {
		err := c.sc.Wait()
		close(c.left)
		why := &cause{word: "client-left"}
		if err != nil && !gone(err) && !strings.Contains(err.Error(), "disconnect, reason 11") { // by application
			why.detail = errors.New(authz.Printable(err.Error(), 300))
		}
		c.end(why)
	})
	c.spawn(c.announceHostKeys)
}

// watch returns when the connection has a cause to end.
func (c *conn) watch() {
	changed, cancel := c.s.Policy.Subscribe()
	defer cancel()
	// A change between the decision and the subscription must not be missed.
	c.reevaluate()

	deadline := time.NewTimer(time.Hour)
	defer deadline.Stop()
	sandboxStarted := c.sandboxDone
	var sandboxGone <-chan struct{}
	drain := c.s.drain
	lost := c.rec.Lost()
	said := time.Duration(1<<63 - 1) // the smallest remaining time announced
	for {
		deadline.Reset(c.timers(&said))
		select {
		case <-c.ctx.Done():
			return
		case <-changed:
			c.reevaluate()
		case <-deadline.C:
		case <-lost:
			c.auditLost(c.rec.Err())
			return
		case <-drain:
			drain = nil
			c.tell(fmt.Sprintf("the gate is shutting down: this session ends in %s", c.s.Config.DrainTime))
		case <-sandboxStarted:
			sandboxStarted = nil
			if c.sandboxErr != nil {
				c.failed()
				return
			}
			sandboxGone = c.sandbox.Done()
		case <-sandboxGone:
			// Programs notice too, and tell their client before they end the connection.
			timer := time.NewTimer(failedGrace)
			defer timer.Stop()
			select {
			case <-timer.C:
				c.end(goneCause(c.sandbox, backends.ErrGone))
			case <-c.ctx.Done():
			}
			return
		}
	}
}

// failed ends the connection for a sandbox that didn't start, after its channels could say so.
func (c *conn) failed() {
	timer := time.NewTimer(failedGrace)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-c.ctx.Done(): // the client has read it and left
	}
	c.end(&cause{word: "sandbox-failed", detail: c.sandboxErr})
}

// timers ends the connection when a time limit has passed, announces the ones that are known, and returns when to look
// again.
func (c *conn) timers(said *time.Duration) time.Duration {
	now := time.Now()
	c.mu.Lock()
	d := c.decision
	c.mu.Unlock()
	next := 10 * time.Second // timers run on another clock than grants
	at := func(t time.Time, why *cause, announce bool) {
		left := t.Sub(now)
		if left <= 0 {
			c.end(why)
			next = 0
			return
		}
		next = min(next, left)
		if !announce {
			return
		}
		for _, before := range []time.Duration{5 * time.Minute, time.Minute} {
			if left > before {
				next = min(next, left-before)
			} else if *said > before {
				*said = before
				c.tell(fmt.Sprintf("this session ends in %s, at %s: %s", left.Round(time.Second), clock(t), why.text))
			}
		}
	}
	at(d.NotAfter, &cause{word: "expired", text: "the grant " + d.Ticket + " ends"}, true)
	if m := narrower(c.s.Config.MaxDuration, d.Permit.MaxDuration); m > 0 {
		at(c.started.Add(m), &cause{word: "max-duration", text: "the longest time allowed for a session is over"}, true)
	}
	if m := narrower(c.s.Config.IdleTimeout, d.Permit.IdleTimeout); m > 0 {
		at(time.Unix(0, c.active.Load()).Add(m), &cause{word: "idle", text: "no traffic for " + m.String()}, false)
	}
	return max(next, time.Millisecond)
}

// narrower is the smaller of the gate's limit and the profile's; 0 is none. A profile's that does not parse was refused
// with the decision.
func narrower(gate time.Duration, profile string) time.Duration {
	p, err := time.ParseDuration(profile)
	if err != nil || p <= 0 {
		return gate
	}
	if gate <= 0 {
		return p
	}
	return min(gate, p)
}

func clock(t time.Time) string { return t.UTC().Format("15:04:05 UTC") }

// tell writes a line to every terminal of the connection.
func (c *conn) tell(text string) {
	c.each(func(s *session) {
		if s.terminal != nil {
			s.notice("\r\n*** sallyport: " + text + "\r\n")
		}
	})
}

// each calls f for each session that has a program. It does not wait longer than tellTime for a client that doesn't read.
func (c *conn) each(f func(*session)) {
	c.mu.Lock()
	var to []*session
	for _, s := range c.sessions {
		if s.running {
			to = append(to, s)
		}
	}
	c.mu.Unlock()
	var wg sync.WaitGroup
	for _, s := range to {
		wg.Add(1)
		c.spawn(func() { defer wg.Done(); f(s) })
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }() // ends at the latest when the connection is closed
	timer := time.NewTimer(tellTime)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	}
}

// reevaluate asks policy again, as it did at login but for the grant that was given then.
func (c *conn) reevaluate() {
	in := c.login
	c.mu.Lock()
	old := c.decision
	in.Target = c.target
	c.mu.Unlock()
	in.Choice = old.Ticket
	var d authz.Login
	var err error
	ctx, cancel := context.WithDeadline(c.ctx, old.NotAfter) // the end comes on time, whatever policy does
	defer cancel()
	for range 2 { // one failure may be a machine that is busy
		if d, err = c.askLogin(ctx, in); err == nil || ctx.Err() != nil {
			break
		}
	}
	if c.ctx.Err() != nil {
		return
	}
	why := &cause{word: "revoked", text: "the grant " + old.Ticket + " has been taken back"}
	switch {
	case err != nil && !time.Now().Before(old.NotAfter):
		why = &cause{word: "expired", text: "the grant " + old.Ticket + " has ended"}
	case err != nil:
		why.detail, why.text = err, "policy can't be asked any more"
	case !d.Allow:
		why.detail = errors.New(d.Reason)
		if !time.Now().Before(old.NotAfter) {
			why = &cause{word: "expired", text: "the grant " + old.Ticket + " has ended"}
		}
	case d.Profile != old.Profile:
		why.detail = fmt.Errorf("the grant's profile changed from %s to %s", old.Profile, d.Profile)
	default:
		if _, err := specOf(c.s.Gate, c.id, in.User, d); err != nil {
			why.text, why.detail = "the profile "+d.Profile+" is not valid any more", err
			break
		}
		c.mu.Lock()
		c.decision = d
		c.mu.Unlock()
		if d.Revision != old.Revision {
			c.recordDecision(in, d)
		}
		select {
		case c.changed <- struct{}{}:
		default: // one waits already
		}
		return
	}
	if err == nil {
		c.recordDecision(in, d)
	}
	c.end(why)
}

// keepAlive ends a connection whose client no longer answers.
func (c *conn) keepAlive() {
	tick := time.NewTicker(c.s.Config.KeepAliveInterval)
	defer tick.Stop()
	answered := make(chan struct{}, 1)
	missed, asking := 0, false
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-answered:
			missed, asking = 0, false
		case <-tick.C:
			if c.heard.Swap(false) {
				missed = 0 // its answer may wait behind much else on a slow line
				if asking {
					continue
				}
			}
			if asking {
				if missed++; missed >= c.s.Config.KeepAliveCount {
					c.end(&cause{word: "client-left", detail: errors.New("keepalives went unanswered")})
					return
				}
				continue
			}
			asking = true
			c.spawn(func() { // ends with an answer, or with the connection
				if _, _, err := c.sc.SendRequest("keepalive@openssh.com", true, nil); err == nil {
					answered <- struct{}{}
				}
			})
		}
	}
}

// globalRequests has the requests that concern the whole connection answered in their order, which the protocol demands
// (RFC 4254, section 4): one that takes long, as a listener may, delays the answers after it, what is connected to and run on
// channels that the client opens after it, and nothing else.
func (c *conn) globalRequests(requests <-chan *ssh.Request, turns <-chan turn) {
	type step struct {
		req  *ssh.Request
		done chan struct{}
	}
	waiting := make(chan step, maxGlobal)
	c.spawn(func() {
		for s := range waiting {
			c.globalRequest(s.req)
			close(s.done)
		}
	})
	defer func() {
		close(waiting)
		for range requests { // x/crypto's reader waits for a taker, also after the connection is closed
		}
	}()
	last := make(chan struct{}) // closed when all requests so far have taken effect
	close(last)
	next := func(req *ssh.Request) bool {
		if c.limit.Wait(c.ctx) != nil {
			return false // x/crypto drops what is left when the connection is closed
		}
		if req.Type == noMoreSessions { // holds at once, whatever waits before it
			c.mu.Lock()
			c.noMoreSessions = true
			c.mu.Unlock()
		}
		s := step{req, make(chan struct{})}
		select {
		case waiting <- s:
			last = s.done
			return true
		case <-c.ctx.Done():
			return false
		}
	}
	for {
		select {
		case req, ok := <-requests:
			if !ok || !next(req) {
				return
			}
		case t := <-turns:
			// x/crypto hands out a request before it reads the channel's opening.
			for n := len(requests); n > 0; n-- {
				req, ok := <-requests
				if !ok || !next(req) {
					return
				}
			}
			t <- last
		case <-c.ctx.Done():
			return
		}
	}
}

// turn is a channel's place among the global requests: it has a value when those before it have been seen, which is closed
// when they have taken effect.
type turn chan (<-chan struct{})

// await returns when the global requests that came before a channel have been seen; no-more-sessions then holds. before is
// closed when they have taken effect; nil: the connection ends.
func (c *conn) await(turns chan<- turn) (before <-chan struct{}) {
	t := make(turn, 1)
	select {
	case turns <- t:
	case <-c.ctx.Done():
		return nil
	}
	select {
	case before = <-t:
		return before
	case <-c.ctx.Done():
		return nil
	}
}

// globalRequest decodes, decides, acts, records and answers.
func (c *conn) globalRequest(req *ssh.Request) {
	if c.ctx.Err() != nil {
		return
	}
	var answer []byte
	var err error
	var listening *listener
	rec := auditlog.Request{Type: authz.Printable(req.Type, 100)}
	switch req.Type {
	case "keepalive@openssh.com":
		// Any answer will do; OpenSSH's own is a failure. Not recorded: it says nothing.
		req.Reply(false, nil)
		return
	case noMoreSessions:
	case "hostkeys-prove-00@openssh.com":
		var ok bool
		if answer, ok = c.proveHostKeys(req.Payload); !ok {
			err = errors.New("asks about a key that is none of the gate's")
		}
	case typeListenTCP, typeListenUnix:
		listening, answer, err = c.listenFor(req, &rec)
	case typeCancelTCP, typeCancelUnix:
		err = c.cancelListener(req, &rec)
	default:
		err = errUnknown
	}
	rec.OK = err == nil
	if err != nil {
		rec.Reason = authz.Printable(err.Error(), 500)
		if errors.Is(err, errUnknown) || errors.Is(err, errMalformed) {
			rec.Payload = req.Payload[:min(len(req.Payload), 1024)]
		}
	}
	lost := c.record(0, &rec)
	if listening != nil {
		c.spawn(listening.serve) // it ends with the connection, also if that is now
	}
	if lost == nil && req.WantReply {
		req.Reply(rec.OK, answer)
	}
}

// newChannels opens session channels and those that forward, and refuses all others.
func (c *conn) newChannels(channels <-chan ssh.NewChannel, turns chan<- turn) {
	defer func() {
		for range channels { // as in globalRequests
		}
	}()
	for nc := range channels {
		if c.limit.Wait(c.ctx) != nil {
			return
		}
		kind := nc.ChannelType()
		before := c.await(turns)
		if before == nil {
			return
		}
		forwards := kind == typeDirectTCP || kind == typeDirectUnix
		var f *forward
		c.mu.Lock()
		c.channels++
		id := c.channels
		open, noMore := len(c.sessions)+len(c.forwards), c.noMoreSessions
		if forwards {
			f = c.newForward(id, kind)
		}
		c.mu.Unlock()
		if f != nil {
			c.spawn(func() { f.direct(nc, before) })
			continue
		}
		rec := auditlog.ChannelOpen{Type: authz.Printable(kind, 100)}
		reason := ssh.Prohibited
		switch {
		case kind != "session" && !forwards:
			reason, rec.Error = ssh.UnknownChannelType, "unknown channel type"
		case noMore && !forwards:
			rec.Error = "the client said that it opens no more sessions"
		case forwards || open >= c.s.Config.MaxChannels:
			reason, rec.Error = ssh.ResourceShortage, fmt.Sprintf("%d channels are open, the most allowed", open)
		}
		if rec.Error != "" {
			extra := nc.ExtraData()
			rec.Extra = extra[:min(len(extra), 1024)]
		}
		if c.record(id, &rec) != nil {
			return
		}
		if rec.Error != "" {
			nc.Reject(reason, rec.Error)
			continue
		}
		ch, reqs, err := nc.Accept()
		if err != nil {
			continue // the connection is closed
		}
		c.touch()
		s := newSession(c, id, ch, before)
		c.mu.Lock()
		c.sessions[id] = s
		c.mu.Unlock()
		c.spawn(func() { s.serve(reqs) })
	}
}

// permit is what the connection may do now.
func (c *conn) permit() authz.Permit {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.decision.Permit
}

// permitted asks policy about one request or channel.
func (c *conn) permitted(ctx context.Context, in authz.RequestInput) error {
	c.mu.Lock()
	d := c.decision
	in.User = c.login.User
	c.mu.Unlock()
	in.Ticket, in.Profile, in.Permit = d.Ticket, d.Profile, d.Permit
	ctx, cancel := context.WithTimeout(ctx, policyTimeout)
	defer cancel()
	v, err := c.s.Policy.Request(ctx, in)
	if err != nil {
		c.s.Slog.Error("policy: request", "connection", c.id, "error", err)
		return &UserError{Text: "policy gave no decision", Err: err}
	}
	if !v.Allow {
		reason := v.Reason
		if reason == "" {
			reason = in.Type + " is not permitted"
		}
		return &UserError{Text: authz.Printable(reason, 300)}
	}
	return nil
}

// startSandbox begins the start; sandboxDone tells its end.
func (c *conn) startSandbox(spec backends.Spec) {
	c.sandboxDone = make(chan struct{})
	c.spawn(func() {
		defer close(c.sandboxDone)
		c.sandboxErr = errors.New("the start panicked") // stays only if it does
		var err error
		if c.choice != nil {
			spec, err = c.chooseTarget(spec)
		}
		ctx, cancel := context.WithTimeout(c.ctx, c.s.Config.StartTimeout)
		defer cancel()
		began := time.Now()
		spec.Reports = c.report
		var sb backends.Sandbox
		if err == nil {
			sb, err = c.s.Backend.Start(ctx, spec)
		}
		c.s.Metrics.sandboxStart.Observe(time.Since(began).Seconds())
		rec := auditlog.Sandbox{Image: spec.Template.Image, Took: time.Since(began)}
		if err != nil {
			c.sandboxErr = err
			rec.Error = err.Error()
			c.s.Metrics.sandboxErrors.Inc()
			c.s.Slog.Warn("sandbox start", "connection", c.id, "user", c.login.User, "error", err)
		} else {
			c.sandbox, c.sandboxErr = sb, nil
			info := sb.Info()
			rec.ID, rec.Backend, rec.Digest, rec.Node, rec.ExecAudit = sb.ID(), info.Backend, info.Digest, info.Node, info.ExecAudit
			if j := info.Joined; j != nil {
				rec.Target, rec.TargetID, rec.TargetContainer, rec.TargetImage, rec.TargetDigest = j.String(), j.ID, j.Container, j.Image, j.Digest
				rec.Joined, rec.Weaker = j.What, j.Weaker
			}
			if info.Spec != nil {
				if b, err := json.Marshal(info.Spec); err == nil {
					rec.Spec = string(b)
				}
			}
			c.mu.Lock()
			c.sandboxID = sb.ID()
			c.mu.Unlock()
		}
		c.record(0, &rec)
		if late, ok := sb.(backends.Identified); ok && err == nil && rec.Digest == "" {
			wait := late.Digest() // asked before the sandbox can be closed
			c.spawn(func() { c.identify(wait, rec) })
		}
		if why, off := strings.CutPrefix(rec.ExecAudit, "off: "); off {
			c.record(0, &auditlog.Alert{Name: "exec-audit-off", Detail: why})
		}
		if t := spec.Template.Target; err == nil && t != nil && t.Processes {
			c.record(0, &auditlog.Alert{Name: "target-joined", Detail: rec.Target + ": " + strings.Join(rec.Joined, ", ")})
		}
	})
}

// identify records the digest of an image that was not known when its sandbox was. Not the connection's context: a session may
// be over before the digest is known.
func (c *conn) identify(wait func(context.Context) string, rec auditlog.Sandbox) {
	ctx, cancel := context.WithTimeout(context.Background(), c.s.Config.StartTimeout)
	defer cancel()
	if rec.Digest = wait(ctx); rec.Digest == "" {
		return
	}
	rec.Spec, rec.Took = "", 0
	c.record(0, &rec)
}

// part lets the client read the last words. A connection that is closed while something lies unread in it is reset, and a client
// loses with that what it has not read (RFC 9293, section 3.10.7; RFC 2525, section 2.17). So the gate's side ends first.
func (c *conn) part() {
	half, ok := c.nc.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	timer := time.NewTimer(partTime)
	defer timer.Stop()
	select {
	case <-c.left:
	case <-timer.C:
	}
}

// finish is the one place where a connection ends.
func (c *conn) finish() {
	c.end(&cause{word: "client-left"}) // only if there is no cause yet
	why := endCause(context.Cause(c.ctx))
	if c.authError != nil { // decided before anything else could end it
		why = c.authError
	}
	if c.sc != nil {
		c.each(func(s *session) { s.farewell(why) })
		c.part()
		c.sc.Close()
	}
	c.nc.Close()
	if c.sandboxDone != nil {
		removed := make(chan struct{})
		go func() {
			defer close(removed)
			defer c.contain()
			c.removeSandbox()
		}()
		timer := time.NewTimer(2 * closeTimeout)
		select {
		case <-removed:
			if c.sandboxErr != nil && why.word == "client-left" {
				why = &cause{word: "sandbox-failed", detail: c.sandboxErr}
			}
		case <-timer.C:
			// Said, not waited for: the removal goes on, and the backend's reaper comes after it.
			c.s.Slog.Error("a sandbox's start or removal does not end", "connection", c.id)
		}
		timer.Stop()
	}
	done := make(chan struct{})
	go func() { c.wg.Wait(); close(done) }()
	timer := time.NewTimer(finishTime)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		// Said, not waited for: a stuck goroutine must not keep the log open.
		c.s.Slog.Error("a connection's goroutines did not end", "connection", c.id)
	}
	end := auditlog.End{Cause: why.word}
	if why.detail != nil {
		end.Detail = authz.Printable(why.detail.Error(), 1000)
	}
	if err := c.rec.Close(&end); err != nil {
		c.s.Slog.Error("log's end", "connection", c.id, "error", err)
	}
	c.s.Metrics.ended.WithLabelValues(why.word).Inc()
	c.s.Slog.Info("connection ended", "connection", c.id, "source", c.source.String(),
		"user", authz.Printable(c.login.User, 64), "cause", why.word, "detail", end.Detail,
		"took", time.Since(c.started).Round(time.Millisecond).String())
}

// removeSandbox waits for the start's end, and removes what it started.
func (c *conn) removeSandbox() {
	<-c.sandboxDone
	if c.sandbox == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if err := c.sandbox.Close(ctx); err != nil {
		c.s.Slog.Error("sandbox removal", "connection", c.id, "sandbox", c.sandbox.ID(), "error", err)
	}
}

func (c *conn) info() SessionInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	return SessionInfo{
		ID: c.id, Gate: c.s.Gate, User: c.login.User, Source: c.source.String(), Ticket: c.decision.Ticket,
		Profile: c.decision.Profile, Sandbox: c.sandboxID, Started: c.started, Expires: c.decision.NotAfter,
	}
}
