package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"strconv"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/backends"
)

const (
	// maxRead is where the reading of arguments stops: the kernel starts no program with more than 6 MiB of them.
	maxRead = 8 << 20

	pointerRead = 512     // bytes of pointers read at once
	stringRead  = 4 << 10 // bytes of strings read at once, at first
	moreRead    = 64 << 10
)

// procPath is "/proc/TID/name", ended by a zero byte.
type procPath struct{ b []byte }

func (p *procPath) set(tid int, name string) *procPath {
	p.b = append(strconv.AppendInt(append(p.b[:0], "/proc/"...), int64(tid), 10), '/')
	p.b = append(append(p.b, name...), 0)
	return p
}

func (p *procPath) open(flags int) (int, unix.Errno) {
	for {
		fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, 0, uintptr(unsafe.Pointer(&p.b[0])), uintptr(flags|unix.O_CLOEXEC), 0, 0, 0)
		if errno != unix.EINTR {
			return int(fd), errno
		}
	}
}

// readlink gives what the link says, in b, or nil.
func (p *procPath) readlink(b []byte) []byte {
	at := unix.AT_FDCWD
	n, _, errno := unix.Syscall6(unix.SYS_READLINKAT, uintptr(at), uintptr(unsafe.Pointer(&p.b[0])),
		uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0, 0)
	if errno != 0 {
		return nil
	}
	return b[:n]
}

// memory reads another process's memory, in windows: what a program is started with mostly lies close together. The
// processes of a session are dumpable descendants of the agent, so /proc gives it to the agent.
//
// process_vm_readv(2) needs no open file, but older engines' profiles forbid it; /proc/TID/mem takes 20 µs more for a new
// process.
type memory struct {
	tid    int
	fd     int          // of /proc/TID/mem; -1: process_vm_readv is used
	path   *procPath    // for it
	noVM   *atomic.Bool // process_vm_readv is forbidden
	window [moreRead]byte
	at     uint64 // of window
	have   int    // bytes of window that are there
}

// read gives at least one byte from addr on, at most n as long as that fits the window.
func (m *memory) read(addr uint64, n int) ([]byte, unix.Errno) {
	if addr >= m.at && addr < m.at+uint64(m.have) {
		return m.window[addr-m.at : m.have], 0
	}
	m.have = 0
	got, errno := m.pread(m.window[:n], addr)
	if errno != 0 {
		return nil, errno
	}
	m.at, m.have = addr, got
	return m.window[:got], 0
}

// open begins the reading of tid's memory.
func (m *memory) open(tid int) {
	m.tid, m.fd, m.have = tid, -1, 0
}

func (m *memory) close() {
	if m.fd >= 0 {
		unix.Close(m.fd)
		m.fd = -1
	}
}

// pread reads at least one byte.
func (m *memory) pread(b []byte, addr uint64) (int, unix.Errno) {
	for {
		var n uintptr
		var errno unix.Errno
		if m.fd < 0 && !m.noVM.Load() {
			local := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
			remote := unix.RemoteIovec{Base: uintptr(addr), Len: len(b)}
			n, _, errno = unix.Syscall6(unix.SYS_PROCESS_VM_READV, uintptr(m.tid), uintptr(unsafe.Pointer(&local)), 1,
				uintptr(unsafe.Pointer(&remote)), 1, 0)
			if errno == unix.EPERM || errno == unix.ENOSYS {
				// By the profile, or because this process's memory can't be read at all: /proc tells which.
				fd, errno := m.path.set(m.tid, "mem").open(unix.O_RDONLY)
				if errno != 0 {
					return 0, errno
				}
				m.fd = fd
				m.noVM.Store(true)
				continue
			}
		} else {
			if m.fd < 0 {
				fd, errno := m.path.set(m.tid, "mem").open(unix.O_RDONLY)
				if errno != 0 {
					return 0, errno
				}
				m.fd = fd
			}
			n, _, errno = unix.Syscall6(unix.SYS_PREAD64, uintptr(m.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(addr), 0, 0)
		}
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return 0, errno
		case n == 0:
			return 0, unix.EFAULT
		default:
			return int(n), 0
		}
	}
}

// bytes fills b from addr.
func (m *memory) bytes(addr uint64, b []byte) unix.Errno {
	for len(b) > 0 {
		part, errno := m.read(addr, max(len(b), pointerRead))
		if errno != 0 {
			return errno
		}
		n := copy(b, part)
		b, addr = b[n:], addr+uint64(n)
	}
	return 0
}

// text appends the string at addr to b, without its zero byte, as far as limit; whole says that its end was met.
func (m *memory) text(b []byte, addr uint64, limit int) (out []byte, whole bool, errno unix.Errno) {
	_, whole, errno = m.each(addr, limit, stringRead, func(part []byte) { b = append(b, part...) })
	return b, whole, errno
}

// each calls f with the parts of the string at addr, as far as limit, and gives its length.
func (m *memory) each(addr uint64, limit, window int, f func([]byte)) (n int, whole bool, errno unix.Errno) {
	for n < limit {
		part, errno := m.read(addr, window)
		if errno != 0 {
			return n, false, errno
		}
		end := bytes.IndexByte(part, 0)
		if end >= 0 {
			part = part[:end]
		}
		part = part[:min(len(part), limit-n)]
		f(part)
		n, addr = n+len(part), addr+uint64(len(part))
		if end >= 0 && n < limit {
			return n, true, 0
		}
	}
	return n, false, 0
}

// args reads the arguments at addr, the kernel's way: an array of pointers, ended by a null pointer.
func (m *memory) args(c *argCollector, addr uint64, pointer int) unix.Errno {
	if addr == 0 {
		return 0
	}
	var pointers [pointerRead]byte
	window := stringRead
	for {
		// A page that isn't there may follow the array.
		n, errno := m.pread(pointers[:], addr)
		switch {
		case errno != 0:
			return errno
		case n < pointer:
			return unix.EFAULT
		}
		for p := pointers[:n/pointer*pointer]; len(p) > 0; p = p[pointer:] {
			at := uint64(binary.LittleEndian.Uint32(p))
			if pointer == 8 {
				at = binary.LittleEndian.Uint64(p)
			}
			if at == 0 {
				return 0
			}
			room := maxRead - c.total - pointer*c.count
			if room <= 0 {
				c.cut = true
				return 0
			}
			_, whole, errno := m.each(at, room, window, c.write)
			if errno != 0 {
				return errno
			}
			if !whole {
				c.cut = true
				return 0
			}
			c.end()
			if c.total > stringRead {
				window = moreRead
			}
		}
		addr += uint64(n / pointer * pointer)
	}
}

// argCollector gathers arguments, as one text in which each has a zero byte at its end, within the limits of a report.
type argCollector struct {
	flat  []byte // the beginning, as far as the limits go
	list  [][]byte
	count int       // arguments that have ended
	total int       // bytes
	hash  hash.Hash // of all, if flat is not all
	cut   bool      // not all was read
}

func (c *argCollector) reset() {
	*c = argCollector{flat: c.flat[:0], list: c.list[:0]}
}

// write adds a part of an argument.
func (c *argCollector) write(part []byte) {
	c.total += len(part)
	room := backends.MaxReportArgs - len(c.flat)
	if c.hash == nil && len(part) <= room && c.count < backends.MaxReportStrings {
		c.flat = append(c.flat, part...)
		return
	}
	if c.hash == nil {
		c.hash = sha256.New()
		c.hash.Write(c.flat)
		if c.count < backends.MaxReportStrings {
			c.flat = append(c.flat, part[:room]...)
		}
	}
	c.hash.Write(part)
}

var zeroByte = []byte{0}

// end ends an argument.
func (c *argCollector) end() {
	c.write(zeroByte)
	c.count++
}

// stream adds arguments with their zero bytes, as /proc/PID/cmdline gives them.
func (c *argCollector) stream(b []byte) {
	for len(b) > 0 {
		i := bytes.IndexByte(b, 0)
		if i < 0 {
			c.write(b)
			return
		}
		c.write(b[:i])
		c.end()
		b = b[i+1:]
	}
}

// done gives what was gathered. It is valid until reset.
func (c *argCollector) done() backends.Args {
	rest := c.flat
	for i := bytes.IndexByte(rest, 0); i >= 0; i = bytes.IndexByte(rest, 0) {
		c.list = append(c.list, rest[:i])
		rest = rest[i+1:]
	}
	if len(rest) > 0 {
		c.list = append(c.list, rest)
	}
	a := backends.Args{List: c.list, Count: uint32(c.count), Bytes: uint64(c.total), Unread: c.cut}
	if c.hash != nil {
		a.Hash = c.hash.Sum(nil)
	}
	return a
}

// mark is what tells gathered arguments from others: short ones are the mark themselves, of others it is a hash. A process
// that lives has two.
type mark string

const maxPlainMark = 512

func (c *argCollector) mark() mark {
	switch {
	case c.hash != nil:
		return mark(c.hash.Sum([]byte("all ")))
	case len(c.flat) > maxPlainMark:
		sum := sha256.Sum256(c.flat)
		return mark("flat" + string(sum[:]))
	}
	return mark("\x00" + string(c.flat)) // the others begin with a letter
}

// is says whether the gathered ones are those that m was made of. One empty argument is what the kernel makes of none.
func (c *argCollector) is(m mark) bool {
	return c.mark() == m || m == mark("\x00") && bytes.Equal(c.flat, zeroByte)
}
