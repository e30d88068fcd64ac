package auditlog_test

import (
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/tlog"
	verifier "github.com/sallyport/sallyport/auditlog/verify"
)

// soakEnv asks for the long form of tests (make soak).
const soakEnv = "SALLYPORT_SOAK"

func soaking() bool { return os.Getenv(soakEnv) != "" }

// seed gives the random numbers of a test, and prints what makes them again.
func seed(t *testing.T) *rand.Rand {
	t.Helper()
	n := uint64(time.Now().UnixNano())
	if s := os.Getenv("SALLYPORT_TEST_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &n); err != nil {
			t.Fatalf("SALLYPORT_TEST_SEED: %v", err)
		}
	}
	t.Logf("SALLYPORT_TEST_SEED=%d", n)
	return rand.New(rand.NewPCG(n, 0))
}

func powerConfig(dir string) auditlog.Config {
	return auditlog.Config{Spool: filepath.Join(dir, "spool"), SegmentBytes: 6 << 10, SegmentAge: time.Hour, SyncInterval: time.Hour,
		SyncBytes: 64 << 10, Codec: "none", Index: true, Tree: filepath.Join(dir, "tree"), CheckpointInterval: time.Minute}
}

// numbered gives the i-th record of a session of the tests below.
func numbered(i int, size int) *auditlog.Data {
	p := make([]byte, max(size, 8))
	binary.BigEndian.PutUint64(p, uint64(i))
	for j := 8; j < len(p); j++ {
		p[j] = byte(i + j)
	}
	return &auditlog.Data{Stream: auditlog.Output, Data: p}
}

// checkKept looks for what was promised in what a recovery left in the store. closed logs must be sealed, not interrupted.
func checkKept(src memory, promised map[string]int) error {
	found := make(map[string]bool)
	for s, err := range auditlog.Logs(context.Background(), src, auditlog.SessionPrefix) {
		if err != nil {
			return err
		}
		r := auditlog.NewSessionReader(src, s, testPublic())
		n := 0
		var last auditlog.Record
		for rec := range r.Records(context.Background()) {
			if d, ok := rec.Body.(*auditlog.Data); ok {
				if got := binary.BigEndian.Uint64(d.Data); got != uint64(n) {
					return fmt.Errorf("%s: data %d where %d should be", s.Name.ID, got, n)
				}
				n++
			}
			last = rec
		}
		rep := r.Report()
		want, ok := promised[rep.ID]
		closed := want < 0
		if closed {
			want = -want - 1
		}
		end, ended := last.Body.(*auditlog.End)
		switch {
		case rep.State != auditlog.Sealed && rep.State != auditlog.Interrupted:
			return fmt.Errorf("%s: %s: %v", rep.ID, rep.State, rep.Problems)
		case !ended:
			return fmt.Errorf("%s: has no end", rep.ID)
		case ok && n < want:
			return fmt.Errorf("%s: %d of %d promised records", rep.ID, n, want)
		case closed && (rep.State != auditlog.Sealed || end.Cause != "client-left" || n != want):
			return fmt.Errorf("%s: was closed with %d records, and is %s with %d", rep.ID, want, rep.State, n)
		}
		found[rep.ID] = true
	}
	for id := range promised {
		if !found[id] {
			return fmt.Errorf("%s: is not there", id)
		}
	}
	return nil
}

// checkTree verifies a store as an auditor does, in all and from checkpoints that were in it before: each log there is a leaf of the
// one transparency log, at most so often, and nothing is missing.
func checkTree(src auditlog.Source, kept []*tlog.Checkpoint, most int) error {
	var wrong []string
	sum, err := verifier.New(src, verifier.Options{Keys: []ed25519.PublicKey{testPublic()}, Since: kept,
		Log: func(r auditlog.Report) error {
			for _, p := range r.Problems {
				wrong = append(wrong, p.String())
			}
			return nil
		},
		Tree: func(t verifier.Tree) error {
			for _, p := range t.Problems {
				wrong = append(wrong, p.String())
			}
			return nil
		},
		Problem: func(p auditlog.Problem) error {
			wrong = append(wrong, p.String())
			return nil
		},
	}).Store(context.Background())
	switch {
	case err != nil:
		return err
	case sum.Damaged() || sum.Unsealed() || sum.Missing+sum.Outside+sum.Foreign > 0 || len(sum.Trees) > 1:
		return fmt.Errorf("%v, %d without a leaf, %d missing, %d outside, %d foreign, %d transparency logs: %s", sum.Logs, sum.Waiting, sum.Missing,
			sum.Outside, sum.Foreign, len(sum.Trees), strings.Join(wrong, "; "))
	}
	for id, n := range leaves(src) {
		if n > most {
			return fmt.Errorf("%s: %d times in the transparency log", id, n)
		}
	}
	return nil
}

// checkpoints gives those in a store, in order.
func checkpoints(src auditlog.Source) (all []*tlog.Checkpoint) {
	read := func(name string) (*tlog.Checkpoint, error) {
		f, err := src.Open(context.Background(), name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		if err != nil {
			return nil, err
		}
		return tlog.ParseCheckpoint(b)
	}
	for o, err := range src.List(context.Background(), tlog.Prefix) {
		if n, _ := tlog.ParseName(o.Name); err == nil && n.Kind == tlog.KindCheckpoint {
			var c *tlog.Checkpoint
			c, err = read(o.Name)
			all = append(all, c)
		}
		if err != nil {
			panic(err) // of a test
		}
	}
	return all
}

// leaves says how often each log is in the transparency log, by its directory.
func leaves(src auditlog.Source) map[string]int {
	found := make(map[string]int)
	for _, c := range checkpoints(src) {
		for _, e := range c.Entries {
			if l, err := auditlog.ParseLeaf(e); err == nil { // else checkTree says so
				found[l.Dir]++
			}
		}
	}
	return found
}

// hasLeaf says whether a session is in the transparency log.
func hasLeaf(src auditlog.Source, id string) bool {
	for dir := range leaves(src) {
		if strings.HasSuffix(dir, "/"+id+"/") {
			return true
		}
	}
	return false
}

// record makes a tape of a small log: three sessions at once with a few segments each, synced now and then, two stored as they are
// cut, and one whose segments all wait for the store until it has ended.
func recordTape(t *testing.T, mode string) *tape {
	t.Helper()
	dir := t.TempDir()
	tp := newTape(dir)
	held := make(chan struct{})
	store := &shelf{objects: make(map[string][]byte), tape: tp, held: held}
	cfg := powerConfig(dir)
	cfg.Sync, cfg.CheckpointInterval = mode, 100*time.Millisecond
	l, err := auditlog.OpenOn(t.Context(), tp, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	rng := rand.New(rand.NewPCG(4, 2))
	one, two, three := l.New("one"), l.New("two"), l.New("three")
	for _, r := range []*auditlog.Recorder{one, two, three} {
		login(t, r)
		must(t, r.Begin())
		tp.promise(map[string]int{r.ID(): 0})
	}
	written := map[string]int{}
	for i := range 14 {
		for _, r := range []*auditlog.Recorder{one, two, three} {
			if r == two && i >= 9 {
				continue
			}
			must(t, r.Record(1, numbered(written[r.ID()], rng.IntN(3000))))
			written[r.ID()]++
			if mode == "interval" && rng.IntN(3) == 0 {
				must(t, r.Sync(t.Context()))
				tp.promise(map[string]int{r.ID(): written[r.ID()]})
			}
			if mode == "before-pass" {
				tp.promise(map[string]int{r.ID(): written[r.ID()]})
			}
		}
		if i == 9 {
			must(t, two.Close(&auditlog.End{Cause: "client-left"}))
			tp.promise(map[string]int{"two": -written["two"] - 1})
			waitFor(t, func() bool { return hasLeaf(store.source(), "two") }) // sessions go on between checkpoints
		}
	}
	must(t, three.Close(&auditlog.End{Cause: "client-left"}))
	tp.promise(map[string]int{"three": -written["three"] - 1})
	close(held)
	waitFor(t, func() bool { return l.Stats().Waiting == 0 })
	must(t, one.Close(&auditlog.End{Cause: "client-left"}))
	tp.promise(map[string]int{"one": -written["one"] - 1})
	closeLog(t, l)
	return tp
}

// recoverFrom starts a gate on what a power cut left, and gives what it did to the disk and the store.
func recoverFrom(t *testing.T, held map[string][]byte, s *shelf) *tape {
	t.Helper()
	dir, err := os.MkdirTemp(t.TempDir(), "")
	must(t, err)
	tp := tapeOf(dir, held)
	cfg := powerConfig(dir)
	writeSpool(t, dir, held)
	s.tape = tp
	l, err := auditlog.OpenOn(t.Context(), tp, cfg, testKey, s, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	closeLog(t, l)
	if len(s.refused) > 0 {
		t.Fatalf("came again with other bytes: %v", s.refused)
	}
	left, err := os.ReadDir(cfg.Spool)
	must(t, err)
	for _, e := range left {
		if e.Name() != "lock" {
			t.Fatalf("left in the spool: %s", e.Name())
		}
	}
	must(t, os.RemoveAll(dir))
	return tp
}

// The power fails after each single operation on the disk in turn, in the short form after each fourth. Whatever the disk made of what was not synced (nothing,
// all, torn at pages and in another order), the next start brings to the store all that was promised, verified and ended; also
// if the power fails again while it does.
func TestPowerCut(t *testing.T) {
	rng := seed(t)
	random, step := 2, 4
	if soaking() {
		random, step = 60, 1
	}
	for _, mode := range []string{"interval", "before-pass"} {
		ops := recordTape(t, mode).ops
		cuts, again := 0, 0
		for k := rng.IntN(step); k <= len(ops); k += step {
			if k < len(ops) && ops[k].kind == "mark" {
				continue // the next one has the same disk, and more that was promised
			}
			for v := range 2 + random {
				if v < 2 && mode == "before-pass" && !soaking() {
					continue
				}
				how := "random"
				if v < 2 {
					how = []string{"none", "all"}[v]
				}
				p, s, promised := after(nil, ops, k)
				held := p.cut(how, v%2 == 0, rng)
				stored := maps.Clone(s.objects)
				kept := checkpoints(memory(stored))
				second := recoverFrom(t, held, s).ops
				err := checkKept(s.source(), promised)
				if err == nil {
					err = checkTree(s.source(), kept, 2)
				}
				if err != nil {
					t.Fatalf("%s: power cut after operation %d of %d (%s), %s of what was not synced kept: %v", mode, k, len(ops),
						ops[max(0, k-1)].kind, how, err)
				}
				cuts++
				if how != "random" || len(second) == 0 {
					continue
				}
				j := rng.IntN(len(second))
				p2, s2, _ := after(held, second, j)
				maps.Copy(s2.objects, stored)
				kept = checkpoints(s2.source())
				recoverFrom(t, p2.cut("random", true, rng), s2)
				if err = checkKept(s2.source(), promised); err == nil {
					err = checkTree(s2.source(), kept, 3)
				}
				if err != nil {
					t.Fatalf("%s: power cut after operation %d of %d (%s), and again after %d of %d (%s) of the recovery: %v", mode, k,
						len(ops), ops[max(0, k-1)].kind, j, len(second), second[max(0, j-1)].kind, err)
				}
				again++
			}
		}
		t.Logf("%s: %d operations, %d power cuts, %d of them with another in the recovery", mode, len(ops), cuts, again)
	}
}
