package main

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// recording is a channel whose records come at given seconds.
func recording(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		terminalSession(t, l, "s1", &auditlog.Data{Stream: auditlog.Output, Data: []byte("evil \x1b]52;c;cm0=\x07\x1b[6n\x1b]0;t\x07\x1b[31mred\x1b[0m \u202eend\r\n")},
			&auditlog.ProgramExec{Exec: 1, Args: [][]byte{[]byte("psql")}}, &auditlog.Data{Stream: auditlog.Output, Data: []byte("psql's output\r\n")},
			&auditlog.ProgramExec{Exec: 2, Args: [][]byte{[]byte("vim")}}, &auditlog.Data{Stream: auditlog.Output, Data: []byte("vim's output\r\n")})
		session(t, l, "s2", map[uint32][]auditlog.Body{3: {&auditlog.Request{Type: "exec", Command: []byte("ls"), OK: true}, &auditlog.Data{Stream: auditlog.Output, Data: []byte("one\ntwo\n")},
			&auditlog.Data{Stream: auditlog.Error, Data: []byte("oops\n")}}})
		session(t, l, "s3", nil)
	})
	return dir
}

func TestPlay(t *testing.T) {
	dir := recording(t)
	for _, c := range []struct {
		args       []string
		want, none []string
	}{
		{[]string{"s1"}, []string{"cat sec\b\b\b\x1b[Ktoken.txt", "\x1b[32malice\x1b[0m$ ", "evil \x1b[31mred\x1b[0m \ufffdend", "vim's output"}, []string{"\x1b]", "\x1b[6n", "\u202e", "\x07"}},
		{[]string{"s1", "--raw"}, []string{"\x1b]52;c;cm0=\x07\x1b[6n"}, nil},
		{[]string{"s2"}, []string{"one\ntwo\noops\n"}, nil},
		{[]string{"s2", "--channel", "3"}, []string{"one\ntwo\noops\n"}, nil},
	} {
		out, errs, code := audit(t, append([]string{"play", "--store", dir, "--speed", "1000"}, c.args...)...)
		if code != 0 {
			t.Errorf("%v: code %d %s", c.args, code, errs)
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("%v: no %q in %q", c.args, w, out)
			}
		}
		for _, n := range c.none {
			if strings.Contains(out, n) {
				t.Errorf("%v: %q in %q", c.args, n, out)
			}
		}
	}
	for _, c := range []struct{ args, want string }{
		{"s3", "nothing was printed"}, {"s1 --speed 0", "--speed"}, {"s1 --idle -1s", "--idle"}, {"s1 --command nano", "no command has"}, {"nobody", "not there"},
	} {
		if _, errs, code := audit(t, append([]string{"play", "--store", dir}, strings.Fields(c.args)...)...); code != 1 || !strings.Contains(errs, c.want) {
			t.Errorf("play %s: code %d %s", c.args, code, errs)
		}
	}
}

// The waits are the recording's own, capped and at its speed; keys change them.
func TestPlayer(t *testing.T) {
	dir := recording(t)
	l, err := (&tool{}).openLogs(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	log, err := find(t.Context(), l, "s1")
	if err != nil {
		t.Fatal(err)
	}
	play := func(o playOptions, pressed map[int]key) (string, []time.Duration, error) {
		var out bytes.Buffer
		var waits []time.Duration
		o.channel = 1
		if o.speed == 0 {
			o.speed = 1
		}
		p := &player{o: o, out: &out, records: func(context.Context) *auditlog.SessionReader { return l.reader(log) }}
		p.sleep = func(_ context.Context, d time.Duration, _ <-chan key) (key, bool, error) {
			waits = append(waits, d)
			k, ok := pressed[len(waits)]
			return k, ok, nil
		}
		err := p.run(t.Context())
		return out.String(), waits, err
	}
	whole, waits, err := play(playOptions{}, nil)
	if err != nil || len(waits) < 15 {
		t.Fatal(len(waits), err)
	}
	if _, capped, _ := play(playOptions{idle: 1}, nil); slices.Max(capped) > 1 {
		t.Errorf("idle time is not capped: %v", capped)
	}
	if _, fast, _ := play(playOptions{speed: 10}, nil); slices.Max(fast) > slices.Max(waits)/10+1 {
		t.Errorf("no faster: %v", fast)
	}
	out, waits, err := play(playOptions{}, map[int]key{2: keyPause, 3: keyPause, 4: keyFaster})
	if err != nil || out != whole || waits[2] >= 0 {
		t.Errorf("a pause: %v %v %q", err, waits[2], out)
	}
	if _, waits, err := play(playOptions{command: "psql"}, nil); err != nil || len(waits) != 2 {
		t.Errorf("from a command: %d waits, %v", len(waits), err)
	}
	if out, waits, err := play(playOptions{}, map[int]key{1: keyNext, 2: keyNext}); err != nil || out != whole || len(waits) > 3 {
		t.Errorf("to the next commands: %d waits, %v", len(waits), err)
	}
	if out, _, err := play(playOptions{}, map[int]key{5: keyPrevious}); err != nil || strings.Count(out, "cat") != 2 || !strings.HasSuffix(out, whole) {
		t.Errorf("back: %q %v", out, err)
	}
	if out, _, err := play(playOptions{}, map[int]key{5: keyBack}); err != nil || !strings.HasSuffix(out, whole) {
		t.Errorf("ten seconds back: %q %v", out, err)
	}
	if out, waits, err := play(playOptions{}, map[int]key{2: keyForward}); err != nil || len(waits) > 3 || out != whole {
		t.Errorf("ten seconds on: %d waits %v", len(waits), err)
	}
	if out, _, err := play(playOptions{}, map[int]key{3: keyQuit}); err != errQuit || len(out) >= len(whole) {
		t.Errorf("quit: %q %v", out, err)
	}
	if got := parseKeys(" \x1b[C\x1bODq?é\x1b[A"); !slices.Equal(got, []key{keyPause, keyForward, keyBack, keyQuit}) {
		t.Errorf("keys: %v", got)
	}
}
