package authz

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Bounds of a directory of data or policy.
const (
	maxFiles    = 500_000 // below one directory of the root, as all the others
	maxBytes    = 512 << 20
	maxNesting  = 16
	maxModule   = 1 << 20
	settleTime  = 150 * time.Millisecond // a file changed more recently may still be in the middle of being written
	racyTime    = 2 * time.Second        // within it, two writes may leave the same time and size
	dataSuffix  = ".json .yaml .yml"
	regoSuffix  = ".rego"
	maxProblems = 20 // of those Ready lists
)

// tree is a directory of files, each with its last good content. It is used by one goroutine at a time.
type tree struct {
	root     string
	suffixes []string
	load     func(f *file, text []byte) error // sets f.value; a *lineError says where it is wrong
	only     func(path []string) bool         // nil: all; else which data paths to read

	files  map[string]*file       // by name: slash separated, relative to root
	broken map[string]*file       // those of files that are not good as they are on disk
	order  []string               // names of files, sorted; nil: to be made
	size   map[string]extent      // of the last scan, by the name's first element
	dirs   map[string]fs.FileInfo // directories seen, by path as opened
	walk   []error                // what could not be looked at in the last scan
}

// extent is how much lies below a directory.
type extent struct {
	files int
	bytes int64
}

// file is one file of a tree.
type file struct {
	name string
	path []string // data path

	seen  fs.FileInfo // at the last read; nil: read again
	read  time.Time   // when that was
	good  bool        // sum and value hold the last good content
	sum   string      // SHA-256, hex
	value any
	bad   *FileError // what is wrong with the content now
}

// scan brings the tree up to date with the disk. dirty holds paths that are known to have changed. It returns whether
// anything good changed, and whether a file is so young that another scan is due after settleTime.
func (t *tree) scan(dirty map[string]bool, now time.Time) (changed, young bool) {
	found := make(map[string]bool, len(t.files))
	t.dirs, t.walk, t.size = make(map[string]fs.FileInfo), nil, make(map[string]extent)
	t.walkDir("", nil, func(name string, dataPath []string, info fs.FileInfo) {
		found[name] = true
		full := filepath.Join(t.root, filepath.FromSlash(name))
		c, y := t.look(name, dataPath, full, info, dirty[full], now)
		changed, young = changed || c, young || y
	})
	for name, f := range t.files {
		if !found[name] {
			if t.keep(name) {
				continue
			}
			changed = changed || f.good
			t.forget(name)
		}
	}
	return changed, young
}

// look reads a file that exists if it may have changed. The results are those of scan.
func (t *tree) look(name string, dataPath []string, full string, info fs.FileInfo, dirty bool, now time.Time) (
	changed, young bool) {
	f := t.files[name]
	if f == nil {
		f = &file{name: name, path: dataPath}
		t.files[name] = f
		t.order = nil
	}
	if f.seen != nil && !dirty && sameFile(f.seen, info) && f.read.Sub(f.seen.ModTime()) > racyTime {
		return false, false
	}
	// JSON cut short is never valid JSON; YAML and Rego may be, and mean something else.
	if age := now.Sub(info.ModTime()); f.seen != nil && age >= 0 && age < settleTime && path.Ext(name) != ".json" {
		return false, true
	}
	return t.reread(f, full, info, now), false
}

// touch is scan for exactly the paths that are known to have changed, which is what makes an edit in a very large tree
// quick. ok is false when only a whole scan can tell: a directory or a link came, went or moved.
func (t *tree) touch(dirty map[string]bool, now time.Time) (changed, young, ok bool) {
	for full := range dirty {
		if t.dirs[full] != nil {
			return false, false, false
		}
	}
	for full := range dirty {
		dir, base := filepath.Split(full)
		dir = filepath.Clean(dir)
		if t.dirs[dir] == nil {
			continue // another tree's
		}
		if strings.HasPrefix(base, ".") && !strings.HasPrefix(base, "..") {
			continue
		}
		rel, err := filepath.Rel(t.root, full)
		if err != nil {
			return changed, young, false
		}
		name := filepath.ToSlash(rel)
		wanted := slices.Contains(t.suffixes, path.Ext(base))
		info, err := os.Lstat(full)
		switch {
		case errors.Is(err, fs.ErrNotExist) && t.files[name] != nil:
			changed = changed || t.files[name].good
			t.forget(name)
		case errors.Is(err, fs.ErrNotExist) && !strings.HasPrefix(base, "."):
		case err == nil && info.Mode().IsRegular() && wanted:
			if t.files[name] == nil {
				if top, _, _ := strings.Cut(name, "/"); t.size[top].files >= maxFiles {
					return changed, young, false
				}
			}
			c, y := t.look(name, dataPathOf(name), full, info, true, now)
			changed, young = changed || c, young || y
		case err == nil && info.Mode().IsRegular():
		default:
			return changed, young, false
		}
	}
	return changed, young, true
}

// dataPathOf gives the data path of a file by its name: as in an OPA bundle, data.json is its directory's own content.
func dataPathOf(name string) []string {
	dataPath := strings.Split(name, "/")
	last := len(dataPath) - 1
	if stem := strings.TrimSuffix(dataPath[last], path.Ext(dataPath[last])); stem != "data" {
		dataPath[last] = stem
		return dataPath
	}
	return dataPath[:last]
}

func (t *tree) forget(name string) {
	delete(t.files, name)
	delete(t.broken, name)
	t.order = nil
}

// keep says whether a file that was not found may still be there, because its directory couldn't be read.
func (t *tree) keep(name string) bool {
	for _, err := range t.walk {
		var at *FileError
		if errors.As(err, &at) {
			dir, err := filepath.Rel(t.root, at.File)
			if err == nil && (dir == "." || strings.HasPrefix(name, filepath.ToSlash(dir)+"/")) {
				return true
			}
		}
	}
	return false
}

func sameFile(a, b fs.FileInfo) bool {
	return a.Size() == b.Size() && a.ModTime().Equal(b.ModTime()) && os.SameFile(a, b)
}

// reread reads a file and says whether its good content changed.
func (t *tree) reread(f *file, full string, info fs.FileInfo, now time.Time) bool {
	bad := func(line int, text string) bool {
		f.bad = &FileError{File: full, Line: line, Text: text}
		t.broken[f.name] = f
		return false
	}
	text, err := readFile(full)
	if err != nil {
		f.seen = nil
		if errors.Is(err, fs.ErrNotExist) { // removed since it was listed: the next scan forgets it
			return false
		}
		return bad(0, err.Error())
	}
	f.seen, f.read = info, now
	hash := sha256.Sum256(text)
	sum := hex.EncodeToString(hash[:])
	if f.good && sum == f.sum {
		f.bad = nil
		delete(t.broken, f.name)
		return false
	}
	old := f.value
	if err := t.load(f, text); err != nil {
		f.value = old
		var at *lineError
		if errors.As(err, &at) {
			return bad(at.line, at.text)
		}
		return bad(0, err.Error())
	}
	f.bad, f.good, f.sum = nil, true, sum
	delete(t.broken, f.name)
	return true
}

// readFile reads a regular file up to the largest size allowed. It never blocks on a FIFO.
func readFile(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|openNonblock, 0)
	if err != nil {
		return nil, bare(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, bare(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	text, err := io.ReadAll(io.LimitReader(f, maxJSON+1))
	if err != nil {
		return nil, bare(err)
	}
	if len(text) > maxJSON {
		return nil, fmt.Errorf("larger than %d MiB", maxJSON>>20)
	}
	return text, nil
}

// bare drops the file's name from an error that is told with it anyway.
func bare(err error) error {
	var at *fs.PathError
	if errors.As(err, &at) {
		return at.Err
	}
	return err
}

// walkDir calls visit for each file below dir. Names that begin with a dot are left out, as are the hidden directories
// in which Kubernetes keeps what a mounted ConfigMap's links point to; links are followed, also to directories.
func (t *tree) walkDir(dir string, above []fs.FileInfo, visit func(string, []string, fs.FileInfo)) {
	full := filepath.Join(t.root, filepath.FromSlash(dir))
	fail := func(text string) { t.walk = append(t.walk, &FileError{File: full, Text: text}) }
	self, err := os.Stat(full)
	if err != nil {
		switch {
		case !errors.Is(err, fs.ErrNotExist):
			fail(bare(err).Error())
		case dir == "":
			t.walk = []error{fmt.Errorf("%s: %w", full, errGone)}
		}
		return
	}
	if !self.IsDir() {
		fail("not a directory")
		return
	}
	for _, parent := range above {
		if os.SameFile(parent, self) {
			fail("a link leads back to a directory above it")
			return
		}
	}
	if len(above) == maxNesting {
		fail(fmt.Sprintf("directories are nested deeper than %d", maxNesting))
		return
	}
	entries, err := os.ReadDir(full)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			fail(bare(err).Error())
		}
		return
	}
	t.dirs[full] = self
	above = append(slices.Clone(above), self)
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), ".") {
			continue
		}
		name := path.Join(dir, entry.Name())
		entryPath := filepath.Join(full, entry.Name())
		isDir := entry.IsDir()
		wanted := slices.Contains(t.suffixes, path.Ext(entry.Name()))
		if !isDir && entry.Type()&fs.ModeSymlink == 0 && !wanted {
			continue
		}
		info, err := os.Stat(entryPath)
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				t.walk = append(t.walk, &FileError{File: entryPath, Text: bare(err).Error()})
			}
			continue
		}
		if info.IsDir() {
			if t.only == nil || t.only(strings.Split(name, "/")) {
				t.walkDir(name, above, visit)
			}
			continue
		}
		if !wanted {
			continue
		}
		below := dataPathOf(name)
		if t.only != nil && !t.only(below) {
			continue
		}
		top, _, _ := strings.Cut(name, "/")
		size := extent{t.size[top].files + 1, t.size[top].bytes + info.Size()}
		if size.files > maxFiles || size.bytes > maxBytes {
			fail(fmt.Sprintf("more than %d files or %d MiB below %s", maxFiles, maxBytes>>20, top))
			return
		}
		t.size[top] = size
		visit(name, below, info)
	}
}

// errGone says that the data directory itself is missing: then all data is gone.
var errGone = errors.New("the directory is missing: create it, or correct the setting")

// problems lists what is wrong in the tree, in the order of the files.
func (t *tree) problems() []error {
	problems := slices.Clone(t.walk)
	for _, name := range slices.Sorted(maps.Keys(t.broken)) {
		problems = append(problems, t.broken[name].bad)
	}
	return problems
}

func newTree(root string, load func(*file, []byte) error, suffixes ...string) *tree {
	return &tree{root: root, suffixes: suffixes, load: load, files: map[string]*file{}, broken: map[string]*file{}}
}

// newDataTree gives the tree of a data directory.
func newDataTree(root string) *tree {
	return newTree(root, loadData, strings.Fields(dataSuffix)...)
}

func loadData(f *file, text []byte) error {
	doc, err := parse(f.name, text)
	if err != nil {
		return err
	}
	if len(f.path) == 0 {
		if _, ok := doc.value.(map[string]any); !ok {
			return &lineError{line: 1, text: "an object is expected here"}
		}
	}
	if err := checkData(f.path, doc.value); err != nil {
		return &lineError{line: doc.line(err.path), text: err.Error()}
	}
	f.value = doc.value
	return nil
}

// mergeDepth is to which level files can add to the same object: users/ and profiles/ hold whole entries, a user's
// grants may come from several files.
func mergeDepth(root string) int {
	switch root {
	case "users", "profiles":
		return 1
	case "grants", "group_grants":
		return 2
	}
	return maxDepth + maxNesting
}

// merged is one document made of all good files.
type merged struct {
	data      map[string]any
	sums      map[string]string // SHA-256 of each file in it, by name
	conflicts []error           // files left out, because they give what another file gave before them
}

// merge makes one document of all good files, in the order of their names.
func (t *tree) merge() merged {
	m := merged{data: map[string]any{}, sums: make(map[string]string, len(t.files))}
	if t.order == nil {
		t.order = slices.Sorted(maps.Keys(t.files))
	}
	for _, name := range t.order {
		f := t.files[name]
		if !f.good {
			continue
		}
		if twice := add(m.data, f.path, f.value); twice != nil {
			m.conflicts = append(m.conflicts, &FileError{File: filepath.Join(t.root, filepath.FromSlash(name)),
				Text: fmt.Sprintf("data.%s is already given by another file; remove one of them",
					Printable(strings.Join(twice, "."), 200))})
			continue
		}
		m.sums[name] = f.sum
	}
	return m
}

// add adds a value at a path, or gives the path at which it can't be merged and adds nothing.
func add(data map[string]any, path []string, value any) (twice []string) {
	into, depth := data, maxDepth
	for level, element := range path {
		if level == 0 {
			depth = mergeDepth(element)
		}
		if level == len(path)-1 {
			from := map[string]any{element: value}
			if twice := conflict(into, from, level, depth, path[:level]); twice != nil {
				return twice
			}
			graft(into, from, level, depth)
			return nil
		}
		old, exists := into[element]
		if !exists {
			old = map[string]any{}
			into[element] = old
		}
		below, ok := old.(map[string]any)
		if !ok || level+1 > depth {
			return path[:level+1]
		}
		into = below
	}
	from, _ := value.(map[string]any) // an empty path holds an object: loadData
	if twice := conflict(data, from, 0, depth, nil); twice != nil {
		return twice
	}
	graft(data, from, 0, depth)
	return nil
}

// conflict gives the first path that both objects hold and that can't be merged.
func conflict(into, from map[string]any, level, depth int, at []string) []string {
	for _, name := range slices.Sorted(maps.Keys(from)) {
		old, exists := into[name]
		if !exists {
			continue
		}
		here := append(slices.Clone(at), name)
		if level == 0 {
			depth = mergeDepth(name)
		}
		oldObject, ok1 := old.(map[string]any)
		newObject, ok2 := from[name].(map[string]any)
		if !ok1 || !ok2 || level+1 > depth {
			return here
		}
		if twice := conflict(oldObject, newObject, level+1, depth, here); twice != nil {
			return twice
		}
	}
	return nil
}

// graft adds from to into. Objects that a later file may add to are copied: a file's own value never changes.
func graft(into, from map[string]any, level, depth int) {
	for name, value := range from {
		if level == 0 {
			depth = mergeDepth(name)
		}
		object, ok := value.(map[string]any)
		if !ok || level+1 > depth {
			into[name] = value
			continue
		}
		below, ok := into[name].(map[string]any)
		if !ok {
			below = make(map[string]any, len(object))
			into[name] = below
		}
		graft(below, object, level+1, depth)
	}
}
