package agent

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/backends"
)

// connect reports an address that a process sends to, if it is one of the internet.
func (r *reader) connect(name string, addr, length uint64) error {
	r.mem.open(int(r.n.tid))
	defer r.mem.close()
	return r.readAddress(name, addr, length)
}

// readAddress reads a struct sockaddr_in or sockaddr_in6 from the memory that is open.
func (r *reader) readAddress(name string, addr, length uint64) error {
	var b [28]byte
	n := int(min(length&0xffff_ffff, uint64(len(b))))
	if n < 2 {
		return nil
	}
	if errno := r.mem.bytes(addr, b[:n]); errno != 0 {
		return r.unread(name, errno)
	}
	port := binary.BigEndian.Uint16(b[2:])
	switch family := binary.NativeEndian.Uint16(b[:]); {
	// The kernel takes a datagram's address of no family as one of IPv4.
	case n >= 16 && (family == unix.AF_INET || family == unix.AF_UNSPEC && name != "connect"):
		return r.tellConnect(name, netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port), "")
	case n >= 24 && family == unix.AF_INET6:
		return r.tellConnect(name, netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), port), "")
	case !quietFamily(family):
		return r.tellConnect(name, netip.AddrPort{}, "an address of the family "+strconv.Itoa(int(family)))
	}
	return nil
}

// quietFamily is for those that don't leave the sandbox, and for addresses that are none. A machine's hypervisor
// (AF_VSOCK), for one, is not among them.
func quietFamily(family uint16) bool {
	switch family {
	case unix.AF_UNSPEC, unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK, unix.AF_ALG:
		return true
	}
	return false
}

// unread reports that an address could not be read, unless the kernel will find nothing there either.
func (r *reader) unread(name string, errno unix.Errno) error {
	if errno == unix.EFAULT || errno == unix.EIO {
		return nil
	}
	return r.tellConnect(name, netip.AddrPort{}, "read memory: "+errno.Error())
}

// message reports the address in a struct msghdr.
func (r *reader) message(name string, m *machine, addr uint64) error {
	r.mem.open(int(r.n.tid))
	defer r.mem.close()
	return r.readMessageHeader(name, m, addr)
}

func (r *reader) readMessageHeader(name string, m *machine, addr uint64) error {
	var b [12]byte
	if errno := r.mem.bytes(addr, b[:m.pointer+4]); errno != 0 {
		return r.unread(name, errno)
	}
	at := uint64(binary.LittleEndian.Uint32(b[:]))
	if m.pointer == 8 {
		at = binary.LittleEndian.Uint64(b[:])
	}
	if at == 0 {
		return nil
	}
	return r.readAddress(name, at, uint64(binary.LittleEndian.Uint32(b[m.pointer:])))
}

// socketcall reports the i386 call of many calls, whose arguments stand in memory.
func (r *reader) socketcall(m *machine) error {
	r.mem.open(int(r.n.tid))
	defer r.mem.close()
	var b [24]byte
	which := uint32(r.n.args[0])
	size := map[uint32]int{socketcallConnect: 12, socketcallSendto: 24, socketcallSendmsg: 12, socketcallSendmmsg: 16}[which]
	if errno := r.mem.bytes(r.n.args[1], b[:size]); errno != 0 {
		return r.unread("socketcall", errno)
	}
	arg := func(i int) uint64 { return uint64(binary.LittleEndian.Uint32(b[4*i:])) }
	switch which {
	case socketcallConnect:
		return r.readAddress("connect", arg(1), arg(2))
	case socketcallSendto:
		return r.readAddress("sendto", arg(4), arg(5))
	case socketcallSendmsg:
		return r.readMessageHeader("sendmsg", m, arg(1))
	}
	return r.readMessageHeader("sendmmsg", m, arg(1))
}

func (r *reader) tellConnect(name string, to netip.AddrPort, problem string) error {
	if !r.listener.valid(r.n.id) {
		return nil
	}
	who := r.identify(int(r.n.tid))
	if who.pidfd >= 0 {
		unix.Close(who.pidfd)
	}
	c := backends.Connect{PID: who.pid, Address: to.Addr(), Port: to.Port(), Call: name, Error: problem}
	r.recorder.mu.Lock()
	if t := r.procs[who.pid]; t != nil {
		c.Exec, c.Program = t.exec, t.program
	}
	r.recorder.mu.Unlock()
	if c.Program == nil {
		c.Program = bytes.Clone(r.path.set(who.pid, "exe").readlink(r.link[:]))
	}
	key := ""
	if !r.reports.strict {
		key = fmt.Sprintf("%d %s %s %s", who.pid, name, to, problem)
	}
	r.report = backends.Report{Channel: r.channel, Connect: &c}
	_, err := r.folds.add(r.recorder, key, &r.report)
	return err
}
