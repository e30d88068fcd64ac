package auditlog

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// indexBatch is how many entries are in one object of the index at most.
const indexBatch = 1000

// clearSuffix ends the ID of an index that is in the clear beside an encrypted one.
const clearSuffix = "-c"

// index writes the gate's index: logs of their own kind, whose segments are the batches and whose records are entries. So
// it is signed, chained, spooled, encrypted and sealed after a crash as all logs are, and no name is written twice.
type index struct {
	l     *Log
	clear bool // the one in the clear, beside one that is encrypted

	mu     sync.Mutex // guards all below
	rec    *Recorder  // nil while there is nothing to say
	count  int        // in the batch
	closed bool
}

// indexed writes an entry. It waits for the disk as all records do. A failure is logged and costs no session: who lists reads the
// log of one that has no entry.
func (l *Log) indexed(e *Entry) {
	if e == nil || !l.cfg.Index {
		return
	}
	if len(l.recipients) > 0 {
		l.indexClear.add(e.clear(l.cfg.IndexClear))
	}
	l.index.add(e)
}

func (x *index) add(e *Entry) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return
	}
	if err := x.write(e); err != nil {
		x.l.log.Error("audit log: index", "error", err, "session", e.ID)
	}
}

func (x *index) write(e *Entry) error {
	now := x.l.wall()
	if x.rec != nil && (x.rec.Err() != nil || x.rec.start.UTC().YearDay() != now.UTC().YearDay()) {
		// One of its own for each day, as for the gate's own log.
		if err := x.rec.Close(&End{Cause: "shutdown", Detail: "continued in another log"}); err != nil {
			x.l.log.Error("audit log: index", "error", err)
		}
		x.rec = nil
	}
	if x.rec == nil {
		id := newRunID(now)
		if x.clear {
			id += clearSuffix
		}
		rec := &Recorder{log: x.l, kind: IndexLog, id: id, start: now, open: x.clear, lost: make(chan struct{}),
			done: make(chan struct{}), wake: make(chan struct{}, 1)}
		if err := rec.Begin(); err != nil {
			return err
		}
		x.rec, x.count = rec, 0
	}
	if err := x.rec.Record(0, e); err != nil {
		return err
	}
	if x.count++; x.count >= indexBatch {
		x.count = 0
		x.rec.mu.Lock()
		x.rec.cut = true
		x.rec.notify()
		x.rec.mu.Unlock()
	}
	return nil
}

func (x *index) close() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.closed = true
	if x.rec == nil {
		return nil
	}
	if err := x.rec.Close(&End{Cause: "shutdown"}); err != nil {
		return fmt.Errorf("index: %w", err)
	}
	return nil
}

// closeIndex ends the index, once all sessions have ended.
func (l *Log) closeIndex() error { return errors.Join(l.indexClear.close(), l.index.close()) }

// newEntry is the entry of a session that begins; nil where none is made.
func (l *Log) newEntry(kind LogKind, id string, start time.Time) *Entry {
	if kind != SessionLog || !l.cfg.Index {
		return nil
	}
	return &Entry{ID: id, Gate: l.gate, Start: time.Unix(0, start.UnixNano()).UTC()}
}

// segmentAge is the age at which the log's segments are cut.
func (r *Recorder) segmentAge() time.Duration {
	if r.kind == IndexLog {
		return r.log.cfg.IndexAge
	}
	return r.log.cfg.SegmentAge
}

// indexSealed writes the entry of a session that is sealed; whole is the last segment's hash.
func (r *Recorder) indexSealed(whole Hash) {
	r.mu.Lock()
	e := r.entry
	r.entry = nil
	r.mu.Unlock()
	if e == nil {
		return
	}
	e.Segments, e.Bytes, e.Last = r.w.header.Number+1, r.sealed+r.w.size, whole[:]
	r.log.indexed(e)
}

// indexInterrupted writes what a restart knows of a session.
func (l *Log) indexInterrupted(w *segmentWriter, whole Hash) {
	if e := l.newEntry(w.header.Kind, w.header.ID, w.header.LogStart); e != nil {
		e.Gate, e.Segments, e.Last, e.Partial = w.header.Gate, w.header.Number+1, whole[:], true
		l.indexed(e)
	}
}
