package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/sallyport/sallyport/backends"
)

const (
	// maxHeld and maxHeldBytes bound the reports that the agent holds until the gate has acknowledged them.
	maxHeld      = 1024
	maxHeldBytes = 1 << 20

	// maxReportBytes bounds one report on the stream: a script's, with its path.
	maxReportBytes = backends.MaxReportScript + 2*backends.MaxReportPath + 1<<10

	// reportRate is how many executions and connections a second a session may make for long, reportBurst how many at
	// once. More are not lost, but wait.
	reportRate  = 200
	reportBurst = 2000

	// linger is how long reports are gathered before they are sent, unless someone waits for them: each batch costs both
	// sides some 200 µs of wake-ups.
	linger = 50 * time.Millisecond

	defaultStuckLimit = 30 * time.Second
)

var errStuck = errors.New("reports are not taken")

// reports is the queue of reports to the gate. Numbers are given in the order in which reports are sent.
type reports struct {
	stream io.ReadWriteCloser
	strict bool
	limit  time.Duration // how long add may wait

	mu       sync.Mutex // guards what follows
	next     uint64     // sequence of the next report
	acked    uint64     // all up to here have been acknowledged
	bytes    int        // of reports not acknowledged
	sizes    [maxHeld]int
	pending  []byte        // not yet written to the stream
	spare    []byte        // for pending, after it was written
	urgent   bool          // someone waits
	err      error         // no more reports are taken
	progress chan struct{} // closed when acked moves or err is set; nil while nobody waits
	tokens   float64
	filled   time.Time // when tokens was right
	finish   func()    // what Finish asks for; nil: nothing, or it was done

	wake chan struct{} // tells send that there is something; holds one
	done chan struct{} // closed when err is set
}

func newReports(stream io.ReadWriteCloser, strict bool, limit time.Duration) *reports {
	if limit <= 0 {
		limit = defaultStuckLimit
	}
	r := &reports{
		stream: stream, strict: strict, limit: limit, next: 1, tokens: reportBurst, filled: time.Now(),
		wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
	go r.send()
	go r.takeAcks()
	return r
}

// fail ends the queue. Nobody waits in it any more.
func (r *reports) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.err = err
		close(r.done)
		r.moved()
		r.stream.Close()
	}
}

// moved tells those who wait. The lock is held.
func (r *reports) moved() {
	if r.progress != nil {
		close(r.progress)
		r.progress = nil
	}
}

// pace gives how long the next execution or connection has to wait for its turn, and takes that turn.
func (r *reports) pace() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	r.tokens = min(r.tokens+now.Sub(r.filled).Seconds()*reportRate, reportBurst) - 1
	r.filled = now
	if r.tokens >= 0 {
		return 0
	}
	return time.Duration(-r.tokens / reportRate * float64(time.Second))
}

// add gives rep its number and holds it for the gate. It waits while the queue is full; with wait, and strict, also until
// the gate has acknowledged it.
func (r *reports) add(rep *backends.Report, wait bool) (uint64, error) {
	rep.Time = time.Now().UnixNano()
	r.mu.Lock()
	defer r.mu.Unlock()
	var limit <-chan time.Time
	// Encoding is done under the lock: the number is in it.
	for r.err == nil && (r.next-r.acked > maxHeld || r.bytes > maxHeldBytes-maxReportBytes) {
		if err := r.wait(&limit); err != nil {
			return 0, err
		}
	}
	if r.err != nil {
		return 0, r.err
	}
	seq := r.next
	rep.Sequence = seq
	before := len(r.pending)
	if r.pending == nil {
		r.pending, r.spare = r.spare, nil
	}
	body, err := encoding.Marshal(rep)
	if err != nil {
		return 0, fmt.Errorf("encode report: %w", err)
	}
	if len(body) > maxReportBytes {
		return 0, errMessageSize
	}
	r.next++
	r.pending = append(binary.BigEndian.AppendUint32(r.pending, uint32(len(body))), body...)
	r.bytes += len(body)
	r.sizes[seq%maxHeld] = len(body)
	if wait = wait && r.strict; wait {
		r.urgent = true
	}
	if before == 0 || wait || len(r.pending) > coalesceLimit {
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
	for wait && r.acked < seq {
		if err := r.wait(&limit); err != nil {
			return 0, err
		}
	}
	return seq, nil
}

// wait waits for progress, at most until limit, which it sets. The lock is held, and released while it waits.
func (r *reports) wait(limit *<-chan time.Time) error {
	if r.err != nil {
		return r.err
	}
	if *limit == nil {
		*limit = time.After(r.limit)
	}
	if r.progress == nil {
		r.progress = make(chan struct{})
	}
	progress := r.progress
	r.mu.Unlock()
	stuck := false
	select {
	case <-progress:
	case <-*limit:
		stuck = true
	}
	r.mu.Lock()
	if stuck && r.err == nil {
		r.mu.Unlock()
		r.fail(errStuck)
		r.mu.Lock()
	}
	return r.err
}

// settle waits until the gate has acknowledged all that there is, or for a while.
func (r *reports) settle(limit time.Duration) {
	r.mu.Lock()
	want := r.next - 1
	r.urgent = true
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		r.mu.Lock()
		if r.err != nil || r.acked >= want {
			r.mu.Unlock()
			return
		}
		if r.progress == nil {
			r.progress = make(chan struct{})
		}
		progress := r.progress
		r.mu.Unlock()
		select {
		case <-progress:
		case <-timer.C:
			return
		}
	}
}

// send writes what is pending, gathered for a while unless someone waits for it.
func (r *reports) send() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-r.done:
			return
		case <-r.wake:
		}
		r.mu.Lock()
		urgent := r.urgent
		r.mu.Unlock()
		if !urgent {
			timer.Reset(linger)
			select {
			case <-r.done:
				return
			case <-r.wake: // someone waits, or there is much
			case <-timer.C:
			}
		}
		r.mu.Lock()
		b := r.pending
		r.pending, r.urgent = nil, false
		r.mu.Unlock()
		if len(b) == 0 {
			continue
		}
		if _, err := r.stream.Write(b); err != nil {
			r.fail(fmt.Errorf("send reports: %w", err))
			return
		}
		if cap(b) <= coalesceLimit {
			r.mu.Lock()
			r.spare = b[:0]
			r.mu.Unlock()
		}
	}
}

// ack is the gate's answer: all reports up to a number are recorded. With Finish it is no answer, but asks to end all
// processes, and to end the stream after what they did last.
type ack struct {
	Sequence uint64 `cbor:"1,keyasint"`
	Finish   bool   `cbor:"2,keyasint,omitempty"`
}

func (r *reports) takeAcks() {
	for {
		var a ack
		if err := readMessage(r.stream, maxReport, &a); err != nil {
			r.fail(fmt.Errorf("the gate takes no reports any more: %w", noEOF(err)))
			return
		}
		r.mu.Lock()
		if a.Finish {
			if finish := r.finish; finish != nil {
				r.finish = nil
				go finish()
			}
			r.mu.Unlock()
			continue
		}
		if a.Sequence < r.acked || a.Sequence >= r.next {
			r.mu.Unlock()
			r.fail(errors.New("the gate acknowledged what was not sent"))
			return
		}
		for r.acked < a.Sequence {
			r.acked++
			r.bytes -= r.sizes[r.acked%maxHeld]
		}
		r.moved()
		r.mu.Unlock()
	}
}
