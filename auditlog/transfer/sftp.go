package transfer

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// The bounds of an SFTP channel. With the content that is held ahead (maxAheadTotal) and a packet's head in each
// direction they are all that a channel can take of memory: about 12 MiB.
const (
	maxRequests = 4096    // unanswered; the client waits for more
	maxFiles    = 1024    // open
	maxState    = 4 << 20 // bytes of the events of open files and unanswered requests
	maxInjected = 64 << 10
)

// SFTP is one channel of SFTP version 3 (draft-ietf-secsh-filexfer-02) with the extensions of OpenSSH's PROTOCOL file,
// section 4. One goroutine feeds it what the client sends, another what the server sends; it writes to Config.Server and
// Config.Client what passes, as slices of what it was fed except around the heads of packets.
//
// One event is made per file, at the answer to its SSH_FXP_CLOSE, and per other operation, at its answer. SSH_FXP_STAT,
// LSTAT, FSTAT, READLINK, REALPATH and the extensions statvfs, fstatvfs, fsync, limits, expand-path, users-groups-by-id
// and home-directory pass unrecorded, and no rule is asked about them. Between the gate's look at a path's links and the
// server's use of it another process inside can change a directory into a link: Resolve stops a client, not that.
type SFTP struct {
	c Config

	client, server lane

	ahead atomic.Int64  // bytes held in all hashers
	kept  atomic.Uint64 // bytes handed to Content
	raw   atomic.Bool   // Undecodable was said, and there are no rules: all passes

	mu       sync.Mutex // guards all to the blank line; held for a packet's bookkeeping only
	cond     sync.Cond  // of mu: something was answered, injected, or ended
	requests map[uint32]request
	files    map[string]*file   // by handle
	live     map[*file]struct{} // files whose event is not made: open, or their CLOSE is unanswered
	state    int                // see maxState
	waiting  int                // goroutines in cond
	began    bool               // INIT was seen
	answered bool               // VERSION was seen
	progress uint64             // packets from the server
	injected []byte             // packets for the client, to be put in between
	said     bool               // Undecodable was said
	err      error              // the end

	queued atomic.Bool // there is something in injected
	out    sync.Mutex  // held while c.Client is written to, guards middle; taken before mu, never after it
	middle bool        // what was written to c.Client ends in the middle of a packet

	// The client's goroutine's own.
	ids  uint64 // of events
	home string // where relative paths begin
	up   passing
	down passing // the server's goroutine's own
}

// request is one that is unanswered.
type request struct {
	typ    byte
	file   *file  // of a handle
	offset uint64 // of READ and WRITE; the size of FSETSTAT; the greatest size of OPEN
	n      uint32 // of READ and WRITE; of an ask, which
	event  *Event // to be made at the answer
	ask    *ask   // it is the gate's own
}

// file is an open file or directory.
type file struct {
	event *Event
	max   uint64 // see Verdict.MaxSize

	writer hasher // the client's goroutine's until CLOSE was sent
	reader hasher // the server's goroutine's
	keptUp uint64 // likewise
	kept   uint64

	// Guarded by SFTP.mu.
	writes, reads ranges
	pending       int // unanswered requests
	closed        bool
	eof           uint64 // the smallest offset at which the server said end of file
	size          uint64 // as FSTAT said; noSize
	set           uint64 // as FSETSTAT set it; noSize
	copied        bool
	status        Status
	denied        bool
}

const noSize = math.MaxUint64

// passing is the content that passes in one direction.
type passing struct {
	file   *file
	offset uint64
	n      uint64
}

// ask is some questions of the gate's own.
type ask struct {
	replies []reply
	left    int
}

type reply struct {
	ok   bool // a name was given
	bad  bool // one that can't be
	name string
}

// errStopped is that the other direction is undecodable.
var errStopped = errors.New("stopped")

// NewSFTP returns a decoder for one channel.
func NewSFTP(c Config) *SFTP {
	s := &SFTP{c: c, requests: make(map[uint32]request), files: make(map[string]*file), live: make(map[*file]struct{})}
	s.cond.L = &s.mu
	if s.c.Timeout == 0 {
		s.c.Timeout = time.Minute
	}
	s.client = lane{dir: ToServer, head: clientHead, packet: s.fromClient, part: s.uploaded,
		packetEnd: func() error { s.endUpload(); return nil },
		write:     func(p []byte, _ bool) error { return s.toServer(p) },
		urgent:    func() bool { return false }}
	s.server = lane{dir: ToClient, head: serverHead, packet: s.fromServer, part: s.downloaded,
		packetEnd: s.endDownload, write: s.toClient, urgent: s.queued.Load}
	return s
}

// Client takes bytes from the client. It returns when they were passed on, or refused; it blocks while the writers
// block, while the gate waits for answers of its own (Config.Resolve), and while too many requests are unanswered. An
// error is the end of the channel in both directions.
func (s *SFTP) Client(p []byte) error { return s.feed(&s.client, p) }

// Server takes bytes from the server, like Client.
func (s *SFTP) Server(p []byte) error { return s.feed(&s.server, p) }

// Finish makes the events of what is unfinished. It waits for calls of Client and Server: what they write to must not
// block any more. They return an error from now on.
func (s *SFTP) Finish() error {
	s.fail(ErrFinished)
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	var events []*Event
	s.mu.Lock()
	for f := range s.live {
		f.event.Unfinished = true
		events = append(events, s.finished(f))
	}
	for _, r := range s.requests {
		if r.event != nil {
			r.event.Unfinished, r.event.End = true, s.c.now()
			events = append(events, r.event)
		}
	}
	clear(s.live)
	clear(s.requests)
	clear(s.files)
	s.mu.Unlock()
	slices.SortFunc(events, func(a, b *Event) int { return int(int64(a.ID) - int64(b.ID)) })
	var first error
	for _, e := range events {
		first = errors.Join(first, s.c.Event(e))
	}
	for _, l := range []*lane{&s.client, &s.server} {
		if !s.said && (len(l.hold) > 0 || l.left > 0) {
			s.said = true
			first = errors.Join(first, s.c.Event(s.undecodable(l, "the stream ends in the middle of a packet")))
		}
		if len(l.hold) > 0 {
			first = errors.Join(first, s.c.Raw(l.dir, l.offset(), l.hold))
		}
		l.hold, l.left = nil, 0
	}
	return first
}

func (s *SFTP) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	s.cond.Broadcast()
}

func (s *SFTP) failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *SFTP) feed(l *lane, p []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := s.failed()
	if err != nil {
		return err
	}
	l.buf, l.from, l.at = p, 0, 0
	err = l.run(s.raw.Load)
	var v violation
	if errors.As(err, &v) {
		if err = l.flush(); err == nil {
			err = s.violated(l, string(v))
		}
	}
	if (err == nil || errors.Is(err, errStopped)) && s.raw.Load() {
		err = s.pass(l)
	}
	l.base += uint64(len(p))
	l.buf, l.from, l.at = nil, 0, 0
	if err != nil {
		s.fail(err)
	}
	return err
}

func (s *SFTP) undecodable(l *lane, why string) *Event {
	now := s.c.now()
	return &Event{Kind: Undecodable, Detail: printable(why), Direction: l.dir, Offset: l.offset(), Start: now, End: now}
}

// violated says, once, that a stream does not keep to the protocol.
func (s *SFTP) violated(l *lane, why string) error {
	s.mu.Lock()
	said := s.said || s.err != nil
	s.said = true
	if s.c.Decide == nil {
		s.raw.Store(true)
	} else if s.err == nil {
		s.err = fmt.Errorf("sftp: %w: %s", ErrUndecodable, why)
	}
	err := s.err
	s.cond.Broadcast()
	s.mu.Unlock()
	if !said {
		err = errors.Join(err, s.c.Event(s.undecodable(l, why)))
	}
	return err
}

// pass hands on what is in the lane undecoded.
func (s *SFTP) pass(l *lane) error {
	if err := l.flush(); err != nil {
		return err
	}
	if l.drop { // an answer to the gate
		n := min(l.left, len(l.buf)-l.at)
		l.left -= n
		l.at += n
		l.from = l.at
		l.drop = l.left > 0
	}
	at := l.offset()
	for _, p := range [][]byte{l.hold, l.buf[l.at:]} {
		if len(p) == 0 {
			continue
		}
		if err := s.c.Raw(l.dir, at, p); err != nil {
			return err
		}
		if err := l.write(p, false); err != nil {
			return err
		}
		at += uint64(len(p))
	}
	l.hold, l.at = nil, len(l.buf)
	return nil
}

func (s *SFTP) toServer(p []byte) error {
	if _, err := s.c.Server.Write(p); err != nil {
		return fmt.Errorf("sftp: to the server: %w", err)
	}
	return nil
}

// toClient writes what comes from the server, and then, between packets, what was injected.
func (s *SFTP) toClient(p []byte, middle bool) error {
	s.out.Lock()
	err := s.writeClient(p)
	s.middle = middle
	if err == nil {
		err = s.drain()
	}
	s.out.Unlock()
	if err != nil {
		return err
	}
	return s.deliver() // what came while out was held
}

func (s *SFTP) writeClient(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	if _, err := s.c.Client.Write(p); err != nil {
		return fmt.Errorf("sftp: to the client: %w", err)
	}
	return nil
}

// inject sends a packet of the gate's own to the client, now or at the end of the packet that is on its way.
func (s *SFTP) inject(p []byte) error {
	s.mu.Lock()
	err := s.wait(func() bool { return len(s.injected) < maxInjected }, 0)
	if err == nil {
		s.injected = append(s.injected, p...)
		s.queued.Store(true)
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return s.deliver()
}

// deliver writes what was injected unless another goroutine is writing: that one will look again.
func (s *SFTP) deliver() error {
	for s.queued.Load() && s.out.TryLock() {
		middle := s.middle
		err := s.drain()
		s.out.Unlock()
		if err != nil || middle {
			return err
		}
	}
	return nil
}

// drain writes what was injected; out is held.
func (s *SFTP) drain() error {
	if s.middle || !s.queued.Load() {
		return nil
	}
	s.mu.Lock()
	p := s.injected
	s.injected = nil
	s.queued.Store(false)
	s.cond.Broadcast()
	s.mu.Unlock()
	return s.writeClient(p)
}

// wait waits with mu held until done or the end; with a timeout, no longer than that without a packet from the server.
func (s *SFTP) wait(done func() bool, timeout time.Duration) error {
	var expired bool
	if timeout > 0 && !done() {
		seen := s.progress
		var timer *time.Timer
		timer = time.AfterFunc(timeout, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.progress != seen {
				seen = s.progress
				timer.Reset(timeout)
				return
			}
			expired = true
			s.cond.Broadcast()
		})
		defer timer.Stop()
	}
	s.waiting++
	defer func() { s.waiting-- }()
	for {
		switch {
		case s.err != nil:
			return s.err
		case s.raw.Load():
			return errStopped
		case done():
			return nil
		case expired:
			return fmt.Errorf("sftp: %w", ErrTimeout)
		}
		s.cond.Wait()
	}
}

// add keeps a request until it is answered.
func (s *SFTP) add(id uint32, r request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.requests) >= maxRequests {
		s.mu.Unlock()
		err := s.client.flush() // or there will be no answers
		s.mu.Lock()
		if err != nil {
			return err
		}
		if err := s.wait(func() bool { return len(s.requests) < maxRequests }, 0); err != nil {
			return err
		}
	}
	if _, ok := s.requests[id]; ok {
		return violation("a request has the id of one that is unanswered")
	}
	if r.event != nil {
		if s.state += r.event.cost(); s.state > maxState {
			return violation("too many files and requests at once")
		}
		if (r.typ == fxpOpen || r.typ == fxpOpendir) && len(s.live) >= maxFiles {
			return violation("too many open files")
		}
	}
	if r.file != nil {
		r.file.pending++
	}
	s.requests[id] = r
	return nil
}

// cost is about the memory an event takes while it waits.
func (e *Event) cost() int {
	n := 1024
	for _, p := range []string{e.Path.Asked, e.Path.Resolved, e.Target.Asked, e.Target.Resolved, e.Detail} {
		n += len(p)
	}
	return n
}

// file is the open file with a handle.
func (s *SFTP) file(handle []byte) (*file, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files[string(handle)]
	if f == nil {
		return nil, violation("a handle that is not open")
	}
	return f, nil
}

// clientHead is lane.head of what the client sends: all of a packet but the content of a WRITE.
func clientHead(b []byte) (int, error) {
	n, err := announced(b)
	if n < 5 || err != nil || len(b) < 5 || b[4] != fxpWrite {
		return n, err
	}
	if len(b) < 13 {
		return min(n, 13), nil
	}
	r := reader{b: b[9:13]}
	handle := r.uint32()
	head := 13 + int(min(handle, maxHandle+1)) + 12
	if handle > maxHandle || head > n {
		return 0, violation("a WRITE that is none")
	}
	return head, nil
}

// serverHead is lane.head of what the server sends: all of a packet but the content of DATA, and the end of what can be
// long.
func serverHead(b []byte) (int, error) {
	n, err := announced(b)
	if err != nil || len(b) < 5 {
		return n, err
	}
	switch b[4] {
	case fxpData:
		if n < 13 {
			return 0, violation("DATA that is none")
		}
		return 13, nil
	case fxpName:
		return min(n, 4+1+4+4+4+maxPath), nil
	case fxpExtendedReply:
		return 9, nil
	}
	return n, nil
}

// announced is the length of a packet with its length field; less if b is too short to say.
func announced(b []byte) (int, error) {
	if len(b) < 5 {
		if len(b) < 4 {
			return 5, nil
		}
	}
	n := length(b)
	if n < 5 || n > maxPacket {
		return 0, violation(fmt.Sprintf("a packet of %d bytes", uint32(n)))
	}
	if len(b) < 5 {
		return 5, nil
	}
	return 4 + n, nil
}

// uploaded takes content of a WRITE.
func (s *SFTP) uploaded(p []byte) error {
	f := s.up.file
	f.writer.part(p)
	err := s.content(f, ToServer, s.up.offset, &f.keptUp, p)
	s.up.offset += uint64(len(p))
	return err
}

func (s *SFTP) endUpload() {
	if f := s.up.file; f != nil {
		f.writer.end()
		s.up.file = nil
	}
}

// downloaded takes content of DATA, or the end of a list.
func (s *SFTP) downloaded(p []byte) error {
	f := s.down.file
	if f == nil {
		return nil
	}
	f.reader.part(p)
	err := s.content(f, ToClient, s.down.offset, &f.kept, p)
	s.down.offset += uint64(len(p))
	return err
}

func (s *SFTP) endDownload() error {
	f := s.down.file
	if f == nil {
		return nil
	}
	s.down.file = nil
	f.reader.end()
	s.mu.Lock()
	f.reads.add(s.down.offset-s.down.n, s.down.offset)
	f.pending--
	e := s.done(f)
	s.mu.Unlock()
	if e == nil {
		return nil
	}
	return s.c.Event(e)
}

// content hands p to Config.Content as far as the limits go.
func (s *SFTP) content(f *file, d Direction, offset uint64, kept *uint64, p []byte) error {
	if s.c.Mode != ContentFull || s.c.Content == nil || *kept >= s.c.FileLimit {
		return nil
	}
	n := min(uint64(len(p)), s.c.FileLimit-*kept)
	total := s.kept.Add(n)
	if total > s.c.SessionLimit {
		over := min(total-s.c.SessionLimit, n)
		s.kept.Add(-over)
		n -= over
	}
	if n == 0 {
		return nil
	}
	*kept += n
	return s.c.Content(f.event.ID, d, offset, p[:n])
}

// done is the event of a file that is closed, with nothing unanswered; mu is held.
func (s *SFTP) done(f *file) *Event {
	if !f.closed || f.pending > 0 {
		return nil
	}
	if _, ok := s.live[f]; !ok {
		return nil
	}
	delete(s.live, f)
	s.state -= f.event.cost()
	return s.finished(f)
}

// finished fills in a file's event.
func (s *SFTP) finished(f *file) *Event {
	e := f.event
	e.End = s.c.now()
	e.Status, e.Denied = f.status, f.denied
	e.Read, e.Written = flow(&f.reads, &f.reader), flow(&f.writes, &f.writer)
	e.Read.Kept, e.Written.Kept = f.kept, f.keptUp
	f.reader.stop()
	f.writer.stop()
	if e.Kind == List {
		e.Read = Flow{Bytes: f.reads.bytes}
		return e
	}
	r := &e.Read
	if n, ok := r.length(); ok && (f.eof == n || f.size == n && n > 0) {
		if n == 0 && s.c.Mode != ContentNone {
			r.SHA256 = sumOfNothing()
		}
		r.Whole = r.SHA256 != nil
	}
	fresh := e.Flags&FlagTruncate != 0 || e.Flags&(FlagCreate|FlagExclusive) == FlagCreate|FlagExclusive
	w := &e.Written
	if e.Flags&(FlagWrite|FlagAppend) == FlagWrite && !f.copied && w.Contiguous &&
		(f.set == w.Bytes || f.set == noSize && fresh) && (w.Bytes > 0 || fresh) {
		if w.Bytes == 0 && s.c.Mode != ContentNone && f.writer.next == 0 {
			w.SHA256 = sumOfNothing()
		}
		w.Whole = w.SHA256 != nil
	}
	return e
}
