package test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const bulkSize = 1 << 30

// A transfer of 1 GiB each way is byte-exact, at both ends and in the log. It runs the binaries as they are shipped.
func TestBulk(t *testing.T) {
	if noEngine {
		t.Skip("no Docker engine answers")
	}
	if testing.Short() {
		t.Skip("not in -short")
	}
	dir := t.TempDir()
	s, err := newState(dir, "auto")
	if err != nil {
		t.Fatal(err)
	}
	s.bin = t.TempDir()
	if err := build(s.bin, false); err != nil {
		t.Fatal(err)
	}
	if err := s.start("gate.yaml"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.end(); err != nil {
			t.Error(err)
		}
	}()

	// Half of it compresses and half does not, in turns, so that the log meets both.
	big := filepath.Join(dir, "big")
	f, err := os.Create(big)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.NewChaCha8([32]byte{1})
	sum := sha256.New()
	text := bytes.Repeat([]byte("2026-01-01T00:00:07Z payments: order 4711: card refused (code 51)\n"), 16<<10)
	noise := make([]byte, len(text))
	w := io.MultiWriter(f, sum)
	for left := bulkSize; left > 0; {
		random.Read(noise)
		for _, part := range [][]byte{text, noise} {
			part = part[:min(left, len(part))]
			if _, err := w.Write(part); err != nil {
				t.Fatal(err)
			}
			left -= len(part)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	want := hex.EncodeToString(sum.Sum(nil))

	in, err := os.Open(big)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	down := sha256.New()
	cmd := exec.Command("ssh", "-F", "ssh_config", "gate", "cat >/tmp/f; sha256sum </tmp/f >&2; cat /tmp/f")
	var stderr strings.Builder
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = dir, in, down, &stderr
	began := time.Now()
	if err := cmd.Run(); err != nil {
		t.Fatalf("ssh: %v: %s", err, stderr.String())
	}
	t.Logf("1 GiB there and back in %s", time.Since(began).Round(time.Millisecond))
	if !strings.HasPrefix(stderr.String(), want) {
		t.Errorf("the sandbox got %q, want %s", stderr.String(), want)
	}
	if got := hex.EncodeToString(down.Sum(nil)); got != want {
		t.Errorf("the client got %s, want %s", got, want)
	}

	// What the log gives back, once it is sealed.
	var id string
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		all, err := s.list()
		if err == nil && len(all) == 1 && all[0].State == "sealed" {
			id = all[0].ID
			break
		}
		if time.Now().After(end) {
			t.Fatalf("not sealed: %+v, %v", all, err)
		}
	}
	for _, stream := range []string{"in", "out"} {
		h := sha256.New()
		audit := exec.Command(filepath.Join(s.bin, "sallyport-audit"), "--store", filepath.Join(dir, "log"),
			"cat", id, "--channel", "1", "--stream", stream, "--raw")
		audit.Stdout = h
		if err := audit.Run(); err != nil {
			t.Fatalf("cat --stream %s: %v", stream, err)
		}
		if got := hex.EncodeToString(h.Sum(nil)); got != want {
			t.Errorf("the log's %s is %s, want %s", stream, got, want)
		}
	}
	if out, err := s.audit("verify", filepath.Join(dir, "log")); err != nil {
		t.Errorf("verify: %v\n%s", err, out)
	}
}
