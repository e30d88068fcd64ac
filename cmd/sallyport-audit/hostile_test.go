package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/auditlog"
)

// hostileLog has hostile text in every field that a command prints, and data that a terminal would obey.
func hostileLog(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	long := strings.Repeat("needle without an end ", 50_000)
	writeLog(t, dir, func(l *auditlog.Log) {
		h, b := hostile, []byte(hostile)
		session(t, l, "s1", map[uint32][]auditlog.Body{
			0: {&auditlog.Connect{Gate: h, Source: h, Local: h}, &auditlog.Decision{Allow: true, User: h, Ticket: h, Profile: h, Groups: []string{h}, Why: h}, &auditlog.Sandbox{ID: h, Image: h, Digest: h, Backend: h, ExecAudit: h},
				&auditlog.Alert{Name: h, Detail: h}, &auditlog.Import{Format: h, File: h, SHA256: b, Version: h, Session: h, Statement: h}, &auditlog.ImportNote{Type: -1, Text: h}},
			1: {&auditlog.ChannelOpen{Type: h, Target: h, Originator: h}, &auditlog.Request{Type: "pty-req", Term: h, Columns: 80, Rows: 24, OK: true}, &auditlog.Request{Type: "exec", Command: b, OK: true},
				&auditlog.Data{Stream: auditlog.Output, Data: b}, &auditlog.Data{Stream: auditlog.Output, Data: []byte("\xe2\x80")}, &auditlog.Data{Stream: auditlog.Output, Data: []byte("\xae needle \xf0\x9f")},
				&auditlog.Data{Stream: auditlog.Error, Data: []byte(long)}, &auditlog.Data{Stream: auditlog.Input, Data: b}, &auditlog.ProgramExec{Exec: 1, Path: b, Dir: b, Args: [][]byte{b, b}, Error: h, Call: h},
				&auditlog.ProgramStart{Exec: 1, File: b, Differ: true, Args: [][]byte{b}}, &auditlog.ProgramEnd{Exec: 1, Signal: h}, &auditlog.ConnectOut{Exec: 1, Program: b, Address: h, Call: h, Error: h}, &auditlog.Unaudited{File: b, Args: [][]byte{b}},
				&auditlog.Transfer{Protocol: h, Op: h, Path: b, Resolved: b, Target: b, TargetResolved: b, Name: b, Message: h, Detail: h, Status: 4}, &auditlog.Forward{Type: h, Target: h, Address: h, Originator: h, Result: h, Detail: h}, &auditlog.Exit{Signal: h, Error: h}},
			2: {&auditlog.Data{Stream: auditlog.Output, Data: []byte(strings.Repeat("\x1b[", 10_000) + "needle")}, &auditlog.Data{Stream: auditlog.Output, Data: []byte("\x1b]0;" + strings.Repeat("x", 100_000))}},
		})
	})
	return dir
}

// Nothing that a command prints can control a terminal, and what is to be JSON is.
func TestHostileCommands(t *testing.T) {
	dir := hostileLog(t)
	for _, c := range []struct {
		args string
		json bool
	}{
		{"list", false}, {"list -o json", true}, {"show s1", false}, {"show s1 -o json", true}, {"commands s1", false}, {"commands s1 -o json", true}, {"files", false}, {"files s1 -o json", true},
		{"cat s1", true}, {"search needle", false}, {"search a -o json", true}, {"search -e . --limit 0", false}, {"export s1 -f text", false}, {"export s1 -f jsonl", true}, {"export s1 -f ocsf", true},
		{"export s1 -f asciicast-v2 --input", true}, {"export s1 -f asciicast-v3", true}, {"export s1 -f asciicast-v3 --raw", true}, {"export s1 -f asciicast-v3 --channel 2", true}, {"report s1", false},
		{"report --details -f markdown", false}, {"verify s1", false}, {"extract s1 x", false},
	} {
		out, errs, code := audit(t, append(strings.Fields(c.args), "--store", dir)...)
		if code > 1 || out == "" && errs == "" {
			t.Errorf("%s: code %d %s", c.args, code, errs)
		}
		for i, r := range out + errs {
			if r != '\n' && r < 0x20 || r >= 0x7f && r < 0xa0 || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
				t.Errorf("%s: prints %U at %d", c.args, r, i)
				break
			}
		}
		for l := range strings.Lines(out) {
			if c.json && !json.Valid([]byte(l)) {
				t.Errorf("%s: no JSON: %.200s", c.args, l)
			}
		}
	}
	// What plays is bytes for a terminal, and harmless ones.
	for _, channel := range []string{"1", "2"} {
		out, _, code := audit(t, "play", "s1", "--channel", channel, "--speed", "1000", "--store", dir)
		for _, bad := range []string{"\x1b]", "\x1bP", "\x07", "\x00", "\u202e", "\u009b", "\x9b31"} {
			if code != 0 || strings.Contains(out, bad) {
				t.Errorf("play: code %d, passes %q", code, bad)
			}
		}
	}
}
