package transfer

// fromServer is lane.packet of what the server sends.
func (s *SFTP) fromServer(b []byte, payload int) (bool, error) {
	typ, r := b[4], reader{b: b[5:]}
	if typ == fxpVersion {
		return true, s.version(&r)
	}
	id := r.uint32()
	s.mu.Lock()
	q, known := s.requests[id]
	switch {
	case !s.answered:
		known = false
	case known:
		delete(s.requests, id)
		s.progress++
		if s.waiting > 0 {
			s.cond.Broadcast()
		}
	}
	var events [2]*Event
	var err error
	pass := known && q.ask == nil
	switch {
	case !known:
		err = violation("an answer to no request")
	case q.ask != nil:
		err = q.ask.answer(typ, int(q.n), &r, payload)
	case typ == fxpData && q.typ == fxpRead:
		err = s.data(q, &r, payload)
	default:
		events[0], err = s.answer(typ, q, &r, payload)
	}
	switch {
	case err != nil && known:
		s.requests[id] = q // unanswered
	case err == nil && q.file != nil && s.down.file == nil:
		q.file.pending--
		events[1] = s.done(q.file)
	}
	s.mu.Unlock()
	for _, e := range events {
		if err == nil && e != nil {
			err = s.c.Event(e)
		}
	}
	return pass, err
}

func (s *SFTP) version(r *reader) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.began || s.answered {
		return violation("a VERSION that was not asked for")
	}
	if r.uint32() != 3 {
		return violation("not version 3")
	}
	s.answered = true
	return nil
}

var errAnswer = violation("an answer that is not one to its request")

// data is DATA; its content follows. mu is held.
func (s *SFTP) data(q request, r *reader, payload int) error {
	n := r.uint32()
	if !r.end() || int(n) != payload || n > q.n {
		return errAnswer
	}
	if payload == 0 {
		return nil
	}
	q.file.reader.begin(q.offset, payload)
	s.down = passing{file: q.file, offset: q.offset, n: uint64(payload)}
	return nil
}

// answer takes an answer, and says what is to be recorded of it. mu is held.
func (s *SFTP) answer(typ byte, q request, r *reader, payload int) (*Event, error) {
	switch typ {
	case fxpStatus:
		return s.status(q, r)
	case fxpHandle:
		return nil, s.handle(q, r)
	case fxpAttrs:
		a := r.attrs()
		if !r.end() || q.typ != fxpStat && q.typ != fxpLstat && q.typ != fxpFstat {
			return nil, errAnswer
		}
		if q.file != nil && a.Valid&AttrSize != 0 {
			q.file.size = a.Size
		}
	case fxpName:
		count := r.uint32()
		if r.bad || q.typ != fxpReaddir && q.typ != fxpRealpath && q.typ != fxpReadlink && q.typ != fxpExtended {
			return nil, errAnswer
		}
		if q.typ == fxpReaddir {
			q.file.event.Names += uint64(count)
			q.file.reads.bytes += uint64(len(r.b) + payload)
		}
	case fxpExtendedReply:
		if q.typ != fxpExtended {
			return nil, errAnswer
		}
	default:
		return nil, errAnswer
	}
	return s.recorded(q, Status{}), nil
}

// recorded is the event of a request that was answered, if it has one.
func (s *SFTP) recorded(q request, st Status) *Event {
	if q.event != nil {
		s.state -= q.event.cost()
		q.event.Status, q.event.End = st, s.c.now()
	}
	return q.event
}

func (s *SFTP) handle(q request, r *reader) error {
	handle := r.handle()
	if !r.end() || q.typ != fxpOpen && q.typ != fxpOpendir {
		return errAnswer
	}
	if s.files[string(handle)] != nil {
		return violation("a handle that is open already")
	}
	f := &file{event: q.event, max: q.offset, eof: noSize, size: noSize, set: noSize}
	f.reader.total, f.writer.total, f.reader.reread = &s.ahead, &s.ahead, true
	if s.c.Mode == ContentNone || q.typ == fxpOpendir {
		f.reader.stop()
		f.writer.stop()
	}
	if q.event.Flags&FlagAppend != 0 {
		f.writer.stop()
	}
	s.files[string(handle)], s.live[f] = f, struct{}{}
	return nil
}

// status is STATUS. Some servers leave out the message.
func (s *SFTP) status(q request, r *reader) (*Event, error) {
	st := Status{Code: r.uint32()}
	if r.bad {
		return nil, errAnswer
	}
	if len(r.b) > 0 {
		message := r.string()
		if len(r.b) > 0 {
			r.string()
		}
		if !r.end() {
			return nil, errAnswer
		}
		if st.Code != StatusOK {
			st.Message = printable(string(message[:min(len(message), 2*maxMessage)]))
		}
	}
	f, ok := q.file, st.Code == StatusOK
	switch q.typ {
	case fxpOpen, fxpOpendir, fxpRead, fxpReaddir, fxpStat, fxpLstat, fxpFstat, fxpRealpath, fxpReadlink:
		if ok {
			return nil, errAnswer
		}
	}
	failed := !ok
	switch {
	case f == nil:
	case q.typ == fxpRead && st.Code == StatusEOF:
		f.eof, failed = min(f.eof, q.offset), false
	case q.typ == fxpReaddir && st.Code == StatusEOF:
		failed = false
	case q.typ == fxpWrite && ok:
		f.writes.add(q.offset, q.offset+uint64(q.n))
	case q.typ == fxpFsetstat && ok && q.offset != noSize:
		f.set = q.offset
	case q.typ == fxpClose:
		f.closed = true
	}
	if q.event != nil || q.typ == fxpFstat || q.typ == fxpExtended && st.Code == StatusUnsupported {
		failed = false // not the file's failure
	}
	if failed && f != nil && f.status.Code == StatusOK {
		f.status = st
	}
	return s.recorded(q, st), nil
}
