package auditlog

import (
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"

	"github.com/sallyport/sallyport/auditlog/tlog"
)

// flushGrace is how long Close waits for what uses the disk when its time is over already.
const flushGrace = 5 * time.Second

// Store takes sealed segments. It is write-only by shape.
type Store interface {
	// Put stores size bytes of r as the object name, durably, before it returns nil. Putting the same bytes under the same
	// name again is no error; putting others is (ErrExists). r may be an *os.File, which is never changed afterwards.
	Put(ctx context.Context, name string, r io.Reader, size int64) error
}

// ErrExists is returned by a Store for a name that holds other bytes.
var ErrExists = errors.New("exists with different content")

// fileOverhead is what a file takes in the spool beside its bytes. Counted, so that the limit bounds the number of files.
const fileOverhead = 4 << 10

// lastRoom is how close to its limit a spool counts as full: the next record would fit into it, unless it is one of the largest.
const lastRoom = 256 << 10

// Log is a gate's audit log, the writing side.
type Log struct {
	cfg   Config
	key   signer
	store Store
	gate  string
	log   *slog.Logger
	zstd  *zstd.Encoder
	lock  *os.File
	used  atomic.Int64 // bytes in the spool
	queue atomic.Int64 // bytes of records that are to be written there, before compression
	disk  disk
	now   func() time.Time // for intervals: its readings are of the monotonic clock
	wall  func() time.Time // for what is written down

	recipients []age.Recipient // whom segments are encrypted to; none: they are in the clear
	index      index
	indexClear index // beside one that is encrypted

	uploads  *uploader
	tree     *tlog.Log // nil: none is configured
	stopTree func()
	queueing atomic.Bool // objects go to uploads; before and after, a look at the spool finds them
	flushers sync.WaitGroup
	stop     chan struct{} // closed by Close: ends the folding
	folding  sync.WaitGroup
	mend     chan struct{} // holds one: the disk takes files again
	mending  sync.WaitGroup

	mu       sync.Mutex // guards all below
	closed   bool
	live     map[*Recorder]struct{}
	spoolErr error // of the spool, nil if the last probe went well and nothing failed since it began
	failures int   // how often spoolErr was set
	fold     fold
	own      *Recorder           // the gate's own log, nil while there is nothing to say
	unsealed map[string]unsealed // by ID: logs that nobody writes any more, and that have no end. Their last segment stays in the spool
}

// Open opens the log of the gate with this name (ValidID) in cfg.Spool, which no other gate may have open. What an earlier
// gate left there unsealed is sealed, flagged as interrupted and signed with key; what it did not bring to the store is
// brought there now. ctx bounds opening alone. Unset values of cfg get their defaults.
func Open(ctx context.Context, cfg Config, key crypto.Signer, store Store, gate string, log *slog.Logger) (*Log, error) {
	return openOn(ctx, osDisk{}, cfg, key, store, gate, log)
}

func openOn(ctx context.Context, d disk, cfg Config, key crypto.Signer, store Store, gate string, log *slog.Logger) (*Log, error) {
	cfg = cfg.WithDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	recipients, err := cfg.loadRecipients()
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	if !ValidID(gate) {
		return nil, fmt.Errorf("open log: %q is no name for a gate: want 1 to %d of a-z A-Z 0-9 _ -", gate, maxID)
	}
	if err := checkKey(key); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	if err := makeDir(d, cfg.Spool); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	lock, err := lockDir(filepath.Join(cfg.Spool, "lock"))
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	enc, err := newZstd()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open log: %w", err), lock.Close())
	}
	l := &Log{cfg: cfg, key: signer{Signer: key}, store: store, gate: gate, log: log, zstd: enc, lock: lock, disk: d, now: time.Now, wall: time.Now,
		recipients: recipients, unsealed: make(map[string]unsealed), mend: make(chan struct{}, 1),
		stop: make(chan struct{}), live: make(map[*Recorder]struct{})}
	l.index, l.indexClear = index{l: l}, index{l: l, clear: true}
	l.uploads = newUploader(l)
	if err := l.openTree(); err != nil {
		return nil, errors.Join(fmt.Errorf("open log: %w", err), lock.Close())
	}
	l.used.Store(0) // recover counts all that is there
	if err := l.recover(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open log: %w", err), lock.Close())
	}
	l.stopTree = l.startTree()
	l.uploads.start()
	l.folding.Add(1)
	go l.foldLoop()
	l.mending.Add(1)
	go l.mendLoop()
	return l, nil
}

// New gives a recorder for a connection with this ID (ValidID, never used before). Every recorder must be closed. It
// writes nothing before Begin. A recorder of a closed log, or with an ID that can't be, is lost from the start.
func (l *Log) New(id string) *Recorder { return l.newRecorder(SessionLog, id) }

func (l *Log) newRecorder(kind LogKind, id string) *Recorder {
	r := &Recorder{log: l, kind: kind, id: id, start: l.wall(), lost: make(chan struct{}), done: make(chan struct{}),
		wake: make(chan struct{}, 1)}
	r.entry = l.newEntry(kind, id, r.start)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		r.lose(ErrClosed)
	case !ValidID(id):
		r.lose(fmt.Errorf("%.80q is no ID", id))
	default:
		l.live[r] = struct{}{}
	}
	return r
}

func (l *Log) forget(r *Recorder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.live, r)
}

// room says whether the spool may grow.
func (l *Log) room() error {
	if l.used.Load() >= l.cfg.SpoolLimit-lastRoom {
		return l.limitReached()
	}
	return nil
}

// take adds n bytes to the queue if the spool has room for all of it, at once: many sessions ask at a time. It gives the queue
// without them.
func (l *Log) take(n int64) (queue int64, ok bool) {
	for {
		queue = l.queue.Load()
		if l.used.Load()+queue+n > l.cfg.SpoolLimit {
			return queue, false
		}
		if l.queue.CompareAndSwap(queue, queue+n) {
			return queue, true
		}
	}
}

func (l *Log) limitReached() error {
	return fmt.Errorf("%w: %d of %d bytes", ErrSpoolLimit, l.used.Load(), l.cfg.SpoolLimit)
}

// spoolFailed keeps an error of the spool for Ready.
func (l *Log) spoolFailed(err error) {
	l.log.Error("audit log: spool failed", "error", err)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spoolErr = err
	l.failures++
}

// Ready says why no session may begin: the spool is full or can't be written. After a failure it tries the spool anew.
func (l *Log) Ready() error {
	l.mu.Lock()
	failed, failures, closed := l.spoolErr, l.failures, l.closed
	l.mu.Unlock()
	if closed {
		return ErrClosed
	}
	if err := l.room(); err != nil {
		return err
	}
	if l.tree != nil {
		if err := l.tree.Err(); err != nil {
			return fmt.Errorf("transparency log: %w", err)
		}
	}
	if failed == nil {
		return nil
	}
	if err := l.probe(); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	l.mu.Lock()
	if l.failures == failures {
		l.spoolErr = nil
	}
	failed = l.spoolErr
	l.mu.Unlock()
	if failed != nil { // something failed while the probe went well: of that it says nothing
		return fmt.Errorf("spool: %w", failed)
	}
	select {
	case l.mend <- struct{}{}:
	default:
	}
	return nil
}

// probe writes and syncs a file in the spool.
func (l *Log) probe() error {
	name := filepath.Join(l.cfg.Spool, "probe-"+rand.Text()+probeSuffix)
	f, err := l.disk.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, fileOverhead))
	err = errors.Join(err, f.Sync(), f.Close())
	if rerr := l.disk.Remove(name); !errors.Is(rerr, fs.ErrNotExist) { // a look at the spool removes it, too
		err = errors.Join(err, rerr)
	}
	return err
}

const probeSuffix = ".probe"

// StoreErr says why segments wait for the store, nil if none was refused. Sessions go on meanwhile, until the spool is full.
func (l *Log) StoreErr() error { return l.uploads.lastErr() }

// Stats is a moment's state of the log.
type Stats struct {
	SpoolBytes int64 // in the spool, with what each file takes beside its bytes
	SpoolLimit int64
	Waiting    int           // segments that wait for the store
	Oldest     time.Duration // how long the first of them has waited, in this run
	Stored     uint64        // segments brought to the store since Open
	Failed     uint64        // Puts that failed since Open
}

// Stats gives the state, for metrics.
func (l *Log) Stats() Stats {
	s := l.uploads.stats()
	s.SpoolBytes, s.SpoolLimit = l.used.Load(), l.cfg.SpoolLimit
	return s
}

// seal renames a finished segment and hands it to the uploader once its name is durable. leaf is its log's, nil if another segment
// follows.
func (l *Log) seal(w *segmentWriter, leaf *Leaf) error {
	err := w.rename()
	if err == nil {
		err = l.disk.SyncDir(l.cfg.Spool)
	}
	if err != nil {
		l.spoolFailed(err)
		return err
	}
	l.uploads.add(w.header.ID, upload{number: w.header.Number, name: w.header.Name().String(), size: w.size, last: leaf != nil, leaf: leaf})
	return nil
}

// Close ends the log: sessions that are still open are closed with the cause "shutdown", and segments go to the store
// until ctx is done. What is left then stays in the spool for the next Open, and is no error.
func (l *Log) Close(ctx context.Context) error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	var open []*Recorder
	for r := range l.live {
		if r.kind == SessionLog {
			open = append(open, r)
		}
	}
	l.mu.Unlock()
	var errs []error
	for _, r := range open {
		errs = append(errs, r.Close(&End{Cause: "shutdown"}))
	}
	close(l.stop)
	l.folding.Wait()
	errs = append(errs, await(ctx, &l.mending))
	l.writeRefused()
	l.mu.Lock()
	own := l.own
	l.own = nil
	l.mu.Unlock()
	if own != nil {
		errs = append(errs, own.Close(&End{Cause: "shutdown"}))
	}
	errs = append(errs, l.closeIndex(), await(ctx, &l.flushers))
	l.stopTree()
	l.uploads.close(ctx)
	errs = append(errs, l.closeTree(ctx), l.zstd.Close(), l.lock.Close())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close log: %w", err)
	}
	return nil
}

// await waits for goroutines that use the disk until ctx is done: a disk that hangs shall not keep the gate from ending.
func await(ctx context.Context, group *sync.WaitGroup) error {
	ended := make(chan struct{})
	go func() { group.Wait(); close(ended) }()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-ended:
		return nil
	case <-time.After(flushGrace): // they need no time, but a processor
		return context.Cause(ctx)
	}
}

// newRunID makes an ID for one run of the gate's own log; it sorts by time.
func newRunID(now time.Time) string {
	return now.UTC().Format("20060102T150405Z") + "-" + rand.Text()[:8]
}
