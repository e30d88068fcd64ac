package file_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
)

// prunedStore has sessions s1 to s4, which ended 5, 4, 3 and 2 days before now, a live one of 6 days, and the gate's own log.
func prunedStore(t *testing.T, now time.Time) (store *file.Store, dir string) {
	t.Helper()
	dir = t.TempDir()
	store, err := file.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: filepath.Join(t.TempDir(), "spool"), SegmentAge: 10 * time.Millisecond,
		SyncInterval: 2 * time.Millisecond}, ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize)), store, "gate-1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	session := func(id string) *auditlog.Recorder {
		r := l.New(id)
		if err := errors.Join(r.Record(0, &auditlog.Connect{Source: "192.0.2.7:1"}), r.Begin()); err != nil {
			t.Fatal(err)
		}
		for n := 0; n == 0; time.Sleep(time.Millisecond) { // so that each has two segments
			names, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*", id, "*.seg"))
			if err != nil {
				t.Fatal(err)
			}
			n = len(names)
		}
		return r
	}
	for _, id := range []string{"s1", "s2", "s3", "s4"} {
		if err := session(id).Close(&auditlog.End{Cause: "client-left"}); err != nil {
			t.Fatal(err)
		}
	}
	session("live") // closed with the log; its last segment is removed below, so that it is not sealed
	refused := l.New("refused")
	if err := errors.Join(refused.Record(0, &auditlog.Connect{Source: "192.0.2.8:1"}), refused.Close(&auditlog.End{Cause: "refused"})); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := l.Close(ctx); err != nil {
		t.Fatal(err)
	}
	live, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*/live/*.seg"))
	if err != nil || len(live) != 2 {
		t.Fatal(live, err)
	}
	if err := os.Remove(live[1]); err != nil {
		t.Fatal(err)
	}
	for pattern, days := range map[string]int{"sessions/*/*/*/s1": 5, "sessions/*/*/*/s2": 4, "sessions/*/*/*/s3": 3, "sessions/*/*/*/s4": 2,
		"sessions/*/*/*/live": 6, "gate/*/*/*/*/*": 5} {
		names, err := filepath.Glob(filepath.Join(dir, pattern, "*.seg"))
		if err != nil || len(names) == 0 {
			t.Fatal(pattern, err)
		}
		at := now.Add(-time.Duration(days) * 24 * time.Hour)
		for _, name := range names {
			if err := os.Chtimes(name, at, at); err != nil {
				t.Fatal(err)
			}
		}
	}
	return store, dir
}

// kept are the IDs of the sessions that are there, in order, and "gate" for the gate's own log.
func kept(t *testing.T, dir string) []string {
	t.Helper()
	src, err := file.OpenSource(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	var ids []string
	for l, err := range auditlog.Logs(t.Context(), src, "") {
		if err != nil {
			t.Fatal(err)
		}
		id := l.Name.ID
		if l.Name.Kind == auditlog.GateLog {
			id = "gate"
		} else if state := auditlog.NewSessionReader(src, l).Verify(t.Context()).State; state == auditlog.Damaged {
			id += " damaged"
		}
		ids = append(ids, id)
	}
	slices.Sort(ids)
	if left, err := os.ReadDir(filepath.Join(dir, ".tmp")); err != nil || len(left) > 0 {
		t.Errorf("left: %v %v", left, err)
	}
	return ids
}

func TestPrune(t *testing.T) {
	const day = 24 * time.Hour
	now := time.Now()
	quiet := slog.New(slog.DiscardHandler)
	for _, c := range []struct {
		name   string
		limits file.Prune
		change func(dir string) error
		now    time.Time
		want   []string
		kept   int // over a limit
	}{
		{name: "no limit", want: []string{"gate", "live", "s1", "s2", "s3", "s4"}},
		{name: "age", limits: file.Prune{MaxAge: 3*day + day/2}, want: []string{"live", "s3", "s4"}, kept: 1},
		{name: "age of all", limits: file.Prune{MaxAge: time.Hour}, want: []string{"live", "s4"}, kept: 1},
		{name: "bytes of none", limits: file.Prune{MaxBytes: 1 << 30}, want: []string{"gate", "live", "s1", "s2", "s3", "s4"}},
		{name: "bytes of some", limits: file.Prune{MaxBytes: -1}, want: []string{"live", "s3", "s4"}, kept: 1},
		{name: "bytes of all", limits: file.Prune{MaxBytes: 1}, want: []string{"live", "s4"}, kept: 1},
		{name: "too young", limits: file.Prune{MaxBytes: 1}, now: now.Add(-5*day + time.Minute), want: []string{"gate", "live", "s1", "s2", "s3", "s4"}, kept: 1},
		{name: "damaged", limits: file.Prune{MaxAge: 4*day + day/2}, want: []string{"live", "s1 damaged", "s2", "s3", "s4"}, kept: 2,
			change: func(dir string) error { return breakLast(dir, "s1") }},
		{name: "foreign", limits: file.Prune{MaxAge: 4*day + day/2}, want: []string{"live", "s1 damaged", "s2", "s3", "s4"}, kept: 2,
			change: func(dir string) error { return besides(dir, "s1") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			store, dir := prunedStore(t, now)
			if c.limits.MaxBytes < 0 { // room for three sessions
				c.limits.MaxBytes = 3 * bytesOf(t, dir, "s4")
			}
			if c.change != nil {
				if err := c.change(dir); err != nil {
					t.Fatal(err)
				}
			}
			at := now
			if !c.now.IsZero() {
				at = c.now
			}
			done, err := store.Prune(t.Context(), c.limits, at, quiet)
			if err != nil {
				t.Fatal(err)
			}
			if got := kept(t, dir); !slices.Equal(got, c.want) || done.Kept != c.kept || done.Logs != 6-len(c.want) {
				t.Errorf("%v %+v, want %v and %d kept over a limit", got, done, c.want, c.kept)
			}
		})
	}
}

func TestPruneRemovesEmptyDays(t *testing.T) {
	now := time.Now()
	store, dir := prunedStore(t, now)
	old, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*"))
	if err != nil || len(old) == 0 {
		t.Fatal(old, err)
	}
	if _, err := store.Prune(t.Context(), file.Prune{MaxAge: time.Hour}, now, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(old[len(old)-1]); err != nil {
		t.Errorf("the day of a log that is kept: %v", err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "gate")); err != nil || len(left) > 0 {
		t.Errorf("empty directories left: %v %v", left, err)
	}
}

func TestPruneValidate(t *testing.T) {
	for _, p := range []file.Prune{{MaxAge: -1}, {MaxAge: time.Minute}, {MaxBytes: -1}, {MaxBytes: 100}} {
		if p.Validate() == nil {
			t.Errorf("%+v is valid", p)
		}
	}
	for _, p := range []file.Prune{{}, {MaxAge: time.Hour}, {MaxBytes: 1 << 20}} {
		if err := p.Validate(); err != nil {
			t.Error(err)
		}
	}
}

func bytesOf(t *testing.T, dir, id string) (n int64) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*", id, "*.seg"))
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		n += info.Size()
	}
	return n
}

// breakLast changes a byte of a session's last segment, and not its time.
func breakLast(dir, id string) error {
	names, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*", id, "*.seg"))
	if err != nil || len(names) < 2 {
		return errors.Join(err, errors.New("no segments"))
	}
	name := names[len(names)-1]
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	b[len(b)/2] ^= 1
	return errors.Join(os.WriteFile(name, b, 0o600), os.Chtimes(name, info.ModTime(), info.ModTime()))
}

// besides puts a file that is no segment beside a session's.
func besides(dir, id string) error {
	names, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*", id))
	if err != nil || len(names) != 1 {
		return errors.Join(err, errors.New("no such session"))
	}
	return os.WriteFile(filepath.Join(names[0], "note.txt"), []byte("kept for the court"), 0o600)
}
