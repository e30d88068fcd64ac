package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/auditlog/storetest"
)

const (
	encryptedSample = "../../auditlog/testdata/v1-encrypted"
	nativeAuditor   = "../../auditlog/testdata/auditor.age.txt"
	hybridAuditor   = "../../auditlog/testdata/auditor.pq.age.txt"
	sshAuditor      = "../../auditlog/testdata/auditor_ed25519"
)

// An encrypted log is verified by anyone, and read with an identity; who has none is told what is not shown.
func TestEncrypted(t *testing.T) {
	const text = "the cat sat on the payments"
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte("AGE-SECRET-KEY-1QQQ\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		want []string // in stdout or stderr
		none string   // not in either
	}{
		{[]string{"verify"}, 0, []string{"2 logs: 2 sealed", "encrypted to X25519, ssh-ed25519", "encrypted to mlkem768x25519"}, text},
		{[]string{"verify"}, 0, []string{"2 logs are encrypted: their content was not looked at, all else was checked"}, text},
		{[]string{"verify", "-i", nativeAuditor}, 1, []string{"2 logs: 2 sealed", "1 log is encrypted", "the content of 1 logs was not checked"}, text},
		{[]string{"verify", "-i", nativeAuditor, "-i", hybridAuditor}, 0, []string{"2 logs: 2 sealed"}, "content was not"},
		{[]string{"verify", "-i", sshAuditor, "-i", hybridAuditor}, 0, []string{"2 logs: 2 sealed"}, "content was not"},
		{[]string{"verify", "sample-encrypted", "-i", nativeAuditor}, 0, []string{"sealed      sample-encrypted"}, "content was not"},
		{[]string{"verify", "sample-encrypted", "-i", sshAuditor}, 0, []string{"sealed      sample-encrypted"}, "content was not"},
		{[]string{"verify", "sample-encrypted", "-i", hybridAuditor}, 1, []string{"sealed      sample-encrypted", "none of the identities given is a recipient"}, text},
		{[]string{"verify", "sample-hybrid", "-i", hybridAuditor}, 0, []string{"sealed      sample-hybrid"}, "content was not"},
		{[]string{"verify", "sample-hybrid", "-i", nativeAuditor}, 1, []string{"sealed      sample-hybrid", "none of the identities given is a recipient"}, text},
		{[]string{"verify", "sample-hybrid"}, 0, []string{"1 log is encrypted: its content was not looked at"}, text},
		{[]string{"verify", "-i", bad}, 1, []string{"--identity: ", "line 1: malformed identity"}, "sealed"},
		{[]string{"verify", "-i", "none"}, 1, []string{"--identity: ", "no such file"}, "sealed"},
		{[]string{"show", "sample-encrypted"}, 1, []string{"session sample-encrypted: sealed", "not shown: 10 records of 1 logs", "to X25519, ssh-ed25519", "give an identity with -i"}, text},
		{[]string{"show", "sample-encrypted", "-i", hybridAuditor}, 1, []string{"not shown: 10 records", "none of the identities given is a recipient"}, text},
		{[]string{"show", "sample-encrypted", "-i", nativeAuditor}, 0, []string{text, "alice"}, "not shown"},
		{[]string{"show", "sample-encrypted", "-i", hybridAuditor, "--identity", sshAuditor}, 0, []string{text}, "not shown"},
		{[]string{"show", "sample-hybrid", "-i", hybridAuditor}, 0, []string{text}, "not shown"},
		{[]string{"cat", "sample-hybrid"}, 1, []string{"not shown: 10 records"}, text},
		{[]string{"cat", "sample-hybrid", "-i", hybridAuditor}, 0, []string{text, `"kind":"end"`}, "not shown"},
		{[]string{"list", "-o", "json"}, 1, []string{`"id":"sample-hybrid"`, "not shown: 20 records of 2 logs", "X25519"}, "alice"},
		{[]string{"list", "-i", sshAuditor}, 1, []string{"alice", "not shown: 10 records of 1 logs"}, text},
		{[]string{"list", "-i", sshAuditor, "-i", hybridAuditor}, 0, []string{"alice"}, "not shown"},
		{[]string{"files", "-i", sshAuditor}, 1, []string{"not shown: 10 records of 1 logs"}, text},
		{[]string{"show", "sample-encrypted"}, 1, []string{"\n  not shown  10 of 10 records", "its end is not shown"}, "still open"},
		{[]string{"commands", "sample-encrypted"}, 1, []string{"not shown  10 of 10 records"}, "not reported"},
		{[]string{"commands", "sample-encrypted", "-o", "json"}, 1, []string{`"unread_records":10`}, text},
		{[]string{"list", "-o", "json"}, 1, []string{`"unread_records":10`}, text},
		{[]string{"search", "cat sat"}, 1, []string{"not shown: 20 records of 2 logs"}, "cat sat"},
		{[]string{"search", "cat sat", "-i", sshAuditor}, 1, []string{text, "not shown: 10 records of 1 logs"}, "nothing"},
		{[]string{"play", "sample-encrypted"}, 1, []string{"nothing was printed", "not shown: 10 records of 1 logs"}, text},
		{[]string{"export", "sample-encrypted", "-f", "asciicast-v3"}, 1, []string{"not shown: 10 records of 1 logs"}, text},
		{[]string{"extract", "sample-encrypted", "/x"}, 1, []string{"no such file was transferred", "not shown: 10 records of 1 logs"}, text},
		{[]string{"report", "sample-encrypted"}, 1, []string{"It is encrypted, and was not read in full", "<th>not shown</th><td>10 of 10 records"}, text},
		{[]string{"report"}, 1, []string{`<p class="damaged">2 logs are encrypted, and were not read in full`}, text},
		{[]string{"report", "-f", "md"}, 1, []string{"2 logs are encrypted, and were not read in full"}, text},
		{[]string{"report", "sample-encrypted", "-i", sshAuditor}, 0, []string{text}, "not read"},
		{[]string{"list", "-i", bad}, 1, []string{"--identity: ", "line 1: malformed identity"}, "KEY-1QQQ"},
		{[]string{"list", "-i", "none"}, 1, []string{"--identity: ", "no such file"}, "alice"},
	} {
		out, errs, code := audit(t, append(c.args, "--store", encryptedSample)...)
		if code != c.code || strings.Contains(out+errs, c.none) {
			t.Errorf("%v: exit code %d\n%s%s", c.args, code, out, errs)
		}
		for _, w := range c.want {
			if !strings.Contains(out+errs, w) {
				t.Errorf("%v: no %q in\n%s%s", c.args, w, out, errs)
			}
		}
	}
}

// Bytes that only who has the key can have written, as all sums fit, and that are not what a recipient can open: nobody sees it but who
// has an identity. For each type of recipient.
func TestVerifyEncryptedContent(t *testing.T) {
	for id, name := range map[string]string{nativeAuditor: "sample-encrypted", sshAuditor: "sample-encrypted", hybridAuditor: "sample-hybrid"} {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(encryptedSample)); err != nil {
			t.Fatal(err)
		}
		segments, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*", name, "*.seg"))
		if err != nil || len(segments) != 4 {
			t.Fatal(segments, err)
		}
		file := segments[len(segments)-1] // none has its hash
		whole, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		key := keyFileOf(t, 7)
		run := func(code int, want string, args ...string) {
			t.Helper()
			out, errs, got := audit(t, append(args, "--store", dir, "--key", key)...)
			if got != code || !strings.Contains(out+errs, want) {
				t.Errorf("%s %v: exit code %d, want %d and %q\n%s%s", name, args, got, code, want, out, errs)
			}
		}
		run(0, "0 damaged", "verify")
		flipped := storetest.Resign(t, whole, testKey, func(payload []byte) { payload[len(payload)/2] ^= 1 })
		if err := os.WriteFile(file, flipped, 0o600); err != nil {
			t.Fatal(err)
		}
		run(0, "0 damaged", "verify")
		run(exitDamaged, "does not decrypt: it is not of this place, or was altered by who could sign it", "verify", "-i", id)
		run(exitDamaged, "does not decrypt", "verify", name, "-i", id)
		// Changed by who has no key, it needs no identity.
		whole[len(whole)/2] ^= 1
		if err := os.WriteFile(file, whole, 0o600); err != nil {
			t.Fatal(err)
		}
		run(exitDamaged, "1 damaged", "verify")
	}
}

// writeIndexed writes sessions as a gate does that indexes them.
func writeIndexed(t *testing.T, dir string, recipients []string, f func(l *auditlog.Log)) {
	t.Helper()
	store, err := file.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: filepath.Join(t.TempDir(), "spool"), Index: true, Recipients: recipients}, testKey,
		store, "gate-1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f(l)
	if err := l.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// A list takes what the index has, says so, and reads what it does not have; a log that was exchanged is read.
func TestIndex(t *testing.T) {
	recipient := func() string {
		b, err := os.ReadFile(sshAuditor + ".pub")
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}()
	for _, recipients := range [][]string{nil, {recipient}} {
		dir := t.TempDir()
		two := func(l *auditlog.Log) {
			for _, id := range []string{"s1", "s2"} {
				session(t, l, id, map[uint32][]auditlog.Body{1: {&auditlog.Request{Type: "exec", Command: []byte("uptime " + id), OK: true}}})
			}
		}
		writeIndexed(t, dir, recipients, two)
		id := []string{"--store", dir, "-i", sshAuditor}
		run := func(code int, want, none string, args ...string) {
			t.Helper()
			out, errs, got := audit(t, append(args, id...)...)
			if got != code || !strings.Contains(out+errs, want) || none != "" && strings.Contains(out+errs, none) {
				t.Errorf("%v: exit code %d, want %d with %q and without %q:\n%s%s", args, got, code, want, none, out, errs)
			}
		}
		run(0, `"alerts":0,"input_bytes":0,"output_bytes":0,"cause":"client-left","state":"sealed","from_index":true`, "", "list", "-o", "json")
		run(0, "sealed (index)", "", "list")
		run(0, `"state":"sealed"`, "from_index", "list", "-o", "json", "--no-index")
		run(0, "2 sessions, 2 indexed", "not there", "index", "status")
		run(0, "2 logs compared: 0 otherwise in the index, 0 not usable from it", "", "index", "verify")
		run(0, " 0 damaged;", "", "verify")
		if recipients != nil {
			id = []string{"--store", dir}
			run(1, "not shown: ", "alice", "list", "-o", "json")
			run(0, "2 sessions, 2 indexed", "", "index", "status")
			id = []string{"--store", dir, "-i", sshAuditor}
		}

		// A session that was removed is named; one whose log is another is read.
		log := func(id string) string {
			found, err := filepath.Glob(filepath.Join(dir, "sessions", "*", "*", "*", id))
			if err != nil || len(found) != 1 {
				t.Fatal(found, err)
			}
			return found[0]
		}
		aside := filepath.Join(t.TempDir(), "s1")
		gone := log("s1")
		if err := os.Rename(gone, aside); err != nil {
			t.Fatal(err)
		}
		run(0, "not there: s1", "s2", "index", "status")
		if err := os.Rename(aside, gone); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(filepath.Join(log("s2"), "00000000.seg"), os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString("x"); err != nil {
			t.Fatal(err)
		}
		f.Close()
		run(0, `"state":"damaged"`, "", "list", "-o", "json")

		// The index is lost: made anew from the logs, for the auditor alone.
		if err := os.RemoveAll(filepath.Join(dir, "index")); err != nil {
			t.Fatal(err)
		}
		run(0, `"state":"sealed"`, "from_index", "list", "-o", "json")
		cache := filepath.Join(t.TempDir(), "cache")
		run(1, "not there: make it with", "", "list", "--index-cache", cache)
		run(0, "1 sessions in", "", "index", "rebuild", "--index-cache", cache)
		info, err := os.Stat(cache)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v %v", info.Mode(), err)
		}
		run(0, `"from_index":true`, "", "list", "-o", "json", "--index-cache", cache)
		run(1, "not a cache", "", "list", "--index-cache", nativeAuditor)
		run(1, "say --index-cache", "", "index", "rebuild")
	}
}

// An object of the index that can't be read, or that is gone when it is opened, costs the short cut alone: it is named, and the logs
// are read.
func TestIndexUnread(t *testing.T) {
	for _, to := range []string{os.DevNull, "gone"} { // out of the store, and to nowhere
		dir := t.TempDir()
		for _, id := range []string{"s1", "s2"} { // an index log each
			writeIndexed(t, dir, nil, func(l *auditlog.Log) {
				session(t, l, id, map[uint32][]auditlog.Body{1: {&auditlog.Request{Type: "exec", Command: []byte("uptime " + id), OK: true}}})
			})
		}
		segments, err := filepath.Glob(filepath.Join(dir, "index/*/*/*/*/*/*.seg"))
		if err != nil || len(segments) != 2 {
			t.Fatal(segments, err)
		}
		if err := errors.Join(os.Remove(segments[0]), os.Symlink(to, segments[0])); err != nil {
			t.Fatal(err)
		}
		name, err := filepath.Rel(dir, segments[0])
		if err != nil {
			t.Fatal(err)
		}
		damaged := exitError
		if to == "gone" { // to verify it is missing
			damaged = exitDamaged
		}
		cache := filepath.Join(t.TempDir(), "cache")
		for _, c := range []struct {
			code int
			out  string // how often each of these is in what is printed
			n    int
			args []string
		}{
			{1, `"from_index":true`, 1, []string{"list", "-o", "json"}},
			{1, `"commands":["uptime s`, 2, []string{"list", "-o", "json"}},
			{1, "uptime s2", 1, []string{"list", "--has-command", "s2"}},
			{0, "uptime s", 2, []string{"list", "--no-index"}},
			{damaged, "2 sessions, 1 indexed", 1, []string{"index", "status"}},
			{damaged, "2 logs compared: 0 otherwise in the index, 1 not usable from it", 1, []string{"index", "verify"}},
			{1, "2 sessions in", 1, []string{"index", "rebuild", "--index-cache", cache}},
			{1, `"from_index":true`, 2, []string{"list", "-o", "json", "--index-cache", cache}},
		} {
			out, errs, code := audit(t, append(c.args, "--store", dir)...)
			told := strings.Contains(errs, "index: read "+name+": ") && strings.Contains(errs, "the logs are read instead\n")
			if code != c.code || strings.Count(out, c.out) != c.n || told == (c.code == 0) {
				t.Errorf("%s, %v: exit code %d\n%s%s", to, c.args, code, out, errs)
			}
		}
	}
}

// Who has an identity is told what the log says, not the little that an index has in the clear beside an encrypted one that is lost.
func TestIndexInTheClear(t *testing.T) {
	recipient, err := os.ReadFile(sshAuditor + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	writeIndexed(t, dir, []string{string(recipient)}, func(l *auditlog.Log) {
		session(t, l, "s1", map[uint32][]auditlog.Body{1: {&auditlog.Request{Type: "exec", Command: []byte("uptime"), OK: true}}})
	})
	indexes, err := filepath.Glob(filepath.Join(dir, "index/*/*/*/*/*"))
	if err != nil || len(indexes) != 2 {
		t.Fatal(indexes, err)
	}
	for _, name := range indexes {
		if !strings.HasSuffix(name, "-c") {
			if err := os.RemoveAll(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, args := range [][]string{{}, {"--user", "alice"}, {"--has-command", "uptime"}} {
		out, errs, code := audit(t, append([]string{"list", "-o", "json", "--store", dir, "-i", sshAuditor}, args...)...)
		if code != 0 || !strings.Contains(out, `"user":"alice"`) || !strings.Contains(out, `"commands":["uptime"]`) || strings.Contains(out, "from_index") {
			t.Errorf("%v: exit code %d\n%s%s", args, code, out, errs)
		}
	}
	out, errs, code := audit(t, "list", "-o", "json", "--store", dir)
	if code != 1 || !strings.Contains(out, `"from_index":true`) || strings.Contains(out, "alice") {
		t.Errorf("no identity: exit code %d\n%s%s", code, out, errs)
	}
}
