package auditlog_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/auditlog/tlog"
)

const writerEnv = "AUDITLOG_TEST_KILLED_WRITER"

const killedSessions = 3

func killedConfig(dir string) auditlog.Config {
	return auditlog.Config{Spool: filepath.Join(dir, "spool"), SegmentBytes: 32 << 10, SegmentAge: 20 * time.Millisecond,
		SyncInterval: 2 * time.Millisecond, SyncBytes: 128 << 10, Tree: filepath.Join(dir, "tree"), CheckpointInterval: 100 * time.Millisecond,
		Index: true}
}

// killedWriter is the process that is killed: it writes numbered data and says on stdout what is durable.
func killedWriter(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	store, err := file.NewStore(filepath.Join(dir, "store"))
	fail(err)
	l, err := auditlog.Open(context.Background(), killedConfig(dir), testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	fail(err)
	var out sync.Mutex // one line at a time
	var wg sync.WaitGroup
	for s := range killedSessions {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for run := 0; ; run++ { // sessions end and begin, too
				id := fmt.Sprintf("s%d-%d", s, run)
				r := l.New(id)
				fail(r.Record(0, &auditlog.Connect{Source: "192.0.2.7:1"}))
				fail(r.Begin())
				rng := rand.New(rand.NewPCG(uint64(s), uint64(run)))
				n := 0
				for range rng.IntN(200) {
					p := make([]byte, 8+rng.IntN(4000))
					binary.BigEndian.PutUint64(p, uint64(n))
					fail(r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: p}))
					n++
					if rng.IntN(10) == 0 {
						fail(r.Sync(context.Background()))
						out.Lock()
						fmt.Printf("%s %d\n", id, n)
						out.Unlock()
					}
				}
				fail(r.Close(&auditlog.End{Cause: "client-left"}))
				out.Lock()
				fmt.Printf("%s %d end\n", id, n)
				out.Unlock()
			}
		}()
	}
	wg.Wait()
}

// What was said to be durable is in the store after the writer was killed and a new gate began, every log is whole, those that were
// cut are sealed as interrupted, and each, the index too, is a leaf of the one transparency log.
func TestKilled(t *testing.T) {
	rounds := 12
	if soaking() {
		rounds = 200
	}
	rng := seed(t)
	interrupted := 0
	for range rounds {
		interrupted += killOnce(t, time.Duration(rng.Int64N(int64(150*time.Millisecond))))
	}
	if interrupted == 0 {
		t.Error("no session was interrupted: nothing was tested")
	}
}

func killOnce(t *testing.T, after time.Duration) (interrupted int) {
	t.Helper()
	dir := t.TempDir()
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), writerEnv+"="+dir)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	durable, ended := make(map[string]int), make(map[string]bool)
	lines := bufio.NewScanner(stdout)
	var timer *time.Timer
	for lines.Scan() {
		if timer == nil { // it is under way
			timer = time.AfterFunc(after, func() { cmd.Process.Signal(syscall.SIGKILL) })
		}
		var id, end string
		var n int
		if c, _ := fmt.Sscan(lines.Text(), &id, &n, &end); c >= 2 {
			durable[id] = n
			ended[id] = end == "end"
		}
	}
	if err := cmd.Wait(); err == nil || stderr.Len() > 0 {
		t.Fatalf("writer: %v %s", err, stderr.String())
	}

	store, err := file.NewStore(filepath.Join(dir, "store"))
	must(t, err)
	l := openGate(t, killedConfig(dir), store)
	closeLog(t, l)
	src := source(t, filepath.Join(dir, "store"))
	found := make(map[string]bool)
	checkLeaves(t, filepath.Join(dir, "store"), src)
	for _, s := range logs(t, src, auditlog.SessionPrefix) {
		recs, rep := readAll(t, src, s)
		found[rep.ID] = true
		n := 0
		for _, rec := range recs {
			if d, ok := rec.Body.(*auditlog.Data); ok {
				if got := binary.BigEndian.Uint64(d.Data); got != uint64(n) {
					t.Fatalf("%s: data %d where %d should be", rep.ID, got, n)
				}
				n++
			}
		}
		if n < durable[rep.ID] {
			t.Errorf("%s: %d of %d that were durable", rep.ID, n, durable[rep.ID])
		}
		end, ok := recs[len(recs)-1].Body.(*auditlog.End)
		switch {
		case !ok:
			t.Errorf("%s: does not end", rep.ID)
		case rep.State == auditlog.Interrupted && !ended[rep.ID]:
			interrupted++
		case rep.State != auditlog.Sealed || end.Cause != "client-left":
			t.Errorf("%s: %+v, end %+v", rep.ID, rep, end)
		}
	}
	for id := range durable {
		if !found[id] {
			t.Errorf("%s: gone", id)
		}
	}
	if left, err := os.ReadDir(filepath.Join(dir, "spool")); err != nil || len(left) != 1 {
		t.Errorf("left in the spool: %v %v", left, err)
	}
	return interrupted
}

// checkLeaves replays the transparency log that is in a store's directory, of which there must be one, and looks for the leaf of each
// log there.
func checkLeaves(t *testing.T, dir string, src auditlog.Source) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "tlog/*/*/checkpoint/*"))
	must(t, err)
	var tree tlog.Tree
	leaves := make(map[auditlog.Leaf]bool)
	origin := ""
	for i, name := range names { // in order, as their numbers have eight digits
		b, err := os.ReadFile(name)
		must(t, err)
		c, err := tlog.ParseCheckpoint(b)
		must(t, err)
		if i == 0 {
			origin = tlog.Origin(c.Gate, c.Log)
		}
		if tlog.Origin(c.Gate, c.Log) != origin || c.Number != uint32(i) || c.Old != tree.Size {
			t.Fatalf("%s: number %d from %d, want %d from %d of %s", name, c.Number, c.Old, i, tree.Size, origin)
		}
		for _, e := range c.Entries {
			tree.Append("", e)
			l, err := auditlog.ParseLeaf(e)
			must(t, err)
			leaves[l] = true
		}
		if tree.Root() != c.Root {
			t.Fatalf("%s: wrong root", name)
		}
	}
	for _, s := range logs(t, src, "") {
		r := auditlog.NewSessionReader(src, s, testPublic())
		r.Verify(t.Context())
		if leaf, of, ok := r.Leaf(); !ok || of != origin || !leaves[leaf] {
			t.Errorf("%s: sealed %v for %q, with its leaf %v of %d in %q: %v", s.Name.Dir(), ok, of, leaves[leaf], len(leaves), origin,
				r.Report().Problems)
		}
	}
}
