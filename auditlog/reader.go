package auditlog

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"sync"

	"filippo.io/age"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// DamageError says where a segment's bytes are not as they were written, or can't be.
type DamageError struct {
	Offset int64  // of the frame (0: the header) that is damaged or cut
	What   string // what is wrong
	Cause  error  // of the reader below, if it failed; nil if the bytes themselves are wrong
}

func (e *DamageError) Error() string {
	if e.Cause != nil {
		return fmt.Sprintf("offset %d: %s: %v", e.Offset, e.What, e.Cause)
	}
	return fmt.Sprintf("offset %d: %s", e.Offset, e.What)
}

func (e *DamageError) Unwrap() error { return e.Cause }

// SegmentReader reads one segment. It needs memory for one frame, MaxFrameBytes twice at most.
type SegmentReader struct {
	r       *bufio.Reader
	hash    hash.Hash
	offset  int64  // of the next byte to read
	whole   int64  // end of the last whole frame
	wholeTo uint64 // sequence of the record after it
	frame   int64  // start of the frame that records come from
	header  Header
	cipher  *frameCipher // nil: encrypted frames are counted and checked, not read
	sum     Hash         // of the header as stored
	unread  uint64       // records in frames that are encrypted, without cipher
	ended   bool         // the last record is an End
	records []byte       // of the frame, not yet given
	left    uint32       // of them, by the frame's header
	next    uint64       // sequence of the next record
	stored  []byte
	decoded []byte
	large   func() error // called before a frame of more than keptBytes is read; nil: nobody asks
	footer  *Footer
	err     error
}

// NewSegmentReader reads the header. An error is a *DamageError.
func NewSegmentReader(r io.Reader) (*SegmentReader, error) {
	s := &SegmentReader{r: bufio.NewReaderSize(io.LimitReader(r, MaxSegmentBytes+1), 64<<10), hash: sha256.New()}
	var prefix [prefixBytes]byte
	if err := s.full(prefix[:], "cut within the header"); err != nil {
		return nil, err
	}
	if [8]byte(prefix[:8]) != magic {
		return nil, s.damage("not a segment of an audit log: wrong magic")
	}
	if v := binary.BigEndian.Uint16(prefix[8:]); v != FormatVersion {
		return nil, s.damage("format version %d, this program reads %d", v, FormatVersion)
	}
	n := int(binary.BigEndian.Uint16(prefix[10:]))
	b := make([]byte, prefixBytes+n+crcBytes)
	copy(b, prefix[:])
	if err := s.full(b[prefixBytes:], "cut within the header"); err != nil {
		return nil, err
	}
	body, crc := b[:prefixBytes+n], binary.BigEndian.Uint32(b[prefixBytes+n:])
	if crc32.Checksum(body, castagnoli) != crc {
		return nil, s.damage("header: wrong CRC")
	}
	h, err := decodeHeader(body[prefixBytes:])
	if err != nil {
		return nil, s.damage("%v", err)
	}
	s.hash.Write(b)
	s.sum = sha256.Sum256(b)
	s.header, s.next, s.wholeTo, s.whole = h, h.First, h.First, s.offset
	return s, nil
}

// Header is the segment's.
func (s *SegmentReader) Header() Header { return s.header }

// Encrypted says whether the segment has frames that only its recipients can read, and of which types those are, as age names
// them. An error is a *DamageError.
func (s *SegmentReader) Encrypted() (recipients []string, err error) {
	if len(s.header.Wrapped) == 0 {
		return nil, nil
	}
	if recipients, err = recipientTypes(s.header.Wrapped); err != nil {
		return nil, &DamageError{What: "header: " + err.Error()}
	}
	return recipients, nil
}

// Decrypt lets Next give the records of encrypted frames, which without it are skipped; call it before Next. It returns
// ErrLocked if none of ids is a recipient: the segment can be read and checked all the same, but for those records.
func (s *SegmentReader) Decrypt(ids ...age.Identity) error {
	if len(s.header.Wrapped) == 0 {
		return nil
	}
	key, err := unwrapKey(s.header.Wrapped, ids)
	if err != nil {
		return err
	}
	defer clear(key)
	s.cipher, err = newFrameCipher(key, s.sum)
	return err
}

// Unread is the number of records that were skipped, as they are encrypted and Decrypt had no key.
func (s *SegmentReader) Unread() uint64 { return s.unread }

// Footer is the segment's, once Next returned io.EOF.
func (s *SegmentReader) Footer() (Footer, bool) {
	if s.footer == nil {
		return Footer{}, false
	}
	return *s.footer, true
}

// Whole is the offset up to which the segment was read and found whole.
func (s *SegmentReader) Whole() int64 { return s.whole }

// NextSequence is the sequence of the record that follows the last whole frame.
func (s *SegmentReader) NextSequence() uint64 { return s.wholeTo }

// Hash is the SHA-256 of all stored bytes read; of the whole segment once Next returned io.EOF.
func (s *SegmentReader) Hash() Hash {
	var h Hash
	s.hash.Sum(h[:0])
	return h
}

// Next gives the next record; those in encrypted frames after Decrypt alone. At the end of a segment that is whole it
// returns io.EOF; Footer is there then. Any other error is a *DamageError, and no more records come.
func (s *SegmentReader) Next() (Record, error) {
	if s.err != nil {
		return Record{}, s.err
	}
	rec, err := s.read()
	if err != nil {
		s.err, s.records, s.decoded, s.stored = err, nil, nil, nil
	}
	return rec, err
}

func (s *SegmentReader) read() (Record, error) {
	for s.left == 0 {
		if len(s.records) > 0 {
			return Record{}, s.damage("frame holds more than its records")
		}
		s.frame = s.offset
		if err := s.readFrame(); err != nil {
			return Record{}, err
		}
	}
	rec, rest, bodyErr, err := decodeRecord(s.records)
	switch {
	case err != nil:
		return Record{}, s.damage("record %d: %v", s.next, err)
	case bodyErr != nil:
		return Record{}, s.damage("record %d: body of kind %v: %v", s.next, rec.Body.Kind(), bodyErr)
	case rec.Sequence != s.next:
		return Record{}, s.damage("record %d where %d should be", rec.Sequence, s.next)
	}
	_, s.ended = rec.Body.(*End)
	s.records = rest
	s.left--
	s.next++
	if s.left == 0 && len(rest) == 0 {
		s.whole, s.wholeTo = s.offset, s.next
	}
	return rec, nil
}

// readFrame reads the next frame with records; io.EOF after the footer.
func (s *SegmentReader) readFrame() error {
	var before Hash
	var hb [frameHeaderBytes]byte
	if _, err := s.r.Peek(1); errors.Is(err, io.EOF) {
		return s.damage("no footer: cut off, or never sealed")
	}
	if err := s.full(hb[:], "cut within a frame's header"); err != nil {
		return err
	}
	f, crc, err := decodeFrameHeader(hb[:])
	if err != nil {
		return s.damage("%v", err)
	}
	if s.offset+int64(f.stored) > MaxSegmentBytes {
		return s.damage("segment is larger than %d bytes", MaxSegmentBytes)
	}
	if s.large != nil && max(f.stored, f.decoded) > keptBytes {
		if err := s.large(); err != nil {
			return s.cut(err, "")
		}
	}
	stored, err := s.readStored(int(f.stored))
	if err != nil {
		return s.cut(err, "cut within a frame")
	}
	if crc32.Update(crc32.Checksum(hb[:frameHeaderBytes-crcBytes], castagnoli), castagnoli, stored) != crc {
		return s.damage("frame: wrong CRC")
	}
	if f.first != s.next {
		return s.damage("frame begins with record %d where %d should be", f.first, s.next)
	}
	s.hash.Sum(before[:0])
	s.hash.Write(hb[:])
	s.hash.Write(stored)
	if f.kind == frameFooter {
		return s.readFooter(f, stored, before)
	}
	// A record is eight bytes at least: array, sequence, time (five), channel, kind, body. Time may be shorter; six then.
	if f.count == 0 || uint64(f.count)*6 > uint64(f.decoded) {
		return s.damage("frame of %d bytes says it holds %d records", f.decoded, f.count)
	}
	if f.encrypted() {
		if len(s.header.Wrapped) == 0 {
			return s.damage("frame is encrypted, and the header has no key")
		}
		if s.cipher == nil {
			s.next += uint64(f.count)
			s.unread += uint64(f.count)
			s.whole, s.wholeTo, s.ended = s.offset, s.next, f.flags&flagEnds != 0
			return nil
		}
		if stored, err = s.cipher.open(f, stored); err != nil {
			return s.damage("frame: %v", err)
		}
	}
	if s.records, err = s.decode(f, stored); err != nil {
		return s.damage("frame: %v", err)
	}
	if cap(s.stored) > keptBytes { // several may be read at once, and the records take memory, too
		s.stored = nil
	}
	s.left = f.count
	return nil
}

// keptBytes is the largest buffer of stored bytes that is kept for the next frame. No gate writes a frame that needs more.
const keptBytes = 2 << 20

// readStored reads a frame's n stored bytes. The buffer grows as they come, so that a header alone can't claim memory, and to no
// more than is needed.
func (s *SegmentReader) readStored(n int) ([]byte, error) {
	b := s.stored[:0]
	for len(b) < n {
		if len(b) == cap(b) {
			more := make([]byte, len(b), min(n, max(64<<10, 4*len(b))))
			copy(more, b)
			b = more
		}
		got, err := io.ReadFull(s.r, b[len(b):min(n, cap(b))])
		s.offset += int64(got)
		b = b[:len(b)+got]
		if err != nil {
			return nil, err
		}
	}
	s.stored = b
	return b, nil
}

func (s *SegmentReader) readFooter(f frameHeader, payload []byte, before Hash) error {
	footer, err := decodeFooter(payload)
	switch {
	case err != nil:
		return s.damage("%v", err)
	case footer.Hash != before:
		return s.damage("footer: hash is not that of the bytes before it")
	case !footer.Verified:
		return s.damage("footer: signature does not verify")
	case footer.Records != s.next-s.header.First || f.count != uint32(footer.Records):
		return s.damage("footer: %d records where %d were read", footer.Records, s.next-s.header.First)
	}
	if _, err := s.r.Peek(1); err == nil {
		return &DamageError{Offset: s.offset, What: "bytes after the footer"}
	} else if !errors.Is(err, io.EOF) {
		return s.cut(err, "after the footer")
	}
	s.whole = s.offset
	s.footer = &footer
	return io.EOF
}

func (s *SegmentReader) decode(f frameHeader, stored []byte) ([]byte, error) {
	if f.codec == codecNone {
		return stored, nil
	}
	if f.codec == codecS2 {
		// s2 allocates what the block says it decodes to.
		if n, err := s2.DecodedLen(stored); err != nil || n != int(f.decoded) {
			return nil, fmt.Errorf("s2: block decodes to %d bytes, not %d (%v)", n, f.decoded, err)
		}
		// Every byte of s2 gives 64 KiB at most, but hostile ones that give it are short: memory comes late.
		b, err := s2.Decode(s.decoded[:cap(s.decoded)], stored)
		if err != nil {
			return nil, fmt.Errorf("s2: %w", err)
		}
		s.decoded = b
		return b, nil
	}
	d, err := zstdDecoder()
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	if cap(s.decoded) < int(f.decoded) {
		s.decoded = make([]byte, 0, f.decoded)
	}
	b, err := d.DecodeAll(stored, s.decoded[:0:f.decoded]) // capacity is a limit: WithDecodeAllCapLimit
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	if len(b) != int(f.decoded) {
		return nil, fmt.Errorf("zstd: decodes to %d bytes, not %d", len(b), f.decoded)
	}
	return b, nil
}

// zstdDecoder gives the decoder that all readers share. It has no goroutine of its own.
var zstdDecoder = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(2), zstd.WithDecoderMaxMemory(MaxFrameBytes),
		zstd.WithDecoderMaxWindow(8<<20), zstd.WithDecodeAllCapLimit(true))
})

// full reads all of b.
func (s *SegmentReader) full(b []byte, what string) error {
	n, err := io.ReadFull(s.r, b)
	s.offset += int64(n)
	if err != nil {
		return s.cut(err, what)
	}
	return nil
}

// cut tells the end of the bytes from an error of the reader.
func (s *SegmentReader) cut(err error, what string) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return s.damage("%s", what)
	}
	return &DamageError{Offset: s.frame, What: "read", Cause: err}
}

func (s *SegmentReader) damage(format string, args ...any) error {
	return &DamageError{Offset: s.frame, What: fmt.Sprintf(format, args...)}
}
