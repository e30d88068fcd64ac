package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What is extracted gets its name, never that of another file, and also where there are no links.
func TestKeep(t *testing.T) {
	dir := t.TempDir()
	temp := func() *os.File {
		f, err := os.CreateTemp(dir, "temp-*")
		if err == nil {
			_, err = f.WriteString("content")
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	unlinked := temp()
	if err := os.Remove(unlinked.Name()); err != nil { // what has no name can't be linked
		t.Fatal(err)
	}
	for _, f := range []*os.File{temp(), unlinked} {
		name := filepath.Join(dir, "out")
		if err := keep(f, name); err != nil {
			t.Error(err)
		}
		if b, err := os.ReadFile(name); string(b) != "content" || err != nil {
			t.Errorf("%q %v", b, err)
		}
		if err := keep(f, name); err == nil || !strings.Contains(err.Error(), "--out "+name+": is there already") {
			t.Errorf("over another file: %v", err)
		}
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(dir, "elsewhere"), name); err != nil {
			t.Fatal(err)
		}
		if err := keep(f, name); err == nil {
			t.Error("through a link")
		}
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}
