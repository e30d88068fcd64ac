// Package file keeps an audit log's segments in a directory: as a store for the gate, and as a source for who reads it.
package file

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// tempDir holds what is being put; its name can't be an object's.
const tempDir = ".tmp"

// staleTemp is the age at which a file in tempDir is nobody's any more.
const staleTemp = time.Hour

// Store puts objects into a directory. Safe for concurrent use, also by several processes.
type Store struct {
	dir  string
	temp string
}

// NewStore makes the directory (0750) if need be. What a killed gate left half put is removed when it is an hour old.
func NewStore(dir string) (*Store, error) {
	s := &Store{dir: dir, temp: filepath.Join(dir, tempDir)}
	if err := makeDir(s.temp); err != nil {
		return nil, fmt.Errorf("directory store: %w", err)
	}
	entries, err := os.ReadDir(s.temp)
	if err != nil {
		return nil, fmt.Errorf("directory store: %w", err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || time.Since(info.ModTime()) < staleTemp {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.temp, e.Name())); err != nil {
			return nil, fmt.Errorf("directory store: %w", err)
		}
	}
	return s, nil
}

// Put stores an object; see auditlog.Store.
func (s *Store) Put(ctx context.Context, name string, r io.Reader, size int64) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("put %s: %w", name, err)
		}
	}()
	if !validName(name) {
		return errors.New("not a name for an object")
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	temp, err := s.link(r, size)
	if err != nil {
		temp, err = s.write(r, size)
	}
	if err != nil {
		return err
	}
	defer func() {
		if rerr := os.Remove(temp); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	final := filepath.Join(s.dir, filepath.FromSlash(name))
	if err := makeDir(filepath.Dir(final)); err != nil {
		return err
	}
	switch err := place(temp, final); {
	case err == nil:
		return syncDir(filepath.Dir(final))
	case !errors.Is(err, fs.ErrExist):
		return err
	}
	same, err := equal(temp, final)
	if err != nil {
		return err
	}
	if !same {
		return auditlog.ErrExists
	}
	return syncDir(filepath.Dir(final)) // who put it first may have been killed before this
}

// link gives the file that r is a temporary name, if it is one, of this size, and on the same file system: a bulk transfer
// then costs the disk one write, not two. Any error means that it has to be copied.
func (s *Store) link(r io.Reader, size int64) (name string, err error) {
	f, ok := r.(*os.File)
	if !ok {
		return "", errors.ErrUnsupported
	}
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if at, err := f.Seek(0, io.SeekCurrent); err != nil || at != 0 || info.Size() != size || !info.Mode().IsRegular() {
		return "", errors.ErrUnsupported
	}
	name = filepath.Join(s.temp, "link-"+rand.Text())
	if err := os.Link(f.Name(), name); err != nil {
		return "", err
	}
	linked, err := os.Lstat(name)
	if err == nil && !os.SameFile(info, linked) {
		err = errors.New("the file's name is another's now")
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return "", errors.Join(err, os.Remove(name))
	}
	return name, nil
}

// write writes a temporary file of size bytes and makes it durable.
func (s *Store) write(r io.Reader, size int64) (name string, err error) {
	f, err := os.CreateTemp(s.temp, "put-*")
	if err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if err := f.Chmod(0o640); err != nil {
		return "", err
	}
	n, err := io.Copy(f, io.LimitReader(r, size+1))
	if err != nil {
		return "", err
	}
	if n != size {
		return "", fmt.Errorf("%d bytes came where %d were announced", n, size)
	}
	return f.Name(), f.Sync()
}

// place gives a file its name, unless something has it. Link does so in one step; where there are no links, a look comes
// before the rename: there, two gates that put the same name at the same moment are not kept apart.
func place(temp, final string) error {
	err := os.Link(temp, final)
	if err == nil || errors.Is(err, fs.ErrExist) {
		return err
	}
	if _, err := os.Lstat(final); err == nil {
		return fs.ErrExist
	}
	return os.Rename(temp, final)
}

func equal(a, b string) (bool, error) {
	fa, err := os.Open(a)
	if err != nil {
		return false, err
	}
	defer fa.Close()
	fb, err := os.Open(b)
	if err != nil {
		return false, err
	}
	defer fb.Close()
	ba, bb := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		na, erra := io.ReadFull(fa, ba)
		nb, errb := io.ReadFull(fb, bb)
		if !bytes.Equal(ba[:na], bb[:nb]) {
			return false, nil
		}
		for _, err := range []error{erra, errb} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return false, err
			}
		}
		if erra != nil || errb != nil {
			return (erra != nil) == (errb != nil), nil
		}
	}
}

// makeDir makes a directory with those above it, and makes their names durable.
func makeDir(dir string) error {
	if info, err := os.Stat(dir); err == nil {
		if !info.IsDir() {
			return fmt.Errorf("%s: not a directory", dir)
		}
		return nil
	}
	parent := filepath.Dir(dir)
	if parent != dir {
		if err := makeDir(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(parent)
}

// validName keeps names within the directory, and visible to List.
func validName(name string) bool {
	if !fs.ValidPath(name) || name == "." || strings.ContainsAny(name, "\\:") {
		return false
	}
	for part := range strings.SplitSeq(name, "/") {
		if strings.HasPrefix(part, ".") {
			return false
		}
	}
	return true
}

// Source reads objects from a directory, that of a Store or a copy of one.
type Source struct {
	root *os.Root
}

// OpenSource opens a directory. Links out of it are not followed.
func OpenSource(dir string) (*Source, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open log directory: %w", err)
	}
	return &Source{root: root}, nil
}

// Close closes the directory.
func (s *Source) Close() error { return s.root.Close() }

// List yields objects; see auditlog.Source. Files and directories whose names begin with a dot are not listed.
func (s *Source) List(ctx context.Context, prefix string) iter.Seq2[auditlog.Object, error] {
	return func(yield func(auditlog.Object, error) bool) {
		// Begins at the directory that the prefix names whole, so that one session's objects cost one look.
		dir := "."
		if i := strings.LastIndexByte(prefix, '/'); i > 0 {
			dir = prefix[:i]
		}
		if dir != "." && !fs.ValidPath(dir) {
			return
		}
		info, err := s.root.Stat(filepath.FromSlash(dir))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || err == nil && !info.IsDir() {
			return // no such prefix
		}
		root := s.root
		if err == nil && dir != "." {
			if root, err = s.root.OpenRoot(filepath.FromSlash(dir)); err == nil {
				defer root.Close()
			}
		}
		w := walk{ctx: ctx, prefix: prefix, yield: yield}
		if err == nil {
			_, err = w.dir(root, strings.TrimPrefix(dir+"/", "./"))
		}
		if err != nil {
			yield(auditlog.Object{}, err)
		}
	}
}

// walk is one List.
type walk struct {
	ctx    context.Context
	prefix string
	yield  func(auditlog.Object, error) bool
}

// dir yields what lies in a directory whose objects' names begin with above; false if the caller has enough. Each directory is
// opened from the one above it: a name from the top, looked up part by part, would cost several times as much.
func (w *walk) dir(root *os.Root, above string) (more bool, err error) {
	if err := context.Cause(w.ctx); err != nil {
		return false, err
	}
	f, err := root.Open(".")
	if err != nil {
		return false, err
	}
	entries, err := f.ReadDir(-1)
	if err := errors.Join(err, f.Close()); err != nil {
		return false, err
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, d := range entries {
		name := above + d.Name()
		if strings.HasPrefix(d.Name(), ".") {
			continue
		}
		if d.IsDir() {
			if !strings.HasPrefix(name+"/", w.prefix) && !strings.HasPrefix(w.prefix, name+"/") {
				continue
			}
			if more, err := w.below(root, d.Name(), name+"/"); err != nil || !more {
				return more, err
			}
			continue
		}
		if !strings.HasPrefix(name, w.prefix) {
			continue
		}
		info, err := root.Lstat(d.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone meanwhile
		}
		if err != nil {
			return false, err
		}
		if !w.yield(auditlog.Object{Name: name, Size: info.Size(), Modified: info.ModTime()}, nil) {
			return false, nil
		}
	}
	return true, nil
}

func (w *walk) below(root *os.Root, name, above string) (more bool, err error) {
	sub, err := root.OpenRoot(name)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil // gone meanwhile
	}
	if err != nil {
		return false, err
	}
	defer sub.Close()
	return w.dir(sub, above)
}

// Open opens an object; see auditlog.Source.
func (s *Source) Open(_ context.Context, name string) (io.ReadCloser, error) {
	if !validName(name) {
		return nil, fmt.Errorf("open %.200q: %w", name, fs.ErrNotExist)
	}
	info, err := s.root.Stat(filepath.FromSlash(name))
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("open %s: not a plain file", name) // a pipe would wait for ever
	}
	return s.root.Open(filepath.FromSlash(name))
}
