// Package ports hands out TCP ports on loopback to tests that start servers on them a moment later.
package ports

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
)

// The ports lie below those that kernels give out by themselves (Linux: from 32768), and those of a cluster's nodes (from 30000): no
// outgoing connection takes one before the server listens on it, nor while the server is stopped to be started again.
const first, count = 20000, 10000

var (
	mu   sync.Mutex // guards all below
	next = os.Getpid() * 97 % count
	// held has a UDP socket on each port that was handed out, until the process ends: so no other process of these tests takes it. TCP
	// stays free for the server.
	held []net.PacketConn
)

// Take gives a port of 127.0.0.1 on which nobody listens. No other call gets it, in this process or another.
func Take() (int, error) {
	mu.Lock()
	defer mu.Unlock()
	for range count {
		port := first + next
		next = (next + 1) % count
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		mark, err := net.ListenPacket("udp", addr)
		if err != nil {
			continue
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			mark.Close()
			continue
		}
		held = append(held, mark)
		if err := l.Close(); err != nil {
			return 0, fmt.Errorf("take port: %w", err)
		}
		return port, nil
	}
	return 0, errors.New("take port: all are taken")
}
