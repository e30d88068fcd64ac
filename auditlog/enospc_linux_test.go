package auditlog_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// smallDisk mounts a file system of a megabyte.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "disk")
	must(t, os.Mkdir(dir, 0o700))
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); (errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES)) && os.Getenv("CI") == "" {
		t.Skip("a full disk needs a mount, and that root")
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // detached: a test that failed half-way has files open there
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill records until the disk takes nothing more, and says how many chunks of 8 KiB were promised.
func fill(t *testing.T, r *auditlog.Recorder) (synced int) {
	t.Helper()
	chunk := make([]byte, 8<<10)
	rand.Read(chunk)
	for end := time.Now().Add(time.Minute); ; {
		err := r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: chunk})
		if err == nil {
			err = r.Sync(t.Context())
		}
		if err != nil {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("lost by %v", err)
			}
			<-r.Lost()
			return synced
		}
		synced++
		if time.Now().After(end) {
			t.Fatal("a megabyte never fills")
		}
	}
}

// A disk that is full ends sessions and refuses new ones; when there is room again, they begin, and of the session that
// was lost all is there that was promised. So it is when the gate is started anew while the disk is full, with a transparency log on
// it, too.
func TestDiskFull(t *testing.T) {
	dir := smallDisk(t)
	inner, stored := newStore(t)
	store := &brokenStore{Store: inner}
	store.broken.Store(true)
	cfg := fastConfig(t.TempDir())
	cfg.Spool = filepath.Join(dir, "spool")
	cfg.SegmentBytes = 64 << 10
	cfg.Codec, cfg.Tree = "none", filepath.Join(dir, "tree")
	l := openGate(t, cfg, store)
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	synced := fill(t, r)
	if synced < 64 {
		t.Errorf("full after %d chunks of 8 KiB", synced)
	}
	if err := l.Ready(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("ready: %v", err)
	}
	if r.Close(&auditlog.End{Cause: "audit-lost"}) == nil {
		t.Error("close of a lost log said nothing")
	}
	refused := l.New("s2")
	login(t, refused)
	if err := refused.Begin(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("begin: %v", err)
	}
	must(t, refused.Close(&auditlog.End{Cause: "refused"}))

	gone, cancel := context.WithCancel(t.Context())
	cancel()
	l.Close(gone) // its errors are of the full disk
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	must(t, err)
	for err == nil {
		_, err = ballast.Write(make([]byte, 4<<10))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	must(t, ballast.Close())
	l = openGate(t, cfg, store)
	waitFor(t, func() bool { return l.Ready() != nil }) // once its first checkpoint could not be made
	store.broken.Store(false)
	waitFor(t, func() bool { return l.Ready() == nil })
	after := l.New("s3")
	login(t, after)
	must(t, after.Begin())
	must(t, after.Close(&auditlog.End{Cause: "client-left"}))
	closeLog(t, l)
	closeLog(t, openGate(t, cfg, store)) // seals s1
	src := source(t, stored)
	states := map[string]auditlog.State{}
	for _, log := range logs(t, src, auditlog.SessionPrefix) {
		recs, rep := readAll(t, src, log)
		states[rep.ID] = rep.State
		if rep.ID != "s1" {
			continue
		}
		n := 0
		for _, rec := range recs {
			if _, ok := rec.Body.(*auditlog.Data); ok {
				n++
			}
		}
		if n < synced {
			t.Errorf("%d chunks are there, %d were promised", n, synced)
		}
	}
	if states["s1"] != auditlog.Interrupted || states["s3"] != auditlog.Sealed || len(states) != 2 {
		t.Errorf("%v", states)
	}
}

// The log of a session that a full disk ended is sealed by the gate that goes on, once there is room, as it would be by its next start;
// a session that said nothing meanwhile goes on.
func TestDiskFullMended(t *testing.T) {
	for _, asked := range []bool{false, true} { // whether readiness is
		t.Run(fmt.Sprint(asked), func(t *testing.T) {
			dir := smallDisk(t)
			inner, stored := newStore(t)
			store := &brokenStore{Store: inner}
			store.broken.Store(true)
			cfg := endConfig(t.TempDir()) // a cut would end the idle session, too
			cfg.Spool, cfg.Tree = filepath.Join(dir, "spool"), filepath.Join(dir, "tree")
			cfg.SegmentBytes, cfg.Codec, cfg.Index, cfg.CheckpointInterval = 64<<10, "none", true, 100*time.Millisecond
			if !asked {
				cfg.SetMendEvery(20 * time.Millisecond)
			}
			l := openGate(t, cfg, store)
			idle, r := l.New("idle"), l.New("s1")
			login(t, idle)
			must(t, idle.Begin())
			login(t, r)
			must(t, r.Begin())
			synced := fill(t, r)
			if r.Close(&auditlog.End{Cause: "audit-lost"}) == nil {
				t.Error("close of a lost log said nothing")
			}
			time.Sleep(100 * time.Millisecond) // tries that find no room
			store.broken.Store(false)
			if asked {
				waitFor(t, func() bool { return l.Ready() == nil })
			}
			src := source(t, stored)
			waitFor(t, func() bool { return hasLeaf(src, "s1") })
			must(t, idle.Record(1, numbered(0, 100)))
			must(t, idle.Close(&auditlog.End{Cause: "client-left"}))
			waitFor(t, func() bool { return l.Ready() == nil && l.Stats().Waiting == 0 })
			waitFor(t, func() bool { return l.Stats().SpoolBytes < 64<<10 }) // the open logs', as what was lost is not counted any more
			closeLog(t, l)
			if used := l.Stats().SpoolBytes; used != 0 {
				t.Errorf("%d bytes count as used in an empty spool", used)
			}
			if left, err := os.ReadDir(cfg.Spool); err != nil || len(left) != 1 {
				t.Errorf("left in the spool: %v %v", left, err)
			}
			if err := checkTree(src, nil, 2); err != nil {
				t.Error(err)
			}
			states := map[string]auditlog.State{}
			for _, log := range logs(t, src, auditlog.SessionPrefix) {
				recs, rep := readAll(t, src, log)
				states[rep.ID] = rep.State
				if rep.ID != "s1" {
					continue
				}
				n := 0
				for _, rec := range recs {
					if _, ok := rec.Body.(*auditlog.Data); ok {
						n++
					}
				}
				if end, ok := recs[len(recs)-1].Body.(*auditlog.End); n < synced || !ok || end.Cause != "interrupted" {
					t.Errorf("%d chunks are there, %d were promised; it ends with %+v", n, synced, recs[len(recs)-1].Body)
				}
			}
			if states["s1"] != auditlog.Interrupted || states["idle"] != auditlog.Sealed || len(states) != 2 {
				t.Errorf("%v", states)
			}
		})
	}
}
