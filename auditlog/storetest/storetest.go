// Package storetest is the contract of auditlog.Store and auditlog.Source as a test suite, and Resign for tests of what is verified.
package storetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sallyport/sallyport/auditlog"
)

// Run runs the suite. open gives an empty store and a source that reads what is put there; both live until the test ends.
func Run(t *testing.T, open func(t *testing.T) (auditlog.Store, auditlog.Source)) {
	t.Run("PutGet", func(t *testing.T) {
		store, src := open(t)
		large := make([]byte, 9<<20)
		rand.Read(large)
		for name, content := range map[string][]byte{
			"sessions/2026/11/22/s1/00000000.seg": large, "sessions/2026/11/22/s1/00000001.seg": {}, "gate/g/2026/11/22/r/00000000.seg": {0}} {
			put(t, store, name, content)
			if got := get(t, src, name); !bytes.Equal(got, content) {
				t.Errorf("%s: %d bytes, put %d", name, len(got), len(content))
			}
		}
	})
	t.Run("PutFile", func(t *testing.T) {
		store, src := open(t)
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := store.Put(t.Context(), "sessions/f", f, 7); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if got := get(t, src, "sessions/f"); string(got) != "content" {
			t.Errorf("%q", got)
		}
	})
	t.Run("Again", func(t *testing.T) {
		store, src := open(t)
		put(t, store, "sessions/x", []byte("one"))
		put(t, store, "sessions/x", []byte("one")) // no error: an upload whose answer was lost
		for _, other := range []string{"two", "on", "one more", ""} {
			err := store.Put(t.Context(), "sessions/x", strings.NewReader(other), int64(len(other)))
			if !errors.Is(err, auditlog.ErrExists) {
				t.Errorf("put %q over \"one\": %v", other, err)
			}
		}
		if got := get(t, src, "sessions/x"); string(got) != "one" {
			t.Errorf("%q after a refused put", got)
		}
	})
	t.Run("Fails", func(t *testing.T) {
		store, src := open(t)
		cancelled, cancel := context.WithCancel(t.Context())
		cancel()
		for what, err := range map[string]error{
			"short":     store.Put(t.Context(), "sessions/short", strings.NewReader("ab"), 3),
			"long":      store.Put(t.Context(), "sessions/long", strings.NewReader("abcd"), 3),
			"broken":    store.Put(t.Context(), "sessions/broken", io.MultiReader(strings.NewReader("a"), broken{}), 3),
			"cancelled": store.Put(cancelled, "sessions/cancelled", strings.NewReader("abc"), 3),
		} {
			if err == nil {
				t.Errorf("%s: no error", what)
			}
		}
		if names := list(t, src, ""); len(names) > 0 {
			t.Errorf("there after failed puts: %v", names)
		}
		if _, err := src.Open(t.Context(), "sessions/short"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("open what is not there: %v", err)
		}
	})
	t.Run("Names", func(t *testing.T) {
		store, src := open(t)
		for _, name := range []string{"", ".", "..", "../x", "/x", "a/../../x", "a//x", "a/", "a/./x"} {
			if err := store.Put(t.Context(), name, strings.NewReader("x"), 1); err == nil {
				t.Errorf("put %q: no error", name)
			}
		}
		if names := list(t, src, ""); len(names) > 0 {
			t.Errorf("there: %v", names)
		}
	})
	t.Run("List", func(t *testing.T) {
		store, src := open(t)
		all := []string{"gate/a/1", "sessions/2026/a/0", "sessions/2026/a/1", "sessions/2026/ab/0", "sessions/2027/a/0"}
		for _, name := range all {
			put(t, store, name, []byte(name))
		}
		for prefix, want := range map[string][]string{"": all, "sessions/": all[1:], "sessions/2026/a": all[1:4], "sessions/2026/a/": all[1:3],
			"sessions/2026/a/1": all[2:3], "nothing/": nil, "sessions/2026/a/1/x": nil} {
			if got := list(t, src, prefix); !slices.Equal(got, want) {
				t.Errorf("list %q: %v, want %v", prefix, got, want)
			}
		}
		for o, err := range src.List(t.Context(), "gate/") {
			if err != nil || o.Size != int64(len(o.Name)) || o.Modified.IsZero() {
				t.Errorf("%+v %v", o, err)
			}
		}
		for range src.List(t.Context(), "") {
			break // must not panic or hang
		}
	})
	t.Run("Concurrent", func(t *testing.T) {
		store, src := open(t)
		content := bytes.Repeat([]byte("x"), 100<<10)
		var wg sync.WaitGroup
		for range 8 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for _, name := range []string{"sessions/1/a", "sessions/2/a", "sessions/3/a"} {
					if err := store.Put(t.Context(), name, bytes.NewReader(content), int64(len(content))); err != nil {
						t.Errorf("put the same at once: %v", err)
					}
				}
			}()
		}
		wg.Wait()
		if names := list(t, src, ""); len(names) != 3 {
			t.Errorf("%v", names)
		}
	})
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("broken reader") }

func put(t *testing.T, store auditlog.Store, name string, content []byte) {
	t.Helper()
	if err := store.Put(t.Context(), name, bytes.NewReader(content), int64(len(content))); err != nil {
		t.Fatalf("put %s: %v", name, err)
	}
}

func get(t *testing.T, src auditlog.Source, name string) []byte {
	t.Helper()
	r, err := src.Open(t.Context(), name)
	if err != nil {
		t.Fatalf("open %s: %v", name, err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("read %s: %v", name, err)
	}
	return b
}

func list(t *testing.T, src auditlog.Source, prefix string) []string {
	t.Helper()
	var names []string
	for o, err := range src.List(t.Context(), prefix) {
		if err != nil {
			t.Fatalf("list %q: %v", prefix, err)
		}
		names = append(names, o.Name)
	}
	return names
}
