package auditlog_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sallyport/sallyport/auditlog"
)

// tape is a disk on a real directory, root, that remembers all that was done to it, in order: so the state of a real disk after a
// power cut at any moment can be made. It syncs nothing for real.
type tape struct {
	root  string
	mu    sync.Mutex // guards all below
	ops   []op
	names map[string]int // of the files that are there; 0: of a directory
	files int
	open  int              // files that are
	fault func(o op) error // asked before each operation that can fail; nil: none fails
}

// op is one operation. Names are as below the root.
type op struct {
	kind string // create, mkdir, write, truncate, sync, rename, remove, syncdir; put: the store took an object; mark: see promise
	name string
	to   string // of a rename
	file int
	at   int64 // of a write; of a truncate: the size
	data []byte
	mark map[string]int // records by log that were promised to be durable; -n-1: and that the log was closed, with n
}

func newTape(root string) *tape { return &tape{root: root, names: make(map[string]int)} }

// rel is a path as below the root.
func (t *tape) rel(path string) string {
	rel, err := filepath.Rel(t.root, path)
	if err != nil {
		panic(err) // of a test
	}
	return rel
}

// add plays an operation and then keeps it.
func (t *tape) add(o op, play func() error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fault != nil {
		if err := t.fault(o); err != nil {
			return &fs.PathError{Op: o.kind, Path: o.name, Err: err}
		}
	}
	if err := play(); err != nil {
		return err
	}
	switch o.kind {
	case "create", "mkdir":
		t.names[o.name] = o.file
	case "rename":
		o.file = t.names[o.name]
		t.names[o.to] = o.file
		delete(t.names, o.name)
	case "remove":
		delete(t.names, o.name)
	}
	t.ops = append(t.ops, o)
	return nil
}

func (t *tape) OpenFile(name string, flag int, perm fs.FileMode) (auditlog.DiskFile, error) {
	rel := t.rel(name)
	t.mu.Lock()
	id, there := t.names[rel]
	if !there {
		t.files++
		id = t.files
	}
	t.mu.Unlock()
	var f *os.File
	open := func() (err error) { f, err = os.OpenFile(name, flag, perm); return err }
	var err error
	switch {
	case !there && flag&os.O_CREATE != 0:
		err = t.add(op{kind: "create", name: rel, file: id}, open)
	case there && flag&os.O_TRUNC != 0:
		err = t.add(op{kind: "truncate", name: rel, file: id}, open)
	default:
		err = open()
	}
	if err != nil {
		return nil, err
	}
	at := int64(0)
	if flag&os.O_APPEND != 0 {
		info, err := f.Stat()
		if err != nil {
			return nil, err
		}
		at = info.Size()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.open++
	return &tapeFile{t: t, f: f, id: id, at: at}, nil
}

func (t *tape) Rename(from, to string) error {
	return t.add(op{kind: "rename", name: t.rel(from), to: t.rel(to)}, func() error { return os.Rename(from, to) })
}

func (t *tape) Remove(name string) error {
	return t.add(op{kind: "remove", name: t.rel(name)}, func() error { return os.Remove(name) })
}

func (t *tape) Mkdir(name string, perm fs.FileMode) error {
	return t.add(op{kind: "mkdir", name: t.rel(name)}, func() error { return os.Mkdir(name, perm) })
}

func (t *tape) SyncDir(name string) error {
	return t.add(op{kind: "syncdir", name: t.rel(name)}, func() error { return nil })
}

type tapeFile struct {
	t  *tape
	f  *os.File
	id int
	at int64
}

func (f *tapeFile) Name() string { return f.f.Name() }

func (f *tapeFile) Close() error {
	err := f.f.Close()
	f.t.mu.Lock()
	defer f.t.mu.Unlock()
	if !errors.Is(err, fs.ErrClosed) {
		f.t.open--
	}
	return err
}

func (f *tapeFile) Read(p []byte) (int, error) {
	n, err := f.f.Read(p)
	f.at += int64(n)
	return n, err
}

func (f *tapeFile) Write(p []byte) (n int, err error) {
	err = f.t.add(op{kind: "write", name: f.t.rel(f.Name()), file: f.id, at: f.at, data: bytes.Clone(p)}, func() error {
		n, err = f.f.Write(p)
		return err
	})
	f.at += int64(n)
	return n, err
}

func (f *tapeFile) Truncate(size int64) error {
	return f.t.add(op{kind: "truncate", name: f.t.rel(f.Name()), file: f.id, at: size}, func() error { return f.f.Truncate(size) })
}

func (f *tapeFile) Sync() error {
	return f.t.add(op{kind: "sync", name: f.t.rel(f.Name()), file: f.id}, func() error { return nil })
}

// promise keeps what a caller was told to be durable.
func (t *tape) promise(mark map[string]int) {
	t.add(op{kind: "mark", mark: mark}, func() error { return nil })
}

// platter is what a disk holds for sure, and what it may hold.
type platter struct {
	names   map[string]int // durable
	pending []op           // creates, renames and removes that are not
	files   map[int]*plate
}

type plate struct {
	durable []byte
	pending []op // writes and truncates that are not
}

func (p *platter) play(o op) {
	switch o.kind {
	case "create", "mkdir", "rename", "remove":
		p.pending = append(p.pending, o)
		if o.kind == "create" {
			p.files[o.file] = &plate{}
		}
	case "write", "truncate":
		f := p.files[o.file]
		f.pending = append(f.pending, o)
	case "sync":
		f := p.files[o.file]
		for _, w := range f.pending {
			f.durable = w.apply(f.durable)
		}
		f.pending = nil
	case "syncdir":
		p.pending = slices.DeleteFunc(p.pending, func(of op) bool {
			if filepath.Dir(of.name) != o.name {
				return false
			}
			of.rename(p.names)
			return true
		})
	}
}

func (o op) apply(b []byte) []byte {
	if o.kind == "truncate" {
		return append(b, make([]byte, max(0, int(o.at)-len(b)))...)[:o.at]
	}
	end := int(o.at) + len(o.data)
	b = append(b, make([]byte, max(0, end-len(b)))...)
	copy(b[o.at:], o.data)
	return b
}

func (o op) rename(names map[string]int) {
	switch o.kind {
	case "create", "mkdir":
		names[o.name] = o.file
	case "rename":
		names[o.to] = o.file // though its old name may never have been durable
		delete(names, o.name)
	case "remove":
		delete(names, o.name)
	}
}

const pageSize = 4 << 10

// cut gives the directory as it may be after a power cut. Names: any of the operations that were not made durable may have
// been; ordered: only the first few of them, as file systems with a journal have it. Content: each page is as it was after
// any of the writes to it that are not durable, and so is the size: so writes are torn, reordered and lost. how is all, none
// or random.
func (p *platter) cut(how string, ordered bool, rng *rand.Rand) map[string][]byte {
	pick := func(n int) int { // how many of n
		switch how {
		case "all":
			return n
		case "none":
			return 0
		}
		return rng.IntN(n + 1)
	}
	names := make(map[string]int)
	for name, id := range p.names {
		names[name] = id
	}
	if ordered {
		for _, o := range p.pending[:pick(len(p.pending))] {
			o.rename(names)
		}
	} else {
		for _, o := range p.pending {
			if pick(1) == 1 {
				o.rename(names)
			}
		}
	}
	out := make(map[string][]byte)
	for name, id := range names {
		if _, ok := names[filepath.Dir(name)]; id == 0 || !ok && filepath.Dir(name) != "." {
			continue // a directory, or a file in one that is gone
		}
		f := p.files[id]
		states := [][]byte{f.durable}
		for _, o := range f.pending {
			states = append(states, o.apply(bytes.Clone(states[len(states)-1])))
		}
		b := make([]byte, len(states[pick(len(states)-1)]))
		for at := 0; at < len(b); at += pageSize {
			if from := states[pick(len(states)-1)]; at < len(from) {
				copy(b[at:min(len(b), at+pageSize)], from[at:])
			}
		}
		out[name] = b
	}
	return out
}

// shelf is a store in memory that says on a tape what it took.
type shelf struct {
	mu      sync.Mutex // guards objects and refused
	objects map[string][]byte
	refused []string        // names that came again with other bytes
	tape    *tape           // nil: none
	held    <-chan struct{} // nothing of the log three is taken before it is closed; nil: it is
}

func (s *shelf) Put(_ context.Context, name string, r io.Reader, size int64) error {
	if s.held != nil && strings.Contains(name, "/three/") {
		<-s.held
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if int64(len(b)) != size {
		return errors.New("another size than announced")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.objects[name]; ok {
		if !bytes.Equal(old, b) {
			s.refused = append(s.refused, name)
			return auditlog.ErrExists
		}
		return nil
	}
	s.objects[name] = b
	if s.tape != nil {
		return s.tape.add(op{kind: "put", name: name, data: b}, func() error { return nil })
	}
	return nil
}

func (s *shelf) source() memory {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := make(memory)
	for name, b := range s.objects {
		m[name] = b
	}
	return m
}

// after plays the first k operations of a tape on a disk that held these files.
func after(held map[string][]byte, ops []op, k int) (*platter, *shelf, map[string]int) {
	p := &platter{files: make(map[int]*plate)}
	p.names = namesOf(held)
	for name, b := range held {
		p.files[p.names[name]] = &plate{durable: b}
	}
	s := &shelf{objects: make(map[string][]byte)}
	promised := make(map[string]int)
	for _, o := range ops[:k] {
		switch o.kind {
		case "put":
			s.objects[o.name] = o.data
		case "mark":
			for id, n := range o.mark {
				promised[id] = n
			}
		default:
			p.play(o)
		}
	}
	return p, s, promised
}

// tapeOf is a tape for a disk that holds these files.
func tapeOf(root string, held map[string][]byte) *tape {
	t := newTape(root)
	t.names = namesOf(held)
	return t
}

// namesOf numbers files from -1 down, and gives their directories, too.
func namesOf(held map[string][]byte) map[string]int {
	names := make(map[string]int)
	for i, name := range sortedNames(held) {
		names[name] = -i - 1
		if dir := filepath.Dir(name); dir != "." {
			names[dir] = 0
		}
	}
	return names
}

func sortedNames(m map[string][]byte) []string {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func writeSpool(t *testing.T, dir string, spool map[string][]byte) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o700))
	for name, b := range spool {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700))
		must(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
}
