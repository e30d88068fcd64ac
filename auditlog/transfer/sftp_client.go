package transfer

import "math"

// fromClient is lane.packet of what the client sends.
func (s *SFTP) fromClient(b []byte, payload int) (bool, error) {
	typ, r := b[4], reader{b: b[5:]}
	if typ == fxpInit {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.began {
			return false, violation("a second INIT")
		}
		s.began = true
		return true, nil
	}
	if !s.begun() {
		return false, violation("no INIT")
	}
	id := r.uint32()
	switch typ {
	case fxpRead:
		return s.read(id, &r)
	case fxpWrite:
		return s.write(id, &r, payload)
	case fxpClose:
		return s.close(id, &r)
	case fxpReaddir, fxpFstat:
		handle := r.handle()
		return s.plain(id, typ, handle, &r)
	case fxpFsetstat:
		return s.fsetstat(id, &r)
	case fxpLstat, fxpStat, fxpRealpath, fxpReadlink:
		r.path()
		return s.plain(id, typ, nil, &r)
	case fxpExtended:
		return s.extended(id, &r)
	}
	return s.named(id, typ, "", &r)
}

func (s *SFTP) begun() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.began
}

var errFields = violation("a request whose fields are not as they must be")

// plain is a request that is not recorded. handle is nil if it has none.
func (s *SFTP) plain(id uint32, typ byte, handle []byte, r *reader) (bool, error) {
	if !r.end() {
		return false, errFields
	}
	q := request{typ: typ}
	if handle != nil {
		f, err := s.file(handle)
		if err != nil {
			return false, err
		}
		q.file = f
	}
	return true, s.add(id, q)
}

func (s *SFTP) read(id uint32, r *reader) (bool, error) {
	handle, offset, n := r.handle(), r.uint64(), r.uint32()
	if !r.end() || offset > math.MaxInt64 {
		return false, errFields
	}
	f, err := s.file(handle)
	if err != nil {
		return false, err
	}
	if s.c.Decide == nil || f.event.Flags&FlagRead != 0 && (f.max == 0 || offset+uint64(n) <= f.max+1) {
		return true, s.add(id, request{typ: fxpRead, file: f, offset: offset, n: n})
	}
	if f.event.Flags&FlagRead == 0 {
		return false, s.refuse(id, f, "the file is not open for reading")
	}
	if offset > f.max {
		return false, s.refuse(id, f, tooLarge)
	}
	// One byte more than is permitted: an honest client sees the end of a file of the greatest size.
	n = uint32(f.max + 1 - offset)
	if err := s.add(id, request{typ: fxpRead, file: f, offset: offset, n: n}); err != nil {
		return false, err
	}
	p := newPacket(fxpRead).uint32(id).string(string(handle)).uint64(offset).uint32(n)
	return false, s.replace(p.bytes())
}

const tooLarge = "the file is larger than is permitted"

func (s *SFTP) write(id uint32, r *reader, payload int) (bool, error) {
	handle, offset, n := r.handle(), r.uint64(), r.uint32()
	if !r.end() || int(n) != payload || offset > math.MaxInt64 {
		return false, errFields
	}
	f, err := s.file(handle)
	if err != nil {
		return false, err
	}
	if s.c.Decide != nil {
		if f.event.Flags&FlagWrite == 0 {
			return false, s.refuse(id, f, "the file is not open for writing")
		}
		if f.max > 0 && offset+uint64(n) > f.max {
			return false, s.refuse(id, f, tooLarge)
		}
	}
	if err := s.add(id, request{typ: fxpWrite, file: f, offset: offset, n: n}); err != nil {
		return false, err
	}
	f.writer.begin(offset, payload)
	s.up = passing{file: f, offset: offset}
	return true, nil
}

// close takes the handle out of use: the server may give it to another file at once.
func (s *SFTP) close(id uint32, r *reader) (bool, error) {
	handle := r.handle()
	if !r.end() {
		return false, errFields
	}
	f, err := s.file(handle)
	if err != nil {
		return false, err
	}
	if err := s.add(id, request{typ: fxpClose, file: f}); err != nil {
		return false, err
	}
	s.mu.Lock()
	delete(s.files, string(handle))
	s.mu.Unlock()
	return true, nil
}

func (s *SFTP) fsetstat(id uint32, r *reader) (bool, error) {
	handle, attrs := r.handle(), r.attrs()
	if !r.end() {
		return false, errFields
	}
	f, err := s.file(handle)
	if err != nil {
		return false, err
	}
	e := s.newEvent(Setstat)
	e.Path, e.Attrs = f.event.Path, attrs
	size := uint64(noSize)
	if attrs.Valid&AttrSize != 0 {
		size = attrs.Size
	}
	if s.c.Decide != nil {
		v := s.c.Decide(&Op{Kind: Setstat, Write: f.event.Flags&FlagWrite != 0, Path: e.Path, Attrs: attrs})
		if v.Deny != "" {
			return false, s.deny(id, e, StatusPermissionDenied, v.Deny)
		}
		if limit := f.max; limit > 0 && size != noSize && size > limit {
			return false, s.deny(id, e, StatusPermissionDenied, tooLarge)
		}
	}
	return true, s.add(id, request{typ: fxpFsetstat, file: f, offset: size, event: e})
}

// extended is SSH_FXP_EXTENDED; see OpenSSH's PROTOCOL, section 4, and draft-ietf-secsh-filexfer-extensions-00 for
// copy-data and home-directory.
func (s *SFTP) extended(id uint32, r *reader) (bool, error) {
	name := string(r.limited(256))
	switch name {
	case "posix-rename@openssh.com", "hardlink@openssh.com", "lsetstat@openssh.com":
		return s.named(id, fxpExtended, name, r)
	case "copy-data":
		return s.copyData(id, r)
	case "statvfs@openssh.com", "expand-path@openssh.com", "home-directory":
		r.path()
		return s.plain(id, fxpExtended, nil, r)
	case "fstatvfs@openssh.com", "fsync@openssh.com":
		handle := r.handle()
		return s.plain(id, fxpExtended, handle, r)
	case "limits@openssh.com":
		return s.plain(id, fxpExtended, nil, r)
	case "users-groups-by-id@openssh.com":
		r.string()
		r.string()
		return s.plain(id, fxpExtended, nil, r)
	}
	if r.bad {
		return false, errFields
	}
	e := s.newEvent(Extension)
	e.Detail = printable(name)
	if s.c.Decide != nil { // nobody knows what it does
		return false, s.deny(id, e, StatusUnsupported, "the extension is not permitted")
	}
	return true, s.add(id, request{typ: fxpExtended, event: e})
}

func (s *SFTP) copyData(id uint32, r *reader) (bool, error) {
	from, at, n, into, to := r.handle(), r.uint64(), r.uint64(), r.handle(), r.uint64()
	if !r.end() || at > math.MaxInt64 || to > math.MaxInt64 || n > math.MaxInt64 {
		return false, errFields
	}
	source, err := s.file(from)
	if err != nil {
		return false, err
	}
	target, err := s.file(into)
	if err != nil {
		return false, err
	}
	e := s.newEvent(Copy)
	e.Path, e.Target = source.event.Path, target.event.Path
	e.Ranges = [2]Range{{Start: at}, {Start: to}}
	if n > 0 {
		e.Ranges[0].End, e.Ranges[1].End = at+n, to+n
	}
	if s.c.Decide != nil {
		switch {
		case source.event.Flags&FlagRead == 0 || target.event.Flags&FlagWrite == 0:
			return false, s.deny(id, e, StatusPermissionDenied, "the files are not open for this")
		case target.max > 0 && (n == 0 || to+n > target.max): // 0 is to the end, wherever that is
			return false, s.deny(id, e, StatusPermissionDenied, tooLarge)
		case source.max > 0 && (n == 0 || at+n > source.max):
			return false, s.deny(id, e, StatusPermissionDenied, tooLarge)
		}
	}
	target.writer.stop()
	s.mu.Lock()
	target.copied = true
	s.mu.Unlock()
	return true, s.add(id, request{typ: fxpExtended, event: e})
}

// named is a request that names a path: recorded, resolved, and decided upon.
func (s *SFTP) named(id uint32, typ byte, extension string, r *reader) (bool, error) {
	e := s.newEvent("")
	op := Op{}
	follow, two := false, false
	e.Path.Asked = r.path()
	rest := r.b
	switch {
	case typ == fxpOpen:
		e.Kind, e.Flags, e.Attrs, follow = File, r.uint32(), r.attrs(), true
		op.Read, op.Write = e.Flags&FlagRead != 0, e.Flags&(FlagWrite|FlagAppend|FlagCreate|FlagTruncate) != 0
	case typ == fxpOpendir:
		e.Kind, follow = List, true
	case typ == fxpSetstat:
		e.Kind, e.Attrs, follow = Setstat, r.attrs(), true
	case extension == "lsetstat@openssh.com":
		e.Kind, e.Attrs, e.Detail = Setstat, r.attrs(), extension
	case typ == fxpRemove:
		e.Kind = Remove
	case typ == fxpMkdir:
		e.Kind, e.Attrs = Mkdir, r.attrs()
	case typ == fxpRmdir:
		e.Kind = Rmdir
	case typ == fxpRename, extension == "posix-rename@openssh.com":
		e.Kind, two, e.Detail = Rename, true, extension
	case extension == "hardlink@openssh.com":
		e.Kind, two = Link, true
	case typ == fxpSymlink:
		// The draft has the link first; OpenSSH, and with it all others, has it second (PROTOCOL, section 4.1).
		e.Kind, e.Target.Asked = Symlink, e.Path.Asked
		e.Path.Asked = r.path()
	default:
		return false, violation("a request of an unknown type")
	}
	if two {
		e.Target.Asked = r.path()
		rest = r.b
	}
	if !r.end() {
		return false, errFields
	}
	if s.c.Resolve {
		why, err := s.resolveEvent(e, follow, two)
		if err != nil {
			return false, err
		}
		if why != "" {
			return false, s.deny(id, e, StatusFailure, why)
		}
	}
	var limit uint64
	if s.c.Decide != nil {
		op.Kind, op.Path, op.Target, op.Attrs = e.Kind, e.Path, e.Target, e.Attrs
		v := s.c.Decide(&op)
		limit = v.MaxSize
		switch {
		case v.Deny != "":
			return false, s.deny(id, e, StatusPermissionDenied, v.Deny)
		case limit > 0 && op.Write && e.Flags&FlagAppend != 0:
			// Where the bytes go is not seen.
			return false, s.deny(id, e, StatusPermissionDenied, "appending is not permitted where there is a greatest size")
		case limit > 0 && e.Attrs.Valid&AttrSize != 0 && e.Attrs.Size > limit:
			return false, s.deny(id, e, StatusPermissionDenied, tooLarge)
		}
	}
	if err := s.add(id, request{typ: typ, event: e, offset: limit}); err != nil {
		return false, err
	}
	if !s.c.Resolve {
		return true, nil
	}
	p := newPacket(typ).uint32(id)
	if extension != "" {
		p.string(extension)
	}
	switch {
	case typ == fxpSymlink:
		p.string(e.Target.Asked).string(e.Path.Resolved)
	case two:
		p.string(e.Path.Resolved).string(e.Target.Resolved)
	default:
		p.string(e.Path.Resolved).raw(rest)
	}
	return false, s.replace(p.bytes())
}

func (s *SFTP) newEvent(k Kind) *Event {
	s.ids++
	return &Event{Kind: k, ID: s.ids, Start: s.c.now()}
}

// replace sends a packet in the place of the one that came.
func (s *SFTP) replace(p []byte) error {
	if err := s.client.flush(); err != nil {
		return err
	}
	return s.toServer(p)
}

// deny answers a request in the server's place.
func (s *SFTP) deny(id uint32, e *Event, code uint32, why string) error {
	e.Status, e.Denied, e.End = Status{code, printable(why)}, true, s.c.now()
	if err := s.c.Event(e); err != nil {
		return err
	}
	return s.inject(statusPacket(id, code, why))
}

// refuse answers a request on an open file in the server's place; its event says so.
func (s *SFTP) refuse(id uint32, f *file, why string) error {
	s.mu.Lock()
	if f.status.Code == StatusOK {
		f.status = Status{StatusPermissionDenied, printable(why)}
	}
	f.denied = true
	s.mu.Unlock()
	return s.inject(statusPacket(id, StatusPermissionDenied, why))
}
