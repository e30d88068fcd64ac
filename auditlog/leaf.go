package auditlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// Leaf is the entry of a log in its gate's transparency log: that a log of this name was in the store, sealed, and what it was.
// The last segment's hash commits to all of the log, as each segment has the hash of the one before.
type Leaf struct {
	Dir         string // prefix of the log's objects (Name.Dir)
	Segments    uint32
	Records     uint64 // of all segments
	Hash        Hash   // of all stored bytes of the last segment
	Sealed      time.Time
	Interrupted bool
}

type wireLeaf struct {
	Dir         string `cbor:"1,keyasint"`
	Segments    uint32 `cbor:"2,keyasint"`
	Records     uint64 `cbor:"3,keyasint"`
	Hash        []byte `cbor:"4,keyasint"`
	Sealed      int64  `cbor:"5,keyasint"`
	Interrupted bool   `cbor:"6,keyasint,omitempty"`
}

// Encode gives the entry's bytes; there is one way to write a leaf.
func (l Leaf) Encode() ([]byte, error) {
	b, err := encMode.Marshal(wireLeaf{l.Dir, l.Segments, l.Records, l.Hash[:], l.Sealed.UnixNano(), l.Interrupted})
	if err != nil {
		return nil, fmt.Errorf("encode leaf: %w", err)
	}
	return b, nil
}

// ParseLeaf reads an entry.
func ParseLeaf(b []byte) (Leaf, error) {
	var w wireLeaf
	if err := decMode.Unmarshal(b, &w); err != nil {
		return Leaf{}, fmt.Errorf("leaf: %w", err)
	}
	l := Leaf{Dir: w.Dir, Segments: w.Segments, Records: w.Records, Sealed: time.Unix(0, w.Sealed).UTC(), Interrupted: w.Interrupted}
	if len(w.Hash) != len(l.Hash) || w.Segments == 0 || w.Segments-1 > maxNumber {
		return Leaf{}, errors.New("leaf: hash or number of segments that can't be")
	}
	copy(l.Hash[:], w.Hash)
	n, err := ParseName(w.Dir + "00000000" + segmentSuffix)
	if err != nil || n.Dir() != w.Dir {
		return Leaf{}, fmt.Errorf("leaf: %.200q is not where a log lies", w.Dir)
	}
	if again, err := l.Encode(); err != nil || !bytes.Equal(again, b) {
		return Leaf{}, errors.New("leaf: not as a gate writes it")
	}
	return l, nil
}

// Leaf gives the entry that the log which was read should have, and the origin of the transparency log that its gate meant it
// for ("" if that had none); false if the log is not sealed.
func (r *SessionReader) Leaf() (leaf Leaf, origin string, ok bool) {
	c := &r.chain
	if !c.sealed || len(r.log.Segments) == 0 {
		return Leaf{}, "", false
	}
	return Leaf{Dir: r.log.Name.Dir(), Segments: c.number, Records: c.next, Hash: c.hash, Sealed: c.footer.Time,
		Interrupted: c.footer.Interrupted}, c.footer.Tree, true
}

// Newest gives the footer of the newest segment that was read, sealed log or not; false if there is none.
func (r *SessionReader) Newest() (Footer, bool) { return r.chain.footer, !r.chain.footer.Time.IsZero() }

// checkCommit compares what a last footer says of all the log with what was read.
func (r *SessionReader) checkCommit(name string, at int64, n Name, next uint64, f Footer) {
	switch {
	case !f.Last || f.Segments == 0: // logs before the footer had it
	case f.Segments != n.Number+1:
		r.problem(name, at, "the log has %d segments, says its end; this is number %d", f.Segments, n.Number)
	case f.LogRecords != next:
		r.problem(name, at, "the log has %d records, says its end, and not %d", f.LogRecords, next)
	}
}

// leafOf reads the leaf of the log whose last segment f is; false if it is not a last one.
func leafOf(f *os.File) (Leaf, bool, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return Leaf{}, false, err
	}
	s, err := NewSegmentReader(f)
	if err != nil {
		return Leaf{}, false, err
	}
	h := s.Header()
	footer, next, err := footerOf(f)
	if err != nil || !footer.Last {
		return Leaf{}, false, err
	}
	leaf := Leaf{Dir: h.Name().Dir(), Segments: h.Number + 1, Records: next, Sealed: footer.Time, Interrupted: footer.Interrupted}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return Leaf{}, false, err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return Leaf{}, false, err
	}
	sum.Sum(leaf.Hash[:0])
	return leaf, true, nil
}

// footerOf finds a segment's footer by the lengths of the frames before it. next is the sequence that follows the segment.
func footerOf(f io.ReaderAt) (footer Footer, next uint64, err error) {
	var b [frameHeaderBytes]byte
	if _, err := f.ReadAt(b[:prefixBytes], 0); err != nil {
		return Footer{}, 0, err
	}
	at := int64(prefixBytes) + int64(binary.BigEndian.Uint16(b[10:])) + crcBytes
	for at < MaxSegmentBytes {
		if _, err := f.ReadAt(b[:], at); err != nil {
			return Footer{}, 0, err
		}
		h, _, err := decodeFrameHeader(b[:])
		if err != nil {
			return Footer{}, 0, err
		}
		at += frameHeaderBytes
		if h.kind == frameFooter {
			payload := make([]byte, h.stored)
			if _, err := f.ReadAt(payload, at); err != nil {
				return Footer{}, 0, err
			}
			footer, err = decodeFooter(payload)
			return footer, h.first, err
		}
		at += int64(h.stored)
	}
	return Footer{}, 0, errors.New("no footer")
}
