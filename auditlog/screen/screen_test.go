package screen

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// read gives the lines of what was written, "|" standing for a pause.
func read(columns, rows int, in string) []string {
	var all []string
	emit := func(l string, _ time.Time) { all = append(all, l) }
	s := New(columns, rows, emit)
	if columns < 0 {
		s = NewPlain(emit)
	}
	for part := range strings.SplitSeq(in, "|") {
		s.Write([]byte(part))
		s.Settle()
	}
	s.Flush()
	return all
}

func TestScreen(t *testing.T) {
	for _, c := range []struct {
		name          string
		columns, rows int
		in            string
		want          []string
	}{
		{"lines", 80, 24, "one\r\ntwo\r\n", []string{"one", "two"}},
		{"scrolled off", 80, 2, "1\r\n2\r\n3\r\n4\r\n5", []string{"1", "2", "3", "4", "5"}},
		{"no terminal", -1, 0, "one\ntwo\n", []string{"one", "two"}},
		{"colours", 80, 24, "\x1b[1;31mred\x1b[0m\x1b[38:2::1:2:3m x", []string{"red x"}},
		{"typed, and taken back", 80, 24, "$ |l|s| |-|x\b\x1b[K|l\r\n", []string{"$ ls -x", "$ ls -l"}},
		{"corrected by readline", 80, 24, "$ cat|\b\b\b\x1b[1Pat|\r$ \x1b[Kdog\r\n", []string{"$ cat", "$ at", "$ dog"}},
		{"progress", 80, 24, "10%|\r20%|\r30%|\r\n", []string{"10%", "20%", "30%"}},
		{"progress, too fast to read", 80, 24, "10%\r20%\r30%|\r\n", []string{"30%"}},
		{"wrapped line", 10, 5, "a long line that wraps\r\nnext", []string{"a long line that wraps", "next"}},
		{"wrapped line, scrolled off", 10, 2, "a long line that wraps\r\n\r\n\r\nnext", []string{"a long line that wraps", "next"}},
		{"a line of just the width", 5, 3, "12345\r\nx", []string{"12345", "x"}},
		{"cleared", 80, 24, "secret|\x1b[2J\x1b[Hnew", []string{"secret", "new"}},
		{"cleared before it was seen", 80, 24, "secret\x1b[2J\x1b[Hnew", []string{"secret", "new"}},
		{"painted over", 80, 24, "\x1b[5;5Hmenu|\x1b[5;5Hitem", []string{"    menu", "    item"}},
		{"alternate screen", 80, 24, "$ vi|\x1b[?1049hfile text|\x1b[?1049l\r\n$ ls", []string{"file text", "$ vi", "$ ls"}},
		{"title and clipboard", 80, 24, "a\x1b]0;title\x07b\x1b]52;c;eA==\x1b\\c\x1bPq#1\x1b\\d", []string{"abcd"}},
		{"strings that U+009C ends", 80, 24, "a\x1b]0;title\u009cb\u009d0;title\u009cc\x1bPq\u009cd\u0090q\xc2\u009ce", []string{"abcde"}},
		{"strings that have its bytes in others", 80, 24, "a\x1b]0;\u00dc\u071c\xc2x\x9cy\x07b", []string{"ab"}},
		{"an unfinished string", 80, 24, "a\x1b]0;title\r\nb", []string{"ab"}},
		{"UTF-8, in pieces", 80, 24, "caf\xc3|\xa9 \xe2\x82|\xac", []string{"café €"}},
		{"not UTF-8", 80, 24, "a\xffb\x80", []string{"a\ufffdb\ufffd"}},
		{"wide", 6, 3, "日本語字", []string{"日本語字"}},
		{"combining", 80, 3, "e\u0301x", []string{"e\u0301x"}},
		{"line drawing", 80, 3, "\x1b(0lqk\x1b(Bx", []string{"┌─┐x"}},
		{"region", 10, 5, "top\x1b[2;4r\x1b[4;1Ha\r\nb\r\nc\r\nd", []string{"a", "top", "b", "c", "d"}},
		{"inserted lines", 10, 4, "one\r\ntwo\x1b[1;1H\x1b[Lzero", []string{"zero", "one", "two"}},
		{"repeated", 80, 3, "ab\x1b[3b", []string{"abbbb"}},
		{"tabs", 80, 3, "a\tb", []string{"a       b"}},
		{"backspaced text is what is read", 80, 3, "pass\b\b\b\bword", []string{"word"}},
		{"reset", 80, 3, "before|\x1bcafter", []string{"before", "after"}},
		{"parameters without bounds", 80, 24, "\x1b[99999999999;99999999999Hx\x1b[" + strings.Repeat("1;", 5000) + "my", []string{"xy"}},
	} {
		got := read(c.columns, c.rows, c.in)
		if !slices.EqualFunc(got, c.want, func(g, w string) bool { return strings.TrimLeft(g, " ") == strings.TrimLeft(w, " ") }) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestResize(t *testing.T) {
	var all []string
	s := New(20, 5, func(l string, _ time.Time) { all = append(all, l) })
	fmt.Fprint(s, "narrow\r\n")
	s.Resize(40, 10)
	fmt.Fprint(s, strings.Repeat("w", 30))
	s.Resize(1_000_000, 1_000_000)
	s.Resize(-1, 0)
	s.Flush()
	if want := []string{"narrow", strings.Repeat("w", 30)}; len(all) != 2 || strings.TrimSpace(all[1]) != want[1] {
		t.Errorf("%q", all)
	}
}

// A screen that has been filled to its bounds stays within them.
func TestBounds(t *testing.T) {
	longest, lines := 0, 0
	s := New(1_000_000, 1_000_000, func(l string, _ time.Time) { longest, lines = max(longest, utf8.RuneCountInString(l)), lines+1 })
	for range 100 {
		s.Write(bytes.Repeat([]byte("x"), 100_000))
		s.Write([]byte("\x1b[9999S\x1b[9999L\x1b[9999@\x1b[9999b\x1b[9999;9999H\x1b[?1049h\x1b[?1049l"))
		s.Settle()
	}
	s.Flush()
	if longest > maxLine+maxColumns*maxRows || lines == 0 {
		t.Errorf("%d lines, the longest of %d characters", lines, longest)
	}
}

func TestFilter(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"plain\r\ntext\t\b", "plain\r\ntext\t\b"},
		{"\x1b[1;31mred\x1b[0m", "\x1b[1;31mred\x1b[0m"},
		{"\x1b[38:2::1:2:3mx", "\x1b[38:2::1:2:3mx"},
		{"\x1b[2J\x1b[H\x1b[10;20H\x1b[K", "\x1b[2J\x1b[H\x1b[10;20H\x1b[K"},
		{"\x1b[?1049h\x1b[?25l\x1b[?1049;1000;2004h", "\x1b[?1049h\x1b[?25l\x1b[?1049h"},
		{"a\x1b]52;c;cm0gLXJmIC8=\x07b", "ab"},
		{"a\x1b]52;c;cm0gLXJmIC8=\x1b\\b", "ab"},
		{"a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\link", "ablink"},
		{"a\u009d0;title\x07b\u009b6nc", "abc"},
		{"a\u009d0;title\u009cb\u0090q\u009cc\x1b]0;t\u009cd", "abcd"},
		{"a\x9d0;title\x9cb", "a\ufffd0;title\ufffdb"},
		{"\x1bP$q\"p\x1b\\x\x1b_G\x1b\\y\x1b^z\x1b\\\x1bXs\x1b\\", "xy"},
		{"\x05\x07\x00\x7f\x11\x13", ""},
		{"\x1b[c\x1b[>c\x1b[=c\x1b[6n\x1b[?6n\x1b[5n\x1b[?1$p\x1b[18t\x1b[21t\x1bZ\x1b[x\x1b[0q", ""},
		{"\x1b[5i\x1b[4i\x1b[?5i", ""},                                                                // printing
		{"\x1b[>4;2m\x1b[>1u\x1b[=1u\x1b[?1h\x1b=\x1b>\x1b[20h\x1b[12h\x1b[2h", ""},                   // keyboard
		{"\x1b[?1000h\x1b[?1002h\x1b[?1003h\x1b[?1006h\x1b[?1004h\x1b[?2004h\x1b[?2026h\x1b[?3h", ""}, // mouse, focus, paste, columns
		{"\x1b[1 q\x1b[61\"p\x1b[!p\x1b%@\x1b%G\x1b(K", ""},
		{"\x1b[g\x1b[0g\x1b[3ga\x1bHb\x1b[5W", "ab"}, // tab stops
		{"\x1b[999999999b", ""}, {"x\x1b[999999999b", "x\x1b[500b"},
		{"a\u202eb\u2066c\u200bd", "a\ufffdb\ufffdc\ufffdd"},
		{"\xc3\xa9 \xff", "é \ufffd"},
		{"\x1b]unfinished\x1b[31mred", "\x1b[31mred"},
		{"\x1b[1\x1b[2J", "\x1b[2J"},
		{"\x1b[3\x182J", "2J"},
		{"\x1b[" + strings.Repeat("1;", 100) + "m.", "."},
	} {
		var f Filter
		if got := string(f.Add([]byte(c.in))); got != c.want {
			t.Errorf("%q: %q, want %q", c.in, got, c.want)
		}
		var one Filter
		got := ""
		for i := range len(c.in) {
			got += string(one.Add([]byte{c.in[i]}))
		}
		if got != c.want {
			t.Errorf("%q, byte by byte: %q, want %q", c.in, got, c.want)
		}
	}
}

func FuzzScreen(f *testing.F) {
	f.Add(80, 24, []byte("a\x1b[2J|\x1b[?1049hx|\x1b[?1049l\x1b[5;1H\x1b[3Lq\x1b(0x"))
	f.Add(3, 2, []byte("\x1b[2;2r\x1bM\x1bM日\x1b[9@\x1b[9P\x1b[b"))
	f.Fuzz(func(t *testing.T, columns, rows int, in []byte) {
		s := New(columns, rows, func(l string, _ time.Time) {
			for _, r := range l {
				if r < 0x20 || r >= 0x7f && r < 0xa0 {
					t.Fatalf("%q has a control character", l)
				}
			}
		})
		for i, part := range bytes.Split(in, []byte("|")) {
			s.Write(part)
			s.Settle()
			if i%3 == 2 {
				s.Resize(columns+i, rows)
			}
		}
		s.Lines()
		s.Flush()
	})
}

// FuzzFilter holds the filter against what a terminal would be reached by, and that filtering again changes nothing.
func FuzzFilter(f *testing.F) {
	f.Add([]byte("a\x1b[31mb\x1b]52;c;eA==\x07\x1b[6n\u009b5n\x1b[?1049;1000hx\x1b[3b"))
	f.Add([]byte("\x1b(0q\x1b)Bz\x1b7\x1bc\x1b[4h\x9b\xff\x1bP"))
	f.Fuzz(func(t *testing.T, in []byte) {
		var a, b Filter
		once := bytes.Clone(a.Add(in))
		if twice := b.Add(once); !bytes.Equal(once, twice) {
			t.Fatalf("%q: once %q, twice %q", in, once, twice)
		}
		for i, r := range string(once) {
			if r == 0x1b {
				if next := once[min(i+1, len(once)-1)]; !strings.ContainsRune("[()#78DEM", rune(next)) {
					t.Fatalf("%q: passes ESC %q", in, next)
				}
			} else if r < 0x20 && !strings.ContainsRune("\b\t\n\v\f\r\x0e\x0f", r) || r >= 0x7f && r < 0xa0 || unicode.Is(unicode.Bidi_Control, r) {
				t.Fatalf("%q: passes %U", in, r)
			}
		}
	})
}

func BenchmarkScreen(b *testing.B) {
	text := []byte(strings.Repeat("Nov 25 18:10:01 host service[4711]: \x1b[32mINFO\x1b[0m a line as logs have it, of some length\r\n", 1000))
	s := New(120, 40, func(string, time.Time) {})
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		s.Write(text)
	}
}
