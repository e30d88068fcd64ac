package transfer

import "sync"

// lane is one direction of an SFTP channel: it finds the packets in a stream that comes in any pieces. Of a packet, the
// head is what must be there before it can pass; the rest, its payload, passes as it comes. Only an incomplete head is
// ever copied.
type lane struct {
	dir Direction
	mu  sync.Mutex // one call at a time; guards all below

	// head says how long the head of the packet beginning with b is; it may say more when b is longer.
	head func(b []byte) (int, error)
	// packet takes a complete head, and how much payload follows. It says whether the packet passes as it is.
	packet func(head []byte, payload int) (pass bool, err error)
	// part takes a piece of the payload of a packet that passes, and packetEnd is called after the last.
	part      func(p []byte) error
	packetEnd func() error
	// write passes bytes on; middle says that they end in the middle of a packet.
	write func(p []byte, middle bool) error
	// urgent says whether to write at this packet's end what there is, because something is to be put in there.
	urgent func() bool

	base     uint64 // what of the stream was before buf
	buf      []byte // of the call
	from, at int    // buf[from:at] is to be written; buf[at:] has not been looked at
	hold     []byte // an incomplete head, of which nothing was written
	left     int    // payload still to come
	drop     bool   // it doesn't pass
}

// offset is how much of the stream was taken in whole heads and payload.
func (l *lane) offset() uint64 { return l.base + uint64(l.at) - uint64(len(l.hold)) }

// run takes what there is in buf, until stop, which is asked before each packet, or an error.
func (l *lane) run(stop func() bool) error {
	for l.at < len(l.buf) {
		if stop() {
			return nil
		}
		var err error
		if l.left > 0 {
			err = l.payload()
		} else {
			err = l.start()
		}
		if err != nil {
			return err
		}
	}
	return l.flush()
}

// flush writes what is to be written.
func (l *lane) flush() error {
	if l.from == l.at {
		return nil
	}
	p := l.buf[l.from:l.at]
	l.from = l.at
	return l.write(p, l.left > 0 && !l.drop)
}

func (l *lane) payload() error {
	n := min(l.left, len(l.buf)-l.at)
	if !l.drop {
		if err := l.part(l.buf[l.at : l.at+n]); err != nil {
			return err
		}
	} else if err := l.flush(); err != nil {
		return err
	}
	l.at += n
	l.left -= n
	if l.drop {
		l.from = l.at
	}
	if l.left > 0 {
		return nil
	}
	return l.ended()
}

// ended is called after a packet's last byte.
func (l *lane) ended() error {
	if !l.drop {
		if err := l.packetEnd(); err != nil {
			return err
		}
	}
	l.drop = false
	if l.urgent() {
		if err := l.flush(); err != nil {
			return err
		}
		return l.write(nil, false)
	}
	return nil
}

// start takes a head, or what there is of it.
func (l *lane) start() error {
	if len(l.hold) == 0 {
		b := l.buf[l.at:]
		n, err := l.head(b)
		if err != nil {
			return err
		}
		if n <= len(b) {
			return l.complete(b[:n])
		}
		if err := l.flush(); err != nil {
			return err
		}
		l.hold = append(l.hold[:0], b...)
		l.at = len(l.buf)
		l.from = l.at
		return nil
	}
	for l.at <= len(l.buf) {
		n, err := l.head(l.hold)
		if err != nil {
			return err
		}
		if n == len(l.hold) {
			break
		}
		if l.at == len(l.buf) {
			return nil
		}
		take := min(n-len(l.hold), len(l.buf)-l.at)
		l.hold = append(l.hold, l.buf[l.at:l.at+take]...)
		l.at += take
		l.from = l.at
	}
	return l.complete(nil)
}

// complete takes a head that is all there: at l.at, or, if nil, l.hold.
func (l *lane) complete(b []byte) error {
	held := b == nil
	if held {
		b = l.hold
	}
	left := 4 + length(b) - len(b)
	pass, err := l.packet(b, left)
	if err != nil {
		return err
	}
	l.left, l.drop = left, !pass
	switch {
	case held && pass:
		if err := l.write(b, left > 0); err != nil {
			return err
		}
	case !held && !pass:
		if err := l.flush(); err != nil {
			return err
		}
		l.at += len(b)
		l.from = l.at
	case !held:
		l.at += len(b)
	}
	if held {
		l.hold = l.hold[:0]
		if cap(l.hold) > 64<<10 {
			l.hold = nil
		}
	}
	if left == 0 {
		return l.ended()
	}
	return nil
}

// length is the packet length that b, of 4 bytes or more, announces.
func length(b []byte) int {
	return int(uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3]))
}
