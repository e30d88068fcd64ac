package agent

import (
	"encoding/binary"
	"errors"
	"net"
)

// yamux's frame (its spec.md): version, type, flags, stream ID, length.
const (
	muxHeader       = 12
	muxData         = 0
	muxWindowUpdate = 1
	muxGoAway       = 3
	muxSYN          = 1
)

var errMuxFrame = errors.New("agent: forbidden frame from the sandbox")

// guard reads a yamux stream that comes from a sandbox and fails at frames no agent of ours sends: pings, each of
// which costs yamux a goroutine that waits to answer; streams opened from inside; frames larger than the window.
type guard struct {
	net.Conn
	head [muxHeader]byte
	have int    // bytes of head that are there
	left uint32 // bytes of payload still to come
	err  error
}

func (g *guard) Read(p []byte) (int, error) {
	if g.err != nil {
		return 0, g.err
	}
	n, err := g.Conn.Read(p)
	if g.err = g.check(p[:n]); g.err != nil {
		return 0, g.err
	}
	return n, err
}

func (g *guard) check(b []byte) error {
	for len(b) > 0 {
		if g.left > 0 {
			n := min(len(b), int(g.left))
			g.left -= uint32(n)
			b = b[n:]
			continue
		}
		n := copy(g.head[g.have:], b)
		b = b[n:]
		if g.have += n; g.have < muxHeader {
			return nil
		}
		g.have = 0
		flags := binary.BigEndian.Uint16(g.head[2:])
		length := binary.BigEndian.Uint32(g.head[8:])
		if g.head[0] != 0 || flags&muxSYN != 0 {
			return errMuxFrame
		}
		switch g.head[1] {
		case muxData:
			if length > window {
				return errMuxFrame
			}
			g.left = length
		case muxWindowUpdate:
			if length > window {
				return errMuxFrame
			}
		case muxGoAway:
		default:
			return errMuxFrame
		}
	}
	return nil
}
