package docker

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"

	"github.com/sallyport/sallyport/agent"
)

// startRelay has the engine start a relay in the container, and gives the stream that the agent then has.
func (s *sandbox) startRelay(ctx context.Context, user string) (net.Conn, error) {
	engine := s.backend.engine
	created, err := engine.ContainerExecCreate(ctx, s.id, container.ExecOptions{
		User: user, WorkingDir: "/", Cmd: []string{insideAgent, "relay", "--socket", agent.RelaySocket, "--pid", strconv.Itoa(s.joined.relayPID())},
		AttachStdin: true, AttachStdout: true, AttachStderr: true,
	})
	if err != nil {
		return nil, fmt.Errorf("create relay: %w", err)
	}
	stream, err := engine.ContainerExecAttach(ctx, created.ID, container.ExecAttachOptions{})
	if err != nil {
		return nil, fmt.Errorf("start relay: %w", err)
	}
	return newExecConn(stream), nil
}

// Frames of an attached stream, by the engine's API: the kind, three zero bytes, and the length of what follows.
const (
	execHeader = 8
	execStdout = 1
	execStderr = 2

	// execFrame bounds a frame; the engine's are of 32 KiB.
	execFrame = 16 << 20

	// execMessage bounds what a relay may say.
	execMessage = 512
)

var errExecFrame = errors.New("the engine's stream is damaged")

// execConn is the stdin and stdout of a program that the engine runs.
type execConn struct {
	net.Conn
	r io.Reader

	// Of Read, which one goroutine calls at a time.
	head   [execHeader]byte
	have   int    // bytes of head that are there
	left   uint32 // bytes of a frame's payload still to come
	stderr []byte // what the program has said
}

func newExecConn(stream types.HijackedResponse) *execConn {
	return &execConn{Conn: stream.Conn, r: stream.Reader}
}

func (c *execConn) Read(p []byte) (int, error) {
	for {
		for c.left == 0 {
			n, err := c.r.Read(c.head[c.have:])
			if c.have += n; c.have < execHeader {
				if err != nil {
					return 0, c.failed(err)
				}
				continue
			}
			c.have = 0
			c.left = binary.BigEndian.Uint32(c.head[4:])
			if kind := c.head[0]; kind != execStdout && kind != execStderr || c.left > execFrame {
				return 0, errExecFrame
			}
		}
		if len(p) == 0 {
			return 0, nil
		}
		if c.head[0] == execStdout {
			n, err := c.r.Read(p[:min(len(p), int(c.left))])
			c.left -= uint32(n)
			if n == 0 && err != nil {
				return 0, c.failed(err)
			}
			return n, nil
		}
		var b [execMessage]byte
		n, err := c.r.Read(b[:min(len(b), int(c.left))])
		c.left -= uint32(n)
		c.stderr = append(c.stderr, b[:min(n, execMessage-len(c.stderr))]...)
		if n == 0 && err != nil {
			return 0, c.failed(err)
		}
	}
}

// failed says more of the end of a stream whose program has said why.
func (c *execConn) failed(err error) error {
	if len(c.stderr) == 0 || !errors.Is(err, io.EOF) {
		return err
	}
	return fmt.Errorf("the relay said: %s", strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return ' '
		}
		return r
	}, strings.TrimSpace(string(c.stderr))))
}
