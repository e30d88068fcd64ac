package main

import (
	"crypto/sha256"
	"encoding/base64"
	"html"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// markup is text that would be HTML, Markdown, a template or a link.
const markup = "<script>alert(1)</script><img src=x onerror=y>\" onmouseover='z' {{.}} ![i](http://evil/i.png) [l](javascript:x) `` ``` | a | # h\n\n---\n```\n<b>http://evil www.evil a@b.c"

func reportLog(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		terminalSession(t, l, "shell", &auditlog.ProgramExec{Exec: 1, Args: [][]byte{[]byte("cat"), []byte("token.txt")}, Path: []byte("/bin/cat")})
		h := hostile + markup
		b := []byte(h)
		session(t, l, "evil", map[uint32][]auditlog.Body{
			0: {&auditlog.Decision{Allow: true, User: h, Ticket: h, Profile: h, Groups: []string{h}}, &auditlog.Sandbox{Image: h, Digest: h, ID: h}, &auditlog.Alert{Name: h, Detail: h}},
			1: {&auditlog.ChannelOpen{Type: "session"}, &auditlog.Request{Type: "exec", Command: b, OK: true}, &auditlog.Data{Stream: auditlog.Output, Data: b},
				&auditlog.Data{Stream: auditlog.Error, Data: b}, &auditlog.Transfer{Op: h, Path: b, Resolved: b, Target: b, Message: h, Status: 3},
				&auditlog.Transfer{Op: "file", Path: b, Written: &auditlog.TransferFlow{Bytes: 3, SHA256: []byte{1, 2}}},
				&auditlog.ProgramExec{Exec: 1, Args: [][]byte{b}, Path: b}, &auditlog.Forward{Type: h, Target: h, Address: h, Result: h}},
		})
	})
	return dir
}

func TestReport(t *testing.T) {
	dir := reportLog(t)
	for _, c := range []struct {
		args string
		want []string
	}{
		{"shell", []string{"<!DOCTYPE html>", "Content-Security-Policy", "default-src &#39;none&#39;", "Session shell", "the token is ab1234, and the line goes on", "cat token.txt", "not pinned", "verify shell"}},
		{"shell --format md", []string{"# Session shell", "    ", "the token is ab1234, and the line goes on", "cat token.txt"}},
		{"--since 1h", []string{"<td>shell</td>", "<td>evil</td>", "2 sessions of 2 users, 1 alerts; 2 logs sealed"}},
		{"--since 1h --details --title Q1", []string{"<title>Q1</title>", "Session shell", "Session evil"}},
		{"--user alice --format markdown", []string{"| shell |", "user: alice", "1 sessions of 1 users"}},
		{"--user nobody", []string{"0 sessions"}},
		{"evil", []string{"&lt;script&gt;alert(1)"}},
		{"evil --format markdown", []string{`\<script\>alert\(1\)`}},
	} {
		out, errs, code := audit(t, append([]string{"report", "--store", dir}, strings.Fields(c.args)...)...)
		if code != 0 {
			t.Errorf("report %s: code %d %s", c.args, code, errs)
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("report %s: no %q in\n%s", c.args, w, out)
			}
		}
	}
	file := filepath.Join(t.TempDir(), "r.html")
	for i, want := range []int{0, 1} {
		if _, _, code := audit(t, "report", "shell", "--store", dir, "--out", file); code != want {
			t.Errorf("run %d: code %d", i, code)
		}
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Error(info, err)
	}
	if _, errs, code := audit(t, "report", "shell", "--store", dir, "--format", "pdf"); code != 1 || !strings.Contains(errs, "want html") {
		t.Errorf("format: %d %s", code, errs)
	}
}

// The page's policy admits its style, which stands there as it was hashed.
func TestReportPolicy(t *testing.T) {
	page, _, _ := audit(t, "report", "shell", "--store", reportLog(t))
	_, rest, _ := strings.Cut(page, "<style>")
	css, _, _ := strings.Cut(rest, "</style>")
	sum := sha256.Sum256([]byte(css))
	if want := "style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"; css == "" || !strings.Contains(html.UnescapeString(page), want) {
		t.Errorf("no %s", want)
	}
}

// Nothing of a log becomes markup: every tag of the page is one of ours, and a Markdown line has nothing that means more than text.
func TestReportHostile(t *testing.T) {
	dir := reportLog(t)
	for _, args := range [][]string{{"evil"}, {"--details"}, {"evil", "--title", markup}} {
		page, _, _ := audit(t, append([]string{"report", "--store", dir}, args...)...)
		ours := regexp.MustCompile(`^<(/?(html|head|title|style|body|h1|h2|h3|p|table|thead|tbody|tr|th|td|pre|ul|li|span)|!DOCTYPE html|meta|html lang="en"|(p|td|table|span|ul) class="[a-z]+"|meta [^<>]*)>$`)
		for _, tag := range regexp.MustCompile(`<[^>]*>`).FindAllString(page, -1) {
			if !ours.MatchString(tag) {
				t.Errorf("%v: the tag %q", args, tag)
			}
		}
		text, _, _ := audit(t, append([]string{"report", "--store", dir, "--format", "markdown"}, args...)...)
		block := false // a block of code, or what follows a line of one, is indented
		for l := range strings.Lines(text) {
			block = strings.HasPrefix(l, "    ")
			if block {
				continue
			}
			bare := regexp.MustCompile(`\\[[:punct:]]`).ReplaceAllString(l, "")
			for _, evil := range []string{"<", "](", "`", "![", "http:", "{{", "www.", "@"} {
				if strings.Contains(bare, evil) {
					t.Errorf("%v: %q in %q", args, evil, l)
				}
			}
			if n := strings.Count(bare, "|"); n > 0 && n != 3 && n != 7 && n != 11 {
				t.Errorf("%v: %d cells in %q", args, n-1, l)
			}
		}
		for _, out := range []string{page, text} {
			for _, r := range out {
				if r != '\n' && r < 0x20 || r >= 0x7f && r < 0xa0 || r == 0x202e {
					t.Errorf("%v: %U", args, r)
					break
				}
			}
		}
	}
}

// What goes on over midnight has its days, and a report's times say of which zone they are.
func TestDays(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		r := l.New("night")
		at := func(clock string, channel uint32, bodies ...auditlog.Body) {
			when, err := time.Parse(time.DateTime, clock)
			if err != nil {
				t.Fatal(err)
			}
			r.SetTime(when)
			for _, b := range bodies {
				if err := r.Record(channel, b); err != nil {
					t.Fatal(err)
				}
			}
		}
		out := func(s string) auditlog.Body { return &auditlog.Data{Stream: auditlog.Output, Data: []byte(s)} }
		at("2026-03-01 22:30:00", 0, &auditlog.Connect{Source: "192.0.2.7:4022"})
		if err := r.Begin(); err != nil {
			t.Fatal(err)
		}
		at("2026-03-01 22:31:00", 1, &auditlog.Request{Type: "exec", Command: []byte("before"), OK: true}, out("evening\n"))
		at("2026-03-02 00:32:00", 2, &auditlog.Request{Type: "exec", Command: []byte("after"), OK: true}, out("night\n"), &auditlog.Transfer{Op: "file", Path: []byte("/x")})
		at("2026-03-02 00:32:30", 1, &auditlog.ProgramExec{Exec: 1, Args: [][]byte{[]byte("owl")}})
		at("2026-03-02 00:33:00", 2, &auditlog.Request{Type: "exec", Command: []byte("later"), OK: true})
		r.SetTime(time.Date(2026, 3, 2, 0, 34, 0, 0, time.UTC))
		if err := r.Close(&auditlog.End{Cause: "idle"}); err != nil {
			t.Fatal(err)
		}
	})
	was := time.Local
	time.Local = time.FixedZone("X", 90*60)
	t.Cleanup(func() { time.Local = was })
	for _, c := range []struct {
		args      string
		want, not []string
	}{
		{"show night --utc", []string{"\n  22:30:00.000 gate", "\n  2026-03-02\n  00:32:00.000 gate     2", "\n  00:33:00.000 gate     2"}, nil},
		{"show night", []string{"\n  00:00:00.000 gate", "\n  00:01:00.000 gate     1"}, []string{"\n  2026-03"}},
		{"report night --utc", []string{"<td>2026-03-01 22:30:00Z</td>", "Times are UTC", `>2026-03-02 00:32:00.000</td><td class="who">gate`, `>00:33:00.000</td>`, `>2026-03-02 00:32:00.000</td><td>2 output`, `>2026-03-02 00:32:00.000</td><td>file`}, nil},
		{"report night", []string{"<td>2026-03-02 00:00:00 &#43;01:30</td>", "Times are local", ">00:01:00.000</td>"}, []string{`class="nowrap">2026-03-02`}},
		{"report night -f md --utc", []string{"    2026-03-02 00:32:00.000 gate     2  exec"}, nil},
		{"commands night --utc", []string{"began      2026-03-01 22:30:00Z\n", "\n  2026-03-02\n  00:32:30.000  owl"}, nil},
		{"report", []string{">2026-03-02 00:00:00 &#43;01:30</td>"}, nil},
	} {
		out, errs, code := audit(t, append(strings.Fields(c.args), "--store", dir)...)
		if code != 0 {
			t.Errorf("%s: code %d %s", c.args, code, errs)
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: no %q in\n%s", c.args, w, out)
			}
		}
		for _, n := range c.not {
			if strings.Contains(out, n) {
				t.Errorf("%s: %q in\n%s", c.args, n, out)
			}
		}
	}
}
