package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
)

const (
	maxHitText     = 400 // bytes of a line that are shown around what was found
	defaultHits    = 1_000
	maxSessionHits = 20_000 // they are kept until those of the sessions before it are printed
)

// searchOptions say what is looked for, and where.
type searchOptions struct {
	ignoreCase bool
	regexp     bool
	in         []string
	id         string
	selection
}

// hit is a place where the text was found.
type hit struct {
	Session  string    `json:"session"`
	User     string    `json:"user,omitempty"`
	Time     time.Time `json:"time"`
	Channel  uint32    `json:"channel"`
	Where    string    `json:"where"` // terminal; input, output, error without one; command, program, file
	Text     string    `json:"text"`  // the line, or the part of it around what was found
	from, to int       // of what was found, in Text
}

// places are where a search looks, by the names that --in takes.
var places = []string{"terminal", "command", "file"}

func (t *tool) searchCommand() *cobra.Command {
	var o searchOptions
	c := &cobra.Command{
		Use: "search TEXT", Short: "Find text in what was read, run and transferred", Args: cobra.ExactArgs(1),
		Long: `Find a text in sessions: on their terminals, as a person would have read them (a word in two colours is one word, a line that ran
over the end of a row is one line; what was corrected before anybody could read it is not found, nor are titles and other things that
are not seen), in what passed without a terminal, in commands and programs with their arguments, and in the names of files. What was
typed is found where the terminal showed it.

The flags choose the sessions, as for list. Several are read at the same time. The exit code is 1 if nothing was found, 2 if a log that
was read is damaged.`,
		Example: `  sallyport-audit search 'DROP TABLE'
  sallyport-audit search -I password --user alice --since 1w
  sallyport-audit search -e 'token=[0-9a-f]{32}' --in terminal -o json
  sallyport-audit search payroll.csv --in file,command --session 01JD`,
		RunE: func(c *cobra.Command, args []string) error {
			match, err := o.matcher(args[0])
			if err != nil {
				return err
			}
			if err := cmp.Or(notBoth(c.Flags(), o.id, "limit"), o.prepare(time.Now(), t.zone())); err != nil {
				return err
			}
			for _, p := range o.in {
				if !slices.Contains(places, p) {
					return fmt.Errorf("--in %q: want %s", p, strings.Join(places, ", "))
				}
			}
			return t.paged(c, func(out io.Writer) error { return t.search(c.Context(), match, &o, out, c.ErrOrStderr()) })
		},
	}
	f := c.Flags()
	f.BoolVarP(&o.ignoreCase, "ignore-case", "I", false, "let case not count")
	f.BoolVarP(&o.regexp, "regexp", "e", false, "TEXT is a regular expression (RE2)")
	f.StringSliceVar(&o.in, "in", nil, "look only in these: terminal (and other output), command, file")
	f.StringVar(&o.id, "session", "", "look only in this session")
	o.flags(f)
	_ = f.Set("limit", fmt.Sprint(defaultHits))
	f.Lookup("limit").DefValue = fmt.Sprint(defaultHits)
	f.Lookup("limit").Usage = "stop after this many places (0: no limit)"
	_ = c.RegisterFlagCompletionFunc("in", cobra.FixedCompletions(places, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("session", func(c *cobra.Command, _ []string, start string) ([]string, cobra.ShellCompDirective) {
		return t.completeSessions(c, nil, start)
	})
	return c
}

// matcher gives what finds the text in a line: where it begins and ends, -1 if it is not there.
func (o *searchOptions) matcher(text string) (func(string) (from, to int), error) {
	switch {
	case text == "":
		return nil, errors.New("search: no text")
	case !o.regexp && !o.ignoreCase:
		return func(line string) (int, int) {
			i := strings.Index(line, text)
			return i, i + len(text)
		}, nil
	case !o.regexp:
		text = regexp.QuoteMeta(text)
	}
	if o.ignoreCase {
		text = "(?i:" + text + ")"
	}
	re, err := regexp.Compile(text)
	if err != nil {
		return nil, fmt.Errorf("search: %w", err)
	}
	return func(line string) (int, int) {
		if at := re.FindStringIndex(line); at != nil {
			return at[0], at[1]
		}
		return -1, -1
	}, nil
}

// searched is what was found in a session.
type searched struct {
	id     string
	hits   []hit
	more   int // that had no room
	report auditlog.Report
}

func (t *tool) search(ctx context.Context, match func(string) (int, int), o *searchOptions, out, stderr io.Writer) error {
	l, err := t.openLogs("")
	if err != nil {
		return err
	}
	defer l.Close()
	p := newProgress(out, stderr)
	defer p.clear()
	st := styleOf(out)
	found, begun := 0, 0
	most := maxSessionHits
	if o.limit > 0 {
		most = min(most, o.limit)
	}
	err = each(ctx, counted(l.chosen(ctx, o.id, &o.selection), &begun, p), func(ctx context.Context, log auditlog.Stored) searched {
		r := l.reader(log)
		s := searchLog(ctx, r, match, o, most)
		t.countUnread(r.Report())
		return s
	}, func(s searched) error {
		t.damage.add(s.report)
		for _, h := range s.hits {
			p.clear()
			if err := t.printHit(out, st, h); err != nil {
				return err
			}
			if found++; found == o.limit {
				return errEnough
			}
		}
		if s.more > 0 {
			fmt.Fprintf(stderr, "sallyport-audit: session %s has %d places more\n", s.id, s.more)
		}
		return nil
	})
	p.clear()
	switch {
	case errors.Is(err, errEnough):
		fmt.Fprintf(stderr, "sallyport-audit: stopped after %d places; see --limit\n", found)
	case err != nil:
		return err
	}
	if found == 0 {
		if begun == 0 && o.id == "" {
			o.tellEmpty(stderr, orStore(t.store))
		}
		return errNothing
	}
	return nil
}

// errNothing is returned, after a search, when nothing was found.
var errNothing = errors.New("nothing was found")

// searchLog looks through one session.
func searchLog(ctx context.Context, r *auditlog.SessionReader, match func(string) (int, int), o *searchOptions, most int) searched {
	in := func(place string) bool { return len(o.in) == 0 || slices.Contains(o.in, place) }
	m := &summary{}
	var s searched
	look := func(at time.Time, channel uint32, where, text string) {
		from, to := match(text)
		if from < 0 {
			return
		}
		if len(s.hits) >= most {
			s.more++
			return
		}
		h := hit{Time: at, Channel: channel, Where: where}
		h.Text, h.from, h.to = around(text, from, to)
		s.hits = append(s.hits, h)
	}
	lines := newRendering(func(l readLine) { look(l.at, l.channel, l.where(), l.text) })
	for rec := range r.Records(ctx) {
		m.add(rec)
		o.watch(m, rec)
		if in("terminal") {
			lines.add(rec)
		}
		if in("command") {
			where := "program"
			if _, ok := rec.Body.(*auditlog.Request); ok {
				where = "command"
			}
			for _, text := range commandTexts(rec) {
				if from, _ := match(text); from >= 0 {
					look(rec.Time, rec.Channel, where, text)
					break // arguments and path say the same
				}
			}
		}
		if b, ok := rec.Body.(*auditlog.Transfer); ok && in("file") {
			for _, p := range fileTexts(b) {
				if from, _ := match(string(p)); from >= 0 {
					look(rec.Time, rec.Channel, "file", string(p))
					break
				}
			}
		}
	}
	lines.finish()
	m.finish(r.Report())
	if o.id == "" && !o.match(m) {
		if m.State == auditlog.Unreadable { // what is asked for may be in it
			return searched{report: *m.Report}
		}
		return searched{}
	}
	s.id, s.report = m.ID, r.Report()
	// A line is known when it is gone from the screen, not when it came: hits are in the order of their times.
	slices.SortStableFunc(s.hits, func(a, b hit) int { return a.Time.Compare(b.Time) })
	for i := range s.hits {
		s.hits[i].Session, s.hits[i].User = m.ID, m.User
	}
	return s
}

// around cuts a line to what stands around the bytes from and to of it, without its blanks at the ends.
func around(text string, from, to int) (string, int, int) {
	start, end := 0, len(text)
	for start < from && text[start] == ' ' {
		start++
	}
	if end-start <= maxHitText {
		return text[start:end], from - start, to - start
	}
	start = max(start, from-maxHitText/4)
	end = min(end, start+maxHitText)
	for start > 0 && start < from && text[start]&0xc0 == 0x80 {
		start++
	}
	for end < len(text) && end > start && text[end]&0xc0 == 0x80 {
		end--
	}
	return strings.Clone(text[start:end]), from - start, min(to, end) - start
}

func (t *tool) printHit(out io.Writer, st style, h hit) error {
	if t.output == "json" {
		return printJSON(out, h)
	}
	h.to = max(h.from, h.to)
	text := clean(h.Text[:h.from]) + st.mark(clean(h.Text[h.from:h.to])) + clean(h.Text[h.to:])
	_, err := fmt.Fprintf(out, "%s  %s  %s  %s  %s\n", st.dim(t.time(h.Time)), st.bold(h.Session), dash(clean(h.User)), st.dim(fmt.Sprintf("%-8s %d", h.Where, h.Channel)), text)
	return err
}
