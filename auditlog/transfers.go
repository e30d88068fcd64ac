package auditlog

import "time"

// What the gate reads out of a channel's bytes as they pass (package transfer).
const (
	KindTransfer Kind = 30 // Transfer
	KindContent  Kind = 31 // Content
	KindDataRest Kind = 32 // DataRest
)

// Transfer is one file that was transferred, another operation on files with its result, or that a channel's protocol
// could not be read any more. Paths are bytes as the client wrote them; Resolved ones as the sandbox resolved them before
// the operation, without symbolic links.
type Transfer struct {
	Protocol       string         `cbor:"1,keyasint,omitempty" json:"protocol,omitempty"` // "sftp", "scp"
	Op             string         `cbor:"2,keyasint,omitempty" json:"op,omitempty"`       // "file", "list", "rename", ..., "undecodable"
	ID             uint64         `cbor:"3,keyasint,omitempty" json:"id,omitempty"`       // within the channel
	Path           []byte         `cbor:"4,keyasint,omitempty" json:"path,omitempty"`
	Resolved       []byte         `cbor:"5,keyasint,omitempty" json:"resolved,omitempty"`
	Target         []byte         `cbor:"6,keyasint,omitempty" json:"target,omitempty"`
	TargetResolved []byte         `cbor:"7,keyasint,omitempty" json:"target_resolved,omitempty"`
	Name           []byte         `cbor:"8,keyasint,omitempty" json:"name,omitempty"` // scp: below Path
	Start          time.Time      `cbor:"9,keyasint,omitzero" json:"start,omitzero"`
	Took           time.Duration  `cbor:"10,keyasint,omitempty" json:"took_ns,omitempty"`
	Flags          uint32         `cbor:"11,keyasint,omitempty" json:"flags,omitempty"` // SSH_FXP_OPEN's pflags
	Attrs          *TransferAttrs `cbor:"12,keyasint,omitempty" json:"attrs,omitempty"`
	Read           *TransferFlow  `cbor:"13,keyasint,omitempty" json:"read,omitempty"`    // what passed to the client
	Written        *TransferFlow  `cbor:"14,keyasint,omitempty" json:"written,omitempty"` // what passed to the sandbox
	Names          uint64         `cbor:"15,keyasint,omitempty" json:"names,omitempty"`   // in a listing
	Copied         []uint64       `cbor:"16,keyasint,omitempty" json:"copied,omitempty"`  // start and end in Path, then in Target
	Status         uint32         `cbor:"17,keyasint,omitempty" json:"status"`            // SSH_FX_*; 0: it went well
	Message        string         `cbor:"18,keyasint,omitempty" json:"message,omitempty"`
	Denied         bool           `cbor:"19,keyasint,omitempty" json:"denied,omitempty"`     // by the gate: the sandbox did not see it
	Unfinished     bool           `cbor:"20,keyasint,omitempty" json:"unfinished,omitempty"` // the channel ended first
	Detail         string         `cbor:"21,keyasint,omitempty" json:"detail,omitempty"`
	Stream         Stream         `cbor:"22,keyasint,omitempty" json:"stream,omitempty"` // undecodable: which
	Offset         uint64         `cbor:"23,keyasint,omitempty" json:"offset,omitempty"` // undecodable: of the first byte that is in no record
}

// TransferAttrs are a file's attributes as given with a request; Valid says which (draft-ietf-secsh-filexfer-02,
// section 5).
type TransferAttrs struct {
	Valid       uint32 `cbor:"1,keyasint,omitempty" json:"valid"`
	Size        uint64 `cbor:"2,keyasint,omitempty" json:"size,omitempty"`
	UID         uint32 `cbor:"3,keyasint,omitempty" json:"uid,omitempty"`
	GID         uint32 `cbor:"4,keyasint,omitempty" json:"gid,omitempty"`
	Permissions uint32 `cbor:"5,keyasint,omitempty" json:"permissions,omitempty"`
	Atime       uint32 `cbor:"6,keyasint,omitempty" json:"atime,omitempty"`
	Mtime       uint32 `cbor:"7,keyasint,omitempty" json:"mtime,omitempty"`
}

// TransferFlow is what passed of one file in one direction.
type TransferFlow struct {
	Bytes      uint64   `cbor:"1,keyasint,omitempty" json:"bytes"`
	Ranges     []uint64 `cbor:"2,keyasint,omitempty" json:"ranges,omitempty"`     // start and end of each, unless Contiguous
	Cut        bool     `cbor:"3,keyasint,omitempty" json:"cut,omitempty"`        // there were more ranges
	Contiguous bool     `cbor:"4,keyasint,omitempty" json:"contiguous,omitempty"` // from 0 to Bytes, each once
	SHA256     []byte   `cbor:"5,keyasint,omitempty" json:"sha256,omitempty"`     // of 0 to Length, each byte as it passed first
	Whole      bool     `cbor:"6,keyasint,omitempty" json:"whole,omitempty"`      // that is all of the file
	Kept       uint64   `cbor:"7,keyasint,omitempty" json:"kept,omitempty"`       // bytes in Content records
}

// Length is how many bytes of the file, from its beginning, passed without a gap, each counted once; not ok if there are
// gaps. It is less than Bytes where some were read again, as a client does that reads ahead and loses count.
func (f *TransferFlow) Length() (n uint64, ok bool) {
	switch {
	case f.Contiguous:
		return f.Bytes, true
	case f.Cut || len(f.Ranges) != 2 || f.Ranges[0] != 0:
		return 0, false
	}
	return f.Ranges[1], true
}

// Content is a part of a transferred file's content, where the profile keeps that. Without Data it is the same Length
// bytes that an earlier Content record of the session has under this hash.
type Content struct {
	ID     uint64 `cbor:"1,keyasint,omitempty" json:"id,omitempty"`         // of the Transfer
	Stream Stream `cbor:"2,keyasint,omitempty" json:"stream"`               // Input: written, Output: read
	Offset uint64 `cbor:"3,keyasint,omitempty" json:"offset"`               // in the file
	Data   []byte `cbor:"4,keyasint,omitempty" json:"data,omitempty"`       //
	SHA256 []byte `cbor:"5,keyasint,omitempty" json:"sha256,omitempty"`     // of the bytes
	Length uint32 `cbor:"6,keyasint,omitempty" json:"same_bytes,omitempty"` // without Data
}

// DataRest says that no more of a stream's data is kept, as the profile has it: once where that begins, and once at the
// end, with what there was.
type DataRest struct {
	Stream Stream `cbor:"1,keyasint,omitempty" json:"stream"`
	Offset uint64 `cbor:"2,keyasint,omitempty" json:"offset"`           // of the first byte that is not kept
	End    bool   `cbor:"3,keyasint,omitempty" json:"end,omitempty"`    //
	Bytes  uint64 `cbor:"4,keyasint,omitempty" json:"bytes,omitempty"`  // of the whole stream
	SHA256 []byte `cbor:"5,keyasint,omitempty" json:"sha256,omitempty"` // of the whole stream
}

func (*Transfer) Kind() Kind { return KindTransfer }
func (*Content) Kind() Kind  { return KindContent }
func (*DataRest) Kind() Kind { return KindDataRest }
