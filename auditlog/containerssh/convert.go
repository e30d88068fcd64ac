package containerssh

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// The types of messages.
const (
	typeConnect              = 0
	typeDisconnect           = 1
	typePassword             = 100
	typePasswordSuccessful   = 101
	typePasswordFailed       = 102
	typePasswordError        = 103
	typeKey                  = 104
	typeKeySuccessful        = 105
	typeKeyFailed            = 106
	typeKeyError             = 107
	typeInteractiveChallenge = 108
	typeInteractiveAnswer    = 109
	typeInteractiveFailed    = 110
	typeInteractiveError     = 111
	typeHandshakeFailed      = 198
	typeHandshakeSuccessful  = 199
	typeGlobalUnknown        = 200
	typeGlobalUndecodable    = 201
	typeReverseForward       = 202
	typeCancelReverseForward = 203
	typeStreamLocal          = 204
	typeCancelStreamLocal    = 205
	typeNewChannel           = 300
	typeChannelSuccessful    = 301
	typeChannelFailed        = 302
	typeForwardChannel       = 303
	typeReverseChannel       = 304
	typeX11Channel           = 305
	typeStreamLocalChannel   = 306
	typeReverseStreamLocal   = 307
	typeRequestUnknown       = 400
	typeRequestUndecodable   = 401
	typeEnv                  = 402
	typeExec                 = 403
	typePty                  = 404
	typeShell                = 405
	typeSignal               = 406
	typeSubsystem            = 407
	typeWindow               = 408
	typeX11                  = 409
	typeWriteClose           = 496
	typeClose                = 497
	typeExitSignal           = 498
	typeExit                 = 499
	typeIO                   = 500
	typeRequestFailed        = 501
)

// payload has all fields of all payloads. Passwords and answers are not among them: they are not taken over.
type payload struct {
	RemoteAddr     string `cbor:"remoteAddr"`
	Country        string `cbor:"country"`
	Username       string `cbor:"username"`
	Authenticated  string `cbor:"authenticatedUsername"`
	Key            string `cbor:"key"`
	Reason         string `cbor:"reason"`
	Instruction    string `cbor:"instruction"`
	RequestID      uint64 `cbor:"requestId"`
	RequestType    string `cbor:"requestType"`
	Payload        []byte `cbor:"payload"`
	ChannelType    string `cbor:"channelType"`
	BindHost       string `cbor:"bindHost"`
	BindPort       uint32 `cbor:"bindPort"`
	HostToConnect  string `cbor:"hostToConnect"`
	PortToConnect  uint32 `cbor:"portToConnect"`
	ConnectedHost  string `cbor:"connectedHost"`
	ConnectedPort  uint32 `cbor:"connectedPort"`
	OriginatorHost string `cbor:"originatorHost"`
	OriginatorPort uint32 `cbor:"originatorPort"`
	Path           string `cbor:"path"`
	Name           string `cbor:"name"`
	Value          string `cbor:"value"`
	Program        string `cbor:"program"`
	Term           string `cbor:"term"`
	Columns        uint32 `cbor:"columns"`
	Rows           uint32 `cbor:"rows"`
	Signal         string `cbor:"signal"`
	Subsystem      string `cbor:"subsystem"`
	ExitStatus     uint32 `cbor:"exitStatus"`
	CoreDumped     bool   `cbor:"coreDumped"`
	ErrorMessage   string `cbor:"errorMessage"`
	Stream         uint   `cbor:"stream"`
	Data           []byte `cbor:"data"`
}

// Bounds of what a converter keeps.
const (
	maxPending  = 64 // requests of all channels that wait for their answer
	maxChannels = 1 << 20
)

// Record is a record of ours that a message led to. Its sequence is not set.
type Record = auditlog.Record

// Converter turns the messages of one connection into records.
type Converter struct {
	Connection string // of the first message
	proven     bool
	ended      bool
	pending    []request
	channels   map[uint32]*auditlog.ChannelClose // bytes of those that are open
	last       time.Time
}

// request waits for its answer: only a failure has a message of its own, so one that is followed by anything but requests on
// its channel was granted.
type request struct {
	id  uint64
	rec Record
}

// NewConverter makes one.
func NewConverter() *Converter {
	return &Converter{channels: make(map[uint32]*auditlog.ChannelClose)}
}

// Ended says whether the connection's end was among the messages.
func (c *Converter) Ended() bool { return c.ended }

// Last is the time of the last message.
func (c *Converter) Last() time.Time { return c.last }

// Add gives the records of the next message.
func (c *Converter) Add(m Message) []Record {
	at := time.Unix(0, m.Time).UTC()
	if c.last.IsZero() {
		c.Connection = m.Connection
	}
	c.last = at
	channel := uint32(0)
	switch {
	case m.Channel >= maxChannels:
		return []Record{note(at, m.Type, fmt.Sprintf("channel %d: no connection has so many", m.Channel))}
	case m.Channel >= 0:
		channel = uint32(m.Channel) + 1 // ours begin with 1
	}
	if m.Connection != c.Connection {
		return []Record{note(at, m.Type, "of another connection, "+strconv.Quote(cut(m.Connection)))}
	}
	var p payload
	if len(m.Payload) > 0 {
		var there *payload
		if err := decMode.Unmarshal(m.Payload, &there); err != nil {
			return []Record{note(at, m.Type, "can't be decoded: "+err.Error())}
		}
		if there != nil {
			p = *there
		}
	}
	if m.Type == typeRequestFailed {
		return c.failed(channel, p)
	}
	body, id := c.body(m.Type, channel, p)
	rec := Record{Time: at, Channel: channel, Body: body}
	if b, ok := body.(*auditlog.Request); ok && b.Reason == "" {
		var records []Record
		if len(c.pending) >= maxPending {
			records, c.pending = append(records, c.pending[0].rec), c.pending[1:]
		}
		b.OK = true
		c.pending = append(c.pending, request{id, rec})
		return records
	}
	records := c.granted(channel)
	if body == nil {
		return records
	}
	return append(records, rec)
}

// Finish gives the records of what is left.
func (c *Converter) Finish() []Record {
	var records []Record
	for _, r := range c.pending {
		records = append(records, r.rec)
	}
	c.pending = nil
	return records
}

// granted gives the requests of a channel that were granted, now that something else follows.
func (c *Converter) granted(channel uint32) []Record {
	var records []Record
	rest := c.pending[:0]
	for _, r := range c.pending {
		if r.rec.Channel == channel {
			records = append(records, r.rec)
		} else {
			rest = append(rest, r)
		}
	}
	c.pending = rest
	return records
}

func (c *Converter) failed(channel uint32, p payload) []Record {
	for i, r := range c.pending {
		if r.rec.Channel == channel && r.id == p.RequestID {
			b := r.rec.Body.(*auditlog.Request)
			b.OK, b.Reason = false, orWords(p.Reason, "failed")
			c.pending = append(c.pending[:i], c.pending[i+1:]...)
			return []Record{r.rec}
		}
	}
	return []Record{{Time: c.last, Channel: channel, Body: &auditlog.ImportNote{Type: typeRequestFailed, Text: fmt.Sprintf("request %d failed: %s", p.RequestID, p.Reason)}}}
}

func note(at time.Time, kind int32, text string) Record {
	return Record{Time: at, Body: &auditlog.ImportNote{Type: int64(kind), Text: text}}
}

// body gives the body of a message's record, nil if it has none, and the number of a request.
func (c *Converter) body(kind int32, channel uint32, p payload) (auditlog.Body, uint64) {
	say := func(format string, args ...any) (auditlog.Body, uint64) {
		return &auditlog.ImportNote{Type: int64(kind), Text: fmt.Sprintf(format, args...)}, 0
	}
	switch kind {
	case typeConnect:
		return &auditlog.Connect{Source: p.RemoteAddr}, 0
	case typeDisconnect:
		c.ended = true
		return nil, 0
	case typePassword, typePasswordSuccessful, typePasswordFailed, typePasswordError:
		return c.authenticated(kind-typePassword, "password", "failed", p), 0
	case typeKey, typeKeySuccessful, typeKeyFailed, typeKeyError:
		return c.authenticated(kind-typeKey, "publickey", "refused", p), 0
	case typeInteractiveChallenge:
		return say("keyboard-interactive: user %s was asked; instruction: %s", p.Username, p.Instruction)
	case typeInteractiveAnswer:
		return say("keyboard-interactive: user %s answered (not taken over)", p.Username)
	case typeInteractiveFailed, typeInteractiveError:
		return c.authenticated(kind-typeInteractiveFailed+2, "keyboard-interactive", "failed", p), 0
	case typeHandshakeFailed:
		return say("handshake failed: %s", p.Reason)
	case typeHandshakeSuccessful:
		if c.proven {
			return say("handshake completed for user %s", p.Username)
		}
		c.proven = true
		return &auditlog.Authenticate{User: p.Username, Method: "not recorded", Result: "proven"}, 0
	case typeNewChannel:
		return nil, 0 // its answer tells the same
	case typeWriteClose:
		return &auditlog.Data{Stream: auditlog.Output, EOF: true}, 0
	case typeClose:
		closed := c.channels[channel]
		delete(c.channels, channel)
		if closed == nil {
			closed = &auditlog.ChannelClose{}
		}
		return closed, 0
	case typeExitSignal:
		return &auditlog.Exit{Signal: p.Signal, Core: p.CoreDumped, Error: p.ErrorMessage}, 0
	case typeExit:
		return &auditlog.Exit{Code: p.ExitStatus}, 0
	case typeIO:
		return c.data(channel, p)
	}
	if b := opened(kind, p); b != nil {
		return b, 0
	}
	if b := asked(kind, p); b != nil {
		return b, p.RequestID
	}
	return say("a type that is not known")
}

// authenticated is the outcome of an attempt; 0 is the attempt itself, which its outcome follows.
func (c *Converter) authenticated(outcome int32, method, refused string, p payload) auditlog.Body {
	a := &auditlog.Authenticate{User: p.Username, Method: method, Reason: p.Reason}
	a.KeyType, a.Fingerprint = fingerprint(p.Key)
	switch outcome {
	case 0:
		return nil
	case 1:
		a.Result, c.proven = "proven", true
		if p.Authenticated != "" && p.Authenticated != p.Username {
			a.Reason = "authenticated as " + p.Authenticated
		}
	case 2:
		a.Result = refused
	default:
		a.Result, a.Reason = "failed", "backend: "+p.Reason
	}
	return a
}

func (c *Converter) data(channel uint32, p payload) (auditlog.Body, uint64) {
	if p.Stream > uint(auditlog.Error) {
		return &auditlog.ImportNote{Type: typeIO, Text: fmt.Sprintf("%d bytes of stream %d, which is not known", len(p.Data), p.Stream)}, 0
	}
	if len(p.Data) == 0 {
		return nil, 0
	}
	n := c.channels[channel]
	if n == nil {
		if len(c.channels) >= maxPending {
			clear(c.channels) // hostile: the counts are not worth memory
		}
		n = &auditlog.ChannelClose{}
		c.channels[channel] = n
	}
	*[]*uint64{&n.Input, &n.Output, &n.Error}[p.Stream] += uint64(len(p.Data))
	return &auditlog.Data{Stream: auditlog.Stream(p.Stream), Data: p.Data}, 0
}

// opened is a channel that was opened, or was not.
func opened(kind int32, p payload) auditlog.Body {
	o := &auditlog.ChannelOpen{Originator: address(p.OriginatorHost, p.OriginatorPort)}
	switch kind {
	case typeChannelSuccessful:
		o.Type = p.ChannelType
	case typeChannelFailed:
		o.Type, o.Error = p.ChannelType, orWords(p.Reason, "failed")
	case typeForwardChannel:
		o.Type, o.Target = "direct-tcpip", address(p.HostToConnect, p.PortToConnect)
	case typeReverseChannel:
		o.Type, o.Target = "forwarded-tcpip", address(p.ConnectedHost, p.ConnectedPort)
	case typeX11Channel:
		o.Type = "x11"
	case typeStreamLocalChannel:
		o.Type, o.Target = "direct-streamlocal@openssh.com", p.Path
	case typeReverseStreamLocal:
		o.Type, o.Target = "forwarded-streamlocal@openssh.com", p.Path
	default:
		return nil
	}
	return o
}

// asked is a request. A reason says that it was refused.
func asked(kind int32, p payload) auditlog.Body {
	r := &auditlog.Request{}
	switch kind {
	case typeGlobalUnknown, typeRequestUnknown:
		r.Type, r.Payload, r.Reason = p.RequestType, p.Payload, "not known to the server"
	case typeGlobalUndecodable, typeRequestUndecodable:
		r.Type, r.Payload, r.Reason = p.RequestType, p.Payload, orWords(p.Reason, "could not be decoded")
	case typeReverseForward:
		r.Type, r.Name = "tcpip-forward", address(p.BindHost, p.BindPort)
	case typeCancelReverseForward:
		r.Type, r.Name = "cancel-tcpip-forward", address(p.BindHost, p.BindPort)
	case typeStreamLocal:
		r.Type, r.Name = "streamlocal-forward@openssh.com", p.Path
	case typeCancelStreamLocal:
		r.Type, r.Name = "cancel-streamlocal-forward@openssh.com", p.Path
	case typeEnv:
		r.Type, r.Name, r.Value = "env", p.Name, p.Value
	case typeExec:
		r.Type, r.Command = "exec", []byte(p.Program)
	case typePty:
		r.Type, r.Term, r.Columns, r.Rows = "pty-req", p.Term, p.Columns, p.Rows
	case typeShell:
		r.Type = "shell"
	case typeSignal:
		r.Type, r.Name = "signal", p.Signal
	case typeSubsystem:
		r.Type, r.Name = "subsystem", p.Subsystem
	case typeWindow:
		r.Type, r.Columns, r.Rows = "window-change", p.Columns, p.Rows
	case typeX11:
		r.Type = "x11-req" // its cookie is a secret
	default:
		return nil
	}
	return r
}

// fingerprint reads a key in the form of authorized_keys.
func fingerprint(key string) (kind, print string) {
	fields := strings.Fields(key)
	if len(fields) < 2 {
		return "", ""
	}
	b, err := base64.StdEncoding.DecodeString(fields[1])
	if err != nil {
		return "", ""
	}
	sum := sha256.Sum256(b)
	return fields[0], "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}

func address(host string, port uint32) string {
	if host == "" && port == 0 {
		return ""
	}
	return net.JoinHostPort(host, strconv.FormatUint(uint64(min(port, math.MaxUint16)), 10))
}

func orWords(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func cut(s string) string { return s[:min(len(s), 100)] }
