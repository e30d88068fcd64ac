package screen

import (
	"bytes"
	"slices"
	"strconv"
	"unicode"
)

// Filter lets through what paints on a terminal, and nothing else: characters, colours, movements of the cursor, erasing,
// scrolling, the alternate screen. What it takes out would change the terminal for good, or make it answer as if its user had
// typed: titles, clipboard (OSC 52), queries, device strings, printing, keyboard and mouse modes, tab stops (nothing tells what they
// were before), the bell, and characters that change the direction of text.
type Filter struct {
	parser parser
	out    bytes.Buffer
	last   rune
}

// Add takes bytes and gives the safe ones. What is given is overwritten by the next call.
func (f *Filter) Add(p []byte) []byte {
	f.parser.to = (*filtering)(f)
	f.out.Reset()
	f.parser.write(p)
	return f.out.Bytes()
}

// Reset puts a terminal back into the state that a program expects: no colours, all of it scrolling, cursor shown, main screen.
const Reset = "\x1b[0m\x1b[r\x1b[?6l\x1b[?7h\x1b[?25h\x1b[4l\x1b(B\x1b)B\x0f\x1b[?1047l"

// filtering hides the methods that the parser calls.
type filtering Filter

func (f *filtering) print(c rune) {
	switch {
	case c < 0x80 || unicode.IsGraphic(c) || unicode.In(c, unicode.Co) || c == 0x200d: // zero-width joiner: emoji need it
		f.last = c
		f.out.WriteRune(c)
	default:
		f.out.WriteRune(unicode.ReplacementChar)
	}
}

func (f *filtering) control(c byte) {
	if c >= '\b' && c <= '\r' || c == 0x0e || c == 0x0f {
		f.out.WriteByte(c)
	}
}

func (f *filtering) escape(between, final byte) {
	switch {
	case (between == '(' || between == ')') && (final == '0' || final == 'A' || final == 'B'):
		f.out.Write([]byte{0x1b, between, final})
	case between == '#' && final == '8', between == 0 && bytes.IndexByte([]byte("78DEM"), final) >= 0:
		f.out.WriteByte(0x1b)
		if between != 0 {
			f.out.WriteByte(between)
		}
		f.out.WriteByte(final)
	case between == 0 && final == 'c':
		f.out.WriteString("\x1b[0m\x1b[r\x1b[?6l\x1b[?7h\x1b[?25h\x1b[4l\x1b(B\x1b)B\x0f\x1b[2J\x1b[H")
	}
}

// paintingModes are the private modes that only paint: origin, wrapping, cursor, alternate screen.
var paintingModes = []int{6, 7, 25, 47, 1047, 1048, 1049}

func (f *filtering) sequence(private byte, params []int, between, final byte) {
	if len(f.parser.raw) > maxRaw {
		return
	}
	switch {
	case private == '?' && between == 0 && (final == 'h' || final == 'l'):
		for _, p := range params {
			if slices.Contains(paintingModes, p) {
				f.write("?"+strconv.Itoa(p), final)
			}
		}
	case private != 0 || between != 0:
	case final == 'h' || final == 'l':
		if slices.Equal(params, []int{4}) { // insert
			f.write("4", final)
		}
	case final == 'b':
		n := 1
		if len(params) > 0 {
			n = min(max(params[0], 1), maxColumns)
		}
		if f.last != 0 {
			f.write(strconv.Itoa(n), final)
		}
	case bytes.IndexByte([]byte("ABCDEFGHIJKLMPSTXZ@`adefmrsu"), final) >= 0:
		f.write(string(f.parser.raw), final)
	}
}

func (f *filtering) write(params string, final byte) {
	f.out.WriteString("\x1b[" + params)
	f.out.WriteByte(final)
}
