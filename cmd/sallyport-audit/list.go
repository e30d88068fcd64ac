package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
)

// Bounds of what a summary keeps of a session.
const (
	maxListed     = 100
	maxListedText = 4 << 10 // characters of a command
)

// summary is a session in a list.
type summary struct {
	ID       string           `json:"id"`
	User     string           `json:"user,omitempty"`
	Groups   []string         `json:"groups,omitempty"`
	Ticket   string           `json:"ticket,omitempty"`  // the last that let the session go on
	Tickets  []string         `json:"tickets,omitempty"` // all, where there were several
	Profile  string           `json:"profile,omitempty"`
	Source   string           `json:"source,omitempty"`
	Gate     string           `json:"gate,omitempty"`
	Image    string           `json:"image,omitempty"`
	Digest   string           `json:"digest,omitempty"`
	Start    time.Time        `json:"start"`
	End      time.Time        `json:"end"` // time of the last record
	Seconds  float64          `json:"seconds"`
	Commands []string         `json:"commands"` // what was asked to run: "shell", commands, subsystems
	Programs uint64           `json:"programs"` // executions that were reported from inside
	Files    uint64           `json:"files"`    // operations on files that the gate saw
	Forwards uint64           `json:"forwards"`
	Alerts   uint64           `json:"alerts"`
	Refused  uint64           `json:"refused,omitempty"` // connections, of a gate's own log
	Input    uint64           `json:"input_bytes"`
	Output   uint64           `json:"output_bytes"`
	Cause    string           `json:"cause,omitempty"`
	Imported string           `json:"imported_from,omitempty"` // the format that the log was made from
	State    auditlog.State   `json:"state"`
	Indexed  bool             `json:"from_index,omitempty"`     // the log was not read
	Unread   uint64           `json:"unread_records,omitempty"` // for want of an identity
	Report   *auditlog.Report `json:"report,omitempty"`         // of one that is damaged or unreadable

	hasCommand, hasFile bool // as a selection wants it
}

func (t *tool) listCommand() *cobra.Command {
	var s selection
	noIndex := false
	c := &cobra.Command{
		Use: "list [STORE]", Short: "List the sessions", Args: cobra.MaximumNArgs(1),
		Long: `List the sessions, in the order of the days on which they began. Flags restrict the list; several values of one flag are
alternatives. The state is that of the log: sealed (whole), interrupted (the gate was killed; whole as far as it came), live, damaged, unreadable
(there, and not to be read).

Of those that are marked "(index)" the log was not read: what is told of them, their state too, is what the gate wrote into its index,
signed. It has a session's last ticket alone. See --no-index, and verify. The exit code is 0 whatever the states are, see
verify, but for what can't be read: 1.`,
		Example: `  sallyport-audit list /var/lib/sallyport/log
  sallyport-audit list --user alice --since yesterday
  sallyport-audit list --since 2026-03-01 --until 2026-03-31 --ticket 'OPS-*' -o json
  sallyport-audit list --source 192.0.2.0/24 --has-command curl --alerts
  sallyport-audit list --cause expired,revoked --state damaged,interrupted
  sallyport-audit list --gate-logs --since 1w`,
		RunE: func(c *cobra.Command, args []string) error {
			if err := s.prepare(time.Now(), t.zone()); err != nil {
				return err
			}
			return t.paged(c, func(out io.Writer) error {
				return t.list(c.Context(), oneOrMany(args), noIndex, &s, out, c.ErrOrStderr())
			})
		},
	}
	s.flags(c.Flags())
	s.gateFlag(c.Flags())
	c.Flags().BoolVar(&noIndex, "no-index", false, "read every session's log")
	return c
}

func (t *tool) list(ctx context.Context, dir string, noIndex bool, s *selection, out, stderr io.Writer) error {
	l, err := t.openLogs(dir)
	if err != nil {
		return err
	}
	defer l.Close()
	if !noIndex && !s.gateLogs { // which has sessions alone
		if l.index, err = t.index(ctx, l.source, l.keys, s.after); err != nil {
			return err
		}
	}
	var w *table
	if t.output == "text" {
		w = newTable(out, styleOf(out), 9, "ID", "USER", "TICKET", "SOURCE", "START", "DURATION", "COMMANDS", "BYTES", "ALERTS", "STATE", "CAUSE")
	}
	p := newProgress(out, stderr)
	defer p.clear()
	read := 0
	err = l.summarizeAll(ctx, counted(s.logs(ctx, l.source), &read, p), s, func(_ auditlog.Stored, m *summary) error {
		p.clear()
		if w == nil {
			return printJSON(out, m)
		}
		state := string(m.State)
		if m.Indexed {
			state += fromIndex
		}
		commands := fmt.Sprint(len(m.Commands))
		if len(m.Commands) == 1 {
			commands = short(clean(m.Commands[0]), 40)
		}
		if m.Refused > 0 {
			commands = fmt.Sprintf("%d refused", m.Refused)
		}
		w.row(m.ID, dash(clean(m.User)), dash(clean(m.Ticket)), dash(clean(m.Source)), t.time(m.Start),
			m.End.Sub(m.Start).Round(time.Second/10).String(), commands, size(m.Input+m.Output), number(m.Alerts), state, dash(clean(m.Cause)))
		return w.err
	})
	if w != nil && err == nil {
		err = w.flush()
	}
	if err == nil && read == 0 {
		s.tellEmpty(stderr, orStore(dir, t.store))
	}
	return err
}

// tellEmpty says that a store has no session at all, or none of the days that are asked for: a prefix that is mistyped looks the same.
func (s *selection) tellEmpty(stderr io.Writer, store string) {
	when := ""
	if !s.after.IsZero() || !s.before.IsZero() {
		when = " of these days"
	}
	what := "session"
	if s.gateLogs {
		what = "log of a gate's own"
	}
	fmt.Fprintf(stderr, "sallyport-audit: there is no %s%s in %s\n", what, when, clean(store))
}

// counted tells on the way how many logs were begun.
func counted(all iter.Seq2[auditlog.Stored, error], n *int, p *progress) iter.Seq2[auditlog.Stored, error] {
	return func(yield func(auditlog.Stored, error) bool) {
		for log, err := range all {
			*n++
			p.set("reading session %d, of %s ...", *n, log.Name.Day)
			if !yield(log, err) {
				return
			}
		}
	}
}

// summarize reads a session. s says what else to look for.
func summarize(ctx context.Context, r *auditlog.SessionReader, s *selection) *summary {
	m := &summary{Commands: []string{}}
	for rec := range r.Records(ctx) {
		m.add(rec)
		s.watch(m, rec)
	}
	m.finish(r.Report())
	return m
}

// finish adds what is known at the end.
func (s *summary) finish(rep auditlog.Report) {
	s.ID, s.State, s.Gate, s.Unread = rep.ID, rep.State, rep.Gate, rep.Unread
	if !rep.Start.IsZero() {
		s.Start = rep.Start
	}
	if s.End.Before(s.Start) {
		s.End = s.Start
	}
	s.Seconds = s.End.Sub(s.Start).Seconds()
	if verdict(rep.State) != nil {
		s.Report = &rep
	}
	if len(s.Tickets) == 1 && s.Tickets[0] == s.Ticket {
		s.Tickets = nil
	}
}

func (s *summary) add(rec auditlog.Record) {
	if s.Start.IsZero() {
		s.Start = rec.Time
	}
	s.End = rec.Time
	switch b := rec.Body.(type) {
	case *auditlog.Connect:
		s.Source = bounded(b.Source)
	case *auditlog.Authenticate:
		if b.Result == "proven" {
			s.User = bounded(b.User)
		}
	case *auditlog.Decision:
		s.addDecision(b)
	case *auditlog.Sandbox:
		s.Image, s.Digest = bounded(b.Image), bounded(b.Digest)
	case *auditlog.Request:
		if c := commandOf(b); c != "" && b.OK && len(s.Commands) < maxListed {
			s.Commands = append(s.Commands, bounded(c))
		}
	case *auditlog.Data:
		if b.Stream == auditlog.Input {
			s.Input += uint64(len(b.Data))
		} else {
			s.Output += uint64(len(b.Data))
		}
	case *auditlog.ProgramExec:
		s.Programs += max(1, uint64(b.Again))
	case *auditlog.Transfer:
		s.Files++
	case *auditlog.Forward:
		s.Forwards++
	case *auditlog.Alert, *auditlog.Unaudited:
		s.Alerts++
	case *auditlog.Refused:
		s.Refused += b.Count
	case *auditlog.Import:
		s.Imported = bounded(b.Format)
	case *auditlog.End:
		s.Cause = bounded(b.Cause)
	}
}

func (s *summary) addDecision(b *auditlog.Decision) {
	s.User = cmp.Or(bounded(b.User), s.User)
	s.Profile = cmp.Or(bounded(b.Profile), s.Profile)
	if len(b.Groups) > 0 {
		s.Groups = nil
		for _, g := range b.Groups[:min(len(b.Groups), maxListed)] {
			s.Groups = append(s.Groups, bounded(g))
		}
	}
	if b.Ticket == "" {
		return
	}
	s.Ticket = bounded(b.Ticket)
	if len(s.Tickets) < maxListed && !slices.Contains(s.Tickets, s.Ticket) {
		s.Tickets = append(s.Tickets, s.Ticket)
	}
}

// commandOf is what a request asks to run, "" if it asks for something else.
func commandOf(b *auditlog.Request) string {
	switch b.Type {
	case "shell":
		return "shell"
	case "exec":
		return string(b.Command)
	case "subsystem":
		return "subsystem " + b.Name
	}
	return ""
}

func (t *tool) time(v time.Time) string {
	if v.IsZero() {
		return "-"
	}
	if t.utc {
		return v.UTC().Format("2006-01-02 15:04:05Z")
	}
	return v.Local().Format("2006-01-02 15:04:05")
}

// stamp is a time with what it is ahead of UTC: what is read elsewhere, and later, is to be understood there.
func (t *tool) stamp(v time.Time) string {
	if v.IsZero() || t.utc {
		return t.time(v)
	}
	return v.Local().Format("2006-01-02 15:04:05 -07:00")
}

// number is a count, or a dash for none.
func number(n uint64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// short is s, or its first n-1 characters with a mark that there were more.
func short(s string, n int) string {
	count, cut := 0, 0
	for i := range s {
		if count == n-1 {
			cut = i
		}
		if count++; count > n {
			return strings.Clone(s[:cut]) + "…"
		}
	}
	return s
}

// bounded cuts a text that a summary keeps.
func bounded(s string) string { return short(s, maxListedText) }

func size(n uint64) string {
	switch {
	case n < 10<<10:
		return fmt.Sprintf("%d B", n)
	case n < 10<<20:
		return fmt.Sprintf("%d KiB", n>>10)
	case n < 10<<30:
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d GiB", n>>30)
}

func (t *tool) printReport(out io.Writer, rep auditlog.Report) error {
	if t.output == "json" {
		return printJSON(out, rep)
	}
	id := rep.ID
	if id == "" {
		id = "(no log)"
	}
	key := "unpinned"
	if rep.Pinned {
		key = "pinned"
	}
	for _, k := range rep.Keys {
		key += " " + k
	}
	if len(rep.Recipients) > 0 {
		key += ", encrypted to " + clean(strings.Join(rep.Recipients, ", "))
	}
	_, err := fmt.Fprintf(out, "%-11s %s  %d segments, %d records, %s, key %s\n", rep.State, id, rep.Segments, rep.Records,
		size(uint64(rep.Bytes)), key)
	for _, p := range rep.Problems {
		fmt.Fprintf(out, "            %s\n", clean(p.String()))
	}
	if rep.More > 0 {
		fmt.Fprintf(out, "            and %d problems more\n", rep.More)
	}
	return err
}

// orStore names the store, for a person.
func orStore(names ...string) string {
	for _, n := range append(names, os.Getenv(storeEnv)) {
		if n != "" {
			return n
		}
	}
	return "the store"
}
