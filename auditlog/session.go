package auditlog

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
)

// Object is a stored object.
type Object struct {
	Name     string
	Size     int64
	Modified time.Time
}

// Source gives stored objects back.
type Source interface {
	// List yields the objects whose names begin with prefix: those of one directory together, in the order of their names.
	// After an error it ends.
	List(ctx context.Context, prefix string) iter.Seq2[Object, error]
	// Open opens an object; fs.ErrNotExist if there is none of that name.
	Open(ctx context.Context, name string) (io.ReadCloser, error)
}

// Stored is a log as found in a source: a session's, or the gate's own of one run and day.
type Stored struct {
	Name     Name // of its first segment that is there
	Segments []Object
	Foreign  []string // names in its place that are not a segment's
}

// Logs yields the logs below a prefix (SessionPrefix, GatePrefix, IndexPrefix, "" for all, or longer), each with its segments in order.
// Objects there that belong to no log come as a Stored without segments, with their names in Foreign.
func Logs(ctx context.Context, src Source, prefix string) iter.Seq2[Stored, error] {
	return func(yield func(Stored, error) bool) {
		var cur Stored
		dir := ""
		for o, err := range src.List(ctx, prefix) {
			if err != nil {
				yield(Stored{}, fmt.Errorf("list %q: %w", prefix, err))
				return
			}
			if !strings.HasPrefix(o.Name, SessionPrefix) && !strings.HasPrefix(o.Name, GatePrefix) && !strings.HasPrefix(o.Name, IndexPrefix) {
				continue // a published key, a note: nothing of ours
			}
			n, err := ParseName(o.Name)
			if err != nil {
				switch {
				case dir != "" && strings.HasPrefix(o.Name, dir):
					cur.Foreign = append(cur.Foreign, o.Name)
				case !yield(Stored{Foreign: []string{o.Name}}, nil):
					return
				}
				continue
			}
			if n.Dir() != dir {
				if dir != "" && !yield(cur, nil) {
					return
				}
				cur, dir = Stored{Name: n}, n.Dir()
			}
			cur.Segments = append(cur.Segments, o)
		}
		if dir != "" {
			yield(cur, nil)
		}
	}
}

// State says what a log is.
type State string

const (
	// Sealed: whole, and ended by its gate.
	Sealed State = "sealed"
	// Interrupted: whole as far as its gate came; sealed by a later start, or after its disk had failed.
	Interrupted State = "interrupted"
	// Live: whole as far as it goes, no last segment yet. Whether its newest segments were taken away can't be seen from the
	// segments alone.
	Live State = "live"
	// Damaged: Report.Problems says how.
	Damaged State = "damaged"
	// Unreadable: objects of it are there, and the source does not give them. Nothing is wrong with the rest.
	Unreadable State = "unreadable"
)

// maxProblems bounds a report.
const maxProblems = 100

// Problem is one thing that is wrong with a log.
type Problem struct {
	Segment string `json:"segment"` // the object's name
	Offset  int64  `json:"offset"`  // in it
	What    string `json:"what"`
}

func (p Problem) String() string {
	return fmt.Sprintf("%s: offset %d: %s", p.Segment, p.Offset, p.What)
}

// Object is the problem of an object as a whole.
func (p Problem) Object() string {
	if p.Offset != 0 {
		return p.String()
	}
	return p.Segment + ": " + p.What
}

// Report is the verdict on a log that was read to its end.
type Report struct {
	ID       string    `json:"id"`
	Kind     string    `json:"kind"`
	Gate     string    `json:"gate"`
	State    State     `json:"state"`
	Pinned   bool      `json:"pinned"` // every signature is of a key that was given; else of those that the log names itself
	Keys     []string  `json:"keys"`   // fingerprints of the keys that signed
	Start    time.Time `json:"start"`
	Segments int       `json:"segments"`
	Records  uint64    `json:"records"`
	Bytes    int64     `json:"bytes"` // stored
	// Recipients are the types of those whom the log is encrypted to, as age names them; empty: it is in the clear. Unread is how
	// many of the records could not be read for want of an identity: all else was checked.
	Recipients []string  `json:"recipients,omitempty"`
	Unread     uint64    `json:"unread_records,omitempty"`
	Problems   []Problem `json:"problems,omitempty"`
	More       int       `json:"more_problems,omitempty"` // that Problems has no room for
}

// SessionReader reads a log over all its segments and checks it on the way.
type SessionReader struct {
	src    Source
	log    Stored
	pinned []ed25519.PublicKey
	ids    []age.Identity
	read   int // of the segments
	chain  chain
	report Report
	keys   []ed25519.PublicKey
	head   *Header // of the first segment read
	err    error
	unread int // problems that are errors of the source; that an object is gone is none of these
}

// NewSessionReader reads a log that Logs found. With keys, every segment must be signed by one of them; without, by the
// key that its footer names, and always by the same one unless a later start of the gate sealed it (the report says that
// nothing was pinned: then the signatures prove only that it was written by one hand).
func NewSessionReader(src Source, log Stored, keys ...ed25519.PublicKey) *SessionReader {
	r := &SessionReader{src: src, log: log, pinned: keys}
	r.report = Report{ID: log.Name.ID, Kind: log.Name.Kind.String(), Gate: log.Name.Gate, Pinned: len(keys) > 0}
	for _, name := range log.Foreign {
		r.problem(name, 0, "not a segment")
	}
	return r
}

// Decrypt lets Records give what is encrypted to one of these identities. Without it, or where none is a recipient, encrypted
// records are skipped, and counted in the report; all checks are made just the same.
func (r *SessionReader) Decrypt(ids ...age.Identity) { r.ids = ids }

// Add adds segments that have come since the log was found; Records then goes on with them.
func (r *SessionReader) Add(segments ...Object) { r.log.Segments = append(r.log.Segments, segments...) }

// Last is the name of the newest segment that the reader knows of, "" without any.
func (r *SessionReader) Last() string {
	if len(r.log.Segments) == 0 {
		return ""
	}
	return r.log.Segments[len(r.log.Segments)-1].Name
}

// Records yields the records in order; it goes on after damage with what can be read, and reads every segment to its
// end. Report is there after it. Breaking off leaves the report incomplete.
func (r *SessionReader) Records(ctx context.Context) iter.Seq[Record] {
	return func(yield func(Record) bool) {
		for r.read < len(r.log.Segments) {
			o := r.log.Segments[r.read]
			r.read++
			n, err := ParseName(o.Name)
			if err != nil {
				r.problem(o.Name, 0, "%v", err)
				continue
			}
			r.checkPlace(o.Name, n)
			if !r.segment(ctx, o, n, yield) {
				return
			}
			r.chain.number = n.Number + 1
		}
		r.report.State = Live
		switch {
		case r.unread > 0 && r.unread == len(r.report.Problems)+r.report.More:
			r.report.State = Unreadable
		case len(r.report.Problems) > 0 || len(r.log.Segments) == 0:
			r.report.State = Damaged
		case r.chain.sealed && r.chain.interrupted:
			r.report.State = Interrupted
		case r.chain.sealed:
			r.report.State = Sealed
		}
	}
}

// checkPlace compares a segment's number with the one that should come.
func (r *SessionReader) checkPlace(name string, n Name) {
	c := &r.chain
	if c.sealed {
		r.problem(name, 0, "a segment after the last one")
	}
	switch {
	case n.Number < c.number:
		r.problem(name, 0, "out of order")
	case n.Number == c.number+1:
		r.problem(name, 0, "segment %d is missing before it", c.number)
	case n.Number > c.number:
		r.problem(name, 0, "segments %d to %d are missing before it", c.number, n.Number-1)
	}
	if n.Number != c.number {
		c.broken = true
	}
}

// chain is what the next segment must fit.
type chain struct {
	number      uint32
	hash        Hash
	next        uint64
	broken      bool // hash and next are not known
	sealed      bool
	interrupted bool
	footer      Footer // of the newest segment that has one
}

// largeFrames has room for as many segments as may hold frames that no gate writes at the same time: one. With its records, that
// takes some 50 MiB, and sessions are read side by side. Who reads records must not read another session for each.
var largeFrames = make(chan struct{}, 1)

// segment reads one segment; false if the caller has enough.
func (r *SessionReader) segment(ctx context.Context, o Object, n Name, yield func(Record) bool) bool {
	c := &r.chain
	r.report.Segments++
	f, err := r.src.Open(ctx, o.Name)
	if err != nil {
		r.unreadable(o.Name, err)
		return true
	}
	defer f.Close()
	counted := &countingReader{r: f}
	s, err := NewSegmentReader(counted)
	if err != nil {
		r.damaged(o.Name, err)
	} else {
		r.checkHeader(o.Name, n, s.Header())
		r.unlock(o.Name, s)
		turn := false
		s.large = func() error {
			if turn {
				return nil
			}
			select {
			case largeFrames <- struct{}{}:
				turn = true
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		defer func() {
			if turn {
				<-largeFrames
			}
		}()
		for {
			rec, err := s.Next()
			if err == nil {
				r.report.Records++
				if !yield(rec) {
					return false
				}
				continue
			}
			if !errors.Is(err, io.EOF) {
				r.damaged(o.Name, err)
			}
			break
		}
		c.next = s.NextSequence()
		r.report.Unread += s.Unread()
		r.report.Records += s.Unread()
	}
	c.broken = err != nil
	if err := drain(counted); err != nil {
		r.unreadable(o.Name, err)
		return true
	}
	r.report.Bytes += counted.n
	if s == nil {
		return true
	}
	footer, ok := s.Footer()
	if !ok {
		// What is missing in this segment shall not be said of the next one again.
		c.broken = true
		return true
	}
	c.hash = s.Hash() // of all its bytes: the footer was the last of them
	r.checkKey(o.Name, s.Whole(), footer)
	c.sealed = footer.Last
	c.interrupted = footer.Interrupted
	c.footer = footer
	r.checkCommit(o.Name, s.Whole(), n, c.next, footer)
	return true
}

// unlock lets a segment be read, if it is encrypted to one of the identities.
func (r *SessionReader) unlock(name string, s *SegmentReader) {
	types, err := s.Encrypted()
	if err != nil {
		r.damaged(name, err)
		return
	}
	if len(types) > len(r.report.Recipients) {
		r.report.Recipients = types
	}
	if err := s.Decrypt(r.ids...); err != nil && !errors.Is(err, ErrLocked) {
		r.fail(name, err)
	}
}

// checkHeader compares a header with its place.
func (r *SessionReader) checkHeader(name string, n Name, h Header) {
	c := &r.chain
	if want := h.Name(); want != n {
		r.problem(name, 0, "is not in its place: its header says %s", want)
	}
	if r.head == nil {
		r.head = &h
		r.report.Start, r.report.Gate = h.LogStart, h.Gate
	} else if !h.LogStart.Equal(r.head.LogStart) || h.Gate != r.head.Gate {
		r.problem(name, 0, "is of another log than the segments before it")
	}
	switch {
	case h.Number == 0 && (h.Previous != Hash{} || h.First != 0):
		r.problem(name, 0, "first segment names one before it")
	case c.broken || h.Number == 0:
	case h.Previous != c.hash:
		r.problem(name, 0, "does not follow the segment before it: wrong hash")
	case h.First != c.next:
		r.problem(name, 0, "begins with record %d where %d should be", h.First, c.next)
	}
}

// checkKey compares the key that signed a segment with those expected.
func (r *SessionReader) checkKey(name string, end int64, f Footer) {
	same := func(k ed25519.PublicKey) bool { return k.Equal(f.PublicKey) }
	if len(r.pinned) > 0 && !slices.ContainsFunc(r.pinned, same) {
		r.problem(name, end, "signed by a key that is not pinned: %s", Fingerprint(f.PublicKey))
	}
	if slices.ContainsFunc(r.keys, same) {
		return
	}
	if len(r.pinned) == 0 && len(r.keys) > 0 && !f.Interrupted {
		r.problem(name, end, "signed by another key than the segments before it: %s", Fingerprint(f.PublicKey))
	}
	if len(r.keys) < maxProblems {
		r.keys = append(r.keys, f.PublicKey)
		r.report.Keys = append(r.report.Keys, Fingerprint(f.PublicKey))
	}
}

func (r *SessionReader) damaged(name string, err error) {
	var d *DamageError
	if errors.As(err, &d) {
		what := d.What
		if d.Cause != nil {
			what += ": " + d.Cause.Error()
			r.fail(name, d.Cause)
			r.unread++
		}
		r.problem(name, d.Offset, "%s", what)
		return
	}
	r.problem(name, 0, "%v", err)
}

func (r *SessionReader) unreadable(name string, err error) {
	r.fail(name, err)
	if !errors.Is(err, fs.ErrNotExist) {
		r.unread++
	}
	r.problem(name, 0, "can't be read: %v", err)
	r.chain.broken = true
}

func (r *SessionReader) fail(name string, err error) {
	if r.err == nil {
		r.err = fmt.Errorf("read %s: %w", name, err)
	}
}

// problem notes one. Text from a log's own bytes is quoted or a number, so a problem is safe to print.
func (r *SessionReader) problem(name string, offset int64, format string, args ...any) {
	if len(r.report.Problems) >= maxProblems {
		r.report.More++
		return
	}
	r.report.Problems = append(r.report.Problems, Problem{Segment: name, Offset: offset, What: fmt.Sprintf(format, args...)})
}

// Report is the verdict, after Records came to its end.
func (r *SessionReader) Report() Report { return r.report }

// Err is the first error of the source, as against one of the log: the report then speaks of what could be had.
func (r *SessionReader) Err() error { return r.err }

// Verify reads a log for its report alone.
func (r *SessionReader) Verify(ctx context.Context) Report {
	for range r.Records(ctx) { //nolint:revive // reading is what checks
	}
	return r.report
}

type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// drain reads what is left of a segment, for its hash; no more than a segment may have.
func drain(c *countingReader) error {
	_, err := io.Copy(io.Discard, io.LimitReader(c, MaxSegmentBytes+1-min(c.n, MaxSegmentBytes+1)))
	return err
}
