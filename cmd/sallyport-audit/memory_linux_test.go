package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/s3/s3test"
)

// maxResident is what no command may need more of, whatever the log.
const maxResident = 200 << 20

// soakEnv asks for the long form of tests.
const soakEnv = "SALLYPORT_SOAK"

// oneOfEach are the commands that read a log: each once, in the way that keeps most.
func oneOfEach() [][]string {
	return [][]string{{"list", "-o", "json", "--has-command", "needle", "--has-file", "needle"}, {"show", "s"}, {"commands", "s", "-o", "json"}, {"files"}, {"cat", "s"},
		{"search", "-e", "ne+dle", "--limit", "0"}, {"export", "s", "-f", "text"}, {"export", "s", "-f", "jsonl"}, {"export", "s", "-f", "ocsf"}, {"export", "s", "-f", "asciicast-v3", "--input"},
		{"export", "s", "-f", "asciicast-v2"}, {"report", "s"}, {"report", "--details", "-f", "markdown"}, {"play", "s", "--at", "1000000h"}, {"extract", "s", "/needle"},
		{"verify"}, {"index", "verify"}}
}

// allCommands are the same and their other ways.
func allCommands() [][]string {
	return append(oneOfEach(), []string{"list"}, []string{"show", "s", "-o", "json"}, []string{"commands", "s"}, []string{"files", "s", "-o", "json"},
		[]string{"search", "needle", "-I"}, []string{"verify", "s"})
}

// buildTool builds the tool as it is released: without the race detector, whose memory would be measured too.
func buildTool(t *testing.T) string {
	t.Helper()
	tool := filepath.Join(t.TempDir(), "sallyport-audit")
	c := exec.Command("go", "build", "-buildvcs=false", "-o", tool, ".")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return tool
}

// measurement is what a command took.
type measurement struct {
	code     int
	resident int64 // the most memory it had
	bytes    int64 // that it printed
	took     time.Duration
	errs     string
}

// measured runs the tool. What it prints goes to sum if there is one. If not, it is checked on the way: it must not control a
// terminal.
func measured(t *testing.T, sum hash.Hash, tool string, args ...string) (m measurement) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, tool, args...)
	c.Env = append(os.Environ(), "GOMEMLIMIT=", "GOGC=", "TMPDIR="+t.TempDir())
	stdout, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	c.Stderr = &errs
	began := time.Now()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	// The kernel's own account of a child begins with its parent's memory, so the peak is read from the outside, as it grows.
	ended, peak := make(chan struct{}), make(chan int64)
	go func() {
		most := int64(0)
		for {
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.Process.Pid)); err == nil {
				var kib int64
				if _, rest, ok := strings.Cut(string(b), "VmHWM:"); ok {
					fmt.Sscan(rest, &kib)
				}
				most = max(most, kib<<10)
			}
			select {
			case <-ended:
				peak <- most
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	bad := ""
	buffered := bufio.NewReaderSize(stdout, 1<<20)
	chunk := make([]byte, 1<<20)
	for {
		n, err := buffered.Read(chunk)
		m.bytes += int64(n)
		if sum != nil {
			sum.Write(chunk[:n])
		} else if i := controlAt(chunk[:n]); i >= 0 && bad == "" && args[0] != "play" {
			bad = fmt.Sprintf("prints %q", chunk[max(0, i-20):min(n, i+20)])
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			break
		}
	}
	err = c.Wait()
	m.took = time.Since(began)
	close(ended)
	m.resident = <-peak
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if bad != "" {
		t.Errorf("%v: %s", args, bad)
	}
	m.code, m.errs = c.ProcessState.ExitCode(), errs.String()
	if m.code < 0 || m.code > 2 || strings.Contains(m.errs, "panic") || strings.Contains(m.errs, "goroutine ") {
		t.Errorf("%v: code %d\n%.2000s", args, m.code, m.errs)
	}
	return m
}

// controlAt finds a control character other than a line feed: one search for each, which the race detector doesn't slow down.
func controlAt(b []byte) int {
	for c := range byte(0x20) {
		if c != '\n' {
			if i := bytes.IndexByte(b, c); i >= 0 {
				return i
			}
		}
	}
	return bytes.IndexByte(b, 0x7f)
}

// writeBig writes a session of n bytes and a bit that no codec makes much smaller, so that they are n in the store: a quarter is a
// terminal's, a tenth a program's without one, and the rest the content of one file. It gives that file's hash.
func writeBig(t *testing.T, dir string, n int64) (content []byte) {
	noise := make([]byte, 12<<20) // what comes again is further back than a frame can look
	rand.NewChaCha8([32]byte{1}).Read(noise)
	var text []byte
	for line := range slices.Chunk([]byte(base64.StdEncoding.EncodeToString(noise)), 76) {
		text = append(append(append(text, "\x1b[32m"...), line...), "\x1b[0m\r\n"...)
	}
	part := func(of []byte, at int64, size int64) []byte { return of[at%(int64(len(of))-size):][:size] }
	h := sha256.New()
	writeLog(t, dir, func(l *auditlog.Log) {
		r := l.New("s")
		record := func(channel uint32, b auditlog.Body) {
			if err := r.Record(channel, b); err != nil {
				t.Fatal(err)
			}
		}
		record(0, &auditlog.Authenticate{User: "alice", Result: "proven"})
		if err := r.Begin(); err != nil {
			t.Fatal(err)
		}
		record(1, &auditlog.Request{Type: "pty-req", Term: "xterm", Columns: 120, Rows: 40, OK: true})
		record(1, &auditlog.Request{Type: "shell", OK: true})
		record(2, &auditlog.Request{Type: "exec", Command: []byte("cat /dev/urandom"), OK: true})
		record(3, &auditlog.Request{Type: "subsystem", Name: "sftp", OK: true})
		file := int64(0)
		n += n / 32 // how well the terminal's compresses, by up to a tenth, depends on where time ends a frame
		const piece = 32 << 10
		for i := int64(0); i*piece < n; i++ {
			at := i * (piece + 1)
			switch {
			case i%20 < 5:
				record(1, &auditlog.Data{Stream: auditlog.Output, Data: part(text, at, piece)})
			case i%20 < 7:
				record(2, &auditlog.Data{Stream: auditlog.Output, Data: part(noise, at, piece)})
			default:
				b := part(noise, at, piece)
				sum := sha256.Sum256(b)
				record(3, &auditlog.Content{ID: 1, Stream: auditlog.Input, Offset: uint64(file), Data: b, SHA256: sum[:]})
				h.Write(b)
				file += piece
			}
			if i%50 == 0 {
				record(1, &auditlog.ProgramExec{Exec: uint64(i + 1), PID: i + 1, Path: []byte("/bin/grep"), Args: [][]byte{[]byte("grep"), []byte("needle")}, Count: 2})
			}
			if i%1000 == 0 { // what the store doesn't keep up with would fill the spool
				for l.Stats().SpoolBytes > 1<<30 {
					time.Sleep(10 * time.Millisecond)
				}
			}
		}
		content = h.Sum(nil)
		record(3, &auditlog.Transfer{Protocol: "sftp", Op: "file", ID: 1, Path: []byte("/needle"),
			Written: &auditlog.TransferFlow{Bytes: uint64(file), Kept: uint64(file), Contiguous: true, Whole: true, SHA256: content}})
		if err := r.Close(&auditlog.End{Cause: "client-left"}); err != nil {
			t.Fatal(err)
		}
	})
	return content
}

// stored is the size of all files below a directory.
func stored(t *testing.T, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// writeImport writes a file of ContainerSSH's that decompresses to n bytes or more.
func writeImport(t *testing.T, name string, n int64) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("ContainerSSH-Auditlog" + strings.Repeat("\x00", 11)); err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err == nil {
		err = binary.Write(f, binary.LittleEndian, uint64(2))
	}
	text := bytes.Repeat([]byte("a line of a log, as programs write them by the million\r\n"), 2000)
	at, written := int64(1_700_000_000_000_000_000), int64(0)
	message := func(kind int, channel any, payload map[string]any) {
		b, merr := cbor.Marshal(map[string]any{"connectionId": "0123abcd", "timestamp": at, "type": kind, "payload": payload, "channelId": channel})
		_, werr := z.Write(b)
		err = errors.Join(err, merr, werr)
		at += 1e6
		written += int64(len(b))
	}
	message(0, nil, map[string]any{"remoteAddr": "192.0.2.7"})
	message(301, 0, map[string]any{"channelType": "session"})
	message(405, 0, map[string]any{"requestId": 1})
	for written < n && err == nil {
		message(500, 0, map[string]any{"stream": 1, "data": text})
	}
	message(1, nil, nil)
	if err := errors.Join(err, z.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// encoded is a body that is written as it is: encoding a million is what takes long.
func encoded(t *testing.T, body map[int]any) cbor.RawMessage {
	t.Helper()
	b, err := cbor.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// testMemory measures commands on a log, one after the other.
type testMemory struct {
	tool  string
	store []string // flags
}

func (m testMemory) run(t *testing.T, sum hash.Hash, args ...string) measurement {
	t.Helper()
	got := measured(t, sum, m.tool, append(args, m.store...)...)
	t.Logf("%v: %d MiB, %v, printed %d MiB", args, got.resident>>20, got.took.Round(time.Millisecond), got.bytes>>20)
	if got.resident > maxResident || got.resident == 0 {
		t.Errorf("%v: %d MiB", args, got.resident>>20)
	}
	if args[0] == "verify" && got.code != 0 {
		t.Errorf("%v: the log is not whole: code %d %s", args, got.code, got.errs)
	}
	return got
}

// No command keeps a log in memory: a large one of a gate's takes no more than a small one. The long form's has 10 GiB of what is
// stored, and is removed before the next thing is made: a disk need not have more.
func TestMemoryOfBigLog(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	size := int64(96 << 20)
	if os.Getenv(soakEnv) != "" {
		size = 10 << 30
	}
	tool := buildTool(t)
	t.Run("log", func(t *testing.T) {
		dir := t.TempDir()
		server, err := s3test.Start(t.TempDir())
		switch {
		case err == nil: // the bucket is the directory
			defer server.Stop()
			dir = server.Dir(s3test.Prefix)
		case !errors.Is(err, s3test.ErrNoBinary) || os.Getenv(s3test.RequireEnv) != "":
			t.Fatal(err)
		}
		began := time.Now()
		content := writeBig(t, dir, size)
		n := stored(t, dir)
		t.Logf("%d MiB recorded, %d MiB stored, in %v", size>>20, n>>20, time.Since(began).Round(time.Millisecond))
		if n < size {
			t.Errorf("%d bytes recorded, %d stored: that is no test of so large a log", size, n)
		}
		m := testMemory{tool, []string{"--store", dir}}
		for _, args := range oneOfEach() {
			if args[0] != "extract" {
				m.run(t, nil, args...)
				continue
			}
			sum := sha256.New()
			if got := m.run(t, sum, args...); got.code != 0 || !bytes.Equal(sum.Sum(nil), content) {
				t.Errorf("%v: code %d, not the file's content: %s", args, got.code, got.errs)
			}
		}
		t.Run("bucket", func(t *testing.T) {
			if server == nil {
				t.Skip(err)
			}
			credentials := filepath.Join(t.TempDir(), "reader")
			if err := s3test.Reader.WriteCredentials(credentials); err != nil {
				t.Fatal(err)
			}
			m := testMemory{tool, []string{"--store", bucketScheme + s3test.Bucket + "/" + s3test.Prefix, "--endpoint", server.Endpoint(), "--credentials-file", credentials}}
			for _, args := range [][]string{{"list"}, {"search", "needle", "--limit", "0"}, {"verify"}, {"index", "verify"}} {
				if got := m.run(t, sha256.New(), args...); got.code != 0 {
					t.Errorf("%v: code %d %s", args, got.code, got.errs)
				}
			}
		})
	})
	t.Run("import", func(t *testing.T) {
		name := filepath.Join(t.TempDir(), "audit")
		writeImport(t, name, size)
		m := testMemory{tool, []string{"--to", t.TempDir()}}
		if got := m.run(t, nil, "import", name); got.code != 0 {
			t.Errorf("code %d %s", got.code, got.errs)
		}
	})
}

// Whatever a log says, no command needs more memory than it may, ends in another way than it should, or prints a control character.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	tool := buildTool(t)
	million := 1_000_000
	frames := func(n int, one func(i int) forged) (all [][]forged) {
		all = append(all, forgedStart("alice"))
		for i := 0; i < n; {
			var f []forged
			for ; len(f) < 5_000 && i < n; i++ { // a frame has 16 MiB at most
				f = append(f, one(i))
			}
			all = append(all, f)
		}
		return all
	}
	zeros, noise := make([]byte, 15<<20), make([]byte, 15<<20)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	bomb := func(t *testing.T, dir, id string, n int, data []byte) {
		all := [][]forged{forgedStart("alice"), {{1, 7, map[int]any{1: "shell", 8: true}}}}
		for range n {
			all = append(all, []forged{{1, 8, map[int]any{1: 1, 2: data}}})
		}
		forge(t, dir, id, all...)
	}
	// What goes through all records alike is shown once with a million of them: show, say, takes them as commands does.
	few := [][]string{{"list"}, {"show", "s"}, {"commands", "s"}, {"files", "s"}, {"search", "needle"}, {"export", "s", "-f", "text"}, {"export", "s", "-f", "ocsf"},
		{"export", "s", "-f", "asciicast-v3"}, {"report", "--details", "-f", "markdown"}, {"play", "s", "--at", "1000000h"}, {"verify", "s"}}
	for _, one := range []struct {
		name     string
		commands [][]string
		write    func(t *testing.T, dir string)
	}{
		{"a million channels", few, func(t *testing.T, dir string) {
			body := encoded(t, map[int]any{1: "session"})
			forge(t, dir, "s", frames(million, func(i int) forged { return forged{uint32(i + 1), 6, body} })...)
		}},
		{"a million terminals", [][]string{{"show", "s"}, {"search", "needle"}, {"export", "s", "-f", "text"}, {"export", "s", "-f", "ocsf"}, {"report", "s"}},
			func(t *testing.T, dir string) { // half of them, and a letter on each
				request, letter := encoded(t, map[int]any{1: "pty-req", 6: 1 << 31, 7: 1 << 31, 8: true}), encoded(t, map[int]any{1: 1, 2: []byte("x")})
				forge(t, dir, "s", frames(million, func(i int) forged {
					if i%2 == 0 {
						return forged{uint32(i/2 + 1), 7, request}
					}
					return forged{uint32(i/2 + 1), 8, letter}
				})...)
			}},
		{"programs", allCommands(), func(t *testing.T, dir string) {
			arg := bytes.Repeat([]byte("a"), 1000)
			forge(t, dir, "s", frames(100_000, func(i int) forged {
				return forged{1, 20, map[int]any{2: uint64(i + 1), 3: i, 6: arg, 8: [][]byte{arg, []byte("needle")}, 17: uint64(i)}}
			})...)
		}},
		{"a bomb of frames", allCommands(), func(t *testing.T, dir string) { bomb(t, dir, "s", 6, zeros) }},
		{"bombs at once", [][]string{{"list"}, {"list", "--has-command", "needle"}, {"files"}, {"search", "needle"}, {"export", "-f", "ocsf"}, {"report", "--details"}, {"verify"},
			{"index", "verify"}}, func(t *testing.T, dir string) {
			for i := range jobs + 1 {
				bomb(t, dir, fmt.Sprint("s", i), 1, noise)
			}
		}},
		{"huge texts", allCommands(), func(t *testing.T, dir string) {
			huge := strings.Repeat("\x1b]0;needle \u202e", 1<<20)
			raw := []byte(huge)
			forge(t, dir, "s", append(append([][]forged{}, forgedStart("alice")), []forged{{0, 4, map[int]any{5: huge}}}, []forged{{0, 4, map[int]any{7: huge}}}, []forged{{0, 5, map[int]any{3: huge}}}, []forged{{0, 11, map[int]any{1: "a", 2: huge}}},
				[]forged{{1, 7, map[int]any{1: "exec", 2: raw, 8: true}}}, []forged{{1, 7, map[int]any{1: huge}}}, []forged{{1, 20, map[int]any{2: 1, 8: [][]byte{raw}}}}, []forged{{1, 21, map[int]any{2: 1, 5: true, 6: [][]byte{raw}}}}, []forged{{1, 22, map[int]any{2: 1, 5: huge}}},
				[]forged{{1, 30, map[int]any{2: "file", 4: raw}}}, []forged{{1, 30, map[int]any{2: "file", 18: huge, 17: 4}}}, []forged{{1, 8, map[int]any{1: 1, 2: raw}}}, []forged{{1, 40, map[int]any{1: huge}}}, []forged{{0, 50, map[int]any{8: huge}}}, []forged{{0, 51, map[int]any{2: huge}}}, []forged{{0, 12, map[int]any{1: huge}}})...)
		}},
		{"many transfers", [][]string{{"show", "s"}, {"files", "s"}, {"search", "needle"}, {"export", "s", "-f", "text"}, {"export", "s", "-f", "ocsf"}, {"report", "s"}},
			func(t *testing.T, dir string) {
				forge(t, dir, "s", frames(100_000, func(i int) forged {
					return forged{1, 30, map[int]any{1: "sftp", 2: "file", 3: i, 4: fmt.Appendf(nil, "/home/%d/%s", i, strings.Repeat("n", 500)), 14: map[int]any{1: 3, 4: true, 5: make([]byte, 32)}}}
				})...)
			}},
	} {
		t.Run(one.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			began := time.Now()
			one.write(t, dir)
			t.Logf("made in %v", time.Since(began).Round(time.Millisecond))
			m := testMemory{tool, []string{"--store", dir}}
			for _, args := range one.commands {
				m.run(t, nil, args...)
			}
		})
	}
}
