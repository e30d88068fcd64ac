package auditlog

import "time"

// KindForward is the kind of Forward.
const KindForward Kind = 40

// Forward is the end of one forwarded connection, or of a listener inside the sandbox. A connection's is on its channel,
// before the ChannelClose; a listener's is on the channel that asked for it, 0 if a global request did.
type Forward struct {
	Type       string    `cbor:"1,keyasint,omitempty" json:"type,omitempty"`       // of the channel, or of the request that made the listener
	Target     string    `cbor:"2,keyasint,omitempty" json:"target,omitempty"`     // as asked for: host:port, or a socket's path
	Address    string    `cbor:"3,keyasint,omitempty" json:"address,omitempty"`    // what was connected to, or listened on
	Originator string    `cbor:"4,keyasint,omitempty" json:"originator,omitempty"` // address:port, as the one who took the connection says
	Input      uint64    `cbor:"5,keyasint,omitempty" json:"input"`                // bytes from the client into the sandbox
	Output     uint64    `cbor:"6,keyasint,omitempty" json:"output"`               // bytes from the sandbox to the client
	First      time.Time `cbor:"7,keyasint,omitzero" json:"first,omitzero"`        // byte, in either direction
	Last       time.Time `cbor:"8,keyasint,omitzero" json:"last,omitzero"`         //
	// Result is "ended" (by its ends), "failed" (no connection came about, or no listener), or "cut-off" (by the gate, or lost).
	Result      string `cbor:"9,keyasint,omitempty" json:"result,omitempty"`
	Detail      string `cbor:"10,keyasint,omitempty" json:"detail,omitempty"`      // why
	Connections uint64 `cbor:"11,keyasint,omitempty" json:"connections,omitempty"` // that a listener took
}

// Kind implements Body.
func (*Forward) Kind() Kind { return KindForward }
