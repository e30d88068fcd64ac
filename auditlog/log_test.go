package auditlog_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
)

// testKey is the same in every run, so that the kept sample is.
var testKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))

func testPublic() ed25519.PublicKey { return testKey.Public().(ed25519.PublicKey) }

func fastConfig(dir string) auditlog.Config {
	return auditlog.Config{Spool: filepath.Join(dir, "spool"), SegmentAge: 50 * time.Millisecond, SyncInterval: 10 * time.Millisecond}
}

func openGate(t *testing.T, cfg auditlog.Config, store auditlog.Store) *auditlog.Log {
	t.Helper()
	l, err := auditlog.Open(t.Context(), cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func closeLog(t *testing.T, l *auditlog.Log) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := l.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

func newStore(t *testing.T) (*file.Store, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	s, err := file.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func source(t *testing.T, dir string) *file.Source {
	t.Helper()
	s, err := file.OpenSource(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func logs(t *testing.T, src auditlog.Source, prefix string) []auditlog.Stored {
	t.Helper()
	var all []auditlog.Stored
	for s, err := range auditlog.Logs(t.Context(), src, prefix) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	return all
}

func readAll(t *testing.T, src auditlog.Source, s auditlog.Stored) ([]auditlog.Record, auditlog.Report) {
	t.Helper()
	r := auditlog.NewSessionReader(src, s, testPublic())
	var recs []auditlog.Record
	for rec := range r.Records(t.Context()) {
		recs = append(recs, rec)
	}
	return recs, r.Report()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// login records what comes before a session's first channel.
func login(t *testing.T, r *auditlog.Recorder) {
	t.Helper()
	must(t, r.Record(0, &auditlog.Connect{Gate: "gate-1", Source: "192.0.2.7:4022", Local: "192.0.2.1:22"}))
	must(t, r.Record(0, &auditlog.Handshake{Client: "SSH-2.0-OpenSSH_9.2"}))
	must(t, r.Record(0, &auditlog.Authenticate{User: "alice", Method: "publickey", Result: "proven"}))
}

func TestSession(t *testing.T) {
	store, dir := newStore(t)
	l := openGate(t, fastConfig(t.TempDir()), store)
	r := l.New("s1")
	login(t, r)
	if entries, _ := os.ReadDir(filepath.Join(dir, "sessions")); len(entries) != 0 {
		t.Error("written before a key was proven")
	}
	must(t, r.Begin())
	must(t, r.Record(1, &auditlog.ChannelOpen{Type: "session"}))
	var out bytes.Buffer
	w := r.Tap(1, auditlog.Output, &out)
	want := sha256.New()
	rng := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, 300<<10)
	for range 60 {
		n := rng.IntN(len(p))
		for i := range p[:n] {
			p[i] = byte(rng.Uint32()) & 0x0f
		}
		want.Write(p[:n])
		if m, err := w.Write(p[:n]); m != n || err != nil {
			t.Fatal(m, err)
		}
		for i := range p[:n] {
			p[i] = 0xff // what was recorded must be a copy
		}
	}
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	if err := r.Record(1, &auditlog.Exit{}); !errors.Is(err, auditlog.ErrClosed) {
		t.Errorf("record after close: %v", err)
	}
	closeLog(t, l)

	all := logs(t, source(t, dir), auditlog.SessionPrefix)
	if len(all) != 1 {
		t.Fatalf("%d sessions", len(all))
	}
	recs, rep := readAll(t, source(t, dir), all[0])
	if rep.State != auditlog.Sealed || !rep.Pinned || rep.Segments < 2 {
		t.Errorf("report %+v", rep)
	}
	got := sha256.New()
	passed := sha256.Sum256(out.Bytes())
	for i, rec := range recs {
		if rec.Sequence != uint64(i) {
			t.Fatalf("record %d has sequence %d", i, rec.Sequence)
		}
		if d, ok := rec.Body.(*auditlog.Data); ok {
			got.Write(d.Data)
		}
	}
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) || !bytes.Equal(passed[:], want.Sum(nil)) {
		t.Error("recorded bytes are not those passed")
	}
	if e, ok := recs[len(recs)-1].Body.(*auditlog.End); !ok || e.Cause != "client-left" {
		t.Errorf("last record %+v", recs[len(recs)-1].Body)
	}
	if u := recs[2].Body.(*auditlog.Authenticate).User; u != "alice" {
		t.Errorf("user %q", u)
	}
	if entries, _ := os.ReadDir(filepath.Join(filepath.Dir(dir), "spool")); len(entries) > 1 {
		t.Errorf("left in the spool: %v", entries)
	}
}

// Many channels at once, written from as many goroutines: each channel's bytes come back whole and in order.
func TestManyWriters(t *testing.T) {
	store, dir := newStore(t)
	cfg := fastConfig(t.TempDir())
	cfg.SegmentBytes, cfg.SyncBytes = 64<<10, 256<<10
	l := openGate(t, cfg, store)
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	const channels, writes = 8, 200
	want := make([]string, channels+1)
	var wg sync.WaitGroup
	for c := 1; c <= channels; c++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			h := sha256.New()
			w := r.Tap(uint32(c), auditlog.Input, io.Discard)
			rng := rand.New(rand.NewPCG(uint64(c), 9))
			p := make([]byte, 4<<10)
			for range writes {
				n := rng.IntN(len(p)) + 1
				for i := range p[:n] {
					p[i] = byte(rng.Uint32())
				}
				h.Write(p[:n])
				if _, err := w.Write(p[:n]); err != nil {
					t.Error(err)
					return
				}
			}
			want[c] = fmt.Sprintf("%x", h.Sum(nil))
		}()
	}
	wg.Wait()
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	closeLog(t, l)
	src := source(t, dir)
	recs, rep := readAll(t, src, logs(t, src, auditlog.SessionPrefix)[0])
	if rep.State != auditlog.Sealed {
		t.Fatalf("report %+v", rep)
	}
	for c := 1; c <= channels; c++ {
		h := sha256.New()
		for _, rec := range recs {
			if d, ok := rec.Body.(*auditlog.Data); ok && rec.Channel == uint32(c) {
				h.Write(d.Data)
			}
		}
		if got := fmt.Sprintf("%x", h.Sum(nil)); got != want[c] {
			t.Errorf("channel %d: other bytes", c)
		}
	}
}

// Data reaches the store by time while the session lives, and reads as live.
func TestLive(t *testing.T) {
	store, dir := newStore(t)
	l := openGate(t, fastConfig(t.TempDir()), store)
	defer closeLog(t, l)
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	must(t, r.Record(1, &auditlog.Request{Type: "exec", Command: []byte("true"), OK: true}))
	must(t, r.Sync(t.Context()))
	src := source(t, dir)
	waitFor(t, func() bool { return len(logs(t, src, auditlog.SessionPrefix)) == 1 })
	_, rep := readAll(t, src, logs(t, src, auditlog.SessionPrefix)[0])
	if rep.State != auditlog.Live {
		t.Errorf("report %+v", rep)
	}
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	waitFor(t, func() bool {
		_, rep := readAll(t, src, logs(t, src, auditlog.SessionPrefix)[0])
		return rep.State == auditlog.Sealed
	})
}

func waitFor(t *testing.T, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("did not happen within 60 s")
		}
	}
}

// brokenStore fails until mended.
type brokenStore struct {
	auditlog.Store
	broken atomic.Bool
}

func (b *brokenStore) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if b.broken.Load() {
		return errors.New("store is away")
	}
	return b.Store.Put(ctx, name, r, size)
}

func TestStoreAway(t *testing.T) {
	inner, dir := newStore(t)
	store := &brokenStore{Store: inner}
	store.broken.Store(true)
	cfg := fastConfig(t.TempDir())
	l := openGate(t, cfg, store)
	for i := range 20 {
		r := l.New(fmt.Sprintf("s%d", i))
		login(t, r)
		must(t, r.Begin())
		must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	}
	waitFor(t, func() bool { return l.StoreErr() != nil })
	must(t, l.Ready()) // the store is not the spool
	if _, err := auditlog.Open(t.Context(), cfg, testKey, store, "gate-2", slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a second gate opened the spool")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	must(t, l.Close(ctx))
	// The next start brings there what this one could not.
	store.broken.Store(false)
	l = openGate(t, cfg, store)
	closeLog(t, l)
	src := source(t, dir)
	all := logs(t, src, "")
	if len(all) != 20 {
		t.Fatalf("%d logs", len(all))
	}
	for _, s := range all {
		if _, rep := readAll(t, src, s); rep.State != auditlog.Sealed {
			t.Errorf("%+v", rep)
		}
	}
}

func TestSpoolLimit(t *testing.T) {
	inner, dir := newStore(t)
	store := &brokenStore{Store: inner}
	store.broken.Store(true)
	cfg := fastConfig(t.TempDir())
	cfg.SpoolLimit, cfg.Codec = 1<<20, "none"
	l := openGate(t, cfg, store)
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	var err error
	for range 100 {
		if err = r.Record(1, &auditlog.Data{Data: make([]byte, 100<<10)}); err != nil {
			break
		}
		must(t, r.Sync(t.Context()))
	}
	if !errors.Is(err, auditlog.ErrSpoolLimit) {
		t.Fatalf("record: %v", err)
	}
	select {
	case <-r.Lost():
	default:
		t.Error("not lost")
	}
	if err := l.Ready(); !errors.Is(err, auditlog.ErrSpoolLimit) {
		t.Errorf("ready: %v", err)
	}
	if err := l.New("s2").Begin(); !errors.Is(err, auditlog.ErrSpoolLimit) {
		t.Errorf("begin: %v", err)
	}
	if err := r.Close(&auditlog.End{Cause: "audit-lost"}); !errors.Is(err, auditlog.ErrSpoolLimit) {
		t.Errorf("close: %v", err)
	}
	store.broken.Store(false)
	waitFor(t, func() bool { return l.Ready() == nil })
	closeLog(t, l)
	src := source(t, dir)
	recs, rep := readAll(t, src, logs(t, src, auditlog.SessionPrefix)[0])
	if e, ok := recs[len(recs)-1].Body.(*auditlog.End); !ok || e.Cause != "audit-lost" || rep.State != auditlog.Sealed {
		t.Errorf("%+v, last %+v", rep, recs[len(recs)-1].Body)
	}
}

// A spool that can't be written ends its sessions, and the next start seals what is there.
func TestSpoolFails(t *testing.T) {
	store, dir := newStore(t)
	cfg := fastConfig(t.TempDir())
	l := openGate(t, cfg, store)
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	must(t, r.Record(1, &auditlog.Data{Data: []byte("kept")}))
	must(t, r.Sync(t.Context()))
	moved := cfg.Spool + ".away"
	must(t, os.Rename(cfg.Spool, moved)) // the next segment's file can't be made
	must(t, os.WriteFile(cfg.Spool, nil, 0o600))
	waitFor(t, func() bool {
		if err := r.Record(1, &auditlog.Data{Data: []byte("x")}); err != nil {
			return true
		}
		time.Sleep(5 * time.Millisecond)
		return false
	})
	<-r.Lost()
	if l.Ready() == nil {
		t.Error("ready with a broken spool")
	}
	if err := l.New("s2").Begin(); err == nil {
		t.Error("began on a broken spool")
	}
	if r.Close(&auditlog.End{Cause: "audit-lost"}) == nil {
		t.Error("close of a lost log said nothing")
	}
	must(t, os.Remove(cfg.Spool))
	must(t, os.Rename(moved, cfg.Spool))
	must(t, l.Ready())
	closeLog(t, l)
	closeLog(t, openGate(t, cfg, store))
	src := source(t, dir)
	recs, rep := readAll(t, src, logs(t, src, auditlog.SessionPrefix)[0])
	if rep.State != auditlog.Interrupted {
		t.Errorf("%+v", rep)
	}
	if d := recs[3].Body.(*auditlog.Data); string(d.Data) != "kept" {
		t.Errorf("data %q", d.Data)
	}
}

func TestRefused(t *testing.T) {
	store, dir := newStore(t)
	l := openGate(t, fastConfig(t.TempDir()), store)
	// An honest login among them.
	honest := l.New("honest")
	login(t, honest)
	must(t, honest.Begin())
	const n = 10_000
	for i := range n {
		r := l.New(fmt.Sprintf("refused-%d", i))
		src := "192.0.2.7:1"
		if i%2 == 1 {
			src = fmt.Sprintf("10.%d.%d.%d:99", i>>16, i>>8&0xff, i&0xff)
		}
		must(t, r.Record(0, &auditlog.Connect{Source: src}))
		must(t, r.Record(0, &auditlog.Handshake{Client: "SSH-2.0-" + strings.Repeat("x", 240)}))
		must(t, r.Record(0, &auditlog.Authenticate{User: fmt.Sprint(i) + strings.Repeat("u", 200), Fingerprint: fmt.Sprintf("SHA256:%043d", i),
			Result: "refused", Reason: "unknown key"}))
		must(t, r.Close(&auditlog.End{Cause: "refused"}))
	}
	must(t, honest.Close(&auditlog.End{Cause: "client-left"}))
	closeLog(t, l)
	src := source(t, dir)
	if all := logs(t, src, auditlog.SessionPrefix); len(all) != 1 {
		t.Errorf("%d sessions", len(all))
	}
	var count uint64
	var size int64
	for _, s := range logs(t, src, auditlog.GatePrefix) {
		recs, rep := readAll(t, src, s)
		if rep.State != auditlog.Sealed || rep.Kind != "gate" || rep.Gate != "gate-1" {
			t.Errorf("%+v", rep)
		}
		size += rep.Bytes
		for _, rec := range recs {
			f, ok := rec.Body.(*auditlog.Refused)
			if !ok {
				continue
			}
			count += f.Count
			if len(f.Users) > 8 || len(f.Fingerprints) > 8 || len(f.Users[0]) > 64 || f.Reason != "unknown key" || f.First.After(f.Last) {
				t.Errorf("%+v", f)
			}
			if strings.Contains(f.Source, ":") {
				t.Errorf("source %q", f.Source)
			}
		}
	}
	if count != n {
		t.Errorf("%d of %d counted", count, n)
	}
	if size >= 1<<20 {
		t.Errorf("%d bytes", size)
	}
}

// A client that talks before it proves a key can't fill the memory.
func TestUnproven(t *testing.T) {
	store, _ := newStore(t)
	l := openGate(t, fastConfig(t.TempDir()), store)
	defer closeLog(t, l)
	r := l.New("s1")
	var err error
	for range 1000 {
		if err = r.Record(0, &auditlog.Authenticate{User: strings.Repeat("u", 1000)}); err != nil {
			break
		}
	}
	if !errors.Is(err, auditlog.ErrUnproven) || !errors.Is(r.Begin(), auditlog.ErrUnproven) {
		t.Errorf("record: %v", err)
	}
	must(t, r.Close(&auditlog.End{Cause: "refused"}))
	if err := l.New("../x").Begin(); err == nil {
		t.Error("began with an ID that leaves the directory")
	}
}
