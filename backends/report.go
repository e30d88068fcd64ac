package backends

import (
	"net/netip"
	"time"
)

// ExecAudit says how the programs that a sandbox executes are recorded.
type ExecAudit struct {
	Mode string `json:"mode,omitempty"` // "required", "preferred" or "off" (also empty)
	// Strict makes each execution and connection wait until Reports has returned for its report; else it waits until the
	// agent holds the report.
	Strict bool `json:"strict,omitempty"`
	// StuckLimit is how long a program waits for reports to be taken before the sandbox ends; 0: 30 s.
	StuckLimit time.Duration `json:"stuck_limit_ns,omitempty"`
}

// Modes of an ExecAudit.
const (
	ExecAuditRequired  = "required"  // Start fails where it can't be done
	ExecAuditPreferred = "preferred" // Info.ExecAudit says that it is not done
	ExecAuditOff       = "off"
)

// Report is something that happened in a sandbox, as told by its agent: reported from inside, not seen by the gate. One
// of the pointers is set. The tags are of the agent's own stream.
type Report struct {
	Sequence uint64 `cbor:"1,keyasint"` // 1, 2, 3, ... without gaps; names the execution that a later report is about
	Time     int64  `cbor:"2,keyasint"` // Unix nanoseconds
	// Channel is the one whose process's descendants it is about (Process.Channel); 0: of none.
	Channel uint32 `cbor:"3,keyasint,omitempty"`

	Exec      *Exec      `cbor:"4,keyasint,omitempty"`
	Started   *Started   `cbor:"5,keyasint,omitempty"`
	Ended     *Ended     `cbor:"6,keyasint,omitempty"`
	Connect   *Connect   `cbor:"7,keyasint,omitempty"`
	Script    *Script    `cbor:"8,keyasint,omitempty"`
	Unaudited *Unaudited `cbor:"9,keyasint,omitempty"`
}

// Limits of what a report holds. More is cut, and what is cut is told by count, length and hash.
const (
	MaxReportPath    = 4 << 10  // bytes of a path
	MaxReportArgs    = 16 << 10 // bytes of all arguments, each with a zero byte at its end
	MaxReportStrings = 1024     // arguments
	MaxReportScript  = 64 << 10 // bytes of a script
)

// Args is the arguments of a program (argv), in bytes as they were.
type Args struct {
	List  [][]byte `cbor:"1,keyasint,omitempty"` // the first ones, as far as the limits go; the last of these may be cut
	Count uint32   `cbor:"2,keyasint,omitempty"` // of all
	Bytes uint64   `cbor:"3,keyasint,omitempty"` // of all, each with its zero byte
	Hash  []byte   `cbor:"4,keyasint,omitempty"` // SHA-256 of all, each with its zero byte; only if List is not all
	// Unread says that Count, Bytes and Hash are those of what was read before a limit of the reader's own, more than
	// any program can be started with.
	Unread bool `cbor:"5,keyasint,omitempty"`
}

// Exec is an execution that a process asked the kernel for (execve, execveat), before it happens. It may fail.
type Exec struct {
	PID    int    `cbor:"1,keyasint"`
	Parent int    `cbor:"2,keyasint,omitempty"`
	UID    uint32 `cbor:"3,keyasint,omitempty"`
	Path   []byte `cbor:"4,keyasint,omitempty"` // as asked; of an open file, what the kernel calls it
	Dir    []byte `cbor:"5,keyasint,omitempty"` // working directory
	Args   Args   `cbor:"6,keyasint,omitempty"`
	Script []byte `cbor:"7,keyasint,omitempty"` // SHA-256 of the file if it is a script: see Script
	// Error says why some of the above could not be read.
	Error string `cbor:"8,keyasint,omitempty"`
	// Count is more than 0 in a report of identical executions that followed the one called Of, none of whose files was
	// there.
	Count uint32 `cbor:"9,keyasint,omitempty"`
	Of    uint64 `cbor:"10,keyasint,omitempty"`
	Entry string `cbor:"11,keyasint,omitempty"` // the system call, if it is not the machine's own execve
	// By is the sequence of the last Exec of the process, or of the nearest of its ancestors that has one and lives: the
	// program that asks. Where none lives any more, it is the Exec of what the gate asked for. 0: not known.
	By uint64 `cbor:"12,keyasint,omitempty"`
}

// Started is that a program began to run: it has called set_tid_address(2), as every dynamically linked one and most
// others do.
type Started struct {
	Exec  uint64 `cbor:"1,keyasint,omitempty"` // sequence of the Exec; 0: of none that is known
	PID   int    `cbor:"2,keyasint"`
	File  []byte `cbor:"3,keyasint,omitempty"` // of the running program: the interpreter of a script, as the kernel calls it
	Args  *Args  `cbor:"4,keyasint,omitempty"` // what it really got, if that is not what the Exec says
	Image []byte `cbor:"5,keyasint,omitempty"` // SHA-256 of a file that has no name any more
}

// Ended is the end of a process that executed something.
type Ended struct {
	Exec       uint64 `cbor:"1,keyasint,omitempty"` // sequence of its last Exec
	PID        int    `cbor:"2,keyasint"`
	Code       int    `cbor:"3,keyasint,omitempty"`
	Signal     string `cbor:"4,keyasint,omitempty"` // name without SIG
	CoreDumped bool   `cbor:"5,keyasint,omitempty"`
}

// Connect is an outgoing connection or datagram to an address that a process named; whether it came about is not known,
// and the process could have changed the address at the last moment.
type Connect struct {
	Exec    uint64     `cbor:"1,keyasint,omitempty"` // sequence of the process's last Exec
	PID     int        `cbor:"2,keyasint"`
	Program []byte     `cbor:"3,keyasint,omitempty"` // file of the running program
	Address netip.Addr `cbor:"4,keyasint"`
	Port    uint16     `cbor:"5,keyasint,omitempty"`
	Call    string     `cbor:"6,keyasint,omitempty"` // "connect", "sendto", "sendmsg" or "sendmmsg"
	Count   uint32     `cbor:"7,keyasint,omitempty"` // of identical ones that followed
	Error   string     `cbor:"8,keyasint,omitempty"` // why the address is missing
}

// Script is what an executed file holds that is no binary program, once for each content.
type Script struct {
	Hash []byte `cbor:"1,keyasint"` // SHA-256
	Size int64  `cbor:"2,keyasint"`
	Path []byte `cbor:"3,keyasint,omitempty"`
	Data []byte `cbor:"4,keyasint,omitempty"` // its first bytes
	// Cut says that the file is larger than what the agent reads: Hash is of its beginning, 16 MiB.
	Cut bool `cbor:"5,keyasint,omitempty"`
}

// Unaudited is a process that entered the sandbox from outside, as `docker exec` does: what it does is not reported.
type Unaudited struct {
	PID  int    `cbor:"1,keyasint"`
	UID  uint32 `cbor:"2,keyasint,omitempty"`
	File []byte `cbor:"3,keyasint,omitempty"`
	Args Args   `cbor:"4,keyasint,omitempty"`
}
