package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/auditlog"
)

// A file of which a part was read again is told as one file, given back, and held against its hash.
func TestExtractReadAgain(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		text := []byte("order 4711 refused\n")
		n := uint64(len(text))
		sum := sha256.Sum256(text)
		content := func(id, from, to uint64, p []byte) *auditlog.Content {
			h := sha256.Sum256(p[from:to])
			return &auditlog.Content{ID: id, Stream: auditlog.Output, Offset: from, Data: p[from:to], SHA256: h[:]}
		}
		read := func(id uint64, path string) *auditlog.Transfer {
			return &auditlog.Transfer{Protocol: "sftp", Op: "file", ID: id, Path: []byte(path),
				Read: &auditlog.TransferFlow{Bytes: n + 9, Kept: n + 9, Ranges: []uint64{0, n}, Whole: true, SHA256: sum[:]}}
		}
		session(t, l, "s", map[uint32][]auditlog.Body{1: {
			content(1, 0, n, text), content(1, 6, 15, text), read(1, "/same"),
			content(3, 0, n, text), &auditlog.Transfer{Protocol: "sftp", Op: "file", ID: 3, Path: []byte("/limit"), Read: &auditlog.TransferFlow{Bytes: 2 * n,
				Kept: n, Ranges: []uint64{0, n}, Whole: true, SHA256: sum[:]}},
			content(2, 0, n, text), content(2, 6, 15, []byte("order 4712 granted\n")), read(2, "/changed"),
		}})
	})
	for _, path := range []string{"/same", "/limit"} {
		out, errs, code := audit(t, "extract", "s", path, "--store", dir)
		if code != 0 || out != "order 4711 refused\n" {
			t.Errorf("%s: %d %q %s", path, code, out, errs)
		}
	}
	out, errs, code := audit(t, "extract", "s", "/changed", "--store", dir)
	if code != 1 || out != "" || !strings.Contains(errs, "is not what passed (19 bytes, ") {
		t.Errorf("changed between the two: %d %q %s", code, out, errs)
	}
	for _, c := range [][]string{{"files", "s"}, {"show", "s"}, {"report", "s"}} {
		out, errs, code = audit(t, append(c, "--store", dir)...)
		if code != 0 || !strings.Contains(out, "9 B of that again") || !strings.Contains(out, fmt.Sprintf("%x", sha256.Sum256([]byte("order 4711 refused\n")))) {
			t.Errorf("%v: %d %s\n%s", c, code, errs, out)
		}
	}
}

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
