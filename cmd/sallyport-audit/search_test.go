package main

import (
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// terminalSession records a shell on a terminal: what is typed comes back as its echo, letter by letter.
func terminalSession(t *testing.T, l *auditlog.Log, id string, rest ...auditlog.Body) {
	t.Helper()
	out := func(s string) auditlog.Body { return &auditlog.Data{Stream: auditlog.Output, Data: []byte(s)} }
	bodies := []auditlog.Body{&auditlog.ChannelOpen{Type: "session"}, &auditlog.Request{Type: "pty-req", Term: "xterm", Columns: 40, Rows: 10, OK: true},
		&auditlog.Request{Type: "shell", OK: true}, out("\x1b[32malice\x1b[0m$ ")}
	for _, c := range "cat sec" {
		bodies = append(bodies, &auditlog.Data{Stream: auditlog.Input, Data: []byte(string(c))}, out(string(c)))
	}
	bodies = append(bodies, out("\b\b\b\x1b[Ktoken.txt\r\n"), out("the to\x1b[1mken is ab\x1b[0m12"), out("34, and the line goes on beyond the right end\r\n"),
		out("\x1b]0;hidden title\x07\x1b[?1049h\x1b[3;3Hpainted menu\x1b[?1049l"))
	session(t, l, id, map[uint32][]auditlog.Body{1: append(bodies, rest...)})
}

func TestSearch(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		terminalSession(t, l, "shell", &auditlog.ProgramExec{Exec: 1, Args: [][]byte{[]byte("cat"), []byte("token.txt")}, Path: []byte("/bin/cat")},
			&auditlog.ChannelClose{})
		session(t, l, "exec", map[uint32][]auditlog.Body{1: {&auditlog.Request{Type: "exec", Command: []byte("psql -c 'Drop Table x'"), OK: true},
			&auditlog.Data{Stream: auditlog.Input, Data: []byte("fed in\n")}, &auditlog.Data{Stream: auditlog.Error, Data: []byte("\x00\x01binary\n")},
			&auditlog.Data{Stream: auditlog.Error, Data: []byte("ERROR: refused\n")},
			&auditlog.Transfer{Op: "file", Path: []byte("/tmp/payroll.csv"), Resolved: []byte("/tmp/payroll.csv")}}})
		session(t, l, "long", map[uint32][]auditlog.Body{1: {&auditlog.Data{Stream: auditlog.Output, Data: []byte(strings.Repeat("x ", 100_000) + "needle" + strings.Repeat(" y", 100_000))}}})
		session(t, l, "evil", map[uint32][]auditlog.Body{1: {&auditlog.Request{Type: "exec", Command: []byte("evilmark " + hostile), OK: true},
			&auditlog.Data{Stream: auditlog.Output, Data: []byte("evilmark " + hostile + "\n")}}})
	})
	for _, c := range []struct {
		args string
		code int
		want []string // each in a line of its own, in order
	}{
		{"token is ab1234, and", 0, []string{"terminal 1  the token is ab1234, and the line goes on beyond the right end"}},
		{"cat token.txt", 0, []string{"terminal 1  alice$ cat token.txt", "program  1  cat token.txt"}},
		{"hidden title", 1, nil},
		{"painted menu", 0, []string{"terminal 1  painted menu"}},
		{"drop table", 1, nil},
		{"drop table -I", 0, []string{"command  1  psql -c 'Drop Table x'"}},
		{"Drop.*x -e", 0, []string{"Drop Table x"}},
		{"drop.*X -e -I", 0, []string{"Drop Table x"}},
		{"fed in", 0, []string{"input    1  fed in"}},
		{"ERROR", 0, []string{"error    1  ERROR: refused"}},
		{"ERROR --user bob", 1, nil},
		{"ERROR --session shell", 1, nil},
		{"payroll", 0, []string{"file     1  /tmp/payroll.csv"}},
		{"payroll --in terminal,command", 1, nil},
		{"needle", 0, []string{"x needle y"}},
		{"evilmark", 0, []string{`evilmark a\x1b[2J`, "output   1  evilmark a"}},
	} {
		text, flags, _ := strings.Cut(c.args, " -")
		args := []string{"search", text, "--store", dir}
		if flags != "" {
			args = append(args, strings.Fields("-"+flags)...)
		}
		out, errs, code := audit(t, args...)
		lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
		if code != c.code || len(c.want) != len(lines) && out != "" || len(c.want) == 0 && out != "" {
			t.Errorf("search %s: code %d\n%s%s", c.args, code, out, errs)
			continue
		}
		for i, w := range c.want {
			if !strings.Contains(lines[i], w) || len(lines[i]) > 2*maxHitText {
				t.Errorf("search %s: %q, want %q", c.args, lines[i], w)
			}
		}
	}
	if out, errs, code := audit(t, "search", "a", "--store", dir, "--limit", "1"); code != 0 || strings.Count(out, "\n") != 1 || !strings.Contains(errs, "--limit") {
		t.Errorf("limit: code %d %s%s", code, out, errs)
	}
	if out, _, code := audit(t, "search", "Drop", "--store", dir, "-o", "json"); code != 0 || !strings.Contains(out, `"session":"exec","user":"alice"`) || !strings.Contains(out, `"where":"command","text":"psql -c 'Drop Table x'"`) {
		t.Errorf("json: %d %s", code, out)
	}
	for _, bad := range [][]string{{"search", ""}, {"search", "(", "-e"}, {"search", "x", "--in", "soul"}} {
		if _, errs, code := audit(t, append(bad, "--store", dir)...); code != 1 || errs == "" {
			t.Errorf("%v: code %d %s", bad, code, errs)
		}
	}
}

// However many channels there are, few are rendered at a time, and none is forgotten.
func TestRenderingChannels(t *testing.T) {
	lines := 0
	r := newRendering(func(readLine) { lines++ })
	const channels = 100_000
	for c := range uint32(channels) {
		for _, b := range []auditlog.Body{&auditlog.Request{Type: "pty-req", Columns: 1 << 30, Rows: 1 << 30, OK: true}, &auditlog.Data{Stream: auditlog.Output, Data: []byte("x")}} {
			r.add(auditlog.Record{Channel: c, Time: time.Unix(int64(c), 0), Body: b})
		}
		if len(r.screens) > maxScreens || len(r.sizes) > maxShownChannels {
			t.Fatalf("%d screens, %d sizes", len(r.screens), len(r.sizes))
		}
	}
	r.finish()
	if lines != channels {
		t.Errorf("%d lines", lines)
	}
}
