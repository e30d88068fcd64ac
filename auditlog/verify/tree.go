package verify

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/tlog"
)

const (
	// treeParallel is how many objects of transparency logs are read at once, at least: there are thousands a day, and a bucket takes
	// its time for each.
	treeParallel = 32
	// maxAhead is the size in bytes up to which one is read before it is its turn, so that 32 need no room to speak of.
	maxAhead = 256 << 10
)

// maxProblems bounds what one transparency log is told to be wrong with.
const maxProblems = 100

// tree is a transparency log that is being read.
type tree struct {
	v      *Run
	prefix string
	report Tree
	tree   *tlog.Tree
	next   uint32 // number of the next checkpoint
	closed bool   // says the newest checkpoint
	broken bool   // leaves are missing: what follows can't be proven
	tiles  map[string]tile
	since  []*tlog.Checkpoint // those of this log
	keys   []ed25519.PublicKey
}

// tile is one that the leaves make.
type tile struct {
	hash  auditlog.Hash
	made  uint32 // number of the checkpoint that made it full
	there bool
}

// readTrees reads the transparency logs below a prefix.
func (v *Run) readTrees(ctx context.Context, prefix string) error {
	v.began = v.Options.Now()
	var cur *tree
	end := func() error {
		if cur == nil {
			return nil
		}
		return cur.end()
	}
	type object struct {
		name  string
		n     tlog.Name
		bad   error // of the name
		large bool  // not read yet
		b     []byte
		err   error
	}
	err := ordered(ctx, max(treeParallel, v.Options.Parallel), v.Source.List(ctx, prefix), func(o auditlog.Object) object {
		r := object{name: o.Name, large: o.Size > maxAhead}
		if r.n, r.bad = tlog.ParseName(o.Name); r.bad == nil && !r.large {
			r.b, r.err = read(ctx, v.Source, o.Name, tlog.MaxCheckpointBytes)
		}
		return r
	}, func(o object) error {
		if o.bad == nil && o.large {
			o.b, o.err = read(ctx, v.Source, o.name, tlog.MaxCheckpointBytes)
		}
		if o.err != nil {
			if err := v.notRead(ctx, o.err); err != nil {
				return err
			}
		}
		if o.bad != nil {
			return v.problem(o.name, "is not the name of an object of a transparency log")
		}
		if cur == nil || cur.prefix != o.n.Dir() {
			if err := end(); err != nil {
				return err
			}
			cur = v.newTree(o.n)
		}
		if o.err != nil {
			cur.notRead(o.name, o.n)
		} else if o.n.Kind == tlog.KindCheckpoint {
			cur.checkpoint(ctx, o.name, uint32(o.n.Number), o.b)
		} else {
			cur.tile(o.name, o.n, o.b)
		}
		return nil
	})
	if err == nil {
		err = end()
	}
	if err != nil {
		return err
	}
	for _, c := range v.Options.Since {
		// Those of gates that were not asked for were not looked at.
		if strings.HasPrefix(tlog.Dir(c.Gate, c.Log), prefix) && v.trees[c.Origin()] == nil {
			if err := v.problem(c.Origin(), "the transparency log of the kept checkpoint is not in the store"); err != nil {
				return err
			}
		}
	}
	return v.endTrees()
}

func (v *Run) newTree(n tlog.Name) *tree {
	t := &tree{v: v, prefix: n.Dir(), tree: &tlog.Tree{}, tiles: make(map[string]tile)}
	t.report = Tree{Origin: tlog.Origin(n.Gate, n.Log), Gate: n.Gate, Log: n.Log}
	for _, c := range v.Options.Since {
		if c.Origin() == t.report.Origin {
			t.since = append(t.since, c)
			if len(v.Options.Keys) > 0 && !slices.ContainsFunc(v.Options.Keys, func(k ed25519.PublicKey) bool { return k.Equal(c.Key) }) {
				t.wrong(t.prefix, "the kept checkpoint is signed by a key that is not pinned: %s", auditlog.Fingerprint(c.Key))
			}
		}
	}
	v.trees[t.report.Origin] = t
	t.reached()
	return t
}

func (t *tree) wrong(object, format string, args ...any) {
	if len(t.report.Problems) >= maxProblems {
		t.report.More++
		return
	}
	t.report.Problems = append(t.report.Problems, auditlog.Problem{Segment: object, What: fmt.Sprintf(format, args...)})
}

// inOrder takes the number of the next checkpoint, in the order of their names.
func (t *tree) inOrder(name string, number uint32) {
	t.report.Checkpoints++
	if number > t.next {
		t.wrong(name, "%s missing before it", count("checkpoint", int64(t.next), int64(number)-1))
	}
	t.next = number + 1
}

// notRead takes an object that is there, and can't be read.
func (t *tree) notRead(name string, n tlog.Name) {
	t.report.Unread = true
	if n.Kind == tlog.KindCheckpoint {
		t.inOrder(name, uint32(n.Number))
	} else if want, ok := t.tiles[name]; ok {
		want.there = true
		t.tiles[name] = want
	}
}

// checkpoint takes the next one.
func (t *tree) checkpoint(ctx context.Context, name string, number uint32, b []byte) {
	t.inOrder(name, number)
	c, err := tlog.ParseCheckpoint(b)
	switch {
	case err != nil:
		t.wrong(name, "%v", err)
		return
	case tlog.CheckpointName(tlog.Dir(c.Gate, c.Log), c.Number) != name:
		t.wrong(name, "is not in its place: it is number %d of %s", c.Number, c.Origin())
		return
	}
	if !t.checkKey(name, c.Key) {
		return // a stranger's leaves are no leaves
	}
	t.report.Newest, t.closed = c.Time, c.Closed
	if t.report.First.IsZero() {
		t.report.First = c.Time
	}
	if t.report.Note, err = c.Note(); err != nil {
		t.wrong(name, "%v", err)
	}
	switch {
	case t.broken:
	case c.Old < t.tree.Size:
		t.wrong(name, "begins with leaf %d where %d should be", c.Old, t.tree.Size)
		t.broken = true
	case c.Old > t.tree.Size:
		if !t.fill(ctx, c) {
			t.broken = true
			if t.report.Unread {
				break // told: without that nothing can be said
			}
			t.wrong(name, "%s before it are missing: what follows can't be proven", count("leaf", t.tree.Size, c.Old-1))
		}
	default:
		for _, e := range c.Entries {
			t.append(e, number)
		}
		if t.tree.Root() != c.Root {
			t.wrong(name, "the leaves do not make its root hash")
			t.broken = true
		}
	}
	for i, e := range c.Entries {
		t.leaf(name, c.Old+int64(i), e, c.Time)
	}
	if t.broken {
		t.report.Size = c.Size
	}
}

func count(what string, from, to int64) string {
	if from == to {
		return fmt.Sprintf("%s %d", what, from)
	}
	return fmt.Sprintf("%s %d to %d", what, from, to)
}

func (t *tree) checkKey(name string, key ed25519.PublicKey) bool {
	same := func(k ed25519.PublicKey) bool { return k.Equal(key) }
	if len(t.v.Options.Keys) > 0 && !slices.ContainsFunc(t.v.Options.Keys, same) {
		t.wrong(name, "signed by a key that is not pinned: %s", auditlog.Fingerprint(key))
		return false
	}
	if !slices.ContainsFunc(t.keys, same) && len(t.keys) < maxProblems {
		t.keys = append(t.keys, key)
		t.report.Keys = append(t.report.Keys, auditlog.Fingerprint(key))
	}
	return true
}

// append adds a leaf to the tree, and notes the tiles that it makes full.
func (t *tree) append(entry []byte, number uint32) {
	for _, o := range t.tree.Append(t.prefix, entry) {
		t.tiles[o.Name] = tile{hash: sha256.Sum256(o.Bytes), made: number}
	}
	t.reached()
}

// reached compares the tree with kept checkpoints of its size.
func (t *tree) reached() {
	for _, c := range t.since {
		if c.Size == t.tree.Size && c.Root != t.tree.Root() {
			t.wrong(t.prefix, "is not the log of the kept checkpoint: at size %d it has another root hash", c.Size)
		}
	}
}

// fill takes leaves that a missing checkpoint carried from the bundles, if they make the root hash of c.
func (t *tree) fill(ctx context.Context, c *tlog.Checkpoint) bool {
	probe := t.tree.Clone()
	var entries [][]byte
	for probe.Size < c.Old {
		name := tlog.EntriesName(t.prefix, probe.Size/tlog.EntriesTileSize)
		b, err := read(ctx, t.v.Source, name, tlog.MaxCheckpointBytes)
		if err != nil {
			return false
		}
		bundle, err := tlog.ParseBundle(b)
		if err != nil {
			return false
		}
		for _, e := range bundle[probe.Size%tlog.EntriesTileSize:] {
			if probe.Size == c.Old {
				break
			}
			probe.Append(t.prefix, e)
			entries = append(entries, e)
		}
	}
	for _, e := range c.Entries {
		probe.Append(t.prefix, e)
	}
	if probe.Root() != c.Root {
		return false
	}
	from := t.tree.Size
	for i, e := range entries {
		t.append(e, c.Number)
		t.leaf(t.prefix, from+int64(i), e, c.Time)
	}
	for _, e := range c.Entries {
		t.append(e, c.Number)
	}
	return true
}

// leaf notes what a leaf says.
func (t *tree) leaf(object string, index int64, entry []byte, at time.Time) {
	l, err := auditlog.ParseLeaf(entry)
	if err != nil {
		t.wrong(object, "leaf %d: %v", index, err)
		return
	}
	if !t.v.within(dayOf(l.Dir)) {
		return
	}
	if at.Sub(l.Sealed) > late {
		t.v.Summary.Late++
	}
	key, mark := short(l.Dir), leafMark{hash: shortBytes(entry)}
	if old, ok := t.v.leaves[key]; ok && old.hash != mark.hash {
		t.wrong(object, "leaf %d: two leaves that differ are of %s", index, l.Dir)
		return
	}
	t.v.leaves[key] = mark
}

// dayOf is the day in a log's prefix.
func dayOf(dir string) string {
	n, err := auditlog.ParseName(dir + "00000000.seg")
	if err != nil {
		return ""
	}
	return n.Day
}

// tile compares a tile or bundle with what the leaves make. They come after the checkpoints.
func (t *tree) tile(name string, n tlog.Name, b []byte) {
	want, ok := t.tiles[name]
	switch {
	case ok:
		want.there = true
		t.tiles[name] = want
		if sha256.Sum256(b) != want.hash {
			t.wrong(name, "is not the tile that the leaves make")
		}
	case t.broken:
	case n.Number < t.tree.Size/tlog.EntriesTileSize>>(8*n.Level):
		t.wrong(name, "is not a tile that the leaves make")
	default:
		t.v.Foreign(name) // ahead of the newest checkpoint: put after the checkpoints were listed, or that was taken away
	}
}

// end is when all of a log's objects were seen.
func (t *tree) end() error {
	if !t.broken {
		t.report.Size = t.tree.Size
		names := make([]string, 0, len(t.tiles))
		for name, tile := range t.tiles {
			// Those of the newest checkpoint may be on their way.
			if !tile.there && tile.made+1 < t.next {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			t.wrong(name, "is missing")
		}
	}
	for _, c := range t.since {
		switch {
		case t.report.Unread: // told: it may be in what could not be read
		case c.Size > t.report.Size:
			t.wrong(t.prefix, "ends with %d leaves, where the kept checkpoint has %d: its newest objects were taken away", t.report.Size, c.Size)
		case c.Number >= t.next:
			t.wrong(t.prefix, "ends before checkpoint %d, which was kept: its newest objects were taken away", c.Number)
		case t.broken:
			t.wrong(t.prefix, "can't be proven to go on from the kept checkpoint")
		}
	}
	t.tiles = nil
	return nil
}

// endTrees tells of all logs, and which have ended.
func (v *Run) endTrees() error {
	origins := make([]string, 0, len(v.trees))
	for o := range v.trees {
		origins = append(origins, o)
	}
	slices.Sort(origins)
	newest := make(map[string]*tree) // by gate
	for _, o := range origins {
		t := v.trees[o]
		if n := newest[t.report.Gate]; n == nil || t.report.Newest.After(n.report.Newest) {
			newest[t.report.Gate] = t
		}
	}
	for _, o := range origins {
		t := v.trees[o]
		t.report.Ended = newest[t.report.Gate] != t && newest[t.report.Gate].report.First.After(t.report.Newest)
		t.report.Age = v.age(t.report.Newest)
		if t.report.Newest.After(v.Summary.Newest) {
			v.Summary.Newest, v.Summary.Age = t.report.Newest, t.report.Age
		}
		if t.report.End = t.ends(); t.report.End == NotClosed {
			v.Summary.NotClosed++
		}
		v.Summary.Problems += len(t.report.Problems) + t.report.More
		v.Summary.Trees = append(v.Summary.Trees, t.report)
		if err := v.Options.Tree(t.report); err != nil {
			return err
		}
	}
	return nil
}

// age is that of a log's newest checkpoint, by this machine's clock when the checkpoints were looked for: however long it took to read
// them, later ones need not be there. It is negative for one of the future, by more than clocks may be apart.
func (v *Run) age(newest time.Time) time.Duration {
	if v.ahead(newest) {
		return v.Options.Now().Sub(newest)
	}
	return max(0, v.began.Sub(newest))
}

// ends says whether the end of the log may be missing.
func (t *tree) ends() End {
	switch {
	case t.closed:
		return Closed
	case !t.report.Newest.IsZero() && t.report.Age >= 0 && t.report.Age <= t.v.Options.Beat:
		return GoesOn
	case slices.ContainsFunc(t.since, func(c *tlog.Checkpoint) bool { return c.Number+1 == t.next }):
		return Kept
	}
	return NotClosed
}

// missing names the logs that have a leaf and are not in the store. Only their hashes are known, so the leaves are read again.
func (v *Run) missing(ctx context.Context) error {
	left := 0
	for _, l := range v.leaves {
		if !l.seen {
			left++
		}
	}
	if left == 0 {
		return nil
	}
	told := func(entry []byte) error {
		l, err := auditlog.ParseLeaf(entry)
		if err != nil {
			return nil // told before
		}
		mark, ok := v.leaves[short(l.Dir)]
		if !ok || mark.seen || mark.hash != shortBytes(entry) {
			return nil
		}
		mark.seen = true
		v.leaves[short(l.Dir)] = mark
		v.Summary.Missing++
		return v.problem(l.Dir, "is missing: %d segments, sealed %s, says the transparency log", l.Segments, l.Sealed.Format("2006-01-02T15:04:05Z"))
	}
	checkpoints := func(yield func(string, error) bool) {
		for o, err := range v.Source.List(ctx, tlog.Prefix) {
			if strings.Contains(o.Name, "/tile/") && !strings.Contains(o.Name, "/tile/entries/") {
				continue
			}
			if !yield(o.Name, err) {
				return
			}
		}
	}
	return ordered(ctx, v.Options.Parallel, iter.Seq2[string, error](checkpoints), func(name string) [][]byte {
		b, err := read(ctx, v.Source, name, tlog.MaxCheckpointBytes)
		if err != nil {
			return nil // told before, or gone since
		}
		if strings.Contains(name, "/tile/entries/") {
			entries, _ := tlog.ParseBundle(b)
			return entries
		}
		if c, err := tlog.ParseCheckpoint(b); err == nil {
			return c.Entries
		}
		return nil
	}, func(entries [][]byte) error {
		for _, e := range entries {
			if err := told(e); err != nil {
				return err
			}
		}
		return nil
	})
}

// errGone is of an object that was listed and is not there.
var errGone = errors.New("is not there any more")

func read(ctx context.Context, src auditlog.Source, name string, most int64) ([]byte, error) {
	f, err := src.Open(ctx, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read %s: %w: %w", name, errGone, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	defer f.Close()
	var b bytes.Buffer
	if _, err := io.Copy(&b, io.LimitReader(f, most+1)); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return b.Bytes(), nil
}
