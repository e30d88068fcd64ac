package auditlog_test

import (
	"bytes"
	"errors"
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

// lookedAt is a disk whose spool is looked at while a probe is written.
type lookedAt struct {
	auditlog.OSDisk
	full  atomic.Bool // for segments
	looks atomic.Int32
}

func (d *lookedAt) OpenFile(name string, flag int, perm fs.FileMode) (auditlog.DiskFile, error) {
	if d.full.Load() && strings.HasSuffix(name, ".part") {
		return nil, syscall.ENOSPC
	}
	f, err := d.OSDisk.OpenFile(name, flag, perm)
	if err == nil && strings.HasSuffix(name, ".probe") {
		f = lookedAtFile{f, d}
	}
	return f, err
}

type lookedAtFile struct {
	auditlog.DiskFile
	disk *lookedAt
}

func (f lookedAtFile) Sync() error {
	f.disk.looks.Add(1)
	return errors.Join(f.DiskFile.Sync(), os.Remove(f.Name())) // as readSpool does
}

// A look at the spool takes away a probe that is being written: that is no failure of the disk.
func TestProbeLookedAt(t *testing.T) {
	d := &lookedAt{}
	store, _ := newStore(t)
	cfg := endConfig(t.TempDir())
	l, err := auditlog.OpenOn(t.Context(), d, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	defer closeLog(t, l)
	d.full.Store(true)
	r := l.New("s1")
	if err := r.Begin(); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	must(t, r.Close(&auditlog.End{Cause: "refused"}))
	d.full.Store(false)
	must(t, l.Ready())
	if d.looks.Load() == 0 {
		t.Error("no probe was written")
	}
}

// Tries to seal a log that fail, however many, leave what counts as used in the spool what it is.
func TestMendFailsUsed(t *testing.T) {
	m, names := one(t, "none")
	torn := append(headerOf(m[names[0]]), make([]byte, 100<<10)...)
	spool := map[string][]byte{"sample-2-none.00000000.part": torn}
	cfg := endConfig(t.TempDir())
	cfg.SetMendEvery(time.Millisecond)
	writeSpool(t, cfg.Spool, spool)
	tp := tapeOf(cfg.Spool, spool)
	var mended atomic.Bool
	var tries atomic.Int32
	tp.fault = func(o op) error {
		if o.kind == "truncate" && !mended.Load() {
			tries.Add(1)
			return syscall.EIO
		}
		return nil
	}
	store := &shelf{objects: make(map[string][]byte)}
	l, err := auditlog.OpenOn(t.Context(), tp, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	waitFor(t, func() bool { return tries.Load() > 5 })
	if used := l.Stats().SpoolBytes; used < int64(len(torn)) {
		t.Errorf("%d bytes count as used, %d are there", used, len(torn))
	}
	mended.Store(true)
	waitFor(t, func() bool { return len(store.source()) > 0 })
	closeLog(t, l)
	if used := l.Stats().SpoolBytes; used != 0 {
		t.Errorf("%d bytes count as used in an empty spool", used)
	}
}

// A transparency log is not closed while the spool has a file that was moved aside: it may be of a log that the store does not
// have.
func TestNotClosedAside(t *testing.T) {
	cfg := endConfig(t.TempDir())
	cfg.Tree = filepath.Join(t.TempDir(), "tree")
	writeSpool(t, cfg.Spool, map[string][]byte{"s1.00000000.seg": bytes.Repeat([]byte("x"), 1000)})
	store := &shelf{objects: make(map[string][]byte)}
	closed := func() bool {
		t.Helper()
		closeLog(t, openGate(t, cfg, store))
		last := ""
		for name := range store.source() {
			if strings.Contains(name, "/checkpoint/") {
				last = max(last, name)
			}
		}
		if last == "" {
			return false // it was closed before it had said anything
		}
		c, err := tlog.ParseCheckpoint(store.source()[last])
		must(t, err)
		return c.Closed
	}
	if closed() {
		t.Error("closed, with a log that is not in the store")
	}
	must(t, os.Remove(filepath.Join(cfg.Spool, "s1.00000000.seg.bad")))
	if !closed() {
		t.Error("not closed, with nothing in the spool")
	}
}

// A session's end is in its log's last segment: were that one empty, who seals it after a crash could not tell that the session
// has ended.
func TestEndInLastSegment(t *testing.T) {
	store, dir := newStore(t)
	cfg := fastConfig(t.TempDir())
	cfg.SegmentAge, cfg.SyncInterval = 10*time.Millisecond, 10*time.Second
	l := openGate(t, cfg, store)
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	must(t, r.Record(1, numbered(0, 100)))
	time.Sleep(5 * cfg.SegmentAge) // the segment that gets it is due when it is written
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	closeLog(t, l)
	src := source(t, dir)
	log := logs(t, src, auditlog.SessionPrefix)[0]
	f, err := src.Open(t.Context(), log.Segments[len(log.Segments)-1].Name)
	must(t, err)
	defer f.Close()
	s, err := auditlog.NewSegmentReader(f)
	must(t, err)
	var last auditlog.Record
	for {
		rec, err := s.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		last = rec
	}
	if _, ok := last.Body.(*auditlog.End); !ok {
		t.Errorf("its last record is %+v", last)
	}
}

// tornDisk writes half of a segment's header, and removes nothing.
type tornDisk struct {
	auditlog.OSDisk
	torn atomic.Bool
}

func (d *tornDisk) OpenFile(name string, flag int, perm fs.FileMode) (auditlog.DiskFile, error) {
	f, err := d.OSDisk.OpenFile(name, flag, perm)
	if err == nil && d.torn.Load() && strings.HasSuffix(name, ".part") {
		f = tornFile{f}
	}
	return f, err
}

func (d *tornDisk) Remove(name string) error {
	if d.torn.Load() && strings.HasSuffix(name, ".part") {
		return syscall.EIO
	}
	return d.OSDisk.Remove(name)
}

type tornFile struct{ auditlog.DiskFile }

func (f tornFile) Write(b []byte) (int, error) {
	n, err := f.DiskFile.Write(b[:len(b)/2])
	return n, errors.Join(err, syscall.ENOSPC)
}

// A segment's file that could neither be written nor removed is removed when the disk takes files again, and counts until
// then.
func TestTornBegin(t *testing.T) {
	d := &tornDisk{}
	store, _ := newStore(t)
	cfg := endConfig(t.TempDir())
	l, err := auditlog.OpenOn(t.Context(), d, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	d.torn.Store(true)
	r := l.New("s1")
	if err := r.Begin(); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	must(t, r.Close(&auditlog.End{Cause: "refused"}))
	info, err := os.Stat(filepath.Join(cfg.Spool, "s1.00000000.part"))
	must(t, err)
	if used := l.Stats().SpoolBytes; used <= info.Size() {
		t.Errorf("%d bytes count as used, and a file of %d is there", used, info.Size())
	}
	d.torn.Store(false)
	must(t, l.Ready())
	waitFor(t, func() bool { return l.Stats().SpoolBytes == 0 })
	if _, err := os.Stat(filepath.Join(cfg.Spool, "s1.00000000.part")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	closeLog(t, l)
}

// noRename gives some files no other name.
type noRename struct {
	auditlog.OSDisk
	suffix string
	fails  atomic.Int32
}

func (d *noRename) Rename(from, to string) error {
	if strings.HasSuffix(to, d.suffix) && d.fails.Add(-1) >= 0 {
		return syscall.EIO
	}
	return d.OSDisk.Rename(from, to)
}

// An object that can't be brought into the spool does not count there.
func TestObjectFailsUsed(t *testing.T) {
	d := &noRename{suffix: ".obj"}
	d.fails.Store(2) // the key and the first checkpoint
	store, _ := newStore(t)
	cfg := endConfig(t.TempDir())
	cfg.Tree = filepath.Join(t.TempDir(), "tree")
	l, err := auditlog.OpenOn(t.Context(), d, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	waitFor(t, func() bool { return d.fails.Load() <= 0 })
	closeLog(t, l)
	if used := l.Stats().SpoolBytes; used != 0 || d.fails.Load() >= 0 {
		t.Errorf("%d bytes count as used in an empty spool", used)
	}
}
