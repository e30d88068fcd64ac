package verify_test

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
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

// forged gives the objects of a session that who has the key wrote elsewhere, later than the gate's transparency log began.
func forged(t *testing.T, g *gate) map[string][]byte {
	t.Helper()
	s := newStore()
	g.t, g.dir, g.store, g.key = t, t.TempDir(), s, 7
	g.open()
	g.session("forged", 9000)
	g.close()
	objects := make(map[string][]byte)
	for _, n := range s.names("/forged/") {
		objects[n] = s.m[n]
	}
	if len(objects) < 3 {
		t.Fatalf("%d segments", len(objects))
	}
	return objects
}

// Who has the key writes sessions that name another gate, as only names were compared, and none of the transparency logs: the key
// is known by them.
func TestAttackOtherGate(t *testing.T) {
	s := kept(t)
	maps.Copy(s.m, forged(t, &gate{name: "gate-9", noTree: true}))
	finds(t, "no transparency log, another gate", s, pinned, "names no transparency log, though its gate, or its key, had one then", 0)
	// The same of the session alone.
	for log, err := range auditlog.Logs(t.Context(), s, auditlog.SessionPrefix) {
		must(t, err)
		sum, err := verify.New(s, pinned).Log(t.Context(), log)
		must(t, err)
		if sum.Damaged() != (log.Name.ID == "forged") || sum.Outside > 0 {
			t.Errorf("%s alone: %+v", log.Name.ID, sum)
		}
	}
	// Another key is another gate's, which may keep none.
	s = kept(t)
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 8, name: "gate-9", noTree: true}
	g.open()
	g.session("other", 10)
	g.close()
	both := pinned
	both.Keys = append(slices.Clone(pinned.Keys), public(8))
	finds(t, "another key", s, both, "", 0)
}

// Who has the key writes sessions without an end: nothing asks for their leaf. They are told of when nothing more comes of them.
func TestAttackWithoutEnd(t *testing.T) {
	for _, name := range []string{"gate-1", "gate-9"} {
		s := kept(t)
		live := forged(t, &gate{name: name, noTree: true})
		delete(live, slices.Sorted(maps.Keys(live))[len(live)-1])
		maps.Copy(s.m, live)
		c := s.names("/checkpoint/")
		last, err := tlog.ParseCheckpoint(s.m[c[len(c)-1]])
		must(t, err)
		for _, went := range []time.Duration{time.Hour, 25 * time.Hour} {
			beat := *last
			beat.Number, beat.Old, beat.Entries, beat.Time = last.Number+1, last.Size, nil, last.Time.Add(went)
			s.m[tlog.CheckpointName(tlog.Dir(beat.Gate, beat.Log), beat.Number)] = signed(t, &beat)
			sum, wrong := check(t, s, pinned)
			silent := 0
			if went > 24*time.Hour {
				silent = 1
			}
			if len(wrong) > 0 || sum.Logs[auditlog.Live] != 1 || sum.Silent != silent || !sum.Unsealed() {
				t.Errorf("%s, went on for %s: %+v %q", name, went, sum, wrong)
			}
		}
	}
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
