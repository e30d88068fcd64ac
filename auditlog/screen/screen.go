// Package screen turns what a program wrote to a terminal into text as a person would have read it, and into bytes that can
// be shown on another terminal without harm. All input is hostile: state is bounded, and no byte of it makes a panic.
package screen

import (
	"strings"
	"time"
	"unicode"

	"golang.org/x/text/width"
)

// Bounds. A terminal's size is what a client says it is.
const (
	maxColumns  = 500
	maxRows     = 200
	maxLine     = 8 << 10 // characters of a line that was wrapped
	tabStop     = 8
	defaultCols = 80
	defaultRows = 24
)

// Screen is a terminal's screen, without its colours. It gives each line of text when it goes: scrolled off, cleared or
// written over after a person could have read it; and what is left at the end. Programs that only print give their lines
// in order, once each; those that paint give each state of a line that stood for a while.
type Screen struct {
	Now  time.Time // of what is being written: a line has the time of its last change
	emit func(line string, at time.Time)

	columns, rows int
	grid          []row // the screen that is shown
	other         []row // the alternate one, or the main one while that is shown
	alternate     bool
	x, y          int
	top, bottom   int  // of the region that scrolls; bottom is its last row
	wrapNext      bool // the last column was written: the next character begins a new line
	saved         [2]position
	graphics      [2]bool // G0 and G1 are DEC's line drawing
	shift         int     // which of them is in use
	last          rune    // for REP
	pending       []rune  // the scrolled-off part of a line that goes on
	pendingAt     time.Time

	parser parser
}

type position struct{ x, y int }

type row struct {
	cells   []cell
	wrapped bool // the next row goes on with the same line
	seen    bool // a person could have read it as it is
	fresh   bool // it has been written to since it was given
	at      time.Time
}

type cell struct {
	r    rune // 0: blank; -1: the right half of a wide character
	mark rune // a combining character
}

// New makes a screen of a size (0: the usual one). emit gets the lines; they hold no control characters, but may hold any
// other, invisible ones too.
func New(columns, rows int, emit func(line string, at time.Time)) *Screen {
	s := &Screen{emit: emit}
	s.parser.to = s
	s.resize(columns, rows)
	return s
}

// NewPlain makes a screen for what was written where there was no terminal: lines are as long as they are, and each begins on the
// left.
func NewPlain(emit func(line string, at time.Time)) *Screen {
	s := New(maxColumns, defaultRows, emit)
	s.parser.bare = true
	return s
}

// Write takes what a program wrote. It never fails.
func (s *Screen) Write(p []byte) (int, error) {
	s.parser.write(p)
	return len(p), nil
}

// Settle says that time has passed: a person could have read what is there.
func (s *Screen) Settle() {
	for i := range s.grid {
		s.grid[i].seen = s.grid[i].fresh
	}
}

// Resize says that the terminal has another size now.
func (s *Screen) Resize(columns, rows int) {
	if c, r := bounded(columns, rows); c != s.columns || r != s.rows {
		s.Flush()
		s.resize(columns, rows)
	}
}

func bounded(columns, rows int) (int, int) {
	if columns <= 0 || rows <= 0 {
		columns, rows = defaultCols, defaultRows
	}
	return min(max(columns, 2), maxColumns), min(rows, maxRows)
}

func (s *Screen) resize(columns, rows int) {
	x, y := s.x, s.y
	s.columns, s.rows = bounded(columns, rows)
	s.grid, s.other, s.alternate = make([]row, s.rows), nil, false
	s.x, s.y, s.wrapNext = min(x, s.columns-1), min(y, s.rows-1), false
	s.top, s.bottom = 0, s.rows-1
}

// Flush gives all that is on the screen, and leaves it blank.
func (s *Screen) Flush() {
	s.giveAll()
	s.endPending()
	if s.alternate {
		s.grid, s.other = s.other, s.grid
		s.giveAll()
		s.endPending()
		s.grid, s.other = s.other, s.grid
		clear(s.other)
	}
	clear(s.grid)
	s.wrapNext = false
}

// Lines are the lines that are on the screen, without blanks and blank lines at their ends.
func (s *Screen) Lines() []string {
	var all []string
	for i := range s.grid {
		all = append(all, strings.TrimRight(string(s.grid[i].text(nil)), " "))
	}
	for len(all) > 0 && all[len(all)-1] == "" {
		all = all[:len(all)-1]
	}
	return all
}

func (r *row) text(b []rune) []rune {
	for _, c := range r.cells {
		switch c.r {
		case -1:
			continue
		case 0:
			b = append(b, ' ')
		default:
			b = append(b, c.r)
		}
		if c.mark != 0 {
			b = append(b, c.mark)
		}
	}
	return b
}

func (s *Screen) line(b []rune, at time.Time) {
	if text := strings.TrimRight(string(b), " "); text != "" {
		s.emit(text, at)
	}
}

func (s *Screen) endPending() {
	if len(s.pending) > 0 {
		s.line(s.pending, s.pendingAt)
	}
	s.pending = s.pending[:0]
}

// give gives the line that a row is part of, if it is new, before it changes.
func (s *Screen) give(y int) {
	if y < 0 || y >= len(s.grid) || !s.grid[y].fresh {
		return
	}
	first, last := y, y
	for first > 0 && s.grid[first-1].wrapped {
		first--
	}
	for last < len(s.grid)-1 && s.grid[last].wrapped {
		last++
	}
	var b []rune
	var at time.Time
	if first == 0 {
		b = append(b, s.pending...)
	}
	for i := first; i <= last; i++ {
		b = s.grid[i].text(b)
		if s.grid[i].at.After(at) {
			at = s.grid[i].at
		}
		s.grid[i].fresh, s.grid[i].seen = false, false
	}
	s.line(b, at)
}

func (s *Screen) giveAll() {
	for y := range s.grid {
		s.give(y)
	}
	s.pending = s.pending[:0]
}

// scrollOff takes a row over the top of the screen: it is read, and gone.
func (s *Screen) scrollOff(r *row) {
	if !r.fresh && len(s.pending) == 0 {
		return
	}
	s.pending, s.pendingAt = r.text(s.pending), r.at
	if !r.wrapped || len(s.pending) >= maxLine {
		s.endPending()
	}
}

// touch is called before a row is changed. over says that something that stood there is lost by it.
func (s *Screen) touch(y int, over bool) *row {
	r := &s.grid[y]
	if over && r.seen {
		s.give(y)
	}
	r.fresh, r.at = true, s.Now
	return r
}

// print puts a character where the cursor is.
func (s *Screen) print(c rune) {
	if c < 0x80 && s.graphics[s.shift] && c >= 0x5f && c <= 0x7e {
		c = lineDrawing[c-0x5f]
	}
	wide := 1
	switch {
	case c < 0x300:
	case unicode.In(c, unicode.Mn, unicode.Me, unicode.Cf):
		s.combine(c)
		return
	default:
		if k := width.LookupRune(c).Kind(); k == width.EastAsianWide || k == width.EastAsianFullwidth {
			wide = 2
		}
	}
	if s.wrapNext || s.x+wide > s.columns {
		s.grid[s.y].wrapped = true
		s.x = 0
		s.down()
	}
	s.wrapNext = false
	r := s.row(s.y, s.x+wide)
	over := false
	for i := range wide {
		old := r.cells[s.x+i].r
		over = over || old != 0 && old != ' ' && old != c
	}
	r = s.touch(s.y, over)
	r.cells[s.x] = cell{r: c}
	if wide == 2 {
		r.cells[s.x+1] = cell{r: -1}
	}
	s.last = c
	if s.x += wide; s.x >= s.columns {
		s.x, s.wrapNext = s.columns-1, true
	}
}

// combine adds a combining character to the one before it. One is kept; so are those that are invisible.
func (s *Screen) combine(c rune) {
	x := s.x - 1
	if s.wrapNext {
		x = s.x
	}
	r := &s.grid[s.y]
	if x > 0 && x < len(r.cells) && r.cells[x].r == -1 {
		x--
	}
	if x >= 0 && x < len(r.cells) && r.cells[x].r > 0 && r.cells[x].mark == 0 {
		r.cells[x].mark = c
	}
}

// row gives a row with room for n cells.
func (s *Screen) row(y, n int) *row {
	r := &s.grid[y]
	for len(r.cells) < n {
		r.cells = append(r.cells, cell{}) // a reused array has old cells only below its length
	}
	return r
}

// down goes to the next row; at the end of the region it scrolls.
func (s *Screen) down() {
	switch {
	case s.y == s.bottom:
		s.scroll(s.top, s.bottom, 1)
	case s.y < s.rows-1:
		s.y++
	}
}

// scroll moves the rows from top to bottom up by n, down if n is negative.
func (s *Screen) scroll(top, bottom, n int) {
	rows := s.grid[top : bottom+1]
	if n >= 0 {
		n = min(n, len(rows))
		for i := range n {
			if top == 0 {
				s.scrollOff(&rows[i])
			} else {
				s.give(top + i)
			}
		}
		var kept []cell // spares an allocation a line
		if n == 1 {
			kept = rows[0].cells[:0]
		}
		copy(rows, rows[n:])
		clear(rows[len(rows)-n:])
		rows[len(rows)-1].cells = kept
		return
	}
	n = min(-n, len(rows))
	for i := len(rows) - n; i < len(rows); i++ {
		s.give(top + i)
	}
	copy(rows[n:], rows)
	clear(rows[:n])
}

// erase blanks cells of a row.
func (s *Screen) erase(y, from, to int) {
	r := &s.grid[y]
	to = min(to, len(r.cells))
	if from >= to {
		return
	}
	over := false
	for _, c := range r.cells[from:to] {
		over = over || c.r != 0 && c.r != ' '
	}
	if !over {
		return
	}
	r = s.touch(y, true)
	clear(r.cells[from:to])
}

func (s *Screen) eraseRows(from, to int) {
	for y := from; y < to; y++ {
		if s.grid[y].seen || s.grid[y].fresh {
			s.give(y)
		}
		s.grid[y].cells, s.grid[y].wrapped, s.grid[y].fresh, s.grid[y].seen = nil, false, false, false
	}
}

func (s *Screen) control(c byte) {
	switch c {
	case '\b':
		s.x, s.wrapNext = max(0, s.x-1), false
	case '\t':
		s.x, s.wrapNext = min(s.columns-1, (s.x/tabStop+1)*tabStop), false
	case '\n', '\v', '\f':
		s.grid[s.y].wrapped = false
		s.wrapNext = false
		s.down()
	case '\r':
		s.x, s.wrapNext = 0, false
	case 0x0e:
		s.shift = 1
	case 0x0f:
		s.shift = 0
	}
}

func (s *Screen) moveTo(x, y int) {
	s.x, s.y, s.wrapNext = min(max(0, x), s.columns-1), min(max(0, y), s.rows-1), false
}

// escape is an escape sequence that is no control sequence.
func (s *Screen) escape(between, final byte) {
	switch {
	case between == '(' || between == ')':
		s.graphics[between-'('] = final == '0'
	case between != 0:
	case final == '7':
		s.save()
	case final == '8':
		s.restore()
	case final == 'D':
		s.down()
	case final == 'E':
		s.x = 0
		s.down()
	case final == 'M':
		if s.y == s.top {
			s.scroll(s.top, s.bottom, -1)
		} else {
			s.moveTo(s.x, s.y-1)
		}
	case final == 'c':
		s.Flush()
		s.x, s.y = 0, 0
		s.resize(s.columns, s.rows)
		s.graphics, s.shift = [2]bool{}, 0
	}
}

// place is where the cursor of the screen that is shown was saved.
func (s *Screen) place() *position {
	if s.alternate {
		return &s.saved[1]
	}
	return &s.saved[0]
}

func (s *Screen) save()    { *s.place() = position{s.x, s.y} }
func (s *Screen) restore() { s.moveTo(s.place().x, s.place().y) }

// sequence is a control sequence (ECMA-48, section 5.4).
func (s *Screen) sequence(private byte, params []int, between, final byte) {
	arg := func(i, otherwise int) int {
		if i < len(params) && params[i] > 0 {
			return params[i]
		}
		return otherwise
	}
	if between != 0 {
		return
	}
	if private == '?' {
		if final == 'h' || final == 'l' {
			for _, p := range params {
				s.mode(p, final == 'h')
			}
		}
		return
	}
	if private != 0 {
		return
	}
	switch final {
	case 'A':
		s.moveTo(s.x, s.y-arg(0, 1))
	case 'B', 'e':
		s.moveTo(s.x, s.y+arg(0, 1))
	case 'C', 'a':
		s.moveTo(s.x+arg(0, 1), s.y)
	case 'D':
		s.moveTo(s.x-arg(0, 1), s.y)
	case 'E':
		s.moveTo(0, s.y+arg(0, 1))
	case 'F':
		s.moveTo(0, s.y-arg(0, 1))
	case 'G', '`':
		s.moveTo(arg(0, 1)-1, s.y)
	case 'd':
		s.moveTo(s.x, arg(0, 1)-1)
	case 'H', 'f':
		s.moveTo(arg(1, 1)-1, arg(0, 1)-1)
	case 'J':
		s.eraseDisplay(arg(0, 0))
	case 'K':
		switch arg(0, 0) {
		case 0:
			s.erase(s.y, s.x, s.columns)
		case 1:
			s.erase(s.y, 0, s.x+1)
		case 2:
			s.erase(s.y, 0, s.columns)
		}
	case 'X':
		s.erase(s.y, s.x, s.x+min(arg(0, 1), s.columns))
	case '@', 'P':
		s.shiftCells(final, min(arg(0, 1), s.columns))
	case 'L':
		if s.y >= s.top && s.y <= s.bottom {
			s.scroll(s.y, s.bottom, -arg(0, 1))
		}
	case 'M':
		if s.y >= s.top && s.y <= s.bottom {
			s.scroll(s.y, s.bottom, arg(0, 1))
		}
	case 'S':
		s.scroll(s.top, s.bottom, arg(0, 1))
	case 'T':
		s.scroll(s.top, s.bottom, -arg(0, 1))
	case 'b':
		for range min(arg(0, 1), s.columns) {
			if s.last != 0 {
				s.print(s.last)
			}
		}
	case 'r':
		top, bottom := arg(0, 1)-1, min(arg(1, s.rows), s.rows)-1
		if top < bottom {
			s.top, s.bottom = top, bottom
			s.moveTo(0, 0)
		}
	case 's':
		s.save()
	case 'u':
		s.restore()
	}
}

func (s *Screen) eraseDisplay(which int) {
	switch which {
	case 0:
		s.erase(s.y, s.x, s.columns)
		s.eraseRows(s.y+1, s.rows)
	case 1:
		s.eraseRows(0, s.y)
		s.erase(s.y, 0, s.x+1)
	case 2, 3:
		s.eraseRows(0, s.rows)
		s.endPending()
	}
}

// shiftCells inserts (@) or deletes (P) n cells at the cursor.
func (s *Screen) shiftCells(final byte, n int) {
	r := s.touch(s.y, true)
	if s.x >= len(r.cells) {
		return
	}
	rest := append([]cell(nil), r.cells[s.x:]...)
	switch {
	case final == '@':
		r.cells = append(append(r.cells[:s.x], make([]cell, n)...), rest...)
	case n < len(rest):
		r.cells = append(r.cells[:s.x], rest[n:]...)
	default:
		r.cells = r.cells[:s.x]
	}
	r.cells = r.cells[:min(len(r.cells), s.columns)]
}

// mode sets or resets one of DEC's private modes.
func (s *Screen) mode(number int, on bool) {
	switch number {
	case 47, 1047, 1049:
		if on == s.alternate {
			return
		}
		if on {
			if number == 1049 {
				s.save()
			}
			s.grid, s.other = make([]row, s.rows), s.grid
			s.alternate = true
			return
		}
		pending := s.pending // is of the main screen
		s.pending = nil
		s.giveAll()
		s.pending = pending
		s.grid, s.other, s.alternate = s.other, nil, false
		if number == 1049 {
			s.restore()
		}
	case 1048:
		if on {
			s.save()
		} else {
			s.restore()
		}
	}
}

// lineDrawing is DEC's special graphics, from 0x5f on.
var lineDrawing = []rune(" ◆▒␉␌␍␊°±␤␋┘┐┌└┼⎺⎻─⎼⎽├┤┴┬│≤≥π≠£·")
