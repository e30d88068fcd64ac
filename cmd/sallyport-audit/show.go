package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
)

// Bounds of what an account keeps: a log may be larger than memory.
const (
	maxShownText     = 64 << 10 // of one stream
	maxShownChannels = 200
	maxShownEvents   = 500 // of the connection, and of a channel
)

// account is what show says of a session.
type account struct {
	summary
	report   auditlog.Report
	inside   *programs         // of no channel
	events   []auditlog.Record // of the connection
	channels []*channel
	byNumber map[uint32]*channel
	cut      int // events that found no room
	kept     int // bytes of bodies that are kept
}

// maxKept bounds the bytes of the records that an account, or a tree of programs, keeps.
const maxKept = 16 << 20

// room says whether a record's body still has room, and takes it.
func (a *account) room(b auditlog.Body) bool {
	n := weight(b)
	if a.kept+n > maxKept {
		return false
	}
	a.kept += n
	return true
}

// channel is what show says of a channel.
type channel struct {
	number  uint32
	inside  *programs
	opened  auditlog.Record
	events  []auditlog.Record // requests, exit, close
	cut     int
	streams [3]shownStream
	hidden  int
	pty     bool
}

type shownStream struct {
	bytes  uint64
	text   strings.Builder
	term   terminalText
	binary bool
	cut    bool
	head   []byte // its first 9 bytes
}

func (t *tool) showCommand() *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Tell a session in words", Args: cobra.ExactArgs(1),
		Long: `Tell a session in words, in the order of time: who, from where, with which key, what policy decided, in which sandbox; what was
asked for on each channel (the number before it), which programs ran, what they connected to, which files went which way, how it
ended. Each line says who vouches for it: the gate, which has seen it; the sandbox's agent, inside; or nobody. Then what was typed and
printed. Output is made safe to print: see cat --raw for the exact bytes.`,
		Example: `  sallyport-audit show latest
  sallyport-audit show 01JD --utc -o json`,
		ValidArgsFunction: t.completeSessions,
		RunE: func(c *cobra.Command, args []string) error {
			return t.paged(c, func(out io.Writer) error { return t.show(c.Context(), args[0], out) })
		},
	}
}

func (t *tool) show(ctx context.Context, id string, out io.Writer) error {
	return t.withSession(ctx, id, func(_ auditlog.Source, r *auditlog.SessionReader) error {
		a := newAccount()
		for rec := range r.Records(ctx) {
			a.add(rec)
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		a.end(r.Report())
		var err error
		if t.output == "json" {
			err = printJSON(out, a.json())
		} else {
			w := &textWriter{w: out, lead: "  "}
			t.tell(w, a)
			err = w.err
		}
		return cmp.Or(err, verdict(a.State))
	})
}

func newAccount() *account {
	return &account{byNumber: make(map[uint32]*channel), inside: newPrograms(maxShownPrograms)}
}

// end takes the verdict, after the last record.
func (a *account) end(rep auditlog.Report) {
	a.report = rep
	a.finish(rep)
	a.summary.Report = nil // json has it
}

func (a *account) add(rec auditlog.Record) {
	a.summary.add(rec)
	if rec.Channel == 0 && a.inside.add(rec) {
		return
	}
	if rec.Channel == 0 {
		if len(a.events) < maxShownEvents && a.room(rec.Body) || rec.Body.Kind() == auditlog.KindEnd {
			a.events = append(a.events, rec)
		} else {
			a.cut++
		}
		return
	}
	c := a.byNumber[rec.Channel]
	if c == nil {
		if len(a.channels) >= maxShownChannels {
			a.cut++
			return
		}
		c = &channel{number: rec.Channel, inside: newPrograms(maxShownPrograms)}
		a.byNumber[rec.Channel] = c
		a.channels = append(a.channels, c)
	}
	if c.inside.add(rec) {
		return
	}
	switch b := rec.Body.(type) {
	case *auditlog.Data:
		if b.Hidden {
			c.hidden++
		}
		if int(b.Stream) < len(c.streams) {
			c.streams[b.Stream].add(b.Data, &a.kept)
		}
		return
	case *auditlog.ChannelOpen:
		if a.room(b) {
			c.opened = rec
		}
		return
	case *auditlog.Content:
		return // see extract
	case *auditlog.Request:
		c.pty = c.pty || b.Type == "pty-req" && b.OK
	}
	if len(c.events) < maxShownEvents && a.room(rec.Body) || rec.Body.Kind() == auditlog.KindExit {
		c.events = append(c.events, rec)
	} else {
		c.cut++
	}
}

// add takes bytes; kept is what all that an account keeps has already.
func (s *shownStream) add(p []byte, kept *int) {
	s.bytes += uint64(len(p))
	s.head = append(s.head, p[:min(len(p), 9-len(s.head))]...)
	s.binary = s.binary || bytes.IndexByte(p, 0) >= 0
	if s.binary {
		s.text.Reset()
		return
	}
	if room := min(maxShownText-s.text.Len(), (maxKept-*kept)/6); room <= 0 {
		s.cut = s.cut || len(p) > 0
		return
	} else if len(p) > room {
		p, s.cut = p[:room], true
	}
	before := s.text.Len()
	s.text.WriteString(s.term.add(p))
	*kept += s.text.Len() - before
}

// textWriter keeps the first error.
type textWriter struct {
	w    io.Writer
	err  error
	lead string // of fields
}

func (w *textWriter) line(format string, args ...any) {
	if w.err == nil {
		_, w.err = fmt.Fprintf(w.w, format+"\n", args...)
	}
}

// field prints a labelled value, if there is one. Values come from a log, so all are cleaned here.
func (w *textWriter) field(label string, values ...string) {
	var there []string
	for _, v := range values {
		if v != "" {
			there = append(there, clean(v))
		}
	}
	if len(there) > 0 {
		w.line("%s%-10s %s", w.lead, clean(label), strings.Join(there, ", ")) // a label can be a request's type
	}
}

func labelled(label, v string) string {
	if v == "" {
		return ""
	}
	return label + " " + v
}

func (t *tool) tell(w *textWriter, a *account) {
	w.line("%s %s: %s", map[bool]string{true: "gate log", false: "session"}[a.report.Kind == "gate"], a.ID, a.State)
	end := "still open"
	switch {
	case a.Cause != "":
		end = "ended: " + a.Cause
	case a.report.Unread > 0 && a.State != auditlog.Live:
		end = "its end is not shown"
	}
	w.field("time", t.time(a.Start)+" to "+t.time(a.End), time.Duration(a.Seconds*float64(time.Second)).Round(time.Millisecond).String(), end)
	key := "not pinned, see --key"
	if a.report.Pinned {
		key = "pinned"
	}
	w.field("signed by", strings.Join(a.report.Keys, " ")+" ("+key+")")
	w.field("not shown", unreadText(a.report))
	t.tellAccount(w, a)
	for _, c := range a.channels {
		c.tellStreams(w)
	}
	for _, p := range a.report.Problems {
		w.line("%s: %s", a.State, clean(p.String()))
	}
	if a.report.More > 0 {
		w.line("%s: %d problems more", a.State, a.report.More)
	}
}

// Who vouches for a line of the account.
const (
	byGate   = "gate"
	byInside = "inside"
	byNobody = "?"
)

// moment is a line or more of the account.
type moment struct {
	at      time.Time
	who     string
	channel uint32 // 0: the connection
	tell    func(*textWriter)
}

// tellAccount tells all that happened, in the order of time.
func (t *tool) tellAccount(w *textWriter, a *account) {
	all, cut := t.moments(a)
	w.line("")
	w.line("what happened (gate: seen by the gate; inside: reported from inside; ?: not known)")
	clock := t.clockFrom(a.Start)
	for _, m := range all {
		number := ""
		if m.channel > 0 {
			number = fmt.Sprint(m.channel)
		}
		at := clock(m.at)
		if day, rest, other := strings.Cut(at, " "); other {
			w.line("  %s", day)
			at = rest
		}
		w.lead = fmt.Sprintf("  %s %-6s %3s  ", at, m.who, number)
		m.tell(w)
	}
	w.lead = "  "
	if cut > 0 {
		w.line("  and %d records more: see cat", cut)
	}
}

// moments gives all that is told, in the order of time, and how many records found no room.
func (t *tool) moments(a *account) (all []moment, cut int) {
	add := func(at time.Time, who string, channel uint32, tell func(*textWriter)) {
		all = append(all, moment{at, who, channel, tell})
	}
	cut = a.cut
	inside := func(p *programs, channel uint32) {
		for _, l := range p.lines(p.roots, true) {
			add(l.at, byInside, channel, func(w *textWriter) {
				w.line("%s%s%s", w.lead, l.indent(), l.text)
				for _, note := range l.notes {
					w.line("%*s%s  ! %s", len(w.lead), "", l.indent(), note)
				}
			})
		}
		cut += p.cut
	}
	told := false
	for _, rec := range a.events {
		add(rec.Time, byGate, 0, func(w *textWriter) { t.tellEvent(w, rec) })
		if b, ok := rec.Body.(*auditlog.Sandbox); ok && !told && b.Error == "" && (b.ExecAudit == "" || strings.HasPrefix(b.ExecAudit, "off")) {
			told = true // a second record of the same sandbox has its image's digest
			add(rec.Time, byNobody, 0, func(w *textWriter) { w.field("programs", "not known: exec audit "+cmp.Or(b.ExecAudit, "off")) })
		}
	}
	inside(a.inside, 0)
	for _, c := range a.channels {
		if c.opened.Body != nil {
			add(c.opened.Time, byGate, c.number, func(w *textWriter) { t.tellOpened(w, c) })
		}
		for _, rec := range c.events {
			add(rec.Time, byGate, c.number, func(w *textWriter) { t.tellChannelEvent(w, rec) })
		}
		if what := c.untold(); what != "" && c.opened.Body != nil {
			add(c.opened.Time, byNobody, c.number, func(w *textWriter) { w.field("files", "not known: "+what) })
		}
		inside(c.inside, c.number)
		cut += c.cut
	}
	slices.SortStableFunc(all, func(a, b moment) int { return a.at.Compare(b.at) })
	return all, cut
}

// untold says why the log does not tell which files went over the channel, if it looks as if some had.
func (c *channel) untold() string {
	for _, rec := range c.events {
		b, ok := rec.Body.(*auditlog.Request)
		if !ok || b.Type != "exec" {
			if ok && b.Type == "subsystem" || rec.Body.Kind() == auditlog.KindTransfer {
				return "" // that is told
			}
			continue
		}
		words := strings.Fields(string(b.Command))
		switch {
		case len(words) == 0:
		case words[0] == "rsync":
			return "the bytes of rsync's protocol are kept as they are"
		case strings.HasPrefix(words[0], "git-"):
			return "the bytes of git's protocol are kept as they are"
		}
	}
	// SSH_FXP_INIT, where the gate was not asked for sftp: a server of the session's own answers.
	if h := c.streams[0].head; len(h) == 9 && string(h[:5]) == "\x00\x00\x00\x05\x01" {
		return "it speaks sftp with a program of its own, and the bytes are kept as they are"
	}
	return ""
}

// tellEvent tells what happened to the connection.
func (t *tool) tellEvent(w *textWriter, rec auditlog.Record) {
	switch b := rec.Body.(type) {
	case *auditlog.Connect:
		w.field("from", b.Source, labelled("to", b.Local), labelled("gate", b.Gate))
	case *auditlog.Handshake:
		w.field("client", b.Client, b.Kex, b.CipherIn)
	case *auditlog.Authenticate:
		w.field("auth", "user "+b.User, b.Method, b.KeyType, b.Fingerprint, b.Result, b.Reason)
	case *auditlog.Decision:
		until := ""
		if !b.NotAfter.IsZero() {
			until = "until " + t.time(b.NotAfter)
		}
		verdict := "refused"
		if b.Allow {
			verdict = "allowed"
		}
		w.field("decision", verdict, b.Reason, labelled("user", b.User), labelled("ticket", b.Ticket), labelled("profile", b.Profile), until,
			b.Why, labelled("approved by", b.Approved), labelled("policy", b.Revision))
	case *auditlog.Sandbox:
		took := ""
		if b.Took > 0 {
			took = "started in " + b.Took.Round(time.Millisecond).String()
		}
		w.field("sandbox", b.Backend, b.ID, labelled("image", b.Image), b.Digest, labelled("on", b.Node), took, labelled("exec audit", b.ExecAudit), labelled("failed:", b.Error))
		if b.Target != "" {
			w.field("target", b.Target, labelled("container", b.TargetContainer), labelled("image", b.TargetImage), b.TargetDigest,
				labelled("ID", b.TargetID), labelled("joined:", strings.Join(b.Joined, " ")))
			for _, text := range b.Weaker {
				w.field("weaker", text)
			}
		}
	case *auditlog.Request:
		w.field("request", b.Type, b.Name, labelled("at", b.Value), answer(b.OK), b.Reason)
	case *auditlog.Forward:
		t.tellForward(w, b)
	case *auditlog.Alert:
		w.field("ALERT", b.Name, b.Detail)
	case *auditlog.End:
		w.field("end", b.Cause, b.Detail, t.time(rec.Time))
	case *auditlog.Import:
		w.field("imported", b.Format, "file "+b.File, fmt.Sprintf("sha256 %x", b.SHA256), t.time(b.Time), b.Version)
		w.field("", b.Statement)
	case *auditlog.ImportNote:
		w.field("import", fmt.Sprintf("message of type %d", b.Type), b.Text)
	case *auditlog.Refused:
		w.field("refused", fmt.Sprintf("%d from %s", b.Count, b.Source), b.Client, labelled("users", strings.Join(b.Users, " ")),
			labelled("keys", strings.Join(b.Fingerprints, " ")), b.Reason, t.time(b.First)+" to "+t.time(b.Last))
	default:
		w.field("record", rec.Body.Kind().String())
	}
}

func answer(ok bool) string {
	if ok {
		return ""
	}
	return "refused"
}

// tellOpened tells of a channel's beginning, where that is more than what every session has.
func (t *tool) tellOpened(w *textWriter, c *channel) {
	if b, ok := c.opened.Body.(*auditlog.ChannelOpen); ok {
		session := ""
		if b.Session > 0 {
			session = fmt.Sprintf("for channel %d", b.Session)
		}
		w.field("channel", b.Type, labelled("to", b.Target), labelled("from", b.Originator), session, labelled("refused:", b.Error))
	}
}

// tellChannelEvent tells what happened on a channel.
func (t *tool) tellChannelEvent(w *textWriter, rec auditlog.Record) {
	switch b := rec.Body.(type) {
	case *auditlog.Request:
		switch b.Type {
		case "exec":
			w.field("exec", string(b.Command), answer(b.OK), b.Reason)
		case "subsystem":
			w.field("subsystem", b.Name, answer(b.OK), b.Reason)
		case "env":
			w.field("env", b.Name+"="+b.Value, answer(b.OK), b.Reason)
		case "pty-req", "window-change":
			w.field(b.Type, b.Term, fmt.Sprintf("%d columns %d rows", b.Columns, b.Rows), answer(b.OK), b.Reason)
		default:
			w.field(b.Type, cmp.Or(b.Name, map[bool]string{true: "accepted"}[b.OK]), answer(b.OK), b.Reason)
		}
	case *auditlog.Transfer:
		w.tellTransfer(b)
	case *auditlog.DataRest:
		if b.End {
			w.field("not kept", fmt.Sprintf("%s beyond %s of %s", streamName(b.Stream), size(b.Offset), size(b.Bytes)), fmt.Sprintf("sha256 of all %x", b.SHA256))
		} else {
			w.field("not kept", fmt.Sprintf("%s beyond %s", streamName(b.Stream), size(b.Offset)))
		}
	case *auditlog.Alert:
		w.field("ALERT", b.Name, b.Detail)
	case *auditlog.Forward:
		t.tellForward(w, b)
	case *auditlog.Exit:
		w.field("exit", exitText(b), b.Error)
	case *auditlog.ImportNote:
		w.field("import", fmt.Sprintf("message of type %d", b.Type), b.Text)
	}
}

// tellStreams prints what passed, as text if it is that.
func (c *channel) tellStreams(w *textWriter) {
	if c.streams[0].bytes+c.streams[1].bytes+c.streams[2].bytes == 0 && c.hidden == 0 {
		return
	}
	w.line("")
	w.line("what passed on channel %d", c.number)
	text := !slices.ContainsFunc(c.events, func(rec auditlog.Record) bool {
		b, ok := rec.Body.(*auditlog.Request)
		return ok && b.Type == "subsystem"
	})
	for i, label := range []string{"input", "output", "error"} {
		s := &c.streams[i]
		if s.bytes == 0 {
			continue
		}
		note := size(s.bytes)
		switch {
		case !text:
		case s.binary:
			note += ", binary"
		case s.cut:
			note += ", its start:"
		default:
			note += ":"
		}
		w.line("  %-10s %s", label, note)
		if text && !s.binary {
			body := strings.TrimRight(s.text.String()+s.term.end(), "\n")
			for l := range strings.SplitSeq(body, "\n") {
				w.line("    | %s", l)
			}
		}
	}
	if c.hidden > 0 {
		w.line("  %-10s input while a password was asked for, %d times", "hidden", c.hidden)
	}
}

// tellForward tells what became of a forwarded connection, or of a listener.
func (t *tool) tellForward(w *textWriter, b *auditlog.Forward) {
	values := []string{b.Address}
	switch b.Type { // a request's: a listener
	case "tcpip-forward", "streamlocal-forward@openssh.com", "auth-agent-req@openssh.com", "x11-req":
		values = append([]string{b.Type}, append(values, fmt.Sprintf("%d connections", b.Connections))...)
	default:
		values = append(values, fmt.Sprintf("%s in, %s out", size(b.Input), size(b.Output)))
		if !b.First.IsZero() {
			values = append(values, "bytes from "+t.time(b.First)+" to "+t.time(b.Last))
		}
	}
	w.field("forward", append(values, b.Result, b.Detail)...)
}

func exitText(b *auditlog.Exit) string {
	switch {
	case b.Signal != "":
		return "by signal " + b.Signal
	case b.Error != "" && b.Code == 0:
		return "failed"
	}
	return fmt.Sprintf("code %d", b.Code)
}

// json is the account as JSON.
func (a *account) json() any {
	type stream struct {
		Bytes  uint64 `json:"bytes"`
		Text   string `json:"text,omitempty"`
		Binary bool   `json:"binary,omitempty"`
		Cut    bool   `json:"cut,omitempty"`
	}
	type jsonChannel struct {
		Channel uint32 `json:"channel"`
		Opened  *line  `json:"opened,omitempty"`
		Events  []line `json:"events"`
		Input   stream `json:"input"`
		Output  stream `json:"output"`
		Error   stream `json:"error"`
		Hidden  int    `json:"hidden,omitempty"`

		Programs []jsonProgram `json:"programs,omitempty"` // reported from inside
		More     int           `json:"more_programs,omitempty"`
	}
	channels := make([]jsonChannel, 0, len(a.channels))
	for _, c := range a.channels {
		j := jsonChannel{Channel: c.number, Events: newLines(c.events), Hidden: c.hidden}
		if !c.inside.empty() {
			j.Programs, j.More = jsonPrograms(c.inside.roots, func(uint64) uint32 { return c.number }, 0), c.inside.cut
		}
		if c.opened.Body != nil {
			l := newLine(c.opened)
			j.Opened = &l
		}
		for i, to := range []*stream{&j.Input, &j.Output, &j.Error} {
			s := &c.streams[i]
			*to = stream{s.bytes, s.text.String() + s.term.end(), s.binary, s.cut}
		}
		channels = append(channels, j)
	}
	a.summary.Report = &a.report
	return struct {
		summary
		Events   []line        `json:"events"`
		Channels []jsonChannel `json:"channels"`
		Outside  []any         `json:"unaudited,omitempty"`
		Cut      int           `json:"more_records,omitempty"`
	}{a.summary, newLines(a.events), channels, bodies(a.inside.outside), a.cut}
}
