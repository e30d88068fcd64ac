package tlog

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	merkle "golang.org/x/mod/sumdb/tlog"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))

// hashes is a store of hashes as x/mod's own code keeps them, to compare with.
type hashes []merkle.Hash

func (h hashes) ReadHashes(at []int64) ([]merkle.Hash, error) {
	out := make([]merkle.Hash, len(at))
	for i, n := range at {
		out[i] = h[n]
	}
	return out, nil
}

// The tree, its tiles and its names are those of another implementation, at every size.
func TestTree(t *testing.T) {
	var tree Tree
	var all hashes
	tiles := make(map[string][]byte)
	var entries [][]byte
	const size = 2*tileWidth*tileWidth + 700 // two tiles of level 1
	for n := range int64(size) {
		e := fmt.Appendf(nil, "entry %d", n)
		entries = append(entries, e)
		h, err := merkle.StoredHashes(n, e, all)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, h...)
		for _, o := range tree.Append("p/", e) {
			if tiles[o.Name] != nil {
				t.Fatalf("tile %s twice", o.Name)
			}
			tiles[o.Name] = o.Bytes
		}
		if n < 1000 || n%997 == 0 || n == size-1 {
			want, err := merkle.TreeHash(n+1, all)
			if err != nil {
				t.Fatal(err)
			}
			if tree.Root() != want {
				t.Fatalf("size %d: another root", n+1)
			}
			if err := tree.check(); err != nil {
				t.Fatalf("size %d: %v", n+1, err)
			}
		}
	}
	if empty := (&Tree{}).Root(); empty.String() != "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=" { // SHA-256 of nothing
		t.Error("empty tree:", empty)
	}
	want := 0
	for level := 0; size>>(8*(level+1)) > 0; level++ {
		for n := range int64(size >> (8 * (level + 1))) {
			b, err := merkle.ReadTileData(merkle.Tile{H: 8, L: level, N: n, W: tileWidth}, all)
			if err != nil {
				t.Fatal(err)
			}
			name := fmt.Sprintf("p/%s", strings.Replace(merkle.Tile{H: 8, L: level, N: n, W: tileWidth}.Path(), "tile/8/", "tile/", 1))
			if !bytes.Equal(tiles[name], b) {
				t.Errorf("tile %s differs", name)
			}
			want++
			if level > 0 {
				continue
			}
			bundle, err := ParseBundle(tiles[EntriesName("p/", n)])
			if err != nil || !bytes.Equal(bundle[17], entries[n*tileWidth+17]) {
				t.Errorf("bundle %d: %v", n, err)
			}
			want++
		}
	}
	if want != len(tiles) || want < 2*514 {
		t.Errorf("%d tiles, want %d", len(tiles), want)
	}
}

func TestNames(t *testing.T) {
	for _, s := range []string{"tlog/g/l/checkpoint/00000000", "tlog/g/l/checkpoint/99999999", "tlog/g/l/tile/0/000", "tlog/g/l/tile/1/x001/234",
		"tlog/g/l/tile/entries/x001/x234/067"} {
		n, err := ParseName(s)
		if err != nil || n.String() != s || n.Dir() != "tlog/g/l/" {
			t.Errorf("%s: %v %v", s, n, err)
		}
	}
	for _, s := range []string{"", "tlog/", "tlog/g/l/checkpoint/1", "tlog/g/l/checkpoint/+0000001", "tlog/g/l/tile/0/1", "tlog/g/l/tile/00/001",
		"tlog/g/l/tile/0/x000/001", "tlog/g/l/tile/0/001.p/3", "tlog/g/../checkpoint/00000000", "tlog/g/l/tile/9/001", "tlog/g/l/checkpoint/00000000/x",
		"tlog/g l/l/tile/0/000", "x/g/l/tile/0/000", "tlog/g/l/tile/entries/" + strings.Repeat("x001/", 30) + "001"} {
		if n, err := ParseName(s); err == nil {
			t.Errorf("%q: taken as %v", s, n)
		}
	}
}

// spool is what a gate's spool does with objects.
type spool struct {
	mu      sync.Mutex
	objects map[string][]byte
	order   map[string]string
	fail    error
	busy    bool
}

func (s *spool) put(queue string, number uint32, objects []Object) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, o := range objects {
		if s.fail != nil && i > 0 {
			return s.fail
		}
		if old, ok := s.objects[o.Name]; ok && !bytes.Equal(old, o.Bytes) {
			return errors.New("a name written twice with other bytes: " + o.Name)
		}
		place := fmt.Sprint(queue, number+uint32(i))
		if old, ok := s.order[place]; ok && old != o.Name {
			return errors.New("a number taken twice")
		}
		s.objects[o.Name], s.order[place] = o.Bytes, o.Name
	}
	return s.fail // the first is there all the same
}

func newSpool() *spool {
	return &spool{objects: make(map[string][]byte), order: make(map[string]string)}
}

func (s *spool) config(dir string, key crypto.Signer) Config {
	return Config{Dir: dir, Disk: osDisk{}, Gate: "gate-1", Signer: key, Beat: time.Minute, Delay: time.Millisecond, Put: s.put,
		Busy: func(string) bool { return s.busy }, Slog: slog.New(slog.DiscardHandler)}
}

func open(t *testing.T, s *spool, dir string) *Log {
	t.Helper()
	l, err := Open(s.config(dir, testKey))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// replay reads all checkpoints of a log, and gives its leaves.
func (s *spool) replay(t *testing.T, prefix string) []string {
	t.Helper()
	var tree Tree
	var leaves []string
	for n := uint32(0); ; n++ {
		b, ok := s.objects[CheckpointName(prefix, n)]
		if !ok {
			return leaves
		}
		c, err := ParseCheckpoint(b)
		must(t, err)
		if c.Number != n || c.Old != tree.Size {
			t.Fatalf("checkpoint %d: number %d, from %d, want %d", n, c.Number, c.Old, tree.Size)
		}
		for _, e := range c.Entries {
			for _, o := range tree.Append(prefix, e) {
				if !bytes.Equal(s.objects[o.Name], o.Bytes) {
					t.Errorf("tile %s is not there", o.Name)
				}
			}
			leaves = append(leaves, string(e))
		}
		if tree.Root() != c.Root {
			t.Fatalf("checkpoint %d: wrong root", n)
		}
	}
}

func TestLog(t *testing.T) {
	dir, s := t.TempDir(), newSpool()
	l := open(t, s, dir)
	prefix := Dir(l.state.Gate, l.state.Log)
	must(t, l.Cut())
	var want []string
	add := func(n int) {
		t.Helper()
		for range n {
			e := fmt.Sprintf("leaf %d", len(want))
			must(t, l.Add([]byte(e)))
			want = append(want, e)
		}
	}
	add(3)
	must(t, l.Cut())
	must(t, l.Cut()) // with nothing to say
	add(300)
	must(t, l.Close(false)) // says the last
	l = open(t, s, dir)
	if Dir(l.state.Gate, l.state.Log) != prefix {
		t.Fatal("a new log was begun")
	}
	add(MaxCheckpointEntries + 10)
	must(t, l.Cut())
	if got := s.replay(t, prefix); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%d leaves, want %d", len(got), len(want))
	}
	s.busy = true
	number := l.state.Number
	must(t, l.Cut())
	if l.state.Number != number {
		t.Error("spoke without leaves while many objects wait")
	}
	add(1)
	must(t, l.Cut())
	if l.state.Number != number+1 {
		t.Error("did not speak with a leaf while many objects wait")
	}
	must(t, l.Close(false))
	if err := l.Add([]byte("x")); err == nil {
		t.Error("a closed log took a leaf")
	}
}

// A log that is closed says so in its last checkpoint, whatever waited, and goes on when it is opened again. One that is closed with
// logs still in the spool does not say it.
func TestClosed(t *testing.T) {
	for what, c := range map[string]struct {
		leaves  int
		pending bool // a checkpoint was made and not handed on
		busy    bool
		all     bool
		want    []bool // Closed, of the checkpoints after the first
	}{
		"no leaves":               {0, false, false, true, []bool{true}},
		"leaves":                  {3, false, false, true, []bool{true}},
		"more than fit into one":  {MaxCheckpointEntries + 1, false, false, true, []bool{false, true}},
		"as many as fit into one": {MaxCheckpointEntries, false, false, true, []bool{true}},
		"one pending":             {1, true, false, true, []bool{false, true}},
		"many wait":               {0, false, true, true, []bool{true}},
		"not all":                 {3, false, false, false, []bool{false}},
		"not all, no leaves":      {0, false, false, false, nil},
	} {
		t.Run(what, func(t *testing.T) {
			dir, s := t.TempDir(), newSpool()
			l := open(t, s, dir)
			prefix := Dir(l.state.Gate, l.state.Log)
			must(t, l.Cut())
			for n := range c.leaves {
				l.entries = append(l.entries, fmt.Appendf(nil, "leaf %d", n)) // Add syncs each
			}
			must(t, l.rewriteWaiting())
			if c.pending {
				s.fail = errors.New("disk full")
				if err := l.Cut(); !errors.Is(err, s.fail) {
					t.Fatal(err)
				}
				s.fail = nil
			}
			s.busy = c.busy
			must(t, l.Close(c.all))
			closed := func() (all []bool) {
				t.Helper()
				if got := s.replay(t, prefix); len(got) != c.leaves {
					t.Errorf("%d leaves, want %d", len(got), c.leaves)
				}
				for n := uint32(1); ; n++ {
					b, ok := s.objects[CheckpointName(prefix, n)]
					if !ok {
						return all
					}
					cp, err := ParseCheckpoint(b)
					must(t, err)
					all = append(all, cp.Closed)
				}
			}
			if got := closed(); fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("closed: %v, want %v", got, c.want)
			}
			s.busy = false
			l = open(t, s, dir)
			must(t, l.Cut())
			if got := closed(); fmt.Sprint(got) != fmt.Sprint(append(c.want, false)) {
				t.Errorf("opened again: %v", got)
			}
			must(t, l.Close(false))
		})
	}
}

// What the first version wrote is read, and is what is written where a log is not closed. One that is closed has a line more.
func TestCheckpointSample(t *testing.T) {
	const was = "sallyport checkpoint v1\nold 1\nleaf YWJjZA==\n\nsallyport/g/l\n2\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n" +
		"number 3\ntime 2026-03-01T12:00:00.000000005Z\nkey 6kpsY+KcUgq+9VB7Ey7F+ZVHdq6+vnuSQh7qaRRG0iw=\n\n" +
		"— sallyport/g/l TnF44Ao+JD02VOhJDHh1wITePv1FFQMKV4ZbeRGgxTTvqit8OGwN/YMEjw5+72v6G3rV+YsbO1THiVQ8/g2mhVxemwQ=\n"
	c := &Checkpoint{Gate: "g", Log: "l", Number: 3, Time: time.Date(2026, 3, 1, 12, 0, 0, 5, time.UTC), Old: 1, Size: 2, Root: (&Tree{}).Root(),
		Entries: [][]byte{[]byte("abcd")}}
	must(t, c.Sign(testKey))
	b, err := c.Encode()
	must(t, err)
	if string(b) != was {
		t.Errorf("%q", b)
	}
	if _, err := ParseCheckpoint([]byte(was)); err != nil {
		t.Error(err)
	}
	c.Closed = true
	must(t, c.Sign(testKey))
	b, err = c.Encode()
	must(t, err)
	again, err := ParseCheckpoint(b)
	must(t, err)
	if !again.Closed || !strings.Contains(string(b), "\nclosed\n\n— ") {
		t.Errorf("%q", b)
	}
	for what, s := range map[string]string{
		"mark added":       strings.Replace(was, "=\n\n—", "=\nclosed\n\n—", 1),
		"mark taken away":  strings.Replace(string(b), "closed\n", "", 1),
		"another mark":     strings.Replace(string(b), "closed\n", "broken\n", 1),
		"two marks":        strings.Replace(string(b), "closed\n", "closed\nclosed\n", 1),
		"an empty line":    strings.Replace(string(b), "closed\n", "\n", 1),
		"mark elsewhere":   strings.Replace(strings.Replace(string(b), "closed\n", "", 1), "number 3\n", "closed\nnumber 3\n", 1),
		"signature of was": string(b[:bytes.Index(b, []byte("— "))]) + was[strings.Index(was, "— "):],
	} {
		if _, err := ParseCheckpoint([]byte(s)); err == nil || s == was || s == string(b) {
			t.Errorf("%s: taken", what)
		}
	}
	// Signed by the gate's key, but no line that a gate writes.
	for _, line := range []string{"closed ", "broken", "Closed", "closed\nclosed"} {
		text := strings.Replace(c.text(), "closed\n", line+"\n", 1)
		v, err := verifier(c.Origin(), c.Key)
		must(t, err)
		sig := append(binary.BigEndian.AppendUint32(nil, v.KeyHash()), ed25519.Sign(testKey, []byte(text))...)
		b := []byte(text + "\n— " + c.Origin() + " " + base64.StdEncoding.EncodeToString(sig) + "\n")
		if _, err := ParseNote(b); err == nil {
			t.Errorf("%q: taken", line)
		}
	}
}

// Run speaks at once, after a leaf, and at each beat.
func TestRun(t *testing.T) {
	s := newSpool()
	cfg := s.config(t.TempDir(), testKey)
	cfg.Beat = 20 * time.Millisecond
	l, err := Open(cfg)
	must(t, err)
	prefix := Dir(l.state.Gate, l.state.Log)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); l.Run(ctx) }()
	await := func(n uint32, leaf string) {
		t.Helper()
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
			s.mu.Lock()
			b := s.objects[CheckpointName(prefix, n)]
			all := fmt.Sprintf("%q", s.objects)
			s.mu.Unlock()
			if b != nil && strings.Contains(all, leaf) {
				return
			}
		}
		t.Fatalf("no checkpoint %d", n)
	}
	await(0, "")
	await(3, "")
	must(t, l.Add([]byte("abc")))
	await(4, "leaf YWJj")
	cancel()
	<-done
	must(t, l.Close(false))
}

// A crash at any moment loses no leaf that Add has taken, and never writes a name with other bytes. A crash is a copy of the state
// directory after each step that changes it.
func TestCrash(t *testing.T) {
	for _, step := range []string{"added", "torn", "next written", "half spooled", "spooled", "renamed"} {
		t.Run(step, func(t *testing.T) {
			dir, s := t.TempDir(), newSpool()
			l := open(t, s, dir)
			prefix := Dir(l.state.Gate, l.state.Log)
			want := []string{"a", "b"}
			must(t, l.Add([]byte("a")))
			must(t, l.Cut())
			must(t, l.Add([]byte("b")))
			crashed := errors.New("crash")
			switch step {
			case "torn":
				f, err := os.OpenFile(filepath.Join(dir, waitFile), os.O_WRONLY|os.O_APPEND, 0)
				must(t, err)
				_, err = f.WriteString(`{"log":"x","ind`)
				must(t, errors.Join(err, f.Close()))
			case "next written": // but nothing spooled
				l.cfg.Put = func(string, uint32, []Object) error { return crashed }
			case "half spooled":
				for range 255 { // so that there are tiles
					must(t, l.Add([]byte("c")))
					want = append(want, "c")
				}
				s.fail = crashed
			}
			switch step {
			case "next written", "half spooled":
				if err := l.Cut(); !errors.Is(err, crashed) {
					t.Fatal(err)
				}
			case "spooled":
				before, err := os.ReadFile(filepath.Join(dir, stateFile))
				must(t, err)
				must(t, l.Cut())
				after, err := os.ReadFile(filepath.Join(dir, stateFile))
				must(t, err)
				must(t, os.WriteFile(filepath.Join(dir, nextFile), after, 0o600))
				must(t, os.WriteFile(filepath.Join(dir, stateFile), before, 0o600))
				must(t, os.WriteFile(filepath.Join(dir, waitFile), []byte(`{"log":"`+l.state.Log+`","index":1,"entry":"Yg=="}`+"\n"), 0o600))
			case "renamed": // waitFile not yet written anew
				must(t, l.Cut())
				must(t, os.WriteFile(filepath.Join(dir, waitFile), []byte(`{"log":"`+l.state.Log+`","index":1,"entry":"Yg=="}`+"\n"), 0o600))
			}
			s.fail = nil
			l = open(t, s, dir)
			if Dir(l.state.Gate, l.state.Log) != prefix {
				t.Fatal("a new log was begun")
			}
			must(t, l.Add([]byte("z")))
			want = append(want, "z")
			must(t, l.Cut())
			if got := s.replay(t, prefix); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("leaves %.200q, want %.200q", got, want)
			}
			must(t, l.Close(false))
		})
	}
}

// A failure that passes is made good with the same checkpoint; one of the signer takes no number.
func TestFailure(t *testing.T) {
	dir, s := t.TempDir(), newSpool()
	signer := &flaky{PrivateKey: testKey}
	l, err := Open(s.config(dir, signer))
	must(t, err)
	must(t, l.Add([]byte("a")))
	signer.err = errors.New("no card in the reader")
	if err := l.Cut(); !errors.Is(err, signer.err) || !errors.Is(l.Err(), signer.err) {
		t.Fatal(err, l.Err())
	}
	signer.err = nil
	s.fail = errors.New("disk full")
	if err := l.Cut(); !errors.Is(err, s.fail) {
		t.Fatal(err)
	}
	must(t, l.Add([]byte("b")))
	s.fail = nil
	must(t, l.Cut())
	must(t, l.Cut())
	if l.Err() != nil {
		t.Error(l.Err())
	}
	if got := s.replay(t, Dir(l.state.Gate, l.state.Log)); fmt.Sprint(got) != "[a b]" {
		t.Error(got)
	}
	signer.wrong = true
	if err := l.Cut(); err == nil || !strings.Contains(err.Error(), "does not verify") {
		t.Error("a wrong signature was taken:", err)
	}
	must(t, l.Close(false))
}

// A log is opened while nothing can be written, also with a checkpoint that was made and not handed on: it says so, takes no leaves
// until the disk is mended, and then goes on with that checkpoint.
func TestOpenFull(t *testing.T) {
	for _, pending := range []bool{false, true} {
		t.Run(fmt.Sprint(pending), func(t *testing.T) {
			dir, s := t.TempDir(), newSpool()
			l := open(t, s, dir)
			prefix := Dir(l.state.Gate, l.state.Log)
			must(t, l.Add([]byte("a")))
			must(t, l.Cut())
			must(t, l.Add([]byte("b")))
			full := errors.New("disk full")
			if pending {
				l.cfg.Put = func(string, uint32, []Object) error { return full }
				if err := l.Cut(); !errors.Is(err, full) {
					t.Fatal(err)
				}
				must(t, l.Add([]byte("c"))) // a leaf more than the checkpoint has
			}
			must(t, l.wait.Close())
			s.fail = full
			for _, name := range []string{waitFile, nextFile} { // no file can be made in the place of a directory
				must(t, os.Mkdir(filepath.Join(dir, name+".tmp"), 0o700))
			}
			l = open(t, s, dir)
			if l.Err() == nil || l.Add([]byte("x")) == nil || l.Cut() == nil || l.Err() == nil {
				t.Error("all is well, on a disk that is full")
			}
			for _, name := range []string{waitFile, nextFile} {
				must(t, os.Remove(filepath.Join(dir, name+".tmp")))
			}
			s.fail = nil
			must(t, l.Cut())
			must(t, l.Add([]byte("z")))
			must(t, l.Close(false))
			l = open(t, s, dir)
			want := "[a b z]"
			if pending {
				want = "[a b c z]"
			}
			if got := s.replay(t, prefix); fmt.Sprint(got) != want || len(l.entries) > 0 || Dir(l.state.Gate, l.state.Log) != prefix {
				t.Errorf("%s, want %s; %d wait", got, want, len(l.entries))
			}
			must(t, l.Close(false))
		})
	}
}

type flaky struct {
	ed25519.PrivateKey
	err   error
	wrong bool
}

func (f *flaky) Sign(_ io.Reader, message []byte, o crypto.SignerOpts) ([]byte, error) {
	if f.err != nil {
		return nil, f.err
	}
	sig, err := f.PrivateKey.Sign(nil, message, o)
	if f.wrong {
		sig[0] ^= 1
	}
	return sig, err
}

// Lost or damaged state begins a new log, and what waited goes there.
func TestLost(t *testing.T) {
	for _, damage := range []string{"lost", "flipped", "empty", "renamed gate"} {
		t.Run(damage, func(t *testing.T) {
			dir, s := t.TempDir(), newSpool()
			l := open(t, s, dir)
			old := l.Origin()
			must(t, l.Add([]byte("a")))
			must(t, l.Cut())
			must(t, l.Add([]byte("b")))
			must(t, l.wait.Close())
			cfg := s.config(dir, testKey)
			file := filepath.Join(dir, stateFile)
			b, err := os.ReadFile(file)
			must(t, err)
			switch damage {
			case "lost":
				must(t, os.Remove(file))
			case "flipped":
				b[len(b)/2] ^= 1
				must(t, os.WriteFile(file, b, 0o600))
			case "empty":
				must(t, os.WriteFile(file, nil, 0o600))
			case "renamed gate":
				cfg.Gate = "gate-2"
			}
			l, err = Open(cfg)
			must(t, err)
			if l.Origin() == old {
				t.Fatal("the old log goes on")
			}
			must(t, l.Cut())
			if got := s.replay(t, Dir(l.state.Gate, l.state.Log)); fmt.Sprint(got) != "[b]" {
				t.Error(got)
			}
			must(t, l.Close(false))
		})
	}
}

// What a power cut makes of lines that were not synced ends no log: what was promised is in the lines before them.
func TestTorn(t *testing.T) {
	line := func(l *Log, index int64, entry string) string { return string(l.line(index, []byte(entry))) }
	for damage, c := range map[string]struct {
		after func(l *Log) string // the lines of a, which is in the tree, and b
		want  string
	}{
		"one is lost":         {func(l *Log) string { return line(l, 3, "d") }, "[a b d z]"},
		"zeros":               {func(l *Log) string { return string(make([]byte, 100)) + "\n" + line(l, 3, "d") }, "[a b d z]"},
		"zeros without end":   {func(*Log) string { return string(make([]byte, 1<<20)) }, "[a b z]"},
		"a line without end":  {func(l *Log) string { return line(l, 2, strings.Repeat("c", 1<<20)) }, "[a b z]"},
		"the end of another":  {func(l *Log) string { return line(l, 2, "c")[10:] + line(l, 3, "d") }, "[a b d z]"},
		"only one line feed":  {func(*Log) string { return "\n" }, "[a b z]"},
		"without a line feed": {func(l *Log) string { return strings.TrimSpace(line(l, 2, "c")) }, "[a b c z]"},
	} {
		t.Run(damage, func(t *testing.T) {
			dir, s := t.TempDir(), newSpool()
			l := open(t, s, dir)
			prefix := Dir(l.state.Gate, l.state.Log)
			must(t, l.Add([]byte("a")))
			must(t, l.Cut())
			must(t, l.wait.Close())
			lines := line(l, 0, "a") + line(l, 1, "b") + c.after(l)
			must(t, os.WriteFile(filepath.Join(dir, waitFile), []byte(lines), 0o600))
			l = open(t, s, dir)
			must(t, l.Add([]byte("z")))
			must(t, l.Close(false))
			if got := s.replay(t, prefix); fmt.Sprint(got) != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}

// A crash while a new log begins loses no leaf that waited, whichever name the gate has after it.
func TestLostTwice(t *testing.T) {
	for _, gate := range []string{"gate-1", "gate-2"} {
		dir, s := t.TempDir(), newSpool()
		l := open(t, s, dir)
		must(t, l.Add([]byte("a")))
		must(t, l.Cut())
		must(t, l.Add([]byte("b")))
		must(t, l.wait.Close())
		cfg := s.config(dir, testKey)
		cfg.Gate = "gate-2"
		for _, name := range []string{waitFile, stateFile} { // in the order in which they are written
			must(t, os.Mkdir(filepath.Join(dir, name+".tmp"), 0o700)) // where the crash comes
			if _, err := Open(cfg); err == nil {
				t.Fatal("no crash at", name)
			}
			must(t, os.Remove(filepath.Join(dir, name+".tmp")))
		}
		cfg.Gate = gate
		l, err := Open(cfg)
		must(t, err)
		must(t, l.Cut())
		want := map[string]string{"gate-1": "[a b]", "gate-2": "[b]"}[gate]
		if got := s.replay(t, Dir(l.state.Gate, l.state.Log)); fmt.Sprint(got) != want {
			t.Errorf("%s: %s, want %s", gate, got, want)
		}
		must(t, l.Close(false))
	}
}

// Every byte of a checkpoint's object counts, also those that base64 does not need.
func TestFlipped(t *testing.T) {
	for _, closed := range []bool{false, true} {
		flipped(t, &Checkpoint{Gate: "g", Log: "l", Number: 3, Time: time.Unix(1, 5).UTC(), Old: 1, Size: 3, Closed: closed,
			Entries: [][]byte{[]byte("abcd"), {}}})
	}
}

func flipped(t *testing.T, c *Checkpoint) {
	must(t, c.Sign(testKey))
	b, err := c.Encode()
	must(t, err)
	if _, err := ParseCheckpoint(b); err != nil {
		t.Fatal(err)
	}
	n, err := c.Note()
	must(t, err)
	if notes, err := ParseNotes(append(append([]byte(nil), n...), append([]byte("\n"), n...)...)); err != nil || len(notes) != 2 || notes[1].Number != 3 {
		t.Error("notes:", err)
	}
	text := len(b) - len(n)
	for i := range b {
		for bit := range 8 {
			flipped := bytes.Clone(b)
			flipped[i] ^= 1 << bit
			got, err := ParseCheckpoint(flipped)
			// The lines before the note are not signed: the tree's root commits to them.
			if err == nil && (i >= text || got.Old == c.Old && bytes.Equal(got.Entries[0], c.Entries[0])) {
				t.Fatalf("byte %d, bit %d: taken", i, bit)
			}
		}
	}
	for n := range b {
		if _, err := ParseCheckpoint(b[:n]); err == nil {
			t.Fatalf("cut at %d: taken", n)
		}
	}
	if _, err := ParseCheckpoint(append(bytes.Clone(b), '\n')); err == nil {
		t.Error("with one byte more: taken")
	}
}

func FuzzCheckpoint(f *testing.F) {
	c := &Checkpoint{Gate: "g", Log: "l", Number: 3, Time: time.Unix(1, 5).UTC(), Old: 1, Size: 2, Entries: [][]byte{[]byte("abcd")}}
	if err := c.Sign(testKey); err != nil {
		f.Fatal(err)
	}
	b, _ := c.Encode()
	n, _ := c.Note()
	f.Add(b)
	f.Add(n)
	c.Closed = true
	if err := c.Sign(testKey); err != nil {
		f.Fatal(err)
	}
	b, _ = c.Encode()
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := ParseCheckpoint(b); err == nil {
			again, err := c.Encode()
			if err != nil || !bytes.Equal(again, b) {
				t.Error("what was read is not what would be written")
			}
		}
		if notes, err := ParseNotes(b); err == nil {
			for _, c := range notes {
				if _, err := c.Note(); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

func FuzzBundle(f *testing.F) {
	var entries [][]byte
	for i := range tileWidth {
		entries = append(entries, make([]byte, i))
	}
	f.Add(appendBundle(nil, entries))
	f.Fuzz(func(t *testing.T, b []byte) {
		if entries, err := ParseBundle(b); err == nil && !bytes.Equal(appendBundle(nil, entries), b) {
			t.Error("what was read is not what would be written")
		}
	})
}

func FuzzName(f *testing.F) {
	f.Add("tlog/g/l/checkpoint/00000012")
	f.Add("tlog/g/l/tile/entries/x001/234")
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseName(s); err == nil && n.String() != s {
			t.Errorf("%q is %q", s, n.String())
		}
	})
}

// FuzzState reads state files: they are the gate's own, but a disk may do anything to them.
func FuzzState(f *testing.F) {
	tree := &Tree{}
	for range 300 {
		tree.Append("p/", []byte("e"))
	}
	b, err := encodeState(&state{Gate: "g", Log: "l", Tree: tree})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[65:])
	f.Fuzz(func(t *testing.T, body []byte) {
		b, err := encodeRaw(body)
		if err != nil {
			t.Skip()
		}
		if s, err := decodeState(b); err == nil {
			s.Tree.Append("p/", []byte("e"))
			s.Tree.Root()
		}
	})
}

// encodeRaw puts the hash before a body, as encodeState does.
func encodeRaw(body []byte) ([]byte, error) {
	sum := sha256.Sum256(body)
	return append(append([]byte(hex.EncodeToString(sum[:])), '\n'), body...), nil
}
