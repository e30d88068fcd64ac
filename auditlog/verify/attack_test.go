package verify_test

import (
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog/tlog"
	"github.com/sallyport/sallyport/auditlog/verify"
)

// at is the options of a verification at this time.
func at(now time.Time) (o verify.Options) {
	o = pinned
	o.Now = func() time.Time { return now }
	return o
}

// finds verifies a store, and wants this among what is wrong; "": nothing wrong, and so many logs on their way.
func finds(t *testing.T, what string, s *store, o verify.Options, want string, waiting int) {
	t.Helper()
	sum, wrong := check(t, s, o)
	if all := strings.Join(wrong, "\n"); !strings.Contains(all, want) || (want == "") != (all == "") || sum.Waiting != waiting {
		t.Errorf("%s: want %q and %d on their way: %+v %q", what, want, waiting, sum, wrong)
	}
}

// The store's keeper has no key. He takes the transparency log away, and lets the rest be of any time he likes.
func TestAttackTimesOfObjects(t *testing.T) {
	s := kept(t)
	for _, n := range append(s.names("tlog/"), s.names("/s2/")...) {
		delete(s.m, n)
	}
	const gone = "is not in the store"
	now := time.Now()
	for _, came := range []time.Time{now.AddDate(70, 0, 0), now.Add(time.Hour), now.Add(-time.Hour)} {
		s.came = came
		finds(t, "came "+came.String(), s, at(now), gone, 0)
	}
	// A log that has only just ended may be one whose first checkpoint is on its way.
	s.came = now
	finds(t, "just come", s, at(now), "", 3)
	// Touched again later, it may not.
	s.came = now.Add(time.Hour)
	finds(t, "touched", s, at(now.Add(time.Hour)), gone, 0)

	// With the transparency log in the store, a log that it does not have is excused for its first moments alone.
	s = withoutLeaf(t, time.Hour)
	const none = "is not in its transparency log, which went on after its end"
	s.came = now.Add(time.Hour)
	finds(t, "just come", s, at(now.Add(time.Hour)), "", 1)
	finds(t, "come a while ago", s, at(now.Add(2*time.Hour)), none, 0)
	s.came = now.AddDate(70, 0, 0)
	finds(t, "comes in the future", s, at(now.Add(time.Hour)), none, 0)
}

// A store that was away gets logs whose end is long ago, and beats before their leaves. A verification that takes an hour, and read
// the checkpoints at its start, does not hold them against its own end.
func TestLongVerify(t *testing.T) {
	s := withoutLeaf(t, 30*time.Minute)
	start := time.Now().Add(time.Hour)
	for _, came := range []time.Duration{-time.Minute, 0, time.Minute, 59 * time.Minute} {
		s.came = start.Add(came)
		o, times := pinned, 0
		o.Now = func() time.Time {
			if times++; times == 1 {
				return start
			}
			return start.Add(time.Hour)
		}
		finds(t, "came "+came.String()+" after the start", s, o, "", 1)
	}
	s.came = start.Add(-3 * time.Minute)
	finds(t, "came before", s, at(start), "which went on after its end", 0)
}

// Who has the key writes a session that ended in the future: no checkpoint is later than that.
func TestAttackEndInTheFuture(t *testing.T) {
	s := withoutLeaf(t, 0)
	now := time.Now()
	finds(t, "just ended", s, at(now), "", 1)
	finds(t, "clocks apart", s, at(now.Add(-30*time.Second)), "", 1)
	finds(t, "ends in the future", s, at(now.AddDate(-70, 0, 0)), "lies in the future", 0)
}

// withoutLeaf is a store with a session whose leaf no checkpoint has; the newest is made this long after the session.
func withoutLeaf(t *testing.T, later time.Duration) *store {
	t.Helper()
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
	g.open()
	g.session("s1", 10)
	g.close()
	c := s.names("/checkpoint/")
	was, err := tlog.ParseCheckpoint(s.m[c[len(c)-1]])
	must(t, err)
	none := *was
	none.Time, none.Entries, none.Size, none.Root = was.Time.Add(later), nil, 0, (&tlog.Tree{}).Root()
	s.m[c[len(c)-1]] = signed(t, &none)
	return s
}
