package auditlog_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
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

// endConfig has segments cut by a session's end alone, however long that takes.
func endConfig(dir string) auditlog.Config {
	cfg := fastConfig(dir)
	cfg.SegmentAge = time.Hour
	return cfg
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
	l := openGate(t, endConfig(t.TempDir()), store)
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
	l := openGate(t, endConfig(t.TempDir()), store)
	endSessions(t, l, "s", 100)
	waitFor(t, func() bool { now, _, _ := store.get(); return now == 16 })
	close(store.hold)
	waitFor(t, func() bool { return l.Stats().Failed >= 16 }) // all that were under way: from here on, one at a time
	before := 0
	waitFor(t, func() bool { // the last of those is through
		store.mu.Lock()
		defer store.mu.Unlock()
		if store.now == 0 {
			store.most, before = 0, store.calls
		}
		return store.now == 0
	})
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

// However many sessions bring however much at once, the spool stays within its limit, but for how each of them ends.
func TestSpoolLimitMany(t *testing.T) {
	inner, dir := newStore(t)
	store := &brokenStore{Store: inner}
	store.broken.Store(true)
	cfg := fastConfig(t.TempDir())
	cfg.SpoolLimit, cfg.Codec, cfg.SegmentAge = 4<<20, "none", time.Hour
	l := openGate(t, cfg, store)
	const sessions, record = 30, 32 << 10
	var wg sync.WaitGroup
	for i := range sessions {
		wg.Add(1)
		go func() {
			defer wg.Done()
			r := l.New(fmt.Sprintf("s%d", i))
			err := r.Begin()
			began := err == nil
			for n := 0; err == nil; n++ {
				err = r.Record(1, numbered(n, record))
			}
			if !errors.Is(err, auditlog.ErrSpoolLimit) {
				t.Error(err)
			}
			if err := r.Close(&auditlog.End{Cause: "audit-lost"}); began && !errors.Is(err, auditlog.ErrSpoolLimit) {
				t.Errorf("close: %v", err)
			}
		}()
	}
	wg.Wait()
	if s := l.Stats(); s.SpoolBytes < cfg.SpoolLimit-300<<10 || s.SpoolBytes > cfg.SpoolLimit+sessions*(4<<10) {
		t.Errorf("%d bytes in the spool, of %d", s.SpoolBytes, cfg.SpoolLimit)
	}
	store.broken.Store(false)
	waitFor(t, func() bool { return l.Ready() == nil })
	closeLog(t, l)
	src := source(t, dir)
	for _, s := range logs(t, src, auditlog.SessionPrefix) {
		recs, rep := readAll(t, src, s)
		if end, ok := recs[len(recs)-1].Body.(*auditlog.End); rep.State != auditlog.Sealed || !ok || end.Cause != "audit-lost" {
			t.Errorf("%s: %s, %v", rep.ID, rep.State, rep.Problems)
		}
	}
	if s := l.Stats(); s.SpoolBytes != 0 {
		t.Errorf("%d bytes in the spool, by its own account", s.SpoolBytes)
	}
}

// twoGates are two gates with one store, and what they wrote.
func twoGates(t *testing.T, stores [2]auditlog.Store, names [2]string) {
	t.Helper()
	var wg sync.WaitGroup
	for i, store := range stores {
		cfg := fastConfig(t.TempDir())
		l, err := auditlog.Open(t.Context(), cfg, testKey, store, names[i], slog.New(slog.DiscardHandler))
		must(t, err)
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer closeLog(t, l)
			for n := range 20 {
				r := l.New(fmt.Sprintf("gate%d-%d", i, n))
				if err := errors.Join(r.Record(0, &auditlog.Connect{Source: "192.0.2.7:1"}), r.Begin(), r.Record(1, numbered(n, 5000)),
					r.Close(&auditlog.End{Cause: "client-left"})); err != nil {
					t.Error(err)
				}
				l.Refused(auditlog.Refused{Source: fmt.Sprintf("192.0.2.%d", i), Count: 1, Reason: "a test"})
			}
		}()
	}
	wg.Wait()
}

// Two gates with one store do not mix: each log is whole and says whose it is, also their own logs, and also if somebody gave
// both the same name.
func TestTwoGates(t *testing.T) {
	for _, names := range [][2]string{{"gate-0", "gate-1"}, {"gate-0", "gate-0"}} {
		store, dir := newStore(t)
		twoGates(t, [2]auditlog.Store{store, store}, names)
		src := source(t, dir)
		sessions, own := 0, map[string]uint64{}
		for _, s := range logs(t, src, "") {
			recs, rep := readAll(t, src, s)
			if rep.State != auditlog.Sealed {
				t.Errorf("%s: %s: %v", rep.ID, rep.State, rep.Problems)
			}
			if rep.Kind == "session" {
				sessions++
				if want := names[rep.ID[len("gate")]-'0']; rep.Gate != want {
					t.Errorf("%s: of gate %s, want %s", rep.ID, rep.Gate, want)
				}
				continue
			}
			for _, rec := range recs {
				if f, ok := rec.Body.(*auditlog.Refused); ok {
					own[rep.Gate+" "+f.Source] += f.Count
				}
			}
		}
		if sessions != 40 || own[names[0]+" 192.0.2.0"] != 20 || own[names[1]+" 192.0.2.1"] != 20 || len(own) != 2 {
			t.Errorf("%v: %d sessions, own logs %v", names, sessions, own)
		}
	}
}

// A spool that was copied, with the machine or from a backup, and brought to the store by two gates: what both have is there once;
// what the second would put in the place of another's is refused, stays in its spool, and shows.
func TestSpoolTwice(t *testing.T) {
	m, names := one(t, "none")
	whole, first := map[string][]byte{}, map[string][]byte{}
	for i, name := range names {
		file := fmt.Sprintf("sample-2-none.%08d.seg", i)
		whole[file] = m[name]
		if i < len(names)-1 {
			first[file] = m[name]
		}
	}
	store, dir := newStore(t)
	for range 2 {
		cfg := fastConfig(t.TempDir())
		writeSpool(t, cfg.Spool, whole)
		closeLog(t, openGate(t, cfg, store))
	}
	src := source(t, dir)
	all := logs(t, src, "")
	if _, rep := readAll(t, src, all[0]); len(all) != 1 || rep.State != auditlog.Sealed || rep.Segments != len(names) {
		t.Errorf("%d logs, %+v", len(all), rep)
	}
	cfg := endConfig(t.TempDir())
	writeSpool(t, cfg.Spool, first) // a copy of when the session was not over: its last segment would be another one
	l := openGate(t, cfg, store)
	waitFor(t, func() bool { return errors.Is(l.StoreErr(), auditlog.ErrExists) && l.Stats().Waiting == 1 })
	endSessions(t, l, "next", 3) // do not wait behind it
	waitFor(t, func() bool { return l.Stats().Waiting == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	must(t, l.Close(ctx))
	if _, rep := readAll(t, src, logs(t, src, auditlog.SessionPrefix)[0]); rep.State != auditlog.Sealed {
		t.Errorf("%+v", rep)
	}
	if _, err := os.Stat(filepath.Join(cfg.Spool, fmt.Sprintf("sample-2-none.%08d.seg", len(names)-1))); err != nil {
		t.Errorf("what was refused is not kept: %v", err)
	}
}

// What waits of the transparency log goes first; but while the store is away, all are tried in turn: it might refuse one alone.
func TestTakeOrder(t *testing.T) {
	for away, want := range map[bool]string{false: "[tlog-x tlog-x tlog-x]", true: "[s1 s2 tlog-x]"} {
		if got := fmt.Sprint(auditlog.TakeOrder(3, away, "s1", "s2", "tlog-x")); got != want {
			t.Errorf("away %v: %s, want %s", away, got, want)
		}
	}
	if got := fmt.Sprint(auditlog.TakeOrder(3, false, "s1", "s2")); got != "[s1 s2 s1]" {
		t.Error(got)
	}
}

// openHeldDisk is a disk on which opening one file takes its time.
type openHeldDisk struct {
	auditlog.OSDisk
	name    string
	came    chan struct{} // holds one; somebody waits
	release chan struct{}
}

func (d *openHeldDisk) OpenFile(name string, flag int, perm fs.FileMode) (auditlog.DiskFile, error) {
	if filepath.Base(name) == d.name {
		select {
		case d.came <- struct{}{}:
		default:
		}
		<-d.release
	}
	return d.OSDisk.OpenFile(name, flag, perm)
}

// A look at a spool with very many files holds up no session: they are sealed meanwhile, and go to the store after it.
func TestLookHoldsUpNothing(t *testing.T) {
	m, names := one(t, "none")
	d := &openHeldDisk{name: "sample-2-none.00000001.seg", came: make(chan struct{}, 1), release: make(chan struct{})}
	store := &shelf{objects: make(map[string][]byte)}
	cfg := endConfig(t.TempDir())
	cfg.SegmentBytes = 4 << 10
	l, err := auditlog.OpenOn(t.Context(), d, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	long := l.New("long")
	login(t, long)
	must(t, long.Begin())
	spool := map[string][]byte{}
	for i, name := range names {
		spool[fmt.Sprintf("sample-2-none.%08d.seg", i)] = m[name]
	}
	writeSpool(t, cfg.Spool, spool)
	l.LookAgain()
	select {
	case <-d.came:
	case <-time.After(time.Minute):
		t.Fatal("no look")
	}
	endSessions(t, l, "s", 20)
	for i := range 20 {
		must(t, long.Record(1, numbered(i, 3<<10)))
	}
	must(t, long.Close(&auditlog.End{Cause: "client-left"}))
	if s := l.Stats(); s.SpoolBytes == 0 {
		t.Errorf("%+v", s)
	}
	close(d.release)
	closeLog(t, l)
	src := store.source()
	all := logs(t, src, auditlog.SessionPrefix)
	if len(all) != 22 {
		t.Errorf("%d logs", len(all))
	}
	for _, s := range all {
		if _, rep := readAll(t, src, s); rep.State != auditlog.Sealed {
			t.Errorf("%s: %+v", s.Name.ID, rep)
		}
	}
	left, err := os.ReadDir(cfg.Spool)
	if err != nil || len(left) != 1 {
		t.Errorf("left in the spool: %v %v", left, err)
	}
}

// A close whose time is over is no error when all is on the disk.
func TestCloseLate(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 {
		l := openGate(t, endConfig(t.TempDir()), &shelf{objects: make(map[string][]byte)})
		endSessions(t, l, "s", 1)
		must(t, l.Close(ctx))
	}
}
