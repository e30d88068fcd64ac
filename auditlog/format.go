package auditlog

import (
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/fxamacker/cbor/v2"
)

// FormatVersion is the version of the format that this package writes.
const FormatVersion = 1

// magic begins every segment. The first byte is not ASCII and the last two are CR LF, so that a transfer in text mode
// shows at once.
var magic = [8]byte{0x89, 'S', 'A', 'L', 'L', 'Y', '\r', '\n'}

// Bounds that a reader enforces and a writer keeps.
const (
	// MaxFrameBytes is the most a frame may hold, stored or decoded.
	MaxFrameBytes = 16 << 20
	// MaxSegmentBytes is the most a segment may hold, stored.
	MaxSegmentBytes = 256 << 20
	// MaxRecordBytes is the most a record's body may hold, encoded. Data is split before it comes near.
	MaxRecordBytes = 4 << 20

	prefixBytes      = 12 // magic, version, length of the header
	frameHeaderBytes = 28
	crcBytes         = 4
	maxStatement     = 64 << 10
)

// Types of frames.
const (
	frameRecords = 1
	frameFooter  = 2
)

// Codecs of frames.
const (
	codecNone = 0
	codecZstd = 1
	codecS2   = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// footerDomain keeps a signature over a footer from being one over anything else.
const footerDomain = "sallyport auditlog segment footer v1\n"

var encMode, decMode = func() (cbor.EncMode, cbor.DecMode) {
	eo := cbor.CoreDetEncOptions()
	eo.Time = cbor.TimeRFC3339Nano
	em, err := eo.EncMode()
	if err != nil {
		panic(err) // constant options
	}
	dm, err := cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
		MaxNestedLevels:  16,
		MaxArrayElements: 1 << 16,
		MaxMapPairs:      1 << 12,
		// Written text is valid UTF-8; a later writer's mistake shall not make a record unreadable.
		UTF8: cbor.UTF8DecodeInvalid,
	}.DecMode()
	if err != nil {
		panic(err) // constant options
	}
	return em, dm
}()

// Hash is a SHA-256 hash over stored bytes.
type Hash [sha256.Size]byte

// Header is what a segment says of itself in the clear.
type Header struct {
	Kind     LogKind
	Gate     string    // name of the gate that wrote it
	ID       string    // of the session, or of the gate's run
	LogStart time.Time // of the log's first record; the day in the object's name
	Number   uint32    // 0, 1, 2, ... within the log
	Previous Hash      // of all stored bytes of the segment before; zero in segment 0
	Start    time.Time // when the segment was begun
	First    uint64    // sequence of its first record
	Wrapped  []byte    // key of its encrypted frames: an age file to the auditors; empty: none is encrypted
}

type wireHeader struct {
	Kind     uint8  `cbor:"1,keyasint"`
	Gate     string `cbor:"2,keyasint"`
	ID       string `cbor:"3,keyasint"`
	LogStart int64  `cbor:"4,keyasint"`
	Number   uint32 `cbor:"5,keyasint"`
	Previous []byte `cbor:"6,keyasint"`
	Start    int64  `cbor:"7,keyasint"`
	First    uint64 `cbor:"8,keyasint"`
	Wrapped  []byte `cbor:"9,keyasint,omitempty"`
}

// encode gives the header as stored, from magic to CRC.
func (h Header) encode() ([]byte, error) {
	w := wireHeader{Kind: uint8(h.Kind), Gate: h.Gate, ID: h.ID, LogStart: h.LogStart.UnixNano(), Number: h.Number,
		Previous: h.Previous[:], Start: h.Start.UnixNano(), First: h.First, Wrapped: h.Wrapped}
	body, err := encMode.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("encode header: %w", err)
	}
	if len(body) > 0xffff {
		return nil, errors.New("encode header: too long")
	}
	b := append(make([]byte, 0, prefixBytes+len(body)+crcBytes), magic[:]...)
	b = binary.BigEndian.AppendUint16(b, FormatVersion)
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	b = append(b, body...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)), nil
}

func decodeHeader(body []byte) (Header, error) {
	var w wireHeader
	if err := decMode.Unmarshal(body, &w); err != nil {
		return Header{}, fmt.Errorf("header: %w", err)
	}
	h := Header{Kind: LogKind(w.Kind), Gate: w.Gate, ID: w.ID, LogStart: time.Unix(0, w.LogStart).UTC(),
		Number: w.Number, Start: time.Unix(0, w.Start).UTC(), First: w.First, Wrapped: w.Wrapped}
	switch {
	case h.Kind != SessionLog && h.Kind != GateLog && h.Kind != IndexLog:
		return Header{}, fmt.Errorf("header: unknown kind of log %d", w.Kind)
	case !ValidID(h.ID):
		return Header{}, fmt.Errorf("header: %.80q is no ID", h.ID)
	case !ValidID(h.Gate):
		return Header{}, fmt.Errorf("header: %.80q is no name of a gate", h.Gate)
	case len(w.Previous) != len(h.Previous):
		return Header{}, fmt.Errorf("header: previous hash has %d bytes", len(w.Previous))
	case h.Number > maxNumber:
		return Header{}, fmt.Errorf("header: segment number %d", h.Number)
	}
	copy(h.Previous[:], w.Previous)
	return h, nil
}

// frameHeader precedes every frame's stored bytes.
type frameHeader struct {
	kind    uint8
	codec   uint8
	flags   uint16
	stored  uint32
	decoded uint32
	count   uint32 // of records; of the footer: in the whole segment
	first   uint64 // sequence of the first record; of the footer: of the record that would come next
}

func (f frameHeader) encrypted() bool { return f.flags&flagEncrypted != 0 }

// plain is the length of the payload once decrypted, before it is decoded.
func (f frameHeader) plain() uint32 {
	if f.encrypted() {
		return f.stored - tagBytes
	}
	return f.stored
}

// append adds the header with its CRC, which covers the header before it and the payload.
func (f frameHeader) append(b, payload []byte) []byte {
	n := len(b)
	b = f.appendFields(b)
	return binary.BigEndian.AppendUint32(b, crc32.Update(crc32.Checksum(b[n:], castagnoli), castagnoli, payload))
}

// appendFields adds the header without its CRC.
func (f frameHeader) appendFields(b []byte) []byte {
	b = append(b, f.kind, f.codec)
	b = binary.BigEndian.AppendUint16(b, f.flags)
	b = binary.BigEndian.AppendUint32(b, f.stored)
	b = binary.BigEndian.AppendUint32(b, f.decoded)
	b = binary.BigEndian.AppendUint32(b, f.count)
	return binary.BigEndian.AppendUint64(b, f.first)
}

func decodeFrameHeader(b []byte) (f frameHeader, crc uint32, err error) {
	f = frameHeader{kind: b[0], codec: b[1], flags: binary.BigEndian.Uint16(b[2:]), stored: binary.BigEndian.Uint32(b[4:]),
		decoded: binary.BigEndian.Uint32(b[8:]), count: binary.BigEndian.Uint32(b[12:]), first: binary.BigEndian.Uint64(b[16:])}
	switch {
	case f.kind != frameRecords && f.kind != frameFooter:
		err = fmt.Errorf("unknown type of frame %d", f.kind)
	case f.codec > codecS2 || f.kind == frameFooter && f.codec != codecNone:
		err = fmt.Errorf("unknown codec %d", f.codec)
	case f.flags&^(flagEncrypted|flagEnds) != 0 || f.flags == flagEnds || f.kind == frameFooter && f.flags != 0:
		err = fmt.Errorf("unknown flags %#x", f.flags)
	case f.stored > MaxFrameBytes || f.decoded > MaxFrameBytes:
		err = fmt.Errorf("frame of %d bytes, decoded %d, is too large", f.stored, f.decoded)
	case f.kind == frameFooter && f.stored > maxStatement:
		err = fmt.Errorf("footer of %d bytes is too large", f.stored)
	case f.encrypted() && f.stored < tagBytes || f.codec == codecNone && f.plain() != f.decoded:
		err = fmt.Errorf("frame of %d bytes says it holds %d", f.stored, f.decoded)
	}
	return f, binary.BigEndian.Uint32(b[24:]), err
}

// Footer ends a sealed segment.
type Footer struct {
	Hash        Hash   // of all stored bytes before the footer's frame
	Records     uint64 // in the segment
	Last        bool   // no segment follows: the log is sealed
	Interrupted bool   // sealed by a later start of the gate, not by the one that wrote it
	PublicKey   ed25519.PublicKey
	Time        time.Time // when it was sealed
	Segments    uint32    // of the last: how many the log has
	LogRecords  uint64    // of the last: how many records they have in all
	Tree        string    // of the last: origin of the transparency log that the log goes into; "" for none
	Verified    bool      // the signature is PublicKey's; says nothing of whose key that is
}

type wireFooter struct {
	Hash        []byte `cbor:"1,keyasint"`
	Records     uint64 `cbor:"2,keyasint"`
	Last        bool   `cbor:"3,keyasint"`
	Interrupted bool   `cbor:"4,keyasint"`
	PublicKey   []byte `cbor:"5,keyasint"`
	Time        int64  `cbor:"6,keyasint"`
	Segments    uint32 `cbor:"7,keyasint,omitempty"`
	LogRecords  uint64 `cbor:"8,keyasint,omitempty"`
	Tree        string `cbor:"9,keyasint,omitempty"`
}

// footerMessage is what the signature signs.
func footerMessage(statement []byte) []byte {
	sum := sha256.Sum256(statement)
	return append([]byte(footerDomain), sum[:]...)
}

// encode gives the footer's payload: statement and signature.
func (f Footer) encode(key crypto.Signer) ([]byte, error) {
	pub, ok := key.Public().(ed25519.PublicKey)
	if !ok {
		return nil, errors.New("encode footer: not an ed25519 key")
	}
	statement, err := encMode.Marshal(wireFooter{Hash: f.Hash[:], Records: f.Records, Last: f.Last,
		Interrupted: f.Interrupted, PublicKey: pub, Time: f.Time.UnixNano(),
		Segments: f.Segments, LogRecords: f.LogRecords, Tree: f.Tree})
	if err != nil {
		return nil, fmt.Errorf("encode footer: %w", err)
	}
	message := footerMessage(statement)
	sig, err := key.Sign(nil, message, crypto.Hash(0))
	if err != nil {
		return nil, fmt.Errorf("sign footer: %w", err)
	}
	if !ed25519.Verify(pub, message, sig) {
		return nil, errors.New("sign footer: what should sign gave a signature that does not verify")
	}
	return append(statement, sig...), nil
}

func decodeFooter(payload []byte) (Footer, error) {
	if len(payload) < ed25519.SignatureSize {
		return Footer{}, errors.New("footer is too short")
	}
	statement, sig := payload[:len(payload)-ed25519.SignatureSize], payload[len(payload)-ed25519.SignatureSize:]
	var w wireFooter
	if err := decMode.Unmarshal(statement, &w); err != nil {
		return Footer{}, fmt.Errorf("footer: %w", err)
	}
	f := Footer{Records: w.Records, Last: w.Last, Interrupted: w.Interrupted, PublicKey: w.PublicKey,
		Time: time.Unix(0, w.Time).UTC(), Segments: w.Segments, LogRecords: w.LogRecords, Tree: w.Tree}
	if len(w.Hash) != len(f.Hash) || len(w.PublicKey) != ed25519.PublicKeySize {
		return Footer{}, errors.New("footer: hash or key of a wrong size")
	}
	copy(f.Hash[:], w.Hash)
	f.Verified = ed25519.Verify(f.PublicKey, footerMessage(statement), sig)
	return f, nil
}
