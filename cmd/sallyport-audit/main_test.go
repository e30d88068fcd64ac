package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const sample = "../../auditlog/testdata/v1"

var testKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))

func audit(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	code = exitCode(run(t.Context(), args, strings.NewReader(""), &out, &errs), &errs)
	return out.String(), errs.String(), code
}

// hostile is text that would move a cursor, set a title, answer back, or hide what follows.
const hostile = "a\x1b[2J\x1b]0;owned\x07\u009b31m\u202egnp.exe\x7f\x00\xff\x9b31m\rb"

// writeLog writes sessions into a store directory and leaves them sealed.
func writeLog(t *testing.T, dir string, f func(l *auditlog.Log)) {
	t.Helper()
	store, err := file.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: filepath.Join(t.TempDir(), "spool"), SegmentAge: 50 * time.Millisecond,
		SyncInterval: 10 * time.Millisecond}, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f(l)
	if err := l.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func session(t *testing.T, l *auditlog.Log, id string, bodies map[uint32][]auditlog.Body) {
	t.Helper()
	r := l.New(id)
	record := func(channel uint32, b auditlog.Body) {
		if err := r.Record(channel, b); err != nil {
			t.Fatal(err)
		}
	}
	record(0, &auditlog.Connect{Source: "192.0.2.7:4022"})
	record(0, &auditlog.Authenticate{User: "alice", Method: "publickey", Fingerprint: "SHA256:abc", Result: "proven"})
	if err := r.Begin(); err != nil {
		t.Fatal(err)
	}
	for c := uint32(0); c < 10; c++ {
		for _, b := range bodies[c] {
			record(c, b)
		}
	}
	if err := r.Close(&auditlog.End{Cause: "client-left"}); err != nil {
		t.Fatal(err)
	}
}

func TestSample(t *testing.T) {
	keyFile := filepath.Join(t.TempDir(), "gate.pub")
	line := auditlog.FormatPublicKey(testKey.Public().(ed25519.PublicKey)) + " gate-1\n"
	if err := os.WriteFile(keyFile, []byte("# the gate's key\n"+line), 0o644); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other.pub")
	stranger := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, ed25519.SeedSize)).Public().(ed25519.PublicKey)
	if err := os.WriteFile(other, []byte(auditlog.FormatPublicKey(stranger)), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		want []string // in stdout or stderr
	}{
		{[]string{"list", sample}, 0, []string{"USER", "alice", "OPS-4711", "192.0.2.7:4022", "cat /logs/x", "sealed", "sample-0-zstd", "sample-2-none"}},
		{[]string{"list", "--store", sample, "-o", "json"}, 0, []string{`"user":"alice"`, `"commands":["cat /logs/x"]`, `"output_bytes":639`}},
		{[]string{"show", "sample-0", "--store", sample}, 0, []string{"session sample-0-zstd: sealed", "alice", "192.0.2.7:4022", "OPS-4711", "docker",
			"exec       cat /logs/x", "    | line 2", "exit       code 3", "ended: client-left", "ALERT", "hidden"}},
		{[]string{"show", "sample-0", "--store", sample, "--output", "json"}, 0, []string{`"id":"sample-0-zstd"`, `"channel":1`}},
		{[]string{"show", "latest", "--store", sample}, 0, []string{"session sample-2-none: sealed"}},
		{[]string{"cat", "sample-1", "--store", sample}, 0, []string{`"kind":"decision"`, `"base64":"/wAA"`, `"command":{"text":"cat /logs/x"}`, `"stream":"err"`}},
		{[]string{"cat", "sample-1", "--store", sample, "--channel", "0"}, 0, []string{`"kind":"end"`}},
		{[]string{"cat", "sample-1", "--store", sample, "--raw"}, 1, []string{"--raw wants"}},
		{[]string{"cat", "sample-1", "--store", sample, "--stream", "up"}, 1, []string{"want in, out or err"}},
		{[]string{"verify", sample}, 0, []string{"6 logs: 6 sealed, 0 interrupted, 0 live, 0 damaged; keys not pinned"}},
		{[]string{"verify", sample, "--key", keyFile}, 0, []string{"6 sealed", "key pinned SHA256:"}},
		{[]string{"verify", sample, "--key", other}, 2, []string{"6 damaged", "not pinned: SHA256:", "00000000.seg: offset"}},
		{[]string{"verify", "sample-1", "--store", sample, "-o", "json"}, 0, []string{`"state":"sealed"`}},
		{[]string{"verify", "--store", t.TempDir()}, 1, []string{"no log"}},
		{[]string{"show", "sample", "--store", sample}, 1, []string{"not unique"}},
		{[]string{"show", "nobody", "--store", sample}, 1, []string{"not there"}},
		{[]string{"show", "../x", "--store", sample}, 1, []string{"not a session's ID"}},
		{[]string{"list", "--store", sample + "/none"}, 1, []string{"no such file"}},
		{[]string{"list", "--store", "ftp://bucket"}, 1, []string{"want a directory or"}},
		{[]string{"list", "-o", "xml"}, 1, []string{"want table, text or json"}},
		{[]string{"version"}, 0, []string{"sallyport-audit"}},
		{[]string{"show"}, 1, []string{"want sallyport-audit show ID"}},
		{[]string{"extract", "x"}, 1, []string{"want sallyport-audit extract ID PATH"}},
		{[]string{"index", "bogus"}, 1, []string{`unknown command "bogus"`}},
		{[]string{"list", t.TempDir()}, 0, []string{"there is no session in /"}},
		{[]string{"list", t.TempDir(), "--since", "today", "-o", "json"}, 0, []string{"there is no session of these days in /"}},
		{[]string{"search", "x", "--store", t.TempDir()}, 1, []string{"there is no session in /"}},
		{[]string{"search", "nothing-has-this", "--store", sample}, 1, nil},
	} {
		out, errs, code := audit(t, c.args...)
		if code != c.code {
			t.Errorf("%v: exit code %d, want %d: %s", c.args, code, c.code, errs)
		}
		for _, w := range c.want {
			if !strings.Contains(out+errs, w) {
				t.Errorf("%v: no %q in\n%s%s", c.args, w, out, errs)
			}
		}
	}
	t.Setenv(storeEnv, "")
	if _, errs, code := audit(t, "list"); code != 1 || !strings.Contains(errs, "--store") {
		t.Errorf("no store: %d %s", code, errs)
	}
	t.Setenv(storeEnv, sample)
	if out, _, code := audit(t, "list"); code != 0 || !strings.Contains(out, "sample-0") {
		t.Errorf("store from the environment: %d", code)
	}
}

// The raw bytes are the recorded ones, whatever they are.
func TestRaw(t *testing.T) {
	dir := t.TempDir()
	want := []byte(strings.Repeat(hostile+"\n", 10_000))
	writeLog(t, dir, func(l *auditlog.Log) {
		session(t, l, "s1", map[uint32][]auditlog.Body{1: {&auditlog.ChannelOpen{Type: "session"},
			&auditlog.Data{Stream: auditlog.Output, Data: want}, &auditlog.Data{Stream: auditlog.Input, Data: []byte("in")}},
			2: {&auditlog.Data{Stream: auditlog.Output, Data: []byte("other")}}})
	})
	if out, _, code := audit(t, "cat", "s1", "--store", dir, "--channel", "1", "--stream", "out", "--raw"); code != 0 || out != string(want) {
		t.Errorf("code %d, %d bytes, want %d", code, len(out), len(want))
	}
	if out, _, _ := audit(t, "cat", "s1", "--store", dir, "--channel", "1", "--stream", "in", "--raw"); out != "in" {
		t.Errorf("input %q", out)
	}
}

// Nothing in a log reaches the auditor's terminal as a control character, in any field of any kind.
func TestHostile(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		h, b := hostile, []byte(hostile)
		session(t, l, "s1", map[uint32][]auditlog.Body{
			0: {&auditlog.Connect{Gate: h, Source: h, Local: h}, &auditlog.Handshake{Client: h, Kex: h}, &auditlog.Authenticate{User: h, Result: "proven", Reason: h},
				&auditlog.Decision{User: h, Ticket: h, Reason: h, Profile: h}, &auditlog.Sandbox{ID: h, Image: h, Error: h}, &auditlog.Alert{Name: h, Detail: h},
				&auditlog.Request{Type: h, Name: h}, &auditlog.Refused{Source: h, Users: []string{h}}},
			1: {&auditlog.ChannelOpen{Type: h, Error: h, Extra: b}, &auditlog.Request{Type: "exec", Command: b, OK: true}, &auditlog.Request{Type: "env", Name: h, Value: h},
				&auditlog.Request{Type: h, Name: h, Reason: h}, &auditlog.Request{Type: "pty-req", Term: h}, &auditlog.Data{Stream: auditlog.Output, Data: b[:len(b)-12]},
				&auditlog.Data{Stream: auditlog.Error, Data: b}, &auditlog.Exit{Signal: h, Error: h}}})
		r := l.New("s2")
		if err := errors.Join(r.Record(0, &auditlog.Authenticate{User: hostile}), r.Close(&auditlog.End{Cause: hostile, Detail: hostile})); err != nil {
			t.Error(err)
		}
	})
	gate := ""
	out, _, _ := audit(t, "verify", dir, "-o", "json")
	for l := range strings.Lines(out) {
		var rep auditlog.Report
		if json.Unmarshal([]byte(l), &rep) == nil && rep.Kind == "gate" {
			gate = rep.ID
		}
	}
	for _, args := range [][]string{{"list"}, {"list", "-o", "json"}, {"show", "s1"}, {"show", "s1", "-o", "json"}, {"cat", "s1"}, {"verify", "s1"},
		{"show", gate}, {"cat", gate}, {"show", hostile}, {"verify", hostile}, {"show", "s1", "--" + hostile}} {
		out, errs, _ := audit(t, append(args, "--store", dir)...)
		for _, r := range out + errs {
			if r != '\n' && r < 0x20 || r >= 0x7f && r < 0xa0 || r == 0x202e || r == 0xfffd {
				t.Errorf("%v: prints %U", args, r)
				break
			}
		}
		if args[0] == "cat" || len(args) > 2 && args[2] == "json" {
			for l := range strings.Lines(out) {
				if !json.Valid([]byte(l)) {
					t.Errorf("%v: no JSON: %.200s", args, l)
				}
			}
		}
	}
	if out, _, _ := audit(t, "cat", "s1", "--store", dir); !strings.Contains(out, `\u202egnp.exe`) {
		t.Error("what was escaped is not there")
	}
}

func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(sample)); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*/sample-0-zstd/00000002.seg"))
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	b, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(names[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"verify", dir}, {"verify", "sample-0", "--store", dir}, {"show", "sample-0", "--store", dir}, {"cat", "sample-0", "--store", dir}} {
		out, errs, code := audit(t, args...)
		if code != 2 || !strings.Contains(out+errs, "sample-0-zstd/00000002.seg: offset ") {
			t.Errorf("%v: code %d\n%s%s", args, code, out, errs)
		}
	}
	// Commands whose output has no place for it say so beside it.
	for _, args := range []string{"files", "files sample-0", "search nothing-has-this", "export sample-0 -f text", "export -f ocsf", "export sample-0 -f asciicast-v3", "play sample-0 --speed 1000",
		"extract sample-0 /x", "report sample-0", "report"} {
		_, errs, code := audit(t, append(strings.Fields(args), "--store", dir)...)
		if code != 2 || strings.Count(errs, "sample-0-zstd is damaged: sessions/") != 1 || !strings.Contains(errs, "(see verify)") {
			t.Errorf("%s: code %d\n%s", args, code, errs)
		}
	}
	if out, _, code := audit(t, "list", dir); code != 0 || !strings.Contains(out, "damaged") {
		t.Errorf("list: %d\n%s", code, out)
	}
	if out, _, _ := audit(t, "cat", "sample-0", "--store", dir); !strings.Contains(out, `"kind":"end"`) {
		t.Error("what is after the damaged segment was not read")
	}
}

// A log of which an object can't be read is told as such, by every command: not as damaged, and not as nothing.
func TestUnreadable(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(sample)); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*/sample-0-zstd/00000002.seg"))
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	if err := errors.Join(os.Remove(names[0]), os.Symlink(os.DevNull, names[0])); err != nil { // leads out of the store
		t.Fatal(err)
	}
	damage := strings.NewReplacer(" 0 damaged", "", ".damaged {", "") // of the sum, and of a report's style
	for _, c := range []struct{ args, want string }{
		{"verify " + dir, "\nunreadable  sample-0-zstd  "}, {"verify " + dir, "0 damaged, 1 unreadable; keys not pinned"},
		{"verify sample-0", "unreadable  sample-0-zstd  "}, {"verify -q", "unreadable  sample-0-zstd  "},
		{"verify -o json", `"state":"unreadable"`}, {"verify -o json", `"unreadable":1`},
		{"list", "unreadable"}, {"list --state unreadable -o json", `"id":"sample-0-zstd"`}, {"list --state damaged", "sample-0-zstd is unreadable: sessions/"},
		{"list --user nobody", "sample-0-zstd is unreadable: sessions/"},
		{"show sample-0", "unreadable: sessions/"}, {"show sample-0 -o json", `"state":"unreadable"`}, {"cat sample-0", "00000002.seg: offset 0: can't be read"},
		{"commands sample-0", "unreadable: sessions/"},
		{"report -f markdown", "; 1 logs unreadable"}, {"report sample-0", `<span class="unreadable">`}, {"report sample-0", "Not all of the log could be read"},
		{"index verify", "sample-0-zstd is unreadable: "},
	} {
		out, errs, code := audit(t, append(strings.Fields(c.args), "--store", dir)...)
		if code != 1 || !strings.Contains(out+errs, c.want) || strings.Contains(damage.Replace(out+errs), "damaged") {
			t.Errorf("%s: exit code %d, want 1 with %q and no damage\n%s%s", c.args, code, c.want, out, errs)
		}
	}
	for _, args := range []string{"files", "files sample-0", "search nothing-has-this", "search nothing-has-this --user nobody", "export sample-0 -f text", "export -f ocsf",
		"export -f jsonl --user nobody", "export sample-0 -f asciicast-v3", "play sample-0 --speed 1000", "extract sample-0 /x", "report sample-0", "report", "report --details", "list"} {
		_, errs, code := audit(t, append(strings.Fields(args), "--store", dir)...)
		if code != 1 || strings.Count(errs, "sample-0-zstd is unreadable: sessions/") != 1 {
			t.Errorf("%s: exit code %d\n%s", args, code, errs)
		}
	}
	// What is wrong with another comes first.
	other, err := filepath.Glob(filepath.Join(dir, "sessions/*/*/*/sample-1-s2/00000001.seg"))
	if err != nil || len(other) != 1 {
		t.Fatal(other, err)
	}
	if err := os.Truncate(other[0], 100); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{"verify", "files", "search nothing-has-this", "export -f ocsf", "report"} {
		if out, errs, code := audit(t, append(strings.Fields(args), "--store", dir)...); code != 2 || !strings.Contains(out+errs, "unreadable") {
			t.Errorf("%s: exit code %d, want 2\n%s%s", args, code, out, errs)
		}
	}
}

// cat -f goes on with what comes, and ends when the session does.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		r := l.New("s1")
		err := errors.Join(r.Record(0, &auditlog.Connect{Source: "192.0.2.7:4022"}), r.Begin())
		if err != nil {
			t.Fatal(err)
		}
		for l.Stats().Stored == 0 {
			time.Sleep(5 * time.Millisecond)
		}
		done := make(chan string)
		go func() {
			out, _, code := audit(t, "cat", "-f", "s1", "--store", dir)
			done <- fmt.Sprint(code, out)
		}()
		time.Sleep(50 * time.Millisecond)
		err = errors.Join(r.Record(1, &auditlog.Alert{Name: "later"}), r.Close(&auditlog.End{Cause: "client-left"}))
		if err != nil {
			t.Error(err)
		}
		if out := <-done; !strings.HasPrefix(out, "0") || !strings.Contains(out, "later") || strings.Count(out, "\n") != 3 {
			t.Errorf("%s", out)
		}
	})
}

func TestTerminalText(t *testing.T) {
	for in, want := range map[string]string{
		"plain\r\ntext\n":                       "plain\ntext\n",
		"\x1b[1;31mred\x1b[0m \x1b(Bx":          "red x",
		"\x1b]0;title\x07a\x1b]8;;u\x1b\\b":     "ab",
		"\x1bPdevice\x1b\\c":                    "c",
		"50%\r100%\n":                           "50%\n100%\n",
		"\x1b]unfinished\nnext":                 "next",
		"bell\x07 \x08 caf\xc3\xa9 \xff \u202e": `bell \x08 café \xff \u{202e}`,
	} {
		var all, bytewise terminalText
		got := all.add([]byte(in)) + all.end()
		if got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
		one := ""
		for i := range len(in) {
			one += bytewise.add([]byte{in[i]})
		}
		if one += bytewise.end(); one != want {
			t.Errorf("%q, byte by byte: %q, want %q", in, one, want)
		}
	}
}

// Forwards are told with their targets, addresses and bytes; what they hold of others' text is cleaned.
func TestShowForwards(t *testing.T) {
	dir := t.TempDir()
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	writeLog(t, dir, func(l *auditlog.Log) {
		session(t, l, "forwards", map[uint32][]auditlog.Body{
			0: {
				&auditlog.Request{Type: "tcpip-forward", Name: "localhost:0", Value: "127.0.0.1:40000", OK: true},
				&auditlog.Forward{Type: "tcpip-forward", Target: "localhost:0", Address: "127.0.0.1:40000", Connections: 3, Result: "ended", Detail: "the client cancelled it"},
			},
			1: {
				&auditlog.ChannelOpen{Type: "direct-tcpip", Target: "db.payments:5432", Originator: "127.0.0.1:4711", Addresses: []string{"10.0.0.7"}},
				&auditlog.Forward{Type: "direct-tcpip", Target: "db.payments:5432", Address: "10.0.0.7:5432", Originator: "127.0.0.1:4711",
					Input: 12, Output: 34, First: at, Last: at.Add(time.Minute), Result: "ended"},
				&auditlog.ChannelClose{Input: 12, Output: 34},
			},
			2: {&auditlog.ChannelOpen{Type: "direct-tcpip", Target: "vault" + hostile + ":80", Error: "forwarding to vault is not permitted by profile debug"}},
			3: {
				&auditlog.ChannelOpen{Type: "auth-agent@openssh.com", Target: "/tmp/agent/s", Session: 4},
				&auditlog.Forward{Type: "auth-agent@openssh.com", Address: "/tmp/agent/s", Result: "cut-off", Detail: "policy has changed" + hostile},
			},
			4: {
				&auditlog.ChannelOpen{Type: "session"},
				&auditlog.Forward{Type: "auth-agent-req@openssh.com", Address: "/tmp/agent/s", Connections: 1, Result: "ended"},
			},
		})
	})
	out, _, code := audit(t, "--store", dir, "--utc", "show", "forwards")
	if code != 0 {
		t.Fatalf("code %d", code)
	}
	for _, want := range []string{
		"gate        request    tcpip-forward, localhost:0, at 127.0.0.1:40000\n",
		"forward    tcpip-forward, 127.0.0.1:40000, 3 connections, ended, the client cancelled it\n",
		"gate     1  channel    direct-tcpip, to db.payments:5432, from 127.0.0.1:4711\n",
		"gate     1  forward    10.0.0.7:5432, 12 B in, 34 B out, bytes from 2026-03-01 12:00:00Z to 2026-03-01 12:01:00Z, ended\n",
		", refused: forwarding to vault is not permitted by profile debug\n",
		"gate     3  channel    auth-agent@openssh.com, to /tmp/agent/s, for channel 4\n",
		"forward    /tmp/agent/s, 0 B in, 0 B out, cut-off, policy has changed",
		"forward    auth-agent-req@openssh.com, /tmp/agent/s, 1 connections, ended\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.ContainsAny(out, "\x1b\u009b\u202e\x07\x00\r") {
		t.Errorf("not cleaned: %q", out)
	}
	out, _, _ = audit(t, "--store", dir, "cat", "forwards")
	if !strings.Contains(out, `"kind":"forward","body":{"type":"direct-tcpip","target":"db.payments:5432","address":"10.0.0.7:5432","originator":"127.0.0.1:4711","input":12,"output":34,"first":"2026-03-01T12:00:00Z"`) {
		t.Errorf("cat: %s", out)
	}
}
