package auditlog

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/sallyport/sallyport/auditlog/tlog"
)

// disk is what changes a spool or the transparency log's state, and what a start reads of them: everything that must be there after a
// crash goes through it. osDisk is the real one. Tests put others in its place, that fail, that forget at a power cut what was not
// synced, or that end the process.
type disk interface {
	// OpenFile opens a file as os.OpenFile does. Its name is durable after SyncDir, its content after its Sync.
	OpenFile(name string, flag int, perm fs.FileMode) (diskFile, error)
	Rename(from, to string) error
	Remove(name string) error
	// Mkdir makes a directory. Its name is durable after SyncDir of the one above.
	Mkdir(name string, perm fs.FileMode) error
	// SyncDir makes the names in a directory durable.
	SyncDir(name string) error
}

// diskFile is an open file of a disk.
type diskFile interface {
	io.ReadWriteCloser
	Name() string
	Sync() error
	Truncate(size int64) error
}

type osDisk struct{}

func (osDisk) OpenFile(name string, flag int, perm fs.FileMode) (diskFile, error) {
	f, err := os.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err // not f: a nil *os.File is no nil diskFile
	}
	return f, nil
}

func (osDisk) Rename(from, to string) error { return os.Rename(from, to) }
func (osDisk) Remove(name string) error     { return os.Remove(name) }
func (osDisk) SyncDir(name string) error    { return syncDir(name) }

func (osDisk) Mkdir(name string, perm fs.FileMode) error { return os.Mkdir(name, perm) }

// treeDisk is a disk as the transparency log has it.
type treeDisk struct{ disk }

func (d treeDisk) OpenFile(name string, flag int, perm fs.FileMode) (tlog.File, error) {
	return d.disk.OpenFile(name, flag, perm)
}

// makeDir makes a directory, and its name durable with those of the directories that had to be made above it: a power cut would take
// all that is in it otherwise.
func makeDir(d disk, dir string) error {
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		return nil
	}
	parent := filepath.Dir(dir)
	if parent != dir {
		if err := makeDir(d, parent); err != nil {
			return err
		}
	}
	if err := d.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return d.SyncDir(parent)
}
