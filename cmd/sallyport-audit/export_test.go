package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

func TestExport(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		terminalSession(t, l, "shell", &auditlog.ProgramExec{Exec: 1, Args: [][]byte{[]byte("cat"), []byte("token.txt")}}, &auditlog.Request{Type: "window-change", Columns: 100, Rows: 30, OK: true},
			&auditlog.Data{Stream: auditlog.Output, Data: []byte("x\x1b]52;c;cm0=\x07\u009b5ny\u202e\xff")}, &auditlog.Exit{Code: 7})
		session(t, l, "plain", map[uint32][]auditlog.Body{2: {&auditlog.Request{Type: "exec", Command: []byte("ls"), OK: true}, &auditlog.Data{Stream: auditlog.Output, Data: []byte("a\nb\n")}}})
		session(t, l, "silent", nil)
		zero := &auditlog.Request{Type: "pty-req", Term: "xterm", OK: true}
		session(t, l, "zero", map[uint32][]auditlog.Body{1: {zero, &auditlog.Data{Stream: auditlog.Output, Data: []byte("first\r\n25%\r75%\r\n")}, &auditlog.Request{Type: "window-change", Rows: 50, OK: true}}})
	})
	for _, c := range []struct {
		args string
		code int
		want []string
		not  []string
	}{
		{"shell --format asciicast-v3", 0, []string{`{"version":3,"term":{"cols":40,"rows":10,"type":"xterm"}`, `"title":"shell alice"`, `"m","cat token.txt"]`, `,"r","100x30"]`, `,"o","xy` + "\ufffd\ufffd" + `"]`, `,"x","7"]`}, []string{"52;c", `,"i",`}},
		{"shell --format asciicast-v2 --input", 0, []string{`{"version":2,"width":40,"height":10,`, `"env":{"TERM":"xterm"}`, `"i","c"]`}, []string{`"x","7"`}},
		{"shell --format asciicast-v3 --raw", 0, []string{`]52;c;cm0=\u0007\u009b5ny\u202e`}, []string{"\u202e", "\u009b"}},
		{"zero --format asciicast-v3", 0, []string{`"term":{"cols":80,"rows":24,`, `,"r","80x50"]`}, nil}, // RFC 4254, section 6.2
		{"zero --format asciicast-v2", 0, []string{`"width":80,"height":24`}, nil},
		{"plain --format asciicast-v3", 0, []string{`"command":"ls"`, `"o","a\r\nb\r\n"]`}, nil},
		{"plain --format asciicast-v3 --channel 9", 1, []string{"nothing was printed"}, nil},
		{"silent --format asciicast-v3", 1, []string{"nothing was printed"}, nil},
		{"shell --format text", 0, []string{"# session shell", "alice$ cat token.txt", "the token is ab1234, and the line goes on", "painted menu", "ended: client-left"}, []string{"hidden title"}},
		{"shell --format jsonl", 0, []string{`{"session":"shell","sequence":0,`, `"kind":"end"`}, nil},
		{"shell --format ocsf", 0, []string{`"class_uid":4007`, `"class_uid":1007`, `"class_uid":3002`}, nil},
		{"--format ocsf --user alice", 0, []string{`"correlation_uid":"shell"`, `"correlation_uid":"plain"`}, nil},
		{"--format ocsf --user bob", 0, nil, []string{"{"}},
		{"--format asciicast-v2", 1, []string{"say its ID"}, nil},
		{"shell --format gif", 1, []string{"want one of"}, nil},
		{"shell", 1, []string{"format"}, nil},
	} {
		out, errs, code := audit(t, append([]string{"export", "--store", dir, "--utc"}, strings.Fields(c.args)...)...)
		if code != c.code {
			t.Errorf("export %s: code %d %s", c.args, code, errs)
		}
		for _, w := range c.want {
			if !strings.Contains(out+errs, w) {
				t.Errorf("export %s: no %q in\n%s%s", c.args, w, out, errs)
			}
		}
		for _, n := range c.not {
			if strings.Contains(out, n) {
				t.Errorf("export %s: %q in\n%s", c.args, n, out)
			}
		}
		if code == 0 && !strings.Contains(c.args, "text") {
			for l := range strings.Lines(out) {
				if !json.Valid([]byte(l)) {
					t.Errorf("export %s: no JSON: %s", c.args, l)
				}
			}
		}
	}
	file := filepath.Join(t.TempDir(), "out.cast")
	for i, want := range []int{0, 1} { // never over another file
		if _, errs, code := audit(t, "export", "shell", "--store", dir, "-f", "asciicast-v3", "--out", file); code != want {
			t.Errorf("run %d: code %d %s", i, code, errs)
		}
	}
	if b, err := os.ReadFile(file); err != nil || !strings.HasPrefix(string(b), `{"version":3`) {
		t.Errorf("%q %v", b, err)
	}
	if _, _, code := audit(t, "export", "silent", "--store", dir, "-f", "asciicast-v3", "--out", file+"2"); code != 1 {
		t.Error("no error")
	}
	if _, err := os.Stat(file + "2"); err == nil {
		t.Error("what could not be written is there")
	}
}

// Lines come in the order of their times, as far apart as they may be held back, and all of them.
func TestInOrder(t *testing.T) {
	start := time.Unix(1_700_000_000, 0)
	var got []string
	o := &inOrder{emit: func(text string) { got = append(got, text) }}
	for _, l := range []struct {
		second int
		text   string
	}{{3, "25%"}, {3, "75%"}, {1, "first"}, {2, "second"}, {4, "last"}} {
		o.add(start.Add(time.Duration(l.second)*time.Second), l.text)
	}
	o.finish()
	if strings.Join(got, " ") != "first second 25% 75% last" {
		t.Errorf("%q", got)
	}
	got = nil
	for range 2 * maxHeldLines {
		o.add(start, "x")
	}
	if len(got) != maxHeldLines {
		t.Errorf("%d lines were given, %d came", len(got), 2*maxHeldLines)
	}
	for range 4 {
		o.add(start, strings.Repeat("y", maxHeldBytes/2))
	}
	if o.finish(); len(got) != 2*maxHeldLines+4 || o.bytes != 0 {
		t.Errorf("%d lines, %d bytes left", len(got), o.bytes)
	}
}

// What was written over stands after what came before it, in the text and in the report.
func TestTextInOrder(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		r := l.New("s1")
		record := func(b auditlog.Body) {
			if err := r.Record(1, b); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * readable) // a person reads
		}
		out := func(s string) auditlog.Body { return &auditlog.Data{Stream: auditlog.Output, Data: []byte(s)} }
		if err := errors.Join(r.Record(0, &auditlog.Connect{}), r.Begin()); err != nil {
			t.Fatal(err)
		}
		for _, b := range []auditlog.Body{&auditlog.Request{Type: "pty-req", Term: "xterm", Columns: 80, Rows: 24, OK: true}, out("downloading\r\n"), out("at 25%"), out("\rat 75%"), out("\rat 99%\r\n"),
			&auditlog.Request{Type: "exec", Command: []byte("next"), OK: true}} {
			record(b)
		}
		if err := r.Close(&auditlog.End{Cause: "client-left"}); err != nil {
			t.Fatal(err)
		}
	})
	for _, args := range []string{"export s1 -f text", "report s1", "report s1 -f md"} {
		out, errs, code := audit(t, append(strings.Fields(args), "--store", dir)...)
		at := 0
		for _, want := range []string{"downloading", "at 25%", "at 75%", "at 99%"} {
			i := strings.Index(out[at:], want)
			if i < 0 || code != 0 {
				t.Errorf("%s: code %d %s: no %q where it should stand:\n%s", args, code, errs, want, out)
				break
			}
			at += i
		}
		if strings.HasPrefix(args, "export") && !strings.Contains(out[at:], "  1  next") {
			t.Errorf("%s: the command is not where it should stand:\n%s", args, out)
		}
	}
}
