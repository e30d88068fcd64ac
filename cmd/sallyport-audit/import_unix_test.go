//go:build unix

package main

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A FIFO among the files is told, and not waited for.
func TestImportFIFO(t *testing.T) {
	from := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(from, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	to, done := filepath.Join(t.TempDir(), "archive"), make(chan struct{})
	go func() {
		defer close(done)
		if out, errs, code := audit(t, "import", from, "--to", to); code != 1 || !strings.Contains(out, "fifo -, 0 records: not a file\n") {
			t.Errorf("code %d %s%s", code, out, errs)
		}
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("it waits")
	}
}
