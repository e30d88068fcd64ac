package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
)

// maxReportText bounds what a report has of a session's terminals; all of it is export's.
const maxReportText = 256 << 10

var reportFormats = []string{"html", "markdown"}

type reportOptions struct {
	format  string
	to      string
	title   string
	details bool
	selection
}

func (t *tool) reportCommand() *cobra.Command {
	var o reportOptions
	c := &cobra.Command{
		Use: "report [ID]", Short: "Write a report of a session, or of a period, for an audit's evidence", Args: cobra.MaximumNArgs(1),
		Long: `Write a report of one session, or of all that the flags choose: who was where, when, under which ticket, what happened in the order of
time and who vouches for it, files with their hashes, what was on the terminal, and whether the log is whole and by whom it is signed.
Of a period it has a table of the sessions and, with --details, each session too.

The HTML page stands alone: no script, no image, nothing from elsewhere, and a policy in it that forbids all of that. A report is a
copy: what proves it is the log, and the report says with which command.`,
		Example: `  sallyport-audit report latest --out session.html
  sallyport-audit report --since 2026-03-01 --until 2026-03-31 --key gate.pub --out march.html
  sallyport-audit report --ticket OPS-4711 --details --format markdown > OPS-4711.md`,
		ValidArgsFunction: t.completeSessions,
		RunE: func(c *cobra.Command, args []string) error {
			if o.format == "md" {
				o.format = "markdown"
			}
			if !slices.Contains(reportFormats, o.format) {
				return fmt.Errorf("--format %q: want html or markdown", o.format)
			}
			if err := cmp.Or(notBoth(c.Flags(), oneOrMany(args)), o.prepare(time.Now(), t.zone())); err != nil {
				return err
			}
			return intoFile(o.to, c.OutOrStdout(), func(out io.Writer) error { return t.report(c.Context(), oneOrMany(args), &o, out) })
		},
	}
	f := c.Flags()
	f.StringVarP(&o.format, "format", "f", "html", "html or markdown")
	f.StringVar(&o.to, "out", "", "write to this file, which must not be there yet (default: standard output)")
	f.StringVar(&o.title, "title", "", "title of the report")
	f.BoolVar(&o.details, "details", false, "of a period: with each session in full")
	o.flags(f)
	_ = c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(reportFormats, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// reportHead is what stands before the sessions.
type reportHead struct {
	Title, Made, By, Store, Period string
	Chosen                         []pair // by which flags
	Key                            string
	Zone                           string
	Style                          template.CSS // ours
	Policy                         string
}

type pair struct{ Name, Value string }

// reportRow is a session in a report's table. All text is cleaned.
type reportRow struct {
	ID, User, Ticket, Source, Start, Duration, Commands, Alerts, Cause string
	State                                                              string
}

// reportSum is what stands after the table.
type reportSum struct {
	Sessions, Alerts, Users int
	Unread                  int // sessions of which not all could be read
	States                  []pair
}

// reportSession is one session in full. All text is cleaned.
type reportSession struct {
	ID, State, StateNote string
	Facts                []pair
	Moments              []reportMoment
	Files                []reportFile
	Lines                []reportLine
	LinesCut             bool
	Cut                  int
	Problems             []string
	Verify               string
}

type reportMoment struct{ Time, Who, Channel, Text string }
type reportFile struct{ Time, What, Path, Bytes, Result, SHA256 string }
type reportLine struct {
	Time, Where, Text string
	at                time.Time
}

// reportWriter writes a report part by part.
type reportWriter interface {
	head(reportHead) error
	tableHead() error
	row(reportRow) error
	sum(reportSum) error
	session(reportSession) error
	end() error
}

func (t *tool) report(ctx context.Context, id string, o *reportOptions, out io.Writer) error {
	l, err := t.openLogs("")
	if err != nil {
		return err
	}
	defer l.Close()
	var w reportWriter = &htmlReport{w: out}
	if o.format == "markdown" {
		w = &markdownReport{w: out}
	}
	head := t.reportHead(id, o)
	full := func(log auditlog.Stored, m *summary) error {
		s, err := t.reportSession(ctx, l, log, m)
		if err != nil {
			return err
		}
		return w.session(s)
	}
	if id != "" {
		log, err := find(ctx, l, id)
		if err != nil {
			return err
		}
		head.Title = cmp.Or(clean(o.title), "Session "+log.Name.ID)
		if err := errors.Join(w.head(head), full(log, nil), w.end()); err != nil {
			return err
		}
	} else {
		if err := errors.Join(w.head(head), w.tableHead()); err != nil {
			return err
		}
		sum := reportSum{}
		users, states := make(map[string]struct{}), make(map[auditlog.State]int)
		err := l.summarizeAll(ctx, o.logs(ctx, l.source), &o.selection, func(_ auditlog.Stored, m *summary) error {
			sum.Sessions++
			sum.Alerts += int(m.Alerts)
			if states[m.State]++; m.State == auditlog.Damaged { // summarizeAll has told of those that can't be read
				t.damage.add(*m.Report)
			}
			if m.Unread > 0 {
				sum.Unread++
			}
			if len(users) < maxPrograms {
				users[m.User] = struct{}{}
			}
			return w.row(t.reportRow(m))
		})
		if err != nil {
			return err
		}
		sum.Users = len(users)
		for _, s := range []auditlog.State{auditlog.Sealed, auditlog.Interrupted, auditlog.Live, auditlog.Damaged, auditlog.Unreadable} {
			if states[s] > 0 {
				sum.States = append(sum.States, pair{string(s), fmt.Sprint(states[s])})
			}
		}
		if err := w.sum(sum); err != nil {
			return err
		}
		if o.details { // read again: a period may have more sessions than memory
			l.again = true
			err := l.summarizeAll(ctx, o.logs(ctx, l.source), &o.selection, full)
			if err != nil {
				return err
			}
		}
		if err := w.end(); err != nil {
			return err
		}
	}
	return nil
}

func (t *tool) reportHead(id string, o *reportOptions) reportHead {
	h := reportHead{Title: cmp.Or(clean(o.title), "Sessions"), Made: t.stamp(time.Now()), By: "sallyport-audit " + toolVersion(), Store: clean(orStore(t.store)), Style: template.CSS(reportStyle),
		Key: "No key was pinned: each log is checked against the key that it names itself.", Zone: "local"}
	if t.keyFile != "" {
		h.Key = "Every signature was checked against the keys in " + clean(t.keyFile) + "."
	}
	if t.utc {
		h.Zone = "UTC"
	}
	sum := sha256.Sum256([]byte(reportStyle))
	h.Policy = "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'; base-uri 'none'; form-action 'none'"
	if id == "" {
		h.Period = "all sessions"
		if !o.after.IsZero() {
			h.Period = "sessions that began at or after " + t.stamp(o.after)
		}
		if !o.before.IsZero() {
			h.Period = map[bool]string{true: h.Period + ", and", false: "sessions that began"}[!o.after.IsZero()] + " before " + t.stamp(o.before)
		}
		for _, p := range []struct {
			name   string
			values []string
		}{{"user", o.users}, {"group", o.groups}, {"ticket", o.tickets}, {"source", o.sources}, {"image", o.images}, {"profile", o.profiles}, {"cause", o.causes}, {"state", o.states},
			{"has command", nonEmpty(o.command)}, {"has file", nonEmpty(o.file)}, {"alerts", nonEmpty(map[bool]string{true: "yes"}[o.alerts])}} {
			if len(p.values) > 0 {
				h.Chosen = append(h.Chosen, pair{p.name, clean(strings.Join(p.values, ", "))})
			}
		}
	}
	return h
}

// encryptedNote stands in a report that was made without an identity that opens the log.
const encryptedNote = "It is encrypted, and was not read in full: what is not told here may have happened all the same."

func nonEmpty(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}

func (t *tool) reportRow(m *summary) reportRow {
	commands := fmt.Sprint(len(m.Commands))
	if len(m.Commands) == 1 {
		commands = short(clean(m.Commands[0]), 60)
	}
	return reportRow{ID: m.ID, User: dash(clean(m.User)), Ticket: dash(clean(m.Ticket)), Source: dash(clean(m.Source)), Start: t.stamp(m.Start),
		Duration: m.End.Sub(m.Start).Round(time.Second / 10).String(), Commands: commands, Alerts: number(m.Alerts), State: string(m.State), Cause: dash(clean(m.Cause))}
}

// reportSession reads a session in full.
func (t *tool) reportSession(ctx context.Context, l *logs, log auditlog.Stored, m *summary) (reportSession, error) {
	a := newAccount()
	var s reportSession
	text := 0
	lines := newRendering(func(line readLine) {
		if text += len(line.text) + 64; text > maxReportText {
			s.LinesCut = true
			return
		}
		s.Lines = append(s.Lines, reportLine{"", fmt.Sprint(line.channel, " ", line.where()), clean(line.text), line.at})
	})
	var clockFile func(time.Time) string
	r := l.reader(log)
	defer func() {
		if m == nil || r.Report().State != m.State { // else its row has told
			l.count(r, nil)
		}
	}()
	for rec := range r.Records(ctx) {
		a.add(rec)
		if !s.LinesCut {
			lines.add(rec)
		}
		if b, ok := rec.Body.(*auditlog.Transfer); ok && len(s.Files) < maxShownEvents {
			if clockFile == nil {
				clockFile = t.clockFrom(a.Start)
			}
			s.Files = append(s.Files, reportFileOf(clockFile(rec.Time), b))
		}
	}
	if err := context.Cause(ctx); err != nil {
		return s, err
	}
	lines.finish()
	slices.SortStableFunc(s.Lines, func(a, b reportLine) int { return a.at.Compare(b.at) }) // see inOrder
	clock := t.clockFrom(a.Start)
	for i, l := range s.Lines {
		s.Lines[i].Time = clock(l.at)
	}
	a.end(r.Report())
	t.reportFacts(&s, a)
	moments, cut := t.moments(a)
	s.Cut = cut
	clock = t.clockFrom(a.Start)
	for _, m := range moments {
		var b bytes.Buffer
		m.tell(&textWriter{w: &b})
		channel := ""
		if m.channel > 0 {
			channel = fmt.Sprint(m.channel)
		}
		s.Moments = append(s.Moments, reportMoment{clock(m.at), m.who, channel, strings.TrimRight(b.String(), "\n")})
	}
	return s, nil
}

func reportFileOf(at string, b *auditlog.Transfer) reportFile {
	f := reportFile{Time: at, What: clean(transferWord(b)), Path: clean(short(transferPath(b), 1000)), Bytes: "-", Result: clean(short(transferResult(b), 200))}
	if target := transferTarget(b); target != "" {
		f.Path += " to " + clean(short(target, 1000))
	}
	if flow := transferFlow(b); flow != nil && b.Op != "list" {
		n, how := flowBytes(flow)
		if f.Bytes = fmt.Sprint(n); how != "" {
			f.Bytes += ", " + how
		}
		if f.SHA256 = hex.EncodeToString(flow.SHA256); f.SHA256 != "" && !flow.Whole {
			f.SHA256 += " (of these bytes)"
		}
	}
	return f
}

// reportFacts fills in who, when, where, and what the log is worth.
func (t *tool) reportFacts(s *reportSession, a *account) {
	s.ID, s.State = a.ID, string(a.State)
	switch a.State {
	case auditlog.Sealed:
		s.StateNote = "The log is whole, and its gate has ended and signed it."
	case auditlog.Interrupted:
		s.StateNote = "The gate was killed. The log is whole as far as the gate came, and was sealed by its next start."
	case auditlog.Live:
		s.StateNote = "The log has no end yet: the session goes on, or its newest segments are missing."
	case auditlog.Unreadable:
		s.StateNote = "Not all of the log could be read, which says nothing against it. What is told here is what could be."
	default:
		s.StateNote = "The log is damaged. What is told here is what can still be read of it."
	}
	if a.report.Unread > 0 {
		s.StateNote += " " + encryptedNote
	}
	fact := func(name, value string) {
		if value != "" {
			s.Facts = append(s.Facts, pair{name, clean(value)})
		}
	}
	fact("not shown", unreadText(a.report))
	fact("user", a.User)
	fact("groups", strings.Join(a.Groups, ", "))
	fact("from", a.Source)
	fact("ticket", strings.Join(append(a.Tickets[:len(a.Tickets):len(a.Tickets)], map[bool]string{true: a.Ticket}[len(a.Tickets) == 0]), ", "))
	fact("profile", a.Profile)
	fact("gate", a.report.Gate)
	fact("image", strings.TrimSpace(a.Image+" "+a.Digest))
	fact("began", t.stamp(a.Start))
	fact("last record", t.stamp(a.End)+", after "+a.summary.End.Sub(a.Start).Round(time.Millisecond).String())
	fact("ended by", a.Cause)
	fact("asked to run", strings.Join(a.Commands, "; "))
	fact("alerts", number(a.Alerts))
	fact("bytes", fmt.Sprintf("%d in, %d out", a.Input, a.Output))
	fact("imported from", a.Imported)
	fact("log", fmt.Sprintf("%d segments, %d records, %d bytes", a.report.Segments, a.report.Records, a.report.Bytes))
	pinned := " (not pinned)"
	if a.report.Pinned {
		pinned = " (pinned)"
	}
	fact("signed by", strings.Join(a.report.Keys, " ")+pinned)
	for _, p := range a.report.Problems {
		s.Problems = append(s.Problems, clean(p.String()))
	}
	if a.report.More > 0 {
		s.Problems = append(s.Problems, fmt.Sprintf("and %d problems more", a.report.More))
	}
	s.Verify = "sallyport-audit verify " + a.ID + " --key FILE"
}

//go:embed report.css
var reportStyle string

//go:embed report.html.tmpl
var reportPage string

var reportTemplates = template.Must(template.New("report").Parse(reportPage))

// htmlReport writes a page. html/template escapes what comes from a log.
type htmlReport struct{ w io.Writer }

func (h *htmlReport) part(name string, data any) error {
	return reportTemplates.ExecuteTemplate(h.w, name, data)
}

func (h *htmlReport) head(v reportHead) error       { return h.part("head", v) }
func (h *htmlReport) tableHead() error              { return h.part("table", nil) }
func (h *htmlReport) row(v reportRow) error         { return h.part("row", v) }
func (h *htmlReport) sum(v reportSum) error         { return h.part("sum", v) }
func (h *htmlReport) session(v reportSession) error { return h.part("session", v) }
func (h *htmlReport) end() error                    { return h.part("end", nil) }
