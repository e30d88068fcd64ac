package screen

import "unicode/utf8"

const (
	maxParams = 16
	maxRaw    = 128
)

// handler gets what a parser recognises.
type handler interface {
	print(c rune)
	control(c byte)
	escape(between, final byte)
	sequence(private byte, params []int, between, final byte)
}

// parser recognises a terminal's control functions (ECMA-48; after the state machine that the DEC VT500 series has). Strings
// (OSC, DCS, APC, PM, SOS) are skipped, whatever they hold, up to their end; a line feed ends one too, so that an unfinished
// one does not hide all that follows.
type parser struct {
	to      handler
	state   state
	private byte
	between byte
	many    bool // more than one intermediate
	params  []int
	raw     []byte // the parameters as they came, maxRaw and one byte at most
	rest    []byte // the start of a character whose end is to come
	c2      bool   // within a string: the last byte was C2, with which U+009C begins
	bare    bool   // a line feed alone begins a line: there was no terminal that would have made it one
}

type state uint8

const (
	ground state = iota
	escaped
	sequenced // CSI
	skipped   // a string
	skippedEscape
)

func (p *parser) write(b []byte) {
	if len(p.rest) > 0 {
		b = append(p.rest, b...)
		p.rest = nil
	}
	for i := 0; i < len(b); {
		c := b[i]
		if p.state != ground {
			p.step(c)
			i++
			continue
		}
		switch {
		case c == 0x1b:
			p.begin(escaped)
		case c < 0x20:
			if c == '\n' && p.bare {
				p.to.control('\r')
			}
			p.to.control(c)
		case c < 0x7f:
			p.to.print(rune(c))
		case c == 0x7f:
		default:
			if !utf8.FullRune(b[i:]) {
				p.rest = append([]byte(nil), b[i:]...)
				return
			}
			r, n := utf8.DecodeRune(b[i:])
			i += n
			switch {
			case r == 0x9b:
				p.begin(sequenced)
			case r == 0x90 || r == 0x98 || r == 0x9d || r == 0x9e || r == 0x9f:
				p.begin(skipped)
			case r >= 0x80 && r < 0xa0:
			default:
				p.to.print(r)
			}
			continue
		}
		i++
	}
}

func (p *parser) begin(s state) {
	p.state, p.private, p.between, p.many, p.c2, p.params, p.raw = s, 0, 0, false, false, p.params[:0], p.raw[:0]
}

// step takes a byte within an escape sequence.
func (p *parser) step(c byte) {
	switch {
	case p.state == skipped:
		switch {
		case c == 0x07, c == '\n', c == 0x18, c == 0x1a, p.c2 && c == 0x9c: // U+009C: ST
			p.state = ground
		case c == 0x1b:
			p.state = skippedEscape
		}
		p.c2 = c == 0xc2
		return
	case p.state == skippedEscape:
		p.state = escaped
		if c == '\\' {
			p.state = ground
			return
		}
		p.begin(escaped) // it ends the string, and begins another sequence
	case c == 0x18 || c == 0x1a: // CAN, SUB
		p.state = ground
		return
	case c == 0x1b:
		p.begin(escaped)
		return
	}
	switch {
	case c < 0x20:
		p.to.control(c)
	case p.state == escaped:
		p.stepEscape(c)
	default:
		p.stepSequence(c)
	}
}

func (p *parser) stepEscape(c byte) {
	switch {
	case c <= 0x2f:
		p.many = p.between != 0
		p.between = c
	case p.between != 0:
		if !p.many {
			p.to.escape(p.between, c)
		}
		p.state = ground
	case c == '[':
		p.begin(sequenced)
	case c == ']' || c == 'P' || c == '^' || c == '_' || c == 'X':
		p.begin(skipped)
	default:
		if c < 0x7f {
			p.to.escape(0, c)
		}
		p.state = ground
	}
}

func (p *parser) stepSequence(c byte) {
	if c >= '0' && c <= ';' && len(p.raw) <= maxRaw {
		p.raw = append(p.raw, c)
	}
	switch {
	case c >= '0' && c <= '9':
		if len(p.params) == 0 {
			p.params = append(p.params, 0)
		}
		last := &p.params[len(p.params)-1]
		*last = min(*last*10+int(c-'0'), 9999)
	case c == ';' || c == ':':
		if len(p.params) == 0 {
			p.params = append(p.params, 0)
		}
		if len(p.params) < maxParams {
			p.params = append(p.params, 0)
		}
	case c >= '<' && c <= '?':
		p.private = c
	case c <= 0x2f:
		p.many = p.between != 0
		p.between = c
	case c >= 0x40 && c <= 0x7e:
		p.state = ground
		if !p.many {
			p.to.sequence(p.private, p.params, p.between, c)
		}
	}
}
