package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// maxResident is what no command may need more of, whatever the log.
const maxResident = 200 << 20

// soakEnv asks for the long form of tests.
const soakEnv = "SALLYPORT_SOAK"

// allCommands are the commands that read a session, each in its ways.
func allCommands(id string) [][]string {
	return [][]string{{"list"}, {"list", "-o", "json", "--has-command", "needle", "--has-file", "needle"}, {"show", id}, {"show", id, "-o", "json"}, {"commands", id}, {"commands", id, "-o", "json"}, {"files"}, {"files", id, "-o", "json"},
		{"cat", id}, {"search", "needle", "-I"}, {"search", "-e", "a.*z", "--limit", "0"}, {"export", id, "-f", "text"}, {"export", id, "-f", "jsonl"}, {"export", id, "-f", "ocsf"}, {"export", id, "-f", "asciicast-v3", "--input"},
		{"report", id}, {"report", "--details", "-f", "markdown"}, {"play", id, "--at", "1000000h"}, {"extract", id, "/needle"}, {"verify", id}}
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

// measured runs the tool and gives its exit code, the most memory it had, and the start of what it printed. What it prints is
// checked on the way, unless it is raw.
func measured(t *testing.T, tool, dir string, args ...string) (code int, resident int64, head string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, tool, append(args, "--store", dir)...)
	c.Env = append(os.Environ(), "GOMEMLIMIT=", "TMPDIR="+t.TempDir())
	stdout, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	c.Stderr = &errs
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
	var first bytes.Buffer
	bad := ""
	buffered := bufio.NewReaderSize(stdout, 1<<20)
	chunk := make([]byte, 1<<20)
	for {
		n, err := buffered.Read(chunk)
		first.Write(chunk[:min(n, max(0, 4096-first.Len()))])
		if i := bytes.IndexFunc(chunk[:n], func(r rune) bool { return r != '\n' && r < 0x20 || r == 0x7f }); i >= 0 && bad == "" && args[0] != "play" && args[0] != "extract" {
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
	close(ended)
	resident = <-peak
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if bad != "" {
		t.Errorf("%v: %s", args, bad)
	}
	code = c.ProcessState.ExitCode()
	if code < 0 || code > 2 || strings.Contains(errs.String(), "panic") || strings.Contains(errs.String(), "goroutine ") {
		t.Errorf("%v: code %d\n%.2000s", args, code, errs.String())
	}
	return code, resident, first.String()
}

// Whatever a log holds, no command needs more memory than it may, ends in another way than it should, or prints a control character.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	tool := buildTool(t)
	soak := os.Getenv(soakEnv) != ""
	text := func(i int) []byte {
		return []byte(strings.Repeat(fmt.Sprintf("%08d a line of a log, as programs write them by the million \x1b[32mgreen\x1b[0m\r\n", i), 1500))
	}
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
	big := 96 << 20
	if soak {
		big = 10 << 30
	}
	for name, write := range map[string]func(dir string){
		"big": func(dir string) {
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
				for i, done := 0, 0; done < big; i++ {
					b := text(i)
					done += len(b)
					record(1, &auditlog.Data{Stream: auditlog.Output, Data: b})
				}
				if err := r.Close(&auditlog.End{Cause: "client-left"}); err != nil {
					t.Fatal(err)
				}
			})
		},
		"a million channels": func(dir string) {
			forge(t, dir, "s", frames(million, func(i int) forged { return forged{uint32(i + 1), 6, map[int]any{1: "session"}} })...)
		},
		"a million terminals": func(dir string) { // half of them, and a letter on each
			forge(t, dir, "s", frames(million, func(i int) forged {
				if i%2 == 0 {
					return forged{uint32(i/2 + 1), 7, map[int]any{1: "pty-req", 6: 1 << 31, 7: 1 << 31, 8: true}}
				}
				return forged{uint32(i/2 + 1), 8, map[int]any{1: 1, 2: []byte("x")}}
			})...)
		},
		"programs": func(dir string) {
			arg := bytes.Repeat([]byte("a"), 1000)
			forge(t, dir, "s", frames(100_000, func(i int) forged {
				return forged{1, 20, map[int]any{2: uint64(i + 1), 3: i, 6: arg, 8: [][]byte{arg, []byte("needle")}, 17: uint64(i)}}
			})...)
		},
		"a bomb of frames": func(dir string) {
			zeros := make([]byte, 15<<20)
			all := [][]forged{forgedStart("alice"), {{1, 7, map[int]any{1: "shell", 8: true}}}}
			for range 6 {
				all = append(all, []forged{{1, 8, map[int]any{1: 1, 2: zeros}}})
			}
			forge(t, dir, "s", all...)
		},
		"huge texts": func(dir string) {
			huge := strings.Repeat("\x1b]0;needle \u202e", 1<<20)
			raw := []byte(huge)
			forge(t, dir, "s", append(append([][]forged{}, forgedStart("alice")), []forged{{0, 4, map[int]any{5: huge}}}, []forged{{0, 4, map[int]any{7: huge}}}, []forged{{0, 5, map[int]any{3: huge}}}, []forged{{0, 11, map[int]any{1: "a", 2: huge}}},
				[]forged{{1, 7, map[int]any{1: "exec", 2: raw, 8: true}}}, []forged{{1, 7, map[int]any{1: huge}}}, []forged{{1, 20, map[int]any{2: 1, 8: [][]byte{raw}}}}, []forged{{1, 21, map[int]any{2: 1, 5: true, 6: [][]byte{raw}}}}, []forged{{1, 22, map[int]any{2: 1, 5: huge}}},
				[]forged{{1, 30, map[int]any{2: "file", 4: raw}}}, []forged{{1, 30, map[int]any{2: "file", 18: huge, 17: 4}}}, []forged{{1, 8, map[int]any{1: 1, 2: raw}}}, []forged{{1, 40, map[int]any{1: huge}}}, []forged{{0, 50, map[int]any{8: huge}}}, []forged{{0, 51, map[int]any{2: huge}}}, []forged{{0, 12, map[int]any{1: huge}}})...)
		},
		"many transfers": func(dir string) {
			forge(t, dir, "s", frames(100_000, func(i int) forged {
				return forged{1, 30, map[int]any{1: "sftp", 2: "file", 3: i, 4: fmt.Appendf(nil, "/home/%d/%s", i, strings.Repeat("n", 500)), 14: map[int]any{1: 3, 4: true, 5: make([]byte, 32)}}}
			})...)
		},
	} {
		if soak && name != "big" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(dir)
			commands := allCommands("s")
			if name == "a million terminals" || name == "many transfers" {
				commands = [][]string{{"show", "s"}, {"files", "s"}, {"search", "needle"}, {"export", "s", "-f", "text"}, {"export", "s", "-f", "ocsf"}, {"report", "s"}}
			}
			for _, args := range commands {
				began := time.Now()
				code, resident, _ := measured(t, tool, dir, args...)
				if args[0] == "verify" && code != 0 {
					t.Errorf("the log is not whole: code %d", code)
				}
				t.Logf("%v: %d MiB, %v", args, resident>>20, time.Since(began).Round(time.Millisecond))
				if resident > maxResident || resident == 0 {
					t.Errorf("%v: %d MiB", args, resident>>20)
				}
			}
		})
	}
}
