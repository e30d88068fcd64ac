package main

import (
	"bytes"
	"crypto/ed25519"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
)

func TestParse(t *testing.T) {
	for _, args := range [][]string{
		{"-rounds", "0"}, {"-only", "("}, {"-write", "-quick"}, {"-write", "-only", "true"}, {"x"},
	} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%q: accepted", args)
		}
	}
	o, err := parse([]string{"-only", "^true$"}, io.Discard)
	if err != nil || !o.only.MatchString("true") || o.only.MatchString("untrue") {
		t.Error(o, err)
	}
}

func TestSamples(t *testing.T) {
	for _, c := range []struct {
		s      samples
		median float64
		text   string
	}{
		{nil, 0, "-"},
		{samples{7}, 7, "7"},
		{samples{3, 1, 2}, 2, "2 (1–3)"},
		{samples{0.25, 0.123, 1.5, 120.4}, 0.875, "0.88 (0.12–120)"},
	} {
		if m := c.s.median(); m != c.median {
			t.Errorf("%v: median %v, want %v", c.s, m, c.median)
		}
		if got := c.s.text(); got != c.text {
			t.Errorf("%v: %q, want %q", c.s, got, c.text)
		}
	}
	if got := (samples{3}).ratio(samples{2}); got != "1.50" {
		t.Error(got)
	}
	if got := (samples{3}).ratio(nil); got != "-" {
		t.Error(got)
	}
}

func TestParseStat(t *testing.T) {
	// The name of a process can be made to look like the fields after it.
	line := "42 (a) S 1 (b) R 7 0 0 0 -1 4194560 1 2 3 4 150 50 20 10 20 0 1 0 100 1 1\n"
	s, err := parseStat(line)
	if err != nil {
		t.Fatal(err)
	}
	if s.parent != 7 || s.own != 2*time.Second || s.ended != 300*time.Millisecond {
		t.Errorf("%+v", s)
	}
	for _, bad := range []string{"", "42 (a) S 1", ")(", strings.Replace(line, "150", "x", 1)} {
		if _, err := parseStat(bad); err == nil {
			t.Errorf("%q: accepted", bad)
		}
	}
}

func TestIsPrompt(t *testing.T) {
	for text, want := range map[string]bool{
		"": false, "welcome\r\n": false, "costs 5 $": false,
		"\x1b[?2004halice@4a1d:~$ ": true, "\x1b]0;title\x07root@host:/# \x1b[0m": true, "alice@4a1d:~$ l": false,
	} {
		if got := isPrompt([]byte(text)); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestWithSettings(t *testing.T) {
	out, err := withSettings([]byte("gate: demo\nssh:\n  listen: a\n  max_channels: 3\n"),
		map[string]any{"ssh.listen": "b", "audit.store.directory": "log"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"gate: demo", "listen: b", "max_channels: 3", "directory: log"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing in:\n%s", want, out)
		}
	}
	if _, err := withSettings([]byte("gate: demo\n"), map[string]any{"gate.name": "x"}); err == nil {
		t.Error("a value was taken for a mapping")
	}
}

func TestReport(t *testing.T) {
	r := &report{}
	r.table("One", "a", "b").row("1", "2")
	r.table("One").row("3", "4")
	r.aim(false, "fast", "slow")
	var text strings.Builder
	r.print(&text)
	for _, want := range []string{
		"## One\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n", "| fast | slow | **missed** |",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, text.String())
		}
	}
	r.quick, text = true, strings.Builder{}
	if r.print(&text); strings.Contains(text.String(), "missed") {
		t.Error("a quick run speaks of aims")
	}
}

func TestPace(t *testing.T) {
	const rate = 1 << 20
	data := make([]byte, rate/20)
	began := time.Now()
	r := &pace{Reader: bytes.NewReader(data), rate: rate}
	got, err := io.ReadAll(r)
	if err != nil || len(got) != len(data) || r.n != int64(len(data)) {
		t.Fatal(len(got), r.n, err)
	}
	w := &pace{rate: rate}
	for range 2 {
		if n, err := w.Write(data); n != len(data) || err != nil {
			t.Fatal(n, err)
		}
	}
	if took := time.Since(began); took < 150*time.Millisecond {
		t.Errorf("three twentieths of a second's bytes passed in %v", took)
	}
}

// What is measured of the log without a gate is a log: it is decrypted, and all sessions that are listed are in its index.
func TestLogs(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{sizes: small, root: t.TempDir()}
	var encode, decode samples
	if err := b.oneLog(t.Context(), bytes.Repeat([]byte("a line\n"), 100_000), id, true, &encode, &decode, nil, nil); err != nil {
		t.Fatal(err)
	}
	if len(encode) != 1 || len(decode) != 1 {
		t.Error(encode, decode)
	}
	dir := t.TempDir()
	store, err := file.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: filepath.Join(t.TempDir(), "spool"), Index: true}, key, store, "bench", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	const sessions = 25
	if err := writeSessions(t.Context(), l, sessions); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	src, err := file.OpenSource(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	x, err := auditlog.ReadIndex(t.Context(), src, auditlog.IndexOptions{Keys: []ed25519.PublicKey{public}})
	if err != nil || x.Len() != sessions {
		t.Fatalf("%d of %d sessions are in the index: %v", x.Len(), sessions, err)
	}
	for log, err := range auditlog.Logs(t.Context(), src, auditlog.SessionPrefix) {
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := x.Entry(log); !ok || e.User == "" || e.Cause != "client-left" {
			t.Errorf("%v: %v %+v", log.Name, ok, e)
		}
	}
}
