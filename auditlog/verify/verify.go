// Package verify proves what a store holds: every log, the transparency logs that name them, and all other objects. It needs
// nothing but the store's bytes and the keys that an auditor has pinned.
package verify

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/tlog"
)

const (
	// leafWait is how much later than a log's end a checkpoint may be made that does not have it yet.
	leafWait = time.Minute
	// fresh is how long after it came a log may be in no checkpoint of the store, whatever its end says: a store that was away
	// gets logs whose end is long ago, and their checkpoint a moment later.
	fresh = 2 * time.Minute
	// skew is how far the clocks of gate, store and auditor may be apart.
	skew = time.Minute
	// maxDays is the most days that are listed one by one.
	maxDays = 366
	// silence is how long after its newest segment a session without an end is worth a word, if its gate has gone on.
	silence = 24 * time.Hour
	// late is how long after a log's end its leaf is worth a word.
	late = time.Hour
)

// Options says what is verified, and against what.
type Options struct {
	// Keys are those that may have signed; none: those that the store names itself, which is no proof of who wrote it.
	Keys []ed25519.PublicKey
	// From and To are days (YYYY/MM/DD, UTC): logs that began before or after are neither read nor missed. Empty: no bound.
	From, To string
	// Since are checkpoints that an auditor has kept: the store's logs must go on from them.
	Since []*tlog.Checkpoint
	// Identities read what is encrypted: then its content is checked, too.
	Identities []age.Identity
	// Beat is how old the newest checkpoint of a transparency log may be that goes on. Default a minute.
	Beat time.Duration
	// Parallel is how many logs or objects are read at once. Default: the processors, at least 4.
	Parallel int
	// Log is called for each log, Tree for each transparency log, Problem for what is wrong elsewhere, one call at a time.
	Log     func(auditlog.Report) error
	Tree    func(Tree) error
	Problem func(auditlog.Problem) error
	// Progress, if not nil, is called now and then, from several goroutines.
	Progress func(objects int, bytes int64)
	// Now is the time, for what is fresh. Default time.Now.
	Now func() time.Time
}

// Tree is the verdict on one transparency log.
type Tree struct {
	Origin      string             `json:"origin"`
	Gate        string             `json:"gate"`
	Log         string             `json:"log"`
	Size        int64              `json:"size"` // leaves
	Checkpoints int                `json:"checkpoints"`
	First       time.Time          `json:"first"`
	Newest      time.Time          `json:"newest"` // time of the newest checkpoint, by the gate's clock
	Ended       bool               `json:"ended"`  // a newer log of the same gate is there, and goes on where this one ended
	End         End                `json:"end"`
	Age         time.Duration      `json:"-"` // of the newest checkpoint when its log was looked for; negative: it is of the future
	Keys        []string           `json:"keys"`
	Note        []byte             `json:"note,omitempty"`   // the newest checkpoint, to keep elsewhere
	Unread      bool               `json:"unread,omitempty"` // an object of it could not be read, which says nothing against it
	Problems    []auditlog.Problem `json:"problems,omitempty"`
	More        int                `json:"more_problems,omitempty"`
}

// End says whether the end of a transparency log may be missing.
type End string

// A log whose newest checkpoints were taken away is NotClosed, unless what is left ends with one that the gate had closed it with before.
const (
	GoesOn    End = "goes-on"    // the newest checkpoint is not older than the beat
	Closed    End = "closed"     // the newest checkpoint says that the gate stopped, and that all of its logs were in the store
	Kept      End = "kept"       // the newest checkpoint is one that the auditor has kept
	NotClosed End = "not-closed" // none of these: the gate was killed, or the newest checkpoints were taken away
)

// Summary is what was found in all.
type Summary struct {
	Logs      map[auditlog.State]int `json:"logs"`
	Waiting   int                    `json:"waiting"` // sealed logs that no checkpoint has yet
	Outside   int                    `json:"outside"` // sealed logs of gates without a transparency log
	Silent    int                    `json:"silent"`  // live sessions, nothing of which came for over a day while their gate went on
	Late      int                    `json:"late"`    // leaves that came more than an hour after the end of their log
	Missing   int                    `json:"missing"` // logs that a leaf names and the store does not have
	Trees     []Tree                 `json:"-"`
	NotClosed int                    `json:"not_closed"` // transparency logs whose End is NotClosed
	Locked    int                    `json:"locked"`     // logs that are encrypted, and to none of the identities: their content was not looked at
	Skipped   int64                  `json:"skipped"`    // entries of the index that were not held against their logs, as there were too many
	Foreign   int                    `json:"foreign"`    // objects that are not a gate's
	// Unread counts the objects and logs that could not be read, at least in part, though they are there: of these nothing is known,
	// and nothing is known against them. UnreadErr is the first of their errors.
	Unread    int   `json:"unread"`
	UnreadErr error `json:"-"`
	// Problems are all that are not a log's own; those of trees and missing logs are among them.
	Problems int       `json:"problems"`
	Unpinned bool      `json:"unpinned"`
	Newest   time.Time `json:"newest"` // of all checkpoints
	Objects  int       `json:"objects"`
	Bytes    int64     `json:"bytes"`

	Age time.Duration `json:"-"` // of the newest checkpoint, as in Tree
}

// Total is the number of logs.
func (s Summary) Total() int {
	n := 0
	for _, v := range s.Logs {
		n += v
	}
	return n
}

// Damaged says whether anything is wrong. What could not be read is not known to be.
func (s Summary) Damaged() bool { return s.Logs[auditlog.Damaged] > 0 || s.Problems > 0 }

// Unsealed says whether anything has no end yet, or is in no checkpoint yet.
func (s Summary) Unsealed() bool { return s.Logs[auditlog.Live] > 0 || s.Waiting > 0 }

// Verifier looks at the objects below one prefix of a store. It calls problem for what is wrong, and foreign for what is not a
// gate's. An error is of the source.
type Verifier func(ctx context.Context, v *Run, prefix string) error

// Verifiers are those of prefixes beside the logs' and the transparency logs'. What makes objects of a new kind adds its own.
var Verifiers = map[string]Verifier{
	auditlog.DuplicatePrefix: duplicates,
	auditlog.KeyPrefix:       keys,
	"check/":                 checks,
}

// Run is one verification.
type Run struct {
	Source  auditlog.Source
	Options Options
	Summary Summary

	began  time.Time        // when the reading of checkpoints did
	trees  map[string]*tree // by origin
	leaves leaves
	index  entries
	count  struct {
		sync.Mutex
		objects int
		bytes   int64
	}
}

// New prepares a verification of src.
func New(src auditlog.Source, o Options) *Run {
	if o.Parallel <= 0 {
		o.Parallel = max(4, runtime.GOMAXPROCS(0))
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Beat <= 0 {
		o.Beat = time.Minute
	}
	if o.Log == nil {
		o.Log = func(auditlog.Report) error { return nil }
	}
	if o.Tree == nil {
		o.Tree = func(Tree) error { return nil }
	}
	if o.Problem == nil {
		o.Problem = func(auditlog.Problem) error { return nil }
	}
	v := &Run{Options: o, trees: make(map[string]*tree), leaves: make(leaves), index: entries{of: make(map[[16]byte][]entry)}}
	v.Source = &counter{src, v}
	v.Summary.Logs = make(map[auditlog.State]int)
	return v
}

// Store verifies all of the store, or its logs of some days. The transparency logs are read first: what they name was in the
// store before, so a store that a gate writes to meanwhile gives no false alarm.
func (v *Run) Store(ctx context.Context) (Summary, error) {
	err := v.readTrees(ctx, tlog.Prefix)
	if err == nil {
		err = v.logs(ctx, v.stored(ctx, []string{auditlog.GatePrefix, auditlog.IndexPrefix}))
	}
	if err == nil { // with all of the index before them
		err = v.logs(ctx, v.stored(ctx, v.sessionPrefixes()))
	}
	if err == nil {
		err = v.missing(ctx)
	}
	if err == nil && v.whole() {
		err = v.others(ctx)
	}
	return v.done(ctx, err)
}

// Trees verifies the transparency logs alone.
func (v *Run) Trees(ctx context.Context) (Summary, error) {
	return v.done(ctx, v.readTrees(ctx, tlog.Prefix))
}

// Log verifies one log, with the transparency logs of its gate.
func (v *Run) Log(ctx context.Context, stored auditlog.Stored) (Summary, error) {
	err := v.readTrees(ctx, v.treesOf(ctx, stored))
	if err == nil {
		err = v.logs(ctx, func(yield func(auditlog.Stored, error) bool) { yield(stored, nil) })
	}
	return v.done(ctx, err)
}

// treesOf is the prefix of the transparency logs that a log has to be compared with: those of the gate that its last segment
// names. If it is sealed and names no transparency log of that gate, or can't be read, it is the prefix of all.
func (v *Run) treesOf(ctx context.Context, stored auditlog.Stored) string {
	if len(stored.Segments) == 0 {
		return tlog.Prefix
	}
	f, err := v.Source.Open(ctx, stored.Segments[len(stored.Segments)-1].Name)
	if err != nil {
		return tlog.Prefix
	}
	defer f.Close()
	s, err := auditlog.NewSegmentReader(f)
	if err != nil {
		return tlog.Prefix
	}
	gate := s.Header().Gate
	for err == nil {
		_, err = s.Next()
	}
	footer, ok := s.Footer()
	if of, _, err := tlog.ParseOrigin(footer.Tree); !ok || footer.Last && (err != nil || of != gate) || !auditlog.ValidID(gate) {
		return tlog.Prefix
	}
	return tlog.Prefix + gate + "/"
}

func (v *Run) done(ctx context.Context, err error) (Summary, error) {
	if err == nil {
		err = context.Cause(ctx)
	}
	v.Summary.Objects, v.Summary.Bytes = v.count.objects, v.count.bytes
	v.Summary.Unpinned, v.Summary.Skipped = len(v.Options.Keys) == 0, v.index.skipped.Load()
	return v.Summary, err
}

// whole says that no log is left out.
func (v *Run) whole() bool { return v.Options.From == "" && v.Options.To == "" }

// within says whether a log that began on this day is looked at.
func (v *Run) within(day string) bool {
	return (v.Options.From == "" || day >= v.Options.From) && (v.Options.To == "" || day <= v.Options.To)
}

// stored yields the logs to look at below some prefixes.
func (v *Run) stored(ctx context.Context, prefixes []string) iter.Seq2[auditlog.Stored, error] {
	return func(yield func(auditlog.Stored, error) bool) {
		for _, p := range prefixes {
			for log, err := range auditlog.Logs(ctx, v.Source, p) {
				if err == nil && len(log.Segments) > 0 && !v.within(log.Name.Day) {
					continue
				}
				if !yield(log, err) || err != nil {
					return
				}
			}
		}
	}
}

// sessionPrefixes spares the listing of days that are not asked for.
func (v *Run) sessionPrefixes() []string {
	const form = "2006/01/02"
	from, err1 := time.Parse(form, v.Options.From)
	to, err2 := time.Parse(form, v.Options.To)
	if err1 != nil || err2 != nil || to.Sub(from) > maxDays*24*time.Hour {
		return []string{auditlog.SessionPrefix}
	}
	var prefixes []string
	for d := from; !d.After(to); d = d.AddDate(0, 0, 1) {
		prefixes = append(prefixes, auditlog.SessionPrefix+d.Format(form)+"/")
	}
	return prefixes
}

// checked is a log that was read.
type checked struct {
	report auditlog.Report
	dir    string
	newest time.Time // when the store got its last segment, by the store
	leaf   []byte
	origin string
	end    time.Time // by its newest footer
	says   []entry   // if it is an index
	told   []entry   // if it is a session's log: those of it that do not fit
	unread error     // of the source
	err    error
}

func (v *Run) logs(ctx context.Context, all iter.Seq2[auditlog.Stored, error]) error {
	return ordered(ctx, v.Options.Parallel, all, func(log auditlog.Stored) checked {
		r := auditlog.NewSessionReader(v.Source, log, v.Options.Keys...)
		r.Decrypt(v.Options.Identities...)
		c := checked{dir: log.Name.Dir()}
		v.read(ctx, r, log, &c)
		if len(log.Segments) > 0 {
			c.newest = log.Segments[len(log.Segments)-1].Modified
		}
		if f, ok := r.Newest(); ok {
			c.end = f.Time
		}
		if leaf, origin, ok := r.Leaf(); ok {
			c.origin = origin
			c.leaf, c.err = leaf.Encode()
		}
		if err := r.Err(); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, auditlog.ErrLocked) {
			c.unread = err
		}
		return c
	}, func(c checked) error {
		if c.err != nil {
			return c.err
		}
		if c.unread != nil {
			if err := v.notRead(ctx, c.unread); err != nil {
				return err
			}
		}
		v.compare(&c)
		v.Summary.Logs[c.report.State]++
		if c.report.Unread > 0 {
			v.Summary.Locked++
		}
		if err := v.compareIndex(&c); err != nil {
			return err
		}
		return v.Options.Log(c.report)
	})
}

// compare compares a log with its leaf.
func (v *Run) compare(c *checked) {
	damaged := func(format string, args ...any) {
		c.report.Problems = append(c.report.Problems, auditlog.Problem{Segment: c.dir, What: fmt.Sprintf(format, args...)})
		c.report.State = auditlog.Damaged
	}
	leaf, there := v.leaves[short(c.dir)]
	if there {
		leaf.seen = true
		v.leaves[short(c.dir)] = leaf
	}
	switch {
	case there && c.leaf == nil && c.report.State == auditlog.Live:
		damaged("the transparency log says that it is sealed: its end is missing")
	case c.report.State == auditlog.Live:
		if v.silent(c) {
			v.Summary.Silent++
		}
	case c.report.State != auditlog.Sealed && c.report.State != auditlog.Interrupted:
	case there && leaf.hash != shortBytes(c.leaf):
		damaged("is not the log that the transparency log names")
	case there:
	case c.origin == "" && v.hadTree(c):
		damaged("names no transparency log, though its gate, or its key, had one then")
	case c.origin == "":
		v.Summary.Outside++
	case v.waits(c):
		v.Summary.Waiting++
	case v.trees[c.origin] != nil && v.trees[c.origin].report.Unread: // its leaf may be in what could not be read
	case v.trees[c.origin] == nil:
		damaged("its transparency log %q is not in the store", c.origin)
	case v.ahead(c.end):
		damaged("its end, %s, lies in the future by this machine's clock", c.end.Format(time.RFC3339))
	default:
		damaged("is not in its transparency log, which went on after its end")
	}
}

// hadTree says whether a log's gate kept a transparency log when the log ended: who has the key could leave that out.
func (v *Run) hadTree(c *checked) bool {
	for _, t := range v.trees {
		if t.wrote(c) && t.report.Checkpoints > 0 && t.report.First.Before(c.end) {
			return true
		}
	}
	return false
}

// silent says whether nothing of a live session has come for long, though its gate went on: an end would need a leaf.
func (v *Run) silent(c *checked) bool {
	if c.report.Kind != auditlog.SessionLog.String() {
		return false // the gate's own are written when there is something to say
	}
	for _, t := range v.trees {
		if t.wrote(c) && t.report.Newest.After(c.end.Add(silence)) {
			return true
		}
	}
	return false
}

// wrote says whether a log is of the gate of the transparency log, by its name or by a key: a name alone could be anyone's.
func (t *tree) wrote(c *checked) bool {
	return t.report.Gate == c.report.Gate ||
		slices.ContainsFunc(c.report.Keys, func(k string) bool { return slices.Contains(t.report.Keys, k) })
}

// waits says whether a log without a leaf may be one that is still to get it. Whoever keeps the store says when a log came, and
// who has the key says when it ended: neither word alone may excuse a log for ever.
func (v *Run) waits(c *checked) bool {
	came := v.recent(c.newest)
	t := v.trees[c.origin]
	if t == nil { // its first checkpoint may be on its way
		return came && v.recent(c.end)
	}
	return came || !v.ahead(c.end) && !t.report.Newest.After(c.end.Add(leafWait))
}

// recent says whether a time is of the last moments before the checkpoints were read, or later, and not of the future: what came
// since can't be in these checkpoints, however long the verification takes.
func (v *Run) recent(at time.Time) bool { return !v.ahead(at) && v.began.Sub(at) < fresh }

// ahead says whether a time lies in the future, by more than clocks may be apart.
func (v *Run) ahead(at time.Time) bool { return at.After(v.Options.Now().Add(skew)) }

// maxUnread is how many objects are tried before the source counts as away.
const maxUnread = 10_000

// notRead notes that an object can't be read. The rest is looked at all the same: one such object must not hide what is wrong with
// others.
func (v *Run) notRead(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if v.Summary.Unread++; v.Summary.UnreadErr == nil {
		v.Summary.UnreadErr = err
	}
	if v.Summary.Unread == maxUnread {
		return fmt.Errorf("%d objects can't be read, the first: %w", maxUnread, v.Summary.UnreadErr)
	}
	return nil
}

// problem tells of one that is no log's.
func (v *Run) problem(object string, format string, args ...any) error {
	v.Summary.Problems++
	return v.Options.Problem(auditlog.Problem{Segment: object, What: fmt.Sprintf(format, args...)})
}

// others looks at what is neither log nor transparency log.
func (v *Run) others(ctx context.Context) error {
	known := []string{auditlog.SessionPrefix, auditlog.GatePrefix, auditlog.IndexPrefix, tlog.Prefix}
	for prefix := range Verifiers {
		known = append(known, prefix)
	}
	slices.Sort(known)
	for _, prefix := range known[:] {
		if f := Verifiers[prefix]; f != nil {
			if err := f(ctx, v, prefix); err != nil {
				return err
			}
		}
	}
	for o, err := range v.Source.List(ctx, "") {
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(known, func(p string) bool { return strings.HasPrefix(o.Name, p) }) {
			v.Foreign(o.Name)
		}
	}
	return nil
}

// Foreign counts an object that is not a gate's. It proves nothing, and says nothing against the rest.
func (v *Run) Foreign(string) { v.Summary.Foreign++ }

// Wrong tells of an object that is not as it should be.
func (v *Run) Wrong(object, format string, args ...any) error {
	return v.problem(object, format, args...)
}

// leaves are what the transparency logs name, by the log's prefix; hashes cut to 16 bytes, as there may be millions.
type leaves map[[16]byte]leafMark

type leafMark struct {
	hash [16]byte
	seen bool
}

func short(s string) [16]byte { return shortBytes([]byte(s)) }

func shortBytes(b []byte) [16]byte {
	sum := sha256.Sum256(b)
	return [16]byte(sum[:16])
}

// ordered works on what comes in, n at a time, and gives the results out in the same order.
func ordered[T, R any](ctx context.Context, n int, in iter.Seq2[T, error], work func(T) R, out func(R) error) error {
	ctx, cancel := context.WithCancel(ctx)
	results := make(chan chan R, n)
	var listErr error
	var all sync.WaitGroup
	all.Add(1)
	go func() {
		defer all.Done()
		defer close(results)
		for item, err := range in {
			if err != nil {
				listErr = err
				return
			}
			r := make(chan R, 1)
			select {
			case results <- r:
			case <-ctx.Done():
				return
			}
			all.Add(1)
			go func() { defer all.Done(); r <- work(item) }()
		}
	}()
	defer all.Wait()
	defer cancel()
	for r := range results {
		if err := out(<-r); err != nil {
			return err
		}
	}
	return errors.Join(listErr, context.Cause(ctx))
}
