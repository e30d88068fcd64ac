package main

import (
	"fmt"
	"io"
	"strings"
)

// markdownReport writes CommonMark with tables. What comes from a log stands with every punctuation character escaped, or in a block
// of code that is indented: it can't be a link, an image, HTML, or an end of what it stands in.
type markdownReport struct {
	w   io.Writer
	err error
}

func (m *markdownReport) printf(format string, args ...any) {
	if m.err == nil {
		_, m.err = fmt.Fprintf(m.w, format, args...)
	}
}

// escape makes a line of text mean itself. It must be cleaned.
func (m *markdownReport) escape(s string) string {
	var b strings.Builder
	for _, r := range s {
		if r < 0x80 && strings.ContainsRune("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", r) {
			b.WriteByte('\\')
		}
		b.WriteRune(r)
	}
	return b.String()
}

func (m *markdownReport) cells(cells ...string) {
	for _, c := range cells {
		m.printf("| %s ", m.escape(c))
	}
	m.printf("|\n")
}

func (m *markdownReport) columns(names ...string) {
	m.printf("\n")
	m.cells(names...)
	m.printf("%s|\n", strings.Repeat("|---", len(names)))
}

// block is a block of code.
func (m *markdownReport) block(line string) {
	for l := range strings.SplitSeq(line, "\n") {
		m.printf("    %s\n", l)
	}
}

func (m *markdownReport) head(v reportHead) error {
	m.printf("# %s\n\n", m.escape(v.Title))
	m.printf("Made %s by %s from %s. Times are %s. %s\n", m.escape(v.Made), m.escape(v.By), m.escape(v.Store), v.Zone, m.escape(v.Key))
	if v.Period != "" {
		m.printf("\n%s", m.escape(v.Period))
		for _, p := range v.Chosen {
			m.printf("; %s: %s", p.Name, m.escape(p.Value))
		}
		m.printf("\n")
	}
	return m.err
}

func (m *markdownReport) tableHead() error {
	m.columns("ID", "user", "ticket", "source", "start", "duration", "commands", "alerts", "log", "ended by")
	return m.err
}

func (m *markdownReport) row(v reportRow) error {
	m.cells(v.ID, v.User, v.Ticket, v.Source, v.Start, v.Duration, v.Commands, v.Alerts, v.State, v.Cause)
	return m.err
}

func (m *markdownReport) sum(v reportSum) error {
	m.printf("\n%d sessions of %d users, %d alerts", v.Sessions, v.Users, v.Alerts)
	for _, p := range v.States {
		m.printf("; %s logs %s", p.Value, p.Name)
	}
	m.printf(".\n")
	if v.Unread > 0 {
		m.printf("\n%d logs are encrypted, and were not read in full: what they hold is not in this report.\n", v.Unread)
	}
	return m.err
}

func (m *markdownReport) session(v reportSession) error {
	m.printf("\n## Session %s: %s\n\n%s\n", m.escape(v.ID), v.State, v.StateNote)
	for _, p := range v.Problems {
		m.printf("\n- %s\n", m.escape(p))
	}
	m.columns("", "")
	for _, p := range v.Facts {
		m.cells(p.Name, p.Value)
	}
	m.printf("\n### What happened\n\ngate: seen by the gate. inside: reported from inside the sandbox. ?: not known.\n\n")
	for _, l := range v.Moments {
		m.block(fmt.Sprintf("%s %-6s %3s  %s", l.Time, l.Who, l.Channel, strings.ReplaceAll(l.Text, "\n", "\n"+strings.Repeat(" ", 25))))
	}
	if v.Cut > 0 {
		m.printf("\nAnd %d records more.\n", v.Cut)
	}
	if len(v.Files) > 0 {
		m.printf("\n### Files\n")
		m.columns("time", "what", "path", "bytes", "result", "SHA-256")
		for _, f := range v.Files {
			m.cells(f.Time, f.What, f.Path, f.Bytes, f.Result, f.SHA256)
		}
	}
	if len(v.Lines) > 0 {
		m.printf("\n### What could be read\n\n")
		for _, l := range v.Lines {
			m.block(fmt.Sprintf("%s %-8s %s", l.Time, l.Where, l.Text))
		}
	}
	if v.LinesCut {
		m.printf("\nThere is more than this report has room for: see export --format text.\n")
	}
	m.printf("\nTo prove it: %s\n", m.escape(v.Verify))
	return m.err
}

func (m *markdownReport) end() error { return m.err }
