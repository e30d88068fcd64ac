package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/auditlog/tlog"
)

// treeStore is a store of a gate that keeps a transparency log, and the file of its key.
func treeStore(t *testing.T, sessions ...string) (dir, keys string) {
	t.Helper()
	dir = t.TempDir()
	runGate(t, dir, sessions...)
	published, err := filepath.Glob(filepath.Join(dir, "keys/gate-1/*.pub"))
	if err != nil || len(published) != 1 {
		t.Fatal(published, err)
	}
	return dir, published[0]
}

// runGate writes sessions into a store, as a gate without any state does: it begins a transparency log.
func runGate(t *testing.T, dir string, sessions ...string) {
	t.Helper()
	state := t.TempDir()
	store, err := file.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: filepath.Join(state, "spool"), Tree: filepath.Join(state, "tlog")}, testKey, store, "gate-1",
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	// The first checkpoint has no leaf: without this wait a busy machine may close the log before it is made.
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		first, err := filepath.Glob(filepath.Join(dir, "tlog/gate-1/*/checkpoint/*"))
		if err != nil || time.Now().After(end) {
			t.Fatal("no checkpoint", err)
		}
		if len(first) > 0 {
			break
		}
	}
	for _, id := range sessions {
		session(t, l, id, nil)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := l.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

// Nothing goes on from a transparency log that has ended. That its end was taken away, with the sessions, is told by what is left, which
// its gate did not close; that all of it was, by a kept checkpoint alone.
func TestVerifyEnded(t *testing.T) {
	dir, keys := treeStore(t, "s1")
	ended, err := filepath.Glob(filepath.Join(dir, "tlog/gate-1/*"))
	if err != nil || len(ended) != 1 {
		t.Fatal(ended, err)
	}
	runGate(t, dir, "s2")
	kept, errs, code := audit(t, "checkpoint", dir, "--key", keys)
	if code != 0 || strings.Count(kept, "sallyport/gate-1/") != 4 { // each names its log twice
		t.Fatalf("code %d: %s%s", code, kept, errs)
	}
	file := filepath.Join(t.TempDir(), "kept")
	if err := os.WriteFile(file, []byte(kept), 0o600); err != nil {
		t.Fatal(err)
	}
	verify := func(code int, want string, args ...string) {
		t.Helper()
		out, errs, got := audit(t, append([]string{"verify", dir, "--key", keys, "--beat", "1h"}, args...)...)
		if got != code || !strings.Contains(out, want) {
			t.Errorf("%q: code %d, want %d and %q:\n%s%s", args, got, code, want, out, errs)
		}
	}
	verify(0, "; closed by its gate; it ended there", "--since", file, "--live")
	verify(0, "", "--closed", "--beat", "1ns") // does not ask for one that is alive
	s1, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*/s1"))
	if err != nil || len(s1) != 1 {
		t.Fatal(s1, err)
	}
	last, err := filepath.Glob(filepath.Join(ended[0], "checkpoint/*"))
	if err != nil || len(last) < 2 {
		t.Fatal(last, err)
	}
	remove := func(names ...string) {
		t.Helper()
		for _, n := range names {
			if err := os.RemoveAll(n); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove(s1[0], last[len(last)-1])
	verify(0, "1 logs: 1 sealed", "--live") // within an hour
	verify(exitStale, "neither goes on nor was closed", "--closed", "--beat", "1ns")
	alive(t, dir, ended[0])
	verify(exitStale, "; not closed", "--live")
	verify(exitStale, "; not closed", "--live", "--quiet")
	if out, errs, code := audit(t, "verify", dir, "--key", keys); code != 0 || !strings.Contains(out, "1 transparency log neither goes on nor was closed") {
		t.Errorf("code %d\n%s%s", code, out, errs)
	}
	verify(2, "its newest objects were taken away", "--since", file, "--live")
	kept, errs, code = audit(t, "checkpoint", dir, "--key", keys)
	if code != 0 {
		t.Fatalf("code %d: %s%s", code, kept, errs)
	}
	now := file + "-now"
	if err := os.WriteFile(now, []byte(kept), 0o600); err != nil {
		t.Fatal(err)
	}
	verify(0, "it ends where the kept checkpoint does", "--since", now, "--live")
	remove(ended[0])
	verify(0, "1 logs: 1 sealed", "--live")
	verify(2, "the transparency log of the kept checkpoint is not in the store", "--since", file, "--live")
}

func TestVerifyStore(t *testing.T) {
	today := func() string { return time.Now().UTC().Format("2006-01-02") }
	day := today()
	dir, keys := treeStore(t, "s1", "s2")
	if today() != day { // midnight fell between: one day shall have both
		day = today()
		dir, keys = treeStore(t, "s1", "s2")
	}
	kept, errs, code := audit(t, "checkpoint", dir, "--key", keys)
	if code != 0 || !strings.HasPrefix(kept, "sallyport/gate-1/") {
		t.Fatalf("checkpoint: %d %s %s", code, kept, errs)
	}
	keptFile, note := filepath.Join(t.TempDir(), "kept"), filepath.Join(t.TempDir(), "note")
	other, _ := treeStore(t, "s9")
	another, _, _ := audit(t, "checkpoint", other)
	for name, text := range map[string]string{keptFile: kept, note: "a note\n"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	both := filepath.Join(t.TempDir(), "both")
	if err := os.WriteFile(both, []byte(kept+another), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(code int, want string, args ...string) {
		t.Helper()
		out, errs, got := audit(t, args...)
		if got != code || !strings.Contains(out+errs, want) {
			t.Errorf("%q: code %d, want %d and %q:\n%s%s", args, got, code, want, out, errs)
		}
	}
	run(0, "2 logs: 2 sealed, 0 interrupted, 0 live, 0 damaged\nnewest checkpoint: ", "verify", dir, "--key", keys, "--live", "--beat", "1h", "--gate", "gate-1", "--sealed", "--since", keptFile)
	run(0, "intact      sallyport/gate-1/", "verify", dir)
	run(0, `{"kind":"summary","logs":{"sealed":2}`, "verify", dir, "-o", "json")
	run(0, `{"kind":"transparency-log","origin":"sallyport/gate-1/`, "verify", dir, "-o", "json")
	run(0, "sealed      s1 ", "verify", "s1", "--store", dir)
	run(0, "2 logs: 2 sealed", "verify", dir, "--day", day)
	run(0, "0 logs: 0 sealed", "verify", dir, "--to", "2001-01-01")
	run(1, "is no day", "verify", dir, "--day", "yesterday")
	run(1, "write one of them", "verify", dir, "--day", day, "--from", day)
	run(1, "name one of them", "verify", "s1", "--store", dir, "--day", day)
	run(1, "note", "verify", dir, "--since", note)
	run(1, "no such file", "verify", dir, "--since", note+"x")
	run(2, "the kept checkpoint is not in the store", "verify", dir, "--since", both)
	run(exitStale, "the gate is down, or its newest objects were taken away", "verify", dir, "--live", "--beat", "1ns")
	run(exitStale, "there is no checkpoint of gate gate-2", "verify", dir, "--live", "--beat", "1h", "--gate", "gate-2")
	if out, _, _ := audit(t, "verify", dir, "--quiet", "--key", keys); strings.Count(out, "\n") != 2 {
		t.Errorf("quiet: %q", out)
	}

	// A live log is no damage, but has no end.
	names, err := filepath.Glob(filepath.Join(other, "sessions/*/*/*/s9/00000000.seg"))
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	checkpoints, err := filepath.Glob(filepath.Join(other, "tlog/gate-1/*/checkpoint/*"))
	if err != nil || len(checkpoints) < 2 {
		t.Fatal(checkpoints, err)
	}
	if err := os.Remove(checkpoints[len(checkpoints)-1]); err != nil {
		t.Fatal(err)
	}
	run(0, "1 sealed log is in no checkpoint yet", "verify", other)
	run(exitUnsealed, "1 are in no checkpoint yet", "verify", other, "--sealed")
	run(2, "", "verify", dir, "--key", keyFileOf(t, 3))
	// The whole session is taken away: also seen from its day alone, and not where older ones may be gone.
	if err := os.RemoveAll(filepath.Dir(strings.Replace(names[0], other, dir, 1))); err != nil {
		t.Fatal(err)
	}
	s1, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*/s1"))
	if err != nil || len(s1) != 1 {
		t.Fatal(s1, err)
	}
	if err := os.RemoveAll(s1[0]); err != nil {
		t.Fatal(err)
	}
	run(2, "/s1/: is missing: 1 segments, sealed", "verify", dir, "--key", keys)
	run(2, "1 log is missing", "verify", dir, "--day", day)
	run(0, "0 logs", "verify", dir, "--from", "2999-01-01")
	run(0, "sealed      s2 ", "verify", "s2", "--store", dir)
}

// A checkpoint of the future, by who has the key or by a clock that is wrong, does not let a gate pass for alive.
func TestVerifyLiveAhead(t *testing.T) {
	dir, keys := treeStore(t, "s1")
	beatAt(t, dir, time.Now().AddDate(70, 0, 0))
	for _, args := range [][]string{{"--live"}, {"--live", "--gate", "gate-1"}, {"--live", "--beat", "1000h"}} {
		out, errs, code := audit(t, append([]string{"verify", dir, "--key", keys}, args...)...)
		if code != exitStale || !strings.Contains(errs, "ahead of this machine's clock") {
			t.Errorf("%q: code %d\n%s%s", args, code, out, errs)
		}
	}
	if out, errs, code := audit(t, "verify", dir, "--key", keys); code != 0 {
		t.Errorf("code %d\n%s%s", code, out, errs)
	}
}

// A session without an end, of which nothing has come for long: it is told of, and --sealed fails.
func TestVerifySilent(t *testing.T) {
	dir, keys := treeStore(t, "s1")
	spool := t.TempDir()
	store, err := file.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: spool, SegmentAge: 10 * time.Millisecond}, testKey, store, "gate-9", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	r := l.New("live")
	if err := errors.Join(r.Record(0, &auditlog.Connect{Gate: "gate-9"}), r.Begin(), r.Sync(t.Context())); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); l.Stats().Stored < 1; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not stored")
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := errors.Join(r.Close(&auditlog.End{Cause: "client-left"}), l.Close(ctx)); err != nil {
			t.Error(err)
		}
	})
	beatAt(t, dir, time.Now().Add(25*time.Hour))
	out, errs, code := audit(t, "verify", dir, "--key", keys, "--sealed")
	if code != exitUnsealed || !strings.Contains(out, "1 session has no end, and nothing of it came for over a day") {
		t.Errorf("code %d\n%s%s", code, out, errs)
	}
}

// alive makes the transparency logs old, and lets all but one of them speak now.
func alive(t *testing.T, dir, but string) {
	t.Helper()
	logs, err := filepath.Glob(filepath.Join(dir, "tlog/gate-1/*"))
	if err != nil || len(logs) != 2 {
		t.Fatal(logs, err)
	}
	for _, l := range logs {
		at := time.Now()
		if l == but {
			at = at.Add(-2 * time.Hour)
		}
		beatIn(t, dir, l, at)
	}
}

// beatAt puts a checkpoint with nothing new into a store, of this time.
func beatAt(t *testing.T, dir string, at time.Time) {
	t.Helper()
	beatIn(t, dir, filepath.Join(dir, "tlog/gate-1/*"), at)
}

// beatIn does so in the transparency log that lies there.
func beatIn(t *testing.T, dir, log string, at time.Time) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(log, "checkpoint/*"))
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	last := names[len(names)-1]
	b, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	c, err := tlog.ParseCheckpoint(b)
	if err != nil {
		t.Fatal(err)
	}
	c.Number, c.Old, c.Entries, c.Time, c.Closed = c.Number+1, c.Size, nil, at, false
	if err := c.Sign(testKey); err != nil {
		t.Fatal(err)
	}
	if b, err = c.Encode(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, tlog.CheckpointName(tlog.Dir(c.Gate, c.Log), c.Number)), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// keyFileOf is a file with the public key of a seed.
func keyFileOf(t *testing.T, seed byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "key.pub")
	pub := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize)).Public().(ed25519.PublicKey)
	if err := os.WriteFile(name, []byte(auditlog.FormatPublicKey(pub)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}
