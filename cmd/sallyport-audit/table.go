package main

import (
	"io"
	"strings"
	"unicode/utf8"
)

// tableHead is how many rows set the columns' widths. What comes later is printed as it comes: a list may be long.
const tableHead = 64

// table prints rows in columns. Cells are cleaned by who adds them.
type table struct {
	w      io.Writer
	style  style
	state  int // the column that is coloured by a log's state; -1: none
	widths []int
	rows   [][]string
	loose  bool // widths are set
	err    error
}

func newTable(w io.Writer, s style, state int, head ...string) *table {
	t := &table{w: w, style: s, state: state}
	t.row(head...)
	return t
}

func (t *table) row(cells ...string) {
	if !t.loose {
		t.rows = append(t.rows, cells)
		for i, c := range cells {
			if i == len(t.widths) {
				t.widths = append(t.widths, 0)
			}
			t.widths[i] = max(t.widths[i], utf8.RuneCountInString(c))
		}
		if len(t.rows) > tableHead {
			t.flush()
		}
		return
	}
	t.print(cells, false)
}

// flush prints what is held back.
func (t *table) flush() error {
	if !t.loose {
		for i, r := range t.rows {
			t.print(r, i == 0)
		}
		t.rows, t.loose = nil, true
	}
	return t.err
}

func (t *table) print(cells []string, head bool) {
	if t.err != nil {
		return
	}
	var b strings.Builder
	for i, c := range cells {
		text := c
		switch {
		case head:
			text = t.style.bold(c)
		case i == t.state:
			text = t.style.state(c)
		}
		b.WriteString(text)
		if i < len(cells)-1 {
			pad := 2
			if i < len(t.widths) {
				pad += max(0, t.widths[i]-utf8.RuneCountInString(c))
			}
			b.WriteString(strings.Repeat(" ", pad))
		}
	}
	b.WriteByte('\n')
	_, t.err = io.WriteString(t.w, b.String())
}
