package auditlog_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// countingStore counts the Puts under way, and holds or refuses them.
type countingStore struct {
	auditlog.Store

	mu     sync.Mutex // guards all below
	now    int
	most   int // at once
	calls  int
	broken bool
	hold   chan struct{} // Puts wait until it is closed; nil: they do not
}

func (s *countingStore) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	s.mu.Lock()
	s.now++
	s.calls++
	s.most = max(s.most, s.now)
	broken, hold := s.broken, s.hold
	s.mu.Unlock()
	if hold != nil {
		<-hold
	}
	s.mu.Lock()
	s.now--
	s.mu.Unlock()
	if broken {
		return errors.New("store is away")
	}
	return s.Store.Put(ctx, name, r, size)
}

func (s *countingStore) get() (now, most, calls int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now, s.most, s.calls
}

// endSessions leaves a sealed segment of each of n sessions to the uploader.
func endSessions(t *testing.T, l *auditlog.Log, prefix string, n int) {
	t.Helper()
	for i := range n {
		r := l.New(fmt.Sprintf("%s-%d", prefix, i))
		login(t, r)
		must(t, r.Begin())
		must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	}
}

// A store that takes its time for each object does not hold others up: several go there at once.
func TestStoreSlow(t *testing.T) {
	inner, _ := newStore(t)
	store := &countingStore{Store: inner, hold: make(chan struct{})}
	l := openGate(t, fastConfig(t.TempDir()), store)
	endSessions(t, l, "s", 20)
	waitFor(t, func() bool { now, _, _ := store.get(); return now == 16 })
	if s := l.Stats(); s.Waiting != 20 || s.Oldest <= 0 {
		t.Errorf("%+v", s)
	}
	close(store.hold)
	closeLog(t, l)
	if s := l.Stats(); s.Stored != 20 {
		t.Errorf("%+v", s)
	}
}

// While the store refuses all, one segment at a time is tried, however many wait; the first that it takes lets all others go.
func TestStoreAwayTriedByOne(t *testing.T) {
	inner, dir := newStore(t)
	store := &countingStore{Store: inner, broken: true, hold: make(chan struct{})}
	l := openGate(t, fastConfig(t.TempDir()), store)
	endSessions(t, l, "s", 100)
	waitFor(t, func() bool { now, _, _ := store.get(); return now == 16 })
	close(store.hold)
	waitFor(t, func() bool { return l.Stats().Failed >= 16 }) // all that were under way: from here on, one at a time
	store.mu.Lock()
	store.most = 0
	before := store.calls
	store.mu.Unlock()
	waitFor(t, func() bool { _, _, calls := store.get(); return calls >= before+3 })
	if _, most, _ := store.get(); most != 1 {
		t.Errorf("%d tries at once of a store that is away", most)
	}
	if l.StoreErr() == nil || l.Stats().Waiting != 100 {
		t.Errorf("%v, %+v", l.StoreErr(), l.Stats())
	}
	store.mu.Lock()
	store.broken = false
	store.mu.Unlock()
	waitFor(t, func() bool { return l.Stats().Waiting == 0 })
	if err := l.StoreErr(); err != nil {
		t.Error(err)
	}
	closeLog(t, l)
	if n := len(logs(t, source(t, dir), auditlog.SessionPrefix)); n != 100 {
		t.Errorf("%d logs", n)
	}
}

// A clock that is set forth, back, or far away changes what is written down, and nothing else: all is durable in time, cut, stored
// and read in its order, though records' times go back.
func TestClockJump(t *testing.T) {
	store, dir := newStore(t)
	cfg := fastConfig(t.TempDir())
	l := openGate(t, cfg, store)
	var mu sync.Mutex
	var shift time.Duration
	l.SetWall(func() time.Time { mu.Lock(); defer mu.Unlock(); return time.Now().Add(shift) })
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	jumps := []time.Duration{0, 48 * time.Hour, -72 * time.Hour, -50 * 365 * 24 * time.Hour, 100 * 365 * 24 * time.Hour, 0}
	for i, jump := range jumps {
		mu.Lock()
		shift = jump
		mu.Unlock()
		must(t, r.Record(1, numbered(i, 100)))
		stored := l.Stats().Stored
		waitFor(t, func() bool { return l.Stats().Stored > stored }) // by its age, as ever
	}
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	closeLog(t, l)
	src := source(t, dir)
	all := logs(t, src, auditlog.SessionPrefix)
	if len(all) != 1 {
		t.Fatalf("%d logs", len(all))
	}
	recs, rep := readAll(t, src, all[0])
	if rep.State != auditlog.Sealed {
		t.Errorf("%+v", rep)
	}
	back := false
	for i, rec := range recs {
		back = back || i > 0 && rec.Time.Before(recs[i-1].Time)
	}
	if !back || rep.Segments < len(jumps) {
		t.Errorf("%d segments, times go back: %v", rep.Segments, back)
	}
}
