package sshserver

import (
	"net"
	"reflect"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/crypto/ssh"
)

// x/crypto (v0.58.0) reads ahead of itself: when NewServerConn fails while more than 16 packets wait to be taken, its two
// goroutines and the packets stay for ever, and a client needs no key to bring that about. Two things prevent it here:
// before the authentication begins a client gets its next bytes read only after it has been answered, so that no 16 packets
// can wait (lockstep); after a failed authentication what waits is taken and dropped (drain).

// firstBudget is how many bytes may be read between the gate's NEWKEYS and its next answer: fewer than 16 of the smallest
// packets there are (36 bytes with an AEAD cipher), and enough for what clients send there, which is NEWKEYS, an EXT_INFO
// and the service request (RFC 4253, section 10; RFC 8308).
const firstBudget = 512

// msgNewKeys is SSH_MSG_NEWKEYS (RFC 4253, section 12).
const msgNewKeys = 21

// lockstep is a client's connection as x/crypto sees it. It also notes that the client sends.
type lockstep struct {
	net.Conn
	heard *atomic.Bool // the client has sent something since keepAlive looked

	mu      sync.Mutex // guards what follows
	changed sync.Cond
	keyed   bool // the gate has sent NEWKEYS
	free    bool // no limit any more
	closed  bool
	left    int // bytes that may be read before the next answer, when keyed and not free
}

func newLockstep(conn net.Conn, heard *atomic.Bool) *lockstep {
	l := &lockstep{Conn: conn, heard: heard}
	l.changed.L = &l.mu
	return l
}

func (l *lockstep) Read(p []byte) (int, error) {
	l.mu.Lock()
	for l.keyed && !l.free && l.left == 0 && !l.closed {
		l.changed.Wait()
	}
	limited := l.keyed && !l.free
	if limited {
		p = p[:min(len(p), l.left)]
	}
	closed := l.closed
	l.mu.Unlock()
	if closed {
		return 0, net.ErrClosed
	}
	n, err := l.Conn.Read(p)
	if n > 0 {
		l.heard.Store(true)
	}
	if limited {
		l.mu.Lock()
		l.left -= min(n, l.left)
		l.mu.Unlock()
	}
	return n, err
}

func (l *lockstep) Write(p []byte) (int, error) {
	l.mu.Lock()
	if !l.free {
		// Until the keys are in use packets are in the clear: length, padding length, message number.
		l.keyed = l.keyed || len(p) > 5 && p[5] == msgNewKeys
		l.left = firstBudget
		l.changed.Broadcast()
	}
	l.mu.Unlock()
	return l.Conn.Write(p)
}

func (l *lockstep) Close() error {
	l.mu.Lock()
	l.closed = true
	l.changed.Broadcast()
	l.mu.Unlock()
	return l.Conn.Close()
}

// release ends the limit: the authentication has begun, and drain can clean up after it.
func (l *lockstep) release() {
	l.mu.Lock()
	l.free = true
	l.changed.Broadcast()
	l.mu.Unlock()
}

// drain takes what a failed authentication has left in x/crypto's queue, until its reader has ended; the connection must
// be closed. The queue has no exported way to it. It reports whether it was found: a test fails when a new version of
// x/crypto calls it something else.
func drain(pre ssh.ServerPreAuthConn) bool {
	conn := reflect.ValueOf(pre)
	if conn.Kind() != reflect.Pointer || conn.Elem().Kind() != reflect.Struct {
		return false
	}
	transport := conn.Elem().FieldByName("transport")
	if transport.IsValid() && transport.Kind() == reflect.Interface {
		transport = transport.Elem()
	}
	if !transport.IsValid() || transport.Kind() != reflect.Pointer || transport.IsNil() {
		return false
	}
	field := transport.Elem().FieldByName("incoming")
	if !field.IsValid() || field.Type() != reflect.TypeFor[chan []byte]() {
		return false
	}
	incoming := *(*chan []byte)(unsafe.Pointer(field.UnsafeAddr()))
	for range incoming { // its reader closes it when the connection is closed
	}
	return true
}
