package auditlog_test

import (
	"errors"
	"io/fs"
	"log/slog"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// probedDisk does something while the spool is probed.
type probedDisk struct {
	auditlog.OSDisk
	probed func() // nil: nothing
	failed bool   // new segments can't be made
}

func (d *probedDisk) OpenFile(name string, flag int, perm fs.FileMode) (auditlog.DiskFile, error) {
	if strings.HasSuffix(name, ".probe") {
		if d.probed != nil {
			d.probed()
		}
	} else if d.failed {
		return nil, syscall.EIO
	}
	return d.OSDisk.OpenFile(name, flag, perm)
}

// A probe of the spool that goes well says nothing of what fails meanwhile.
func TestReadyFailsMeanwhile(t *testing.T) {
	dir := t.TempDir()
	d := &probedDisk{}
	cfg := fastConfig(dir)
	cfg.SetMendEvery(time.Hour)
	l, err := auditlog.OpenOn(t.Context(), d, cfg, testKey, &shelf{objects: make(map[string][]byte)}, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	defer closeLog(t, l)
	fail := func() {
		d.failed = true
		if err := l.New("s1").Begin(); !errors.Is(err, syscall.EIO) {
			t.Errorf("begin: %v", err)
		}
		d.failed = false
	}
	fail()
	d.probed = fail
	if err := l.Ready(); !errors.Is(err, syscall.EIO) {
		t.Errorf("ready, though the spool failed during its probe: %v", err)
	}
	d.probed = nil
	must(t, l.Ready()) // a probe of its own
}
