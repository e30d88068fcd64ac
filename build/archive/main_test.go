package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// The same files give the same bytes, whenever and by whomever they were made.
func TestSame(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	for _, kind := range []string{".zip", ".tar.gz"} {
		var first []byte
		for i := range 2 {
			dir, out := t.TempDir(), filepath.Join(t.TempDir(), "a"+kind)
			for _, f := range []struct {
				name string
				mode os.FileMode
			}{{"tool/b", 0o600}, {"tool/a", 0o750}, {"tool/man/c", 0o644}} {
				name := filepath.Join(dir, f.name)
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, []byte(f.name), f.mode|os.FileMode(i*0o44)); err != nil {
					t.Fatal(err)
				}
				if err := os.Chtimes(name, time.Unix(int64(i), 0), time.Unix(int64(i), 0)); err != nil {
					t.Fatal(err)
				}
			}
			if err := run(dir, out); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(out)
			if err != nil || len(b) < 100 {
				t.Fatal(len(b), err)
			}
			if i == 0 {
				first = b
			} else if !bytes.Equal(b, first) {
				t.Errorf("%s: other bytes", kind)
			}
		}
	}
	if err := run(t.TempDir(), filepath.Join(t.TempDir(), "a.rar")); err == nil {
		t.Error("a.rar")
	}
	t.Setenv("SOURCE_DATE_EPOCH", "")
	if err := run(t.TempDir(), filepath.Join(t.TempDir(), "a.zip")); err == nil {
		t.Error("no time")
	}
}
