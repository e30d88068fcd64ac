package agent

import (
	"io"
	"net"
	"sync"
)

// coalesceLimit is how much may wait to be written. It is also the size of one write to the connection.
const coalesceLimit = 256 << 10

// gulp is how much is read at once from a busy connection.
const gulp = 128 << 10

var coalesceBuffers = sync.Pool{New: func() any {
	b := make([]byte, 0, coalesceLimit)
	return &b
}}

// coalescer joins small writes to a connection into large ones: yamux writes each 12-byte header by itself. While one
// write is under way what comes is gathered for the next; nothing waits longer than that. An idle one holds no buffer.
type coalescer struct {
	net.Conn

	mu      sync.Mutex // guards what follows
	changed sync.Cond
	pending *[]byte // from coalesceBuffers; nil: nothing to write
	err     error   // of an earlier write, or why there are no more
	closing bool

	done chan struct{} // closed when the writing goroutine has ended
}

func newCoalescer(conn net.Conn) *coalescer {
	c := &coalescer{Conn: conn, done: make(chan struct{})}
	c.changed.L = &c.mu
	go c.run()
	return c
}

func (c *coalescer) Write(p []byte) (int, error) {
	total := len(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if c.err != nil {
			return total - len(p), c.err
		}
		if c.closing {
			return total - len(p), net.ErrClosed
		}
		if c.pending == nil {
			c.pending = coalesceBuffers.Get().(*[]byte)
		}
		n := min(len(p), coalesceLimit-len(*c.pending))
		if n > 0 {
			if len(*c.pending) == 0 {
				c.changed.Broadcast()
			}
			*c.pending = append(*c.pending, p[:n]...)
			p = p[n:]
		}
		if len(p) == 0 {
			return total, nil
		}
		c.changed.Wait()
	}
}

func (c *coalescer) run() {
	defer close(c.done)
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		for c.pending == nil && !c.closing && c.err == nil {
			c.changed.Wait()
		}
		if c.pending == nil || c.err != nil {
			return
		}
		b := c.pending
		c.pending = nil
		c.changed.Broadcast()
		c.mu.Unlock()
		_, err := c.Conn.Write(*b)
		*b = (*b)[:0]
		coalesceBuffers.Put(b)
		c.mu.Lock()
		if err != nil {
			c.err = err
			c.changed.Broadcast()
		}
	}
}

// Close closes the connection at once: what waits to be written may be lost.
func (c *coalescer) Close() error {
	c.mu.Lock()
	c.closing = true
	if c.err == nil {
		c.err = io.ErrClosedPipe
	}
	c.changed.Broadcast()
	c.mu.Unlock()
	err := c.Conn.Close()
	<-c.done
	return err
}

// gulper reads a busy connection in large pieces: yamux asks for a few KiB at a time. An idle one holds no buffer.
type gulper struct {
	net.Conn
	buffer *[]byte // from coalesceBuffers; nil: none
	rest   []byte  // of what was read into buffer
	busy   bool    // the last Read got all that it had asked for
}

func (g *gulper) Read(p []byte) (int, error) {
	if len(g.rest) == 0 && !g.busy {
		n, err := g.Conn.Read(p)
		g.busy = n == len(p)
		return n, err
	}
	if len(g.rest) == 0 {
		if g.buffer == nil {
			g.buffer = coalesceBuffers.Get().(*[]byte)
		}
		b := (*g.buffer)[:gulp]
		n, err := g.Conn.Read(b)
		g.rest, g.busy = b[:n], n == len(b)
		if n == 0 {
			return 0, err
		}
	}
	n := copy(p, g.rest)
	g.rest = g.rest[n:]
	if len(g.rest) == 0 && !g.busy {
		coalesceBuffers.Put(g.buffer)
		g.buffer = nil
	}
	return n, nil
}
