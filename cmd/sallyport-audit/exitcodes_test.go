package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog/storetest"
)

// Each exit code that verify documents, by each of the reasons that it names, and which comes first of several.
func TestVerifyExitCodes(t *testing.T) {
	whole, keys := treeStore(t, "s1", "s2")
	hour := []string{"--beat", "1h"}
	segment := func(dir, id string) string {
		t.Helper()
		names, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*", id, "00000000.seg"))
		if err != nil || len(names) != 1 {
			t.Fatal(names, err)
		}
		return names[0]
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	edit := func(name string, f func(b []byte) []byte) {
		t.Helper()
		b, err := os.ReadFile(name)
		must(err)
		must(os.WriteFile(name, f(b), 0o600))
	}
	checkpoints := func(dir string) []string {
		t.Helper()
		names, err := filepath.Glob(filepath.Join(dir, "tlog/gate-1/*/checkpoint/*"))
		if err != nil || len(names) < 2 {
			t.Fatal(names, err)
		}
		return names
	}
	cut := func(dir string) { // the newest checkpoint, with a leaf: its session stays
		t.Helper()
		names := checkpoints(dir)
		must(os.Remove(names[len(names)-1]))
	}
	old := func(dir string) { beatAt(t, dir, time.Now().Add(-2*time.Hour)) }
	link := func(dir string) {
		name := segment(dir, "s2")
		must(os.Remove(name))
		must(os.Symlink(os.DevNull, name))
	}
	damage := func(dir string) {
		edit(segment(dir, "s1"), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	}
	for _, c := range []struct {
		what   string
		change func(dir string)
		args   []string
		code   int
		want   string // in what is printed
	}{
		{"whole", nil, nil, 0, "2 logs: 2 sealed"},
		{"whole, with all that can be asked for", nil, append(hour, "--live", "--closed", "--sealed", "--gate", "gate-1"), 0, "closed by its gate"},
		{"no end, and not asked for it", cut, nil, 0, "in no checkpoint yet"},
		{"old, and not asked for it", old, nil, 0, "1 transparency log neither goes on nor was closed"},
		{"closed long ago", nil, []string{"--closed", "--beat", "1ns"}, 0, "closed by its gate"},

		{"an unknown flag", nil, []string{"--none"}, 1, "unknown flag"},
		{"two stores", nil, []string{"x", "y"}, 1, "accepts at most 1 arg"},
		{"no day", nil, []string{"--day", "2026-13-01"}, 1, "is no day"},
		{"no key file", nil, []string{"--key", "none"}, 1, "no such file"},
		{"no kept checkpoint", nil, []string{"--since", "none"}, 1, "no such file"},
		{"no identity", nil, []string{"--identity", "none"}, 1, "no such file"},
		{"a segment that can't be read", link, nil, 1, "not all was verified: read sessions/"},
		{"a segment that can't be read, told", link, nil, 1, "0 damaged, 1 unreadable"},
		{"a segment that can't be read, and damage", func(dir string) { link(dir); damage(dir) }, nil, 2, "escapes"},
		{"nothing there", func(dir string) { must(os.RemoveAll(dir)); must(os.Mkdir(dir, 0o700)) }, nil, 1, "there is no log in"},
		{"a store that is not there", func(dir string) { must(os.RemoveAll(dir)) }, nil, 1, "no such file"},
		{"a session that is not there", nil, []string{"--store", whole}, 1, "is not there"},
		{"a store that can't be read", func(dir string) { // a directory that leads into itself
			name := segment(dir, "s1")
			must(os.Remove(name))
			must(os.Symlink(filepath.Base(name), name))
		}, nil, 1, "too many levels of symbolic links"},

		{"altered", damage, nil, exitDamaged, "1 damaged"},
		{"cut", func(dir string) { edit(segment(dir, "s1"), func(b []byte) []byte { return b[:len(b)-9] }) }, nil, exitDamaged, "cut within"},
		{"out of order", func(dir string) { must(os.Rename(segment(dir, "s1"), segment(dir, "s2"))) }, nil, exitDamaged, "is not in its place"},
		{"missing", func(dir string) { must(os.RemoveAll(filepath.Dir(segment(dir, "s1")))) }, nil, exitDamaged, "1 log is missing"},
		{"a checkpoint missing", func(dir string) { must(os.Remove(checkpoints(dir)[0])) }, nil, exitDamaged, "missing before it"},
		{"an unknown key", nil, []string{"--key", keyFileOf(t, 3)}, exitDamaged, "not pinned"},
		{"a log written anew by who has the key", func(dir string) {
			edit(segment(dir, "s1"), func(b []byte) []byte {
				return storetest.Resign(t, b, testKey, func(payload []byte) { payload[len(payload)-1] ^= 1 })
			})
		}, nil, exitDamaged, "1 damaged"},

		{"no checkpoint has it", cut, []string{"--sealed"}, exitUnsealed, "2 are in no checkpoint yet"},
		{"no end", func(dir string) {
			must(os.CopyFS(dir, os.DirFS(sample)))
			names, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*/sample-0-zstd/*.seg"))
			if err != nil || len(names) < 2 {
				t.Fatal(names, err)
			}
			must(os.Remove(names[len(names)-1]))
		}, []string{"--sealed"}, exitUnsealed, "1 logs have no end yet"},
		{"too old", old, []string{"--live"}, exitStale, "the gate is down"},
		{"of the future", func(dir string) { beatAt(t, dir, time.Now().Add(time.Hour)) }, []string{"--live"}, exitStale, "ahead of this machine's clock"},
		{"a gate that is not heard of", nil, append(hour, "--live", "--gate", "gate-2"), exitStale, "there is no checkpoint of gate gate-2"},
		{"not closed", old, []string{"--closed"}, exitStale, "neither goes on nor was closed"},
		{"of the future, and not closed", func(dir string) { beatAt(t, dir, time.Now().Add(time.Hour)) }, []string{"--closed"}, exitStale, "neither goes on nor was closed"},

		{"damaged and old", func(dir string) { damage(dir); old(dir) }, []string{"--live", "--closed", "--sealed"}, exitDamaged, "1 damaged"},
		{"damaged and in no checkpoint", func(dir string) { damage(dir); cut(dir) }, []string{"--sealed"}, exitDamaged, "1 damaged"},
		{"old and in no checkpoint", cut, []string{"--sealed", "--live", "--beat", "1ns"}, exitStale, "the gate is down"},
		{"not closed and in no checkpoint", cut, []string{"--sealed", "--closed", "--beat", "1ns"}, exitStale, "neither goes on nor was closed"},
	} {
		dir := filepath.Join(t.TempDir(), "store")
		must(os.CopyFS(dir, os.DirFS(whole)))
		if c.change != nil {
			c.change(dir)
		}
		args := []string{"verify", dir, "--key", keys}
		if c.what == "a session that is not there" {
			args[1] = "s9"
		}
		// Of a copy, objects count as just come: a log without a leaf may be on its way.
		out, errs, code := audit(t, append(args, c.args...)...)
		if code != c.code || !strings.Contains(out+errs, c.want) {
			t.Errorf("%s: code %d, want %d and %q\n%s%s", c.what, code, c.code, c.want, out, errs)
		}
		if c.code == 1 && strings.Contains(out, "logs: ") && !strings.Contains(out, "could not be read") && !strings.Contains(errs, "there is no log") {
			t.Errorf("%s: a verdict, where none could be found out\n%s", c.what, out)
		}
	}
	// Content that no identity opens: after all the others.
	for _, c := range []struct {
		args []string
		code int
	}{
		{nil, 0}, {[]string{"-i", nativeAuditor, "-i", hybridAuditor}, 0}, {[]string{"-i", hybridAuditor}, 1},
		{[]string{"-i", hybridAuditor, "--live"}, exitStale}, {[]string{"-i", hybridAuditor, "--key", keyFileOf(t, 3)}, exitDamaged},
	} {
		if out, errs, code := audit(t, append([]string{"verify", encryptedSample}, c.args...)...); code != c.code {
			t.Errorf("encrypted, %v: code %d, want %d\n%s%s", c.args, code, c.code, out, errs)
		}
	}
}
