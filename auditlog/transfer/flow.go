package transfer

import (
	"crypto/sha256"
	"hash"
	"sort"
	"sync/atomic"
)

const (
	maxAhead      = 1 << 20 // bytes of one file held back until those before them come
	maxAheadTotal = 4 << 20 // of all files of a channel
	maxAheadParts = 1024    // pieces of one file; a piece is a packet
	maxRanges     = 64      // kept of one file in one direction
)

// hasher hashes content in the order of its offsets, from 0, whatever the order it passes in. It belongs to the one
// goroutine that the content passes through.
type hasher struct {
	hash   hash.Hash
	next   uint64 // hashed up to here
	broken bool   // content came too far ahead, or twice where that changes what was hashed
	reread bool   // content may come again, and is not hashed then: a file that is read, not one that is written

	held  map[uint64][]byte // by offset: came ahead of next
	ahead int               // bytes in held
	total *atomic.Int64     // of all the channel's hashers

	// The piece that is passing.
	at     uint64
	direct bool
	skip   int // bytes of it that are hashed already
	piece  []byte
}

// begin announces n bytes at offset, which then come through part, and end with end.
func (h *hasher) begin(offset uint64, n int) {
	h.at, h.direct, h.skip, h.piece = offset, false, 0, nil
	switch {
	case h.broken || n == 0:
	case offset == h.next:
		h.direct = true
		if h.hash == nil {
			h.hash = sha256.New()
		}
	case h.reread && (offset < h.next && uint64(n) <= h.next-offset || n <= len(h.held[offset])):
	case h.reread && offset < h.next:
		h.direct, h.skip = true, int(h.next-offset)
	case offset < h.next || h.held[offset] != nil || h.ahead+n > maxAhead || len(h.held) >= maxAheadParts:
		h.stop()
	case h.total.Add(int64(n)) > maxAheadTotal:
		h.total.Add(-int64(n))
		h.stop()
	default:
		h.ahead += n
		h.piece = make([]byte, 0, n)
	}
}

func (h *hasher) part(p []byte) {
	switch {
	case h.direct:
		known := min(h.skip, len(p))
		h.skip -= known
		p = p[known:]
		h.hash.Write(p)
		h.next += uint64(len(p))
	case h.piece != nil:
		h.piece = append(h.piece, p...)
	}
}

func (h *hasher) end() {
	if h.piece != nil {
		if h.held == nil {
			h.held = make(map[uint64][]byte)
		}
		h.held[h.at] = h.piece
		h.piece = nil
		return
	}
	for h.direct && len(h.held) > 0 {
		p, ok := h.held[h.next]
		if !ok {
			return
		}
		delete(h.held, h.next)
		h.ahead -= len(p)
		h.total.Add(-int64(len(p)))
		h.hash.Write(p)
		h.next += uint64(len(p))
	}
}

// stop gives up, and frees what is held.
func (h *hasher) stop() {
	h.broken = true
	if h.total != nil {
		h.total.Add(-int64(h.ahead))
	}
	h.held, h.ahead, h.piece, h.direct, h.hash = nil, 0, nil, false, nil
}

// ranges are the offsets that were read or written, merged.
type ranges struct {
	list  []Range
	cut   bool
	bytes uint64
}

func (r *ranges) add(start, end uint64) {
	if end <= start {
		return
	}
	r.bytes += end - start
	if n := len(r.list); n > 0 && r.list[n-1].End == start { // nearly always
		r.list[n-1].End = end
		return
	}
	// The first range that ends at or after start is the first that can touch the new one.
	i := sort.Search(len(r.list), func(i int) bool { return r.list[i].End >= start })
	j := i
	for ; j < len(r.list) && r.list[j].Start <= end; j++ {
		start, end = min(start, r.list[j].Start), max(end, r.list[j].End)
	}
	if i == j {
		if len(r.list) >= maxRanges {
			r.cut = true
			return
		}
		r.list = append(r.list, Range{})
		copy(r.list[i+1:], r.list[i:])
		r.list[i] = Range{start, end}
		return
	}
	r.list[i] = Range{start, end}
	r.list = append(r.list[:i+1], r.list[j:]...)
}

// flow puts ranges and hash together.
func flow(r *ranges, h *hasher) Flow {
	f := Flow{Bytes: r.bytes, Cut: r.cut, Ranges: r.list}
	n, ok := f.length()
	if f.Contiguous = ok && n == r.bytes; f.Contiguous {
		f.Ranges = nil
	}
	if ok && n > 0 && !h.broken && h.next == n && len(h.held) == 0 && h.hash != nil {
		f.SHA256 = h.hash.Sum(nil)
	}
	return f
}

// length is how much there is of the file from its beginning, each byte counted once; not ok if there are gaps.
func (f *Flow) length() (n uint64, ok bool) {
	switch {
	case f.Cut:
		return 0, false
	case len(f.Ranges) == 0:
		return f.Bytes, true
	}
	return f.Ranges[0].End, len(f.Ranges) == 1 && f.Ranges[0].Start == 0
}

// sumOfNothing is the hash of an empty file.
func sumOfNothing() []byte {
	s := sha256.Sum256(nil)
	return s[:]
}
