package auditlog

import "time"

// What is reported from inside a sandbox by its agent, not seen by the gate. Numbers 15 to 19 are not taken.
const (
	KindProgramExec  Kind = 20 // ProgramExec
	KindProgramStart Kind = 21 // ProgramStart
	KindProgramEnd   Kind = 22 // ProgramEnd
	KindConnectOut   Kind = 23 // ConnectOut
	KindScript       Kind = 24 // Script
	KindUnaudited    Kind = 25 // Unaudited
)

// ProgramExec is an execution that a process asked its kernel for; it may have failed. Exec numbers it within the session.
// If not all arguments are kept, Hash is of all.
type ProgramExec struct {
	Time   time.Time `cbor:"1,keyasint,omitzero" json:"time,omitzero"` // by the sandbox's clock
	Exec   uint64    `cbor:"2,keyasint,omitempty" json:"exec,omitempty"`
	PID    int64     `cbor:"3,keyasint,omitempty" json:"pid,omitempty"`
	Parent int64     `cbor:"4,keyasint,omitempty" json:"parent,omitempty"`
	UID    uint32    `cbor:"5,keyasint,omitempty" json:"uid"`
	Path   []byte    `cbor:"6,keyasint,omitempty" json:"path,omitempty"` // as asked
	Dir    []byte    `cbor:"7,keyasint,omitempty" json:"dir,omitempty"`
	Args   [][]byte  `cbor:"8,keyasint,omitempty" json:"args,omitempty"`       // the first 16 KiB
	Count  uint32    `cbor:"9,keyasint,omitempty" json:"arg_count,omitempty"`  // of all arguments
	Bytes  uint64    `cbor:"10,keyasint,omitempty" json:"arg_bytes,omitempty"` // of all, each with a zero byte
	Hash   []byte    `cbor:"11,keyasint,omitempty" json:"arg_sha256,omitempty"`
	Unread bool      `cbor:"12,keyasint,omitempty" json:"arg_unread,omitempty"` // there was more than the agent reads
	Script []byte    `cbor:"13,keyasint,omitempty" json:"script_sha256,omitempty"`
	Error  string    `cbor:"14,keyasint,omitempty" json:"error,omitempty"` // why something is missing
	Again  uint32    `cbor:"15,keyasint,omitempty" json:"again,omitempty"` // identical ones that followed Exec; nothing else is set
	Call   string    `cbor:"16,keyasint,omitempty" json:"call,omitempty"`  // if it was not the usual one
	By     uint64    `cbor:"17,keyasint,omitempty" json:"by,omitempty"`    // Exec of the program that asked, as far as it is known
}

// ProgramStart is a program that runs, and what the kernel really gave it, read when it had started.
type ProgramStart struct {
	Time   time.Time `cbor:"1,keyasint,omitzero" json:"time,omitzero"`
	Exec   uint64    `cbor:"2,keyasint,omitempty" json:"exec,omitempty"` // 0: of none that is known
	PID    int64     `cbor:"3,keyasint,omitempty" json:"pid,omitempty"`
	File   []byte    `cbor:"4,keyasint,omitempty" json:"file,omitempty"`
	Differ bool      `cbor:"5,keyasint,omitempty" json:"differ,omitempty"` // the arguments are not those of the ProgramExec, but:
	Args   [][]byte  `cbor:"6,keyasint,omitempty" json:"args,omitempty"`
	Count  uint32    `cbor:"7,keyasint,omitempty" json:"arg_count,omitempty"`
	Bytes  uint64    `cbor:"8,keyasint,omitempty" json:"arg_bytes,omitempty"`
	Hash   []byte    `cbor:"9,keyasint,omitempty" json:"arg_sha256,omitempty"`
	Unread bool      `cbor:"10,keyasint,omitempty" json:"arg_unread,omitempty"`
	Image  []byte    `cbor:"11,keyasint,omitempty" json:"image_sha256,omitempty"` // of a file without a name
}

// ProgramEnd is the end of a process that executed something.
type ProgramEnd struct {
	Time   time.Time `cbor:"1,keyasint,omitzero" json:"time,omitzero"`
	Exec   uint64    `cbor:"2,keyasint,omitempty" json:"exec,omitempty"` // its last
	PID    int64     `cbor:"3,keyasint,omitempty" json:"pid,omitempty"`
	Code   uint32    `cbor:"4,keyasint,omitempty" json:"code"`
	Signal string    `cbor:"5,keyasint,omitempty" json:"signal,omitempty"`
	Core   bool      `cbor:"6,keyasint,omitempty" json:"core,omitempty"`
}

// ConnectOut is an address that a process wanted to connect or send to, as it claimed.
type ConnectOut struct {
	Time    time.Time `cbor:"1,keyasint,omitzero" json:"time,omitzero"`
	Exec    uint64    `cbor:"2,keyasint,omitempty" json:"exec,omitempty"` // the process's last
	PID     int64     `cbor:"3,keyasint,omitempty" json:"pid,omitempty"`
	Program []byte    `cbor:"4,keyasint,omitempty" json:"program,omitempty"`
	Address string    `cbor:"5,keyasint,omitempty" json:"address,omitempty"`
	Port    uint32    `cbor:"6,keyasint,omitempty" json:"port,omitempty"`
	Call    string    `cbor:"7,keyasint,omitempty" json:"call,omitempty"`
	Again   uint32    `cbor:"8,keyasint,omitempty" json:"again,omitempty"` // identical ones that followed
	Error   string    `cbor:"9,keyasint,omitempty" json:"error,omitempty"` // why the address is missing
}

// Script is an executed file that is no binary program, once for each content.
type Script struct {
	Hash []byte `cbor:"1,keyasint,omitempty" json:"sha256,omitempty"`
	Size int64  `cbor:"2,keyasint,omitempty" json:"size"`
	Path []byte `cbor:"3,keyasint,omitempty" json:"path,omitempty"`
	Data []byte `cbor:"4,keyasint,omitempty" json:"data,omitempty"` // its first 64 KiB
	Cut  bool   `cbor:"5,keyasint,omitempty" json:"cut,omitempty"`  // Hash is of the first 16 MiB
}

// Unaudited is a process that entered the sandbox from outside: what it does is not reported.
type Unaudited struct {
	Time time.Time `cbor:"1,keyasint,omitzero" json:"time,omitzero"`
	PID  int64     `cbor:"2,keyasint,omitempty" json:"pid,omitempty"`
	UID  uint32    `cbor:"3,keyasint,omitempty" json:"uid"`
	File []byte    `cbor:"4,keyasint,omitempty" json:"file,omitempty"`
	Args [][]byte  `cbor:"5,keyasint,omitempty" json:"args,omitempty"` // the first 16 KiB
}

func (*ProgramExec) Kind() Kind  { return KindProgramExec }
func (*ProgramStart) Kind() Kind { return KindProgramStart }
func (*ProgramEnd) Kind() Kind   { return KindProgramEnd }
func (*ConnectOut) Kind() Kind   { return KindConnectOut }
func (*Script) Kind() Kind       { return KindScript }
func (*Unaudited) Kind() Kind    { return KindUnaudited }
