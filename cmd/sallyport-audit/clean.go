package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// clean makes text safe to print on one line of a terminal: whatever is not a printable character is shown as an escape.
// That takes C0 and C1 controls, also as bytes that are not UTF-8, and Unicode's invisible and direction-changing
// characters, which would show another text than is there.
func clean(s string) string { return sanitize(s, false) }

// cleanText does the same for text of several lines: line feeds and tabs stay.
func cleanText(s string) string { return sanitize(s, true) }

func sanitize(s string, lines bool) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n <= 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case lines && (r == '\n' || r == '\t'), r == ' ':
			b.WriteRune(r)
		case !unicode.IsGraphic(r) || unicode.IsSpace(r) || unicode.Is(unicode.Other, r):
			if r < 0x80 {
				fmt.Fprintf(&b, `\x%02x`, r)
			} else {
				fmt.Fprintf(&b, `\u{%x}`, r)
			}
		default:
			b.WriteString(s[i : i+n])
		}
		i += n
	}
	return b.String()
}

// safeLines writes lines of JSON, whole ones in each Write, and escapes what encoding/json leaves in strings and a terminal would
// obey or hide: DEL, C1 controls, and what clean takes too. In JSON such characters can only stand in strings, so an escape there
// means the same.
type safeLines struct{ w io.Writer }

func (s safeLines) Write(p []byte) (int, error) {
	const chunk = 64 << 10
	if isPlain(p) {
		return s.w.Write(p)
	}
	var out bytes.Buffer
	for i := 0; i < len(p); {
		r, n := utf8.DecodeRune(p[i:])
		i += n
		switch {
		case r < 0x7f || unicode.IsGraphic(r) && !unicode.IsSpace(r) && !unicode.Is(unicode.Other, r):
			out.WriteRune(r)
		case r > 0xffff:
			r -= 0x10000
			fmt.Fprintf(&out, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		default:
			fmt.Fprintf(&out, `\u%04x`, r)
		}
		if out.Len() >= chunk {
			if _, err := out.WriteTo(s.w); err != nil {
				return 0, err
			}
		}
	}
	_, err := out.WriteTo(s.w)
	return len(p), err
}

func isPlain(b []byte) bool {
	for _, c := range b {
		if c >= 0x7f {
			return false
		}
	}
	return true
}

// terminalText turns a program's output into the text that can be read in it: escape sequences are dropped, CR LF is a line
// feed, anything else that is not text is shown as an escape. It is an approximation for reading: the exact bytes are
// `cat --raw`'s.
type terminalText struct {
	state escapeState
	cr    bool
	rest  []byte // the start of a character whose end is to come
}

type escapeState uint8

const (
	plain   escapeState = iota
	escape              // after ESC
	between             // ESC and an intermediate
	control             // CSI: until a byte of 0x40 to 0x7e
	text                // OSC, DCS, PM, APC, SOS: until BEL or ST
	textEnd             // there, after ESC
)

// add gives the text of the next bytes.
func (t *terminalText) add(p []byte) string {
	p = append(t.rest, p...)
	t.rest = nil
	var b strings.Builder
	for i := 0; i < len(p); {
		c := p[i]
		if t.state != plain {
			t.escaped(c)
			i++
			continue
		}
		if t.cr && c != '\n' && c != '\r' {
			b.WriteByte('\n') // the line would be written over: both are kept
		}
		switch {
		case c == '\r':
			t.cr = true
			i++
			continue
		case c == 0x1b:
			t.state = escape
			i++
		case c == 0x07 || c == 0x00:
			i++
		default:
			if !utf8.FullRune(p[i:]) {
				t.rest = append([]byte(nil), p[i:]...)
				t.cr = false
				return b.String()
			}
			_, n := utf8.DecodeRune(p[i:])
			b.WriteString(cleanText(string(p[i : i+n])))
			i += n
		}
		t.cr = false
	}
	return b.String()
}

// end gives what was held back.
func (t *terminalText) end() string {
	s := clean(string(t.rest))
	t.rest = nil
	return s
}

func (t *terminalText) escaped(c byte) {
	switch t.state {
	case escape:
		switch {
		case c == '[':
			t.state = control
		case c == ']' || c == 'P' || c == '^' || c == '_' || c == 'X':
			t.state = text
		case c >= 0x20 && c <= 0x2f:
			t.state = between
		default:
			t.state = plain
		}
	case between:
		if c < 0x20 || c > 0x2f {
			t.state = plain
		}
	case control:
		if c >= 0x40 && c <= 0x7e || c < 0x20 {
			t.state = plain
		}
	case text:
		switch c {
		case 0x07, '\n': // no such text spans lines: an unfinished one shall not hide all that follows
			t.state = plain
		case 0x1b:
			t.state = textEnd
		}
	case textEnd:
		t.state = plain
	}
}
