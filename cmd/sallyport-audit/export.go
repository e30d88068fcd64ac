package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/asciicast"
	"github.com/sallyport/sallyport/auditlog/ocsf"
	"github.com/sallyport/sallyport/auditlog/screen"
)

// exportFormats are the formats that export writes.
var exportFormats = []string{"asciicast-v3", "asciicast-v2", "text", "jsonl", "ocsf"}

type exportOptions struct {
	format  string
	channel int
	input   bool
	raw     bool
	to      string
	selection
}

func (t *tool) exportCommand() *cobra.Command {
	o := exportOptions{channel: -1}
	c := &cobra.Command{
		Use: "export [ID]", Short: "Write sessions in another format", Args: cobra.MaximumNArgs(1),
		Long: `Write a session, or all that the flags choose, in another format:

  asciicast-v3, asciicast-v2   one channel of one session as a recording for asciinema and its players. What would control more of a
                               player's terminal than its screen is left out, as in play; --raw leaves it in. Commands are marks.
  text                         what was printed, as a person would have read it, each line with its time
  jsonl                        every record, a line of JSON each, as cat has it, with the session's ID
  ocsf                         events of the Open Cybersecurity Schema Framework ` + ocsf.Version + `, a line of JSON each: SSH Activity, Authentication,
                               Process, File Hosting, File System, Network and Tunnel Activity

An export is a copy: it has no signature, and proves nothing by itself.`,
		Example: `  sallyport-audit export latest --format asciicast-v3 --out session.cast
  sallyport-audit export 01JD --format text
  sallyport-audit export --format ocsf --since yesterday > events.jsonl
  sallyport-audit export --format ocsf --since yesterday --gate-logs >> events.jsonl`,
		ValidArgsFunction: t.completeSessions,
		RunE: func(c *cobra.Command, args []string) error {
			if !slices.Contains(exportFormats, o.format) {
				return fmt.Errorf("--format %q: want one of %s", o.format, strings.Join(exportFormats, ", "))
			}
			if strings.HasPrefix(o.format, "asciicast") && len(args) == 0 {
				return errors.New("export: a recording is of one session: say its ID")
			}
			if err := cmp.Or(notBoth(c.Flags(), oneOrMany(args)), o.prepare(time.Now(), t.zone())); err != nil {
				return err
			}
			return intoFile(o.to, c.OutOrStdout(), func(out io.Writer) error { return t.export(c.Context(), oneOrMany(args), &o, out) })
		},
	}
	f := c.Flags()
	f.StringVarP(&o.format, "format", "f", "", "one of "+strings.Join(exportFormats, ", "))
	f.IntVar(&o.channel, "channel", -1, "of a recording: this channel, not the first with a terminal")
	f.BoolVar(&o.input, "input", false, "of a recording: with what was typed")
	f.BoolVar(&o.raw, "raw", false, "of a recording: with all escape sequences, as they were")
	f.StringVar(&o.to, "out", "", "write to this file, which must not be there yet (default: standard output)")
	o.flags(f)
	o.gateFlag(f)
	_ = c.MarkFlagRequired("format")
	_ = c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(exportFormats, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// intoFile calls f with a new file, or with out if there is no name. A file that could not be completed is removed.
func intoFile(name string, out io.Writer, f func(io.Writer) error) (err error) {
	if name == "" {
		w := bufio.NewWriterSize(out, 64<<10)
		return errors.Join(f(w), w.Flush())
	}
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(file, 64<<10)
	err = f(w)
	written := errors.Join(w.Flush(), file.Close())
	if written != nil || err != nil { // that a log is damaged is none: what can be read of it is kept
		return errors.Join(err, written, os.Remove(name))
	}
	return err
}

func (t *tool) export(ctx context.Context, id string, o *exportOptions, out io.Writer) error {
	l, err := t.openLogs("")
	if err != nil {
		return err
	}
	defer l.Close()
	one := func(log auditlog.Stored, m *summary) error {
		r := l.reader(log)
		defer l.count(r, m)
		var err error
		switch o.format {
		case "text":
			err = t.exportText(ctx, r, out)
		case "jsonl":
			err = exportLines(ctx, r, out)
		case "ocsf":
			err = exportEvents(ctx, r, out)
		default:
			err = exportRecording(ctx, l, log, r, o, out)
		}
		return errors.Join(err, context.Cause(ctx))
	}
	if id != "" {
		log, err := find(ctx, l, id)
		if err != nil {
			return err
		}
		if err := one(log, nil); err != nil {
			return err
		}
	} else if err := l.summarizeAll(ctx, o.logs(ctx, l.source), &o.selection, one); err != nil {
		return err
	}
	return nil
}

// exportLines writes all records.
func exportLines(ctx context.Context, r *auditlog.SessionReader, out io.Writer) error {
	for rec := range r.Records(ctx) {
		err := printJSON(out, struct {
			Session string `json:"session"`
			line
		}{r.Report().ID, newLine(rec)})
		if err != nil {
			return err
		}
	}
	return nil
}

func exportEvents(ctx context.Context, r *auditlog.SessionReader, out io.Writer) error {
	c := ocsf.NewConverter(r.Report().ID)
	for rec := range r.Records(ctx) {
		for _, e := range c.Add(rec) {
			if err := printJSON(out, e); err != nil {
				return err
			}
		}
	}
	return nil
}

// exportText writes what could be read, with a few lines about the session before each of its parts.
func (t *tool) exportText(ctx context.Context, r *auditlog.SessionReader, out io.Writer) error {
	m := &summary{}
	var failed error
	printf := func(format string, args ...any) {
		if failed == nil {
			_, failed = fmt.Fprintf(out, format+"\n", args...)
		}
	}
	ordered := &inOrder{emit: func(text string) { printf("%s", text) }}
	tell := func(at time.Time, format string, args ...any) { ordered.add(at, fmt.Sprintf(format, args...)) }
	lines := newRendering(func(l readLine) {
		tell(l.at, "%s  %d %-8s  %s", t.time(l.at), l.channel, l.where(), clean(l.text))
	})
	printf("# session %s", r.Report().ID)
	for rec := range r.Records(ctx) {
		m.add(rec)
		lines.add(rec)
		switch b := rec.Body.(type) {
		case *auditlog.Connect:
			tell(rec.Time, "# %s  from %s", t.time(rec.Time), clean(b.Source))
		case *auditlog.Decision:
			tell(rec.Time, "# %s  user %s, ticket %s, profile %s", t.time(rec.Time), dash(clean(b.User)), dash(clean(b.Ticket)), dash(clean(b.Profile)))
		case *auditlog.Request:
			if c := commandOf(b); c != "" {
				tell(rec.Time, "# %s  %d  %s", t.time(rec.Time), rec.Channel, clean(c))
			}
		}
		if failed != nil {
			return failed
		}
	}
	lines.finish()
	ordered.finish()
	printf("# %s  ended: %s", t.time(m.End), dash(clean(m.Cause)))
	return failed
}

// exportRecording writes one channel.
func exportRecording(ctx context.Context, l *logs, log auditlog.Stored, r *auditlog.SessionReader, o *exportOptions, out io.Writer) error {
	channel := o.channel
	if channel < 0 {
		var err error
		if channel, err = l.playable(ctx, log); err != nil {
			return err
		}
	}
	version := 3
	if o.format == "asciicast-v2" {
		version = 2
	}
	rec := &recordingExport{o: o, version: version, out: safeLines{out}, header: asciicast.Header{Columns: 80, Rows: 24, Title: clean(r.Report().ID)}}
	m := &summary{}
	for one := range r.Records(ctx) {
		m.add(one)
		if one.Channel != uint32(channel) {
			continue
		}
		rec.header.Title = clean(strings.TrimSpace(r.Report().ID + " " + m.User))
		if err := rec.add(one); err != nil {
			return err
		}
	}
	return rec.end()
}

// recordingExport turns a channel's records into a recording. Its header comes when the program starts: the terminal's size is
// known then.
type recordingExport struct {
	o       *exportOptions
	version int
	out     io.Writer
	header  asciicast.Header
	w       *asciicast.Writer // nil: the header is not written
	filter  screen.Filter
	plain   bool
}

func (e *recordingExport) begin(at time.Time) (err error) {
	if e.w == nil {
		e.plain = e.header.Term == ""
		e.header.Start = at
		e.w, err = asciicast.NewWriter(e.out, e.version, e.header)
	}
	return err
}

func (e *recordingExport) add(rec auditlog.Record) error {
	switch b := rec.Body.(type) {
	case *auditlog.Request:
		return e.request(rec, b)
	case *auditlog.ProgramExec:
		if b.Again > 0 {
			return nil
		}
		if err := e.begin(rec.Time); err != nil {
			return err
		}
		return e.w.Mark(rec.Time, short(clean(plainLine(b.Args)), 200))
	case *auditlog.Data:
		if b.Stream == auditlog.Input && !e.o.input || len(b.Data) == 0 {
			return nil
		}
		if err := e.begin(rec.Time); err != nil {
			return err
		}
		if b.Stream == auditlog.Input {
			return e.w.Data(asciicast.Input, rec.Time, b.Data)
		}
		data := b.Data
		if !e.o.raw {
			data = e.filter.Add(data)
		}
		if e.plain { // nothing made line feeds complete
			data = []byte(strings.ReplaceAll(string(data), "\n", "\r\n"))
		}
		if len(data) == 0 {
			return nil
		}
		return e.w.Data(asciicast.Output, rec.Time, data)
	case *auditlog.Exit:
		if err := e.begin(rec.Time); err != nil {
			return err
		}
		status := fmt.Sprint(b.Code)
		if b.Signal != "" {
			status = clean("SIG" + b.Signal)
		}
		return e.w.Exit(rec.Time, status)
	}
	return nil
}

func (e *recordingExport) request(rec auditlog.Record, b *auditlog.Request) error {
	switch {
	case !b.OK && b.Type != "window-change":
	case b.Type == "pty-req" && e.w == nil:
		e.header.Term = clean(b.Term)
		e.header.Columns, e.header.Rows = recordedSize(b, e.header.Columns, e.header.Rows)
		if e.header.Term == "" {
			e.header.Term = "dumb"
		}
	case b.Type == "window-change" && e.w == nil:
		e.header.Columns, e.header.Rows = recordedSize(b, e.header.Columns, e.header.Rows)
	case b.Type == "window-change":
		e.header.Columns, e.header.Rows = recordedSize(b, e.header.Columns, e.header.Rows)
		return e.w.Resize(rec.Time, e.header.Columns, e.header.Rows)
	case commandOf(b) != "":
		if b.Type == "exec" {
			e.header.Command = short(clean(string(b.Command)), maxListedText)
		}
		return e.begin(rec.Time)
	}
	return nil
}

// recordedSize is a terminal's size, within what players can show. A client without a terminal of its own says zero, which is to be
// ignored (RFC 4254, section 6.2): then it is what it was.
func recordedSize(b *auditlog.Request, columns, rows int) (int, int) {
	const most = 1000
	if b.Columns > 0 {
		columns = min(clampInt(b.Columns), most)
	}
	if b.Rows > 0 {
		rows = min(clampInt(b.Rows), most)
	}
	return columns, rows
}

func (e *recordingExport) end() error {
	if e.w == nil {
		return errors.New("export: nothing was printed on that channel")
	}
	return e.w.Close()
}
