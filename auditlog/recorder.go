package auditlog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Errors of a Recorder, wrapped where they come back.
var (
	ErrClosed     = errors.New("the log is closed")
	ErrSpoolLimit = errors.New("the spool's limit is reached")
	ErrStalled    = errors.New("the spool's disk does not answer")
	ErrUnproven   = errors.New("too many records before a key was proven")
)

const (
	frameTarget = 1 << 20              // decoded bytes at which a frame is handed on
	dataChunk   = 128 << 10            // more in one Data record is split
	maxUnproven = 64 << 10             // of records before Begin
	pooledBytes = 1536 << 10           // capacity of pooled buffers: a frame, one record more, s2's worst case
	growBytes   = 64 << 10             // below, a batch's buffer grows by itself; an idle session has none
	fullPause   = 5 * time.Millisecond // between two looks at what other sessions have in memory, at the spool's limit
	stallLimit  = 30 * time.Second     // that the disk may not answer
	plainRun    = 8                    // frames in a row that did not compress, after which one in so many is tried
)

// batch is records that become one frame.
type batch struct {
	b     []byte
	count int
	since time.Time // when its first record was made
	ends  bool      // its last record is an End
}

// Recorder records one connection. Its methods may be called from several goroutines. The life of one:
//
//	New      in memory: the client is nobody yet
//	Begin    a key was proven; from here what was recorded is in the spool within the configured interval
//	Record   (and Tap) until Close, or until Lost
//	Close    writes the end, signed; or, before Begin, leaves a folded Refused in the gate's log
type Recorder struct {
	log   *Log
	kind  LogKind
	id    string
	start time.Time
	open  bool          // not encrypted, whatever the log is
	lost  chan struct{} // closed once err is set
	done  chan struct{} // closed when the flusher is through after Close
	wake  chan struct{} // tells the flusher to look; holds one

	mu       sync.Mutex // guards all below
	begun    bool
	closing  bool // Close was called
	broken   bool // the spool failed: nothing more is written
	running  bool // the flusher's goroutine is there
	cut      bool // cut the segment when all is written
	urgent   bool // do not wait for the interval
	full     []batch
	tail     batch
	next     uint64 // sequence of the next record
	durable  uint64 // records before this sequence are
	pending  int64  // bytes taken, not yet durable
	taken    int64  // of log.queue, for the record that is admitted and not added yet
	oldest   time.Time
	progress chan struct{} // closed when durable moves; nil while nobody waits
	at       time.Time     // of the records to come; zero: now
	err      error         // why the log is lost
	closeErr error
	entry    *Entry // in the index; nil: none

	// Owned by Begin, then by the flusher's goroutine, of which there is one at a time.
	w         *segmentWriter
	unsynced  int64     // bytes of records written since the last sync began
	unsyncedT time.Time // of the first of them
	syncing   *syncing  // nil: none is under way
	plain     int       // bulk frames in a row that did not compress, or were not tried
	dirty     time.Time // of the open segment's first record
	sealed    int64     // bytes of the segments before
}

// ID is the session's ID.
func (r *Recorder) ID() string { return r.id }

// Begin opens the session's log on disk, with what was recorded so far, and returns when that is durable. Call it when a
// key was proven; nothing is written before.
func (r *Recorder) Begin() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.err != nil:
		return r.err
	case r.closing:
		return ErrClosed
	case r.begun:
		return nil
	}
	if err := r.begin(); err != nil {
		if r.w != nil { // nothing in it was promised to anybody
			r.w.f.Close()
			if r.log.disk.Remove(r.w.f.Name()) != nil {
				r.log.countTorn(r.w)
				r.log.sealLater(r.id, r.w.unsound)
			} else {
				r.log.used.Add(-r.w.size - fileOverhead)
			}
		}
		r.broken = true
		r.lose(fmt.Errorf("begin log: %w", err))
		return r.err
	}
	return nil
}

func (r *Recorder) begin() error {
	l := r.log
	if err := l.room(); err != nil {
		return err
	}
	w, err := l.newSegment(Header{Kind: r.kind, Gate: l.gate, ID: r.id, LogStart: r.start, Start: r.start}, r.open)
	if w != nil {
		r.w = w
		l.used.Add(w.size + fileOverhead)
	}
	if err != nil {
		l.spoolFailed(err)
		return err
	}
	l.queue.Add(int64(len(r.tail.b)))
	if err := r.write(r.tail, false); err != nil {
		return err
	}
	r.tail = batch{}
	if err := r.w.sync(r.w.size); err != nil {
		l.spoolFailed(err)
		return fmt.Errorf("sync segment: %w", err)
	}
	r.unsynced, r.unsyncedT = 0, time.Time{}
	if err := l.disk.SyncDir(l.cfg.Spool); err != nil {
		l.spoolFailed(err)
		return err
	}
	r.durable, r.pending = r.next, 0
	r.begun = true
	if r.w.records > 0 {
		r.startFlusher() // cuts the segment in time
	}
	return nil
}

// Record records that something happened on a channel (0: the connection). It copies what it needs of body. It waits, up
// to 30 s, while the disk is behind. An error means that body is not recorded: what it describes must not happen, and the
// session must end.
func (r *Recorder) Record(channel uint32, body Body) error {
	if d, ok := body.(*Data); ok {
		return r.data(channel, d.Stream, d.Data, d.Hidden, d.EOF)
	}
	b, err := encodeBody(body)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.admit(len(b)); err != nil {
		return err
	}
	at := r.add(channel, body.Kind(), b)
	if r.entry != nil {
		r.entry.add(at, body)
	}
	return r.settle()
}

// settle waits, where records are durable before what they describe happens, until all so far are. The lock is held, and
// released while it waits.
func (r *Recorder) settle() error {
	// Nothing is passed in the gate's own log, nor before a key was proven: Begin makes durable what came then.
	if r.log.cfg.Sync != syncBeforePass || r.kind != SessionLog || !r.begun {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), stallLimit, ErrStalled)
	defer cancel()
	err := r.awaitDurable(ctx)
	if errors.Is(err, ErrStalled) {
		r.lose(err)
		return r.err
	}
	return err
}

// add appends a record whose body is encoded, and gives its time. The lock is held and the record admitted.
func (r *Recorder) add(channel uint32, kind Kind, body []byte) time.Time {
	now, at := r.log.now(), r.stamp()
	before := r.grow(maxHead + len(body))
	r.tail.b = append(appendHead(r.tail.b, r.next, at, channel, kind), body...)
	r.tail.ends = kind == KindEnd
	r.added(len(r.tail.b)-before, now)
	return at
}

func (r *Recorder) data(channel uint32, s Stream, p []byte, hidden, eof bool) error {
	for {
		part, rest := p, []byte(nil)
		if len(p) > dataChunk {
			part, rest = p[:dataChunk], p[dataChunk:]
		}
		if err := r.dataPart(channel, s, part, hidden, eof && len(rest) == 0); err != nil {
			return err
		}
		if len(rest) == 0 {
			break
		}
		p = rest
	}
	if r.log.cfg.Sync != syncBeforePass {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.settle()
}

func (r *Recorder) dataPart(channel uint32, s Stream, p []byte, hidden, eof bool) error {
	const overhead = maxHead + 16
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.admit(overhead + len(p)); err != nil {
		return err
	}
	now, at := r.log.now(), r.stamp()
	before := r.grow(overhead + len(p))
	b := appendHead(r.tail.b, r.next, at, channel, KindData)
	r.tail.b = appendData(b, s, p, hidden, eof)
	r.tail.ends = false
	if r.entry != nil {
		r.entry.count(at)
		r.entry.data(s, len(p))
	}
	r.added(len(r.tail.b)-before, now)
	return nil
}

// admit waits until n bytes more may be taken, or says why they can't. The lock is held, and released while it waits.
func (r *Recorder) admit(n int) error {
	var timer *time.Timer
	for {
		switch {
		case r.err != nil:
			return r.err
		case r.closing:
			return ErrClosed
		case !r.begun:
			if len(r.tail.b)+n > maxUnproven {
				r.lose(ErrUnproven)
				return r.err
			}
			return nil
		}
		if r.pending > 0 && r.log.now().Sub(r.oldest) > stallLimit {
			r.lose(ErrStalled)
			return r.err
		}
		// What sessions have in memory is to be in the spool, too. At the limit they wait until it is written: it may compress.
		queue, taken := r.log.take(int64(n))
		full := !taken
		err := r.log.room()
		if full && queue == 0 {
			err = r.log.limitReached()
		}
		if taken && err == nil && (r.pending == 0 || r.pending+int64(n) <= r.log.cfg.SyncBytes) {
			r.taken = int64(n)
			return nil
		}
		if taken {
			r.log.queue.Add(-int64(n))
		}
		if err != nil {
			r.lose(err)
			return r.err
		}
		var others <-chan time.Time
		if full {
			r.urgent = true
			r.notify()
			others = time.After(fullPause)
		}
		if timer == nil {
			timer = time.NewTimer(stallLimit)
			defer timer.Stop()
		}
		progress := r.waitProgress()
		r.mu.Unlock()
		timedOut := false
		select {
		case <-progress:
		case <-others:
		case <-r.lost:
		case <-timer.C:
			timedOut = true
		}
		r.mu.Lock()
		if timedOut && r.err == nil {
			r.lose(ErrStalled)
		}
	}
}

// waitProgress gives the channel that is closed when records became durable. The lock is held.
func (r *Recorder) waitProgress() <-chan struct{} {
	if r.progress == nil {
		r.progress = make(chan struct{})
	}
	return r.progress
}

// grow makes room for n bytes in the tail and gives its length. The lock is held.
func (r *Recorder) grow(n int) int {
	need := len(r.tail.b) + n
	if need <= cap(r.tail.b) || need <= growBytes {
		return len(r.tail.b)
	}
	if len(r.tail.b) > 0 && need > pooledBytes {
		r.handOn()
		need = n
	}
	if need > pooledBytes {
		r.tail.b = make([]byte, 0, need)
		return 0
	}
	b := append(getBuffer(), r.tail.b...)
	r.tail.b = b
	return len(b)
}

// handOn puts the tail where the flusher takes it from at once. The lock is held.
func (r *Recorder) handOn() {
	r.full = append(r.full, r.tail)
	r.tail = batch{}
	r.notify()
}

// added accounts for a record of n bytes that was appended to the tail. The lock is held.
func (r *Recorder) added(n int, now time.Time) {
	first := r.tail.count == 0
	if first {
		r.tail.since = now
	}
	r.tail.count++
	r.next++
	if !r.begun {
		return
	}
	if first {
		r.notify() // the flusher may sleep until the segment's age: what it knows of is durable
	}
	if r.pending == 0 {
		r.oldest = now
	}
	r.pending += int64(n)
	r.log.queue.Add(int64(n) - r.taken)
	r.taken = 0
	if len(r.tail.b) >= frameTarget {
		r.handOn()
	}
	r.startFlusher()
}

func (r *Recorder) notify() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// startFlusher starts the flusher if it is not there. The lock is held.
func (r *Recorder) startFlusher() {
	if !r.running && !r.broken {
		r.running = true
		r.log.flushers.Add(1)
		go r.flush()
	}
}

// lose marks the log as lost. The lock is held.
func (r *Recorder) lose(err error) {
	if r.err == nil {
		r.err = fmt.Errorf("session %s: audit log lost: %w", r.id, err)
		close(r.lost)
	}
}

// Lost is closed when a record could not be made durable; the session must end. Err says why.
func (r *Recorder) Lost() <-chan struct{} { return r.lost }

// Err says why the log is lost, nil while it is not.
func (r *Recorder) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// Sync waits until all that was recorded before is durable.
func (r *Recorder) Sync(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.begun {
		return errors.New("sync log: not begun")
	}
	return r.awaitDurable(ctx)
}

// awaitDurable waits until all that was recorded is durable. The lock is held, and released while it waits.
func (r *Recorder) awaitDurable(ctx context.Context) error {
	want := r.next
	for r.durable < want {
		if r.err != nil {
			return r.err
		}
		r.urgent = true
		r.startFlusher()
		r.notify()
		progress := r.waitProgress()
		r.mu.Unlock()
		var err error
		select {
		case <-progress:
		case <-r.lost:
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		r.mu.Lock()
		if err != nil {
			return err
		}
	}
	return nil
}

// Close records the end and waits until the log is sealed on disk (not until it is in the store). Before Begin it writes
// no session: who came and went is folded into the gate's own log. A second Close gives what the first did. It also ends
// the log if it is lost, and then returns why it was.
func (r *Recorder) Close(end *End) error {
	body, err := encodeBody(end)
	if err != nil {
		return err
	}
	r.mu.Lock()
	if r.closing {
		r.mu.Unlock()
		return r.waitClosed()
	}
	r.closing = true
	if !r.begun {
		records, err := r.tail.b, r.err
		r.tail = batch{}
		close(r.done)
		r.mu.Unlock()
		r.log.forget(r)
		if r.kind == SessionLog && !errors.Is(err, ErrClosed) {
			r.log.refusedRecords(records, end)
		}
		return nil
	}
	if r.broken {
		r.closeErr = r.err
		if !r.running {
			close(r.done)
		}
		r.mu.Unlock()
		return r.waitClosed()
	}
	at := r.add(0, KindEnd, body) // at the spool's limit, too: a session ends in order, and their number is bounded
	if r.entry != nil {
		r.entry.add(at, end)
	}
	r.startFlusher()
	r.notify()
	r.mu.Unlock()
	return r.waitClosed()
}

func (r *Recorder) waitClosed() error {
	timer := time.NewTimer(stallLimit)
	defer timer.Stop()
	select {
	case <-r.done:
	case <-timer.C:
		return fmt.Errorf("close log of session %s: %w", r.id, ErrStalled)
	}
	r.log.forget(r)
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closeErr
}

// Tap gives a writer that records what is written as data of a channel, then writes it to w. A write that can't be
// recorded is not made.
func (r *Recorder) Tap(channel uint32, s Stream, w io.Writer) io.Writer {
	return &tap{r: r, channel: channel, stream: s, w: w}
}

type tap struct {
	r       *Recorder
	channel uint32
	stream  Stream
	w       io.Writer
}

func (t *tap) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return t.w.Write(p)
	}
	if err := t.r.data(t.channel, t.stream, p, false, false); err != nil {
		return 0, err
	}
	return t.w.Write(p)
}

// flush is the flusher: it writes what was recorded, makes it durable in time, and cuts segments. It ends when the log
// is closed or lost, and when all that was recorded is in a sealed segment; the next record starts it again.
func (r *Recorder) flush() {
	defer r.log.flushers.Done()
	l := r.log
	delay := l.cfg.SyncInterval / 2 // the other half is the disk's
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		r.mu.Lock()
		now := l.now()
		var b batch
		bulk := len(r.full) > 0
		closing := r.closing
		hurry := r.urgent || closing || r.cut
		switch {
		case bulk:
			b = r.full[0]
			r.full[0] = batch{}
			if r.full = r.full[1:]; len(r.full) == 0 {
				r.full = nil
			}
		case r.tail.count > 0 && (hurry || now.Sub(r.tail.since) >= delay):
			b, r.tail = r.tail, batch{}
		}
		drained := len(r.full) == 0 && r.tail.count == 0
		cut := r.cut && drained
		r.cut = r.cut && !cut // once for each time that it is asked for, though records keep coming
		r.mu.Unlock()

		err := r.write(b, bulk)
		late := now.Sub(r.unsyncedT) >= delay || hurry && drained && !closing // finish syncs too
		if err == nil && r.unsynced > 0 && (late || r.unsynced >= l.cfg.SyncBytes/2) {
			err = r.sync()
		}
		ended := closing && drained // the last segment has the end
		if err == nil && !ended && r.w.records > 0 && (cut || r.w.size >= l.cfg.SegmentBytes || now.Sub(r.dirty) >= r.segmentAge()) {
			if err = r.awaitSync(); err == nil {
				err = r.cutSegment()
			}
		}
		if err == nil && r.syncing != nil {
			select {
			case err = <-r.syncing.done:
				err = r.endSync(err)
			default:
			}
		}
		if err != nil {
			r.fail(err)
			return
		}
		if b.count > 0 {
			continue
		}

		r.mu.Lock()
		if len(r.full) > 0 || r.tail.count > 0 && (r.urgent || r.closing || r.cut) {
			r.mu.Unlock()
			continue
		}
		if r.tail.count == 0 {
			r.urgent = r.urgent && r.unsynced > 0 // somebody began to wait just now
			if r.closing {
				r.mu.Unlock()
				if err := r.awaitSync(); err != nil {
					r.fail(err)
					return
				}
				r.finish()
				return
			}
			if r.w.records == 0 { // nor is there a sync, which cutSegment's caller has awaited
				r.running = false
				r.mu.Unlock()
				return
			}
		}
		wait := r.segmentAge()
		for _, due := range [...]struct {
			t time.Time
			d time.Duration
		}{{r.tail.since, delay}, {r.unsyncedT, delay}, {r.dirty, r.segmentAge()}} {
			if !due.t.IsZero() {
				wait = min(wait, due.t.Add(due.d).Sub(l.now()))
			}
		}
		r.mu.Unlock()
		timer.Reset(max(wait, 0))
		var synced <-chan error
		if r.syncing != nil {
			synced = r.syncing.done
		}
		select {
		case <-r.wake:
		case <-timer.C:
		case err := <-synced:
			if err := r.endSync(err); err != nil {
				r.fail(err)
				return
			}
		}
	}
}

// write writes a batch as a frame. Its buffer must not be used after.
func (r *Recorder) write(b batch, bulk bool) error {
	if b.count == 0 {
		return nil
	}
	defer r.log.queue.Add(-int64(len(b.b))) // after it is counted as used
	var out []byte
	if len(b.b) > growBytes {
		out = getBuffer()
		defer putBuffer(out)
	}
	// What comes in bulk and doesn't compress is tried now and then only: trying costs a third of storing it.
	codec, payload := uint8(codecNone), b.b
	if !bulk || r.plain < plainRun || r.plain%plainRun == 0 {
		codec, payload = r.log.compress(b.b, out, bulk)
	}
	if r.plain++; codec != codecNone || !bulk {
		r.plain = 0
	}
	before := r.w.size
	err := r.w.writeFrame(codec, payload, len(b.b), b.count, b.ends)
	r.log.used.Add(r.w.size - before)
	if err != nil {
		r.log.spoolFailed(err)
		return err
	}
	if r.unsynced == 0 {
		r.unsyncedT = b.since
	}
	if r.dirty.IsZero() {
		r.dirty = b.since
	}
	r.unsynced += int64(len(b.b))
	putBuffer(b.b)
	return nil
}

// syncing is a sync under way: the disk works while the flusher compresses and hashes what comes next.
type syncing struct {
	done  chan error // the only value
	bytes int64      // of the records that it makes durable
	next  uint64     // and the sequence after them
}

// sync begins to make durable what was written, when the sync before has ended.
func (r *Recorder) sync() error {
	if err := r.awaitSync(); err != nil {
		return err
	}
	s := &syncing{done: make(chan error, 1), bytes: r.unsynced, next: r.w.next}
	r.syncing, r.unsynced, r.unsyncedT = s, 0, time.Time{}
	w, size := r.w, r.w.size
	go func() { s.done <- w.sync(size) }()
	return nil
}

// awaitSync waits for the sync that is under way, if one is. All ends of the flusher do so: none outlives it.
func (r *Recorder) awaitSync() error {
	if r.syncing == nil {
		return nil
	}
	return r.endSync(<-r.syncing.done)
}

// endSync takes a sync's result.
func (r *Recorder) endSync(err error) error {
	s := r.syncing
	r.syncing = nil
	if err != nil {
		err = fmt.Errorf("sync segment: %w", err)
		r.log.spoolFailed(err)
		return err
	}
	r.synced(s.bytes, s.next)
	return nil
}

// synced accounts for records that became durable: their bytes, and the sequence after them.
func (r *Recorder) synced(bytes int64, next uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending -= bytes
	r.durable = next
	switch {
	case r.unsynced > 0:
		r.oldest = r.unsyncedT
	case len(r.full) > 0:
		r.oldest = r.full[0].since
	case r.tail.count > 0:
		r.oldest = r.tail.since
	}
	if r.progress != nil {
		close(r.progress)
		r.progress = nil
	}
}

// allSynced is synced for all that was written.
func (r *Recorder) allSynced() {
	bytes := r.unsynced
	r.unsynced, r.unsyncedT = 0, time.Time{}
	r.synced(bytes, r.w.next)
}

// cutSegment seals the open segment and begins the next. The next one's file is there before this one may go to the
// store: so a log that is not sealed always has a file in the spool, by which a restart finds it.
func (r *Recorder) cutSegment() error {
	l, old := r.log, r.w
	now := l.wall()
	if old.header.Number == maxNumber {
		return errors.New("cut segment: too many segments")
	}
	before := old.size
	whole, err := old.finish(l.key, now, false, false)
	l.used.Add(old.size - before)
	if err != nil {
		l.spoolFailed(err)
		return err
	}
	next, err := l.newSegment(old.following(whole, now), r.open)
	if next != nil {
		l.used.Add(next.size + fileOverhead)
	}
	if err == nil {
		if err = next.sync(next.size); err != nil {
			next.f.Close() // the error that counts is here already
			old.unsound = true
		}
	} else if next != nil {
		l.countTorn(next)
	}
	if err != nil {
		l.spoolFailed(err)
		return err
	}
	r.sealed += old.size
	r.w = next
	r.dirty = time.Time{}
	if err := l.seal(old, nil); err != nil {
		return err
	}
	r.allSynced()
	return nil
}

// finish seals the log.
func (r *Recorder) finish() {
	before, now := r.w.size, r.log.wall()
	whole, err := r.w.finish(r.log.key, now, true, false)
	r.log.used.Add(r.w.size - before)
	if err != nil {
		r.log.spoolFailed(err)
		r.fail(err)
		return
	}
	leaf := &Leaf{Dir: r.w.header.Name().Dir(), Segments: r.w.header.Number + 1, Records: r.w.next, Hash: whole, Sealed: now}
	if err := r.log.seal(r.w, leaf); err != nil {
		r.fail(err)
		return
	}
	r.allSynced()
	r.indexSealed(whole)
	r.mu.Lock()
	r.running = false
	r.closeErr = r.err // of a log that was lost for the limit and sealed all the same
	close(r.done)
	r.mu.Unlock()
}

// fail ends the flusher after the spool failed. What is on disk is sealed when the disk takes files again, or by the next start.
func (r *Recorder) fail(err error) {
	if r.syncing != nil {
		<-r.syncing.done
		r.syncing = nil
	}
	r.w.f.Close() // the error that counts is here already
	r.log.countTorn(r.w)
	r.log.sealLater(r.id, r.w.unsound)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lose(err)
	for _, b := range r.full {
		r.log.queue.Add(-int64(len(b.b)))
	}
	r.log.queue.Add(-int64(len(r.tail.b)))
	r.broken, r.running = true, false
	r.full, r.tail = nil, batch{}
	if r.closing {
		r.closeErr = r.err
		close(r.done)
	}
}

var buffers = sync.Pool{New: func() any { return new([pooledBytes]byte) }}

// getBuffer gives an empty buffer of pooledBytes.
func getBuffer() []byte { return buffers.Get().(*[pooledBytes]byte)[:0] }

// putBuffer takes a buffer of getBuffer back; others are left to the collector.
func putBuffer(b []byte) {
	if cap(b) == pooledBytes {
		buffers.Put((*[pooledBytes]byte)(b[:pooledBytes]))
	}
}
