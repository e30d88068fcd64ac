package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
)

// containerSSH writes a file as ContainerSSH does: a message after the other in version 2, without an end of the compression.
func containerSSH(t *testing.T, name, connection string, messages ...[]any) {
	t.Helper()
	var b bytes.Buffer
	b.WriteString("ContainerSSH-Auditlog" + strings.Repeat("\x00", 11))
	z := gzip.NewWriter(&b)
	if err := binary.Write(&b, binary.LittleEndian, uint64(2)); err != nil {
		t.Fatal(err)
	}
	for i, m := range messages {
		var channel any
		if len(m) > 2 {
			channel = m[2]
		}
		c, err := cbor.Marshal(map[string]any{"connectionId": connection, "timestamp": 1_700_000_000_000_000_000 + int64(i)*1_000_000_000, "type": m[0], "payload": m[1], "channelId": channel})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := z.Write(c); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestImport(t *testing.T) {
	type p = map[string]any
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "archive")
	shell := [][]any{{0, p{"remoteAddr": "192.0.2.7"}}, {100, p{"username": "bob", "password": []byte("hunter2")}}, {101, p{"username": "bob", "password": []byte("hunter2")}},
		{301, p{"channelType": "session"}, 0}, {404, p{"requestId": 1, "term": "xterm", "columns": 80, "rows": 25}, 0}, {405, p{"requestId": 2}, 0},
		{500, p{"stream": 1, "data": []byte("bob$ \x1b]52;c;cm0=\x07")}, 0}, {500, p{"stream": 1, "data": []byte("the nee\x1b[1mdle\r\n")}, 0}, {499, p{"exitStatus": 3}, 0}, {1, nil}}
	containerSSH(t, filepath.Join(from, "one"), "0123abcd", shell...)
	containerSSH(t, filepath.Join(from, "two"), "../../escape\x1b[2J", shell[:7]...)
	if err := os.WriteFile(filepath.Join(from, "note\x1b.txt"), []byte("not a log"), 0o600); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(t.TempDir(), "key.pem")
	if _, err := auditlog.CreateKey(key); err != nil {
		t.Fatal(err)
	}
	out, errs, code := audit(t, "import", from, "--to", to, "--signing-key", key)
	for _, want := range []string{"imported      " + from + "/one 0123abcd, 9 records\n", `not imported  ` + from + `/note\x1b.txt -, 0 records: not an audit log`, "/two import-"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if code != 1 || !strings.Contains(errs, "2 imported, 0 already there, 1 not imported; signed by SHA256:") || strings.Contains(errs, "thrown away") {
		t.Errorf("code %d %s", code, errs)
	}
	// All commands read it, and it is what it says.
	for _, c := range []struct {
		args string
		want []string
	}{
		{"list", []string{"0123abcd", "bob", "192.0.2.7", "2023-11-14 22:13:20Z", "9s", "shell", "client-left", "interrupted"}},
		{"list --user bob --since 2023-11-14 --until 2023-11-14 -o json", []string{`"imported_from":"ContainerSSH, version 2"`, `"state":"sealed"`}},
		{"show 0123abcd", []string{"imported   ContainerSSH, version 2, file one, sha256 ", "could have been changed by whoever had it", "user bob, password, proven", "code 3"}},
		{"show import-", []string{"the file ends before the connection did", "interrupted"}},
		{"search needle", []string{"terminal 1  bob$ the needle"}},
		{"play 0123abcd --speed 1000", []string{"bob$ the nee\x1b[1mdle"}},
		{"export 0123abcd -f asciicast-v3", []string{`"cols":80,"rows":25,"type":"xterm"`, `[1.000000,"x","3"]`}},
		{"cat 0123abcd", []string{`"kind":"import","body":{"format":"ContainerSSH, version 2","file":"one","size":`, `"session":"0123abcd"`, `"sha256":"`}},
		{"verify --key " + key + ".pub", []string{"2 logs: 2 sealed"}},
	} {
		out, errs, code := audit(t, append(strings.Fields(c.args), "--store", to, "--utc")...)
		if code != 0 || strings.Contains(out, "hunter2") || strings.Contains(out, "52;c") && !strings.HasPrefix(c.args, "cat") {
			t.Errorf("%s: code %d %s\n%s", c.args, code, errs, out)
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: no %q in\n%s", c.args, w, out)
			}
		}
	}
	// Again: nothing changes.
	if out, errs, _ := audit(t, "import", filepath.Join(from, "one"), "--to", to); !strings.Contains(out, "already there") || !strings.Contains(errs, "0 imported, 1 already there") {
		t.Errorf("again: %s%s", out, errs)
	}
	if entries, err := os.ReadDir(to); err != nil || len(entries) != 2 { // sessions and .tmp
		t.Errorf("left: %v %v", entries, err)
	}
	// A bomb, a cut, and a file that is not there.
	out, errs, code = audit(t, "import", filepath.Join(from, "one"), filepath.Join(from, "none"), "--to", t.TempDir(), "--max-bytes", "300", "-o", "json")
	var first imported
	if err := json.Unmarshal([]byte(out[:strings.IndexByte(out, '\n')]), &first); err != nil || first.Result != wasImported || !strings.Contains(first.Why, "the rest can't be read: it decompresses to more") {
		t.Errorf("%v %+v", err, first)
	}
	if code != 1 || !strings.Contains(out, "no such file") || !strings.Contains(errs, "thrown away") {
		t.Errorf("code %d %s%s", code, out, errs)
	}
	if _, errs, code := audit(t, "import", from); code != 1 || !strings.Contains(errs, "to") {
		t.Errorf("no --to: %d %s", code, errs)
	}
}

// readsAt tells of each read of a file.
type readsAt struct {
	io.ReaderAt
	read func(p []byte, at int64)
}

func (r readsAt) ReadAt(p []byte, at int64) (int, error) {
	n, err := r.ReaderAt.ReadAt(p, at)
	r.read(p[:n], at)
	return n, err
}

// longLog is a file of ContainerSSH with so many messages of 2,000 bytes that do not compress. importInto cuts a segment after each MiB.
func longLog(t *testing.T, name string, messages int) {
	t.Helper()
	all := [][]any{{0, map[string]any{"remoteAddr": "192.0.2.7"}}, {301, map[string]any{"channelType": "session"}, 0}}
	for range messages {
		noise := make([]byte, 2000)
		_, _ = rand.Read(noise)
		all = append(all, []any{500, map[string]any{"stream": 1, "data": noise}, 0})
	}
	containerSSH(t, name, "0123abcd", append(all, []any{1, nil})...)
}

// importInto imports a file, whose reads it tells of, into small segments, and gives the error of it.
func importInto(t *testing.T, ctx context.Context, path, to string, read func(p []byte, at int64)) error {
	t.Helper()
	store, err := file.NewStore(to)
	if err != nil {
		t.Fatal(err)
	}
	dest, err := file.OpenSource(to)
	if err != nil {
		t.Fatal(err)
	}
	defer dest.Close()
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: filepath.Join(t.TempDir(), "spool"), SegmentBytes: 8 << 10, SegmentAge: time.Hour, Codec: "none"},
		testKey, store, "import", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	i := &importer{o: importOptions{to: to, maxBytes: 1 << 30}, log: l, dest: dest, done: make(map[string]struct{})}
	failed := i.from(ctx, readsAt{f, read}, info.Size(), path, &imported{File: path})
	closing, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := l.Close(closing); err != nil {
		t.Fatal(err)
	}
	return failed
}

// An import that was broken off is not taken for one that is there.
func TestImportBrokenOff(t *testing.T) {
	from, to := filepath.Join(t.TempDir(), "one"), t.TempDir()
	longLog(t, from, 2000)
	ctx, cancel := context.WithCancel(t.Context())
	starts := 0
	err := importInto(t, ctx, from, to, func(_ []byte, at int64) {
		if at == 0 {
			starts++
		}
		if starts == 2 && at > 3_000_000 { // while it is converted
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	dir := filepath.Join(to, "sessions/2023/11/14/0123abcd")
	segments, err := filepath.Glob(filepath.Join(dir, "*.seg"))
	if err != nil || len(segments) < 3 {
		t.Fatal(segments, err)
	}
	again := func() {
		t.Helper()
		out, errs, code := audit(t, "import", from, "--to", to)
		if code != 1 || !strings.Contains(out, "not imported  ") || !strings.Contains(out, "broken off before: remove "+dir+", and import again") {
			t.Errorf("code %d %s%s", code, out, errs)
		}
	}
	again()
	// One that was killed has no end.
	if err := os.Remove(segments[len(segments)-1]); err != nil {
		t.Fatal(err)
	}
	again()
	// A damaged log is not to be removed.
	if err := os.Truncate(segments[len(segments)-2], 5000); err != nil {
		t.Fatal(err)
	}
	if out, errs, code := audit(t, "import", from, "--to", to); code != 0 || !strings.Contains(out, "already there") {
		t.Errorf("code %d %s%s", code, out, errs)
	}
	// After that it is imported.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := importInto(t, t.Context(), from, to, func([]byte, int64) {}); err != nil {
		t.Fatal(err)
	}
	if out, errs, code := audit(t, "import", from, "--to", to); code != 0 || !strings.Contains(out, "already there") {
		t.Errorf("code %d %s%s", code, out, errs)
	}
}

// What the first record says of the file holds for the bytes that were converted.
func TestImportChanged(t *testing.T) {
	from := filepath.Join(t.TempDir(), "one")
	longLog(t, from, 700)
	const mtime = 40 + 4 // of the compression's header, which says nothing about what is in it
	for name, change := range map[string]func(p []byte, at int64){
		"what is not converted": func(p []byte, at int64) {
			if at <= mtime && mtime < at+int64(len(p)) {
				p[mtime-at] ^= 1
			}
		},
		"the middle": func(p []byte, at int64) {
			if at > 1_000_000 {
				clear(p)
			}
		},
	} {
		to := t.TempDir()
		starts := 0
		err := importInto(t, t.Context(), from, to, func(p []byte, at int64) {
			if at == 0 {
				starts++
			}
			if starts == 2 { // the first time it was hashed
				change(p, at)
			}
		})
		if err == nil || !strings.Contains(err.Error(), "the file changed") {
			t.Errorf("%s: %v", name, err)
		}
		if out, _, code := audit(t, "import", from, "--to", to); code != 1 || !strings.Contains(out, "broken off before") {
			t.Errorf("%s: again: %d %s", name, code, out)
		}
		if out, _, _ := audit(t, "show", "0123abcd", "--store", to); !strings.Contains(out, "the file changed") {
			t.Errorf("%s: no word of it in\n%s", name, out)
		}
	}
	// One that has become shorter.
	err := importInto(t, t.Context(), from, t.TempDir(), func(_ []byte, at int64) {
		if at > 1_000_000 {
			if err := os.Truncate(from, 500_000); err != nil {
				t.Error(err)
			}
		}
	})
	if err == nil || !strings.Contains(err.Error(), "the file changed") {
		t.Error(err)
	}
}
