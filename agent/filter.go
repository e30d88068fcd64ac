package agent

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// absent is the number of a system call that a machine does not have.
const absent = ^uint32(0)

// machine is a way into the kernel: an architecture of system calls, and its numbers.
type machine struct {
	arch    uint32 // AUDIT_ARCH_*
	pointer int    // bytes of a pointer
	entry   string // empty: the machine's own

	execve, execveat, connect, sendto, sendmsg, sendmmsg, socketcall, setTIDAddress, exitGroup, prctl, prlimit64,
	setpriority, schedSetparam, schedSetscheduler, schedSetaffinity, schedSetattr, ioprioSet uint32
}

// ownMachines are those of this program's GOARCH.
var ownMachines = machines[runtime.GOARCH]

// x32Bit marks the numbers of the x32 machine, which shares its AUDIT_ARCH with amd64.
const x32Bit = 0x40000000

// The machines of each GOARCH, its own first: from the kernel's syscall tables. Those of arm64 and arm are not tested.
var machines = map[string][]machine{
	"amd64": {{
		arch: unix.AUDIT_ARCH_X86_64, pointer: 8,
		execve: 59, execveat: 322, connect: 42, sendto: 44, sendmsg: 46, sendmmsg: 307, socketcall: absent,
		setTIDAddress: 218, exitGroup: 231, prctl: 157, prlimit64: 302, setpriority: 141, schedSetparam: 142,
		schedSetscheduler: 144, schedSetaffinity: 203, schedSetattr: 314, ioprioSet: 251,
	}, {
		arch: unix.AUDIT_ARCH_I386, pointer: 4, entry: "i386",
		execve: 11, execveat: 358, connect: 362, sendto: 369, sendmsg: 370, sendmmsg: 345, socketcall: 102,
		setTIDAddress: 258, exitGroup: 252, prctl: 172, prlimit64: 340, setpriority: 97, schedSetparam: 154,
		schedSetscheduler: 156, schedSetaffinity: 241, schedSetattr: 351, ioprioSet: 289,
	}},
	"arm64": {{
		arch: unix.AUDIT_ARCH_AARCH64, pointer: 8,
		execve: 221, execveat: 281, connect: 203, sendto: 206, sendmsg: 211, sendmmsg: 269, socketcall: absent,
		setTIDAddress: 96, exitGroup: 94, prctl: 167, prlimit64: 261, setpriority: 140, schedSetparam: 118,
		schedSetscheduler: 119, schedSetaffinity: 122, schedSetattr: 274, ioprioSet: 30,
	}, {
		arch: unix.AUDIT_ARCH_ARM, pointer: 4, entry: "arm",
		execve: 11, execveat: 387, connect: 283, sendto: 290, sendmsg: 296, sendmmsg: 374, socketcall: absent,
		setTIDAddress: 256, exitGroup: 248, prctl: 172, prlimit64: 369, setpriority: 97, schedSetparam: 154,
		schedSetscheduler: 156, schedSetaffinity: 241, schedSetattr: 380, ioprioSet: 314,
	}},
}

// Numbers that are the same on every machine.
const (
	ioUringSetup    = 425
	ioUringRegister = 427
)

// Calls of socketcall(2), from linux/net.h.
const (
	socketcallConnect  = 3
	socketcallSendto   = 11
	socketcallSendmsg  = 16
	socketcallSendmmsg = 20
)

// condition is one on an argument of a system call. The kernel takes some arguments as an int and ignores the high half.
type condition struct {
	arg   uint32
	test  byte
	value uint32
}

const (
	equal   = iota // low half is value
	differs        // low half is not value
	hasBits        // low half has a bit of value
	isZero         // all 64 bits are zero
	nonZero        // not all 64 bits are
)

// rule says what becomes of a system call when all conditions hold.
type rule struct {
	nr      uint32
	verdict uint32
	when    []condition
}

const (
	notify = unix.SECCOMP_RET_USER_NOTIF
	allow  = unix.SECCOMP_RET_ALLOW
	refuse = unix.SECCOMP_RET_ERRNO // with an errno added; 0: the call does nothing and succeeds
)

// rules are what holds for the processes of a session on one machine. All else is allowed.
func (m machine) rules(exits bool) []rule {
	always := []condition(nil)
	rules := []rule{
		{m.execve, notify, always},
		{m.execveat, notify, always},
		{m.setTIDAddress, notify, always}, // a program has started
		{m.connect, notify, always},
		{m.sendto, notify, []condition{{4, nonZero, 0}}},
		// Data in a SYN needs no connect(2). A datagram's address in sendmsg(2) is not seen: it stands behind a pointer.
		{m.sendmsg, notify, []condition{{2, hasBits, unix.MSG_FASTOPEN}}},
		{m.sendmmsg, notify, []condition{{3, hasBits, unix.MSG_FASTOPEN}}},
		// An undumpable process's memory can't be read, so that what it executes would be hidden.
		{m.prctl, refuse, []condition{{0, equal, unix.PR_SET_DUMPABLE}, {1, isZero, 0}}},
		// The agent has the same uid: only it knows which numbers are its own threads'.
		{m.prlimit64, notify, []condition{{0, differs, 0}, {2, nonZero, 0}}},
		{m.schedSetparam, notify, []condition{{0, differs, 0}}},
		{m.schedSetscheduler, notify, []condition{{0, differs, 0}}},
		{m.schedSetaffinity, notify, []condition{{0, differs, 0}}},
		{m.schedSetattr, notify, []condition{{0, differs, 0}}},
		{m.setpriority, notify, []condition{{1, differs, 0}}},
		{m.setpriority, notify, []condition{{0, equal, unix.PRIO_USER}}},
		{m.ioprioSet, notify, []condition{{1, differs, 0}}},
		{m.ioprioSet, notify, []condition{{0, equal, ioprioWhoUser}}},
	}
	for _, call := range []uint32{socketcallConnect, socketcallSendto, socketcallSendmsg, socketcallSendmmsg} {
		rules = append(rules, rule{m.socketcall, notify, []condition{{0, equal, call}}})
	}
	for nr := uint32(ioUringSetup); nr <= ioUringRegister; nr++ {
		rules = append(rules, rule{nr, refuse + uint32(unix.ENOSYS), always}) // it connects and sends unseen
	}
	if exits {
		rules = append(rules, rule{m.exitGroup, notify, always})
	}
	return rules
}

// From linux/ioprio.h.
const (
	ioprioWhoProcess = 1
	ioprioWhoGroup   = 2
	ioprioWhoUser    = 3
)

// Offsets in struct seccomp_data; a little-endian machine has the low half of an argument first.
const (
	offsetNr   = 0
	offsetArch = 4
	offsetArgs = 16
)

// buildFilter assembles the program for all machines of this GOARCH. exits: ends of processes are notified, too.
func buildFilter(exits bool) ([]unix.SockFilter, error) {
	if ownMachines == nil {
		return nil, errors.New("no filter for " + runtime.GOARCH)
	}
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	jump := func(test uint16, k uint32, yes, no int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, Jt: uint8(yes), Jf: uint8(no), K: k}
	}
	result := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }

	var prog []unix.SockFilter
	for _, m := range ownMachines {
		section := []unix.SockFilter{load(offsetNr)}
		if m.arch == unix.AUDIT_ARCH_X86_64 {
			section = append(section, jump(unix.BPF_JGE, x32Bit, 0, 1), result(refuse+uint32(unix.ENOSYS)))
		}
		rules := m.rules(exits)
		for i := 0; i < len(rules); {
			nr := rules[i].nr
			var body []unix.SockFilter
			for ; i < len(rules) && rules[i].nr == nr; i++ {
				body = append(body, assemble(rules[i], load, jump, result)...)
			}
			if nr == absent {
				continue
			}
			body = append(body, result(allow))
			if len(body) > 0xff {
				return nil, errors.New("a filter's rule is too long")
			}
			section = append(append(section, jump(unix.BPF_JEQ, nr, 0, len(body))), body...)
		}
		section = append(section, result(allow))
		prog = append(prog, load(offsetArch), jump(unix.BPF_JEQ, m.arch, 1, 0),
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(len(section))})
		prog = append(prog, section...)
	}
	return append(prog, result(unix.SECCOMP_RET_KILL_PROCESS)), nil // another machine, of which nothing is known
}

// assemble gives the code of one rule, whose number is known to match; it goes on behind itself when a condition fails.
func assemble(r rule, load func(uint32) unix.SockFilter, jump func(uint16, uint32, int, int) unix.SockFilter,
	result func(uint32) unix.SockFilter) []unix.SockFilter {
	size := map[byte]int{equal: 2, differs: 2, hasBits: 2, isZero: 4, nonZero: 4}
	left := 1 // instructions from here to the rule's end
	for _, c := range r.when {
		left += size[c.test]
	}
	var code []unix.SockFilter
	for _, c := range r.when {
		low, high := load(offsetArgs+8*c.arg), load(offsetArgs+8*c.arg+4)
		switch c.test {
		case equal:
			code = append(code, low, jump(unix.BPF_JEQ, c.value, 0, left-2))
		case differs:
			code = append(code, low, jump(unix.BPF_JEQ, c.value, left-2, 0))
		case hasBits:
			code = append(code, low, jump(unix.BPF_JSET, c.value, 0, left-2))
		case isZero:
			code = append(code, low, jump(unix.BPF_JEQ, 0, 0, left-2), high, jump(unix.BPF_JEQ, 0, 0, left-4))
		case nonZero:
			code = append(code, low, jump(unix.BPF_JEQ, 0, 0, 2), high, jump(unix.BPF_JEQ, 0, left-4, 0))
		}
		left -= size[c.test]
	}
	return append(code, result(r.verdict))
}

// installFilter puts the filter on this thread, and on what it executes and starts, and returns the listener to which it
// reports. The thread must have no_new_privs.
func installFilter(exits bool) (int, error) {
	prog, err := buildFilter(exits)
	if err != nil {
		return -1, err
	}
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	// A signal must not interrupt what was notified (Linux 5.19): Go and JVM programs would be notified again and again.
	for _, flags := range []uintptr{unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER} {
		fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&fprog)))
		switch errno {
		case 0:
			return int(fd), nil
		case unix.EINVAL:
			err = fmt.Errorf("the kernel has no notifications of seccomp (Linux 5.5): %w", errno)
		case unix.EBUSY:
			return -1, fmt.Errorf("another program listens to this sandbox's system calls: %w", errno)
		default:
			return -1, fmt.Errorf("seccomp: %w", errno)
		}
	}
	return -1, err
}
