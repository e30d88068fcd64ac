package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
)

// maxListed bounds what a summary keeps of a session.
const maxListed = 100

// summary is a session in a list.
type summary struct {
	ID       string           `json:"id"`
	User     string           `json:"user,omitempty"`
	Ticket   string           `json:"ticket,omitempty"`
	Source   string           `json:"source,omitempty"`
	Start    time.Time        `json:"start"`
	End      time.Time        `json:"end"` // time of the last record
	Seconds  float64          `json:"seconds"`
	Commands []string         `json:"commands"` // what was asked to run: "shell", commands, subsystems
	Input    uint64           `json:"input_bytes"`
	Output   uint64           `json:"output_bytes"`
	Cause    string           `json:"cause,omitempty"`
	State    auditlog.State   `json:"state"`
	Indexed  bool             `json:"from_index,omitempty"` // the log was not read
	Report   *auditlog.Report `json:"report,omitempty"`     // of a damaged one
}

func (t *tool) listCommand() *cobra.Command {
	var noIndex bool
	c := &cobra.Command{
		Use: "list [STORE]", Short: "List the sessions", Args: cobra.MaximumNArgs(1),
		Long: `List the sessions. Of those that are marked "(index)" the log was not read: what is told of them is what the gate wrote into its
index, signed. See --no-index, and verify.`,
		RunE: func(c *cobra.Command, args []string) error {
			dir := ""
			if len(args) > 0 {
				dir = args[0]
			}
			return t.list(c.Context(), dir, noIndex, c.OutOrStdout())
		},
	}
	c.Flags().BoolVar(&noIndex, "no-index", false, "read every session's log")
	return c
}

func (t *tool) list(ctx context.Context, dir string, noIndex bool, out io.Writer) error {
	src, err := t.open(dir)
	if err != nil {
		return err
	}
	defer src.Close()
	keys, err := t.keys()
	if err != nil {
		return err
	}
	x, err := t.index(ctx, src, keys, time.Time{})
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	if t.output == "text" {
		fmt.Fprintln(w, "ID\tUSER\tTICKET\tSOURCE\tSTART\tDURATION\tCOMMANDS\tBYTES\tSTATE")
	}
	for log, err := range auditlog.Logs(ctx, src, auditlog.SessionPrefix) {
		if err != nil {
			return err
		}
		if len(log.Segments) == 0 {
			continue // verify says so
		}
		var s summary
		if e, ok := x.Entry(log); ok && !noIndex {
			s = indexedSummary(e)
			if e.Clear {
				t.countUnread(auditlog.Report{Unread: e.Records})
			}
		} else {
			r, err := t.reader(src, log, keys...)
			if err != nil {
				return err
			}
			s = summarize(ctx, r)
			t.countUnread(r.Report())
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if t.output == "json" {
			if err := printJSON(out, s); err != nil {
				return err
			}
			continue
		}
		state := string(s.State)
		if s.Indexed {
			state += fromIndex
		}
		commands := fmt.Sprint(len(s.Commands))
		if len(s.Commands) == 1 {
			commands = short(clean(s.Commands[0]), 40)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.ID, dash(clean(s.User)), dash(clean(s.Ticket)), dash(clean(s.Source)),
			t.time(s.Start), s.End.Sub(s.Start).Round(time.Second/10), commands, size(s.Input+s.Output), state)
	}
	return w.Flush()
}

// summarize reads a session.
func summarize(ctx context.Context, r *auditlog.SessionReader) summary {
	s := summary{Commands: []string{}}
	for rec := range r.Records(ctx) {
		s.add(rec)
	}
	rep := r.Report()
	s.ID, s.State = rep.ID, rep.State
	if !rep.Start.IsZero() {
		s.Start = rep.Start
	}
	if s.End.Before(s.Start) {
		s.End = s.Start
	}
	s.Seconds = s.End.Sub(s.Start).Seconds()
	if rep.State == auditlog.Damaged {
		s.Report = &rep
	}
	return s
}

func (s *summary) add(rec auditlog.Record) {
	if s.Start.IsZero() {
		s.Start = rec.Time
	}
	s.End = rec.Time
	switch b := rec.Body.(type) {
	case *auditlog.Connect:
		s.Source = b.Source
	case *auditlog.Authenticate:
		if b.Result == "proven" {
			s.User = b.User
		}
	case *auditlog.Decision:
		if b.User != "" {
			s.User = b.User
		}
		if b.Ticket != "" {
			s.Ticket = b.Ticket
		}
	case *auditlog.Request:
		if c := commandOf(b); c != "" && b.OK && len(s.Commands) < maxListed {
			s.Commands = append(s.Commands, c)
		}
	case *auditlog.Data:
		if b.Stream == auditlog.Input {
			s.Input += uint64(len(b.Data))
		} else {
			s.Output += uint64(len(b.Data))
		}
	case *auditlog.End:
		s.Cause = b.Cause
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

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func short(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

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
