package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/sallyport/sallyport/backends"
)

// tunnelBuffers are for connections that pass much: frames of the largest size, with their headers.
var tunnelBuffers = sync.Pool{New: func() any {
	b := make([]byte, frameHeader+maxFrame)
	return &b
}}

// tunnel is one end of the stream of a forwarded connection. Its bytes travel in frames, because the end of a direction
// must leave the other one open for as long as it takes: yamux ends a stream of which one side is closed. It is safe for
// concurrent use.
type tunnel struct {
	stream        *yamux.Stream
	local, remote net.Addr
	gate          bool // this is the gate's end

	reading sync.Mutex // one Read at a time; guards what follows
	head    [frameHeader]byte
	have    int    // bytes of head that are there
	left    uint32 // bytes of a frame's payload still to come
	ended   error  // no more can be read

	writing sync.Mutex // one frame at a time; guards what follows
	broken  error      // no more can be written

	drained atomic.Bool // ended is set
	gone    atomic.Bool // the other side has ended the stream
	closed  atomic.Bool
}

var _ backends.HalfCloser = (*tunnel)(nil)

func newTunnel(s *yamux.Stream) *tunnel { return &tunnel{stream: s} }

// Read gives io.EOF when the other side has ended its direction, and another error when the connection was cut off.
func (t *tunnel) Read(p []byte) (int, error) {
	if t.closed.Load() {
		return 0, net.ErrClosed
	}
	t.reading.Lock()
	defer t.reading.Unlock()
	switch {
	case t.closed.Load():
		return 0, net.ErrClosed
	case t.ended != nil:
		return 0, t.ended
	}
	for t.left == 0 {
		for t.have < frameHeader {
			n, err := t.stream.Read(t.head[t.have:])
			if t.have += n; n == 0 && err != nil {
				return 0, t.failedRead(err)
			}
		}
		t.have = 0
		n := binary.BigEndian.Uint32(t.head[1:])
		switch {
		case t.head[0] == frameBytes && n > 0 && n <= maxFrame:
			t.left = n
		case t.head[0] == frameBytes && n == 0:
			t.end(io.EOF)
			if t.gate {
				go t.watch()
			}
			return 0, t.ended
		case t.head[0] == frameCut && n == 0:
			return 0, t.end(syscall.ECONNRESET)
		default:
			return 0, t.end(errFrame)
		}
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := t.stream.Read(p[:min(len(p), int(t.left))])
	t.left -= uint32(n)
	if n == 0 && err != nil {
		return 0, t.failedRead(err)
	}
	return n, nil
}

// end ends reading. The lock is held.
func (t *tunnel) end(err error) error {
	t.ended = err
	t.drained.Store(true)
	return err
}

func (t *tunnel) failedRead(err error) error {
	switch {
	case t.closed.Load():
		return net.ErrClosed
	case errors.Is(err, yamux.ErrTimeout):
		return err // a deadline; there may be a later one
	}
	return t.end(t.lost(noEOF(err)))
}

// lost says more of an error when the whole sandbox is gone.
func (t *tunnel) lost(err error) error {
	if t.stream.Session().IsClosed() {
		return fmt.Errorf("%w: %w", backends.ErrGone, err)
	}
	return err
}

// watch waits for the end of the stream when its reader's direction has ended, so that writers don't write to nobody.
func (t *tunnel) watch() {
	var b [1]byte
	for {
		_, err := t.stream.Read(b[:])
		if t.closed.Load() {
			return
		}
		if !errors.Is(err, yamux.ErrTimeout) {
			break
		}
		t.stream.SetReadDeadline(time.Time{}) // one that was meant for Read
	}
	t.gone.Store(true)
	t.stream.SetWriteDeadline(time.Unix(1, 0))
}

// Write writes frames. An error ends the direction, also that of a deadline.
func (t *tunnel) Write(p []byte) (int, error) {
	t.writing.Lock()
	defer t.writing.Unlock()
	var b []byte
	if len(p) > chunk {
		large := tunnelBuffers.Get().(*[]byte)
		defer tunnelBuffers.Put(large)
		b = *large
	} else {
		b = make([]byte, frameHeader+len(p))
	}
	total := 0
	for len(p) > 0 {
		n := copy(b[frameHeader:], p)
		if err := t.writeFrame(frameBytes, b[:frameHeader+n]); err != nil {
			return total, err
		}
		total, p = total+n, p[n:]
	}
	return total, nil
}

// writeFrame writes a frame whose payload begins after room for the header. The lock is held.
func (t *tunnel) writeFrame(kind byte, frame []byte) error {
	if t.broken == nil {
		putFrameHeader(frame, kind, len(frame)-frameHeader)
		if _, err := t.stream.Write(frame); err != nil {
			t.broken = t.lost(err)
		}
	}
	switch {
	case t.broken == nil:
		return nil
	case t.closed.Load():
		return net.ErrClosed
	case t.gone.Load():
		return syscall.EPIPE
	}
	return t.broken
}

// CloseWrite ends this side's direction.
func (t *tunnel) CloseWrite() error { return t.finish(frameBytes) }

// cut tells the other side that the connection was cut off.
func (t *tunnel) cut() error { return t.finish(frameCut) }

func (t *tunnel) finish(kind byte) error {
	t.writing.Lock()
	defer t.writing.Unlock()
	err := t.writeFrame(kind, make([]byte, frameHeader))
	if t.broken == nil {
		t.broken = net.ErrClosed
	}
	return err
}

// Close ends the connection at once, with what waits in it.
func (t *tunnel) Close() error {
	if t.closed.Swap(true) {
		return nil
	}
	t.stream.SetDeadline(time.Unix(1, 0))
	err := t.stream.Close()
	if t.gate {
		go t.drain()
	}
	return err
}

// drain takes what still comes on a closed stream, so that the gate doesn't hold it for as long as the agent leaves the
// stream open.
func (t *tunnel) drain() {
	t.reading.Lock() // Read has given up, or is about to
	defer t.reading.Unlock()
	t.stream.SetReadDeadline(time.Time{}) // yamux ends the stream before long
	b := make([]byte, chunk)
	for {
		if _, err := t.stream.Read(b); err != nil {
			break
		}
	}
	t.stream.Shrink()
}

func (t *tunnel) LocalAddr() net.Addr  { return t.local }
func (t *tunnel) RemoteAddr() net.Addr { return t.remote }

func (t *tunnel) SetDeadline(at time.Time) error {
	t.SetReadDeadline(at)
	return t.SetWriteDeadline(at)
}

func (t *tunnel) SetReadDeadline(at time.Time) error {
	if t.closed.Load() || t.drained.Load() {
		return nil
	}
	return t.stream.SetReadDeadline(at)
}

func (t *tunnel) SetWriteDeadline(at time.Time) error {
	if t.closed.Load() || t.gone.Load() {
		return nil
	}
	return t.stream.SetWriteDeadline(at)
}
