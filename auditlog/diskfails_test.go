package auditlog_test

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// The disk fails at each single operation in turn (in the short form at each fourth), that of the transparency log and the index is of,
// too, and from there on until it is mended: the session ends with that error, none
// begins and readiness says why, no file is used again whose sync failed (Linux forgets what it could not write, and the next
// sync would say that all is well), and when the disk is mended sessions begin, the gate that goes on seals what was cut, and all that was
// promised comes to the store.
func TestDiskFails(t *testing.T) {
	rng, step := seed(t), 4
	if soaking() {
		step = 1
	}
	for _, failure := range []error{syscall.EIO, syscall.ENOSPC} {
		for _, once := range []bool{false, true} {
			n := 1 + rng.IntN(step)
			t.Run(fmt.Sprintf("%v once %v", failure, once), func(t *testing.T) {
				t.Parallel() // it waits most of the time
				tried := 0
				for ; diskFails(t, failure, once, n); n += step {
					tried++
				}
				if n < 80 {
					t.Errorf("only %d operations", n)
				}
				t.Logf("at %d of about %d operations", tried, n-step)
			})
		}
	}
}

// diskFails reports whether the session had an n-th operation.
func diskFails(t *testing.T, failure error, once bool, n int) (hit bool) {
	what := fmt.Sprintf("%v at operation %d (once: %v)", failure, n, once)
	dir := t.TempDir()
	tp := newTape(dir)
	var armed, mended atomic.Bool
	bad := map[int]bool{} // files whose sync failed
	count, at := 0, ""
	tp.fault = func(o op) error { // under the tape's lock
		if !armed.Load() || o.kind == "mark" || o.kind == "put" {
			return nil
		}
		if o.kind == "truncate" && o.at == 0 {
			delete(bad, o.file) // all of it is written anew
		}
		if bad[o.file] && o.file != 0 && (o.kind == "write" || o.kind == "sync") {
			t.Errorf("%s: %s of %s, whose sync failed", what, o.kind, o.name)
		}
		count++
		if mended.Load() || count < n || once && count > n {
			return nil
		}
		if count == n {
			at = o.kind
		}
		if o.kind == "sync" {
			bad[o.file] = true
		}
		return failure
	}
	store := &shelf{objects: make(map[string][]byte)}
	cfg := powerConfig(dir)
	cfg.CheckpointInterval = 100 * time.Millisecond // after which one that failed is tried again
	l, err := auditlog.OpenOn(t.Context(), tp, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	promised := map[string]int{}
	armed.Store(true)
	r := l.New("s1")
	login(t, r)
	err = r.Begin()
	begun := err == nil
	for i := 0; err == nil && i < 12; i++ {
		promised["s1"] = i
		if err = r.Record(1, numbered(i, 1500)); err == nil {
			err = r.Sync(t.Context())
		}
	}
	if cerr := r.Close(&auditlog.End{Cause: "client-left"}); err == nil {
		err = cerr
	}
	hits := func() bool {
		tp.mu.Lock()
		defer tp.mu.Unlock()
		return count >= n
	}
	waitFor(t, func() bool { return hits() || hasLeaf(store.source(), "s1") })
	hit = hits()
	if hit && !once {
		waitFor(t, func() bool { return errors.Is(l.Ready(), failure) || errors.Is(l.StoreErr(), failure) })
	}
	tp.mu.Lock()
	failed := at
	tp.mu.Unlock()
	switch {
	case !hit && err != nil:
		t.Fatalf("%s: %v without a fault", what, err)
	case err != nil && !errors.Is(err, failure):
		t.Errorf("%s, a %s: the session ended by %v", what, failed, err)
	case err != nil && begun:
		select {
		case <-r.Lost():
		default:
			t.Errorf("%s, a %s: not lost", what, failed)
		}
	}
	if err != nil && !once {
		if err := l.Ready(); !errors.Is(err, failure) {
			t.Errorf("%s, a %s: ready: %v", what, failed, err)
		}
		if err := l.New("refused").Begin(); !errors.Is(err, failure) {
			t.Errorf("%s, a %s: begin: %v", what, failed, err)
		}
	}
	mended.Store(true)
	waitFor(t, func() bool { return l.Ready() == nil })
	after := l.New("after")
	login(t, after)
	must(t, after.Begin())
	must(t, after.Record(1, numbered(0, 100)))
	must(t, after.Close(&auditlog.End{Cause: "client-left"}))
	promised["after"] = -1 - 1
	if begun { // sealed by the session's end, or by the gate that goes on
		waitFor(t, func() bool { return hasLeaf(store.source(), "s1") })
	}
	closeLog(t, l)
	armed.Store(false)
	l, err = auditlog.OpenOn(t.Context(), tp, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	closeLog(t, l)
	if err := checkKept(store.source(), promised); err != nil {
		t.Errorf("%s, a %s: %v", what, failed, err)
	}
	if err := checkTree(store.source(), nil, 2); err != nil {
		t.Errorf("%s, a %s: %v", what, failed, err)
	}
	if tp.open != 0 {
		t.Errorf("%s, a %s: %d files are left open", what, failed, tp.open)
	}
	left, err := os.ReadDir(cfg.Spool)
	if err != nil || len(left) != 1 {
		t.Errorf("%s, a %s: left in %s: %v %v", what, failed, filepath.Base(cfg.Spool), left, err)
	}
	return hit
}
