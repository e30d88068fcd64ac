// Package asciicast writes recordings of terminals in asciinema's formats asciicast v2 and v3
// (https://docs.asciinema.org/manual/asciicast/v2 and v3).
package asciicast

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"time"
	"unicode/utf8"
)

// Header says what was recorded.
type Header struct {
	Columns, Rows int
	Start         time.Time
	Command       string
	Title         string
	Term          string // the terminal's type, as the client said
}

// The codes of events.
const (
	Output = "o"
	Input  = "i"
	Resize = "r"
	Marker = "m"
	exit   = "x" // v3 alone
)

// Writer writes one recording. Its times never go back: a player could not follow.
type Writer struct {
	w       io.Writer
	version int
	start   time.Time
	last    time.Duration
	rest    map[string][]byte // the start of a character whose end is to come, by code
}

// NewWriter writes the header.
func NewWriter(w io.Writer, version int, h Header) (*Writer, error) {
	a := &Writer{w: w, version: version, start: h.Start, rest: make(map[string][]byte)}
	var v any
	switch version {
	case 2:
		head := struct {
			Version   int               `json:"version"`
			Width     int               `json:"width"`
			Height    int               `json:"height"`
			Timestamp int64             `json:"timestamp,omitempty"`
			Command   string            `json:"command,omitempty"`
			Title     string            `json:"title,omitempty"`
			Env       map[string]string `json:"env,omitempty"`
		}{2, h.Columns, h.Rows, h.Start.Unix(), h.Command, h.Title, nil}
		if h.Term != "" {
			head.Env = map[string]string{"TERM": h.Term}
		}
		v = head
	case 3:
		type terminal struct {
			Columns int    `json:"cols"`
			Rows    int    `json:"rows"`
			Type    string `json:"type,omitempty"`
		}
		v = struct {
			Version   int      `json:"version"`
			Term      terminal `json:"term"`
			Timestamp int64    `json:"timestamp,omitempty"`
			Command   string   `json:"command,omitempty"`
			Title     string   `json:"title,omitempty"`
		}{3, terminal{h.Columns, h.Rows, h.Term}, h.Start.Unix(), h.Command, h.Title}
	default:
		return nil, fmt.Errorf("asciicast: version %d is none of 2, 3", version)
	}
	return a, a.line(v)
}

// Data writes bytes that passed. Characters may be split between calls; what is not UTF-8 becomes U+FFFD, as the format is JSON.
func (a *Writer) Data(code string, at time.Time, p []byte) error {
	p = append(a.rest[code], p...)
	a.rest[code] = nil
	whole := len(p)
	for back := 1; back < utf8.UTFMax && back <= len(p); back++ {
		if c := p[len(p)-back]; utf8.RuneStart(c) {
			if !utf8.FullRune(p[len(p)-back:]) {
				whole = len(p) - back
				a.rest[code] = bytes.Clone(p[whole:])
			}
			break
		}
	}
	if whole == 0 {
		return nil
	}
	return a.event(code, at, string(p[:whole]))
}

// Resize says that the terminal has another size from here on.
func (a *Writer) Resize(at time.Time, columns, rows int) error {
	return a.event(Resize, at, strconv.Itoa(columns)+"x"+strconv.Itoa(rows))
}

// Mark sets a mark, to which players can jump.
func (a *Writer) Mark(at time.Time, label string) error { return a.event(Marker, at, label) }

// Exit says how the recorded program ended. Version 2 has no event for that.
func (a *Writer) Exit(at time.Time, status string) error {
	if err := a.Close(); err != nil || a.version == 2 {
		return err
	}
	return a.event(exit, at, status)
}

// Close writes what is left of characters that have no end.
func (a *Writer) Close() error {
	for _, code := range []string{Output, Input} {
		if p := a.rest[code]; len(p) > 0 {
			a.rest[code] = nil
			if err := a.event(code, a.start.Add(a.last), string(p)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (a *Writer) event(code string, at time.Time, data string) error {
	now := max(at.Sub(a.start), a.last)
	t := now
	if a.version == 3 {
		t = now - a.last // an interval
	}
	a.last = now
	return a.line([]any{json.Number(strconv.FormatFloat(t.Seconds(), 'f', 6, 64)), code, data})
}

// line writes a line of JSON, in one call.
func (a *Writer) line(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = a.w.Write(append(b, '\n'))
	return err
}
