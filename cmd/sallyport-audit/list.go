package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
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

func (t *tool) verifyCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "verify [ID | STORE]", Short: "Check chain, hashes, signatures and seal of a session, or of all logs", Args: cobra.MaximumNArgs(1),
		Long: `Check chain, hashes, signatures and seal of a session, of all logs in a directory or bucket, or of all in --store.

With --key, every signature must be by one of the keys in the file. Without, a log is checked against the key that it
names itself, and said to be unpinned: that shows damage, but not a forger with a key of his own.

A live log is one that has no last segment yet. That its newest segments were taken away can't be seen from it.`,
		RunE: func(c *cobra.Command, args []string) error {
			arg := ""
			if len(args) > 0 {
				arg = args[0]
			}
			return t.verify(c.Context(), arg, c.OutOrStdout())
		},
	}
	return c
}

func (t *tool) verify(ctx context.Context, arg string, out io.Writer) error {
	dir := ""
	if info, err := os.Stat(arg); strings.HasPrefix(arg, bucketScheme) || arg != "" && arg != "latest" && err == nil && info.IsDir() {
		dir, arg = arg, ""
	}
	src, err := t.open(dir)
	if err != nil {
		return err
	}
	defer src.Close()
	keys, err := t.keys()
	if err != nil {
		return err
	}
	check := func(log auditlog.Stored) (auditlog.Report, error) {
		r := auditlog.NewSessionReader(src, log, keys...)
		rep := r.Verify(ctx)
		if err := context.Cause(ctx); err != nil {
			return rep, err
		}
		return rep, t.printReport(out, rep)
	}
	if arg != "" {
		log, err := find(ctx, src, arg)
		if err != nil {
			return err
		}
		rep, err := check(log)
		if err == nil && rep.State == auditlog.Damaged {
			err = errDamaged
		}
		return err
	}
	states := make(map[auditlog.State]int)
	logs, unpinned := 0, false
	for log, err := range auditlog.Logs(ctx, src, "") {
		if err != nil {
			return err
		}
		rep, err := check(log)
		if err != nil {
			return err
		}
		logs++
		states[rep.State]++
		unpinned = unpinned || !rep.Pinned
	}
	lost, err := t.duplicates(ctx, src, out)
	if err != nil {
		return err
	}
	if t.output == "text" {
		note := ""
		if unpinned {
			note = "; keys not pinned: see --key"
		}
		fmt.Fprintf(out, "%d logs: %d sealed, %d interrupted, %d live, %d damaged%s\n", logs, states[auditlog.Sealed],
			states[auditlog.Interrupted], states[auditlog.Live], states[auditlog.Damaged], note)
	}
	switch {
	case states[auditlog.Damaged] > 0 || lost > 0:
		return errDamaged
	case logs == 0:
		return fmt.Errorf("there is no log in %s", orStore(dir, t.store))
	}
	return nil
}

// duplicates compares what a store has kept under other names, as it could not see by what the right one was taken. The same
// bytes mean that a gate put a segment twice. Others mean that one of the two is not the gate's; their number is returned.
func (t *tool) duplicates(ctx context.Context, src auditlog.Source, out io.Writer) (differ int, err error) {
	for o, err := range src.List(ctx, auditlog.DuplicatePrefix) {
		if err != nil {
			return differ, err
		}
		name, _, err := auditlog.ParseDuplicateName(o.Name)
		if err != nil {
			continue // a note: nothing of ours
		}
		kept, err := contentHash(ctx, src, o.Name)
		if err != nil {
			return differ, err
		}
		there, err := contentHash(ctx, src, name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return differ, err
		}
		if err == nil && there == kept {
			continue
		}
		differ++
		what := "two segments were put under this name: see " + o.Name
		if err != nil {
			what = "is gone; it was put twice: see " + o.Name
		}
		p := auditlog.Problem{Segment: name, What: what}
		if t.output == "json" {
			err = printJSON(out, p)
		} else {
			_, err = fmt.Fprintf(out, "%-11s %s\n", auditlog.Damaged, clean(p.String()))
		}
		if err != nil {
			return differ, err
		}
	}
	return differ, context.Cause(ctx)
}

func contentHash(ctx context.Context, src auditlog.Source, name string) (sum auditlog.Hash, err error) {
	r, err := src.Open(ctx, name)
	if err != nil {
		return sum, err
	}
	defer r.Close()
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(r, auditlog.MaxSegmentBytes+1)); err != nil {
		return sum, fmt.Errorf("read %s: %w", name, err)
	}
	h.Sum(sum[:0])
	return sum, nil
}

func orStore(names ...string) string {
	for _, n := range append(names, os.Getenv(storeEnv)) {
		if n != "" {
			return n
		}
	}
	return "the store"
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
