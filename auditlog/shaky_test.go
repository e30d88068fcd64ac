package auditlog_test

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	verifier "github.com/sallyport/sallyport/auditlog/verify"
)

// shakyDisk fails by chance.
type shakyDisk struct {
	auditlog.OSDisk
	rate atomic.Int64 // of 1000 operations
}

func (d *shakyDisk) fails() error {
	if rand.Int64N(1000) < d.rate.Load() {
		return syscall.EIO
	}
	return nil
}

func (d *shakyDisk) OpenFile(name string, flag int, perm fs.FileMode) (auditlog.DiskFile, error) {
	if err := d.fails(); err != nil {
		return nil, err
	}
	f, err := d.OSDisk.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return &shakyFile{f, d}, nil
}

func (d *shakyDisk) Rename(from, to string) error {
	if err := d.fails(); err != nil {
		return err
	}
	return d.OSDisk.Rename(from, to)
}

func (d *shakyDisk) Remove(name string) error {
	if err := d.fails(); err != nil {
		return err
	}
	return d.OSDisk.Remove(name)
}

func (d *shakyDisk) SyncDir(string) error { return d.fails() }

type shakyFile struct {
	auditlog.DiskFile
	d *shakyDisk
}

func (f *shakyFile) Write(b []byte) (int, error) {
	if err := f.d.fails(); err != nil {
		n, _ := f.DiskFile.Write(b[:rand.IntN(len(b)+1)])
		return n, err
	}
	return f.DiskFile.Write(b)
}

func (f *shakyFile) Sync() error { return f.d.fails() }

func (f *shakyFile) Truncate(n int64) error {
	if err := f.d.fails(); err != nil {
		return err
	}
	return f.DiskFile.Truncate(n)
}

// A disk fails by chance, at times and for a while altogether, under six sessions at once, index, transparency log, and the mending of
// what was cut. Then it is well, and the gate goes on or is started again: every promised record is in the store, each log once
// and with one end, and all of it verifies.
func TestShakyDisk(t *testing.T) {
	rounds := 20
	if os.Getenv("SALLYPORT_SOAK") != "" {
		rounds = 500
	}
	for round := range rounds {
		if shaken(t, round); t.Failed() {
			return
		}
	}
}

func shaken(t *testing.T, round int) {
	d := &shakyDisk{}
	store := &shelf{objects: make(map[string][]byte)}
	dir, err := os.MkdirTemp(t.TempDir(), "round")
	must(t, err)
	defer os.RemoveAll(dir)
	cfg := fastConfig(filepath.Join(dir, "spool"))
	cfg.SegmentAge, cfg.IndexAge, cfg.SyncInterval, cfg.CheckpointInterval = 10*time.Millisecond, 10*time.Millisecond, time.Millisecond, 100*time.Millisecond
	cfg.Index, cfg.Tree = true, filepath.Join(dir, "tree")
	cfg.SetMendEvery(time.Millisecond)
	open := func() *auditlog.Log {
		l, err := auditlog.OpenOn(t.Context(), d, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
		must(t, err)
		return l
	}
	l := open()
	stop, shaking := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(shaking)
		defer d.rate.Store(0)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(rand.IntN(8)) * time.Millisecond):
				d.rate.Store([]int64{0, 0, 20, 200, 1000}[rand.IntN(5)])
				_ = l.Ready() // tries the disk, and has mended what can be
			}
		}
	}()
	var mu sync.Mutex
	promised := make(map[string]int) // records, by log; guarded by mu
	var all sync.WaitGroup
	for w := range 6 {
		all.Go(func() {
			for i := range 8 {
				id := fmt.Sprintf("r%d-w%d-%d", round, w, i)
				r := l.New(id)
				if r.Record(0, &auditlog.Authenticate{User: "a", Result: "proven"}) == nil && r.Begin() == nil {
					n := talk(r)
					mu.Lock()
					promised[id] = n
					mu.Unlock()
				}
				_ = r.Close(&auditlog.End{Cause: "client-left"}) // the disk decides
			}
		})
	}
	all.Wait()
	close(stop)
	<-shaking
	if round%2 == 0 { // the gate that goes on mends all of it
		for end := time.Now().Add(5 * time.Minute); ; time.Sleep(3 * time.Millisecond) {
			_ = l.Ready()
			left, err := filepath.Glob(filepath.Join(cfg.Spool, "r*"))
			must(t, err)
			if len(left) == 0 {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("round %d: not mended: %v: store %v, %+v", round, left, l.StoreErr(), l.Stats())
			}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_ = l.Close(ctx)
	closeLog(t, open())

	if len(store.refused) > 0 {
		t.Errorf("round %d: put again otherwise: %v", round, store.refused)
	}
	src := store.source()
	for _, log := range logs(t, src, auditlog.SessionPrefix) {
		records, rep := readAll(t, src, log)
		data, ends := 0, 0
		for _, rec := range records {
			switch rec.Body.(type) {
			case *auditlog.Data:
				data++
			case *auditlog.End:
				ends++
			}
		}
		if data < promised[rep.ID] || ends != 1 {
			t.Errorf("%s: %d of %d promised records, %d ends, %s %v", rep.ID, data, promised[rep.ID], ends, rep.State, rep.Problems)
		}
		delete(promised, rep.ID)
	}
	if len(promised) > 0 {
		t.Errorf("round %d: not in the store: %v", round, promised)
	}
	sum, err := verifier.New(src, verifier.Options{Keys: []ed25519.PublicKey{testPublic()}}).Store(t.Context())
	if err != nil || sum.Damaged() || sum.Unread+sum.Waiting+sum.Missing+sum.Logs[auditlog.Live] > 0 {
		t.Errorf("round %d: %v %+v", round, err, sum)
	}
}

// talk records by chance, each time until it is durable, and says how many records were.
func talk(r *auditlog.Recorder) (n int) {
	for k := range rand.IntN(30) {
		text := fmt.Sprintf("%08d %s", k, strings.Repeat("x", rand.IntN(3000)))
		if r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: []byte(text)}) != nil {
			return n
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		err := r.Sync(ctx)
		cancel()
		if err != nil {
			return n
		}
		n = k + 1
	}
	return n
}
