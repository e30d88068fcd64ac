package auditlog_test

import (
	"bytes"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// heldDisk is a disk whose syncs wait.
type heldDisk struct {
	auditlog.OSDisk

	mu      sync.Mutex // guards all below
	held    chan struct{}
	waiting int // syncs
	syncs   int // ended
}

func (d *heldDisk) OpenFile(name string, flag int, perm fs.FileMode) (auditlog.DiskFile, error) {
	f, err := d.OSDisk.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return heldFile{f, d}, nil
}

type heldFile struct {
	auditlog.DiskFile
	d *heldDisk
}

func (f heldFile) Sync() error {
	f.d.mu.Lock()
	f.d.waiting++
	held := f.d.held
	f.d.mu.Unlock()
	if held != nil {
		<-held
	}
	err := f.DiskFile.Sync()
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.waiting--
	f.d.syncs++
	return err
}

func (d *heldDisk) hold() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.held = make(chan struct{})
}

func (d *heldDisk) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.held)
	d.held = nil
}

func (d *heldDisk) counts() (waiting, ended int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.waiting, d.syncs
}

// passed is what went through a tap.
type passed struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (p *passed) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.Write(b)
}

func (p *passed) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.Len()
}

func openHeld(t *testing.T, change func(*auditlog.Config)) (*heldDisk, *auditlog.Log) {
	t.Helper()
	d := &heldDisk{}
	cfg := endConfig(t.TempDir())
	change(&cfg)
	store, _ := newStore(t)
	l, err := auditlog.OpenOn(t.Context(), d, cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	return d, l
}

// With before-pass nothing is passed before the disk has it, and Record comes back when it does; one sync serves all who wait.
func TestBeforePass(t *testing.T) {
	d, l := openHeld(t, func(c *auditlog.Config) { c.Sync, c.SyncInterval = "before-pass", time.Hour })
	defer closeLog(t, l)
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	d.hold()
	_, before := d.counts()
	var out passed
	const writers = 8
	var done sync.WaitGroup
	for i := range writers {
		done.Add(1)
		go func() {
			defer done.Done()
			if i%2 == 0 {
				if _, err := r.Tap(1, auditlog.Output, &out).Write([]byte(strings.Repeat("x", 1000))); err != nil {
					t.Error(err)
				}
			} else if err := r.Record(1, &auditlog.Request{Type: "exec", OK: true}); err != nil {
				t.Error(err)
			}
		}()
	}
	waitFor(t, func() bool { waiting, _ := d.counts(); return waiting == 1 })
	if n := out.len(); n != 0 {
		t.Errorf("%d bytes passed before they were durable", n)
	}
	d.release()
	done.Wait()
	if n := out.len(); n != writers/2*1000 {
		t.Errorf("%d bytes passed", n)
	}
	if _, syncs := d.counts(); syncs-before > writers {
		t.Errorf("%d syncs for %d records", syncs-before, writers)
	}
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
}

// With interval what a session passes is at most sync_bytes ahead of the disk; and a record is synced in time though nobody asks
// and nothing follows.
func TestSyncBehind(t *testing.T) {
	d, l := openHeld(t, func(c *auditlog.Config) { c.SyncBytes, c.Codec = 256<<10, "none" })
	defer closeLog(t, l)
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	_, before := d.counts()
	must(t, r.Record(1, &auditlog.Request{Type: "exec", OK: true}))
	waitFor(t, func() bool { _, syncs := d.counts(); return syncs > before })
	d.hold()
	var out passed
	ended := make(chan error, 1)
	go func() {
		w := r.Tap(1, auditlog.Output, &out)
		for range 64 {
			if _, err := w.Write(make([]byte, 32<<10)); err != nil {
				ended <- err
				return
			}
		}
		ended <- nil
	}()
	waitFor(t, func() bool { waiting, _ := d.counts(); return waiting == 1 && out.len() > 128<<10 })
	if n := out.len(); n > 256<<10 {
		t.Errorf("%d bytes passed with sync_bytes at %d", n, 256<<10)
	}
	select {
	case err := <-ended:
		t.Errorf("all was passed while the disk held: %v", err)
	default:
	}
	d.release()
	must(t, <-ended)
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
}

// How long it takes until a record is durable, one after the other, on the disk of TMPDIR.
func BenchmarkSync(b *testing.B) {
	for _, size := range []int{100, 32 << 10} {
		b.Run(map[int]string{100: "100B", 32 << 10: "32KiB"}[size], func(b *testing.B) {
			l, err := auditlog.Open(b.Context(), auditlog.Config{Spool: b.TempDir(), Sync: "before-pass", Codec: "none"}, testKey,
				&shelf{objects: make(map[string][]byte)}, "gate-1", slog.New(slog.DiscardHandler))
			if err != nil {
				b.Fatal(err)
			}
			r := l.New("s1")
			if err := r.Begin(); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(size))
			for i := 0; b.Loop(); i++ {
				if err := r.Record(1, numbered(i, size)); err != nil {
					b.Fatal(err)
				}
			}
			if err := r.Close(&auditlog.End{Cause: "client-left"}); err != nil {
				b.Fatal(err)
			}
			if err := l.Close(b.Context()); err != nil {
				b.Fatal(err)
			}
		})
	}
}
