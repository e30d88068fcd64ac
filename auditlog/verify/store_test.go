package verify_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/tlog"
	"github.com/sallyport/sallyport/auditlog/verify"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func key(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func public(seed byte) ed25519.PublicKey { return key(seed).Public().(ed25519.PublicKey) }

// store is a store in memory, whose objects came long ago, or when it says.
type store struct {
	mu   sync.Mutex
	m    map[string][]byte
	came time.Time // of all objects; zero: long ago
}

func newStore() *store { return &store{m: make(map[string][]byte)} }

func (s *store) Put(_ context.Context, name string, r io.Reader, size int64) error {
	b, err := io.ReadAll(r)
	if err != nil || int64(len(b)) != size {
		return fmt.Errorf("%d of %d bytes: %w", len(b), size, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.m[name]; ok && !bytes.Equal(old, b) {
		return auditlog.ErrExists
	}
	s.m[name] = b
	return nil
}

func (s *store) List(_ context.Context, prefix string) iter.Seq2[auditlog.Object, error] {
	s.mu.Lock()
	names, came := slices.Sorted(maps.Keys(s.m)), s.came
	s.mu.Unlock()
	if came.IsZero() {
		came = time.Unix(1, 0)
	}
	return func(yield func(auditlog.Object, error) bool) {
		for _, n := range names {
			s.mu.Lock()
			size := int64(len(s.m[n]))
			s.mu.Unlock()
			if strings.HasPrefix(n, prefix) && !yield(auditlog.Object{Name: n, Size: size, Modified: came}, nil) {
				return
			}
		}
	}
}

func (s *store) Open(_ context.Context, name string) (io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.m[name]
	if !ok {
		return nil, fmt.Errorf("open %s: %w", name, fs.ErrNotExist)
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// names are those of the objects that contain part, in order.
func (s *store) names(part string) []string {
	var names []string
	for _, n := range slices.Sorted(maps.Keys(s.m)) {
		if strings.Contains(n, part) {
			names = append(names, n)
		}
	}
	return names
}

func (s *store) clone() *store { return &store{m: maps.Clone(s.m), came: s.came} }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// gate is a gate's log with its directories.
type gate struct {
	t     testing.TB
	dir   string
	store auditlog.Store
	key   byte
	name  string // "": gate-1

	noTree     bool
	index      bool
	indexAge   time.Duration
	indexClear []string
	recipients []string
	*auditlog.Log
}

func (g *gate) open() {
	g.t.Helper()
	tree := filepath.Join(g.dir, "tlog")
	if g.noTree {
		tree = ""
	}
	l, err := auditlog.Open(context.Background(), auditlog.Config{Spool: filepath.Join(g.dir, "spool"), Tree: tree,
		SegmentBytes: 4 << 10, SegmentAge: time.Minute, SyncInterval: time.Millisecond, Codec: "none", CheckpointInterval: time.Minute, Index: g.index, IndexAge: g.indexAge, IndexClear: g.indexClear, Recipients: g.recipients}, key(g.key), g.store,
		cmp.Or(g.name, "gate-1"),
		slog.New(slog.DiscardHandler))
	must(g.t, err)
	g.Log = l
}

// begun waits until the store has the gate's key and its first checkpoint.
func (g *gate) begun() {
	g.t.Helper()
	for end := time.Now().Add(time.Minute); g.Stats().Waiting > 0 || g.Stats().Stored < 2; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			g.t.Fatal("its key and its first checkpoint are not stored")
		}
	}
}

func (g *gate) close() {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	must(g.t, g.Log.Close(ctx))
}

// session writes a session with this many bytes of output.
func (g *gate) session(id string, size int) {
	g.t.Helper()
	r := g.New(id)
	must(g.t, r.Record(0, &auditlog.Connect{Gate: "gate-1", Source: "192.0.2.7:4022"}))
	must(g.t, r.Begin())
	for i := 0; i < size; i += 1500 {
		must(g.t, r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: bytes.Repeat([]byte{byte(i), byte(i >> 8)}, min(size-i, 1500)/2)}))
		must(g.t, r.Sync(context.Background()))
	}
	must(g.t, r.Close(&auditlog.End{Cause: "client-left"}))
}

// kept is a store with sessions of one and of several segments, from two runs of a gate.
func kept(t testing.TB) *store {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
	g.open()
	g.session("s1", 100)
	g.session("s2", 9000)
	g.close()
	g.open()
	g.session("s3", 9000)
	g.session("s4", 10)
	g.close()
	return s
}

// check verifies a store and gives all that is wrong.
func check(t testing.TB, s auditlog.Source, o verify.Options) (verify.Summary, []string) {
	t.Helper()
	var wrong []string
	o.Log = func(r auditlog.Report) error {
		for _, p := range r.Problems {
			wrong = append(wrong, p.String())
		}
		if (len(r.Problems) > 0) != (r.State == auditlog.Damaged) {
			t.Errorf("%s is %s with %d problems", r.ID, r.State, len(r.Problems))
		}
		return nil
	}
	o.Tree = func(tr verify.Tree) error {
		for _, p := range tr.Problems {
			wrong = append(wrong, p.String())
		}
		return nil
	}
	o.Problem = func(p auditlog.Problem) error { wrong = append(wrong, p.String()); return nil }
	sum, err := verify.New(s, o).Store(context.Background())
	must(t, err)
	if sum.Damaged() != (len(wrong) > 0) {
		t.Errorf("damaged: %v, with %d problems", sum.Damaged(), len(wrong))
	}
	return sum, wrong
}

// newest gives the newest checkpoint of each log.
func newest(t testing.TB, s auditlog.Source) []*tlog.Checkpoint {
	t.Helper()
	sum, err := verify.New(s, verify.Options{}).Trees(context.Background())
	must(t, err)
	var all []*tlog.Checkpoint
	for _, tr := range sum.Trees {
		c, err := tlog.ParseNote(tr.Note)
		must(t, err)
		all = append(all, c)
	}
	return all
}

// awayStore is one that can be away.
type awayStore struct {
	*store
	away bool // by the store's lock
}

func (s *awayStore) set(away bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = away
}

func (s *awayStore) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	s.mu.Lock()
	away := s.away
	s.mu.Unlock()
	if away {
		return errors.New("away")
	}
	return s.store.Put(ctx, name, r, size)
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	must(t, os.CopyFS(to, os.DirFS(from)))
}
