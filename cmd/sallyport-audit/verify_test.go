package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
)

// treeStore is a store of a gate that keeps a transparency log, and the file of its key.
func treeStore(t *testing.T, sessions ...string) (dir, keys string) {
	t.Helper()
	dir, state := t.TempDir(), t.TempDir()
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
	published, err := filepath.Glob(filepath.Join(dir, "keys/gate-1/*.pub"))
	if err != nil || len(published) != 1 {
		t.Fatal(published, err)
	}
	return dir, published[0]
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
	tlog, err := filepath.Glob(filepath.Join(other, "tlog/gate-1/*/checkpoint/*"))
	if err != nil || len(tlog) < 2 {
		t.Fatal(tlog, err)
	}
	if err := os.Remove(tlog[len(tlog)-1]); err != nil {
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
