package sshserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

const (
	resolveTime = 10 * time.Second // for a name's addresses
	dialTime    = 10 * time.Second // for a connection to one address
	dialAll     = 30 * time.Second // to all of them
	listenTime  = 10 * time.Second // for a listener
	cutTime     = time.Second      // for the two directions to stop, once a connection is cut off

	forwardBuffer = 32 << 10 // of a direction: the largest packet of x/crypto

	firstDisplay = 10 // of X11, as sshd's X11DisplayOffset
	displays     = 64 // that are tried
)

// Tests change these.
var (
	offerTime  = 30 * time.Second // for a client to take a connection that was made inside
	lingerTime = 30 * time.Second // without progress, for the sandbox to take what a client sent before it closed the channel
)

// Results of an auditlog.Forward.
const (
	resultEnded  = "ended"
	resultFailed = "failed"
	resultCut    = "cut-off"
)

var (
	errCancelled    = errors.New("the client cancelled it")
	errSessionEnded = errors.New("its session ended")
	errOnce         = errors.New("it was for one connection")
)

// forward is one forwarded connection: a channel on the client's side, and a connection inside the sandbox. It takes a
// place among the connection's channels until the client has closed its side. Its life:
//
//  1. A client asks for it (direct): what it asks for is decoded, resolved inside, decided, recorded, and only then
//     dialled. Or it was made inside (inbound): then it is recorded, and offered to the client.
//  2. carry passes bytes both ways, and each direction's end by itself.
//  3. Its ends close it, or its context ends: policy does not permit it any more, or the SSH connection ends.
//  4. end records what passed and why it ended.
type forward struct {
	c      *conn
	id     uint32
	ctx    context.Context
	cancel context.CancelCauseFunc

	question *authz.RequestInput // that was admitted, and is asked again after a change; guarded by c.mu
	by       *listener           // of a connection made inside

	rec         auditlog.Forward
	in, out     atomic.Uint64
	first, last atomic.Int64 // byte, Unix nanoseconds

	mu    sync.RWMutex // guards ended; held for reading while data is recorded, so that none is after the end
	ended bool
	keeps [2]*keep // by stream; nil: content is not kept
}

// newForward takes a place; c.mu is held. nil: there is none.
func (c *conn) newForward(id uint32, kind string) *forward {
	if len(c.sessions)+len(c.forwards) >= c.s.Config.MaxChannels {
		return nil
	}
	f := &forward{c: c, id: id, rec: auditlog.Forward{Type: kind}}
	f.ctx, f.cancel = context.WithCancelCause(c.ctx)
	c.forwards[id] = f
	return f
}

// leave gives the place back.
func (f *forward) leave() {
	f.cancel(nil)
	f.c.mu.Lock()
	defer f.c.mu.Unlock()
	delete(f.c.forwards, f.id)
}

// attempt is one way to a target.
type attempt struct {
	question         authz.RequestInput
	network, address string
}

// direct serves a channel that the client asked for, once the global requests before it have taken effect: its target may be
// a listener of theirs.
func (f *forward) direct(nc ssh.NewChannel, before <-chan struct{}) {
	defer f.leave()
	select {
	case <-before:
	case <-f.ctx.Done():
	}
	open := auditlog.ChannelOpen{Type: f.rec.Type}
	attempts, reason, err := f.admit(nc.ExtraData(), &open)
	if err != nil {
		open.Error = authz.Printable(err.Error(), 500)
	}
	if errors.Is(err, errMalformed) {
		extra := nc.ExtraData()
		open.Extra = extra[:min(len(extra), 1024)]
	}
	if f.c.record(f.id, &open) != nil {
		return
	}
	if err != nil {
		nc.Reject(reason, f.refusal(err))
		return
	}
	f.c.touch()
	inside, reason, err := f.dial(attempts)
	if err != nil {
		f.end(resultFailed, err)
		nc.Reject(reason, f.refusal(err))
		return
	}
	ch, reqs, err := nc.Accept()
	if err != nil { // the connection is closed
		inside.Close()
		f.end(resultCut, context.Cause(f.ctx))
		return
	}
	f.carry(ch, reqs, inside)
}

// refusal is what a client reads.
func (f *forward) refusal(err error) string {
	if errors.Is(err, errMalformed) {
		return "malformed request"
	}
	return userText(err, f.c.id)
}

// admit decodes what a client asks for and has policy decide. The attempts are those that policy admits.
func (f *forward) admit(extra []byte, open *auditlog.ChannelOpen) ([]attempt, ssh.RejectionReason, error) {
	if f.rec.Type == typeDirectUnix {
		q, err := parseDirectUnix(extra)
		open.Target = authz.Printable(q.Path, maxSocketPath)
		f.rec.Target = open.Target
		if err == nil {
			err = f.c.permitted(f.ctx, q)
		}
		return []attempt{{q, "unix", q.Path}}, ssh.Prohibited, err
	}
	q, originator, err := parseDirectTCP(extra)
	if err != nil {
		return nil, ssh.Prohibited, err
	}
	port := strconv.Itoa(int(q.Port))
	open.Originator = originator
	open.Target = net.JoinHostPort(q.Host+q.Address, port) // one of the two is empty
	f.rec.Target, f.rec.Originator = open.Target, originator
	refused := f.c.permitted(f.ctx, q)
	if q.Host == "" {
		return []attempt{{q, "tcp", open.Target}}, ssh.Prohibited, refused
	}
	if refused != nil && len(f.c.permit().Forward) == 0 {
		return nil, ssh.Prohibited, refused // no address could change that: nobody's name servers need know the name
	}
	addrs, reason, err := f.resolve(q.Host)
	if err != nil {
		return nil, reason, err
	}
	var attempts []attempt
	for _, addr := range addrs {
		q.Address = addr
		if refused = f.c.permitted(f.ctx, q); refused != nil {
			continue
		}
		attempts = append(attempts, attempt{q, "tcp", net.JoinHostPort(addr, port)})
		open.Addresses = append(open.Addresses, addr)
	}
	if len(attempts) == 0 {
		return nil, ssh.Prohibited, refused
	}
	return attempts, 0, nil
}

// resolve gives a name's addresses inside.
func (f *forward) resolve(host string) ([]string, ssh.RejectionReason, error) {
	dialer, err := power[backends.Dialer](f.ctx, f.c)
	if err != nil {
		return nil, ssh.ConnectionFailed, err
	}
	ctx, cancel := context.WithTimeout(f.ctx, resolveTime)
	defer cancel()
	addrs, err := dialer.Resolve(ctx, host)
	var texts []string
	for _, a := range addrs[:min(len(addrs), backends.MaxAddresses)] {
		if text := a.Unmap().String(); a.IsValid() && a.Zone() == "" && !slices.Contains(texts, text) {
			texts = append(texts, text)
		}
	}
	if err == nil && len(texts) == 0 {
		err = errors.New("no address")
	}
	if err != nil {
		return nil, ssh.ConnectionFailed, &UserError{Text: host + " has no address in the sandbox's network", Err: err}
	}
	return texts, 0, nil
}

// power gives the connection's sandbox as one that can do more than run processes. It waits for its start.
func power[T any](ctx context.Context, c *conn) (T, error) {
	var none T
	sb, err := c.ready(ctx)
	if err != nil {
		return none, &UserError{Text: startFailure(err), Err: err}
	}
	p, ok := sb.(T)
	if !ok {
		return none, &UserError{Text: "sandboxes of this gate can't forward connections"}
	}
	return p, nil
}

// dial connects to the first of the attempts that answers. Names are not looked up again: an address that was admitted is
// what is connected to.
func (f *forward) dial(attempts []attempt) (net.Conn, ssh.RejectionReason, error) {
	dialer, err := power[backends.Dialer](f.ctx, f.c)
	if err != nil {
		return nil, ssh.ConnectionFailed, err
	}
	all, stop := context.WithTimeout(f.ctx, dialAll)
	defer stop()
	for _, a := range attempts {
		// A change of policy since it was admitted finds the question here, or the answer is by the new one.
		f.c.mu.Lock()
		f.question = &a.question
		f.c.mu.Unlock()
		if err = f.c.permitted(f.ctx, a.question); err != nil {
			return nil, ssh.Prohibited, err
		}
		f.rec.Address = authz.Printable(a.address, maxSocketPath)
		ctx, cancel := context.WithTimeout(all, dialTime)
		var inside net.Conn
		inside, err = dialer.DialContext(ctx, a.network, a.address)
		cancel()
		if err == nil {
			if f.ctx.Err() == nil {
				return inside, 0, nil
			}
			inside.Close()
		}
		if f.ctx.Err() != nil {
			return nil, ssh.Prohibited, context.Cause(f.ctx)
		}
		if all.Err() != nil {
			break
		}
	}
	return nil, ssh.ConnectionFailed, &UserError{Text: "the connection to " + f.rec.Target + " " + dialFailure(err), Err: err}
}

// dialFailure says in a client's words why there is no connection.
func dialFailure(err error) string {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return "was refused there"
	case errors.Is(err, syscall.EHOSTUNREACH):
		return "failed: there is no way to it from the sandbox's network"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return "failed: no answer"
	}
	return "failed"
}

// inbound serves a connection that was made inside, to what is forwarded to the client.
func (f *forward) inbound(l *listener, inside net.Conn) {
	defer f.leave()
	defer inside.Close()
	originator, port := originatorOf(inside)
	f.rec.Target, f.rec.Originator = l.address, originatorText(originator, port)
	f.rec.Address = l.address
	kind, extra := l.channel(originator, port)
	f.rec.Type = kind
	if f.c.record(f.id, &auditlog.ChannelOpen{Type: kind, Target: l.address, Originator: f.rec.Originator, Session: l.session}) != nil {
		return
	}
	f.c.touch()
	type answer struct {
		ch   ssh.Channel
		reqs <-chan *ssh.Request
		err  error
	}
	answered := make(chan answer, 1)
	f.c.spawn(func() { // ends with the client's answer, or with the connection
		ch, reqs, err := f.c.sc.OpenChannel(kind, extra)
		answered <- answer{ch, reqs, err}
	})
	timer := time.NewTimer(offerTime)
	defer timer.Stop()
	result, why := resultFailed, errors.New("the client did not answer")
	select {
	case a := <-answered:
		if a.err != nil {
			f.end(resultFailed, fmt.Errorf("the client refused it: %w", a.err))
			return
		}
		f.carry(a.ch, a.reqs, inside)
		return
	case <-timer.C:
	case <-f.ctx.Done():
		result, why = resultCut, context.Cause(f.ctx)
	}
	inside.Close()
	f.end(result, why)
	// Its place stays taken until the client says something.
	if a := <-answered; a.err == nil {
		a.ch.Close()
		for range a.reqs { // until the client closes it too
		}
	}
}

// originatorOf is where a connection came from, as the agent tells it.
func originatorOf(inside net.Conn) (string, uint32) {
	if a := inside.RemoteAddr(); a != nil {
		if ap, err := netip.ParseAddrPort(a.String()); err == nil && ap.Port() > 0 {
			return ap.Addr().Unmap().WithZone("").String(), uint32(ap.Port())
		}
	}
	return unknownOriginator, unknownOriginatorAt
}

// carry passes bytes until both directions have ended or the connection is cut off, and waits for the client to close the
// channel.
func (f *forward) carry(ch ssh.Channel, reqs <-chan *ssh.Request, inside net.Conn) {
	if permit := f.c.permit(); permit.ForwardContent == forwardFull {
		for i := range f.keeps {
			f.keeps[i] = newKeep(f.c, f.id, auditlog.Stream(i), dataLimit(permit))
		}
	}
	closed := make(chan struct{})
	f.c.spawn(func() {
		defer close(closed)
		for req := range reqs { // there is no request for such a channel; PuTTY sends some to measure the line
			if f.c.limit.Wait(f.c.ctx) == nil {
				req.Reply(false, nil)
			}
		}
	})
	up, down := make(chan passed, 1), make(chan passed, 1)
	f.c.spawn(func() { up <- f.pass(inside, ch, auditlog.Input) })
	f.c.spawn(func() { down <- f.pass(ch, inside, auditlog.Output) })

	result, why := resultEnded, error(nil)
	client := closed
	linger := time.NewTimer(0)
	defer linger.Stop()
	<-linger.C
	var taken uint64
	upDone, downDone := false, false
	for !(upDone && downDone) && result == resultEnded {
		select {
		case p := <-up:
			upDone = true
			if p.write != nil && why == nil { // it may have more to say all the same
				why = fmt.Errorf("it took no more: %w", p.write)
			}
			if client == nil {
				inside.Close() // nobody takes what it says
			}
		case p := <-down:
			downDone = true
			if p.read != nil && client != nil {
				result, why = resultCut, p.read
			}
		case <-client: // it takes no more, but what it sent before is on its way
			client = nil
			if upDone {
				inside.Close()
				continue
			}
			taken = f.in.Load()
			linger.Reset(lingerTime)
		case <-linger.C:
			if n := f.in.Load(); n != taken {
				taken = n
				linger.Reset(lingerTime)
				continue
			}
			result, why = resultCut, errors.New("what the client sent last was not taken")
		case <-f.ctx.Done():
			result, why = resultCut, context.Cause(f.ctx)
		}
	}
	inside.Close()
	// In a goroutine, as it waits for a client that takes nothing at all.
	f.c.spawn(func() { ch.Close() })
	stop := time.NewTimer(cutTime)
	defer stop.Stop()
	for late := false; !(upDone && downDone) && !late; {
		select {
		case <-up:
			upDone = true
		case <-down:
			downDone = true
		case <-stop.C: // it waits for the client, and passes nothing more
			late = true
		}
	}
	f.end(result, why)
	<-closed // the client's memory and its number are taken until then
	f.c.record(f.id, &auditlog.ChannelClose{Input: f.in.Load(), Output: f.out.Load()})
}

// passed is how a direction ended; both are nil after an EOF that was handed on.
type passed struct{ read, write error }

// pass hands on one direction, recorded first, and its end.
func (f *forward) pass(to io.Writer, from io.Reader, stream auditlog.Stream) passed {
	k, count := f.keeps[stream], &f.in
	if stream == auditlog.Output {
		count = &f.out
	}
	buf := make([]byte, 4<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			now := time.Now().UnixNano()
			f.first.CompareAndSwap(0, now)
			f.last.Store(now)
			f.c.active.Store(now)
			if lost := f.keep(k, buf[:n]); lost != nil {
				return passed{write: lost}
			}
			w, werr := to.Write(buf[:n])
			count.Add(uint64(w))
			if werr != nil {
				return passed{write: werr}
			}
		}
		if errors.Is(err, io.EOF) {
			if k != nil && f.keep(k, nil) == nil {
				k.eof()
			}
			if half, ok := to.(interface{ CloseWrite() error }); ok {
				half.CloseWrite()
			}
			return passed{}
		}
		if err != nil {
			return passed{read: err}
		}
		if n == len(buf) && n < forwardBuffer {
			buf = make([]byte, forwardBuffer)
		}
	}
}

// keep records content, if it is kept; nothing after the end.
func (f *forward) keep(k *keep, p []byte) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.ended {
		return io.ErrClosedPipe
	}
	if k == nil {
		return nil
	}
	return k.record(p)
}

// end records what passed, and why nothing more does.
func (f *forward) end(result string, why error) {
	f.mu.Lock()
	f.ended = true
	f.mu.Unlock()
	for _, k := range f.keeps {
		if k != nil {
			k.end()
		}
	}
	rec := f.rec
	rec.Input, rec.Output, rec.Result = f.in.Load(), f.out.Load(), result
	if first := f.first.Load(); first != 0 {
		rec.First, rec.Last = time.Unix(0, first).UTC(), time.Unix(0, f.last.Load()).UTC()
	}
	if why != nil {
		rec.Detail = authz.Printable(why.Error(), 500)
	}
	f.c.record(f.id, &rec)
}

// listener takes connections inside for the client: at one address, or at the two of localhost.
type listener struct {
	c       *conn
	request listenRequest // of a global request
	rec     auditlog.Forward
	session uint32 // the session channel it belongs to, 0: the connection
	single  bool   // for one connection

	questions []authz.RequestInput // that were admitted, and are asked again after a change

	address string // that is listened on, of several the first
	port    uint32
	inside  []net.Listener
	// channel says what is opened towards the client for a connection.
	channel func(originator string, port uint32) (kind string, extra []byte)

	refused bool // by policy, after a change: no connection is taken any more; guarded by c.mu

	ctx    context.Context
	cancel context.CancelCauseFunc
	taken  atomic.Uint64
	done   chan struct{} // closed when it has ended and that is recorded
}

// newListener takes a place for a listener, which close or serve gives back.
func (c *conn) newListener(kind, target string, session uint32, questions []authz.RequestInput) (*listener, error) {
	l := &listener{c: c, rec: auditlog.Forward{Type: kind, Target: target}, session: session, questions: questions, done: make(chan struct{})}
	c.mu.Lock()
	defer c.mu.Unlock()
	open := 0
	for other := range c.listeners {
		open += len(other.questions)
	}
	if open+len(questions) > backends.MaxListeners {
		return nil, &UserError{Text: fmt.Sprintf("%d addresses are listened on, the most allowed", backends.MaxListeners)}
	}
	l.ctx, l.cancel = context.WithCancelCause(c.ctx)
	c.listeners[l] = true
	return l, nil
}

// listen has policy decide and listens. What has failed leaves nothing.
func (l *listener) listen(network string, address func(authz.RequestInput) string) (err error) {
	defer func() {
		if err != nil {
			l.drop()
		}
	}()
	// They are in c.listeners: a change of policy finds them there, or the answer is by the new one.
	for _, q := range l.questions {
		if err := l.c.permitted(l.ctx, q); err != nil {
			return err
		}
	}
	lr, err := power[backends.Listener](l.ctx, l.c)
	if err != nil {
		return err
	}
	for i, q := range l.questions {
		ctx, cancel := context.WithTimeout(l.ctx, listenTime)
		ln, err := lr.Listen(ctx, network, address(q))
		cancel()
		switch {
		case err == nil:
			l.inside = append(l.inside, ln)
		case i == 0:
			return err
		default:
			continue // there may be no IPv6 inside, or something of the sandbox's own listens there
		}
		if i > 0 {
			continue
		}
		l.address = authz.Printable(ln.Addr().String(), maxSocketPath)
		if ap, err := netip.ParseAddrPort(ln.Addr().String()); err == nil {
			l.port = uint32(ap.Port())
		}
		l.rec.Address = l.address
	}
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	return nil
}

// drop closes what listens and gives the place back.
func (l *listener) drop() {
	l.cancel(nil)
	l.close()
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	delete(l.c.listeners, l)
}

func (l *listener) close() {
	for _, ln := range l.inside {
		ln.Close()
	}
}

// serve takes connections until the listener is closed, and records its end.
func (l *listener) serve() {
	defer close(l.done)
	stop := context.AfterFunc(l.ctx, l.close)
	defer stop()
	ends := make(chan error, len(l.inside))
	for _, ln := range l.inside {
		l.c.spawn(func() { ends <- l.accept(ln) })
	}
	rec := &l.rec
	rec.Result = resultEnded
	for range l.inside {
		select {
		case err := <-ends:
			if err != nil && l.ctx.Err() == nil {
				rec.Result, rec.Detail = resultCut, authz.Printable(err.Error(), 500)
			}
		case <-l.ctx.Done():
		}
	}
	if why := context.Cause(l.ctx); why != nil {
		rec.Detail = authz.Printable(why.Error(), 500)
		if !errors.Is(why, errCancelled) && !errors.Is(why, errSessionEnded) && !errors.Is(why, errOnce) {
			rec.Result = resultCut
		}
	}
	l.drop()
	rec.Connections = l.taken.Load()
	l.c.record(l.session, rec)
}

func (l *listener) accept(ln net.Listener) error {
	for {
		inside, err := ln.Accept()
		if err != nil {
			return err
		}
		// What runs inside can make connections as fast as it likes; each costs a record.
		if l.c.opens.Wait(l.ctx) != nil {
			inside.Close()
			return nil
		}
		l.taken.Add(1)
		l.take(inside)
		if l.single {
			l.cancel(errOnce)
			return nil
		}
	}
}

// take offers a connection to the client.
func (l *listener) take(inside net.Conn) {
	c := l.c
	kind, _ := l.channel("", 0)
	c.mu.Lock()
	if l.refused {
		c.mu.Unlock()
		inside.Close()
		return
	}
	c.channels++
	id := c.channels
	f := c.newForward(id, kind)
	if f != nil {
		f.by, f.question = l, &l.questions[0]
	}
	c.mu.Unlock()
	if f == nil {
		inside.Close()
		c.record(id, &auditlog.ChannelOpen{Type: kind, Target: l.address, Session: l.session,
			Error: fmt.Sprintf("%d channels are open, the most allowed", c.s.Config.MaxChannels)})
		return
	}
	c.spawn(func() { f.inbound(l, inside) })
}

// cut ends the listener and the connections that it took: policy does not permit it any more.
func (l *listener) cut(why error) {
	l.cancel(why)
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	l.refused = true
	for _, f := range l.c.forwards {
		if f.by == l {
			f.cancel(why)
		}
	}
}

// listenFor serves a tcpip-forward or a streamlocal-forward@openssh.com. It listens when it returns a listener; its
// connections are taken once serve is called.
func (c *conn) listenFor(req *ssh.Request, rec *auditlog.Request) (l *listener, answer []byte, err error) {
	parse, network := parseListenTCP, "tcp"
	if req.Type == typeListenUnix {
		parse, network = parseListenUnix, "unix"
	}
	asked, err := parse(req.Payload)
	rec.Name = asked.target()
	if err != nil {
		return nil, nil, err
	}
	questions, err := asked.questions()
	if err != nil {
		return nil, nil, err
	}
	if l, err = c.newListener(asked.kind, rec.Name, 0, questions); err != nil {
		return nil, nil, err
	}
	l.request = asked
	err = l.listen(network, func(q authz.RequestInput) string {
		if asked.kind == typeListenUnix {
			return q.Path
		}
		port := uint64(q.Port)
		if port == 0 && l.port != 0 {
			port = uint64(l.port) // the second address gets the port of the first
		}
		return net.JoinHostPort(q.Address, strconv.FormatUint(port, 10))
	})
	if err != nil {
		return nil, nil, err
	}
	rec.Value = l.address
	l.channel = func(originator string, port uint32) (string, []byte) {
		if asked.kind == typeListenUnix {
			return typeForwardedUnix, ssh.Marshal(forwardedUnixMsg{Path: asked.path})
		}
		// The address as the client wrote it, the port that it got: it compares them (RFC 4254, section 7.2).
		return typeForwardedTCP, ssh.Marshal(directTCPMsg{asked.host, l.port, originator, port})
	}
	if asked.kind == typeListenTCP && asked.port == 0 {
		answer = ssh.Marshal(struct{ Port uint32 }{l.port})
	}
	return l, answer, nil
}

// cancelListener serves a cancel-tcpip-forward or a cancel-streamlocal-forward@openssh.com. Connections that were taken go on.
func (c *conn) cancelListener(req *ssh.Request, rec *auditlog.Request) error {
	parse := parseListenTCP
	if req.Type == typeCancelUnix {
		parse = parseListenUnix
	}
	asked, err := parse(req.Payload)
	rec.Name = asked.target()
	if err != nil {
		return err
	}
	var found *listener
	c.mu.Lock()
	for l := range c.listeners {
		r := l.request
		if l.session == 0 && r.kind == asked.kind && r.host == asked.host && r.path == asked.path &&
			(asked.kind == typeListenUnix || l.port == asked.port && asked.port != 0) {
			found = l
		}
	}
	c.mu.Unlock()
	if found == nil {
		return errors.New("nothing is listened on there")
	}
	found.cancel(errCancelled)
	select {
	case <-found.done:
	case <-c.ctx.Done():
	}
	return nil
}

// narrowed asks policy again about all that is forwarded, each time the decision has changed, and ends what it refuses.
func (c *conn) narrowed() {
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-c.changed:
		}
		type open struct {
			question authz.RequestInput
			cut      func(why error)
		}
		var all []open
		c.mu.Lock()
		for _, f := range c.forwards {
			if f.question != nil {
				all = append(all, open{*f.question, f.cancel})
			}
		}
		for l := range c.listeners {
			for _, q := range l.questions {
				all = append(all, open{q, l.cut})
			}
		}
		c.mu.Unlock()
		for _, o := range all {
			err := c.permitted(c.ctx, o.question)
			var undecided *UserError
			if errors.As(err, &undecided) && undecided.Err != nil { // one failure may be a machine that is busy
				err = c.permitted(c.ctx, o.question)
			}
			if c.ctx.Err() != nil {
				return
			}
			if err != nil {
				o.cut(fmt.Errorf("policy has changed: %w", err))
			}
		}
	}
}

// sessionForwards makes what a session asked for before its program: a socket for its agent, a display. What can't be made
// is said and recorded, and the program runs without it. stop ends them.
func (s *session) sessionForwards(p *backends.Process) (stop func()) {
	var made []*listener
	failed := func(kind string, err error) {
		s.c.s.Slog.Warn("forwarding", "connection", s.c.id, "channel", s.id, "request", kind, "error", err)
		s.c.record(s.id, &auditlog.Forward{Type: kind, Result: resultFailed, Detail: authz.Printable(err.Error(), 500)})
		text := fmt.Sprintf("sallyport: %s failed: %s\r\n", kind, userText(err, s.c.id))
		if s.terminal != nil {
			s.notice(text)
		} else {
			io.WriteString(s.ch.Stderr(), text)
		}
	}
	start := func(l *listener) {
		made = append(made, l)
		s.c.spawn(l.serve)
	}
	if s.agent {
		if l, err := s.listenForAgent(); err != nil {
			failed(typeAgentRequest, err)
		} else {
			p.Env = append(p.Env, "SSH_AUTH_SOCK="+l.address)
			start(l)
		}
	}
	if s.x11 != nil {
		if l, err := s.listenForX11(); err != nil {
			failed(typeX11Request, err)
		} else {
			p.X11 = s.x11
			start(l)
		}
	}
	return func() {
		for _, l := range made {
			l.cancel(errSessionEnded)
		}
		for _, l := range made {
			select {
			case <-l.done:
			case <-s.c.ctx.Done():
			}
		}
	}
}

func (s *session) listenForAgent() (*listener, error) {
	l, err := s.c.newListener(typeAgentRequest, "", s.id, []authz.RequestInput{{Type: typeAgentRequest}})
	if err != nil {
		return nil, err
	}
	l.channel = func(string, uint32) (string, []byte) { return typeAgentChannel, nil }
	return l, l.listen("unix", func(authz.RequestInput) string { return "" })
}

func (s *session) listenForX11() (l *listener, err error) {
	for display := firstDisplay; display < firstDisplay+displays && s.ctx.Err() == nil; display++ {
		if l, err = s.c.newListener(typeX11Request, "", s.id, []authz.RequestInput{{Type: typeX11Request}}); err != nil {
			return nil, err
		}
		l.single = s.x11Single
		l.channel = func(originator string, port uint32) (string, []byte) {
			return typeX11Channel, ssh.Marshal(x11ChannelMsg{originator, port})
		}
		err = l.listen("tcp", func(authz.RequestInput) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(6000+display)) })
		if err == nil {
			s.x11.Display = display
			return l, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, err
		}
	}
	return nil, &UserError{Text: "there is no free display", Err: err}
}
