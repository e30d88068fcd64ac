package auditlog_test

import (
	"bytes"
	"errors"
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
	l, err := auditlog.OpenOn(t.Context(), d, endConfig(t.TempDir()), testKey, store, "gate-1", slog.New(slog.DiscardHandler))
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

// A transparency log is not closed while the spool has a file that was moved aside: it may be of a log, and the store does not have it.
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
