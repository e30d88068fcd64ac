package auditlog

import "time"

// Kind says what a record records. The numbers are part of the format (FORMAT.md) and never reused.
type Kind uint8

const (
	KindConnect      Kind = 1  // Connect
	KindHandshake    Kind = 2  // Handshake
	KindAuthenticate Kind = 3  // Authenticate
	KindDecision     Kind = 4  // Decision
	KindSandbox      Kind = 5  // Sandbox
	KindChannelOpen  Kind = 6  // ChannelOpen
	KindRequest      Kind = 7  // Request
	KindData         Kind = 8  // Data
	KindChannelClose Kind = 9  // ChannelClose
	KindExit         Kind = 10 // Exit
	KindAlert        Kind = 11 // Alert
	KindEnd          Kind = 12 // End
	KindRefused      Kind = 13 // Refused, only in the gate's own log
)

// Record is one thing that happened.
type Record struct {
	Sequence uint64    // 0, 1, 2, ... within a session, without gaps
	Time     time.Time // nanoseconds, UTC
	Channel  uint32    // the connection's channels are numbered from 1 in the order they were opened; 0: the connection
	Body     Body
}

// Body is what a record says; its Kind tells which of the types below it is.
type Body interface{ Kind() Kind }

// Connect is a TCP connection to the gate.
type Connect struct {
	Gate    string `cbor:"1,keyasint,omitempty" json:"gate,omitempty"`
	Source  string `cbor:"2,keyasint,omitempty" json:"source,omitempty"`  // address:port of the client
	Local   string `cbor:"3,keyasint,omitempty" json:"local,omitempty"`   // address:port of the gate
	Version string `cbor:"4,keyasint,omitempty" json:"version,omitempty"` // of the gate's program
}

// Handshake is a completed key exchange (RFC 4253).
type Handshake struct {
	Client  string `cbor:"1,keyasint,omitempty" json:"client,omitempty"` // client's version string
	Server  string `cbor:"2,keyasint,omitempty" json:"server,omitempty"`
	Kex     string `cbor:"3,keyasint,omitempty" json:"kex,omitempty"`
	HostKey string `cbor:"4,keyasint,omitempty" json:"host_key,omitempty"`
	// Ciphers and MACs, client to server (In) and server to client (Out).
	CipherIn  string `cbor:"5,keyasint,omitempty" json:"cipher_in,omitempty"`
	CipherOut string `cbor:"6,keyasint,omitempty" json:"cipher_out,omitempty"`
	MACIn     string `cbor:"7,keyasint,omitempty" json:"mac_in,omitempty"`
	MACOut    string `cbor:"8,keyasint,omitempty" json:"mac_out,omitempty"`
}

// Authenticate is one authentication attempt (RFC 4252). Result is "accepted-offer" (a key that may sign), "refused",
// "proven" or "failed" (a signature that does not verify).
type Authenticate struct {
	User        string `cbor:"1,keyasint,omitempty" json:"user,omitempty"`
	Method      string `cbor:"2,keyasint,omitempty" json:"method,omitempty"`
	KeyType     string `cbor:"3,keyasint,omitempty" json:"key_type,omitempty"`
	Fingerprint string `cbor:"4,keyasint,omitempty" json:"fingerprint,omitempty"`
	Result      string `cbor:"5,keyasint,omitempty" json:"result,omitempty"`
	Reason      string `cbor:"6,keyasint,omitempty" json:"reason,omitempty"`
}

// Decision is what policy answered to a login, or to its re-evaluation after a change.
type Decision struct {
	ID        string    `cbor:"1,keyasint,omitempty" json:"id,omitempty"`
	Revision  string    `cbor:"2,keyasint,omitempty" json:"revision,omitempty"`
	Allow     bool      `cbor:"3,keyasint,omitempty" json:"allow"`
	Reason    string    `cbor:"4,keyasint,omitempty" json:"reason,omitempty"`
	User      string    `cbor:"5,keyasint,omitempty" json:"user,omitempty"`
	Choice    string    `cbor:"6,keyasint,omitempty" json:"choice,omitempty"`
	Ticket    string    `cbor:"7,keyasint,omitempty" json:"ticket,omitempty"`
	Profile   string    `cbor:"8,keyasint,omitempty" json:"profile,omitempty"`
	NotBefore time.Time `cbor:"9,keyasint,omitzero" json:"not_before,omitzero"`
	NotAfter  time.Time `cbor:"10,keyasint,omitzero" json:"not_after,omitzero"`
	Why       string    `cbor:"11,keyasint,omitempty" json:"why,omitempty"`
	Approved  string    `cbor:"12,keyasint,omitempty" json:"approved_by,omitempty"`
	Permit    string    `cbor:"13,keyasint,omitempty" json:"permit,omitempty"` // JSON, as decided
	Groups    []string  `cbor:"14,keyasint,omitempty" json:"groups,omitempty"` // of the user, as policy knows them
}

// Sandbox is a sandbox started, or not (Error).
type Sandbox struct {
	ID      string        `cbor:"1,keyasint,omitempty" json:"id,omitempty"`
	Backend string        `cbor:"2,keyasint,omitempty" json:"backend,omitempty"`
	Image   string        `cbor:"3,keyasint,omitempty" json:"image,omitempty"`
	Digest  string        `cbor:"4,keyasint,omitempty" json:"digest,omitempty"`
	Node    string        `cbor:"5,keyasint,omitempty" json:"node,omitempty"`
	Spec    string        `cbor:"6,keyasint,omitempty" json:"spec,omitempty"` // JSON, as started
	Took    time.Duration `cbor:"7,keyasint,omitempty" json:"took_ns,omitempty"`
	Error   string        `cbor:"8,keyasint,omitempty" json:"error,omitempty"`
	// ExecAudit says whether the programs it executes are reported: "on", "on, strict", "off", or "off: " and why they can't be.
	ExecAudit string `cbor:"9,keyasint,omitempty" json:"exec_audit,omitempty"`

	// Of a sandbox that has joined a target, which runs by itself.
	Target          string   `cbor:"10,keyasint,omitempty" json:"target,omitempty"`           // namespace/pod, or the container's name
	TargetID        string   `cbor:"11,keyasint,omitempty" json:"target_id,omitempty"`        // the pod's UID, or the container's ID
	TargetContainer string   `cbor:"12,keyasint,omitempty" json:"target_container,omitempty"` // in the pod
	TargetImage     string   `cbor:"13,keyasint,omitempty" json:"target_image,omitempty"`     // of the container, as asked for
	TargetDigest    string   `cbor:"14,keyasint,omitempty" json:"target_digest,omitempty"`    // of its image
	Joined          []string `cbor:"15,keyasint,omitempty" json:"joined,omitempty"`           // "network", "processes", "files"
	Weaker          []string `cbor:"16,keyasint,omitempty" json:"weaker,omitempty"`           // guarantees that do not hold, in words
}

// ChannelOpen is a channel asked for (RFC 4254, section 5.1), by the client, or by the gate where a connection was made
// to what is forwarded to the client. Error is the refusal's text.
type ChannelOpen struct {
	Type  string `cbor:"1,keyasint,omitempty" json:"type,omitempty"`
	Error string `cbor:"2,keyasint,omitempty" json:"error,omitempty"`
	Extra []byte `cbor:"3,keyasint,omitempty" json:"extra,omitempty"` // type-specific data, cut at 1 KiB
	// Of a forwarded connection; what became of it is in its Forward.
	Target     string   `cbor:"4,keyasint,omitempty" json:"target,omitempty"`     // host:port, or a socket's path
	Originator string   `cbor:"5,keyasint,omitempty" json:"originator,omitempty"` // address:port
	Addresses  []string `cbor:"6,keyasint,omitempty" json:"addresses,omitempty"`  // that policy admits, in the order to be tried
	Session    uint32   `cbor:"7,keyasint,omitempty" json:"session,omitempty"`    // the channel whose agent or X server it is for
}

// Request is a request on a channel, or a global one (channel 0), with its answer.
type Request struct {
	Type    string `cbor:"1,keyasint,omitempty" json:"type,omitempty"`
	Command []byte `cbor:"2,keyasint,omitempty" json:"command,omitempty"` // exec: as sent
	Name    string `cbor:"3,keyasint,omitempty" json:"name,omitempty"`    // subsystem, environment variable, signal; tcpip-forward: what to listen on
	Value   string `cbor:"4,keyasint,omitempty" json:"value,omitempty"`   // environment variable's value; tcpip-forward: what is listened on
	Term    string `cbor:"5,keyasint,omitempty" json:"term,omitempty"`    // pty-req
	Columns uint32 `cbor:"6,keyasint,omitempty" json:"columns,omitempty"` // pty-req, window-change
	Rows    uint32 `cbor:"7,keyasint,omitempty" json:"rows,omitempty"`
	OK      bool   `cbor:"8,keyasint,omitempty" json:"ok"`
	Reason  string `cbor:"9,keyasint,omitempty" json:"reason,omitempty"`   // why not
	Payload []byte `cbor:"10,keyasint,omitempty" json:"payload,omitempty"` // of unknown or undecodable requests, cut at 1 KiB
}

// Stream says which way data went.
type Stream uint8

const (
	Input  Stream = 0 // client to program
	Output Stream = 1 // program to client, stdout or terminal
	Error  Stream = 2 // program to client, stderr
)

// Data is bytes that were passed. With Hidden, input was typed that is likely a password: neither bytes nor length are kept.
type Data struct {
	Stream Stream `cbor:"1,keyasint,omitempty" json:"stream"`
	Data   []byte `cbor:"2,keyasint,omitempty" json:"data,omitempty"`
	Hidden bool   `cbor:"3,keyasint,omitempty" json:"hidden,omitempty"`
	EOF    bool   `cbor:"4,keyasint,omitempty" json:"eof,omitempty"` // the stream's end, half-close
}

// ChannelClose is a channel's end, with the bytes that passed.
type ChannelClose struct {
	Input  uint64 `cbor:"1,keyasint,omitempty" json:"input"`
	Output uint64 `cbor:"2,keyasint,omitempty" json:"output"`
	Error  uint64 `cbor:"3,keyasint,omitempty" json:"error"`
}

// Exit is a program's end (RFC 4254, section 6.10).
type Exit struct {
	Code   uint32 `cbor:"1,keyasint,omitempty" json:"code"`
	Signal string `cbor:"2,keyasint,omitempty" json:"signal,omitempty"`
	Core   bool   `cbor:"3,keyasint,omitempty" json:"core,omitempty"`
	Error  string `cbor:"4,keyasint,omitempty" json:"error,omitempty"` // it could not be started, or was lost
}

// Alert is something an auditor should look at.
type Alert struct {
	Name   string `cbor:"1,keyasint,omitempty" json:"name,omitempty"`
	Detail string `cbor:"2,keyasint,omitempty" json:"detail,omitempty"`
}

// End is a session's end, always the last record of a session that ended under its gate. Cause is one of the words in
// FORMAT.md: "client-left", "expired", "revoked", "idle", "max-duration", "refused", "sandbox-failed", "sandbox-gone",
// "audit-lost", "shutdown", "ended-by-operator", "protocol-error", "internal-error"; "interrupted" is written by the
// restart that seals what a killed gate left.
type End struct {
	Cause  string `cbor:"1,keyasint,omitempty" json:"cause,omitempty"`
	Detail string `cbor:"2,keyasint,omitempty" json:"detail,omitempty"`
}

// Refused is connections that never proved a key, folded by source.
type Refused struct {
	Source       string    `cbor:"1,keyasint,omitempty" json:"source,omitempty"` // IP address
	Client       string    `cbor:"2,keyasint,omitempty" json:"client,omitempty"` // version string of the first
	Users        []string  `cbor:"3,keyasint,omitempty" json:"users,omitempty"`
	Fingerprints []string  `cbor:"4,keyasint,omitempty" json:"fingerprints,omitempty"`
	Count        uint64    `cbor:"5,keyasint,omitempty" json:"count"`
	Reason       string    `cbor:"6,keyasint,omitempty" json:"reason,omitempty"`
	First        time.Time `cbor:"7,keyasint,omitzero" json:"first,omitzero"`
	Last         time.Time `cbor:"8,keyasint,omitzero" json:"last,omitzero"`
}

func (*Connect) Kind() Kind      { return KindConnect }
func (*Handshake) Kind() Kind    { return KindHandshake }
func (*Authenticate) Kind() Kind { return KindAuthenticate }
func (*Decision) Kind() Kind     { return KindDecision }
func (*Sandbox) Kind() Kind      { return KindSandbox }
func (*ChannelOpen) Kind() Kind  { return KindChannelOpen }
func (*Request) Kind() Kind      { return KindRequest }
func (*Data) Kind() Kind         { return KindData }
func (*ChannelClose) Kind() Kind { return KindChannelClose }
func (*Exit) Kind() Kind         { return KindExit }
func (*Alert) Kind() Kind        { return KindAlert }
func (*End) Kind() Kind          { return KindEnd }
func (*Refused) Kind() Kind      { return KindRefused }
