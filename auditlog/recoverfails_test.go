package auditlog_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/tlog"
)

// unreadableDisk has a file whose reads fail.
type unreadableDisk struct {
	auditlog.OSDisk
	name string // of the file; "": all can be read
}

func (d unreadableDisk) OpenFile(name string, flag int, perm fs.FileMode) (auditlog.DiskFile, error) {
	f, err := d.OSDisk.OpenFile(name, flag, perm)
	if err == nil && filepath.Base(name) == d.name {
		f = unreadableFile{f}
	}
	return f, err
}

type unreadableFile struct{ auditlog.DiskFile }

func (f unreadableFile) Read([]byte) (int, error) { return 0, syscall.EIO }

// interruptedSpool is what a killed gate left: the log broken has two sealed segments, or three files with the one that was open,
// the log next one that was open.
func interruptedSpool(t *testing.T, open bool) map[string][]byte {
	t.Helper()
	m, names := one(t, "none")
	file := func(id string, i int, suffix string) string { return fmt.Sprintf("%s.%08d%s", id, i, suffix) }
	spool := map[string][]byte{file("sample-2-none", 0, ".seg"): m[names[0]], file("sample-2-none", 1, ".seg"): m[names[1]]}
	if open {
		spool[file("sample-2-none", 2, ".part")] = headerOf(m[names[2]])
	}
	m, names = one(t, "zstd")
	spool[file("sample-0-zstd", 0, ".part")] = headerOf(m[names[0]])
	return spool
}

// mendedDisk has a file whose reads fail until it is mended.
type mendedDisk struct {
	unreadableDisk
	mended *atomic.Bool
}

func (d mendedDisk) OpenFile(name string, flag int, perm fs.FileMode) (auditlog.DiskFile, error) {
	if d.mended.Load() {
		return d.OSDisk.OpenFile(name, flag, perm)
	}
	return d.unreadableDisk.OpenFile(name, flag, perm)
}

// slowShelf is a store on which the objects of a name wait.
type slowShelf struct {
	shelf
	hold map[string]chan struct{} // by the end of the name
}

func (s *slowShelf) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	for end, c := range s.hold {
		if strings.HasSuffix(name, end) {
			<-c
		}
	}
	return s.shelf.Put(ctx, name, r, size)
}

// A sealed segment that can't be read for a while is stored once it can, by the same gate, or by the next one, which takes the log for
// what it is: its last segment has not gone ahead.
func TestUnreadForAWhile(t *testing.T) {
	for _, restart := range []bool{false, true} {
		hold := make(chan struct{})
		store := &slowShelf{shelf{objects: make(map[string][]byte)}, map[string]chan struct{}{"sample-2-none/00000001.seg": hold}}
		cfg := endConfig(t.TempDir())
		cfg.Tree = filepath.Join(t.TempDir(), "tree")
		if restart {
			cfg.SetMendEvery(time.Hour)
		} else {
			cfg.SetMendEvery(time.Millisecond)
		}
		m, names := one(t, "none")
		spool := make(map[string][]byte)
		for i, name := range names {
			spool[fmt.Sprintf("sample-2-none.%08d.seg", i)] = m[name]
		}
		writeSpool(t, cfg.Spool, spool)
		var mended atomic.Bool
		l, err := auditlog.OpenOn(t.Context(), mendedDisk{unreadableDisk{name: "sample-2-none.00000000.seg"}, &mended}, cfg, testKey, store, "gate-1",
			slog.New(slog.DiscardHandler))
		must(t, err)
		gone := func(i int) func() bool {
			return func() bool {
				_, err := os.Stat(filepath.Join(cfg.Spool, fmt.Sprintf("sample-2-none.%08d.seg", i)))
				return err != nil
			}
		}
		if len(names) < 3 {
			t.Fatalf("%d segments", len(names))
		}
		endSessions(t, l, "after", 1) // others go on
		if !restart {
			// What can be read now goes behind what is on its way, and is not forgotten.
			mended.Store(true)
			for range 3 { // looks: each removes what a probe left
				probe := filepath.Join(cfg.Spool, "left.probe")
				must(t, os.WriteFile(probe, nil, 0o600))
				waitFor(t, func() bool {
					_, err := os.Stat(probe)
					return err != nil
				})
			}
			if gone(0)() || gone(1)() || gone(len(names)-1)() {
				t.Error("stored out of turn")
			}
		}
		close(hold)
		if restart {
			waitFor(t, gone(1))
		}
		if restart && (gone(0)() || gone(len(names)-1)()) {
			t.Error("the last segment went ahead of one that could not be read")
		}
		mended.Store(true)
		if restart {
			closeLog(t, l) // and what can be read now does not hold it up
			l, err = auditlog.OpenOn(t.Context(), unreadableDisk{}, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
			must(t, err)
		}
		waitFor(t, gone(len(names)-1))
		closeLog(t, l)
		if len(store.refused) > 0 {
			t.Errorf("put again otherwise: %v", store.refused)
		}
		for _, s := range logs(t, store.source(), auditlog.SessionPrefix) {
			if _, rep := readAll(t, store.source(), s); rep.State != auditlog.Sealed {
				t.Errorf("%s: %s %v", rep.ID, rep.State, rep.Problems)
			}
		}
		if !hasLeaf(store.source(), "sample-2-none") {
			t.Error("no leaf")
		}
	}
}

// What was stored while a look was under way does not count as left behind: the log goes on.
func TestStoredWhileLooking(t *testing.T) {
	m, names := one(t, "none")
	d := &openHeldDisk{name: "sample-2-none.00000000.seg", came: make(chan struct{}, 1), release: make(chan struct{})}
	first, second := make(chan struct{}), make(chan struct{})
	store := &slowShelf{shelf{objects: make(map[string][]byte)}, map[string]chan struct{}{"zlong/00000000.seg": first, "zlong/00000001.seg": second}}
	cfg := endConfig(t.TempDir())
	cfg.SegmentBytes = 4 << 10
	cfg.SetMendEvery(time.Hour)
	l, err := auditlog.OpenOn(t.Context(), d, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	r := l.New("zlong")
	login(t, r)
	must(t, r.Begin())
	for range 4 { // a segment each
		noise := make([]byte, 8<<10)
		_, _ = rand.Read(noise)
		must(t, r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: noise}))
		must(t, r.Sync(t.Context()))
	}
	waitFor(t, func() bool { return l.Stats().Waiting >= 2 })
	spool := map[string][]byte{}
	for i, name := range names {
		spool[fmt.Sprintf("sample-2-none.%08d.seg", i)] = m[name]
	}
	writeSpool(t, cfg.Spool, spool)
	l.LookAgain()
	<-d.came
	close(first)
	waitFor(t, func() bool {
		_, err := os.Stat(filepath.Join(cfg.Spool, "zlong.00000000.seg"))
		return err != nil
	})
	waitFor(t, func() bool { return l.Stats().Stored == 1 })
	close(d.release)
	waitFor(t, func() bool { // the look is at its end: zlong is what it finds last
		left, err := filepath.Glob(filepath.Join(cfg.Spool, "sample*"))
		must(t, err)
		return len(left) == 0
	})
	time.Sleep(50 * time.Millisecond) // or the test would not see what it is for
	close(second)
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	waitFor(t, func() bool {
		left, err := filepath.Glob(filepath.Join(cfg.Spool, "*.seg"))
		must(t, err)
		return len(left) == 0
	})
	closeLog(t, l)
}

// An object that is none holds up no other of its queue.
func TestSpoiltObject(t *testing.T) {
	store := &shelf{objects: make(map[string][]byte)}
	cfg := endConfig(t.TempDir())
	cfg.Tree = filepath.Join(t.TempDir(), "tree")
	l := openGate(t, cfg, store)
	endSessions(t, l, "s", 1)
	closeLog(t, l)
	var queue string
	for name := range store.objects {
		if parts := strings.Split(name, "/"); parts[0] == "tlog" {
			queue = tlog.QueuePrefix + parts[2]
		}
	}
	must(t, os.WriteFile(filepath.Join(cfg.Spool, queue+".00000000.obj"), []byte("no name"), 0o600))
	before := len(store.objects)
	l = openGate(t, cfg, store)
	l.LookAgain()
	endSessions(t, l, "t", 1)
	closeLog(t, l)
	if len(store.objects) < before+3 || !hasLeaf(store.source(), "t-0") {
		t.Errorf("%d objects, then %d", before, len(store.objects))
	}
}

// A file that can't be read, or a disk on which nothing can be written, keeps no gate from its start and no other log from the
// store. What could not be sealed is sealed when the disk takes files again, or found by a later start, though all before it has gone to
// the store.
func TestRecoverFails(t *testing.T) {
	for _, open := range []bool{false, true} {
		for _, full := range []bool{false, true} {
			t.Run(fmt.Sprintf("open %v full %v", open, full), func(t *testing.T) {
				store := &shelf{objects: make(map[string][]byte)}
				cfg := endConfig(t.TempDir())
				spool := interruptedSpool(t, open)
				writeSpool(t, cfg.Spool, spool)
				var disk auditlog.Disk
				var mended atomic.Bool
				if full {
					tp := tapeOf(cfg.Spool, spool)
					tp.fault = func(o op) error {
						if !mended.Load() && (o.kind == "write" || o.kind == "create") {
							return syscall.ENOSPC
						}
						return nil
					}
					disk = tp
				} else if disk = (unreadableDisk{name: "sample-2-none.00000001.seg"}); open {
					disk = unreadableDisk{name: "sample-2-none.00000002.part"}
				}
				l, err := auditlog.OpenOn(t.Context(), disk, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
				must(t, err)
				if full {
					if err := l.Ready(); !errors.Is(err, syscall.ENOSPC) {
						t.Errorf("ready: %v", err)
					}
					if err := l.New("refused").Begin(); !errors.Is(err, syscall.ENOSPC) {
						t.Errorf("begin: %v", err)
					}
				}
				waitFor(t, func() bool {
					_, err := os.Stat(filepath.Join(cfg.Spool, "sample-2-none.00000000.seg"))
					return err != nil
				})
				if _, err := os.Stat(filepath.Join(cfg.Spool, "sample-2-none.00000001.seg")); err != nil {
					t.Errorf("nothing is left by which the log is found: %v", err)
				}
				mended.Store(true)
				must(t, l.Ready())
				endSessions(t, l, "after", 1)
				states := func() map[string]auditlog.State {
					states, src := map[string]auditlog.State{}, store.source()
					for _, s := range logs(t, src, auditlog.SessionPrefix) {
						_, rep := readAll(t, src, s)
						states[rep.ID] = rep.State
					}
					return states
				}
				sealed := func() bool {
					s := states()
					return len(s) == 3 && s["sample-2-none"] == auditlog.Interrupted && s["sample-0-zstd"] == auditlog.Interrupted &&
						s["after-0"] == auditlog.Sealed
				}
				if full {
					waitFor(t, sealed)
				}
				closeLog(t, l)
				if sealed() != full {
					t.Errorf("what could not be read is sealed: %v", states())
				}
				l, err = auditlog.OpenOn(t.Context(), unreadableDisk{}, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
				must(t, err)
				closeLog(t, l)
				if !sealed() {
					t.Errorf("%v", states())
				}
				left, err := os.ReadDir(cfg.Spool)
				if err != nil || len(left) != 1 {
					t.Errorf("left in the spool: %v %v", left, err)
				}
			})
		}
	}
}
