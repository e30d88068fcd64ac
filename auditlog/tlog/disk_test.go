package tlog

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// osDisk is a real disk. Package auditlog attacks what is written here on others: that fail, and that forget at a power cut.
type osDisk struct{}

func (osDisk) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := os.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err // not f: a nil *os.File is no nil File
	}
	return f, nil
}

func (osDisk) Rename(from, to string) error { return os.Rename(from, to) }
func (osDisk) Remove(name string) error     { return os.Remove(name) }

func (osDisk) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// failingDisk fails the first sync of the file of leaves since it was armed, once held is closed.
type failingDisk struct {
	osDisk
	held chan struct{}

	mu    sync.Mutex // guards all below
	armed bool
	bad   File // whose sync failed
	again int  // syncs of that file since
}

type failingFile struct {
	File
	d *failingDisk
}

func (d *failingDisk) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := d.osDisk.OpenFile(name, flag, perm)
	if err == nil && filepath.Base(name) == waitFile {
		f = &failingFile{f, d}
	}
	return f, err
}

func (f *failingFile) Sync() error {
	f.d.mu.Lock()
	fails := f.d.armed
	f.d.armed = false
	switch {
	case fails:
		f.d.bad = f
	case f.d.bad == f:
		f.d.again++
	}
	f.d.mu.Unlock()
	if fails {
		<-f.d.held
		return syscall.EIO
	}
	return f.File.Sync()
}

// A file whose sync failed is synced by nobody again, also not by one who waited for that sync: the second would say that all is well.
// Both leaves are refused, the log is mended as soon as it can be, and takes them then.
func TestSyncFails(t *testing.T) {
	d := &failingDisk{held: make(chan struct{})}
	s := newSpool()
	s.busy = true // so that there is no other reason for a checkpoint
	cfg := s.config(t.TempDir(), testKey)
	cfg.Disk, cfg.Beat = d, time.Hour
	l, err := Open(cfg)
	must(t, err)
	d.mu.Lock()
	d.armed = true
	d.mu.Unlock()
	failed := make(chan error)
	for _, leaf := range []string{"a", "b"} {
		go func() { failed <- l.Add([]byte(leaf)) }()
	}
	await(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.entries) == 2 })
	close(d.held)
	for range 2 {
		if err := <-failed; !errors.Is(err, syscall.EIO) {
			t.Errorf("a leaf that may be lost was taken: %v", err)
		}
	}
	if d.again > 0 {
		t.Errorf("synced again %d times", d.again)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); l.Run(ctx) }()
	await(t, func() bool { return l.Add([]byte("c")) == nil })
	cancel()
	<-done
	must(t, l.Close(false))
	got := s.replay(t, Dir(l.state.Gate, l.state.Log))
	if fmt.Sprint(got) != "[a b c]" && fmt.Sprint(got) != "[b a c]" {
		t.Error(got)
	}
}

func await(t *testing.T, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("did not happen within a minute")
		}
	}
}
