package auditlog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/bits"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport/sallyport/auditlog/tlog"
)

const (
	uploadWorkers = 16              // so that a store that takes 80 ms for one keeps up with 1000 sessions
	uploadTimeout = 5 * time.Minute // of one Put
	backoffFirst  = 100 * time.Millisecond
	backoffMost   = 30 * time.Second // of one log's
	awayAfter     = 4                // failures in a row, of any logs', after which the store counts as away
	sayAgain      = 16               // failed tries for one line of the gate's log, while it is away
	awayMost      = 5 * time.Second  // between two tries while it is: the first that works lets all others go
	maxWaiting    = 16 << 10         // segments known in memory; those beyond are found by looking at the spool again
)

// upload is a sealed segment that waits for the store.
type upload struct {
	number uint32
	name   string
	size   int64
	last   bool      // no segment of its log follows
	leaf   *Leaf     // of its log, if it is the last; nil: as its file says
	skip   int64     // bytes of the file before the object's, of one that is no segment
	since  time.Time // it waits
}

// uploadQueue is one log's waiting segments. They go in order, so that a gap in the store means a loss, never a delay.
type uploadQueue struct {
	id       string
	segments []upload
	failures int
	err      error     // of the last try, nil if it went well
	after    time.Time // not before
	busy     bool
}

// lateUpload is a segment of the log id that came while a look at the spool was under way.
type lateUpload struct {
	id string
	upload
}

// uploader brings sealed segments from the spool to the store.
type uploader struct {
	l      *Log
	ctx    context.Context
	cancel context.CancelFunc
	done   sync.WaitGroup
	wake   chan struct{} // one look for a worker each; holds uploadWorkers

	mu       sync.Mutex // guards all below
	queues   map[string]*uploadQueue
	order    []*uploadQueue // those in queues, the next first
	trees    []*uploadQueue // those of transparency logs among them
	waiting  int
	overflow bool              // the spool holds segments that are not in queues
	scanning bool              // a look at the spool is under way, and overflow is set
	again    bool              // that look may have missed files, which come in no other way
	late     []lateUpload      // that were added meanwhile
	lateFrom map[string]uint32 // the first number of each log of those
	closing  bool
	err      error               // of the last look at the spool, nil if it went well; else of the first file that it could not read
	unread   map[string]int      // by file that the last look could not read: in how many looks in a row
	objects  bool                // no segments: the transparency log is closed, and takes no leaf; set before start
	held     map[string]struct{} // logs with such a segment: what is the last of one goes after it
	stored   uint64
	failed   uint64
	row      int          // failures in a row, of all logs
	probing  *uploadQueue // the one try that is under way while the store is away, nil: none
	probes   int          // those that failed
	probe    time.Time    // no try before, while the store is away
}

func newUploader(l *Log) *uploader {
	ctx, cancel := context.WithCancel(context.Background())
	return &uploader{l: l, ctx: ctx, cancel: cancel, wake: make(chan struct{}, uploadWorkers), queues: make(map[string]*uploadQueue)}
}

func (u *uploader) start() {
	for range uploadWorkers {
		u.done.Add(1)
		go u.work()
	}
}

// add queues a segment whose file is durable.
func (u *uploader) add(id string, s upload) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.scanning { // the look may miss it, and see those after it
		if _, ok := u.lateFrom[id]; !ok {
			if u.lateFrom == nil {
				u.lateFrom = make(map[string]uint32)
			}
			u.lateFrom[id] = s.number
		}
		if len(u.late) <= maxWaiting { // one more says that there is no room
			u.late = append(u.late, lateUpload{id, s})
		}
		return
	}
	if u.overflow || u.waiting >= maxWaiting {
		u.overflow = true
		return
	}
	if _, ok := u.held[id]; ok && s.skip == 0 {
		return // found by the next look
	}
	u.addLocked(id, s)
	u.notify()
}

func (u *uploader) addLocked(id string, s upload) {
	q := u.queues[id]
	if q == nil {
		q = &uploadQueue{id: id}
		u.queues[id] = q
		u.order = append(u.order, q)
		if strings.HasPrefix(id, tlog.QueuePrefix) {
			u.trees = append(u.trees, q)
		}
	}
	if n := len(q.segments); n > 0 && s.number <= q.segments[n-1].number {
		return // a rescan was first
	}
	s.since = time.Now()
	q.segments = append(q.segments, s)
	u.waiting++
}

func (u *uploader) notify() {
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

// lastErr is the error of a segment that could not be stored and still waits, of the oldest if there are several.
func (u *uploader) lastErr() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	err := u.err
	var since time.Time
	for _, q := range u.queues {
		if s := q.segments[0].since; q.err != nil && (since.IsZero() || s.Before(since)) {
			err, since = q.err, s
		}
	}
	return err
}

func (u *uploader) stats() Stats {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := Stats{Waiting: u.waiting, Stored: u.stored, Failed: u.failed}
	now := time.Now()
	for _, q := range u.queues {
		s.Oldest = max(s.Oldest, now.Sub(q.segments[0].since))
	}
	return s
}

// take gives the next queue that is due, marked as busy, or how long to wait for one. finished: nothing is left and
// nothing comes.
func (u *uploader) take() (q *uploadQueue, wait time.Duration, finished bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	wait = backoffMost
	away := u.row >= awayAfter
	if d := u.probe.Sub(now); away && (u.probing != nil || d > 0) {
		return nil, max(d, backoffFirst), u.finished()
	}
	// Checkpoints before all else: what came to the store is proven by them. One at a time, so they hold up nothing.
	for _, q := range u.trees {
		if !away && !q.busy && !q.after.After(now) {
			q.busy = true
			return q, 0, false
		}
	}
	for i, q := range u.order {
		if q.busy {
			continue
		}
		if d := q.after.Sub(now); d > 0 && !away {
			wait = min(wait, d)
			continue
		}
		q.busy = true
		if away {
			u.probing = q
		}
		u.order = append(append(u.order[:i:i], u.order[i+1:]...), q) // the others come first next time
		return q, 0, false
	}
	return nil, wait, u.finished()
}

// finished says that nothing is left and nothing comes. The lock is held.
func (u *uploader) finished() bool { return u.closing && u.waiting == 0 && !u.overflow }

// work is one worker. It ends when the context does, or when all is stored after close.
func (u *uploader) work() {
	defer u.done.Done()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		u.rescan()
		q, wait, finished := u.take()
		if finished {
			u.notify() // for the next worker
			return
		}
		if q == nil {
			timer.Reset(wait)
			select {
			case <-u.wake:
			case <-timer.C:
			case <-u.ctx.Done():
				return
			}
			continue
		}
		u.mu.Lock()
		s := q.segments[0]
		u.mu.Unlock()
		err := u.put(q.id, s)
		if u.ctx.Err() != nil && err != nil {
			return
		}
		u.result(q, s, err)
	}
}

// put brings one segment to the store and removes it from the spool.
func (u *uploader) put(id string, s upload) error {
	ctx, cancel := context.WithTimeout(u.ctx, uploadTimeout)
	defer cancel()
	suffix := sealedSuffix
	if s.skip > 0 {
		suffix = objectSuffix
	}
	path := filepath.Join(u.l.cfg.Spool, spoolName(id, s.number, suffix))
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		// Only this uploader removes segments: a rescan found it before it was added, and it is stored.
		u.l.log.Warn("audit log: segment is not in the spool any more", "segment", s.name)
		return nil
	}
	if err != nil {
		return fmt.Errorf("upload %s: %w", s.name, err)
	}
	defer f.Close()
	if _, err := f.Seek(s.skip, io.SeekStart); err != nil {
		return fmt.Errorf("upload %s: %w", s.name, err)
	}
	if err := u.l.store.Put(ctx, s.name, f, s.size-s.skip); err != nil {
		return fmt.Errorf("upload %s: %w", s.name, err)
	}
	if s.skip == 0 {
		if err := u.l.enter(f, s); err != nil {
			return fmt.Errorf("upload %s: %w", s.name, err)
		}
	}
	// Not synced: a file that comes back after a crash is put again, which is no error. But were its log's last segment gone then,
	// the restart would take the one that came back for the last, and end a log anew that has ended. So the last goes last.
	if s.last {
		if err := u.l.disk.SyncDir(u.l.cfg.Spool); err != nil {
			return fmt.Errorf("upload %s: %w", s.name, err)
		}
	}
	if err := u.l.disk.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("upload %s: %w", s.name, err)
	}
	u.l.used.Add(-s.size - fileOverhead)
	return nil
}

// backoff is the wait after so many failures: half of it by chance, as sessions shall not all knock at once.
func backoff(failures int, most time.Duration) time.Duration {
	d := min(backoffFirst<<min(failures-1, 16), most)
	return d/2 + rand.N(d/2+1)
}

func (u *uploader) result(q *uploadQueue, s upload, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	probed := u.probing == q
	if probed {
		u.probing = nil
	}
	q.busy = false
	q.err = err
	now := time.Now()
	if err != nil {
		u.failed++
		u.row++
		q.failures++
		d := backoff(q.failures, backoffMost)
		q.after = now.Add(d)
		level := slog.LevelWarn
		switch {
		case probed:
			u.probes++
			d = backoff(u.probes, awayMost)
			u.probe = now.Add(d)
			if u.probes%sayAgain != 0 {
				level = slog.LevelDebug // it may be away for days
			}
		case u.row == awayAfter:
			u.probes = 0
			u.probe = now.Add(d)
		}
		u.l.log.Log(u.ctx, level, "audit log: segment not stored", "error", err, "retry_in", d, "failures", q.failures,
			"waiting", u.waiting)
	} else {
		u.stored++
		u.waiting--
		if u.row >= awayAfter {
			u.l.log.Info("audit log: the store takes segments again", "waiting", u.waiting)
			for _, other := range u.queues {
				other.after = now.Add(rand.N(backoffFirst))
			}
		}
		u.row, u.probe, q.failures = 0, time.Time{}, 0
		q.segments = q.segments[1:]
		if len(q.segments) == 0 {
			delete(u.queues, q.id)
			u.trees = slices.DeleteFunc(u.trees, func(other *uploadQueue) bool { return other == q })
			for i := len(u.order) - 1; i >= 0; i-- {
				if u.order[i] == q {
					u.order = append(u.order[:i], u.order[i+1:]...)
					break
				}
			}
		}
	}
	u.notify()
}

// rescan looks at the spool again once there is room for the segments that found none. One worker does so at a time, without the
// lock: a spool may hold very many files, and sessions go on meanwhile.
func (u *uploader) rescan() {
	u.mu.Lock()
	if !u.overflow || u.scanning || u.waiting > maxWaiting/2 {
		u.mu.Unlock()
		return
	}
	u.scanning = true
	u.mu.Unlock()

	files, err := u.l.readSpool(false)
	all, held, unread := err == nil, make(map[string]struct{}), make(map[string]int)
	var first error
	for i := 0; all && i < len(files); i++ {
		f := files[i]
		if _, ok := held[f.id]; ok && f.suffix == sealedSuffix && lastSealed(files[i:]) {
			continue // by it a restart finds the log
		}
		var err error
		if all, err = u.found(files[i:]); err == nil {
			continue
		}
		name := f.path(u.l.cfg.Spool)
		unread[name] = u.unread[name] + 1
		if f.suffix == sealedSuffix {
			held[f.id] = struct{}{}
		}
		if errors.Is(err, errBehind) {
			continue
		}
		first = cmp.Or(first, fmt.Errorf("spool: %w", err))
		if bits.OnesCount(uint(unread[name])) == 1 { // said ever more seldom
			u.l.log.Error("audit log: spool: a file can't be read, which is tried again", "error", err)
		}
	}

	u.mu.Lock()
	defer u.mu.Unlock()
	defer func() { u.scanning, u.again, u.late, u.lateFrom = false, false, nil, nil }()
	if !all { // with those that were not looked at
		maps.Copy(held, u.held)
		for name, n := range u.unread {
			unread[name] = max(n, unread[name])
		}
	}
	u.held, u.unread = held, unread
	if u.err = cmp.Or(err, first); err != nil {
		u.l.log.Error("audit log: spool", "error", err)
		return // tried again in a while, or with what comes next
	}
	if all && !u.again && u.waiting+len(u.late) <= maxWaiting {
		u.overflow = false
		for _, s := range u.late {
			if _, ok := held[s.id]; !ok {
				u.addLocked(s.id, s.upload)
			}
		}
	} // else another look finds them
	for range uploadWorkers {
		u.notify()
	}
}

// lookAgain has the spool looked at: it holds segments that were not added.
func (u *uploader) lookAgain() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.overflow, u.again = true, u.scanning
	u.notify()
}

// errBehind is that what follows a segment is on its way already: it could not be read then.
var errBehind = errors.New("what follows it is on its way")

// lookUnread has the spool looked at if the last look found a file that could not be read.
func (u *uploader) lookUnread() {
	u.mu.Lock()
	unread := len(u.unread) > 0
	u.mu.Unlock()
	if unread {
		u.lookAgain()
	}
}

// found queues the first of files if it is a sealed segment or an object that is in no queue. It says whether there was room; an
// error is of that file alone.
func (u *uploader) found(files []spoolFile) (room bool, err error) {
	f := files[0]
	if f.suffix == openSuffix || u.objects && f.suffix != objectSuffix || f.suffix == sealedSuffix && u.l.isUnsealed(f.id) && lastSealed(files) {
		return true, nil
	}
	u.mu.Lock()
	q, known := u.queues[f.id], u.known(f)
	room = u.waiting < maxWaiting
	behind := q != nil && f.number < q.segments[0].number
	u.mu.Unlock()
	switch {
	case !room:
		return false, nil
	case behind:
		if _, err := os.Lstat(f.path(u.l.cfg.Spool)); errors.Is(err, os.ErrNotExist) {
			return true, nil // stored since it was listed
		}
		return true, errBehind
	case known:
		return true, nil
	}
	s, err := f.upload(u.l.disk, u.l.cfg.Spool)
	if errors.Is(err, os.ErrNotExist) {
		return true, nil // stored meanwhile
	}
	var damage *DamageError
	if errors.As(err, &damage) && damage.Cause == nil {
		u.l.log.Error("audit log: spool holds a file that is no segment", "error", err)
		return true, nil // nor will it be: the rest is still worth having
	}
	if err != nil {
		return true, err
	}
	s.last = len(files) == 1 || files[1].id != f.id // as far as can be seen
	u.mu.Lock()
	defer u.mu.Unlock()
	u.addLocked(f.id, s)
	u.notify()
	return true, nil
}

// known says whether a file is queued, or will be from those that came late: it goes after those before it. The lock is held.
func (u *uploader) known(f spoolFile) bool {
	if from, ok := u.lateFrom[f.id]; ok && f.number >= from {
		return true
	}
	q := u.queues[f.id]
	return q != nil && f.number <= q.segments[len(q.segments)-1].number
}

// lastSealed says whether no sealed segment of the same log follows the first of files. It is what a restart finds a log by whose
// next segment could not be made.
func lastSealed(files []spoolFile) bool {
	for _, f := range files[1:] {
		if f.id != files[0].id {
			return true
		}
		if f.suffix == sealedSuffix {
			return false
		}
	}
	return true
}

// close lets the workers finish what is there until ctx is done.
func (u *uploader) close(ctx context.Context) {
	u.mu.Lock()
	u.closing, u.probe = true, time.Time{}
	u.overflow = u.overflow || len(u.unread) > 0 // one more look
	for _, q := range u.queues {
		q.after = time.Time{} // one more try at once
	}
	u.mu.Unlock()
	for range uploadWorkers {
		u.notify()
	}
	stop := context.AfterFunc(ctx, u.cancel)
	u.done.Wait()
	stop()
	u.cancel()
}
