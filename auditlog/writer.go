package auditlog

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// Names in the spool directory: ID.NNNNNNNN and one of these. IDs have no dots.
const (
	openSuffix   = ".part" // being written
	sealedSuffix = ".seg"  // sealed, waits for the store
)

func spoolName(id string, number uint32, suffix string) string {
	return fmt.Sprintf("%s.%08d%s", id, number, suffix)
}

// segmentWriter writes one segment's file. Not safe for concurrent use.
type segmentWriter struct {
	disk    disk
	dir     string
	f       diskFile
	header  Header
	hash    hash.Hash // over all that was written
	size    int64
	dropped int64 // below, pages were dropped from the cache; of the sync that is under way
	records uint64
	next    uint64 // sequence of the next record
	buf     [frameHeaderBytes]byte
	cipher  *frameCipher // nil: frames are in the clear
	failed  error        // of a write; nothing is written after it
	unsound bool         // a sync failed: what the file gives back may not be on the disk
}

// createSegment makes a segment's file with its header. The caller syncs file and directory. It gives a writer with an error if the
// file could neither be written nor removed: it is closed, and stays in the spool.
func createSegment(d disk, dir string, h Header) (*segmentWriter, error) {
	b, err := h.encode()
	if err != nil {
		return nil, err
	}
	// Readable by the group, as the directory store may link the file instead of copying it; the spool's own directory
	// lets nobody else in.
	f, err := d.OpenFile(filepath.Join(dir, spoolName(h.ID, h.Number, openSuffix)), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return nil, fmt.Errorf("create segment: %w", err)
	}
	w := &segmentWriter{disk: d, dir: dir, f: f, header: h, hash: sha256.New(), next: h.First}
	if err := w.write(b); err != nil {
		err = errors.Join(fmt.Errorf("create segment: %w", err), f.Close())
		if rerr := d.Remove(f.Name()); rerr != nil {
			return w, errors.Join(err, rerr)
		}
		return nil, err
	}
	return w, nil
}

func (w *segmentWriter) write(b []byte) error {
	if w.failed != nil {
		return w.failed // a frame's nonce is never used again
	}
	if _, err := w.f.Write(b); err != nil {
		w.failed = err
		return err
	}
	w.hash.Write(b)
	w.size += int64(len(b))
	return nil
}

// sync makes durable the first size bytes, at least. More may be written meanwhile. Pages of bulk are dropped then: nothing reads them soon, and where a virtual
// machine gives free memory back to its host, as many now do, a page used anew costs more than all else that is done with
// its bytes (measured: 2.8 CPU s a GiB written, against 0.4).
func (w *segmentWriter) sync(size int64) error {
	if err := w.f.Sync(); err != nil {
		w.unsound = true
		return err
	}
	if f, ok := w.f.(*os.File); ok && size-w.dropped >= dropBytes {
		dropPages(f, w.dropped, size-w.dropped)
		w.dropped = size
	}
	return nil
}

// dropBytes is how much is synced between two drops of pages.
const dropBytes = 1 << 20

// writeFrame adds a frame of records; payload is what they are stored as, decoded the size of what they were. It may
// encrypt payload in place.
func (w *segmentWriter) writeFrame(codec uint8, payload []byte, decoded, count int, ends bool) error {
	h := frameHeader{kind: frameRecords, codec: codec, stored: uint32(len(payload)), decoded: uint32(decoded),
		count: uint32(count), first: w.next}
	if w.cipher != nil {
		h.flags = flagEncrypted
		if ends {
			h.flags |= flagEnds
		}
		h.stored += tagBytes
		payload = w.cipher.seal(h, payload)
	}
	if err := w.write(h.append(w.buf[:0], payload)); err != nil {
		return fmt.Errorf("write frame: %w", err)
	}
	if err := w.write(payload); err != nil {
		return fmt.Errorf("write frame: %w", err)
	}
	w.next += uint64(count)
	w.records += uint64(count)
	return nil
}

// finish writes the footer and makes the segment's content durable; rename is next.
func (w *segmentWriter) finish(key signer, now time.Time, last, interrupted bool) (Hash, error) {
	f := Footer{Records: w.records, Last: last, Interrupted: interrupted, Time: now}
	w.hash.Sum(f.Hash[:0])
	if last {
		f.Segments, f.LogRecords, f.Tree = w.header.Number+1, w.next, key.tree
	}
	payload, err := f.encode(key)
	if err != nil {
		return Hash{}, err
	}
	h := frameHeader{kind: frameFooter, stored: uint32(len(payload)), decoded: uint32(len(payload)),
		count: uint32(w.records), first: w.next}
	if err := w.write(append(h.append(nil, payload), payload...)); err != nil {
		return Hash{}, fmt.Errorf("write footer: %w", err)
	}
	if err := w.sync(w.size); err != nil {
		return Hash{}, fmt.Errorf("write footer: %w", err)
	}
	var whole Hash
	w.hash.Sum(whole[:0])
	return whole, nil
}

// rename gives a finished segment the name under which the uploader takes it, and closes it. The caller syncs the
// directory.
func (w *segmentWriter) rename() error {
	if err := w.f.Close(); err != nil {
		return fmt.Errorf("close segment: %w", err)
	}
	h := w.header
	if err := w.disk.Rename(w.f.Name(), filepath.Join(w.dir, spoolName(h.ID, h.Number, sealedSuffix))); err != nil {
		return fmt.Errorf("seal segment: %w", err)
	}
	return nil
}

// following is the header of the segment after w, whose stored bytes have the hash.
func (w *segmentWriter) following(whole Hash, now time.Time) Header {
	h := w.header
	h.Number++
	h.Previous = whole
	h.Start = now
	h.First = w.next
	h.Wrapped = nil
	return h
}

const (
	// minCompress is the size below which compressing costs more than it brings.
	minCompress = 96
	// s2Part is how much s2 looks at once: below 16 KiB its table is one of 16 KiB, which stays in a processor's first cache. Of
	// text that saves a fifth of the time, and stores a twelfth more (measured against whole frames of 1 MiB).
	s2Part = 16<<10 - 1
	// s2PartExtra is more than a part that does not compress grows by: at most by 6 bytes, as s2.MaxEncodedLen says.
	s2PartExtra = 8
)

// compress gives what a frame's records are stored as. fast says that they came quickly: then s2, at a fifth of zstd's
// cost or less, unless the configuration names a codec. out is used if it has room.
func (l *Log) compress(records, out []byte, fast bool) (codec uint8, payload []byte) {
	switch {
	case l.cfg.Codec == "none" || len(records) < minCompress:
		return codecNone, records
	case l.cfg.Codec == "s2" || l.cfg.Codec == "auto" && fast:
		codec, payload = codecS2, appendS2(out[:0], records)
	default:
		codec, payload = codecZstd, l.zstd.EncodeAll(records, out[:0])
	}
	if len(payload) > len(records)-len(records)/32 {
		return codecNone, records // does not compress: reading it back shall cost nothing
	}
	return codec, payload
}

// appendS2 adds records as one S2 block, whose parts are encoded apart: a block is its decoded length and then elements, and blocks
// can be joined by their elements (s2.ConcatBlocks does; here nothing is copied).
func appendS2(b, records []byte) []byte {
	const lengthBytes = binary.MaxVarintLen32
	b = slices.Grow(b, lengthBytes+len(records)+s2PartExtra*(len(records)/s2Part+1))
	b = binary.AppendUvarint(b, uint64(len(records)))
	var length, kept [lengthBytes]byte
	for part := range slices.Chunk(records, s2Part) {
		// A part is encoded with its length in place of the end of the one before, which is put back.
		n := binary.PutUvarint(length[:], uint64(len(part)))
		at := len(b) - n
		copy(kept[:n], b[at:])
		end := at + len(s2.Encode(b[at:cap(b)], part))
		copy(b[at:], kept[:n])
		b = b[:end]
	}
	return b
}

// newZstd makes the encoder that all sessions share; it holds at most as many states as there are processors.
func newZstd() (*zstd.Encoder, error) {
	return zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(1<<20),
		zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true))
}
