package verify_test

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/tlog"
	"github.com/sallyport/sallyport/auditlog/verify"
)

// ends verifies a store an hour later, wants nothing wrong, and the transparency logs to end so, in the order of their names.
func ends(t *testing.T, what string, s *store, o verify.Options, want ...verify.End) {
	t.Helper()
	later := time.Now().Add(time.Hour)
	o.Now = func() time.Time { return later }
	sum, wrong := check(t, s, o)
	var got []verify.End
	open := 0
	for _, tr := range sum.Trees {
		got = append(got, tr.End)
		if tr.End == verify.NotClosed {
			open++
		}
	}
	if len(wrong) > 0 || !slices.Equal(got, want) || sum.NotClosed != open {
		t.Errorf("%s: %v, %d open, want %v: %q", what, got, sum.NotClosed, want, wrong)
	}
}

// twoRuns is a store of a gate that was stopped and started again, with what was in it when it had stopped first.
func twoRuns(t *testing.T) (first, second *store) {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
	g.open()
	g.begun()
	g.session("s1", 10)
	g.close()
	first = s.clone()
	g.open()
	g.session("s2", 10)
	g.close()
	return first, s
}

// without is a store without its newest checkpoints, n of them, and the sessions whose leaves these have.
func without(t *testing.T, s *store, n int) *store {
	t.Helper()
	s = s.clone()
	c := s.names("/checkpoint/")
	for _, name := range c[len(c)-n:] {
		cp, err := tlog.ParseCheckpoint(s.m[name])
		must(t, err)
		for _, e := range cp.Entries {
			leaf, err := auditlog.ParseLeaf(e)
			must(t, err)
			maps.DeleteFunc(s.m, func(name string, _ []byte) bool { return strings.HasPrefix(name, leaf.Dir) })
		}
		delete(s.m, name)
	}
	return s
}

// The end of a transparency log whose gate has stopped can't be taken away unseen: what is left does not say that it was closed. That
// of a gate which was started again can, back to where it had stopped before.
func TestTailOfClosedLog(t *testing.T) {
	first, second := twoRuns(t)
	ends(t, "one run", first, pinned, verify.Closed)
	ends(t, "two runs", second, pinned, verify.Closed)
	n := len(first.names("/checkpoint/"))
	for cut := 1; cut < n; cut++ {
		ends(t, "the end of one run gone", without(t, first, cut), pinned, verify.NotClosed)
	}
	for cut := 1; cut < len(second.names("/checkpoint/")); cut++ {
		want := verify.NotClosed
		if len(second.names("/checkpoint/"))-cut == n {
			want = verify.Closed // as the store was between the runs: no store can tell that from a gate that was not started again
		}
		ends(t, "the end of two runs gone", without(t, second, cut), pinned, want)
	}
	// A kept checkpoint tells of it, and excuses a log that ends there: the auditor knows then that this was its end.
	o := pinned
	o.Since = newest(t, second)
	if _, wrong := check(t, without(t, second, 1), o); !strings.Contains(strings.Join(wrong, "\n"), "newest objects were taken away") {
		t.Errorf("since: %q", wrong)
	}
	cut := without(t, second, 1)
	o.Since = newest(t, cut)
	ends(t, "kept", cut, o, verify.Kept)
	ends(t, "kept and gone on", second, o, verify.Closed)

	// The checkpoints of now are of a gate that goes on.
	o = pinned
	o.Now = func() time.Time { return newest(t, cut)[0].Time.Add(time.Second) }
	sum, _ := check(t, cut, o)
	if sum.Trees[0].End != verify.GoesOn || sum.NotClosed != 0 {
		t.Errorf("just now: %+v", sum.Trees)
	}
}

// The mark is signed: who has no key can neither put it nor take it away.
func TestForgedClose(t *testing.T) {
	_, s := twoRuns(t)
	names := s.names("/checkpoint/")
	last := names[len(names)-1]
	cut := without(t, s, 1)
	end, err := tlog.ParseCheckpoint(cut.m[names[len(names)-2]])
	must(t, err)
	wrong := func(what string, change func(s *store), want string) {
		t.Helper()
		s := cut.clone()
		change(s)
		if _, wrong := check(t, s, pinned); !strings.Contains(strings.Join(wrong, "\n"), want) {
			t.Errorf("%s: want %q in %q", what, want, wrong)
		}
	}
	next := *end
	next.Number, next.Old, next.Entries, next.Closed = end.Number+1, end.Size, nil, true
	wrong("signed by another key", func(s *store) {
		must(t, next.Sign(key(8)))
		b, err := next.Encode()
		must(t, err)
		s.m[last] = b
	}, "signed by a key that is not pinned")
	wrong("written into the newest", func(s *store) {
		name := names[len(names)-2]
		s.m[name] = []byte(strings.Replace(string(s.m[name]), "=\n\n— ", "=\nclosed\n\n— ", 1))
	}, "wrong signature")
	first, _ := twoRuns(t) // of another log
	other := first.names("/checkpoint/")
	wrong("that of another log", func(s *store) { s.m[last] = first.m[other[len(other)-1]] }, "is not in its place")
	whole := s.clone()
	whole.m[last] = []byte(strings.Replace(string(s.m[last]), "\nclosed\n", "\n", 1))
	if _, wrong := check(t, whole, pinned); !strings.Contains(strings.Join(wrong, "\n"), "wrong signature") {
		t.Errorf("taken away: %q", wrong)
	}
}

// A gate that is killed closes nothing, nor does one that stops while logs are in its spool. Both go on, and then it is closed.
func TestNotClosed(t *testing.T) {
	t.Run("killed", func(t *testing.T) {
		s := newStore()
		g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
		g.open()
		g.begun()
		dir, then := t.TempDir(), s.clone()
		copyDir(t, g.dir, dir)
		g.close()
		ends(t, "killed", then, pinned, verify.NotClosed)
		g.dir, g.store = dir, then
		g.open()
		g.close()
		ends(t, "started again", then, pinned, verify.Closed)
	})
	t.Run("stopped with logs in the spool", func(t *testing.T) {
		s := newStore()
		g := &gate{t: t, dir: t.TempDir(), store: &partStore{store: s, refuse: "sessions/"}, key: 7}
		g.open()
		g.begun()
		g.session("s1", 10)
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		must(t, g.Log.Close(ctx))
		ends(t, "stopped", s, pinned, verify.NotClosed)
		g.store = s
		g.open()
		g.close()
		ends(t, "started again", s, pinned, verify.Closed)
	})
	t.Run("the store was away", func(t *testing.T) { // its last word comes with the next start
		s := newStore()
		away := &awayStore{store: s}
		g := &gate{t: t, dir: t.TempDir(), store: away, key: 7}
		g.open()
		g.begun()
		away.set(true)
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		must(t, g.Log.Close(ctx))
		ends(t, "stopped", s, pinned, verify.NotClosed)
		away.set(false)
		g.open()
		g.close()
		ends(t, "started again", s, pinned, verify.Closed)
		closed := 0
		for _, name := range s.names("/checkpoint/") {
			c, err := tlog.ParseCheckpoint(s.m[name])
			must(t, err)
			if c.Closed {
				closed++
			}
		}
		if closed != 2 {
			t.Errorf("closed %d times", closed)
		}
	})
}

// partStore refuses some objects.
type partStore struct {
	*store
	refuse string
}

func (s *partStore) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if strings.HasPrefix(name, s.refuse) {
		return errors.New("refused")
	}
	return s.store.Put(ctx, name, r, size)
}

// However long it takes to read a store, a gate that spoke just before that began goes on, and so does one that spoke meanwhile.
func TestLongReading(t *testing.T) {
	first, _ := twoRuns(t)
	cut := without(t, first, 1)
	c := cut.names("/checkpoint/")
	last, err := tlog.ParseCheckpoint(cut.m[c[len(c)-1]])
	must(t, err)
	for _, at := range []struct {
		began time.Duration // after the newest checkpoint
		want  verify.End
	}{{30 * time.Second, verify.GoesOn}, {-30 * time.Minute, verify.GoesOn}, {61 * time.Second, verify.NotClosed}, {-2 * time.Hour, verify.NotClosed}} {
		began, times := last.Time.Add(at.began), 0
		o := pinned
		o.Now = func() time.Time {
			if times++; times == 1 {
				return began
			}
			return began.Add(time.Hour)
		}
		sum, _ := check(t, cut, o)
		if sum.Trees[0].End != at.want || (at.began < -time.Hour) != (sum.Age < 0) {
			t.Errorf("began %v after it: %s, age %v", at.began, sum.Trees[0].End, sum.Age)
		}
	}
}
