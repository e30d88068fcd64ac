package file_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/auditlog/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) (auditlog.Store, auditlog.Source) {
		dir := t.TempDir()
		s, err := file.NewStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		src, err := file.OpenSource(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			src.Close()
			if left, err := os.ReadDir(filepath.Join(dir, ".tmp")); err != nil || len(left) > 0 {
				t.Errorf("temporary files left: %v %v", left, err)
			}
		})
		return s, src
	})
}

// A link in a directory of logs can't lead the auditor's tool elsewhere, nor a pipe make it wait.
func TestHostileDirectory(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, "x")); err != nil {
		t.Fatal(err)
	}
	src, err := file.OpenSource(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	for _, name := range []string{"x", "../" + filepath.Base(filepath.Dir(outside)) + "/secret", outside, "."} {
		if r, err := src.Open(t.Context(), name); err == nil {
			r.Close()
			t.Errorf("%s: opened", name)
		} else if strings.Contains(err.Error(), "secret\n") {
			t.Error(err)
		}
	}
}
