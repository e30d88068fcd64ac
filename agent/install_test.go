package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestInstall(t *testing.T) {
	dir := t.TempDir()
	for range 2 { // again over the first
		if err := install(dir); err != nil {
			t.Fatal(err)
		}
	}
	name := filepath.Join(dir, installedName)
	st, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode() != 0o111 {
		t.Errorf("mode %v", st.Mode())
	}
	// Readable again for this comparison, whoever runs it.
	if err := os.Chmod(name, 0o400); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes, want %d", len(got), len(want))
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
	if install(filepath.Join(dir, "none")) == nil {
		t.Error("a directory that is not there")
	}
}
