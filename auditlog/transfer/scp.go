package transfer

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"math"
	"strconv"
	"strings"
	"sync"
)

const (
	maxSCPLine  = 8192 // a message with its newline
	maxSCPDepth = 256  // of directories
	maxSCPAhead = 8192 // bytes of answers to what was not said yet
)

// SCP is one channel of the protocol of scp and rcp, which no standard describes: the source sends messages C (a file),
// D and E (a directory and its end), T (times) and the files' contents, and the sink answers each with a byte 0, or 1 or
// 2 and a line of text; see source and sink in OpenSSH's scp.c. Which side is the source says the command line
// ([SCPCommand]). One goroutine feeds it what the client sends, another what the server sends.
//
// What follows a message depends on its answer. So the source's bytes are held back until the answer has come, and the
// sink's until something was said, whether they wait themselves or not. One event is made per file, at the answer to its
// end, and a [Mkdir] per directory; an error that a side tells of no file in particular is a [File] without a name. The
// names on the sink's disk are not known (see [Event.Path]), and symbolic links are not resolved, as scp has no words
// to ask: where rules are about paths, scp must be refused as a whole.
//
// What Decide refuses is answered with an error to both sides; the source then goes on with its next file.
type SCP struct {
	c            Config
	cmd          SCPCommand
	source, sink scpLane

	mu     sync.Mutex // guards all to the blank line
	cond   sync.Cond  // of mu: an answer came, or the end
	expect byte       // what an answer is awaited for: 'S' the start, a message's letter, 'F' a file's end; 0 for nothing
	ahead  []byte     // the sink's bytes that are not used, and not passed on
	state  scpState
	dirs   []string
	file   *Event // that was announced or is passing
	left   uint64 // of its content
	times  *Attrs // of the last T
	ids    uint64
	raw    bool // Undecodable was said, and there are no rules
	said   bool
	err    error // the end

	// The source's goroutine's own.
	line []byte // an incomplete message
	hash hash.Hash
	kept uint64 // of the session
}

// scpLane is one direction.
type scpLane struct {
	dir    Direction
	mu     sync.Mutex // one call at a time
	offset uint64     // decoded, or passed raw; the sink's is guarded by SCP.mu
}

type scpState uint8

const (
	scpMessage scpState = iota // at the beginning of a message
	scpContent                 // in a file
	scpEnd                     // after its last byte: 0, or an error
)

// NewSCP returns a decoder for the channel of a program with that command line. Config.Resolve has no meaning to it.
func NewSCP(c Config, cmd SCPCommand) *SCP {
	s := &SCP{c: c, cmd: cmd, expect: 'S'}
	s.cond.L = &s.mu
	s.source.dir, s.sink.dir = ToServer, ToClient
	if !cmd.Sink {
		s.source.dir, s.sink.dir = ToClient, ToServer
	}
	return s
}

// Client takes bytes from the client; see SFTP.Client.
func (s *SCP) Client(p []byte) error {
	if s.cmd.Sink {
		return s.fromSource(p)
	}
	return s.fromSink(p)
}

// Server takes bytes from the server; see SFTP.Client.
func (s *SCP) Server(p []byte) error {
	if s.cmd.Sink {
		return s.fromSink(p)
	}
	return s.fromSource(p)
}

// Finish makes the events of what is unfinished; see SFTP.Finish. What the sink said at the end passes first.
func (s *SCP) Finish() error {
	s.mu.Lock()
	live := s.err == nil
	if live {
		s.err = ErrFinished
	}
	s.cond.Broadcast()
	s.mu.Unlock()
	s.source.mu.Lock()
	defer s.source.mu.Unlock()
	s.sink.mu.Lock()
	defer s.sink.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if live && !s.raw && len(s.ahead) > 0 {
		if text, n := scpAnswer(s.ahead); n > 0 && s.ahead[0] != 0 { // why the sink gave up
			if s.file == nil {
				s.file = s.event(File, "")
			}
			s.file.Status = Status{StatusFailure, printable(text)}
		}
		if s.cmd.Sink { // the server has said all; the client reads on
			s.write(s.sink.dir, s.ahead)
		}
	}
	if e := s.file; e != nil {
		e.Unfinished = true
		err = errors.Join(err, s.c.Event(s.finished(e)))
	}
	if !s.said && len(s.line) > 0 {
		s.said = true
		err = errors.Join(err, s.c.Event(s.undecodable(s.source.dir, s.source.offset, "the stream ends in a message")),
			s.c.Raw(s.source.dir, s.source.offset, s.line))
	}
	s.file, s.line, s.ahead = nil, nil, nil
	return err
}

// fail keeps the first error.
func (s *SCP) fail(err error) error {
	if err == nil || errors.Is(err, errStopped) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	s.cond.Broadcast()
	return err
}

func (s *SCP) write(d Direction, p []byte) error {
	w := s.c.Server
	if d == ToClient {
		w = s.c.Client
	}
	if _, err := w.Write(p); err != nil {
		return fmt.Errorf("scp: %s: %w", d, err)
	}
	return nil
}

func (s *SCP) undecodable(d Direction, offset uint64, why string) *Event {
	now := s.c.now()
	return &Event{Kind: Undecodable, Detail: printable(why), Direction: d, Offset: offset, Start: now, End: now,
		Path: Path{Asked: s.cmd.asked()}}
}

// violated says, once, that a stream does not keep to the protocol.
func (s *SCP) violated(d Direction, offset uint64, why string) error {
	s.mu.Lock()
	said := s.said
	s.said = true
	if s.c.Decide == nil {
		s.raw = true
	} else if s.err == nil {
		s.err = fmt.Errorf("scp: %w: %s", ErrUndecodable, why)
	}
	err := s.err
	s.cond.Broadcast()
	s.mu.Unlock()
	if !said {
		err = errors.Join(err, s.c.Event(s.undecodable(d, offset, why)))
	}
	return err
}

// pass hands on bytes undecoded.
func (s *SCP) pass(d Direction, offset *uint64, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	if err := s.c.Raw(d, *offset, p); err != nil {
		return err
	}
	*offset += uint64(len(p))
	return s.write(d, p)
}

// fromSource takes bytes of the source.
func (s *SCP) fromSource(p []byte) error {
	s.source.mu.Lock()
	defer s.source.mu.Unlock()
	for len(p) > 0 {
		state, left, err := s.ready()
		if errors.Is(err, errStopped) {
			line := s.line
			s.line = nil
			return s.fail(errors.Join(s.pass(s.source.dir, &s.source.offset, line),
				s.pass(s.source.dir, &s.source.offset, p)))
		}
		if err != nil {
			return err
		}
		n := 0
		switch state {
		case scpContent:
			n = int(min(uint64(len(p)), left))
			err = s.content(p[:n])
		default:
			if n, err = s.message(p, state == scpEnd); errors.Is(err, errStopped) {
				continue
			}
		}
		if err != nil {
			return s.fail(err)
		}
		p = p[n:]
	}
	return nil
}

// ready waits until what was said is answered.
func (s *SCP) ready() (scpState, uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && !s.raw && s.expect != 0 {
		s.cond.Wait()
	}
	if s.err != nil {
		return 0, 0, s.err
	}
	if s.raw {
		return 0, 0, errStopped
	}
	return s.state, s.left, nil
}

// content takes content of a file.
func (s *SCP) content(p []byte) error {
	e := s.file
	if s.c.Mode != ContentNone {
		s.hash.Write(p)
	}
	f := &e.Written
	if s.source.dir == ToClient {
		f = &e.Read
	}
	if s.c.Mode == ContentFull && s.c.Content != nil && f.Kept < s.c.FileLimit && s.kept < s.c.SessionLimit {
		n := min(uint64(len(p)), s.c.FileLimit-f.Kept, s.c.SessionLimit-s.kept)
		if err := s.c.Content(e.ID, s.source.dir, f.Bytes, p[:n]); err != nil {
			return err
		}
		f.Kept += n
		s.kept += n
	}
	f.Bytes += uint64(len(p))
	s.source.offset += uint64(len(p))
	s.mu.Lock()
	s.left -= uint64(len(p))
	if s.left == 0 {
		s.state = scpEnd
	}
	s.mu.Unlock()
	return s.write(s.source.dir, p)
}

// message takes a message, or what there is of it; n is how much of p that was. errStopped is that it is none.
func (s *SCP) message(p []byte, end bool) (n int, err error) {
	if end && len(s.line) == 0 && p[0] == 0 {
		return 1, s.say(p[:1], 'F')
	}
	n = bytes.IndexByte(p, '\n') + 1
	whole := n > 0
	if !whole {
		n = len(p)
	}
	first := p[0]
	if len(s.line) > 0 {
		first = s.line[0]
	}
	known := first == 1 || first == 2 || !end && strings.IndexByte("CDET", first) >= 0
	if !known || len(s.line)+n > maxSCPLine {
		return 0, s.bad("not a message of the protocol")
	}
	if len(s.line) > 0 || !whole {
		s.line = append(s.line, p[:n]...)
	}
	if !whole {
		return n, nil
	}
	line := p[:n]
	if len(s.line) > 0 {
		line = s.line
	}
	took := n
	if len(s.line) > 0 { // a violation leaves what is in line, and p from n on
		defer func() {
			if err == nil {
				s.line = nil
			}
		}()
	}
	err = s.act(line, end)
	if errors.Is(err, errStopped) {
		if len(s.line) > 0 { // p[:n] is in it already
			s.line = s.line[:len(s.line)-n]
		}
		return 0, err
	}
	return took, err
}

// bad is a violation of the source.
func (s *SCP) bad(why string) error {
	if err := s.violated(s.source.dir, s.source.offset, why); err != nil {
		return err
	}
	return errStopped
}

// act acts on a whole message.
func (s *SCP) act(line []byte, end bool) error {
	switch line[0] {
	case 1, 2:
		st := Status{StatusFailure, printable(string(line[1 : len(line)-1]))}
		if end {
			s.file.Status = st
			return s.say(line, 'F')
		}
		e := s.event(File, "")
		e.Status, e.End = st, s.c.now()
		if err := s.c.Event(e); err != nil {
			return err
		}
		s.source.offset += uint64(len(line))
		return s.write(s.source.dir, line)
	case 'E':
		if len(line) != 2 || len(s.dirs) == 0 {
			return s.bad("an end of no directory")
		}
	case 'T':
		var t Attrs
		if !scpTimes(line, &t) {
			return s.bad("times that are none")
		}
		s.times = &t
	default:
		return s.announce(line)
	}
	return s.say(line, line[0])
}

// announce takes a C or D.
func (s *SCP) announce(line []byte) error {
	mode, size, name, ok := scpName(line)
	if !ok {
		return s.bad("a name, mode or size that can't be")
	}
	if len(s.dirs) >= maxSCPDepth {
		return s.bad("directories too deep")
	}
	kind := File
	if line[0] == 'D' {
		kind, size = Mkdir, 0
	}
	e := s.event(kind, name)
	e.Attrs = Attrs{Valid: AttrPermissions, Permissions: mode}
	if kind == File {
		e.Attrs.Valid, e.Attrs.Size = AttrPermissions|AttrSize, size
		e.Flags = FlagRead
		if s.cmd.Sink {
			e.Flags = FlagWrite | FlagCreate
		}
	}
	if s.times != nil {
		e.Attrs.Valid |= AttrTimes
		e.Attrs.Atime, e.Attrs.Mtime = s.times.Atime, s.times.Mtime
		s.times = nil
	}
	if s.c.Decide != nil {
		v := s.c.Decide(&Op{Kind: kind, Read: !s.cmd.Sink, Write: s.cmd.Sink, Path: e.Path, Name: e.Name, Size: size, Attrs: e.Attrs})
		if v.Deny == "" && v.MaxSize > 0 && size > v.MaxSize {
			v.Deny = tooLarge
		}
		if v.Deny != "" {
			return s.refuse(e, v.Deny, len(line))
		}
	}
	s.mu.Lock()
	s.file, s.left = e, size
	s.mu.Unlock()
	if s.c.Mode != ContentNone {
		s.hash = sha256.New()
	}
	return s.say(line, line[0])
}

// refuse answers a message in the sink's place, and tells a client that waits for it.
func (s *SCP) refuse(e *Event, why string, n int) error {
	e.Status, e.Denied, e.End = Status{StatusPermissionDenied, printable(why)}, true, s.c.now()
	if err := s.c.Event(e); err != nil {
		return err
	}
	s.source.offset += uint64(n)
	answer := []byte("\x01scp: " + printable(e.Name) + ": Permission denied: " + printable(why) + "\n")
	if err := s.write(s.sink.dir, answer); err != nil || s.cmd.Sink {
		return err
	}
	return s.write(s.source.dir, answer)
}

// say passes a message on, whose answer is then expected; it may be there already.
func (s *SCP) say(line []byte, what byte) error {
	s.source.offset += uint64(len(line))
	s.mu.Lock()
	s.expect = what
	s.mu.Unlock()
	if err := s.write(s.source.dir, line); err != nil {
		return err
	}
	return s.settle()
}

// fromSink takes bytes of the sink.
func (s *SCP) fromSink(p []byte) error {
	s.sink.mu.Lock()
	defer s.sink.mu.Unlock()
	s.mu.Lock()
	if s.err != nil {
		defer s.mu.Unlock()
		return s.err
	}
	if s.raw {
		held := s.ahead
		s.ahead = nil
		s.mu.Unlock()
		return s.fail(errors.Join(s.pass(s.sink.dir, &s.sink.offset, held), s.pass(s.sink.dir, &s.sink.offset, p)))
	}
	s.ahead = append(s.ahead, p...)
	s.mu.Unlock()
	if err := s.settle(); err != nil && !errors.Is(err, errStopped) {
		return s.fail(err)
	}
	s.mu.Lock()
	at, why := s.sink.offset, ""
	if _, n := scpAnswer(s.ahead); n < 0 {
		why = "not an answer of the protocol"
	} else if len(s.ahead) > maxSCPAhead {
		why = "more answers than messages"
	}
	raw := s.raw
	s.mu.Unlock()
	if why != "" && !raw {
		if err := s.violated(s.sink.dir, at, why); err != nil {
			return s.fail(err)
		}
		raw = true
	}
	if raw {
		s.mu.Lock()
		held := s.ahead
		s.ahead = nil
		s.mu.Unlock()
		return s.fail(s.pass(s.sink.dir, &s.sink.offset, held))
	}
	return nil
}

// settle takes the answer that is expected, if it is there, records what it is to, and passes it on. Either goroutine
// may be in it; mu is held throughout, so that what passes is in order. An answer is short, and its reader waits for it.
func (s *SCP) settle() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.expect == 0 || s.raw || s.err != nil {
		return nil
	}
	text, n := scpAnswer(s.ahead)
	if n <= 0 {
		return nil
	}
	e := s.answered(s.ahead[0] == 0, text)
	if e != nil {
		if err := s.c.Event(e); err != nil {
			return err
		}
	}
	if err := s.write(s.sink.dir, s.ahead[:n]); err != nil {
		return err
	}
	s.ahead = s.ahead[n:]
	s.sink.offset += uint64(n)
	s.expect = 0
	s.cond.Broadcast()
	return nil
}

// answered is what an answer changes, and the event it makes; mu is held.
func (s *SCP) answered(ok bool, text string) *Event {
	st := Status{}
	if !ok {
		st = Status{StatusFailure, printable(text)}
	}
	e := s.file
	switch s.expect {
	case 'S':
		if ok {
			return nil
		}
		e = s.event(File, "")
	case 'C':
		if ok {
			s.state = scpContent
			if s.left == 0 {
				s.state = scpEnd
			}
			return nil
		}
	case 'D':
		if ok {
			s.dirs = append(s.dirs, e.Name[strings.LastIndexByte(e.Name, '/')+1:])
		}
	case 'E':
		s.dirs = s.dirs[:len(s.dirs)-1]
		return nil
	case 'F':
		s.state = scpMessage
	default: // times
		return nil
	}
	if e.Status.Code == StatusOK {
		e.Status = st
	}
	s.file = nil
	return s.finished(e)
}

// finished fills in what passed of a file. It is called when its content is no more the source's goroutine's: that waits.
func (s *SCP) finished(e *Event) *Event {
	e.End = s.c.now()
	f := &e.Written
	if e.Flags&FlagRead != 0 {
		f = &e.Read
	}
	if e.Kind != File || e.Flags == 0 {
		return e
	}
	f.Contiguous = true
	whole := f.Bytes == e.Attrs.Size && e.Status.Code == StatusOK && !e.Unfinished
	if s.hash != nil && (f.Bytes > 0 || whole) {
		f.SHA256, f.Whole = s.hash.Sum(nil), whole
	}
	return e
}

func (s *SCP) event(k Kind, name string) *Event {
	s.ids++
	e := &Event{Kind: k, ID: s.ids, Start: s.c.now(), Path: Path{Asked: s.cmd.asked()}}
	if name != "" {
		e.Name = strings.Join(append(append([]string{}, s.dirs...), name), "/")
	}
	return e
}

// scpAnswer is the answer at the beginning of b, and its length: 0 if it isn't all there, less if it is none.
func scpAnswer(b []byte) (text string, n int) {
	switch {
	case len(b) == 0:
		return "", 0
	case b[0] == 0:
		return "", 1
	case b[0] > 2:
		return "", -1
	}
	i := bytes.IndexByte(b, '\n')
	return string(b[1:max(i, 1)]), i + 1
}

// scpName takes "C0644 299 name\n" apart, or the like with D.
func scpName(line []byte) (mode uint32, size uint64, name string, ok bool) {
	f := strings.SplitN(string(line[1:len(line)-1]), " ", 3)
	if len(f) != 3 || len(f[0]) != 4 {
		return 0, 0, "", false
	}
	m, err1 := strconv.ParseUint(f[0], 8, 32)
	size, err2 := strconv.ParseUint(f[1], 10, 64)
	name = f[2]
	ok = err1 == nil && err2 == nil && size <= math.MaxInt64 && name != "" && name != "." && name != ".." &&
		len(name) <= maxPath && !strings.ContainsAny(name, "/\x00")
	return uint32(m), size, name, ok
}

// scpTimes takes "T1700000000 0 1700000000 0\n" apart: when changed, when read, each with microseconds.
func scpTimes(line []byte, a *Attrs) bool {
	f := strings.Split(string(line[1:len(line)-1]), " ")
	if len(f) != 4 {
		return false
	}
	var n [4]uint64
	for i := range f {
		var err error
		if n[i], err = strconv.ParseUint(f[i], 10, 64); err != nil {
			return false
		}
	}
	a.Mtime, a.Atime = uint32(min(n[0], math.MaxUint32)), uint32(min(n[2], math.MaxUint32))
	return true
}
